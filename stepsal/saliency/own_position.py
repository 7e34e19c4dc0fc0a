"""Cut the gradient between positions, so that one backward pass gives dL_t/dA[t, :] for every target t.

Back-propagating sum_t L_t gives, at row t of a pattern, the effect of that row on *all* later losses: row t changes the
residual stream at t, later layers carry it to positions t' > t through their keys and values at t. The per-target
gradient wants only the path that stays at position t. So in every layer the keys and values of *other* positions are
constants, and each position's own key and value stay attached (Step-Saliency, arXiv 2604.06695, asks for dL_t/dA[t, :];
the single-pass form is this project's):

    hook_rot_k         k.detach()                        no gradient into any key (k.hook_out without rotations) ...
    hook_attn_scores   s + diag(d - d.detach())          ... but the own key's: d_t = softcap(scale * q_t.detach() k_t)
    attn.v.hook_out    v.detach()                        no gradient into any value ...
    attn.o.hook_in     z + A_tt.detach() (v_t - v_t.detach())     ... but the own value's

Every added term is a number minus itself, so values do not change (an exact zero is added). The gradient of the query
flows through s as ever, since a query is used at its own position only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.attention import attention_of
from stepsal.bridge.hooks import Hook, attention_hooks


class OwnPositionHooks(NamedTuple):
    """Pairs of hook point and hook, by their order among the hooks of others at the same point.

    Attributes:
        first: hooks on outputs of the attention; they run before those of others.
        last: hooks on inputs of the attention; they run after those of others.
    """

    first: list[tuple[str, Hook]]
    last: list[tuple[str, Hook]]


def own_position_hooks(model: TransformerBridge, layer: int) -> OwnPositionHooks:
    """Make forward hooks that keep, in one layer, only the gradient that stays at its own position.

    Args:
        model: any model that `stepsal.bridge.check.check_model` accepts.
        layer: layer index.

    Returns:
        Forward hooks, which hold the activations of one forward pass.

    Example:
        >>> from stepsal.saliency.own_position import own_position_hooks
        >>> hooks = own_position_hooks(stepsal.load("mini"), 3)
        >>> [name for name, _ in hooks.first]
        ['blocks.3.attn.hook_attn_scores', 'blocks.3.attn.o.hook_in']
    """
    names = attention_hooks(model, layer)
    attention = attention_of(model, layer)
    own: dict[str, Tensor] = {}

    def keep_query(q: Tensor, hook: HookPoint) -> None:  # q [batch, pos, head, d_head]
        own["q"] = q.detach()

    def cut_keys(k: Tensor, hook: HookPoint) -> Tensor:  # k [batch, pos, kv_head, d_head]
        own["k"] = k
        return k.detach()

    def cut_values(v: Tensor, hook: HookPoint) -> Tensor:  # v [batch, pos, kv_head, d_head]
        own["v"] = v
        return v.detach()

    def attach_own_key(scores: Tensor, hook: HookPoint) -> Tensor:  # scores [batch, head, query_pos, key_pos]
        q, k = own["q"], own["k"]
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # [batch, pos, head, d_head]
        d = attention.scale * (q * k).sum(-1).transpose(1, 2)  # [batch, head, pos]
        if attention.softcap is not None:
            d = attention.softcap * torch.tanh(d / attention.softcap)
        return scores + torch.diag_embed(d - d.detach()).to(scores.dtype)

    def keep_diagonal(pattern: Tensor, hook: HookPoint) -> None:  # pattern [batch, head, query_pos, key_pos]
        own["diagonal"] = pattern.detach().diagonal(dim1=-2, dim2=-1).transpose(1, 2)  # [batch, pos, head]

    def attach_own_value(z: Tensor, hook: HookPoint) -> Tensor:  # z [batch, pos, head, d_head]
        v = own["v"].repeat_interleave(z.shape[2] // own["v"].shape[2], dim=2)
        return z + (own["diagonal"].unsqueeze(-1) * (v - v.detach())).to(z.dtype)  # a pattern may be wider than z

    return OwnPositionHooks(
        first=[(names["scores"], attach_own_key), (names["z"], attach_own_value)],
        last=[
            (names["q"], keep_query),
            (names["k"], cut_keys),
            (names["v"], cut_values),
            (names["pattern"], keep_diagonal),
        ],
    )
