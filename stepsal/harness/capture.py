"""Write the step maps of samples beside their scores."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
from inspect_ai.model import get_model
from inspect_ai.solver import TaskState
from transformer_lens.model_bridge import TransformerBridge

from stepsal.harness.engine import result_of
from stepsal.harness.provider import StepsalAPI
from stepsal.layers import Layers
from stepsal.maps import StepSaliency
from stepsal.maps.step_saliency import GradientTarget
from stepsal.metrics import trace_metrics
from stepsal.saliency import step_saliency


async def capture(
    state: TaskState, folder: str, *, layers: Layers, target: GradientTarget, keep_tokens: bool
) -> dict[str, Any]:
    """Write the maps of a sample's last answer, and return where they are and what is in them.

    Args:
        state: the sample.
        folder: folder to write to; created if missing.
        layers: as in `step_saliency`.
        target: as in `step_saliency`.
        keep_tokens: as in `step_saliency`.

    Returns:
        A summary, JSON-ready; where the answer can't be mapped, only {"error": why}.

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
        saliency = step_saliency(
            model, trace, target=target, layers=layers, stepflow=config, keep_tokens=keep_tokens, progress=False
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        saliency.save(path)
        return saliency, trace_metrics(saliency)

    try:  # one sample without a map is no reason to lose an evaluation
        trace = api.trace(state.output)
        job = api.engine.run(work)
        try:
            saliency, metrics = await result_of(job)
        finally:
            job.cancel()  # in case the sample has ended before the work began
    except ValueError as error:
        return {"error": str(error)}
    return {
        "path": str(path),
        "steps": {role: trace.roles.count(role) for role in ("question", "thinking", "summary")},
        "tokens": len(trace),
        "layers": list(saliency.layers),
        "stepflow": None if config is None else config.to_dict(),
        "segmentation": trace.segmentation.to_dict(),
        "metrics": {name: _json_ready(value) for name, value in metrics.items()},
    }


def _json_ready(value: Any) -> str | float | None:
    """Return a number as JSON has it: None where it is undefined."""
    if isinstance(value, str):
        return value
    return None if math.isnan(value) else float(value)
