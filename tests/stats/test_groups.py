"""Contrasts: against scipy, planted effects, honest p-values and intervals, and lengths that explain an effect away."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from stepsal.stats import compare_groups, mean_profile, strata_of
from stepsal.stats.resampling import _kept_draws


def group(values: np.ndarray, first: int, n_steps: np.ndarray | int = 10) -> pd.DataFrame:
    """Tidy rows of traces `first`, `first + 1`, ...; values [trace, layer]."""
    n, n_layers = values.shape
    steps = np.broadcast_to(n_steps, n)
    return pd.DataFrame(
        {
            "trace": np.repeat(np.arange(first, first + n), n_layers),
            "layer": np.tile(np.arange(n_layers), n),
            "x": values.ravel(),
            "n_steps": np.repeat(steps, n_layers),
            "n_tokens": np.repeat(steps * 12, n_layers),
        }
    )


def two_groups(rng: np.random.Generator, n: int, m: int, shift: float, layers: int = 6) -> tuple[pd.DataFrame, ...]:
    common = lambda k: 0.7 * rng.normal(size=(k, 1))  # noqa: E731 (layers of a trace go together)
    correct, wrong = (common(k) + rng.normal(size=(k, layers)) for k in (n, m))
    wrong[:, 2:5] += shift
    return group(correct, 0), group(wrong, n)


def test_without_strata_it_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    correct, wrong = two_groups(rng, 30, 22, 0.6)
    table = compare_groups(correct, wrong, "x", n_resamples=9999).query("matching == 'none'").set_index("layer")
    for layer in range(6):
        a, b = (frame.loc[frame["layer"] == layer, "x"].to_numpy() for frame in (correct, wrong))
        row = table.loc[layer]
        test = scipy_stats.permutation_test(
            (b, a), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True, n_resamples=9999, rng=1
        )
        assert row["p"] == pytest.approx(test.pvalue, abs=0.025)
        boot = scipy_stats.bootstrap(
            (b, a), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True, method="percentile", rng=1
        )
        assert row["low"] == pytest.approx(boot.confidence_interval.low, abs=0.06)
        assert row["high"] == pytest.approx(boot.confidence_interval.high, abs=0.06)
        assert row["difference"] == pytest.approx(b.mean() - a.mean())
        assert row["mean_wrong"] == pytest.approx(b.mean())
        pooled = np.sqrt((a.var(ddof=1) * 29 + b.var(ddof=1) * 21) / 50)
        assert row["hedges_g"] == pytest.approx((b.mean() - a.mean()) / pooled * (1 - 3 / 199))
        assert row["cliffs_delta"] == pytest.approx(np.sign(b[:, None] - a).mean())
    np.testing.assert_allclose(table["q"], scipy_stats.false_discovery_control(table["p"]))


def test_mean_profile_averages_traces_and_brackets_the_mean() -> None:
    rng = np.random.default_rng(0)
    correct, wrong = two_groups(rng, 40, 4, 1.0)
    data = pd.concat([correct.assign(correct=True), wrong.assign(correct=False)])
    data.loc[(data["trace"] == 0) & (data["layer"] == 2), "x"] = np.nan
    profile = mean_profile(data, "x").set_index(["correct", "layer"])
    assert profile.loc[(True, 2), "n"] == 39
    assert (profile.loc[True, "n"].drop(2) == 40).all()
    expected = correct.groupby("layer")["x"].mean()
    np.testing.assert_allclose(profile.loc[True, "mean"].drop(2), expected.drop(2))
    error = correct.groupby("layer")["x"].std() / np.sqrt(40)
    width = profile.loc[True, "high"] - profile.loc[True, "low"]
    np.testing.assert_allclose(width.drop(2), 2 * 1.96 * error.drop(2), rtol=0.15)
    assert ((profile["low"] < profile["mean"]) & (profile["mean"] < profile["high"])).loc[True].all()
    assert profile.loc[False, ["low", "high"]].isna().all(axis=None)  # four traces make no interval
    with pytest.raises(ValueError, match=r"several rows for \{'trace': 0, 'layer': 0\}"):
        mean_profile(pd.concat([data, data.head(1)]), "x")
    with pytest.raises(ValueError, match="no column 'group'"):
        mean_profile(data, "x", by="group")


def test_traces_without_any_value_do_not_cost_layers() -> None:
    correct, wrong = two_groups(np.random.default_rng(5), 20, 20, 1.0)
    for frame in (correct, wrong):
        frame.loc[frame["trace"] % 10 < 7, "x"] = np.nan
        frame.loc[(frame["trace"] % 10 < 9) & (frame["layer"] == 5), "x"] = np.nan  # a layer that few traces have
    table = compare_groups(correct, wrong, "x").query("matching == 'none'").set_index("layer")
    assert table.loc[5, ["difference", "n_correct"]].isna().all()
    assert (table.drop(5)[["n_correct", "n_wrong", "n_left_out"]] == [6, 6, 28]).all(axis=None)


def test_a_planted_effect_shows_where_it_is() -> None:
    correct, wrong = two_groups(np.random.default_rng(1), 60, 60, 1.5)
    for _, table in compare_groups(correct, wrong, "x").groupby("matching"):
        assert (table["q"] < 0.05).tolist() == [False, False, True, True, True, False]
        assert table["cluster"].tolist() == [0, 0, 1, 1, 1, 0]
        assert table["cluster_p"][table["cluster"] == 1].max() < 0.01
        assert table["cluster_p"][table["cluster"] == 0].isna().all()
        assert ((table["low"] < table["difference"]) & (table["difference"] < table["high"])).all()


@pytest.mark.parametrize("n_draws", [100, pytest.param(500, marks=pytest.mark.nightly)])
def test_p_values_are_uniform_and_intervals_cover(n_draws: int) -> None:
    """No effect in layers 0 to 3, which go together; one of 0.5 in layer 5.

    Wrong traces are the longer ones, and values grow with the length, so that only the matched contrast is right.
    """
    rng = np.random.default_rng(2)
    p_values, clusters, covered, raw_p_values = [], [], 0, []
    for draw in range(n_draws):
        steps = [np.repeat([8, 10, 12], [14, 10, 6]), np.repeat([8, 10, 12], [5, 9, 12])]
        x = []
        for s in steps:
            values = rng.normal(size=(len(s), 1)) + 0.5 * rng.normal(size=(len(s), 6)) + 0.5 * s[:, None]
            values[:, 4] = 0.0  # keeps layer 5 away from the others
            x.append(values)
        x[1][:, 5] += 0.5
        correct, wrong = group(x[0], 0, steps[0]), group(x[1], 100, steps[1])
        table = compare_groups(correct, wrong, "x", n_resamples=299, seed=draw)
        matched = table[table["matching"] == "length"].set_index("layer")
        p_values.append(matched.loc[0, "p"])
        raw_p_values.append(table.query("matching == 'none' and layer == 0")["p"].item())
        clusters.append(matched.loc[:3, "cluster_p"].min())
        covered += matched.loc[5, "low"] <= 0.5 <= matched.loc[5, "high"]
    assert scipy_stats.kstest(p_values, "uniform").pvalue > 0.01
    assert scipy_stats.kstest(raw_p_values, "uniform").pvalue < 1e-6
    error = np.sqrt(
        0.05 * 0.95 / n_draws
    )  # three of them, and two points for percentile intervals of groups this small
    assert 0.95 - 3 * error - 0.02 <= covered / n_draws <= 0.95 + 3 * error
    assert np.mean(np.array(clusters) <= 0.05) <= 0.05 + 3 * error


def test_an_effect_of_length_alone_vanishes_with_matching() -> None:
    rng = np.random.default_rng(3)
    steps = [rng.integers(5, 12, 150), rng.integers(8, 15, 150)]
    correct, wrong = (
        group(s[:, None] * 0.3 + rng.normal(size=(150, 4)), first, s) for s, first in zip(steps, (0, 500), strict=True)
    )
    raw, matched = (t for _, t in compare_groups(correct, wrong, "x", bins=None).groupby("matching", sort=False))
    assert (raw["q"] < 0.001).all()
    assert raw["n_steps_difference"].min() > 2
    assert (matched["p"] > 0.05).all()
    assert matched[["n_steps_difference", "n_tokens_difference"]].abs().max(axis=None) < 1e-9
    n_common = int(sum(np.isin(a, b).sum() for a, b in (steps, steps[::-1])))
    assert (matched["n_correct"] + matched["n_wrong"] == n_common).all()
    assert (matched["n_left_out"] == 300 - n_common).all()


def test_what_bins_leave_of_a_difference_in_length_is_said() -> None:
    rng = np.random.default_rng(13)
    tokens = [np.exp(rng.normal(mean, 0.4, 300)) * 100 for mean in (0.0, 0.5)]
    correct, wrong = (
        group(np.log(t)[:, None], first).assign(n_tokens=t) for t, first in zip(tokens, (0, 500), strict=True)
    )
    options = {"match": ["n_tokens"], "n_resamples": 199}
    tables = {bins: compare_groups(correct, wrong, "x", bins=bins, **options) for bins in (3, 10, 30)}
    of_tokens = [abs(t["n_tokens_difference"].iloc[1]) for t in tables.values()]
    assert np.isclose(tables[3]["n_tokens_difference"].iloc[0], tokens[1].mean() - tokens[0].mean())
    assert of_tokens == sorted(of_tokens, reverse=True)
    assert of_tokens[1] < 0.2 * tables[10]["n_tokens_difference"].iloc[0]
    assert tables[10]["n_left_out"].iloc[1] <= tables[30]["n_left_out"].iloc[1]


def test_layers_that_were_not_compared_break_clusters_and_keep_their_row() -> None:
    correct, wrong = two_groups(np.random.default_rng(14), 60, 60, 1.5)
    correct.loc[correct["layer"] == 3, "x"] = np.nan
    wrong.loc[wrong["layer"] == 3, "x"] = np.nan
    table = compare_groups(correct, wrong, "x").query("matching == 'none'")
    assert table["layer"].tolist() == list(range(6))
    assert table["cluster"].fillna(-1).tolist() == [0, 0, 1, -1, 2, 0]
    assert table["difference"].isna().tolist() == [False, False, False, True, False, False]
    assert table.loc[table["layer"] != 3, "n_left_out"].max() == 0


def test_groups_too_small_for_an_interval_have_none() -> None:
    correct, wrong = two_groups(np.random.default_rng(15), 30, 4, 0.0)
    table = compare_groups(correct, wrong, "x").query("matching == 'none'")
    assert table[["low", "high"]].isna().all(axis=None)
    assert table["p"].notna().all()


def test_no_common_length_gives_nan_and_says_so() -> None:
    rng = np.random.default_rng(4)
    correct, wrong = group(rng.normal(size=(9, 2)), 0, 5), group(rng.normal(size=(9, 2)), 50, 9)
    matched = compare_groups(correct, wrong, "x").query("matching == 'length'")
    assert (matched["n_correct"] == 0).all()
    assert (matched["n_left_out"] == 18).all()
    assert matched[["difference", "low", "p", "q", "hedges_g"]].isna().all(axis=None)


def test_traces_without_a_value_are_left_out_and_counted() -> None:
    correct, wrong = two_groups(np.random.default_rng(5), 20, 20, 0.0)
    correct.loc[correct["trace"] == 3, "x"] = np.nan
    wrong.loc[(wrong["trace"] == 25) & (wrong["layer"] == 1), "x"] = np.nan
    table = compare_groups(correct, wrong, "x")
    assert (table["n_correct"] == 19).all()
    assert (table["n_wrong"] == 19).all()
    assert (table["n_left_out"] == 2).all()


def test_a_number_per_trace_and_a_constant() -> None:
    frame = pd.DataFrame({"trace": range(40), "x": np.r_[np.zeros(20), np.ones(20)], "one": 1.0})
    table = compare_groups(frame[:20], frame[20:], "x", match=())
    assert "layer" not in table
    assert len(table) == 1
    assert table["difference"].item() == pytest.approx(1)
    assert table["cliffs_delta"].item() == 1
    assert table["p"].item() < 0.001
    for value in (1.0, 1 / 3, 0.0):
        constant = compare_groups(frame[:20].assign(c=value), frame[20:-7].assign(c=value), "c", match=())
        assert constant["p"].item() == 1
        assert constant["difference"].item() == 0
        assert np.isnan(constant["hedges_g"].item())


def test_bad_input_is_named() -> None:
    correct, wrong = two_groups(np.random.default_rng(6), 10, 10, 0.0)
    with pytest.raises(ValueError, match="no column 'lock_in'"):
        compare_groups(correct, wrong, "lock_in")
    with pytest.raises(ValueError, match="in both groups"):
        compare_groups(correct, correct, "x")
    with pytest.raises(ValueError, match="several rows for"):
        compare_groups(pd.concat([correct, correct]), wrong, "x")
    with pytest.raises(ValueError, match="no wrong trace"):
        compare_groups(correct, wrong.assign(x=np.nan), "x")
    with pytest.raises(ValueError, match="level=95"):
        compare_groups(correct, wrong, "x", level=95)
    with pytest.raises(ValueError, match="n_resamples=10"):
        compare_groups(correct, wrong, "x", n_resamples=10)
    with pytest.raises(ValueError, match="bins=0"):
        compare_groups(correct, wrong, "x", bins=0)


BACKENDS = ["pyarrow", "numpy_nullable"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", ["numbers", "texts"])
def test_tables_of_any_backend_give_the_same_results(backend: str, names: str) -> None:
    correct, wrong = two_groups(np.random.default_rng(1), 14, 12, 0.8, layers=3)
    correct.loc[4, "x"] = np.nan  # a trace that is left out
    if names == "texts":
        correct, wrong = (frame.assign(trace=frame["trace"].map("trace {}".format)) for frame in (correct, wrong))
    converted = [frame.convert_dtypes(dtype_backend=backend) for frame in (correct, wrong)]
    assert all("numpy" not in type(dtype).__module__ for dtype in converted[0].dtypes)
    options = {"n_resamples": 99, "bins": 3}
    expected = compare_groups(correct, wrong, "x", **options)
    pd.testing.assert_frame_equal(compare_groups(*converted, "x", **options), expected)
    pd.testing.assert_frame_equal(compare_groups(correct, converted[1], "x", **options), expected)  # one of each
    both = pd.concat([correct.assign(correct=True), wrong.assign(correct=False)])
    expected = mean_profile(both, "x", n_resamples=99)
    pd.testing.assert_frame_equal(
        mean_profile(both.convert_dtypes(dtype_backend=backend), "x", n_resamples=99), expected
    )


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("x", ["high"] * 6, r"correct has 'high' in column 'x' \(row 0\), which is \S+: make it numbers"),
        ("x", ["0.5"] * 6, "correct has '0.5' in column 'x'"),
        ("x", [0.5, None, "n/a", 1, 2, 3], r"'n/a' in column 'x' \(row 2\)"),
        ("n_steps", [[3]] * 6, r"correct has \[3\] in column 'n_steps'"),
        (
            "trace",
            pd.array([0, 1, None, 3, 4, 5], "Int64"),
            r"no value in column 'trace' \(row 2\), which tells rows apart",
        ),
    ],
)
def test_columns_that_hold_something_else(column: str, values: object, message: str) -> None:
    correct, wrong = group(np.arange(6.0)[:, None], 0), group(np.arange(6.0)[:, None], 6)
    with pytest.raises(ValueError, match=message):
        compare_groups(correct.assign(**{column: values}), wrong, "x")


@pytest.mark.parametrize(("table", "kind"), [({"trace": [1]}, "builtins.dict"), (np.zeros((2, 2)), "numpy.ndarray")])
def test_what_is_no_table(table: object, kind: str) -> None:
    correct = group(np.arange(6.0)[:, None], 0)
    with pytest.raises(ValueError, match=f"wrong is a {kind}: give a pandas.DataFrame"):
        compare_groups(correct, table, "x")
    with pytest.raises(ValueError, match=f"data is a {kind}"):
        mean_profile(table, "x")


def test_strata_are_bins_or_exact() -> None:
    lengths = pd.DataFrame({"n_steps": [3, 3, 4, 4], "n_tokens": [10, 11, 10, 99]})
    assert len(set(strata_of(lengths, None))) == 4
    many = pd.DataFrame({"n_tokens": np.arange(100)})
    assert np.bincount(strata_of(many, 5)).tolist() == [20] * 5


def test_draws_that_are_kept_change_nothing() -> None:
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"trace": range(60), "n_steps": rng.integers(3, 6, 60), "a": rng.normal(size=60)})
    data["b"] = rng.normal(size=60)
    _kept_draws.cache_clear()
    first = {name: compare_groups(data[:30], data[30:], name, match=["n_steps"], n_resamples=199) for name in "ab"}
    assert _kept_draws.cache_info().hits == 2  # b takes those of a, over all traces and at similar length
    for name, table in first.items():
        _kept_draws.cache_clear()
        again = compare_groups(data[:30], data[30:], name, match=["n_steps"], n_resamples=199)
        pd.testing.assert_frame_equal(table, again)
    other = compare_groups(data[:30], data[30:], "a", match=["n_steps"], n_resamples=199, seed=1)
    assert not np.allclose(other["low"], first["a"]["low"])
