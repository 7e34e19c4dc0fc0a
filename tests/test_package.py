"""The house: imports go downwards only, pictures need no model, and what the README shows runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import stepsal

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"segment", "pooling", "versions", "storage", "stats", "accuracy", "ticks"},
    {"trace", "bridge", "flops", "devices"},
    {"maps", "tracking"},
    {"intervention", "metrics"},
    {"saliency", "generation", "effects"},
    {"tasks", "population", "proposals", "footprint"},
    {"evaluation"},
    {"calibration"},
    {"plots", "figures"},
    {"widgets", "harness"},
    {"notebook"},
    {"cli"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Top-level modules of stepsal that a file imports when it is loaded, type-checking blocks left out."""
    found = set()
    nodes: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stepsal":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("stepsal.")}
        nodes += list(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "stepsal").rglob("*.py")), ids=lambda p: p.stem)
def test_imports_go_downwards(path: Path) -> None:
    module = path.relative_to(ROOT / "stepsal").parts[0].removesuffix(".py")
    if module == "__init__":
        return
    assert module in FLOOR, f"say on which floor {module} is"
    for imported in imports_of(path) - {module}:
        assert FLOOR[imported] <= FLOOR[module], f"{module} imports {imported} from above"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize(
    "module",
    [
        "stepsal",
        "stepsal.plots",
        "stepsal.plots.save",
        "stepsal.maps",
        "stepsal.metrics",
        "stepsal.stats",
        "stepsal.cli",
        "stepsal.widgets.explorer",
    ],
)
def test_imports_no_model_code(module: str) -> None:
    heavy = ("transformer_lens", "transformers")
    assert run(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_public_names_resolve_in_any_order() -> None:
    names = sorted(stepsal.__all__)
    for order in (names, names[::-1]):
        lines = "; ".join(f"assert callable(stepsal.{name})" for name in order)
        run(f"import stepsal; {lines}; import stepsal.generation, stepsal.intervention; {lines}")
    modules = {path.stem for path in (ROOT / "stepsal").iterdir()}
    assert not modules & set(names)  # importing a module of the same name would hide the function


def test_the_example_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    assert len(blocks[0].strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert list(tmp_path.glob("*.png"))


def test_links_and_pictures_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", (ROOT / "README.md").read_text()):
        path = "".join(target)
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path


def test_times_in_the_readme_are_those_of_the_benchmark() -> None:
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "explorer_paint.csv")
    text = (ROOT / "README.md").read_text()
    rows = text.partition("| | one trace | first time |")[2].partition("\n\n")[0].splitlines()[2:]
    assert {row.split("|")[1].strip() for row in rows} == set(table[table["shown"] == "one trace"]["input"])
    columns = [("one trace", False), ("one trace", True), ("two traces", False), ("two traces", True)]
    for row in rows:
        name, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        for (shown, first), cell in zip(columns, cells, strict=True):
            found = table[(table["shown"] == shown) & (table["input"] == name) & (table["first"] == first)]
            assert cell == "".join(f"{r['median']:.0f} ({r['max']:.0f})" for _, r in found.iterrows())
    assert table[table["shown"] == "one trace"]["max"].max() <= 50  # as it says
