"""Compare the next-token distributions without and with StepFlow at each token of an answer.

A finished answer is read again, once as it is and once under StepFlow. Where the answer is greedy, an answer that is
written under StepFlow departs from it at the first token at which the most likely token differs.

Momentum is injected while the *first* token of a step is read. So it can't change that token itself: the first token
that it acts on directly is the second one of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stepsal.bridge.unembedding import LateLogits
from stepsal.intervention.config import StepFlowConfig
from stepsal.intervention.hooks import active_flow
from stepsal.intervention.hooks import stepflow as open_stepflow

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.trace import Trace

CHUNK = 256  # tokens whose distributions are in double precision at a time


@torch.no_grad()
def token_effects(
    model: TransformerBridge, trace: Trace, stepflow: StepFlowConfig | Mapping[str, StepFlowConfig]
) -> pd.DataFrame:
    """Compare the next-token distributions without and with StepFlow at each token of an answer.

    StepFlow finds sections and steps by `trace.segmentation`, as the trace does.

    Args:
        model: from `stepsal.load`, or another `TransformerBridge` whose attention patterns are exposed at
            `attn.hook_pattern`; with a tokenizer.
        trace: the trace whose answer is read, in one forward pass without StepFlow and one for each of the settings.
        stepflow: settings, or several by name.

    Returns:
        One row per token of the answer, in order. Each row compares the two distributions from which its token comes,
        those at the position before it. Columns:

        - position: position of the token in the trace
        - step: step of the token; -1 in the template
        - role: role of the step; "template" in the template
        - in_step: position within its step, from 0; -1 in the template
        - entropy: entropy of the distribution without StepFlow, nats
        - kl: KL(without || with), nats
        - switched: True where the most likely token differs
        - variant: name of the settings; only where several were given, whose rows follow one another

    Raises:
        ValueError: a `stepsal.stepflow` context is open already, or there are no settings.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.generate(model, "Anna is 2 plus 3. What is Anna?", max_new_tokens=40)
        >>> effects = stepsal.token_effects(model, trace, stepsal.StepFlowConfig(tau_max=0.3))
        >>> len(effects) == len(trace) - trace.n_prompt, bool(effects["kl"].max() > 0.001)
        (True, True)
    """
    import pandas as pd

    if active_flow(model) is not None:
        raise ValueError(
            "a stepflow context is open, and would edit both readings: leave it, and pass its settings as stepflow="
        )
    if not isinstance(stepflow, StepFlowConfig) and not stepflow:
        raise ValueError("stepflow={} holds no settings: pass a StepFlowConfig, or several by name")
    tokens = _answer_tokens(trace)
    before = _next_tokens(model, trace)

    def effects_of(config: StepFlowConfig) -> pd.DataFrame:
        with open_stepflow(model, config, segmentation=trace.segmentation):
            after = _next_tokens(model, trace)
        pairs = zip(before.portions(CHUNK), after.portions(CHUNK), strict=True)
        return pd.concat([tokens, pd.concat([_compare(*pair) for pair in pairs], ignore_index=True)], axis=1)

    if isinstance(stepflow, StepFlowConfig):
        return effects_of(stepflow)
    return pd.concat([effects_of(config).assign(variant=name) for name, config in stepflow.items()], ignore_index=True)


def _answer_tokens(trace: Trace) -> pd.DataFrame:
    """Return the place of each token of the answer: position, step, role, in_step."""
    import pandas as pd

    positions = np.arange(trace.n_prompt, len(trace))
    step_ids = trace.step_ids.numpy()[positions]
    starts = np.array([step.start for step in trace.steps])
    roles = ["template" if i < 0 else trace.steps[i].role for i in step_ids]
    in_step = np.where(step_ids < 0, -1, positions - starts[step_ids])
    return pd.DataFrame({"position": positions, "step": step_ids, "role": roles, "in_step": in_step})


def _next_tokens(model: TransformerBridge, trace: Trace) -> LateLogits:
    """Return the logits from which each token of the answer comes."""
    return LateLogits(model, trace.tokens, trace.n_prompt - 1, len(trace) - 1)


def _compare(before: Float[Tensor, "token d_vocab"], after: Float[Tensor, "token d_vocab"]) -> pd.DataFrame:
    """Compare rows of logits, in double precision, as a small divergence is a difference of large terms."""
    import pandas as pd

    log_p, log_q = before.cpu().double().log_softmax(-1), after.cpu().double().log_softmax(-1)
    p = log_p.exp()
    return pd.DataFrame(
        {
            "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1).numpy(),
            "kl": torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).numpy(),
            "switched": (log_p.argmax(-1) != log_q.argmax(-1)).numpy(),
        }
    )
