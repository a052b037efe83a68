"""Benchmark cases: training runs of one network, and sweeps of many."""

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
from experiments.suites.case import (
    JAXBCE,
    Case,
    gradient_multiplications,
    layers_text,
    missing_among,
    results_of,
)
from experiments.support import baselines
from experiments.support.timing import Call

TOLERANCE = 1e-10  # float64, after two epochs or a run
LOOSE_TOLERANCE = 0.3  # float32, thousands of steps, some at almost chaotic rates
STEPS = 1000  # approximate number per call of fit
NETWORK_STEPS = 1 << 17  # approximate number per call of sweep, 30→16→1, batch 32
RATE = 1e-3

# Number of examples, batch size, layer sizes, optimizer.
FITS = (
    (1408, 32, (64, 32, 1), "adam"),
    (1024, 32, (30, 16, 1), "sgd"),
    (1024, 32, (30, 16, 1), "adam"),
    (1984, 64, (64, 64, 32, 1), "adam"),
    (2048, 128, (64, 128, 1), "adam"),
    (569, 569, (30, 32, 1), "adam"),
    (131072, 256, (30, 64, 1), "adam"),
)

# Number of networks, then as above.
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
LIBRARIES_SIZE = (256, 512, 32, (30, 16, 1), "adam")  # as above, for other libraries
SCIKIT_LEARN_SIZE = 16, 5  # number of networks and epochs for scikit-learn


OPTIMIZERS = {
    "sgd": lambda hp: optax.sgd(hp["learning_rate"]),
    "adam": lambda hp: optax.adam(hp["learning_rate"]),
}


