"""Step-Saliency: attention times gradient, pooled into one step-to-step map per layer.

For layer l, query position t, key position k and the next-token loss L_t at t (arXiv 2604.06695, Step-Saliency),

    I^(l)[t <- k] = (1/H) sum_h | A^(l,h)[t, k] * dL_t / dA^(l,h)[t, k] |,

pooled over blocks of query step x key step. `step_attention` pools A alone, without a gradient.

What is asked for is checked first, then the memory of all traces is laid out, then they are mapped one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.hooks import check_model
from stepsal.intervention import StepFlowConfig, active_flow, agreed_segmentation
from stepsal.intervention import stepflow as open_stepflow
from stepsal.layers import Layers, layer_indices
from stepsal.maps.pooling import Reduce, pair_counts, reduce_blocks, row_counts
from stepsal.maps.step_saliency import StepSaliency, Target, labels_of
from stepsal.saliency.blocks import Workspace
from stepsal.saliency.memory import Plan, plan
from stepsal.saliency.pattern import pattern_maps
from stepsal.saliency.request import MapRequest, PooledMaps
from stepsal.saliency.streamed import streamed_maps, why_not
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Trace

Engine = Literal["auto", "pattern", "streamed"]
"""How maps are computed; "auto" goes by an estimate of the memory."""


@overload
def step_saliency(
    model: TransformerBridge,
    trace: Trace,
    *,
    target: Literal["token", "sequence"] = "token",
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Reduce = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool = False,
    progress: bool = True,
) -> StepSaliency: ...
@overload
def step_saliency(
    model: TransformerBridge,
    trace: Sequence[Trace],
    *,
    target: Literal["token", "sequence"] = "token",
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Reduce = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool = False,
    progress: bool = True,
) -> list[StepSaliency]: ...
def step_saliency(
    model: TransformerBridge,
    trace: Trace | Sequence[Trace],
    *,
    target: Literal["token", "sequence"] = "token",
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Reduce = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool = False,
    progress: bool = True,
) -> StepSaliency | list[StepSaliency]:
    """Map how much each step relies on each earlier step, layer by layer.

    One forward and one backward pass for each trace. Logits, parameters, gradients, the model's mode and the hooks of
    others are left as they were, also when the pass is interrupted.

    Args:
        model: from `stepsal.load`, or any bridge whose adapter computes attention itself.
        trace: what the model wrote (or any text in its format); or several, which are read one after the other with
            the same buffers.
        target: whose loss is differentiated for query row t: "token", the paper's dL_t/dA[t, :], the loss of predicting
            token t + 1 alone; "sequence", the loss summed over all targets, which adds what row t does for later
            tokens through later layers, and is what back-propagating a sequence loss gives.
        engine: "pattern" keeps the patterns of all requested layers, O(layers * heads * pos^2) memory; "streamed" no
            pattern at all, O(layers * pos * d_model); "auto" goes by an estimate of the memory. The maps are the same.
            Hooks on scores and patterns, StepFlow and `keep_tokens` need "pattern".
        layers: which layers to map; see `stepsal.layers`. Layers below the lowest one cost no backward pass.
        reduce: "density", the mean over the pairs of a block that exist (the paper's map); "mass", the sum over
            keys and mean over query rows (saliency of a step per query token).
        stepflow: read the trace under StepFlow with these settings, and with the segmentation of the trace: A is then
            the edited pattern, and the gradient goes through the edits. A `stepsal.stepflow` context around the call
            does the same.
        keep_heads: also keep the map of every head.
        keep_tokens: also keep the token map of every layer, [query_pos, key_pos]; for short traces.
        progress: show a bar over traces and layers when it takes more than two seconds.

    Returns:
        Maps [layer, query_step, key_step] in float32 on the CPU, with labels; a list of them for several traces.

    Raises:
        ValueError: unknown target, engine, reduce or layer; a trace longer than the context or without steps; under
            StepFlow, traces that were cut in different ways, or in another way than an open context cuts; an engine
            that can't do what is asked; a model whose attention can't be read through hook points.
        MemoryError: the estimate of the memory exceeds what is free; before any work.
        FloatingPointError: NaN or inf in a map, naming the layer.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", " Bob is Ann plus 1.</think>Bob.", model)
        >>> stepsal.step_saliency(model, trace, layers="deep").values.shape
        torch.Size([2, 3, 3])
    """
    _check_choice("target", target, ("token", "sequence"))
    return _step_maps(
        model, trace, target=target, engine=engine, layers=layers, reduce=reduce, stepflow=stepflow,
        keep_heads=keep_heads, keep_tokens=keep_tokens, progress=progress,
    )  # fmt: skip


@overload
def step_attention(
    model: TransformerBridge,
    trace: Trace,
    *,
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Reduce = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool = False,
    progress: bool = True,
) -> StepSaliency: ...
@overload
def step_attention(
    model: TransformerBridge,
    trace: Sequence[Trace],
    *,
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Reduce = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool = False,
    progress: bool = True,
) -> list[StepSaliency]: ...
def step_attention(
    model: TransformerBridge,
    trace: Trace | Sequence[Trace],
    *,
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Reduce = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool = False,
    progress: bool = True,
) -> StepSaliency | list[StepSaliency]:
    """Map attention alone by steps, in one forward pass: what saliency is to be compared with.

    Attention tells where a token looks, saliency how much its loss depends on what it sees there. Attention is pooled
    as saliency is, over the same rows: those that predict a token.

    Args:
        model: as for `step_saliency`.
        trace: one or several, likewise.
        engine: "auto", "pattern" or "streamed", likewise.
        layers: which layers to map; see `stepsal.layers`.
        reduce: "density", the mean attention of the pairs of a block; "mass", the attention of a query token on a step.
        stepflow: read the trace under StepFlow with these settings: A is then the edited pattern.
        keep_heads: also keep the map of every head.
        keep_tokens: also keep the token map of every layer.
        progress: show a bar when it takes more than two seconds.

    Returns:
        Maps with target="attention", like those of `step_saliency`.

    Raises:
        ValueError: as `step_saliency`.
        MemoryError: as `step_saliency`.
        FloatingPointError: as `step_saliency`.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", " Bob is Ann plus 1.</think>Bob.", model)
        >>> attention = stepsal.step_attention(model, trace, reduce="mass")
        >>> bool((attention.values.sum(-1) <= 1.0001).all())  # the rest is on tokens of the template
        True
    """
    return _step_maps(
        model, trace, target="attention", engine=engine, layers=layers, reduce=reduce, stepflow=stepflow,
        keep_heads=keep_heads, keep_tokens=keep_tokens, progress=progress,
    )  # fmt: skip


def _step_maps(
    model: TransformerBridge,
    trace: Trace | Sequence[Trace],
    *,
    target: Target,
    engine: Engine,
    layers: Layers,
    reduce: Reduce,
    stepflow: StepFlowConfig | None,
    keep_heads: bool,
    keep_tokens: bool,
    progress: bool,
) -> StepSaliency | list[StepSaliency]:
    _check_choice("engine", engine, ("auto", "pattern", "streamed"))
    _check_choice("reduce", reduce, ("density", "mass"))
    indices = layer_indices(layers, model.cfg.n_layers)
    if not indices:
        raise ValueError(f'layers={layers!r} names no layer, so there is nothing to map; use "all"')
    check_model(model)
    traces: Sequence[Trace] = trace if isinstance(trace, Sequence) else [trace]
    for one in traces:
        _check_trace(model, one)
    requests = [
        MapRequest(one.tokens, one.step_ids, len(one.steps), indices, target, keep_heads, keep_tokens) for one in traces
    ]
    followed = stepflow is not None or active_flow(model) is not None
    segmentation = _one_segmentation(traces) if followed else None
    with open_stepflow(model, stepflow, segmentation=segmentation) if stepflow is not None else nullcontext():
        agreed_segmentation(model, segmentation)
        plans = _plans(model, requests, engine)
        metadata = _provenance(model)
        results = [
            _labelled(model, one, request, maps, reduce, {"engine": laid_out.engine, **metadata})
            for one, request, laid_out, maps in zip(
                traces, requests, plans, _mapped(model, requests, plans, progress), strict=True
            )
        ]
    return results if isinstance(trace, Sequence) else results[0]


def _plans(model: TransformerBridge, requests: Sequence[MapRequest], engine: Engine) -> list[Plan]:
    """Lay out the memory of every trace before the first one is read.

    Raises:
        ValueError: engine="streamed" where only patterns will do.
        MemoryError: a trace needs more than is free.
    """
    flow = active_flow(model)
    return [
        plan(
            model, len(request.tokens), request.n_steps, engine=engine, layers=request.layers,
            keep_heads=request.keep_heads, keep_tokens=request.keep_tokens,
            forward_only=request.target == "attention",
            only_pattern="token maps are whole" if request.keep_tokens
            else "StepFlow edits whole patterns" if flow
            else why_not(model),
        )
        for request in requests
    ]  # fmt: skip


def _mapped(
    model: TransformerBridge, requests: Sequence[MapRequest], plans: Sequence[Plan], progress: bool
) -> list[PooledMaps]:
    """Map one trace after the other, with bars over traces and layers."""
    workspace, alone = Workspace(), len(requests) < 2
    results = []
    pairs = zip(requests, plans, strict=True)
    for request, laid_out in tqdm(pairs, "traces", len(requests), delay=2, disable=not progress or alone):
        with tqdm(total=len(request.layers), desc="layers", disable=not progress, delay=2, leave=alone) as bar:
            if laid_out.engine == "streamed":
                maps = streamed_maps(
                    model, request, n_rows=laid_out.n_rows, n_kept=laid_out.n_kept, workspace=workspace,
                    on_layer=bar.update,
                )  # fmt: skip
            else:
                maps = pattern_maps(model, request, on_layer=bar.update)
        results.append(maps)
    return results


def _provenance(model: TransformerBridge) -> dict[str, Any]:
    """Return what a result is to say about how it was made, JSON-ready."""
    metadata: dict[str, Any] = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if flow := active_flow(model):
        metadata["stepflow"] = flow.config.to_dict()
    return metadata


def _labelled(
    model: TransformerBridge,
    trace: Trace,
    request: MapRequest,
    maps: PooledMaps,
    reduce: Reduce,
    metadata: dict[str, Any],
) -> StepSaliency:
    """Reduce block sums to step maps, and put the labels of the trace on them."""
    counts, rows = (count(request.step_ids, request.n_steps) for count in (pair_counts, row_counts))
    return StepSaliency(
        values=reduce_blocks(maps.sums, counts, rows, reduce),
        **labels_of(trace),
        layers=request.layers,
        target=request.target,
        reduce=reduce,
        model_name=model.cfg.model_name,
        n_layers=model.cfg.n_layers,
        head_values=None if maps.head_sums is None else reduce_blocks(maps.head_sums, counts, rows, reduce),
        token_values=maps.tokens,
        metadata=metadata,
    )


def _one_segmentation(traces: Sequence[Trace]) -> Segmentation | None:
    """Return the segmentation of all traces, for StepFlow to follow; None without a trace.

    Raises:
        ValueError: traces that were cut in different ways.
    """
    segmentations = [trace.segmentation for trace in traces]
    if different := [other for other in segmentations if other != segmentations[0]]:
        raise ValueError(
            f"the traces were cut with {segmentations[0]} and {different[0]}: map them one by one under StepFlow"
        )
    return segmentations[0] if segmentations else None


def _check_trace(model: TransformerBridge, trace: Trace) -> None:
    n_tokens, n_ctx, d_vocab = len(trace.tokens), model.cfg.n_ctx, model.cfg.d_vocab
    if n_tokens > n_ctx:
        raise ValueError(f"the trace has {n_tokens} tokens but {model.cfg.model_name!r} takes {n_ctx}: shorten it")
    if n_tokens < 2 or not trace.steps:
        raise ValueError(f"the trace has {n_tokens} tokens in {len(trace.steps)} steps: there is nothing to map")
    if (largest := int(trace.tokens.max())) >= d_vocab:
        raise ValueError(
            f"token id {largest} is outside the vocabulary of {model.cfg.model_name!r} ({d_vocab} tokens): "
            "build the trace with this model's tokenizer"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")
