"""Propose settings of StepFlow that are worth a try: layers by what the maps of a model say, at any strength.

The Odds-Equal Bridge is to repair Shallow Lock-in, Step Momentum Injection is to repair Deep Decay. So bands of layers
in which wrong traces show more of the failure than correct ones are the likelier places for the repair. That is a hint
and no finding: traces of one question count as several, and wrong traces are often longer, with which both metrics
change. (`stepsal.stats.compare_groups` compares traces of the same length, for which it needs more of them.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from scipy import stats as scipy_stats
from scipy.special import softmax

from stepsal.intervention import StepFlowConfig
from stepsal.intervention.heads import EditedHeads, Heads
from stepsal.layers import Layers, checked_layers, layer_indices, layer_ranges
from stepsal.stats import FEWEST

if TYPE_CHECKING:
    import pandas as pd

TAUS = (0.02, 0.05, 0.1, 0.15, 0.3, 0.5)
ALPHAS = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
MOST_T = 4.0  # if a t is larger, all are scaled down until it is this, since otherwise one band would take all
OFF = 0.25  # prior probability that a part is off
#: For each part of StepFlow, the metric of `stepsal.metrics` that tells where it has something to repair.
REPAIRS = {"oeb": "lock_in", "smi": "thinking_deficit"}
SEARCHED = ("oeb_layers", "tau_max", "smi_layers", "alpha")


def bands(n_layers: int) -> tuple[tuple[int, ...], ...]:
    """Return the layers to try a part in: windows of a quarter of the depth, both halves, and all layers.

    Windows begin half their width apart.

    Args:
        n_layers: depth of the model.

    Example:
        >>> from stepsal.experiments.proposals import bands
        >>> bands(4)
        ((0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3))
    """
    width, half = len(layer_indices("shallow", n_layers)), n_layers // 2
    starts = [*range(0, n_layers - width, max(1, width // 2)), n_layers - width]
    windows = [range(start, start + width) for start in starts]
    layers = [*windows, range(half), range(half, n_layers), range(n_layers)]
    return tuple(dict.fromkeys(tuple(band) for band in layers if band))


def profile_evidence(metrics: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """Compare wrong traces with correct ones in each band of layers, and turn the differences into a prior.

    Args:
        metrics: metrics of a population, with the columns trace, layer, correct, lock_in, thinking_deficit.
        n_layers: depth of the model.

    Returns:
        One row per part ("oeb", "smi") and band of layers:

            part, layers, metric
            n_correct, n_wrong   traces that have the metric in all layers of the band
            t                    Welch's, wrong minus correct, of the mean over the band; NaN below 5 traces of either
            prior                probability that the part belongs here if it is on: half of it is spread evenly, so
                                 that what the maps don't show has its chance, and half goes by exp(t), where NaN counts
                                 as 0 and a largest t above 4 scales all down

    Example:
        >>> import pandas as pd
        >>> from stepsal.experiments.proposals import profile_evidence
        >>> rows = [(i, layer, i % 2 == 0, i + layer, i) for i in range(12) for layer in range(2)]
        >>> columns = ["trace", "layer", "correct", "lock_in", "thinking_deficit"]
        >>> evidence = profile_evidence(pd.DataFrame(rows, columns=columns), 2)
        >>> evidence["layers"].tolist(), evidence["n_wrong"].unique().tolist()
        ([(0,), (1,), (0, 1), (0,), (1,), (0, 1)], [6])
    """
    import pandas as pd

    correct = metrics.groupby("trace")["correct"].first().astype(bool)
    tables = []
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
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def possible(n_layers: int) -> int:
    """Return how many settings `propose` can draw from.

    Args:
        n_layers: depth of the model.

    Example:
        >>> from stepsal.experiments.proposals import possible
        >>> possible(8)
        3720
    """
    return math.prod(1 + len(bands(n_layers)) * len(strengths) for strengths in (TAUS, ALPHAS)) - 1  # off, or somewhere


def propose(evidence: pd.DataFrame, n: int, *, base: StepFlowConfig, seed: int = 0) -> tuple[StepFlowConfig, ...]:
    """Return settings to try: the layers and strengths of the paper, and others drawn by the prior of their layers.

    Args:
        evidence: table of `profile_evidence`.
        n: number of settings; at most `possible(n_layers)`.
        base: values of what is not drawn.
        seed: seed of the draw.

    Returns:
        `n` settings that differ, the likelier first.

    Example:
        >>> import pandas as pd
        >>> from stepsal.experiments.proposals import describe, profile_evidence, propose
        >>> rows = [(i, layer, i % 2 == 0, 0.1, 0.1) for i in range(4) for layer in range(8)]
        >>> columns = ["trace", "layer", "correct", "lock_in", "thinking_deficit"]
        >>> evidence = profile_evidence(pd.DataFrame(rows, columns=columns), 8)
        >>> "OEB 0-1 at 0.15, SMI 6-7 at 0.06" in map(describe, propose(evidence, 5, base=stepsal.StepFlowConfig()))
        True
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
    """Write a setting in a few words: layers and strengths, and whatever else differs from the defaults.

    Args:
        config: the setting.

    Example:
        >>> from stepsal.experiments.proposals import describe
        >>> describe(stepsal.StepFlowConfig(oeb_layers=(0, 1), smi_layers=(6, 7), window=4))
        'OEB 0-1 at 0.15, SMI 6-7 at 0.06, window=4'
        >>> describe(stepsal.StepFlowConfig(oeb_layers={3: {0: 0.1, 2: 0.3}, 4: {1: 0.2}}, smi_layers=()))
        'OEB 3 heads of layers 3-4 at 0.1 to 0.3'
    """
    parts = [("OEB", config.oeb_layers, config.tau_max), ("SMI", config.smi_layers, config.alpha)]
    words = [f"{name} {layer_words(x)} at {_strength_words(x, strength)}" for name, x, strength in parts if x != ()]
    usual, settings = StepFlowConfig().to_dict(), config.to_dict()
    rest = [f"{name}={settings[name]}" for name in usual if name not in SEARCHED and settings[name] != usual[name]]
    return ", ".join([*words, *rest] if words else ["no edit"])


