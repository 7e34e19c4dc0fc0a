"""Step maps of samples, beside their scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from inspect_ai.model import get_model
from inspect_ai.solver import TaskState

from stepsal.harness.provider import StepsalAPI, heard
from stepsal.metrics import trace_metrics
from stepsal.saliency import step_saliency


async def capture(state: TaskState, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write the maps of the last answer, and say where they are and what is in them.

    Raises:
        ValueError: a model of another provider, or an answer of another run.
    """
    api = get_model().api
    if not isinstance(api, StepsalAPI):
        raise ValueError(f"capture_step_saliency needs a stepsal/... model, and this is {get_model()}")
    trace = api.trace(state.output)
    config = api.stepflow
    job = api.engine.run(lambda model: step_saliency(model, trace, stepflow=config, progress=False, **options))
    saliency = await heard(job)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{state.sample_id}")
    path = Path(folder) / f"{name}-epoch{state.epoch}-{state.uuid}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = saliency.save(path)
    metrics = trace_metrics(saliency)
    return {
        "path": str(saved),
        "steps": {role: trace.roles.count(role) for role in ("question", "thinking", "summary")},
        "tokens": len(trace),
        "layers": list(saliency.layers),
        "stepflow": None if config is None else config.to_dict(),
        "metrics": {k: (v if isinstance(v, str) else None if v != v else float(v)) for k, v in metrics.items()},
    }
