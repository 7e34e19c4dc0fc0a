"""Follow code and mathematics, inside which no step ends.

A fence of code begins a line, with three or more backticks or tildes, and is closed by a line of at least as many of
them and nothing else (CommonMark); where a backtick stands in the rest of its first line, it is code within a line and
no fence. Mathematics is enclosed by the signs of LaTeX; a blank line ends what was never closed, as it does there.
"""

from __future__ import annotations

_MATHEMATICS = {"$$": "$$", "\\[": "\\]", "\\(": "\\)", "\\begin{": "\\end{"}
_MATHEMATICS_ENDS = "".join(start[-1] for start in _MATHEMATICS)  # last characters of the openings
_LONGEST = max(map(len, _MATHEMATICS))
_FENCE_CHARS = "`~"
_SHORTEST_FENCE = 3


class Enclosures:
    """A reader that tells whether a text is inside code or mathematics, character by character.

    Attributes:
        in_code: True inside fenced code.

    Example:
        >>> from stepsal.trace.enclosures import Enclosures
        >>> enclosures = Enclosures()
        >>> for char in "$$x.":
        ...     enclosures.before("", char)
        ...     enclosures.read("", char)
        >>> enclosures.holds(" ")
        True
    """

    def __init__(self) -> None:
        self._fence = ""  # the fence that has begun the code, "" outside
        self._is_first_line = False  # of the code: that of the fence itself
        self._run: str | None = ""  # fence characters with which the line began and that are all of it so far
        self._is_new = True  # nothing has been read
        self._tail = ""  # last characters of the step
        self._closing: str | None = None  # what ends the mathematics
        self._depth = 0  # how many LaTeX environments are open

    @property
    def in_code(self) -> bool:
        """True inside fenced code."""
        return bool(self._fence)

    def before(self, gap: str, char: str) -> None:
        """Take note of the lines that end before a character, with which code may end.

        Args:
            gap: white space before the character.
            char: the next character that is no white space.
        """
        if self._run is None and not gap:  # in the middle of a word, as most often
            return
        if self._is_new or "\n" in gap:
            if self._fence and not self._is_first_line and self._run is not None and self._run.startswith(self._fence):
                self._fence = ""
            self._is_first_line, self._run = False, ""
        self._is_new = False
        if self._run is not None:
            continues = char in _FENCE_CHARS and (not self._run or (char == self._run[0] and not gap))
            self._run = self._run + char if continues else None

    def holds(self, gap: str) -> bool:
        """Tell whether no step may end before the next character.

        Args:
            gap: white space before the character.
        """
        return self.in_code or (self._closing is not None and gap.count("\n") < 2)

    def begin_step(self) -> None:
        """Begin a step, and with it outside of mathematics."""
        self._tail, self._closing, self._depth = "", None, 0

    def read(self, gap: str, char: str) -> None:
        """Read a character, after it was decided to which step it belongs.

        Args:
            gap: white space before the character.
            char: the character, which is no white space.
        """
        if self._closing is not None and gap.count("\n") >= 2:
            self._closing = None
        self._tail = (self._tail + gap + char)[-_LONGEST:]
        if self._run is None and not self._fence:
            if self._closing is not None or char in _MATHEMATICS_ENDS:
                self._read_mathematics(char)
        elif self._fence:
            if self._is_first_line:
                self._read_first_line(char)
        elif self._run is not None and len(self._run) == _SHORTEST_FENCE and self._closing is None:
            self._fence, self._is_first_line = self._run, True

    def _read_first_line(self, char: str) -> None:
        """Read more of the line with which code begins."""
        if self._run is not None:
            self._fence = self._run
        elif char == "`" == self._fence[0]:
            self._fence, self._is_first_line = "", False

    def _read_mathematics(self, char: str) -> None:
        """Keep track of mathematics by the last character."""
        if self._closing is not None:
            self._depth += self._tail.endswith("\\begin{")
            if self._tail.endswith(self._closing):
                self._depth -= 1
                if self._depth <= 0:
                    self._closing = None
        else:
            self._closing = next((end for start, end in _MATHEMATICS.items() if self._tail.endswith(start)), None)
            self._depth = 1
