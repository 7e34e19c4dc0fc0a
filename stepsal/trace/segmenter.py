"""One incremental state machine that finds sections and steps, in a whole text or token by token while decoding.

`Segmenter` reads characters. It knows the section it is in (thinking, summary, or none), which markers end it, and the
step that is open. When the first non-space character after some white space arrives, it decides once and for all
whether that character begins a new step: the decision looks at the step so far, at the white space, and at that one
character, never ahead. So a boundary is known with the first token of the next step, and it does not matter whether the
text comes in characters, tokens or at once: offline and online segmentation are the same code, fed differently.

Some things are only known later, and are provisional until then: a text that may become a marker (`</th` ...) counts to
the running step until it does; in the format "plain", and where a response has no marker of its format, the last
paragraph becomes the summary at `finish()`; and so does what follows the last closing of nested thinking that never
ends (`SectionReader`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from numbers import Integral

from stepsal.trace.boundaries import CLOSERS, WIDE_CLOSERS, WIDE_END, Split, boundary_rule
from stepsal.trace.enclosures import Enclosures
from stepsal.trace.formats import Format, Role
from stepsal.trace.markers import SectionReader, Span


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
        >>> from stepsal.trace.segmenter import Segmenter
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
        self._sections = SectionReader(format, template)
        self._held = ""  # the beginning of what may be a marker
        self._position = 0  # characters decided so far
        self._spans: list[Span] = []
        self._breaks: list[int] = []
        self._leads: list[int] = []  # per step: line breaks in the white space before it
        self._open = False  # is the last span still growing
        self._step: list[str] = []  # characters of the open step
        self._gap = ""  # white space since the last other character
        self._line_start = 0  # index in _step at which the current line begins
        self._enclosures = Enclosures()

    @property
    def role(self) -> Role | None:
        """The section that the text is in; None is template text outside all sections."""
        return self._sections.section

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
        """The positions at which a marker or template text began."""
        return tuple(self._breaks)

    @property
    def unread_headers(self) -> tuple[str, ...]:
        """The headers of messages that could not be read; what followed them is template text."""
        return self._sections.unread_headers

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

    @property
    def lacks_markers(self) -> bool:
        """True where no marker has told the sections apart so far, so that the last paragraph is to be the summary."""
        return self.format.last_is_summary or not self._sections.is_told

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
        twin._sections, twin._enclosures = self._sections.copy(), copy.copy(self._enclosures)
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
        self._spans = self._sections.final_roles(self._spans)
        if self.lacks_markers and len(self._spans) > 1:
            first = _first_of_summary(self._leads)
            self._spans[first:] = [span._replace(role="summary") for span in self._spans[first:]]
        return self.spans

    def _push(self, text: str, *, is_last: bool) -> None:
        text = self._held + text
        self._held = ""
        first_chars = self._sections.first_chars
        i = 0
        while i < len(text):
            if text[i] in first_chars:
                marker, may_grow = self._sections.marker_at(text, i)
                if may_grow and not is_last:
                    self._held = text[i:]
                    return
                if marker:
                    i += len(marker)
                    self._pass_marker(marker)
                    continue
            self._read(text[i])
            i += 1

    def _pass_marker(self, marker: str) -> None:
        """Go on behind a marker, after which a new step begins."""
        self._breaks.append(self._position)
        self._position += len(marker)
        self._sections.pass_marker(marker, self._position)
        self._open, self._step, self._gap, self._line_start = False, [], "", 0
        self._enclosures = Enclosures()

    def _read(self, char: str) -> None:
        """Read a character that belongs to no marker."""
        position = self._position
        self._position += 1
        self._sections.pass_char(char)
        section = self._sections.section
        if section is None:
            return
        if char.isspace():
            self._gap += char
            return
        self._enclosures.before(self._gap, char)
        if self._open and not self._begins_step(char):
            if "\n" in self._gap:
                self._line_start = len(self._step) + len(self._gap)
            self._step += self._gap
            self._spans[-1] = self._spans[-1]._replace(end=position + 1)
        else:
            self._spans.append(Span(section, position, position + 1))
            self._leads.append(self._gap.count("\n"))
            self._open, self._step, self._line_start = True, [], 0
            self._enclosures.begin_step()
        self._enclosures.read(self._gap, char)
        self._gap = ""
        self._step.append(char)

    def _begins_step(self, char: str) -> bool:
        """Tell whether a non-space character begins a new step, while one is open."""
        if self._enclosures.holds(self._gap) or len(self._step) < self.min_chars:
            return False
        is_wide_end = self._step[-1] in WIDE_END + WIDE_CLOSERS and char not in WIDE_END + CLOSERS + WIDE_CLOSERS
        if not self._gap and not self._rule.within_words and not is_wide_end:
            return False
        look_back = self._rule.look_back
        tail = self._step if look_back is None else self._step[-look_back:]
        line_start = max(0, self._line_start - (len(self._step) - len(tail)))
        return self._rule.begins_step("".join(tail), self._gap, char, line_start)


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
        >>> from stepsal.trace.segmenter import segment
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
        >>> from stepsal.trace.segmenter import check_steps
        >>> check_steps("sentence", 15)
    """
    boundary_rule(split)
    if not isinstance(min_chars, Integral) or isinstance(min_chars, bool) or min_chars < 0:
        raise ValueError(f"min_chars={min_chars!r} must be a whole number >= 0; 0 lets every step end")
