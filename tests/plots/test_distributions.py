"""Distributions: every value counts once, under the colour of its group."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from stepsal import plots

DATA = pd.DataFrame(
    {
        "lock_in": [0.1, 0.4, 0.2, np.nan, 0.9],
        "outcome": ["wrong", "wrong", "correct", "wrong", "correct"],
        "task": ["sums", "chain", "sums", "sums", "chain"],
    }
)


@pytest.fixture
def ax():
    with plots.style():
        _, axes = plt.subplots()
        yield axes
    plt.close("all")


def test_shares_of_values_rise_to_one_by_group(ax):
    assert plots.distribution(DATA, "lock_in", hue="outcome", ax=ax) is ax
    steps = {to_rgba(line.get_color()): line.get_xydata() for line in ax.lines if len(line.get_xdata())}
    assert set(steps) == {to_rgba(color) for color in plots.GROUP_COLORS.values()}
    wrong = steps[to_rgba(plots.GROUP_COLORS["wrong"])]
    assert wrong[1:].tolist() == [[0.1, 0.5], [0.4, 1.0]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["wrong (n = 2)", "correct (n = 2)"]
    assert ax.get_xlabel() == "lock in"
    assert plt.get_fignums() == [ax.figure.number]


def test_dots_stand_in_the_rows_of_their_categories_and_do_not_move(ax):
    plots.distribution(DATA, "lock_in", y="task", hue="outcome", ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sums", "chain"]
    dots = sorted(tuple(dot) for dots in ax.collections for dot in dots.get_offsets().tolist())
    assert [x for x, _ in dots] == [0.1, 0.2, 0.4, 0.9]
    assert [round(y) for _, y in dots] == [0, 0, 1, 1]
    _, other = plt.subplots()
    plots.distribution(DATA, "lock_in", y="task", hue="outcome", ax=other)
    again = sorted(tuple(dot) for dots in other.collections for dot in dots.get_offsets().tolist())
    assert again == dots


def test_without_groups_the_column_is_the_group(ax):
    plots.distribution(DATA, "lock_in", ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["lock_in (n = 4)"]


def test_no_values_are_refused(ax):
    with pytest.raises(ValueError, match="no values in column 'lock_in'"):
        plots.distribution(DATA.iloc[[3]], "lock_in", ax=ax)
    with pytest.raises(ValueError, match="no column 'decay'"):
        plots.distribution(DATA, "decay", ax=ax)
