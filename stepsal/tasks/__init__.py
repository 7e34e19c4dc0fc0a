"""Problems that can be graded.

A *task* has a `name`, which says all that makes its problems what they are, and gives the problem of a seed by
`sample(seed)`. A *problem* has a `question`, a `reference` answer, and grades traces. Any object that does so can be
collected and evaluated.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from stepsal.tasks import chain

if TYPE_CHECKING:
    from stepsal.tasks import answers, gym, hub, jsonl, parts
    from stepsal.trace import Trace

__all__ = ["Problem", "Task", "Verdict", "answers", "chain", "gym", "hub", "jsonl", "parts"]


class Verdict(Protocol):
    """What grading found; a task that knows more may have more, such as the kind of the first `error`."""

    @property
    def correct(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class Problem(Protocol):
    """A question with its answer, and the judge of answers."""

    @property
    def question(self) -> str: ...
    @property
    def reference(self) -> str: ...
    def grade(self, trace: Trace) -> Verdict: ...


class Task(Protocol):
    """Where problems come from."""

    @property
    def name(self) -> str: ...
    def sample(self, seed: int) -> Problem: ...


def __getattr__(name: str) -> Any:
    if name in ("answers", "gym", "hub", "jsonl", "parts"):  # on first use: what they need is optional
        return import_module(f"stepsal.tasks.{name}")
    raise AttributeError(f"module 'stepsal.tasks' has no attribute {name!r}")
