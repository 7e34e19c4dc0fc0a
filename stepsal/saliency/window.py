"""Collect the token map of some positions from blocks of rows, so that the rest of it never has to exist."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepsal.saliency.blocks import Block


class TokenWindow:
    """The token map of some positions, as queries and as keys, added up from blocks of rows.

    Args:
        positions: the positions, ascending.
        like: a tensor with the device and dtype of the blocks.

    Example:
        >>> import torch
        >>> from stepsal.saliency.blocks import Block
        >>> from stepsal.saliency.window import TokenWindow
        >>> window = TokenWindow(torch.tensor([0, 2]), torch.zeros(1))
        >>> window.add(torch.tensor([[4.0, 5.0, 6.0]]), Block(first=2, stop=3, first_key=0))
        >>> window.values
        tensor([[0., 0.],
                [4., 6.]])
    """

    def __init__(self, positions: Int[Tensor, " kept_pos"], like: Tensor) -> None:
        self._on_host = positions.cpu()
        self._positions = positions.to(like.device)
        self.values: Float[Tensor, "kept_pos kept_pos"] = like.new_zeros(len(positions), len(positions))

    def add(self, rows: Float[Tensor, "row key"], block: Block) -> None:
        """Add the rows and keys of a block that are in the window.

        Args:
            rows: rows of the token map.
            block: which rows and keys these are.
        """
        ends = torch.tensor([block.first, block.stop, block.first_key])
        first, stop, first_key = torch.searchsorted(self._on_host, ends).tolist()
        if first == stop:
            return
        queries, keys = self._positions[first:stop] - block.first, self._positions[first_key:stop] - block.first_key
        self.values[first:stop, first_key:stop] += rows[queries][:, keys]
