"""Draw estimates with intervals: layer by layer, and category by category.

Each plot is prepared by a pure function (`profile_view`, `forest_view`), which checks the table and settles positions
and colours, and is drawn after that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stepsal.layers import Band, layer_indices
from stepsal.plots.theme import EMPTY, LINE_STYLES, MARKERS, hue_colors
from stepsal.plots.ticks import font_points
from stepsal.stats.checks import refuse_repeats, require_columns

if TYPE_CHECKING:
    import pandas as pd

SHADED: tuple[Band, ...] = ("shallow", "deep")
MOST_MARKED = 16  # layers of a line whose points have markers
CATEGORY_HEIGHT = 0.7  # share of a row of a forest over which its estimates are spread


@dataclass(frozen=True, eq=False)
class ProfileLine:
    """One line of a layer profile, by ascending layer.

    Attributes:
        name: name of the line in the legend.
        color: colour of the line and of its band.
        layers: the layers.
        values: value of each layer.
        low: lower ends of the intervals; None without intervals.
        high: upper ends of the intervals; None without intervals.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"layer": [1, 0], "decay": [0.5, 0.2]})
        >>> stepsal.plots.profile_view(data, "decay").lines[0].values.tolist()
        [0.2, 0.5]
    """

    name: str
    color: str
    layers: Int[np.ndarray, " layer"]
    values: Float[np.ndarray, " layer"]
    low: Float[np.ndarray, " layer"] | None
    high: Float[np.ndarray, " layer"] | None


@dataclass(frozen=True, eq=False)
class ProfileView:
    """The lines and shaded bands of a layer profile.

    Attributes:
        lines: lines in the order of the data.
        bands: shaded bands of layers: name, first and last layer.
        n_layers: depth of the model; None where it was not given.
        has_legend: True where a column tells lines apart.

    Example:
        >>> import pandas as pd
        >>> view = stepsal.plots.profile_view(pd.DataFrame({"layer": [0], "decay": [0.5]}), "decay", n_layers=8)
        >>> view.bands
        (('shallow', 0, 1), ('deep', 6, 7))
    """

    lines: tuple[ProfileLine, ...]
    bands: tuple[tuple[str, int, int], ...]
    n_layers: int | None
    has_legend: bool


def profile_view(
    data: pd.DataFrame,
    y: str,
    *,
    hue: str | None = None,
    low: str | None = None,
    high: str | None = None,
    n_layers: int | None = None,
    palette: Mapping[str, str] | None = None,
) -> ProfileView:
    """Prepare a layer profile; the arguments are those of `layer_profile`.

    Args:
        data: tidy, with a column "layer" and one row per layer (and hue).
        y: column to plot.
        hue: column that tells the lines apart.
        low: column with the lower ends of an interval.
        high: column with its upper ends.
        n_layers: depth of the model; if given, its shallow and deep layers are shaded.
        palette: colour of each value of `hue`.

    Raises:
        ValueError: a column is missing, there are no rows, only one end of the interval is given, or a line has several
            rows for one layer.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"layer": [0, 0], "decay": [0.2, 0.5], "outcome": ["correct", "wrong"]})
        >>> [(line.name, line.color) for line in stepsal.plots.profile_view(data, "decay", hue="outcome").lines]
        [('correct', '#0072B2'), ('wrong', '#D55E00')]
    """
    if (low is None) != (high is None):
        raise ValueError(f"low={low!r}, high={high!r}: an interval has two ends; name both columns or neither")
    _check_table(data, ["layer", y], [hue, low, high])
    keys = ["layer"] if hue is None else [hue, "layer"]
    refuse_repeats("data", data, keys, "average over traces first, or name the column of the lines with hue=")
    tables = {y: data} if hue is None else {str(name): rows for name, rows in data.groupby(hue, sort=False)}
    colors = hue_colors(list(tables), palette)
    lines = []
    for name, rows in tables.items():
        table = rows.sort_values("layer")
        ends = [None if column is None else table[column].to_numpy() for column in (low, high)]
        lines.append(ProfileLine(name, colors[name], table["layer"].to_numpy(), table[y].to_numpy(), *ends))
    bands = []
    for band in SHADED if n_layers is not None else ():
        members = layer_indices(band, n_layers or 0)
        bands.append((band, members[0], members[-1]))
    return ProfileView(tuple(lines), tuple(bands), n_layers, has_legend=hue is not None)


def layer_profile(
    data: pd.DataFrame,
    y: str,
    *,
    hue: str | None = None,
    low: str | None = None,
    high: str | None = None,
    n_layers: int | None = None,
    palette: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a quantity of each layer as lines.

    Args:
        data: tidy, with a column "layer" and one row per layer (and hue).
        y: column to plot.
        hue: column that tells the lines apart. "correct" and "wrong" have fixed colours.
        low: column with the lower ends of an interval, drawn as a band.
        high: column with its upper ends.
        n_layers: depth of the model; if given, its shallow and deep layers (first and last quarter) are shaded.
        palette: colour of each value of `hue`.
        ax: where to draw; None draws on the current Axes.

    Returns:
        The Axes.

    Raises:
        ValueError: a column is missing, there are no rows, only one end of the interval is given, or a line has several
            rows for one layer.

    Example:
        >>> import matplotlib.pyplot as plt, pandas as pd
        >>> data = pd.DataFrame({"layer": [0, 1, 0, 1], "decay": [1, 2, 3, 4], "outcome": 2 * ["a"] + 2 * ["b"]})
        >>> ax = stepsal.plots.layer_profile(data, "decay", hue="outcome")
        >>> [line.get_label() for line in ax.lines], ax.get_ylabel()
        (['a', 'b'], 'decay')
        >>> plt.close()
    """
    view = profile_view(data, y, hue=hue, low=low, high=high, n_layers=n_layers, palette=palette)
    ax = plt.gca() if ax is None else ax
    _shade_bands(ax, view)
    for i, line in enumerate(view.lines):
        if line.low is not None and line.high is not None:
            ax.fill_between(line.layers, line.low, line.high, color=line.color, alpha=0.18, linewidth=0)
        ax.plot(
            line.layers,
            line.values,
            LINE_STYLES[i % len(LINE_STYLES)],
            color=line.color,
            label=line.name,
            marker="o" if len(line.layers) <= MOST_MARKED else None,
            markersize=2.5,
        )
    if view.has_legend:
        ax.legend()
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.set(xlabel="layer", ylabel=y.replace("_", " "))
    return ax


