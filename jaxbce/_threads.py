"""Programs of one network, run by the threads of a warpgroup of a GPU.

Pallas for Mosaic GPU has no small products, no slices of registers and few layouts.
None is needed here: a program that JAX has traced at the shapes of one network is run
number by number. Each number in its arrays is one of every thread, in a register array
`[networks, lanes]`, or a scalar that threads share. Reshapes and transposes then cost
nothing, and products are unrolled. Several lanes may share a network: `lax.psum` over
`LANES` adds up what they have.

Numbers are computed when they are first needed, so the order in which results are read
decides how many registers are in use at a time.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.extend.core import primitives as p

from jaxbce import _elementwise
from jaxbce._layouts import Columns, matmul

LANES = "lanes"  # the axis of the lanes that share a network


class Shares(Columns):
    """`Columns` for a lane that has a share of the units of the only hidden layer."""

    def affine(
        self, k: int, h: jax.Array, w: jax.Array, b: jax.Array, dtype: Any = None
    ) -> jax.Array:
        """`a_k = W_k h_{k-1} + b_k`, `[n_k, N]`; for k = 2, a sum over all lanes."""
        if k == 1:
            return super().affine(k, h, w, b, dtype)
        return lax.psum(matmul(w, h, dtype), LANES) + b[:, None]


class Number:
    """A number of every thread, computed when its value is first read.

    Attributes:
      dtype: Its dtype.
    """

    def __init__(self, dtype: Any, compute: Callable[[], Any]) -> None:
        self.dtype, self._compute = dtype, compute

    @functools.cached_property
    def value(self) -> Any:
        """A register array or a scalar."""
        return self._compute()


def array(shape: tuple[int, ...], numbers: Iterable[Any]) -> np.ndarray:
    """An array of `Number`s, register arrays or scalars, last axis first."""
    result = np.empty(math.prod(shape), object)
    for i, number in enumerate(numbers):
        result[i] = number
    return result.reshape(shape)


def value(number: Any) -> Any:
    """The value of a number in an array."""
    return number.value if isinstance(number, Number) else number


class Threads(NamedTuple):
    """The threads of a warpgroup.

    Attributes:
      lanes: Number of threads per network.
      sum_lanes: Adds the registers `[networks, lanes]` of the lanes of a network.
    """

    lanes: int
    sum_lanes: Callable[[jax.Array], jax.Array]

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, of arrays of one network, as a function of what `array` returns.

        Its arguments and results are pytrees of such arrays, with the shapes of those
        of the function, which is traced once for all calls with the same shapes.
        """

        @functools.cache
        def trace(structure: Any, shapes: tuple[Any, ...]) -> tuple[Any, Any]:
            leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
            environment = [(LANES, self.lanes)]
            traced = jax.make_jaxpr(function, axis_env=environment, return_shape=True)
            return traced(*jax.tree.unflatten(structure, leaves))

        def run(*args: Any) -> Any:
            leaves, structure = jax.tree.flatten(args)
            shapes = tuple((t.shape, jnp.dtype(t.flat[0].dtype)) for t in leaves)
            closed, out = trace(structure, shapes)
            results = self._evaluate(closed, leaves)
            return jax.tree.unflatten(jax.tree.structure(out), results)

        return run

    def _evaluate(self, closed: Any, args: Sequence[np.ndarray]) -> list[np.ndarray]:
        jaxpr = closed.jaxpr
        env = dict(zip(jaxpr.constvars, map(_constant, closed.consts), strict=True))
        env |= dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> np.ndarray:
            return _constant(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            if (called := _elementwise.CALLS.get(eqn.primitive)) is not None:
                results = self._evaluate(eqn.params[called], operands)
            elif eqn.primitive is p.psum_p:
                results = [
                    _map(v.aval.dtype, self.sum_lanes, t)
                    for v, t in zip(eqn.outvars, operands, strict=True)
                ]
            elif (rule := _RULES.get(eqn.primitive)) is not None:
                results = [rule(eqn, *operands)]
            else:
                operation = functools.partial(_operation, eqn)
                results = [_map(eqn.outvars[0].aval.dtype, operation, *operands)]
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]


def _constant(t: Any) -> np.ndarray:
    t = np.asarray(t)
    return array(t.shape, iter(t.flat))


def _map(dtype: Any, function: Callable[..., Any], *operands: np.ndarray) -> np.ndarray:
    """Applies a function of values to all numbers of arrays."""
    arrays = np.broadcast_arrays(*operands)

    def number(*numbers: Any) -> Number:
        return Number(dtype, lambda: function(*map(value, numbers)))

    return array(arrays[0].shape, map(number, *(t.flat for t in arrays)))


def _operation(eqn: Any, *operands: Any) -> jax.Array:
    """One elementwise operation, of those that Mosaic GPU has."""
    shape = jnp.broadcast_shapes(*map(jnp.shape, operands))
    operands = tuple(_broadcast_to(t, shape) for t in operands)
    if (substitute := _SUBSTITUTES.get(eqn.primitive)) is not None:
        return substitute(eqn, *operands)
    return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))


