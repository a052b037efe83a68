"""Reading tables from the user's files, and what is said about their rows."""

import csv
import difflib
import itertools
import re
import sys
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow.parquet as pq

from experiments.support.cli import InputError

TEXT = (".csv", ".tsv", ".txt")
PARQUET = (".parquet", ".pq")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
SEPARATORS = (",", ";", "\t", "|")
FIRST_ROWS = 20  # one of which may be the header, below a title
NO_TEXT = {  # what files are that begin with these bytes
    b"\xff\xfe": "is UTF-16; give --encoding=utf-16",
    b"\xfe\xff": "is UTF-16; give --encoding=utf-16",
    b"\x1f\x8b": "is compressed; its name must end in .gz",
    b"BZh": "is compressed; its name must end in .bz2",
    b"\xfd7zXZ": "is compressed; its name must end in .xz",
    b"(\xb5/\xfd": "is compressed; its name must end in .zst",
    b"PAR1": "is a Parquet file; its name must end in .parquet",
    b"PK": "is an Excel workbook or a ZIP archive; save it as CSV",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook; save it as CSV",
}


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

    The rows are those of `pandas.read_csv`: a blank line is no row, but a line of
    separators alone is a row without values.

    Returns:
      The table. Its index numbers the rows from 1, the first row below the header.

    Raises:
      InputError: If the file cannot be read or is empty, or two columns share a name.
    """
    kind = _without_compression(path).suffix.lower()
    if kind not in TEXT + PARQUET:
        raise InputError(
            f"{path}: expected a file {', '.join(TEXT)}, which may be compressed "
            f"({', '.join(COMPRESSED)}), .parquet or .pq"
        )
    try:
        table = _read_parquet(path) if kind in PARQUET else _read_text(path, kind, fmt)
    except UnicodeError:
        raise InputError(f"{path}: {_no_text(path, fmt)}") from None
    except LookupError:
        raise InputError(f"--encoding={fmt.encoding}: unknown encoding") from None
    except ImportError as error:  # of zstandard
        raise InputError(f"{path}: {error}") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # each kind of damaged file raises its own
        damage = f"cannot be read as {path.suffix}: {error or type(error).__name__}"
        reason = getattr(error, "strerror", None) or damage
        raise InputError(f"{path}: {reason}") from None
    if table.empty:
        raise InputError(f"{path}: has no rows")
    return table


def stem(path: str) -> str:
    """The name of a file without its endings."""
    return _without_compression(Path(path)).stem


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def _no_text(path: Path, fmt: Format) -> str:
    """Why a file cannot be decoded."""
    if path.suffix.lower() not in COMPRESSED:
        with path.open("rb") as file:
            beginning = file.read(8)
        for known, reason in NO_TEXT.items():
            if beginning.startswith(known):
                return reason
    return (
        f"is not {fmt.encoding} text; give its --encoding, such as cp1252 (Western "
        "Windows), latin-1 or utf-16"
    )


def _read_parquet(path: Path) -> pd.DataFrame:
    with path.open("rb") as file:
        arrow = pq.ParquetFile(file).read()
    _check_names(path, arrow.column_names)
    table: Any = arrow.to_pandas(types_mapper=pd.ArrowDtype)
    # An index with a name is a column in a text file, too.
    named = [name for name in table.index.names if name is not None]
    table = table.reset_index(named) if named else table
    table.columns = [str(name).strip() for name in table.columns]
    _check_names(path, table.columns)
    return table.set_axis(range(1, len(table) + 1))


def _read_text(path: Path, kind: str, fmt: Format) -> pd.DataFrame:
    line = _first_line(path, fmt)
    separator = fmt.separator or ("\t" if kind == ".tsv" else _separator(line))
    try:
        cells: Any = pd.read_csv(
            path,
            sep=separator,
            encoding=fmt.encoding,
            header=None,  # so that the names are text as they stand there
            dtype=str,
            na_filter=False,
            low_memory=False,
            skipinitialspace=True,
        )
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: is empty") from None
    except pd.errors.ParserError as error:
        raise InputError(f"{path}: {_parser_error(str(error), line, fmt)}") from None
    cells = cells.apply(lambda column: column.str.strip())
    if not fmt.header:
        cells.columns = [f"column_{i + 1}" for i in range(cells.shape[1])]
        return cells.set_axis(range(1, len(cells) + 1))
    names = list(cells.iloc[0])
    if any("\0" in name for name in names):
        raise UnicodeError  # as UTF-16 that does not begin with its mark
    for i, name in enumerate(names):
        names[i] = name or unique(f"Unnamed: {i}", names)  # pandas's name for it
    _check_names(path, names)
    cells.columns = names
    return cells.iloc[1:]


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Checks that columns have different names."""
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{path}: two columns are named {name!r}")


def _parser_error(message: str, line: str, fmt: Format) -> str:
    """An error of pandas in the words of this module; `line` is the first line."""
    longer = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", message)
    if longer is not None:
        expected, number, found = longer.groups()
        first = "the header" if fmt.header else "the first row"
        return (
            f"line {number} has {found} cells, more than {first}, which has "
            f"{expected}: {line[:60]!r}; is --separator right?"
        )
    unclosed = re.search(r"EOF inside string starting at row (\d+)", message)
    if unclosed is not None:
        return f"a quote in line {int(unclosed[1]) + 1} is never closed"
    return message.rpartition("C error: ")[2].strip()


def unique(name: str, taken: Container[str]) -> str:
    """The name, followed by .1, .2 and so on if it is taken, as pandas does."""
    candidates = (f"{name}.{i}" for i in itertools.count(1))
    return next(n for n in itertools.chain([name], candidates) if n not in taken)


def _first_line(path: Path, fmt: Format) -> str:
    """The first line that is not blank; none if there is none."""
    lines = pd.read_csv(
        path,
        sep="\x1f",  # hardly occurs; what follows it is not read
        encoding=fmt.encoding,
        names=["line"],
        usecols=["line"],
        nrows=1,
        dtype=str,
        na_filter=False,
        quoting=csv.QUOTE_NONE,
    )["line"].str.strip()
    return lines.iloc[0] if len(lines) else ""


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
    missing = [name for name in names if name not in table.columns]
    if missing:
        by_lowercase = {name.lower(): name for name in table.columns}
        close = difflib.get_close_matches(missing[0].lower(), by_lowercase, 1)
        meant = f" (did you mean {by_lowercase[close[0]]!r}?)" if close else ""
        is_text = [not isinstance(kind, pd.ArrowDtype) for kind in table.dtypes]
        is_header = (table.head(FIRST_ROWS).loc[:, is_text] == missing[0]).any(axis=1)
        title = f"; is row {is_header.idxmax()} the header?" if is_header.any() else ""
        raise InputError(
            f"{source}: no column{'s' * (len(missing) > 1)} "
            f"{listed(missing, 20)}{meant}; its columns are "
            f"{listed(table.columns, 20)}{title}"
        )


def listed(values: Iterable[Any], most: int = 5) -> str:
    """The first few values, by their `repr`, and how many others there are."""
    shown = list(map(repr, values))
    others = f" and {len(shown) - most} more" * (len(shown) > most)
    return ", ".join(shown[:most]) + others


def warn(source: str, text: str) -> None:
    """Prints one line about a file to stderr."""
    print(f"{Path(source).name}: {text}", file=sys.stderr)
