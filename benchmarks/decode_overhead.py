"""Measure what StepFlow costs while decoding: time of N new tokens with and without it, token by token in turn.

    python benchmarks/decode_overhead.py                       # 400-token prompt, 200 new tokens, batch 1 and 16
    python benchmarks/decode_overhead.py --growth              # 50 new tokens after 500 .. 4000 tokens of thinking

The new tokens are given, so that all variants do the same work: SmolLM2 (context extended for --growth) reads sentences
one token at a time from the cache, as it would read its own. Each variant has a copy of the model and a cache of its
own, and they take the same token in turn, in an order that rotates, so that whatever slows the machine for more than a
moment slows all alike. A ratio is that of the mean times of a run; the table shows its median and range over runs. A
token that takes three times as long as is usual in its run counts as a stall of the machine, and is left out of all
variants.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path

import machine
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.trace import render_prompt

VARIANTS = {
    "baseline": None,
    "OEB only": stepsal.StepFlowConfig(smi_layers=()),
    "SMI only": stepsal.StepFlowConfig(oeb_layers=()),
    "StepFlow": stepsal.StepFlowConfig(),
}
SENTENCE = "Then we add {} to what we have so far, which gives {} in all. "
RESULTS = Path(__file__).parent / "results"


def tokens_of(model: TransformerBridge, n_prompt: int, n_thinking: int, batch: int) -> torch.Tensor:
    """Return rows [batch, pos] of a prompt of about n_prompt tokens, and thinking up to n_prompt + n_thinking."""
    rows = []
    for row in range(batch):
        question = "How much is it in all?"
        while True:
            prompt = render_prompt(model.tokenizer, question).text
            if len(model.tokenizer(prompt)["input_ids"]) >= n_prompt:
                break
            question = f"There are {len(question)} marbles in one more box. {question}"
        # another beginning in each row, so that their steps end at different tokens
        thinking = "So. " * row + "".join(SENTENCE.format(i, i * (i + 1) // 2) for i in range(n_thinking))
        rows.append(model.tokenizer(prompt + thinking)["input_ids"][: n_prompt + n_thinking])
    return torch.tensor(rows)


def seconds(models: dict[str, TransformerBridge], tokens: torch.Tensor, n_new: int) -> dict[str, float]:
    """Return the mean time that each variant takes for one of the last n_new tokens; stalls are left out."""
    n_first, names = tokens.shape[1] - n_new, list(models)
    times = {name: torch.zeros(n_new, dtype=torch.float64) for name in names}
    caches = {}
    with ExitStack() as stack, torch.no_grad():
        for name, model in models.items():
            if (config := VARIANTS[name]) is not None:
                stack.enter_context(stepsal.stepflow(model, config))
            _, caches[name] = model(
                tokens[:, :n_first], return_type="logits_and_cache", use_cache=True, logits_to_keep=1
            )
        for i in range(n_new):
            one = tokens[:, n_first + i : n_first + i + 1]
            for name in names[i % len(names) :] + names[: i % len(names)]:
                wait_for(one)
                start = time.perf_counter()
                _, caches[name] = models[name](one, past_key_values=caches[name], return_type="logits_and_cache")
                wait_for(one)
                times[name][i] = time.perf_counter() - start
    usual = torch.stack([t <= 3 * t.median() for t in times.values()]).all(0)
    return {name: float(t[usual].mean()) for name, t in times.items()}


def wait_for(tensor: torch.Tensor) -> None:
    """Wait until a tensor on a GPU has been computed."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def measure(
    models: dict[str, TransformerBridge], n_prompt: int, n_before: int, n_new: int, batch: int, runs: int
) -> list[dict]:
    """Return a row per variant: median milliseconds per token, and the ratio to the baseline of the same run."""
    model = models["baseline"]
    tokens = tokens_of(model, n_prompt, n_before + n_new, batch).to(next(model.parameters()).device)
    seconds(models, tokens[:, : n_prompt + 10], 10)  # warms up
    bar = tqdm(range(runs), desc=f"batch {batch}, {n_prompt + n_before} tokens before")
    taken = pd.DataFrame([seconds(models, tokens, n_new) for _ in bar])
    rows = []
    for name in models:
        ratios = taken[name] / taken["baseline"]
        rows.append(
            {
                "batch": batch,
                "tokens_before": n_prompt + n_before,
                "new_tokens": n_new,
                "variant": name,
                "ms_per_token": 1000 * taken[name].median(),
                "ratio": ratios.median(),
                "ratio_min": ratios.min(),
                "ratio_max": ratios.max(),
                "runs": runs,
            }
        )
    return rows


def main() -> None:
    """Measure as the command line says, and write the table to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="default: 7 at batch 1, 3 at batch 16 and for --growth")
    parser.add_argument("--growth", action="store_true", help="ratios at growing length instead, batch 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {name: stepsal.load("smollm2") for name in (("baseline", "StepFlow") if args.growth else VARIANTS)}
    rows = []
    if args.growth:
        for model in models.values():  # cost does not ask for sense
            model.original_model.config.max_position_embeddings = model.cfg.n_ctx = 8192
        for n_before in (100, 600, 1600, 3600):
            rows += measure(models, 400, n_before, 50, 1, args.runs or 3)
    else:
        for batch, runs in ((1, 7), (16, 3)):
            rows += measure(models, 400, 0, 200, batch, args.runs or runs)
    table = pd.DataFrame(rows)
    name = "decode_growth" if args.growth else "decode_overhead"
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.4g")
    (RESULTS / f"{name}.json").write_text(json.dumps(machine.facts(), indent=2) + "\n")
    print(table.to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
