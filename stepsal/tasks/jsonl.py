"""Problems from a JSONL file: one object per line, with a question, the right answer, and options to choose from.

For example::

    {"question": "What is 3/4 + 1/4?", "answer": "1"}
    {"question": "Which of these is prime?", "options": ["4", "7", "9"], "answer": "7"}
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from stepsal.tasks.answers import MOST_OPTIONS, Grader, Problem

INSTRUCTIONS: dict[Grader, str] = {
    "number": "Put the answer, a number, at the end.",
    "math": r"Put the final answer within \boxed{}.",
    "choice": r"Put the letter of the right option within \boxed{}.",
}


@dataclass(frozen=True)
class JsonlTask:
    """The lines of a file as a task (`stepsal.tasks.Task`).

    Problem i is line i, counted from 0 without empty lines. A line with options is graded by the letter of the right
    one; options are shuffled, in an order of its own for each line that is the same in every run. Other lines are
    graded by `grader`.

    Attributes:
        path: the file.
        question: name of the field with the question.
        answer: name of the field with the right final answer; where there are options, the text of one of them.
        options: name of the field with a list of options.
        grader: grader of lines without options.
        shuffle_seed: seed of the orders of the options; None keeps the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that can't be read; the message names the line, and what is wrong.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "sums.jsonl")
        >>> _ = path.write_text('{"question": "1 + 1 = ?", "answer": 2}')
        >>> stepsal.tasks.jsonl.JsonlTask(path, grader="number").sample(0).reference
        '2'
    """

    path: str | Path
    question: str = "question"
    answer: str = "answer"
    options: str = "options"
    grader: Grader = "math"
    shuffle_seed: int | None = 0

    def __post_init__(self) -> None:
        if not self.problems:
            raise ValueError(f"{self.path} has no lines: there is no problem")

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def name(self) -> str:
        """A text that names the file, its contents (by a digest), the fields and the grader."""
        digest = hashlib.sha256(Path(self.path).read_bytes()).hexdigest()[:12]
        fields = [self.question, self.answer, self.options]
        return f"jsonl {Path(self.path).name} {digest} {fields} {self.grader} options {self.shuffle_seed}"

    def sample(self, seed: int) -> Problem:
        """Return the problem of a line.

        Args:
            seed: number of the line, counted from 0.

        Raises:
            IndexError: there is no such line.
        """
        if not 0 <= seed < len(self):
            raise IndexError(
                f"{self.path} has problems 0..{len(self) - 1}, not {seed}: ask for fewer, from a lower seed"
            )
        return self.problems[seed]

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """All problems, in the order of the lines."""
        return problems_of(read_jsonl(self.path, self._fields), self.grader, self.shuffle_seed)

    def _fields(self, line: dict[str, object]) -> Fields:
        return Fields(line[self.question], line[self.answer], line.get(self.options))


class Fields(NamedTuple):
    """The fields of a problem as a file has them, before any check."""

    question: object
    answer: object
    options: object = None


def read_jsonl(path: str | Path, fields_of: Callable[[dict[str, object]], Fields]) -> Iterator[tuple[str, Fields]]:
    """Yield the fields of every line of a file that is not empty, with the place of the line in words.

    Args:
        path: the file.
        fields_of: function that takes the fields from the JSON object of a line.

    Raises:
        ValueError: a line that is no JSON object, or lacks a field.
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.split("\n")):  # not at the other line ends that a JSON text may hold
        if line.strip():
            place = f"{path}, line {number + 1}"
            try:
                yield place, fields_of(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"there is no field {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"{place}: {what}") from error


def problems_of(
    records: Iterable[tuple[str, Fields]], grader: Grader, shuffle_seed: int | None = None
) -> tuple[Problem, ...]:
    """Make problems of fields; where there are options, a choice among them.

    Args:
        records: the fields of each problem, with their place in words.
        grader: grader of problems without options.
        shuffle_seed: seed of the order of options; None keeps the order.

    Raises:
        ValueError: fields that make no problem; the message names the place, and what is wrong.
    """
    problems: list[Problem] = []
    for place, fields in records:
        try:
            problems.append(_problem(fields, len(problems), grader, shuffle_seed))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return tuple(problems)


def _problem(fields: Fields, number: int, grader: Grader, shuffle_seed: int | None) -> Problem:
    """Make a problem of fields; its number makes the order of its options its own."""
    for name, value in (("question", fields.question), ("answer", fields.answer)):
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"{name}={value!r} is no text or number")
    question, answer = str(fields.question), str(fields.answer)
    if fields.options is None:
        return Problem(f"{question}\n{INSTRUCTIONS[grader]}", answer, grader)
    options = [str(option) for option in fields.options] if isinstance(fields.options, list) else []
    if not 2 <= len(options) <= MOST_OPTIONS or len(set(options)) < len(options) or answer not in options:
        raise ValueError(
            f"options={fields.options!r} must be a list of 2..{MOST_OPTIONS} different texts, the answer {answer!r} one"
        )
    if shuffle_seed is not None:
        random.Random(f"{shuffle_seed} {number}").shuffle(options)
    lines = [f"{letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    text = "\n".join([question, *lines, INSTRUCTIONS["choice"]])
    return Problem(text, ascii_uppercase[options.index(answer)], "choice")
