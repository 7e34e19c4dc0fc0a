"""Measure how fast answers are written, against `generate` of transformers: the same weights, prompts and tokens.

    python benchmarks/decode_speed.py                # batch 1 and 16, 100 new tokens, on one core
    python benchmarks/decode_speed.py --threads 2
    python benchmarks/decode_speed.py refill         # 64 answers of very different lengths, 16 rows at a time
    python benchmarks/decode_speed.py prompt         # a prompt of 4,000 tokens, with and without StepFlow
    python benchmarks/decode_speed.py --gpu          # a GPU: random weights, the shape of R1-Distill-Qwen-7B, bfloat16
    python benchmarks/decode_speed.py python         # its shape with tiny matrices: what is left is Python, as on a GPU

SmolLM2-135M in float32, but for `--gpu`. What is compared takes turns, in an order that rotates, so that whatever slows
the machine for more than a moment slows all alike. A ratio is that of two times of the same round; tables show its
median and range over rounds. The variants:

    transformers   `generate` of an unwrapped copy of the model, fused attention; in `refill` in batches of 16, each as
                   long as its longest answer
    plain          `stepsal.generate_batch`
    StepFlow       the same under StepFlow with the paper's settings
    hooked         plain, with an idle hook on every part of every layer, so that nothing runs without its wrapper
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import machine
import numpy as np
import pandas as pd
import psutil
import torch
import transformers
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.bridge.smollm2 import smollm2_folder
from stepsal.generation.loop import Prompt, write
from stepsal.trace import render_prompt

QUESTION = "Tell a long story about number {} of the hundred lighthouse keepers, and begin with the place."
RESULTS = Path(__file__).parent / "results"
N_ANSWERS, N_ROWS, MEAN_LENGTH, SIGMA = 64, 16, 200, 0.8  # of `refill`: lengths are lognormal

Writers = dict[str, Callable[[], list[list[int]]]]
"""For each variant, a function that writes answers and returns their tokens."""


def idle(x: torch.Tensor, hook: object) -> None:
    """Do nothing with an activation."""
    return None


def hooked(model: TransformerBridge) -> AbstractContextManager:
    """Put an idle hook on every part of every layer."""
    parts = ("hook_in", "attn.hook_pattern", "mlp.hook_in", "ln1.hook_in", "ln2.hook_in")
    names = [f"blocks.{layer}.{part}" for layer in range(model.cfg.n_layers) for part in parts]
    return model.hooks(fwd_hooks=[(name, idle) for name in ("embed.hook_in", "ln_final.hook_in", *names)])


def unwrapped_smollm2() -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    """Return SmolLM2 as transformers loads it, with its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(smollm2_folder(), padding_side="left")


def story_prompts(model: TransformerBridge, n: int) -> list[str]:
    """Return n rendered prompts."""
    return [render_prompt(model.tokenizer, QUESTION.format(row + 1)).text for row in range(n)]


# ---------------------------------------------------------------------------------------------- equal answers


def writers_of_equal_answers(batch: int, n_new: int) -> Writers:
    """Return the variants, each of which writes a batch of answers."""
    model = stepsal.load("smollm2")
    unwrapped, tokenizer = unwrapped_smollm2()
    questions = [QUESTION.format(row + 1) for row in range(batch)]
    inputs = tokenizer(story_prompts(model, batch), return_tensors="pt", padding=True, add_special_tokens=False)

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
        "transformers": theirs, "plain": ours, "StepFlow": lambda: ours(stepsal.StepFlowConfig()), "hooked": wrapped
    }  # fmt: skip


def in_turn(writers: Writers, n_rounds: int, desc: str, *, warm_up: bool = True) -> pd.DataFrame:
    """Return the seconds of each variant in each round, and the number of tokens that it wrote."""
    names, rows = list(writers), []
    if warm_up:
        answers = {name: writer() for name, writer in writers.items()}
        if answers["plain"] != answers["transformers"]:
            raise SystemExit("the answers differ from those of transformers")
    for number in tqdm(range(n_rounds), desc=desc):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.perf_counter()
            answers_now = writers[name]()
            seconds = time.perf_counter() - begin
            counts = list(map(len, answers_now))
            rows.append(
                {"round": number, "variant": name, "seconds": seconds, "longest": max(counts), "tokens": sum(counts)}
            )
    return pd.DataFrame(rows)


