"""FLOPs from lengths against torch's counter on whole answers."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from tiny_models import tiny_chat
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.generation.flops import decoding_flops
from stepsal.tasks import chain


def counted(model: TransformerBridge) -> AbstractContextManager:
    """Keep attention out of the fused kernel, which torch does not count on a CPU, by hooks that do nothing."""
    return model.hooks(fwd_hooks=[(f"blocks.{i}.attn.hook_pattern", nothing) for i in range(model.cfg.n_layers)])


def nothing(pattern: torch.Tensor, hook: object) -> None:
    return None


@pytest.mark.slow
@pytest.mark.parametrize("stepflow", [None, stepsal.StepFlowConfig()])
def test_what_an_answer_costs(mini: TransformerBridge, stepflow: stepsal.StepFlowConfig | None) -> None:
    flops = decoding_flops(mini)
    for seed, limit in ((1, 1), (2, 7), (3, 40)):
        with counted(mini), FlopCounterMode(display=False) as counter:
            trace = stepsal.generate(
                mini, chain.sample(seed, length=3).question, stepflow=stepflow, max_new_tokens=limit
            )
        n_new = len(trace) - trace.n_prompt
        assert n_new == limit
        edits = 3e-3 if stepflow else 0  # which are left out
        assert flops.of(trace.n_prompt, n_new) == pytest.approx(counter.get_total_flops(), rel=1e-6 + edits)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Qwen2", "Gemma2"])
def test_windows_bound_what_a_token_sees(architecture: str) -> None:
    options = {"sliding_window": 32} if architecture == "Gemma2" else {}
    model = tiny_chat(architecture, **options)
    flops = decoding_flops(model)
    assert set(flops.windows) == ({None, 32} if options else {None})
    with counted(model), FlopCounterMode(display=False) as counter:
        trace = stepsal.generate(model, "a" * 20, max_new_tokens=60, seed=1, temperature=5.0)
    assert flops.of(trace.n_prompt, len(trace) - trace.n_prompt) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_a_window_too_short_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match="window of 6 keys"):
        decoding_flops(tiny_chat("Gemma2"))


def test_longer_prompts_and_answers_cost_more(mini: TransformerBridge) -> None:
    flops = decoding_flops(mini)
    parameters = sum(p.numel() for p in mini.original_model.parameters())
    assert flops.of(100, 50) < flops.of(101, 50) < flops.of(101, 51)
    assert 0.5 * 2 * parameters < flops.token[0] < 2 * 2 * parameters  # two for each parameter that a token meets
