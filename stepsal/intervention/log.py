"""What StepFlow did, accumulated where the model runs and read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

_HELD = 64  # forward passes whose numbers are held back before they are summed


class FlowLog:
    """Counts and means of the edits of one `stepflow` context, of all its sequences or of one.

    Nothing is moved to the host or rounded until a property is read; reading in the middle of a run is allowed.

    Attributes:
        sequences: sequences that were read from their beginning. Decoding without a cache reads one for each token.
        without_question: those of them in which no question was found, so that nothing was edited.
        oeb_layers, smi_layers: the layers that are edited.
    """

    def __init__(self, oeb_layers: tuple[int, ...], smi_layers: tuple[int, ...]) -> None:
        self.oeb_layers, self.smi_layers = oeb_layers, smi_layers
        self.sequences = 0
        self._lost: set[int] = set()  # sequences in which no question was found
        self._rows: list[int] = []  # the sequence of each row of the current batch
        self._held: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in oeb_layers}
        self._sums: dict[int, Tensor] = {}  # [rows | fired | before | after, sequence, head], float64
        self._norms: dict[int, list[Tensor]] = {layer: [] for layer in smi_layers}
        self._normed: dict[int, list[int]] = {layer: [] for layer in smi_layers}  # sequence of each injection

    def begin(self, batch: int) -> None:
        """The next passes read new sequences."""
        self._sum_all()
        self._rows = list(range(self.sequences, self.sequences + batch))
        self.sequences += batch

    def select(self, rows: Sequence[int]) -> None:
        """The next passes read these rows of the batch only."""
        self._sum_all()
        self._rows = [self._rows[row] for row in rows]

    @property
    def without_question(self) -> int:
        return len(self._lost)

    def lost(self, rows: Sequence[int]) -> None:
        """In these rows of the batch no question was found."""
        self._lost.update(self._rows[row] for row in rows)

    def of(self, sequence: int) -> FlowLog:
        """The log of one sequence, counted from 0 in the order in which they began.

        Raises:
            IndexError: there is no such sequence.
        """
        if not 0 <= sequence < self.sequences:
            raise IndexError(f"sequence {sequence} is not there: the log has {self.sequences}")
        self._sum_all()
        one = FlowLog(self.oeb_layers, self.smi_layers)
        one.sequences = 1
        one._lost = {0} if sequence in self._lost else set()
        one._sums = {
            layer: sums[:, sequence : sequence + 1] for layer, sums in self._sums.items() if sums.shape[1] > sequence
        }
        for layer in self.smi_layers:
            norms = torch.cat(self._norms[layer]) if self._norms[layer] else torch.zeros(0)
            mine = [i for i, of in enumerate(self._normed[layer]) if of == sequence]
            one._norms[layer], one._normed[layer] = [norms[mine]], [0] * len(mine)
        return one

    def add_bridged(self, layer: int, before: Tensor, after: Tensor, eligible: Tensor) -> None:
        """p(B) before and after a pass, [batch, head, query_pos]; `eligible` [batch, query_pos]: rows that count."""
        held = self._held[layer]
        held.append((before.detach(), after.detach(), eligible))
        if len(held) >= _HELD or before.shape[-1] > 1:
            self._sum(layer)

    def add_injected(self, layer: int, norms: Tensor, rows: Sequence[int]) -> None:
        """Norms [injection] of the vectors added in one pass, and in which rows of the batch."""
        self._norms[layer].append(norms.detach())
        self._normed[layer] += [self._rows[row] for row in rows]

    def _sum(self, layer: int) -> None:
        if not self._held[layer]:
            return
        passes = []
        for before, after, eligible in self._held[layer]:
            counts = eligible.unsqueeze(1).expand_as(before)  # [batch, head, query_pos]
            parts = torch.stack((counts, (after > before) & counts, before * counts, after * counts))
            passes.append(parts.double().sum(3))  # [4, batch, head]
        self._held[layer].clear()
        new = torch.stack(passes).sum(0)
        sums = self._sums[layer] if layer in self._sums else new[:, :0]
        sums = torch.nn.functional.pad(sums, (0, 0, 0, self.sequences - sums.shape[1]))
        sums[:, self._rows] += new
        self._sums[layer] = sums

    def _sum_all(self) -> None:
        for layer in self.oeb_layers:
            self._sum(layer)

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
            rows, fired, before, after = self._sums[layer].sum(1).cpu().numpy()
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

    def summary(self) -> dict[str, Any]:
        """All layers in a few numbers, as JSON: what `oeb` and `smi` say by layer."""
        oeb, smi = self.oeb, self.smi
        rows = int(oeb["rows"].sum())

        def mean(column: str) -> float | None:
            return float((oeb[column] * oeb["rows"]).sum() / rows) if rows else None

        return {
            "oeb_layers": list(self.oeb_layers), "smi_layers": list(self.smi_layers), "sequences": self.sequences,
            "without_question": self.without_question, "head_rows": rows, "fired": int(oeb["fired"].sum()),
            "bridge_before": mean("bridge_before"), "bridge_after": mean("bridge_after"),
            "injections": int(smi["injections"].sum()),
        }  # fmt: skip

    def __repr__(self) -> str:
        oeb, smi = self.oeb, self.smi
        rows, fired = int(oeb["rows"].sum()), int(oeb["fired"].sum())
        injections = int(smi["injections"].max()) if len(smi) else 0
        return (
            f"FlowLog({self.sequences} sequences, bridge raised in {fired} of {rows} head rows of "
            f"{len(self.oeb_layers)} layers, {injections} injections in each of {len(self.smi_layers)} layers)"
        )
