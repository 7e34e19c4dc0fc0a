"""Migrate results of format version 1 to version 2, in place: names change, values do not.

    python scripts/migrate.py data/population_mini data/evaluations/* maps.safetensors

Takes folders of populations, evaluations and calibrations, and files of StepSaliency. What is of version 2 already is
left as it is. A new folder is written beside the old one, checked, and swapped for it; after a kill at any moment, the
same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch

from stepsal.experiments.store import Store, StoredPart, seal
from stepsal.generation.decoding import Decoding
from stepsal.intervention.config import StepFlowConfig
from stepsal.layers import layer_ranges
from stepsal.storage import MANIFEST, alone_in, digest, to_disk, write_atomic, write_manifest
from stepsal.trace.segment import Segmentation

LAYERS = {
    "bottom-quarter": "shallow", "top-quarter": "deep", "bottom-half": "first-half", "top-half": "second-half",
}  # fmt: skip
REDUCE = {"mean": "density", "sum": "mass"}
N_LAYERS = {"mini": 8, "smollm2": 30}  # depths that manifests of evaluations did not have
ANSWER_COLUMNS = {"way": "variant", "answer_correct": "final_answer_correct", "answer": "final_answer"}
SEGMENTATION = ("format", "split", "min_chars")  # fields of StepFlow once
PART_OF_TASK = re.compile(r"(?P<task>.*), questions [\d.]+\.\.[\d.]+ by seed (?P<seed>-?\d+)", re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    """Migrate what the command line names, and return 1 if some of it could not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER_OR_FILE")
    parser.add_argument("--n-layers", type=int, help="depth of the model, for evaluations that do not say it")
    options = parser.parse_args(arguments)
    failed = False
    for path in options.paths:
        try:
            print(f"{path}: {migrate(path, options.n_layers)}")
        except (OSError, ValueError) as error:
            failed = True
            print(f"{path}: NOT migrated: {error}", file=sys.stderr)
    return int(failed)


def migrate(path: Path, n_layers: int | None = None) -> str:
    """Migrate a folder or file to version 2, and say what was done.

    Args:
        path: of a population, an evaluation or a calibration, or a file of StepSaliency.
        n_layers: depth of the model, for an evaluation of a model that `N_LAYERS` does not have.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is foreign, damaged, in use, or can't be told in version 2; it is left as it was.
    """
    # not beside the folder, which may be one of several in a glob, nor inside, as it is moved
    name = f"stepsal-migration-{digest(str(path.resolve()).encode())}.lock"
    with filelock.FileLock(Path(tempfile.gettempdir()) / name, timeout=600):  # one migration at a time
        return _migrate_alone(path, n_layers)


def _migrate_alone(path: Path, n_layers: int | None) -> str:
    """Migrate a folder or file that no other process migrates."""
    finish_interrupted(path)
    if path.is_file():
        return migrate_file(path)
    if not path.is_dir():
        raise FileNotFoundError("there is no such file or folder")
    kind, version = kind_of(path)
    if version == 2:
        return f"{kind} of version 2 already"
    build = {"population": build_population, "evaluation": build_evaluation, "calibration": build_calibration}[kind]
    with ExitStack() as locks:
        for folder in {path, *(manifest.parent for manifest in path.rglob(MANIFEST))}:
            locks.enter_context(alone_in(folder))
        try:
            return f"{kind} migrated: {swap(path, lambda new: build(path, new, n_layers))}"
        except (KeyError, TypeError) as error:
            raise ValueError(f"a {kind} that lacks what it should have ({type(error).__name__}: {error})") from error


def kind_of(folder: Path) -> tuple[str, int]:
    """Return kind and format version of a folder.

    Raises:
        ValueError: it is none that this script knows.
    """
    if not (folder / MANIFEST).is_file():
        if any((folder / name / MANIFEST).is_file() for name in ("profile", "search", "held_out")):
            return "calibration", 1  # which had no manifest of its own
        raise ValueError(f"it has no {MANIFEST}, so that it is no population, evaluation or calibration")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    kind, version = str(manifest.get("format")).removeprefix("stepsal.").lower(), manifest.get("version")
    if kind not in ("population", "evaluation", "calibration") or version not in (1, 2):
        raise ValueError(f"its {MANIFEST} has format={manifest.get('format')!r} and version={version!r}")
    return kind, version


# Swapping


