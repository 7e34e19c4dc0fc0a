"""Populations: what is kept is what was sampled; killed runs go on; damaged folders are told."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.experiments.collect import collect, missing_batches
from stepsal.experiments.population import Population
from stepsal.metrics import flow_metrics, trace_metrics
from stepsal.tasks.chain import ChainTask

TASK = ChainTask(length=(1, 3), distractors=2)
N = 10
DECODING = stepsal.Decoding(max_new_tokens=120, temperature=1.0)
OPTIONS = {"decoding": DECODING, "batch_size": 4, "seed": 7, "progress": False}
SCRIPT = """
import os
import torch
import stepsal.experiments.collect, stepsal.experiments.store
from stepsal.tasks.chain import ChainTask
torch.set_num_threads(1)  # as in the tests: rounding depends on it
calls = 0
original = {function}
def killed(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), 9)
    return original(*args, **kwargs)
{function} = killed
stepsal.collect(stepsal.load("mini"), ChainTask(length=(1, 3), distractors=2), 10, {folder!r},
                decoding=stepsal.Decoding(max_new_tokens=120, temperature=1.0), batch_size=4, seed=7, progress=False)
"""


@pytest.fixture(scope="module")
def whole(mini: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Population:
    return collect(mini, TASK, N, tmp_path_factory.mktemp("population") / "whole", **OPTIONS)


def copy(population: Population, folder: Path) -> Path:
    shutil.copytree(population.folder, folder)
    return folder


def same(a: Population, b: Population) -> None:
    """The same traces, and the same numbers up to rounding, which may differ between processes."""
    assert len(a) == len(b)
    pd.testing.assert_frame_equal(a.answers, b.answers, rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(a.metrics, b.metrics, rtol=1e-3, atol=1e-5)
    for i in range(len(a)):
        assert torch.equal(a.trace(i).tokens, b.trace(i).tokens)
        torch.testing.assert_close(a.saliency(i).values, b.saliency(i).values, rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_traces_maps_and_metrics_come_back(mini: TransformerBridge, whole: Population) -> None:
    assert len(whole) == N
    assert [n for _, n in whole.parts] == [4, 4, 2]
    rows = whole.answers.set_index("trace")
    for i in range(N):
        problem = TASK.sample(7 + i)
        trace = stepsal.generate(mini, problem.question, temperature=1.0, max_new_tokens=120, seed=7 + i)
        kept = whole.trace(i)
        assert torch.equal(kept.tokens, trace.tokens)
        assert torch.equal(kept.offsets, trace.offsets)
        for name in ("question", "response", "text", "steps", "segmentation", "n_prompt", "truncated"):
            assert getattr(kept, name) == getattr(trace, name), name
        verdict = problem.grade(trace)
        assert (rows.loc[i, "correct"], rows.loc[i, "reason"]) == (verdict.correct, verdict.reason)
        assert rows.loc[i, ["n_steps", "n_tokens"]].tolist() == [len(trace.steps), len(trace)]
        saliency = stepsal.step_saliency(mini, trace)
        assert whole.saliency(i).model_name == "mini"
        torch.testing.assert_close(whole.saliency(i).values, saliency.values, rtol=1e-4, atol=1e-9)
        table = whole.metrics[whole.metrics["trace"] == i].reset_index(drop=True)
        np.testing.assert_allclose(table["lock_in"], flow_metrics(saliency)["lock_in"], rtol=1e-3, atol=1e-6)
        scalars = trace_metrics(saliency)
        assert rows.loc[i, "deep_decay"] == pytest.approx(scalars["deep_decay"], rel=1e-3, nan_ok=True)
        logits = mini(trace.tokens[None]).log_softmax(-1)[0, :-1]
        of_answer = logits.gather(1, trace.tokens[1:, None])[trace.n_prompt - 1 :].mean()
        assert rows.loc[i, "mean_log_prob"] == pytest.approx(of_answer.item(), rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(
    mini: TransformerBridge, whole: Population, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    kills = {  # function -> (on which call it is killed, number of traces then)
        "stepsal.experiments.store.to_disk": (3, 0),  # the first part is brought to the disk
        "os.rename": (2, 4),  # the second part is complete but not in its place
        "stepsal.experiments.collect.trace_columns": (3, 4),  # grading
    }
    for function, (call, n_traces) in kills.items():
        script = SCRIPT.format(folder=str(folder), function=function, call=call)
        completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert completed.returncode == -signal.SIGKILL, completed.stderr
        assert len(Population.load(folder)) == n_traces
    same(collect(mini, TASK, N, folder, **OPTIONS), whole)
    assert not list(folder.rglob("*.part"))


def test_what_a_kill_leaves_half_written_is_removed(mini: TransformerBridge, whole: Population, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "half")
    shutil.move(folder / "parts" / "000008", folder / "parts" / ".000008.0.part")
    (folder / "parts" / ".000008.0.part" / "maps.safetensors").write_bytes(b"half")
    assert len(Population.load(folder)) == 8
    same(collect(mini, TASK, N, folder, **OPTIONS), whole)
    assert not list((folder / "parts").glob(".*"))


@pytest.mark.slow
def test_an_interrupted_part_leaves_the_folder_as_it_was(
    mini: TransformerBridge, whole: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(whole, tmp_path / "interrupted")
    shutil.rmtree(folder / "parts" / "000008")

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stepsal.experiments.store.to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect(mini, TASK, N, folder, **OPTIONS)
    monkeypatch.undo()
    assert not list((folder / "parts").glob(".*"))
    assert sorted(p.name for p in (folder / "parts").iterdir()) == ["000000", "000004"]
    same(collect(mini, TASK, N, folder, **OPTIONS), whole)


def test_asking_for_more_appends_and_for_fewer_does_nothing(
    mini: TransformerBridge, whole: Population, tmp_path: Path
) -> None:
    folder = copy(whole, tmp_path / "more")
    before = {path: path.stat().st_mtime_ns for path in (folder / "parts").rglob("*.*")}
    assert len(collect(mini, TASK, 3, folder, **OPTIONS)) == N
    more = collect(mini, TASK, N + 2, folder, **OPTIONS)
    assert more.answers["trace"].tolist() == list(range(N + 2))
    assert more.answers["seed"].tolist() == list(range(7, 7 + N + 2))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_part_that_was_deleted_is_made_anew(mini: TransformerBridge, whole: Population, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "gap")
    shutil.rmtree(folder / "parts" / "000004")
    with pytest.raises(ValueError, match=r"traces 4\.\.7 are missing.*collect again"):
        Population.load(folder)
    again = collect(mini, TASK, N, folder, **OPTIONS | {"batch_size": 3})
    assert [n for _, n in again.parts] == [4, 3, 1, 2]
    same(again, whole)


def test_batches_fill_gaps_up_to_what_is_requested() -> None:
    assert missing_batches([], 5, 2) == [range(0, 2), range(2, 4), range(4, 5)]
    assert missing_batches([(0, 4)], 3, 2) == []
    assert missing_batches([(2, 2), (7, 1)], 6, 3) == [range(0, 2), range(4, 6)]
    assert missing_batches([(0, 1), (6, 1)], 9, 4) == [range(1, 5), range(5, 6), range(7, 9)]


def test_a_copy_is_the_same_population(whole: Population, tmp_path: Path) -> None:
    copied = Population.load(whole.save(tmp_path / "copy"))
    same(copied, whole)
    assert copied.manifest == whole.manifest
    with pytest.raises(ValueError, match="not empty"):
        whole.save(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "parts" / "000004")
    maps = tmp_path / "copy" / "parts" / "000008" / "maps.safetensors"
    maps.write_bytes(maps.read_bytes()[:-1])
    with pytest.raises(ValueError, match="000008 is damaged"):
        copied.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_other_parameters_and_models_are_refused(mini: TransformerBridge, whole: Population) -> None:
    with pytest.raises(ValueError, match="temperature"):
        collect(mini, TASK, N, whole.folder, **OPTIONS | {"decoding": DECODING.but(temperature=0.5)})
    with pytest.raises(ValueError, match=r"segmentation\.split='sentence', not 'line'"):
        collect(mini, TASK, N, whole.folder, **OPTIONS, segmentation=stepsal.Segmentation(split="line"))
    with pytest.raises(ValueError, match=r"saliency\.layers='all', not \[-1\]"):
        collect(mini, TASK, N, whole.folder, **OPTIONS, layers=-1)
    with pytest.raises(ValueError, match=r"task='chain\(length=1..3, distractors=2\)'"):
        collect(mini, ChainTask(length=2), N, whole.folder, **OPTIONS)
    parameter = next(mini.original_model.parameters())
    kept = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter += 1
        with pytest.raises(ValueError, match="weights"):
            collect(mini, TASK, N, whole.folder, **OPTIONS)
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
    assert collect(mini, TASK, N, whole.folder, **OPTIONS).answers.equals(whole.answers)


def test_parameters_that_fail_leave_no_trace(mini: TransformerBridge, whole: Population, tmp_path: Path) -> None:
    for options in ({"target": "tokn"}, {"target": "attention"}, {"reduce": "median"}, {"layers": ()}, {"layers": 8}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}=.*{re.escape(str(value))}"):
            collect(mini, TASK, N, tmp_path, **OPTIONS, **options)
    function = stepsal.Segmentation(split=lambda before, after: True)
    with pytest.raises(ValueError, match=r"split=<function .* can't be kept in a manifest"):
        collect(mini, TASK, N, tmp_path, **OPTIONS, segmentation=function)
    with stepsal.stepflow(mini), pytest.raises(ValueError, match=r"collect\(stepflow="):
        collect(mini, TASK, N, tmp_path, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_share_a_folder(mini: TransformerBridge, whole: Population) -> None:
    import filelock

    with filelock.FileLock(whole.folder / ".lock"), pytest.raises(ValueError, match="another process"):
        collect(mini, TASK, N, whole.folder, **OPTIONS)


@pytest.mark.parametrize("name", ["answers.parquet", "metrics.parquet", "maps.safetensors", "part.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_part_is_named(whole: Population, tmp_path: Path, name: str, how: str) -> None:
    folder = copy(whole, tmp_path / "damaged")
    file = folder / "parts" / "000004" / name
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[-9] ^= 0xFF  # in the values of the last map, or the end of a document
        file.write_bytes(data)
    with pytest.raises(ValueError, match=r"000004 is damaged.*delete it, and run the same call again"):
        Population.load(folder)


def test_foreign_and_unfit_folders_are_told(mini: TransformerBridge, whole: Population, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Population.load(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no population"):
        collect(mini, TASK, N, tmp_path, **OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["thesis.txt"]
    folder = copy(whole, tmp_path / "twice")
    shutil.copytree(folder / "parts" / "000004", folder / "parts" / "000006")
    with pytest.raises(ValueError, match="000006 begins with traces that the part before it has"):
        Population.load(folder)
    os.rename(folder / "parts" / "000006", folder / "parts" / "mine")
    with pytest.raises(ValueError, match="mine is no part of a population"):
        Population.load(folder)
    shutil.rmtree(folder / "parts" / "mine")
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        Population.load(folder)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Population.load(folder)
    with pytest.raises(ValueError, match="n_problems=0"):
        collect(mini, TASK, 0, folder)
    with pytest.raises(IndexError, match="traces 0"):
        whole.trace(N)


def test_layers_and_stepflow_are_kept(mini: TransformerBridge, tmp_path: Path) -> None:
    config = stepsal.StepFlowConfig()
    population = collect(
        mini,
        TASK,
        2,
        tmp_path / "edited",
        **OPTIONS,
        stepflow=config,
        layers="deep",
        reduce="mass",
        segmentation=stepsal.Segmentation(split="line"),
    )
    saliency = population.saliency(1)
    assert saliency.layers == (6, 7)
    assert saliency.reduce == "mass"
    trace = population.trace(1)
    assert trace.segmentation == stepsal.Segmentation(format="think", split="line")
    with stepsal.stepflow(mini, config, segmentation=trace.segmentation):
        again = stepsal.step_saliency(mini, trace, layers="deep", reduce="mass")
    torch.testing.assert_close(saliency.values, again.values, rtol=1e-4, atol=1e-9)
    assert population.manifest["stepflow"] == json.loads(json.dumps(config.to_dict()))
    assert os.listdir(population.folder / "parts") == ["000000"]