def random_data(
    n: int, n_in: int, key: jax.Array, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Features `[N, n_in]` and labels `[N, 1]` that a line separates."""
    x = jax.random.normal(key, (n, n_in), dtype)
    return x, (jnp.sum(x[:, :2], axis=1, keepdims=True) > 0).astype(dtype)


def step_flop(batch_size: int, layers: tuple[int, ...]) -> float:
    """Floating-point operations in the matrix products of one network's step."""
    return 2.0 * batch_size * gradient_multiplications(layers)


def step_bytes(layers: tuple[int, ...], optimizer: str) -> float:
    """Bytes of reading and writing float32 parameters and optimizer state once."""
    numbers = sum(a * b + b for a, b in pairwise(layers))
    return 8.0 * numbers * {"sgd": 1, "adam": 3}[optimizer]


def size_text(batch_size: int, n: int, layers: tuple[int, ...], optimizer: str) -> str:
    """Sizes of a training run as text, such as "32 of 512, 30→16→1, sgd"."""
    batch = f"{batch_size} of {n}" if batch_size < n else f"full of {n}"
    return f"{batch}, {layers_text(layers)}, {optimizer}"


def fit_case(
    n: int, batch_size: int, layers: tuple[int, ...], optimizer: str, key: jax.Array
) -> Case:
    """`fit` of one network and the same loop written in plain JAX."""
    key_params, key_x, key_order = jax.random.split(key, 3)
    transformation = OPTIMIZERS[optimizer]({"learning_rate": RATE})
    epochs = max(1, STEPS * batch_size // n)
    steps = epochs * n // batch_size

    def by_fit(params: Any, x: Any, y: Any) -> Any:
        options = {"optimizer": transformation, "num_steps": steps}
        options |= {"batch_size": batch_size if batch_size < n else None}
        return jaxbce.fit(key_order, params, x, y, **options).params

    def plain_loop(params: Any, x: Any, y: Any) -> Any:
        options = {"optimizer": transformation, "epochs": epochs}
        options |= {"batch_size": batch_size}
        return baselines.plain_fit(key_order, params, x, y, **options)

    functions = {JAXBCE: by_fit, "plain loop": plain_loop}

    def arguments(dtype: str) -> Any:
        params = jaxbce.init(key_params, layers, dtype=dtype)
        return params, *random_data(n, layers[0], key_x, dtype)

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            args = arguments("float64")
            return {name: jax.jit(f)(*args) for name, f in functions.items()}

    def implementations() -> dict[str, Call]:
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
        size=size_text(batch_size, n, layers, optimizer),
        implementations=implementations,
        results=results_of,
        tolerance=TOLERANCE,
        loose_tolerance=LOOSE_TOLERANCE,
        exact=exact,
        flop=step_flop(batch_size, layers),
        bytes=step_bytes(layers, optimizer),
        unit="step",
    )


def sweep_epochs(members: int, n: int, batch_size: int, layers: tuple[int, ...]) -> int:
    """Number of epochs for about `NETWORK_STEPS` steps' worth of work."""
    work = max(step_flop(batch_size, layers) / step_flop(32, (30, 16, 1)), 0.1)
    steps = min(NETWORK_STEPS / members / work, 4096)
    return max(1, round(steps * batch_size / n))


def first_seed(params: Any) -> Any:
    """Parameters of a sweep with one seed, without the axis of seeds."""
    return jax.tree.map(lambda t: t[:, 0], params)


def sweep_case(
    suite: str,
    members: int,
    n: int,
    batch_size: int,
    layers: tuple[int, ...],
    optimizer: str,
    key: jax.Array,
    *,
    scaling_axis: tuple[str, float] | None = None,
) -> Case:
    """A sweep of learning rates, and `vmap` of the plain loop on one device and on all.

    Times are of whole calls, from data in device memory to parameters in host memory.
    """
    make_optimizer, devices = OPTIMIZERS[optimizer], jax.devices()
    devices = devices[: math.gcd(members, len(devices))]

    def train(dtype: str, epochs: int) -> dict[str, Call]:
        data = random_data(n, layers[0], key, dtype)
        rates = jnp.geomspace(1e-4, 1e-1, members, dtype=dtype)
        hparams = {"learning_rate": rates}
        key_params, key_order = jax.random.split(jax.random.fold_in(key, 0))
        params = jaxbce.init(key_params, layers, dtype=dtype)
        options: Any = {"make_optimizer": make_optimizer, "batch_size": batch_size}
        plain_sweep = functools.partial(
            baselines.plain_sweep, params, *data, key_order, epochs=epochs, **options
        )
        on_one_device, on_all_devices = plain_sweep(), plain_sweep(devices=devices)
        steps = epochs * n // batch_size
        if batch_size == n:
            options["batch_size"] = None
        options |= {"num_steps": steps, "hidden": layers[1:-1], "dtype": dtype}
        options |= {"hparams": {"learning_rate": np.asarray(rates)}}
        units = steps * members
        calls: dict[str, Call] = {
            JAXBCE: Call(
                lambda: jaxbce.sweep(key, *data, **options).params,
                units=units,
                result=first_seed,
            ),
            "vmap": Call(lambda: jax.device_get(on_one_device(hparams)), units=units),
        }
        if len(devices) > 1:
            calls["vmap, sharded"] = Call(
                lambda: jax.device_get(on_all_devices(hparams)), units=units
            )
        return calls

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            return results_of(train("float64", 2))

    epochs = sweep_epochs(members, n, batch_size, layers)
    name = "sweep" if scaling_axis else f"{members} network{'s' * (members > 1)}"
    return Case(
        suite=suite,
        quantity=name,
        size=size_text(batch_size, n, layers, optimizer),
        implementations=lambda: train("float32", epochs),
        results=results_of,
        tolerance=TOLERANCE,
        loose_tolerance=LOOSE_TOLERANCE,
        exact=exact,
        flop=step_flop(batch_size, layers),
        bytes=step_bytes(layers, optimizer),
        unit="network-step",
        scaling_axis=scaling_axis,
    )


def _torch_calls(
    counts: dict[str, int], params: Any, x: Any, y: Any, orders: np.ndarray
) -> dict[str, Call]:
    """PyTorch's training of each number of networks; 0 is one without vmap.

    Results are broadcast to as many networks as `counts` has at most.
    """
    members = max(counts.values(), default=0)

    def result(trained: Any) -> Any:
        return jax.tree.map(
            lambda t, one: np.broadcast_to(t, (members, *one.shape)), trained, params
        )

    return {
        name: Call(
            torch_peers.adam(params, x, y, orders, RATE, count),
            units=len(orders) * max(count, 1),
            result=result,
        )
        for name, count in counts.items()
    }


def _scikit_learn_call(
    x: np.ndarray, y: np.ndarray, hidden: tuple[int, ...], batch_size: int
) -> Call:
    """scikit-learn's training of `SCIKIT_LEARN_SIZE` networks."""
    networks, epochs = SCIKIT_LEARN_SIZE
    options: Any = {"batch_size": batch_size, "max_iter": epochs, "tol": 0.0}
    options |= {"n_iter_no_change": epochs + 1}
    expected = networks * epochs * len(x) // batch_size

    def train() -> None:
        rates = [RATE] * networks
        steps = baselines.scikit_learn_sweep(x, y, hidden, rates, options)
        if steps != expected:
            raise RuntimeError(f"scikit-learn did not make {expected} steps")

    return Call(train, units=expected)


def libraries_case(key: jax.Array) -> Case:
    """A sweep and other libraries, with one learning rate for all networks.

    PyTorch has the same initial parameters and batches as jaxbce, and must end with the
    same parameters. scikit-learn's MLPClassifier draws its own, and is not compared.
    """
    members, n, batch_size, layers, optimizer = LIBRARIES_SIZE
    counts = {"torch.func.vmap": members, "PyTorch, one": 0}
    missing = missing_among(counts)
    key_params, key_order = jax.random.split(jax.random.fold_in(key, 0))

    def orders(epochs: int) -> np.ndarray:
        permutations = [
            jax.random.permutation(jax.random.fold_in(key_order, epoch), n)
            for epoch in range(epochs)
        ]
        return np.concatenate(permutations).reshape(-1, batch_size)

    def train(dtype: str, epochs: int) -> dict[str, Call]:
        x, y = random_data(n, layers[0], key, dtype)
        steps = epochs * n // batch_size
        params = jaxbce.init(key_params, layers, dtype=dtype)
        options: Any = {"make_optimizer": OPTIMIZERS[optimizer]}
        options |= {"hidden": layers[1:-1], "num_steps": steps}
        options |= {"hparams": {"learning_rate": np.full(members, RATE)}}
        options |= {"batch_size": batch_size, "dtype": dtype}
        available = {n: count for n, count in counts.items() if n not in missing}
        return {
            JAXBCE: Call(
                lambda: jaxbce.sweep(key, x, y, **options).params,
                units=steps * members,
                result=first_seed,
            ),
            **_torch_calls(available, params, x, y, orders(epochs)),
            "scikit-learn": _scikit_learn_call(
                np.asarray(x), np.asarray(y).ravel(), layers[1:-1], batch_size
            ),
        }

    def results(calls: dict[str, Call]) -> dict[str, Any]:
        return results_of({n: c for n, c in calls.items() if n != "scikit-learn"})

    def exact() -> dict[str, Any]:
        with jax.enable_x64(True):
            return results(train("float64", 2))

    return Case(
        suite="sweep",
        quantity=f"{members} networks",
        size=size_text(batch_size, n, layers, optimizer),
        implementations=lambda: train("float32", 16),
        results=results,
        tolerance=TOLERANCE,
        loose_tolerance=LOOSE_TOLERANCE,
        exact=exact,
        flop=step_flop(batch_size, layers),
        bytes=step_bytes(layers, optimizer),
        unit="network-step",
        missing=missing,
    )


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All cases of suite "fit" or "sweep", or the first if `quick`."""
    on_cpu = jax.default_backend() == "cpu"
    if suite == "fit":
        for size in FITS[: 1 if quick else None]:
            yield fit_case(*size, key)
        return
    for size in (SWEEPS if on_cpu else ACCELERATOR_SWEEPS)[: 1 if quick else None]:
        yield sweep_case("sweep", *size, key)
    yield libraries_case(key)
