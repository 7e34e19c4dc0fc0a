"""The paper's benchmarks: records of each format, the hub that is not there, and Table 1 in a dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import paper_cost
import pytest
from inspect_ai.log import list_eval_logs, read_eval_log
from tiny_models import tiny_chat

from stepsal.generation.flops import decoding_flops
from stepsal.tasks.hub import BENCHMARKS, HubTask

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "tests" / "records"  # written for these tests, in the benchmarks' formats


def record(benchmark: str) -> Path:
    return RECORDS / f"{benchmark}.jsonl"


@pytest.mark.parametrize(
    ("benchmark", "right", "wrong"),
    [
        ("aime24", r"So it is $\boxed{1024}$.", r"\boxed{1023}"),
        ("aime25", r"\boxed{081}", r"\boxed{80}"),
        ("amc23", r"\boxed{13}", r"\boxed{12}"),
        ("math500", r"\boxed{0.75}", r"\boxed{\frac{6}{9}}"),
    ],
)
def test_records_of_mathematics(benchmark: str, right: str, wrong: str) -> None:
    task = HubTask(benchmark, record(benchmark))
    assert len(task) == 2
    problem = task.sample(0)
    assert "Put the final answer within" in problem.question
    assert problem.grade(right).correct
    assert not problem.grade(wrong).correct


def test_records_of_choices() -> None:
    task = HubTask("gpqa-diamond", record("gpqa-diamond"))
    for i, right in enumerate(("neutron", "carbon dioxide")):
        problem = task.sample(i)
        assert f"{problem.reference}) {right}\n" in problem.question
        assert problem.grade(rf"\boxed{{{problem.reference}}}").correct
    orders = {HubTask("gpqa-diamond", record("gpqa-diamond"), shuffle_seed=s).sample(0).question for s in range(6)}
    assert len(orders) > 1
    assert task.problems == HubTask("gpqa-diamond", record("gpqa-diamond")).problems


def test_an_option_that_ends_in_a_line_break_does_not_show(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in record("gpqa-diamond").read_text().splitlines()]
    lines[0]["Correct Answer"] += "\n"
    lines[1]["Incorrect Answer 2"] = f" {lines[1]['Incorrect Answer 2']}\n"
    path = tmp_path / "gpqa-diamond.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert HubTask("gpqa-diamond", path).problems == HubTask("gpqa-diamond", record("gpqa-diamond")).problems


def test_samples_are_those_of_the_paper() -> None:
    assert {name: b.n_samples for name, b in BENCHMARKS.items()} == {
        "aime24": 16, "aime25": 16, "amc23": 16, "math500": 1, "gpqa-diamond": 8
    }  # fmt: skip


def test_names_tell_sources_apart(tmp_path: Path) -> None:
    task = HubTask("aime25", record("aime25"))
    (tmp_path / "aime25.jsonl").write_text(record("aime25").read_text().replace("81", "82"))
    assert task.name != HubTask("aime25", tmp_path / "aime25.jsonl").name
    assert task.name == HubTask("aime25", record("aime25")).name


@pytest.mark.parametrize("benchmark", list(BENCHMARKS))
def test_without_the_hub_the_file_that_is_wanted_is_named(benchmark: str) -> None:
    with pytest.raises(OSError, match="can't be loaded from the Hugging Face hub") as caught:
        HubTask(benchmark)
    about = BENCHMARKS[benchmark]
    assert f"HubTask({benchmark!r}, file=...): a JSONL file" in str(caught.value)
    for name in (about.question, about.answer, *about.wrong):
        assert name in str(caught.value)


def test_bad_tasks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="benchmark='aime' is unknown; use one of aime24"):
        HubTask("aime")
    (tmp_path / "x.jsonl").write_text('{"problem": "?", "Answer": "1"}\n')
    with pytest.raises(ValueError, match="line 1: there is no field 'answer'"):
        HubTask("aime25", tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has 30 problems, but 0 were found"):
        HubTask("aime25", tmp_path / "x.jsonl")
    with pytest.raises(IndexError, match=r"problems 0\.\.1, not 2"):
        HubTask("aime25", record("aime25")).sample(2)


@pytest.mark.nightly
def test_the_table_of_the_paper_in_a_dry_run(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"MODEL": "stepsal/mini", "RECORDS": str(RECORDS), "LOGS": str(tmp_path / "logs"), "MAX_TOKENS": "40",
                "BENCHMARKS": "aime25 gpqa-diamond", "EXTRA": "-T epochs=2 --display none", "PATH": path}  # fmt: skip
    run = subprocess.run(
        [str(ROOT / "examples" / "paper_table1.sh")], env=os.environ | settings, cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    header, *rows = run.stdout.strip().splitlines()[-3:]
    assert "baseline, reported" in header
    assert [row.split()[0] for row in rows] == ["aime25", "gpqa-diamond"]
    assert "39.2" in rows[0]  # the paper's baseline on AIME25 stands beside ours
    for stepflow in ("false", "true"):
        (info,) = list_eval_logs(str(tmp_path / "logs" / f"aime25-stepflow-{stepflow}"))
        log = read_eval_log(info)
        assert (log.status, len(log.samples)) == ("success", 4)
        assert all(("stepflow" in sample.metadata) is (stepflow == "true") for sample in log.samples)
        assert {sample.scores["graded"].metadata["error"] for sample in log.samples} <= {
            "truncated", "no answer", "wrong answer"
        }  # fmt: skip


def test_the_estimate_counts_what_the_counter_counts() -> None:
    model = tiny_chat("Qwen2", tie_word_embeddings=False)
    cfg = model.original_model.config
    shape = paper_cost.Shape(
        n_layers=cfg.num_hidden_layers, d_model=cfg.hidden_size, n_heads=cfg.num_attention_heads,
        n_kv_heads=cfg.num_key_value_heads, d_head=cfg.head_dim, d_mlp=cfg.intermediate_size, d_vocab=cfg.vocab_size,
    )  # fmt: skip
    d0, d1 = decoding_flops(model).token
    for n_cached in (10, 1000):
        assert shape.operations(n_cached + 1) == pytest.approx(d0 + d1 * n_cached, rel=0.02)


def test_the_estimate_runs() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "paper_cost.py")], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert "14.1 GB of weights" in run.stdout
    assert [line.split()[0] for line in run.stdout.splitlines()[2:-1]] == list(BENCHMARKS)
