"""Tell whether a number or a share changes between two treatments of the same units, such as nats on texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats as scipy_stats


class MeanChange(NamedTuple):
    """The mean of changes, one for each unit.

    Attributes:
        n: number of units.
        mean: mean change.
        low: lower end of the 95 % interval of the mean, from the t distribution.
        high: upper end of that interval.
        p: two-sided p-value of a permutation test that flips the signs of changes.
        detectable: smallest true mean that a test at 5 % finds with 80 % power, given this spread.

    Example:
        >>> stepsal.stats.mean_change([1.0, 1.0, 1.0, 2.0]).mean
        1.25
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    detectable: float


def mean_change(
    changes: Sequence[float] | Float[np.ndarray, " unit"], *, n_resamples: int = 9999, seed: int = 0
) -> MeanChange:
    """Return the mean of changes with its 95 % interval and a test against no change.

    Args:
        changes: after minus before, one number for each unit.
        n_resamples: number of sign flips of the permutation test; all of them are taken where there are fewer.
        seed: seed of the flips.

    Raises:
        ValueError: fewer than two changes, or one that is NaN or infinite.

    Example:
        >>> change = stepsal.stats.mean_change([0.4, 0.1, 0.3, 0.2, 0.5, 0.3])
        >>> change.n, round(change.mean, 2), round(change.low, 2), round(change.p, 3)
        (6, 0.3, 0.15, 0.031)
    """
    x: Float[np.ndarray, " unit"] = np.asarray(changes, dtype=float)
    if len(x) < 2:
        raise ValueError(f"{len(x)} changes have no spread: give at least two, better 40")
    if not np.isfinite(x).all():
        raise ValueError(f"change {int(np.flatnonzero(~np.isfinite(x))[0])} is {x[~np.isfinite(x)][0]}: leave it out")
    stderr = float(x.std(ddof=1) / len(x) ** 0.5)
    quantile = float(scipy_stats.t.ppf(0.975, len(x) - 1))
    test = scipy_stats.permutation_test(
        (x,), np.mean, permutation_type="samples", n_resamples=n_resamples, rng=np.random.default_rng(seed)
    )
    power = quantile + float(scipy_stats.t.ppf(0.8, len(x) - 1))
    mean = float(x.mean())
    return MeanChange(
        len(x), mean, mean - quantile * stderr, mean + quantile * stderr, float(test.pvalue), power * stderr
    )


class ShareChange(NamedTuple):
    """The change of a share that is counted over all units together, such as right facts of all restated ones.

    Attributes:
        n: number of units.
        before: share before, of the sums over units.
        after: share after.
        change: after minus before.
        low: lower end of the 95 % interval of the change, from a bootstrap over units.
        high: upper end of that interval.

    Example:
        >>> stepsal.stats.share_change([[1, 4], [0, 2], [1, 2]], [[2, 4], [1, 2], [1, 2]]).after
        0.5
    """

    n: int
    before: float
    after: float
    change: float
    low: float
    high: float


def share_change(
    before: Sequence[Sequence[float]] | Float[np.ndarray, "unit 2"],
    after: Sequence[Sequence[float]] | Float[np.ndarray, "unit 2"],
    *,
    n_resamples: int = 4000,
    seed: int = 0,
) -> ShareChange:
    """Return how a share changes that is a ratio of two sums over units, with its 95 % interval.

    Units are resampled with both of their counts before and after, since the counts of one unit belong together.

    Args:
        before: of each unit, how many there are (such as right facts) and of how many (restated facts).
        after: the same of the same units in the same order.
        n_resamples: number of bootstrap samples.
        seed: seed of the bootstrap.

    Raises:
        ValueError: the two are not [unit, 2] of the same shape, there are fewer than two units, or nothing is counted
            before or after.

    Example:
        >>> change = stepsal.stats.share_change([[1, 4], [0, 2], [1, 2]], [[2, 4], [1, 2], [1, 2]])
        >>> change.before, change.after, change.change
        (0.25, 0.5, 0.25)
    """
    counts: Float[np.ndarray, "treatment unit 2"]
    shapes = [np.shape(before), np.shape(after)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != 2 or shapes[0][0] < 2:
        raise ValueError(
            f"counts are {shapes[0]} before and {shapes[1]} after; give [unit, 2] of the same 2 or more units"
        )
    counts = np.array([before, after], dtype=float)
    sums = counts.sum(1)  # [treatment, 2]
    if not (sums[:, 1] > 0).all():
        raise ValueError(
            f"of {sums[0, 1]:g} before and {sums[1, 1]:g} after there is no share: count something in both"
        )
    n = counts.shape[1]
    times_drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)  # [resample, unit]
    drawn = times_drawn @ counts  # [treatment, resample, 2]
    with np.errstate(invalid="ignore"):  # a resample may count nothing
        resampled = drawn[..., 0] / drawn[..., 1]
    low, high = np.nanquantile(resampled[1] - resampled[0], (0.025, 0.975))
    share_before, share_after = sums[:, 0] / sums[:, 1]
    return ShareChange(
        n, float(share_before), float(share_after), float(share_after - share_before), float(low), float(high)
    )
