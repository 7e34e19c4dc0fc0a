"""Accuracy of answers, and differences between two ways of answering the same problems.

All functions take verdicts as [problem, sample]: sample j of two variants has the same problem and the same seed. The
problem is the unit: samples of one problem are not independent, so bootstraps draw, and permutations flip, whole
problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy import stats as scipy_stats
from scipy.special import gammaln

POWER = 0.8
Verdicts = Bool[np.ndarray, "problem sample"]


@dataclass(frozen=True)
class Share:
    """A share with its interval."""

    value: float
    low: float
    high: float


def accuracy(correct: Verdicts, *, level: float = 0.95, n_resamples: int = 4999, seed: int = 0) -> Share:
    """Share of correct answers; Wilson's interval for one sample per problem, else a bootstrap over problems.

    Raises:
        ValueError: no verdicts.
    """
    correct = _checked(correct)
    if correct.shape[1] == 1:
        found = scipy_stats.binomtest(int(correct.sum()), correct.size).proportion_ci(level, method="wilson")
        return Share(float(correct.mean()), found.low, found.high)
    of_problem = correct.mean(1)
    low, high = _interval(of_problem, level, n_resamples, seed)
    return Share(float(of_problem.mean()), low, high)


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
        n_problems, n_samples: of each variant.
        fixed, broken: pairs that were wrong and become correct, and the reverse.
        difference, low, high: of accuracy, with a bootstrap interval over problems, as if there were two more, with one
            sample fixed and one broken (Bonett and Price 2012): that nothing changed in n problems does not mean that
            nothing can.
        mcnemar_p: exact, two-sided: are fixes and breaks equally likely? NaN for several samples per problem.
        p: two-sided permutation p-value; swaps the two variants of whole problems.
        detectable: the smallest difference that a sample with this spread, and these two more, shows at 5 % with a
            power of 80 %.
    """

    n_problems: int
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
    before: Verdicts, after: Verdicts, *, level: float = 0.95, n_resamples: int = 4999, seed: int = 0
) -> PairedDifference:
    """Compare two variants.

    Raises:
        ValueError: shapes that differ, or no verdicts.
    """
    before, after = _checked(before), _checked(after)
    if before.shape != after.shape:
        raise ValueError(f"before is {before.shape} and after {after.shape}: pair the same problems and samples")
    fixed, broken = int((after & ~before).sum()), int((before & ~after).sum())
    change = after.mean(1) - before.mean(1)  # of each problem
    spread = np.append(change, np.array([1.0, -1.0]) / before.shape[1])
    low, high = _interval(spread, level, n_resamples, seed)
    mcnemar_p = np.nan
    if before.shape[1] == 1:
        mcnemar_p = float(scipy_stats.binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
    moved = change[change != 0]  # the others change nothing under a swap
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_resamples, len(moved)))
    p = (1 + (np.abs(signs @ moved) >= abs(moved.sum()) - 1e-9).sum()) / (1 + n_resamples)
    error = spread.std(ddof=1) / np.sqrt(len(spread))
    return PairedDifference(
        n_problems=len(change), n_samples=before.shape[1], fixed=fixed, broken=broken, difference=float(change.mean()),
        low=low, high=high, mcnemar_p=mcnemar_p, p=float(p),
        detectable=float((scipy_stats.norm.ppf(0.975) + scipy_stats.norm.ppf(POWER)) * error),
    )  # fmt: skip


def _interval(of_problem: np.ndarray, level: float, n_resamples: int, seed: int) -> tuple[float, float]:
    if len(of_problem) < 2:
        return np.nan, np.nan
    found = scipy_stats.bootstrap(
        (of_problem,), np.mean, n_resamples=n_resamples, confidence_level=level, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


def _checked(correct: Verdicts) -> Verdicts:
    correct = np.asarray(correct)
    if correct.ndim != 2 or correct.size == 0 or correct.dtype != bool:
        raise ValueError(f"verdicts are {correct.dtype} {correct.shape}; give booleans [problem, sample]")
    return correct
