"""OEB by masks of all queries and keys, straight from its equations: what the package's own is held against."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def bridged_by_masks(
    pattern: Float[Tensor, "batch head query_pos key_pos"],
    bridge: Bool[Tensor, "batch query_pos key_pos"],
    segment: Bool[Tensor, "batch query_pos key_pos"],
    ceiling: Float[Tensor, "batch head_or_1 query_pos"],
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """Return the edited pattern, q[k] = p[k] tau_g / p(g) where p(B) < tau_B (arXiv 2604.06695, Eq. 5-8)."""
    p_bridge, p_segment = ((pattern * mask.unsqueeze(1)).sum(-1, keepdim=True) for mask in (bridge, segment))
    tau = torch.minimum(ceiling.unsqueeze(-1), (p_bridge + p_segment) / 2)
    fires = (p_bridge < tau) & (p_bridge > 0)
    of_bridge = pattern * tau / torch.where(fires, p_bridge, 1)
    of_segment = pattern * (p_bridge + p_segment - tau) / torch.where(fires, p_segment, 1)
    edited = torch.where(bridge.unsqueeze(1), of_bridge, torch.where(segment.unsqueeze(1), of_segment, pattern))
    return torch.where(fires, edited, pattern)
