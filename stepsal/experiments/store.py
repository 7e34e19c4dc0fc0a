"""Keep the work of `collect`, `evaluate` and `calibrate`: a folder of immutable parts with a manifest.

    folder/
      manifest.json         what was asked for: kind, version, model, task, parameters, versions of packages
      parts/<name>/         a part: files that never change, and
        part.json           their sizes and SHA-256, the parts that it replaces, and what its writer says about it

A part is written in a hidden folder beside its place, and moved there when it is complete and on the disk. So a part is
whole or not there, whatever happens.

Several processes may add parts at once, since each part has a name of its own; if two processes add the same name, the
first part counts. Parts are merged by adding one that names those it replaces: from then on only the new one counts,
and the others are deleted. A kill at any moment leaves all contents there exactly once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from stepsal.generation.decoding import with_stop_in_thinking
from stepsal.storage import (
    MANIFEST,
    alone_in,
    check_manifest,
    digest,
    package_versions,
    read_manifest,
    to_disk,
    write_atomic,
    write_manifest,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Packages whose versions stand in every manifest and part.
PACKAGES = ("stepsal", "torch", "transformer-lens", "transformers", "tokenizers", "math-verify", "reasoning-gym")
PARTS, DESCRIPTION = "parts", "part.json"
_REMEDY = "delete it, and run the same call again to make it anew"


@dataclass(frozen=True)
class StoredPart:
    """A part of a store: a folder whose files are as they were written.

    Attributes:
        folder: folder with its files.
        about: what its writer said about it when it was added.
        replaces: names of the parts that it takes the place of.
        files: size and SHA-256 of each file, by name.
        versions: versions of the packages that made it.
    """

    folder: Path
    about: Mapping[str, Any]
    replaces: tuple[str, ...] = ()
    files: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name that the part was added by."""
        return self.folder.name

    def damage(self) -> str | None:
        """Return the names of the files that are not as they were written; None if there are none."""
        if not self.files:
            return f"{DESCRIPTION} lists no files"
        damaged = [name for name, expected in self.files.items() if _measure(self.folder / name) != expected]
        return ", ".join(damaged) or None


