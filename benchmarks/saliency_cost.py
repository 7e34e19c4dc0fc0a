"""Measure what Step-Saliency costs: memory in a process for each point, and time in turn with other methods.

    python benchmarks/saliency_cost.py           # the next four
    python benchmarks/saliency_cost.py memory    # peak memory and time against length; fits of the exponents
    python benchmarks/saliency_cost.py time      # ratios, variants in turn in one process
    python benchmarks/saliency_cost.py pooling   # pooling alone, against length and number of steps
    python benchmarks/saliency_cost.py stepflow  # memory and time of the streamed engine with and without StepFlow
    python benchmarks/saliency_cost.py 7b        # on a GPU: random weights of the shape of R1-Distill-Qwen-7B, bfloat16

SmolLM2-135M on a question and random tokens in 20 steps, its rotary embedding extended to any length: cost does not ask
for sense. The methods:

    streamed, pattern   the engines, target="token"; "streamed sequence" is target="sequence"
    .. StepFlow         the same under StepFlow at the paper's settings; "StepFlow everywhere" edits all layers
    floor               a fused forward and backward pass of the plain Hugging Face model, parameters frozen
    run_with_cache      TransformerLens' run_with_cache(incl_bwd=True) of scores, patterns and their gradients, no maps
    T passes            a backward pass for each target, the definition (short texts only)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import machine
import numpy as np
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

import stepsal
from stepsal.bridge.gradients import differentiable
from stepsal.bridge.hooks import attention_hooks
from stepsal.maps.pooling import StepSums
from stepsal.saliency.blocks import Workspace, row_blocks
from stepsal.saliency.memory import Plan, plan
from stepsal.saliency.pattern import pattern_maps
from stepsal.saliency.request import MapRequest
from stepsal.saliency.streamed import streamed_maps
from stepsal.trace import render_prompt

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONGEST = {"pattern": 2048, "run_with_cache": 2048, "T passes": 128, "floor": 8192}
METHODS = ("streamed", "pattern", "run_with_cache", "floor", "T passes")
EDITED = ("streamed", "streamed StepFlow", "streamed StepFlow everywhere")
QUESTION = "How many legs do the animals of this farm have? " * 10
EVERYWHERE = stepsal.StepFlowConfig(oeb_layers="all", smi_layers="all")
N_STEPS = 20
RESULTS = Path(__file__).parent / "results"


def smollm2(dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """Load SmolLM2, with room for any length."""
    model = stepsal.load("smollm2", dtype=dtype)
    model.original_model.config.max_position_embeddings = model.cfg.n_ctx = 2**17
    return model


def tokens_and_steps(n_tokens: int, d_vocab: int, n_steps: int = N_STEPS) -> tuple[Tensor, Tensor]:
    """Return random tokens, and the step of each."""
    tokens = torch.randint(0, d_vocab, (n_tokens,), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(n_tokens) * n_steps // n_tokens


def with_question(model: TransformerBridge, tokens: Tensor) -> Tensor:
    """Put a question in its template in the place of the first tokens, so that StepFlow has a bridge."""
    prompt = model.tokenizer(render_prompt(model.tokenizer, QUESTION).text, add_special_tokens=False)["input_ids"]
    return torch.cat((torch.tensor(prompt), tokens))[: len(tokens)]


def planned(model: TransformerBridge, n_tokens: int, name: str) -> Plan:
    """Return how an engine lays out its memory."""
    return plan(
        model, n_tokens, N_STEPS, engine=name.split()[0], layers=tuple(range(model.cfg.n_layers)), keep_heads=False,
        only_pattern=None, bridged="StepFlow" in name,
    )  # fmt: skip


def engine(
    model: TransformerBridge, n_tokens: int, name: str, workspace: Workspace | None = None
) -> Callable[[], None]:
    """Return a run of one of stepsal's own engines."""
    tokens, step_ids = tokens_and_steps(n_tokens, model.cfg.d_vocab)
    target = "sequence" if name.endswith("sequence") else "token"
    if model.tokenizer is not None:
        tokens = with_question(model, tokens)
    request = MapRequest(tokens, step_ids, N_STEPS, layers=tuple(range(model.cfg.n_layers)), target=target)
    layout = planned(model, n_tokens, name)

    def run() -> None:
        if name.startswith("pattern"):
            pattern_maps(model, request)
        else:
            streamed_maps(model, request, n_rows=layout.n_rows, n_kept=layout.n_kept, workspace=workspace)

    def run_edited() -> None:
        with stepsal.stepflow(model, EVERYWHERE if name.endswith("everywhere") else None) as log:
            run()
        assert log.oeb["fired"].sum() > 0

    return run_edited if "StepFlow" in name else run


