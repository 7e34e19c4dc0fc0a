"""The labelled result: step maps of every layer with their roles, texts and token spans, in and out of files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepsal.layers import Layers, checked_layers, layer_indices
from stepsal.maps.pooling import Reduce, normalise_rows
from stepsal.storage import write_atomic
from stepsal.trace.formats import Role

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from stepsal.trace import Trace

Target = Literal["token", "sequence", "attention"]
"""Whose loss is differentiated; "attention" is attention alone, without a gradient."""
FORMAT = "stepsal.StepSaliency"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class StepSaliency:
    """Step-by-step saliency of one trace, one lower-triangular map per layer, with all its labels.

    `values[l, i, j]` says how much step i (query) draws on step j (key) in layer `layers[l]`: saliency per pair of
    tokens under reduce="density", per query token under reduce="mass". The unit is that of the loss, nats; attention alone
    (target="attention") has none.

    Raises:
        ValueError: If shapes, labels and maps do not fit together, if `values` holds NaN, infinite or negative
            entries or anything above the diagonal, or if `metadata` cannot be written as JSON.
    """

    values: Float[Tensor, "layer query_step key_step"]  # float32 on the CPU, zero above the diagonal
    layers: tuple[int, ...]  # layer index of each map
    n_layers: int  # depth of the model; `layers` may be a subset
    model: str
    target: Target
    reduce: Reduce
    roles: tuple[Role, ...]  # of each step
    step_texts: tuple[str, ...]
    step_lengths: tuple[int, ...]  # tokens per step
    step_ids: Int[Tensor, " pos"]  # step of each token, -1 for template tokens
    token_texts: tuple[str, ...]
    head_values: Float[Tensor, "layer head query_step key_step"] | None = None
    token_values: Float[Tensor, "layer query_pos key_pos"] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # seed, versions, engine, ...; JSON values only

    def __post_init__(self) -> None:
        n_maps, n_steps, n_pos = len(self.layers), len(self.roles), len(self.token_texts)
        if n_maps == 0 or n_steps == 0:
            raise ValueError(f"{n_maps} layers and {n_steps} steps make no step map; give at least one of each")
        _check_choice("target", self.target, get_args(Target))
        _check_choice("reduce", self.reduce, get_args(Reduce))
        for role in self.roles:
            _check_choice("role", role, get_args(Role))
        if len(set(self.layers)) < n_maps or not all(0 <= layer < self.n_layers for layer in self.layers):
            raise ValueError(f"layers={self.layers} must be distinct indices in 0..{self.n_layers - 1}")
        for name, labels in (("step_texts", self.step_texts), ("step_lengths", self.step_lengths)):
            if len(labels) != n_steps:
                raise ValueError(f"{name} has {len(labels)} entries for {n_steps} steps (one role per step)")

        _check_shape("values", self.values, (n_maps, n_steps, n_steps))
        _check_shape("step_ids", self.step_ids, (n_pos,))
        if self.head_values is not None:
            n_heads = self.head_values.shape[1] if self.head_values.ndim == 4 else 0
            _check_shape("head_values", self.head_values, (n_maps, n_heads, n_steps, n_steps))
        if self.token_values is not None:
            _check_shape("token_values", self.token_values, (n_maps, n_pos, n_pos))

        if self.values.dtype != torch.float32:
            raise ValueError(f"values is {self.values.dtype}; pass values.float()")
        if not self.values.isfinite().all():
            raise ValueError("values holds NaN or infinite saliency; run the model in float32 or bfloat16")
        if (self.values < 0).any() or self.values.triu(1).any():
            raise ValueError("values must be non-negative and zero above the diagonal (saliency is causal)")
        if n_pos and not -1 <= int(self.step_ids.min()) <= int(self.step_ids.max()) < n_steps:
            raise ValueError(f"step_ids must lie in -1..{n_steps - 1} for {n_steps} steps")
        lengths = torch.bincount(self.step_ids[self.step_ids >= 0], minlength=n_steps).tolist()
        if lengths != list(self.step_lengths):
            raise ValueError(f"step_lengths={self.step_lengths} but step_ids counts {tuple(lengths)} tokens")
        _to_json(self.metadata, "metadata")

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.roles.count(role)} {role}" for role in get_args(Role) if role in self.roles)
        return (
            f"StepSaliency({self.model!r}, {len(self.layers)} of {self.n_layers} layers, {self.n_steps} steps: "
            f"{counts}; {len(self.token_texts)} tokens, target={self.target!r}, reduce={self.reduce!r})"
        )

    @property
    def n_steps(self) -> int:
        return len(self.roles)

    def positions(self, layers: Layers) -> list[int]:
        """Find where the maps of some layers stand in `values`.

        Of a band or a range of fractions those that were computed; of indices all.

        Raises:
            ValueError: a layer that was not computed, or no layer at all.
        """
        choice = checked_layers(layers)
        asked = layer_indices(choice, self.n_layers)
        if isinstance(choice, str) or (choice and isinstance(choice[0], float)):
            asked = tuple(layer for layer in asked if layer in self.layers)
        if not asked:
            raise ValueError(f"layers={layers!r} names no computed layer of {self.n_layers}; computed: {self.layers}")
        if absent := [layer for layer in asked if layer not in self.layers]:
            raise ValueError(
                f"layer {absent[0]} was not computed; computed: {self.layers} of {self.n_layers}. "
                "Ask for it with step_saliency(..., layers=...)"
            )
        return [self.layers.index(layer) for layer in asked]

    def layer(self, index: int) -> Float[Tensor, "query_step key_step"]:
        """Return the map of one layer, by its index in the model (-1 is the model's last layer).

        Raises:
            ValueError: that layer was not computed.
        """
        return self.values[self.positions(index)[0]]

    def mean_over(self, layers: Layers) -> Float[Tensor, "query_step key_step"]:
        """Return the mean map of several layers.

        Raises:
            ValueError: one of them was not computed, or there are none.
        """
        return self.values[self.positions(layers)].mean(0)

    def computed(self, layers: Layers) -> tuple[int, ...]:
        """Return those of some layers that were computed, by their index in the model."""
        return tuple(layer for layer in layer_indices(layers, self.n_layers) if layer in self.layers)

    def row_normalised(self) -> StepSaliency:
        """The same saliency with each row summing to one: the share of each key. Rows without mass stay zero.

        Maps by head and by token are normalised by their own rows.
        """
        return replace(
            self,
            values=normalise_rows(self.values),
            head_values=None if self.head_values is None else normalise_rows(self.head_values),
            token_values=None if self.token_values is None else normalise_rows(self.token_values),
            metadata=self.metadata | {"row_normalised": True},
        )

    def to_xarray(self) -> xr.DataArray:
        """`values` as a DataArray [layer, query_step, key_step] with role and text coordinates."""
        import xarray as xr

        roles, texts, steps = list(self.roles), list(self.step_texts), range(self.n_steps)
        return xr.DataArray(
            self.values.numpy().copy(),
            dims=("layer", "query_step", "key_step"),
            coords={
                "layer": list(self.layers),
                "query_step": list(steps),
                "key_step": list(steps),
                "query_role": ("query_step", roles),
                "key_role": ("key_step", roles),
                "query_text": ("query_step", texts),
                "key_text": ("key_step", texts),
            },
            name="saliency",
            attrs={"model": self.model, "n_layers": self.n_layers, "target": self.target, "reduce": self.reduce},
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and pair of steps, lower triangle only.

        Columns: layer, query_step, key_step, query_role, key_role, saliency.
        """
        import numpy as np
        import pandas as pd

        query, key = np.tril_indices(self.n_steps)
        roles = np.array(self.roles)
        n_maps = len(self.layers)
        return pd.DataFrame(
            {
                "layer": np.repeat(self.layers, len(query)),
                "query_step": np.tile(query, n_maps),
                "key_step": np.tile(key, n_maps),
                "query_role": np.tile(roles[query], n_maps),
                "key_role": np.tile(roles[key], n_maps),
                "saliency": self.values.numpy()[:, query, key].ravel(),
            }
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, the labels as a JSON document in its header; `.safetensors` is appended.

        One file, moved into place when complete: an interrupted save leaves the old file or none.

        Returns:
            The path of the file.
        """
        document = {name: getattr(self, name) for name in _LABELS}
        document |= {"format": FORMAT, "version": FORMAT_VERSION, "metadata": self.metadata}
        tensors = {
            # cloned, since safetensors refuses tensors that share memory (one head: values is a view of head_values)
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name in _TENSORS
            if (tensor := getattr(self, name)) is not None
        }
        data = safetensors.torch.save(tensors, metadata={"stepsal": _to_json(document, "labels and metadata")})
        path = _with_suffix(path)
        write_atomic(path, data)
        return path

    @classmethod
    def load(cls, path: str | Path) -> StepSaliency:
        """Read what `save` wrote; nothing is unpickled or executed.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is corrupt, foreign, of another format version, or inconsistent in itself.
        """
        path = _with_suffix(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; StepSaliency.save writes it")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file ({error}); write it again") from error
        try:
            document = json.loads(header["stepsal"])
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} was not written by StepSaliency.save: it has no stepsal document") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(f"{path} does not hold a StepSaliency")
        if (version := document.pop("version", None)) != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this stepsal reads {FORMAT_VERSION}; "
                "use the matching stepsal, or compute the saliency again"
            )
        try:
            labels = {name: convert(document.pop(name)) for name, convert in _LABELS.items()}
            return cls(**labels, **tensors, **document)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is inconsistent: {error}") from error


_TENSORS = ("values", "step_ids", "head_values", "token_values")
_LABELS: dict[str, Callable[[Any], Any]] = {  # field -> how to read it back from JSON
    "layers": tuple,
    "n_layers": int,
    "model": str,
    "target": str,
    "reduce": str,
    "roles": tuple,
    "step_texts": tuple,
    "step_lengths": tuple,
    "token_texts": tuple,
}


def labels_of(trace: Trace) -> dict[str, Any]:
    """The labels that a StepSaliency has from its trace."""
    return {
        "roles": trace.roles,
        "step_texts": tuple(trace.step_text(i) for i in range(len(trace.steps))),
        "step_lengths": tuple(step.end - step.start for step in trace.steps),
        "step_ids": trace.step_ids,
        "token_texts": trace.token_texts,
    }


def average(saliencies: Sequence[StepSaliency]) -> StepSaliency:
    """Mean of the maps of traces with the same steps, e.g. of all wrong traces of one length.

    Returns:
        The maps of the first trace's layers and labels with mean `values` (and `head_values`, where all have them);
        step texts are dropped, and token labels are those of the first.

    Raises:
        ValueError: If there is none, or if they differ in model, layers, target, reduce or roles.
    """
    if not saliencies:
        raise ValueError("there is nothing to average: saliencies is empty")
    first = saliencies[0]
    for i, other in enumerate(saliencies):
        if other.metadata.get("row_normalised") != first.metadata.get("row_normalised"):
            raise ValueError(f"saliencies[{i}] and the first differ in row_normalised(): apply it to all or to none")
        for name in ("model", "n_layers", "layers", "target", "reduce", "roles"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"saliencies[{i}] has {name}={getattr(other, name)!r} but the first has {getattr(first, name)!r}; "
                    "average only maps with the same steps"
                )
    heads = [s.head_values for s in saliencies if s.head_values is not None]
    return replace(
        first,
        values=torch.stack([s.values for s in saliencies]).mean(0),
        head_values=torch.stack(heads).mean(0) if len(heads) == len(saliencies) else None,
        token_values=None,
        step_texts=("",) * first.n_steps,
        metadata={**first.metadata, "averaged": len(saliencies)},
    )


def _with_suffix(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def _to_json(value: object, name: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be written as JSON ({error}); use text, finite numbers, lists") from error


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(expected)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; pass {name}.cpu()")
