"""What StepFlow does to the next token: where in a step, how much, and how sure the model was there.

An answer is read again, once as it is and once under StepFlow, and the two next-token distributions are compared at
each of its tokens. For a greedy answer the first token at which the most likely one differs is where the answer written
under StepFlow parts from it.

Momentum is injected at the *first* token of a step, once that has been read. So it can't change which token that is:
the first token that it reaches directly is the second one of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stepsal.intervention import StepFlowConfig, active_flow
from stepsal.intervention import stepflow as open_stepflow

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.trace import Trace


@torch.no_grad()
def token_effects(model: TransformerBridge, trace: Trace, stepflow: StepFlowConfig) -> pd.DataFrame:
    """Compare the next-token distributions without and with StepFlow at each token of an answer.

    Args:
        model: from `stepsal.load`.
        trace: whose answer is read again; two forward passes.
        stepflow: settings.

    Returns:
        One row per token of the answer, in order. Columns: position (of the token, in the trace), step (-1: template),
        role, in_step (0 for the first token of a step; -1 in the template), entropy (nats, of the distribution without
        StepFlow from which the token comes), kl (nats, from that distribution to the one with StepFlow), switched (the
        most likely token differs), log_prob and log_prob_after (of the token that is there, without and with).

    Raises:
        ValueError: a `stepsal.stepflow` context is open already.
    """
    import pandas as pd

    if active_flow(model) is not None:
        raise ValueError("a stepflow context is open: leave it, and pass its settings as stepflow=")
    before = _next_token(model, trace)
    with open_stepflow(model, stepflow):
        after = _next_token(model, trace)
    positions = np.arange(trace.n_prompt, len(trace))
    step_ids = trace.step_ids.numpy()[positions]
    starts = np.array([step.start for step in trace.steps])
    written = trace.tokens[positions, None]
    return pd.DataFrame(
        {
            "position": positions,
            "step": step_ids,
            "role": ["template" if i < 0 else trace.steps[i].role for i in step_ids],
            "in_step": np.where(step_ids < 0, -1, positions - starts[step_ids]),
            "entropy": -_expected(before, before),
            "kl": _expected(before, before - after),
            "switched": (before.argmax(-1) != after.argmax(-1)).numpy(),
            "log_prob": before.gather(-1, written)[:, 0].numpy(),
            "log_prob_after": after.gather(-1, written)[:, 0].numpy(),
        }
    )


def _next_token(model: TransformerBridge, trace: Trace) -> Float[Tensor, "answer_token d_vocab"]:
    """Log-probabilities from which each token of the answer comes."""
    tokens = trace.tokens.to(next(model.parameters()).device)
    logits = model(tokens[None], attention_mask=torch.ones_like(tokens)[None])[0]
    return logits[trace.n_prompt - 1 : -1].cpu().double().log_softmax(-1)  # a small KL is a difference of large terms


def _expected(log_p: Float[Tensor, "token d_vocab"], x: Float[Tensor, "token d_vocab"]) -> Float[np.ndarray, " token"]:
    """Mean of x under p; what has no probability counts nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * x, 0.0).sum(-1).numpy()
