"""The check of a model: what passes, what is refused, that it runs once and sees the model without anybody's hooks."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import booted_elsewhere, char_tokenizer, tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.bridge.check import bias_of_scores, check_model
from stepsal.bridge.hooks import attention_hooks
from stepsal.trace import Trace


def native_attention() -> transformers.PreTrainedModel:
    """A model whose adapter keeps the native attention, and reports the pattern after the fact."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=2, rotary_dim=4, vocab_size=160, n_positions=256)
    return transformers.GPTJForCausalLM(config).eval()


def hooks_on(model: TransformerBridge) -> list[int]:
    return [len(point.fwd_hooks) + len(point._forward_hooks) for point in model.hook_dict.values()]


def test_every_supported_architecture_passes(tiny: TransformerBridge) -> None:
    check_model(tiny)
    for layer in range(tiny.cfg.n_layers):
        assert set(attention_hooks(tiny, layer).values()) <= set(tiny.hook_dict)
    assert bias_of_scores(tiny) is None


def test_a_pattern_that_is_reported_after_the_fact_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'gptj' \(GPTJForCausalLM\) is not supported: layer 0: .*computes attention"):
        stepsal.load("gptj", hf_model=native_attention())


@pytest.mark.parametrize("engine", ["auto", "pattern", "streamed"])
@pytest.mark.parametrize("function", ["step_saliency", "step_attention"])
def test_a_model_booted_elsewhere_is_refused_before_it_is_mapped(function: str, engine: str) -> None:
    model = booted_elsewhere(native_attention(), char_tokenizer())
    trace = Trace.from_text("How many?", "One is two. It is so.</think>Two.", model)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(ValueError, match=r"\(GPTJForCausalLM\) is not supported: layer 0: "):
            getattr(stepsal, function)(model, trace, engine=engine)
    with pytest.raises(ValueError, match=r"\(GPTJForCausalLM\) is not supported: layer 0: "), stepsal.stepflow(model):
        pass
    assert not any(hooks_on(model))


def test_a_good_model_booted_elsewhere_is_mapped_as_one_of_load() -> None:
    elsewhere = booted_elsewhere(tiny_hf_model("Llama", max_position_embeddings=512), char_tokenizer())
    loaded = stepsal.load(
        "tiny", hf_model=tiny_hf_model("Llama", max_position_embeddings=512), tokenizer=char_tokenizer()
    )
    trace = Trace.from_text("How many?", "One is two. It is so.</think>Two.", loaded)
    elsewhere.train()
    maps = [stepsal.step_saliency(model, trace).values for model in (elsewhere, loaded)]
    assert torch.equal(*maps)
    assert elsewhere.training


def test_a_model_is_tried_out_once() -> None:
    model, passes = booted_elsewhere(tiny_hf_model("Qwen2")), []
    handle = model.original_model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(3):
        check_model(model)
    handle.remove()
    assert passes == [1]


def test_hooks_of_others_take_no_part_and_are_still_there() -> None:
    model, calls = booted_elsewhere(tiny_hf_model("Llama")), []

    def needs_ten_tokens(z: torch.Tensor, hook: object) -> torch.Tensor:
        calls.append(z.shape)
        return z.index_fill(1, torch.tensor([9]), 0.0)

    with model.hooks(fwd_hooks=[("blocks.1.attn.o.hook_in", needs_ten_tokens)]):
        before = hooks_on(model)
        check_model(model)
        assert hooks_on(model) == before
        assert not calls
        model(torch.arange(12)[None])
    assert len(calls) == 1
    assert not any(hooks_on(model))


def test_a_gate_between_pattern_and_output_is_refused() -> None:
    model = booted_elsewhere(tiny_hf_model("Llama"))
    model.blocks[1].attn.o.hook_in.forward = lambda z: 0.5 * z  # part of the model, as no hook is
    with pytest.raises(ValueError, match=r"layer 1: the attention output is not hook_pattern times the values"):
        check_model(model)
    assert not any(hooks_on(model))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("OPT", r"its adapter leaves the attention to Hugging Face, .*'blocks\.0\.attn\.hook_pattern' shows a copy"),
        ("GPTNeo", r"its adapter leaves the attention to Hugging Face"),
        ("CodeGen", r"'blocks\.0\.attn\.hook_rot_q' never fires"),
        ("DeepseekV3", r"it has no hook point 'blocks\.0\.attn\.v\.hook_out'"),
        ("Mamba", r"it has no attention \(no hook point 'blocks\.0\.attn\.hook_pattern'\)"),
        ("HunYuanDenseV1", r"keys are normalised after hook_rot_k"),
    ],
)
def test_a_refusal_says_what_is_missing_and_what_to_do(architecture: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"is not supported: layer 0: {reason}.*docs/models\.md"):
        check_model(booted_elsewhere(tiny_hf_model(architecture)))


