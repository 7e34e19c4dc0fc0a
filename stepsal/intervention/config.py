"""The settings of StepFlow: its layers, its strengths, and the text to which attention is bridged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from stepsal.intervention.heads import EditedHeads, Heads
from stepsal.layers import Layers, checked_layers, layer_indices
from stepsal.storage import write_atomic

_SEGMENTATION = ("format", "split", "min_chars")  # settings of another value, which old files hold


class StepFlowChanges(TypedDict, total=False):
    """Settings to change in a `StepFlowConfig`, which documents them."""

    oeb_layers: Layers | Heads
    smi_layers: Layers | Heads
    tau_max: float
    alpha: float
    window: int | None
    bridge: Literal["question", "prompt"]
    into_summary: bool
    made_for: str | None


PUBLISHED: dict[str, StepFlowChanges] = {"paper": {}, "authors-code": {"window": 4, "bridge": "prompt"}}
"""Published settings by name, as changes to the defaults."""


@dataclass(frozen=True)
class StepFlowConfig:
    """Settings of StepFlow; the defaults are those of the paper (arXiv 2604.06695, Table 8).

    Attributes:
        oeb_layers: layers that OEB, the Odds-Equal Bridge, edits, or heads by layer, each with a `tau_max` of its own
            where it is given one (`stepsal.intervention.heads`); () switches it off.
        smi_layers: layers that SMI, Step Momentum Injection, edits, or heads by layer, each with an `alpha` of its own
            where it is given one; () switches it off.
        tau_max: largest share of attention that the bridge is given, in (0, 1).
        alpha: strength of the injection, >= 0; 0 switches it off.
        window: average only the last `window` tokens of the previous step (4 in the authors' code); None averages all
            of it.
        bridge: text that the thinking is bridged to. "question" is the user's words; "prompt" is everything before the
            thinking, system prompt and BOS included, as in the authors' code.
        into_summary: also inject at the first token of the summary.
        made_for: name of the model that the settings were chosen for, which other models then refuse; None is any.

    Raises:
        ValueError: a value is out of range; the message names it.

    Example:
        >>> config = stepsal.StepFlowConfig(oeb_layers="first-half", smi_layers=())
        >>> config.resolve(n_layers=8)
        ((0, 1, 2, 3), ())
        >>> stepsal.StepFlowConfig(oeb_layers={3: [0, 2], 5: {1: 0.3}}).oeb_layers
        {3: [0, 2], 5: {1: 0.3}}
    """

    oeb_layers: Layers | Heads = "shallow"
    smi_layers: Layers | Heads = "deep"
    tau_max: float = 0.15
    alpha: float = 0.06
    window: int | None = None
    bridge: Literal["question", "prompt"] = "question"
    into_summary: bool = False
    made_for: str | None = None

    def __post_init__(self) -> None:
        for name in ("oeb_layers", "smi_layers"):
            object.__setattr__(self, name, _checked(getattr(self, name), name))
        for name in ("tau_max", "alpha"):
            if not _is_number(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r} must be a number")
            if not isinstance(value, (int, float)):  # such as NumPy's, which JSON can't hold
                object.__setattr__(self, name, float(value))
        for tau in _strengths(self.oeb_layers, self.tau_max):
            if not 0 < tau < 1:
                raise ValueError(f"tau_max={tau} must lie in (0, 1); switch the bridge off with oeb_layers=()")
        for alpha in _strengths(self.smi_layers, self.alpha):
            if not (alpha >= 0 and math.isfinite(alpha)):
                raise ValueError(f"alpha={alpha} must be a number >= 0; 0 switches the injection off")
        if self.window is not None:
            if not isinstance(self.window, Integral) or isinstance(self.window, bool) or self.window < 1:
                raise ValueError(f"window={self.window!r} must be a number of tokens >= 1, or None for the whole step")
            object.__setattr__(self, "window", int(self.window))
        if self.bridge not in ("question", "prompt"):
            raise ValueError(f"bridge={self.bridge!r} is unknown; use 'question' or 'prompt'")
        if not isinstance(self.into_summary, bool):
            raise ValueError(f"into_summary={self.into_summary!r} must be True or False")
        if self.made_for is not None and not isinstance(self.made_for, str):
            raise ValueError(f"made_for={self.made_for!r} must be the name of a model, or None for any")

    @classmethod
    def preset(cls, name: str, **changes: Unpack[StepFlowChanges]) -> StepFlowConfig:
        """Return published settings by name, with `changes` made to them.

        Args:
            name: "paper" (its Table 8, the same for all models), or "authors-code" (the whole prompt as bridge, mean of
                the last four tokens of a step).
            **changes: settings to change, by the names of the attributes.

        Raises:
            ValueError: there is no preset of that name, or a changed value is out of range.

        Example:
            >>> stepsal.StepFlowConfig.preset("authors-code", alpha=0.1).window
            4
        """
        if name not in PUBLISHED:
            known = " or ".join(map(repr, PUBLISHED))
            raise ValueError(f"there is no preset {name!r}; use {known}, or StepFlowConfig.load for a file")
        return cls(**PUBLISHED[name]).but(**changes)

    def but(self, **changes: Unpack[StepFlowChanges]) -> StepFlowConfig:
        """Return a copy with some settings changed.

        Args:
            **changes: settings to change, by the names of the attributes.

        Raises:
            ValueError: a value is out of range.

        Example:
            >>> stepsal.StepFlowConfig().but(alpha=0.0).alpha
            0.0
        """
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings JSON-ready, for provenance; `from_dict` reads them.

        Example:
            >>> stepsal.StepFlowConfig(oeb_layers=[0, 1]).to_dict()["oeb_layers"]
            [0, 1]
        """
        settings = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        if self.made_for is None:  # so that settings for any model are told by the same words as ever
            del settings["made_for"]
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> StepFlowConfig:
        """Read settings that `to_dict` has written.

        Args:
            settings: attributes by name; a missing one has its default.

        Raises:
            ValueError: a setting is unknown, or a value is out of range; the message names it.

        Example:
            >>> stepsal.StepFlowConfig.from_dict({"tau_max": 0.3}) == stepsal.StepFlowConfig(tau_max=0.3)
            True
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(
                f"unknown settings of StepFlow: {', '.join(unknown)}; leave them out, and use {', '.join(known)}"
            )
        return cls(**settings)

    def save(self, path: str | Path, *, calibration: Mapping[str, Any] | None = None) -> Path:
        """Write the settings as JSON, to be read by `load` and by `-M preset=<path>` in Inspect.

        Args:
            path: the file to write, under the name that it is to have (no suffix is appended); its folder is made.
            calibration: origin of the settings, JSON-ready; it is kept in the file beside them.

        Returns:
            The path.

        Example:
            >>> import tempfile
            >>> path = stepsal.StepFlowConfig(alpha=0.2).save(tempfile.mkdtemp() + "/settings.json")
            >>> stepsal.StepFlowConfig.load(path).alpha
            0.2
        """
        path = Path(path)
        document: dict[str, Any] = {"stepflow": self.to_dict()}
        if calibration is not None:
            document["calibration"] = dict(calibration)
        write_atomic(path, (json.dumps(document, indent=2) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> StepFlowConfig:
        """Read settings that `save` has written; other contents of the file are ignored.

        Args:
            path: the file to read.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no settings, unknown ones, or values out of range.
        """
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))["stepflow"]
            names = set(settings)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} holds no settings of StepFlow: StepFlowConfig.save writes them as JSON under "stepflow"'
            ) from error
        if moved := [name for name in _SEGMENTATION if name in names]:
            raise ValueError(
                f"{path} names {', '.join(moved)}, which are no settings of StepFlow any more: take them out of the "
                "file, and pass segmentation=stepsal.Segmentation(...) beside the settings"
            )
        try:
            return cls.from_dict(settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def resolve(self, n_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the indices of the layers of OEB and of SMI in a model.

        Args:
            n_layers: depth of the model.

        Raises:
            ValueError: a layer is named that the model does not have.

        Example:
            >>> stepsal.StepFlowConfig().resolve(n_layers=8)
            ((0, 1), (6, 7))
        """
        oeb = layer_indices(_layers(self.oeb_layers), n_layers, "oeb_layers")
        return oeb, layer_indices(_layers(self.smi_layers), n_layers, "smi_layers")

    def strengths(self, n_layers: int, n_heads: int) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
        """Return tau_max of OEB and alpha of SMI for each head of the edited layers, 0 where the head is not edited.

        Args:
            n_layers: depth of the model.
            n_heads: number of its heads in a layer.

        Raises:
            ValueError: a layer or a head is named that the model does not have.

        Example:
            >>> config = stepsal.StepFlowConfig(oeb_layers={0: [1]}, smi_layers=[7])
            >>> config.strengths(n_layers=8, n_heads=2)
            ({0: [0.0, 0.15]}, {7: [0.06, 0.06]})
        """
        oeb, smi = self.resolve(n_layers)
        edits = (("oeb_layers", oeb, self.tau_max), ("smi_layers", smi, self.alpha))

        def of_heads(name: str, layers: tuple[int, ...], strength: float) -> dict[int, list[float]]:
            chosen = getattr(self, name)
            if isinstance(chosen, EditedHeads):
                return chosen.resolve(n_layers, n_heads, strength, name)
            return {layer: [strength] * n_heads for layer in layers}

        bridge, momentum = (of_heads(*edit) for edit in edits)
        return bridge, momentum


def _checked(layers: Layers | Heads, name: str) -> Any:
    """Return a choice of layers or heads in its stored form."""
    if isinstance(layers, EditedHeads):
        return layers
    if isinstance(layers, Mapping):
        return EditedHeads(layers, name) if layers else ()
    return checked_layers(layers, name)


def _layers(chosen: Layers | Heads) -> Layers:
    """Return the layers of a choice of layers or heads."""
    return tuple(chosen) if isinstance(chosen, Mapping) else chosen


def _strengths(chosen: Layers | Heads, default: float) -> list[float]:
    """Return all strengths that a choice comes with, that of the settings included."""
    return [default, *chosen.strengths(default)] if isinstance(chosen, EditedHeads) else [default]


def _plain(value: Any) -> Any:
    """Return a setting as JSON has it."""
    if isinstance(value, EditedHeads):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _is_number(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)
