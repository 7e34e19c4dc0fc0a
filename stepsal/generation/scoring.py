"""How likely a model finds the tokens of a trace."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge

from stepsal.trace.trace import Trace

_CHUNK = 1024  # positions whose logits are copied to float32 at a time


@torch.no_grad()
def log_probabilities(model: TransformerBridge, trace: Trace) -> Float[Tensor, " target"]:
    """Return log p(token t + 1 | tokens up to t) for t = 0 .. T - 2, in nats, at temperature 1.

    One forward pass, under whatever edits the model. The values of the answer begin at `trace.n_prompt - 1`.

    Args:
        model: that is asked, which need not be the one that wrote the trace.
        trace: of T tokens.

    Returns:
        float32, on the CPU.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.generate(model, "Anna is 3. What is Anna?", max_new_tokens=20)
        >>> log_probabilities(model, trace).shape == (len(trace) - 1,)
        True
    """
    tokens = trace.tokens.to(next(model.parameters()).device)
    logits = model(tokens[None], attention_mask=torch.ones_like(tokens)[None])[0, :-1]  # [pos, d_vocab]
    targets = tokens[1:].to(logits.device)
    losses = [
        cross_entropy(logits[i : i + _CHUNK].float(), targets[i : i + _CHUNK], reduction="none").cpu()
        for i in range(0, len(targets), _CHUNK)
    ]
    return -torch.cat(losses)
