"""The settings of StepFlow: which layers, how much, and what is bridged to."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from stepsal.layers import Layers, checked_layers, layer_indices
from stepsal.storage import write_atomic

_PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "authors-code": {"window": 4, "bridge": "prompt"}}


@dataclass(frozen=True)
class StepFlowConfig:
    """Settings of StepFlow; the defaults are those of the paper (arXiv 2604.06695, Table 8).

    Attributes:
        oeb_layers: layers of the Odds-Equal Bridge; () switches it off.
        smi_layers: layers of Step Momentum Injection; () switches it off.
        tau_max: largest share of attention that the bridge is given, in (0, 1).
        alpha: strength of the injection, >= 0.
        window: average only the last `window` tokens of the previous step (4 in the authors' code); None: all of it.
        bridge: what is bridged to while thinking. "question": the user's words; "prompt": everything before the
            thinking, system prompt and BOS included, as the authors' code has it.
        into_summary: also inject at the first token of the summary.

    Raises:
        ValueError: a value out of range, naming it.
    """

    oeb_layers: Layers = "shallow"
    smi_layers: Layers = "deep"
    tau_max: float = 0.15
    alpha: float = 0.06
    window: int | None = None
    bridge: Literal["question", "prompt"] = "question"
    into_summary: bool = False

    def __post_init__(self) -> None:
        for name in ("oeb_layers", "smi_layers"):
            object.__setattr__(self, name, checked_layers(getattr(self, name), name))
        for name in ("tau_max", "alpha"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number")
        if not 0 < self.tau_max < 1:
            raise ValueError(f"tau_max={self.tau_max} must lie in (0, 1); switch the bridge off with oeb_layers=()")
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha={self.alpha} must be a number >= 0")
        if self.window is not None and (not _is_index(self.window) or self.window < 1):
            raise ValueError(f"window={self.window!r} must be a number of tokens >= 1, or None for the whole step")
        if self.bridge not in ("question", "prompt"):
            raise ValueError(f"bridge={self.bridge!r} is unknown; use 'question' or 'prompt'")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> StepFlowConfig:
        """Return published settings by name, with `changes` made to them.

        Args:
            name: "paper" (Table 8, the same for all of its models), or "authors-code" (the whole prompt as bridge, mean of
                the last four tokens of a step).
            changes: fields that are to differ.

        Raises:
            ValueError: an unknown name.

        Example:
            >>> StepFlowConfig.preset("authors-code", alpha=0.1).window
            4
        """
        if name not in _PRESETS:
            raise ValueError(f"there is no preset {name!r}; known are {', '.join(map(repr, _PRESETS))}")
        return cls(**{**_PRESETS[name], **changes})

    def but(self, **changes: Any) -> StepFlowConfig:
        """Return a copy with some settings changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings JSON-ready, for provenance."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def save(self, path: str | Path, **about: Any) -> Path:
        """Write the settings as JSON, to be read by `load` and by whatever takes a `preset`.

        Args:
            path: the file.
            about: what else to keep in the file, JSON-ready, such as where the settings come from.
        """
        path = Path(path)
        write_atomic(path, (json.dumps({"stepflow": self.to_dict(), **about}, indent=2) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> StepFlowConfig:
        """Read settings that `save` has written; what else is in the file is ignored.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no settings, or bad ones.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8"))["stepflow"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no settings of StepFlow ({error}); use StepFlowConfig.save") from error

    def resolve(self, n_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of the layers of OEB and of SMI in a model of `n_layers`.

        Raises:
            ValueError: a layer that the model does not have.
        """
        oeb, smi = self.oeb_layers, self.smi_layers
        return layer_indices(oeb, n_layers, "oeb_layers"), layer_indices(smi, n_layers, "smi_layers")


def _is_index(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)
