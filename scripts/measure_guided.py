"""Measure whether StepFlow helps where its gains say so: SmolLM2 on probes and on facts that it restates.

    python scripts/measure_guided.py fading        # log-probability of what is asked for, by number of filler sentences
    python scripts/measure_guided.py choose        # heads and strengths by likelihood, on premise recall in one wording
    python scripts/measure_guided.py probes        # chosen, paper's band, random heads, ..: on held-out probes
    python scripts/measure_guided.py faithfulness  # the same variants while answers are written
    python scripts/measure_guided.py               # all of these

Every number is kept in data/guided/, a file for each part, and computed once; what is there already is not computed
again. Heads are chosen on premise recall with k = 10 in the wording "boxes" (seeds 0 to 99), and judged on other seeds,
on the other wording and on the other probes.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import StepFlowConfig
from stepsal.experiments import Guidance, guide
from stepsal.generation.scoring import continuation_scores
from stepsal.intervention.heads import EditedHeads
from stepsal.tasks import faithfulness
from stepsal.tasks.probes import PROBES, WORDINGS, Kind, Wording, premise_recall

FOLDER = Path(__file__).parents[1] / "data" / "guided"
PRESETS = Path(__file__).parents[1] / "data" / "presets"
N_CHOOSE, N_FADING, N_JUDGE, N_QUESTIONS = 100, 60, 200, 300
JUDGE, QUESTIONS = 10_000, 20_000  # first seeds
KS = (0, 5, 10, 20)
N_NEW = 110  # tokens of an answer


def chosen_by_likelihood(model: TransformerBridge, n: int) -> Guidance:
    """Choose heads and strengths on premise recall; kept in a folder."""
    texts = [premise_recall(seed, k=10) for seed in range(n)]
    return guide(model, texts, folder=FOLDER / "guidance", alphas=())


def tables_of(guidance: Guidance) -> dict[str, pd.DataFrame]:
    """Return what there is to see of a guidance: gains of heads, settings that were tried, and the judgement."""
    gains, taus = guidance.gains, guidance.gains.bridge["tau_max"].values.tolist()
    bridge = [gains.summary("bridge", tau).assign(edit="bridge", strength=tau) for tau in taus]
    momentum = gains.summary("momentum").assign(edit="momentum", strength=1.0)
    return {"gains": pd.concat([*bridge, momentum]), "tried": guidance.tried, "judged": guidance.judged}


def variants(guidance: Guidance) -> dict[str, StepFlowConfig | None]:
    """Return what is compared: the chosen setting, weaker ones, the paper's, and random heads at the same strength."""
    config = guidance.chosen
    if config is None or not isinstance(config.oeb_layers, EditedHeads):
        raise SystemExit("no head was sure to gain: there is nothing to compare")
    n_layers, n_heads = guidance.gains.bridge.shape[-2:]
    n_chosen = config.oeb_layers.n_heads
    named: dict[str, StepFlowConfig | None] = {
        "no edit": None,
        "guided": config,
        "guided, τ .15": config.but(tau_max=0.15),
    }
    named["paper's band"] = StepFlowConfig(smi_layers=())
    named["paper's band, same τ"] = StepFlowConfig(smi_layers=(), tau_max=config.tau_max)
    for i in range(3):
        places = random.Random(i).sample([(x, y) for x in range(n_layers) for y in range(n_heads)], n_chosen)
        heads: dict[int, list[int]] = {}
        for layer, head in sorted(places):
            heads.setdefault(layer, []).append(head)
        named[f"random heads {i + 1}"] = config.but(oeb_layers=heads)
    return named


def once(name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Return the table of this name, made if it is not there."""
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        table = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        table.to_csv(partial, index=False, float_format="%.5g")
        partial.rename(path)
    return pd.read_csv(path)


def measure_fading(model: TransformerBridge, n: int) -> None:
    """Score all probes at several distances."""
    for kind, probe in PROBES.items():
        for wording in WORDINGS:
            for k in KS:
                texts = [probe(JUDGE + i, k, wording) for i in range(n)]
                once(f"fading_{kind}_{wording}_{k}", partial(continuation_scores, model, texts, batch_size=8))


def measure_probes(model: TransformerBridge, configs: Mapping[str, StepFlowConfig | None], n: int) -> None:
    """Score held-out probes under all variants."""
    kinds: list[tuple[Kind, Wording]] = [("premise_recall", wording) for wording in WORDINGS]
    kinds += [("hand_over", "boxes"), ("summary_recall", "boxes")]
    for kind, wording in kinds:
        texts = [PROBES[kind](JUDGE + i, 10, wording) for i in range(n if kind == "premise_recall" else n // 2)]
        right = [stepsal.Continuation(t.question, t.before, t.right, about=t.about) for t in texts]
        for i, (name, config) in enumerate(configs.items()):

            def score(
                texts: list[stepsal.Continuation] = right, config: StepFlowConfig | None = config, name: str = name
            ) -> pd.DataFrame:
                return continuation_scores(model, texts, config, batch_size=8, progress=True).assign(variant=name)

            once(f"probes_{kind}_{wording}_{i}", score)


def measure_faithfulness(model: TransformerBridge, configs: Mapping[str, StepFlowConfig | None], n: int) -> None:
    """Write answers under all variants, and count the facts that they restate."""
    for wording in reversed(WORDINGS):  # first the one that nothing was chosen on
        premises = [faithfulness.sample(QUESTIONS + i, wording) for i in range(n)]
        for i, (name, config) in enumerate(configs.items()):

            def make(
                config: StepFlowConfig | None = config, name: str = name, premises: list = premises
            ) -> pd.DataFrame:
                traces = stepsal.generate_batch(
                    model,
                    [p.question for p in premises],
                    stepflow=config,
                    max_new_tokens=N_NEW,
                    batch_size=16,
                    progress=True,
                )
                rows = []
                for p, trace in zip(premises, traces, strict=True):
                    restated = p.restated(trace.response)
                    rows.append({"seed": p.seed, "restated": len(restated), "right": sum(r.is_right for r in restated)})
                return pd.DataFrame(rows).assign(variant=name)

            once(f"faithfulness_{wording}_{i}", make)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("fading", "choose", "probes", "faithfulness")
    parser.add_argument("parts", nargs="*", default=parts, help=f"any of {', '.join(parts)}")
    options = parser.parse_args()
    model = stepsal.load("smollm2")
    if "fading" in options.parts:
        measure_fading(model, N_FADING)
    if set(options.parts) - {"fading"}:
        guidance = chosen_by_likelihood(model, N_CHOOSE)
        print(guidance.summary())
        for name, table in tables_of(guidance).items():
            once(name, partial(pd.DataFrame, table))
        guidance.save_preset(PRESETS / "guided-smollm2.json")
        configs = variants(guidance)
        if "probes" in options.parts:
            measure_probes(model, configs, N_JUDGE)
        if "faithfulness" in options.parts:
            measure_faithfulness(model, configs, N_QUESTIONS)


if __name__ == "__main__":
    main()
