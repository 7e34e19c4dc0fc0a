"""Evaluate StepFlow and its rivals; writes data/evaluations/<name>, which the notebooks read.

    python scripts/evaluate.py                     # all; goes on with what is there (hours on two cores)
    python scripts/evaluate.py mini-accuracy       # one of them

Problems have seeds from 900,000 on; nothing was tuned on them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import stepsal
from stepsal.evaluation import HINT, PLAN_AND_SOLVE, Variant, evaluate
from stepsal.tasks import Task
from stepsal.tasks.chain import ChainTask
from stepsal.tasks.gym import GymTask

ROOT = Path(__file__).parents[1] / "data" / "evaluations"
SEED = 900_000
Config = stepsal.StepFlowConfig
SUMS = {
    "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+"],
    "allow_parentheses": False, "allow_negation": False,
}  # fmt: skip
STEPS = "\nThink step by step. Then state the answer in a last paragraph of its own."

PARTS = [
    Variant("baseline"),
    Variant("OEB only", stepflow=Config(smi_layers=None)),
    Variant("SMI only", stepflow=Config(oeb_layers=None)),
    Variant("StepFlow", stepflow=Config()),
]
BANDS = [
    Variant("baseline"),
    *(Variant(f"OEB {b}", stepflow=Config(oeb_layers=(b, b + 1), smi_layers=None)) for b in (0, 2, 4, 6)),
    *(Variant(f"SMI {b}", stepflow=Config(oeb_layers=None, smi_layers=(b, b + 1))) for b in (0, 2, 4, 6)),
]
SETTINGS = [
    Variant("baseline"),
    *(Variant(f"tau_max {t}", stepflow=Config(tau_max=t, smi_layers=None)) for t in (0.02, 0.05, 0.1, 0.15, 0.3)),
    *(Variant(f"alpha {a}", stepflow=Config(alpha=a, oeb_layers=None)) for a in (0.03, 0.06, 0.12, 0.25, 0.5)),
]
MATCHED = [
    Variant("baseline"),
    Variant("longer", budget=440),
    Variant("StepFlow", stepflow=Config()),
    *(Variant(f"{k} votes", votes=k) for k in (2, 4, 8)),
    Variant("StepFlow, 2 votes", stepflow=Config(), votes=2),
]
PROMPTS = [*PARTS, Variant("Plan-and-Solve", instruction=PLAN_AND_SOLVE), Variant("hint", instruction=HINT),
           Variant("wait", wait=1)]  # fmt: skip


@dataclass(frozen=True)
class Run:
    model: str
    task: Task
    variants: list[Variant]
    n_problems: int = 500
    temperature: float = 0.0
    max_new_tokens: int = 330
    batch_size: int = 50


RUNS = {
    "mini-length-7": Run("mini", ChainTask(length=7), PARTS),
    "mini-length-8": Run("mini", ChainTask(length=8), PARTS),
    "mini-distractors-14": Run("mini", ChainTask(length=8, distractors=14), PARTS),
    "mini-length-9": Run("mini", ChainTask(length=9), PARTS),
    "mini-bands": Run("mini", ChainTask(length=8, distractors=14), BANDS),
    "mini-settings": Run("mini", ChainTask(length=8, distractors=14), SETTINGS),
    "mini-matched": Run("mini", ChainTask(length=8, distractors=14), MATCHED, temperature=1.0),
    "smollm2-sums": Run(
        "smollm2", GymTask("basic_arithmetic", SUMS, STEPS), PROMPTS, n_problems=100, temperature=0.6,
        max_new_tokens=160,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(RUNS))
    for name in parser.parse_args().names or RUNS:
        run = RUNS[name]
        found = evaluate(
            stepsal.load(run.model), run.task, run.variants, run.n_problems, folder=ROOT / name, seed=SEED,
            temperature=run.temperature, max_new_tokens=run.max_new_tokens, batch_size=run.batch_size,
        )  # fmt: skip
        print(name, found.accuracy().round(3).to_string(index=False), found.paired().round(3).to_string(index=False),
              sep="\n")  # fmt: skip


if __name__ == "__main__":
    main()
