"""Binary cross-entropy, elementwise: on probabilities and on logits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import xlog1py, xlogy
from jax.typing import ArrayLike

from jaxbce import _validate
from jaxbce._jit import jit
from jaxbce.network import sigmoid


@jax.custom_jvp
def softplus(a: jax.Array) -> jax.Array:
    """`log(1 + exp(a))`, with derivative `σ(a)`; accurate in both tails.

    The formula below is accurate, but its automatic derivative would be wrong at 0,
    where `max` and `abs` each have a kink. So the derivative is defined explicitly.
    """
    return jnp.maximum(a, 0) + jnp.log1p(jnp.exp(-jnp.abs(a)))


softplus.defjvps(lambda t, _, a: t * sigmoid(a))


def weighted(weight: jax.Array, value: jax.Array) -> jax.Array:
    """`weight · value`, with a weight of 0 times an infinite value defined as 0.

    Only infinite values are replaced. If all values of weight 0 were replaced, the
    derivative with respect to the weight would be wrong at 0.
    """
    return weight * jnp.where((weight == 0) & jnp.isinf(value), 0, value)


@jit()
def bce(y_hat: ArrayLike, y: ArrayLike) -> jax.Array:
    r"""Elementwise binary cross-entropy on probabilities, as in a textbook.

    .. math:: -\left[y \log \hat y + (1 - y) \log(1 - \hat y)\right]

    Meant for teaching and for checks: where ŷ rounds to 0 or 1, the loss is infinite
    or 0 and its gradient is useless. For training use `bce_with_logits` or
    `jaxbce.loss`.

    Args:
      y_hat: Probabilities in [0, 1], any shape, floating.
      y: Labels in [0, 1] of the same shape, real or boolean.

    Returns:
      Losses in nats, with the shape and dtype of y_hat. For a label of 0 or 1 and a
      prediction of exactly 0 or 1 the loss is 0 where they agree and inf elsewhere.

    Raises:
      TypeError: If y_hat does not have a float dtype, or y is not real.
      ValueError: If the shapes differ; nothing is broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> ell = jaxbce.bce(jnp.array([0.5, 0.9]), jnp.array([1.0, 1.0]))
      >>> [f"{value:.4g}" for value in ell.tolist()]
      ['0.6931', '0.1054']
    """
    _validate.real("y_hat", y_hat)
    y_hat = jnp.asarray(y_hat)
    y = _validate.labels(y, y_hat.shape, y_hat.dtype, "y_hat")
    return -(xlogy(y, y_hat) + xlog1py(1 - y, -y_hat))


@jit()
def bce_with_logits(
    logits: ArrayLike, y: ArrayLike, *, pos_weight: ArrayLike = 1.0
) -> jax.Array:
    r"""Elementwise binary cross-entropy on logits.

    .. math::
      \ell = p\, y\, \mathrm{softplus}(-a) + (1 - y)\, \mathrm{softplus}(a)

    The loss and its derivatives of any order have a small relative error for every
    finite logit.

    Args:
      logits: Logits a, any shape, floating. bfloat16 is computed in float32.
      y: Labels in [0, 1] of the same shape, real or boolean; soft labels allowed.
      pos_weight: Weight p >= 0 of the positive class: a scalar, or one weight per
        output, `[n_L]`, along the last axis of logits.

    Returns:
      Losses in nats, with the shape and dtype of the logits. For an infinite logit the
      loss is 0 where it agrees with a label of 0 or 1 and inf elsewhere, never NaN.

    Raises:
      TypeError: If logits do not have a float dtype, or y is not real.
      ValueError: If the shapes differ; nothing is broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> ell = jaxbce.bce_with_logits(jnp.array([0.0, 40.0]), jnp.array([1.0, 1.0]))
      >>> [f"{value:.4g}" for value in ell.tolist()]
      ['0.6931', '4.248e-18']
    """
    _validate.real("logits", logits)
    logits = jnp.asarray(logits)
    dtype = _validate.accumulation_dtype(logits.dtype)
    y = _validate.labels(y, logits.shape, dtype)
    outputs = logits.shape[-1] if logits.ndim else None
    p = _validate.pos_weight(pos_weight, outputs, dtype)
    ell = elementwise(logits.astype(dtype), *label_weights(y, p))
    return ell.astype(logits.dtype)


def label_weights(y: jax.Array, pos_weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`p y` and `1 − y`, the weights of the two terms of ℓ, with the shape of y."""
    return jnp.broadcast_to(pos_weight, y.shape) * y, 1 - y


def elementwise(
    a: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    function: Any = softplus,
) -> jax.Array:
    """`p y softplus(−a) + (1−y) softplus(a)`, given `p y` and `1 − y`.

    `function` is softplus, or relu for the piecewise-linear part.
    """
    return weighted(positive, function(-a)) + weighted(negative, function(a))


@jax.custom_jvp
def output_delta(a: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
    """`(1−y) σ(a) − p y σ(−a)`, given `p y` and `1 − y`, all of the same shape.

    Both σ are fractions with denominator `1 + exp(−|a|)`, exact in both tails, so one
    exponential and one division are enough. The division comes last because XLA
    computes an array that ends in a division once, instead of again for each use.
    """
    e = jnp.exp(-jnp.abs(a))
    numerator_minus = jnp.where(a > 0, e, 1)  # of σ(−a)
    numerator_plus = jnp.where(a > 0, 1, e)  # of σ(a)
    return (negative * numerator_plus - positive * numerator_minus) / (1 + e)


@output_delta.defjvp
def _output_delta_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    def formula(a: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
        return negative * sigmoid(a) - positive * sigmoid(-a)

    return output_delta(*primals), jax.jvp(formula, primals, tangents)[1]
