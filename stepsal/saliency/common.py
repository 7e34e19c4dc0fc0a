"""What both engines share: their result, and the state of the model while they differentiate it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class PooledMaps:
    """Block sums of |A * dL/dA|, float32 on the CPU; `reduce_blocks` makes maps of them."""

    sums: Float[Tensor, "layer query_step key_step"]
    head_sums: Float[Tensor, "layer head query_step key_step"] | None
    tokens: Float[Tensor, "layer query_pos key_pos"] | None


def check_finite(layer: int, sums: Tensor) -> None:
    """Refuse a map that says nothing.

    Raises:
        FloatingPointError: NaN or inf, naming the layer.
    """
    if not torch.isfinite(sums).all():
        raise FloatingPointError(
            f"NaN or inf in the saliency of layer {layer}: try a wider dtype, e.g. load(..., dtype=torch.float32)"
        )


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients on, parameters frozen, no autocast, every module in evaluation mode; all restored at the end."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    try:
        for p in trainable:
            p.requires_grad_(False)
        for m in training:
            m.training = False
        device = next(model.parameters()).device.type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for m in training:
            m.training = True
