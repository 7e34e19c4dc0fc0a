"""Results of format version 1 become those of version 2: names change, values do not, and a kill does no harm.

tests/records/version_1 was written by stepsal before version 2: a population of four traces under StepFlow, the planted
calibration of data/, and step maps of one trace under StepFlow.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import migrate
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch

import stepsal
from stepsal import StepFlowConfig, Variant
from stepsal.experiments.population import Population
from stepsal.experiments.results import Evaluation
from stepsal.experiments.store import Store
from stepsal.maps import StepSaliency

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "tests" / "records" / "version_1"
KINDS = {"population": "population", "calibration/search": "evaluation", "calibration": "calibration"}

# Migrates a copy of a folder in a forked process that is killed before its k-th change of files, for k = 1, 1 + stride,
# ... until it comes to its end, and tells the last k.
KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import migrate
os.fsync = lambda descriptor: None  # it takes long, and a killed process does not need it
migrate.to_disk = lambda path: None
source, work, stride = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def child(folder, k):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in CHANGES or (event == "open" and arguments[2] & WRITING):
            count += 1
            if count == k:
                os.kill(os.getpid(), 9)
    sys.addaudithook(hook)
    migrate.migrate(folder)
    os._exit(0)

import shutil
status, k = None, 1 - stride
while status != 0:
    k += stride
    folder = work / str(k) / "results"
    shutil.copytree(source, folder)
    pid = os.fork()
    if pid == 0:
        child(folder, k)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, 9), status
print(k)
"""


def record(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDS / name, tmp_path / "results"))


