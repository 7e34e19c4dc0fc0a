"""A cache of keys and values that grows in place.

The cache of transformers makes a new tensor of all keys and values at every token. This one keeps room behind what it
holds, writes new ones there, and hands out views; when the room is used up it moves to half as much again, so that
each key is copied a few times in all, not once per token. A layer with a sliding window moves only what the window
still needs.

Rows come and go: `join` puts the rows of one cache below those of another, with the last key of all in one column, and
`let_go` drops the columns on the left that are padding in all rows that are left.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

GROWTH = 1.5  # room is made for this many times what is held


class Room:
    """A tensor that grows along the positions, with room behind what it holds.

    Example:
        >>> import torch
        >>> from stepsal.generation.cache import Room
        >>> room = Room()
        >>> first = room.append(torch.zeros(1, 2, 0, 4), torch.ones(1, 2, 10, 4))
        >>> second = room.append(first, torch.ones(1, 2, 3, 4))
        >>> second.shape, second.data_ptr() == first.data_ptr()
        (torch.Size([1, 2, 13, 4]), True)
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None  # [batch, kv_head, room, d_head]
        self._held: Tensor | None = None  # the last view that was handed out
        self._end = 0  # position in the buffer behind the last key

    def append(
        self, past: Float[Tensor, "batch kv_head past_pos d_head"], new: Float[Tensor, "batch kv_head new_pos d_head"]
    ) -> Float[Tensor, "batch kv_head pos d_head"]:
        """Return past and new keys as one tensor, a view of the buffer.

        Args:
            past: what `append` returned the last time, or the last positions of it; anything else is copied.
            new: what follows.
        """
        n_past, n_new = past.shape[-2], new.shape[-2]
        buffer = self._buffer
        if buffer is None or not self._ends_with(past) or self._end + n_new > buffer.shape[-2]:
            batch, n_heads, _, d_head = new.shape
            buffer = new.new_empty(batch, n_heads, int(GROWTH * (n_past + n_new)), d_head)
            if n_past:
                buffer[..., :n_past, :] = past
            self._buffer, self._end = buffer, n_past
        buffer.narrow(-2, self._end, n_new).copy_(new)
        self._end += n_new
        self._held = buffer.narrow(-2, self._end - n_past - n_new, n_past + n_new)
        return self._held

    def _ends_with(self, past: Tensor) -> bool:
        """Tell whether a tensor is the last part of what was handed out, so that new keys can go behind it."""
        held = self._held
        if past is held:
            return True
        if held is None or past.shape[:2] != held.shape[:2] or past.stride() != held.stride():
            return False
        n_before = held.shape[-2] - past.shape[-2]
        return n_before >= 0 and past.data_ptr() == held[..., n_before:, :].data_ptr()


