"""Lay out the input of the Odds-Equal Bridge for one pass on the model's device: which keys are in B and in S.

Each key is in one group, its section in its turn, and each query row names two groups as its B and its S, so that both
together take a number for each key and two for each query, never a table of queries by keys. `KeyGroups` holds the
groups of the keys where the model runs, so that only what is new is copied there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from stepsal.intervention.ledger import NOWHERE, Ledger, Portion
from stepsal.intervention.oeb import RowGroups, bridge_share
from stepsal.trace.tracking import Section

_CAPACITY = 256  # key positions for which there is room at first


@dataclass(frozen=True, eq=False)
class Bridging:
    """Input of the Odds-Equal Bridge for one pass.

    Attributes:
        groups: group of each key.
        of_rows: groups that are B and S of each query row; -1, which no key is in, in rows that are not edited.
        shares: share of B of each query row by its number of keys, which tau_B is at most, by sliding window of a layer
            (None: full attention); 0 for rows that do not see keys of both.
        n_groups: number of groups.
        first: first query row that is edited in any row of the batch.
    """

    groups: Int[Tensor, "batch key_pos"]
    of_rows: Int[Tensor, "batch query_pos 2"]
    shares: dict[int | None, Float[Tensor, "batch 1 query_pos"]]
    n_groups: int
    first: int = 0
    _copies: dict[torch.device, Bridging] = field(default_factory=dict, init=False)  # for layers on other devices

    @cached_property
    def members(self) -> Float[Tensor, "batch key_pos group"]:
        """Membership of keys in groups: 1 where a key is in a group, else 0."""
        return torch.nn.functional.one_hot(self.groups.long(), self.n_groups).float()

    def row_groups(self, n_keys: int) -> RowGroups:
        """Return the groups of the last keys, with which of them are B and S of each query row.

        Args:
            n_keys: number of keys that a layer sees; those of a sliding window are fewer than all.
        """
        return RowGroups(self.members[:, self.groups.shape[1] - n_keys :], self.of_rows)

    def on(self, device: torch.device) -> Bridging:
        """Return the input on the device of a layer, to which it is copied once.

        Args:
            device: device of the layer's pattern.
        """
        if device == self.groups.device:
            return self
        if device not in self._copies:
            shares = {window: share.to(device) for window, share in self.shares.items()}
            self._copies[device] = Bridging(
                self.groups.to(device), self.of_rows.to(device), shares, self.n_groups, self.first
            )
        return self._copies[device]


class KeyGroups:
    """The group of each key position, on the device of the model.

    Args:
        batch: number of rows.
        device: device of the model.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self._has_turns, self._n_groups = False, len(Section)
        self._groups = torch.zeros((batch, _CAPACITY), dtype=torch.int32, device=device)

    def update(self, ledger: Ledger, first: int) -> None:
        """Take over the groups of all key positions from `first` on.

        Args:
            ledger: the ledger of the sections and turns.
            first: first key position whose section is new or was revised.
        """
        stop, capacity = ledger.n_columns, self._groups.shape[1]
        if ledger.several_turns and not self._has_turns:  # from now on the first turn has another number
            self._has_turns, first = True, 0
        if stop > capacity:
            self._groups = torch.nn.functional.pad(self._groups, (0, max(stop - capacity, capacity)))
        groups = _groups(ledger.sections, ledger, first)
        self._n_groups = max(self._n_groups, int(groups.max(initial=0)) + 1)
        self._groups[:, first:stop] = self._to_device(groups)

    def lay_out(self, ledger: Ledger, portion: Portion, windows: Iterable[int | None]) -> Bridging | None:
        """Return the input of OEB for a pass, or None where no row of the pass can be edited.

        Args:
            ledger: the ledger, which has read the tokens of the pass.
            portion: the tokens of the pass.
            windows: sliding windows of the layers.
        """
        bridge, segment = portion.groups.bridge, portion.groups.segment
        if (bridge == NOWHERE).all():
            return None
        shares = {}
        for window in windows:
            n_bridge, n_segment = (
                torch.from_numpy(ledger.count_visible(sections, window)) for sections in (bridge, segment)
            )
            share = bridge_share(n_bridge, n_segment).unsqueeze(1)
            shares[window] = share.to(self._groups.device, non_blocking=True)
        of_rows = np.stack([_groups(sections, ledger, portion.first) for sections in (bridge, segment)], axis=-1)
        return Bridging(
            self._groups[:, : portion.stop],
            self._to_device(of_rows.astype(np.int64)),  # they are indices
            shares,
            self._n_groups,
            first=int((bridge != NOWHERE).any(0).argmax()),
        )

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order.

        Args:
            rows: indices of rows.
        """
        self._groups = self._groups[torch.tensor(rows).to(self._groups.device)]

    def _to_device(self, array: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._groups.device, non_blocking=True)


def _groups(sections: NDArray[np.int8], ledger: Ledger, first: int) -> NDArray[np.int32]:
    """Return the groups of sections at the key positions from `first` on; -1 for `NOWHERE`.

    Args:
        sections: sections, [batch, pos], of these positions or of more before them.
        ledger: the ledger, which knows their turns.
        first: first position.
    """
    of_keys = sections[:, sections.shape[1] - (ledger.n_columns - first) :].astype(np.int32)
    if not ledger.several_turns:
        return of_keys
    starts = np.maximum.accumulate(ledger.turn_starts, axis=1)  # padding within a row belongs to the turn before it
    turns = (np.diff(starts, axis=1, prepend=0) > 0).cumsum(axis=1, dtype=np.int32)[:, first:]
    return np.where(of_keys == NOWHERE, NOWHERE, turns * len(Section) + of_keys)
