"""Results for people and programs: tables, and files that say what made them."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import sklearn
from tabulate import tabulate

import jaxbce


def environment() -> dict[str, Any]:
    """Versions and device, to go with every result."""
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


def table(rows: list[dict[str, Any]], floats: str | None = None) -> str:
    """Rows as a table for a terminal; floats short, booleans as ok or FAILED.

    Args:
      rows: The rows, with the same keys.
      floats: A format for all floats; None is three digits, of any size.
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

    cells = [{key: text(value) for key, value in row.items()} for row in rows]
    right = {
        key
        for row in rows
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    align = ["right" if key in right else "left" for key in rows[0]]
    return tabulate(
        cells, headers="keys", tablefmt="simple", colalign=align, disable_numparse=True
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` when the block has ended well.

    A reader, also one after a crash, sees the old file or the new one, whole.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write(
    folder: Path, name: str, results: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes `NAME.json`, with the environment, and the rows as `NAME.csv`."""
    document = {"environment": environment(), **results}
    text = json.dumps(
        document, indent=2, ensure_ascii=False, default=lambda value: value.item()
    )
    with replacing(folder / f"{name}.json") as path:
        path.write_text(text + "\n", encoding="utf-8")
    with replacing(folder / f"{name}.csv") as path:
        pd.DataFrame(rows).to_csv(path, index=False)
