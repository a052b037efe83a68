"""Benchmark cases: how cost grows with examples, widths, networks and batches."""

import functools
from collections.abc import Iterator
from typing import Any

import jax

from experiments.suites import batches, training
from experiments.suites.case import Case

_EXAMPLES = (64, 512, 4096, 32768)
_ACCELERATOR_EXAMPLES = (4096, 65536, 1 << 20)
_WIDTHS = (32, 128, 512, 2048)
_MEMBERS = (1, 8, 64, 512, 4096)
_ACCELERATOR_MEMBERS = (1, 64, 4096, 100000)
_BATCHES = (1, 8, 64, 512)


def _curves(key: jax.Array) -> Iterator[Case]:
    """Points of the scaling curves: one size grows, all others are fixed."""
    on_cpu = jax.default_backend() == "cpu"
    batch_case = functools.partial(batches.case, "scaling", key=key)
    plain: Any = {"baselines": ("jax.grad",)}
    mapped: Any = {"baselines": ("vmap(jax.grad)",)}
    for n in _EXAMPLES if on_cpu else _ACCELERATOR_EXAMPLES:
        size: Any = {"num_examples": n, "layers": (64, 128, 1)}
        size |= {"scaling_axis": ("examples", n)}
        yield batch_case("gradient", **size, **plain)
        for quantity in ("clipped sum", "ntk"):
            if n <= 4096:
                yield batch_case(quantity, **size, **mapped)
    for width in _WIDTHS:
        size = {"num_examples": 1024, "layers": (64, width, 1)}
        size |= {"scaling_axis": ("width", width)}
        yield batch_case("gradient", **size, **plain)
        yield batch_case("clipped sum", **size, **mapped)
    sweep_case = functools.partial(training.sweep_case, "scaling", key=key)
    for members in _MEMBERS if on_cpu else _ACCELERATOR_MEMBERS:
        axis = ("members", members)
        yield sweep_case(members, 512, 32, (30, 16, 1), "sgd", scaling_axis=axis)
    for batch in _BATCHES:
        axis = ("batch", batch)
        yield sweep_case(256, 512, batch, (30, 16, 1), "sgd", scaling_axis=axis)


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All cases of suite "scaling", or the first two of the gradient if `quick`."""
    del suite
    first_axes = [("examples", n) for n in _EXAMPLES[:2]]
    for case in _curves(key):
        if not quick or (
            case.quantity == "gradient" and case.scaling_axis in first_axes
        ):
            yield case
