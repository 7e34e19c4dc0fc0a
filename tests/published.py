"""Compute the numbers that README.md and the notebooks state from the committed figures, benchmarks and answers."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors

ROOT = Path(__file__).parents[1]

Numbers = Sequence[float]


@functools.cache
def figure(name: str) -> pd.DataFrame:
    """Read the values that a figure shows."""
    return pd.read_csv(ROOT / "figures" / "data" / f"{name}.csv")


def provenance(name: str) -> dict:
    """Read the parameters that a figure was made with."""
    return json.loads((ROOT / "figures" / "data" / f"{name}.json").read_text())["provenance"]


@functools.cache
def benchmark(name: str) -> pd.DataFrame:
    """Read a table of measured costs."""
    return pd.read_csv(ROOT / "benchmarks" / "results" / f"{name}.csv")


@functools.cache
def answers(folder: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read some columns of all answers that a folder in `data/` keeps."""
    files = sorted((ROOT / "data" / folder).rglob("answers.parquet"))
    assert files, f"data/{folder} has no answers"
    return pd.concat([pd.read_parquet(file, columns=list(columns)) for file in files], ignore_index=True)


def pick(table: pd.DataFrame, columns: str, **where: object) -> Numbers:
    """Return some columns of the one row that has these values."""
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1, f"{len(table)} rows with {where}"
    return [float(table[column].iloc[0]) for column in columns.split()]


def change(task: str, variant: str = "StepFlow", columns: str = "value low high") -> Numbers:
    """Return how much a variant gains on a task of notebook 05, in points, with its interval."""
    return pick(figure("accuracy_ablation"), columns, of="change, points", task=task, variant=variant, label="ours")


MINI_TASKS = ("mini: 7 needed", "mini: 8 needed", "mini: 8, 14 not needed", "mini: 9 needed")


def range_on_mini() -> Numbers:
    """Return the smallest and the largest loss of mini under StepFlow; no interval reaches zero."""
    changes = np.array([change(task) for task in MINI_TASKS])
    assert (changes[:, 2] < 0).all()
    return [changes[:, 0].max(), changes[:, 0].min()]


def votes(model: str, variant: str, column: str = "accuracy", factor: float = 100) -> float:
    """Return a value of notebook 07, accuracies in percent."""
    return factor * pick(figure("matched_compute"), column, model=model, variant=variant)[0]


def ratio(model: str, variant: str, column: str = "flops_ratio") -> float:
    """Return what an answer of notebook 07 costs, relative to the baseline's."""
    return votes(model, variant, column, 1)


def gain(model: str, variant: str, baseline: str = "baseline") -> float:
    """Return the difference between two variants of notebook 07, in points."""
    return votes(model, variant) - votes(model, baseline)


def setting_gain(variant: str) -> float:
    """Return the difference between a variant of notebook 06 and its baseline, in points."""
    accuracy = figure("bands_accuracy" if variant in set(figure("bands_accuracy")["variant"]) else "sensitivity")
    (baseline,) = pick(figure("bands_accuracy"), "accuracy", variant="baseline")
    return pick(accuracy, "accuracy", variant=variant)[0] - baseline


def within(group: str, columns: str = "difference low high") -> Numbers:
    """Return the difference in a group of problems of notebook 08, in points, with its interval."""
    return pick(figure("difficulty_gain"), columns, group=group)


def errors(kinds: Sequence[str] = (), columns: str = "fixed broken") -> Numbers:
    """Count first errors of some kinds, or of all, over the four sets of notebook 08."""
    table = figure("error_types")
    return table[table["error"].isin(kinds) if kinds else slice(None)][columns.split()].sum().tolist()


BOOKKEEPING = ("missing step", "repeated step", "unneeded step")
CARRY = ("wrong arithmetic", "wrong carry")


def share_of_fixed(kinds: Sequence[str]) -> float:
    """Return the percentage that some kinds of errors have of all that are fixed."""
    return 100 * errors(kinds)[0] / errors()[0]


def case(name: str, columns: str, **where: object) -> Numbers:
    """Return numbers of the setting that a calibration of notebook 10 chose."""
    return pick(figure("calibration_halving"), columns, case=name, chosen=True, **where)


def held_out(name: str, columns: str = "difference low high n") -> Numbers:
    """Return what the chosen setting gained on problems that nothing was chosen by, in points."""
    return case(name, columns, round="held out")


