"""Heads chosen by likelihood: a planted fault is found and repaired, nothing is found where there is nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import StepFlowConfig, Trace
from stepsal.experiments import Guidance, guide
from stepsal.experiments.guided import divided
from stepsal.generation.scoring import read_rows
from stepsal.intervention.gains import rows_of
from stepsal.tasks import chain

pytestmark = pytest.mark.slow


def solutions(model: TransformerBridge, n: int, length: int = 3) -> list[Trace]:
    problems = [chain.sample(500 + i, length=length) for i in range(n)]
    return [Trace.from_text(p.question, p.solution(), model) for p in problems]


@contextmanager
def blinded(model: TransformerBridge, layer: int, head: int) -> Iterator[None]:
    """Leave the rows of the answer of one head a thousandth of their attention to the question, for themselves."""
    user, answer = (model.tokenizer(mark)["input_ids"][0] for mark in ("<|user|>", "<|assistant|>"))
    places: list[tuple[int, int]] = []  # of the marks around the question, by row

    def read(ids: Tensor, hook: object) -> None:
        places[:] = [tuple(int((row == mark).nonzero()[0]) for mark in (user, answer)) for row in ids]

    def blind(pattern: Tensor, hook: object) -> Tensor:
        pattern = pattern.clone()
        for i, (first, end) in enumerate(places):
            taken = 0.999 * pattern[i, head, end:, first:end]
            pattern[i, head, end:, first:end] -= taken
            pattern[i, head, end:, end:].diagonal().add_(taken.sum(-1))
        return pattern

    with model.hooks(fwd_hooks=[("embed.hook_in", read), (f"blocks.{layer}.attn.hook_pattern", blind)]):
        yield


def values(model: TransformerBridge, traces: list[Trace], config: StepFlowConfig | None = None) -> np.ndarray:
    scores = read_rows(model, rows_of(model, traces, "answer", None), config)
    return np.array([float(log_probs.sum()) for log_probs, _ in scores])


def test_a_blinded_head_is_found_and_repaired(mini: TransformerBridge, tmp_path: Path) -> None:
    traces, taus = solutions(mini, 100, length=5), (0.05, 0.15)
    some = traces[:6]
    intact = values(mini, some).mean()
    losses = {}
    for layer in range(mini.cfg.n_layers):
        for head in range(mini.cfg.n_heads):
            with blinded(mini, layer, head):
                losses[layer, head] = intact - values(mini, some).mean()
    layer, head = max(losses, key=lambda place: losses[place])
    assert losses[layer, head] > 5  # nats, at the head that matters most
    with blinded(mini, layer, head):
        guidance = guide(mini, traces, folder=tmp_path / "g", objective="answer", taus=taus, alphas=(), progress=False)
        assert guidance.gains.top(1, tau_max=0.15) == {layer: [head]}
        assert guidance.beats_baseline
        assert head in guidance.chosen.oeb_layers[layer]
        assert guidance.difference.mean > 0.5
        n_read = []
        handle = mini.original_model.register_forward_hook(lambda *_: n_read.append(1))
        again = guide(mini, traces, folder=tmp_path / "g", objective="answer", taus=taus, alphas=(), progress=False)
        handle.remove()
    assert not n_read  # all was kept
    assert again.judged.equals(guidance.judged)
    path = guidance.save_preset(tmp_path / "preset.json")
    assert StepFlowConfig.load(path) == guidance.chosen
    about = json.loads(path.read_text())["calibration"]
    assert about["shape"] == {"n_layers": 8, "n_heads": 4}
    assert about["held_out"]["n"] == len(guidance.judged) == 40


def test_settings_of_another_model_are_refused(mini: TransformerBridge) -> None:
    settings = StepFlowConfig(oeb_layers={0: [1]}, made_for="another")
    with pytest.raises(ValueError, match=r"chosen for 'another', not for 'mini'.*but\(made_for=None\)"), \
            stepsal.stepflow(mini, settings):  # fmt: skip
        pass
    with stepsal.stepflow(mini, settings.but(made_for=None)):
        pass


def test_without_a_gain_nothing_is_edited(mini: TransformerBridge, tmp_path: Path) -> None:
    """Where the gains of a text are those of another head at random, in most draws no head is sure to gain."""
    guidance = guide(
        mini, solutions(mini, 40), folder=tmp_path, objective="answer", taus=(0.15,), alphas=(), progress=False
    )
    rng, n_found = np.random.default_rng(0), 0
    gains = guidance.gains
    for _ in range(100):
        signs = rng.choice([-1.0, 1.0], size=(gains.n_texts, 1, 1, 1, 1))
        flipped = stepsal.intervention.EditGains(
            gains.bridge * signs, gains.momentum, gains.objective, gains.roles, gains.about, gains.metadata
        )
        n_found += bool(flipped.sure_heads("bridge", 0.15, fdr=0.05))
    assert n_found <= 10


@pytest.mark.nightly
def test_shuffled_labels_beat_nothing(mini: TransformerBridge, tmp_path: Path) -> None:
    """Where right and wrong are drawn at random, whatever is chosen helps on the held-out texts by chance alone."""
    n_draws, n_chosen, n_beaten = 60, 0, 0
    for draw in range(n_draws):
        rng, texts = np.random.default_rng(draw), []
        for seed in range(30):
            problem = chain.sample(30_000 + 30 * draw + seed, length=3)
            before, right = problem.solution().rsplit(" ", 1)
            pair = [f" {right}", f" {int(right[:-1]) + 1}."]
            if rng.random() < 0.5:
                pair.reverse()
            texts.append(stepsal.Continuation(problem.question, before, *pair))
        guidance = guide(mini, texts, folder=tmp_path / str(draw), objective="contrast", fdr=0.5, progress=False)
        n_chosen += guidance.chosen is not None
        n_beaten += guidance.beats_baseline
    print(n_chosen, n_beaten)
    assert n_chosen > 10  # there is something to be wrong about
    assert n_beaten <= 3  # 5 %


def test_where_nothing_helps_the_preset_edits_nothing(tmp_path: Path) -> None:
    gains = stepsal.intervention.EditGains.of(
        np.zeros((8, 1, 1, 2, 2)), np.zeros((8, 1, 2, 2)), np.zeros(8), [0.15], roles=[("question",)] * 8,
        about=[{}] * 8, metadata={},
    )  # fmt: skip
    import pandas as pd

    config = StepFlowConfig(oeb_layers={0: [1]}, smi_layers=(), made_for="mine")
    tried = pd.DataFrame({"setting": ["one"], "edit": ["bridge"], "heads": [1], "gain": [0.1], "stderr": [0.2]})
    judged = pd.DataFrame({"text": range(6), "baseline": 0.0, "edited": [0.1, -0.1, 0.2, -0.2, 0.1, -0.1]})
    guidance = Guidance("mine", "right", gains, tried, config, judged, tmp_path)
    assert not guidance.beats_baseline
    assert guidance.stepflow == StepFlowConfig(oeb_layers=(), smi_layers=(), made_for="mine")
    assert "Nothing beats the baseline" in str(guidance.summary())
    assert max(map(len, str(guidance.summary()).splitlines())) <= 100
    nothing = Guidance("mine", "right", gains, tried[:0], None, judged[:0], tmp_path)
    assert not nothing.beats_baseline
    assert "No head was sure to gain on 8 texts" in str(nothing.summary())


def test_calibrate_chooses_by_likelihood(mini: TransformerBridge, tmp_path: Path) -> None:
    traces, options = solutions(mini, 15), {"folder": tmp_path, "progress": False}
    guidance = stepsal.calibrate(mini, traces, objective="log_prob", gain="answer", **options)
    assert isinstance(guidance, Guidance)
    assert guidance.judged.equals(guide(mini, traces, objective="answer", **options).judged)
    with pytest.raises(ValueError, match="reads texts, but got"):
        stepsal.calibrate(mini, chain.ChainTask(length=1), objective="log_prob", **options)
    with pytest.raises(ValueError, match="needs a task and n_answers"):
        stepsal.calibrate(mini, traces, 30, **options)
    with pytest.raises(ValueError, match="objective='nats' is unknown"):
        stepsal.calibrate(mini, traces, objective="nats", **options)


def test_parts_share_no_text() -> None:
    parts = divided(101, seed=3)
    assert sorted(i for part in parts.values() for i in part) == list(range(101))
    assert divided(101, seed=4) != parts == divided(101, seed=3)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [(4, {}, "4 texts are too few"), (15, {"taus": (), "alphas": ()}, "both empty"),
     (15, {"objective": "right"}, "one of Continuations")],
)  # fmt: skip
def test_errors(mini: TransformerBridge, tmp_path: Path, n: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guide(mini, solutions(mini, n, length=1), **{"folder": tmp_path, "objective": "answer", **options})
