"""Let a model answer, and keep the answer as traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from stepsal.trace import Trace, render_prompt


def generate(
    model: TransformerBridge,
    question: str,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str | None = None,
    progress: bool = False,
    **segmentation: Any,
) -> Trace:
    """Answer one question; see `generate_batch`, of which this is the batch of one."""
    return generate_batch(
        model, [question], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        system=system, progress=progress, **segmentation,
    )[0]  # fmt: skip


def generate_batch(
    model: TransformerBridge,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str | None = None,
    progress: bool = False,
    **segmentation: Any,
) -> list[Trace]:
    """Answer several questions at once: left-padded, one forward pass per new token.

    Args:
        model: from `stepsal.load`, with a tokenizer.
        questions: what the user asks; the chat template of the tokenizer is put around each.
        max_new_tokens: limit per answer. An answer cut off by it gives a trace without its end.
        temperature: 0 decodes greedily.
        top_p: nucleus of the sampling distribution.
        seed: of the sampling; the same call gives the same answers. The global random state is left alone.
        system: a system prompt; None keeps what the chat template does by itself.
        progress: show a bar over tokens.
        **segmentation: `format`, `split`, `min_chars` of `Trace.from_tokens`.

    Returns:
        One trace per question, with exactly the tokens the model wrote, the end-of-sequence token included.

    Raises:
        ValueError: no or empty question, numbers out of range, or a prompt that leaves no room in the context.
    """
    if not questions:
        raise ValueError("questions is empty: give at least one")
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be >= 1, temperature={temperature} >= 0, top_p={top_p} in (0, 1]"
        )
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.cfg.model_name!r} has no tokenizer: pass one to stepsal.load(..., tokenizer=...)")
    prompts = [render_prompt(tokenizer, question, system).text for question in questions]
    prompt_ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    width = max(map(len, prompt_ids))
    if width + max_new_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"a prompt of {width} tokens and max_new_tokens={max_new_tokens} exceed the context of {model.cfg.n_ctx} "
            f"tokens of {model.cfg.model_name!r}: lower max_new_tokens to {model.cfg.n_ctx - width} or less"
        )

    device = next(model.parameters()).device
    eos = tokenizer.eos_token_id
    tokens = torch.full((len(prompts), width), eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompt_ids):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": None if top_p == 1 else top_p}
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output: Any = model.generate(
            tokens.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens, return_type="tokens",
            verbose=progress, **sampling,
        )  # fmt: skip

    traces = []
    for row, (question, ids) in enumerate(zip(questions, prompt_ids, strict=True)):
        new = output[row, width:].tolist()
        if eos in new:
            new = new[: new.index(eos) + 1]
        traces.append(Trace.from_tokens(torch.tensor(ids + new), len(ids), model, question=question, **segmentation))
    return traces
