"""`grid` and `sweep`: members are solo runs, wherever and with whomever they train."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import problem, relative_error

import jaxbce

KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


def data(rows=37, sizes=(5, 4, 1), dtype="float64"):
    _, x, y = problem(sizes, rows=rows).arguments(dtype)
    return x, jnp.round(y)


def sgd(hp):
    return optax.sgd(hp["learning_rate"])


def adamw(hp):
    return optax.adamw(hp["learning_rate"], weight_decay=hp["weight_decay"])


def per_layer(hp):
    """A learning rate a layer, and a schedule of traced length."""

    def falling(t):
        return hp["learning_rate"] * (1 - jnp.minimum(t / hp["decay_steps"], 1))

    each = {"hidden": optax.adam(falling), "output": optax.adam(hp["output_rate"])}
    return optax.partition(each, ("hidden", "output"))


def solo(x, y, hp, seed, *, hidden, make_optimizer, dtype="float64", **options):
    """The member as the docstring of `sweep` makes it."""
    key_params, key_rows = jax.random.split(jax.random.fold_in(KEY, seed))
    params = jaxbce.init(key_params, (x.shape[1], *hidden, y.shape[1]), dtype=dtype)
    scale = hp.get("init_scale", 1.0)
    params = tuple(layer._replace(w=scale * layer.w) for layer in params)
    smoothing = hp.get("label_smoothing", 0.0)
    options["pos_weight"] = hp.get("pos_weight", options.get("pos_weight", 1.0))
    return jaxbce.fit(
        key_rows,
        params,
        x,
        y * (1 - smoothing) + smoothing / 2,
        optimizer=make_optimizer(hp),
        **options,
    )


CASES = {
    "sgd": (sgd, {"learning_rate": [0.01, 0.1, 1.0]}, {}),
    "full batch": (sgd, {"learning_rate": [0.01, 0.1]}, {"batch_size": None}),
    "adamw": (
        adamw,
        jaxbce.grid(learning_rate=[0.01, 0.1], weight_decay=[0.0, 0.1]),
        {"patience": 5, "pos_weight": 1.5},
    ),
    "per layer, three outputs": (
        per_layer,
        {
            "learning_rate": [0.01, 0.1, 0.05],
            "output_rate": [0.1, 0.1, 0.01],
            "decay_steps": [10, 20, 30],
        },
        {"sizes": (5, 4, 3)},
    ),
    "of the sweep itself": (
        sgd,
        {
            "learning_rate": [0.1, 0.2, 0.1],
            "init_scale": [0.5, 1.0, 2.0],
            "pos_weight": [1.0, 2.0, 0.5],
            "label_smoothing": [0.0, 0.1, 0.2],
        },
        {},
    ),
    "deep": (sgd, {"learning_rate": [0.01, 0.1]}, {"hidden": (6, 5, 4)}),
    "seeds alone": (lambda hp: optax.adam(0.01), {}, {"hidden": ()}),
}


@pytest.mark.parametrize(("make", "hparams", "given"), CASES.values(), ids=CASES)
def test_every_member_is_its_solo_run(make, hparams, given):
    given = dict(given)
    sizes = given.pop("sizes", (5, 4, 1))
    hidden = given.pop("hidden", (4,))
    with jax.enable_x64(True):
        x, y = data(sizes=sizes)
        options: Any = {"num_steps": 30, "batch_size": 8, "evaluate_every": 10}
        options |= {"validation": (x[:9] + 0.1, y[:9])} | given
        common: Any = {"hidden": hidden, "make_optimizer": make, "dtype": "float64"}
        found = jaxbce.sweep(
            KEY, x, y, hparams=hparams, num_seeds=2, first_seed=5, **common, **options
        )
        points = len(next(iter(hparams.values()), [0]))
        assert found.train_loss.shape == (points, 2, 3)
        for i in range(points):
            hp = {name: values[i] for name, values in hparams.items()}
            for s in range(2):
                run = solo(x, y, hp, 5 + s, **common, **options)
                mine = jax.tree.map(lambda leaf, i=i, s=s: leaf[i, s], found)
                assert relative_error(mine.params, run.params) <= 1e-10
                assert relative_error(mine.best_params, run.best_params) <= 1e-10
                for name in ("train_loss", "validation_loss", "best_loss"):
                    a, b = getattr(mine, name), getattr(run, name)
                    np.testing.assert_allclose(a, b, rtol=1e-10)
                for name in ("diverged_at", "best_step", "step"):
                    assert getattr(mine, name) == getattr(run, name)
