"""The pattern engine: A and dL/dA taken at `attn.hook_pattern`, multiplied and pooled inside the backward pass.

The forward hook of a layer sees the pattern A and registers a tensor hook on it; when the backward pass reaches the
layer, that hook gets dL/dA, forms |A * dL/dA|, means it over heads and pools it into steps at once. No gradient
outlives its layer, and there is one [head, query_pos, key_pos] product at a time. What stays is what autograd needs:
the patterns of the layers from the lowest requested one upwards.

All parameters are frozen; the graph starts at the lowest requested pattern, which becomes a leaf. Nothing below it is
differentiated, and no parameter gradient is computed.

For target="attention" A alone is pooled, in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.hooks import attention_hooks, first_hooks_on
from stepsal.maps.pooling import pool_steps
from stepsal.saliency.common import PooledMaps, check_finite, differentiable
from stepsal.saliency.own_position import Hook, own_position_hooks


class _Pool:
    """Pooled maps of layers, in whatever order they come."""

    def __init__(
        self,
        step_ids: Int[Tensor, " pos"],
        n_steps: int,
        keep_heads: bool,
        keep_tokens: bool,
        on_layer: Callable[[], object],
    ) -> None:
        self.step_ids, self.n_steps = step_ids, n_steps
        self.keep_heads, self.keep_tokens, self.on_layer = keep_heads, keep_tokens, on_layer
        self.sums: dict[int, Tensor] = {}
        self.head_sums: dict[int, Tensor] = {}
        self.tokens: dict[int, Tensor] = {}

    def add(self, layer: int, maps: Float[Tensor, "head query_pos key_pos"]) -> None:
        """Mean over heads, sum over step blocks.

        Raises:
            FloatingPointError: NaN or inf.
        """
        if self.keep_heads:
            self.head_sums[layer] = pool_steps(maps, self.step_ids, self.n_steps).cpu()
        mean = maps.mean(0)
        self.sums[layer] = pool_steps(mean, self.step_ids, self.n_steps).cpu()
        if self.keep_tokens:
            self.tokens[layer] = mean.cpu()
        check_finite(layer, self.sums[layer])
        self.on_layer()

    def result(self, layers: tuple[int, ...]) -> PooledMaps:
        kept = (torch.stack([m[layer] for layer in layers]) if m else None for m in (self.head_sums, self.tokens))
        return PooledMaps(torch.stack([self.sums[layer] for layer in layers]), *kept)


def pattern_maps(
    model: TransformerBridge,
    tokens: Int[Tensor, " pos"],
    step_ids: Int[Tensor, " pos"],
    n_steps: int,
    *,
    layers: tuple[int, ...],
    target: str,
    keep_heads: bool = False,
    keep_tokens: bool = False,
    on_layer: Callable[[], object] = lambda: None,
) -> PooledMaps:
    """Sum |A * dL/dA| over step blocks in every layer of `layers`; see `stepsal.step_saliency` for the meaning.

    Args:
        target: "token", "sequence", or "attention" for A alone.
        on_layer: called whenever a layer has been pooled.

    Raises:
        FloatingPointError: NaN or inf in the map of a layer.
    """
    device = next(model.parameters()).device
    pool = _Pool(step_ids.to(device), n_steps, keep_heads, keep_tokens, on_layer)
    if target == "attention":
        _forward(model, tokens.to(device), layers, pool)
        return pool.result(layers)

    def capture(layer: int) -> Hook:
        def hook(pattern: Tensor, hook: HookPoint) -> Tensor | None:  # [batch=1, head, query_pos, key_pos]
            first = layer == layers[0]
            if first:  # the graph starts here
                pattern = pattern.detach().requires_grad_()
            a = pattern.detach()

            def multiply(gradient: Tensor) -> None:
                pool.add(layer, (a[0].float() * gradient[0].float()).abs_())  # [head, query_pos, key_pos]

            pattern.register_hook(multiply)
            return pattern if first else None

        return hook

    first_hooks: list[tuple[str, Hook]] = []
    fwd_hooks: list[tuple[str, Hook]] = []
    for layer in range(layers[0], model.cfg.n_layers):
        if target == "token" and layer > layers[0]:  # in the lowest layer nothing but the pattern has a gradient
            own = own_position_hooks(model, layer)
            first_hooks += own.first
            fwd_hooks += own.last
        if layer in layers:
            fwd_hooks.append((attention_hooks(layer)["pattern"], capture(layer)))

    with differentiable(model), first_hooks_on(model, first_hooks), model.hooks(fwd_hooks=fwd_hooks):
        inputs = tokens.to(device)[None].clone()  # a copy made here is no inference tensor
        logits = model(inputs, attention_mask=torch.ones_like(inputs), return_type="logits")
        loss = F.cross_entropy(logits[0, :-1].float(), inputs[0, 1:].to(logits.device), reduction="sum")
        loss.backward()
    return pool.result(layers)


def _forward(model: TransformerBridge, tokens: Int[Tensor, " pos"], layers: tuple[int, ...], pool: _Pool) -> None:
    """Pool the patterns of a forward pass, one after the other."""

    def capture(layer: int) -> Hook:
        def hook(pattern: Tensor, hook: HookPoint) -> None:  # [batch=1, head, query_pos, key_pos]
            pool.add(layer, pattern[0].float())

        return hook

    def last(x: Tensor, hook: HookPoint) -> Tensor:  # [batch=1, pos, d_model]; nobody wants the logits
        return x[:, -1:]

    fwd_hooks = [(attention_hooks(layer)["pattern"], capture(layer)) for layer in layers]
    with differentiable(model), torch.no_grad(), model.hooks(fwd_hooks=[*fwd_hooks, ("unembed.hook_in", last)]):
        model(tokens[None], attention_mask=torch.ones_like(tokens)[None], return_type="logits")
