"""A run's folder: one configuration, one process at a time, checkpoints by Orbax."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pandas as pd
from jax.experimental import multihost_utils
from tqdm import tqdm

from experiments.support import output
from experiments.support.cli import InputError


@contextlib.contextmanager
def claimed(folder: Path, configuration: dict[str, Any]) -> Iterator[None]:
    """Holds a folder for one run; what else writes there must wait.

    Args:
      folder: An existing folder.
      configuration: What the run is; of an earlier run in this folder it must be the
        same.

    Raises:
      InputError: If another process has the folder open, or it is of another run.
    """
    try:
        held = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"--output_dir={folder}: another run is using it") from None
    with held:
        _claim(folder, configuration)
        yield


@contextlib.contextmanager
def opened(folder: Path, configuration: dict[str, Any]) -> Iterator["Checkpoints"]:
    """Holds a folder for one run, as `claimed`, and opens its checkpoints."""
    with claimed(folder, configuration):
        checkpoints = Checkpoints(folder)
        try:
            yield checkpoints
        finally:
            checkpoints.close()


def configuration(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder; None if there is no run.

    Raises:
      InputError: If its file cannot be understood.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a run's configuration")
    return found


def _claim(folder: Path, mine: dict[str, Any]) -> None:
    mine = json.loads(json.dumps(mine))  # as it reads back: tuples are lists
    theirs = configuration(folder)
    if theirs is None:
        if (folder / "checkpoints").exists():
            raise InputError(
                f"--output_dir={folder}: has checkpoints, but no config.json to say "
                "of what"
            )
        with output.replacing(folder / "config.json") as path:
            path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
    elif theirs != mine:
        names = sorted(set(mine) | set(theirs))
        other = [n for n in names if mine.get(n) != theirs.get(n)]
        shown = ", ".join(
            f"{n}={theirs.get(n)} there, not {mine.get(n)}" for n in other
        )
        raise InputError(
            f"--output_dir={folder}: has another run, with {shown}; take another folder"
        )


class Checkpoints:
    """The last checkpoints of a run, each whole or not there at all."""

    def __init__(self, folder: Path) -> None:
        self._manager = ocp.CheckpointManager(
            (folder / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
        )

    def save(self, step: int, tree: Any) -> None:
        """Saves a pytree of arrays; once it returns, a kill cannot lose it.

        Raises:
          InputError: If it cannot be written, on a full disk say.
        """
        leaves = {str(i): _data(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
        try:
            self._manager.save(step, args=ocp.args.StandardSave(leaves))
        except Exception as error:  # a full disk is a ValueError to Orbax
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self._manager.directory}: {reason}") from error

    def restore(self, like: Any) -> Any | None:
        """The last pytree saved, of the structure of `like`; None if there is none.

        Args:
          like: A pytree of arrays or of their shapes and dtypes.

        Raises:
          InputError: If what was saved is not of that structure, or is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        leaves, structure = jax.tree.flatten(like)
        target = {str(i): jax.eval_shape(_data, leaf) for i, leaf in enumerate(leaves)}
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # whatever Orbax, its files and their codecs raise
            raise InputError(
                f"{self._manager.directory}: checkpoint {step} cannot be read ("
                f"{type(error).__name__}); without it the run starts anew"
            ) from error
        return structure.unflatten(
            jax.random.wrap_key_data(found[str(i)], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else found[str(i)]
            for i, leaf in enumerate(leaves)
        )

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


def _data(leaf: Any) -> Any:
    """An array as it can be saved: of random keys, their data."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


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
                stack.enter_context(claimed(folder, configuration))
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
                    with output.replacing(_path(folder, i)) as path:
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
