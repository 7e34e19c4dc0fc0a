"""Switches of the chat template reach the model, the traces and the manifests; old folders open without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import Decoding, Variant
from stepsal.experiments.population import Population
from stepsal.tasks.chain import ChainTask
from stepsal.widgets import StepFlowPanel

pytestmark = pytest.mark.slow  # each test runs a model or a command

TASK = ChainTask(length=1)
DECODING = Decoding(max_new_tokens=12)
CHAT = {"enable_thinking": False}
UNKNOWN = {"enable_thinkin": False}


@pytest.fixture(autouse=True)
def switched(mini: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the embedded reasoner a template with a switch, as Qwen3 has it."""
    template = mini.tokenizer.chat_template + "{% if enable_thinking is false %}{{ '</think>' }}{% endif %}"
    monkeypatch.setattr(mini.tokenizer, "chat_template", template)


def forget_switches(folder: Path) -> None:
    """Make manifests those of a time before there were switches."""
    for path in folder.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        assert manifest.pop("chat") == {}
        path.write_text(json.dumps(manifest))


def test_answers(mini: TransformerBridge) -> None:
    question = TASK.sample(0).question
    plain, switched = (stepsal.generate(mini, question, max_new_tokens=12, chat=chat) for chat in (None, CHAT))
    assert (plain.chat, switched.chat) == ({}, CHAT)
    assert switched.text.startswith(plain.text[: -len(plain.response)] + "</think>")
    assert set(plain.roles) == {"question", "thinking"}
    assert set(switched.roles) == {"question", "summary"}
    batch = stepsal.generate_batch(mini, [question] * 2, max_new_tokens=12, chat=CHAT)
    assert [trace.chat for trace in batch] == [CHAT] * 2
    assert torch.equal(batch[1].tokens, switched.tokens)
    assert stepsal.Trace.from_text(question, switched.response, mini, chat=CHAT).text == switched.text


def test_a_population(mini: TransformerBridge, tmp_path: Path) -> None:
    options = {"decoding": DECODING, "layers": 0, "progress": False}
    population = stepsal.collect(mini, TASK, 2, tmp_path / "switched", chat=CHAT, **options)
    assert population.manifest["chat"] == population.trace(1).chat == CHAT
    assert torch.equal(
        population.trace(1).tokens, stepsal.generate(mini, TASK.sample(1).question, max_new_tokens=12, chat=CHAT).tokens
    )
    assert len(stepsal.collect(mini, TASK, 3, tmp_path / "switched", chat=CHAT, **options)) == 3
    for chat in (None, {}, {"enable_thinking": True}):
        with pytest.raises(ValueError, match=r"made with chat\.enable_thinking=False, not"):
            stepsal.collect(mini, TASK, 3, tmp_path / "switched", chat=chat, **options)


def test_folders_from_before_there_were_switches(mini: TransformerBridge, tmp_path: Path) -> None:
    options = {"decoding": DECODING, "layers": 0, "progress": False}
    stepsal.collect(mini, TASK, 2, tmp_path, **options)
    forget_switches(tmp_path)
    assert Population.load(tmp_path).trace(0).chat == {}
    for chat in (None, {}):
        assert len(stepsal.collect(mini, TASK, 2, tmp_path, chat=chat, **options)) == 2
    with pytest.raises(ValueError, match=r"made with chat\.enable_thinking=None, not False"):
        stepsal.collect(mini, TASK, 2, tmp_path, chat=CHAT, **options)


def test_an_evaluation(mini: TransformerBridge, tmp_path: Path) -> None:
    variants = [Variant("plain"), Variant("StepFlow", stepflow=stepsal.StepFlowConfig())]
    options = {"decoding": DECODING, "progress": False}
    run = stepsal.evaluate(mini, TASK, variants, 2, folder=tmp_path / "switched", chat=CHAT, **options)
    assert run.manifest["chat"] == CHAT
    trace = stepsal.generate(
        mini, TASK.sample(1).question, max_new_tokens=12, chat=CHAT, segmentation=stepsal.Segmentation("think")
    )
    assert run.answers_of("plain")["response"][1] == trace.response
    assert run.answers_of("StepFlow")["response"][1] == trace.response  # without thinking there is nothing to edit
    stepsal.evaluate(mini, TASK, variants[:1], 2, folder=tmp_path / "plain", **options)
    forget_switches(tmp_path / "plain")
    stepsal.evaluate(mini, TASK, variants[:1], 2, folder=tmp_path / "plain", **options)
    with pytest.raises(ValueError, match=r"chat\.enable_thinking=None, not False"):
        stepsal.evaluate(mini, TASK, variants[:1], 2, folder=tmp_path / "plain", chat=CHAT, **options)


def test_a_calibration(mini: TransformerBridge, tmp_path: Path) -> None:
    settings = [stepsal.StepFlowConfig(tau_max=tau) for tau in (0.15, 0.5)]
    options = {"settings": settings, "decoding": Decoding(max_new_tokens=3), "progress": False}
    calibration = stepsal.calibrate(mini, TASK, 30, folder=tmp_path, chat=CHAT, **options)
    assert calibration.held_out.manifest["chat"] == calibration.rounds[0].manifest["chat"] == CHAT
    assert json.loads((tmp_path / "manifest.json").read_text())["chat"] == CHAT
    with pytest.raises(ValueError, match=r"made with chat\.enable_thinking=False, not None"):
        stepsal.calibrate(mini, TASK, 30, folder=tmp_path, **options)


def test_the_panel(mini: TransformerBridge) -> None:
    panel = StepFlowPanel(mini, TASK.sample(0).question, decoding=DECODING, chat=CHAT)
    panel.run()
    assert [trace.chat for trace in panel.traces.values()] == [CHAT] * 2


def test_an_unknown_switch_is_refused_before_any_work(mini: TransformerBridge, tmp_path: Path) -> None:
    question, variants, folder = TASK.sample(0).question, [Variant("plain")], tmp_path / "new"
    calls = (
        lambda: stepsal.generate(mini, question, chat=UNKNOWN),
        lambda: stepsal.generate_batch(mini, [question], chat=UNKNOWN),
        lambda: stepsal.Trace.from_text(question, "It is 3.", mini, chat=UNKNOWN),
        lambda: stepsal.collect(mini, TASK, 2, folder, chat=UNKNOWN),
        lambda: stepsal.evaluate(mini, TASK, variants, 2, folder=folder, chat=UNKNOWN),
        lambda: stepsal.calibrate(mini, TASK, 3000, folder=folder, chat=UNKNOWN),
        lambda: StepFlowPanel(mini, question, chat=UNKNOWN),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match="'enable_thinkin' is not used by the chat template; use 'enable_thinking'"
        ):
            call()
    assert not folder.exists()


def test_a_switch_that_is_given_as_a_keyword_names_itself(mini: TransformerBridge) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'enable_thinking'"):
        stepsal.generate(mini, "What is Anna?", enable_thinking=False)
