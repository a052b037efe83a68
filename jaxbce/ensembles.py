"""Averaged predictions of several networks."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from jaxbce import _blocks, _validate, network
from jaxbce._jit import jit
from jaxbce.losses import softplus
from jaxbce.network import Params, sigmoid

_BLOCK_BYTES = 4 << 20  # activations of the networks that are computed together


@jit()
def ensemble_logits(params: Params, x: ArrayLike) -> jax.Array:
    r"""Computes the logit of the mean probability of several networks.

    .. math::
      \log \frac{\bar p}{1 - \bar p}, \qquad
      \bar p = \frac1M \sum_m \sigma(a_L^{(m)})

    It is accurate in both tails, where the mean probability rounds to 0 or 1. The
    log-loss of the ensemble is `bce_with_logits(ensemble_logits(params, x), y)`.

    Args:
      params: Parameters of M networks: leaves with any leading axes, such as
        `[points, seeds, ...]` in a `SweepResult`.
      x: Features `[N, n_0]`, floating, N >= 1. Networks and examples are processed in
        blocks, so that memory does not grow with N or M beyond the result.

    Returns:
      Logits `[N, n_L]`, in the accumulation dtype (float32 for bfloat16).

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match.

    Example:
      >>> import jax, jaxbce
      >>> one = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> two = jax.tree.map(lambda leaf: jax.numpy.stack([leaf, leaf]), one)
      >>> x = jax.numpy.ones((5, 2))
      >>> together = jaxbce.ensemble_logits(two, x)
      >>> bool(jax.numpy.allclose(together, jaxbce.logits(one, x)))
      True
    """
    leading, one = _validate.stacked_params(params)
    x = _validate.features(x, one)
    count, n = math.prod(leading), x.shape[0]
    if count == 0:
        raise ValueError("expected params of at least one network, got none")
    members = jax.tree.map(
        lambda leaf: jnp.reshape(leaf, (count, *leaf.shape[len(leading) :])), params
    )
    block_examples = _blocks.examples_per_block("auto", one, n)
    member_bytes = sum(layer.w.shape[1] for layer in one) * x.dtype.itemsize

    def mean_logits(x: jax.Array) -> jax.Array:
        size = 1
        if isinstance(x.shape[0], int):  # not symbolic, as in an exported program
            size = max(size, _BLOCK_BYTES // (x.shape[0] * member_bytes))
        blocks = -(-count // size)
        size = -(-count // blocks)

        def add_block(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            chosen = jnp.minimum(i * size + jnp.arange(size), count - 1)
            is_new = chosen == i * size + jnp.arange(size)  # others are repeated
            chosen_members = jax.tree.map(lambda leaf: leaf[chosen], members)
            a = jax.vmap(network.logits, (0, None))(chosen_members, x)  # [size, N, n_L]
            log_p = -softplus(jnp.stack([-a, a]))  # of labels 1 and 0
            log_p = jnp.where(is_new[:, None, None], log_p, -jnp.inf)
            return jnp.logaddexp(total, logsumexp(log_p, axis=1)), None

        dtype = _validate.accumulation_dtype(x.dtype)
        zero = jnp.full((2, x.shape[0], one[-1].w.shape[1]), -jnp.inf, dtype)
        (log_1, log_0), _ = lax.scan(add_block, zero, jnp.arange(blocks))
        return log_1 - log_0

    return _blocks.map_over_blocks(mean_logits, (x,), block_examples)


def ensemble_proba(params: Params, x: ArrayLike) -> jax.Array:
    """Computes the mean probability of label 1 of several networks.

    Args:
      params: Parameters of M networks: leaves with any leading axes.
      x: Features `[N, n_0]`, floating, N >= 1.

    Returns:
      Probabilities `[N, n_L]`, in the accumulation dtype (float32 for bfloat16). They
      are accurate near 0; near 1 use `ensemble_logits`.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match.

    Example:
      >>> import jax, jaxbce, optax
      >>> x = jax.random.normal(jax.random.key(0), (64, 2))
      >>> found = jaxbce.sweep(
      ...     jax.random.key(1), x, x[:, :1] > 0, hidden=(8,), num_seeds=5,
      ...     num_steps=50, hparams={}, make_optimizer=lambda hp: optax.adam(1e-2))
      >>> jaxbce.ensemble_proba(found.params, x).shape
      (64, 1)
    """
    return sigmoid(ensemble_logits(params, x))
