"""Refuse models whose attention can't be read, differentiated and edited through hook points.

The pattern that flows through `attn.hook_pattern` must be the one that the model uses. Some adapters of TransformerLens
leave the attention to Hugging Face and report the pattern after the fact, where an edit does nothing and a gradient is
never seen. `check_model` finds that out by reading two texts of four tokens, with every pattern replaced by the
identity: each attention output must then be the values themselves. The same pass tells whether the scores are those of
the queries and keys at their hook points, whether gradients come through every part (some quantised layers cut them off
without a word), and whether all numbers are finite.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge

from stepsal.bridge.attention import attention_of, expected_scores
from stepsal.bridge.finite import non_finite_parameter
from stepsal.bridge.gradients import differentiable
from stepsal.bridge.hooks import Hook, attention_hooks, first_hooks_on, show_rotated

_N_TOKENS = 4  # of each of the two texts


class Fault(NamedTuple):
    """A reason why a model can't be served, the layer in which it shows, and what can be done."""

    layer: int
    reason: str
    remedy: str = "choose a model of a family in the table of models (docs/models.md)"


class Trial(NamedTuple):
    """Outcome of the trial pass.

    Attributes:
        activations: what the hook points of attention have shown, by their names; patterns as they were.
        cut_off: layer and hook point of each part through which no gradient comes.
        error: the error in words, where differentiating the pass raised one.
    """

    activations: dict[str, Tensor]
    cut_off: list[tuple[int, str]]
    error: str | None


_checked: weakref.WeakKeyDictionary[TransformerBridge, str | None] = weakref.WeakKeyDictionary()


def check_model(model: TransformerBridge) -> None:
    """Refuse a model whose attention can't be read and edited through hook points; each model is tried out once.

    All hook points must exist and fire in every layer, the attention output must be the pattern at `hook_pattern` times
    the values, the scores those of queries and keys (a bias that depends on positions alone may be added), and
    gradients must come through all parts. Hooks of others are taken off for the one short pass that tells this.

    Args:
        model: a bridge, from `stepsal.load` or booted elsewhere.

    Raises:
        ValueError: the model can't be served; the message names the model, the layer, the reason and a remedy.

    Example:
        >>> from stepsal.bridge.check import check_model
        >>> check_model(stepsal.load("mini"))
    """
    if model in _checked:
        return
    fault, bias = _fault_before_reading(model), None
    if fault is None:
        trial = _try_out(model)
        fault = _silent(model, trial) or _not_finite(model, trial) or _pattern_without_effect(model, trial)
        if fault is None:
            bias, fault = _scores_of_another_kind(model, trial)
        fault = fault or _gradient_cut_off(trial)
    if fault is not None:
        raise ValueError(
            f"{model.cfg.model_name!r} ({model.cfg.architecture}) is not supported: layer {fault.layer}: "
            f"{fault.reason}. stepsal needs a decoder-only model whose TransformerLens adapter computes attention "
            f"itself: {fault.remedy}"
        )
    _checked[model] = bias


def bias_of_scores(model: TransformerBridge) -> str | None:
    """Return in words what a model adds to its scores besides the product of query and key; None where nothing is.

    Args:
        model: a bridge that `check_model` accepts.

    Example:
        >>> from stepsal.bridge.check import bias_of_scores
        >>> bias_of_scores(stepsal.load("mini")) is None
        True
    """
    check_model(model)
    return _checked[model]


def _fault_before_reading(model: TransformerBridge) -> Fault | None:
    """Find a fault that shows without a pass."""
    if not hasattr(model, "blocks"):
        return Fault(0, "it has no hook points 'blocks.0...', as an encoder-decoder or an encoder has none")
    show_rotated(model)
    points = model.hook_dict
    for layer in range(model.cfg.n_layers):
        attn = getattr(model.blocks[layer], "attn", None)
        if attn is None:
            return Fault(layer, f"it has no attention (no hook point 'blocks.{layer}.attn.hook_pattern')")
        if type(attn).forward is AttentionBridge.forward:
            return Fault(
                layer,
                f"its adapter leaves the attention to Hugging Face, so that 'blocks.{layer}.attn.hook_pattern' shows "
                "a copy of the pattern after the fact, where an edit does nothing and no gradient is seen",
            )
        for name in attention_hooks(model, layer).values():
            if name not in points:
                return Fault(layer, f"it has no hook point {name!r}")
    if getattr(model.cfg, "qk_norm_after_rope", False):
        return Fault(0, "keys are normalised after hook_rot_k, so that the hook does not show the keys in use")
    return None


