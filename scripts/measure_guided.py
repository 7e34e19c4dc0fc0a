"""Measure whether StepFlow helps where its gains say so: SmolLM2 on probes and answers, mini on chains of definitions.

    python scripts/measure_guided.py fading        # log-probability of what is asked for, by number of filler sentences
    python scripts/measure_guided.py choose        # heads and strengths by likelihood, on premise recall in one wording
    python scripts/measure_guided.py predicted     # gains of single heads against what bridging them does
    python scripts/measure_guided.py probes        # chosen, paper's band, random heads, ..: on held-out probes
    python scripts/measure_guided.py faithfulness  # the same variants while answers are written
    python scripts/measure_guided.py answers       # and on questions that SmolLM2 answers right a third of the time
    python scripts/measure_guided.py transfer      # heads chosen on one kind of text, judged on the others
    python scripts/measure_guided.py mini          # the same for mini, on chains of definitions, from right solutions
    python scripts/measure_guided.py               # all of these

Every number is kept in data/guided/, a file for each part, and computed once; what is there already is not computed
again. Heads are chosen on premise recall with k = 10 in the wording "boxes" (seeds 0 to 99), and judged on other seeds,
on the other wording, on the other probes and on answers.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import StepFlowConfig
from stepsal.experiments import Guidance, guide
from stepsal.generation.scoring import continuation_scores
from stepsal.intervention.gains import Objective
from stepsal.intervention.heads import EditedHeads
from stepsal.tasks import chain, faithfulness
from stepsal.tasks.answers import Problem
from stepsal.tasks.probes import PROBES, WORDINGS, Kind, Wording, premise_recall
from stepsal.tasks.short_answers import SHORT_ANSWERS, ShortAnswer, ShortTask

FOLDER = Path(__file__).parents[1] / "data" / "guided"
PRESETS = Path(__file__).parents[1] / "data" / "presets"
N_CHOOSE, N_FADING, N_JUDGE, N_QUESTIONS = 100, 60, 200, 300
N_ANSWERS, N_TRANSFER = 500, 100  # of each wording; of each kind of text
JUDGE, QUESTIONS, ANSWERS = 10_000, 20_000, 40_000  # first seeds
N_SOLUTIONS, N_CHAINS = 600, 1000
SOLUTIONS, CHAINS = 600_000, 650_000  # first seeds
LENGTHS = (8, 9)
KS = (0, 5, 10, 20)
N_NEW, N_SHORT, N_CHAIN = 110, 32, 330  # tokens of an answer
VOTES, TEMPERATURE = 3, 0.7


class Variant(NamedTuple):
    """A way to answer: with or without an edit, of the question or of the question written twice, once or by vote."""

    config: StepFlowConfig | None = None
    twice: bool = False
    votes: int = 1


def chosen_by_likelihood(model: TransformerBridge, n: int, objective: Objective = "right") -> Guidance:
    """Choose heads and strengths on premise recall; kept in a folder."""
    texts = [premise_recall(seed, k=10) for seed in range(n)]
    folder = FOLDER / ("guidance" if objective == "right" else f"guidance_{objective}")
    return guide(model, texts, folder=folder, objective=objective, alphas=())


def tables_of(guidance: Guidance) -> dict[str, pd.DataFrame]:
    """Return what there is to see of a guidance: gains of heads, settings that were tried, and the judgement."""
    gains, taus = guidance.gains, guidance.gains.bridge["tau_max"].values.tolist()
    bridge = [gains.summary("bridge", tau).assign(edit="bridge", strength=tau) for tau in taus]
    momentum = gains.summary("momentum").assign(edit="momentum", strength=1.0)
    return {"gains": pd.concat([*bridge, momentum]), "tried": guidance.tried, "judged": guidance.judged}


def heads_by_attention(model: TransformerBridge, traces: Sequence[stepsal.Trace], n: int) -> dict[int, list[int]]:
    """Return the n heads that put most attention of their thinking on the question, with no look at what that does."""
    shares = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, dtype=torch.float64)
    for trace in traces:
        is_question, is_later = trace.step_ids == 0, trace.step_ids > 0

        def add(pattern: Tensor, hook: object, layer: int, rows: Tensor = is_later, keys: Tensor = is_question) -> None:
            shares[layer].add_(pattern[0, :, rows][..., keys].sum(-1).mean(-1).double())

        hooks: list[tuple[str | Callable, Callable]] = [
            (f"blocks.{layer}.attn.hook_pattern", partial(add, layer=layer)) for layer in range(len(shares))
        ]
        with torch.no_grad():
            model.run_with_hooks(trace.tokens[None], fwd_hooks=hooks)
    places = shares.flatten().argsort(descending=True)[:n].sort().values.tolist()
    heads: dict[int, list[int]] = {}
    for place in places:
        heads.setdefault(place // shares.shape[1], []).append(place % shares.shape[1])
    return heads


def random_heads(seed: int, n: int, n_layers: int, n_heads: int) -> dict[int, list[int]]:
    """Return n heads, drawn from all."""
    places = random.Random(seed).sample([(x, y) for x in range(n_layers) for y in range(n_heads)], n)
    heads: dict[int, list[int]] = {}
    for layer, head in sorted(places):
        heads.setdefault(layer, []).append(head)
    return heads


def variants(
    model: TransformerBridge, guidance: Guidance, contrast: Guidance, hand_over: Guidance
) -> dict[str, StepFlowConfig | None]:
    """Return what is compared: chosen settings, a weaker one, the paper's, and other heads at the same strength."""
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
    named["paper's StepFlow"] = StepFlowConfig()
    for i in range(3):
        heads = random_heads(i, n_chosen, n_layers, n_heads)
        named[f"random heads {i + 1}"] = config.but(oeb_layers=heads)
    texts = [premise_recall(seed, k=10).trace(model)[0] for seed in range(N_CHOOSE)]
    named["heads by attention"] = config.but(oeb_layers=heads_by_attention(model, texts, n_chosen))
    named["guided by contrast"] = contrast.chosen
    named["guided on hand-over"] = hand_over.chosen
    return named


