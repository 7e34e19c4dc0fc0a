"""Split a response into thinking and summary as texts, without tokens, for chat messages."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from stepsal.trace.recognition import warn_of_unread_headers
from stepsal.trace.segment import Segmentation
from stepsal.trace.segmenter import Segmenter


def sections(tokenizer: Any, prompt: str, response: str, segmentation: Segmentation | None = None) -> tuple[str, str]:
    """Return the thinking of a response and the text after it.

    Both are those of a `Trace`, with one difference: where no marker tells the thinking, the thinking is empty and the
    text is the whole response. End tokens are left out.

    Args:
        tokenizer: the tokenizer, whose special tokens are left out.
        prompt: the rendered prompt.
        response: everything after it.
        segmentation: the way to find sections; None is `Segmentation()`, by which the response tells the format.

    Example:
        >>> from stepsal.trace.sections import sections
        >>> sections(stepsal.load("mini").tokenizer, "What is 1 + 1?<think>", "One more than one.</think> Two.")
        ('One more than one.', 'Two.')
    """
    special_tokens = tokenizer.all_special_tokens
    resolved = (segmentation or Segmentation()).resolved(prompt, response, stacklevel=3)
    segmenter = resolved.segmenter(prompt, special_tokens)
    segmenter.push(response)
    if segmenter.lacks_markers:
        return "", _without_end_tokens(response, special_tokens)
    texts = section_texts(segmenter, response)
    warn_of_unread_headers(segmenter.unread_headers, stacklevel=3)
    return texts["thinking"], texts["summary"]


def section_texts(segmenter: Segmenter, response: str) -> dict[str, str]:
    r"""Return thinking and summary of a response that was read, a line break where template stands between its parts.

    Args:
        segmenter: has read the response; it is ended.
        response: the response.

    Example:
        >>> from stepsal.trace.sections import section_texts
        >>> segmenter = stepsal.Segmentation("think").segmenter()
        >>> segmenter.push("One.</think>Two.<think>Three.")
        >>> section_texts(segmenter, "One.</think>Two.<think>Three.")
        {'thinking': 'One.\nThree.', 'summary': 'Two.'}
    """
    spans, breaks = segmenter.finish(), segmenter.breaks
    runs: list[tuple[str, int, int]] = []  # of steps of one section without template between them
    for role, start, end in spans:
        last = runs[-1] if runs else None
        if last and last[0] == role and bisect_left(breaks, last[2]) == bisect_left(breaks, start):
            runs[-1] = (role, last[1], end)
        else:
            runs.append((role, start, end))
    return {
        section: "\n".join(response[start:end] for role, start, end in runs if role == section)
        for section in ("thinking", "summary")
    }


def _without_end_tokens(text: str, special_tokens: list[str]) -> str:
    """Return a text without white space and special tokens at its end."""
    text = text.rstrip()
    while ending := next((token for token in special_tokens if text.endswith(token)), ""):
        text = text.removesuffix(ending).rstrip()
    return text.strip()
