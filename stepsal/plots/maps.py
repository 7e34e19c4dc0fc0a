"""Axes-level plots of step saliency: step maps, token maps, flow arcs, layer profiles; estimates with intervals.

Every function takes `ax=None` and returns the Axes it drew on. What is to be shown is settled first, by pure functions
(`map_view`, `flow_view`, `shared_norm`, `place_labels`), and only then drawn, so that tests and figure data can look
at the state instead of the pixels. Nothing here changes matplotlib's settings on import; wrap figures in `style()`.

    with plots.style():
        fig, (left, right) = plt.subplots(1, 2, figsize=(plots.DOUBLE_COLUMN, 3.2), layout="constrained")
        norm = plots.shared_norm([wrong.mean_over("shallow"), correct.mean_over("shallow")])
        plots.step_map(wrong, "shallow", ax=left, norm=norm, colorbar=False)
        plots.step_map(correct, "shallow", ax=right, norm=norm)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from stepsal.layers import layer_indices
from stepsal.maps.step_saliency import StepSaliency
from stepsal.plots.ticks import (
    POINTS_PER_INCH,
    FittedFormatter,
    FittedLocator,
    axis_points,
    fitted_log_ticks,
    font_points,
    number_labels,
    place_labels,
    step_ticks,
    text_width,
)  # fmt: skip

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

    from stepsal.layers import Layers

SINGLE_COLUMN, DOUBLE_COLUMN = 3.3, 6.9  # figure widths in inches

# Okabe-Ito colours: distinct under the common forms of colour blindness, and in grey
ROLE_COLORS = {"question": "#0072B2", "thinking": "#E69F00", "summary": "#009E73", "template": "#BBBBBB"}
ROLE_LABELS = {"question": "Q", "thinking": "Thinking", "summary": "Summary"}
ROLE_SHORT = {"question": "Q", "thinking": "T", "summary": "S"}
GROUP_COLORS = {"correct": "#0072B2", "wrong": "#D55E00"}
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
CMAP = "magma_r"
INK = "#333333"
EMPTY = "#F3F3F3"  # what is not there: the future

STRIP_GAP, STRIP_WIDTH = 2.5, 4.0  # points, role strips


@contextmanager
def style() -> Iterator[None]:
    """Settings for print and screen, for the length of a `with` block: small type, thin lines, editable PDF text."""
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


# --------------------------------------------------------------------------------------------- prepared state


@dataclass(frozen=True)
class RoleSpan:
    """A run of consecutive rows with one role, half-open."""

    role: str
    start: int
    stop: int

    @property
    def centre(self) -> float:
        return (self.start + self.stop) / 2


@dataclass(frozen=True, eq=False)
class MapView:
    """A triangular map ready to be drawn."""

    values: np.ma.MaskedArray[Any, Any]  # [query, key], masked above the diagonal
    spans: tuple[RoleSpan, ...]

    @property
    def size(self) -> int:
        return self.values.shape[0]

    @property
    def separators(self) -> list[float]:
        """Edges between roles, one per change: a gap of template tokens counts with the role before it."""
        named = [span for span in self.spans if span.role != "template"]
        return [span.start - 0.5 for span in named[1:]]


@dataclass(frozen=True, eq=False)
class FlowView:
    """The strongest links into each step, weakest first (so that the strongest is drawn on top)."""

    key_steps: Int[np.ndarray, " arc"]
    query_steps: Int[np.ndarray, " arc"]
    shares: Float[np.ndarray, " arc"]  # of the query row's saliency, in 0..1
    roles: tuple[str, ...]  # of each step
    labels: tuple[str, ...]  # of each step: Q, 1, 2, ..., S


def role_spans(roles: Sequence[str]) -> tuple[RoleSpan, ...]:
    """Runs of equal roles, in order."""
    spans, start = [], 0
    for role, run in groupby(roles):
        stop = start + len(list(run))
        spans.append(RoleSpan(role, start, stop))
        start = stop
    return tuple(spans)


def map_view(values: Float[ArrayLike, "query key"], roles: Sequence[str]) -> MapView:
    """Mask what lies above the diagonal and find the role bands.

    Raises:
        ValueError: If the map is not square with one role per row.
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or array.shape != (len(roles), len(roles)) or len(roles) == 0:
        raise ValueError(f"map is {array.shape} with {len(roles)} roles; expected a square map with one role per row")
    return MapView(np.ma.masked_array(array, mask=np.triu(np.ones_like(array, dtype=bool), 1)), role_spans(roles))


