"""What is measured side by side: how long it takes to begin, and how cost grows."""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

import jaxbce
from experiments.suites import workloads
from experiments.suites.case import OURS, Case, missing_among, results_of
from experiments.support import baselines
from experiments.support.timing import Call

# What a fresh process runs; each prints the loss and its gradient's squared norm.
_DATA = """
import numpy as np
draw = np.random.default_rng(0).standard_normal
x, (w1, w2) = draw((256, 30), "f"), (draw((30, 16), "f"), draw((16, 1), "f"))
y = (x[:, :1] > 0).astype("f")
"""
_OURS = """
import jax, jax.numpy as jnp, jaxbce
params = tuple(jaxbce.Layer(jnp.asarray(w), jnp.zeros(w.shape[1])) for w in (w1, w2))
value, grads = jax.block_until_ready(jaxbce.value_and_grad(params, x, y))
grads = jax.tree.leaves(grads)
"""
_PLAIN = """
import jax, jax.numpy as jnp, optax
params = tuple((jnp.asarray(w), jnp.zeros(w.shape[1])) for w in (w1, w2))
def loss(params, x, y):
    (w1, b1), (w2, b2) = params
    a = jax.nn.relu(x @ w1 + b1) @ w2 + b2
    return optax.sigmoid_binary_cross_entropy(a, y).mean()
value, grads = jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(params, x, y))
grads = jax.tree.leaves(grads)
"""
_TORCH = """
import torch
from torch.nn import Linear, ReLU, Sequential
model = Sequential(Linear(30, 16), ReLU(), Linear(16, 1))
for layer, w in ((model[0], w1), (model[2], w2)):
    layer.weight.data, layer.bias.data = torch.tensor(w.T), torch.zeros(w.shape[1])
entropy = torch.nn.functional.binary_cross_entropy_with_logits
value = entropy(model(torch.tensor(x)), torch.tensor(y))
value.backward()
grads = [parameter.grad for parameter in model.parameters()]
"""
_PRINT = """
print(float(value), float(sum((np.asarray(g) ** 2).sum() for g in grads)))
"""
_SCRIPTS = {OURS: _OURS, "jax and optax": _PLAIN, "PyTorch": _TORCH}
_COMPILED = (
    (32, (30, 16, 1)),
    (4096, (512, 1024, 1)),  # which is taken in blocks
    (1024, (64, 128, 64, 1)),
)


def _cold_start() -> Case:
    def process(script: str) -> list[float]:
        command = [sys.executable, "-c", _DATA + script + _PRINT]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [float(number) for number in done.stdout.split()]

    missing = missing_among(_SCRIPTS)

    def sides() -> dict[str, Call]:
        return {
            name: Call(functools.partial(process, script))
            for name, script in _SCRIPTS.items()
            if name not in missing
        }

    return Case(
        suite="compile",
        quantity="new process to first gradient",
        size="256×30→16→1",
        sides=sides,
        results=results_of,
        tolerance=1e-5,
        missing=missing,
    )


def _results_once(functions: dict[str, Callable[..., Any]], args: Any) -> Any:
    """`Case.results` of several cases that begin the same functions."""

    @functools.cache
    def results() -> dict[str, Any]:
        return {name: jax.jit(f)(*args) for name, f in functions.items()}

    return lambda _: results()


def _first(
    quantity: str,
    size: str,
    functions: dict[str, Callable[..., Any]],
    args: Any,
    begin: Callable[[Any, Any], Any],
    results: Callable[[dict[str, Call]], dict[str, Any]],
) -> Case:
    """What `begin(jitted, args)` takes with nothing left from an earlier time."""

    def start(function: Callable[..., Any]) -> Any:
        jax.clear_caches()
        return begin(jax.jit(lambda *a: function(*a)), args)

    def sides() -> dict[str, Call]:
        return {
            name: Call(functools.partial(start, function))
            for name, function in functions.items()
        }

    return Case("compile", quantity, size, sides, results, tolerance=1e-5)


def _compilation(key: jax.Array) -> Iterator[Case]:
    """Tracing, and all up to the program, of one gradient; then of a run."""

    def trace(jitted: Any, args: Any) -> Any:
        jitted.trace(*args)

    def compiling(jitted: Any, args: Any) -> Any:
        jitted.lower(*args).compile()

    gradients = {
        OURS: lambda *a: jaxbce.value_and_grad(*a),
        "jax.grad": jax.value_and_grad(baselines.plain_loss),
    }
    for rows, layers in _COMPILED:
        args = workloads.arguments(rows, layers, key)[:3]
        size = f"{rows}×{'→'.join(map(str, layers))}"

        agreed = _results_once(gradients, args)
        yield _first("trace", size, gradients, args, trace, agreed)
        yield _first("trace and compile", size, gradients, args, compiling, agreed)

    optimizer = optax.adam(1e-3)
    options: Any = {"optimizer": optimizer, "batch_size": 32}
    runs = {
        OURS: lambda *a: jaxbce.fit(key, *a, num_steps=16, **options).params,
        "plain loop": lambda *a: baselines.plain_fit(key, *a, epochs=1, **options),
    }
    args = workloads.arguments(512, (30, 16, 1), key)[:3]
    agreed = _results_once(runs, args)
    size = "32 of 512, 30→16→1, adam"
    yield _first("trace and compile fit", size, runs, args, compiling, agreed)


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All of suite "compile", or a small part."""
    del suite
    yield _cold_start()
    for number, case in enumerate(_compilation(key)):
        if number < 2 or not quick:
            yield case
