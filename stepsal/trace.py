"""A reasoning trace: tokens, the text they spell, and the steps they form.

Question, thinking and summary are found in the text; steps are half-open, ordered, disjoint token spans. A token
belongs to the step of its first non-space character, and every token that is in no step (BOS, system prompt, chat
template, section markers) is template, -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from tokenizers.decoders import DecodeStream
from torch import Tensor

from stepsal.segment import FORMATS, Format, Role, Segmenter, Span, Split, step_ids

__all__ = ["Prompt", "Role", "Step", "Trace", "render_prompt"]


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
        format: name of the format in which the sections were found.
        n_prompt: tokens that belong to the prompt; one that straddles its end counts.
    """

    question: str
    response: str
    text: str
    tokens: Int[Tensor, " pos"]
    offsets: Int[Tensor, "pos 2"]
    steps: tuple[Step, ...]
    format: str
    n_prompt: int

    @classmethod
    def from_text(
        cls,
        question: str,
        response: str,
        model_or_tokenizer: Any,
        *,
        format: str | Format = "auto",
        split: Split = "sentence",
        min_chars: int = 15,
        system: str | None = None,
    ) -> Trace:
        """Make a trace of a question and a response that were written elsewhere.

        The prompt is rendered with the tokenizer's chat template, and the whole text is tokenised once; spans come from
        the tokenizer's character offsets.

        Args:
            question: what the user asked.
            response: what the model wrote, thinking and summary; `<think>` may be left out where the prompt has it.
            model_or_tokenizer: a fast tokenizer, or a model with one (whose context length is then respected).
            format: a `Format`, a name in `FORMATS` ("think", "harmony", "plain"), or "auto" to tell from the text.
                Use `Format.with_marker("Final answer:")` for a marker of your own. "plain" has no marker:
                the last paragraph is taken for the summary.
            split, min_chars: how steps are cut; see `stepsal.segment.Segmenter`.
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
            question, text, prompt, encoded["input_ids"], offsets, tokenizer, n_ctx, format, split, min_chars
        )

    @classmethod
    def from_tokens(
        cls,
        tokens: Int[Tensor, " pos"],
        n_prompt: int,
        model_or_tokenizer: Any,
        *,
        question: str,
        format: str | Format = "auto",
        split: Split = "sentence",
        min_chars: int = 15,
    ) -> Trace:
        """Make a trace of exactly these tokens, as a model generated them.

        The text is decoded token by token, so that offsets belong to these tokens even where tokenising the text again
        would give others. A token that ends within a character has an empty span; its character counts to
        the token that completes it.

        Args:
            tokens: prompt and response.
            n_prompt: number of prompt tokens.
            model_or_tokenizer, format, split, min_chars: as for `from_text`.
            question: as asked; it must stand in the prompt.

        Raises:
            ValueError: as `from_text`, or `n_prompt` out of range.
        """
        tokenizer, n_ctx = _tokenizer_of(model_or_tokenizer)
        _require_text("question", question)
        ids = [int(t) for t in tokens]
        if not 0 < n_prompt < len(ids):
            raise ValueError(f"n_prompt={n_prompt} must lie in 1..{len(ids) - 1}, within the {len(ids)} tokens")
        text, offsets = _decode(tokenizer, ids)
        prompt = _locate_question(tokenizer, text[: offsets[n_prompt - 1][1]], question)
        return cls._build(question, text, prompt, ids, offsets, tokenizer, n_ctx, format, split, min_chars, n_prompt)

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
        format: str | Format,
        split: Split,
        min_chars: int,
        n_prompt: int | None = None,
    ) -> Trace:
        if n_ctx is not None and len(ids) > n_ctx:
            raise ValueError(
                f"the trace has {len(ids)} tokens but the model's context is {n_ctx}: shorten the response, or load "
                "the model with a longer context"
            )
        response = text[len(prompt.text) :]
        chosen = _choose_format(format, prompt.text, response)
        segmenter = Segmenter(chosen, split=split, min_chars=min_chars, template=tokenizer.all_special_tokens)
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
        if not any(step.role != "question" for step in steps):
            raise ValueError(f"the response {response[:60]!r} holds no step: it is all markers and white space")
        return cls(
            question=question,
            response=response,
            text=text,
            tokens=torch.tensor(ids),
            offsets=torch.tensor(offsets).reshape(-1, 2),
            steps=tuple(steps),
            format=chosen.name,
            n_prompt=sum(start < shift for start, _ in offsets) if n_prompt is None else n_prompt,
        )

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
        steps = [step for step in self.steps if step.role == role]
        if not steps:
            return ""
        return self.text[int(self.offsets[steps[0].start, 0]) : int(self.offsets[steps[-1].end - 1, 1])].strip()


def render_prompt(tokenizer: Any, question: str, system: str | None = None) -> Prompt:
    """Put the tokenizer's chat template around a question; without one, BOS before it and a line break after it.

    Raises:
        ValueError: an empty question, or a template that alters it.
    """
    _require_text("question", question)
    text, stand_in = _render(tokenizer, question, system), "\ue000question\ue001"
    # where a stand-in would stand: the question's own text may occur elsewhere too ("user", "assistant")
    start = _render(tokenizer, stand_in, system).find(stand_in)
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


def _locate_question(tokenizer: Any, prompt: str, question: str) -> Prompt:
    """Find the question in a prompt that is given, by the template text after it where that is there."""
    asked = question.strip()
    tail = _render(tokenizer, "\ue000", None).rpartition("\ue000")[2]
    start = len(prompt) - len(asked + tail) if prompt.endswith(asked + tail) else prompt.rfind(asked)
    if start < 0:
        raise ValueError(f"token/text mismatch: the prompt's tokens do not spell the question {question[:60]!r}")
    return Prompt(prompt, start, start + len(asked))


def _choose_format(format: str | Format, prompt: str, response: str) -> Format:
    if format == "auto":
        if "<|channel|>" in response:
            return FORMATS["harmony"]
        if "</think>" in response or "<think>" in response or prompt.rstrip().endswith("<think>"):
            return FORMATS["think"]
        return FORMATS["plain"]
    if isinstance(format, str):
        if format not in FORMATS:
            known = ", ".join(map(repr, ("auto", *FORMATS)))
            raise ValueError(f"format={format!r} is unknown; use {known}, or Format.with_marker({format!r})")
        format = FORMATS[format]
    opened = any(prompt.rstrip().endswith(marker) for marker in format.all_markers)
    if format.all_markers and not opened and not any(marker in response for marker in format.all_markers):
        raise ValueError(
            f"marker not found: the response has none of {', '.join(map(repr, format.all_markers))} (format "
            f"{format.name!r}); use format='auto' or 'plain', or Format.with_marker(...) with a text that is there"
        )
    return format


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
