"""What Inspect finds in stepsal by name: the provider, the task, the solver and the scorer.

Inspect imports this module by the package's entry point, whenever it looks up a model or a solver; so what is heavy is
imported when it is used.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from inspect_ai import Task, task
from inspect_ai.model import ModelAPI, modelapi
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

from stepsal.layers import Layers


@modelapi(name="stepsal")
def stepsal_provider() -> type[ModelAPI]:
    """Return the provider; see `stepsal.harness.provider.StepsalAPI`."""
    from stepsal.harness.provider import StepsalAPI

    return StepsalAPI


@solver
def capture_step_saliency(
    folder: str = "step_saliency",
    layers: Layers = "all",
    target: Literal["token", "sequence"] = "token",
    keep_tokens: bool = False,
) -> Solver:
    """Compute step maps of each sample's last answer, and keep them beside the scores.

    The maps are written to `folder`, and the sample's store gets `step_saliency`: the path, and a summary. StepFlow is
    on if it was on for the answer. The solver goes after `generate()`, with a `stepsal/...` model.

    Args:
        folder: made if it is not there.
        layers: as for `stepsal.step_saliency`.
        target: as for `stepsal.step_saliency`.
        keep_tokens: as for `stepsal.step_saliency`.

    Raises:
        ValueError: no layers are named; or, when it runs, a model of another provider.

    Example:
        >>> from inspect_ai.solver import generate
        >>> solvers = [generate(), stepsal.harness.capture_step_saliency("maps", layers="deep")]
    """
    from stepsal.harness.arguments import read_layers
    from stepsal.layers import checked_layers

    chosen = checked_layers(read_layers(layers))

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        from stepsal.harness.capture import capture

        summary = await capture(state, folder, layers=cast(Any, chosen), target=target, keep_tokens=keep_tokens)
        state.store.set("step_saliency", summary)
        return state

    return solve


@task
def hub(benchmark: str, file: str | None = None, epochs: int | None = None) -> Task:
    """Make a task of a benchmark of `stepsal.tasks.hub`, graded as there.

    Args:
        benchmark: "aime24", "aime25", "amc23", "math500" or "gpqa-diamond".
        file: take the records from this JSONL file instead of the hub.
        epochs: samples per problem; as many as in the paper by default.

    Example:
        >>> import json, tempfile
        >>> record = {"question": "What is 1 + 1?", "answer": "2"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/amc23.jsonl"
        ...     _ = open(path, "w").write(json.dumps(record))
        ...     [sample.target for sample in stepsal.harness.hub("amc23", file=path).dataset]
        ['2']
    """
    from inspect_ai.dataset import Sample

    from stepsal.tasks.hub import HubTask

    source = HubTask(benchmark, file)
    samples = [
        Sample(problem.question, target=problem.reference, id=i, metadata={"grader": problem.grader})
        for i, problem in enumerate(source.problems)
    ]
    n_samples = epochs or source.about.n_samples
    return Task(samples, scorer=graded(), epochs=n_samples, metadata={"source": source.name})


@scorer(metrics=[accuracy(), stderr()])
def graded() -> Scorer:
    """Grade by `stepsal.tasks.answers`; an answer that was cut off is wrong.

    Example:
        >>> import inspect
        >>> inspect.iscoroutinefunction(stepsal.harness.graded())
        True
    """

    async def score(state: TaskState, target: Target) -> Score:
        from stepsal.tasks.answers import Problem, Verdict

        problem = Problem(state.input_text, target.text, state.metadata["grader"])
        if state.output.stop_reason in ("max_tokens", "model_length"):
            verdict = Verdict(False, None, "the answer was cut off", "truncated")
        else:
            verdict = problem.grade(state.output.completion)
        value = "C" if verdict.correct else "I"
        return Score(
            value=value, answer=verdict.final_answer, explanation=verdict.reason, metadata={"error": verdict.error}
        )

    return score
