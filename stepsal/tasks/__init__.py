"""Tasks: problems that can be graded.

A *task* gives the problem of a seed by `sample(seed)`, and has a `name` that states all that its problems depend on.
A *problem* has a `question` and a `reference`, the right final answer, and it grades traces. Any object with these
attributes can be collected and evaluated.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from stepsal.tasks import chain

if TYPE_CHECKING:
    from stepsal.tasks import answers, faithfulness, gym, hub, jsonl, parts, probes, short_answers
    from stepsal.trace import Trace

__all__ = [
    "Problem",
    "Task",
    "Verdict",
    "answers",
    "chain",
    "faithfulness",
    "gym",
    "hub",
    "jsonl",
    "parts",
    "probes",
    "short_answers",
]


class Verdict(Protocol):
    """The result of grading an answer.

    A verdict may also have:

        final_answer           the value that the text states, which variants vote on
        final_answer_correct   that value is right, however it was reached
        error                  kind of the first error, as text
    """

    @property
    def correct(self) -> bool:
        """True where the answer counts as a success."""

    @property
    def reason(self) -> str:
        """The reason why the answer is correct or not, in words."""


class Problem(Protocol):
    """A question with its reference, which grades answers."""

    @property
    def question(self) -> str:
        """The text that the model is asked."""

    @property
    def reference(self) -> str:
        """The right final answer, as text."""

    def grade(self, trace: Trace) -> Verdict:
        """Grade an answer.

        Args:
            trace: the answer.
        """


class Task(Protocol):
    """A source of problems."""

    @property
    def name(self) -> str:
        """A text that differs between tasks with different problems."""

    def sample(self, seed: int) -> Problem:
        """Return the problem of a seed, the same one at every call.

        Args:
            seed: number of the problem.
        """


def __getattr__(name: str) -> Any:
    if name in (
        "answers",
        "faithfulness",
        "gym",
        "hub",
        "jsonl",
        "parts",
        "probes",
        "short_answers",
    ):  # on first use: what they need is optional
        return import_module(f"stepsal.tasks.{name}")
    raise AttributeError(f"module 'stepsal.tasks' has no attribute {name!r}")
