"""The chain task: problems are sound, right answers pass, and every kind of error is found where it is."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsal.tasks import chain


@given(st.integers(0, 10**9), st.integers(1, chain.MAX_LENGTH), st.integers(0, 100))
def test_problems_are_sound_and_their_solutions_right(seed: int, length: int, order: int) -> None:
    problem = chain.sample(seed, length=length)
    assert problem == chain.sample(seed, length=length)
    assert set(problem.values) == set(problem.by_name)
    assert all(0 <= value <= chain.MAX_VALUE for value in problem.values.values())
    solution = problem.solution(order)
    assert solution.count(" needs ") == solution.count(", so ") == problem.length == length
    verdict = problem.grade(solution)
    assert verdict.correct
    assert verdict.final_answer_correct
    assert str(verdict.final_answer) == problem.reference


@given(st.integers(0, 10**6), st.integers(2, 6), st.data())
def test_any_changed_word_is_caught_in_its_sentence(seed: int, length: int, data: st.DataObject) -> None:
    problem = chain.sample(seed, length=length)
    solution = problem.solution(seed)
    words = list(re.finditer(r"\w+", solution.partition("</think>")[0]))
    word = words[data.draw(st.integers(0, len(words) - 1))]
    other = data.draw(st.sampled_from([*chain.NAMES, "0", "31", "plus", "minus", "nothing"]))
    changed = solution[: word.start()] + other + solution[word.end() :]
    if changed == solution:
        return
    verdict = problem.grade(changed)
    assert not verdict.correct
    assert verdict.error is not None
    assert verdict.error_sentence >= solution[: word.start()].count(".")


PROBLEM = chain.Problem(
    definitions=(
        chain.Definition("Vera", "Hugo", "minus", 2),
        chain.Definition("Hugo", 4, "plus", 3),
        chain.Definition("Anna", "Hugo", "plus", 9),
    ),
    goal="Anna",
    length=2,
    seed=0,
)
RIGHT = (
    " Anna needs Hugo. Hugo needs nothing. Hugo is 4 plus 3, 4 plus 3, so Hugo = 7. "
    "Anna is Hugo plus 9, 7 plus 9, so Anna = 16.</think> The answer is Anna = 16."
)


def test_the_example_is_right() -> None:
    assert PROBLEM.question == "Vera is Hugo minus 2. Hugo is 4 plus 3. Anna is Hugo plus 9. What is Anna?"
    assert PROBLEM.solution() == RIGHT
    assert PROBLEM.grade("<think>" + RIGHT).correct


@pytest.mark.parametrize(
    ("old", "new", "error", "sentence"),
    [
        ("Anna needs Hugo.", "Anna needs Vera.", "wrong premise", 0),
        ("Hugo is 4 plus 3, 4", "Hugo is 4 minus 3, 4", "wrong premise", 2),
        ("Anna is Hugo plus 9", "Anna is Hugo minus 2", "wrong premise", 3),
        ("7 plus 9, so", "8 plus 9, so", "wrong carry", 3),
        ("7 plus 9, so", "7 minus 9, so", "wrong carry", 3),
        ("so Hugo = 7", "so Hugo = 8", "wrong arithmetic", 2),
        ("so Anna = 16.<", "so Anna = 17.<", "wrong arithmetic", 3),
        (" Hugo needs nothing.", "", "missing step", 1),
        (" Hugo is 4 plus 3, 4 plus 3, so Hugo = 7.", "", "missing step", 2),
        (" Anna is Hugo plus 9, 7 plus 9, so Anna = 16.", "", "missing step", 3),
        ("Anna needs Hugo.", "Anna needs Hugo. Anna needs Hugo.", "repeated step", 1),
        ("Anna is Hugo plus 9, ", "Hugo is 4 plus 3, 4 plus 3, so Hugo = 7. Anna is Hugo plus 9, ", "repeated step", 3),
        ("Anna needs Hugo.", "Vera needs Hugo.", "unneeded step", 0),
        ("Anna = 16.</think>", "Anna = 16. Anna is</think>", "malformed", 4),
        ("Hugo needs nothing", "Hugo wants nothing", "malformed", 1),
        ("answer is Anna = 16", "answer is Anna = 15", "wrong summary", 4),
        ("answer is Anna = 16", "answer is Hugo = 16", "wrong summary", 4),
        ("</think> The answer is Anna = 16.", "", "truncated", 4),
    ],
)
def test_every_kind_of_error_is_found(old: str, new: str, error: str, sentence: int) -> None:
    assert old in RIGHT
    verdict = PROBLEM.grade(RIGHT.replace(old, new, 1))
    assert (verdict.error, verdict.error_sentence) == (error, sentence), verdict.reason
    assert not verdict.correct


def test_a_right_answer_over_a_wrong_chain_is_not_correct() -> None:
    verdict = PROBLEM.grade(RIGHT.replace("so Hugo = 7", "so Hugo = 8"))
    assert verdict.final_answer_correct
    assert not verdict.correct


@pytest.mark.parametrize("length", [0, 13])
def test_length_out_of_range(length: int) -> None:
    with pytest.raises(ValueError, match=rf"length={length} is outside 1\.\.12"):
        chain.sample(0, length=length)
    with pytest.raises(ValueError, match=r"distractors=15 is outside 0\.\.14"):
        chain.sample(0, distractors=15)


@pytest.mark.parametrize(
    ("ending", "correct"),
    [
        ("The answer is Anna = 16.", True),
        ("The answer is Anna = 16.<|endoftext|>", True),
        ("The answer is Anna = 16. The answer is Hugo = 7.", False),
        ("The answer is Anna = 16.5.", False),
        ("The answer is Anna = 016.", False),
    ],
)
def test_the_summary_counts_whole(ending: str, correct: bool) -> None:
    verdict = PROBLEM.grade(RIGHT.partition("</think>")[0] + "</think> " + ending)
    assert verdict.correct == verdict.final_answer_correct == correct