def _broadcast_to(t: Any, shape: tuple[int, ...]) -> Any:
    return t if jnp.shape(t) == shape else lax.broadcast(t, shape)


def _convert(eqn: Any, t: jax.Array) -> jax.Array:
    dtype = eqn.params["new_dtype"]
    if t.dtype == bool:
        return jnp.where(t, jnp.ones(t.shape, dtype), jnp.zeros(t.shape, dtype))
    return (
        t != 0
        if jnp.issubdtype(dtype, jnp.bool_)
        else lax.convert_element_type(t, dtype)
    )


def _integer_power(eqn: Any, t: jax.Array) -> jax.Array:
    power = eqn.params["y"]
    result = jnp.ones_like(t) if power == 0 else t
    for _ in range(abs(power) - 1):
        result *= t
    return 1 / result if power < 0 else result


def _log1p(_: Any, t: jax.Array) -> jax.Array:
    u = 1 + t  # Kahan: the rounding of u cancels in the quotient
    is_exact = (u == 1) | (u == jnp.inf)
    return jnp.where(is_exact, t, lax.log(u) * (t / jnp.where(is_exact, 1, u - 1)))


def _sign(_: Any, t: jax.Array) -> jax.Array:
    one = jnp.ones_like(t)
    return jnp.where(t > 0, one, jnp.where(t < 0, -one, t))


def _sqrt(_: Any, t: jax.Array) -> jax.Array:
    inverse = lax.rsqrt(t)
    root = t * inverse
    root += 0.5 * inverse * (t - root * root)  # one step of Newton's method
    return jnp.where((t == 0) | (t == jnp.inf), t, root)


_SUBSTITUTES = {
    p.convert_element_type_p: _convert,
    p.copy_p: lambda _, t: t,
    p.integer_pow_p: _integer_power,
    p.is_finite_p: lambda _, t: abs(t) < jnp.inf,
    p.log1p_p: _log1p,
    p.sign_p: _sign,
    p.sqrt_p: _sqrt,
}


def _broadcast(eqn: Any, t: np.ndarray) -> np.ndarray:
    shape = eqn.params["shape"]
    expanded = [1] * len(shape)
    for size, axis in zip(t.shape, eqn.params["broadcast_dimensions"], strict=True):
        expanded[axis] = size
    return np.broadcast_to(t.reshape(expanded), shape)


def _slice(eqn: Any, t: np.ndarray) -> np.ndarray:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * t.ndim
    return t[tuple(map(slice, start, limit, strides))]


def _sum_products(dtype: Any, *factors: np.ndarray) -> Number:
    """The sum of the products of some vectors."""

    def compute() -> Any:
        result: Any = None
        for numbers in zip(*factors, strict=True):
            term, *others = map(value, numbers)
            for other in others:
                shape = jnp.broadcast_shapes(jnp.shape(term), jnp.shape(other))
                term = lax.mul(*(_broadcast_to(t, shape) for t in (term, other)))
            if result is None:
                result = term
            else:
                shape = jnp.broadcast_shapes(jnp.shape(term), jnp.shape(result))
                result = lax.add(*(_broadcast_to(t, shape) for t in (result, term)))
        return result

    return Number(dtype, compute)


def _vectors(t: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The vectors of `t` along some axes, as the last axis."""
    kept = [a for a in range(t.ndim) if a not in axes]
    t = t.transpose(*kept, *axes)
    return t.reshape(*t.shape[: len(kept)], -1)


def _reduce_sum(eqn: Any, t: np.ndarray) -> np.ndarray:
    vectors, dtype = _vectors(t, eqn.params["axes"]), eqn.outvars[0].aval.dtype
    numbers = (_sum_products(dtype, v) for v in vectors.reshape(-1, vectors.shape[-1]))
    return array(vectors.shape[:-1], numbers)


def _product(eqn: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A product without batch dimensions."""
    axes, _ = eqn.params["dimension_numbers"]
    left, right = map(_vectors, (left, right), axes)
    pairs = itertools.product(*(t.reshape(-1, t.shape[-1]) for t in (left, right)))
    dtype = eqn.outvars[0].aval.dtype
    numbers = (_sum_products(dtype, *pair) for pair in pairs)
    return array(left.shape[:-1] + right.shape[:-1], numbers)


_RULES: dict[Any, Callable[..., np.ndarray]] = {
    p.broadcast_in_dim_p: _broadcast,
    p.concatenate_p: lambda eqn, *t: np.concatenate(t, axis=eqn.params["dimension"]),
    p.dot_general_p: _product,
    p.reduce_sum_p: _reduce_sum,
    p.reshape_p: lambda eqn, t: t.reshape(eqn.params["new_sizes"]),
    p.slice_p: _slice,
    p.squeeze_p: lambda eqn, t: t.squeeze(eqn.params["dimensions"]),
    p.transpose_p: lambda eqn, t: t.transpose(eqn.params["permutation"]),
}
