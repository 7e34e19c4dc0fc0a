"""Draw how values are distributed: cumulated, or as dots in rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from seaborn import ecdfplot, move_legend, stripplot

from stepsal.plots.theme import hue_colors
from stepsal.stats.checks import require_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from stepsal.plots.theme import Palette


def distribution(
    data: pd.DataFrame,
    x: str,
    *,
    y: str | None = None,
    hue: str | None = None,
    palette: Palette | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how the values of groups are distributed, with the number of values of each group in the legend.

    Args:
        data: tidy, one row per value, such as a trace; rows without a value are left out.
        x: column of the values.
        y: column of categories: the values are dots, in a row for each category. None draws the share of values up to
            each value, a line that rises from 0 to 1.
        hue: column that tells groups apart. "correct" and "wrong" have fixed colours.
        palette: colours of the values of `hue`: by name, in order, or the name of a palette of seaborn's.
        ax: where to draw; None draws on the current Axes.

    Returns:
        The Axes.

    Raises:
        ValueError: a column is missing, or there is no value.

    Example:
        >>> import matplotlib.pyplot as plt, pandas as pd
        >>> data = pd.DataFrame({"lock_in": [1.0, 2.0, 4.0], "outcome": ["wrong", "correct", "wrong"]})
        >>> ax = stepsal.plots.distribution(data, "lock_in", hue="outcome")
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['wrong (n = 2)', 'correct (n = 1)']
        >>> plt.close()
    """
    require_columns("data", data, [x, *(column for column in (y, hue) if column is not None)])
    rows = data.dropna(subset=[x])
    if rows.empty:
        raise ValueError(f"data has no values in column {x!r}; there is nothing to draw")
    names = rows[hue].astype(str) if hue is not None else rows[x].map(lambda _: x)
    counts = names.value_counts(sort=False)
    written = {name: f"{name} (n = {counts[name]:,})" for name in names.unique()}
    colors = {written[name]: color for name, color in hue_colors(list(written), palette).items()}
    ax = plt.gca() if ax is None else ax
    shown = rows.assign(group=names.map(written))
    options: dict[str, Any] = {"x": x, "hue": "group", "hue_order": list(colors), "palette": colors, "ax": ax}
    if y is None:
        ecdfplot(shown, **options)
    else:  # without jitter, which is random: where dots lie on one another it is darker
        stripplot(shown, y=y, orient="y", jitter=False, dodge=hue is not None, size=3, alpha=0.4, **options)
    beside = {} if y is None else {"bbox_to_anchor": (1, 1), "ncols": len(colors)}  # above the dots, to hide none
    move_legend(ax, "best" if y is None else "lower right", title="", **beside)
    ax.set(xlabel=x.replace("_", " "), ylabel="share of the values up to here" if y is None else "")
    return ax
