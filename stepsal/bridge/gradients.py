"""Make a model ready for differentiating its activations, without dropout and with frozen parameters, and undo it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode and switch autocast off; both are restored at the end.

    Args:
        model: the model; its modules may be in different modes.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Switch gradients of activations on, with parameters frozen and modules evaluating; all is restored at the end.

    Args:
        model: the model; some of its parameters may be frozen already.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with (
            evaluating(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.set_multithreading_enabled(False),  # else Ctrl-C would wait for the end of a pass on a GPU
        ):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
