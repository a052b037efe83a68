"""Sweeps over data: members with their own weights, labels and initial parameters."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbce
from jaxbce import _traced
from tests.helpers import member, problem, relative_error

pytestmark = pytest.mark.usefixtures("standard_promotion")

KEY = jax.random.key(3)
N = 37
FOLD = np.arange(N) % 4
SMALL: Any = {
    "hidden": (4,),
    "make_optimizer": lambda hp: optax.sgd(hp["learning_rate"]),
    "num_steps": 10,
    "batch_size": 8,
    "evaluate_every": 5,
}
FOLDS: Any = {
    "make_sample_weight": lambda hp: hp["fold"] != FOLD,
    "hparams": jaxbce.grid(learning_rate=[0.1, 0.3], fold=range(4)),
}


def data(sizes=(5, 4, 1), dtype="float64"):
    _, x, y, _ = problem(sizes, rows=N)
    return x.astype(dtype), np.round(y).astype(dtype)


def drawn(seed, sizes=(5, 4, 1), dtype="float64"):
    """The key and the initial parameters of a seed of a sweep."""
    key_params, key = jax.random.split(jax.random.fold_in(KEY, seed))
    return key, jaxbce.init(key_params, sizes, dtype=dtype)


def solo(seed, x, y, rate, params=None, **given):
    key, initial = drawn(seed, (x.shape[1], 4, y.shape[1]), x.dtype)
    options: Any = {"num_steps": 10, "batch_size": 8, "evaluate_every": 5} | given
    start = initial if params is None else params
    return jaxbce.fit(key, start, x, y, optimizer=optax.sgd(rate), **options)


WEIGHTS = {
    "folds": lambda hp: hp["i"] % 4 != FOLD,
    "leave one out": lambda hp: hp["i"] != jnp.arange(N),
    "bootstrap": lambda hp: jax.random.poisson(jax.random.key(hp["i"]), 1.0, (N,)),
    "half": lambda hp: jax.random.bernoulli(jax.random.key(hp["i"]), shape=(N,)),
    "learning curve": lambda hp: jnp.arange(N) < 5 * (hp["i"] + 1),
    "any": lambda hp: jnp.exp(0.3 * hp["i"] * jnp.cos(jnp.arange(N))),
}


@pytest.mark.slow_ids("leave one out", "bootstrap", "half", "learning curve", "any")
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_member_is_the_solo_run_with_its_weights(name):
    """Also if all members have weights in common."""
    make, common = WEIGHTS[name], np.linspace(0.0, 2.0, N)
    with jax.enable_x64(True):
        x, y = data(sizes=(5, 4, 2))
        found = jaxbce.sweep(
            KEY,
            x,
            y,
            hparams={"i": np.arange(3), "learning_rate": [0.1, 0.2, 0.3]},
            make_sample_weight=make,
            num_seeds=2,
            sample_weight=common if name == "half" else None,
            **SMALL,
        )
        for i in range(3):
            s = np.asarray(make({"i": i}), float) * (common if name == "half" else 1)
            run = solo(1, x, y, 0.1 * (i + 1), sample_weight=s)
            mine = member(found, i, 1)
            assert relative_error(mine.params, run.params) <= 1e-10
            np.testing.assert_allclose(mine.train_loss, run.train_loss, rtol=1e-10)


def test_with_full_batches_a_member_is_the_fit_of_its_subset():
    with jax.enable_x64(True):
        x, y = data()
        options = SMALL | FOLDS | {"batch_size": None}
        found = jaxbce.sweep(KEY, x, y, validation="held_out", **options)
        for point in range(8):
            mine, held_out = point % 4 != FOLD, point % 4 == FOLD
            rate = 0.1 if point < 4 else 0.3
            held_out = x[held_out], y[held_out]
            run = solo(0, x[mine], y[mine], rate, batch_size=None, validation=held_out)
            for name in ("params", "best_params", "train_loss", "validation_loss"):
                values = getattr(member(found, point, 0), name), getattr(run, name)
                assert relative_error(*values) <= 1e-10
            assert found.best_step[point, 0] == run.best_step


def test_held_out_examples_decide_when_a_member_stops():
    """They are weighted by `sample_weight`, as a validation set may be."""
    with jax.enable_x64(True):
        x, y = data()
        s = np.linspace(0.0, 2.0, N)
        rule: Any = {"num_steps": 200, "patience": 20, "evaluate_every": 5}
        options = SMALL | FOLDS | rule | {"sample_weight": s}
        found = jaxbce.sweep(KEY, x, y, validation="held_out", **options)
        assert len(set(found.step.ravel().tolist())) > 2
        for point in (4, 5, 7):
            out = point % 4 == FOLD
            held_out = x[out], y[out], s[out]
            weight = np.where(out, 0, s)
            run = solo(0, x, y, 0.3, sample_weight=weight, validation=held_out, **rule)
            assert found.step[point, 0] == run.step
            mine = member(found, point, 0)
            assert relative_error(mine.best_params, run.best_params) <= 1e-10
            assert np.isclose(found.best_loss[point, 0], run.best_loss, rtol=1e-10)


def test_labels_may_differ_between_members_and_losses_are_of_those_given():
    with jax.enable_x64(True):
        x, y = data(sizes=(5, 4, 2))

        def flip(hp, y):
            flips = jax.random.bernoulli(jax.random.key(hp["draw"]), 0.2, (N, 1))
            return jnp.where(flips, 1 - y, y)

        hparams = jaxbce.grid(draw=[0, 5], label_smoothing=[0.0, 0.1])
        found = jaxbce.sweep(
            KEY,
            x,
            y,
            **SMALL | {"make_optimizer": lambda hp: optax.sgd(0.1)},
            make_labels=flip,
            hparams=hparams,
        )
        for point, (draw, smoothing) in enumerate(zip(*hparams.values(), strict=True)):
            mine = flip({"draw": draw}, y) * (1 - smoothing) + smoothing / 2
            run = solo(0, x, mine, 0.1)
            assert relative_error(member(found, point, 0).params, run.params) <= 1e-10
            loss = jaxbce.loss(run.params, x, y)
            assert np.isclose(found.train_loss[point, 0, -1], loss, rtol=1e-10)


# ------------------------------------------------------------------ initial parameters


@pytest.mark.parametrize(
    ("axes", "group_size"),
    [(None, 2), ((1, 1), "auto"), ((3, 1), 2), ((1, 2), "auto"), ((3, 2), 2)],
)
def test_members_start_from_given_parameters(axes, group_size):
    with jax.enable_x64(True):
        x, y = data()
        _, one = drawn(9)
        start = one
        if axes is not None:
            scales = np.linspace(0.5, 1.5, 6)[: axes[0] * axes[1]].reshape(axes)
            start = jax.tree.map(
                lambda leaf: scales.reshape(*axes, *[1] * leaf.ndim) * leaf, one
            )
        options = SMALL | {"hidden": None, "group_size": group_size}
        hparams = {"learning_rate": [0.1, 0.2, 0.3]}
        found = jaxbce.sweep(
            KEY, x, y, params=start, hparams=hparams, num_seeds=2, **options
        )
        for i, j in np.ndindex(3, 2):
            mine = start
            if axes is not None:
                at = min(i, axes[0] - 1), min(j, axes[1] - 1)
                mine = jax.tree.map(lambda leaf, at=at: leaf[at], start)
            run = solo(j, x, y, 0.1 * (i + 1), mine)
            assert relative_error(member(found, i, j).params, run.params) <= 1e-10


def test_a_result_is_trained_further_without_hyperparameters():
    x, y = data(dtype="float32")
    options: Any = SMALL | {"make_optimizer": lambda hp: optax.sgd(0.1)}
    first = jaxbce.sweep(
        KEY, x, y, **options, hparams={"init_scale": [1.0, 2.0, 3.0]}, num_seeds=2
    )
    options |= {"hidden": None, "num_seeds": 2, "hparams": {}}
    more = jaxbce.sweep(KEY, x, y, params=first.params, **options)
    assert more.train_loss.shape == (3, 2, 2)
    run = solo(1, x, y, 0.1, jax.tree.map(lambda leaf: leaf[2, 1], first.params))
    assert relative_error(member(more, 2, 1).params, run.params) <= 1e-5


# ---------------------------------------------------------------------- what it shares


def test_members_share_the_features_of_a_batch():
    """No array has an axis of members, one of examples and one of features."""
    x, y = data(dtype="float32")
    taken = []
    original = _traced.jitted

    def spy(function, *static):
        compiled = original(function, *static)

        def call(*args):
            taken.append((compiled, args))
            return compiled(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_traced, "jitted", spy)
        options = SMALL | FOLDS | {"hidden": (11,), "batch_size": 13}
        jaxbce.sweep(KEY, x, y, **options, group_size=8)
    compiled, args = taken[-1]
    text = str(jax.make_jaxpr(compiled)(*args))
    found = {tuple(dims.split(",")) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    members = str(8 // jax.device_count())
    assert any({members, "11", "13"} <= set(dims) for dims in found)  # hidden layer
    assert any(set(dims) == {"5", "13"} for dims in found)  # features of a batch
    assert not any({members, "5", "13"} <= set(dims) for dims in found)


def test_arrays_that_functions_close_over_do_not_compile_again():
    x, y = data(dtype="float32")
    compiled = _traced.jitted.cache_info

    def run(fold):
        options = FOLDS | {"make_sample_weight": lambda hp: hp["fold"] != fold}
        return jaxbce.sweep(KEY, x, y, **SMALL | options, validation="held_out")

    first = run(FOLD)
    before = compiled().misses
    second = run(FOLD[::-1].copy())
    assert compiled().misses == before
    assert not np.allclose(first.params[0].w, second.params[0].w)


def test_two_devices_and_groups_of_any_size_give_the_same_members():
    x, y = data(dtype="float32")
    options = SMALL | FOLDS | {"num_seeds": 3, "validation": "held_out"}
    truth = jaxbce.sweep(KEY, x, y, **options, group_size=24)
    one_device = jax.make_mesh((1,), ("i",), devices=jax.devices()[:1])
    for given in ({"group_size": 5}, {"mesh": one_device}):
        found = jaxbce.sweep(KEY, x, y, **options | given)
        assert relative_error(found.params, truth.params) <= 1e-5
        np.testing.assert_allclose(found.best_loss, truth.best_loss, rtol=1e-5)


@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
def test_a_mesh_that_the_caller_has_set_changes_nothing(axis_type):
    x, y = (t[:36] for t in data(dtype="float32"))
    options = SMALL | FOLDS | {"validation": "held_out"}
    options |= {"make_sample_weight": lambda hp: hp["fold"] != FOLD[:36]}
    truth = jaxbce.sweep(KEY, x, y, **options)
    axis_types = (jax.sharding.AxisType[axis_type],)
    mesh = jax.make_mesh((2,), ("examples",), axis_types=axis_types)
    with jax.set_mesh(mesh):
        x, y = jax.device_put((x, y), jax.NamedSharding(mesh, jax.P("examples")))
        found = jaxbce.sweep(KEY, x, y, **options)
    np.testing.assert_array_equal(found.validation_loss, truth.validation_loss)


def test_an_example_of_weight_0_adds_nothing_even_if_it_overflows():
    x, y = data(dtype="float32")
    x[3] = 1e30
    options = SMALL | {"make_optimizer": lambda hp: optax.sgd(0.1)}
    options |= {"make_sample_weight": lambda hp: jnp.arange(N) != hp["out"]}
    found = jaxbce.sweep(KEY, x, y, hparams={"out": [3, 4]}, **options)
    x[3] = 0.0
    without = jaxbce.sweep(KEY, x, y, hparams={"out": [3]}, **options)
    assert relative_error(member(found, 0, 0).params, member(without, 0, 0).params) == 0
    assert found.diverged_at[0, 0] == -1
    assert found.train_loss[1, 0, -1] > 1e20


@pytest.mark.parametrize(
    ("own", "common"),
    [
        ([0, 0, 1e-25, 1e-25], [1, 1, 1e-25, 1e-25]),  # the product underflows
        ([3e38, 3e38, 3e38, 0], [1, 4, 2, 1]),  # it overflows
        ([1e-30, 1, 1e-30, 0], [1, 1e-30, 1, 1]),
    ],
)
def test_weights_are_multiplied_without_overflow_or_underflow(own, common):
    x, y = (t[:4] for t in data(dtype="float32"))
    product = np.float64(own) * np.float64(common)
    options: Any = {
        "hidden": (4,),
        "hparams": {},
        "make_optimizer": lambda hp: optax.sgd(0.1),
        "num_steps": 2,
    }
    found = jaxbce.sweep(
        KEY,
        x,
        y,
        make_sample_weight=lambda hp: jnp.array(own, jnp.float32),
        sample_weight=np.float32(common),
        **options,
    )
    truth = jaxbce.sweep(
        KEY, x, y, sample_weight=np.float32(product / product.max()), **options
    )
    np.testing.assert_allclose(found.train_loss, truth.train_loss, rtol=1e-5)
    # 1e-5: float32


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("make_optimizer", lambda hp: optax.sgd(hp["rate"])),
        ("make_penalty", lambda hp: hp["rate"]),
        ("make_sample_weight", lambda hp: hp["rate"] != FOLD),
        ("make_labels", lambda hp, y: y * hp["rate"]),
    ],
)
def test_an_error_in_a_function_has_a_note_that_names_it(name, function):
    x, y = data(dtype="float32")
    hparams = {"learning_rate": [0.1], "fold": [1]}
    with pytest.raises(KeyError) as info:
        jaxbce.sweep(KEY, x, y, hparams=hparams, **SMALL | {name: function})
    note = info.value.__notes__[0]
    assert re.fullmatch(f"while tracing {name} with .*: (learning_rate|fold), .*", note)


# ------------------------------------------------------------------- what it refuses

LEFT_OUT = {"make_sample_weight": lambda hp: jnp.arange(N) != hp["learning_rate"]}
SHAPES: Any = jaxbce.init(KEY, (5, 4, 1), dtype="float32")
STACKED = jax.tree.map(lambda leaf: np.stack([[leaf, leaf]] * 3), SHAPES)
REFUSED: Any = {
    "function": ({"make_sample_weight": 3}, TypeError, "make_sample_weight .* got int"),
    "labels": ({"make_labels": 3}, TypeError, "make_labels to be None or .* got int"),
    "no argument": (
        {"make_sample_weight": lambda: jnp.ones(N)},
        TypeError,
        "make_sample_weight to be None or a function of a dict of .*too many",
    ),
    "two arguments": (
        {"make_optimizer": lambda hp, y: optax.sgd(0.1)},
        TypeError,
        "make_optimizer to be a function of a dict of .*missing a required .*'y'",
    ),
    "penalty of params": (
        {"make_penalty": lambda hp, params: 0.0},
        TypeError,
        "make_penalty to be None or a function of a dict of .*missing a required",
    ),
    "no array": (
        {"make_sample_weight": lambda hp: 1.0},
        TypeError,
        r"result of make_sample_weight to be an array \[N\], got float",
    ),
    "shape": (
        {"make_sample_weight": lambda hp: jnp.ones(3)},
        ValueError,
        r"make_sample_weight to return an array of shape \(37,\), got \(3,\)",
    ),
    "column": (
        {"make_labels": lambda hp, y: y[:, 0]},
        ValueError,
        r"make_labels to return an array of shape \(37, 1\), got \(37,\)",
    ),
    "negative": (
        {"make_sample_weight": lambda hp: 1 - 20 * hp["learning_rate"] * FOLD},
        ValueError,
        r"finite weights >= 0, .* which it does not for hparams \{'learning_rate': 0.1",
    ),
    "all 0": (
        {"make_sample_weight": lambda hp: jnp.zeros(N)},
        ValueError,
        "not all of them 0",
    ),
    "inf": (
        {"make_sample_weight": lambda hp: jnp.ones(N).at[3].set(jnp.inf)},
        ValueError,
        "finite weights",
    ),
    "all that counts is 0": (
        {
            "make_sample_weight": lambda hp: jnp.arange(N) == 3,
            "sample_weight": np.arange(N) != 3,
        },
        ValueError,
        "not all of them 0 .times sample_weight.",
    ),
    "a product of 0": (
        {
            "make_sample_weight": lambda hp: (
                jnp.zeros(N).at[:2].set(jnp.array([1, 1e-30]))
            ),
            "sample_weight": np.array([0, 1e-30, 1, *[0] * (N - 3)], np.float32),
        },
        ValueError,
        "not all of them 0 .times sample_weight.",
    ),
    "held out of weight 0": (
        {
            "make_sample_weight": lambda hp: jnp.arange(N) != 3,
            "sample_weight": np.arange(N) != 3,
            "validation": "held_out",
        },
        ValueError,
        "some weights of 0 for validation=.held_out",
    ),
    "label 2": (
        {"make_labels": lambda hp, y: y + 10 * hp["learning_rate"]},
        ValueError,
        r"make_labels to return labels in \[0, 1\]",
    ),
    "nothing held out": (
        {"make_sample_weight": lambda hp: jnp.ones(N), "validation": "held_out"},
        ValueError,
        "some weights of 0 for validation=.held_out",
    ),
    "held out of nothing": (
        {"validation": "held_out"},
        ValueError,
        "expected make_sample_weight with validation",
    ),
    "word": ({"validation": "test"}, ValueError, "examples or .held_out., got 'test'"),
    "unread": (
        LEFT_OUT | {"hparams": jaxbce.grid(learning_rate=[0.1], draw=[1, 2])},
        ValueError,
        "to be read by the functions .* got draw",
    ),
    "both": (
        {"params": SHAPES},
        TypeError,
        "one of hidden and params, got both",
    ),
    "neither": ({"hidden": None}, TypeError, "hidden and params, got neither"),
    "dtype": (
        {"hidden": None, "params": SHAPES, "dtype": "bfloat16"},
        TypeError,
        "dtype to be that of params, float32, got bfloat16",
    ),
    "points": (
        {"hidden": None, "params": STACKED},
        ValueError,
        r"params with 1 or 2 points, got shape \(3, 2, 5, 4\)",
    ),
    "seeds": (
        {"hidden": None, "params": jax.tree.map(lambda t: t[:1], STACKED)},
        ValueError,
        "params with 1 or 1 seeds",
    ),
    "one axis": (
        {"hidden": None, "params": jax.tree.map(lambda t: t[0], STACKED)},
        ValueError,
        "no leading axes or .points, seeds., got",
    ),
    "a list": ({"hidden": None, "params": [1.0]}, TypeError, "a tuple of Layer"),
    "features": (
        {"hidden": None, "params": jaxbce.init(KEY, (3, 1))},
        ValueError,
        "x of shape",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_argument_is_refused_by_name(options, error, message):
    x, y = data(dtype="float32")
    given = {"hparams": {"learning_rate": [0.0, 0.1]}} | SMALL | options
    with pytest.raises(error, match=message):
        jaxbce.sweep(KEY, x, y, **given)


def test_features_must_be_finite_unless_all_members_give_them_weight_0():
    x, y = data(dtype="float32")
    x[3, 1] = np.nan
    options = SMALL | FOLDS | {"hparams": {"learning_rate": [0.1], "fold": [3]}}
    with pytest.raises(ValueError, match=r"expected x to be finite.* nan at x\[3, 1\]"):
        jaxbce.sweep(KEY, x, y, **options)
    found = jaxbce.sweep(KEY, x, y, sample_weight=np.arange(N) != 3, **options)
    assert np.isfinite(found.train_loss).all()
