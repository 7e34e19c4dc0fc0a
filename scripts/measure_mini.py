"""Measure the embedded reasoner: greedy accuracy and first errors by chain length, into data/mini/README.md.

    python scripts/measure_mini.py            # about ten minutes on two cores

The problems' seeds lie below the training seeds; a problem counts as solved when every step and the answer are right.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import pandas as pd
from scipy.stats import binomtest
from tqdm.auto import tqdm

import stepsal
from stepsal.tasks import chain

FOLDER = Path(__file__).parents[1] / "data" / "mini"
BATCH = 100
FIRST_SEED = 500_000


def measure(lengths: list[int], n: int) -> pd.DataFrame:
    """One row per chain length: how many of n problems are solved greedily, and the first errors of the others."""
    model = stepsal.load("mini")
    rows = []
    for length in tqdm(lengths, desc="chain length"):
        verdicts = []
        for start in range(FIRST_SEED, FIRST_SEED + n, BATCH):
            seeds = range(start, min(start + BATCH, FIRST_SEED + n))
            problems = [chain.sample(seed, length=length) for seed in seeds]
            traces = stepsal.generate_batch(model, [p.question for p in problems], max_new_tokens=60 + 30 * length)
            verdicts += [p.grade(t) for p, t in zip(problems, traces, strict=True)]
        correct = sum(v.correct for v in verdicts)
        interval = binomtest(correct, n).proportion_ci(method="wilson")
        errors = Counter(v.error for v in verdicts if v.error)
        rows.append(
            {
                "length": length,
                "n": n,
                "correct": correct,
                "accuracy": correct / n,
                "low": interval.low,
                "high": interval.high,
                "answer_accuracy": sum(v.answer_correct for v in verdicts) / n,
                "first_errors": ", ".join(f"{kind} {count}" for kind, count in errors.most_common()),
            }
        )
    return pd.DataFrame(rows)


def table(results: pd.DataFrame) -> str:
    lines = [
        "| chain length | solved | accuracy [95 % interval] | answer right | first errors |",
        "|---:|---:|---|---:|---|",
    ]
    for r in results.itertuples():
        lines.append(
            f"| {r.length} | {r.correct}/{r.n} | {r.accuracy:.1%} [{r.low:.1%}, {r.high:.1%}] "
            f"| {r.answer_accuracy:.1%} | {r.first_errors or 'none'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(range(1, chain.MAX_LENGTH + 1)))
    parser.add_argument("-n", type=int, default=300, help="problems per length")
    args = parser.parse_args()
    results = measure(args.lengths, args.n)
    results.to_csv(FOLDER / "accuracy.csv", index=False, float_format="%.6g")
    readme = FOLDER / "README.md"
    head, mark, _ = readme.read_text().partition("<!-- measured -->")
    if not mark:
        raise SystemExit(f"{readme} has no line '<!-- measured -->' to write below")
    seeds = f"seeds {FIRST_SEED}..{FIRST_SEED + args.n - 1}"
    text = f"\n\nGreedy decoding, {args.n} problems per length ({seeds}), Wilson intervals.\n\n"
    readme.write_text(head + mark + text + table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
