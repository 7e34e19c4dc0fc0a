"""StepFlow as hook-point edits that follow any forward pass by themselves.

Before each forward pass a `StepFlow` reads the token ids, the attention mask and the length of the cache (one copy of
the new ids to the host: the only synchronisation), advances one `SequenceTracker` per row, and lays out what this
pass needs: for OEB which keys are bridge and segment of each query row, for SMI where a step begins and which tokens
the step before it had. The hooks of the layers then only do tensor algebra:

    attn.hook_pattern     OEB: rescale bridge and segment
    attn.v.hook_out       SMI: remember the values of the running step
    attn.o.hook_in        SMI: inject their mean where a step begins

A pass in which no row needs an edit costs the bookkeeping and nothing in the layers. A whole text in one pass and the
same text in portions, cached, lay out the same edits, because the tracker decides about each token when it comes in.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.attention import sliding_window
from stepsal.bridge.hooks import attention_hooks, check_model, remove_hook
from stepsal.bridge.presets import preset_format
from stepsal.intervention.config import StepFlowConfig
from stepsal.intervention.log import FlowLog
from stepsal.intervention.oeb import bridge_ceiling, odds_equal_bridge
from stepsal.intervention.smi import Injections, inject, previous_step_means
from stepsal.trace.formats import FORMATS
from stepsal.trace.segment import Segmentation
from stepsal.trace.tracking import PromptFrame, Section, SequenceTracker

_NOWHERE = -1  # a section that no key is in
_BRIDGE_OF = np.array([_NOWHERE, _NOWHERE, Section.QUESTION, Section.THINKING], dtype=np.int8)  # by section of the row
_SEGMENT_OF = np.array([_NOWHERE, _NOWHERE, Section.THINKING, Section.SUMMARY], dtype=np.int8)

_active: weakref.WeakKeyDictionary[TransformerBridge, StepFlow] = weakref.WeakKeyDictionary()


@contextmanager
def stepflow(
    model: TransformerBridge, config: StepFlowConfig | None = None, *, segmentation: Segmentation | None = None
) -> Iterator[FlowLog]:
    """Run every forward pass of `model` inside the context under StepFlow.

    `model(tokens)`, `model.generate`, `stepsal.generate` and `stepsal.step_saliency` all work: prompts, prompts with
    part of the thinking, whole texts, and cached decoding, alone or in batches (padding is told by the attention mask).
    A new sequence begins with each pass that has no cache to continue. Not for beam search, whose reordering of the
    cache's rows can't be seen from here.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        config: settings; None is the paper's.
        segmentation: how sections and steps are found; None is `Segmentation()`.

    Yields:
        The log of what was edited.

    Raises:
        ValueError: the model has no fast tokenizer with a chat template, its attention can't be edited, `config` names
            a layer that it does not have, or a context is open on it already. Inside: a pass that continues another
            cache than that of the last pass, that gives embeddings instead of tokens, or after the context's hooks
            have been removed.
    """
    flow = StepFlow(model, config or StepFlowConfig(), segmentation or Segmentation())
    with flow.applied():
        yield flow.log


def active_flow(model: TransformerBridge) -> StepFlow | None:
    """The StepFlow that is open on a model, for a decoding loop that drops finished rows."""
    return _active.get(model)


def agreed_segmentation(model: TransformerBridge, segmentation: Segmentation | None) -> Segmentation | None:
    """Return the segmentation that traces of a model are to be cut with: that of the StepFlow that is open, if one is.

    Raises:
        ValueError: a segmentation that differs from it.
    """
    if (flow := active_flow(model)) is None:
        return segmentation
    if (
        segmentation is not None
        and replace(segmentation, format=flow.segmentation.format) != flow.segmentation
        or (segmentation is not None and segmentation.format not in ("auto", flow.segmentation.format))
    ):
        raise ValueError(
            f"StepFlow is open with {flow.segmentation}, but the steps are those of {segmentation}: use one of them for both"
        )
    return flow.segmentation


@dataclass(frozen=True, eq=False)
class _Bridging:
    """OEB in one pass: sections that are bridge and segment of each query row, and the ceiling for each window."""

    bridge: Tensor  # bool [batch, query_pos, key_pos]
    segment: Tensor  # bool [batch, query_pos, key_pos]
    ceilings: dict[int | None, Tensor]  # window of a layer -> [batch, query_pos]
    eligible: dict[int | None, Tensor]  # ceiling > 0
    copies: dict[torch.device, _Bridging] = field(default_factory=dict)  # for layers on other devices

    def on(self, device: torch.device) -> _Bridging:
        if device == self.bridge.device:
            return self
        if device not in self.copies:
            ceilings, eligible = ({w: x.to(device) for w, x in of.items()} for of in (self.ceilings, self.eligible))
            self.copies[device] = _Bridging(self.bridge.to(device), self.segment.to(device), ceilings, eligible)
        return self.copies[device]


class StepFlow:
    """The state of one context: a tracker per row, and what the current pass needs; see `stepflow`."""

    _trackers: list[SequenceTracker]
    _columns: list[list[int]]  # key position of each token of a row
    _sections: NDArray[np.int8]  # of each key position, on the host [batch, capacity]
    _before: NDArray[np.int32]  # keys of each section before a key position [batch, capacity + 1, section]
    _origins: NDArray[np.int32]  # where the turn of each key position begins [batch, capacity]
    _on_device: Tensor  # `_sections` on the model's device, int8 [batch, capacity]
    _cache: Callable[[], Any]  # a weak reference to the cache of the last pass
    _n_columns: int  # key positions so far
    _first: int  # key position of the first query of this pass
    _needed: int  # the first key position whose values a later injection may need
    _values: dict[int, list[tuple[int, Tensor]]]  # layer -> (first key position, values), contiguous
    _new_values: dict[int, Tensor]
    _bridging: _Bridging | None
    _injections: Injections | None
    _injected_rows: list[int]  # row of each of them, on the host

    def __init__(self, model: TransformerBridge, config: StepFlowConfig, segmentation: Segmentation) -> None:
        if model in _active:  # before any pass, which the open context would take for a sequence
            raise ValueError(f"stepflow is open on {model.cfg.model_name!r} already: leave that context first")
        if getattr(model.tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(
                f"{model.cfg.model_name!r} has no {'fast ' if model.tokenizer else ''}tokenizer, which finding steps "
                "needs: pass one to stepsal.load(..., tokenizer=...)"
            )
        self.model, self.config = model, config
        self.oeb_layers, self.smi_layers = config.resolve(model.cfg.n_layers)
        check_model(model)
        self.log = FlowLog(self.oeb_layers, self.smi_layers)
        self._windows = {layer: sliding_window(model, layer) for layer in self.oeb_layers}
        self._frame = PromptFrame.of(model.tokenizer)
        name = segmentation.format
        if name == "auto":
            name = preset_format(model) or ("think" if FORMATS["think"].opened_by(self._frame.tail) else "plain")
        self.segmentation = replace(segmentation, format=name)
        self._format = (FORMATS[name] if isinstance(name, str) else name).after(self._frame.tail)
        self._editors: list[tuple[HookPoint, LensHandle]] = []
        points = model.hook_dict  # made anew at each access
        self._value_points = {layer: points[attention_hooks(layer)["v"]] for layer in self.smi_layers}
        self._listeners: dict[int, tuple[HookPoint, LensHandle]] = {}
        self._start(0)

    # ------------------------------------------------------------------------------------------- the context

    @contextmanager
    def applied(self) -> Iterator[None]:
        hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
        for layer in self.oeb_layers:
            hooks.append((attention_hooks(layer)["pattern"], self._bridge_hook(layer)))
        for layer in self.smi_layers:
            hooks.append((attention_hooks(layer)["z"], self._inject_hook(layer)))
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
                    yield
                finally:
                    for clock in clocks:
                        clock.remove()
                    for layer in list(self._listeners):
                        self._stop_listening(layer)
        finally:
            del _active[self.model]
            self._end_sequences()
            self._start(0)  # lets go of the values it holds
        if self.log.without_question:
            warnings.warn(
                f"stepflow found no question in {self.log.without_question} of {self.log.sequences} sequences, and "
                "left them alone: put the tokenizer's chat template around prompts (stepsal.trace.render_prompt)",
                stacklevel=4,
            )

    def select(self, rows: list[int]) -> None:
        """Keep only these batch rows, as a decoding loop does whose other rows have finished."""
        index = torch.tensor(rows)
        self.log.lost([r for r, t in enumerate(self._trackers) if r not in rows and not t.found_question])
        self.log.select(rows)
        self._trackers = [self._trackers[row] for row in rows]
        self._columns = [self._columns[row] for row in rows]
        self._sections, self._before, self._origins = self._sections[rows], self._before[rows], self._origins[rows]
        self._on_device = self._on_device[index.to(self._on_device.device)]
        for chunks in self._values.values():
            chunks[:] = [(first, v[index.to(v.device)]) for first, v in chunks]

    # -------------------------------------------------------------------------------------- before each pass

    def _before_pass(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(handle not in point.fwd_hooks for point, handle in self._editors):
            raise ValueError(
                "the hooks of stepflow were removed inside its context: leave it before model.reset_hooks()"
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("StepFlow needs token ids to find steps, but this pass was given embeddings")
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        host, real = _on_host(ids.detach(), kwargs.get("attention_mask"), past)  # the one synchronisation
        batch = len(host)
        if past == 0:
            self._end_sequences()
            self._start(batch)
        elif past != self._n_columns or batch != len(self._trackers):
            raise ValueError(
                f"this pass continues a cache of {past} tokens in {batch} rows, but StepFlow has followed "
                f"{self._n_columns} tokens in {len(self._trackers)} rows: read prompts inside the context"
            )
        elif cache is not self._cache():
            raise ValueError(
                "this pass continues another cache than that of the last pass, and StepFlow follows one at a time: "
                "read prompt and answer in turn, and don't copy caches"
            )
        for layer in self.smi_layers:
            self._listen_last(layer)
        self._advance(host, real)

    def _after_pass(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        self._cache = _no_cache if cache is None else weakref.ref(cache)

    def _start(self, batch: int) -> None:
        """Begin new sequences."""
        self.log.begin(batch)
        self._trackers = [
            SequenceTracker(
                self.model.tokenizer, self._frame, self._format, split=self.segmentation.split,
                min_chars=self.segmentation.min_chars, whole_prompt=self.config.bridge == "prompt",
            )
            for _ in range(batch)
        ]  # fmt: skip
        self._columns = [[] for _ in range(batch)]
        self._sections = np.zeros((batch, 256), dtype=np.int8)
        self._before = np.zeros((batch, 257, len(Section)), dtype=np.int32)
        device = next(self.model.parameters()).device
        self._on_device = torch.zeros((batch, 256), dtype=torch.int8, device=device)
        self._origins = np.zeros((batch, 256), dtype=np.int32)
        self._n_columns = 0
        self._cache = _no_cache
        self._values = {layer: [] for layer in self.smi_layers}
        self._new_values = {}
        self._bridging, self._injections = None, None

    def _end_sequences(self) -> None:
        self.log.lost([row for row, tracker in enumerate(self._trackers) if not tracker.found_question])
        self._trackers = []

    def _advance(self, ids: NDArray[np.int64], real: NDArray[np.bool_]) -> None:
        """Read the new tokens of all rows and lay out the edits of this pass."""
        first, stop = self._n_columns, self._n_columns + ids.shape[1]
        self._n_columns = stop
        self._grow(stop)
        changed = first  # the first column whose section is new or was revised
        places: list[tuple[int, int]] = []
        members: list[list[int]] = []
        for row, tracker in enumerate(self._trackers):
            columns, n_known = self._columns[row], len(self._columns[row])
            columns += (first + np.flatnonzero(real[row])).tolist()
            starts, revised = [], n_known
            for column, token in zip(columns[n_known:], ids[row, real[row]].tolist(), strict=True):
                in_prompt = tracker.in_prompt
                starts += tracker.push([token])
                if in_prompt and not tracker.in_prompt:  # the question is known now, all of it
                    revised = min(revised, tracker.origin)
                self._origins[row, column] = columns[tracker.origin]
            self._sections[row, columns[revised:]] = tracker.sections[revised:]
            if revised < n_known:
                changed = min(changed, columns[revised])
            for start in starts:
                wanted = start.section is Section.THINKING or (
                    self.config.into_summary and start.section is Section.SUMMARY
                )
                if wanted and start.previous_section is Section.THINKING:
                    places.append((row, columns[start.position] - first))
                    members.append([columns[k] for k in start.previous[-(self.config.window or 0) :]])
        is_section = self._sections[:, changed:stop, None] == np.arange(len(Section))
        self._before[:, changed + 1 : stop + 1] = self._before[:, changed, None] + is_section.cumsum(1)
        device = self._on_device.device
        fresh = torch.from_numpy(self._sections[:, changed:stop].copy())
        self._on_device[:, changed:stop] = fresh.to(device, non_blocking=True)
        self._needed = min(
            (c[t.oldest_needed] if t.oldest_needed < len(c) else stop)
            for c, t in zip(self._columns, self._trackers, strict=True)
        )
        self._bridging = self._lay_out_bridges(first, stop) if self.oeb_layers else None
        self._injections = None
        if places and self.smi_layers and self.config.alpha > 0:
            self._injections = Injections.of(places, members, device)
            self._injected_rows = [row for row, _ in places]
        self._first = first

    def _grow(self, n_columns: int) -> None:
        capacity = self._sections.shape[1]
        if n_columns > capacity:
            more = max(n_columns - capacity, capacity)
            self._sections = np.pad(self._sections, ((0, 0), (0, more)))
            self._origins = np.pad(self._origins, ((0, 0), (0, more)))
            self._before = np.pad(self._before, ((0, 0), (0, more), (0, 0)))
            self._on_device = torch.nn.functional.pad(self._on_device, (0, more))

    def _lay_out_bridges(self, first: int, stop: int) -> _Bridging | None:
        rows = self._sections[:, first:stop]  # section of each query row [batch, query_pos]
        bridge_of, segment_of = _BRIDGE_OF[rows], _SEGMENT_OF[rows]
        if (bridge_of == _NOWHERE).all():
            return None
        ceilings, eligible, device = {}, {}, self._on_device.device
        for window in set(self._windows.values()):
            n_bridge = torch.from_numpy(self._visible(bridge_of, first, window))
            n_segment = torch.from_numpy(self._visible(segment_of, first, window))
            ceiling = bridge_ceiling(n_bridge, n_segment, self.config.tau_max)  # [batch, query_pos]
            ceilings[window], eligible[window] = (x.to(device, non_blocking=True) for x in (ceiling, ceiling > 0))
        keys = self._on_device[:, None, :stop]
        bridge, segment = (
            keys == torch.from_numpy(section).to(device, non_blocking=True)[:, :, None]  # [batch, query_pos, key_pos]
            for section in (bridge_of, segment_of)
        )
        if any(tracker.origin > 0 for tracker in self._trackers):  # keys of earlier turns are in neither
            this_turn = torch.arange(stop) >= torch.from_numpy(self._origins[:, first:stop])[:, :, None]
            bridge, segment = bridge & this_turn.to(device), segment & this_turn.to(device)
        return _Bridging(bridge, segment, ceilings, eligible)

    def _visible(self, wanted: NDArray[np.int8], first: int, window: int | None) -> NDArray[np.int32]:
        """How many keys of the wanted section each query row sees, itself included; [batch, query_pos]."""
        until = np.arange(first, first + wanted.shape[1]) + 1
        since = self._origins[:, first : first + wanted.shape[1]]  # [batch, query_pos]
        if window is not None:
            since = np.maximum(since, until - window)
        rows, sections = np.arange(len(wanted))[:, None], np.maximum(wanted, 0)
        counts = self._before[rows, until, sections] - self._before[rows, since, sections]
        return np.where(wanted == _NOWHERE, 0, counts)

    # ------------------------------------------------------------------------------------------ in the layers

    def _bridge_hook(self, layer: int) -> Callable[..., Tensor | None]:
        def hook(pattern: Tensor, hook: HookPoint) -> Tensor | None:  # [batch, head, query_pos, key_pos]
            if self._bridging is None:
                return None
            bridging, window, n_keys = self._bridging.on(pattern.device), self._windows[layer], pattern.shape[-1]
            if n_keys > bridging.bridge.shape[-1]:
                raise ValueError(f"a cache of fixed size ({n_keys} keys) is not supported: use a DynamicCache")
            bridged = odds_equal_bridge(
                pattern,
                bridging.bridge[..., -n_keys:],  # a sliding window's cache keeps only the last keys
                bridging.segment[..., -n_keys:],
                bridging.ceilings[window],
            )
            self.log.add_bridged(layer, bridged.before, bridged.after, bridging.eligible[window])
            return bridged.pattern

        return hook

    def _listen_last(self, layer: int) -> None:
        """Take the values after all other hooks: as the model uses them, or as another hook cut their gradient."""
        point = self._value_points[layer]
        if layer in self._listeners:
            if point.fwd_hooks[-1] is self._listeners[layer][1]:
                return
            self._stop_listening(layer)

        def hook(v: Tensor, hook: HookPoint) -> None:  # [batch, pos, kv_head, d_head]
            self._new_values[layer] = v

        self._listeners[layer] = point, point.add_hook(hook)  # type: ignore[arg-type]

    def _stop_listening(self, layer: int) -> None:
        remove_hook(*self._listeners.pop(layer))

    def _inject_hook(self, layer: int) -> Callable[..., Tensor | None]:
        def hook(z: Tensor, hook: HookPoint) -> Tensor | None:  # [batch, pos, head, d_head]
            chunks, v, edited = self._values[layer], self._new_values.pop(layer), None
            if self._injections is not None:
                kept_from = chunks[0][0] if chunks else self._first
                kept = torch.cat([*(chunk for _, chunk in chunks), v], dim=1)
                injections = Injections(*(x.to(v.device) for x in self._injections))
                injections = injections._replace(member_pos=injections.member_pos - kept_from)
                means = previous_step_means(kept, injections)  # [injection, kv_head, d_head]
                edited = inject(z, means, injections, self.config.alpha)
                per_head = z.shape[2] // means.shape[1]
                norms = self.config.alpha * per_head**0.5 * means.flatten(1).norm(dim=1)
                self.log.add_injected(layer, norms, self._injected_rows)
            while chunks and chunks[0][0] + chunks[0][1].shape[1] <= self._needed:
                chunks.pop(0)
            if (skip := max(0, self._needed - self._first)) < v.shape[1]:
                chunks.append((self._first + skip, v.detach()[:, skip:].clone() if skip else v.detach()))
            return edited

        return hook


def _no_cache() -> None:
    return None


def _on_host(ids: Tensor, mask: Any, past: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids and which of them are no padding, [batch, query_pos], in one copy."""
    n_new = ids.shape[1]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < past + n_new:
        host = ids.cpu().numpy()
        return host, np.ones(host.shape, dtype=bool)
    both = torch.stack((ids, mask[:, past : past + n_new].to(ids))).cpu().numpy()
    return both[0], both[1].astype(bool)
