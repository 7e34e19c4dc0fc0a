"""Refuse what `collect`, `evaluate` and `calibrate` cannot do, before any work."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from stepsal.intervention import active_flow
from stepsal.trace.segment import Segmentation

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def check_counts(**counts: int) -> None:
    """Refuse counts below one.

    Args:
        counts: counts by the names of the caller's arguments.

    Raises:
        ValueError: a count below one; the message names all of them.

    Example:
        >>> from stepsal.experiments.checks import check_counts
        >>> check_counts(n_problems=10, batch_size=4)
    """
    if min(counts.values()) < 1:
        raise ValueError(f"{', '.join(f'{name}={n}' for name, n in counts.items())} must be at least 1")


def check_no_open_stepflow(model: TransformerBridge, remedy: str) -> None:
    """Refuse a model under an open `stepsal.stepflow` context, which no folder would record.

    Args:
        model: from `stepsal.load`.
        remedy: argument that switches StepFlow on instead, such as "collect(stepflow=...)".

    Raises:
        ValueError: a context is open.

    Example:
        >>> from stepsal.experiments.checks import check_no_open_stepflow
        >>> check_no_open_stepflow(stepsal.load("mini"), "collect(stepflow=...)")
    """
    if active_flow(model) is not None:
        raise ValueError(f"a stepflow context is open, of which the folder would not know: close it and use {remedy}")


def segmentation_for_manifest(segmentation: Segmentation) -> dict[str, Any]:
    """Return a segmentation as a manifest keeps it, JSON-ready.

    Args:
        segmentation: how sections and steps are found.

    Raises:
        ValueError: a segmentation that can't be read back from JSON, such as one that splits by a function.

    Example:
        >>> from stepsal.experiments.checks import segmentation_for_manifest
        >>> segmentation_for_manifest(stepsal.Segmentation(split="line"))["split"]
        'line'
    """
    settings = segmentation.to_dict()
    try:
        kept = Segmentation.from_dict(json.loads(json.dumps(settings)))
    except ValueError:
        kept = None
    if kept != segmentation:
        raise ValueError(
            f"split={segmentation.split!r} can't be kept in a manifest: use 'sentence', 'paragraph', 'line', or a "
            "regular expression"
        )
    return settings
