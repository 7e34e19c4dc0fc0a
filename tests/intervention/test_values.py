"""The values of the running step, as they are kept from pass to pass."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from stepsal.intervention.values import KeptValues


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=12))
def test_what_is_needed_is_there(passes: list[tuple[int, int]]) -> None:
    """Passes of any size, after each of which some more values are not needed any longer."""
    n = sum(size for size, _ in passes)
    values = torch.randn(2, n, 1, 3, generator=torch.Generator().manual_seed(0))
    kept, first, needed = KeptValues(), 0, 0
    for size, more in passes:
        kept.push(first, values[:, first : first + size])
        first += size
        assert kept.first <= needed
        assert torch.equal(kept.joined()[:, needed - kept.first :], values[:, needed:first])
        needed = min(needed + more, first)
        kept.forget(needed)


def test_no_long_prompt_is_kept_for_the_sake_of_a_step() -> None:
    kept = KeptValues()
    kept.push(0, torch.zeros(1, 1000, 2, 4))
    kept.forget(990)
    assert kept.first == 990
    assert kept.joined().shape[1] == 10
    assert kept._pieces[0][1].untyped_storage().nbytes() == 10 * 2 * 4 * 4
    kept.forget(1000)
    assert not kept._pieces


def test_only_the_present_pass_has_a_gradient() -> None:
    kept = KeptValues()
    earlier, present = (torch.ones(1, 2, 1, 1, requires_grad=True) for _ in range(2))
    kept.push(0, earlier)
    kept.forget(1)
    kept.push(2, present)
    kept.joined().sum().backward()
    assert earlier.grad is None
    assert torch.equal(present.grad, torch.ones_like(present))


def test_rows_that_stay() -> None:
    kept, values = KeptValues(), torch.arange(12.0).view(3, 4, 1, 1)
    kept.push(0, values[:, :3])
    kept.forget(1)
    kept.push(3, values[:, 3:])
    kept.select([2, 0])
    assert torch.equal(kept.joined(), values[[2, 0], 1:])
