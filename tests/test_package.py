"""The face of the package: its public names, their signatures, and what their docstrings begin with."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stepsal

ROOT = Path(__file__).parents[1]
ROOMS = sorted(f"stepsal.{path.parent.name}" for path in (ROOT / "stepsal").glob("*/__init__.py"))
CALLABLES = """
    Continuation Decoding Segmentation StepFlowConfig StepSaliency Trace Variant calibrate collect edit_gains evaluate
    generate generate_batch load step_attention step_saliency stepflow token_effects
""".split()


def public() -> Iterator[tuple[str, object]]:
    """Yield the functions and classes that the top and its rooms list, once each, under their shortest names.

    Protocols are left out: they say what others may write, and nobody calls them.
    """
    names: dict[int, tuple[str, object]] = {}
    for module in ("stepsal", *ROOMS):
        for name in getattr(importlib.import_module(module), "__all__", ()):
            value = getattr(importlib.import_module(module), name)
            ours = getattr(value, "__module__", "").startswith("stepsal")
            if ours and callable(value) and not getattr(value, "_is_protocol", False):
                names.setdefault(id(value), (f"{module}.{name}", value))
    yield from names.values()


PUBLIC = dict(public())


def test_the_top_lists_eighteen_callables_and_rooms() -> None:
    assert [name for name in stepsal.__all__ if callable(getattr(stepsal, name))] == sorted(CALLABLES)
    others = {f"stepsal.{name}" for name in stepsal.__all__ if name not in CALLABLES}
    assert others == {*ROOMS, "stepsal.layers", "stepsal.metrics"}


@pytest.mark.slow
def test_public_names_resolve_in_any_order() -> None:
    lines = "; ".join(f"assert callable(stepsal.{name})" for name in stepsal.__all__[::-1] if name in CALLABLES)
    code = f"import stepsal; {lines}; import stepsal.generation, stepsal.intervention; {lines}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_no_module_hides_a_function() -> None:
    modules = {path.stem for path in (ROOT / "stepsal").iterdir()}
    assert not modules & {*CALLABLES}  # importing the module would put it in the function's place


@pytest.mark.parametrize("module", ["stepsal", *ROOMS])
def test_what_a_room_lists_exists_once(module: str) -> None:
    names = getattr(importlib.import_module(module), "__all__", [])
    assert len(names) == len(set(names))
    for name in names:
        getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name: str) -> None:
    docstring = PUBLIC[name].__doc__ or ""
    assert re.search(r"^\s*Examples?:\n", docstring, re.M), f"{name} has no Example section"
    assert ">>>" in docstring or "inspect eval" in docstring


def methods(value: object) -> Iterator[tuple[str, inspect.Signature]]:
    """Yield what of a public name can be called, with its signature: itself, or constructor and public methods."""
    if not inspect.isclass(value):
        yield "", inspect.signature(value)  # type: ignore[arg-type]
        return
    if not hasattr(value, "__dataclass_fields__"):
        yield "__init__", inspect.signature(value)
    for name, method in vars(value).items():
        if not name.startswith("_") and callable(function := getattr(method, "__func__", method)):
            yield name, inspect.signature(function)


#: Keywords that are the fields of the dataclass whose method it is: `config.but(alpha=0.1)`.
FIELDS = {"changes"}
#: Dictionaries that are data: documents to be kept or read back, and switches that each chat template names for itself.
DATA = {"about", "calibration", "chat", "manifest", "metadata", "parameters", "provenance", "settings", "state"}


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures_are_written_out(name: str) -> None:
    for method, signature in methods(PUBLIC[name]):
        for parameter in signature.parameters.values():
            where = f"{name}.{method}: {parameter}"
            if parameter.kind is parameter.VAR_KEYWORD:
                assert parameter.name in FIELDS | DATA, where
            elif parameter.name not in DATA:
                annotation = str(parameter.annotation)
                assert not re.search(r"[dD]ict\[str, (?:Any|object)\]|Mapping\[str, Any\]", annotation), where


#: What no first line begins with: it would continue a sentence that is not there. Classes and properties are things, so
#: that their first lines may be noun phrases ("The number of steps."); those of functions say what is done, verb first.
NO_BEGINNING = "Of For What Where Its So That How Whether Which If As When While By".split()
NO_BEGINNING_OF_A_FUNCTION = [*NO_BEGINNING, *"One A An The This It Mean Same Whose".split()]


def documented(path: Path) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield name, node and docstring of the public functions and classes of a module, and of their public methods."""
    stack: list[tuple[str, ast.AST]] = [("", ast.parse(path.read_text()))]
    while stack:
        prefix, node = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
                if docstring := ast.get_docstring(child):
                    yield f"{prefix}{child.name}", child, docstring
                if isinstance(child, ast.ClassDef):
                    stack.append((f"{prefix}{child.name}.", child))


def is_thing(node: ast.AST) -> bool:
    """Tell whether a definition is that of a class or of a property."""
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())]
    return isinstance(node, ast.ClassDef) or any("property" in decorator for decorator in decorators)


@pytest.mark.parametrize("path", sorted((ROOT / "stepsal").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_first_lines_can_be_read_alone(path: Path) -> None:
    module = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert module[:1].isupper() or module.startswith("stepsal"), f"{path} has no docstring"
    for name, node, docstring in documented(path):
        first = docstring.splitlines()[0]
        banned = NO_BEGINNING if is_thing(node) else NO_BEGINNING_OF_A_FUNCTION
        assert first[0].isupper(), f"{name}: {first}"
        assert first.split()[0].strip(",:") not in banned, f"{name}: {first}"
        assert first.endswith((".", ":")), f"{name}: {first}"


def test_first_lines_of_functions_are_imperative() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--select", "D401", "--output-format", "concise", "stepsal"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout
