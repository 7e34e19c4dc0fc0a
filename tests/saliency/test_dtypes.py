"""Both engines in narrow dtypes, and numbers that leave them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, char_tokenizer, tiny_hf_model, with_room
from torch import Tensor

import stepsal
from stepsal.trace import Segmentation, Trace

MORE = ("GPT2", "Phi3", "Olmo3")
NARROW = (torch.bfloat16, torch.float16)


def trace_of(model: stepsal.bridge.loading.TransformerBridge) -> Trace:
    return Trace.from_text("How?", "One. Two a.</think>It is 2.", model, segmentation=Segmentation("think"))


def moderate(architecture: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model with weights that bfloat16 holds, small enough for patterns that it holds, too."""
    hf_model = tiny_hf_model(architecture, **with_room(architecture))
    with torch.no_grad():
        for p in hf_model.parameters():
            p.copy_(0.4 * p.bfloat16())
    return hf_model.to(dtype)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE])
def test_whatever_dtypes_meet(architecture: str) -> None:
    """Some models (OLMo 3) have queries and keys, scores and patterns in float32 whatever their dtype."""
    models = [
        stepsal.load("tiny", hf_model=moderate(architecture, dtype), tokenizer=char_tokenizer())
        for dtype in (torch.float32, *NARROW)
    ]
    trace = trace_of(models[0])
    expected = stepsal.step_saliency(models[0], trace, engine="pattern").values
    for model in models[1:]:
        for target in ("token", "logit", "sequence"):
            by_pattern, streamed = (
                stepsal.step_saliency(model, trace, engine=engine, target=target).values
                for engine in ("pattern", "streamed")
            )
            assert by_pattern.dtype == streamed.dtype == torch.float32
            assert (by_pattern - streamed).norm() <= 0.05 * by_pattern.norm()
            if target == "token" and architecture != "GptOss":  # rounding changes which expert is chosen
                assert (by_pattern - expected).norm() <= 0.05 * expected.norm()
        config = stepsal.StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.5, alpha=0.5)
        flow = stepsal.step_saliency(model, trace, stepflow=config).values
        assert flow.isfinite().all()
        assert not torch.allclose(flow, by_pattern, rtol=0.01)


def scaled(factor: float) -> Callable[[Tensor], object]:
    return lambda weight: weight.mul_(factor)


@pytest.mark.parametrize("engine", ["pattern", "streamed"])
@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("model.layers.2.mlp.down_proj.weight", scaled(3e4),
         r"overflow float16 at 'blocks\.2\.mlp\.hook_out' first: .*bfloat16.*float32"),
        ("model.layers.1.self_attn.q_proj.weight", scaled(1e4),
         r"overflow float16 at 'blocks\.1\.attn\.hook_attn_scores' first"),
        ("model.layers.0.self_attn.v_proj.weight", scaled(6e4),
         r"overflow float16 at 'blocks\.0\.attn\.v\.hook_out' first"),
        ("lm_head.weight", scaled(5e4), r"overflow float16 at 'unembed\.hook_out' first"),
        ("model.layers.3.mlp.up_proj.weight", lambda weight: weight[0].fill_(torch.nan),
         r"its parameter 'model\.layers\.3\.mlp\.up_proj\.weight' holds NaN: load its weights anew"),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_explained(
    engine: str, name: str, change: Callable[[Tensor], object], cause: str
) -> None:
    hf_model = tiny_hf_model("Llama", max_position_embeddings=512)
    parameter = hf_model.get_parameter(name)
    model = stepsal.load("tiny", hf_model=hf_model, tokenizer=char_tokenizer(), dtype=torch.float16)
    with torch.no_grad():
        change(parameter)
    with pytest.raises(FloatingPointError, match=rf"NaN or inf in the \w+ of layer \d: .*{cause}"):
        stepsal.step_saliency(model, trace_of(model), engine=engine)


def test_a_bias_by_position_is_for_the_pattern_engine() -> None:
    hf_model = tiny_hf_model("Bloom")
    model = stepsal.load("tiny", hf_model=hf_model, tokenizer=char_tokenizer())
    with pytest.raises(
        ValueError, match=r"has a bias by position \(ALiBi\), which can't be streamed: use engine=.pattern"
    ):
        stepsal.step_saliency(model, trace_of(model), engine="streamed")
    assert stepsal.step_saliency(model, trace_of(model)).metadata["engine"] == "pattern"
