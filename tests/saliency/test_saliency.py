"""Step-Saliency against brute force, and what the pass must leave untouched."""

from __future__ import annotations

import inspect
import io
import typing
from collections.abc import Callable

import brute_force
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_hf_model
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.bridge.attention import attention_of
from stepsal.maps.pooling import pool_steps
from stepsal.saliency.own_position import own_position_hooks
from stepsal.saliency.pattern import pattern_maps
from stepsal.saliency.request import MapRequest
from stepsal.saliency.streamed import streamed_maps
from stepsal.tasks import chain
from stepsal.trace import Segmentation, Trace

STEP_IDS = torch.tensor([-1, -1] + [0] * 6 + [1] * 5 + [2] * 4 + [-1] + [3] * 6)
N_STEPS = 4
ALL = torch.arange(len(STEP_IDS))  # positions whose token maps are kept


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 160, (len(STEP_IDS),), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def chain_trace(mini: TransformerBridge) -> Trace:
    problem = chain.sample(3, length=2)
    return Trace.from_text(problem.question, problem.solution(), mini)


def request(tokens: torch.Tensor, **options: object) -> MapRequest:
    return MapRequest(tokens, STEP_IDS, N_STEPS, **options)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def logits_of(model: TransformerBridge, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens[None], attention_mask=torch.ones_like(tokens)[None])


@pytest.mark.parametrize("target", ["token", "logit", "sequence"])
def test_exact_on_every_architecture(tiny: TransformerBridge, tokens: torch.Tensor, target: str) -> None:
    expected = brute_force.token_saliency(tiny, tokens, target)
    layers = tuple(range(tiny.cfg.n_layers))
    maps = pattern_maps(tiny, request(tokens, layers=layers, target=target, token_positions=ALL))
    for layer in layers:
        assert expected[layer].norm() > 0
        assert relative_error(maps.tokens[layer], expected[layer]) <= 1e-5


@pytest.mark.parametrize("target", ["token", "logit", "sequence"])
@pytest.mark.parametrize("reduce", ["density", "mass"])
def test_exact_step_maps_of_the_embedded_reasoner(
    mini: TransformerBridge, chain_trace: Trace, target: str, reduce: str
) -> None:
    saliency = stepsal.step_saliency(mini, chain_trace, target=target, reduce=reduce)
    token_maps = brute_force.token_saliency(mini, chain_trace.tokens, target)
    n = len(chain_trace.steps)
    for layer, token_map in enumerate(token_maps):
        expected = brute_force.pool(token_map, chain_trace.step_ids, n, reduce)
        assert relative_error(saliency.values[layer], expected) <= 1e-5
    assert torch.equal(saliency.values, saliency.values.tril())
    assert saliency.values.dtype == torch.float32


def test_targets_differ_except_in_the_last_layer(tiny: TransformerBridge, tokens: torch.Tensor) -> None:
    layers = tuple(range(tiny.cfg.n_layers))
    token = pattern_maps(tiny, request(tokens, layers=layers, target="token")).sums
    sequence = pattern_maps(tiny, request(tokens, layers=layers, target="sequence")).sums
    assert torch.allclose(token[-1], sequence[-1])  # nothing after the last layer mixes positions
    assert relative_error(token[0], sequence[0]) > 0.05


def test_the_logit_knows_what_a_sure_row_relies_on(mini: TransformerBridge, chain_trace: Trace) -> None:
    """The loss hardly depends on anything where the next token is certain; its logit does as anywhere."""
    spans = {}
    for target in ("token", "logit"):
        saliency = stepsal.step_saliency(mini, chain_trace, target=target, reduce="mass")
        rows = saliency.mean_over("deep").sum(-1)  # [query_step]
        spans[target] = float(rows.log10().max() - rows.log10().min())
    assert spans["logit"] < 1.5 < 2 < spans["token"]


