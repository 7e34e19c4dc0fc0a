"""Define the metrics: of each its formula, its range, the causes for which it is undefined, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from stepsal.layers import Band
from stepsal.metrics.view import FlowView, PerLayer, mean_where


@dataclass(frozen=True)
class Cause:
    """A cause for which metrics are undefined.

    Attributes:
        when: in words, for the table of metrics.
        reason: what the column `reason` says, with `{n_thinking}` and `{last}` filled in.
        holds: a function of the map that returns True where the cause holds, for all layers at once or for each.
    """

    when: str
    reason: str
    holds: Callable[[FlowView], bool | Bool[np.ndarray, " layer"]]


NO_THIRD_STEP = Cause(
    "fewer than three thinking steps",
    "thinking has {n_thinking} steps, its shares need a third",
    lambda view: len(view.rows) == 0,
)
EMPTY_ROWS = Cause(
    "no thinking row from the third on holds saliency",
    "no thinking row from the third on holds saliency",
    lambda view: (len(view.rows) > 0) & ~view.filled[:, view.rows].any(-1),
)
NO_SUMMARY = Cause("no summary", "there is no summary", lambda view: len(view.summary) == 0)
EMPTY_SUMMARY = Cause(
    "no summary row holds saliency",
    "no summary row holds saliency",
    lambda view: (len(view.summary) > 0) & ~view.filled[:, view.summary].any(-1),
)
NO_SLOPE = Cause(
    "no summary row has saliency on every one of at least two thinking steps",
    "decay_slope needs a summary row with saliency on every one of at least two thinking steps",
    lambda view: (len(view.summary) > 0) & np.isnan(view.slopes),
)
NO_MIDDLE = Cause(
    "the middle half of the layers was not computed",
    "the middle half of the layers was not computed, to measure the change from",
    lambda view: not view.middle,
)
EMPTY_MIDDLE = Cause(
    "no layer of the middle half has summary rows with saliency",
    "no layer of the middle half has summary rows with saliency",
    lambda view: bool(view.middle) and not view.filled[view.middle][:, view.summary].any(),
)
FEW_THINKING = Cause(
    "no more thinking steps than are looked at",
    "thinking has {n_thinking} steps, summary_last needs more than {last}",
    lambda view: len(view.summary) > 0 and len(view.thinking) <= view.last,
)
NORMALISED = Cause(
    "rows are normalised",
    "rows are normalised: no intensities",
    lambda view: bool(view.saliency.metadata.get("row_normalised")),
)
NO_THINKING = Cause("no thinking", "there is no thinking, so no analysis block", lambda view: len(view.thinking) == 0)
SILENT_SUMMARY = Cause(
    "no summary step predicts a token",
    "no summary step predicts a token",
    lambda view: len(view.summary) > 0 and not view.exists[np.ix_(view.summary, view.summary)].any(),
)
EMPTY_ANALYSIS = Cause(
    "the analysis block holds no saliency",
    "the analysis block holds no saliency",
    lambda view: (
        (len(view.thinking) > 0 and not view.saliency.metadata.get("row_normalised"))
        & (view.mean_of_block(view.thinking) == 0)
    ),
)
CAUSES = (
    NO_THIRD_STEP, EMPTY_ROWS, NO_SUMMARY, EMPTY_SUMMARY, NO_SLOPE, NO_MIDDLE, EMPTY_MIDDLE, FEW_THINKING, NORMALISED,
    NO_THINKING, SILENT_SUMMARY, EMPTY_ANALYSIS,
)  # fmt: skip
"""All causes, in the order in which a reason names them."""

# --------------------------------------------------------------------------------------------------- the metrics


@dataclass(frozen=True)
class LayerMetric:
    """A metric of a layer.

    Attributes:
        name: its column in `flow_metrics`.
        formula: in the symbols of the module docstring.
        range: the values that it takes, with the unit where it has one, and what its sign means.
        causes: the causes for which it is undefined.
        compute: a function of the map that returns the metric of each layer; where a cause holds, that is not used.
    """

    name: str
    formula: str
    range: str
    causes: tuple[Cause, ...]
    compute: Callable[[FlowView], PerLayer]

    @property
    def of(self) -> Literal["layer"]:
        """Unit of the metric: "layer", since each layer has one."""
        return "layer"

    @property
    def undefined(self) -> str:
        """Cases in which the metric is undefined, in words."""
        return "; ".join(cause.when for cause in self.causes)


@dataclass(frozen=True)
class TraceMetric:
    """A metric of a trace: the mean of one of a layer over a band of layers.

    Attributes:
        name: its entry in `trace_metrics`.
        column: the metric of a layer that is averaged.
        band: the layers that it is averaged over.
        sign: 1, or -1 where the failure makes the metric of a layer negative.
        range: the values that it takes, and what its sign means.
    """

    name: str
    column: str
    band: Band
    sign: Literal[1, -1]
    range: str

    @property
    def of(self) -> Literal["trace"]:
        """Unit of the metric: "trace", since each trace has one."""
        return "trace"

    @property
    def formula(self) -> str:
        """Formula of the metric, in words."""
        return f"{'minus the ' if self.sign < 0 else ''}mean of {self.column} over the {self.band} layers"

    @property
    def undefined(self) -> str:
        """Cases in which the metric is undefined, in words."""
        return f"a layer of the {self.band} band was not computed, or its {self.column} is undefined"


def _reach(view: FlowView, unit: Literal[0, 1]) -> PerLayer:
    return view.mean_over_rows((view.share * view.distances[unit]).sum(-1))


def _reach_ratio(view: FlowView) -> PerLayer:
    uniform = np.broadcast_to((view.uniform * view.distances[1]).sum(-1), view.filled.shape)
    return _reach(view, 1) / view.mean_over_rows(uniform)


def _lock_in(view: FlowView) -> PerLayer:
    uniform = np.einsum("lij,pij->li", view.uniform[:, view.rows], view.parts[:2])
    return mean_where(view.part_shares[:2].sum(0) - uniform, view.filled[:, view.rows])


def _change(view: FlowView) -> PerLayer:
    levels = view.mean_over_summary(view.share, view.thinking)
    middle = levels[view.middle]
    return levels - middle[np.isfinite(middle)].mean()


def _part(n: int) -> Callable[[FlowView], PerLayer]:
    return lambda view: mean_where(view.part_shares[n], view.filled[:, view.rows])


_ROWS = (NO_THIRD_STEP, EMPTY_ROWS)
_SUMMARY = (NO_SUMMARY, EMPTY_SUMMARY)
_ANALYSIS = (NO_THINKING, NORMALISED)
_FINAL = (NO_SUMMARY, SILENT_SUMMARY, NORMALISED)
LAYER_METRICS: tuple[LayerMetric, ...] = (
    LayerMetric("own", "<R[i, i]>, i in T[2:]", "0..1", _ROWS, _part(0)),
    LayerMetric("previous", "<R[i, i's predecessor in T]>, i in T[2:]", "0..1", _ROWS, _part(1)),
    LayerMetric("earlier", "<sum of R[i, j], j any other step before i>, i in T[2:]", "0..1", _ROWS, _part(2)),
    LayerMetric(
        "question", "<sum of R[i, j], j in Q>, i in T[2:]", "0..1; own, previous, earlier and question sum to one",
        _ROWS, _part(3),
    ),
    LayerMetric(
        "lock_in", "own + previous, minus the same of U", "-1..1; > 0: more local than uniform attention", _ROWS,
        _lock_in,
    ),
    LayerMetric(
        "reach_steps", "<sum over j of R[i, j] (i - j)>, i in T[2:]", ">= 0 steps", _ROWS, lambda view: _reach(view, 0)
    ),
    LayerMetric(
        "reach_tokens", "<sum over j of R[i, j] d[i, j]>, i in T[2:]; d: mean distance of a block's pairs",
        ">= 0 tokens", _ROWS, lambda view: _reach(view, 1),
    ),
    LayerMetric(
        "reach_ratio", "reach_tokens / the same of U", ">= 0; < 1: shorter than uniform attention reaches", _ROWS,
        _reach_ratio,
    ),
    LayerMetric(
        "summary_thinking", "<sum of R[i, j], j in T>, i in S", "0..1", (*_SUMMARY, NO_THINKING),
        lambda view: view.mean_over_summary(view.share, view.thinking),
    ),
    LayerMetric(
        "summary_question", "<sum of R[i, j], j in Q>, i in S", "0..1", _SUMMARY,
        lambda view: view.mean_over_summary(view.share, view.question),
    ),
    LayerMetric(
        "summary_summary", "<sum of R[i, j], j in S>, i in S", "0..1; with the two above, sums to one", _SUMMARY,
        lambda view: view.mean_over_summary(view.share, view.summary),
    ),
    LayerMetric(
        "summary_last", "<sum of R[i, j], j in the last of T before i>, i in S", "0..1", (*_SUMMARY, FEW_THINKING),
        lambda view: view.summary_last,
    ),
    LayerMetric(
        "thinking_deficit", "summary_thinking of U, minus that of R",
        "-1..1; > 0: the summary uses thinking less than uniform attention", (*_SUMMARY, NO_THINKING),
        lambda view: view.mean_over_summary(view.uniform - view.share, view.thinking),
    ),
    LayerMetric(
        "decay_slope", "<slope over n of log R[i, j] / U[i, j], j the n-th step of T back from i>, i in S",
        "nats per step; < 0: the further back, the less", (NO_SUMMARY, NO_SLOPE), lambda view: view.slopes,
    ),
    LayerMetric(
        "summary_thinking_change", "summary_thinking, minus its mean over those of the middle half of the layers that "
        "have one", "-1..1; < 0 in deep layers: thinking fades with depth",
        (*_SUMMARY, NO_THINKING, NO_MIDDLE, EMPTY_MIDDLE), _change,
    ),
    LayerMetric(
        "analysis_intensity", "mean of I[i, j], i and j in T", ">= 0 nats", _ANALYSIS,
        lambda view: view.mean_of_block(view.thinking),
    ),
    LayerMetric(
        "final_intensity", "mean of I[i, j], i and j in S", ">= 0 nats", _FINAL,
        lambda view: view.mean_of_block(view.summary),
    ),
    LayerMetric(
        "intensity_ratio", "final_intensity / analysis_intensity", ">= 0",
        tuple(dict.fromkeys((*_ANALYSIS, EMPTY_ANALYSIS, *_FINAL))),
        lambda view: view.mean_of_block(view.summary) / view.mean_of_block(view.thinking),
    ),
)  # fmt: skip
"""The metrics of a layer, in the order of the columns of `flow_metrics`."""

TRACE_METRICS: tuple[TraceMetric, ...] = (
    TraceMetric("shallow_lock_in", "lock_in", "shallow", 1, "-1..1; > 0: Shallow Lock-in"),
    TraceMetric("deep_decay", "thinking_deficit", "deep", 1, "-1..1; > 0: Deep Decay"),
    TraceMetric("deep_fade", "summary_thinking_change", "deep", -1, "-1..1; > 0: Deep Decay"),
)
"""The metrics of a trace, in the order of the entries of `trace_metrics`; positive where the failure is seen."""

METRICS: tuple[LayerMetric | TraceMetric, ...] = (*LAYER_METRICS, *TRACE_METRICS)
"""All metrics: those of a layer, then those of a trace."""
PARTS = tuple(metric.name for metric in LAYER_METRICS[:4])
"""The parts of a thinking row, which sum to one."""
SUMMARY_PARTS = ("summary_thinking", "summary_question", "summary_summary")
"""The parts of a summary row, which sum to one."""
COLUMNS = tuple(metric.name for metric in LAYER_METRICS)
"""Names of the metrics of a layer, as columns of `flow_metrics`."""
SCALARS = tuple(metric.name for metric in TRACE_METRICS)
"""Names of the metrics of a trace, as entries of `trace_metrics`."""
