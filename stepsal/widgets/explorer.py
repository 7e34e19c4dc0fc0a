"""The explorer: layers and steps of one trace, or of several side by side, at one's fingertips.

    explorer = stepsal.widgets.Explorer({"wrong": wrong, "correct": correct})
    explorer                                # in a notebook cell
    explorer.state = {"layer": 5, "metric": "share"}
    explorer.observe(lambda change: print(change["new"]), names="pinned")
    explorer.to_html("maps.html")

ipywidgets controls around a view that draws on canvases (`static/explorer.js`). The numbers go to the browser once, as
binary buffers; after that choosing layers, metrics and cells needs no answer from Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets
import traitlets

from stepsal.maps import StepSaliency
from stepsal.widgets.export import page
from stepsal.widgets.scene import BANDS, METRICS, MOST_LINKS, SCALES, VIEWS, Scene, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATIC = Path(__file__).parent / "static"
CHOICES = ("trace", "compare", "layer", "band", "metric", "scale", "view", "shared", "top_k", "pinned", "zoom")


class ExplorerView(anywidget.AnyWidget):
    """The canvases and the text; its choices are indices (`Scene.to_view`)."""

    _esm = STATIC / "explorer.js"
    _css = STATIC / "explorer.css"
    scene = traitlets.Dict().tag(sync=True)
    buffers = traitlets.Dict().tag(sync=True)
    controls = traitlets.Bool(False).tag(sync=True)
    trace = traitlets.Int(0).tag(sync=True)
    compare = traitlets.Int(-1).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    band = traitlets.Int(0).tag(sync=True)
    metric = traitlets.Int(0).tag(sync=True)
    scale = traitlets.Int(0).tag(sync=True)
    view = traitlets.Int(0).tag(sync=True)
    shared = traitlets.Bool(True).tag(sync=True)
    top_k = traitlets.Int(0).tag(sync=True)
    pinned = traitlets.List(traitlets.Int()).tag(sync=True)
    zoom = traitlets.List(traitlets.Int()).tag(sync=True)


class Explorer(ipywidgets.VBox):
    """Explore step maps; see the module docstring.

    Args:
        saliency: of one trace, or of several by label, which can be shown side by side and subtracted.
        attention: maps of `stepsal.step_attention` of the same traces, for the metric "attention".

    Attributes:
        pinned: the pinned cell, {"trace": label, "query": step, "key": step}, or None; to be observed.

    Raises:
        ValueError: maps that do not go together.
    """

    pinned = traitlets.Dict(default_value=None, allow_none=True)

    def __init__(
        self,
        saliency: StepSaliency | Mapping[str, StepSaliency],
        attention: StepSaliency | Mapping[str, StepSaliency] | None = None,
    ) -> None:
        self.scene = Scene.of(saliency, attention)
        first = self.scene.to_view(self.scene.first_state())
        self.view = ExplorerView(scene=self.scene.describe(), buffers=self.scene.buffers(), **first)
        self._restoring = False
        super().__init__([self._build_controls(), self.view])
        self.add_class("stepsal-widget")
        self.view.observe(self._pinned_in_view, names="pinned")

    @property
    def state(self) -> State:
        """Every choice, as a plain dict; give it, or a part of it, back to restore it.

        trace, compare (label, or None for nothing beside it), layer (index in the model), band (None, "shallow",
        "middle", "deep"), metric ("saliency", "share" of its row, "attention", "difference" of shares), scale ("log",
        "linear"), shared (one scale for all layers), top_k (links), view ("map", "arcs"), pinned and zoom ({"trace",
        "query", "key"} or None).

        Raises:
            ValueError: on setting, an unknown choice.
        """
        return self.scene.from_view({name: getattr(self.view, name) for name in CHOICES})

    @state.setter
    def state(self, choices: State) -> None:
        wanted = self.scene.checked(self.state | choices)
        self._restoring = True
        try:
            with self.view.hold_sync():
                for name, value in self.scene.to_view(wanted).items():
                    setattr(self.view, name, value)
        finally:
            self._restoring = False

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with everything but Python: hover, pins, layers and metrics work offline.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        return page(self.scene, self.scene.to_view(self.state), Path(path))

    def figure(self) -> Figure:
        """The current view as a matplotlib figure."""
        import matplotlib.pyplot as plt
        from matplotlib.colors import LogNorm, Normalize

        from stepsal import plots

        state = self.state
        labels = [state["trace"]]
        if state["compare"] not in (None, state["trace"]) and state["metric"] != "difference":
            labels.append(state["compare"])
        shown = {label: self.scene.shown(label, state) for label in labels}
        low, high = self.scene.color_range(labels, state)
        norm = LogNorm(low, high) if low > 0 else Normalize(low, high)
        with plots.style():
            size = (3.6 * len(labels), 3.6 if state["view"] == "map" else 2.0)
            fig, axes = plt.subplots(1, len(labels), figsize=size, layout="constrained", squeeze=False)
            for ax, (label, values) in zip(axes[0], shown.items(), strict=True):
                roles = self.scene.maps[label].roles
                if state["view"] == "arcs":
                    plots.flow_arcs(values.abs(), roles=roles, ax=ax, top_k=max(1, state["top_k"]))
                else:
                    cmap = "RdBu_r" if state["metric"] == "difference" else "magma_r"
                    bar = METRICS[state["metric"]] if label == labels[-1] else False
                    plots.step_map(values, roles=roles, ax=ax, norm=norm, cmap=cmap, colorbar=bar)
                where = f"layer {state['layer']}" if state["band"] is None else f"{state['band']} layers"
                against = f" − {state['compare']}" if state["metric"] == "difference" else ""
                ax.set_title(f"{label}{against}: {where}")
        return fig

    # -------------------------------------------------------------------------------------------- controls

    def _build_controls(self) -> ipywidgets.Widget:
        view, labels = self.view, list(self.scene.maps)
        layers = max(len(saliency.layers) for saliency in self.scene.maps.values())
        self.layer_slider = ipywidgets.IntSlider(view.layer, 0, layers - 1, description="layer", continuous_update=True)
        self.play = ipywidgets.Play(min=0, max=layers - 1, interval=400, show_repeat=False)
        named = [name or "one layer" for name in BANDS]
        self.band_buttons = ipywidgets.ToggleButtons(options=named)
        self.band_buttons.style.button_width = "84px"
        self.metric_choice = ipywidgets.Dropdown(options=list(METRICS.values()), description="metric")
        self.scale_choice = ipywidgets.Dropdown(options=SCALES, description="scale")
        self.view_choice = ipywidgets.Dropdown(options=VIEWS, description="view")
        self.shared_box = ipywidgets.Checkbox(True, description="one scale for all layers", indent=False)
        self.links_slider = ipywidgets.IntSlider(0, 0, MOST_LINKS, description="links")
        self.trace_choice = ipywidgets.Dropdown(options=labels, description="trace")
        self.compare_choice = ipywidgets.Dropdown(options=[("nothing", -1), *((x, i) for i, x in enumerate(labels))])
        self.compare_choice.description = "beside"
        short = ipywidgets.Layout(width="230px")
        for widget in (self.metric_choice, self.scale_choice, self.view_choice, self.trace_choice, self.compare_choice):
            widget.layout = short
        ipywidgets.jslink((self.play, "value"), (self.layer_slider, "value"))
        for widget, trait, name in (
            (self.layer_slider, "value", "layer"), (self.band_buttons, "index", "band"),
            (self.metric_choice, "index", "metric"), (self.scale_choice, "index", "scale"),
            (self.view_choice, "index", "view"), (self.shared_box, "value", "shared"),
            (self.links_slider, "value", "top_k"), (self.trace_choice, "index", "trace"),
        ):  # fmt: skip
            traitlets.link((view, name), (widget, trait))  # and in the browser, where no kernel has to answer:
            ipywidgets.jslink((widget, trait), (view, name))
        traitlets.link((view, "compare"), (self.compare_choice, "value"))
        traitlets.link((view, "layer"), (self.play, "value"))  # it plays on from here
        self.layer_slider.observe(self._one_layer, names="value")
        rows = [
            ipywidgets.HBox([self.play, self.layer_slider, self.band_buttons]),
            ipywidgets.HBox([self.metric_choice, self.scale_choice, self.view_choice]),
            ipywidgets.HBox([self.links_slider, self.shared_box]),
        ]
        if len(labels) > 1:
            rows[2].children = (self.trace_choice, self.compare_choice, *rows[2].children)
        return ipywidgets.VBox(rows)

    def _one_layer(self, change: Any) -> None:
        """Whoever moves the slider wants to see that layer, not the band."""
        if not self._restoring:
            self.view.band = 0

    def _pinned_in_view(self, change: Any) -> None:
        self.pinned = self.state["pinned"]
