"""Problems that are graded by the final answer: a number, a mathematical expression, or the letter of a choice.

    "number"   the last number in the last box, or else the last number of all; an integer, decimal or fraction
    "math"     the last boxed expression, or else the last expression, compared by math-verify (sympy)
    "choice"   the letter of an option

The final answer is read from the summary, or from the whole response where there is no summary. A response that was cut
off is wrong, whatever it says so far. Units are not compared.
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
"""Form of a final answer: a number, a mathematical expression, or the letter of an option."""
MOST_OPTIONS = 10
SECONDS = 5  # limit for reading or comparing an expression

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
NUMBER = re.compile(  # no sign after a digit (10-3), no exponent (cm^2), no part of a word
    rf"(?:(?<![\w)\]}}])-)?(?<![\w^.])(?<!\^\{{){_DIGITS}(?:\s*/\s*{_DIGITS})?"
)
_END = re.compile(r"(?:\s|<\|[^|>]*\|>|</s>)*\Z")  # what a tokenizer puts behind an answer
_LETTER = rf"([{ascii_uppercase[:MOST_OPTIONS]}])(?![\w'’])(?!(?<=[AI]) [a-z])"  # not the article of "A cat", not "I'm"
_CHOICES = tuple(  # the first pattern that matches counts, at its last match
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
    """The verdict on a final answer.

    Attributes:
        correct: the final answer is the right one.
        final_answer: as text, in a form in which equal values mostly look the same; None if the response states none.
        reason: why it is correct or not, in words.
        error: kind of the error; None when `correct`.
    """

    correct: bool
    final_answer: str | None
    reason: str
    error: Literal["truncated", "no answer", "wrong answer", "no number", "wrong number"] | None = None


@dataclass(frozen=True)
class Problem:
    r"""A question with its reference, graded by the final answer.

    Attributes:
        question: what the model is asked.
        reference: the right final answer.
        grader: "number", "math" or "choice", see the module docstring.

    Raises:
        ValueError: an unknown grader, or a reference that the grader can't read.
        ImportError: math-verify is not installed, for grader="math".

    Example:
        >>> from stepsal.tasks.answers import Problem
        >>> verdict = Problem("What is 3 * 4?", "12", "number").grade("3 * 4 = 13")
        >>> verdict.correct, verdict.final_answer, verdict.error
        (False, '13', 'wrong number')
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
        """Compare the final answer of a response with the reference.

        Args:
            trace: a trace, or the text of a response.
        """
        if not isinstance(trace, str) and trace.truncated:
            return Verdict(False, None, "the answer was cut off", "truncated")
        text = _END.sub("", trace if isinstance(trace, str) else trace.summary or trace.response)
        read = {"number": self._number, "math": self._math, "choice": self._choice}[self.grader]
        final_answer, same = read(text)
        number = self.grader == "number"
        if final_answer is None:
            reason = f"{text[-60:].strip()!r} has no {'number' if number else 'answer'}"
            return Verdict(False, None, reason, "no number" if number else "no answer")
        if same:
            return Verdict(True, final_answer, "the answer is right")
        reason = f"{final_answer} is not {self.reference}"
        return Verdict(False, final_answer, reason, "wrong number" if number else "wrong answer")

    def _is_reference(self) -> bool:
        """Tell whether the grader can read the reference."""
        if self.grader == "number":
            return NUMBER.fullmatch(self.reference) is not None
        if self.grader == "choice":
            return len(self.reference) == 1 and self.reference in ascii_uppercase[:MOST_OPTIONS]
        return bool(_parsed(f"${self.reference}$"))

    def _number(self, text: str) -> tuple[str | None, bool]:
        """Return the last number of a text, and whether it is the reference."""
        text = _last_box(text).replace("{,}", ",").replace("−", "-").replace("–", "-")
        if not (numbers := NUMBER.findall(text)):
            return None, False
        value = _value(numbers[-1])
        return str(value), value is not None and value == _value(self.reference)

    def _math(self, text: str) -> tuple[str | None, bool]:
        """Return the last expression of a text, and whether it equals the reference."""
        from math_verify import verify
        from sympy import Set as SympySet
        from sympy import Tuple

        reference = _parsed(f"${self.reference}$")
        text = text.replace("**", "")
        stated = _parsed(text[max(0, text.rfind(r"\boxed")) :])
        several = (SympySet, Tuple)
        if isinstance(reference[0], several) and not (stated and isinstance(stated[0], several)):
            stated = _parsed(text)  # several values, each in a box of its own
        if not stated:
            return None, False
        return str(stated[0]), bool(verify(reference, stated, timeout_seconds=_seconds()))

    def _choice(self, text: str) -> tuple[str | None, bool]:
        """Return the letter that a text chooses, and whether it is the reference."""
        for pattern in _CHOICES:
            if matches := list(pattern.finditer(text)):
                last = matches[-1]
                if _ANOTHER.match(text, last.end()):
                    return None, False  # "A or B" is no choice
                return last[1], last[1] == self.reference
        for pattern in _LISTED:
            if letters := {letter for match in pattern.finditer(text) for letter in match.groups() if letter}:
                letter = letters.pop() if len(letters) == 1 else None
                return letter, letter == self.reference
        return None, False


def _last_box(text: str) -> str:
    r"""Return what stands in the last \boxed{...}, or the whole text if there is none."""
    start, depth = text.rfind(r"\boxed{"), 0
    for i in range(max(0, start), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if text[i] == "}" and depth == 0:
            return text[start + len(r"\boxed{") : i]
    return text


def _value(number: str) -> Fraction | None:
    """Return the value of a text that `NUMBER` matches; None for a division by zero."""
    numerator, *denominator = (Fraction(part.strip()) for part in number.replace(",", "").split("/"))
    if not denominator:
        return numerator
    return numerator / denominator[0] if denominator[0] else None


def _parsed(text: str) -> list[object]:
    """Return what math-verify reads in a text: the last expression, in several forms; nothing if there is none."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    except ImportError as error:
        raise ImportError("grading mathematics needs pip install 'stepsal[math]'") from error

    boxed_first = LatexExtractionConfig(boxed_match_priority=0)
    forms: list[object] = parse(text, [boxed_first, ExprExtractionConfig()], parsing_timeout=_seconds())
    return forms


def _seconds() -> int | None:
    """Return how long math-verify may take; no limit outside the main thread, which alone gets its signal."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None