def search(name: str, columns: str = "difference n") -> Numbers:
    """Return what the chosen setting gained in the last round of the search, in points."""
    table = figure("calibration_halving")
    rounds = table[(table["case"] == name) & (table["round"] != "held out")]["round"].astype(int)
    return case(name, columns, round=str(rounds.max()))


def n_settings(name: str) -> int:
    """Count the settings that a calibration began with."""
    table = figure("calibration_halving")
    return len(table[(table["case"] == name) & (table["round"] == "1")])


def scalar(model: str, metric: str, error: str = "all wrong", columns: str = "difference low high") -> Numbers:
    """Return wrong minus correct in a scalar of notebook 03, with its interval."""
    return pick(figure("profiles_scalars"), columns, model=model, metric=metric, error=error)


def scalars(metric: str) -> Numbers:
    """Return a row of the table of notebook 03: two models, all traces and those of similar length."""
    errors = ("all wrong", "all wrong, similar length")
    return [x for model in ("mini", "smollm2") for error in errors for x in scalar(model, metric, error)]


def counts() -> Numbers:
    """Return how many correct and wrong problems stand behind lock-in and decay, in the order of the table."""
    groups = [(m, e) for m in ("mini", "smollm2") for e in ("all wrong", "all wrong, similar length")]
    return [
        x for m, e in groups for s in ("shallow_lock_in", "deep_decay") for x in scalar(m, s, e, "n_correct n_wrong")
    ]


def auroc(name: str, predictor: str, columns: str = "auroc low high") -> Numbers:
    """Return how well a predictor of notebook 03 tells wrong from correct."""
    return pick(figure("profiles_auroc"), columns, case=name, predictor=predictor)


def local_share() -> Numbers:
    """Return the share of a thinking row of mini on its own and the previous step, mean over the shallow layers."""
    table = figure("profiles_thinking")
    table = table[(table["model"] == "mini") & (table["metric"] == "local") & table["layer"].isin((0, 1))]
    return [table[table["outcome"] == outcome]["mean"].mean() for outcome in ("correct", "wrong")]


def analysis_block() -> Numbers:
    """Return the smallest and the largest difference of the analysis block of mini between layers, in log10."""
    table = figure("profiles_intensity")
    table = table[(table["model"] == "mini") & (table["metric"] == "log_analysis")]
    wide = table.pivot(index="layer", columns="outcome", values="mean")
    return (wide["wrong"] - wide["correct"]).agg(["min", "max"]).tolist()


def least_correlation(kind: str) -> Numbers:
    """Return the correlation between another kind of map and the paper's, in the layer where it is lowest, by model."""
    table = figure("profiles_targets")
    table = table[(table["metric"] == "correlation") & (table["kind"] == kind)]
    return [table[table["model"] == model]["mean"].min() for model in ("mini", "smollm2")]


def of_mean_map(where: str, trace: str) -> float:
    """Return lock-in of the shallow, or the summary's share on the thinking in the deep mean map of notebook 02."""
    table = figure("fig2_flow_mean")
    table = table[(table["trace"] == trace) & (table["band"] == where)]
    values = table.pivot(index="query_step", columns="key_step", values="saliency").fillna(0).to_numpy()
    thinking = range(1, len(values) - 1)
    if where == "deep":
        return values[-1, thinking].sum()
    return np.mean([values[i, i - 1 : i + 1].sum() for i in thinking[2:]])


def both_outcomes(where: str) -> Numbers:
    """Return a number of notebook 02 in correct and in wrong traces, and the difference."""
    correct, wrong = of_mean_map(where, "correct"), of_mean_map(where, "wrong")
    return [correct, wrong, wrong - correct]


def share_of_rows(part: str, layers: Sequence[int], *names: str) -> Numbers:
    """Return a share of notebook 04, mean over layers, of maps without StepFlow and of others."""
    table = figure("stepflow_profiles")
    table = table[(table["part"] == part) & table["layer"].isin(layers)]
    return [table[table["stepflow"] == name]["share"].mean() for name in names]


TO_QUESTION, TO_THINKING = "thinking → question", "summary → thinking"
PLAIN, AGAIN, ANEW = "without", "same traces, with", "answered again, with"


