"""FLOPs from lengths against torch's counter on whole answers."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.flops import decoding_flops
from stepsal.tasks import chain


@pytest.mark.parametrize("stepflow", [None, stepsal.StepFlowConfig()])
def test_what_an_answer_costs(mini: TransformerBridge, stepflow: stepsal.StepFlowConfig | None) -> None:
    flops = decoding_flops(mini)
    for seed, budget in ((1, 1), (2, 7), (3, 40)):
        with FlopCounterMode(display=False) as counter:
            trace = stepsal.generate(
                mini, chain.sample(seed, length=3).question, stepflow=stepflow, max_new_tokens=budget
            )
        n_new = len(trace) - trace.n_prompt
        assert n_new == budget
        assert flops.of(trace.n_prompt, n_new) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_longer_prompts_and_answers_cost_more(mini: TransformerBridge) -> None:
    flops = decoding_flops(mini)
    parameters = sum(p.numel() for p in mini.original_model.parameters())
    assert flops.of(100, 50) < flops.of(101, 50) < flops.of(101, 51)
    assert 0.5 * 2 * parameters < flops.token[0] < 2 * 2 * parameters  # two for each parameter that a token meets
