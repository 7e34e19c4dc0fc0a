"""Draw estimates with intervals: layer by layer, and category by category.

Each plot is prepared by a pure function (`profile_view`, `forest_view`), which checks the table and settles positions
and looks, and is drawn by seaborn after that. The intervals are those of the table: seaborn estimates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from seaborn import lineplot, pointplot

from stepsal.layers import Band, layer_indices
from stepsal.plots.theme import DASHES, EMPTY, INK, hue_colors, hue_markers
from stepsal.plots.ticks import ROUND_STEPS, font_points
from stepsal.stats.checks import refuse_repeats, require_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stepsal.plots.theme import Palette

SHADED: tuple[Band, ...] = ("shallow", "deep")
MOST_MARKED = 16  # points of a line that have markers
NOT_MEASURED = "n/a"  # stands where an estimate of a forest is missing
CATEGORY_HEIGHT = 0.7  # share of a row of a forest over which its estimates are spread


@dataclass(frozen=True, eq=False)
class EstimatesView:
    """Estimates that are ready to be drawn.

    Attributes:
        table: a row for each estimate with its "name" (the value of hue, "" without), "at" (the layer, or the height in
            rows of a forest, counted from the first), "value", and the ends of its interval "low" and "high" (NaN
            without).
        colors: colour of each name, in the order of the data.
        markers: marker of each name.
        categories: categories of a forest from top to bottom; () in a profile.
        bands: shaded bands of layers of a profile: name, first and last layer.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"layer": [1, 0], "decay": [0.5, 0.2]})
        >>> view = stepsal.plots.profile_view(data, "decay", n_layers=8)
        >>> view.table["value"].tolist(), view.bands
        ([0.2, 0.5], (('shallow', 0, 1), ('deep', 6, 7)))
    """

    table: pd.DataFrame
    colors: dict[str, str]
    markers: dict[str, str]
    categories: tuple[str, ...] = ()
    bands: tuple[tuple[str, int, int], ...] = ()


def profile_view(
    data: pd.DataFrame,
    y: str,
    *,
    x: str = "layer",
    hue: str | None = None,
    low: str | None = None,
    high: str | None = None,
    n_layers: int | None = None,
    palette: Palette | None = None,
) -> EstimatesView:
    """Prepare a profile; the arguments are those of `layer_profile`.

    Args:
        data: tidy, one row per layer (and hue).
        y: column to plot.
        x: column of the layers.
        hue: column that tells the lines apart.
        low: column with the lower ends of an interval.
        high: column with its upper ends.
        n_layers: depth of the model; if given, its shallow and deep layers are shaded.
        palette: colours of the values of `hue`.

    Raises:
        ValueError: a column is missing, there are no rows, only one end of the interval is given, or a line has several
            rows for one layer.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"layer": [0, 0], "decay": [0.2, 0.5], "outcome": ["correct", "wrong"]})
        >>> stepsal.plots.profile_view(data, "decay", hue="outcome").colors
        {'correct': '#0173b2', 'wrong': '#d55e00'}
    """
    if (low is None) != (high is None):
        raise ValueError(f"low={low!r}, high={high!r}: an interval has two ends; name both columns or neither")
    remedy = "average over traces first, or name the column of the lines with hue="
    table = _estimates(data, x, y, hue, low, high, remedy).sort_values("at", kind="stable", ignore_index=True)
    names = [str(name) for name in ([""] if hue is None else data[hue].unique())]
    bands = []
    for band in SHADED if n_layers is not None else ():
        members = layer_indices(band, n_layers or 0)
        bands.append((band, members[0], members[-1]))
    return EstimatesView(table, hue_colors(names, palette), hue_markers(names, palette), bands=tuple(bands))


def layer_profile(
    data: pd.DataFrame,
    y: str,
    *,
    x: str = "layer",
    hue: str | None = None,
    low: str | None = None,
    high: str | None = None,
    n_layers: int | None = None,
    palette: Palette | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a quantity of each layer as lines.

    Args:
        data: tidy, one row per layer (and hue).
        y: column to plot.
        x: column of the layers, or of something else that is counted, such as places in a step.
        hue: column that tells the lines apart. "correct" and "wrong" have fixed colours.
        low: column with the lower ends of an interval, drawn as a band.
        high: column with its upper ends.
        n_layers: depth of the model; if given, its shallow and deep layers (first and last quarter) are shaded.
        palette: colours of the values of `hue`: by name, in order, or the name of a palette of seaborn's.
        ax: where to draw; None draws on the current Axes.

    Returns:
        The Axes. A line is interrupted where its value is missing.

    Raises:
        ValueError: a column is missing, there are no rows, only one end of the interval is given, or a line has several
            rows for one layer.

    Example:
        >>> import matplotlib.pyplot as plt, pandas as pd
        >>> data = pd.DataFrame({"layer": [0, 1, 0, 1], "decay": [1, 2, 3, 4], "outcome": 2 * ["a"] + 2 * ["b"]})
        >>> ax = stepsal.plots.layer_profile(data, "decay", hue="outcome")
        >>> [text.get_text() for text in ax.get_legend().get_texts()], ax.get_ylabel()
        (['a', 'b'], 'decay')
        >>> plt.close()
    """
    view = profile_view(data, y, x=x, hue=hue, low=low, high=high, n_layers=n_layers, palette=palette)
    ax = plt.gca() if ax is None else ax
    _shade_bands(ax, view, n_layers)
    for name, line in view.table.groupby("name", sort=False):
        if line["low"].notna().any():
            ax.fill_between(
                line["at"], line["low"], line["high"], color=view.colors[str(name)], alpha=0.18, linewidth=0
            )
    few = view.table.groupby("name").size().max() <= MOST_MARKED
    options: dict[str, Any] = {
        "hue": "name",
        "hue_order": list(view.colors),
        "palette": view.colors,
        "style": "name",
        "style_order": list(view.colors),
        "dashes": {name: DASHES[marker] for name, marker in view.markers.items()},
        "markers": view.markers if few else False,
        "markersize": 3,
        "markeredgewidth": 0,
        "legend": "full" if hue is not None else False,
    }
    runs = view.table["value"].isna().groupby(view.table["name"]).cumsum()  # seaborn would bridge what is missing
    lineplot(view.table.assign(run=runs), x="at", y="value", units="run", estimator=None, ax=ax, **options)
    if hue is not None:
        ax.legend()
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.set(xlabel=_words(x), ylabel=_words(y))
    return ax


