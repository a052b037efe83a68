"""Baselines: the same network in plain JAX and in scikit-learn."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import optax
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.neural_network import MLPClassifier

from jaxbce.network import Params


def plain_logits(params: Params, x: jax.Array) -> jax.Array:
    """Logits in plain JAX, to be differentiated by JAX."""
    h = x
    for w, b in params[:-1]:
        h = jax.nn.relu(h @ w + b)
    return h @ params[-1].w + params[-1].b


def weight_derivatives(w: jax.Array, h: jax.Array) -> jax.Array:
    """∂a/∂w of a = h w for one output and its column of weights, `[n_in, N]`."""
    return jax.vmap(jax.grad(jnp.dot), (None, 0))(w[:, 0], h).T


def plain_loss(
    params: Params, x: jax.Array, y: jax.Array, weight: jax.Array | None = None
) -> jax.Array:
    """Mean loss with optax's cross-entropy, to be differentiated by JAX."""
    ell = optax.sigmoid_binary_cross_entropy(plain_logits(params, x), y)
    ell = jnp.sum(ell, axis=1)
    return jnp.mean(ell if weight is None else weight * ell)


def plain_objective(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    sample_weight: jax.Array,
    pos_weight: jax.Array | float,
    reduction: str,
) -> jax.Array:
    """Weighted sum of the losses in plain JAX, in place of `jaxbce.loss`."""
    if reduction != "sum":
        raise ValueError(f"expected reduction 'sum', got {reduction!r}")
    a = plain_logits(params, x).astype(sample_weight.dtype)
    ell = -pos_weight * y * jax.nn.log_sigmoid(a) - (1 - y) * jax.nn.log_sigmoid(-a)
    return jnp.sum(sample_weight[:, None] * ell)


def plain_fit(
    key: jax.Array,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    weight: jax.Array | None = None,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
) -> Params:
    """Training with jax.grad, optax and scans over epochs.

    The order of the examples is that of `jaxbce.fit` if `batch_size` divides their
    number. The last examples of an epoch that do not fill a batch are dropped.
    """
    data = (x, y) if weight is None else (x, y, weight)
    used = len(x) // batch_size * batch_size

    def step(carry: Any, indices: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        batch = tuple(t[indices] for t in data) if batch_size < len(x) else data
        value, grads = jax.value_and_grad(plain_loss)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def epoch(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        order = jax.random.permutation(jax.random.fold_in(key, number), len(x))
        return jax.lax.scan(step, carry, order[:used].reshape(-1, batch_size))

    start = params, optimizer.init(params)
    return jax.lax.scan(epoch, start, jnp.arange(epochs))[0][0]


def plain_sweep(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
    *,
    make_optimizer: Any,
    epochs: int,
    batch_size: int,
    member_data: Callable[..., Any] = lambda hparams, x, y: (x, y),
    devices: Any = None,
) -> Any:
    """`jit(vmap(train))` over hyperparameters.

    A member trains on `member_data(hparams, x, y)`: features, labels and optionally
    weights. Members run on one device, or are spread over `devices`, whose number must
    divide the number of members.
    """

    def train(hparams: Any, params: Params, x: jax.Array, y: jax.Array) -> Params:
        options = {"optimizer": make_optimizer(hparams)}
        options |= {"epochs": epochs, "batch_size": batch_size}
        return plain_fit(key, params, *member_data(hparams, x, y), **options)

    members = jax.vmap(train, in_axes=(0, None, None, None))
    if devices is not None:
        specs: Any = {"in_specs": (jax.P("m"), jax.P(), jax.P(), jax.P())}
        specs |= {"out_specs": jax.P("m"), "check_vma": False}
        mesh = jax.sharding.Mesh(np.array(devices), ("m",))
        members = jax.shard_map(members, mesh=mesh, **specs)
    program = jax.jit(members)
    return lambda hparams: program(hparams, params, x, y)


def scikit_learn_sweep(
    x: np.ndarray, y: np.ndarray, hidden: tuple[int, ...], rates: Any, options: Any
) -> int:
    """Trains MLPClassifier at each rate on all cores; returns the number of steps."""

    def train(rate: float) -> int:
        model = MLPClassifier(hidden, learning_rate_init=rate, alpha=0.0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return int(model.fit(x, y).t_ // options["batch_size"])

    steps: Any = joblib.Parallel(n_jobs=-1)(
        joblib.delayed(train)(rate) for rate in rates
    )
    return sum(steps)


def scikit_learn_grid_search(
    x: np.ndarray,
    y: np.ndarray,
    fold: np.ndarray,
    hidden: tuple[int, ...],
    rates: Any,
    options: Any,
) -> int:
    """Cross-validates MLPClassifier on all cores; returns the number of steps."""

    def score(model: Any, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        steps = model.t_ // options["batch_size"]
        return {
            "log_loss": log_loss(y, model.predict_proba(x), labels=[0, 1]),
            "steps": steps,
        }

    settings: Any = {"scoring": score, "cv": PredefinedSplit(fold), "n_jobs": -1}
    settings |= {"refit": False, "error_score": "raise"}
    search: Any = GridSearchCV(
        MLPClassifier(hidden, alpha=0.0, **options),
        {"learning_rate_init": rates},
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        results = search.fit(x, y).cv_results_
    folds = range(search.n_splits_)
    return int(sum(results[f"split{i}_test_steps"].sum() for i in folds))


def scikit_learn_gradient(
    params: Params, x: Any, y: Any, sample_weight: Any = None
) -> list[np.ndarray]:
    """Gradient of the mean loss by scikit-learn, in float64 and in JAX's leaf order."""
    layers = [tuple(np.asarray(leaf, np.float64) for leaf in layer) for layer in params]
    features, labels = np.asarray(x, np.float64), np.asarray(y, np.float64)
    model = MLPClassifier(alpha=0.0)
    model.coefs_ = [w for w, _ in layers]
    model.intercepts_ = [b for _, b in layers]
    model.n_layers_ = len(layers) + 1
    model.n_outputs_ = labels.shape[1]
    model.out_activation_ = "logistic"
    model.loss = "binary_log_loss"
    widths = [w.shape[1] for w in model.coefs_]
    activations = [features, *(np.empty((len(features), n)) for n in widths)]
    activations = model._forward_pass(activations)
    _, d_w, d_b = model._backprop(
        features,
        labels,
        sample_weight,
        activations,
        [np.empty_like(a) for a in activations[1:]],
        [np.empty_like(w) for w in model.coefs_],
        [np.empty_like(b) for b in model.intercepts_],
    )
    return [leaf for layer in zip(d_w, d_b, strict=True) for leaf in layer]
