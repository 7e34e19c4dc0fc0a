"""Explore step maps of one trace, or of several side by side, layer by layer and cell by cell.

    # wrong, correct: from `stepsal.step_saliency`
    explorer = stepsal.widgets.Explorer({"wrong": wrong, "correct": correct})
    explorer                                # in a notebook cell
    explorer.state = {"layer": 5, "metric": "share"}
    explorer.observe(lambda change: print(change["new"]), names="pinned")
    explorer.to_html("maps.html")

ipywidgets controls around a view that draws on canvases (`static/*.js`). The numbers go to the browser once, as
binary buffers; after that choosing layers, metrics and cells needs no answer from Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets
import traitlets

from stepsal.maps import StepSaliency
from stepsal.widgets.export import STATIC, page, script
from stepsal.widgets.payload import buffers, describe
from stepsal.widgets.scene import BANDS, METRICS, MOST_LINKS, MOST_THRESHOLD, SCALES, VIEWS, Scene, State
from stepsal.widgets.still import with_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ExplorerView(anywidget.AnyWidget):
    """The canvases and the text of an explorer; its choices are indices (`Scene.to_view`)."""

    _esm = script("export default { render };")
    _css = STATIC / "explorer.css"
    scene = traitlets.Dict().tag(sync=True)
    buffers = traitlets.Dict().tag(sync=True)
    controls = traitlets.Bool(False).tag(sync=True)
    trace = traitlets.Int(0).tag(sync=True)
    compare = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    slider = traitlets.Int(0).tag(sync=True)  # follows layer; moved by hand, it also leaves the band
    band = traitlets.Int(0).tag(sync=True)
    metric = traitlets.Int(0).tag(sync=True)
    scale = traitlets.Int(0).tag(sync=True)
    view = traitlets.Int(0).tag(sync=True)
    shared = traitlets.Bool(True).tag(sync=True)
    top_k = traitlets.Int(0).tag(sync=True)
    threshold = traitlets.Int(0).tag(sync=True)
    pinned = traitlets.List(traitlets.Int()).tag(sync=True)
    zoom = traitlets.List(traitlets.Int()).tag(sync=True)


class Explorer(ipywidgets.VBox):
    """A widget to explore step maps in a notebook, or on a page of their own.

    Args:
        saliency: step maps of one trace, or of several by label, which can be shown side by side and subtracted.
        attention: maps of the same traces by `stepsal.step_attention`, for the metric "attention"; None leaves it out.

    Attributes:
        pinned: the pinned cell, {"trace": label, "query": step, "key": step}, or None; a trait that can be observed.

    Raises:
        ValueError: no maps, or attention of an unknown label or of other steps or layers than the saliency.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.generate(model, "Hugo is 4 plus 3. What is Hugo?", max_new_tokens=40)
        >>> explorer = stepsal.widgets.Explorer(stepsal.step_saliency(model, trace, progress=False))
        >>> explorer.state = {"layer": 5, "metric": "share"}
        >>> explorer.state["layer"], explorer.state["band"]
        (5, None)
    """

    pinned = traitlets.Dict(default_value=None, allow_none=True)
    _parts: Sequence[ipywidgets.Widget] = ()  # all widgets that `close` is to close

    def __init__(
        self,
        saliency: StepSaliency | Mapping[str, StepSaliency],
        attention: StepSaliency | Mapping[str, StepSaliency] | None = None,
    ) -> None:
        self.scene = Scene.of(saliency, attention)
        first = self.scene.to_view(self.scene.first_state())
        self.view = ExplorerView(scene=describe(self.scene), buffers=buffers(self.scene), **first)
        self._choices = tuple(first)
        self._parts = [self.view]
        super().__init__([self._build_controls(), self.view])
        self.add_class("stepsal-widget")
        self.view.observe(self._pinned_in_view, names="pinned")

    @property
    def state(self) -> State:
        """All choices, as a plain dict; assign it, or a part of it, to restore them.

        trace, compare (label, or None for nothing beside it), layer (index in the model), band (None, "shallow",
        "middle", "deep"), metric ("share" of its row, "saliency", "difference" of shares, "attention"), scale ("log",
        "linear"), shared (one scale for all layers), top_k (links of each step), threshold (smallest part of its row,
        in per cent, that is drawn as an arc), view ("map", "arcs"), pinned and zoom ({"trace", "query", "key"} or
        None). A trace that does not have a metric shows saliency instead, and says so.

        Raises:
            ValueError: on setting, an unknown choice; nothing is changed then.
        """
        return self.scene.from_view({name: getattr(self.view, name) for name in self._choices})

    @state.setter
    def state(self, choices: State) -> None:
        indices = self.scene.to_view(self.scene.changed(self.state, choices))
        with self.view.hold_sync():
            for name, value in indices.items():
                setattr(self.view, name, value)

    def to_html(self, path: str | Path, *, title: str = "Step maps", verdicts: Mapping[str, str] | None = None) -> Path:
        """Write one self-contained page, in which hover, pins, layers and metrics work without a kernel and offline.

        Above the maps it says the model, the question, the verdicts and the date. What the reader chooses is kept in
        the page's address (after "#"), so that a view can be sent with it.

        Args:
            path: the file, such as "maps.html"; its folder must exist.
            title: heading of the page.
            verdicts: what is to be said of the answers of some of the labels, such as {"wrong": "12, and 7 is right"}.

        Returns:
            The path.

        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: a verdict on an unknown label.

        Example:
            >>> import tempfile
            >>> model = stepsal.load("mini")
            >>> trace = stepsal.generate(model, "Hugo is 4 plus 3. What is Hugo?", max_new_tokens=40)
            >>> explorer = stepsal.widgets.Explorer({"answer": stepsal.step_saliency(model, trace, progress=False)})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     explorer.to_html(f"{folder}/maps.html", verdicts={"answer": "right"}).name
            'maps.html'
        """
        return page(self.scene, self.scene.to_view(self.state), Path(path), title, verdicts or {})

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """Return the widget, and beside it a picture for where no widgets are shown."""
        return with_picture(super()._repr_mimebundle_(**options), self)

    def figure(self) -> Figure:
        """Draw the current view as a matplotlib figure."""
        import matplotlib.pyplot as plt
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.patches import Rectangle

        from stepsal import plots

        state = self.state
        labels = self.scene.traces(state)
        with plots.style():
            size = (3.6 * len(labels), 3.9 if state["view"] == "map" else 2.0)
            fig, axes = plt.subplots(1, len(labels), figsize=size, layout="constrained", squeeze=False)
            for ax, label in zip(axes[0], labels, strict=True):
                values, metric = self.scene.shown(label, state), self.scene.metric(label, state)
                roles, reduce = self.scene.maps[label].roles, self.scene.maps[label].reduce
                low, high = self.scene.color_range(label, state)
                norm = LogNorm(low, high) if low > 0 else Normalize(low, high)
                if state["view"] == "arcs":
                    arcs = self.scene.arcs(label, state)
                    plots.flow_arcs(arcs, roles=roles, ax=ax, top_k=max(1, state["top_k"]))
                else:
                    cmap = "RdBu_r" if metric == "difference" else "magma_r"
                    plots.step_map(
                        values, roles=roles, ax=ax, norm=norm, cmap=cmap, colorbar=f"{METRICS[metric]}, by {reduce}"
                    )
                    if metric == "share":  # all of its row by definition: left out, as in the browser
                        corner = min(ax.get_xlim()), min(ax.get_ylim())
                        ax.add_patch(Rectangle(corner, 1, 1, color=plots.EMPTY, linewidth=0))
                        beside = (1.4 / len(values), 1 - 0.5 / len(values))
                        ax.text(
                            *beside, "itself alone", transform=ax.transAxes, va="center", size="x-small", color="0.4"
                        )
                ax.set_title("\n(".join(self.scene.title(label, state).split(" (")), fontsize="medium")
        return fig

    def close(self) -> None:
        """Close the explorer and all that it is made of, in the kernel and in the browser."""
        for part in (*self._parts, self):
            for inner in (getattr(part, "layout", None), getattr(part, "style", None)):
                if isinstance(inner, ipywidgets.Widget):
                    inner.close()
            if part is not self:
                part.close()
        super().close()

    # -------------------------------------------------------------------------------------------- controls

    def _build_controls(self) -> ipywidgets.Widget:
        """Make controls that are linked to the view in the browser alone.

        Links in Python too would send values back that the reader, or a cell, has changed in the meantime.
        """
        view, labels = self.view, list(self.scene.maps)
        last = max(len(saliency.layers) for saliency in self.scene.maps.values()) - 1
        self.layer_slider = ipywidgets.IntSlider(view.layer, 0, last, description="layer")
        self.play = ipywidgets.Play(min=0, max=last, interval=400, show_repeat=False)
        self.band_buttons = ipywidgets.ToggleButtons(options=[name or "one layer" for name in BANDS])
        self.band_buttons.style.button_width = "84px"
        self.metric_choice = ipywidgets.Dropdown(options=self._metrics(), description="metric")
        self.scale_choice = ipywidgets.Dropdown(options=SCALES, description="scale")
        self.view_choice = ipywidgets.Dropdown(options=VIEWS, description="view")
        self.shared_box = ipywidgets.Checkbox(True, description="one scale for all layers", indent=False)
        self.links_slider = ipywidgets.IntSlider(0, 0, MOST_LINKS, description="links")
        self.threshold_slider = ipywidgets.IntSlider(0, 0, MOST_THRESHOLD, description="arcs from %")
        self.trace_choice = ipywidgets.Dropdown(options=labels, description="trace")
        self.compare_choice = ipywidgets.Dropdown(options=["nothing", *labels], description="beside", index=0)
        for choice in (self.metric_choice, self.scale_choice, self.view_choice, self.trace_choice, self.compare_choice):
            choice.layout.width = "230px"
        parts: list[ipywidgets.Widget] = []
        for widget, trait, name in (
            (self.layer_slider, "value", "slider"), (self.play, "value", "slider"),
            (self.band_buttons, "index", "band"), (self.metric_choice, "index", "metric"),
            (self.scale_choice, "index", "scale"),
            (self.view_choice, "index", "view"), (self.shared_box, "value", "shared"),
            (self.links_slider, "value", "top_k"),
            (self.threshold_slider, "value", "threshold"), (self.trace_choice, "index", "trace"),
            (self.compare_choice, "index", "compare"),
        ):  # fmt: skip
            parts += [widget, ipywidgets.jslink((view, name), (widget, trait))]  # the view's value counts at first
        rows = [
            ipywidgets.HBox([self.play, self.layer_slider, self.band_buttons]),
            ipywidgets.HBox([self.metric_choice, self.scale_choice, self.view_choice]),
            ipywidgets.HBox([self.links_slider, self.threshold_slider, self.shared_box]),
        ]
        if len(labels) > 1:
            rows[2].children = (self.trace_choice, self.compare_choice, *rows[2].children)
        box = ipywidgets.VBox(rows)
        self._parts = [*self._parts, *parts, *rows, box]
        return box

    def _metrics(self) -> list[str]:
        """Return the names to choose from: up to the last that a trace has, since the view knows them by index."""
        last = list(METRICS).index(self.scene.offered[-1])
        return list(METRICS.values())[: last + 1]

    def _pinned_in_view(self, change: Any) -> None:
        """Pass a cell on that was pinned in the browser, to whoever observes `pinned`."""
        self.pinned = self.state["pinned"]