def file_name(*words: object) -> str:
    """Return words as the name of a file."""
    return "_".join(re.sub(r"[^a-z0-9_]+", "-", str(word).lower()).strip("-") for word in words)


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


def measure_predicted(model: TransformerBridge, guidance: Guidance, n_heads: int, n_texts: int) -> None:
    """Bridge one head at a time, of those that are spread evenly from the largest gain to the smallest."""
    texts = [premise_recall(seed, k=10) for seed in range(N_CHOOSE)]
    for tau in (0.15, 0.5):
        table = guidance.gains.summary("bridge", tau).sort_values("gain")
        places = table.iloc[[round(i * (len(table) - 1) / (n_heads - 1)) for i in range(n_heads)]]

        def make(places: pd.DataFrame = places, tau: float = tau) -> pd.DataFrame:
            first_texts = [stepsal.Continuation(t.question, t.before, t.right) for t in texts[:n_texts]]
            predicted = stepsal.edit_gains(model, first_texts, taus=[tau]).of_texts().mean(0)
            plain = continuation_scores(model, first_texts, batch_size=8)["right"]
            rows = []
            for layer, head in places[["layer", "head"]].values.tolist():
                config = StepFlowConfig(oeb_layers={layer: [head]}, smi_layers=(), tau_max=tau)
                change = continuation_scores(model, first_texts, config, batch_size=8)["right"] - plain
                rows.append((layer, head, tau, predicted[layer, head], change.mean(), change.std() / n_texts**0.5))
            return pd.DataFrame(rows, columns=["layer", "head", "tau_max", "predicted", "measured", "stderr"])

        once(f"predicted_{tau}", make)


