"""Write labelled tensors as one safetensors file with a JSON document in its header, and read them back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stepsal.storage import write_atomic

SUFFIX = ".safetensors"
"""How these files end; appended to a path that ends otherwise."""
_KEY = "stepsal"  # of the document in the header


def write(path: str | Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write one file, moved into place when complete: an interrupted write leaves the old file or none.

    Args:
        path: the file.
        document: labels, JSON-ready, with `format` and `version`.
        tensors: what they belong to.

    Returns:
        The path of the file.
    """
    # cloned, since safetensors refuses tensors that share memory (of one head, mean and map of the head are one)
    copies = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    data = safetensors.torch.save(copies, metadata={_KEY: to_json(document, "labels and metadata")})
    path = _with_suffix(path)
    write_atomic(path, data)
    return path


def read(path: str | Path, format: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write` has written; nothing is unpickled or executed.

    Args:
        path: the file; its suffix may be left out.
        format: what its document is to call itself.
        version: the format version that can be read.

    Returns:
        The document without format and version, and the tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is corrupt, foreign, or of another format version.
    """
    path, kind = _with_suffix(path), format.rpartition(".")[2]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {kind}.save writes it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); write it again") from error
    try:
        document = json.loads(header[_KEY])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} was not written by {kind}.save: it has no stepsal document") from error
    if not isinstance(document, dict) or document.pop("format", None) != format:
        raise ValueError(f"{path} does not hold a {kind}")
    own_version = document.pop("version", None)
    if own_version != version:
        older = isinstance(own_version, int) and own_version < version
        remedy = f"migrate it by `python scripts/migrate.py {path}`" if older else "use the stepsal that wrote it"
        raise ValueError(
            f"{path} has format version {own_version}, this stepsal reads {version}: {remedy}, or make it again"
        )
    return document, tensors


def to_json(value: object, name: str) -> str:
    """Write a value as JSON.

    Args:
        value: the value.
        name: what the caller calls it, for the error.

    Raises:
        ValueError: something in it has no form in JSON.

    Example:
        >>> to_json({"seed": 3}, "metadata")
        '{"seed": 3}'
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be written as JSON ({error}); use text, finite numbers, lists") from error


def _with_suffix(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