def _strength_words(chosen: Layers | Heads, default: float) -> str:
    """Write the strengths of a choice of layers or heads: one, or the smallest and the largest."""
    strengths = chosen.strengths(default) if isinstance(chosen, EditedHeads) else [default]
    return " to ".join(f"{strength:g}" for strength in sorted({min(strengths), max(strengths)}))


def layer_words(layers: Layers | Heads) -> str:
    """Write a choice of layers or heads in a few words: bands by name, fractions as they are, indices as ranges.

    Args:
        layers: the choice.

    Example:
        >>> from stepsal.experiments.proposals import layer_words
        >>> layer_words("deep"), layer_words((0, 1, 4)), layer_words((0.25, 0.5))
        ('deep', '0-1,4', '(0.25, 0.5)')
    """
    if isinstance(layers, Mapping):
        heads = layers if isinstance(layers, EditedHeads) else EditedHeads(layers)
        of = layer_ranges(sorted(heads))
        return f"{heads.n_heads} head{'s' * (heads.n_heads > 1)} of layer{'s' * (len(heads) > 1)} {of}"
    choice = checked_layers(layers)
    if isinstance(choice, str):
        return choice
    indices = [layer for layer in choice if isinstance(layer, int)]
    return layer_ranges(indices) if len(indices) == len(choice) else str(choice)  # else a range of fractions


def _choices(
    evidence: pd.DataFrame, part: str, strength: str, strengths: Sequence[float]
) -> list[tuple[dict[str, Any], float]]:
    """Return what can be done with a part of StepFlow, and its prior: off, then each band at each strength."""
    of_part = evidence[evidence["part"] == part]
    return [({f"{part}_layers": ()}, OFF)] + [
        ({f"{part}_layers": band, strength: x}, (1 - OFF) * weight / len(strengths))
        for band, weight in zip(of_part["layers"], of_part["prior"], strict=True)
        for x in strengths
    ]
