"""Changes between two treatments of the same units: their intervals hold what is true as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from stepsal.stats import mean_change, share_change


class TestMeanChange:
    """The mean of changes with its interval."""

    def test_the_interval_holds_the_true_mean(self) -> None:
        rng = np.random.default_rng(0)
        held = [
            change.low <= 0.3 <= change.high
            for change in (mean_change(rng.normal(0.3, 1, 20), n_resamples=1) for _ in range(400))
        ]
        assert 0.92 <= np.mean(held) <= 0.98

    def test_the_detectable_change_is_found_in_four_of_five(self) -> None:
        rng = np.random.default_rng(1)
        effect = np.mean([mean_change(rng.normal(0, 1, 30), n_resamples=1).detectable for _ in range(200)])
        found = [mean_change(rng.normal(effect, 1, 30), n_resamples=1).low > 0 for _ in range(400)]
        assert 0.74 <= np.mean(found) <= 0.86

    @pytest.mark.parametrize(("changes", "message"), [([1.0], "no spread"), ([1.0, float("nan")], "change 1 is nan")])
    def test_errors(self, changes: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mean_change(changes)


def counts(rng: np.random.Generator, n: int, share: float) -> np.ndarray:
    """Return right and restated facts of n questions, whose shares spread around the mean share."""
    restated = rng.poisson(2, n)
    return np.stack([rng.binomial(restated, rng.beta(4 * share, 4 * (1 - share), n)), restated], axis=1)


class TestShareChange:
    """The change of a ratio of two sums, such as right facts of all that are restated."""

    def test_shares_are_ratios_of_sums(self) -> None:
        change = share_change([[1, 4], [0, 2], [1, 2]], [[2, 4], [1, 2], [1, 4]], n_resamples=50)
        assert (change.n, change.before, change.after, change.change) == (3, 2 / 8, 4 / 10, pytest.approx(0.15))

    def test_the_interval_holds_the_true_change(self) -> None:
        rng = np.random.default_rng(0)
        changes = (share_change(counts(rng, 60, 0.3), counts(rng, 60, 0.5), n_resamples=400) for _ in range(300))
        held = [change.low <= 0.2 <= change.high for change in changes]
        assert 0.91 <= np.mean(held) <= 0.98

    def test_counts_of_a_unit_are_drawn_together(self) -> None:
        rng = np.random.default_rng(0)
        before = counts(rng, 80, 0.4)
        same = share_change(before, before)
        assert (same.low, same.change, same.high) == (0, 0, 0)

    def test_the_interval_is_that_of_scipy(self) -> None:
        from scipy.stats import bootstrap

        rng = np.random.default_rng(3)
        before, after = counts(rng, 100, 0.3), counts(rng, 100, 0.4)

        def change(*columns: np.ndarray) -> float:
            right, of, right_after, of_after = (column.sum() for column in columns)
            return right_after / of_after - right / of

        columns = [*before.T.astype(float), *after.T.astype(float)]
        options = {"paired": True, "vectorized": False, "method": "percentile", "n_resamples": 4000}
        interval = bootstrap(columns, change, rng=np.random.default_rng(5), **options).confidence_interval
        ours = share_change(before, after)
        assert (ours.low, ours.high) == (
            pytest.approx(interval.low, abs=0.006),
            pytest.approx(interval.high, abs=0.006),
        )

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            ([[1, 2]], [[1, 2]], "2 or more units"),
            ([[1, 2], [1, 2]], [[1, 2], [1, 2], [1, 2]], r"\(2, 2\) before and \(3, 2\) after"),
            ([[0, 0], [0, 0]], [[1, 2], [1, 2]], "of 0 before and 4 after there is no share"),
        ],
    )
    def test_errors(self, before: list, after: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            share_change(before, after)
