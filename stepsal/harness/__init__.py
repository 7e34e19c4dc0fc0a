"""stepsal models in Inspect (inspect.aisi.org.uk), the field's evaluation harness.

    inspect eval inspect_evals/aime2025 --model stepsal/mini                                  # without StepFlow
    inspect eval inspect_evals/aime2025 --model stepsal/mini -M tau_max=0.15 -M alpha=0.06    # with it
    inspect eval stepsal/hub -T benchmark=math500 --model stepsal/mini                        # `stepsal.tasks.hub`

Install `stepsal[inspect]` to use these names. Importing the module works without it. Inspect finds them through
`stepsal.harness.registry`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepsal.harness.registry import capture_step_saliency, graded, hub

__all__ = ["capture_step_saliency", "graded", "hub"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from stepsal.harness import registry
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "inspect_ai":
            raise
        raise ImportError(f"stepsal.harness.{name} needs Inspect: pip install 'stepsal[inspect]'") from error
    return getattr(registry, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
