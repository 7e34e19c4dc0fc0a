"""How much memory an engine needs for a trace, on top of the model itself, and what to do with what is there.

The estimates count what autograd keeps with frozen parameters (inputs of linear maps are not kept, since no weight
wants a gradient) and the largest temporaries. A test holds them within a factor of two of the peaks measured on
SmolLM2-135M in float32 on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.attention import attention_of
from stepsal.bridge.devices import devices_of, free_bytes
from stepsal.saliency.streamed import LOGITS

_SMALL = 2**29  # bytes that nobody minds: patterns up to here are kept whole
_ALL_KEPT = 3 * 2**29  # bytes of activations up to which a CPU keeps those of all layers,
_KEPT = 2**28  # and, where all are more than that, of how many
_BLOCK = 2**25  # bytes of the blocks of attention on a CPU: rows enough for its matrix products, and near its caches
_BLOCK_CUDA = 2**30


@dataclass(frozen=True)
class Plan:
    """Which engine, with which settings, at which cost.

    Attributes:
        n_rows: query rows per block of the streamed engine.
        n_kept: its layers, from the top, whose activations are kept instead of computed again.
        n_bytes: estimate of the peak, the model left out.
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
    keep_tokens: bool,
    only_pattern: str | None,
    forward_only: bool = False,
) -> Plan:
    """Choose an engine for a trace and lay out its memory.

    "auto" keeps patterns whole as long as that is a small matter, and streams otherwise.

    Args:
        only_pattern: why the trace can't be streamed, if it can't.
        forward_only: there is no backward pass to keep anything for.

    Raises:
        ValueError: engine="streamed" where only patterns will do.
        MemoryError: what the engine needs is not free.
    """
    sizes = _Sizes(model, n_tokens, n_steps, layers, keep_heads, keep_tokens, forward_only)
    free = sum(map(free_bytes, devices_of(model)))  # of several, each has its layers
    if engine == "streamed" and only_pattern:
        raise ValueError(f'{only_pattern}: use engine="pattern"')
    patterns, streamed = Plan("pattern", 0, 0, sizes.patterns()), sizes.streamed(free)
    if engine == "auto":
        engine = "pattern" if only_pattern or patterns.n_bytes <= min(_SMALL, free) else "streamed"
    chosen = patterns if engine == "pattern" else streamed
    if chosen.n_bytes > free:
        rest = (
            "read a shorter trace, or fewer layers"
            if engine == "streamed" or only_pattern
            else f'use engine="streamed", which needs about {streamed.n_bytes / 1e9:.1f} GB'
        )
        raise MemoryError(
            f"the map of {n_tokens} tokens needs about {chosen.n_bytes / 1e9:.1f} GB with engine={engine!r}"
            f"{f' ({only_pattern})' if only_pattern else ''}, but {free / 1e9:.1f} GB are free: {rest}"
        )
    return chosen


def least_bytes(model: TransformerBridge, n_tokens: int, n_steps: int) -> tuple[int, int]:
    """What the streamed and the pattern engine need for the maps of all layers, whatever is free.

    The model may be a blueprint, without weights.
    """
    sizes = _Sizes(model, n_tokens, n_steps, tuple(range(model.cfg.n_layers)), False, False, False)
    return sizes.streamed(0).n_bytes, sizes.patterns()


class _Sizes:
    """Sizes in bytes of what the engines hold."""

    def __init__(
        self,
        model: TransformerBridge,
        n_tokens: int,
        n_steps: int,
        layers: tuple[int, ...],
        keep_heads: bool,
        keep_tokens: bool,
        forward_only: bool,
    ) -> None:
        cfg, parameter = model.cfg, next(model.parameters())
        self.cuda = parameter.device.type == "cuda"
        self.n_tokens, self.item, self.forward_only = n_tokens, parameter.element_size(), forward_only
        self.n_layers, self.d_model, self.d_vocab = cfg.n_layers - layers[0], cfg.d_model, cfg.d_vocab
        self.n_heads, self.n_kv_heads = cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads
        d_head = cfg.d_head
        # softmax in float32, its copy in the dtype of the model, the tanh of a soft-cap
        self.pair = 4 + (self.item if self.item != 4 else 0) + (self.item if attention_of(model, 0).softcap else 0)
        self.qkv = (self.n_heads + 2 * self.n_kv_heads) * d_head
        self.z = self.n_heads * d_head
        experts = getattr(cfg, "experts_per_token", None) or 1
        norms = 6 * self.d_model * max(1, 4 // self.item)  # of float32 copies
        # what a layer keeps for its backward pass, of each token
        self.layer = (
            norms * self.item + (2 * self.qkv + self.z + 3 * (cfg.d_mlp or 4 * self.d_model) * experts) * self.item
        )
        n_maps = len(layers) * (1 + keep_heads * self.n_heads)
        self.maps = 4 * (2 * n_maps * n_steps**2 + keep_tokens * len(layers) * n_tokens**2)

    def patterns(self) -> int:
        kept = self.n_layers * (self.n_heads * self.n_tokens**2 * self.pair + self.layer * self.n_tokens)
        passing = 4 * self.n_heads * self.n_tokens**2 * 4  # gradients of pattern and scores, the product
        if self.forward_only:  # one layer at a time, and no logits but the last
            return passing + self.layer * self.n_tokens + self.maps
        logits = 4 * self.n_tokens * self.d_vocab * 4
        return kept + max(passing, logits) + self.maps

    def streamed(self, free: int) -> Plan:
        # four buffers [group, row, key] and the sum over the group
        row = 4 * (4 * self.n_heads // self.n_kv_heads + 1) * self.n_tokens
        budget = min(_BLOCK_CUDA if self.cuda else _BLOCK, free // 8)
        n_rows = max(16, min(1024 if self.cuda else 128, budget // row))
        n_rows = min(n_rows, self.n_tokens)
        kept_layer = self.layer * self.n_tokens
        checkpoint = (self.d_model + self.z) * self.item * self.n_tokens
        passing = kept_layer + self.n_tokens * (2 * (self.qkv + self.z) * 4 + 4 * self.d_model * self.item)
        logits = 4 * 4 * min(LOGITS, self.n_tokens * self.d_vocab)
        n_bytes = max(passing, logits) + n_rows * row + self.maps
        if self.forward_only:
            return Plan("streamed", int(n_rows), 0, int(n_bytes))
        n_bytes += self.n_layers * checkpoint  # with all layers checkpointed; some can be kept if there is room
        few = _ALL_KEPT if self.n_layers * kept_layer <= min(_ALL_KEPT, free // 4) else _KEPT
        room = free // 2 - n_bytes if self.cuda else min(few, free // 4, free - n_bytes)
        n_kept = max(0, min(self.n_layers, int(room // kept_layer)))
        return Plan("streamed", int(n_rows), n_kept, int(n_bytes + n_kept * (kept_layer - checkpoint)))
