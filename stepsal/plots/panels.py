"""Set up figures of several panels, and write on panels what they say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import matplotlib.pyplot as plt

from stepsal.plots.ticks import font_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

SMALL = 0.85  # of the size of tick labels: notes and findings


def panel_grid(
    rows: Sequence[str],
    columns: Sequence[str] | Mapping[str, str],
    *,
    panel: tuple[float, float] = (1.9, 2.2),
    sharex: bool | Literal["row", "col"] = False,
    sharey: bool | Literal["row", "col"] = False,
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Make a figure with a panel for each pair of a row and a column, named at its left and upper edge.

    Args:
        rows: names of the rows, such as models.
        columns: names of the columns, such as metrics; or names and the titles to write.
        panel: width and height of a panel in inches.
        sharex: True for one x axis in all panels, "row" or "col" for one in each row or column.
        sharey: the same for the y axis.

    Returns:
        The figure, and its Axes by (row, column).

    Raises:
        ValueError: there are no rows or no columns.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, axes = stepsal.plots.panel_grid(["mini", "smollm2"], {"decay": "deep decay"})
        >>> [(key, ax.get_title(loc="left")) for key, ax in axes.items()]
        [(('mini', 'decay'), 'deep decay'), (('smollm2', 'decay'), '')]
        >>> plt.close(figure)
    """
    if not rows or not columns:
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns make no panel; name one of each at least")
    titles = columns if isinstance(columns, Mapping) else dict(zip(columns, columns, strict=True))
    size = (panel[0] * len(titles) + 0.4, panel[1] * len(rows))
    options: dict[str, Any] = {"figsize": size, "layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(len(rows), len(titles), sharex=sharex, sharey=sharey, **options)
    axes = {(row, column): grid[i, j] for i, row in enumerate(rows) for j, column in enumerate(titles)}
    for (row, column), ax in axes.items():
        ax.set_title(titles[column] if row == rows[0] else "", loc="left")
    for row, ax in zip(rows, grid[:, 0], strict=True):
        place: dict[str, Any] = {"xycoords": ax.yaxis.label, "textcoords": "offset points"}
        ax.annotate(row, (0, 0.5), xytext=(-4, 0), **place, rotation=90, ha="right", va="center", fontweight="bold")
    return figure, axes


def share_legend(figure: Figure, *, title: str | None = None) -> Legend:
    """Replace the legends of all panels of a figure by one below them.

    Args:
        figure: the figure, with a layout that makes room ("constrained").
        title: title of the legend.

    Returns:
        The legend. What several panels show under one name stands in it once.

    Raises:
        ValueError: no panel shows anything that has a name.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, axes = plt.subplots(1, 2, layout="constrained")
        >>> for ax in axes:
        ...     _ = ax.plot([1, 2], label="correct")
        >>> [text.get_text() for text in stepsal.plots.share_legend(figure).get_texts()]
        ['correct']
        >>> plt.close(figure)
    """
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
        legend = ax.get_legend()
        if legend is not None:
            legend.remove()
    if not entries:
        raise ValueError(
            "no panel has a named line, bar or point; draw with hue= or label= before the legend is shared"
        )
    options: dict[str, Any] = {"loc": "outside lower center", "ncols": min(len(entries), 5), "title": title}
    return figure.legend(list(entries.values()), list(entries), **options)


def state_finding(ax: Axes, title: str, finding: str) -> None:
    """Title a panel, and say below the title, in lighter type, what it shows.

    Args:
        ax: the panel.
        title: the title.
        finding: a few words with the number, such as "own + previous step: 98 % in both".

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, ax = plt.subplots()
        >>> stepsal.plots.state_finding(ax, "mini", "98 % in both")
        >>> ax.get_title(loc="left").split(), ax.texts[0].get_text()
        (['mini'], '98 % in both')
        >>> plt.close(figure)
    """
    heading = ax.set_title(f"{title}\n ", loc="left")  # the second line is the finding's
    finding = re.sub(r"-(?=\d)", "−", finding)  # a minus, as on the axes
    ax.annotate(finding, (0, 0), xycoords=heading, va="bottom", fontsize=font_points("xtick.labelsize"))


def note(ax: Axes, text: str, at: tuple[float, float] = (0.5, 0.03)) -> None:
    """Write a small grey note on a panel, such as "too few of similar length".

    Args:
        ax: the panel.
        text: the note.
        at: where, in shares of the width and the height of the panel.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, ax = plt.subplots()
        >>> stepsal.plots.note(ax, "too few of similar length")
        >>> ax.texts[0].get_text()
        'too few of similar length'
        >>> plt.close(figure)
    """
    size = SMALL * font_points("xtick.labelsize")
    ax.text(*at, text, transform=ax.transAxes, ha="center", va="bottom", fontsize=size, color="0.4")


def stretch(ax: Axes, linear: float, limit: float) -> None:
    """Stretch the middle of the y axis: in proportion up to a number, logarithmic beyond it, and said so.

    Args:
        ax: the panel; its label of the y axis is added to, so set that first.
        linear: number up to which distances are in proportion.
        limit: largest number on the axis, in both directions.

    Raises:
        ValueError: `linear` is not between 0 and `limit`.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, ax = plt.subplots()
        >>> stepsal.plots.stretch(ax, linear=10, limit=100)
        >>> [text.get_text() for text in ax.get_yticklabels()], ax.get_ylabel()
        (['-100', '-30', '-10', '-5', '0', '+5', '+10', '+30', '+100'], '(logarithmic beyond 10)')
        >>> plt.close(figure)
    """
    if not 0 < linear < limit:
        raise ValueError(f"linear={linear}, limit={limit}: the linear part must be positive and end below the limit")
    up, decade = [linear / 2], linear
    while decade <= limit:
        up += [tick for tick in (decade, 3 * decade) if tick <= limit]
        decade *= 10
    ticks = [*(-tick for tick in reversed(up)), 0.0, *up]
    ax.set_yscale("symlog", linthresh=linear)
    ax.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(-1.3 * limit, 1.3 * limit)
    ax.set_ylabel(f"{ax.get_ylabel()}\n(logarithmic beyond {linear:g})".strip())
