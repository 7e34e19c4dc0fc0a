"""Settle how steps are found: the format of answers still to be written, and one segmentation for all at work."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stepsal.bridge.presets import preset_format
from stepsal.trace.formats import FORMATS, Format
from stepsal.trace.segment import Segmentation

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def format_of(segmentation: Segmentation) -> Format:
    """Return the format of a segmentation that is resolved.

    Args:
        segmentation: its format is not "auto".

    Example:
        >>> format_of(Segmentation("think")).start
        'thinking'
    """
    return FORMATS[segmentation.format] if isinstance(segmentation.format, str) else segmentation.format


def resolved_segmentation(segmentation: Segmentation, model: TransformerBridge, prompt_end: str) -> Segmentation:
    """Return a segmentation whose format is told for answers that are still to be written.

    "auto" becomes what the model's family, chat template or architecture tells; failing that "think" where the prompt
    ends with a marker of that format, and "plain" where it does not.

    Args:
        segmentation: how sections and steps are found.
        model: who writes.
        prompt_end: the chat template's text between question and answer.

    Example:
        >>> resolved_segmentation(Segmentation(), stepsal.load("mini"), "<think>").format
        'think'
    """
    if segmentation.format != "auto":
        return segmentation
    format = preset_format(model) or ("think" if FORMATS["think"].opened_by(prompt_end) else "plain")
    return replace(segmentation, format=format)


def agreement(current: Segmentation, requested: Segmentation | None) -> Segmentation:
    """Return the segmentation in force, if what is requested beside it is the same.

    Args:
        current: that of an open StepFlow context, resolved.
        requested: another one; "auto" agrees with any format, and None with all.

    Raises:
        ValueError: If they differ; the message names both.

    Example:
        >>> agreement(Segmentation("think"), Segmentation("auto")).format
        'think'
    """
    if requested is None:
        return current
    resolved = replace(requested, format=current.format) if requested.format == "auto" else requested
    if replace(resolved, format=format_of(resolved)) != replace(current, format=format_of(current)):
        raise ValueError(
            f"StepFlow is open with {current}, but {requested} is asked for: use the same segmentation for both, or "
            "leave the context"
        )
    return current
