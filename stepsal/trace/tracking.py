"""Follow a sequence token by token: tell the section of each token, and where a new step begins.

A `SequenceTracker` needs nothing but token ids. It finds the question by the chat template's text around it, then feeds
the response to the same segmenter that reads whole texts. It does not matter in which portions the tokens come, so that
a whole text in one forward pass and the same text token by token get the same sections and steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from stepsal.trace.assignment import StepTracker, step_ids
from stepsal.trace.boundaries import Split
from stepsal.trace.formats import Format, Role
from stepsal.trace.frame import PromptFrame
from stepsal.trace.segment import Segmenter, Span


class Section(IntEnum):
    """Section in which a token stands; tokens of the template are in `OTHER`."""

    OTHER = 0
    QUESTION = 1
    THINKING = 2
    SUMMARY = 3


_SECTION_OF: dict[Role | None, Section] = {
    None: Section.OTHER,
    "thinking": Section.THINKING,
    "summary": Section.SUMMARY,
}


class StepStart(NamedTuple):
    """The beginning of a step, with the step before it.

    Attributes:
        position: position of the first token of the step.
        section: section of the step.
        previous: positions of the tokens of the step before it.
        previous_section: section of the step before it.
    """

    position: int
    section: Section
    previous: tuple[int, ...]
    previous_section: Section


class SequenceTracker:
    """A tracker that tells sections and step starts of one sequence, prompt and response, from its token ids.

    Each token is decided on when it comes in, from the tokens before it alone. In a conversation of several turns the
    sections begin anew with each question.

    Args:
        tokenizer: a fast tokenizer.
        frame: text that its chat template puts around a question.
        format: format of the response; the section in which it begins is told by the prompt (`Format.after`).
        split: where steps end, as for `Segmenter`.
        min_chars: least length of a step in characters; a shorter piece is merged with the one after it.
        whole_prompt: take the whole prompt for the question, up to the answer where no switch of the template is set.

    Attributes:
        sections: the section of each token so far. Those of a prompt are known once it is complete.
        origin: position at which the present turn begins; sections before it belong to other questions.
        in_prompt: True while the prompt of the present turn is incomplete.

    Example:
        >>> from stepsal.trace.tracking import SequenceTracker
        >>> from stepsal.trace import FORMATS
        >>> tokenizer = stepsal.load("mini").tokenizer
        >>> tracker = SequenceTracker(tokenizer, stepsal.trace.PromptFrame.of(tokenizer), FORMATS["think"])
        >>> text = "<|endoftext|><|user|>What is Anna?<|assistant|><think> Anna is 1 plus 2. So Anna = 3."
        >>> [start.position for start in tracker.push(tokenizer(text)["input_ids"])]
        [16]
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
        self._format = format
        self._is_marked = frame.marked and frame.rest.lstrip().startswith(format.all_markers)
        self._new_segmenter = partial(
            Segmenter, split=split, min_chars=min_chars, template=tokenizer.all_special_tokens
        )
        self._begin_turn(0, [])

    @property
    def found_question(self) -> bool:
        """True once a prompt has been complete, so that its question is known."""
        return self.origin > 0 or not self.in_prompt

    @property
    def oldest_needed(self) -> int:
        """The first position that may be among the `previous` of a later step start."""
        if self._step_section is Section.THINKING and self._step_positions:
            return self._step_positions[0]
        return len(self.sections)

    def push(self, ids: Sequence[int]) -> list[StepStart]:
        """Read tokens, with constant work for each, and return the steps that begin at them.

        Args:
            ids: the next tokens, however many.
        """
        starts = []
        for i in ids:
            piece = self._stream.step(self._backend, i) or ""
            if self.in_prompt:
                self._read_prompt(piece)
            elif start := self._read_response(piece):
                starts.append(start)
        return starts

    def _begin_turn(self, origin: int, pieces: list[str]) -> None:
        """Begin a prompt, with the text of those of its tokens that have come in already."""
        self.origin, self.in_prompt = origin, True
        self._prompt = pieces  # text of each token of the prompt, from `origin` on
        self._rest: str | None = None  # what the template has written behind its tail
        self._recent: deque[str] = deque()  # text of the last tokens, in which a template text may be about to end
        self._n_recent = 0  # characters of these
        self._steps = StepTracker(self._new_segmenter(self._format))
        self._beginning: list[str] | None = None  # text of the first tokens of an answer that may lack its thinking
        self._step, self._step_section = -1, Section.OTHER
        self._step_positions: list[int] = []

    def _ends_with(self, template_text: str, piece: str) -> bool:
        """Tell whether a template text comes to its end in this piece."""
        self._recent.append(piece)
        self._n_recent += len(piece)
        while self._n_recent - len(self._recent[0]) >= len(template_text) + len(piece):
            self._n_recent -= len(self._recent.popleft())
        return template_text in "".join(self._recent)

    def _forget_recent(self) -> None:
        self._recent, self._n_recent = deque(), 0

    def _read_prompt(self, piece: str) -> None:
        """Read a token of a prompt; with its last one, the whole prompt gets its sections."""
        self._prompt.append(piece)
        self.sections.append(Section.OTHER)
        if not self._ends_with(self._frame.tail, piece):
            return
        text = "".join(self._prompt)
        if (place := self._frame.locate(text)) is None:
            return
        start, end, prompt_end = place
        self.sections[self.origin :] = self._sections_of_prompt(text, start, end, prompt_end)
        self.in_prompt, self._prompt = False, []
        self._forget_recent()
        self._rest = text[prompt_end:]
        self._beginning = [] if self._is_marked else None
        if self._rest:  # the tail ends in the middle of this token
            self._push(self._rest)

    def _sections_of_prompt(self, text: str, start: int, end: int, prompt_end: int) -> list[Section]:
        """Return the section of each token of a prompt, whose question is the text from `start` to `end`."""
        if self._whole_prompt:
            return [Section.QUESTION] * len(self._prompt)
        token_ends = accumulate(map(len, self._prompt), initial=0)
        ids = step_ids([Span("question", start, end)], pairwise(token_ends), text, (0, end, prompt_end))
        return [Section.QUESTION if i == 0 else Section.OTHER for i in ids]

    def _read_response(self, piece: str) -> StepStart | None:
        """Read a token of a response, and return the step that begins at it and follows another one."""
        position = len(self.sections)
        if self._frame.opening and self._ends_with(self._frame.opening, piece):
            pieces = self._pieces_of_opening()
            self.sections.append(Section.OTHER)
            self._begin_turn(position + 1 - len(pieces), pieces)
            return None
        step = self._push(piece)
        if self._whole_prompt and self._continues_prompt(piece):
            self.sections.append(Section.QUESTION)
            return None
        section = _SECTION_OF[self._steps.role]
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

    def _push(self, piece: str) -> int:
        """Read a token of a response, and return its step.

        A response that a marker should begin, and does not, is a summary from its first word on.
        """
        if self._beginning is None:
            return self._steps.push(piece)
        self._beginning.append(piece)
        text, markers = "".join(self._beginning).lstrip(), self._format.all_markers
        if any(marker.startswith(text) for marker in markers) and text not in markers:  # "" among them
            return self._steps.push(piece)
        pieces, self._beginning = self._beginning, None
        if not text.startswith(markers):
            self._steps = StepTracker(self._new_segmenter(replace(self._format, start="summary")))
            for earlier in pieces[:-1]:
                self._steps.push(earlier)
        return self._steps.push(piece)

    def _pieces_of_opening(self) -> list[str]:
        """Return the text of each of the last tokens, from the one in which the opening begins."""
        pieces = list(self._recent)
        while self._frame.opening in "".join(pieces[1:]):
            pieces = pieces[1:]
        return pieces

    def _continues_prompt(self, piece: str) -> bool:
        """Tell whether a token right behind the tail belongs to what the template writes there."""
        if self._rest is not None:
            self._rest += piece
            if self._frame.rest.startswith(self._rest):
                return True
            self._rest = None
        return False
