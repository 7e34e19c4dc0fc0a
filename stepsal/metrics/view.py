"""Look at a step map as the metrics do: shares of its rows, the same of uniform attention, distances, slopes."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from stepsal.layers import layer_indices
from stepsal.maps.pooling import pair_counts, reduce_blocks, row_counts
from stepsal.maps.step_saliency import StepSaliency

PerLayer = Float[np.ndarray, " layer"]
"""A number of each layer of a map."""


class FlowView:
    """A step map as the metrics see it: shares of its rows, those of a uniform map, and the rows and keys to average.

    Args:
        saliency: step maps of one trace.
        last: number of thinking steps, counted from the last one back, that `summary_last` looks at.

    Attributes:
        saliency: the map.
        last: as given.
        values: the map in float64 [layer, query_step, key_step].
        share: `values`, row-normalised.
        uniform: the row-normalised map of uniform causal attention [layer=1, query_step, key_step].
        exists: True for blocks that hold pairs of tokens [query_step, key_step].
        filled: True for rows that hold saliency [layer, query_step].
        question: indices of the question step.
        thinking: indices of the thinking steps.
        summary: indices of the summary steps.
        rows: the thinking steps from the third on.
    """

    def __init__(self, saliency: StepSaliency, last: int) -> None:
        roles = np.array(saliency.roles)
        self.saliency, self.last = saliency, last
        self.question, self.thinking, self.summary = (
            np.flatnonzero(roles == role) for role in ("question", "thinking", "summary")
        )
        self.rows = self.thinking[2:]
        self.values = saliency.values.double().numpy()
        uniform = _uniform_map(saliency)
        self.share, self.uniform, self.exists = _normalised(self.values), _normalised(uniform)[None], uniform > 0
        self.filled = self.values.sum(-1) > 0

    @cached_property
    def parts(self) -> Bool[np.ndarray, "part row key_step"]:
        """Masks of the own, previous, earlier and question keys of each thinking row."""
        parts = np.zeros((4, len(self.rows), self.saliency.n_steps), dtype=bool)
        for n, i in enumerate(self.rows):
            parts[0, n, i] = True
            parts[1, n, self.thinking[n + 1]] = True
            parts[3, n, self.question] = True
            parts[2, n, :i] = ~parts[:, n, :i].any(0)  # among them a summary before thinking that begins again
        return parts

    @cached_property
    def part_shares(self) -> Float[np.ndarray, "part layer row"]:
        """The share of each part in each thinking row."""
        return np.einsum("lij,pij->pli", self.share[:, self.rows], self.parts)

    @cached_property
    def distances(self) -> tuple[Float[np.ndarray, "query_step key_step"], Float[np.ndarray, "query_step key_step"]]:
        """Distance of query step and key step, in steps and in tokens."""
        return _distances(self.saliency)

    @cached_property
    def slopes(self) -> PerLayer:
        """Slope of log share against the distance from the end of the thinking before a row; see `_slopes`."""
        n_before = np.searchsorted(self.thinking, self.summary)  # thinking may begin again behind a part of the summary
        slopes = np.full((len(self.values), len(self.summary)), np.nan)
        for n in np.unique(n_before):
            rows = np.flatnonzero(n_before == n)
            slopes[:, rows] = _slopes(
                *(x[:, self.summary[rows]][:, :, self.thinking[:n]] for x in (self.share, self.uniform))
            )
        return mean_where(slopes, np.isfinite(slopes))

    @property
    def summary_last(self) -> PerLayer:
        """Share of the `last` thinking steps before a summary row, mean over those rows that hold saliency."""
        places = np.searchsorted(self.thinking, self.summary)[:, None] - 1 - np.arange(self.last)  # [row, step]
        keys = self.thinking[np.maximum(places, 0)]
        shares = self.share[:, self.summary[:, None], keys] * (places >= 0)
        return mean_where(shares.sum(-1), self.filled[:, self.summary])

    @property
    def middle(self) -> list[int]:
        """Positions of the middle half of the layers in the map; empty where it was not computed as a whole."""
        layers = self.saliency.computed("middle")
        if layers != layer_indices("middle", self.saliency.n_layers):
            return []
        return [self.saliency.layers.index(layer) for layer in layers]

    def mean_over_rows(self, x: Float[np.ndarray, "layer query_step"]) -> PerLayer:
        """Return the mean over thinking rows that hold saliency.

        Args:
            x: a number of each layer and row of the map.
        """
        return mean_where(x[:, self.rows], self.filled[:, self.rows])

    def mean_over_summary(self, share: Float[np.ndarray, "layer query_step key_step"], keys: np.ndarray) -> PerLayer:
        """Return the mean, over summary rows that hold saliency, of the sum over some keys.

        Args:
            share: a row-normalised map.
            keys: indices of the keys.
        """
        return mean_where(share[:, self.summary][:, :, keys].sum(-1), self.filled[:, self.summary])

    def mean_of_block(self, steps: Int[np.ndarray, " n"]) -> PerLayer:
        """Return the mean over the blocks between some steps, of those that hold a pair of tokens; NaN if none does.

        Args:
            steps: indices of the steps.
        """
        pairs = self.values[:, steps][:, :, steps][:, self.exists[np.ix_(steps, steps)]]
        return pairs.mean(-1) if pairs.shape[1] else np.full(len(self.values), np.nan)


def _uniform_map(saliency: StepSaliency) -> Float[np.ndarray, "query_step key_step"]:
    """Return the step map of a token map that is one at every pair."""
    counts, rows = (count(saliency.step_ids, saliency.n_steps) for count in (pair_counts, row_counts))
    return reduce_blocks(counts.double(), counts, rows, saliency.reduce).numpy()


def _distances(
    saliency: StepSaliency,
) -> tuple[Float[np.ndarray, "query_step key_step"], Float[np.ndarray, "query_step key_step"]]:
    """Return the distance of query step and key step in steps, and in tokens: mean of t - k over a block's pairs."""
    steps, lengths = np.arange(saliency.n_steps), np.array(saliency.step_lengths)
    ids = saliency.step_ids.numpy()
    first = np.array([np.flatnonzero(ids == i)[0] if n else 0 for i, n in zip(steps, lengths, strict=True)])
    rows = row_counts(saliency.step_ids, saliency.n_steps).numpy()  # the last token of all is no row
    centre_of_rows, centre_of_keys = first + (rows - 1) / 2, first + (lengths - 1) / 2
    tokens = np.tril(centre_of_rows[:, None] - centre_of_keys, -1)
    # a step of m rows: sum_{t<m} t (t + 1) / 2 over the sum_{t<m} (t + 1) pairs
    np.fill_diagonal(tokens, np.maximum(rows - 1, 0) / 3)
    return np.tril(steps[:, None] - steps).astype(float), np.maximum(tokens, 0)


