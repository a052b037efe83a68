"""Runs that can be interrupted: output folders, checkpoints, and chunks of work.

If a run is interrupted, the same command with the same folder resumes it. With several
processes, all of them compute each chunk together; only the first one uses the folder.
"""

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

FILES = ("data", "validation", "test")  # paths in the configuration
FORMAT = 3  # version of config.json and of the folder that it describes


@contextlib.contextmanager
def lock_output_dir(
    folder: Path, configuration: dict[str, Any], *, may_extend: bool = False
) -> Iterator[None]:
    """Locks a folder for one run, so that no other run writes to it.

    Args:
      folder: An existing folder.
      configuration: The configuration of the run, which is written to `config.json`. If
        the folder already has that file, it must hold the same configuration. Files of
        the same content are the same data, whatever their path.
      may_extend: Whether the configuration may differ by having more steps.

    Raises:
      InputError: If another process uses the folder, or it holds another run.
    """
    try:
        held = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"--output_dir={folder}: another run is using it") from None
    with held:
        _check_configuration(folder, configuration, may_extend)
        yield


@contextlib.contextmanager
def open_checkpoints(
    folder: Path, configuration: dict[str, Any]
) -> Iterator["Checkpoints"]:
    """Locks a folder for one run, which may be extended, and opens its checkpoints."""
    with lock_output_dir(folder, configuration, may_extend=True):
        checkpoints = Checkpoints(folder)
        try:
            yield checkpoints
        finally:
            checkpoints.close()


def _check_configuration(
    folder: Path, configuration: dict[str, Any], may_extend: bool
) -> None:
    """Writes the configuration, or checks that the folder has the same one."""
    # Encode and decode it, because JSON turns tuples into lists.
    mine = json.loads(json.dumps({"format": FORMAT, **configuration}))
    theirs = _read_configuration(folder)
    if theirs is None:
        for name in ("checkpoints", "parts"):
            if (folder / name).exists():
                raise InputError(
                    f"--output_dir={folder}: has {name} but no config.json, so that "
                    "their run is unknown; use another folder"
                )
    elif theirs.get("format") != FORMAT:
        raise InputError(
            f"--output_dir={folder}: holds a run of another version of these "
            f"experiments (format {theirs.get('format', 1)}, expected {FORMAT}); use "
            "another folder"
        )
    elif changed := _differences(mine, theirs):
        if not (may_extend and _is_extension(mine, theirs, changed)):
            shown = ", ".join(
                f"{name}={theirs.get(name)} there, {mine.get(name)} here"
                for name in changed
            )
            raise InputError(
                f"--output_dir={folder}: holds another run, with {shown}; use another "
                "folder"
            )
    else:
        return
    with output.atomic_write(folder / "config.json") as path:
        path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The names of the values that differ."""
    names = sorted(set(mine) | set(theirs))
    if "data_digest" in mine:  # which tells whether the data are the same
        names = [name for name in names if name not in FILES]
    return [name for name in names if mine.get(name) != theirs.get(name)]


def _is_extension(
    mine: dict[str, Any], theirs: dict[str, Any], changed: list[str]
) -> bool:
    """Whether a run is the beginning of another one, which has more steps."""
    return (
        set(changed) <= {"num_steps", "evaluate_every"}
        and mine["num_steps"] > theirs["num_steps"]
        and mine["schedule"] == "constant"  # other schedules depend on the steps
    )


def _read_configuration(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder; None if it holds no run."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected the configuration of a run")
    return found


class Checkpoints:
    """The last two checkpoints of a run."""

    def __init__(self, folder: Path) -> None:
        self._manager = ocp.CheckpointManager(
            (folder / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
        )

    @property
    def last(self) -> int | None:
        """The number of the last checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Saves a pytree of arrays; the checkpoint is complete when this returns.

        Raises:
          InputError: If it cannot be written, for example because the disk is full.
        """
        leaves = {
            str(i): _to_array(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))
        }
        try:
            self._manager.save(step, args=ocp.args.StandardSave(leaves))
        except Exception as error:  # Orbax raises a ValueError for a full disk
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self._manager.directory}: {reason}") from error

    def restore(self, like: Any) -> Any | None:
        """Loads the last pytree that was saved; None if there is none.

        Args:
          like: A pytree of the same structure, of arrays or `jax.ShapeDtypeStruct`s.

        Raises:
          InputError: If the checkpoint has another structure or is damaged.
        """
        step = self.last
        if step is None:
            return None
        leaves, structure = jax.tree.flatten(like)
        target = {
            str(i): jax.eval_shape(_to_array, leaf) for i, leaf in enumerate(leaves)
        }
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # Orbax and its codecs raise various errors
            raise InputError(
                f"{self._manager.directory}: checkpoint {step} cannot be read ("
                f"{type(error).__name__}); delete it to start again"
            ) from error
        return structure.unflatten(
            jax.random.wrap_key_data(found[str(i)], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else found[str(i)]
            for i, leaf in enumerate(leaves)
        )

    def close(self) -> None:
        """Stops Orbax's threads."""
        self._manager.close()


def _to_array(leaf: Any) -> Any:
    """The array to save; for a random key, its data."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def compute_chunks(
    compute: Callable[[int], pd.DataFrame],
    sizes: list[int],
    *,
    folder: Path | None,
    configuration: dict[str, Any],
    unit: str,
    scale: int = 1,
) -> pd.DataFrame:
    """Computes tables in chunks, and concatenates them.

    Args:
      compute: Computes the table of one chunk, given its index.
      sizes: Number of networks in each chunk.
      folder: Where to store chunk i, as `parts/i.parquet`, and to resume from; None
        stores nothing.
      configuration: The configuration of the run; see `lock_output_dir`.
      unit: Unit of the progress bar.
      scale: Units per network.

    Returns:
      The table. With a folder, it is empty in all processes but the first.

    Raises:
      InputError: If another process uses the folder, or it holds another run.
    """
    count = len(sizes)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        error_here = None  # raised once all processes know of it
        known = [False] * count
        if folder is not None and first:
            try:
                stack.enter_context(lock_output_dir(folder, configuration))
                (folder / "parts").mkdir(exist_ok=True)
                known = [_path(folder, i).exists() for i in range(count)]
                for i in range(count):
                    if known[i]:  # if it is damaged, no process begins to compute
                        _read(_path(folder, i))
            except (InputError, OSError) as error:
                error_here = error
        if not _from_first_process(error_here is None):
            raise error_here or InputError("the first process cannot use --output_dir")
        known = _from_first_process(np.array(known))
        tables: dict[int, pd.DataFrame] = {}
        done = sum(size for i, size in enumerate(sizes) if known[i])
        if done and first:
            print(f"Resuming: {done} of {sum(sizes)} networks are done.", flush=True)
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
                    with output.atomic_write(_path(folder, i)) as path:
                        table.to_parquet(path, index=False)
                members += sizes[i]
                bar.update(sizes[i] * scale)
                bar.set_postfix_str(f"{members}/{sum(sizes)} networks")
        if folder is not None and first:
            tables = {i: _read(_path(folder, i)) for i in range(count)}
        chunks = [tables[i] for i in sorted(tables)]
        return pd.concat(chunks, ignore_index=True) if chunks else pd.DataFrame()


def _path(folder: Path | None, i: int) -> Path:
    return Path(folder or ".") / "parts" / f"{i}.parquet"


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); delete it to compute it "
            "again"
        ) from error


def _from_first_process(value: Any) -> Any:
    """The first process's value, in all processes."""
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(np.asarray(value))
