"""Let the attention pattern of a model's own attention module flow through a hook point.

A wrapper of attention computes all of it anew, with a hook point after each operation. Where somebody hooks the pattern
alone (as the Odds-Equal Bridge does), the model's own module will do, if its softmax is taken where the pattern can be
seen. transformers lets an attention module take its function from a table, by the name in its configuration:
`show_pattern` gives a module a configuration whose function is the one of this file.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "stepsal_eager"
_points: weakref.WeakKeyDictionary[nn.Module, HookPoint] = weakref.WeakKeyDictionary()


def show_pattern(attention: Any, point: HookPoint) -> None:
    """Let an attention module hand its pattern to a hook point, until it gets its own configuration back.

    Args:
        attention: an attention module of transformers with a plain softmax, without soft-cap and sinks.
        point: the hook point.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, eager_attention)
    _points[attention] = point
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = NAME


def eager_attention(
    module: Any,
    query: Float[Tensor, "batch head query_pos d_head"],
    key: Float[Tensor, "batch kv_head key_pos d_head"],
    value: Float[Tensor, "batch kv_head key_pos d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch query_pos head d_head"], Tensor]:
    """Compute attention with its pattern at the hook point of the module; the signature is that of transformers.

    The heads that share keys are taken together, so that keys and values are not copied for each of them.

    Args:
        module: the attention module.
        query: queries.
        key: keys.
        value: values.
        attention_mask: [batch, 1, query_pos, key_pos], False (or a large negative number) for keys that a query does
            not see; None where a query sees all keys up to its own.
        scaling: factor of the scores; None is d_head^-0.5.
        dropout: not used: it is 0 outside training.
        **kwargs: not used: what other functions need.

    Returns:
        The output before W_O, and the pattern.
    """
    batch, n_heads, n_queries, d_head = query.shape
    n_kv_heads, n_keys = key.shape[1:3]
    scale = d_head**-0.5 if scaling is None else scaling
    grouped = query.reshape(batch, n_kv_heads, -1, d_head)  # [batch, kv_head, head_of_it x query_pos, d_head]
    scores = (torch.matmul(grouped, key.transpose(2, 3)) * scale).view(batch, n_heads, n_queries, n_keys)
    if attention_mask is None and n_queries > 1:
        attention_mask = scores.new_ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    dtype = torch.promote_types(scores.dtype, torch.float32)  # as in transformers, but for float64 not rounded
    pattern = _points[module](torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype))
    z = torch.matmul(pattern.reshape(batch, n_kv_heads, -1, n_keys), value)
    return z.view(batch, n_heads, n_queries, -1).transpose(1, 2).contiguous(), pattern