def run_with_cache(model: TransformerBridge, n_tokens: int) -> Callable[[], None]:
    """Return a run that caches scores, patterns and their gradients, as TransformerLens does it."""
    tokens, _ = tokens_and_steps(n_tokens, model.cfg.d_vocab)
    names = [
        attention_hooks(model, layer)[kind] for layer in range(model.cfg.n_layers) for kind in ("scores", "pattern")
    ]

    def run() -> None:
        model.zero_grad()
        model.run_with_cache(tokens[None], return_type="loss", incl_bwd=True, names_filter=names)

    return run


def backward_passes(model: TransformerBridge, n_tokens: int) -> Callable[[], None]:
    """Return the definition of the gradient: a backward pass for each target."""
    tokens, _ = tokens_and_steps(n_tokens, model.cfg.d_vocab)
    patterns: dict[str, Tensor] = {}

    def keep(pattern: Tensor, hook: object) -> Tensor:
        patterns[hook.name] = pattern if pattern.requires_grad else pattern.detach().requires_grad_()
        return patterns[hook.name]

    names = [attention_hooks(model, layer)["pattern"] for layer in range(model.cfg.n_layers)]

    def run() -> None:
        with differentiable(model), model.hooks(fwd_hooks=[(name, keep) for name in names]):
            logits = model(tokens[None], attention_mask=torch.ones(1, n_tokens, dtype=torch.long))[0]
            losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
            for loss in losses:
                torch.autograd.grad(loss, list(patterns.values()), retain_graph=True)

    return run


def floor(model: TransformerBridge, n_tokens: int) -> Callable[[], None]:
    """Return a forward and a backward pass of a Hugging Face model of the same shape with fused attention."""
    source = model.original_model.config
    config = transformers.LlamaConfig(**{k: v for k, v in source.to_dict().items() if k != "architectures"})
    plain = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").requires_grad_(False).eval()
    tokens, _ = tokens_and_steps(n_tokens, model.cfg.d_vocab)

    def run() -> None:
        embedded = plain.get_input_embeddings()(tokens[None]).requires_grad_()
        plain(inputs_embeds=embedded, labels=tokens[None], use_cache=False).loss.backward()

    return run


def method(name: str, model: TransformerBridge, n_tokens: int) -> Callable[[], None]:
    """Return a run of a method at one length."""
    others = {"run_with_cache": run_with_cache, "T passes": backward_passes, "floor": floor}
    return others[name](model, n_tokens) if name in others else engine(model, n_tokens, name)


# ------------------------------------------------------------------------------------------------------ memory


def memory_of_this_process() -> tuple[int, int]:
    """Return the bytes in use, and those at the peak since the last `forget_the_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def forget_the_peak() -> None:
    """Count the peak from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def point(name: str, n_tokens: int, dtype: torch.dtype) -> dict:
    """Measure one method at one length, in this process."""
    model = smollm2(dtype)
    run = method(name, model, n_tokens)
    forget_the_peak()
    before, _ = memory_of_this_process()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    _, peak = memory_of_this_process()
    estimate = planned(model, n_tokens, name).n_bytes if name.startswith(("pattern", "streamed")) else None
    return {"method": name, "tokens": n_tokens, "seconds": seconds, "model_bytes": before, "peak_bytes": peak,
            "estimate_bytes": estimate}  # fmt: skip


