"""Ticks and labels that fit: texts that do not touch, chosen for the length that an axis has when it is drawn.

matplotlib's locators choose round numbers; what they do not know is how wide the texts are. `FittedLocator` asks again
whenever the figure is drawn, and `place_labels`, `fitted_step_ticks` and `fitted_log_ticks` answer by the widths of
the texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.textpath import TextPath
from matplotlib.ticker import Formatter, Locator, LogFormatterSciNotation, LogLocator, MaxNLocator

POINTS_PER_INCH = 72.0
ROUND_STEPS = (1, 2, 5, 10)
SLACK = 1e-9  # the ends of an axis are within it, whatever the rounding


def step_ticks(n_steps: int, at_most: int) -> list[int]:
    """Choose steps to number: multiples of 1, 2, 5, 10, 20, ...

    Args:
        n_steps: number of steps.
        at_most: largest number of intervals between numbered steps.

    Example:
        >>> stepsal.plots.ticks.step_ticks(14, at_most=4)
        [0, 5, 10]
    """
    locator = MaxNLocator(max(1, at_most), integer=True, steps=ROUND_STEPS, min_n_ticks=1)
    return [int(tick) for tick in locator.tick_values(0, max(1, n_steps - 1)) if 0 <= tick < n_steps]


def fitted_step_ticks(n_steps: int, length: float, font_size: float) -> list[int]:
    """Choose steps to number along an axis, as many as have room, and about eight at most.

    Args:
        n_steps: number of steps.
        length: length of the axis in points.
        font_size: font size of the numbers, in points.

    Example:
        >>> [stepsal.plots.ticks.fitted_step_ticks(200, length, 7.0) for length in (200, 60)]
        [[0, 50, 100, 150], [0, 100]]
    """
    spacing = text_width(str(n_steps), font_size) + 1.2 * font_size
    return step_ticks(n_steps, min(8, int(length / spacing)))


def log_label(value: float) -> str:
    r"""Write a number as matplotlib does along a logarithmic axis, without the space around the sign of times.

    Args:
        value: a positive number.

    Example:
        >>> print(stepsal.plots.ticks.log_label(0.01))
        $\mathdefault{10^{-2}}$
    """
    write = LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf))
    return write(value).replace(r"\times", r"{\times}")


def fitted_log_ticks(low: float, high: float, length: float, font_size: float) -> list[float]:
    """Choose ticks of a logarithmic axis: as many of matplotlib's as have room for their labels, four at most.

    Decades come first; multiples of 2 and 5, and then others, where there are fewer than two decades.

    Args:
        low: lower end of the axis.
        high: upper end of the axis.
        length: length of the axis in points.
        font_size: font size of the labels, in points.

    Example:
        >>> [stepsal.plots.ticks.fitted_log_ticks(1e-4, 1e-2, length, 6.0) for length in (90, 30)]
        [[0.0001, 0.001, 0.01], [0.0001, 0.01]]
    """
    alone: list[float] = []  # the tick to keep where no two have room
    for mantissas in ((1.0,), (1.0, 2.0, 5.0), tuple(range(1, 10))):
        for at_most in (4, 3, 2):
            candidates = LogLocator(subs=mantissas, numticks=at_most).tick_values(low, high)
            ticks = [float(tick) for tick in candidates if low * (1 - SLACK) <= tick <= high * (1 + SLACK)]
            ticks = ticks[:: math.ceil(len(ticks) / at_most) or 1]
            alone = alone or ticks[:1]
            if len(ticks) > 1 and _have_room([log_label(tick) for tick in ticks], ticks, high / low, length, font_size):
                return ticks
        if len(ticks) > 1:
            break
    return alone


def _have_room(labels: Sequence[str], ticks: Sequence[float], span: float, length: float, font_size: float) -> bool:
    """Tell whether labels at the ticks of a logarithmic axis, which spans a factor, do not touch."""
    widest = max(text_width(label, font_size) for label in labels)
    closest = min(math.log(after / before) for before, after in pairwise(ticks)) / math.log(span) * length
    return closest >= widest + 0.4 * font_size


def place_labels(centres: Sequence[float], widths: Sequence[float], length: float) -> list[float] | None:
    """Place labels of given widths near their centres, inside 0..length and clear of one another.

    Args:
        centres: requested positions, ascending.
        widths: width of each label with its margin, in the same unit.
        length: length of the axis.

    Returns:
        The centres of the labels, or None if they do not fit.

    Example:
        >>> stepsal.plots.ticks.place_labels([1, 2, 19], [4, 4, 4], 20)
        [2.0, 6.0, 18.0]
    """
    if sum(widths) > length:
        return None
    placed, edge = [], 0.0
    for centre, width in zip(centres, widths, strict=True):
        placed.append(max(centre, edge + width / 2))
        edge = placed[-1] + width / 2
    edge = length
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], edge - widths[i] / 2)
        edge = placed[i] - widths[i] / 2
    return placed


def text_width(text: str, font_size: float) -> float:
    """Return the width of a text in points.

    Args:
        text: the text, with mathtext between dollar signs.
        font_size: font size in points.

    Example:
        >>> stepsal.plots.ticks.text_width("Thinking", 7) > stepsal.plots.ticks.text_width("T", 7)
        True
    """
    return _width_in_font(text, font_size, findfont(FontProperties()), mpl.rcParams["mathtext.fontset"])


@lru_cache(maxsize=4096)  # a figure asks for the same few texts hundreds of times while it is laid out
def _width_in_font(text: str, font_size: float, font: str, math_fonts: str) -> float:
    """Return the width of a text in points; the fonts are named because they decide it."""
    return float(TextPath((0, 0), text, size=font_size).get_extents().width)


class FittedLocator(Locator):
    """A locator that chooses ticks for the length in points that the axis has when it is drawn.

    Args:
        choose: function that returns the ticks for a length.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, ax = plt.subplots()
        >>> ax.xaxis.set_major_locator(stepsal.plots.ticks.FittedLocator(lambda length: [0, 1] if length > 9 else []))
        >>> list(ax.get_xticks())
        [0, 1]
        >>> plt.close(figure)
    """

    def __init__(self, choose: Callable[[float], Sequence[float]]):
        self.choose = choose

    def __call__(self) -> Sequence[float]:
        """Return the ticks."""
        return self.choose(drawn_points(self.axis))

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """Return the ticks, which depend on the length alone."""
        return self()


class FittedFormatter(Formatter):
    """A formatter that labels the ticks of a `FittedLocator`, for the same length.

    Args:
        write: function that returns the labels, one per tick, for a length.

    Example:
        >>> stepsal.plots.ticks.FittedFormatter(lambda length: ["Q", "Thinking"])(0.5)  # what the cursor shows
        '0.5'
    """

    def __init__(self, write: Callable[[float], list[str]]):
        self.write = write

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Write a position under the cursor, where there is no tick."""
        return f"{x:g}"

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Return the labels of all ticks."""
        return self.write(drawn_points(self.axis))


def drawn_points(axis: Any) -> float:
    """Return the length of an axis in points, as it is now.

    Args:
        axis: `ax.xaxis` or `ax.yaxis`.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> figure, ax = plt.subplots(figsize=(4, 3))  # matplotlib's margins leave 0.775 of the width
        >>> round(stepsal.plots.ticks.drawn_points(ax.xaxis)), round(0.775 * 4 * 72)
        (223, 223)
        >>> plt.close(figure)
    """
    box = axis.axes.bbox
    return (box.width if axis.axis_name == "x" else box.height) / axis.axes.figure.dpi * POINTS_PER_INCH


def font_points(name: Any) -> float:
    """Return a font size setting in points, with "medium" and the like resolved.

    Args:
        name: name of the setting, such as "xtick.labelsize".

    Example:
        >>> with stepsal.plots.style():
        ...     round(stepsal.plots.ticks.font_points("xtick.labelsize"), 1)
        7.3
    """
    return mpl.font_manager.FontProperties(size=mpl.rcParams[name]).get_size_in_points()
