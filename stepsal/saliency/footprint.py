"""Estimate how much memory a model needs, for itself and for a long trace, before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module

from stepsal.bridge.attention import sliding_window
from stepsal.bridge.loading import blueprint
from stepsal.saliency.memory import least_bytes


@dataclass(frozen=True)
class Footprint:
    """Memory that a model needs, in bytes; printed, a table in GB.

    Attributes:
        model_name: the model's name.
        dtype: dtype of the parameters.
        n_parameters: number of the parameters.
        n_tokens: length of each trace in tokens.
        batch_size: number of traces that are written together.
        weights: bytes of the parameters.
        cache: bytes of keys and values of `batch_size` traces while they are written.
        streamed: lower bound for computing the maps of one trace with engine="streamed", in bytes, without the weights.
        under_stepflow: the same under StepFlow.
        patterns: the same for engine="pattern", which hooks of your own on scores and patterns need.

    Example:
        >>> footprint = stepsal.saliency.memory_needed("mini", 4000, batch_size=2)
        >>> f"{footprint.cache / 1e6:.1f} MB"
        '16.4 MB'
    """

    model_name: str
    dtype: torch.dtype
    n_parameters: int
    n_tokens: int
    batch_size: int
    weights: int
    cache: int
    streamed: int
    under_stepflow: int
    patterns: int

    def __str__(self) -> str:
        traces = "one trace" if self.batch_size == 1 else f"{self.batch_size} traces"
        lines = [
            (
                f"weights, {self.n_parameters / 1e9:.2f} billion in {str(self.dtype).removeprefix('torch.')}",
                self.weights,
            ),
            (f"writing {traces} of {self.n_tokens} tokens: keys and values", self.cache),
            (f"step maps of {self.n_tokens} tokens", self.streamed),
            ("the same under StepFlow", self.under_stepflow),
            ("the same from whole patterns, as with hooks on them", self.patterns),
        ]
        width = max(len(words) for words, _ in lines)
        return "\n".join([f"{self.model_name}, GB", *(f"  {words:{width}s} {n / 1e9:8.2f}" for words, n in lines)])


def memory_needed(
    name: str,
    n_tokens: int = 8192,
    *,
    n_steps: int = 200,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Footprint:
    """Estimate the memory that a model of `stepsal.load` needs, from its configuration; no weights are read.

    A quantized checkpoint is counted as if it were not quantized, and step maps with the smallest buffers.

    Args:
        name: "mini", "smollm2", a hub id, or a local folder.
        n_tokens: length of a trace in tokens, prompt included.
        n_steps: number of steps of a trace.
        batch_size: number of traces that are written together.
        dtype: dtype of the parameters, keys and values.
        revision: branch, tag or commit of a hub model; None is the default branch.
        trust_remote_code: True allows a hub id or a folder to bring its own code; False never runs code from the
            repository.

    Raises:
        OSError: the hub id or the folder can't be read.
        ValueError: a number is below 1, or TransformerLens does not support the architecture.

    Example:
        >>> print(stepsal.saliency.memory_needed("mini", 4000))
        mini, GB
          weights, 0.00 billion in bfloat16                       0.00
          writing one trace of 4000 tokens: keys and values       0.01
          step maps of 4000 tokens                                0.06
          the same under StepFlow                                 0.06
          the same from whole patterns, as with hooks on them     4.29
    """
    if min(n_tokens, n_steps, batch_size) < 1:
        raise ValueError(f"n_tokens={n_tokens}, n_steps={n_steps} and batch_size={batch_size} must be at least 1")
    blank = blueprint(name, dtype, revision=revision, trust_remote_code=trust_remote_code)
    try:
        model = build_bridge_from_module(
            blank, type(blank).__name__, hf_config=blank.config, tokenizer=None, model_name=name
        )
        least = least_bytes(model, n_tokens, n_steps)
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise ValueError(f"{name!r} ({type(blank).__name__}) is not supported: {error}") from error
    n_parameters = sum(parameter.numel() for parameter in blank.parameters())
    keys = sum(min(sliding_window(model, layer) or n_tokens, n_tokens) for layer in range(model.cfg.n_layers))
    key_and_value = 2 * (model.cfg.n_key_value_heads or model.cfg.n_heads) * model.cfg.d_head * dtype.itemsize
    return Footprint(
        name, dtype, n_parameters, n_tokens, batch_size, weights=n_parameters * dtype.itemsize,
        cache=batch_size * keys * key_and_value, **least._asdict(),
    )  # fmt: skip
