"""The decoding loop: a left-padded batch, one forward pass for each new token, rows that leave when they are done.

`Answers` keeps the books (what each row has written and what ends it) and knows nothing of the model; `_Batch` holds
what the model reads; `write` lets them take turns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.native import Native, native
from stepsal.generation.cache import growing_cache
from stepsal.generation.decoding import Decoding
from stepsal.generation.endings import (
    PROMPT_END,
    BudgetForcing,
    StopTexts,
    ThinkingWatch,
    end_tokens,
    watched_formats,
)
from stepsal.generation.sampling import UNDEFINED, choose, uniform_draws
from stepsal.intervention import active_flow
from stepsal.trace.segment import Segmentation

Ended = Literal["end", "stop", "limit", "context"]
"""End of an answer: the end-of-sequence token, a stop text, the limit of new tokens, or the end of the context."""


class Written(NamedTuple):
    """The new tokens of a row.

    Attributes:
        tokens: ids of the new tokens, at least one, those that ended the row included.
        ended: end of the row: the end-of-sequence token, a stop text, the limit of new tokens (or `still_asked`), or
            the end of the context.
    """

    tokens: list[int]
    ended: Ended


def check_prompt(model: TransformerBridge, ids: Sequence[int]) -> None:
    """Check that a prompt has tokens, and leaves room for an answer.

    Args:
        model: the model, whose context the prompt is to fit in.
        ids: token ids of the prompt.

    Raises:
        ValueError: the prompt has no tokens, or fills the context.

    Example:
        >>> from stepsal.generation.loop import check_prompt
        >>> check_prompt(stepsal.load("mini"), [1, 2, 3])
    """
    if not 0 < len(ids) < model.cfg.n_ctx:
        raise ValueError(
            f"a prompt of {len(ids)} tokens leaves no room in the context of {model.cfg.n_ctx} tokens of "
            f"{model.cfg.model_name!r}: shorten the question"
        )


@torch.no_grad()
def write(
    model: TransformerBridge,
    prompt_ids: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    segmentation: Segmentation | None = None,
    max_new_tokens: Sequence[int] | None = None,
    seeds: Sequence[int],
    still_asked: Callable[[int], bool] | None = None,
    progress: bool = False,
) -> list[Written]:
    """Write answers to prompts that are already rendered and tokenised.

    Args:
        model: a model with a tokenizer.
        prompt_ids: token ids of each row, fewer than the model's context holds.
        decoding: settings for all rows.
        segmentation: the way to find the thinking, in which stop texts don't count and whose end budget forcing puts
            off; None lets the model tell it.
        max_new_tokens: limit of new tokens for each row, in place of that of `decoding`.
        seeds: seeds of the sampling, one for each row.
        still_asked: called with the number of a row after each of its tokens; a row for which it returns False ends, as
            if at its limit.
        progress: show a bar over tokens.

    Returns:
        The new tokens of each row, in the order of the prompts.

    Raises:
        ValueError: budget forcing is requested of a model that ends its thinking by several tokens, or the model's
            logits are NaN or infinite.

    Example:
        >>> from stepsal.generation.loop import write
        >>> model = stepsal.load("mini")
        >>> text = "<|endoftext|><|user|>Anna is 3 plus 3. What is Anna?<|assistant|><think>"
        >>> ids = model.tokenizer(text)["input_ids"]
        >>> tokens, ended = write(model, [ids], decoding=stepsal.Decoding(stop=["Anna ="]), seeds=[0])[0]
        >>> ended, model.tokenizer.decode(tokens)[-20:]  # in the thinking it does not count
        ('stop', 'The answer is Anna =')
    """
    requested = [decoding.max_new_tokens] * len(prompt_ids) if max_new_tokens is None else max_new_tokens
    rooms = [model.cfg.n_ctx - len(ids) for ids in prompt_ids]
    limits = [min(limit, room) for limit, room in zip(requested, rooms, strict=True)]
    draws = uniform_draws(seeds, max(limits)) if decoding.temperature > 0 else None  # [row, new_token]
    answers = Answers(
        limits,
        rooms,
        end_tokens(model),
        _stop_texts(model, prompt_ids, decoding, segmentation) if decoding.stop else None,
        BudgetForcing(model, len(limits), decoding.budget_forcing, segmentation) if decoding.budget_forcing else None,
        still_asked,
    )
    with native(model) as parts, tqdm(total=max(limits), desc="tokens", disable=not progress) as bar:
        batch = _Batch(model, parts, prompt_ids)
        for n_written in range(max(limits)):
            row_draws = None if draws is None else draws[answers.running, n_written]
            chosen = choose(batch.next_logits(), row_draws, decoding.temperature, decoding.top_p)  # [row]
            on_host: list[int] = chosen.tolist()  # the one synchronisation
            if UNDEFINED in on_host:
                raise _no_distribution(model, row=answers.running[on_host.index(UNDEFINED)], n_written=n_written)
            tokens, going = answers.push(on_host)
            bar.update()
            if not going:
                break
            batch.append(chosen if tokens == on_host else torch.tensor(tokens).to(chosen.device), going)
    return answers.written()


def _stop_texts(
    model: TransformerBridge,
    prompt_ids: Sequence[Sequence[int]],
    decoding: Decoding,
    segmentation: Segmentation | None,
) -> StopTexts:
    """Return the check for stop texts, which count outside the thinking only, or everywhere if so decided."""
    watches = None
    if not decoding.stop_in_thinking:
        formats = watched_formats(model, segmentation)
        watches = [ThinkingWatch(formats, model.tokenizer.decode(ids[-PROMPT_END:])) for ids in prompt_ids]
    return StopTexts(model.tokenizer, len(prompt_ids), decoding.stop, watches)


def _no_distribution(model: TransformerBridge, row: int, n_written: int) -> ValueError:
    """Return the error that the logits of a row are such that no token can be chosen."""
    dtype = next(model.parameters()).dtype
    remedy = (
        "float16 holds no number above 65504: load the model with dtype='bfloat16' or 'float32'"
        if dtype == torch.float16
        else "look for NaN in its weights and in what hooks on it write, or load it with dtype='float32'"
    )
    return ValueError(
        f"the logits of {model.cfg.model_name!r} ({str(dtype).removeprefix('torch.')}) for new token {n_written} of "
        f"row {row} are NaN or infinite, so that no token can be chosen: {remedy}"
    )


class Answers:
    """The answers of a batch while they are written.

    Args:
        limits: limit of new tokens of each row.
        rooms: number of tokens that fit into the context after the prompt of each row; at least the limit of the row.
        ends: tokens that end an answer.
        stops: check for texts that end an answer; None without such texts.
        forcing: replacement of the end of the thinking; None for none.
        still_asked: called with the number of a row; returns False where the row is to end.

    Attributes:
        running: numbers of the rows that are still written, in order.

    Example:
        >>> from stepsal.generation.loop import Answers
        >>> answers = Answers(limits=[3, 3], rooms=[9, 9], ends={0})
        >>> answers.push([5, 0])  # the second row ends, so that the first of the rows goes on
        ([5, 0], [0])
        >>> answers.running, answers.written()[1]
        ([0], Written(tokens=[0], ended='end'))
    """

    def __init__(
        self,
        limits: Sequence[int],
        rooms: Sequence[int],
        ends: frozenset[int] | set[int],
        stops: StopTexts | None = None,
        forcing: BudgetForcing | None = None,
        still_asked: Callable[[int], bool] | None = None,
    ) -> None:
        self._limits, self._rooms, self._ends = limits, rooms, ends
        self._stops, self._forcing, self._still_asked = stops, forcing, still_asked
        self._tokens: list[list[int]] = [[] for _ in limits]
        self._ended: list[Ended] = ["limit"] * len(limits)
        self.running = list(range(len(limits)))

    def push(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Write a token in each running row.

        Args:
            chosen: the model's choice for each of `running`.

        Returns:
            The token that each running row has written, and the indices among the running rows of those that go on.
        """
        tokens, going = list(chosen), []
        for i, row in enumerate(self.running):
            if self._forcing is not None:
                tokens[i] = self._forcing.replace(row, tokens[i])
            self._tokens[row].append(tokens[i])
            if (ended := self._what_ends(row, tokens[i])) is None:
                going.append(i)
            else:
                self._ended[row] = ended
        self.running = [self.running[i] for i in going]
        return tokens, going

    def written(self) -> list[Written]:
        """Return the new tokens of every row so far."""
        return [Written(tokens, ended) for tokens, ended in zip(self._tokens, self._ended, strict=True)]

    def _what_ends(self, row: int, token: int) -> Ended | None:
        """Tell what ends a row with the token that it has just written; None lets it go on."""
        has_stopped = self._stops is not None and self._stops.push(row, token)
        if token in self._ends:
            return "end"
        if has_stopped:
            return "stop"
        n_new = len(self._tokens[row])
        if n_new >= self._rooms[row]:
            return "context"
        if n_new >= self._limits[row] or (self._still_asked is not None and not self._still_asked(row)):
            return "limit"
        return None


