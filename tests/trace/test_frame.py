"""Conversations in the structures of public chat templates: each question, thinking and summary where it belongs.

Templates are told by their parts and written anew here. Their marks are tokens of their own, all else is one token a
letter.
"""

from __future__ import annotations

import re
from itertools import groupby, product
from typing import Any, NamedTuple

import pytest
from tiny_models import char_tokenizer

from stepsal.trace import FORMATS, PromptFrame, Segmentation, Trace, render_prompt
from stepsal.trace.template import switches_of
from stepsal.trace.tracking import Section, SequenceTracker

THOUGHT = "Count them all first. Then count them again."
SECTIONS = {"question": Section.QUESTION, "thinking": Section.THINKING, "summary": Section.SUMMARY}
QUESTIONS = ("How many legs?", "And why\nis that so?", "user or assistant?")


def template(
    user: str,
    assistant: str,
    *,
    before: str = "",
    system: str | None = None,
    default: str = "",
    prompt: str | None = None,
    drops_thinking: bool = False,
) -> str:
    """A chat template by its parts, in which @q, @a and @s stand for question, answer and system prompt.

    Args:
        user: a user's message.
        assistant: an assistant's message.
        before: begins the text.
        system: a system message; None refuses the role, "in user" puts the text into the first user message.
        default: the system message where none is given.
        prompt: where the answer is to begin; None is what stands before the answer.
        drops_thinking: takes the thinking out of earlier answers.
    """
    head = before
    if system is None:
        head += "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    elif system == "in user":
        head += "{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        user = user.replace("@q", "{% if loop.index0 == (1 if s else 0) %}{{ s }}{% endif %}@q")
    else:
        given = system.replace("@s", "{{ messages[0].content }}")
        head += "{% if messages[0].role == 'system' %}" + given + "{% else %}" + default + "{% endif %}"
    answer = "{{ m.content.split('</think>')[-1] }}" if drops_thinking else "{{ m.content }}"
    messages = (
        "{% for m in messages %}{% if m.role == 'user' %}" + user.replace("@q", "{{ m.content }}")
        + "{% elif m.role == 'assistant' %}" + assistant.replace("@a", answer) + "{% endif %}{% endfor %}"
    )  # fmt: skip
    return head + messages + (assistant.partition("@a")[0] if prompt is None else prompt)


class Family(NamedTuple):
    """A template with the frame that it should have; `history` is what earlier answers count as."""

    template: str
    opening: str
    tail: str
    history: str = "both"  # thinking and summary; or only one of them, where the template drops the thinking
    system_in_question: bool = False


