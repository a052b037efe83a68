"""The parts of `compare_gradients`, each as rows of a table."""

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

HEADINGS = {  # of the printed tables, by key
    "max_abs": "max abs",
    "max_rel": "max rel",
    "norm_rel": "norm rel",
    "worst_point": "worst at",
    "followed_by": "followed by",
    "worst_network": "worst network",
    "worst_error": "its error",
    "median_error": "median error",
    "logit": "|a|",
    "textbook": "textbook, ŷ−y",
    "by_hand": "by hand, δ",
    "jax_grad_of_optax": "jax.grad, optax",
    "jax_grad_of_logaddexp": "jax.grad, log(1+eᵃ)−ya",
    "microseconds": "µs",
    "temporary_kb": "temporary kB",
    "tolerance": "allowed",
    "passed": "verdict",
}

TAIL_LOGITS = (1.0, 5.0, 10.0, 15.0, 17.0, 20.0, 40.0, 80.0)
TAIL_TOLERANCE = 1e-6


def compare(
    name: str, value: Any, reference: Any, tolerance: float, min_norm: float = 0.0
) -> Row:
    """Compares an array with its reference, as one row.

    It passes by the norm of the difference over the norm of the reference, or over
    `min_norm` if that is larger.
    """
    epsilon = float(jnp.finfo(np.asarray(value).dtype).eps)
    value, reference = (np.asarray(t, np.float64) for t in (value, reference))
    if value.shape != reference.shape:
        raise ValueError(
            f"expected {name} of shape {reference.shape}, got {value.shape}"
        )
    difference = abs(value - reference)
    size = np.where(reference == 0, 1, abs(reference))
    # A unit in the last place of v is eps times the power of two at or below |v|.
    ulp = epsilon * 2.0 ** np.floor(np.log2(size))
    error = _relative_error(value, reference, min_norm)
    return {
        "quantity": name,
        "shape": value.shape,
        "max_abs": float(difference.max()),
        "max_rel": float((difference / size).max()),
        "ulps": round(float((difference / ulp).max()), 1),
        "norm_rel": error,
        "tolerance": tolerance,
        "passed": error <= tolerance,
    }


def _relative_error(value: Any, reference: np.ndarray, min_norm: float = 0.0) -> float:
    norm = max(float(np.linalg.norm(reference)), min_norm)
    difference = np.asarray(value, np.float64) - reference
    return float(np.linalg.norm(difference) / (norm or 1))


def _global_norm(grads: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))


def _in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda t: jnp.asarray(np.asarray(t, np.float64)), tree)


def leaves_and_factors(
    params: Params, x: jax.Array, y: jax.Array, tolerance: float
) -> list[Row]:
    """Compares each hand-derived quantity with JAX's own derivative in float64.

    The gradient is computed in the dtype of the arguments. The factors of the textbook
    are computed in float64: in a smaller dtype ŷ rounds to 0 or 1, where they are not
    finite.
    """
    value, grads = jaxbce.value_and_grad(params, x, y)
    data_grads = jax.grad(jaxbce.loss, argnums=(1, 2))(params, x, y)
    with jax.enable_x64(True):
        exact = _in_float64((params, x, y))
        value_64, grads_64 = jax.value_and_grad(baselines.plain_loss)(*exact)
        data_grads_64 = jax.grad(baselines.plain_loss, argnums=(1, 2))(*exact)
        rows = []
        if len(params) == 2:
            in_float64 = x.dtype == jnp.float64
            factor_tolerance = tolerance if in_float64 else TOLERANCES["float64"]
            rows = [compare(*factor, factor_tolerance) for factor in _factors(*exact)]
    min_norm = LEAST_SHARES[x.dtype.name] * _global_norm(grads_64)
    rows.append(compare("mean loss", value, value_64, tolerance))
    for (path, leaf), reference in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(grads_64), strict=True
    ):
        name = f"∂loss/∂params{jax.tree_util.keystr(path)}"
        rows.append(compare(name, leaf, reference, tolerance, min_norm))
    for name, grad, reference in zip("xy", data_grads, data_grads_64, strict=True):
        rows.append(compare(f"∂loss/∂{name}", grad, reference, tolerance))
    return rows


