"""Keep the value vectors of the running step, which Step Momentum Injection averages where the next step begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class KeptValues:
    """The value vectors of one layer, from the first key position that a later injection may need.

    The values of each pass are pushed, and forgotten when no later injection can need them. Values of earlier passes
    are kept without their gradient. Each pass has a piece of its own, so that decoding copies no earlier values.

    Example:
        >>> import torch
        >>> from stepsal.intervention.values import KeptValues
        >>> kept = KeptValues()
        >>> kept.push(0, torch.ones(1, 3, 2, 4))
        >>> kept.forget(2)
        >>> kept.push(3, torch.ones(1, 1, 2, 4))
        >>> kept.first, kept.joined().shape
        (2, torch.Size([1, 2, 2, 4]))
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, Tensor]] = []  # (first key position, values), contiguous

    @property
    def first(self) -> int:
        """The key position of the first kept value."""
        return self._pieces[0][0]

    def push(self, first: int, values: Float[Tensor, "batch pos kv_head d_head"]) -> None:
        """Add the values of one pass, which follow the kept ones.

        Args:
            first: key position of the first value.
            values: values as the model uses them; they keep their gradient until `forget`.
        """
        self._pieces.append((first, values))

    def joined(self) -> Float[Tensor, "batch kept_pos kv_head d_head"]:
        """Return all kept values, from key position `first` on."""
        return torch.cat([values for _, values in self._pieces], dim=1)

    def forget(self, needed: int) -> None:
        """End a pass: drop the values that are not needed any more, and the gradient of the others.

        Args:
            needed: the first key position that a later injection may need.
        """
        while self._pieces and self._pieces[0][0] + self._pieces[0][1].shape[1] <= needed:
            self._pieces.pop(0)
        if self._pieces:
            first, values = self._pieces[-1]
            skip, values = max(0, needed - first), values.detach()
            # a view would keep all values of a long prompt
            self._pieces[-1] = (first + skip, values[:, skip:].clone() if skip else values)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order.

        Args:
            rows: indices of rows.
        """
        index = torch.tensor(rows)
        self._pieces = [(first, values[index.to(values.device)]) for first, values in self._pieces]

    def shift(self, n: int) -> None:
        """Count the key positions anew, because columns were added or dropped on the left.

        Args:
            n: number of columns that were added; below 0, of those that were dropped, with the values in them.
        """
        shifted = [(first + n, values) for first, values in self._pieces]
        self._pieces = [
            (max(first, 0), values[:, max(-first, 0) :])
            for first, values in shifted
            if first + values.shape[1] > 0
        ]  # fmt: skip

    def join(self, other: KeptValues, n_rows: int, n_other_rows: int) -> None:
        """Add the values of other rows, which end at the same key position; where a row has none they are 0.

        Args:
            other: values of the other rows.
            n_rows: number of rows so far.
            n_other_rows: number of the other rows.
        """
        parts = [(kept.joined(), kept.first) if kept._pieces else None for kept in (self, other)]
        present = [part for part in parts if part is not None]
        if not present:
            return
        first, values = min(first for _, first in present), present[0][0]
        n_columns = max(part.shape[1] for part, _ in present)
        stacked = values.new_zeros(n_rows + n_other_rows, n_columns, *values.shape[2:])
        for part, rows in zip(parts, (slice(0, n_rows), slice(n_rows, None)), strict=True):
            if part is not None:
                stacked[rows, n_columns - part[0].shape[1] :] = part[0]
        self._pieces = [(first, stacked)]
