"""The prepared state of each plot, the artists on the Axes, and labels that do not collide."""

import subprocess
import sys
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.patches import PathPatch

from stepsal import plots
from stepsal.maps import StepSaliency
from stepsal.maps.pooling import pair_counts, pool_steps, reduce_blocks, row_counts
from stepsal.plots.ticks import fitted_log_ticks, fitted_step_ticks, log_label, place_labels, step_ticks, text_width


def make(n_thinking=14, n_summary=1, layers=(0, 3, 7), n_layers=8, keep_tokens=True) -> StepSaliency:
    """Random saliency with template tokens before, between and after question, thinking and summary."""
    roles = ("question", *["thinking"] * n_thinking, *["summary"] * n_summary)
    lengths = (9, *[3] * (n_thinking + n_summary))
    ids = [-1, -1, *[0] * 9, -1]
    for step in range(1, len(roles)):
        ids += [-1] * (step == n_thinking + 1) + [step] * 3
    step_ids = torch.tensor(ids)
    n_pos, n_steps = len(ids), len(roles)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(len(layers), n_pos, n_pos, generator=generator).mul(1.5).exp().mul(1e-4).tril()
    pairs, rows = pair_counts(step_ids, n_steps), row_counts(step_ids, n_steps)
    return StepSaliency(
        values=reduce_blocks(pool_steps(tokens, step_ids, n_steps), pairs, rows, "density"),
        layers=layers,
        n_layers=n_layers,
        model_name="random",
        target="token",
        reduce="density",
        roles=roles,
        step_texts=("text",) * n_steps,
        step_lengths=lengths,
        step_ids=step_ids,
        token_texts=("t",) * n_pos,
        token_values=tokens if keep_tokens else None,
    )


@pytest.fixture
def ax():
    with plots.style():
        fig, axes = plt.subplots(figsize=(plots.SINGLE_COLUMN, 3.1), layout="constrained")
        yield axes
        plt.close(fig)


def child(ax, label):
    return next(axes for axes in ax.child_axes if axes.get_label() == label)


def cells(ax):
    """What the cells of a map are drawn by: a mesh, or an image where there are many."""
    (mappable,) = [*ax.images, *(artist for artist in ax.collections if isinstance(artist, QuadMesh))]
    return mappable


def drawn_boxes(texts):
    """Boxes of the visible texts on the rendered canvas."""
    renderer = texts[0].figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]


def overlapping(boxes):
    return [(i, j) for j in range(len(boxes)) for i in range(j) if boxes[i].overlaps(boxes[j])]


# ---------------------------------------------------------------------------------------------- prepared state


def test_map_view_masks_the_future_and_finds_the_bands():
    view = plots.map_view(np.ones((4, 4)), ["question", "thinking", "thinking", "summary"])
    assert np.array_equal(view.values.mask, np.triu(np.ones((4, 4)), 1).astype(bool))
    assert [(span.role, span.start, span.stop) for span in view.spans] == [
        ("question", 0, 1),
        ("thinking", 1, 3),
        ("summary", 3, 4),
    ]
    assert view.separators == [1, 3]
    with pytest.raises(ValueError, match="one role per row"):
        plots.map_view(np.ones((3, 4)), ["thinking"] * 3)


def test_template_gaps_do_not_double_the_separators():
    view = plots.map_view(np.ones((6, 6)), ["template", "question", "question", "template", "thinking", "summary"])
    assert view.separators == [4, 5]


def test_flow_view_takes_the_strongest_sources_of_each_step():
    values = np.tril([[1, 0, 0, 0], [3, 1, 0, 0], [0, 1, 3, 0], [1, 4, 2, 1]]).astype(float)
    view = plots.flow_view(values, ["question", "thinking", "thinking", "summary"], top_k=2)
    arcs = {(int(k), int(q)): share for k, q, share in zip(view.key_steps, view.query_steps, view.shares, strict=True)}
    assert arcs == {(0, 1): 0.75, (1, 2): 0.25, (1, 3): 0.5, (2, 3): 0.25}  # no own step, and no arc without saliency
    assert (np.diff(view.shares) >= 0).all()
    assert view.labels == ("Q", "1", "2", "S")
    with pytest.raises(ValueError, match="top_k=0"):
        plots.flow_view(values, ["thinking"] * 4, top_k=0)


