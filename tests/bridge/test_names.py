"""A name of no model is refused at once, with the names that there are."""

from __future__ import annotations

import time
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

import stepsal
from stepsal.bridge.names import check_name

KNOWN = r'"mini" \(the embedded reasoner\), "smollm2" \(SmolLM2-135M-Instruct\), a hub id, or the path of a folder'


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a hub in the place of the real one that has "org/there" alone, and return what it is asked."""
    names: list[str] = []

    def model_info(self: HfApi, name: str, **options: Any) -> None:
        names.append(name)
        if name != "org/there":
            raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    return names


def test_an_unknown_name_is_asked_for_once(asked: list[str]) -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match=rf"'gpt9' .* hub \(Name or service not known\)\. Use {KNOWN}$"):
        stepsal.load("gpt9")
    assert time.monotonic() - start < 2
    assert asked == ["gpt9"]


@pytest.mark.parametrize(("name", "close"), [("Mini", "mini"), ("minni", "mini"), ("smolm2", "smollm2")])
def test_a_slip_is_told(asked: list[str], name: str, close: str) -> None:
    with pytest.raises(OSError, match=f'Did you mean "{close}"\\?'):
        check_name(name)


@pytest.mark.parametrize("name", ["./model", "no/such/folder", "/no/such", "what is this?"])
def test_what_can_be_no_hub_id_is_not_asked_for(asked: list[str], name: str) -> None:
    with pytest.raises(OSError, match=rf"is no folder and no hub id\. Use {KNOWN}"):
        check_name(name)
    assert asked == []


def test_what_the_hub_has_passes(asked: list[str]) -> None:
    check_name("org/there")
    check_name("mini")
    check_name("smollm2")
    assert asked == ["org/there"]


def test_offline_the_hub_is_not_asked(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=rf"switched off \(HF_HUB_OFFLINE\)\. Use {KNOWN}"):
        check_name("org/there")
    assert asked == []
