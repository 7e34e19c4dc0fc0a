"""Problems whose answers are graded by what they state in the end: a number, a mathematical expression, or a choice.

    "number"   the last number in the last box, or else the last number of all; an integer, decimal or fraction
    "math"     the last boxed expression, or else the last expression, compared by math-verify (sympy)
    "choice"   the letter of an option

An answer is looked for in the summary, or in the whole response where there is no summary. One that was cut off is
wrong, whatever it says so far. Units are not compared.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from string import ascii_uppercase
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from stepsal.trace import Trace

Grader = Literal["number", "math", "choice"]
MOST_OPTIONS = 10
SECONDS = 5  # that an expression may take

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
NUMBER = re.compile(  # no sign after a digit (10-3), no exponent (cm^2), no part of a word
    rf"(?:(?<![\w)\]}}])-)?(?<![\w^.])(?<!\^\{{){_DIGITS}(?:\s*/\s*{_DIGITS})?"
)
_END = re.compile(r"(?:\s|<\|[^|>]*\|>|</s>)*\Z")  # what a tokenizer puts behind an answer
_LETTER = rf"([{ascii_uppercase[:MOST_OPTIONS]}])(?![\w'’])(?!(?<=[AI]) [a-z])"  # not the article of "A cat", not "I'm"
_CHOICES = tuple(  # the first pattern that is found counts, and of it the last place
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        rf"\\boxed\{{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{{)?\W{{0,3}}{_LETTER}(?=\s*[)}}.:])",
        rf"\b(?i:answer(?: is| would be)?|it is(?: actually)?|it's)\W{{1,8}}{_LETTER}",
        rf"\b(?i:option|choice)(?: (?i:is|would be))?\W{{1,8}}{_LETTER}",
        rf"^\W*{_LETTER}\W*$",
    )
)
_LISTED = tuple(  # these count only where they name a single letter: they also list the options
    re.compile(pattern, re.MULTILINE)
    for pattern in (rf"\({_LETTER}\)|\*\*{_LETTER}\W{{0,2}}\*\*", rf"^\W*{_LETTER}[).:]")
)
_ANOTHER = re.compile(rf"\W{{0,4}}(?:or|and|,|/|&)\W{{0,4}}{_LETTER}")


@dataclass(frozen=True)
class Verdict:
    """Whether the stated answer is the right one.

    Attributes:
        correct: it is.
        answer: what was found, in a form in which equal answers are mostly equal; None without one.
        reason: in words.
        error: what is wrong; None when `correct`.
    """

    correct: bool
    answer: str | None
    reason: str
    error: Literal["truncated", "no answer", "wrong answer", "no number", "wrong number"] | None = None


@dataclass(frozen=True)
class Problem:
    """A question with the answer that it wants.

    Raises:
        ValueError: an unknown grader, or a reference that it can't read.
        ImportError: math-verify is not installed, for grader="math".
    """

    question: str
    reference: str
    grader: Grader = "math"

    def __post_init__(self) -> None:
        if self.grader not in get_args(Grader):
            raise ValueError(f"grader={self.grader!r} is unknown; use one of {', '.join(map(repr, get_args(Grader)))}")
        if not self._is_reference():
            raise ValueError(f"the reference {self.reference!r} can't be read by grader={self.grader!r}")

    def grade(self, trace: Trace | str) -> Verdict:
        """Find the answer, and compare it with the reference."""
        if not isinstance(trace, str) and trace.truncated:
            return Verdict(False, None, "the answer was cut off", "truncated")
        text = _END.sub("", trace if isinstance(trace, str) else trace.summary or trace.response)
        answer, same = {"number": self._number, "math": self._math, "choice": self._choice}[self.grader](text)
        number = self.grader == "number"
        if answer is None:
            reason = f"{text[-60:].strip()!r} has no {'number' if number else 'answer'}"
            return Verdict(False, None, reason, "no number" if number else "no answer")
        if same:
            return Verdict(True, answer, "the answer is right")
        return Verdict(False, answer, f"{answer} is not {self.reference}", "wrong number" if number else "wrong answer")

    def _is_reference(self) -> bool:
        if self.grader == "number":
            return NUMBER.fullmatch(self.reference) is not None
        if self.grader == "choice":
            return len(self.reference) == 1 and self.reference in ascii_uppercase[:MOST_OPTIONS]
        return bool(_parsed(f"${self.reference}$"))

    def _number(self, text: str) -> tuple[str | None, bool]:
        text = _last_box(text).replace("{,}", ",").replace("−", "-").replace("–", "-")
        if not (numbers := NUMBER.findall(text)):
            return None, False
        answer = _value(numbers[-1])
        return str(answer), answer is not None and answer == _value(self.reference)

    def _math(self, text: str) -> tuple[str | None, bool]:
        from math_verify import verify
        from sympy import Set as SympySet
        from sympy import Tuple

        wanted = _parsed(f"${self.reference}$")
        text = text.replace("**", "")
        found = _parsed(text[max(0, text.rfind(r"\boxed")) :])
        several = (SympySet, Tuple)
        if isinstance(wanted[0], several) and not (found and isinstance(found[0], several)):
            found = _parsed(text)  # several answers, each in a box of its own
        if not found:
            return None, False
        return str(found[0]), bool(verify(wanted, found, timeout_seconds=_seconds()))

    def _choice(self, text: str) -> tuple[str | None, bool]:
        for pattern in _CHOICES:
            if matches := list(pattern.finditer(text)):
                last = matches[-1]
                if _ANOTHER.match(text, last.end()):
                    return None, False  # "A or B" is no choice
                return last[1], last[1] == self.reference
        for pattern in _LISTED:
            if letters := {letter for match in pattern.finditer(text) for letter in match.groups() if letter}:
                answer = letters.pop() if len(letters) == 1 else None
                return answer, answer == self.reference
        return None, False


def _last_box(text: str) -> str:
    r"""What stands in the last \boxed{...}; the whole text where there is none."""
    start, depth = text.rfind(r"\boxed{"), 0
    for i in range(max(0, start), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if text[i] == "}" and depth == 0:
            return text[start + len(r"\boxed{") : i]
    return text


def _value(number: str) -> Fraction | None:
    """Of a match of `NUMBER`; None for a division by zero."""
    parts = [Fraction(part.strip()) for part in number.replace(",", "").split("/")]
    return None if parts[-1] == 0 and len(parts) > 1 else parts[0] / parts[1] if len(parts) > 1 else parts[0]


def _parsed(text: str) -> list[object]:
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    except ImportError as error:
        raise ImportError("grading mathematics needs pip install 'stepsal[math]'") from error

    boxed_first = LatexExtractionConfig(boxed_match_priority=0)
    found: list[object] = parse(text, [boxed_first, ExprExtractionConfig()], parsing_timeout=_seconds())
    return found


def _seconds() -> int | None:
    """math-verify interrupts itself by a signal, which only the main thread gets."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None
