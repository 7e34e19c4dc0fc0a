"""Let a model answer, and keep the answer as traces."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from stepsal.intervention import StepFlowConfig, active_flow, agreed_segmentation
from stepsal.intervention import stepflow as open_stepflow
from stepsal.trace.segment import Segmentation
from stepsal.trace.trace import Trace, render_prompt

if TYPE_CHECKING:
    from transformers import Cache

Ended = Literal["end", "stop", "limit", "context"]


class Written(NamedTuple):
    """New tokens of a row, with what ended them: the end-of-sequence token, a stop text, or one of two limits."""

    tokens: list[int]
    ended: Ended


def generate(
    model: TransformerBridge,
    question: str,
    *,
    stepflow: StepFlowConfig | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str | None = None,
    put_off: int = 0,
    stop: Sequence[str] = (),
    progress: bool = False,
    segmentation: Segmentation | None = None,
) -> Trace:
    """Answer one question; see `generate_batch`, of which this is the batch of one."""
    return generate_batch(
        model, [question], stepflow=stepflow, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=seed, system=system, put_off=put_off, stop=stop, progress=progress, segmentation=segmentation,
    )[0]  # fmt: skip


def generate_batch(
    model: TransformerBridge,
    questions: Sequence[str],
    *,
    stepflow: StepFlowConfig | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    system: str | None = None,
    put_off: int = 0,
    stop: Sequence[str] = (),
    progress: bool = False,
    segmentation: Segmentation | None = None,
) -> list[Trace]:
    """Answer several questions at once: left-padded, one forward pass per new token.

    A row ends at the end-of-sequence token, with a stop text, after `max_new_tokens`, or at the end of the model's
    context; the others go on without it.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        questions: what the user asks; the chat template of the tokenizer is put around each.
        stepflow: decode under StepFlow with these settings. A `stepsal.stepflow` context around the call does the same.
        max_new_tokens: limit per answer.
        temperature: 0 decodes greedily.
        top_p: nucleus of the sampling distribution.
        seed: of the sampling, one for each row; a single one means seed, seed + 1, ... A row's tokens depend on its own
            seed only, so that it is sampled the same in any batch (up to rounding in the logits).
        system: a system prompt; None keeps what the chat template does by itself.
        put_off: how many times the end of the thinking is replaced by "Wait", so that the model thinks on (budget
            forcing: s1, arXiv 2501.19393). The end is `</think>`, or the end of the answer where the tokenizer has no
            such token.
        stop: texts that end an answer where one of them has been written.
        progress: show a bar over tokens.
        segmentation: how sections and steps are found, by StepFlow and in the traces; None is that of an open context,
            or `Segmentation()`.

    Returns:
        One trace per question, with exactly the tokens the model wrote, those that ended it included. `truncated` tells
        the answers that a limit ended.

    Raises:
        ValueError: no or empty question, numbers out of range, or a prompt that fills the context.
    """
    prompt_ids = check_generation(
        model, questions, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, system=system,
        put_off=put_off,
    )  # fmt: skip
    seeds = [seed + row for row in range(len(questions))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(questions):
        raise ValueError(f"{len(seeds)} seeds for {len(questions)} questions: give one for each, or a single one")
    with open_stepflow(model, stepflow, segmentation=segmentation) if stepflow is not None else nullcontext():
        segmentation = agreed_segmentation(model, segmentation)
        answers = write(
            model, prompt_ids, max_new_tokens=[max_new_tokens] * len(seeds), seeds=seeds, temperature=temperature,
            top_p=top_p, put_off=put_off, stop=stop, progress=progress,
        )  # fmt: skip
    traces = []
    for question, ids, (new, ended) in zip(questions, prompt_ids, answers, strict=True):
        trace = Trace.from_tokens(
            torch.tensor(ids + new), len(ids), model, question=question, truncated=ended in ("limit", "context"),
            segmentation=segmentation,
        )  # fmt: skip
        traces.append(trace)
    return traces


def write(
    model: TransformerBridge,
    prompt_ids: Sequence[list[int]],
    *,
    max_new_tokens: Sequence[int],
    seeds: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    put_off: int = 0,
    stop: Sequence[str] = (),
    wanted: Callable[[int], bool] | None = None,
    progress: bool = False,
) -> list[Written]:
    """Go on with prompts that are rendered and tokenised already; what `generate_batch` does with questions.

    Args:
        prompt_ids: of each row, shorter than the model's context.
        max_new_tokens, seeds: of each row.
        temperature, top_p, put_off, stop, progress: of all rows, as for `generate_batch`.
        wanted: asked after each token of a row; a row that is not wanted any more ends, as if at its limit.
    """
    waiting = _Waiting(model, len(prompt_ids), put_off) if put_off else None
    stops = _Stops(model, len(prompt_ids), stop) if stop else None
    limits = [min(n, model.cfg.n_ctx - len(ids)) for n, ids in zip(max_new_tokens, prompt_ids, strict=True)]
    uniforms = None
    if temperature > 0:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        uniforms = torch.stack([torch.rand(max(limits), generator=g, dtype=torch.float64) for g in generators])
    answers = _decode(model, list(prompt_ids), limits, uniforms, temperature, top_p, waiting, stops, wanted, progress)
    ends, written = _end_tokens(model), []
    for row, (ids, new) in enumerate(zip(prompt_ids, answers, strict=True)):
        ended: Ended = "context" if len(ids) + len(new) >= model.cfg.n_ctx else "limit"
        if stops is not None and stops.found[row]:
            ended = "stop"
        written.append(Written(new, "end" if new[-1] in ends else ended))
    return written


def check_generation(
    model: TransformerBridge,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    system: str | None,
    put_off: int,
) -> list[list[int]]:
    """Prompt ids of each question, if they can be answered so; arguments and errors are those of `generate_batch`."""
    if not questions or isinstance(questions, str):
        raise ValueError(f"questions={questions!r} must be a list of at least one; for a single one there is generate")
    check_decoding(max_new_tokens, temperature, top_p, put_off)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.cfg.model_name!r} has no tokenizer: pass one to stepsal.load(..., tokenizer=...)")
    prompts = [render_prompt(tokenizer, question, system).text for question in questions]
    prompt_ids: list[list[int]] = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    check_prompt(model, max(prompt_ids, key=len))
    if put_off:
        _Waiting(model, 0, put_off)
    return prompt_ids


def check_decoding(max_new_tokens: int, temperature: float, top_p: float, put_off: int = 0) -> None:
    """Complain about numbers out of range.

    Raises:
        ValueError: naming them.
    """
    if max_new_tokens < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or put_off < 0:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be >= 1, temperature={temperature} >= 0, top_p={top_p} in (0, 1], "
            f"put_off={put_off} >= 0"
        )


def check_prompt(model: TransformerBridge, ids: Sequence[int]) -> None:
    """Complain about a prompt without tokens, or one that leaves no room for an answer.

    Raises:
        ValueError: it is so.
    """
    if not 0 < len(ids) < model.cfg.n_ctx:
        raise ValueError(
            f"a prompt of {len(ids)} tokens leaves no room in the context of {model.cfg.n_ctx} tokens of "
            f"{model.cfg.model_name!r}: shorten the question"
        )


@torch.no_grad()
def log_probabilities(model: TransformerBridge, trace: Trace) -> Float[Tensor, " target"]:
    """log p(token t + 1 | tokens up to t) for t = 0 .. T - 2, in nats, float32 on the CPU; at temperature 1.

    Those of the answer begin at `trace.n_prompt - 1`. One forward pass, under whatever edits the model.
    """
    tokens = trace.tokens.to(next(model.parameters()).device)
    logits = model(tokens[None], attention_mask=torch.ones_like(tokens)[None])[0, :-1]
    targets = tokens[1:].to(logits.device)
    chunks = range(0, len(targets), 1024)  # float32 copies of a few rows only
    return -torch.cat(
        [cross_entropy(logits[i : i + 1024].float(), targets[i : i + 1024], reduction="none").cpu() for i in chunks]
    )


@torch.no_grad()
def _decode(
    model: TransformerBridge,
    prompt_ids: list[list[int]],
    limits: list[int],
    uniforms: Float[Tensor, "row new_token"] | None,
    temperature: float,
    top_p: float,
    waiting: _Waiting | None,
    stops: _Stops | None,
    wanted: Callable[[int], bool] | None,
    progress: bool,
) -> list[list[int]]:
    """The new tokens of each row."""
    device = next(model.parameters()).device
    ends = torch.tensor(sorted(_end_tokens(model)))
    n_rows, width = len(prompt_ids), max(map(len, prompt_ids))
    tokens = torch.zeros(n_rows, width, dtype=torch.long)
    mask = torch.zeros(n_rows, width, dtype=torch.long)
    for row, ids in enumerate(prompt_ids):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.original_model.forward).parameters:
        options["logits_to_keep"] = 1  # [batch, 1, d_vocab] instead of [batch, pos, d_vocab] after a long prompt
    flow = active_flow(model)
    cache: Cache | None = None
    running = list(range(n_rows))
    answers: list[list[int]] = [[] for _ in prompt_ids]
    with tqdm(total=max(limits), desc="tokens", disable=not progress) as bar:
        for n_new in range(1, max(limits) + 1):
            logits, cache = model(
                tokens, attention_mask=mask, past_key_values=cache, return_type="logits_and_cache", **options
            )
            draws = None if uniforms is None else uniforms[running, n_new - 1]
            chosen = _choose(logits[:, -1], draws, temperature, top_p)  # [row]
            on_host = chosen.cpu()
            if waiting is not None:
                on_host = waiting.instead(running, on_host)
                chosen = on_host.to(device)
            ended = torch.isin(on_host, ends)
            going = []
            for i, (row, token) in enumerate(zip(running, on_host.tolist(), strict=True)):
                answers[row].append(token)
                stopped = stops is not None and stops.push(row, token)
                if not ended[i] and not stopped and n_new < limits[row] and (wanted is None or wanted(row)):
                    going.append(i)
            bar.update()
            if not going:
                break
            if len(going) < len(running):  # a row that is done stops costing
                index = torch.tensor(going)  # on the CPU: it selects from caches on whatever device
                cache.batch_select_indices(index)  # type: ignore[union-attr]
                chosen, mask = chosen[index], mask[index]
                if flow is not None:
                    flow.select(going)
                running = [running[i] for i in going]
            tokens = chosen[:, None]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return answers


class _Stops:
    """Texts that end an answer.

    Raises:
        ValueError: an empty text.
    """

    def __init__(self, model: TransformerBridge, n_rows: int, texts: Sequence[str]) -> None:
        if isinstance(texts, str) or not all(texts):
            raise ValueError(f"stop={texts!r} must be a list of texts, none of them empty")
        self.texts, self.longest = tuple(texts), max(map(len, texts))
        self.tokenizer = model.tokenizer.backend_tokenizer
        self.streams = [DecodeStream(skip_special_tokens=False) for _ in range(n_rows)]
        self.ends = [""] * n_rows  # of what the rows have written
        self.found = [False] * n_rows

    def push(self, row: int, token: int) -> bool:
        """Whether the row has written one of the texts now."""
        text = self.ends[row] + (self.streams[row].step(self.tokenizer, token) or "")
        self.found[row] = any(stop in text for stop in self.texts)
        self.ends[row] = text[-self.longest :]
        return self.found[row]


class _Waiting:
    """Budget forcing: rows that would end their thinking write "Wait" instead, some times.

    Raises:
        ValueError: the tokenizer ends thinking by more than one token.
    """

    def __init__(self, model: TransformerBridge, n_rows: int, times: int) -> None:
        vocabulary = model.tokenizer.get_vocab()
        if "<|channel|>" in vocabulary:
            raise ValueError(
                f"put_off={times} is not supported for Harmony channels, which end thinking in several tokens"
            )
        self.ends = {vocabulary["</think>"]} if "</think>" in vocabulary else _end_tokens(model)
        self.wait: list[int] = model.tokenizer("Wait", add_special_tokens=False)["input_ids"]
        self.left = [times] * n_rows
        self.coming: list[list[int]] = [[] for _ in range(n_rows)]  # tokens of "Wait" still to be written

    def instead(self, rows: list[int], chosen: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """What rows write where the model has chosen these tokens."""
        tokens = chosen.tolist()
        for i, row in enumerate(rows):
            if not self.coming[row] and self.left[row] and tokens[i] in self.ends:
                self.left[row] -= 1
                self.coming[row] = list(self.wait)
            if self.coming[row]:
                tokens[i] = self.coming[row].pop(0)
        return torch.tensor(tokens)


def _choose(
    logits: Float[Tensor, "row d_vocab"], draws: Float[Tensor, " row"] | None, temperature: float, top_p: float
) -> Int[Tensor, " row"]:
    """The most likely token of each row, or the one at quantile `draws` of its sampling distribution."""
    if draws is None:
        return logits.argmax(-1)
    p = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # what comes before is enough already
        p = p.scatter(-1, order, ordered.masked_fill(outside, 0.0))
    cumulative = p.cumsum(-1)  # [row, d_vocab]
    quantile = draws.to(p.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, quantile, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _end_tokens(model: TransformerBridge) -> set[int]:
    """End-of-sequence tokens: the tokenizer's, and those of the model's generation settings."""
    ends = {model.tokenizer.eos_token_id}
    config = getattr(model.original_model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ends |= set(named if isinstance(named, list) else [named])
    return {int(token) for token in ends if token is not None}
