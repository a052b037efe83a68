"""Training to the minimum of an objective, with all rows and without each of them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import jaxbce
from experiments.support.cli import InputError
from jaxbce import curvature

STEPS_RATIO = 5  # steps in each phase of `minimize`, as a multiple of num_steps

# Names of estimates of the changes by retraining.
NEWTON = "one Newton step"
GRAD_DOT = "Grad-Dot"


class Problem(NamedTuple):
    """The objective Σ ℓ_i + τ/2 ‖θ‖² on the training rows, and the test rows.

    Attributes:
      x: Training features `[N, n_0]`.
      y: Training labels `[N, 1]`.
      x_test: Test features `[M, n_0]`.
      y_test: Test labels `[M, 1]`.
      tau: The prior precision.
    """

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array
    tau: float


def gaussian_penalty(tau: float) -> Callable[[Any], jax.Array]:
    """τ/2 times the sum of the squared parameters.

    Biases are included (unlike `optimizers.l2_penalty`).
    """
    return lambda params: tau / 2 * optax.tree.norm(params, squared=True)


def momentum(rate: float, num_steps: int) -> optax.GradientTransformation:
    """Gradient descent with momentum and a learning rate that decays to 0."""
    return optax.sgd(optax.cosine_decay_schedule(rate, num_steps), momentum=0.9)


def minimize(
    problem: Problem, hidden: tuple[int, ...], num_steps: int, seed: int
) -> tuple[Any, float]:
    """Trains to near a minimum of the objective, with Adam and then with momentum.

    Returns:
      The parameters, and the learning rate with which to continue, 1 / (λ + τ/N), where
      λ is the largest eigenvalue of the mean loss's Gauss-Newton matrix.

    Raises:
      InputError: If a network diverges, or the gradient is not finite.
    """
    sizes = (problem.x.shape[1], *hidden, 1)
    params = jaxbce.init(jax.random.key(seed), sizes, dtype=problem.x.dtype)
    steps = STEPS_RATIO * num_steps
    # Its steps do not depend on the scale of the loss.
    adam = optax.adam(optax.cosine_decay_schedule(0.01, steps))
    params = _fit(params, problem, adam, steps)
    largest = curvature.ggn_eigenvalues(params, problem.x, problem.y, k=1)[0]
    rate = 1 / (float(largest) + problem.tau / len(problem.x))
    params = descend(params, rate, problem, steps)
    if not np.isfinite(evaluate(params, problem)["gradient_norm"]):
        raise InputError(
            f"--prior_precision={problem.tau:g}: is too large for {problem.x.dtype}"
        )
    return params, rate


def descend(params: Any, rate: float, problem: Problem, num_steps: int) -> Any:
    """Parameters after steps with momentum on all rows."""
    return _fit(params, problem, momentum(rate, num_steps), num_steps)


def _fit(params: Any, problem: Problem, optimizer: Any, num_steps: int) -> Any:
    trained = jaxbce.fit(
        jax.random.key(0),  # without effect, as batches are full
        params,
        problem.x,
        problem.y,
        optimizer=optimizer,
        penalty=gaussian_penalty(problem.tau / len(problem.x)),  # the loss is a mean
        num_steps=num_steps,
    )
    _check_not_diverged(trained.diverged_at)
    return trained.params


def retrain(
    start: Any, rate: float, problem: Problem, num_steps: int, left_out: np.ndarray
) -> pd.DataFrame:
    """Trains and evaluates a network without each of some rows.

    Args:
      start: Parameters to start from.
      rate: The first learning rate.
      problem: The objective with all rows.
      num_steps: Steps of each network.
      left_out: Indices of the rows to leave out, `[networks]`.

    Returns:
      One row per network: the row that it was trained without, "own_logit" and
      "own_loss" of that row, "test_loss" `[M]`, the "gradient_norm" of the objective
      without the row, and the network's share of the "seconds".
    """
    began = time.perf_counter()
    n = len(problem.x)
    trained = jaxbce.sweep(
        jax.random.key(0),
        problem.x,
        problem.y,
        params=start,
        hparams={"left_out": left_out},
        make_optimizer=lambda hp: momentum(rate, num_steps),
        # The loss is the mean of n - 1 examples.
        make_penalty=lambda hp: gaussian_penalty(problem.tau / (n - 1)),
        make_sample_weight=lambda hp: jnp.arange(n) != hp["left_out"],
        num_steps=num_steps,
    )
    _check_not_diverged(trained.diverged_at)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf[:, 0]), trained.params)
    evaluate_all = jax.vmap(_evaluate, (0, None, 0))
    found = jax.tree.map(np.asarray, evaluate_all(params, problem, left_out))
    own = np.arange(len(left_out)), left_out
    return pd.DataFrame(
        {
            "left_out": left_out,
            "own_logit": found["own_logit"][own],
            "own_loss": found["own_loss"][own],
            "test_loss": list(found["test_loss"]),
            "gradient_norm": found["gradient_norm"],
            "seconds": (time.perf_counter() - began) / len(left_out),
        }
    )


def _check_not_diverged(diverged_at: Any) -> None:
    if (np.asarray(diverged_at) >= 0).any():
        raise InputError("networks diverged; try a larger --prior_precision")


def evaluate(params: Any, problem: Problem) -> dict[str, Any]:
    """Logits and losses, and the objective, of a network trained with all rows.

    Returns:
      "own_logit" and "own_loss" of the training rows `[N]`, "test_loss" of the test
      rows `[M]`, the "objective" and its "gradient_norm".
    """
    found = _evaluate(params, problem, jnp.asarray(-1))
    return {name: np.asarray(value) for name, value in found.items()}


@jax.jit
def _evaluate(params: Any, problem: Problem, left_out: jax.Array) -> dict[str, Any]:
    x, y, x_test, y_test, tau = problem
    a, a_test = (jaxbce.logits(params, rows)[:, 0] for rows in (x, x_test))
    weight = (jnp.arange(len(x)) != left_out).astype(x.dtype)
    value, grads = jaxbce.value_and_grad(
        params, x, y, sample_weight=weight, reduction="sum"
    )
    decay, decay_grads = jax.value_and_grad(gaussian_penalty(tau))(params)
    grads = jax.tree.map(jnp.add, grads, decay_grads)
    return {
        "own_logit": a,
        "own_loss": jaxbce.bce_with_logits(a, y[:, 0]),
        "test_loss": jaxbce.bce_with_logits(a_test, y_test[:, 0]),
        "objective": value + decay,
        "gradient_norm": optax.tree.norm(grads),
    }
