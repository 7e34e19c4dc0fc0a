"""The settings by which sections and steps are found, as one value that traces and StepFlow share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stepsal.trace.boundaries import Split, split_from_json, split_to_json
from stepsal.trace.formats import FORMATS, Format, check_markers
from stepsal.trace.markers import Span
from stepsal.trace.recognition import recognised_format, warn_of_unknown_markers
from stepsal.trace.segmenter import Segmenter, check_steps, segment

__all__ = ["Segmentation", "Segmenter", "Span", "segment"]


@dataclass(frozen=True)
class Segmentation:
    """A way to find the sections and steps of a response, the same for traces and for StepFlow.

    Attributes:
        format: how the model marks its sections: a `Format`, a name in `FORMATS` ("think", "harmony", "plain", ...), or
            "auto": told by the markers of a text that is read, and by model and chat template where one is to be
            written.
        split: where steps end within a section: "sentence", "paragraph" (at blank lines) or "line"; a regular
            expression, where a match ends with a step or in the white space after it; or a callable
            `f(step_so_far, next_char) -> bool`, which returns True where the non-space character `next_char` begins a
            new step (`step_so_far` includes white space at its end).
        min_chars: least length of a step in characters; a shorter piece is merged with the one after it. The last step
            of a section may be shorter.

    Raises:
        ValueError: an unknown format or split, or negative `min_chars`.

    Example:
        >>> stepsal.Segmentation(split="paragraph").to_dict()
        {'format': 'auto', 'split': 'paragraph', 'min_chars': 15}
    """

    format: str | Format = "auto"
    split: Split = "sentence"
    min_chars: int = 15

    def __post_init__(self) -> None:
        known = ", ".join(map(repr, ("auto", *FORMATS)))
        if isinstance(self.format, str) and self.format not in ("auto", *FORMATS):
            raise ValueError(f"format={self.format!r} is unknown; use {known}, or Format.with_marker({self.format!r})")
        if not isinstance(self.format, str | Format):
            raise ValueError(f"format={self.format!r} is no format; use {known}, or a Format of your own")
        check_steps(self.split, self.min_chars)
        object.__setattr__(self, "min_chars", int(self.min_chars))

    @property
    def format_name(self) -> str:
        """The name of the format, or "auto"."""
        return self.format.name if isinstance(self.format, Format) else self.format

    @property
    def named_format(self) -> Format | None:
        """The format itself; None where it is "auto"."""
        if self.format == "auto":
            return None
        return FORMATS[self.format] if isinstance(self.format, str) else self.format

    def resolved(self, prompt: str, response: str, *, needs_markers: bool = False, stacklevel: int = 2) -> Segmentation:
        """Return a copy whose format is told by the markers of a text, if it was "auto".

        Where no known marker stands in the text but something that looks like one, a warning names it.

        Args:
            prompt: the rendered prompt.
            response: everything after it.
            needs_markers: raise if a format was named and none of its markers stands in the text.
            stacklevel: whose call a warning names, as for `warnings.warn`.

        Raises:
            ValueError: under `needs_markers`, the text has no marker of the named format.

        Example:
            >>> stepsal.Segmentation().resolved("What is 1 + 1?", "<think>One more than one.</think>Two.").format
            'think'
        """
        format = self.named_format
        if format is None:
            name = recognised_format(prompt, response)
            if name == "plain":
                warn_of_unknown_markers(response, stacklevel=stacklevel + 1)
            return replace(self, format=name)
        if needs_markers:
            check_markers(format, prompt, response)
        return self

    def segmenter(self, prompt: str = "", template: Iterable[str] = ()) -> Segmenter:
        """Return a segmenter for the response to a prompt, begun in the section that the prompt opens.

        Args:
            prompt: the rendered prompt.
            template: extra texts, such as end-of-sequence tokens, that belong to no step.

        Raises:
            ValueError: the format is "auto".

        Example:
            >>> stepsal.Segmentation(format="think").segmenter("<think></think>").role
            'summary'
        """
        format = self.named_format
        if format is None:
            raise ValueError("format='auto' is told by a text: call resolved(prompt, response) first, or name a format")
        return Segmenter(format.after(prompt), split=self.split, min_chars=self.min_chars, template=template)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings JSON-ready, a callable `split` by its name.

        Example:
            >>> import re
            >>> stepsal.Segmentation(split=re.compile("so", re.IGNORECASE)).to_dict()["split"]
            {'pattern': 'so', 'flags': ['IGNORECASE', 'UNICODE']}
        """
        format = self.format.to_dict() if isinstance(self.format, Format) else self.format
        return {"format": format, "split": split_to_json(self.split), "min_chars": self.min_chars}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Segmentation:
        """Read settings that `to_dict` has written.

        Args:
            settings: "format", "split" and "min_chars"; a missing one has its default.

        Raises:
            ValueError: unknown settings, or a `split` that was a callable, of which only the name was written.

        Example:
            >>> stepsal.Segmentation.from_dict({"split": "line"}) == stepsal.Segmentation(split="line")
            True
        """
        changes = dict(settings)
        if isinstance(changes.get("format"), Mapping):
            changes["format"] = Format.from_dict(changes["format"])
        if isinstance(changes.get("split"), Mapping):
            changes["split"] = split_from_json(changes["split"])
        try:
            return cls(**changes)
        except TypeError as error:
            raise ValueError(f"segmentation={settings!r} holds settings that are unknown: {error}") from error
