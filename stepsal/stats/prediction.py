"""Tell wrong traces from correct ones by their metrics: the AUROC of scores on problems that no fit has seen.

For each predictor a logistic regression on its standardised columns (L2, C = 1) is fitted on the other folds, also when
it has one column: the direction in which a metric points is learnt, not peeked at. A problem's traces are all in one
fold. The AUROC compares traces of the same fold only, for scores of different fits have different scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats as scipy_stats

from stepsal.stats.checks import check_resampling, plain_columns, require_columns

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def auroc(
    score: Float[ArrayLike, " trace"],
    positive: Bool[ArrayLike, " trace"],
    strata: Int[ArrayLike, " trace"] | None = None,
) -> float:
    """Return P(score of a positive > score of a negative) + half of P(equal), over pairs within a stratum.

    It is the Mann-Whitney statistic over the number of pairs; NaN without pairs.

    Args:
        score: a number for each trace.
        positive: the traces whose scores should be the higher ones.
        strata: stratum of each trace; None makes one stratum of all.

    Example:
        >>> stepsal.stats.auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True])
        0.75
    """
    score, positive = np.asarray(score), np.asarray(positive)
    strata = np.zeros(len(score), dtype=int) if strata is None else np.asarray(strata)
    wins, n_pairs = 0.0, 0
    for stratum in np.unique(strata):
        inside = strata == stratum
        high, low = score[inside & positive], score[inside & ~positive]
        if len(high) and len(low):
            ranks = scipy_stats.rankdata(np.concatenate([high, low]))
            wins += ranks[: len(high)].sum() - len(high) * (len(high) + 1) / 2
            n_pairs += len(high) * len(low)
    return float(wins / n_pairs) if n_pairs else np.nan


def tell_apart(
    data: pd.DataFrame,
    predictors: Mapping[str, str | Sequence[str]],
    *,
    baseline: str | None = None,
    correct: str = "correct",
    group: str = "problem",
    n_folds: int = 5,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how well metrics tell wrong traces from correct ones, cross-validated by problem.

    Intervals take the scores as given; they leave out that other training traces would have given other fits. A
    predictor without any signal has its whole 95 % interval above 0.5 in about 5 % of samples, not in 2.5 %, since a
    chance association is learnt in whichever direction it has.

    Args:
        data: one row per trace.
        predictors: name in the table -> column or columns.
        baseline: name of a predictor to compare the others with, on the same draws; None compares with none.
        correct: boolean column, True where the answer is correct.
        group: column with the problem of each trace.
        n_folds: number of folds of the cross-validation.
        n_resamples: number of bootstrap draws of problems.
        level: coverage of the interval, in (0, 1).
        seed: of the folds and of the bootstrap.

    Returns:
        One row per predictor: predictor, n_correct, n_wrong, auroc, low and high (its interval), n_left_out (traces on
        which some predictor has no value). Where a baseline is named, also over_baseline, over_low and over_high: its
        AUROC minus that of the baseline, with the interval. All predictors are judged on the same traces and folds.

    Raises:
        ValueError: a missing column, numbers out of range, or fewer problems of either outcome than folds.

    Example:
        >>> import numpy as np, pandas as pd
        >>> data = pd.DataFrame({"problem": range(40), "correct": [True, False] * 20, "lock_in": range(40)})
        >>> data["lock_in"] += 30 * ~data["correct"]  # wrong traces lock in more
        >>> table = stepsal.stats.tell_apart(data, {"Lock-in": "lock_in"}, n_resamples=199)
        >>> table[["predictor", "auroc"]].round(2).values.tolist()
        [['Lock-in', 0.98]]
    """
    columns = {label: [names] if isinstance(names, str) else list(names) for label, names in predictors.items()}
    check_resampling(n_resamples, level)
    require_columns("data", data, [correct, group, *_distinct(columns)])
    data = plain_columns("data", data, _distinct(columns), [correct, group])
    _check_data(data, columns, baseline, correct)
    complete = data[np.isfinite(data[_distinct(columns)].to_numpy()).all(1)]
    is_wrong, problems = ~complete[correct].to_numpy(dtype=bool), pd.factorize(complete[group])[0]
    folds = _folds(problems, is_wrong, n_folds, seed)
    counts = _draws_of_problems(problems, n_resamples, seed)

    estimates: dict[str, float] = {}
    resampled: dict[str, Float[np.ndarray, " draw"]] = {}
    for label, names in columns.items():
        scores = _held_out_scores(complete[names].to_numpy(dtype=float), is_wrong, folds)
        estimates[label] = auroc(scores, is_wrong, folds)
        resampled[label] = _resampled_auroc(scores, is_wrong, folds, counts)
    table = _table(estimates, resampled, baseline, level)
    table.insert(1, "n_correct", (~is_wrong).sum())
    table.insert(2, "n_wrong", is_wrong.sum())
    return table.assign(n_left_out=len(data) - len(complete))


