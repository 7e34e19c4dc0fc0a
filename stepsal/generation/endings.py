"""Ends of answers, by end tokens and stop texts, and budget forcing, which puts off the end of the thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformer_lens.model_bridge import TransformerBridge


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


class StopTexts:
    """A check for the texts that end an answer, in each row of a batch and wherever tokens divide them.

    Args:
        tokenizer: tokenizer of the model.
        n_rows: number of rows of the batch.
        texts: the stop texts, at least one and none of them empty (as `Decoding.stop`).
    """

    def __init__(self, tokenizer: Any, n_rows: int, texts: Sequence[str]) -> None:
        self._texts, self._longest = tuple(texts), max(map(len, texts))
        self._backend = tokenizer.backend_tokenizer
        self._streams = [DecodeStream(skip_special_tokens=False) for _ in range(n_rows)]
        self._recent = [""] * n_rows  # the last characters of each row

    def push(self, row: int, token: int) -> bool:
        """Read a token of a row, and tell whether it completes a stop text.

        Args:
            row: number of the row in the batch.
            token: the id of the token.
        """
        text = self._recent[row] + (self._streams[row].step(self._backend, token) or "")
        self._recent[row] = text[-self._longest :]
        return any(stop in text for stop in self._texts)


def check_budget_forcing(model: TransformerBridge, times: int) -> None:
    """Check that a model ends its thinking by one token, which budget forcing can replace.

    Args:
        model: a model with a tokenizer.
        times: number of times that the end of the thinking is to be replaced; with 0 any model passes.

    Raises:
        ValueError: the model ends thinking by more than one token.
    """
    if times and "<|channel|>" in model.tokenizer.get_vocab():
        raise ValueError(
            f"budget_forcing={times} is not supported for Harmony channels, which end thinking in several tokens: use "
            "budget_forcing=0"
        )


class BudgetForcing:
    """Budget forcing: rows that would end their thinking write "Wait" instead (s1, arXiv 2501.19393).

    Args:
        model: a model with a tokenizer.
        n_rows: number of rows of the batch.
        times: number of times that the end of the thinking is replaced in each row.

    Raises:
        ValueError: the tokenizer ends thinking by more than one token.
    """

    def __init__(self, model: TransformerBridge, n_rows: int, times: int) -> None:
        check_budget_forcing(model, times)
        vocabulary = model.tokenizer.get_vocab()
        self._ends = {vocabulary["</think>"]} if "</think>" in vocabulary else end_tokens(model)
        self._wait: list[int] = model.tokenizer("Wait", add_special_tokens=False)["input_ids"]
        self._times_left = [times] * n_rows
        self._pending: list[list[int]] = [[] for _ in range(n_rows)]  # tokens of "Wait" still to be written

    def replace(self, row: int, token: int) -> int:
        """Return the token that a row writes in place of the chosen one, which most often is the same.

        Args:
            row: number of the row in the batch.
            token: the id of the chosen token.
        """
        if not self._pending[row] and self._times_left[row] and token in self._ends:
            self._times_left[row] -= 1
            self._pending[row] = list(self._wait)
        return self._pending[row].pop(0) if self._pending[row] else token
