"""Lay out the input of the Odds-Equal Bridge for one pass on the model's device: the keys in B and in S of each row.

The ledger describes the groups of a query row by section and turn. `KeySections` holds the section of each key position
where the model runs, so that only what is new is copied there, and compares it with the sections of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from stepsal.intervention.ledger import NOWHERE, Ledger, Portion
from stepsal.intervention.oeb import bridge_ceiling

_CAPACITY = 256  # key positions for which there is room at first


@dataclass(frozen=True, eq=False)
class Bridging:
    """Input of the Odds-Equal Bridge for one pass.

    Attributes:
        bridge: True for keys in B of each query row.
        segment: True for keys in S of each query row.
        ceilings: ceiling of tau_B of each query row, by sliding window of a layer (None: full attention).
        eligible: True for query rows that see keys of both, by sliding window of a layer.
    """

    bridge: Bool[Tensor, "batch query_pos key_pos"]
    segment: Bool[Tensor, "batch query_pos key_pos"]
    ceilings: dict[int | None, Float[Tensor, "batch query_pos"]]
    eligible: dict[int | None, Bool[Tensor, "batch query_pos"]]
    _copies: dict[torch.device, Bridging] = field(default_factory=dict, init=False)  # for layers on other devices

    def on(self, device: torch.device) -> Bridging:
        """Return the input on the device of a layer, to which it is copied once.

        Args:
            device: device of the layer's pattern.
        """
        if device == self.bridge.device:
            return self
        if device not in self._copies:
            ceilings, eligible = ({w: x.to(device) for w, x in of.items()} for of in (self.ceilings, self.eligible))
            self._copies[device] = Bridging(self.bridge.to(device), self.segment.to(device), ceilings, eligible)
        return self._copies[device]


class KeySections:
    """The section of each key position, on the device of the model.

    Args:
        batch: number of rows.
        device: device of the model.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self._sections = torch.zeros((batch, _CAPACITY), dtype=torch.int8, device=device)

    def update(self, sections: NDArray[np.int8], first: int) -> None:
        """Take over the sections of all key positions from `first` on.

        Args:
            sections: sections of all key positions, [batch, key_pos].
            first: first key position whose section is new or was revised.
        """
        stop, capacity = sections.shape[1], self._sections.shape[1]
        if stop > capacity:
            self._sections = torch.nn.functional.pad(self._sections, (0, max(stop - capacity, capacity)))
        self._sections[:, first:stop] = self._to_device(sections[:, first:].copy())

    def lay_out(
        self, ledger: Ledger, portion: Portion, windows: Iterable[int | None], tau_max: float
    ) -> Bridging | None:
        """Return the input of OEB for a pass, or None where no row of the pass can be edited.

        Args:
            ledger: the ledger, which has read the tokens of the pass.
            portion: the tokens of the pass.
            windows: sliding windows of the layers.
            tau_max: largest share of attention that the bridge is given.
        """
        groups = portion.groups
        if (groups.bridge == NOWHERE).all():
            return None
        ceilings, eligible = {}, {}
        for window in windows:
            n_bridge, n_segment = (
                torch.from_numpy(ledger.count_visible(sections, window)) for sections in (groups.bridge, groups.segment)
            )
            ceiling = bridge_ceiling(n_bridge, n_segment, tau_max)  # [batch, query_pos]
            device = self._sections.device
            ceilings[window], eligible[window] = (x.to(device, non_blocking=True) for x in (ceiling, ceiling > 0))
        keys = self._sections[:, None, : portion.stop]  # [batch, 1, key_pos]
        bridge, segment = (
            keys == self._to_device(sections)[:, :, None]  # [batch, query_pos, key_pos]
            for sections in (groups.bridge, groups.segment)
        )
        if ledger.several_turns:  # keys of earlier turns are in neither
            this_turn = torch.arange(portion.stop) >= torch.from_numpy(groups.since)[:, :, None]
            this_turn = this_turn.to(self._sections.device)
            bridge, segment = bridge & this_turn, segment & this_turn
        return Bridging(bridge, segment, ceilings, eligible)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order.

        Args:
            rows: indices of rows.
        """
        self._sections = self._sections[torch.tensor(rows).to(self._sections.device)]

    def _to_device(self, array: NDArray[np.int8]) -> Tensor:
        return torch.from_numpy(array).to(self._sections.device, non_blocking=True)
