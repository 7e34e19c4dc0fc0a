"""The values that go into both engines and come out of them: what is to be mapped of a trace, and its block sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepsal.maps.step_saliency import Target


@dataclass(frozen=True, eq=False)
class MapRequest:
    """A trace, and which maps to make of it; see `stepsal.step_saliency` for the meaning.

    Attributes:
        tokens: token ids.
        step_ids: step of each token; -1 (template) is in no step.
        n_steps: number of steps.
        layers: indices of the layers to map, ascending; at least one.
        target: whose loss is differentiated; "attention" for attention alone, without a backward pass.
        keep_heads: also give the map of every head.
        keep_tokens: also give the token map of every layer, which the streamed engine can't.
    """

    tokens: Int[Tensor, " pos"]
    step_ids: Int[Tensor, " pos"]
    n_steps: int
    layers: tuple[int, ...]
    target: Target = "token"
    keep_heads: bool = False
    keep_tokens: bool = False


@dataclass(frozen=True, eq=False)
class PooledMaps:
    """Block sums of |A * dL/dA|, or of A, float32 on the CPU; `stepsal.maps.pooling.reduce_blocks` makes maps of them.

    Attributes:
        sums: mean over heads, summed over the blocks of query step x key step.
        head_sums: the same of every head, if asked for.
        tokens: the token maps, if asked for.
    """

    sums: Float[Tensor, "layer query_step key_step"]
    head_sums: Float[Tensor, "layer head query_step key_step"] | None = None
    tokens: Float[Tensor, "layer query_pos key_pos"] | None = None


def check_finite(layer: int, sums: Tensor) -> None:
    """Refuse a map that says nothing.

    Args:
        layer: index of the layer, for the error.
        sums: its block sums.

    Raises:
        FloatingPointError: NaN or inf, naming the layer.
    """
    if not torch.isfinite(sums).all():
        raise FloatingPointError(
            f"NaN or inf in the map of layer {layer}: try a wider dtype, e.g. load(..., dtype=torch.float32)"
        )
