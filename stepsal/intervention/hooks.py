"""StepFlow as hook-point edits that follow any forward pass by themselves.

Before each forward pass a `StepFlow` reads the token ids, the attention mask and the length of the cache (one copy of
the new ids to the host: the only synchronisation) and enters them in its ledger, which says what this pass needs: for
OEB which keys are bridge and segment of each query row, for SMI where a step begins and which tokens the step before it
had. The hooks of the layers then only do tensor algebra:

    attn.hook_pattern     OEB: rescale bridge and segment
    attn.v.hook_out       SMI: keep the values of the running step
    attn.o.hook_in        SMI: inject their mean where a step begins

A pass in which no row needs an edit costs the bookkeeping and nothing in the layers. A whole text in one pass and the
same text in portions, cached, get the same edits, because the ledger decides about each token when it comes in.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.attention import sliding_window
from stepsal.bridge.check import check_model
from stepsal.bridge.hooks import attention_hooks, remove_hook
from stepsal.intervention.bridging import Bridging
from stepsal.intervention.config import StepFlowConfig
from stepsal.intervention.ledger import Ledger, Portion
from stepsal.intervention.log import FlowLog
from stepsal.intervention.oeb import LayerBridge, RowGroups, odds_equal_bridge
from stepsal.intervention.reading import Reading
from stepsal.intervention.segmentation import agreement, format_of, resolved_segmentation
from stepsal.intervention.smi import Injections, inject, momentum, previous_step_means
from stepsal.intervention.values import KeptValues
from stepsal.trace.frame import PromptFrame
from stepsal.trace.segment import Segmentation
from stepsal.trace.tracking import SequenceTracker

_active: weakref.WeakKeyDictionary[TransformerBridge, StepFlow] = weakref.WeakKeyDictionary()


@contextmanager
def stepflow(
    model: TransformerBridge, config: StepFlowConfig | None = None, *, segmentation: Segmentation | None = None
) -> Iterator[FlowLog]:
    """Run every forward pass of a model inside the context under StepFlow.

    `model(tokens)`, `model.generate`, `stepsal.generate` and `stepsal.step_saliency` all work: prompts, prompts with
    part of the thinking, whole texts, and cached decoding, alone or in batches (with padding by the attention mask). A
    new sequence begins with each pass that has no cache to continue. Beam search is not supported: it reorders the rows
    of the cache, which StepFlow can't see.

    Args:
        model: from `stepsal.load`, or another `TransformerBridge` whose attention patterns are exposed at
            `attn.hook_pattern`; with a tokenizer.
        config: settings; None takes those of the paper.
        segmentation: the way to find sections and steps; None is `Segmentation()`.

    Yields:
        The log of what was edited.

    Raises:
        ValueError: the model has no fast tokenizer with a chat template, its attention can't be edited, `config` names
            a layer that it does not have, or a context is open on it already. Inside the context: a pass continues
            another cache than that of the last pass, is given embeddings instead of tokens, or comes after the hooks of
            the context have been removed.

    Example:
        >>> model = stepsal.load("mini")
        >>> with stepsal.stepflow(model, stepsal.StepFlowConfig(tau_max=0.3)) as log:
        ...     trace = stepsal.generate(model, "Anna is 2 plus 3. What is Anna?", max_new_tokens=40)
        >>> log.sequences, log.oeb_layers, log.smi_layers
        (1, (0, 1), (6, 7))
    """
    if model in _active:  # before any pass, which the open context would take for a sequence
        raise ValueError(f"stepflow is open on {model.cfg.model_name!r} already: leave that context first")
    flow = StepFlow(model, config or StepFlowConfig(), segmentation or Segmentation())
    with flow.applied():
        yield flow.log
    if flow.log.without_question:
        warnings.warn(
            f"stepflow found no question in {flow.log.without_question} of {flow.log.sequences} sequences, and left "
            "them alone: put the tokenizer's chat template around prompts (stepsal.trace.render_prompt)",
            stacklevel=3,
        )


def active_flow(model: TransformerBridge) -> StepFlow | None:
    """Return the StepFlow that is open on a model; None without one.

    Args:
        model: from `stepsal.load`.

    Example:
        >>> model = stepsal.load("mini")
        >>> with stepsal.stepflow(model):
        ...     stepsal.intervention.active_flow(model).segmentation.format
        'think'
        >>> stepsal.intervention.active_flow(model)
    """
    return _active.get(model)


def agreed_segmentation(model: TransformerBridge, segmentation: Segmentation | None) -> Segmentation | None:
    """Return the segmentation for traces of a model: that of the open StepFlow; without one, the requested.

    Args:
        model: from `stepsal.load`.
        segmentation: the requested segmentation; None agrees with that of any open StepFlow.

    Raises:
        ValueError: a StepFlow with another segmentation is open.

    Example:
        >>> model = stepsal.load("mini")
        >>> with stepsal.stepflow(model, segmentation=stepsal.Segmentation(split="line")):
        ...     stepsal.intervention.agreed_segmentation(model, None).split
        'line'
    """
    flow = active_flow(model)
    return segmentation if flow is None else agreement(flow.segmentation, segmentation)


class AsideRows(NamedTuple):
    """Sequences that are not read for a while, and their numbers in the log."""

    reading: Reading
    log_rows: list[int]


class StepFlow:
    """One open context of `stepflow`: its hooks, and their input for the present pass.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        config: settings.
        segmentation: the way to find sections and steps.

    Attributes:
        segmentation: the same, with its format resolved.
        oeb_layers: indices of the layers that OEB edits.
        smi_layers: indices of the layers that SMI edits.
        log: the log of the edits.

    Raises:
        ValueError: the model can't be followed or edited; see `stepflow`.

    Example:
        >>> model = stepsal.load("mini")
        >>> with stepsal.stepflow(model):
        ...     stepsal.intervention.active_flow(model).oeb_layers
        (0, 1)
    """

    _reading: Reading
    _new_values: dict[int, Tensor]  # by layer, of this pass
    _portion: Portion
    _bridging: Bridging | None
    _injections: Injections | None
    _streaming: _Streaming | None = None

    def __init__(self, model: TransformerBridge, config: StepFlowConfig, segmentation: Segmentation) -> None:
        if getattr(model.tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(
                f"{model.cfg.model_name!r} has no {'fast ' if model.tokenizer else ''}tokenizer, which finding steps "
                "needs: pass one to stepsal.load(..., tokenizer=...)"
            )
        self.model, self.config = model, config
        if config.made_for not in (None, model.cfg.model_name):
            raise ValueError(
                f"these settings were chosen for {config.made_for!r}, not for {model.cfg.model_name!r}, whose heads do "
                "other things: calibrate it, or say config.but(made_for=None) to try them nevertheless"
            )
        self._taus, self._alphas = config.strengths(model.cfg.n_layers, model.cfg.n_heads)
        self.oeb_layers, self.smi_layers = tuple(self._taus), tuple(self._alphas)
        check_model(model)
        edited = {layer: [head for head, tau in enumerate(taus) if tau] for layer, taus in self._taus.items()}
        self.log = FlowLog(self.oeb_layers, self.smi_layers, edited)
        self._frame = PromptFrame.of(model.tokenizer)
        if not self._frame.opening:
            warnings.warn(
                "the chat template has no text before all questions of a conversation, so that StepFlow takes what "
                "follows the first answer for more of it: give it one question at a time, or set "
                "tokenizer.chat_template",
                stacklevel=4,  # at the `with` of the caller
            )
        self.segmentation = resolved_segmentation(segmentation, model, self._frame.tail + self._frame.rest)
        self._format = format_of(self.segmentation).after(self._frame.tail)
        self._windows = {layer: sliding_window(model, layer) for layer in self.oeb_layers}
        self._editors: list[tuple[HookPoint, LensHandle]] = []
        points = model.hook_dict  # made anew at each access
        self._listeners = [
            _LastHook(points[attention_hooks(model, layer)["v"]], self._listen_hook(layer)) for layer in self.smi_layers
        ]
        self._begin(0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Edit all passes of the model inside the context, and leave the model as it was."""
        hooks = [(attention_hooks(self.model, layer)["pattern"], self._bridge_hook(layer)) for layer in self.oeb_layers]
        hooks += [(attention_hooks(self.model, layer)["z"], self._inject_hook(layer)) for layer in self.smi_layers]
        _active[self.model] = self
        try:
            with self.model.hooks(fwd_hooks=hooks):
                points = self.model.hook_dict
                self._editors = [(points[name], points[name].fwd_hooks[-1]) for name, _ in hooks]
                clocks = [
                    self.model.original_model.register_forward_pre_hook(self._before_pass, with_kwargs=True),
                    self.model.original_model.register_forward_hook(self._after_pass),
                ]
                try:
                    for listener in self._listeners:  # from now on, so that others see that the values are hooked
                        listener.put_last()
                    yield
                finally:
                    for clock in clocks:
                        clock.remove()
                    for listener in self._listeners:
                        listener.remove()
        finally:
            del _active[self.model]
            self._end()
            self._begin(0)  # lets go of the values it holds

    def select(self, rows: Sequence[int]) -> None:
        """Keep only some rows of the batch, as a decoding loop does when the other rows have finished.

        Args:
            rows: indices of rows, in the order in which they stay; none ends all sequences.
        """
        self.log.lost([row for row in self._reading.ledger.rows_without_question if row not in rows])
        self.log.select(rows)
        if rows:
            self._reading.select(rows)
        else:
            self._reading = self._new_reading(0)

    def drop_first(self, n: int) -> None:
        """Drop the first columns of the batch, as a decoding loop does when the rows that they were for have finished.

        Args:
            n: number of columns, which are padding in all rows.
        """
        self._reading.drop_first(n)

    def set_aside(self) -> AsideRows:
        """Interrupt the sequences that are read, so that others can be read beside them until `join`."""
        aside = AsideRows(self._reading, self.log.set_aside())
        self._reading = self._new_reading(0)
        return aside

    def join(self, aside: AsideRows, cache: object) -> None:
        """Go on with sequences that were set aside, with those that were read since below them as more rows.

        Args:
            aside: what `set_aside` returned.
            cache: the cache that holds the keys of all rows, the last column of all in one.
        """
        self.log.join(aside.log_rows)
        aside.reading.join(self._reading)
        self._reading = aside.reading
        self._reading.follow(cache)

    @contextmanager
    def streaming(self, *, constant_values: bool) -> Iterator[None]:
        """Leave the bridge to an engine that never holds a whole pattern, and let it compute layers twice.

        Each pass inside the context reads one whole text. Its engine asks for the bridge of a layer (`layer_bridge`),
        edits the pattern block by block, and says what it did (`log_bridge`). Momentum is injected as ever.

        Args:
            constant_values: no gradient flows from momentum to the values that it is the mean of.
        """
        self._streaming = _Streaming(constant_values)
        try:
            yield
        finally:
            self._streaming = None

    def layer_bridge(self, layer: int, like: Tensor) -> LayerBridge | None:
        """Return the bridge of a layer in the present pass, for `streaming`; None where nothing is edited.

        Args:
            layer: index of the layer.
            like: a tensor with the device of the layer and the dtype to compute in.
        """
        if self._bridging is None or layer not in self._taus:
            return None
        bridging, taus = self._bridging.on(like.device), self._taus[layer]
        members, of_rows = (x[0] for x in bridging.row_groups(bridging.groups.shape[1]))
        ceiling = torch.minimum(bridging.shares[self._windows[layer]][0], _OfHeads(taus).on(like.device))
        masses = like.new_zeros(2, *ceiling.shape)
        return LayerBridge(
            RowGroups(members.to(like), of_rows), ceiling.to(like), tuple(map(bool, taus)), bridging.first, masses
        )

    def log_bridge(self, layer: int, bridge: LayerBridge) -> None:
        """Enter in the log what an engine did with the bridge of a layer.

        Args:
            layer: index of the layer.
            bridge: from `layer_bridge`, with its masses filled in.
        """
        before, after = bridge.masses[:, None]
        self.log.add_bridged(layer, before, after, bridge.ceiling[None] > 0)

    def owns(self, handle: LensHandle) -> bool:
        """Tell whether a hook is one of StepFlow's own edits.

        Args:
            handle: handle of the hook.
        """
        return any(handle is own for _, own in self._editors)

    def _begin(self, batch: int) -> None:
        """Begin new sequences."""
        self.log.begin(batch)
        self._reading = self._new_reading(batch)
        self._new_values = {}
        self._bridging, self._injections = None, None

    def _new_reading(self, batch: int) -> Reading:
        """Return a reading of new sequences."""
        trackers = [
            SequenceTracker(
                self.model.tokenizer, self._frame, self._format, split=self.segmentation.split,
                min_chars=self.segmentation.min_chars, whole_prompt=self.config.bridge == "prompt",
            )
            for _ in range(batch)
        ]  # fmt: skip
        ledger = Ledger(trackers, window=self.config.window, into_summary=self.config.into_summary)
        return Reading(ledger, self.smi_layers, next(self.model.parameters()).device)

    def _end(self) -> None:
        """End the sequences that are read."""
        self.log.lost(self._reading.ledger.rows_without_question)

    # -------------------------------------------------------------------------------------- around each pass

    def _before_pass(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(handle not in point.fwd_hooks for point, handle in self._editors):
            raise ValueError(
                "the hooks of stepflow were removed inside its context: leave it before model.reset_hooks()"
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("StepFlow needs token ids to find steps, but this pass was given embeddings")
        cache = kwargs.get("past_key_values")
        n_past = 0 if cache is None else int(cache.get_seq_length())
        if n_past:
            self._reading.check(cache, n_past, len(ids))
        else:
            self._end()
            self._begin(len(ids))
        for listener in self._listeners:
            listener.put_last()
        self._lay_out(*_on_host(ids.detach(), kwargs.get("attention_mask"), n_past))  # the one synchronisation

    def _after_pass(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._reading.follow(getattr(output, "past_key_values", None))

    def _lay_out(self, ids: NDArray[np.int64], real: NDArray[np.bool_]) -> None:
        """Enter the new tokens in the ledger, and lay out the edits of this pass."""
        ledger, key_groups = self._reading.ledger, self._reading.key_groups
        portion = self._portion = ledger.advance(ids, real)
        self._bridging = self._injections = None
        if self.oeb_layers:
            key_groups.update(ledger, portion.changed)
            windows = set(self._windows.values())
            self._bridging = key_groups.lay_out(ledger, portion, windows)
        if portion.places and any(map(any, self._alphas.values())):
            device = next(self.model.parameters()).device
            self._injections = Injections.of(portion.places, portion.members, device)

    # ------------------------------------------------------------------------------------------ in the layers

    def _bridge_hook(self, layer: int) -> Callable[..., Tensor | None]:
        window, tau_of = self._windows[layer], _OfHeads(self._taus[layer])

        def hook(pattern: Float[Tensor, "batch head query_pos key_pos"], hook: HookPoint) -> Tensor | None:
            if self._bridging is None or self._streaming is not None:
                return None
            bridging, n_keys = self._bridging.on(pattern.device), pattern.shape[-1]
            if n_keys > bridging.groups.shape[1]:
                raise ValueError(f"a cache of fixed size ({n_keys} keys) is not supported: use a DynamicCache")
            ceiling = torch.minimum(bridging.shares[window], tau_of.on(pattern.device))  # [batch, head, query_pos]
            bridged = odds_equal_bridge(pattern, bridging.row_groups(n_keys), ceiling)
            self.log.add_bridged(layer, bridged.before, bridged.after, ceiling > 0)
            return bridged.pattern

        return hook

    def _listen_hook(self, layer: int) -> Callable[..., None]:
        def hook(v: Float[Tensor, "batch query_pos kv_head d_head"], hook: HookPoint) -> None:
            self._new_values[layer] = v

        return hook

    def _inject_hook(self, layer: int) -> Callable[..., Tensor | None]:
        alpha_of = _OfHeads(self._alphas[layer])

        def hook(z: Float[Tensor, "batch query_pos head d_head"], hook: HookPoint) -> Tensor | None:
            new, streaming, edited = self._new_values.pop(layer), self._streaming, None
            kept = (
                self._reading.kept[layer] if streaming is None else KeptValues()
            )  # of earlier passes, too, or of none
            kept.push(self._portion.first, new.detach() if streaming and streaming.constant_values else new)
            if self._injections is not None:
                values = kept.joined()  # [batch, kept_pos, kv_head, d_head]
                injections = self._injections.on(values.device).counted_from(kept.first)
                means = previous_step_means(values, injections)  # [injection, kv_head, d_head]
                added = momentum(means, alpha_of.on(values.device))  # [injection, head, d_head]
                edited = inject(z, added, injections)
                if streaming is None or streaming.is_first(layer):
                    norms = added.detach().flatten(1).norm(dim=1)
                    self.log.add_injected(layer, norms, [row for row, _ in self._portion.places])
            kept.forget(self._portion.oldest_needed)
            return edited

        return hook


class _Streaming:
    """What StepFlow has to know of an engine that holds no patterns and computes layers twice.

    Args:
        constant_values: no gradient flows from momentum to the values that it is the mean of.
    """

    def __init__(self, constant_values: bool) -> None:
        self.constant_values = constant_values
        self._layers: set[int] = set()

    def is_first(self, layer: int) -> bool:
        """Tell whether a layer is computed for the first time in this context.

        Args:
            layer: index of the layer.
        """
        is_first = layer not in self._layers
        self._layers.add(layer)
        return is_first


class _OfHeads:
    """The strengths of the heads of a layer, on whatever device it is."""

    def __init__(self, strengths: Sequence[float]) -> None:
        self._strengths = torch.tensor(strengths)[:, None]  # [head, 1]

    def on(self, device: torch.device) -> Float[Tensor, "head 1"]:
        """Return the strengths on a device, to which they are copied once.

        Args:
            device: device of the layer.
        """
        if self._strengths.device != device:
            self._strengths = self._strengths.to(device)
        return self._strengths


class _LastHook:
    """A forward hook that is kept behind all others at its hook point.

    So it sees a value as the model uses it, and with the gradient that another hook has left it.
    """

    def __init__(self, point: HookPoint, hook: Callable[..., Tensor | None]) -> None:
        self._point, self._hook = point, hook
        self._handle: LensHandle | None = None

    def put_last(self) -> None:
        """Move the hook behind all hooks that were added since."""
        if self._handle is not None and self._point.fwd_hooks[-1] is self._handle:
            return
        self.remove()
        self._handle = self._point.add_hook(self._hook)  # type: ignore[arg-type]

    def remove(self) -> None:
        """Remove the hook, if it is on its hook point."""
        if self._handle is not None:
            remove_hook(self._point, self._handle)
            self._handle = None


def _on_host(
    ids: Int[Tensor, "batch query_pos"], mask: object, n_past: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the ids and a mask that is False for padding, both [batch, query_pos], by one copy to the host."""
    n_new = ids.shape[1]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < n_past + n_new:
        host = ids.cpu().numpy()
        return host, np.ones(host.shape, dtype=bool)
    both = torch.stack((ids, mask[:, n_past : n_past + n_new].to(ids))).cpu().numpy()
    return both[0], both[1].astype(bool)
