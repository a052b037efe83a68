"""How does jaxbce compare with what a user would otherwise use, in the same run?

    python -m experiments.benchmark --suite gradient
    python -m experiments.benchmark --suite fit
    python -m experiments.benchmark --suite sweep
    python -m experiments.benchmark --suite per_example
    python -m experiments.benchmark --suite curvature

Suite gradient: `jaxbce.value_and_grad` with its default block size beside
`jax.value_and_grad` of optax's loss, float32. Both are compiled, compared with each
other, and timed in turn. Expect a speed of at least 1 at every size, more where the
batch does not fit the cache, and a small part of the temporary memory there.

Suite fit: a step of `jaxbce.fit` beside one of the same loop written with
`jax.value_and_grad` and optax; both must end with the same parameters in float64.
Expect a speed of about 1: what `fit` watches over costs next to nothing.

Suite sweep: `jaxbce.sweep` on all devices, a core each, beside `jit(vmap(train))` of
the same plain loop on one device, which computes on all cores too; they must agree in
float64. Its last rows are scikit-learn's MLPClassifier in a loop over the cores, and
`torch.func.vmap` where PyTorch is installed. Expect a speed of 1.5 to 3.

Suite per_example: norms, clipped sums and inner products of per-example gradients
beside `jax.vmap(jax.grad)`, and jax_privacy.clipped_grad where it is installed, all
at once and by 32 rows; then a clipped sum beside one plain gradient. Expect 30 to 200
where the network is not tiny, and a clipped sum for the price of a gradient.

Suite curvature: the tangent kernel beside the product of explicit Jacobians, Hessian
and Gauss-Newton products beside `jax.jvp` of `jax.grad`, and of the latter beside the
`jvp` and `vjp` of the logits. Expect 20 and more, then 1 to 2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import jaxbce
from experiments import _baselines, _cli, _contests, _results, _timing

flags.adopt_module_key_flags(_cli)
_SUITE = flags.DEFINE_enum(
    "suite",
    "gradient",
    ["gradient", "fit", "sweep", "per_example", "curvature"],
    "What to measure.",
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 15, "How often each side is timed in each repeat.", lower_bound=3
)
_REPEATS = flags.DEFINE_integer(
    "repeats",
    5,
    "How often both sides are compiled and their data copied anew.",
    lower_bound=1,
)

Row = dict[str, Any]

# Rows, then layer sizes: from a teacher's example to what fills a CPU's caches.
GRADIENT_SIZES = (
    (32, (30, 16, 1)),
    (256, (64, 100, 1)),
    (1024, (128, 512, 1)),
    (4096, (512, 1024, 1)),
    (4096, (512, 1024, 16)),
    (8192, (1024, 2048, 1)),
    (65536, (30, 64, 1)),
)
AGREEMENT = 1e-5

# Rows, rows in a batch, layer sizes, optimizer.
FIT_SIZES = (
    (1024, 32, (30, 16, 1), "sgd"),
    (1024, 32, (30, 16, 1), "adam"),
    (1408, 32, (64, 32, 1), "adam"),
    (1984, 64, (64, 64, 32, 1), "adam"),
    (2048, 128, (64, 128, 1), "adam"),
    (569, 569, (30, 32, 1), "adam"),
    (131072, 256, (30, 64, 1), "adam"),
)
FIT_STEPS = 1000  # of one measurement, about
FIT_AGREEMENT = 1e-10

# Networks, rows, rows in a batch, layer sizes, optimizer; or who else, and of what.
SWEEP_SIZES = (
    (256, 512, 32, (30, 16, 1), "sgd"),
    (1024, 512, 32, (30, 16, 1), "sgd"),
    (256, 512, 32, (30, 16, 1), "adam"),
    (1024, 512, 32, (30, 16, 1), "adam"),
    (256, 1024, 128, (64, 32, 1), "sgd"),
    (256, 1024, 128, (64, 32, 1), "adam"),
    (256, 569, 569, (30, 32, 1), "sgd"),
    (256, 569, 569, (30, 32, 1), "adam"),
    (1, 512, 32, (30, 16, 1), "sgd"),
    (8, 512, 32, (30, 8, 1), "sgd"),
    (64, 64, 1, (30, 16, 1), "sgd"),
    (64, 512, 32, (30, 128, 1), "sgd"),
    (64, 569, 569, (30, 128, 1), "sgd"),
    (4096, 512, 32, (30, 8, 1), "sgd"),
    (256, 1024, 64, (64, 32, 16, 1), "adam"),
)
SWEEP_NETWORK_STEPS = 1 << 19  # of one measurement at 30→16→1, batch 32, about
OTHERS = (256, 512, 32, (30, 16, 1), "adam")  # where other libraries are measured

# Quantity, whom it is timed against, rows, layer sizes.
SMALL, MIDDLE, LARGE = (256, (30, 32, 1)), (1024, (128, 256, 1)), (1024, (128, 512, 1))
PER_EXAMPLE_SIZES = (
    *(("norms", "vmap(jax.grad)", *size) for size in (SMALL, MIDDLE, LARGE)),
    *(
        ("clipped sum", peer, *size)
        for peer in ("vmap(jax.grad)", "jax_privacy", "jax_privacy by 32")
        for size in (SMALL, MIDDLE, LARGE)
    ),
    *(
        ("clipped sum", "one gradient", *size)
        for size in (SMALL, MIDDLE, LARGE, (1024, (128, 512, 16)))
    ),
    ("clipped sum", "one gradient", 1024, (64, 128, 64, 1)),
    ("clipped sum", "one gradient", 4096, (512, 1024, 1)),
    ("inner products", "vmap(jax.grad)", 512, (64, 256, 1)),
)
CURVATURE_SIZES = (
    ("ntk", "jacrev", 512, (64, 256, 1)),
    ("ntk", "vmap(jax.grad)", 512, (64, 256, 1)),
    *(
        (quantity, peer, *size)
        for quantity, peer in (
            ("hvp", "jvp of jax.grad"),
            ("ggn_vp", "jvp of jax.grad"),
            ("ggn_vp", "jvp and vjp"),
        )
        for size in (
            (32, (30, 16, 1)),
            (256, (64, 100, 1)),
            LARGE,
            (1024, (128, 512, 16)),
            (1024, (64, 128, 64, 1)),
            (4096, (512, 1024, 1)),
            (65536, (30, 64, 1)),
        )
    ),
)


def run(
    *,
    suite: str = "gradient",
    rounds: int = 15,
    repeats: int = 5,
    seed: int = 0,
    sizes: tuple[Any, ...] | None = None,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measures one suite.

    Args:
      suite: A name that --suite accepts.
      rounds: How often each side is timed in each repeat.
      repeats: How often both sides are compiled and their data copied anew.
      seed: Seed of the data and parameters.
      sizes: What to measure in place of its default.
      report: Called with each row as it is done; what cannot be measured, because a
        library is missing, is a row that has only "skipped", and is not returned.

    Returns:
      A row a size.

    Raises:
      ValueError: If the two sides of a row do not agree.
    """
    measure, default = {
        "gradient": (_gradient, GRADIENT_SIZES),
        "fit": (_fit, FIT_SIZES),
        "sweep": (_sweep, SWEEP_SIZES),
        "per_example": (_contest, PER_EXAMPLE_SIZES),
        "curvature": (_contest, CURVATURE_SIZES),
    }[suite]
    rows = []
    for size in default if sizes is None else sizes:
        row = measure(*size, rounds, repeats, jax.random.key(seed))
        report(row)
        if "skipped" not in row:
            rows.append(row)
    return rows


