"""Continuations are scored as a pass over each text alone scores them, and as greedy decoding would write them."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import Continuation, StepFlowConfig
from stepsal.generation.loop import Prompt, write
from stepsal.generation.scoring import continuation_scores, log_probabilities
from stepsal.tasks import chain

STRONG = StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.5, alpha=0.8)


@pytest.fixture(scope="module")
def texts() -> list[Continuation]:
    """Solutions of chain problems that are cut in their middle; the third has no wrong continuation."""
    texts = []
    for i in range(5):
        problem = chain.sample(60 + i, length=i + 2)
        step = problem.solution().split(".")[1]
        before, right = problem.solution().split(step)[0] + step[:6], step[6:]
        wrong = None if i == 2 else right[:-1] + ("1" if right[-1] != "1" else "2")
        texts.append(Continuation(problem.question, before, right, wrong, {"i": i}))
    return texts


@pytest.mark.parametrize("config", [None, STRONG])
def test_scores_are_those_of_each_text_alone(
    mini: TransformerBridge, texts: list[Continuation], config: StepFlowConfig | None
) -> None:
    scores = continuation_scores(mini, texts, config, batch_size=3)
    assert scores["i"].tolist() == list(range(5))
    for i, text in enumerate(texts):
        for wrong in (False, True)[: 1 + (text.wrong is not None)]:
            trace, n_new = text.trace(mini, wrong=wrong)
            if config is None:
                expected = log_probabilities(mini, trace)
            else:
                with stepsal.stepflow(mini, config):
                    expected = log_probabilities(mini, trace)
            got = scores.loc[i, "wrong" if wrong else "right"]
            assert got == pytest.approx(float(expected[-n_new:].sum()), abs=1e-3)
    assert scores["wrong"].isna().tolist() == [False, False, True, False, False]
    if config is not None:
        plain = continuation_scores(mini, texts)
        assert (plain["right"] - scores["right"]).abs().max() > 0.01


def test_greedy_is_what_is_written(mini: TransformerBridge, texts: list[Continuation]) -> None:
    scores = continuation_scores(mini, texts)
    for text, greedy in zip(texts, scores["greedy"], strict=True):
        trace, n_new = text.trace(mini)
        ids = trace.tokens.tolist()
        (answer,) = write(mini, [Prompt(ids[:-n_new], 0, n_new)], decoding=stepsal.Decoding())
        assert greedy == (answer.tokens == ids[-n_new:])
    worse = [Continuation(t.question, t.before, t.wrong) for t in texts if t.wrong is not None]
    assert not continuation_scores(mini, worse)["greedy"].any()


def test_errors(mini: TransformerBridge, texts: list[Continuation]) -> None:
    with pytest.raises(ValueError, match="there are no texts"):
        continuation_scores(mini, [])
    with pytest.raises(ValueError, match="batch_size=0"):
        continuation_scores(mini, texts, batch_size=0)
    with stepsal.stepflow(mini), pytest.raises(ValueError, match="is open"):
        continuation_scores(mini, texts, STRONG)
    assert not torch.is_grad_enabled() or stepsal.intervention.active_flow(mini) is None