def _silent(model: TransformerBridge, trial: Trial) -> Fault | None:
    """Find a hook point through which nothing came."""
    for layer in range(model.cfg.n_layers):
        names = attention_hooks(model, layer).values()
        if silent := [name for name in names if name not in trial.activations]:
            return Fault(layer, f"{silent[0]!r} never fires")
    return None


def _not_finite(model: TransformerBridge, trial: Trial) -> Fault | None:
    """Find a layer whose queries, keys, values or attention output hold NaN or inf, or logits that do."""
    last = model.cfg.n_layers - 1
    names = [(layer, attention_hooks(model, layer)[kind]) for layer in range(last + 1) for kind in ("q", "k", "v", "z")]
    for layer, name in [*names, (last, "unembed.hook_out")]:
        if not torch.isfinite(trial.activations[name]).all():
            weights = non_finite_parameter(model)
            return Fault(
                layer,
                f"NaN or inf comes through {name!r}, " + (f"as {weights}" if weights else "an overflow"),
                "load its weights anew" if weights else "load it with dtype=torch.bfloat16 or torch.float32",
            )
    return None


def _pattern_without_effect(model: TransformerBridge, trial: Trial) -> Fault | None:
    """Find a layer whose attention output is not what flows through `hook_pattern` times the values."""
    for layer in range(model.cfg.n_layers):
        names = attention_hooks(model, layer)
        z, v = (trial.activations[names[kind]] for kind in ("z", "v"))  # [batch, pos, head, d_head], [.., kv_head, ..]
        if z.ndim != v.ndim or z.shape[2] % v.shape[2]:
            return Fault(
                layer, f"{names['v']!r} shows values of shape {tuple(v.shape)} for {names['z']!r} of {tuple(z.shape)}"
            )
        if not torch.equal(z, v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)):
            return Fault(
                layer,
                "the attention output is not hook_pattern times the values: edits of the pattern have no effect, or a "
                "gate or a norm lies between it and W_O",
            )
    return None


def _scores_of_another_kind(model: TransformerBridge, trial: Trial) -> tuple[str | None, Fault | None]:
    """Hold the scores against those of the queries and keys.

    Returns:
        In words, a bias that is the same for both texts; and a fault, where the difference depends on them.
    """
    bias = None
    for layer in range(model.cfg.n_layers):
        names = attention_hooks(model, layer)
        q, k, scores = (trial.activations[names[kind]] for kind in ("q", "k", "scores"))
        eps = max(torch.finfo(x.dtype).eps for x in (q, k, scores))
        expected, tolerance = expected_scores(attention_of(model, layer), q.float(), k.float(), eps)
        seen = torch.ones_like(scores, dtype=torch.bool).tril() & (scores > torch.finfo(scores.dtype).min / 2)
        difference = torch.where(seen, scores.float() - expected, 0)  # [batch=2, head, query_pos, key_pos]
        if (difference.abs() <= tolerance).all():
            continue
        if ((difference[0] - difference[1]).abs() > tolerance.sum(0)).any():
            return None, Fault(
                layer,
                f"{names['scores']!r} is not the scaled product of {names['q']!r} and {names['k']!r}: something that "
                "no hook point shows lies in between",
            )
        bias = f"{names['scores']} has a bias by position (ALiBi)"
    return bias, None


def _gradient_cut_off(trial: Trial) -> Fault | None:
    """Find a part that gives its output, but no gradient of it."""
    remedy = "load the weights unquantised, e.g. with dtype=torch.bfloat16"
    if trial.error:
        return Fault(0, f"its activations can't be differentiated ({trial.error})", remedy)
    if trial.cut_off:
        layer, name = min(trial.cut_off, key=lambda place: (place[0], -place[1].count(".")))  # its smallest part
        return Fault(
            layer,
            f"no gradient comes through {name!r}, as with quantised weights (int8, 4 bit) whose kernels have no "
            "backward pass",
            remedy,
        )
    return None


