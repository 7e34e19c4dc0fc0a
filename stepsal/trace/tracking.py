"""Follow a sequence token by token: which section each token is in, and where a new step begins.

A `SequenceTracker` needs nothing but token ids. It finds the question by the chat template's text around it, then feeds
the response to the same segmenter that cuts whole texts. It does not matter in which portions the tokens come, so that
a whole text in one forward pass and the same text token by token get the same sections and steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import accumulate, pairwise, takewhile
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from stepsal.trace.formats import Format
from stepsal.trace.segment import Segmenter, Span, Split, StepTracker, step_ids
from stepsal.trace.trace import template_around


class Section(IntEnum):
    """Where a token stands; template tokens are in no section."""

    OTHER = 0
    QUESTION = 1
    THINKING = 2
    SUMMARY = 3


_STAND_INS = ("\ue002", "x\ue003")  # for a system prompt: private-use characters, with nothing in common
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
        opening: what stands right before it, such as "<|im_start|>user\n"; not the system prompt. A template that puts
            the system prompt inside the user's turn makes it part of the question, for whoever sees tokens only.
        tail: what stands between it and the response.
    """

    opening: str
    tail: str

    @classmethod
    def of(cls, tokenizer: Any) -> PromptFrame:
        """Read the frame off a tokenizer's chat template.

        Raises:
            ValueError: the template, or its absence, leaves nothing that marks the end of a question.
        """
        head, tail = template_around(tokenizer)
        others = [template_around(tokenizer, system=system)[0] for system in _STAND_INS]
        backwards = zip(*(text[::-1] for text in (head, *others)), strict=False)
        shared = [characters[0] for characters in takewhile(lambda c: len(set(c)) == 1, backwards)]
        opening = "".join(reversed(shared))
        if not tail.strip():
            raise ValueError(
                "the tokenizer has no chat template that marks the end of a question, which following a sequence "
                "needs: set tokenizer.chat_template"
            )
        return cls(opening.strip() or head.strip(), tail.strip())

    def locate(self, text: str) -> tuple[int, int, int] | None:
        """(start of the question, its end, end of the prompt) as characters; None when the prompt is not complete."""
        end = max(0, text.find(self.opening)) if self.opening in text else len(text)
        while (end := text.find(self.tail, end)) >= 0:
            start = text.rfind(self.opening, 0, end) + len(self.opening)
            question = text[start:end]
            if asked := question.strip():
                start += question.index(asked)
                return start, start + len(asked), end + len(self.tail)
            end += len(self.tail)
        return None


class SequenceTracker:
    """Sections and step starts of one sequence, prompt and response, from its token ids.

    Each token is decided on when it comes in, by what stands before it alone. In a conversation of several turns the
    sections begin anew with each question.

    Args:
        tokenizer: a fast tokenizer.
        frame: its chat template's text around a question.
        format, split, min_chars: of the response, as for `Segmenter`.
        whole_prompt: count the whole prompt to the question.

    Attributes:
        sections: the section of each token so far. Those of a prompt are known once it is complete.
        origin: position at which the present turn begins: sections before it belong to other questions.
        in_prompt: whether the prompt of the present turn is still incomplete.
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
        self.origin = 0
        self.in_prompt = True
        self._frame, self._whole_prompt = frame, whole_prompt
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._segmenter = partial(
            Segmenter, format, split=split, min_chars=min_chars, template=tokenizer.all_special_tokens
        )
        self._begin_turn(0, [])

    def _begin_turn(self, origin: int, pieces: list[str]) -> None:
        self.origin, self.in_prompt = origin, True
        self._prompt = pieces  # text of each token of the prompt, from `origin` on
        self._recent = ""  # the last characters, in which a template text may be about to end
        self._steps = StepTracker(self._segmenter())
        self._step, self._step_section = -1, Section.OTHER
        self._step_positions: list[int] = []

    @property
    def found_question(self) -> bool:
        """Whether a prompt was complete so far."""
        return self.origin > 0 or not self.in_prompt

    @property
    def oldest_needed(self) -> int:
        """The first position that may be among the `previous` of a later step start."""
        if self._step_section is Section.THINKING and self._step_positions:
            return self._step_positions[0]
        return len(self.sections)

    def push(self, ids: Sequence[int]) -> list[StepStart]:
        """Read tokens; constant work for each."""
        starts = []
        for i in ids:
            piece = self._stream.step(self._backend, i) or ""
            if self.in_prompt:
                self._ask(piece)
            elif start := self._respond(piece):
                starts.append(start)
        return starts

    def _ends_with(self, template_text: str, piece: str) -> bool:
        """Whether a template text comes to its end in this piece."""
        self._recent = self._recent[-len(template_text) :] + piece
        return template_text in self._recent

    def _ask(self, piece: str) -> None:
        """Read a token of a prompt; with its last one, the whole prompt gets its sections."""
        self._prompt.append(piece)
        self.sections.append(Section.OTHER)
        if not self._ends_with(self._frame.tail, piece):
            return
        text = "".join(self._prompt)
        if (found := self._frame.locate(text)) is None:
            return
        start, end, prompt_end = found
        ends = list(accumulate(map(len, self._prompt)))
        question = step_ids((Span("question", start, end),), pairwise([0, *ends]), text, (0, end, prompt_end))
        self.sections[self.origin :] = [
            Section.QUESTION if self._whole_prompt or i == 0 else Section.OTHER for i in question
        ]
        self.in_prompt, self._prompt, self._recent = False, [], ""
        if text[prompt_end:]:  # the prompt ends in the middle of this token
            self._steps.push(text[prompt_end:])

    def _respond(self, piece: str) -> StepStart | None:
        """Read a token of a response."""
        position = len(self.sections)
        if self._frame.opening and self._ends_with(self._frame.opening, piece):
            self._begin_turn(position, [self._recent])
            self.sections.append(Section.OTHER)
            return None
        step = self._steps.push(piece)
        section = _SECTION_OF[self._steps.role]  # type: ignore[index]
        begins = step >= 0 and step != self._step
        if begins and self._steps.segmenter.holds_back:
            # what may be a marker (between its tokens) begins no step, and most often is one
            section, step = Section.OTHER, -1
        self.sections.append(section)
        if step < 0:
            return None
        start = None
        if begins:
            if self._step_positions:
                start = StepStart(position, section, tuple(self._step_positions), self._step_section)
            self._step, self._step_positions = step, []
        self._step_section = section
        self._step_positions.append(position)
        return start
