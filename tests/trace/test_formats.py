"""Formats of model families: the sections of real structures, however the text arrives, and how a format is told."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsal.trace.formats import FORMATS, Format, Header
from stepsal.trace.recognition import opened_format, recognised_format, unknown_markers
from stepsal.trace.sections import section_texts
from stepsal.trace.segment import Segmentation

T, S = "thinking", "summary"
BOTH = [(T, "It is."), (S, "Two.")]
CHATML, LLAMA = "<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"

# family, format, end of the prompt, response, sections; texts are short, so that each run of steps is one step
STRUCTURES = [
    ("DeepSeek-R1", "think", "<｜Assistant｜><think>\n", "It is.\n</think>\n\nTwo.", BOTH),
    ("R1, marker repeated", "think", "<｜Assistant｜><think>\n", "<think>\nIt is.</think>Two.", BOTH),
    ("R1, no marker before", "think", "<｜Assistant｜>", "It is two.</think>Two.", [(T, "It is two."), (S, "Two.")]),
    ("DeepSeek-V3.1, thinking", "think", "<｜Assistant｜><think>", "It is.</think>Two.", BOTH),
    ("DeepSeek-V3.1, not thinking", "think", "<｜Assistant｜></think>", "Two.", [(S, "Two.")]),
    ("Qwen3", "think", CHATML, "<think>\nIt is.\n</think>\n\nTwo.<|im_end|>", BOTH),
    ("Qwen3, thinking off", "think", CHATML + "<think>\n\n</think>\n\n", "Two.<|im_end|>", [(S, "Two.")]),
    ("Qwen3, /no_think", "think", CHATML, "<think>\n\n</think>\n\nTwo.<|im_end|>", [(S, "Two.")]),
    ("QwQ, cut off", "think", CHATML + "<think>\n", "It is two, I", [(T, "It is two, I")]),
    ("GLM-4.5", "think", "<|assistant|>", "\n<think>It is.</think>\nTwo.", BOTH),
    ("Nemotron, Llama 3", "think", LLAMA, "<think>\nIt is.\n</think>\n\nTwo.", BOTH),
    ("Hunyuan", "think", "<|extra_0|>", "<think>\nIt is.\n</think>\n<answer>\nTwo.\n</answer>", BOTH),
    ("Granite 3.3", "think", "assistant<|end_of_role|>", "<think>It is.</think><response>Two.</response>", BOTH),
    ("K2 Thinking, twice", "think", CHATML, "<think>So.</think>Working.<think>check</think>Done",
     [(T, "So."), (S, "Working."), (T, "check"), (S, "Done")]),
    ("nested", "think", CHATML, "<think>Outer <think>inner</think> goes on</think>Visible",
     [(T, "Outer"), (T, "inner"), (T, "goes on"), (S, "Visible")]),
    ("nested, opened in the prompt", "think", "<think>\n", "Outer <think>inner</think> goes on</think>Visible",
     [(T, "Outer"), (T, "inner"), (T, "goes on"), (S, "Visible")]),
    ("nested, never closed", "think", "<think>\n", "The tag <think> opens.</think>It is two.",
     [(T, "The tag"), (T, "opens."), (S, "It is two.")]),
    ("nested, never closed and thinking again", "think", "<think>",
     "A <think> b </think> c </think> d <think> e <think> f",
     [(T, "A"), (T, "b"), (T, "c"), (S, "d"), (T, "e"), (T, "f")]),
    ("text before the thinking", "think", CHATML, "Sure.<think>It is.</think>Two.", [(T, "Sure."), *BOTH]),
    ("closed twice", "think", "<think>", "It is.</think>Two.</think>Yes.", [(T, "It is."), (S, "Two."), (S, "Yes.")]),
    ("Magistral", "magistral", "[/INST]", "[THINK]It is.[/THINK]Two.</s>", BOTH),
    ("Magistral, at once", "magistral", "[/INST]", "Two.</s>", [(S, "Two.")]),
    ("Magistral, opening lost", "magistral", "[/INST]", "It is.[/THINK]Two.</s>", BOTH),
    ("OpenThoughts", "openthoughts", CHATML,
     "<|begin_of_thought|>\n\nIt is.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nTwo.\n\n<|end_of_solution|>",
     BOTH),
    ("OpenThoughts, thought not closed", "openthoughts", CHATML,
     "<|begin_of_thought|>It is. <|begin_of_solution|>Two.<|end_of_solution|>", BOTH),
    ("EXAONE Deep", "exaone", "[|assistant|]<thought>\n", "It is.\n</thought>\n\nTwo.[|endofturn|]", BOTH),
    ("Granite 3.2", "granite", "assistant", "Here is my thought process: It is.\nHere is my response: Two.", BOTH),
    ("Granite 3.2, quantised", "granite", "<|end_of_role|>",
     "Here's my thought process:\nIt is.\n\nHere's my response:\nTwo.", BOTH),
    ("Seed-OSS", "seed-oss", "<seed:bos>assistant\n", "<seed:think>\nIt is.</seed:think>Two.<seed:eos>", BOTH),
    ("Kimi-VL", "kimi", "<|im_assistant|>assistant<|im_middle|>", "◁think▷It is.◁/think▷Two.", BOTH),
    ("Command A", "command", "<|CHATBOT_TOKEN|>",
     "<|START_THINKING|>It is.<|END_THINKING|><|START_RESPONSE|>Two.<|END_RESPONSE|>", BOTH),
    ("Command A, a tool", "command", "<|CHATBOT_TOKEN|>",
     '<|START_THINKING|>It is.<|END_THINKING|><|START_ACTION|>[{"tool": 1}]<|END_ACTION|>', [(T, "It is.")]),
    ("Apertus", "apertus", "<|assistant_start|>", "<|inner_prefix|>It is.<|inner_suffix|>Two.", BOTH),
    ("Gemma 4", "gemma", "<|turn>model\n", "<|channel>thought\nIt is.<channel|>Two.", BOTH),
    ("Gemma 4, thinking off", "gemma", "<|turn>model\n<|channel>thought\n<channel|>", "Two.", [(S, "Two.")]),
    ("MiniMax M3", "minimax", "<mm:think>\n", "It is.</mm:think>Two.", BOTH),
    ("Reflection", "reflection", LLAMA,
     "<thinking>It is. <reflection>Is it?</reflection></thinking><output>Two.</output>",
     [(T, "It is."), (T, "Is it?"), (S, "Two.")]),
    ("a prompt's tags", "reasoning", CHATML, "<reasoning>\nIt is.</reasoning>\n<answer>Two.</answer>", BOTH),
    ("a notebook's tags", "working-out", CHATML,
     "<start_working_out>It is.<end_working_out><SOLUTION>2</SOLUTION>", [(T, "It is."), (S, "2")]),
    ("GPT-OSS", "harmony", "<|start|>assistant",
     "<|channel|>analysis<|message|>It is.<|end|><|start|>assistant<|channel|>final<|message|>Two.<|return|>",
     BOTH),
    ("GPT-OSS, a type", "harmony", "<|start|>assistant",
     '<|channel|>final <|constrain|>json<|message|>{"answer": 42}<|return|>', [(S, '{"answer": 42}')]),
    ("GPT-OSS, no end", "harmony", "<|start|>assistant",
     "<|channel|>analysis<|message|>It is.<|start|>assistant<|channel|>final<|message|>Two.<|return|>",
     BOTH),
    ("GPT-OSS, no end and no start", "harmony", "<|start|>assistant",
     "<|channel|>analysis<|message|>It is.<|channel|>final<|message|>Two.<|return|>", BOTH),
    ("GPT-OSS, a tool of its own", "harmony", "<|start|>assistant",
     "<|channel|>analysis<|message|>It is.<|end|><|start|>assistant<|channel|>analysis to=python code<|message|>1 + 1"
     "<|call|><|start|>python to=assistant<|channel|>analysis<|message|>2<|end|><|start|>assistant<|channel|>final"
     "<|message|>Two.<|return|>", BOTH),
    ("GPT-OSS, a function", "harmony", "<|start|>assistant",
     " to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
     "<|start|>functions.add to=assistant<|channel|>commentary<|message|>2<|end|>"
     "<|start|>assistant<|channel|>analysis<|message|>It is.<|end|><|start|>assistant<|channel|>final<|message|>Two.",
     BOTH),
    ("GPT-OSS, recipient before the channel", "harmony", "<|start|>assistant",
     " to=python<|channel|>analysis code<|message|>1 + 1<|call|>", []),
    ("GPT-OSS, no channel", "harmony", "<|start|>assistant", "<|message|>Two.<|return|>", [(S, "Two.")]),
    ("GPT-OSS, the answer begun in the prompt", "harmony", "<|start|>assistant<|channel|>final<|message|>",
     "Two.<|return|>", [(S, "Two.")]),
    ("GPT-OSS, the channel begun in the prompt", "harmony", "<|start|>assistant<|channel|>analysis",
     "<|message|>It is.", [(T, "It is.")]),
    ("a marker of your own", Format.with_marker("Final Answer:\n"), CHATML, "It is.\nFinal Answer:\nTwo.", BOTH),
]  # fmt: skip
END_TOKENS = ("<|im_end|>", "</s>", "<seed:eos>", "[|endofturn|]")
IDS = [structure[0] for structure in STRUCTURES]


def runs(prompt: str, response: str, format: str | Format, pieces: list[str]) -> list[tuple[str, str]]:
    segmenter = Segmentation(format, split="paragraph", min_chars=0).segmenter(prompt, END_TOKENS)
    for piece in pieces:
        segmenter.push(piece)
    return [(role, response[start:end]) for role, start, end in segmenter.finish()]


@pytest.mark.parametrize(("family", "format", "prompt", "response", "expected"), STRUCTURES, ids=IDS)
def test_sections_of_real_structures(
    family: str, format: str | Format, prompt: str, response: str, expected: list[tuple[str, str]]
) -> None:
    for pieces in ([response], list(response), [response[i : i + 3] for i in range(0, len(response), 3)]):
        assert runs(prompt, response, format, pieces) == expected


@pytest.mark.parametrize(
    ("family", "format", "prompt", "response"),
    [
        structure[:4]
        for structure in STRUCTURES
        if isinstance(structure[1], str) and structure[0] != "Magistral, at once"
    ],
)
def test_text_and_prompt_tell_the_format(family: str, format: str, prompt: str, response: str) -> None:
    assert recognised_format(prompt, response) == format


def test_the_first_marker_tells_the_format() -> None:
    assert recognised_format("", "[THINK]Is <think> a tag?[/THINK]It is, as is </think>.") == "magistral"
    assert recognised_format("", "<think>Is [THINK] a tag?</think>It is.") == "think"
    assert recognised_format("<think>\n", "Is [THINK] or <|channel|> a tag?</think>It is.") == "think"
    assert recognised_format("<think>\n", "[THINK]Is it?[/THINK]It is.") == "magistral"
    assert recognised_format("", "Put it into <answer> and </answer>.") == "plain"  # of several formats
    assert recognised_format("", "Two.<|end|>") == "plain"  # of Phi-3
    assert recognised_format("", "The status is\n<response>ok</response>, in HTML <output>3</output>.") == "plain"
    assert recognised_format("", "I have written it down. Here is my response: Dear Ann, it is two.") == "plain"
    assert opened_format("Parse this: <response>a</response>\n") is None
    assert opened_format("<|start|>assistant") is None  # which any model with such a template has
    assert recognised_format("<|start|>assistant", "It is two.") == "plain"


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>finall",
        "<|channel|>",
        "<|start|>assistantassistant<|channel|>final",
        "",
        "<|channel|>final|",
        "x" * 300,
    ],
)
def test_a_header_that_cant_be_read_is_template_and_is_told(header: str) -> None:
    response = (
        f"<|channel|>analysis<|message|>It is.<|end|>{header}<|message|>Two.<|end|><|start|>assistant<|channel|>final"
    )
    response += "<|message|>Three."
    segmenter = Segmentation("harmony").segmenter("<|start|>assistant", END_TOKENS)
    segmenter.push(response)
    assert section_texts(segmenter, response) == {"thinking": "It is.", "summary": "Three."}
    assert segmenter.unread_headers == ("" if header.startswith("x") else header,)


@pytest.mark.parametrize(
    ("response", "unread"),
    [
        ("<|start|>assistant<|start|>assistant<|channel|>final<|message|>Two.", ("<|start|>assistant",)),
        ("<|channel|>analysis<|end|><|start|>assistant<|channel|>final<|message|>Two.", ("<|channel|>analysis",)),
        ("<|channel|>" + "a" * 300 + "<|channel|>final<|message|>Two.", ("<|channel|>" + "a" * 246,)),
    ],
)
def test_a_header_without_an_end(response: str, unread: tuple[str, ...]) -> None:
    segmenter = Segmentation("harmony").segmenter()
    segmenter.push(response)
    assert section_texts(segmenter, response)["summary"] == "Two."
    assert segmenter.unread_headers == unread


def test_a_header_that_is_cut_off_is_no_fault() -> None:
    segmenter = Segmentation("harmony").segmenter("<|start|>assistant")
    segmenter.push("<|channel|>analysis<|message|>It is.<|end|><|start|>assistant<|chan")
    segmenter.finish()
    assert segmenter.unread_headers == ()


@pytest.mark.parametrize(
    ("response", "tags"),
    [
        ("<scratchpad>It is.</scratchpad>Two.", ("</scratchpad>",)),
        ("[REASON]It is.[/REASON]Two.", ("[/REASON]",)),
        ("<|reserved_think|>It is.<|reserved_answer|>Two.", ("<|reserved_think|>", "<|reserved_answer|>")),
        ("<begin_of_reasoning>It is.<end_of_reasoning>Two.", ("<end_of_reasoning>",)),
        ("<inner_thoughts>It is.</inner_thoughts>Two.", ("</inner_thoughts>",)),
        ("It is.<｜end▁of▁thinking｜>Two.", ("<｜end▁of▁thinking｜>",)),
        ("<div class='a'>It is <b>two</b>, <i>I think</i>.</div>", ()),
        ("List<int> and Map<String, List<Thought>> x = a < b && c > d;", ()),
        ("if a < b: print('</div>')  # [1] and [/1] and [link](/think)", ()),
        ("a |> f <| g and x <|> y and P(A|B) < 1", ()),
        ("The set ]0, 1[ and |x| < 3, so -1 <x> 2 and <x|y> = 0, <phi|psi>.", ()),
        ("<ThinkingIndicator></ThinkingIndicator> <Analysis/> </analyse>", ()),
        ("Two.<|im_end|>", ()),
        ("Rethink [the thought] and <thought>", ()),
        ("<|begin_of_reasoning|>It is.<|end_of_reasoning|>Two.", ("<|begin_of_reasoning|>", "<|end_of_reasoning|>")),
        ("It is.</cot>Two.", ("</cot>",)),  # opened in the prompt
        ("As XML:\n```xml\n<error><reason>lost</reason></error>\n```\nDone.", ()),
        ("Close it with `</reason>`, or with\n~~~\n<|end_of_reasoning|>", ()),
        ("<problem><solution>4</solution></problem> [quote]a[/quote] [solution]x[/solution]", ()),
        ("For |x|<|y| we get <|z|>, and if a<|b|>c then <|psi|>, xs |> map f <|h|> 3, <|0|>.", ()),
        ("<|tool_call>call:f{}<tool_call|><|tool_response>4<tool_response|>", ()),
        ("Hi.<|im_end|>\n<|im_start|>user\nWhy?<|eot_id|><|endoftext|><|start_header_id|>", ()),
    ],
)  # fmt: skip
def test_what_looks_like_a_marker(response: str, tags: tuple[str, ...]) -> None:
    assert unknown_markers(response) == tags
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recognised = Segmentation().resolved("Why?", response)
    if recognised.format == "plain":
        assert len(caught) == bool(tags)
        assert all(tag in str(caught[0].message) and "Format" in str(caught[0].message) for tag in tags)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_format_survives_json(format: Format) -> None:
    assert Format.from_dict(format.to_dict()) == format


def test_a_format_with_headers_of_your_own() -> None:
    header = Header(("@@",), ":", {"@@ ?notes": "thinking", "@@ ?answer.*": "summary"})
    format = Format.from_dict(Format("headed", None, {}, header=header).to_dict())
    text = "@@notes: It is. @@ answer (short): Two. @@ more: Three."
    segmenter = Segmentation(format).segmenter("Why?")
    segmenter.push(text)
    assert section_texts(segmenter, text) == {"thinking": "It is.", "summary": "Two."}
    assert segmenter.unread_headers == ("@@ more",)


MARKERS = st.sampled_from(
    [m for format in FORMATS.values() for m in format.all_markers] + [" final", "analysis", "a ", "B."]
)


@given(st.sampled_from([f for f in FORMATS.values() if f.all_markers]), st.lists(MARKERS, max_size=12), st.booleans())
def test_a_marker_is_never_step_text(format: Format, pieces: list[str], is_opened: bool) -> None:
    prompt = format.pair[0] if format.pair and is_opened else ""
    text = "".join(pieces)
    segmenter = Segmentation(format, min_chars=0).segmenter(prompt)
    segmenter.push(text)
    for span in segmenter.finish():
        inside = text[span.start : span.end]
        markers = (
            format.markers[span.role] if format.header is None else {**format.markers[span.role], "<|start|>": None}
        )
        assert not any(marker in inside for marker in markers)


@pytest.mark.parametrize("format", ["think", "exaone", "seed-oss", "plain"])
@pytest.mark.parametrize("prompt", [CHATML, "[/INST]", ""])
def test_an_answer_of_a_model_that_did_not_think(format: str, prompt: str) -> None:
    """Its format may have markers, of which it wrote none: then it is as in the format "plain"."""
    response = "Two and two are four.\n\nSo it is 4.<|im_end|>"
    assert runs(prompt, response, format, list(response)) == [(T, "Two and two are four."), (S, "So it is 4.")]
    segmenter = Segmentation(format).segmenter(prompt, END_TOKENS)
    segmenter.push(response)
    assert segmenter.lacks_markers


@pytest.mark.parametrize(("name", "format", "prompt", "response"), [structure[:4] for structure in STRUCTURES], ids=IDS)
def test_a_response_of_a_known_structure_does_not_lack_markers(
    name: str, format: str | Format, prompt: str, response: str
) -> None:
    segmenter = Segmentation(format).segmenter(prompt, END_TOKENS)
    segmenter.push(response)
    assert not segmenter.lacks_markers


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "json {}", ""])
def test_the_type_of_a_message_may_be_any_text(kind: str) -> None:
    header = f"<|channel|>final <|constrain|>{kind}<|message|>"
    assert runs("<|start|>assistant", header + "Two.<|return|>", "harmony", [header, "Two.<|return|>"]) == [(S, "Two.")]
