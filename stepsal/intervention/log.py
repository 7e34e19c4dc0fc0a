"""Log the edits of StepFlow: numbers are accumulated on the device of the model and read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

_HELD = 64  # forward passes whose numbers are held back before they are summed
_OEB_COLUMNS = ["layer", "head", "rows", "fired", "fired_share", "bridge_before", "bridge_after"]
_SMI_COLUMNS = ["layer", "injections", "mean_norm"]


class FlowLog:
    """Counts and means of the edits of one `stepflow` context, of all its sequences or of one.

    Nothing is moved to the host or rounded until a property is read; reading in the middle of a run is allowed.

    Args:
        oeb_layers: indices of the layers that OEB edits.
        smi_layers: indices of the layers that SMI edits.
        oeb_heads: indices of the heads that OEB edits, by layer; all heads of layers that are not among them.

    Attributes:
        sequences: number of sequences that were read from their beginning. Decoding without a cache begins a sequence
            with each token.
        without_question: number of sequences in which no question was found, so that nothing was edited.

    Example:
        >>> model = stepsal.load("mini")
        >>> with stepsal.stepflow(model) as log:
        ...     trace = stepsal.generate(model, "Anna is 2 plus 3. What is Anna?", max_new_tokens=40)
        >>> log.summary()["injections"], list(log.smi.columns)
        (2, ['layer', 'injections', 'mean_norm'])
    """

    def __init__(
        self,
        oeb_layers: tuple[int, ...],
        smi_layers: tuple[int, ...],
        oeb_heads: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.oeb_layers, self.smi_layers, self._oeb_heads = oeb_layers, smi_layers, dict(oeb_heads or {})
        self.sequences = 0
        self._lost: set[int] = set()  # sequences in which no question was found
        self._rows: list[int] = []  # the sequence of each row of the current batch
        self._held: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in oeb_layers}
        self._sums: dict[int, Tensor] = {}  # [rows | fired | before | after, sequence, head], float64
        self._norms: dict[int, list[Tensor]] = {layer: [] for layer in smi_layers}
        self._norm_sequences: dict[int, list[int]] = {layer: [] for layer in smi_layers}  # of each injection

    # ------------------------------------------------------------------------------------- written by StepFlow

    def begin(self, batch: int) -> None:
        """Give numbers to new sequences, which the next passes read.

        Args:
            batch: number of sequences.
        """
        self._sum_all()
        self._rows = list(range(self.sequences, self.sequences + batch))
        self.sequences += batch

    def select(self, rows: Sequence[int]) -> None:
        """Keep only some rows of the batch for the next passes.

        Args:
            rows: indices of rows, in the order that they have in the next passes.
        """
        self._sum_all()
        self._rows = [self._rows[row] for row in rows]

    def set_aside(self) -> list[int]:
        """Return the sequences of the rows of the batch, which the next passes don't read."""
        self._sum_all()
        rows, self._rows = self._rows, []
        return rows

    def join(self, aside: Sequence[int]) -> None:
        """Put rows that were set aside above those of the batch.

        Args:
            aside: what `set_aside` returned.
        """
        self._sum_all()
        self._rows = [*aside, *self._rows]

    def lost(self, rows: Sequence[int]) -> None:
        """Note that no question was found in some rows of the batch.

        Args:
            rows: indices of rows.
        """
        self._lost.update(self._rows[row] for row in rows)

    def add_bridged(
        self,
        layer: int,
        before: Float[Tensor, "batch head query_pos"],
        after: Float[Tensor, "batch head query_pos"],
        eligible: Bool[Tensor, "batch head query_pos"],
    ) -> None:
        """Add the edits of OEB in one pass.

        Args:
            layer: index of the layer.
            before: p(B) before the edit.
            after: p(B) after it.
            eligible: True for rows that count, which are those of edited heads that see keys of B and of S.
        """
        held = self._held[layer]
        held.append((before.detach(), after.detach(), eligible))
        if len(held) >= _HELD or before.shape[-1] > 1:
            self._sum(layer)

    def add_injected(self, layer: int, norms: Float[Tensor, " injection"], rows: Sequence[int]) -> None:
        """Add the edits of SMI in one pass.

        Args:
            layer: index of the layer.
            norms: Euclidean norms of the vectors that were added.
            rows: batch row of each vector.
        """
        self._norms[layer].append(norms.detach())
        self._norm_sequences[layer] += [self._rows[row] for row in rows]

    def _sum(self, layer: int) -> None:
        if not self._held[layer]:
            return
        passes = []
        for before, after, eligible in self._held[layer]:
            raised = (after > before) & eligible
            parts = torch.stack((eligible, raised, before * eligible, after * eligible))
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

    # ------------------------------------------------------------------------------------------ read afterwards

    @property
    def without_question(self) -> int:
        """The number of sequences in which no question was found, so that nothing was edited."""
        return len(self._lost)

    def of(self, sequence: int) -> FlowLog:
        """Return the log of one sequence.

        Args:
            sequence: number of the sequence, from 0 in the order in which they began.

        Raises:
            IndexError: there is no such sequence.
        """
        if not 0 <= sequence < self.sequences:
            raise IndexError(
                f"sequence {sequence} is not there: the log has {self.sequences}, which are counted from 0"
            )
        self._sum_all()
        one = FlowLog(self.oeb_layers, self.smi_layers, self._oeb_heads)
        one.sequences = 1
        one._lost = {0} if sequence in self._lost else set()
        one._sums = {
            layer: sums[:, sequence : sequence + 1] for layer, sums in self._sums.items() if sums.shape[1] > sequence
        }
        for layer in self.smi_layers:
            norms = _joined(self._norms[layer])
            own = [i for i, number in enumerate(self._norm_sequences[layer]) if number == sequence]
            one._norms[layer], one._norm_sequences[layer] = [norms[own]], [0] * len(own)
        return one

    @property
    def oeb(self) -> pd.DataFrame:
        """A table of the edits of OEB, one row per layer and edited head.

        Columns: layer, head; rows (number of query rows that see keys in B and S); fired (number of these rows whose
        bridge was raised), fired_share (fired / rows); bridge_before, bridge_after (mean p(B) over rows). Shares and
        means are NaN without rows.
        """
        import numpy as np
        import pandas as pd

        tables = []
        for layer in self.oeb_layers:
            self._sum(layer)
            if layer not in self._sums:
                continue
            heads = self._oeb_heads.get(layer, range(self._sums[layer].shape[-1]))
            rows, fired, before, after = self._sums[layer].sum(1).cpu().numpy()[:, heads]
            per_row = np.divide(1.0, rows, out=np.full_like(rows, np.nan), where=rows > 0)
            columns = [
                layer, heads, rows.astype(int), fired.astype(int),
                fired * per_row, before * per_row, after * per_row,
            ]  # fmt: skip
            tables.append(pd.DataFrame(dict(zip(_OEB_COLUMNS, columns, strict=True))))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=_OEB_COLUMNS)

    @property
    def smi(self) -> pd.DataFrame:
        """A table of the edits of SMI, one row per layer.

        Columns: layer; injections (their number); mean_norm (mean Euclidean norm of an injected vector, over all heads
        together).
        """
        import pandas as pd

        rows = []
        for layer in self.smi_layers:
            norms = _joined(self._norms[layer]).cpu()
            rows.append((layer, len(norms), float(norms.mean()) if len(norms) else float("nan")))
        return pd.DataFrame(rows, columns=_SMI_COLUMNS)

    def summary(self) -> dict[str, Any]:
        """Return the edits over all layers in a few numbers, JSON-ready; `oeb` and `smi` give them by layer."""
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


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0)