def forest_view(
    data: pd.DataFrame,
    x: str,
    *,
    y: str,
    low: str,
    high: str,
    hue: str | None = None,
    palette: Palette | None = None,
) -> EstimatesView:
    """Prepare a forest plot; the arguments are those of `forest`.

    Args:
        data: tidy, one row per category (and hue).
        x: column of the estimates.
        y: column of the categories.
        low: column with the lower ends of the intervals.
        high: column with their upper ends.
        hue: column that tells several estimates of a category apart.
        palette: colours of the values of `hue`.

    Raises:
        ValueError: a column is missing, there are no rows, or a category (and hue) has several rows.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"task": "sums", "gain": [1, 2], "low": 0, "high": 3, "variant": ["OEB", "SMI"]})
        >>> view = stepsal.plots.forest_view(data, "gain", y="task", low="low", high="high", hue="variant")
        >>> view.table["at"].round(3).tolist(), view.markers
        ([-0.175, 0.175], {'OEB': 's', 'SMI': 'D'})
    """
    table = _estimates(data, y, x, hue, low, high, "name the column that tells them apart with hue=")
    categories = [str(category) for category in data[y].unique()]
    names = list(dict.fromkeys(table["name"]))
    row, rank = table["at"].astype(str).map(categories.index), table["name"].map(names.index)
    # estimates are spread over their row in the order of the hues; those that a category lacks leave no gap
    place = rank.groupby(row).rank() - (rank.groupby(row).transform("size") + 1) / 2
    table["at"] = row + place * CATEGORY_HEIGHT / len(names)
    return EstimatesView(table, hue_colors(names, palette), hue_markers(names, palette), tuple(categories))