class _Batch:
    """The running rows as the model reads them: the tokens of the next pass, the attention mask and the cache."""

    def __init__(self, model: TransformerBridge, parts: Native, prompt_ids: Sequence[Sequence[int]]) -> None:
        self._model, self._parts, self._flow = model, parts, active_flow(model)
        self._cache: Any = growing_cache(model.original_model.config)
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.original_model.forward).parameters:
            self._options["logits_to_keep"] = 1  # [batch, 1, d_vocab] instead of [batch, pos, d_vocab] for the prompt
        device = next(model.parameters()).device
        self._tokens, self._mask = (tensor.to(device) for tensor in _left_padded(prompt_ids))

    def next_logits(self) -> Float[Tensor, "row d_vocab"]:
        """Read the tokens that the model has not read yet, and return the logits of those to come."""
        self._parts.refresh()  # hooks may come and go while answers are written
        logits, self._cache = self._model(
            self._tokens,
            attention_mask=self._mask,
            past_key_values=self._cache,
            return_type="logits_and_cache",
            **self._options,
        )
        last: Tensor = logits[:, -1]
        return last

    def append(self, tokens: Int[Tensor, " row"], going: list[int]) -> None:
        """Add a token to each row, and keep those rows that go on: one that is done costs nothing any more."""
        if len(going) < len(tokens):
            index = torch.tensor(going)  # on the CPU: it selects from caches on whatever device
            self._cache.batch_select_indices(index)
            tokens, self._mask = tokens[index], self._mask[index]
            if self._flow is not None:
                self._flow.select(going)
        self._tokens = tokens[:, None]
        self._mask = pad(self._mask, (0, 1), value=1)


def _left_padded(prompt_ids: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Return prompts that end in the same column, and a mask that is 0 where a row has no token."""
    width = max(map(len, prompt_ids))
    tokens = torch.zeros(len(prompt_ids), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompt_ids):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return tokens, mask
