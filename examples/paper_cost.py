#!/usr/bin/env python3
"""Estimate what Table 1 costs before it is run: operations, and hours on one GPU.

    examples/paper_cost.py                                  # R1-Distill-Qwen-7B on an H100
    examples/paper_cost.py --tokens 8000 --batch 32 --bandwidth 2.0e12 --peak 312e12     # on an A100

A forward pass for one new token in each row of a batch reads all weights and the keys and values of all rows, and does
two operations per weight and row, and four per key, head dimension and row. It takes as long as the slower of the two.
The number of tokens of an answer is a guess, and the estimate is as good as the guess. StepFlow adds no operations that
count (README, "Cost").
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from stepsal.tasks.hub import BENCHMARKS


@dataclass(frozen=True)
class Shape:
    """The shape of a Qwen2 model; the defaults are those of R1-Distill-Qwen-7B's configuration."""

    n_layers: int = 28
    d_model: int = 3584
    n_heads: int = 28
    n_kv_heads: int = 4
    d_head: int = 128
    d_mlp: int = 18944
    d_vocab: int = 152064

    @property
    def weights(self) -> int:
        """The number of weights that a token is multiplied with; the embedding is only looked up."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_kv_heads)
        return self.n_layers * (attention + 3 * self.d_model * self.d_mlp) + self.d_model * self.d_vocab

    def operations(self, n_keys: float) -> float:
        """Return the operations for one token that sees `n_keys` keys, itself included."""
        return 2 * self.weights + 4 * self.n_layers * self.n_heads * self.d_head * n_keys

    def kv_bytes(self, n_keys: float, width: int = 2) -> float:
        """Return the bytes of the keys and values of a row, with `width` bytes per number."""
        return 2 * self.n_layers * self.n_kv_heads * self.d_head * n_keys * width


def seconds_per_pass(shape: Shape, n_keys: float, batch: int, peak: float, bandwidth: float) -> float:
    """Return the seconds of a forward pass for one new token in each row."""
    read = 2 * shape.weights + batch * shape.kv_bytes(n_keys)
    return max(read / bandwidth, batch * shape.operations(n_keys) / peak)


def main() -> None:
    """Print the estimate for the guesses on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=10_000, help="new tokens of an answer (a guess)")
    parser.add_argument("--prompt", type=float, default=200, help="tokens of a question")
    parser.add_argument("--batch", type=int, default=16, help="answers at once")
    parser.add_argument("--peak", type=float, default=990e12, help="operations per second of the GPU in bfloat16")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second of its memory")
    parser.add_argument("--efficiency", type=float, default=0.3, help="share of these that Python and PyTorch reach")
    args = parser.parse_args()
    shape, n_keys, total = Shape(), args.prompt + args.tokens / 2, 0.0
    peak, bandwidth = args.peak * args.efficiency, args.bandwidth * args.efficiency
    per_pass = seconds_per_pass(shape, n_keys, args.batch, peak, bandwidth)
    cache = args.batch * shape.kv_bytes(n_keys)
    print(f"{2 * shape.weights / 1e9:.1f} GB of weights, {cache / 1e9:.1f} GB of keys and values")
    print(f"{'benchmark':14s} {'answers':>8s} {'operations':>11s} {'GPU hours':>10s}   (without and with StepFlow)")
    for name, benchmark in BENCHMARKS.items():
        answers = 2 * benchmark.n_problems * benchmark.n_samples
        hours = answers / args.batch * args.tokens * per_pass / 3600
        total += hours
        print(f"{name:14s} {answers:8d} {answers * args.tokens * shape.operations(n_keys):11.1e} {hours:10.1f}")
    print(f"{'in all':14s} {'':8s} {'':11s} {total:10.1f}")


if __name__ == "__main__":
    main()
