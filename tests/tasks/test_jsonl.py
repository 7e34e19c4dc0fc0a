"""Problems from JSONL files: options, names, and lines and files that are refused with their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepsal.tasks.jsonl import JsonlTask


def write(path: Path, *lines: dict | str) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_file_of_problems(tmp_path: Path) -> None:
    options = [str(n) for n in range(10, 16)]
    lines = [{"question": f"Which is {n}?", "options": options, "answer": n} for n in options]
    task = JsonlTask(write(tmp_path / "p.jsonl", {"question": "3/4?", "answer": "0.75"}, "", *lines))
    assert len(task) == 7
    assert task.sample(0).grade(r"\boxed{\frac34}").correct
    letters = set()
    for i, n in enumerate(options, 1):
        problem = task.sample(i)
        letters.add(problem.reference)
        assert f"{problem.reference}) {n}\n" in problem.question
        assert problem.grade(f"The answer is {problem.reference}.").correct
    assert len(letters) > 2  # shuffled
    again = JsonlTask(tmp_path / "p.jsonl")
    assert again.problems == task.problems
    assert JsonlTask(tmp_path / "p.jsonl", shuffle_seed=1).problems != task.problems
    assert JsonlTask(tmp_path / "p.jsonl", shuffle_seed=None).sample(1).reference == "A"
    name = task.name
    write(tmp_path / "p.jsonl", {"question": "3/4?", "answer": "0.7"})
    assert JsonlTask(tmp_path / "p.jsonl").name != name
    with pytest.raises(IndexError, match=r"problems 0\.\.6, not 7"):
        task.sample(7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ({"question": "?"}, "line 2: there is no field 'answer'"),
        ({"question": "?", "answer": "4", "options": ["1", "2"]}, "the answer '4'"),
        ({"question": "?", "answer": "1", "options": ["1", "1"]}, "different"),
        ({"question": "?", "answer": "a", "options": "abc"}, "a list of"),
        ({"question": "?", "answer": "1", "options": []}, "a list of"),
        ({"question": "?", "answer": None}, "answer=None"),
        ({"question": "?", "answer": True}, "answer=True"),
        ("[1]", "line 2"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: dict | str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", {"question": "?", "answer": "1"}, line)
    with pytest.raises(ValueError, match=message):
        JsonlTask(path)


def test_what_json_allows_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"question": "one\u2028two", "answer": 3}\r\n'.encode())
    assert JsonlTask(path).sample(0).question.startswith("one\u2028two")


def test_no_file_and_no_lines(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JsonlTask(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no lines"):
        JsonlTask(write(tmp_path / "empty.jsonl"))


LINES = '{"question": "caf\u00e9?", "answer": "1"}\r\n{"question": "na\u00efve?", "answer": "2"}\r\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_say_what_they_are(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(LINES.encode(encoding))
    task = JsonlTask(path, grader="number")
    assert [problem.question.split("\n")[0] for problem in task.problems] == ["caf\u00e9?", "na\u00efve?"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LINES.encode("latin-1"), r"line 1: byte 0xe9 \(number 18 of the line\) is no UTF-8; .*iconv"),
        (LINES.replace("\u00e9", "e").encode("latin-1"), r"line 2: byte 0xef"),
        (LINES.encode("utf-16")[:-1], "UTF-16"),
        (LINES.replace("\u00e9", "e").replace("\u00ef", "i").encode("utf-16-le"), "zero bytes, as in UTF-16 without"),
        (b'[{"question": "?", "answer": "1"}]', "one JSON array; .*jq -c"),
        (b'[\n  {"question": "?", "answer": "1"}\n]\n', "one JSON array; .*jq -c"),
        (b'{"question": "?", "answer": "1"}\n["?", "1"]', r"line 2: a JSON array, '\[.*where a JSON object"),
        (b'{"question": "?", "answer": "1"}\n"text"', "line 2: a JSON value"),
        (b'{"question": "?", "answer": NaN}', "line 1: answer=nan is no text or number"),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        JsonlTask(path, grader="number")
    assert "p.jsonl" in str(caught.value)


def test_white_space_does_not_tell_an_option(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"question": "?", "options": ["iron\n", " gold", "tin"], "answer": " iron"})
    problem = JsonlTask(path, shuffle_seed=None).sample(0)
    assert "A) iron\nB) gold\nC) tin\n" in problem.question
    assert problem.reference == "A"
    write(path, {"question": "?", "options": ["iron", "iron\n"], "answer": "iron"})
    with pytest.raises(ValueError, match="line 1: options must be different, but 'iron' is there twice"):
        JsonlTask(path)