@dataclass(frozen=True)
class Store:
    """A folder of immutable parts with a manifest.

    Attributes:
        folder: folder that holds it.
        manifest: parameters that it was begun with, and versions of packages.

    Example:
        >>> import tempfile
        >>> with stepsal.experiments.Store.opened(tempfile.mkdtemp(), "notes", 1, {"topic": "sums"}) as store:
        ...     with store.adding("first") as part:
        ...         _ = (part / "note.txt").write_text("2 + 2 = 4")
        >>> [(part.folder / "note.txt").read_text() for part in store.parts()]
        ['2 + 2 = 4']
    """

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path, kind: str, version: int) -> Store:
        """Return the store in a folder, to read from it or to add parts beside other processes.

        Args:
            folder: folder that holds it.
            kind: what it must hold, such as "population".
            version: format version that the caller reads.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the folder is of another kind or format version, or damaged; the message names the remedy.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder, f"stepsal.{kind.title()}", version))

    @classmethod
    @contextmanager
    def opened(cls, folder: str | Path, kind: str, version: int, parameters: Mapping[str, Any]) -> Iterator[Store]:
        """Hold a store for one run, which alone begins it, goes on with it, and cleans up after interrupted runs.

        Processes that the run starts add their parts through `load`.

        Args:
            folder: an empty or new folder, or one to go on with; created if missing.
            kind: what it holds, such as "population".
            version: format version that the caller writes.
            parameters: parameters of the run, JSON-ready. A store that has parts must have been begun with the same.

        Raises:
            ValueError: the folder is foreign, damaged, of another version, of other parameters, or locked by another
                process.
        """
        folder = Path(folder)
        document = {"format": f"stepsal.{kind.title()}", "version": version, **parameters}
        with alone_in(folder):
            empty = all(path.name.startswith(".") for path in folder.iterdir())  # dots: the lock, unfinished files
            manifest = None if empty else read_manifest(folder, document["format"], version)
            inner = [path.parent for path in folder.glob(f"[!.]*/{MANIFEST}")]  # as in a calibration
            if manifest is None or not any(map(_part_folders, [folder, *inner])):
                write_manifest(folder, document, package_versions(PACKAGES))
                (folder / PARTS).mkdir(exist_ok=True)
                to_disk(folder)
                manifest = read_manifest(folder, document["format"], version)
            manifest = _as_requested_now(manifest, document)
            check_manifest(folder, manifest, document)
            store = cls(folder, manifest)
            store._clean()
            yield store

    def names(self) -> list[str]:
        """Return the names of the parts that count, those that no other part replaces, without reading their files.

        Raises:
            ValueError: a part whose part.json is missing or damaged.
        """
        return [part.name for part in self._described()]

    def parts(self) -> list[StoredPart]:
        """Return the parts that count, by name, after checking that their files are as they were written.

        Raises:
            ValueError: a damaged part; the message names it and the remedy.
        """
        while True:
            parts = self._described()
            damages = [(part.folder, damage) for part in parts if (damage := part.damage())]
            if all(folder.exists() for folder, _ in damages):  # otherwise one was merged into another part meanwhile
                break
        for folder, damage in damages:
            raise ValueError(f"{folder} is damaged ({damage}); {_REMEDY}")
        return parts

    @contextmanager
    def adding(self, name: str, about: Mapping[str, Any] | None = None, replaces: Sequence[str] = ()) -> Iterator[Path]:
        """Yield a folder to write a part's files into, and put it in its place when the block ends without an error.

        Args:
            name: name of the part. If there is a part of that name already, it stays, and the new files are dropped.
            about: what there is to say about the part, JSON-ready.
            replaces: names of the parts that it takes the place of; they are deleted once it is in place.

        Raises:
            ValueError: a name that begins with a dot, or is no plain name of a folder.
        """
        if name.startswith(".") or Path(name).name != name:
            raise ValueError(f"name={name!r} must be a plain name of a folder that does not begin with a dot")
        place = self.folder / PARTS / name
        with _hidden_beside(place) as unfinished:
            unfinished.mkdir()
            yield unfinished
            seal(unfinished, about, replaces)
            try:
                os.rename(unfinished, place)
            except OSError:
                if not (place / DESCRIPTION).is_file():  # for another reason than that the name is taken
                    raise
            to_disk(place.parent)
        if (part := _described(place)) is not None:
            self._delete(part.replaces)

    def save(self, folder: str | Path) -> Path:
        """Copy the store, and the stores in its subfolders, to another folder, which appears when the copy is complete.

        Of the parts, those that count are copied, after a check of their files.

        Args:
            folder: an empty or new folder; created if missing.

        Returns:
            The folder.

        Raises:
            ValueError: the folder is not empty, or a part of this store is damaged.
        """
        target = Path(folder).absolute()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{folder} is not empty; save to another folder")
        unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            self._copy(unfinished)
            if target.exists():
                target.rmdir()
            os.rename(unfinished, target)
            to_disk(target.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return Path(folder)

    def _copy(self, target: Path) -> None:
        """Copy the files, parts and inner stores, and bring them to the disk."""
        (target / PARTS).mkdir(parents=True)
        for path in self.folder.glob("[!.]*"):
            if path.is_file():  # the manifest, and what its writer keeps beside it
                shutil.copyfile(path, target / path.name)
        for part in self.parts():
            shutil.copytree(part.folder, target / PARTS / part.name)
        for path in target.rglob("*"):
            to_disk(path)
        to_disk(target)
        for manifest in sorted(self.folder.glob(f"[!.]*/{MANIFEST}")):
            Store(manifest.parent, json.loads(manifest.read_text(encoding="utf-8")))._copy(
                target / manifest.parent.name
            )

    def _described(self) -> list[StoredPart]:
        """Return the parts that count, by name, without reading their files.

        Raises:
            ValueError: a part whose part.json is missing or damaged.
        """
        while True:
            parts = [_described(folder) for folder in _part_folders(self.folder)]
            present = [part for part in parts if part is not None]
            if len(present) == len(parts):  # otherwise one was merged into a part that may not be in this list
                break
        replaced = {name for part in present for name in part.replaces}
        return [part for part in present if part.name not in replaced]

    def _clean(self) -> None:
        """Remove what interrupted writers left, and parts that another one replaces."""
        for lock in {_lock_of(path) for path in (self.folder / PARTS).glob(".*.*")}:
            try:
                with filelock.FileLock(lock, timeout=0):
                    shutil.rmtree(lock.with_suffix(".part"), ignore_errors=True)
            except filelock.Timeout:  # its writer is at work
                continue
            lock.unlink(missing_ok=True)
        for unfinished in self.folder.glob(".*.part"):
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            else:
                unfinished.unlink(missing_ok=True)
        counting = set(self.names())
        self._delete(folder.name for folder in _part_folders(self.folder) if folder.name not in counting)

    def _delete(self, names: Iterable[str]) -> None:
        """Delete parts; each leaves its place in one move, after the parts that it replaces, which else would count."""
        for name in names:
            place = self.folder / PARTS / name
            if not place.is_dir() or (part := _described(place)) is None:
                continue
            self._delete(part.replaces)
            with _hidden_beside(place) as trash, suppress(FileNotFoundError):  # not there: another process was first
                os.rename(place, trash)


def seal(
    folder: Path,
    about: Mapping[str, Any] | None = None,
    replaces: Sequence[str] = (),
    versions: Mapping[str, str | None] | None = None,
) -> None:
    """Write part.json about the files in a folder, and return when all of it is on the disk.

    Args:
        folder: folder of the part; it holds files and no folders.
        about: what there is to say about the part, JSON-ready.
        replaces: names of the parts that it takes the place of.
        versions: versions of the packages that made the files; None takes those that are installed.
    """
    document = {
        "files": {path.name: _measure(path) for path in sorted(folder.iterdir())},
        "replaces": list(replaces),
        "about": dict(about or {}),
        "versions": package_versions(PACKAGES) if versions is None else dict(versions),
    }
    write_atomic(folder / DESCRIPTION, f"{json.dumps(document, indent=2, allow_nan=False)}\n".encode())
    for path in (*folder.iterdir(), folder):
        to_disk(path)


def identity_of(model: TransformerBridge) -> dict[str, Any]:
    """Return what identifies a model in a manifest, JSON-ready.

    Args:
        model: from `stepsal.load`.

    Returns:
        model_name, weights (a digest), dtype, n_layers, and chat_template (a digest).

    Example:
        >>> identity = stepsal.experiments.store.identity_of(stepsal.load("mini"))
        >>> identity["model_name"], identity["n_layers"]
        ('mini', 8)
    """
    template = str(getattr(model.tokenizer, "chat_template", None))
    return {
        "model_name": str(model.cfg.model_name),
        "weights": fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "n_layers": model.cfg.n_layers,
        "chat_template": digest(template.encode()),
    }


def fingerprint(model: TransformerBridge) -> str:
    """Return a digest of a model's weights: of the shape and up to 64 evenly spaced entries of each parameter.

    Args:
        model: from `stepsal.load`.

    Example:
        >>> len(stepsal.experiments.store.fingerprint(stepsal.load("mini")))
        16
    """
    state = hashlib.sha256()
    for name, parameter in sorted(model.original_model.named_parameters()):
        flat = parameter.detach().flatten()
        entries = flat[:: max(1, -(-len(flat) // 64))].float().cpu().numpy()
        state.update(f"{name}{tuple(parameter.shape)}".encode() + entries.tobytes())
    return state.hexdigest()[:16]


@contextmanager
def _hidden_beside(place: Path) -> Iterator[Path]:
    """Yield the path of a hidden folder beside the place of a part; what is there at the end of the block is deleted.

    It is held by a lock, which dies with its process. So `Store._clean` can tell the folder of a killed writer from one
    that is in use.
    """
    folder = place.with_name(f".{place.name}.{uuid.uuid4().hex}.part")
    folder.parent.mkdir(exist_ok=True)
    with filelock.FileLock(_lock_of(folder), timeout=0):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _lock_of(folder).unlink(missing_ok=True)


def _lock_of(hidden: Path) -> Path:
    return hidden.with_suffix(".lock")


def _part_folders(folder: Path) -> list[Path]:
    """Return the folders of all parts of a store, by name, also of those that others replace.

    A listing may miss a part that was added while it was made, and so lack both a merged part and those that it
    replaces. Therefore two listings in a row must agree. A folder that is gone by now stays in the list, so that its
    reader learns of it.
    """
    listed, previous = _listed(folder), None
    while listed != previous:
        listed, previous = _listed(folder), listed
    return sorted(path for path in listed if not path.is_file())


def _listed(folder: Path) -> set[Path]:
    return set((folder / PARTS).glob("[!.]*"))


def _described(folder: Path) -> StoredPart | None:
    """Return the part in a folder, without reading its files; None if the folder is gone.

    Raises:
        ValueError: its part.json is missing or damaged.
    """
    try:
        document = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return StoredPart(
            folder, document["about"], tuple(document["replaces"]), dict(document["files"]), document["versions"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not folder.exists():
            return None
        raise ValueError(f"{folder} is damaged ({' '.join(str(error).split())}); {_REMEDY}") from error


def _measure(path: Path) -> list[int | str] | None:
    """Return the size and SHA-256 of a file; None if there is no such file."""
    try:
        with path.open("rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except FileNotFoundError:
        return None


def _as_requested_now(manifest: dict[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with what its decoding did before that could be chosen, where the request names it."""
    decoding, requested = manifest.get("decoding"), document.get("decoding")
    if not isinstance(decoding, dict) or "stop_in_thinking" not in (requested or {}):
        return manifest
    return {**manifest, "decoding": with_stop_in_thinking(decoding)}
