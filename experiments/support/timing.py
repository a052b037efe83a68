"""Time and temporary memory of calls, side by side, and what the machine can do."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.support.cli import cores

_LEAST_SECONDS = 2e-3  # of one measurement; shorter calls are repeated to fill it
_LONG_SECONDS = 0.05  # of a call that what came before it does not touch
_ROUND_SECONDS = 0.1  # of all sides once; shorter rounds are more,
_MORE_ROUNDS = 5  # times as many at most


class Call(NamedTuple):
    """Something ready to be timed.

    Attributes:
      run: The call; what it returns may still be on its way.
      temp_bytes: Temporary memory of its program, or None where nobody tells.
      units: How many of what is counted, such as steps, one run makes.
      result: From what `run` returns to what other sides of the same return.
    """

    run: Callable[[], Any]
    temp_bytes: int | None = None
    units: int = 1
    result: Callable[[Any], Any] = lambda returned: returned


class Cost(NamedTuple):
    """What a call costs.

    Attributes:
      times: Seconds a unit, `[rounds]`; a round measures all sides in turn.
      temp_bytes: As `Call`'s.
    """

    times: np.ndarray
    temp_bytes: int | None

    @property
    def seconds(self) -> float:
        """The median."""
        return float(np.median(self.times))


def compiled(function: Callable[..., Any], *args: Any) -> Call:
    """A function compiled anew for a copy of its arguments, made anew."""
    args = jax.tree.map(jnp.copy, args)
    program = jax.jit(lambda *a: function(*a)).lower(*args).compile()
    return Call(lambda: program(*args), temp_bytes(program))


def measure(
    sides: Callable[[], dict[str, Call]], *, rounds: int, repeats: int = 1
) -> dict[str, Cost]:
    """Times calls in turn, A B C A B C, after a warm-up.

    Args:
      sides: Makes the calls, by name.
      rounds: How often each is measured at least, in each repeat; short calls, whose
        times vary most, up to five times as often.
      repeats: How often the calls are made anew. Where large buffers happen to lie can
        change a time by a third, and lasts until then.

    Returns:
      The `Cost` of each, by name, over all rounds of all repeats.
    """
    measured, calls = [], {}
    for _ in range(repeats):
        calls = sides()
        plans = [(call.run, *_plan(call.run)) for call in calls.values()]
        until = time.perf_counter() + _ROUND_SECONDS * rounds
        for made in range(_MORE_ROUNDS * rounds):
            if made >= rounds and time.perf_counter() > until:
                break
            measured.append([_seconds(*plan) for plan in plans])
    times = np.array(measured).T
    return {
        name: Cost(row / call.units, call.temp_bytes)
        for row, (name, call) in zip(times, calls.items(), strict=True)
    }


def speed(mine: Cost, theirs: Cost) -> tuple[float, float, float]:
    """Their time over mine in each round, above 1 is faster: median and quartiles."""
    ratios = np.quantile(theirs.times / mine.times, [0.5, 0.25, 0.75])
    return float(ratios[0]), float(ratios[1]), float(ratios[2])


def _seconds(run: Callable[[], Any], calls: int, settle: bool = True) -> float:
    """Seconds from a call to its result, over some, if asked after one not timed.

    That one pays for what a long call of another side has left in the caches.
    """
    if settle:
        jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / calls


def _plan(run: Callable[[], Any]) -> tuple[int, bool]:
    """How many calls fill a measurement, and whether one is to come before them."""
    seconds = _seconds(run, 1)
    if seconds > _LONG_SECONDS:
        return 1, False
    seconds = min(seconds, *(_seconds(run, 1) for _ in range(2)))
    return max(1, int(_LEAST_SECONDS / seconds)), True


def temp_bytes(program: Any) -> int:
    """Temporary memory of a compiled program, its arguments and results not counted."""
    return program.memory_analysis().temp_size_in_bytes


def limits() -> dict[str, float]:
    """What JAX's default device does at best, measured here and now.

    Returns:
      "flop/s" of one large float32 matrix product, and "byte/s" of a pass over an
      array that outgrows the caches, read and written in place.
    """
    on_cpu = jax.default_backend() == "cpu"
    width, length = (2048, 1 << 25) if on_cpu else (8192, 1 << 28)
    a = jnp.ones((width, width), jnp.float32)
    product = compiled(jnp.matmul, a, a).run
    seconds = min(_seconds(product, 2) for _ in range(5))
    rates = {"flop/s": 2 * width**3 / seconds}
    scale = jax.jit(lambda t: 0.5 * t, donate_argnums=0)
    array = jnp.ones(length, jnp.float32)
    passes = []
    for _ in range(7):
        start = time.perf_counter()
        array = jax.block_until_ready(scale(array))
        passes.append(time.perf_counter() - start)
    return rates | {"byte/s": 8 * length / min(passes)}


def machine() -> str:
    """The device and its host's processor, in words."""
    device = jax.devices()[0]
    lines = []
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    host = f"{cores()} cores of {names[0] if names else platform.processor()}"
    return host if device.platform == "cpu" else f"{device.device_kind}, {host}"


def load_warning() -> str | None:
    """A line to print before timings when other work is running, else None."""
    load = os.getloadavg()[0]
    if load < 0.75 * cores():
        return None
    return (
        f"The machine is busy (load {load:.1f} on {cores()} cores): timings are "
        "doubtful."
    )
