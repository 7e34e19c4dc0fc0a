"""Tell how much memory a model needs, for itself and for a long trace, before any of it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module

from stepsal.bridge.attention import sliding_window
from stepsal.bridge.loading import blueprint
from stepsal.saliency.memory import least_bytes


@dataclass(frozen=True)
class Footprint:
    """Memory that a model needs, in bytes; as text, a table in GB.

    Attributes:
        model_name: the model's name.
        dtype: of its parameters.
        n_parameters: their number.
        n_tokens: length of each trace.
        batch_size: traces that are decoded together.
        weights: the model itself.
        cache: keys and values of `batch_size` traces while they are written.
        streamed: at least, for the step maps of one trace, beside the weights.
        patterns: the same where whole patterns are needed: under StepFlow, or with hooks of your own.

    Example:
        >>> footprint = memory_needed("mini", 4000, batch_size=2)
        >>> footprint.cache == 2 * memory_needed("mini", 4000).cache
        True
    """

    model_name: str
    dtype: torch.dtype
    n_parameters: int
    n_tokens: int
    batch_size: int
    weights: int
    cache: int
    streamed: int
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
            ("the same from whole patterns, as under StepFlow", self.patterns),
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

    Quantized checkpoints are counted as if they were not, and step maps with the smallest buffers.

    Args:
        name: "mini", "smollm2", a hub id, or a local folder.
        n_tokens: length of a trace, prompt included.
        n_steps: steps of a trace.
        batch_size: traces that are decoded together.
        dtype: of the parameters, keys and values.
        revision: of a hub model.
        trust_remote_code: passed on for hub ids and folders.

    Raises:
        OSError: a hub id or a folder that can't be read.
        ValueError: numbers below 1, or an architecture that TransformerLens does not support.

    Example:
        >>> print(stepsal.saliency.memory_needed("mini", 4000))
        mini, GB
          weights, 0.00 billion in bfloat16                     0.00
          writing one trace of 4000 tokens: keys and values     0.01
          step maps of 4000 tokens                              0.06
          the same from whole patterns, as under StepFlow       4.29
    """
    if min(n_tokens, n_steps, batch_size) < 1:
        raise ValueError(f"n_tokens={n_tokens}, n_steps={n_steps} and batch_size={batch_size} must be at least 1")
    blank = blueprint(name, dtype, revision=revision, trust_remote_code=trust_remote_code)
    try:
        model = build_bridge_from_module(
            blank, type(blank).__name__, hf_config=blank.config, tokenizer=None, model_name=name
        )
        streamed, patterns = least_bytes(model, n_tokens, n_steps)
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise ValueError(f"{name!r} ({type(blank).__name__}) is not supported: {error}") from error
    n_parameters = sum(parameter.numel() for parameter in blank.parameters())
    keys = sum(min(sliding_window(model, layer) or n_tokens, n_tokens) for layer in range(model.cfg.n_layers))
    key_and_value = 2 * (model.cfg.n_key_value_heads or model.cfg.n_heads) * model.cfg.d_head * dtype.itemsize
    return Footprint(
        name, dtype, n_parameters, n_tokens, batch_size, weights=n_parameters * dtype.itemsize,
        cache=batch_size * keys * key_and_value, streamed=streamed, patterns=patterns,
    )  # fmt: skip
