"""Say in a few lines what came out: a table that fits a terminal, and the finding in sentences."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stepsal.stats.checks import require_columns

if TYPE_CHECKING:
    from stepsal.stats.paired import PairedDifference

WIDTH = 100  # columns
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Report:
    """A title, a table of texts, and sentences; `str` writes it for a terminal, JupyterLab shows it as HTML.

    Attributes:
        title: what was measured, on what.
        table: what came out, as texts; it has to fit `WIDTH` columns.
        sentences: the findings.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"variant": ["baseline"], "accuracy": ["50 %"]})
        >>> print(stepsal.stats.report.Report("mini on chains", table, ["Nothing was compared."]))
        mini on chains
        variant   accuracy
        baseline      50 %
        Nothing was compared.
    """

    title: str
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    sentences: Sequence[str] = ()

    def __str__(self) -> str:
        lines = textwrap.wrap(self.title, WIDTH)
        if len(self.table):
            columns = [[str(name), *map(str, self.table[name])] for name in self.table]
            widths = [max(map(len, column)) for column in columns]
            are_names = [True, *[False] * (len(columns) - 1)]  # names go to the left, numbers to the right
            for cells in zip(*columns, strict=True):
                parts = [
                    cell.ljust(width) if is_name else cell.rjust(width)
                    for cell, width, is_name in zip(cells, widths, are_names, strict=True)
                ]
                lines.append("  ".join(parts).rstrip())
        for sentence in self.sentences:
            lines += textwrap.wrap(sentence, WIDTH)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.table.to_html(index=False, border=0, escape=True) if len(self.table) else ""
        sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.sentences)
        return f"<div><p><b>{html.escape(self.title)}</b></p>{table}{sentences}</div>"


def sentence_of_difference(name: str, baseline: str, change: PairedDifference) -> str:
    """Say how the accuracy of a variant differs from that of the baseline, how sure that is, and what would be seen.

    Args:
        name: name of the variant.
        baseline: name of the baseline.
        change: the difference between them.

    Example:
        >>> import numpy as np
        >>> before, after = np.zeros((20, 1), dtype=bool), np.arange(20)[:, None] < 12
        >>> change = stepsal.stats.paired_difference(before, after)
        >>> print(stepsal.stats.report.sentence_of_difference("StepFlow", "baseline", change))
        StepFlow is better than baseline: +60.0 points (95 %: +31.8 to +77.3), p = 0.0008; 12 fixed, 0 broken, n = 20.
    """
    numbers = (
        f"{100 * change.difference:+.1f} points (95 %: {100 * change.low:+.1f} to {100 * change.high:+.1f}), "
        f"p = {p_in_words(change.p)}; {change.fixed} fixed, {change.broken} broken, n = {change.n_problems}"
    )
    if change.n_different < change.n_problems:
        numbers += f" ({change.n_different} different)"
    if change.p <= SIGNIFICANCE and change.low * change.high > 0:
        return f"{name} is {'better' if change.difference > 0 else 'worse'} than {baseline}: {numbers}."
    return (
        f"Between {name} and {baseline} no difference is seen: {numbers}. Of differences of "
        f"{100 * change.detectable:.1f} points, 4 of 5 would be seen."
    )


def p_in_words(p: float) -> str:
    """Return a p-value with as many digits as one reads.

    Args:
        p: the p-value.

    Example:
        >>> [stepsal.stats.report.p_in_words(p) for p in (0.00021, 0.0312, 1.0, float("nan"))]
        ['0.0002', '0.031', '1', '-']
    """
    if np.isnan(p):
        return "-"
    return f"{p:.1g}" if p < 0.001 else f"{p:.2g}"


def summarize(contrasts: pd.DataFrame) -> Report:
    """Say what the table of `compare_groups` holds: how many layers differ, where most, and what matching leaves.

    Args:
        contrasts: the table, of one metric.

    Returns:
        The report; `print` writes it within 100 columns, JupyterLab shows it as a table.

    Raises:
        ValueError: the table is of several metrics, or not of `compare_groups`.

    Example:
        >>> import pandas as pd
        >>> data = pd.DataFrame({"trace": range(40), "n_steps": [4, 4, 4, 5] * 10, "decay": range(40)})
        >>> table = stepsal.stats.compare_groups(data[:20], data[20:], "decay", match=["n_steps"])
        >>> print(stepsal.stats.summarize(table).sentences[0])
        All traces (20 correct, 20 wrong): decay is higher in wrong ones, by 20 (95 %: 16.4 to 23.6), p = 0.0002.
    """
    require_columns("contrasts", contrasts, ["metric", "matching", "difference", "low", "high", "hedges_g", "p"])
    names = contrasts["metric"].unique()
    if len(names) != 1:
        raise ValueError(f"contrasts are of {', '.join(map(repr, names))}: summarize them one by one")
    layered = "layer" in contrasts
    rows = contrasts.dropna(subset=["difference"])
    table = pd.DataFrame({"traces": rows["matching"].map(_matching_in_words)})
    if layered:
        table["layer"] = rows["layer"].astype(int)
    table["correct"], table["wrong"] = (rows[f"mean_{group}"].map("{:.3g}".format) for group in ("correct", "wrong"))
    table["wrong - correct"] = rows["difference"].map("{:+.3g}".format)
    table["95 %"] = [_interval(low, high) for low, high in zip(rows["low"], rows["high"], strict=True)]
    table["Hedges' g"] = rows["hedges_g"].map("{:+.2f}".format)
    table["p"] = rows["p"].map(p_in_words)
    if layered:
        table["q"] = rows["q"].map(p_in_words)
    sentences = [
        _sentence_of_contrast(names[0], str(name), of_matching.dropna(subset=["difference"]), layered)
        for name, of_matching in contrasts.groupby("matching", sort=False)
    ]
    return Report(f"{names[0]}, wrong minus correct traces", table.reset_index(drop=True), sentences)


def _sentence_of_contrast(metric: str, matching: str, rows: pd.DataFrame, layered: bool) -> str:
    """Say whether and where groups differ."""
    who = "All traces" if matching == "none" else "Traces of similar length"
    if rows.empty:
        return f"{who}: there is nothing to compare, since no stratum has traces of both groups."
    n = f"{who} ({rows['n_correct'].iloc[0]} correct, {rows['n_wrong'].iloc[0]} wrong)"
    test = "q" if layered else "p"
    sure = rows[rows[test] <= SIGNIFICANCE]
    sizes = (sure if len(sure) else rows)["hedges_g"].abs().fillna(0).to_numpy()
    best = (sure if len(sure) else rows).iloc[int(sizes.argmax())]
    numbers = f"by {abs(best['difference']):.3g} (95 %: {_interval(*_ends(best))}), {test} = {p_in_words(best[test])}"
    direction = "higher" if best["difference"] > 0 else "lower"
    if sure.empty:
        verb = "differs in no layer, smallest" if layered else "is not seen to differ,"
        return f"{n}: {metric} {verb} {test} = {p_in_words(float(rows[test].min()))}."
    if not layered:
        return f"{n}: {metric} is {direction} in wrong ones, {numbers}."
    return (
        f"{n}: {metric} differs in {len(sure)} of {len(rows)} layers, most in layer {int(best['layer'])}, where it is "
        f"{direction} in wrong ones, {numbers}."
    )


def _ends(row: pd.Series) -> tuple[float, float]:
    """Return the interval of a difference's size."""
    return (row["low"], row["high"]) if row["difference"] > 0 else (-row["high"], -row["low"])


def _interval(low: float, high: float) -> str:
    return "-" if np.isnan(low) else f"{low:.3g} to {high:.3g}"


def _matching_in_words(matching: str) -> str:
    return "all" if matching == "none" else "matched"
