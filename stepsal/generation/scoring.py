"""Score the tokens of a trace by their log-probabilities under a model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.native import native
from stepsal.intervention import agreed_segmentation
from stepsal.trace.trace import Trace

_CHUNK = 1024  # positions whose logits are copied to float32 at a time


@torch.no_grad()
def log_probabilities(model: TransformerBridge, trace: Trace) -> Float[Tensor, " target"]:
    """Return log p(token t + 1 | tokens up to t) for t = 0 .. T - 2, in nats, at temperature 1.

    They come from one forward pass, with the hooks that are on the model. Values of the answer begin at index
    `trace.n_prompt - 1`.

    Args:
        model: any model with the tokens of the trace, not only the one that wrote it.
        trace: a trace of T tokens.

    Returns:
        One value for each token but the first, float32 on the CPU.

    Raises:
        ValueError: a StepFlow is open with another segmentation than that of the trace.

    Example:
        >>> from stepsal.generation.scoring import log_probabilities
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.generate(model, "Anna is 3 plus 4. What is Anna?", max_new_tokens=20)
        >>> log_probabilities(model, trace).shape == (len(trace) - 1,)
        True
    """
    agreed_segmentation(model, trace.segmentation)
    tokens = trace.tokens.to(next(model.parameters()).device)
    with native(model):
        logits = model(tokens[None], attention_mask=torch.ones_like(tokens)[None])[0, :-1]  # [pos, d_vocab]
    targets = tokens[1:].to(logits.device)
    losses = [
        cross_entropy(logits[i : i + _CHUNK].float(), targets[i : i + _CHUNK], reduction="none").cpu()
        for i in range(0, len(targets), _CHUNK)
    ]
    return -torch.cat(losses)
