"""What tests of several commands check of the files that a command writes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

KEY = re.compile(r"[a-z][a-z0-9_]*")  # ASCII snake_case
NAMES = {"classes", "optimizer_args", "environment"}  # of targets, arguments, packages


def keys(value: Any) -> Iterator[str]:
    """The keys of JSON data at all depths, but for those of `NAMES`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in NAMES:
                yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def odd_keys(folder: Path, ignored: str = "(?!)") -> dict[str, set[str]]:
    """By file, its keys or columns that are not ASCII snake_case.

    Args:
      folder: A folder that a command has written to.
      ignored: A regular expression of columns that are named after targets or points.
    """
    found: dict[str, set[str]] = {}
    for path in sorted(folder.iterdir()):
        names: Any = []
        if path.suffix == ".json":
            names = keys(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".csv":
            names = pd.read_csv(path, nrows=0).columns
        elif path.suffix == ".parquet":
            names = pd.read_parquet(path).columns
        odd = {
            n for n in names if not KEY.fullmatch(n) and not re.fullmatch(ignored, n)
        }
        if odd:
            found[path.name] = odd
    return found
