"""Contrasts between groups of traces, layer by layer: how large, how sure, and what is left at similar length.

The trace is the unit: a permutation moves the labels of whole traces, a bootstrap draws whole traces, and all layers
of a trace go with it. Every contrast is made twice, over all traces and *length-matched*: traces are put into strata of
similar length (coarsened exact matching: same bin of each length variable), strata that lack one of the groups are
dropped, and only traces of a stratum are compared with each other; how much they still differ in length is said. With
weights w_s = n_s m_s / (n_s + m_s) of a stratum with n_s correct and m_s wrong traces, which give the difference of
means its smallest variance,

    difference = sum_s w_s (mean_s(wrong) - mean_s(correct)) / sum_s w_s,

and labels are permuted within strata. Without matching there is one stratum. scipy's `permutation_test` and
`bootstrap` know no strata and no clusters of layers, so these two are done here, both with the same weights; the rest
is scipy's and scikit-learn's.

Traces count as independent. Where problems were answered several times, average over the traces of a problem and
outcome first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats as scipy_stats

from stepsal.stats.checks import check_resampling, plain_columns, refuse_repeats, require_columns
from stepsal.stats.prediction import auroc
from stepsal.stats.resampling import FEWEST, contrast_weights, drawn_weights

LENGTHS = ("n_steps", "n_tokens")
CLUSTER_Z = 1.96  # neighbouring layers join a cluster from this many null standard deviations on
ROUNDING = 1e-12  # differences below this share of the largest value are rounding errors


def compare_groups(
    correct: pd.DataFrame,
    wrong: pd.DataFrame,
    metric: str,
    *,
    match: Sequence[str] = LENGTHS,
    bins: int | None = 10,
    n_resamples: int = 4999,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Contrast a metric between two groups of traces, wrong minus correct, in each layer.

    Args:
        correct: tidy rows of the first group with columns "trace", `metric`, those of `match`, and "layer"; without a
            column "layer", `metric` is one number per trace.
        wrong: tidy rows of the second group, with the same columns.
        metric: column to compare.
        match: length variables to match on; constant within a trace.
        bins: number of quantile bins into which each length variable is divided before matching; None matches exactly.
            Fewer bins keep more traces, but also more of the difference in length.
        n_resamples: number of permutations, and of bootstrap draws.
        level: coverage of the interval, in (0, 1).
        seed: of the bootstrap and of the permutations.

    Returns:
        One row per matching ("none", "length") and layer:

            n_correct, n_wrong      traces with a finite metric in every compared layer. A layer is compared only if at
                                    least half of the traces with any value have one there; the rows of other layers
                                    are NaN.
            n_left_out              traces without a value, or without a partner in their stratum
            mean_correct, mean_wrong   of the compared traces; if matched, with the weights of their strata
            difference, low, high   wrong minus correct, with its percentile bootstrap interval, which is somewhat
                                    narrow for small groups, and NaN below 5 traces
            hedges_g                difference over the pooled standard deviation within groups and strata, corrected
                                    for small samples
            cliffs_delta            P(wrong > correct) - P(wrong < correct) over pairs of a stratum, -1..1
            p, q                    two-sided permutation p-value; Benjamini-Hochberg over layers
            cluster, cluster_p      contiguous layers whose difference exceeds 1.96 null standard deviations in one
                                    direction (0: in none), and how often a permutation has a cluster of at least
                                    its mass (sum of |z|)
            <variable>_difference   wrong minus correct in each variable of `match`: what matching has left

        Rows are NaN where no stratum has traces of both groups.

    Raises:
        ValueError: a missing column or one that holds no numbers, no finite value in one of the groups, a trace in both
            groups, or options out of range.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"trace": range(40), "n_steps": [4, 4, 4, 5] * 5 + [4, 5, 5, 5] * 5})
        >>> data["decay"] = data["n_steps"] / 10  # what differs is the length alone
        >>> table = stepsal.stats.compare_groups(data[:20], data[20:], "decay", match=["n_steps"])
        >>> table[["matching", "n_correct", "n_wrong", "difference"]].round(2).values.tolist()
        [['none', 20, 20, 0.05], ['length', 20, 20, 0.0]]
    """
    check_resampling(n_resamples, level)
    traces = _complete_traces(correct, wrong, metric, match)
    strata = {"none": np.zeros(len(traces.is_wrong), dtype=int)}
    if match:
        strata["length"] = strata_of(traces.lengths, bins)
    tables = [
        _matched(traces, stratum, n_resamples, level, seed).assign(matching=name) for name, stratum in strata.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "metric", metric)
    table.insert(1, "matching", table.pop("matching"))
    return table if "layer" in correct else table.drop(columns=["layer", "q", "cluster", "cluster_p"])


