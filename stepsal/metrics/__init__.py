"""Lock-in and Decay as numbers: how the rows of a step map spread over own, neighbouring, earlier and question steps.

`values[l, i, j]` of a `StepSaliency` (layer l, query step i, key step j) is written I[i, j] below. All shares are taken
on row-normalised maps, R[i, j] = I[i, j] / sum_j' I[i, j'], so that scaling a row changes nothing.

What a share means depends on how long steps are and how many there are; therefore some metrics are set against the map
U that a *uniform causal* token map would give for the same tokens, row-normalised likewise: under reduce="density" U is
the same for all steps that exist, under reduce="mass" it grows with their number of tokens. That takes out what uniform
attention explains, not all that length does: where a share is near its ceiling whatever the length, the difference from
U moves with U alone. So look at the share itself as well, and match for length (`stepsal.stats.compare_groups`).

The metrics stand in `METRICS`, each with its formula, its range and when it is undefined; `describe` shows them as a
table. In the formulas T are the thinking steps in order, S the summary steps, Q the question, and < > is a mean over
rows that hold saliency: thinking rows from the third on, i in T[2:], so that a step itself, the one before, earlier
ones and the question all exist; or summary rows, i in S. Intensities are the authors' (arXiv 2604.06695, code), on maps
that are not row-normalised, over the pairs of steps that exist.

`flow_metrics` computes the metrics of each layer, `trace_metrics` those of the trace as a whole. An undefined metric is
NaN, and `reason` says why.
"""

from stepsal.metrics.flow import describe, flow_metrics, trace_metrics
from stepsal.metrics.table import COLUMNS, METRICS, PARTS, SCALARS, SUMMARY_PARTS

__all__ = ["COLUMNS", "METRICS", "PARTS", "SCALARS", "SUMMARY_PARTS", "describe", "flow_metrics", "trace_metrics"]