def measure_probes(model: TransformerBridge, configs: Mapping[str, StepFlowConfig | None], n: int) -> None:
    """Score held-out probes under all variants."""
    kinds: list[tuple[Kind, Wording]] = [("premise_recall", wording) for wording in WORDINGS]
    kinds += [("hand_over", "boxes"), ("summary_recall", "boxes")]
    for kind, wording in kinds:
        right = probes(kind, JUDGE, n if kind == "premise_recall" else n // 2, wording)
        for name, config in configs.items():

            def score(
                texts: list[stepsal.Continuation] = right, config: StepFlowConfig | None = config, name: str = name
            ) -> pd.DataFrame:
                return continuation_scores(model, texts, config, batch_size=8, progress=True).assign(variant=name)

            once(file_name("probes", kind, wording, name), score)


def measure_faithfulness(model: TransformerBridge, configs: Mapping[str, StepFlowConfig | None], n: int) -> None:
    """Write answers under all variants, and count the facts that they restate."""
    answered = {name: Variant(config) for name, config in configs.items()} | {"question twice": Variant(twice=True)}
    for wording in reversed(WORDINGS):  # first the one that nothing was chosen on
        premises = [faithfulness.sample(QUESTIONS + i, wording) for i in range(n)]
        for name, variant in answered.items():

            def make(variant: Variant = variant, name: str = name, premises: list = premises) -> pd.DataFrame:
                rows = []
                for p, trace in zip(premises, traces_of(model, premises, variant, N_NEW), strict=True):
                    restated = p.restated(trace.response)
                    rows.append({"seed": p.seed, "restated": len(restated), "right": sum(r.is_right for r in restated)})
                return pd.DataFrame(rows).assign(variant=name)

            once(file_name("faithfulness", wording, name), make)


def traces_of(
    model: TransformerBridge, problems: Sequence, variant: Variant, n_new: int, seed: int = 0, batch_size: int = 16
) -> list[stepsal.Trace]:
    """Write the answers of problems once; they are sampled where there is a vote."""
    questions = [f"{p.question} {p.question}" if variant.twice else p.question for p in problems]
    return stepsal.generate_batch(
        model,
        questions,
        stepflow=variant.config,
        max_new_tokens=n_new,
        temperature=TEMPERATURE if variant.votes > 1 else 0.0,
        seed=seed,
        batch_size=batch_size,
        progress=True,
    )


def graded(
    model: TransformerBridge, problems: Sequence[Any], variant: Variant, n_new: int, batch_size: int = 50
) -> list[bool]:
    """Answer problems, and say which answers are right; of several answers that which most of them give."""
    draws = [
        traces_of(model, problems, variant, n_new, seed=i * len(problems), batch_size=batch_size)
        for i in range(variant.votes)
    ]
    right = []
    for problem, traces in zip(problems, zip(*draws, strict=True), strict=True):
        verdicts = [problem.grade(trace) for trace in traces]
        if said := Counter(v.final_answer for v in verdicts if v.final_answer is not None).most_common(1):
            right.append(any(v.correct for v in verdicts if v.final_answer == said[0][0]))
        else:
            right.append(False)
    return right


def measure_answers(model: TransformerBridge, configs: Mapping[str, StepFlowConfig | None], n: int) -> None:
    """Answer questions whose answers can be graded, under all variants."""
    answered = {name: Variant(config) for name, config in configs.items()}
    answered |= {"question twice": Variant(twice=True), f"vote of {VOTES}": Variant(votes=VOTES)}
    for kind in SHORT_ANSWERS:
        problems = [ShortTask(kind, wording).sample(ANSWERS + i) for wording in WORDINGS for i in range(n)]
        words = [wording for wording in WORDINGS for _ in range(n)]
        for name, variant in answered.items():

            def make(
                variant: Variant = variant,
                name: str = name,
                problems: list[Problem] = problems,
                words: list[Wording] = words,
            ) -> pd.DataFrame:
                right = graded(model, problems, variant, N_SHORT)
                return pd.DataFrame({"wording": words, "right": right}).assign(variant=name)

            once(file_name("answers", kind, name), make)


def probes(kind: Kind, first: int, n: int, wording: Wording) -> list[stepsal.Continuation]:
    """Return probes with their right continuations alone."""
    texts = [PROBES[kind](first + i, 10, wording) for i in range(n)]
    return [stepsal.Continuation(t.question, t.before, t.right, about=t.about) for t in texts]


def short_answers(kind: ShortAnswer, first: int, n: int, wording: Wording) -> list[stepsal.Continuation]:
    """Return questions with short answers, and the right ones as continuations."""
    problems = [ShortTask(kind, wording).sample(first + i) for i in range(n)]
    return [stepsal.Continuation(p.question, "The answer is", f" {p.reference}") for p in problems]


def measure_transfer(model: TransformerBridge, n: int) -> None:
    """Choose heads on some kinds of text in one wording, and judge them on all kinds in the other wording."""
    kinds: dict[str, Callable[[int, int, Wording], list[stepsal.Continuation]]] = {
        **{kind: partial(probes, kind) for kind in PROBES},
        **{kind: partial(short_answers, kind) for kind in SHORT_ANSWERS},
    }

    def read(kind: str, source: str, config: StepFlowConfig | None) -> None:
        texts = kinds[kind](JUDGE, n, "villages")
        score = partial(continuation_scores, model, texts, config, batch_size=8)
        once(f"transfer_{source}_{kind}", lambda: score().assign(chosen_on=source, judged_on=kind))

    for kind in kinds:
        read(kind, "none", None)
    for source in kinds:
        if source == "premise_recall":
            guidance = chosen_by_likelihood(model, N_CHOOSE)
        else:
            guidance = guide(
                model, kinds[source](0, N_CHOOSE, "boxes"), folder=FOLDER / f"guidance_{source}", alphas=()
            )
        print(source, guidance.summary(), sep="\n")
        if guidance.chosen is not None:
            for kind in kinds:
                read(kind, source, guidance.chosen)


def guided_of_mini(model: TransformerBridge, n: int) -> dict[str, Variant]:
    """Choose heads and strengths of mini by right solutions of lengths 8 and 9; and others of the same number.

    What was chosen is answered with whether it helps by likelihood or not.
    """
    problems = [chain.sample(SOLUTIONS + i, length=LENGTHS[i % 2]) for i in range(n)]
    traces = [stepsal.Trace.from_text(p.question, p.solution(p.seed), model) for p in problems]
    answered: dict[str, Variant] = {}
    objectives: tuple[Objective, ...] = ("answer", "errors")
    for objective in objectives:
        guidance = guide(model, traces, folder=FOLDER / f"guidance_mini_{objective}", objective=objective)
        print(guidance.summary())
        for part in ("tried", "judged"):
            once(f"mini_{objective}_{part}", partial(pd.DataFrame, getattr(guidance, part)))
        gains = tables_of(guidance)["gains"]
        once(f"mini_{objective}_gains", partial(pd.DataFrame, gains))
        if objective == "answer":
            guidance.save_preset(PRESETS / "guided-mini.json")
        if (config := guidance.chosen) is None:
            continue
        answered[f"guided ({objective})"] = Variant(config)
        if objective == "answer" and isinstance(config.oeb_layers, EditedHeads):
            n_heads = config.oeb_layers.n_heads
            others = random_heads(0, n_heads, model.cfg.n_layers, model.cfg.n_heads)
            answered["random heads"] = Variant(config.but(oeb_layers=others))
            attending = heads_by_attention(model, traces[:N_CHOOSE], n_heads)
            answered["heads by attention"] = Variant(config.but(oeb_layers=attending))
    return answered


def measure_mini(n_solutions: int, n: int) -> None:
    """Answer problems of mini's under all variants."""
    model = stepsal.load("mini")
    answered = {"no edit": Variant(), **guided_of_mini(model, n_solutions)}
    answered |= {
        "paper's OEB": Variant(StepFlowConfig(smi_layers=())),
        "paper's StepFlow": Variant(StepFlowConfig()),
    }  # a vote costs several answers, see notebook 07
    for length in LENGTHS:
        problems = [chain.sample(CHAINS + i, length=length) for i in range(n)]
        for name, variant in answered.items():

            def make(variant: Variant = variant, name: str = name, problems: list = problems) -> pd.DataFrame:
                return pd.DataFrame({"right": graded(model, problems, variant, N_CHAIN)}).assign(variant=name)

            once(file_name("mini", length, name), make)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("fading", "choose", "predicted", "probes", "faithfulness", "answers", "transfer", "mini")
    parser.add_argument("parts", nargs="*", default=parts, help=f"any of {', '.join(parts)}")
    options = parser.parse_args()
    if "mini" in options.parts:
        measure_mini(N_SOLUTIONS, N_CHAINS)
    if set(options.parts) == {"mini"}:
        return
    model = stepsal.load("smollm2")
    if "fading" in options.parts:
        measure_fading(model, N_FADING)
    if set(options.parts) - {"fading", "mini"}:
        guidance = chosen_by_likelihood(model, N_CHOOSE)
        contrast = chosen_by_likelihood(model, N_CHOOSE, "contrast")
        for chosen, name in ((guidance, ""), (contrast, "contrast_")):
            print(chosen.summary())
            for part, table in tables_of(chosen).items():
                once(f"{name}{part}", partial(pd.DataFrame, table))
        guidance.save_preset(PRESETS / "guided-smollm2.json")
        hand_over = guide(
            model, probes("hand_over", 0, N_CHOOSE, "boxes"), folder=FOLDER / "guidance_hand_over", alphas=()
        )
        hand_over.save_preset(PRESETS / "guided-smollm2-hand-over.json")
        configs = variants(model, guidance, contrast, hand_over)
        if "predicted" in options.parts:
            measure_predicted(model, guidance, n_heads=25, n_texts=20)
        if "probes" in options.parts:
            measure_probes(model, configs, N_JUDGE)
        if "faithfulness" in options.parts:
            measure_faithfulness(model, configs, N_QUESTIONS)
        if "answers" in options.parts:
            as_trained = stepsal.load("smollm2", dtype=torch.bfloat16)
            measure_answers(as_trained, configs, N_ANSWERS)
        if "transfer" in options.parts:
            measure_transfer(model, N_TRANSFER)


if __name__ == "__main__":
    main()
