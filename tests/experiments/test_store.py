"""The store: parts are whole or not there, whoever is killed, and count once, whoever writes beside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stepsal import Decoding
from stepsal.experiments import store as store_module
from stepsal.experiments.store import Store

PARAMETERS = {"model_name": "mini", "decoding": {"temperature": 1.0, "stop": ()}, "seed": 0}

# Runs an action in a forked process that is killed before its k-th change of files, for k = 1, 2, ... until it comes to
# its end, each time on a new copy of a store; and tells what then is in the store, before and after it is opened again.
KILLED_EVERYWHERE = """
import json, os, shutil, sys
from pathlib import Path
from stepsal import Decoding
from stepsal.experiments.store import Store

source, work, action = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
os.fsync = lambda descriptor: None  # it takes long, and a killed process does not need it
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def contents(store):
    return [(part.folder / "text").read_text() for part in store.parts()]

def add(store):
    with store.adding("c") as folder:
        (folder / "text").write_text("c" * 1000)

def merge(store):
    merged = "".join(contents(store))
    with store.adding("merged", replaces=store.names()) as folder:
        (folder / "text").write_text(merged)

def merge_twice(store):
    merge(store)
    with store.adding("merged-again", replaces=["merged"]) as folder:
        (folder / "text").write_text("".join(contents(store)))

def child(folder, k):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in CHANGES or (event == "open" and arguments[2] & WRITING):
            count += 1
            if count == k:
                os.kill(os.getpid(), 9)
    with Store.opened(folder, "notes", 2, {}) as store:
        sys.addaudithook(hook)
        globals()[action](store)
    os._exit(0)

results, k, status = [], 0, None
while status != 0:
    k += 1
    folder = work / str(k)
    shutil.copytree(source, folder)
    pid = os.fork()
    if pid == 0:
        child(folder, k)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, 9), status
    before = contents(Store.load(folder, "notes", 2))
    with Store.opened(folder, "notes", 2, {}) as store:
        after, names = contents(store), sorted(path.name for path in (folder / "parts").iterdir())
    results.append([before, after, names])
print(json.dumps(results))
"""

WRITER = """
import sys, time
from pathlib import Path
from stepsal import Decoding
from stepsal.experiments.store import Store

folder, writer = Path(sys.argv[1]), sys.argv[2]
store = Store.load(folder, "notes", 2)
for i in range(25):
    for name in (f"{writer}-{i}", f"shared-{i}"):
        with store.adding(name, {"writer": writer}) as part:
            (part / "text").write_text(f"{name} by {writer}")
"""


def begin(folder: Path, **texts: str) -> Store:
    with Store.opened(folder, "notes", 2, {}) as store:
        for name, text in texts.items():
            add(store, name, text)
    return store


def add(store: Store, name: str, text: str, **options: object) -> None:
    with store.adding(name, **options) as part:  # type: ignore[arg-type]
        (part / "text").write_text(text)


def contents(store: Store) -> list[str]:
    return [(part.folder / "text").read_text() for part in store.parts()]


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_everywhere(store: Store, work: Path, action: str) -> list[tuple[list[str], list[str], list[str]]]:
    output, errors = run(KILLED_EVERYWHERE, store.folder, work, action).communicate()
    assert output, errors
    results = json.loads(output)
    assert len(results) > 5
    return results


def test_parts_and_what_is_said_about_them_come_back(tmp_path: Path) -> None:
    with Store.opened(tmp_path / "store", "notes", 2, PARAMETERS) as store:
        add(store, "b", "second", about={"n": 2})
        add(store, "a", "first")
    store = Store.load(tmp_path / "store", "notes", 2)
    assert contents(store) == ["first", "second"]
    assert store.names() == ["a", "b"]
    assert [dict(part.about) for part in store.parts()] == [{}, {"n": 2}]
    assert "torch" in store.manifest["versions"]
    assert "torch" in store.parts()[0].versions
    assert {name: store.manifest[name] for name in PARAMETERS} == json.loads(json.dumps(PARAMETERS))


def test_an_error_while_a_part_is_written_leaves_nothing(tmp_path: Path) -> None:
    store = begin(tmp_path)
    with pytest.raises(ZeroDivisionError), store.adding("a") as part:
        (part / "text").write_text(str(1 / 0))
    assert list((tmp_path / "parts").iterdir()) == []
    for name in (".a", "a/b", ".."):
        with pytest.raises(ValueError, match="plain name"), store.adding(name):
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_part_is_whole_or_not_there_wherever_its_writer_is_killed(tmp_path: Path) -> None:
    results = killed_everywhere(begin(tmp_path / "store", a="a", b="b"), tmp_path, "add")
    new = ["a", "b", "c" * 1000]
    for before, after, names in results:
        assert before == after
        assert before in (["a", "b"], new)
        assert names == ["a", "b", "c"][: len(after)]
    assert results[0][1] == ["a", "b"]
    assert results[-1][1] == new


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("action", ["merge", "merge_twice"])
def test_merged_parts_count_once_wherever_the_merge_is_killed(tmp_path: Path, action: str) -> None:
    results = killed_everywhere(begin(tmp_path / "store", a="a", b="b"), tmp_path, action)
    for before, after, names in results:
        assert "".join(before) == "".join(after) == "ab"
        assert names in (["a", "b"], ["merged"], ["merged-again"])
    assert results[0][2] == ["a", "b"]
    assert results[-1][2] == [{"merge": "merged", "merge_twice": "merged-again"}[action]]


def test_several_processes_add_to_one_store(tmp_path: Path) -> None:
    begin(tmp_path)
    writers = [run(WRITER, tmp_path, writer) for writer in ("x", "y")]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
    parts = {part.name: part for part in Store.load(tmp_path, "notes", 2).parts()}
    assert set(parts) == {f"{kind}-{i}" for kind in ("x", "y", "shared") for i in range(25)}
    for name, part in parts.items():
        assert (part.folder / "text").read_text() == f"{name} by {part.about['writer']}"
    assert not list((tmp_path / "parts").glob(".*"))


def test_of_two_parts_of_one_name_the_first_counts(tmp_path: Path) -> None:
    store = begin(tmp_path, a="first", b="b")
    add(store, "a", "second", replaces=["b"])
    assert contents(store) == ["first", "b"]


def test_a_reader_sees_all_contents_once_while_parts_are_merged(tmp_path: Path) -> None:
    store = begin(tmp_path, **{f"a{i}": f"<{i}>" for i in range(4)})
    script = """