def _gradient(
    n: int, layers: tuple[int, ...], rounds: int, repeats: int, key: jax.Array
) -> Row:
    key_p, key_x, key_y = jax.random.split(key, 3)
    params = jaxbce.init(key_p, layers)
    x = jax.random.normal(key_x, (n, layers[0]))
    y = jax.random.bernoulli(key_y, shape=(n, layers[-1])).astype(x.dtype)
    functions = {
        "jax.grad": jax.value_and_grad(_baselines.plain_loss),
        "by hand": lambda *arguments: jaxbce.value_and_grad(*arguments),
    }
    error = _disagreement(*(f(params, x, y) for f in functions.values()))
    if not error <= AGREEMENT:
        raise ValueError(f"{n} rows, {layers}: the gradients differ by {error:.1e}")
    costs = _timing.compare(functions, params, x, y, rounds=rounds, repeats=repeats)
    baseline, by_hand = costs["jax.grad"], costs["by hand"]
    return {
        "rows": n,
        "network": "→".join(map(str, layers)),
        "differ by": error,
        "jax.grad µs": round(1e6 * baseline.seconds),
        "by hand µs": round(1e6 * by_hand.seconds),
        "speed": by_hand.speed[0],
        "quartiles": f"{by_hand.speed[1]:.2f}-{by_hand.speed[2]:.2f}",
        "jax.grad temp MB": round(baseline.temp_bytes / 1e6, 3),
        "by hand temp MB": round(by_hand.temp_bytes / 1e6, 3),
        "memory": f"1/{baseline.temp_bytes / max(by_hand.temp_bytes, 1):.1f}",
    }


