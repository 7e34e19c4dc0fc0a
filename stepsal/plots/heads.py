"""Draw a number for each head, layers from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from seaborn import heatmap

from stepsal.plots.theme import INK
from stepsal.stats.checks import require_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def head_map(
    data: pd.DataFrame,
    value: str = "gain",
    *,
    chosen: Mapping[int, Sequence[int]] | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a number for each head of a model: red above 0, blue below, white at 0.

    Colours reach their ends at the 98th percentile of the sizes, so that one head does not take them all.

    Args:
        data: a row for each head, with the columns `layer` and `head`, such as `EditGains.summary`.
        value: column of the numbers.
        chosen: heads to be marked by dots, by layer.
        label: what the colours show; None takes the name of the column.
        ax: where to draw; None draws on the current Axes.

    Returns:
        The Axes.

    Raises:
        ValueError: a column is missing, a head has two rows, or there is none.

    Example:
        >>> import matplotlib.pyplot as plt, pandas as pd
        >>> data = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "gain": [0.1, -0.2, 0.0, 0.3]})
        >>> ax = stepsal.plots.head_map(data, chosen={1: [1]})
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('head', 'layer')
        >>> plt.close()
    """
    require_columns("data", data, ["layer", "head", value])
    if data.empty:
        raise ValueError("data has no heads; there is nothing to draw")
    if data.duplicated(["layer", "head"]).any():
        raise ValueError("data has two rows for one head: choose one tau_max, or take means first")
    table = data.pivot(index="layer", columns="head", values=value)
    limit = float(np.nanpercentile(np.abs(table.to_numpy()), 98)) or 1.0
    ax = plt.gca() if ax is None else ax
    colors = {"cmap": "RdBu_r", "center": 0.0, "vmin": -limit, "vmax": limit}
    bar = {"label": label or value.replace("_", " "), "extend": "both"}
    heatmap(table, ax=ax, cbar_kws=bar, xticklabels="auto", yticklabels="auto", **colors)
    rows, columns = table.index.to_list(), sorted(set(data["head"]))
    places = [(rows.index(layer), columns.index(head)) for layer, heads in (chosen or {}).items() for head in heads]
    if places:
        y, x = np.transpose(places) + 0.5
        ax.scatter(x, y, s=6, color=INK, linewidths=0)
    ax.set(xlabel="head", ylabel="layer")
    ax.tick_params(axis="y", rotation=0)
    return ax
