"""Lock-in and Decay as numbers: how the rows of a step map spread over own, neighbouring, earlier and question steps.

All shares are taken on row-normalised maps, R[i, j] = I[i, j] / sum_j' I[i, j'], so that scaling a row changes
nothing. What a share means depends on how long steps are and how many there are; therefore some metrics are set
against the map U that a *uniform causal* token map would give for the same tokens, row-normalised likewise: under
reduce="density" (density) U is the same for all steps that exist, under reduce="mass" (mass) it grows with their number of
tokens. That takes out what uniform attention explains, not all that length does: where a share is near its ceiling
whatever the length, the difference from U moves with U alone. So look at the share itself as well, and match for
length (`stepsal.stats.compare_groups`).

With T the thinking steps in order, S the summary steps, Q the question, and < > a mean over rows that hold saliency:

    thinking rows, i in T[2:] (from the third on, so that all four parts exist; the four sum to one)
      own                  <R[i, i]>                           0..1  on the step itself
      previous             <R[i, i's predecessor in T]>        0..1  on the step before
      earlier              <sum_{j in T, before that} R[i, j]> 0..1  on thinking further back
      question             <sum_{j in Q} R[i, j]>              0..1  on the question
      lock_in              own + previous - the same of U     -1..1  > 0: more local than uniform attention
      reach_steps          <sum_j R[i, j] (i - j)>             >= 0  mean distance, in steps
      reach_tokens         <sum_j R[i, j] d[i, j]>             >= 0  in tokens; d: mean distance of a block's pairs
      reach_ratio          reach_tokens / the same of U        >= 0  < 1: shorter than uniform attention reaches

    summary rows, i in S (the three parts sum to one)
      summary_thinking     <sum_{j in T} R[i, j]>              0..1  on the thinking
      summary_question     <sum_{j in Q} R[i, j]>              0..1  on the question
      summary_summary      <sum_{j in S} R[i, j]>              0..1  on the summary itself
      summary_last         <sum_{j in T[-last:]} R[i, j]>      0..1  on the last steps of the thinking
      thinking_deficit     summary_thinking of U - of R       -1..1  > 0: the summary uses thinking less than uniform
      decay_slope          <slope over n of log R[i, j] / U[i, j], j the n-th step of T from its end>
                                                     nats per step  < 0: the further back, the less
      summary_thinking_change   summary_thinking - its mean over the middle half of the layers (those that have one)
                                                              -1..1  < 0 in deep layers: thinking fades with depth

    the authors' (arXiv 2604.06695, code), on maps that are not row-normalised, over the pairs of steps that exist
      analysis_intensity   mean of I[i, j], i and j in T       nats
      final_intensity      mean of I[i, j], i and j in S       nats
      intensity_ratio      final / analysis                    >= 0

What cannot be said is NaN, and the column `reason` says why. Of one trace: `trace_metrics`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from stepsal.layers import Band, layer_indices
from stepsal.maps.pooling import pair_counts, reduce_blocks, row_counts
from stepsal.maps.step_saliency import StepSaliency

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("own", "previous", "earlier", "question")
SUMMARY_PARTS = ("summary_thinking", "summary_question", "summary_summary")
COLUMNS = (
    *PARTS, "lock_in", "reach_steps", "reach_tokens", "reach_ratio",
    *SUMMARY_PARTS, "summary_last", "thinking_deficit", "decay_slope", "summary_thinking_change",
    "analysis_intensity", "final_intensity", "intensity_ratio",
)  # fmt: skip
BANDS: tuple[Band, Band] = ("shallow", "deep")
SCALARS = ("shallow_lock_in", "deep_decay", "deep_fade")


def flow_metrics(saliency: StepSaliency, *, last: int = 3) -> pd.DataFrame:
    """The metrics of the module docstring, one row per layer of the map.

    Args:
        saliency: of one trace.
        last: how many thinking steps `summary_last` looks at.

    Returns:
        Columns: layer, those of `COLUMNS`, n_thinking_rows and n_summary_rows (rows that hold saliency and went into
        the means), reason (why metrics are NaN; empty where none is).

    Raises:
        ValueError: `last` below 1.
    """
    import pandas as pd

    if last < 1:
        raise ValueError(f"last={last} must be at least 1 step")
    roles = np.array(saliency.roles)
    question, thinking, summary = (np.flatnonzero(roles == r) for r in ("question", "thinking", "summary"))
    values = saliency.values.double().numpy()
    uniform_map = _uniform_map(saliency)
    share, uniform, exists = _normalised(values), _normalised(uniform_map)[None], uniform_map > 0
    filled = values.sum(-1) > 0  # [layer, query_step]
    found: dict[str, Float[np.ndarray, " layer"]] = {}
    reasons = [list[str]() for _ in saliency.layers]

    # --- thinking rows
    rows = thinking[2:]
    if len(rows) == 0:
        _note(reasons, f"thinking has {len(thinking)} steps, its shares need a third")
    parts = np.zeros((len(PARTS), len(rows), len(roles)), dtype=bool)  # which keys belong to which part of a row
    for n, i in enumerate(rows):
        parts[0, n, i] = True
        parts[1, n, thinking[n + 1]] = True
        parts[2, n, thinking[: n + 1]] = True
        parts[3, n, question] = True
    of_row = np.einsum("lij,pij->pli", share[:, rows], parts)  # [part, layer, row]
    for name, x in zip(PARTS, of_row, strict=True):
        found[name] = _mean(x, filled[:, rows])
    local = of_row[:2].sum(0) - np.einsum("lij,pij->li", uniform[:, rows], parts[:2])
    found["lock_in"] = _mean(local, filled[:, rows])
    in_steps, in_tokens = _distances(saliency)
    found["reach_steps"] = _mean((share * in_steps).sum(-1)[:, rows], filled[:, rows])
    found["reach_tokens"] = _mean((share * in_tokens).sum(-1)[:, rows], filled[:, rows])
    of_uniform = np.broadcast_to((uniform * in_tokens).sum(-1)[:, rows], (len(share), len(rows)))
    found["reach_ratio"] = found["reach_tokens"] / _mean(of_uniform, filled[:, rows])
    _note(reasons, "no thinking row from the third on holds saliency", len(rows) > 0, ~filled[:, rows].any(-1))

    # --- summary rows
    if len(summary) == 0:
        _note(reasons, "there is no summary")
    _note(reasons, "no summary row holds saliency", len(summary) > 0, ~filled[:, summary].any(-1))
    for name, keys in zip(SUMMARY_PARTS, (thinking, question, summary), strict=True):
        found[name] = _mean(share[:, summary][:, :, keys].sum(-1), filled[:, summary])
    deficit = (uniform - share)[:, summary][:, :, thinking].sum(-1)
    found["thinking_deficit"] = _mean(deficit, filled[:, summary])
    found["summary_last"] = _mean(share[:, summary][:, :, thinking[-last:]].sum(-1), filled[:, summary])
    found["decay_slope"] = _slopes(share[:, summary][:, :, thinking], uniform[:, summary][:, :, thinking])
    _note(
        reasons,
        "decay_slope needs a summary row with saliency on every one of at least two thinking steps",
        len(summary) > 0,
        np.isnan(found["decay_slope"]),
    )
    middle = [saliency.layers.index(layer) for layer in saliency.computed("middle")]
    whole_middle = saliency.computed("middle") == layer_indices("middle", saliency.n_layers) and len(middle) > 0
    levels = found["summary_thinking"][middle]
    level = levels[np.isfinite(levels)].mean() if whole_middle and np.isfinite(levels).any() else np.nan
    found["summary_thinking_change"] = found["summary_thinking"] - level
    _note(reasons, "the middle half of the layers was not computed, to measure the change from", not whole_middle)
    _note(reasons, "no layer of the middle half has summary rows with saliency", whole_middle and bool(np.isnan(level)))
    if len(thinking) == 0:  # a share of nothing is no finding
        for name in ("summary_thinking", "thinking_deficit", "summary_thinking_change"):
            found[name] = np.full(len(share), np.nan)
    if len(thinking) <= last:
        found["summary_last"] = np.full(len(share), np.nan)
        _note(reasons, f"thinking has {len(thinking)} steps, summary_last needs more than {last}", len(summary) > 0)

    # --- the authors' intensities
    found["analysis_intensity"] = _block_mean(values, exists, thinking)
    found["final_intensity"] = _block_mean(values, exists, summary)
    if saliency.metadata.get("row_normalised"):
        found["analysis_intensity"] = found["final_intensity"] = np.full(len(values), np.nan)
        _note(reasons, "rows are normalised: no intensities")
    _note(reasons, "there is no thinking, so no analysis block", len(thinking) == 0)
    _note(reasons, "no summary step predicts a token", len(summary) > 0 and not exists[np.ix_(summary, summary)].any())
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = found["final_intensity"] / found["analysis_intensity"]
    found["intensity_ratio"] = np.where(np.isfinite(ratio), ratio, np.nan)
    _note(reasons, "the analysis block holds no saliency", len(thinking) > 0, found["analysis_intensity"] == 0)

    return pd.DataFrame(
        {
            "layer": saliency.layers,
            **{name: found[name] for name in COLUMNS},
            "n_thinking_rows": filled[:, rows].sum(-1),
            "n_summary_rows": filled[:, summary].sum(-1),
            "reason": ["; ".join(r) for r in reasons],
        }
    )


def trace_metrics(saliency: StepSaliency) -> pd.Series:
    """Lock-in and Decay of a trace, one number each.

        shallow_lock_in   mean of lock_in over the shallow band (bottom quarter of the layers)
        deep_decay        mean of thinking_deficit over the deep band (top quarter)
        deep_fade         minus the mean of summary_thinking_change over the deep band

    All lie in -1..1, and are positive where the failure is seen. `reason` says why any is NaN: as for `flow_metrics`,
    or because layers of a band were not computed.
    """
    import pandas as pd

    table = flow_metrics(saliency).set_index("layer")

    computed = {b: saliency.computed(b) == layer_indices(b, saliency.n_layers) for b in BANDS}

    def over(band: Band, column: str) -> float:
        return float(table.loc[list(saliency.computed(band)), column].mean(skipna=False)) if computed[band] else np.nan

    numbers = {
        "shallow_lock_in": over("shallow", "lock_in"),
        "deep_decay": over("deep", "thinking_deficit"),
        "deep_fade": -over("deep", "summary_thinking_change"),
    }
    reasons = [f"not all layers of the {band} band were computed" for band in BANDS if not computed[band]]
    if any(np.isnan(list(numbers.values()))):
        banded = [*saliency.computed("shallow"), *saliency.computed("deep")]
        reasons += [reason for reason in dict.fromkeys(table.loc[banded, "reason"]) if reason]
    return pd.Series({**numbers, "reason": "; ".join(reasons)})


def _uniform_map(saliency: StepSaliency) -> Float[np.ndarray, "query_step key_step"]:
    """The step map of a token map that is one at every pair."""
    counts, rows = (f(saliency.step_ids, saliency.n_steps) for f in (pair_counts, row_counts))
    return reduce_blocks(counts.double(), counts, rows, saliency.reduce).numpy()


def _distances(
    saliency: StepSaliency,
) -> tuple[Int[np.ndarray, "query_step key_step"], Float[np.ndarray, "query_step key_step"]]:
    """Distance of query step and key step in steps, and in tokens: the mean of t - k over the pairs of a block."""
    steps, lengths = np.arange(saliency.n_steps), np.array(saliency.step_lengths)
    ids = saliency.step_ids.numpy()
    first = np.array([np.flatnonzero(ids == i)[0] if n else 0 for i, n in zip(steps, lengths, strict=True)])
    rows = row_counts(saliency.step_ids, saliency.n_steps).numpy()  # the last token of all is no row
    centre_of_rows, centre_of_keys = first + (rows - 1) / 2, first + (lengths - 1) / 2
    tokens = np.tril(centre_of_rows[:, None] - centre_of_keys, -1)
    # a step of m rows: sum_{t<m} t (t + 1) / 2 over the sum_{t<m} (t + 1) pairs
    np.fill_diagonal(tokens, np.maximum(rows - 1, 0) / 3)
    return np.tril(steps[:, None] - steps), np.maximum(tokens, 0)


def _slopes(
    share: Float[np.ndarray, "layer row step"], uniform: Float[np.ndarray, "1 row step"]
) -> Float[np.ndarray, " layer"]:
    """Least-squares slope of log(share / uniform) over the distance from the last step.

    Mean over the rows that have saliency on every step: zeros have no logarithm, and leaving them out would hide decay.
    """
    if share.shape[-1] < 2:
        return np.full(len(share), np.nan)
    x = np.arange(share.shape[-1])[::-1] - (share.shape[-1] - 1) / 2
    there: Bool[np.ndarray, "layer row step"] = (share > 0) & (uniform > 0)
    y = np.log(np.where(there, share, 1.0)) - np.log(np.where(there, uniform, 1.0))
    return _mean((x * y).sum(-1) / (x**2).sum(), np.asarray(there.all(-1)))


def _block_mean(
    values: Float[np.ndarray, "layer step step"], exists: Bool[np.ndarray, "step step"], steps: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " layer"]:
    """Mean over the pairs of `steps` that hold a pair of tokens; NaN without any."""
    of_pairs = values[:, steps][:, :, steps][:, exists[np.ix_(steps, steps)]]
    return of_pairs.mean(-1) if of_pairs.shape[1] else np.full(len(values), np.nan)


def _normalised(values: Float[np.ndarray, "*layer query key"]) -> Float[np.ndarray, "*layer query key"]:
    mass = values.sum(-1, keepdims=True)
    return values / np.where(mass > 0, mass, 1.0)


def _mean(x: Float[np.ndarray, "layer row"], where: Bool[np.ndarray, "layer row"]) -> Float[np.ndarray, " layer"]:
    """Mean over rows; NaN where there is none."""
    n = where.sum(-1)
    return np.where(n > 0, np.where(where, x, 0.0).sum(-1) / np.maximum(n, 1), np.nan)


def _note(
    reasons: list[list[str]], text: str, applies: bool = True, layers: Bool[np.ndarray, " layer"] | None = None
) -> None:
    for i, of_layer in enumerate(reasons):
        if applies and (layers is None or layers[i]):
            of_layer.append(text)
