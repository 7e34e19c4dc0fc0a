"""Summaries of results fit 100 columns, say the finding, and are HTML in a notebook."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.experiments import Population
from stepsal.stats.report import WIDTH, Report, sentence_of_difference
from stepsal.tasks.chain import ChainTask

DATA = Path(__file__).parents[2] / "data"


def checked(report: Report) -> str:
    text = str(report)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "..." not in "".join(report.table.astype(str).sum())  # nothing is elided
    assert report._repr_html_().count("<tr") == len(report.table) + (1 if len(report.table) else 0)
    return text


def test_a_population_says_how_many_are_correct() -> None:
    population = Population.load(DATA / "population_mini")
    n_correct = int(population.answers["correct"].sum())
    text = checked(population.summary())
    assert f"{n_correct} of {len(population)} are correct" in text
    assert "shallow_lock_in" in text
    assert population._repr_html_() == population.summary()._repr_html_()


def test_a_contrast_says_where_groups_differ_and_where_not() -> None:
    metrics = Population.load(DATA / "population_smollm2").metrics  # of 30 layers
    correct, wrong = metrics[metrics["correct"]], metrics[~metrics["correct"]]
    table = stepsal.stats.compare_groups(correct, wrong, "question", n_resamples=199)
    text = checked(stepsal.stats.summarize(table))
    for matching, who in (("none", "All traces"), ("length", "Traces of similar length")):
        n_sure = int((table[table["matching"] == matching]["q"] <= 0.05).sum())
        (line,) = [s for s in stepsal.stats.summarize(table).sentences if s.startswith(who)]
        assert (f"differs in {n_sure} of " if n_sure else "differs in no layer") in line
    assert text.count("similar length") >= 1


def test_several_metrics_are_refused() -> None:
    table = pd.DataFrame({"metric": ["a", "b"], "matching": "none"} | dict.fromkeys(
        ["difference", "low", "high", "hedges_g", "p"], 0.0))  # fmt: skip
    with pytest.raises(ValueError, match="'a', 'b': summarize them one by one"):
        stepsal.stats.summarize(table)


@pytest.mark.parametrize(("n_fixed", "word"), [(0, "no difference is seen"), (40, "is better"), (-40, "is worse")])
def test_a_difference_is_called_one_only_where_it_is_sure(n_fixed: int, word: str) -> None:
    before, after = np.zeros((60, 1), dtype=bool), np.arange(60)[:, None] < abs(n_fixed)
    change = stepsal.stats.paired_difference(*((before, after) if n_fixed >= 0 else (after, before)))
    sentence = sentence_of_difference("b", "a", change)
    assert word in sentence
    assert ("would be seen" in sentence) == (n_fixed == 0)
    assert f"{100 * change.low:+.1f} to {100 * change.high:+.1f}" in sentence


def test_texts_of_models_are_escaped() -> None:
    report = Report("<b>", pd.DataFrame({"variant": ["<script>"]}), ["a < b"])
    assert "<script>" not in report._repr_html_()
    assert "&lt;b&gt;" in report._repr_html_()


@pytest.mark.slow
def test_an_evaluation_and_a_calibration(mini: TransformerBridge, tmp_path: Path) -> None:
    decoding = stepsal.Decoding(max_new_tokens=40)
    variants = [stepsal.Variant("baseline"), stepsal.Variant("StepFlow", stepflow=stepsal.StepFlowConfig(tau_max=0.4))]
    result = stepsal.evaluate(
        mini, ChainTask(length=1), variants, 6, folder=tmp_path / "a", decoding=decoding, progress=False
    )
    text = checked(result.summary())
    assert f"{result.accuracy()['accuracy'][0]:.1%}" in text
    expected = sentence_of_difference("StepFlow", "baseline", result.difference("baseline", "StepFlow"))
    assert expected in " ".join(text.split())
    settings = [stepsal.StepFlowConfig(smi_layers=()), stepsal.StepFlowConfig(oeb_layers=())]
    calibration = stepsal.calibrate(
        mini, ChainTask(length=1), 30, folder=tmp_path / "b", settings=settings, decoding=decoding, progress=False
    )
    text = checked(calibration.summary())
    assert "OEB shallow at 0.15" in text
    assert "held out: " in text
    assert "no setting beats the baseline" in text
