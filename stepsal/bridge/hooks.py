"""Name the hook points that stepsal uses, put hooks on them, and refuse models whose attention can't be edited.

The pattern that flows through `attn.hook_pattern` must be the one that the model uses. Some adapters of TransformerLens
keep the native attention and report the pattern after the fact, where an edit does nothing and a gradient is never
seen; `check_model` finds that out with one short forward pass, and refuses with the reason.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.gradients import evaluating

Hook = Callable[..., Tensor | None]
"""A forward hook as TransformerLens has them: takes the activation and `hook=`, returns a new activation or None."""


class Fault(NamedTuple):
    """A reason why a model can't be served, and the layer in which it shows."""

    layer: int
    reason: str


def attention_hooks(layer: int) -> dict[str, str]:
    """Return the canonical names of the hook points that stepsal uses in one layer.

    Args:
        layer: layer index.

    Returns:
        Names by the activation that flows there. `q` and `z` (the attention output before W_O) are [batch, pos, head,
        d_head]; `k` and `v` are [batch, pos, kv_head, d_head]; `scores` (pre-softmax, masked) and `pattern` are [batch,
        head, query_pos, key_pos].

    Example:
        >>> from stepsal.bridge.hooks import attention_hooks
        >>> attention_hooks(3)["pattern"]
        'blocks.3.attn.hook_pattern'
    """
    attn = f"blocks.{layer}.attn"
    return {
        "q": f"{attn}.hook_rot_q",
        "k": f"{attn}.hook_rot_k",
        "v": f"{attn}.v.hook_out",
        "z": f"{attn}.o.hook_in",
        "scores": f"{attn}.hook_attn_scores",
        "pattern": f"{attn}.hook_pattern",
    }


@contextmanager
def first_hooks_on(model: TransformerBridge, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
    """Put forward hooks on a model that run before all others at their hook point, and take them off at the end.

    Args:
        model: the model.
        hooks: pairs of hook point and hook.
    """
    added: list[tuple[HookPoint, LensHandle]] = []
    try:
        points = model.hook_dict  # made anew at each access
        for name, hook in hooks:
            added.append((points[name], points[name].add_hook(hook, prepend=True)))  # type: ignore[arg-type]
        yield
    finally:
        for point, handle in added:
            remove_hook(point, handle)


def remove_hook(point: HookPoint, handle: LensHandle) -> None:
    """Take a forward hook off its hook point, and off the list that the hook point keeps of them.

    Args:
        point: the hook point.
        handle: the handle that `point.add_hook` returned for the hook.
    """
    handle.hook.remove()
    point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


_checked: weakref.WeakSet[TransformerBridge] = weakref.WeakSet()


def check_model(model: TransformerBridge) -> None:
    """Refuse a model whose attention can't be read and edited through hook points; each model is tried out once.

    All hook points must exist and fire in every layer, and the attention output must be the pattern at `hook_pattern`
    times the values. Hooks of others are taken off for the one short forward pass that tells this.

    Args:
        model: a bridge, from `stepsal.load` or booted elsewhere.

    Raises:
        ValueError: the model can't be served; the message names the model, the layer and the reason.

    Example:
        >>> from stepsal.bridge.hooks import check_model
        >>> check_model(stepsal.load("mini"))
    """
    if model in _checked:
        return
    fault = _missing_hook_point(model) or _keys_that_the_hook_does_not_show(model) or _pattern_without_effect(model)
    if fault is not None:
        raise ValueError(
            f"{model.cfg.model_name!r} ({model.cfg.architecture}) is not supported: layer {fault.layer}: "
            f"{fault.reason}. stepsal needs a decoder-only model whose TransformerLens adapter computes attention "
            "itself"
        )
    _checked.add(model)


def _missing_hook_point(model: TransformerBridge) -> Fault | None:
    points = model.hook_dict
    for layer in range(model.cfg.n_layers):
        for name in attention_hooks(layer).values():
            if name not in points:
                return Fault(layer, f"it has no hook point {name!r}")
    return None


def _keys_that_the_hook_does_not_show(model: TransformerBridge) -> Fault | None:
    if getattr(model.cfg, "qk_norm_after_rope", False):
        return Fault(0, "keys are normalised after hook_rot_k, so that the hook does not show the keys in use")
    return None


def _pattern_without_effect(model: TransformerBridge) -> Fault | None:
    """Find a layer whose attention output is not what flows through `hook_pattern` times the values."""
    activations = _activations_under_identity(model)
    for layer in range(model.cfg.n_layers):
        names = attention_hooks(layer)
        if silent := [name for name in names.values() if name not in activations]:
            return Fault(layer, f"{silent[0]!r} never fires")
        z, v = activations[names["z"]], activations[names["v"]]  # [batch, pos, head, d_head], [.., kv_head, d_head]
        if not torch.equal(z, v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)):
            return Fault(
                layer,
                "the attention output is not hook_pattern times the values: edits of the pattern have no effect, or a "
                "gate or a norm lies between it and W_O",
            )
    return None


def _activations_under_identity(model: TransformerBridge) -> dict[str, Tensor]:
    """Read four tokens with every pattern replaced by the identity, under which each z is to come out as v itself.

    Returns:
        What the hook points of attention have shown, by their names.
    """
    activations: dict[str, Tensor] = {}

    def record(x: Tensor, hook: HookPoint) -> None:
        activations[str(hook.name)] = x

    def replace_by_identity(pattern: Tensor, hook: HookPoint) -> Tensor:
        record(pattern, hook)
        return torch.eye(pattern.shape[-1], dtype=pattern.dtype, device=pattern.device).expand_as(pattern)

    hooks: list[tuple[str, Hook]] = [
        (name, replace_by_identity if kind == "pattern" else record)
        for layer in range(model.cfg.n_layers)
        for kind, name in attention_hooks(layer).items()
    ]
    tokens = torch.arange(4, device=next(model.parameters()).device)[None]
    with torch.no_grad(), evaluating(model), _other_hooks_put_aside(model), first_hooks_on(model, hooks):
        model(tokens, attention_mask=torch.ones_like(tokens), return_type=None)
    return activations


@contextmanager
def _other_hooks_put_aside(model: TransformerBridge) -> Iterator[None]:
    """Take the forward hooks of others off all hook points for a while, as they may fail on a trial of four tokens."""
    points = list(model.hook_dict.values())
    hooks = [point._forward_hooks for point in points]
    try:
        for point in points:
            point._forward_hooks = OrderedDict()
        yield
    finally:
        for point, own in zip(points, hooks, strict=True):
            point._forward_hooks = own
