"""One way to name layers: every form, what is refused, models of few layers, and properties over all depths."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepsal.layers import BANDS, checked_layers, layer_indices, layer_ranges, names_part_of_depth

DEPTHS = st.integers(1, 130)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("shallow", (0, 1)),
        ("middle", (2, 3, 4, 5)),
        ("deep", (6, 7)),
        ("first-half", (0, 1, 2, 3)),
        ("second-half", (4, 5, 6, 7)),
        ("all", tuple(range(8))),
        (5, (5,)),
        (-1, (7,)),
        (np.int64(3), (3,)),
        ([3, 0, 5], (0, 3, 5)),
        ((0, 1), (0, 1)),
        ([7, -1, 7], (7,)),
        (range(2, 4), (2, 3)),
        (np.array([1, 2]), (1, 2)),
        ({4, 2}, (2, 4)),
        ((layer for layer in (1, 6)), (1, 6)),
        ((0.25, 0.5), (2, 3)),
        ([0.25, 0.5], (2, 3)),
        ((0.0, 1.0), tuple(range(8))),
        ((0, 0.5), (0, 1, 2, 3)),
        ((0.5, 1), (4, 5, 6, 7)),
        ((np.float32(0.5), np.float64(1.0)), (4, 5, 6, 7)),
        ((0.6, 0.61), (4,)),
        ((0.99999999, 1.0), (7,)),
        ((), ()),
        ([], ()),
    ],
)
def test_every_form_in_a_model_of_eight_layers(layers: object, expected: tuple[int, ...]) -> None:
    indices = layer_indices(layers, 8)
    assert indices == expected
    assert all(type(index) is int for index in indices)


@pytest.mark.parametrize(
    ("n_layers", "shallow", "middle", "deep", "first_half", "second_half"),
    [
        (1, (0,), (), (0,), (0,), (0,)),
        (2, (0,), (), (1,), (0,), (1,)),
        (3, (0,), (1,), (2,), (0,), (2,)),
        (5, (0,), (1, 2, 3), (4,), (0, 1), (3, 4)),
    ],
)
def test_bands_of_models_with_few_layers(
    n_layers: int, shallow: tuple, middle: tuple, deep: tuple, first_half: tuple, second_half: tuple
) -> None:
    bands = ("shallow", "middle", "deep", "first-half", "second-half")
    assert tuple(layer_indices(band, n_layers) for band in bands) == (shallow, middle, deep, first_half, second_half)
    assert layer_indices("all", n_layers) == tuple(range(n_layers))


def test_bands_of_a_real_depth() -> None:
    assert layer_indices("shallow", 30) == tuple(range(7))
    assert layer_indices("middle", 30) == tuple(range(7, 23))
    assert layer_indices("deep", 30) == tuple(range(23, 30))


@pytest.mark.parametrize("fraction", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58])
def test_fractions_of_a_hundred_layers_are_not_off_by_rounding(fraction: float) -> None:
    assert layer_indices((fraction, 1.0), 100)[0] == round(100 * fraction)


@pytest.mark.parametrize(
    "layers",
    [None, "bottom-quarter", "top-quarter", "Deep", "", b"\x01", True, [True, False], 0.5, 2.0, [1, 2.5, 3], [0.5],
     [0.1, 0.2, 0.3], ["deep"], [None], object],
)  # fmt: skip
def test_what_names_no_layers_is_refused(layers: object) -> None:
    with pytest.raises(ValueError, match=r"oeb_layers=.* names no layers; use 'shallow', .* or \(\) for none"):
        checked_layers(layers, "oeb_layers")


@pytest.mark.parametrize("layers", [(0.5, 0.5), (0.5, 0.2), (-0.1, 0.5), (0.5, 1.1), (0.0, float("nan")), (1.0, 2)])
def test_ranges_that_are_none_are_refused(layers: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"layers=\(.*\) must be two fractions with 0 <= from < to <= 1"):
        checked_layers(layers)


@pytest.mark.parametrize(("layers", "outside"), [(8, 8), (-9, -9), ([0, 12], 12)])
def test_layers_that_the_model_does_not_have_are_refused(layers: object, outside: int) -> None:
    with pytest.raises(ValueError, match=rf"there is no layer {outside} in a model of 8 layers; use indices in -8..7"):
        layer_indices(layers, 8)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="n_layers=0 must be at least 1"):
        layer_indices("all", 0)


@given(DEPTHS)
def test_bands_cut_a_model_into_parts(n_layers: int) -> None:
    shallow, middle, deep = (layer_indices(band, n_layers) for band in ("shallow", "middle", "deep"))
    assert len(shallow) == len(deep) == max(1, n_layers // 4)
    if n_layers > 1:
        assert shallow + middle + deep == layer_indices("all", n_layers)
        assert not set(layer_indices("first-half", n_layers)) & set(layer_indices("second-half", n_layers))


@given(DEPTHS, st.floats(0, 1), st.floats(0, 1))
def test_ranges_hold_at_least_one_layer_of_the_model(n_layers: int, a: float, b: float) -> None:
    if a == b:
        return
    indices = layer_indices((min(a, b), max(a, b)), n_layers)
    assert indices
    assert 0 <= indices[0] <= indices[-1] < n_layers
    assert list(indices) == list(range(indices[0], indices[-1] + 1))


@given(st.integers(1, 20), st.lists(st.sampled_from([k / 20 for k in range(21)]), min_size=2, max_size=6, unique=True))
def test_ranges_that_adjoin_cut_a_model_into_parts(quarter: int, cuts: list[float]) -> None:
    n_layers = 20 * quarter
    cuts = sorted({0.0, *cuts, 1.0})
    parts = [layer_indices(pair, n_layers) for pair in pairwise(cuts)]
    assert sum(parts, ()) == layer_indices("all", n_layers)


@given(DEPTHS, st.data())
def test_the_stored_form_names_the_same_layers_also_through_json(n_layers: int, data: st.DataObject) -> None:
    index = st.integers(-n_layers, n_layers - 1)
    fractions = st.tuples(st.floats(0, 0.5), st.floats(0.6, 1))
    layers = data.draw(st.sampled_from(BANDS) | index | st.lists(index, max_size=5) | fractions)
    stored = checked_layers(layers)
    assert checked_layers(stored) == stored
    assert checked_layers(json.loads(json.dumps(stored))) == stored
    assert layer_indices(stored, n_layers) == layer_indices(layers, n_layers)
    hash(stored)


def test_bands_and_ranges_are_parts_of_the_depth() -> None:
    assert all(names_part_of_depth(layers) for layers in (*BANDS, (0.0, 0.5), [0, 0.5]))
    assert not any(names_part_of_depth(layers) for layers in (0, -1, (0, 1), [3], ()))


@given(st.sets(st.integers(0, 60)))
def test_ranges_in_words_are_read_back(layers: set[int]) -> None:
    words = layer_ranges(sorted(layers))
    indices: list[int] = []
    for run in filter(None, words.split(",")):
        first, _, last = run.partition("-")
        indices += range(int(first), int(last or first) + 1)
    assert indices == sorted(layers)


def test_ranges_in_words() -> None:
    assert [layer_ranges(layers) for layers in ((), (4,), (0, 1), (0, 2, 3, 4, 9))] == ["", "4", "0-1", "0,2-4,9"]
