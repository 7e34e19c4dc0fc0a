"""Chats of Inspect as prompts, the thinking of earlier answers in them, and tool calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver, use_tools
from inspect_ai.tool import Tool, ToolCall, ToolInfo, tool
from inspect_runs import PROBLEMS, chains, run, samples_of
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.harness.chat import tool_calls
from stepsal.harness.provider import StepsalAPI


@tool
def add() -> Tool:
    async def execute(x: int, y: int) -> int:
        """Add two numbers.

        Args:
            x: The first.
            y: The second.
        """
        return x + y

    return execute


CALL = '<tool_call>{"name": "add", "arguments": {"x": 2, "y": 3}}</tool_call>'


@pytest.mark.slow
def test_a_tool_is_called(tmp_path: Path) -> None:
    """SmolLM2 is too small to choose a tool, but it repeats a call that it is told to make."""
    task = Task(
        [Sample(f"Repeat this line and nothing else:\n{CALL}", target="5")],
        solver=[use_tools(add()), generate(tool_calls="single")], scorer=includes(),
    )  # fmt: skip
    (sample,) = samples_of(run(task, tmp_path, "stepsal/smollm2", max_tokens=60))
    calls = [m for m in sample.messages if isinstance(m, ChatMessageAssistant) and m.tool_calls]
    assert calls[0].tool_calls[0].function == "add"
    assert calls[0].tool_calls[0].arguments == {"x": 2, "y": 3}
    (answer,) = (m for m in sample.messages if isinstance(m, ChatMessageTool))
    assert answer.text == "5"


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        (r"The answer is \boxed{\frac{1}{2}}.", r"The answer is \boxed{\frac{1}{2}}.", []),
        ('```json\n{"name": "x", "arguments": {}}\n```', '```json\n{"name": "x", "arguments": {}}\n```', []),
        (f"So: {CALL}", "So:", [("add", {"x": 2, "y": 3})]),
        ('<tool_call>{"name": "list_files"}</tool_call>', "", [("list_files", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": {\\"b\\": 1}}"}</tool_call>', "", [("f", {"a": {"b": 1}})]),
        (f"{CALL}\n{CALL}", "", [("add", {"x": 2, "y": 3})] * 2),
    ],
)
def test_what_is_a_tool_call(text: str, rest: str, calls: list[tuple[str, dict]]) -> None:
    words, parsed = tool_calls(text)
    assert words == rest
    assert [(call.function, call.arguments, call.parse_error) for call in parsed] == [(*call, None) for call in calls]


def test_a_call_that_cannot_be_read_is_told_to_the_model() -> None:
    for text in ("<tool_call>{</tool_call>", "<tool_call>[1]</tool_call>", '<tool_call>{"arguments": {}}</tool_call>'):
        (call,) = tool_calls(text)[1]
        assert "is no call" in call.parse_error


FIRST = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}"
TEMPLATES = {  # what templates make of earlier answers
    # R1-Distill and Nemotron
    "dropped": FIRST + "<A>{{ m.content.split('</think>')[-1].lstrip() }}<E>{% endif %}{% endfor %}<A><think>\n",
    # QwQ, without the last line of Qwen3
    "kept": FIRST + "<A>{{ m.content }}<E>{% endif %}{% endfor %}<A><think>\n",
    # the embedded reasoner: it opens the thinking of each answer
    "opened": FIRST + "<A><think>\n{{ m.content }}<E>{% endif %}{% endfor %}<A><think>\n",
    # Qwen3 and GLM: only what comes after the last question is kept
    "field": (
        "{% set last = namespace(i=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.i = loop.index0 %}"
        "{% endif %}{% endfor %}" + FIRST + "<A>{% if m.reasoning_content and loop.index0 > last.i %}<think>\n"
        "{{ m.reasoning_content.strip('\n') }}\n</think>\n\n{% endif %}{{ m.content }}<E>{% endif %}{% endfor %}<A>"
    ),
    # as it may be where a template puts an empty thinking to answers without one
    "emptied": FIRST + "<A>{% if '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<E>{% endif %}{% endfor %}<A>",
    # GPT-OSS
    "harmony": FIRST + "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}<|start|>assistant",
}
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
HISTORIES = {  # the two answers in the prompt: as the template decides, with all thinking, with the last one
    "dropped": ("<A>1<E>", "<A>2<E>", "<A><think>R1</think>1<E>", "<A><think>R2</think>2<E>"),
    "kept": ("<A><think>R1</think>1<E>", "<A><think>R2</think>2<E>") * 2,
    "opened": ("<A><think>R1</think>1<E>", "<A><think>R2</think>2<E>") * 2,
    "field": ("<A>1<E>", "<A>2<E>", "<A><think>R1</think>1<E>", "<A><think>R2</think>2<E>"),
    "emptied": ("<A>1<E>", "<A>2<E>", "<A><think>R1</think>1<E>", "<A><think>R2</think>2<E>"),
    "harmony": (
        f"<|start|>assistant{FINAL}1<|end|>", f"<|start|>assistant{FINAL}2<|end|>",
        f"<|start|>assistant{ANALYSIS}R1<|end|><|start|>assistant{FINAL}1<|end|>",
        f"<|start|>assistant{ANALYSIS}R2<|end|><|start|>assistant{FINAL}2<|end|>",
    ),
}  # fmt: skip
PLAIN_ANSWERS = {  # without any thinking
    "opened": ("<A><think>\n1<E>", "<A><think>\n2<E>"),
    "emptied": ("<A><think>\n\n</think>\n\n1<E>", "<A><think>\n\n</think>\n\n2<E>"),
    "harmony": HISTORIES["harmony"][:2],
}
STRICT = (  # as Gemma's: no system prompt, user and assistant take turns
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<model>"
)


@pytest.mark.slow
class TestRendering:
    @pytest.fixture(scope="class")
    def api(self) -> StepsalAPI:
        return get_model("stepsal/mini").api

    def test_the_prompt_is_that_of_generate(self, api: StepsalAPI, mini: TransformerBridge) -> None:
        question = PROBLEMS[0].question
        assert (
            api.render([ChatMessageUser(content=question)], [])
            == stepsal.trace.render_prompt(mini.tokenizer, question).text
        )

    def test_reasoning_of_earlier_answers(self, api: StepsalAPI) -> None:
        answer = ChatMessageAssistant(content=[ContentReasoning(reasoning="A needs B."), ContentText(text="A = 1.")])
        chat = [ChatMessageUser(content="What is A?"), answer, ChatMessageUser(content="And B?")]
        assert api.render(chat, []) == (
            "<|endoftext|><|user|>What is A?<|assistant|><think>A needs B.</think>A = 1.<|endoftext|>"
            "<|user|>And B?<|assistant|><think>"
        )

    def test_inspect_leaves_reasoning_out_when_told_to(self, tmp_path: Path) -> None:
        @solver
        def twice() -> Solver:
            async def solve(state: TaskState, generate: Generate) -> TaskState:
                state = await generate(state)
                state.messages.append(ChatMessageUser(content=PROBLEMS[0].question))
                return await generate(state)

            return solve

        lengths = {}
        for history in ("none", "all"):
            samples = samples_of(run(chains(twice()), tmp_path, reasoning_history=history, limit=1))
            lengths[history] = samples[0].output.usage.input_tokens
        assert lengths["all"] > lengths["none"] + 5

    def test_system_messages_are_joined(self) -> None:
        api = get_model("stepsal/smollm2").api
        chat = [
            ChatMessageSystem(content="Be kind."),
            ChatMessageUser(content="Hi"),
            ChatMessageSystem(content="Be brief."),
        ]
        text = api.render(chat, [])
        assert text.count("<|im_start|>system") == 1
        assert "Be kind.\n\nBe brief." in text

    def test_tool_calls_and_results(self) -> None:
        api = get_model("stepsal/smollm2").api
        call = ToolCall(id="1", function="add", arguments={"x": 2, "y": 3})
        chat = [ChatMessageUser(content="2 + 3?"), ChatMessageAssistant(content="", tool_calls=[call]),
                ChatMessageTool(content="5", tool_call_id="1", function="add")]  # fmt: skip
        text = api.render(chat, [])
        assert CALL in text
        assert "<|im_start|>user\n<tool_response>5</tool_response><|im_end|>" in text

    def test_pictures_are_refused(self, api: StepsalAPI) -> None:
        picture = ContentImage(image="data:image/png;base64,AAAA")
        with pytest.raises(ValueError, match="read text only, but a message of the user has image"):
            api.render([ChatMessageUser(content=[picture])], [])

    def test_tokens_are_counted_by_the_model(self, api: StepsalAPI, mini: TransformerBridge) -> None:
        text = "Anna needs Hugo."
        assert anyio.run(api.count_text_tokens, text) == len(mini.tokenizer(text)["input_ids"])

    @pytest.fixture
    def with_template(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], StepsalAPI]:
        api = get_model("stepsal/mini").api

        def changed(template: str) -> StepsalAPI:
            monkeypatch.setattr(api.model.tokenizer, "chat_template", template)
            return api

        return changed

    def test_a_template_without_system_prompt_and_tools(self, with_template: Callable[[str], StepsalAPI]) -> None:
        call = ToolCall(id="1", function="add", arguments={"x": 2, "y": 3})
        chat = [ChatMessageSystem(content="Be kind."), ChatMessageUser(content="2 + 3?"),
                ChatMessageAssistant(content="", tool_calls=[call]),
                ChatMessageTool(content="5", tool_call_id="1", function="add")]  # fmt: skip
        text = with_template(STRICT).render(chat, [ToolInfo(name="add", description="Add.")])
        assert text.startswith("<user>Be kind.") or text.startswith("<user>You may call functions")
        assert f"<assistant>\n{CALL}<user><tool_response>5</tool_response><model>" in text
        assert with_template(STRICT).render([ChatMessageSystem(content="Hi")], []) == "<user>Hi<model>"

    def test_chats_that_cannot_be_answered(self, with_template: Callable[[str], StepsalAPI]) -> None:
        api = get_model("stepsal/mini").api
        with pytest.raises(ValueError, match="the last message is the assistant's"):
            api.render([ChatMessageUser(content="A?"), ChatMessageAssistant(content="The answer is")], [])
        with pytest.raises(ValueError, match="tools are not supported for Harmony"):
            with_template("<|channel|>").render([ChatMessageUser(content="A?")], [ToolInfo(name="f", description="")])
        api = with_template("{{ raise_exception('take turns') }}")
        with pytest.raises(ValueError, match="refuses this chat: take turns"):
            api.render([ChatMessageUser(content="A?")], [])


def answer(thinking: str, text: str) -> ChatMessageAssistant:
    return ChatMessageAssistant(content=[ContentReasoning(reasoning=thinking), ContentText(text=text)])


class TestHistory:
    """The thinking of earlier answers: the template decides, unless Inspect's `reasoning_history` does."""

    @pytest.mark.parametrize("kind", TEMPLATES)
    @pytest.mark.parametrize("history", [None, "auto", "all", "last", "none"])
    def test_is_what_was_asked_for(self, kind: str, history: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = get_model("stepsal/mini", format="harmony" if kind == "harmony" else "think")
        api = model.api
        monkeypatch.setattr(api.model.tokenizer, "chat_template", TEMPLATES[kind])
        chat = [ChatMessageUser(content="A"), answer("R1", "1"), ChatMessageUser(content="B"), answer("R2", "2"),
                ChatMessageUser(content="C <think> <think>")]  # fmt: skip
        config = GenerateConfig(max_tokens=1, reasoning_history=history)
        output = anyio.run(partial(model.generate, chat, config=config))
        kept = api._kept[output.message.id]
        prompt = api.model.tokenizer.decode(kept.tokens[: kept.n_prompt])
        by_template, kept_all = HISTORIES[kind][:2], HISTORIES[kind][2:]
        plain = PLAIN_ANSWERS.get(kind, ("<A>1<E>", "<A>2<E>"))
        first, second = {
            None: by_template, "auto": by_template, "all": kept_all, "none": plain, "last": (plain[0], kept_all[1])
        }[history]  # fmt: skip
        assert prompt.startswith(f"<|endoftext|><U>A{first}<U>B{second}<U>C <think> <think><")

    def test_a_template_keeps_what_belongs_to_the_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        api = get_model("stepsal/mini").api
        monkeypatch.setattr(api.model.tokenizer, "chat_template", TEMPLATES["field"] + "{# <tool_call> #}")
        result = ChatMessageTool(content="5", tool_call_id="1", function="add")
        call = ToolCall(id="1", function="add", arguments={"x": 2})
        asked = answer("\n\nR1", "").model_copy(update={"tool_calls": [call]})
        for keep in (False, True):
            text = api.render([ChatMessageUser(content="A"), asked, result], [], keep_thinking=keep)
            assert "<A><think>\nR1\n</think>\n\n<E>" in text  # with its white space stripped, as the template has it

    @pytest.mark.parametrize("text", ["<think> <think>", "<think>\n<think>x</think>", "a <think><think> b", "</think>"])
    def test_texts_of_the_user_and_of_the_system_are_left_alone(self, text: str) -> None:
        api = get_model("stepsal/mini").api
        chat = [ChatMessageSystem(content=f"S {text}"), ChatMessageUser(content=text), answer("R1", f"1 {text}"),
                ChatMessageUser(content=f"B {text}")]  # fmt: skip
        for keep in (False, True):
            prompt = api.render(chat, [], keep_thinking=keep)
            assert prompt == (
                f"<|endoftext|><|user|>S {text}<|user|>{text}<|assistant|><think>R1</think>1 {text}<|endoftext|>"
                f"<|user|>B {text}<|assistant|><think>"
            )

    @pytest.mark.parametrize(
        ("format", "content"),
        [
            ("magistral", "[THINK]R1[/THINK]1"),
            ("openthoughts", "<|begin_of_thought|>R1<|end_of_thought|>1"),
            ("Final answer:", "R1Final answer:1"),
            ("plain", "<think>R1</think>1"),
        ],
    )
    def test_is_marked_as_the_model_marks_it(self, format: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
        api = get_model("stepsal/mini", format=format).api
        monkeypatch.setattr(api.model.tokenizer, "chat_template", TEMPLATES["kept"])
        chat = [ChatMessageUser(content="A"), answer("R1", "1"), ChatMessageUser(content="B")]
        assert f"<U>A<A>{content}<E><U>B" in api.render(chat, [])

    def test_without_a_place_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        api = get_model("stepsal/mini").api
        monkeypatch.setattr(api.model.tokenizer, "chat_template", "{{ messages[-1].content }}<A>")
        chat = [ChatMessageUser(content="A"), answer("R1", "1"), ChatMessageUser(content="B")]
        assert api.render(chat, []) == "B<A>"
        with pytest.raises(
            ValueError, match="leaves no place for the thinking of earlier answers: use reasoning_history"
        ):
            api.render(chat, [], keep_thinking=True)