def mean_profile(
    data: pd.DataFrame, metric: str, *, by: str = "correct", n_resamples: int = 1999, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Average a metric over the traces of each group, layer by layer, with bootstrap intervals.

    The table is for looking at. To tell whether groups differ, use `compare_groups`: overlapping intervals are no test.

    Args:
        data: tidy rows with columns "trace", "layer", `metric` and `by`, one per trace and layer.
        metric: column to average; traces that have no value in a layer are left out there.
        by: column that tells the groups apart.
        n_resamples: number of bootstrap draws of traces, layer by layer.
        level: coverage of the interval, in (0, 1).
        seed: of the bootstrap.

    Returns:
        One row per group and layer: `by`, layer, n (traces), mean, low, high. NaN intervals below 5 traces.

    Raises:
        ValueError: a missing column or one that holds no numbers, several rows for one trace and layer, or options out
            of range.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"trace": [0, 1], "layer": 0, "decay": [0.2, 0.4], "correct": True})
        >>> stepsal.stats.mean_profile(data, "decay")[["layer", "n", "mean"]].round(2).values.tolist()
        [[0.0, 2.0, 0.3]]
    """
    check_resampling(n_resamples, level)
    require_columns("data", data, ["trace", "layer", metric, by])
    refuse_repeats("data", data, ["trace", "layer"])
    data = plain_columns("data", data, [metric], ["layer", by])
    rows = []
    for (group, layer), column in data.groupby([by, "layer"], sort=True)[metric]:
        values = column.to_numpy(dtype=float)
        values = values[np.isfinite(values)]
        low = high = np.nan
        if len(values) >= FEWEST:
            bootstrap = scipy_stats.bootstrap(
                (values,), np.mean, n_resamples=n_resamples, confidence_level=level, method="percentile",
                rng=np.random.default_rng(seed),
            )  # fmt: skip
            low, high = bootstrap.confidence_interval
        mean = values.mean() if len(values) else np.nan
        rows.append({by: group, "layer": layer, "n": len(values), "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def strata_of(lengths: pd.DataFrame, bins: int | None) -> Int[np.ndarray, " trace"]:
    """Return the stratum of each trace; traces share one if they fall into the same quantile bin of every column.

    Args:
        lengths: one row per trace, one column per length variable.
        bins: number of bins; a column with no more distinct values, and every column under None, is matched exactly.

    Raises:
        ValueError: `bins` is below 1.

    Example:
        >>> import pandas as pd
        >>> stepsal.stats.strata_of(pd.DataFrame({"n_steps": [3, 3, 4, 9]}), bins=2).tolist()
        [0, 0, 1, 1]
    """
    if bins is not None and bins < 1:
        raise ValueError(f"bins={bins} must be 1 or more, or None to match exactly")
    codes = []
    for name in lengths:
        column = lengths[name]
        if bins is None or column.nunique() <= bins:
            codes.append(column.rank(method="dense"))
        else:
            codes.append(pd.Series(pd.qcut(column, bins, labels=False, duplicates="drop"), column.index, name=name))
    return pd.concat(codes, axis=1).groupby(list(lengths.columns)).ngroup().to_numpy()


# ------------------------------------------------------------------------------------------ which traces are compared


@dataclass(frozen=True)
class _Traces:
    """The traces of two groups that have a value in every layer that is compared."""

    values: pd.DataFrame  # [trace, layer]
    lengths: pd.DataFrame  # [trace, variable]
    is_wrong: Bool[np.ndarray, " trace"]
    layers: pd.Index  # all layers of the data, also those that are not compared
    n_without_value: int


def _complete_traces(correct: pd.DataFrame, wrong: pd.DataFrame, metric: str, match: Sequence[str]) -> _Traces:
    """Pivot two groups into [trace, layer] and keep the layers and traces that have their values."""
    groups = {"correct": correct, "wrong": wrong}
    layered = "layer" in correct
    keys = ["trace", "layer"] if layered else ["trace"]
    for name, group in groups.items():
        require_columns(name, group, [*keys, metric, *match])
        refuse_repeats(name, group, keys)
        groups[name] = plain_columns(name, group, [metric, *match], keys)
    correct, wrong = groups.values()
    if shared := set(correct["trace"]) & set(wrong["trace"]):
        raise ValueError(f"trace {min(shared)!r} is in both groups; the numbers of traces must tell them apart")

    rows = pd.concat(groups.values())
    by_layer = rows if layered else rows.assign(layer=0)
    values = pd.concat(
        [
            by_layer.iloc[part].pivot(index="trace", columns="layer", values=metric)
            for part in (slice(len(correct)), slice(len(correct), None))
        ]
    )
    is_wrong = values.index.isin(wrong["trace"])
    layers = values.columns
    finite = np.isfinite(values.to_numpy(dtype=float))
    is_common = finite.sum(0) >= 0.5 * finite.any(1).sum()  # in most traces that have the metric anywhere
    is_complete = finite[:, is_common].all(1) & is_common.any()
    for name, members in (("correct", ~is_wrong), ("wrong", is_wrong)):
        if not (is_complete & members).any():
            raise ValueError(
                f"no {name} trace (of {int(members.sum())}) has {metric!r} in all layers that most traces "
                "have it in: there is nothing to compare"
            )
    values = values.loc[is_complete, is_common]
    lengths = rows.groupby("trace")[list(match)].first() if match else pd.DataFrame(index=values.index)
    return _Traces(values, lengths.loc[values.index], is_wrong[is_complete], layers, int((~is_complete).sum()))


def _matched(
    traces: _Traces, strata: Int[np.ndarray, " trace"], n_resamples: int, level: float, seed: int
) -> pd.DataFrame:
    """Compare the traces whose stratum has both groups: one row per layer."""
    is_wrong = traces.is_wrong
    has_partner = np.isin(strata, np.intersect1d(strata[is_wrong], strata[~is_wrong]))
    sample = _Sample(
        traces.values.to_numpy()[has_partner],
        is_wrong[has_partner],
        np.unique(strata[has_partner], return_inverse=True)[1],
    )
    if has_partner.any():
        table = _contrast(sample, np.array(traces.values.columns), n_resamples, level, seed)
        length_differences = sample.differences(traces.lengths.to_numpy(dtype=float)[has_partner])
    else:
        table = _empty_contrast(traces.values.shape[1])
        length_differences = np.full(traces.lengths.shape[1], np.nan)
    table.insert(0, "layer", traces.values.columns)
    table = table.set_index("layer").reindex(traces.layers).reset_index()
    table["n_left_out"] = traces.n_without_value + int((~has_partner).sum())
    for name, difference in zip(traces.lengths, length_differences, strict=True):
        table[f"{name}_difference"] = difference
    return table


# ------------------------------------------------------------------------------------------------- their statistics


@dataclass(frozen=True)
class _Sample:
    """Traces that are compared: their values, their group, their stratum (0, 1, ... without gaps)."""

    values: Float[np.ndarray, "trace layer"]
    is_wrong: Bool[np.ndarray, " trace"]
    strata: Int[np.ndarray, " trace"]

    def weights_once(self) -> Float[np.ndarray, " trace"]:
        """Return what each trace contributes to the difference of means as the groups are."""
        return contrast_weights(np.ones((1, len(self.values))), self.is_wrong, self.strata)[0]

    def differences(self, values: Float[np.ndarray, "trace layer"]) -> Float[np.ndarray, " layer"]:
        """Return wrong minus correct of other values of the same traces."""
        return self.weights_once() @ values


def _contrast(
    sample: _Sample, layers: Int[np.ndarray, " layer"], n_resamples: int, level: float, seed: int
) -> pd.DataFrame:
    """Estimate and test the difference in each layer; the columns are described in `compare_groups`."""
    x, is_wrong = sample.values, sample.is_wrong
    weights = sample.weights_once()
    difference = weights @ x
    rounding = ROUNDING * np.abs(x).max(0)  # a metric that is constant but for rounding is no effect
    difference[np.abs(difference) <= rounding] = 0.0

    of_null, of_bootstrap = drawn_weights(is_wrong, sample.strata, n_resamples, seed)
    null = of_null @ x
    n_extreme = (np.abs(null) >= np.abs(difference) - rounding).sum(0)
    p = (1 + n_extreme) / (1 + n_resamples)
    spread = null.std(0)
    spread[spread <= rounding] = np.inf
    cluster, cluster_p = _clusters(difference / spread, null / spread, layers)
    low, high = np.full((2, x.shape[1]), np.nan)
    if of_bootstrap is not None:
        low, high = np.nanquantile(of_bootstrap @ x, [(1 - level) / 2, (1 + level) / 2], axis=0)

    return pd.DataFrame(
        {
            "n_correct": int((~is_wrong).sum()),
            "n_wrong": int(is_wrong.sum()),
            "mean_correct": -(weights * ~is_wrong) @ x,
            "mean_wrong": (weights * is_wrong) @ x,
            "difference": difference,
            "low": low,
            "high": high,
            "hedges_g": _hedges_g(sample, difference),
            "cliffs_delta": [2 * auroc(column, is_wrong, sample.strata) - 1 for column in x.T],
            "p": p,
            "q": scipy_stats.false_discovery_control(p),
            "cluster": cluster,
            "cluster_p": cluster_p,
        }
    )


def _empty_contrast(n_layers: int) -> pd.DataFrame:
    """Return the table of `_contrast` where no trace has a partner."""
    nan = np.full(n_layers, np.nan)
    columns = ("mean_correct", "mean_wrong", "difference", "low", "high", "hedges_g", "cliffs_delta", "p", "q")
    empty = {"n_correct": 0, "n_wrong": 0, **dict.fromkeys(columns, nan), "cluster": 0, "cluster_p": nan}
    return pd.DataFrame(empty, index=range(n_layers))


def _clusters(
    z: Float[np.ndarray, " layer"], null: Float[np.ndarray, "draw layer"], layers: Int[np.ndarray, " layer"]
) -> tuple[Int[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """Find clusters of contiguous layers, and their p-values (Maris & Oostenveld 2007).

    The mass of a cluster is the sum of |z|; it is compared with the largest mass in each permutation, which keeps the
    chance of *any* false cluster at the level of the test.
    """
    gap = np.diff(layers, prepend=layers[0] - 1) != 1  # before this layer, another one was not compared
    largest = np.zeros(len(null))
    for sign in (1, -1):
        running = np.zeros(len(null))
        for i in range(len(z)):
            over = sign * null[:, i]
            running = np.where(over > CLUSTER_Z, running * (not gap[i]) + over, 0.0)
            largest = np.maximum(largest, running)
    number, p = np.zeros(len(z), dtype=int), np.full(len(z), np.nan)
    direction = np.where(np.abs(z) > CLUSTER_Z, np.sign(z), 0)
    starts = np.flatnonzero((np.diff(direction, prepend=0) != 0) | gap)
    clusters = [(start, stop) for start, stop in pairwise([*starts, len(z)]) if direction[start]]
    for n, (start, stop) in enumerate(clusters, 1):
        number[start:stop] = n
        p[start:stop] = (1 + (largest >= np.abs(z[start:stop]).sum() * (1 - ROUNDING)).sum()) / (1 + len(null))
    return number, p


def _hedges_g(sample: _Sample, difference: Float[np.ndarray, " layer"]) -> Float[np.ndarray, " layer"]:
    """Divide by the deviation within groups and strata, times 1 - 3 / (4 f - 1) for f degrees of freedom."""
    cells = 2 * sample.strata + sample.is_wrong
    squares, n_cells = np.zeros(sample.values.shape[1]), 0
    for cell in np.unique(cells):
        x = sample.values[cells == cell]
        squares += ((x - x.mean(0)) ** 2).sum(0)
        n_cells += 1
    freedom = len(cells) - n_cells
    if freedom < 2:
        return np.full(len(squares), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        g = difference / np.sqrt(squares / freedom) * (1 - 3 / (4 * freedom - 1))
    constant = squares <= len(cells) * (ROUNDING * np.abs(sample.values).max(0)) ** 2
    return np.where(constant, np.nan, g)
