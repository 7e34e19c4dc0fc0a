"""Runs of variants: paired, resumed after a kill, compared; and a planted help that the harness finds."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import Decoding, Variant, evaluate
from stepsal.experiments.evaluate import Draw, draw_seed, missing_answers, turns
from stepsal.experiments.results import Evaluation, voted_for
from stepsal.generation.flops import decoding_flops
from stepsal.tasks import chain
from stepsal.tasks.answers import Verdict
from stepsal.tasks.chain import ChainTask
from stepsal.trace.trace import render_prompt

TASK = ChainTask(length=3, distractors=2)
SAMPLED = Decoding(temperature=2.0, max_new_tokens=100)
OPTIONS: dict = {"decoding": SAMPLED, "batch_size": 4, "progress": False}
SHORT = OPTIONS | {"decoding": SAMPLED.but(max_new_tokens=15)}  # where it does not matter what is written
VARIANTS = [
    Variant("baseline"),
    Variant("StepFlow", stepflow=stepsal.StepFlowConfig()),
    Variant("three votes", votes=3),
    Variant("short", max_new_tokens=12),
]


def shares_a_run(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that reads the answers of `run`, which take long, so that one process makes them for all."""
    return pytest.mark.slow(pytest.mark.xdist_group("evaluation")(test))


