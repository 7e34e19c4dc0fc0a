"""Model arguments of Inspect (`-M name=value`, or keywords of `get_model`) as settings.

Values from the command line come as text, or as lists of texts, and are read here: "0.15" as a number, "0,1" as layers,
"none" and "()" as no layers. Switches of the chat template come one by one (`-M chat.enable_thinking=false`), or
together as JSON (`-M chat='{"enable_thinking": false}'`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from stepsal.intervention import StepFlowConfig
from stepsal.intervention.config import PUBLISHED
from stepsal.trace import FORMATS, Format, Segmentation

LOADING = ("device", "device_map", "dtype", "revision", "trust_remote_code")
STEPFLOW = tuple(field.name for field in fields(StepFlowConfig))
SEGMENTATION = tuple(field.name for field in fields(Segmentation))
KNOWN = ("batch_size", "chat", "preset", "stepflow", "stop_in_thinking", *LOADING, *STEPFLOW, *SEGMENTATION)
SWITCH = "chat."  # before the name of a switch of the chat template


@dataclass(frozen=True)
class ModelArguments:
    """Settings of a model in Inspect.

    Attributes:
        loading: keywords of `stepsal.load`, as they were given.
        batch_size: largest number of answers that are written together.
        stepflow: settings of StepFlow; None leaves the model as it is.
        segmentation: how sections and steps are found, by StepFlow, in messages and in traces.
        chat: switches of the chat template.
        stop_in_thinking: as in `stepsal.Decoding`, for the stop sequences of Inspect.
    """

    loading: Mapping[str, Any]
    batch_size: int
    stepflow: StepFlowConfig | None
    segmentation: Segmentation
    chat: Mapping[str, Any] = field(default_factory=dict)
    stop_in_thinking: bool = False

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> ModelArguments:
        """Read model arguments.

        Args:
            arguments: values by name; the names are those of `KNOWN`, and `chat.<name>` for a switch of the chat
                template.

        Raises:
            ValueError: an unknown name, or a value out of range, naming it.
            FileNotFoundError: a preset that is no file.

        Example:
            >>> from stepsal.harness.arguments import ModelArguments
            >>> arguments = ModelArguments.read({"oeb_layers": "0,1", "tau_max": "0.3", "split": "paragraph"})
            >>> arguments.stepflow.oeb_layers, arguments.segmentation.split
            ((0, 1), 'paragraph')
        """
        if unknown := sorted(name for name in arguments if name not in KNOWN and not name.startswith(SWITCH)):
            raise ValueError(f"unknown model arguments {unknown}; there are {', '.join(KNOWN)}")
        stop_in_thinking = arguments.get("stop_in_thinking", False)
        if not isinstance(stop_in_thinking, bool):
            raise ValueError(f"stop_in_thinking={stop_in_thinking!r} must be true or false")
        batch_size = arguments.get("batch_size", 16)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number >= 1")
        loading = {name: arguments[name] for name in LOADING if name in arguments}
        read_dtype(loading.get("dtype"))
        segmentation = preset_segmentation(arguments.get("preset"))
        segmentation |= {name: arguments[name] for name in SEGMENTATION if name in arguments}
        if "format" in segmentation:
            segmentation["format"] = read_format(segmentation["format"])
        if "min_chars" in segmentation:
            segmentation["min_chars"] = read_number(segmentation["min_chars"])
            if not isinstance(segmentation["min_chars"], int):
                raise ValueError(f"min_chars={segmentation['min_chars']!r} must be a whole number >= 0")
        return cls(
            loading, batch_size, read_stepflow(arguments), Segmentation.from_dict(segmentation), read_chat(arguments),
            stop_in_thinking,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return what answers depend on, JSON-ready but for objects among the loading options."""
        stepflow = None if self.stepflow is None else self.stepflow.to_dict()
        return {
            **self.loading,
            "stepflow": stepflow,
            "segmentation": self.segmentation.to_dict(),
            "chat": dict(self.chat),
            "stop_in_thinking": self.stop_in_thinking,
        }


