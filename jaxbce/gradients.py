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
`value_and_grad`, `grad`, the derivative rule of `loss` and the training loops of `fit`
and `sweep` all use these two functions. Both are written over a layout (see
`_layouts.py`), with examples as rows or as columns.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxbce import _validate
from jaxbce._blocks import BlockSize, examples_per_block, sum_over_blocks
from jaxbce._jit import jit
from jaxbce._layouts import ROWS, Layout, drop_nonfinite, shard
from jaxbce.losses import (
    elementwise,
    label_weights,
    output_delta,
    softplus,
    weighted,
)
from jaxbce.network import Activations, Layer, Params, propagate


@jit()
def deltas(
    params: Params,
    activations: Activations,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
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
    c = jnp.ones((), a_last.dtype)
    if sample_weight is not None:
        c = _validate.sample_weight(sample_weight, y.shape[0], a_last.dtype)[:, None]
    positive, negative = label_weights(y, p)  # [N, n_L]
    delta = output_delta(a_last, c * positive, c * negative)  # [N, n_L]
    return pull_back(params, activations, delta)


def pull_back(
    params: Params,
    activations: Activations,
    delta: jax.Array,
    layout: Layout = ROWS,
) -> tuple[jax.Array, ...]:
    """Step 2 of the derivation: from any δ_L `[N, n_L]` to `(δ_1, ..., δ_L)`.

    The result is linear in δ_L. For δ_L = 1 it contains the derivatives of the logits.
    """
    result = [delta]
    for k in range(len(params) - 1, 0, -1):
        back = layout.back(delta, params[k].w)  # δ_{k+1} W_{k+1}ᵀ, [N, n_k]
        masked = jnp.where(activations.h[k] > 0, back, 0)  # same as a_k > 0
        delta = masked.astype(delta.dtype)  # [N, n_k]
        result.append(delta)
    return tuple(reversed(result))


def contract(
    h: tuple[jax.Array, ...], delta: tuple[jax.Array, ...], layout: Layout = ROWS
) -> Params:
    """Step 3, the sum of per-example gradients: `h_{k−1}ᵀ δ_k` and `Σ_i δ_{k,i}`.

    Args:
      h: Layer inputs `(h_0, ..., h_{L-1})`, each `[N, n_k]`.
      delta: `(δ_1, ..., δ_L)`, each `[N, n_k]`, with the examples' weights applied.
      layout: The layout of both and of the result.

    Returns:
      One `Layer` per k, in the accumulation dtype.
    """
    layers = enumerate(zip(h, delta, strict=True), start=1)
    return tuple(
        Layer(*layout.gradient(k, h_k, delta_k)) for k, (h_k, delta_k) in layers
    )


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
    is_mean = reduction == "mean"
    if sample_weight is None:
        c = jnp.full(n, 1 / n if is_mean else 1, dtype)
        return Batch(x, y, shard(c, like=x), p)
    s = shard(_validate.sample_weight(sample_weight, n, dtype), like=x)
    s = rescale(s) if is_mean else s
    c = s / jnp.sum(s) if is_mean else s
    x, y = drop_nonfinite(s == 0, x), drop_nonfinite(s == 0, y)
    return Batch(x, y, c, p)


def rescale(s: jax.Array) -> jax.Array:
    """Weights times a power of two that keeps their sum and its inverse in range."""
    largest = jnp.max(s)
    factor = jnp.where(largest > 2.0**64, 2.0**-64, 1.0)
    factor = jnp.where(largest < 2.0**-64, 2.0**64, factor)
    return s * factor.astype(s.dtype)


@jit(static_argnames=("reduction", "block_size"))
def value_and_grad(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    block_size: int | Literal["auto"] | None = "auto",
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
        of weight 0 are ignored, even if their loss is infinite or their label is NaN.
        The mean is NaN if all weights are 0, or so small that XLA flushes them to 0
        (below 1.2e-38).
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      reduction: "mean" or "sum" over examples; outputs are always summed.
      block_size: The largest number of examples per block. Temporary memory grows with
        it and not with N; the result differs only by rounding. None processes all
        examples at once; "auto" chooses from the shapes. Examples that are sharded
        over explicit axes of a mesh are divided into blocks on each device; on a mesh
        with automatic axes, each device processes its examples at once.

    Returns:
      The loss in nats, a scalar in the accumulation dtype (float32 for bfloat16), and
      the gradient, a pytree with the structure, shapes and dtype of params. Labels
      outside [0, 1] and negative weights, which are not looked for, give a result
      without meaning.

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
    size = examples_per_block(block_size, params, batch.x.shape[0])
    total, _ = accumulate(params, batch, Form(size, sample_weight is not None))
    return total.value, cast_like(total.grads, params)


class Form(NamedTuple):
    """Static options of the loss of a batch.

    Attributes:
      block_size: The largest number of examples per block.
      is_weighted: Whether examples may have weight 0, so that what is not finite in
        their activations must be dropped. Otherwise the only examples of weight 0 are
        those that a block or a short batch repeats.
      layout: The layout of params and of the gradient.
    """

    block_size: BlockSize
    is_weighted: bool
    layout: Layout = ROWS


class Objective(NamedTuple):
    """The loss of a batch, Σ c ℓ, and its gradient.

    Attributes:
      value: The loss, a scalar in the accumulation dtype.
      linear_part: The piecewise-linear part of the loss, without exponentials. The
        remainder is bounded, so the loss is finite exactly if this part is.
      grads: The gradient, like params but in the accumulation dtype.
    """

    value: jax.Array
    linear_part: jax.Array
    grads: Params


def accumulate(
    params: Params,
    batch: Batch,
    form: Form,
    *,
    with_x: bool = False,
    with_logits: bool = False,
) -> tuple[Objective, dict[str, jax.Array]]:
    """The loss Σ c ℓ and its gradient, in blocks; optionally ∂/∂X and the logits.

    Args:
      params: Parameters in the layout.
      batch: Checked arguments, with examples as rows; features as `layout.pad` returns
        them.
      form: How to compute it.
      with_x: Whether to return ∂/∂X in the dict, as "x".
      with_logits: Whether to return the logits in the dict, as "logits".
    """
    layout = form.layout

    def block(c: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        activations, positive, negative = _forward(params, x, y, c, batch, form)
        a, c = activations.a[-1], jnp.expand_dims(c, layout.feature_axis)
        delta = output_delta(a, c * positive, c * negative)
        delta = pull_back(params, activations, delta, layout)
        grads = contract(activations.h[:-1], delta, layout)
        per_example = {}
        if with_x:
            x_grad = layout.back(delta[0], params[0].w)  # [N, n_0]
            per_example["x"] = x_grad.astype(a.dtype)
        if with_logits:
            per_example["logits"] = a
        ell = elementwise(a, positive, negative)
        linear = elementwise(a, positive, negative, jax.nn.relu)
        value, linear_part = (_weighted_sum(c, t, layout) for t in (ell, linear))
        return Objective(value, linear_part, grads), per_example

    return sum_over_blocks(block, batch.c, (batch.x, batch.y), form.block_size)


def cast_like(grads: Params, params: Params) -> Params:
    """Gradients in the dtype of the parameters."""
    return jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), grads, params)


def weighted_loss(params: Params, batch: Batch, form: Form) -> jax.Array:
    """The value of `accumulate` alone."""

    def block(c: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
        activations, *labels = _forward(params, x, y, c, batch, form)
        ell = elementwise(activations.a[-1], *labels)
        c = jnp.expand_dims(c, form.layout.feature_axis)
        return _weighted_sum(c, ell, form.layout), None

    return sum_over_blocks(block, batch.c, (batch.x, batch.y), form.block_size)[0]


def _forward(
    params: Params, x: jax.Array, y: jax.Array, c: jax.Array, batch: Batch, form: Form
) -> tuple[Activations, jax.Array, jax.Array]:
    """The forward pass of a block, and the weights of the two terms of its loss."""
    layout, ignored = form.layout, c == 0 if form.is_weighted else None
    activations = propagate(params, layout.arrange(x), layout, ignored)
    positive, negative = label_weights(y, batch.pos_weight)
    return activations, layout.arrange(positive), layout.arrange(negative)


def _weighted_sum(c: jax.Array, ell: jax.Array, layout: Layout) -> jax.Array:
    ell = jnp.sum(ell, axis=layout.feature_axis, keepdims=True)
    return layout.total(weighted(c, ell))


def grad(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    block_size: int | Literal["auto"] | None = "auto",
) -> Params:
    """Computes the hand-derived gradient of the loss of a batch.

    The arguments and errors are those of `value_and_grad`.

    Returns:
      The gradient, a tuple of `Layer` with the shapes and dtypes of params.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> grads = jaxbce.grad(params, jnp.ones((8, 2)), jnp.ones((8, 1)))
      >>> [layer.w.shape for layer in grads]
      [(2, 3), (3, 1)]
    """
    return value_and_grad(
        params,
        x,
        y,
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        reduction=reduction,
        block_size=block_size,
    )[1]


@jit(static_argnames=("reduction", "block_size"))
def loss(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    block_size: int | Literal["auto"] | None = "auto",
) -> jax.Array:
    """The loss of a batch, with the hand-derived gradient as its derivative in JAX.

    `jax.grad`, `jax.jvp`, `jax.hessian` and code built on them (such as optax's line
    searches) call `deltas` and `contract` when they differentiate this function with
    respect to params, x, y or either weight. Higher-order derivatives differentiate
    those functions, and stay accurate in the tails.

    Inside `jax.shard_map`, `jax.grad` of this function with respect to replicated
    params adds the gradients of all devices, as it does for any function. `jaxbce.grad`
    is the gradient of the device's own examples.

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
    size = examples_per_block(block_size, params, batch.x.shape[0])
    return _loss(Form(size, sample_weight is not None), params, batch)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(form: Form, params: Params, batch: Batch) -> jax.Array:
    return weighted_loss(params, batch, form)


@functools.partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(
    form: Form, primals: tuple[Params, Batch], tangents: tuple[Params, Batch]
) -> tuple[jax.Array, jax.Array]:
    """The inner product of the hand-derived gradient and the tangents.

    The tangent of an argument that is not differentiated is a symbolic zero, and the
    gradient with respect to it is not computed.
    """
    params, batch = primals
    params_dot, dot = tangents
    with_x = _nonzero(dot.x)
    with_logits = any(map(_nonzero, (dot.y, dot.c, dot.pos_weight)))
    (value, _, grads), per_example = accumulate(
        params, batch, form, with_x=with_x, with_logits=with_logits
    )
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(params_dot), strict=True))
    if with_x:
        pairs.append((per_example["x"], dot.x))
    if with_logits:
        a, y, p = per_example["logits"], batch.y, batch.pos_weight
        c = batch.c[:, None]
        dy = jnp.broadcast_to(p, a.shape) * softplus(-a) - softplus(a)
        dy = weighted(c, dy)  # [N, n_L]
        dc = jnp.sum(elementwise(a, *label_weights(y, p)), axis=1)  # [N]
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
