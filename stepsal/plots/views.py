"""The contents of a plot of steps, settled by pure functions before anything is drawn.

Tests, figure data and the explorer look at these states instead of the pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from matplotlib.colors import LogNorm

from stepsal.maps.step_saliency import StepSaliency
from stepsal.plots.scale import color_span
from stepsal.plots.theme import ROLE_LABELS, ROLE_SHORT
from stepsal.plots.ticks import place_labels, step_ticks, text_width

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from stepsal.layers import Layers

    Map: TypeAlias = StepSaliency | Float[ArrayLike, "query key"]
    """A map to plot: a `StepSaliency`, or the bare numbers [query, key]."""


@dataclass(frozen=True)
class RoleSpan:
    """A run of consecutive rows with one role, [start, stop).

    Attributes:
        role: "question", "thinking", "summary" or "template".
        start: first row.
        stop: row after the last.

    Example:
        >>> stepsal.plots.RoleSpan("thinking", 1, 4).centre
        2.5
    """

    role: str
    start: int
    stop: int

    @property
    def centre(self) -> float:
        """Middle of the run."""
        return (self.start + self.stop) / 2


@dataclass(frozen=True, eq=False)
class MapView:
    """A triangular map that is ready to be drawn.

    Attributes:
        values: the map [query, key], masked above the diagonal.
        spans: runs of equal roles, in order.

    Example:
        >>> view = stepsal.plots.map_view([[1, 0], [2, 3]], ["question", "thinking"])
        >>> view.size, view.separators
        (2, [1])
    """

    values: np.ma.MaskedArray[Any, Any]
    spans: tuple[RoleSpan, ...]

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.values.shape[0]

    @property
    def separators(self) -> list[int]:
        """Rows at which the role changes; template tokens count as part of the role before them."""
        named = [span for span in self.spans if span.role != "template"]
        return [span.start for span in named[1:]]


@dataclass(frozen=True, eq=False)
class FlowView:
    """The strongest links into each step, weakest first (so that the strongest is drawn on top).

    Attributes:
        key_steps: step that each arc comes from.
        query_steps: step that each arc goes to.
        shares: share of the query row's saliency that each arc stands for, in 0..1.
        roles: role of each step.
        labels: label of each step: Q, 1, 2, ..., S.

    Example:
        >>> view = stepsal.plots.flow_view([[1, 0], [3, 1]], ["question", "thinking"])
        >>> view.key_steps.tolist(), view.query_steps.tolist(), view.shares.tolist()
        ([0], [1], [0.75])
    """

    key_steps: Int[np.ndarray, " arc"]
    query_steps: Int[np.ndarray, " arc"]
    shares: Float[np.ndarray, " arc"]
    roles: tuple[str, ...]
    labels: tuple[str, ...]


def role_spans(roles: Sequence[str]) -> tuple[RoleSpan, ...]:
    """Find the runs of equal roles, in order.

    Args:
        roles: role of each row.

    Example:
        >>> [(span.role, span.stop) for span in stepsal.plots.role_spans(["question", "thinking", "thinking"])]
        [('question', 1), ('thinking', 3)]
    """
    spans, start = [], 0
    for role, run in groupby(roles):
        stop = start + len(list(run))
        spans.append(RoleSpan(role, start, stop))
        start = stop
    return tuple(spans)


def map_view(values: Float[ArrayLike, "query key"], roles: Sequence[str]) -> MapView:
    """Mask what lies above the diagonal of a map and find the bands of its roles.

    Args:
        values: the map.
        roles: role of each row.

    Raises:
        ValueError: the map is not square with one role per row.

    Example:
        >>> stepsal.plots.map_view([[1, 9], [2, 3]], ["question", "thinking"]).values.compressed().tolist()
        [1.0, 2.0, 3.0]
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or array.shape != (len(roles), len(roles)) or len(roles) == 0:
        raise ValueError(f"map is {array.shape} with {len(roles)} roles; expected a square map with one role per row")
    return MapView(np.ma.masked_array(array, mask=np.triu(np.ones_like(array, dtype=bool), 1)), role_spans(roles))


def flow_view(values: Float[ArrayLike, "query_step key_step"], roles: Sequence[str], top_k: int = 2) -> FlowView:
    """Choose the strongest key steps of each query step, its own step excluded.

    Shares are of the whole row, own step included, so that a step which looks mostly at itself has weak arcs.

    Args:
        values: the map.
        roles: role of each step.
        top_k: number of key steps for each query step.

    Raises:
        ValueError: the map is not square with one role per row, or `top_k` is below one.

    Example:
        >>> values, roles = [[1, 0, 0], [1, 1, 0], [1, 2, 1]], ["question", "thinking", "summary"]
        >>> view = stepsal.plots.flow_view(values, roles, top_k=1)
        >>> list(zip(view.key_steps.tolist(), view.query_steps.tolist()))
        [(0, 1), (1, 2)]
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


def shared_norm(maps: Iterable[Map] | StepSaliency, quantile_floor: float = 0.05) -> LogNorm:
    """Make one logarithmic colour scale for several maps, from a low quantile of their positive values to the maximum.

    Args:
        maps: step maps, token maps, or `StepSaliency` objects, of which all layers count.
        quantile_floor: quantile of the positive values at which the colours begin; smaller values take the first
            colour, so that a handful of vanishing entries does not use up the scale.

    Raises:
        ValueError: `quantile_floor` is outside 0..1, or no map has a positive finite value.

    Example:
        >>> norm = stepsal.plots.shared_norm([[[0.1, 0.0], [0.2, 0.4]], [[0.5]]], quantile_floor=0)
        >>> norm.vmin, norm.vmax
        (0.1, 0.5)
    """
    each = [maps] if isinstance(maps, StepSaliency) else maps
    arrays = [np.asarray(m.values if isinstance(m, StepSaliency) else m, dtype=float).ravel() for m in each]
    return LogNorm(*color_span(np.concatenate(arrays) if arrays else np.array([]), quantile_floor))


def role_labels(view: MapView, length: float, font_size: float) -> tuple[list[float], list[str]]:
    """Place the names of the roles along an axis of a map, full or short as it fits; one name per role.

    Args:
        view: the map.
        length: length of the axis in points.
        font_size: font size in points.

    Returns:
        Positions in data coordinates, and names; none if even the short names do not fit.

    Example:
        >>> view = stepsal.plots.map_view([[1, 0], [2, 3]], ["question", "thinking"])
        >>> [stepsal.plots.role_labels(view, length, 7.0)[1] for length in (90, 30)]
        [['Q', 'Thinking'], ['Q', 'T']]
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
            return [(position - gap / 2) / length * view.size for position in placed], names
    return [], []


