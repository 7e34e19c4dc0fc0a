"""Contrasts between groups of traces, layer by layer: how large, how sure, and what is left at like length.

The trace is the unit: a permutation moves the labels of whole traces, a bootstrap draws whole traces, and all layers
of a trace go with it. Every contrast is made twice, over all traces and *length-matched*: traces are put into strata of
like length (coarsened exact matching: same bin of each length variable), strata that lack one of the groups are
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
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats as scipy_stats

if TYPE_CHECKING:
    import pandas as pd

LENGTHS = ("n_steps", "n_tokens")
FEWEST = 5  # traces of a group for an interval
CLUSTER_Z = 1.96  # neighbouring layers join a cluster from this many null standard deviations on


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
        correct, wrong: tidy rows of the two groups with columns "trace", `metric`, those of `match`, and "layer";
            without a column "layer", `metric` is one number per trace.
        metric: column to compare.
        match: length variables to match on; constant within a trace.
        bins: cut each length variable into so many quantile bins before matching; None matches exactly. Fewer bins keep
            more traces and more of the difference in length.
        n_resamples: of the permutation test and of the bootstrap.
        level: of the interval.
        seed: of both.

    Returns:
        One row per matching ("none", "length") and layer:

            n_correct, n_wrong      traces compared, the same in all layers: those whose metric is NaN in none. (A layer
                                    in which most traces that have a value anywhere have none is not compared; its row
                                    is NaN.)
            n_left_out              traces without a value, or without a partner in their stratum
            mean_correct, mean_wrong   of those compared; under matching with the weights of their strata
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

        A matching without traces in both groups has rows of NaN.

    Raises:
        ValueError: a missing column, no finite value in one of the groups, a trace in both, or numbers out of range.
    """
    import pandas as pd

    _check_options(n_resamples, level, bins)
    table, layers, lengths, is_wrong, dropped = _by_trace(correct, wrong, metric, match)
    found = []
    for matching in ("none", "length"):
        if matching == "length" and not match:
            continue
        strata = np.zeros(len(table), dtype=int) if matching == "none" else strata_of(lengths, bins)
        kept = _with_partner(strata, is_wrong)
        sample = _Sample(table.to_numpy()[kept], is_wrong[kept], np.unique(strata[kept], return_inverse=True)[1])
        rows = _contrast(sample, np.array(table.columns), n_resamples, level, seed)
        rows.insert(0, "layer", table.columns)
        rows = rows.set_index("layer").reindex(layers).reset_index()
        rows.insert(0, "matching", matching)
        rows["n_left_out"] = dropped + int((~kept).sum())
        left = sample.differences(lengths.to_numpy(dtype=float)[kept]) if kept.any() else np.full(len(match), np.nan)
        for name, difference in zip(match, left, strict=True):
            rows[f"{name}_difference"] = difference
        found.append(rows)
    result = pd.concat(found, ignore_index=True)
    result.insert(0, "metric", metric)
    return result if "layer" in correct else result.drop(columns=["layer", "q", "cluster", "cluster_p"])


