"""What is measured side by side: functions of a batch, of one size after another."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jax

from experiments.suites.case import OURS, Case, missing_among, results_of
from experiments.suites.workloads import arguments, quantities
from experiments.support.timing import Call, compiled

SMALL, MIDDLE, LARGE = (256, (30, 32, 1)), (1024, (128, 256, 1)), (1024, (128, 512, 1))
TEACHING, OUTPUTS = (32, (30, 16, 1)), (1024, (128, 512, 16))
DEEP, TALL = (1024, (64, 128, 64, 1)), (65536, (30, 64, 1))
WIDE, WIDE_OUTPUTS = (4096, (512, 1024, 1)), (4096, (512, 1024, 16))

# By suite, quantity and rows × layer sizes: from a teacher's example to what fills the
# caches of a CPU, and what fills an accelerator. --quick takes the first of each.
SIZES = {
    "gradient": {
        "gradient": (
            TEACHING,
            (256, (64, 100, 1)),
            LARGE,
            WIDE,
            WIDE_OUTPUTS,
            (8192, (1024, 2048, 1)),
            TALL,
        ),
        "64 gradients": (TEACHING, (569, (30, 32, 1)), (1024, (64, 64, 32, 1))),
        "sharded gradient": (WIDE, TALL),
    },
    "per_example": {
        "norms": (SMALL, MIDDLE, LARGE),
        "clipped sum": (SMALL, MIDDLE, LARGE, OUTPUTS, DEEP, WIDE),
        "inner products": ((512, (64, 256, 1)),),
    },
    "curvature": {
        "ntk": ((512, (64, 256, 1)),),
        "hvp": (TEACHING, (256, (64, 100, 1)), DEEP, LARGE, OUTPUTS, WIDE, TALL),
        "ggn_vp": (TEACHING, (256, (64, 100, 1)), DEEP, LARGE, OUTPUTS, WIDE, TALL),
    },
}
_MUCH = ((65536, (512, 1024, 1)), (1 << 20, (64, 128, 1)), (65536, (1024, 2048, 16)))
ACCELERATOR_SIZES = {
    "gradient": {
        "gradient": (LARGE, *_MUCH),
        "64 gradients": (TEACHING, (8192, (64, 64, 32, 1))),
        "sharded gradient": _MUCH[:1],
    },
    "per_example": {
        "norms": (LARGE, (8192, (128, 512, 1))),
        "clipped sum": (LARGE, (8192, (128, 512, 1)), (4096, (512, 1024, 1))),
        "inner products": ((8192, (64, 256, 1)),),
    },
    "curvature": {
        "ntk": ((4096, (64, 256, 1)),),
        "hvp": (LARGE, *_MUCH),
        "ggn_vp": (LARGE, *_MUCH),
    },
}
# Peers whose memory or time is a copy of the parameters for each row are left out where
# that is more than this many numbers.
_MOST_NUMBERS = 1 << 28


def case(
    suite: str,
    quantity: str,
    rows: int,
    layers: tuple[int, ...],
    key: jax.Array,
    *,
    peers: tuple[str, ...] | None = None,
    along: tuple[str, float] | None = None,
) -> Case:
    """One quantity of a batch at one size.

    Args:
      suite: Whose table it is for.
      quantity: A name in `quantities()`.
      rows: Rows of the batch.
      layers: Layer sizes.
      key: Seed of data and parameters.
      peers: Names of those to measure; None is all that fit.
      along: As in `Case`.
    """
    named = quantities()[quantity]
    args = named.placed(arguments(rows, layers, key, named.networks))
    copies = rows * sum(a * b + b for a, b in pairwise(layers))
    small = copies <= _MOST_NUMBERS
    chosen = {
        name: side
        for name, side in named.peers.items()
        if (small or suite != "per_example" or name in ("Opacus", *named.other_work))
        and (peers is None or name in peers)
    }

    missing = missing_among(chosen)

    def sides(args: Any = args) -> dict[str, Call]:
        theirs = {n: side(*args) for n, side in chosen.items() if n not in missing}
        return {OURS: compiled(named.ours, *args)} | theirs

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            return results(sides(jax.tree.map(lambda t: t.astype("float64"), args)))

    def results(calls: dict[str, Call]) -> dict[str, Any]:
        same = {n: call for n, call in calls.items() if n not in named.other_work}
        return results_of(same)

    given = args if quantity in ("hvp", "ggn_vp") else args[:3]
    moved = jax.tree.leaves((given, jax.eval_shape(named.ours, *args)))
    linear, pairs = named.products(layers)
    return Case(
        suite=suite,
        quantity=quantity,
        size=f"{rows}×{'→'.join(map(str, layers))}",
        sides=sides,
        results=results,
        tolerance=1e-5,  # float32: sums in another order
        flop=2.0 * (named.networks or 1) * rows * (linear + rows * pairs),
        bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in moved),
        missing=missing,
        exact=exact,
        along=along,
    )


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All of a suite, or the first size of each quantity."""
    sizes = SIZES if jax.default_backend() == "cpu" else ACCELERATOR_SIZES
    for quantity, several in sizes[suite].items():
        for rows, layers in several[: 1 if quick else None]:
            yield case(suite, quantity, rows, layers, key)
