"""Benchmark cases: the Laplace approximation, and the explicit P × P matrix.

The baseline is what one would write from the definition: the Jacobian by `jax.jacrev`,
`H = Jᵀ S J + τ I`, its Cholesky factor, and solves with it. At a small size there are
also libraries: laplace-torch, which computes the same variances, and dattri, whose
influence is that of the Hessian.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_solve, solve_triangular

import jaxbce
from experiments.suites import torch_peers
from experiments.suites.case import (
    JAXBCE,
    Case,
    layers_text,
    missing_among,
    results_of,
)
from experiments.support import baselines
from experiments.support.timing import Call, compile_call
from jaxbce import laplace
from jaxbce.network import Params

PRIOR_PRECISION = 0.5
SMALL, LARGE = (256, (30, 32, 1)), (1000, (64, 128, 1))


class Inputs(NamedTuple):
    """A network, training examples, and as many new examples."""

    params: Params
    x: jax.Array
    y: jax.Array
    x2: jax.Array
    y2: jax.Array


class Method(NamedTuple):
    """Functions of one implementation; the posterior is whatever the first returns."""

    posterior: Callable[[Inputs], Any]
    log_det: Callable[[Any], Any]
    influence: Callable[[Any, Inputs], jax.Array]
    leave_one_out: Callable[[Any, Inputs], jax.Array]
    variances: Callable[[Any, Inputs], jax.Array]


def _posterior(inputs: Inputs) -> laplace.Posterior:
    return laplace.posterior(*inputs[:3], PRIOR_PRECISION)


def _influence(posterior: laplace.Posterior, inputs: Inputs) -> jax.Array:
    return laplace.influence(posterior, inputs.x2, inputs.y2)


def _leave_one_out(posterior: laplace.Posterior, inputs: Inputs) -> jax.Array:
    del inputs  # its training examples are in the posterior
    return laplace.leave_one_out(posterior).logits[:, 0]


def _logit_variances(posterior: laplace.Posterior, inputs: Inputs) -> jax.Array:
    return laplace.logit_covariance(posterior, inputs.x2)[:, 0, 0]


def _log_det(posterior: laplace.Posterior) -> float:
    """`log det H`, of which the posterior has the part `log det B`."""
    size = ravel_pytree(posterior.params)[0].size
    return _log_det_of_factor(posterior.factor) + size * np.log(PRIOR_PRECISION)


def _log_det_of_factor(factor: jax.Array) -> float:
    return 2 * np.sum(np.log(np.diagonal(factor)))


def _jacobian(params: Params, x: jax.Array) -> jax.Array:
    """The Jacobian of the logits, `[N, P]`."""
    flat, unravel = ravel_pytree(params)

    def logit(flat: jax.Array, x: jax.Array) -> jax.Array:
        return baselines.plain_logits(unravel(flat), x[None])[0, 0]

    return jax.vmap(jax.jacrev(logit), (None, 0))(flat, x)


def _y_hat(params: Params, x: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(baselines.plain_logits(params, x)[:, 0])


def _gradients(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The gradient of each example's loss, `[N, P]`."""
    return (_y_hat(params, x) - y[:, 0])[:, None] * _jacobian(params, x)


def _dense_posterior(inputs: Inputs) -> jax.Array:
    params, x, *_ = inputs
    jacobian, y_hat = _jacobian(params, x), _y_hat(params, x)
    identity = jnp.eye(jacobian.shape[1], dtype=jacobian.dtype)
    h = (jacobian.T * (y_hat * (1 - y_hat))) @ jacobian + PRIOR_PRECISION * identity
    return jnp.linalg.cholesky(h)


def _dense_influence(factor: jax.Array, inputs: Inputs) -> jax.Array:
    params, x, y, x2, y2 = inputs
    solved = cho_solve((factor, True), _gradients(params, x2, y2).T)
    return _gradients(params, x, y) @ solved


def _dense_variances(factor: jax.Array, params: Params, x: jax.Array) -> jax.Array:
    v = solve_triangular(factor, _jacobian(params, x).T, lower=True)
    return jnp.sum(jnp.square(v), axis=0)


def _dense_leave_one_out(factor: jax.Array, inputs: Inputs) -> jax.Array:
    params, x, y, *_ = inputs
    variance = _dense_variances(factor, params, x)
    y_hat = _y_hat(params, x)
    step = variance * (y_hat - y[:, 0]) / (1 - y_hat * (1 - y_hat) * variance)
    return baselines.plain_logits(params, x)[:, 0] + step


