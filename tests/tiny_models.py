"""Tiny random-weight instances of each architecture, and a tokenizer for them."""

from __future__ import annotations

import tokenizers
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

import stepsal

_SHAPE = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_ARCHITECTURES = {
    "Qwen2": ("Qwen2Config", {}),
    "Llama": ("LlamaConfig", {}),
    "Qwen3": ("Qwen3Config", {}),  # QK-norm
    "Gemma2": ("Gemma2Config", {"sliding_window": 6, "attn_logit_softcapping": 2.0}),
    "GptOss": (  # attention sinks, alternating sliding windows, experts
        "GptOssConfig",
        {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0}},
    ),
}  # fmt: skip
ARCHITECTURES = tuple(_ARCHITECTURES)


def tiny_hf_model(architecture: str, **overrides: object) -> transformers.PreTrainedModel:
    """A random model, scaled up so that patterns are far from uniform and every layer matters."""
    name, extra = _ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**{**_SHAPE, **extra, **overrides})
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.ndim >= 2 or parameter_name.endswith(("bias", "sinks")):
                p.normal_(std=0.25)
    return model.eval()


def char_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per ASCII character, and a reasoning model's chat template; fits the vocabulary of the tiny models."""
    special = ["<bos>", "<eos>", "<user>", "<assistant>", "<think>", "</think>"]
    characters = [*special, "\n", *(chr(i) for i in range(32, 127))]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(characters)}, []))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>",
        additional_special_tokens=special[2:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% else %}{{ m.content }}\n"
        "{% endif %}{% endfor %}<assistant><think>"
    )
    return tokenizer


def tiny_chat(architecture: str, **overrides: object) -> TransformerBridge:
    """A random model with a tokenizer."""
    hf_model = tiny_hf_model(architecture, max_position_embeddings=512, **overrides)
    return stepsal.load(f"tiny-{architecture}", hf_model=hf_model, tokenizer=char_tokenizer())


def booted_elsewhere(
    hf_model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast | None = None
) -> TransformerBridge:
    """A bridge that was not made, and so not checked, by `stepsal.load`; with its tokenizer as it is."""
    model = build_bridge_from_module(
        hf_model, type(hf_model).__name__, hf_config=hf_model.config, tokenizer=None, model_name="elsewhere"
    )
    model.tokenizer = tokenizer
    return model
