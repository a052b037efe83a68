"""`jax.jit` that keeps the signature of a function, and names arguments in errors.

To a type checker, the result of `jax.jit` accepts any arguments, and what it returns is
unknown. At run time it refuses a table of pandas without the name of the argument.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import jax

from jaxbce import _validate

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

    def decorate(fun: Callable[P, R]) -> Jitted[P, R]:
        jitted = jax.jit(fun, static_argnames=static_argnames)

        @functools.wraps(fun)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return jitted(*args, **kwargs)
            except (TypeError, ValueError):
                bound = inspect.signature(fun).bind_partial(*args, **kwargs).arguments
                _validate.arrays(
                    {k: v for k, v in bound.items() if k not in static_argnames}
                )
                raise

        decorated: Any = call
        decorated.lower, decorated.trace = jitted.lower, jitted.trace
        return decorated

    return decorate
