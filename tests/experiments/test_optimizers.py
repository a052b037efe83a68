"""Optimizers by name: what they are built as, their arguments, and what is refused."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbce
from experiments.support import optimizers
from experiments.support.cli import InputError

pytestmark = pytest.mark.usefixtures("standard_promotion")

LAYER: Any = jaxbce.Layer
PARAMS = (LAYER(np.ones((3, 1), np.float32), np.zeros(1, np.float32)),)
ONES = jax.tree.map(np.ones_like, PARAMS)


def rate(optimizer, steps=0):
    """The last of some updates by gradients of 1, negated."""
    state, updates = optimizer.init(PARAMS), PARAMS
    for _ in range(steps + 1):
        updates, state = optimizer.update(ONES, state, PARAMS)
    return -float(updates[0].b[0])


def test_an_optimizer_is_built_as_asked():
    build = optimizers.build
    sgd, penalty = build("sgd", learning_rate=0.5, weight_decay=0.1)
    assert isinstance(sgd, optax.GradientTransformation)
    assert rate(sgd) == 0.5
    assert penalty == 0.1
    adamw, penalty = build("adamw", weight_decay=0.1, args=(("b1", 0.5),))
    assert penalty == 0.0
    assert np.isclose(rate(adamw), 0.003, rtol=1e-3)
    assert build("lbfgs")[1] == 0.0
    assert {"prodigy", "adamw", "muon"} <= set(optimizers.available())


def test_a_schedule_is_followed_over_the_run():
    def at(schedule, step):
        options = {"learning_rate": 1.0, "num_steps": 100}
        return rate(optimizers.build("sgd", schedule=schedule, **options)[0], step)

    assert np.isclose(at("cosine", 50), 0.5)
    assert np.isclose(at("exponential", 50), 0.1)
    assert at("warmup-cosine", 0) == 0
    assert np.isclose(at("warmup-cosine", 10), 1)


def test_a_penalty_is_of_the_weights_alone():
    extra = optimizers.l2_penalty(0.2)(PARAMS)
    assert np.isclose(extra, 0.1 * np.sum(np.square(PARAMS[0].w)))
    halves = tuple(layer._replace(w=jnp.bfloat16(layer.w)) for layer in PARAMS)
    assert optimizers.l2_penalty(0.2)(halves).dtype == np.float32


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["constant", "exponential"])
def test_a_point_of_a_family_is_the_optimizer_with_its_values(name, schedule):
    options = {"schedule": schedule, "num_steps": 4}
    swept = ("learning_rate", "weight_decay")
    family = optimizers.build_family(name, swept=swept, **options)
    values = {"learning_rate": 0.5, "weight_decay": 0.25}
    single, penalty = optimizers.build(name, **values, **options)
    fixed = optimizers.build_family(name, swept=(), **values, **options)
    assert (family.make_penalty is None) == (name == "adamw") == (penalty == 0)
    assert (fixed.make_penalty is None) == (name == "adamw")
    if family.make_penalty is not None and fixed.make_penalty is not None:
        for found in (family.make_penalty(values), fixed.make_penalty({})):
            assert found(PARAMS) == optimizers.l2_penalty(penalty)(PARAMS)
    point = family.make_optimizer(values)
    built = (point, single, fixed.make_optimizer({}))
    states = [o.init(PARAMS) for o in built]
    for _ in range(2):
        updates = []
        for i, optimizer in enumerate(built):
            found, states[i] = optimizer.update(ONES, states[i], PARAMS)
            updates.append(found)
        for a, b in itertools.pairwise(updates):
            np.testing.assert_allclose(a[0].w, b[0].w, rtol=1e-6)
            np.testing.assert_allclose(a[0].b, b[0].b, rtol=1e-6)


def test_arguments_of_an_optimizer_are_read_from_text():
    found = optimizers.parse_args(["b1=0.5", "nesterov=True", "eps=1e-3", "mask=None"])
    assert found == {"b1": 0.5, "nesterov": True, "eps": 1e-3, "mask": None}
    for text in ("b1", "b1=", "b1=os.system", "=3", "b1=[1]", "b1=..."):
        with pytest.raises(
            InputError, match="expected NAME=VALUE, with a number, True"
        ):
            optimizers.parse_args([text])
    with pytest.raises(InputError, match=r"b1=0\.6: is given twice"):
        optimizers.parse_args(["b1=0.5", "b1=0.6"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamm", {}, "--optimizer=adamm: expected one of .*adam, "),
        (
            "adam",
            {"args": (("b3", 1),)},
            "--optimizer_arg=b3: adam takes learning_rate",
        ),
        (
            "adam",
            {"args": (("learning_rate", 1),)},
            "--optimizer_arg=learning_rate: use --learning_rate instead",
        ),
        ("noisy_sgd", {}, "--optimizer=noisy_sgd: Specifying a key"),
        ("lbfgs", {"schedule": "cosine"}, "--schedule=cosine: needs --learning_rate"),
        (
            "polyak_sgd",
            {"learning_rate": 1.0},
            "--optimizer=polyak_sgd: takes no learning rate or schedule",
        ),
        (
            "adam",
            {"learning_rate": float("nan")},
            "--learning_rate=nan: expected a fin",
        ),
        ("adam", {"weight_decay": -1.0}, "--weight_decay=-1.0: expected a finite num"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        optimizers.build(name, **options)


def test_arguments_that_cannot_be_swept_are_refused():
    with pytest.raises(
        InputError, match=r"--axis=b7: sgd takes learning_rate, .*; every"
    ):
        optimizers.build_family("sgd", swept=("b7",))
    with pytest.raises(InputError, match="adam: cannot be swept over nesterov"):
        optimizers.build_family("adam", swept=("nesterov",))
    with pytest.raises(InputError, match="--schedule=cosine: needs --learning_rate"):
        optimizers.build_family("lbfgs", swept=("weight_decay",), schedule="cosine")
    args = (("b1", "x"),)
    with pytest.raises(InputError, match="adam: cannot be swept over nothing"):
        optimizers.build_family("adam", swept=(), args=args)
