"""The derivation for one tiny network, step by step with numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbce
from experiments.support.baselines import plain_logits, weight_derivatives


def walk() -> tuple[str, bool]:
    """The forward pass and the chain rule with their numbers, beside JAX's own.

    Returns:
      The text, and whether all numbers agree with JAX's to 6 digits.
    """
    lines, agree = [], True
    for step in _steps():
        if isinstance(step, str):
            lines += ["", step, "─" * len(step)]
        else:
            lines += _step_lines(*step)
            agree &= step[2] is None or np.allclose(*step[1:], rtol=1e-6, atol=1e-6)
    lines += [
        "",
        "The gradient is a contraction of the activations (X, h₁) with the error",
        "signals (δ₁, δ₂). jax.grad computes both and returns neither.",
    ]
    return "\n".join(lines), agree


def _steps() -> list[Any]:
    """Headings, and steps of an equation, its value and JAX's value or None."""
    x = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.5, -1.5]])
    y = jnp.array([[1.0], [0.0], [1.0]])
    params = (
        jaxbce.Layer(
            jnp.array([[1.0, -0.5, 0.25], [0.5, 1.0, -1.0]]), jnp.array([0.0, 0.25, 0])
        ),
        jaxbce.Layer(jnp.array([[1.0], [-0.75], [0.5]]), jnp.array([-0.25])),
    )
    (w_1, b_1), (w_2, b_2) = params
    activations = jaxbce.forward(params, x)
    factors = jaxbce.chain_rule(params, x, y)
    delta_1, delta_2 = jaxbce.deltas(params, activations, y)

    # References: an input that is added to a layer has the layer's derivative.
    def bce(params: Any, e_1: Any, e_h: Any, e_2: Any) -> jax.Array:
        (w_1, b_1), (w_2, b_2) = params
        h_1 = jax.nn.relu(x @ w_1 + b_1 + e_1) + e_h
        y_hat = jax.nn.sigmoid(h_1 @ w_2 + b_2 + e_2)
        return -jnp.sum(y * jnp.log(y_hat) + (1 - y) * jnp.log(1 - y_hat))

    zeros = (jnp.zeros((3, 3)), jnp.zeros((3, 3)), jnp.zeros((3, 1)))
    jax_grads, jax_a_1, jax_h_1, jax_a_2 = jax.grad(bce, (0, 1, 2, 3))(params, *zeros)
    a_1 = x @ w_1 + b_1
    a_2 = jax.nn.relu(a_1) @ w_2 + b_2
    y_hat = jax.nn.sigmoid(a_2)

    def elementwise(function: Any, at: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(jax.grad(function)))(at)

    jax_y_hat = jax.grad(lambda p: -jnp.sum(y * jnp.log(p) + (1 - y) * jnp.log(1 - p)))(
        y_hat
    )
    return [
        "The network: 3 examples, 2 features, 3 hidden units, 1 output",
        ("X", x, None),
        ("y", y, None),
        ("w₁", w_1, None),
        ("b₁", b_1, None),
        ("w₂", w_2, None),
        ("b₂", b_2, None),
        "Forward",
        ("a₁ = X w₁ + b₁", activations.a[0], a_1),
        ("h₁ = max(a₁, 0)", activations.h[1], jax.nn.relu(a_1)),
        ("a₂ = h₁ w₂ + b₂", activations.a[1], plain_logits(params, x)),
        ("ŷ = σ(a₂)", activations.h[2], y_hat),
        (
            "BCE = Σ y softplus(−a₂) + (1−y) softplus(a₂)",
            jaxbce.loss(params, x, y, reduction="sum"),
            bce(params, *zeros),
        ),
        "Backward, the output layer",
        ("∂BCE/∂ŷ = (ŷ − y) / (ŷ(1 − ŷ))", factors.dbce_dyhat, jax_y_hat),
        ("∂ŷ/∂a₂ = ŷ(1 − ŷ)", factors.dyhat_da2, elementwise(jax.nn.sigmoid, a_2)),
        (
            "δ₂ = ∂BCE/∂ŷ · ∂ŷ/∂a₂ = ŷ − y, computed as (1−y)σ(a₂) − yσ(−a₂)",
            delta_2,
            jax_a_2,
        ),
        ("∂a₂/∂w₂ = h₁ᵀ", factors.da2_dw2, weight_derivatives(w_2, jax.nn.relu(a_1))),
        ("∂BCE/∂w₂ = h₁ᵀ δ₂", factors.dbce_dw2, jax_grads[1].w),
        ("∂BCE/∂b₂ = Σ δ₂", factors.dbce_db2, jax_grads[1].b),
        "Backward, the hidden layer",
        ("∂BCE/∂h₁ = δ₂ w₂ᵀ", factors.dbce_dh1, jax_h_1),
        ("∂h₁/∂a₁ = [a₁ > 0]", factors.dh1_da1, elementwise(jax.nn.relu, a_1)),
        ("δ₁ = ∂BCE/∂h₁ ⊙ [a₁ > 0]", delta_1, jax_a_1),
        ("∂a₁/∂w₁ = Xᵀ", factors.da1_dw1, weight_derivatives(w_1, x)),
        ("∂BCE/∂w₁ = Xᵀ δ₁", factors.dbce_dw1, jax_grads[0].w),
        ("∂BCE/∂b₁ = Σ δ₁", factors.dbce_db1, jax_grads[0].b),
    ]


def _step_lines(equation: str, value: Any, reference: Any) -> list[str]:
    """Lines of an equation and its value, beside the reference."""
    left = _matrix_lines(value)
    shape = "×".join(map(str, np.shape(value))) or "scalar"
    if reference is None:
        return ["", f"  {equation}   [{shape}]", *("    " + row for row in left)]
    width = max(map(len, left))
    difference = float(jnp.max(jnp.abs(value - reference)))
    lines = ["", f"  {equation}   [{shape}]   largest difference {difference:.0e}"]
    for i, (row, right) in enumerate(zip(left, _matrix_lines(reference), strict=True)):
        between = "  jax: " if i == 0 else "       "
        lines.append(f"    {row:<{width}}{between}{right}")
    return lines


def _matrix_lines(values: Any) -> list[str]:
    return [
        " ".join(f"{v:8.4f}" for v in row) for row in np.atleast_2d(np.asarray(values))
    ]
