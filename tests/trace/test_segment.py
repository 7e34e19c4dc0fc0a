"""The segmenter: the same steps however the text arrives, and no cuts where a reader would not cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from responses import ALL_FORMATS, TEXTS

from stepsal.trace.assignment import StepTracker, step_ids
from stepsal.trace.formats import FORMATS, Format
from stepsal.trace.segment import Segmenter, segment

SPLITS = ["sentence", "paragraph", "line", r"[.;]", lambda so_far, char: so_far.endswith(("\n", ". ")) and char != "a"]
TEMPLATE = ("<|endoftext|>", "<|end|>")


def steps_of(text: str, format: str | Format = "think", **options: object) -> list[str]:
    chosen = FORMATS[format] if isinstance(format, str) else format
    return [text[s.start : s.end] for s in segment(text, chosen, **options)]


@given(TEXTS, st.sampled_from(ALL_FORMATS), st.sampled_from(SPLITS), st.integers(0, 30), st.data())
def test_pieces_of_any_size_give_the_steps_of_the_whole(
    text: str, format: Format, split: object, min_chars: int, data: st.DataObject
) -> None:
    whole = segment(text, format, split=split, min_chars=min_chars, template=TEMPLATE)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for parts in (pieces, list(text)):
        segmenter = Segmenter(format, split=split, min_chars=min_chars, template=TEMPLATE)
        for part in parts:
            segmenter.push(part)
        assert segmenter.finish() == whole


@given(TEXTS, st.sampled_from(ALL_FORMATS), st.sampled_from(SPLITS))
def test_steps_are_ordered_disjoint_trimmed_and_cover_the_text(text: str, format: Format, split: object) -> None:
    segmenter = Segmenter(format, split=split, template=TEMPLATE)
    segmenter.push(text)
    spans = segmenter.finish()
    assert all(s.start < s.end for s in spans)
    assert all(a.end <= b.start for a, b in pairwise(spans))
    assert all(text[s.start : s.end] == text[s.start : s.end].strip() for s in spans)
    if format.name == "plain":  # no marker but the template texts: all other characters are in a step
        inside = "".join(text[s.start : s.end] for s in spans)
        outside = "".join(t for t in re.split("|".join(map(re.escape, TEMPLATE)), text))
        assert "".join(inside.split()) == "".join(outside.split())


@settings(max_examples=300)
@given(TEXTS, st.sampled_from(ALL_FORMATS), st.lists(st.integers(0, 5), min_size=1).filter(any))
def test_the_step_of_a_token_is_known_when_it_arrives(text: str, format: Format, sizes: list[int]) -> None:
    offsets: list[tuple[int, int]] = []
    start = 0
    while start < len(text):
        end = min(len(text), start + sizes[len(offsets) % len(sizes)])
        offsets.append((start, end))
        start = end
    tracker = StepTracker(Segmenter(format, template=TEMPLATE))
    told, held = [], []
    for a, b in offsets:
        undecided = tracker.segmenter.holds_back
        told.append(tracker.push(text[a:b]))
        held.append(undecided or tracker.segmenter.holds_back)
    final = step_ids(tracker.segmenter.finish(), offsets, text, [0, *tracker.segmenter.breaks])
    for known, right, provisional in zip(told, final, held, strict=True):
        assert known == right or provisional


def test_white_space_after_a_held_back_character_belongs_to_its_step() -> None:
    tracker = StepTracker(Segmenter(FORMATS["think"]))
    assert [tracker.push("<"), tracker.push(" ")] == [0, 0]


@pytest.mark.parametrize(
    "text",
    [
        "We take pi to be 3.14 and go on with it.",
        "There are fruits, e.g. Apples and also pears.",
        "That is the case, i.e. Nothing is left over.",
        "As we can see in Fig. 3 the line goes up.",
        "From Eq. 5 it follows that we are done here.",
        "We asked Dr. Smith about all of these things.",
        "It weighs approx. Five kilograms altogether.",
        "Let us wait a moment... maybe it is different.",
        'He said "why is that?" and then he went away.',
        "The display \\[ a = b + c. D = e. \\] is one step.",
        "The display $$ a = b + c. D = e. $$ is one step.",
        "The inline \\( a = b + c. D \\) is one step too.",
        "\\begin{align} a &= b + c. D &= e. \\end{align} ok",
        "```python\nx = 1. \n\nY = 2. Z\n```",
        "1. Take the first number and double it at once.",
        "   12. Take the first number and double it.",
        "a) Take the first number and double it at once.",
    ],
)
def test_does_not_cut(text: str) -> None:
    assert len(steps_of(text, min_chars=1)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is no. Then we stop.", ["The answer is no.", "Then we stop."]),
        ("So the value is 2. Then we stop.", ["So the value is 2.", "Then we stop."]),
        ("We choose option C. Then we stop.", ["We choose option C.", "Then we stop."]),
        ("Is this true at all? It is (surely). Good!", ["Is this true at all?", "It is (surely).", "Good!"]),
        ("First paragraph of it\n\nsecond paragraph", ["First paragraph of it", "second paragraph"]),
        (
            "Now we need two things:\n- apples and pears\n- plums",
            ["Now we need two things:", "- apples and pears", "- plums"],
        ),
        ("1. Take the number.\n2. Double the number.", ["1. Take the number.", "2. Double the number."]),
        ("答案是三。然后我们继续。", ["答案是三。", "然后我们继续。"]),
        ("他说：「好的，我们走。」然后他走了。", ["他说：「好的，我们走。」", "然后他走了。"]),
        ("这是真的吗？！我们走。", ["这是真的吗？！", "我们走。"]),
        ("Take \\( x. Y \\) first. Then the rest.", ["Take \\( x. Y \\) first.", "Then the rest."]),
        ("Never closed \\[ a = b.\n\nNext paragraph.", ["Never closed \\[ a = b.", "Next paragraph."]),
        ("Write ``` in a line. Then go on.", ["Write ``` in a line.", "Then go on."]),
        ("```x``` and ~~~ too. Then go on.\n\nAnd on.", ["```x``` and ~~~ too.", "Then go on.", "And on."]),
        ("````\n```\nA = 1. B.\n```\n````\n\nThen go on.", ["````\n```\nA = 1. B.\n```\n````", "Then go on."]),
        ("```\nA = 1. B.\n\nC\n`````\n\nThen go on.", ["```\nA = 1. B.\n\nC\n`````", "Then go on."]),
        ("~~~\nA = 1. ```\n\nB\n~~~\nThen on.\n\nSo.", ["~~~\nA = 1. ```\n\nB\n~~~\nThen on.", "So."]),
        ("Do so:\n  ```py\n  A. B\n\n  C\n  ```\n\nThen on.", ["Do so:\n  ```py\n  A. B\n\n  C\n  ```", "Then on."]),
        ("``\nA = 1. B.\n``\n\nThen on.", ["``\nA = 1.", "B.\n``", "Then on."]),
        ("पहला वाक्य है। दूसरा वाक्य है॥ तीसरा।", ["पहला वाक्य है।", "दूसरा वाक्य है॥", "तीसरा।"]),
        ("ما هو العدد؟ العدد هو ثلاثة.", ["ما هو العدد؟", "العدد هو ثلاثة."]),
        ("یہ پہلا جملہ ہے۔ یہ دوسرا ہے۔", ["یہ پہلا جملہ ہے۔", "یہ دوسرا ہے۔"]),
        ("Սա առաջինն է։ Սա երկրորդն է։", ["Սա առաջինն է։", "Սա երկրորդն է։"]),
        ("ይህ አንድ ነው። ይህ ሁለት ነው።", ["ይህ አንድ ነው።", "ይህ ሁለት ነው።"]),
        ("ဒါကတစ်ခု။ ဒါကနှစ်ခု။", ["ဒါကတစ်ခု။", "ဒါကနှစ်ခု။"]),
        ("値は３．１４である．次に進む．", ["値は３．１４である．", "次に進む．"]),
        ("¿Es cierto? ¿O no es cierto?", ["¿Es cierto?", "¿O no es cierto?"]),
        ("Is it so‽ It is so⁇ Yes.", ["Is it so‽", "It is so⁇", "Yes."]),
    ],
)
def test_cuts(text: str, expected: list[str]) -> None:
    assert steps_of(text, min_chars=5) == expected


def test_every_sentence_terminal_of_unicode_ends_a_sentence() -> None:
    regex = pytest.importorskip("regex")
    ends = set(regex.findall(r"\p{Sentence_Terminal}", "".join(map(chr, range(0x20000))))) - {".", "\u2024"}
    assert len(ends) > 150
    for end in ends:
        text = f"One sentence{end} Another one"
        assert steps_of(text, min_chars=5) == [f"One sentence{end}", "Another one"], hex(ord(end))


@pytest.mark.parametrize("before", ["</think>", "<think>", ""])
def test_code_may_begin_right_behind_a_marker(before: str) -> None:
    assert steps_of(f"{before}```python\nA = 1. B.\n\nC\n```\n\nThen on.", min_chars=5)[-2:] == [
        "```python\nA = 1. B.\n\nC\n```", "Then on.",
    ]  # fmt: skip


def test_a_marker_ends_code_that_was_never_closed() -> None:
    assert steps_of("```\nA = 1. B.</think>It is two. So it is.", min_chars=5) == [
        "```\nA = 1. B.", "It is two.", "So it is.",
    ]  # fmt: skip


def test_short_pieces_merge_forward_and_do_not_vanish() -> None:
    text = "Hm. Ok. Let us look at the question. Yes."
    assert steps_of(text) == ["Hm. Ok. Let us look at the question.", "Yes."]
    assert steps_of(text, min_chars=0) == ["Hm.", "Ok.", "Let us look at the question.", "Yes."]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("line", ["One. Two.", "Three", "Four"]),
        ("paragraph", ["One. Two.\nThree", "Four"]),
        (r"Two\.|Three", ["One. Two.", "Three", "Four"]),
        (re.compile("E", re.I), ["One", ". Two.\nThre", "e", "Four"]),
        (lambda so_far, char: char == "F", ["One. Two.\nThree", "Four"]),
    ],
)
def test_other_splits(split: object, expected: list[str]) -> None:
    assert steps_of("One. Two.\nThree\n\nFour", split=split, min_chars=0) == expected


class TestFormats:
    @staticmethod
    def roles(text: str, format: Format, **options: object) -> list[tuple[str, str]]:
        return [(s.role, text[s.start : s.end]) for s in segment(text, format, **options)]

    @pytest.mark.parametrize("opening", ["<think>\n", "", "  <think>"])
    def test_think(self, opening: str) -> None:
        text = opening + "Let me think of it.</think>\n\nIt is 3.<|endoftext|>"
        expected = [("thinking", "Let me think of it."), ("summary", "It is 3.")]
        assert self.roles(text, FORMATS["think"], template=["<|endoftext|>"]) == expected

    def test_truncated_thinking_has_no_summary(self) -> None:
        text = "<think>Let me think of it. And then"
        assert [role for role, _ in self.roles(text, FORMATS["think"])] == ["thinking", "thinking"]

    def test_harmony(self) -> None:
        text = (
            "<|channel|>analysis<|message|>Let me think of it.<|end|><|start|>assistant<|channel|>commentary<|message|>"
            "call<|end|><|start|>assistant<|channel|>final<|message|>It is 3.<|return|>"
        )
        assert self.roles(text, FORMATS["harmony"]) == [("thinking", "Let me think of it."), ("summary", "It is 3.")]

    def test_marker(self) -> None:
        text = "I will count them all. Final answer: It is 3."
        expected = [("thinking", "I will count them all."), ("summary", "It is 3.")]
        assert self.roles(text, Format.with_marker("Final answer:")) == expected

    @pytest.mark.parametrize(
        ("text", "summary"),
        [
            ("I will count them all. There are three.\n\nSo it is three.", ["So it is three."]),
            ("I will count them all.\nSo it is three.", ["So it is three."]),
            ("I will count them all. So it is three.", ["So it is three."]),
            ("I will count them all.", []),
        ],
    )
    def test_plain_takes_the_last_paragraph(self, text: str, summary: list[str]) -> None:
        assert [t for role, t in self.roles(text, FORMATS["plain"]) if role == "summary"] == summary


def test_a_copy_goes_its_own_way() -> None:
    segmenter = Segmenter(FORMATS["think"])
    segmenter.push("This is the first step. Thi")
    twin = segmenter.copy()
    twin.push("s is the second step. And a third")
    assert len(twin.finish()) == 3
    assert len(segmenter.finish()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"min_chars": -1}, "min_chars=-1"), ({"split": "sentences("}, r"split='sentences\('.*regular expression")],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(FORMATS["think"], **options)
    with pytest.raises(ValueError, match="marker=' ' is empty"):
        Format.with_marker(" ")


@pytest.mark.parametrize(
    "text",
    [
        "The number of ways is 5! = 120 in all",
        "We know that 1 + 2 + 3 + ... + n is a triangular number",
        "The list 1, 2, 3, ... , n has n members",
        "We do two things: 1. Take the sum of all",
        "Look \\begin{align}\\begin{cases} A. B\\end{cases} B. C\\end{align} here",
    ],
)
def test_mathematics_is_not_cut(text: str) -> None:
    assert len(segment(text, FORMATS["think"], min_chars=0)) == 1


def test_nested_environments_end() -> None:
    text = "\\begin{align}\\begin{cases} A. B\\end{cases}\\end{align} is it. And so on."
    assert [text[s.start : s.end] for s in segment(text, FORMATS["think"], min_chars=0)][-1] == "And so on."


def test_a_regular_expression_keeps_its_flags() -> None:
    text = "We know x. THEREFORE we know y and also z"
    for pattern in ("(?i)therefore", re.compile("therefore  # a comment", re.I | re.X)):
        assert [text[s.start : s.end] for s in segment(text, FORMATS["think"], split=pattern, min_chars=0)] == [
            "We know x. THEREFORE", "we know y and also z",
        ]  # fmt: skip


def test_a_name_that_is_almost_right() -> None:
    with pytest.raises(ValueError, match="split='paragraphs' is unknown; use 'paragraph'"):
        segment("text", FORMATS["think"], split="paragraphs")


@pytest.mark.parametrize(
    ("name", "prompt", "role"),
    [
        ("think", "<a><think>\n", "thinking"),
        ("think", "<a><think>\n\n</think>\n\n", "summary"),
        ("harmony", "<|start|>assistant<|channel|>analysis<|message|>", "thinking"),
        ("harmony", "<|start|>assistant", None),
    ],
)
def test_a_response_begins_in_the_section_that_the_prompt_opens(name: str, prompt: str, role: str | None) -> None:
    assert FORMATS[name].after(prompt).start == role
