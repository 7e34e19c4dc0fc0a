"""Hold what StepFlow knows of the sequences that are read: one row for each, which may come, go and change places."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from stepsal.intervention.bridging import KeyGroups
from stepsal.intervention.ledger import Ledger
from stepsal.intervention.values import KeptValues


class Reading:
    """The sequences that are read in one batch: their sections, the values that momentum needs, and their cache.

    Args:
        ledger: the account of their sections.
        smi_layers: indices of the layers whose values are kept.
        device: device of the model.

    Attributes:
        ledger: the same.
        key_groups: the group of each key position, on the device.
        kept: kept values, by layer.
    """

    def __init__(self, ledger: Ledger, smi_layers: Sequence[int], device: torch.device) -> None:
        self.ledger, self._device = ledger, device
        self.key_groups = KeyGroups(ledger.n_rows, device)
        self.kept = {layer: KeptValues() for layer in smi_layers}
        self._cache: Callable[[], object] = _no_cache

    def follow(self, cache: object) -> None:
        """Note the cache that holds the keys of these sequences.

        Args:
            cache: the cache; None for none.
        """
        self._cache = _no_cache if cache is None else weakref.ref(cache)

    def check(self, cache: object, n_past: int, batch: int) -> None:
        """Refuse a pass that does not continue the last one.

        Args:
            cache: the cache that the pass continues.
            n_past: number of columns in it.
            batch: number of rows of the pass.

        Raises:
            ValueError: the cache is not the one that was followed.
        """
        n_followed, n_rows = self.ledger.n_columns, self.ledger.n_rows
        if n_past != n_followed or batch != n_rows:
            raise ValueError(
                f"this pass continues a cache of {n_past} tokens in {batch} rows, but StepFlow has followed "
                f"{n_followed} tokens in {n_rows} rows: read prompts inside the context"
            )
        if cache is not self._cache():
            raise ValueError(
                "this pass continues another cache than that of the last pass, and StepFlow follows one at a time: "
                "read prompt and answer in turn, and don't copy caches"
            )

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order.

        Args:
            rows: indices of rows.
        """
        self.ledger.select(rows)
        self.key_groups.select(rows)
        for kept in self.kept.values():
            kept.select(rows)

    def drop_first(self, n: int) -> None:
        """Drop the first columns, which are padding in all rows.

        Args:
            n: number of columns.
        """
        self._shift(-n)
        self._copy_groups()

    def join(self, other: Reading) -> None:
        """Put the rows of another reading below these, with the last column of both in one.

        Args:
            other: a reading of other sequences, which is used up.
        """
        n_rows, n_other_rows = self.ledger.n_rows, other.ledger.n_rows
        n_columns = max(self.ledger.n_columns, other.ledger.n_columns)
        for reading in (self, other):
            reading._shift(n_columns - reading.ledger.n_columns)
        self.ledger.join(other.ledger)
        for layer, kept in self.kept.items():
            kept.join(other.kept[layer], n_rows, n_other_rows)
        self._copy_groups()

    def _shift(self, n: int) -> None:
        self.ledger.shift(n)
        for kept in self.kept.values():
            kept.shift(n)

    def _copy_groups(self) -> None:
        self.key_groups = KeyGroups(self.ledger.n_rows, self._device)
        self.key_groups.update(self.ledger, 0)


def _no_cache() -> None:
    """Stand for the weak reference to a cache where there is none."""
    return None
