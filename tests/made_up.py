"""Step maps made of random numbers, for tests that look at how maps are shown."""

from __future__ import annotations

import torch

from stepsal.maps import StepSaliency

NASTY = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", r"$\frac{1}{2}$ & <b>", "😀 مرحبا שלום"]


def saliency(
    n: int = 5, layers: int = 8, seed: int = 0, texts: list[str] | None = None, **more: object
) -> StepSaliency:
    """Steps of two tokens each: a question, thinking, a summary."""
    values = torch.rand(layers, n, n, generator=torch.Generator().manual_seed(seed)).tril()
    roles = ("question", *["thinking"] * (n - 2), "summary")
    ids = torch.arange(n).repeat_interleave(2)
    fields = {
        "values": values, "layers": tuple(range(layers)), "n_layers": layers, "model_name": "made up",
        "target": "token", "reduce": "density", "roles": roles,
        "step_texts": tuple(texts or [f"step {i}" for i in range(n)]), "step_lengths": (2,) * n, "step_ids": ids,
        "token_texts": tuple("ab" * n),
    }  # fmt: skip
    return StepSaliency(**fields | more)
