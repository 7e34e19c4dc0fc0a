"""Ticks and labels that fit: round numbers, texts that do not touch, ticks chosen for the length that is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.textpath import TextPath
from matplotlib.ticker import Formatter, Locator

POINTS_PER_INCH = 72.0


def step_ticks(n: int, at_most: int = 8) -> list[int]:
    """Multiples of 1, 2, 5, 10, 20, 50, ... below `n`, no more than `at_most` of them."""
    step = next(s for e in range(12) for s in (10**e, 2 * 10**e, 5 * 10**e) if (n - 1) // s < max(1, at_most))
    return list(range(0, n, step))


def log_ticks(low: float, high: float, at_most: int = 4) -> list[float]:
    """Round numbers in low..high for a logarithmic axis: decades, or 1-2-5 where there are fewer than two decades."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    slack = 1e-9
    ticks: list[float] = []
    for mantissas in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)):
        ticks = [m * 10.0**e for e in exponents for m in mantissas]
        ticks = [tick for tick in ticks if low * (1 - slack) <= tick <= high * (1 + slack)]
        if len(ticks) >= 2:
            break
    else:
        ticks = [low, high]
    return ticks[:: math.ceil(len(ticks) / max(1, at_most))]


def number_labels(values: Sequence[float]) -> list[str]:
    """Plain if all lie between 0.01 and 100, otherwise all in powers of ten."""
    if all(0.0099 < value < 101 for value in values):
        return [f"{value:.3g}" for value in values]
    texts = []
    for value in values:
        exponent = math.floor(math.log10(value) + 1e-9)
        mantissa = value / 10.0**exponent
        times = "" if abs(mantissa - 1) < 1e-6 else rf"{mantissa:.2g}{{\times}}"
        texts.append(f"${times}10^{{{exponent}}}$")
    return texts


def fitted_log_ticks(low: float, high: float, length: float, font_size: float) -> list[float]:
    """`log_ticks`, at most four and as many as have room for their labels on an axis of `length` points."""
    for at_most in (4, 3, 2):
        ticks = log_ticks(low, high, at_most)
        widest = max((text_width(label, font_size) for label in number_labels(ticks)), default=0.0)
        if len(ticks) < 2:
            return ticks
        closest = min(math.log(b / a) for a, b in pairwise(ticks)) / math.log(high / low) * length
        if closest >= widest + 0.4 * font_size:
            return ticks
    return ticks[:1]


def place_labels(centres: Sequence[float], widths: Sequence[float], length: float) -> list[float] | None:
    """Positions for labels of given widths near their centres, inside 0..length and clear of one another.

    Args:
        centres: Wanted positions, ascending.
        widths: Width of each label with its margin, in the same unit.
        length: Length of the axis.

    Returns:
        The centres of the labels, or None if they do not fit.
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
    return float(TextPath((0, 0), text, size=font_size).get_extents().width)


class FittedLocator(Locator):
    """Ticks chosen for the length in points that the axis turns out to have when it is drawn."""

    def __init__(self, choose: Callable[[float], Sequence[float]]):
        self.choose = choose

    def __call__(self) -> Sequence[float]:
        return self.choose(drawn_points(self.axis))

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        return self()


class FittedFormatter(Formatter):
    """Labels of the ticks of a `FittedLocator`, from the same length."""

    def __init__(self, write: Callable[[float, Sequence[float]], list[str]]):
        self.write = write

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}"

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        return self.write(drawn_points(self.axis), values)


def drawn_points(axis: Any) -> float:
    box = axis.axes.bbox
    return (box.width if axis.axis_name == "x" else box.height) / axis.axes.figure.dpi * POINTS_PER_INCH


def axis_points(ax: Axes) -> tuple[float, float]:
    """Width and height of the Axes in points, as far as known before the layout is settled: rather too small."""
    figure: Any = ax.figure
    box = ax.get_window_extent()
    return tuple(0.95 * extent / figure.dpi * POINTS_PER_INCH for extent in (box.width, box.height))  # type: ignore[return-value]


def font_points(name: Any) -> float:
    """A font size setting in points ("medium" and the like resolved)."""
    return mpl.font_manager.FontProperties(size=mpl.rcParams[name]).get_size_in_points()
