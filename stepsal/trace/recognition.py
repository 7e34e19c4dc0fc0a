"""Tell the format of a text by its markers, and find what looks like a marker that no format knows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from stepsal.trace.formats import FORMATS, Format

# words that name the thinking, or what follows it, in a tag
_WORDS = (
    "think|thinking|thought|thoughts|reason|reasoning|reasoning_content|reflect|reflection|scratchpad|scratch_pad|cot|"
    "rationale|monologue|deliberation|analysis|solution|final_answer"
)
_TAG = rf"(?:\w+[_:. -])*(?:{_WORDS})(?:[_:. -]\w+)*"
_CLOSINGS = re.compile(rf"</{_TAG}>|\[/{_TAG}\]|◁/{_TAG}▷|<end(?:_of)?_{_TAG}>", re.IGNORECASE)
_SPECIAL = re.compile(r"<\|[A-Za-z_][\w:/.-]{0,40}\|?>|<[A-Za-z_][\w:/.-]{0,40}\|>|<｜[^<>｜\n]{1,40}｜>")
# parts of words, since special tokens join them in many ways; tokens of roles and of ends have none of them
_IN_SPECIAL = re.compile(
    "think|thought|reason|reflect|scratch|rationale|monologue|deliberat|analysis|solution|answer|(?<!tool_)response|final|inner",
    re.IGNORECASE,
)
_CODE = re.compile(r"^ *(`{3,}|~{3,})[^\n]*\n.*?(?:^ *\1|\Z)|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def recognised_format(prompt: str, response: str) -> str:
    """Return the name of the format whose markers a response or the end of its prompt holds; "plain" without any.

    Of several formats with a marker in the response, that counts which the prompt opens, else that whose marker comes
    first. Only `Format.signs` count.

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
    """Return the name of the format with one of whose signs a prompt ends, or None.

    Args:
        prompt: the rendered prompt, or the end of it.

    Example:
        >>> from stepsal.trace.recognition import opened_format
        >>> opened_format("What is 1 + 1?<think>"), opened_format("What is 1 + 1?")
        ('think', None)
    """
    return next((name for name, format in FORMATS.items() if format.after(prompt).opened in format.signs), None)


def unknown_markers(response: str) -> tuple[str, ...]:
    """Return what looks in a response like a marker between sections that no known format has.

    These are tags with a word for thinking or answering in their name: such that look like special tokens, and such
    that close what the response began with, or what was opened before it. Mathematics, HTML and code have none.

    Args:
        response: what a model wrote.

    Example:
        >>> from stepsal.trace.recognition import unknown_markers
        >>> unknown_markers("<scratchpad>One more than one.</scratchpad>Two, as a < b and <b>x</b>.")
        ('</scratchpad>',)
    """
    known = {marker for format in FORMATS.values() for marker in format.all_markers}
    text = _CODE.sub("", response).lstrip()
    special = [match[0] for match in _SPECIAL.finditer(text) if _IN_SPECIAL.search(match[0])]
    closings = [match[0] for match in _CLOSINGS.finditer(text) if _closes_whole(text, match[0])]
    return tuple(dict.fromkeys(tag for tag in (*special, *closings) if tag not in known))


def warn_of_unknown_markers(response: str, *, stacklevel: int = 2) -> None:
    """Warn once if a response, in which no known marker stands, holds what looks like an unknown one.

    Args:
        response: what a model wrote.
        stacklevel: whose call the warning names, as for `warnings.warn`.
    """
    if tags := unknown_markers(response):
        warnings.warn(
            f"the response holds {', '.join(map(repr, tags))}, which may mark thinking and answer, but no known format "
            "has it: it is taken for plain text, with its last paragraph as the summary. If it is a marker, name it: "
            "Segmentation(format=stepsal.trace.Format.with_marker(...)), or a Format with all markers",
            stacklevel=stacklevel,
        )


def warn_of_unread_headers(headers: Sequence[str], *, stacklevel: int = 2) -> None:
    """Warn once if headers of messages could not be read, so that what follows them is lost.

    Args:
        headers: the headers, from `Segmenter.unread_headers`.
        stacklevel: whose call the warning names, as for `warnings.warn`.
    """
    if headers:
        warnings.warn(
            f"headers of messages can't be read: {', '.join(map(repr, headers))}; what follows them counts as template "
            "text: correct them in the response, or pass a Format of your own",
            stacklevel=stacklevel,
        )


def _closes_whole(text: str, closing: str) -> bool:
    """Tell whether a tag closes what a text begins with, or what was opened before it."""
    opening = closing.replace("/", "", 1) if "/" in closing else re.sub("end", "start", closing, flags=re.IGNORECASE)
    openings = (opening, opening.replace("start", "begin"))
    return text.startswith(openings) or not any(tag in text for tag in openings)


def _first_place(format: Format, response: str) -> int | None:
    """Return where the first marker stands that tells a format; None without any."""
    places = (response.find(sign) for sign in format.signs)
    return min((place for place in places if place >= 0), default=None)
