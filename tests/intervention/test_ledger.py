"""The ledger of sections, turns and steps, without a model: against loops over tokens, rows alone, and portions."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import char_tokenizer

from stepsal.intervention.ledger import NOWHERE, Ledger, Portion
from stepsal.trace import FORMATS, PromptFrame, Trace
from stepsal.trace.tracking import Section, SequenceTracker, StepStart

TOKENIZER = char_tokenizer()
FRAME = PromptFrame.of(TOKENIZER)
PROMPT = "<bos><user>How many?<assistant><think>"
PIECES = [
    "We add three and four. ", "Then it is seven.\n\n", "So", " ", "</think>", "</th", "A long enough sentence? ",
    "Hm. ", "<user>", "<user>And why is that?<assistant><think>", "<user>Why?<assistant>Two.\n",
]  # fmt: skip
WINDOWS = (None, 1, 7, 40)
BRIDGE_OF = {Section.THINKING: Section.QUESTION, Section.SUMMARY: Section.THINKING}


def tracker(**options: bool) -> SequenceTracker:
    return SequenceTracker(TOKENIZER, FRAME, FORMATS["think"], **options)


class Followed(NamedTuple):
    """One sequence alone: what its tracker says of each token, without padding."""

    sections: list[Section]
    origins: list[int]  # where the turn of each token begins
    starts: list[StepStart]


def follow(ids: list[int]) -> Followed:
    alone, origins, starts = tracker(), [], []
    for token in ids:
        starts += alone.push([token])
        origins.append(alone.origin)
    return Followed(alone.sections, origins, starts)


class Batch(NamedTuple):
    """Several sequences as a rectangle."""

    rows: list[list[int]]
    ids: np.ndarray  # [batch, pos]
    real: np.ndarray  # bool [batch, pos]

    @property
    def columns(self) -> list[np.ndarray]:
        """Key positions of the tokens of each row."""
        return [np.flatnonzero(mask) for mask in self.real]


def padded(rows: list[list[int]], gaps: list[tuple[int, int]] | None = None) -> Batch:
    """Pad rows on the left; a gap (position, length) is padding in the middle of a row, as a second prompt has it."""
    gaps = gaps or [(0, 0)] * len(rows)
    width = max(len(row) + length for row, (_, length) in zip(rows, gaps, strict=True))
    ids, real = np.zeros((len(rows), width), dtype=np.int64), np.zeros((len(rows), width), dtype=bool)
    for i, (row, (position, length)) in enumerate(zip(rows, gaps, strict=True)):
        columns = np.arange(width - len(row), width)
        columns[:position] -= length
        ids[i, columns], real[i, columns] = row, True
    return Batch(rows, ids, real)


def read(batch: Batch, cuts: list[int], **options: object) -> tuple[Ledger, list[Portion], list[dict]]:
    """Read a batch in portions that end at `cuts`; return what the ledger said of each, counts by window included."""
    ledger = Ledger([tracker() for _ in batch.rows], **options)
    width = batch.ids.shape[1]
    edges = sorted({0, width, *(cut for cut in cuts if cut < width)})
    portions, counts = [], []
    for first, stop in pairwise(edges):
        portions.append(ledger.advance(batch.ids[:, first:stop], batch.real[:, first:stop]))
        groups = portions[-1].groups
        counts.append({
            (name, window): ledger.count_visible(getattr(groups, name), window)
            for name in ("bridge", "segment") for window in WINDOWS
        })  # fmt: skip
    return ledger, portions, counts


def injections(portions: list[Portion]) -> list[tuple[int, int, list[int]]]:
    """Return row, key position and members of all injections."""
    return sorted(
        (row, portion.first + query, members)
        for portion in portions
        for (row, query), members in zip(portion.places, portion.members, strict=True)
    )


texts = st.lists(st.sampled_from(PIECES), max_size=9).map(lambda pieces: PROMPT + "".join(pieces))
batches = st.lists(
    st.tuples(texts, st.tuples(st.integers(0, 60), st.integers(0, 6))), min_size=1, max_size=3
).map(lambda rows: padded([TOKENIZER(text)["input_ids"] for text, _ in rows], [gap for _, gap in rows]))  # fmt: skip
cuts = st.lists(st.integers(1, 250), max_size=12)


@settings(max_examples=60)
@given(batches, cuts)
def test_portions_of_any_size_give_the_same_as_the_whole(batch: Batch, cuts: list[int]) -> None:
    whole, (all_at_once,), (whole_counts,) = read(batch, [])
    ledger, portions, counts = read(batch, cuts)
    np.testing.assert_array_equal(ledger.sections, whole.sections)
    np.testing.assert_array_equal(ledger.turn_starts, whole.turn_starts)
    for name in ("bridge", "segment", "since"):
        joined = np.concatenate([getattr(portion.groups, name) for portion in portions], axis=1)
        np.testing.assert_array_equal(joined, getattr(all_at_once.groups, name))
    for key, expected in whole_counts.items():
        np.testing.assert_array_equal(np.concatenate([count[key] for count in counts], axis=1), expected)
    assert injections(portions) == injections([all_at_once])
    assert ledger.rows_without_question == whole.rows_without_question
    assert ledger.several_turns == whole.several_turns


@settings(max_examples=40)
@given(batches, cuts)
def test_groups_and_counts_against_loops(batch: Batch, cuts: list[int]) -> None:
    """Which keys of a row are bridge and segment, by the definition, for each token alone."""
    ledger, portions, counts = read(batch, cuts)
    bridges, segments, since = (
        np.concatenate([getattr(portion.groups, name) for portion in portions], axis=1)
        for name in ("bridge", "segment", "since")
    )
    for row, columns in enumerate(batch.columns):
        sections, origins, _ = follow(batch.rows[row])
        for t, column in enumerate(columns):
            is_edited = sections[t] in BRIDGE_OF
            for name, group, section in (
                ("bridge", bridges, BRIDGE_OF.get(sections[t])), ("segment", segments, sections[t]),
            ):  # fmt: skip
                keys = [columns[k] for k in range(origins[t], t + 1) if is_edited and sections[k] is section]
                visible = np.arange(column + 1)
                matches = (ledger.sections[row, visible] == group[row, column]) & (visible >= since[row, column])
                assert np.flatnonzero(matches).tolist() == keys
                for window in WINDOWS:
                    count = np.concatenate([c[name, window] for c in counts], axis=1)[row, column]
                    assert count == sum(window is None or key > column - window for key in keys)
        padding = np.setdiff1d(np.arange(batch.ids.shape[1]), columns)
        assert (bridges[row, padding] == NOWHERE).all()
        assert (segments[row, padding] == NOWHERE).all()


@settings(max_examples=40)
@given(batches, cuts, st.sampled_from([None, 1, 4]), st.booleans())
def test_steps_are_those_of_the_row_alone(
    batch: Batch, cuts: list[int], window: int | None, into_summary: bool
) -> None:
    _, portions, _ = read(batch, cuts, window=window, into_summary=into_summary)
    expected = []
    for row, columns in enumerate(batch.columns):
        for start in follow(batch.rows[row]).starts:
            into = start.section is Section.THINKING or (into_summary and start.section is Section.SUMMARY)
            if into and start.previous_section is Section.THINKING:
                members = list(start.previous) if window is None else list(start.previous)[-window:]
                expected.append((row, columns[start.position], [columns[k] for k in members]))
    assert injections(portions) == sorted(expected)


@settings(max_examples=40)
@given(batches, cuts)
def test_what_a_later_injection_averages_is_kept(batch: Batch, cuts: list[int]) -> None:
    _, portions, _ = read(batch, cuts, into_summary=True)
    for i, portion in enumerate(portions):
        later = [min(members) for other in portions[i + 1 :] for members in other.members]
        # values of this pass and earlier ones, as later ones come by themselves
        assert portion.oldest_needed <= min(later, default=portion.stop)
        assert portion.oldest_needed <= portion.stop


@settings(max_examples=40)
@given(batches, cuts)
def test_a_copy_of_the_sections_is_brought_up_to_date_from_what_has_changed(batch: Batch, cuts: list[int]) -> None:
    ledger = Ledger([tracker() for _ in batch.rows])
    copy = np.full_like(batch.ids, -5)
    edges = sorted({0, batch.ids.shape[1], *(cut for cut in cuts if cut < batch.ids.shape[1])})
    for first, stop in pairwise(edges):
        portion = ledger.advance(batch.ids[:, first:stop], batch.real[:, first:stop])
        copy[:, portion.changed : stop] = ledger.sections[:, portion.changed :]
        np.testing.assert_array_equal(copy[:, :stop], ledger.sections)


@pytest.mark.parametrize("n_more", [0, 200, 900])
def test_growth(n_more: int) -> None:
    """Beyond the room that there is at first, in one leap and token by token."""
    text = PROMPT + "We add three and four. Then it is seven. " * (n_more // 40) + "So we have it.</think>Seven."
    batch = padded([TOKENIZER(text)["input_ids"], TOKENIZER(PROMPT + "Hm.")["input_ids"]])
    expected = follow(batch.rows[0])
    for cuts in ([], list(range(batch.ids.shape[1]))):
        ledger, portions, counts = read(batch, cuts)
        assert ledger.n_columns == len(batch.rows[0])
        assert ledger.sections[0].tolist() == expected.sections
        assert len(injections(portions)) == sum(s.section is Section.THINKING for s in expected.starts)
        assert counts[-1]["bridge", None][0, -1] == expected.sections.count(Section.THINKING)


def test_a_trace_has_the_same_sections_and_steps() -> None:
    trace = Trace.from_text("How many?", "Count them all first. Then more of them.</think>Two. That is all.", TOKENIZER)
    section = {"question": Section.QUESTION, "thinking": Section.THINKING, "summary": Section.SUMMARY}
    ledger, portions, _ = read(padded([trace.tokens.tolist()]), [], into_summary=True)
    steps = trace.step_ids.tolist()
    assert ledger.sections[0].tolist() == [section[trace.roles[i]] if i >= 0 else Section.OTHER for i in steps]
    first, second, summary = (step for step in trace.steps if step.role != "question")
    previous = [[position for position, i in enumerate(steps) if trace.steps[i] is step] for step in (first, second)]
    assert injections(portions) == [(0, second.start, previous[0]), (0, summary.start, previous[1])]


class TestTurns:
    TEXT = PROMPT + "We add three.</think>Three.\n<user>And why is that?<assistant><think>So it is said. "

    def test_keys_of_an_earlier_turn_are_in_no_group(self) -> None:
        ids = TOKENIZER(self.TEXT)["input_ids"]
        ledger, (portion,), _ = read(padded([ids]), [])
        begin = max(i for i, token in enumerate(TOKENIZER.convert_ids_to_tokens(ids)) if token == "<user>")
        assert ledger.several_turns
        assert portion.groups.since[0, -1] == begin
        assert portion.groups.since[0, begin - 1] == 0
        in_bridge = ledger.sections[0, begin:] == portion.groups.bridge[0, -1]
        assert TOKENIZER.decode(np.array(ids)[begin:][in_bridge]) == "And why is that?"
        assert (ledger.count_visible(portion.groups.bridge)[0, -1]) == in_bridge.sum()

    def test_a_question_is_known_when_its_prompt_ends(self) -> None:
        ids = TOKENIZER(self.TEXT)["input_ids"]
        last = max(i for i, token in enumerate(TOKENIZER.convert_ids_to_tokens(ids)) if token == "<assistant>")
        ledger, portions, _ = read(padded([ids]), [last, last + 1])
        before, end, _ = portions
        assert before.changed == before.first
        assert end.changed < end.first  # the question's tokens, read in the pass before
        assert Section.QUESTION in ledger.sections[0, end.changed : end.first]

    def test_a_text_without_a_question(self) -> None:
        ledger, (portion,), _ = read(padded([TOKENIZER(t)["input_ids"] for t in ("Some text.", PROMPT, "<user>")]), [])
        assert ledger.rows_without_question == [0, 2]
        assert (portion.groups.bridge == NOWHERE).all()
        assert portion.places == []


@settings(max_examples=40)
@given(batches, st.data())
def test_rows_that_stay_go_on_as_before(batch: Batch, data: st.DataObject) -> None:
    width = batch.ids.shape[1]
    cut = data.draw(st.integers(1, width - 1))
    rows = data.draw(st.lists(st.sampled_from(range(len(batch.rows))), min_size=1, unique=True))
    ledger, reference = (Ledger([tracker() for _ in batch.rows]) for _ in range(2))
    for each in (ledger, reference):
        each.advance(batch.ids[:, :cut], batch.real[:, :cut])
    ledger.select(rows)
    assert (ledger.n_rows, ledger.n_columns) == (len(rows), cut)
    portion = ledger.advance(batch.ids[rows, cut:], batch.real[rows, cut:])
    expected = reference.advance(batch.ids[:, cut:], batch.real[:, cut:])
    np.testing.assert_array_equal(ledger.sections, reference.sections[rows])
    np.testing.assert_array_equal(ledger.turn_starts, reference.turn_starts[rows])
    np.testing.assert_array_equal(portion.groups.bridge, expected.groups.bridge[rows])
    for window in WINDOWS:
        counts = reference.count_visible(expected.groups.segment, window)[rows]
        np.testing.assert_array_equal(ledger.count_visible(portion.groups.segment, window), counts)
    kept = [(rows.index(row), t, members) for row, t, members in injections([expected]) if row in rows]
    assert injections([portion]) == sorted(kept)
