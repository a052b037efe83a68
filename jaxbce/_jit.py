"""`jax.jit` that keeps the signature of a function, and names arguments in errors.

To a type checker, the result of `jax.jit` accepts any arguments, and what it returns is
unknown. At run time it refuses a table of pandas without the name of the argument.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax

from jaxbce import _validate

P = ParamSpec("P")
R = TypeVar("R")


class Jitted(Generic[P, R]):
    """A compiled function, with the signature of the original one."""

    __qualname__: str

    def __init__(self, fun: Callable[P, R], static_argnames: Sequence[str]):
        functools.update_wrapper(self, fun)
        self._jitted: Any = jax.jit(fun, static_argnames=static_argnames)
        self._static_argnames = static_argnames

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the function, compiled for the shapes and dtypes of its arguments."""
        try:
            return self._jitted(*args, **kwargs)
        except (TypeError, ValueError):
            arguments = inspect.signature(self).bind_partial(*args, **kwargs).arguments
            for name in self._static_argnames:
                arguments.pop(name, None)
            _validate.arrays(arguments)
            raise

    def __repr__(self) -> str:
        return f"<compiled function {self.__module__}.{self.__qualname__}>"

    def __reduce__(self) -> str:  # pickled by name, as a function is
        return self.__qualname__

    # These two also accept a jax.ShapeDtypeStruct in place of an array.
    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lowers the function for these arguments."""
        return self._jitted.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """Traces the function for these arguments."""
        return self._jitted.trace(*args, **kwargs)


def jit(
    *, static_argnames: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Jitted[P, R]]:
    """A decorator, `jax.jit` with these static arguments."""
    return functools.partial(Jitted, static_argnames=static_argnames)
