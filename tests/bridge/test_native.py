"""The model's own modules: the same logits as through the wrappers, hooks that always count, and all put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forward_passes import logits_of
from tiny_models import ARCHITECTURES, tiny_hf_model
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.bridge.hooks import attention_hooks
from stepsal.bridge.native import Native, native

LAYER = 1


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "GPT2", "Phi3"])
def model(request: pytest.FixtureRequest) -> TransformerBridge:
    return stepsal.load(f"own-{request.param}", hf_model=tiny_hf_model(request.param))


def wrappers(model: TransformerBridge) -> dict[str, int]:
    return {name: id(module) for name, module in model.original_model.named_modules(remove_duplicate=False)}


def batch() -> tuple[Tensor, Tensor]:
    """Return two rows, of which the first is padded on the left."""
    tokens = torch.arange(2 * 9).reshape(2, 9) % 40
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return tokens, mask


@torch.no_grad()
def read(model: TransformerBridge) -> Tensor:
    tokens, mask = batch()
    return model(tokens, attention_mask=mask)[mask.bool()]


def test_the_logits_are_the_same_and_the_wrappers_come_back(model: TransformerBridge) -> None:
    expected, before, points = read(model), wrappers(model), list(model.hook_dict)
    with native(model):
        torch.testing.assert_close(read(model), expected, rtol=1e-4, atol=1e-5)
        assert wrappers(model) != before
        assert list(model.hook_dict) == points
    assert wrappers(model) == before
    assert torch.equal(read(model), expected)


@pytest.mark.parametrize("kind", ["q", "k", "v", "z", "scores", "pattern"])
def test_what_is_hooked_is_seen_and_edited(model: TransformerBridge, kind: str) -> None:
    seen: list[Tensor] = []

    def bend(x: Tensor, hook: object) -> Tensor:
        seen.append(x[1])  # the row without padding
        return x * torch.linspace(0.5, 1.5, x.shape[-1])

    name = attention_hooks(model, LAYER)[kind]
    with model.hooks(fwd_hooks=[(name, bend)]):
        expected = read(model)
        with native(model):
            torch.testing.assert_close(read(model), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, read(model), atol=1e-4)


@pytest.mark.parametrize(
    "name", ["embed.hook_out", "blocks.1.hook_in", "blocks.1.hook_out", "blocks.1.mlp.hook_out", "ln_final.hook_out",
             "unembed.hook_in"]
)  # fmt: skip
def test_hooks_elsewhere_count_as_well(mini: TransformerBridge, name: str) -> None:
    calls: list[str] = []

    def note(x: Tensor, hook: Any) -> None:
        calls.append(hook.name)

    with mini.hooks(fwd_hooks=[(name, note)]), native(mini):
        read(mini)
    assert calls == [name]


def test_hooks_that_come_and_go_count_from_the_next_refresh_on(mini: TransformerBridge) -> None:
    shapes: list[torch.Size] = []
    before = wrappers(mini)
    with native(mini) as parts:
        alone = wrappers(mini)
        with mini.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", lambda x, hook: shapes.append(x.shape))]):
            parts.refresh()
            read(mini)
        assert len(shapes) == 1
        parts.refresh()
        assert wrappers(mini) == alone
    assert wrappers(mini) == before


def test_a_torch_hook_on_a_wrapper_counts(mini: TransformerBridge) -> None:
    calls: list[int] = []
    handle = mini.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    try:
        with native(mini):
            read(mini)
    finally:
        handle.remove()
    assert calls == [1]


def test_only_what_is_hooked_stays_wrapped(mini: TransformerBridge) -> None:
    with mini.hooks(fwd_hooks=[("blocks.0.attn.hook_attn_scores", lambda x, hook: None)]), native(mini):
        layers = mini.original_model.model.layers
        assert type(layers[0].self_attn).__name__ == "PositionEmbeddingsAttentionBridge"
        assert type(layers[1].self_attn).__name__ == "Qwen2Attention"
        assert {type(layer).__name__ for layer in layers} == {"Qwen2DecoderLayer"}
        assert type(layers[0].mlp).__name__ == "Qwen2MLP"


def test_attention_whose_pattern_alone_is_hooked_is_not_wrapped(mini: TransformerBridge) -> None:
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)] + ["blocks.1.attn.hook_rot_q"]
    with mini.hooks(fwd_hooks=[(name, lambda x, hook: None) for name in names]), native(mini):
        attentions = [layer.self_attn for layer in mini.original_model.model.layers[:3]]
        assert [type(a).__name__ for a in attentions[::2]] == ["Qwen2Attention"] * 2
        assert [a.config._attn_implementation for a in attentions[::2]] == ["stepsal_eager", "sdpa"]
        assert type(attentions[1]).__name__ == "PositionEmbeddingsAttentionBridge"


@pytest.mark.parametrize("mask", ["padded", "none", "bool", "float"])
def test_the_pattern_is_that_of_the_wrapper_under_every_mask(model: TransformerBridge, mask: str) -> None:
    if mask == "bool" and model.original_model.config._attn_implementation == "eager":
        pytest.skip("transformers adds masks of any kind to the scores of this model")
    tokens, padding = batch()
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    causal[5:, 2] = False  # a mask of somebody's own
    masks = {
        "padded": padding, "none": None, "bool": causal.expand(2, 1, 9, 9),
        "float": torch.where(causal, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 9, 9),
    }  # fmt: skip
    seen: list[Tensor] = []
    hooks = [(attention_hooks(model, LAYER)["pattern"], lambda x, hook: seen.append(x[1]))]
    positions = torch.arange(9).expand(2, 9)
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        expected = model(tokens, attention_mask=masks[mask], position_ids=positions)[1]
        with native(model):
            logits = model(tokens, attention_mask=masks[mask], position_ids=positions)[1]
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_options_that_join_wrappers_keep_them(mini: TransformerBridge) -> None:
    before = wrappers(mini)
    mini.cfg.use_split_qkv_input = True
    try:
        with native(mini):
            assert wrappers(mini) == before
    finally:
        mini.cfg.use_split_qkv_input = False


@pytest.mark.parametrize("error", [ValueError("in between"), KeyboardInterrupt()])
def test_all_is_put_back_after_an_error(mini: TransformerBridge, error: BaseException) -> None:
    before = wrappers(mini)
    configs = [block.attn.original_component.config for block in mini.blocks]
    with pytest.raises(type(error)), native(mini):
        raise error
    assert wrappers(mini) == before
    assert all(block.attn.original_component.config is c for block, c in zip(mini.blocks, configs, strict=True))


def test_an_error_while_replacing_leaves_the_model_whole(
    mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, choose = wrappers(mini), Native._choose_function
    calls: list[int] = []

    def fail_late(parts: Native, module: torch.nn.Module, point: HookPoint | None) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        choose(parts, module, point)

    monkeypatch.setattr(Native, "_choose_function", fail_late)
    with pytest.raises(KeyboardInterrupt), native(mini):
        pass
    assert wrappers(mini) == before


def greedy(model: TransformerBridge, tokens: Tensor, n_new: int, step: Callable[..., Any]) -> list[int]:
    """Return the likeliest tokens, one after the other, with the whole text read anew each time."""
    for _ in range(n_new):
        tokens = torch.cat((tokens, step(tokens)[:, -1].argmax(-1)[:, None]), dim=1)
    return tokens[0].tolist()


def test_generate_writes_what_the_wrapped_model_would(mini: TransformerBridge) -> None:
    trace = stepsal.generate(mini, "Anna is 3 plus 4. Hugo is Anna plus 2. What is Hugo?", max_new_tokens=40)
    prompt = trace.tokens[None, : trace.n_prompt]
    assert greedy(mini, prompt, len(trace) - trace.n_prompt, lambda t: logits_of(mini, t)) == trace.tokens.tolist()
