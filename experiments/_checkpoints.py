"""A run's folder: one configuration, one process at a time, checkpoints by Orbax."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from experiments import _results
from experiments._cli import InputError


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
        with _results.replacing(folder / "config.json") as path:
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
