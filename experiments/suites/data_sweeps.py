"""Benchmark cases: sweeps in which each network trains on its own examples.

Cross-validation leaves out one fold per network, and leave-one-out one example. jaxbce
gives the examples that are left out weight 0, so that networks still share batches.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbce
from experiments.suites import training
from experiments.suites.case import JAXBCE, Case, results_of
from experiments.support import baselines
from experiments.support.timing import Call

LAYERS, OPTIMIZER = (30, 16, 1), "adam"

# Number of examples, folds, points per fold, batch size.
CROSS_VALIDATION = (640, 5, 32, 32)
SIZES = (CROSS_VALIDATION, (512, 512, 1, 512), (512, 512, 1, 32))
MIN_STEPS = 64  # per network, so that the cost of gathering examples is spread
GRID_SEARCH_EPOCHS = 10
QUICK_POINTS = 4  # of scikit-learn


def _name(n: int, folds: int, points: int) -> str:
    return "leave-one-out" if folds == n else f"{folds} folds × {points} points"


def _folds(n: int, folds: int) -> np.ndarray:
    """The fold of each example, `[N]`."""
    return np.arange(n) % folds


def _points(folds: int, points: int) -> dict[str, np.ndarray]:
    return jaxbce.grid(fold=range(folds), learning_rate=np.geomspace(1e-4, 0.1, points))


def _options(fold: np.ndarray, batch_size: int, dtype: str) -> dict[str, Any]:
    """Options of the sweep, apart from the hyperparameters."""
    fold_on_device = jnp.asarray(fold)
    return {
        "make_optimizer": training.OPTIMIZERS[OPTIMIZER],
        "make_sample_weight": lambda hp: fold_on_device != hp["fold"],
        "hidden": LAYERS[1:-1],
        "batch_size": batch_size if batch_size < len(fold) else None,
        "dtype": dtype,
    }


def _case(n: int, batch_size: int, quantity: str, **fields: Any) -> Case:
    return Case(
        suite="data_sweep",
        quantity=quantity,
        size=training.size_text(batch_size, n, LAYERS, OPTIMIZER),
        flop=training.step_flop(batch_size, LAYERS),
        bytes=training.step_bytes(LAYERS, OPTIMIZER),
        unit="network-step",
        **fields,
    )


def sweep_case(
    n: int, folds: int, points: int, batch_size: int, key: jax.Array
) -> Case:
    """A sweep with weights, the same without them, and `vmap` of the plain loop.

    In the plain loop, a network either gathers its own examples once before training,
    or weights the examples of shared batches. Batches of gathered examples differ from
    jaxbce's, so their results are compared only if every batch is full.
    """
    fold, hparams = _folds(n, folds), _points(folds, points)
    members = folds * points
    devices = jax.devices()
    devices = devices[: math.gcd(members, len(devices))]
    own = jnp.stack([jnp.flatnonzero(jnp.asarray(fold != i)) for i in range(folds)])
    own_batch = min(batch_size, own.shape[1])

    def own_examples(hp: Any, x: jax.Array, y: jax.Array) -> Any:
        indices = own[hp["fold"]]
        return x[indices], y[indices]

    def weighted(hp: Any, x: jax.Array, y: jax.Array) -> Any:
        weight = (jnp.asarray(fold) != hp["fold"]).astype(x.dtype)
        return x, y, weight / jnp.mean(weight)

    # Batch size, examples per epoch, function that returns a network's examples.
    loops = {
        "vmap, own": (own_batch, own.shape[1], own_examples),
        "vmap, weights": (batch_size, n, weighted),
    }

    def train(dtype: str, epochs: int) -> dict[str, Call]:
        x, y = training.random_data(n, LAYERS[0], key, dtype)
        key_params, key_order = jax.random.split(jax.random.fold_in(key, 0))
        params = jaxbce.init(key_params, LAYERS, dtype=dtype)
        steps = epochs * (n // batch_size)
        options: Any = _options(fold, batch_size, dtype) | {"num_steps": steps}
        unweighted: Any = options | {"make_sample_weight": None}
        rates = {"learning_rate": hparams["learning_rate"]}
        units = steps * members
        calls: dict[str, Call] = {
            JAXBCE: Call(
                lambda: jaxbce.sweep(key, x, y, hparams=hparams, **options).params,
                units=units,
                result=training.first_seed,
            ),
            "without weights": Call(
                lambda: jaxbce.sweep(key, x, y, hparams=rates, **unweighted).params,
                units=units,
            ),
        }
        arrays = {
            "fold": jnp.asarray(hparams["fold"], "int32"),
            "learning_rate": jnp.asarray(hparams["learning_rate"], dtype),
        }
        for name, (batch, examples, member_data) in loops.items():
            steps_per_epoch = examples // batch
            loop_epochs = round(steps / steps_per_epoch)
            plain_sweep = functools.partial(
                baselines.plain_sweep,
                *(params, x, y, key_order),
                make_optimizer=options["make_optimizer"],
                epochs=loop_epochs,
                batch_size=batch,
                member_data=member_data,
            )
            programs = {name: plain_sweep()}
            if len(devices) > 1:
                programs[f"{name}, sharded"] = plain_sweep(devices=devices)
            for program_name, program in programs.items():
                calls[program_name] = Call(
                    lambda program=program: jax.device_get(program(arrays)),
                    units=loop_epochs * steps_per_epoch * members,
                )
        return calls

    def results(calls: dict[str, Call]) -> dict[str, Any]:
        other_work = {"without weights"}
        if batch_size < n:
            other_work |= {"vmap, own", "vmap, own, sharded"}
        return results_of({k: c for k, c in calls.items() if k not in other_work})

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            return results(train("float64", 2))

    epochs = training.sweep_epochs(members, n, batch_size, LAYERS)
    epochs = max(epochs, MIN_STEPS * batch_size // n)
    return _case(
        n,
        batch_size,
        _name(n, folds, points),
        implementations=lambda: train("float32", epochs),
        results=results,
        tolerance=training.TOLERANCE,
        loose_tolerance=training.LOOSE_TOLERANCE,
        exact=exact,
    )


def grid_search_case(
    n: int,
    folds: int,
    points: int,
    batch_size: int,
    key: jax.Array,
    *,
    scikit_learn_points: int,
) -> Case:
    """Cross-validation by a sweep and by scikit-learn's GridSearchCV.

    Both take the same number of steps per network and evaluate each network on the
    examples that it leaves out. scikit-learn draws its own initial parameters and is
    not compared. The sweep's losses are compared with those of its networks in plain
    JAX. Worker processes of scikit-learn are started before times are measured.
    """
    fold, hparams = _folds(n, folds), _points(folds, points)
    steps_per_epoch = int(np.count_nonzero(fold != 0)) // batch_size
    steps = GRID_SEARCH_EPOCHS * steps_per_epoch
    x, y = training.random_data(n, LAYERS[0], key, "float32")
    options: Any = _options(fold, batch_size, "float32") | {"validation": "held_out"}

    def by_sweep() -> jaxbce.SweepResult:
        return jaxbce.sweep(key, x, y, hparams=hparams, num_steps=steps, **options)

    expected = folds * scikit_learn_points * steps
    settings: Any = {"batch_size": batch_size, "max_iter": GRID_SEARCH_EPOCHS}
    settings |= {"tol": 0.0, "n_iter_no_change": GRID_SEARCH_EPOCHS + 1}
    rates = _points(1, scikit_learn_points)["learning_rate"]
    features, labels = np.asarray(x), np.asarray(y).ravel()

    def by_grid_search() -> None:
        taken = baselines.scikit_learn_grid_search(
            features, labels, fold, LAYERS[1:-1], rates, settings
        )
        if taken != expected:
            raise RuntimeError(
                f"expected {expected} steps of scikit-learn, got {taken}"
            )

    def results(calls: dict[str, Call]) -> dict[str, Any]:
        result = calls[JAXBCE].run()
        held_out = jnp.stack(
            [jnp.flatnonzero(jnp.asarray(fold == i)) for i in range(folds)]
        )
        indices = held_out[hparams["fold"]]
        losses = jax.vmap(baselines.plain_loss)(
            training.first_seed(result.params), x[indices], y[indices]
        )
        return {JAXBCE: result.validation_loss[:, 0, -1], "plain JAX": losses}

    return _case(
        n,
        batch_size,
        f"{_name(n, folds, points)}, held out",
        implementations=lambda: {
            JAXBCE: Call(by_sweep, units=steps * folds * points),
            "GridSearchCV": Call(by_grid_search, units=expected),
        },
        results=results,
        tolerance=1e-5,  # float32: sums in another order
    )


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All cases, or cross-validation with few points for scikit-learn if `quick`."""
    del suite
    for size in SIZES[: 1 if quick else None]:
        yield sweep_case(*size, key)
    points = QUICK_POINTS if quick else CROSS_VALIDATION[2]
    yield grid_search_case(*CROSS_VALIDATION, key, scikit_learn_points=points)
