"""What tests share: small problems, references, tolerances and processes."""

import contextlib
import functools
import importlib
import io
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from absl.testing import flagsaver

import jaxbce
from experiments.support import cli
from jaxbce import gradients
from jaxbce._blocks import examples_per_block
from jaxbce._layouts import Columns
from jaxbce.network import Params

# Relative error of a leaf, ‖a − b‖ / ‖b‖, by the dtype that computed a.
TOLERANCE = {
    "float64": 1e-12,  # 10⁴ eps: sums of up to 10³ rows in another order
    "float32": 1e-5,  # 10² eps: as above, through four layers
    "bfloat16": 2.0**-5,  # 8 eps: every layer rounds its inputs and deltas
}


_started: list[subprocess.Popen[str]] = []


def start(experiment: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts an experiment as a user would, its output to be read from pipes.

    A fixture in `conftest.py` ends it with the test, if it has not ended before.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"experiments.{experiment}", *arguments],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # whatever it starts is killed with it
    )
    _started.append(process)
    return process


def end_processes() -> None:
    """Kills every process that `start` started, and waits for each."""
    while _started:
        process = _started.pop()
        # The process as a context closes its pipes and is waited for.
        with process, contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Finished(NamedTuple):
    """How a command ended: its exit status, and what it printed."""

    status: int
    out: str
    err: str


