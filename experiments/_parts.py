"""Long work in parts: each one a file, so that a killed run goes on where it stopped.

Over several processes all compute each part together; the first one alone has the
folder, and tells the others which parts there are.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.experimental import multihost_utils
from tqdm import tqdm

from experiments import _checkpoints, _results
from experiments._cli import InputError


def collect(
    count: int,
    compute: Callable[[int], pd.DataFrame],
    sizes: list[int],
    *,
    folder: Path | None,
    configuration: dict[str, Any],
    unit: str,
    scale: int = 1,
) -> pd.DataFrame:
    """The tables of all parts, one below the other.

    Args:
      count: How many parts.
      compute: Makes the table of one part; what it makes must not depend on others.
      sizes: Members in each part, for the progress bar.
      folder: Where parts are kept, as `parts/0.parquet`; None is nowhere.
      configuration: What the run is; a folder of another one is refused.
      unit: What the bar counts, `scale` for each member.
      scale: See `unit`.

    Raises:
      InputError: If the folder is used by another process, or is of another run.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        problem = None
        if folder is not None and first:
            try:
                stack.enter_context(_checkpoints.claimed(folder, configuration))
                (folder / "parts").mkdir(exist_ok=True)
            except InputError as error:
                problem = error
        known = [
            problem is None and folder is not None and _path(folder, i).exists()
            for i in range(count)
        ]
        if not _agreed(problem is None):
            raise problem or InputError("the first process cannot use --output_dir")
        known = _agreed(np.array(known))
        tables: dict[int, pd.DataFrame] = {}
        done = sum(size for i, size in enumerate(sizes) if known[i])
        if done and first:
            print(f"Going on: {done} of {sum(sizes)} are there.", flush=True)
        with tqdm(
            total=sum(sizes) * scale,
            initial=done * scale,
            unit=unit,
            unit_scale=True,
            disable=None if first else True,
        ) as bar:
            members = done
            for i in range(count):
                if known[i]:
                    continue
                table = compute(i)
                if folder is None:
                    tables[i] = table
                elif first:
                    with _results.replacing(_path(folder, i)) as path:
                        table.to_parquet(path, index=False)
                members += sizes[i]
                bar.update(sizes[i] * scale)
                bar.set_postfix_str(f"{members}/{sum(sizes)} networks")
        if folder is not None and first:
            tables = {i: _read(_path(folder, i)) for i in range(count)}
        parts = [tables[i] for i in sorted(tables)]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _path(folder: Path | None, i: int) -> Path:
    return Path(folder or ".") / "parts" / f"{i}.parquet"


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); without it that part is "
            "made anew"
        ) from error


def _agreed(value: Any) -> Any:
    """What the first process has, in all of them."""
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(np.asarray(value))
