"""Assign tokens to steps, in a whole text or while the tokens come in.

A token belongs to the step of its first non-space character. A token of white space, or without text of its own,
belongs to the step before it, unless template text stands between the two. All other tokens are template, -1.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from stepsal.trace.formats import Role
from stepsal.trace.markers import Span
from stepsal.trace.segmenter import Segmenter


def step_ids(spans: Sequence[Span], offsets: Iterable[tuple[int, int]], text: str, breaks: Iterable[int]) -> list[int]:
    """Return the number of the step that each token of a whole text belongs to; -1 for template.

    Args:
        spans: steps in order, as character spans of `text`.
        offsets: half-open character span of each token.
        text: the text that the tokens spell.
        breaks: character positions at which template text begins; white space from there to the next step belongs to
            no step.

    Example:
        >>> from stepsal.trace.assignment import step_ids
        >>> from stepsal.trace.markers import Span
        >>> spans = [Span("thinking", 0, 8), Span("summary", 9, 12)]
        >>> step_ids(spans, [(0, 3), (3, 8), (8, 12)], "One two. End", breaks=[])
        [0, 0, 1]
    """
    starts, breaks = [span.start for span in spans], sorted(breaks)
    ids = []
    for start, end in offsets:
        piece = text[start:end]
        position = start + len(piece) - len(piece.lstrip())
        if position < end:
            i = bisect_right(starts, position) - 1
            ids.append(i if i >= 0 and position < spans[i].end else -1)
            continue
        i = bisect_left(starts, start) - 1
        last_break = (bisect_right(breaks, start) if piece else bisect_left(breaks, start)) - 1
        is_cut_off = last_break >= 0 and i >= 0 and breaks[last_break] >= spans[i].end
        ids.append(-1 if i < 0 or is_cut_off else i)
    return ids


class StepTracker:
    """A tracker that tells the step of each token of a response, while the tokens come in.

    Args:
        segmenter: finds the steps of the response; the tracker pushes the tokens into it.

    Attributes:
        segmenter: as given.
        role: role of the step to which the last token belongs; None for template.

    Example:
        >>> from stepsal.trace.assignment import StepTracker
        >>> tracker = StepTracker(stepsal.Segmentation(format="think").segmenter())
        >>> [tracker.push(piece) for piece in ("One and one", " is two.", "</think>", "Two.")]
        [0, 0, -1, 1]
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self.role: Role | None = None

    def push(self, token_text: str) -> int:
        """Read one token and return the number of its step, 0 for the first of the response; -1 for template.

        Args:
            token_text: the characters of the token.
        """
        before, in_step = self.segmenter.n_chars, self.segmenter.in_step
        if self.segmenter.holds_back and self.segmenter.role:
            in_step = True  # white space shows the held-back text to be no marker: it opened a step
        self.segmenter.push(token_text)
        reader = self.segmenter
        if reader.holds_back:  # not yet known to be a marker: until then the text counts as what it says
            reader = reader.copy()
            reader.flush()
        offset = len(token_text) - len(token_text.lstrip())
        if offset == len(token_text):
            step = reader.n_steps - 1 if in_step and reader.in_step else -1
        else:
            step = reader.step_at(before + offset)
        self.role = reader.role_of(step) if step >= 0 else None
        return step
