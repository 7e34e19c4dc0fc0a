"""One incremental state machine that finds sections and steps, in a whole text or token by token while decoding.

`Segmenter` reads characters. It knows the section it is in (thinking, summary, or none), which markers end it, and the
step that is open. When the first non-space character after some white space arrives, it decides once and for all
whether that character begins a new step: the decision looks at the step so far, at the white space, and at that one
character, never ahead. So a boundary is known with the first token of the next step, and it does not matter whether the
text comes in characters, tokens or at once: offline and online segmentation are the same code, fed differently.

Two things are only known later, and are provisional until then: a text that may become a marker (`</th` ...) counts to
the running step until it does, and in the format "plain" the last paragraph becomes the summary at `finish()`.

`Segmentation` holds the settings of a segmenter as one value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple, cast

from stepsal.trace.boundaries import (
    CLOSERS,
    WIDE_CLOSERS,
    WIDE_END,
    Split,
    boundary_rule,
    split_from_json,
    split_to_json,
)
from stepsal.trace.formats import FORMATS, Format, Role, check_markers, recognised_format


class Span(NamedTuple):
    """A step as a half-open span of characters, without the white space around it."""

    role: Role
    start: int
    end: int


# enclosures inside which no step ends, by their openings; a blank line ends math that was never closed, as in LaTeX
_ENCLOSURES = {"```": "```", "$$": "$$", "\\[": "\\]", "\\(": "\\)", "\\begin{": "\\end{"}
_CODE = "```"  # holds blank lines
_LONGEST_ENCLOSURE = max(map(len, _ENCLOSURES))


class Segmenter:
    """A state machine that finds the steps of a response, which is pushed in pieces of any size.

    Args:
        format: the model's format.
        split: where steps end within a section: "sentence", "paragraph" (at blank lines) or "line"; a regular
            expression, where a match ends with the last non-space character of a step or in the white space after it
            (only the last 256 characters of a step are searched); or a callable `f(step_so_far, next_char) -> bool`,
            which returns True where the non-space character `next_char` begins a new step (`step_so_far` includes
            white space at its end).
        min_chars: least length of a step in characters; a shorter piece is merged with the one after it. The last step
            of a section may be shorter.
        template: extra texts, such as end-of-sequence tokens, that belong to no step.

    Raises:
        ValueError: negative `min_chars`, or a regular expression that does not compile.

    Example:
        >>> from stepsal.trace.segment import Segmenter
        >>> segmenter = Segmenter(stepsal.trace.FORMATS["think"])
        >>> segmenter.push("One and one is two. So it is two.</th")
        >>> segmenter.push("ink>Two.")
        >>> [span.role for span in segmenter.finish()]
        ['thinking', 'thinking', 'summary']
    """

    def __init__(
        self, format: Format, *, split: Split = "sentence", min_chars: int = 15, template: Iterable[str] = ()
    ) -> None:
        check_steps(split, min_chars)
        self.format = format
        self.min_chars = min_chars
        self._rule = boundary_rule(split)
        self._markers = _markers_by_section(format, template)
        self._first_chars = {marker[0] for ends in self._markers.values() for marker, _ in ends}
        self._held = ""  # the beginning of what may be a marker
        self._position = 0  # characters decided so far
        self._section: Role | None = format.start
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
    def role(self) -> Role | None:
        """The section that the text is in; None is template text outside all sections."""
        return self._section

    @property
    def spans(self) -> tuple[Span, ...]:
        """The steps so far, the open one included."""
        return tuple(self._spans)

    @property
    def n_steps(self) -> int:
        """The number of steps that have begun."""
        return len(self._spans)

    @property
    def breaks(self) -> tuple[int, ...]:
        """The positions at which a marker or template text ended."""
        return tuple(self._breaks)

    @property
    def n_chars(self) -> int:
        """The number of characters that have been pushed."""
        return self._position + len(self._held)

    @property
    def holds_back(self) -> bool:
        """True where the last characters may be the beginning of a marker, so that their step is provisional."""
        return bool(self._held)

    @property
    def in_step(self) -> bool:
        """True where a step is open, to which white space that follows belongs."""
        return self._open

    def role_of(self, step: int) -> Role:
        """Return the role of a step by its number."""
        return self._spans[step].role

    def step_at(self, position: int) -> int:
        """Return the step that covers a character near the end of the text; -1 for template.

        Args:
            position: position of the character; the search takes longer the further back it lies.
        """
        for i in range(len(self._spans) - 1, -1, -1):
            if self._spans[i].start <= position:
                return i if position < self._spans[i].end else -1
        return -1

    def copy(self) -> Segmenter:
        """Return an independent segmenter in the same state."""
        twin = copy.copy(self)
        for name in ("_spans", "_breaks", "_leads", "_step"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def push(self, text: str) -> None:
        """Read more of the response, with constant work per character.

        A callable `split` is given the whole step so far at each character, so that its work may grow with the step.

        Args:
            text: the next characters, however many.
        """
        self._push(text, is_last=False)

    def flush(self) -> None:
        """Read a held-back beginning of a marker as ordinary text."""
        self._push("", is_last=True)

    def finish(self) -> tuple[Span, ...]:
        """End the response, and return its steps."""
        self.flush()
        self._open = False
        if self.format.last_is_summary and len(self._spans) > 1:
            first = _first_of_summary(self._leads)
            self._spans[first:] = [span._replace(role="summary") for span in self._spans[first:]]
        return self.spans

    def _push(self, text: str, *, is_last: bool) -> None:
        text = self._held + text
        self._held = ""
        i = 0
        while i < len(text):
            if text[i] in self._first_chars:
                marker, next_section, may_grow = self._marker_at(text, i)
                if may_grow and not is_last:
                    self._held = text[i:]
                    return
                if marker:
                    i += len(marker)
                    self._position += len(marker)
                    self._breaks.append(self._position)
                    self._enter(next_section)
                    continue
            self._read(text[i])
            i += 1

    def _marker_at(self, text: str, i: int) -> tuple[str, Role | None, bool]:
        """Return the marker at a place, the section after it, and whether more text may make it a longer one."""
        marker, next_section = "", None
        for candidate, section in self._markers[self._section]:  # longest first
            if text.startswith(candidate, i):
                marker, next_section = candidate, section
                break
        n_left = len(text) - i
        may_grow = any(
            len(longer) > n_left and longer.startswith(text[i:]) for longer, _ in self._markers[self._section]
        )
        return marker, next_section, may_grow

    def _enter(self, section: Role | None) -> None:
        """Begin a section behind its marker."""
        self._section = section
        self._open, self._step, self._gap, self._closing, self._line_start = False, [], "", None, 0

    def _read(self, char: str) -> None:
        """Read a character that belongs to no marker."""
        position = self._position
        self._position += 1
        if self._section is None:
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
            self._spans.append(Span(self._section, position, position + 1))
            self._leads.append(self._gap.count("\n"))
            self._open, self._step, self._closing, self._line_start = True, [], None, 0
        self._gap = ""
        self._step.append(char)
        self._track_enclosure()

    def _begins_step(self, char: str) -> bool:
        """Tell whether a non-space character begins a new step, while one is open."""
        if self._closing is not None:
            if self._closing == _CODE or self._gap.count("\n") < 2:
                return False
            self._closing = None
        if len(self._step) < self.min_chars:
            return False
        is_wide_end = self._step[-1] in WIDE_END + WIDE_CLOSERS and char not in WIDE_END + CLOSERS + WIDE_CLOSERS
        if not self._gap and not self._rule.within_words and not is_wide_end:
            return False
        look_back = self._rule.look_back
        tail = self._step if look_back is None else self._step[-look_back:]
        line_start = max(0, self._line_start - (len(self._step) - len(tail)))
        return self._rule.begins_step("".join(tail), self._gap, char, line_start)

    def _track_enclosure(self) -> None:
        """Keep track of enclosures, inside which no step ends, by the last character."""
        tail = "".join(self._step[-_LONGEST_ENCLOSURE:])
        if self._closing is not None:
            self._depth += tail.endswith("\\begin{")
            if tail.endswith(self._closing):
                self._depth -= 1
                if self._depth <= 0:
                    self._closing = None
        elif self._step[-1] in "`$[({":
            self._closing = next((end for start, end in _ENCLOSURES.items() if tail.endswith(start)), None)
            self._depth = 1


def _markers_by_section(format: Format, template: Iterable[str]) -> dict[Role | None, list[tuple[str, Role | None]]]:
    """Return for each section the markers that may come in it, longest first, with the section they lead to."""
    texts = [text for text in template if text]
    markers = {}
    for section in cast("tuple[Role | None, ...]", (None, "thinking", "summary")):
        leads_to: dict[str, Role | None] = dict.fromkeys(texts, section)
        leads_to.update(format.markers.get(section, {}))
        markers[section] = sorted(leads_to.items(), key=lambda item: -len(item[0]))
    return markers


def _first_of_summary(leads: list[int]) -> int:
    """Return the step with which the last paragraph begins; failing that, the last line; failing that, the last step.

    Args:
        leads: line breaks before each of at least two steps.
    """
    for least in (2, 1):
        for i in range(len(leads) - 1, 0, -1):
            if leads[i] >= least:
                return i
    return len(leads) - 1


def segment(
    text: str, format: Format, *, split: Split = "sentence", min_chars: int = 15, template: Iterable[str] = ()
) -> tuple[Span, ...]:
    """Return the steps of a whole response.

    Args:
        text: the response.
        format: the model's format.
        split: where steps end, as for `Segmenter`.
        min_chars: least length of a step in characters; a shorter piece is merged with the one after it.
        template: extra texts, such as end-of-sequence tokens, that belong to no step.

    Example:
        >>> from stepsal.trace.segment import segment
        >>> spans = segment("One and one is two. So it is.", stepsal.trace.FORMATS["think"])
        >>> [(span.start, span.end) for span in spans]
        [(0, 19), (20, 29)]
    """
    segmenter = Segmenter(format, split=split, min_chars=min_chars, template=template)
    segmenter.push(text)
    return segmenter.finish()


def check_steps(split: Split, min_chars: int) -> None:
    """Refuse settings by which no steps can be found.

    Args:
        split: where steps end within a section.
        min_chars: least length of a step in characters.

    Raises:
        ValueError: an unknown split, or `min_chars` that is no whole number >= 0.

    Example:
        >>> from stepsal.trace.segment import check_steps
        >>> check_steps("sentence", 15)
    """
    boundary_rule(split)
    if not isinstance(min_chars, Integral) or isinstance(min_chars, bool) or min_chars < 0:
        raise ValueError(f"min_chars={min_chars!r} must be a whole number >= 0; 0 lets every step end")


@dataclass(frozen=True)
class Segmentation:
    """A way to find the sections and steps of a response, the same for traces and for StepFlow.

    Attributes:
        format: how the model marks its sections: a `Format`, a name in `FORMATS` ("think", "harmony", "plain"), or
            "auto": told by the markers of a text that is read, and by model and chat template where one is to be
            written.
        split: where steps end within a section: "sentence", "paragraph" (at blank lines) or "line"; a regular
            expression, where a match ends with a step or in the white space after it; or a callable
            `f(step_so_far, next_char) -> bool`, which returns True where the non-space character `next_char` begins a
            new step (`step_so_far` includes white space at its end).
        min_chars: least length of a step in characters; a shorter piece is merged with the one after it. The last step
            of a section may be shorter.

    Raises:
        ValueError: an unknown format or split, or negative `min_chars`.

    Example:
        >>> stepsal.Segmentation(split="paragraph").to_dict()
        {'format': 'auto', 'split': 'paragraph', 'min_chars': 15}
    """

    format: str | Format = "auto"
    split: Split = "sentence"
    min_chars: int = 15

    def __post_init__(self) -> None:
        known = ", ".join(map(repr, ("auto", *FORMATS)))
        if isinstance(self.format, str) and self.format not in ("auto", *FORMATS):
            raise ValueError(f"format={self.format!r} is unknown; use {known}, or Format.with_marker({self.format!r})")
        if not isinstance(self.format, str | Format):
            raise ValueError(f"format={self.format!r} is no format; use {known}, or a Format of your own")
        check_steps(self.split, self.min_chars)
        object.__setattr__(self, "min_chars", int(self.min_chars))

    @property
    def format_name(self) -> str:
        """The name of the format, or "auto"."""
        return self.format.name if isinstance(self.format, Format) else self.format

    def resolved(self, prompt: str, response: str, *, needs_markers: bool = False) -> Segmentation:
        """Return a copy whose format is told by the markers of a text, if it was "auto".

        Args:
            prompt: the rendered prompt.
            response: everything after it.
            needs_markers: raise if a format was named and none of its markers stands in the text.

        Raises:
            ValueError: under `needs_markers`, the text has no marker of the named format.

        Example:
            >>> stepsal.Segmentation().resolved("What is 1 + 1?", "<think>One more than one.</think>Two.").format
            'think'
        """
        if self.format == "auto":
            return replace(self, format=recognised_format(prompt, response))
        if needs_markers:
            check_markers(FORMATS[self.format] if isinstance(self.format, str) else self.format, prompt, response)
        return self

    def segmenter(self, prompt: str = "", template: Iterable[str] = ()) -> Segmenter:
        """Return a segmenter for the response to a prompt, begun in the section that the prompt opens.

        Args:
            prompt: the rendered prompt.
            template: extra texts, such as end-of-sequence tokens, that belong to no step.

        Raises:
            ValueError: the format is "auto".

        Example:
            >>> stepsal.Segmentation(format="think").segmenter("<think></think>").role
            'summary'
        """
        if self.format == "auto":
            raise ValueError("format='auto' is told by a text: call resolved(prompt, response) first, or name a format")
        format = FORMATS[self.format] if isinstance(self.format, str) else self.format
        return Segmenter(format.after(prompt), split=self.split, min_chars=self.min_chars, template=template)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings JSON-ready, a callable `split` by its name.

        Example:
            >>> import re
            >>> stepsal.Segmentation(split=re.compile("so", re.IGNORECASE)).to_dict()["split"]
            {'pattern': 'so', 'flags': ['IGNORECASE', 'UNICODE']}
        """
        format = self.format.to_dict() if isinstance(self.format, Format) else self.format
        return {"format": format, "split": split_to_json(self.split), "min_chars": self.min_chars}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Segmentation:
        """Read settings that `to_dict` has written.

        Args:
            settings: "format", "split" and "min_chars"; a missing one has its default.

        Raises:
            ValueError: unknown settings, or a `split` that was a callable, of which only the name was written.

        Example:
            >>> stepsal.Segmentation.from_dict({"split": "line"}) == stepsal.Segmentation(split="line")
            True
        """
        changes = dict(settings)
        if isinstance(changes.get("format"), Mapping):
            changes["format"] = Format.from_dict(changes["format"])
        if isinstance(changes.get("split"), Mapping):
            changes["split"] = split_from_json(changes["split"])
        try:
            return cls(**changes)
        except TypeError as error:
            raise ValueError(f"segmentation={settings!r} holds settings that are unknown: {error}") from error
