"""Weights with which traces enter a difference of two groups, as they are, and under shuffled labels and in bootstraps.

They depend on groups and strata alone, not on what is compared. So they are kept for a while: contrasts of several
metrics over the same traces draw once, and are then a product of matrices each.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

FEWEST = 5  # traces of a group for an interval
_MOST_KEPT = 2**24  # numbers in a matrix of weights (128 MB); larger ones are not kept

Weights = Float[np.ndarray, "draw trace"]
"""What each trace contributes to the difference of means, in each draw."""


def contrast_weights(
    counts: Weights, is_wrong: Bool[np.ndarray, " trace"], strata: Int[np.ndarray, " trace"]
) -> Weights:
    """Return what each trace contributes to the difference of means, when each is there `counts` times.

    Strata that lack a group in a draw have no weight in it; NaN where all do.

    Args:
        counts: how often each trace is there, in each draw.
        is_wrong: group of each trace.
        strata: stratum of each trace (0, 1, ... without gaps).

    Example:
        >>> import numpy as np
        >>> from stepsal.stats.resampling import contrast_weights
        >>> contrast_weights(np.ones((1, 4)), np.array([True, True, False, False]), np.zeros(4, dtype=int)).tolist()
        [[0.5, 0.5, -0.5, -0.5]]
    """
    per_wrong, per_correct = _per_trace(counts, is_wrong, strata)
    return counts * np.where(is_wrong, per_wrong, -per_correct)


def _per_trace(
    counts: Weights, is_wrong: Bool[np.ndarray, " trace"], strata: Int[np.ndarray, " trace"]
) -> tuple[Weights, Weights]:
    """Return what one trace contributes where it is wrong, and where it is correct."""
    member = np.eye(strata.max() + 1)[strata]  # [trace, stratum]
    n_wrong, n_correct = (counts * is_wrong) @ member, (counts * ~is_wrong) @ member  # [draw, stratum]
    of_stratum = n_wrong * n_correct / np.maximum(n_wrong + n_correct, 1)
    total = of_stratum.sum(1, keepdims=True)
    of_stratum = of_stratum / np.where(total > 0, total, np.nan)  # a draw without pairs says nothing
    of_wrong, of_correct = (of_stratum / np.maximum(n, 1) for n in (n_wrong, n_correct))
    return of_wrong[:, strata], of_correct[:, strata]


def drawn_weights(
    is_wrong: Bool[np.ndarray, " trace"], strata: Int[np.ndarray, " trace"], n_resamples: int, seed: int
) -> tuple[Weights, Weights | None]:
    """Return the weights under labels that are shuffled within strata, and those of a bootstrap of either group.

    Args:
        is_wrong: group of each trace.
        strata: stratum of each trace (0, 1, ... without gaps).
        n_resamples: number of permutations, and of bootstrap draws.
        seed: of the permutations, and of the bootstrap after them.

    Returns:
        Two matrices; the second is None where a group has fewer than 5 traces.

    Example:
        >>> import numpy as np
        >>> from stepsal.stats.resampling import drawn_weights
        >>> null, bootstrap = drawn_weights(np.arange(12) < 6, np.zeros(12, dtype=int), 200, seed=0)
        >>> null.shape, bootstrap.shape
        ((200, 12), (200, 12))
    """
    draw = _kept_draws if n_resamples * len(is_wrong) <= _MOST_KEPT else _kept_draws.__wrapped__
    return draw(is_wrong.tobytes(), strata.astype(np.int64).tobytes(), n_resamples, seed)


@lru_cache(maxsize=2)  # all traces, and those of similar length
def _kept_draws(is_wrong: bytes, strata: bytes, n_resamples: int, seed: int) -> tuple[Weights, Weights | None]:
    groups, numbers = np.frombuffer(is_wrong, dtype=bool), np.frombuffer(strata, dtype=np.int64)
    rng = np.random.default_rng(seed)  # of the permutations first, and of the bootstrap after them
    weights = _under_permutations(groups, numbers, n_resamples, rng), _in_bootstraps(groups, numbers, n_resamples, rng)
    for kept in weights:
        if kept is not None:
            kept.flags.writeable = False
    return weights


def _under_permutations(
    is_wrong: Bool[np.ndarray, " trace"], strata: Int[np.ndarray, " trace"], n_resamples: int, rng: np.random.Generator
) -> Weights:
    """Shuffle labels within strata; as their numbers stay, so does what a trace of either group contributes."""
    labels = np.empty((n_resamples, len(is_wrong)), dtype=bool)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        labels[:, members] = rng.permuted(np.broadcast_to(is_wrong[members], (n_resamples, len(members))), axis=1)
    per_wrong, per_correct = _per_trace(np.ones((1, len(is_wrong))), is_wrong, strata)
    return np.where(labels, per_wrong, -per_correct)


def _in_bootstraps(
    is_wrong: Bool[np.ndarray, " trace"], strata: Int[np.ndarray, " trace"], n_resamples: int, rng: np.random.Generator
) -> Weights | None:
    """Draw each group by itself, so that its size stays."""
    if min(is_wrong.sum(), (~is_wrong).sum()) < FEWEST:
        return None
    counts = np.zeros((n_resamples, len(is_wrong)))
    for group in (True, False):
        members = np.flatnonzero(is_wrong == group)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=n_resamples)
    return contrast_weights(counts, is_wrong, strata)
