"""A reasoning trace: tokens, the text they spell, and the steps they form.

Question, thinking and summary are found in the text; steps are half-open, ordered, disjoint token spans. A token
belongs to the step of its first non-space character, and every token that is in no step (BOS, system prompt, chat
template, section markers) is template, -1.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
import torch
from jaxtyping import Int
from tokenizers.decoders import DecodeStream
from torch import Tensor

from stepsal.trace.formats import FORMATS, Format, Role
from stepsal.trace.segment import Segmentation, Segmenter, Span, step_ids

__all__ = ["Prompt", "Role", "Step", "Trace", "render_prompt"]


_STAND_IN = "\ue000question\ue001"  # private-use characters: in no real text


@dataclass(frozen=True)
class Step:
    """A step as half-open span of token positions."""

    role: Role
    start: int
    end: int


class Prompt(NamedTuple):
    """A rendered prompt; `start` and `end` are the characters of the question in `text`."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Trace:
    """What a model was asked and what it wrote, step by step.

    Attributes:
        question: as asked, without the template around it.
        response: everything after the prompt, section markers included.
        text: the rendered prompt and the response.
        tokens: token ids.
        offsets: half-open character span of each token in `text`.
        steps: question first, then thinking, then summary.
        segmentation: how sections and steps were found; its format is never "auto".
        n_prompt: tokens that belong to the prompt; one that straddles its end counts.
        truncated: the answer was cut off, by a token budget or by the end of the context.
    """

    question: str
    response: str
    text: str
    tokens: Int[Tensor, " pos"]
    offsets: Int[Tensor, "pos 2"]
    steps: tuple[Step, ...]
    segmentation: Segmentation
    n_prompt: int
    truncated: bool = False

    @classmethod
    def from_text(
        cls,
        question: str,
        response: str,
        model_or_tokenizer: Any,
        *,
        segmentation: Segmentation | None = None,
        system: str | None = None,
    ) -> Trace:
        """Make a trace of a question and a response that were written elsewhere.

        The prompt is rendered with the tokenizer's chat template, and the whole text is tokenised once; spans come from
        the tokenizer's character offsets.

        Args:
            question: what the user asked.
            response: what the model wrote, thinking and summary; `<think>` may be left out where the prompt has it.
            model_or_tokenizer: a fast tokenizer, or a model with one (whose context length is then respected).
            segmentation: how sections and steps are found; None is `Segmentation()`. Use `Format.with_marker("Final
                answer:")` for a marker of your own. "plain" has no marker: the last paragraph is taken for the summary.
            system: a system prompt; None keeps what the chat template does by itself.

        Raises:
            ValueError: empty question or response, a tokenizer without offsets, a trace longer than the context, a
                marker that is not there, or offsets that do not fit the text.
        """
        tokenizer, n_ctx = _tokenizer_of(model_or_tokenizer)
        _require_text("response", response)
        prompt = render_prompt(tokenizer, question, system)
        if prompt.text.rstrip().endswith("<think>") and response.lstrip().startswith("<think>"):
            response = response.lstrip().removeprefix("<think>")
            _require_text("response", response)
        text = prompt.text + response
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        _check_offsets(offsets, text, tokenizer.convert_ids_to_tokens(encoded["input_ids"]))
        return cls._build(
            question, text, prompt, encoded["input_ids"], offsets, tokenizer, n_ctx, segmentation or Segmentation()
        )

    @classmethod
    def from_tokens(
        cls,
        tokens: Int[Tensor, " pos"],
        n_prompt: int,
        model_or_tokenizer: Any,
        *,
        question: str,
        truncated: bool = False,
        segmentation: Segmentation | None = None,
    ) -> Trace:
        """Make a trace of exactly these tokens, as a model generated them.

        The text is decoded token by token, so that offsets belong to these tokens even where tokenising the text again
        would give others. A token that ends within a character has an empty span; its character counts to
        the token that completes it.

        Args:
            tokens: prompt and response.
            n_prompt: number of prompt tokens.
            model_or_tokenizer, segmentation: as for `from_text`.
            question: as asked; it must stand in the prompt.
            truncated: whether the answer was cut off.

        Raises:
            ValueError: as `from_text`, or `n_prompt` out of range; but a response without steps or markers is a trace.
        """
        tokenizer, n_ctx = _tokenizer_of(model_or_tokenizer)
        _require_text("question", question)
        ids = [int(t) for t in tokens]
        if not 0 < n_prompt < len(ids):
            raise ValueError(f"n_prompt={n_prompt} must lie in 1..{len(ids) - 1}, within the {len(ids)} tokens")
        text, offsets = _decode(tokenizer, ids)
        prompt = _locate_question(tokenizer, text[: offsets[n_prompt - 1][1]], question)
        return cls._build(
            question, text, prompt, ids, offsets, tokenizer, n_ctx, segmentation or Segmentation(), n_prompt, truncated
        )

    @classmethod
    def _build(
        cls,
        question: str,
        text: str,
        prompt: Prompt,
        ids: list[int],
        offsets: list[tuple[int, int]],
        tokenizer: Any,
        n_ctx: int | None,
        segmentation: Segmentation,
        n_prompt: int | None = None,
        truncated: bool = False,
    ) -> Trace:
        if n_ctx is not None and len(ids) > n_ctx:
            raise ValueError(
                f"the trace has {len(ids)} tokens but the model's context is {n_ctx}: shorten the response, or load "
                "the model with a longer context"
            )
        response = text[len(prompt.text) :]
        chosen = _choose_format(segmentation.format, prompt.text, response, written_by_model=n_prompt is not None)
        segmentation = replace(segmentation, format=chosen.name if isinstance(segmentation.format, str) else segmentation.format)
        segmenter = Segmenter(
            chosen, split=segmentation.split, min_chars=segmentation.min_chars, template=tokenizer.all_special_tokens
        )
        segmenter.push(response)
        shift = len(prompt.text)
        spans = (
            Span("question", prompt.start, prompt.end),
            *(Span(role, start + shift, end + shift) for role, start, end in segmenter.finish()),
        )
        breaks = (0, prompt.end, shift, *(b + shift for b in segmenter.breaks))
        assigned = step_ids(spans, offsets, text, breaks)
        steps: list[Step] = []
        kept: dict[int, int] = {}
        for position, i in enumerate(assigned):
            if i >= 0 and i not in kept:
                kept[i] = len(steps)
                steps.append(Step(spans[i].role, position, position + 1))
            elif i >= 0:
                steps[kept[i]] = Step(spans[i].role, steps[kept[i]].start, position + 1)
        if n_prompt is None and not any(step.role != "question" for step in steps):
            raise ValueError(f"the response {response[:60]!r} holds no step: it is all markers and white space")
        return cls(
            question=question,
            response=response,
            text=text,
            tokens=torch.tensor(ids),
            offsets=torch.tensor(offsets).reshape(-1, 2),
            steps=tuple(steps),
            segmentation=segmentation,
            n_prompt=sum(start < shift for start, _ in offsets) if n_prompt is None else n_prompt,
            truncated=truncated,
        )

    @property
    def format(self) -> str:
        """Name of the format in which the sections were found."""
        return self.segmentation.format_name

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.roles.count(role)} {role}" for role in ("question", "thinking", "summary"))
        return f"Trace({len(self)} tokens, steps: {counts}, format {self.format!r})"

    @cached_property
    def step_ids(self) -> Int[Tensor, " pos"]:
        """Step of each token; -1 for template."""
        ids = torch.full((len(self.tokens),), -1)
        for i, step in enumerate(self.steps):
            ids[step.start : step.end] = i
        return ids

    @property
    def roles(self) -> tuple[Role, ...]:
        """Role of each step."""
        return tuple(step.role for step in self.steps)

    @cached_property
    def token_texts(self) -> tuple[str, ...]:
        """The characters of each token."""
        return tuple(self.text[start:end] for start, end in self.offsets.tolist())

    def step_text(self, i: int) -> str:
        """The text of step i, without the white space around it."""
        step = self.steps[i]
        return self.text[int(self.offsets[step.start, 0]) : int(self.offsets[step.end - 1, 1])].strip()

    @property
    def thinking(self) -> str:
        """The text of all thinking steps."""
        return self._section("thinking")

    @property
    def summary(self) -> str | None:
        """The text of all summary steps; None when the thinking was cut off before one."""
        return self._section("summary") or None

    def _section(self, role: Role) -> str:
        parts: list[tuple[int, int]] = []  # runs of steps without template between them, as characters
        for step, previous in zip(self.steps, (None, *self.steps), strict=False):
            if step.role != role:
                continue
            start, end = int(self.offsets[step.start, 0]), int(self.offsets[step.end - 1, 1])
            if parts and previous is not None and previous.end == step.start:
                parts[-1] = (parts[-1][0], end)
            else:
                parts.append((start, end))
        return "\n".join(self.text[start:end].strip() for start, end in parts)