METHODS = {
    JAXBCE: Method(
        posterior=_posterior,
        log_det=_log_det,
        influence=_influence,
        leave_one_out=_leave_one_out,
        variances=_logit_variances,
    ),
    "dense": Method(
        posterior=_dense_posterior,
        log_det=_log_det_of_factor,
        influence=_dense_influence,
        leave_one_out=_dense_leave_one_out,
        variances=lambda factor, inputs: _dense_variances(
            factor, inputs.params, inputs.x2
        ),
    ),
}


def _all(method: Method, inputs: Inputs) -> Any:
    posterior = method.posterior(inputs)
    functions = method.influence, method.leave_one_out, method.variances
    return tuple(function(posterior, inputs) for function in functions)


def _from_posterior(name: str, method: Method, inputs: Inputs) -> Call:
    """A call that is given the posterior."""
    posterior = jax.jit(method.posterior)(inputs)
    return compile_call(getattr(method, name), posterior, inputs)


def _from_data(name: str, method: Method, inputs: Inputs) -> Call:
    """A call that computes the posterior as well."""

    def function(inputs: Inputs) -> Any:
        return getattr(method, name)(method.posterior(inputs), inputs)

    return compile_call(function, inputs)


class Quantity(NamedTuple):
    """How a quantity is measured.

    Attributes:
      build: Builds a method's call.
      sizes: Numbers of examples and layer sizes.
      libraries: Functions that build the calls of other libraries, by their names.
    """

    build: Callable[[Method, Inputs], Call]
    sizes: tuple[tuple[int, tuple[int, ...]], ...]
    libraries: dict[str, Callable[..., Call]]


# The libraries are measured at the small size alone, to keep a run short.
QUANTITIES = {
    "all of them": Quantity(
        lambda method, inputs: compile_call(functools.partial(_all, method), inputs),
        sizes=(SMALL, LARGE),
        libraries={},
    ),
    "posterior": Quantity(
        lambda method, inputs: compile_call(method.posterior, inputs)._replace(
            result=method.log_det
        ),
        sizes=(SMALL, LARGE),
        libraries={},
    ),
    "influence": Quantity(
        functools.partial(_from_posterior, "influence"),
        sizes=(SMALL, LARGE),
        libraries={},
    ),
    "variances": Quantity(
        functools.partial(_from_posterior, "variances"),
        sizes=(SMALL, LARGE),
        libraries={},
    ),
    "posterior, influence": Quantity(
        functools.partial(_from_data, "influence"),
        sizes=(SMALL,),
        libraries={"dattri": torch_peers.hessian_influence},
    ),
    "posterior, variances": Quantity(
        functools.partial(_from_data, "variances"),
        sizes=(SMALL,),
        libraries={"laplace-torch": torch_peers.laplace_variances},
    ),
}
OTHER_WORK = ("dattri",)  # the influence by the Hessian in place of Jᵀ S J


def arguments(n: int, layers: tuple[int, ...], key: jax.Array) -> Inputs:
    """A random network and examples in float32."""
    key_params, *keys = jax.random.split(key, 5)
    x, x2 = (jax.random.normal(k, (n, layers[0])) for k in keys[:2])
    y, y2 = (
        jax.random.bernoulli(k, shape=(n, layers[-1])).astype(x.dtype) for k in keys[2:]
    )
    return Inputs(jaxbce.init(key_params, layers), x, y, x2, y2)


def case(quantity: str, n: int, layers: tuple[int, ...], key: jax.Array) -> Case:
    """One quantity in `QUANTITIES` at one size, by jaxbce and its baselines."""
    inputs = arguments(n, layers, key)
    build, _, libraries = QUANTITIES[quantity]
    missing = missing_among(libraries)

    def implementations(inputs: Inputs = inputs) -> dict[str, Call]:
        calls = {name: build(method, inputs) for name, method in METHODS.items()}
        for name, library in libraries.items():
            if name not in missing:
                calls[name] = library(PRIOR_PRECISION, *inputs)
        return calls

    def results(calls: dict[str, Call]) -> dict[str, Any]:
        return results_of(
            {name: call for name, call in calls.items() if name not in OTHER_WORK}
        )

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            inputs_64 = jax.tree.map(lambda t: t.astype("float64"), inputs)
            return results(implementations(inputs_64))

    return Case(
        suite="laplace",
        quantity=quantity,
        size=f"{n}×{layers_text(layers)}",
        implementations=implementations,
        results=results,
        tolerance=1e-9,  # float64: sums in another order, and the condition of H
        exact=exact,
        missing=missing,
    )


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All cases, or the first if `quick`."""
    del suite
    for name, quantity in QUANTITIES.items():
        for n, layers in quantity.sizes:
            yield case(name, n, layers, key)
            if quick:
                return
