"""What a model needs, told from its configuration, held against loaded models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

from stepsal.saliency import memory_needed
from stepsal.saliency.memory import least_bytes

MINI = Path(__file__).parents[2] / "data" / "mini"


def test_a_model_that_is_not_there_to_be_loaded(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(  # of R1-Distill-Qwen-7B
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    footprint = memory_needed(str(tmp_path), 8192, batch_size=2)
    assert footprint.weights == 2 * footprint.n_parameters == 2 * 7_615_616_512
    assert footprint.cache == 2 * 8192 * 28 * 2 * 4 * 128 * 2
    assert footprint.streamed < footprint.weights < footprint.patterns
    assert footprint.streamed < footprint.under_stepflow < 1.05 * footprint.streamed
    assert "7.62 billion in bfloat16" in str(footprint)


def test_needs_are_those_of_the_loaded_model(mini: TransformerBridge) -> None:
    footprint = memory_needed("mini", 2000, dtype=torch.float32)
    parameters = list(mini.original_model.parameters())
    assert footprint.weights == sum(p.numel() * 4 for p in parameters)
    assert (footprint.streamed, footprint.under_stepflow, footprint.patterns) == least_bytes(mini, 2000, 200)


def test_a_model_from_gguf(smollm2: TransformerBridge) -> None:
    assert memory_needed("smollm2").n_parameters == sum(p.numel() for p in smollm2.parameters())


def test_an_architecture_without_attention(tmp_path: Path) -> None:
    transformers.MambaConfig(num_hidden_layers=2, hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(MambaForCausalLM\) is not supported"):
        memory_needed(str(tmp_path))


def test_numbers_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="n_tokens=0"):
        memory_needed(str(MINI), 0)
