"""Grids of panels, legends that panels share, and words on panels that do not collide."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from stepsal import plots


@pytest.fixture(autouse=True)
def in_style():
    with plots.style():
        yield
    plt.close("all")


def profile(names=("correct", "wrong")):
    return pd.DataFrame([{"layer": i, "decay": i, "outcome": name} for name in names for i in range(4)])


def test_a_grid_names_its_rows_and_columns():
    figure, axes = plots.panel_grid(["mini", "smollm2"], {"decay": "deep decay", "reach": "reach"}, sharex="col")
    assert list(axes) == [(row, column) for row in ("mini", "smollm2") for column in ("decay", "reach")]
    assert [ax.get_title(loc="left") for ax in axes.values()] == ["deep decay", "reach", "", ""]
    assert [text.get_text() for ax in axes.values() for text in ax.texts] == ["mini", "smollm2"]
    axes["mini", "decay"].set_ylabel("share")
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    name, label = (
        artist.get_window_extent(renderer)
        for artist in (axes["mini", "decay"].texts[0], axes["mini", "decay"].yaxis.label)
    )
    assert 0 <= name.x0 < name.x1 <= label.x0 + 1
    axes["mini", "decay"].set_xlim(0, 7)
    assert axes["smollm2", "decay"].get_xlim() == (0, 7)
    assert axes["smollm2", "reach"].get_xlim() != (0, 7)
    with pytest.raises(ValueError, match="0 columns make no panel"):
        plots.panel_grid(["mini"], [])


def test_panels_share_one_legend_with_each_name_once():
    figure, axes = plt.subplots(1, 3, layout="constrained")
    for ax, names in zip(axes, (("correct", "wrong"), ("wrong",), ("wrong", "other")), strict=True):
        plots.layer_profile(profile(names), "decay", hue="outcome", ax=ax)
    legend = plots.share_legend(figure)
    assert [text.get_text() for text in legend.get_texts()] == ["correct", "wrong", "other"]
    assert [handle.get_color() for handle in legend.legend_handles][:2] == list(plots.GROUP_COLORS.values())
    assert [ax.get_legend() for ax in axes] == [None] * 3
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert not any(ax.get_tightbbox().overlaps(box) for ax in axes)


def test_a_legend_of_nothing_is_refused():
    figure, _ = plt.subplots()
    with pytest.raises(ValueError, match="no panel has a named line"):
        plots.share_legend(figure)


def test_a_finding_stands_between_title_and_panel():
    figure, ax = plt.subplots(figsize=(2.2, 2), layout="constrained")
    plots.step_map(np.tril(np.ones((4, 4))), roles=["question", "thinking", "thinking", "summary"], ax=ax)
    plots.state_finding(ax, "mini", "98 % in both")
    figure.canvas.draw()
    title, finding = ax._left_title.get_window_extent(), ax.texts[0].get_window_extent()
    strip = next(child for child in ax.child_axes if child.get_label() == "roles x").get_tightbbox()
    assert title.y0 - 1 <= finding.y0 < finding.y1 < (title.y0 + title.y1) / 2 + 3
    assert finding.y0 >= strip.y1 - 1
    assert ax.texts[0].get_fontweight() == "normal"


def test_a_stretched_axis_says_so():
    _, ax = plt.subplots()
    ax.set_ylabel("points")
    plots.stretch(ax, linear=10, limit=100)
    assert ax.get_ylabel() == "points\n(logarithmic beyond 10)"
    heights = ax.transData.transform([(0, y) for y in (0, 5, 10, 100)])[:, 1]
    assert np.isclose(heights[1] - heights[0], heights[2] - heights[1])
    assert ax.get_ylim() == (-130, 130)
    for linear, limit in ((0, 10), (10, 10)):
        with pytest.raises(ValueError, match="must be positive and end below the limit"):
            plots.stretch(ax, linear, limit)


def test_a_note_is_small_and_inside():
    figure, ax = plt.subplots(figsize=(1.9, 2), layout="constrained")
    plots.note(ax, "too few of similar length")
    figure.canvas.draw()
    box = ax.texts[0].get_window_extent()
    assert ax.bbox.x0 <= box.x0 < box.x1 <= ax.bbox.x1
    assert ax.bbox.y0 <= box.y0
