"""Take the last residual stream of a pass, and compute logits from it in portions of rows.

The logits of a long text fill gigabytes: 8,000 tokens of a vocabulary of 150,000 are 5 GB in float32. Whoever needs
them row by row keeps the residual stream before the unembedding instead, a hundredth of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.attention import unembed
from stepsal.bridge.native import native

MAX_LOGITS = 2**23
"""Logits that are computed at a time."""


def last_residual(
    model: TransformerBridge, run: Callable[[], Float[Tensor, "batch pos d_vocab"]]
) -> tuple[Float[Tensor, "batch all_pos d_model"], bool]:
    """Return the residual stream before the unembedding of a pass, in which one position goes on to the unembedding.

    Args:
        model: a bridge.
        run: runs the pass and returns its logits, then those of the last position alone.

    Returns:
        The residual stream after the final norm, and True if `unembed` gives the pass's own logits of the last
        position; if it does not, the model does something to its logits that is not known here.
    """
    final: list[Tensor] = []

    def take(x: Tensor, hook: HookPoint) -> Tensor:  # [batch, pos, d_model]
        final.append(x)
        return x[:, -1:]

    with model.hooks(fwd_hooks=[("unembed.hook_in", take)]):
        logits = run()
    with torch.no_grad():
        expected = unembed(model, final[0][:, -1:])
        agrees = torch.allclose(expected, logits.to(expected.device), rtol=1e-3, atol=1e-4, equal_nan=True)
    return final[0], agrees


class LateLogits:
    """The logits of a text, which are computed when they are asked for, a portion of rows at a time.

    The text is read when this is made, with the hooks that are on the model then. Where logits are hooked, or where the
    model does something to them that is not known here, all of them are kept.

    Args:
        model: a bridge.
        tokens: the text.
        first: first position whose logits are asked for.
        stop: position behind the last of them.

    Example:
        >>> import torch
        >>> from stepsal.bridge.unembedding import LateLogits
        >>> model, tokens = stepsal.load("mini"), torch.arange(9)
        >>> late = LateLogits(model, tokens, first=4, stop=8)
        >>> [tuple(logits.shape) for logits in late.portions(3)], model.cfg.d_vocab
        ([(3, 491), (1, 491)], 491)
    """

    @torch.no_grad()
    def __init__(self, model: TransformerBridge, tokens: Int[Tensor, " pos"], first: int, stop: int) -> None:
        self._model, rows = model, slice(first, stop)
        tokens = tokens.to(next(model.parameters()).device)

        def run() -> Tensor:
            with native(model):
                return model(tokens[None], attention_mask=torch.ones_like(tokens)[None])

        self._residual, self._logits = None, None
        if not model.hook_dict["unembed.hook_out"].fwd_hooks:
            residual, agrees = last_residual(model, run)
            self._residual = residual[0, rows].clone() if agrees else None
        if self._residual is None:
            self._logits = run()[0, rows]

    @torch.no_grad()
    def portions(self, size: int | None = None) -> Iterator[Float[Tensor, "rows d_vocab"]]:
        """Yield the logits from the first row to the last, in float32 on the device of the model.

        Args:
            size: rows of a portion; None takes as many as hold `MAX_LOGITS` logits.
        """
        kept = self._logits if self._residual is None else self._residual
        assert kept is not None
        for rows in kept.split(size or max(1, MAX_LOGITS // self._model.cfg.d_vocab)):
            logits = rows if self._residual is None else unembed(self._model, rows)
            yield logits.float()
