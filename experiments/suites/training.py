"""What is measured side by side: whole runs of training, of one network and of many."""

import functools
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbce
from experiments.suites import torch_peers
from experiments.suites.case import OURS, Case, missing_among, of_gradient, results_of
from experiments.support import baselines
from experiments.support.timing import Call

AGREEMENT = 1e-10  # float64, after two epochs or a run
ROUGH = 0.3  # float32, after thousands of steps, some at a rate where chaos begins
STEPS = 1000  # of one measurement of fit, about
NETWORK_STEPS = 1 << 17  # of one of sweep at 30→16→1, batch 32, about
RATE = 1e-3

# Rows, rows in a batch, layer sizes, optimizer.
FITS = (
    (1408, 32, (64, 32, 1), "adam"),
    (1024, 32, (30, 16, 1), "sgd"),
    (1024, 32, (30, 16, 1), "adam"),
    (1984, 64, (64, 64, 32, 1), "adam"),
    (2048, 128, (64, 128, 1), "adam"),
    (569, 569, (30, 32, 1), "adam"),
    (131072, 256, (30, 64, 1), "adam"),
)

# Networks, then as above: from one to thousands, widths 8 to 128, one row to all.
SWEEPS = (
    (256, 512, 32, (30, 16, 1), "sgd"),
    (1024, 512, 32, (30, 16, 1), "sgd"),
    (256, 512, 32, (30, 16, 1), "adam"),
    (1024, 512, 32, (30, 16, 1), "adam"),
    (256, 1024, 128, (64, 32, 1), "sgd"),
    (256, 1024, 128, (64, 32, 1), "adam"),
    (256, 569, 569, (30, 32, 1), "sgd"),
    (256, 569, 569, (30, 32, 1), "adam"),
    (1, 512, 32, (30, 16, 1), "sgd"),
    (1, 569, 569, (30, 128, 1), "adam"),
    (2, 512, 32, (30, 16, 1), "sgd"),
    (8, 512, 32, (30, 8, 1), "sgd"),
    (8, 64, 1, (30, 128, 1), "sgd"),
    (64, 64, 1, (30, 16, 1), "sgd"),
    (64, 512, 32, (30, 128, 1), "sgd"),
    (64, 569, 569, (30, 128, 1), "sgd"),
    (64, 569, 569, (30, 8, 1), "adam"),
    (256, 1024, 64, (64, 32, 16, 1), "adam"),
    (4096, 512, 32, (30, 8, 1), "sgd"),
    (4096, 64, 1, (30, 8, 1), "adam"),
)
ACCELERATOR_SWEEPS = (
    (4096, 512, 32, (30, 16, 1), "adam"),
    (100000, 512, 32, (30, 16, 1), "sgd"),
    (100000, 512, 32, (30, 16, 1), "adam"),
    (16384, 1024, 128, (64, 32, 1), "adam"),
    (4096, 1024, 128, (64, 128, 1), "adam"),
    (4096, 569, 569, (30, 32, 1), "adam"),
)
OTHERS = (256, 512, 32, (30, 16, 1), "adam")  # where other libraries are measured
SCIKIT_LEARN = 16, 5  # networks and epochs that are enough to measure it by


_OPTIMIZERS = {
    "sgd": lambda hp: optax.sgd(hp["learning_rate"]),
    "adam": lambda hp: optax.adam(hp["learning_rate"]),
}