CHATML = ("<|im_start|>user\n@q<|im_end|>\n", "<|im_start|>assistant\n@a<|im_end|>\n")
CHATML_FRAME = ("<|im_start|>user", "<|im_end|>\n<|im_start|>assistant")
CHATML_SYSTEM = {
    "system": "<|im_start|>system\n@s<|im_end|>\n", "default": "<|im_start|>system\nYou help.<|im_end|>\n",
}  # fmt: skip
EMPTY_THINKING = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
HEADER = "<|start_header_id|>%s<|end_header_id|>\n\n@%s<|eot_id|>"
ROLE = "<|start_of_role|>%s<|end_of_role|>@%s<|end_of_text|>\n"
TURN = "<|START_OF_TURN_TOKEN|><|%s_TOKEN|>@%s<|END_OF_TURN_TOKEN|>"
DEEPSEEK = {"before": "<｜begin▁of▁sentence｜>", "system": "@s"}
FAMILIES = {
    "ChatML": Family(template(*CHATML), *CHATML_FRAME),
    "ChatML with a system prompt of its own": Family(template(*CHATML, **CHATML_SYSTEM), *CHATML_FRAME),
    "Qwen3": Family(
        template(*CHATML, prompt="<|im_start|>assistant\n" + EMPTY_THINKING, system=CHATML_SYSTEM["system"],
                 drops_thinking=True),
        *CHATML_FRAME, history="thinking",  # without any marker
    ),
    "QwQ": Family(
        template(*CHATML, **CHATML_SYSTEM, prompt="<|im_start|>assistant\n<think>\n", drops_thinking=True),
        *CHATML_FRAME, history="summary",
    ),
    "SmolLM3": Family(
        template(
            *CHATML, prompt="<|im_start|>assistant\n" + EMPTY_THINKING,
            before="<|im_start|>system\nMode: {{ '/think' if enable_thinking else '/no_think' }}<|im_end|>\n",
        ),
        *CHATML_FRAME,
    ),
    "Gemma": Family(
        template("<start_of_turn>user\n@q<end_of_turn>\n", "<start_of_turn>model\n@a<end_of_turn>\n", before="<bos>",
                 system="in user"),
        "<start_of_turn>user", "<end_of_turn>\n<start_of_turn>model", system_in_question=True,
    ),
    "Mistral": Family(
        template("[INST] @q[/INST]", " @a</s>", before="<s>", system="in user"), "[INST]", "[/INST]",
        system_in_question=True,
    ),
    "Magistral": Family(
        template("[INST]@q[/INST]", "@a</s>", before="<s>", system="[SYSTEM_PROMPT]@s[/SYSTEM_PROMPT]",
                 default="[SYSTEM_PROMPT]First think, then answer.[/SYSTEM_PROMPT]"),
        "[INST]", "[/INST]",
    ),
    "Llama 2": Family(
        template("<s>[INST] @q [/INST]", " @a </s>", system="in user"), "<s>[INST]", "[/INST]",
        system_in_question=True,
    ),
    "Llama 3": Family(
        template(HEADER % ("user", "q"), HEADER % ("assistant", "a"), before="<|begin_of_text|>",
                 system=HEADER % ("system", "s"),
                 default=(HEADER % ("system", "s")).replace("@s", "Today: {{ date_string }}")),
        "<|start_header_id|>user<|end_header_id|>", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    ),
    "Phi-3": Family(
        template("<|user|>\n@q<|end|>\n", "<|assistant|>\n@a<|end|>\n", system="<|system|>\n@s<|end|>\n"),
        "<|user|>", "<|end|>\n<|assistant|>",
    ),
    "Phi-4": Family(
        template("<|im_start|>user<|im_sep|>@q<|im_end|>", "<|im_start|>assistant<|im_sep|>@a<|im_end|>",
                 system="<|im_start|>system<|im_sep|>@s<|im_end|>",
                 default="<|im_start|>system<|im_sep|>You are Phi.<|im_end|>"),
        "<|im_start|>user<|im_sep|>", "<|im_end|><|im_start|>assistant<|im_sep|>",
    ),
    "GPT-OSS": Family(
        template("<|start|>user<|message|>@q<|end|>", "<|start|>assistant<|channel|>final<|message|>@a<|end|>",
                 before="<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>",
                 system="<|start|>developer<|message|>@s<|end|>", prompt="<|start|>assistant", drops_thinking=True),
        "<|start|>user<|message|>", "<|end|><|start|>assistant", history="summary",
    ),
    "DeepSeek-R1": Family(
        template("<｜User｜>@q", "<｜Assistant｜>@a<｜end▁of▁sentence｜>", **DEEPSEEK, drops_thinking=True,
                 prompt="<｜Assistant｜><think>\n"),
        "<｜User｜>", "<｜Assistant｜>", history="summary",
    ),
    "DeepSeek-V3.1": Family(
        template("<｜User｜>@q", "<｜Assistant｜></think>@a<｜end▁of▁sentence｜>", **DEEPSEEK, drops_thinking=True,
                 prompt="<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}"),
        "<｜User｜>", "<｜Assistant｜>", history="summary",
    ),
    "Command-R": Family(
        template(TURN % ("USER", "q"), TURN % ("CHATBOT", "a"), before="<BOS_TOKEN>", system=TURN % ("SYSTEM", "s")),
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "Granite": Family(
        template(ROLE % ("user", "q"), ROLE % ("assistant", "a"), system=ROLE % ("system", "s"),
                 default=(ROLE % ("system", "s")).replace("@s", "You are Granite.{% if thinking %} Think.{% endif %}")),
        "<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    ),
    "GLM-4.5": Family(  # a switch writes behind the question
        template("<|user|>\n@q{% if enable_thinking is false %}/nothink{% endif %}", "<|assistant|>\n@a",
                 before="[gMASK]<sop>", system="<|system|>\n@s",
                 prompt="<|assistant|>{% if enable_thinking is false %}\n<think></think>\n{% endif %}"),
        "<|user|>", "<|assistant|>",
    ),
    "Hunyuan": Family(  # a switch writes before the question
        template("<｜hy_User｜>{% if enable_thinking is false %}/no_think{% endif %}@q", 
                 "<｜hy_Assistant｜>@a<｜hy_eos｜>", before="<｜hy_bos｜>", system="@s<｜hy_sep｜>"),
        "<｜hy_User｜>", "<｜hy_Assistant｜>",
    ),
    "OLMo": Family(
        template("<|user|>\n@q\n", "<|assistant|>\n@a<|endoftext|>\n", before="<|endoftext|>",
                 system="<|system|>\n@s\n"),
        "<|user|>", "<|assistant|>",
    ),
    "Seed-OSS": Family(
        template("<seed:bos>user\n@q<seed:eos>", "<seed:bos>assistant\n@a<seed:eos>",
                 system="<seed:bos>system\n@s<seed:eos>"),
        "<seed:bos>user", "<seed:eos><seed:bos>assistant",
    ),
    "one token that begins and ends": Family(
        template("<user>@q", "<assistant>@a<eos>", before="<eos>"), "<user>", "<assistant>",
    ),
    "Vicuna": Family(  # no marks, only words
        template("USER: @q ASSISTANT:", " @a</s>", system="@s ", default="A chat of two. "), "USER:", "ASSISTANT:",
    ),
    "Alpaca": Family(
        template("### Instruction:\n@q\n\n", "### Response:\n@a\n\n", system="@s\n\n", default="Below is a task.\n\n"),
        "### Instruction:", "### Response:",
    ),
}  # fmt: skip
NAMES = list(FAMILIES)
SYSTEMS = (None, "Be kind.", "Answer in one word, user")


def tokenizer_of(chat_template: str) -> Any:
    tokenizer = char_tokenizer()
    marks = dict.fromkeys(re.findall(r"<[^<>{}%\n ]+>|\[/?[A-Z_a-z]+\]|｜", chat_template))
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokenizer.all_special_tokens, *marks]})
    tokenizer.chat_template = chat_template
    return tokenizer


