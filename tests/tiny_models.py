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
_GPT = {"vocab_size": 160, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
_OWN = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}  # no grouped queries
_WINDOW = {"sliding_window": 6}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_NO_PAD = {"pad_token_id": 0}  # some configurations name a token that the tiny vocabulary does not have
_SPECS: dict[str, dict[str, object]] = {
    "Qwen2": _SHAPE,
    "Llama": _SHAPE,
    "Qwen3": _SHAPE,  # QK-norm
    "Gemma2": {**_SHAPE, **_WINDOW, "attn_logit_softcapping": 2.0},
    "GptOss": {**_SHAPE, **_WINDOW, **_LOCAL_EXPERTS, **_ROPE},  # sinks, alternating sliding windows, experts
    "GPT2": _GPT,  # no rotary embeddings, one projection for q, k and v
    "Phi3": {**_SHAPE, **_WINDOW, **_NO_PAD},  # one projection for q, k and v, then rotary embeddings
    "Mistral": {**_SHAPE, **_WINDOW},
    "Mixtral": {**_SHAPE, **_WINDOW, **_LOCAL_EXPERTS},
    "Qwen2Moe": {**_SHAPE, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**_SHAPE, **_EXPERTS},
    "Gemma": _SHAPE,
    "Gemma3": {**_SHAPE, **_WINDOW},
    "Olmo": _SHAPE,
    "Olmo2": _SHAPE,
    "Olmo3": {**_SHAPE, **_WINDOW, **_ALTERNATING},  # queries and keys in float32 whatever the dtype
    "Olmoe": {**_SHAPE, "num_experts": 4, "num_experts_per_tok": 2},
    "Granite": _SHAPE,
    "GraniteMoe": {**_SHAPE, **_LOCAL_EXPERTS},
    "Glm": {**_SHAPE, **_NO_PAD},
    "Glm4": {**_SHAPE, **_NO_PAD},
    "Glm4Moe": {
        **_SHAPE, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1},
    "Cohere": _SHAPE,
    "Cohere2": {**_SHAPE, **_WINDOW},
    "SmolLM3": {**_SHAPE, **_NO_PAD},
    "SeedOss": _SHAPE,
    "Exaone4": {**_SHAPE, **_WINDOW},
    "Ernie4_5": _SHAPE,
    "Apertus": _SHAPE,
    "Arcee": _SHAPE,
    "Nemotron": _SHAPE,
    "MiniMaxM2": {**_SHAPE, **_LOCAL_EXPERTS},
    "Lfm2": _SHAPE,
    "StableLm": _SHAPE,
    "Starcoder2": {**_SHAPE, **_WINDOW},
    "Phi": {**_OWN, "intermediate_size": 48, "max_position_embeddings": 128},
    "GPTNeoX": {**_OWN, "intermediate_size": 48, "max_position_embeddings": 128},
    "GPTBigCode": _GPT,  # one key-value head
    "Falcon": _OWN,  # one key-value head
    "Bloom": {"vocab_size": 160, "hidden_size": 32, "n_layer": 4, "n_head": 4},  # ALiBi
    "Mpt": {"vocab_size": 160, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 128},  # ALiBi
    "OPT": {**_OWN, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "GPTNeo": {
        "vocab_size": 160, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 2]]},
    "GPTJ": {**_GPT, "rotary_dim": 4},
    "CodeGen": {**_GPT, "rotary_dim": 4},
    "HunYuanDenseV1": _SHAPE,
    "DeepseekV3": {
        **_OWN, "num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4,
        "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8},
    "Mamba": {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4},
}  # fmt: skip
ARCHITECTURES = ("Qwen2", "Llama", "Qwen3", "Gemma2", "GptOss")
"""Architectures on which everything is tested."""
ALL_ARCHITECTURES = tuple(_SPECS)
"""Architectures of the table of models: served, and refused."""
_CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3": "Gemma3ForCausalLM"}
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")  # names of the longest text


def tiny_hf_model(architecture: str, **overrides: object) -> transformers.PreTrainedModel:
    """A random model, scaled up so that patterns are far from uniform and every layer matters."""
    config_class = getattr(transformers, _CONFIGS.get(architecture, f"{architecture}Config"))
    torch.manual_seed(0)
    model = getattr(transformers, _CLASSES.get(architecture, f"{architecture}ForCausalLM"))(
        config_class(**{**_SPECS[architecture], **overrides})
    )
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.ndim >= 2 or parameter_name.endswith(("bias", "sinks")):
                p.normal_(std=0.25)
    return model.eval()


def with_room(architecture: str) -> dict[str, object]:
    """Overrides that make room for 512 tokens."""
    return {name: 512 for name in _LENGTHS if name in _SPECS[architecture]}


def has_experts(architecture: str) -> bool:
    """Tell whether tokens are routed to experts."""
    return any("experts" in name for name in _SPECS[architecture])


def char_tokenizer(markers: tuple[str, str] = ("<think>", "</think>")) -> transformers.PreTrainedTokenizerFast:
    """One token per ASCII character, and a reasoning model's chat template; fits the vocabulary of the tiny models."""
    special = ["<bos>", "<eos>", "<user>", "<assistant>", *markers]
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
    hf_model = tiny_hf_model(architecture, **{**with_room(architecture), **overrides})
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
