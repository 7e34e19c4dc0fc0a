"""The command line, as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
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


def test_trace_prints_steps_and_writes_maps_and_a_picture(tmp_path: Path) -> None:
    output = invoke("trace", QUESTION, "--out", str(tmp_path / "run"))
    assert "0 question" in output
    assert "thinking" in output
    assert "The answer is" in output
    saliency = StepSaliency.load(tmp_path / "run.safetensors")
    assert saliency.model_name == "mini"
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
