"""What ends an answer, end tokens and stop texts, and what puts the end of its thinking off: budget forcing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformer_lens.model_bridge import TransformerBridge


def end_tokens(model: TransformerBridge) -> frozenset[int]:
    """Return the end-of-sequence tokens: the tokenizer's, and those of the model's generation settings.

    Args:
        model: with a tokenizer.

    Example:
        >>> model = stepsal.load("mini")
        >>> end_tokens(model) == {model.tokenizer.eos_token_id}
        True
    """
    config = getattr(model.original_model, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    tokens = [model.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return frozenset(int(token) for token in tokens if token is not None)


class StopTexts:
    """Tell when a row has written one of the texts that end an answer, wherever its tokens cut them.

    Args:
        tokenizer: of the model.
        n_rows: rows of the batch.
        texts: at least one, none of them empty (as `Decoding.stop`).
    """

    def __init__(self, tokenizer: Any, n_rows: int, texts: Sequence[str]) -> None:
        self._texts, self._longest = tuple(texts), max(map(len, texts))
        self._backend = tokenizer.backend_tokenizer
        self._streams = [DecodeStream(skip_special_tokens=False) for _ in range(n_rows)]
        self._recent = [""] * n_rows  # the last characters of each row

    def push(self, row: int, token: int) -> bool:
        """Read a token of a row, and tell whether the row has come to its end with it.

        Args:
            row: its number in the batch.
            token: the id of the token.
        """
        text = self._recent[row] + (self._streams[row].step(self._backend, token) or "")
        self._recent[row] = text[-self._longest :]
        return any(stop in text for stop in self._texts)


def check_budget_forcing(model: TransformerBridge, times: int) -> None:
    """Check that a model ends its thinking by one token, which budget forcing can replace.

    Args:
        model: with a tokenizer.
        times: how many times the end of the thinking is to be replaced; 0 asks nothing of the model.

    Raises:
        ValueError: it ends thinking by more than one token.
    """
    if times and "<|channel|>" in model.tokenizer.get_vocab():
        raise ValueError(
            f"budget_forcing={times} is not supported for Harmony channels, which end thinking in several tokens: use "
            "budget_forcing=0"
        )


class BudgetForcing:
    """Let rows that would end their thinking write "Wait" instead, some times (s1, arXiv 2501.19393).

    Args:
        model: with a tokenizer.
        n_rows: rows of the batch.
        times: how many times a row does not end its thinking.

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
        """Return the token that a row writes where the model has chosen this one.

        Args:
            row: its number in the batch.
            token: the id of the chosen token.
        """
        if not self._pending[row] and self._times_left[row] and token in self._ends:
            self._times_left[row] -= 1
            self._pending[row] = list(self._wait)
        return self._pending[row].pop(0) if self._pending[row] else token
