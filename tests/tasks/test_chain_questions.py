"""Questions of the chain task are told from others, and "mini" warns of others."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.tasks import chain
from stepsal.tasks.chain_questions import parse_question
from stepsal.tasks.jsonl import JsonlTask


@given(st.integers(0, 10**9), st.integers(1, chain.MAX_LENGTH))
def test_every_problem_is_read_from_its_question(seed: int, length: int) -> None:
    problem = chain.sample(seed, length=length)
    parsed = parse_question(problem.question)
    assert (parsed.definitions, parsed.goal, parsed.length) == (problem.definitions, problem.goal, length)
    assert parsed.reference == problem.reference


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What is 3 plus 4?", "does not define names"),
        ("Anna is 3. What is Anna?", "does not define names"),
        ("Anna is 3 plus 4. Who is Anna?", "does not define names"),
        ("Anna is 3 times 4. What is Anna?", "does not define names"),
        ("Otto is 3 plus 4. What is Otto?", "Otto is no name"),
        ("Anna is 3 plus 4. What is Bert?", "Bert is not defined"),
        ("Anna is Bert plus 4. What is Anna?", "Bert is not defined"),
        ("Anna is Bert plus 4. Bert is Anna minus 4. What is Anna?", "Anna is defined by itself"),
        ("Anna is 3 plus 4. Anna is 3 plus 5. What is Anna?", "defined twice"),
        ("Anna is 3 minus 4. What is Anna?", "-1 is outside 0..30"),
        ("Anna is 40 minus 30. What is Anna?", "40 is outside 0..30"),
    ],
)
def test_other_questions_are_told_with_the_reason(question: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_question(question)


def test_the_example_is_one() -> None:
    assert parse_question(chain.EXAMPLE).reference == "16"


class TestMini:
    """Tests of the warning of the embedded reasoner."""

    def test_a_question_of_its_task_passes(self, mini: TransformerBridge) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stepsal.generate(mini, chain.EXAMPLE, max_new_tokens=2)

    def test_another_one_is_answered_with_a_warning(self, mini: TransformerBridge) -> None:
        with pytest.warns(UserWarning, match=r"'What is 3 plus 4\?' is no such question.*Ask 'Hugo is 4") as record:
            stepsal.generate(mini, "What is 3 plus 4?", max_new_tokens=2)
        assert [warning.filename for warning in record] == [__file__]  # the caller's line

    def test_a_batch_warns_once(self, mini: TransformerBridge) -> None:
        questions = ["What is 3 plus 4?", chain.EXAMPLE, "Who is Anna?"]
        with pytest.warns(UserWarning, match=r"\(and 1 more\)") as record:
            stepsal.generate_batch(mini, questions, max_new_tokens=2)
        assert len(record) == 1

    def test_runs_over_another_task_warn_before_they_begin(self, mini: TransformerBridge, tmp_path: Path) -> None:
        (tmp_path / "sums.jsonl").write_text('{"question": "What is 3 plus 4?", "answer": 7}')
        task = JsonlTask(tmp_path / "sums.jsonl", grader="number")
        options = {"decoding": stepsal.Decoding(max_new_tokens=2), "progress": False}
        for run in (
            lambda: stepsal.evaluate(mini, task, [stepsal.Variant("plain")], 1, folder=tmp_path / "e", **options),
            lambda: stepsal.collect(mini, task, 1, tmp_path / "c", **options),
        ):
            with pytest.warns(UserWarning, match=r"'What is 3 plus 4\?.* is no such question") as record:
                run()
            assert [warning.filename for warning in record] == [__file__]

    def test_other_models_are_asked_what_one_likes(self, mini: TransformerBridge) -> None:
        name = mini.cfg.model_name
        try:
            mini.cfg.model_name = "mine"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                stepsal.generate(mini, "What is 3 plus 4?", max_new_tokens=2)
        finally:
            mini.cfg.model_name = name