def ratios(times: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return for each variant the median and the range of its ratio to transformers over rounds."""
    wide = times.pivot(index=[*by, "round"], columns="variant", values="seconds")
    long = wide.div(wide["transformers"], axis=0).stack().rename("ratio").reset_index()
    return long.groupby([*by, "variant"])["ratio"].agg(ratio="median", lowest="min", highest="max").reset_index()


def measure_equal(batches: list[int], n_new: int, n_rounds: int) -> pd.DataFrame:
    """Measure all variants on answers of one length."""
    parts = [
        in_turn(writers_of_equal_answers(batch, n_new), n_rounds, f"batch {batch}").assign(batch=batch)
        for batch in batches
    ]
    times = pd.concat(parts)
    times["ms_per_token"] = 1000 * times["seconds"] / times["longest"]
    table = times.groupby(["batch", "variant"])["ms_per_token"].median().reset_index()
    table = table.merge(ratios(times, ["batch"]), on=["batch", "variant"])
    return table.assign(new_tokens=n_new, rounds=n_rounds, threads=torch.get_num_threads())


# ------------------------------------------------------------------------------------- answers of many lengths


def measure_refilling(n_answers: int, n_rows: int, n_rounds: int) -> pd.DataFrame:
    """Measure answers whose lengths are forced, heavy-tailed, with as many rows as there is room for."""
    model = stepsal.load("smollm2")
    unwrapped, tokenizer = unwrapped_smollm2()
    draws = np.random.default_rng(0).lognormal(np.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA, n_answers)
    lengths = np.maximum(1, draws.round()).astype(int).tolist()
    texts = story_prompts(model, n_answers)
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [Prompt(row, 0, n) for row, n in zip(ids, lengths, strict=True)]

    def ours(stepflow: stepsal.StepFlowConfig | None = None) -> list[list[int]]:
        flow = nullcontext() if stepflow is None else stepsal.stepflow(model, stepflow)
        with flow, mock.patch("stepsal.generation.loop.end_tokens", return_value=frozenset()):
            answers = sorted(write(model, prompts, n_rows, decoding=stepsal.Decoding()), key=lambda a: a.number)
        return [answer.tokens for answer in answers]

    def theirs() -> list[list[int]]:
        answers = []
        for start in range(0, n_answers, n_rows):
            inputs = tokenizer(
                texts[start : start + n_rows], return_tensors="pt", padding=True, add_special_tokens=False
            )
            longest = max(lengths[start : start + n_rows])
            with torch.no_grad():
                rows = unwrapped.generate(
                    **inputs, max_new_tokens=longest, min_new_tokens=longest, do_sample=False, eos_token_id=None
                )
            of_rows = zip(rows, lengths[start : start + n_rows], strict=True)
            answers += [row[inputs["input_ids"].shape[1] :][:n].tolist() for row, n in of_rows]
        return answers

    writers = {"transformers": theirs, "plain": ours, "StepFlow": lambda: ours(stepsal.StepFlowConfig())}
    times = in_turn(writers, n_rounds, f"{n_answers} answers", warm_up=False)
    table = ratios(times, []).assign(speed=lambda t: 1 / t["ratio"])
    rates = (times["tokens"] / times["seconds"]).groupby(times["variant"]).median().rename("tokens_per_second")
    table = table.merge(rates.reset_index(), on="variant")
    return table.assign(answers=n_answers, rows=n_rows, mean_length=np.mean(lengths), rounds=n_rounds)


# ------------------------------------------------------------------------------------------------- long prompts


def read_prompt(n_tokens: int, variant: str) -> dict[str, object]:
    """Read one long prompt and write one token, in this process; return seconds and the memory that it added."""
    model = stepsal.load("smollm2")
    words = " ".join(f"There are {i % 90 + 10} boats in harbour {i}." for i in range(n_tokens))
    question = model.tokenizer.decode(model.tokenizer(words)["input_ids"][: n_tokens - 40]) + " How many in all?"
    stepflow = stepsal.StepFlowConfig() if variant == "StepFlow" else None
    stepsal.generate(model, "How many?", stepflow=stepflow, max_new_tokens=2)
    Path("/proc/self/clear_refs").write_text("5")  # counts the peak from here on
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    trace = stepsal.generate(model, question, stepflow=stepflow, max_new_tokens=1)
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    return {"tokens": trace.n_prompt, "variant": variant, "seconds": seconds, "added_bytes": peak - before}


def measure_prompts(lengths: list[int]) -> pd.DataFrame:
    """Measure prompts of several lengths with and without StepFlow, each in a process of its own."""
    rows = []
    for n_tokens, variant in tqdm([(n, v) for n in lengths for v in ("plain", "StepFlow")]):
        command = [sys.executable, __file__, "prompt", "--point", str(n_tokens), variant]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------------- GPU


@contextmanager
def no_ends() -> Iterator[None]:
    """Let no token end an answer."""
    with mock.patch("stepsal.generation.loop.end_tokens", return_value=frozenset()):
        yield


def large_shape(**sizes: int) -> transformers.Qwen2Config:
    """Return the configuration of R1-Distill-Qwen-7B, or of a smaller model of its kind."""
    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28} | sizes
    return transformers.Qwen2Config(
        vocab_size=152064, num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072,
        tie_word_embeddings=False, **shape,
    )  # fmt: skip


def writers_of_random_weights(config: transformers.Qwen2Config, device: str) -> tuple[Callable[..., Writers], int]:
    """Return what makes the variants for a batch and a number of new tokens, and the bytes of the weights."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        hf_model = transformers.Qwen2ForCausalLM._from_config(config, dtype=dtype)
        unwrapped = transformers.Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    unwrapped.load_state_dict(hf_model.state_dict())
    tokenizer = stepsal.load("mini").tokenizer
    model = stepsal.load("random", hf_model=hf_model, tokenizer=tokenizer)
    ids: list[int] = tokenizer(story_prompts(model, 1)[0])["input_ids"]

    def writers(batch: int, n_new: int) -> Writers:
        inputs = torch.tensor([ids] * batch, device=device)

        def theirs() -> list[list[int]]:
            options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "eos_token_id": None}
            with torch.no_grad():
                rows = unwrapped.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
            return [row[len(ids) :].tolist() for row in rows]

        def ours(stepflow: bool) -> list[list[int]]:
            with no_ends(), stepsal.stepflow(model) if stepflow else nullcontext():
                answers = write(model, [Prompt(ids, 0, n_new)] * batch, decoding=stepsal.Decoding())
                return [answer.tokens for answer in sorted(answers, key=lambda a: a.number)]

        return {"transformers": theirs, "plain": lambda: ours(False), "StepFlow": lambda: ours(True)}

    return writers, sum(p.numel() * p.element_size() for p in hf_model.parameters())


