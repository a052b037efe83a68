"""Kinds of the columns of a file, which are decided once, by the file to train on."""

import shlex
from collections.abc import Collection, Hashable, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from experiments.support import parsing
from experiments.support.cli import InputError
from experiments.support.table_io import PLAIN, Format, listed, unique, warn

MAX_CATEGORIES = 100  # per text column; with more it is free text
EPOCH = pd.Timestamp("1970-01-01", tz="UTC")
DATE_FORMATS = ("ISO8601", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y")
GROUPS = r"\d{1,3}([ \x{A0}\x{202F}]\d{3})"  # no-break spaces, too
HINTS = (  # numbers as people write them, without a sign: pattern, how, remedy
    (r"[\d.,]+\s*%", "a percent sign", "remove the signs"),
    (r"[$€£¥]\s*[\d.,]+|[\d.,]+\s*[$€£¥]", "a currency sign", "remove the signs"),
    (r"\d{1,3}(,\d{3})+(\.\d+)?", "thousands separators", "--thousands=,"),
    (r"\d{1,3}('\d{3})+(\.\d+)?", "thousands separators", '--thousands="\'"'),
    (rf"{GROUPS}+(\.\d+)?", "thousands separators", "--thousands=' '"),
    (r"\d+,\d+", "a decimal comma", "--decimal=,"),
    (r"\d{1,3}(\.\d{3})*,\d+", "a decimal comma", "--decimal=, --thousands=."),
    (rf"{GROUPS}*,\d+", "a decimal comma", "--decimal=, --thousands=' '"),
)


class Column(NamedTuple):
    """A column of features.

    Attributes:
      name: Its name.
      kind: "number", "boolean", "date" or "category".
      form: For dates, their format; for categories, how they are compared.
    """

    name: str
    kind: str
    form: str = ""


class Schema(NamedTuple):
    """How to read features from any file, as from the one to train on.

    Attributes:
      columns: The columns of features.
      format: How text files are written.
      missing: A value of --missing.
    """

    columns: tuple[Column, ...]
    format: Format = PLAIN
    missing: str = "impute"


class Problem(NamedTuple):
    """Why a column cannot be used.

    Attributes:
      column: Its name.
      problem: What is wrong.
      rows: In how many rows.
      first_row: The first of them.
      remedy: What to do about it.
    """

    column: str
    problem: str
    rows: int
    first_row: int
    remedy: str


def infer(
    table: pd.DataFrame,
    fmt: Format,
    *,
    categorical: Collection[str] = (),
    numeric: Collection[str] = (),
) -> tuple[tuple[Column, ...], list[Problem]]:
    """Decides what each column holds.

    Args:
      table: The columns of features, as `table_io.read` returns them.
      fmt: How the file is written.
      categorical: Columns that hold categories, whatever they look like.
      numeric: Columns that hold numbers, whatever they look like.

    Returns:
      The columns that can be used, and why the others cannot.
    """
    columns, problems = [], []
    for name in table.columns:
        cells = parsing.cells(pd.Series(table[name]))
        if name in categorical and not pa.types.is_nested(cells.type):
            present = ~parsing.missing(cells, parsing.na_values("category", fmt))
            form = parsing.category_form(cells.filter(present), fmt)
            found = Column(name, "category", form)
        elif name in numeric and (parsing.is_text(cells) or parsing.is_number(cells)):
            found = Column(name, "number")
        else:
            found = _typed(name, cells, table.index)
            if found is None:
                from_parquet = isinstance(table[name].dtype, pd.ArrowDtype)
                found = _text(name, cells, table.index, fmt, from_parquet)
        (columns if isinstance(found, Column) else problems).append(found)
    return tuple(columns), problems


def _problem(
    name: str, what: str, wrong: np.ndarray, rows: pd.Index, *remedies: str
) -> Problem:
    first = int(rows[int(wrong.argmax())])
    remedy = " or ".join(remedies).replace("NAME", shlex.quote(name))
    return Problem(name, what, int(wrong.sum()), first, remedy)


def _typed(name: str, cells: pa.Array, rows: pd.Index) -> Column | Problem | None:
    """The kind of a column by its type in a Parquet file; None if it is text."""
    if parsing.is_text(cells):
        return None
    if parsing.is_boolean(cells):
        return Column(name, "boolean")
    if parsing.is_date(cells):
        return Column(name, "date", DATE_FORMATS[0])
    if not parsing.is_number(cells):
        what = f"of type {cells.type}; expected numbers, text or dates"
        return _problem(name, what, np.ones(len(cells), bool), rows, "--drop=NAME")
    infinite = np.isnan(parsing.numbers(cells, PLAIN)) & ~parsing.missing(cells, ())
    if infinite.any():
        remedies = ("--numeric=NAME (treated as missing)", "--drop=NAME")
        return _problem(name, "infinite", infinite, rows, *remedies)
    return Column(name, "number")


def _text(
    name: str, cells: pa.Array, rows: pd.Index, fmt: Format, from_parquet: bool
) -> Column | Problem:
    """The kind of a column of text; text in a Parquet file is never a number."""
    missing = parsing.missing(cells, parsing.na_values("number", fmt))
    numbers = np.isfinite(parsing.numbers(cells, fmt))
    codes = parsing.matches(cells, parsing.LEADING_ZERO).any()
    mostly_numbers = numbers.sum() > 0.5 * (~missing).sum() and not codes
    odd = ~missing & ~numbers
    drop, category = "--drop=NAME", "--categorical=NAME"

    # Numbers, booleans and dates, if all cells are.
    if missing.all():
        return Column(name, "number")
    if not from_parquet:
        if not odd.any():
            return Column(name, "number")
        if (np.isfinite(parsing.booleans(cells, fmt)) | missing).all():
            return Column(name, "boolean")
    present = cells.filter(pa.array(~missing))
    if parsing.matches(present, parsing.LOOKS_LIKE_A_DATE).all():
        is_read = {form: parsing.dates(present, form).notna() for form in DATE_FORMATS}
        dates = [form for form, found in is_read.items() if found.all()]
        if len(dates) == 1:
            return Column(name, "date", dates[0])
        if np.any(list(is_read.values()), axis=0).all():
            how = "whose day and month are ambiguous" if dates else "in several formats"
            what = f"dates {how}, such as {_first(cells, ~missing)}"
            remedies = ("writing YYYY-MM-DD", drop, category)
            return _problem(name, what, ~missing, rows, *remedies)

    # What was probably meant as numbers.
    if not from_parquet:
        for pattern, how, remedy in HINTS:
            if (parsing.matches(cells, rf"^[+-]?\s*({pattern})$") | ~odd).all():
                what = f"numbers with {how}, such as {_first(cells, odd)}"
                return _problem(name, what, odd, rows, remedy, category)
        if mostly_numbers:
            values = list(dict.fromkeys(cells.filter(pa.array(odd)).to_pylist()))
            texts = shlex.quote(",".join(values)) if len(values) <= 5 else "TEXT,..."
            what = f"not a number: {listed(values)}"
            remedies = (f"--na_values={texts}", category, drop)
            return _problem(name, what, odd, rows, *remedies)

    # Categories, unless there are too many.
    present = ~parsing.missing(cells, parsing.na_values("category", fmt))
    chosen = cells.filter(pa.array(present))
    form = parsing.category_form(chosen, fmt)
    keys = parsing.keys(chosen, form, fmt)
    count = len(set(keys))
    if count > MAX_CATEGORIES:
        what = f"text of {count} different values, such as {keys[0]!r}"
        remedies = (drop, category, *["--numeric=NAME"] * bool(mostly_numbers))
        return _problem(name, what, present, rows, *remedies)
    return Column(name, "category", form)


def _first(cells: pa.Array, chosen: np.ndarray) -> str:
    return repr(cells[int(chosen.argmax())].as_py())


def missing_values(
    table: pd.DataFrame, columns: Iterable[Column], fmt: Format
) -> list[Problem]:
    """The columns with missing values, for --missing=error."""
    problems = []
    for column in columns:
        cells = parsing.cells(pd.Series(table[column.name]))
        missing = parsing.missing(cells, parsing.na_values(column.kind, fmt))
        if missing.any():
            remedies = ("another --missing", "--drop=NAME")
            problems.append(
                _problem(column.name, "missing", missing, table.index, *remedies)
            )
    return problems


def features(source: str, table: pd.DataFrame, schema: Schema) -> pd.DataFrame:
    """Converts columns to float64 numbers, or to text if they hold categories.

    A date becomes its year, month, weekday (Monday is 0) and the days since 1970, in
    columns that are named "when year" and so on, or "when year.1" where the schema has
    a column "when year". Missing values are NaN. So is what cannot be converted, which
    is counted on stderr.

    Args:
      source: Name of the table in messages.
      table: A table with the columns of the schema, and maybe others.
      schema: What the columns hold.
    """
    found = {}
    names = {column.name for column in schema.columns}
    read_as_missing: dict[str, list[str]] = {}
    for column in schema.columns:
        cells = parsing.cells(pd.Series(table[column.name]))
        na_values = parsing.na_values(column.kind, schema.format)
        missing = parsing.missing(cells, na_values)
        if parsing.is_text(cells):
            for text in cells.filter(pa.array(missing)).unique().to_pylist():
                if text:
                    read_as_missing.setdefault(text, []).append(column.name)
        converted = {
            unique(f"{column.name} {part}", names) if part else column.name: (
                pd.Series(values, table.index, values.dtype).mask(missing)
            )
            for part, values in _convert(cells, column, schema.format).items()
        }
        wrong = next(iter(converted.values())).isna().to_numpy() & ~missing
        if wrong.any():
            warn(
                source,
                f"{column.name!r} is not a {column.kind} in {wrong.sum()} rows, such "
                f"as {_first(parsing.text(cells), wrong)} in row "
                f"{table.index[wrong.argmax()]}; treated as missing",
            )
        found |= converted
    if read_as_missing:
        where = dict.fromkeys(n for ns in read_as_missing.values() for n in ns)
        warn(
            source,
            f"{listed(read_as_missing)} treated as missing in {listed(where)}; "
            "--na_values changes this",
        )
    return pd.DataFrame(found, table.index)


def _convert(cells: pa.Array, column: Column, fmt: Format) -> dict[str, np.ndarray]:
    """The features that a column becomes, by part; what cannot be converted is NaN."""
    if column.kind == "number":
        return {"": parsing.numbers(cells, fmt)}
    if column.kind == "boolean":
        return {"": parsing.booleans(cells, fmt)}
    if column.kind == "category":
        return {"": parsing.keys(cells, column.form, fmt)}
    times = parsing.dates(cells, column.form)
    parts = {
        "year": times.dt.year,
        "month": times.dt.month,
        "weekday": times.dt.day_of_week,
        "days": (times - EPOCH) / pd.Timedelta(days=1),
    }
    return {part: np.asarray(values, np.float64) for part, values in parts.items()}


def labels(
    source: str, column: pd.Series, fmt: Format, positive: str | None = None
) -> tuple[np.ndarray, tuple[Hashable, Hashable]] | Problem:
    """Converts a column of two values to labels 0 and 1.

    Args:
      source: Name of the table in messages.
      column: The column, as `table_io.read` returns it.
      fmt: How the file is written.
      positive: The value that is label 1, as text; None is the larger one.

    Returns:
      Labels `[N]`, float64, NaN where they are missing, and the values that labels 0
      and 1 stand for; or why the column cannot be used.

    Raises:
      InputError: If `positive` is neither value.
    """
    name, cells = str(column.name), parsing.cells(column)
    known = parsing.is_text, parsing.is_number, parsing.is_boolean
    if not any(is_kind(cells) for is_kind in known):
        what = f"of type {cells.type}; expected labels of text, numbers or booleans"
        everything = np.ones(len(cells), bool)
        return _problem(name, what, everything, column.index, "another --target")
    missing = parsing.missing(cells, parsing.na_values("category", fmt))
    present = cells.filter(pa.array(~missing))
    form = parsing.category_form(present, fmt)
    keys = parsing.keys(cells, form, fmt)
    found = {key: _value(key, form) for key in dict.fromkeys(keys[~missing])}
    ordered = sorted(found, key=lambda key: found[key])
    if len(ordered) != 2:
        values = listed(found[key] for key in ordered)
        what = f"labels of {len(ordered)} values: {values}; expected two"
        return _problem(name, what, ~missing, column.index, "another --target")
    if positive is not None:
        (key,) = parsing.keys(pa.array([positive.strip()]), form, fmt)
        if key not in found:
            values = " and ".join(repr(found[key]) for key in ordered)
            raise InputError(
                f"{source}: target {name!r} has the values {values}; "
                f"--positive={positive} is neither"
            )
        ordered.sort(key=lambda other: other == key)
    classes = found[ordered[0]], found[ordered[1]]
    return known_labels(column, classes, fmt), classes


def known_labels(
    column: pd.Series, classes: tuple[Hashable, Hashable], fmt: Format
) -> np.ndarray:
    """Labels `[N]`, float64; NaN where a cell is neither of the two `classes`."""
    form = "text" if isinstance(classes[0], str) else "number"
    if set(classes) == {0, 1}:  # also if they are False and True
        form = "boolean"
    keys = parsing.keys(parsing.cells(column), form, fmt)
    names = parsing.keys(pa.array(list(map(str, classes))), form, PLAIN)
    return np.select([keys == name for name in names], [0.0, 1.0], np.nan)


def unknown_labels(
    column: pd.Series, classes: tuple[Hashable, Hashable], fmt: Format
) -> Problem | None:
    """The labels that are neither missing nor one of the two `classes`, if any."""
    cells = parsing.cells(column)
    missing = parsing.missing(cells, parsing.na_values("category", fmt))
    unknown = np.isnan(known_labels(column, classes, fmt)) & ~missing
    if not unknown.any():
        return None
    values = listed(parsing.text(cells).filter(pa.array(unknown)).unique().to_pylist())
    what = f"labels {values}; expected {' or '.join(map(repr, classes))}"
    return _problem(str(column.name), what, unknown, column.index, "correct them")


def _value(key: str, form: str) -> bool | int | float | str:
    """The value that a key of `parsing.keys` stands for."""
    if form == "boolean":
        return key == "True"
    if form == "number":
        return int(float(key)) if float(key).is_integer() else float(key)
    return key
