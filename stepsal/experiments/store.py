"""A folder of immutable parts with a manifest: what `collect`, `evaluate` and `calibrate` keep their work in.

    folder/
      manifest.json         what was asked for: kind, version, model, task, parameters, versions of packages
      parts/<name>/         a part: files that never change, and
        part.json           their sizes and SHA-256, which parts they replace, what else is to be known of them

A part is written beside its place and moved there when it is complete and on the disk, so that there are whole parts and
nothing else, whatever happens. Several processes may add parts at once, since each has a name of its own; of two that add
the same name the first counts. Several parts become one by a part that names those it replaces: a kill at any moment leaves
everything there once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepsal.storage import (
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


@dataclass(frozen=True)
class StoredPart:
    """A part of a store: a folder whose files are as they were written.

    Attributes:
        folder: where its files are.
        about: what is to be known of it, as given when it was added.
        replaces: names of the parts whose contents it holds.
    """

    folder: Path
    about: Mapping[str, Any]
    replaces: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name that the part was added by."""
        return self.folder.name


@dataclass(frozen=True)
class Store:
    """A folder of immutable parts; see the module docstring.

    Attributes:
        folder: where it lies.
        manifest: what it is to hold.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path, kind: str, version: int) -> Store:
        """Open a store to read from.

        Args:
            folder: where it lies.
            kind: what it must hold, such as "population".
            version: of the format that the caller reads.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it is of another kind, of another format version (says how to migrate it), or damaged.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder, f"stepsal.{kind.title()}", version))

    @classmethod
    @contextmanager
    def opened(cls, folder: str | Path, kind: str, version: int, parameters: Mapping[str, Any]) -> Iterator[Store]:
        """Keep a store open to add to, alone among runs; begin it if it holds nothing yet.

        What an interrupted run left unfinished is removed.

        Args:
            folder: made if it is not there.
            kind, version: as for `load`.
            parameters: JSON-ready; those of a store that was begun before must be the same.

        Raises:
            ValueError: it is foreign, damaged, of other parameters, or in the hands of another run.
        """
        folder = Path(folder)
        document = {"format": f"stepsal.{kind.title()}", "version": version, **parameters}
        with alone_in(folder):
            begun = any(not path.name.startswith(".") for path in folder.iterdir())  # dots: the lock, leftovers
            manifest = read_manifest(folder, document["format"], version) if begun else None
            if manifest is None or not any(p.is_dir() for p in (folder / "parts").glob("[!.]*")):
                write_manifest(folder, document, package_versions(PACKAGES))
                (folder / "parts").mkdir(exist_ok=True)
                to_disk(folder)
                manifest = read_manifest(folder, document["format"], version)
            check_manifest(folder, manifest, document)
            store = cls(folder, manifest)
            store._sweep()
            yield store

    def names(self) -> list[str]:
        """List the parts that count, without looking into their files: those that no other part replaces."""
        return [part.name for part in self._described()]

    def parts(self) -> list[StoredPart]:
        """Return the parts that count, by name, after checking that their files are as they were written.

        Raises:
            ValueError: a part that is damaged, naming it and the remedy.
        """
        described = self._described()
        for part in described:
            files = json.loads((part.folder / "part.json").read_text())["files"]
            damaged = [name for name, expected in files.items() if _size_and_hash(part.folder / name) != expected]
            if damaged or not files:
                raise ValueError(f"{part.folder} is damaged ({', '.join(damaged) or 'no files'}); {_REMEDY}")
        return described

    @contextmanager
    def adding(
        self, name: str, about: Mapping[str, Any] | None = None, replaces: Sequence[str] = ()
    ) -> Iterator[Path]:
        """Give a folder to write a part's files into, and put it in its place when the block ends without an error.

        Args:
            name: of the part; where it is there already, what is there stays.
            about: what is to be known of it, JSON-ready.
            replaces: parts whose contents it holds; they are deleted once it is in its place.
        """
        parts = self.folder / "parts"
        unfinished = parts / f".{name}.{uuid.uuid4().hex}.part"
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            files = {path.name: _size_and_hash(path) for path in sorted(unfinished.iterdir())}
            document = {"files": files, "replaces": list(replaces), "about": dict(about or {})}
            document["versions"] = package_versions(PACKAGES)
            write_atomic(unfinished / "part.json", f"{json.dumps(document, indent=2, allow_nan=False)}\n".encode())
            for path in (*unfinished.iterdir(), unfinished):
                to_disk(path)
            try:
                os.rename(unfinished, parts / name)
            except OSError:
                if not (parts / name / "part.json").is_file():  # not that somebody else was first
                    raise
            to_disk(parts)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._delete(replaces)

    def _described(self) -> list[StoredPart]:
        """Return the parts that count, by name.

        Raises:
            ValueError: a part whose part.json is missing or damaged.
        """
        found = []
        for folder in sorted((self.folder / "parts").glob("[!.]*")):
            try:
                document = json.loads((folder / "part.json").read_text())
                found.append(StoredPart(folder, document["about"], tuple(document["replaces"])))
            except (OSError, ValueError, KeyError, TypeError) as error:
                if not folder.exists():  # replaced by another while we read
                    continue
                raise ValueError(f"{folder} is damaged ({' '.join(str(error).split())}); {_REMEDY}") from error
        replaced = {name for part in found for name in part.replaces}
        return [part for part in found if part.name not in replaced]

    def _sweep(self) -> None:
        """Remove what an interrupted run began to write, and parts that another one replaces."""
        for unfinished in (self.folder / "parts").glob(".*.part"):
            shutil.rmtree(unfinished)
        for unfinished in self.folder.glob(".*.part"):
            unfinished.unlink()
        counting = set(self.names())
        self._delete([p.name for p in (self.folder / "parts").glob("[!.]*") if p.name not in counting])

    def _delete(self, names: Sequence[str]) -> None:
        """Delete parts; each leaves its place first, so that none is ever there in half."""
        for name in names:
            gone = self.folder / "parts" / f".{name}.{uuid.uuid4().hex}.part"
            if (self.folder / "parts" / name).is_dir():
                os.rename(self.folder / "parts" / name, gone)
                shutil.rmtree(gone)


def identity_of(model: TransformerBridge) -> dict[str, Any]:
    """Return what tells a model from others, JSON-ready, for manifests: name, weights, dtype, depth, chat template."""
    template = str(getattr(model.tokenizer, "chat_template", None))
    return {
        "model_name": str(model.cfg.model_name),
        "weights": fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "n_layers": model.cfg.n_layers,
        "chat_template": digest(template.encode()),
    }


def fingerprint(model: TransformerBridge) -> str:
    """Return a digest of a model's weights: of the shape and up to 64 evenly spaced entries of each parameter."""
    state = hashlib.sha256()
    for name, parameter in sorted(model.original_model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, -(-len(flat) // 64))].float().cpu().numpy()
        state.update(f"{name}{tuple(parameter.shape)}".encode() + some.tobytes())
    return state.hexdigest()[:16]


def _size_and_hash(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


_REMEDY = "delete it, and run the same call again to make it anew"