def tracker_of(tokenizer: Any, text: str, format: str, **options: Any) -> tuple[SequenceTracker, list[int]]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    tracker = SequenceTracker(tokenizer, PromptFrame.of(tokenizer), FORMATS[format], **options)
    tracker.push(ids)
    return tracker, ids


def texts_of(tokenizer: Any, tracker: SequenceTracker, ids: list[int]) -> list[tuple[str, str]]:
    """The text of each run of a section, without white space."""
    tokens = [(s, i) for s, i in zip(tracker.sections, ids, strict=True) if s is not Section.OTHER]
    return [
        (section.name.lower(), "".join(tokenizer.decode([i for _, i in run]).split()))
        for section, run in groupby(tokens, key=lambda token: token[0])
    ]


def answers_to(prompt: str, format: str) -> tuple[str, list[tuple[str, str]]]:
    """An answer that fits the end of a prompt, with its sections."""
    thinking, summary = ("thinking", "".join(THOUGHT.split())), ("summary", "Two.")
    if format == "harmony":
        final = "<|start|>assistant<|channel|>final<|message|>"
        return f"<|channel|>analysis<|message|>{THOUGHT}<|end|>{final}Two.", [thinking, summary]
    if prompt.rstrip().endswith("</think>"):
        return "Two.", [summary]
    opened = prompt.rstrip().endswith("<think>")
    return f"{'' if opened else '<think>'}{THOUGHT}</think>Two.", [thinking, summary]


def settings_of(tokenizer: Any) -> list[dict[str, Any]]:
    """The switches of a template with each of their values, one at a time."""
    return [{}, *({name: value} for name, values in switches_of(tokenizer).items() for value in values)]


@pytest.mark.parametrize("name", NAMES)
def test_the_frame_of_a_family(name: str) -> None:
    family = FAMILIES[name]
    frame = PromptFrame.of(tokenizer_of(family.template))
    assert (frame.opening, frame.tail) == (family.opening, family.tail)


