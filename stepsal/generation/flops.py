"""Count the floating-point operations of decoding, by torch's FlopCounterMode on a few forward passes of the model.

The counter counts matrix products and fused attention. With the keys of all earlier positions in a cache, those of one
pass are a polynomial: of n tokens at once, c0 + c1 n + c2 n^2; of one token after n others, d0 + d1 n, where a layer
with a sliding window sees no more than its window. A few passes give the coefficients exactly, and then any answer's
cost follows from its lengths. StepFlow's edits take less than three thousandths of it and are left out; they show in
the measured times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from stepsal.bridge.attention import sliding_window

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LENGTHS = (8, 16, 24)  # tokens of the passes that are counted: three, for a polynomial of degree two


@dataclass(frozen=True)
class DecodingFlops:
    """The cost of an answer in floating-point operations (FLOPs), as a function of the lengths of prompt and answer.

    Attributes:
        prompt: coefficients c0, c1, c2 of a pass over a whole prompt.
        token: coefficients d0, d1 of a pass over one token, with the earlier ones in the cache.
        windows: sliding window of each layer, in keys, the token itself included; None without a window.

    Example:
        >>> from stepsal.generation.flops import DecodingFlops
        >>> DecodingFlops(prompt=(0, 2, 0), token=(2, 0), windows=(None,)).of(n_prompt=10, n_new=4)
        26.0
    """

    prompt: tuple[float, float, float]
    token: tuple[float, float]
    windows: tuple[int | None, ...]

    def of(self, n_prompt: int, n_new: int) -> float:
        """Return the FLOPs of one answer, whose last token costs nothing since the model does not read it.

        Args:
            n_prompt: number of tokens of the prompt.
            n_new: number of tokens of the answer, at least one.
        """
        read = n_new - 1
        cached = n_prompt + np.arange(read)  # tokens before that of each pass
        seen = np.mean([np.minimum(cached, w - 1 if w else cached).sum() for w in self.windows])  # layers are alike
        c0, c1, c2 = self.prompt
        return c0 + c1 * n_prompt + c2 * n_prompt**2 + self.token[0] * read + self.token[1] * float(seen)


@torch.no_grad()
def decoding_flops(model: TransformerBridge) -> DecodingFlops:
    """Return the cost of answers of a model, from the counts of a few short passes.

    Args:
        model: from `stepsal.load`.

    Raises:
        ValueError: a sliding window is too short for the passes that are counted.

    Example:
        >>> from stepsal.generation.flops import decoding_flops
        >>> flops = decoding_flops(stepsal.load("mini"))
        >>> flops.of(n_prompt=100, n_new=50) < flops.of(n_prompt=100, n_new=51)
        True
    """
    windows = tuple(sliding_window(model, layer) for layer in range(model.cfg.n_layers))
    if (shortest := min((w for w in windows if w), default=None)) and shortest <= LENGTHS[-1]:
        raise ValueError(f"a sliding window of {shortest} keys is too short to count from {LENGTHS} tokens")
    device = next(model.parameters()).device

    def ids(n: int) -> torch.Tensor:
        return torch.zeros(1, n, dtype=torch.long, device=device)

    prompts, tokens = [], []
    for n in LENGTHS:
        with FlopCounterMode(display=False) as counter:
            _, cache = model(ids(n), attention_mask=torch.ones_like(ids(n)), return_type="logits_and_cache",
                             use_cache=True, logits_to_keep=1)  # fmt: skip
        prompts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            model(ids(1), attention_mask=torch.ones_like(ids(n + 1)), past_key_values=cache,
                  return_type="logits_and_cache", use_cache=True, logits_to_keep=1)  # fmt: skip
        tokens.append(counter.get_total_flops())
    c2, c1, c0 = np.polyfit(LENGTHS, prompts, 2)
    d1, d0 = np.polyfit(LENGTHS, tokens, 1)
    return DecodingFlops((float(c0), float(c1), float(c2)), (float(d0), float(d1)), windows)
