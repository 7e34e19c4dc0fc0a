"""Arithmetic problems drawn by the package reasoning-gym, graded by the last number of an answer.

Only its datasets with exact numbers as answers can be used. Its own graders are not used, since some of them pass what
a model wrote to `eval`.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from typing import Any

from stepsal.tasks.answers import Problem

INSTRUCTION = "\nThink step by step, one short sentence per step. Then state the answer in a last paragraph of its own."
DATASETS = ("basic_arithmetic", "chain_sum", "count_bits", "gcd", "lcm", "leg_counting", "products")


@dataclass(frozen=True)
class GymTask:
    """A dataset of reasoning-gym as a task (`stepsal.tasks.Task`).

    Attributes:
        dataset: one of `DATASETS`, by its name in reasoning-gym.
        config: settings of the dataset, such as {"max_terms": 3, "max_digits": 1}.
        instruction: text put after every question.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: a dataset that is not in `DATASETS`, or settings that it refuses.

    Example:
        >>> stepsal.tasks.gym.GymTask("chain_sum", {"max_terms": 2}).sample(0).grader
        'number'
    """

    dataset: str
    config: dict[str, Any] = field(default_factory=dict)
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset={self.dataset!r} is not graded here; use one of {', '.join(DATASETS)}")
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError("procedural tasks need pip install 'stepsal[gym]'")
        try:
            self.sample(0)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"{self.dataset} does not take config={self.config}: {error}") from error

    @property
    def name(self) -> str:
        """A text that names dataset, settings and instruction."""
        return f"reasoning-gym {self.dataset} {json.dumps(self.config, sort_keys=True)} {self.instruction.strip()!r}"

    def sample(self, seed: int) -> Problem:
        """Return the problem of a seed.

        Args:
            seed: seed of the dataset, of which the first entry is taken.
        """
        import reasoning_gym

        entry = reasoning_gym.create_dataset(self.dataset, seed=seed, size=1, **self.config)[0]
        return Problem(entry["question"] + self.instruction, entry["answer"].replace(",", ""), "number")
