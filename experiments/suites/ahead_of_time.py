"""Programs of jaxbce and of plain JAX, compiled for accelerators that are not attached.

Nothing runs on a device. Rows are read off the compiled programs: see `hlo.py` for what
is counted. Each target is compiled in a process of its own, whose environment keeps it
from any real accelerator, and for a TPU has the compiler write its last intermediate
code, of which `llo.py` counts a part.
"""

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, Jaxpr

import jaxbce
from experiments.suites import hlo, llo, ptx, workloads
from experiments.suites.case import JAXBCE, layers_text
from experiments.suites.targets import TARGETS
from experiments.suites.training import OPTIMIZERS, random_data, size_text
from experiments.support import baselines
from jaxbce import _fused, _kernel_gpu, sweeps

PLAIN = "plain JAX"
FUSED = "jaxbce, fused"
KERNEL = "train_networks"
# Custom calls that are kernels, by the platforms for which sweep(kernel="fused") is.
KERNEL_CALLS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}
STEPS = 1000  # of a training run
EPOCHS = 59  # of plain JAX, which has no shorter last batch; about as many steps
EXAMPLES, BATCH_SIZE, LAYERS = 569, 32, (30, 16, 1)
LANES = 128  # of a vector of a TPU
WARPS = 4  # of a block of a GPU

# Name of the program, that in `workloads`, number of examples, layer sizes and dtype.
QUANTITIES = (
    ("value_and_grad", "gradient", 4096, (512, 1024, 1), "float32"),
    ("value_and_grad", "gradient", 4096, (512, 1024, 1), "bfloat16"),
    ("clipped_value_and_grad", "clipped sum", 1024, (128, 512, 1), "float32"),
    ("ntk", "ntk", 512, (64, 256, 1), "float32"),
    ("ggn_vp", "ggn_vp", 4096, (512, 1024, 1), "float32"),
)
# Number of points and seeds, and the optimizer.
SWEEPS = tuple(
    (*members, optimizer)
    for optimizer in ("sgd", "adam")
    for members in ((4096, 1), (64, 64), (65536, 1), (1024, 64))
)

Row = dict[str, Any]


class Lowerable(NamedTuple):
    """A jitted function and its arguments as shapes.

    Attributes:
      function: The function.
      arguments: Its arguments.
      calls: How often it is called for all members of a sweep, in groups.
      members: The number of members per group.
    """

    function: Any
    arguments: tuple[Any, ...]
    calls: int = 1
    members: int = 1


class Program(NamedTuple):
    """One program of jaxbce, the same in plain JAX, and for sweeps in one kernel.

    Attributes:
      name: Name of the function of jaxbce.
      size: Sizes, as text.
      unit: What is counted: a "call", or a "step" of the training loop.
      implementations: Builds the functions for a device, by name.
    """

    name: str
    size: str
    unit: str
    implementations: dict[str, Callable[[Any], Lowerable]]


