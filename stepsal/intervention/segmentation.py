"""Settle the segmentation: the format of answers that are yet to be written, and agreement with an open StepFlow."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stepsal.bridge.presets import preset_format
from stepsal.trace.formats import FORMATS, Format
from stepsal.trace.prompt import template_around
from stepsal.trace.recognition import opened_format
from stepsal.trace.segment import Segmentation

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def format_of(segmentation: Segmentation) -> Format:
    """Return the format of a segmentation that is resolved.

    Args:
        segmentation: a segmentation whose format is not "auto".

    Example:
        >>> from stepsal.intervention.segmentation import format_of
        >>> format_of(stepsal.Segmentation("think")).start
        'thinking'
    """
    return FORMATS[segmentation.format] if isinstance(segmentation.format, str) else segmentation.format


def resolved_segmentation(segmentation: Segmentation, model: TransformerBridge, prompt_end: str) -> Segmentation:
    """Return a copy whose format is told for answers that are yet to be written, if it was "auto".

    The format is told by the model's family, chat template, architecture or vocabulary. Where none of these tells it,
    it is that with one of whose markers the prompt ends, and "plain" otherwise.

    Args:
        segmentation: the way to find sections and steps.
        model: the model that writes.
        prompt_end: text of the chat template between question and answer.

    Example:
        >>> from stepsal.intervention.segmentation import resolved_segmentation
        >>> resolved_segmentation(stepsal.Segmentation(), stepsal.load("mini"), "<think>").format
        'think'
    """
    if segmentation.format != "auto":
        return segmentation
    format = preset_format(model) or opened_format(prompt_end) or "plain"
    return replace(segmentation, format=format)


def common_segmentation(segmentation: Segmentation, model: TransformerBridge) -> Segmentation:
    """Return the segmentation for answers of a model that are compared with and without StepFlow.

    Otherwise "auto" is told by the markers of a text without StepFlow, and by the model under it. Here it is told by
    the model for both, so that the same text is graded and mapped alike. Where the model doesn't tell, "auto" stays.

    Args:
        segmentation: the way to find sections and steps.
        model: the model that writes.

    Example:
        >>> from stepsal.intervention.segmentation import common_segmentation
        >>> common_segmentation(stepsal.Segmentation(), stepsal.load("mini")).format
        'think'
    """
    if segmentation.format != "auto" or model.tokenizer is None:
        return segmentation
    format = preset_format(model) or opened_format(template_around(model.tokenizer)[1]) or "auto"
    return replace(segmentation, format=format)


def same_segmentation(one: Segmentation, other: Segmentation) -> bool:
    """Tell whether two resolved segmentations find the same steps, a format by name or by value.

    Args:
        one: a segmentation whose format is not "auto".
        other: likewise.

    Example:
        >>> from stepsal.intervention.segmentation import same_segmentation
        >>> same_segmentation(stepsal.Segmentation("think"), stepsal.Segmentation(stepsal.trace.FORMATS["think"]))
        True
    """
    return replace(one, format=format_of(one)) == replace(other, format=format_of(other))


def agreement(current: Segmentation, requested: Segmentation | None) -> Segmentation:
    """Return the segmentation of an open StepFlow context, if a requested one agrees with it.

    Args:
        current: segmentation of the open context, resolved.
        requested: the requested segmentation; the format "auto" agrees with any format, and None with everything.

    Raises:
        ValueError: the two differ; the message names both.

    Example:
        >>> from stepsal.intervention.segmentation import agreement
        >>> agreement(stepsal.Segmentation("think"), stepsal.Segmentation("auto")).format
        'think'
    """
    if requested is None:
        return current
    resolved = replace(requested, format=current.format) if requested.format == "auto" else requested
    if not same_segmentation(resolved, current):
        raise ValueError(
            f"StepFlow is open with {current}, but {requested} is asked for: use the same segmentation for both, or "
            "leave the context"
        )
    return current
