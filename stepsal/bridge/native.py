"""Run the model's own modules wherever nobody hooks.

A bridge puts a wrapper with hook points around each part of a model. Where nobody listens, the wrappers only cost time:
a step of decoding takes 1.5 to 3 times as long as without them. `native` puts the wrapped modules back into the
model for a while, all but those that somebody hooks, and lets them use PyTorch's fused attention:

    a part (a block, attention, MLP, ..)    is the model's own unless one of its own hook points is in use, such as that
                                            of the attention pattern
    the parts in it (projections, norms)    are decided upon singly

Wrappers and parameters stay what they are, so that `model.hook_dict` and the state of the model don't change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import BlockBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

# options by which blocks and attention hand activations on to each other, past the model's own modules
_NEEDS_WRAPPERS = ("use_attn_in", "use_split_qkv_input", "use_hook_mlp_in")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Native:
    """The parts of a model that run without their wrappers, kept up to date as hooks come and go.

    Args:
        model: a bridge.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self._model = model
        self._blocks = [module for module in model.modules() if isinstance(module, BlockBridge)]
        self._hooks = [
            getattr(module, name)
            for module in model.modules()
            if isinstance(module, HookPoint | GeneralizedComponent)
            for name in _HOOKS
        ]
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name, and the wrapper that was there
        self._attentions: list[tuple[Any, Any]] = []  # with the configuration that each had
        self._numbers: list[int] = []

    def refresh(self) -> None:
        """Take hooks into account that were added or removed since the last call; call it before each pass."""
        numbers = list(map(len, self._hooks))  # of hooks in each place; a tenth of a millisecond for thirty layers
        if numbers != self._numbers:
            self.restore()
            if not any(getattr(self._model.cfg, option, False) for option in _NEEDS_WRAPPERS):
                self._replace_in(self._model.original_model)
            self._numbers = numbers

    def restore(self) -> None:
        """Put all wrappers back."""
        while self._replaced:
            parent, name, wrapper = self._replaced.pop()
            parent._modules[name] = wrapper
        while self._attentions:
            attention, config = self._attentions.pop()
            attention.config = config
        self._numbers = []

    def _replace_in(self, parent: nn.Module) -> None:
        """Replace the wrappers that nobody hooks among the parts of a module, at any depth."""
        for name, part in list(parent._modules.items()):
            if part is None:
                continue
            if not isinstance(part, GeneralizedComponent) or (original := part.original_component) is None:
                self._replace_in(part)
            elif self._is_free(part, original):
                self._replaced.append((parent, name, part))
                parent._modules[name] = original
                self._fuse(original)
                self._replace_in(original)

    def _is_free(self, wrapper: GeneralizedComponent, original: nn.Module) -> bool:
        """Tell whether a wrapper can be left out: nobody hooks it, or a part of it that only works inside it."""
        inside = set(original.modules())  # wrappers in the model's own module work there as well
        parts = [module for module in wrapper.modules() if module not in inside]
        wired = {handle.id for block in self._blocks for handle in block._capture_hook_handles}
        return not any(_hooks_of(module) - wired for module in (wrapper, *parts))

    def _fuse(self, module: Any) -> None:
        """Let a module that computes plain attention use PyTorch's fused kernel, which the bridge has switched off."""
        config = getattr(module, "config", None)
        is_attention = hasattr(module, "is_causal") and hasattr(config, "_attn_implementation")
        is_plain = getattr(module, "sinks", None) is None and not getattr(module, "attn_logit_softcapping", None)
        if is_attention and is_plain and getattr(self._model.original_model, "_supports_sdpa", False):
            self._attentions.append((module, config))
            module.config = copy.copy(config)
            module.config._attn_implementation = "sdpa"


@contextmanager
def native(model: TransformerBridge) -> Iterator[Native]:
    """Run the model's own modules wherever nobody hooks, and put all wrappers back at the end.

    Hooks that are added inside the context take part from the next `refresh` on.

    Args:
        model: a bridge.

    Example:
        >>> import torch
        >>> from stepsal.bridge.native import native
        >>> model, tokens = stepsal.load("mini"), torch.arange(9)[None]
        >>> logits = model(tokens)
        >>> with native(model):
        ...     bool(torch.allclose(model(tokens), logits, atol=1e-4))
        True
    """
    parts = Native(model)
    try:
        parts.refresh()
        yield parts
    finally:
        parts.restore()


def _hooks_of(module: nn.Module) -> set[int]:
    """Return the ids of all hooks on a module, forward and backward."""
    return {key for name in _HOOKS for key in getattr(module, name)}
