"""Run the model's own modules wherever nobody hooks.

A bridge puts a wrapper with hook points around each part of a model. Where nobody listens, the wrappers only cost time:
a step of decoding takes 1.5 to 3 times as long as without them. `native` puts the wrapped modules back into the
model for a while, all but those that somebody hooks, and lets them use PyTorch's fused attention:

    a part (a block, attention, MLP, ..)    is the model's own unless one of its own hook points is in use, such as that
                                            of the attention scores
    attention with hooks on its pattern     is the model's own too, with a softmax that shows the pattern (`eager`)
    the parts in it (projections, norms)    are decided upon singly

Wrappers and parameters stay what they are, so that `model.hook_dict` and the state of the model don't change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import BlockBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from stepsal.bridge.eager import show_pattern

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
        ]  # of each place, the hooks that are there
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name, and the wrapper that was there
        self._attentions: list[tuple[Any, Any]] = []  # with the configuration that each had
        self._next_handle: int | None = None  # number that PyTorch will give the next hook; None with all wrappers back
        self._in_use: list[tuple[dict[int, Any], int]] = []  # the places that have hooks, and how many

    def refresh(self) -> None:
        """Take hooks into account that were added or removed since the last call; call it before each pass."""
        # PyTorch numbers all hooks, so that most of the time two comparisons tell that none was added or removed
        is_new = self._next_handle != RemovableHandle.next_id
        if is_new or any(len(hooks) != n for hooks, n in self._in_use):
            in_use = [(hooks, len(hooks)) for hooks in self._hooks if hooks]
            if self._next_handle is None or in_use != self._in_use:
                self.restore()
                if not any(getattr(self._model.cfg, option, False) for option in _NEEDS_WRAPPERS):
                    self._replace_in(self._model.original_model)
            self._next_handle, self._in_use = RemovableHandle.next_id, in_use

    def restore(self) -> None:
        """Put all wrappers back."""
        while self._replaced:
            parent, name, wrapper = self._replaced.pop()
            parent._modules[name] = wrapper
        while self._attentions:
            attention, config = self._attentions.pop()
            attention.config = config
        self._next_handle = None

    def _replace_in(self, parent: nn.Module) -> None:
        """Replace the wrappers that nobody hooks among the parts of a module, at any depth."""
        for name, part in list(parent._modules.items()):
            if part is None:
                continue
            if not isinstance(part, GeneralizedComponent) or (original := part.original_component) is None:
                self._replace_in(part)
            elif self._can_replace(part, original, hooked := self._hooked_parts(part, original)):
                self._replaced.append((parent, name, part))
                parent._modules[name] = original
                self._choose_function(original, part.hook_pattern if hooked else None)
                self._replace_in(original)

    def _can_replace(self, wrapper: Any, original: Any, hooked: list[nn.Module]) -> bool:
        """Tell whether the model's own module will do: nobody hooks its wrapper, or only the attention pattern."""
        if not hooked:
            return True
        is_pattern_alone = hooked == [getattr(wrapper, "hook_pattern", None)]
        return is_pattern_alone and not wrapper.compatibility_mode and self._is_plain_attention(original)

    def _hooked_parts(self, wrapper: GeneralizedComponent, original: nn.Module) -> list[nn.Module]:
        """Return what is hooked of a wrapper, itself and those of its parts that only work inside it."""
        inside = set(original.modules())  # wrappers in the model's own module work there as well
        parts = [module for module in wrapper.modules() if module not in inside]
        wired = {handle.id for block in self._blocks for handle in block._capture_hook_handles}
        return [module for module in parts if _hooks_of(module) - wired]

    def _choose_function(self, module: Any, point: HookPoint | None) -> None:
        """Let plain attention use PyTorch's fused kernel, which the bridge has switched off, or show its pattern."""
        if self._is_plain_attention(module):
            self._attentions.append((module, module.config))
            if point is None:
                module.config = copy.copy(module.config)
                module.config._attn_implementation = "sdpa"
            else:
                show_pattern(module, point)

    def _is_plain_attention(self, module: Any) -> bool:
        """Tell whether a module takes its attention function by name, and it is a softmax without additions."""
        is_attention = hasattr(module, "is_causal") and hasattr(getattr(module, "config", None), "_attn_implementation")
        is_plain = getattr(module, "sinks", None) is None and not getattr(module, "attn_logit_softcapping", None)
        return is_attention and is_plain and getattr(self._model.original_model, "_supports_sdpa", False)


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
