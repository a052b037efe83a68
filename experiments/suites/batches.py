"""Benchmark cases: functions of one batch, at several sizes."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jax

from experiments.suites.case import (
    JAXBCE,
    Case,
    layers_text,
    missing_among,
    results_of,
)
from experiments.suites.workloads import arguments, quantities
from experiments.support.timing import Call, compile_call

# Number of examples, layer sizes.
TINY, OUTPUTS = (32, (30, 16, 1)), (1024, (128, 512, 16))
SMALL, MIDDLE, LARGE = (256, (30, 32, 1)), (1024, (128, 256, 1)), (1024, (128, 512, 1))
DEEP, TALL = (1024, (64, 128, 64, 1)), (65536, (30, 64, 1))
WIDE, WIDE_OUTPUTS = (4096, (512, 1024, 1)), (4096, (512, 1024, 16))

# Sizes by suite and quantity, from a textbook example to more than the caches of a CPU
# hold. --quick measures the first size of each quantity.
SIZES = {
    "gradient": {
        "gradient": (
            TINY,
            (256, (64, 100, 1)),
            LARGE,
            WIDE,
            WIDE_OUTPUTS,
            (8192, (1024, 2048, 1)),
            TALL,
        ),
        "64 gradients": (TINY, (569, (30, 32, 1)), (1024, (64, 64, 32, 1))),
        "sharded gradient": (WIDE, TALL),
        "data-parallel gradient": (WIDE, TALL),
    },
    "per_example": {
        "norms": (SMALL, MIDDLE, LARGE),
        "clipped sum": (SMALL, MIDDLE, LARGE, OUTPUTS, DEEP, WIDE),
        "inner products": ((512, (64, 256, 1)),),
    },
    "curvature": {
        "ntk": ((512, (64, 256, 1)),),
        "hvp": (TINY, (256, (64, 100, 1)), DEEP, LARGE, OUTPUTS, WIDE, TALL),
        "ggn_vp": (TINY, (256, (64, 100, 1)), DEEP, LARGE, OUTPUTS, WIDE, TALL),
    },
}
_HUGE = ((65536, (512, 1024, 1)), (1 << 20, (64, 128, 1)), (65536, (1024, 2048, 16)))
ACCELERATOR_SIZES = {
    "gradient": {
        "gradient": (LARGE, *_HUGE),
        "64 gradients": (TINY, (8192, (64, 64, 32, 1))),
        "sharded gradient": _HUGE[:1],
        "data-parallel gradient": _HUGE[:1],
    },
    "per_example": {
        "norms": (LARGE, (8192, (128, 512, 1))),
        "clipped sum": (LARGE, (8192, (128, 512, 1)), (4096, (512, 1024, 1))),
        "inner products": ((8192, (64, 256, 1)),),
    },
    "curvature": {
        "ntk": ((4096, (64, 256, 1)),),
        "hvp": (LARGE, *_HUGE),
        "ggn_vp": (LARGE, *_HUGE),
    },
}
# Baselines that hold a copy of the parameters per example are left out if the copies
# have more numbers than this.
_MAX_COPIED_NUMBERS = 1 << 28


def case(
    suite: str,
    quantity: str,
    num_examples: int,
    layers: tuple[int, ...],
    key: jax.Array,
    *,
    baselines: tuple[str, ...] | None = None,
    scaling_axis: tuple[str, float] | None = None,
) -> Case:
    """One quantity of a batch at one size.

    Args:
      suite: Name of the suite.
      quantity: A name in `quantities()`.
      num_examples: Number of examples in the batch.
      layers: Layer sizes.
      key: Random key for the data and the parameters.
      baselines: Names of the baselines to measure; None is all that fit in memory.
      scaling_axis: As in `Case`.
    """
    workload = quantities()[quantity]
    args = workload.to_devices(arguments(num_examples, layers, key, workload.networks))
    copies = num_examples * sum(a * b + b for a, b in pairwise(layers))
    copies_fit = suite != "per_example" or copies <= _MAX_COPIED_NUMBERS
    chosen = {
        name: baseline
        for name, baseline in workload.baselines.items()
        if (copies_fit or name in ("Opacus", *workload.other_work))
        and (baselines is None or name in baselines)
    }
    missing = missing_among(chosen)

    def implementations(args: Any = args) -> dict[str, Call]:
        calls = {JAXBCE: compile_call(workload.function, *args)}
        for name, baseline in chosen.items():
            if name not in missing:
                calls[name] = baseline(*args)
        return calls

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            args_64 = jax.tree.map(lambda t: t.astype("float64"), args)
            return results(implementations(args_64))

    def results(calls: dict[str, Call]) -> dict[str, Any]:
        return results_of(
            {n: call for n, call in calls.items() if n not in workload.other_work}
        )

    inputs = args if quantity in ("hvp", "ggn_vp") else args[:3]
    moved = jax.tree.leaves((inputs, jax.eval_shape(workload.function, *args)))
    per_example, per_pair = workload.products(layers)
    multiplications = num_examples * (per_example + num_examples * per_pair)
    return Case(
        suite=suite,
        quantity=quantity,
        size=f"{num_examples}×{layers_text(layers)}",
        implementations=implementations,
        results=results,
        tolerance=1e-5,  # float32: sums in another order
        flop=2.0 * (workload.networks or 1) * multiplications,
        bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in moved),
        missing=missing,
        exact=exact,
        scaling_axis=scaling_axis,
    )


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All cases of a suite, or the first size of each quantity if `quick`."""
    sizes = SIZES if jax.default_backend() == "cpu" else ACCELERATOR_SIZES
    for quantity, quantity_sizes in sizes[suite].items():
        for num_examples, layers in quantity_sizes[: 1 if quick else None]:
            yield case(suite, quantity, num_examples, layers, key)