def test_several_summary_steps_are_numbered():
    view = plots.flow_view(np.eye(4), ["question", "thinking", "summary", "summary"])
    assert view.labels == ("Q", "1", "S1", "S2")
    assert view.shares.size == 0


def test_shared_norm_spans_all_maps_above_the_floor():
    first, second = np.tril(np.geomspace(1e-6, 1e-3, 16).reshape(4, 4)), np.array([[0.0, 0.0], [0.02, 1e-12]])
    norm = plots.shared_norm([first, second], quantile_floor=0.1)
    positive = np.concatenate([first[first > 0], second[second > 0]])
    assert (norm.vmin, norm.vmax) == (pytest.approx(np.quantile(positive, 0.1)), 0.02)
    saliency = make()
    assert plots.shared_norm(saliency).vmax == plots.shared_norm([saliency.values[0], *saliency.values[1:]]).vmax
    constant = plots.shared_norm([np.ones((2, 2))])
    assert constant.vmin < constant.vmax == 1
    with pytest.raises(ValueError, match="no map has a positive value"):
        plots.shared_norm([np.zeros((2, 2))])
    with pytest.raises(ValueError, match="quantile_floor=5"):
        plots.shared_norm([first], quantile_floor=5)


@given(st.integers(1, 10_000), st.integers(1, 12))
def test_ticks_are_few_and_inside(n, at_most):
    ticks = step_ticks(n, at_most)
    assert ticks[0] == 0
    assert ticks[-1] < n
    assert 1 <= len(ticks) <= at_most + 1
    assert n <= 2 or len(set(np.diff(ticks))) <= 1


@given(st.integers(1, 10_000), st.floats(20, 400))
def test_numbers_of_steps_have_room(n, length):
    ticks = fitted_step_ticks(n, length, 7.0)
    widest = max(text_width(str(tick), 7.0) for tick in ticks)
    assert len(ticks) == 1 or np.diff(ticks).min() / n * length > widest


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(1, 30)), min_size=1, max_size=5))
def test_labels_are_placed_apart_and_inside(labels):
    labels.sort()
    centres, widths = zip(*labels, strict=True)
    placed = place_labels(centres, widths, 100.0)
    assert (placed is None) == (sum(widths) > 100)
    assume(placed is not None)
    edges = [edge for c, w in zip(placed, widths, strict=True) for edge in (c - w / 2, c + w / 2)]
    assert np.all(np.diff([0, *edges, 100]) >= -1e-9)


@given(st.floats(-9, 3), st.floats(0.05, 6), st.floats(20, 200))
@settings(max_examples=50)  # widths of mathematical text take their time
def test_colour_bar_labels_have_room(exponent, decades, length):
    low, high = 10**exponent, 10 ** (exponent + decades)
    ticks = fitted_log_ticks(low, high, length, 6.0)
    at = np.log(np.array(ticks) / low) / np.log(high / low) * length
    assert 1 <= len(ticks) <= 4
    assert low * 0.999 <= ticks[0] <= ticks[-1] <= high * 1.001
    widths = np.array([text_width(log_label(tick), 6.0) for tick in ticks])
    assert len(ticks) < 2 or np.all(np.diff(at) > (widths[1:] + widths[:-1]) / 2 + 2)


def test_role_labels_are_shortened_or_dropped_when_there_is_no_room():
    view = plots.map_view(np.eye(4), ["question", "thinking", "template", "summary"])
    names = [plots.role_labels(view, length, 7.0)[1] for length in (200, 40, 10)]
    assert names == [["Q", "Thinking", "Summary"], ["Q", "T", "S"], []]


# --------------------------------------------------------------------------------------------------- step maps


@pytest.mark.parametrize(
    ("layers", "rows"), [(3, [1]), (-1, [2]), ([0, 7], [0, 2]), ("shallow", [0]), ("all", [0, 1, 2])]
)
def test_step_map_shows_the_mean_of_the_layers(ax, layers, rows):
    saliency = make()
    assert plots.step_map(saliency, layers, ax=ax) is ax
    image = cells(ax)
    shown = image.get_array()
    expected = np.maximum(saliency.values[rows].mean(0).numpy(), image.norm.vmin)
    np.testing.assert_allclose(shown[np.tril_indices(16)], expected[np.tril_indices(16)], rtol=1e-6)
    assert shown.mask[np.triu_indices(16, 1)].all()
    assert isinstance(image.norm, LogNorm)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key step", "query step")
    assert ax.get_ylim() == (16, 0)  # the first step is on top


