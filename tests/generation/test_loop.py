"""The decoding loop and its books: what each row writes, what ends it, and which rows go on."""

from __future__ import annotations

import pytest
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.generation.loop import Answers, check_prompt, write
from stepsal.tasks import chain
from stepsal.trace import render_prompt


@pytest.fixture(scope="module")
def prompt(mini: TransformerBridge) -> list[int]:
    question = chain.sample(2, length=3).question
    return mini.tokenizer(render_prompt(mini.tokenizer, question).text)["input_ids"]


class TestAnswers:
    def test_rows_leave_when_they_are_done(self) -> None:
        answers = Answers(limits=[4, 2, 4], rooms=[9, 9, 9], ends={0})
        assert answers.push([5, 6, 7]) == ([5, 6, 7], [0, 1, 2])
        assert answers.push([0, 6, 7]) == ([0, 6, 7], [2])
        assert answers.running == [2]
        assert answers.push([8]) == ([8], [0])
        assert answers.push([9]) == ([9], [])
        assert answers.written() == [([5, 0], "end"), ([6, 6], "limit"), ([7, 7, 8, 9], "limit")]

    def test_the_context_is_told_from_the_limit(self) -> None:
        answers = Answers(limits=[1, 1], rooms=[1, 2], ends=set())
        assert answers.push([5, 5]) == ([5, 5], [])
        assert [ended for _, ended in answers.written()] == ["context", "limit"]

    def test_a_row_that_nobody_asks_for_ends(self) -> None:
        calls = []
        answers = Answers([9, 9], [20, 20], {0}, still_asked=lambda row: calls.append(row) or row == 1)
        assert answers.push([5, 6]) == ([5, 6], [1])
        assert answers.push([0]) == ([0], [])  # ended by itself: nobody is asked
        assert calls == [0, 1]
        assert answers.written() == [([5], "limit"), ([6, 0], "end")]


def test_what_ended_a_row(mini: TransformerBridge, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(limit: int = 400, stop: tuple[str, ...] = ()) -> str:
        decoding = stepsal.Decoding(max_new_tokens=limit, stop=stop)
        return write(mini, [prompt], decoding=decoding, seeds=[0])[0].ended

    assert (ended(), ended(limit=5), ended(stop=("so",))) == ("end", "limit", "stop")
    monkeypatch.setattr(mini.cfg, "n_ctx", len(prompt) + 7)
    assert ended() == "context"


def test_a_limit_of_each_row_overrides_that_of_all(mini: TransformerBridge, prompt: list[int]) -> None:
    decoding = stepsal.Decoding(max_new_tokens=1)
    rows = write(mini, [prompt] * 3, decoding=decoding, max_new_tokens=[3, 7, 5], seeds=[0] * 3)
    assert [len(row.tokens) for row in rows] == [3, 7, 5]
    assert rows[0].tokens == rows[1].tokens[:3]
    assert rows[2].tokens == rows[1].tokens[:5]
    assert [len(row.tokens) for row in write(mini, [prompt] * 2, decoding=decoding, seeds=[0] * 2)] == [1, 1]


def test_a_row_that_is_asked_for_no_more_leaves_the_others_alone(mini: TransformerBridge, prompt: list[int]) -> None:
    decoding = stepsal.Decoding(max_new_tokens=12, temperature=1.0)
    whole = write(mini, [prompt] * 2, decoding=decoding, seeds=[1, 2])
    n_calls = [0, 0]

    def still_asked(row: int) -> bool:
        n_calls[row] += 1
        return row == 1 or n_calls[row] < 4

    first, second = write(mini, [prompt] * 2, decoding=decoding, seeds=[1, 2], still_asked=still_asked)
    assert first == (whole[0].tokens[:4], "limit")
    assert second == whole[1]


def test_prompts_without_room(mini: TransformerBridge) -> None:
    check_prompt(mini, [1] * (mini.cfg.n_ctx - 1))
    for n in (0, mini.cfg.n_ctx):
        with pytest.raises(ValueError, match=f"a prompt of {n} tokens leaves no room"):
            check_prompt(mini, [1] * n)
