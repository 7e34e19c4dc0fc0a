"""stepsal: see, measure and repair how information flows between the steps of a reasoning model's trace."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepsal.bridge import load
    from stepsal.calibration import Calibration, calibrate
    from stepsal.effects import token_effects
    from stepsal.evaluation import Evaluation, Variant, evaluate
    from stepsal.footprint import Footprint, memory_needed
    from stepsal.generation import generate, generate_batch
    from stepsal.intervention import StepFlowConfig, stepflow
    from stepsal.maps import StepSaliency
    from stepsal.population import Population, collect
    from stepsal.saliency import step_attention, step_saliency
    from stepsal.trace import Step, Trace

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Evaluation",
    "Footprint",
    "Population",
    "Step",
    "StepFlowConfig",
    "StepSaliency",
    "Trace",
    "Variant",
    "calibrate",
    "collect",
    "evaluate",
    "generate",
    "generate_batch",
    "load",
    "memory_needed",
    "step_attention",
    "step_saliency",
    "stepflow",
    "token_effects",
]

# Imported on first use, so that looking at saved maps does not load TransformerLens.
_HOME = {
    "load": "stepsal.bridge",
    "Calibration": "stepsal.calibration",
    "calibrate": "stepsal.calibration",
    "token_effects": "stepsal.effects",
    "Footprint": "stepsal.footprint",
    "memory_needed": "stepsal.footprint",
    "generate": "stepsal.generation",
    "generate_batch": "stepsal.generation",
    "StepFlowConfig": "stepsal.intervention",
    "stepflow": "stepsal.intervention",
    "StepSaliency": "stepsal.maps",
    "Population": "stepsal.population",
    "collect": "stepsal.population",
    "Evaluation": "stepsal.evaluation",
    "Variant": "stepsal.evaluation",
    "evaluate": "stepsal.evaluation",
    "step_attention": "stepsal.saliency",
    "step_saliency": "stepsal.saliency",
    "Step": "stepsal.trace",
    "Trace": "stepsal.trace",
}
_MODULES = (
    "accuracy",
    "figures",
    "flops",
    "intervention",
    "maps",
    "metrics",
    "plots",
    "segment",
    "stats",
    "tasks",
    "widgets",
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"stepsal.{name}")
    raise AttributeError(f"module 'stepsal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