def render_prompt(tokenizer: Any, question: str, system: str | None = None) -> Prompt:
    """Put the tokenizer's chat template around a question; without one, BOS before it and a line break after it.

    Raises:
        ValueError: an empty question, or a template that alters it.
    """
    _require_text("question", question)
    text = _render(tokenizer, question, system)
    # where a stand-in would stand: the question's own text may occur elsewhere too ("user", "assistant")
    start = _render(tokenizer, _STAND_IN, system).find(_STAND_IN)
    for asked in (question, question.strip()):  # many templates strip what the user said
        if start >= 0 and text.startswith(asked, start):
            return Prompt(text, start, start + len(asked))
    raise ValueError(
        f"the chat template altered the question {question[:60]!r}, so that it can't be found in the prompt: "
        "set tokenizer.chat_template to one that keeps it"
    )


def _render(tokenizer: Any, question: str, system: str | None) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return "".join((tokenizer.bos_token or "", f"{system}\n\n" if system else "", question, "\n"))
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def template_around(tokenizer: Any, system: str | None = None) -> tuple[str, str]:
    """The chat template's text before and after a question.

    A template without a place for a system prompt is rendered without one.
    """
    try:
        text = _render(tokenizer, _STAND_IN, system)
    except jinja2.TemplateError:  # raised by templates that refuse the role
        text = _render(tokenizer, _STAND_IN, None)
    head, _, tail = text.partition(_STAND_IN)
    return head, tail


