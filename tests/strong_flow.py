"""A text with thinking and summary, and a StepFlow so strong that whatever is wrong with it must show."""

from __future__ import annotations

from stepsal import Segmentation, StepFlowConfig

STRONG = StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.5, alpha=0.8, into_summary=True)
HEADS = STRONG.but(
    oeb_layers={0: [1], 1: {0: 0.5, 3: 0.2}, 2: [0, 1], -1: [0, 2]}, smi_layers={0: {1: 0.9, 2: 0.4}, 2: [0, 3]}
)  # of models with four layers of four heads
THINK = Segmentation("think")  # the names and templates of the tiny models do not tell it for all of them
RESPONSE = (
    "First we read the list of names. Then we count 3.5 of them, e.g. twice. The sum of it is seven.\n\n"
    "So we have it now.</think>The answer is seven. That is all of it."
)
