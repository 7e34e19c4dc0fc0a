"""stepsal models in Inspect (inspect.aisi.org.uk), the field's evaluation harness.

    inspect eval inspect_evals/aime2025 --model stepsal/mini                                  # without StepFlow
    inspect eval inspect_evals/aime2025 --model stepsal/mini -M tau_max=0.15 -M alpha=0.06    # with it

Inspect finds this module by the entry point of the package, and imports it whenever it looks up a model or a solver by
name; so what is heavy is imported when it is used. Needs the extra `stepsal[inspect]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inspect_ai.model import ModelAPI, modelapi
from inspect_ai.solver import Generate, Solver, TaskState, solver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stepsal.maps import Target

__all__ = ["capture_step_saliency", "stepsal"]


@modelapi(name="stepsal")
def stepsal() -> type[ModelAPI]:
    """The provider; see `stepsal.harness.provider.StepsalAPI`."""
    from stepsal.harness.provider import StepsalAPI

    return StepsalAPI


@solver
def capture_step_saliency(
    folder: str = "step_saliency",
    layers: Sequence[int] | None = None,
    target: Target = "token",
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