def _fit(
    n: int,
    batch_size: int,
    layers: tuple[int, ...],
    optimizer: str,
    rounds: int,
    repeats: int,
    key: jax.Array,
) -> Row:
    key_p, key_x, key_rows = jax.random.split(key, 3)
    transformation = getattr(optax, optimizer)(1e-3)
    epochs = max(1, FIT_STEPS * batch_size // n)
    steps = epochs * n // batch_size

    def plain(params: Any, x: Any, y: Any) -> Any:
        options = {"optimizer": transformation, "epochs": epochs}
        options |= {"batch_size": batch_size}
        return _baselines.plain_fit(key_rows, params, x, y, **options)

    def by_fit(params: Any, x: Any, y: Any) -> Any:
        options = {"optimizer": transformation, "num_steps": steps}
        options |= {"batch_size": batch_size if batch_size < n else None}
        return jaxbce.fit(key_rows, params, x, y, **options).params

    functions = {"plain": plain, "fit": by_fit}

    def arguments(dtype: str) -> Any:
        x = jax.random.normal(key_x, (n, layers[0]), dtype)
        y = (jnp.sum(x[:, :2], axis=1, keepdims=True) > 0).astype(dtype)
        return jaxbce.init(key_p, layers, dtype=dtype), x, y

    with jax.enable_x64(True):
        exact = arguments("float64")
        error = _disagreement(*(jax.jit(f)(*exact) for f in functions.values()))
    if not error <= FIT_AGREEMENT:
        raise ValueError(f"{n} rows, {layers}: the parameters differ by {error:.1e}")
    costs = _timing.compare(
        functions, *arguments("float32"), rounds=rounds, repeats=repeats
    )
    baseline, mine = costs["plain"], costs["fit"]
    return {
        "rows": n,
        "batch": batch_size,
        "network": "→".join(map(str, layers)),
        "optimizer": optimizer,
        "steps": steps,
        "differ by": error,
        "plain µs/step": round(1e6 * baseline.seconds / steps, 1),
        "fit µs/step": round(1e6 * mine.seconds / steps, 1),
        "speed": mine.speed[0],
        "quartiles": f"{mine.speed[1]:.2f}-{mine.speed[2]:.2f}",
    }


def _contest(
    quantity: str,
    peer: str,
    n: int,
    layers: tuple[int, ...],
    rounds: int,
    repeats: int,
    key: jax.Array,
) -> Row:
    contest = _contests.contests()[quantity]
    theirs = contest.peers[peer]
    if theirs is None:
        return {"skipped": f"{peer} is not installed: {n} rows, {layers} skipped"}
    arguments = _contests.arguments(n, layers, key)
    error = _disagreement(
        *(jax.jit(f)(*arguments) for f in (contest.ours, contest.truth))
    )
    if not error <= AGREEMENT:
        raise ValueError(f"{quantity} of {n} rows, {layers}: differ by {error:.1e}")
    sides = {peer: theirs, "jaxbce": contest.ours}
    costs = _timing.compare(sides, *arguments, rounds=rounds, repeats=repeats)
    baseline, mine = costs[peer], costs["jaxbce"]
    return {
        "quantity": quantity,
        "against": peer,
        "rows": n,
        "network": "→".join(map(str, layers)),
        "differ by": error,
        "its µs": round(1e6 * baseline.seconds),
        "jaxbce µs": round(1e6 * mine.seconds),
        "speed": mine.speed[0],
        "quartiles": f"{mine.speed[1]:.2f}-{mine.speed[2]:.2f}",
        "its temp MB": round(baseline.temp_bytes / 1e6, 3),
        "jaxbce temp MB": round(mine.temp_bytes / 1e6, 3),
    }


def _sgd(hp: dict[str, Any]) -> optax.GradientTransformation:
    return optax.sgd(hp["learning_rate"])


def _adam(hp: dict[str, Any]) -> optax.GradientTransformation:
    return optax.adam(hp["learning_rate"])


def _sweep(
    members: int,
    n: int,
    batch_size: int,
    layers: tuple[int, ...],
    optimizer: str,
    rounds: int,
    repeats: int,
    key: jax.Array,
) -> Row:
    make = {"sgd": _sgd, "adam": _adam}[optimizer]
    work = batch_size * layers[0] * layers[1] / (32 * 30 * 16)
    steps = SWEEP_NETWORK_STEPS / members / max(work, 0.1)
    epochs = max(1, round(min(steps, 4096) * batch_size / n))
    steps = epochs * n // batch_size

    def sides(dtype: str, epochs: int) -> dict[str, Callable[[], Any]]:
        x = jax.random.normal(key, (n, layers[0]), dtype)
        y = (jnp.sum(x[:, :2], axis=1, keepdims=True) > 0).astype(dtype)
        rates = jnp.geomspace(1e-4, 1e-1, members, dtype=dtype)
        keys = jax.random.split(jax.random.fold_in(key, 0))
        params = jaxbce.init(keys[0], layers, dtype=dtype)
        options: Any = {"make_optimizer": make}
        plain = _baselines.plain_sweep(
            params, x, y, keys[1], epochs=epochs, batch_size=batch_size, **options
        )
        options |= {"num_steps": epochs * n // batch_size, "hidden": layers[1:-1]}
        options |= {"batch_size": batch_size if batch_size < n else None}
        options |= {"hparams": {"learning_rate": np.asarray(rates)}, "dtype": dtype}
        return {
            "vmap": lambda: jax.device_get(plain(rates)),
            "sweep": lambda: jaxbce.sweep(key, x, y, **options).params,
        }

    with jax.enable_x64(True):
        plain, mine = (side() for side in sides("float64", 1).values())
        error = _disagreement(jax.tree.map(lambda t: t[:, 0], mine), plain)
    if not error <= FIT_AGREEMENT:
        raise ValueError(f"{members} of {layers}: parameters differ by {error:.1e}")
    measured = [
        _timing.compare_calls(sides("float32", epochs), rounds=rounds)
        for _ in range(repeats)
    ]
    baseline = np.median([m["vmap"][0] for m in measured])
    seconds = np.median([m["sweep"][0] for m in measured])
    speeds = np.median([m["sweep"][1] for m in measured], axis=0)
    return {
        "rows": members,
        "batch": batch_size,
        "of": n,
        "network": "→".join(map(str, layers)),
        "optimizer": optimizer,
        "steps": steps,
        "differ by": error,
        "vmap network-steps/s": round(members * steps / baseline),
        "sweep network-steps/s": round(members * steps / seconds),
        "speed": float(speeds[0]),
        "quartiles": f"{speeds[1]:.2f}-{speeds[2]:.2f}",
    }


def others(rounds: int, key: jax.Array) -> list[Row]:
    """Network-steps a second of other libraries, beside `jaxbce.sweep`'s, in turn."""
    members, n, batch_size, layers, _ = OTHERS
    x = jax.random.normal(key, (n, layers[0]))
    y = (jnp.sum(x[:, :2], axis=1, keepdims=True) > 0).astype(x.dtype)
    rates = np.geomspace(1e-4, 1e-1, members)
    steps = 64 * n // batch_size
    options: Any = {"make_optimizer": _adam, "hidden": layers[1:-1]}
    options |= {"hparams": {"learning_rate": rates}}
    options |= {"num_steps": steps, "batch_size": batch_size, "keep_params": False}
    epochs, some = 10, rates[:: members // 16]
    theirs: Any = {"batch_size": batch_size, "max_iter": epochs, "tol": 0.0}
    theirs |= {"n_iter_no_change": epochs + 1}
    data = np.asarray(x), np.asarray(y).ravel()
    sides: dict[str, tuple[int, Callable[[], Any]]] = {
        "jaxbce.sweep": (
            members * steps,
            lambda: jaxbce.sweep(key, x, y, **options).train_loss,
        ),
        "scikit-learn": (
            len(some) * epochs * n // batch_size,
            lambda: _baselines.scikit_learn_sweep(*data, layers[1:-1], some, theirs),
        ),
    }
    torch = _baselines.torch_sweep(layers, members, batch_size, 64)
    if torch is not None:
        sides["torch.func.vmap"] = members * 64, torch
    calls = {name: call for name, (_, call) in sides.items()}
    seconds = {
        name: measured[0]
        for name, measured in _timing.compare_calls(calls, rounds=rounds).items()
    }
    rate = {name: sides[name][0] / seconds[name] for name in sides}
    return [
        {
            "library": name,
            "network-steps/s": round(value),
            "jaxbce is faster by": rate["jaxbce.sweep"] / value,
        }
        for name, value in rate.items()
    ]


def _disagreement(mine: Any, theirs: Any) -> float:
    """The largest relative difference of a leaf, in the norm."""
    return max(
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True)
    )


def main() -> int:
    """Prints the suite's table, and writes it where --output_dir says."""
    if _SUITE.value == "sweep":
        _cli.use_devices()
    jax.config.update("jax_default_matmul_precision", "highest")
    folder = _cli.output_dir()
    print(", ".join(f"{k} {v}" for k, v in _results.environment().items()))
    if warning := _timing.load_warning():
        print(warning)
    configuration = {
        "suite": _SUITE.value,
        "rounds": _ROUNDS.value,
        "repeats": _REPEATS.value,
        "seed": _cli.SEED.value,
    }
    rows = run(
        **configuration,
        report=lambda row: print(
            "  " + row.get("skipped", f"{row.get('rows')}×{row.get('network')} done"),
            flush=True,
        ),
    )
    speeds = [row["speed"] for row in rows]
    print(f"\n{_results.table(rows)}\n")
    print(
        f"Speed: {min(speeds):.2f} to {max(speeds):.2f}, median {np.median(speeds):.2f}"
    )
    document = {"configuration": configuration, "rows": rows}
    if _SUITE.value == "sweep":
        key = jax.random.key(_cli.SEED.value)
        document["others"] = others(_ROUNDS.value, key)
        print(f"\n{_results.table(document['others'])}")
    if folder is not None:
        _results.write(folder, "benchmark", document, rows)
        print(f"Written to {folder}: benchmark.json, .csv")
    return 0


if __name__ == "__main__":
    _cli.launch(main)
