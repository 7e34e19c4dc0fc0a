"""Draw arc diagrams of the flow between steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from stepsal.maps.step_saliency import StepSaliency
from stepsal.plots.theme import INK, ROLE_COLORS
from stepsal.plots.ticks import drawn_points, font_points, text_width
from stepsal.plots.views import FlowView, flow_view, sparse_labels, step_values

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from stepsal.layers import Layers

FULL_SHARE = 0.5  # share of a row at which an arc has full width: fixed, so that panels can be compared


def flow_arcs(
    saliency: StepSaliency | Float[ArrayLike, "query_step key_step"],
    layers: Layers = "all",
    *,
    roles: Sequence[str] | None = None,
    ax: Axes | None = None,
    top_k: int = 2,
    full_share: float = FULL_SHARE,
) -> Axes:
    """Draw the flow between steps as arcs, from each step's strongest sources to the step.

    Steps stand on a line in reading order, coloured by role. Each step is linked to its `top_k` strongest key steps;
    an arc has the colour of its source, and is the wider and the darker the larger its share of the row.

    Args:
        saliency: a `StepSaliency`, or a bare map together with `roles`.
        layers: layers of a StepSaliency, such as 5, [0, 3] or "deep"; of several the mean is shown.
        roles: role of each step of a bare map.
        ax: where to draw; None draws on the current Axes.
        top_k: number of arcs into each step, none of them from the step itself.
        full_share: share of the row at which an arc has full width; use the same value in panels to be compared.

    Returns:
        The Axes.

    Raises:
        ValueError: a layer was not computed, roles and map do not fit, or `top_k` is below one.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> ax = stepsal.plots.flow_arcs([[1, 0, 0], [1, 1, 0], [1, 2, 1]], roles=["question", "thinking", "summary"])
        >>> len(ax.patches), [text.get_text() for text in ax.texts]
        (3, ['Q', '1', 'S'])
        >>> plt.close()
    """
    view = flow_view(*step_values(saliency, layers, roles), top_k=top_k)
    ax = plt.gca() if ax is None else ax
    n = len(view.roles)
    length = 0.95 * drawn_points(ax.xaxis)  # the layout is not settled yet: rather too short
    node_size = min(7.0, max(2.0, 0.6 * length / n))  # points
    _draw_arcs(ax, view, length / n, full_share)
    ax.scatter(
        range(n),
        [0] * n,
        s=node_size**2,
        c=[ROLE_COLORS[role] for role in view.roles],
        edgecolors="white",
        linewidths=0.5,
        zorder=3,
        clip_on=False,
    )
    _write_labels(ax, view, length, node_size)
    ax.set_xlim(-0.7, n - 0.3)
    ax.set_ylim(0, 1.04)
    ax.set(xticks=[], yticks=[])
    ax.patch.set_visible(False)
    ax.spines[:].set_visible(False)
    return ax


def _draw_arcs(ax: Axes, view: FlowView, spacing: float, full_share: float) -> None:
    """Draw the arcs of steps that are `spacing` points apart; those of neighbouring steps must not merge."""
    thickest = min(2.4, max(0.6, 0.25 * spacing))  # points
    span = max(1, len(view.roles) - 1)
    for key, query, share in zip(view.key_steps, view.query_steps, view.shares, strict=True):
        strength = math.sqrt(min(share / full_share, 1.0))  # square root: small shares have to be visible too
        height = ((query - key) / span) ** 0.7 * 4 / 3  # a cubic reaches 3/4 of its control points
        corners: Any = [(key, 0), (key, height), (query, height), (query, 0)]
        arc = PathPatch(
            Path(corners, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]),
            fill=False,
            edgecolor=ROLE_COLORS[view.roles[key]],
            linewidth=0.4 + thickest * strength,
            alpha=0.12 + 0.78 * strength,
            capstyle="round",
            zorder=2,
        )
        ax.add_patch(arc)


def _write_labels(ax: Axes, view: FlowView, length: float, node_size: float) -> None:
    """Write the names of as many steps as have room on a line of `length` points."""
    font_size = 0.85 * font_points("xtick.labelsize")
    widest = text_width(str(len(view.roles)), font_size) + 0.3 * font_size
    for step, label in sparse_labels(view, at_most=max(4, int(length / widest))).items():
        role = view.roles[step]
        ax.annotate(
            label,
            (step, 0),
            xytext=(0, -node_size / 2 - 2),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=font_size,
            fontweight="normal" if role == "thinking" else "bold",
            color=INK if role == "thinking" else ROLE_COLORS[role],
            annotation_clip=False,
        )
