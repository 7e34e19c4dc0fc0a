"""Keep files and folders whole: atomic writes, locks, digests, manifests, and the versions of packages.

A manifest is the file manifest.json in a folder of results. It says what the folder holds and with which parameters and
packages that was made.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock

MANIFEST = "manifest.json"
PACKAGES = ("stepsal", "torch", "transformer-lens", "transformers", "matplotlib")


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file so that it is complete or not there; parent folders are made.

    Args:
        path: the file; one that is there is replaced.
        data: its contents.
        durable: return only when the file is on the disk, so that it survives a power cut.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "results" / "answer.txt"
        >>> stepsal.storage.write_atomic(path, b"42")
        >>> path.read_text()
        '42'
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
    """Wait until a file, or the list of files of a folder, is on the disk.

    Args:
        path: the file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder while the block runs; a killed process loses its hold.

    Args:
        folder: made if it is not there.

    Raises:
        ValueError: another process holds the folder.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with stepsal.storage.alone_in(folder):
        ...     stepsal.storage.write_atomic(folder / "answer.txt", b"42")
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise ValueError(f"another process writes to {folder}; wait for it, or choose another folder") from error


def digest(data: bytes) -> str:
    """Return sixteen hexadecimal digits that tell contents apart.

    Args:
        data: the contents.

    Example:
        >>> stepsal.storage.digest(b"What is a + b?")
        '18d13ddb914fdaba'
    """
    return hashlib.sha256(data).hexdigest()[:16]


def write_manifest(folder: Path, parameters: Mapping[str, Any], versions: Mapping[str, str | None]) -> None:
    """Write the manifest of a folder, and return when it is on the disk.

    Args:
        folder: the folder; it must be there.
        parameters: what the folder holds, JSON-ready, with its "format" and "version".
        versions: versions of the packages that its contents are made with.
    """
    document = {**parameters, "versions": versions}
    write_atomic(folder / MANIFEST, f"{json.dumps(document, indent=2, allow_nan=False)}\n".encode())
    for path in (folder / MANIFEST, folder, folder.resolve().parent):
        to_disk(path)


def read_manifest(folder: Path, format: str, version: int) -> dict[str, Any]:
    """Return the manifest of a folder, after checking that the folder is of the expected kind.

    Args:
        folder: the folder.
        format: the expected kind, such as "stepsal.Population".
        version: the format version that the caller reads.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is foreign, damaged, or of another format version; the message names the remedy.
    """
    kind = format.removeprefix("stepsal.").lower()
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist; there is no {kind}")
        if not folder.is_dir():
            remedy = _whole_folder(folder) or "give that folder"
            raise ValueError(f"{folder} is a file, and a {kind} is a folder with a {MANIFEST}: {remedy}")
        inner = any((folder / name / MANIFEST).is_file() for name in ("profile", "search", "held_out"))
        if kind == "calibration" and inner:  # version 1 had no manifest of its own
            raise ValueError(_other_version(folder, 1, version))
        remedy = _whole_folder(folder) or "choose another or an empty folder"
        raise ValueError(f"{folder} is no {kind}: it has no {MANIFEST}; {remedy}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); use a new folder") from error
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise ValueError(f"{folder} is no {kind}: its {MANIFEST} is of another kind; choose another or an empty folder")
    if manifest.get("version") != version:
        raise ValueError(_other_version(folder, manifest.get("version"), version))
    return manifest


def _whole_folder(part: Path) -> str | None:
    """Return as a remedy the folder of results that a file or a folder is a part of; None where it is of none."""
    for folder in part.absolute().parents[:3]:
        path = folder / MANIFEST
        if path.is_file() and '"stepsal.' in path.read_text(encoding="utf-8", errors="replace"):
            return f"give {folder}"
    return None


def _other_version(folder: Path, version: object, readable: int) -> str:
    return (
        f"{folder} has format version {version}, this stepsal reads {readable}: migrate it by "
        f"`python scripts/migrate.py {folder}`, or make it again"
    )


def check_manifest(folder: Path, manifest: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse to add results to a folder that was made with other parameters.

    Args:
        folder: the folder, for the message.
        manifest: of the folder.
        parameters: of the results, JSON-ready; what the manifest has beside them is not compared.

    Raises:
        ValueError: a parameter differs; the message names the first that does.
    """
    requested = json.loads(json.dumps(dict(parameters)))  # tuples become lists, as they are in the manifest
    for name, value in requested.items():
        # a manifest that was written before there was such a parameter was made without one
        before = manifest.get(name, {} if isinstance(value, dict) else None)
        if (difference := _first_difference(name, before, value)) is not None:
            path, before, after = difference
            raise ValueError(
                f"{folder} was made with {path}={before!r}, not {after!r}; use another folder, or the parameters of "
                f"its {MANIFEST}"
            )


def _first_difference(path: str, before: object, after: object) -> tuple[str, object, object] | None:
    """Return the dotted name of the first value that differs, and both values; None where nothing differs."""
    if before == after:
        return None
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*after, *(name for name in before if name not in after)]:
            if difference := _first_difference(f"{path}.{name}", before.get(name), after.get(name)):
                return difference
        return None  # they differ only in a None that one of them leaves out
    return path, before, after


def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return the versions of Python and of packages that a result depends on; None for packages not installed.

    Args:
        packages: names of the packages, as pip knows them.

    Example:
        >>> sorted(stepsal.storage.package_versions(("torch", "no-such-package")))
        ['no-such-package', 'python', 'torch']
    """
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
