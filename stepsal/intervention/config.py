"""What StepFlow does, in which layers, and how it finds the steps while they are written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from stepsal.bridge import PRESETS, family
from stepsal.maps import band_layers
from stepsal.segment import FORMATS, Format, Segmenter, Split
from stepsal.storage import write_atomic

LayerBand = Literal["bottom-quarter", "top-quarter", "bottom-half", "top-half", "all"]
Layers = LayerBand | tuple[float, float] | Sequence[int] | None
"""A named band, a (from, to) range of fractions of the depth, indices (negative: from the top), or None: no layer."""

_BANDS = ("bottom-quarter", "top-quarter", "bottom-half", "top-half", "all")


@dataclass(frozen=True)
class StepFlowConfig:
    """Settings of StepFlow; the defaults are those of the paper (arXiv 2604.06695, Table 8).

    Attributes:
        oeb_layers: layers of the Odds-Equal Bridge; None switches it off.
        smi_layers: layers of Step Momentum Injection; None switches it off.
        tau_max: largest share of attention that the bridge is given, in (0, 1).
        alpha: strength of the injection, >= 0.
        window: average only the last `window` tokens of the previous step (4 in the authors' code); None: all of it.
        bridge: what is bridged to while thinking. "question": the user's words; "prompt": everything before the
            thinking, system prompt and BOS included, as the authors' code has it.
        into_summary: also inject at the first token of the summary.
        format: how the model marks its sections: a `Format`, a name in `segment.FORMATS`, or "auto", which goes by the
            model's preset and its chat template.
        split, min_chars: where steps end; see `stepsal.segment.Segmenter`.

    Raises:
        ValueError: a value out of range, naming it.
    """

    oeb_layers: Layers = "bottom-quarter"
    smi_layers: Layers = "top-quarter"
    tau_max: float = 0.15
    alpha: float = 0.06
    window: int | None = None
    bridge: Literal["question", "prompt"] = "question"
    into_summary: bool = False
    format: str | Format = "auto"
    split: Split = "sentence"
    min_chars: int = 15

    def __post_init__(self) -> None:
        for name in ("oeb_layers", "smi_layers"):
            object.__setattr__(self, name, _checked_layers(name, getattr(self, name)))
        for name in ("tau_max", "alpha"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number")
        if not 0 < self.tau_max < 1:
            raise ValueError(f"tau_max={self.tau_max} must lie in (0, 1); switch the bridge off with oeb_layers=None")
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha={self.alpha} must be a number >= 0")
        if self.window is not None and (not _is_index(self.window) or self.window < 1):
            raise ValueError(f"window={self.window!r} must be a number of tokens >= 1, or None for the whole step")
        if self.bridge not in ("question", "prompt"):
            raise ValueError(f"bridge={self.bridge!r} is unknown; use 'question' or 'prompt'")
        if isinstance(self.format, str) and self.format not in ("auto", *FORMATS):
            known = ", ".join(map(repr, ("auto", *FORMATS)))
            raise ValueError(f"format={self.format!r} is unknown; use {known}, or Format.with_marker({self.format!r})")
        Segmenter(FORMATS["plain"], split=self.split, min_chars=self.min_chars)  # complains about bad values

    @classmethod
    def preset(cls, name: str, **changes: Any) -> StepFlowConfig:
        """Settings by name, with `changes` made to them.

        Args:
            name: "paper"; "authors-code" (whole prompt as bridge, mean of the last four tokens); or a part of a
                model's name, such as "qwq-32b" or "gpt-oss": the paper's settings (Table 8 has one line for all of its
                models) with that family's format.

        Raises:
            ValueError: an unknown name.
        """
        if name == "paper":
            return cls(**changes)
        if name == "authors-code":
            return cls(**{"window": 4, "bridge": "prompt", **changes})
        known_family = family(name)
        if known_family is None:
            known = ", ".join(map(repr, ("paper", "authors-code", *PRESETS)))
            raise ValueError(f"there is no preset {name!r}; known are {known}")
        found = PRESETS[known_family]
        return cls(**{"format": found.format, "min_chars": found.min_chars, **changes})

    def but(self, **changes: Any) -> StepFlowConfig:
        """A copy with some settings changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, for provenance; a format, pattern or callable of your own goes by its name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.format, Format):
            values["format"] = self.format.name
        if not isinstance(self.split, str):
            values["split"] = getattr(self.split, "pattern", None) or getattr(self.split, "__name__", "callable")
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def save(self, path: str | Path, **about: Any) -> Path:
        """Write the settings as JSON, to be read by `load` and by whatever takes a `preset`.

        Args:
            about: what else to keep in the file, JSON-ready, such as where the settings come from.

        Raises:
            ValueError: a format or a split of your own, which a file can't hold.
        """
        if not isinstance(self.format, str) or not isinstance(self.split, str):
            raise ValueError(f"format={self.format!r} and split={self.split!r} can't be written to a file; use names")
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
            found = json.loads(Path(path).read_text(encoding="utf-8"))["stepflow"]
            return cls(**found)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no settings of StepFlow ({error}); StepFlowConfig.save writes such"
            ) from error

    def resolve(self, n_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of the layers of OEB and of SMI in a model of `n_layers`.

        Raises:
            ValueError: a layer that the model does not have.
        """
        return _indices("oeb_layers", self.oeb_layers, n_layers), _indices("smi_layers", self.smi_layers, n_layers)


def _checked_layers(name: str, layers: Layers) -> str | tuple[int | float, ...] | None:
    wrong = ValueError(
        f"{name}={layers!r} is no choice of layers; use {', '.join(map(repr, _BANDS))}, fractions of the depth such as "
        "(0.25, 0.5), layer indices, or None"
    )
    if layers is None or (isinstance(layers, str) and layers in _BANDS):
        return layers
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        raise wrong
    chosen = tuple(layers)
    if len(chosen) == 2 and any(isinstance(x, float) for x in chosen) and all(isinstance(x, Real) for x in chosen):
        if not 0 <= chosen[0] < chosen[1] <= 1:
            raise ValueError(f"{name}={chosen} must be two fractions with 0 <= from < to <= 1")
        return tuple(map(float, chosen))
    if not chosen or not all(map(_is_index, chosen)):
        raise wrong
    return tuple(map(int, chosen))


def _is_index(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _indices(name: str, layers: Layers, n_layers: int) -> tuple[int, ...]:
    if layers is None:
        return ()
    if isinstance(layers, str):
        sizes = {"quarter": len(band_layers("shallow", n_layers)), "half": max(1, n_layers // 2), "all": n_layers}
        part = sizes[layers.rpartition("-")[2]]
        return tuple(range(n_layers - part, n_layers) if layers.startswith("top") else range(part))
    if isinstance(layers[0], float):
        first, stop = (int(round(fraction * n_layers, 6)) for fraction in layers)  # 0.29 * 100 is 28.999...
        return tuple(range(first, max(first + 1, stop)))
    missing = [layer for layer in layers if not -n_layers <= layer < n_layers]
    if missing:
        raise ValueError(f"{name}={list(layers)}: the model has no layer {missing[0]}, only 0..{n_layers - 1}")
    return tuple(sorted({int(layer) % n_layers for layer in layers}))