@pytest.mark.parametrize(("name", "n_turns"), product(NAMES, (1, 2, 3)))
def test_a_conversation(name: str, n_turns: int) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(FAMILIES[name].template)
    format = "harmony" if name == "GPT-OSS" else "think"
    for system, chat in product(SYSTEMS, settings_of(tokenizer)):
        if system and ("no system role" in family.template or family.system_in_question):
            continue
        messages, expected = [{"role": "system", "content": system}] if system else [], []
        for question in QUESTIONS[: n_turns - 1]:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": f"<think>{THOUGHT}</think>Two."})
            expected.append(("question", question))
            expected += [("thinking", THOUGHT), ("summary", "Two.")] if family.history == "both" else []
            expected += [(family.history, "Two.")] if family.history != "both" else []
        messages.append({"role": "user", "content": QUESTIONS[n_turns - 1]})
        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **chat)
        except TypeError:  # a value that is none of this switch
            continue
        response, sections = answers_to(prompt, format)
        expected = [(role, "".join(text.split())) for role, text in expected]
        expected += [("question", "".join(QUESTIONS[n_turns - 1].split())), *sections]
        tracker, ids = tracker_of(tokenizer, prompt + response, format)
        texts = [
            (role, text.removeprefix("/no_think").removesuffix("/nothink") if role == "question" else text)
            for role, text in texts_of(tokenizer, tracker, ids)
        ]
        assert texts == expected, (system, chat)
        assert tokenizer.decode(ids[tracker.origin :]).startswith(family.opening) == (n_turns > 1) or n_turns == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_online_equals_the_trace(name: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[name].template)
    format = "harmony" if name == "GPT-OSS" else "think"
    for chat in settings_of(tokenizer):
        prompt = render_prompt(tokenizer, QUESTIONS[1], chat=chat)
        response, _ = answers_to(prompt.text, format)
        trace = Trace.from_text(QUESTIONS[1], response, tokenizer, segmentation=Segmentation(format), chat=chat)
        tracker, _ = tracker_of(tokenizer, trace.text, format)
        expected = [SECTIONS[trace.roles[i]] if i >= 0 else Section.OTHER for i in trace.step_ids.tolist()]
        switched = any(mark in prompt.text for mark in ("/no_think", "/nothink"))  # stand in the user's message
        assert switched or tracker.sections == expected
        assert trace.chat == chat


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].system_in_question])
def test_a_system_prompt_in_the_users_turn_belongs_to_the_question(name: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[name].template)
    prompt = render_prompt(tokenizer, "How many?", "Be kind.")
    tracker, ids = tracker_of(tokenizer, prompt.text, "think")
    assert texts_of(tokenizer, tracker, ids) == [("question", "Bekind.Howmany?")]


def test_a_model_that_ends_its_answer_otherwise_than_a_history() -> None:
    """GPT-OSS writes <|return|>, where the template puts <|end|> into a history."""
    tokenizer = tokenizer_of(FAMILIES["GPT-OSS"].template + "{# <|return|> #}")
    first = render_prompt(tokenizer, "How many?").text
    response, sections = answers_to(first, "harmony")
    text = f"{first}{response}<|return|><|start|>user<|message|>Why?<|end|><|start|>assistant{response}"
    tracker, ids = tracker_of(tokenizer, text, "harmony")
    assert texts_of(tokenizer, tracker, ids) == [("question", "Howmany?"), *sections, ("question", "Why?"), *sections]


@pytest.mark.parametrize("name", ["QwQ", "DeepSeek-V3.1", "Qwen3", "Gemma"])
def test_the_whole_prompt_as_question(name: str) -> None:
    """What the template writes behind its tail belongs to the prompt, and an answer's own marker does not."""
    tokenizer = tokenizer_of(FAMILIES[name].template)
    prompt = render_prompt(tokenizer, "How many?").text
    response, _ = answers_to(prompt, "think")
    tracker, _ = tracker_of(tokenizer, prompt + response, "think", whole_prompt=True)
    n_prompt = len(tokenizer(prompt)["input_ids"])
    assert set(tracker.sections[:n_prompt]) == {Section.QUESTION}
    assert Section.QUESTION not in tracker.sections[n_prompt:]


@pytest.mark.parametrize(
    ("parts", "opening", "tail"),
    [
        (("@q\n<a>", "@a</s>\n"), "", "<a>"),  # nothing before a question
        (("\n@q<a>", "@a"), "", "<a>"),  # white space alone
        (("{{ 'Question' if loop.first else 'Next' }}: @q<a>", "@a\n"), "", "<a>"),  # only a colon is shared
        (("{{ 'A new' if loop.first else 'One more' }} question: @q<a>", "@a\n"), "question:", "<a>"),
        (("<u>@q<sep>", "<old>@a<sep>"), "<u>", "<sep><a>"),  # earlier answers have another header than the next one
    ],
)
def test_templates_whose_turns_differ(parts: tuple[str, str], opening: str, tail: str) -> None:
    prompt = "<a>" if "<sep>" in parts[0] else ""
    frame = PromptFrame.of(tokenizer_of(template(*parts, before="<s>", prompt=prompt)))
    assert (frame.opening, frame.tail) == (opening, tail)
    assert frame.head.startswith("<s>")


