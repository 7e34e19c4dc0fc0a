"""Model arguments of Inspect: what they set, and what is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inspect_ai._util.config import parse_cli_args  # what the command line makes of -M
from inspect_ai.model import get_model

import stepsal
from stepsal import StepFlowConfig
from stepsal.harness.arguments import ModelArguments
from stepsal.trace import FORMATS, Format


@pytest.mark.slow
class TestStepFlow:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"tau": 0.1}, r"unknown model arguments \['tau'\]"),
            ({"tau_max": 3}, "tau_max=3"),
            ({"stepflow": "on"}, "'on'"),
            ({"stepflow": 0}, "stepflow=0 must be true or false"),
            ({"preset": "nowhere.json"}, "nowhere.json"),
            ({"dtype": "bf16"}, "dtype='bf16' is unknown"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"oeb_layers": [99]}, "no layer 99"),
            ({"oeb_layers": "top"}, "oeb_layers='top' names no layers"),
            ({"oeb_layers": None}, "oeb_layers=None names no layers"),
            ({"format": "thinking"}, "format='thinking' is unknown"),
            ({"min_chars": "few"}, "min_chars='few'"),
            ({"preset": "ours"}, "no preset 'ours'"),
            ({"chat": {"enable_thinking": False}}, "'enable_thinking' is not used by the chat template"),
            ({"chat.tokenize": True}, "'tokenize' is set by apply_chat_template itself"),
            ({"chat": "thinking"}, "chat='thinking' must map switches of the chat template, as -M chat="),
            ({"chat": ["a"]}, r"chat=\['a'\] must map"),
            ({"stop_in_thinking": "yes"}, "stop_in_thinking='yes' must be true or false"),
        ],
    )
    def test_bad_arguments_are_refused_at_once(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            get_model("stepsal/mini", **args)

    @pytest.mark.parametrize(
        ("arguments", "settings"),
        [
            ({}, None),
            ({"stepflow": True}, {}),
            ({"alpha": 0.1, "stepflow": False}, None),
            ({"smi_layers": "none"}, {"smi_layers": ()}),
            ({"oeb_layers": "()"}, {"oeb_layers": ()}),
            ({"oeb_layers": "0,1", "smi_layers": "middle"}, {"oeb_layers": (0, 1), "smi_layers": "middle"}),
            ({"oeb_layers": ["0", "1"], "tau_max": "1e-1"}, {"oeb_layers": (0, 1), "tau_max": 0.1}),
            ({"smi_layers": ["0.25", "0.5"], "window": "4"}, {"smi_layers": (0.25, 0.5), "window": 4}),
            ({"oeb_layers": 3, "window": "none"}, {"oeb_layers": (3,)}),
            ({"preset": "authors-code", "alpha": 0.2}, {"window": 4, "bridge": "prompt", "alpha": 0.2}),
        ],
        ids=str,
    )
    def test_settings_of_stepflow(self, arguments: dict[str, Any], settings: dict[str, Any] | None) -> None:
        expected = None if settings is None else StepFlowConfig(**settings)
        assert get_model("stepsal/mini", **arguments).api.stepflow == expected

    def test_settings_of_stepflow_from_a_file(self, tmp_path: Path) -> None:
        config = StepFlowConfig(tau_max=0.4, smi_layers=())
        path = str(config.save(tmp_path / "preset.json"))
        assert get_model("stepsal/mini", preset=path).api.stepflow == config
        assert get_model("stepsal/mini", preset=path, alpha=0.2).api.stepflow == config.but(alpha=0.2)

    def test_a_preset_brings_its_segmentation(self, tmp_path: Path) -> None:
        paragraphs = stepsal.Segmentation("think", split="paragraph")
        about = {"segmentation": paragraphs.to_dict()}
        path = str(stepsal.StepFlowConfig().save(tmp_path / "preset.json", calibration=about))
        assert get_model("stepsal/mini", preset=path).api.segmentation == paragraphs
        assert get_model("stepsal/mini", preset=path, split="line").api.segmentation.split == "line"


class TestCommandLine:
    """Values as the command line of Inspect parses them."""

    @pytest.mark.parametrize(
        ("arguments", "chat"),
        [
            (['chat={"enable_thinking": false}'], {"enable_thinking": False}),
            (["chat={enable_thinking: false}"], {"enable_thinking": False}),
            (["chat.enable_thinking=false"], {"enable_thinking": False}),
            (["chat.reasoning_effort=high", "chat.thinking=true"], {"reasoning_effort": "high", "thinking": True}),
            (['chat={"thinking": true, "effort": "low"}', "chat.effort=high"], {"thinking": True, "effort": "high"}),
            (["""chat='{"thinking": true}'"""], {"thinking": True}),  # quoted twice: as text
            ([], {}),
            (["chat={}"], {}),
        ],
    )
    def test_switches_of_the_chat_template(self, arguments: list[str], chat: dict[str, Any]) -> None:
        assert ModelArguments.read(parse_cli_args(arguments)).chat == chat

    @pytest.mark.parametrize(
        ("argument", "format"),
        [
            *((f"format={name}", name) for name in ("auto", *FORMATS)),
            ("format='Final answer:'", Format.with_marker("Final answer:")),
            ("format='####'", Format.with_marker("####")),
            ("format='So, finally:'", Format.with_marker("So, finally:")),  # parsed as a list
            ('format={"name": "own", "start": "summary", "markers": {}}', Format("own", "summary", {})),
        ],
    )
    def test_formats(self, argument: str, format: str | Format) -> None:
        assert ModelArguments.read(parse_cli_args([argument])).segmentation.format == format

    @pytest.mark.parametrize("name", ["thinking", "harmonie", "", "open-thoughts"])
    def test_a_misspelt_format_is_no_marker(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"format={name!r} is unknown"):
            ModelArguments.read({"format": name})

    def test_all_that_answers_depend_on_is_told(self) -> None:
        """Inspect's cache tells answers apart by it."""
        settings = (
            {},
            {"chat.thinking": True},
            {"chat.thinking": False},
            {"stop_in_thinking": True},
            {"format": "####"},
        )
        told = [str(ModelArguments.read(arguments).to_dict()) for arguments in settings]
        assert len(set(told)) == len(settings)
        assert ModelArguments.read({"chat": {"a": 1}}).to_dict() == ModelArguments.read({"chat.a": 1}).to_dict()