def long_trace() -> Numbers:
    """Return what the thinking of a long trace puts on the question, in percent: shallow without and with, deep."""
    table = figure("stepflow_long")
    thinking = table["query_step"].between(1, table["query_step"].max() - 1) & (table["key_step"] == 0)
    shares = 100 * table[thinking].groupby(["band", "stepflow"])["saliency"].mean()
    return [shares["shallow", "without"], shares["shallow", "with"], shares["deep", "without"]]


def raised() -> Numbers:
    """Return the percentage of rows in which the bridge was raised while traces were read again."""
    table = figure("stepflow_profiles")
    table = table[table["panel"] == "bridge, traces read again"]
    return [100 * table["fired"].sum() / table["rows"].sum()]


def effect(model: str, variant: str, place: int, column: str) -> Numbers:
    """Return what an edit of notebook 05 does to the token at a place of its step."""
    return pick(figure("accuracy_effects"), column, model=model, variant=variant, in_step=place)


def n_problems(folder: str) -> int:
    """Count the problems that a folder of evaluations has answers to."""
    return answers(f"evaluations/{folder}", ("problem",))["problem"].nunique()


def n_sums() -> Numbers:
    """Return how many different questions the first 200 sums have, and that there are 200."""
    table = answers("evaluations/smollm2-sums", ("problem", "question"))
    table = table[table["problem"] < 200]
    return [table["question"].nunique(), table["problem"].nunique()]


def n_weights() -> Numbers:
    """Return the parameters of the embedded reasoner, in millions."""
    with safetensors.safe_open(ROOT / "data" / "mini" / "model.safetensors", framework="np") as file:
        return [sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys()) / 1e6]  # noqa: SIM118


def n_traces() -> Numbers:
    """Count the traces of the two populations."""
    return [sum(len(answers(f"population_{model}", ("correct",))) for model in ("mini", "smollm2"))]


def guided(name: str, **where: object) -> Numbers:
    """Return n, the changes under four variants of notebook 12 with their intervals, and those under random heads."""
    variants = ("guided", "guided, τ .15", "guided by contrast", "paper's band")
    numbers = pick(figure(f"guided_{name}"), "n", variant="guided", **where)
    for variant in variants:
        numbers = [*numbers, *pick(figure(f"guided_{name}"), "mean low high", variant=variant, **where)]
    for i in range(3):
        numbers = [*numbers, *pick(figure(f"guided_{name}"), "mean", variant=f"random heads {i + 1}", **where)]
    return numbers


def on_hand_over(task: str, wording: str = "both") -> Numbers:
    """Return the change in answers under the heads that were chosen on hand-over, in points, with its interval."""
    variant = "guided on hand-over"
    return pick(figure("guided_answers"), "mean low high", variant=variant, task=task, wording=wording)


def guided_as_readme() -> Numbers:
    """Return what README.md says of guided StepFlow: two probes, recall (with random heads), stories and facts."""
    probes, answers = figure("guided_probes"), figure("guided_answers")
    interval, guided_alone = "mean low high", {"variant": "guided"}
    recall = {"probe": "premise_recall"}
    return [
        *pick(probes, "n", **guided_alone, **recall, wording="boxes"),
        *pick(probes, interval, **guided_alone, **recall, wording="boxes"),
        *pick(probes, interval, **guided_alone, **recall, wording="villages"),
        *pick(answers, f"{interval} n", **guided_alone, task="recall"),
        *(pick(answers, "mean", variant=f"random heads {i + 1}", task="recall")[0] for i in range(3)),
        *pick(answers, interval, **guided_alone, task="stories"),
        *(pick(answers, "mean", **guided_alone, task="facts", wording=w)[0] for w in ("boxes", "villages")),
    ]


def question_twice() -> Numbers:
    """Return what writing the question twice changes in facts of both wordings, in recall and in stories."""
    changes = figure("guided_answers").query("variant == 'question twice'").set_index(["task", "wording"])["mean"]
    return [
        changes["facts", "boxes"],
        changes["facts", "villages"],
        changes["recall", "both"],
        changes["stories", "both"],
    ]


def refilled_plain() -> Numbers:
    """Return the mean length of answers of very different lengths, and how much faster they come than in batches."""
    return pick(benchmark("decode_refill"), "mean_length speed", variant="plain")


def refilled_under_stepflow() -> Numbers:
    """Return how much faster they come under StepFlow."""
    return pick(benchmark("decode_refill"), "speed", variant="StepFlow")


