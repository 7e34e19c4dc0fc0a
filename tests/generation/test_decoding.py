"""Decoding: numbers are checked, changes make copies, settings are JSON-ready."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stepsal.generation.decoding import Decoding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number, at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be a number >= 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop": "end"}, "stop='end' must be a list of texts"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"budget_forcing": -1}, "budget_forcing=-1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
        ({"temperature": "0.6"}, "temperature='0.6' must be a number"),
        ({"stop_in_thinking": "no"}, "stop_in_thinking='no' must be True, or False to let"),
    ],
)
def test_numbers_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**options)
    with pytest.raises(ValueError, match=message):
        Decoding().but(**options)


def test_changes_make_a_copy() -> None:
    decoding = Decoding(temperature=0.6, stop=["a"])
    assert decoding.stop == ("a",)
    changed = decoding.but(max_new_tokens=7, stop=(), temperature=0.0)
    assert changed == Decoding(max_new_tokens=7, temperature=0.0)
    assert decoding == Decoding(temperature=0.6, stop=("a",))


def test_settings_survive_json() -> None:
    for decoding in (Decoding(9, 0.5, 0.9, ("a", "b"), 2), Decoding(stop=["a"], stop_in_thinking=True)):
        assert Decoding.from_dict(json.loads(json.dumps(decoding.to_dict()))) == decoding
    assert Decoding.from_dict({}) == Decoding()


def test_settings_of_before_stop_in_thinking_could_be_chosen() -> None:
    assert Decoding.from_dict({"stop": []}) == Decoding()
    assert Decoding.from_dict({"stop": ["a"]}) == Decoding(stop=["a"], stop_in_thinking=True)
    assert Decoding.from_dict({"stop": ["a"], "stop_in_thinking": False}) == Decoding(stop=["a"])


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ValueError, match="unknown settings of decoding: budget, temp; leave them out, and use max_new"):
        Decoding.from_dict({"temp": 0.5, "budget": 9, "top_p": 0.9})
    with pytest.raises(ValueError, match="top_p=2"):
        Decoding.from_dict({"top_p": 2})


def test_numbers_and_texts_of_other_kinds_become_plain() -> None:
    decoding = Decoding(np.int64(5), np.float32(0.5), stop=(text for text in ["a", "b"]))
    assert decoding.stop == ("a", "b")
    assert json.loads(json.dumps(decoding.to_dict()))["max_new_tokens"] == 5
