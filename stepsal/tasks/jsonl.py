"""Problems from a JSONL file: one object per line, with a question, the right answer, and options to choose from.

For example::

    {"question": "What is 3/4 + 1/4?", "answer": "1"}
    {"question": "Which of these is prime?", "options": ["4", "7", "9"], "answer": "7"}
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from stepsal.tasks.answers import Grader, Problem
from stepsal.tasks.choices import MOST_OPTIONS

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
        options: name of the field with a list of options; white space around one is left out.
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
        path: the file, in UTF-8, or in UTF-16 or UTF-32 with the mark at its beginning that says so.
        fields_of: function that takes the fields from the JSON object of a line.

    Raises:
        ValueError: a file in another encoding, or that is one JSON array; a line that is no object, or lacks a field.
    """
    text = text_of(path)
    for number, line in enumerate(text.split("\n")):  # not at the other line ends that a JSON text may hold
        if line.strip():
            place = f"{path}, line {number + 1}"
            try:
                yield place, fields_of(_object(line))
            except KeyError as error:
                raise ValueError(f"{place}: there is no field {error}") from error
            except (ValueError, TypeError, RecursionError) as error:
                if number == 0 and _is_array(text):
                    raise ValueError(
                        f"{path} is one JSON array; a JSONL file has one object per line: jq -c '.[]' writes it so"
                    ) from error
                raise ValueError(f"{place}: {error}") from error


def text_of(path: str | Path) -> str:
    r"""Return the text of a file in UTF-8, or in UTF-16 or UTF-32 where the file begins with a byte order mark.

    Args:
        path: the file.

    Raises:
        ValueError: another encoding; the message names the line and the byte, and how to convert the file.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "latin.jsonl")
        >>> _ = path.write_bytes(b'{"question": "caf\xe9?"}')
        >>> stepsal.tasks.jsonl.text_of(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ...latin.jsonl, line 1: byte 0xe9 (number 18 of the line) is no UTF-8; ...
    """
    data = Path(path).read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        line = data.count(b"\n", 0, start) + 1
        what = f"byte 0x{data[error.start]:02x} (number {error.start - start + 1} of the line) is no {encoding.upper()}"
        raise ValueError(f"{path}, line {line}: {what}; {_CONVERT}") from error
    if "\0" in text:
        raise ValueError(f"{path} holds zero bytes, as in UTF-16 without its byte order mark; {_CONVERT}")
    return text


#: Byte order marks; that of UTF-32 begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONVERT = "convert the file to UTF-8, e.g. by iconv -f ENCODING -t UTF-8 (ENCODING such as LATIN1 or UTF-16LE)"


def _object(line: str) -> dict[str, object]:
    """Return the JSON object of a line."""
    value = json.loads(line)
    if not isinstance(value, dict):
        kind = "array" if isinstance(value, list) else "value"
        raise ValueError(f"a JSON {kind}, {line.strip()[:40]!r}, where a JSON object {{...}} is needed")
    return value


def _is_array(text: str) -> bool:
    """Tell whether a text as a whole is a JSON array of objects."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


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
        if not _is_text(value):
            raise ValueError(f"{name}={value!r} is no text or number")
    question, answer = str(fields.question), str(fields.answer).strip()
    if fields.options is None:
        return Problem(f"{question}\n{INSTRUCTIONS[grader]}", answer, grader)
    if not isinstance(fields.options, list) or not all(map(_is_text, fields.options)):
        raise ValueError(f"options={fields.options!r} must be a list of texts")
    options = [str(option).strip() for option in fields.options]  # white space would tell the option that has it
    if not 2 <= len(options) <= MOST_OPTIONS or answer not in options or "" in options:
        raise ValueError(
            f"options={fields.options!r} must be a list of 2..{MOST_OPTIONS} texts, the answer {answer!r} one of them"
        )
    if equal := [option for i, option in enumerate(options) if option in options[:i]]:
        raise ValueError(f"options must be different, but {equal[0]!r} is there twice (white space around it left out)")
    if shuffle_seed is not None:
        random.Random(f"{shuffle_seed} {number}").shuffle(options)
    lines = [f"{letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    text = "\n".join([question, *lines, INSTRUCTIONS["choice"]])
    return Problem(text, ascii_uppercase[options.index(answer)], "choice")


def _is_text(value: object) -> bool:
    """Tell whether a value of a field is a text or a finite number."""
    return (
        isinstance(value, (str, int, float))
        and not isinstance(value, bool)
        and math.isfinite(0.0 if isinstance(value, str) else value)
    )
