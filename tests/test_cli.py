"""The command line, as a user calls it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from stepsal.notebook import WIDGET_STATE, WIDGET_VIEW
from typer.testing import CliRunner

from stepsal.cli import app
from stepsal.maps import StepSaliency
from stepsal.tasks import chain

QUESTION = chain.sample(1, length=2).question


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_help_says_what_there_is() -> None:
    assert "trace" in invoke("--help")
    assert "smollm2" in invoke("trace", "--help")
    assert "notebooks" in invoke("figures", "--help")


def test_trace_prints_steps_and_writes_maps_and_a_picture(tmp_path: Path) -> None:
    output = invoke("trace", QUESTION, "--out", str(tmp_path / "run"))
    assert "0 question" in output
    assert "thinking" in output
    assert "The answer is" in output
    saliency = StepSaliency.load(tmp_path / "run.safetensors")
    assert saliency.model == "mini"
    assert saliency.values.shape[0] == 8
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--model", "no/such-model"], "error: "),
    ],
)
def test_errors_are_one_line_and_write_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    output = invoke("trace", QUESTION, "--out", str(tmp_path / "run"), *arguments, code=1)
    assert message in output
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_the_target_is_checked_before_any_work(tmp_path: Path) -> None:
    assert "tokens" in invoke("trace", QUESTION, "--out", str(tmp_path / "run"), "--target", "tokens", code=2)


def test_under_stepflow(tmp_path: Path) -> None:
    output = invoke("trace", QUESTION, "--out", str(tmp_path / "run"), "--stepflow", "--max-new-tokens", "20")
    assert "cut off after 20 tokens" in output
    assert StepSaliency.load(tmp_path / "run").metadata["stepflow"]["tau_max"] == 0.15


def test_out_must_lie_in_a_folder_that_exists(tmp_path: Path) -> None:
    assert "does not exist" in invoke("trace", QUESTION, "--out", str(tmp_path / "no" / "run"), code=2)


class TestFigures:
    @pytest.fixture
    def notebooks(self, tmp_path: Path) -> Path:
        for name, source in {
            "00_good": "open('made', 'w').write('x')",
            "01_bad": "raise RuntimeError('it broke')",
        }.items():
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
            nbformat.write(notebook, tmp_path / f"{name}.ipynb")
        return tmp_path

    def test_runs_the_named_notebook_in_its_folder(self, notebooks: Path) -> None:
        assert "done 00_good" in invoke("figures", "00", "--notebooks", str(notebooks))
        assert (notebooks / "made").exists()

    def test_keeps_outputs_without_noise(self, tmp_path: Path) -> None:
        source = "import sys; print('kept'); print('bar', file=sys.stderr)"
        cells = [nbformat.v4.new_markdown_cell("# title"), nbformat.v4.new_code_cell(source)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_noisy.ipynb")
        invoke("figures", "--notebooks", str(tmp_path), "--inplace")
        cell = nbformat.read(tmp_path / "00_noisy.ipynb", as_version=4).cells[1]
        assert [o.text for o in cell.outputs] == ["kept\n"]
        assert "execution" not in cell.metadata

    def test_keeps_widgets_but_no_progress_bars_and_is_the_same_each_time(self, tmp_path: Path) -> None:
        sources = [
            "from tqdm.notebook import tqdm\nfor _ in tqdm(range(3)): pass",
            "import ipywidgets as w\na, b, c = w.IntSlider(2), w.IntText(2), w.IntText(7)\n"
            "w.jslink((a, 'value'), (b, 'value')), w.jslink((a, 'value'), (c, 'value'))\nw.HBox([a, b])",
        ]
        texts = []
        for _ in range(2):
            cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
            nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_widgets.ipynb")
            invoke("figures", "--notebooks", str(tmp_path), "--inplace")
            texts.append((tmp_path / "00_widgets.ipynb").read_text())
        assert texts[0] == texts[1]
        notebook = nbformat.read(tmp_path / "00_widgets.ipynb", as_version=4)
        state = notebook.metadata.widgets[WIDGET_STATE]["state"]
        names = sorted(
            model["model_name"] for model in state.values() if not model["model_name"].endswith("StyleModel")
        )
        assert names == ["HBoxModel", "IntSliderModel", "IntTextModel", *["LayoutModel"] * 3, "LinkModel"]
        assert notebook.cells[0].outputs == []
        assert notebook.cells[1].outputs[0].data[WIDGET_VIEW]["model_id"] in state

    def test_reports_a_notebook_that_fails(self, notebooks: Path) -> None:
        output = invoke("figures", "--notebooks", str(notebooks), code=1)
        assert "01_bad failed" in output
        assert "it broke" in output

    def test_unknown_names(self, notebooks: Path) -> None:
        assert "there is: 00_good, 01_bad" in invoke("figures", "07", "--notebooks", str(notebooks), code=1)
