"""Step-Saliency: attention times gradient, pooled into one step-to-step map per layer.

For layer l, query position t, key position k and the next-token loss L_t at t (arXiv 2604.06695, Step-Saliency),

    I^(l)[t <- k] = (1/H) sum_h | A^(l,h)[t, k] * dL_t / dA^(l,h)[t, k] |,

pooled over blocks of query step x key step. `step_saliency` is the entry, and `step_attention` the same without a
gradient. The rest are their private parts: `pattern` takes A and dL/dA at `attn.hook_pattern`; `streamed` recomputes
them block by block from q, k, v and the gradient of z (`attention`), in linear memory; `memory` chooses between the
two; and `own_position` makes one backward pass give the gradient of every target by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, overload

from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from stepsal.intervention import StepFlowConfig, active_flow, agreed_segmentation
from stepsal.intervention import stepflow as open_stepflow
from stepsal.layers import Layers, layer_indices
from stepsal.maps.pooling import pair_counts, reduce_blocks, row_counts
from stepsal.maps.step_saliency import StepSaliency, Target, labels_of
from stepsal.saliency.blocks import Workspace
from stepsal.saliency.common import PooledMaps
from stepsal.saliency.memory import plan
from stepsal.saliency.pattern import pattern_maps
from stepsal.saliency.streamed import streamed_maps, why_not

if TYPE_CHECKING:
    from stepsal.trace.segment import Segmentation
    from stepsal.trace.trace import Trace

Engine = Literal["auto", "pattern", "streamed"]

__all__ = ["step_attention", "step_saliency"]


@overload
def step_saliency(model: TransformerBridge, trace: Trace, **options: Any) -> StepSaliency: ...
@overload
def step_saliency(model: TransformerBridge, trace: Sequence[Trace], **options: Any) -> list[StepSaliency]: ...
def step_saliency(  # type: ignore[misc]  # the overloads leave the options to this signature
    model: TransformerBridge,
    trace: Trace | Sequence[Trace],
    *,
    target: Literal["token", "sequence"] = "token",
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Literal["density", "mass"] = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool = False,
    progress: bool = True,
) -> StepSaliency | list[StepSaliency]:
    """Map how much each step relies on each earlier step, layer by layer.

    One forward and one backward pass for each trace. Logits, parameters, gradients, the model's mode and the hooks of
    others are left as they were, also when the pass is interrupted.

    Args:
        model: from `stepsal.load`.
        trace: what the model wrote (or any text in its format); or several, which are read one after the other with
            the same buffers.
        target: whose loss is differentiated for query row t: "token", the paper's dL_t/dA[t, :], the loss of predicting
            token t + 1 alone; "sequence", the loss summed over all targets, which adds what row t does for later
            tokens through later layers, and is what back-propagating a sequence loss gives.
        engine: "pattern" keeps the patterns of all requested layers, O(layers * heads * pos^2) memory; "streamed" no
            pattern at all, O(layers * pos * d_model); "auto" goes by an estimate of the memory. The maps are the same.
            Hooks on scores and patterns, StepFlow and `keep_tokens` need "pattern".
        layers: which layers to map; see `stepsal.layers`. Layers below the lowest one cost no backward pass.
        reduce: "density", mean over the pairs of a block that exist (saliency density, the paper's map); "mass", sum over
            keys, mean over query rows (saliency mass per query token).
        stepflow: read the trace under StepFlow with these settings: A is then the edited pattern, and the gradient goes
            through the edits. A `stepsal.stepflow` context around the call does the same.
        keep_heads: also keep the map of every head.
        keep_tokens: also keep the token map of every layer, [query_pos, key_pos]; for short traces.
        progress: show a bar over traces and layers when it takes more than two seconds.

    Returns:
        Maps [layer, query_step, key_step] in float32 on the CPU, with labels; a list of them for several traces.

    Raises:
        ValueError: unknown target, engine, reduce or layer; a trace longer than the context or without steps; an engine
            that can't do what is asked.
        MemoryError: the estimate of the memory exceeds what is free; before any work.
        FloatingPointError: NaN or inf in a map, naming the layer.
    """
    _one_of("target", target, ("token", "sequence"))
    return _step_maps(
        model, trace, target=target, engine=engine, layers=layers, reduce=reduce, stepflow=stepflow,
        keep_heads=keep_heads, keep_tokens=keep_tokens, progress=progress,
    )  # fmt: skip


@overload
def step_attention(model: TransformerBridge, trace: Trace, **options: Any) -> StepSaliency: ...
@overload
def step_attention(model: TransformerBridge, trace: Sequence[Trace], **options: Any) -> list[StepSaliency]: ...
def step_attention(  # type: ignore[misc]
    model: TransformerBridge,
    trace: Trace | Sequence[Trace],
    *,
    engine: Engine = "auto",
    layers: Layers = "all",
    reduce: Literal["density", "mass"] = "density",
    stepflow: StepFlowConfig | None = None,
    keep_heads: bool = False,
    keep_tokens: bool = False,
    progress: bool = True,
) -> StepSaliency | list[StepSaliency]:
    """Map attention alone by steps, in one forward pass: what saliency is to be compared with.

    Attention says where a token looks, saliency how much its loss depends on what it sees there. Pooled as saliency
    is, over the same rows: those that predict a token.

    Args:
        model, trace, engine, layers, reduce, stepflow, keep_heads, keep_tokens, progress: see `step_saliency`.

    Returns:
        Maps with target="attention": the mean attention of a pair under reduce="density", the attention of a query token
        on a step under reduce="mass".

    Raises:
        ValueError, MemoryError, FloatingPointError: as `step_saliency`.
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
    reduce: Literal["density", "mass"],
    stepflow: StepFlowConfig | None,
    keep_heads: bool,
    keep_tokens: bool,
    progress: bool,
) -> StepSaliency | list[StepSaliency]:
    _one_of("engine", engine, ("auto", "pattern", "streamed"))
    _one_of("reduce", reduce, ("density", "mass"))
    chosen = layer_indices(layers, model.cfg.n_layers)
    if not chosen:
        raise ValueError(f'layers={layers!r} names no layer, so there is nothing to map; use "all"')
    traces: Sequence[Trace] = trace if isinstance(trace, Sequence) else [trace]
    for one in traces:
        _check_trace(model, one)
    workspace = Workspace()
    results = []
    cut = _one_segmentation(traces) if stepflow is not None or active_flow(model) else None
    with open_stepflow(model, stepflow, segmentation=cut) if stepflow is not None else nullcontext():
        flow = active_flow(model)
        agreed_segmentation(model, cut)
        only_pattern = (
            "token maps are whole" if keep_tokens else "StepFlow edits whole patterns" if flow else why_not(model)
        )
        plans = [
            plan(
                model, len(one.tokens), len(one.steps), engine=engine, layers=chosen, keep_heads=keep_heads,
                keep_tokens=keep_tokens, forward_only=target == "attention", only_pattern=only_pattern,
            )
            for one in traces
        ]  # fmt: skip
        several = tqdm(
            zip(traces, plans, strict=True), "traces", len(traces), delay=2, disable=not progress or len(traces) < 2
        )
        for one, planned in several:
            options: dict[str, Any] = {"layers": chosen, "target": target, "keep_heads": keep_heads}
            arguments = (model, one.tokens, one.step_ids, len(one.steps))
            with tqdm(total=len(chosen), desc="layers", disable=not progress, delay=2, leave=len(traces) < 2) as bar:
                options["on_layer"] = bar.update
                if planned.engine == "streamed":
                    maps = streamed_maps(
                        *arguments, **options, n_rows=planned.n_rows, n_kept=planned.n_kept, workspace=workspace
                    )
                else:
                    maps = pattern_maps(*arguments, **options, keep_tokens=keep_tokens)
            metadata: dict[str, Any] = {
                "engine": planned.engine,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            }
            if flow:
                metadata["stepflow"] = flow.config.to_dict()
            results.append(_labelled(model, one, maps, chosen, target, reduce, metadata))
    return results if isinstance(trace, Sequence) else results[0]


