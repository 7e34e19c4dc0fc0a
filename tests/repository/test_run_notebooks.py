"""The script that runs this repository's notebooks, on notebooks made for the purpose; and what it left in those."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import run_notebooks
from run_notebooks import WIDGET_STATE, WIDGET_VIEW

pytestmark = pytest.mark.slow  # each run starts a kernel
ROOT = Path(__file__).parents[2]


def write(path: Path, *sources: str) -> None:
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "00_good.ipynb", "open('made', 'w').write('x')")
    write(tmp_path / "01_bad.ipynb", "raise RuntimeError('it broke')")
    return tmp_path


def test_runs_the_named_notebook_in_its_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "00_good.ipynb").read_bytes()
    assert run_notebooks.main(["00", "--notebooks", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"00_good: \d+ s\n", out)
    assert err == ""  # no warnings of the kernel
    assert (folder / "made").exists()
    assert (folder / "00_good.ipynb").read_bytes() == before


def test_two_run_at_a_time_and_the_good_one_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    waits = "import time, pathlib\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.05)"
    write(tmp_path / "00_first.ipynb", waits.format("a", "b"))  # each ends only if the other runs, too
    write(tmp_path / "01_second.ipynb", waits.format("b", "a"))
    write(tmp_path / "02_threads.ipynb", "import os; print(os.environ['OMP_NUM_THREADS'])")
    assert run_notebooks.main(["--notebooks", str(tmp_path), "--inplace"]) == 0
    out, err = capfd.readouterr()
    assert re.fullmatch(r"(\w+: \d+ s\n){3}3 of 3 notebooks ran in \d+ s\n", out)
    assert err == ""
    (cell,) = nbformat.read(tmp_path / "02_threads.ipynb", as_version=4).cells
    assert cell.outputs[0].text.strip() == str(run_notebooks.n_threads(2))


def test_keeps_outputs_without_noise(tmp_path: Path) -> None:
    write(tmp_path / "00_noisy.ipynb", "import sys; print('kept'); print('bar', file=sys.stderr)")
    assert run_notebooks.main(["--notebooks", str(tmp_path), "--inplace"]) == 0
    (cell,) = nbformat.read(tmp_path / "00_noisy.ipynb", as_version=4).cells
    assert [output.text for output in cell.outputs] == ["kept\n"]
    assert "execution" not in cell.metadata


def test_keeps_widgets_but_no_progress_bars_and_is_the_same_each_time(tmp_path: Path) -> None:
    path, texts = tmp_path / "00_widgets.ipynb", []
    for _ in range(2):
        write(
            path,
            "from tqdm.notebook import tqdm\nfor _ in tqdm(range(3)): pass",
            "import ipywidgets as w\na, b, c = w.IntSlider(2), w.IntText(2), w.IntText(7)\n"
            "w.jslink((a, 'value'), (b, 'value')), w.jslink((a, 'value'), (c, 'value'))\nw.HBox([a, b])",
        )
        assert run_notebooks.main(["--notebooks", str(tmp_path), "--inplace"]) == 0
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    notebook = nbformat.read(path, as_version=4)
    state = notebook.metadata.widgets[WIDGET_STATE]["state"]
    names = sorted(model["model_name"] for model in state.values() if not model["model_name"].endswith("StyleModel"))
    assert names == ["HBoxModel", "IntSliderModel", "IntTextModel", *["LayoutModel"] * 3, "LinkModel"]
    assert notebook.cells[0].outputs == []
    assert notebook.cells[1].outputs[0].data[WIDGET_VIEW]["model_id"] in state


def test_reports_a_notebook_that_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_notebooks.main(["--notebooks", str(folder)]) == 1
    message = capsys.readouterr().err
    assert "01_bad failed" in message
    assert "it broke" in message


def test_selects_by_number_or_name_and_names_what_there_is() -> None:
    paths = [Path("00_good.ipynb"), Path("01_bad.ipynb")]
    assert run_notebooks.select(paths, []) == paths
    assert run_notebooks.select(paths, ["01_bad", "00", "01"]) == paths
    with pytest.raises(ValueError, match="no notebook 07; there is 00_good, 01_bad"):
        run_notebooks.select(paths, ["07", "00"])
    with pytest.raises(ValueError, match="no notebook at all"):
        run_notebooks.select([], [])


def figures_of(sources: list[str]) -> set[str]:
    """Return the names of the figures that cells save."""
    names = re.findall(r'save_figure\(\s*[\w\[\]]+,\s*f?"([^"]+)"', "\n".join(sources))
    patterns = [re.sub(r"\{\w+\}", r"\\w+", name) for name in names]
    return {path.stem for path in (ROOT / "figures").glob("*.png") if any(re.fullmatch(p, path.stem) for p in patterns)}


def test_the_notebooks_show_every_figure_that_they_save() -> None:
    shown: set[str] = set()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        saved = figures_of([cell.source for cell in cells])
        images = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(images) >= len(saved), f"{path.name} saves {sorted(saved)}"
        shown |= saved
    assert shown == {path.stem for path in (ROOT / "figures").glob("*.png")}
