"""Choose layers and strengths of StepFlow for a model and a task, and test the choice on problems held out.

    1. profile      A few answers with their maps tell in which layers wrong traces lock in more than correct ones, and
                    in which their summary attends less to the thinking. That becomes a prior over layers
                    (`stepsal.experiments.proposals`).
    2. search       Settings drawn by the prior, the paper's among them, answer problems beside the baseline. The worse
                    half is dropped after each round and the rest go on, with the same number of answers in each round:
                    successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943).
    3. held out     The best setting and the baseline answer problems that nothing was chosen by. Only this comparison
                    counts: what a setting gained in the search is what it was chosen for, and so too high, the more so
                    the more settings there were (the winner's curse).

No question is in two of these. The folder keeps all answers (`stepsal.experiments.calibration` shows its layout), and a
call that was interrupted goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import numpy as np

from stepsal.experiments.calibration import (
    HELD_OUT,
    KIND,
    LOOK,
    PROFILE,
    SEARCH,
    VERSION,
    Calibration,
    evidence_of,
    held_out_variants,
    search_variants,
)
from stepsal.experiments.checks import segmentation_for_manifest
from stepsal.experiments.collect import collect
from stepsal.experiments.evaluate import evaluate
from stepsal.experiments.guided import Guidance, Texts, guide
from stepsal.experiments.proposals import SEARCHED, describe, possible, propose
from stepsal.experiments.request import note_request
from stepsal.experiments.results import Evaluation
from stepsal.experiments.store import Store, identity_of
from stepsal.experiments.variants import Variant
from stepsal.generation.decoding import Decoding
from stepsal.intervention import StepFlowConfig, stepflow
from stepsal.intervention.gains import Objective
from stepsal.stats import FEWEST
from stepsal.storage import digest
from stepsal.tasks.parts import Part
from stepsal.trace.prompt import check_chat
from stepsal.trace.segment import Segmentation

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from stepsal.tasks import Task

MOST_TRACES = 64  # of the profile
SHARES = {PROFILE: (0.0, 1 / 8), SEARCH: (1 / 8, 9 / 16), HELD_OUT: (9 / 16, 1.0)}  # of the questions
NO_EDIT = StepFlowConfig(oeb_layers=(), smi_layers=())


@overload
def calibrate(
    model: TransformerBridge,
    task: Texts,
    *,
    objective: Literal["log_prob"],
    gain: Objective = ...,
    folder: str | Path,
    base: StepFlowConfig | None = ...,
    segmentation: Segmentation | None = ...,
    seed: int = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> Guidance: ...


@overload
def calibrate(
    model: TransformerBridge,
    task: Task,
    n_answers: int,
    *,
    objective: Literal["accuracy"] = ...,
    folder: str | Path,
    settings: int | Sequence[StepFlowConfig] = ...,
    base: StepFlowConfig | None = ...,
    decoding: Decoding = ...,
    system: str | None = ...,
    chat: Mapping[str, Any] | None = ...,
    segmentation: Segmentation | None = ...,
    seed: int = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> Calibration: ...


def calibrate(
    model: TransformerBridge,
    task: Task | Texts,
    n_answers: int | None = None,
    *,
    objective: Literal["accuracy", "log_prob"] = "accuracy",
    gain: Objective = "right",
    folder: str | Path,
    settings: int | Sequence[StepFlowConfig] = 16,
    base: StepFlowConfig | None = None,
    decoding: Decoding = Decoding(temperature=1.0),
    system: str | None = None,
    chat: Mapping[str, Any] | None = None,
    segmentation: Segmentation | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> Calibration | Guidance:
    """Choose layers or heads and strengths of StepFlow, and test on held-out problems or texts whether they help.

    With `objective="accuracy"` settings answer problems. With "log_prob" heads and strengths are chosen by the
    likelihood of right texts, a hundred times cheaper, as `stepsal.experiments.guide` does it: `task` is then a list of
    continuations or of right traces, and `n_answers`, `settings`, `decoding`, `system` and `chat` have no meaning.

    For accuracy, an eighth of the answers, at most 64, goes to the profile, half of the rest to the search, and the
    other half to the held-out comparison.

    Args:
        model: from `stepsal.load`.
        task: gives the problem of a seed; or the texts of "log_prob". If the task has a length, all its problems are
            divided among the three parts; a part that is asked for more answers than it has problems repeats them with
            other draws, or, under greedy decoding, writes fewer answers.
        n_answers: total number of answers that may be written, over profile, search and held-out comparison, those of
            the baseline included. A larger number in the same folder goes on with the answers that are there. Each
            continued call tests on the held-out problems once more; `looks` counts these tests, and `beats_baseline`
            then requires p <= 0.05 / looks.
        objective: what settings are chosen and judged by.
        gain: for "log_prob", whose likelihood counts, as the objective of `stepsal.edit_gains`.
        folder: an empty or new folder, or one to go on with; created if missing.
        settings: number of settings to draw, which begin the search; or the settings themselves, and then no profile is
            made.
        base: what drawn settings have in common (window, bridge, into_summary); None takes the paper's values.
        decoding: settings of decoding; the default samples at temperature 1. A `Decoding()` of your own is greedy: say
            `Decoding(temperature=1.0, max_new_tokens=4096)`.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template, such as {"enable_thinking": False}.
        segmentation: how sections and steps are found, by StepFlow and in the traces; None is `Segmentation()`.
        seed: seed of problems and settings. Each seed divides the questions anew: a problem that is held out under one
            seed may be searched on under another.
        batch_size: largest number of answers that are written together; where one ends, the next begins.
        progress: show progress bars.

    Raises:
        ValueError: raised before any work: fewer than two settings, too few answers or problems for the number of
            settings, or what `stepsal.collect` and `stepsal.evaluate` refuse.

    Example:
        >>> import tempfile
        >>> task, decoding = stepsal.tasks.chain.ChainTask(length=1), stepsal.Decoding(max_new_tokens=3)
        >>> settings = [stepsal.StepFlowConfig(tau_max=tau) for tau in (0.15, 0.5)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     calibration = stepsal.calibrate(
        ...         stepsal.load("mini"), task, 30, folder=folder, settings=settings, decoding=decoding, progress=False
        ...     )
        ...     calibration.rounds[0].n_problems, calibration.held_out.n_problems, calibration.beats_baseline
        (5, 7, False)
    """
    if objective == "log_prob":
        return guide(
            model, _texts(task), folder=folder, objective=gain, base=base, segmentation=segmentation, seed=seed,
            batch_size=min(batch_size, 8), progress=progress,
        )  # fmt: skip
    if objective != "accuracy":
        raise ValueError(f"objective={objective!r} is unknown; use 'accuracy' or 'log_prob'")
    if n_answers is None or not hasattr(task, "sample"):
        raise ValueError(
            "objective='accuracy' needs a task and n_answers; for a list of texts say objective='log_prob'"
        )
    task = cast("Task", task)
    n_answers, n_layers = index(n_answers), model.cfg.n_layers
    tried = None if not isinstance(settings, Iterable) else tuple(settings)
    n_settings = index(settings) if tried is None else len(tried)  # type: ignore[arg-type]
    _check_settings(settings, tried, n_settings, base, n_layers)
    base = base or StepFlowConfig()
    segmentation = segmentation or Segmentation()
    for config in tried or (base,):
        _check_stepflow(model, config, segmentation)
    parts = {name: Part(task, *shares, seed) for name, shares in SHARES.items()}
    most = {name: part.n_problems if decoding.temperature == 0 else None for name, part in parts.items()}
    n_profile, rounds, n_held_out = plan(n_answers, n_settings, tried is None, most)
    _check_first_round(rounds[0], n_answers, n_settings, tried is None, most, task.name)

    parameters = {
        **identity_of(model), "task": task.name, "seed": seed, "decoding": decoding.to_dict(), "system": system,
        "chat": (switches := check_chat(model.tokenizer, chat)),
        "segmentation": segmentation_for_manifest(segmentation),
    }  # fmt: skip
    folder, evidence = Path(folder), None
    run = _Run(model, parts, folder, decoding, system, switches, segmentation, batch_size, progress)
    with Store.opened(folder, KIND, VERSION, parameters) as store:
        if tried is None:
            evidence = run.profile(n_profile)
            tried = drawn_settings(store, evidence, n_settings, base, seed)
        evaluations, chosen = run.search(tried, rounds)
        held_out = run.evaluated(HELD_OUT, held_out_variants(chosen), n_held_out)
        looks = count_looks(store, chosen, n_held_out)
        calibration = Calibration(
            folder, str(model.cfg.model_name), task.name, n_answers, seed, n_profile, evidence, tried, evaluations,
            held_out, looks,
        )  # fmt: skip
        note_request(store, calibration.to_request())
    return calibration


def _texts(task: Any) -> Texts:
    """Return the texts that are passed in the place of a task."""
    if hasattr(task, "sample") or not isinstance(task, Sequence):
        raise ValueError(f"objective='log_prob' reads texts, but got {task!r}: give a list of continuations or traces")
    return task


@dataclass(frozen=True)
class _Run:
    """The writer of a calibration's answers, part of the task by part."""

    model: TransformerBridge
    parts: Mapping[str, Part]
    folder: Path
    decoding: Decoding
    system: str | None
    chat: Mapping[str, Any]
    segmentation: Segmentation
    batch_size: int
    progress: bool

    def profile(self, n_traces: int) -> pd.DataFrame:
        """Collect traces with their maps, and return what they say about layers."""
        collect(
            self.model, self.parts[PROFILE], n_traces, self.folder / PROFILE, decoding=self.decoding,
            system=self.system, chat=self.chat, segmentation=self.segmentation, batch_size=self.batch_size,
            progress=self.progress,
        )  # fmt: skip
        return evidence_of(self.folder, n_traces, self.model.cfg.n_layers)

    def search(
        self, settings: Sequence[StepFlowConfig], rounds: Sequence[Round]
    ) -> tuple[tuple[Evaluation, ...], StepFlowConfig]:
        """Let settings answer, round by round, and return the rounds and the best setting."""
        ranked, evaluations = list(settings), list[Evaluation]()
        for n_settings, n_problems in rounds:
            ranked = ranked[:n_settings]
            evaluation = self.evaluated(SEARCH, search_variants(ranked), n_problems)
            accuracy = {v.name: evaluation.verdicts(v.name).mean() for v in evaluation.variants}
            ranked.sort(key=lambda config: -accuracy[describe(config)])  # stable: of equal ones the earlier
            evaluations.append(evaluation)
        return tuple(evaluations), ranked[0]

    def evaluated(self, name: str, variants: Sequence[Variant], n_problems: int) -> Evaluation:
        """Answer problems of a part under variants."""
        return evaluate(
            self.model, self.parts[name], variants, n_problems, folder=self.folder / name, decoding=self.decoding,
            system=self.system, chat=self.chat, segmentation=self.segmentation, batch_size=self.batch_size,
            progress=self.progress,
        )  # fmt: skip


class Round(NamedTuple):
    """A round of the search.

    Attributes:
        n_settings: number of settings in the round, the baseline not counted.
        n_problems: number of problems that each of them has answered by the end of the round.
    """

    n_settings: int
    n_problems: int


class Plan(NamedTuple):
    """The division of a calibration's answers among its three parts.

    Attributes:
        n_profile: number of traces of the profile.
        rounds: rounds of the search.
        n_held_out: number of held-out problems, each of which is answered twice.
    """

    n_profile: int
    rounds: tuple[Round, ...]
    n_held_out: int


def plan(n_answers: int, n_settings: int, profile: bool, most: Mapping[str, int | None]) -> Plan:
    """Divide answers between profile, search and held-out comparison.

    Args:
        n_answers: total number of answers that may be written.
        n_settings: number of settings that the search begins with.
        profile: True if a profile is made.
        most: number of problems of each part of the task, for parts whose problems may not be repeated; then some of
            the answers may remain unspent.

    Example:
        >>> from stepsal.experiments.calibrate import plan
        >>> n_profile, rounds, n_held_out = plan(240, 4, profile=True, most={})
        >>> n_profile, [tuple(of_round) for of_round in rounds], n_held_out
        (30, [(4, 10), (2, 27)], 52)
    """
    limits = {name: n_answers if (n := most.get(name)) is None else n for name in SHARES}
    n_profile = min(n_answers // 8, MOST_TRACES, limits[PROFILE]) if profile else 0
    n_search = (n_answers - n_profile) // 2
    n_held_out = min((n_answers - n_profile - n_search) // 2, limits[HELD_OUT])
    sizes = [size for size, _ in halving(n_settings, 0)]
    per_answer = sum(1 / (size + 1) for size in sizes) / len(sizes)  # problems of the last round
    n_search = min(n_search, math.ceil((limits[SEARCH] + len(sizes)) / per_answer) + len(sizes))
    while halving(n_settings, n_search)[-1].n_problems > limits[SEARCH]:
        n_search -= 1
    return Plan(n_profile, halving(n_settings, n_search), n_held_out)


def halving(n_settings: int, n_answers: int) -> tuple[Round, ...]:
    """Return the rounds of successive halving down to two settings, with about as many answers in each.

    The baseline answers beside the settings, and is never dropped.

    Args:
        n_settings: number of settings in the first round.
        n_answers: number of answers that all rounds together may write.

    Example:
        >>> from stepsal.experiments.calibrate import halving
        >>> [tuple(of_round) for of_round in halving(4, 80)]
        [(4, 8), (2, 21)]
    """
    sizes = [n_settings]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    new = [n_answers // len(sizes) // (size + 1) for size in sizes]
    return tuple(map(Round, sizes, np.cumsum(new).tolist()))


def drawn_settings(
    store: Store, evidence: pd.DataFrame, n_settings: int, base: StepFlowConfig, seed: int
) -> tuple[StepFlowConfig, ...]:
    """Return the settings that a folder keeps, drawn by its first call alone, so that later calls reuse its answers.

    Args:
        store: of the calibration, open to be added to.
        evidence: evidence of the profile, by which settings are drawn if there are none yet.
        n_settings: number of settings to draw.
        base: values of what is not searched.
        seed: seed of the draw.
    """
    name = f"settings-{n_settings}"
    if name not in store.names():
        drawn = [config.to_dict() for config in propose(evidence, n_settings, base=base, seed=seed)]
        searched = [{key: config[key] for key in SEARCHED} for config in drawn]
        with store.adding(name) as folder:
            (folder / "settings.json").write_text(f"{json.dumps(searched, indent=1)}\n", encoding="utf-8")
    part = next(part for part in store.parts() if part.name == name)
    kept = json.loads((part.folder / "settings.json").read_text(encoding="utf-8"))
    return tuple(base.but(**changes) for changes in kept)


def count_looks(store: Store, setting: StepFlowConfig, n_problems: int) -> int:
    """Count this comparison on the held-out problems, and return how many were made in all.

    Args:
        store: of the calibration, open to be added to.
        setting: the setting that was compared with the baseline.
        n_problems: number of held-out problems; the same setting on as many problems is counted once.
    """
    description = describe(setting)
    name = LOOK + digest(json.dumps([description, n_problems]).encode())
    if name not in store.names():
        with store.adding(name) as folder:
            look = json.dumps({"setting": description, "n_problems": n_problems})
            (folder / "look.json").write_text(f"{look}\n", encoding="utf-8")
    return sum(part.startswith(LOOK) for part in store.names())


def _effect(config: StepFlowConfig, n_layers: int) -> str:
    """Say what a setting edits in a model."""
    oeb, smi = config.resolve(n_layers)
    return describe(config.but(oeb_layers=oeb, smi_layers=smi))


def _check_settings(
    settings: int | Sequence[StepFlowConfig],
    tried: tuple[StepFlowConfig, ...] | None,
    n_settings: int,
    base: StepFlowConfig | None,
    n_layers: int,
) -> None:
    """Refuse settings that can't be compared, and more than there are.

    Raises:
        ValueError: naming them.
    """
    if tried is not None and base is not None:
        raise ValueError("base goes with settings that are drawn; change those that you pass with .but(...)")
    effects = {_effect(config, n_layers) for config in tried or ()} - {_effect(NO_EDIT, n_layers)}
    if n_settings < 2 or (tried is not None and len(effects) < n_settings):
        raise ValueError(
            f"settings={settings} must be two or more that differ in what they edit; to try one, use stepsal.evaluate"
        )
    if tried is None and n_settings > (n_possible := possible(n_layers)):
        raise ValueError(f"settings={settings} is more than the {n_possible} that there are for {n_layers} layers")


def _check_stepflow(model: TransformerBridge, config: StepFlowConfig, segmentation: Segmentation) -> None:
    """Refuse a model that StepFlow can't edit, such as one without a chat template.

    Raises:
        ValueError: naming what it lacks.
    """
    with stepflow(model, config, segmentation=segmentation):
        pass


def _check_first_round(
    first: Round, n_answers: int, n_settings: int, profile: bool, most: Mapping[str, int | None], task_name: str
) -> None:
    """Refuse a search whose first round is too short to choose by.

    Raises:
        ValueError: naming how many answers would do, if any number does.
    """

    def in_first_round(n: int, limits: Mapping[str, int | None]) -> int:
        return plan(n, n_settings, profile, limits).rounds[0].n_problems

    if first.n_problems < FEWEST:
        enough = next(n for n in count(n_answers) if in_first_round(n, {}) >= FEWEST)
        more = f"at least {enough}, or " if in_first_round(enough, most) >= FEWEST else ""
        raise ValueError(
            f"n_answers={n_answers} leaves {first.n_problems} problems of {task_name} for the first round of "
            f"{n_settings} settings: use {more}fewer settings"
        )
