"""Greedy answers are those of `generate` of transformers, on an unwrapped copy of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import ALL_ARCHITECTURES, char_tokenizer, tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.bridge.smollm2 import smollm2_folder
from stepsal.generation.loop import Prompt, write
from stepsal.tasks.chain import EXAMPLE
from stepsal.trace import render_prompt

MINI = Path(__file__).parents[2] / "data" / "mini"
N_NEW = 16
REFUSED = {"CodeGen", "DeepseekV3", "GPTJ", "GPTNeo", "HunYuanDenseV1", "Mamba", "OPT"}  # by `stepsal.load`
LENGTHS = (5, 14, 3, 9)


def by_transformers(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """Return the new tokens of each prompt, written in one batch that is padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = model.generate(
        ids, attention_mask=mask, max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False, eos_token_id=None
    )
    return rows[:, width:].tolist()


def by_stepsal(model: TransformerBridge, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return the new tokens of each prompt, written two at a time, so that rows are refilled."""
    monkeypatch.setattr("stepsal.generation.loop.end_tokens", lambda model: frozenset())
    answers = write(model, [Prompt(ids, 0, N_NEW) for ids in prompts], 2, decoding=stepsal.Decoding())
    return [answer.tokens for answer in sorted(answers, key=lambda answer: answer.number)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL_ARCHITECTURES if name not in REFUSED])
def test_on_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in LENGTHS]
    model = stepsal.load(f"like-{name}", hf_model=tiny_hf_model(name), tokenizer=char_tokenizer())
    assert by_stepsal(model, prompts, monkeypatch) == by_transformers(tiny_hf_model(name), prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini", "smollm2"])
def test_on_models_that_are_trained(name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    model: TransformerBridge = request.getfixturevalue(name)
    unwrapped = transformers.AutoModelForCausalLM.from_pretrained(MINI if name == "mini" else smollm2_folder())
    questions = [EXAMPLE, "Anna is 3 plus 4. What is Anna?", EXAMPLE.replace("4", "5")]
    texts = [render_prompt(model.tokenizer, question).text for question in questions]
    prompts: list[list[int]] = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert by_stepsal(model, prompts, monkeypatch) == by_transformers(unwrapped, prompts)