def test_zero_saliency_has_the_first_colour_not_the_background(ax):
    values = np.tril(np.full((3, 3), 0.1))
    values[2, 0] = 0
    plots.step_map(values, roles=["question", "thinking", "summary"], norm=LogNorm(0.01, 1), ax=ax)
    assert cells(ax).get_array()[2, 0] == 0.01


@pytest.mark.parametrize("draw", [plots.step_map, plots.token_map, plots.flow_arcs])
def test_bare_maps_need_roles_and_saliency_has_them(ax, draw):
    with pytest.raises(ValueError, match="give roles="):
        draw(np.eye(3), ax=ax)
    with pytest.raises(ValueError, match="leave out layers="):
        draw(np.eye(3), "deep", roles=["thinking"] * 3, ax=ax)
    with pytest.raises(ValueError, match="leave out roles="):
        draw(make(), roles=make().roles, ax=ax)


def test_a_layer_that_was_not_computed_is_refused(ax):
    with pytest.raises(ValueError, match="layer 5 was not computed"):
        plots.step_map(make(), 5, ax=ax)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_role_strips_have_the_colours_and_names_of_the_roles(ax, axis):
    plots.step_map(make(5, 2), 0, ax=ax)
    ax.figure.canvas.draw()
    strip = child(ax, f"roles {axis}")
    codes = strip.images[0].get_array().ravel()
    colours = strip.images[0].cmap(strip.images[0].norm(codes))
    roles = ["question", *["thinking"] * 5, *["summary"] * 2]
    np.testing.assert_allclose(colours, [to_rgba(plots.ROLE_COLORS[role]) for role in roles])
    labels = strip.get_xticklabels() if axis == "x" else strip.get_yticklabels()
    assert [label.get_text() for label in labels] == ["Q", "Thinking", "Summary"]


@pytest.mark.parametrize("n_thinking", [1, 3, 14, 57, 196])
@pytest.mark.parametrize("width", [1.6, 2.2, 3.3])
def test_labels_never_overlap(n_thinking, width):
    with plots.style():
        fig, ax = plt.subplots(figsize=(width, width * 0.95), layout="constrained")
        ax.set_title("deep layers")
        plots.step_map(make(n_thinking, 2, layers=(0,)), 0, ax=ax)
        fig.canvas.draw()
        strips = child(ax, "roles x").get_xticklabels() + child(ax, "roles y").get_yticklabels()
        texts = [*strips, *ax.get_xticklabels(), *ax.get_yticklabels(), ax.title, ax._left_title, *ax.texts]
        texts += [ax.xaxis.label, ax.yaxis.label]
        boxes = drawn_boxes(texts)
        assert len(boxes) >= 10
        slack = 2 / 72 * fig.dpi  # two points: hinting widens text
        for box in drawn_boxes(child(ax, "roles x").get_xticklabels()):
            assert ax.bbox.x0 - slack <= box.x0 < box.x1 <= ax.bbox.x1 + slack
        for box in drawn_boxes(child(ax, "roles y").get_yticklabels()):
            assert ax.bbox.y0 - slack <= box.y0 < box.y1 <= ax.bbox.y1 + slack
        assert not overlapping(boxes)
        assert all(fig.bbox.padded(1).containsx(b.x0) and fig.bbox.padded(1).containsx(b.x1) for b in boxes)
        plt.close(fig)


def test_the_colour_bar_says_what_is_shown(ax):
    attention = replace(make(), target="attention")
    for saliency, title in (
        (make(), "saliency"),
        (replace(make(), reduce="mass"), "saliency, summed"),
        (make().row_normalised(), "share of its row"),
        (attention, "attention"),
        (attention.row_normalised(), "share of its row"),
    ):
        ax.clear()
        plots.step_map(saliency, 0, ax=ax)
        assert child(ax, "colorbar").get_title() == title


def test_labels_and_colorbar_can_be_left_out(ax):
    plots.step_map(make(), 0, ax=ax, labels=False, colorbar=False)
    assert [axes.get_label() for axes in ax.child_axes] == ["roles x", "roles y"]
    assert not child(ax, "roles x").get_xticklabels()


def test_panels_share_a_norm():
    saliency = make()
    norm = plots.shared_norm(saliency)
    fig, axes = plt.subplots(1, 2)
    for ax, layer in zip(axes, (0, 7), strict=True):
        plots.step_map(saliency, layer, ax=ax, norm=norm)
    assert cells(axes[0]).norm is cells(axes[1]).norm
    plt.close(fig)


