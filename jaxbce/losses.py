"""Binary cross-entropy, elementwise: on probabilities and on logits."""

import jax
import jax.numpy as jnp
from jax.scipy.special import xlog1py, xlogy

from jaxbce import _validate
from jaxbce.network import sigmoid


@jax.custom_jvp
def softplus(a: jax.Array) -> jax.Array:
    """`log(1 + exp(a))`, with derivative `σ(a)`; accurate in both tails.

    The value is accurate as written; differentiated as written it would be wrong
    at 0 (`max` and `abs` each have a kink there), so the derivative is given.
    """
    return jnp.maximum(a, 0) + jnp.log1p(jnp.exp(-jnp.abs(a)))


softplus.defjvps(lambda t, _, a: t * sigmoid(a))


def weighted(weight: jax.Array, value: jax.Array) -> jax.Array:
    """`weight · value`, where weight 0 times an infinite value is 0.

    Only the infinite values are replaced, not every value of weight 0, so that the
    derivative in the weight is right at 0 too.
    """
    return weight * jnp.where((weight == 0) & jnp.isinf(value), 0, value)


@jax.jit
def bce(y_hat: jax.Array, y: jax.Array) -> jax.Array:
    r"""Binary cross-entropy on probabilities, as in a textbook; elementwise.

    .. math:: -\left[y \log \hat y + (1 - y) \log(1 - \hat y)\right]

    For showing and checking: once ŷ rounds to 0 or 1 the loss is infinite or 0 and
    its gradient useless. Train with `bce_with_logits`, or `jaxbce.loss`.

    Args:
      y_hat: Probabilities in [0, 1], any shape, floating.
      y: Labels in [0, 1] of that very shape, real or boolean.

    Returns:
      Losses in nats, of that shape and of y_hat's dtype. A label of 0 or 1 that is
      predicted with certainty costs 0, or inf where the prediction is wrong.

    Raises:
      TypeError: If y_hat is not of a float dtype, or y not real.
      ValueError: If the shapes differ; nothing is broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> ell = jaxbce.bce(jnp.array([0.5, 0.9]), jnp.array([1.0, 1.0]))
      >>> [f"{value:.4g}" for value in ell.tolist()]
      ['0.6931', '0.1054']
    """
    _validate.real("y_hat", y_hat)
    y = _validate.labels(y, y_hat.shape, y_hat.dtype, "y_hat has")
    return -(xlogy(y, y_hat) + xlog1py(1 - y, -y_hat))


@jax.jit
def bce_with_logits(
    logits: jax.Array, y: jax.Array, *, pos_weight: jax.Array | float = 1.0
) -> jax.Array:
    r"""Binary cross-entropy on logits; elementwise.

    .. math::
      \ell = p\, y\, \mathrm{softplus}(-a) + (1 - y)\, \mathrm{softplus}(a)

    Accurate relative to its own size for every finite logit, and so are its
    derivatives of any order.

    Args:
      logits: Logits a, any shape, floating. bfloat16 is computed in float32.
      y: Labels in [0, 1] of that very shape, real or boolean; soft labels allowed.
      pos_weight: Weight p >= 0 of the positive class: a scalar, or one an output,
        `[n_L]`, along the last axis of logits.

    Returns:
      Losses in nats, of that shape and of the logits' dtype. An infinite logit costs
      0 where it agrees with a label of 0 or 1 and inf elsewhere, never NaN.

    Raises:
      TypeError: If logits are not of a float dtype, or y not real.
      ValueError: If the shapes differ; nothing is broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> ell = jaxbce.bce_with_logits(jnp.array([0.0, 40.0]), jnp.array([1.0, 1.0]))
      >>> [f"{value:.4g}" for value in ell.tolist()]
      ['0.6931', '4.248e-18']
    """
    _validate.real("logits", logits)
    dtype = _validate.accumulation_dtype(logits.dtype)
    y = _validate.labels(y, logits.shape, dtype)
    outputs = logits.shape[-1] if logits.ndim else None
    p = _validate.pos_weight(pos_weight, outputs, dtype)
    p = jnp.broadcast_to(p, logits.shape)
    a = logits.astype(dtype)
    ell = weighted(p * y, softplus(-a)) + weighted(1 - y, softplus(a))
    return ell.astype(logits.dtype)


@jax.custom_jvp
def output_delta(a: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
    """`(1−y) σ(a) − p y σ(−a)`, given `p y` and `1 − y`, all of one shape.

    Both σ are fractions over `1 + exp(−|a|)`, exact in both tails, so that one
    exponential and one division do. The division comes last: what ends in one XLA
    computes once, and not anew in all that use it.
    """
    e = jnp.exp(-jnp.abs(a))
    falling, rising = jnp.where(a > 0, e, 1), jnp.where(a > 0, 1, e)
    return (negative * rising - positive * falling) / (1 + e)


@output_delta.defjvp
def _output_delta_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    def plain(a: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
        return negative * sigmoid(a) - positive * sigmoid(-a)

    return output_delta(*primals), jax.jvp(plain, primals, tangents)[1]