def _data(n: int, n_in: int, key: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(key, (n, n_in), dtype)
    return x, (jnp.sum(x[:, :2], axis=1, keepdims=True) > 0).astype(dtype)


def _flop(batch_size: int, layers: tuple[int, ...]) -> float:
    """Of the matrix products of a step of one network."""
    return 2.0 * batch_size * of_gradient(layers)


def _bytes(layers: tuple[int, ...], optimizer: str) -> float:
    """To read and write float32 parameters and an optimizer's state once."""
    numbers = sum(a * b + b for a, b in pairwise(layers))
    return 8.0 * numbers * {"sgd": 1, "adam": 3}[optimizer]


def _size(batch_size: int, n: int, layers: tuple[int, ...], optimizer: str) -> str:
    of = f"{batch_size} of {n}" if batch_size < n else f"full of {n}"
    return f"{of}, {'→'.join(map(str, layers))}, {optimizer}"


def fit(
    n: int, batch_size: int, layers: tuple[int, ...], optimizer: str, key: jax.Array
) -> Case:
    """A run of one network, beside the same loop written plainly."""
    key_p, key_x, key_rows = jax.random.split(key, 3)
    transformation = _OPTIMIZERS[optimizer]({"learning_rate": RATE})
    epochs = max(1, STEPS * batch_size // n)
    steps = epochs * n // batch_size

    def plain(params: Any, x: Any, y: Any) -> Any:
        options = {"optimizer": transformation, "epochs": epochs}
        options |= {"batch_size": batch_size}
        return baselines.plain_fit(key_rows, params, x, y, **options)

    def by_fit(params: Any, x: Any, y: Any) -> Any:
        options = {"optimizer": transformation, "num_steps": steps}
        options |= {"batch_size": batch_size if batch_size < n else None}
        return jaxbce.fit(key_rows, params, x, y, **options).params

    functions = {OURS: by_fit, "plain loop": plain}

    def arguments(dtype: str) -> Any:
        params = jaxbce.init(key_p, layers, dtype=dtype)
        return params, *_data(n, layers[0], key_x, dtype)

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            args = arguments("float64")
            return {name: jax.jit(f)(*args) for name, f in functions.items()}

    def sides() -> dict[str, Call]:
        args = arguments("float32")
        programs = {
            name: jax.jit(lambda *a, f=f: f(*a)).lower(*args).compile()
            for name, f in functions.items()
        }
        return {
            name: Call(functools.partial(program, *args), units=steps)
            for name, program in programs.items()
        }

    return Case(
        suite="fit",
        quantity="fit",
        size=_size(batch_size, n, layers, optimizer),
        sides=sides,
        results=results_of,
        tolerance=AGREEMENT,
        rough=ROUGH,
        exact=exact,
        flop=_flop(batch_size, layers),
        bytes=_bytes(layers, optimizer),
        unit="step",
    )


def sweep(
    suite: str,
    members: int,
    n: int,
    batch_size: int,
    layers: tuple[int, ...],
    optimizer: str,
    key: jax.Array,
    *,
    along: tuple[str, float] | None = None,
) -> Case:
    """A sweep of learning rates beside `vmap` of the plain loop, on one device and all.

    Whole calls, from data in memory to parameters in the host's.
    """
    make, devices = _OPTIMIZERS[optimizer], jax.devices()
    devices = devices[: math.gcd(members, len(devices))]
    work = max(_flop(batch_size, layers) / _flop(32, (30, 16, 1)), 0.1)
    most = min(NETWORK_STEPS / members / work, 4096)
    long = max(1, round(most * batch_size / n))

    def train(dtype: str, epochs: int) -> dict[str, Call]:
        data = _data(n, layers[0], key, dtype)
        rates = jnp.geomspace(1e-4, 1e-1, members, dtype=dtype)
        keys = jax.random.split(jax.random.fold_in(key, 0))
        params = jaxbce.init(keys[0], layers, dtype=dtype)
        options: Any = {"make_optimizer": make, "batch_size": batch_size}
        plain = functools.partial(
            baselines.plain_sweep, params, *data, keys[1], epochs=epochs, **options
        )
        vmap, spread = plain(), plain(devices=devices)
        steps = epochs * n // batch_size
        if batch_size == n:
            options["batch_size"] = None
        options |= {"num_steps": steps, "hidden": layers[1:-1], "dtype": dtype}
        options |= {"hparams": {"learning_rate": np.asarray(rates)}}
        sides: dict[str, Call] = {
            OURS: Call(
                lambda: jaxbce.sweep(key, *data, **options).params,
                units=steps * members,
                result=lambda params: jax.tree.map(lambda t: t[:, 0], params),
            ),
            "vmap": Call(lambda: jax.device_get(vmap(rates)), units=steps * members),
        }
        if len(devices) > 1:
            sides["vmap, sharded"] = Call(
                lambda: jax.device_get(spread(rates)), units=steps * members
            )
        return sides

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            return results_of(train("float64", 2))

    return Case(
        suite=suite,
        quantity="sweep" if along else f"{members} network{'s' * (members > 1)}",
        size=_size(batch_size, n, layers, optimizer),
        sides=lambda: train("float32", long),
        results=results_of,
        tolerance=AGREEMENT,
        rough=ROUGH,
        exact=exact,
        flop=_flop(batch_size, layers),
        bytes=_bytes(layers, optimizer),
        unit="network-step",
        along=along,
    )


def others(key: jax.Array) -> Case:
    """The sweep beside other libraries, with one learning rate for all members.

    PyTorch begins and draws its rows as jaxbce does, and must end alike;
    scikit-learn's MLPClassifier draws its own, and trains some of the networks.
    """
    members, n, batch_size, layers, optimizer = OTHERS
    some, epochs = SCIKIT_LEARN
    counts = {"torch.func.vmap": members, "PyTorch, one": 0}
    missing = missing_among(counts)

    def orders(steps: int) -> np.ndarray:
        key_rows = jax.random.split(jax.random.fold_in(key, 0))[1]
        epochs = [
            jax.random.permutation(jax.random.fold_in(key_rows, epoch), n)
            for epoch in range(steps * batch_size // n)
        ]
        return np.concatenate(epochs).reshape(-1, batch_size)

    def train(dtype: str, steps: int) -> dict[str, Call]:
        x, y = _data(n, layers[0], key, dtype)
        key_params = jax.random.split(jax.random.fold_in(key, 0))[0]
        start = jaxbce.init(key_params, layers, dtype=dtype)
        hidden = layers[1:-1]
        options: Any = {"make_optimizer": _OPTIMIZERS[optimizer], "hidden": hidden}
        options |= {"hparams": {"learning_rate": np.full(members, RATE)}}
        options |= {"batch_size": batch_size, "dtype": dtype}
        torch = {
            name: Call(
                torch_peers.adam(start, x, y, orders(steps), RATE, count),
                units=steps * max(count, 1),
                result=lambda params: jax.tree.map(
                    lambda t, one: np.broadcast_to(t, (members, *one.shape)),
                    params,
                    start,
                ),
            )
            for name, count in counts.items()
            if name not in missing
        }
        ours = functools.partial(jaxbce.sweep, key, x, y, num_steps=steps, **options)
        theirs: Any = {"batch_size": batch_size, "max_iter": epochs, "tol": 0.0}
        theirs |= {"n_iter_no_change": epochs + 1}
        rates, numpy = [RATE] * some, (np.asarray(x), np.asarray(y).ravel())
        made = some * epochs * n // batch_size

        def scikit_learn() -> None:
            if baselines.scikit_learn_sweep(*numpy, hidden, rates, theirs) != made:
                raise RuntimeError(f"scikit-learn did not make {made} steps")

        return {
            OURS: Call(
                lambda: ours().params,
                units=steps * members,
                result=lambda params: jax.tree.map(lambda t: t[:, 0], params),
            ),
            **torch,
            "scikit-learn": Call(scikit_learn, units=made),
        }

    def results(calls: dict[str, Call]) -> dict[str, Any]:
        return results_of({n: c for n, c in calls.items() if n != "scikit-learn"})

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            return results(train("float64", 2 * n // batch_size))

    return Case(
        suite="sweep",
        quantity=f"{members} networks",
        size=_size(batch_size, n, layers, optimizer),
        sides=lambda: train("float32", 16 * n // batch_size),
        results=results,
        tolerance=AGREEMENT,
        rough=ROUGH,
        exact=exact,
        flop=_flop(batch_size, layers),
        bytes=_bytes(layers, optimizer),
        unit="network-step",
        missing=missing,
    )


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All of suite "fit" or "sweep", or the first."""
    on_cpu = jax.default_backend() == "cpu"
    if suite == "fit":
        for size in FITS[: 1 if quick else None]:
            yield fit(*size, key)
        return
    for size in (SWEEPS if on_cpu else ACCELERATOR_SWEEPS)[: 1 if quick else None]:
        yield sweep("sweep", *size, key)
    yield others(key)
