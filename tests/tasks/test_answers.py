"""Graders on answers of the shapes that models write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.tasks.answers import Problem
from stepsal.tasks.jsonl import JsonlTask


def grade(text: str, reference: str, grader: str):
    return Problem("?", reference, grader).grade(text)


@pytest.mark.parametrize(
    ("text", "reference", "correct"),
    [
        (r"So the area is \boxed{42}.", "42", True),
        (r"Thus $x = \boxed{\frac{3}{4}}$.", r"\frac{3}{4}", True),
        (r"The answer is $\boxed{0.75}$", r"\frac{3}{4}", True),
        (r"\boxed{\dfrac{1}{\sqrt{2}}}", r"\frac{\sqrt{2}}{2}", True),
        (r"\[\boxed{\left(3, \frac{\pi}{2}\right)}\]", r"(3, \frac{\pi}{2})", True),
        (r"Solutions: $\boxed{\{1, 3\}}$", r"\{3, 1\}", True),
        (r"$\boxed{1,3}$", "1,3", True),
        (r"$x \in \boxed{(-\infty, 2]}$", r"(-\infty, 2]", True),
        (r"$x \in \boxed{(-\infty, 2)}$", r"(-\infty, 2]", False),
        (r"It takes $\boxed{12\text{ cm}}$.", "12", True),
        (r"$\boxed{15\%}$", r"15\%", True),
        (r"$\boxed{1{,}234}$", "1234", True),
        (r"$\boxed{x^2 + 2x + 1}$", r"(x+1)^2", True),
        (r"The answer is $\boxed{\text{no solution}}$.", "3", False),
        (r"First I had \boxed{3}. No: \boxed{5}.", "5", True),
        (r"I guess \boxed{1,2}; no: \boxed{1,3}", "1,3", True),
        (r"Either \boxed{1} or \boxed{3}.", "1,3", True),
        (r"It is \boxed{(1,2)}, no: \boxed{(1,3)}", "(1,3)", True),
        ("**3/4**", r"\frac{3}{4}", True),
        ("**Answer: 3/4**", r"\frac{3}{4}", True),
        (r"The final answer is 17.", "17", True),
        (r"There is no number here.", "17", False),
        (r"\boxed{18}", "17", False),
        (r"\boxed{", "17", False),
        ("", "17", False),
    ],
)
def test_mathematics(text: str, reference: str, correct: bool) -> None:
    verdict = grade(text, reference, "math")
    assert verdict.correct is correct, verdict.reason
    assert (verdict.error is None) is correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{(C)}}", "C"),
        ("The answer is C.", "C"),
        ("The correct answer is **(C)**, since the others are even.", "C"),
        ("Answer: C", "C"),
        ("A is wrong, B is wrong.\n\nC", "C"),
        ("I would pick option B. No, wait: option C", "C"),
        ("**C) 9**", "C"),
        ("A cat has four legs, so it is (C).", "C"),
        ("The answer is C because 9 is odd.", "C"),
        ("The correct option is C since it is odd.", "C"),
        ("Option C is correct.", "C"),
        ("The answer is C and not D.", "C"),
        ("The answer is C, not option A.", "C"),
        ("The answer is C. Choice B, by contrast, is even.", "C"),
        ("The answer is B.\nWait, it is actually C.", "C"),
        ("C<|im_end|>", "C"),
        ("Think.\n\nC<|im_end|>", "C"),
        ("A) 4 is even.\nB) 7 is prime, so it is right.\nC) 9 is 3*3.", None),
        ("A) 4\nB) 7\nC) 9\nD) 10", None),
        (r"\boxed{A + B}", None),
        ("The answer is A cat", None),
        ("The answer is B or C.", None),
        ("None of them.", None),
        ("", None),
    ],
)
def test_choices(text: str, answer: str | None) -> None:
    verdict = grade(text, "C", "choice")
    assert verdict.final_answer == answer
    assert verdict.correct is (answer == "C")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So there are 12.", "12"),
        (r"\boxed{12} after 3 steps", "12"),
        (r"\boxed{1{,}234}", "1234"),
        ("It is 1,234.50", "2469/2"),
        ("The area is 12 cm^2", "12"),
        ("The area is 12 $cm^{2}$", "12"),
        ("The answer is .5", "1/2"),
        ("0.50", "1/2"),
        ("3/4", "3/4"),
        ("1e3", "1000"),
        ("x = -5", "-5"),
        ("x = –5", "-5"),
        ("x = 10-3", "3"),
        ("12<|endoftext|>", "12"),
        ("5.0", "5"),
        ("1/0", "None"),
        ("H2O", None),
        ("twelve", None),
    ],
)
def test_numbers(text: str, answer: str | None) -> None:
    verdict = grade(text, "12", "number")
    assert verdict.final_answer == answer
    assert verdict.correct is (answer == "12")


def test_answers_of_traces(smollm2: TransformerBridge) -> None:
    problem = Problem("Which is odd? A) 2 B) 4 C) 9", "C", "choice")
    for response in ("C", "Two and four are even.\n\nC", "<think>Nine is odd.</think>The answer is C."):
        for end in ("", "<|im_end|>"):
            verdict = problem.grade(stepsal.Trace.from_text(problem.question, response + end, smollm2))
            assert verdict.correct, (response + end, verdict.reason)


class Cut:
    truncated, summary, response = True, "", r"\boxed{17}"


@pytest.mark.parametrize(("grader", "reference"), [("math", "17"), ("number", "17"), ("choice", "C")])
def test_what_was_cut_off_is_wrong(grader: str, reference: str) -> None:
    verdict = Problem("?", reference, grader).grade(Cut())
    assert not verdict.correct
    assert verdict.error == "truncated"


@pytest.mark.parametrize(
    ("reference", "grader", "message"),
    [("seven", "number", "'seven' can't be read"), ("K", "choice", "'K'"), ("", "math", "''"), ("1", "sum", "'sum'")],
)
def test_bad_problems_are_refused(reference: str, grader: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem("?", reference, grader)


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
