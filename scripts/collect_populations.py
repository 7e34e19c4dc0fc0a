"""Collect the populations in data/ that the notebooks start from.

    python scripts/collect_populations.py            # both; goes on with what is there
    python scripts/collect_populations.py mini       # the embedded reasoner on chains of 8 definitions among 14 others
    python scripts/collect_populations.py smollm2    # SmolLM2 on sums of two numbers from 0 to 10, each several times

Remove a folder to make it anew. Settings were chosen so that there are many traces of either outcome, on seeds that
are not in the populations: of other procedural arithmetic SmolLM2 solves hardly anything, or says it in one sentence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import stepsal
from stepsal.tasks.chain import ChainTask
from stepsal.tasks.gym import GymTask

INSTRUCTION = "\nThink step by step. Then state the answer in a last paragraph of its own."
SUMS = {
    "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+"],
    "allow_parentheses": False, "allow_negation": False,
}  # fmt: skip
DATA = Path(__file__).parents[1] / "data"
POPULATIONS = {
    "mini": (ChainTask(length=8, distractors=14), 600, stepsal.Decoding(max_new_tokens=330, temperature=1.0)),
    "smollm2": (
        GymTask("basic_arithmetic", SUMS, INSTRUCTION), 400, stepsal.Decoding(max_new_tokens=160, temperature=0.6),
    ),
}  # fmt: skip
SEED = 700_000


def main() -> None:
    """Collect the populations that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(POPULATIONS))
    for name in parser.parse_args().names or POPULATIONS:
        task, n_problems, decoding = POPULATIONS[name]
        folder = DATA / f"population_{name}"
        population = stepsal.collect(
            stepsal.load(name), task, n_problems, folder, decoding=decoding, seed=SEED, batch_size=100
        )
        n_correct = int(population.answers["correct"].sum())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{population}: {n_correct} correct, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