def run_command(name: str, *arguments: str) -> Finished:
    """Runs `python -m experiments.NAME ARGUMENTS` in this process.

    Flags, logging and JAX's configuration are as before once it returns. JAX's devices
    are those of this process: `--cpu_devices` with another number is an error, as are
    all exceptions that a process would end with a traceback. Flags of commands that
    other tests have imported are refused as flags of another command.
    """
    module = importlib.import_module(f"experiments.{name}")
    program = str(Path(module.__file__ or "").resolve())
    out, err = io.StringIO(), io.StringIO()
    with (
        _flags_of(module.__name__, program),
        _configuration_restored(),
        jax.numpy_dtype_promotion("standard"),
        mock.patch.object(sys, "argv", [program, *arguments]),
        mock.patch.object(app, "run", _run_app),
        mock.patch.object(os, "_exit", sys.exit),
        _main_module(module),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.launch(
                module.main,
                getattr(module, "DEFAULTS", None),
                getattr(module, "HELP", None),
            )
        except SystemExit as ended:
            status = ended.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
    if status is None or isinstance(status, int):
        return Finished(status or 0, out.getvalue(), err.getvalue())
    return Finished(1, out.getvalue(), err.getvalue())


def _run_app(main: Any, *, flags_parser: Any) -> None:
    """`app.run` without its changes to the process: its name, handlers of logs."""
    sys.exit(main(flags_parser(sys.argv)))


@contextlib.contextmanager
def _flags_of(module: str, program: str) -> Iterator[None]:
    """All flags of experiments at their defaults; those of `module` as the program's.

    absl keeps flags by the module that defines them, and those of the main module by
    `sys.argv[0]`.
    """
    key_flags = flags.FLAGS.key_flags_by_module_dict()
    verbosity = logging.get_verbosity()
    app.define_help_flags()
    before = flagsaver.save_flag_values()
    for defined_in, defined in flags.FLAGS.flags_by_module_dict().items():
        if defined_in.startswith("experiments."):
            for flag in defined:
                flag.unparse()
    key_flags[program] = flags.FLAGS.get_key_flags_for_module(module)
    try:
        yield
    finally:
        del key_flags[program]
        added = flagsaver.save_flag_values()  # by a library imported meanwhile
        flagsaver.restore_flag_values(added | before)
        flags.FLAGS.mark_as_parsed()
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _configuration_restored() -> Iterator[None]:
    """JAX's configuration is restored; the number of CPU devices stays as it is."""
    update, before = jax.config.update, dict(jax.config.values)

    def guarded(option: str, value: Any) -> None:
        if option != "jax_num_cpu_devices":
            update(option, value)
        elif cli.CPU_DEVICES.value not in (None, jax.local_device_count()):
            raise ValueError(f"{cli.CPU_DEVICES.value} devices need a process: start()")

    with mock.patch.object(jax.config, "update", guarded):
        try:
            yield
        finally:
            for option, value in before.items():
                if jax.config.values[option] != value:
                    update(option, value)


@contextlib.contextmanager
def _main_module(module: Any) -> Iterator[None]:
    """The main module of this process, whose docstring `--help` prints."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.modules["__main__"] = before


class Problem(NamedTuple):
    """A network and a batch, in float64 NumPy."""

    params: Any
    x: Any
    y: Any
    sample_weight: Any

    def rounded(self, dtype: Any) -> "Problem":
        """The same with every number one of a dtype's."""
        return jax.tree.map(lambda t: t.astype(jnp.dtype(dtype)).astype(float), self)

    def arguments(self, dtype: Any = np.float64) -> tuple[Params, Any, Any]:
        """`params, x, y` as JAX arrays of a dtype."""
        return jax.tree.map(lambda t: jnp.asarray(t.astype(jnp.dtype(dtype))), self[:3])


NETWORKS = {
    "one hidden layer": (7, 5, 1),
    "three hidden layers": (6, 8, 7, 5, 1),
    "five outputs": (6, 9, 5),
    "no hidden layer": (8, 2),  # as many features as columns are padded to
}


def problem(sizes: tuple[int, ...], rows: int = 37, seed: int = 0) -> Problem:
    """A random problem with soft labels, biases that are not 0, and weights."""
    rng = np.random.default_rng(seed)
    layer: Any = jaxbce.Layer
    params = tuple(
        layer(rng.normal(size=(a, b)) * np.sqrt(2 / a), rng.normal(size=b) / 2)
        for a, b in itertools.pairwise(sizes)
    )
    x = rng.normal(size=(rows, sizes[0]))
    y = np.where(
        rng.random((rows, sizes[-1])) < 0.7,
        rng.integers(0, 2, (rows, sizes[-1])),
        rng.random((rows, sizes[-1])),
    )
    return Problem(params, x, y, rng.random(rows) + 0.1)


@functools.partial(jax.jit, static_argnames=("reduction", "block_size", "has_ones"))
def _value_and_grad_in_columns(
    params: Params,
    x: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    pos_weight: Any = 1.0,
    reduction: Any = "mean",
    block_size: Any = "auto",
    has_ones: bool = True,
) -> tuple[jax.Array, Params]:
    """`jaxbce.value_and_grad` with examples as columns, as training loops have them."""
    batch = gradients.check_batch(params, x, y, sample_weight, pos_weight, reduction)
    n, features = batch.x.shape
    columns = Columns(features, has_ones)
    size = examples_per_block(block_size, params, n)
    form = gradients.Form(size, sample_weight is not None, columns)
    batch = batch._replace(x=columns.pad(batch.x))
    total, _ = gradients.accumulate(columns.convert(params), batch, form)
    return total.value, gradients.cast_like(columns.convert(total.grads), params)


# The derivation in each layout, as a function of rows.
LAYOUTS = {"rows": jaxbce.value_and_grad, "columns": _value_and_grad_in_columns}
WITHOUT_ONES = functools.partial(_value_and_grad_in_columns, has_ones=False)


def loss_reference(
    params: Any,
    x: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    pos_weight: Any = 1.0,
    reduction: str = "mean",
) -> jax.Array:
    """The loss as anyone would write it, for JAX to differentiate."""
    h = x
    for w, b in params[:-1]:
        h = jax.nn.relu(h @ w + b)
    a = h @ params[-1].w + params[-1].b
    ell = pos_weight * y * jax.nn.softplus(-a) + (1 - y) * jax.nn.softplus(a)
    s = jnp.ones(len(x), a.dtype) if sample_weight is None else sample_weight
    return jnp.sum(s * ell.sum(1)) / (jnp.sum(s) if reduction == "mean" else 1)


class Autodiff(NamedTuple):
    """`loss_reference` and its derivatives in every argument, in float64 NumPy."""

    value: Any
    params: Any
    x: Any
    y: Any
    sample_weight: Any
    pos_weight: Any


def autodiff(
    p: Problem,
    *,
    sample_weight: bool = False,
    pos_weight: float = 1.0,
    reduction: str = "mean",
) -> Autodiff:
    """The reference's value and derivatives: one program per shape and reduction."""
    s = p.sample_weight if sample_weight else np.ones(len(p.x))
    with jax.enable_x64(True):
        case = (*p.arguments(), s, np.float64(pos_weight))
        value, derivatives = _autodiff(*case, reduction=reduction)
    return jax.tree.map(np.asarray, Autodiff(value, *derivatives))


@functools.partial(jax.jit, static_argnames="reduction")
def _autodiff(params: Any, x: Any, y: Any, s: Any, p: Any, *, reduction: str) -> Any:
    def loss(params: Any, x: Any, y: Any, s: Any, p: Any) -> jax.Array:
        weights = {"sample_weight": s, "pos_weight": p}
        return loss_reference(params, x, y, **weights, reduction=reduction)

    return jax.value_and_grad(loss, (0, 1, 2, 3, 4))(params, x, y, s, p)


def options(p: Problem, chosen: dict[str, Any], dtype: Any = np.float64) -> Any:
    """Options of a loss: `"sample_weight": True` stands for the problem's own."""
    if chosen.get("sample_weight") is not True:
        return dict(chosen)
    return chosen | {"sample_weight": p.sample_weight.astype(jnp.dtype(dtype))}


def member(tree: Any, *index: int) -> Any:
    """One of the networks or runs that a pytree's leaves are stacked of, in NumPy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def relative_error(mine: Any, theirs: Any) -> float:
    """The largest relative error of a leaf, in the norm, over two pytrees."""
    errors = [0.0]
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        norm = np.linalg.norm(b)
        errors.append(float(np.linalg.norm(a - b) / (norm or 1)))
    assert np.all(np.isfinite(errors))
    return max(errors)