def _beside(folder: Path, role: str) -> Path:
    return folder.absolute().with_name(f".{folder.name}.migration-{role}")


def swap(folder: Path, build: Callable[[Path], str]) -> str:
    """Build a new folder beside another, and put it in its place.

    Args:
        folder: the old folder.
        build: writes the new folder, checks it, and says what is in it.

    Returns:
        What `build` says.
    """
    unfinished, new, old = (_beside(folder, role) for role in ("unfinished", "new", "old"))
    unfinished.mkdir()
    try:
        contents = build(unfinished)
        for path in (*unfinished.rglob("*"), unfinished):
            to_disk(path)
        os.rename(unfinished, new)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    os.rename(folder, old)
    os.rename(new, folder)
    to_disk(folder.absolute().parent)
    shutil.rmtree(old)
    return contents


def finish_interrupted(folder: Path) -> None:
    """Bring a folder whose migration was killed to a state in which it is old or new, and nothing is beside it.

    Raises:
        ValueError: there are two folders of which neither is known to be the other migrated.
    """
    unfinished, new, old = (_beside(folder, role) for role in ("unfinished", "new", "old"))
    if unfinished.exists():
        shutil.rmtree(unfinished)
    if new.exists():
        if folder.exists():  # killed before the old folder was moved
            shutil.rmtree(new)
        else:
            os.rename(new, folder)
    if old.exists():
        if not folder.exists() or kind_of(folder)[1] != 2:
            raise ValueError(f"{old} is the folder of version 1 of a migration that was killed; move it back by hand")
        shutil.rmtree(old)


# Folders


def build_population(source: Path, target: Path, n_layers: int | None) -> str:
    """Write the population of version 2, and say what is in it."""
    manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    segmentation = segmentation_of(manifest["segmentation"])
    layers = manifest["saliency"].get("layers")
    parameters = {
        "format": "stepsal.Population",
        "version": 2,
        **shared_parameters(manifest, n_layers),
        "stepflow": None if manifest["stepflow"] is None else stepflow_of(manifest["stepflow"], segmentation),
        "saliency": {
            "target": manifest["saliency"]["target"],
            "reduce": REDUCE[manifest["saliency"]["reduce"]],
            "layers": "all" if layers is None else layers,
        },
        "segmentation": segmentation.to_dict(),
    }
    write_manifest(target, parameters, manifest["versions"])
    parts = sorted((path for path in (source / "parts").glob("*") if path.name.isdigit()), key=lambda p: int(p.name))
    (target / "parts").mkdir()
    n_traces = 0
    for part in parts:
        document = json.loads((part / "part.json").read_text(encoding="utf-8"))
        if damage := StoredPart(part, {}, (), document["files"]).damage():
            raise ValueError(f"{part} is damaged ({damage}); delete it and all later parts first")
        new = target / "parts" / part.name
        new.mkdir()
        for name in document["files"]:
            shutil.copyfile(part / name, new / {"traces.parquet": "answers.parquet"}.get(name, name))
        seal(new, {"n": document["n"]}, versions=document["versions"])
        n_traces += document["n"]
    _check(target, "population", "answers.parquet", n_traces)
    return f"{n_traces} answers in {len(parts)} parts"


def build_evaluation(source: Path, target: Path, n_layers: int | None) -> str:
    """Write the evaluation of version 2, and say what is in it."""
    manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    parameters = {
        "format": "stepsal.Evaluation",
        "version": 2,
        **shared_parameters(manifest, n_layers),
        "segmentation": Segmentation().to_dict(),
    }
    write_manifest(target, parameters, manifest["versions"])
    (target / "parts").mkdir()
    tables = answer_tables(source)
    for name, table in tables.items():
        keys = [variant_of(way) for way in table["way"].to_pylist()]
        table = table.set_column(table.column_names.index("way"), "way", pa.array(keys, pa.string()))
        table = table.drop_columns([name for name in ("can_vote",) if name in table.column_names])
        table = table.rename_columns([ANSWER_COLUMNS.get(name, name) for name in table.column_names])
        part = target / "parts" / name
        part.mkdir()
        pq.write_table(table, part / "answers.parquet", compression="zstd")
        seal(part, {"n_answers": len(table)}, versions=manifest["versions"])
    n_answers = sum(map(len, tables.values()))
    _check(target, "evaluation", "answers.parquet", n_answers)
    return f"{n_answers} answers in {len(tables)} parts"


