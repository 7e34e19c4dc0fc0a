"""Questions with short answers: the reference is what the question says, whatever is drawn."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsal.tasks.probes import WORDINGS
from stepsal.tasks.short_answers import SHORT_ANSWERS, ShortTask


@given(st.integers(0, 10**6), st.sampled_from(WORDINGS))
def test_the_fact_that_is_asked_for_is_told(seed: int, wording: str) -> None:
    problem = ShortTask("recall", wording).sample(seed)
    *facts, ask, _ = re.split(r"(?<=[.?]) ", problem.question)
    names = [re.search(r"the village of (\w+)|The (\w+) box", fact) for fact in facts]
    asked = [fact for fact, name in zip(facts, names, strict=True) if re.search(rf"\b{name[1] or name[2]}\b", ask)]
    assert len(facts) == 6
    assert len(asked) == 1  # of all facts
    assert [problem.grade(fact).correct for fact in facts] == [fact == asked[0] for fact in facts]


@given(st.integers(0, 10**6), st.sampled_from(WORDINGS))
def test_the_sum_of_a_story_is_right(seed: int, wording: str) -> None:
    problem = ShortTask("stories", wording).sample(seed)
    first, change = map(int, re.findall(r"\d+", problem.question))
    gets = re.search("buys|A friend gives|finds|delivered|brings", problem.question)
    assert int(problem.reference) == (first + change if gets else first - change)
    assert problem.grade(f"So there are {problem.reference} now.").correct
    assert not problem.grade(f"So there are {first}.").correct


@pytest.mark.parametrize("kind", SHORT_ANSWERS)
def test_a_seed_is_a_problem(kind: str) -> None:
    task = ShortTask(kind)
    assert task.sample(3) == task.sample(3) != task.sample(4)
    assert task.name != ShortTask(kind, "villages").name
    questions = {task.sample(seed).question for seed in range(300)}
    assert len(questions) > 250


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind='poems' is unknown; use 'recall' or 'stories'"):
        ShortTask("poems")
    with pytest.raises(ValueError, match="wording='ships' is unknown"):
        ShortTask("recall", "ships")
