"""The mathematics of SMI against plain loops."""

from __future__ import annotations

import pytest
import torch

from stepsal.intervention.smi import Injections, inject, momentum, previous_step_means


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_smi_against_loops(n_heads: int, n_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, 9, n_kv_heads, 3, generator=generator)
    z = torch.randn(2, 4, n_heads, 3, generator=generator)
    places, members = [(0, 1), (1, 3), (0, 3)], [[2, 3, 4], [0], [5, 6]]
    injections = Injections.of(places, members)
    got = inject(z, momentum(previous_step_means(v, injections), torch.full((z.shape[2], 1), 0.7)), injections)
    expected = z.clone()
    for (row, t), keys in zip(places, members, strict=True):
        for head in range(n_heads):
            mean = sum(v[row, k, head // (n_heads // n_kv_heads)] for k in keys) / len(keys)
            expected[row, t, head] += 0.7 * mean
    torch.testing.assert_close(got, expected)
    assert not torch.equal(got, z)
