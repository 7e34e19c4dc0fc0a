"""A text that may go on in a right and in a wrong way: what a model is asked to tell apart, without any decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepsal.trace.encoding import tokenizer_of
from stepsal.trace.prompt import TokenizedPrompt, render_prompt, tokenize_prompt
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Trace


@dataclass(frozen=True)
class Continuation:
    """A question, an answer that has been begun, and how it goes on.

    Attributes:
        question: what the user asks.
        before: the answer so far; it may be empty.
        right: the right continuation. It is tokenised apart from `before`, so it should begin where a token does: with
            the space before a word, for most tokenizers.
        wrong: a wrong continuation; None for none.
        about: labels, such as the number of steps in between; JSON-ready.

    Raises:
        ValueError: `right` or `wrong` is empty, or both are the same.

    Example:
        >>> from stepsal.trace.continuation import Continuation
        >>> text = Continuation("The red box holds 7. And the blue one?", "The red box holds", right=" 7", wrong=" 9")
        >>> trace, n_new = text.trace(stepsal.load("mini"))
        >>> trace.step_text(1), n_new
        ('The red box holds 7', 1)
    """

    question: str
    before: str
    right: str
    wrong: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("right", "wrong"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty: give at least one character that follows {self.before[-40:]!r}")
        if self.right == self.wrong:
            raise ValueError(f"right and wrong are both {self.right!r}: give two that differ, or no wrong one")

    def trace(
        self, model_or_tokenizer: Any, *, wrong: bool = False, segmentation: Segmentation | None = None
    ) -> tuple[Trace, int]:
        """Return the text with its right or its wrong continuation, and the number of tokens of that.

        Args:
            model_or_tokenizer: a fast tokenizer, or a model with one.
            wrong: take the wrong continuation.
            segmentation: the way to find sections and steps; None is `Segmentation()`.

        Raises:
            ValueError: there is no wrong continuation, or the text does not fit into the model's context.
        """
        text = self.wrong if wrong else self.right
        if text is None:
            raise ValueError(f"the continuation of {self.before[-40:]!r} has no wrong one: give it one by wrong=")
        tokenizer = tokenizer_of(model_or_tokenizer)
        before, new = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (self.before, text))
        prompt = self._prompt(tokenizer)
        trace = Trace.from_answer(
            prompt, [*before, *new], model_or_tokenizer, truncated=True, segmentation=segmentation
        )
        return trace, len(new)

    def _prompt(self, tokenizer: Any) -> TokenizedPrompt:
        return tokenize_prompt(tokenizer, render_prompt(tokenizer, self.question))
