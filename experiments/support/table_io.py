"""Reading and checking tables from the user's files."""

import functools
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.support.cli import InputError

MAX_CATEGORIES = 100  # per text column; with more it is free text


def read(path: Path) -> pd.DataFrame:
    """Reads a table with at least one row from a .csv or .parquet file.

    Raises:
      InputError: If the file cannot be read or is empty, or two columns share a name.
    """
    readers = {
        ".csv": functools.partial(pd.read_csv, index_col=False),
        ".parquet": pd.read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: expected a .csv or .parquet file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = readers[path.suffix.lower()](path)
        header = [str(name) for name in table.columns]
        if path.suffix.lower() == ".csv":  # pandas renames a second "a" to "a.1"
            header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].tolist()
    except pd.errors.ParserWarning:
        raise InputError(f"{path}: has rows with more fields than its header") from None
    except (OSError, ValueError) as error:  # pandas and pyarrow raise either
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: {reason}") from None
    repeated = [name for i, name in enumerate(header) if name in header[:i]]
    if repeated:
        raise InputError(f"{path}: two columns are named {repeated[0]!r}")
    if table.empty:
        raise InputError(f"{path}: has no rows")
    return table.set_axis([str(name) for name in table.columns], axis=1)


def need_columns(source: str, table: pd.DataFrame, names: Any) -> None:
    """Checks that a table has these columns.

    Raises:
      InputError: If one is missing.
    """
    for name in names:
        if name not in table.columns:
            known = ", ".join(table.columns[:20]) + (", ..." * (table.shape[1] > 20))
            raise InputError(f"{source}: no column {name!r}; its columns are {known}")


def features(
    source: str, table: pd.DataFrame, categories: list[str] | None = None
) -> pd.DataFrame:
    """Converts columns to float64 numbers, or to text if they hold categories.

    Args:
      source: Name of the table in messages.
      table: The columns.
      categories: Names of the columns that hold categories; None infers them.

    Raises:
      InputError: If a value is missing or not finite, or a column holds neither numbers
        nor categories.
    """
    found = {}
    for name in table.columns:
        column = pd.Series(table[name])
        if categories is None:
            looks_numeric = pd.api.types.is_numeric_dtype(column)
            convert = _numbers if looks_numeric else _new_categories
        else:
            convert = _categories if name in categories else _numbers
        found[name] = convert(f"{source}: column {name!r}", column)
    return pd.DataFrame(found)


def _numbers(where: str, column: pd.Series) -> pd.Series:
    try:
        values = column.to_numpy(np.float64, na_value=np.nan)
    except (ValueError, TypeError):
        raise InputError(f"{where} is {column.dtype}, expected numbers") from None
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise InputError(f"{where} has {values[row]} in {_row(row)}")
    return pd.Series(values, column.index)


def _categories(where: str, column: pd.Series) -> pd.Series:
    if column.isna().any():
        row = int(column.isna().to_numpy().argmax())
        raise InputError(f"{where} is missing in {_row(row)}")
    return pd.Series([str(value) for value in column], column.index, dtype=object)


def _new_categories(where: str, column: pd.Series) -> pd.Series:
    """The categories of a column; rejects mistyped numbers and free text."""
    categorical = isinstance(column.dtype, pd.CategoricalDtype)
    if not categorical and not all(isinstance(v, str) for v in column.dropna()):
        raise InputError(f"{where} is {column.dtype}, expected numbers or text")
    values = _categories(where, column)
    numbers = np.isfinite(np.asarray(pd.to_numeric(values, errors="coerce"), float))
    if numbers.mean() > 0.5 and not numbers.all():
        row = int(numbers.argmin())
        raise InputError(f"{where} is not numeric in {_row(row)}: {values.iloc[row]!r}")
    if values.nunique() > MAX_CATEGORIES:
        raise InputError(
            f"{where} is text of {values.nunique()} different values, such as "
            f"{values.iloc[0]!r}; expected at most {MAX_CATEGORIES} categories; "
            "drop or encode the column"
        )
    return values


def _row(index: int) -> str:
    return f"row {index + 1} below the header"


def labels(
    source: str, column: pd.Series, positive: str | None = None
) -> tuple[np.ndarray, tuple[Hashable, Hashable]]:
    """Converts a column of two values to labels 0 and 1.

    Args:
      source: Name of the table in messages.
      column: The column.
      positive: The value that is label 1, as text; None is the larger one.

    Returns:
      Labels `[N]`, float64, and the values that labels 0 and 1 stand for.

    Raises:
      InputError: If there are not exactly two values, or `positive` is neither.
    """
    name = f"{source}: target {column.name!r}"
    if column.isna().any():
        raise InputError(
            f"{name} is missing in {_row(int(column.isna().to_numpy().argmax()))}"
        )
    if not all(isinstance(v, (str, bool, int, float)) for v in column.tolist()):
        kind = type(column.iloc[0]).__name__
        raise InputError(f"{name} is {kind}, expected numbers, text or booleans")
    values = column.unique().tolist()  # Python's own, not NumPy's
    try:
        values.sort()
    except TypeError:
        values.sort(key=str)
    if len(values) != 2:
        shown = ", ".join(map(str, values[:5])) + ", ..." * (len(values) > 5)
        raise InputError(f"{name} has the values {shown}; expected two different ones")
    if positive is not None:
        matching = [value for value in values if _same(value, positive)]
        if not matching:
            shown = " and ".join(map(str, values))
            raise InputError(
                f"{name} has the values {shown}; --positive={positive} is neither"
            )
        values.sort(key=lambda value: value == matching[0])
    negative, positive_value = values
    return (column == positive_value).to_numpy(np.float64), (negative, positive_value)


def _same(value: Any, text: str) -> bool:
    try:
        return str(value) == text or float(value) == float(text)
    except ValueError:
        return False
