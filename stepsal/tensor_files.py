"""Results in one file: tensors in the safetensors format, everything else as a JSON document in its header."""

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


def save_tensors(
    path: str | Path, kind: str, version: int, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> Path:
    """Write tensors and a document as one file, which is moved into place when it is complete.

    Args:
        path: of the file; `.safetensors` is appended where it is missing.
        kind: name of the class that is written, such as "Trace".
        version: of the file's format.
        tensors: by name.
        document: JSON values by name.

    Returns:
        The path of the file.

    Raises:
        ValueError: the document cannot be written as JSON.
    """
    header = to_json({**document, "format": f"stepsal.{kind}", "version": version}, f"the {kind}")
    # cloned, since safetensors refuses tensors that share memory (of one head, mean and map of the head are one)
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    path = _with_suffix(path)
    write_atomic(path, safetensors.torch.save(copies, metadata={"stepsal": header}))
    return path


def load_tensors(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and document of a file that `save_tensors` wrote; nothing is unpickled or executed.

    Args:
        path: of the file, with or without `.safetensors`.
        kind: name of the class that the file is to hold.
        version: of the format that the caller reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path is a folder, or the file is corrupt, foreign, or of another format version.
    """
    requested, path = Path(path), _with_suffix(path)
    if not path.is_file():
        if requested.is_dir():
            raise ValueError(
                f"{requested} is a folder, and a {kind} is a file that ends in {SUFFIX}: give the file; folders are "
                "read by Population.load, Evaluation.load and Calibration.load of stepsal.experiments"
            )
        if requested.is_file():
            raise ValueError(f"{requested} holds no {kind}, whose files end in {SUFFIX}: {kind}.save writes them")
        raise FileNotFoundError(f"{path} does not exist; {kind}.save writes it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); write it again") from error
    try:
        document = json.loads(header["stepsal"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} was not written by {kind}.save: it has no stepsal document") from error
    if not isinstance(document, dict) or document.pop("format", None) != f"stepsal.{kind}":
        raise ValueError(f"{path} does not hold a {kind}; load it with the class that saved it")
    file_version = document.pop("version", None)
    if file_version != version:
        older = isinstance(file_version, int) and file_version < version
        remedy = f"migrate it by `python scripts/migrate.py {path}`" if older else "use the stepsal that wrote it"
        raise ValueError(
            f"{path} has format version {file_version}, this stepsal reads {version}: {remedy}, or make it again"
        )
    return tensors, document


def to_json(value: object, name: str) -> str:
    """Write a value as JSON.

    Args:
        value: the value.
        name: what the caller calls it, for the error.

    Raises:
        ValueError: something in it has no form in JSON.

    Example:
        >>> from stepsal.tensor_files import to_json
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