def run_point(name: str, n_tokens: int) -> dict:
    """Measure one method at one length, in a process of its own."""
    command = [sys.executable, __file__, "--point", name, "--tokens", str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    # a method that does not fit is a finding
    error = "out of memory" if done.returncode < 0 else done.stderr.strip().splitlines()[-1][:200]
    return {"method": name, "tokens": n_tokens, "error": error}


def measure_memory(lengths: list[int], methods: list[str]) -> pd.DataFrame:
    """Measure memory and time of methods at several lengths, and write the table after each."""
    points = [(name, n) for n in lengths for name in methods if name != "T passes"]
    points += [(name, n) for name in methods if name == "T passes" for n in (64, 128)]
    rows = []
    for name, n_tokens in tqdm([p for p in points if p[1] <= LONGEST.get(p[0], p[1])]):
        rows.append(run_point(name, n_tokens))
        table = pd.DataFrame(rows)
        table["grown_bytes"] = table["peak_bytes"] - table["model_bytes"]
        save("saliency_memory", table, show=False)  # after each point: the last ones take long
    return table


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Fit the slope of the logarithm against the logarithm of the length, from 1024 and from 2048 tokens on."""
    rows = []
    measured = table.dropna(subset=["peak_bytes"])
    for start, (name, group) in [
        (n, g) for n in (1024, 2048) for g in measured[measured["tokens"] >= n].groupby("method")
    ]:
        if len(group) > 1 and group["tokens"].min() == start:
            x = np.log(group["tokens"])
            fits = {what: np.polyfit(x, np.log(group[what]), 1)[0] for what in ("grown_bytes", "seconds")}
            rows.append({"method": name, "from": group["tokens"].min(), "to": group["tokens"].max(), **fits})
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------------------------------- time


def in_turn(
    runs: dict[str, Callable[[], None]], turns: int, what: str, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Return the seconds of runs that take turns, each turn beginning with another; the first one may only warm up."""
    names, times = list(runs), {name: [] for name in runs}
    for turn in tqdm(range(turns + warm_up), desc=what):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            runs[name]()
            if turn or not warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def measure_time(lengths: list[int], all_turns: int) -> pd.DataFrame:
    """Measure the time of methods that take turns, relative to the floor and to the streamed engine."""
    model = smollm2()
    rows = []
    for n_tokens in lengths:
        turns = all_turns if n_tokens <= 2048 else min(all_turns, 3)  # long ones take minutes
        names = ["floor", "streamed", "streamed sequence"] + ["run_with_cache", "pattern"] * (n_tokens <= 2048)
        runs = {name: method(name, model, n_tokens) for name in names}
        times = in_turn(runs, turns, f"{n_tokens} tokens", warm_up=n_tokens <= 2048)
        for name in names:
            of_floor = [a / b for a, b in zip(times[name], times["floor"], strict=True)]
            of_streamed = [a / b for a, b in zip(times[name], times["streamed"], strict=True)]
            rows.append(
                {"tokens": n_tokens, "method": name, "seconds": statistics.median(times[name]),
                 "of_floor": statistics.median(of_floor), "min": min(of_floor), "max": max(of_floor),
                 "of_streamed": statistics.median(of_streamed), "turns": turns}
            )  # fmt: skip
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------------------- pooling


def measure_pooling(lengths: list[int]) -> pd.DataFrame:
    """Measure pooling of all blocks of all layers, as the streamed engine does it, and the whole engine beside it."""
    model = smollm2()
    n_layers, n_heads, n_groups = model.cfg.n_layers, model.cfg.n_heads, model.cfg.n_key_value_heads
    rows = []
    for n_tokens in lengths:
        start = time.perf_counter()
        engine(model, n_tokens, "streamed")()
        whole = time.perf_counter() - start
        for n_steps in (20, 200, 1000):
            _, step_ids = tokens_and_steps(n_tokens, 2, min(n_steps, n_tokens))
            n_rows = planned(model, n_tokens, "streamed").n_rows
            buffer = torch.rand(n_heads // n_groups, n_rows, n_tokens)
            size = torch.empty_like(buffer)
            start = time.perf_counter()
            pool = StepSums(step_ids, n_steps)
            for block in row_blocks(n_tokens, n_rows):
                product = buffer[:, : block.stop - block.first, : block.stop]
                for _ in range(n_groups):
                    pool.add(
                        torch.abs(product, out=size[:, : block.stop - block.first, : block.stop]).sum(0), block.first
                    )
            seconds = n_layers * (time.perf_counter() - start)
            rows.append({"tokens": n_tokens, "steps": n_steps, "pooling_seconds": seconds, "engine_seconds": whole,
                         "share": seconds / whole})  # fmt: skip
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------- StepFlow


def measure_stepflow(n_tokens: int, turns: int) -> pd.DataFrame:
    """Measure the streamed engine with and without StepFlow: peaks in processes of their own, short texts in turn."""
    of_methods = {name: run_point(name, n_tokens) for name in EDITED}
    if n_tokens <= 2048:
        model, workspace = smollm2(), Workspace()
        runs = {name: engine(model, n_tokens, name, workspace) for name in EDITED}
        times = in_turn(runs, turns, f"{n_tokens} tokens")
        for name, seconds in times.items():
            ratios = [a / b for a, b in zip(seconds, times["streamed"], strict=True)]
            of_methods[name] |= {
                "seconds": statistics.median(seconds), "of_streamed": statistics.median(ratios), "min": min(ratios),
                "max": max(ratios), "turns": turns,
            }  # fmt: skip
    table = pd.DataFrame(of_methods.values())
    table["grown_bytes"] = table["peak_bytes"] - table["model_bytes"]
    return table


# ----------------------------------------------------------------------------------------------------- 7B, GPU


def measure_7b(lengths: list[int]) -> pd.DataFrame:
    """Measure the streamed engine on a GPU at the shape of R1-Distill-Qwen-7B, and a fused pass of the plain model."""
    config = transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("cuda"):
        hf_model = transformers.Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    plain = fused_passes(hf_model)
    floors = {
        n: seconds_on_gpu(partial(plain, n)) for n in lengths if n <= LONGEST["floor"]
    }  # before the bridge wraps it
    model = stepsal.load("qwen2-7b-shape", hf_model=hf_model, tokenizer=smollm2().tokenizer)
    rows = []
    for n_tokens, name in [(n, name) for n in lengths for name in ("streamed", "streamed StepFlow")]:
        run = engine(model, n_tokens, name)
        run()
        forget_the_peak()
        before, _ = memory_of_this_process()
        seconds = seconds_on_gpu(run)
        _, peak = memory_of_this_process()
        rows.append({"method": name, "tokens": n_tokens, "seconds": seconds, "floor_seconds": floors.get(n_tokens),
                     "model_bytes": before, "peak_bytes": peak, "reserved_bytes": torch.cuda.max_memory_reserved(),
                     "estimate_bytes": planned(model, n_tokens, name).n_bytes})  # fmt: skip
    return pd.DataFrame(rows)


def fused_passes(model: torch.nn.Module) -> Callable[[int], None]:
    """Return a fused forward and backward pass of a plain model, by number of tokens."""
    model.requires_grad_(False)

    def run(n_tokens: int) -> None:
        tokens, _ = tokens_and_steps(n_tokens, model.config.vocab_size)
        tokens = tokens.to(model.device)
        embedded = model.get_input_embeddings()(tokens[None]).requires_grad_()
        model(inputs_embeds=embedded, labels=tokens[None], use_cache=False).loss.backward()

    return run


def seconds_on_gpu(run: Callable[[], None], turns: int = 3) -> float:
    """Return the median of the seconds that a run takes on a GPU, after one that warms it up."""
    seconds = []
    for _ in range(turns + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def save(name: str, table: pd.DataFrame, show: bool = True) -> None:
    """Write a table; rows of an earlier one, of lengths and methods that were not measured this time, are kept."""
    RESULTS.mkdir(exist_ok=True)
    path, key = RESULTS / f"{name}.csv", [c for c in ("method", "tokens", "steps") if c in table]
    if path.exists() and "tokens" in key:
        before = pd.read_csv(path)
        measured = table.set_index(key).index
        table = pd.concat([before[~before.set_index(key).index.isin(measured)], table]).sort_values(
            "tokens", kind="stable"
        )
    table.to_csv(path, index=False, float_format="%.4g")
    facts = machine.facts() | {"memory_gb": round(psutil.virtual_memory().total / 1e9)}
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    if show:
        print(table.to_string(index=False, float_format="%.3g"))


def main() -> None:
    """Measure as the command line says, and write the tables to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="?", choices=["all", "memory", "time", "pooling", "stepflow", "7b"], default="all"
    )
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="of the memory table")
    parser.add_argument("--point", help="measure one method in this process, and print it as JSON")
    parser.add_argument("--tokens", type=int, default=1024, help="of the point")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the point")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(point(args.point, args.tokens, getattr(torch, args.dtype))))
        return
    if args.what == "7b":
        if torch.cuda.is_available():
            save("saliency_7b", measure_7b(args.lengths or [2048, 4096, 8192, 16384, 32768]))
        else:
            print("not run: there is no CUDA device")
    if args.what in ("memory", "all"):
        save("saliency_memory", measure_memory(args.lengths or list(LENGTHS), args.methods))
        save("saliency_exponents", exponents(pd.read_csv(RESULTS / "saliency_memory.csv")))
    if args.what in ("time", "all"):
        save("saliency_time", measure_time(args.lengths or [512, 1024, 2048, 8192], args.turns))
    if args.what in ("stepflow", "all"):
        for n_tokens in args.lengths or [1024, 2048, 4096, 8192]:
            save("saliency_stepflow", measure_stepflow(n_tokens, args.turns))  # after each: the last ones take long
    if args.what in ("pooling", "all"):
        save("saliency_pooling", measure_pooling(args.lengths or [512, 2048, 8192]))


if __name__ == "__main__":
    main()
