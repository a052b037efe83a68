r"""Per-example gradients, their norms, products and clipped sums.

The gradient of example i is that of its own loss, `s_i Σ_o ℓ_io`:

    G_i = { h_{k−1,i} ⊗ δ_{k,i}, δ_{k,i} }_k

The norm of an outer product of two vectors is the product of their norms, and the inner
product of two outer products is the product of the vectors' inner products. Hence

    ‖G_i‖² = Σ_k (1 + ‖h_{k−1,i}‖²) ‖δ_{k,i}‖²
    ⟨G_i, G_j⟩ = Σ_k (1 + h_{k−1,i}·h_{k−1,j}) (δ_{k,i}·δ_{k,j})

where the 1 comes from the bias. A sum of rescaled `G_i` is a contraction with rescaled
error signals. Only `grads` stores per-example gradients in memory.

An example of weight 0, or whose δ_L is 0, has a gradient of exactly 0, whatever its
features: its layer inputs that are not finite are replaced by 0, since 0 · inf is NaN.
If δ_L is not 0, layer inputs that are not finite make the result not finite.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbce import _validate, gradients
from jaxbce._blocks import examples_per_block, sum_over_blocks
from jaxbce._jit import jit
from jaxbce._layouts import drop_nonfinite, matmul, replicate
from jaxbce.gradients import check_batch
from jaxbce.losses import bce_with_logits
from jaxbce.network import Layer, Params, forward


class _Examples(NamedTuple):
    """Layer inputs and error signals of some examples, `δ_k = scale · scaled_deltas_k`.

    All δ_k are linear in δ_L, so the largest entry of δ_L can be factored out. Then the
    squares of the scaled deltas do not underflow, however small the gradient of a
    saturated example is.
    """

    logits: jax.Array  # [N, n_L]
    h: tuple[jax.Array, ...]  # (h_0, ..., h_{L-1}), each [N, n_k]
    scale: jax.Array  # [N], the largest |δ_L| of each example
    scaled_deltas: tuple[jax.Array, ...]  # each [N, n_k]

    def norms(self) -> jax.Array:
        """`‖G_i‖`, `[N]`."""
        squared = jnp.zeros_like(self.scale)
        for h, d in zip(self.h, self.scaled_deltas, strict=True):
            factor, square = 1 + _squared_norm(h), _squared_norm(d)
            # Squares of a finite h may overflow, and 0 · inf is NaN.
            unused = (square == 0) & jnp.isinf(factor)
            squared += jnp.where(unused, 0, factor * square)
        return self.scale * jnp.sqrt(jnp.where(self.scale == 0, 1, squared))

    def weighted_sum(self, factors: jax.Array) -> Params:
        """`Σ_i factors_i G_i / scale_i`, for factors `[N]`."""
        factors = factors[:, None]
        weighted_deltas = tuple(
            jnp.where(factors == 0, 0, factors * d) for d in self.scaled_deltas
        )
        return gradients.contract(self.finite_h(), weighted_deltas)

    def finite_h(self) -> tuple[jax.Array, ...]:
        """`h`, with 0 for what is not finite in examples whose δ_L is 0."""
        return tuple(drop_nonfinite(self.scale == 0, h_k) for h_k in self.h)


def _examples(
    params: Params, x: jax.Array, y: jax.Array, s: jax.Array, pos_weight: jax.Array
) -> _Examples:
    activations = forward(params, x)
    deltas = gradients.deltas(
        params, activations, y, sample_weight=s, pos_weight=pos_weight
    )
    delta = drop_nonfinite(s == 0, deltas[-1])  # [N, n_L]
    scale = jnp.max(jnp.abs(delta), axis=1)  # [N]
    scaled_delta = delta / jnp.where(scale == 0, 1, scale)[:, None]  # [N, n_L]
    scaled_deltas = gradients.pull_back(params, activations, scaled_delta)
    return _Examples(activations.a[-1], activations.h[:-1], scale, scaled_deltas)


def _squared_norm(t: jax.Array) -> jax.Array:
    """The squared norm of each row, in the accumulation dtype."""
    return jnp.sum(jnp.square(t.astype(_validate.accumulation_dtype(t.dtype))), 1)


@jit()
def grads(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
) -> Params:
    """The gradient of each example's own loss, `G_i`.

    The result takes N times the memory of params. The other functions of this module
    compute norms, inner products and clipped sums without it.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      sample_weight: Factors s of the examples' losses, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.

    Returns:
      A pytree like params with leaves `[N, ...]`, in the accumulation dtype. Its sum
      over examples is the gradient of the summed loss.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match; nothing is broadcast.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> x, y = jnp.ones((8, 2)), jnp.ones((8, 1))
      >>> jax.tree.map(jnp.shape, jaxbce.per_example.grads(params, x, y))
      (Layer(w=(8, 2, 3), b=(8, 3)), Layer(w=(8, 3, 1), b=(8, 1)))
    """
    batch = check_batch(params, x, y, sample_weight, pos_weight, "sum")
    examples = _examples(params, batch.x, batch.y, batch.c, batch.pos_weight)
    deltas = [examples.scale[:, None] * d for d in examples.scaled_deltas]
    return tuple(
        Layer(w=h_k.astype(d.dtype)[:, :, None] * d[:, None, :], b=d)
        for h_k, d in zip(examples.finite_h(), deltas, strict=True)
    )


@jit(static_argnames=("block_size",))
def norms(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    block_size: int | Literal["auto"] | None = "auto",
) -> jax.Array:
    r"""The Euclidean norm of each example's gradient.

    .. math::
      \|G_i\|^2 = \sum_k (1 + \|h_{k-1,i}\|^2)\, \|\delta_{k,i}\|^2

    The cost is that of the forward and backward pass alone, without the products for
    weight gradients. The relative error of a norm is small, however small the norm is,
    as long as δ_L is not subnormal. The norm is exactly 0, whatever the features, where
    the weight is 0 or δ_L is 0 (as for an infinite logit that agrees with its label).
    Otherwise it is infinite or NaN where the square of a layer input overflows or is
    NaN, unless no unit of the next layer is active.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      sample_weight: Factors s of the examples' losses, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: Maximum examples per block; see `jaxbce.value_and_grad`.

    Returns:
      Norms `[N]`, in the accumulation dtype.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or block_size is invalid.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((2, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[0.0, 0.0], [2.0, 2.0]]), jnp.ones((2, 1))
      >>> jaxbce.per_example.norms(params, x, y).tolist()  # ½ √(1 + ‖x‖²)
      [0.5, 1.5]

    References:
      Goodfellow, Efficient Per-Example Gradient Computations, 2015, arXiv:1510.01799.
    """
    batch = check_batch(params, x, y, sample_weight, pos_weight, "sum")

    def block(s: jax.Array, x: jax.Array, y: jax.Array) -> tuple[tuple, jax.Array]:
        return (), _examples(params, x, y, s, batch.pos_weight).norms()

    size = examples_per_block(block_size, params, batch.x.shape[0])
    return sum_over_blocks(block, batch.c, (batch.x, batch.y), size)[1]


@jit(static_argnames=("block_size",))
def inner_products(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    x2: ArrayLike,
    y2: ArrayLike,
    *,
    pos_weight: ArrayLike = 1.0,
    block_size: int | Literal["auto"] | None = "auto",
) -> jax.Array:
    r"""Inner products between gradients of two sets of examples (Grad-Dot).

    .. math::
      \langle G_i, G_j \rangle = \sum_k (1 + h_{k-1,i} \cdot h_{k-1,j})\,
      (\delta_{k,i} \cdot \delta_{k,j})

    To first order, a gradient step with learning rate η on example i changes the loss
    of example j by −η times this. The literature calls it Grad-Dot. TracIn is the sum
    over checkpoints, weighted by their learning rates. For checkpoints stacked along a
    leading axis it is `jnp.tensordot(rates, jax.vmap(inner_products, (0, None, None,
    None, None))(stacked, x, y, x2, y2), 1)`.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      x2: Features `[M, n_0]`.
      y2: Labels `[M, n_L]`.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: Maximum examples of x per block; see `jaxbce.value_and_grad`.

    Returns:
      `[N, M]`, in the accumulation dtype. If x2 is x and y2 is y, the diagonal
      contains the squared norms.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or block_size is invalid.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((2, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[0.0, 0.0], [2.0, 2.0]]), jnp.ones((2, 1))
      >>> jaxbce.per_example.inner_products(params, x, y, x, y).tolist()
      [[0.25, 0.25], [0.25, 2.25]]

    References:
      Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent,
      2020, arXiv:2002.08484.
    """
    batch = check_batch(params, x, y, None, pos_weight, "sum")
    p = batch.pos_weight
    x2 = _validate.features(x2, params, "x2")
    shape = (x2.shape[0], batch.y.shape[1])
    y2 = _validate.labels(y2, shape, batch.y.dtype, name="y2")
    x2, y2 = replicate(x2), replicate(y2)
    right = _examples(params, x2, y2, jnp.ones(shape[:1], y2.dtype), p)

    def block(s: jax.Array, x: jax.Array, y: jax.Array) -> tuple[tuple, jax.Array]:
        left = _examples(params, x, y, s, p)
        total = sum(
            (1 + matmul(h, h2.T)) * matmul(d, d2.T)
            for h, h2, d, d2 in zip(
                left.h, right.h, left.scaled_deltas, right.scaled_deltas, strict=True
            )
        )
        zero = (left.scale == 0)[:, None] | (right.scale == 0)[None, :]  # [B, M]
        scale = left.scale[:, None] * right.scale[None, :]
        return (), scale * jnp.where(zero, 0, total)

    size = examples_per_block(block_size, params, batch.x.shape[0])
    return sum_over_blocks(block, batch.c, (batch.x, batch.y), size)[1]


class Clipped(NamedTuple):
    """A loss, and a gradient with each example's contribution clipped.

    Attributes:
      value: The loss, as returned by `jaxbce.value_and_grad`. It is not clipped.
      grads: The sum or mean of the clipped per-example gradients, like params.
      norms: `‖G_i‖` before clipping, `[N]`, in the accumulation dtype.
      fraction_clipped: The fraction of the examples of weight > 0 whose norm exceeds
        max_norm, a scalar; NaN if all weights are 0.
    """

    value: jax.Array
    grads: Params
    norms: jax.Array
    fraction_clipped: jax.Array


def clipped_value_and_grad(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    max_norm: ArrayLike,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    block_size: int | Literal["auto"] | None = "auto",
) -> Clipped:
    r"""The loss, and the gradient with each example's contribution clipped.

    .. math::
      \frac1D \sum_i \min\!\left(1, \frac{C}{\|G_i\|}\right) G_i, \qquad
      D = 1 \text{ (sum)},\ \sum_i s_i \text{ (mean)}

    The weight of an example is part of its loss, and so of :math:`G_i`. With "sum",
    removing an example, or giving it weight 0, changes the gradient by at most max_norm
    in the Euclidean norm, up to rounding. This is the sensitivity that differential
    privacy needs. It does not hold for "mean", since D changes too. For a private mean,
    divide the sum by a number that does not depend on the data, such as the expected
    batch size.

    An example of weight 0, or whose δ_L is 0, contributes exactly nothing to the
    gradient, whatever its features. Otherwise layer inputs that are not finite make the
    gradient not finite; an example of infinite norm contributes 0 if they are finite.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      max_norm: The largest norm C >= 0, a scalar. With inf nothing is clipped, and the
        gradient is that of `jaxbce.value_and_grad` up to rounding. With 0 it is 0.
        Gradients of norm 0 stay 0.
      sample_weight: Factors s of the examples' losses, `[N]`; None is all ones.
        Examples of weight 0 are ignored, whatever their features and labels, so they
        can pad a batch.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      reduction: "mean" or "sum" over examples.
      block_size: Maximum examples per block; see `jaxbce.value_and_grad`.

    Returns:
      A `Clipped`.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, an option is unknown, or max_norm is negative.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((2, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[0.0, 0.0], [2.0, 2.0]]), jnp.ones((2, 1))
      >>> clipped = jaxbce.per_example.clipped_value_and_grad(
      ...     params, x, y, max_norm=0.75)
      >>> clipped.norms.tolist(), float(clipped.fraction_clipped)
      ([0.5, 1.5], 0.5)

    References:
      Abadi et al., Deep Learning with Differential Privacy, 2016, arXiv:1607.00133.
    """
    _validate.scalar("max_norm", max_norm, allow_zero=True)
    return _clipped(
        params, x, y, max_norm, sample_weight, pos_weight, reduction, block_size
    )


@jit(static_argnames=("reduction", "block_size"))
def _clipped(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    max_norm: ArrayLike,
    sample_weight: ArrayLike | None,
    pos_weight: ArrayLike,
    reduction: Literal["mean", "sum"],
    block_size: int | Literal["auto"] | None,
) -> Clipped:
    _validate.reduction(reduction)
    batch = check_batch(params, x, y, sample_weight, pos_weight, "sum")
    p, s = batch.pos_weight, batch.c
    max_norm = jnp.asarray(max_norm, s.dtype)
    divisor = jnp.sum(s) if reduction == "mean" else jnp.ones((), s.dtype)

    def block(s: jax.Array, x: jax.Array, y: jax.Array) -> tuple:
        examples = _examples(params, x, y, s, p)
        norms = examples.norms()  # [B]
        kept = norms <= max_norm  # [B]; a NaN norm makes the result NaN
        clipping = jnp.where(kept, 1, max_norm / jnp.where(kept, 1, norms))
        grads = examples.weighted_sum(examples.scale * clipping / divisor)
        ell = bce_with_logits(examples.logits, y, pos_weight=p)  # [B, n_L]
        ell = jnp.sum(drop_nonfinite(s == 0, ell), axis=1)
        return (jnp.sum(s / divisor * ell), grads), norms

    size = examples_per_block(block_size, params, s.shape[0])
    (value, grads), norms = sum_over_blocks(block, s, (batch.x, batch.y), size)
    counted = s > 0  # [N]
    clipped = jnp.sum(counted & (norms > max_norm), dtype=s.dtype)
    return Clipped(
        value=value,
        grads=gradients.cast_like(grads, params),
        norms=norms,
        fraction_clipped=clipped / jnp.sum(counted, dtype=s.dtype),
    )


class Scores(NamedTuple):
    """Difficulty scores of the examples, each `[N]`, in the accumulation dtype.

    Attributes:
      el2n: `‖δ_{L,i}‖`, the norm of the error ŷ − y, accurate in the tails.
      grand: `‖G_i‖`, the norm of the example's gradient.
      input_norm: `‖x_i‖`, a control that ignores the label. A score that is no better
        at a task than this one only detects large inputs.
    """

    el2n: jax.Array
    grand: jax.Array
    input_norm: jax.Array


@jit(static_argnames=("block_size",))
def scores(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    pos_weight: ArrayLike = 1.0,
    block_size: int | Literal["auto"] | None = "auto",
) -> Scores:
    """EL2N and GraNd scores of each example, and its input norm as a control.

    Both scores were proposed as means over several networks early in training.
    `jax.vmap` over stacked params returns the scores of each network, `[networks, N]`.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: Maximum examples per block; see `jaxbce.value_and_grad`.

    Returns:
      `Scores`.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or block_size is invalid.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((2, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[0.0, 0.0], [3.0, 4.0]]), jnp.ones((2, 1))
      >>> scores = jaxbce.per_example.scores(params, x, y)
      >>> scores.el2n.tolist(), scores.input_norm.tolist()
      ([0.5, 0.5], [0.0, 5.0])

    References:
      Paul, Ganguli, Dziugaite, Deep Learning on a Data Diet, 2021, arXiv:2107.07075.
    """
    batch = check_batch(params, x, y, None, pos_weight, "sum")

    def block(s: jax.Array, x: jax.Array, y: jax.Array) -> tuple[tuple, Scores]:
        examples = _examples(params, x, y, s, batch.pos_weight)
        scaled_delta = examples.scaled_deltas[-1]
        return (), Scores(
            el2n=examples.scale * jnp.sqrt(_squared_norm(scaled_delta)),
            grand=examples.norms(),
            input_norm=jnp.sqrt(_squared_norm(x)),
        )

    size = examples_per_block(block_size, params, batch.x.shape[0])
    return sum_over_blocks(block, batch.c, (batch.x, batch.y), size)[1]


class NoiseScale(NamedTuple):
    """The gradient noise scale, and the two estimates whose ratio it is.

    Attributes:
      scale: `variance / squared_norm`, a number of examples. It is inf if squared_norm
        is not positive, and NaN if the squares of all gradients are 0 or underflow.
      variance: Unbiased estimate of the trace of the covariance of G_i, >= 0.
      squared_norm: Unbiased estimate of the squared norm of the mean of G_i. It may be
        negative if the noise dominates the gradient. For several batches, average this
        and the variance before dividing.
    """

    scale: jax.Array
    variance: jax.Array
    squared_norm: jax.Array


@jit(static_argnames=("block_size",))
def noise_scale(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    pos_weight: ArrayLike = 1.0,
    block_size: int | Literal["auto"] | None = "auto",
) -> NoiseScale:
    r"""The batch size at which the noise of a gradient is as large as the gradient.

    .. math::
      V = \frac{N}{N-1} \left(\overline{\|G_i\|^2} - \|\bar G\|^2\right), \qquad
      S = \|\bar G\|^2 - \frac{V}{N}, \qquad \text{scale} = V / S

    For smaller batches, doubling the batch size helps almost as much as doubling the
    number of steps. For larger batches it hardly helps.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 2; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: Maximum examples per block; see `jaxbce.value_and_grad`.

    Returns:
      A `NoiseScale`, in the accumulation dtype.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, N is 1, or block_size is invalid.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[1.0], [3.0]]), jnp.ones((2, 1))
      >>> float(jaxbce.per_example.noise_scale(params, x, y).variance)
      0.5

    References:
      McCandlish et al., An Empirical Model of Large-Batch Training, 2018,
      arXiv:1812.06162, appendix A.
    """
    batch = check_batch(params, x, y, None, pos_weight, "sum")
    n = batch.x.shape[0]
    if isinstance(n, int) and n < 2:
        raise ValueError(f"expected x of shape [N, n_0], N >= 2, got {batch.x.shape}")
    count = jnp.asarray(n, batch.c.dtype)  # n is symbolic in an exported program

    def block(s: jax.Array, x: jax.Array, y: jax.Array) -> tuple:
        examples = _examples(params, x, y, s, batch.pos_weight)
        return examples.weighted_sum(examples.scale / count), examples.norms()

    size = examples_per_block(block_size, params, n)
    mean, norms = sum_over_blocks(block, batch.c, (batch.x, batch.y), size)
    biased = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(mean))
    variance = jnp.maximum(jnp.mean(jnp.square(norms)) - biased, 0)
    variance *= count / (count - 1)
    squared_norm = biased - variance / count
    infinite = (squared_norm <= 0) & (variance > 0)
    scale = jnp.where(infinite, jnp.inf, variance / squared_norm)
    return NoiseScale(scale, variance, squared_norm)
