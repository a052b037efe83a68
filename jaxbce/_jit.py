"""`jax.jit` that keeps the signature of a function for type checkers.

To a checker, the result of `jax.jit` accepts any arguments, and what it returns is
unknown. Only the annotations differ here: at run time the result is that of `jax.jit`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Jitted(Protocol[P, R_co]):
    """A compiled function, with the signature of the original one."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Calls the function, compiled for the shapes and dtypes of its arguments."""
        ...

    # These two also accept a jax.ShapeDtypeStruct in place of an array.
    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lowers the function for these arguments."""
        ...

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """Traces the function for these arguments."""
        ...


def jit(
    *, static_argnames: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Jitted[P, R]]:
    """A decorator, `jax.jit` with these static arguments."""
    return functools.partial(jax.jit, static_argnames=static_argnames)
