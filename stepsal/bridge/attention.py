"""Read off a Hugging Face model what its attention and its unembedding do besides matrix products.

This is the one place that knows Hugging Face configurations and attributes of attention: scale, sliding window,
soft-cap, sinks, kinds of layers, and what stands between the last residual stream and the logits. All else works on
plain values such as `Attention`, for which neither TransformerLens nor a model is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
# families with one window for all layers, named in the configuration alone
_ONE_WINDOW = ("mistral", "mixtral", "ministral3", "phi3", "phimoe", "starcoder2")
_MATMUL_ERROR = 1e-3  # of |q| |k|: what a product in reduced precision (TF32, bfloat16) may be off by
ROUNDINGS = 8
"""Roundings, of one epsilon each, that may lie between a product and the model's own number."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Everything that a layer does to scores and pattern besides the softmax.

    Attributes:
        scale: factor of q . k.
        window: keys that a query sees at most, itself included; None for all of them.
        softcap: c in c tanh(score / c); None without one.
        sinks: score of each head's attention sink; None without sinks.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None


def attention_of(model: TransformerBridge, layer: int) -> Attention:
    """Read the attention of a layer off the module that the bridge wraps.

    Args:
        model: a bridge that `stepsal.bridge.check.check_model` accepts.
        layer: layer index.

    Example:
        >>> from stepsal.bridge.attention import attention_of
        >>> attention_of(stepsal.load("mini"), 0).window is None
        True
    """
    wrapped = model.blocks[layer].attn.original_component
    scaling = getattr(wrapped, "scaling", None)
    return Attention(
        scale=getattr(wrapped, "head_dim", model.cfg.d_head) ** -0.5 if scaling is None else scaling,
        window=sliding_window(model, layer),
        softcap=getattr(wrapped, "attn_logit_softcapping", None),
        sinks=getattr(wrapped, "sinks", None),
    )


def expected_scores(
    attention: Attention,
    q: Float[Tensor, "*batch query_pos head d_head"],
    k: Float[Tensor, "*batch key_pos kv_head d_head"],
    eps: float,
) -> tuple[Float[Tensor, "*batch head query_pos key_pos"], Float[Tensor, "*batch head query_pos key_pos"]]:
    """Compute the scores of queries and keys, masks left out, and how far a model's own may be from them.

    Args:
        attention: scale and soft-cap of the layer.
        q: queries, with rotary embeddings and norms applied, in float32.
        k: keys, likewise.
        eps: epsilon of the narrowest dtype that the model computes its scores in.

    Returns:
        The scores, and the tolerance of each.

    Example:
        >>> import torch
        >>> from stepsal.bridge.attention import Attention, expected_scores
        >>> scores, tolerance = expected_scores(Attention(0.5), torch.ones(2, 1, 3), torch.ones(2, 1, 3), 1e-7)
        >>> scores.tolist()
        [[[1.5, 1.5], [1.5, 1.5]]]
    """
    k = k.repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)  # [*batch, key_pos, head, d_head]
    scores = attention.scale * torch.einsum("...qhd,...khd->...hqk", q, k)
    lengths = torch.einsum("...qh,...kh->...hqk", q.norm(dim=-1), k.norm(dim=-1))
    tolerance = _MATMUL_ERROR * attention.scale * lengths
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    return scores, tolerance + ROUNDINGS * eps * scores.abs()


def sliding_window(model: TransformerBridge, layer: int) -> int | None:
    """Return the sliding window of a layer: the number of keys that a query sees, itself included; None without one.

    Args:
        model: a bridge; its parameters may be on the "meta" device, which takes no memory.
        layer: layer index.
    """
    wrapped, config = model.blocks[layer].attn.original_component, _text_config(model)
    kinds = getattr(config, "layer_types", None)
    if kinds:  # masks go by this list; some layers name a window that they do not have
        window = getattr(wrapped, "sliding_window", None) or getattr(config, "sliding_window", None)
        return window if kinds[layer] == "sliding_attention" else None
    if hasattr(wrapped, "sliding_window"):
        return wrapped.sliding_window or None
    return getattr(config, "sliding_window", None) if config.model_type in _ONE_WINDOW else None


def unknown_layer_type(model: TransformerBridge) -> str | None:
    """Return a kind of layer that is neither full nor sliding attention; None where all are one of these.

    Args:
        model: a bridge.
    """
    kinds = set(getattr(_text_config(model), "layer_types", None) or ())
    return min(kinds - _KNOWN_LAYER_TYPES, default=None)


def unembed(model: TransformerBridge, x: Float[Tensor, "*pos d_model"]) -> Float[Tensor, "*pos d_vocab"]:
    """Compute the logits of the last residual stream, past the hooks of the unembedding.

    Args:
        model: a bridge.
        x: the residual stream after the final norm, as `unembed.hook_in` shows it.
    """
    config = _text_config(model)
    logits = model.unembed.original_component(x)
    logits = logits * (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _text_config(model: TransformerBridge) -> Any:
    """Return the configuration of the language model, also of one that has other parts."""
    config: Any = model.original_model.config
    return config.get_text_config()
