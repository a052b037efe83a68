"""What the benchmark measures side by side, in one form for all that it measures."""

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from experiments.support.timing import Call

OURS = "jaxbce"
_LIBRARIES = {  # that a side needs beyond what experiments need anyway
    "jax_privacy": ("jax_privacy",),
    "jax_privacy by 32": ("jax_privacy",),
    "Opacus": ("torch", "opacus"),
    "PyTorch": ("torch",),
    "PyTorch, one": ("torch",),
    "torch.func.vmap": ("torch",),
}


class Case(NamedTuple):
    """One quantity at one size, and all who compute it.

    Attributes:
      suite: Whose table it is in.
      quantity: What is computed.
      size: Of what, in words.
      sides: Makes the calls anew, `OURS` first.
      results: Of calls that `sides` made, by side, what they must agree on; a side that
        it leaves out does other work, which is not compared.
      tolerance: The largest relative difference of a leaf, in the norm.
      rough: What the calls' own results must be within where `exact` decides.
      flop: Floating-point operations that the matrix products of ours take, a unit.
      bytes: What must be read and written at least, a unit.
      unit: What the seconds are of.
      missing: Sides that are left out because a library cannot be imported.
      exact: The results of the same sides in float64, which decide where those of
        float32 differ by more than `tolerance`: a large batch has units of relu within
        a rounding of 0, and a long run makes much of roundings.
      along: What grows on a scaling curve, and how large it is here; or None.
    """

    suite: str
    quantity: str
    size: str
    sides: Callable[[], dict[str, Call]]
    results: Callable[[dict[str, Call]], dict[str, Any]]
    tolerance: float
    rough: float = 1e-2
    flop: float = 0.0
    bytes: float = 0.0
    unit: str = "call"
    missing: tuple[str, ...] = ()
    exact: Callable[[], dict[str, Any]] | None = None
    along: tuple[str, float] | None = None


def results_of(calls: dict[str, Call]) -> dict[str, Any]:
    """What each returns, in the form in which they can be compared."""
    return {name: call.result(call.run()) for name, call in calls.items()}


def missing_among(names: Iterable[str]) -> tuple[str, ...]:
    """Those whose libraries cannot be imported."""
    return tuple(
        name for name in names if not all(map(_importable, _LIBRARIES.get(name, ())))
    )


@functools.cache
def _importable(library: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(library)
        except Exception:  # a broken installation fails in any way it likes
            return False
    return True


def multiplications(layers: tuple[int, ...]) -> tuple[int, int]:
    """Those a row in all layers' matrix products, once forward, and in the first's."""
    products = [a * b for a, b in pairwise(layers)]
    return sum(products), products[0]


def of_gradient(layers: tuple[int, ...]) -> int:
    """Multiplications a row in the matrix products of a gradient.

    Forward, and for the weights as many again; back through all layers but the first.
    """
    every, first = multiplications(layers)
    return 3 * every - first
