"""A figure is written with its data and provenance, reproducibly and all or nothing."""

import json

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from stepsal import plots
from stepsal.plots import save_figure
from stepsal.storage import package_versions

PROVENANCE = {"model_name": "mini", "seed": 0, "parameters": {"tau_max": 0.15}}


@pytest.fixture
def data():
    return pd.DataFrame({"layer": np.arange(4), "intensity": np.float32([1 / 3, 2e-9, 12345.678, 1.0])})


@pytest.fixture
def fig(data):
    figure, ax = plt.subplots(figsize=(3.3, 2))
    plots.layer_profile(data, "intensity", ax=ax)
    yield figure
    plt.close(figure)


def test_writes_four_files_with_values_and_provenance(fig, data, tmp_path):
    paths = save_figure(fig, "layer-profile_2", data, provenance=PROVENANCE, folder=tmp_path)
    assert {kind: str(path.relative_to(tmp_path)) for kind, path in paths.items()} == {
        "png": "layer-profile_2.png",
        "pdf": "layer-profile_2.pdf",
        "csv": "data/layer-profile_2.csv",
        "json": "data/layer-profile_2.json",
    }
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(paths.values())
    assert plt.imread(paths["png"]).shape[:2] == (400, 660)
    assert paths["pdf"].read_bytes().startswith(b"%PDF")
    np.testing.assert_allclose(pd.read_csv(paths["csv"])["intensity"], data["intensity"], rtol=5e-6)
    document = json.loads(paths["json"].read_text())
    assert document["provenance"] == PROVENANCE
    assert document["versions"]["matplotlib"] == mpl.__version__


def test_writing_again_gives_the_same_bytes(fig, data, tmp_path):
    first = save_figure(fig, "profile", data, provenance=PROVENANCE, folder=tmp_path / "a")
    second = save_figure(fig, "profile", data, provenance=PROVENANCE, folder=tmp_path / "b")
    for kind in first:
        assert first[kind].read_bytes() == second[kind].read_bytes(), kind
    for kind in ("png", "pdf"):
        content = first[kind].read_bytes()
        assert b"CreationDate" not in content
        assert b"ModDate" not in content
        assert b"Software" not in content
        assert mpl.__version__.encode() not in content


def test_a_figure_that_differs_in_rounding_alone_is_left_as_it_is(data, tmp_path):
    def save(values, seed=0):
        figure, ax = plt.subplots(figsize=(3.3, 2))
        plots.layer_profile(data.assign(intensity=values), "intensity", ax=ax)
        paths = save_figure(
            figure, "profile", data.assign(intensity=values), provenance=PROVENANCE | {"seed": seed}, folder=tmp_path
        )
        plt.close(figure)
        return {kind: path.read_bytes() for kind, path in paths.items()}

    values = np.array([1 / 3, 0.6, 0.21, 1.0])
    first = save(values)
    assert save(values * (1 + 2e-6)) == first
    assert save(values + 2e-6) == first
    assert save(values, seed=1)["json"] != first["json"]
    save(values)
    assert save(values * [1, 1, 1, 1.001])["csv"] != first["csv"]
    save(values)
    assert save(values[::-1])["png"] != first["png"]


def test_a_figure_drawn_otherwise_is_written_whatever_its_data(fig, data, tmp_path):
    first = save_figure(fig, "profile", data, provenance=PROVENANCE, folder=tmp_path)["png"].read_bytes()
    fig.axes[0].set_title("layers")
    paths = save_figure(fig, "profile", data, provenance=PROVENANCE, folder=tmp_path)
    assert paths["png"].read_bytes() != first
    paths["pdf"].unlink()
    paths = save_figure(fig, "profile", data, provenance=PROVENANCE, folder=tmp_path)
    assert paths["pdf"].exists()
    other = data.rename(columns={"intensity": "decay"}).assign(word="x")
    paths = save_figure(fig, "profile", other, provenance=PROVENANCE, folder=tmp_path)
    assert list(pd.read_csv(paths["csv"])) == ["layer", "decay", "word"]


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a.b", "a b", "-a", "a_"])
def test_a_name_is_a_slug(fig, data, tmp_path, name):
    with pytest.raises(ValueError, match="is no file name"):
        save_figure(fig, name, data, provenance=PROVENANCE, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_without_data_or_readable_provenance(fig, data, tmp_path):
    with pytest.raises(ValueError, match="has no data"):
        save_figure(fig, "profile", data.iloc[:0], provenance=PROVENANCE, folder=tmp_path)
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        save_figure(fig, "profile", data, provenance={"device": object()}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_when_rendering_fails(fig, data, tmp_path, monkeypatch):
    monkeypatch.setattr(fig, "savefig", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no renderer")))
    with pytest.raises(RuntimeError, match="no renderer"):
        save_figure(fig, "profile", data, provenance=PROVENANCE, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_versions_of_absent_packages_are_null() -> None:
    versions = package_versions(("matplotlib", "no-such-package"))
    assert versions["matplotlib"]
    assert versions["no-such-package"] is None
    assert versions["python"].startswith("3.")
