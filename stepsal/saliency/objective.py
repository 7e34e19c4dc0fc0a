"""What is differentiated: for each query row the loss of its next token, or the logit of that token.

The gradient of the loss L_t = -log p(token t + 1) has the factor 1 - p, roughly, so that it vanishes where the model is
sure: the rows of one map can lie twelve orders of magnitude apart, and what a sure step relies on is lost. The logit of
the written token does not saturate. Logits are only defined up to a constant for each row, which no probability depends
on; so the logit is centred: its mean over the vocabulary is taken off it, and what moves all alike counts for nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stepsal.maps.step_saliency import Target


def objective(
    logits: Float[Tensor, "row d_vocab"], next_tokens: Int[Tensor, " row"], target: Target
) -> Float[Tensor, ""]:
    """Return the sum over query rows of what a target differentiates.

    Args:
        logits: logits of the rows, in float32 or float64.
        next_tokens: the token after each row.
        target: "logit" for the centred logits of these tokens; else for their losses, in nats.

    Example:
        >>> import torch
        >>> from stepsal.saliency.objective import objective
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> objective(logits, torch.tensor([0]), "logit"), objective(logits + 5, torch.tensor([0]), "logit")
        (tensor(1.), tensor(1.))
    """
    if target == "logit":
        written = logits.gather(-1, next_tokens.unsqueeze(-1)).squeeze(-1)
        return (written - logits.mean(-1)).sum()
    return F.cross_entropy(logits, next_tokens, reduction="sum")