def _distinct(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return each column of the predictors once."""
    return list(dict.fromkeys(name for names in columns.values() for name in names))


def _check_data(data: pd.DataFrame, columns: Mapping[str, Sequence[str]], baseline: str | None, correct: str) -> None:
    """Refuse a baseline that is no predictor, and outcomes that are not booleans."""
    if baseline is not None and baseline not in columns:
        raise ValueError(f"baseline={baseline!r} is no predictor; use one of {', '.join(map(repr, columns))}")
    if data[correct].dtype != bool:
        raise ValueError(f"column {correct!r} is {data[correct].dtype}, not bool: make it True and False")


def _folds(
    problems: Int[np.ndarray, " trace"], is_wrong: Bool[np.ndarray, " trace"], n_folds: int, seed: int
) -> Int[np.ndarray, " trace"]:
    """Assign a fold to each trace: problems stay whole, and outcomes are spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    n_wrong, n_correct = (len(np.unique(problems[members])) for members in (is_wrong, ~is_wrong))
    if not 2 <= n_folds <= min(n_wrong, n_correct):
        raise ValueError(
            f"n_folds={n_folds} must lie in 2..{min(n_wrong, n_correct)}: there are {n_wrong} problems "
            f"with wrong and {n_correct} with correct traces that have all predictors"
        )
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    folds = np.zeros(len(problems), dtype=int)
    for number, (_, test) in enumerate(splitter.split(problems, is_wrong, problems)):
        folds[test] = number
    return folds


def _draws_of_problems(
    problems: Int[np.ndarray, " trace"], n_resamples: int, seed: int
) -> Float[np.ndarray, "draw trace"]:
    """Draw problems with replacement, and count how often each trace is in each draw."""
    rng, n_problems = np.random.default_rng(seed), problems.max() + 1
    draws = rng.integers(n_problems, size=(n_resamples, n_problems))
    return np.stack([np.bincount(draw, minlength=n_problems)[problems] for draw in draws]).astype(float)


def _held_out_scores(
    values: Float[np.ndarray, "trace column"], is_wrong: Bool[np.ndarray, " trace"], folds: Int[np.ndarray, " trace"]
) -> Float[np.ndarray, " trace"]:
    """Score each trace by a logistic regression that was fitted on the other folds; higher means wrong."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression())
    return cross_val_predict(model, values, is_wrong, cv=PredefinedSplit(folds), method="decision_function")


def _resampled_auroc(
    scores: Float[np.ndarray, " trace"],
    is_wrong: Bool[np.ndarray, " trace"],
    folds: Int[np.ndarray, " trace"],
    counts: Float[np.ndarray, "draw trace"],
) -> Float[np.ndarray, " draw"]:
    """Return the `auroc` of each draw: a pair counts as often as both of its traces were drawn."""
    wins, n_pairs = np.zeros(len(counts)), np.zeros(len(counts))
    for fold in np.unique(folds):
        wrong, right = (np.flatnonzero((folds == fold) & members) for members in (is_wrong, ~is_wrong))
        higher, lower = scores[wrong][:, None], scores[right]
        beats = (higher > lower) + 0.5 * (higher == lower)  # [wrong, right]
        wins += (counts[:, wrong] @ beats * counts[:, right]).sum(1)
        n_pairs += counts[:, wrong].sum(1) * counts[:, right].sum(1)
    return np.divide(wins, n_pairs, out=np.full(len(counts), np.nan), where=n_pairs > 0)


def _table(
    estimates: Mapping[str, float],
    resampled: Mapping[str, Float[np.ndarray, " draw"]],
    baseline: str | None,
    level: float,
) -> pd.DataFrame:
    """Write one row per predictor, with percentile intervals of its AUROC and of what it adds to the baseline."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    rows = []
    for label, estimate in estimates.items():
        low, high = np.nanquantile(resampled[label], ends)
        row = {"predictor": label, "auroc": estimate, "low": low, "high": high}
        if baseline is not None:
            over_low, over_high = np.nanquantile(resampled[label] - resampled[baseline], ends)
            row |= {"over_baseline": estimate - estimates[baseline], "over_low": over_low, "over_high": over_high}
        rows.append(row)
    return pd.DataFrame(rows)