@pytest.fixture(scope="module")
def run(mini: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluate(mini, TASK, VARIANTS, 6, 2, folder=tmp_path_factory.mktemp("run"), **OPTIONS)


@shares_a_run
def test_answers_are_those_of_generate(mini: TransformerBridge, run: Evaluation) -> None:
    answers = run.answers_of("StepFlow")
    row = answers[(answers["problem"] == 4) & (answers["sample"] == 1)].iloc[0]
    problem = TASK.sample(4)
    trace = stepsal.generate(
        mini, problem.question, stepflow=stepsal.StepFlowConfig(), temperature=2.0, max_new_tokens=100,
        seed=draw_seed(0, 4, 1),
    )  # fmt: skip
    assert row["response"] == trace.response
    assert row["correct"] == problem.grade(trace).correct
    assert row["n_new_tokens"] == len(trace) - trace.n_prompt
    assert run.answers_of("short")["n_new_tokens"].max() <= 12
    assert run.answers_of("short")["truncated"].any()


@shares_a_run
def test_variants_that_differ_in_votes_share_answers(run: Evaluation) -> None:
    assert len(run.answers) == 6 * (6 + 2 + 2)  # six draws for three votes, of which the first two are the baseline's
    votes, single = run.answers_of("three votes"), run.answers_of("baseline")
    assert len(votes) == len(single) == 12
    assert (votes["n_new_tokens"] > 2 * single["n_new_tokens"].min()).all()


@shares_a_run
def test_tables(run: Evaluation) -> None:
    table = run.accuracy(k=(1, 2)).set_index("variant")
    correct = run.verdicts("baseline")
    assert table.loc["baseline", "accuracy"] == pytest.approx(correct.mean())
    assert table.loc["baseline", "pass@2"] == pytest.approx(correct.any(1).mean())
    paired = run.paired().set_index("variant")
    change = run.verdicts("StepFlow").astype(int) - correct
    assert paired.loc["StepFlow", "difference"] == pytest.approx(change.mean())
    assert list(paired.index) == ["StepFlow", "three votes", "short"]
    errors = run.errors("StepFlow")
    assert errors.to_numpy().sum() == 12
    assert 0 < errors.loc["none"].sum() == correct.sum() < 12
    costs = run.costs().set_index("variant")
    assert costs.loc["baseline", "time_ratio"] == costs.loc["baseline", "flops_ratio"] == 1.0
    assert costs.loc["StepFlow", "batches"] == 1
    assert costs.loc["three votes", "time_ratio"] == 3.0
    assert 2 < costs.loc["three votes", "flops_ratio"] < 4
    assert costs.loc["short", "flops_ratio"] < 1
    repairs = run.repairs("short").set_index("error")
    assert repairs["before"].sum() == 12 - correct.sum()
    assert repairs["after"].sum() == 12 - run.verdicts("short").sum()
    fixed, broken = paired.loc["short", ["fixed", "broken"]]
    assert (repairs["fixed"].sum(), repairs["broken"].sum()) == (fixed, broken)
    assert broken > fixed
    assert (
        repairs.loc["truncated", "after"]
        == run.answers_of("short")["truncated"].sum()
        > repairs.loc["truncated", "before"]
    )


@shares_a_run
def test_flops_are_those_of_every_answer(mini: TransformerBridge, run: Evaluation) -> None:
    flops = decoding_flops(mini)
    for _, row in run.answers.iterrows():
        assert row["flops"] == flops.of(row["n_prompt"], row["n_new_tokens"])


@shares_a_run
def test_the_order_of_variants_changes_nothing(run: Evaluation) -> None:
    other = Evaluation(run.folder, run.variants[::-1], 6, 2)
    pd.testing.assert_frame_equal(other.answers, run.answers)
    for name in ("baseline", "three votes"):
        pd.testing.assert_frame_equal(other.answers_of(name), run.answers_of(name))


@pytest.mark.slow
def test_times_are_compared_on_the_same_answers(mini: TransformerBridge, tmp_path: Path) -> None:
    same = [Variant("one", votes=2), Variant("other", max_new_tokens=100)]  # the run's limit: the same decoding
    evaluation = evaluate(mini, TASK, same, 3, folder=tmp_path, **OPTIONS)
    costs = evaluation.costs("other").set_index("variant")  # the first draw is a batch of its own, which both answer
    assert costs.loc["one", "batches"] == 1
    kept = pd.concat([pd.read_parquet(path) for path in answer_files(tmp_path)])
    seconds = kept[kept["draw"] == 0].groupby("variant")["seconds"].sum()
    assert costs.loc["one", "time_ratio"] == pytest.approx(2 * seconds[same[0].key] / seconds[same[1].key])
    assert evaluation.costs().set_index("variant").loc["one", "time_ratio"] == 1.0
    more = evaluate(mini, TASK, same[:1], 4, folder=tmp_path, **OPTIONS)  # another run: one problem of a variant alone
    assert more.n_problems == 4
    extended = evaluate(mini, TASK, same, 4, folder=tmp_path, **OPTIONS).costs("other").set_index("variant")
    assert extended.loc["one", "batches"] == 1


@pytest.mark.slow
def test_every_attribute_of_a_variant_reaches_the_model(mini: TransformerBridge, tmp_path: Path) -> None:
    variants = [
        Variant("baseline"), Variant("asked", instruction="What is Anna?"), Variant("forced", budget_forcing=1),
        Variant("cut", edit=cut),
    ]  # fmt: skip
    options = OPTIONS | {"decoding": SAMPLED.but(temperature=0.0)}
    evaluation = evaluate(mini, TASK, variants, 3, folder=tmp_path, **options)
    for i in range(3):
        question = TASK.sample(i).question
        expected = {
            "baseline": stepsal.generate(mini, question, max_new_tokens=100),
            "asked": stepsal.generate(mini, f"{question}\n\nWhat is Anna?", max_new_tokens=100),
            "forced": stepsal.generate(mini, question, max_new_tokens=100, budget_forcing=1),
        }
        with cut(mini, TASK.sample(i)):
            expected["cut"] = stepsal.generate(mini, question, max_new_tokens=100)
        responses = [trace.response for trace in expected.values()]
        assert len(set(responses)) == 4
        assert [evaluation.answers_of(name)["response"][i] for name in expected] == responses


def cut(model: TransformerBridge, problem: object) -> AbstractContextManager:
    """Let the first layer attend to nothing: an edit that shows."""
    return model.hooks(fwd_hooks=[("blocks.0.attn.o.hook_in", lambda z, hook: z * 0)])


class Plain:
    """A task of the smallest protocol."""

    name = "plain"

    def __init__(self, word: str = "What") -> None:
        self.word = word

    def sample(self, seed: int) -> PlainProblem:
        return PlainProblem(f"{self.word} is {seed % 2}?")


@dataclass
class PlainProblem:
    question: str
    reference: int = 3

    def grade(self, trace: stepsal.Trace) -> PlainVerdict:
        return PlainVerdict("1" in self.question)


@dataclass
class PlainVerdict:
    correct: bool
    reason: str = "so it is"


def test_tasks_of_the_smallest_protocol(mini: TransformerBridge, tmp_path: Path) -> None:
    variants = [Variant("baseline"), Variant("short", max_new_tokens=2)]
    evaluation = evaluate(mini, Plain(), variants, 6, folder=tmp_path, **SHORT)
    assert evaluation.errors("short").to_dict() == {"none": {"none": 3, "wrong": 0}, "wrong": {"none": 0, "wrong": 3}}
    table = evaluation.accuracy()
    assert table["n_different"].tolist() == [2, 2]  # two questions, three times each
    assert (table["high"] - table["low"] > 0.6).all()
    assert pd.isna(evaluation.paired()["mcnemar_p"]).all()
    with pytest.raises(ValueError, match="no `final_answer` to vote with"):
        evaluate(mini, Plain(), [Variant("votes", votes=2)], 6, folder=tmp_path / "votes", **SHORT)
    with pytest.raises(ValueError, match="another question as problem 0: the task has changed under its name"):
        evaluate(mini, Plain("How much"), variants, 6, folder=tmp_path, **SHORT)


@shares_a_run
def test_a_single_variant_has_tables_too(run: Evaluation) -> None:
    alone = Evaluation(run.folder, run.variants[:1], 6, 2)
    assert len(alone.paired()) == 0
    assert "mcnemar_p" in alone.paired()
    with pytest.raises(ValueError, match="what='corect'"):
        alone.accuracy("corect")
    with pytest.raises(ValueError, match="there is no variant 'x'"):
        alone.answers_of("x")


def test_more_of_everything_goes_on_with_what_is_there(mini: TransformerBridge, tmp_path: Path) -> None:
    few = evaluate(mini, TASK, VARIANTS[:1], 3, folder=tmp_path / "grown", **SHORT)
    before = few.answers
    more = evaluate(mini, TASK, VARIANTS[:2], 5, 2, folder=tmp_path / "grown", **SHORT)
    whole = evaluate(mini, TASK, VARIANTS[:2], 5, 2, folder=tmp_path / "whole", **SHORT)
    pd.testing.assert_frame_equal(Evaluation(few.folder, few.variants, 3, 1).answers, before)
    columns = ["variant", "draw", "problem", "response", "correct"]
    pd.testing.assert_frame_equal(more.answers[columns], whole.answers[columns])
    other = SHORT["decoding"].but(temperature=0.5)
    with pytest.raises(ValueError, match=r"decoding.temperature=2.0, not 0.5"):
        evaluate(mini, TASK, VARIANTS[:1], 3, folder=tmp_path / "grown", decoding=other)


def answer_files(folder: Path) -> list[Path]:
    return list((folder / "parts").glob("[!.]*/answers.parquet"))


@pytest.mark.slow
def test_a_killed_run_goes_on(mini: TransformerBridge, tmp_path: Path) -> None:
    options = OPTIONS | {"decoding": SAMPLED.but(max_new_tokens=30)}
    code = f"""
import stepsal
from stepsal import Decoding, Variant, evaluate
from stepsal.tasks import chain
from stepsal.tasks.answers import Verdict
from stepsal.tasks.chain import ChainTask
variants = [Variant("baseline"), Variant("StepFlow", stepflow=stepsal.StepFlowConfig())]
evaluate(stepsal.load("mini"), ChainTask(length=3, distractors=2), variants, 8, 2,
         folder={str(tmp_path / "killed")!r}, **{options!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 120
        while len(answer_files(tmp_path / "killed")) < 3 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert 3 <= len(answer_files(tmp_path / "killed")) < 8
    kept = pd.concat([pd.read_parquet(path) for path in answer_files(tmp_path / "killed")])
    (tmp_path / "killed" / "parts" / ".unfinished.part").mkdir()
    resumed = evaluate(mini, TASK, VARIANTS[:2], 8, 2, folder=tmp_path / "killed", **options)
    whole = evaluate(mini, TASK, VARIANTS[:2], 8, 2, folder=tmp_path / "whole", **options)
    columns = ["variant", "draw", "problem", "response", "correct"]
    pd.testing.assert_frame_equal(resumed.answers[columns], whole.answers[columns])
    assert len(resumed.answers.merge(kept)) == len(kept)  # on all columns, times included
    assert len(answer_files(tmp_path / "killed")) == 1
    assert not list((tmp_path / "killed" / "parts").glob(".*.part"))


def test_an_interrupted_turn_keeps_what_is_done(
    mini: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grade, n_graded = chain.Problem.grade, itertools.count(1)

    def interrupt(problem: chain.Problem, trace: stepsal.Trace) -> Verdict:
        if next(n_graded) == 4:
            raise KeyboardInterrupt
        return grade(problem, trace)

    monkeypatch.setattr(chain.Problem, "grade", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(mini, TASK, VARIANTS[:1], 6, folder=tmp_path, **(SHORT | {"batch_size": 2}))
    kept = pd.concat([pd.read_parquet(path) for path in answer_files(tmp_path)])
    assert len(kept) == 3
    resumed = evaluate(mini, TASK, VARIANTS[:1], 6, folder=tmp_path, **(SHORT | {"batch_size": 2}))
    assert set(kept["response"]) <= set(resumed.answers["response"])
    assert next(n_graded) == 4 + 3 + 1  # the three that were kept are not written again


@pytest.mark.slow
def test_a_kill_while_parts_are_merged_loses_and_doubles_nothing(
    mini: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    rename = os.rename

    def killed_at_the_first_deletion(source: Path, target: Path) -> None:
        if not Path(source).name.startswith("."):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed_at_the_first_deletion)
    with pytest.raises(KeyboardInterrupt):
        evaluate(mini, TASK, VARIANTS[:2], 5, folder=tmp_path, **SHORT)
    monkeypatch.undo()
    assert len(answer_files(tmp_path)) == 5  # two variants, two batches, and all of it in one
    before = Evaluation(tmp_path, tuple(VARIANTS[:2]), 5, 1).answers

    monkeypatch.setattr("stepsal.experiments.evaluate.merge_parts", killed)  # a second kill, with more answers beside
    with pytest.raises(KeyboardInterrupt):
        evaluate(mini, TASK, VARIANTS[:2], 6, folder=tmp_path, **SHORT)
    monkeypatch.undo()
    assert len(answer_files(tmp_path)) == 3  # what was merged is gone; two new ones
    pd.testing.assert_frame_equal(before, Evaluation(tmp_path, tuple(VARIANTS[:2]), 5, 1).answers)
    after = evaluate(mini, TASK, VARIANTS[:2], 6, folder=tmp_path, **SHORT)
    pd.testing.assert_frame_equal(before, Evaluation(tmp_path, tuple(VARIANTS[:2]), 5, 1).answers)
    assert len(after.answers) == 12
    assert len(answer_files(tmp_path)) == 1


def hidden(model: TransformerBridge, problem: object, names: set[str]) -> AbstractContextManager:
    """Hide the definitions of these names from all layers."""
    question = render_prompt(model.tokenizer, problem.question).text
    offsets = model.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = [
        (question.index(f"{d}."), question.index(f"{d}.") + len(f"{d}."))
        for d in problem.definitions
        if d.name in names
    ]
    keys = [i for i, (start, end) in enumerate(offsets) if any(a <= start and end <= b for a, b in spans)]
    assert keys

    def hide(scores: torch.Tensor, hook: object) -> torch.Tensor:
        return scores.index_fill(-1, torch.tensor(keys), -1e9)

    return model.hooks(fwd_hooks=[(f"blocks.{i}.attn.hook_attn_scores", hide) for i in range(model.cfg.n_layers)])


def needed_and_not(problem: object) -> tuple[str, set[str]]:
    """Return a definition that the goal needs, and those that it does not."""
    needed, pending = set(), [problem.goal]
    while pending:
        needed.add(name := pending.pop())
        pending += problem.by_name[name].needs
    return min(needed - {problem.goal}), set(problem.by_name) - needed


def forgetful(model: TransformerBridge, problem: object) -> AbstractContextManager:
    """Hide a premise, and a definition that is not needed."""
    needed, others = needed_and_not(problem)
    return hidden(model, problem, {needed, min(others)})


def oracle(model: TransformerBridge, problem: object) -> AbstractContextManager:
    """Give the attention on the premise back."""
    return hidden(model, problem, {min(needed_and_not(problem)[1])})


def random_help(model: TransformerBridge, problem: object) -> AbstractContextManager:
    """Give as much attention back, on what is not needed."""
    return hidden(model, problem, {needed_and_not(problem)[0]})


@pytest.mark.slow
def test_the_harness_can_tell_help_from_none(mini: TransformerBridge, tmp_path: Path) -> None:
    variants = [
        Variant("forgetful", edit=forgetful),
        Variant("oracle", edit=oracle),
        Variant("random", edit=random_help),
    ]
    options = {"decoding": Decoding(max_new_tokens=100), "batch_size": 10, "progress": False}
    evaluation = evaluate(mini, ChainTask(length=2, distractors=3), variants, 16, folder=tmp_path, **options)
    paired = evaluation.paired().set_index("variant")
    assert paired.loc["oracle", "low"] > 0.1
    assert paired.loc["oracle", "mcnemar_p"] < 0.01
    assert paired.loc["random", "mcnemar_p"] > 0.1
    assert "wrong premise" in evaluation.errors("oracle").index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": []}, "at least one"),
        ({"variants": [Variant("a"), Variant("a", max_new_tokens=3)]}, "names that differ"),
        ({"n_problems": 0}, "n_problems=0"),
        ({"decoding": Decoding(), "n_samples": 2}, "temperature=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"variants": [Variant("long", instruction="what " * 2000)]}, "leaves no room in the context"),
        ({"decoding": Decoding(), "variants": [Variant("a", votes=2)]}, "temperature=0"),
    ],
)
def test_what_makes_no_run(mini: TransformerBridge, tmp_path: Path, arguments: dict, message: str) -> None:
    request = {"variants": VARIANTS, "n_problems": 2, "n_samples": 1, **OPTIONS, **arguments}
    with pytest.raises(ValueError, match=message):
        evaluate(mini, TASK, folder=tmp_path / "new", **request)
    assert not (tmp_path / "new").exists()


def test_folders_that_are_not_what_they_should_be(mini: TransformerBridge, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no evaluation"):
        evaluate(mini, TASK, VARIANTS[:1], 1, folder=tmp_path / "foreign", **SHORT)
    evaluate(mini, TASK, VARIANTS[:1], 1, folder=tmp_path / "run", **SHORT)
    (file,) = answer_files(tmp_path / "run")
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    with pytest.raises(ValueError, match=r"is damaged \(.*answers.parquet.*\); delete it, and run the same call again"):
        evaluate(mini, TASK, VARIANTS[:1], 1, folder=tmp_path / "run", **SHORT)
    file.write_bytes(content)
    shutil.copytree(file.parent, file.parents[1] / "copy")
    with pytest.raises(ValueError, match="an answer twice"):
        evaluate(mini, TASK, VARIANTS[:1], 1, folder=tmp_path / "run", **SHORT)


@shares_a_run
def test_save_and_load(run: Evaluation, tmp_path: Path) -> None:
    loaded = Evaluation.load(run.folder)
    assert loaded == run
    copy = Evaluation.load(run.save(tmp_path / "copy"))
    assert (copy.variants, copy.n_problems, copy.n_samples) == (run.variants, 6, 2)
    pd.testing.assert_frame_equal(copy.answers, run.answers)
    assert copy.manifest == run.manifest
    fewer = Evaluation.load(run.folder, variants=run.variants[1:2], n_problems=3)
    assert fewer == Evaluation(run.folder, run.variants[1:2], 3, 2)
    with pytest.raises(ValueError, match="not empty"):
        run.save(tmp_path / "copy")
    for part in (tmp_path / "copy" / "parts").glob("request-*"):
        shutil.rmtree(part)
    with pytest.raises(ValueError, match=r"does not say what it was asked for: pass variants=, n_problems="):
        Evaluation.load(tmp_path / "copy")
    assert len(Evaluation.load(tmp_path / "copy", variants=run.variants, n_problems=6, n_samples=2).answers) == 60


def test_an_edit_is_not_loaded(mini: TransformerBridge, tmp_path: Path) -> None:
    variants = [Variant("cut", edit=cut, votes=2), Variant("StepFlow", stepflow=stepsal.StepFlowConfig(oeb_layers=()))]
    evaluation = evaluate(mini, TASK, variants, 2, folder=tmp_path, **SHORT)
    loaded = Evaluation.load(tmp_path)
    assert loaded.variants[1] == variants[1]
    assert (loaded.variants[0].key, loaded.variants[0].votes) == (variants[0].key, 2)
    pd.testing.assert_frame_equal(loaded.answers, evaluation.answers)
    assert evaluate(mini, TASK, loaded.variants, 2, folder=tmp_path, **SHORT).accuracy().equals(loaded.accuracy())
    with pytest.raises(ValueError, match=r"the edit of variant 'cut' is a function, .* pass Variant\('cut', edit="):
        evaluate(mini, TASK, loaded.variants, 3, folder=tmp_path, **SHORT)


def test_variants_take_turns() -> None:
    answers = pd.DataFrame({"variant": ["a", "b"], "draw": [0, 0], "problem": [1, 2]})
    missing = missing_answers({"a": 1, "b": 2, "c": 1}, 3, answers)
    assert missing == {
        "a": {(0, 0), (0, 2)}, "b": {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}, "c": {(0, 0), (0, 1), (0, 2)}
    }  # fmt: skip
    assert [(turn.variant, turn.batch, turn.draws) for turn in turns(missing, {"a": 1, "b": 2, "c": 1}, 3, 2)] == [
        ("a", 0, [Draw(0, 0)]), ("b", 0, [(0, 0), (0, 1)]), ("c", 0, [(0, 0), (0, 1)]),
        ("c", 1, [(0, 2)]), ("a", 1, [(0, 2)]),
        ("b", 2, [(1, 0), (1, 1)]),
        ("b", 3, [(1, 2)]),
    ]  # fmt: skip


def test_different_edits_have_different_keys() -> None:
    one, two = (Variant(name, edit=lambda model, problems: model.hooks()) for name in ("one", "two"))
    assert one.key != two.key


def test_votes() -> None:
    assert voted_for(pd.Series(["3", "5", "5", None], index=[7, 8, 9, 10])) == 8
    assert voted_for(pd.Series(["3", "5"], index=[7, 8])) == 7
    assert voted_for(pd.Series([None, None], index=[7, 8])) == 7
    with pytest.raises(ValueError, match="votes=0"):
        Variant("none", votes=0)