def test_a_shift_of_all_logits_changes_nothing(tiny: TransformerBridge, tokens: torch.Tensor) -> None:
    if attention_of(tiny, 0).softcap:
        pytest.skip("caps its logits after the last hook point")
    asked = request(tokens, layers=tuple(range(tiny.cfg.n_layers)), target="logit")
    expected = pattern_maps(tiny, asked).sums

    def shifted(x: torch.Tensor, hook: object) -> torch.Tensor:
        return x + 3 * x[..., :1] ** 2

    with tiny.hooks(fwd_hooks=[("unembed.hook_out", shifted)]):
        got = pattern_maps(tiny, asked).sums
    assert relative_error(got, expected) <= 1e-4


@pytest.mark.parametrize("target", ["token", "logit", "sequence"])
def test_edits_by_other_hooks_are_part_of_the_model(tiny: TransformerBridge, tokens: torch.Tensor, target: str) -> None:
    """An ablated head, say, has no gradient, through its own position's value as little as through any other."""
    edits = [
        ("blocks.1.attn.hook_rot_q", lambda q, hook: 0.5 * q),
        ("blocks.1.attn.hook_rot_k", lambda k, hook: 1.5 * k),
        ("blocks.2.attn.hook_attn_scores", lambda s, hook: 0.5 * s),
        ("blocks.1.attn.hook_pattern", lambda a, hook: 0.7 * a),
        ("blocks.1.attn.v.hook_out", lambda v, hook: v + 0.3),
        ("blocks.2.attn.o.hook_in", lambda z, hook: z.index_fill(2, torch.tensor([1]), 0.0)),
        ("blocks.3.attn.o.hook_in", lambda z, hook: 2 * z),
    ]
    layers = tuple(range(tiny.cfg.n_layers))
    with tiny.hooks(fwd_hooks=edits):
        expected = brute_force.token_saliency(tiny, tokens, target)
        maps = pattern_maps(tiny, request(tokens, layers=layers, target=target, token_positions=ALL))
    for layer in layers:
        assert relative_error(maps.tokens[layer], expected[layer]) <= 1e-5


def test_own_position_hooks_leave_logits_identical(tiny: TransformerBridge, tokens: torch.Tensor) -> None:
    plain = logits_of(tiny, tokens)
    own = [own_position_hooks(tiny, layer) for layer in range(tiny.cfg.n_layers)]
    hooks = [pair for hooks in own for pair in (*hooks.first, *hooks.last)]
    with tiny.hooks(fwd_hooks=hooks):
        assert torch.equal(logits_of(tiny, tokens), plain)


@pytest.mark.parametrize("target", ["token", "logit", "sequence"])
def test_a_subset_of_layers_and_heads_gives_the_same_maps(
    mini: TransformerBridge, chain_trace: Trace, target: str
) -> None:
    full = stepsal.step_saliency(mini, chain_trace, target=target, keep_heads=True)
    part = stepsal.step_saliency(mini, chain_trace, target=target, layers=[-1, 3])
    assert part.layers == (3, mini.cfg.n_layers - 1)
    for layer in part.layers:
        assert torch.allclose(part.layer(layer), full.layer(layer), rtol=1e-5, atol=1e-10)
    assert full.head_values.shape == (mini.cfg.n_layers, mini.cfg.n_heads, *full.values.shape[1:])
    assert torch.allclose(full.head_values.mean(1), full.values, rtol=1e-5, atol=1e-10)


def test_heads_stand_in_their_places(mini: TransformerBridge, chain_trace: Trace) -> None:
    saliency = stepsal.step_saliency(mini, chain_trace, keep_heads=True, layers="deep")
    expected = brute_force.head_saliency(mini, chain_trace.tokens, "token")
    n = len(chain_trace.steps)
    assert saliency.layers == (6, 7)
    for i, layer in enumerate(saliency.layers):
        for head in range(mini.cfg.n_heads):
            pooled = brute_force.pool(expected[layer, head], chain_trace.step_ids, n, "density")
            assert relative_error(saliency.head_values[i, head], pooled) <= 1e-5


