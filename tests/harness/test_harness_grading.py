"""The scorer `graded`: verdicts become scores, and a comparison that takes long keeps no other sample waiting."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ContentReasoning, ContentText, ModelOutput
from inspect_ai.scorer import Score, Target
from inspect_ai.solver import TaskState

from stepsal.harness import graded
from stepsal.tasks import math_process


def scored(text: str, target: str, stop_reason: Any = "stop", **metadata: Any) -> Any:
    content = [ContentReasoning(reasoning=r"Perhaps \boxed{5}."), ContentText(text=text)]
    message = ChatMessageAssistant(content=content)
    output = ModelOutput(model="m", choices=[ChatCompletionChoice(message=message, stop_reason=stop_reason)])
    state = TaskState(
        model="m", sample_id=1, epoch=1, input="Which?\nA) 2\nB) 3", messages=[], output=output, metadata=metadata
    )  # fmt: skip
    return graded()(state, Target(target))


@pytest.mark.parametrize(
    ("text", "target", "metadata", "value", "answer", "error"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", {}, "C", "1/2", None),
        (r"\boxed{0.25}", r"\frac{1}{2}", {"grader": "math"}, "I", "1/4", "wrong answer"),
        ("So 2 + 3 = 5.", "5", {"grader": "number"}, "C", "5", None),
        ("Therefore, B.", "B", {"grader": "choice"}, "C", "B", None),
        ("Therefore, C.", "B", {"grader": "choice"}, "I", None, "no answer"),
        ("I do not know.", "5", {}, "I", None, "no answer"),  # what the thinking says is no answer
    ],
)
def test_verdicts_become_scores(
    text: str, target: str, metadata: dict[str, str], value: str, answer: str | None, error: str | None
) -> None:
    score = asyncio.run(scored(text, target, **metadata))
    assert (score.value, score.metadata["error"]) == (value, error)
    if target != r"\frac{1}{2}":
        assert score.answer == answer


@pytest.mark.parametrize("stop_reason", ["max_tokens", "model_length"])
def test_what_was_cut_off_scores_nothing(stop_reason: str) -> None:
    score = asyncio.run(scored(r"\boxed{5}", "5", stop_reason))
    assert (score.value, score.metadata["error"]) == ("I", "truncated")


def test_a_long_comparison_keeps_no_other_sample_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = math_process._CHILD.compare

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return compare(*args, **options)

    async def both() -> tuple[Score, int]:
        scoring = asyncio.ensure_future(scored(r"\boxed{\frac{10}{2}}", "5"))
        n_turns = 0
        while not scoring.done():
            await asyncio.sleep(0.01)
            n_turns += 1
        return await scoring, n_turns

    monkeypatch.setattr(math_process._CHILD, "compare", slow)
    score, n_turns = asyncio.run(both())
    assert score.value == "C"
    assert n_turns >= 10
