"""Procedural problems: the same seed gives the same one, and answers are graded by their last number."""

from __future__ import annotations

import pytest

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'stepsal[gym]'")

from stepsal.tasks.answers import Problem
from stepsal.tasks.gym import DATASETS, GymTask
from stepsal.tasks.numbers import whole_number


def test_a_seed_gives_a_problem_whose_answer_grades_as_right() -> None:
    for task in (GymTask("chain_sum", {"max_terms": 3, "max_digits": 2}), *map(GymTask, DATASETS)):
        problems = [task.sample(seed) for seed in range(20)]
        assert problems == [task.sample(seed) for seed in range(20)]
        assert len({p.question for p in problems}) > 15
        for problem in problems:
            assert whole_number(problem.reference) is not None
            assert problem.question.endswith(task.instruction)
            assert problem.grade(f"First this.\n\nThe answer is {problem.reference}.").correct
            assert not problem.grade(f"The answer is {problem.reference}1.").correct
    assert task.name != GymTask("leg_counting", {"max_animals": 4}).name


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("We get 3 + 4 = 7.", True),
        ("7 apples, so **7.0**", True),
        ("The total is 1,007", False),
        ("It is −7", False),
        ("It is 7, not 8", False),
        ("seven", False),
        ("The result: 007", True),
    ],
)
def test_the_last_number_counts(text: str, correct: bool) -> None:
    verdict = Problem("?", "7", "number").grade(text)
    assert verdict.correct is correct
    assert verdict.reason
    wrong = "no number" if text == "seven" else "wrong number"
    assert verdict.error == (None if correct else wrong)


def test_what_cannot_be_graded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"simple_integration.*chain_sum"):
        GymTask("simple_integration")
    with pytest.raises(ValueError, match="max_digit"):
        GymTask("chain_sum", {"max_digit": 3})
