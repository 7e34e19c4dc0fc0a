"""Odds-Equal Bridge: give the bridge its share of attention, and no more than that (arXiv 2604.06695, Eq. 5-8).

The visible keys of a query row fall into the bridge B (the question while thinking, the thinking while writing the
summary), the current segment S (thinking so far, summary so far) and the rest O (template, BOS, an attention sink).
With p the attention of one head,

    p(g)  = sum_{k in g} p[k]                                         (Eq. 5)
    tau_B = min( sqrt(|B| / (|B| + |S|)), tau_max ),                  (Eq. 6)
    tau_S = p(S) + p(B) - tau_B                                       (Eq. 6, since 1 - p(O) = p(S) + p(B))

and, only where p(B) < tau_B, the logits of B and S are raised by log(tau_g / p(g)) (Eq. 7-8). After the softmax that is

    q[k] = p[k] * tau_g / p(g)   for k in g, g in {B, S};    q[k] = p[k]   for k in O,

the KL projection of p onto {q: q(O) = p(O), q(B) = tau_B}. The paper leaves two cases open. tau_S can come out
negative, so here tau_B is at most (p(S) + p(B)) / 2: the bridge never outweighs the segment. And a row without visible
keys in B or in S, or without any mass on B, is left as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Below the smallest normal number the quotient tau / p would overflow: such a mass counts as none.
_NO_MASS = torch.finfo(torch.float32).tiny


class Bridged(NamedTuple):
    """A pattern after the edit, with the mass of the bridge before and after it (`after > before` where it was raised).

    Attributes:
        pattern: the new pattern.
        before: p(B) before the edit.
        after: p(B) after it.
    """

    pattern: Float[Tensor, "batch head query_pos key_pos"]
    before: Float[Tensor, "batch head query_pos"]
    after: Float[Tensor, "batch head query_pos"]


def bridge_share(n_bridge: Int[Tensor, ...], n_segment: Int[Tensor, ...]) -> Float[Tensor, ...]:
    """Return the share of the bridge by its number of keys, sqrt(|B| / (|B| + |S|)) (Eq. 6).

    Args:
        n_bridge: number of keys of B that each row can see.
        n_segment: number of keys of S that each row can see.

    Returns:
        Shares in [0, 1), float32; 0 (the row is left alone) where B or S has no visible key.

    Example:
        >>> import torch
        >>> from stepsal.intervention.oeb import bridge_share
        >>> bridge_share(torch.tensor([1, 4]), torch.tensor([99, 0]))
        tensor([0.1000, 0.0000])
    """
    share = torch.sqrt(n_bridge.float() / (n_bridge + n_segment).clamp(min=1))
    return torch.where((n_bridge > 0) & (n_segment > 0), share, 0.0)


def odds_equal_bridge(
    pattern: Float[Tensor, "batch head query_pos key_pos"],
    bridge: Bool[Tensor, "batch query_pos key_pos"],
    segment: Bool[Tensor, "batch query_pos key_pos"],
    ceiling: Float[Tensor, "batch head_or_1 query_pos"],
) -> Bridged:
    """Raise the mass of B to tau_B at the expense of S, in every row in which it is smaller (Eq. 5-8).

    Args:
        pattern: attention after the softmax. Rows need not sum to one: a sink keeps the rest, as part of O.
        bridge: True for keys in B of each row. Keys that the row can't see may be marked, as they have no mass.
        segment: True for keys in S of each row, which are not in B; keys that the row can't see may be marked.
        ceiling: ceiling of tau_B of each row, for all heads or for each: tau_max, or `bridge_share` where that is less.

    Returns:
        The edited pattern, in the dtype of `pattern` and with the same row sums and the same entries outside B and S,
        and the mass of B before and after.

    Example:
        >>> import torch
        >>> from stepsal.intervention.oeb import odds_equal_bridge
        >>> pattern = torch.tensor([0.25, 0.05, 0.70]).view(1, 1, 1, 3)
        >>> bridge, segment = torch.tensor([[False, True, False]]), torch.tensor([[False, False, True]])
        >>> odds_equal_bridge(pattern, bridge[None], segment[None], torch.tensor([[[0.15]]])).pattern.flatten()
        tensor([0.2500, 0.1500, 0.6000])
    """
    p = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    bridge, segment = bridge.unsqueeze(1), segment.unsqueeze(1)  # [batch, 1, query_pos, key_pos]
    masses = torch.stack([(p * group).sum(-1) for group in (bridge, segment)])
    (scale_bridge, scale_segment), after = bridge_scales(masses, ceiling)
    scale = torch.where(bridge, scale_bridge[..., None], torch.where(segment, scale_segment[..., None], 1.0))
    return Bridged((p * scale).to(pattern.dtype), masses[0], after)


def bridge_scales(
    masses: Float[Tensor, "2 batch head query_pos"], ceiling: Float[Tensor, "batch head_or_1 query_pos"]
) -> tuple[Float[Tensor, "2 batch head query_pos"], Float[Tensor, "batch head query_pos"]]:
    """Return by what the entries of B and of S are multiplied, and p(B) after it (Eq. 6-8).

    Args:
        masses: p(B) and p(S), in float32 or float64.
        ceiling: as for `odds_equal_bridge`.

    Returns:
        The factors tau_g / p(g) of B and of S, exactly 1 in rows that stay as they are; and p(B) after the edit.

    Example:
        >>> import torch
        >>> from stepsal.intervention.oeb import bridge_scales
        >>> scales, after = bridge_scales(torch.tensor([0.05, 0.70]).view(2, 1, 1, 1), torch.tensor([[[0.15]]]))
        >>> scales.flatten()
        tensor([3.0000, 0.8571])
    """
    p_bridge, both = masses[0], masses.sum(0)
    tau = torch.minimum(ceiling, both / 2)
    # p(B) < tau implies p(S) > p(B), so that neither quotient below can divide by nothing
    fires = (p_bridge < tau) & (p_bridge >= _NO_MASS)
    # lambda_g = log(tau_g) - log(p(g)) (Eq. 8): exactly 0 in rows that stay; and where p(g) is tiny its gradient is
    # still finite, unlike that of the quotient, which goes through 1 / p(g)^2
    log_targets, log_masses = (torch.where(fires, x, 1.0).log() for x in (torch.stack((tau, both - tau)), masses))
    return (log_targets - log_masses).exp(), torch.where(fires, tau, p_bridge)
