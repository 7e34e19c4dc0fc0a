"""Prompts: where a question stands, told by the template, by the text, and by the template's text around it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import char_tokenizer

from stepsal.trace.prompt import (
    PromptFrame,
    locate_question,
    render_prompt,
    render_prompts,
    template_around,
    tokenize_prompt,
)
from stepsal.trace.sections import sections
from stepsal.trace.trace import Trace

TOKENIZER = char_tokenizer()
TRIMS = char_tokenizer()
TRIMS.chat_template = "<bos>{% for m in messages %}<user>{{ m.content | trim }}{% endfor %}<assistant>"
BARE = char_tokenizer()
BARE.chat_template = None
QUESTIONS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1).filter(str.strip)
SPACE = st.sampled_from(["", " ", "\n", "  \n"])


@given(SPACE, QUESTIONS, SPACE, st.sampled_from([TOKENIZER, TRIMS, BARE]))
def test_all_ways_to_the_question_lead_to_one_place(before: str, text: str, after: str, tokenizer: object) -> None:
    question = before + text + after
    prompt = render_prompt(tokenizer, question)
    assert prompt.text[prompt.start : prompt.end] == question.strip()
    assert prompt.tail.strip() == template_around(tokenizer)[1].strip()
    assert locate_question(prompt.text, question, prompt.tail) == (prompt.start, prompt.end)
    tokens = tokenize_prompt(tokenizer, prompt)
    new = TOKENIZER("Count them.</think>Two.")["input_ids"]
    answer = Trace.from_answer(tokens, new, tokenizer)
    again = Trace.from_tokens(answer.tokens, answer.n_prompt, tokenizer, question=question)
    assert answer.steps == again.steps
    assert answer.text == again.text == prompt.text + "Count them.</think>Two."
    assert answer.question == again.question == question


def test_a_batch_is_rendered_as_its_questions_one_by_one() -> None:
    questions = ["How?", " user ", "<assistant>"]
    for system in (None, "Be kind."):
        expected = [render_prompt(TOKENIZER, question, system) for question in questions]
        assert render_prompts(TOKENIZER, questions, system) == expected
    with pytest.raises(ValueError, match="question=' ' is empty"):
        render_prompts(TOKENIZER, ["How?", " "])
    assert render_prompts(TOKENIZER, []) == []


def test_a_template_without_a_place_for_the_question() -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "<bos><user>always the same<assistant>"
    with pytest.raises(ValueError, match="altered the question 'How"):
        render_prompt(tokenizer, "How?")


def test_a_question_that_the_text_does_not_hold() -> None:
    with pytest.raises(ValueError, match="do not spell the question 'How"):
        locate_question("<user>What?<assistant>", "How?", "<assistant>")


def test_an_answer_of_no_tokens() -> None:
    prompt = tokenize_prompt(TOKENIZER, render_prompt(TOKENIZER, "How?"))
    with pytest.raises(ValueError, match="new_tokens is empty"):
        Trace.from_answer(prompt, [], TOKENIZER)


def test_a_frame_holds_no_system_prompt() -> None:
    assert PromptFrame.of(TOKENIZER) == PromptFrame("<user>", "<assistant><think>")


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("<a><think>", "One is one.\nSo it is.</think>\nTwo.<eos>", ("One is one.\nSo it is.", "Two.")),
        ("<a>", "<think>One is one.</think>Two.", ("One is one.", "Two.")),
        ("<a>", "Two.\n\nYes, two. <eos>\n<eos>", ("", "Two.\n\nYes, two.")),
        ("<a><think>", "One is", ("One is", "")),
    ],
)
def test_sections_as_texts(prompt: str, response: str, expected: tuple[str, str]) -> None:
    assert sections(TOKENIZER, prompt, response) == expected
