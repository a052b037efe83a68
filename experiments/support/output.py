"""Terminal tables and result files."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import sklearn
from tabulate import tabulate

import jaxbce
from experiments.support.cli import InputError


def environment() -> dict[str, Any]:
    """Versions and device, which are recorded with every result."""
    device = jax.devices()[0]
    return {
        "jaxbce": jaxbce.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
    }


def print_environment() -> None:
    """Prints versions and device on one line."""
    print(", ".join(f"{k} {v}" for k, v in environment().items()), flush=True)


def print_files(folder: Path) -> None:
    """Prints the names of the files in a folder on one line."""
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    print(f"\nIn {folder}: {', '.join(names)}")


def table(
    rows: list[dict[str, Any]],
    floats: str | None = None,
    headings: Mapping[str, str] | None = None,
) -> str:
    """Formats rows as a table for a terminal; booleans become ok or FAILED.

    Args:
      rows: The rows; a row without a key has an empty cell there.
      floats: Format of all floats; None is three significant digits.
      headings: Headings by key; a key without an entry is its own heading.
    """

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return "ok" if value else "FAILED"
        if isinstance(value, float) and floats is not None:
            return format(value, floats)
        if isinstance(value, float):
            return (
                f"{value:.3g}" if value == 0 or 0.1 <= value < 1e3 else f"{value:.1e}"
            )
        if isinstance(value, tuple):
            return "×".join(map(str, value)) if value else "scalar"
        return str(value)

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    keys = dict.fromkeys(key for row in rows for key in row)
    names = {key: (headings or {}).get(key, key) for key in keys}
    cells = [{names[key]: text(value) for key, value in row.items()} for row in rows]
    align = [
        "right" if any(is_number(row.get(key)) for row in rows) else "left"
        for key in names
    ]
    return tabulate(
        cells, headers="keys", tablefmt="simple", colalign=align, disable_numparse=True
    )


def with_error(mean: Any, error: Any) -> str:
    """A mean and its standard error as text; an error of NaN is left out."""
    digits = ".4f" if mean < 100 else ".4g"  # so that a table keeps its width
    return f"{mean:{digits}}" + ("" if np.isnan(error) else f" ± {error:{digits}}")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` once the block has succeeded.

    Readers see either the complete old file or the complete new one, even after a
    crash.

    Raises:
      InputError: If it cannot be written, for example because the disk is full.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_results(
    folder: Path, name: str, results: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes results and environment to `NAME.json`, and the rows to `NAME.csv`."""
    document = {"environment": environment(), **results}
    text = json.dumps(
        document, indent=2, ensure_ascii=False, default=lambda value: value.item()
    )
    with atomic_write(folder / f"{name}.json") as path:
        path.write_text(text + "\n", encoding="utf-8")
    with atomic_write(folder / f"{name}.csv") as path:
        pd.DataFrame(rows).to_csv(path, index=False)
