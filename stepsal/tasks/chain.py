"""The chain task: look premises up, carry values, and be checked at every step.

A question is a list of definitions in random order, some of which are not needed:

    Vera is Hugo minus 2. Hugo is 4 plus 3. Anna is Hugo plus 9. What is Anna?

An answer expands the goal backwards (what does it need?), evaluates forwards (restate the premise, put the
values in, state the result), and ends in a one-line summary:

    <think> Anna needs Hugo. Hugo needs nothing. Hugo is 4 plus 3, 4 plus 3, so Hugo = 7.
    Anna is Hugo plus 9, 7 plus 9, so Anna = 16.</think> The answer is Anna = 16.

Every sentence can be verified against the question and the sentences before it, so `Problem.grade` knows not only
whether the final answer is right but which step is the first wrong one, and what is wrong with it. When several
definitions are pending, the order in which they are expanded is free: the first token of such a step is a real
decision.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from stepsal.trace import Trace

NAMES = (
    "Anna Bert Cleo Dora Emil Fred Gina Hugo Iris Jack Kate Liam Mona "
    "Nils Olga Paul Quin Rosa Seth Tina Umar Vera Walt Xena Yuri Zara"
).split()
EXAMPLE = "Hugo is 4 plus 3. Anna is Hugo plus 9. What is Anna?"
MAX_LENGTH = 12
MAX_VALUE = 30  # every value lies in 0..MAX_VALUE, so each is one token of the embedded tokenizer

Op = Literal["plus", "minus"]
"""Operation of a definition."""
Operand = str | int
"""Operand of a definition: a name or a number."""
ErrorKind = Literal[
    "wrong premise", "wrong carry", "wrong arithmetic", "missing step", "repeated step", "unneeded step",
    "wrong summary", "malformed", "truncated",
]  # fmt: skip
"""Kind of the first error of a response."""


@dataclass(frozen=True)
class Definition:
    """A definition: `name` is `left` `op` `right`.

    Attributes:
        name: what is defined.
        left: a number, or another name.
        op: "plus" or "minus".
        right: a number, or another name.
    """

    name: str
    left: Operand
    op: Op
    right: Operand

    @property
    def needs(self) -> tuple[str, ...]:
        """The names that this definition refers to, in order."""
        return tuple(x for x in (self.left, self.right) if isinstance(x, str))

    def __str__(self) -> str:
        return f"{self.name} is {self.left} {self.op} {self.right}"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a response, step by step.

    Attributes:
        correct: the final answer is right *and* so is every step: the verdict that counts as success.
        final_answer_correct: the summary states the right value, however it was reached.
        final_answer: the value that the summary states; None if it states none.
        error: kind of the first error; None when `correct`.
        error_sentence: index of the first wrong thinking sentence; equal to the number of thinking sentences when
            the error lies in the summary or in something left out at the end; None when `correct`.
        reason: the first error in words.
    """

    correct: bool
    final_answer_correct: bool
    final_answer: int | None
    error: ErrorKind | None = None
    error_sentence: int | None = None
    reason: str = "every step and the answer are right"


@dataclass(frozen=True)
class Problem:
    """One chain problem; the module docstring shows its shape.

    Attributes:
        definitions: in the order of the question.
        goal: the name that is asked for.
        length: number of definitions that the goal needs, its own included.
        seed: seed that the problem was drawn by.

    Example:
        >>> problem = stepsal.tasks.chain.sample(seed=3, length=2)
        >>> verdict = problem.grade(problem.solution())
        >>> verdict.correct, str(verdict.final_answer) == problem.reference
        (True, True)
    """

    definitions: tuple[Definition, ...]
    goal: str
    length: int
    seed: int

    @property
    def question(self) -> str:
        """The definitions and what is asked, as text."""
        return " ".join(f"{d}." for d in self.definitions) + f" What is {self.goal}?"

    @cached_property
    def by_name(self) -> dict[str, Definition]:
        """The definition of each name."""
        return {d.name: d for d in self.definitions}

    @cached_property
    def values(self) -> dict[str, int]:
        """The value of every defined name, distractors included."""
        known: dict[str, int] = {}

        def value(x: Operand) -> int:
            if isinstance(x, int):
                return x
            if x not in known:
                d = self.by_name[x]
                known[x] = _apply(d.op, value(d.left), value(d.right))
            return known[x]

        for d in self.definitions:
            value(d.name)
        return known

    @property
    def reference(self) -> str:
        """The right final answer, as text."""
        return str(self.values[self.goal])

    def solution(self, seed: int = 0) -> str:
        """Return a right response, thinking and summary, in the embedded model's format.

        Args:
            seed: decides which definition is expanded first where several are pending.
        """
        rng = random.Random(seed)
        order: list[str] = []
        pending = [self.goal]
        while pending:
            name = pending.pop(rng.randrange(len(pending)))
            order.append(name)
            pending += self.by_name[name].needs
        backwards = [f"{name} needs {_listing(self.by_name[name].needs)}." for name in order]
        forwards = []
        for name in reversed(order):
            d = self.by_name[name]
            left, right = (self.values[x] if isinstance(x, str) else x for x in (d.left, d.right))
            forwards.append(f"{d}, {left} {d.op} {right}, so {name} = {self.values[name]}.")
        thinking = " ".join(backwards + forwards)
        return f" {thinking}</think> The answer is {self.goal} = {self.reference}."

    def grade(self, trace: Trace | str) -> Verdict:
        """Check every sentence of a response and its summary.

        Args:
            trace: a trace, or the text of a response (thinking, `</think>`, summary).
        """
        return _grade(self, trace if isinstance(trace, str) else trace.response)


