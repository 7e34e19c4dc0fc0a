"""One incremental state machine that finds sections and steps, in a whole text or token by token while decoding.

`Segmenter` reads characters. It knows the section it is in (thinking, summary, or none), which markers end it, and the
step that is open. When the first non-space character after some white space arrives, it decides once and for all
whether that character begins a new step: the decision looks at the step so far, at the white space, and at that one
character, never ahead. So a boundary is known with the first token of the next step, and it does not matter whether the
text comes in characters, tokens or at once: offline and online segmentation are the same code, fed differently.

Two things are only known later, and are provisional until then: a text that may become a marker (`</th` ...) counts to
the running step until it does, and in the format "plain" the last paragraph becomes the summary at `finish()`.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from stepsal.trace.formats import FORMATS, Format, Role

Split = Literal["sentence", "paragraph", "line"] | str | re.Pattern[str] | Callable[[str, str], bool]


class Span(NamedTuple):
    """A step as half-open character span, without the white space around it."""

    role: Role
    start: int
    end: int


_CLOSERS = "\"'”’»)]}*_`"
_WIDE_CLOSERS = "」』）】》"
_WIDE_END = "。！？"  # need no white space after them
_BULLETS = "-*•#"
_ABBREVIATIONS = frozenset("e.g i.e cf vs fig figs eq eqs dr mr mrs ms prof approx resp sec ch viz ca al".split())
_OPENERS = "\"'“‘«‹„([{*_`$\\"  # what a sentence may begin with, besides letters and digits
_INLINE_LIST = re.compile(r":\s+\(?[1aAiI][.)]$")  # "We do two things: 1. ..."
_LIST_NUMBER = re.compile(r"(\d{1,3}|[A-Za-z])[.)]")
# what must not be cut, by its opening; a blank line ends math that was never closed, as it does in LaTeX
_ENCLOSURES = {"```": "```", "$$": "$$", "\\[": "\\]", "\\(": "\\)", "\\begin{": "\\end{"}
_TAIL = 48  # characters of the step that a sentence decision looks back on
_MATCH_TAIL = 256  # and that a regular expression sees, so that a long step costs no more per character


class Segmenter:
    """Find the steps of a response, pushed in pieces of any size.

    Args:
        format: the model's format.
        split: where steps end within a section. "sentence", "paragraph" (blank lines), "line"; a regular expression: a
            step ends where a match ends at its last non-space character or in the white space after it (it
            sees the last 256 characters); or a callable `f(step_so_far, next_char) -> bool`, asked whether a new step
            begins at `next_char`, the next non-space character (the step so far includes white space at its end).
        min_chars: a shorter step does not end: the next piece is merged into it. The last of a section may be shorter.
        template: further texts that are in no step, such as end-of-sequence tokens.

    Raises:
        ValueError: negative `min_chars`, or a regular expression that does not compile.
    """

    def __init__(
        self, format: Format, *, split: Split = "sentence", min_chars: int = 15, template: Iterable[str] = ()
    ) -> None:
        if min_chars < 0:
            raise ValueError(f"min_chars={min_chars} must not be negative")
        self.format = format
        self.min_chars = min_chars
        self._ends = _boundary_rule(split)
        self._look_back = _MATCH_TAIL if isinstance(split, (str, re.Pattern)) else None  # a callable sees all
        if split == "sentence":
            self._look_back = _TAIL
        self._whole_step = not isinstance(split, str) or split not in ("sentence", "paragraph", "line")
        # per section: markers, longest first, with the section they lead to
        self._markers: dict[Role | None, list[tuple[str, Role | None]]] = {}
        sections: tuple[Role | None, ...] = (None, "thinking", "summary")
        for section in sections:
            leads_to: dict[str, Role | None] = dict.fromkeys(filter(None, template), section)
            leads_to.update(format.markers.get(section, {}))
            self._markers[section] = sorted(leads_to.items(), key=lambda item: -len(item[0]))
        self._first_chars = {marker[0] for ends in self._markers.values() for marker, _ in ends}
        self._held = ""  # the beginning of what may be a marker
        self._position = 0  # characters decided so far
        self.role: Role | None = format.start
        self._spans: list[Span] = []
        self._breaks: list[int] = []
        self._leads: list[int] = []  # per step: line breaks in the white space before it
        self._open = False  # is the last span still growing
        self._step: list[str] = []  # characters of the open step
        self._gap = ""  # white space since the last other character
        self._line_start = 0  # index in _step at which the current line begins
        self._closing: str | None = None  # end of the enclosure we are in
        self._depth = 0  # how many LaTeX environments are open

    @property
    def spans(self) -> tuple[Span, ...]:
        """The steps found so far, the open one included."""
        return tuple(self._spans)

    @property
    def breaks(self) -> tuple[int, ...]:
        """Where each marker and template text ended."""
        return tuple(self._breaks)

    @property
    def n_chars(self) -> int:
        """Characters pushed so far."""
        return self._position + len(self._held)

    def copy(self) -> Segmenter:
        """An independent segmenter in the same state."""
        twin = copy.copy(self)
        for name in ("_spans", "_breaks", "_leads", "_step"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def push(self, text: str) -> None:
        """Read more of the response; constant work per character, except for a callable `split`, which is given all."""
        self._push(text, final=False)

    def flush(self) -> None:
        """Read a held-back beginning of a marker as ordinary text."""
        self._push("", final=True)

    def _push(self, text: str, final: bool) -> None:
        text = self._held + text
        self._held = ""
        i = 0
        while i < len(text):
            if text[i] in self._first_chars:
                marker = next((m for m in self._markers[self.role] if text.startswith(m[0], i)), None)
                longer = not final and any(
                    len(m) > len(text) - i and m.startswith(text[i:]) and (marker is None or len(m) > len(marker[0]))
                    for m, _ in self._markers[self.role]
                )
                if longer:
                    self._held = text[i:]
                    return
                if marker is not None:
                    self._close_section(marker[1])
                    self._position += len(marker[0])
                    self._breaks.append(self._position)
                    i += len(marker[0])
                    continue
            self._read(text[i])
            i += 1

    def finish(self) -> tuple[Span, ...]:
        """End the response, and return its steps."""
        self.flush()
        self._open = False
        if self.format.last_is_summary and len(self._spans) > 1:
            first = next(
                (i for breaks in (2, 1) for i in range(len(self._spans) - 1, 0, -1) if self._leads[i] >= breaks),
                len(self._spans) - 1,
            )
            self._spans[first:] = [span._replace(role="summary") for span in self._spans[first:]]
        return self.spans

    @property
    def holds_back(self) -> bool:
        """Whether the last characters may be the beginning of a marker, so that their step is provisional."""
        return bool(self._held)

    @property
    def in_step(self) -> bool:
        """Whether a step is open: white space that follows counts to it."""
        return self._open

    def _close_section(self, role: Role | None) -> None:
        self.role = role
        self._open, self._step, self._gap, self._closing, self._line_start = False, [], "", None, 0

    def _read(self, char: str) -> None:
        position = self._position
        self._position += 1
        if self.role is None:
            return
        if char.isspace():
            self._gap += char
            return
        if self._open and not self._begins_step(char):
            if "\n" in self._gap:
                self._line_start = len(self._step) + len(self._gap)
            self._step += self._gap
            self._spans[-1] = self._spans[-1]._replace(end=position + 1)
        else:
            self._spans.append(Span(self.role, position, position + 1))
            self._leads.append(self._gap.count("\n"))
            self._open, self._step, self._closing, self._line_start = True, [], None, 0
        self._gap = ""
        self._step.append(char)
        self._track_enclosure()

    def _begins_step(self, char: str) -> bool:
        if self._closing is not None:
            if self._closing == "```" or self._gap.count("\n") < 2:
                return False
            self._closing = None
        if len(self._step) < self.min_chars:
            return False
        if (
            not self._gap
            and not self._whole_step
            and (char in _WIDE_END + _CLOSERS + _WIDE_CLOSERS or self._step[-1] not in _WIDE_END + _WIDE_CLOSERS)
        ):
            return False
        kept = self._step if self._look_back is None else self._step[-self._look_back :]
        line_start = max(0, self._line_start - (len(self._step) - len(kept)))
        return self._ends("".join(kept), self._gap, char, line_start)

    def _track_enclosure(self) -> None:
        tail = "".join(self._step[-7:])
        if self._closing is not None:
            self._depth += tail.endswith("\\begin{")
            if tail.endswith(self._closing):
                self._depth -= 1
                if self._depth <= 0:
                    self._closing = None
        elif self._step[-1] in "`$[({":
            self._closing = next((end for start, end in _ENCLOSURES.items() if tail.endswith(start)), None)
            self._depth = 1


_Rule = Callable[[str, str, str, int], bool]


def _boundary_rule(split: Split) -> _Rule:
    """`rule(step_so_far, gap, next_char, start_of_its_last_line) -> bool`."""
    if split == "sentence":
        return _sentence_ends
    if split == "paragraph":
        return lambda step, gap, char, line: gap.count("\n") >= 2
    if split == "line":
        return lambda step, gap, char, line: "\n" in gap
    if callable(split):
        return lambda step, gap, char, line: bool(split(step + gap, char))
    if isinstance(split, str) and split.removesuffix("s") in ("sentence", "paragraph", "line"):
        raise ValueError(f"split={split!r} is unknown; use {split.removesuffix('s')!r}")
    try:
        pattern = re.compile(split)
    except re.error as error:
        raise ValueError(
            f"split={split!r} is neither 'sentence', 'paragraph', 'line' nor a regular expression: {error}"
        ) from error
    return lambda step, gap, char, line: any(
        match.end() >= len(step) and match.start() < len(step) for match in pattern.finditer(step + gap)
    )


def _sentence_ends(step: str, gap: str, char: str, line_start: int) -> bool:
    """Whether `step` is a finished sentence, given the white space after it and the next character."""
    breaks = gap.count("\n")
    if breaks >= 2:
        return True
    body = step.rstrip(_CLOSERS + _WIDE_CLOSERS) or step
    mark = body[-1]
    if mark in _WIDE_END:
        return True
    if not gap:
        return False
    if breaks and (char in _BULLETS or char.isdigit()):  # a new line that begins as list items do
        return True
    if mark not in ".!?…":
        return False
    begins = char in _OPENERS or (char.isalnum() and not char.islower())
    if mark != "." or body.endswith(".."):
        return begins  # not in "Wait... maybe", "5! = 120", "1 + 2 + ... + n"
    if _LIST_NUMBER.fullmatch(step[line_start:].strip()) or _INLINE_LIST.search(step):
        return False
    words = body[:-1].split()
    word = words[-1].lstrip("([\"'“‘*_").lower() if words else ""
    if word == "etc":
        return begins
    return word not in _ABBREVIATIONS


@dataclass(frozen=True)
class Segmentation:
    """How sections and steps are found in a response: one value for traces, StepFlow and whatever makes traces.

    Attributes:
        format: how the model marks its sections: a `Format`, a name in `FORMATS` ("think", "harmony", "plain"), or "auto":
            told by the markers of a text that is there, and by model and chat template for one still to be written.
        split: where steps end within a section: "sentence", "paragraph" (blank lines), "line", a regular expression, or
            a callable; see `Segmenter`.
        min_chars: a shorter step does not end: the next piece is merged into it.

    Raises:
        ValueError: an unknown format or split, or negative `min_chars`.

    Example:
        >>> Segmentation(split="paragraph").to_dict()
        {'format': 'auto', 'split': 'paragraph', 'min_chars': 15}
    """

    format: str | Format = "auto"
    split: Split = "sentence"
    min_chars: int = 15

    def __post_init__(self) -> None:
        if isinstance(self.format, str) and self.format not in ("auto", *FORMATS):
            known = ", ".join(map(repr, ("auto", *FORMATS)))
            raise ValueError(f"format={self.format!r} is unknown; use {known}, or Format.with_marker({self.format!r})")
        Segmenter(FORMATS["plain"], split=self.split, min_chars=self.min_chars)

    @property
    def format_name(self) -> str:
        """The name of the format, or "auto"."""
        return self.format.name if isinstance(self.format, Format) else self.format

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready settings, for provenance; a format, pattern or callable of your own goes by its name."""
        split = self.split
        if not isinstance(split, str):
            split = getattr(split, "pattern", None) or getattr(split, "__name__", "callable")
        return {"format": self.format_name, "split": split, "min_chars": self.min_chars}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Segmentation:
        """Read settings that `to_dict` has written.

        Raises:
            ValueError: unknown settings, such as a format or a callable of your own, of which only the name was written.
        """
        try:
            return cls(**settings)
        except TypeError as error:
            raise ValueError(f"segmentation={settings!r} holds settings that are unknown: {error}") from error


