"""Logits of a text in one forward pass, and in cached portions."""

from __future__ import annotations

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


def logits_of(model: TransformerBridge, tokens: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options)


def decoded(model: TransformerBridge, tokens: Tensor, n_first: int, mask: Tensor | None = None) -> Tensor:
    """Return the logits of the same tokens, the first ones at once and then one by one from the cache."""
    options: dict = {"return_type": "logits_and_cache", "use_cache": True}
    masks = torch.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        logits, cache = model(tokens[:, :n_first], attention_mask=masks[:, :n_first], **options)
        parts = [logits]
        for i in range(n_first, tokens.shape[1]):
            logits, cache = model(
                tokens[:, i : i + 1], attention_mask=masks[:, : i + 1], past_key_values=cache, **options
            )
            parts.append(logits)
    return torch.cat(parts, dim=1)
