"""Prompts: a question inside the chat template of a tokenizer, and its place there.

`render_prompts` renders questions, and so knows their places. In a prompt that was rendered elsewhere the question is
found by the template's text around it: `locate_question` finds a known question, a `PromptFrame` an unknown one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jinja2

# private-use characters, which are in no real text
_QUESTION_STAND_IN = "\ue000question\ue001"
_SYSTEM_STAND_INS = ("\ue002", "x\ue003")  # with nothing in common


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt, with the place of the question in it.

    Attributes:
        question: as asked.
        text: the question with the chat template around it.
        start: position in `text` of the first character of the question that is no white space.
        end: position after its last character that is no white space.

    Example:
        >>> prompt = stepsal.trace.render_prompt(stepsal.load("mini").tokenizer, "What is Anna?")
        >>> prompt.text[prompt.start : prompt.end], prompt.tail
        ('What is Anna?', '<|assistant|><think>')
    """

    question: str
    text: str
    start: int
    end: int

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


def render_prompt(tokenizer: Any, question: str, system: str | None = None) -> Prompt:
    """Put the tokenizer's chat template around a question.

    A tokenizer without a chat template puts BOS before the question and a line break after it.

    Args:
        tokenizer: of Hugging Face.
        question: what the user asks.
        system: a system prompt; None keeps what the chat template does by itself.

    Raises:
        ValueError: an empty question, or a template that alters it.

    Example:
        >>> prompt = stepsal.trace.render_prompt(stepsal.load("mini").tokenizer, "What is Anna?")
        >>> prompt.text[: prompt.start], prompt.tail
        ('<|endoftext|><|user|>', '<|assistant|><think>')
    """
    return render_prompts(tokenizer, [question], system)[0]


def render_prompts(tokenizer: Any, questions: Sequence[str], system: str | None = None) -> list[Prompt]:
    """Put the tokenizer's chat template around several questions, as `render_prompt` does around one.

    Args:
        tokenizer: of Hugging Face.
        questions: the questions that the user asks.
        system: a system prompt; None keeps what the chat template does by itself.

    Raises:
        ValueError: an empty question, or a template that alters it.

    Example:
        >>> prompts = stepsal.trace.render_prompts(stepsal.load("mini").tokenizer, ["What is Anna?", "And Hugo?"])
        >>> [prompt.text[prompt.start : prompt.end] for prompt in prompts]
        ['What is Anna?', 'And Hugo?']
    """
    for question in questions:
        require_text("question", question)
    # the template's text before a question tells where it stands: "user" or "assistant" may occur elsewhere, too
    head, stand_in, _ = _render(tokenizer, _QUESTION_STAND_IN, system).partition(_QUESTION_STAND_IN)
    prompts = []
    for question in questions:
        text = _render(tokenizer, question, system)
        stripped = question.strip()
        indent = 0 if text.startswith(stripped, len(head)) else question.index(stripped)  # many templates strip it
        start = len(head) + indent
        if not stand_in or not text.startswith(stripped, start):
            raise ValueError(
                f"the chat template altered the question {question[:60]!r}, so that it can't be found in the prompt: "
                "set tokenizer.chat_template to one that keeps it"
            )
        prompts.append(Prompt(question, text, start, start + len(stripped)))
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
    return TokenizedPrompt(prompt.question, prompt.text, prompt.start, prompt.end, tuple(ids))


def template_around(tokenizer: Any, system: str | None = None) -> tuple[str, str]:
    """Return the chat template's text before and after a question.

    A template without a place for a system prompt is rendered without one.

    Args:
        tokenizer: of Hugging Face.
        system: a system prompt; None keeps what the chat template does by itself.
    """
    try:
        text = _render(tokenizer, _QUESTION_STAND_IN, system)
    except jinja2.TemplateError:  # raised by templates that refuse the role
        text = _render(tokenizer, _QUESTION_STAND_IN, None)
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
    for form in (None, "NFC", "NFKC"):  # what the tokenizer's normaliser may have made of it
        spelling = question.strip() if form is None else unicodedata.normalize(form, question.strip())
        is_before_tail = text.endswith(spelling + tail)
        start = len(text) - len(spelling + tail) if is_before_tail else text.rfind(spelling)
        if start >= 0:
            return start, start + len(spelling)
    raise ValueError(
        f"token/text mismatch: the prompt's tokens do not spell the question {question[:60]!r}; give the question that "
        "stands in the prompt, and the tokenizer that made its tokens"
    )


@dataclass(frozen=True)
class PromptFrame:
    r"""The chat template's text right before and right after any question, whatever the system prompt.

    Attributes:
        opening: text right before the question, such as "<|im_start|>user\n", without the system prompt. Where a
            template puts the system prompt inside the user's turn, it is taken for part of the question.
        tail: text between the question and the response.

    Example:
        >>> stepsal.trace.PromptFrame.of(stepsal.load("mini").tokenizer)
        PromptFrame(opening='<|user|>', tail='<|assistant|><think>')
    """

    opening: str
    tail: str

    @classmethod
    def of(cls, tokenizer: Any) -> PromptFrame:
        """Read the frame off a tokenizer's chat template.

        Args:
            tokenizer: of Hugging Face.

        Raises:
            ValueError: there is no chat template, or nothing in it marks the end of a question.
        """
        head, tail = template_around(tokenizer)
        heads = [head, *(template_around(tokenizer, system=system)[0] for system in _SYSTEM_STAND_INS)]
        if not tail.strip():
            raise ValueError(
                "the tokenizer has no chat template that marks the end of a question, which following a sequence "
                "needs: set tokenizer.chat_template"
            )
        return cls(_common_end(heads).strip() or head.strip(), tail.strip())

    def locate(self, text: str) -> tuple[int, int, int] | None:
        """Return where question and prompt lie in a text: start and end of the question, end of the prompt.

        While the prompt is not complete, the result is None.

        Args:
            text: the text of a sequence, or its beginning; positions count its characters.
        """
        end = max(0, text.find(self.opening)) if self.opening in text else len(text)
        while (end := text.find(self.tail, end)) >= 0:
            start = text.rfind(self.opening, 0, end) + len(self.opening)
            question = text[start:end]
            if stripped := question.strip():
                start += question.index(stripped)
                return start, start + len(stripped), end + len(self.tail)
            end += len(self.tail)
        return None


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


def _render(tokenizer: Any, question: str, system: str | None) -> str:
    """Return the text of a prompt."""
    if not getattr(tokenizer, "chat_template", None):
        return "".join((tokenizer.bos_token or "", f"{system}\n\n" if system else "", question, "\n"))
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _common_end(texts: Sequence[str]) -> str:
    """Return the longest text with which all texts end."""
    backwards = zip(*(text[::-1] for text in texts), strict=False)
    shared = [characters[0] for characters in takewhile(lambda c: len(set(c)) == 1, backwards)]
    return "".join(reversed(shared))
