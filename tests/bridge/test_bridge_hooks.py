"""Hook points of attention by model, and hooks that run before those of others."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import booted_elsewhere, tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.hooks import attention_hooks, first_hooks_on, show_rotated


def hooks_on(model: TransformerBridge) -> list[int]:
    return [len(point.fwd_hooks) + len(point._forward_hooks) for point in model.hook_dict.values()]


@pytest.mark.parametrize(
    ("architecture", "q", "k"),
    [
        ("Llama", "hook_rot_q", "hook_rot_k"),
        ("Phi3", "hook_rot_q", "hook_rot_k"),
        ("GPT2", "q.hook_out", "k.hook_out"),
        ("Bloom", "q.hook_out", "k.hook_out"),
    ],
)
def test_queries_and_keys_are_taken_where_nothing_more_is_done_to_them(architecture: str, q: str, k: str) -> None:
    names = attention_hooks(booted_elsewhere(tiny_hf_model(architecture)), 1)
    assert (names["q"], names["k"]) == (f"blocks.1.attn.{q}", f"blocks.1.attn.{k}")


@pytest.mark.parametrize("architecture", ["Phi3", "GPTNeoX", "Falcon"])
def test_rotated_queries_and_keys_of_fused_projections_are_shown_and_can_be_edited(architecture: str) -> None:
    model, tokens = booted_elsewhere(tiny_hf_model(architecture)), torch.arange(9)[None]
    with torch.no_grad():
        before = model(tokens)
        for _ in range(2):  # the second time does nothing
            show_rotated(model)
        shown: dict[str, torch.Tensor] = {}
        names = attention_hooks(model, 2)
        hooks = [(names[kind], lambda x, hook, kind=kind: shown.update({kind: x})) for kind in ("q", "k", "scores")]
        with model.hooks(fwd_hooks=hooks):
            assert torch.equal(model(tokens), before)
        q, k = shown["q"], shown["k"]  # [batch, pos, head, d_head], [batch, pos, kv_head, d_head]
        assert (q.shape[2], k.shape[2]) == (model.cfg.n_heads, model.cfg.n_key_value_heads or model.cfg.n_heads)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        causal = torch.ones(9, 9, dtype=torch.bool).tril() & (shown["scores"] > -1e30)
        torch.testing.assert_close(shown["scores"][causal], scores[causal])
        with model.hooks(fwd_hooks=[(names["q"], lambda q, hook: 0 * q)]):
            assert not torch.allclose(model(tokens), before, rtol=0.01)


def test_a_copy_of_a_model_shows_its_own_queries() -> None:
    model, tokens = booted_elsewhere(tiny_hf_model("Phi3")), torch.arange(9)[None]
    show_rotated(model)
    other, calls = copy.deepcopy(model), []
    with torch.no_grad(), other.hooks(fwd_hooks=[(attention_hooks(other, 0)["q"], lambda q, hook: calls.append(1))]):
        model(tokens)
        assert not calls
        other(tokens)
    assert calls == [1]


def test_first_hooks_run_before_all_others_and_are_taken_off(tiny: TransformerBridge) -> None:
    order: list[str] = []
    name = "blocks.0.hook_resid_pre"
    with (
        tiny.hooks(fwd_hooks=[(name, lambda x, hook: order.append("theirs"))]),
        pytest.raises(KeyError),
        first_hooks_on(tiny, [(name, lambda x, hook: order.append("first")), ("no.such.point", lambda x, hook: None)]),
    ):
        pass
    with (
        tiny.hooks(fwd_hooks=[(name, lambda x, hook: order.append("theirs"))]),
        first_hooks_on(tiny, [(name, lambda x, hook: order.append("first"))]),
    ):
        tiny(torch.arange(5)[None])
    assert order == ["first", "theirs"]
    assert not any(hooks_on(tiny))
