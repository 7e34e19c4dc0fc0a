from . import (
    bridge,
    experiments,
    generation,
    harness,
    intervention,
    layers,
    maps,
    metrics,
    plots,
    saliency,
    stats,
    tasks,
    trace,
    widgets,
)
from .bridge.loading import load
from .experiments.calibrate import calibrate
from .experiments.collect import collect
from .experiments.evaluate import Variant, evaluate
from .generation.answers import generate, generate_batch
from .generation.decoding import Decoding
from .intervention.config import StepFlowConfig
from .intervention.effects import token_effects
from .intervention.gains import edit_gains
from .intervention.hooks import stepflow
from .maps.step_saliency import StepSaliency
from .saliency.step_maps import step_attention, step_saliency
from .trace.continuation import Continuation
from .trace.segment import Segmentation
from .trace.trace import Trace

__version__: str

__all__ = [
    "Continuation",
    "Decoding",
    "Segmentation",
    "StepFlowConfig",
    "StepSaliency",
    "Trace",
    "Variant",
    "bridge",
    "calibrate",
    "collect",
    "edit_gains",
    "evaluate",
    "experiments",
    "generate",
    "generate_batch",
    "generation",
    "harness",
    "intervention",
    "layers",
    "load",
    "maps",
    "metrics",
    "plots",
    "saliency",
    "stats",
    "step_attention",
    "step_saliency",
    "stepflow",
    "tasks",
    "token_effects",
    "trace",
    "widgets",
]
