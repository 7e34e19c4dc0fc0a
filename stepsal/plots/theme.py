"""Colours, sizes and settings that all plots share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl

SINGLE_COLUMN, DOUBLE_COLUMN = 3.3, 6.9  # figure widths in inches

# Okabe-Ito colours: distinct under the common forms of colour blindness, and in grey
ROLE_COLORS = {"question": "#0072B2", "thinking": "#E69F00", "summary": "#009E73", "template": "#BBBBBB"}
ROLE_LABELS = {"question": "Q", "thinking": "Thinking", "summary": "Summary"}
ROLE_SHORT = {"question": "Q", "thinking": "T", "summary": "S"}
GROUP_COLORS = {"correct": "#0072B2", "wrong": "#D55E00"}
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^v"
CMAP = "magma_r"
INK = "#333333"
EMPTY = "#F3F3F3"  # what is not there: the future


@contextmanager
def style() -> Iterator[None]:
    """Set matplotlib up for print and screen within a `with` block: small type, thin lines, editable PDF text.

    Example:
        >>> import matplotlib as mpl
        >>> with stepsal.plots.style():
        ...     mpl.rcParams["font.size"], mpl.rcParams["axes.spines.top"]
        (8.0, False)
    """
    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans",  # ships with matplotlib: figures look the same on every machine
        "font.size": 8,
        "axes.labelsize": 8,
        "axes.titlesize": 8.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": INK,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
        "figure.dpi": 150,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,
    }
    with mpl.rc_context(settings):
        yield


def hue_colors(names: Sequence[str], palette: Mapping[str, str] | None = None) -> dict[str, str]:
    """Choose a colour for each line of a plot.

    Names in the palette have its colours, "correct" and "wrong" have theirs, and the others take those of
    `LINE_COLORS` that are not in use, in order, and the colour of the text when they run out.

    Args:
        names: names of the lines.
        palette: colours by name.

    Example:
        >>> stepsal.plots.hue_colors(["wrong", "other"], {"other": "black"})
        {'wrong': '#D55E00', 'other': 'black'}
    """
    fixed = GROUP_COLORS | dict(palette or {})
    free = (color for color in LINE_COLORS if color not in {fixed.get(name) for name in names})
    return {name: fixed.get(name) or next(free, INK) for name in names}
