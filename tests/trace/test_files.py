"""Traces and segmentations in and out of files."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from responses import ALL_FORMATS, TEXTS
from tiny_models import char_tokenizer

from stepsal.trace import FORMATS, Format, Segmentation, Trace, render_prompt

TOKENIZER = char_tokenizer()
QUESTION = "How many?"
RESPONSE = "Count them all first. Then count more.\n\nSo it is this many.</think>Two."
TAGS = Format(
    "tags", None, {None: {"<plan>": "thinking"}, "thinking": {"</plan>": "summary"}, "summary": {"<x>": None}}
)
PATTERNS = [re.compile("so"), re.compile("(?i)so"), re.compile("so  # words", re.X | re.M), re.compile("so", re.A)]
SEGMENTATIONS = st.builds(
    Segmentation,
    st.sampled_from(["auto", *FORMATS, *FORMATS.values(), *ALL_FORMATS, TAGS, Format.with_marker("so")]),
    st.sampled_from(["sentence", "paragraph", "line", "so", "(?i)so", *PATTERNS]),
    st.integers(0, 40),
)


def assert_same(a: Trace, b: Trace) -> None:
    for field in dataclasses.fields(Trace):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y, field.name
    assert torch.equal(a.step_ids, b.step_ids)
    assert (a.thinking, a.summary, a.token_texts) == (b.thinking, b.summary, b.token_texts)


@given(TEXTS, SEGMENTATIONS, st.booleans())
def test_a_trace_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, text: str, segmentation: Segmentation, truncated: bool
) -> None:
    prompt = TOKENIZER(render_prompt(TOKENIZER, QUESTION).text)["input_ids"]
    new = TOKENIZER("It begins here. " + text)["input_ids"]
    trace = Trace.from_tokens(
        torch.tensor(prompt + new), len(prompt), TOKENIZER,
        question=QUESTION, truncated=truncated, segmentation=segmentation,
    )  # fmt: skip
    assert_same(Trace.load(trace.save(tmp_path_factory.getbasetemp() / "trace")), trace)


@pytest.mark.parametrize(
    "response", ["Zwei 🎉 sind genug.</think>答案是二。", "\ud83c is half a character.</think>So."]
)
def test_any_text(tmp_path: Path, response: str) -> None:
    trace = Trace.from_text(QUESTION, RESPONSE, TOKENIZER)
    trace = dataclasses.replace(trace, response=response)
    assert_same(Trace.load(trace.save(tmp_path / "trace")), trace)


def test_the_suffix_is_appended_where_it_is_missing(tmp_path: Path) -> None:
    trace = Trace.from_text(QUESTION, RESPONSE, TOKENIZER)
    assert trace.save(tmp_path / "a.1") == trace.save(tmp_path / "a.1.safetensors") == tmp_path / "a.1.safetensors"
    assert_same(Trace.load(tmp_path / "a.1"), trace)


def test_switches_come_back_and_old_files_have_none(tmp_path: Path) -> None:
    trace = dataclasses.replace(
        Trace.from_text(QUESTION, RESPONSE, TOKENIZER), chat={"thinking": False, "effort": "low", "budget": None}
    )
    path = trace.save(tmp_path / "trace")
    assert_same(Trace.load(path), trace)
    with safetensors.safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["stepsal"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del document["chat"]
    safetensors.torch.save_file(tensors, path, metadata={"stepsal": json.dumps(document)})
    assert_same(Trace.load(path), dataclasses.replace(trace, chat={}))
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        dataclasses.replace(trace, chat={"thinking": object()}).save(path)


def test_a_callable_is_refused(tmp_path: Path) -> None:
    segmentation = Segmentation(split=lambda step, char: char == "T")
    trace = Trace.from_text(QUESTION, RESPONSE, TOKENIZER, segmentation=segmentation)
    with pytest.raises(ValueError, match=r"is a callable, of which a file can only hold the name.*regular expression"):
        trace.save(tmp_path / "trace")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"lambda.*is a callable, of which only the name was written"):
        Segmentation.from_dict(segmentation.to_dict())


class TestBadFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return Trace.from_text(QUESTION, RESPONSE, TOKENIZER).save(tmp_path / "trace")

    @staticmethod
    def change(path: Path, tensors: dict | None = None, **changes: object) -> None:
        with safetensors.safe_open(path, framework="pt") as file:
            document = json.loads(file.metadata()["stepsal"]) | changes
            held = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})  # noqa: SIM118
        safetensors.torch.save_file(held, path, metadata={"stepsal": json.dumps(document)})

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none.safetensors does not exist; Trace.save writes it"):
            Trace.load(tmp_path / "none")

    @pytest.mark.parametrize("chat", [None, "thinking", ["thinking"], True])
    def test_switches_that_are_no_mapping(self, path: Path, chat: object) -> None:
        self.change(path, chat=chat)
        with pytest.raises(ValueError, match=r"inconsistent: chat=.* must be a dict of switches"):
            Trace.load(path)

    def test_cut_off(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(ValueError, match="no readable safetensors file"):
            Trace.load(path)

    def test_foreign(self, path: Path) -> None:
        safetensors.torch.save_file({"x": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match=r"was not written by Trace.save"):
            Trace.load(path)

    def test_another_class(self, path: Path) -> None:
        self.change(path, format="stepsal.StepSaliency")
        with pytest.raises(ValueError, match="does not hold a Trace"):
            Trace.load(path)

    def test_another_version(self, path: Path) -> None:
        self.change(path, version=7)
        with pytest.raises(ValueError, match="has format version 7, this stepsal reads 1"):
            Trace.load(path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": [["question", 3, 900]]}, "must have a role"),
            ({"steps": [["answer", 3, 5]]}, "must have a role"),
            ({"steps": [["question", 3, 9], ["thinking", 8, 12]]}, "overlap"),
            ({"steps": 5}, "not iterable"),
            ({"n_prompt": 0}, "n_prompt=0 must lie in 1"),
            ({"text": "short"}, "offsets must lie in 0..5"),
            ({"segmentation": {"format": "thinking"}}, "format='thinking' is unknown"),
            ({"segmentation": {"split": {"callable": "my.rule"}}}, "'my.rule' is a callable"),
            ({"mood": "good"}, "mood"),
            ({"tensors": {"offsets": torch.zeros(3, 2, dtype=torch.long)}}, r"expected \[pos\] and \[pos, 2\]"),
        ],
    )
    def test_inconsistent(self, path: Path, changes: dict, message: str) -> None:
        self.change(path, **changes)
        with pytest.raises(ValueError, match=f"is inconsistent: .*{message}"):
            Trace.load(path)


@given(SEGMENTATIONS)
def test_a_segmentation_survives_json(segmentation: Segmentation) -> None:
    assert Segmentation.from_dict(json.loads(json.dumps(segmentation.to_dict()))) == segmentation


@given(SEGMENTATIONS, SEGMENTATIONS)
def test_different_segmentations_give_different_dicts(a: Segmentation, b: Segmentation) -> None:
    assert (a.to_dict() == b.to_dict()) == (a == b and type(a.split) is type(b.split))


def shortly_before(step: str, char: str) -> bool:
    return char == "T"


def test_a_callable_goes_by_its_qualified_name() -> None:
    names = [
        Segmentation(split=split).to_dict()["split"]["callable"]
        for split in (shortly_before, functools.partial(shortly_before), str.endswith)
    ]
    assert names[0].endswith(".shortly_before")
    assert names[1] == "functools.partial"
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 3}, "settings that are unknown"),
        ({"format": {"name": "x"}}, "needs name, start and markers"),
        ({"format": {"name": "x", "start": None, "markers": {}, "end": 1}}, "needs name, start and markers"),
        ({"split": {"pattern": "(", "flags": []}}, "no regular expression with its flags"),
        ({"split": {"pattern": "a", "flags": ["LOUD"]}}, "no regular expression with its flags"),
        ({"split": 3}, "split=3 is of no kind that is known"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmentation.from_dict(settings)


def test_a_regular_expression_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="a regular expression for text"):
        Segmentation(split=re.compile(b"so"))  # type: ignore[arg-type]
