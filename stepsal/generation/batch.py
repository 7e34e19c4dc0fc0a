"""The rows of a decoding batch as the model reads them: tokens to read, attention mask, and cache.

Rows are padded on the left, so that the next token of all of them goes into one column:

    . . q q q t t t      . is padding, q the prompt, t the answer so far
    q q q q q q q t
    . . . . . q q q      a prompt that took the place of an answer that has ended

`Batch.keep` drops rows, and with them the columns on the left that are padding in all others. `Batch.add` reads
prompts beside the rows that are there, and puts their keys below those of the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids

from stepsal.bridge.native import Native
from stepsal.generation.cache import growing_cache, join, let_go, rows_can_join
from stepsal.intervention import active_flow

PORTION = 512
"""Most tokens of a prompt that are read in one pass; so the pattern of an edited layer grows linearly with it."""


class Batch:
    """The rows of a batch, of different lengths, whose next tokens come from one pass.

    Args:
        model: a model.
        parts: what of it runs without wrappers.

    Attributes:
        n_rows: number of rows.
        can_refill: False where the model's positions or its cache don't let rows join others, so that prompts are
            added to an empty batch alone.
    """

    def __init__(self, model: TransformerBridge, parts: Native) -> None:
        self._model, self._parts, self._flow = model, parts, active_flow(model)
        self._device = next(model.parameters()).device
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.original_model.forward).parameters:
            self._options["logits_to_keep"] = 1  # [batch, 1, d_vocab] instead of [batch, pos, d_vocab] for the prompt
        self._cache: Any = self._new_cache()
        self._takes_positions = accepts_mask_derived_position_ids(model.original_model)
        self.can_refill = self._takes_positions and rows_can_join(self._cache)
        self._lengths: list[int] = []  # tokens of each row, those included that are to be read
        self._tokens: Tensor  # tokens that are to be read, [row, new_pos]
        self._mask: Tensor  # 1 for tokens, 0 for padding, [row, pos]

    @property
    def n_rows(self) -> int:
        """The number of rows."""
        return len(self._lengths)

    def add(self, prompts: Sequence[Sequence[int]]) -> None:
        """Add a row for each prompt, below the others.

        Args:
            prompts: token ids of each prompt, at least one.

        Raises:
            ValueError: rows can't join those that are there.
        """
        if not self.n_rows:
            self._cache = self._new_cache()
            self._tokens, self._mask = self._read_ahead(prompts, self._cache, n_left=PORTION)
        elif not self.can_refill:
            raise ValueError(f"rows can't join others in {self._model.cfg.model_name!r}: wait until the batch is empty")
        else:
            aside = None if self._flow is None else self._flow.set_aside()
            cache = self._new_cache()
            tokens, mask = self._read_ahead(prompts, cache, n_left=1)
            join(self._cache, cache)
            if self._flow is not None and aside is not None:
                self._flow.join(aside, self._cache)
            width = max(self._mask.shape[1], mask.shape[1])
            self._mask = torch.cat([pad(m, (width - m.shape[1], 0)) for m in (self._mask, mask)])
            self._tokens = torch.cat([self._tokens, tokens])
        self._lengths += map(len, prompts)

    def next_logits(self) -> Float[Tensor, "row d_vocab"]:
        """Read the tokens that the model has not read yet, and return the logits of those to come."""
        return self._read(self._tokens, self._mask, self._cache)

    def append(self, tokens: Int[Tensor, " row"]) -> None:
        """Add a token to each row, which the next pass reads.

        Args:
            tokens: the token of each row.
        """
        self._tokens = tokens[:, None]
        self._mask = pad(self._mask, (0, 1), value=1)
        self._lengths = [length + 1 for length in self._lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order: those that are done cost nothing any more.

        It is called after a pass, before the next tokens are appended.

        Args:
            rows: indices of rows.
        """
        if self._flow is not None:
            self._flow.select(rows)
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:  # the next prompts begin with a cache of their own
            return
        index = torch.tensor(rows)  # on the CPU: it selects from caches on whatever device
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        surplus = self._mask.shape[1] - max(self._lengths)
        if surplus and self.can_refill:
            let_go(self._cache, surplus)
            self._mask = self._mask[:, surplus:]
            if self._flow is not None:
                self._flow.drop_first(surplus)

    def _new_cache(self) -> Any:
        return growing_cache(self._model.original_model.config)

    def _read_ahead(
        self, prompts: Sequence[Sequence[int]], cache: Any, n_left: int
    ) -> tuple[Int[Tensor, "row new_pos"], Int[Tensor, "row pos"]]:
        """Read prompts but for the last tokens, and return those, and the mask of all."""
        # a column at least is read ahead where a row joins others, and may be padding
        tokens, mask = (tensor.to(self._device) for tensor in _left_padded(prompts, at_least=1 if n_left > 1 else 2))
        width, start = tokens.shape[1], 0
        while width - start > n_left:
            stop = min(start + PORTION, width - n_left)
            self._read(tokens[:, start:stop], mask[:, :stop], cache)
            start = stop
        return tokens[:, start:], mask

    def _read(
        self, tokens: Int[Tensor, "row new_pos"], mask: Int[Tensor, "row pos"], cache: Any
    ) -> Float[Tensor, "row d_vocab"]:
        """Read the next tokens of rows, and return the logits of what follows the last."""
        self._parts.refresh()  # hooks may come and go while answers are written
        options = dict(self._options)
        if self._takes_positions:  # the bridge would make the same ones, and wait for the device to do so
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits, _ = self._model(
            tokens, attention_mask=mask, past_key_values=cache, return_type="logits_and_cache", **options
        )
        last: Tensor = logits[:, -1]
        return last


def _left_padded(
    prompts: Sequence[Sequence[int]], at_least: int
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Return prompts that end in the same column, and a mask that is 0 where a row has no token."""
    width = max(at_least, *map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return tokens, mask
