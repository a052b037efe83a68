"""What `compare_gradients` compares, each part as rows of a table."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbce
from experiments.support import baselines, timing
from jaxbce.checking import LEAST_SHARES, TOLERANCES
from jaxbce.network import Params

Row = dict[str, Any]

TAIL_LOGITS = (1.0, 5.0, 10.0, 15.0, 17.0, 20.0, 40.0, 80.0)
TAIL_TOLERANCE = 1e-6
BY_HAND = "by hand, δ"


def compared(
    name: str, mine: Any, theirs: Any, tolerance: float, least_norm: float = 0.0
) -> Row:
    """One line on how far two arrays are apart; `theirs` is the reference.

    The verdict is on the norm of the difference over that of the reference, or over
    `least_norm` if that is more.
    """
    epsilon = float(jnp.finfo(np.asarray(mine).dtype).eps)
    mine, theirs = (np.asarray(t, np.float64) for t in (mine, theirs))
    if mine.shape != theirs.shape:
        raise ValueError(f"{name} has shape {mine.shape}, JAX's {theirs.shape}")
    difference = abs(mine - theirs)
    size = np.where(theirs == 0, 1, abs(theirs))
    # A unit in the last place of v is eps times the power of two at or below |v|.
    ulp = epsilon * 2.0 ** np.floor(np.log2(size))
    error = _relative(difference, theirs, least_norm)
    return {
        "quantity": name,
        "shape": mine.shape,
        "max abs": float(difference.max()),
        "max rel": float((difference / size).max()),
        "ulps": round(float((difference / ulp).max()), 1),
        "norm rel": error,
        "allowed": tolerance,
        "verdict": error <= tolerance,
    }


def _relative(difference: np.ndarray, truth: np.ndarray, least_norm: float) -> float:
    norm = max(float(np.linalg.norm(truth)), least_norm)
    return float(np.linalg.norm(difference) / (norm or 1))


def _whole_norm(grads: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))


def _in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda t: jnp.asarray(np.asarray(t, np.float64)), tree)


def leaves_and_factors(
    params: Params, x: jax.Array, y: jax.Array, tolerance: float
) -> list[Row]:
    """Each quantity by hand against JAX's derivative in float64.

    The textbook's factors are in float64 on both sides: in less, ŷ rounds to 0 or 1
    and they are not finite. The gradient is in the dtype of the arguments.
    """
    grads = jaxbce.value_and_grad(params, x, y)
    of_data = jax.grad(jaxbce.loss, argnums=(1, 2))(params, x, y)
    with jax.enable_x64(True):
        exact = _in_float64((params, x, y))
        true_grads = jax.value_and_grad(baselines.plain_loss)(*exact)
        true_of_data = jax.grad(baselines.plain_loss, argnums=(1, 2))(*exact)
        strict = tolerance if x.dtype == jnp.float64 else TOLERANCES["float64"]
        rows = []
        if len(params) == 2:
            rows = [compared(*factor, strict) for factor in _factors(*exact)]
    least = LEAST_SHARES[x.dtype.name] * _whole_norm(true_grads[1])
    rows.append(compared("mean loss", grads[0], true_grads[0], tolerance))
    for (path, mine), theirs in zip(
        jax.tree.leaves_with_path(grads[1]), jax.tree.leaves(true_grads[1]), strict=True
    ):
        name = f"∂loss/∂params{jax.tree_util.keystr(path)}"
        rows.append(compared(name, mine, theirs, tolerance, least))
    for name, mine, theirs in zip("xy", of_data, true_of_data, strict=True):
        rows.append(compared(f"∂loss/∂{name}", mine, theirs, tolerance))
    return rows


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
    yield "∂a₂/∂w₂ = h₁ᵀ", by_hand.da2_dw2, baselines.row_gradients(w_2, h_1)
    yield "∂BCE/∂w₂ = h₁ᵀ(ŷ−y)", by_hand.dbce_dw2, dw_2
    yield "∂BCE/∂b₂ = Σ(ŷ−y)", by_hand.dbce_db2, db_2
    yield "∂BCE/∂h₁ = (ŷ−y)w₂ᵀ", by_hand.dbce_dh1, dh_1
    theirs = jax.grad(summed(jax.nn.relu))(x @ w_1 + b_1)
    yield "∂h₁/∂a₁ = [a₁>0]", by_hand.dh1_da1, theirs
    yield "∂a₁/∂w₁ = Xᵀ", by_hand.da1_dw1, baselines.row_gradients(w_1, x)
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
            "oracle": c.reference,
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
    truth = baselines.scikit_learn_gradient(params, x, y)
    least = LEAST_SHARES[x.dtype.name] * _whole_norm(truth)
    for name, mine, theirs in zip(names, jax.tree.leaves(grads), truth, strict=True):
        error = _relative(np.asarray(mine, np.float64) - theirs, theirs, least)
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

    def by_hand(params: Params) -> Any:
        return jaxbce.value_and_grad(params, x, y)

    params = jax.vmap(network)(jax.random.split(key, trials))
    found = jax.jit(jax.vmap(by_hand))(params)
    with jax.enable_x64(True):
        exact, x_64, y_64 = _in_float64((params, x, y))
        by_jax = jax.vmap(jax.value_and_grad(baselines.plain_loss), (0, None, None))
        truth = jax.tree.map(np.asarray, jax.jit(by_jax)(exact, x_64, y_64))
    share = LEAST_SHARES[x.dtype.name]
    least = [
        share * _whole_norm(jax.tree.map(lambda leaf, i=i: leaf[i], truth[1]))
        for i in range(trials)
    ]
    rows = []
    for (path, mine), theirs in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(truth), strict=True
    ):
        leaf = jax.tree_util.keystr(path[1:])
        difference = np.asarray(mine, np.float64) - theirs
        errors = np.array(
            [
                _relative(difference[i], theirs[i], least[i] if leaf else 0.0)
                for i in range(trials)
            ]
        )
        worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
        rows.append(
            {
                "leaf": leaf or "value",
                "worst network": worst,
                "its error": float(errors[worst]),
                "median error": float(np.median(errors)),
                "allowed": tolerance,
                "verdict": bool(errors[worst] <= tolerance),
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
        "jax.value_and_grad of optax's loss": jax.value_and_grad(baselines.plain_loss),
        "by hand, one pass": by_hand(None),
        f"by hand, blocks of {block_size}": by_hand(block_size),
    }
    params = jaxbce.init(key, sizes, dtype=jnp.float32)
    arguments = (params, *(jnp.asarray(t, jnp.float32) for t in (x, y)))
    costs = timing.measure(
        lambda: {
            name: timing.compiled(function, *arguments)
            for name, function in functions.items()
        },
        rounds=rounds,
    )
    first, rows = next(iter(costs.values())), []
    for name, c in costs.items():
        speed = timing.speed(c, first)
        rows.append(
            {
                "gradient": name,
                "µs": f"{1e6 * c.seconds:.0f}",
                "speed": f"{speed[0]:.2f}",
                "quartiles": f"{speed[1]:.2f}-{speed[2]:.2f}",
                "temporary kB": f"{(c.temp_bytes or 0) / 1e3:.0f}",
            }
        )
    return rows
