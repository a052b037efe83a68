r"""Is every hand-derived gradient what jax.grad says it is, and what does each cost?

    python -m experiments.compare_gradients
    python -m experiments.compare_gradients --explain
    python -m experiments.compare_gradients --data mine.csv --target label

Five parts, on digits (odd against even) unless told otherwise: (1) each factor of the
textbook chain rule and each leaf of the gradient against JAX's own derivative of the
same thing; (2) three oracles at five points, and scikit-learn's backward pass; (3) the
error in the tail, as a logit grows; (4) many random networks at once; (5) time and
memory. Expect every line of 1, 2 and 4 to agree to 1e-12 in float64, the hand-derived
gradient to keep its digits in the tail, and an exit status of 0. `--explain` walks one
tiny network through the derivation, number by number.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

import jaxbce
from experiments import _baselines, _cli, _data, _explain, _results, _timing
from jaxbce.checking import TOLERANCES
from jaxbce.network import Params

_BATCH = flags.DEFINE_integer(
    "batch", None, "Rows of the data to use; all of them if not set.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float64",
    ["float64", "float32", "bfloat16"],
    "What parts 1, 2 and 4 compute in. Parts 3 and 5 are in float32.",
)
_TRIALS = flags.DEFINE_integer(
    "trials", 256, "Random networks in part 4.", lower_bound=1
)
_TOLERANCE = flags.DEFINE_float(
    "tolerance",
    None,
    "Largest relative error of a factor or leaf, in the norm. If not set, 1e-12 in "
    "float64, 1e-5 in float32, 2^-4 in bfloat16.",
    lower_bound=0.0,
)
_BLOCK_SIZE = flags.DEFINE_integer(
    "block_size", 256, "Rows in a block in part 5.", lower_bound=1
)
_EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Walk one tiny network through the derivation instead."
)

Row = dict[str, Any]

TAIL_LOGITS = (1.0, 5.0, 10.0, 15.0, 17.0, 20.0, 40.0, 80.0)
TAIL_TOLERANCE = 1e-6
BY_HAND = "by hand, δ"


def run(
    *,
    x: np.ndarray,
    y: np.ndarray,
    hidden: tuple[int, ...] = (32,),
    dtype: str = "float64",
    trials: int = 256,
    seed: int = 0,
    tolerance: float | None = None,
    block_size: int = 256,
    rounds: int = 31,
    report: Callable[[str, list[Row]], None] = lambda title, rows: None,
) -> dict[str, list[Row]]:
    """Runs the five parts.

    Args:
      x: Features `[N, n_0]`, standardised.
      y: Labels `[N, n_L]`.
      hidden: Widths of the hidden layers.
      dtype: What parts 1, 2 and 4 compute in.
      trials: Random networks in part 4.
      seed: Seed of the parameters.
      tolerance: Largest relative error that passes; None is the dtype's own.
      block_size: Rows in a block in part 5.
      rounds: Measurements of each function in part 5.
      report: Called with the title and the rows of each part as it is done.

    Returns:
      The rows of each part, by name; those with a verdict have it under "verdict".
    """
    sizes = (x.shape[1], *hidden, y.shape[1])
    if tolerance is None:
        tolerance = TOLERANCES[dtype]
    key = jax.random.key(seed)
    parts: dict[str, list[Row]] = {}

    def done(name: str, title: str, rows: list[Row]) -> None:
        parts[name] = rows
        report(title, rows)

    with jax.enable_x64(dtype == "float64"):
        arguments = (
            jaxbce.init(key, sizes, dtype=dtype),
            jnp.asarray(x, dtype),
            jnp.asarray(y, dtype),
        )
        rows = [
            compared(name, mine, theirs, tolerance)
            for name, mine, theirs in leaves_and_factors(*arguments)
        ]
        done("factors", f"1. By hand against JAX's own derivative, {dtype}", rows)
        rows = oracles(*arguments, tolerance=tolerance, seed=seed)
        done("oracles", "2. The gradient against oracles, the worst of 5 points", rows)
    done(
        "tail",
        "3. The tail: relative error of δ = ∂BCE/∂a, float32, as the logit grows",
        tail(TAIL_LOGITS),
    )
    with jax.enable_x64(dtype == "float64"):
        rows = many_networks(key, sizes, *arguments[1:], trials, tolerance)
        done("networks", f"4. {trials} random networks under vmap, the worst", rows)
    costs = cost(key, sizes, x, y, block_size=block_size, rounds=rounds)
    done("cost", f"5. Cost of one gradient, float32, {len(x)} rows", costs)
    return parts


def compared(name: str, mine: Any, theirs: Any, tolerance: float) -> Row:
    """One line on how far two arrays are apart; `theirs` is the reference."""
    dtype = np.asarray(mine).dtype
    epsilon = float(jnp.finfo(dtype).eps)
    mine, theirs = (np.asarray(t, np.float64) for t in (mine, theirs))
    if mine.shape != theirs.shape:
        raise ValueError(f"{name} has shape {mine.shape}, JAX's {theirs.shape}")
    difference = abs(mine - theirs)
    relative = difference / np.where(theirs == 0, 1, abs(theirs))
    # A unit in the last place of v is eps times the power of two at or below |v|.
    ulp = epsilon * 2.0 ** np.floor(np.log2(np.where(theirs == 0, 1, abs(theirs))))
    norm = np.linalg.norm(theirs)
    error = float(np.linalg.norm(difference) / (norm or 1))
    return {
        "quantity": name,
        "shape": mine.shape,
        "max abs": float(difference.max()),
        "max rel": float(relative.max()),
        "ulps": round(float((difference / ulp).max()), 1),
        "norm rel": error,
        "allowed": tolerance,
        "verdict": error <= tolerance,
    }


def leaves_and_factors(
    params: Params, x: jax.Array, y: jax.Array
) -> Iterator[tuple[str, Any, Any]]:
    """Each quantity by hand and as JAX differentiates it: name, mine, theirs."""
    if len(params) == 2:
        yield from _factors(params, x, y)
    value, grads = jaxbce.value_and_grad(params, x, y)
    jax_value, jax_grads = jax.value_and_grad(_baselines.plain_loss)(params, x, y)
    yield "mean loss", value, jax_value
    for (path, mine), theirs in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(jax_grads), strict=True
    ):
        yield f"∂loss/∂params{jax.tree_util.keystr(path)}", mine, theirs
    mine = jax.grad(jaxbce.loss, argnums=(1, 2))(params, x, y)
    theirs = jax.grad(_baselines.plain_loss, argnums=(1, 2))(params, x, y)
    yield "∂loss/∂x", mine[0], theirs[0]
    yield "∂loss/∂y", mine[1], theirs[1]


def _factors(
    params: Params, x: jax.Array, y: jax.Array
) -> Iterator[tuple[str, Any, Any]]:
    """The textbook's table; on JAX's side each arrow is differentiated by itself."""
    (w_1, b_1), (w_2, b_2) = params
    h_1 = jax.nn.relu(x @ w_1 + b_1)
    a_2 = h_1 @ w_2 + b_2
    y_hat = jax.nn.sigmoid(a_2)

    def bce(y_hat: jax.Array) -> jax.Array:
        return -jnp.sum(y * jnp.log(y_hat) + (1 - y) * jnp.log(1 - y_hat))

    def bce_of_h_1(h_1: jax.Array, w_2: jax.Array, b_2: jax.Array) -> jax.Array:
        return bce(jax.nn.sigmoid(h_1 @ w_2 + b_2))

    def bce_of_layer_1(w_1: jax.Array, b_1: jax.Array) -> jax.Array:
        return bce_of_h_1(jax.nn.relu(x @ w_1 + b_1), w_2, b_2)

    def summed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *args: jnp.sum(function(*args))

    by_hand = jaxbce.chain_rule(params, x, y)
    dh_1, dw_2, db_2 = jax.grad(bce_of_h_1, (0, 1, 2))(h_1, w_2, b_2)
    dw_1, db_1 = jax.grad(bce_of_layer_1, (0, 1))(w_1, b_1)
    yield "∂BCE/∂ŷ = (ŷ−y)/(ŷ(1−ŷ))", by_hand.dbce_dyhat, jax.grad(bce)(y_hat)
    theirs = jax.grad(summed(jax.nn.sigmoid))(a_2)
    yield "∂ŷ/∂a₂ = ŷ(1−ŷ)", by_hand.dyhat_da2, theirs
    yield "∂a₂/∂w₂ = h₁ᵀ", by_hand.da2_dw2, _baselines.row_gradients(w_2, h_1)
    yield "∂BCE/∂w₂ = h₁ᵀ(ŷ−y)", by_hand.dbce_dw2, dw_2
    yield "∂BCE/∂b₂ = Σ(ŷ−y)", by_hand.dbce_db2, db_2
    yield "∂BCE/∂h₁ = (ŷ−y)w₂ᵀ", by_hand.dbce_dh1, dh_1
    theirs = jax.grad(summed(jax.nn.relu))(x @ w_1 + b_1)
    yield "∂h₁/∂a₁ = [a₁>0]", by_hand.dh1_da1, theirs
    yield "∂a₁/∂w₁ = Xᵀ", by_hand.da1_dw1, _baselines.row_gradients(w_1, x)
    yield "∂BCE/∂w₁ = Xᵀ((ŷ−y)w₂ᵀ⊙[a₁>0])", by_hand.dbce_dw1, dw_1
    yield "∂BCE/∂b₁ = Σ(ŷ−y)w₂ᵀ⊙[a₁>0]", by_hand.dbce_db1, db_1


def oracles(
    params: Params, x: jax.Array, y: jax.Array, *, tolerance: float, seed: int
) -> list[Row]:
    """The lines of `check_gradients`, and scikit-learn's backward pass."""
    checked = jaxbce.check_gradients(
        jaxbce.value_and_grad,
        params,
        x,
        y,
        dtype=x.dtype,
        tolerance=tolerance,
        seed=seed,
    )
    rows: list[Row] = [
        {
            "leaf": c.leaf,
            "oracle": c.oracle,
            "worst at": c.point,
            "error": c.error,
            "allowed": c.tolerance,
            "verdict": c.passed,
        }
        for c in checked.comparisons
    ]
    rows.append(
        {
            "leaf": "tail",
            "oracle": "σ(−|a|)",
            "worst at": "|a| ≤ 80",
            "error": max(t.error for t in checked.tail),
            "allowed": checked.tail[0].tolerance,
            "verdict": checked.tail_passed,
        }
    )
    grads = jaxbce.grad(params, x, y)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(grads)]
    for name, mine, theirs in zip(
        names,
        jax.tree.leaves(grads),
        _baselines.scikit_learn_gradient(params, x, y),
        strict=True,
    ):
        theirs = np.asarray(theirs)
        difference = np.linalg.norm(np.asarray(mine, np.float64) - theirs)
        error = float(difference / (np.linalg.norm(theirs) or 1))
        rows.append(
            {
                "leaf": name,
                "oracle": "scikit-learn",
                "worst at": "given",
                "error": error,
                "allowed": tolerance,
                "verdict": error <= tolerance,
            }
        )
    return rows


