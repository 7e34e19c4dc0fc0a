"""Following a sequence online finds what `Trace` finds in the whole text, however the tokens are portioned."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import char_tokenizer
from transformer_lens.model_bridge import TransformerBridge

from stepsal.tasks import chain
from stepsal.trace.formats import FORMATS, Format
from stepsal.trace.frame import PromptFrame
from stepsal.trace.prompt import render_prompt
from stepsal.trace.trace import Trace
from stepsal.trace.tracking import Section, SequenceTracker, StepStart

TOKENIZER = char_tokenizer()
SECTIONS = {"question": Section.QUESTION, "thinking": Section.THINKING, "summary": Section.SUMMARY}
PIECES = [
    "The value is 3.5 here", ". ", ".\n", "\n\n", " ", "Then we add e.g. four", "</think>", "<", "</th", "Wait... so",
    "1. first", "$$x = 1.", "$$", "A long enough sentence.", "?", "```", "<eos>",
    "<user>", "<user>And why?<assistant><think>",
]  # fmt: skip


def follow(tokenizer: object, ids: list[int], format: Format, portions: list[int], **options: object) -> tuple:
    tracker = SequenceTracker(tokenizer, PromptFrame.of(tokenizer), format, **options)
    starts: list[StepStart] = []
    position = 0
    for size in [*portions, len(ids)]:
        starts += tracker.push(ids[position : position + size])
        position += size
    return tracker, starts


@settings(max_examples=150)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=14), st.lists(st.integers(0, 9), max_size=30))
def test_portions_do_not_matter(pieces: list[str], portions: list[int]) -> None:
    text = render_prompt(TOKENIZER, "How many?").text + "".join(pieces)
    ids = TOKENIZER(text)["input_ids"]
    whole, starts = follow(TOKENIZER, ids, FORMATS["think"], [])
    parts, same = follow(TOKENIZER, ids, FORMATS["think"], portions)
    assert parts.sections == whole.sections
    assert (parts.origin, parts.in_prompt) == (whole.origin, whole.in_prompt)
    assert same == starts
    assert whole.found_question


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from([p for p in PIECES if not p.startswith("<")]), min_size=1, max_size=8),
    st.lists(st.sampled_from([p for p in PIECES if not p.startswith("<")]), min_size=1, max_size=8),
)
def test_online_equals_the_trace(thinking: list[str], summary: list[str]) -> None:
    response = "".join([*thinking, "</think>", *summary])
    if not response.replace("</think>", "").strip():
        return
    trace = Trace.from_text("How many?", response, TOKENIZER)
    tracker, starts = follow(TOKENIZER, trace.tokens.tolist(), FORMATS["think"], [])
    ids = trace.step_ids.tolist()
    assert tracker.sections == [SECTIONS[trace.roles[i]] if i >= 0 else Section.OTHER for i in ids]
    response_steps = [i for i, step in enumerate(trace.steps) if step.role != "question"]
    assert [s.position for s in starts] == [trace.steps[i].start for i in response_steps[1:]]
    for i, start in zip(response_steps[1:], starts, strict=True):
        assert list(start.previous) == [pos for pos, step in enumerate(ids) if step == i - 1]
        assert start.section == SECTIONS[trace.roles[i]]
        assert start.previous_section == SECTIONS[trace.roles[i - 1]]


def test_the_embedded_reasoners_sections(mini: TransformerBridge) -> None:
    problem = chain.sample(5, length=4)
    trace = Trace.from_text(problem.question, problem.solution(), mini)
    tracker, starts = follow(mini.tokenizer, trace.tokens.tolist(), FORMATS["think"], [7, 1, 1, 50])
    expected = [SECTIONS[trace.roles[i]] if i >= 0 else Section.OTHER for i in trace.step_ids.tolist()]
    assert tracker.sections == expected
    assert len(starts) == len(trace.steps) - 2


def test_the_real_models_prompt(smollm2: TransformerBridge) -> None:
    question, response = "What is\n2 + 2?", "We add two and two. That gives four.\n\nThe answer is 4."
    for system in (None, "Answer in French."):
        trace = Trace.from_text(question, response, smollm2, system=system)
        tracker, _ = follow(smollm2.tokenizer, trace.tokens.tolist(), FORMATS["plain"], [])
        asked = [i for i, s in enumerate(tracker.sections) if s is Section.QUESTION]
        assert asked == list(range(trace.steps[0].start, trace.steps[0].end))
        # without a marker the summary is known only at the end: while it is written, all of it is thinking
        written = [i for i, s in enumerate(tracker.sections) if s is Section.THINKING]
        assert written == [i for i, s in enumerate(trace.step_ids.tolist()) if s > 0]
        assert Section.SUMMARY not in tracker.sections


def test_a_whole_prompt_as_question() -> None:
    trace = Trace.from_text("How many?", "Count them all first. Then more.</think>Two.", TOKENIZER, system="Be kind.")
    tracker, _ = follow(TOKENIZER, trace.tokens.tolist(), FORMATS["think"], [], whole_prompt=True)
    assert set(tracker.sections[: trace.n_prompt]) == {Section.QUESTION}
    assert Section.QUESTION not in tracker.sections[trace.n_prompt :]


@pytest.mark.parametrize("marker", ["</think>", "Final answer:"])
@pytest.mark.parametrize(
    "thinking", ["Count them all first. Then more of them.", "So it is four and", "x < y, and y <"]
)
def test_a_marker_of_several_tokens(marker: str, thinking: str) -> None:
    """Its first tokens begin no step, and the summary does begin one."""
    if marker == "</think>":  # spelt out, one token per character
        ids = TOKENIZER(render_prompt(TOKENIZER, "How many?").text)["input_ids"]
        ids += [i for c in f"{thinking}</think>Two." for i in TOKENIZER(c)["input_ids"]]
        format = FORMATS["think"]
    else:
        format = Format.with_marker(marker)
        ids = TOKENIZER(render_prompt(TOKENIZER, "How many?").text + f"{thinking} {marker} Two.")["input_ids"]
    tracker, starts = follow(TOKENIZER, ids, format, [])
    assert starts[-1].section is Section.SUMMARY
    assert starts[-1].previous_section is Section.THINKING
    assert TOKENIZER.decode(ids[starts[-1].position :]) in ("Two.", " Two.")
    assert [s.section for s in starts[:-1]] == [Section.THINKING] * (". Then" in thinking)
    assert tracker.sections[-1] is Section.SUMMARY


def test_several_turns() -> None:
    text = "<bos><user>How many?<assistant>Two.\n<user> And why is\nthat?<assistant><think>So it was said. So it is."
    ids = TOKENIZER(text)["input_ids"]
    tracker, starts = follow(TOKENIZER, ids, FORMATS["think"], [])
    asked = [i for i, s in enumerate(tracker.sections) if s is Section.QUESTION]
    assert TOKENIZER.decode([ids[i] for i in asked]) == "How many?And why is\nthat?"
    assert [i for i in asked if i >= tracker.origin] == asked[len("How many?") :]
    # every prompt of this template goes on with <think>; the first answer lacks it, and so has lost its thinking
    written = [i for i, s in enumerate(tracker.sections) if s is Section.SUMMARY]
    assert TOKENIZER.decode([ids[i] for i in written]).strip() == "Two."
    ids += TOKENIZER("</think>Done.\n<user>What?<assistant><think>Now then.")["input_ids"]
    tracker, starts = follow(TOKENIZER, ids, FORMATS["think"], [])
    asked = [i for i, s in enumerate(tracker.sections) if s is Section.QUESTION and i >= tracker.origin]
    assert TOKENIZER.decode([ids[i] for i in asked]) == "What?"
    assert TOKENIZER.decode([ids[tracker.origin]]) == "<user>"
    assert all(start.position < tracker.origin for start in starts)  # a turn's first step follows no step


@pytest.mark.parametrize("system", [None, "Be kind.", "Answer in French", "End with \\boxed{}"])
def test_a_template_with_a_system_prompt_of_its_own(system: str | None) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "<bos>{% if messages[0].role != 'system' %}You are a helper.<eos>\n{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}<user>user\n{{ m.content }}<eos>\n{% else %}{{ m.content }}<eos>\n{% endif %}"
        "{% endfor %}<assistant>\n"
    )
    trace = Trace.from_text(
        "How many\n\nlegs?", "Count them all first. Then more.</think>Two.", tokenizer, system=system
    )
    tracker, _ = follow(tokenizer, trace.tokens.tolist(), FORMATS["think"].after("<think>"), [])
    asked = [i for i, s in enumerate(tracker.sections) if s is Section.QUESTION]
    assert asked == list(range(trace.steps[0].start, trace.steps[0].end))


def test_no_chat_template() -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template that marks the end of a question"):
        PromptFrame.of(tokenizer)


def test_text_without_a_prompt_stays_outside() -> None:
    tracker, starts = follow(TOKENIZER, TOKENIZER("Just some text. And more of it.")["input_ids"], FORMATS["think"], [])
    assert tracker.in_prompt
    assert set(tracker.sections) == {Section.OTHER}
    assert starts == []
