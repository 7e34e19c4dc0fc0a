"""Files are whole or not there; folders are held by one process; manifests say what is wrong with a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stepsal import StepSaliency, Trace, storage


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    storage.write_atomic(path, b"old", durable=True)

    def fail(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"new"
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        storage.write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_durable_file_is_on_the_disk_before_it_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        storage, "to_disk", lambda path: synced.append((path.name.split(".")[-1], (tmp_path / "file").exists()))
    )
    storage.write_atomic(tmp_path / "file", b"data")
    assert synced == []
    (tmp_path / "file").unlink()
    storage.write_atomic(tmp_path / "file", b"data", durable=True)
    assert synced == [("part", False), (tmp_path.name.split(".")[-1], True)]


def test_a_folder_is_held_once(tmp_path: Path) -> None:
    with (
        storage.alone_in(tmp_path / "folder"),
        pytest.raises(ValueError, match=r"another process writes to .*folder; wait"),
        storage.alone_in(tmp_path / "folder"),
    ):
        pass
    with storage.alone_in(tmp_path / "folder"):
        pass


def test_digests_tell_contents_apart() -> None:
    assert storage.digest(b"a") == storage.digest(b"a") != storage.digest(b"b")
    assert len(storage.digest(b"")) == 16


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    storage.write_manifest(tmp_path, {"format": "stepsal.Notes", "version": 1, "seed": 3}, {"torch": "2.0"})
    manifest = storage.read_manifest(tmp_path, "stepsal.Notes", 1)
    assert manifest == {"format": "stepsal.Notes", "version": 1, "seed": 3, "versions": {"torch": "2.0"}}
    with pytest.raises(ValueError, match="JSON"):
        storage.write_manifest(tmp_path, {"seed": float("nan")}, {})
    assert storage.read_manifest(tmp_path, "stepsal.Notes", 1) == manifest


def test_parameters_are_compared_as_json_has_them(tmp_path: Path) -> None:
    manifest = json.loads(json.dumps({"stop": ["end"], "limits": {"a": 1, "b": None}}))
    storage.check_manifest(tmp_path, manifest, {"stop": ("end",), "limits": {"b": None, "a": 1.0}, "system": None})
    storage.check_manifest(tmp_path, manifest, {"limits": {"a": 1}})
    with pytest.raises(ValueError, match=r"limits\.b=None, not 2; use another folder"):
        storage.check_manifest(tmp_path, manifest, {"limits": {"a": 1, "b": 2}})
    with pytest.raises(ValueError, match=r"limits\.a=1, not None"):
        storage.check_manifest(tmp_path, manifest, {"limits": {}})


def test_a_calibration_without_a_manifest_is_told_how_to_migrate(tmp_path: Path) -> None:
    storage.write_manifest(_made(tmp_path / "search"), {"format": "stepsal.Evaluation", "version": 1}, {})
    with pytest.raises(ValueError, match=r"format version 1.*python scripts/migrate\.py"):
        storage.read_manifest(tmp_path, "stepsal.Calibration", 2)
    with pytest.raises(ValueError, match="no population"):
        storage.read_manifest(tmp_path, "stepsal.Population", 2)


def test_a_part_of_a_folder_is_told_the_whole(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    part = folder / "parts" / "000000"
    part.mkdir(parents=True)
    storage.write_manifest(folder, {"format": "stepsal.Population", "version": 2}, {})
    (part / "answers.parquet").write_text("x")
    for file in (folder / "manifest.json", part / "answers.parquet"):
        with pytest.raises(ValueError, match=f"{file} is a file, and a population is a folder .*: give {folder}$"):
            storage.read_manifest(file, "stepsal.Population", 2)
    with pytest.raises(ValueError, match=f"{part} is no population: it has no manifest.json; give {folder}$"):
        storage.read_manifest(part, "stepsal.Population", 2)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt is a file, and a population is a folder .*: give that folder"):
        storage.read_manifest(tmp_path / "notes.txt", "stepsal.Population", 2)
    (tmp_path / "manifest.json").write_text("{}")  # somebody else's
    with pytest.raises(ValueError, match=r"notes\.txt is a file, .*: give that folder"):
        storage.read_manifest(tmp_path / "notes.txt", "stepsal.Population", 2)


@pytest.mark.parametrize("kind", [Trace, StepSaliency])
def test_folders_and_files_of_others_are_no_tensors(kind: type, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"is a folder, and a {kind.__name__} is a file .* read by Population.load"):
        kind.load(tmp_path)
    (tmp_path / "answers.parquet").write_text("x")
    with pytest.raises(ValueError, match=f"answers.parquet holds no {kind.__name__}, whose files end in .safetensors"):
        kind.load(tmp_path / "answers.parquet")
    with pytest.raises(FileNotFoundError, match=f"maps.safetensors does not exist; {kind.__name__}.save writes it"):
        kind.load(tmp_path / "maps")


def test_versions_name_what_is_not_installed() -> None:
    versions = storage.package_versions(("torch", "no-such-package"))
    assert versions["no-such-package"] is None
    assert all(versions[name] for name in ("python", "torch"))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