def _shapes(tree: Any, device: Any) -> Any:
    """Shapes of arrays on a device that need not be attached."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(
        lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=sharding),
        jax.eval_shape(lambda: tree() if callable(tree) else tree),
    )


def _quantity(
    name: str, quantity: str, n: int, layers: tuple[int, ...], dtype: str
) -> Program:
    """A function of one batch."""

    def arguments() -> Any:
        arrays = workloads.arguments(n, layers, jax.random.key(0))
        return jax.tree.map(lambda t: t.astype(dtype), arrays)

    def build(function: Callable[..., Any], device: Any) -> Lowerable:
        jitted = jax.jit(lambda *args: function(*args))
        return Lowerable(jitted, _shapes(arguments, device))

    functions = {
        JAXBCE: workloads.quantities()[quantity].function,
        PLAIN: workloads.PLAIN[quantity],
    }
    return Program(
        name=name,
        size=f"{n}×{layers_text(layers)}, {dtype}",
        unit="call",
        implementations={
            key: functools.partial(build, function)
            for key, function in functions.items()
        },
    )


def _data() -> tuple[jax.Array, jax.Array]:
    return random_data(EXAMPLES, LAYERS[0], jax.random.key(0), "float32")


def _plain_fit(optimizer: Any, key: Any, params: Any, x: Any, y: Any) -> Any:
    options: Any = {"optimizer": optimizer, "epochs": EPOCHS, "batch_size": BATCH_SIZE}
    return baselines.plain_fit(key, params, x, y, **options)


def _fit(optimizer: str) -> Program:
    """A training run of one network."""
    transformation = OPTIMIZERS[optimizer]({"learning_rate": 0.1})

    def ours(key: Any, params: Any, x: Any, y: Any) -> Any:
        options: Any = {"num_steps": STEPS, "batch_size": BATCH_SIZE}
        return jaxbce.fit(key, params, x, y, optimizer=transformation, **options).params

    def build(function: Callable[..., Any], device: Any) -> Lowerable:
        def arguments() -> Any:
            key = jax.random.key(0)
            return key, jaxbce.init(key, LAYERS), *_data()

        return Lowerable(jax.jit(function), _shapes(arguments, device))

    plain = functools.partial(_plain_fit, transformation)
    return Program(
        name="fit",
        size=size_text(BATCH_SIZE, EXAMPLES, LAYERS, optimizer),
        unit="step",
        implementations={
            JAXBCE: functools.partial(build, ours),
            PLAIN: functools.partial(build, plain),
        },
    )


def prepare_sweep(
    points: int, seeds: int, optimizer: str, device: Any, kernel: Any = "xla"
) -> sweeps.PreparedSweep:
    """The sweep of learning rates, in the groups that jaxbce forms on the device."""
    return sweeps.prepare(
        jax.random.key(0),
        *_data(),
        hidden=LAYERS[1:-1],
        make_optimizer=OPTIMIZERS[optimizer],
        hparams={"learning_rate": np.geomspace(1e-4, 1e-1, points)},
        num_seeds=seeds,
        num_steps=STEPS,
        batch_size=BATCH_SIZE,
        kernel=kernel,
        mesh=jax.sharding.Mesh(np.array([device]), ("devices",)),
    )


def _sweep(points: int, seeds: int, optimizer: str) -> Program:
    """A sweep, and `vmap` over seeds of `vmap` over points of the plain loop."""

    def ours(kernel: str, device: Any) -> Lowerable:
        prepared = prepare_sweep(points, seeds, optimizer, device, kernel)
        first = prepared.groups[0]
        return Lowerable(
            *sweeps.program(prepared),
            calls=len(prepared.groups),
            members=len(first.points) * len(first.seeds),
        )

    def plain(device: Any) -> Lowerable:
        def train(rate: Any, *args: Any) -> Any:
            return _plain_fit(OPTIMIZERS[optimizer]({"learning_rate": rate}), *args)

        by_point = jax.vmap(train, (0, None, None, None, None))
        by_seed = jax.vmap(by_point, (None, 0, 0, None, None))

        def arguments() -> Any:
            keys = jax.random.split(jax.random.key(0), seeds)
            params = jax.vmap(functools.partial(jaxbce.init, sizes=LAYERS))(keys)
            return jnp.ones(points), keys, params, *_data()

        return Lowerable(jax.jit(by_seed), _shapes(arguments, device))

    size = size_text(BATCH_SIZE, EXAMPLES, LAYERS, optimizer)
    return Program(
        name="sweep",
        size=f"{points}×{seeds} members, {size}",
        unit="step",
        implementations={
            JAXBCE: functools.partial(ours, "xla"),
            PLAIN: plain,
            FUSED: functools.partial(ours, "fused"),
        },
    )


def programs(quick: bool = False) -> Iterator[Program]:
    """All programs, or one of each name if `quick`."""
    for quantity in (*QUANTITIES[:1], *QUANTITIES[2:]) if quick else QUANTITIES:
        yield _quantity(*quantity)
    for optimizer in ("adam",) if quick else OPTIMIZERS:
        yield _fit(optimizer)
    for sweep in SWEEPS[:1] if quick else SWEEPS:
        yield _sweep(*sweep)


def _counts(unit: str, module: hlo.Module) -> Row:
    """Counts of a compiled program per call, or per step of its training loop."""
    cost, trip_count, padding = module.cost(), None, None
    if unit == "step":
        loop = module.step_loop()
        if loop is None:
            raise ValueError("expected a training loop in the compiled program")
        cost = module.cost(module.body(loop))
        trip_count = module.trip_count(loop)
        padded, exact = (
            hlo.array_bytes(loop.shape, padded=padded, anywhere=True)
            for padded in (True, False)
        )
        padding = round(padded / exact, 4)
    return {
        "kernels": cost.kernels,
        "products": cost.products,
        "transposes": cost.transposes,
        "copies": cost.copies,
        "hbm_bytes": cost.bytes,
        "trip_count": trip_count,
        "padding": padding,
    }


def _fused_counts(
    platform: str, module: hlo.Module, jaxpr: Any, members: int, dump: Path
) -> Row:
    """Counts per step of the kernel that takes all steps of a group.

    Args:
      platform: The platform that it is compiled for.
      module: The compiled program.
      jaxpr: The traced program.
      members: Number of networks.
      dump: A folder with the compiler's last intermediate code.
    """
    cost = module.cost("", KERNEL_CALLS[platform])
    counts: Row = {"kernels": cost.kernels / STEPS, "hbm_bytes": cost.bytes / STEPS}
    if platform == "tpu":
        bundles = llo.innermost_loop_bundles(dump, KERNEL) * _num_blocks(jaxpr)
        counts["bundles"] = round(bundles * LANES / members, 1)
    else:
        passes = -(-BATCH_SIZE // _kernel_gpu.MAX_EXAMPLES)
        instructions = ptx.step_instructions(dump, KERNEL, passes) * _num_blocks(jaxpr)
        counts["instructions"] = round(instructions * WARPS / members, 1)
        counts |= ptx.resources(dump, KERNEL)
    return counts


def _num_blocks(jaxpr: Any) -> int:
    """The number of blocks of the Pallas kernels in a traced program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":  # of a TPU
            return math.prod(eqn.params["grid_mapping"].grid)
        if eqn.primitive.name == "mpmd_map":  # of a GPU
            return math.prod(eqn.params["meshes"][0].grid)
    inner = [
        value
        for eqn in jaxpr.eqns
        for value in jax.tree.leaves(eqn.params)
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
    return max((_num_blocks(getattr(each, "jaxpr", each)) for each in inner), default=0)


def _compile(
    program: Program, implementation: str, target: str, device: Any, dump: Path
) -> Row:
    """Compiles an implementation of a program, and returns its counts."""
    platform = TARGETS[target].platform
    build = program.implementations[implementation]
    function, arguments, calls, members = build(device)
    traced = function.trace(*arguments)
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    module = hlo.Module(compiled.as_text())
    if implementation == FUSED:
        jaxpr = traced.jaxpr.jaxpr
        counts = _fused_counts(platform, module, jaxpr, members, dump)
    else:
        counts = _counts(program.unit, module)
    return counts | {
        "hbm_bytes": counts["hbm_bytes"] * calls,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "calls": calls,
    }


def compile_programs(target: str, dump: Path, quick: bool) -> Iterator[Row]:
    """Compiles all programs in this process, and yields a row for each.

    "hbm_bytes" are of all members, "bundles" those of 128, and "instructions" those of
    one; other counts are per call for one group of members. "error" is None if the
    program compiles, and "unavailable" if there is one; otherwise there are no counts.

    Args:
      target: Name of a target.
      dump: A folder in which compilers write their last intermediate code.
      quick: Whether to compile one program of each name.
    """
    platform, topology = TARGETS[target].platform, TARGETS[target].topology
    device = topologies.get_topology_desc(platform=platform, **topology).devices[0]
    for program in programs(quick):
        for implementation in program.implementations:
            row: Row = {
                "target": target,
                "program": program.name,
                "size": program.size,
                "unit": program.unit,
                "implementation": implementation,
                "error": None,
                "unavailable": None,
            }
            try:
                if implementation == FUSED:
                    _fused.check_devices([device])
            except ValueError as error:
                row["unavailable"] = str(error)
                yield row
                continue
            try:
                row |= _compile(program, implementation, target, device, dump)
            except Exception as error:  # a compiler's; others may still compile
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            for path in dump.iterdir():
                path.unlink()
            yield row


def run(
    target: str,
    *,
    quick: bool = False,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """The rows of `compile_programs`, from a process that uses no accelerator.

    Raises:
      RuntimeError: If the process ends before it has compiled all programs.
    """
    environment = os.environ | TARGETS[target].environment
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    init_args = environment.get("LIBTPU_INIT_ARGS", "")
    rows = []
    with (
        tempfile.TemporaryDirectory() as dump,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", __name__, target, dump, *["quick"] * quick],
            env=environment
            | {"LIBTPU_INIT_ARGS": f"{init_args} {llo.flags(dump)}"}
            | ptx.environment(dump),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                report(rows[-1])
        if process.wait():
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"its process has failed: {last}")
    return rows


def versions() -> dict[str, str]:
    """Versions of the compilers that are installed."""
    found = {}
    for name in ("jaxlib", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    arguments = sys.argv[1], Path(sys.argv[2]), "quick" in sys.argv[3:]
    for found in compile_programs(*arguments):
        print(json.dumps(found), flush=True)
