"""Pack what a browser needs of a scene: labels, texts and colours as JSON, the numbers as binary buffers."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from torch import Tensor

from stepsal.maps.step_saliency import StepSaliency
from stepsal.metrics import flow_metrics
from stepsal.metrics.table import LAYER_METRICS
from stepsal.metrics.view import FlowView
from stepsal.plots import LINE_COLORS, ROLE_COLORS, step_labels
from stepsal.widgets.scene import METRICS, NAMED_BANDS, NO_ATTENTION, NO_DIFFERENCE, QUANTILE_FLOOR, Scene

LINES = {"lock_in": "lock-in of thinking rows", "summary_thinking": "summary on thinking"}
NO_TOKENS = (
    "no tokens to see: step_saliency(..., keep_tokens=True) keeps their maps, keep_tokens=[..] those of some steps"
)
OTHER_TOKENS = "the tokens of these steps were not kept: name them in step_saliency(..., keep_tokens=[..])"
TOO_MANY_TOKENS = "the token maps are too large for a browser"


def describe(scene: Scene) -> dict[str, Any]:
    """Return what the browser needs besides the numbers, JSON-ready: labels, texts, layers, colours.

    Args:
        scene: the maps.
    """
    return {
        "maps": [_describe(scene, label) for label in scene.maps],
        "colors": dict(ROLE_COLORS),
        "names": list(METRICS.values()),
        "offered": [list(METRICS).index(metric) for metric in scene.offered],
        "notes": {"attention": NO_ATTENTION, "difference": NO_DIFFERENCE},
        "quantile_floor": QUANTILE_FLOOR,
        "palettes": [_palette("magma_r"), _palette("RdBu_r")],
        "lines": dict(zip(LINES, LINE_COLORS, strict=False)),
        "line_names": LINES,
    }


def _describe(scene: Scene, label: str) -> dict[str, Any]:
    """Return what `describe` says of one trace."""
    saliency, tokens, heads = scene.maps[label], scene.tokens(label), scene.heads(label)
    metrics, texts = flow_metrics(saliency), [" ".join(text.split()) for text in saliency.step_texts]
    return {
        "label": label,
        "model": saliency.model_name,
        "target": saliency.target,
        "reduce": saliency.reduce,
        "roles": list(saliency.roles),
        "labels": list(step_labels(saliency.roles)),
        "texts": texts,
        "question": " ".join(text for text, role in zip(texts, saliency.roles, strict=True) if role == "question"),
        "layers": list(saliency.layers),
        "bands": {band: scene.band_positions(label, band) for band in NAMED_BANDS},
        "profile": {name: [None if np.isnan(x) else float(x) for x in metrics[name]] for name in LINES},
        "undefined": {name: _why_undefined(saliency, name) for name in LINES if metrics[name].isna().all()},
        "n_heads": 0 if heads is None else heads.shape[1],
        "no_tokens": NO_TOKENS
        if saliency.token_values is None
        else TOO_MANY_TOKENS
        if tokens is None
        else OTHER_TOKENS,
        "token_texts": [] if tokens is None else [saliency.token_texts[i] for i in saliency.kept_positions.tolist()],
        "token_spans": [] if tokens is None else [_span(saliency, i) for i in range(saliency.n_steps)],
    }


def _why_undefined(saliency: StepSaliency, name: str) -> str:
    """Return the causes, in words, for which a metric is undefined in all layers."""
    (metric,) = (metric for metric in LAYER_METRICS if metric.name == name)
    view = FlowView(saliency, 3)  # how many of the last steps are looked at does not matter to these lines
    return "; ".join(cause.when for cause in metric.causes if np.any(cause.holds(view)))


def buffers(scene: Scene) -> dict[str, bytes]:
    """Return the numbers of the maps: the lower triangle of each layer, row by row, as little-endian float32.

    Args:
        scene: the maps; those by head hold the triangles of all heads of a layer before those of the next layer.
    """
    packed = {}
    for i, (label, saliency) in enumerate(scene.maps.items()):
        packed[f"{i}/saliency"] = _packed(saliency.values)
        if label in scene.attention:
            packed[f"{i}/attention"] = _packed(scene.attention[label].values)
        if (tokens := scene.tokens(label)) is not None:
            packed[f"{i}/tokens"] = _packed(tokens)
        if (heads := scene.heads(label)) is not None:
            packed[f"{i}/heads"] = _packed(heads)
    return packed


def _span(saliency: StepSaliency, step: int) -> list[int]:
    """Return the first token of a step and the one after its last, among those that were kept."""
    inside = (saliency.step_ids[saliency.kept_positions] == step).nonzero()[:, 0]
    return [int(inside[0]), int(inside[-1]) + 1] if len(inside) else [0, 0]


def _packed(values: Float[Tensor, "*layer row column"]) -> bytes:
    """Return the lower triangle of each map, row by row, as little-endian float32."""
    rows, columns = np.tril_indices(values.shape[-1])
    return np.ascontiguousarray(values.float().numpy()[..., rows, columns], dtype="<f4").tobytes()


def _palette(name: str) -> list[int]:
    """Return 256 colours of a colormap: red, green, blue in turn, 0 to 255."""
    colors = mpl.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return [int(x) for x in np.round(255 * colors).ravel()]
