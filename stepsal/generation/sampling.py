"""Choose the next token: the most likely one, or a draw whose randomness is the row's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNDEFINED = -1  # in place of a token: there is no distribution to choose from


def uniform_draws(seeds: Sequence[int], n_tokens: int) -> Float[Tensor, "row new_token"]:
    """Return a random number in [0, 1) for each token of each row, which depends on the seed of the row alone; float64.

    Args:
        seeds: one seed for each row.
        n_tokens: number of tokens of a row.

    Example:
        >>> from stepsal.generation.sampling import uniform_draws
        >>> draws = uniform_draws([3, 4], n_tokens=5)
        >>> draws.shape, bool((draws[1] == uniform_draws([4], n_tokens=5)[0]).all())
        (torch.Size([2, 5]), True)
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(n_tokens, generator=g, dtype=torch.float64) for g in generators])


def choose(
    logits: Float[Tensor, "row d_vocab"], draws: Float[Tensor, " row"] | None, temperature: float, top_p: float
) -> Int[Tensor, " row"]:
    """Return the most likely token of each row, or the one at a quantile of its sampling distribution.

    A row whose logits give no distribution, because one of them is NaN or plus infinity or all are minus infinity, has
    `UNDEFINED` in place of a token.

    Args:
        logits: logits of the next token.
        draws: the quantile for each row; None chooses the most likely token.
        temperature: divides the logits; must be above 0 where there are draws.
        top_p: choose from the smallest set of tokens whose probability reaches top_p, in (0, 1]; 1 keeps all.

    Example:
        >>> import torch
        >>> from stepsal.generation.sampling import choose
        >>> logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
        >>> choose(logits, None, 0.0, 1.0), choose(logits, torch.tensor([0.9]), 1.0, 1.0)
        (tensor([1]), tensor([2]))
    """
    if draws is None:
        tokens = logits.argmax(-1, keepdim=True)  # of NaN, where there is one
        return tokens.masked_fill(~logits.gather(-1, tokens).isfinite(), UNDEFINED).squeeze(-1)
    p = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True)
        is_outside = ordered.cumsum(-1) - ordered >= top_p  # what comes before is enough already
        p = p.scatter(-1, order, ordered.masked_fill(is_outside, 0.0))
    cumulative = p.cumsum(-1)  # [row, d_vocab]
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, draws.to(p.device)[:, None] * total, right=True)
    return tokens.clamp(max=logits.shape[-1] - 1).masked_fill(~total.isfinite(), UNDEFINED).squeeze(-1)
