"""Pool token maps into step maps: sums over blocks of query step x key step, and the counts to divide them by.

With the one-hot membership matrix M[pos, step] of a trace,

    sums[i, j] = sum_{t, k <= t} M[t, i] * I[t <- k] * M[k, j],

and the sums are divided by the number of pairs ("density", the paper's map) or by the number of query rows ("mass": the
saliency that a token of step i puts on step j). Only pairs that exist are counted: k <= t, rows t that have a target,
and no template token (step id -1). A uniform causal token map thus pools to a uniform step map under "density".

`StepSums` takes a token map in blocks of rows, so that an engine never has to hold a whole one. A block costs one
matrix product over its rows, which belong to a few steps, and one pass over what is left to sort its keys.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduce = Literal["density", "mass"]
"""The reduction of a block: mean over its pairs ("density"), or sum over keys and mean over query rows ("mass")."""

ROWS_PER_BLOCK = 256
"""Query rows that are pooled at a time: the only temporary of pooling is [ROWS_PER_BLOCK, key_pos]."""


class StepSums:
    """Sums of token maps over blocks of query step x key step, added up from groups of query rows.

    Args:
        step_ids: step of each token; -1 (template) is in no block.
        n_steps: number of steps S.
        batch: leading dimensions of the maps, e.g. the number of heads.
        has_target: query rows that predict a token; None for all but the last.
        dtype: type of the sums.

    Example:
        >>> import torch
        >>> from stepsal.maps.pooling import StepSums
        >>> pool = StepSums(torch.tensor([0, 0, 1, 1]), 2)
        >>> pool.add(torch.ones(4, 4).tril(), first_row=0)
        >>> pool.sums
        tensor([[3., 0.],
                [2., 1.]])
    """

    def __init__(
        self,
        step_ids: Int[Tensor, " pos"],
        n_steps: int,
        *,
        batch: tuple[int, ...] = (),
        has_target: Bool[Tensor, " pos"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._bins = step_ids % (n_steps + 1)  # template tokens share a bin after the last step
        self._rows = torch.where(_targets(step_ids, has_target), self._bins, n_steps).cpu()
        self._sums = torch.zeros((*batch, n_steps + 1, n_steps + 1), dtype=dtype, device=step_ids.device)

    @property
    def sums(self) -> Float[Tensor, "*batch query_step key_step"]:
        """The sums so far, on the device of the step ids."""
        return self._sums[..., :-1, :-1]

    def add(
        self,
        block: Float[Tensor, "*batch row key"],
        first_row: int,
        first_key: int = 0,
        part: slice | None = None,
    ) -> None:
        """Add consecutive rows of a token map to the sums.

        Args:
            block: rows `first_row, first_row + 1, ...` and keys `first_key, ...` of a token map, zero at keys after
                their row.
            first_row: position in the trace of the first row.
            first_key: position in the trace of the first key.
            part: the entries of the batch dimension that the block holds; None for all.

        Raises:
            ValueError: the block reaches outside the trace.
        """
        n_rows, n_keys = block.shape[-2:]
        n_pos = len(self._rows)
        if first_row < 0 or first_key < 0 or first_row + n_rows > n_pos or first_key + n_keys > n_pos:
            raise ValueError(
                f"rows {first_row}..{first_row + n_rows - 1} and keys {first_key}..{first_key + n_keys - 1} do not fit "
                f"{n_pos} positions"
            )
        steps, local = self._rows[first_row : first_row + n_rows].unique(return_inverse=True)
        of_row = torch.nn.functional.one_hot(local, len(steps)).T.to(self._sums)  # [step, row]
        by_step = of_row @ block.to(self._sums.dtype)  # [*batch, step, key]
        keys = self._bins[first_key : first_key + n_keys]
        sums = self._sums if part is None else self._sums[part]
        added = torch.zeros_like(sums[..., : len(steps), :]).index_add_(-1, keys, by_step)
        sums.index_add_(-2, steps.to(sums.device), added)


def pool_steps(
    token_map: Float[Tensor, "*batch query_pos key_pos"],
    step_ids: Int[Tensor, " pos"],
    n_steps: int,
    has_target: Bool[Tensor, " pos"] | None = None,
) -> Float[Tensor, "*batch query_step key_step"]:
    """Sum a token map over the blocks query step x key step.

    Args:
        token_map: saliency of key position k for query position t; entries above the diagonal are ignored.
        step_ids: step of each token; -1 (template) is in no block.
        n_steps: number of steps S.
        has_target: query rows that predict a token; None for all but the last.

    Returns:
        Sums over causal pairs, float32 (float64 for a float64 map), on the device of the map.

    Raises:
        ValueError: the map is not square over the positions of `step_ids`.

    Example:
        >>> import torch
        >>> from stepsal.maps.pooling import pool_steps
        >>> pool_steps(torch.ones(4, 4), torch.tensor([0, 0, 1, 1]), 2)
        tensor([[3., 0.],
                [2., 1.]])
    """
    n_pos = step_ids.shape[0]
    if token_map.shape[-2:] != (n_pos, n_pos):
        raise ValueError(
            f"token_map is {tuple(token_map.shape)} but step_ids covers {n_pos} positions; "
            f"expected [..., {n_pos}, {n_pos}]"
        )
    batch = tuple(token_map.shape[:-2])
    pool = StepSums(
        step_ids.to(token_map.device), n_steps, batch=batch, has_target=has_target, dtype=_accumulator(token_map)
    )
    for first in range(0, n_pos, ROWS_PER_BLOCK):
        stop = min(first + ROWS_PER_BLOCK, n_pos)  # keys at and after `stop` are in the future of every row here
        pool.add(token_map[..., first:stop, :stop].tril(first), first)
    return pool.sums


def pair_counts(
    step_ids: Int[Tensor, " pos"],
    n_steps: int,
    has_target: Bool[Tensor, " pos"] | None = None,
    causal: bool = True,
) -> Int[Tensor, "query_step key_step"]:
    """Count the (query position, key position) pairs of each block, in O(pos + step^2) memory.

    Args:
        step_ids: step of each token; -1 (template) is in no block.
        n_steps: number of steps S.
        has_target: query rows that predict a token; None for all but the last.
        causal: count pairs k <= t only. False also counts the pairs above the diagonal of own-step blocks, as the
            authors' code does: an own-step block of n tokens of a uniform map then comes out at (n + 1) / 2n.

    Example:
        >>> import torch
        >>> from stepsal.maps.pooling import pair_counts
        >>> pair_counts(torch.tensor([0, 0, 1, 1]), 2)
        tensor([[3, 0],
                [2, 1]])
    """
    n_pos, bins = len(step_ids), step_ids.cpu() % (n_steps + 1)
    rows = torch.where(_targets(step_ids, has_target).cpu(), bins, n_steps)
    counts = torch.zeros(n_steps + 1, n_steps + 1, dtype=torch.long)
    so_far = torch.zeros(n_steps + 1, dtype=torch.long)  # tokens of each step before the block
    for first in range(0, n_pos, ROWS_PER_BLOCK):
        block = slice(first, first + ROWS_PER_BLOCK)
        seen = so_far + torch.nn.functional.one_hot(bins[block], n_steps + 1).cumsum(0)  # [row, step]
        counts.index_add_(0, rows[block], seen)
        so_far = seen[-1]
    counts = counts[:-1, :-1]
    if not causal:
        per_query = torch.bincount(rows, minlength=n_steps + 1)[:-1]
        per_key = torch.bincount(bins, minlength=n_steps + 1)[:-1]
        counts = torch.where(counts > 0, per_query[:, None] * per_key, 0)
    return counts.to(step_ids.device)


def row_counts(
    step_ids: Int[Tensor, " pos"], n_steps: int, has_target: Bool[Tensor, " pos"] | None = None
) -> Int[Tensor, " step"]:
    """Count the query rows of each step that predict a token.

    Args:
        step_ids: step of each token; -1 (template) is in no step.
        n_steps: number of steps S.
        has_target: query rows that predict a token; None for all but the last.

    Example:
        >>> import torch
        >>> from stepsal.maps.pooling import row_counts
        >>> row_counts(torch.tensor([0, 0, 1, 1]), 2)
        tensor([2, 1])
    """
    rows = step_ids[_targets(step_ids, has_target) & (step_ids >= 0)]
    return torch.bincount(rows, minlength=n_steps)


def reduce_blocks(
    sums: Float[Tensor, "*batch query_step key_step"],
    counts: Int[Tensor, "query_step key_step"],
    rows_per_step: Int[Tensor, " query_step"],
    how: Reduce,
) -> Float[Tensor, "*batch query_step key_step"]:
    """Turn block sums into a step map.

    Args:
        sums: block sums, from `pool_steps`.
        counts: pairs of each block, from `pair_counts`.
        rows_per_step: query rows of each step, from `row_counts`.
        how: "density" for saliency per pair, "mass" for saliency per query token. They agree in that
            density * counts == mass * rows_per_step == sums. Blocks without pairs are zero.

    Raises:
        ValueError: `how` is neither.

    Example:
        >>> import torch
        >>> from stepsal.maps.pooling import reduce_blocks
        >>> sums, counts, rows = torch.tensor([[3.0, 0], [2, 1]]), torch.tensor([[3, 0], [2, 1]]), torch.tensor([2, 1])
        >>> reduce_blocks(sums, counts, rows, "density").tolist(), reduce_blocks(sums, counts, rows, "mass").tolist()
        ([[1.0, 0.0], [1.0, 1.0]], [[1.5, 0.0], [2.0, 1.0]])
    """
    if how not in get_args(Reduce):
        raise ValueError(f"reduce={how!r} is unknown; use 'density' (per pair) or 'mass' (per query token)")
    per = (counts if how == "density" else rows_per_step[:, None]).to(sums)
    return torch.where(per > 0, sums / per.clamp(min=1), torch.zeros_like(sums))


def normalise_rows(values: Float[Tensor, "*batch query key"]) -> Float[Tensor, "*batch query key"]:
    """Divide every row by its sum; empty rows stay zero.

    Args:
        values: non-negative maps.

    Example:
        >>> import torch
        >>> from stepsal.maps.pooling import normalise_rows
        >>> normalise_rows(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([[0.2500, 0.7500],
                [0.0000, 0.0000]])
    """
    totals = values.sum(-1, keepdim=True, dtype=torch.float64)  # float64: sums of tiny gradients must not underflow
    return torch.where(totals > 0, values / totals.where(totals > 0, 1.0), 0.0).to(values.dtype)


def _targets(step_ids: Int[Tensor, " pos"], has_target: Bool[Tensor, " pos"] | None) -> Bool[Tensor, " pos"]:
    n_pos = step_ids.shape[0]
    if has_target is None:
        return torch.arange(n_pos, device=step_ids.device) < n_pos - 1
    if has_target.shape != (n_pos,):
        raise ValueError(f"has_target is {tuple(has_target.shape)}; expected one entry for each of {n_pos} positions")
    return has_target.to(device=step_ids.device, dtype=torch.bool)


def _accumulator(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32
