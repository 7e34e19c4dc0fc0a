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


def test_keys_normalised_after_the_hook_are_refused() -> None:
    model = booted_elsewhere(tiny_hf_model("Llama"))
    model.cfg.qk_norm_after_rope = True
    with pytest.raises(ValueError, match="keys are normalised after hook_rot_k"):
        check_model(model)
