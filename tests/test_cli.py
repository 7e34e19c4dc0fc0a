"""The command line, as a user calls it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from stepsal import cli
from stepsal.cli import app
from stepsal.maps import StepSaliency
from stepsal.maps.step_saliency import GradientTarget
from stepsal.tasks import chain

pytestmark = pytest.mark.slow  # each test runs a model or a command

QUESTION = chain.sample(1, length=2).question


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_help_says_what_there_is() -> None:
    assert {"trace", "demo"} <= {*invoke("--help").split()}
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


def test_the_picture_and_the_next_steps_are_explained(tmp_path: Path) -> None:
    output = " ".join(invoke("trace", QUESTION, "--out", str(tmp_path / "run")).split())
    assert "Each row is a step, each column a step before it" in output
    assert "--html adds a page" in output
    assert 'StepSaliency.load("' in output
    assert "--model smollm2" in output
    assert "warning" not in output


@pytest.mark.slow
def test_files_of_an_earlier_run_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--max-new-tokens", "5"]
    invoke("trace", QUESTION, *short)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "trace-2.png" in invoke("trace", QUESTION, *short, "--temperature", "5")
    assert {path.name for path in tmp_path.iterdir()} == {
        "trace.png", "trace.safetensors", "trace-2.png", "trace-2.safetensors",
    }  # fmt: skip
    assert "give another name, or --overwrite" in invoke("trace", QUESTION, "--out", "trace", code=2)
    assert all(path.read_bytes() == content for path, content in before.items())
    invoke("trace", QUESTION, "--out", "trace", "--overwrite", *short, "--temperature", "5")
    assert (tmp_path / "trace.safetensors").read_bytes() != before[tmp_path / "trace.safetensors"]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_page_is_written(tmp_path: Path) -> None:
    output = invoke("trace", QUESTION, "--out", str(tmp_path / "run"), "--html", "--max-new-tokens", "20")
    assert (tmp_path / "run.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert (tmp_path / "run.html").as_uri() in output


def test_a_question_that_mini_does_not_know_is_warned_of(tmp_path: Path) -> None:
    output = invoke("trace", "What is 3 plus 4?", "--out", str(tmp_path / "run"), "--max-new-tokens", "5")
    assert 'warning: "mini" knows chains' in output
    assert "UserWarning" not in output


def test_the_demo_answers_right_and_writes_a_picture_and_a_page(tmp_path: Path) -> None:
    output = " ".join(invoke("demo", "--out", str(tmp_path / "first")).split())
    assert "correct: every step and the answer are right" in output
    assert re.search(r"draws 9\d % from itself and the step before in shallow layers, \d\d % in deep ones", output)
    assert {path.name for path in tmp_path.iterdir()} == {"first.png", "first.html", "first.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--model", "no/such/model"], 'Use "mini" (the embedded reasoner), "smollm2"'),
        (["--model", "minni"], 'Did you mean "mini"?'),
    ],
)
def test_errors_are_one_line_and_write_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    output = invoke("trace", QUESTION, "--out", str(tmp_path / "run"), *arguments, code=1)
    assert message in " ".join(output.split())  # lines are broken to the width of the terminal
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


def test_targets_are_those_of_step_saliency() -> None:
    assert get_args(cli.Target) == get_args(GradientTarget)
