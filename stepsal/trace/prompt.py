"""Prompts: a question inside the chat template of a tokenizer, and its place there.

`render_prompts` renders questions, and so knows their places. In a prompt that was rendered elsewhere the question is
found by the template's text around it: `locate_question` finds a known question, a `PromptFrame` an unknown one.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from stepsal.trace.encoding import check_characters
from stepsal.trace.template import apply_template, chat_template_of, reserved_names, switches_of

_QUESTION_STAND_IN = "\ue000question\ue001"  # private-use characters, which are in no real text


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt, with the place of the question in it.

    Attributes:
        question: as asked.
        text: the question with the chat template around it.
        start: position in `text` of the first character of the question that is no white space.
        end: position after its last character that is no white space.
        chat: switches of the chat template that it was rendered with.

    Example:
        >>> prompt = stepsal.trace.render_prompt(stepsal.load("mini").tokenizer, "What is Anna?")
        >>> prompt.text[prompt.start : prompt.end], prompt.tail
        ('What is Anna?', '<|assistant|><think>')
    """

    question: str
    text: str
    start: int
    end: int
    chat: dict[str, Any] = field(default_factory=dict, kw_only=True, hash=False)

    @property
    def tail(self) -> str:
        """The template's text between the question and the response."""
        return self.text[self.end :]


@dataclass(frozen=True)
class TokenizedPrompt(Prompt):
    """A rendered prompt with its tokens: all that writing an answer and segmenting it into steps need to know of it.

    Attributes:
        ids: token ids of `text`.

    Example:
        >>> tokenizer = stepsal.load("mini").tokenizer
        >>> prompt = stepsal.trace.render_prompt(tokenizer, "What is Anna?")
        >>> tokenizer.decode(stepsal.trace.tokenize_prompt(tokenizer, prompt).ids[-2:])
        '<|assistant|><think>'
    """

    ids: tuple[int, ...]


def render_prompt(
    tokenizer: Any, question: str, system: str | None = None, *, chat: Mapping[str, Any] | None = None
) -> Prompt:
    """Put the tokenizer's chat template around a question.

    A tokenizer without a chat template puts BOS before the question and a line break after it.

    Args:
        tokenizer: of Hugging Face.
        question: what the user asks.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template, such as {"enable_thinking": False}.

    Raises:
        ValueError: a question that is empty, holds half a character or is altered by the template, or a switch that
            the template does not have.

    Example:
        >>> prompt = stepsal.trace.render_prompt(stepsal.load("mini").tokenizer, "What is Anna?")
        >>> prompt.text[: prompt.start], prompt.tail
        ('<|endoftext|><|user|>', '<|assistant|><think>')
    """
    return render_prompts(tokenizer, [question], system, chat=chat)[0]


def render_prompts(
    tokenizer: Any, questions: Sequence[str], system: str | None = None, *, chat: Mapping[str, Any] | None = None
) -> list[Prompt]:
    """Put the tokenizer's chat template around several questions, as `render_prompt` does around one.

    Args:
        tokenizer: of Hugging Face.
        questions: the questions that the user asks.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template.

    Raises:
        ValueError: a question that is empty, holds half a character or is altered by the template, or a switch that
            the template does not have.

    Example:
        >>> prompts = stepsal.trace.render_prompts(stepsal.load("mini").tokenizer, ["What is Anna?", "And Hugo?"])
        >>> [prompt.text[prompt.start : prompt.end] for prompt in prompts]
        ['What is Anna?', 'And Hugo?']
    """
    for question in questions:
        require_text("question", question)
        check_characters("question", question)
    check_characters("system", system or "")
    switches = check_chat(tokenizer, chat)
    # the template's text before a question tells where it stands: "user" or "assistant" may occur elsewhere, too
    head, stand_in, _ = _render(tokenizer, _QUESTION_STAND_IN, system, switches).partition(_QUESTION_STAND_IN)
    prompts = []
    for question in questions:
        text = _render(tokenizer, question, system, switches)
        stripped = question.strip()
        indent = 0 if text.startswith(stripped, len(head)) else question.index(stripped)  # many templates strip it
        start = len(head) + indent
        if not stand_in or not text.startswith(stripped, start):
            raise ValueError(
                f"the chat template altered the question {question[:60]!r}, so that it can't be found in the prompt: "
                "set tokenizer.chat_template to one that keeps it"
            )
        prompts.append(Prompt(question, text, start, start + len(stripped), chat=switches))
    return prompts


def tokenize_prompt(tokenizer: Any, prompt: Prompt) -> TokenizedPrompt:
    """Return a prompt with its tokens; no special tokens are added to those of the template.

    Args:
        tokenizer: the tokenizer whose chat template was rendered.
        prompt: from `render_prompt`.

    Example:
        >>> tokenizer = stepsal.load("mini").tokenizer
        >>> prompt = stepsal.trace.render_prompt(tokenizer, "What is Anna?")
        >>> len(stepsal.trace.tokenize_prompt(tokenizer, prompt).ids)
        9
    """
    ids = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    return TokenizedPrompt(prompt.question, prompt.text, prompt.start, prompt.end, tuple(ids), chat=prompt.chat)


