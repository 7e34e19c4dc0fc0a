"""Follow the markers of a response: tell the section that each character is in.

`SectionReader` is the part of the segmenter that knows the format. Sections may alternate, thinking may be opened
inside the thinking, and messages may have headers, which are read as a whole when they end. The text of a header is
template, whatever it turns out to say, so that nothing has to be taken back.

Two things are known only at the end of the response: thinking that was opened inside the thinking and never closed as
often ended with its last closing, and text before a closing that was never opened was thinking.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

from stepsal.trace.formats import Format, Role

_LONGEST_HEADER = 256  # characters; a header that goes on for longer is none


class Span(NamedTuple):
    """A step as a half-open span of characters, without the white space around it."""

    role: Role
    start: int
    end: int


class SectionReader:
    """A reader that tells the section of a response, from its markers and the characters between them.

    Args:
        format: the model's format.
        template: extra texts, such as end-of-sequence tokens, that belong to no step.

    Attributes:
        section: the section that the text is in; None is template text outside all sections.
        unread_headers: headers that could not be read; what followed them is template text.
        is_told: False where a marker or a header should tell the section, and none has come.
        first_chars: the characters with which markers begin.

    Example:
        >>> from stepsal.trace.markers import SectionReader
        >>> reader = SectionReader(stepsal.trace.FORMATS["think"])
        >>> reader.section, reader.marker_at("</think>", 0)
        ('thinking', ('</think>', False))
        >>> reader.pass_marker("</think>", 8)
        >>> reader.section
        'summary'
    """

    def __init__(self, format: Format, template: Iterable[str] = ()) -> None:
        self.section: Role | None = format.start
        self.unread_headers: tuple[str, ...] = ()
        self._format = format
        self._markers = _markers_by_section(format, template)
        self.first_chars = frozenset(marker[0] for ends in self._markers.values() for marker in ends)
        is_in_header = format.header is not None and format.opened.startswith(format.header.starts)
        self._header: str | None = format.opened if is_in_header else None
        self._depth = int(format.pair is not None and format.opened == format.pair[0])
        self._is_new = True  # has the section no text so far
        self._was_opened = self._depth > 0  # has a marker opened thinking
        self.is_told = _begins_told(format)
        self._last_closing: tuple[int, int | None] | None = None  # in nested thinking, and the next opening after it
        self._thinking_until = 0  # position of a closing without an opening

    def copy(self) -> SectionReader:
        """Return an independent reader in the same state."""
        return copy.copy(self)

    def marker_at(self, text: str, i: int) -> tuple[str, bool]:
        """Return the marker at a place of a text, and whether more text may make it a longer one.

        Args:
            text: the text.
            i: the place.
        """
        markers = self._markers[self._state]
        marker = next((marker for marker in markers if text.startswith(marker, i)), "")  # longest first
        n_left = len(text) - i
        return marker, any(len(longer) > n_left and longer.startswith(text[i:]) for longer in markers)

    def pass_marker(self, marker: str, end: int) -> None:
        """Go on behind a marker.

        Args:
            marker: the marker.
            end: position at which it ends.
        """
        header = self._format.header
        if header is not None and (marker in header.starts or marker == header.end):
            self._pass_header_mark(marker)
            return
        following = self._markers[self._state][marker]
        self.is_told = self.is_told or marker in self._format.markers.get(self.section, {})
        if self._header is not None:  # the message ends in the middle of its header
            self._give_up_header()
        if self._format.pair is not None and marker in self._format.openings:
            self._open(end - len(marker))
        elif self._format.pair is not None and marker == self._format.pair[1]:
            following = self._close(end, following)
        elif following != self.section:
            self._depth, self._last_closing = 0, None
        self._is_new = self._is_new or following != self.section
        self.section = following

    def pass_char(self, char: str) -> None:
        """Read a character that belongs to no marker."""
        if self._is_new:
            self._is_new = char.isspace()
        if self._header is not None:
            self._header += char
            if len(self._header) > _LONGEST_HEADER:
                self._give_up_header()

    def final_roles(self, spans: Iterable[Span]) -> list[Span]:
        """Return the steps of a whole response, with what is known of their roles only at its end.

        Args:
            spans: the steps, with the section in which each began.
        """
        first, stop = self._last_closing or (0, 0)
        roles = []
        for span in spans:
            role = span.role
            if span.start < self._thinking_until:
                role = "thinking"
            elif first <= span.start and (stop is None or span.start < stop):
                role = "summary"
            roles.append(span._replace(role=role))
        return roles

    @property
    def _state(self) -> Role | Literal["header"] | None:
        return "header" if self._header is not None else self.section

    def _open(self, position: int) -> None:
        """Open the thinking, once more if it is open; an opening that is repeated at once counts once."""
        if self.section != "thinking":
            self._depth = 1
        elif self._is_new:
            self._depth = max(self._depth, 1)
        else:
            self._depth += 1
        self._was_opened = True
        if self._last_closing is not None and self._last_closing[1] is None:
            self._last_closing = (self._last_closing[0], position)

    def _close(self, end: int, following: Role | None) -> Role | None:
        """Close the thinking, and return the section that follows."""
        if self.section != "thinking":
            if not self._was_opened:
                self._thinking_until = end
            return following
        self._depth -= 1
        if self._depth > 0:
            self._last_closing = (end, None)
            return "thinking"
        self._depth, self._last_closing = 0, None
        self._was_opened = True
        return following

    def _pass_header_mark(self, marker: str) -> None:
        """Begin a header, go on with one, or end it."""
        self.is_told = True
        header = self._format.header
        assert header is not None
        if marker == header.end:
            try:
                self.section = header.section_after(self._header or "")
                self._header = None
            except ValueError:
                self.section = None
                self._header = self._header or ""
                self._give_up_header()
        else:
            rank = header.starts.index(marker)
            if self._header is not None and any(start in self._header for start in header.starts[rank:]):
                self._give_up_header()
            self._header = (self._header or "") + marker
            self.section = None
        self._is_new = True

    def _give_up_header(self) -> None:
        """Keep note of a header that can't be read."""
        assert self._header is not None
        self.unread_headers = (*self.unread_headers, self._header)
        self._header = None


def _begins_told(format: Format) -> bool:
    """Tell whether it is known from the beginning in which section a response begins."""
    if format.header is not None:
        return format.start is not None
    return format.pair is None or format.start != "thinking" or bool(format.opened)


def _markers_by_section(
    format: Format, template: Iterable[str]
) -> dict[Role | Literal["header"] | None, dict[str, Role | None]]:
    """Return for each section the markers that may come in it, longest first, with the section they lead to.

    Inside a header these are the markers that go on with it, end it, or end its message too early.
    """
    texts = [text for text in template if text]
    header = format.header
    markers: dict[Role | Literal["header"] | None, dict[str, Role | None]] = {}
    for section in cast("tuple[Role | None, ...]", (None, "thinking", "summary")):
        markers[section] = {**dict.fromkeys(texts, section), **format.markers.get(section, {})}
        if header is not None:
            markers[section] |= dict.fromkeys((*header.starts, *((header.end,) if section is None else ())))
    if header is not None:
        ends = (marker for section in format.markers.values() for marker in section)
        markers["header"] = dict.fromkeys((*header.starts, header.end, *ends))
    return {key: dict(sorted(ends.items(), key=lambda item: -len(item[0]))) for key, ends in markers.items()}
