"""The streamed engine under StepFlow: against whole patterns, and against a backward pass for each target."""

from __future__ import annotations

import brute_force
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strong_flow import HEADS, RESPONSE, STRONG, THINK
from tiny_models import ARCHITECTURES, char_tokenizer, tiny_chat, tiny_hf_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal import StepFlowConfig, Trace
from stepsal.saliency.pattern import pattern_maps
from stepsal.saliency.request import MapRequest
from stepsal.saliency.streamed import streamed_maps, why_not
from stepsal.tasks import chain

QUESTION = "How many of them are there?"


@pytest.fixture(scope="module")
def models() -> dict[str, TransformerBridge]:
    return {name: tiny_chat(name) for name in ARCHITECTURES}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, models: dict[str, TransformerBridge]) -> TransformerBridge:
    return models[request.param]


def errors(got: Tensor, expected: Tensor) -> list[float]:
    """Relative error of each layer."""
    return [float((g - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True)]


@st.composite
def configs(draw: st.DrawFn) -> StepFlowConfig:
    """Settings of any kind, for models with four layers of four heads."""
    layers = st.sampled_from(["all", "shallow", (), (1, 3), 2])
    heads = st.dictionaries(
        st.integers(0, 3), st.dictionaries(st.integers(0, 3), st.sampled_from([0.1, 0.9]), min_size=1), min_size=1
    )
    return StepFlowConfig(
        oeb_layers=draw(layers | heads),
        smi_layers=draw(layers | heads),
        tau_max=draw(st.sampled_from([0.05, 0.3, 0.95])),
        alpha=draw(st.sampled_from([0.06, 0.8])),
        bridge=draw(st.sampled_from(["question", "prompt"])),
        window=draw(st.sampled_from([None, 2])),
        into_summary=draw(st.booleans()),
    )


@st.composite
def requests(draw: st.DrawFn) -> MapRequest:
    """Texts of one or two turns, cut anywhere, in steps that need not be those of the text."""
    turn = f"<user>{QUESTION}<assistant><think>{RESPONSE}"
    text = f"<bos>{turn * draw(st.integers(1, 2))}"
    tokens = torch.tensor(char_tokenizer()(text, add_special_tokens=False)["input_ids"])[: draw(st.integers(40, 330))]
    n_steps, n_template = draw(st.integers(1, 6)), draw(st.integers(0, 8))
    step_ids = torch.arange(len(tokens)) * n_steps // len(tokens)
    step_ids[:n_template] = -1
    return MapRequest(
        tokens,
        step_ids,
        n_steps,
        layers=tuple(sorted(draw(st.sets(st.integers(0, 3), min_size=1)))),
        target=draw(st.sampled_from(["token", "logit", "sequence", "attention"])),
        keep_heads=True,
    )


@pytest.mark.slow
@settings(max_examples=60)
@given(st.sampled_from(ARCHITECTURES), requests(), configs(), st.integers(1, 70), st.integers(0, 4))
def test_the_same_maps_as_from_whole_patterns(
    models: dict[str, TransformerBridge],
    architecture: str,
    request: MapRequest,
    config: StepFlowConfig,
    n_rows: int,
    n_kept: int,
) -> None:
    model, maps, logs = models[architecture], [], []
    n_kept = min(n_kept, 4 - request.layers[0])
    for engine in (pattern_maps, lambda *asked: streamed_maps(*asked, n_rows=n_rows, n_kept=n_kept)):
        with stepsal.stepflow(model, config, segmentation=THINK) as log:
            maps.append(engine(model, request).head_sums)
        logs.append(log)
    expected, got = maps
    rounding = 1e-6 * float(expected.norm()) + 1e-30
    for of_layer, expected_of_layer in zip(got, expected, strict=True):
        assert (of_layer - expected_of_layer).norm() <= 1e-4 * expected_of_layer.norm() + rounding
    for table in ("oeb", "smi"):
        pd.testing.assert_frame_equal(getattr(logs[1], table), getattr(logs[0], table), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("target", ["token", "logit", "sequence"])
@pytest.mark.parametrize("config", [STRONG, HEADS], ids=["layers", "heads"])
def test_a_backward_pass_for_each_target(tiny: TransformerBridge, target: str, config: StepFlowConfig) -> None:
    trace = Trace.from_text("How many?", RESPONSE[:70], tiny, segmentation=THINK)
    got = stepsal.step_saliency(tiny, trace, target=target, engine="streamed", stepflow=config).values
    with stepsal.stepflow(tiny, config, segmentation=THINK):
        token_maps = brute_force.token_saliency(tiny, trace.tokens, target)
    pooled = [brute_force.pool(of_layer, trace.step_ids, len(trace.steps), "density") for of_layer in token_maps]
    assert max(errors(got, torch.stack(pooled))) <= 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16(architecture: str) -> None:
    """Against float32 arithmetic on the same (rounded) weights, which are moderate; see the test without StepFlow."""
    wide = tiny_hf_model(architecture, max_position_embeddings=512)
    half = tiny_hf_model(architecture, max_position_embeddings=512)
    with torch.no_grad():
        for p in (*wide.parameters(), *half.parameters()):
            p.copy_(0.4 * p.bfloat16())
    reference = stepsal.load("wide", hf_model=wide, tokenizer=char_tokenizer())
    model = stepsal.load("half", hf_model=half, tokenizer=char_tokenizer(), dtype=torch.bfloat16)
    trace = Trace.from_text(QUESTION, RESPONSE, reference, segmentation=THINK)
    expected = stepsal.step_saliency(reference, trace, engine="pattern", stepflow=STRONG).values
    got = stepsal.step_saliency(model, trace, engine="streamed", stepflow=STRONG).values
    assert max(errors(got, expected)) <= 2e-2


class TestTheEngineAndTheEdits:
    """What both have of each other, in a call of `step_saliency`."""

    @pytest.fixture
    def trace(self, mini: TransformerBridge) -> Trace:
        problem = chain.sample(5, length=4)
        return Trace.from_text(problem.question, problem.solution(), mini)

    def test_it_is_chosen_for_long_traces(self, mini: TransformerBridge, trace: Trace) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stepsal.saliency.memory._SMALL_PATTERNS", 0)
            edited = stepsal.step_saliency(mini, trace, stepflow=StepFlowConfig())
        assert edited.metadata["engine"] == "streamed"
        assert edited.metadata["stepflow"] == StepFlowConfig().to_dict()

    def test_attention(self, mini: TransformerBridge, trace: Trace) -> None:
        config = StepFlowConfig(oeb_layers="all", tau_max=0.6)
        whole, streamed = (
            stepsal.step_attention(mini, trace, engine=engine, stepflow=config) for engine in ("pattern", "streamed")
        )
        torch.testing.assert_close(streamed.values, whole.values)
        assert not torch.allclose(whole.values, stepsal.step_attention(mini, trace).values, rtol=0.01)

    def test_hooks_of_others_see_what_they_see_without_the_engine(self, mini: TransformerBridge, trace: Trace) -> None:
        """Those on z come before or after the momentum, as they came in."""
        config = StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.6, alpha=0.9)

        def halved(z: Tensor, hook: object) -> Tensor:
            return z * 0.5

        maps = []
        for engine in ("pattern", "streamed"):
            with (
                mini.hooks(fwd_hooks=[("blocks.2.attn.o.hook_in", halved)]),
                stepsal.stepflow(mini, config),
                mini.hooks(fwd_hooks=[("blocks.3.attn.o.hook_in", halved)]),
            ):
                maps.append(stepsal.step_saliency(mini, trace, engine=engine).values)
        assert max(errors(maps[1], maps[0])) <= 1e-4

    def test_hooks_on_patterns_need_whole_ones(self, mini: TransformerBridge, trace: Trace) -> None:
        with stepsal.stepflow(mini, StepFlowConfig(oeb_layers="all")):
            assert why_not(mini) is None  # its own hooks are no reason
            with (
                mini.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: None)]),
                pytest.raises(ValueError, match=r"a hook on blocks\.1\.attn\.hook_pattern"),
            ):
                stepsal.step_saliency(mini, trace, engine="streamed")

    def test_an_interrupted_pass_leaves_the_edits_in_place(
        self, mini: TransformerBridge, trace: Trace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.6, alpha=0.9)

        def interrupted(*args: object) -> None:
            raise KeyboardInterrupt

        with stepsal.stepflow(mini, config):
            expected = mini(trace.tokens[None])
            with monkeypatch.context() as patch:
                patch.setattr("stepsal.saliency.streamed.check_finite", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    stepsal.step_saliency(mini, trace, engine="streamed")
            assert torch.equal(mini(trace.tokens[None]), expected)
        assert not torch.allclose(mini(trace.tokens[None]), expected, rtol=0.01)


@pytest.mark.parametrize("n_turns", [1, 5])
def test_nothing_holds_a_number_for_each_query_and_key(n_turns: int) -> None:
    """Groups of long texts take a number for each key, not for each pair."""
    model = tiny_chat("Qwen2", max_position_embeddings=4096)
    turn = f"<user>{QUESTION}<assistant><think>{RESPONSE * (20 // n_turns)}"
    tokens = torch.tensor(model.tokenizer(f"<bos>{turn * n_turns}", add_special_tokens=False)["input_ids"])[:3000]
    request = MapRequest(tokens, torch.arange(len(tokens)) // 100, len(tokens) // 100 + 1, (0, 1, 2, 3))
    config = StepFlowConfig(oeb_layers="all", smi_layers="all")
    with stepsal.stepflow(model, config, segmentation=THINK), Largest() as largest:
        streamed_maps(model, request, n_rows=16)
    assert largest.elements < len(tokens) ** 2 / 8


class Largest(TorchDispatchMode):
    """Watch for the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
