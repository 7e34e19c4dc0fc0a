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
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.gradients import differentiable
from stepsal.bridge.hooks import Hook, attention_hooks, first_hooks_on
from stepsal.maps.pooling import pool_steps
from stepsal.saliency.objective import objective
from stepsal.saliency.own_position import own_position_hooks
from stepsal.saliency.request import MapRequest, PooledMaps, check_finite, explained


def pattern_maps(
    model: TransformerBridge, request: MapRequest, *, on_layer: Callable[[], object] = lambda: None
) -> PooledMaps:
    """Sum |A * dL/dA| over step blocks in every requested layer, from whole patterns.

    Args:
        model: any model that `stepsal.bridge.check.check_model` accepts.
        request: the trace, and the maps to make of it.
        on_layer: called whenever a layer has been pooled.

    Raises:
        FloatingPointError: the map of a layer holds NaN or inf; the message says where they come from.
    """
    pool = _Pool(request, next(model.parameters()).device, on_layer)
    with explained(model, request.tokens):
        if request.target == "attention":
            _read(model, request, pool)
        else:
            _differentiate(model, request, pool)
    return pool.maps()


class _Pool:
    """The pooled maps of layers, in whatever order they come."""

    def __init__(self, request: MapRequest, device: torch.device, on_layer: Callable[[], object]) -> None:
        self._request, self._on_layer = request, on_layer
        self._step_ids = request.step_ids.to(device)
        self._sums: dict[int, Tensor] = {}
        self._head_sums: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}

    def add(self, layer: int, token_maps: Float[Tensor, "head query_pos key_pos"]) -> None:
        """Take the mean over heads and the sums over step blocks.

        Raises:
            FloatingPointError: NaN or inf.
        """
        n_steps, mean = self._request.n_steps, token_maps.mean(0)
        self._sums[layer] = pool_steps(mean, self._step_ids, n_steps).cpu()
        if self._request.keep_heads:
            self._head_sums[layer] = pool_steps(token_maps, self._step_ids, n_steps).cpu()
        if (positions := self._request.token_positions) is not None:
            positions = positions.to(mean.device)
            self._tokens[layer] = mean[positions][:, positions].cpu()
        check_finite(layer, self._sums[layer])
        self._on_layer()

    def maps(self) -> PooledMaps:
        sums, head_sums, tokens = (
            torch.stack([of_layer[layer] for layer in self._request.layers]) if of_layer else None
            for of_layer in (self._sums, self._head_sums, self._tokens)
        )
        assert sums is not None
        return PooledMaps(sums, head_sums, tokens)


def _differentiate(model: TransformerBridge, request: MapRequest, pool: _Pool) -> None:
    """Pool |A * dL/dA| in one forward and one backward pass, with L what the request's target differentiates."""
    lowest = request.layers[0]
    first_hooks: list[tuple[str, Hook]] = []
    last_hooks: list[tuple[str, Hook]] = []
    for layer in range(lowest, model.cfg.n_layers):
        if request.own_position and layer > lowest:  # in the lowest layer nothing but the pattern has a gradient
            own = own_position_hooks(model, layer)
            first_hooks += own.first
            last_hooks += own.last
        if layer in request.layers:
            last_hooks.append(
                (attention_hooks(model, layer)["pattern"], _multiplying(layer, pool, leaf=layer == lowest))
            )
    tokens = request.tokens.to(next(model.parameters()).device)
    with differentiable(model), first_hooks_on(model, first_hooks), model.hooks(fwd_hooks=last_hooks):
        inputs = tokens[None].clone()  # a copy made here is no inference tensor
        logits = model(inputs, attention_mask=torch.ones_like(inputs), return_type="logits")  # [batch=1, pos, d_vocab]
        objective(logits[0, :-1].float(), inputs[0, 1:].to(logits.device), request.target).backward()


def _multiplying(layer: int, pool: _Pool, *, leaf: bool) -> Hook:
    """Make a hook on a pattern that pools |A * dL/dA| when the backward pass comes by; at a `leaf` the graph starts."""

    def hook(pattern: Tensor, hook: HookPoint) -> Tensor | None:  # [batch=1, head, query_pos, key_pos]
        if leaf:
            pattern = pattern.detach().requires_grad_()
        a = pattern.detach()

        def multiply(gradient: Tensor) -> None:
            pool.add(layer, (a[0].float() * gradient[0].float()).abs_())  # [head, query_pos, key_pos]

        pattern.register_hook(multiply)
        return pattern if leaf else None

    return hook


def _read(model: TransformerBridge, request: MapRequest, pool: _Pool) -> None:
    """Pool the patterns of a forward pass, one after the other."""

    def pooling(layer: int) -> Hook:
        def hook(pattern: Tensor, hook: HookPoint) -> None:  # [batch=1, head, query_pos, key_pos]
            pool.add(layer, pattern[0].float())

        return hook

    def keep_last(x: Tensor, hook: HookPoint) -> Tensor:  # [batch=1, pos, d_model]; the logits are not used
        return x[:, -1:]

    hooks: list[tuple[str, Hook]] = [
        (attention_hooks(model, layer)["pattern"], pooling(layer)) for layer in request.layers
    ]
    tokens = request.tokens.to(next(model.parameters()).device)[None]
    with differentiable(model), torch.no_grad(), model.hooks(fwd_hooks=[*hooks, ("unembed.hook_in", keep_last)]):
        model(tokens, attention_mask=torch.ones_like(tokens), return_type="logits")