def step_labels(roles: Sequence[str]) -> tuple[str, ...]:
    """Name the steps Q, 1, 2, ..., S; with several questions or summaries Q1, Q2, ...

    Args:
        roles: role of each step.

    Example:
        >>> stepsal.plots.step_labels(["question", "thinking", "thinking", "summary"])
        ('Q', '1', '2', 'S')
    """
    seen = dict.fromkeys(roles, 0)
    labels = []
    for role in roles:
        seen[role] += 1
        if role == "thinking":
            labels.append(str(seen[role]))
        else:
            labels.append(ROLE_SHORT[role] + (str(seen[role]) if roles.count(role) > 1 else ""))
    return tuple(labels)


def sparse_labels(view: FlowView, at_most: int) -> dict[int, str]:
    """Choose the steps to label: all if they fit; else where question and summary begin, and round numbers between.

    Args:
        view: the steps.
        at_most: largest number of labels that have room.

    Returns:
        Step -> label.

    Example:
        >>> view = stepsal.plots.flow_view([[1] * 9] * 9, ["question", *["thinking"] * 7, "summary"])
        >>> stepsal.plots.views.sparse_labels(view, at_most=4)
        {0: 'Q', 8: 'S', 2: '2', 4: '4', 6: '6'}
    """
    n_steps = len(view.roles)
    if n_steps <= at_most:
        return dict(enumerate(view.labels))
    ticks = step_ticks(n_steps, at_most)
    stride = ticks[1] - ticks[0] if len(ticks) > 1 else n_steps
    starts = {span.start: ROLE_SHORT[span.role] for span in role_spans(view.roles) if span.role != "thinking"}
    numbers = {
        step: view.labels[step]
        for step, role in enumerate(view.roles)
        if role == "thinking" and int(view.labels[step]) % stride == 0
        if all(abs(step - start) >= 0.75 * stride for start in starts)
    }
    return starts | numbers


def step_values(
    saliency: Map, layers: Layers = "all", roles: Sequence[str] | None = None
) -> tuple[np.ndarray[Any, Any], Sequence[str]]:
    """Return the step map to draw and the role of each step.

    Args:
        saliency: a `StepSaliency`, or a bare map.
        layers: layers of a StepSaliency; of several the mean is returned.
        roles: role of each step of a bare map.

    Raises:
        ValueError: a layer was not computed, a StepSaliency comes with roles, or a bare map comes without roles or with
            layers.

    Example:
        >>> stepsal.plots.views.step_values([[1.0, 0.0], [2.0, 3.0]], roles=["question", "thinking"])[0].shape
        (2, 2)
    """
    if isinstance(saliency, StepSaliency):
        _refuse_roles(roles)
        return saliency.mean_over(layers).numpy(), saliency.roles
    return _bare(saliency, layers, roles)


def token_values(
    saliency: Map, layers: Layers = "all", roles: Sequence[str] | None = None
) -> tuple[np.ndarray[Any, Any], Sequence[str]]:
    """Return the token map to draw and the role of each token, "template" among them.

    Args:
        saliency: a `StepSaliency` with `token_values`, of all tokens or of some steps, or a bare map.
        layers: layers of a StepSaliency; of several the mean is returned.
        roles: role of each token of a bare map.

    Raises:
        ValueError: token maps were not kept, or for the reasons of `step_values`.

    Example:
        >>> stepsal.plots.views.token_values([[1.0, 0.0], [2.0, 3.0]], roles=["template", "question"])[1]
        ['template', 'question']
    """
    if isinstance(saliency, StepSaliency):
        _refuse_roles(roles)
        if saliency.token_values is None:
            raise ValueError("token_values were not kept; use step_saliency(..., keep_tokens=True)")
        values = saliency.token_values[saliency.positions(layers)].float().mean(0).numpy()
        step_ids = saliency.step_ids[saliency.kept_positions].tolist()
        return values, [saliency.roles[step] if step >= 0 else "template" for step in step_ids]
    return _bare(saliency, layers, roles)


def _bare(values: ArrayLike, layers: Layers, roles: Sequence[str] | None) -> tuple[np.ndarray[Any, Any], Sequence[str]]:
    """Return a bare map and its roles, which have to come with it."""
    if roles is None or not (isinstance(layers, str) and layers == "all"):
        raise ValueError("a bare map is of one layer: leave out layers=, and give roles= with one role per row")
    return np.asarray(values), roles


def _refuse_roles(roles: Sequence[str] | None) -> None:
    if roles is not None:
        raise ValueError("a StepSaliency has its roles: leave out roles=")
