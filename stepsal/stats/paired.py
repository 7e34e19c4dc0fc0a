"""Accuracy of answers, and differences between two ways of answering the same problems.

All functions take verdicts as [problem, sample]: sample j of two variants has the same problem and the same seed. The
problem is the unit: samples of one problem are not independent, so bootstraps draw, and permutations flip, whole
problems. Where problems repeat, `groups` says which are the same, and the group is the unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats as scipy_stats
from scipy.special import gammaln

POWER = 0.8
Verdicts = Bool[np.ndarray, "problem sample"]
Groups = Int[np.ndarray, " problem"]


@dataclass(frozen=True)
class Share:
    """A share with its interval."""

    value: float
    low: float
    high: float


def accuracy(
    correct: Verdicts, *, groups: Groups | None = None, level: float = 0.95, n_resamples: int = 4999, seed: int = 0
) -> Share:
    """Share of correct answers; Wilson's interval for one sample of each of different problems, else a bootstrap.

    The bootstrap draws problems as if there were two more, one solved and one not: that all are solved does not mean
    that every one would be.

    Args:
        correct: the verdicts.
        groups: a number for each problem, equal for equal problems; None where all are different.

    Raises:
        ValueError: no verdicts, or groups of another length.
    """
    correct = _checked(correct)
    sums, sizes = _by_group(correct.sum(1), correct.shape[1], groups)
    if correct.shape[1] == 1 and len(sums) == len(correct):
        found = scipy_stats.binomtest(int(correct.sum()), correct.size).proportion_ci(level, method="wilson")
        return Share(float(correct.mean()), found.low, found.high)
    size = correct.shape[1]
    low, high = _interval(np.append(sums, [0, size]), np.append(sizes, [size, size]), level, n_resamples, seed)
    return Share(float(correct.mean()), low, high)


def pass_at_k(correct: Verdicts, k: int) -> float:
    """Chance that at least one of k samples is correct: mean of 1 - C(n - c, k) / C(n, k), which is unbiased.

    (Chen et al. 2021, arXiv 2107.03374, Eq. 1.) n samples of a problem, c of them correct.

    Raises:
        ValueError: k outside 1..n.
    """
    correct = _checked(correct)
    n, c = correct.shape[1], correct.sum(1)
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must lie in 1..{n}, the number of samples")
    log_none = np.where(n - c >= k, _log_choose(np.maximum(n - c, k), k) - _log_choose(np.array(n), k), -np.inf)
    return float((1 - np.exp(log_none)).mean())


@dataclass(frozen=True)
class PairedDifference:
    """How accuracy changes from one variant to another, on the same problems and seeds.

    Attributes:
        n_problems, n_different, n_samples: problems, different ones among them, samples of each.
        fixed, broken: pairs that were wrong and become correct, and the reverse.
        difference, low, high: of accuracy, with a bootstrap interval over problems, as if there were two more, one of
            which is fixed and one broken (for one sample, the adjustment of Bonett and Price 2012): that nothing
            changed in n problems does not mean that nothing can.
        mcnemar_p: exact, two-sided: are fixes and breaks equally likely? NaN for several samples or equal problems,
            which are not independent.
        p: two-sided permutation p-value; swaps the two variants of whole problems. Not corrected for how many variants
            are compared; no smaller than 1 / (1 + n_resamples).
        detectable: the smallest difference that a sample with this spread, and these two more, shows at 5 % with a
            power of 80 %.
    """

    n_problems: int
    n_different: int
    n_samples: int
    fixed: int
    broken: int
    difference: float
    low: float
    high: float
    mcnemar_p: float
    p: float
    detectable: float


def paired_difference(
    before: Verdicts,
    after: Verdicts,
    *,
    groups: Groups | None = None,
    level: float = 0.95,
    n_resamples: int = 4999,
    seed: int = 0,
) -> PairedDifference:
    """Compare two variants.

    Args:
        before, after: the verdicts.
        groups: as in `accuracy`.

    Raises:
        ValueError: shapes that differ, no verdicts, or groups of another length.
    """
    before, after = _checked(before), _checked(after)
    if before.shape != after.shape:
        raise ValueError(f"before is {before.shape} and after {after.shape}: pair the same problems and samples")
    fixed, broken, n_samples = int((after & ~before).sum()), int((before & ~after).sum()), before.shape[1]
    changes, sizes = _by_group(after.sum(1) - before.sum(1).astype(int), n_samples, groups)
    changes_and_two, sizes_and_two = np.append(changes, [n_samples, -n_samples]), np.append(sizes, [n_samples] * 2)
    low, high = _interval(changes_and_two, sizes_and_two, level, n_resamples, seed)
    mcnemar_p = np.nan
    if n_samples == 1 and len(changes) == len(before):
        mcnemar_p = float(scipy_stats.binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
    moved = changes[changes != 0]  # the others change nothing under a swap
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_resamples, len(moved)))
    p = (1 + (np.abs(signs @ moved) >= abs(moved.sum()) - 1e-9).sum()) / (1 + n_resamples)
    residual = changes_and_two - sizes_and_two * changes_and_two.sum() / sizes_and_two.sum()  # of a ratio of sums
    error = residual.std(ddof=1) * np.sqrt(len(residual)) / sizes_and_two.sum()
    return PairedDifference(
        n_problems=len(before), n_different=len(changes), n_samples=n_samples, fixed=fixed, broken=broken,
        difference=float(changes.sum() / sizes.sum()), low=low, high=high, mcnemar_p=mcnemar_p, p=float(p),
        detectable=float((scipy_stats.norm.ppf(0.975) + scipy_stats.norm.ppf(POWER)) * error),
    )  # fmt: skip


def _by_group(
    of_problem: Int[np.ndarray, " problem"], n_samples: int, groups: Groups | None
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    """Sum over the problems of each group, and its number of answers."""
    group = np.arange(len(of_problem)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(group) != len(of_problem):
        raise ValueError(f"groups has {len(group)} entries for {len(of_problem)} problems")
    return np.bincount(group, weights=of_problem), np.bincount(group).astype(float) * n_samples


def _interval(
    sums: Float[np.ndarray, " group"], sizes: Float[np.ndarray, " group"], level: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Of the ratio of sums; percentiles of a bootstrap over groups."""
    rng, n = np.random.default_rng(seed), len(sums)
    draws = (rng.integers(n, size=n) for _ in range(n_resamples))
    ratios = [sums[drawn].sum() / sizes[drawn].sum() for drawn in draws]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


def _checked(correct: Verdicts) -> Verdicts:
    correct = np.asarray(correct)
    if correct.ndim != 2 or correct.size == 0 or correct.dtype != bool:
        raise ValueError(f"verdicts are {correct.dtype} {correct.shape}; give booleans [problem, sample]")
    return correct
