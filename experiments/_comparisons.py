"""What `compare_gradients` compares, each part as rows of a table."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbce
from experiments import _baselines, _timing
from jaxbce.network import Params

Row = dict[str, Any]

TAIL_LOGITS = (1.0, 5.0, 10.0, 15.0, 17.0, 20.0, 40.0, 80.0)
TAIL_TOLERANCE = 1e-6
BY_HAND = "by hand, δ"


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
