"""Settle what an explorer shows, without a browser: its maps, choices, and the numbers they select."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepsal.layers import Band
from stepsal.maps.pooling import normalise_rows
from stepsal.maps.step_saliency import StepSaliency
from stepsal.plots.scale import color_span

METRICS = {  # and how they are called on the screen; the order is that of maps.js
    "share": "share of its row", "saliency": "saliency", "difference": "difference of shares", "attention": "attention",
}  # fmt: skip
NAMED_BANDS: tuple[Band, ...] = ("shallow", "middle", "deep")
BANDS: tuple[Band | None, ...] = (None, *NAMED_BANDS)  # None: one layer
SCALES = ("log", "linear")
VIEWS = ("map", "arcs")
MOST_LINKS = 5
MOST_THRESHOLD = 50  # per cent of a row
QUANTILE_FLOOR = 0.3  # of what is shown, at which logarithmic colours begin, as in the figures of several layers
LARGEST_BUFFER = 256 * 2**20  # bytes of token maps, or of maps by head, that are sent to the browser
NO_ATTENTION = "attention was not captured"
NO_DIFFERENCE = "a difference needs another trace beside it, with as many steps"

State = dict[str, Any]
"""Every choice of an explorer by name; see `Explorer.state`."""


@dataclass(frozen=True)
class Scene:
    """The step maps of an explorer, from which its choices select what is shown.

    Attributes:
        maps: step maps by label.
        attention: attention maps of some of the labels.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.generate(model, "Hugo is 4 plus 3. What is Hugo?", max_new_tokens=40)
        >>> from stepsal.widgets.scene import Scene
        >>> scene = Scene.of(stepsal.step_saliency(model, trace, progress=False))
        >>> scene.title("mini", scene.first_state() | {"band": "deep"})
        'mini · deep layers 6–7 · share of its row'
    """

    maps: Mapping[str, StepSaliency]
    attention: Mapping[str, StepSaliency]

    @classmethod
    def of(
        cls,
        saliency: StepSaliency | Mapping[str, StepSaliency],
        attention: StepSaliency | Mapping[str, StepSaliency] | None = None,
    ) -> Scene:
        """Make a scene of maps that go together.

        Args:
            saliency: step maps of one trace, which is labelled by its model's name, or of several by label.
            attention: attention maps of the one trace, or of some of the labels.

        Raises:
            ValueError: no maps, something else than maps, attention of an unknown label, or of other steps or layers
                than the saliency.
        """
        for name, value in (("saliency", saliency), ("attention", attention)):
            _check_maps(name, value)
        maps = {saliency.model_name: saliency} if isinstance(saliency, StepSaliency) else dict(saliency)
        if isinstance(attention, StepSaliency):
            if len(maps) > 1:
                raise ValueError(f"say whose attention it is: a dict with some of the labels {list(maps)}")
            attention = dict.fromkeys(maps, attention)
        if not maps:
            raise ValueError("there is nothing to explore; pass a StepSaliency, or a dict of labels and StepSaliency")
        for label, of_label in (attention or {}).items():
            if label not in maps:
                raise ValueError(f"attention of {label!r}, but the maps are {list(maps)}")
            if (of_label.roles, of_label.layers) != (maps[label].roles, maps[label].layers):
                raise ValueError(f"attention of {label!r} has other steps or layers than its saliency: {of_label}")
        return cls(maps, dict(attention or {}))

    @property
    def offered(self) -> list[str]:
        """The metrics that at least one trace has, in the order of `METRICS`."""
        lacking = {"attention": not self.attention, "difference": len(self.maps) < 2}
        return [metric for metric in METRICS if not lacking.get(metric, False)]

    # -------------------------------------------------------------------------------------------- choices

    def first_state(self) -> State:
        """Return the choices with which an explorer begins."""
        label, saliency = next(iter(self.maps.items()))
        return {
            "trace": label, "compare": None, "layer": saliency.layers[0], "band": None, "metric": "share",
            "scale": "log", "shared": True, "top_k": 0, "threshold": 10, "view": "map", "pinned": None, "zoom": None,
        }  # fmt: skip

    def changed(self, state: State, choices: Mapping[str, Any]) -> State:
        """Return the state after a change of some choices.

        A metric that a trace does not have is no error: it shows saliency instead, and says so. If another trace is
        chosen without a layer, the position of the layer among those computed is kept.

        Args:
            state: all choices before the change.
            choices: the choices that change.

        Raises:
            ValueError: an unknown choice; the message names what there is.
        """
        if unknown := set(choices) - set(state):
            raise ValueError(f"unknown choices {sorted(unknown)}; there are {', '.join(state)}")
        new, labels = {**state, **choices}, list(self.maps)
        options: dict[str, Sequence[Any]] = {
            "trace": labels, "compare": [None, *labels], "band": BANDS, "metric": list(METRICS), "scale": SCALES,
            "view": VIEWS, "shared": [False, True], "top_k": range(MOST_LINKS + 1),
            "threshold": range(MOST_THRESHOLD + 1),
        }  # fmt: skip
        for name, known in options.items():
            if not any(new[name] is x or (type(new[name]) is type(x) and new[name] == x) for x in known):
                raise ValueError(f"{name}={new[name]!r} is not one of {list(known)}")
        layers = self.maps[new["trace"]].layers
        if "layer" in choices:
            new["layer"] = _index("layer", choices["layer"])
            if new["layer"] not in layers:
                raise ValueError(f"layer={new['layer']} was not computed of {new['trace']!r}; there are {list(layers)}")
        else:
            old = self.maps[state["trace"]].layers.index(state["layer"])
            new["layer"] = layers[min(old, len(layers) - 1)]
        for name in ("pinned", "zoom"):
            new[name] = self._cell(name, new[name])
        self._check_zoom(new["zoom"])
        return new

    def _check_zoom(self, zoom: State | None) -> None:
        """Refuse a cell whose tokens were not kept."""
        if zoom is None:
            return
        saliency, trace = self.maps[zoom["trace"]], zoom["trace"]
        if self.tokens(trace) is None:
            size = "" if saliency.token_values is None else f", and smaller than {LARGEST_BUFFER / 2**20:.0f} MB"
            raise ValueError(f"{trace!r} has no token map to zoom into: step_saliency(..., keep_tokens=True){size}")
        kept = set(saliency.step_ids[saliency.kept_positions].tolist())
        if absent := [zoom[axis] for axis in ("query", "key") if zoom[axis] not in kept]:
            remedy = f"step_saliency(..., keep_tokens=[.., {absent[0]}])"
            raise ValueError(f"tokens of step {absent[0]} of {trace!r} were not kept: {remedy}")

    def _cell(self, name: str, cell: Any) -> State | None:
        """Return a cell that a choice points to, checked; None for no cell."""
        if cell is None:
            return None
        if not isinstance(cell, Mapping) or set(cell) != {"trace", "query", "key"} or cell["trace"] not in self.maps:
            raise ValueError(f"{name}={cell!r} must be None or {{'trace': one of {list(self.maps)}, 'query', 'key'}}")
        query, key = (_index(name, cell[axis]) for axis in ("query", "key"))
        n = self.maps[cell["trace"]].n_steps
        if not 0 <= key <= query < n:
            raise ValueError(f"{name}={cell} is no cell: 0 <= key <= query < {n}, the steps of {cell['trace']!r}")
        return {"trace": cell["trace"], "query": query, "key": key}

    def to_view(self, state: State) -> dict[str, Any]:
        """Return choices as the indices of maps.js.

        Args:
            state: all choices, as `changed` returns them.
        """
        labels = list(self.maps)

        def cell(x: State | None) -> list[int]:
            return [labels.index(x["trace"]), x["query"], x["key"]] if x else []

        layer = self.maps[state["trace"]].layers.index(state["layer"])
        return {
            "trace": labels.index(state["trace"]),
            "compare": 0 if state["compare"] is None else 1 + labels.index(state["compare"]),
            "layer": layer,
            "slider": layer,
            "band": BANDS.index(state["band"]),
            "metric": list(METRICS).index(state["metric"]),
            "scale": SCALES.index(state["scale"]),
            "view": VIEWS.index(state["view"]),
            "shared": state["shared"],
            "top_k": state["top_k"],
            "threshold": state["threshold"],
            "pinned": cell(state["pinned"]),
            "zoom": cell(state["zoom"]),
        }

    def from_view(self, view: Mapping[str, Any]) -> State:
        """Return the choices that the indices of maps.js stand for; the reverse of `to_view`.

        Args:
            view: the indices by name.
        """
        labels = list(self.maps)

        def cell(x: list[int]) -> State | None:
            return {"trace": labels[x[0]], "query": x[1], "key": x[2]} if x else None

        layers = self.maps[labels[view["trace"]]].layers
        return {
            "trace": labels[view["trace"]],
            "compare": labels[view["compare"] - 1] if view["compare"] else None,
            "layer": layers[min(view["layer"], len(layers) - 1)],
            "band": BANDS[view["band"]],
            "metric": list(METRICS)[view["metric"]],
            "scale": SCALES[view["scale"]],
            "shared": view["shared"],
            "top_k": view["top_k"],
            "threshold": view["threshold"],
            "view": VIEWS[view["view"]],
            "pinned": cell(view["pinned"]),
            "zoom": cell(view["zoom"]),
        }

    # ------------------------------------------------------------------------------------------- what is shown

    def traces(self, state: State) -> list[str]:
        """Return the labels of the traces that are shown side by side.

        Args:
            state: all choices.
        """
        beside = state["compare"] not in (None, state["trace"])
        one = not beside or self.metric(state["trace"], state) == "difference"
        return [state["trace"]] if one else [state["trace"], state["compare"]]

    def metric(self, label: str, state: State) -> str:
        """Return the metric that a trace shows: the chosen one, or saliency if the trace does not have that.

        Args:
            label: the trace.
            state: all choices.
        """
        requested: str = state["metric"]
        other = self.maps.get(state["compare"] or "")
        lacking = {
            "attention": label not in self.attention,
            "difference": other is None or label == state["compare"] or other.n_steps != self.maps[label].n_steps,
        }
        return "saliency" if lacking.get(requested, False) else requested

    def title(self, label: str, state: State) -> str:
        """Return trace, layers and metric in words, the same as in the browser.

        Args:
            label: the trace.
            state: all choices.
        """
        metric = self.metric(label, state)
        layers = [self.maps[label].layers[p] for p in self._chosen(label, state)]
        where = f"layer {layers[0]}" if state["band"] is None else f"{state['band']} layers {layers[0]}–{layers[-1]}"
        against = f" − {state['compare']}" if metric == "difference" else ""
        notes = {"attention": NO_ATTENTION, "difference": NO_DIFFERENCE}
        note = "" if metric == state["metric"] else f" ({notes[state['metric']]})"
        return f"{label}{against} · {where} · {METRICS[metric]}{note}"

    def shown(self, label: str, state: State) -> Float[Tensor, "query_step key_step"]:
        """Return the map that a trace shows: the chosen metric of the mean over the chosen layers.

        Args:
            label: the trace.
            state: all choices.
        """
        return self._values(label, state, self._chosen(label, state))

    def arcs(self, label: str, state: State) -> Float[Tensor, "query_step key_step"]:
        """Return the map whose strongest links are drawn as arcs: those below the threshold belong to the own step.

        So rows keep their sums, of which arcs are parts. Without links (`top_k` 0) no arc is left.

        Args:
            label: the trace.
            state: all choices.
        """
        values = self.shown(label, state).abs()
        weak = normalise_rows(values[None])[0] < state["threshold"] / 100
        dropped = values * (weak if state["top_k"] else torch.ones_like(weak)).tril(-1)
        return values - dropped + torch.diag(dropped.sum(-1))

    def color_range(self, label: str, state: State) -> tuple[float, float]:
        """Return the lowest and the highest value of a trace's colours.

        Traces that show the same metric share their colours, which span what is shown and, if `shared` is chosen, all
        layers, by the rule of the figures (`stepsal.plots.color_span`). The first cell of all is left out: alone in
        its row, it has all of it.

        Args:
            label: the trace.
            state: all choices.
        """
        metric, shown = self.metric(label, state), []
        for other in self.traces(state):
            if self.metric(other, state) == metric:
                chosen = [self._chosen(other, state)] if state["band"] or not state["shared"] else []
                every = [[i] for i in range(len(self.maps[other].layers))] if state["shared"] else []
                shown += [self._values(other, state, positions)[1:].flatten() for positions in chosen + every]
        values = torch.cat(shown).abs().numpy()
        if not values.any():
            return (-1.0, 1.0) if metric == "difference" else (0.0, 1.0)
        low, high = color_span(values, QUANTILE_FLOOR)
        if metric == "difference":
            return -high, high
        return (0.0 if state["scale"] == "linear" else low), high

    def band_positions(self, label: str, band: Band) -> list[int]:
        """Return the positions of a band's computed layers; of all layers where it has none (the title says which).

        Args:
            label: the trace.
            band: "shallow", "middle" or "deep".
        """
        saliency = self.maps[label]
        return [saliency.layers.index(layer) for layer in saliency.computed(band)] or list(range(len(saliency.layers)))

    def _chosen(self, label: str, state: State) -> list[int]:
        """Return the positions of the layers that a trace shows: its band, or its layer nearest to the chosen one."""
        saliency = self.maps[label]
        if state["band"] is None:
            return [_nearest(saliency, state["layer"])]
        return self.band_positions(label, state["band"])

    def ranking(self, label: str, state: State) -> list[tuple[int, float]]:
        """Return the steps of a trace by how much later steps draw on them: the sum of their shares, largest first.

        Args:
            label: the trace.
            state: all choices.
        """
        source = self.attention if self.metric(label, state) == "attention" else self.maps
        shares = normalise_rows(source[label].values[self._chosen(label, state)].mean(0)[None])[0]
        sums = shares.tril(-1).sum(0)
        return [(int(step), float(sums[step])) for step in sums.argsort(descending=True) if sums[step] > 0]

    def tokens(self, label: str) -> Tensor | None:
        """Return the token maps of a trace; None if there are none, or they are too large for a browser.

        Args:
            label: the trace.
        """
        return _if_small(self.maps[label].token_values)

    def heads(self, label: str) -> Tensor | None:
        """Return the maps by head of a trace; None if there are none, or they are too large for a browser.

        Args:
            label: the trace.
        """
        return _if_small(self.maps[label].head_values)

    def _values(self, label: str, state: State, positions: list[int]) -> Float[Tensor, "query_step key_step"]:
        """Return the map of some layers of a trace; a difference is to the other's band, or to its nearest layer."""
        metric = self.metric(label, state)
        source = self.attention if metric == "attention" else self.maps
        mean = source[label].values[positions].mean(0)
        if metric in ("saliency", "attention"):
            return mean
        share = normalise_rows(mean[None])[0]
        if metric == "share":
            return share
        other = self.maps[state["compare"]]
        if state["band"] is not None and positions == self._chosen(label, state):
            theirs = self.band_positions(state["compare"], state["band"])
        else:
            theirs = [_nearest(other, self.maps[label].layers[positions[0]])]
        return share - normalise_rows(other.values[theirs].mean(0)[None])[0]