def _try_out(model: TransformerBridge) -> Trial:
    """Read two texts with every pattern replaced by the identity, under which each z is to come out as v itself."""
    activations: dict[str, Tensor] = {}
    start: list[Tensor] = []

    def begin(x: Tensor, hook: HookPoint) -> Tensor:
        start.append(x.detach().requires_grad_())
        return start[0]

    def record(x: Tensor, hook: HookPoint) -> None:
        activations[str(hook.name)] = x.detach()

    def replace_by_identity(pattern: Tensor, hook: HookPoint) -> Tensor:
        record(pattern, hook)
        identity = torch.eye(pattern.shape[-1], dtype=pattern.dtype, device=pattern.device)
        return identity + (pattern - pattern.detach())  # the identity, with a gradient to queries and keys

    watch = _GradientWatch(model)
    hooks: list[tuple[str, Hook]] = [("embed.hook_out", begin), ("unembed.hook_out", record), *watch.hooks]
    for layer in range(model.cfg.n_layers):
        names = attention_hooks(model, layer)
        hooks += [(name, replace_by_identity if kind == "pattern" else record) for kind, name in names.items()]
    device = next(model.parameters()).device
    tokens = torch.arange(2 * _N_TOKENS, device=device).view(2, -1) % model.cfg.d_vocab
    error = None
    with differentiable(model), _other_hooks_put_aside(model), first_hooks_on(model, hooks):
        logits = model(tokens, attention_mask=torch.ones_like(tokens), return_type="logits")
        try:
            logits.float().sum().backward()  # not autograd.grad, which would leave out parts that lead nowhere
        except (RuntimeError, NotImplementedError) as trouble:
            error = str(trouble).partition("\n")[0]
    return Trial(activations, watch.cut_off(), error)


class _GradientWatch:
    """Hooks that see whether the gradient of each part of a layer goes on to what comes into the part.

    Some quantised layers give outputs of which nothing is differentiated, or that claim a gradient and drop it.

    Attributes:
        hooks: pairs of hook point and forward hook.
    """

    def __init__(self, model: TransformerBridge) -> None:
        points = model.hook_dict
        self._parts = [
            (layer, name.removesuffix(".hook_out"))
            for layer in range(model.cfg.n_layers)
            for name in points
            if name.startswith(f"blocks.{layer}.") and name.endswith(".hook_out")
            if f"{name.removesuffix('.hook_out')}.hook_in" in points
        ]
        self._into: set[str] = set()  # parts whose input has a gradient
        self._reached: set[str] = set()  # hook points that the backward pass has come by
        self._lost: set[str] = set()  # parts whose output has no gradient
        self.hooks: list[tuple[str, Hook]] = []
        for _, part in self._parts:
            self.hooks += [(f"{part}.hook_in", self._entering(part)), (f"{part}.hook_out", self._leaving(part))]

    def cut_off(self) -> list[tuple[int, str]]:
        """Return layer and name of each part that lets no gradient through, in the order of layers."""
        return [
            (layer, f"{part}.hook_out")
            for layer, part in self._parts
            if part in self._lost or (f"{part}.hook_out" in self._reached and f"{part}.hook_in" not in self._reached)
            if part in self._into
        ]

    def _entering(self, part: str) -> Hook:
        def hook(x: Tensor, hook: HookPoint) -> Tensor | None:
            if not isinstance(x, Tensor) or not x.requires_grad:
                return None
            self._into.add(part)
            return self._watched(x, f"{part}.hook_in")

        return hook

    def _leaving(self, part: str) -> Hook:
        def hook(x: Tensor, hook: HookPoint) -> Tensor | None:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return None
            if x.requires_grad:
                return self._watched(x, f"{part}.hook_out")
            self._lost.add(part)
            return None

        return hook

    def _watched(self, x: Tensor, name: str) -> Tensor:
        """Return a view of this part alone that takes note of its gradient; a gradient that was dropped is None."""
        own = x.view_as(x)

        def note(gradient: Tensor | None) -> None:
            if gradient is not None:
                self._reached.add(name)

        own.register_hook(note)
        return own


@contextmanager
def _other_hooks_put_aside(model: TransformerBridge) -> Iterator[None]:
    """Take the hooks of others off all hook points for a while, as they may fail on a trial of four tokens."""
    kinds = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    points = list(model.hook_dict.values())
    hooks = [[getattr(point, kind) for kind in kinds] for point in points]
    try:
        for point in points:
            for kind in kinds:
                setattr(point, kind, OrderedDict())
        yield
    finally:
        for point, own in zip(points, hooks, strict=True):
            for kind, hooks_of_kind in zip(kinds, own, strict=True):
                setattr(point, kind, hooks_of_kind)
