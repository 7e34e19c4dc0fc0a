"""The house: each room imports only from the floors below it, in no circle, and pictures need no model."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stepsal"
FLOORS = [
    {"layers", "storage"},
    {"tensor_files"},
    {"trace"},
    {"bridge"},
    {"maps"},
    {"metrics"},
    {"intervention"},
    {"saliency"},
    {"tasks"},
    {"generation"},
    {"stats"},
    {"experiments"},
    {"plots"},
    {"widgets", "harness", "cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
#: Rooms that need less than what is below them: pure functions of tables and maps.
ALLOWED = {
    "stats": set(),
    "plots": {"layers", "storage", "trace", "maps", "metrics", "stats"},
}
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes, those of functions too, but nothing that is there for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from statements(node)


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """Return the modules of stepsal that a module imports, when it is loaded or later."""
    modules = set()
    for node in statements(ast.parse(PATHS[module].read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: absolute imports only"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in PATHS else str(node.module) for name in names}
    return frozenset(name for name in modules if name in PATHS)


def room_of(module: str) -> str:
    """Return the room that a module is in, or "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


MODULES = [module for module in PATHS if module != "stepsal"]


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} == FLOOR.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    room = room_of(module)
    for imported in imports_of(module):
        other = room_of(imported)
        if room == "cli" and imported == "stepsal":
            continue  # a user of the package, as it were
        assert other, f"{module} imports from the top; import from where the name is defined"
        assert other == room or FLOOR[other] < FLOOR[room], f"{module} imports {imported} from above or beside"
        assert other == room or other in ALLOWED.get(room, FLOOR), f"{module} imports {imported}, and is to be pure"


def test_no_circle() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for imported in imports_of(module) - {module}:
                visit(imported, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def run(code: str) -> str:
    """Run code in a fresh interpreter, and return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
def test_pictures_load_no_model_code() -> None:
    rooms = ["layers", "maps", "metrics", "stats", "plots", "widgets", "cli"]
    code = f"""
import importlib, sys
for room in {rooms}:
    module = importlib.import_module(f"stepsal.{{room}}")
    for name in getattr(module, "__all__", ()):
        if name != "StepFlowPanel":  # which lets a model write
            getattr(module, name)  # of a lazy room, all that it offers
    print(room, [name for name in ("transformer_lens", "transformers") if name in sys.modules])
"""
    assert run(code).splitlines() == [f"{room} []" for room in rooms]
