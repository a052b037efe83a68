"""optax takes the gradients as they are."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbce
from tests.helpers import problem

KEY = jax.random.key(0)


pytestmark = pytest.mark.usefixtures("standard_promotion")


def batch():
    """Params, and a batch with hard labels, in float32."""
    params, x, y = problem((5, 8, 1)).arguments(np.float32)
    return params, x, np.round(y)


# Arguments of those that have required ones; the others are built as they come.
ARGUMENTS = {
    "noisy_sgd": {"learning_rate": 0.01, "key": 0},
    "adafactor": {"learning_rate": 0.01},
    "lbfgs": {},
    "polyak_sgd": {},
    "adadelta": {"learning_rate": 1.0},
    "dpsgd": None,  # needs per-example gradients
    "sophia": None,  # needs obj_fn, which only its own signature could ask for
    "dog": {"learning_rate": 1.0},
    "dowg": {"learning_rate": 1.0},
    "galore": {"learning_rate": 0.003, "rank": 2},
    "cocob": {},
    "momo": {},
    "momo_adam": {},
    "prodigy": {},
    "dadapt_adamw": {},
    "schedule_free": None,  # wraps another, below
}
# One of each kind of state and of arguments that `update` takes.
KINDS = {
    *("adafactor", "adamw", "lbfgs", "lion", "momo"),
    *("muon", "noisy_sgd", "prodigy", "rprop", "sgd"),
}


def optimizers():
    """Every optimizer of `optax` and `optax.contrib` by its name."""
    found = {}
    for module in (optax, optax.contrib):
        for name, function in vars(module).items():
            if (
                inspect.isfunction(function)
                and "GradientTransformation" in str(inspect.signature(function))
                and ("alias" in function.__module__ or module is optax.contrib)
                and "learning_rate" in inspect.signature(function).parameters
            ):
                found[name] = function
    return {name: found[name] for name in sorted(found)}


def test_the_table_of_optimizers_is_not_empty():
    assert set(optimizers()) >= KINDS


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
        for name in optimizers()
        if ARGUMENTS.get(name, {}) is not None
    ],
)
def test_a_fit_with_any_optimizer_lowers_the_loss(name):
    params, x, y = batch()
    optimizer = optimizers()[name](**ARGUMENTS.get(name, {"learning_rate": 0.003}))
    run = jaxbce.fit(KEY, params, x, y, optimizer=optimizer, num_steps=25)
    assert jax.tree.map(jnp.shape, run.params) == jax.tree.map(jnp.shape, params)
    assert run.train_loss.item() < jaxbce.loss(params, x, y)


LABEL: Any = jaxbce.Layer
WRAPPED = {
    "line search": lambda: optax.chain(
        optax.sgd(0.3), optax.scale_by_backtracking_linesearch(15)
    ),
    "plateau": lambda: optax.chain(
        optax.sgd(0.03), optax.contrib.reduce_on_plateau(patience=2)
    ),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.03), optax.sgd(0.01), sync_period=2),
    "opaque sam": lambda: optax.contrib.sam(
        optax.sgd(0.03), optax.sgd(0.01), sync_period=2, opaque_mode=True
    ),
    "schedule-free": lambda: optax.contrib.schedule_free_sgd(0.03),
    "mechanic": lambda: optax.contrib.mechanize(optax.sgd(1.0)),
    "accumulation": lambda: optax.MultiSteps(optax.sgd(0.03), 4),
    "finite": lambda: optax.apply_if_finite(optax.adam(0.01), 3),
    "per layer": lambda: optax.partition(
        {"first": optax.sgd(0.01), "last": optax.adam(0.01)},
        (LABEL("first", "first"), LABEL("last", "last")),
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
}


@pytest.mark.slow_ids("mechanic", "opaque sam", "accumulation")
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_a_fit_takes_what_wraps_an_optimizer(make):
    params, x, y = batch()
    options = {"optimizer": make(), "num_steps": 40, "batch_size": 8}
    run = jaxbce.fit(KEY, params, x, y, **options)
    assert run.train_loss.item() < jaxbce.loss(params, x, y)


def test_a_line_search_takes_loss_as_it_takes_any_function():
    params, x, y = problem((5, 8, 1)).arguments(np.float32)
    optimizer = optax.chain(
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(15, store_grad=True),
    )

    def loss(params):
        return jaxbce.loss(params, x, y)

    state = optimizer.init(params)
    value_and_grad = optax.value_and_grad_from_state(loss)
    start = loss(params)

    @jax.jit
    def step(params, state):
        value, grads = value_and_grad(params, state=state)
        given = {"value": value, "grad": grads, "value_fn": loss}
        updates, state = optimizer.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        params, state = step(params, state)
    assert loss(params) < 0.9 * start
