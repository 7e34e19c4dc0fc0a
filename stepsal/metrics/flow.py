"""Compute the metrics of a map, layer by layer and as numbers of a trace, and describe them in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stepsal.layers import layer_indices
from stepsal.maps.step_saliency import StepSaliency
from stepsal.metrics.table import CAUSES, LAYER_METRICS, METRICS, TRACE_METRICS
from stepsal.metrics.view import FlowView
from stepsal.storage import digest

if TYPE_CHECKING:
    import pandas as pd


def describe() -> pd.DataFrame:
    """Return the table of all metrics: name, of (layer or trace), formula, range, undefined.

    Example:
        >>> table = stepsal.metrics.describe().set_index("name")
        >>> print(table.loc["lock_in", "formula"])
        own + previous, minus the same of U
    """
    import pandas as pd

    columns = ("name", "of", "formula", "range", "undefined")
    return pd.DataFrame([{column: getattr(metric, column) for column in columns} for metric in METRICS])


def flow_metrics(saliency: StepSaliency, *, last: int = 3) -> pd.DataFrame:
    """Return the metrics of every layer of a map, which `describe` defines.

    Args:
        saliency: step maps of one trace.
        last: number of thinking steps, counted from the last one back, that `summary_last` looks at.

    Returns:
        One row per layer, a table that `stepsal.stats.compare_groups` takes, with the columns

            trace                              what tells the trace from others: its number in the population, where it
                                               comes from one, else a digest of map and tokens
            layer
            own, previous, earlier, question   parts of a thinking row, which sum to one
            lock_in                            own + previous, minus the same of uniform attention
            thinking_deficit                   thinking's part of a summary row under uniform attention, minus that
                                               of the map
            ...                                the other metrics of `COLUMNS`
            n_thinking_rows, n_summary_rows    rows that hold saliency and went into the means
            n_steps, n_tokens                  length of the trace, by which `stepsal.stats.compare_groups` matches
            reason                             why metrics are NaN; empty where none is

    Raises:
        ValueError: `last` below 1.

    Example:
        >>> model = stepsal.load("mini")
        >>> thinking = " Bob is Ann plus 1. So Ann is the only one known. Ann is 1, so Bob is 2."
        >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", f"{thinking}</think>It is Bob.", model)
        >>> table = stepsal.metrics.flow_metrics(stepsal.step_saliency(model, trace, layers=[0, 7]))
        >>> table[["layer", "lock_in"]].round(2).values.tolist()
        [[0.0, 0.42], [7.0, 0.26]]
    """
    import pandas as pd

    if last < 1:
        raise ValueError(f"last={last} must be at least 1 step")
    view, n_layers = FlowView(saliency, last), len(saliency.layers)
    holds = {cause: np.broadcast_to(cause.holds(view), n_layers) for cause in CAUSES}
    columns = {}
    for metric in LAYER_METRICS:
        undefined = np.any([holds[cause] for cause in metric.causes], axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns[metric.name] = (
                np.full(n_layers, np.nan) if undefined.all() else np.where(undefined, np.nan, metric.compute(view))
            )
    words = {"n_thinking": len(view.thinking), "last": last}
    reasons = [
        "; ".join(cause.reason.format(**words) for cause in CAUSES if holds[cause][layer]) for layer in range(n_layers)
    ]
    return pd.DataFrame(
        {
            "trace": _identity(saliency),
            "layer": saliency.layers,
            **columns,
            "n_thinking_rows": view.filled[:, view.rows].sum(-1),
            "n_summary_rows": view.filled[:, view.summary].sum(-1),
            "n_steps": saliency.n_steps,
            "n_tokens": len(saliency.step_ids) or sum(saliency.step_lengths),
            "reason": reasons,
        }
    )


def _identity(saliency: StepSaliency) -> int | str:
    """Return what tells a map from those of other traces."""
    if (number := saliency.metadata.get("trace")) is not None:
        return int(number)
    texts = repr((saliency.model_name, saliency.roles, saliency.step_texts, saliency.token_texts)).encode()
    return digest(texts + saliency.values.float().cpu().contiguous().numpy().tobytes())


def trace_metrics(saliency: StepSaliency) -> pd.Series:
    """Return Lock-in and Decay of a trace, one number each, which `describe` defines.

    Args:
        saliency: step maps of one trace.

    Returns:
        The entries of `SCALARS`, each positive where the failure is seen: `shallow_lock_in` (mean `lock_in` of the
        shallow layers), `deep_decay` (mean `thinking_deficit` of the deep layers) and `deep_fade` (how far
        `summary_thinking` falls from the middle layers to the deep ones). Last, `reason`: why any is NaN, as for
        `flow_metrics`, or because layers of a band were not computed.

    Example:
        >>> model = stepsal.load("mini")
        >>> thinking = " Bob is Ann plus 1. So Ann is the only one known. Ann is 1, so Bob is 2."
        >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", f"{thinking}</think>It is Bob.", model)
        >>> numbers = stepsal.metrics.trace_metrics(stepsal.step_saliency(model, trace))
        >>> round(numbers["shallow_lock_in"], 2)
        0.45
    """
    import pandas as pd

    table = flow_metrics(saliency).set_index("layer")
    bands = tuple(dict.fromkeys(metric.band for metric in TRACE_METRICS))
    computed = {band: list(saliency.computed(band)) for band in bands}
    whole = {band: tuple(computed[band]) == layer_indices(band, saliency.n_layers) for band in bands}
    numbers = {
        metric.name: metric.sign * float(table.loc[computed[metric.band], metric.column].mean(skipna=False))
        if whole[metric.band]
        else np.nan
        for metric in TRACE_METRICS
    }
    reasons = [f"not all layers of the {band} band were computed" for band in bands if not whole[band]]
    if any(np.isnan(list(numbers.values()))):
        of_layers = table.loc[[layer for band in bands for layer in computed[band]], "reason"]
        reasons += [reason for reason in dict.fromkeys(of_layers) if reason]
    return pd.Series({**numbers, "reason": "; ".join(reasons)})
