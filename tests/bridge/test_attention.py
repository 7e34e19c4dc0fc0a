"""Tests of the values read off Hugging Face models, held against their configurations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_models import booted_elsewhere, tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.attention import Attention, attention_of, sliding_window, unembed, unknown_layer_type


@pytest.mark.parametrize(
    ("architecture", "windows", "softcap", "sinks"),
    [
        ("Qwen2", [None] * 4, None, False),
        ("Llama", [None] * 4, None, False),
        ("Gemma2", [6, None, 6, None], 2.0, False),
        ("GptOss", [6, None, 6, None], None, True),
    ],
)
def test_as_the_configuration_says(
    architecture: str, windows: list[int | None], softcap: float | None, sinks: bool
) -> None:
    hf_model = tiny_hf_model(architecture)
    model = booted_elsewhere(hf_model)
    attentions = [attention_of(model, layer) for layer in range(4)]
    assert [attention.window for attention in attentions] == windows
    assert [sliding_window(model, layer) for layer in range(4)] == windows
    assert {attention.softcap for attention in attentions} == {softcap}
    scale = (hf_model.config.query_pre_attn_scalar if architecture == "Gemma2" else hf_model.config.head_dim) ** -0.5
    assert [attention.scale for attention in attentions] == pytest.approx([scale] * 4)
    for attention, layer in zip(attentions, hf_model.model.layers, strict=True):
        assert (attention.sinks is layer.self_attn.sinks) if sinks else attention.sinks is None
    assert unknown_layer_type(model) is None


def test_other_kinds_of_layers_are_named() -> None:
    model = booted_elsewhere(tiny_hf_model("Qwen2"))
    model.original_model.config.layer_types = ["full_attention", "linear_attention", "full_attention", "chunked"]
    assert unknown_layer_type(model) == "chunked"


def test_the_unembedding_gives_the_logits_of_the_model(tiny: TransformerBridge) -> None:
    last: list[torch.Tensor] = []
    tokens = torch.arange(12)[None]
    with torch.no_grad(), tiny.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: last.append(x))]):
        logits = tiny(tokens)
        torch.testing.assert_close(unembed(tiny, last[0]), logits)


def test_plain_values_need_no_model() -> None:
    assert Attention(0.5) != Attention(0.5)  # by identity: sinks are tensors
    check = "import stepsal.bridge.attention, stepsal.saliency.blocks, sys; sys.exit('transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
