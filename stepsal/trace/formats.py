"""Formats: how models mark the sections of a response, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["question", "thinking", "summary"]


@dataclass(frozen=True)
class Format:
    """How a model marks its sections.

    Attributes:
        name: shown in traces and errors.
        start: the section in which a response begins; None is template text outside all sections.
        markers: for each section, the markers that end it and the section that follows. Markers are template.
        last_is_summary: no marker tells the summary apart, so the last paragraph becomes it at the end (failing that,
            the last line, then the last step, unless it is the only one).
    """

    name: str
    start: Role | None
    markers: Mapping[Role | None, Mapping[str, Role | None]]
    last_is_summary: bool = False

    @staticmethod
    def with_marker(marker: str) -> Format:
        """Thinking until `marker`, summary after it."""
        if not marker.strip():
            raise ValueError(f"marker={marker!r} is empty: give the text that stands between thinking and summary")
        return Format(f"marker {marker!r}", "thinking", {"thinking": {marker: "summary"}})

    def after(self, prompt: str) -> Format:
        """The same format for a response to this prompt: it begins in the section that the prompt's end has opened."""
        end = prompt.rstrip()
        for ends in self.markers.values():
            for marker, section in ends.items():
                if end.endswith(marker):
                    return replace(self, start=section)
        return self

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt ends with a marker of this format."""
        return any(prompt.rstrip().endswith(marker) for marker in self.all_markers)

    @property
    def all_markers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(marker for ends in self.markers.values() for marker in ends))


FORMATS: dict[str, Format] = {
    # DeepSeek-R1, Qwen3, QwQ; the opening marker may stand in the prompt template instead
    "think": Format("think", "thinking", {"thinking": {"<think>": "thinking", "</think>": "summary"}}),
    # GPT-OSS; other channels and headers are template
    "harmony": Format(
        "harmony",
        None,
        {
            None: {"<|channel|>analysis<|message|>": "thinking", "<|channel|>final<|message|>": "summary"},
            "thinking": {"<|end|>": None, "<|channel|>final<|message|>": "summary"},
            "summary": {"<|end|>": None, "<|return|>": None},
        },
    ),
    "plain": Format("plain", "thinking", {}, last_is_summary=True),
}
