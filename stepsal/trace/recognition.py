"""Tell the format of a text by its markers, and find what looks like a marker that no format knows."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable

from stepsal.trace.formats import FORMATS, Format

# words that name the thinking, or what follows it, in a tag
_WORDS = (
    "think|thinking|thought|thoughts|reason|reasoning|reasoning_content|reflect|reflection|scratchpad|scratch_pad|cot|"
    "rationale|monologue|deliberation|analysis|solution|final_answer"
)
_TAG = rf"(?:\w+[_:. -])*(?:{_WORDS})(?:[_:. -]\w+)*"
_CLOSINGS = re.compile(rf"</{_TAG}>|\[/{_TAG}\]|◁/{_TAG}▷|<end(?:_of)?_{_TAG}>", re.IGNORECASE)
_SPECIAL = re.compile(r"<\|[A-Za-z_][\w:/.-]{0,40}\|?>|<[A-Za-z_][\w:/.-]{0,40}\|>|<｜[^<>｜\n]{1,40}｜>")


def recognised_format(prompt: str, response: str) -> str:
    """Return the name of the format whose markers a response or the end of its prompt holds; "plain" without any.

    Of several formats with a marker in the response, that counts which the prompt opens, else that whose marker comes
    first.

    Args:
        prompt: the rendered prompt, whose end may hold the marker that opens the thinking.
        response: everything after it.

    Example:
        >>> from stepsal.trace.recognition import recognised_format
        >>> recognised_format("What is 1 + 1?", "<think>One more than one.</think>Two.")
        'think'
    """
    places = {name: place for name, format in FORMATS.items() if (place := _first_place(format, response)) is not None}
    opened = opened_format(prompt)
    if places and opened not in places:
        return min(places, key=lambda name: places[name])
    return opened or "plain"


def opened_format(prompt: str) -> str | None:
    """Return the name of the format with one of whose markers a prompt ends, or None.

    Args:
        prompt: the rendered prompt, or the end of it.

    Example:
        >>> from stepsal.trace.recognition import opened_format
        >>> opened_format("What is 1 + 1?<think>"), opened_format("What is 1 + 1?")
        ('think', None)
    """
    return next((name for name, format in FORMATS.items() if format.opened_by(prompt)), None)


def unknown_markers(response: str, template: Iterable[str] = ()) -> tuple[str, ...]:
    """Return what looks in a response like a marker between sections that no known format has.

    These are tags of special tokens, and tags that close something with a word for thinking in their name. Mathematics,
    code and HTML have none.

    Args:
        response: what a model wrote.
        template: texts that are known to belong to no step, such as special tokens.

    Example:
        >>> from stepsal.trace.recognition import unknown_markers
        >>> unknown_markers("<scratchpad>One more than one.</scratchpad>Two, as a < b and <b>x</b>.")
        ('</scratchpad>',)
    """
    known = {*template, *(marker for format in FORMATS.values() for marker in format.all_markers)}
    tags = dict.fromkeys(match[0] for pattern in (_SPECIAL, _CLOSINGS) for match in pattern.finditer(response))
    return tuple(tag for tag in tags if tag not in known)


def warn_of_unknown_markers(response: str, template: Iterable[str] = (), *, stacklevel: int = 2) -> None:
    """Warn once if a response, in which no known marker stands, holds what looks like an unknown one.

    Args:
        response: what a model wrote.
        template: texts that are known to belong to no step, such as special tokens.
        stacklevel: whose call the warning names, as for `warnings.warn`.
    """
    if tags := unknown_markers(response, template):
        warnings.warn(
            f"the response holds {', '.join(map(repr, tags))}, which may mark thinking and answer, but no known format "
            "has it: it is taken for plain text, with its last paragraph as the summary. If it is a marker, name it: "
            "Segmentation(format=stepsal.trace.Format.with_marker(...)), or a Format with all markers",
            stacklevel=stacklevel,
        )


def _first_place(format: Format, response: str) -> int | None:
    """Return where the first marker stands that no other format has; None without any."""
    counts = Counter(marker for other in FORMATS.values() for marker in other.all_markers)
    places = (response.find(marker) for marker in format.all_markers if counts[marker] == 1)
    return min((place for place in places if place >= 0), default=None)
