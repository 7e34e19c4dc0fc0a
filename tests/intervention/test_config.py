"""Settings of StepFlow: what they may be, and in and out of files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stepsal import StepFlowConfig


def test_the_defaults_are_the_papers() -> None:
    config = StepFlowConfig()
    assert (config.tau_max, config.alpha, config.window) == (0.15, 0.06, None)
    assert config.resolve(28) == (tuple(range(7)), tuple(range(21, 28)))
    assert config == StepFlowConfig.preset("paper")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("shallow", (0, 1)),
        ("middle", (2, 3, 4, 5)),
        ("deep", (6, 7)),
        ("first-half", (0, 1, 2, 3)),
        ("second-half", (4, 5, 6, 7)),
        ("all", tuple(range(8))),
        (3, (3,)),
        ((0.25, 0.5), (2, 3)),
        ((0.0, 0.01), (0,)),
        ((0, 0.5), (0, 1, 2, 3)),
        ((0.5, 1), (4, 5, 6, 7)),
        ((0, 1), (0, 1)),
        (np.arange(2), (0, 1)),
        ([-1, 0, 3], (0, 3, 7)),
        (range(2), (0, 1)),
        ((), ()),
        ([], ()),
    ],
)
def test_layers(layers: object, expected: tuple[int, ...]) -> None:
    assert StepFlowConfig(oeb_layers=layers).resolve(8)[0] == expected
    assert StepFlowConfig(smi_layers=layers).resolve(8)[1] == expected


def test_settings_for_any_model_are_written_as_ever() -> None:
    """Answers in evaluations are kept under these words."""
    assert list(StepFlowConfig().to_dict()) == [
        "oeb_layers", "smi_layers", "tau_max", "alpha", "window", "bridge", "into_summary"
    ]  # fmt: skip
    assert StepFlowConfig(made_for="mine").to_dict()["made_for"] == "mine"
    assert StepFlowConfig.from_dict({"made_for": "mine"}).made_for == "mine"


class TestHeads:
    """Heads by layer, in place of layers."""

    CONFIG = StepFlowConfig(oeb_layers={3: [2, 0], -1: {1: 0.3}}, smi_layers={"0": [1]}, tau_max=0.2)

    def test_they_name_layers_and_strengths(self) -> None:
        assert self.CONFIG.resolve(8) == ((3, 7), (0,))
        oeb, smi = self.CONFIG.strengths(n_layers=8, n_heads=4)
        assert oeb == {3: [0.2, 0.0, 0.2, 0.0], 7: [0.0, 0.3, 0.0, 0.0]}
        assert smi == {0: [0.0, 0.06, 0.0, 0.0]}

    def test_layers_are_all_of_their_heads(self) -> None:
        assert StepFlowConfig().strengths(4, 2) == ({0: [0.15, 0.15]}, {3: [0.06, 0.06]})

    def test_they_are_values(self, tmp_path: Path) -> None:
        again = StepFlowConfig.from_dict(json.loads(json.dumps(self.CONFIG.to_dict())))
        assert again == self.CONFIG == StepFlowConfig.load(self.CONFIG.save(tmp_path / "heads.json"))
        assert hash(again) == hash(self.CONFIG)
        assert again != self.CONFIG.but(oeb_layers={3: [0]})
        assert self.CONFIG.oeb_layers == StepFlowConfig(oeb_layers={-1: {1: 0.3}, 3: (0, 2)}).oeb_layers
        assert StepFlowConfig(oeb_layers={}) == StepFlowConfig(oeb_layers=())

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ({3: []}, r"oeb_layers\[3\] has no head"),
            ({"deep": [1]}, "oeb_layers names layer 'deep', which is no index"),
            ({3: [0.5]}, r"oeb_layers\[3\] names head 0.5, which is no index"),
            ({3: 1}, r"oeb_layers\[3\]=1 must be indices of heads"),
            ({3: "12"}, r"oeb_layers\[3\]='12' must be indices of heads"),
            ({3: {1: "0.2"}}, r"oeb_layers\[3\]\[1\]='0.2' must be a number"),
            ({3: {1: 1.5}}, "tau_max=1.5 must lie in"),
        ],
    )
    def test_what_is_no_head(self, layers: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            StepFlowConfig(oeb_layers=layers)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ({8: [0]}, "there is no layer 8 in a model of 8 layers"),
            ({3: [4]}, r"oeb_layers\[3\] names head 4, but layers of the model have 4 heads: use 0\.\.3"),
            ({3: [-1]}, "names head -1"),
            ({7: [0], -1: [1]}, "names layer 7 twice"),
        ],
    )
    def test_what_the_model_lacks(self, layers: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            StepFlowConfig(oeb_layers=layers).strengths(8, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau_max": 0}, r"tau_max=0 must lie in \(0, 1\)"),
        ({"tau_max": 1.0}, "tau_max=1.0"),
        ({"tau_max": True}, "tau_max=True must be a number"),
        ({"alpha": -0.1}, "alpha=-0.1 must be a number >= 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"tau_max": "0.1"}, "tau_max='0.1' must be a number"),
        ({"window": True}, "window=True"),
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"bridge": "all"}, "bridge='all'.*'question' or 'prompt'"),
        ({"into_summary": None}, "into_summary=None must be True or False"),
        ({"oeb_layers": "bottom-quarter"}, "oeb_layers='bottom-quarter' names no layers.*'shallow'"),
        ({"oeb_layers": None}, r"oeb_layers=None names no layers.*\(\) for none"),
        ({"smi_layers": (0.5, 0.25)}, "smi_layers=.*0 <= from < to <= 1"),
        ({"oeb_layers": [0.5]}, "oeb_layers"),
    ],
)
def test_bad_values(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepFlowConfig(**values)


def test_fractions_are_not_cut_short_by_rounding() -> None:
    assert 0.29 * 100 < 29
    assert StepFlowConfig(oeb_layers=(0.29, 0.57)).resolve(100)[0] == tuple(range(29, 57))


def test_layers_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"smi_layers=\[3, 8\]: there is no layer 8 in a model of 8 layers"):
        StepFlowConfig(smi_layers=[3, 8]).resolve(8)


def test_presets() -> None:
    authors = StepFlowConfig.preset("authors-code", alpha=0.1)
    assert (authors.window, authors.bridge, authors.alpha) == (4, "prompt", 0.1)
    assert StepFlowConfig.preset("authors-code", window=None).window is None
    with pytest.raises(ValueError, match="no preset 'gpt-2'; use 'paper' or 'authors-code'"):
        StepFlowConfig.preset("gpt-2")


def test_dictionaries() -> None:
    assert StepFlowConfig.from_dict({}) == StepFlowConfig()
    with pytest.raises(ValueError, match="unknown settings of StepFlow: alpah, tau; leave them out, and use oeb"):
        StepFlowConfig.from_dict({"tau": 0.1, "alpah": 0.1, "window": 4})
    with pytest.raises(ValueError, match="alpha=-1 must be"):
        StepFlowConfig.from_dict({"alpha": -1})


class TestFiles:
    @pytest.mark.parametrize(
        "config",
        [
            StepFlowConfig(),
            StepFlowConfig(oeb_layers=(), smi_layers=()),
            StepFlowConfig(oeb_layers=(0.25, 0.5), smi_layers=[0, -1]),
            StepFlowConfig(oeb_layers=(0, 1), smi_layers=(0.0, 1.0)),
            StepFlowConfig.preset("authors-code", into_summary=True),
            StepFlowConfig(tau_max=np.float32(0.1), alpha=1, window=np.int64(3), oeb_layers=np.arange(2)),
        ],
    )
    def test_there_and_back(self, config: StepFlowConfig, tmp_path: Path) -> None:
        path = config.save(tmp_path / "folder" / "settings.json")
        assert StepFlowConfig.load(path) == config
        assert StepFlowConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_what_the_settings_rest_on_is_kept(self, tmp_path: Path) -> None:
        path = StepFlowConfig().save(tmp_path / "settings.json", calibration={"task": "chain"})
        assert json.loads(path.read_text())["calibration"] == {"task": "chain"}
        assert StepFlowConfig.load(path) == StepFlowConfig()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{}", 'holds no settings of StepFlow: .*"stepflow"'),
            ("[1]", "holds no settings of StepFlow"),
            ("no JSON", "holds no settings of StepFlow"),
            ('{"stepflow": 3}', "holds no settings of StepFlow"),
            ('{"stepflow": {"alpah": 0.1}}', "unknown settings of StepFlow: alpah; leave them out"),
            ('{"stepflow": {"alpha": -1}}', "alpha=-1 must be"),
            ('{"stepflow": {"oeb_layers": "bottom-quarter"}}', "oeb_layers='bottom-quarter' names no layers"),
            (
                '{"stepflow": {"alpha": 0.1, "format": "think", "split": "line"}}',
                r"names format, split, which are no settings of StepFlow any more.*segmentation=stepsal.Segmentation",
            ),
        ],
    )
    def test_what_is_no_file_of_settings(self, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=rf"settings\.json.*{message}"):
            StepFlowConfig.load(tmp_path / "settings.json")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            StepFlowConfig.load(tmp_path / "settings.json")