def sample(seed: int, length: int | None = None, distractors: int | None = None) -> Problem:
    """Draw a problem, the same one for the same arguments.

    Args:
        seed: any integer.
        length: number of needed definitions, 1..12; None draws it from 1..8.
        distractors: number of definitions that are not needed, 0..14; None draws it from 1..(length + 2) // 2 + 1.

    Raises:
        ValueError: `length` or `distractors` out of range.

    Example:
        >>> stepsal.tasks.chain.sample(seed=5, length=1, distractors=1).question
        'Iris is Tina plus 1. Tina is 6 plus 9. What is Tina?'
    """
    rng = random.Random(seed)
    if length is None:
        length = rng.randint(1, 8)
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"length={length} is outside 1..{MAX_LENGTH}")
    if distractors is None:
        distractors = rng.randint(1, (length + 2) // 2 + 1)
    if not 0 <= distractors <= len(NAMES) - MAX_LENGTH:
        raise ValueError(f"distractors={distractors} is outside 0..{len(NAMES) - MAX_LENGTH}")

    names = rng.sample(NAMES, length + distractors)
    children = _random_tree(rng, length)
    values: dict[str, int] = {}
    definitions = []
    for i in reversed(range(length)):  # children have higher indices than their parent
        definitions.append(_define(rng, names[i], [names[c] for c in children[i]], values))
    for name in names[length:]:
        k = rng.choice((0, 1, 1, 2))
        definitions.append(_define(rng, name, rng.sample(sorted(values), min(k, len(values))), values))
    rng.shuffle(definitions)
    return Problem(tuple(definitions), goal=names[0], length=length, seed=seed)


@dataclass(frozen=True)
class ChainTask:
    """Chain problems of chosen lengths, as a task (`stepsal.tasks.Task`).

    Attributes:
        length: number of needed definitions, or a range (lowest, highest) to draw it from; None draws it from 1..8.
        distractors: number of definitions that are not needed; None draws it as `sample` does.

    Raises:
        ValueError: a number that `sample` refuses, or an empty range.

    Example:
        >>> task = stepsal.tasks.chain.ChainTask(length=(7, 9), distractors=2)
        >>> task.name, task.sample(0).length
        ('chain(length=7..9, distractors=2)', 7)
    """

    length: int | tuple[int, int] | None = None
    distractors: int | None = None

    def __post_init__(self) -> None:
        low, high = self.length if isinstance(self.length, tuple) else (self.length, self.length)
        if low is not None and high is not None and low > high:
            raise ValueError(f"length={self.length} is empty; give (lowest, highest)")
        for length in (low, high):
            sample(0, length, self.distractors)

    @property
    def name(self) -> str:
        """A text that names lengths and distractors."""
        length = "{}..{}".format(*self.length) if isinstance(self.length, tuple) else self.length
        return f"chain(length={length}, distractors={self.distractors})"

    def sample(self, seed: int) -> Problem:
        """Return the problem of a seed.

        Args:
            seed: any integer.
        """
        length = self.length
        if isinstance(length, tuple):
            length = random.Random(f"length {seed}").randint(*length)
        return sample(seed, length, self.distractors)


def _random_tree(rng: random.Random, n: int) -> list[list[int]]:
    """Draw a tree of n nodes, at most two children each and deep rather than wide; return the children of each."""
    children: list[list[int]] = [[] for _ in range(n)]
    for i in range(1, n):
        free = [j for j in range(i) if len(children[j]) < 2]
        parent = free[-1] if rng.random() < 0.6 else rng.choice(free)
        children[parent].append(i)
    return children


def _define(rng: random.Random, name: str, needs: list[str], values: dict[str, int]) -> Definition:
    """Define `name` over `needs` such that its value lies in 0..MAX_VALUE, and enter it in `values`."""
    left: Operand
    right: Operand
    if len(needs) == 2:
        left, right = needs if values[needs[0]] >= values[needs[1]] else reversed(needs)
    elif needs:
        left, right = needs[0], rng.randint(1, 9)
    else:
        left, right = rng.randint(1, 9), rng.randint(1, 9)
    a = values[left] if isinstance(left, str) else left
    b = values[right] if isinstance(right, str) else right
    ops: list[Op] = [op for op in get_args(Op) if 0 <= _apply(op, a, b) <= MAX_VALUE]
    d = Definition(name, left, rng.choice(ops), right)
    values[name] = _apply(d.op, a, b)
    return d


def _apply(op: str, a: int, b: int) -> int:
    return a + b if op == "plus" else a - b


def _listing(names: tuple[str, ...]) -> str:
    return " and ".join(names) or "nothing"


_NEEDS = re.compile(r"(\w+) needs (\w+(?: and \w+)?)")
_IS = re.compile(r"(\w+) is (\w+) (plus|minus) (\w+), (\d+) (plus|minus) (\d+), so (\w+) = (0|[1-9]\d*)")
_SUMMARY = re.compile(r"\s*The answer is (\w+) = (0|[1-9]\d*)\.\s*(<\|endoftext\|>)?\s*")


class _StepError(Exception):
    def __init__(self, kind: ErrorKind, reason: str) -> None:
        self.kind, self.reason = kind, reason


class _Checker:
    """A walk through the thinking, sentence by sentence, up to the first one that does not follow.

    The methods raise `_StepError` there.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.pending = {problem.goal}  # needed, not yet expanded
        self.expanded: set[str] = set()
        self.stated: dict[str, int] = {}  # values as the response states them

    def check(self, sentence: str) -> None:
        if match := _NEEDS.fullmatch(sentence):
            self._expand(match[1], match[2])
        elif match := _IS.fullmatch(sentence):
            self._evaluate(*match.groups())
        else:
            raise _StepError("malformed", f"{sentence!r} is no step of this task")

    def _expand(self, name: str, listing: str) -> None:
        if name in self.expanded:
            raise _StepError("repeated step", f"{name} was expanded before")
        if name not in self.pending:
            raise _StepError("unneeded step", f"nothing so far needs {name}")
        needs = self.problem.by_name[name].needs
        if listing != _listing(needs):
            raise _StepError("wrong premise", f"{name} needs {_listing(needs)}, not {listing}")
        self.pending.remove(name)
        self.pending.update(needs)
        self.expanded.add(name)

    def _evaluate(
        self, name: str, left: str, op: str, right: str, a: str, op_again: str, b: str, subject: str, result: str
    ) -> None:
        if self.pending:
            raise _StepError("missing step", f"{', '.join(sorted(self.pending))} was never expanded")
        if name in self.stated:
            raise _StepError("repeated step", f"{name} was evaluated before")
        if name not in self.expanded:
            raise _StepError("unneeded step", f"{name} is not needed")
        definition = self.problem.by_name[name]
        if f"{name} is {left} {op} {right}" != str(definition):
            raise _StepError("wrong premise", f"the question says {definition}")
        missing = [x for x in definition.needs if x not in self.stated]
        if missing:
            raise _StepError("missing step", f"{name} needs the value of {missing[0]}, which was not evaluated")
        for operand, value in ((definition.left, a), (definition.right, b)):
            expected = self.stated[operand] if isinstance(operand, str) else operand
            if int(value) != expected:
                raise _StepError("wrong carry", f"{operand} is {expected}, not {value}")
        if op_again != op or subject != name:
            raise _StepError("wrong carry", f"{subject} with {op_again!r} is not {definition}")
        if int(result) != _apply(op, int(a), int(b)):
            raise _StepError("wrong arithmetic", f"{a} {op} {b} is {_apply(op, int(a), int(b))}, not {result}")
        self.stated[name] = int(result)

    def finish(self) -> None:
        missing = sorted(self.pending | (self.expanded - self.stated.keys()))
        if missing:
            raise _StepError("missing step", f"{', '.join(missing)} was never evaluated")


def _grade(problem: Problem, response: str) -> Verdict:
    """Check a response sentence by sentence, and then its summary."""
    thinking, end_mark, rest = response.partition("</think>")
    summary = _SUMMARY.fullmatch(rest)
    final_answer = int(summary[2]) if summary else None
    final_answer_correct = summary is not None and summary[1] == problem.goal and summary[2] == problem.reference

    pieces = thinking.replace("<think>", "").split(".")
    sentences = [s.strip() for s in pieces[:-1]]
    checker, i = _Checker(problem), 0
    try:
        for i, sentence in enumerate(sentences):  # noqa: B007
            checker.check(sentence)
        i = len(sentences)
        if not end_mark:
            raise _StepError("truncated", "the thinking does not end")
        if pieces[-1].strip():
            raise _StepError("malformed", f"{pieces[-1].strip()!r} is no step of this task")
        checker.finish()
        if summary is None or summary[1] != problem.goal or final_answer != checker.stated[problem.goal]:
            raise _StepError("wrong summary", f"the steps give {problem.goal} = {checker.stated[problem.goal]}")
    except _StepError as error:
        return Verdict(False, final_answer_correct, final_answer, error.kind, i, error.reason)
    return Verdict(True, final_answer_correct, final_answer)
