"""The models of the presets in their full width: random weights, two layers, few words.

Heads, their grouping and size, widths and rotary embeddings are those of each model's published config.json; depth,
vocabulary and the number of experts (which no part of stepsal looks at) are cut. A model takes up to 4 GB.
"""

from __future__ import annotations

import brute_force
import psutil
import pytest
import torch
import transformers
from forward_passes import decoded, logits_of
from tiny_models import char_tokenizer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers.initialization import no_init_weights

import stepsal
from stepsal.bridge.presets import FAMILIES, family, preset_format
from stepsal.intervention import StepFlowConfig
from stepsal.trace import Segmentation, Trace

QWEN2 = {"num_key_value_heads": 8, "hidden_size": 5120, "num_attention_heads": 40, "rms_norm_eps": 1e-5}
SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("Qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "rope_theta": 1e4}),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": ("Qwen2", {**QWEN2, "intermediate_size": 13824, "rope_theta": 1e6}),
    "Qwen/QwQ-32B": ("Qwen2", {**QWEN2, "intermediate_size": 27648, "rope_theta": 1e6}),  # and R1-Distill-Qwen-32B
    "openai/gpt-oss-20b": ("GptOss", {"num_local_experts": 8}),  # the rest is the default of its configuration
    "Qwen/Qwen3-8B": ("Qwen3", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "rope_theta": 1e6}),
}  # fmt: skip
RESPONSE = " One is two. It is so again. We see it once more. </think> Two."


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.nightly) for name in SHAPES],
    ids=[name.rpartition("/")[2] for name in SHAPES],
)
def wide(request: pytest.FixtureRequest) -> TransformerBridge:
    """Parameters are stretches of one million random numbers, since drawing a billion takes a minute."""
    architecture, shape = SHAPES[request.param]
    shape |= {"num_hidden_layers": 2, "vocab_size": 160, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    if architecture == "GptOss":
        shape["layer_types"] = ["sliding_attention", "full_attention"]
    if psutil.virtual_memory().available < 6e9:
        pytest.skip("NOT TESTED: models in their full width need 6 GB of free memory")
    config = getattr(transformers, f"{architecture}Config")(**shape)
    with no_init_weights():
        hf_model = getattr(transformers, f"{architecture}ForCausalLM")._from_config(config, attn_implementation="eager")
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, (name, p) in enumerate(hf_model.named_parameters()):
            start = 7919 * i % 2**19
            values = noise[start : start + p.numel()] if p.numel() < 2**19 else noise.roll(start)
            values = values.repeat(-(-p.numel() // len(values)))[: p.numel()].view(p.shape)
            if p.ndim == 1 and name.endswith("norm.weight"):
                p.copy_(1 + 0.1 * values)
            else:
                p.copy_(values * (0.5 if p.ndim == 1 else p.shape[-1] ** -0.5))
    return stepsal.load(request.param, hf_model=hf_model.eval(), tokenizer=char_tokenizer())


def trace_of(model: TransformerBridge, response: str = RESPONSE) -> Trace:
    return Trace.from_text("How many?", response, model, segmentation=Segmentation(format="think"))


def relative(values: Tensor, expected: Tensor) -> float:
    return float((values - expected).norm() / expected.norm())


@pytest.mark.slow
def test_attention_is_wide(wide: TransformerBridge) -> None:
    assert preset_format(wide) == FAMILIES[family(wide.cfg.model_name)]
    assert wide.cfg.n_heads * wide.cfg.d_head >= 3584
    assert wide.cfg.n_key_value_heads < wide.cfg.n_heads


@pytest.mark.slow
def test_saliency_is_exact_and_streamed_the_same(wide: TransformerBridge) -> None:
    trace = trace_of(wide, " One. Two </think> Two.")
    token_map = brute_force.token_saliency(wide, trace.tokens, "token")
    expected = torch.stack([brute_force.pool(m, trace.step_ids, len(trace.steps), "density") for m in token_map])
    assert (expected > 0).any(-1).all()
    for engine in ("pattern", "streamed"):
        got = stepsal.step_saliency(wide, trace, engine=engine).values
        assert relative(got, expected) <= 1e-4
    assert relative(stepsal.step_saliency(wide, trace, target="sequence").values, expected) > 1e-2


@pytest.mark.slow
def test_decoding_under_stepflow_is_reading_under_it(wide: TransformerBridge) -> None:
    trace, config = trace_of(wide), StepFlowConfig(oeb_layers="all", smi_layers="all", tau_max=0.4, alpha=0.5)
    plain = logits_of(wide, trace.tokens[None])
    with stepsal.stepflow(wide, config, segmentation=Segmentation(format="think")) as log:
        full = logits_of(wide, trace.tokens[None])
        step_by_step = decoded(wide, trace.tokens[None], trace.n_prompt)
    assert (full - plain).norm() / plain.norm() > 1e-3
    assert (step_by_step - full).norm() / full.norm() <= 1e-4
    assert log.oeb["fired"].sum() > 0
    assert (log.smi["injections"] > 0).all()
    assert torch.equal(logits_of(wide, trace.tokens[None]), plain)


@pytest.mark.slow
def test_bfloat16_stays_near(wide: TransformerBridge) -> None:
    """The last of the tests: it rounds the weights."""
    trace = trace_of(wide)
    wide.original_model.to(torch.bfloat16)
    got = {e: stepsal.step_saliency(wide, trace, engine=e).values for e in ("pattern", "streamed")}
    wide.original_model.to(torch.float32)
    expected = stepsal.step_saliency(wide, trace).values  # of the rounded weights
    assert relative(got["streamed"], expected) <= max(2e-2, 1.5 * relative(got["pattern"], expected))