def read_chat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Read the switches of the chat template among model arguments.

    Args:
        arguments: values by name: `chat`, a mapping or its JSON, and `chat.<name>`, which overrules it.

    Raises:
        ValueError: `chat` is no mapping.

    Example:
        >>> from stepsal.harness.arguments import read_chat
        >>> read_chat({"chat": '{"effort": "high"}', "chat.enable_thinking": False})
        {'effort': 'high', 'enable_thinking': False}
    """
    chat = arguments.get("chat") or {}
    if isinstance(chat, str):
        with suppress(ValueError):  # refused below
            chat = json.loads(chat)
    if not isinstance(chat, Mapping):
        raise ValueError(
            f"chat={chat!r} must map switches of the chat template, as -M chat='{{\"enable_thinking\": false}}' or "
            "-M chat.enable_thinking=false does"
        )
    single = {name.removeprefix(SWITCH): value for name, value in arguments.items() if name.startswith(SWITCH)}
    return {**chat, **single}


def read_format(value: Any) -> Any:
    """Read how a model marks its sections: the name of a format, or the text of a marker before the summary.

    A single word is a name, so that a misspelt one is no marker.

    Args:
        value: the name or the text; a list, where Inspect has divided a text at its commas; a format as JSON has it.

    Example:
        >>> from stepsal.harness.arguments import read_format
        >>> read_format("harmony"), read_format("Final answer:").all_markers
        ('harmony', ('Final answer:',))
    """
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        value = ",".join(value)
    is_name = not isinstance(value, str) or value in ("auto", *FORMATS) or re.fullmatch(r"[\w-]*", value)
    return value if is_name else Format.with_marker(value)


def read_stepflow(arguments: Mapping[str, Any]) -> StepFlowConfig | None:
    """Read the settings of StepFlow among model arguments.

    Args:
        arguments: values by name. StepFlow is switched on by `preset` (the name of published settings, or a file of
            `StepFlowConfig.save` or `Calibration.save_preset`), by `stepflow=true` (the paper's settings), or by any
            field of `StepFlowConfig`, which changes those settings; `stepflow=false` overrules them all.

    Raises:
        ValueError: a value out of range, or a preset that can't be read.
        FileNotFoundError: a preset that is no file.

    Example:
        >>> from stepsal.harness.arguments import read_stepflow
        >>> read_stepflow({"smi_layers": "none"}).smi_layers, read_stepflow({"device": "cpu"})
        ((), None)
    """
    changes: dict[str, Any] = {
        name: read_layers(arguments[name]) if name.endswith("layers") else read_number(arguments[name])
        for name in STEPFLOW
        if name in arguments
    }
    preset, switch = arguments.get("preset"), arguments.get("stepflow")
    if switch is not None and not isinstance(switch, bool):
        raise ValueError(f"stepflow={switch!r} must be true or false; published or saved settings go by preset=")
    if switch is False or (switch is None and preset is None and not changes):
        return None
    if preset is None:
        return StepFlowConfig(**changes)
    if str(preset) in PUBLISHED:
        return StepFlowConfig.preset(str(preset)).but(**changes)
    return StepFlowConfig.load(preset).but(**changes)


def preset_segmentation(preset: Any) -> dict[str, Any]:
    """Read how steps were found for the settings of a file; empty where the file doesn't say, or none is named.

    Args:
        preset: the value of `preset`.

    Raises:
        ValueError: the file can't be read.
        FileNotFoundError: there is no such file.

    Example:
        >>> from stepsal.harness.arguments import preset_segmentation
        >>> preset_segmentation("paper")
        {}
    """
    if preset is None or str(preset) in PUBLISHED:
        return {}
    if not Path(preset).is_file():
        names = " or ".join(map(repr, PUBLISHED))
        raise FileNotFoundError(f"there is no preset {str(preset)!r}: name a file of settings, or {names}")
    try:
        document = json.loads(Path(preset).read_text(encoding="utf-8"))
        return dict((document.get("calibration") or {}).get("segmentation") or {})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"preset={preset!r} holds no settings ({error}); use StepFlowConfig.save") from error


def read_layers(value: Any) -> Any:
    """Read a choice of layers from the command line.

    Args:
        value: a band such as "shallow"; indices or fractions, as a list or with commas between them; heads by layer, as
            a mapping or its JSON; "none" or "()" for no layers. What can't be read is returned as it is;
            `StepFlowConfig` refuses it then.

    Example:
        >>> from stepsal.harness.arguments import read_layers
        >>> read_layers("deep"), read_layers(["0", "-1"]), read_layers("0.25,0.5"), read_layers("none")
        ('deep', (0, -1), (0.25, 0.5), ())
        >>> read_layers('{"3": [0, 2]}')
        {'3': [0, 2]}
    """
    if isinstance(value, str) and value.strip().startswith("{"):
        with suppress(ValueError):
            return json.loads(value)
    if isinstance(value, str):
        text = value.strip().strip("()[]")
        if text.lower() in ("", "none"):
            return ()
        members = [read_number(part) for part in text.split(",") if part.strip()]
        return text if any(isinstance(member, str) for member in members) else tuple(members)
    if isinstance(value, list | tuple):
        return tuple(read_number(member) for member in value)
    return value


def read_number(value: Any) -> Any:
    """Read a number from the command line, and "none" as None; return what is neither as it is.

    Args:
        value: the value, often as text.

    Example:
        >>> from stepsal.harness.arguments import read_number
        >>> read_number("4"), read_number("1e-1"), read_number("none"), read_number("prompt")
        (4, 0.1, None, 'prompt')
    """
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def read_dtype(value: Any) -> Any:
    """Read a dtype by its name; return what is no text as it is.

    Args:
        value: the name, such as "bfloat16", or a dtype.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> from stepsal.harness.arguments import read_dtype
        >>> read_dtype("bfloat16")
        torch.bfloat16
    """
    if not isinstance(value, str):
        return value
    dtype = getattr(torch, value, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={value!r} is unknown; use float32, bfloat16 or float16")
    return dtype
