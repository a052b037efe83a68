r"""The gradient of binary cross-entropy, derived by hand.

The loss of one example, with logits a_L and positive-class weight p, is

    ℓ = Σ_o [ p y softplus(−a_L) + (1−y) softplus(a_L) ]

and the loss of a batch is Σ_i c_i ℓ_i. The error signals are δ_k = ∂ℓ/∂a_k, `[N, n_k]`,
with one row per example.

1.  At the output, softplus′ = σ, so
        δ_L = (1−y) σ(a_L) − p y σ(−a_L).
    For p = 1 this equals ŷ − y in exact arithmetic, but not in floating point. In
    float32, ŷ − y is 0 for y = 1 and a >= 16.64, but the true derivative is not.
2.  In the hidden layers, a_{k+1} = relu(a_k) W_{k+1} + b_{k+1} and relu′(a) = [a > 0]
    (0 at 0), so
        δ_k = (δ_{k+1} W_{k+1}ᵀ) ⊙ [a_k > 0].
3.  Since a_k = h_{k−1} W_k + b_k, the gradient is a contraction of the activations and
    the error signals:
        ∂/∂W_k = h_{k−1}ᵀ diag(c) δ_k      ∂/∂b_k = Σ_i c_i δ_{k,i}
        ∂/∂X = diag(c) δ_1 W_1ᵀ            ∂/∂y = c (p softplus(−a_L) − softplus(a_L)).

`deltas` computes steps 1 and 2. It applies example weights to δ_L, since everything
below is linear in δ_L. `pull_back` is step 2 alone and `contract` is step 3.
`value_and_grad`, `grad` and the derivative rule of `loss` all use these functions.
`chain_rule` returns the factors that a textbook derives for one hidden layer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxbce import _validate
from jaxbce._blocks import examples_per_block, sum_over_blocks
from jaxbce.losses import bce_with_logits, output_delta, softplus, weighted
from jaxbce.network import Activations, Layer, Params, forward, matmul

# The number of multiplications above which `weight_gradient` splits a product.
_LARGE_PRODUCT = 1 << 20


@jax.jit
def deltas(
    params: Params,
    activations: Activations,
    y: jax.Array,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
) -> tuple[jax.Array, ...]:
    r"""Error signals: derivatives of the loss of each example, `δ_k = ∂ℓ/∂a_k`.

    .. math::
      \delta_L = (1-y)\,\sigma(a_L) - p\,y\,\sigma(-a_L), \qquad
      \delta_k = (\delta_{k+1} W_{k+1}^\top) \odot [a_k > 0]

    Nothing is averaged. The relative error of δ_L is small for every finite logit. For
    an infinite logit and a label of 0 or 1, δ_L is 0 or ±1 (times p).

    Args:
      params: A tuple of `Layer`.
      activations: The result of `forward(params, x)`.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      sample_weight: Factors s of the examples' losses, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.

    Returns:
      `(δ_1, ..., δ_L)`, each `[N, n_k]`, in the accumulation dtype.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match; nothing is broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.ones((2, 1)), b=jnp.zeros(1)),)
      >>> activations = jaxbce.forward(params, jnp.array([[1.0, -1.0], [20.0, 20.0]]))
      >>> (delta,) = jaxbce.deltas(params, activations, jnp.ones((2, 1)))
      >>> [f"{d:.4g}" for d in delta.ravel().tolist()]
      ['-0.5', '-4.248e-18']
    """
    _validate.activations(activations, params)
    a_last = activations.a[-1]
    y = _validate.labels(y, a_last.shape, a_last.dtype)
    p = _validate.pos_weight(pos_weight, a_last.shape[1], a_last.dtype)
    p = jnp.broadcast_to(p, a_last.shape)  # [N, n_L]
    delta = output_delta(a_last, p * y, 1 - y)  # [N, n_L]
    if sample_weight is not None:  # every δ_k below is linear in δ_L
        c = _validate.sample_weight(sample_weight, y.shape[0], a_last.dtype)
        delta = c[:, None] * delta  # after the division: XLA keeps fewer arrays
    return pull_back(params, activations, delta)


def pull_back(
    params: Params, activations: Activations, delta: jax.Array
) -> tuple[jax.Array, ...]:
    """Step 2 of the derivation: from any δ_L `[N, n_L]` to `(δ_1, ..., δ_L)`.

    The result is linear in δ_L. For δ_L = 1 it contains the derivatives of the logits.
    """
    result = [delta]
    for k in range(len(params) - 1, 0, -1):
        w = params[k].w  # W_{k+1}, [n_k, n_{k+1}]
        back = matmul(delta.astype(w.dtype), w.T)  # [N, n_k]
        delta = jnp.where(activations.h[k] > 0, back, 0)  # [N, n_k]; same as a_k > 0
        result.append(delta)
    return tuple(reversed(result))


def contract(h: tuple[jax.Array, ...], delta: tuple[jax.Array, ...]) -> Params:
    """Step 3, the sum of per-example gradients: `h_{k−1}ᵀ δ_k` and `Σ_i δ_{k,i}`.

    Args:
      h: Layer inputs `(h_0, ..., h_{L-1})`, each `[N, n_k]`.
      delta: `(δ_1, ..., δ_L)`, each `[N, n_k]`, with the examples' weights applied.

    Returns:
      One `Layer` per k, in the accumulation dtype.
    """
    return tuple(
        Layer(w=weight_gradient(h_k, delta_k).T, b=jnp.sum(delta_k, axis=0))
        for h_k, delta_k in zip(h, delta, strict=True)
    )


def weight_gradient(h: jax.Array, delta: jax.Array) -> jax.Array:
    """One layer's `δ_kᵀ h_{k−1}`, `[n_k, n_{k−1}]`, the transpose of ∂/∂W_k.

    On CPU `h.T @ δ` can be twice as slow as `δ.T @ h`, and XLA rewrites `(δ.T @ h).T`
    into it. This is avoided where a layer narrows, so that the result is cheap to
    transpose, and the product is large: there the examples are split into a few chunks
    of equal size, and the products of the chunks are added. Equal chunks need no copy.
    """
    d = delta.astype(h.dtype)
    n, n_out, n_in = h.shape[0], d.shape[1], h.shape[1]
    chunks = next((chunks for chunks in (2, 3, 5, 7) if n % chunks == 0), 1)
    narrows = 1 < n_out < n_in
    if narrows and chunks > 1 and n * n_out * n_in >= _LARGE_PRODUCT:
        d, h = d.reshape(chunks, -1, n_out), h.reshape(chunks, -1, n_in)
        return jnp.sum(matmul(d.swapaxes(1, 2), h), axis=0)
    return matmul(d.T, h)


class Batch(NamedTuple):
    """The checked arguments of a loss Σ_i c_i ℓ_i over examples (x_i, y_i)."""

    x: jax.Array
    y: jax.Array
    c: jax.Array
    pos_weight: jax.Array


def check_batch(
    params: Any, x: Any, y: Any, sample_weight: Any, pos_weight: Any, reduction: Any
) -> Batch:
    """Checks the arguments of a loss, as `value_and_grad` documents them."""
    x = _validate.features(x, params)
    n, outputs = x.shape[0], params[-1].w.shape[1]
    dtype = _validate.accumulation_dtype(x.dtype)
    y = _validate.labels(y, (n, outputs), dtype)
    p = _validate.pos_weight(pos_weight, outputs, dtype)
    _validate.reduction(reduction)
    if sample_weight is None:
        c = jnp.full(n, 1 / n if reduction == "mean" else 1, dtype)
    else:
        s = _validate.sample_weight(sample_weight, n, dtype)
        c = s / jnp.sum(s) if reduction == "mean" else s
    return Batch(x, y, c, p)


def _weighted_sum(c: jax.Array, ell: jax.Array) -> jax.Array:
    return jnp.sum(weighted(c, jnp.sum(ell, axis=1)))


@functools.partial(jax.jit, static_argnames=("reduction", "block_size"))
def value_and_grad(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    reduction: str = "mean",
    block_size: int | str | None = "auto",
) -> tuple[jax.Array, Params]:
    r"""The loss of a batch and its hand-derived gradient with respect to params.

    .. math::
      \sum_i c_i \ell_i, \qquad
      \nabla_{W_k} = h_{k-1}^\top \mathrm{diag}(c)\, \delta_k, \qquad
      \nabla_{b_k} = \sum_i c_i\, \delta_{k,i}

    with :math:`c_i = s_i / \sum s` for the mean and :math:`s_i` for the sum.

    Args:
      params: A tuple of `Layer`, all of the same dtype: bfloat16, float32 or float64.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      sample_weight: Weights s >= 0 of the examples, `[N]`; None is all ones. Examples
        of weight 0 are ignored, even if their loss is infinite. The mean is NaN if all
        weights are 0.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      reduction: "mean" or "sum" over examples; outputs are always summed.
      block_size: The largest number of examples per block. Temporary memory grows with
        it and not with N; the result differs only by rounding. None processes all
        examples at once; "auto" chooses from the shapes.

    Returns:
      The loss in nats, a scalar in the accumulation dtype (float32 for bfloat16), and
      the gradient, a pytree with the structure, shapes and dtype of params.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or an option is unknown. Nothing is broadcast.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> x, y = jnp.ones((8, 2)), jnp.ones((8, 1))
      >>> value, grads = jaxbce.value_and_grad(params, x, y)
      >>> jax.tree.map(jnp.shape, grads)
      (Layer(w=(2, 3), b=(3,)), Layer(w=(3, 1), b=(1,)))

    References:
      Rumelhart, Hinton, Williams, Learning representations by back-propagating
      errors, Nature 323, 1986.
    """
    batch = check_batch(params, x, y, sample_weight, pos_weight, reduction)
    size = examples_per_block(block_size, params, x.shape[0])
    (value, grads), _ = _accumulate(size, params, batch)
    return value, jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), grads, params)


def _accumulate(
    block_size: int,
    params: Params,
    batch: Batch,
    *,
    with_x: bool = False,
    with_logits: bool = False,
) -> tuple[tuple[jax.Array, Params], dict[str, jax.Array]]:
    """Σ c ℓ and its gradient, in blocks; optionally ∂/∂X and the logits."""
    p = batch.pos_weight

    def block(c: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        activations = forward(params, x)
        ell = bce_with_logits(activations.a[-1], y, pos_weight=p)
        delta = deltas(params, activations, y, sample_weight=c, pos_weight=p)
        grads = contract(activations.h[:-1], delta)
        per_example = {}
        if with_x:
            w = params[0].w
            per_example["x"] = matmul(delta[0].astype(w.dtype), w.T)  # [N, n_0]
        if with_logits:
            per_example["logits"] = activations.a[-1]
        return (_weighted_sum(c, ell), grads), per_example

    return sum_over_blocks(block, batch.c, (batch.x, batch.y), block_size)


def grad(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    reduction: str = "mean",
    block_size: int | str | None = "auto",
) -> Params:
    """The hand-derived gradient of `loss` alone; see `value_and_grad`."""
    return value_and_grad(
        params,
        x,
        y,
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        reduction=reduction,
        block_size=block_size,
    )[1]


@functools.partial(jax.jit, static_argnames=("reduction", "block_size"))
def loss(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    reduction: str = "mean",
    block_size: int | str | None = "auto",
) -> jax.Array:
    """The loss of a batch, with the hand-derived gradient as its derivative in JAX.

    `jax.grad`, `jax.jvp`, `jax.hessian` and code built on them (such as optax's line
    searches) call `deltas` and `contract` when they differentiate this function with
    respect to params, x, y or either weight. Higher-order derivatives differentiate
    those functions, and stay accurate in the tails.

    The arguments, errors and value are those of `value_and_grad`.

    Returns:
      The loss in nats, a scalar in the accumulation dtype (float32 for bfloat16).

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> x, y = jnp.ones((8, 2)), jnp.ones((8, 1))
      >>> grads = jax.grad(jaxbce.loss)(params, x, y)
      >>> by_hand = jaxbce.grad(params, x, y)
      >>> all(jax.tree.leaves(jax.tree.map(jnp.array_equal, grads, by_hand)))
      True
    """
    batch = check_batch(params, x, y, sample_weight, pos_weight, reduction)
    size = examples_per_block(block_size, params, x.shape[0])
    return _loss(size, params, batch)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(block_size: int, params: Params, batch: Batch) -> jax.Array:
    p = batch.pos_weight

    def block(c: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
        a = forward(params, x).a[-1]
        return _weighted_sum(c, bce_with_logits(a, y, pos_weight=p)), None

    return sum_over_blocks(block, batch.c, (batch.x, batch.y), block_size)[0]


@functools.partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(
    block_size: int, primals: tuple[Params, Batch], tangents: tuple[Params, Batch]
) -> tuple[jax.Array, jax.Array]:
    """The inner product of the hand-derived gradient and the tangents.

    The tangent of an argument that is not differentiated is a symbolic zero, and the
    gradient with respect to it is not computed.
    """
    params, batch = primals
    params_dot, dot = tangents
    with_x = _nonzero(dot.x)
    with_logits = any(map(_nonzero, (dot.y, dot.c, dot.pos_weight)))
    (value, grads), per_example = _accumulate(
        block_size, params, batch, with_x=with_x, with_logits=with_logits
    )
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(params_dot), strict=True))
    if with_x:
        pairs.append((per_example["x"], dot.x))
    if with_logits:
        a, y, p = per_example["logits"], batch.y, batch.pos_weight
        c = batch.c[:, None]
        dy = jnp.broadcast_to(p, a.shape) * softplus(-a) - softplus(a)
        dy = weighted(c, dy)  # [N, n_L]
        dc = jnp.sum(bce_with_logits(a, y, pos_weight=p), axis=1)  # [N]
        dp = weighted(c, weighted(y, softplus(-a)))  # [N, n_L]
        dp = jnp.sum(dp, axis=0) if p.ndim else jnp.sum(dp)
        pairs += [(dy, dot.y), (dc, dot.c), (dp, dot.pos_weight)]
    return value, sum(
        (_inner(g, t) for g, t in pairs if _nonzero(t)), start=jnp.zeros_like(value)
    )


def _nonzero(tangent: Any) -> bool:
    return not isinstance(tangent, SymbolicZero)


def _inner(gradient: jax.Array, tangent: jax.Array) -> jax.Array:
    return jnp.sum(gradient * tangent.astype(gradient.dtype))


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


@jax.jit
def chain_rule(params: Params, x: jax.Array, y: jax.Array) -> ChainRule:
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
