"""Parts of a task, such as one to choose by and one to report on: no question is in two of them.

A question's digest decides which part it belongs to. Where the task has a length, all its questions are ranked by
their digests and divided at the shares; otherwise a digest is a number in 0..1, and the shares hold on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, cast

from stepsal.storage import digest

if TYPE_CHECKING:
    from collections.abc import Sized

    from stepsal.tasks import Problem, Task

MOST_IN_VAIN = 1000  # problems of other parts in a row until a part counts as empty


class Part:
    """Problems of a task whose questions lie between two shares; a task itself.

    Attributes:
        name: of the task, the part, and the seed.
        n_problems: where the task has a length: how many there are; they come again after the last.

    Raises:
        ValueError: shares out of order, or a task with a length that has no problem here. When sampled: a task that has
            none among a thousand.
    """

    def __init__(self, task: Task, low: float, high: float, seed: int = 0) -> None:
        """The part of the questions between the shares `low` and `high`, divided by `seed`.

        A task without a length is read from problem `seed` on.
        """
        if not 0 <= low < high <= 1:
            raise ValueError(f"low={low} and high={high} must be shares with 0 <= low < high <= 1")
        self.name = f"{task.name}, questions {low:g}..{high:g} by seed {seed}"
        self.n_problems: int | None = None
        self._task, self._low, self._high, self._seed = task, low, high, seed
        self._found: list[Problem] = []
        self._more = self._stream()
        if hasattr(task, "__len__"):
            problems = [task.sample(i) for i in range(len(cast("Sized", task)))]
            keys = sorted({self._key(problem) for problem in problems})
            inside = set(keys[round(low * len(keys)) : round(high * len(keys))])
            self._found = [problem for problem in problems if self._key(problem) in inside]
            self.n_problems = len(self._found)
            if not self._found:
                raise ValueError(f"{task.name} has {len(keys)} questions: none between the shares {low:g} and {high:g}")

    def sample(self, seed: int) -> Problem:
        """Problem `seed` of the part, counted from 0."""
        if self.n_problems is not None:
            return self._found[seed % self.n_problems]
        while len(self._found) <= seed:
            self._found.append(next(self._more))
        return self._found[seed]

    def _stream(self) -> Iterator[Problem]:
        in_vain = 0
        for i in count(self._seed):
            problem = self._task.sample(i)
            in_vain += 1
            if self._low <= int(self._key(problem), 16) / 16**16 < self._high:
                yield problem
                in_vain = 0
            elif in_vain == MOST_IN_VAIN:
                raise ValueError(
                    f"none of {in_vain} problems of {self._task.name} lies between the shares {self._low:g} and "
                    f"{self._high:g}: it has too few questions"
                )

    def _key(self, problem: Problem) -> str:
        return digest(f"{self._seed} {problem.question}".encode())