def measure_random_weights(
    config: transformers.Qwen2Config, batches: list[int], n_new: int, n_rounds: int, device: str
) -> pd.DataFrame:
    """Measure tokens per second of a model with random weights, and how near they come to reading the weights alone."""
    make_writers, n_bytes = writers_of_random_weights(config, device)
    bandwidth = measured_bandwidth(device)
    parts = []
    for batch in batches:
        writers = make_writers(batch, n_new)
        written = {name: writer() for name, writer in writers.items()}  # the first round warms up
        same = np.mean([a == b for a, b in zip(written["plain"], written["transformers"], strict=True)])
        times = in_turn(writers, n_rounds, f"batch {batch}", warm_up=False)
        table = ratios(times, []).assign(batch=batch, same_as_transformers=same)
        seconds = times.groupby("variant")["seconds"].median() / n_new
        table["tokens_per_second"] = (batch / seconds).reindex(table["variant"]).to_numpy()
        table["of_bandwidth"] = (n_bytes / bandwidth / seconds).reindex(table["variant"]).to_numpy()
        parts.append(table)
    first = ["batch", "variant", "tokens_per_second", "of_bandwidth", "ratio"]
    table = pd.concat(parts)
    return table[[*first, *table.columns.difference(first, sort=False)]].assign(
        new_tokens=n_new, rounds=n_rounds, weights_gb=n_bytes / 1e9, bandwidth_tb=bandwidth / 1e12
    )


def measured_bandwidth(device: str) -> float:
    """Return the bytes a second that the device reads: those of a sum over a gigabyte."""
    data = torch.ones(2**28, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum().item()
        seconds.append(time.perf_counter() - start)
    return data.numel() * data.element_size() / min(seconds)


def save(name: str, table: pd.DataFrame) -> None:
    """Print a table, and write it with the facts of the machine."""
    print(table.to_string(index=False, float_format="%.3f"))
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.4g")
    (RESULTS / f"{name}.json").write_text(json.dumps(machine.facts(), indent=2) + "\n")


def main() -> None:
    """Measure as the command line says, and write the table to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["equal", "refill", "prompt", "python"], default="equal")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens of an answer of equal length")
    parser.add_argument("--rounds", type=int, help="default: 9, and 3 of `refill`")
    parser.add_argument("--answers", type=int, default=N_ANSWERS, help="number of answers of `refill`")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000], help="tokens of prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--point", nargs=2, help="read one prompt in this process, and print what it cost as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.point:
        print(json.dumps(read_prompt(int(options.point[0]), options.point[1])))
    elif options.gpu and not torch.cuda.is_available():
        print("not run: there is no CUDA device")
    elif options.gpu:
        table = measure_random_weights(
            large_shape(), options.batch or [1, 16, 64], options.tokens, options.rounds or 3, "cuda"
        )
        save("decode_7b", table)
    elif options.what == "python":
        tiny = large_shape(hidden_size=56, intermediate_size=64)
        save("decode_python", measure_random_weights(tiny, [1], options.tokens, options.rounds or 9, "cpu"))
    elif options.what == "refill":
        save("decode_refill", measure_refilling(options.answers, N_ROWS, options.rounds or 3))
    elif options.what == "prompt":
        save("decode_prompt", measure_prompts(options.lengths))
    else:
        table = measure_equal(options.batch or [1, 16], options.tokens, options.rounds or 9)
        save(f"decode_speed_{options.threads}", table)


if __name__ == "__main__":
    main()