def sections(tokenizer: Any, prompt: str, response: str) -> tuple[str, str]:
    """Thinking, and what is said after it, of a response to a prompt that is rendered already.

    As a `Trace` has them, but all is said where nothing marks the thinking, and end tokens are left out.
    """
    special = tokenizer.all_special_tokens
    chosen = _choose_format("auto", prompt, response, written_by_model=True)
    if chosen.last_is_summary:
        said = response
        while any(said.rstrip().endswith(token) for token in special):
            said = said.rstrip()[: -len(next(token for token in special if said.rstrip().endswith(token)))]
        return "", said.strip()
    segmenter = Segmenter(chosen, template=special)
    segmenter.push(response)
    parts: dict[Role, list[tuple[int, int]]] = {"thinking": [], "summary": []}
    last = None
    for role, start, end in segmenter.finish():
        if role == last:
            parts[role][-1] = (parts[role][-1][0], end)
        else:
            parts[role].append((start, end))
        last = role
    thinking, said = ("\n".join(response[a:b] for a, b in parts[role]) for role in ("thinking", "summary"))
    return thinking, said


def _locate_question(tokenizer: Any, prompt: str, question: str) -> Prompt:
    """Find the question in a prompt that is given, by the template text after it where that is there."""
    tail = template_around(tokenizer)[1]
    for form in (None, "NFC", "NFKC"):  # what the tokenizer's normaliser may have made of it
        asked = question.strip() if form is None else unicodedata.normalize(form, question.strip())
        start = len(prompt) - len(asked + tail) if prompt.endswith(asked + tail) else prompt.rfind(asked)
        if start >= 0:
            return Prompt(prompt, start, start + len(asked))
    raise ValueError(f"token/text mismatch: the prompt's tokens do not spell the question {question[:60]!r}")


def _choose_format(format: str | Format, prompt: str, response: str, written_by_model: bool) -> Format:
    """The format, begun in the section that the prompt opens; a model may leave out markers, a given text may not."""
    if format == "auto":
        if "<|channel|>" in response or FORMATS["harmony"].opened_by(prompt):
            return FORMATS["harmony"].after(prompt)
        if "</think>" in response or "<think>" in response or FORMATS["think"].opened_by(prompt):
            return FORMATS["think"].after(prompt)
        return FORMATS["plain"]
    if isinstance(format, str):
        if format not in FORMATS:
            known = ", ".join(map(repr, ("auto", *FORMATS)))
            raise ValueError(f"format={format!r} is unknown; use {known}, or Format.with_marker({format!r})")
        format = FORMATS[format]
    told = written_by_model or not format.all_markers or format.opened_by(prompt)
    if not told and not any(marker in response for marker in format.all_markers):
        raise ValueError(
            f"marker not found: the response has none of {', '.join(map(repr, format.all_markers))} (format "
            f"{format.name!r}); use format='auto' or 'plain', or Format.with_marker(...) with a text that is there"
        )
    return format.after(prompt)


def _tokenizer_of(model_or_tokenizer: Any) -> tuple[Any, int | None]:
    """The fast tokenizer, and the context length where there is a model to tell it."""
    tokenizer = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: pass one to stepsal.load(..., tokenizer=...)")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets: load the fast tokenizer, e.g. "
            "AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    return tokenizer, getattr(getattr(model_or_tokenizer, "cfg", None), "n_ctx", None)


def _require_text(name: str, text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}={text!r} is empty: there is nothing to trace")


def _check_offsets(offsets: list[tuple[int, int]], text: str, tokens: list[str]) -> None:
    last = 0
    for i, (start, end) in enumerate(offsets):
        if not 0 <= start <= end <= len(text) or start < last:
            raise ValueError(
                f"token/text mismatch: token {i} ({tokens[i]!r}) claims characters {start}..{end} of {len(text)} "
                f"after {last}: the tokenizer's normaliser changes the text; use one that keeps it"
            )
        last = start
    if not offsets:
        raise ValueError("token/text mismatch: the text has no tokens")


def _decode(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """Text and character spans of given tokens, decoded one by one."""
    backend = tokenizer.backend_tokenizer
    stream = DecodeStream(skip_special_tokens=False)
    pieces, offsets, position = [], [], 0
    for i in ids:
        piece = stream.step(backend, i) or ""
        pieces.append(piece)
        offsets.append((position, position + len(piece)))
        position += len(piece)
    return "".join(pieces), offsets
