"""Split a response into thinking and summary as texts, without tokens, for chat messages."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from stepsal.trace.segment import Segmentation


def sections(tokenizer: Any, prompt: str, response: str) -> tuple[str, str]:
    """Return the thinking of a response and the text after it.

    Both are those of a `Trace`, with one difference: where no marker tells the thinking, the thinking is empty and the
    text is the whole response. End tokens are left out.

    Args:
        tokenizer: the tokenizer, whose special tokens are left out.
        prompt: the rendered prompt.
        response: everything after it.

    Example:
        >>> from stepsal.trace.sections import sections
        >>> sections(stepsal.load("mini").tokenizer, "What is 1 + 1?<think>", "One more than one.</think> Two.")
        ('One more than one.', 'Two.')
    """
    special_tokens = tokenizer.all_special_tokens
    segmentation = Segmentation().resolved(prompt, response)
    segmenter = segmentation.segmenter(prompt, special_tokens)
    if segmenter.format.last_is_summary:
        return "", _without_end_tokens(response, special_tokens)
    segmenter.push(response)
    texts: dict[str, list[str]] = {"thinking": [], "summary": []}
    for role, run in groupby(segmenter.finish(), key=lambda span: span.role):
        spans = list(run)
        texts[role].append(response[spans[0].start : spans[-1].end])
    return "\n".join(texts["thinking"]), "\n".join(texts["summary"])


def _without_end_tokens(text: str, special_tokens: list[str]) -> str:
    """Return a text without white space and special tokens at its end."""
    text = text.rstrip()
    while ending := next((token for token in special_tokens if text.endswith(token)), ""):
        text = text.removesuffix(ending).rstrip()
    return text.strip()
