"""Try StepFlow live: choose layers and strength, let the model answer without and with it, see where the answers part.

    panel = stepsal.widgets.StepFlowPanel(model, "Hugo is 4 plus 3. Anna is Hugo plus 9. What is Anna?")
    panel                        # in a notebook cell: sliders, run and stop
    panel.run()                  # or from code; panel.traces, panel.saliency, panel.explorer

Only one panel of a process runs at a time.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets
import torch

from stepsal.generation.answers import generate
from stepsal.generation.decoding import Decoding
from stepsal.intervention import StepFlowConfig
from stepsal.intervention.heads import EditedHeads, Heads
from stepsal.intervention.segmentation import common_segmentation
from stepsal.layers import Layers, layer_ranges
from stepsal.saliency import step_saliency
from stepsal.trace.prompt import check_chat
from stepsal.trace.segment import Segmentation
from stepsal.widgets.explorer import Explorer
from stepsal.widgets.still import with_picture

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.maps import StepSaliency
    from stepsal.trace import Trace

PLAIN, EDITED = "without StepFlow", "with StepFlow"
_running = threading.Lock()  # one run at a time in a process: panels may share a model


class Stopped(Exception):
    """The signal that the reader has pressed stop."""


class StepFlowPanel(ipywidgets.VBox):
    """A widget that answers a question without and with StepFlow, and shows both answers with their maps.

    The run button writes the answers in a thread, so that the stop button is heard; it takes effect before the next
    forward pass.

    Args:
        model: from `stepsal.load`.
        question: the question to begin with; it can be edited in the widget.
        config: settings of StepFlow to begin with; None takes those of the paper. Heads that they
            name, or layers with gaps between them, can be switched on and off, but not moved.
        decoding: settings of decoding for both answers; the default is greedy, with 256 new tokens at most.
        seed: seed of the sampling of both answers.
        segmentation: how sections and steps are found, by StepFlow and in the traces; None is `Segmentation()`.
        chat: switches of the chat template, such as {"enable_thinking": False}.

    Raises:
        ValueError: the chat template does not have a switch of `chat`.

    Attributes:
        traces: the answers of the last run, by "without StepFlow" and "with StepFlow".
        saliency: step maps by the same names; the map "with StepFlow" is computed under StepFlow.
        explorer: an explorer of these maps, side by side; None before the first run.
        status: HTML widget that says what the panel is doing, or the error that ended a run of the run button.

    Example:
        >>> decoding = stepsal.Decoding(max_new_tokens=40)
        >>> model = stepsal.load("mini")
        >>> panel = stepsal.widgets.StepFlowPanel(model, "Hugo is 4 plus 3. What is Hugo?", decoding=decoding)
        >>> panel.run()
        >>> list(panel.traces), panel.explorer.state["compare"]
        (['without StepFlow', 'with StepFlow'], 'with StepFlow')
    """

    def __init__(
        self,
        model: TransformerBridge,
        question: str,
        config: StepFlowConfig | None = None,
        *,
        decoding: Decoding = Decoding(max_new_tokens=256),  # it is frozen
        seed: int = 0,
        segmentation: Segmentation | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.decoding, self.seed, self.segmentation = model, decoding, seed, segmentation
        self.chat = check_chat(model.tokenizer, chat)
        self.traces: dict[str, Trace] = {}
        self.saliency: dict[str, StepSaliency] = {}
        self.explorer: Explorer | None = None
        self._stop, self._thread, self._runner = threading.Event(), threading.Thread(), 0
        self._first_config, last = config or StepFlowConfig(), model.cfg.n_layers - 1
        first = self._first_config
        first.strengths(model.cfg.n_layers, model.cfg.n_heads)  # refuses heads that the model does not have
        oeb, smi = first.resolve(model.cfg.n_layers)
        wide = ipywidgets.Layout(width="420px")
        self.question = ipywidgets.Textarea(question, description="question", layout=ipywidgets.Layout(width="860px"))
        self.tau_max = ipywidgets.FloatSlider(first.tau_max, min=0.01, max=0.9, step=0.01, description="tau_max")
        self.alpha = ipywidgets.FloatSlider(first.alpha, min=0.0, max=1.0, step=0.01, description="alpha")
        self.oeb = ipywidgets.Checkbox(
            bool(oeb), description=f"bridge (OEB) in {_where(first.oeb_layers)}", indent=False
        )
        self.smi = ipywidgets.Checkbox(
            bool(smi), description=f"momentum (SMI) in {_where(first.smi_layers)}", indent=False
        )
        self.oeb_layers = ipywidgets.IntRangeSlider(
            value=(min(oeb, default=0), max(oeb, default=0)), min=0, max=last, disabled=_is_fixed(first.oeb_layers)
        )
        self.smi_layers = ipywidgets.IntRangeSlider(
            value=(min(smi, default=last), max(smi, default=last)), min=0, max=last,
            disabled=_is_fixed(first.smi_layers),
        )  # fmt: skip
        for slider in (self.tau_max, self.alpha, self.oeb_layers, self.smi_layers):
            slider.layout = wide
        self.run_button = ipywidgets.Button(description="run", button_style="primary")
        self.stop_button = ipywidgets.Button(description="stop", disabled=True)
        self.bar = ipywidgets.IntProgress(0, 0, 2 * decoding.max_new_tokens, layout=wide)
        self.status = ipywidgets.HTML("")  # of escaped text; a Label would typeset what stands between dollar signs
        self.parting = ipywidgets.HTML("")
        self.place = ipywidgets.VBox([])  # holds the explorer
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.stop_button.add_class("stepsal-stop")
        self.run_button.add_class("stepsal-run")
        self.status.add_class("stepsal-status")
        self.parting.add_class("stepsal-parting")
        super().__init__(
            [
                self.question,
                ipywidgets.HBox([ipywidgets.VBox([self.oeb, self.oeb_layers, self.tau_max]),
                                 ipywidgets.VBox([self.smi, self.smi_layers, self.alpha])]),
                ipywidgets.HBox([self.run_button, self.stop_button, self.bar, self.status]),
                self.parting,
                self.place,
            ]
        )  # fmt: skip
        self.add_class("stepsal-panel-live")

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """Return the widget, and beside it a picture of the last run's maps for where no widgets are shown."""
        bundle = super()._repr_mimebundle_(**options)
        return bundle if self.explorer is None else with_picture(bundle, self.explorer)

    @property
    def config(self) -> StepFlowConfig:
        """The settings of StepFlow that the controls are set to."""

        def layers(used: ipywidgets.Checkbox, slider: ipywidgets.IntRangeSlider, first: Layers | Heads) -> Any:
            if not used.value:
                return ()
            return first if _is_fixed(first) else tuple(range(slider.value[0], slider.value[1] + 1))

        return self._first_config.but(
            oeb_layers=layers(self.oeb, self.oeb_layers, self._first_config.oeb_layers),
            smi_layers=layers(self.smi, self.smi_layers, self._first_config.smi_layers),
            tau_max=self.tau_max.value,
            alpha=self.alpha.value,
        )

    def start(self) -> None:
        """Run in the background; an error is shown in `status`."""

        def run() -> None:
            try:
                self._run()
            except Exception as error:
                _say(self.status, f"error: {error}")

        if not self._thread.is_alive():
            self._stop.clear()
            self._thread = threading.Thread(target=run, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the run before its next forward pass; what was shown before stays."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the run in the background is over.

        Args:
            timeout: most seconds to wait; None waits as long as it takes.
        """
        self._thread.join(timeout)

    def run(self) -> None:
        """Answer without and with StepFlow, compute the maps of both answers, and show them.

        Raises:
            ValueError: a question or settings that `stepsal.generate` refuses.
            RuntimeError: a panel is running already.
        """
        self._stop.clear()
        self._run()

    def _run(self) -> None:
        if not _running.acquire(blocking=False):
            raise RuntimeError("a panel is running already; wait for it, or stop it")
        try:
            self._answer_and_show()
        finally:
            _running.release()

    def _answer_and_show(self) -> None:
        self._runner = threading.get_ident()
        self.run_button.disabled, self.stop_button.disabled = True, False
        self.bar.value = 0
        handle = self.model.original_model.register_forward_pre_hook(self._before_pass)
        try:
            config, question = self.config, self.question.value
            segmentation = common_segmentation(self.segmentation or Segmentation(), self.model)
            configs = {PLAIN: None, EDITED: config}
            traces, saliency = {}, {}
            for name, settings in configs.items():
                _say(self.status, f"answering {name} ...")
                traces[name] = generate(
                    self.model, question, stepflow=settings, seed=self.seed, segmentation=segmentation,
                    chat=self.chat, **self.decoding.to_dict(),
                )  # fmt: skip
            for name, settings in configs.items():
                _say(self.status, f"computing maps {name} ...")
                saliency[name] = step_saliency(self.model, traces[name], stepflow=settings, progress=False)
            self.traces, self.saliency = traces, saliency
            self._show()
            _say(self.status, "done")
            self.bar.value = self.bar.max
        except Stopped:
            _say(self.status, "stopped")
        except BaseException:
            _say(self.status, "")
            raise
        finally:
            handle.remove()
            self.run_button.disabled, self.stop_button.disabled = False, True

    def _before_pass(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        """Count a forward pass of this panel's run, or end the run before it."""
        if threading.get_ident() != self._runner:  # somebody else's pass
            return
        if self._stop.is_set():
            raise Stopped
        self.bar.value += 1

    def _show(self) -> None:
        plain, edited = self.traces[PLAIN], self.traces[EDITED]
        _say(self.parting, tell_parting(plain, edited))
        old, self.explorer = self.explorer, Explorer(self.saliency)
        self.explorer.state = {"compare": EDITED, "metric": "share"}
        self.place.children = (self.explorer,)
        if old is not None:
            old.close()


def _say(label: ipywidgets.HTML, text: str) -> None:
    label.value = html.escape(text)


def _is_fixed(chosen: Any) -> bool:
    """Tell whether a choice is none that a slider can move: single heads, or layers with gaps between them."""
    if isinstance(chosen, EditedHeads):
        return True
    is_indices = isinstance(chosen, tuple) and all(isinstance(layer, int) for layer in chosen)
    return is_indices and len(chosen) > 0 and len(set(chosen)) <= max(chosen) - min(chosen)


def _where(chosen: Any) -> str:
    """Say what a part of StepFlow edits."""
    if isinstance(chosen, EditedHeads):
        return f"{chosen.n_heads} heads of layers {layer_ranges(sorted(chosen))}"
    return f"layers {layer_ranges(sorted(chosen))}" if _is_fixed(chosen) else "layers"


def first_difference(plain: Trace, edited: Trace) -> int | None:
    """Return the position of the first token that differs, or that only one answer has; None if there is none.

    Args:
        plain: the answer without StepFlow.
        edited: the answer with it, to the same question.
    """
    n = min(len(plain), len(edited))
    differ = (plain.tokens[:n] != edited.tokens[:n]).nonzero()
    if len(differ):
        return int(differ[0, 0])
    return None if len(plain) == len(edited) else n


def tell_parting(plain: Trace, edited: Trace) -> str:
    """Say in words where two answers to the same question part.

    Args:
        plain: the answer without StepFlow.
        edited: the answer with it, to the same question.
    """
    position = first_difference(plain, edited)
    if position is None:
        return "Both answers are the same."
    words = [
        " ".join(t.text[t.offsets[position, 0] :].split())[:60] if position < len(t) else "" for t in (plain, edited)
    ]
    step = int(plain.step_ids[position]) if position < len(plain) else len(plain.steps)
    where = f"in step {step}" if step >= 0 else "between steps"
    return f"They part {where}, after {position - plain.n_prompt} tokens: “{words[0]} …” becomes “{words[1]} …”"
