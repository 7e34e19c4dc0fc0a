"""Text to tokens and back, with the characters that each token spells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers.decoders import DecodeStream


@dataclass(frozen=True)
class TokenizedText:
    """A text with its tokens.

    Attributes:
        text: the text that the tokens spell.
        ids: token ids.
        offsets: half-open character span of each token in `text`; spans are ordered, and may be empty or overlap.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


def tokenizer_of(model_or_tokenizer: Any) -> Any:
    """Return the fast tokenizer of a model, or the tokenizer itself.

    Args:
        model_or_tokenizer: a model with a tokenizer, or a tokenizer.

    Raises:
        ValueError: there is no tokenizer, or a slow one, which does not tell which characters a token spells.
    """
    tokenizer = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: pass one to stepsal.load(..., tokenizer=...)")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets: load the fast tokenizer, e.g. "
            "AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    return tokenizer


def check_context(n_tokens: int, model_or_tokenizer: Any) -> None:
    """Check that tokens fit into the context of a model.

    Args:
        n_tokens: number of tokens.
        model_or_tokenizer: the model; with a tokenizer in its place nothing is checked.

    Raises:
        ValueError: the tokens do not fit.
    """
    n_ctx = getattr(getattr(model_or_tokenizer, "cfg", None), "n_ctx", None)
    if n_ctx is not None and n_tokens > n_ctx:
        raise ValueError(
            f"the trace has {n_tokens} tokens but the model's context is {n_ctx}: shorten the response, or load "
            f"the model with a longer context, stepsal.load(..., n_ctx={n_tokens})"
        )


def encode(tokenizer: Any, text: str) -> TokenizedText:
    """Tokenise a text, with the character span of each token.

    As in `decode`, a token that ends within a character has an empty span; its character counts to the token that
    completes it.

    Args:
        tokenizer: a fast one.
        text: the text, with the special tokens written out; none are added.

    Raises:
        ValueError: the text holds half a character, or the spans do not fit it.

    Example:
        >>> from stepsal.trace.encoding import encode
        >>> encode(stepsal.load("mini").tokenizer, "Anna is here").offsets[:2]
        ((0, 4), (4, 7))
    """
    check_characters("the text", text)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tuple(encoding["input_ids"])
    offsets = tuple((int(start), int(end)) for start, end in encoding["offset_mapping"])
    check_offsets(offsets, text, tokenizer.convert_ids_to_tokens(list(ids)))
    return TokenizedText(text, ids, _without_shared_characters(offsets))


def decode(tokenizer: Any, ids: Sequence[int]) -> TokenizedText:
    """Spell given tokens one by one, with the character span of each; the text is not tokenised anew.

    A token that ends within a character has an empty span; its character counts to the token that completes it.

    Args:
        tokenizer: a fast one.
        ids: token ids.
    """
    backend = tokenizer.backend_tokenizer
    stream = DecodeStream(skip_special_tokens=False)
    pieces, offsets, position = [], [], 0
    for i in ids:
        piece = stream.step(backend, i) or ""
        pieces.append(piece)
        offsets.append((position, position + len(piece)))
        position += len(piece)
    return TokenizedText("".join(pieces), tuple(ids), tuple(offsets))


def check_characters(name: str, text: str) -> None:
    """Refuse a text with half a character in it, which no tokenizer can read.

    Args:
        name: name of the text, for the error.
        text: the text.

    Raises:
        ValueError: the text holds a lone surrogate.

    Example:
        >>> from stepsal.trace.encoding import check_characters
        >>> check_characters("response", "a party \U0001f389")
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"{name} holds half a character (a lone surrogate) at position {error.start}, in {around!a}: it was "
            "cut within a character or read in a wrong encoding; read it as UTF-8, or replace such places by "
            "text.encode('utf-8', 'replace').decode()"
        ) from None


def _without_shared_characters(offsets: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Give characters that several tokens share, such as those of an emoji, to the last of these tokens."""
    spans: list[tuple[int, int]] = []
    begin = None  # of the characters that are not complete
    for (start, end), (next_start, _) in pairwise((*offsets, (offsets[-1][1],) * 2)):
        begin = start if begin is None else begin
        if next_start < end:
            spans.append((begin, begin))
        else:
            spans.append((begin, end))
            begin = None
    return tuple(spans)


def check_offsets(offsets: Sequence[tuple[int, int]], text: str, tokens: Sequence[str]) -> None:
    """Check that the spans of tokens are ordered and lie within the text.

    Args:
        offsets: half-open character span of each token.
        text: the text that the tokens spell.
        tokens: the tokens, for the error.

    Raises:
        ValueError: there are no spans, or they are out of order or outside the text.
    """
    last = 0
    for i, (start, end) in enumerate(offsets):
        if not 0 <= start <= end <= len(text) or start < last:
            raise ValueError(
                f"token/text mismatch: token {i} ({tokens[i]!r}) claims characters {start}..{end} of {len(text)} "
                f"after {last}: the tokenizer's normaliser changes the text; use one that keeps it"
            )
        last = start
    if not offsets:
        raise ValueError("token/text mismatch: the text has no tokens; give one that is not empty")