@pytest.mark.parametrize("engine", ["pattern", "streamed"])
@pytest.mark.parametrize("function", [stepsal.step_saliency, stepsal.step_attention])
def test_a_trace_made_in_inference_mode(
    mini: TransformerBridge, chain_trace: Trace, function: Callable, engine: str
) -> None:
    expected = function(mini, chain_trace, engine=engine).values
    with torch.inference_mode():
        trace = Trace.from_text(chain_trace.question, chain_trace.response, mini)
        assert torch.equal(function(mini, trace, engine=engine).values, expected)
    assert torch.equal(function(mini, trace, engine=engine).values, expected)


@pytest.mark.parametrize("engine", ["pattern", "streamed"])
@pytest.mark.parametrize("n_traces", [1, 3])
def test_a_bar_counts_layers(
    mini: TransformerBridge, chain_trace: Trace, engine: str, n_traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tqdm] = []
    shown: list[bool] = []

    def bar(*arguments: object, **options: object) -> tqdm:
        shown.append(not options["disable"])
        bars.append(tqdm(*arguments, **options | {"file": io.StringIO(), "delay": 0}))
        return bars[-1]

    monkeypatch.setattr("stepsal.saliency.step_maps.tqdm", bar)
    stepsal.step_saliency(mini, [chain_trace] * n_traces, engine=engine, layers=[1, 2, 5])
    assert [b.n for b in bars[1:]] == [3] * n_traces
    assert shown == [n_traces > 1] + [True] * n_traces
    assert all(b.leave is (n_traces == 1) for b in bars[1:])


