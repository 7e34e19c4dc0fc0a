"""Name the hook points of attention that stepsal uses, and put hooks on them.

They depend on the model: where there are rotary embeddings, queries and keys are taken after them; where there are none
(GPT-2 adds positions to the residual stream), as they come out of their projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import JointQKVPositionEmbeddingsAttentionBridge

Hook = Callable[..., Tensor | None]
"""A forward hook as TransformerLens has them: takes the activation and `hook=`, returns a new activation or None."""


def attention_hooks(model: TransformerBridge, layer: int) -> dict[str, str]:
    """Return the canonical names of the hook points that stepsal uses in one layer.

    Args:
        model: a bridge.
        layer: layer index.

    Returns:
        Names by the activation that flows there. `q` and `z` (the attention output before W_O) are [batch, pos, head,
        d_head]; `k` and `v` are [batch, pos, kv_head, d_head]; `scores` (pre-softmax, masked) and `pattern` are [batch,
        head, query_pos, key_pos]. The scores are those of `q` and `k`: nothing rotates or scales them in between.

    Example:
        >>> from stepsal.bridge.hooks import attention_hooks
        >>> names = attention_hooks(stepsal.load("mini"), 3)
        >>> names["q"], names["pattern"]
        ('blocks.3.attn.hook_rot_q', 'blocks.3.attn.hook_pattern')
    """
    attn = f"blocks.{layer}.attn"
    rotary = hasattr(getattr(model.blocks[layer], "attn", None), "hook_rot_q")
    return {
        "q": f"{attn}.hook_rot_q" if rotary else f"{attn}.q.hook_out",
        "k": f"{attn}.hook_rot_k" if rotary else f"{attn}.k.hook_out",
        "v": f"{attn}.v.hook_out",
        "z": f"{attn}.o.hook_in",
        "scores": f"{attn}.hook_attn_scores",
        "pattern": f"{attn}.hook_pattern",
    }


def show_rotated(model: TransformerBridge) -> None:
    """Let rotated queries and keys flow through `hook_rot_q` and `hook_rot_k` where they would pass them by.

    TransformerLens gives these hook points to every attention with rotary embeddings, but where q, k and v are one
    projection (Phi-3, GPT-NeoX, Falcon) nothing comes through them. Values do not change. Calling this again does
    nothing.

    Args:
        model: a bridge.
    """
    for block in model.blocks:
        attn = getattr(block, "attn", None)
        if isinstance(attn, JointQKVPositionEmbeddingsAttentionBridge) and hasattr(attn, "hook_rot_q"):
            rotate = attn._apply_rotary_pos_emb
            if getattr(rotate, "func", None) is not _rotate_and_show:
                attn.__dict__["_apply_rotary_pos_emb"] = partial(_rotate_and_show, attn, rotate)


def _rotate_and_show(
    attn: Any, rotate: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    q, k = rotate(q, k, *args, **kwargs)  # [batch, head, pos, d_head], [batch, kv_head, pos, d_head]
    return attn.hook_rot_q(q), attn.hook_rot_k(k)


@contextmanager
def first_hooks_on(model: TransformerBridge, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
    """Put forward hooks on a model that run before all others at their hook point, and take them off at the end.

    Args:
        model: the model.
        hooks: pairs of hook point and hook.
    """
    added: list[tuple[HookPoint, LensHandle]] = []
    try:
        points = model.hook_dict  # made anew at each access
        for name, hook in hooks:
            added.append((points[name], points[name].add_hook(hook, prepend=True)))  # type: ignore[arg-type]
        yield
    finally:
        for point, handle in added:
            remove_hook(point, handle)


def remove_hook(point: HookPoint, handle: LensHandle) -> None:
    """Take a forward hook off its hook point, and off the list that the hook point keeps of them.

    Args:
        point: the hook point.
        handle: the handle that `point.add_hook` returned for the hook.
    """
    handle.hook.remove()
    point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]
