"""What an explorer shows, without a browser: the maps as buffers and labels, the choices, and the map they select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stepsal.maps import Band, StepSaliency
from stepsal.metrics import flow_metrics
from stepsal.plots import LINE_COLORS, ROLE_COLORS, step_labels
from stepsal.pooling import normalise_rows

METRICS = {  # and how they are called on the screen; the order is that of explorer.js
    "saliency": "saliency", "share": "share of its row", "attention": "attention", "difference": "difference of shares",
}  # fmt: skip
BANDS = (None, *get_args(Band))
SCALES = ("log", "linear")
VIEWS = ("map", "arcs")
MOST_LINKS = 5
DECADES = 4  # that logarithmic colours span at most
LARGEST_TOKEN_MAP = 256 * 2**20  # bytes that are sent to the browser
LINES = {"lock_in": "lock-in of thinking rows", "summary_thinking": "summary on thinking"}

State = dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """Step maps to look at, by label, and attention maps of some of them."""

    maps: Mapping[str, StepSaliency]
    attention: Mapping[str, StepSaliency]

    @classmethod
    def of(
        cls,
        saliency: StepSaliency | Mapping[str, StepSaliency],
        attention: StepSaliency | Mapping[str, StepSaliency] | None = None,
    ) -> Scene:
        """Check that labels and maps go together.

        Raises:
            ValueError: no maps, attention of an unknown label, or of other steps or layers than the saliency.
        """
        maps = {saliency.model: saliency} if isinstance(saliency, StepSaliency) else dict(saliency)
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

    def describe(self) -> dict[str, Any]:
        """All but the numbers, as JSON."""
        return {
            "maps": [self._describe(label, saliency) for label, saliency in self.maps.items()],
            "colors": dict(ROLE_COLORS),
            "names": list(METRICS.values()),
            "palettes": [_palette("magma_r"), _palette("RdBu_r")],
            "lines": dict(zip(LINES, LINE_COLORS, strict=False)),
            "line_names": LINES,
        }

    def _describe(self, label: str, saliency: StepSaliency) -> dict[str, Any]:
        metrics = flow_metrics(saliency)
        has_tokens = self._tokens(saliency) is not None
        return {
            "label": label,
            "roles": list(saliency.roles),
            "labels": list(step_labels(saliency.roles)),
            "texts": [" ".join(text.split()) for text in saliency.step_texts],
            "layers": list(saliency.layers),
            "bands": {band: self._positions(saliency, band) for band in get_args(Band)},
            "profile": {name: [None if np.isnan(x) else float(x) for x in metrics[name]] for name in LINES},
            "token_texts": list(saliency.token_texts) if has_tokens else [],
            "token_spans": [_span(saliency, i) for i in range(saliency.n_steps)] if has_tokens else [],
        }

    @staticmethod
    def _positions(saliency: StepSaliency, band: Band) -> list[int]:
        """Of the computed layers of a band; of all layers where it has none."""
        inside = saliency.band(band)
        return [saliency.layers.index(layer) for layer in inside] or list(range(len(saliency.layers)))

    @staticmethod
    def _tokens(saliency: StepSaliency) -> Tensor | None:
        tokens = saliency.token_values
        return None if tokens is None or tokens.numel() * 2 > LARGEST_TOKEN_MAP else tokens

    def buffers(self) -> dict[str, bytes]:
        """The numbers: per layer the lower triangle row by row, float32."""
        found = {}
        for i, (label, saliency) in enumerate(self.maps.items()):
            found[f"{i}/saliency"] = _packed(saliency.values)
            if label in self.attention:
                found[f"{i}/attention"] = _packed(self.attention[label].values)
            if (tokens := self._tokens(saliency)) is not None:
                found[f"{i}/tokens"] = _packed(tokens)
        return found

    # -------------------------------------------------------------------------------------------- choices

    def first_state(self) -> State:
        label, saliency = next(iter(self.maps.items()))
        return {
            "trace": label, "compare": None, "layer": saliency.layers[0], "band": None, "metric": "saliency",
            "scale": "log", "shared": True, "top_k": 0, "view": "map", "pinned": None, "zoom": None,
        }  # fmt: skip

    def checked(self, state: State) -> State:
        """A whole state that makes sense.

        Raises:
            ValueError: an unknown choice, naming what there is.
        """
        known = self.first_state()
        if unknown := set(state) - set(known):
            raise ValueError(f"unknown choices {sorted(unknown)}; there are {', '.join(known)}")
        labels = list(self.maps)
        choices: dict[str, Sequence[Any]] = {
            "trace": labels, "compare": [None, *labels], "band": BANDS, "metric": list(METRICS), "scale": SCALES,
            "view": VIEWS, "shared": [False, True], "top_k": range(MOST_LINKS + 1),
        }  # fmt: skip
        for name, options in choices.items():
            if state[name] not in options:
                raise ValueError(f"{name}={state[name]!r} is not one of {list(options)}")
        saliency = self.maps[state["trace"]]
        saliency.positions(int(state["layer"]))
        if state["metric"] == "attention" and state["trace"] not in self.attention:
            raise ValueError(f"there is no attention of {state['trace']!r}; pass Explorer(..., attention=...)")
        if state["metric"] == "difference":
            other = self.maps.get(state["compare"])
            if other is None or other.n_steps != saliency.n_steps:
                raise ValueError(
                    f"a difference needs compare= with as many steps as {state['trace']!r} ({saliency.n_steps}); "
                    f"{state['compare']!r} has {other.n_steps if other else 'none'}"
                )
        for name in ("pinned", "zoom"):
            if (cell := state[name]) is None:
                continue
            n = self.maps[cell["trace"]].n_steps if cell.get("trace") in self.maps else 0
            if not 0 <= cell["key"] <= cell["query"] < n:
                raise ValueError(f"{name}={cell} is no cell: 0 <= key <= query < {n} steps of a trace in {labels}")
        if state["zoom"] and self._tokens(self.maps[state["zoom"]["trace"]]) is None:
            raise ValueError(f"{state['zoom']['trace']!r} has no token map: step_saliency(..., keep_tokens=True)")
        return state

    def to_view(self, state: State) -> dict[str, Any]:
        """Choices as the indices of explorer.js."""
        labels = list(self.maps)

        def cell(x: State | None) -> list[int]:
            return [labels.index(x["trace"]), x["query"], x["key"]] if x else []

        return {
            "trace": labels.index(state["trace"]),
            "compare": -1 if state["compare"] is None else labels.index(state["compare"]),
            "layer": self.maps[state["trace"]].positions(state["layer"])[0],
            "band": BANDS.index(state["band"]),
            "metric": list(METRICS).index(state["metric"]),
            "scale": SCALES.index(state["scale"]),
            "view": VIEWS.index(state["view"]),
            "shared": state["shared"],
            "top_k": state["top_k"],
            "pinned": cell(state["pinned"]),
            "zoom": cell(state["zoom"]),
        }

    def from_view(self, view: Mapping[str, Any]) -> State:
        """The reverse."""
        labels = list(self.maps)

        def cell(x: list[int]) -> State | None:
            return {"trace": labels[x[0]], "query": x[1], "key": x[2]} if x else None

        layers = self.maps[labels[view["trace"]]].layers
        return {
            "trace": labels[view["trace"]],
            "compare": None if view["compare"] < 0 else labels[view["compare"]],
            "layer": layers[min(view["layer"], len(layers) - 1)],
            "band": BANDS[view["band"]],
            "metric": list(METRICS)[view["metric"]],
            "scale": SCALES[view["scale"]],
            "shared": view["shared"],
            "top_k": view["top_k"],
            "view": VIEWS[view["view"]],
            "pinned": cell(view["pinned"]),
            "zoom": cell(view["zoom"]),
        }

    # ------------------------------------------------------------------------------------------- what is shown

    def shown(self, label: str, state: State) -> Float[Tensor, "query_step key_step"]:
        """The map of a trace under the choices: the mean over layers of what the metric says."""
        return self._values(label, state, self._chosen(label, state))

    def color_range(self, labels: Sequence[str], state: State) -> tuple[float, float]:
        """Lowest and highest value of the colours of these traces: of what is shown, or of all layers if `shared`.

        A logarithmic scale begins at the 5 % quantile of what is not zero, at most four decades below the top.
        """
        shown = []
        for label in labels:
            every = [[i] for i in range(len(self.maps[label].layers))] if state["shared"] else []
            shown += [self._values(label, state, p).flatten() for p in every or [self._chosen(label, state)]]
        values = torch.cat(shown).abs()
        top = float(values.max())
        if state["metric"] == "difference":
            return -top or -1.0, top or 1.0
        if top == 0:
            return 0.0, 1.0
        if state["scale"] == "linear":
            return 0.0, top
        positive = values[values > 0].sort().values
        floor = max(float(positive[int(0.05 * len(positive))]), top / 10**DECADES)
        return (floor if floor < top else top / 10), top

    def _chosen(self, label: str, state: State) -> list[int]:
        """Positions of the layers that are shown. A trace without the chosen layer shows the one in its place."""
        saliency = self.maps[label]
        if state["band"] is not None:
            return self._positions(saliency, state["band"])
        return self._within(label, self.maps[state["trace"]].positions(state["layer"]))

    def _values(self, label: str, state: State, positions: list[int]) -> Float[Tensor, "query_step key_step"]:
        metric = state["metric"]
        if metric == "difference":
            share = state | {"metric": "share"}
            other = self._within(state["compare"], positions)
            return self._values(label, share, positions) - self._values(state["compare"], share, other)
        source = self.attention if metric == "attention" and label in self.attention else self.maps
        saliency = source[label]  # without attention, as the view: saliency, and the title says so
        mean = saliency.values[positions].mean(0)
        return normalise_rows(mean[None])[0] if metric == "share" else mean

    def _within(self, label: str, positions: list[int]) -> list[int]:
        last = len(self.maps[label].layers) - 1
        return [min(position, last) for position in positions]


def _span(saliency: StepSaliency, step: int) -> list[int]:
    inside = (saliency.step_ids == step).nonzero()[:, 0]
    return [int(inside[0]), int(inside[-1]) + 1] if len(inside) else [0, 0]


def _packed(values: Float[Tensor, "layer row column"]) -> bytes:
    rows, columns = np.tril_indices(values.shape[-1])
    return np.ascontiguousarray(values.numpy()[:, rows, columns], dtype="<f4").tobytes()


def _palette(name: str) -> list[int]:
    """256 colours: red, green, blue in turn."""
    colors = mpl.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return [int(x) for x in np.round(255 * colors).ravel()]