def check_chat(tokenizer: Any, chat: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check the switches that a caller sets of a tokenizer's chat template, and return them as a plain dict.

    Args:
        tokenizer: of Hugging Face.
        chat: switches of the chat template by name; None and {} set none.

    Raises:
        ValueError: a name that the template does not use, or that `apply_chat_template` sets itself; a value that JSON
            does not hold, or that is a word for True or False; or there is no template.

    Example:
        >>> tokenizer = stepsal.load("mini").tokenizer
        >>> tokenizer.chat_template += "{% if enable_thinking is false %}</think>{% endif %}"
        >>> stepsal.trace.check_chat(tokenizer, {"enable_thinking": False})
        {'enable_thinking': False}
    """
    if chat is None:
        return {}
    if not isinstance(chat, Mapping):
        raise ValueError(f"chat={chat!r} must map switches of the chat template, as {{'enable_thinking': False}} does")
    if not chat:
        return {}
    if chat_template_of(tokenizer) is None:
        raise ValueError(f"chat={dict(chat)!r}: the tokenizer has no chat template; set tokenizer.chat_template")
    switches, own = switches_of(tokenizer), reserved_names(tokenizer)
    for name, value in chat.items():
        if name not in switches:
            reason = "is set by apply_chat_template itself" if name in own else "is not used by the chat template"
            remedy = f"use {', '.join(map(repr, switches))}" if switches else "it has no switches"
            raise ValueError(f"chat={dict(chat)!r}: {name!r} {reason}; {remedy}")
        if isinstance(value, str) and value.lower() in ("true", "false", "none") and value not in switches[name]:
            meant = value.lower().capitalize()
            raise ValueError(f"chat: {name}={value!r} is a text, which templates take for true: use {meant} itself")
        try:
            kept = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise ValueError(f"chat: {name}={value!r} has no form in JSON; use text, numbers, True, False, None, lists")
    return dict(chat)


def template_around(
    tokenizer: Any, system: str | None = None, *, chat: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """Return the chat template's text before and after a question.

    A template without a place for a system prompt is rendered without one.

    Args:
        tokenizer: of Hugging Face.
        system: a system prompt; None keeps what the chat template does by itself.
        chat: switches of the chat template.

    Raises:
        ValueError: a switch that the template does not have.
    """
    switches = check_chat(tokenizer, chat)
    try:
        text = _render(tokenizer, _QUESTION_STAND_IN, system, switches)
    except jinja2.TemplateError:  # raised by templates that refuse the role
        text = _render(tokenizer, _QUESTION_STAND_IN, None, switches)
    head, _, tail = text.partition(_QUESTION_STAND_IN)
    return head, tail


def locate_question(text: str, question: str, tail: str) -> tuple[int, int]:
    """Return the start and the end of a question in the text of a prompt.

    Args:
        text: the prompt, as a tokenizer decodes it.
        question: as asked; the text may hold it in a normalised form.
        tail: text that the chat template puts after a question. Of several places that spell the question, the one
            before this text is taken; without such a place, the last one.

    Raises:
        ValueError: the text does not hold the question.

    Example:
        >>> from stepsal.trace.prompt import locate_question
        >>> locate_question("user: Who is user?<a>", " user", "?<a>")
        (13, 17)
    """
    head = (
        text.rstrip().removesuffix(tail.strip()).rstrip()
    )  # a question may end with white space that a template keeps
    for form in (None, "NFC", "NFKC"):  # what the tokenizer's normaliser may have made of it
        spelling = question.strip() if form is None else unicodedata.normalize(form, question.strip())
        start = len(head) - len(spelling) if head.endswith(spelling) else text.rfind(spelling)
        if start >= 0:
            return start, start + len(spelling)
    raise ValueError(
        f"token/text mismatch: the prompt's tokens do not spell the question {question[:60]!r}; give the question that "
        "stands in the prompt, and the tokenizer that made its tokens"
    )


def require_text(name: str, text: str) -> None:
    """Refuse a text that is empty or white space.

    Args:
        name: name of the text, for the error.
        text: the text.

    Raises:
        ValueError: the text is empty or white space.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}={text!r} is empty: there is nothing to trace")


def _render(tokenizer: Any, question: str, system: str | None, chat: Mapping[str, Any]) -> str:
    """Return the text of a prompt."""
    if chat_template_of(tokenizer) is None:
        return "".join((tokenizer.bos_token or "", f"{system}\n\n" if system else "", question, "\n"))
    messages = [{"role": "system", "content": system}] if system else []
    return apply_template(tokenizer, [*messages, {"role": "user", "content": question}], chat)
