"""Per-example work and curvature beside what JAX users otherwise write for it.

A quantity has a function of ours and peers that compute the same; the first peer is
also what ours is checked against. All take `(params, x, y, v)`, v like params.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import jaxbce
from experiments import _baselines
from jaxbce import curvature, per_example
from jaxbce.network import Params

MAX_NORM = 1.0  # what "clipped" clips to; about half of the rows are

Function = Callable[[Params, jax.Array, jax.Array, Params], Any]


class Contest(NamedTuple):
    """One quantity.

    Attributes:
      ours: The function of jaxbce.
      truth: Another that computes the same, in its own way.
      peers: By name, what ours is timed against; a name whose library is missing has
        None.
    """

    ours: Function
    truth: Function
    peers: dict[str, Function | None]


def _row_gradients(params: Params, x: jax.Array, y: jax.Array) -> Params:
    def row(x: jax.Array, y: jax.Array) -> Params:
        return jax.grad(_baselines.plain_loss)(params, x[None], y[None])

    return jax.vmap(row)(x, y)


def _row_norms(grads: Params) -> jax.Array:
    squares = (
        jnp.sum(jnp.square(leaf), axis=range(1, leaf.ndim))
        for leaf in jax.tree.leaves(grads)
    )
    return jnp.sqrt(sum(squares, start=jnp.zeros(())))


def _matrix(grads: Params) -> jax.Array:
    leaves = jax.tree.leaves(grads)
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _vmap_norms(params: Params, x: jax.Array, y: jax.Array, v: Params) -> jax.Array:
    return _row_norms(_row_gradients(params, x, y))


def _vmap_clipped(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    grads = _row_gradients(params, x, y)
    kept = jnp.minimum(1, MAX_NORM / _row_norms(grads))
    return jax.tree.map(lambda g: jnp.tensordot(kept, g, 1), grads)


def _vmap_products(params: Params, x: jax.Array, y: jax.Array, v: Params) -> jax.Array:
    matrix = _matrix(_row_gradients(params, x, y))
    return matrix @ matrix.T


def _jax_privacy_clipped(microbatch_size: int | None) -> Function | None:
    try:
        import jax_privacy
    except ImportError:
        return None
    clipped = jax_privacy.clipped_grad(
        _baselines.plain_loss,
        l2_clip_norm=MAX_NORM,
        batch_argnums=(1, 2),
        microbatch_size=microbatch_size,
    )
    return lambda params, x, y, v: clipped(params, x, y)


def _plain_gradient(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Any:
    return jax.value_and_grad(_baselines.plain_loss)(params, x, y)


def _explicit_kernel(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Any:
    jacobian = jax.jacrev(_baselines.plain_logits)(params, x[:, None])
    matrix = _matrix(jax.tree.map(lambda t: t[:, 0, 0], jacobian))
    return matrix @ matrix.T


def _row_kernel(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Any:
    def row(x: jax.Array) -> Params:
        return jax.grad(lambda p: _baselines.plain_logits(p, x[None])[0, 0])(params)

    matrix = _matrix(jax.vmap(row)(x))
    return matrix @ matrix.T


def _jvp_of_gradient(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    gradient = functools.partial(jax.grad(_baselines.plain_loss), x=x, y=y)
    return jax.jvp(gradient, (params,), (v,))[1]


def _jvp_and_vjp(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    def of_logits(a: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(a, y).sum() / len(y)

    def logits(params: Params) -> jax.Array:
        return _baselines.plain_logits(params, x)

    a, a_dot = jax.jvp(logits, (params,), (v,))
    _, back = jax.vjp(logits, params)
    return back(jax.jvp(jax.grad(of_logits), (a,), (a_dot,))[1])[0]


def _clipped(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    options: Any = {"max_norm": MAX_NORM, "reduction": "sum"}
    return per_example.clipped_value_and_grad(params, x, y, **options).grads


@functools.cache
def contests() -> dict[str, Contest]:
    """All of them, by the name of the quantity."""
    gradient_jvp: dict[str, Function | None] = {"jvp of jax.grad": _jvp_of_gradient}
    return {
        "norms": Contest(
            lambda params, x, y, v: per_example.norms(params, x, y),
            _vmap_norms,
            {"vmap(jax.grad)": _vmap_norms},
        ),
        "clipped sum": Contest(
            _clipped,
            _vmap_clipped,
            {
                "vmap(jax.grad)": _vmap_clipped,
                "jax_privacy": _jax_privacy_clipped(None),
                "jax_privacy by 32": _jax_privacy_clipped(32),
                "one gradient": _plain_gradient,
            },
        ),
        "inner products": Contest(
            lambda params, x, y, v: per_example.inner_products(params, x, y, x, y),
            _vmap_products,
            {"vmap(jax.grad)": _vmap_products},
        ),
        "ntk": Contest(
            lambda params, x, y, v: curvature.ntk(params, x),
            _row_kernel,
            {"jacrev": _explicit_kernel, "vmap(jax.grad)": _row_kernel},
        ),
        "hvp": Contest(
            lambda params, x, y, v: curvature.hvp(params, x, y, v),
            _jvp_of_gradient,
            gradient_jvp,
        ),
        "ggn_vp": Contest(
            lambda params, x, y, v: curvature.ggn_vp(params, x, y, v),
            _jvp_and_vjp,
            {**gradient_jvp, "jvp and vjp": _jvp_and_vjp},
        ),
    }


def arguments(n: int, layers: tuple[int, ...], key: jax.Array) -> Any:
    """`(params, x, y, v)`, float32, at random."""
    key_p, key_x, key_y, key_v = jax.random.split(key, 4)
    params = jaxbce.init(key_p, layers)
    x = jax.random.normal(key_x, (n, layers[0]))
    y = jax.random.bernoulli(key_y, shape=(n, layers[-1])).astype(x.dtype)
    point, unravel = ravel_pytree(params)
    return params, x, y, unravel(jax.random.normal(key_v, point.shape))