@dataclass(frozen=True, eq=False)
class ForestSeries:
    """The estimates of a forest plot that share a colour.

    Attributes:
        name: name in the legend; None where no column tells estimates of a category apart.
        color: colour of the points and intervals.
        positions: height of each point, counted in rows from 0, the first category; points of one category are spread
            around its row.
        values: the estimates.
        low: lower ends of their intervals.
        high: upper ends of their intervals.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"task": ["sums", "chain"], "gain": [1, 2], "low": [0, 1], "high": [2, 3]})
        >>> stepsal.plots.forest_view(data, "gain", y="task", low="low", high="high").series[0].positions.tolist()
        [0.0, 1.0]
    """

    name: str | None
    color: str
    positions: Float[np.ndarray, " estimate"]
    values: Float[np.ndarray, " estimate"]
    low: Float[np.ndarray, " estimate"]
    high: Float[np.ndarray, " estimate"]


@dataclass(frozen=True, eq=False)
class ForestView:
    """The rows and estimates of a forest plot.

    Attributes:
        categories: categories from top to bottom.
        series: series in the order of the data.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"task": ["sums", "chain"], "gain": [1, 2], "low": [0, 1], "high": [2, 3]})
        >>> stepsal.plots.forest_view(data, "gain", y="task", low="low", high="high").categories
        ('sums', 'chain')
    """

    categories: tuple[str, ...]
    series: tuple[ForestSeries, ...]