def mean_profile(
    data: pd.DataFrame, metric: str, *, by: str = "correct", n_resamples: int = 1999, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean of a metric over the traces of each group, layer by layer, with its bootstrap interval.

    For looking at. Whether groups differ is for `compare_groups` to say: overlapping intervals are no test.

    Args:
        data: tidy rows with columns "trace", "layer", `metric` and `by`, one per trace and layer.
        metric: column to average; traces that have no value in a layer are left out there.
        by: column that tells the groups apart.
        n_resamples, level, seed: of the bootstrap over traces, layer by layer.

    Returns:
        One row per group and layer: `by`, layer, n (traces), mean, low, high. NaN intervals below 5 traces.

    Raises:
        ValueError: a missing column, several rows for one trace and layer, or numbers out of range.
    """
    import pandas as pd

    _check_options(n_resamples, level, None)
    _require_columns("data", data, ["trace", "layer", metric, by])
    if data.duplicated(["trace", "layer"]).any():
        again = data.loc[data.duplicated(["trace", "layer"]), ["trace", "layer"]].iloc[0].to_dict()
        raise ValueError(f"data has several rows for {again}: give one row per trace and layer")
    rows = []
    for (group, layer), values in data.groupby([by, "layer"], sort=True)[metric]:
        x = values.to_numpy(dtype=float)
        x = x[np.isfinite(x)]
        low = high = np.nan
        if len(x) >= FEWEST:
            drawn = scipy_stats.bootstrap(
                (x,), np.mean, n_resamples=n_resamples, confidence_level=level, method="percentile",
                rng=np.random.default_rng(seed),
            )  # fmt: skip
            low, high = drawn.confidence_interval
        mean = x.mean() if len(x) else np.nan
        rows.append({by: group, "layer": layer, "n": len(x), "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def strata_of(lengths: pd.DataFrame, bins: int | None) -> Int[np.ndarray, " trace"]:
    """Number the strata of traces that agree in every column, after cutting each into `bins` quantile bins.

    A column with no more than `bins` distinct values, and every column under bins=None, is matched exactly.
    """
    import pandas as pd

    codes = []
    for name in lengths:
        column = lengths[name]
        if bins is None or column.nunique() <= bins:
            codes.append(column.rank(method="dense"))
        else:
            codes.append(pd.Series(pd.qcut(column, bins, labels=False, duplicates="drop"), column.index, name=name))
    return pd.concat(codes, axis=1).groupby(list(lengths.columns)).ngroup().to_numpy()


@dataclass(frozen=True)
class _Sample:
    """Traces that are compared: their values, their group, their stratum (0, 1, ... without gaps)."""

    values: Float[np.ndarray, "trace layer"]
    is_wrong: Bool[np.ndarray, " trace"]
    strata: Int[np.ndarray, " trace"]

    def weights(
        self, counts: Float[np.ndarray, "draw trace"], is_wrong: Bool[np.ndarray, "draw trace"]
    ) -> Float[np.ndarray, "draw trace"]:
        """What each trace contributes to the difference of means, when each is there `counts` times.

        Strata that lack a group in a draw have no weight in it; NaN where all do.
        """
        member = np.eye(self.strata.max() + 1)[self.strata]  # [trace, stratum]
        n_wrong, n_correct = (counts * is_wrong) @ member, (counts * ~is_wrong) @ member  # [draw, stratum]
        of_stratum = n_wrong * n_correct / np.maximum(n_wrong + n_correct, 1)
        total = of_stratum.sum(1, keepdims=True)
        of_stratum = of_stratum / np.where(total > 0, total, np.nan)  # a draw without pairs says nothing
        per_wrong, per_correct = (of_stratum / np.maximum(n, 1) for n in (n_wrong, n_correct))
        return counts * np.where(is_wrong, per_wrong @ member.T, -per_correct @ member.T)

    def differences(self, values: Float[np.ndarray, "trace layer"]) -> Float[np.ndarray, " layer"]:
        return (self.weights(np.ones((1, len(values))), self.is_wrong[None]) @ values)[0]


def _contrast(
    sample: _Sample, layers: Int[np.ndarray, " layer"], n_resamples: int, level: float, seed: int
) -> pd.DataFrame:
    import pandas as pd

    x, is_wrong = sample.values, sample.is_wrong
    n_layers = x.shape[1]
    if len(x) == 0:
        nan = np.full(n_layers, np.nan)
        columns = ("mean_correct", "mean_wrong", "difference", "low", "high", "hedges_g", "cliffs_delta", "p", "q")
        empty = {"n_correct": 0, "n_wrong": 0, **dict.fromkeys(columns, nan), "cluster": 0, "cluster_p": nan}
        return pd.DataFrame(empty, index=range(n_layers))
    once = np.ones((1, len(x)))
    weights = sample.weights(once, is_wrong[None])[0]
    difference = weights @ x
    rounding = 1e-12 * np.abs(x).max(0)  # a metric that is constant but for rounding is no effect
    difference[np.abs(difference) <= rounding] = 0.0
    rng = np.random.default_rng(seed)

    labels = _permuted(is_wrong, sample.strata, n_resamples, rng)
    null = sample.weights(np.ones((n_resamples, len(x))), labels) @ x  # [draw, layer]
    p = (1 + (np.abs(null) >= np.abs(difference) - rounding).sum(0)) / (1 + n_resamples)
    spread = null.std(0)
    spread[spread <= rounding] = np.inf
    cluster, cluster_p = _clusters(difference / spread, null / spread, layers)

    counts = np.zeros((n_resamples, len(x)))
    for group in (True, False):  # each group is drawn by itself, so that its size stays
        members = np.flatnonzero(is_wrong == group)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=n_resamples)
    drawn = sample.weights(counts, np.broadcast_to(is_wrong, counts.shape)) @ x
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    if min(is_wrong.sum(), (~is_wrong).sum()) < FEWEST:
        low, high = np.full((2, n_layers), np.nan)

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


def _permuted(
    is_wrong: Bool[np.ndarray, " trace"], strata: Int[np.ndarray, " trace"], n: int, rng: np.random.Generator
) -> Bool[np.ndarray, "draw trace"]:
    """Labels shuffled within strata."""
    labels = np.empty((n, len(is_wrong)), dtype=bool)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        labels[:, members] = rng.permuted(np.broadcast_to(is_wrong[members], (n, len(members))), axis=1)
    return labels


def _clusters(
    z: Float[np.ndarray, " layer"], null: Float[np.ndarray, "draw layer"], layers: Int[np.ndarray, " layer"]
) -> tuple[Int[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """Clusters of contiguous layers, and their p-values (Maris & Oostenveld 2007).

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
        p[start:stop] = (1 + (largest >= np.abs(z[start:stop]).sum() * (1 - 1e-12)).sum()) / (1 + len(null))
    return number, p


def _hedges_g(sample: _Sample, difference: Float[np.ndarray, " layer"]) -> Float[np.ndarray, " layer"]:
    """Difference over the deviation within groups and strata, times 1 - 3 / (4 f - 1) for f degrees of freedom."""
    cell = 2 * sample.strata + sample.is_wrong
    squares, n_cells = np.zeros(sample.values.shape[1]), 0
    for c in np.unique(cell):
        x = sample.values[cell == c]
        squares += ((x - x.mean(0)) ** 2).sum(0)
        n_cells += 1
    free = len(cell) - n_cells
    if free < 2:
        return np.full(len(squares), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        g = difference / np.sqrt(squares / free) * (1 - 3 / (4 * free - 1))
    constant = squares <= len(cell) * (1e-12 * np.abs(sample.values).max(0)) ** 2
    return np.where(constant, np.nan, g)


def auroc(
    score: Float[np.ndarray, " trace"],
    positive: Bool[np.ndarray, " trace"],
    strata: Int[np.ndarray, " trace"] | None = None,
) -> float:
    """P(score of a positive > score of a negative) + half of P(equal), over pairs within a stratum.

    The Mann-Whitney statistic over the number of pairs; NaN without pairs.
    """
    strata = np.zeros(len(score), dtype=int) if strata is None else strata
    wins, pairs = 0.0, 0
    for stratum in np.unique(strata):
        here = strata == stratum
        a, b = score[here & positive], score[here & ~positive]
        if len(a) and len(b):
            ranks = scipy_stats.rankdata(np.concatenate([a, b]))
            wins += ranks[: len(a)].sum() - len(a) * (len(a) + 1) / 2
            pairs += len(a) * len(b)
    return wins / pairs if pairs else np.nan


def tell_apart(
    data: pd.DataFrame,
    predictors: dict[str, str | Sequence[str]],
    *,
    baseline: str | None = None,
    correct: str = "correct",
    group: str = "problem",
    n_folds: int = 5,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How well do metrics tell wrong traces from correct ones? Cross-validated by problem.

    For each predictor a logistic regression on its standardised columns (L2, C = 1) is fitted on the other folds, also
    when it has one column: the direction in which a metric points is learnt, not peeked at. A problem's traces are all
    in one fold. The AUROC compares traces of the same fold only, for scores of different fits have different scales.
    Intervals are of the scores as they are: that other training traces would have given other fits is not in them. A
    predictor without any signal has its whole 95 % interval above 0.5 in about 5 % of samples, not in 2.5 %, since a
    chance association is learnt in whichever direction it has.

    Args:
        data: one row per trace.
        predictors: label -> column, or columns.
        baseline: label of a predictor to compare the others with, on the same draws.
        correct: boolean column.
        group: column with the problem of each trace.
        n_folds: of the cross-validation.
        n_resamples, level, seed: of the bootstrap over problems, and of the folds.

    Returns:
        One row per predictor: predictor, n_correct, n_wrong, auroc, low, high (of the interval); over_baseline,
        over_low, over_high, its AUROC minus that of `baseline`, where one is named; and n_left_out, the traces on which
        some predictor has no value. All predictors are judged on the same traces and folds.

    Raises:
        ValueError: a missing column, numbers out of range, or fewer problems of either outcome than folds.
    """
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check_options(n_resamples, level, None)
    columns = {label: [c] if isinstance(c, str) else list(c) for label, c in predictors.items()}
    used = list(dict.fromkeys(c for names in columns.values() for c in names))
    _require_columns("data", data, [correct, group, *used])
    if baseline is not None and baseline not in columns:
        raise ValueError(f"baseline={baseline!r} is no predictor; there is {', '.join(map(repr, columns))}")
    if data[correct].dtype != bool:
        raise ValueError(f"column {correct!r} is {data[correct].dtype}, not bool: make it True and False")
    whole = data[np.isfinite(data[used].to_numpy(dtype=float)).all(1)]
    is_wrong, problems = ~whole[correct].to_numpy(dtype=bool), pd.factorize(whole[group])[0]
    n_problems = min(len(np.unique(problems[is_wrong])), len(np.unique(problems[~is_wrong])))
    if not 2 <= n_folds <= n_problems:
        raise ValueError(
            f"n_folds={n_folds} must lie in 2..{n_problems}: there are {len(np.unique(problems[is_wrong]))} problems "
            f"with wrong and {len(np.unique(problems[~is_wrong]))} with correct traces that have all predictors"
        )
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    splits = list(folds.split(problems, is_wrong, problems))
    fold = np.zeros(len(whole), dtype=int)
    for n, (_, test) in enumerate(splits):
        fold[test] = n
    rng = np.random.default_rng(seed)
    of_problem = [np.flatnonzero(problems == p) for p in range(problems.max() + 1)]
    draws = [
        np.concatenate([of_problem[p] for p in rng.integers(len(of_problem), size=len(of_problem))])
        for _ in range(n_resamples)
    ]
    ends = [(1 - level) / 2, (1 + level) / 2]
    found: dict[str, tuple[float, np.ndarray]] = {}
    for label, names in columns.items():
        x, score = whole[names].to_numpy(dtype=float), np.zeros(len(whole))
        for train, test in splits:
            model = make_pipeline(StandardScaler(), LogisticRegression())
            score[test] = model.fit(x[train], is_wrong[train]).decision_function(x[test])
        drawn = np.array([auroc(score[d], is_wrong[d], fold[d]) for d in draws])
        found[label] = auroc(score, is_wrong, fold), drawn
    rows = []
    for label, (value, drawn) in found.items():
        low, high = np.nanquantile(drawn, ends)
        row = {"predictor": label, "n_correct": (~is_wrong).sum(), "n_wrong": is_wrong.sum()}
        row |= {"auroc": value, "low": low, "high": high}
        if baseline is not None:
            of_baseline, drawn_of_baseline = found[baseline]
            over_low, over_high = np.nanquantile(drawn - drawn_of_baseline, ends)
            row |= {"over_baseline": value - of_baseline, "over_low": over_low, "over_high": over_high}
        rows.append(row)
    return pd.DataFrame(rows).assign(n_left_out=len(data) - len(whole))


def _by_trace(
    correct: pd.DataFrame, wrong: pd.DataFrame, metric: str, match: Sequence[str]
) -> tuple[pd.DataFrame, pd.Index, pd.DataFrame, Bool[np.ndarray, " trace"], int]:
    """(values [trace, layer], all layers, lengths [trace, variable], which are wrong, how many have no value)."""
    import pandas as pd

    layered = "layer" in correct
    tables, lengths = [], []
    for name, group in (("correct", correct), ("wrong", wrong)):
        _require_columns(name, group, ["trace", metric, *match, *(["layer"] if layered else [])])
        keys = ["trace", "layer"] if layered else ["trace"]
        if group.duplicated(keys).any():
            again = group.loc[group.duplicated(keys), keys].iloc[0].to_dict()
            raise ValueError(f"{name} has several rows for {again}: give one row per {' and '.join(keys)}")
        one = group if layered else group.assign(layer=0)
        tables.append(one.pivot(index="trace", columns="layer", values=metric))
        lengths.append(group.groupby("trace")[list(match)].first() if match else None)
    if both := set(tables[0].index) & set(tables[1].index):
        raise ValueError(f"trace {sorted(both)[0]!r} is in both groups; the numbers of traces must tell them apart")
    table = pd.concat(tables)
    is_wrong = np.repeat([False, True], [len(t) for t in tables])
    layers = table.columns
    finite = np.isfinite(table.to_numpy(dtype=float))
    table = table.loc[:, finite.sum(0) >= 0.5 * finite.any(1).sum()]  # of the traces that have it anywhere
    whole = np.asarray(np.isfinite(table.to_numpy(dtype=float)).all(1) & (table.shape[1] > 0))
    for name, members in (("correct", ~is_wrong), ("wrong", is_wrong)):
        if not (whole & members).any():
            raise ValueError(
                f"no {name} trace (of {int(members.sum())}) has {metric!r} in all layers that most traces "
                "have it in: there is nothing to compare"
            )
    covariates = pd.concat(lengths)[whole] if match else pd.DataFrame(index=table.index[whole])
    return table[whole], layers, covariates, is_wrong[whole], int((~whole).sum())


def _with_partner(
    strata: Int[np.ndarray, " trace"], is_wrong: Bool[np.ndarray, " trace"]
) -> Bool[np.ndarray, " trace"]:
    """Traces whose stratum has both groups."""
    both = np.intersect1d(strata[is_wrong], strata[~is_wrong])
    return np.isin(strata, both)


def _require_columns(name: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"{name} has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}")


def _check_options(n_resamples: int, level: float, bins: int | None) -> None:
    if n_resamples < 99 or not 0 < level < 1 or (bins is not None and bins < 1):
        raise ValueError(
            f"n_resamples={n_resamples} must be >= 99, level={level} in (0, 1), and bins={bins} None or >= 1"
        )
