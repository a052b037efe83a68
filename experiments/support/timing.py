"""Time and temporary memory of calls measured in turn, and limits of the machine."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.support import cli

_MIN_MEASUREMENT_SECONDS = 2e-3  # shorter calls are repeated to fill a measurement
_LONG_CALL_SECONDS = 0.05  # longer calls do not depend on what is in the caches
_MIN_ROUND_SECONDS = 0.1  # shorter rounds are repeated more often
_MAX_ROUND_FACTOR = 5  # at most this many times as often


class Call(NamedTuple):
    """A call that is ready to be timed.

    Attributes:
      run: Makes the call; the value it returns may still be in flight.
      temp_bytes: Temporary memory of the program, or None if it is not known.
      units: Number of units of work per call, such as steps.
      result: Converts the value that `run` returns into the form that other
        implementations of the same quantity return.
    """

    run: Callable[[], Any]
    temp_bytes: int | None = None
    units: int = 1
    result: Callable[[Any], Any] = lambda returned: returned


class Cost(NamedTuple):
    """Measured cost of a call.

    Attributes:
      times: Seconds per unit, `[rounds]`. Each round measures all calls in turn.
      temp_bytes: Temporary memory, as in `Call`.
    """

    times: np.ndarray
    temp_bytes: int | None

    @property
    def seconds(self) -> float:
        """Median of the times."""
        return float(np.median(self.times))


def compile_call(function: Callable[..., Any], *args: Any) -> Call:
    """Compiles a function anew, for a fresh copy of its arguments."""
    args = jax.tree.map(jnp.copy, args)
    program = jax.jit(lambda *a: function(*a)).lower(*args).compile()
    return Call(lambda: program(*args), temp_bytes(program))


def measure(
    implementations: Callable[[], dict[str, Call]], *, rounds: int, repeats: int = 1
) -> dict[str, Cost]:
    """Times calls in turn, A B C A B C, after a warm-up.

    Args:
      implementations: Builds the calls, by name.
      rounds: Minimum number of measurements of each call per repeat. Short calls, whose
        times vary most, are measured up to five times as often.
      repeats: How often the calls are built anew. The place of large buffers in memory
        can change a time by a third, and is fixed when they are allocated.

    Returns:
      The `Cost` of each call, by name, over all rounds of all repeats.
    """
    measurements, calls = [], {}
    for _ in range(repeats):
        calls = implementations()
        plans = [(call.run, *_plan(call.run)) for call in calls.values()]
        until = time.perf_counter() + _MIN_ROUND_SECONDS * rounds
        for done in range(_MAX_ROUND_FACTOR * rounds):
            if done >= rounds and time.perf_counter() > until:
                break
            measurements.append([_seconds(*plan) for plan in plans])
    times = np.array(measurements).T
    return {
        name: Cost(row / call.units, call.temp_bytes)
        for row, (name, call) in zip(times, calls.items(), strict=True)
    }


def speed(cost: Cost, baseline: Cost) -> tuple[float, float, float]:
    """Median and quartiles over rounds of the baseline's time over the cost's.

    Above 1 is faster than the baseline.
    """
    ratios = np.quantile(baseline.times / cost.times, [0.5, 0.25, 0.75])
    return float(ratios[0]), float(ratios[1]), float(ratios[2])


def _seconds(run: Callable[[], Any], calls: int, warm_up: bool = True) -> float:
    """Mean seconds from a call to its result, after one call that is not timed.

    The first call refills the caches after a long call of another implementation.
    """
    if warm_up:
        jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / calls


def _plan(run: Callable[[], Any]) -> tuple[int, bool]:
    """Number of calls per measurement, and whether a warm-up precedes them."""
    seconds = _seconds(run, 1)
    if seconds > _LONG_CALL_SECONDS:
        return 1, False
    seconds = min(seconds, *(_seconds(run, 1) for _ in range(2)))
    return max(1, int(_MIN_MEASUREMENT_SECONDS / seconds)), True


def temp_bytes(program: Any) -> int:
    """Temporary memory of a compiled program, without its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def machine_limits() -> dict[str, float]:
    """Measures the highest rates of JAX's default device.

    Returns:
      "flop_per_second" of one large float32 matrix product, and "bytes_per_second" of a
      pass over an array larger than the caches, which is read and written in place.
    """
    on_cpu = jax.default_backend() == "cpu"
    width, length = (2048, 1 << 25) if on_cpu else (8192, 1 << 28)
    a = jnp.ones((width, width), jnp.float32)
    product = compile_call(jnp.matmul, a, a).run
    seconds = min(_seconds(product, 2) for _ in range(5))
    scale = jax.jit(lambda t: 0.5 * t, donate_argnums=0)
    array = jnp.ones(length, jnp.float32)
    passes = []
    for _ in range(7):
        start = time.perf_counter()
        array = jax.block_until_ready(scale(array))
        passes.append(time.perf_counter() - start)
    return {
        "flop_per_second": 2 * width**3 / seconds,
        "bytes_per_second": 8 * length / min(passes),
    }


def describe_machine() -> str:
    """The device and the processor of its host, as text."""
    device = jax.devices()[0]
    lines = []
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    host = f"{cli.cores()} cores of {names[0] if names else platform.processor()}"
    return host if device.platform == "cpu" else f"{device.device_kind}, {host}"


def load_warning() -> str | None:
    """A line to print before timings if other work is running, else None."""
    load = os.getloadavg()[0]
    if load < 0.75 * cli.cores():
        return None
    return (
        f"The machine is busy (load {load:.1f} on {cli.cores()} cores): timings are "
        "doubtful."
    )