def long_prompt() -> Numbers:
    """Return the tokens of the longest prompt, and its seconds and gigabytes, plain and under StepFlow."""
    table = benchmark("decode_prompt")
    longest = table["tokens"].max()
    seconds_and_bytes = [pick(table, "seconds added_bytes", tokens=longest, variant=v) for v in ("plain", "StepFlow")]
    return [longest, *(x for seconds, n_bytes in seconds_and_bytes for x in (seconds, n_bytes / 1e9))]


def milliseconds_of_python() -> Numbers:
    """Return the milliseconds of a token where matrices cost nothing: all, ours of these, and what StepFlow adds."""
    table = benchmark("decode_python")
    theirs, plain, edited = (
        1000 / pick(table, "tokens_per_second", variant=name)[0] for name in ("transformers", "plain", "StepFlow")
    )
    return [plain, plain - theirs, edited - plain]


def maps_on_a_gpu() -> Numbers:
    """Return the seconds of maps of three lengths on a GPU, and the most gigabytes beside the weights."""
    table = benchmark("saliency_7b").query("method == 'streamed'")
    seconds = [pick(table, "seconds", tokens=n)[0] for n in (2048, 8192, 32768)]
    return [*seconds, float((table["peak_bytes"] - table["model_bytes"]).max() / 1e9)]


def maps_of_floor_on_a_gpu() -> Numbers:
    """Return the time of maps relative to the fused pass on a GPU, at three lengths."""
    table = benchmark("saliency_7b").query("method == 'streamed'")
    return [
        seconds / floor
        for seconds, floor in (pick(table, "seconds floor_seconds", tokens=n) for n in (2048, 4096, 8192))
    ]


def exponents() -> Numbers:
    """Return the exponent that memory grows with up to 16384 tokens, from 1024 and from 2048 tokens on."""
    table = benchmark("saliency_exponents")
    return table[table["to"] == 16384].sort_values("from")["grown_bytes"].tolist()


def bytes_under_stepflow() -> Numbers:
    """Return the peak gigabytes of maps of three lengths under StepFlow, and those without."""
    table = benchmark("saliency_stepflow")
    return [
        pick(table, "peak_bytes", tokens=n, method=method)[0] / 1e9
        for method in ("streamed StepFlow", "streamed")
        for n in (2048, 4096, 8192)
    ]


def time_under_stepflow(method: str, n_tokens: int) -> Numbers:
    """Return the time of a map under StepFlow relative to one without: median, smallest and largest of the turns."""
    return pick(benchmark("saliency_stepflow"), "of_streamed min max", tokens=n_tokens, method=method)


def one_run_under_stepflow(n_tokens: int) -> Numbers:
    """Return the time of one map relative to one without StepFlow: at the paper's settings, with all layers edited."""
    methods = ("streamed", "streamed StepFlow", "streamed StepFlow everywhere")
    table = benchmark("saliency_stepflow")
    plain, *edited = (pick(table, "seconds", tokens=n_tokens, method=method)[0] for method in methods)
    return [seconds / plain for seconds in edited]


def pooling() -> Numbers:
    """Return the smallest and the largest percentage of the time that pooling takes at 2048 tokens."""
    table = benchmark("saliency_pooling")
    return (100 * table[table["tokens"] == 2048]["share"]).agg(["min", "max"]).tolist()


def best_setting() -> Numbers:
    """Return the number of settings of notebook 06, the largest difference, and the number of problems."""
    settings = figure("sensitivity")["variant"]
    return [len(settings), max(map(setting_gain, settings)), provenance("sensitivity")["n_problems"]]


def votes_and_cost(variant: str) -> Numbers:
    """Return gain and cost of a variant of notebook 07, for mini and for smollm2."""
    return [x for model in ("mini", "smollm2") for x in (gain(model, variant), ratio(model, variant))]


def premises() -> Numbers:
    """Return how many premises read wrongly come right, of how many, and in percent."""
    fixed, before = errors(["wrong premise"], "fixed before")
    return [fixed, before, 100 * fixed / before]


def profiled() -> Numbers:
    """Return how many wrong traces mini's profile has, and how many traces."""
    first = figure("calibration_evidence").iloc[0]
    return [first["n_wrong"], first["n_wrong"] + first["n_correct"]]
