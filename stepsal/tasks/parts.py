"""Divide a task into parts that share no question, such as one to choose by and one to report on.

The digest of a question decides which part it belongs to. If the task has a length, all its questions are ranked by
their digests and divided at the shares. Otherwise a digest counts as a number in 0..1, and the shares hold on average.
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
    """The problems of a task whose questions lie between two shares; itself a task.

    Args:
        task: task to divide; one without a length is read from problem `seed` on.
        low: share of the questions that lie before the part, in 0..1.
        high: share of the questions that lie before the end of the part.
        seed: seed of the order in which questions are divided.

    Attributes:
        name: names the task, the part, and the seed.
        n_problems: number of problems if the task has a length, else None; after the last, the first comes again.

    Raises:
        ValueError: shares out of order, or a task with a length that has no problem in the part. For a task without a
            length, `sample` raises it where none of a thousand problems in a row lies in the part.

    Example:
        >>> from stepsal.tasks.parts import Part
        >>> task = stepsal.tasks.chain.ChainTask(length=2)
        >>> first, second = Part(task, 0.0, 0.5), Part(task, 0.5, 1.0)
        >>> {first.sample(i).question for i in range(9)} & {second.sample(i).question for i in range(9)}
        set()
    """

    def __init__(self, task: Task, low: float, high: float, seed: int = 0) -> None:
        if not 0 <= low < high <= 1:
            raise ValueError(f"low={low} and high={high} must be shares with 0 <= low < high <= 1")
        self.name = f"{task.name}, questions {low:g}..{high:g} by seed {seed}"
        self.n_problems: int | None = None
        self._task, self._low, self._high, self._seed = task, low, high, seed
        self._problems: list[Problem] = []
        self._more = self._stream()
        if hasattr(task, "__len__"):
            problems = [task.sample(i) for i in range(len(cast("Sized", task)))]
            keys = sorted({self._key(problem) for problem in problems})
            inside = set(keys[round(low * len(keys)) : round(high * len(keys))])
            self._problems = [problem for problem in problems if self._key(problem) in inside]
            self.n_problems = len(self._problems)
            if not self._problems:
                raise ValueError(f"{task.name} has {len(keys)} questions: none between the shares {low:g} and {high:g}")

    def sample(self, seed: int) -> Problem:
        """Return a problem of the part.

        Args:
            seed: number of the problem, counted from 0.
        """
        if self.n_problems is not None:
            return self._problems[seed % self.n_problems]
        while len(self._problems) <= seed:
            self._problems.append(next(self._more))
        return self._problems[seed]

    def _stream(self) -> Iterator[Problem]:
        """Yield the problems of the part of a task without a length."""
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
        """Return the digest by which a problem is divided."""
        return digest(f"{self._seed} {problem.question}".encode())
