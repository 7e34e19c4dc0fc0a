"""Variants, the arms of an evaluation: how an answer is written, and how many answers vote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from stepsal.generation.decoding import Decoding
from stepsal.intervention.config import StepFlowConfig

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.tasks import Problem

PLAN_AND_SOLVE = (  # PS+ of Wang et al. 2023 (arXiv 2305.04091), Table 5
    "Let's first understand the problem, extract relevant variables and their corresponding numerals, and devise a "
    "complete plan. Then, let's carry out the plan, calculate intermediate variables (pay attention to correct "
    "numerical calculation and commonsense), solve the problem step by step, and show the answer."
)
HINT = "Before each step, look again at what the question says and at the results of your earlier steps."

Edit = Callable[["TransformerBridge", "Problem"], AbstractContextManager[object]]
"""An intervention: a callable (model, problem) -> context manager, entered around the answer to the problem."""


@dataclass(frozen=True)
class Variant:
    """One arm of a comparison on the same problems: how its answers are written, and how many of them vote.

    Variants that differ only in `name` and `votes` share their answers.

    Attributes:
        name: name of the variant in tables.
        stepflow: settings of StepFlow, under which answers are written; None writes them without it.
        instruction: text put after every question, such as `PLAN_AND_SOLVE` or `HINT`.
        edit: another intervention, a callable (model, problem) -> context manager, entered around the answer to each
            problem, which is then answered alone. A folder knows an edit by the variant's name alone, so that a changed
            edit needs another name.
        max_new_tokens: limit of an answer; None keeps that of the run.
        budget_forcing: number of times that "Wait" replaces the end of the thinking; 0 keeps the number of the run.
        votes: number of draws per sample that vote (self-consistency). Sample j is the majority over draws j * votes to
            (j + 1) * votes - 1; without voting a sample is one draw. The first draw with the winning final answer
            stands for it.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> from stepsal.experiments.variants import HINT
        >>> variant = stepsal.Variant("hint, 3 votes", instruction=HINT, votes=3)
        >>> variant.key == stepsal.Variant("hint", instruction=HINT).key
        True
    """

    name: str
    _: KW_ONLY
    stepflow: StepFlowConfig | None = None
    instruction: str | None = None
    edit: Edit | None = None
    max_new_tokens: int | None = None
    budget_forcing: int = 0
    votes: int = 1

    def __post_init__(self) -> None:
        if self.votes < 1:
            raise ValueError(f"variant {self.name!r}: votes={self.votes} must be at least 1")
        if self.budget_forcing < 0:
            raise ValueError(f"variant {self.name!r}: budget_forcing={self.budget_forcing} must be at least 0")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"variant {self.name!r}: max_new_tokens={self.max_new_tokens} must be at least 1")

    @property
    def key(self) -> str:
        """All attributes but `name` and `votes`, as JSON; variants with equal keys share their answers."""
        how: dict[str, Any] = {
            "stepflow": None if self.stepflow is None else self.stepflow.to_dict(),
            "instruction": self.instruction,
            "max_new_tokens": self.max_new_tokens,
            "budget_forcing": self.budget_forcing,
        }
        if self.edit is not None:
            how["edit"] = self.name  # functions may share a name of theirs, or have none
        return json.dumps(how, sort_keys=True)

    def question_of(self, problem: Problem) -> str:
        """Return the question of a problem, with the instruction after it.

        Args:
            problem: the problem to be answered.
        """
        return problem.question + ("" if self.instruction is None else f"\n\n{self.instruction}")

    def decoding_of(self, decoding: Decoding) -> Decoding:
        """Return the settings of decoding for this variant's answers.

        Args:
            decoding: that of the run; `max_new_tokens` and `budget_forcing` of the variant replace its own where they
                are set.
        """
        return decoding.but(
            max_new_tokens=self.max_new_tokens or decoding.max_new_tokens,
            budget_forcing=self.budget_forcing or decoding.budget_forcing,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the variant JSON-ready, for `from_dict`; an edit is kept as the name of its variant alone."""
        return {"name": self.name, "votes": self.votes, **json.loads(self.key)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Variant:
        """Read a variant that `to_dict` has written; in place of an edit stands a `LostEdit`.

        Args:
            settings: as `to_dict` has returned them.

        Raises:
            ValueError: settings that make no variant.
        """
        settings = dict(settings)
        try:
            if settings.get("stepflow") is not None:
                settings["stepflow"] = StepFlowConfig.from_dict(settings["stepflow"])
            if "edit" in settings:
                settings["edit"] = LostEdit(settings["edit"])
            return cls(settings.pop("name"), **settings)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{settings!r} is no variant: {error}") from error


@dataclass(frozen=True)
class LostEdit:
    """A stand-in for the edit of a variant that was read from a folder, since a folder keeps no functions.

    Attributes:
        variant: name of the variant.

    Example:
        >>> from stepsal.experiments.variants import LostEdit
        >>> edited = stepsal.Variant("steered", edit=lambda model, problem: model.hooks())
        >>> stepsal.Variant.from_dict(edited.to_dict()).edit
        LostEdit(variant='steered')
    """

    variant: str

    def __call__(self, model: TransformerBridge, problem: Problem) -> AbstractContextManager[object]:
        """Refuse to run.

        Args:
            model: not used.
            problem: not used.

        Raises:
            ValueError: always, with the remedy.
        """
        raise ValueError(
            f"the edit of variant {self.variant!r} is a function, which a folder does not keep: pass "
            f"Variant({self.variant!r}, edit=...) to stepsal.evaluate to write more answers"
        )


def check_names(variants: Sequence[Variant]) -> None:
    """Refuse variants that tables could not tell apart.

    Args:
        variants: variants to be compared.

    Raises:
        ValueError: no variants, or two with the same name.

    Example:
        >>> from stepsal.experiments.variants import check_names
        >>> check_names([stepsal.Variant("plain"), stepsal.Variant("short", max_new_tokens=100)])
    """
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"variants={names} must be at least one, and have names that differ")


def draws_needed(variants: Iterable[Variant], n_samples: int) -> dict[str, int]:
    """Return how many draws of each problem are needed, by `Variant.key`.

    Args:
        variants: variants to be compared; of several with one key, the one with the most votes decides.
        n_samples: samples of each problem under each variant.

    Example:
        >>> from stepsal.experiments.variants import draws_needed
        >>> list(draws_needed([stepsal.Variant("one"), stepsal.Variant("five votes", votes=5)], 2).values())
        [10]
    """
    needed: dict[str, int] = {}
    for variant in variants:
        needed[variant.key] = max(needed.get(variant.key, 0), n_samples * variant.votes)
    return needed
