"""Step Momentum Injection: carry the mean value vector of a finished step into the next (arXiv 2604.06695, Eq. 9-10).

At the first token t of a new step, and nowhere else,

    m_prev = mean_{k in previous step} v[k]        (Eq. 9)
    h'[t]  = h[t] + alpha * m_prev                 (Eq. 10)

with v the value vectors and h the attention output of each head before W_O (hook_z). Under grouped-query attention
each query head receives the mean of the key-value head that it shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Injections(NamedTuple):
    """Where to inject, and the tokens whose values are averaged: the members of the previous steps, flattened."""

    row: Int[Tensor, " injection"]  # batch row
    query_pos: Int[Tensor, " injection"]  # position of the new step's first token among the queries
    member_row: Int[Tensor, " member"]
    member_pos: Int[Tensor, " member"]  # among the keys
    member_of: Int[Tensor, " member"]  # which injection a member belongs to
    weight: Float[Tensor, " member"]  # one over the number of members of that injection

    @staticmethod
    def of(places: list[tuple[int, int]], members: list[list[int]], device: torch.device | str = "cpu") -> Injections:
        """From (row, query position) pairs and, for each, the key positions to average (at least one)."""
        sizes = [len(m) for m in members]
        integers = torch.tensor(
            [
                [places[i][0] for i, m in enumerate(members) for _ in m],
                [pos for m in members for pos in m],
                [i for i, m in enumerate(members) for _ in m],
                [size for size in sizes for _ in range(size)],
            ]
        ).to(device, non_blocking=True)
        rows, positions = torch.tensor(places).T.to(device, non_blocking=True)
        member_row, member_pos, member_of, size = integers
        return Injections(rows, positions, member_row, member_pos, member_of, 1.0 / size)


def previous_step_means(
    values: Float[Tensor, "batch key_pos kv_head d_head"], injections: Injections
) -> Float[Tensor, "injection kv_head d_head"]:
    """The mean value vector of the members of each injection, in float32 (Eq. 9)."""
    v = values[injections.member_row, injections.member_pos].float()  # [member, kv_head, d_head]
    means = v.new_zeros(len(injections.row), *v.shape[1:])
    return means.index_add(0, injections.member_of, v * injections.weight[:, None, None])


def inject(
    z: Float[Tensor, "batch query_pos head d_head"],
    means: Float[Tensor, "injection kv_head d_head"],
    injections: Injections,
    alpha: float,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """Add alpha times the means to the attention output before W_O (Eq. 10); the input is not modified."""
    added = alpha * means.repeat_interleave(z.shape[2] // means.shape[1], dim=1)  # [injection, head, d_head]
    return z.index_put((injections.row, injections.query_pos), added.to(z.dtype), accumulate=True)
