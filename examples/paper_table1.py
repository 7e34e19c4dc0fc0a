#!/usr/bin/env python3
"""Put the logs of paper_table1.sh in one table, the paper's numbers beside ours under their own label."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from inspect_ai.log import list_eval_logs, read_eval_log

from stepsal.stats.paired import accuracy, paired_difference

ROOT = Path(__file__).parents[1]
VARIANTS = ("baseline", "StepFlow")
NAMES = {"aime24": "AIME24", "aime25": "AIME25", "math500": "MATH-500", "gpqa-diamond": "GPQA-D"}


def verdicts(folder: Path) -> pd.DataFrame:
    """Return which samples of which problems are correct, [problem, sample], from the finished log of a folder."""
    logs = [read_eval_log(info) for info in list_eval_logs(str(folder))]
    finished = [log for log in logs if log.status == "success" and log.samples]
    if not finished:
        raise SystemExit(f"{folder} has no finished log: run examples/paper_table1.sh again, it goes on")
    rows = [(s.id, s.epoch, s.scores["graded"].value == "C") for s in finished[-1].samples or [] if s.scores]
    return pd.DataFrame(rows, columns=["problem", "sample", "correct"]).pivot(index="problem", columns="sample")


def main(logs: Path) -> None:
    """Print a row for each benchmark that has logs without and with StepFlow."""
    reported = pd.read_csv(ROOT / "data" / "paper" / "accuracy.csv")
    rows = []
    for folder in sorted(logs.glob("*-stepflow-false")):
        benchmark = folder.name.removesuffix("-stepflow-false")
        plain, edited = (verdicts(logs / f"{benchmark}-stepflow-{on}").to_numpy() for on in ("false", "true"))
        difference = paired_difference(plain, edited)
        row = {"benchmark": benchmark, "problems": plain.shape[0], "samples": plain.shape[1]}
        for name, correct in (("baseline", plain), ("StepFlow", edited)):
            share = accuracy(correct)
            row[name] = f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"
        low, high = 100 * difference.low, 100 * difference.high
        row["difference"] = f"{100 * difference.difference:+.1f} ({low:+.1f} to {high:+.1f})"
        theirs = reported[(reported["model"] == "R1-Distill-7B") & (reported["benchmark"] == NAMES.get(benchmark))]
        row |= {f"{r.variant}, reported": r.accuracy_percent for r in theirs.itertuples() if r.variant in VARIANTS}
        rows.append(row)
    print(pd.DataFrame(rows).fillna("").to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
