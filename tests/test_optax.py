"""optax takes the gradients as they are."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import problem

import jaxbce

# Arguments of those that have required ones; the others are built as they come.
ARGUMENTS = {
    "noisy_sgd": {"learning_rate": 0.01, "key": 0},
    "adafactor": {"learning_rate": 0.01},
    "lbfgs": {},
    "polyak_sgd": {},
    "adadelta": {"learning_rate": 1.0},
}


def aliases():
    """Every optimizer of `optax` by its name."""
    return sorted(
        name
        for name, function in vars(optax).items()
        if inspect.isfunction(function)
        and function.__module__ == "optax._src.alias"
        and "GradientTransformation" in str(inspect.signature(function))
    )


def test_the_table_of_aliases_is_not_empty():
    assert {"sgd", "adam", "adamw", "lbfgs", "rprop", "lion"} <= set(aliases())


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", aliases())
def test_an_alias_lowers_the_loss_with_hand_derived_gradients(name):
    params, x, y = problem((5, 8, 1)).arguments(np.float32)
    y = jnp.round(y)
    make = getattr(optax, name)
    optimizer = make(**ARGUMENTS.get(name, {"learning_rate": 0.003}))

    def loss(params):
        return jaxbce.loss(params, x, y)

    @jax.jit
    def step(params, state):
        value, grads = jaxbce.value_and_grad(params, x, y)
        updates, state = optax.with_extra_args_support(optimizer).update(
            grads, state, params, value=value, grad=grads, value_fn=loss
        )
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        start = loss(params)
        for _ in range(25):
            new, state = step(params, state)
            assert jax.tree.structure(new) == jax.tree.structure(params)
            assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)
            params = new
        assert loss(params) < start


def test_a_line_search_takes_loss_as_it_takes_any_function():
    params, x, y = problem((5, 8, 1)).arguments(np.float32)
    optimizer = optax.chain(
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(15, store_grad=True),
    )

    def loss(params):
        return jaxbce.loss(params, x, y)

    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        value_and_grad = optax.value_and_grad_from_state(loss)
        start = loss(params)
        for _ in range(10):
            value, grads = value_and_grad(params, state=state)
            updates, state = optimizer.update(
                grads, state, params, value=value, grad=grads, value_fn=loss
            )
            params = optax.apply_updates(params, updates)
        assert loss(params) < 0.9 * start
