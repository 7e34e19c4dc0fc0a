"""The thinking of earlier answers in a prompt: as the template takes it, or put back where the template drops it.

Whether a template keeps earlier thinking is seen in what it writes: a tag stands in front of the thinking when it is
given to the template, and is taken out afterwards. Nothing else of the text is touched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from inspect_ai.model import ChatMessage, ChatMessageAssistant, ContentReasoning

from stepsal.trace.formats import FORMATS, Format

NAMES = ("reasoning_content", "thinking", "reasoning")
"""Names of fields by which templates take the thinking of a message, the most common one first."""

_FIELD = r"""\b(?:message|msg|m)(?:\.|\[['"]|\.get\(['"]){}\b"""  # of a message, by any of the usual variables
_FINAL = "<|channel|>final<|message|>"  # of Harmony, whose thinking is a message of its own
_ANALYSIS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"


@dataclass(frozen=True)
class EarlierThinking:
    """The thinking of an earlier answer, on its way into a prompt.

    Attributes:
        text: the thinking.
        tag: private-use characters, which are in no real text.
        format: the marks of thinking inside an answer's content.
        field: name of the field by which the template takes thinking; None puts it into the content.
        is_put_back: True if the template dropped it, so that it is written into the rendered prompt.

    Example:
        >>> from stepsal.harness.history import EarlierThinking
        >>> thinking = EarlierThinking("1 + 1 = 2.", "#", stepsal.trace.FORMATS["think"], None)
        >>> thinking.fields("Two."), thinking.settled("Why?<think>#1 + 1 = 2.</think>Two.", "mini")
        ({'content': '<think>#1 + 1 = 2.</think>Two.'}, 'Why?<think>1 + 1 = 2.</think>Two.')
    """

    text: str
    tag: str
    format: Format
    field: str | None
    is_put_back: bool = False

    def fields(self, content: str) -> dict[str, str]:
        """Return the fields of the message that hold its thinking and its text.

        Args:
            content: the text of the answer.
        """
        if self.is_put_back:
            return {"content": self.tag + content}
        indent = len(self.text) - len(self.text.lstrip())  # many templates strip it
        tagged = self.text[:indent] + self.tag + self.text[indent:]
        if self.field is not None:
            return {"content": content, self.field: tagged}
        if self.format.header is not None:  # has no place inside the content of a message
            return {"content": content}
        opening, closing = marks(self.format)
        return {"content": f"{opening}{tagged}{closing}{content}"}

    def unless_in(self, text: str) -> EarlierThinking:
        """Return the thinking as it is if the template has kept it, or else to be put back.

        Args:
            text: the rendered chat.
        """
        return self if self.tag in text else replace(self, is_put_back=True)

    def settled(self, text: str, model_name: str) -> str:
        """Return the rendered chat without the tag, and with the thinking if it is put back.

        Args:
            text: the rendered chat.
            model_name: name of the model, for the error.

        Raises:
            ValueError: the thinking is to be put back, and there is no place for it.
        """
        opening, closing = map(re.escape, marks(self.format))
        if not self.is_put_back:  # a template may open the thinking of an answer that opens it, too
            doubled = rf"{opening}\s*(?={opening}{self.tag})" if opening and self.field is None else ""
            text = re.sub(doubled, "", text) if doubled else text
            return text.replace(self.tag, "")
        if self.format.header is not None:
            place, filled = _FINAL + self.tag, _ANALYSIS.format(self.text) + _FINAL
        else:
            before, after = marks(self.format)
            place, filled = self.tag, f"{before}{self.text}{after}"
            # in place of an empty thinking, or of an opening, that the template has put there
            text = re.sub(rf"{opening}\s*(?:{closing}\s*)?(?={self.tag})", "", text) if opening else text
        if place not in text:
            raise ValueError(
                f"the chat template of {model_name} leaves no place for the thinking of earlier answers: use "
                "reasoning_history='auto', by which the template decides, or 'none'"
            )
        return text.replace(place, filled)


def marks(format: Format) -> tuple[str, str]:
    """Return the markers that open and close thinking inside a text; there may be none that opens it.

    Args:
        format: a format; one without markers has those of "think".

    Example:
        >>> from stepsal.harness.history import marks
        >>> marks(stepsal.trace.FORMATS["think"]), marks(stepsal.trace.Format.with_marker("So:"))
        (('<think>', '</think>'), ('', 'So:'))
    """
    if format.pair is not None:
        return format.pair
    if not format.closings:
        return "<think>", "</think>"
    return next(iter(format.openings), ""), format.closings[0]


def earlier_thinking(
    messages: Sequence[ChatMessage], template: str, format: Format | None
) -> list[EarlierThinking | None]:
    """Return the thinking of each message of a chat; None where a message has none.

    Args:
        messages: the chat.
        template: the chat template, which tells by which field it takes thinking.
        format: the marks of thinking inside a text; None is "think".
    """
    field = next((name for name in NAMES if re.search(_FIELD.format(name), template)), None)
    texts = [reasoning_of(message) if isinstance(message, ChatMessageAssistant) else "" for message in messages]
    return [
        EarlierThinking(text, f"\ue000{i}\ue001", format or FORMATS["think"], field) if text else None
        for i, text in enumerate(texts)
    ]


def reasoning_of(message: ChatMessageAssistant) -> str:
    """Return the thinking of an answer; "" where it has none.

    Args:
        message: the answer.
    """
    return "\n".join(part.reasoning for part in message.content_list if isinstance(part, ContentReasoning))
