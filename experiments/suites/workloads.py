"""What is computed of a batch, by a function of jaxbce's and by its peers.

Peers are plain JAX as a user would write it, jax_privacy, PyTorch and Opacus. All
take `(params, x, y, v)`, v like params.
"""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import jaxbce
from experiments.suites import torch_peers
from experiments.suites.case import multiplications, of_gradient
from experiments.support import baselines
from experiments.support.timing import Call, compiled
from jaxbce import curvature, per_example
from jaxbce.network import Params

MAX_NORM = 1.0  # what "clipped" clips to; about half of the rows are

Function = Callable[[Params, jax.Array, jax.Array, Params], Any]
Side = Callable[..., Call]  # of the same arguments


class Quantity(NamedTuple):
    """A function of a batch.

    Attributes:
      ours: The function of jaxbce.
      peers: By name, what it is timed against.
      products: Matrix products of ours: by layer sizes, the multiplications a row in
        those whose cost is linear in rows, and a row and row in those of all pairs.
      other_work: Peers that compute something else, to compare the price with.
      networks: None, or that params are of so many networks that share the batch.
      placed: Puts the arguments where the sides expect them.
    """

    ours: Function
    peers: dict[str, Side]
    products: Callable[[tuple[int, ...]], tuple[int, int]]
    other_work: tuple[str, ...] = ()
    networks: int | None = None
    placed: Callable[[Any], Any] = lambda args: args


def _row_gradients(params: Params, x: jax.Array, y: jax.Array) -> Params:
    def row(x: jax.Array, y: jax.Array) -> Params:
        return jax.grad(baselines.plain_loss)(params, x[None], y[None])

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


