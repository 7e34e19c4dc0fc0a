"""What both engines share: their result, and the state of the model while they differentiate it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True, eq=False)
class PooledMaps:
    """Block sums of |A * dL/dA|, or of A, float32 on the CPU; `reduce_blocks` makes maps of them."""

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
            f"NaN or inf in the map of layer {layer}: try a wider dtype, e.g. load(..., dtype=torch.float32)"
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
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
            torch.autograd.set_multithreading_enabled(False),  # else Ctrl-C would wait for the end of a pass on a GPU
        ):
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for m in training:
            m.training = True


@contextmanager
def freed_at_once(device: torch.device) -> Iterator[None]:
    """Give the memory of freed tensors back to the system, where glibc would keep it for itself.

    Its allocator learns from the first large tensor that is freed to take tensors of up to 32 MB from the heap, where
    short-lived ones between long-lived ones leave holes that fit nothing: a pass then peaks at three times what it
    holds. Here tensors from 1 MB on are mapped on their own; at the end the allocator is put where it would have ended
    up by itself.
    """
    here = device.type == "cpu" and sys.platform == "linux"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if here else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(_M_TRIM_THRESHOLD, 2**26)
        mallopt(_M_MMAP_THRESHOLD, 2**25)