def _labelled(
    model: TransformerBridge,
    trace: Trace,
    maps: PooledMaps,
    layers: tuple[int, ...],
    target: Target,
    reduce: Literal["density", "mass"],
    metadata: dict[str, Any],
) -> StepSaliency:
    step_ids, n_steps = trace.step_ids, len(trace.steps)
    counts, rows = pair_counts(step_ids, n_steps), row_counts(step_ids, n_steps)
    return StepSaliency(
        values=reduce_blocks(maps.sums, counts, rows, reduce),
        **labels_of(trace),
        layers=layers,
        target=target,
        reduce=reduce,
        model=model.cfg.model_name,
        n_layers=model.cfg.n_layers,
        head_values=None if maps.head_sums is None else reduce_blocks(maps.head_sums, counts, rows, reduce),
        token_values=maps.tokens,
        metadata=metadata,
    )


def _one_segmentation(traces: Sequence[Trace]) -> Segmentation:
    """Return the segmentation of all traces, for StepFlow to follow.

    Raises:
        ValueError: traces that were cut in different ways.
    """
    first = traces[0].segmentation
    if other := next((trace.segmentation for trace in traces if trace.segmentation != first), None):
        raise ValueError(f"the traces were cut with {first} and {other}: map them one by one under StepFlow")
    return first


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


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{what}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")