def _factors(
    params: Params, x: jax.Array, y: jax.Array
) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and reference of each factor of the textbook's chain rule.

    The references differentiate each function of the chain by itself.
    """
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
    dyhat_da2 = jax.grad(summed(jax.nn.sigmoid))(a_2)
    yield "∂ŷ/∂a₂ = ŷ(1−ŷ)", by_hand.dyhat_da2, dyhat_da2
    yield "∂a₂/∂w₂ = h₁ᵀ", by_hand.da2_dw2, baselines.weight_derivatives(w_2, h_1)
    yield "∂BCE/∂w₂ = h₁ᵀ(ŷ−y)", by_hand.dbce_dw2, dw_2
    yield "∂BCE/∂b₂ = Σ(ŷ−y)", by_hand.dbce_db2, db_2
    yield "∂BCE/∂h₁ = (ŷ−y)w₂ᵀ", by_hand.dbce_dh1, dh_1
    dh1_da1 = jax.grad(summed(jax.nn.relu))(x @ w_1 + b_1)
    yield "∂h₁/∂a₁ = [a₁>0]", by_hand.dh1_da1, dh1_da1
    yield "∂a₁/∂w₁ = Xᵀ", by_hand.da1_dw1, baselines.weight_derivatives(w_1, x)
    yield "∂BCE/∂w₁ = Xᵀ((ŷ−y)w₂ᵀ⊙[a₁>0])", by_hand.dbce_dw1, dw_1
    yield "∂BCE/∂b₁ = Σ(ŷ−y)w₂ᵀ⊙[a₁>0]", by_hand.dbce_db1, db_1


def _reference_row(
    leaf: str, reference: str, worst_point: str, error: float, tolerance: float
) -> Row:
    return {
        "leaf": leaf,
        "reference": reference,
        "worst_point": worst_point,
        "error": error,
        "tolerance": tolerance,
        "passed": error <= tolerance,
    }


def references(
    params: Params, x: jax.Array, y: jax.Array, *, tolerance: float, seed: int
) -> list[Row]:
    """The comparisons of `check_gradients`, and scikit-learn's backward pass."""
    report = jaxbce.check_gradients(
        jaxbce.value_and_grad,
        params,
        x,
        y,
        dtype=x.dtype,
        tolerance=tolerance,
        seed=seed,
    )
    rows = [
        _reference_row(c.leaf, c.reference, c.point, c.error, c.tolerance)
        | {"passed": c.passed}
        for c in report.comparisons
    ]
    tail_error = max(t.error for t in report.tail)
    tail_tolerance = report.tail[0].tolerance
    rows.append(
        _reference_row("tail", "σ(−|a|)", "|a| ≤ 80", tail_error, tail_tolerance)
        | {"passed": report.tail_passed}
    )
    grads = jaxbce.grad(params, x, y)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(grads)]
    scikit_learn = baselines.scikit_learn_gradient(params, x, y)
    min_norm = LEAST_SHARES[x.dtype.name] * _global_norm(scikit_learn)
    for name, leaf, reference in zip(
        names, jax.tree.leaves(grads), scikit_learn, strict=True
    ):
        error = _relative_error(leaf, reference, min_norm)
        rows.append(_reference_row(name, "scikit-learn", "given", error, tolerance))
    return rows


