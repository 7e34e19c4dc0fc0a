"""Formats of responses, as data: the marks by which models tell thinking and summary apart.

`FORMATS` is the table of the known ones. A format names the markers of each section; sections may alternate, and where
the thinking has a pair of markers it may hold thinking of its own. Where messages have headers of variable text, as in
Harmony, a `Header` tells the section by regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Role = Literal["question", "thinking", "summary"]
"""Section that a step belongs to."""

_TEMPLATE = "template"  # stands for None, "in no section", where JSON needs a text as a key


@dataclass(frozen=True)
class Header:
    """Headers of messages, whose words tell which section follows.

    Attributes:
        starts: markers with which a header begins, in any section and in this order; one that comes again, or before
            its turn, begins another header.
        end: marker with which a header ends and a section begins.
        sections: for each regular expression that a whole header may match, its starts included, the section that
            follows; None is template text. The first match counts. A header that none matches can't be read, and what
            follows it is template text.

    Example:
        >>> header = stepsal.trace.FORMATS["harmony"].header
        >>> header.section_after("<|channel|>final <|constrain|>json")
        'summary'
    """

    starts: tuple[str, ...]
    end: str
    sections: Mapping[str, Role | None]

    def section_after(self, header: str) -> Role | None:
        """Return the section that follows a header; None is template text.

        Args:
            header: its text from its start on, without the marker that ends it.

        Raises:
            ValueError: the header can't be read.
        """
        for pattern, section in self.sections.items():
            if re.fullmatch(pattern, header):
                return section
        raise ValueError(f"header {header!r} can't be read")


@dataclass(frozen=True)
class Format:
    """The marks by which a model tells its sections apart.

    Attributes:
        name: shown in traces and errors.
        start: the section in which a response begins; None is template text outside all sections.
        markers: for each section, the markers that end it and the section that follows. Markers are template.
        last_is_summary: no marker tells the summary apart: at the end of the response its last paragraph is taken for
            the summary; where there is one paragraph only, its last line; where there is one line only, its last step.
            A single step stays thinking. The same is done where a response should have markers of the thinking and has
            none, as an answer of a model that did not think.
        pair: the markers that open and close the thinking, where there is such a pair. Thinking that is opened inside
            the thinking must be closed twice; if it is not, the last closing counts at the end of the response.
        header: headers of messages, where the markers of sections are of variable text.
        opened: text at the end of a prompt by which `after` knew how a response begins.

    Example:
        >>> markers = {None: {"<plan>": "thinking"}, "thinking": {"</plan>": "summary"}}
        >>> stepsal.trace.Format("tags", None, markers).all_markers
        ('<plan>', '</plan>')
    """

    name: str
    start: Role | None
    markers: Mapping[Role | None, Mapping[str, Role | None]]
    last_is_summary: bool = False
    pair: tuple[str, str] | None = None
    header: Header | None = None
    opened: str = field(default="", repr=False)

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
        starts = self.header.starts if self.header else ()
        place = next((place for start in starts if (place := end.rfind(start)) >= 0), None)
        if self.header is not None and place is not None:
            text, separator, message = end[place:].partition(self.header.end)
            if not separator:
                return replace(self, start=None, opened=text)
            if not message:
                return replace(self, start=self._section_after(text), opened=self.header.end)
        for ends in self.markers.values():
            for marker, section in ends.items():
                if end.endswith(marker.rstrip()):
                    return replace(self, start=section, opened=marker)
        return self

    def opened_by(self, prompt: str) -> bool:
        """Tell whether a prompt ends with a marker of this format."""
        return self.after(prompt).opened in self.all_markers

    def without_repeated_opening(self, prompt: str, response: str) -> str:
        """Return a response without the marker that opens the thinking, where the prompt ends with it already.

        Args:
            prompt: the rendered prompt.
            response: everything after it, as a log may hold it.

        Example:
            >>> stepsal.trace.FORMATS["think"].without_repeated_opening("Why?<think>", "<think>So.</think>That.")
            'So.</think>That.'
        """
        opened, stripped = self.after(prompt).opened, response.lstrip()
        repeats = opened in self.openings or (self.header is not None and opened.startswith(self.header.starts))
        return stripped.removeprefix(opened) if repeats and stripped.startswith(opened) else response

    def _section_after(self, header: str) -> Role | None:
        try:
            return self.header.section_after(header) if self.header else None
        except ValueError:
            return None

    @property
    def openings(self) -> tuple[str, ...]:
        """The markers that open the thinking; headers are not among them."""
        others = (ends for section, ends in self.markers.items() if section != "thinking")
        openings = (marker for ends in others for marker, section in ends.items() if section == "thinking")
        return tuple(dict.fromkeys((*(self.pair or ())[:1], *openings)))

    @property
    def closings(self) -> tuple[str, ...]:
        """The markers that end the thinking, the one of `pair` first; headers are not among them."""
        ends = self.markers.get("thinking", {})
        others = (marker for marker, section in ends.items() if section not in (None, "thinking"))
        return tuple(dict.fromkeys((*(self.pair or ())[1:], *others)))

    @property
    def signs(self) -> tuple[str, ...]:
        """The markers whose presence tells that a text is of this format.

        They open or close the thinking, or begin and end headers. Markers of other kinds, such as `<answer>` or
        `<|end|>`, stand in texts of many formats, and so do words like "Here is my response:".

        Example:
            >>> stepsal.trace.FORMATS["reflection"].signs
            ('<thinking>', '</thinking>')
        """
        if self.header is not None:
            return (self.header.starts[-1], self.header.end)
        return (*self.openings, *(marker for marker in self.closings if not (self.pair and marker[0].isalnum())))

    @property
    def all_markers(self) -> tuple[str, ...]:
        """The markers of all sections, each once, and those of headers."""
        of_headers = (*self.header.starts, self.header.end) if self.header else ()
        return tuple(dict.fromkeys((*(marker for ends in self.markers.values() for marker in ends), *of_headers)))

    def to_dict(self) -> dict[str, Any]:
        """Return the format JSON-ready; "template" stands for the place outside all sections.

        Example:
            >>> think = stepsal.trace.FORMATS["think"]
            >>> stepsal.trace.Format.from_dict(think.to_dict()) == think
            True
        """
        markers = {section or _TEMPLATE: dict(ends) for section, ends in self.markers.items()}
        settings: dict[str, Any] = {
            "name": self.name,
            "start": self.start,
            "markers": markers,
            "last_is_summary": self.last_is_summary,
        }
        if self.pair:
            settings["pair"] = list(self.pair)
        if self.header:
            settings["header"] = {
                "starts": list(self.header.starts),
                "end": self.header.end,
                "sections": dict(self.header.sections),
            }
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Format:
        """Read a format that `to_dict` has written.

        Args:
            settings: attributes of a format by name, as `to_dict` gives them.

        Raises:
            ValueError: a key is missing or unknown.
        """
        try:
            changes = dict(settings)
            changes["markers"] = {
                None if section == _TEMPLATE else section: dict(ends) for section, ends in settings["markers"].items()
            }
            if changes.get("pair") is not None:
                changes["pair"] = tuple(changes["pair"])
            if changes.get("header") is not None:
                header = changes["header"]
                changes["header"] = Header(tuple(header["starts"]), header["end"], dict(header["sections"]))
            return cls(**changes)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"format={settings!r} needs name, start and markers, and may have last_is_summary, pair and header: "
                f"{error}"
            ) from error


def _pair_format(
    name: str,
    opening: str,
    closing: str,
    *,
    start: Role = "summary",
    thinking: Mapping[str, Role] | None = None,
    summary: tuple[str, ...] = (),
) -> Format:
    """Return a format whose thinking has a pair of markers, and may come again.

    Args:
        name: name of the format.
        opening: marker that opens the thinking.
        closing: marker that closes it.
        start: section in which a response begins, before any marker.
        thinking: further markers inside the thinking, with the section that follows.
        summary: markers around the summary or parts of it.
    """
    return Format(
        name,
        start,
        {
            "thinking": {opening: "thinking", closing: "summary", **(thinking or {})},
            "summary": {opening: "thinking", closing: "summary", **dict.fromkeys(summary, "summary")},
        },
        pair=(opening, closing),
    )


def _command() -> Format:
    """Return the format of Command A and Command R7B; actions are calls of tools."""
    answer = {"<|START_RESPONSE|>": "summary", "<|START_TEXT|>": "summary", "<|START_ACTION|>": None}
    ends = dict.fromkeys(("<|END_RESPONSE|>", "<|END_TEXT|>"), "summary")
    opening, closing = "<|START_THINKING|>", "<|END_THINKING|>"
    markers: dict[Role | None, dict[str, Any]] = {
        None: {opening: "thinking", **answer, "<|END_ACTION|>": "summary"},
        "thinking": {opening: "thinking", closing: "summary", **answer},
        "summary": {opening: "thinking", closing: "summary", **answer, **ends},
    }
    return Format("command", "summary", markers, pair=(opening, closing))


def _harmony() -> Format:
    """Return the format of GPT-OSS.

    A header is `<|start|>role to=recipient<|channel|>channel to=recipient <|constrain|>type`. What goes to a tool or
    comes from somebody else is template, and so is the channel "commentary".
    """
    kind = r"(?:\s*<\|constrain\|>[^<]*|\s*[\w.+/-]+)?\s*"
    assistant = r"\s*assistant(?::[\w-]+)?"
    to_user, to_anybody = r"(?:\s*to=(?:all|user)(?![^\s<]))?", r"(?:\s*to=[^\s<]+)?"
    own = rf"(?:<\|start\|>{assistant}{to_user})?\s*<\|channel\|>\s*"
    author = r"\s*(?:assistant(?::[\w-]+)?|system|developer|user|tool|python|[\w-]+\.[\w.-]+)(?![^\s<])"
    sections: dict[str, Role | None] = {
        rf"{own}analysis(?!\w){to_user}{kind}": "thinking",
        rf"{own}final(?!\w){to_user}{kind}": "summary",
        rf"<\|start\|>{assistant}{to_user}\s*": "summary",  # no channel: the answer
        rf"<\|start\|>{author}{to_anybody}{kind}": None,
        rf"(?:<\|start\|>{author}{to_anybody})?\s*<\|channel\|>\s*(?:analysis|commentary|final)(?!\w)"
        rf"{to_anybody}{kind}": None,
    }
    ends: dict[str, Role | None] = dict.fromkeys(("<|end|>", "<|return|>", "<|call|>"))
    return Format(
        "harmony",
        None,
        {"thinking": ends, "summary": ends},
        header=Header(("<|start|>", "<|channel|>"), "<|message|>", sections),
    )


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        # DeepSeek, Qwen3, QwQ, GLM, Phi-4 and many others; the opening marker may stand in the prompt instead. Hunyuan
        # and R1-Zero put the answer between tags, Granite 3.3 the response
        _pair_format(
            "think", "<think>", "</think>", start="thinking",
            summary=("<answer>", "</answer>", "<response>", "</response>"),
        ),
        _harmony(),
        _pair_format("magistral", "[THINK]", "[/THINK]"),
        _pair_format(
            "openthoughts", "<|begin_of_thought|>", "<|end_of_thought|>",
            thinking={"<|begin_of_solution|>": "summary"},
            summary=("<|begin_of_solution|>", "<|end_of_solution|>"),
        ),
        _pair_format("exaone", "<thought>", "</thought>", start="thinking"),  # EXAONE Deep; later ones have "think"
        Format(
            "granite",  # 3.2; quantised ones write "Here's"
            "summary",
            {
                "thinking": {"Here is my response:": "summary", "Here's my response:": "summary"},
                "summary": {
                    "Here is my thought process:": "thinking", "Here's my thought process:": "thinking",
                    "Here is my response:": "summary", "Here's my response:": "summary",
                },
            },
            pair=("Here is my thought process:", "Here is my response:"),
        ),
        _pair_format("seed-oss", "<seed:think>", "</seed:think>", start="thinking"),
        _pair_format("kimi", "◁think▷", "◁/think▷"),  # 1.5 and VL; K2 has "think"
        _command(),
        _pair_format("apertus", "<|inner_prefix|>", "<|inner_suffix|>"),
        _pair_format("gemma", "<|channel>thought", "<channel|>"),  # 4
        _pair_format("minimax", "<mm:think>", "</mm:think>", start="thinking"),  # M3; earlier ones have "think"
        # what prompts ask for where the model has no markers of its own
        _pair_format(
            "reflection", "<thinking>", "</thinking>",
            thinking={"<reflection>": "thinking", "</reflection>": "thinking"},
            summary=("<output>", "</output>", "<answer>", "</answer>"),
        ),
        _pair_format("reasoning", "<reasoning>", "</reasoning>", summary=("<answer>", "</answer>")),
        _pair_format(
            "working-out", "<start_working_out>", "<end_working_out>", summary=("<SOLUTION>", "</SOLUTION>")
        ),
        Format("plain", "thinking", {}, last_is_summary=True),
    )
}  # fmt: skip


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
