"""A number for each head: its colour, its place, and the dots of chosen heads."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from stepsal import plots

DATA = pd.DataFrame(
    {"layer": [0, 0, 2, 2], "head": [0, 1, 0, 1], "gain": [0.1, -0.2, 0.0, 0.3], "t": [1.0, -2.0, 0.0, 3.0]}
).sample(frac=1, random_state=0)


@pytest.fixture
def ax() -> Iterator[Axes]:
    with plots.style():
        _, axes = plt.subplots()
        yield axes
    plt.close("all")


def test_heads_stand_in_their_rows_and_columns(ax: Axes) -> None:
    assert plots.head_map(DATA, ax=ax) is ax
    values = np.asarray(ax.collections[0].get_array()).reshape(2, 2)
    np.testing.assert_allclose(values, [[0.1, -0.2], [0.0, 0.3]])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "2"]
    low, high = ax.collections[0].get_clim()
    assert low == -high < 0  # white is 0
    assert ax.figure.axes[1].get_ylabel() == "gain"


def test_chosen_heads_have_dots(ax: Axes) -> None:
    plots.head_map(DATA, "t", chosen={2: [1], 0: [0, 1]}, label="t over texts", ax=ax)
    dots = {tuple(place) for place in ax.collections[-1].get_offsets().tolist()}
    assert dots == {(1.5, 1.5), (0.5, 0.5), (1.5, 0.5)}
    assert ax.figure.axes[1].get_ylabel() == "t over texts"


@pytest.mark.parametrize(
    ("data", "value", "message"),
    [(DATA, "p", "p"), (DATA[:0], "gain", "no heads"), (pd.concat([DATA, DATA]), "gain", "two rows for one head")],
)
def test_errors(ax: Axes, data: pd.DataFrame, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.head_map(data, value, ax=ax)
