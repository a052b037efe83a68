"""Reading tables from the user's files, and what is said about their rows."""

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from experiments.support.cli import InputError

TEXT = (".csv", ".tsv", ".txt")
PARQUET = (".parquet", ".pq")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
SEPARATORS = (",", ";", "\t", "|")
FIRST_LINES = 100  # in which the file must begin


class Format(NamedTuple):
    r"""How a text file is written.

    Attributes:
      separator: What separates cells, or `\s+` for any blanks; None is what separates
        those of the first line, or else a comma.
      encoding: Name of the encoding.
      header: Whether the first line names the columns.
      decimal: The decimal point.
      thousands: What separates groups of three digits; None is nothing.
      na_values: Cells that mean a missing value, besides blank ones; None is pandas's
        list.
    """

    separator: str | None = None
    encoding: str = "utf-8"
    header: bool = True
    decimal: str = "."
    thousands: str | None = None
    na_values: tuple[str, ...] | None = None


PLAIN = Format()


def read(path: Path, fmt: Format = PLAIN) -> pd.DataFrame:
    """Reads a table with at least one row.

    A cell of a text file is text without surrounding blanks, whatever else is in the
    file. A column of a Parquet file keeps its type, as an Arrow array.

    Returns:
      The table, without blank rows. Its index numbers the rows of the file, from 1,
      which is the first row below the header.

    Raises:
      InputError: If the file cannot be read or is empty, or two columns share a name.
    """
    kind = _without_compression(path).suffix.lower()
    if kind not in TEXT + PARQUET:
        raise InputError(
            f"{path}: expected a file {', '.join(TEXT)} (or one of these with "
            f"{', '.join(COMPRESSED)}), .parquet or .pq"
        )
    try:
        table = _read_parquet(path) if kind in PARQUET else _read_text(path, kind, fmt)
    except UnicodeError:
        raise InputError(
            f"{path}: is not {fmt.encoding} text; give its --encoding, such as cp1252 "
            "(Western Windows), latin-1 or utf-16"
        ) from None
    except LookupError:
        raise InputError(f"--encoding={fmt.encoding}: is not known") from None
    except ImportError as error:  # of zstandard
        raise InputError(f"{path}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # each kind of damaged file raises its own
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: {reason}") from None
    names = list(table.columns)
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    if repeated:
        raise InputError(f"{path}: two columns are named {repeated[0]!r}")
    if table.empty:
        raise InputError(f"{path}: has no rows")
    return table


def stem(path: str) -> str:
    """The name of a file without its endings."""
    return _without_compression(Path(path)).stem


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def _read_parquet(path: Path) -> pd.DataFrame:
    table = pd.read_parquet(path, dtype_backend="pyarrow")
    table.columns = [str(name).strip() for name in table.columns]
    return table.set_axis(range(1, len(table) + 1))


def _read_text(path: Path, kind: str, fmt: Format) -> pd.DataFrame:
    blank, line = _first_line(path, fmt)
    separator = fmt.separator or ("\t" if kind == ".tsv" else _separator(line))
    try:
        cells = pd.read_csv(
            path,
            sep=separator,
            encoding=fmt.encoding,
            header=None,  # so that the names are text as they stand there
            dtype=str,
            na_filter=False,
            low_memory=False,
            skipinitialspace=True,
            skiprows=blank,
            skip_blank_lines=False,  # later ones count as rows
        )
    except pd.errors.ParserError as error:
        longer = re.search(
            r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error)
        )
        if longer is None:
            raise ValueError(str(error).rpartition("C error: ")[2]) from None
        expected, number, found = map(int, longer.groups())
        first = "the header" if fmt.header else "the first row"
        raise ValueError(
            f"row {number - fmt.header - blank} has {found} cells, more than {first}, "
            f"which has {expected}; is --separator right?"
        ) from None
    cells = cells.apply(lambda column: column.str.strip())
    if fmt.header:
        names = [
            name or f"Unnamed: {i}"  # pandas's name for it
            for i, name in enumerate(cells.iloc[0])
        ]
        cells = cells.iloc[1:]
    else:
        names = [f"column_{i + 1}" for i in range(cells.shape[1])]
        cells = cells.set_axis(range(1, len(cells) + 1))
    cells.columns = names
    return cells.loc[(cells != "").any(axis=1)]


def _first_line(path: Path, fmt: Format) -> tuple[int, str]:
    """The number of blank lines at the beginning, and the line after them."""
    lines = pd.read_csv(
        path,
        sep="\x1f",  # which occurs nowhere
        encoding=fmt.encoding,
        names=["line"],
        nrows=FIRST_LINES,
        dtype=str,
        na_filter=False,
        quoting=csv.QUOTE_NONE,
        skip_blank_lines=False,
    )["line"].str.strip()
    blank = int((lines != "").argmax()) if len(lines) else 0
    return blank, lines.iloc[blank] if len(lines) else ""


def _separator(line: str) -> str:
    """The separator that the first line has, if it has only one, else a comma."""
    unquoted = re.sub(r'"[^"]*"', "", line)
    found = [separator for separator in SEPARATORS if separator in unquoted]
    return found[0] if len(found) == 1 else ","


def need_columns(source: str, table: pd.DataFrame, names: Iterable[str]) -> None:
    """Checks that a table has these columns.

    Raises:
      InputError: If some are missing.
    """
    missing = [repr(name) for name in names if name not in table.columns]
    if missing:
        known = ", ".join(map(repr, table.columns[:20]))
        known += ", ..." * (table.shape[1] > 20)
        raise InputError(
            f"{source}: no column{'s' * (len(missing) > 1)} {', '.join(missing)}; its "
            f"columns are {known}"
        )


def listed(values: Iterable[Any], most: int = 5) -> str:
    """The first few values, by their `repr`."""
    shown = list(map(repr, values))
    return ", ".join(shown[:most]) + ", ..." * (len(shown) > most)


def warn(source: str, text: str) -> None:
    """Prints one line about a file to stderr."""
    print(f"{Path(source).name}: {text}", file=sys.stderr)
