"""The cache that grows in place holds what that of transformers holds, in little more memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, tiny_hf_model
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from stepsal.generation.cache import GROWTH, GrowingLayer, GrowingSlidingLayer, Room, growing_cache

WINDOW = 6
STEPS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=12)  # new keys, rows to drop


def states(n_rows: int, n_new: int, first: int) -> Tensor:
    """Return keys that differ in every place."""
    return torch.arange(first, first + n_rows * 2 * n_new * 3, dtype=torch.float32).reshape(n_rows, 2, n_new, 3)


@pytest.mark.parametrize("window", [None, WINDOW])
@given(steps=STEPS)
def test_it_holds_what_that_of_transformers_holds(window: int | None, steps: list[tuple[int, int]]) -> None:
    ours = GrowingLayer() if window is None else GrowingSlidingLayer(sliding_window=window)
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    n_rows, first = 4, 0
    for n_new, dropped in steps:
        keys, values = states(n_rows, n_new, first), states(n_rows, n_new, first + 10_000)
        first += keys.numel()
        assert ours.get_mask_sizes(n_new) == theirs.get_mask_sizes(n_new)
        for got, expected in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(got, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if 0 < dropped < n_rows:
            rows = torch.arange(n_rows - dropped).flip(0)  # those that stay may change places
            ours.batch_select_indices(rows)
            theirs.batch_select_indices(rows)
            n_rows -= dropped


@pytest.mark.parametrize("window", [None, WINDOW])
def test_what_was_handed_out_stays_as_it_was(window: int | None) -> None:
    layer = GrowingLayer() if window is None else GrowingSlidingLayer(sliding_window=window)
    pairs = [layer.update(states(2, 1, 100 * i), states(2, 1, 100 * i + 50)) for i in range(30)]
    kept = [keys.clone() for keys, _ in pairs]
    layer.update(states(2, 40, 5000), states(2, 40, 6000))
    assert all(torch.equal(keys, copy) for (keys, _), copy in zip(pairs, kept, strict=True))


def test_copies_and_memory_are_few() -> None:
    room, held, buffers = Room(), torch.zeros(1, 1, 0, 1), set()
    for _ in range(2000):
        held = room.append(held, torch.zeros(1, 1, 1, 1))
        storage = held.untyped_storage()
        buffers.add(storage.data_ptr())
        assert storage.nbytes() <= max(GROWTH * held.nbytes, 8)
    assert len(buffers) < 25  # moves in 2,000 tokens


def test_a_branch_does_not_write_into_another() -> None:
    room = Room()
    trunk = room.append(torch.zeros(1, 1, 0, 1), torch.zeros(1, 1, 4, 1))
    one = room.append(trunk, torch.ones(1, 1, 1, 1))
    other = room.append(trunk, torch.full((1, 1, 1, 1), 2.0))  # `trunk` is not the end of what is held any more
    assert (one[..., -1, :].item(), other[..., -1, :].item()) == (1, 2)


@torch.no_grad()
def decoded(model: torch.nn.Module, cache: Cache) -> Tensor:
    """Return logits of tokens that are read one by one, with a row that leaves on the way."""
    tokens, logits = torch.arange(30).reshape(3, 10), []
    for i in range(20):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        logits.append(output.logits[:2, -1:])
        if i == 8:
            cache.batch_select_indices(torch.tensor([0, 1]))
        tokens = (torch.arange(3 if i < 8 else 2)[:, None] + i) % 40
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "GPT2", "Phi3"])
def test_models_read_it_as_their_own(architecture: str) -> None:
    model = tiny_hf_model(architecture)
    cache = growing_cache(model.config)
    assert torch.equal(decoded(model, cache), decoded(model, DynamicCache(config=model.config)))
    assert {type(layer) for layer in cache.layers} <= {GrowingLayer, GrowingSlidingLayer}
