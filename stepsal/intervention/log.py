"""What StepFlow did, accumulated where the model runs and read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

_HELD = 64  # forward passes whose numbers are held back before they are summed


class FlowLog:
    """Counts and means of the edits of one `stepflow` context.

    Nothing is moved to the host, summed or rounded until a property is read; reading in the middle of a run is allowed.

    Attributes:
        sequences: sequences that were read from their beginning. Decoding without a cache reads one for each token.
        without_question: those of them in which no question was found, so that nothing was edited.
        oeb_layers, smi_layers: the layers that are edited.
    """

    def __init__(self, oeb_layers: tuple[int, ...], smi_layers: tuple[int, ...]) -> None:
        self.oeb_layers, self.smi_layers = oeb_layers, smi_layers
        self.sequences = 0
        self.without_question = 0
        self._held: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in oeb_layers}
        self._sums: dict[int, Tensor] = {}  # [rows | fired | before | after, head], float64
        self._norms: dict[int, list[Tensor]] = {layer: [] for layer in smi_layers}

    def add_bridged(self, layer: int, before: Tensor, after: Tensor, eligible: Tensor) -> None:
        """p(B) before and after a pass, [batch, head, query_pos]; `eligible` [batch, query_pos]: rows that count."""
        held = self._held[layer]
        held.append((before.detach(), after.detach(), eligible))
        if len(held) >= _HELD or before.shape[-1] > 1:
            self._sum(layer)

    def add_injected(self, layer: int, norms: Tensor) -> None:
        """Norms [injection] of the vectors added in one pass."""
        self._norms[layer].append(norms.detach())

    def _sum(self, layer: int) -> None:
        for before, after, eligible in self._held[layer]:
            counts = eligible.unsqueeze(1).expand_as(before)  # [batch, head, query_pos]
            parts = torch.stack((counts, (after > before) & counts, before * counts, after * counts))
            total = parts.double().sum((1, 3))  # [4, head]
            self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
        self._held[layer].clear()

    @property
    def oeb(self) -> pd.DataFrame:
        """One row per layer and head.

        Columns: layer, head; rows (query rows with visible keys in B and S); fired (of those, the rows whose
        bridge was raised), fired_share; bridge_before, bridge_after (mean p(B) over rows). NaN without rows.
        """
        import numpy as np
        import pandas as pd

        frames = []
        for layer in self.oeb_layers:
            self._sum(layer)
            if layer not in self._sums:
                continue
            rows, fired, before, after = self._sums[layer].cpu().numpy()
            per_row = np.divide(1.0, rows, out=np.full_like(rows, np.nan), where=rows > 0)
            frames.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "head": range(len(rows)),
                        "rows": rows.astype(int),
                        "fired": fired.astype(int),
                        "fired_share": fired * per_row,
                        "bridge_before": before * per_row,
                        "bridge_after": after * per_row,
                    }
                )
            )
        columns = ["layer", "head", "rows", "fired", "fired_share", "bridge_before", "bridge_after"]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)

    @property
    def smi(self) -> pd.DataFrame:
        """One row per layer: injections, mean_norm (Euclidean, over all heads of one injected vector)."""
        import pandas as pd

        rows = []
        for layer in self.smi_layers:
            norms = torch.cat(self._norms[layer]).cpu() if self._norms[layer] else torch.zeros(0)
            mean = float(norms.mean()) if len(norms) else float("nan")
            rows.append({"layer": layer, "injections": len(norms), "mean_norm": mean})
        return pd.DataFrame(rows, columns=["layer", "injections", "mean_norm"])

    def __repr__(self) -> str:
        oeb, smi = self.oeb, self.smi
        rows, fired = int(oeb["rows"].sum()), int(oeb["fired"].sum())
        injections = int(smi["injections"].max()) if len(smi) else 0
        return (
            f"FlowLog({self.sequences} sequences, bridge raised in {fired} of {rows} head rows of "
            f"{len(self.oeb_layers)} layers, {injections} injections in each of {len(self.smi_layers)} layers)"
        )
