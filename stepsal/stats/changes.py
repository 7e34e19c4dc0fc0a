"""Tell whether a number changes between two treatments of the same units, such as nats on texts."""

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
