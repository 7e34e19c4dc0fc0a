"""Problems that are graded by the final answer: a number, a mathematical expression, or the letter of a choice.

    "number"   the number in the last box, or else the last number of all, see `stepsal.tasks.numbers`
    "math"     the expression that the answer states, compared by math-verify (sympy), see `stepsal.tasks.mathematics`
    "choice"   the letter of an option, see `stepsal.tasks.choices`

The final answer is read from the summary, or from the whole response where there is no summary. A response that was cut
off is wrong, whatever it says so far. Units are not compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from stepsal.tasks.choices import LETTERS, letters_of, read_choice
from stepsal.tasks.mathematics import Expression, expression, read_expression
from stepsal.tasks.numbers import read_number, whole_number

if TYPE_CHECKING:
    from stepsal.trace import Trace

Grader = Literal["number", "math", "choice"]
"""Form of a final answer: a number, a mathematical expression, or the letter of an option."""

#: What a tokenizer puts behind an answer.
_END = re.compile(r"(?:\s|<\|[^|>]*\|>|<(?:end_of_turn|eos)>|</s>|<｜[^｜>]*｜>)*\Z")


@dataclass(frozen=True)
class Verdict:
    """The verdict on a final answer.

    Attributes:
        correct: the final answer is the right one.
        final_answer: as text, in a form in which equal values mostly look the same; None if the response states none.
        reason: why it is correct or not, in words.
        error: kind of the error; None when `correct`. "not compared": math-verify did not get done with it.
    """

    correct: bool
    final_answer: str | None
    reason: str
    error: Literal["truncated", "no answer", "wrong answer", "no number", "wrong number", "not compared"] | None = None


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
        check_reference(self.reference, self.grader)

    def grade(self, trace: Trace | str) -> Verdict:
        """Compare the final answer of a response with the reference.

        Args:
            trace: a trace, or the text of a response.
        """
        if not isinstance(trace, str) and trace.truncated:
            return Verdict(False, None, "the answer was cut off", "truncated")
        text = _END.sub("", trace if isinstance(trace, str) else trace.answer)
        result = compare_answer(read_answer(text, self.grader, self._letters), self.reference)
        number = self.grader == "number"
        if result.text is None:
            reason = f"{text[-60:].strip()!r} has no {'number' if number else 'answer'}"
            return Verdict(False, None, reason, "no number" if number else "no answer")
        if result.problem is not None:
            return Verdict(False, result.text, f"{result.text} {result.problem}", "not compared")
        if result.same:
            return Verdict(True, result.text, "the answer is right")
        reason = f"{result.text} is not {self.reference}"
        return Verdict(False, result.text, reason, "wrong number" if number else "wrong answer")

    @property
    def _letters(self) -> str:
        """Letters of the options that the question lists, if it lists the right one, else all."""
        letters = letters_of(self.question)
        return letters if self.reference in letters else LETTERS


class Result(NamedTuple):
    """The result of comparing an answer with a reference.

    Attributes:
        text: the final answer as text; None if there is none.
        same: it equals the reference.
        problem: what kept the comparison from ending, in words; None if nothing did.
    """

    text: str | None
    same: bool
    problem: str | None = None


def read_answer(text: str, grader: Grader, letters: str = LETTERS) -> Fraction | Expression | str | None:
    r"""Return what an answer states: a number, an expression or a letter; None if it states none.

    Args:
        text: an answer.
        grader: form of the final answer.
        letters: letters of the options, for "choice".

    Example:
        >>> from stepsal.tasks.answers import read_answer
        >>> read_answer(r"It is \boxed{1\,250}.", "number"), read_answer("Therefore, B.", "choice")
        (Fraction(1250, 1), 'B')
    """
    if grader == "number":
        return read_number(text)
    return read_expression(text) if grader == "math" else read_choice(text, letters)


def compare_answer(stated: Fraction | Expression | str | None, reference: str) -> Result:
    """Compare what an answer states with a reference.

    Args:
        stated: result of `read_answer`.
        reference: the right final answer, in the form of the same grader.

    Example:
        >>> from stepsal.tasks.answers import compare_answer, read_answer
        >>> compare_answer(read_answer("0.75", "number"), "3/4")
        Result(text='3/4', same=True, problem=None)
    """
    if stated is None:
        return Result(None, False)
    if isinstance(stated, Expression):
        comparison = stated.compare(reference)
        text = stated.latex if comparison.problem else comparison.text
        return Result(text, comparison.same[0], comparison.problem)
    return Result(str(stated), stated == (reference if isinstance(stated, str) else whole_number(reference)))


@lru_cache(maxsize=10_000)  # a scorer makes the problem of a sample anew for each of its answers
def check_reference(reference: str, grader: Grader) -> None:
    """Refuse a reference that a grader can't read.

    Args:
        reference: the right final answer.
        grader: form of the final answer.

    Raises:
        ValueError: the grader can't read the reference.

    Example:
        >>> from stepsal.tasks.answers import check_reference
        >>> check_reference("seven", "number")
        Traceback (most recent call last):
        ValueError: the reference 'seven' can't be read by grader='number'
    """
    problem: str | None = None
    if grader == "number":
        is_read = whole_number(reference) is not None
    elif grader == "choice":
        is_read = len(reference) == 1 and reference in LETTERS
    else:
        latex = expression(reference)
        comparison = Expression(latex).compare_all((reference,)) if latex else None
        is_read = comparison is not None and comparison.text is not None
        problem = comparison.problem if comparison is not None else None
    if not is_read:
        reason = f": it {problem}" if problem else ""
        raise ValueError(f"the reference {reference!r} can't be read by grader={grader!r}{reason}")
