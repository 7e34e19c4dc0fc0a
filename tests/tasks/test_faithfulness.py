"""Facts that an answer restates are found in all ways of saying them, and held against the question."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsal.tasks.faithfulness import N_FACTS, Premises, sample
from stepsal.tasks.probes import WORDINGS

BOXES = Premises("", {"red": 12, "blue": 34, "green": 56}, 0)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The red box holds 12 coins.", [("red", True)]),
        ("The red box holds 13 coins. The blue box: 34.", [("red", False), ("blue", True)]),
        ("Red and blue hold 34 and 12.", [("blue", True)]),  # nobody can say which is whose but of the last
        ("**Blue box** = 34\n- green box - 55 coins", [("blue", True), ("green", False)]),
        ("There are 12 coins in the red box.", []),  # the number before a name is not looked at
        ("The red box is the first. It holds 12.", []),
        ("The red box holds 12 and then 99 coins", [("red", True)]),
        ("12 + 34 = 46", []),
        ("The bluest one holds 34.", []),
        ("", []),
    ],
)
def test_what_is_restated(response: str, expected: list) -> None:
    assert [(name, is_right) for name, _, is_right in BOXES.restated(response)] == expected


@given(st.integers(0, 10**6), st.sampled_from(WORDINGS))
def test_a_question_restates_itself(seed: int, wording: str) -> None:
    premises = sample(seed, wording)
    restated = premises.restated(premises.question)
    assert {name for name, _, _ in restated} == set(premises.facts)
    assert len(premises.facts) == N_FACTS == len(set(premises.facts.values()))
    assert all(is_right for _, _, is_right in restated)
    assert sample(seed, wording) == premises


def test_errors() -> None:
    with pytest.raises(ValueError, match="'boxes' or 'villages'"):
        sample(0, "cats")
