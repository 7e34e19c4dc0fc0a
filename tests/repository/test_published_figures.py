"""The figures in figures/ come from the notebooks: run them again, and compare the numbers that they plot.

Tolerance: 1 % of each value, or a thousandth of the column's largest. Float32 sums differ in the last digits between
machines; a wrong figure differs in the first.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REGENERATED: set[str] = set()
RELATIVE, OF_THE_LARGEST = 0.01, 0.001


def test_every_figure_is_complete() -> None:
    names = {p.stem for p in (ROOT / "figures").glob("*.png")}
    assert names
    assert names == {p.stem for p in (ROOT / "figures").glob("*.pdf")}
    for ending in ("csv", "json"):
        assert names == {p.stem for p in (ROOT / "figures" / "data").glob(f"*.{ending}")}


def test_the_readme_says_where_each_figure_of_the_paper_is() -> None:
    text = (ROOT / "README.md").read_text().partition("### The paper's figures and tables")[2].partition("\n### ")[0]
    rows = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("| ")][1:]
    figures = {p.stem for p in (ROOT / "figures").glob("*.png")}
    named = set()
    for _, notebook, cell, _ in rows:
        assert len(list((ROOT / "notebooks").glob(f"{notebook.strip()}_*.ipynb"))) == 1
        for pattern in re.findall(r"`([^`]+)`", cell):
            found = set(fnmatch.filter(figures, pattern))
            assert found, f"there is no figure {pattern}"
            named |= found
    assert len(rows) == 10  # the items of the paper that are recreated
    assert {
        name for name in figures - named if not name.startswith(("quickstart", "explorer", "calibration", "guided"))
    } == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_have_parameters_and_a_kernel(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0].metadata["nbmake"]["mock"]
    assert any(c.source.startswith("assert") or "\nassert" in c.source for c in notebook.cells)


@pytest.mark.nightly
@pytest.mark.xdist_group("full-size-notebooks")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_regenerate_the_published_numbers(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += f"\nFIGURES = {str(tmp_path)!r}"
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(path.parent)}}).execute()
    made = sorted((tmp_path / "data").glob("*.csv"))
    assert made
    REGENERATED.update(file.stem for file in made)
    for file in made:
        new, published = pd.read_csv(file), pd.read_csv(ROOT / "figures" / "data" / file.name)
        numbers = published.select_dtypes("number").columns
        pd.testing.assert_frame_equal(new.drop(columns=numbers), published.drop(columns=numbers))
        for column in numbers:
            scale = float(np.abs(published[column]).max())
            np.testing.assert_allclose(
                new[column],
                published[column],
                rtol=RELATIVE,
                atol=OF_THE_LARGEST * scale,
                err_msg=f"{file.stem} {column}",
            )


@pytest.mark.nightly
@pytest.mark.xdist_group("full-size-notebooks")
def test_no_figure_is_left_that_no_notebook_makes() -> None:
    if not REGENERATED:
        pytest.skip("the notebooks were not run before this test")
    assert {p.stem for p in (ROOT / "figures" / "data").glob("*.csv")} == REGENERATED