def flow_view(values: Float[ArrayLike, "query_step key_step"], roles: Sequence[str], top_k: int = 2) -> FlowView:
    """Choose the `top_k` strongest key steps of each query step, its own step excluded.

    Shares are of the whole row, own step included: a row locked into itself has weak arcs.

    Raises:
        ValueError: If the map is not square with one role per row, or if `top_k` is below one.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k} draws no arc; use 1 or more")
    array = map_view(values, roles).values.filled(0.0)
    mass = array.sum(1, keepdims=True)
    shares = np.divide(array, mass, out=np.zeros_like(array), where=mass > 0)
    arcs = [
        (shares[query, key], key, query)
        for query in range(len(roles))
        for key in np.argsort(-shares[query, :query], kind="stable")[:top_k]
        if shares[query, key] > 0
    ]
    arcs.sort(key=lambda arc: arc[0])
    return FlowView(
        key_steps=np.array([key for _, key, _ in arcs], dtype=int),
        query_steps=np.array([query for _, _, query in arcs], dtype=int),
        shares=np.array([share for share, _, _ in arcs], dtype=float),
        roles=tuple(roles),
        labels=step_labels(roles),
    )


def shared_norm(maps: Iterable[StepSaliency | ArrayLike] | StepSaliency, quantile_floor: float = 0.05) -> LogNorm:
    """One logarithmic colour scale for several maps, from a low quantile of their positive values to the maximum.

    Args:
        maps: Step maps, token maps, or whole `StepSaliency` objects (all their layers).
        quantile_floor: Quantile of the positive values at which the colours begin; smaller values take the first
            colour, so that a handful of vanishing entries does not use up the scale.

    Raises:
        ValueError: If `quantile_floor` is outside 0..1, or no map has a positive finite value.
    """
    if not 0 <= quantile_floor < 1:
        raise ValueError(f"quantile_floor={quantile_floor} is no quantile; use a number in 0..1, such as 0.05")
    each = [maps] if isinstance(maps, StepSaliency) else maps
    arrays = [np.asarray(m.values if isinstance(m, StepSaliency) else m, dtype=float).ravel() for m in each]
    values = np.concatenate(arrays) if arrays else np.array([])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size == 0:
        raise ValueError("no map has a positive value, so there is nothing to scale; pass norm= explicitly")
    top = float(values.max())
    floor = float(np.quantile(values, quantile_floor))
    return LogNorm(floor if floor < top else top / 10, top)


def role_labels(view: MapView, length: float, font_size: float) -> tuple[list[float], list[str]]:
    """Where to write which role name along an axis of a map, full or short as it fits; one name per role.

    Args:
        view: The map.
        length: Length of the axis in points.
        font_size: In points.

    Returns:
        Positions in data coordinates, and names; none if even the short names do not fit.
    """
    by_length = sorted(view.spans, key=lambda span: span.stop - span.start)
    longest = {span.role: span for span in by_length if span.role in ROLE_LABELS}
    spans = sorted(longest.values(), key=lambda span: span.start)
    centres = [span.centre / view.size * length for span in spans]
    for wording in (ROLE_LABELS, ROLE_SHORT):
        names = [wording[span.role] for span in spans]
        gap = 0.5 * font_size  # half of it before the first label and after the last is not needed
        widths = [text_width(name, font_size) + gap for name in names]
        placed = place_labels([centre + gap / 2 for centre in centres], widths, length + gap)
        if placed is not None:
            return [(position - gap / 2) / length * view.size - 0.5 for position in placed], names
    return [], []


def step_labels(roles: Sequence[str]) -> tuple[str, ...]:
    """Q, 1, 2, ..., S; with several questions or summaries Q1, Q2, ..."""
    seen = dict.fromkeys(roles, 0)
    labels = []
    for role in roles:
        seen[role] += 1
        if role == "thinking":
            labels.append(str(seen[role]))
        else:
            labels.append(ROLE_SHORT[role] + (str(seen[role]) if roles.count(role) > 1 else ""))
    return tuple(labels)


def _sparse_labels(view: FlowView, at_most: int) -> dict[int, str]:
    """Step -> label: all if they fit; else where question and summary begin, and round numbers not next to those."""
    n = len(view.roles)
    if n <= at_most:
        return dict(enumerate(view.labels))
    ticks = step_ticks(n, at_most)
    stride = ticks[1] - ticks[0] if len(ticks) > 1 else n
    starts = {span.start: ROLE_SHORT[span.role] for span in role_spans(view.roles) if span.role != "thinking"}
    numbers = {
        step: view.labels[step]
        for step, role in enumerate(view.roles)
        if role == "thinking" and int(view.labels[step]) % stride == 0
        if all(abs(step - start) >= 0.75 * stride for start in starts)
    }
    return starts | numbers


def _resolve(
    saliency: StepSaliency | ArrayLike, layer: Layers | None, roles: Sequence[str] | None
) -> tuple[np.ndarray[Any, Any], Sequence[str]]:
    """The map to draw and the role of each row: of a StepSaliency, or given as they are."""
    if isinstance(saliency, StepSaliency):
        if layer is None or roles is not None:
            raise ValueError("a StepSaliency has its roles: name a layer, several, or a band, and leave out roles=")
        return saliency.values[saliency.positions(layer)].mean(0).numpy(), saliency.roles
    if layer is not None or roles is None:
        raise ValueError("a bare map is of one layer: leave out layer, and give roles= with one role per row")
    return np.asarray(saliency), roles


# --------------------------------------------------------------------------------------------------- drawing


def step_map(
    saliency: StepSaliency | Float[ArrayLike, "query_step key_step"],
    layer: Layers | None = None,
    *,
    roles: Sequence[str] | None = None,
    ax: Axes | None = None,
    norm: Normalize | None = None,
    cmap: str = CMAP,
    labels: bool = True,
    colorbar: bool | str = True,
) -> Axes:
    """Heat map of the saliency between steps: query steps run down, key steps to the right.

    Args:
        saliency: A `StepSaliency`, or a bare map together with `roles`.
        layer: A layer, several layers or a band ("shallow", "middle", "deep"); of several the mean is shown.
        roles: Role of each step of a bare map.
        ax: Where to draw; default the current Axes.
        norm: Colour scale; default `shared_norm` of this map alone. Zero takes the first colour.
        cmap: Sequential colour map.
        labels: Write Q, Thinking and Summary along the role strips at the top and on the right.
        colorbar: Draw a colour bar in the empty half; a text says what its numbers are, if not the saliency.

    Raises:
        ValueError: If the layer was not computed, or if roles and map do not fit.
    """
    view = map_view(*_resolve(saliency, layer, roles))
    ax = _draw_map(view, plt.gca() if ax is None else ax, norm, cmap, labels, _quantity(saliency, colorbar))
    ax.set(xlabel="key step", ylabel="query step")
    return ax


def token_map(
    saliency: StepSaliency | Float[ArrayLike, "query_pos key_pos"],
    layer: Layers | None = None,
    *,
    roles: Sequence[str] | None = None,
    ax: Axes | None = None,
    norm: Normalize | None = None,
    cmap: str = CMAP,
    labels: bool = True,
    colorbar: bool | str = True,
) -> Axes:
    """Heat map of the saliency between tokens, drawn like `step_map`; template tokens are grey in the role strips.

    Args:
        saliency: A `StepSaliency` with `token_values`, or a bare map together with `roles` (one per token, "template"
            among them).

    The other arguments are those of `step_map`; the default colour scale begins at the median.

    Raises:
        ValueError: If token-level values were not kept, or for the reasons of `step_map`.
    """
    if isinstance(saliency, StepSaliency):
        if saliency.token_values is None:
            raise ValueError("token_values were not kept; use step_saliency(..., keep_tokens=True)")
        if layer is None or roles is not None:
            raise ValueError("a StepSaliency has its roles: name a layer, several, or a band, and leave out roles=")
        values = saliency.token_values[saliency.positions(layer)].float().mean(0).numpy()
        roles = [saliency.roles[step] if step >= 0 else "template" for step in saliency.step_ids.tolist()]
    else:
        values, roles = _resolve(saliency, layer, roles)
    view = map_view(values, roles)
    if norm is None:
        norm = shared_norm([view.values.compressed()], quantile_floor=0.5)
    ax = _draw_map(view, plt.gca() if ax is None else ax, norm, cmap, labels, _quantity(saliency, colorbar))
    ax.set(xlabel="key position", ylabel="query position")
    return ax


def flow_arcs(
    saliency: StepSaliency | Float[ArrayLike, "query_step key_step"],
    layer: Layers | None = None,
    *,
    roles: Sequence[str] | None = None,
    ax: Axes | None = None,
    top_k: int = 2,
    full_share: float = 0.5,
) -> Axes:
    """Arc diagram of the flow between steps: from each step's strongest sources to the step.

    Steps stand on a line in reading order, coloured by role. Each step is linked to its `top_k` strongest key steps;
    an arc has the colour of its source, and is the wider and the darker the larger its share of the row.

    Args:
        saliency: A `StepSaliency`, or a bare map together with `roles`.
        layer: A layer, several layers or a band, as in `step_map`.
        roles: Role of each step of a bare map.
        ax: Where to draw; default the current Axes.
        top_k: Arcs into each step, its own step excluded.
        full_share: Share of the row at which an arc has full width. Fixed, so that panels can be compared.

    Raises:
        ValueError: If the layer was not computed, if roles and map do not fit, or if `top_k` is below one.
    """
    view = flow_view(*_resolve(saliency, layer, roles), top_k=top_k)
    ax = plt.gca() if ax is None else ax
    n = len(view.roles)
    length = axis_points(ax)[0]
    spacing = length / n
    thickest = min(2.4, max(0.6, 0.25 * spacing))  # points; arcs of neighbouring steps must not merge

    for key, query, share in zip(view.key_steps, view.query_steps, view.shares, strict=True):
        strength = math.sqrt(min(share / full_share, 1.0))  # square root: the eye must find the small shares too
        height = ((query - key) / max(1, n - 1)) ** 0.7 * 4 / 3  # a cubic reaches 3/4 of its control points
        arc = Path(
            [(key, 0), (key, height), (query, height), (query, 0)],
            [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
        )
        ax.add_patch(
            PathPatch(
                arc,
                fill=False,
                edgecolor=ROLE_COLORS[view.roles[key]],
                linewidth=0.4 + thickest * strength,
                alpha=0.12 + 0.78 * strength,
                capstyle="round",
                zorder=2,
            )
        )

    size = min(7.0, max(2.0, 0.6 * spacing))  # points
    ax.scatter(
        range(n),
        [0] * n,
        s=size**2,
        c=[ROLE_COLORS[role] for role in view.roles],
        edgecolors="white",
        linewidths=0.5,
        zorder=3,
        clip_on=False,
    )
    font_size = 0.85 * font_points("xtick.labelsize")
    widest = text_width(str(n), font_size) + 0.3 * font_size
    for step, label in _sparse_labels(view, at_most=max(4, int(length / widest))).items():
        role = view.roles[step]
        ax.annotate(
            label,
            (step, 0),
            xytext=(0, -size / 2 - 2),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=font_size,
            fontweight="normal" if role == "thinking" else "bold",
            color=INK if role == "thinking" else ROLE_COLORS[role],
            annotation_clip=False,
        )
    ax.set_xlim(-0.7, n - 0.3)
    ax.set_ylim(0, 1.04)
    ax.set(xticks=[], yticks=[])
    ax.patch.set_visible(False)
    ax.spines[:].set_visible(False)
    return ax


def layer_profile(
    data: pd.DataFrame,
    y: str,
    *,
    label: str | None = None,
    low: str | None = None,
    high: str | None = None,
    n_layers: int | None = None,
    palette: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Line plot of a per-layer quantity.

    Args:
        data: Tidy, with a column "layer" and one row per layer (and label).
        y: Column to plot.
        label: Column that tells the lines apart. "correct" and "wrong" have fixed colours.
        low, high: Columns with the ends of an interval, drawn as a band.
        n_layers: Depth of the model; shades its shallow and deep layers (bottom and top quarter).
        palette: Colour of each label.
        ax: Where to draw; default the current Axes.

    Raises:
        ValueError: If a column is missing, if there are no rows, if only one end of the interval is given, or if a
            line has several rows for one layer.
    """
    if (low is None) != (high is None):
        raise ValueError(f"low={low!r}, high={high!r}: an interval has two ends; name both columns or neither")
    columns = [column for column in ("layer", y, label, low, high) if column is not None]
    if missing := [column for column in columns if column not in data]:
        raise ValueError(f"data has no column {missing[0]!r}; it has {', '.join(map(str, data.columns))}")
    if data.empty:
        raise ValueError("data has no rows; there is no profile to draw")
    lines = {y: data} if label is None else {str(name): rows for name, rows in data.groupby(label, sort=False)}
    for name, rows in lines.items():
        if rows["layer"].duplicated().any():
            raise ValueError(f"line {name!r} has several rows per layer; average over traces first, or name label=")

    ax = plt.gca() if ax is None else ax
    if n_layers is not None:
        for band in ("shallow", "deep"):
            layers = layer_indices(band, n_layers)  # type: ignore[arg-type]
            ax.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=EMPTY, linewidth=0, zorder=0)
            ax.text(
                (layers[0] + layers[-1]) / 2,
                0.99,
                band,
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=0.9 * font_points("xtick.labelsize"),
                color="#777777",
            )
        ax.set_xlim(-0.5, n_layers - 0.5)
    colors = dict(GROUP_COLORS) | dict(palette or {})
    free = [color for color in LINE_COLORS if color not in {colors[name] for name in lines if name in colors}]
    for i, (name, rows) in enumerate(lines.items()):
        rows = rows.sort_values("layer")
        color = colors.get(name) or (free.pop(0) if free else INK)
        x = rows["layer"].to_numpy()
        marker = "o" if len(x) <= 16 else None
        if low is not None and high is not None:
            ax.fill_between(x, rows[low].to_numpy(), rows[high].to_numpy(), color=color, alpha=0.18, linewidth=0)
        ax.plot(x, rows[y].to_numpy(), LINE_STYLES[i % 4], color=color, label=name, marker=marker, markersize=2.5)
    if label is not None:
        ax.legend()
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.set(xlabel="layer", ylabel=y.replace("_", " "))
    return ax


