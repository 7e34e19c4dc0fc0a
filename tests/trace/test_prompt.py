"""Prompts: where a question stands, told by the template, by the text, and by the template's text around it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import char_tokenizer

from stepsal.trace.frame import PromptFrame
from stepsal.trace.prompt import (
    check_chat,
    locate_question,
    render_prompt,
    render_prompts,
    template_around,
    tokenize_prompt,
)
from stepsal.trace.sections import sections
from stepsal.trace.segment import Segmentation
from stepsal.trace.template import switches_of
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


@pytest.mark.parametrize("space", ["", " ", "\n  ", "\t"])
def test_white_space_behind_a_question_that_its_tail_spells_as_well(space: str) -> None:
    text = f"<user>think{space}<assistant><think>\n"
    for tail in ("<assistant><think>\n", "<assistant><think>", f"{space}<assistant><think>\n"):
        assert locate_question(text, f"think{space}", tail) == (6, 11)
    assert locate_question(text, "think", "<another>") == (len(text) - 7, len(text) - 2)  # the last one


def test_an_answer_of_no_tokens() -> None:
    prompt = tokenize_prompt(TOKENIZER, render_prompt(TOKENIZER, "How?"))
    with pytest.raises(ValueError, match="new_tokens is empty"):
        Trace.from_answer(prompt, [], TOKENIZER)


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


def with_template(template: object) -> object:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


SWITCHED = (
    "{%- if not thinking is defined %}{%- set thinking = false %}{%- endif %}<bos>{% for m in messages %}<user>"
    "{% if style == 'short' or tone in ['kind', 'dry'] %}[{{ style }}]{% endif %}{{ m.content }}{% endfor %}<assistant>"
    "{% generation %}{% if thinking %}<think>{% else %}</think>{% endif %}{% endgeneration %}{{ eos_token * 0 }}"
    "{{ sep_token }}{{ namespace(a=1).a * '' }}{{ raise_exception('never') if tools }}"
)


def test_the_switches_of_a_template() -> None:
    tokenizer = with_template(SWITCHED)
    assert switches_of(tokenizer) == {
        "style": (True, False, "short"), "thinking": (True, False), "tone": (True, False, "kind", "dry"),
    }  # fmt: skip
    assert switches_of(TOKENIZER) == switches_of(BARE) == {}


def test_a_prompt_with_switches() -> None:
    tokenizer = with_template(SWITCHED)
    assert render_prompt(tokenizer, "How?").text == "<bos><user>How?<assistant></think>"
    prompt = render_prompt(tokenizer, "How?", chat={"thinking": True, "style": "short"})
    assert prompt.text == "<bos><user>[short]How?<assistant><think>"
    assert prompt.text[prompt.start : prompt.end] == "How?"
    assert prompt.chat == tokenize_prompt(tokenizer, prompt).chat == {"thinking": True, "style": "short"}
    assert template_around(tokenizer, chat={"thinking": True}) == ("<bos><user>", "<assistant><think>")


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ({"enable_thinking": False}, "'enable_thinking' is not used by the chat template; use 'style', 'think"),
        ({"thinking": True, "Style": 1}, "'Style' is not used"),
        ({"tokenize": True}, "'tokenize' is set by apply_chat_template itself"),
        ({"messages": []}, "'messages' is set by"),
        ({"tools": []}, "'tools' is set by"),
        ({"eos_token": ""}, "'eos_token' is set by"),
        ({"sep_token": ""}, "'sep_token' is set by"),
        ({"namespace": 1}, "'namespace' is set by"),
        ({"thinking": object()}, "thinking=<object .* has no form in JSON"),
        ({"thinking": (1, 2)}, "has no form in JSON"),
        ({"thinking": float("nan")}, "has no form in JSON"),
        ("thinking", "must map switches"),
        (["thinking"], "must map switches"),
        (True, "must map switches"),
    ],
)  # fmt: skip
def test_switches_that_are_refused(chat: object, message: str) -> None:
    tokenizer = with_template(SWITCHED)
    for call in (check_chat, lambda tokenizer, chat: render_prompt(tokenizer, "How?", chat=chat)):
        with pytest.raises(ValueError, match=message):
            call(tokenizer, chat)


def test_switches_where_there_are_none() -> None:
    assert (
        check_chat(TOKENIZER, None) == check_chat(TOKENIZER, {}) == check_chat(BARE, {}) == check_chat(None, {}) == {}
    )
    with pytest.raises(ValueError, match="it has no switches"):
        check_chat(TOKENIZER, {"thinking": True})
    for tokenizer in (BARE, None):
        with pytest.raises(ValueError, match="no chat template; set"):
            check_chat(tokenizer, {"thinking": True})


def test_several_templates_under_one_tokenizer() -> None:
    several = with_template({"tool_use": "<bos>{{ tools[0] }}", "default": SWITCHED})
    assert render_prompt(several, "How?") == render_prompt(with_template(SWITCHED), "How?")
    assert check_chat(several, {"thinking": True}) == {"thinking": True}
    for call in (lambda t: render_prompt(t, "How?"), template_around, switches_of, PromptFrame.of):
        with pytest.raises(ValueError, match=r"'tool_use' and none is named 'default': set tokenizer.chat_template"):
            call(with_template({"tool_use": SWITCHED}))


def test_a_trace_keeps_its_switches() -> None:
    tokenizer, chat = with_template(SWITCHED), {"thinking": True}
    trace = Trace.from_text("How many?", "Count them.</think>Two.", tokenizer, chat=chat)
    assert (trace.chat, trace.roles) == (chat, ("question", "thinking", "summary"))
    # the question stands before what this switch lets follow
    again = Trace.from_tokens(trace.tokens, trace.n_prompt, tokenizer, question="How many?", chat=chat)
    assert (again.chat, again.steps) == (chat, trace.steps)
    plain = Trace.from_text("How many?", "Two.", tokenizer, segmentation=Segmentation("think"))
    assert (plain.chat, plain.roles) == ({}, ("question", "summary"))
    prompt = tokenize_prompt(tokenizer, render_prompt(tokenizer, "How many?", chat=chat))
    assert Trace.from_answer(prompt, TOKENIZER("Two.")["input_ids"], tokenizer).chat == chat


@pytest.mark.parametrize("format", ["auto", "think", "harmony", "plain"])
def test_without_any_marker_the_whole_response_is_the_text(format: str) -> None:
    segmentation = Segmentation(format)
    assert sections(BARE, "Why?\n", "We add.\n\nTwo.<eos>", segmentation) == ("", "We add.\n\nTwo.")


def test_sections_warn_of_headers_that_cant_be_read() -> None:
    response = "<|channel|>analysis<|message|>It is.<|end|><|start|>assistantHm<|channel|>final<|message|>Two."
    with pytest.warns(UserWarning, match="headers of messages can't be read: '<|start|>assistantHm<|channel|>final'"):
        assert sections(BARE, "<|start|>assistant", response) == ("It is.", "")


def test_half_a_character_is_refused_before_it_is_tokenised() -> None:
    for options in ({"question": "Why \ud83d?"}, {"question": "Why?", "system": "Be \udf89"}):
        with pytest.raises(ValueError, match=r"(question|system) holds half a character \(a lone surrogate\)"):
            render_prompt(BARE, **options)


def test_a_word_for_a_truth_value_is_refused() -> None:
    tokenizer = with_template(
        "{{ messages[0].content }}<a>{% if think %}<think>{% endif %}{% if mode == 'none' %}{% endif %}"
    )
    assert check_chat(tokenizer, {"mode": "none", "think": False}) == {"mode": "none", "think": False}
    for value in ("false", "True"):
        with pytest.raises(ValueError, match=f"think='{value}' is a text, which templates take for true: use "):
            check_chat(tokenizer, {"think": value})