def test_token_map_shows_tokens_and_their_roles(ax):
    saliency = make()
    plots.token_map(saliency, "deep", ax=ax)
    n_pos = len(saliency.token_texts)
    assert cells(ax).get_array().shape == (n_pos, n_pos)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key position", "query position")
    codes = child(ax, "roles x").images[0].get_array().ravel()
    template = list(plots.ROLE_COLORS).index("template")
    assert np.array_equal(codes == template, saliency.step_ids.numpy() == -1)
    with pytest.raises(ValueError, match="token_values were not kept"):
        plots.token_map(make(keep_tokens=False), 0, ax=ax)


# ------------------------------------------------------------------------------------------------- flow arcs


@pytest.mark.parametrize("n_thinking", [2, 14, 97])
def test_flow_arcs_draws_the_prepared_arcs(ax, n_thinking):
    saliency = make(n_thinking, layers=(0,))
    plots.flow_arcs(saliency, 0, ax=ax, top_k=2)
    view = plots.flow_view(saliency.layer(0), saliency.roles, top_k=2)
    arcs = [patch for patch in ax.patches if isinstance(patch, PathPatch)]
    assert len(arcs) == len(view.shares) == 2 * (n_thinking + 2) - 3
    for arc, key, query in zip(arcs, view.key_steps, view.query_steps, strict=True):
        ends = arc.get_path().vertices[[0, -1]]
        assert ends.tolist() == [[key, 0], [query, 0]]
        assert arc.get_edgecolor()[:3] == to_rgba(plots.ROLE_COLORS[view.roles[key]])[:3]
    widths = [arc.get_linewidth() for arc in arcs]
    assert widths == sorted(widths)
    nodes = ax.collections[0]
    assert len(nodes.get_offsets()) == n_thinking + 2
    ax.figure.canvas.draw()
    texts = [text.get_text() for text in ax.texts]
    assert texts[0] == "Q"
    assert "S" in texts
    assert len(texts) <= 40
    assert not overlapping(drawn_boxes(ax.texts))


def test_arcs_stay_inside_the_axes(ax):
    values = np.tril(np.zeros((9, 9)))
    values[8, 0] = 1.0
    plots.flow_arcs(values, roles=["question", *["thinking"] * 7, "summary"], ax=ax)
    (arc,) = ax.patches
    curve = arc.get_path().interpolated(1).to_polygons(closed_only=False)[0]
    assert curve[:, 1].max() <= ax.get_ylim()[1]


# --------------------------------------------------------------------------------------------- layer profile


def profile(**columns):
    return pd.DataFrame(
        {"layer": [0, 1, 2, 3] * 2, "intensity": np.arange(8.0), "group": ["wrong"] * 4 + ["correct"] * 4} | columns
    )


def test_profile_view_sorts_each_line_and_shades_the_ends():
    data = profile(low=np.arange(8.0) - 1, high=np.arange(8.0) + 1).sample(frac=1, random_state=0)
    view = plots.profile_view(data, "intensity", hue="group", low="low", high="high", n_layers=4)
    lines = dict(iter(view.table.groupby("name")))
    assert lines["correct"]["at"].tolist() == [0, 1, 2, 3]
    assert lines["correct"]["value"].tolist() == [4, 5, 6, 7]
    assert lines["wrong"][["low", "high"]].to_numpy().T.tolist() == [[-1, 0, 1, 2], [1, 2, 3, 4]]
    assert view.colors == plots.GROUP_COLORS
    assert view.bands == (("shallow", 0, 0), ("deep", 3, 3))
    one = plots.profile_view(data[data["group"] == "wrong"], "intensity")
    assert set(one.table["name"]) == {""}
    assert one.table["low"].isna().all()
    assert one.bands == ()


def lines_of(ax):
    """Drawn lines by colour; seaborn's entries of the legend have no points."""
    return {to_rgba(line.get_color()): line for line in ax.lines if len(line.get_xdata())}