import sys
from stepsal import Decoding
from stepsal.experiments.store import Store
store = Store.load(sys.argv[1], "notes", 2)
print("ready", flush=True)
for round in range(40):
    names = store.names()
    texts = [(part.folder / "text").read_text() for part in store.parts()]
    with store.adding(f"merged-{round}", replaces=names) as part:
        (part / "text").write_text("".join(texts))
    with store.adding(f"split-{round}") as part:
        (part / "text").write_text(" ")
"""
    writer = run(script, tmp_path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    reads = 0
    while writer.poll() is None:
        names = store.names()
        assert 1 <= len(names) <= 4
        store.parts()
        reads += 1
    assert writer.returncode == 0, writer.communicate()[1]
    assert reads > 10
    assert "".join(contents(store)).replace(" ", "") == "<0><1><2><3>"


def test_a_part_that_goes_while_it_is_listed_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begin(tmp_path, a="first")
    folders = tmp_path / "parts"
    gone, here = {folders / "merged-meanwhile"}, {folders / "a"}
    listings = iter([gone, gone, set(), here])
    monkeypatch.setattr(store_module, "_listed", lambda folder: next(listings, here))
    assert store.names() == ["a"]


def test_a_part_that_is_being_written_is_left_to_its_writer(tmp_path: Path) -> None:
    begin(tmp_path)
    script = """
import sys
from stepsal import Decoding
from stepsal.experiments.store import Store
with Store.load(sys.argv[1], "notes", 2).adding("slow") as part:
    (part / "text").write_text("slow")
    print("writing", flush=True)
    sys.stdin.readline()
"""
    slow, killed = run(script, tmp_path), run(script.replace('"slow"', '"killed"'), tmp_path)
    for process in (slow, killed):
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
    killed.kill()
    killed.wait()
    assert len(list((tmp_path / "parts").glob(".*.part"))) == 2
    with Store.opened(tmp_path, "notes", 2, {}) as store:
        assert [path.name.split(".")[1] for path in (tmp_path / "parts").glob(".*.part")] == ["slow"]
        assert store.names() == []
        _, errors = slow.communicate("\n")
        assert slow.returncode == 0, errors
        assert contents(store) == ["slow"]


def test_a_second_run_is_refused_until_the_first_ends_or_dies(tmp_path: Path) -> None:
    script = """
import os, sys
from stepsal import Decoding
from stepsal.experiments.store import Store
with Store.opened(sys.argv[1], "notes", 2, {}):
    print("open", flush=True)
    sys.stdin.readline()
