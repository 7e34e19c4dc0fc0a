"""Formats of responses, as data: the marks by which models tell thinking and summary apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["question", "thinking", "summary"]
"""Section that a step belongs to."""

_TEMPLATE = "template"  # stands for None, "in no section", where JSON needs a text as a key


@dataclass(frozen=True)
class Format:
    """The marks by which a model tells its sections apart.

    Attributes:
        name: shown in traces and errors.
        start: the section in which a response begins; None is template text outside all sections.
        markers: for each section, the markers that end it and the section that follows. Markers are template.
        last_is_summary: no marker tells the summary apart: at the end of the response its last paragraph is taken for
            the summary; where there is one paragraph only, its last line; where there is one line only, its last step.
            A single step stays thinking.

    Example:
        >>> markers = {None: {"<plan>": "thinking"}, "thinking": {"</plan>": "summary"}}
        >>> stepsal.trace.Format("tags", None, markers).all_markers
        ('<plan>', '</plan>')
    """

    name: str
    start: Role | None
    markers: Mapping[Role | None, Mapping[str, Role | None]]
    last_is_summary: bool = False

    @staticmethod
    def with_marker(marker: str) -> Format:
        """Return a format in which all is thinking until a marker, and summary after it.

        Args:
            marker: the text that stands between thinking and summary.

        Raises:
            ValueError: the marker is empty.

        Example:
            >>> stepsal.trace.Format.with_marker("Final answer:").all_markers
            ('Final answer:',)
        """
        if not marker.strip():
            raise ValueError(f"marker={marker!r} is empty: give the text that stands between thinking and summary")
        return Format(f"marker {marker!r}", "thinking", {"thinking": {marker: "summary"}})

    def after(self, prompt: str) -> Format:
        """Return the format for the response to a prompt, begun in the section that the end of the prompt opens.

        Args:
            prompt: the rendered prompt, or the end of it.
        """
        end = prompt.rstrip()
        for ends in self.markers.values():
            for marker, section in ends.items():
                if end.endswith(marker):
                    return replace(self, start=section)
        return self

    def opened_by(self, prompt: str) -> bool:
        """Tell whether a prompt ends with a marker of this format."""
        return any(prompt.rstrip().endswith(marker) for marker in self.all_markers)

    @property
    def all_markers(self) -> tuple[str, ...]:
        """The markers of all sections, each once."""
        return tuple(dict.fromkeys(marker for ends in self.markers.values() for marker in ends))

    def to_dict(self) -> dict[str, Any]:
        """Return the format JSON-ready; "template" stands for the place outside all sections.

        Example:
            >>> think = stepsal.trace.FORMATS["think"]
            >>> stepsal.trace.Format.from_dict(think.to_dict()) == think
            True
        """
        markers = {section or _TEMPLATE: dict(ends) for section, ends in self.markers.items()}
        return {"name": self.name, "start": self.start, "markers": markers, "last_is_summary": self.last_is_summary}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Format:
        """Read a format that `to_dict` has written.

        Args:
            settings: attributes of a format by name, as `to_dict` gives them.

        Raises:
            ValueError: a key is missing or unknown.
        """
        try:
            markers = {
                None if section == _TEMPLATE else section: dict(ends) for section, ends in settings["markers"].items()
            }
            return cls(**{**settings, "markers": markers})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"format={settings!r} needs name, start and markers, and may have last_is_summary: {error}"
            ) from error


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


def recognised_format(prompt: str, response: str) -> str:
    """Return the name of the format whose markers a response or the end of its prompt holds; "plain" without any.

    Args:
        prompt: the rendered prompt, whose end may hold the marker that opens the thinking.
        response: everything after it.

    Example:
        >>> from stepsal.trace.formats import recognised_format
        >>> recognised_format("What is 1 + 1?", "<think>One more than one.</think>Two.")
        'think'
    """
    if "<|channel|>" in response or FORMATS["harmony"].opened_by(prompt):
        return "harmony"
    if "</think>" in response or "<think>" in response or FORMATS["think"].opened_by(prompt):
        return "think"
    return "plain"


def check_markers(format: Format, prompt: str, response: str) -> None:
    """Check that a text that was written elsewhere has a marker of the format that was named for it.

    Args:
        format: the format; one without markers fits any text.
        prompt: the rendered prompt, whose end may hold a marker.
        response: everything after it.

    Raises:
        ValueError: the text has no marker of the format, so that all of it would be taken for one section.
    """
    if not format.all_markers or format.opened_by(prompt):
        return
    if not any(marker in response for marker in format.all_markers):
        raise ValueError(
            f"marker not found: the response has none of {', '.join(map(repr, format.all_markers))} (format "
            f"{format.name!r}); use format='auto' or 'plain', or Format.with_marker(...) with a text that is there"
        )
