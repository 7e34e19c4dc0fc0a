"""Register with Inspect, by name, what stepsal has for it: the provider, the task, the solver and the scorer.

Inspect imports this module by the package's entry point, whenever it looks up a model or a solver; so what is heavy is
imported when it is used.
"""

from __future__ import annotations

from typing import Any, cast, get_args

from anyio import to_thread
from inspect_ai import Task, task
from inspect_ai.model import ModelAPI, modelapi
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

from stepsal.layers import Layers
from stepsal.maps.step_saliency import GradientTarget


@modelapi(name="stepsal")
def stepsal_provider() -> type[ModelAPI]:
    """Return the class of the provider, `stepsal.harness.provider.StepsalAPI`."""
    from stepsal.harness.provider import StepsalAPI

    return StepsalAPI


@solver
def capture_step_saliency(
    folder: str = "step_saliency",
    *,
    layers: Layers = "all",
    target: GradientTarget = "token",
    keep_tokens: bool = False,
) -> Solver:
    """Compute step maps of each Inspect sample's last answer, and keep them beside the scores.

    Put the solver after `generate()`, and use a `stepsal/...` model. The maps of each Inspect sample's last answer are
    written to `folder`; the entry `step_saliency` of the sample's store holds the path and a summary. Maps are computed
    under StepFlow if the answer was written under it.

    Args:
        folder: folder to write to; created if missing.
        layers: as in `stepsal.step_saliency`.
        target: "token", "logit" or "sequence", as in `stepsal.step_saliency`.
        keep_tokens: as in `stepsal.step_saliency`.

    Raises:
        ValueError: no layers are named, or an unknown target; or, when the solver runs, a model of another provider.

    Example:
        >>> from inspect_ai.solver import generate
        >>> solvers = [generate(), stepsal.harness.capture_step_saliency("maps", layers="deep")]
    """
    from stepsal.harness.arguments import read_layers
    from stepsal.layers import checked_layers

    chosen = checked_layers(read_layers(layers))
    if chosen == ():
        raise ValueError(f'layers={layers!r} names no layer, so there is nothing to map; use "all"')
    if target not in get_args(GradientTarget):
        raise ValueError(
            f"target={target!r} is unknown; choose one of {', '.join(map(repr, get_args(GradientTarget)))}"
        )

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        from stepsal.harness.capture import capture

        summary = await capture(state, folder, layers=cast(Any, chosen), target=target, keep_tokens=keep_tokens)
        state.store.set("step_saliency", summary)
        return state

    return solve


@task
def hub(benchmark: str, file: str | None = None, epochs: int | None = None) -> Task:
    """Make an Inspect task of a benchmark of `stepsal.tasks.hub`, graded by `graded`.

    Args:
        benchmark: "aime24", "aime25", "amc23", "math500" or "gpqa-diamond".
        file: JSONL file to take the records from instead of the hub.
        epochs: number of samples of each problem. None: the paper's number (16 for AIME and AMC23, 8 for GPQA-Diamond,
            1 for MATH-500).

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
    """Score an answer by comparing its final answer with the reference; a truncated answer is wrong.

    The metadata of an Inspect sample may name its `grader` ("number", "math" or "choice"); without one it is "math".

    Example:
        >>> import inspect
        >>> inspect.iscoroutinefunction(stepsal.harness.graded())
        True
    """

    async def score(state: TaskState, target: Target) -> Score:
        from stepsal.tasks.answers import Problem, Verdict

        def verdict_of(completion: str) -> Verdict:
            return Problem(state.input_text, target.text, state.metadata.get("grader", "math")).grade(completion)

        if state.output.stop_reason in ("max_tokens", "model_length"):
            verdict = Verdict(False, None, "the answer was cut off", "truncated")
        else:  # in a thread: what takes seconds to compare keeps no other sample waiting
            verdict = await to_thread.run_sync(verdict_of, state.output.completion)
        value = "C" if verdict.correct else "I"
        return Score(
            value=value, answer=verdict.final_answer, explanation=verdict.reason, metadata={"error": verdict.error}
        )

    return score
