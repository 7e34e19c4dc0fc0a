"""A longer context: the model that stepsal loads is that of transformers under the same configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import char_tokenizer, tiny_hf_model

import stepsal
from stepsal.bridge.context import extend_context

N_KNOWN = 128  # tokens that the tiny models take
ROPE = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64, "factor": 2.0}


def saved(folder: Path, architecture: str, **options: Any) -> str:
    tiny_hf_model(architecture, **options).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": N_KNOWN}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 6.0}),
        ({"rope_type": "dynamic", "factor": 1.0}, {"rope_type": "dynamic", "factor": 3.0}),
        (YARN, YARN | {"factor": 6.0}),
    ],
    ids=["default", "linear", "dynamic", "yarn"],
)
def test_longer_traces_are_read_as_transformers_reads_them(
    tmp_path: Path, rope: dict[str, Any], expected: dict[str, Any]
) -> None:
    folder, n_ctx = saved(tmp_path, "Llama", rope_parameters=ROPE | rope), 3 * N_KNOWN
    model = stepsal.load(folder, n_ctx=n_ctx)
    assert model.cfg.n_ctx == n_ctx
    config = transformers.AutoConfig.from_pretrained(folder)
    config.rope_parameters = ROPE | expected  # written out by hand, not by `extend_context`
    if expected["rope_type"] != "dynamic":
        config.max_position_embeddings = n_ctx
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    for n_tokens in (20, 300):
        tokens = torch.arange(n_tokens)[None] % 150
        with torch.no_grad():
            logits, expected_logits = model(tokens), reference(tokens).logits
        assert (logits - expected_logits).norm() <= 1e-4 * expected_logits.norm()
    thinking = "Anna is one. " * 20
    trace = stepsal.Trace.from_text("Who?", f"{thinking}</think>One.", model)
    assert N_KNOWN < len(trace) <= n_ctx
    maps = [stepsal.step_saliency(model, trace, engine=engine).values for engine in ("pattern", "streamed")]
    torch.testing.assert_close(*maps, rtol=1e-3, atol=1e-6)


def test_dynamic_scaling_changes_nothing_in_short_texts(tmp_path: Path) -> None:
    folder = saved(tmp_path, "Llama", rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0})
    tokens = torch.arange(N_KNOWN)[None]
    with torch.no_grad():
        logits = [stepsal.load(folder, n_ctx=n_ctx)(tokens) for n_ctx in (None, 1000)]
    assert torch.equal(*logits)


def test_the_embedded_reasoner_takes_what_its_error_says() -> None:
    model = stepsal.load("mini")
    response = " Anna needs nothing." * 400 + "</think> The answer is Anna = 7."
    with pytest.raises(ValueError, match=r"stepsal.load\(..., n_ctx=(\d+)\)") as error:
        stepsal.Trace.from_text("Anna is 3 plus 4. What is Anna?", response, model)
    n_ctx = int(str(error.value).rpartition("n_ctx=")[2].rstrip(")"))
    assert (
        len(stepsal.Trace.from_text("Anna is 3 plus 4. What is Anna?", response, stepsal.load("mini", n_ctx=n_ctx)))
        == n_ctx
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.GPT2Config(), "gpt2 model has no rotary position embeddings"),
        (transformers.OPTConfig(), "opt model has no rotary position embeddings"),
        (transformers.Gemma3TextConfig(), r"in a way of its own, per layer \(.*full_attention"),
        (transformers.LlamaConfig(rope_parameters=ROPE | {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512}), "in a way of its own, llama3; only default, linear"),
        (transformers.LlamaConfig(max_position_embeddings=10**6), "no longer than the model's own context of 1000000"),
    ],
    ids=["learned positions", "positions of OPT", "per layer", "llama3", "no longer"],
)  # fmt: skip
def test_what_can_not_be_extended_is_refused(config: transformers.PretrainedConfig, message: str) -> None:
    before = config.to_dict()
    with pytest.raises(ValueError, match=message):
        extend_context(config, 10**6)
    assert config.to_dict() == before


def test_a_ready_model_keeps_its_context() -> None:
    with pytest.raises(ValueError, match="n_ctx=500 changes what is loaded"):
        stepsal.load("mine", hf_model=tiny_hf_model("Llama"), n_ctx=500)
