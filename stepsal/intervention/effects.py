"""What StepFlow does to the next token: where in a step, how much, and how sure the model was there.

An answer is read again, once as it is and once under StepFlow, and the two next-token distributions are compared at
each of its tokens. For a greedy answer the first token at which the most likely one differs is where the answer written
under StepFlow parts from it.

Momentum is injected at the *first* token of a step, once that has been read. So it can't change which token that is:
the first token that it reaches directly is the second one of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stepsal.intervention import StepFlowConfig, active_flow
from stepsal.intervention import stepflow as open_stepflow

CHUNK = 256  # tokens whose distributions are in double precision at a time

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.trace import Trace


@torch.no_grad()
def token_effects(
    model: TransformerBridge, trace: Trace, stepflow: StepFlowConfig | Mapping[str, StepFlowConfig]
) -> pd.DataFrame:
    """Compare the next-token distributions without and with StepFlow at each token of an answer.

    Args:
        model: from `stepsal.load`.
        trace: whose answer is read again; one forward pass, and one for each setting.
        stepflow: settings, or several by name.

    Returns:
        One row per token of the answer, in order; of several settings, one after the other, with their name in the
        column `variant`. Columns: position (of the token, in the trace), step (-1: template),
        role, in_step (0 for the first token of a step; -1 in the template), entropy (nats, of the distribution without
        StepFlow from which the token comes), kl (nats, from that distribution to the one with StepFlow), switched (the
        most likely token differs).

    Raises:
        ValueError: a `stepsal.stepflow` context is open already.
    """
    import pandas as pd

    if active_flow(model) is not None:
        raise ValueError("a stepflow context is open: leave it, and pass its settings as stepflow=")
    before = _next_token(model, trace)
    positions = np.arange(trace.n_prompt, len(trace))
    step_ids = trace.step_ids.numpy()[positions]
    starts = np.array([step.start for step in trace.steps])
    tokens = pd.DataFrame(
        {
            "position": positions,
            "step": step_ids,
            "role": ["template" if i < 0 else trace.steps[i].role for i in step_ids],
            "in_step": np.where(step_ids < 0, -1, positions - starts[step_ids]),
        }
    )
    frames = []
    for name, config in ({"": stepflow} if isinstance(stepflow, StepFlowConfig) else stepflow).items():
        with open_stepflow(model, config, segmentation=trace.segmentation):
            after = _next_token(model, trace)
        compared = [_compare(*each) for each in zip(before.split(CHUNK), after.split(CHUNK), strict=True)]
        of_token = {column: np.concatenate([chunk[column] for chunk in compared]) for column in compared[0]}
        frames.append(tokens.assign(**of_token, **({"variant": name} if name else {})))
    return pd.concat(frames, ignore_index=True)


def _next_token(model: TransformerBridge, trace: Trace) -> Float[Tensor, "answer_token d_vocab"]:
    """Logits from which each token of the answer comes."""
    tokens = trace.tokens.to(next(model.parameters()).device)
    logits = model(tokens[None], attention_mask=torch.ones_like(tokens)[None])[0]
    return logits[trace.n_prompt - 1 : -1].float().cpu()


def _compare(before: Float[Tensor, "token d_vocab"], after: Float[Tensor, "token d_vocab"]) -> dict[str, np.ndarray]:
    """What two rows of logits say; in double precision, as a small divergence is a difference of large terms."""
    log_p, log_q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    p = log_p.exp()
    return {
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1).numpy(),
        "kl": torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).numpy(),
        "switched": (before.argmax(-1) != after.argmax(-1)).numpy(),
    }
