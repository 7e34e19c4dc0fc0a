"""Sampling: the distribution, the nucleus, and randomness that belongs to a row."""

from __future__ import annotations

import pytest
import torch

from stepsal.generation.sampling import UNDEFINED, choose, uniform_draws


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        p = torch.softmax(logits[0] / temperature, 0)
        kept = p * (p.cumsum(0) - p < top_p)
        counts = torch.bincount(choose(logits, draws, temperature, top_p), minlength=4)
        torch.testing.assert_close(counts / 4000, kept / kept.sum(), atol=0.03, rtol=0)
    assert choose(logits[:1], draws[:1] * 0 + 1 - 1e-16, 1.0, 0.8).item() <= 1  # never outside the nucleus


def test_without_draws_the_most_likely_token_is_chosen() -> None:
    assert choose(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), None, 0.0, 1.0).tolist() == [1, 0]


@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_without_a_distribution_are_undefined_and_the_others_are_not(sampled: bool, top_p: float) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, 1.0], [0.0, inf, 1.0], [-inf, -inf, -inf], [nan] * 3, [0.0, -inf, 30.0]])
    draws = torch.full((5,), 0.5) if sampled else None
    assert choose(logits, draws, 1.0, top_p).tolist() == [UNDEFINED] * 4 + [2]


def test_draws_belong_to_the_seed_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    draws = uniform_draws([5, 6, 5], 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[1], uniform_draws([6], 7)[0])
