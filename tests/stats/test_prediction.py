"""AUROC by counting pairs, and predictions that find a planted signal and are not flattered by noise."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from stepsal.stats import auroc, tell_apart
from stepsal.stats.prediction import _resampled_auroc


def test_auroc_counts_pairs_within_strata() -> None:
    rng = np.random.default_rng(7)
    score, positive, strata = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.4, rng.integers(0, 3, 60)
    pairs = [
        (score[i] > score[j]) + 0.5 * (score[i] == score[j])
        for i in np.flatnonzero(positive)
        for j in np.flatnonzero(~positive)
        if strata[i] == strata[j]
    ]
    assert auroc(score, positive, strata) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(score, np.zeros(60, dtype=bool)))


def test_resampled_auroc_is_that_of_the_drawn_traces() -> None:
    rng = np.random.default_rng(11)
    score, positive, strata = rng.integers(0, 5, 30).astype(float), rng.random(30) < 0.4, rng.integers(0, 3, 30)
    draws = rng.integers(30, size=(50, 30))
    draws[0] = np.flatnonzero(positive)[0]  # without a pair
    counts = np.stack([np.bincount(draw, minlength=30) for draw in draws]).astype(float)
    expected = [auroc(score[draw], positive[draw], strata[draw]) for draw in draws]
    assert np.isnan(expected[0])
    np.testing.assert_array_equal(_resampled_auroc(score, positive, strata, counts), expected)


def problems(rng: np.random.Generator, n: int, effect: float) -> pd.DataFrame:
    wrong = rng.random(n) < 0.4
    return pd.DataFrame(
        {
            "correct": ~wrong,
            "problem": np.arange(n) // 2,
            "signal": -effect * wrong + rng.normal(size=n),  # points down: the direction has to be learnt
            "noise": rng.normal(size=n),
        }
    )


def test_tell_apart_finds_a_signal_and_not_noise() -> None:
    data = problems(np.random.default_rng(8), 400, 1.5)
    data.loc[0, "noise"] = np.nan
    predictors = {"signal": "signal", "noise": "noise", "both": ["signal", "noise"]}
    table = tell_apart(data, predictors, baseline="noise", n_resamples=500).set_index("predictor")
    expected = scipy_stats.norm.cdf(1.5 / np.sqrt(2))
    assert table.loc["signal", "low"] < expected < table.loc["signal", "high"]
    assert table.loc["signal", "over_low"] > 0.2
    assert table.loc["noise", ["over_baseline", "over_low", "over_high"]].eq(0).all()
    assert table.loc["both", "auroc"] == pytest.approx(table.loc["signal", "auroc"], abs=0.03)
    assert (table["n_left_out"] == 1).all()
    assert (table["n_correct"] + table["n_wrong"] == 399).all()


@pytest.mark.parametrize("n_tables", [30, pytest.param(200, marks=pytest.mark.nightly)])
def test_cross_validation_does_not_flatter_noise(n_tables: int) -> None:
    rng = np.random.default_rng(9)
    tables = [tell_apart(problems(rng, 60, 0.0), {"noise": "noise"}, n_resamples=199) for _ in range(n_tables)]
    estimates, lows = (np.array([table[column].item() for table in tables]) for column in ("auroc", "low"))
    assert estimates.mean() == pytest.approx(0.5, abs=3 * estimates.std() / np.sqrt(n_tables))
    # an association by chance has the same direction in all folds, so that both tails of it come out above 0.5: 5 %
    assert (lows > 0.5).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_tables)


def test_tell_apart_names_bad_input() -> None:
    data = problems(np.random.default_rng(10), 40, 1.0)
    with pytest.raises(ValueError, match="no column 'absent'"):
        tell_apart(data, {"a": "absent"})
    with pytest.raises(ValueError, match="baseline='b'"):
        tell_apart(data, {"a": "noise"}, baseline="b")
    with pytest.raises(ValueError, match="not bool"):
        tell_apart(data.assign(correct=data["correct"].astype(str)), {"a": "noise"})
    with pytest.raises(ValueError, match="n_folds=100"):
        tell_apart(data, {"a": "noise"}, n_folds=100)


@pytest.mark.parametrize("backend", ["pyarrow", "numpy_nullable"])
def test_tables_of_any_backend_tell_traces_apart_alike(backend: str) -> None:
    rng = np.random.default_rng(2)
    data = pd.DataFrame(
        {"problem": [f"p{i}" for i in range(40)], "correct": [True, False] * 20, "x": rng.normal(size=40)}
    )
    data.loc[3, "x"] = np.nan
    expected = tell_apart(data, {"X": "x"}, n_resamples=99)
    pd.testing.assert_frame_equal(
        tell_apart(data.convert_dtypes(dtype_backend=backend), {"X": "x"}, n_resamples=99), expected
    )
    with pytest.raises(ValueError, match="data has 'a' in column 'x'"):
        tell_apart(data.assign(x="a"), {"X": "x"})
