r"""The text that a chat template puts around every question of a conversation, read off conversations of stand-ins.

Rendered are a conversation of three turns, one turn with a system prompt, and one turn for each value of each switch:

    <bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n<start_of_turn>user\nQ2 ...
         ------------------     --------------------------------                     ------------------
         opening                tail                                                 opening

What stands before *all* questions is the opening, and what stands between all questions and answers the tail. A text
that several renderings end with is cut where a mark or a word begins, so that `<s>[INST]` and `</s>[INST]` share
`[INST]` and not `s>[INST]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import takewhile
from typing import Any

from stepsal.trace.formats import FORMATS
from stepsal.trace.template import TEMPLATE_ERRORS, apply_template, chat_template_of, switches_of

# private-use characters, which are in no real text; system prompts with nothing in common
_QUESTIONS, _ANSWERS = ("\ue000a\ue001", "\ue000b\ue001", "\ue000c\ue001"), ("\ue002d\ue003", "\ue002e\ue003")
_SYSTEMS = ("\ue004", "x\ue005")
_STAND_IN = re.compile("\ue000.\ue001|\ue002.\ue003")
_WHOLE = re.compile(r"<[^<>\n]{1,60}>|\[[^\[\]\n]{1,60}\]|[◁⟨][^▷⟩\n]{1,60}[▷⟩]|\w+")  # marks and words, never cut
_MARKERS = tuple(
    dict.fromkeys(
        marker
        for format in FORMATS.values()
        for ends in format.markers.values()
        for marker, section in ends.items()
        if section is not None  # what ends a section may end any message, as <|end|> does
    )
)


@dataclass(frozen=True)
class PromptFrame:
    r"""The chat template's text right before and right after every question of a conversation, the later ones included.

    It holds whatever the system prompt and the switches are. What a system prompt or a switch adds between the opening
    and the tail is taken for part of the question.

    Attributes:
        opening: text right before each question, such as "<|im_start|>user\n", without the system prompt; "" where no
            text stands before all of them. Then only the first question can be told.
        tail: text after each question with which all prompts go on, without the marker of a section.
        rest: text between the tail and the response where no switch is set, such as a marker that opens the thinking.
        head: text before the first question, without a system prompt.
        marked: every prompt goes on behind the tail with the marker of a section. So an answer of an earlier turn that
            does not has lost its thinking, as many templates wish, and is a summary.

    Example:
        >>> frame = stepsal.trace.PromptFrame.of(stepsal.load("mini").tokenizer)
        >>> frame.opening, frame.tail, frame.rest
        ('<|user|>', '<|assistant|>', '<think>')
    """

    opening: str
    tail: str
    rest: str = ""
    head: str = ""
    marked: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> PromptFrame:
        """Read the frame off a tokenizer's chat template.

        Args:
            tokenizer: of Hugging Face.

        Raises:
            ValueError: there is no chat template, or nothing in it marks the end of a question.
        """
        if chat_template_of(tokenizer) is None:
            raise _no_tail()
        first = _Rendering.of(tokenizer, 1)
        assert first is not None  # without switches and system prompt nothing is refused
        several = _Rendering.of(tokenizer, 3)
        variants = [*_with_switches(tokenizer), *(_Rendering.of(tokenizer, 1, system=system) for system in _SYSTEMS)]
        others = [rendering for rendering in variants if rendering is not None]
        opening, tail = _opening(first, several, others), _tail(first, several, others)
        for token in filter(None, (tokenizer.bos_token, tokenizer.eos_token)):  # an answer may be cut off before it
            opening = _without_mark(opening, token)
        behind = [rendering.tails[0].partition(tail)[2] for rendering in (first, *others)]
        marked = all(text.lstrip().startswith(_MARKERS) for text in behind)
        return cls(opening, tail, rest=behind[0], head=first.heads[0], marked=marked)

    def locate(self, text: str) -> tuple[int, int, int] | None:
        """Return where question and tail lie in a text: start and end of the question, end of the tail.

        While the prompt is not complete, the result is None.

        Args:
            text: the text of a sequence, or its beginning; positions count its characters.
        """
        opening = self.opening or self.head.strip()
        end = text.find(opening) if opening in text else (len(text) if self.opening else 0)
        while (end := text.find(self.tail, end)) >= 0:
            start = text.rfind(opening, 0, end) if self.opening else text.find(opening, 0, end)
            start = start + len(opening) if start >= 0 else 0
            question = text[start:end]
            if stripped := question.strip():
                start += question.index(stripped)
                return start, start + len(stripped), end + len(self.tail)
            end += len(self.tail)
        return None


@dataclass(frozen=True)
class _Rendering:
    """The template's text before each question of a conversation, and after it up to the answer."""

    heads: tuple[str, ...]
    tails: tuple[str, ...]

    @classmethod
    def of(
        cls, tokenizer: Any, n_turns: int, *, system: str | None = None, chat: Mapping[str, Any] | None = None
    ) -> _Rendering | None:
        """Render a conversation of stand-ins; None where the template refuses it, or leaves a question out."""
        messages = [{"role": "system", "content": system}] if system else []
        for turn in range(n_turns):
            messages.append({"role": "user", "content": _QUESTIONS[turn]})
            if turn < n_turns - 1:
                messages.append({"role": "assistant", "content": _ANSWERS[turn]})
        try:
            text = apply_template(tokenizer, messages, chat or {})
        except TEMPLATE_ERRORS:
            if n_turns > 1 or system or chat:
                return None
            raise
        pieces, stand_ins = _STAND_IN.split(text), _STAND_IN.findall(text)
        places = [i for i, stand_in in enumerate(stand_ins) if stand_in in _QUESTIONS]
        if [stand_ins[i] for i in places] != list(_QUESTIONS[:n_turns]):
            if n_turns > 1 or system or chat:
                return None
            raise _no_tail()
        return cls(tuple(pieces[i] for i in places), tuple(pieces[i + 1] for i in places))


