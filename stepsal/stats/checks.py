"""Refuse tables and options that a statistic cannot use, in the words of the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

FEWEST_RESAMPLES = 99  # the smallest p-value of fewer is above 0.01


def require_columns(name: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a table has all columns that will be read.

    Args:
        name: what the caller calls the table, for the error.
        frame: the table.
        columns: names of the columns.

    Raises:
        ValueError: a column is missing.

    Example:
        >>> import pandas as pd
        >>> stepsal.stats.checks.require_columns("data", pd.DataFrame({"a": [1]}), ["a", "b"])
        Traceback (most recent call last):
        ValueError: data has no column 'b'; it has a
    """
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"{name} has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}")


def refuse_repeats(name: str, frame: pd.DataFrame, keys: Sequence[str], remedy: str = "") -> None:
    """Check that no two rows of a table agree in all keys.

    Args:
        name: what the caller calls the table, for the error.
        frame: the table.
        keys: columns that tell the rows apart.
        remedy: what to do about it, for the error; "" asks for one row per value of the keys.

    Raises:
        ValueError: two rows agree in all keys.

    Example:
        >>> import pandas as pd
        >>> stepsal.stats.checks.refuse_repeats("data", pd.DataFrame({"layer": [3, 3]}), ["layer"])
        Traceback (most recent call last):
        ValueError: data has several rows for {'layer': 3}: give one row per layer
    """
    repeated = frame.duplicated(list(keys))
    if repeated.any():
        key = frame.loc[repeated, list(keys)].iloc[0].to_dict()
        raise ValueError(f"{name} has several rows for {key}: {remedy or 'give one row per ' + ' and '.join(keys)}")


def check_resampling(n_resamples: int, level: float) -> None:
    """Check the options of a permutation test or a bootstrap.

    Args:
        n_resamples: number of resamples, at least 99.
        level: coverage of the interval, in (0, 1).

    Raises:
        ValueError: one of them is out of range.

    Example:
        >>> stepsal.stats.checks.check_resampling(n_resamples=999, level=95)
        Traceback (most recent call last):
        ValueError: level=95 must lie strictly between 0 and 1, such as 0.95
    """
    if n_resamples < FEWEST_RESAMPLES:
        raise ValueError(f"n_resamples={n_resamples} is too few; use {FEWEST_RESAMPLES} or more")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie strictly between 0 and 1, such as 0.95")
