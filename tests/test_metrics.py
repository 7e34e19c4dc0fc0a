"""Flow metrics: against a plain loop, planted effects, invariances, and edge cases that say why they are NaN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.maps import StepSaliency
from stepsal.maps.pooling import pair_counts, pool_steps, reduce_blocks, row_counts
from stepsal.metrics import COLUMNS, METRICS, PARTS, SCALARS, SUMMARY_PARTS, describe, flow_metrics, trace_metrics
from stepsal.metrics.table import CAUSES, LAYER_METRICS, TRACE_METRICS
from stepsal.stats import compare_groups
from stepsal.tasks import chain

N_LAYERS = 8
OF_THINKING = (*PARTS, "lock_in", "reach_steps", "reach_tokens", "reach_ratio")
USE_OF_THINKING = ("summary_thinking", "thinking_deficit", "summary_thinking_change")


def labelled(
    token_map: torch.Tensor | None,
    lengths: list[int],
    roles: list[str],
    *,
    reduce: str = "density",
    values: torch.Tensor | None = None,
    template: int = 2,
    layers: tuple[int, ...] = tuple(range(N_LAYERS)),
) -> StepSaliency:
    """A StepSaliency of a token map [layer, pos, pos] (or of `values`), `template` tokens before everything."""
    ids = torch.cat([torch.full((template,), -1), *(torch.full((n,), i) for i, n in enumerate(lengths))])
    if values is None:
        assert token_map is not None
        sums = pool_steps(token_map, ids, len(lengths))
        values = reduce_blocks(sums, pair_counts(ids, len(lengths)), row_counts(ids, len(lengths)), reduce)
    return StepSaliency(
        values=values.float(), layers=layers, n_layers=N_LAYERS, model_name="planted", target="token", reduce=reduce,
        roles=tuple(roles), step_texts=("x",) * len(roles), step_lengths=tuple(lengths), step_ids=ids,
        token_texts=("t",) * len(ids),
    )  # fmt: skip


def roles(n_thinking: int, n_summary: int) -> list[str]:
    return ["question"] + ["thinking"] * n_thinking + ["summary"] * n_summary


def random_map(seed: int, lengths: list[int], reduce: str) -> StepSaliency:
    n = sum(lengths) + 2
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(N_LAYERS, n, n, generator=generator, dtype=torch.float64).pow(4).tril()
    return labelled(tokens, lengths, roles(len(lengths) - 3, 2), reduce=reduce)


@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(2, 9), min_size=8, max_size=12),
    reduce=st.sampled_from(["density", "mass"]),
)
def test_shares_equal_a_loop_over_cells(seed: int, lengths: list[int], reduce: str) -> None:
    saliency = random_map(seed, lengths, reduce)
    table = flow_metrics(saliency, last=2)
    n_thinking = len(lengths) - 3
    for position in (0, N_LAYERS - 1):
        values = saliency.values[position].double().numpy()
        expected: dict[str, list[float]] = {
            name: [] for name in (*PARTS, *SUMMARY_PARTS, "summary_last", "reach_steps")
        }
        for i in range(3, 1 + n_thinking):
            row = values[i] / values[i].sum()
            expected["own"].append(row[i])
            expected["previous"].append(row[i - 1])
            expected["earlier"].append(sum(row[j] for j in range(1, i - 1)))
            expected["question"].append(row[0])
            expected["reach_steps"].append(sum(row[j] * (i - j) for j in range(i + 1)))
        for i in range(1 + n_thinking, len(lengths)):
            row = values[i] / values[i].sum()
            expected["summary_thinking"].append(sum(row[1 : 1 + n_thinking]))
            expected["summary_question"].append(row[0])
            expected["summary_summary"].append(sum(row[1 + n_thinking :]))
            expected["summary_last"].append(sum(row[n_thinking - 1 : n_thinking + 1]))
        for name, shares in expected.items():
            assert table.loc[position, name] == pytest.approx(np.mean(shares), rel=1e-5), name
    assert np.allclose(table[list(PARTS)].sum(1), 1)
    assert np.allclose(table[list(SUMMARY_PARTS)].sum(1), 1)
    assert (table["reason"] == "").all()


@given(lengths=st.lists(st.integers(2, 9), min_size=8, max_size=12), reduce=st.sampled_from(["density", "mass"]))
def test_uniform_attention_shows_neither_failure_whatever_the_lengths(lengths: list[int], reduce: str) -> None:
    n = sum(lengths) + 2
    saliency = labelled(torch.ones(N_LAYERS, n, n).tril(), lengths, roles(len(lengths) - 3, 2), reduce=reduce)
    table = flow_metrics(saliency)
    for name in ("lock_in", "thinking_deficit", "decay_slope", "summary_thinking_change"):
        assert np.allclose(table[name], 0, atol=1e-6), name
    assert np.allclose(table["reach_ratio"], 1, atol=1e-6)


def test_sections_that_alternate_equal_a_loop_over_cells() -> None:
    """Thinking that begins again behind a part of the summary: no row sees what comes after it."""
    order = "QTTTTSSTTTSS"
    names = {"Q": "question", "T": "thinking", "S": "summary"}
    lengths = [4, 5, 3, 6, 2, 3, 4, 5, 3, 2, 6, 4]
    n = sum(lengths) + 2
    tokens = torch.rand(N_LAYERS, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(4).tril()
    saliency = labelled(tokens, lengths, [names[c] for c in order])
    table, uniform = (
        flow_metrics(saliency, last=2),
        labelled(torch.ones(N_LAYERS, n, n).tril(), lengths, saliency.roles),
    )
    values, even = saliency.values[0].double().numpy(), uniform.values[0].double().numpy()
    share, even = values / values.sum(-1, keepdims=True), even / even.sum(-1, keepdims=True)
    thinking = [i for i, c in enumerate(order) if c == "T"]
    parts, last, slopes = [], [], []
    for i in thinking[2:]:
        previous = max(j for j in thinking if j < i)
        parts.append(
            [share[i, i], share[i, previous], sum(share[i, j] for j in range(1, i) if j != previous), share[i, 0]]
        )
    for i in (i for i, c in enumerate(order) if c == "S"):
        before = [j for j in thinking if j < i]
        last.append(share[i, before[-2:]].sum())
        x, y = -np.arange(len(before)), np.log(share[i, before] / even[i, before])
        slopes.append(np.polyfit(x, y, 1)[0])
    assert table.loc[0, list(PARTS)].tolist() == pytest.approx(np.mean(parts, axis=0).tolist())
    assert sum(table.loc[0, list(PARTS)]) == pytest.approx(1)
    assert sum(table.loc[0, list(SUMMARY_PARTS)]) == pytest.approx(1)
    assert table.loc[0, "summary_last"] == pytest.approx(np.mean(last))
    assert table.loc[0, "decay_slope"] == pytest.approx(np.mean(slopes))


def test_reach_in_tokens_is_the_mean_distance_of_tokens() -> None:
    lengths = [5, 3, 4, 2, 6, 3, 4]
    saliency = random_map(0, lengths, "mass")
    n = sum(lengths) + 2
    ids = saliency.step_ids.numpy()
    table, values = flow_metrics(saliency), saliency.values.double().numpy()
    distance = np.arange(n)[:, None] - np.arange(n)
    for position in (0, 5):
        reaches = []
        for i in range(3, 5):
            total = 0.0
            for j in range(i + 1):
                pairs = [
                    distance[t, k]
                    for t in range(n - 1) if ids[t] == i
                    for k in range(t + 1) if ids[k] == j
                ]  # fmt: skip
                total += values[position, i, j] / values[position, i].sum() * np.mean(pairs)
            reaches.append(total)
        assert table.loc[position, "reach_tokens"] == pytest.approx(np.mean(reaches), rel=1e-5)


@pytest.mark.parametrize("excess", [-0.1, 0.0, 0.25])
def test_planted_lock_in_is_recovered(excess: float) -> None:
    n_thinking = 6
    values = torch.zeros(N_LAYERS, n_thinking + 2, n_thinking + 2, dtype=torch.float64)
    for i in range(n_thinking + 2):
        values[:, i, : i + 1] = 1 / (i + 1)
    for i in range(3, n_thinking + 1):  # shallow layers only: more on i and i - 1, less on all else
        values[:2, i, i - 1 : i + 1] += excess / 2
        values[:2, i, : i - 1] -= excess / (i - 1)
    saliency = labelled(None, [4] * (n_thinking + 2), roles(n_thinking, 1), values=values)
    table = flow_metrics(saliency)
    assert table["lock_in"].tolist() == pytest.approx([excess] * 2 + [0.0] * 6, abs=1e-6)
    assert trace_metrics(saliency)["shallow_lock_in"] == pytest.approx(excess, abs=1e-6)


@pytest.mark.parametrize("slope", [-0.3, 0.0, 0.2])
def test_planted_decay_is_recovered(slope: float) -> None:
    n_thinking = 7
    values = torch.ones(N_LAYERS, n_thinking + 3, n_thinking + 3, dtype=torch.float64).tril()
    distance = torch.arange(n_thinking).flip(0)
    values[6:, n_thinking + 1 :, 1 : n_thinking + 1] = torch.exp(slope * distance.double())
    saliency = labelled(None, [3] * (n_thinking + 3), roles(n_thinking, 2), values=values)
    table = flow_metrics(saliency)
    assert table["decay_slope"].tolist() == pytest.approx([0.0] * 6 + [slope] * 2, abs=1e-6)
    scalars = trace_metrics(saliency)
    assert np.sign(scalars["deep_decay"]) == np.sign(-slope) or slope == 0
    assert scalars["deep_decay"] == pytest.approx(scalars["deep_fade"], abs=1e-6)  # the middle layers are uniform


def test_scaling_a_row_changes_nothing() -> None:
    saliency = random_map(3, [4, 3, 5, 2, 6, 3, 4, 5], "density")
    factors = torch.rand(N_LAYERS, saliency.n_steps, 1) * 9 + 0.1
    scaled = labelled(None, list(saliency.step_lengths), list(saliency.roles), values=saliency.values * factors)
    a, b = flow_metrics(saliency), flow_metrics(scaled)
    names = [c for c in COLUMNS if "intensity" not in c]
    np.testing.assert_allclose(a[names], b[names], rtol=1e-4, atol=1e-6)
    normalised = flow_metrics(saliency.row_normalised())
    np.testing.assert_allclose(a[names], normalised[names], rtol=1e-4, atol=1e-6)
    assert normalised[["analysis_intensity", "final_intensity", "intensity_ratio"]].isna().all(axis=None)
    assert normalised["reason"].str.contains("normalised").all()


def test_intensities_are_means_of_blocks() -> None:
    saliency = random_map(4, [4, 3, 5, 2, 6, 3, 4, 5], "density")
    table, values = flow_metrics(saliency), saliency.values.numpy()
    thinking = [values[:, i, j] for i in range(1, 6) for j in range(1, i + 1)]
    summary = [values[:, i, j] for i in (6, 7) for j in range(6, i + 1)]
    np.testing.assert_allclose(table["analysis_intensity"], np.mean(thinking, axis=0), rtol=1e-6)
    np.testing.assert_allclose(table["final_intensity"], np.mean(summary, axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        table["intensity_ratio"], np.mean(summary, axis=0) / np.mean(thinking, axis=0), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("n_thinking", "n_summary", "missing", "reason"),
    [
        (1, 1, [*OF_THINKING, "decay_slope", "summary_last"], "thinking has 1 steps"),
        (
            0, 1,
            [*OF_THINKING, *USE_OF_THINKING, "decay_slope", "summary_last", "analysis_intensity", "intensity_ratio"],
            "there is no thinking",
        ),
        (
            5, 0,
            ["summary_question", "summary_summary", *USE_OF_THINKING, "decay_slope", "summary_last",
             "final_intensity", "intensity_ratio"],
            "there is no summary",
        ),
        (3, 1, ["summary_last"], "summary_last needs more than 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_nan_with_a_reason(
    n_thinking: int, n_summary: int, missing: list[str], reason: str
) -> None:
    lengths = [4] * (1 + n_thinking + n_summary)
    n = sum(lengths) + 2
    saliency = labelled(torch.rand(N_LAYERS, n, n).tril(), lengths, roles(n_thinking, n_summary))
    table = flow_metrics(saliency)
    assert table[missing].isna().all(axis=None)
    assert table["reason"].str.contains(reason).all()
    defined = table[list(COLUMNS)].notna().any()
    assert set(defined.index[~defined]) == set(missing)


def test_every_nan_has_a_reason_and_rows_without_saliency_are_left_out() -> None:
    saliency = random_map(5, [4, 3, 5, 2, 6, 3, 4, 5], "density")
    values = saliency.values.clone()
    values[2, 3] = 0  # a thinking row of layer 2
    values[3, 3:6] = 0  # all of layer 3
    values[4, 6:] = 0  # all summary rows of layer 4
    emptied = labelled(None, list(saliency.step_lengths), list(saliency.roles), values=values)
    table, full = flow_metrics(emptied), flow_metrics(saliency)
    nan = table[list(COLUMNS)].isna().any(axis=1)
    assert nan.tolist() == [i in (3, 4) for i in range(N_LAYERS)]
    assert ((table["reason"] != "") == nan).all()
    assert table["n_thinking_rows"].tolist() == [3, 3, 2, 0, 3, 3, 3, 3]
    assert table["n_summary_rows"].tolist() == [2, 2, 2, 2, 0, 2, 2, 2]
    assert table.loc[0, "own"] == full.loc[0, "own"]
    row = values[2, 4:6].double()
    assert table.loc[2, "question"] == pytest.approx(float((row[:, 0] / row.sum(1)).mean()), rel=1e-5)


def test_a_last_step_of_one_token_predicts_nothing_and_is_no_zero() -> None:
    lengths = [4, 3, 5, 2, 6, 1]
    n = sum(lengths) + 2
    saliency = labelled(torch.rand(N_LAYERS, n, n).tril(), lengths, roles(4, 1))
    table = flow_metrics(saliency)
    assert table[["summary_question", "final_intensity", "intensity_ratio"]].isna().all(axis=None)
    assert table["reason"].str.contains("no summary step predicts a token").all()
    with_two = labelled(torch.rand(N_LAYERS, n, n).tril(), lengths, roles(3, 2))
    values = with_two.values.double().numpy()
    np.testing.assert_allclose(flow_metrics(with_two)["final_intensity"], values[:, 4, 4], rtol=1e-6)


def test_saliency_of_exactly_zero_is_no_lack_of_decay() -> None:
    values = torch.ones(N_LAYERS, 8, 8, dtype=torch.float64).tril()
    values[0, 7, 1:4] = 0  # a sliding window hides the early steps
    table = flow_metrics(labelled(None, [4] * 8, roles(6, 1), values=values))
    assert np.isnan(table.loc[0, "decay_slope"])
    assert "every one of at least two thinking steps" in table.loc[0, "reason"]
    assert table.loc[1, "decay_slope"] == pytest.approx(0, abs=1e-9)


def test_bands_that_were_not_computed_whole_are_a_reason() -> None:
    n = 4 * 8 + 2
    token_map = torch.rand(3, n, n).tril()
    saliency = labelled(token_map, [4] * 8, roles(5, 2), layers=(0, 1, 7))
    scalars = trace_metrics(saliency)
    assert np.isfinite(scalars["shallow_lock_in"])
    assert np.isnan(scalars["deep_decay"])
    assert "not all layers of the deep band" in scalars["reason"]
    assert flow_metrics(saliency)["reason"].str.contains("middle half").all()
    with pytest.raises(ValueError, match="last=0"):
        flow_metrics(saliency, last=0)


class TestTable:
    """The table of metrics, from which columns and documentation come."""

    def test_describes_every_column(self) -> None:
        table = describe()
        assert list(table) == ["name", "of", "formula", "range", "undefined"]
        assert table["name"].is_unique
        assert tuple(table["name"][table["of"] == "layer"]) == COLUMNS
        assert tuple(table["name"][table["of"] == "trace"]) == SCALARS
        assert len(table) == len(METRICS)
        assert (table.drop(columns="name").map(len) > 0).all(axis=None)
        saliency = random_map(0, [4, 3, 5, 2, 6, 3], "density")
        rows = ["n_thinking_rows", "n_summary_rows"]
        columns = ["trace", "layer", *COLUMNS, *rows, "n_steps", "n_tokens", "reason"]
        assert list(flow_metrics(saliency)) == columns
        assert list(trace_metrics(saliency).index) == [*SCALARS, "reason"]

    def test_parts_are_those_that_sum_to_one(self) -> None:
        assert PARTS == ("own", "previous", "earlier", "question")
        assert set(SUMMARY_PARTS) <= set(COLUMNS)

    def test_every_cause_belongs_to_a_metric_and_stands_in_the_table(self) -> None:
        assert {cause for metric in LAYER_METRICS for cause in metric.causes} == set(CAUSES)
        table = describe().set_index("name")
        for metric in LAYER_METRICS:
            assert metric.causes
            assert all(cause.when in table.loc[metric.name, "undefined"] for cause in metric.causes)
        for scalar in TRACE_METRICS:
            assert scalar.column in COLUMNS
            assert scalar.column in table.loc[scalar.name, "formula"]

    @given(
        seed=st.integers(0, 1000), n_thinking=st.integers(0, 5), n_summary=st.integers(0, 2),
        emptied=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12), last=st.integers(1, 4),
        reduce=st.sampled_from(["density", "mass"]), normalise=st.booleans(),
    )  # fmt: skip
    def test_values_lie_in_their_range_and_are_undefined_for_their_causes_alone(
        self, seed: int, n_thinking: int, n_summary: int, emptied: list, last: int, reduce: str, normalise: bool
    ) -> None:
        lengths = [4] * (1 + n_thinking + n_summary)
        n = sum(lengths) + 2
        tokens = torch.rand(N_LAYERS, n, n, generator=torch.Generator().manual_seed(seed)).tril()
        saliency = labelled(tokens, lengths, roles(n_thinking, n_summary), reduce=reduce)
        for layer, step in emptied:
            saliency.values[layer, step % saliency.n_steps] = 0
        saliency = saliency.row_normalised() if normalise else saliency
        table = flow_metrics(saliency, last=last)
        for metric in LAYER_METRICS:
            low = -1 if metric.range.startswith("-1..1") else -np.inf if metric.range.startswith("nats") else 0
            high = 1 if "..1" in metric.range else np.inf
            values = table[metric.name].dropna()
            assert values.between(low - 1e-9, high + 1e-9).all(), metric.name
            reasons = [cause.reason.format(n_thinking=n_thinking, last=last) for cause in metric.causes]
            named = table["reason"].map(lambda text, reasons=reasons: bool(set(text.split("; ")) & set(reasons)))
            assert (named == table[metric.name].isna()).all(), metric.name


def test_on_a_real_trace(mini: TransformerBridge) -> None:
    trace = stepsal.generate(mini, chain.sample(3, length=5).question)
    for reduce in ("density", "mass"):
        saliency = stepsal.step_saliency(mini, trace, reduce=reduce)
        table = flow_metrics(saliency)
        assert table["layer"].tolist() == list(range(8))
        assert table[list(COLUMNS)].notna().all(axis=None)
        assert np.allclose(table[list(PARTS)].sum(1), 1)
        assert trace_metrics(saliency)["reason"] == ""


class TestContrast:
    """The table of a map is one that contrasts take as it is."""

    def test_two_maps_are_compared_by_the_defaults(self) -> None:
        a, b = (random_map(seed, [4, 3, 5, 2, 6, 3], "density") for seed in (0, 1))
        table = compare_groups(flow_metrics(a), flow_metrics(b), "lock_in", n_resamples=99)
        none = table[table["matching"] == "none"]
        expected = flow_metrics(b)["lock_in"] - flow_metrics(a)["lock_in"]
        np.testing.assert_allclose(none["difference"], expected, atol=1e-12)
        assert (none[["n_steps_difference", "n_tokens_difference"]] == 0).all(axis=None)

    def test_lengths_are_those_of_the_trace(self, mini: TransformerBridge) -> None:
        trace = stepsal.Trace.from_text("Anna is 3. What is Anna?", " Anna needs nothing.</think> It is 3.", mini)
        table = flow_metrics(stepsal.step_saliency(mini, trace))
        assert (table["n_steps"] == len(trace.steps)).all()
        assert (table["n_tokens"] == len(trace)).all()

    def test_a_number_in_a_population_tells_traces_apart_else_their_content(self) -> None:
        a, b = (random_map(seed, [4, 3, 5, 2, 6, 3], "density") for seed in (0, 1))
        same, other = (flow_metrics(saliency)["trace"].iloc[0] for saliency in (replace(a, layers=a.layers), b))
        assert flow_metrics(a)["trace"].unique().tolist() == [same]
        assert same != other
        assert flow_metrics(replace(a, metadata={"trace": 7}))["trace"].unique().tolist() == [7]