def test_layer_profile_draws_a_line_per_hue(ax):
    data = profile(low=np.arange(8.0) - 1, high=np.arange(8.0) + 1).sample(frac=1, random_state=0)
    plots.layer_profile(data, "intensity", hue="group", low="low", high="high", n_layers=4, ax=ax)
    lines = lines_of(ax)
    assert set(lines) == {to_rgba(color) for color in plots.GROUP_COLORS.values()}
    correct, wrong = (lines[to_rgba(plots.GROUP_COLORS[name])] for name in ("correct", "wrong"))
    assert correct.get_xydata().tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert correct.get_linestyle() != wrong.get_linestyle()
    assert correct.get_marker() != wrong.get_marker()
    assert {tuple(band.get_facecolor()[0][:3]) for band in ax.collections} == {color[:3] for color in lines}
    edges = {(x, y) for band in ax.collections for x, y in band.get_paths()[0].vertices}
    assert {(0, 3), (0, 5), (3, 6), (3, 8), (0, -1), (3, 4)} <= edges  # the ends are those of the table
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"wrong", "correct"}
    assert ax.get_legend().get_title().get_text() == ""
    assert [text.get_text() for text in ax.texts] == ["shallow", "deep"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "intensity")


def test_a_line_is_interrupted_where_its_value_is_missing(ax):
    data = pd.DataFrame({"place": range(5), "kl": [1.0, 2.0, np.nan, 4.0, 5.0]})
    plots.layer_profile(data, "kl", x="place", ax=ax)
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[0, 1], [1, 2]], [[3, 4], [4, 5]]]
    assert len({line.get_color() for line in ax.lines}) == 1
    assert ax.get_xlabel() == "place"


def test_hue_colours_are_distinct_until_they_run_out():
    names = ["correct", "before", "after", "x", "y", "z"]
    colours = plots.hue_colors(names, {"after": "#009E73"})
    assert list(colours) == names
    assert len(set(colours.values())) == len(names)
    assert (colours["correct"], colours["after"]) == (plots.GROUP_COLORS["correct"], "#009E73")
    assert list(plots.hue_colors([str(i) for i in range(9)]).values()) == [*plots.LINE_COLORS, plots.INK, plots.INK]
    assert plots.hue_colors(["wrong", "x"], ["red", "blue"]) == {"wrong": "#ff0000", "x": "#0000ff"}
    assert len(set(plots.hue_colors(names, "deep").values())) == len(names)


