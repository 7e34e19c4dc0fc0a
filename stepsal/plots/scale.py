"""The rule by which colours span values, for figures and the explorer alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike


def color_span(values: Float[ArrayLike, "*shape"], quantile_floor: float = 0.05) -> tuple[float, float]:
    """Return where the logarithmic colours of some values begin and end: a low quantile, and the largest value.

    Args:
        values: what is shown; values that are not positive and finite don't count.
        quantile_floor: quantile of the positive values at which the colours begin; smaller values take the first
            colour, so that a handful of vanishing entries does not use up the scale.

    Returns:
        The lowest and the highest value; a tenth of the highest is the lowest where all are equal.

    Raises:
        ValueError: `quantile_floor` is outside 0..1, or no value is positive and finite.

    Example:
        >>> stepsal.plots.scale.color_span([0.0, 0.1, 0.2, 0.4], quantile_floor=0.5)
        (0.2, 0.4)
    """
    if not 0 <= quantile_floor < 1:
        raise ValueError(f"quantile_floor={quantile_floor} is no quantile; use a number in 0..1, such as 0.05")
    array = np.asarray(values, dtype=float).ravel()
    array = array[np.isfinite(array) & (array > 0)]
    if array.size == 0:
        raise ValueError("no map has a positive value, so there is nothing to scale; pass norm= explicitly")
    top, floor = float(array.max()), float(np.quantile(array, quantile_floor))
    return (floor if floor < top else top / 10), top
