r"""Per-example gradients, their norms, products and clipped sums.

The gradient of row i's own loss, `s_i Σ_o ℓ_io`, is what that row adds to the sum:

    G_i = { h_{k−1,i} ⊗ δ_{k,i}, δ_{k,i} }_k

An outer product of two vectors has the product of their norms for its norm, and the
product of their inner products for its inner product with another one. So

    ‖G_i‖² = Σ_k (1 + ‖h_{k−1,i}‖²) ‖δ_{k,i}‖²
    ⟨G_i, G_j⟩ = Σ_k (1 + h_{k−1,i}·h_{k−1,j}) (δ_{k,i}·δ_{k,j})

where the 1 is the bias, and a sum of rescaled `G_i` is the contraction of rescaled
deltas. Nothing here but `grads` holds a per-example gradient in memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbce import _validate
from jaxbce._blocks import rows_per_block, sum_over_blocks
from jaxbce.gradients import contract, deltas, problem, pull_back
from jaxbce.losses import bce_with_logits, weighted
from jaxbce.network import Layer, Params, Trace, forward, matmul


class _Examples(NamedTuple):
    """The two lists of some rows, `δ_k = size · unit_k`.

    The deltas are linear in δ_L, so that its largest entry can be taken out: squares of
    what is left do not underflow, however small a saturated row's gradient is.
    """

    trace: Trace
    size: jax.Array  # [N], the largest |δ_L| of a row
    unit: tuple[jax.Array, ...]  # each [N, n_k]

    def norms(self) -> jax.Array:
        """`‖G_i‖`, `[N]`."""
        squared = sum(
            (1 + _squared_norm(h)) * _squared_norm(unit)
            for h, unit in zip(self.trace.h[:-1], self.unit, strict=True)
        )
        return self.size * jnp.sqrt(squared)


def _examples(
    params: Params, x: jax.Array, y: jax.Array, s: jax.Array, pos_weight: jax.Array
) -> _Examples:
    trace = forward(params, x)
    last = deltas(params, trace, y, sample_weight=s, pos_weight=pos_weight)[-1]
    size = jnp.max(jnp.abs(last), axis=1)  # [N]
    unit = last / jnp.where(size > 0, size, 1)[:, None]  # [N, n_L]
    return _Examples(trace, size, pull_back(params, trace, unit))


def _squared_norm(rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(rows.astype(_validate.accumulation_dtype(rows.dtype))), 1)


@jax.jit
def grads(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
) -> Params:
    """The gradient of every row's own loss, `G_i`.

    It takes N times the memory of params. What can be had without it is had from the
    other functions of this module.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      sample_weight: Factors s of the rows' losses, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.

    Returns:
      A pytree like params, each leaf `[N, ...]`, in the accumulation dtype. Its sum
      over rows is the gradient of the sum.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit; nothing is broadcast.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> x, y = jnp.ones((8, 2)), jnp.ones((8, 1))
      >>> jax.tree.map(jnp.shape, jaxbce.per_example.grads(params, x, y))
      (Layer(w=(8, 2, 3), b=(8, 3)), Layer(w=(8, 3, 1), b=(8, 1)))
    """
    batch = problem(params, x, y, sample_weight, pos_weight, "sum")
    trace = forward(params, batch.x)
    delta = deltas(
        params, trace, batch.y, sample_weight=batch.c, pos_weight=batch.pos_weight
    )
    return tuple(
        Layer(w=h_k.astype(d.dtype)[:, :, None] * d[:, None, :], b=d)
        for h_k, d in zip(trace.h[:-1], delta, strict=True)
    )


@functools.partial(jax.jit, static_argnames="block_size")
def norms(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    block_size: int | str | None = "auto",
) -> jax.Array:
    r"""The Euclidean norm of every row's gradient.

    .. math::
      \|G_i\|^2 = \sum_k (1 + \|h_{k-1,i}\|^2)\, \|\delta_{k,i}\|^2

    It costs a forward and a backward pass without their last products. A norm is
    accurate relative to its own size, however small, as long as δ_L is a normal number;
    it is 0 where δ_L is (a weight of 0, or an infinite logit that agrees with its
    label), and infinite where the square of a layer input overflows. Features are to
    be finite: of a row that has others the norm may be NaN.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      sample_weight: Factors s of the rows' losses, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: The most rows taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      Norms `[N]`, in the accumulation dtype.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, or block_size is not one; nothing is broadcast.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((2, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[0.0, 0.0], [2.0, 2.0]]), jnp.ones((2, 1))
      >>> jaxbce.per_example.norms(params, x, y).tolist()  # ½ √(1 + ‖x‖²)
      [0.5, 1.5]

    References:
      Goodfellow, Efficient Per-Example Gradient Computations, 2015, arXiv:1510.01799.
    """
    batch = problem(params, x, y, sample_weight, pos_weight, "sum")

    def block(s: jax.Array, x: jax.Array, y: jax.Array) -> tuple[tuple, jax.Array]:
        return (), _examples(params, x, y, s, batch.pos_weight).norms()

    rows = rows_per_block(block_size, params, len(batch.c))
    return sum_over_blocks(block, batch.c, (batch.x, batch.y), rows)[1]


@functools.partial(jax.jit, static_argnames="block_size")
def inner_products(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    x2: jax.Array,
    y2: jax.Array,
    *,
    pos_weight: jax.Array | float = 1.0,
    block_size: int | str | None = "auto",
) -> jax.Array:
    r"""Inner products of the gradients of two sets of rows: their influence.

    .. math::
      \langle G_i, G_j \rangle = \sum_k (1 + h_{k-1,i} \cdot h_{k-1,j})\,
      (\delta_{k,i} \cdot \delta_{k,j})

    A gradient step of rate η on row i changes the loss of row j by −η times this, to
    first order. TracIn sums that over checkpoints: with params stacked along a leading
    axis and their rates, it is `jnp.tensordot(rates, jax.vmap(inner_products,
    (0, None, None, None, None))(stacked, x, y, x2, y2), 1)`.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      x2: Features `[M, n_0]`.
      y2: Labels `[M, n_L]`.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: The most rows of x taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      `[N, M]`, in the accumulation dtype; with x2 = x, y2 = y the diagonal is the
      squared norms.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, or block_size is not one; nothing is broadcast.

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
    batch = problem(params, x, y, None, pos_weight, "sum")
    p = batch.pos_weight
    x2 = _validate.features(x2, params, "x2")
    shape = (len(x2), batch.y.shape[1])
    y2 = _validate.labels(y2, shape, batch.y.dtype, name="y2")
    trace2 = forward(params, x2)
    delta2 = deltas(params, trace2, y2, pos_weight=p)

    def block(_: jax.Array, x: jax.Array, y: jax.Array) -> tuple[tuple, jax.Array]:
        trace = forward(params, x)
        delta = deltas(params, trace, y, pos_weight=p)
        layers = zip(trace.h[:-1], trace2.h, delta, delta2, strict=False)
        total = sum((1 + matmul(h, h2.T)) * (d @ d2.T) for h, h2, d, d2 in layers)
        return (), jnp.asarray(total)

    rows = rows_per_block(block_size, params, len(batch.c))
    return sum_over_blocks(block, batch.c, (batch.x, batch.y), rows)[1]


