"""Step-Saliency: attention times gradient, pooled into one step-to-step map per layer.

For layer l, query position t, key position k and the next-token loss L_t at t (arXiv 2604.06695, Step-Saliency),

    I^(l)[t <- k] = (1/H) sum_h | A^(l,h)[t, k] * dL_t / dA^(l,h)[t, k] |,

pooled over blocks of query step x key step. `step_attention` pools A alone, without a gradient.

The request is checked first, then the memory of all traces is laid out, then they are mapped one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.check import check_model
from stepsal.intervention import StepFlowConfig, active_flow, agreed_segmentation
from stepsal.intervention import stepflow as open_stepflow
from stepsal.intervention.segmentation import same_segmentation
from stepsal.layers import Layers, layer_indices
from stepsal.maps.pooling import Reduce, pair_counts, reduce_blocks, row_counts
from stepsal.maps.step_saliency import GradientTarget, StepSaliency, Target, labels_of
from stepsal.saliency.blocks import Workspace
from stepsal.saliency.memory import Plan, plan
from stepsal.saliency.pattern import pattern_maps
from stepsal.saliency.request import MapRequest, PooledMaps
from stepsal.saliency.streamed import streamed_maps, why_not
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Trace

Engine = Literal["auto", "pattern", "streamed"]
"""Engine that computes the maps; "auto" chooses one by an estimate of the memory."""


@overload
def step_saliency(
    model: TransformerBridge,
    trace: Trace,
    *,
    target: GradientTarget = "token",
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Reduce = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool | Sequence[int] = False,
    progress: bool = True,
) -> StepSaliency: ...
@overload
def step_saliency(
    model: TransformerBridge,
    trace: Sequence[Trace],
    *,
    target: GradientTarget = "token",
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Reduce = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool | Sequence[int] = False,
    progress: bool = True,
) -> list[StepSaliency]: ...
def step_saliency(
    model: TransformerBridge,
    trace: Trace | Sequence[Trace],
    *,
    target: GradientTarget = "token",
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Reduce = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool | Sequence[int] = False,
    progress: bool = True,
) -> StepSaliency | list[StepSaliency]:
    """Map how much each step relies on itself and on each earlier step, layer by layer.

    The saliency of layer l from query position t to key position k is the mean over the H heads

        (1/H) sum_h |A[h, t, k] * dL_t / dA[h, t, k]|        (arXiv 2604.06695, Step-Saliency)

    with A the attention pattern at `attn.hook_pattern`, and L_t the loss, in nats, of predicting token t + 1. Row t
    belongs to the step of token t. Block (i, j) of a map holds the causal pairs k <= t with t in step i and k in
    step j; it is reduced to one number, `values[l, i, j]`.

    A trace takes one forward and one backward pass. Logits, parameters, gradients, the model's mode and the hooks of
    others are left as they were, also where a pass is interrupted.

    Args:
        model: from `stepsal.load`, or another `TransformerBridge` whose attention patterns are exposed at
            `attn.hook_pattern`.
        trace: a trace that the model wrote, or any text in its format; or several, which are read one after the other
            with the same buffers.
        target: what is differentiated for query row t. "token" is L_t, the loss of predicting token t + 1 alone (the
            paper's map); "logit" is the logit of token t + 1 less the mean over the vocabulary, which does not saturate
            where the model is sure; "sequence" is the sum of all L_t, which adds the effect of row t on later tokens
            through later layers.
        engine: "pattern" keeps the patterns of all requested layers, in O(layers * heads * pos^2) memory; "streamed"
            keeps no pattern, in O(layers * pos * d_model); "auto" chooses by an estimate of the memory. The maps are
            the same. Hooks on scores and patterns need "pattern".
        layers: layers to map; see `stepsal.layers`. The backward pass stops at the lowest one.
        reduce: "density" is the mean over the pairs of a block (the paper's map); "mass" is the sum over keys and mean
            over query rows, the saliency of a key step per query token.
        stepflow: read the trace under StepFlow with these settings, and with the segmentation of the trace: A is then
            the edited pattern, and the gradient goes through the edits. A `stepsal.stepflow` context around the call
            does the same.
        keep_heads: also keep the map of every head; `values` is their mean.
        keep_tokens: also keep the token map of every layer, [query_pos, key_pos]: True that of all tokens, for short
            traces; some steps, such as [0, -1], that of their tokens as queries and as keys.
        progress: show a bar over traces and layers when the call takes more than two seconds.

    Returns:
        One `StepSaliency` for a trace; a list, in order, for a sequence, also for a sequence of one.

    Raises:
        ValueError: unknown target, engine, reduce or layer; a trace longer than the context or without steps; under
            StepFlow, traces with different segmentations, or one that differs from the open context's; a request that
            the engine can't serve; a model whose attention can't be read through hook points.
        MemoryError: the maps need more memory than is free, by an estimate that is made before any pass.
        FloatingPointError: a map holds NaN or inf; the message names the layer, the cause and a remedy.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", " Bob is Ann plus 1.</think>Bob.", model)
        >>> stepsal.step_saliency(model, trace).top(1)[["query_step", "key_step"]]
           query_step  key_step
        0           1         0
    """
    _check_choice("target", target, get_args(GradientTarget))
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
    keep_tokens: bool | Sequence[int] = False,
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
    keep_tokens: bool | Sequence[int] = False,
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
    keep_tokens: bool | Sequence[int] = False,
    progress: bool = True,
) -> StepSaliency | list[StepSaliency]:
    """Map attention by steps, without gradients, as a baseline for saliency.

    Attention tells where a token looks; saliency tells how much its loss depends on what it sees there. The attention
    pattern, averaged over heads, is reduced by steps as `step_saliency` does with |A * dL/dA|, over the same query rows
    (all but the last token, which predicts nothing). A trace takes one forward pass.

    Args:
        model: from `stepsal.load`, or another `TransformerBridge` whose attention patterns are exposed at
            `attn.hook_pattern`.
        trace: a trace that the model wrote, or any text in its format; or several, which are read one after the other
            with the same buffers.
        engine: "pattern" builds the whole pattern of a layer, in O(heads * pos^2) memory; "streamed" builds it in
            blocks, in O(pos * d_model); "auto" chooses by an estimate of the memory. The maps are the same. Hooks on
            scores and patterns need "pattern".
        layers: layers to map; see `stepsal.layers`.
        reduce: "density" is the mean attention over the pairs of a block; "mass" is the attention that a query token
            pays to all tokens of the key step together, averaged over query tokens.
        stepflow: read the trace under StepFlow with these settings, and with the segmentation of the trace: the map is
            then that of the edited pattern. A `stepsal.stepflow` context around the call does the same.
        keep_heads: also keep the map of every head; `values` is their mean.
        keep_tokens: also keep the token map of every layer, [query_pos, key_pos]: True that of all tokens, for short
            traces; some steps, such as [0, -1], that of their tokens as queries and as keys.
        progress: show a bar over traces and layers when the call takes more than two seconds.

    Returns:
        One `StepSaliency` with target="attention" for a trace; a list, in order, for a sequence, also for a sequence of
        one.

    Raises:
        ValueError: unknown engine, reduce or layer; a trace longer than the context or without steps; under StepFlow,
            traces with different segmentations, or one that differs from the open context's; a request that the engine
            can't serve; a model whose attention can't be read through hook points.
        MemoryError: the maps need more memory than is free, by an estimate that is made before any pass.
        FloatingPointError: a map holds NaN or inf; the message names the layer, the cause and a remedy.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", " Bob is Ann plus 1.</think>Bob.", model)
        >>> attention = stepsal.step_attention(model, trace, reduce="mass")
        >>> round(float(attention.layer(-1)[1, 0]), 2)  # of the attention of a thinking token, the part on the question
        0.14
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
    keep_tokens: bool | Sequence[int],
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
        MapRequest(
            one.tokens, one.step_ids, len(one.steps), indices, target, keep_heads, _kept_positions(one, keep_tokens)
        )
        for one in traces
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
        ValueError: engine="streamed" is requested for a trace that can't be streamed.
        MemoryError: a trace needs more memory than is free.
    """
    flow = active_flow(model)
    return [
        plan(
            model, len(request.tokens), request.n_steps, engine=engine, layers=request.layers,
            keep_heads=request.keep_heads, only_pattern=why_not(model),
            n_kept_tokens=0 if request.token_positions is None else len(request.token_positions),
            forward_only=request.target == "attention", bridged=flow is not None and bool(flow.oeb_layers),
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
    """Return the metadata of a result, JSON-ready: how it was made."""
    metadata: dict[str, Any] = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if flow := active_flow(model):
        metadata |= {"stepflow": flow.config.to_dict(), "segmentation": flow.segmentation.to_dict()}
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
        token_positions=_unless_all(request.token_positions, len(request.tokens)),
        metadata=metadata,
    )


def _kept_positions(trace: Trace, keep_tokens: bool | Sequence[int]) -> Tensor | None:
    """Return the positions of the tokens whose maps are kept, ascending; None for none.

    Raises:
        ValueError: a step that the trace does not have.
    """
    if isinstance(keep_tokens, bool):
        return torch.arange(len(trace.tokens)) if keep_tokens else None
    n_steps = len(trace.steps)
    if absent := [step for step in keep_tokens if not -n_steps <= step < n_steps]:
        raise ValueError(f"keep_tokens names step {absent[0]}, but the trace has {n_steps} steps (-1 is the last)")
    steps = torch.tensor([step % n_steps for step in keep_tokens], dtype=trace.step_ids.dtype)
    return torch.isin(trace.step_ids, steps).nonzero()[:, 0] if len(steps) else None


def _unless_all(positions: Tensor | None, n_tokens: int) -> Tensor | None:
    return None if positions is None or len(positions) == n_tokens else positions


def _one_segmentation(traces: Sequence[Trace]) -> Segmentation | None:
    """Return the segmentation of all traces, for StepFlow to follow; None without a trace.

    Raises:
        ValueError: the traces have different segmentations.
    """
    segmentations = [trace.segmentation for trace in traces]
    if different := [other for other in segmentations if not same_segmentation(other, segmentations[0])]:
        raise ValueError(
            f"the traces have the segmentations {segmentations[0]} and {different[0]}: map them one by one under "
            "StepFlow"
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
