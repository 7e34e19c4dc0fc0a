"""The mathematics of OEB against a numeric solver and its invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bridged_by_masks import bridged_by_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.nn.functional import one_hot

from stepsal.intervention.oeb import (
    RowGroups,
    bridge_scales,
    bridge_share,
    odds_equal_bridge,
    of_bridge_and_segment,
    row_means,
)

B, S, O = 1, 2, 0  # noqa: E741 (the paper's letters)


@st.composite
def rows(draw: st.DrawFn, n_keys: int = 7) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Attention of one row, the group of each key, tau_max, and what a sink takes from the row."""
    logits = draw(st.lists(st.floats(-8, 4), min_size=n_keys, max_size=n_keys))
    groups = torch.tensor(draw(st.lists(st.sampled_from([B, S, O]), min_size=n_keys, max_size=n_keys)))
    sink = draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0) * (1 - sink)
    return p, groups, draw(st.floats(0.01, 0.99)), sink


def bridged(p: torch.Tensor, groups: torch.Tensor, tau_max: float) -> tuple[torch.Tensor, float]:
    """The new row, and the ceiling."""
    ceiling = bridge_share((groups == B).sum(), (groups == S).sum()).clamp(max=tau_max)
    row_groups = RowGroups(one_hot(groups, 3)[None], torch.tensor([[[B, S]]]))
    result = odds_equal_bridge(p.view(1, 1, 1, -1), row_groups, ceiling.view(1, 1, 1))
    return result.pattern.flatten(), float(ceiling)


@settings(max_examples=40)
@given(rows())
def test_oeb_is_the_kl_projection(drawn: tuple) -> None:
    p, groups, tau_max, sink = drawn
    q, ceiling = bridged(p, groups, tau_max)
    p_b, p_s = (float(p[groups == g].sum()) for g in (B, S))
    tau = min(ceiling, (p_b + p_s) / 2)
    if not 0 < p_b < tau:
        assert torch.equal(q, p)
        return
    p_full = np.append(p, sink)
    q_full = numeric_projection(p_full, np.append(groups, O), {B: tau, S: p_b + p_s - tau, O: 1 - p_b - p_s})
    for g, mass in ((B, tau), (S, p_b + p_s - tau)):
        assert float(q[groups == g].sum()) == pytest.approx(mass, abs=1e-9)
    assert torch.equal(q[groups == O], p[groups == O])
    assert divergence(np.append(q, sink), p_full) <= divergence(q_full, p_full) + 1e-9
    np.testing.assert_allclose(q, q_full[:-1], atol=1e-3)  # the solver stops where the divergence is flat


def divergence(q: np.ndarray, p: np.ndarray) -> float:
    """KL(q || p)."""
    there = q > 0
    return float((q[there] * np.log(q[there] / p[there])).sum())


def numeric_projection(p: np.ndarray, groups: np.ndarray, target: dict[int, float]) -> np.ndarray:
    """The q with mass target[g] in each group that minimises KL(q || p), by BFGS over q = target[g] softmax(x).

    From several starts: a line search that runs into the flat end of a softmax stays there.
    """
    there = p > 0

    def q_of(x: np.ndarray) -> np.ndarray:
        q = np.zeros_like(p)
        for g in target:
            member = (groups == g) & there
            e = np.exp(x[member] - x[member].max(initial=0))
            q[member] = target[g] * e / e.sum() if member.any() else 0
        return q

    def kl_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        q = q_of(x)
        log_ratio = np.zeros_like(p)
        positive = q > 0
        log_ratio[positive] = np.log(q[positive] / p[positive])
        gradient = np.zeros_like(p)
        for g in target:  # softmax: d/dx_k = q_k (log_ratio_k - mean of log_ratio under q within the group)
            member = (groups == g) & positive
            if member.any():
                mean = (q[member] * log_ratio[member]).sum() / q[member].sum()
                gradient[member] = q[member] * (log_ratio[member] - mean)
        return float((q * log_ratio).sum()), gradient

    starts = np.vstack([np.zeros_like(p), np.random.default_rng(0).normal(size=(4, len(p)))])
    found = [minimize(kl_and_gradient, x, jac=True, method="BFGS", options={"gtol": 1e-9}) for x in starts]
    return q_of(min(found, key=lambda result: result.fun).x)