class Clipped(NamedTuple):
    """What `clipped_value_and_grad` returns.

    Attributes:
      value: The loss, as of `jaxbce.value_and_grad`: nothing of it is clipped.
      grads: The sum or mean of clipped per-example gradients, like params.
      norms: `‖G_i‖` before clipping, `[N]`, in the accumulation dtype.
      fraction_clipped: The share of the rows of weight > 0 whose norm is above
        max_norm, a scalar; NaN if there is no such row.
    """

    value: jax.Array
    grads: Params
    norms: jax.Array
    fraction_clipped: jax.Array


def clipped_value_and_grad(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    max_norm: jax.Array | float,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    reduction: str = "mean",
    block_size: int | str | None = "auto",
) -> Clipped:
    r"""The loss, and the gradient with every row's part clipped to a norm.

    .. math::
      \frac1D \sum_i \min\!\left(1, \frac{C}{\|G_i\|}\right) G_i, \qquad
      D = 1 \text{ (sum)},\ \sum_i s_i \text{ (mean)}

    A row's weights are part of its loss, and so of :math:`G_i`. With "sum", leaving a
    row out, or giving it weight 0, changes the result by at most max_norm in the norm,
    up to rounding: the sensitivity that differential privacy asks for. With "mean" it
    would not, as D changes too: for a private mean divide the sum by a number that does
    not depend on the data, such as the expected size of the batch.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      max_norm: The norm C >= 0, a scalar. inf clips nothing, and gives the gradient of
        `jaxbce.value_and_grad` to a rounding; 0 gives a gradient of 0. A row whose norm
        is 0 is left as it is.
      sample_weight: Factors s of the rows' losses, `[N]`; None is all ones. A row of
        weight 0 is as good as not there, which is how a batch is padded.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      reduction: "mean" or "sum" over rows.
      block_size: The most rows taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      A `Clipped`.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, an option is unknown, or max_norm is negative.

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
    _validate.scalar("max_norm", max_norm, zero=True)
    return _clipped(
        params, x, y, max_norm, sample_weight, pos_weight, reduction, block_size
    )


@functools.partial(jax.jit, static_argnames=("reduction", "block_size"))
def _clipped(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    max_norm: jax.Array,
    sample_weight: jax.Array | None,
    pos_weight: jax.Array | float,
    reduction: str,
    block_size: int | str | None,
) -> Clipped:
    _validate.reduction(reduction)
    batch = problem(params, x, y, sample_weight, pos_weight, "sum")
    p, s = batch.pos_weight, batch.c
    most = jnp.asarray(max_norm, s.dtype)
    divisor = jnp.sum(s) if reduction == "mean" else jnp.ones((), s.dtype)

    def block(s: jax.Array, x: jax.Array, y: jax.Array) -> tuple:
        rows = _examples(params, x, y, s, p)
        norms = rows.norms()  # [B]
        kept = jnp.where(norms <= most, 1, most / norms)  # [B]; NaN is not kept
        scale = (rows.size * kept / divisor)[:, None]  # [B, 1]
        grads = contract(rows.trace.h[:-1], tuple(scale * unit for unit in rows.unit))
        ell = jnp.sum(bce_with_logits(rows.trace.a[-1], y, pos_weight=p), axis=1)
        return (jnp.sum(weighted(s / divisor, ell)), grads), norms

    rows = rows_per_block(block_size, params, len(s))
    (value, grads), norms = sum_over_blocks(block, s, (batch.x, batch.y), rows)
    counted = s > 0
    clipped = jnp.sum(counted & (norms > most), dtype=s.dtype)
    return Clipped(
        value=value,
        grads=jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), grads, params),
        norms=norms,
        fraction_clipped=clipped / jnp.sum(counted, dtype=s.dtype),
    )


class Scores(NamedTuple):
    """How much each row pulls at a network, each `[N]`, in the accumulation dtype.

    Attributes:
      el2n: `‖δ_{L,i}‖`, the norm of the error ŷ − y (exact in the tails).
      grand: `‖G_i‖`, the norm of the row's gradient.
      input_norm: `‖x_i‖`, which knows nothing of the label: a score that finds no more
        than it does has found large inputs.
    """

    el2n: jax.Array
    grand: jax.Array
    input_norm: jax.Array


@functools.partial(jax.jit, static_argnames="block_size")
def scores(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    pos_weight: jax.Array | float = 1.0,
    block_size: int | str | None = "auto",
) -> Scores:
    """EL2N and GraNd of every row, and the norm of its input as a control.

    Both were proposed as means over several networks, early in training: `jax.vmap`
    over stacked params gives each network's, as `[networks, N]`.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: The most rows taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      `Scores`.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, or block_size is not one; nothing is broadcast.

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
    batch = problem(params, x, y, None, pos_weight, "sum")

    def block(s: jax.Array, x: jax.Array, y: jax.Array) -> tuple[tuple, Scores]:
        rows = _examples(params, x, y, s, batch.pos_weight)
        return (), Scores(
            el2n=rows.size * jnp.sqrt(_squared_norm(rows.unit[-1])),
            grand=rows.norms(),
            input_norm=jnp.sqrt(_squared_norm(x)),
        )

    rows = rows_per_block(block_size, params, len(batch.c))
    return sum_over_blocks(block, batch.c, (batch.x, batch.y), rows)[1]