def _slopes(
    share: Float[np.ndarray, "layer row step"], uniform: Float[np.ndarray, "1 row step"]
) -> Float[np.ndarray, "layer row"]:
    """Return the least-squares slope of log(share / uniform) over the distance from the last step, for each row.

    NaN in rows without saliency on every step: zeros have no logarithm, and leaving them out would hide decay.
    """
    if share.shape[-1] < 2:
        return np.full(share.shape[:2], np.nan)
    x = np.arange(share.shape[-1])[::-1] - (share.shape[-1] - 1) / 2
    positive: Bool[np.ndarray, "layer row step"] = (share > 0) & (uniform > 0)
    y = np.log(np.where(positive, share, 1.0)) - np.log(np.where(positive, uniform, 1.0))
    return np.where(positive.all(-1), (x * y).sum(-1) / (x**2).sum(), np.nan)


def _normalised(values: Float[np.ndarray, "*layer query key"]) -> Float[np.ndarray, "*layer query key"]:
    totals = values.sum(-1, keepdims=True)
    return values / np.where(totals > 0, totals, 1.0)


def mean_where(x: Float[np.ndarray, "layer row"], where: Bool[np.ndarray, "layer row"]) -> Float[np.ndarray, " layer"]:
    """Return the mean of each layer over the rows that count; NaN where none does.

    Args:
        x: a number of each layer and row.
        where: True for the rows that count.

    Example:
        >>> import numpy as np
        >>> from stepsal.metrics.view import mean_where
        >>> mean_where(np.array([[1.0, 3.0], [5.0, 7.0]]), np.array([[True, True], [False, False]]))
        array([ 2., nan])
    """
    n = where.sum(-1)
    return np.where(n > 0, np.where(where, x, 0.0).sum(-1) / np.maximum(n, 1), np.nan)
