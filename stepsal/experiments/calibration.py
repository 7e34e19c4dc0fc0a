"""The result of `stepsal.calibrate`: settings that were tried, rounds of the search, and the held-out comparison.

The folder of a calibration::

    folder/
      manifest.json                        model, task, seed, decoding, segmentation, versions
      parts/settings-<n>/settings.json     the n settings that were drawn
      parts/look-<digest>/look.json        one comparison on the held-out problems
      parts/request-<uuid>/                what the last completed call has asked for
      profile/, search/, held_out/         a population and two evaluations
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepsal.experiments.proposals import describe, layer_words, profile_evidence
from stepsal.experiments.request import read_request
from stepsal.experiments.results import Evaluation
from stepsal.experiments.store import Store
from stepsal.experiments.variants import Variant
from stepsal.intervention.config import StepFlowConfig
from stepsal.stats.paired import PairedDifference
from stepsal.stats.report import WIDTH, Report

if TYPE_CHECKING:
    import pandas as pd

KIND, VERSION = "calibration", 2
PROFILE, SEARCH, HELD_OUT = "profile", "search", "held_out"  # subfolders, and parts of the task
BASELINE, CHOSEN = "baseline", "chosen"  # variants of the held-out comparison
LOOK = "look-"  # how the names of parts begin that each stand for one comparison on the held-out problems
LEVEL = 0.05


@dataclass(frozen=True)
class Calibration:
    """The settings of StepFlow that were tried, with a held-out comparison of the best of them and the baseline.

    Attributes:
        folder: where answers and settings are kept.
        model_name: name of the model.
        task: name of the task.
        n_answers: number of answers that were asked for.
        seed: seed of problems and settings.
        n_traces: number of traces of the profile; 0 where settings were passed.
        evidence: table of `stepsal.experiments.proposals.profile_evidence`; None without a profile.
        settings: settings that were tried: drawn ones with the likelier first, passed ones in their order.
        rounds: rounds of the search; each has fewer settings than the one before, and its answers among its own.
        held_out: the variants "baseline" and "chosen" on problems that nothing was chosen by.
        looks: number of tests that were made on the held-out problems of the folder, this one included.

    Example:
        >>> import tempfile
        >>> task, decoding = stepsal.tasks.chain.ChainTask(length=1), stepsal.Decoding(max_new_tokens=3)
        >>> settings = [stepsal.StepFlowConfig(smi_layers=()), stepsal.StepFlowConfig(oeb_layers=())]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = stepsal.calibrate(
        ...         stepsal.load("mini"), task, 30, folder=folder, settings=settings, decoding=decoding, progress=False
        ...     )
        ...     calibration = stepsal.experiments.Calibration.load(folder)
        ...     calibration.search["setting"].tolist(), calibration.beats_baseline
        (['OEB shallow at 0.15', 'SMI deep at 0.06'], False)
    """

    folder: Path
    model_name: str
    task: str
    n_answers: int
    seed: int
    n_traces: int
    evidence: pd.DataFrame | None
    settings: tuple[StepFlowConfig, ...]
    rounds: tuple[Evaluation, ...]
    held_out: Evaluation
    looks: int = 1

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Read the calibration that the last completed call of `stepsal.calibrate` has left in a folder.

        Args:
            folder: the folder of that call.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the folder is no calibration, is damaged, or does not record what the last call asked for.
        """
        folder = Path(folder)
        store = Store.load(folder, KIND, VERSION)
        request = read_request(
            store, ("n_answers", "n_traces", "settings", "rounds", "chosen", "n_held_out"),
            "make the same call of stepsal.calibrate again, which keeps the answers that are there",
        )  # fmt: skip
        settings = tuple(StepFlowConfig.from_dict(setting) for setting in request["settings"])
        n_traces = request["n_traces"]
        evidence = evidence_of(folder, n_traces, store.manifest["n_layers"]) if n_traces else None
        rounds = [
            Evaluation(folder / SEARCH, search_variants([settings[i] for i in of_round["settings"]]), of_round["n"], 1)
            for of_round in request["rounds"]
        ]
        pair = held_out_variants(settings[request["chosen"]])
        return cls(
            folder, store.manifest["model_name"], store.manifest["task"], request["n_answers"], store.manifest["seed"],
            n_traces, evidence, settings, tuple(rounds), Evaluation(folder / HELD_OUT, pair, request["n_held_out"], 1),
            sum(name.startswith(LOOK) for name in store.names()),
        )  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Copy settings, profile and all answers to another folder, after checking them, and return it.

        Args:
            folder: an empty or new folder; created if missing.

        Raises:
            ValueError: the folder is not empty, or a part is damaged.
        """
        return Store.load(self.folder, KIND, VERSION).save(folder)

    def save_preset(self, path: str | Path) -> Path:
        """Write `stepflow` as a preset in JSON, together with the results that support it, and return the path.

        `StepFlowConfig.load` reads it, and so does `-M preset=<path>` in Inspect. Where no setting beats the baseline,
        the preset switches both parts off.

        Args:
            path: the file, such as "preset.json"; its folder is created if missing.
        """
        manifest, best = self.held_out.manifest, self._best
        about = {
            "model_name": self.model_name, "weights": manifest["weights"], "task": self.task,
            "decoding": manifest["decoding"], "segmentation": manifest["segmentation"],
            "n_answers": self.n_answers, "seed": self.seed,
            "n_settings": len(self.settings), "chosen": self.chosen.to_dict(), "beats_baseline": self.beats_baseline,
            "looks": self.looks,
            "search": {"n_problems": int(best["n_problems"]), "difference": float(best["difference"])},
            "held_out": {k: None if v != v else v for k, v in asdict(self.difference).items()},  # NaN is no JSON
        }  # fmt: skip
        return self.stepflow.but(made_for=self.model_name).save(path, calibration=about)

    def to_request(self) -> dict[str, Any]:
        """Return what `load` needs to know, JSON-ready; settings of rounds are numbers in the list of all settings."""
        numbers = {describe(config): i for i, config in enumerate(self.settings)}
        return {
            "n_answers": self.n_answers,
            "n_traces": self.n_traces,
            "settings": [config.to_dict() for config in self.settings],
            "rounds": [
                {"settings": [numbers[v.name] for v in run.variants if v.name != BASELINE], "n": run.n_problems}
                for run in self.rounds
            ],
            "chosen": numbers[describe(self.chosen)],
            "n_held_out": self.held_out.n_problems,
        }

    @property
    def chosen(self) -> StepFlowConfig:
        """The best setting of the search, whether it helps or not."""
        return next(config for v in self.held_out.variants if (config := v.stepflow) is not None)

    @cached_property
    def difference(self) -> PairedDifference:
        """The `PairedDifference` from the baseline to the chosen setting, on the held-out problems."""
        return self.held_out.difference(BASELINE, CHOSEN)

    @property
    def beats_baseline(self) -> bool:
        """True if the held-out difference has its 95 % interval above zero, and p <= 0.05 / `looks`.

        Both are required: an interval over few different questions is too short, and each look is another chance.
        """
        return self.difference.low > 0 and self.difference.p <= LEVEL / self.looks

    @property
    def stepflow(self) -> StepFlowConfig:
        """The chosen setting if it beats the baseline, otherwise one that edits nothing."""
        return self.chosen if self.beats_baseline else self.chosen.but(oeb_layers=(), smi_layers=())

    @cached_property
    def search(self) -> pd.DataFrame:
        """Table of the settings that were tried, one row each, the best first.

        Columns:

            setting, oeb_layers, tau_max, smi_layers, alpha
            rounds       number of rounds that the setting stayed in
            n_problems   number of problems that it had answered by the end of its last round
            accuracy     on those problems
            baseline     accuracy of the baseline on the same problems
            difference   accuracy minus baseline
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
        """Say in a few lines what was done and what came out."""
        lines = [f"StepFlow for {self.model_name} on {self.task}: {self.n_answers} answers, seed {self.seed}"]
        lines += [] if self.evidence is None else _profile_lines(self.evidence)
        return "\n".join([*lines, *self._search_lines(), *self._held_out_lines(), self._conclusion()])

    def summary(self) -> Report:
        """Say what was done and what came out, with a table of the settings that were tried.

        Returns:
            The report; `print` writes it within 100 columns, JupyterLab shows it as a table.
        """
        search = self.search
        table = search[["setting", "rounds", "n_problems"]].assign(
            accuracy=search["accuracy"].map("{:.1%}".format), baseline=search["baseline"].map("{:.1%}".format),
            difference=(100 * search["difference"]).map("{:+.1f}".format),
        ).rename(columns={"n_problems": "problems"})  # fmt: skip
        table["setting"] = [textwrap.shorten(setting, WIDTH - 50, placeholder=" ...") for setting in table["setting"]]
        title, *lines = str(self).splitlines()
        return Report(title, table, lines)

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def _search_lines(self) -> list[str]:
        """Say which setting was chosen, and what it gained in the search."""
        best, last = self._best, self.search[self.search["rounds"] == len(self.rounds)]
        n_alike = int((last["accuracy"] == best["accuracy"]).sum())
        alike = f", the first of {n_alike} alike" if n_alike > 1 else ""
        remark = "; no setting gained anything there"
        if best["difference"] > 0:
            remark = "; too high, since it was chosen for this number among all (winner's curse)"
        gain = f"{100 * best['difference']:+.1f} points over the baseline (n = {best['n_problems']})"
        return [
            f"chosen among {len(self.settings)} settings: {describe(self.chosen)}{alike}",
            f"in the search: {gain}{remark}",
        ]

    def _held_out_lines(self) -> list[str]:
        """Say what the chosen setting gains on the held-out problems, and how often these were looked at."""
        held_out = self.difference
        equal = held_out.n_different == held_out.n_problems
        different = "" if equal else f", {held_out.n_different} different"
        lines = [
            f"held out: {100 * held_out.difference:+.1f} points (95 %: {100 * held_out.low:+.1f} to "
            f"{100 * held_out.high:+.1f}), {held_out.fixed} fixed, {held_out.broken} broken, p = {held_out.p:.2g} "
            f"(n = {held_out.n_problems}{different})"
        ]
        if self.looks > 1:
            level = LEVEL / self.looks
            lines.append(f"this is look {self.looks} at these problems, so that p must be {level:.2g} or less")
        return lines

    def _conclusion(self) -> str:
        """Say whether the chosen setting helps, and if not, which gain would have been seen."""
        if self.beats_baseline:
            return "the chosen setting beats the baseline"
        dropped = self.search.loc[self.search["rounds"] < len(self.rounds), "n_problems"]
        others = ""
        if len(dropped):
            others = f"; others were dropped from {dropped.min()} problems on, where only large gains show"
        return (
            "no setting beats the baseline. Of the chosen one, a gain of "
            f"{100 * self.difference.detectable:.1f} points would be seen in 4 of 5 cases{others}"
        )


