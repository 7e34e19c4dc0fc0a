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
