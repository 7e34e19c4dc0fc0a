"""Accuracy of answers, and differences between two variants on the same problems.

All functions take verdicts as [problem, sample]: sample j of two variants has the same problem and the same seed. The
problem is the unit: samples of one problem are not independent, so bootstraps draw, and permutations flip, whole
problems. Where problems repeat, `groups` says which are the same, and the group is the unit.

Bootstraps add two pseudo-problems with opposite outcomes before they draw (`_with_two_more`): that all of n problems
are solved, or that none of them changed, does not mean that every one would be, or that nothing can change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats as scipy_stats

POWER = 0.8
SIGNIFICANCE = 0.05
DRAWS_AT_ONCE = 2**20  # numbers drawn at a time by a bootstrap: some 8 MB, whatever the number of problems
ROUNDING = 1e-9  # sums of changes that differ by less are equal
Verdicts = Bool[np.ndarray, "problem sample"]
"""Booleans [problem, sample], True where the answer is correct."""
Groups = Int[np.ndarray, " problem"]
"""Numbers [problem], equal where the same problem comes again."""


@dataclass(frozen=True)
class Share:
    """A proportion with its interval.

    Attributes:
        value: the proportion, in 0..1.
        low: lower end of the interval.
        high: upper end of the interval.

    Example:
        >>> import numpy as np
        >>> share = stepsal.stats.accuracy(np.ones((10, 1), dtype=bool))
        >>> share.value, round(share.low, 2), share.high
        (1.0, 0.72, 1.0)
    """

    value: float
    low: float
    high: float


def accuracy(
    correct: Verdicts, *, groups: Groups | None = None, level: float = 0.95, n_resamples: int = 4999, seed: int = 0
) -> Share:
    """Return the share of correct answers with its interval.

    The interval is Wilson's where all problems differ and each has one sample. Otherwise it is a percentile bootstrap
    over problems, to which two pseudo-problems are added, one solved and one not.

    Args:
        correct: booleans [problem, sample], True where the answer is correct.
        groups: [problem], equal where the same problem comes again; None where all differ.
        level: coverage of the interval, in (0, 1).
        n_resamples: number of bootstrap draws.
        seed: of the bootstrap.

    Raises:
        ValueError: no verdicts, or groups of another length.

    Example:
        >>> import numpy as np
        >>> share = stepsal.stats.accuracy(np.array([[True]] * 7 + [[False]] * 3))
        >>> round(share.value, 2), round(share.low, 2), round(share.high, 2)
        (0.7, 0.4, 0.89)
    """
    correct = _checked(correct)
    n_problems, n_samples = correct.shape
    sums, sizes = _by_group(correct.sum(1), n_samples, groups)
    if n_samples == 1 and len(sums) == n_problems:
        wilson = scipy_stats.binomtest(int(correct.sum()), n_problems).proportion_ci(level, method="wilson")
        return Share(float(correct.mean()), float(wilson.low), float(wilson.high))
    low, high = _interval(*_with_two_more(sums, sizes, n_samples, (0, n_samples)), level, n_resamples, seed)
    return Share(float(correct.mean()), low, high)


def pass_at_k(correct: Verdicts, k: int) -> float:
    """Return the chance that at least one of k samples of a problem is correct, averaged over problems.

    With n = correct.shape[1] samples of a problem, c of them correct, it is 1 - C(n - c, k) / C(n, k): the chance that
    k samples, drawn without replacement, are not all wrong. This estimate is unbiased (Chen et al. 2021, arXiv
    2107.03374, Eq. 1).

    Args:
        correct: booleans [problem, sample], True where the answer is correct.
        k: number of samples drawn, 1..n.

    Raises:
        ValueError: k outside 1..n.

    Example:
        >>> import numpy as np
        >>> verdicts = np.array([[True, False, False, False], [False] * 4])
        >>> round(stepsal.stats.pass_at_k(verdicts, 2), 3)  # the mean of 1/2 and 0
        0.25
    """
    correct = _checked(correct)
    n_samples, n_correct = correct.shape[1], correct.sum(1)
    if not 1 <= k <= n_samples:
        raise ValueError(f"k={k} must lie in 1..{n_samples}, the number of samples")
    return float(1 - scipy_stats.hypergeom(n_samples, n_correct, k).pmf(0).mean())


@dataclass(frozen=True)
class PairedDifference:
    """The change of accuracy between two variants, on the same problems and seeds.

    Attributes:
        n_problems: rows compared, repeats included.
        n_different: different problems among them.
        n_samples: samples of each problem.
        fixed: pairs that were wrong and become correct.
        broken: pairs that were correct and become wrong.
        difference: of accuracy, after minus before.
        low: lower end of the percentile bootstrap interval of the difference, over problems. Two pseudo-problems, one
            fixed and one broken, are added before resampling, so that the interval has width even if no pair differs
            (for one sample, the adjustment of Bonett and Price 2012).
        high: upper end of that interval.
        mcnemar_p: exact two-sided p-value of McNemar's test that fixes and breaks are equally likely; NaN for several
            samples or repeated problems, which are not independent.
        p: two-sided p-value of a permutation test that swaps the two variants of whole problems; at least
            1 / (1 + n_resamples), and not corrected for the number of variants compared.
        detectable: smallest true difference that a test at 5 % finds with 80 % power, given this spread
            (pseudo-problems included).

    Example:
        >>> import numpy as np
        >>> plain, edited = np.array([[True], [False], [False]]), np.array([[True], [True], [False]])
        >>> change = stepsal.stats.paired_difference(plain, edited)
        >>> change.fixed, change.broken, round(change.difference, 2)
        (1, 0, 0.33)
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
    """Compare the accuracy of two variants on the same problems and samples.

    Args:
        before: booleans [problem, sample] of the first variant, True where the answer is correct.
        after: the same of the second variant.
        groups: [problem], equal where the same problem comes again; None where all differ.
        level: coverage of the interval, in (0, 1).
        n_resamples: number of bootstrap draws, and of permutations.
        seed: of the bootstrap and of the permutations.

    Raises:
        ValueError: shapes that differ, no verdicts, or groups of another length.

    Example:
        >>> import numpy as np
        >>> before, after = np.zeros((20, 1), dtype=bool), np.arange(20)[:, None] < 6
        >>> change = stepsal.stats.paired_difference(before, after)
        >>> change.fixed, change.broken, round(change.difference, 2), round(change.mcnemar_p, 3)
        (6, 0, 0.3, 0.031)
    """
    before, after = _checked(before), _checked(after)
    if before.shape != after.shape:
        raise ValueError(f"before is {before.shape} and after {after.shape}: pair the same problems and samples")
    n_problems, n_samples = before.shape
    fixed, broken = int((after & ~before).sum()), int((before & ~after).sum())
    changes, sizes = _by_group(after.sum(1) - before.sum(1).astype(int), n_samples, groups)
    adjusted = _with_two_more(changes, sizes, n_samples, (n_samples, -n_samples))
    low, high = _interval(*adjusted, level, n_resamples, seed)
    independent = n_samples == 1 and len(changes) == n_problems
    return PairedDifference(
        n_problems=n_problems,
        n_different=len(changes),
        n_samples=n_samples,
        fixed=fixed,
        broken=broken,
        difference=float(changes.sum() / sizes.sum()),
        low=low,
        high=high,
        mcnemar_p=_mcnemar_p(fixed, broken) if independent else np.nan,
        p=_swap_p(changes, n_resamples, seed),
        detectable=_detectable(*adjusted),
    )