def _with_switches(tokenizer: Any) -> Iterator[_Rendering | None]:
    """Render a turn with each value of each switch."""
    for name, values in switches_of(tokenizer).items():
        for value in values:
            yield _Rendering.of(tokenizer, 1, chat={name: value})


def _opening(first: _Rendering, several: _Rendering | None, others: Sequence[_Rendering]) -> str:
    """Return the text with which all heads end, of the first question and of later ones."""
    if several is None:  # a template of single questions
        return reduce(_shared_end, [head for rendering in others for head in rendering.heads], first.heads[0]).strip()
    opening = reduce(_shared_end, several.heads, first.heads[0])
    if several.tails[0]:
        opening = _without_end_of_turn(opening, several.tails[0])
    for head in (head for rendering in others for head in rendering.heads):
        if opening.strip() not in head:
            opening = _shared_end(opening, head) or opening
    return opening.strip()


def _tail(first: _Rendering, several: _Rendering | None, others: Sequence[_Rendering]) -> str:
    """Return the text with which all tails begin, before the first marker of a section.

    Raises:
        ValueError: there is none.
    """
    whole = first.tails[0]
    tail = whole[: min((whole.find(marker) for marker in _MARKERS if marker in whole), default=len(whole))]
    if not tail.strip() or not _is_markers(whole[len(tail) :]):  # words written for the model are no answer
        tail = whole
    for other in several.tails if several else ():
        if tail.strip() not in other and _is_markers(whole[len(shared := _shared_start(tail, other)) :]):
            tail = shared or tail
    for other in (tail for rendering in others for tail in rendering.tails):
        if tail.strip() not in other:
            tail = _shared_start(tail, other) or tail
    if not tail.strip():
        raise _no_tail()
    return tail.strip()


def _is_markers(text: str) -> bool:
    """Tell whether a text holds nothing but markers of sections and white space."""
    for marker in sorted(_MARKERS, key=len, reverse=True):
        text = text.replace(marker, "")
    return not text.strip()


def _without_end_of_turn(opening: str, tail: str) -> str:
    """Return an opening without the mark that ends the message before it, if it has one.

    A model may end its answer by another mark than the template writes in a history (as GPT-OSS does).
    """
    mark, other = _WHOLE.match(opening.lstrip()), _WHOLE.match(tail.lstrip())
    if mark is None or other is None or mark[0] != other[0] or mark[0].isalnum():
        return opening
    return _without_mark(opening, mark[0])


def _without_mark(opening: str, mark: str) -> str:
    """Return an opening without the mark that it begins with, if another mark follows; a word alone opens nothing."""
    shorter = opening.lstrip().removeprefix(mark).lstrip()
    return shorter if _WHOLE.match(shorter) and not shorter[0].isalnum() else opening


def _shared_end(one: str, other: str) -> str:
    """Return the longest text with which both end, whole marks and words only; "" where it has neither."""
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False)))
    for text in (one, other, one):
        cut = len(text) - n
        for mark in _WHOLE.finditer(text):
            if mark.start() < cut < mark.end():
                n -= mark.end() - cut
                break
    shared = one[len(one) - n :]
    return shared if _WHOLE.search(shared) else ""


def _shared_start(one: str, other: str) -> str:
    """Return the longest text with which both begin, whole marks and words only; "" where it has neither."""
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    for text in (one, other):
        for mark in _WHOLE.finditer(text):
            if mark.start() < n < mark.end():
                n = mark.start()
                break
    shared = one[:n]
    return shared if _WHOLE.search(shared) else ""


def _no_tail() -> ValueError:
    return ValueError(
        "the tokenizer has no chat template that marks the end of a question, which following a sequence needs: set "
        "tokenizer.chat_template"
    )
