"""Follow a sequence token by token: which section each token is in, and where a new step begins.

A `SequenceTracker` needs nothing but token ids. It finds the question by the chat template's text around it, then feeds
the response to the same segmenter that cuts whole texts. It does not matter in which portions the tokens come, so that
a whole text in one forward pass and the same text token by token get the same sections and steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from stepsal.segment import FORMATS, Format, Segmenter, Span, Split, StepTracker, step_ids
from stepsal.trace import template_around


class Section(IntEnum):
    """Where a token stands; template tokens are in no section."""

    OTHER = 0
    QUESTION = 1
    THINKING = 2
    SUMMARY = 3


_SECTION_OF = {None: Section.OTHER, "thinking": Section.THINKING, "summary": Section.SUMMARY}


class StepStart(NamedTuple):
    """A step began: where, in which section, and what came before it."""

    position: int
    section: Section
    previous: tuple[int, ...]  # positions of the tokens of the step before
    previous_section: Section


@dataclass(frozen=True)
class PromptFrame:
    """The chat template's text before and after the question.

    Attributes:
        opening: what stands right before it, such as "<|im_start|>user\\n"; not the system prompt.
        tail: what stands between it and the response.
    """

    opening: str
    tail: str

    @classmethod
    def of(cls, tokenizer: Any) -> PromptFrame:
        """Read the frame off a tokenizer's chat template."""
        head, tail = template_around(tokenizer)
        other, _ = template_around(tokenizer, system="Be brief.")
        n = next((i for i in range(len(head)) if not other.endswith(head[len(head) - i - 1 :])), len(head))
        opening = head[len(head) - n :]
        return cls(opening.strip() or head.strip(), tail.strip() or tail)

    def locate(self, text: str) -> tuple[int, int, int] | None:
        """(start of the question, its end, end of the prompt) as characters; None when the prompt is not complete."""
        start = text.rfind(self.opening) + len(self.opening) if self.opening else 0
        if start < len(self.opening):
            return None
        start += len(text[start:]) - len(text[start:].lstrip())
        end = text.find(self.tail, start)
        if end <= start:
            return None
        return start, start + len(text[start:end].rstrip()), end + len(self.tail)


class SequenceTracker:
    """Sections and step starts of one sequence, prompt and response, from its token ids.

    Args:
        tokenizer: a fast tokenizer.
        frame: its chat template's text around a question.
        format, split, min_chars: of the response, as for `Segmenter`.
        whole_prompt: count the whole prompt to the question.

    Attributes:
        sections: the section of each token so far. Those of the prompt are known once it is complete.
        in_prompt: whether the prompt is still incomplete.
    """

    def __init__(
        self,
        tokenizer: Any,
        frame: PromptFrame,
        format: Format,
        *,
        split: Split = "sentence",
        min_chars: int = 15,
        whole_prompt: bool = False,
    ) -> None:
        self.sections: list[Section] = []
        self.in_prompt = True
        self._frame, self._whole_prompt = frame, whole_prompt
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._prompt: list[str] = []  # pieces of text, until the prompt is complete
        self._steps = StepTracker(
            Segmenter(format, split=split, min_chars=min_chars, template=tokenizer.all_special_tokens)
        )
        self._step, self._step_section = -1, Section.OTHER
        self._step_positions: list[int] = []

    def push(self, ids: Sequence[int]) -> list[StepStart]:
        """Read tokens; constant work for each, once the prompt is complete."""
        pieces = [self._stream.step(self._backend, i) or "" for i in ids]
        if not self.in_prompt:
            return self._respond(pieces)
        self._prompt += pieces
        self.sections += [Section.OTHER] * len(pieces)
        text = "".join(self._prompt)
        found = self._frame.locate(text)
        if found is None:
            return []
        self.in_prompt = False
        return self._read_prompt(text, *found)

    @property
    def oldest_needed(self) -> int:
        """The first position that may be among the `previous` of a later step start."""
        if self._step_section is Section.THINKING and self._step_positions:
            return self._step_positions[0]
        return len(self.sections)

    def _read_prompt(self, text: str, start: int, end: int, prompt_end: int) -> list[StepStart]:
        offsets, position = [], 0
        for piece in self._prompt:
            offsets.append((position, position + len(piece)))
            position += len(piece)
        n = sum(first < prompt_end for first, _ in offsets)  # prompt tokens; one that straddles the end is one
        question = step_ids((Span("question", start, end),), offsets[:n], text, (0, end, prompt_end))
        self.sections = [Section.QUESTION if self._whole_prompt or i == 0 else Section.OTHER for i in question]
        rest = self._prompt[n:]
        self._prompt = []
        if over := text[prompt_end : offsets[n - 1][1]]:
            self._steps.push(over)
        return self._respond(rest)

    def _respond(self, pieces: list[str]) -> list[StepStart]:
        starts = []
        for piece in pieces:
            position = len(self.sections)
            step = self._steps.push(piece)
            section = _SECTION_OF[self._steps.role]  # type: ignore[index]
            self.sections.append(section)
            if step < 0:
                continue
            if step != self._step:
                if self._step_positions:
                    starts.append(StepStart(position, section, tuple(self._step_positions), self._step_section))
                self._step, self._step_positions = step, []
            self._step_section = section
            self._step_positions.append(position)
        return starts


def response_format(tokenizer: Any, frame: PromptFrame, name: str | None) -> Format:
    """The format of a model's responses, from its preset's `name` or else its chat template.

    A text tells its format by its markers; a response that is still to be written can't.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if name is None and "<|channel|>" in template:
        name = "harmony"
    elif name is None:
        name = "think" if FORMATS["think"].opened_by(frame.tail) or "</think>" in template else "plain"
    return FORMATS[name].after(frame.tail)
