"""Name layers of a model in one way, for maps, metrics, plots, StepFlow and calibration.

    "shallow", "middle", "deep"         bottom quarter, middle half, top quarter
    "first-half", "second-half", "all"
    5, -1, [0, 3, 5]                    one index or several; negative ones count from the top
    (0.25, 0.5)                         a range of the depth, as fractions: from (inclusive) to (exclusive)
    ()                                  no layer

A quarter is `max(1, n_layers // 4)` layers, a half `max(1, n_layers // 2)`. In models of one or two layers, "middle"
is empty. A range of fractions always holds at least one layer. Two numbers are a range as soon as one of them is a
float: `(0, 1)` are the first two layers, `(0.0, 1.0)` are all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from numbers import Integral, Real
from typing import Literal, TypeGuard, get_args

Band = Literal["shallow", "middle", "deep", "first-half", "second-half", "all"]
"""A named part of a model's depth."""
Layers = Band | int | Sequence[int] | tuple[float, float]
"""A band, one index, several indices, a (from, to) range of fractions of the depth, or () for no layer."""
CheckedLayers = Band | tuple[int, ...] | tuple[float, float]
"""Layers in the form that is compared and stored: a band, indices, or two floats."""

BANDS: tuple[Band, ...] = get_args(Band)


def checked_layers(layers: Layers, name: str = "layers") -> CheckedLayers:
    """Check a choice of layers that is not yet tied to a model, and return it in its stored form.

    Args:
        layers: the choice, see the module docstring; a one-off iterator is read to its end.
        name: what the caller calls the choice, for the error.

    Raises:
        ValueError: the choice names no layers.

    Example:
        >>> from stepsal.layers import checked_layers
        >>> checked_layers([3, -1]), checked_layers((0.25, 0.5)), checked_layers("deep")
        ((3, -1), (0.25, 0.5), 'deep')
    """
    if isinstance(layers, str) and layers in BANDS:
        return layers
    if _is_index(layers):
        return (int(layers),)
    if isinstance(layers, Iterable) and not isinstance(layers, str | bytes):
        members = tuple(layers)
        if all(map(_is_index, members)):
            return tuple(map(int, members))
        if len(members) == 2 and all(map(_is_real, members)):
            first, stop = map(float, members)
            if not 0 <= first < stop <= 1:
                raise ValueError(f"{name}=({first:g}, {stop:g}) must be two fractions with 0 <= from < to <= 1")
            return first, stop
    raise ValueError(
        f"{name}={layers!r} names no layers; use {', '.join(map(repr, BANDS))}, an index, several indices, a range of "
        "fractions of the depth such as (0.25, 0.5), or () for none"
    )


def layer_indices(layers: Layers, n_layers: int, name: str = "layers") -> tuple[int, ...]:
    """Return the layers of a model that a choice names: distinct indices in 0..n_layers - 1, ascending.

    Args:
        layers: the choice, see the module docstring.
        n_layers: depth of the model.
        name: what the caller calls the choice, for the error.

    Raises:
        ValueError: the choice names no layers, or one that the model does not have; a model without layers.

    Example:
        >>> from stepsal.layers import layer_indices
        >>> layer_indices("shallow", 8), layer_indices(-1, 8), layer_indices((0.25, 0.5), 8)
        ((0, 1), (7,), (2, 3))
    """
    choice = checked_layers(layers, name)
    if n_layers < 1:
        raise ValueError(f"n_layers={n_layers} must be at least 1")
    if isinstance(choice, str):
        return tuple(_band(choice, n_layers))
    if _is_range(choice):
        first, stop = (int(round(fraction * n_layers, 6)) for fraction in choice)  # 0.29 * 100 is 28.999...
        first = min(first, n_layers - 1)  # a hair below 1 is rounded up
        return tuple(range(first, max(first + 1, stop)))
    if outside := [layer for layer in choice if not -n_layers <= layer < n_layers]:
        raise ValueError(
            f"{name}={list(choice)}: there is no layer {outside[0]} in a model of {n_layers} layers; use indices in "
            f"{-n_layers}..{n_layers - 1}"
        )
    return tuple(sorted({int(layer) % n_layers for layer in choice}))


def names_part_of_depth(layers: Layers) -> bool:
    """Tell whether a choice is a band or a range of fractions, which any model has, rather than single layers.

    Args:
        layers: the choice, see the module docstring.

    Raises:
        ValueError: the choice names no layers.

    Example:
        >>> from stepsal.layers import names_part_of_depth
        >>> names_part_of_depth("deep"), names_part_of_depth((0.25, 0.5)), names_part_of_depth(3)
        (True, True, False)
    """
    choice = checked_layers(layers)
    return isinstance(choice, str) or _is_range(choice)


def layer_ranges(indices: Iterable[int]) -> str:
    """Write ascending layer indices as ranges, for tables and titles.

    Args:
        indices: distinct layer indices, ascending; without any, the text is empty.

    Example:
        >>> stepsal.layers.layer_ranges([0, 1, 2, 5])
        '0-2,5'
    """
    runs = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        members = [layer for _, layer in run]
        runs.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ",".join(runs)


def _band(band: Band, n_layers: int) -> range:
    quarter, half = max(1, n_layers // 4), max(1, n_layers // 2)
    return {
        "shallow": range(quarter),
        "middle": range(quarter, n_layers - quarter),
        "deep": range(n_layers - quarter, n_layers),
        "first-half": range(half),
        "second-half": range(n_layers - half, n_layers),
        "all": range(n_layers),
    }[band]


def _is_index(x: object) -> TypeGuard[int]:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _is_real(x: object) -> TypeGuard[float]:
    return isinstance(x, Real) and not isinstance(x, bool)


def _is_range(choice: CheckedLayers) -> TypeGuard[tuple[float, float]]:
    return len(choice) == 2 and isinstance(choice[0], float)
