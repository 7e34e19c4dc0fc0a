"""The pattern engine: A and dL/dA taken at `attn.hook_pattern`, multiplied and pooled inside the backward pass.

The forward hook of a layer sees the pattern A and registers a tensor hook on it; when the backward pass reaches the
layer, that hook gets dL/dA, forms |A * dL/dA|, means it over heads and pools it into steps at once. No gradient
outlives its layer, and there is one [head, query_pos, key_pos] product at a time. What stays is what autograd needs:
the patterns of the layers from the lowest requested one upwards.

All parameters are frozen; the graph starts at the lowest requested pattern, which becomes a leaf. Nothing below it is
differentiated, and no parameter gradient is computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge import attention_hooks, first_hooks_on
from stepsal.pooling import pool_steps
from stepsal.saliency.common import PooledMaps, check_finite, differentiable
from stepsal.saliency.own_position import Hook, own_position_hooks


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
) -> PooledMaps:
    """Sum |A * dL/dA| over step blocks in every layer of `layers`; see `stepsal.step_saliency` for the meaning.

    Raises:
        FloatingPointError: NaN or inf in the saliency of a layer.
    """
    device = next(model.parameters()).device
    step_ids = step_ids.to(device)
    sums: dict[int, Tensor] = {}
    head_sums: dict[int, Tensor] = {}
    token_maps: dict[int, Tensor] = {}

    def capture(layer: int) -> Hook:
        def hook(pattern: Tensor, hook: HookPoint) -> Tensor | None:  # [batch=1, head, query_pos, key_pos]
            first = layer == layers[0]
            if first:  # the graph starts here
                pattern = pattern.detach().requires_grad_()
            a = pattern.detach()

            def pool(gradient: Tensor) -> None:
                saliency = (a[0].float() * gradient[0].float()).abs_()  # [head, query_pos, key_pos]
                if keep_heads:
                    head_sums[layer] = pool_steps(saliency, step_ids, n_steps).cpu()
                mean = saliency.mean(0)  # [query_pos, key_pos]
                sums[layer] = pool_steps(mean, step_ids, n_steps).cpu()
                if keep_tokens:
                    token_maps[layer] = mean.cpu()
                check_finite(layer, sums[layer])

            pattern.register_hook(pool)
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
        loss = F.cross_entropy(logits[0, :-1].float(), inputs[0, 1:], reduction="sum")
        loss.backward()

    def stack(maps: dict[int, Tensor]) -> Tensor:
        return torch.stack([maps[layer] for layer in layers])

    return PooledMaps(
        sums=stack(sums),
        head_sums=stack(head_sums) if keep_heads else None,
        tokens=stack(token_maps) if keep_tokens else None,
    )
