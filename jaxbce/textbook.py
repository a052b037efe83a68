"""The textbook chain rule, factor by factor, for teaching and for checks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbce import _validate
from jaxbce._jit import jit
from jaxbce._layouts import matmul
from jaxbce.network import Params, forward


class ChainRule(NamedTuple):
    """The factors of the textbook chain rule for one hidden layer.

    BCE is the sum over the batch. The attributes are in the order of the derivation.

    Attributes:
      dbce_dyhat: ∂BCE/∂ŷ = (ŷ − y) / (ŷ (1 − ŷ)), `[N, n_2]`.
      dyhat_da2: ∂ŷ/∂a₂ = ŷ (1 − ŷ), `[N, n_2]`.
      da2_dw2: ∂a₂/∂w₂ = h₁ᵀ, `[n_1, N]`.
      dbce_dw2: ∂BCE/∂w₂ = h₁ᵀ (ŷ − y), `[n_1, n_2]`.
      dbce_db2: ∂BCE/∂b₂ = ŷ − y, summed over the batch, `[n_2]`.
      dbce_dh1: ∂BCE/∂h₁ = (ŷ − y) w₂ᵀ, `[N, n_1]`.
      dh1_da1: ∂h₁/∂a₁ = [a₁ > 0], `[N, n_1]`.
      da1_dw1: ∂a₁/∂w₁ = Xᵀ, `[n_0, N]`.
      dbce_dw1: ∂BCE/∂w₁ = Xᵀ ((ŷ − y) w₂ᵀ ⊙ [a₁ > 0]), `[n_0, n_1]`.
      dbce_db1: ∂BCE/∂b₁ = (ŷ − y) w₂ᵀ ⊙ [a₁ > 0], summed over the batch, `[n_1]`.
    """

    dbce_dyhat: jax.Array
    dyhat_da2: jax.Array
    da2_dw2: jax.Array
    dbce_dw2: jax.Array
    dbce_db2: jax.Array
    dbce_dh1: jax.Array
    dh1_da1: jax.Array
    da1_dw1: jax.Array
    dbce_dw1: jax.Array
    dbce_db1: jax.Array


@jit()
def chain_rule(params: Params, x: ArrayLike, y: ArrayLike) -> ChainRule:
    """The factors of the textbook chain rule for one hidden layer.

    Meant for teaching and for checks: ŷ − y loses all its digits where ŷ rounds to y,
    and ∂BCE/∂ŷ is NaN or infinite where ŷ rounds to 0 or 1. `value_and_grad` computes
    the same gradient without these factors.

    Args:
      params: A tuple of two `Layer`, so that there is one hidden layer.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_2]`, real or boolean.

    Returns:
      A `ChainRule`, with gradients of the loss summed over the batch.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If there is not exactly one hidden layer, or shapes do not match.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> factors = jaxbce.chain_rule(params, jnp.ones((8, 2)), jnp.ones((8, 1)))
      >>> factors.dbce_dw1.shape
      (2, 3)
    """
    activations = forward(params, x)
    if len(params) != 2:
        raise ValueError(
            f"expected params to have 2 layers (one hidden layer), got {len(params)}"
        )
    a_1, _ = activations.a
    h_0, h_1, y_hat = activations.h
    y = _validate.labels(y, y_hat.shape, y_hat.dtype)
    error = y_hat - y  # [N, n_2]
    w_2 = params[1].w
    dbce_dh1 = matmul(error.astype(w_2.dtype), w_2.T)  # [N, n_1]
    dh1_da1 = (a_1 > 0).astype(a_1.dtype)  # [N, n_1]
    delta_1 = dbce_dh1 * dh1_da1  # [N, n_1]
    return ChainRule(
        dbce_dyhat=error / (y_hat * (1 - y_hat)),
        dyhat_da2=y_hat * (1 - y_hat),
        da2_dw2=h_1.T,
        dbce_dw2=matmul(h_1.T, error.astype(h_1.dtype)),
        dbce_db2=jnp.sum(error, axis=0),
        dbce_dh1=dbce_dh1,
        dh1_da1=dh1_da1,
        da1_dw1=h_0.T,
        dbce_dw1=matmul(h_0.T, delta_1.astype(h_0.dtype)),
        dbce_db1=jnp.sum(delta_1, axis=0),
    )
