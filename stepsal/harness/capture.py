"""Step maps of samples, beside their scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inspect_ai.model import get_model
from inspect_ai.solver import TaskState
from transformer_lens.model_bridge import TransformerBridge

from stepsal.harness.provider import StepsalAPI, heard
from stepsal.maps import StepSaliency
from stepsal.metrics import trace_metrics
from stepsal.saliency import step_saliency

if TYPE_CHECKING:
    import pandas as pd


async def capture(state: TaskState, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write the maps of the last answer, and say where they are and what is in them; or the `error`, where none can be.

    Raises:
        ValueError: a model of another provider.
    """
    api = get_model().api
    if not isinstance(api, StepsalAPI):
        raise ValueError(f"capture_step_saliency needs a stepsal/... model, and this is {get_model()}")
    config = api.stepflow
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{state.sample_id}")[:80]
    path = Path(folder).resolve() / f"{name}-epoch{state.epoch}-{state.uuid}.safetensors"

    def work(model: TransformerBridge) -> tuple[StepSaliency, pd.Series]:
        saliency = step_saliency(model, trace, stepflow=config, progress=False, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        saliency.save(path)
        return saliency, trace_metrics(saliency)

    try:  # one sample without a map is no reason to lose an evaluation
        trace = api.trace(state.output)
        job = api.engine.run(work)
        try:
            saliency, metrics = await heard(job)
        finally:
            job.cancel()  # if the sample has ended before it began
    except ValueError as error:
        return {"error": str(error)}
    return {
        "path": str(path),
        "steps": {role: trace.roles.count(role) for role in ("question", "thinking", "summary")},
        "tokens": len(trace),
        "layers": list(saliency.layers),
        "stepflow": None if config is None else config.to_dict(),
        "metrics": {k: (v if isinstance(v, str) else None if v != v else float(v)) for k, v in metrics.items()},
    }
