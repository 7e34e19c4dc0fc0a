"""Logits in portions are those of the whole pass, and no more of them are computed at a time than asked for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_chat
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.bridge import unembedding
from stepsal.bridge.unembedding import LateLogits
from stepsal.generation.scoring import log_probabilities
from stepsal.tasks import chain

TOKENS = torch.arange(5, 45)


@pytest.fixture
def trace(mini: TransformerBridge) -> stepsal.Trace:
    problem = chain.sample(3, length=4)
    return stepsal.Trace.from_text(problem.question, problem.solution(), mini)


def whole(model: TransformerBridge, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens[None], attention_mask=torch.ones_like(tokens)[None])[0]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "Falcon", "Olmo3"])
def test_portions_are_rows_of_the_whole(name: str) -> None:
    model = tiny_chat(name)
    late = LateLogits(model, TOKENS, 10, 37)
    for size in (1, 7, 27, 99):
        portions = list(late.portions(size))
        assert [len(p) for p in portions] == [min(size, 27 - i) for i in range(0, 27, size)]
        torch.testing.assert_close(torch.cat(portions), whole(model, TOKENS)[10:37].float(), atol=1e-5, rtol=1e-5)


def test_hooks_take_part(mini: TransformerBridge) -> None:
    for name in ("blocks.2.hook_out", "unembed.hook_in", "unembed.hook_out"):
        with mini.hooks(fwd_hooks=[(name, lambda x, hook: x * torch.linspace(0.5, 2, x.shape[1])[:, None])]):
            late, expected = LateLogits(mini, TOKENS, 0, 40), whole(mini, TOKENS)
        torch.testing.assert_close(torch.cat(list(late.portions(9))), expected, atol=1e-4, rtol=1e-4)
        assert (expected - whole(mini, TOKENS)).abs().max() > 0.1


def test_logits_that_are_something_else_are_kept(mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unembedding, "unembed", lambda model, x: 2 * model.unembed.original_component(x))
    late = LateLogits(mini, TOKENS, 3, 40)
    torch.testing.assert_close(torch.cat(list(late.portions(9))), whole(mini, TOKENS)[3:], atol=1e-4, rtol=1e-4)


def test_no_table_of_all_tokens_is_made(
    mini: TransformerBridge, trace: stepsal.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unembedding, "MAX_LOGITS", 20 * mini.cfg.d_vocab)
    expected = log_probabilities(mini, trace)
    n_rows: list[int] = []
    handle = mini.unembed.original_component.register_forward_hook(lambda _, args, out: n_rows.append(out.shape[-2]))
    try:
        torch.testing.assert_close(log_probabilities(mini, trace), expected)
        assert sum(n_rows) >= len(trace) - 1
        assert max(n_rows) == 20
        n_rows.clear()
        monkeypatch.setattr("stepsal.intervention.effects.CHUNK", 16)
        effects = stepsal.token_effects(mini, trace, stepsal.StepFlowConfig(tau_max=0.3))
        assert max(n_rows) == 16
    finally:
        handle.remove()
    monkeypatch.undo()
    again = stepsal.token_effects(mini, trace, stepsal.StepFlowConfig(tau_max=0.3))
    torch.testing.assert_close(torch.tensor(effects["kl"]), torch.tensor(again["kl"]), atol=1e-9, rtol=1e-6)