class GrowingLayer(DynamicLayer):
    """The keys and values of a layer that sees all keys."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._key_room, self._value_room = Room(), Room()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return those of all positions.

        Args:
            key_states: new keys, [batch, kv_head, new_pos, d_head].
            value_states: new values, likewise.
            *args: not used; transformers passes more to other layers.
            **kwargs: not used.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._key_room.append(_like(self.keys, key_states), key_states)
        self.values = self._value_room.append(_like(self.values, value_states), value_states)
        return self.keys, self.values

    def add_rows(self, other: GrowingLayer) -> None:
        """Add the rows of another layer, with the last column of both in one.

        Args:
            other: a layer of another cache of the same model; its keys are copied.
        """
        self.keys, self.values = _stacked(self.keys, other.keys), _stacked(self.values, other.values)

    def drop_first(self, n: int) -> None:
        """Drop the first columns.

        Args:
            n: number of columns.
        """
        self.keys, self.values = _without_first(self.keys, n), _without_first(self.values, n)


class GrowingSlidingLayer(DynamicSlidingWindowLayer):
    """The keys and values of a layer with a sliding window, which keeps those that the next token sees."""

    def __init__(self, sliding_window: int, **options: Any) -> None:
        super().__init__(sliding_window=sliding_window, **options)
        self._key_room, self._value_room = Room(), Room()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return those that the new queries see.

        Args:
            key_states: new keys, [batch, kv_head, new_pos, d_head].
            value_states: new values, likewise.
            *args: not used; transformers passes more to other layers.
            **kwargs: not used.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys = self._key_room.append(_like(self.keys, key_states), key_states)
        values = self._value_room.append(_like(self.values, value_states), value_states)
        self.keys, self.values = (x[:, :, -self.sliding_window + 1 :, :] for x in (keys, values))
        return keys, values

    def add_rows(self, other: GrowingSlidingLayer) -> None:
        """Add the rows of another layer, with the last column of both in one.

        Args:
            other: a layer of another cache of the same model; its keys are copied.
        """
        self.cumulative_length = max(self.cumulative_length, other.cumulative_length)
        self.keys, self.values = _stacked(self.keys, other.keys), _stacked(self.values, other.values)

    def drop_first(self, n: int) -> None:
        """Drop the first columns, of all that there were; those before the window are dropped already.

        Args:
            n: number of columns.
        """
        n_held = 0 if self.keys is None else self.keys.shape[-2]
        self.cumulative_length -= n
        surplus = max(0, n_held - self.cumulative_length)
        self.keys, self.values = _without_first(self.keys, surplus), _without_first(self.values, surplus)


def growing_cache(config: Any) -> Cache:
    """Return an empty cache for a model; layers of other kinds than full and sliding attention are transformers' own.

    Args:
        config: configuration of the model, of Hugging Face.

    Example:
        >>> from stepsal.generation.cache import growing_cache
        >>> len(growing_cache(stepsal.load("mini").original_model.config).layers)
        8
    """
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = GrowingSlidingLayer(sliding_window=layer.sliding_window)
    return cache


def rows_can_join(cache: Cache) -> bool:
    """Tell whether `join` and `let_go` know all layers of a cache.

    Args:
        cache: from `growing_cache`.

    Example:
        >>> from stepsal.generation.cache import growing_cache, rows_can_join
        >>> rows_can_join(growing_cache(stepsal.load("mini").original_model.config))
        True
    """
    return len(_growing(cache)) == len(cache.layers)


def join(cache: Cache, other: Cache) -> None:
    """Put the rows of another cache below those of a cache, with the last column of both in one.

    The shorter rows are padded on the left with zeros.

    Args:
        cache: a cache of `growing_cache` that has read something.
        other: another one of the same model; it is not changed.
    """
    for layer, other_layer in zip(_growing(cache), _growing(other), strict=True):
        layer.add_rows(other_layer)  # type: ignore[arg-type]  # both are of one kind, as the model is the same


def let_go(cache: Cache, n: int) -> None:
    """Drop the first columns of a cache, without a copy.

    Args:
        cache: a cache of `growing_cache`.
        n: number of columns; they must be padding in all rows.
    """
    for layer in _growing(cache):
        layer.drop_first(n)


def _growing(cache: Cache) -> list[GrowingLayer | GrowingSlidingLayer]:
    return [layer for layer in cache.layers if isinstance(layer, GrowingLayer | GrowingSlidingLayer)]


def _stacked(above: Tensor | None, below: Tensor | None) -> Tensor | None:
    """Return the rows of two tensors [row, kv_head, pos, d_head], the shorter padded on the left; None for none."""
    if above is None or below is None:  # a layer that keeps no keys, as it uses those of another
        return above
    n = max(above.shape[-2], below.shape[-2])
    return torch.cat([pad(x, (0, 0, n - x.shape[-2], 0)) for x in (above, below)])


def _without_first(states: Tensor | None, n: int) -> Tensor | None:
    return None if states is None else states[..., n:, :]


def _like(held: Tensor | None, states: Tensor) -> Tensor:
    """Return what a layer holds; no positions where it is still empty, as transformers' has no shape then."""
    return states[..., :0, :] if held is None or held.ndim != states.ndim else held
