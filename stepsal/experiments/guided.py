"""Choose heads and strengths of StepFlow by likelihood: where its gains say that an edit helps, and no decoding.

The texts are divided in three. By the first part heads are chosen (`stepsal.edit_gains`, false discovery rate over
heads), for each strength of the bridge and for momentum. By the second part one setting is chosen among these, by the
mean change of the objective. By the third it is judged whether that setting helps, on texts that nothing was chosen by.
Each setting costs a forward pass per text, about a hundredth of writing an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from stepsal.experiments.proposals import describe
from stepsal.experiments.store import Store, identity_of
from stepsal.generation.scoring import read_rows
from stepsal.intervention import StepFlowConfig
from stepsal.intervention.gain_table import EditGains
from stepsal.intervention.gains import Objective, Row, edit_gains, rows_of
from stepsal.stats.changes import MeanChange, mean_change
from stepsal.stats.report import Report
from stepsal.storage import digest
from stepsal.trace.continuation import Continuation
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

KIND, VERSION = "guidance", 1
TAUS = (0.05, 0.1, 0.15, 0.3, 0.5)
ALPHAS = (0.1, 0.3, 1.0)
SHARES = {"choose": 0.4, "tune": 0.2, "judge": 0.4}
LEVEL = 0.05

Texts = Sequence[Continuation] | Sequence[Trace]


@dataclass(frozen=True, eq=False)
class Guidance:
    """A setting of StepFlow that was chosen by likelihood, with its judgement on held-out texts.

    Attributes:
        model_name: name of the model.
        objective: what was to gain, as in `stepsal.edit_gains`.
        gains: the gains that heads were chosen by.
        tried: a row for each setting that was tried: setting, edit, strength, heads (number of them), gain and stderr
            (mean change of the objective on the second part, in nats).
        chosen: the best of them, whether it helps or not; None where no head was sure to gain.
        judged: a row for each held-out text: baseline and edited, the objective in nats.
        folder: where it is kept.

    Example:
        >>> import tempfile
        >>> model, problems = stepsal.load("mini"), [stepsal.tasks.chain.sample(i, length=2) for i in range(15)]
        >>> traces = [stepsal.Trace.from_text(p.question, p.solution(), model) for p in problems]
        >>> guidance = stepsal.calibrate(
        ...     model, traces, objective="log_prob", gain="answer", folder=tempfile.mkdtemp(), progress=False
        ... )
        >>> guidance.stepflow.made_for, len(guidance.judged)
        ('mini', 6)
    """

    model_name: str
    objective: Objective
    gains: EditGains
    tried: pd.DataFrame
    chosen: StepFlowConfig | None
    judged: pd.DataFrame
    folder: Path

    @cached_property
    def difference(self) -> MeanChange:
        """The mean change of the objective on the held-out texts, in nats, with its interval."""
        return mean_change((self.judged["edited"] - self.judged["baseline"]).to_numpy())

    @property
    def beats_baseline(self) -> bool:
        """True if a setting was chosen whose held-out gain has its 95 % interval above zero, with p <= 0.05."""
        return self.chosen is not None and self.difference.low > 0 and self.difference.p <= LEVEL

    @property
    def stepflow(self) -> StepFlowConfig:
        """The chosen setting if it beats the baseline, otherwise one that edits nothing; made for this model alone."""
        if self.chosen is not None and self.beats_baseline:
            return self.chosen
        return StepFlowConfig(oeb_layers=(), smi_layers=(), made_for=self.model_name)

    def save_preset(self, path: str | Path) -> Path:
        """Write `stepflow` as a preset in JSON, together with the results that support it, and return the path.

        `StepFlowConfig.load` reads it, and so does `-M preset=<path>` in Inspect; other models refuse it. Where no
        setting beats the baseline, the preset edits nothing.

        Args:
            path: the file, such as "preset.json"; its folder is created if missing.
        """
        about = {
            "model_name": self.model_name, "objective": self.objective, "beats_baseline": self.beats_baseline,
            "n_texts": {"choose": self.gains.n_texts, "judge": len(self.judged)}, "n_settings": len(self.tried),
            "shape": dict(zip(("n_layers", "n_heads"), self.gains.bridge.shape[-2:], strict=True)),
            "held_out": None if self.chosen is None else self.difference._asdict(),
        }  # fmt: skip
        return self.stepflow.save(path, calibration=about)

    def summary(self) -> Report:
        """Say what was tried and what came out.

        Returns:
            The report; `print` writes it within 100 columns, JupyterLab shows it as a table.
        """
        title = f"StepFlow for {self.model_name} by likelihood ({self.objective}): {len(self.tried)} settings"
        columns = zip(self.tried["gain"], self.tried["stderr"], strict=True)
        gains = [f"{gain:+.3f} (±{stderr:.3f})" for gain, stderr in columns]
        table = self.tried[["setting", "heads"]].assign(gain=gains)
        if self.chosen is None:
            told = f"No head was sure to gain on {self.gains.n_texts} texts, so that there is nothing to edit."
            return Report(title, table, [told])
        change = self.difference
        verdict = "It helps." if self.beats_baseline else "Nothing beats the baseline: the preset edits nothing."
        held_out = (
            f"Chosen: {describe(self.chosen)}. On {change.n} held-out texts it changes the objective by "
            f"{change.mean:+.3f} nats ({change.low:+.3f} to {change.high:+.3f}, p = {change.p:.2g}); "
            f"{change.detectable:.3f} would have been seen with 80 % power."
        )
        return Report(title, table, [held_out, verdict])

    def __repr__(self) -> str:
        return f"Guidance({self.model_name}, {self.objective}, {'helps' if self.beats_baseline else 'does not help'})"

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def guide(
    model: TransformerBridge,
    texts: Texts,
    *,
    folder: str | Path,
    objective: Objective = "right",
    taus: Sequence[float] = TAUS,
    alphas: Sequence[float] = ALPHAS,
    fdr: float = 0.1,
    base: StepFlowConfig | None = None,
    segmentation: Segmentation | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Guidance:
    """Choose heads and strengths of StepFlow by likelihood on texts, and judge on others whether they help.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        texts: continuations or right traces, at least 15; 100 or more tell something.
        folder: an empty or new folder, or that of the same call before, which goes on where it was stopped.
        objective: what is to gain, as in `stepsal.edit_gains`.
        taus: values of tau_max that are tried; () leaves the bridge out.
        alphas: values of alpha that are tried; () leaves momentum out.
        fdr: expected share of heads without a gain among those that are edited.
        base: values of bridge, window and into_summary; None takes those of the paper.
        segmentation: the way to find sections and steps; None is `Segmentation()`.
        seed: seed by which texts are divided.
        batch_size: number of rows that are read together.
        progress: show bars.

    Raises:
        ValueError: too few texts, nothing to try, or what `stepsal.edit_gains` refuses.

    Example:
        >>> import tempfile
        >>> problems = [stepsal.tasks.chain.sample(i, length=2) for i in range(15)]
        >>> model = stepsal.load("mini")
        >>> traces = [stepsal.Trace.from_text(p.question, p.solution(), model) for p in problems]
        >>> guidance = stepsal.experiments.guide(
        ...     model, traces, folder=tempfile.mkdtemp(), objective="answer", taus=[0.15], alphas=[], progress=False
        ... )
        >>> len(guidance.tried), guidance.difference.n
        (1, 6)
    """
    if len(texts) < 15:
        raise ValueError(f"{len(texts)} texts are too few to choose by some and judge by others: give 100 or more")
    if not (taus or alphas):
        raise ValueError("taus and alphas are both empty: give at least one strength to try")
    rows = rows_of(model, texts, objective, segmentation)  # refuses what can't be read, before any work
    base = (base or StepFlowConfig()).but(oeb_layers=(), smi_layers=(), made_for=str(model.cfg.model_name))
    parts = divided(len(texts), seed)
    tokens = b"".join(row.trace.tokens.numpy().tobytes() for row in rows)
    parameters = {
        **identity_of(model), "objective": objective, "taus": list(taus), "alphas": list(alphas), "fdr": fdr,
        "seed": seed, "base": base.to_dict(), "texts": digest(tokens),
    }  # fmt: skip
    with Store.opened(folder, KIND, VERSION, parameters) as store:
        scores = _Scores(model, store, texts, rows, objective, segmentation, batch_size, progress)
        gains = scores.gains(parts["choose"], taus or TAUS[:1], base)
        settings = proposed(gains, taus, alphas, fdr, base)
        baseline = scores.of(None, parts["tune"]) if settings else np.zeros(0)
        tried = _table(settings, [scores.of(config, parts["tune"]) - baseline for config in settings])
        combined = _combined(settings, tried, base)
        if combined is not None:
            settings = [*settings, combined]
            tried = _table(settings, [scores.of(config, parts["tune"]) - baseline for config in settings])
        chosen = settings[int(tried["gain"].argmax())] if settings else None
        judged = _judged(scores, chosen, parts["judge"])
    tried = tried.sort_values("gain", ascending=False, kind="stable", ignore_index=True)
    return Guidance(str(model.cfg.model_name), objective, gains, tried, chosen, judged, Path(folder))


def divided(n: int, seed: int) -> dict[str, list[int]]:
    """Return the numbers of the texts of each part.

    Args:
        n: number of texts.
        seed: seed by which they are divided.

    Example:
        >>> from stepsal.experiments.guided import divided
        >>> {name: len(part) for name, part in divided(50, seed=0).items()}
        {'choose': 20, 'tune': 10, 'judge': 20}
    """
    order = np.random.default_rng(seed).permutation(n).tolist()
    n_choose, n_tune = round(SHARES["choose"] * n), round(SHARES["tune"] * n)
    return {
        "choose": sorted(order[:n_choose]), "tune": sorted(order[n_choose : n_choose + n_tune]),
        "judge": sorted(order[n_choose + n_tune :]),
    }  # fmt: skip


def proposed(
    gains: EditGains, taus: Sequence[float], alphas: Sequence[float], fdr: float, base: StepFlowConfig
) -> list[StepFlowConfig]:
    """Return a setting for each strength, of the heads that are sure to gain by it.

    Args:
        gains: gains at these taus.
        taus: strengths of the bridge.
        alphas: strengths of momentum.
        fdr: false discovery rate over heads.
        base: values of what is not chosen.
    """
    settings = []
    for tau in taus:
        if heads := gains.sure_heads("bridge", tau, fdr):
            settings.append(base.but(oeb_layers=heads, tau_max=tau))
    if alphas and (heads := gains.sure_heads("momentum", fdr=fdr)):
        settings += [base.but(smi_layers=heads, alpha=alpha) for alpha in alphas]
    return settings


def _combined(settings: Sequence[StepFlowConfig], tried: pd.DataFrame, base: StepFlowConfig) -> StepFlowConfig | None:
    """Return the best bridge with the best momentum, where both gain."""
    best: dict[str, StepFlowConfig] = {}
    for edit in ("bridge", "momentum"):
        gains = tried["gain"].where(tried["edit"] == edit, 0.0).to_numpy()
        if not (gains > 0).any():
            return None
        best[edit] = settings[int(gains.argmax())]
    bridge, momentum = best["bridge"], best["momentum"]
    return base.but(
        oeb_layers=bridge.oeb_layers, tau_max=bridge.tau_max, smi_layers=momentum.smi_layers, alpha=momentum.alpha
    )


def _table(settings: Sequence[StepFlowConfig], changes: Sequence[Float[np.ndarray, " text"]]) -> pd.DataFrame:
    """Return a row for each setting, in their order."""
    import pandas as pd

    columns = ["setting", "edit", "strength", "heads", "gain", "stderr"]
    rows = []
    for config, change in zip(settings, changes, strict=True):
        parts = [(config.oeb_layers, "bridge", config.tau_max), (config.smi_layers, "momentum", config.alpha)]
        used = [part for part in parts if part[0] != ()]
        edit, strength = used[0][1:] if len(used) == 1 else ("both", float("nan"))
        n_heads = sum(heads.n_heads for heads, _, _ in used)  # type: ignore[union-attr]
        stderr = change.std(ddof=1) / len(change) ** 0.5
        rows.append((describe(config), edit, strength, n_heads, change.mean(), stderr))
    return pd.DataFrame(rows, columns=columns)


def _judged(scores: _Scores, chosen: StepFlowConfig | None, texts: Sequence[int]) -> pd.DataFrame:
    import pandas as pd

    if chosen is None:
        return pd.DataFrame({"text": [], "baseline": [], "edited": []})
    return pd.DataFrame({"text": texts, "baseline": scores.of(None, texts), "edited": scores.of(chosen, texts)})


@dataclass(frozen=True)
class _Scores:
    """The objective of texts under settings, computed once and kept in a store."""

    model: TransformerBridge
    store: Store
    texts: Texts
    rows: Sequence[Row]
    objective: Objective
    segmentation: Segmentation | None
    batch_size: int
    progress: bool

    def gains(self, numbers: Sequence[int], taus: Sequence[float], base: StepFlowConfig) -> EditGains:
        """Return the gains of some texts."""
        if "gains" not in self.store.names():
            texts: Any = [self.texts[i] for i in numbers]
            gains = edit_gains(
                self.model, texts, self.objective, taus=taus, config=base, segmentation=self.segmentation,
                batch_size=self.batch_size, progress=self.progress,
            )  # fmt: skip
            with self.store.adding("gains") as folder:
                gains.save(folder / "gains.safetensors")
        part = next(part for part in self.store.parts() if part.name == "gains")
        return EditGains.load(part.folder / "gains.safetensors")

    def of(self, config: StepFlowConfig | None, numbers: Sequence[int]) -> Float[np.ndarray, " text"]:
        """Return the objective of some texts under a setting, in nats."""
        settings = None if config is None else config.to_dict()
        name = "values-" + digest(json.dumps([settings, list(numbers)]).encode())[:16]
        if name not in self.store.names():
            values = self._read(config, numbers)
            with self.store.adding(name, {"stepflow": settings}) as folder:
                (folder / "values.json").write_text(json.dumps(values), encoding="utf-8")
        part = next(part for part in self.store.parts() if part.name == name)
        return np.array(json.loads((part.folder / "values.json").read_text(encoding="utf-8")))

    def _read(self, config: StepFlowConfig | None, numbers: Sequence[int]) -> list[float]:
        rows = [row for row in self.rows if row.text in set(numbers)]
        options = (self.segmentation, self.batch_size, self.progress)
        scores = read_rows(self.model, rows, config, *options)
        counted = scores
        if self.objective == "errors" and config is not None:  # the tokens that the model itself would not have chosen
            counted = read_rows(self.model, rows, None, *options)
        values = dict.fromkeys(numbers, 0.0)
        for row, (log_probs, _), (_, likeliest) in zip(rows, scores, counted, strict=True):
            kept: Tensor = log_probs[~likeliest] if self.objective == "errors" else log_probs
            values[row.text] += row.sign * float(kept.double().sum())
        return [values[i] for i in numbers]
