"""Formats of models: by the last part of the name, then by the chat template, then by the architecture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.presets import ARCHITECTURES, EMBEDDED, FAMILIES, TEMPLATE_MARKERS, family, preset_format
from stepsal.trace.formats import FORMATS


def named(name: str, template: object = None, architecture: str = "LlamaForCausalLM", tokenizer: bool = True) -> object:
    return SimpleNamespace(
        cfg=SimpleNamespace(model_name=name, architecture=architecture),
        tokenizer=SimpleNamespace(chat_template=template) if tokenizer else None,
    )


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "think"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "think"),
        ("Qwen/QwQ-32B", "think"),
        ("openai/gpt-oss-20b", "harmony"),
        ("Qwen/Qwen3-8B", "think"),
        ("/models/llama-zoo/Qwen3-8B/", "think"),
        ("C:\\models\\gpt-oss-20b", "harmony"),
        ("smollm2", "plain"),
        ("mini", "think"),
    ],
)
def test_names_tell_the_format(name: str, format: str) -> None:
    assert preset_format(named(name)) == format


@pytest.mark.parametrize(
    "name",
    [
        "/models/qwen3-zoo/llama",
        "qwen3/llama",
        "deepseek-r1/../gpt2",
        "gpt-oss\\llama\\",
        "microsoft/Phi-3.5-mini-instruct",
        "/models/mini",
        "models--Qwen--Qwen3-8B/snapshots/1a2b3c",
        "",
    ],
)
def test_only_the_last_part_of_a_path_counts(name: str) -> None:
    assert family(name) is None
    assert preset_format(named(name)) is None


def test_then_the_chat_template_then_the_architecture() -> None:
    qwen3 = "Qwen3ForCausalLM"
    assert preset_format(named("/models/qwen3-zoo/llama", "... </think> ...")) == "think"
    assert preset_format(named("x", "<|channel|>analysis</think>", qwen3)) == "harmony"
    assert preset_format(named("gpt-oss-20b", "... </think> ...", qwen3)) == "harmony"
    assert preset_format(named("SmolLM2-1.7B-Reasoner", "... </think> ...", qwen3)) == "think"
    assert preset_format(named("SmolLM2-1.7B-Instruct", "... <|im_end|> ...", qwen3)) == "plain"
    assert preset_format(named("x", {"default": "plain", "reason": "... </think> ..."})) == "think"
    assert preset_format(named("x", "{{ messages }}", qwen3)) == "think"
    assert preset_format(named("x", None, "GptOssForCausalLM", tokenizer=False)) == "harmony"
    assert preset_format(named("x", tokenizer=False)) is None


class Vocabulary(SimpleNamespace):
    """As much of a tokenizer as its vocabulary."""

    chat_template = None

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.tokens.index(token) if token in self.tokens else self.unk_token_id


@pytest.mark.parametrize("unk_token_id", [None, 0])
@pytest.mark.parametrize(
    ("tokens", "format"),
    [
        (["<unk>", "[THINK]", "[/THINK]"], "magistral"),
        (["<unk>", "<think>", "</think>"], "think"),
        (["<unk>", "<|START_THINKING|>", "<|END_THINKING|>", "<think>", "</think>"], "command"),
        (["<unk>", "<|start|>", "<|channel|>", "<|message|>"], "harmony"),
        (["<unk>", "<thought>"], None),
        (["<unk>"], None),
    ],
)
def test_the_vocabulary_tells_the_format(tokens: list[str], format: str | None, unk_token_id: int | None) -> None:
    model = named("x")
    model.tokenizer = Vocabulary(tokens=tokens, unk_token_id=unk_token_id)
    assert preset_format(model) == format


def test_templates_of_every_format_tell_it() -> None:
    for name, format in FORMATS.items():
        markers = " ".join((*format.all_markers, *format.openings))
        assert preset_format(named("x", "{# " + markers + " #}")) == (None if name == "plain" else name)


def test_real_models(mini: TransformerBridge, tiny: TransformerBridge, tiny_with_text: TransformerBridge) -> None:
    assert preset_format(mini) == "think"
    assert preset_format(tiny) == ARCHITECTURES.get(tiny.cfg.architecture)  # without a tokenizer
    # a template that only opens the thinking, but a token that ends it
    assert preset_format(tiny_with_text) == ARCHITECTURES.get(tiny_with_text.cfg.architecture, "think")


def test_every_format_is_one_that_there_is() -> None:
    for table in (EMBEDDED, FAMILIES, TEMPLATE_MARKERS, ARCHITECTURES):
        assert set(table.values()) <= set(FORMATS)
    assert all(part == part.lower() for part in FAMILIES)
