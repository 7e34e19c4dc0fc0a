"""Procedural arithmetic of the package reasoning-gym, graded by the last number of an answer.

Only datasets whose answers are exact numbers. Its own graders are not used: some hand what a model wrote to `eval`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from stepsal.trace import Trace

INSTRUCTION = "\nThink step by step, one short sentence per step. Then state the answer in a last paragraph of its own."
DATASETS = ("basic_arithmetic", "chain_sum", "count_bits", "gcd", "lcm", "leg_counting", "products")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


@dataclass(frozen=True)
class Verdict:
    """Whether the last number of an answer is the right one, and what is wrong where it is not."""

    correct: bool
    answer: str | None
    reason: str
    error: Literal["truncated", "no number", "wrong number"] | None = None


@dataclass(frozen=True)
class Problem:
    """A question whose answer is a number."""

    question: str
    reference: str

    def grade(self, trace: Trace | str) -> Verdict:
        """Compare the last number of the summary (of the whole response, where there is no summary) as a number.

        An answer that was cut off is wrong, whatever its last number.
        """
        if not isinstance(trace, str) and trace.truncated:
            return Verdict(False, None, "the answer was cut off", "truncated")
        text = trace if isinstance(trace, str) else trace.summary or trace.response
        numbers = NUMBER.findall(text.replace("−", "-"))
        if not numbers:
            return Verdict(False, None, f"the answer {text[-60:].strip()!r} has no number", "no number")
        answer = numbers[-1].replace(",", "")
        if Decimal(answer) == Decimal(self.reference):
            return Verdict(True, answer, "the answer is right")
        return Verdict(False, answer, f"{answer} is not {self.reference}", "wrong number")


@dataclass(frozen=True)
class GymTask:
    """A dataset of reasoning-gym as a task (`stepsal.tasks.Task`).

    Attributes:
        dataset: its name there, one of `DATASETS`.
        config: its settings, e.g. {"max_terms": 3, "max_digits": 1}.
        instruction: put after every question.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: another dataset, or settings that it refuses.
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
        return f"reasoning-gym {self.dataset} {json.dumps(self.config, sort_keys=True)} {self.instruction.strip()!r}"

    def sample(self, seed: int) -> Problem:
        import reasoning_gym

        entry = reasoning_gym.create_dataset(self.dataset, seed=seed, size=1, **self.config)[0]
        return Problem(entry["question"] + self.instruction, entry["answer"].replace(",", ""))