def _plain_gradient(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Any:
    return jax.value_and_grad(baselines.plain_loss)(params, x, y)


def _gradient(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Any:
    return jaxbce.value_and_grad(params, x, y)


def _vmap_norms(params: Params, x: jax.Array, y: jax.Array, v: Params) -> jax.Array:
    return _row_norms(_row_gradients(params, x, y))


def _vmap_clipped(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    grads = _row_gradients(params, x, y)
    kept = jnp.minimum(1, MAX_NORM / _row_norms(grads))
    return jax.tree.map(lambda g: jnp.tensordot(kept, g, 1), grads)


def _vmap_products(params: Params, x: jax.Array, y: jax.Array, v: Params) -> jax.Array:
    matrix = _matrix(_row_gradients(params, x, y))
    return matrix @ matrix.T


def _explicit_kernel(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Any:
    jacobian = jax.jacrev(baselines.plain_logits)(params, x[:, None])
    matrix = _matrix(jax.tree.map(lambda t: t[:, 0, 0], jacobian))
    return matrix @ matrix.T


def _row_kernel(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Any:
    def row(x: jax.Array) -> Params:
        return jax.grad(lambda p: baselines.plain_logits(p, x[None])[0, 0])(params)

    matrix = _matrix(jax.vmap(row)(x))
    return matrix @ matrix.T


def _jvp_of_gradient(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    gradient = functools.partial(jax.grad(baselines.plain_loss), x=x, y=y)
    return jax.jvp(gradient, (params,), (v,))[1]


def _jvp_and_vjp(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    def of_logits(a: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(a, y).sum() / len(y)

    def logits(params: Params) -> jax.Array:
        return baselines.plain_logits(params, x)

    a, a_dot = jax.jvp(logits, (params,), (v,))
    _, back = jax.vjp(logits, params)
    return back(jax.jvp(jax.grad(of_logits), (a,), (a_dot,))[1])[0]


def _clipped(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    options: Any = {"max_norm": MAX_NORM, "reduction": "sum"}
    return per_example.clipped_value_and_grad(params, x, y, **options).grads


def _jax_privacy_clipped(microbatch_size: int | None) -> Side:
    def side(*args: Any) -> Call:
        import jax_privacy

        clipped = jax_privacy.clipped_grad(
            baselines.plain_loss,
            l2_clip_norm=MAX_NORM,
            batch_argnums=(1, 2),
            microbatch_size=microbatch_size,
        )
        return compiled(lambda params, x, y, v: clipped(params, x, y), *args)

    return side


def _networks(function: Function) -> Function:
    return jax.vmap(function, in_axes=(0, None, None, None))


def _over_devices(function: Function) -> Function:
    """The mean over the rows of all devices, each of which has its part of them."""

    def part(params: Params, x: jax.Array, y: jax.Array) -> Any:
        varying = jax.lax.pcast(params, "rows", to="varying")
        return jax.lax.pmean(function(varying, x, y, params), "rows")

    specs: Any = {"in_specs": _BY_ROWS[:3], "out_specs": jax.P()}
    spread = jax.shard_map(part, mesh=_row_mesh(), **specs)
    return lambda params, x, y, v: spread(params, x, y)


_BY_ROWS = jax.P(), jax.P("rows"), jax.P("rows"), jax.P()


def _row_mesh() -> jax.sharding.Mesh:
    devices = jax.devices()
    devices = devices[: 1 << (len(devices).bit_length() - 1)]  # which divide the rows
    return jax.sharding.Mesh(np.array(devices), ("rows",))


def _placed_by_rows(args: Any) -> Any:
    mesh = _row_mesh()
    shardings = (jax.sharding.NamedSharding(mesh, spec) for spec in _BY_ROWS)
    return tuple(map(jax.device_put, args, shardings))


def _plain(function: Function) -> Side:
    return functools.partial(compiled, function)


def _of_gradient(layers: tuple[int, ...]) -> tuple[int, int]:
    return of_gradient(layers), 0


def _of_norms(layers: tuple[int, ...]) -> tuple[int, int]:
    every, first = multiplications(layers)
    return 2 * every - first, 0


def _of_pairs(sets: int, layers: tuple[int, ...]) -> tuple[int, int]:
    return sets * _of_norms(layers)[0], sum(a + b for a, b in pairwise(layers))


def _of_hvp(layers: tuple[int, ...]) -> tuple[int, int]:
    every, first = multiplications(layers)
    return 8 * every - 5 * first, 0


def _of_ggn_vp(layers: tuple[int, ...]) -> tuple[int, int]:
    every, first = multiplications(layers)
    return 5 * every - 2 * first, 0


@functools.cache
def quantities() -> dict[str, Quantity]:
    """All of them, by name."""
    plain = {"jax.grad": _plain(_plain_gradient)}
    several = {"vmap(jax.grad)": _plain(_networks(_plain_gradient))}
    spread = {"jax.grad, sharded": _plain(_over_devices(_plain_gradient))}
    norms = {"vmap(jax.grad)": _plain(_vmap_norms), "PyTorch": torch_peers.norms}
    clipped = {
        "vmap(jax.grad)": _plain(_vmap_clipped),
        "jax_privacy": _jax_privacy_clipped(None),
        "jax_privacy by 32": _jax_privacy_clipped(32),
        "PyTorch": functools.partial(torch_peers.clipped, MAX_NORM),
        "Opacus": functools.partial(torch_peers.ghost_clipped, MAX_NORM),
        "one jax.grad": _plain(_plain_gradient),
    }
    kernel = {"vmap(jax.grad)": _plain(_row_kernel), "jacrev": _plain(_explicit_kernel)}
    jvp = {"jvp of jax.grad": _plain(_jvp_of_gradient)}
    return {
        "gradient": Quantity(
            _gradient, plain | {"PyTorch": torch_peers.gradient}, _of_gradient
        ),
        "64 gradients": Quantity(_networks(_gradient), several, _of_gradient, (), 64),
        "sharded gradient": Quantity(
            _over_devices(_gradient), spread, _of_gradient, placed=_placed_by_rows
        ),
        "norms": Quantity(
            lambda params, x, y, v: per_example.norms(params, x, y), norms, _of_norms
        ),
        "clipped sum": Quantity(_clipped, clipped, _of_gradient, ("one jax.grad",)),
        "inner products": Quantity(
            lambda params, x, y, v: per_example.inner_products(params, x, y, x, y),
            {"vmap(jax.grad)": _plain(_vmap_products)},
            functools.partial(_of_pairs, 2),
        ),
        "ntk": Quantity(
            lambda params, x, y, v: curvature.ntk(params, x),
            kernel,
            functools.partial(_of_pairs, 1),
        ),
        "hvp": Quantity(
            lambda params, x, y, v: curvature.hvp(params, x, y, v), jvp, _of_hvp
        ),
        "ggn_vp": Quantity(
            lambda params, x, y, v: curvature.ggn_vp(params, x, y, v),
            {"jvp and vjp": _plain(_jvp_and_vjp)} | jvp,
            _of_ggn_vp,
            ("jvp of jax.grad",),  # which is the Hessian's
        ),
    }


def arguments(
    rows: int, layers: tuple[int, ...], key: jax.Array, networks: int | None = None
) -> Any:
    """`(params, x, y, v)`, float32, at random."""
    key_p, key_x, key_y, key_v = jax.random.split(key, 4)
    if networks is None:
        params = jaxbce.init(key_p, layers)
    else:
        make = jax.vmap(functools.partial(jaxbce.init, sizes=layers))
        params = make(jax.random.split(key_p, networks))
    x = jax.random.normal(key_x, (rows, layers[0]))
    y = jax.random.bernoulli(key_y, shape=(rows, layers[-1])).astype(x.dtype)
    point, unravel = ravel_pytree(params)
    return params, x, y, unravel(jax.random.normal(key_v, point.shape))