def test_density_and_mass_agree_through_the_number_of_pairs(mini: TransformerBridge, chain_trace: Trace) -> None:
    density = stepsal.step_saliency(mini, chain_trace, reduce="density").values
    mass = stepsal.step_saliency(mini, chain_trace, reduce="mass").values
    lengths = torch.tensor([step.end - step.start for step in chain_trace.steps], dtype=torch.float32)
    below = torch.ones(density.shape[1:]).tril(-1).bool()
    assert torch.allclose((density * lengths)[:, below], mass[:, below], rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_alone_is_that_of_the_plain_model(architecture: str, tokens: torch.Tensor) -> None:
    plain = tiny_hf_model(architecture)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        expected = torch.stack(plain(tokens[None], output_attentions=True).attentions)[:, 0]  # [layer, head, pos, pos]
    model = stepsal.load("tiny", hf_model=tiny_hf_model(architecture))
    options: dict = {"layers": (0, 1, 2, 3), "target": "attention", "keep_heads": True}
    maps = pattern_maps(model, request(tokens, **options, token_positions=ALL))
    assert relative_error(maps.tokens, expected.mean(1)) <= 1e-5
    pooled = pool_steps(expected, STEP_IDS, N_STEPS)
    assert relative_error(maps.head_sums, pooled) <= 1e-5
    streamed = streamed_maps(model, request(tokens, **options), n_rows=7)
    assert relative_error(streamed.head_sums, pooled) <= 1e-5
    assert relative_error(streamed.sums, pooled.mean(1)) <= 1e-5
    assert not any(len(point.fwd_hooks) for point in model.hook_dict.values())


@pytest.mark.parametrize("stepflow", [None, stepsal.StepFlowConfig(tau_max=0.3)])
def test_attention_of_a_trace(
    mini: TransformerBridge, chain_trace: Trace, stepflow: stepsal.StepFlowConfig | None
) -> None:
    options: dict = {"reduce": "mass", "layers": [0, 7], "stepflow": stepflow}
    attention, again = stepsal.step_attention(mini, [chain_trace, chain_trace], **options)
    assert torch.equal(attention.values, again.values)
    saliency = stepsal.step_saliency(mini, chain_trace, reduce="mass", layers=[0, 7])
    assert attention.target == "attention"
    assert attention.roles == saliency.roles
    assert attention.metadata.get("stepflow") == (stepflow.to_dict() if stepflow else None)
    rows = attention.values.sum(-1)
    assert (rows <= 1 + 1e-5).all()  # the rest is on template tokens
    if stepflow is None:
        assert torch.equal(rows > 0, torch.ones_like(rows).bool())
    else:
        plain = stepsal.step_attention(mini, chain_trace, reduce="mass", layers=[0, 7])
        assert (attention.values[0, 1:, 0] > plain.values[0, 1:, 0]).any()  # the bridge


class TestNothingIsLeftBehind:
    """Hooks, gradients, requires_grad and modes after success, failure and interruption."""

    @pytest.fixture
    def model(self) -> TransformerBridge:
        model = stepsal.load("tiny", hf_model=tiny_hf_model("Qwen2"))
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(i % 2 == 0)
        model.train()
        model.blocks[1].eval()
        return model

    @staticmethod
    def state(model: TransformerBridge) -> tuple:
        return (
            [(p.requires_grad, p.grad) for p in model.parameters()],
            [m.training for m in model.modules()],
            {name: len(point.fwd_hooks) + len(point.bwd_hooks) for name, point in model.hook_dict.items()},
            torch.is_grad_enabled(),
        )

    def run(self, model: TransformerBridge, tokens: torch.Tensor) -> None:
        pattern_maps(model, request(tokens, layers=(0, 1, 2, 3), target="token"))

    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("when", ["forward", "backward"])
    def test_state_is_restored(
        self, model: TransformerBridge, tokens: torch.Tensor, error: type | None, when: str
    ) -> None:
        calls = []

        def users_hook(x: torch.Tensor, hook: object) -> None:
            calls.append(hook.name)

            def fail(gradient: torch.Tensor) -> None:
                raise error

            if error and when == "forward":
                raise error
            if error:
                x.register_hook(fail)

        model.blocks[2].attn.hook_out.add_hook(users_hook)
        before = self.state(model)
        if error:
            with pytest.raises(error):
                self.run(model, tokens)
        else:
            self.run(model, tokens)
        assert self.state(model) == before
        assert len(calls) == 1  # the user's hook ran, and is still there
        assert len(model.blocks[2].attn.hook_out.fwd_hooks) == 1

    def test_inside_no_grad_and_inference_mode(self, model: TransformerBridge, tokens: torch.Tensor) -> None:
        with torch.no_grad():
            self.run(model, tokens)
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            self.run(model, tokens)


def test_nan_is_reported_with_its_layer(tokens: torch.Tensor) -> None:
    model = stepsal.load("tiny", hf_model=tiny_hf_model("Llama"))
    with torch.no_grad():
        model.blocks[2].attn.o.original_component.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="layer 3"):  # the backward pass meets the last layer first
        pattern_maps(model, request(tokens, layers=(0, 1, 2, 3), target="token"))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target": "tokens"}, "target='tokens'.*'token', 'logit', 'sequence'"),
            ({"engine": "fast"}, "engine='fast'.*'auto', 'pattern'"),
            ({"reduce": "max"}, "reduce='max'.*'density', 'mass'"),
            ({"layers": [8]}, r"layers=\[8\]: there is no layer 8 in a model of 8 layers"),
            ({"layers": "bottom-quarter"}, "layers='bottom-quarter' names no layers"),
            ({"layers": None}, "layers=None names no layers"),
            ({"layers": []}, r"layers=\[\] names no layer, so there is nothing to map"),
        ],
    )
    def test_bad_options(self, mini: TransformerBridge, chain_trace: Trace, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            stepsal.step_saliency(mini, chain_trace, **options)

    def test_a_trace_of_another_tokenizer(self, chain_trace: Trace) -> None:
        model = stepsal.load("tiny", hf_model=tiny_hf_model("Llama"))
        with pytest.raises(ValueError, match=r"token id \d+ is outside the vocabulary of 'tiny' \(160 tokens\)"):
            stepsal.step_saliency(model, chain_trace)

    def test_a_trace_longer_than_the_context(self, chain_trace: Trace) -> None:
        model = stepsal.load("short", hf_model=tiny_hf_model("Llama", max_position_embeddings=16))
        with pytest.raises(ValueError, match=rf"{len(chain_trace)} tokens but 'short' takes 16"):
            stepsal.step_saliency(model, chain_trace)


class TestSegmentation:
    """Under StepFlow, traces and StepFlow are cut in one way."""

    @staticmethod
    def trace(model: TransformerBridge, split: str) -> Trace:
        problem = chain.sample(3, length=2)
        return Trace.from_text(problem.question, problem.solution(), model, segmentation=Segmentation(split=split))

    def test_stepflow_follows_the_trace(self, mini: TransformerBridge) -> None:
        config = stepsal.StepFlowConfig(oeb_layers=(), smi_layers="all", alpha=0.5)
        words = r"\bis\b"  # of which a line has several, so that there are steps to inject at
        trace = self.trace(mini, words)
        assert trace.roles.count("thinking") > 2
        options: dict = {"layers": [0, 7], "stepflow": None}
        with_config = stepsal.step_saliency(mini, trace, layers=[0, 7], stepflow=config)
        with stepsal.stepflow(mini, config, segmentation=Segmentation(split=words)):
            around = stepsal.step_saliency(mini, trace, **options)
        assert torch.equal(with_config.values, around.values)
        assert with_config.metadata["stepflow"] == around.metadata["stepflow"] == config.to_dict()
        plain = stepsal.step_saliency(mini, trace, **options)
        assert not torch.equal(with_config.values, plain.values)

    @pytest.mark.parametrize("function", [stepsal.step_saliency, stepsal.step_attention])
    def test_a_mismatch_with_an_open_context_is_refused(self, mini: TransformerBridge, function: Callable) -> None:
        trace, calls = self.trace(mini, "line"), []
        with (
            stepsal.stepflow(mini),
            mini.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: calls.append(1))]),
            pytest.raises(ValueError, match=r"split='sentence'.*split='line'"),
        ):
            function(mini, trace)
        assert not calls

    def test_traces_of_two_cuts_are_mapped_one_by_one(self, mini: TransformerBridge) -> None:
        traces = [self.trace(mini, split) for split in ("line", "sentence")]
        with pytest.raises(ValueError, match=r"split='line'.*split='sentence'.*map them one by one under StepFlow"):
            stepsal.step_saliency(mini, traces, stepflow=stepsal.StepFlowConfig())
        with stepsal.stepflow(mini), pytest.raises(ValueError, match="map them one by one under StepFlow"):
            stepsal.step_saliency(mini, traces)
        assert len(stepsal.step_saliency(mini, traces, layers=-1)) == 2  # without StepFlow each has its own

    def test_no_trace_gives_no_map(self, mini: TransformerBridge) -> None:
        assert stepsal.step_saliency(mini, []) == []
        assert stepsal.step_attention(mini, [], stepflow=stepsal.StepFlowConfig()) == []


@pytest.mark.parametrize("function", [stepsal.step_saliency, stepsal.step_attention])
def test_signatures_are_written_out(function: Callable) -> None:
    signature = inspect.signature(function)
    assert not {p.kind for p in signature.parameters.values()} & {inspect.Parameter.VAR_KEYWORD}
    overloads = [inspect.signature(overload) for overload in typing.get_overloads(function)]
    assert len(overloads) == 2
    for overload in overloads:
        assert list(overload.parameters) == list(signature.parameters)
        for name, parameter in signature.parameters.items():
            assert overload.parameters[name].default == parameter.default
            assert name == "trace" or overload.parameters[name].annotation == parameter.annotation


def test_every_architecture_is_covered() -> None:
    assert {"Qwen2", "Llama", "Qwen3", "GptOss"} <= set(ARCHITECTURES)
