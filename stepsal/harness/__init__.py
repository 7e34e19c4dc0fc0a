"""stepsal models in Inspect (inspect.aisi.org.uk), the field's evaluation harness.

    inspect eval inspect_evals/aime2025 --model stepsal/mini                                  # without StepFlow
    inspect eval inspect_evals/aime2025 --model stepsal/mini -M tau_max=0.15 -M alpha=0.06    # with it
    inspect eval stepsal/hub -T benchmark=math500 --model stepsal/mini                        # `stepsal.tasks.hub`

Inspect finds this module by the entry point of the package, and imports it whenever it looks up a model or a solver by
name; so what is heavy is imported when it is used. Needs the extra `stepsal[inspect]`.
"""

from __future__ import annotations

from typing import Any

from inspect_ai import Task, task
from inspect_ai.model import ModelAPI, modelapi
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

__all__ = ["capture_step_saliency", "graded", "hub", "stepsal"]


@modelapi(name="stepsal")
def stepsal() -> type[ModelAPI]:
    """The provider; see `stepsal.harness.provider.StepsalAPI`."""
    from stepsal.harness.provider import StepsalAPI

    return StepsalAPI


@solver
def capture_step_saliency(
    folder: str = "step_saliency",
    layers: list[int] | None = None,
    target: str = "token",
    keep_tokens: bool = False,
) -> Solver:
    """Compute step maps of the sample's last answer and keep them beside the scores.

    The maps are written to `folder`, and the sample's store gets `step_saliency`: the path, and a summary. Goes after
    `generate()`, with a `stepsal/...` model.

    Args:
        folder: made if it is not there.
        layers, target, keep_tokens: see `stepsal.step_saliency`. StepFlow is on if it was on for the answer.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        from stepsal.harness.capture import capture

        options: dict[str, Any] = {"layers": layers, "target": target, "keep_tokens": keep_tokens}
        state.store.set("step_saliency", await capture(state, folder, options))
        return state

    return solve


@task
def hub(benchmark: str, file: str | None = None, epochs: int | None = None) -> Task:
    """A benchmark of `stepsal.tasks.hub`, graded as there.

    Args:
        benchmark: "aime24", "aime25", "amc23", "math500" or "gpqa-diamond".
        file: take the records from this JSONL file instead of the hub.
        epochs: samples per problem; as many as in the paper by default.
    """
    from inspect_ai.dataset import Sample

    from stepsal.tasks.hub import HubTask

    found = HubTask(benchmark, file)
    samples = [
        Sample(problem.question, target=problem.reference, id=i, metadata={"grader": problem.grader})
        for i, problem in enumerate(found.problems)
    ]
    n_samples = epochs or found.about.n_samples
    return Task(samples, scorer=graded(), epochs=n_samples, metadata={"source": found.name})


@scorer(metrics=[accuracy(), stderr()])
def graded() -> Scorer:
    """Grade by `stepsal.tasks.answers`; what was cut off is wrong."""

    async def score(state: TaskState, target: Target) -> Score:
        from stepsal.tasks.answers import Problem, Verdict

        problem = Problem(state.input_text, target.text, state.metadata["grader"])
        if state.output.stop_reason in ("max_tokens", "model_length"):
            verdict = Verdict(False, None, "the answer was cut off", "truncated")
        else:
            verdict = problem.grade(state.output.completion)
        value = "C" if verdict.correct else "I"
        return Score(value=value, answer=verdict.answer, explanation=verdict.reason, metadata={"error": verdict.error})

    return score