def forest_view(
    data: pd.DataFrame,
    x: str,
    *,
    y: str,
    low: str,
    high: str,
    hue: str | None = None,
    palette: Mapping[str, str] | None = None,
) -> ForestView:
    """Prepare a forest plot; the arguments are those of `forest`.

    Args:
        data: tidy, one row per category (and hue).
        x: column of the estimates.
        y: column of the categories.
        low: column with the lower ends of the intervals.
        high: column with their upper ends.
        hue: column that tells several estimates of a category apart.
        palette: colour of each value of `hue`.

    Raises:
        ValueError: a column is missing, there are no rows, or a category (and hue) has several rows.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"task": "sums", "gain": [1, 2], "low": 0, "high": 3, "variant": ["OEB", "SMI"]})
        >>> view = stepsal.plots.forest_view(data, "gain", y="task", low="low", high="high", hue="variant")
        >>> [(series.name, series.positions.round(3).tolist()) for series in view.series]
        [('OEB', [-0.175]), ('SMI', [0.175])]
    """
    _check_table(data, [x, y, low, high], [hue])
    refuse_repeats("data", data, [y] if hue is None else [y, hue], "name the column that tells them apart with hue=")
    rows = data.assign(**{"_row": data[y].map({category: i for i, category in enumerate(dict.fromkeys(data[y]))})})
    names = [None] if hue is None else list(dict.fromkeys(data[hue]))
    rows["_rank"] = 0 if hue is None else data[hue].map({name: i for i, name in enumerate(names)})
    # estimates are spread over their row in the order of the hues; those that a category lacks leave no gap
    rank, size = rows.groupby("_row")["_rank"].rank() - 1, rows.groupby("_row")["_rank"].transform("size")
    rows["_position"] = rows["_row"] + (rank - (size - 1) / 2) * CATEGORY_HEIGHT / len(names)
    colors = hue_colors([str(name) for name in names], palette)
    series = []
    for i, name in enumerate(names):
        table = rows[rows["_rank"] == i]
        numbers = (table[column].to_numpy(float) for column in ("_position", x, low, high))
        series.append(ForestSeries(None if name is None else str(name), colors[str(name)], *numbers))
    return ForestView(tuple(str(category) for category in dict.fromkeys(data[y])), tuple(series))


def forest(
    data: pd.DataFrame,
    x: str,
    *,
    y: str,
    low: str,
    high: str,
    hue: str | None = None,
    reference: float | None = None,
    palette: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw estimates with their intervals, one row for each category, from top to bottom in the order of the data.

    Args:
        data: tidy, one row per category (and hue).
        x: column of the estimates.
        y: column of the categories.
        low: column with the lower ends of the intervals; NaN draws a point alone.
        high: column with their upper ends.
        hue: column that tells several estimates of a category apart; they are drawn below each other.
        reference: where to draw a vertical line, such as 0 for no difference; None draws none.
        palette: colour of each value of `hue`.
        ax: where to draw; None draws on the current Axes.

    Returns:
        The Axes.

    Raises:
        ValueError: a column is missing, there are no rows, or a category (and hue) has several rows.

    Example:
        >>> import matplotlib.pyplot as plt, pandas as pd
        >>> data = pd.DataFrame({"task": ["sums", "chain"], "gain": [1, 2], "low": [0, 1], "high": [2, 3]})
        >>> ax = stepsal.plots.forest(data, "gain", y="task", low="low", high="high", reference=0)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['sums', 'chain']
        >>> plt.close()
    """
    view = forest_view(data, x, y=y, low=low, high=high, hue=hue, palette=palette)
    ax = plt.gca() if ax is None else ax
    if reference is not None:
        ax.axvline(reference, color="0.6", linewidth=0.6, linestyle=":", zorder=0)
    for i, series in enumerate(view.series):
        marker = MARKERS[i % len(MARKERS)]
        ax.hlines(series.positions, series.low, series.high, color=series.color, linewidth=0.9)
        ax.plot(series.values, series.positions, marker, color=series.color, markersize=3, label=series.name)
    n_rows = len(view.categories)
    ax.set_yticks(range(n_rows), view.categories)
    ax.set_ylim(n_rows - 0.5, -0.5)  # the first on top
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(x.replace("_", " "))
    if hue is not None:
        ax.legend()
    return ax


def _check_table(data: pd.DataFrame, columns: Sequence[str], optional: Sequence[str | None]) -> None:
    """Refuse a table that lacks a column that will be drawn, or has no rows."""
    require_columns("data", data, [*columns, *(column for column in optional if column is not None)])
    if data.empty:
        raise ValueError("data has no rows; there is nothing to draw")


def _shade_bands(ax: Axes, view: ProfileView) -> None:
    """Shade the shallow and the deep layers and name them at the top."""
    for band, first, last in view.bands:
        ax.axvspan(first - 0.5, last + 0.5, color=EMPTY, linewidth=0, zorder=0)
        ax.text(
            (first + last) / 2,
            0.99,
            band,
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=0.9 * font_points("xtick.labelsize"),
            color="#777777",
        )
    if view.n_layers is not None:
        ax.set_xlim(-0.5, view.n_layers - 0.5)
