"""Refuse tables and options that a statistic cannot use, in the words of the caller."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np
import pandas as pd
from pandas.api import types

FEWEST_RESAMPLES = 99  # the smallest p-value of fewer is above 0.01


def require_columns(name: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Check that a table is one of pandas, and has all columns that will be read.

    Args:
        name: what the caller calls the table, for the error.
        frame: the table.
        columns: names of the columns.

    Raises:
        ValueError: it is something else, or a column is missing.

    Example:
        >>> import pandas as pd
        >>> stepsal.stats.checks.require_columns("data", pd.DataFrame({"a": [1]}), ["a", "b"])
        Traceback (most recent call last):
        ValueError: data has no column 'b'; it has a
    """
    if not isinstance(frame, pd.DataFrame):
        kind = f"{type(frame).__module__.partition('.')[0]}.{type(frame).__name__}"
        raise ValueError(f"{name} is a {kind}: give a pandas.DataFrame, for which most tables have a to_pandas()")
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"{name} has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}")


def plain_columns(name: str, frame: pd.DataFrame, numbers: Sequence[str], labels: Sequence[str] = ()) -> pd.DataFrame:
    """Return the columns that a statistic reads as numpy has them, whatever backend the table has.

    Args:
        name: what the caller calls the table, for the error.
        frame: the table, whose columns may be of pyarrow or nullable.
        numbers: columns to compute with, which become float64, with NaN where a value is missing.
        labels: columns that tell rows apart: numbers, booleans or texts.

    Raises:
        ValueError: a column to compute with holds something else than numbers, or a label is missing in one of pyarrow
            or in a nullable one; the message names the column and the first such value.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"trace": ["a", "b"], "decay": [0.5, None]}).convert_dtypes(dtype_backend="pyarrow")
        >>> stepsal.stats.checks.plain_columns("data", table, ["decay"], ["trace"])["decay"].dtype
        dtype('float64')
    """
    columns = {label: _plain_label(name, frame[label]) for label in labels}
    columns |= {column: _plain_numbers(name, frame[column]) for column in numbers}
    return pd.DataFrame(columns, index=frame.index)


def _plain_numbers(name: str, column: pd.Series) -> pd.Series:
    """Return a column as float64."""
    if not types.is_numeric_dtype(column.dtype):
        for row, value in column.items():
            if not isinstance(value, Real) and not pd.isna(value):
                raise ValueError(
                    f"{name} has {value!r} in column {column.name!r} (row {row!r}), which is {column.dtype}: make it "
                    "numbers, as by pandas.to_numeric"
                )
    return pd.Series(column.to_numpy(dtype=float, na_value=np.nan), column.index, name=column.name)


def _plain_label(name: str, column: pd.Series) -> pd.Series:
    """Return a column of labels in a type of numpy."""
    if not types.is_extension_array_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype):
        return column
    if column.isna().any():
        row = column.index[column.isna()][0]
        raise ValueError(
            f"{name} has no value in column {column.name!r} (row {row!r}), which tells rows apart: fill it"
        )
    kinds = ((types.is_bool_dtype, bool), (types.is_integer_dtype, np.int64), (types.is_float_dtype, float))
    kind = next((kind for is_kind, kind in kinds if is_kind(column.dtype)), object)
    return pd.Series(column.to_numpy(dtype=kind), column.index, dtype=kind, name=column.name)


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