def _by_group(
    of_problem: Int[np.ndarray, " problem"], n_samples: int, groups: Groups | None
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    """Sum over the problems of each group, and count its answers."""
    group = np.arange(len(of_problem)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(group) != len(of_problem):
        raise ValueError(f"groups has {len(group)} entries for {len(of_problem)} problems")
    return np.bincount(group, weights=of_problem), np.bincount(group).astype(float) * n_samples


def _with_two_more(
    sums: Float[np.ndarray, " group"], sizes: Float[np.ndarray, " group"], n_samples: int, outcomes: tuple[int, int]
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    """Append two pseudo-problems with opposite outcomes (sums over their samples)."""
    return np.append(sums, outcomes), np.append(sizes, [n_samples, n_samples])


def _interval(
    sums: Float[np.ndarray, " group"], sizes: Float[np.ndarray, " group"], level: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Return the percentile interval of the ratio of sums, from a bootstrap over groups."""
    result = scipy_stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=level,
        n_resamples=n_resamples,
        batch=max(1, DRAWS_AT_ONCE // len(sums)),
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def _mcnemar_p(fixed: int, broken: int) -> float:
    """Return McNemar's exact two-sided p-value; 1 where nothing changed."""
    return float(scipy_stats.binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


def _swap_p(changes: Float[np.ndarray, " group"], n_resamples: int, seed: int) -> float:
    """Return the two-sided p-value of a permutation test that swaps the two variants of whole groups."""
    moved = changes[changes != 0]  # the others change nothing under a swap
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_resamples, len(moved)))
    n_extreme = (np.abs(signs @ moved) >= abs(moved.sum()) - ROUNDING).sum()
    return float((1 + n_extreme) / (1 + n_resamples))


def _detectable(changes: Float[np.ndarray, " group"], sizes: Float[np.ndarray, " group"]) -> float:
    """Return the difference that a sample of this spread finds with a chance of `POWER`."""
    residual = changes - sizes * changes.sum() / sizes.sum()  # of a ratio of sums
    standard_error = residual.std(ddof=1) * np.sqrt(len(residual)) / sizes.sum()
    return float((scipy_stats.norm.ppf(1 - SIGNIFICANCE / 2) + scipy_stats.norm.ppf(POWER)) * standard_error)


def _checked(correct: Verdicts) -> Verdicts:
    """Return verdicts as an array, after a check that they are booleans [problem, sample]."""
    correct = np.asarray(correct)
    if correct.ndim != 2 or correct.size == 0 or correct.dtype != bool:
        raise ValueError(f"verdicts are {correct.dtype} {correct.shape}; give booleans [problem, sample]")
    return correct