def build_calibration(source: Path, target: Path, n_layers: int | None) -> str:
    """Write the calibration of version 2 with its inner folders, and say what is in it."""
    contents, manifest = [], None
    for name, build in (("profile", build_population), ("search", build_evaluation), ("held_out", build_evaluation)):
        if not (source / name / MANIFEST).is_file():
            continue
        (target / name).mkdir()
        if kind_of(source / name)[1] == 2:
            shutil.copytree(source / name, target / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
            contents.append(f"{name} of version 2 already")
        else:
            contents.append(f"{name} of {build(source / name, target / name, n_layers)}")
        manifest = json.loads((target / name / MANIFEST).read_text(encoding="utf-8"))
    if manifest is None or (match := PART_OF_TASK.fullmatch(manifest["task"])) is None:
        raise ValueError("none of profile, search and held_out says what the task of the calibration is")
    copied = ("model_name", "weights", "dtype", "n_layers", "chat_template")
    parameters = {
        "format": "stepsal.Calibration",
        "version": 2,
        **{name: manifest[name] for name in copied},
        "task": match["task"],
        "seed": int(match["seed"]),
        **{name: manifest[name] for name in ("decoding", "system", "segmentation")},
    }
    write_manifest(target, parameters, manifest["versions"])
    n_settings, n_looks = _write_settings(source, target, manifest), _write_looks(source, target, manifest)
    Store.load(target, "calibration", 2).parts()
    return ", ".join([*contents, f"{n_settings} files of settings, {n_looks} looks"])


def _write_settings(source: Path, target: Path, manifest: Mapping[str, Any]) -> int:
    """Write the settings that were drawn, and return how many times that was."""
    (target / "parts").mkdir(exist_ok=True)
    paths = sorted(source.glob("settings_*.json"))
    for path in paths:
        settings = [
            {name: _layers(value) if name.endswith("_layers") else value for name, value in changes.items()}
            for changes in json.loads(path.read_text(encoding="utf-8"))
        ]
        part = target / "parts" / path.stem.replace("_", "-")
        part.mkdir()
        write_atomic(part / "settings.json", f"{json.dumps(settings, indent=1)}\n".encode())
        seal(part, versions=manifest["versions"])
    return len(paths)


def _write_looks(source: Path, target: Path, manifest: Mapping[str, Any]) -> int:
    """Write the comparisons on held-out problems, and return their number."""
    path = source / "looks.json"
    looks = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for setting, n_problems in looks:
        setting = setting_of(setting)
        part = target / "parts" / f"look-{digest(json.dumps([setting, n_problems]).encode())}"
        part.mkdir()
        look = json.dumps({"setting": setting, "n_problems": n_problems})
        write_atomic(part / "look.json", f"{look}\n".encode())
        seal(part, versions=manifest["versions"])
    return len(looks)


def setting_of(description: str) -> str:
    """Return the description of a setting in the words of version 2: bands by their new names, indices as ranges.

    Args:
        description: such as "OEB 3-3 at 0.15, SMI top-quarter at 0.06".
    """
    for old, new in LAYERS.items():
        description = description.replace(old, new)

    def as_ranges(match: re.Match[str]) -> str:
        ends = [tuple(map(int, run.split("-"))) for run in match[0].split(",")]
        return layer_ranges(layer for run in ends for layer in range(run[0], run[-1] + 1))

    return re.sub(r"(?<=OEB |SMI )\d[\d,-]*(?= at )", as_ranges, description)


def segmentation_of(old: Mapping[str, Any]) -> Segmentation:
    """Return the segmentation of a population of version 1, where a compiled expression stood as "re PATTERN FLAGS".

    Args:
        old: format, split and min_chars, those that were given.
    """
    expression = re.fullmatch(r"re (.*) (\d+)", str(old.get("split")), re.DOTALL)
    if expression is None:
        return Segmentation.from_dict(dict(old))
    rest = {name: value for name, value in old.items() if name != "split"}
    return replace(Segmentation.from_dict(rest), split=re.compile(expression[1], int(expression[2])))


def _check(folder: Path, kind: str, file: str, n_rows: int) -> None:
    """Read a new folder back, and refuse it if rows are missing."""
    parts = Store.load(folder, kind, 2).parts()
    if (n_read := sum(pq.read_metadata(part.folder / file).num_rows for part in parts)) != n_rows:
        raise ValueError(f"{n_read} of {n_rows} answers were written; nothing was changed")


# Files


def migrate_file(path: Path) -> str:
    """Migrate a file of StepSaliency, and say what was done.

    Raises:
        ValueError: it is no such file, or of an unknown version.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})["stepsal"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"it is no file of StepSaliency ({error})") from error
    kind, version = document.get("format"), document.get("version")
    if kind != "stepsal.StepSaliency" or version not in (1, 2):
        raise ValueError(f"it has format={kind!r} and version={version!r}, which this script does not know")
    if version == 2:
        return "step saliency of version 2 already"
    document["model_name"] = document.pop("model")
    document |= {"version": 2, "reduce": REDUCE[document["reduce"]]}
    metadata = document["metadata"]
    if stepflow := metadata.get("stepflow"):
        segmentation = Segmentation.from_dict({name: stepflow[name] for name in SEGMENTATION})
        metadata |= {"stepflow": stepflow_of(stepflow, segmentation), "segmentation": segmentation.to_dict()}
    write_atomic(path, safetensors.torch.save(tensors, metadata={"stepsal": json.dumps(document)}), durable=True)
    return f"step saliency migrated: {len(document['layers'])} maps of {len(document['roles'])} steps"


# Parameters


def shared_parameters(manifest: Mapping[str, Any], n_layers: int | None) -> dict[str, Any]:
    """Return model, task, seed and decoding in the words of version 2.

    Raises:
        ValueError: the depth of the model is not known.
    """
    name, decoding = manifest["model"], dict(manifest["decoding"])
    n_layers = manifest.get("n_layers", N_LAYERS.get(name, n_layers))
    if n_layers is None:
        raise ValueError(f"its {MANIFEST} does not say how many layers {name!r} has: pass --n-layers")
    system = decoding.pop("system")
    return {
        "model_name": name,
        "weights": manifest["weights"],
        "dtype": manifest["dtype"],
        "n_layers": n_layers,
        "chat_template": manifest["chat_template"],
        "task": manifest["task"],
        "seed": manifest["seed"],
        "decoding": Decoding.from_dict(decoding).to_dict(),
        "system": system,
    }


def stepflow_of(old: Mapping[str, Any], segmentation: Segmentation) -> dict[str, Any]:
    """Return the settings of StepFlow in the words of version 2.

    Args:
        old: the settings of version 1, which had the segmentation among them.
        segmentation: that of the traces.

    Raises:
        ValueError: StepFlow found steps in another way, which version 2 can't tell.
    """
    own = {name: old[name] for name in SEGMENTATION}
    if own != segmentation.to_dict():
        raise ValueError(
            f"StepFlow found its steps by {own}, but the traces have {segmentation.to_dict()}: version 2 has one "
            "segmentation for both; make the results again"
        )
    settings = {name: value for name, value in old.items() if name not in SEGMENTATION}
    return StepFlowConfig(
        **settings | {name: _layers(settings[name]) for name in ("oeb_layers", "smi_layers")}
    ).to_dict()


def variant_of(way: str) -> str:
    """Return the column `variant` for the column `way`: JSON of how an answer was written."""
    old = json.loads(way)
    how = {
        "stepflow": None if old["stepflow"] is None else stepflow_of(old["stepflow"], Segmentation()),
        "instruction": old["instruction"],
        "max_new_tokens": old["budget"],
        "budget_forcing": old["wait"],
    }
    if "edit" in old:
        how["edit"] = old["edit"]
    return json.dumps(how, sort_keys=True)


def _layers(old: Any) -> Any:
    """Return layers of StepFlow in the words of version 2; no layer was None once."""
    if old is None:
        return []
    return LAYERS.get(old, old) if isinstance(old, str) else old


def answer_tables(source: Path) -> dict[str, pa.Table]:
    """Return the answers of an evaluation of version 1 by file, without the files that were merged into another."""
    tables = {path.stem: pq.read_table(path) for path in sorted((source / "answers").glob("[!.]*.parquet"))}
    merged = {
        name.removesuffix(".parquet")
        for table in tables.values()
        for name in json.loads((table.schema.metadata or {}).get(b"stepsal.merged", b"[]"))
    }
    return {name: table.replace_schema_metadata(None) for name, table in tables.items() if name not in merged}


if __name__ == "__main__":
    sys.exit(main())
