"""Measure the embedded reasoner: greedy accuracy and first errors by difficulty, into data/mini/README.md.

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
TRAINED_LENGTH = 8  # the longest


def measure(cells: list[tuple[int, int | None]], n: int) -> pd.DataFrame:
    """Return one row per (chain length, distractors): how many of n problems are solved greedily, and other errors."""
    model = stepsal.load("mini")
    rows = []
    for length, distractors in tqdm(cells, desc="difficulty"):
        verdicts = []
        for start in range(FIRST_SEED, FIRST_SEED + n, BATCH):
            seeds = range(start, min(start + BATCH, FIRST_SEED + n))
            problems = [chain.sample(seed, length, distractors) for seed in seeds]
            traces = stepsal.generate_batch(model, [p.question for p in problems], max_new_tokens=60 + 30 * length)
            verdicts += [p.grade(t) for p, t in zip(problems, traces, strict=True)]
        correct = sum(v.correct for v in verdicts)
        interval = binomtest(correct, n).proportion_ci(method="wilson")
        errors = Counter(v.error for v in verdicts if v.error)
        rows.append(
            {
                "length": length,
                "distractors": "drawn" if distractors is None else distractors,
                "n": n,
                "correct": correct,
                "accuracy": correct / n,
                "low": interval.low,
                "high": interval.high,
                "final_answer_accuracy": sum(v.final_answer_correct for v in verdicts) / n,
                "first_errors": ", ".join(f"{kind} {count}" for kind, count in errors.most_common()),
            }
        )
    return pd.DataFrame(rows)


def table(results: pd.DataFrame) -> str:
    """Write results as a table in Markdown."""
    lines = [
        "| chain length | distractors | solved | accuracy [95 % interval] | answer right | first errors |",
        "|---:|---:|---:|---|---:|---|",
    ]
    for r in results.itertuples():
        lines.append(
            f"| {r.length} | {r.distractors} | {r.correct}/{r.n} | {r.accuracy:.1%} [{r.low:.1%}, {r.high:.1%}] "
            f"| {r.final_answer_accuracy:.1%} | {r.first_errors or 'none'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and write accuracy.csv and the tables of README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=300, help="problems per cell")
    args = parser.parse_args()
    readme = FOLDER / "README.md"
    head, mark, _ = readme.read_text().partition("<!-- measured -->")
    if not mark:
        raise SystemExit(f"{readme} has no line '<!-- measured -->' to write below")
    by_length = [(length, None) for length in range(1, chain.MAX_LENGTH + 1)]
    by_distractors = [(TRAINED_LENGTH, distractors) for distractors in (0, 6, 10, 14)]
    results = measure([*by_length, *by_distractors], args.n)
    results.to_csv(FOLDER / "accuracy.csv", index=False, float_format="%.6g")
    seeds = f"seeds {FIRST_SEED}..{FIRST_SEED + args.n - 1}"
    drawn = results["distractors"] == "drawn"
    text = f"""

Greedy decoding, {args.n} problems per line ({seeds}), Wilson intervals. By chain length, with the number of distractors
drawn as in training:

{table(results[drawn])}

And by the number of distractors at the longest trained length (training had at most {TRAINED_LENGTH // 2 + 2}):

{table(results[~drawn])}
"""
    readme.write_text(head + mark + text)
    print(text)


if __name__ == "__main__":
    main()