"""
    first = run(script, tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "open\n"
    with pytest.raises(ValueError, match="another process writes"), Store.opened(tmp_path, "notes", 2, {}):
        pass
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert begin(tmp_path).names() == []


@pytest.mark.parametrize("name", ["text", "part.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_part_is_named(tmp_path: Path, name: str, how: str) -> None:
    store = begin(tmp_path, a="first", b="second")
    file = tmp_path / "parts" / "b" / name
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[-3] ^= 0xFF
        file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"parts/b is damaged \(.*{'' if name == 'part.json' else name}.*delete it"):
        store.parts()
    shutil.rmtree(tmp_path / "parts" / "b")
    assert contents(store) == ["first"]


def test_foreign_and_old_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Store.load(tmp_path / "nowhere", "notes", 2)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no notes: it has no manifest\.json"):
        begin(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["thesis.txt"]
    folder = begin(tmp_path / "store", a="a").folder
    with pytest.raises(ValueError, match=r"no population.*of another kind"):
        Store.load(folder, "population", 2)
    with pytest.raises(ValueError, match=r"format version 2, this stepsal reads 3.*python scripts/migrate\.py"):
        Store.load(folder, "notes", 3)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        begin(folder)


def test_a_store_of_before_stop_in_thinking_goes_on_as_it_was(tmp_path: Path) -> None:
    for stop, as_it_was in (([], False), (["end"], True)):
        folder = tmp_path / f"with {len(stop)} stop texts"
        decoding = Decoding(stop=stop).to_dict()
        del decoding["stop_in_thinking"]
        with Store.opened(folder, "notes", 2, PARAMETERS | {"decoding": decoding}) as store:
            add(store, "a", "a")
        same = Decoding(stop=stop, stop_in_thinking=as_it_was).to_dict()
        with Store.opened(folder, "notes", 2, PARAMETERS | {"decoding": same}) as store:
            assert store.manifest["decoding"] == json.loads(json.dumps(same))
        other = PARAMETERS | {"decoding": same | {"stop_in_thinking": not as_it_was}}
        message = rf"decoding\.stop_in_thinking={as_it_was}, not {not as_it_was}"
        with pytest.raises(ValueError, match=message), Store.opened(folder, "notes", 2, other):
            pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed=0, not 1"),
        ({"decoding": {"temperature": 0.5, "stop": ()}}, r"decoding\.temperature=1\.0, not 0\.5"),
        ({"decoding": {"temperature": 1.0, "stop": ("end",)}}, r"decoding\.stop=\[\], not \['end'\]"),
        ({"decoding": {"temperature": 1.0}}, r"decoding\.stop=\[\], not None"),
        ({"system": "Be brief."}, r"system=None, not 'Be brief\.'"),
        ({"model_name": "maxi", "seed": 1}, "model_name='mini', not 'maxi'"),
    ],
)
def test_other_parameters_are_refused_naming_the_first_difference(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with Store.opened(tmp_path, "notes", 2, PARAMETERS) as store:
        add(store, "a", "a")
    with pytest.raises(ValueError, match=message), Store.opened(tmp_path, "notes", 2, PARAMETERS | change):
        pass
    with Store.opened(tmp_path, "notes", 2, PARAMETERS) as store:
        assert store.names() == ["a"]


def test_a_store_without_parts_is_begun_again_with_other_parameters(tmp_path: Path) -> None:
    with Store.opened(tmp_path, "notes", 2, PARAMETERS):
        pass
    with Store.opened(tmp_path, "notes", 2, PARAMETERS | {"seed": 1}) as store:
        assert store.manifest["seed"] == 1


def test_a_copy_holds_what_counts_and_inner_stores(tmp_path: Path) -> None:
    store = begin(tmp_path / "store", a="a", b="b")
    (store.folder / "request.json").write_text("{}")
    add(store, "c", "ab", replaces=["a", "b"])
    begin(store.folder / "inner", d="d")
    shutil.copytree(store.folder / "parts" / "c", store.folder / "parts" / ".half.0.part")
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new", tmp_path / "empty"):
        assert store.save(target) == target
        assert contents(Store.load(target, "notes", 2)) == ["ab"]
        assert contents(Store.load(target / "inner", "notes", 2)) == ["d"]
        assert sorted(path.name for path in target.iterdir()) == ["inner", "manifest.json", "parts", "request.json"]
        assert [path.name for path in (target / "parts").iterdir()] == ["c"]
    with pytest.raises(ValueError, match="not empty"):
        store.save(tmp_path / "new")
    (store.folder / "inner" / "parts" / "d" / "text").write_text("e")
    with pytest.raises(ValueError, match="inner/parts/d is damaged"):
        store.save(tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_store_whose_inner_stores_hold_parts_keeps_its_parameters(tmp_path: Path) -> None:
    with Store.opened(tmp_path, "calibration", 2, PARAMETERS):
        pass
    inner = Store.opened(tmp_path / "search", "evaluation", 2, PARAMETERS)
    with inner as store, store.adding("a") as folder:
        (folder / "text").write_text("a")
    with (
        pytest.raises(ValueError, match="seed=0, not 1"),
        Store.opened(tmp_path, "calibration", 2, PARAMETERS | {"seed": 1}),
    ):
        pass


def test_an_unfinished_copy_inside_a_store_is_removed(tmp_path: Path) -> None:
    unfinished = tmp_path / "store" / ".copy.1234.part"
    with Store.opened(tmp_path / "store", "population", 2, PARAMETERS):
        unfinished.mkdir()
    with Store.opened(tmp_path / "store", "population", 2, PARAMETERS):
        assert not unfinished.exists()
