"""Files and folders that are whole or not there, whatever happens while they are written; versions of packages."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file that is either complete or not there; parent folders are made.

    Args:
        durable: come back only when it is on the disk, so that also a power cut can't take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # same folder: os.replace must not cross devices
    try:
        part.write_bytes(data)
        if durable:
            to_disk(part)
        os.replace(part, path)
        if durable:
            to_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder, which is made; a killed process lets go of it.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise ValueError(f"another process writes to {folder}; wait for it, or choose another folder") from error


def digest(data: bytes) -> str:
    """Sixteen hexadecimal digits that tell contents apart."""
    return hashlib.sha256(data).hexdigest()[:16]


def write_manifest(folder: Path, parameters: Mapping[str, Any], versions: Mapping[str, str | None]) -> None:
    """Write manifest.json of what a folder is to hold, and bring it to the disk."""
    document = {**parameters, "versions": versions}
    write_atomic(folder / "manifest.json", f"{json.dumps(document, indent=2, allow_nan=False)}\n".encode())
    for path in (folder / "manifest.json", folder, folder.resolve().parent):
        to_disk(path)


def read_manifest(folder: Path, format: str, version: int) -> dict[str, Any]:
    """What a folder says that it holds.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is foreign, of another format version, or damaged; says what to do.
    """
    what = format.removeprefix("stepsal.").lower()
    if not (folder / "manifest.json").is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; there is no {what}")
        raise ValueError(f"{folder} is no {what}: it has no manifest.json; choose another or an empty folder")
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'manifest.json'} is damaged ({error}); use a new folder") from error
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise ValueError(f"{folder} is no {what}: its manifest.json is of another kind")
    if manifest.get("version") != version:
        raise ValueError(
            f"{folder} has format version {manifest.get('version')}, this stepsal reads {version}: migrate it by "
            f"`python scripts/migrate.py {folder}`, or make it again"
        )
    return manifest


def check_manifest(folder: Path, manifest: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse to add to a folder what is of other parameters.

    Raises:
        ValueError: naming the first difference.
    """
    for name, here in json.loads(json.dumps(parameters)).items():
        if manifest.get(name) != here:
            raise ValueError(
                f"{folder} was made with {name}={manifest.get(name)!r}, not {here!r}; use another folder, or the "
                "parameters of its manifest.json"
            )


PACKAGES = ("stepsal", "torch", "transformer-lens", "transformers", "matplotlib")


def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Versions of Python and of the packages a result depends on; None for those not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
