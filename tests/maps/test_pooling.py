"""Pooling against a double loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepsal.maps import pooling
from stepsal.maps.pooling import StepSums, normalise_rows, pair_counts, pool_steps, reduce_blocks, row_counts


@st.composite
def segmented(draw):
    """Step ids of a trace (template tokens anywhere, steps in order or not), steps, targets and a token map."""
    n_steps = draw(st.integers(1, 5))
    ids = draw(st.lists(st.integers(-1, n_steps - 1), min_size=1, max_size=24))
    if draw(st.booleans()):
        ids = sorted(ids)
    has_target = draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    token_map = torch.rand(len(ids), len(ids), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return token_map, torch.tensor(ids), n_steps, None if has_target is None else torch.tensor(has_target)


def double_loop(token_map, step_ids, n_steps, has_target, causal=True):
    n_pos = len(step_ids)
    sums = torch.zeros(n_steps, n_steps, dtype=torch.float64)
    counts = torch.zeros(n_steps, n_steps, dtype=torch.long)
    for t in range(n_pos):
        for k in range(n_pos):
            i, j = int(step_ids[t]), int(step_ids[k])
            row_counted = t < n_pos - 1 if has_target is None else bool(has_target[t])
            if i >= 0 and j >= 0 and row_counted and (k <= t or not causal):
                counts[i, j] += 1
                if k <= t:
                    sums[i, j] += token_map[t, k].double()
    return sums, counts


@given(segmented(), st.integers(1, 30))
def test_pooling_agrees_with_a_double_loop(case, rows_per_block):
    token_map, step_ids, n_steps, has_target = case
    sums, counts = double_loop(token_map, step_ids, n_steps, has_target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "ROWS_PER_BLOCK", rows_per_block)
        pooled = pool_steps(token_map, step_ids, n_steps, has_target)
    torch.testing.assert_close(pooled.double(), sums, rtol=1e-5, atol=1e-6)
    assert torch.equal(pair_counts(step_ids, n_steps, has_target), counts)


@given(segmented())
def test_density_times_pairs_is_mass_times_rows(case):
    token_map, step_ids, n_steps, has_target = case
    sums = pool_steps(token_map.double(), step_ids, n_steps, has_target)
    counts = pair_counts(step_ids, n_steps, has_target)
    rows = row_counts(step_ids, n_steps, has_target)
    density, mass = (reduce_blocks(sums, counts, rows, how) for how in ("density", "mass"))
    torch.testing.assert_close(density * counts, sums)
    torch.testing.assert_close(mass * rows[:, None], sums)


@given(segmented())
def test_uniform_token_map_pools_to_uniform_step_map(case):
    _, step_ids, n_steps, has_target = case
    uniform = torch.ones(len(step_ids), len(step_ids), dtype=torch.float64)
    counts = pair_counts(step_ids, n_steps, has_target)
    mean = reduce_blocks(
        pool_steps(uniform, step_ids, n_steps, has_target), counts, row_counts(step_ids, n_steps, has_target), "density"
    )
    assert torch.equal(mean, (counts > 0).double())


def ordered_steps(*lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def test_ordered_steps_pool_to_a_lower_triangle():
    step_ids = ordered_steps(3, 5, 2)
    pooled = pool_steps(torch.rand(2, 4, 10, 10), step_ids, 3)
    assert pooled.shape == (2, 4, 3, 3)
    assert not pooled.triu(1).any()
    assert (pooled.tril() + torch.ones(3, 3).triu(1) > 0).all()


def test_nothing_above_the_diagonal_is_read():
    token_map = torch.where(torch.ones(6, 6).tril().bool(), torch.ones(6, 6), torch.nan)
    assert pool_steps(token_map, ordered_steps(2, 4), 2).isfinite().all()


def test_template_tokens_are_in_no_block():
    step_ids = torch.tensor([-1, 0, 0, -1, 1, 1, -1])
    token_map = torch.ones(7, 7)
    before = pool_steps(token_map, step_ids, 2)
    token_map[:, step_ids == -1] = 1e6
    token_map[step_ids == -1] = 1e6
    assert torch.equal(pool_steps(token_map, step_ids, 2), before)
    assert row_counts(step_ids, 2).tolist() == [2, 2]  # the last position, which has no target, is template


def test_authors_convention_averages_the_zeros_above_the_diagonal():
    n = 10
    step_ids = ordered_steps(n, n, n, 1)
    uniform = torch.ones(31, 31).tril()
    counts = pair_counts(step_ids, 4, causal=False)
    mean = reduce_blocks(pool_steps(uniform, step_ids, 4), counts, row_counts(step_ids, 4), "density")
    expected = torch.ones(3, 3).tril(-1) + (n + 1) / (2 * n) * torch.eye(3)  # 0.55 on the diagonal
    torch.testing.assert_close(mean[:3, :3], expected)
    causal = pair_counts(step_ids, 4)
    below = torch.ones(4, 4).tril(-1).bool()
    assert torch.equal(counts[below], causal[below])
    assert not counts.triu(1).any()


@given(segmented(), st.integers(1, 9), st.integers(1, 9))
def test_blocks_of_rows_add_up(case, n_rows, window):
    """Whatever the blocks, keys before a window left out, a head at a time."""
    token_map, step_ids, n_steps, has_target = case
    n_pos = len(step_ids)
    heads = torch.stack((token_map, 2 * token_map)).tril().triu(1 - window)
    pool = StepSums(step_ids, n_steps, batch=(2,), has_target=has_target)
    for head in (slice(0, 1), slice(1, 2)):
        for first in range(0, n_pos, n_rows):
            stop, first_key = min(first + n_rows, n_pos), max(0, first - window + 1)
            pool.add(heads[head, first:stop, first_key:stop], first, first_key, head)
    torch.testing.assert_close(pool.sums, pool_steps(heads, step_ids, n_steps, has_target))


def test_half_precision_is_summed_in_float32():
    step_ids = ordered_steps(2000, 1)
    token_map = torch.full((2001, 2001), 1e-2, dtype=torch.bfloat16)
    pooled = pool_steps(token_map, step_ids, 2)
    assert pooled.dtype == torch.float32
    expected = float(token_map[0, 0]) * 2000 * 2001 / 2
    assert pooled[0, 0].item() == pytest.approx(expected, rel=1e-4)


def test_pair_counts_are_exact_beyond_float32():
    n = 6001
    assert pair_counts(torch.zeros(n + 1, dtype=torch.long), 1).item() == n * (n + 1) // 2


def test_pooling_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="covers 4 positions"):
        pool_steps(torch.ones(3, 4), torch.zeros(4, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="do not fit 4 positions"):
        StepSums(torch.zeros(4, dtype=torch.long), 1).add(torch.ones(2, 2), 3)
    with pytest.raises(ValueError, match="has_target"):
        pair_counts(torch.zeros(4, dtype=torch.long), 1, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="'median' is unknown"):
        reduce_blocks(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), "median")


@given(st.floats(1e-30, 1e30))
def test_row_shares_ignore_the_scale(scale):
    values = torch.tensor([[1.0, 0.0], [1.0, 3.0]])
    torch.testing.assert_close(normalise_rows(values * scale), torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
