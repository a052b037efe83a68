"""Quantities of a batch, each as a function of jaxbce and its baselines.

Baselines are plain JAX as a user would write it, jax_privacy, PyTorch and Opacus. All
functions take `(params, x, y, v)`, where `v` has the structure of `params`.
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
from experiments.suites.case import gradient_multiplications, multiplications
from experiments.support import baselines
from experiments.support.timing import Call, compile_call
from jaxbce import curvature, per_example
from jaxbce.network import Params

MAX_NORM = 1.0  # clips about half of the examples

Function = Callable[[Params, jax.Array, jax.Array, Params], Any]
Baseline = Callable[..., Call]  # builds a call from the same arguments


class Quantity(NamedTuple):
    """A function of a batch, and its baselines.

    Attributes:
      function: The function of jaxbce.
      baselines: What it is timed against, by name.
      products: Maps layer sizes to the multiplications in jaxbce's matrix products: per
        example, and per pair of examples.
      other_work: Baselines that compute something else, for comparison of the cost.
      networks: Number of networks that share the batch, as a leading axis of params;
        None is one network without that axis.
      to_devices: Moves the arguments to the devices that the functions expect.
    """

    function: Function
    baselines: dict[str, Baseline]
    products: Callable[[tuple[int, ...]], tuple[int, int]]
    other_work: tuple[str, ...] = ()
    networks: int | None = None
    to_devices: Callable[[Any], Any] = lambda args: args


def _example_gradients(params: Params, x: jax.Array, y: jax.Array) -> Params:
    def gradient(x: jax.Array, y: jax.Array) -> Params:
        return jax.grad(baselines.plain_loss)(params, x[None], y[None])

    return jax.vmap(gradient)(x, y)


def _example_norms(grads: Params) -> jax.Array:
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
    return _example_norms(_example_gradients(params, x, y))


def _vmap_clipped_sum(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    grads = _example_gradients(params, x, y)
    factors = jnp.minimum(1, MAX_NORM / _example_norms(grads))
    return jax.tree.map(lambda g: jnp.tensordot(factors, g, 1), grads)


def _vmap_products(params: Params, x: jax.Array, y: jax.Array, v: Params) -> jax.Array:
    matrix = _matrix(_example_gradients(params, x, y))
    return matrix @ matrix.T


def _jacrev_kernel(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Any:
    jacobian = jax.jacrev(baselines.plain_logits)(params, x[:, None])
    matrix = _matrix(jax.tree.map(lambda t: t[:, 0, 0], jacobian))
    return matrix @ matrix.T


def _vmap_kernel(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Any:
    def gradient(x: jax.Array) -> Params:
        return jax.grad(lambda p: baselines.plain_logits(p, x[None])[0, 0])(params)

    matrix = _matrix(jax.vmap(gradient)(x))
    return matrix @ matrix.T


def _jvp_of_gradient(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    gradient = functools.partial(jax.grad(baselines.plain_loss), x=x, y=y)
    return jax.jvp(gradient, (params,), (v,))[1]


def _jvp_and_vjp(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    def mean_loss(a: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(a, y).sum() / len(y)

    def logits(params: Params) -> jax.Array:
        return baselines.plain_logits(params, x)

    a, a_dot = jax.jvp(logits, (params,), (v,))
    _, back = jax.vjp(logits, params)
    return back(jax.jvp(jax.grad(mean_loss), (a,), (a_dot,))[1])[0]


# The plain JAX that jaxbce's functions are compared with, by quantity.
PLAIN: dict[str, Function] = {
    "gradient": _plain_gradient,
    "clipped sum": _vmap_clipped_sum,
    "ntk": _vmap_kernel,
    "ggn_vp": _jvp_and_vjp,
}


def _clipped_sum(params: Params, x: jax.Array, y: jax.Array, v: Params) -> Params:
    options: Any = {"max_norm": MAX_NORM, "reduction": "sum"}
    return per_example.clipped_value_and_grad(params, x, y, **options).grads


def _jax_privacy_clipped_sum(microbatch_size: int | None) -> Baseline:
    def build(*args: Any) -> Call:
        import jax_privacy

        clipped = jax_privacy.clipped_grad(
            baselines.plain_loss,
            l2_clip_norm=MAX_NORM,
            batch_argnums=(1, 2),
            microbatch_size=microbatch_size,
        )
        return compile_call(lambda params, x, y, v: clipped(params, x, y), *args)

    return build


def _over_networks(function: Function) -> Function:
    return jax.vmap(function, in_axes=(0, None, None, None))


def _over_devices(function: Function) -> Function:
    """The mean over a batch that is spread over all devices."""

    def mean_over_devices(params: Params, x: jax.Array, y: jax.Array) -> Any:
        varying = jax.lax.pcast(params, "examples", to="varying")
        return jax.lax.pmean(function(varying, x, y, params), "examples")

    specs: Any = {"in_specs": _BATCH_SPECS[:3], "out_specs": jax.P()}
    sharded = jax.shard_map(mean_over_devices, mesh=_batch_mesh(), **specs)
    return lambda params, x, y, v: sharded(params, x, y)


_BATCH_SPECS = jax.P(), jax.P("examples"), jax.P("examples"), jax.P()


def _batch_mesh() -> jax.sharding.Mesh:
    devices = jax.devices()
    count = 1 << (len(devices).bit_length() - 1)  # divides the numbers of examples
    return jax.sharding.Mesh(np.array(devices[:count]), ("examples",))


def _to_batch_mesh(args: Any) -> Any:
    mesh = _batch_mesh()
    shardings = (jax.sharding.NamedSharding(mesh, spec) for spec in _BATCH_SPECS)
    return tuple(map(jax.device_put, args, shardings))


def _jax_baseline(function: Function) -> Baseline:
    return functools.partial(compile_call, function)


def _gradient_products(layers: tuple[int, ...]) -> tuple[int, int]:
    return gradient_multiplications(layers), 0


def _norm_products(layers: tuple[int, ...]) -> tuple[int, int]:
    every, first = multiplications(layers)
    return 2 * every - first, 0


def _pair_products(batches: int, layers: tuple[int, ...]) -> tuple[int, int]:
    return batches * _norm_products(layers)[0], sum(a + b for a, b in pairwise(layers))


def _hvp_products(layers: tuple[int, ...]) -> tuple[int, int]:
    every, first = multiplications(layers)
    return 8 * every - 5 * first, 0


def _ggn_vp_products(layers: tuple[int, ...]) -> tuple[int, int]:
    every, first = multiplications(layers)
    return 5 * every - 2 * first, 0


@functools.cache
def quantities() -> dict[str, Quantity]:
    """All quantities, by name."""
    return _gradient_quantities() | _per_example_quantities() | _curvature_quantities()


def _gradient_quantities() -> dict[str, Quantity]:
    plain = _jax_baseline(_plain_gradient)
    return {
        "gradient": Quantity(
            function=_gradient,
            baselines={"jax.grad": plain, "PyTorch": torch_peers.gradient},
            products=_gradient_products,
        ),
        "64 gradients": Quantity(
            function=_over_networks(_gradient),
            baselines={
                "vmap(jax.grad)": _jax_baseline(_over_networks(_plain_gradient))
            },
            products=_gradient_products,
            networks=64,
        ),
        "sharded gradient": Quantity(
            function=_over_devices(_gradient),
            baselines={
                "jax.grad, sharded": _jax_baseline(_over_devices(_plain_gradient))
            },
            products=_gradient_products,
            to_devices=_to_batch_mesh,
        ),
        "data-parallel gradient": Quantity(
            function=_gradient,
            baselines={"jax.grad, partitioned": plain},
            products=_gradient_products,
            to_devices=_to_batch_mesh,
        ),
    }


def _per_example_quantities() -> dict[str, Quantity]:
    return {
        "norms": Quantity(
            function=lambda params, x, y, v: per_example.norms(params, x, y),
            baselines={
                "vmap(jax.grad)": _jax_baseline(_vmap_norms),
                "PyTorch": torch_peers.norms,
            },
            products=_norm_products,
        ),
        "clipped sum": Quantity(
            function=_clipped_sum,
            baselines={
                "vmap(jax.grad)": _jax_baseline(_vmap_clipped_sum),
                "jax_privacy": _jax_privacy_clipped_sum(None),
                "jax_privacy by 32": _jax_privacy_clipped_sum(32),
                "PyTorch": functools.partial(torch_peers.clipped_sum, MAX_NORM),
                "Opacus": functools.partial(torch_peers.ghost_clipped_sum, MAX_NORM),
                "one jax.grad": _jax_baseline(_plain_gradient),
            },
            products=_gradient_products,
            other_work=("one jax.grad",),
        ),
        "inner products": Quantity(
            function=lambda params, x, y, v: per_example.inner_products(
                params, x, y, x, y
            ),
            baselines={"vmap(jax.grad)": _jax_baseline(_vmap_products)},
            products=functools.partial(_pair_products, 2),
        ),
    }


def _curvature_quantities() -> dict[str, Quantity]:
    hessian = _jax_baseline(_jvp_of_gradient)
    return {
        "ntk": Quantity(
            function=lambda params, x, y, v: curvature.ntk(params, x),
            baselines={
                "vmap(jax.grad)": _jax_baseline(_vmap_kernel),
                "jacrev": _jax_baseline(_jacrev_kernel),
            },
            products=functools.partial(_pair_products, 1),
        ),
        "hvp": Quantity(
            function=lambda params, x, y, v: curvature.hvp(params, x, y, v),
            baselines={"jvp of jax.grad": hessian},
            products=_hvp_products,
        ),
        "ggn_vp": Quantity(
            function=lambda params, x, y, v: curvature.ggn_vp(params, x, y, v),
            baselines={
                "jvp and vjp": _jax_baseline(_jvp_and_vjp),
                "jvp of jax.grad": hessian,
            },
            products=_ggn_vp_products,
            other_work=("jvp of jax.grad",),  # a product with the Hessian
        ),
    }


def arguments(
    num_examples: int,
    layers: tuple[int, ...],
    key: jax.Array,
    networks: int | None = None,
) -> Any:
    """Random `(params, x, y, v)` in float32."""
    key_p, key_x, key_y, key_v = jax.random.split(key, 4)
    if networks is None:
        params = jaxbce.init(key_p, layers)
    else:
        init = jax.vmap(functools.partial(jaxbce.init, sizes=layers))
        params = init(jax.random.split(key_p, networks))
    x = jax.random.normal(key_x, (num_examples, layers[0]))
    y = jax.random.bernoulli(key_y, shape=(num_examples, layers[-1])).astype(x.dtype)
    flat, unravel = ravel_pytree(params)
    return params, x, y, unravel(jax.random.normal(key_v, flat.shape))
