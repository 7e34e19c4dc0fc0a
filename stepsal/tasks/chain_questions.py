"""Tell questions of the chain task from others, which the embedded reasoner answers with nonsense."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from stepsal.tasks.chain import EXAMPLE, MAX_VALUE, NAMES, Definition, Operand, Problem

_DEFINITION = re.compile(r"(\w+) is (\w+) (plus|minus) (\w+)\.")
_QUESTION = re.compile(r"((?:\w+ is \w+ (?:plus|minus) \w+\. )+)What is (\w+)\?")


def parse_question(question: str) -> Problem:
    """Read a question of the chain task, however many definitions it has.

    Args:
        question: the text.

    Returns:
        The problem; its length is the number of definitions that the goal needs, and its seed is -1.

    Raises:
        ValueError: the text is no question of the task; the message says why.

    Example:
        >>> from stepsal.tasks.chain_questions import parse_question
        >>> parse_question("Hugo is 4 plus 3. Anna is Hugo plus 9. What is Anna?").reference
        '16'
        >>> parse_question("What is 3 plus 4?")
        Traceback (most recent call last):
        ValueError: it does not define names and ask for one of them
    """
    match = _QUESTION.fullmatch(" ".join(question.split()))
    if match is None:
        raise ValueError("it does not define names and ask for one of them")
    definitions = tuple(
        Definition(name, _operand(left), "plus" if op == "plus" else "minus", _operand(right))
        for name, left, op, right in _DEFINITION.findall(match[1])
    )
    return Problem(definitions, match[2], len(_needed(definitions, match[2])), seed=-1)


def _operand(word: str) -> Operand:
    return int(word) if word.isdecimal() else word


def _needed(definitions: Sequence[Definition], goal: str) -> set[str]:
    """Return the names that a goal needs, its own included, after a check that they lead to a value.

    Raises:
        ValueError: a name that the task does not have, is defined twice, never, or by itself; a value out of range.
    """
    by_name = {definition.name: definition for definition in definitions}
    mentioned = {goal, *by_name, *(name for definition in definitions for name in definition.needs)}
    if unknown := sorted(mentioned - set(NAMES)):
        raise ValueError(f"{unknown[0]} is no name that the task has, as are {', '.join(NAMES[:3])}, ...")
    if len(by_name) < len(definitions):
        raise ValueError("a name is defined twice")
    if undefined := sorted(mentioned - by_name.keys()):
        raise ValueError(f"{undefined[0]} is not defined")
    _check_values(by_name)
    needed, pending = set(), [goal]
    while pending:
        needed.add(name := pending.pop())
        pending += by_name[name].needs
    return needed


def _check_values(by_name: dict[str, Definition]) -> None:
    """Check that every name has a value in range."""
    values: dict[str, int] = {}
    while pending := [name for name in by_name if name not in values]:
        ready = [name for name in pending if all(x in values for x in by_name[name].needs)]
        if not ready:
            raise ValueError(f"{pending[0]} is defined by itself")
        for name in ready:
            definition = by_name[name]
            left, right = (values[x] if isinstance(x, str) else x for x in (definition.left, definition.right))
            values[name] = left + right if definition.op == "plus" else left - right
            if outside := [x for x in (left, right, values[name]) if not 0 <= x <= MAX_VALUE]:
                raise ValueError(f"{outside[0]} is outside 0..{MAX_VALUE}")


def warn_of_other_questions(questions: Sequence[str], *, stacklevel: int = 2) -> None:
    """Warn once if questions are not of the chain task, the only one that the embedded reasoner knows.

    Args:
        questions: what it is asked.
        stacklevel: whose call the warning names, as for `warnings.warn`.
    """
    reasons = {}
    for question in questions:
        try:
            parse_question(question)
        except ValueError as error:
            reasons[question] = error
    if reasons:
        question, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        warnings.warn(
            f'"mini" knows chains of definitions alone, and answers all else with nonsense. {question[:80]!r}{more} is '
            f"no such question: {reason}. Ask {EXAMPLE!r}, draw one by stepsal.tasks.chain.sample(seed), or load "
            'another model, such as "smollm2"',
            stacklevel=stacklevel,
        )
