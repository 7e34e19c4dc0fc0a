"""Accuracy and paired differences, against examples worked out by hand and against simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from stepsal.stats.paired import accuracy, paired_difference, pass_at_k


def column(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool)[:, None]


def test_wilson_by_hand() -> None:
    """7 of 10: centre (p + z^2 / 2n) / (1 + z^2 / n) = 0.6444, half width 0.2478 at z = 1.96."""
    share = accuracy(column(*[1] * 7, *[0] * 3))
    assert share.value == 0.7
    assert share.low == pytest.approx(0.3968, abs=2e-4)
    assert share.high == pytest.approx(0.8922, abs=2e-4)


def test_samples_of_a_problem_are_not_independent() -> None:
    alike = np.repeat(np.random.default_rng(0).random((40, 1)) < 0.5, 8, axis=1)
    share, alone = accuracy(alike), accuracy(alike[:, :1])
    assert share.high - share.low == pytest.approx(alone.high - alone.low, rel=0.15)


def test_pass_at_k_is_the_chance_over_all_subsets() -> None:
    correct = np.random.default_rng(1).random((6, 5)) < 0.3
    for k in range(1, 6):
        every = [correct[:, list(chosen)].any(1) for chosen in combinations(range(5), k)]
        assert pass_at_k(correct, k) == pytest.approx(np.mean(every))
    with pytest.raises(ValueError, match=r"k=6 must lie in 1\.\.5"):
        pass_at_k(correct, 6)


def test_mcnemar_by_hand() -> None:
    """6 fixed, 1 broken: two-sided exact p = 2 * (1 + 7) / 2^7 = 0.125."""
    before = column(*[0] * 6, *[1] * 1, *[1] * 5, *[0] * 8)
    after = column(*[1] * 6, *[0] * 1, *[1] * 5, *[0] * 8)
    change = paired_difference(before, after)
    assert (change.fixed, change.broken, change.n_problems) == (6, 1, 20)
    assert change.mcnemar_p == pytest.approx(0.125)
    assert change.p == pytest.approx(0.125, abs=0.02)  # the permutation test of the same pairs
    assert change.difference == pytest.approx(5 / 20)
    spread = np.sqrt((9 - 25 / 22) / 21 / 22)  # of the mean of six +1, one -1, thirteen 0, and one +1 and one -1 more
    assert change.detectable == pytest.approx(2.8016 * spread, rel=1e-3)
    assert change.low <= change.difference <= change.high


def test_equal_problems_are_one_unit() -> None:
    """200 copies of 10 problems tell no more about other problems than the 10 alone do."""
    rng = np.random.default_rng(4)
    before, after = rng.random((10, 1)) < 0.5, rng.random((10, 1)) < 0.5
    groups = np.tile(np.arange(10), 20)
    alone, copies = (
        paired_difference(before, after),
        paired_difference(np.tile(before, (20, 1)), np.tile(after, (20, 1)), groups=groups),
    )
    assert (copies.n_problems, copies.n_different) == (200, 10)
    assert copies.difference == alone.difference
    assert copies.high - copies.low > 0.8 * (alone.high - alone.low)
    assert copies.p == pytest.approx(alone.p, abs=0.02)
    assert np.isnan(copies.mcnemar_p)
    share = accuracy(np.tile(before, (20, 1)), groups=groups)
    assert share.high - share.low > 0.3
    with pytest.raises(ValueError, match="groups has 3 entries for 10 problems"):
        accuracy(before, groups=np.arange(3))


def test_groups_of_unlike_size_are_weighted_by_their_answers() -> None:
    before = column(0, 0, 0, 1)
    after = column(1, 1, 1, 1)
    change = paired_difference(before, after, groups=np.array([0, 0, 0, 1]))
    assert change.difference == 0.75
    assert change.n_different == 2


SIMULATIONS = pytest.mark.parametrize("n_draws", [60, pytest.param(400, marks=pytest.mark.nightly)])


@SIMULATIONS
@pytest.mark.parametrize("n_samples", [1, 8])
def test_intervals_cover_where_few_whole_problems_change(n_samples: int, n_draws: int) -> None:
    rng = np.random.default_rng(5)
    covered = []
    for seed in range(n_draws):
        flips = rng.random((50, 1)) < 0.02  # from all wrong to all right
        before, after = np.zeros((50, n_samples), dtype=bool), np.repeat(flips, n_samples, axis=1)
        change = paired_difference(before, after, n_resamples=299, seed=seed)
        covered.append(change.low <= 0.02 <= change.high)
    assert scipy_stats.binomtest(sum(covered), n_draws, 0.95, alternative="less").pvalue > 0.05


def test_all_right_is_not_certainty() -> None:
    one, two = (accuracy(np.ones((10, n), dtype=bool)) for n in (1, 2))
    assert (one.high, two.high) == (1.0, 1.0)
    assert one.low == pytest.approx(0.722, abs=0.001)
    assert two.low < 0.85


def test_the_interval_is_that_of_a_loop_over_draws() -> None:
    rng = np.random.default_rng(6)
    correct, groups = rng.random((50, 3)) < 0.6, np.arange(50) % 20
    sums = np.append(np.bincount(groups, correct.sum(1)), [0, 3])  # and two pseudo-problems
    sizes = np.append(3 * np.bincount(groups), [3, 3])
    draws = np.random.default_rng(9)
    ratios = [sums[d].sum() / sizes[d].sum() for d in (draws.integers(len(sums), size=len(sums)) for _ in range(999))]
    share = accuracy(correct, groups=groups, n_resamples=999, seed=9)
    np.testing.assert_allclose([share.low, share.high], np.quantile(ratios, [0.025, 0.975]), rtol=1e-12)


def test_no_change_is_no_finding() -> None:
    same = column(1, 0, 1, 1)
    change = paired_difference(same, same)
    assert (change.difference, change.mcnemar_p, change.p) == (0.0, 1.0, 1.0)
    same = np.ones((1000, 1), dtype=bool)
    change = paired_difference(same, same)
    assert change.low == -change.high
    assert 0.002 <= change.high <= 0.004  # the share of changes may be up to 0.0037 (Clopper and Pearson)
    assert change.high < change.detectable < 0.01


@SIMULATIONS
def test_p_values_hold_their_level_where_nothing_differs_and_intervals_cover(n_draws: int) -> None:
    rng = np.random.default_rng(2)
    p_values, covered = [], []
    for seed in range(n_draws):
        chance = rng.random((60, 1))  # hard and easy problems
        before, after = (rng.random((60, 4)) < chance for _ in range(2))
        change = paired_difference(before, after, n_resamples=499, seed=seed)
        p_values.append(change.p)
        covered.append(change.low <= 0 <= change.high)
        assert np.isnan(change.mcnemar_p)
    for level in (0.05, 0.1, 0.3):
        n_below = int((np.array(p_values) <= level).sum())
        assert scipy_stats.binomtest(n_below, n_draws, level, alternative="greater").pvalue > 0.01
        careful = 0.75 * level  # ties of a test on few changes make it careful, but not more than so
        assert scipy_stats.binomtest(n_below, n_draws, careful, alternative="less").pvalue > 0.01
    assert scipy_stats.binomtest(sum(covered), n_draws, 0.95, alternative="less").pvalue > 0.01


@SIMULATIONS
def test_an_effect_of_the_detectable_size_shows_four_times_in_five(n_draws: int) -> None:
    rng = np.random.default_rng(3)
    significant, detectable = [], []
    for seed in range(n_draws):
        draw = rng.random((200, 1))
        fixed, broken = 0.227, 0.113  # shares; their difference is 0.114
        result = paired_difference(
            draw < 0.5, (draw < 0.5 - broken) | ((draw > 0.5) & (draw < 0.5 + fixed)), n_resamples=499, seed=seed
        )
        significant.append(result.p < 0.05)
        detectable.append(result.detectable)
    assert np.mean(detectable) == pytest.approx(fixed - broken, abs=0.003)
    assert abs(np.mean(significant) - 0.8) < 4 * np.sqrt(0.8 * 0.2 / n_draws)


@pytest.mark.parametrize("bad", [np.zeros((0, 1), bool), np.zeros(4, bool), np.zeros((4, 1))])
def test_what_is_no_table_of_verdicts(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"booleans \[problem, sample\]"):
        accuracy(bad)
    with pytest.raises(ValueError, match="pair the same problems"):
        paired_difference(column(1, 0), column(1, 0, 1))
