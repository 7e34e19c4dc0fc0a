"""Step Momentum Injection: carry the mean value vector of a finished step into the next (arXiv 2604.06695, Eq. 9-10).

At the first token t of a new step, and nowhere else,

    m_prev = mean_{k in previous step} v[k]        (Eq. 9)
    h'[t]  = h[t] + alpha * m_prev                 (Eq. 10)

with v the value vectors and h the attention output of each head before W_O (hook_z). Under grouped-query attention
each query head receives the mean of the key-value head that it shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Injections(NamedTuple):
    """Places of injections, and for each the tokens whose values are averaged: its members, in one flat list.

    Attributes:
        row: batch row of each injection.
        query_pos: position among the queries of the first token of the new step.
        member_row: batch row of each member.
        member_pos: position among the keys of each member.
        member_of: index of the injection that each member belongs to.
        weight: of each member, one over the number of members of its injection.
    """

    row: Int[Tensor, " injection"]
    query_pos: Int[Tensor, " injection"]
    member_row: Int[Tensor, " member"]
    member_pos: Int[Tensor, " member"]
    member_of: Int[Tensor, " member"]
    weight: Float[Tensor, " member"]

    @staticmethod
    def of(
        places: Sequence[tuple[int, int]], members: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> Injections:
        """Return injections at some places.

        Args:
            places: (row, query position) of each injection; at least one.
            members: key positions to average for each injection; at least one.
            device: device of the tensors.

        Example:
            >>> from stepsal.intervention.smi import Injections
            >>> Injections.of(places=[(0, 7)], members=[[3, 4, 5, 6]]).weight.tolist()
            [0.25, 0.25, 0.25, 0.25]
        """
        sizes = [len(positions) for positions in members]
        integers = torch.tensor(
            [
                [row for (row, _), size in zip(places, sizes, strict=True) for _ in range(size)],
                [position for positions in members for position in positions],
                [i for i, size in enumerate(sizes) for _ in range(size)],
                [size for size in sizes for _ in range(size)],
            ]
        ).to(device, non_blocking=True)
        row, query_pos = torch.tensor(places).T.to(device, non_blocking=True)
        member_row, member_pos, member_of, size = integers
        return Injections(row, query_pos, member_row, member_pos, member_of, 1.0 / size)

    def on(self, device: torch.device) -> Injections:
        """Return the injections on the device of a layer.

        Args:
            device: device of the layer's values.
        """
        return Injections(*(x.to(device) for x in self))

    def counted_from(self, first: int) -> Injections:
        """Return the injections with positions of members relative to a key position, for values that begin there.

        Args:
            first: key position of the first value.
        """
        return self._replace(member_pos=self.member_pos - first)


def previous_step_means(
    values: Float[Tensor, "batch key_pos kv_head d_head"], injections: Injections
) -> Float[Tensor, "injection kv_head d_head"]:
    """Average the values of the members of each injection (Eq. 9).

    Args:
        values: the value vectors.
        injections: injections whose members are averaged.

    Returns:
        Means in float32.

    Example:
        >>> import torch
        >>> from stepsal.intervention.smi import Injections, previous_step_means
        >>> values = torch.arange(4.0).view(1, 4, 1, 1)
        >>> previous_step_means(values, Injections.of([(0, 3)], [[1, 2]])).flatten().tolist()
        [1.5]
    """
    v = values[injections.member_row, injections.member_pos].float()  # [member, kv_head, d_head]
    means = v.new_zeros(len(injections.row), *v.shape[1:])
    return means.index_add(0, injections.member_of, v * injections.weight[:, None, None])


def momentum(
    means: Float[Tensor, "injection kv_head d_head"], alpha: Float[Tensor, "head 1"]
) -> Float[Tensor, "injection head d_head"]:
    """Return alpha times the mean, for each query head that of the key-value head it shares (Eq. 10).

    Args:
        means: from `previous_step_means`.
        alpha: strength of the injection for each query head.

    Example:
        >>> import torch
        >>> from stepsal.intervention.smi import momentum
        >>> momentum(torch.tensor([[[2.0], [3.0]]]), torch.tensor([[0.5], [0.5], [1.0], [0.0]])).flatten().tolist()
        [1.0, 1.0, 3.0, 0.0]
    """
    return alpha * means.repeat_interleave(len(alpha) // means.shape[1], dim=1)


def inject(
    z: Float[Tensor, "batch query_pos head d_head"],
    added: Float[Tensor, "injection head d_head"],
    injections: Injections,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """Add momentum to the attention output before W_O (Eq. 10); the input is not modified.

    Args:
        z: the attention output of each head.
        added: from `momentum`.
        injections: places at which it is added.

    Example:
        >>> import torch
        >>> from stepsal.intervention.smi import Injections, inject
        >>> injections = Injections.of([(0, 1)], [[0]])
        >>> inject(torch.zeros(1, 2, 1, 1), torch.full((1, 1, 1), 0.5), injections).flatten().tolist()
        [0.0, 0.5]
    """
    return z.index_put((injections.row, injections.query_pos), added.to(z.dtype), accumulate=True)
