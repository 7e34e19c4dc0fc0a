"""Estimate how much memory an engine needs for a trace, on top of the model itself, and choose the engine by it.

The estimates count what autograd keeps with frozen parameters (inputs of linear maps are not kept, since no weight has
a gradient) and the largest temporaries. A test holds them within a factor of two of the peaks measured on SmolLM2-135M
in float32 on a CPU.

`_Widths` are the sizes of one model, in elements and bytes; `_pattern_bytes` and `_streamed_plan` add up what each
engine holds of them; `plan` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.attention import attention_of
from stepsal.bridge.devices import devices_of, free_bytes
from stepsal.bridge.unembedding import MAX_LOGITS

FLOAT32 = 4
"""Bytes of a float32 number, in which softmaxes, losses and maps are computed whatever the dtype of the model."""

# --- when to keep what
_SMALL_PATTERNS = 2**29  # bytes up to which "auto" keeps whole patterns, which is faster on short traces
_ALL_LAYERS_KEPT = 3 * 2**29  # bytes of activations up to which a CPU keeps those of all layers: no recomputation
_SOME_LAYERS_KEPT = 2**28  # bytes of activations that it keeps where those of all layers are more than that
_SHARE_FOR_ALL_LAYERS = 4  # but never more than this fraction (1 / 4) of the free memory
_SHARE_FOR_LAYERS_CUDA = 2  # a GPU, on which nothing else runs, keeps as many layers as fit into this fraction (1 / 2)

# --- blocks of attention in the streamed engine
_BLOCK = 2**25  # bytes of a block on a CPU: rows enough for its matrix products, and near its caches
_BLOCK_CUDA = 2**30  # on a GPU: fewer and larger kernels
_SHARE_FOR_BLOCKS = 8  # a block takes at most this fraction (1 / 8) of the free memory
_FEWEST_ROWS = 16  # below, matrix products are mostly overhead
_MOST_ROWS = 128  # above, a CPU gains nothing
_MOST_ROWS_CUDA = 1024

# --- what is held at once, in tensors of the size that is named
_BLOCK_BUFFERS = 4  # [group, row, key]: scores, pattern, the slope of a soft-cap, |A * dA|; one more under StepFlow
_PATTERN_GRADIENTS = (
    4  # [head, query_pos, key_pos] in float32: gradients of pattern and scores, A * dA, and one in passing
)
_LOGIT_COPIES = 4  # [pos, d_vocab]: logits, their float32 copy, log-softmax, gradient
_NORM_COPIES = 6  # [pos, d_model] in float32: of each of two norms the input, its square, and the normalised input
_ROTATIONS = 2  # [pos, q and k and v]: as projected, and with norms and rotary embeddings applied
_MLP_TENSORS = 3  # [pos, d_mlp] of each expert in use: gate, its activation, up
_MLP_WIDTH = 4  # d_mlp / d_model where a model does not tell d_mlp
_STREAM_GRADIENTS = 4  # [pos, d_model]: the residual stream of a layer that is computed again, and its gradients
_ATTENTION_GRADIENTS = 2  # [pos, q and k and v and z] in float32: wide copies, and their gradients
_MAP_COPIES = 2  # [query_step, key_step] of each map: block sums, and the reduced map


@dataclass(frozen=True)
class Plan:
    """An engine with its settings, and the memory that it takes.

    Attributes:
        engine: "pattern" or "streamed".
        n_rows: query rows per block of the streamed engine.
        n_kept: number of layers, from the top, whose activations the streamed engine keeps instead of computing them
            again.
        n_bytes: estimate of the peak in bytes, the model itself left out.
    """

    engine: Literal["pattern", "streamed"]
    n_rows: int
    n_kept: int
    n_bytes: int


def plan(
    model: TransformerBridge,
    n_tokens: int,
    n_steps: int,
    *,
    engine: Literal["auto", "pattern", "streamed"],
    layers: tuple[int, ...],
    keep_heads: bool,
    only_pattern: str | None,
    n_kept_tokens: int = 0,
    forward_only: bool = False,
    bridged: bool = False,
) -> Plan:
    """Choose an engine for a trace and lay out its memory.

    "auto" keeps whole patterns as long as they are small, and streams otherwise.

    Args:
        model: the model.
        n_tokens: length of the trace in tokens.
        n_steps: number of its steps.
        engine: the requested engine.
        layers: indices of the layers to map, ascending.
        keep_heads: keep the map of every head.
        only_pattern: the reason why the trace can't be streamed; None if it can.
        n_kept_tokens: number of positions whose token maps are kept.
        forward_only: True where no backward pass follows, for which activations would be kept.
        bridged: True where StepFlow edits patterns.

    Raises:
        ValueError: engine="streamed" is requested for a trace that can't be streamed.
        MemoryError: the engine needs more memory than is free.

    Example:
        >>> from stepsal.saliency.memory import plan
        >>> layers = tuple(range(8))
        >>> plan(stepsal.load("mini"), 100, 9, engine="auto", layers=layers, keep_heads=False, only_pattern=None).engine
        'pattern'
    """
    if engine == "streamed" and only_pattern:
        raise ValueError(f'{only_pattern}: use engine="pattern"')
    free = sum(map(free_bytes, devices_of(model)))  # of several devices, each has its layers
    widths, n_layers = _Widths.of(model), model.cfg.n_layers - layers[0]  # nothing below the lowest layer is kept
    maps = _map_bytes(widths, n_steps, len(layers), keep_heads=keep_heads, n_kept_tokens=n_kept_tokens)
    patterns = Plan("pattern", 0, 0, maps + _pattern_bytes(widths, n_tokens, n_layers, forward_only=forward_only))
    streamed = _streamed_plan(widths, n_tokens, n_layers, maps, free, forward_only=forward_only, bridged=bridged)
    if engine == "auto":
        engine = "pattern" if only_pattern or patterns.n_bytes <= min(_SMALL_PATTERNS, free) else "streamed"
    chosen = patterns if engine == "pattern" else streamed
    if chosen.n_bytes > free:
        remedy = (
            "read a shorter trace, or fewer layers"
            if engine == "streamed" or only_pattern
            else f'use engine="streamed", which needs about {streamed.n_bytes / 1e9:.1f} GB'
        )
        raise MemoryError(
            f"the map of {n_tokens} tokens needs about {chosen.n_bytes / 1e9:.1f} GB with engine={engine!r}"
            f"{f' ({only_pattern})' if only_pattern else ''}, but {free / 1e9:.1f} GB are free: {remedy}"
        )
    return chosen


class LeastBytes(NamedTuple):
    """Bytes that the engines need for the maps of all layers, with the smallest buffers.

    Attributes:
        streamed: of the streamed engine.
        under_stepflow: of the streamed engine under StepFlow.
        patterns: of the pattern engine.
    """

    streamed: int
    under_stepflow: int
    patterns: int


def least_bytes(model: TransformerBridge, n_tokens: int, n_steps: int) -> LeastBytes:
    """Return the bytes that the engines need for the maps of all layers, with the smallest buffers.

    Args:
        model: the model; it may be without weights (`stepsal.bridge.loading.blueprint`).
        n_tokens: length of the trace in tokens.
        n_steps: number of its steps.
    """
    widths, n_layers = _Widths.of(model), model.cfg.n_layers
    maps = _map_bytes(widths, n_steps, n_layers, keep_heads=False, n_kept_tokens=0)
    streamed, under_stepflow = (
        _streamed_plan(widths, n_tokens, n_layers, maps, free=0, forward_only=False, bridged=bridged).n_bytes
        for bridged in (False, True)
    )
    return LeastBytes(streamed, under_stepflow, maps + _pattern_bytes(widths, n_tokens, n_layers, forward_only=False))


@dataclass(frozen=True)
class _Widths:
    """Sizes of a model that its activations go by.

    Attributes:
        on_cuda: the model is on a GPU.
        item: bytes of a parameter.
        d_model, d_vocab, n_heads, n_kv_heads: of the model.
        qkv: width of q, k and v together.
        z: width of the attention output before W_O.
        pair: bytes that are kept of each pair of positions in each head.
        token: bytes that a layer keeps of each token for its backward pass, patterns left out.
    """

    on_cuda: bool
    item: int
    d_model: int
    d_vocab: int
    n_heads: int
    n_kv_heads: int
    qkv: int
    z: int
    pair: int
    token: int

    @classmethod
    def of(cls, model: TransformerBridge) -> _Widths:
        cfg, parameter = model.cfg, next(model.parameters())
        item, n_kv_heads = parameter.element_size(), cfg.n_key_value_heads or cfg.n_heads
        qkv, z = (cfg.n_heads + 2 * n_kv_heads) * cfg.d_head, cfg.n_heads * cfg.d_head
        norms = _NORM_COPIES * cfg.d_model * max(FLOAT32, item)
        n_experts = getattr(cfg, "experts_per_token", None) or 1
        mlp = _MLP_TENSORS * (cfg.d_mlp or _MLP_WIDTH * cfg.d_model) * n_experts
        copy_of_softmax = item if item != FLOAT32 else 0  # in the dtype of the model
        tanh_of_softcap = item if attention_of(model, 0).softcap else 0
        return cls(
            on_cuda=parameter.device.type == "cuda",
            item=item,
            d_model=cfg.d_model,
            d_vocab=cfg.d_vocab,
            n_heads=cfg.n_heads,
            n_kv_heads=n_kv_heads,
            qkv=qkv,
            z=z,
            pair=FLOAT32 + copy_of_softmax + tanh_of_softcap,
            token=norms + (_ROTATIONS * qkv + z + mlp) * item,
        )


def _map_bytes(widths: _Widths, n_steps: int, n_layers: int, *, keep_heads: bool, n_kept_tokens: int) -> int:
    """Return the size of the results."""
    n_maps = n_layers * (1 + keep_heads * widths.n_heads)
    return FLOAT32 * _MAP_COPIES * (n_maps * n_steps**2 + n_layers * n_kept_tokens**2)


def _pattern_bytes(widths: _Widths, n_tokens: int, n_layers: int, *, forward_only: bool) -> int:
    """Return what the pattern engine holds at its peak, maps left out."""
    n_pairs = widths.n_heads * n_tokens**2
    passing = _PATTERN_GRADIENTS * n_pairs * FLOAT32
    if forward_only:  # one layer at a time, and no logits but the last
        return passing + widths.token * n_tokens
    kept = n_layers * (n_pairs * widths.pair + widths.token * n_tokens)
    logits = _LOGIT_COPIES * n_tokens * widths.d_vocab * FLOAT32
    return kept + max(passing, logits)


def _streamed_plan(
    widths: _Widths, n_tokens: int, n_layers: int, maps: int, free: int, *, forward_only: bool, bridged: bool = False
) -> Plan:
    """Return rows per block and kept layers of the streamed engine for the memory that is free, and its peak."""
    n_rows, row = _block_rows(widths, n_tokens, free, bridged=bridged)
    layer = widths.token * n_tokens
    checkpoint = (widths.d_model + widths.z) * widths.item * n_tokens  # input and z
    attention = _ATTENTION_GRADIENTS * (widths.qkv + widths.z) * FLOAT32 * n_tokens
    passing = layer + attention + _STREAM_GRADIENTS * widths.d_model * widths.item * n_tokens
    logits = _LOGIT_COPIES * FLOAT32 * min(MAX_LOGITS, n_tokens * widths.d_vocab)
    n_bytes = max(passing, logits) + n_rows * row + maps
    if forward_only:
        return Plan("streamed", n_rows, 0, n_bytes)
    n_bytes += n_layers * checkpoint  # with all layers checkpointed; some can be kept if there is room
    room = _room_for_layers(widths, n_layers * layer, n_bytes, free)
    n_kept = max(0, min(n_layers, room // layer))
    return Plan("streamed", n_rows, n_kept, n_bytes + n_kept * (layer - checkpoint))


def _block_rows(widths: _Widths, n_tokens: int, free: int, *, bridged: bool) -> tuple[int, int]:
    """Return the query rows of a block, and the bytes of a row: its buffers and their sum over the group."""
    row = FLOAT32 * ((_BLOCK_BUFFERS + bridged) * widths.n_heads // widths.n_kv_heads + 1) * n_tokens
    block = min(_BLOCK_CUDA if widths.on_cuda else _BLOCK, free // _SHARE_FOR_BLOCKS)
    most = _MOST_ROWS_CUDA if widths.on_cuda else _MOST_ROWS
    return min(n_tokens, max(_FEWEST_ROWS, min(most, block // row))), row


def _room_for_layers(widths: _Widths, all_layers: int, n_bytes: int, free: int) -> int:
    """Return the bytes of activations to keep instead of computing them again; below zero where nothing is left."""
    if widths.on_cuda:
        return free // _SHARE_FOR_LAYERS_CUDA - n_bytes
    share = free // _SHARE_FOR_ALL_LAYERS
    few = _ALL_LAYERS_KEPT if all_layers <= min(_ALL_LAYERS_KEPT, share) else _SOME_LAYERS_KEPT
    return min(few, share, free - n_bytes)