def forest(
    data: pd.DataFrame,
    x: str,
    *,
    y: str,
    low: str,
    high: str,
    hue: str | None = None,
    n: str | None = None,
    reference: float | None = None,
    palette: Palette | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw estimates with their intervals, one row for each category, from top to bottom in the order of the data.

    Args:
        data: tidy, one row per category (and hue).
        x: column of the estimates.
        y: column of the categories.
        low: column with the lower ends of the intervals; NaN draws a point alone.
        high: column with their upper ends.
        hue: column that tells several estimates of a category apart; they are drawn below each other. Each of its
            values has a colour and a marker by its name.
        n: column of counts or words to write beside each estimate, right of the Axes; missing ones are left out.
        reference: where to draw a vertical line, such as 0 for no difference; None draws none.
        palette: colours of the values of `hue`: by name, in order, or the name of a palette of seaborn's.
        ax: where to draw; None draws on the current Axes.

    Returns:
        The Axes. Where an estimate is missing, "n/a" stands at the left of its row.

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
    points = view.table.dropna(subset=["value"])
    # seaborn estimates from repeated values: the first is to be the estimate, the others the ends of its interval
    ends = pd.concat([points, *(points.assign(value=points[end]) for end in ("low", "high"))])
    options: dict[str, Any] = {
        "hue": "name",
        "hue_order": list(view.colors),
        "palette": view.colors,
        "markers": list(view.markers.values()),
        "markersize": 3.2,
        "markeredgewidth": 0,
        "linestyle": "none",
        "err_kws": {"linewidth": 0.9},
        "estimator": lambda values: values.iloc[0],
        "errorbar": lambda values: (values.iloc[1], values.iloc[-1]),
        "legend": "full" if hue is not None else False,
    }
    pointplot(ends, x="value", y="at", orient="y", native_scale=True, ax=ax, **options)
    if hue is not None:
        ax.legend()
    if n is not None:
        _write_counts(ax, view, data[n], _words(n))
    for at in view.table.loc[view.table["value"].isna(), "at"]:  # at the left, where it can't be read as a value
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        ax.annotate(NOT_MEASURED, (0, at), xytext=(3, 0), color="0.5", fontsize=font_points("ytick.labelsize"), **place)
    n_rows = len(view.categories)
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=ROUND_STEPS))  # 0.125 is longer than its interval
    ax.set_yticks(range(n_rows), view.categories)
    ax.set_ylim(n_rows - 0.5, -0.5)  # the first on top
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set(xlabel=_words(x), ylabel="")
    return ax


def _estimates(
    data: pd.DataFrame, at: str, value: str, hue: str | None, low: str | None, high: str | None, remedy: str
) -> pd.DataFrame:
    """Return the columns of a table that are drawn, under the names of `EstimatesView.table`, once it is checked."""
    require_columns("data", data, [at, value, *(column for column in (hue, low, high) if column is not None)])
    if data.empty:
        raise ValueError("data has no rows; there is nothing to draw")
    refuse_repeats("data", data, [at] if hue is None else [hue, at], remedy)
    columns = {"value": data[value], "low": np.nan, "high": np.nan}
    columns |= {end: data[column] for end, column in (("low", low), ("high", high)) if column is not None}
    names = "" if hue is None else data[hue].astype(str)
    table = pd.DataFrame({"name": names, "at": data[at], **columns}).reset_index(drop=True)
    return table.astype(dict.fromkeys(columns, float))


def _words(column: str) -> str:
    """Write the name of a column as an axis is labelled."""
    return column.replace("_", " ")


def _write_counts(ax: Axes, view: EstimatesView, counts: pd.Series[Any], heading: str) -> None:
    """Write what stands behind each estimate right of the Axes, at its height, and above them what it is."""
    place: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}
    look: dict[str, Any] = {"fontsize": 0.85 * font_points("ytick.labelsize"), "color": INK}
    ax.annotate(heading, (1, 1), xytext=(3, 1), xycoords="axes fraction", va="bottom", **place, **look)
    for at, count in zip(view.table["at"], counts, strict=True):
        text = "" if pd.isna(count) else count if isinstance(count, str) else f"{count:,.0f}"
        ax.annotate(text, (1, at), xytext=(3, 0), xycoords=("axes fraction", "data"), va="center", **place, **look)


def _shade_bands(ax: Axes, view: EstimatesView, n_layers: int | None) -> None:
    """Shade the shallow and the deep layers and name them at the top."""
    size = 0.9 * font_points("xtick.labelsize")
    for band, first, last in view.bands:
        ax.axvspan(first - 0.5, last + 0.5, color=EMPTY, linewidth=0, zorder=0)
        place: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top"}
        ax.text((first + last) / 2, 0.99, band, **place, fontsize=size, color="#777777")
    if n_layers is not None:
        ax.set_xlim(-0.5, n_layers - 0.5)