@pytest.mark.parametrize(
    ("names", "palette"),
    [
        (["baseline", "OEB", "SMI", "StepFlow"], None),
        (["one", "two", "three", "OEB"], {"one": "k", "two": "k", "three": "k", "OEB": "k"}),
    ],
)
def test_a_name_has_one_marker_whatever_else_is_in_the_panel(names, palette):
    whole = plots.hue_markers(names, palette)
    assert len(set(whole.values())) == len(names)
    for name in names:
        assert plots.hue_markers([name], palette) == {name: whole[name]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": "mass"}, "no column 'mass'"),
        ({"y": "intensity"}, "several rows for {'layer': 0}: average over traces first"),
        ({"y": "intensity", "hue": "group", "low": "group"}, "two ends"),
    ],
)
def test_layer_profile_refuses_unclear_data(ax, arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.layer_profile(profile(), **arguments, ax=ax)
    with pytest.raises(ValueError, match="no rows"):
        plots.layer_profile(profile().iloc[:0], "intensity", ax=ax)


def estimates(**columns):
    rows = [{"task": t, "variant": v, "value": x, "low": x - 1, "high": x + 2} for t, v, x in
            [("b", "one", 1.0), ("b", "two", 2.0), ("a", "one", 3.0)]]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def test_forest_view_spreads_the_estimates_of_a_category():
    view = plots.forest_view(estimates(), "value", y="task", low="low", high="high", hue="variant")
    assert view.categories == ("b", "a")
    assert list(view.colors) == list(view.markers) == ["one", "two"]
    assert view.table[["value", "low", "high"]].to_numpy().tolist() == [[1, 0, 3], [2, 1, 4], [3, 2, 5]]
    np.testing.assert_allclose(view.table["at"], [-0.175, 0.175, 1])  # "a" has one estimate, which leaves no gap
    assert len(set(view.colors.values())) == len(set(view.markers.values())) == 2
    alone = plots.forest_view(estimates().iloc[[0, 2]], "value", y="task", low="low", high="high")
    assert alone.table["at"].tolist() == [0, 1]


def drawn_estimates(ax):
    """Points with their markers, and intervals of some length, as they stand on the Axes, in the order of drawing."""
    points, intervals = [], []
    for line in ax.lines:
        data = line.get_xydata() if line.get_transform() == ax.transData else []  # a reference is not in data alone
        if line.get_marker() not in ("", "None", None):
            points += [(x, y, line.get_marker()) for x, y in data if np.isfinite(x)]
        elif len(data) and data[-1, 0] > data[0, 0]:
            intervals.append((data[0, 0], data[-1, 0], data[0, 1]))
    return points, intervals


def test_forest_draws_estimates_in_the_order_of_the_data(ax):
    plots.forest(estimates(), "value", y="task", low="low", high="high", hue="variant", reference=0.5, ax=ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a"]
    assert ax.yaxis_inverted()
    points, intervals = drawn_estimates(ax)
    at = pytest.approx(0.175)
    assert points == [(1, pytest.approx(-0.175), "o"), (3, 1, "o"), (2, at, "s")]
    assert intervals == [(0, 3, pytest.approx(-0.175)), (2, 5, 1), (1, 4, at)]
    assert ax.lines[0].get_xdata() == [0.5, 0.5]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("value", "")


def test_an_interval_is_drawn_as_the_table_has_it_also_beside_its_estimate(ax):
    data = estimates(low=5.0, high=[6.0, 7.0, 8.0]).iloc[[0, 2]]
    plots.forest(data, "value", y="task", low="low", high="high", ax=ax)
    points, intervals = drawn_estimates(ax)
    assert [point[:2] for point in points] == [(1, 0), (3, 1)]
    assert intervals == [(5, 6, 0), (5, 8, 1)]


def test_forest_draws_what_has_no_interval(ax):
    data = estimates(low=np.nan, high=np.nan).iloc[[0, 2]]
    plots.forest(data, "value", y="task", low="low", high="high", ax=ax)
    points, intervals = drawn_estimates(ax)
    assert [point[:2] for point in points] == [(1, 0), (3, 1)]
    assert intervals == []
    assert ax.get_legend() is None


def test_forest_writes_what_stands_behind_each_estimate(ax):
    data = estimates(n=[1234.0, np.nan, 7], value=[1, np.nan, 3])
    plots.forest(data, "value", y="task", low="low", high="high", hue="variant", n="n", ax=ax)
    written = {text.get_text(): text.xy[1] for text in ax.texts if text.get_text()}
    assert written == {"n": 1, "1,234": pytest.approx(-0.175), "7": 1, "n/a": pytest.approx(0.175)}


def test_forest_says_at_the_left_where_an_estimate_is_missing(ax):
    data = estimates(value=[1, 2, np.nan]).iloc[[0, 2]]
    plots.forest(data, "value", y="task", low="low", high="high", reference=0, ax=ax)
    (missing,) = ax.texts
    assert (missing.get_text(), missing.xy, missing.xycoords) == ("n/a", (0, 1), ("axes fraction", "data"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (estimates().drop(columns="low"), "no column 'low'"),
        (estimates().iloc[:0], "no rows"),
        (estimates(), "several rows for {'task': 'b'}: name the column"),
    ],
)
def test_forest_refuses_unclear_data(ax, data, message):
    with pytest.raises(ValueError, match=message):
        plots.forest(data, "value", y="task", low="low", high="high", ax=ax)


# ----------------------------------------------------------------------------------------------------- house


def test_the_public_names_are_listed_and_exist():
    assert sorted(plots.__all__) == sorted(set(plots.__all__))
    assert all(hasattr(plots, name) for name in plots.__all__)


def test_style_is_confined_to_its_block():
    before = dict(mpl.rcParams)
    with plots.style():
        assert mpl.rcParams["pdf.fonttype"] == 42
    assert dict(mpl.rcParams) == before


def test_style_puts_back_its_own_settings_alone():
    before = mpl.rcParams["axes.linewidth"]
    with mpl.rc_context():
        with plots.style("talk"):
            assert mpl.rcParams["font.size"] > 8
            mpl.rcParams["interactive"] = True  # as IPython does when the first figure of a kernel is made
        assert mpl.rcParams["interactive"]
        assert mpl.rcParams["axes.linewidth"] == before


@pytest.mark.slow
def test_importing_plots_loads_no_model_and_changes_no_setting():
    code = (
        "import sys, matplotlib as mpl; before = dict(mpl.rcParams); import stepsal.plots;"
        "assert 'transformer_lens' not in sys.modules;"
        "assert dict(mpl.rcParams) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
