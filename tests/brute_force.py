"""Step-Saliency the slow way, written from the definition: T backward passes, a double loop over steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


def token_saliency(model: TransformerBridge, tokens: Tensor, target: str) -> Tensor:
    """|A * dL/dA| averaged over heads, [layer, query_pos, key_pos], by plain autograd on the patterns."""
    return head_saliency(model, tokens, target).mean(1)


def head_saliency(model: TransformerBridge, tokens: Tensor, target: str) -> Tensor:
    """|A * dL/dA|, [layer, head, query_pos, key_pos]."""
    patterns: dict[str, Tensor] = {}

    def keep(pattern: Tensor, hook: object) -> Tensor:
        pattern = pattern if pattern.requires_grad else pattern.detach().requires_grad_()
        patterns[hook.name] = pattern
        return pattern

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        logits = model(tokens[None], attention_mask=torch.ones_like(tokens)[None])
    if target == "logit":
        of_rows = logits[0, :-1]
        losses = of_rows[torch.arange(len(of_rows)), tokens[1:]] - of_rows.mean(-1)
    else:
        losses = F.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
    a = [patterns[name] for name in names]
    if target == "sequence":
        gradients = torch.autograd.grad(losses.sum(), a)
        return torch.stack([(x * g).abs()[0].detach() for x, g in zip(a, gradients, strict=True)])
    result = torch.zeros(len(names), model.cfg.n_heads, len(tokens), len(tokens))
    for t in range(len(losses)):
        gradients = torch.autograd.grad(losses[t], a, retain_graph=True)
        for layer, (x, g) in enumerate(zip(a, gradients, strict=True)):
            result[layer, :, t] = (x * g).abs()[0, :, t].detach()
    return result


def pool(token_map: Tensor, step_ids: Tensor, n_steps: int, how: str) -> Tensor:
    """Pool [query_pos, key_pos] by a double loop over steps: pairs k <= t, rows with a target."""
    n = len(step_ids)
    result = torch.zeros(n_steps, n_steps)
    for i in range(n_steps):
        for j in range(n_steps):
            rows = [t for t in range(n - 1) if step_ids[t] == i]
            pairs = [(t, k) for t in rows for k in range(t + 1) if step_ids[k] == j]
            total = sum(float(token_map[t, k]) for t, k in pairs)
            size = len(pairs) if how == "density" else len(rows)
            result[i, j] = total / size if size else 0.0
    return result
