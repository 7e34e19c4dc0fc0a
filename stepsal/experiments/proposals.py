"""Which settings of StepFlow are worth a try: layers by what the maps of a model say, at any strength.

Shallow Lock-in is what the Odds-Equal Bridge is to repair, Deep Decay what Step Momentum Injection is. So the bands of
layers in which wrong traces have more of them than correct ones are the likelier places of the two. That is a hint and
no finding: traces of one question count as several, and wrong traces are often longer, which both metrics go with
(`stepsal.stats.compare_groups` holds length alike; it needs more traces).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from scipy import stats as scipy_stats
from scipy.special import softmax

from stepsal.intervention import StepFlowConfig
from stepsal.layers import layer_indices, layer_ranges
from stepsal.stats import FEWEST

if TYPE_CHECKING:
    import pandas as pd

TAUS = (0.02, 0.05, 0.1, 0.15, 0.3, 0.5)
ALPHAS = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
MOST_T = 4.0  # larger ones are scaled down to this, since one band would take all
OFF = 0.25  # prior of a part's being off
#: Part of StepFlow: the metric of `stepsal.metrics` that says where it has something to repair.
REPAIRS = {"oeb": "lock_in", "smi": "thinking_deficit"}
SEARCHED = ("oeb_layers", "tau_max", "smi_layers", "alpha")


def bands(n_layers: int) -> tuple[tuple[int, ...], ...]:
    """Layers to try a part in: windows of a quarter of the depth in steps of half their width, both halves, and all."""
    width, half = len(layer_indices("shallow", n_layers)), n_layers // 2
    starts = [*range(0, n_layers - width, max(1, width // 2)), n_layers - width]
    found = [range(start, start + width) for start in starts] + [range(half), range(half, n_layers), range(n_layers)]
    return tuple(dict.fromkeys(tuple(band) for band in found if band))


def profile_evidence(metrics: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """Where wrong traces have more of the failures than correct ones, and how likely that makes each band.

    Args:
        metrics: of a population, with the columns trace, layer, correct, lock_in, thinking_deficit.

    Returns:
        One row per part ("oeb", "smi") and band of layers:

            part, layers, metric
            n_correct, n_wrong   traces that have the metric in all layers of the band
            t                    Welch's, wrong minus correct, of the mean over the band; NaN below 5 traces of either
            prior                that the part belongs here, if anywhere: half is spread evenly, half goes by exp(t),
                                 scaled down to 4, so that what the maps don't show has its chance. NaN counts as 0
    """
    import pandas as pd

    correct = metrics.groupby("trace")["correct"].first().astype(bool)
    found = []
    for part, metric in REPAIRS.items():
        table = metrics.pivot(index="trace", columns="layer", values=metric)
        rows: list[dict[str, Any]] = []
        for band in bands(n_layers):
            means = table[list(band)].mean(axis=1, skipna=False).dropna()
            right, wrong = (means[correct[means.index] == flag].to_numpy() for flag in (True, False))
            t = np.nan
            if min(len(right), len(wrong)) >= FEWEST and np.ptp(means) > 0:
                t = float(scipy_stats.ttest_ind(wrong, right, equal_var=False).statistic)
            rows.append(
                {"part": part, "layers": band, "metric": metric, "n_correct": len(right), "n_wrong": len(wrong), "t": t}
            )
        table = pd.DataFrame(rows)
        ts = table["t"].fillna(0.0).clip(-99.0, 99.0)  # infinite where neither group has any spread
        table["prior"] = (softmax(ts * min(1.0, MOST_T / max(ts.abs().max(), MOST_T))) + 1 / len(table)) / 2
        found.append(table)
    return pd.concat(found, ignore_index=True)


def possible(n_layers: int) -> int:
    """How many settings there are to propose."""
    return math.prod(1 + len(bands(n_layers)) * len(strengths) for strengths in (TAUS, ALPHAS)) - 1  # off, or somewhere


def propose(evidence: pd.DataFrame, n: int, *, base: StepFlowConfig, seed: int = 0) -> tuple[StepFlowConfig, ...]:
    """Settings to try: the layers and strengths of the paper, and others drawn by the prior of their layers.

    Args:
        evidence: of `profile_evidence`.
        base: all other settings.

    Returns:
        `n` settings that differ, the likelier first; at most those that are `possible`.
    """
    oeb, smi = (_choices(evidence, *names) for names in (("oeb", "tau_max", TAUS), ("smi", "alpha", ALPHAS)))
    prior: Float[np.ndarray, "oeb smi"] = np.outer([weight for _, weight in oeb], [weight for _, weight in smi])
    prior[0, 0] = 0.0  # both off: the baseline
    shallow, deep = StepFlowConfig().resolve(1 + max(map(max, evidence["layers"])))
    paper = (
        [changes for changes, _ in oeb].index({"oeb_layers": shallow, "tau_max": StepFlowConfig.tau_max}),
        [changes for changes, _ in smi].index({"smi_layers": deep, "alpha": StepFlowConfig.alpha}),
    )
    others = prior.copy()
    others[paper] = 0.0
    weights = (others / others.sum()).ravel()
    drawn = np.random.default_rng(seed).choice(weights.size, size=n - 1, replace=False, p=weights)
    places = [paper, *zip(*np.unravel_index(drawn, prior.shape), strict=True)]
    return tuple(base.but(**oeb[i][0], **smi[j][0]) for i, j in sorted(places, key=lambda place: -prior[place]))


def describe(config: StepFlowConfig) -> str:
    """A setting in a few words, "OEB 0-1 at 0.15, SMI 6-7 at 0.06", and what else is not as usual."""
    parts = [("OEB", config.oeb_layers, config.tau_max), ("SMI", config.smi_layers, config.alpha)]
    words = [f"{name} {layer_words(layers)} at {strength:g}" for name, layers, strength in parts if layers != ()]
    usual, settings = StepFlowConfig().to_dict(), config.to_dict()
    rest = [f"{name}={settings[name]}" for name in usual if name not in SEARCHED and settings[name] != usual[name]]
    return ", ".join([*words, *rest] if words else ["no edit"])


def layer_words(layers: Any) -> str:
    """Layers in a few words, "0-1"."""
    return str(layers) if isinstance(layers, str) or isinstance(layers[0], float) else layer_ranges(layers)


def _choices(
    evidence: pd.DataFrame, part: str, strength: str, strengths: Sequence[float]
) -> list[tuple[dict[str, Any], float]]:
    """What can be done with a part of StepFlow, and its prior: off, then each band at each strength."""
    of_part = evidence[evidence["part"] == part]
    return [({f"{part}_layers": ()}, OFF)] + [
        ({f"{part}_layers": band, strength: x}, (1 - OFF) * weight / len(strengths))
        for band, weight in zip(of_part["layers"], of_part["prior"], strict=True)
        for x in strengths
    ]
