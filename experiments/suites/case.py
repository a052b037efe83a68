"""Benchmark cases: one quantity at one size, computed by several implementations."""

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from experiments.support.timing import Call

JAXBCE = "jaxbce"
_LIBRARIES = {  # optional libraries of a baseline
    "jax_privacy": ("jax_privacy",),
    "jax_privacy by 32": ("jax_privacy",),
    "Opacus": ("torch", "opacus"),
    "PyTorch": ("torch",),
    "PyTorch, one": ("torch",),
    "dattri": ("torch", "dattri.algorithm.influence_function"),
    "laplace-torch": ("torch", "laplace"),
    "torch.func.vmap": ("torch",),
}


class Case(NamedTuple):
    """One quantity at one size, and its implementations.

    Attributes:
      suite: Name of the suite.
      quantity: Name of the quantity that is computed.
      size: Size of the problem, as text.
      implementations: Builds the calls by name, `JAXBCE` first and then the baselines.
      results: Maps the calls to the values that must agree, by name. Baselines that do
        other work are left out, and are not compared.
      tolerance: Largest relative difference of a leaf, in the norm.
      loose_tolerance: Largest difference of the results of the calls themselves where
        `exact` decides.
      flop: Floating-point operations per unit in jaxbce's matrix products.
      bytes: Minimum number of bytes to read and write per unit.
      unit: Unit of work that times are given for.
      missing: Baselines that are left out because a library cannot be imported.
      exact: Results of the same implementations in float64. They decide where those of
        float32 differ by more than `tolerance`: in a large batch some ReLU units are
        within a rounding of 0, and a long run amplifies roundings.
      scaling_axis: Name and value of what grows along a scaling curve, or None.
    """

    suite: str
    quantity: str
    size: str
    implementations: Callable[[], dict[str, Call]]
    results: Callable[[dict[str, Call]], dict[str, Any]]
    tolerance: float
    loose_tolerance: float = 1e-2
    flop: float = 0.0
    bytes: float = 0.0
    unit: str = "call"
    missing: tuple[str, ...] = ()
    exact: Callable[[], dict[str, Any]] | None = None
    scaling_axis: tuple[str, float] | None = None


def results_of(calls: dict[str, Call]) -> dict[str, Any]:
    """Makes each call and returns its result in comparable form."""
    return {name: call.result(call.run()) for name, call in calls.items()}


def missing_among(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the baselines whose libraries cannot be imported."""
    return tuple(
        name for name in names if not all(map(_importable, _LIBRARIES.get(name, ())))
    )


@functools.cache
def _importable(library: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(library)
        except Exception:  # a broken installation can raise anything
            return False
    return True


def layers_text(layers: tuple[int, ...]) -> str:
    """Layer sizes as text, such as 30→16→1."""
    return "→".join(map(str, layers))


def multiplications(layers: tuple[int, ...]) -> tuple[int, int]:
    """Multiplications per example in a forward pass: of all layers, of the first."""
    products = [a * b for a, b in pairwise(layers)]
    return sum(products), products[0]


def gradient_multiplications(layers: tuple[int, ...]) -> int:
    """Multiplications per example in the matrix products of a gradient.

    The forward pass and the weights' gradients take as many each; the backward pass
    takes those of all layers but the first.
    """
    every, first = multiplications(layers)
    return 3 * every - first
