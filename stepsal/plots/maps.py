"""Draw heat maps of step and token saliency, with role strips and a colour bar in the empty half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation, blended_transform_factory
from seaborn import heatmap

from stepsal.maps.step_saliency import StepSaliency
from stepsal.plots.theme import CMAP, EMPTY, INK, ROLE_COLORS, ROLE_LABELS
from stepsal.plots.ticks import (
    POINTS_PER_INCH,
    FittedFormatter,
    FittedLocator,
    fitted_log_ticks,
    fitted_step_ticks,
    font_points,
    log_label,
)
from stepsal.plots.views import MapView, map_view, role_labels, shared_norm, step_values, token_values

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from stepsal.layers import Layers

MOST_CELLS = 200  # rows up to which a map is a mesh: every cell has a pixel or more in a column of print
STRIP_GAP, STRIP_WIDTH = 2.5, 4.0  # points, role strips
TOKEN_FLOOR = 0.5  # quantile at which the colours of a token map begin: most pairs of tokens hardly touch


def step_map(
    saliency: StepSaliency | Float[ArrayLike, "query_step key_step"],
    layers: Layers = "all",
    *,
    roles: Sequence[str] | None = None,
    ax: Axes | None = None,
    norm: Normalize | None = None,
    cmap: str = CMAP,
    labels: bool = True,
    colorbar: bool | str = True,
) -> Axes:
    """Draw the saliency between steps as a heat map: query steps run down, key steps to the right.

    Args:
        saliency: a `StepSaliency`, or a bare map together with `roles`.
        layers: layers of a StepSaliency, such as 5, [0, 3] or "deep"; of several the mean is shown.
        roles: role of each step of a bare map.
        ax: where to draw; None draws on the current Axes.
        norm: colour scale; None takes `shared_norm` of this map alone. Zero takes the first colour.
        cmap: sequential colour map.
        labels: write Q, Thinking and Summary along the role strips at the top and on the right.
        colorbar: draw a colour bar in the empty half; its title says what is shown, such as "saliency" or "share
            of the row", or is the text that is passed.

    Returns:
        The Axes.

    Raises:
        ValueError: a layer was not computed, or roles and map do not fit.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = stepsal.plots.step_map([[0.2, 0.0], [0.1, 0.4]], roles=["question", "thinking"])
        >>> ax.get_xlabel(), ax.collections[0].get_array().shape
        ('key step', (2, 2))
        >>> plt.close()
    """
    view = map_view(*step_values(saliency, layers, roles))
    norm = shared_norm([view.values.compressed()]) if norm is None else norm
    ax = _draw(view, plt.gca() if ax is None else ax, norm, cmap, labels, _quantity(saliency, colorbar))
    ax.set(xlabel="key step", ylabel="query step")
    return ax


def token_map(
    saliency: StepSaliency | Float[ArrayLike, "query_pos key_pos"],
    layers: Layers = "all",
    *,
    roles: Sequence[str] | None = None,
    ax: Axes | None = None,
    norm: Normalize | None = None,
    cmap: str = CMAP,
    labels: bool = True,
    colorbar: bool | str = True,
) -> Axes:
    """Draw the saliency between tokens like a `step_map`; template tokens are grey in the role strips.

    Args:
        saliency: a `StepSaliency` with `token_values`, of all tokens or of some steps, or a bare map with `roles`.
        layers: layers of a StepSaliency; of several the mean is shown.
        roles: role of each token of a bare map, "template" among them.
        ax: where to draw; None draws on the current Axes.
        norm: colour scale; None takes one that begins at the median of this map's positive values.
        cmap: sequential colour map.
        labels: write the names of the roles along their strips.
        colorbar: as in `step_map`.

    Returns:
        The Axes.

    Raises:
        ValueError: token maps were not kept, a layer was not computed, or roles and map do not fit.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = stepsal.plots.token_map([[0.2, 0.0], [0.1, 0.4]], roles=["template", "question"])
        >>> ax.get_ylabel()
        'query position'
        >>> plt.close()
    """
    view = map_view(*token_values(saliency, layers, roles))
    norm = shared_norm([view.values.compressed()], TOKEN_FLOOR) if norm is None else norm
    ax = _draw(view, plt.gca() if ax is None else ax, norm, cmap, labels, _quantity(saliency, colorbar))
    ax.set(xlabel="key position", ylabel="query position")
    if isinstance(saliency, StepSaliency) and saliency.token_positions is not None:
        positions = saliency.token_positions.tolist()
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda at, _: str(positions[int(at)])))
    return ax


def _quantity(saliency: StepSaliency | ArrayLike, colorbar: bool | str) -> str | None:
    """Say what the colours of a map stand for; None for no colour bar."""
    if not isinstance(colorbar, bool):
        return colorbar
    if not colorbar or not isinstance(saliency, StepSaliency):
        return "saliency" if colorbar else None
    if saliency.metadata.get("row_normalised"):
        return "share of its row"
    quantity = "attention" if saliency.target == "attention" else "saliency"
    return quantity if saliency.reduce == "density" else f"{quantity}, summed"


def _draw(view: MapView, ax: Axes, norm: Normalize, cmap: str, labels: bool, quantity: str | None) -> Axes:
    """Draw a prepared map with its separators, ticks, role strips and colour bar; cell i reaches from i to i + 1."""
    n = view.size
    bar = None if quantity is None else ax.inset_axes((0.56, 0.86, 0.38, 0.035), label="colorbar")
    cells = view.values if norm.vmin is None else np.ma.maximum(view.values, norm.vmin)  # zero has no logarithm
    if n <= MOST_CELLS:
        options = {"cbar_ax": bar, "cbar_kws": {"orientation": "horizontal"}, "square": True, "rasterized": True}
        ticks = {"xticklabels": False, "yticklabels": False}
        heatmap(cells.data, mask=cells.mask, norm=norm, cmap=cmap, cbar=bar is not None, ax=ax, **options, **ticks)
        image: Any = ax.collections[-1]
    else:  # averages what falls into one pixel, where a mesh shows one cell of it
        image = ax.imshow(cells, norm=norm, cmap=cmap, aspect="equal", extent=(0, n, n, 0))
        if bar is not None:
            ax.figure.colorbar(image, cax=bar, orientation="horizontal")
    ax.set_facecolor(EMPTY)
    ax.spines[:].set_visible(False)

    # separators end at the diagonal, for there is nothing to separate in the future
    lines = [line for e in view.separators for line in ([(0, e), (e, e)], [(e, e), (e, n)])]
    ax.add_collection(LineCollection(lines, colors=INK, linewidths=0.5), autolim=False)

    font_size = font_points("xtick.labelsize")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(FittedLocator(lambda length: [i + 0.5 for i in fitted_step_ticks(n, length, font_size)]))
        axis.set_major_formatter(FuncFormatter(lambda at, _: f"{at - 0.5:g}"))
    ax.tick_params(length=0, pad=2, labelrotation=0)
    for side in ("x", "y"):
        _role_strip(ax, view, side, labels)
    if bar is not None and quantity is not None:
        _label_colorbar(bar, image.colorbar, norm, quantity)
    return ax


def _role_strip(ax: Axes, view: MapView, side: str, labels: bool) -> None:
    """Draw a thin strip of role colours along the top ("x") or the right ("y"), labelled on its outer side.

    The strip is a child Axes whose tick labels are the role names, so that titles and layouts make room for it. Its
    width is in points whatever the size of the panel.
    """
    gap, width = STRIP_GAP / POINTS_PER_INCH, STRIP_WIDTH / POINTS_PER_INCH
    figure: Any = ax.figure
    panel: Any = ax.transAxes
    corner = figure.dpi_scale_trans + ScaledTranslation(1, 1, panel)  # inches from the top right corner
    if side == "x":
        strip = ax.inset_axes((0, gap, 1, width), transform=blended_transform_factory(ax.transAxes, corner))
    else:
        strip = ax.inset_axes((gap, 0, width, 1), transform=blended_transform_factory(corner, ax.transAxes))
    strip.set_label(f"roles {side}")
    names = list(ROLE_COLORS)
    codes = np.array([names.index(span.role) for span in view.spans for _ in range(span.start, span.stop)])
    strip.imshow(
        codes[None, :] if side == "x" else codes[:, None],
        cmap=ListedColormap(list(ROLE_COLORS.values())),
        vmin=-0.5,
        vmax=len(names) - 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=(0, view.size, 1, 0) if side == "x" else (0, 1, view.size, 0),
    )
    strip.spines[:].set_visible(False)
    strip.set(xticks=[], yticks=[])
    if labels:
        _label_strip(strip, view, side)


def _label_strip(strip: Axes, view: MapView, side: str) -> None:
    """Write the names of the roles on the outer side of a strip, in the wording that fits its length."""
    font_size = font_points("xtick.labelsize")
    (strip.xaxis.tick_top if side == "x" else strip.yaxis.tick_right)()
    axis = strip.xaxis if side == "x" else strip.yaxis
    axis.set_major_locator(FittedLocator(lambda length: role_labels(view, length, font_size)[0]))
    axis.set_major_formatter(FittedFormatter(lambda length: role_labels(view, length, font_size)[1]))
    strip.tick_params(length=0, pad=1.5, labelsize=font_size)
    if side == "y":
        strip.tick_params(labelrotation=270)
        for tick in strip.yaxis.get_major_ticks(len(ROLE_LABELS)):  # made now: the default aligns on a baseline
            tick.label2.set_verticalalignment("center")


def _label_colorbar(bar: Axes, colorbar: Any, norm: Normalize, quantity: str) -> None:
    """Write the title and the labels that fit on a colour bar where a causal map is empty: the upper right corner."""
    colorbar.outline.set_visible(False)
    font_size = 0.85 * font_points("xtick.labelsize")
    if isinstance(norm, LogNorm) and norm.vmin is not None and norm.vmax is not None:
        low, high = norm.vmin, norm.vmax
        colorbar.locator = FittedLocator(lambda length: fitted_log_ticks(low, high, length, font_size))
        colorbar.formatter = FuncFormatter(lambda value, _: log_label(value))
        colorbar.update_ticks()
        bar.minorticks_off()
    bar.tick_params(length=1.5, width=0.5, pad=1, labelsize=font_size)
    bar.set_title(quantity, fontsize=font_size, pad=2, loc="center", fontweight="normal")
