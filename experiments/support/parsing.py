"""Cells of tables: what is missing, and numbers, dates and categories.

Every function takes the cells of one column as an Arrow array: text, as it stands in a
text file, or values with the type that a Parquet file gives them. A cell is converted
without a look at the others, and means the same in both kinds of file.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from experiments.support.table_io import PLAIN, Format

pc: Any = pyarrow.compute  # whose functions are made when it is imported

MAX_EXACT = 2**53  # larger integers are not exact as float64
LEADING_ZERO = r"^[+-]?0\d"
LOOKS_LIKE_A_DATE = r"^(\d{4}-\d\d-\d\d|\d{4}/\d|\d{1,2}[./]\d{1,2}[./]\d{4}$)"
NA_VALUES = (  # pandas's list of what means a missing value
    *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"),
    *("1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)


def cells(column: pd.Series) -> pa.Array:
    """The cells of a column of the table that `table_io.read` returns."""
    array = pa.array(column)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    others = (pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if any(is_kind(array.type) for is_kind in others):
        array = array.cast(pa.string())
    return pc.utf8_trim_whitespace(array) if is_text(array) else array


def is_text(cells: pa.Array) -> bool:
    """Whether the cells are text."""
    return pa.types.is_string(cells.type)


def is_date(cells: pa.Array) -> bool:
    """Whether the cells have a type of dates."""
    return pa.types.is_date(cells.type) or pa.types.is_timestamp(cells.type)


def is_boolean(cells: pa.Array) -> bool:
    """Whether the cells have the type of booleans."""
    return pa.types.is_boolean(cells.type)


def is_number(cells: pa.Array) -> bool:
    """Whether the cells have a type of numbers."""
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(is_kind(cells.type) for is_kind in kinds)


def matches(cells: pa.Array, pattern: str) -> np.ndarray:
    """Which cells of text match a regular expression."""
    return _to_numpy(pc.fill_null(pc.match_substring_regex(cells, pattern), False))


def _to_numpy(array: pa.Array) -> np.ndarray:
    # A copy, because Arrow's own memory cannot be written to.
    return np.array(array.to_numpy(zero_copy_only=False))


def na_values(kind: str, fmt: Format) -> tuple[str, ...]:
    """Texts that mean a missing value in a column of this kind.

    In a column of numbers or dates, pandas's list always does. In one of categories,
    the user may say that they are categories.
    """
    if kind == "category":
        return NA_VALUES if fmt.na_values is None else fmt.na_values
    return (*NA_VALUES, *(fmt.na_values or ()))


def missing(cells: pa.Array, na_values: Iterable[str]) -> np.ndarray:
    """Which cells are missing: blank, null, NaN or one of these texts."""
    found = _to_numpy(pc.is_null(cells, nan_is_null=True))
    if is_text(cells):
        found |= _to_numpy(pc.is_in(cells, pa.array(["", *na_values], pa.string())))
    return found


def text(cells: pa.Array) -> pa.Array:
    """The cells as text, as pandas writes them to a CSV file."""
    if is_text(cells):
        return cells
    if is_boolean(cells):
        return pc.if_else(cells, "True", "False")
    if pa.types.is_floating(cells.type):  # Arrow writes 1.0 as 1
        words = pa.array(_to_numpy(cells).astype(str))
        return pc.if_else(pc.is_valid(cells), words, pa.scalar(None, pa.string()))
    if is_number(cells):
        return cells.cast(pa.string())
    if is_date(cells):
        midnight = r"( 00:00:00)?(\.0+)?(Z?)$"
        return pc.replace_substring_regex(cells.cast(pa.string()), midnight, r"\3")
    return pa.array([None if v is None else str(v) for v in cells.to_pylist()])


def numbers(cells: pa.Array, fmt: Format) -> np.ndarray:
    """The cells as float64, `[N]`; NaN where they are not finite numbers."""
    is_exact = pa.types.is_integer(cells.type) or pa.types.is_float64(cells.type)
    if is_number(cells) and not is_exact:
        return numbers(text(cells), PLAIN)  # as the same digits in a text file
    if is_text(cells):
        if fmt.thousands == " ":  # some of which do not break lines
            cells = pc.replace_substring_regex(cells, r"[\x{A0}\x{202F}]", " ")
        point = rf"\{fmt.decimal}"
        digits = r"\d+"
        if fmt.thousands:
            digits = rf"(\d{{1,3}}(\{fmt.thousands}\d{{3}})+|\d+)"
        number = rf"^[+-]?({digits}({point}\d*)?|{point}\d+)([eE][+-]?\d+)?$"
        is_match = pc.match_substring_regex(cells, number)
        cells = pc.if_else(is_match, cells, pa.scalar(None, pa.string()))
        if fmt.thousands:
            cells = pc.replace_substring(cells, fmt.thousands, "")
        if fmt.decimal != ".":
            cells = pc.replace_substring(cells, fmt.decimal, ".")
    elif not is_number(cells):
        return np.full(len(cells), np.nan)
    found = _to_numpy(pc.cast(cells, pa.float64(), safe=False))
    return np.where(np.isfinite(found), found, np.nan)


def booleans(cells: pa.Array, fmt: Format) -> np.ndarray:
    """0 for false, 1 for true (words in any case, or numbers), otherwise NaN."""
    found = numbers(cells, fmt)
    words = pc.utf8_lower(text(cells))
    found[matches(words, "^true$")] = 1
    found[matches(words, "^false$")] = 0
    return np.where((found == 0) | (found == 1), found, np.nan)


def dates(cells: pa.Array, form: str) -> pd.Series:
    """The cells as times in UTC, which those without a time zone are; or NaT.

    Args:
      cells: The cells.
      form: The format of text, as `pandas.to_datetime` takes it.
    """
    found = text(cells)
    form = "ISO8601" if is_date(cells) else form
    is_match = pc.match_substring_regex(found, LOOKS_LIKE_A_DATE)
    found = pc.if_else(is_match, found, pa.scalar(None, pa.string()))
    values = pd.Series(found.to_pylist(), dtype=object)
    return pd.to_datetime(values, format=form, utc=True, errors="coerce")


def keys(cells: pa.Array, form: str, fmt: Format) -> np.ndarray:
    """One text for each category, however it is written; `[N]`, objects.

    Args:
      cells: The cells.
      form: How they are compared, which `category_form` says.
      fmt: How numbers are written.
    """
    found = text(cells)
    if form == "number":
        values = pa.array(numbers(cells, fmt), from_pandas=True)
        found = pc.coalesce(values.cast(pa.string()), found)
    if form == "boolean":
        values = booleans(cells, fmt)
        found = pc.if_else(pa.array(values == 1), "True", found)
        found = pc.if_else(pa.array(values == 0), "False", found)
    return np.asarray(found.to_pylist(), object)


def category_form(cells: pa.Array, fmt: Format) -> str:
    """How these cells, of which none is missing, are compared.

    Returns:
      "number" if all are plain numbers, so that 1 is 1.0; "boolean" if all are true or
      false; otherwise "text", so that 01 is not 1.
    """
    if not len(cells):
        return "text"
    values = numbers(cells, fmt)
    plain = np.isfinite(values) & (np.abs(values) < MAX_EXACT)
    if (plain & ~matches(text(cells), LEADING_ZERO)).all():
        return "number"
    if matches(pc.utf8_lower(text(cells)), "^(true|false)$").all():
        return "boolean"
    return "text"
