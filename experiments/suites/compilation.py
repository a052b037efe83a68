"""Benchmark cases: time from a new process to the first gradient, and compilation."""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

import jaxbce
from experiments.suites import workloads
from experiments.suites.case import (
    JAXBCE,
    Case,
    layers_text,
    missing_among,
    results_of,
)
from experiments.support import baselines
from experiments.support.timing import Call

# Scripts of a new process; each prints the loss and its gradient's squared norm.
_DATA = """
import numpy as np
draw = np.random.default_rng(0).standard_normal
x, (w1, w2) = draw((256, 30), "f"), (draw((30, 16), "f"), draw((16, 1), "f"))
y = (x[:, :1] > 0).astype("f")
"""
_JAXBCE = """
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
_SCRIPTS = {JAXBCE: _JAXBCE, "jax and optax": _PLAIN, "PyTorch": _TORCH}
_SIZES = (  # number of examples, layer sizes
    (32, (30, 16, 1)),
    (4096, (512, 1024, 1)),  # processed in blocks
    (1024, (64, 128, 64, 1)),
)


def _new_process() -> Case:
    """From the start of a process to its first gradient."""

    def run_script(script: str) -> list[float]:
        command = [sys.executable, "-c", _DATA + script + _PRINT]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [float(number) for number in done.stdout.split()]

    missing = missing_among(_SCRIPTS)

    def implementations() -> dict[str, Call]:
        return {
            name: Call(functools.partial(run_script, script))
            for name, script in _SCRIPTS.items()
            if name not in missing
        }

    return Case(
        suite="compile",
        quantity="new process to first gradient",
        size="256×30→16→1",
        implementations=implementations,
        results=results_of,
        tolerance=1e-5,
        missing=missing,
    )


def _cached_results(functions: dict[str, Callable[..., Any]], args: Any) -> Any:
    """`Case.results` for cases that share functions, which are called once."""

    @functools.cache
    def results() -> dict[str, Any]:
        return {name: jax.jit(f)(*args) for name, f in functions.items()}

    return lambda calls: results()


def _trace(jitted: Any, args: Any) -> None:
    jitted.trace(*args)


def _trace_and_compile(jitted: Any, args: Any) -> None:
    jitted.lower(*args).compile()


def _compilation_case(
    quantity: str,
    size: str,
    functions: dict[str, Callable[..., Any]],
    args: Any,
    compile_step: Callable[[Any, Any], None],
    results: Callable[[dict[str, Call]], dict[str, Any]],
) -> Case:
    """Time of `compile_step(jitted, args)` with JAX's caches empty."""

    def run(function: Callable[..., Any]) -> None:
        jax.clear_caches()
        compile_step(jax.jit(lambda *a: function(*a)), args)

    def implementations() -> dict[str, Call]:
        return {
            name: Call(functools.partial(run, function))
            for name, function in functions.items()
        }

    return Case("compile", quantity, size, implementations, results, tolerance=1e-5)


def _gradient_cases(
    num_examples: int, layers: tuple[int, ...], key: jax.Array
) -> Iterator[Case]:
    """Tracing of a gradient, and tracing with compilation."""
    functions = {
        JAXBCE: lambda *a: jaxbce.value_and_grad(*a),
        "jax.grad": jax.value_and_grad(baselines.plain_loss),
    }
    args = workloads.arguments(num_examples, layers, key)[:3]
    results = _cached_results(functions, args)
    size = f"{num_examples}×{layers_text(layers)}"
    for quantity, compile_step in (
        ("trace", _trace),
        ("trace and compile", _trace_and_compile),
    ):
        yield _compilation_case(quantity, size, functions, args, compile_step, results)


def _fit_case(key: jax.Array) -> Case:
    """Tracing and compilation of a training run."""
    options: Any = {"optimizer": optax.adam(1e-3), "batch_size": 32}
    functions = {
        JAXBCE: lambda *a: jaxbce.fit(key, *a, num_steps=16, **options).params,
        "plain loop": lambda *a: baselines.plain_fit(key, *a, epochs=1, **options),
    }
    args = workloads.arguments(512, (30, 16, 1), key)[:3]
    return _compilation_case(
        "trace and compile fit",
        "32 of 512, 30→16→1, adam",
        functions,
        args,
        _trace_and_compile,
        _cached_results(functions, args),
    )


def cases(suite: str, quick: bool, key: jax.Array) -> Iterator[Case]:
    """All cases of suite "compile", or those of the smallest gradient if `quick`."""
    del suite
    yield _new_process()
    for num_examples, layers in _SIZES[: 1 if quick else None]:
        yield from _gradient_cases(num_examples, layers, key)
    if not quick:
        yield _fit_case(key)
