"""Problems: verdicts in words, answers of traces, what was cut off, and references that no grader reads."""

from __future__ import annotations

import re
import time

import pytest
import torch
from tiny_models import char_tokenizer
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.tasks.answers import Problem, read_answer
from stepsal.trace import Segmentation, Trace


@pytest.mark.parametrize(
    ("text", "reference", "grader", "final_answer", "error", "reason"),
    [
        ("3 * 4 = 12", "12", "number", "12", None, "the answer is right"),
        ("It is 1,234.50", "12", "number", "2469/2", "wrong number", "2469/2 is not 12"),
        (r"\boxed{\sqrt{2}}", "2", "number", None, "no number", "has no number"),
        (r"\boxed{\frac{6}{8}}", "0.75", "math", "3/4", None, "the answer is right"),
        (r"\boxed{2x}", "2", "math", "2*x", "wrong answer", r"2\*x is not 2"),
        ("I do not know.", "2", "math", None, "no answer", "has no answer"),
        ("Therefore, B.", "C", "choice", "B", "wrong answer", "B is not C"),
        ("B or C", "C", "choice", None, "no answer", "has no answer"),
    ],
)
def test_verdicts(
    text: str, reference: str, grader: str, final_answer: str | None, error: str | None, reason: str
) -> None:
    verdict = Problem("?", reference, grader).grade(text)
    assert (verdict.final_answer, verdict.error) == (final_answer, error)
    assert verdict.correct is (error is None)
    assert re.search(reason, verdict.reason)


def test_letters_that_are_no_options_are_not_chosen() -> None:
    question = "Which is odd?\nA) 2\nB) 4\nC) 9\nD) 10"
    text = "The answer is C. Its energy: \\boxed{E}"
    assert Problem(question, "C", "choice").grade(text).correct
    assert Problem("Which one?\nA) 2\nB) 4", "E", "choice").grade(r"\boxed{E}").correct  # where E is right it is one


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
    [
        ("seven", "number", "'seven' can't be read"),
        ("K", "choice", "'K'"),
        ("", "math", "''"),
        ("1", "sum", "'sum'"),
        ("2,5", "number", "'2,5'"),
        (r"\sqrt{2}", "number", "sqrt"),
        ("C or D", "choice", "C or D"),
        (" ", "math", "' '"),
    ],
)
def test_bad_problems_are_refused(reference: str, grader: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem("?", reference, grader)


@pytest.mark.parametrize("grader", ["number", "math"])
def test_a_box_counts_however_much_follows(grader: str) -> None:
    problem = Problem("?", "17", grader)
    assert problem.grade(r"So \boxed{17}." + " Now 3 words follow." * 1000).correct
    assert problem.grade("One 3. " * 5000 + r"So \boxed{17}.").correct
    assert not problem.grade(r"So \boxed{17" + " and more" * 1000).correct


@pytest.mark.parametrize("grader", ["number", "math", "choice"])
@pytest.mark.parametrize(
    "part", [" ", "1 ", "1,", "\\text{ ", "(", "$x", "A or ", "the answer is ", "- ", "{", "*", "\n"]
)
def test_long_texts_take_no_long_time(grader: str, part: str) -> None:
    start = time.process_time()
    read_answer(part * 10_000, grader)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("format", ["think", "plain", "auto", "harmony"])
def test_the_answer_of_a_model_that_did_not_think_is_read_whole(format: str) -> None:
    """No marker tells a summary, and what stands last may be a mere wish."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>", "")
    prompt = tokenizer("<bos><user>What is 3 + 4?<assistant>")["input_ids"]
    ids = [
        *prompt,
        *tokenizer("We add.\n\nThe answer is \\boxed{7}.\n\nAsk me more, 24 hours a day!<eos>")["input_ids"],
    ]
    trace = Trace.from_tokens(
        torch.tensor(ids), len(prompt), tokenizer, question="What is 3 + 4?", segmentation=Segmentation(format)
    )
    assert trace.answer == trace.response
    assert Problem("What is 3 + 4?", "7", "number").grade(trace).correct
