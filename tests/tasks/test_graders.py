"""The table of answers: each is graded as it says, and equals no other reference than it says."""

from __future__ import annotations

import pytest
from table_of_answers import EQUAL, TABLE, Row

from stepsal.tasks.answers import Grader, Problem, compare_answer, read_answer
from stepsal.tasks.mathematics import Expression


def equals(grader: str, reference: str) -> set[str]:
    return {reference}.union(*(others for others in EQUAL[grader] if reference in others))


@pytest.mark.parametrize(("grader", "row"), [(grader, row) for grader, rows in TABLE.items() for row in rows])
def test_each_answer_is_graded_as_the_table_says(grader: Grader, row: Row) -> None:
    verdict = Problem("?", row.reference, grader).grade(row.text)
    assert verdict.correct is row.right, verdict
    assert (verdict.error is None) is row.right


@pytest.mark.parametrize("grader", ["number", pytest.param("math", marks=pytest.mark.slow), "choice"])
def test_nothing_but_equals_passes(grader: Grader) -> None:
    rows = TABLE[grader]
    references = {row.reference: None for row in rows} | {row.states: None for row in rows if row.states}
    names = tuple(references | {other: None for others in EQUAL[grader] for other in others})
    passed: dict[object, set[str]] = {}
    for row in rows:
        stated = read_answer(row.text.removesuffix("<|im_end|>"), grader)
        if stated not in passed:
            same = stated.compare_all(names).same if isinstance(stated, Expression) else [
                compare_answer(stated, name).same for name in names
            ]  # fmt: skip
            passed[stated] = {name for name, is_same in zip(names, same, strict=True) if is_same}
        reference = row.reference if row.right else row.states
        assert passed[stated] == (equals(grader, reference) if reference else set()), row
    assert len(names) >= 4


def test_the_table_is_large_and_repeats_nothing() -> None:
    for rows in TABLE.values():
        assert len({(row.text, row.reference) for row in rows}) == len(rows) >= 80