def test_scores_that_are_not_those_of_queries_and_keys_are_refused() -> None:
    hf_model = tiny_hf_model("GPT2", scale_attn_weights=False)  # TransformerLens scales them all the same
    with pytest.raises(ValueError, match=r"layer 0: 'blocks.0.attn.hook_attn_scores' is not the scaled product of"):
        check_model(booted_elsewhere(hf_model))


def test_a_bias_by_position_is_known() -> None:
    assert "ALiBi" in bias_of_scores(booted_elsewhere(tiny_hf_model("Bloom")))


class Int8(torch.nn.Module):
    """A linear layer of int8 weights whose kernel knows no gradient."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return x @ (self.weight.float() * self.scale).T


class DroppedGradient(torch.autograd.Function):
    """What some kernels do: their output claims to have a gradient, and none comes of it."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> None:
        return None


class NoBackward(DroppedGradient):
    """What others do: the backward pass raises an error."""

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> None:
        raise NotImplementedError("derivative for aten::_int_mm is not implemented")


class Silent(Int8):
    """A linear layer that drops its gradient without a word."""

    function = DroppedGradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x) @ (self.weight.float() * self.scale).T


class Failing(Silent):
    """A linear layer that fails when it is differentiated."""

    function = NoBackward


@pytest.mark.parametrize(
    ("part", "point"),
    [
        ("self_attn.q_proj", "attn.q"),
        ("self_attn.k_proj", "attn.k"),
        ("self_attn.v_proj", "attn.v"),
        ("self_attn.o_proj", "attn.o"),
        ("mlp.gate_proj", "mlp.gate"),
        ("mlp.down_proj", "mlp.out"),
    ],
)
@pytest.mark.parametrize("kind", [Int8, Silent])
def test_quantised_layers_that_give_no_gradient_are_refused(part: str, point: str, kind: type[Int8]) -> None:
    hf_model = tiny_hf_model("Llama")
    parent, _, name = part.rpartition(".")
    module = hf_model.model.layers[2].get_submodule(parent)
    setattr(module, name, kind(getattr(module, name)))
    message = rf"layer 2: no gradient comes through 'blocks\.2\.{point}\.hook_out', .*load the weights unquantised"
    with pytest.raises(ValueError, match=message):
        check_model(booted_elsewhere(hf_model))


def test_layers_that_can_not_be_differentiated_are_refused() -> None:
    hf_model = tiny_hf_model("Llama")
    mlp = hf_model.model.layers[1].mlp
    mlp.up_proj = Failing(mlp.up_proj)
    with pytest.raises(ValueError, match=r"can't be differentiated \(derivative for aten::_int_mm.*unquantised"):
        check_model(booted_elsewhere(hf_model))


def test_quantised_layers_that_give_gradients_are_served() -> None:
    class Kind(Int8):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.float() * self.scale).T

    hf_model = tiny_hf_model("Llama")
    for layer in hf_model.model.layers:
        layer.mlp.up_proj = Kind(layer.mlp.up_proj)
        layer.self_attn.v_proj = Kind(layer.self_attn.v_proj)
    check_model(booted_elsewhere(hf_model))


def test_parts_that_are_ablated_by_zeros_are_served() -> None:
    hf_model = tiny_hf_model("Llama")
    with torch.no_grad():
        hf_model.model.layers[1].mlp.down_proj.weight.zero_()
        hf_model.model.layers[2].self_attn.v_proj.weight.zero_()
        hf_model.model.layers[3].self_attn.q_proj.weight.zero_()
    check_model(booted_elsewhere(hf_model))


@pytest.mark.parametrize(
    ("name", "value", "dtype", "message"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "nan", torch.float32,
         r"layer 1: .*'blocks\.1\.attn\.hook_rot_q', as its parameter '\S*q_proj\.weight' holds NaN.*anew"),
        ("lm_head.weight", "inf", torch.float32,
         r"layer 3: .*'unembed\.hook_out', as its parameter 'lm_head\.weight' holds inf.*anew"),
        ("model.layers.2.self_attn.v_proj.weight", "6e4", torch.float16,
         r"layer 2: .*'blocks\.2\.attn\.v\.hook_out', an overflow.*torch\.bfloat16 or torch\.float32"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_are_named(name: str, value: str, dtype: torch.dtype, message: str) -> None:
    hf_model = tiny_hf_model("Llama").to(dtype)
    with torch.no_grad():
        hf_model.get_parameter(name)[0] = float(value)
    with pytest.raises(ValueError, match=message):
        check_model(booted_elsewhere(hf_model))


def test_keys_normalised_after_the_hook_are_refused() -> None:
    model = booted_elsewhere(tiny_hf_model("Llama"))
    model.cfg.qk_norm_after_rope = True
    with pytest.raises(ValueError, match="keys are normalised after hook_rot_k"):
        check_model(model)
