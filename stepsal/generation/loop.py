"""The decoding loop: one forward pass for the next token of all rows; where an answer ends, the next prompt begins.

`Answer` keeps the books of one answer (what is written and what ends it) and knows nothing of the model;
`stepsal.generation.batch` holds what the model reads; `write_each` lets them take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

import torch
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from stepsal.bridge.native import native
from stepsal.generation.batch import Batch
from stepsal.generation.decoding import Decoding
from stepsal.generation.endings import (
    PROMPT_END,
    BudgetForcing,
    StopTexts,
    ThinkingWatch,
    end_tokens,
    thinking_ends,
    watched_formats,
)
from stepsal.generation.sampling import UNDEFINED, choose, uniform_draws
from stepsal.trace.segment import Segmentation

Ended = Literal["end", "stop", "limit", "context"]
"""End of an answer: the end-of-sequence token, a stop text, the limit of new tokens, or the end of the context."""


class Prompt(NamedTuple):
    """A prompt to be answered.

    Attributes:
        ids: its token ids, fewer than the model's context holds.
        seed: seed of the sampling.
        max_new_tokens: limit of new tokens.
    """

    ids: Sequence[int]
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class Written:
    """An answer that is done.

    Attributes:
        number: number of its prompt, in the order in which prompts were taken.
        tokens: ids of the new tokens, at least one, those that ended the answer included.
        ended: end of the answer: the end-of-sequence token, a stop text, the limit of new tokens (or `still_asked`), or
            the end of the context.
        seconds: its share of the time: of each pass, an equal part for each row in it; of reading its prompt, its part.
        n_together: largest number of answers that it was written together with, itself included.
    """

    number: int
    tokens: list[int]
    ended: Ended
    seconds: float = field(default=0.0, compare=False)
    n_together: int = field(default=1, compare=False)


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
def write_each(
    model: TransformerBridge,
    take: Callable[[int], Sequence[Prompt]],
    batch_size: int,
    *,
    decoding: Decoding,
    segmentation: Segmentation | None = None,
    still_asked: Callable[[int], bool] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Iterator[Written]:
    """Write answers to prompts that are already rendered and tokenised, and yield each when it is done.

    Where an answer ends, the next prompt takes its place, so that the batch is full until the prompts run out. An
    answer is what it is alone, whatever is written beside it (up to rounding in the logits). While an answer is handed
    out, the model may be used otherwise, but not with an open StepFlow.

    Args:
        model: a model with a tokenizer.
        take: called with the number of free rows before each pass that has some; returns at most as many prompts, or
            none if there are none at present. The answers end when there is none and no row is left.
        batch_size: largest number of rows.
        decoding: settings for all answers.
        segmentation: the way to find the thinking, in which stop texts don't count and whose end budget forcing puts
            off; None lets the model tell it.
        still_asked: called with the number of an answer after each of its tokens; where it returns False the answer
            ends, as if at its limit.
        on_token: called with the number of rows after each pass.

    Raises:
        ValueError: budget forcing is requested of a model that ends its thinking by several tokens, or the model's
            logits are NaN or infinite.

    Example:
        >>> from stepsal.generation.loop import Prompt, write_each
        >>> model = stepsal.load("mini")
        >>> text = "<|endoftext|><|user|>Anna is {} plus 3. What is Anna?<|assistant|><think>"
        >>> prompts = [Prompt(model.tokenizer(text.format(n))["input_ids"], 0, 10 * n) for n in (3, 1, 2)]
        >>> answers = write_each(model, lambda n: [prompts.pop(0) for _ in prompts[:n]], 2, decoding=stepsal.Decoding())
        >>> [(answer.number, answer.ended) for answer in answers]
        [(1, 'limit'), (0, 'end'), (2, 'limit')]
    """
    rules, rows, n_taken = _Rules(model, decoding, segmentation), list[_Row](), 0
    with native(model) as parts:
        batch = Batch(model, parts)
        while True:
            start = time.perf_counter()
            n_free = batch_size - len(rows) if batch.can_refill or not rows else 0
            if n_free > 0 and (prompts := take(n_free)):
                batch.add([prompt.ids for prompt in prompts])
                rows += [rules.begin(n_taken + i, prompt) for i, prompt in enumerate(prompts)]
                n_taken += len(prompts)
                _share_time(rows[-len(prompts) :], start)
                start = time.perf_counter()
            if not rows:
                return
            draws = None if not decoding.temperature else torch.tensor([row.next_draw for row in rows]).double()
            chosen = choose(batch.next_logits(), draws, decoding.temperature, decoding.top_p)  # [row]
            on_host: list[int] = chosen.tolist()  # the one synchronisation
            if UNDEFINED in on_host:
                raise _no_distribution(model, rows[on_host.index(UNDEFINED)])
            tokens = [row.answer.push(token) for row, token in zip(rows, on_host, strict=True)]
            if still_asked is not None:
                for row in rows:
                    row.answer.end_unless(still_asked, row.number)
            going = [i for i, row in enumerate(rows) if row.answer.ended is None]
            if len(going) < len(rows):
                batch.keep(going)
            if going:
                written = chosen if tokens == on_host else torch.tensor(tokens).to(chosen.device)
                batch.append(written if len(going) == len(rows) else written[torch.tensor(going)])
            _share_time(rows, start)
            if on_token is not None:
                on_token(len(rows))
            done, rows = [row.written() for row in rows if row.answer.ended], [rows[i] for i in going]
            if done:
                parts.restore()  # whoever takes them may hook the model, or run it
                yield from done


def write(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    batch_size: int | None = None,
    *,
    decoding: Decoding,
    segmentation: Segmentation | None = None,
    still_asked: Callable[[int], bool] | None = None,
    progress: bool = False,
) -> Iterator[Written]:
    """Write answers to prompts that are all known, and yield each when it is done.

    Args:
        model: a model with a tokenizer.
        prompts: the prompts, rendered and tokenised.
        batch_size: largest number of answers that are written together; None writes all.
        decoding: settings for all answers; each prompt has its own limit.
        segmentation: the way to find the thinking; None lets the model tell it.
        still_asked: as in `write_each`.
        progress: show a bar, over tokens for one prompt and over answers for several.

    Raises:
        ValueError: as for `write_each`.

    Example:
        >>> from stepsal.generation.loop import Prompt, write
        >>> model = stepsal.load("mini")
        >>> text = "<|endoftext|><|user|>Anna is 3 plus 3. What is Anna?<|assistant|><think>"
        >>> prompt = Prompt(model.tokenizer(text)["input_ids"], seed=0, max_new_tokens=99)
        >>> (answer,) = write(model, [prompt], decoding=stepsal.Decoding(stop=["Anna ="]))
        >>> answer.ended, model.tokenizer.decode(answer.tokens)[-20:]  # in the thinking it does not count
        ('stop', 'The answer is Anna =')
    """
    waiting = iter(prompts)
    with _bar([prompt.max_new_tokens for prompt in prompts], progress) as bar:
        for answer in write_each(
            model, lambda n: list(islice(waiting, n)), batch_size or len(prompts), decoding=decoding,
            segmentation=segmentation, still_asked=still_asked, on_token=bar.update if len(prompts) == 1 else None,
        ):  # fmt: skip
            bar.update(len(prompts) > 1)
            yield answer


def _bar(limits: Sequence[int], progress: bool) -> tqdm[None]:
    """Return a bar over the tokens of one answer, or over several answers."""
    total, what = (limits[0], "tokens") if len(limits) == 1 else (len(limits), "answers")
    return tqdm(total=total, desc=what, disable=not progress)


class _Rules:
    """What all answers of a run have in common: what ends them, and how they are sampled."""

    def __init__(self, model: TransformerBridge, decoding: Decoding, segmentation: Segmentation | None) -> None:
        self._model, self._decoding, self._ends = model, decoding, end_tokens(model)
        self._watched = watched_formats(model, segmentation) if decoding.stop and not decoding.stop_in_thinking else ()
        if decoding.budget_forcing:
            self._thinking_ends = thinking_ends(model, segmentation)
            self._wait: list[int] = model.tokenizer("Wait", add_special_tokens=False)["input_ids"]

    def begin(self, number: int, prompt: Prompt) -> _Row:
        """Return the row of a prompt."""
        decoding, room = self._decoding, self._model.cfg.n_ctx - len(prompt.ids)
        tokenizer = self._model.tokenizer
        stops = forcing = None
        if decoding.stop:
            before = tokenizer.decode(prompt.ids[-PROMPT_END:]) if self._watched else ""
            watch = ThinkingWatch(self._watched, before) if self._watched else None
            stops = StopTexts(tokenizer, decoding.stop, watch)
        if decoding.budget_forcing:
            forcing = BudgetForcing(self._thinking_ends, self._wait, decoding.budget_forcing)
        limit = min(prompt.max_new_tokens, room)
        draws = uniform_draws([prompt.seed], limit)[0].tolist() if decoding.temperature > 0 else []
        return _Row(number, Answer(limit, room, self._ends, stops, forcing), draws)


@dataclass
class _Row:
    """An answer in the batch, with the random numbers that its tokens are drawn by."""

    number: int
    answer: Answer
    draws: list[float]
    seconds: float = 0.0
    n_together: int = 0

    @property
    def next_draw(self) -> float:
        """The random number of the next token."""
        return self.draws[len(self.answer.tokens)]

    def written(self) -> Written:
        """Return the answer, which is done."""
        ended = self.answer.ended
        assert ended is not None
        return Written(self.number, self.answer.tokens, ended, self.seconds, self.n_together)


def _share_time(rows: Sequence[_Row], start: float) -> None:
    """Charge each row with its part of the time since the start."""
    share = (time.perf_counter() - start) / len(rows)
    for row in rows:
        row.seconds += share
        row.n_together = max(row.n_together, len(rows))


def _no_distribution(model: TransformerBridge, row: _Row) -> ValueError:
    """Return the error that the logits of a row are such that no token can be chosen."""
    dtype = next(model.parameters()).dtype
    remedy = (
        "float16 holds no number above 65504: load the model with dtype='bfloat16' or 'float32'"
        if dtype == torch.float16
        else "look for NaN in its weights and in what hooks on it write, or load it with dtype='float32'"
    )
    return ValueError(
        f"the logits of {model.cfg.model_name!r} ({str(dtype).removeprefix('torch.')}) for new token "
        f"{len(row.answer.tokens)} of row {row.number} are NaN or infinite, so that no token can be chosen: {remedy}"
    )


class Answer:
    """An answer while it is written.

    Args:
        limit: limit of new tokens.
        room: number of tokens that fit into the context after the prompt; at least the limit.
        ends: tokens that end an answer.
        stops: check for texts that end an answer; None without such texts.
        forcing: replacement of the end of the thinking; None for none.

    Attributes:
        tokens: the new tokens so far.
        ended: what has ended it; None while it goes on.

    Example:
        >>> from stepsal.generation.loop import Answer
        >>> answer = Answer(limit=3, room=9, ends={0})
        >>> [answer.push(token) for token in (5, 0)], answer.ended
        ([5, 0], 'end')
    """

    def __init__(
        self,
        limit: int,
        room: int,
        ends: frozenset[int] | set[int],
        stops: StopTexts | None = None,
        forcing: BudgetForcing | None = None,
    ) -> None:
        self._limit, self._room, self._ends, self._stops, self._forcing = limit, room, ends, stops, forcing
        self.tokens: list[int] = []
        self.ended: Ended | None = None

    def push(self, chosen: int) -> int:
        """Write a token, and return it: the model's choice, or what budget forcing puts in its place.

        Args:
            chosen: the model's choice.
        """
        token = chosen if self._forcing is None else self._forcing.replace(chosen)
        self.tokens.append(token)
        has_stopped = self._stops is not None and self._stops.push(token)
        if token in self._ends:
            self.ended = "end"
        elif has_stopped:
            self.ended = "stop"
        elif len(self.tokens) >= self._room:
            self.ended = "context"
        elif len(self.tokens) >= self._limit:
            self.ended = "limit"
        return token

    def end_unless(self, still_asked: Callable[[int], bool], number: int) -> None:
        """End the answer if nobody asks for it any more.

        Args:
            still_asked: called with the number of the answer, unless that has ended by itself.
            number: number of the answer.
        """
        if self.ended is None and not still_asked(number):
            self.ended = "limit"
