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

Every key is in one group, and a row names two of the groups as its B and its S (`RowGroups`), so that nothing here is a
table of queries by keys but the pattern itself.

**The gradient** in closed form, for those who don't hold whole patterns. With g = dL/dq, the means

    mean(g') = sum_{k in g'} q[k] g[k] / q(g')     for g' in {B, S},
    mean     = mean(S) where tau_B is the ceiling,  (mean(B) + mean(S)) / 2 where it is half of p(S) + p(B),
    kappa    = mean p(O) - sum_{k in O} p[k] g[k]   (p(O) with the sink's mass, whose g is 0),

and f(g') = tau_g' / p(g'), the gradient at the scores is

    ds[k] = q[k] (g[k] - mean(g') + kappa / f(g'))   for k in g', g' in {B, S}
    ds[k] = q[k] (g[k] - mean + kappa)               for k in O

so that in each row q g - ds is q times one number for each group (`row_means`). Whether a row is edited, and whether
tau_B is the ceiling, are taken as constants, as autograd takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Below the smallest normal number the quotient tau / p would overflow: such a mass counts as none.
_NO_MASS = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class LayerBridge:
    """OEB in one layer of one text, for those who hold the pattern of a few heads and rows at a time.

    Attributes:
        groups: groups of the keys and rows of the text.
        ceiling: ceiling of tau_B of each head and row; 0 where nothing is edited.
        heads: True for heads that are edited.
        first: first row that is edited.
        masses: p(B) before and after the edit, which whoever edits fills in.
    """

    groups: RowGroups
    ceiling: Float[Tensor, "head query_pos"]
    heads: tuple[bool, ...]
    first: int
    masses: Float[Tensor, "2 head query_pos"]


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


class RowGroups(NamedTuple):
    """The groups of keys, and which two of them are B and S of each query row.

    Attributes:
        members: 1 where a key is in a group, else 0; each key is in one.
        of_rows: groups that are B and S of each query row; -1 in rows that are not edited.
    """

    members: Float[Tensor, "*batch key_pos group"]
    of_rows: Int[Tensor, "*batch query_pos 2"]


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
    groups: RowGroups,
    ceiling: Float[Tensor, "batch head_or_1 query_pos"],
) -> Bridged:
    """Raise the mass of B to tau_B at the expense of S, in every row in which it is smaller (Eq. 5-8).

    Args:
        pattern: attention after the softmax. Rows need not sum to one: a sink keeps the rest, as part of O.
        groups: the groups of the keys, and which of them are B and S of each row. Keys that a row can't see may be in
            them, as they have no mass.
        ceiling: ceiling of tau_B of each row, for all heads or for each: tau_max, or `bridge_share` where that is less;
            0 in rows that are not edited.

    Returns:
        The edited pattern, in the dtype of `pattern` and with the same row sums and the same entries outside B and S,
        and the mass of B before and after.

    Example:
        >>> import torch
        >>> from stepsal.intervention.oeb import RowGroups, odds_equal_bridge
        >>> pattern = torch.tensor([0.25, 0.05, 0.70]).view(1, 1, 1, 3)
        >>> groups = RowGroups(members=torch.eye(3)[None], of_rows=torch.tensor([[[1, 2]]]))  # each key its own group
        >>> odds_equal_bridge(pattern, groups, torch.tensor([[[0.15]]])).pattern.flatten()
        tensor([0.2500, 0.1500, 0.6000])
    """
    p = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    members = groups.members.unsqueeze(-3).to(p)  # [batch, 1, key_pos, group]
    by_group = p @ members  # [batch, head, query_pos, group]
    masses = of_bridge_and_segment(by_group, groups.of_rows)
    scales, after = bridge_scales(masses, ceiling)
    factors = with_bridge_and_segment(torch.ones_like(by_group), groups.of_rows, scales)
    return Bridged((p * (factors @ members.mT)).to(pattern.dtype), masses[0], after)


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


def of_bridge_and_segment(
    by_group: Float[Tensor, "*batch head query_pos group"], of_rows: Int[Tensor, "*batch query_pos 2"]
) -> Float[Tensor, "2 *batch head query_pos"]:
    """Return what a table by group holds for B and for S of each row; in rows that are not edited, for some group.

    Args:
        by_group: a number for each row and group.
        of_rows: groups that are B and S of each row, as in `RowGroups`.

    Example:
        >>> import torch
        >>> from stepsal.intervention.oeb import of_bridge_and_segment
        >>> of_bridge_and_segment(torch.tensor([[[0.5, 0.2, 0.3]]]), torch.tensor([[2, 0]])).flatten()
        tensor([0.3000, 0.5000])
    """
    return by_group.gather(-1, _places(by_group, of_rows)).movedim(-1, 0)


def with_bridge_and_segment(
    by_group: Float[Tensor, "*batch head query_pos group"],
    of_rows: Int[Tensor, "*batch query_pos 2"],
    values: Float[Tensor, "2 *batch head query_pos"],
) -> Float[Tensor, "*batch head query_pos group"]:
    """Return a table by group with other values for B and S of each row; the input is not modified.

    Args:
        by_group: a number for each row and group.
        of_rows: groups that are B and S of each row, as in `RowGroups`.
        values: the values of B and of S; both are those of `by_group` in rows that are not edited.

    Example:
        >>> import torch
        >>> from stepsal.intervention.oeb import with_bridge_and_segment
        >>> values = torch.tensor([3.0, 0.5]).view(2, 1, 1)
        >>> with_bridge_and_segment(torch.ones(1, 1, 3), torch.tensor([[2, 0]]), values).flatten()
        tensor([0.5000, 1.0000, 3.0000])
    """
    return by_group.scatter(-1, _places(by_group, of_rows), values.movedim(0, -1))


def row_means(
    masses: Float[Tensor, "2 *batch head query_pos"],
    scales: Float[Tensor, "2 *batch head query_pos"],
    ceiling: Float[Tensor, "*batch head_or_1 query_pos"],
    products: Float[Tensor, "*batch head query_pos group"],
    of_rows: Int[Tensor, "*batch query_pos 2"],
) -> Float[Tensor, "*batch head query_pos group"]:
    """Return, for each row and group, the number m in dL/dscore[k] = q[k] (dL/dq[k] - m), with q the edited pattern.

    Args:
        masses: p(B) and p(S) before the edit.
        scales: factors of B and S, from `bridge_scales`.
        ceiling: as for `odds_equal_bridge`.
        products: sum of q[k] dL/dq[k] over the keys of each group.
        of_rows: groups that are B and S of each row, as in `RowGroups`.

    Returns:
        One number for each group; in rows that are not edited the same for all, as for any softmax.

    Example:
        >>> import torch
        >>> from stepsal.intervention.oeb import bridge_scales, row_means
        >>> masses, ceiling = torch.tensor([0.05, 0.95]).view(2, 1, 1), torch.tensor([[0.15]])
        >>> scales, _ = bridge_scales(masses, ceiling)
        >>> row_means(masses, scales, ceiling, torch.tensor([[[0.3, 0.0]]]), torch.tensor([[0, 1]])).flatten()
        tensor([2., 0.])
    """
    total, (of_bridge, of_segment) = products.sum(-1), of_bridge_and_segment(products, of_rows)
    is_edited, both = scales[0] > 1, masses.sum(0)
    mean_bridge, mean_segment = (
        of_group / torch.where(is_edited, mass * scale, 1.0)
        for of_group, mass, scale in zip((of_bridge, of_segment), masses, scales, strict=True)
    )
    mean = torch.where(ceiling <= both / 2, mean_segment, (mean_bridge + mean_segment) / 2)
    kappa = mean * (1 - both) - (total - of_bridge - of_segment)
    of_edited = with_bridge_and_segment(
        (mean - kappa).unsqueeze(-1).expand_as(products),
        of_rows,
        torch.stack((mean_bridge, mean_segment)) - kappa / scales,
    )
    return torch.where(is_edited.unsqueeze(-1), of_edited, total.unsqueeze(-1))


def _places(by_group: Tensor, of_rows: Int[Tensor, "*batch query_pos 2"]) -> Int[Tensor, "*batch head query_pos 2"]:
    """Return the groups of B and S of each row, for each head; some group in rows that are not edited."""
    return of_rows.clamp(min=0).unsqueeze(-3).expand(*by_group.shape[:-1], 2)
