"""A reasoning trace: tokens, the text they spell, and the steps they form.

Question, thinking and summary are found in the text; steps are half-open, ordered, disjoint token spans. A token
belongs to the step of its first non-space character, and every token that is in no step (BOS, system prompt, chat
template, section markers) is template, -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from stepsal.tensor_files import load_tensors, save_tensors
from stepsal.trace.assignment import step_ids
from stepsal.trace.encoding import TokenizedText, check_characters, check_context, decode, encode, tokenizer_of
from stepsal.trace.formats import Role
from stepsal.trace.markers import Span
from stepsal.trace.prompt import (
    Prompt,
    TokenizedPrompt,
    check_chat,
    locate_question,
    render_prompt,
    require_text,
    template_around,
)
from stepsal.trace.recognition import warn_of_unread_headers
from stepsal.trace.segment import Segmentation
from stepsal.trace.segmenter import Segmenter

_FILE_VERSION = 1


@dataclass(frozen=True)
class Step:
    """A step: its role, and its half-open span [start, end) of token positions in the trace.

    Attributes:
        role: section that the step belongs to, "question", "thinking" or "summary".
        start: position of its first token.
        end: position after its last token.

    Example:
        >>> trace = stepsal.Trace.from_text("What is 1 + 1?", "It is 2.</think>2.", stepsal.load("mini"))
        >>> trace.steps[0]
        Step(role='question', start=2, end=10)
    """

    role: Role
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Trace:
    """A question and what a model wrote in answer to it, step by step; `len(trace)` is the number of tokens.

    Attributes:
        question: the question as asked, without the template around it.
        response: everything after the prompt, section markers included.
        text: the rendered prompt and the response.
        tokens: token ids.
        offsets: half-open character span of each token in `text`.
        steps: in the order of the text: the question, then thinking and summary, which may alternate.
        segmentation: the way in which sections and steps were found; its format is never "auto".
        n_prompt: number of prompt tokens, one that straddles the end of the prompt included.
        truncated: True where the answer was cut off, by a token limit or by the end of the context.
        chat: switches of the chat template that the prompt was rendered with, such as {"enable_thinking": False}.

    Raises:
        ValueError: tokens, offsets and steps do not fit together.

    Example:
        >>> model = stepsal.load("mini")
        >>> stepsal.Trace.from_text("What is Anna?", "Anna is 1 plus 2.</think> The answer is 3.", model)
        Trace(21 tokens, steps: 1 question, 1 thinking, 1 summary, format 'think')
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
    chat: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_tokens = len(self.tokens)
        if self.tokens.ndim != 1 or tuple(self.offsets.shape) != (n_tokens, 2):
            shapes = f"{list(self.tokens.shape)} and {list(self.offsets.shape)}"
            raise ValueError(f"tokens and offsets have shapes {shapes}; expected [pos] and [pos, 2]")
        if n_tokens and not 0 <= int(self.offsets.min()) <= int(self.offsets.max()) <= len(self.text):
            raise ValueError(f"offsets must lie in 0..{len(self.text)}, within the text")
        if not 0 < self.n_prompt <= n_tokens:
            raise ValueError(f"n_prompt={self.n_prompt} must lie in 1..{n_tokens}, within the tokens")
        if not isinstance(self.chat, dict):
            raise ValueError(f"chat={self.chat!r} must be a dict of switches of the chat template; {{}} sets none")
        for step in self.steps:
            if step.role not in get_args(Role) or not 0 <= step.start < step.end <= n_tokens:
                raise ValueError(f"{step} must have a role of {get_args(Role)} and lie within {n_tokens} tokens")
        for step, following in pairwise(self.steps):
            if step.end > following.start:
                raise ValueError(f"{step} and {following} overlap; steps must be ordered and disjoint")

    @classmethod
    def from_text(
        cls,
        question: str,
        response: str,
        model_or_tokenizer: Any,
        *,
        segmentation: Segmentation | None = None,
        system: str | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> Trace:
        """Make a trace of a question and a response that were written elsewhere.

        The prompt is rendered with the tokenizer's chat template, and prompt and response are tokenised as one text.

        Args:
            question: the question that the user asked.
            response: everything that the model wrote, thinking and summary; `<think>` may be left out where the prompt
                ends with it.
            model_or_tokenizer: a fast tokenizer, or a model with one (whose context length is then respected).
            segmentation: the way to find sections and steps; None is `Segmentation()`. For a marker of your own pass
                `Segmentation(format=stepsal.trace.Format.with_marker("Final answer:"))`. The format "plain" has no
                marker: the last paragraph is taken for the summary.
            system: a system prompt; None keeps what the chat template does by itself.
            chat: switches of the chat template, such as {"enable_thinking": False}.

        Raises:
            ValueError: the question or the response is empty, the template does not have a switch of `chat`, the
                tokenizer gives no offsets, the trace is longer than the context, the response has no marker of the
                named format, or offsets do not fit the text.

        Example:
            >>> model = stepsal.load("mini")
            >>> trace = stepsal.Trace.from_text("What is Anna?", "Anna is 1 plus 2.</think> The answer is 3.", model)
            >>> [trace.step_text(i) for i in range(len(trace.steps))]
            ['What is Anna?', 'Anna is 1 plus 2.', 'The answer is 3.']
        """
        tokenizer = tokenizer_of(model_or_tokenizer)
        require_text("response", response)
        check_characters("response", response)
        prompt = render_prompt(tokenizer, question, system, chat=chat)
        resolved = (segmentation or Segmentation()).resolved(prompt.text, response, needs_markers=True, stacklevel=3)
        if resolved.named_format is not None:
            response = resolved.named_format.without_repeated_opening(prompt.text, response)
            require_text("response", response)
        tokenized = encode(tokenizer, prompt.text + response)
        check_context(len(tokenized.ids), model_or_tokenizer)
        trace = _cut(
            prompt,
            tokenized,
            n_prompt=sum(start < len(prompt.text) for start, _ in tokenized.offsets),
            segmentation=resolved,
            template=tokenizer.all_special_tokens,
        )
        if all(role == "question" for role in trace.roles):
            raise ValueError(
                f"the response {response[:60]!r} holds no step, only markers and white space: give what the model wrote"
            )
        return trace

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
        chat: Mapping[str, Any] | None = None,
    ) -> Trace:
        """Make a trace of exactly the tokens that a model generated.

        The text is decoded token by token, so that offsets belong to these tokens even where tokenising the text again
        would give others. A token that ends within a character has an empty span; the character belongs to the token
        that completes it. A response may lack steps and markers.

        Args:
            tokens: token ids of prompt and response.
            n_prompt: number of prompt tokens.
            model_or_tokenizer: a fast tokenizer, or a model with one (whose context length is then respected).
            question: the question as asked; it must stand in the prompt.
            truncated: True where the answer was cut off.
            segmentation: the way to find sections and steps; None is `Segmentation()`.
            chat: switches of the chat template that the prompt was rendered with.

        Raises:
            ValueError: the question is empty or not in the prompt, the tokenizer gives no offsets, the trace is longer
                than the context, or `n_prompt` is out of range.

        Example:
            >>> model = stepsal.load("mini")
            >>> trace = stepsal.Trace.from_text("What is Anna?", "Anna is 3.</think> The answer is 3.", model)
            >>> stepsal.Trace.from_tokens(trace.tokens, trace.n_prompt, model, question="What is Anna?").summary
            'The answer is 3.'
        """
        tokenizer = tokenizer_of(model_or_tokenizer)
        require_text("question", question)
        ids = [int(token) for token in tokens]
        if not 0 < n_prompt < len(ids):
            raise ValueError(f"n_prompt={n_prompt} must lie in 1..{len(ids) - 1}, within the {len(ids)} tokens")
        check_context(len(ids), model_or_tokenizer)
        tokenized = decode(tokenizer, ids)
        text = tokenized.text[: tokenized.offsets[n_prompt - 1][1]]
        switches = check_chat(tokenizer, chat)
        place = locate_question(text, question, template_around(tokenizer, chat=switches)[1])
        prompt = Prompt(question, text, *place, chat=switches)
        return _cut_written(prompt, tokenized, n_prompt, segmentation, tokenizer, truncated=truncated)

    @classmethod
    def from_answer(
        cls,
        prompt: TokenizedPrompt,
        new_tokens: Sequence[int],
        model_or_tokenizer: Any,
        *,
        truncated: bool = False,
        segmentation: Segmentation | None = None,
    ) -> Trace:
        """Make a trace of the tokens that a model wrote after a tokenised prompt.

        Args:
            prompt: the prompt, from `stepsal.trace.tokenize_prompt`.
            new_tokens: token ids of the answer, at least one.
            model_or_tokenizer: a fast tokenizer, or a model with one (whose context length is then respected).
            truncated: True where the answer was cut off.
            segmentation: the way to find sections and steps; None is `Segmentation()`.

        Raises:
            ValueError: there is no new token, the tokenizer gives no offsets, or the trace is longer than the context.

        Example:
            >>> from stepsal.trace import render_prompt, tokenize_prompt
            >>> tokenizer = stepsal.load("mini").tokenizer
            >>> prompt = tokenize_prompt(tokenizer, render_prompt(tokenizer, "What is Anna?"))
            >>> stepsal.Trace.from_answer(prompt, tokenizer(" Anna is 3.")["input_ids"], tokenizer).step_text(1)
            'Anna is 3.'
        """
        tokenizer = tokenizer_of(model_or_tokenizer)
        if not new_tokens:
            raise ValueError("new_tokens is empty: give at least one token that follows the prompt")
        n_prompt, ids = len(prompt.ids), [*prompt.ids, *new_tokens]
        check_context(len(ids), model_or_tokenizer)
        tokenized = decode(tokenizer, ids)
        spelled: Prompt = prompt
        text = tokenized.text[: tokenized.offsets[n_prompt - 1][1]]
        if text != prompt.text:  # the tokenizer normalises text, so that the question has moved
            place = locate_question(text, prompt.question, prompt.tail)
            spelled = Prompt(prompt.question, text, *place, chat=prompt.chat)
        return _cut_written(spelled, tokenized, n_prompt, segmentation, tokenizer, truncated=truncated)

    def save(self, path: str | Path) -> Path:
        """Write the trace to one safetensors file, texts and steps as a JSON document in its header.

        The file is moved into place when it is complete: an interrupted save leaves the old file or none.

        Args:
            path: where to write; `.safetensors` is appended where it is missing, and the folder is made.

        Returns:
            The path of the file, with its suffix.

        Raises:
            ValueError: `split` of the segmentation is a callable, of which a file can only hold the name.

        Example:
            >>> import tempfile
            >>> trace = stepsal.Trace.from_text("What is Anna?", "Anna is 3.</think> It is 3.", stepsal.load("mini"))
            >>> stepsal.Trace.load(trace.save(tempfile.mkdtemp() + "/anna")).summary
            'It is 3.'
        """
        if callable(self.segmentation.split):
            raise ValueError(
                f"split={self.segmentation.split!r} is a callable, of which a file can only hold the name: cut the "
                "trace by a regular expression, by 'sentence', 'paragraph' or 'line'"
            )
        document = {
            "question": self.question,
            "response": self.response,
            "text": self.text,
            "steps": [[step.role, step.start, step.end] for step in self.steps],
            "segmentation": self.segmentation.to_dict(),
            "n_prompt": self.n_prompt,
            "truncated": self.truncated,
            "chat": self.chat,
        }
        return save_tensors(path, "Trace", _FILE_VERSION, {"tokens": self.tokens, "offsets": self.offsets}, document)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace that `save` has written; nothing is unpickled or executed.

        Args:
            path: the file, with or without its suffix.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is corrupt, foreign, of another format version, or inconsistent in itself.
        """
        tensors, document = load_tensors(path, "Trace", _FILE_VERSION)
        try:
            steps = tuple(Step(*step) for step in document.pop("steps"))
            segmentation = Segmentation.from_dict(document.pop("segmentation"))
            fields: dict[str, Any] = {**document, **tensors, "steps": steps, "segmentation": segmentation}
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is inconsistent: {error}; save the trace again") from error

    @property
    def format(self) -> str:
        """The name of the format in which the sections were found."""
        return self.segmentation.format_name

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.roles.count(role)} {role}" for role in ("question", "thinking", "summary"))
        return f"Trace({len(self)} tokens, steps: {counts}, format {self.format!r})"

    @cached_property
    def step_ids(self) -> Int[Tensor, " pos"]:
        """The number of the step that each token belongs to; -1 (template) for a token in no step."""
        ids = torch.full((len(self.tokens),), -1)
        for i, step in enumerate(self.steps):
            ids[step.start : step.end] = i
        return ids

    @property
    def roles(self) -> tuple[Role, ...]:
        """The role of each step."""
        return tuple(step.role for step in self.steps)

    @cached_property
    def token_texts(self) -> tuple[str, ...]:
        """The characters of each token."""
        return tuple(self.text[start:end] for start, end in self.offsets.tolist())

    def step_text(self, i: int) -> str:
        """Return the text of a step, without the white space around it.

        Args:
            i: number of the step; 0 is the question.

        Raises:
            IndexError: there is no such step.
        """
        step = self.steps[i]
        return self.text[int(self.offsets[step.start, 0]) : int(self.offsets[step.end - 1, 1])].strip()

    @property
    def thinking(self) -> str:
        """The text of all thinking steps; "" without any."""
        return self._section("thinking")

    @property
    def summary(self) -> str | None:
        """The text of all summary steps; None without any, as where the thinking was cut off."""
        return self._section("summary") or None

    @property
    def answer(self) -> str:
        """The text in which a final answer is sought: the summary, or the response where no marker tells a summary."""
        segmenter = self.segmentation.segmenter(self.text.removesuffix(self.response))
        segmenter.push(self.response)
        return self.response if segmenter.lacks_markers else self.summary or self.response

    def _section(self, role: Role) -> str:
        """Return the text of all steps of a role, a line break where template stands between them."""
        runs: list[tuple[int, int]] = []  # of steps without template between them, as characters
        for step, previous in zip(self.steps, (None, *self.steps), strict=False):
            if step.role != role:
                continue
            start, end = int(self.offsets[step.start, 0]), int(self.offsets[step.end - 1, 1])
            if runs and previous is not None and previous.role == role and previous.end == step.start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
        return "\n".join(self.text[start:end].strip() for start, end in runs)


def _cut_written(
    prompt: Prompt,
    tokenized: TokenizedText,
    n_prompt: int,
    segmentation: Segmentation | None,
    tokenizer: Any,
    *,
    truncated: bool,
) -> Trace:
    """Segment tokens that a model has written itself, which may lack markers and even steps."""
    response = tokenized.text[len(prompt.text) :]
    return _cut(
        prompt,
        tokenized,
        n_prompt=n_prompt,
        segmentation=(segmentation or Segmentation()).resolved(prompt.text, response, stacklevel=4),
        template=tokenizer.all_special_tokens,
        truncated=truncated,
        stacklevel=4,
    )


def _cut(
    prompt: Prompt,
    tokenized: TokenizedText,
    *,
    n_prompt: int,
    segmentation: Segmentation,
    template: Sequence[str],
    truncated: bool = False,
    stacklevel: int = 3,
) -> Trace:
    """Segment a tokenised text that begins with a prompt; the format of `segmentation` is not "auto"."""
    response = tokenized.text[len(prompt.text) :]
    segmenter = segmentation.segmenter(prompt.text, template)
    segmenter.push(response)
    spans, breaks = _spans_in_text(prompt, segmenter)
    warn_of_unread_headers(segmenter.unread_headers, stacklevel=stacklevel + 1)
    ids = step_ids(spans, tokenized.offsets, tokenized.text, breaks)
    return Trace(
        question=prompt.question,
        response=response,
        text=tokenized.text,
        tokens=torch.tensor(tokenized.ids),
        offsets=torch.tensor(tokenized.offsets).reshape(-1, 2),
        steps=_steps_of_tokens(ids, spans),
        segmentation=segmentation,
        n_prompt=n_prompt,
        truncated=truncated,
        chat=prompt.chat,
    )


def _spans_in_text(prompt: Prompt, segmenter: Segmenter) -> tuple[tuple[Span, ...], tuple[int, ...]]:
    """End the response; return its steps as spans in the whole text, and the positions where template text begins."""
    shift = len(prompt.text)
    response_spans = (Span(role, start + shift, end + shift) for role, start, end in segmenter.finish())
    breaks = (0, prompt.end, shift, *(position + shift for position in segmenter.breaks))
    return (Span("question", prompt.start, prompt.end), *response_spans), breaks


def _steps_of_tokens(ids: Sequence[int], spans: Sequence[Span]) -> tuple[Step, ...]:
    """Return the steps as token spans, from the number of the step of each token; steps without tokens are left out."""
    first_and_last: dict[int, tuple[int, int]] = {}
    for position, i in enumerate(ids):
        if i >= 0:
            first_and_last[i] = (first_and_last.get(i, (position,))[0], position)
    return tuple(Step(spans[i].role, first, last + 1) for i, (first, last) in first_and_last.items())
