"""Layers and strengths of StepFlow for a model and a task: proposed by the model's own maps, tried out, and held out.

    1. profile      A few answers with their maps say in which layers wrong traces lock in more than correct ones, and
                    in which their summary leaves the thinking; that becomes a prior (`stepsal.experiments.proposals`).
    2. search       Settings drawn by the prior, the paper's among them, answer problems beside the baseline. The worse
                    half is dropped after each round and the rest go on, with the same number of answers in each round:
                    successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943).
    3. held out     The best one and the baseline answer problems that nothing was chosen by. Only this comparison
                    counts: what a setting gained in the search is what it was chosen for, and so too high, the more so
                    the more settings there were (the winner's curse).

No question is in two of these. The folder keeps all answers, and a call that was interrupted goes on:

    folder/profile/, search/, held_out/
    folder/settings_16.json     settings that were drawn
    folder/looks.json           comparisons made on the held-out problems
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stepsal.experiments.collect import collect
from stepsal.experiments.evaluate import Evaluation, Variant, evaluate
from stepsal.experiments.proposals import SEARCHED, describe, layer_words, possible, profile_evidence, propose
from stepsal.intervention import StepFlowConfig, stepflow
from stepsal.stats import FEWEST
from stepsal.stats.paired import PairedDifference
from stepsal.storage import write_atomic
from stepsal.tasks.parts import Part

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.tasks import Task

MOST_TRACES = 64  # of the profile
SHARES = {"profile": (0.0, 1 / 8), "search": (1 / 8, 9 / 16), "held_out": (9 / 16, 1.0)}  # of the questions
BASELINE, CHOSEN = "baseline", "chosen"
NO_EDIT = StepFlowConfig(oeb_layers=(), smi_layers=())
LEVEL = 0.05


def calibrate(
    model: TransformerBridge,
    task: Task,
    budget: int,
    *,
    folder: str | Path,
    settings: int | Sequence[StepFlowConfig] = 16,
    base: StepFlowConfig | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    system: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> Calibration:
    """Choose layers, tau_max and alpha of StepFlow, and say on held-out problems whether they help.

    An eighth of the budget, at most 64 answers, goes to the profile, half of the rest to the search, and the other half
    to the held-out comparison.

    Args:
        model: from `stepsal.load`.
        task: gives the problem of a seed. One that has a length is divided whole, and its problems come again, with
            other draws, where the budget goes beyond them; greedy decoding stops there.
        budget: how many answers the model may write. A larger one in the same folder goes on with those that are there.
            It looks at the held-out problems again, which is counted, and asks more of p.
        folder: made if it is not there.
        settings: how many to begin the search with, or which ones; then there is no profile.
        base: what is not searched, where settings are not given: window, bridge, format, steps. None is the paper's.
        temperature, top_p, max_new_tokens, system: see `stepsal.generate`.
        seed: of problems and settings. Parts of another seed are others: what one has held out, another may search on.
        batch_size: answers decoded together.
        progress: show bars over answers.

    Raises:
        ValueError: fewer than two settings, a budget or a task that is too small for them, or whatever
            `stepsal.collect` and `stepsal.evaluate` refuse; before any work.
    """
    budget = index(budget)
    given = tuple(settings) if isinstance(settings, Iterable) else None
    n_settings = index(settings) if given is None else len(given)  # type: ignore[arg-type]
    n_layers = model.cfg.n_layers
    if given is not None and base is not None:
        raise ValueError("base goes with settings that are drawn; change those that you give with .but(...)")
    effects = {_effect(config, n_layers) for config in given or ()}
    if n_settings < 2 or (given is not None and len(effects - {_effect(NO_EDIT, n_layers)}) < n_settings):
        raise ValueError(
            f"settings={settings} must be two or more that differ in what they edit; to try one, use stepsal.evaluate"
        )
    if given is None and n_settings > (there := possible(n_layers)):
        raise ValueError(f"settings={settings} is more than the {there} that there are for {n_layers} layers")
    base = base or StepFlowConfig()
    for config in given or (base,):
        with stepflow(model, config):  # complains about what the model does not have, such as a chat template
            pass
    parts = {name: Part(task, *shares, seed) for name, shares in SHARES.items()}
    most = {name: part.n_problems if temperature == 0 else None for name, part in parts.items()}
    n_profile, rounds, n_held_out = plan(budget, n_settings, given is None, most)
    if rounds[0].n_problems < FEWEST:
        enough = next(b for b in count(budget) if _first(b, n_settings, given is None, {}) >= FEWEST)
        more = f"at least {enough}, or " if _first(enough, n_settings, given is None, most) >= FEWEST else ""
        raise ValueError(
            f"budget={budget} leaves {rounds[0].n_problems} problems of {task.name} for the first round of "
            f"{n_settings} settings: use {more}fewer settings"
        )
    folder = Path(folder)
    options: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "system": system,
        "progress": progress,
    }  # fmt: skip
    evidence = None
    if given is None:
        profile = collect(model, parts["profile"], n_profile, folder / "profile", part_size=batch_size, **options)
        metrics = profile.metrics  # of a larger budget's traces too, if there was one
        evidence = profile_evidence(metrics[metrics["trace"] < n_profile], n_layers)
        given = _proposed(folder, evidence, n_settings, base, seed)

    options["batch_size"] = batch_size
    left, runs = [Variant(describe(config), stepflow=config) for config in given], list[Evaluation]()
    for n_left, n_problems in rounds:
        variants = [Variant(BASELINE), *left[:n_left]]
        runs.append(evaluate(model, parts["search"], variants, n_problems, folder=folder / "search", **options))
        gains = {v.name: runs[-1].verdicts(v.name).mean() for v in variants}
        left = sorted(left[:n_left], key=lambda v: -gains[v.name])  # stable: the earlier of equal ones
    pair = [Variant(BASELINE), Variant(CHOSEN, stepflow=left[0].stepflow)]
    held_out = evaluate(model, parts["held_out"], pair, n_held_out, folder=folder / "held_out", **options)
    looks = _looks(folder, describe(pair[1].stepflow), n_held_out)  # type: ignore[arg-type]
    return Calibration(
        str(model.cfg.model_name), task.name, budget, seed, evidence, given, tuple(runs), held_out, looks
    )  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        model, task, budget, seed: as asked for.
        evidence: of the profile (see `stepsal.experiments.proposals.profile_evidence`); None where the settings were given.
        settings: tried; the likelier, or the earlier given, first.
        rounds: of the search; each has the answers of those before, and fewer settings.
        held_out: the variants "baseline" and "chosen" on problems of their own.
        looks: how many comparisons the folder's held-out problems have been used for, this one included.
    """

    model: str
    task: str
    budget: int
    seed: int
    evidence: pd.DataFrame | None
    settings: tuple[StepFlowConfig, ...]
    rounds: tuple[Evaluation, ...]
    held_out: Evaluation
    looks: int = 1

    @property
    def chosen(self) -> StepFlowConfig:
        """The best setting of the search, whether it helps or not."""
        return next(config for v in self.held_out.variants if (config := v.stepflow) is not None)

    @cached_property
    def difference(self) -> PairedDifference:
        """Accuracy of the chosen setting minus the baseline's, on the held-out problems."""
        return self.held_out.difference(BASELINE, CHOSEN)

    @property
    def beats_baseline(self) -> bool:
        """Whether the held-out difference has its 95 % interval above zero, and p at most 5 % by the number of looks.

        Both, since an interval over few different questions is too short, and since each look is another chance.
        """
        return self.difference.low > 0 and self.difference.p <= LEVEL / self.looks

    @property
    def stepflow(self) -> StepFlowConfig:
        """The chosen setting if it beats the baseline, otherwise one with both parts off, which edits nothing."""
        return self.chosen if self.beats_baseline else self.chosen.but(oeb_layers=(), smi_layers=())

    @cached_property
    def search(self) -> pd.DataFrame:
        """One row per setting tried, the best first.

        Columns: setting, oeb_layers, tau_max, smi_layers, alpha; rounds (that it stayed in); n_problems (that it has
        answered by then), accuracy on them, baseline (its accuracy on the same ones), difference.
        """
        import pandas as pd

        rows = []
        for config in self.settings:
            name = describe(config)
            stayed = [run for run in self.rounds if name in {v.name for v in run.variants}]
            accuracy, baseline = (float(stayed[-1].verdicts(n).mean()) for n in (name, BASELINE))
            rows.append(
                {"setting": name, "oeb_layers": config.oeb_layers, "tau_max": config.tau_max,
                 "smi_layers": config.smi_layers, "alpha": config.alpha, "rounds": len(stayed),
                 "n_problems": stayed[-1].n_problems, "accuracy": accuracy, "baseline": baseline,
                 "difference": accuracy - baseline}
            )  # fmt: skip
        table = pd.DataFrame(rows)
        return table.sort_values(["rounds", "accuracy"], ascending=False, kind="stable", ignore_index=True)

    @property
    def _best(self) -> pd.Series:
        """The row of the chosen setting in `search`."""
        return self.search[self.search["setting"] == describe(self.chosen)].iloc[0]

    def __str__(self) -> str:
        """What was done and found, in a few lines."""
        best, found, n = self._best, self.difference, len(self.settings)
        lines = [f"StepFlow for {self.model} on {self.task}: {self.budget} answers, seed {self.seed}"]
        if self.evidence is not None:
            for part, of_part in self.evidence.groupby("part", sort=False):
                top = of_part.sort_values("t", ascending=False).iloc[0]  # NaN comes last
                traces = f"{top['metric']} of {top['n_wrong']} wrong traces beside {top['n_correct']} correct ones"
                if np.isnan(top["t"]):
                    lines.append(f"profile, {part}: {traces} is too little to go by")
                elif top["t"] <= 0:
                    lines.append(f"profile, {part}: {traces} is higher in no band of layers")
                else:
                    where = f"in layers {layer_words(top['layers'])}, t = {top['t']:.1f}"
                    lines.append(f"profile, {part}: {traces} is most above them {where}")
        last = self.search[self.search["rounds"] == len(self.rounds)]
        ties = int((last["accuracy"] == best["accuracy"]).sum()) - 1
        lines.append(
            f"chosen among {n} settings: {describe(self.chosen)}" + (f", the first of {ties + 1} alike" if ties else "")
        )
        curse = "; too high, since it was chosen for this number among all (winner's curse)"
        lines.append(
            f"in the search: {100 * best['difference']:+.1f} points over the baseline (n = {best['n_problems']})"
            + (curse if best["difference"] > 0 else "; no setting gained anything there")
        )
        different = "" if found.n_different == found.n_problems else f", {found.n_different} different"
        lines.append(
            f"held out: {100 * found.difference:+.1f} points (95 %: {100 * found.low:+.1f} to "
            f"{100 * found.high:+.1f}), {found.fixed} fixed, {found.broken} broken, p = {found.p:.2g} "
            f"(n = {found.n_problems}{different})"
        )
        if self.looks > 1:
            lines.append(
                f"this is look {self.looks} at these problems, so that p must be {LEVEL / self.looks:.2g} or less"
            )
        dropped = self.search.loc[self.search["rounds"] < len(self.rounds), "n_problems"]
        others = (
            f"; others were dropped from {dropped.min()} problems on, where only large gains show"
            if len(dropped)
            else ""
        )
        lines.append(
            "the chosen setting beats the baseline"
            if self.beats_baseline
            else "no setting beats the baseline. Of the chosen one, a gain of "
            f"{100 * found.detectable:.1f} points would be seen in 4 of 5 cases{others}"
        )
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write `stepflow` as a preset, JSON, with what it rests on beside it.

        `StepFlowConfig.load` reads it, and so does `-M preset=` in Inspect. Where no setting beats the baseline, it
        switches both parts off.

        Raises:
            ValueError: a format or a split of your own, which a file can't hold.
        """
        manifest, best = self.held_out.manifest, self._best
        about = {
            "model": self.model, "weights": manifest["weights"], "task": self.task, "decoding": manifest["decoding"],
            "budget": self.budget, "seed": self.seed, "n_settings": len(self.settings),
            "chosen": self.chosen.to_dict(), "beats_baseline": self.beats_baseline,
            "looks": self.looks,
            "search": {"n_problems": int(best["n_problems"]), "difference": float(best["difference"])},
            "held_out": {k: None if v != v else v for k, v in asdict(self.difference).items()},  # NaN is no JSON
        }  # fmt: skip
        return self.stepflow.save(path, calibration=about)


class Round(NamedTuple):
    """Of the search: settings in it, and problems that each of them has answered at its end."""

    n_settings: int
    n_problems: int


def plan(
    budget: int, n_settings: int, profile: bool, most: Mapping[str, int | None]
) -> tuple[int, tuple[Round, ...], int]:
    """Traces of the profile, rounds of the search, and held-out problems, each of which is answered twice.

    Args:
        most: of each part, how many problems it has, where none may come again; the budget is not used up then.
    """
    limits = {name: budget if (n := most.get(name)) is None else n for name in SHARES}
    n_profile = min(budget // 8, MOST_TRACES, limits["profile"]) if profile else 0
    n_search = (budget - n_profile) // 2
    n_held_out = min((budget - n_profile - n_search) // 2, limits["held_out"])
    sizes = [size for size, _ in halving(n_settings, 0)]
    per_answer = sum(1 / (size + 1) for size in sizes) / len(sizes)  # problems of the last round
    n_search = min(n_search, math.ceil((limits["search"] + len(sizes)) / per_answer) + len(sizes))
    while halving(n_settings, n_search)[-1].n_problems > limits["search"]:
        n_search -= 1
    return n_profile, halving(n_settings, n_search), n_held_out


def _first(budget: int, n_settings: int, profile: bool, most: Mapping[str, int | None]) -> int:
    """Problems of the first round."""
    return plan(budget, n_settings, profile, most)[1][0].n_problems


def halving(n_settings: int, n_answers: int) -> tuple[Round, ...]:
    """Rounds of successive halving down to two settings, about the same number of answers in each.

    The baseline answers beside the settings, and is never dropped.
    """
    sizes = [n_settings]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    new = [n_answers // len(sizes) // (size + 1) for size in sizes]
    return tuple(map(Round, sizes, np.cumsum(new).tolist()))


def _effect(config: StepFlowConfig, n_layers: int) -> str:
    """What a setting edits in a model, in words."""
    oeb, smi = config.resolve(n_layers)
    return describe(config.but(oeb_layers=oeb, smi_layers=smi))


def _proposed(
    folder: Path, evidence: pd.DataFrame, n: int, base: StepFlowConfig, seed: int
) -> tuple[StepFlowConfig, ...]:
    """The settings of the folder, drawn once: more traces would draw others, and leave answers without use."""
    path = folder / f"settings_{n}.json"
    if not path.exists():
        drawn = [
            {name: config.to_dict()[name] for name in SEARCHED} for config in propose(evidence, n, base=base, seed=seed)
        ]
        write_atomic(path, (json.dumps(drawn, indent=1) + "\n").encode())
    try:
        return tuple(base.but(**changes) for changes in json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and calibrate again") from error


def _looks(folder: Path, setting: str, n: int) -> int:
    """How many comparisons were made on the held-out problems, this one included; kept in the folder."""
    path = folder / "looks.json"
    looks = json.loads(path.read_text()) if path.exists() else []
    if [setting, n] not in looks:
        looks.append([setting, n])
        write_atomic(path, (json.dumps(looks) + "\n").encode())
    return len(looks)
