"""Measure how fast answers are written, against `generate` of transformers: the same weights, prompts and tokens.

    python benchmarks/decode_speed.py                # SmolLM2, batch 1 and 16, 100 new tokens, on one core
    python benchmarks/decode_speed.py --threads 2

The variants write one answer (or one batch) each in turn, in an order that rotates, so that whatever slows the machine
for more than a moment slows all alike. A ratio is that of two times of the same round; the table shows its median and
range over rounds. The variants:

    transformers   `generate` of an unwrapped copy of the model, fused attention
    plain          `stepsal.generate_batch`
    StepFlow       the same under StepFlow with the paper's settings
    hooked         plain, with an idle hook on every part of every layer, so that nothing runs without its wrapper
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import machine
import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.bridge.smollm2 import smollm2_folder
from stepsal.trace import render_prompt

QUESTION = "Tell a long story about number {} of the hundred lighthouse keepers, and begin with the place."
RESULTS = Path(__file__).parent / "results"


def idle(x: torch.Tensor, hook: object) -> None:
    """Do nothing with an activation."""
    return None


def hooked(model: TransformerBridge) -> AbstractContextManager:
    """Put an idle hook on every part of every layer."""
    parts = ("hook_in", "attn.hook_pattern", "mlp.hook_in", "ln1.hook_in", "ln2.hook_in")
    names = [f"blocks.{layer}.{part}" for layer in range(model.cfg.n_layers) for part in parts]
    return model.hooks(fwd_hooks=[(name, idle) for name in ("embed.hook_in", "ln_final.hook_in", *names)])


def variants(batch: int, n_new: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Return for each variant a function that writes a batch of answers, and returns their tokens."""
    model = stepsal.load("smollm2")
    unwrapped = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder(), padding_side="left")
    questions = [QUESTION.format(row + 1) for row in range(batch)]
    texts = [render_prompt(model.tokenizer, question).text for question in questions]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)

    def ours(stepflow: stepsal.StepFlowConfig | None = None) -> list[list[int]]:
        traces = stepsal.generate_batch(model, questions, stepflow=stepflow, max_new_tokens=n_new)
        return [trace.tokens[trace.n_prompt :].tolist() for trace in traces]

    def theirs() -> list[list[int]]:
        with torch.no_grad():
            rows = unwrapped.generate(**inputs, max_new_tokens=n_new, do_sample=False)
        return [row[inputs["input_ids"].shape[1] :].tolist() for row in rows]

    def wrapped() -> list[list[int]]:
        with hooked(model):
            return ours()

    return {
        "transformers": theirs,
        "plain": ours,
        "StepFlow": lambda: ours(stepsal.StepFlowConfig()),
        "hooked": wrapped,
    }


def measure(batch: int, n_new: int, n_rounds: int) -> list[dict[str, object]]:
    """Return the time of each variant in each round."""
    writers = variants(batch, n_new)
    names, rows = list(writers), []
    answers = {name: write() for name, write in writers.items()}  # the first round only warms up
    if answers["plain"] != answers["transformers"]:
        raise SystemExit("the answers differ from those of transformers")
    for number in tqdm(range(n_rounds), desc=f"batch {batch}"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.perf_counter()
            n_tokens = max(map(len, writers[name]()))
            seconds = (time.perf_counter() - begin) / n_tokens
            rows.append({"batch": batch, "round": number, "variant": name, "milliseconds": 1000 * seconds})
    return rows


def main() -> None:
    """Measure as the command line says, print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=100, help="new tokens of an answer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times = pd.DataFrame([row for b in options.batch for row in measure(b, options.tokens, options.rounds)])
    wide = times.pivot(index=["batch", "round"], columns="variant", values="milliseconds")
    ratios = wide.div(wide["transformers"], axis=0).stack().rename("ratio").reset_index()
    grouped = ratios.groupby(["batch", "variant"], sort=False)["ratio"]
    table = grouped.agg(ratio="median", lowest="min", highest="max").round(3)
    table.insert(0, "milliseconds", times.groupby(["batch", "variant"])["milliseconds"].median().round(1))
    print(table.to_string())
    path = RESULTS / f"decode_speed_{options.threads}.json"
    rows = table.reset_index().to_dict("records")
    settings = {"new_tokens": options.tokens, "rounds": options.rounds, "threads": options.threads}
    path.write_text(json.dumps({"machine": machine.facts(), **settings, "table": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