def tail(sizes: tuple[float, ...]) -> list[Row]:
    """Relative errors of four ways to ∂BCE/∂a, float32, in whichever label is worse."""
    unit = (jaxbce.Layer(jnp.ones((1, 1)), jnp.zeros(1)),)  # one weight of 1: a = x

    def by_hand(a: jax.Array, y: jax.Array) -> jax.Array:
        return jaxbce.deltas(unit, jaxbce.forward(unit, a), y)[0]

    def derivative(ell: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return jax.grad(lambda a, y: jnp.sum(ell(a, y)))

    ways = {
        "textbook, ŷ−y": lambda a, y: jax.nn.sigmoid(a) - y,
        BY_HAND: by_hand,
        "jax.grad, optax": derivative(optax.sigmoid_binary_cross_entropy),
        "jax.grad, log(1+eᵃ)−ya": derivative(lambda a, y: jnp.logaddexp(0, a) - y * a),
    }
    size = np.array(sizes, np.float32)
    a = jnp.concatenate([jnp.asarray(size), -jnp.asarray(size)])[:, None]
    y = (a > 0).astype(a.dtype)
    truth = np.exp(-size.astype(np.float64)) / (1 + np.exp(-size.astype(np.float64)))
    errors = {}
    for name, way in ways.items():
        found = abs(np.asarray(way(a, y), np.float64)).reshape(2, -1)
        errors[name] = np.max(abs(found - truth) / truth, axis=0)
    return [
        {
            "|a|": f"{size:g}",
            **{name: float(error[i]) for name, error in errors.items()},
            "verdict": bool(errors[BY_HAND][i] <= TAIL_TOLERANCE),
        }
        for i, size in enumerate(sizes)
    ]


def many_networks(
    key: jax.Array,
    sizes: tuple[int, ...],
    x: jax.Array,
    y: jax.Array,
    trials: int,
    tolerance: float,
) -> list[Row]:
    """For each leaf the network, of many random ones, where it agrees least."""

    def network(key: jax.Array) -> Params:
        key_w, key_b = jax.random.split(key)
        params = jaxbce.init(key_w, sizes, dtype=x.dtype)
        biases = jax.random.normal(key_b, (len(params), max(sizes)), x.dtype)
        return tuple(
            layer._replace(b=0.5 * b[: len(layer.b)])
            for layer, b in zip(params, biases, strict=True)
        )

    def both(params: Params) -> Any:
        by_hand = jaxbce.value_and_grad(params, x, y)
        return by_hand, jax.value_and_grad(_baselines.plain_loss)(params, x, y)

    params = jax.vmap(network)(jax.random.split(key, trials))
    by_hand, by_jax = jax.jit(jax.vmap(both))(params)
    rows = []
    for (path, mine), theirs in zip(
        jax.tree.leaves_with_path(by_hand), jax.tree.leaves(by_jax), strict=True
    ):
        mine, theirs = (
            np.asarray(t, np.float64).reshape(trials, -1) for t in (mine, theirs)
        )
        norms = np.linalg.norm(theirs, axis=1)
        error = np.linalg.norm(mine - theirs, axis=1) / np.where(norms == 0, 1, norms)
        worst = int(np.argmax(np.nan_to_num(error, nan=np.inf)))
        rows.append(
            {
                "leaf": jax.tree_util.keystr(path[1:]) or "value",
                "worst network": worst,
                "its error": float(error[worst]),
                "median error": float(np.median(error)),
                "allowed": tolerance,
                "verdict": bool(error[worst] <= tolerance),
            }
        )
    return rows


def cost(
    key: jax.Array,
    sizes: tuple[int, ...],
    x: np.ndarray,
    y: np.ndarray,
    *,
    block_size: int,
    rounds: int,
) -> list[Row]:
    """Time and temporary memory of one gradient, three ways."""

    def by_hand(rows: int | None) -> Callable[..., Any]:
        return lambda *args: jaxbce.value_and_grad(*args, block_size=rows)

    functions = {
        "jax.value_and_grad of optax's loss": jax.value_and_grad(_baselines.plain_loss),
        "by hand, one pass": by_hand(None),
        f"by hand, blocks of {block_size}": by_hand(block_size),
    }
    params = jaxbce.init(key, sizes, dtype=jnp.float32)
    arguments = (params, *(jnp.asarray(t, jnp.float32) for t in (x, y)))
    return [
        {
            "gradient": name,
            "µs": f"{1e6 * c.seconds:.0f}",
            "speed": f"{c.speed[0]:.2f}",
            "quartiles": f"{c.speed[1]:.2f}-{c.speed[2]:.2f}",
            "temporary kB": f"{c.temp_bytes / 1e3:.0f}",
        }
        for name, c in _timing.compare(functions, *arguments, rounds=rounds).items()
    ]


def picture(path: Path, costs: list[Row]) -> None:
    """Draws the error against the logit, and the costs."""
    import matplotlib.pyplot as plt

    logits = np.linspace(0.5, 80, 160)
    errors = tail(tuple(logits))
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4), width_ratios=[2, 1, 1], layout="constrained"
    )
    for name in list(errors[0])[1:-1]:
        values = np.maximum([row[name] for row in errors], 1e-9)
        left.semilogy(logits, values, label=name, lw=3 if name == BY_HAND else 1.5)
    left.set(
        title="Error of ∂BCE/∂a in float32",
        xlabel="logit |a|, on the side of its label",
        ylabel="relative error",
    )
    left.legend()
    names = [
        row["gradient"].replace(", ", ",\n").replace(" of ", "\nof ") for row in costs
    ]
    for axis, column in ((middle, "µs"), (right, "temporary kB")):
        axis.barh(names, [float(row[column]) for row in costs], color="C0")
        axis.invert_yaxis()
        axis.set(title="One gradient", xlabel=column)
    right.set_yticklabels([])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Runs on the data and sizes of the flags; the status is 0 if all holds."""
    # On a GPU float32 products are otherwise rounded to TF32's 10 bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    if _EXPLAIN.value:
        text, holds = _explain.walk()
        print(text)
        return 0 if holds else 1
    hidden = _cli.hidden_sizes()
    data = _data.load(
        dataset=_cli.DATASET.value, data=_cli.DATA.value, target=_cli.TARGET.value
    )
    batch = _BATCH.value or len(data.x)
    if batch > len(data.x):
        raise _cli.InputError(f"--batch={batch}: {data.name} has {len(data.x)} rows")
    folder = _cli.output_dir()
    configuration = {
        "data": data.name,
        "hidden": hidden,
        "batch": batch,
        "dtype": _DTYPE.value,
        "trials": _TRIALS.value,
        "seed": _cli.SEED.value,
        "tolerance": _TOLERANCE.value,
        "block_size": _BLOCK_SIZE.value,
    }
    sizes = "→".join(map(str, (data.x.shape[1], *hidden, 1)))
    print(f"{data.name}: {batch} rows, network {sizes}")
    print(", ".join(f"{k} {v}" for k, v in _results.environment().items()))

    def report(title: str, rows: list[Row]) -> None:
        print(f"\n{title}\n\n{_results.table(rows)}", flush=True)

    if warning := _timing.load_warning():
        print(warning)
    parts = run(
        x=data.x[:batch],
        y=data.y[:batch],
        hidden=hidden,
        dtype=_DTYPE.value,
        trials=_TRIALS.value,
        seed=_cli.SEED.value,
        tolerance=_TOLERANCE.value,
        block_size=_BLOCK_SIZE.value,
        report=report,
    )
    rows = [{"part": part, **row} for part, rows in parts.items() for row in rows]
    verdicts = [row["verdict"] for row in rows if "verdict" in row]
    holds = all(verdicts)
    print(
        f"\n{sum(verdicts)} of {len(verdicts)} comparisons hold."
        + ("" if holds else " FAILED")
    )
    if folder is not None:
        results = {"configuration": configuration, "holds": holds, "parts": parts}
        _results.write(folder, "compare_gradients", results, rows)
        picture(folder / "compare_gradients.png", parts["cost"])
        print(f"Written to {folder}: compare_gradients.json, .csv, .png")
    return 0 if holds else 1


if __name__ == "__main__":
    _cli.launch(main)
