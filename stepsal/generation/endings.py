"""Ends of answers, by end tokens and stop texts, and budget forcing, which puts off the end of the thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.presets import preset_format
from stepsal.trace.formats import FORMATS, Format
from stepsal.trace.segment import Segmentation
from stepsal.trace.segmenter import Segmenter

PROMPT_END = 64
"""Number of tokens at the end of a prompt among which a marker may open the thinking."""


def end_tokens(model: TransformerBridge) -> frozenset[int]:
    """Return the end-of-sequence tokens of a model, from its tokenizer and its generation settings.

    Args:
        model: a model with a tokenizer.

    Example:
        >>> from stepsal.generation.endings import end_tokens
        >>> model = stepsal.load("mini")
        >>> end_tokens(model) == {model.tokenizer.eos_token_id}
        True
    """
    config = getattr(model.original_model, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    tokens = [model.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return frozenset(int(token) for token in tokens if token is not None)


def watched_formats(model: TransformerBridge, segmentation: Segmentation | None) -> tuple[Format, ...]:
    """Return the formats by whose markers the thinking of a model's answers may be told while they are written.

    Args:
        model: a model, with or without a tokenizer.
        segmentation: the way to find sections; where it names no format, the model tells it, and where the model
            does not tell either, it may be any of the known ones.

    Example:
        >>> from stepsal.generation.endings import watched_formats
        >>> [format.name for format in watched_formats(stepsal.load("mini"), None)]
        ['think']
    """
    format: str | Format = "auto" if segmentation is None else segmentation.format
    if format == "auto":
        format = preset_format(model) or "auto"
    if isinstance(format, Format):
        return (format,)
    return tuple(FORMATS.values()) if format == "auto" else (FORMATS[format],)


class ThinkingWatch:
    """A check whether an answer is known to be thinking while it is written.

    It is where a marker has opened the thinking, in the answer or at the end of its prompt, and none has closed it
    since. Where all is thinking until a marker, as in `Format.with_marker`, no marker is needed to open it.

    Args:
        formats: the formats whose markers count.
        prompt: the rendered prompt, or the end of it.

    Example:
        >>> from stepsal.generation.endings import ThinkingWatch
        >>> watch = ThinkingWatch([stepsal.trace.FORMATS["think"]], "<assistant><think>")
        >>> watch.push("One more than one.")
        >>> is_open_before = watch.is_open
        >>> watch.push("</think>Two.")
        >>> is_open_before, watch.is_open
        (True, False)
    """

    def __init__(self, formats: Sequence[Format], prompt: str) -> None:
        self._segmenters = [
            Segmenter(format.after(prompt), split="line") for format in formats if not format.last_is_summary
        ]

    def push(self, text: str) -> None:
        """Read more of the answer.

        Args:
            text: the next characters.
        """
        for segmenter in self._segmenters:
            segmenter.push(text)

    @property
    def is_open(self) -> bool:
        """True where the text so far ends in the thinking."""
        return any(segmenter.role == "thinking" and not segmenter.lacks_markers for segmenter in self._segmenters)


class StopTexts:
    """A check for the texts that end an answer, wherever tokens divide them.

    Args:
        tokenizer: tokenizer of the model.
        texts: the stop texts, at least one and none of them empty (as `Decoding.stop`).
        watch: the check whether the answer is thinking, where a stop text does not count; None lets stop texts count
            everywhere.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], watch: ThinkingWatch | None = None) -> None:
        self._texts, self._longest = tuple(texts), max(map(len, texts))
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._recent = ""  # the last characters
        self._watch = watch

    def push(self, token: int) -> bool:
        """Read a token, and tell whether it completes a stop text that counts.

        Args:
            token: the id of the token.
        """
        piece = self._stream.step(self._backend, token) or ""
        before, watch = self._recent, self._watch
        self._recent = (before + piece)[-self._longest :]
        is_complete = any(stop in before + piece for stop in self._texts)
        if watch is None:
            return is_complete
        if not is_complete:
            watch.push(piece)
            return False
        does_count = False
        for char in piece:  # the thinking may end in the middle of a token
            before += char
            watch.push(char)
            does_count |= before.endswith(self._texts) and not watch.is_open
        return does_count


def before_stop(text: str, before_last: str, stop: Sequence[str]) -> str:
    """Return an answer up to the stop text that ended it, which the last token has completed.

    Args:
        text: the answer.
        before_last: the answer without its last token.
        stop: the stop texts. Where one stands earlier in the answer, it did not count there.

    Example:
        >>> from stepsal.generation.endings import before_stop
        >>> before_stop("One, so two.</think>Two, so", "One, so two.</think>Two,", ["so", "never written"])
        'One, so two.</think>Two, '
    """
    n_before = len(before_last.rstrip("\ufffd"))  # the beginning of a character that the last token completes
    places = [text.find(words, max(0, n_before - len(words) + 1)) for words in stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def thinking_ends(model: TransformerBridge, segmentation: Segmentation | None = None) -> frozenset[int]:
    """Return the tokens that end a model's thinking; those that end its answer where no marker ends the thinking.

    Args:
        model: a model with a tokenizer.
        segmentation: the way to find sections; where it names no format, the model tells it.

    Raises:
        ValueError: the marker that ends the thinking has several tokens.

    Example:
        >>> from stepsal.generation.endings import thinking_ends
        >>> model = stepsal.load("mini")
        >>> [model.tokenizer.decode(token) for token in thinking_ends(model)]
        ['</think>']
    """
    format = (segmentation or Segmentation()).named_format or FORMATS[preset_format(model) or "plain"]
    if format.header is not None:
        raise ValueError(
            f"budget forcing is not supported for the headers of format {format.name!r}, which end thinking in several "
            "tokens: use budget_forcing=0"
        )
    if not format.closings:
        return end_tokens(model)
    ids: list[int] = model.tokenizer(format.closings[0], add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"budget forcing replaces one token, but {format.closings[0]!r}, which ends the thinking in format "
            f"{format.name!r}, has {len(ids)} tokens in this tokenizer: use budget_forcing=0"
        )
    return frozenset(ids)


class BudgetForcing:
    """Budget forcing: an answer that would end its thinking writes "Wait" instead (s1, arXiv 2501.19393).

    Args:
        ends: tokens that end the thinking, from `thinking_ends`.
        wait: tokens of "Wait".
        times: number of times that the end of the thinking is replaced.
    """

    def __init__(self, ends: frozenset[int], wait: Sequence[int], times: int) -> None:
        self._ends, self._wait, self._n_left = ends, wait, times
        self._pending: list[int] = []  # tokens of "Wait" still to be written

    def replace(self, token: int) -> int:
        """Return the token that is written in place of the chosen one, which most often is the same.

        Args:
            token: the id of the chosen token.
        """
        if not self._pending and self._n_left and token in self._ends:
            self._n_left -= 1
            self._pending = list(self._wait)
        return self._pending.pop(0) if self._pending else token