def segment(
    text: str, format: Format, *, split: Split = "sentence", min_chars: int = 15, template: Iterable[str] = ()
) -> tuple[Span, ...]:
    """The steps of a whole response; see `Segmenter`."""
    segmenter = Segmenter(format, split=split, min_chars=min_chars, template=template)
    segmenter.push(text)
    return segmenter.finish()


class StepTracker:
    """Which step each token belongs to, told while the tokens come in.

    A token belongs to the step of its first non-space character; a token of white space (or of no text yet) belongs to
    the step that is open. Everything else is template, -1.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self.role: Role | None = None  # of the last token's step; None for template

    def push(self, token_text: str) -> int:
        """Read one token and return its step, counted from the first step of the response; -1 for template."""
        before, in_step = self.segmenter.n_chars, self.segmenter.in_step
        if self.segmenter.holds_back and self.segmenter.role:
            in_step = True  # white space shows the held-back text to be no marker: it opened a step
        self.segmenter.push(token_text)
        seen = self.segmenter
        if seen.holds_back:  # not yet known to be a marker: for now it is what it would be as text
            seen = seen.copy()
            seen.flush()
        offset = len(token_text) - len(token_text.lstrip())
        if offset == len(token_text):
            step = len(seen._spans) - 1 if in_step and seen.in_step else -1
        else:
            step = _step_at(seen._spans, before + offset)
        self.role = seen._spans[step].role if step >= 0 else None
        return step


def step_ids(
    spans: tuple[Span, ...], offsets: Iterable[tuple[int, int]], text: str, breaks: Iterable[int]
) -> list[int]:
    """The step of each token of a whole text, by the rule of `StepTracker`.

    Args:
        spans: steps, ordered, as characters of `text`.
        offsets: half-open character span of each token.
        breaks: positions at which template text ends; white space after one belongs to no step before it.
    """
    starts, breaks = [span.start for span in spans], sorted(breaks)
    result = []
    for start, end in offsets:
        piece = text[start:end]
        position = start + len(piece) - len(piece.lstrip())
        if position < end:
            i = bisect_right(starts, position) - 1
            result.append(i if i >= 0 and position < spans[i].end else -1)
            continue
        i = bisect_left(starts, start) - 1
        last_break = bisect_right(breaks, start) - 1
        cut = last_break >= 0 and i >= 0 and breaks[last_break] >= spans[i].end
        result.append(-1 if i < 0 or cut else i)
    return result


def _step_at(spans: list[Span], position: int) -> int:
    for i in range(len(spans) - 1, -1, -1):  # the last or the last but one
        if spans[i].start <= position:
            return i if position < spans[i].end else -1
    return -1