class NoiseScale(NamedTuple):
    """The gradient noise scale and the two estimates it is the ratio of; scalars.

    Attributes:
      scale: `variance / squared_norm`, in rows; inf where the latter is not positive,
        NaN where all gradients are 0, or so small that their squares are.
      variance: Unbiased estimate of the trace of the covariance of G_i, >= 0.
      squared_norm: Unbiased estimate of the squared norm of the mean of G_i. It may
        be negative where the gradient is lost in the noise. Over several batches
        average this and the variance, then divide.
    """

    scale: jax.Array
    variance: jax.Array
    squared_norm: jax.Array


@functools.partial(jax.jit, static_argnames="block_size")
def noise_scale(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    pos_weight: jax.Array | float = 1.0,
    block_size: int | str | None = "auto",
) -> NoiseScale:
    r"""The batch size at which the noise of a gradient is as large as the gradient.

    .. math::
      V = \frac{N}{N-1} \left(\overline{\|G_i\|^2} - \|\bar G\|^2\right), \qquad
      S = \|\bar G\|^2 - \frac{V}{N}, \qquad \text{scale} = V / S

    Smaller batches gain from more rows almost as from more steps, larger ones hardly.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 2; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: The most rows taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      A `NoiseScale`, in the accumulation dtype.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, there is one row only, or block_size is not one.

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
    batch = problem(params, x, y, None, pos_weight, "sum")
    n = len(batch.c)
    if n < 2:
        raise ValueError(f"x has shape {batch.x.shape}; at least two rows are accepted")

    def block(s: jax.Array, x: jax.Array, y: jax.Array) -> tuple:
        rows = _examples(params, x, y, s, batch.pos_weight)
        scale = (rows.size / n)[:, None]
        grads = contract(rows.trace.h[:-1], tuple(scale * unit for unit in rows.unit))
        return grads, rows.norms()

    rows = rows_per_block(block_size, params, n)
    mean, norms = sum_over_blocks(block, batch.c, (batch.x, batch.y), rows)
    of_mean = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(mean))
    variance = jnp.maximum(jnp.mean(jnp.square(norms)) - of_mean, 0) * (n / (n - 1))
    squared_norm = of_mean - variance / n
    lost = (squared_norm <= 0) & (variance > 0)
    scale = jnp.where(lost, jnp.inf, variance / squared_norm)
    return NoiseScale(scale, variance, squared_norm)
