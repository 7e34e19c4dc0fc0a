"""Name the hook points that stepsal uses, put hooks on them, and refuse models whose attention can't be edited.

The pattern that flows through `attn.hook_pattern` must be the one that the model uses. Some adapters of TransformerLens
keep the native attention and report the pattern after the fact, where an edit does nothing and a gradient is never seen;
`check_model` finds that out with one short forward pass, and refuses with the reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.model_bridge import TransformerBridge


def attention_hooks(layer: int) -> dict[str, str]:
    """Canonical names of the hook points that stepsal uses in one layer.

    Shapes: `q` and `z` (the attention output before W_O) [batch, pos, head, d_head]; `k`, `v` [batch, pos, kv_head,
    d_head];
    `scores` (pre-softmax, masked) and `pattern` [batch, head, query_pos, key_pos].
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
def first_hooks_on(
    model: TransformerBridge, hooks: Sequence[tuple[str, Callable[..., Tensor | None]]]
) -> Iterator[None]:
    """Forward hooks that run before all others at their hook point, those that are there already included."""
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
    """Take a forward hook off its hook point, and off the list that the hook point keeps of them."""
    handle.hook.remove()
    point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


_checked: weakref.WeakSet[TransformerBridge] = weakref.WeakSet()


def check_model(model: TransformerBridge) -> None:
    """Refuse a model whose attention can't be read and edited through hook points; a model is tried out once.

    One forward pass over four tokens with every pattern replaced by the identity: all hook points must fire in every
    layer, and each z must come out as v itself. It does not where the adapter reports the pattern after the fact, or
    where a gate or a norm lies between the pattern and W_O.

    Raises:
        ValueError: naming the model, the layer and the reason.
    """

    if model in _checked:  # again, it could only find out what hooks of the user's do to the model
        return

    def refuse(layer: int, why: str) -> ValueError:
        return ValueError(
            f"{model.cfg.model_name!r} ({model.cfg.architecture}) is not supported: layer {layer}: {why}. stepsal "
            "needs a decoder-only model whose TransformerLens adapter computes attention itself"
        )

    layers, points = [attention_hooks(layer) for layer in range(model.cfg.n_layers)], model.hook_dict
    for i, hooks in enumerate(layers):
        for hook in hooks.values():
            if hook not in points:
                raise refuse(i, f"it has no hook point {hook!r}")
    if getattr(model.cfg, "qk_norm_after_rope", False):
        raise refuse(0, "keys are normalised after hook_rot_k, so that the hook does not show the keys in use")

    seen: dict[str, Tensor] = {}

    def look(x: Tensor, hook: HookPoint) -> None:
        seen[str(hook.name)] = x

    def identity(x: Tensor, hook: HookPoint) -> Tensor:
        look(x, hook)
        return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)

    tokens = torch.arange(4, device=next(model.parameters()).device)[None]
    fwd_hooks = [(h, identity if kind == "pattern" else look) for hooks in layers for kind, h in hooks.items()]
    with torch.no_grad(), model.hooks(fwd_hooks=fwd_hooks):
        model(tokens, attention_mask=torch.ones_like(tokens), return_type=None)
    for i, hooks in enumerate(layers):
        silent = [h for h in hooks.values() if h not in seen]
        if silent:
            raise refuse(i, f"{silent[0]!r} never fires")
        z, v = seen[hooks["z"]], seen[hooks["v"]]  # [batch, pos, head, d_head], [batch, pos, kv_head, d_head]
        if not torch.equal(z, v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)):
            raise refuse(
                i,
                "the attention output is not hook_pattern times the values: edits of the pattern have no effect, or a "
                "gate or a norm lies between it and W_O",
            )
    _checked.add(model)
