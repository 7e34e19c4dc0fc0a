"""Average the maps of several traces that have the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from stepsal.maps.step_saliency import StepSaliency


def average(saliencies: Sequence[StepSaliency]) -> StepSaliency:
    """Average the maps of traces with the same steps, e.g. of all wrong traces of one length.

    Args:
        saliencies: at least one; all of the same model, layers, target, reduce and roles, and either all row-normalised
            or none.

    Returns:
        The mean `values` (and mean `head_values`, where all have them) with the labels of the first; step texts and
        token maps are dropped.

    Raises:
        ValueError: there are none, they differ in model, layers, target, reduce or roles, or only some of them are
            row-normalised.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", " Bob is Ann plus 1.</think>Bob.", model)
        >>> saliency = stepsal.step_saliency(model, trace)
        >>> bool((stepsal.maps.average([saliency, saliency]).values == saliency.values).all())
        True
    """
    if not saliencies:
        raise ValueError("there is nothing to average: saliencies is empty")
    first = saliencies[0]
    for i, other in enumerate(saliencies):
        if other.metadata.get("row_normalised") != first.metadata.get("row_normalised"):
            raise ValueError(f"saliencies[{i}] and the first differ in row_normalised(): apply it to all or to none")
        for name in ("model_name", "n_layers", "layers", "target", "reduce", "roles"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"saliencies[{i}] has {name}={getattr(other, name)!r} but the first has {getattr(first, name)!r}; "
                    "average only maps with the same steps"
                )
    heads = [s.head_values for s in saliencies if s.head_values is not None]
    return replace(
        first,
        values=torch.stack([s.values for s in saliencies]).mean(0),
        head_values=torch.stack(heads).mean(0) if len(heads) == len(saliencies) else None,
        token_values=None,
        token_positions=None,
        step_texts=("",) * first.n_steps,
        metadata={**first.metadata, "averaged": len(saliencies)},
    )
