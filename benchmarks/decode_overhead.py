"""What StepFlow costs while decoding: time of N new tokens with and without it, in turn.

    python benchmarks/decode_overhead.py                       # 400-token prompt, 200 new tokens, batch 1 and 16
    python benchmarks/decode_overhead.py --growth              # 50 new tokens after 500 .. 4000 tokens of thinking

The new tokens are given, so that all variants do the same work: SmolLM2 (context extended for --growth) reads sentences
one token at a time from the cache, as it would read its own. Variants run in turn, in an order that rotates; a ratio is
taken within one turn, and the table shows its median and range over turns. A token that takes three times as long as is
usual in its run counts as a stall of the machine, and is left out, whatever the variant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
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
    "OEB only": stepsal.StepFlowConfig(smi_layers=None),
    "SMI only": stepsal.StepFlowConfig(oeb_layers=None),
    "StepFlow": stepsal.StepFlowConfig(),
}
SENTENCE = "Then we add {} to what we have so far, which gives {} in all. "
RESULTS = Path(__file__).parent / "results"


def tokens_of(model: TransformerBridge, n_prompt: int, n_thinking: int, batch: int) -> torch.Tensor:
    """A prompt of about n_prompt tokens and thinking up to exactly n_prompt + n_thinking, [batch, pos]."""
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


def seconds(model: TransformerBridge, tokens: torch.Tensor, n_new: int, config: stepsal.StepFlowConfig | None) -> float:
    """Mean time of each of the last n_new tokens, one at a time from the cache of the others; stalls left out."""
    n_first = tokens.shape[1] - n_new
    device = next(model.parameters()).device
    times = []
    with stepsal.stepflow(model, config) if config else nullcontext(), torch.no_grad():
        _, cache = model(tokens[:, :n_first], return_type="logits_and_cache", use_cache=True, logits_to_keep=1)
        for i in range(n_first, tokens.shape[1]):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            _, cache = model(tokens[:, i : i + 1], past_key_values=cache, return_type="logits_and_cache")
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    usual = statistics.median(times)
    return statistics.mean(t for t in times if t <= 3 * usual)


def measure(
    model: TransformerBridge, n_prompt: int, n_before: int, n_new: int, batch: int, turns: int, names: list[str]
) -> list[dict]:
    """One row per variant of `names`: median milliseconds per token, and the ratio to the baseline of the same turn."""
    tokens = tokens_of(model, n_prompt, n_before + n_new, batch).to(next(model.parameters()).device)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(turns + 1), desc=f"batch {batch}, {n_prompt + n_before} tokens before"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = seconds(model, tokens, n_new if turn else 10, VARIANTS[name])
            if turn:  # the first one warms up
                times[name].append(taken)
    rows = []
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times["baseline"], strict=True)]
        rows.append(
            {
                "batch": batch,
                "tokens_before": n_prompt + n_before,
                "new_tokens": n_new,
                "variant": name,
                "ms_per_token": 1000 * statistics.median(taken),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "turns": turns,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--new", type=int, default=200, help="new tokens per run")
    parser.add_argument("--growth", action="store_true", help="ratios at growing length instead, batch 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = stepsal.load("smollm2")
    rows = []
    if args.growth:
        model.original_model.config.max_position_embeddings = model.cfg.n_ctx = 8192  # cost does not ask for sense
        for n_before in (100, 600, 1600, 3600):
            rows += measure(model, 400, n_before, 50, 1, args.turns, ["baseline", "StepFlow"])
    else:
        for batch in args.batch:
            rows += measure(model, 400, 0, args.new, batch, args.turns, list(VARIANTS))
    table = pd.DataFrame(rows)
    name = "decode_growth" if args.growth else "decode_overhead"
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.4g")
    (RESULTS / f"{name}.json").write_text(json.dumps(machine.facts(), indent=2) + "\n")
    print(table.to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