@given(rows(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_oeb_invariants(drawn: tuple, dtype: torch.dtype) -> None:
    p, groups, tau_max, _ = drawn
    p = p.to(dtype)
    q, ceiling = bridged(p, groups, tau_max)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert q.dtype == dtype
    assert (q >= 0).all()
    assert abs(float(q.float().sum() - p.float().sum())) <= tolerance
    assert torch.equal(q[groups == O], p[groups == O])
    p_b, p_s = (float(p.float()[groups == g].sum()) for g in (B, S))
    tau = min(ceiling, (p_b + p_s) / 2)
    if p_b >= tau or p_b == 0:
        assert torch.equal(q, p)
    else:
        assert abs(float(q.float()[groups == B].sum()) - tau) <= tolerance
        assert q.float()[groups == S].sum() >= tau - tolerance


@pytest.mark.parametrize("absent", [B, S])
def test_oeb_leaves_rows_without_bridge_or_segment(absent: int) -> None:
    p = torch.tensor([0.001, 0.299, 0.7])
    groups = torch.tensor([O if absent == B else B, O if absent == S else S, O])
    q, ceiling = bridged(p, groups, 0.5)
    assert ceiling == 0
    assert torch.equal(q, p)


def test_oeb_where_the_paper_is_infeasible() -> None:
    """p(O) = .9, p(S) = .06, p(B) = .04, tau_max = .3: 1 - p(O) - tau_B would be -.2."""
    q, _ = bridged(torch.tensor([0.04, 0.06, 0.9]), torch.tensor([B, S, O]), 0.3)
    torch.testing.assert_close(q, torch.tensor([0.05, 0.05, 0.9]))


def test_the_share_counts_keys() -> None:
    n_bridge, n_segment = torch.tensor([1, 1, 0, 3]), torch.tensor([3, 999, 5, 0])
    expected = torch.tensor([0.5, math.sqrt(1 / 1000), 0.0, 0.0])
    torch.testing.assert_close(bridge_share(n_bridge, n_segment), expected)


@pytest.mark.parametrize("mass", [1e-12, 1e-30, 1e-37, 1e-42])
def test_a_tiny_bridge_gives_finite_values_and_gradients(mass: float) -> None:
    p = torch.tensor([[[[mass, 0.6, 0.4]]]], requires_grad=True)
    groups = RowGroups(torch.eye(3)[None], torch.tensor([[[0, 1]]]))
    result = odds_equal_bridge(p, groups, torch.tensor([[[0.15]]]))
    (gradient,) = torch.autograd.grad((result.pattern * torch.tensor([1.0, 2.0, 3.0])).sum(), p)
    assert result.pattern.isfinite().all()
    assert gradient.isfinite().all()
    assert float(result.pattern.detach().sum()) == pytest.approx(1.0)
    raised = bool(result.after > result.before)
    assert raised == (mass > torch.finfo(torch.float32).tiny)  # 1e-42 counts as no mass at all


@st.composite
def blocks(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, RowGroups, torch.Tensor]:
    """Scores of some heads and rows, the score of a sink, groups (of rows without an edit, too), and ceilings."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n_heads, n_rows, n_keys, n_groups = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), 9, draw(st.integers(2, 6)))
    scores = 4 * torch.randn(2, n_heads, n_rows, n_keys, generator=rng, dtype=torch.float64)
    scores.masked_fill_(torch.rand(scores.shape, generator=rng) < draw(st.sampled_from([0, 0.3])), -torch.inf)
    sinks = torch.full((n_heads,), draw(st.sampled_from([-torch.inf, 0.0, 9.0])), dtype=torch.float64)
    members = one_hot(torch.randint(0, n_groups, (2, n_keys), generator=rng), n_groups).double()
    of_rows = torch.stack([torch.randperm(n_groups, generator=rng)[:2] for _ in range(2 * n_rows)]).view(2, n_rows, 2)
    ceiling = draw(st.sampled_from([0.05, 0.5, 1.0])) * torch.rand(2, n_heads, n_rows, generator=rng).double()
    unedited = torch.rand(2, n_rows, generator=rng) < 0.3
    of_rows[unedited] = -1
    return scores, sinks, RowGroups(members, of_rows), ceiling * ~unedited[:, None]


def attended(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys and the sink of each head, without the sink's column; rows without any key are zero."""
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1].nan_to_num()


@given(blocks())
def test_groups_say_what_masks_say(drawn: tuple) -> None:
    scores, sinks, groups, ceiling = drawn
    pattern = attended(scores, sinks)
    of_keys = groups.members.argmax(-1)[:, None]  # [batch, 1, key]
    bridge, segment = (of_keys == of_rows[..., None] for of_rows in groups.of_rows.unbind(-1))
    expected = bridged_by_masks(pattern, bridge, segment, ceiling)
    result = odds_equal_bridge(pattern, groups, ceiling)
    torch.testing.assert_close(result.pattern, expected, rtol=1e-9, atol=1e-15)


@given(blocks())
def test_the_gradient_in_closed_form_is_that_of_autograd(drawn: tuple) -> None:
    scores, sinks, groups, ceiling = drawn
    scores = scores.masked_fill(scores == -torch.inf, -1e9).requires_grad_()
    result = odds_equal_bridge(attended(scores, sinks), groups, ceiling)
    gradient = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected,) = torch.autograd.grad((result.pattern * gradient).sum(), scores)

    members = groups.members[:, None]  # [batch, 1, key, group]
    product = result.pattern.detach() * gradient
    masses = of_bridge_and_segment(attended(scores.detach(), sinks) @ members, groups.of_rows)
    scales, _ = bridge_scales(masses, ceiling)
    means = row_means(masses, scales, ceiling, product @ members, groups.of_rows)
    torch.testing.assert_close(product - result.pattern * (means @ members.mT), expected, rtol=1e-7, atol=1e-14)