def test_without_an_opening_only_the_first_question_is_told() -> None:
    tokenizer = tokenizer_of(template("@q\n<a>", "@a</s>\n", before="<s>", prompt=""))
    text = f"<s>How many?\n<a>{THOUGHT}</think>Two.</s>\nWhy?\n<a>{THOUGHT}</think>So."
    tracker, ids = tracker_of(tokenizer, text, "think")
    assert texts_of(tokenizer, tracker, ids)[0] == ("question", "Howmany?")
    assert (tracker.origin, [s for s, _ in texts_of(tokenizer, tracker, ids)].count("question")) == (0, 1)


def test_words_that_the_template_writes_for_the_model_are_no_answer() -> None:
    tokenizer = tokenizer_of(template("<u>@q", "<a>@a</s>", before="<s>", prompt="<a><think>\nOkay, "))
    assert PromptFrame.of(tokenizer).tail == "<a><think>\nOkay,"
    text = render_prompt(tokenizer, "How many?").text
    tracker, ids = tracker_of(tokenizer, text + "one. It is one.", "think")
    assert texts_of(tokenizer, tracker, ids) == [("question", "Howmany?"), ("thinking", "one.Itisone.")]


def test_a_template_of_single_questions() -> None:
    """What comes before an answer is known; turns can't be, and need not."""
    single = "<s><u>{{ messages[-1].content }}<a>"
    refuses = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}" + single
    for chat_template in (single, refuses):
        frame = PromptFrame.of(tokenizer_of(chat_template))
        assert (frame.opening.removeprefix("<s>"), frame.tail) == ("<u>", "<a>")


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>"])
@pytest.mark.parametrize("name", ["ChatML", "ChatML with a system prompt of its own", "QwQ", "Phi-4", "Qwen3"])
def test_a_token_that_begins_texts_and_messages(name: str, token: str) -> None:
    """SmolLM2's BOS begins each message; without it the opening would be the word "user", which any answer may have."""
    tokenizer = tokenizer_of(FAMILIES[name].template)
    tokenizer.bos_token = token
    assert PromptFrame.of(tokenizer).opening == FAMILIES[name].opening
    text = render_prompt(tokenizer, "Is a user < 4?").text + "<think>A user is one.</think>Ask the user."
    tracker, ids = tracker_of(tokenizer, text, "think")
    assert tracker.origin == 0
    assert texts_of(tokenizer, tracker, ids)[0] == ("question", "Isauser<4?")


TOOL = (
    "<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"
    "<|start|>functions.add to=assistant<|channel|>commentary<|message|>4<|end|>"
)
FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("name", "answers", "sections"),
    [
        (
            "ChatML",
            ("<think>One.</think>Working.<think>Check.</think>Done.", "<think>So.</think>Yes.<think>Hm.</think>No."),
            (("TOne.", "SWorking.", "TCheck.", "SDone."), ("TSo.", "SYes.", "THm.", "SNo.")),
        ),
        ("ChatML", ("<think>Cut off", "<think>So.</think>Yes."), (("TCutoff",), ("TSo.", "SYes."))),
        ("ChatML", ("<think>A<think>b</think>c.", "<think>So.</think>Yes."), (("TAbc.",), ("TSo.", "SYes."))),
        (
            "GPT-OSS",
            (
                f"<|channel|>analysis<|message|>One.<|end|>{TOOL}<|start|>assistant<|channel|>analysis<|message|>Two."
                f"<|end|>{FINAL}Four.",
                f"<|channel|>analysis<|message|>So.<|end|>{FINAL}Yes.",
            ),
            (("TOne.Two.", "SFour."), ("TSo.", "SYes.")),
        ),
    ],
)
def test_thinking_that_begins_again_in_each_of_two_turns(
    name: str, answers: tuple[str, str], sections: tuple[tuple[str, ...], ...]
) -> None:
    tokenizer = tokenizer_of(FAMILIES[name].template + f"{{# {TOOL} #}}")
    first, second = (render_prompt(tokenizer, question).text for question in ("How many?", "Why?"))
    later = second[second.index(FAMILIES[name].opening) :]  # without what stands before the first turn only
    text = first + answers[0] + later + answers[1]
    format = "harmony" if name == "GPT-OSS" else "think"
    tracker, ids = tracker_of(tokenizer, text, format)
    expected = ["QHowmany?", *sections[0], "QWhy?", *sections[1]]
    assert [role[0].upper() + text for role, text in texts_of(tokenizer, tracker, ids)] == expected
