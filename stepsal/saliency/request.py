"""Input and output of both engines: the maps that are requested of a trace, and their block sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.finite import why_not_finite
from stepsal.maps.step_saliency import Target


@dataclass(frozen=True, eq=False)
class MapRequest:
    """A trace, and the maps to make of it, as requested from `stepsal.step_saliency`.

    Attributes:
        tokens: token ids.
        step_ids: step of each token; -1 (template) is in no step.
        n_steps: number of steps.
        layers: indices of the layers to map, ascending; at least one.
        target: "token", "logit" or "sequence" for what is differentiated; "attention" for attention alone, without a
            backward pass.
        keep_heads: also make the map of every head.
        token_positions: positions, ascending, whose token maps are kept, too; None for none.
    """

    tokens: Int[Tensor, " pos"]
    step_ids: Int[Tensor, " pos"]
    n_steps: int
    layers: tuple[int, ...]
    target: Target = "token"
    keep_heads: bool = False
    token_positions: Int[Tensor, " kept_pos"] | None = None

    @property
    def own_position(self) -> bool:
        """True where every query row is differentiated by itself, so that no gradient leaves its position."""
        return self.target in ("token", "logit")


@dataclass(frozen=True, eq=False)
class PooledMaps:
    """Block sums of |A * dL/dA| or of A, float32 on the CPU; `stepsal.maps.pooling.reduce_blocks` turns them into maps.

    Attributes:
        sums: sums over the blocks of query step x key step, of the mean over heads.
        head_sums: sums of every head, if requested.
        tokens: the token maps of the requested positions.
    """

    sums: Float[Tensor, "layer query_step key_step"]
    head_sums: Float[Tensor, "layer head query_step key_step"] | None = None
    tokens: Float[Tensor, "layer kept_pos kept_pos"] | None = None


@contextmanager
def explained(model: TransformerBridge, tokens: Int[Tensor, " pos"]) -> Iterator[None]:
    """Add to a `FloatingPointError` of an engine where NaN or inf comes from, and what to do.

    Args:
        model: the model.
        tokens: token ids of the trace.

    Raises:
        FloatingPointError: as raised inside, with the explanation.
    """
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}: {why_not_finite(model, tokens)}") from error


def check_finite(layer: int, sums: Tensor) -> None:
    """Refuse a map that holds NaN or inf.

    Args:
        layer: index of the layer, for the error.
        sums: block sums of the layer.

    Raises:
        FloatingPointError: a sum is NaN or inf; the message names the layer.
    """
    if not torch.isfinite(sums).all():
        raise FloatingPointError(f"NaN or inf in the map of layer {layer}")