def tail(sizes: tuple[float, ...]) -> list[Row]:
    """Relative errors of four computations of ∂BCE/∂a in float32.

    Each error is the larger one of a = size, y = 1 and a = -size, y = 0.
    """
    unit = (jaxbce.Layer(jnp.ones((1, 1)), jnp.zeros(1)),)  # one weight of 1: a = x

    def by_hand(a: jax.Array, y: jax.Array) -> jax.Array:
        return jaxbce.deltas(unit, jaxbce.forward(unit, a), y)[0]

    def derivative(ell: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return jax.grad(lambda a, y: jnp.sum(ell(a, y)))

    functions = {
        "textbook": lambda a, y: jax.nn.sigmoid(a) - y,
        "by_hand": by_hand,
        "jax_grad_of_optax": derivative(optax.sigmoid_binary_cross_entropy),
        "jax_grad_of_logaddexp": derivative(
            lambda a, y: jnp.logaddexp(0, a) - y * a  # log(1+eᵃ) − ya
        ),
    }
    size = np.array(sizes, np.float32)
    a = jnp.concatenate([jnp.asarray(size), -jnp.asarray(size)])[:, None]
    y = (a > 0).astype(a.dtype)
    exact = np.exp(-size.astype(np.float64)) / (1 + np.exp(-size.astype(np.float64)))
    errors = {}
    for name, function in functions.items():
        values = abs(np.asarray(function(a, y), np.float64)).reshape(2, -1)
        errors[name] = np.max(abs(values - exact) / exact, axis=0)
    return [
        {
            "logit": f"{size:g}",
            **{name: float(error[i]) for name, error in errors.items()},
            "passed": bool(errors["by_hand"][i] <= TAIL_TOLERANCE),
        }
        for i, size in enumerate(sizes)
    ]


def training(
    key: jax.Array, params: Params, x: jax.Array, y: jax.Array, tolerance: float
) -> list[Row]:
    """The gradients that `fit` and `sweep` follow, in float64.

    A step of SGD at rate 1 subtracts the gradient from the parameters. `fit` holds the
    examples as columns, and as rows if there is only one; `sweep` trains two points.
    """
    sizes = (x.shape[1], *(len(layer.b) for layer in params))
    hparams = {"learning_rate": np.array([1.0, 0.5])}
    rows = []
    with jax.enable_x64(True):
        params, x, y = _in_float64((params, x, y))
        first = jaxbce.init(jax.random.split(jax.random.fold_in(key, 0))[0], sizes)

        def fit(x: jax.Array, y: jax.Array) -> Params:
            sgd = optax.sgd(1.0)
            run = jaxbce.fit(key, params, x, y, optimizer=sgd, num_steps=1)
            return run.params

        trained = jaxbce.sweep(
            key,
            x,
            y,
            hidden=sizes[1:-1],
            make_optimizer=lambda hp: optax.sgd(hp["learning_rate"]),
            hparams=hparams,
            num_steps=1,
        ).params
        member = jax.tree.map(lambda leaf: leaf[0, 0], trained)
        for name, before, after, data in (
            ("fit", params, fit(x, y), (x, y)),
            ("fit, one example", params, fit(x[:1], y[:1]), (x[:1], y[:1])),
            ("sweep", first, member, (x, y)),
        ):
            truth = jax.grad(baselines.plain_loss)(before, *data)
            min_norm = LEAST_SHARES["float64"] * _global_norm(truth)
            for (path, reference), old, new in zip(
                jax.tree.leaves_with_path(truth),
                jax.tree.leaves(before),
                jax.tree.leaves(after),
                strict=True,
            ):
                followed = np.asarray(old - new)
                error = _relative_error(followed, np.asarray(reference), min_norm)
                rows.append(
                    {
                        "followed_by": name,
                        "leaf": jax.tree_util.keystr(path),
                        "error": error,
                        "tolerance": tolerance,
                        "passed": error <= tolerance,
                    }
                )
    return rows


_many_by_hand = jax.jit(jax.vmap(jaxbce.value_and_grad, in_axes=(0, None, None)))
_many_by_jax = jax.jit(
    jax.vmap(jax.value_and_grad(baselines.plain_loss), in_axes=(0, None, None))
)


def many_networks(
    key: jax.Array,
    sizes: tuple[int, ...],
    x: jax.Array,
    y: jax.Array,
    trials: int,
    tolerance: float,
) -> list[Row]:
    """The largest error of each leaf over many random networks under vmap."""

    def init(key: jax.Array) -> Params:
        key_w, key_b = jax.random.split(key)
        params = jaxbce.init(key_w, sizes, dtype=x.dtype)
        biases = jax.random.normal(key_b, (len(params), max(sizes)), x.dtype)
        return tuple(
            layer._replace(b=0.5 * b[: len(layer.b)])
            for layer, b in zip(params, biases, strict=True)
        )

    params = jax.vmap(init)(jax.random.split(key, trials))
    values = _many_by_hand(params, x, y)
    with jax.enable_x64(True):
        references = _many_by_jax(*_in_float64((params, x, y)))
        references = jax.tree.map(np.asarray, references)
    share = LEAST_SHARES[x.dtype.name]
    min_norms = [
        share * _global_norm(jax.tree.map(lambda leaf, i=i: leaf[i], references[1]))
        for i in range(trials)
    ]
    rows = []
    for (path, value), reference in zip(
        jax.tree.leaves_with_path(values), jax.tree.leaves(references), strict=True
    ):
        leaf = jax.tree_util.keystr(path[1:])  # of the loss, empty
        value = np.asarray(value, np.float64)
        errors = np.array(
            [
                _relative_error(value[i], reference[i], min_norms[i] if leaf else 0.0)
                for i in range(trials)
            ]
        )
        worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
        rows.append(
            {
                "leaf": leaf or "value",
                "worst_network": worst,
                "worst_error": float(errors[worst]),
                "median_error": float(np.median(errors)),
                "tolerance": tolerance,
                "passed": bool(errors[worst] <= tolerance),
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
    """Time and temporary memory of one gradient by three implementations."""

    def by_hand(block_size: int | None) -> Callable[..., Any]:
        return lambda *args: jaxbce.value_and_grad(*args, block_size=block_size)

    functions = {
        "jax.value_and_grad of optax's loss": jax.value_and_grad(baselines.plain_loss),
        "by hand, one pass": by_hand(None),
        f"by hand, blocks of {block_size}": by_hand(block_size),
    }
    params = jaxbce.init(key, sizes, dtype=jnp.float32)
    arguments = (params, *(jnp.asarray(t, jnp.float32) for t in (x, y)))
    costs = timing.measure(
        lambda: {
            name: timing.compile_call(function, *arguments)
            for name, function in functions.items()
        },
        rounds=rounds,
    )
    baseline = next(iter(costs.values()))
    rows = []
    for name, measured in costs.items():
        speed, *quartiles = timing.speed(measured, baseline)
        rows.append(
            {
                "gradient": name,
                "microseconds": f"{1e6 * measured.seconds:.0f}",
                "speed": f"{speed:.2f}",
                "quartiles": "-".join(f"{q:.2f}" for q in quartiles),
                "temporary_kb": f"{(measured.temp_bytes or 0) / 1e3:.0f}",
            }
        )
    return rows