def contents(folder: Path) -> dict[str, bytes]:
    """Read the files of a folder, but not those that say when or by what they were written."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", KINDS)
def test_version_1_is_refused_with_the_command_that_migrates_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(name, tmp_path)
    with pytest.raises(ValueError, match=rf"format version 1.*`python scripts/migrate\.py {folder}`"):
        Store.load(folder, KINDS[name], 2)
    for report in ("migrated: ", "of version 2 already"):
        assert migrate.main([str(folder)]) == 0
        assert capsys.readouterr().out.startswith(f"{folder}: {KINDS[name]} {report}")
    assert Store.load(folder, KINDS[name], 2).manifest["version"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.slow
def test_the_command_runs_from_anywhere(tmp_path: Path) -> None:
    folder = record("population", tmp_path)
    command = [sys.executable, str(ROOT / "scripts" / "migrate.py"), "results", "nowhere"]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert completed.returncode == 1
    assert completed.stdout == "results: population migrated: 4 answers in 1 parts\n"
    assert completed.stderr == "nowhere: NOT migrated: there is no such file or folder\n"
    assert len(Population.load(folder)) == 4


def test_a_population_keeps_its_traces_maps_and_metrics(tmp_path: Path) -> None:
    folder = record("population", tmp_path)
    old_part, new_part = RECORDS / "population" / "parts" / "000000", folder / "parts" / "000000"
    assert migrate.migrate(folder) == "population migrated: 4 answers in 1 parts"
    for old, new in {"traces": "answers", "metrics": "metrics"}.items():
        assert (old_part / f"{old}.parquet").read_bytes() == (new_part / f"{new}.parquet").read_bytes()
    before, after = (safetensors.torch.load_file(part / "maps.safetensors") for part in (old_part, new_part))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    population = Population.load(folder)
    assert len(population) == 4
    assert population.manifest["stepflow"] == StepFlowConfig().to_dict()
    assert population.manifest["saliency"] == {"target": "token", "reduce": "mass", "layers": "deep"}
    assert population.manifest["decoding"] == stepsal.Decoding(max_new_tokens=120, temperature=0.7).to_dict()
    assert population.manifest["system"] == "Be brief."
    assert (
        population.manifest["versions"]
        == json.loads((RECORDS / "population" / "manifest.json").read_text())["versions"]
    )
    saliency, trace = population.saliency(3), population.trace(3)
    assert (saliency.model_name, saliency.reduce, saliency.layers) == ("mini", "mass", (6, 7))
    assert trace.segmentation == stepsal.Segmentation(format="think")
    assert saliency.step_lengths == tuple(step.end - step.start for step in trace.steps)


def test_a_migrated_population_is_the_one_that_collect_goes_on_with(tmp_path: Path) -> None:
    folder = record("population", tmp_path)
    migrate.migrate(folder)
    population = stepsal.collect(
        stepsal.load("mini"), stepsal.tasks.chain.ChainTask(length=(1, 3), distractors=2), 5, folder, seed=7,
        decoding=stepsal.Decoding(max_new_tokens=120, temperature=0.7), system="Be brief.", stepflow=StepFlowConfig(),
        layers="deep", reduce="mass", progress=False,
    )  # fmt: skip
    assert len(population) == 5
    assert population.answers["seed"].tolist() == [7, 8, 9, 10, 11]


def test_an_evaluation_keeps_its_answers(tmp_path: Path) -> None:
    folder = record("calibration/search", tmp_path)
    (old_file,) = (RECORDS / "calibration" / "search" / "answers").glob("*.parquet")
    assert migrate.migrate(folder) == "evaluation migrated: 193 answers in 1 parts"
    before, after = (
        pq.read_table(path).to_pandas() for path in (old_file, folder / "parts" / old_file.stem / "answers.parquet")
    )
    renamed = before.rename(columns={"answer": "final_answer", "answer_correct": "final_answer_correct"})
    pd.testing.assert_frame_equal(renamed.drop(columns="way"), after.drop(columns="variant"))
    baseline = Variant("baseline")
    paper = Variant("paper", stepflow=StepFlowConfig())
    off = Variant("OEB", stepflow=StepFlowConfig(oeb_layers=(1, 2), tau_max=0.5, smi_layers=()))
    evaluation = Evaluation.load(folder, variants=[baseline, paper, off], n_problems=47, n_samples=1)
    for variant, way in ((baseline, '"stepflow": null'), (paper, "bottom-quarter"), (off, '"oeb_layers": [1, 2]')):
        rows = before[before["way"].str.contains(way, regex=False) & before["problem"].lt(47)]
        if variant is off:
            rows = rows[rows["way"].str.contains('"tau_max": 0.5')]
        rows = rows.sort_values("problem")
        assert evaluation.answers_of(variant.name)["response"].tolist() == rows["response"].tolist()
    assert (
        evaluation.verdicts("paper").mean()
        == before.loc[before["way"].str.contains("bottom-quarter"), "correct"].mean()
    )
    manifest = Store.load(folder, "evaluation", 2).manifest
    assert (manifest["model_name"], manifest["n_layers"]) == ("mini", 8)
    assert manifest["decoding"] == stepsal.Decoding(max_new_tokens=50).to_dict()
    assert manifest["segmentation"] == stepsal.Segmentation().to_dict()


def test_answers_of_an_interrupted_run_are_there_once(tmp_path: Path) -> None:
    folder = record("calibration/search", tmp_path)
    (whole,) = (folder / "answers").glob("*.parquet")
    table = pq.read_table(whole)
    pieces = {"a": table.slice(0, 50), "b": table.slice(50, 60), "c": table.slice(110), "merged": table.slice(0, 110)}
    merged = {b"stepsal.merged": json.dumps(["a.parquet", "b.parquet"]).encode()}
    whole.unlink()
    for name, piece in pieces.items():
        metadata = merged if name == "merged" else None
        piece = piece.append_column("can_vote", pa.array([True] * len(piece)))
        pq.write_table(piece.replace_schema_metadata(metadata), folder / "answers" / f"{name}.parquet")
    (folder / "answers" / ".half.parquet.0.part").write_bytes(b"half")
    assert migrate.migrate(folder) == "evaluation migrated: 193 answers in 2 parts"
    parts = Store.load(folder, "evaluation", 2).parts()
    assert [part.name for part in parts] == ["c", "merged"]
    tables = [pq.read_table(part.folder / "answers.parquet") for part in parts]
    assert pa.concat_tables(tables).sort_by("response")["response"].equals(table.sort_by("response")["response"])
    assert "can_vote" not in tables[0].column_names


LOOKS = {  # settings as version 1 described them -> as version 2 does
    "OEB 1-2 at 0.5": "OEB 1-2 at 0.5",
    "OEB bottom-quarter at 0.5": "OEB shallow at 0.5",
    "OEB 3-3 at 0.15, SMI 0,1,4 at 0.06": "OEB 3 at 0.15, SMI 0-1,4 at 0.06",
    "SMI (0.25, 0.5) at 0.5": "SMI (0.25, 0.5) at 0.5",
}


def test_a_compiled_expression_stays_one() -> None:
    old = {"split": f"re {chr(92)}n+ {re.compile('x', re.IGNORECASE).flags}"}  # as version 1 wrote it
    split = migrate.segmentation_of(old).split
    assert isinstance(split, re.Pattern)
    assert (split.pattern, bool(split.flags & re.IGNORECASE)) == (chr(92) + "n+", True)
    assert migrate.segmentation_of({"split": "re"}).split == "re"


def test_a_calibration_has_a_manifest_settings_and_looks(tmp_path: Path) -> None:
    folder = record("calibration", tmp_path)
    shutil.copytree(RECORDS / "population", folder / "profile")
    change(folder / "profile" / "manifest.json", task="chain answers, questions 0..0.125 by seed 950000")
    (folder / "settings_2.json").write_text(
        json.dumps([
            {"oeb_layers": None, "tau_max": 0.15, "smi_layers": "top-half", "alpha": 0.5},
            {"oeb_layers": [1, 2], "tau_max": 0.5, "smi_layers": None, "alpha": 0.06},
        ])
    )  # fmt: skip
    (folder / "looks.json").write_text(json.dumps([[setting, 100] for setting in LOOKS]))
    assert "4 looks" in migrate.migrate(folder)
    store = Store.load(folder, "calibration", 2)
    search = Store.load(folder / "search", "evaluation", 2).manifest
    assert store.manifest["task"] == "chain answers as under OEB 1-2 at 0.5"
    assert store.manifest["seed"] == 950000
    assert all(store.manifest[name] == search[name] for name in ("model_name", "weights", "decoding", "versions"))
    parts = {part.name: part.folder for part in store.parts()}
    settings = json.loads((parts.pop("settings-2") / "settings.json").read_text())
    assert [StepFlowConfig(**changes) for changes in settings] == [
        StepFlowConfig(oeb_layers=(), smi_layers="second-half", alpha=0.5),
        StepFlowConfig(oeb_layers=(1, 2), tau_max=0.5, smi_layers=()),
    ]
    looks = {name: json.loads((part / "look.json").read_text()) for name, part in parts.items()}
    assert {look["setting"] for look in looks.values()} == set(LOOKS.values())
    for name, look in looks.items():
        content = json.dumps([look["setting"], look["n_problems"]])
        assert name == f"look-{stepsal.storage.digest(content.encode())}"
    assert len(Population.load(folder / "profile")) == 4
    assert len(Store.load(folder / "held_out", "evaluation", 2).parts()) == 1


def test_a_file_of_step_maps_keeps_its_maps(tmp_path: Path) -> None:
    path = Path(shutil.copy(RECORDS / "saliency.safetensors", tmp_path))
    before = safetensors.torch.load_file(path)
    with pytest.raises(ValueError, match="format version 1"):
        StepSaliency.load(path)
    assert migrate.migrate(path).startswith("step saliency migrated: 2 maps of")
    assert migrate.migrate(path) == "step saliency of version 2 already"
    saliency = StepSaliency.load(path)
    assert saliency.values.equal(before["values"])
    assert saliency.step_ids.equal(before["step_ids"])
    assert (saliency.model_name, saliency.reduce, saliency.layers) == ("mini", "mass", (0, 7))
    assert saliency.metadata["stepflow"] == StepFlowConfig().to_dict()
    assert saliency.metadata["segmentation"] == stepsal.Segmentation().to_dict()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize(("name", "stride"), [("population", 1), ("calibration", 3)])
def test_a_migration_that_is_killed_anywhere_goes_on(
    name: str, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    expected = record(name, tmp_path)
    migrate.migrate(expected)
    command = [sys.executable, "-c", KILLED, str(ROOT / "scripts"), str(RECORDS / name), str(tmp_path), str(stride)]
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    last = int(completed.stdout)
    assert last > 10
    for k in range(1, last + 1, stride):
        folder = tmp_path / str(k) / "results"
        assert migrate.migrate(folder).startswith(name)
        assert [path.name for path in folder.parent.iterdir()] == ["results"]
        assert contents(folder) == contents(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "how many layers 'other' has: pass --n-layers"),
        ({"format": "thesis"}, "format='thesis' and version=1"),
        ({"version": 3}, "version=3"),
        ({"decoding": {"temperature": -1.0, "system": None}}, "temperature=-1"),
        ({"decoding": None}, "lacks what it should have"),
    ],
)
def test_what_version_2_cannot_tell_is_left_as_it_was(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record("calibration/search", tmp_path)
    change(folder / "manifest.json", **changes)
    before = contents(folder)
    assert migrate.main([str(folder)]) == 1
    assert message in capsys.readouterr().err
    assert contents(folder) == before
    if "model" in changes:
        assert migrate.main([str(folder), "--n-layers", "4"]) == 0
        assert Store.load(folder, "evaluation", 2).manifest["n_layers"] == 4


def test_steps_of_stepflow_that_are_not_those_of_the_traces_are_refused(tmp_path: Path) -> None:
    folder = record("population", tmp_path)
    change(folder / "manifest.json", segmentation={"split": "paragraph"})
    with pytest.raises(ValueError, match="StepFlow found its steps by"):
        migrate.migrate(folder)
    change(folder / "manifest.json", segmentation={}, stepflow=None)
    change(folder / "manifest.json", segmentation={"min_chars": 20})
    migrate.migrate(folder)
    assert Population.load(folder).trace(0).segmentation == stepsal.Segmentation(format="think", min_chars=20)


def test_damaged_foreign_and_busy_results_are_refused(tmp_path: Path) -> None:
    folder = record("population", tmp_path)
    with migrate.alone_in(folder), pytest.raises(ValueError, match="another process"):
        migrate.migrate(folder)
    maps = folder / "parts" / "000000" / "maps.safetensors"
    maps.write_bytes(maps.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"000000 is damaged \(maps\.safetensors\)"):
        migrate.migrate(folder)
    (tmp_path / "thesis").mkdir()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        migrate.migrate(tmp_path / "thesis")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no file of StepSaliency"):
        migrate.migrate(tmp_path / "thesis.txt")
    with pytest.raises(FileNotFoundError):
        migrate.migrate(tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "thesis", "thesis.txt"]
    assert kinds_in(ROOT / "data") == {("population", 2), ("evaluation", 2), ("calibration", 2)}


def kinds_in(data: Path) -> set[tuple[str, int]]:
    """Return kind and version of all committed results but guidances, which are younger than any migration."""
    manifests = [path for path in data.rglob("manifest.json") if "stepsal.Guidance" not in path.read_text()]
    folders = {manifest.parent for manifest in manifests}
    return {migrate.kind_of(folder) for folder in folders}
