"""Time and temporary memory of compiled functions, side by side."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_LEAST_SECONDS = 2e-3  # of one measurement; shorter calls are repeated to fill it


class Cost(NamedTuple):
    """What one function costs beside the first one measured with it.

    Attributes:
      seconds: Median seconds a call.
      speed: Median over rounds of the first one's time over this one's, and its
        quartiles: above 1 is faster.
      temp_bytes: Temporary memory of the compiled program, results not counted.
    """

    seconds: float
    speed: tuple[float, float, float]
    temp_bytes: int


def compare(
    functions: dict[str, Callable[..., Any]],
    *args: Any,
    rounds: int = 31,
    repeats: int = 1,
) -> dict[str, Cost]:
    """Times functions of the same arguments in turn, A B C A B C, after a warm-up.

    Args:
      functions: By name; the first is the one the others are compared with.
      *args: Their arguments.
      rounds: How often each is measured, in each repeat.
      repeats: How often to compile anew and copy the arguments anew. Where large
        buffers happen to lie can change a time by a third, and lasts until then.

    Returns:
      The `Cost` of each, by name, over all rounds of all repeats.
    """
    times, compiled = [], []
    for _ in range(repeats):
        copies = jax.tree.map(jnp.copy, args)
        compiled = [
            jax.jit(lambda *a, function=function: function(*a)).lower(*copies).compile()
            for function in functions.values()
        ]
        times.append(_times(compiled, copies, rounds))
    times = np.concatenate(times)
    speeds = np.quantile(times[:, :1] / times, [0.5, 0.25, 0.75], axis=0)
    return {
        name: Cost(
            float(np.median(times[:, i])),
            (float(speeds[0, i]), float(speeds[1, i]), float(speeds[2, i])),
            temp_bytes(compiled[i]),
        )
        for i, name in enumerate(functions)
    }


def compare_calls(
    functions: dict[str, Callable[[], Any]], *, rounds: int
) -> dict[str, tuple[float, tuple[float, float, float]]]:
    """Times whole calls in turn, after a warm-up; each is one measurement.

    Returns:
      By name, median seconds, and median and quartiles of the first one's time over
      this one's.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times = _times(list(functions.values()), (), rounds)
    speeds = np.quantile(times[:, :1] / times, [0.5, 0.25, 0.75], axis=0)
    return {
        name: (
            float(np.median(times[:, i])),
            (float(speeds[0, i]), float(speeds[1, i]), float(speeds[2, i])),
        )
        for i, name in enumerate(functions)
    }


def _times(compiled: list[Any], args: Any, rounds: int) -> np.ndarray:
    """Seconds a call, `[rounds, functions]`.

    Each is called once more before it is timed, so that a short call does not pay for
    what a long one of another function has left in the caches.
    """

    def seconds(function: Callable[..., Any], calls: int) -> float:
        jax.block_until_ready(function(*args))
        start = time.perf_counter()
        for _ in range(calls - 1):
            function(*args)
        jax.block_until_ready(function(*args))
        return (time.perf_counter() - start) / calls

    slowest = max(min(seconds(f, 1) for _ in range(3)) for f in compiled)
    calls = max(1, int(_LEAST_SECONDS / slowest))
    return np.array([[seconds(f, calls) for f in compiled] for _ in range(rounds)])


def temp_bytes(compiled: Any) -> int:
    """Temporary memory of a compiled program, its arguments and results not counted."""
    return compiled.memory_analysis().temp_size_in_bytes


def load_warning() -> str | None:
    """A line to print before timings when other work is running, else None."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.75 * cores:
        return None
    return (
        f"The machine is busy (load {load:.1f} on {cores} cores): timings are doubtful."
    )
