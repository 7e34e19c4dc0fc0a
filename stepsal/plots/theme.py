"""Colours, sizes and settings that all plots share: seaborn's theme, contexts and colour-blind palette."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import matplotlib as mpl
from cycler import cycler
from seaborn import axes_style, color_palette, plotting_context

Palette: TypeAlias = Mapping[str, str] | Sequence[str] | str
"""Colours by name, colours in order, or the name of a palette of seaborn's."""

SINGLE_COLUMN, DOUBLE_COLUMN = 3.3, 6.9  # figure widths in inches

# distinct under the common forms of colour blindness
COLORBLIND = tuple(color_palette("colorblind").as_hex())
BLUE, ORANGE, GREEN, VERMILION, PINK, BROWN, _, _, _, SKY = COLORBLIND
INK = "#333333"
EMPTY = "#F3F3F3"  # what is not there: the future
CMAP = "magma_r"
ROLE_COLORS = {"question": BLUE, "thinking": ORANGE, "summary": GREEN, "template": "#BBBBBB"}
ROLE_LABELS = {"question": "Q", "thinking": "Thinking", "summary": "Summary"}
ROLE_SHORT = {"question": "Q", "thinking": "T", "summary": "S"}
GROUP_COLORS = {"correct": BLUE, "wrong": VERMILION}
VARIANT_COLORS = {"baseline": INK, "OEB": SKY, "SMI": BROWN, "StepFlow": PINK}  # other than those of roles and outcomes
LINE_COLORS = (BLUE, VERMILION, GREEN, PINK, SKY, ORANGE, BROWN)
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
NAMED_MARKERS = {"correct": "o", "wrong": "s", "baseline": "o", "OEB": "s", "SMI": "D", "StepFlow": "^"}
DASHES: dict[str, Any] = dict(
    zip(MARKERS, ("", (4, 1.5), (4, 1, 1, 1), (1, 1), (6, 1), (2, 1), (5, 1, 1, 1, 1, 1)), strict=True)
)
"""Dashes of a line by the marker of its name, so that what differs in one differs in the other."""

FONT_SCALE, THIN = 5 / 6, 0.6  # of seaborn's sizes, which are for figures wider than a column


@contextmanager
def style(context: Literal["paper", "notebook", "talk", "poster"] = "paper") -> Iterator[None]:
    """Set matplotlib up for print and screen within a `with` block: small type, thin lines, editable PDF text.

    Only the settings made here are put back at the end. What the block sets besides them stays, above all whether a
    notebook shows figures, which IPython settles when the first one is made.

    Args:
        context: what the figure is for; everything on it is larger on a poster than in a paper.

    Example:
        >>> import matplotlib as mpl
        >>> with stepsal.plots.style():
        ...     round(mpl.rcParams["font.size"]), mpl.rcParams["axes.spines.top"]
        (8, False)
    """
    sizes: dict[str, Any] = plotting_context(context, font_scale=FONT_SCALE)
    thin = {name: THIN * sizes[name] for name in sizes if name.startswith(("axes.linewidth", "xtick.m", "ytick.m"))}
    house = {
        "font.family": "DejaVu Sans",  # ships with matplotlib: figures look the same on every machine
        "axes.prop_cycle": cycler(color=COLORBLIND),
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
        "legend.frameon": False,
        "figure.dpi": 150,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,
    }
    settings: dict[Any, Any] = {**axes_style("ticks"), **sizes, **thin, **house}
    before = {name: mpl.rcParams[name] for name in settings}
    mpl.rcParams.update(settings)
    try:
        yield
    finally:
        mpl.rcParams.update(before)


def hue_colors(names: Sequence[str], palette: Palette | None = None) -> dict[str, str]:
    """Choose a colour for each line of a plot.

    Names in the palette have its colours; "correct", "wrong" and the variants of StepFlow have theirs; the others take
    those of `LINE_COLORS` that are not in use, in order, and the colour of the text when they run out.

    Args:
        names: names of the lines.
        palette: colours by name; or colours in order, or the name of a palette of seaborn's, for all names.

    Raises:
        ValueError: seaborn has no palette of this name.

    Example:
        >>> stepsal.plots.hue_colors(["wrong", "other"], {"other": "black"})
        {'wrong': '#d55e00', 'other': 'black'}
    """
    if palette is not None and not isinstance(palette, Mapping):
        return dict(zip(names, color_palette(palette, len(names)).as_hex(), strict=True))
    return _by_name(names, GROUP_COLORS | VARIANT_COLORS | dict(palette or {}), LINE_COLORS, INK)


def hue_markers(names: Sequence[str], palette: Palette | None = None) -> dict[str, str]:
    """Choose a marker for each line of a plot, by its name as its colour, so that panels agree in grey print too.

    Args:
        names: names of the lines.
        palette: colours by name; a name has the same marker wherever the same palette is used.

    Example:
        >>> stepsal.plots.hue_markers(["OEB", "SMI"]), stepsal.plots.hue_markers(["SMI"])
        ({'OEB': 's', 'SMI': 'D'}, {'SMI': 'D'})
    """
    listed = list(palette) if isinstance(palette, Mapping) else []
    return _by_name(names, NAMED_MARKERS | _by_name(listed, NAMED_MARKERS, MARKERS, "o"), MARKERS, "o")


def _by_name(names: Sequence[str], fixed: Mapping[str, str], free: Sequence[str], last: str) -> dict[str, str]:
    """Give each name what is fixed for it, or the next that is free; the last when they run out."""
    taken = {fixed.get(name) for name in names}
    spare = (one for one in free if one not in taken)
    return {name: fixed.get(name) or next(spare, last) for name in names}