def forest(
    data: pd.DataFrame,
    x: str,
    *,
    y: str,
    low: str,
    high: str,
    label: str | None = None,
    reference: float | None = None,
    palette: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Estimates with their intervals, one row for each category, from top to bottom in the order of the data.

    Args:
        data: Tidy, one row per category (and label).
        x: Column of the estimates.
        y: Column of the categories.
        low, high: Columns with the ends of the intervals; NaN draws a point alone.
        label: Column that tells several estimates of a category apart; they are drawn below each other.
        reference: Where to draw a vertical line, as at no difference.
        palette: Colour of each label.
        ax: Where to draw; default the current Axes.

    Raises:
        ValueError: If a column is missing, if there are no rows, or if a category (and label) has several.
    """
    columns = [column for column in (x, y, low, high, label) if column is not None]
    if missing := [column for column in columns if column not in data]:
        raise ValueError(f"data has no column {missing[0]!r}; it has {', '.join(map(str, data.columns))}")
    if data.empty:
        raise ValueError("data has no rows; there is nothing to draw")
    keys = [y] if label is None else [y, label]
    if data.duplicated(keys).any():
        raise ValueError(f"{data.loc[data.duplicated(keys), keys].iloc[0].to_dict()} has several rows; name label=")

    ax = plt.gca() if ax is None else ax
    categories = list(dict.fromkeys(data[y]))
    labels = [None] if label is None else list(dict.fromkeys(data[label]))
    colors = dict(GROUP_COLORS) | dict(palette or {})
    free = [color for color in LINE_COLORS if color not in {colors.get(str(name)) for name in labels}]
    beside = {
        c: [n for n in labels if label is None or ((data[y] == c) & (data[label] == n)).any()] for c in categories
    }
    offsets = {  # labels that a category lacks leave no gap
        (category, name): (i - (len(names) - 1) / 2) * 0.7 / len(labels)
        for category, names in beside.items()
        for i, name in enumerate(names)
    }
    if reference is not None:
        ax.axvline(reference, color="0.6", linewidth=0.6, linestyle=":", zorder=0)
    for i, name in enumerate(labels):
        rows = data if label is None else data[data[label] == name]
        at = np.array([categories.index(category) + offsets[category, name] for category in rows[y]])
        values = rows[x].to_numpy(float)
        color = colors.get(str(name)) or (free.pop(0) if free else INK)
        ax.hlines(at, rows[low].to_numpy(float), rows[high].to_numpy(float), color=color, linewidth=0.9)
        ax.plot(
            values, at, "osD^v"[i % 5], color=color, markersize=3, label=None if name is None else str(name)
        )  # fmt: skip
    ax.set_yticks(range(len(categories)), [str(category) for category in categories])
    ax.set_ylim(len(categories) - 0.5, -0.5)  # the first on top
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(x.replace("_", " "))
    if label is not None:
        ax.legend()
    return ax


def _quantity(saliency: StepSaliency | ArrayLike, colorbar: bool | str) -> str | None:
    """What the colours of a map stand for; None for no colour bar."""
    if not isinstance(colorbar, bool):
        return colorbar
    attention = isinstance(saliency, StepSaliency) and saliency.target == "attention"
    return ("attention" if attention else "saliency") if colorbar else None


def _draw_map(view: MapView, ax: Axes, norm: Normalize | None, cmap: str, labels: bool, colorbar: str | None) -> Axes:
    n = view.size
    norm = shared_norm([view.values.compressed()]) if norm is None else norm
    drawn = view.values if norm.vmin is None else np.ma.maximum(view.values, norm.vmin)  # zero has no logarithm
    image = ax.imshow(drawn, norm=norm, cmap=cmap, interpolation="auto", aspect="equal", origin="upper")
    ax.set_facecolor(EMPTY)
    ax.spines[:].set_visible(False)

    # separators end at the diagonal, for there is nothing to separate in the future
    lines = [line for e in view.separators for line in ([(-0.5, e), (e, e)], [(e, e), (e, n - 0.5)])]
    ax.add_collection(LineCollection(lines, colors=INK, linewidths=0.5), autolim=False)

    font_size = font_points("xtick.labelsize")
    spacing = text_width(str(n), font_size) + 1.2 * font_size
    for line in (ax.xaxis, ax.yaxis):
        line.set_major_locator(FittedLocator(lambda length: step_ticks(n, min(8, int(length / spacing)))))
    ax.tick_params(length=0, pad=2)
    for axis in ("x", "y"):
        _role_strip(ax, view, axis, labels)
    if colorbar is not None:
        _inset_colorbar(ax, image, norm, colorbar)
    return ax


def _role_strip(ax: Axes, view: MapView, axis: str, labels: bool) -> None:
    """A thin strip of role colours along the top ("x") or the right ("y"), labelled on its outer side.

    The strip is a child Axes whose tick labels are the role names, so that titles and layouts make room for it. Its
    width is in points whatever the size of the panel.
    """
    gap, width = STRIP_GAP / POINTS_PER_INCH, STRIP_WIDTH / POINTS_PER_INCH
    figure: Any = ax.figure
    panel: Any = ax.transAxes
    corner = figure.dpi_scale_trans + ScaledTranslation(1, 1, panel)  # inches from the top right corner
    if axis == "x":
        strip = ax.inset_axes((0, gap, 1, width), transform=blended_transform_factory(ax.transAxes, corner))
    else:
        strip = ax.inset_axes((gap, 0, width, 1), transform=blended_transform_factory(corner, ax.transAxes))
    strip.set_label(f"roles {axis}")
    names = list(ROLE_COLORS)
    codes = np.array([names.index(span.role) for span in view.spans for _ in range(span.start, span.stop)])
    strip.imshow(
        codes[None, :] if axis == "x" else codes[:, None],
        cmap=ListedColormap(list(ROLE_COLORS.values())),
        vmin=-0.5,
        vmax=len(names) - 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    strip.spines[:].set_visible(False)
    strip.set(xticks=[], yticks=[])
    if not labels:
        return
    font_size = font_points("xtick.labelsize")
    (strip.xaxis.tick_top if axis == "x" else strip.yaxis.tick_right)()
    line = strip.xaxis if axis == "x" else strip.yaxis
    line.set_major_locator(FittedLocator(lambda length: role_labels(view, length, font_size)[0]))
    line.set_major_formatter(FittedFormatter(lambda length, _: role_labels(view, length, font_size)[1]))
    strip.tick_params(length=0, pad=1.5, labelsize=font_size)
    if axis == "y":
        strip.tick_params(labelrotation=270)
        for tick in strip.yaxis.get_major_ticks(len(ROLE_LABELS)):  # made now: the default aligns on a baseline
            tick.label2.set_verticalalignment("center")


def _inset_colorbar(ax: Axes, image: Any, norm: Normalize, quantity: str) -> None:
    """A colour bar where a causal map is empty: the upper right corner."""
    bar = ax.inset_axes((0.56, 0.86, 0.38, 0.035))
    bar.set_label("colorbar")
    colorbar = ax.figure.colorbar(image, cax=bar, orientation="horizontal")
    colorbar.outline.set_visible(False)
    font_size = 0.85 * font_points("xtick.labelsize")
    if isinstance(norm, LogNorm) and norm.vmin is not None and norm.vmax is not None:
        low, high = norm.vmin, norm.vmax
        colorbar.locator = FittedLocator(lambda length: fitted_log_ticks(low, high, length, font_size))
        colorbar.formatter = FittedFormatter(lambda _, values: number_labels(values))
        colorbar.update_ticks()
        bar.minorticks_off()
    bar.tick_params(length=1.5, width=0.5, pad=1, labelsize=font_size)
    bar.set_title(quantity, fontsize=font_size, pad=2, loc="center", fontweight="normal")