def search_variants(settings: Sequence[StepFlowConfig]) -> tuple[Variant, ...]:
    """Return the variants of a round of the search: the baseline, and each setting by its description.

    Args:
        settings: in the order of the round.

    Example:
        >>> from stepsal.experiments.calibration import search_variants
        >>> [variant.name for variant in search_variants([stepsal.StepFlowConfig(smi_layers=())])]
        ['baseline', 'OEB shallow at 0.15']
    """
    return (Variant(BASELINE), *(Variant(describe(config), stepflow=config) for config in settings))


def held_out_variants(chosen: StepFlowConfig) -> tuple[Variant, Variant]:
    """Return the two variants of the held-out comparison.

    Args:
        chosen: the best setting of the search.

    Example:
        >>> from stepsal.experiments.calibration import held_out_variants
        >>> [variant.name for variant in held_out_variants(stepsal.StepFlowConfig())]
        ['baseline', 'chosen']
    """
    return Variant(BASELINE), Variant(CHOSEN, stepflow=chosen)


def evidence_of(folder: Path, n_traces: int, n_layers: int) -> pd.DataFrame:
    """Return the evidence of the profile in a folder.

    Args:
        folder: folder of the calibration.
        n_traces: number of traces to use, from the first; the folder may have more, from a call with more answers.
        n_layers: depth of the model.
    """
    from stepsal.experiments.population import Population

    metrics = Population.load(folder / PROFILE).metrics
    return profile_evidence(metrics[metrics["trace"] < n_traces], n_layers)


def _profile_lines(evidence: pd.DataFrame) -> list[str]:
    """Say for each part of StepFlow where wrong traces have most of what it repairs."""
    lines = []
    for part, of_part in evidence.groupby("part", sort=False):
        top = of_part.sort_values("t", ascending=False).iloc[0]  # NaN comes last
        traces = f"{top['metric']} of {top['n_wrong']} wrong traces beside {top['n_correct']} correct ones"
        if np.isnan(top["t"]):
            lines.append(f"profile, {part}: {traces} is too little to go by")
        elif top["t"] <= 0:
            lines.append(f"profile, {part}: {traces} is higher in no band of layers")
        else:
            where = f"in layers {layer_words(top['layers'])}, t = {top['t']:.1f}"
            lines.append(f"profile, {part}: {traces} is most above them {where}")
    return lines
