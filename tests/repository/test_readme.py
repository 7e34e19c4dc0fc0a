"""What README.md shows exists and runs, and its tables of costs are those of the benchmarks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


def test_the_first_block_is_short() -> None:
    assert len(BLOCKS[0].strip().splitlines()) <= 12


@pytest.mark.slow
def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {})
    assert list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_every_name_exists_in_a_fresh_session() -> None:
    names = sorted(set(re.findall(r"\bstepsal(?:\.[A-Za-z_]\w*)+", re.sub(r"[\w-]+\.(?:md|py|toml|git)\b", "", TEXT))))
    assert {"stepsal.load", "stepsal.harness.capture_step_saliency", "stepsal.experiments.Population.load"} <= {*names}
    code = f"""
import operator, sys
for name in {names}:
    for module in [m for m in sys.modules if m.partition(".")[0] == "stepsal"]:
        del sys.modules[module]  # what one name imports must not help the next
    import stepsal
    operator.attrgetter(name.removeprefix("stepsal."))(stepsal)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", TEXT):
        path = "".join(target)
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT, re.M))
    assert {"quick", "test", "nightly", "figures", "lab"} <= targets
    assert {target for target in targets if f"\n{target}:" not in makefile} == set()
    for script in re.findall(r"\b((?:scripts|examples|benchmarks)/\w+\.(?:py|sh))", TEXT):
        assert (ROOT / script).exists(), script


def test_the_architecture_names_every_room() -> None:
    rows = rows_below("| room | purpose |")
    names = {name for row in rows for name in re.findall(r"`([\w/.]+)`", row[0])}
    rooms = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "stepsal").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and not path.name.startswith("_")
    }
    assert names == rooms
    for room, purpose in rows:
        for file in re.findall(r"`(\w+\.py)`", purpose):
            assert (ROOT / "stepsal" / room.strip(" `") / file).exists(), file


def rows_below(header: str) -> list[list[str]]:
    """Return the cells of a table, by the beginning of its first line."""
    lines = TEXT.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    assert lines, f"README.md has no table that begins with {header!r}"
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_times_of_the_explorer() -> None:
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "explorer_paint.csv")
    rows = rows_below("| | one trace | first time |")
    assert {row[0] for row in rows} == set(table[table["shown"] == "one trace"]["input"])
    columns = [("one trace", False), ("one trace", True), ("two traces", False), ("two traces", True)]
    for name, *cells in rows:
        for (shown, first), cell in zip(columns, cells, strict=True):
            times = table[(table["shown"] == shown) & (table["input"] == name) & (table["first"] == first)]
            assert cell == "".join(f"{r['median']:.0f} ({r['max']:.0f})" for _, r in times.iterrows())
    assert table[table["shown"] == "one trace"]["max"].max() <= 50  # as it says


def test_cost_of_decoding() -> None:
    tables = {
        threads: pd.read_csv(ROOT / "benchmarks" / "results" / f"decode_speed_{threads}.csv").set_index(
            ["batch", "variant"]
        )
        for threads in (1, 2)
    }
    rows = rows_below("| | batch 1 | batch 16 | batch 1, two cores | batch 16, two cores |")
    assert [row[0] for row in rows] == ["plain", "StepFlow", "hooked"]
    for variant, *cells in rows:
        for (threads, batch), cell in zip([(1, 1), (1, 16), (2, 1), (2, 16)], cells, strict=True):
            ratio, low, high = tables[threads].loc[(batch, variant), ["ratio", "lowest", "highest"]]
            assert cell == f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def test_decoding_on_a_gpu() -> None:
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "decode_7b.csv").set_index(["batch", "variant"])
    for variant, *cells in rows_below("| tokens a second | batch 1 | batch 16 | batch 64 |"):
        assert cells == [f"{table.loc[(batch, variant), 'tokens_per_second']:.0f}" for batch in (1, 16, 64)]
    assert table["of_bandwidth"].between(1 / 7, 1 / 5).all()  # as it says


def test_memory_of_saliency() -> None:
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "saliency_memory.csv")
    peaks = table.set_index(["method", "tokens"])["peak_bytes"] / 1e9
    for tokens, *cells in rows_below("| tokens | streamed | pattern | `run_with_cache(incl_bwd=True)` |"):
        for method, cell in zip(("streamed", "pattern", "run_with_cache", "floor"), cells, strict=True):
            peak = peaks.get((method, int(tokens)))
            assert cell == ("" if peak is None else f"{peak:.2f}")


def test_time_of_saliency() -> None:
    table = pd.read_csv(ROOT / "benchmarks" / "results" / "saliency_time.csv").set_index(["method", "tokens"])
    methods = ("streamed", "streamed sequence", "pattern", "run_with_cache")
    for tokens, *cells, floor in rows_below('| tokens | streamed | streamed, target="sequence" |'):
        assert floor == f"{table.loc[('floor', int(tokens)), 'seconds']:.1f}"
        for method, cell in zip(methods, cells, strict=True):
            if (method, int(tokens)) in table.index:
                ratio, low, high = table.loc[(method, int(tokens)), ["of_floor", "min", "max"]]
                assert cell == f"{ratio:.2f} ({low:.2f} to {high:.2f})"
            else:
                assert cell == ""


def test_the_machines_are_named() -> None:
    for path in re.findall(r"benchmarks/results/\w+\.json", TEXT):
        assert json.loads((ROOT / path).read_text())["processor"]