def _check_maps(name: str, maps: Any) -> None:
    """Refuse what is neither a map nor a dict of maps by label; None may stand for no attention."""
    if isinstance(maps, StepSaliency) or (maps is None and name == "attention"):
        return
    if not isinstance(maps, Mapping):
        raise ValueError(
            f"{name} is a {type(maps).__name__}: give a StepSaliency of one trace, or a dict of several by label, such "
            'as {"wrong": first, "correct": second}'
        )
    for label, value in maps.items():
        if not isinstance(value, StepSaliency):
            raise ValueError(
                f"{name}[{label!r}] is a {type(value).__name__}, not a StepSaliency: stepsal.step_saliency or "
                "stepsal.step_attention makes one"
            )


def _nearest(saliency: StepSaliency, layer: int) -> int:
    """Return the position of the layer with the nearest number, the lower one of two."""
    return min(range(len(saliency.layers)), key=lambda p: abs(saliency.layers[p] - layer))


def _if_small(values: Tensor | None) -> Tensor | None:
    """Return maps whose lower triangles a browser can be sent, else None."""
    return None if values is None or values.numel() * 2 > LARGEST_BUFFER else values


def _index(name: str, value: Any) -> int:
    """Return a whole number of any type as int; `name` is the choice that has it, for the error."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} has {value!r}, which is no whole number") from None
