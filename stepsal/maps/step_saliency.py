"""The labelled result: step maps of every layer with roles and texts of steps and tokens, in and out of files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepsal.layers import Layers, layer_indices, names_part_of_depth
from stepsal.maps.pooling import Reduce, normalise_rows
from stepsal.tensor_files import load_tensors, save_tensors, to_json
from stepsal.trace.formats import Role

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from stepsal.trace import Trace

GradientTarget = Literal["token", "logit", "sequence"]
"""What is differentiated: the loss of each next token, its logit, or the sum of all losses."""
Target = Literal[GradientTarget, "attention"]
"""What is differentiated; "attention" is attention alone, without a gradient."""
KIND = "StepSaliency"
"""Name in the header of files that `StepSaliency.save` writes."""
FORMAT_VERSION = 2
"""Version of these files; 1 had `model` for `model_name`, "mean" for "density" and "sum" for "mass"."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StepSaliency:
    """Step-by-step saliency, or attention, of one trace: one lower-triangular map per layer, with its labels.

    `values[l, i, j]` says how much step i (query) draws on step j (key) in layer `layers[l]`: saliency per pair of
    tokens under reduce="density", per query token under reduce="mass". The unit is that of the loss, nats; attention
    (target="attention") and row-normalised maps have none.

    Attributes:
        values: the maps, float32 on the CPU, zero above the diagonal.
        layers: layer index of each map.
        n_layers: depth of the model, of which `layers` may be a part.
        model_name: the model's name.
        target: "token", "logit" or "sequence" for what was differentiated (see `stepsal.step_saliency`); "attention"
            where `values` is attention and nothing was differentiated.
        reduce: "density" or "mass", the way in which blocks of token pairs were reduced (see `stepsal.step_saliency`).
        roles: role of each step.
        step_texts: text of each step.
        step_lengths: tokens of each step.
        step_ids: step of each token; -1 (template) for a token in no step.
        token_texts: text of each token.
        head_values: the maps of every head, if they were kept; `values` is their mean.
        token_values: the token maps, if they were kept.
        token_positions: positions of the tokens whose maps were kept, ascending; None for all of them.
        metadata: origin of the maps (engine, dtype, settings of StepFlow), and "row_normalised": True after
            `row_normalised`; JSON values only.

    Raises:
        ValueError: shapes, labels and maps do not fit together; `values` has NaN, infinite or negative entries, or
            entries above the diagonal; `metadata` can't be written as JSON.

    Example:
        >>> model = stepsal.load("mini")
        >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", " Bob is Ann plus 1.</think>Bob.", model)
        >>> stepsal.step_saliency(model, trace)
        StepSaliency('mini', 8 of 8 layers, 3 steps: 1 question, 1 thinking, 1 summary; 31 tokens, target='token', \
reduce='density')
    """

    values: Float[Tensor, "layer query_step key_step"]
    layers: tuple[int, ...]
    n_layers: int
    model_name: str
    target: Target
    reduce: Reduce
    roles: tuple[Role, ...]
    step_texts: tuple[str, ...]
    step_lengths: tuple[int, ...]
    step_ids: Int[Tensor, " pos"]
    token_texts: tuple[str, ...]
    head_values: Float[Tensor, "layer head query_step key_step"] | None = None
    token_values: Float[Tensor, "layer kept_pos kept_pos"] | None = None
    token_positions: Int[Tensor, " kept_pos"] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_labels()
        self._check_tensors()
        to_json(self.metadata, "metadata")

    def _check_labels(self) -> None:
        n_maps, n_steps = len(self.layers), len(self.roles)
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

    def _check_tensors(self) -> None:
        n_maps, n_steps, n_pos = len(self.layers), len(self.roles), len(self.token_texts)
        _check_shape("values", self.values, (n_maps, n_steps, n_steps))
        _check_shape("step_ids", self.step_ids, (n_pos,))
        if self.head_values is not None:
            n_heads = self.head_values.shape[1] if self.head_values.ndim == 4 else 0
            _check_shape("head_values", self.head_values, (n_maps, n_heads, n_steps, n_steps))
        if self.token_values is not None:
            n_kept = len(self.kept_positions)
            _check_shape("token_values", self.token_values, (n_maps, n_kept, n_kept))
        if self.token_positions is not None:
            positions = self.token_positions.tolist()
            if sorted(set(positions)) != positions or not set(positions) <= set(range(n_pos)):
                raise ValueError(f"token_positions must ascend in 0..{n_pos - 1}, but are {positions[:9]} ..")
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

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.roles.count(role)} {role}" for role in get_args(Role) if role in self.roles)
        return (
            f"StepSaliency({self.model_name!r}, {len(self.layers)} of {self.n_layers} layers, {self.n_steps} steps: "
            f"{counts}; {len(self.token_texts)} tokens, target={self.target!r}, reduce={self.reduce!r})"
        )

    @property
    def n_steps(self) -> int:
        """The number of steps."""
        return len(self.roles)

    @property
    def kept_positions(self) -> Int[Tensor, " kept_pos"]:
        """The positions of the tokens whose maps were kept, in the order of `token_values`."""
        return torch.arange(len(self.token_texts)) if self.token_positions is None else self.token_positions

    # ------------------------------------------------------------------------------------------------ by layer

    def positions(self, layers: Layers) -> list[int]:
        """Return the indices along the first axis of `values` of some layers.

        Args:
            layers: the layers; see `stepsal.layers`. A band or a range of fractions stands for its computed layers;
                layers that are named by index must all have been computed.

        Raises:
            ValueError: a layer named by index was not computed, or `layers` holds no computed layer.
        """
        requested = self.computed(layers) if names_part_of_depth(layers) else layer_indices(layers, self.n_layers)
        if not requested:
            raise ValueError(f"layers={layers!r} names no computed layer of {self.n_layers}; computed: {self.layers}")
        if absent := [layer for layer in requested if layer not in self.layers]:
            raise ValueError(
                f"layer {absent[0]} was not computed; computed: {self.layers} of {self.n_layers}. "
                "Ask for it with step_saliency(..., layers=...)"
            )
        return [self.layers.index(layer) for layer in requested]

    def layer(self, index: int) -> Float[Tensor, "query_step key_step"]:
        """Return the map of one layer.

        Args:
            index: index of the layer in the model; -1 is the last.

        Raises:
            ValueError: the layer was not computed.
        """
        return self.values[self.positions(index)[0]]

    def mean_over(self, layers: Layers) -> Float[Tensor, "query_step key_step"]:
        """Return the mean map of several layers.

        Args:
            layers: the layers; see `positions`.

        Raises:
            ValueError: a layer was not computed, or there are none.
        """
        return self.values[self.positions(layers)].mean(0)

    def computed(self, layers: Layers) -> tuple[int, ...]:
        """Return the computed ones among some layers, by their index in the model.

        Args:
            layers: the layers; see `stepsal.layers`.
        """
        return tuple(layer for layer in layer_indices(layers, self.n_layers) if layer in self.layers)

    # ----------------------------------------------------------------------------------------- shares and tables

    def row_normalised(self) -> StepSaliency:
        """Return a copy in which each row is divided by its sum: the share of each key step; empty rows stay zero.

        Maps by head and by token are normalised by their own rows, token maps of some steps by what is kept of a row.
        `metadata["row_normalised"]` is True on the result,
        whose values have no unit.
        """
        return replace(
            self,
            values=normalise_rows(self.values),
            head_values=None if self.head_values is None else normalise_rows(self.head_values),
            token_values=None if self.token_values is None else normalise_rows(self.token_values),
            metadata=self.metadata | {"row_normalised": True},
        )

    def top(
        self,
        k: int = 10,
        *,
        layers: Layers = "all",
        own_step: bool = False,
        query_role: Role | None = None,
        key_role: Role | None = None,
    ) -> pd.DataFrame:
        """Return the largest links between steps in the mean map of some layers, the largest first.

        Args:
            k: largest number of links; pairs of steps without saliency are left out.
            layers: the layers to average over; see `positions`.
            own_step: include links of a step to itself.
            query_role: only links whose query step has this role.
            key_role: only links whose key step has this role.

        Returns:
            Columns: query_step, key_step, query_role, key_role, saliency, query_text, key_text. Equal links stand in
            the order of their steps.

        Raises:
            ValueError: `k` is below 1, a role is unknown, or layers were not computed.

        Example:
            >>> model = stepsal.load("mini")
            >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", " Bob is Ann plus 1.</think>Bob.", model)
            >>> stepsal.step_saliency(model, trace).top(2)[["query_step", "key_step"]].values.tolist()
            [[1, 0], [2, 1]]
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1 link")
        links = self.to_dataframe(layers).drop(columns="layer")
        links = links.groupby(["query_step", "key_step", "query_role", "key_role"], as_index=False).mean()
        links = links[links["saliency"] > 0]
        if not own_step:
            links = links[links["query_step"] != links["key_step"]]
        for column, role in (("query_role", query_role), ("key_role", key_role)):
            if role is not None:
                _check_choice(column, role, get_args(Role))
                links = links[links[column] == role]
        links = links.sort_values("saliency", ascending=False, kind="stable", ignore_index=True).head(k)
        texts = {f"{end}_text": [self.step_texts[i] for i in links[f"{end}_step"]] for end in ("query", "key")}
        return links.assign(**texts)

    def to_xarray(self) -> xr.DataArray:
        """Return `values` as a DataArray [layer, query_step, key_step] with coordinates of roles and texts."""
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
            attrs={
                "model_name": self.model_name,
                "n_layers": self.n_layers,
                "target": self.target,
                "reduce": self.reduce,
            },
        )

    def to_dataframe(self, layers: Layers = "all") -> pd.DataFrame:
        """Return one row per layer and pair of steps, of the lower triangle.

        Args:
            layers: the layers; see `positions`.

        Returns:
            Columns: layer, query_step, key_step, query_role, key_role, saliency.

        Raises:
            ValueError: a layer was not computed.
        """
        import numpy as np
        import pandas as pd

        query, key = np.tril_indices(self.n_steps)
        roles, positions = np.array(self.roles), self.positions(layers)
        n_maps = len(positions)
        return pd.DataFrame(
            {
                "layer": np.repeat([self.layers[position] for position in positions], len(query)),
                "query_step": np.tile(query, n_maps),
                "key_step": np.tile(key, n_maps),
                "query_role": np.tile(roles[query], n_maps),
                "key_role": np.tile(roles[key], n_maps),
                "saliency": self.values.numpy()[positions][:, query, key].ravel(),
            }
        )

    # --------------------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write the maps to one safetensors file, the labels as a JSON document in its header.

        The file is moved into place when it is complete: an interrupted save leaves the old file or none.

        Args:
            path: where to write; `.safetensors` is appended where it is missing, and the folder is made.

        Returns:
            The path of the file, with its suffix.

        Example:
            >>> import tempfile
            >>> model = stepsal.load("mini")
            >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", " Bob is Ann plus 1.</think>Bob.", model)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = stepsal.step_saliency(model, trace).save(f"{folder}/map")
            ...     stepsal.StepSaliency.load(path).n_steps
            3
        """
        document = {name: getattr(self, name) for name in _LABELS} | {"metadata": self.metadata}
        tensors = {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}
        return save_tensors(path, KIND, FORMAT_VERSION, tensors, document)

    @classmethod
    def load(cls, path: str | Path) -> StepSaliency:
        """Read maps that `save` has written; nothing is unpickled or executed.

        Args:
            path: the file; `.safetensors` is appended where it is missing.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is corrupt, foreign, of another format version, or inconsistent in itself.
        """
        tensors, document = load_tensors(path, KIND, FORMAT_VERSION)
        try:
            labels = {name: convert(document.pop(name)) for name, convert in _LABELS.items()}
            fields: dict[str, Any] = {**labels, **tensors, **document}
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is inconsistent: {error}") from error


_TENSORS = ("values", "step_ids", "head_values", "token_values", "token_positions")
_LABELS: dict[str, Callable[[Any], Any]] = {  # field -> how to read it back from JSON
    "layers": tuple,
    "n_layers": int,
    "model_name": str,
    "target": str,
    "reduce": str,
    "roles": tuple,
    "step_texts": tuple,
    "step_lengths": tuple,
    "token_texts": tuple,
}


def labels_of(trace: Trace) -> dict[str, Any]:
    """Return the labels that a trace gives to its `StepSaliency`, as keyword arguments.

    Args:
        trace: the trace.

    Example:
        >>> trace = stepsal.Trace.from_text("Ann is 1. Who is 2?", " Bob.</think>Bob.", stepsal.load("mini"))
        >>> stepsal.maps.labels_of(trace)["roles"]
        ('question', 'thinking', 'summary')
    """
    return {
        "roles": trace.roles,
        "step_texts": tuple(trace.step_text(i) for i in range(len(trace.steps))),
        "step_lengths": tuple(step.end - step.start for step in trace.steps),
        "step_ids": trace.step_ids,
        "token_texts": trace.token_texts,
    }


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(expected)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; pass {name}.cpu()")
