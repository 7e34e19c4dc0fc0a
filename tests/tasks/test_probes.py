"""Probes: what is asked for stands where the docstring says, and wordings share no sentence."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import char_tokenizer

from stepsal.tasks import probes
from stepsal.tasks.probes import PROBES, WORDINGS, Kind, Wording

seeds, ks, wordings = st.integers(0, 10**6), st.integers(0, 30), st.sampled_from(WORDINGS)


def facts(question: str) -> dict[str, int]:
    """Return the number of each name in a question."""
    boxes = re.findall(r"The (\w+) box holds (\d+) coins\.", question)
    villages = re.findall(r"village of (\w+) there are (\d+) lamps\.", question)
    return {name: int(n) for name, n in boxes + villages}


def last_name(before: str, wording: Wording) -> str:
    return re.findall(r"the (\w+) box" if wording == "boxes" else r"lamps in (\w+)", before)[-1]


@given(seeds, ks, wordings)
def test_a_premise_is_a_fact_of_the_question(seed: int, k: int, wording: Wording) -> None:
    probe = probes.premise_recall(seed, k, wording)
    numbers = facts(probe.question)
    assert len(numbers) == probes.N_FACTS == len(set(numbers.values()))
    assert probe.right == f" {numbers[last_name(probe.before, wording)]}"
    assert int(probe.wrong or 0) in numbers.values()
    assert not re.search(r"\d", probe.before)


@given(seeds, ks, wordings, st.sampled_from(["hand_over", "summary_recall"]))
def test_a_result_is_computed_in_the_thinking_alone(seed: int, k: int, wording: Wording, kind: Kind) -> None:
    probe = PROBES[kind](seed, k, wording)
    gains = re.findall(r"(\d+) (?:more|lamps are added).*?(\d+)(?: coins)?\.", probe.before)
    assert len(gains) == 2
    numbers = facts(probe.question)
    result = numbers[last_name(probe.before, wording)] + next(
        int(more) for more, total in gains if f" {total}" == probe.right
    )
    assert probe.right == f" {result}"
    assert probe.wrong in {f" {total}" for _, total in gains} - {probe.right}


@given(seeds, ks, wordings, st.sampled_from(list(PROBES)))
def test_there_are_k_fillers(seed: int, k: int, wording: Wording, kind: Kind) -> None:
    with_fillers, without = (PROBES[kind](seed, n, wording) for n in (k, 0))
    assert with_fillers.before.count(".") - without.before.count(".") == k
    assert with_fillers.about == {"probe": kind, "wording": wording, "k": k, "seed": seed}
    assert with_fillers == PROBES[kind](seed, k, wording)


def test_wordings_share_no_sentence_and_no_name() -> None:
    first, second = (probes.words_of(wording) for wording in WORDINGS)
    assert not set(first.names) & set(second.names)
    assert not set(first.fillers) & set(second.fillers)
    assert not re.search(r"\d", "".join([*first.fillers, *second.fillers]))


@pytest.mark.parametrize("kind", list(PROBES))
def test_they_are_read_in_the_section_that_is_meant(kind: Kind) -> None:
    in_summary = kind == "summary_recall"
    options = {"end_of_thinking": "</think>"} if in_summary else {}
    trace, n_new = PROBES[kind](seed=3, k=4, **options).trace(char_tokenizer())
    assert trace.roles[int(trace.step_ids[-1])] == ("summary" if in_summary else "thinking")
    assert trace.roles.count("summary") == in_summary
    assert n_new == len(" 42")


@pytest.mark.parametrize(("options", "message"), [({"k": -1}, "k=-1"), ({"wording": "cats"}, "'boxes' or 'villages'")])
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probes.premise_recall(0, **options)
