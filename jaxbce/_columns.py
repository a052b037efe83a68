"""The derivation of `gradients.py` with one column per example, for training loops.

Parameters are carried transposed, as `w [n_k, n_{k-1}]`, and activations are
`[n_k, N]`:

    a_k = W_k h_{k-1} + b_k
    δ_k = (W_{k+1}ᵀ δ_{k+1}) ⊙ [a_k > 0]      ∂/∂W_k = δ_k h_{k-1}ᵀ

In this layout `jax.vmap` over networks that share their examples needs no transposes.
The first layers of all G networks are one matrix product, `[G n_1, n_0] [n_0, N]`, and
so are their gradients, with one more column for the biases. The later layers
are batched products over the networks. A single network is no slower in this layout.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbce._blocks import sum_over_blocks
from jaxbce.losses import output_delta, softplus, weighted
from jaxbce.network import Layer, Params, matmul

_WIDTH_MULTIPLE = 8  # the feature width is padded to a multiple, for vector units


def transpose_leaves(tree: Any) -> Any:
    """Every leaf transposed: from parameters to their column layout, and back."""
    return jax.tree.map(jnp.transpose, tree)


def with_ones(x: jax.Array) -> jax.Array:
    """Features `[N, n_0]`, then a column of ones for the bias, then zero padding."""
    n, n_in = x.shape
    extra = -(-(n_in + 1) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE - n_in
    return jnp.concatenate([x, jnp.eye(1, extra, dtype=x.dtype).repeat(n, 0)], 1)


class Objective(NamedTuple):
    """The loss of a batch, Σ c ℓ, and what a training step needs of it.

    Attributes:
      value: The loss, a scalar in the accumulation dtype.
      linear_part: The piecewise-linear part of the loss, without exponentials. The
        remainder is bounded, so the loss is finite exactly if this part is.
      grads: The gradient, as params in the column layout.
    """

    value: jax.Array
    linear_part: jax.Array
    grads: Params


def objective(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    c: jax.Array,
    pos_weight: jax.Array,
    *,
    block_size: int,
) -> Objective:
    """The weighted loss of a batch and its hand-derived gradient.

    Args:
      params: Parameters in the column layout, `w [n_k, n_{k-1}]`.
      x: Features `[N, ...]` with ones and padding, as `with_ones` returns them.
      y: Labels `[N, n_L]` in the accumulation dtype.
      c: Weights of the examples, `[N]`, in that dtype.
      pos_weight: Scalar or `[n_L]`.
      block_size: The largest number of examples per block.
    """

    def block(c: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Objective, None]:
        h, a = _forward(params, x)
        positive, negative = _label_weights(y, pos_weight)  # [n_L, N]
        linear = weighted(positive, jax.nn.relu(-a)) + weighted(
            negative, jax.nn.relu(a)
        )
        weight = c[None, :]
        delta = output_delta(a, weight * positive, weight * negative)  # [n_L, N]
        grads = []
        for k in range(len(params) - 1, 0, -1):
            w = params[k].w  # W_{k+1}, [n_{k+1}, n_k]
            d = delta.astype(w.dtype)
            grads.append(Layer(matmul(d, h[k].T), jnp.sum(delta, axis=1)))
            outer = len(w) == 1  # cheaper than a product with an inner size of 1
            back = w.T.astype(a.dtype) * delta if outer else matmul(w.T, d)
            delta = jnp.where(h[k] > 0, back, 0)  # [n_k, N]
        first = matmul(delta.astype(x.dtype), x)  # [n_1, n_0 + 1 ...]
        n_in = params[0].w.shape[1]
        grads.append(Layer(first[:, :n_in], first[:, n_in]))
        value = _sum(c, _elementwise_loss(a, positive, negative))
        return Objective(value, _sum(c, linear), tuple(reversed(grads))), None

    total, _ = sum_over_blocks(block, c, (x, y), block_size)
    grads = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), total.grads, params)
    return total._replace(grads=grads)


def loss(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    c: jax.Array,
    pos_weight: jax.Array,
    *,
    block_size: int,
) -> jax.Array:
    """The value of `objective` alone."""

    def block(c: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
        a = _forward(params, x)[1]
        return _sum(c, _elementwise_loss(a, *_label_weights(y, pos_weight))), None

    return sum_over_blocks(block, c, (x, y), block_size)[0]


def _forward(params: Params, x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Layer inputs `h_0, ...`, each `[n_k, N]`, and the logits `[n_L, N]`."""
    h = [x[:, : params[0].w.shape[1]].T]  # [n_0, N]
    a = h[0]
    for k, (w, b) in enumerate(params, start=1):
        a = matmul(w, h[-1])  # [n_k, N]
        a = a + b.astype(a.dtype)[:, None]
        if k < len(params):
            h.append(jax.nn.relu(a).astype(w.dtype))
    return h, a


def _label_weights(y: jax.Array, pos_weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`p y` and `1 − y`, the weights of the two terms of ℓ, each `[n_L, N]`."""
    return (jnp.broadcast_to(pos_weight, y.shape) * y).T, 1 - y.T


def _elementwise_loss(
    a: jax.Array, positive: jax.Array, negative: jax.Array
) -> jax.Array:
    return weighted(positive, softplus(-a)) + weighted(negative, softplus(a))


def _sum(c: jax.Array, ell: jax.Array) -> jax.Array:
    return jnp.sum(weighted(c, jnp.sum(ell, axis=0)))
