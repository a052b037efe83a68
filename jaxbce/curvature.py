r"""Curvature: tangent kernel, Gauss-Newton and Hessian products, evidence.

Let `J_i` be the derivative of example i's logits with respect to the parameters. Its
rows consist of outer products of layer inputs and `E_k = ∂a_L/∂a_k`, which `pull_back`
computes from `E_L = 1`. The tangent kernel is therefore

    Θ_ij = J_i J_jᵀ = Σ_k (1 + h_{k−1,i}·h_{k−1,j}) E_{k,i} E_{k,j}ᵀ

The loss is convex in the logits, with one second derivative per logit:

    S = c ((1−y) + p y) σ(a) σ(−a)

The generalized Gauss-Newton matrix (GGN) is `Jᵀ S J`; for p = 1 it is the Fisher
information. Its nonzero eigenvalues are those of `√S Θ √S`.

A dot denotes the derivative along v = {Ẇ_k, ḃ_k} (Pearlmutter's R-operator):

    ȧ_k = h_{k−1} Ẇ_k + ḃ_k + ḣ_{k−1} W_k        ḣ_k = ȧ_k ⊙ [a_k > 0]
    δ̇_L = S ȧ_L      δ̇_k = (δ̇_{k+1} W_{k+1}ᵀ + δ_{k+1} Ẇ_{k+1}ᵀ) ⊙ [a_k > 0]
    (H v)_k = h_{k−1}ᵀ δ̇_k + ḣ_{k−1}ᵀ δ_k

`pull_back` is linear in δ_L and in each W_k, so its derivative along (v, δ̇_L) has both
terms of δ̇_k. The product GGN·v omits the two terms that contain δ itself.

Examples of weight 0 contribute exactly nothing, whatever their features. For
eigenvalues and evidence, this is also true of examples whose δ_L and S are 0. Other
examples with features that are not finite make the result not finite.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from jaxbce import _validate, gradients
from jaxbce._blocks import (
    BlockSize,
    at_most,
    examples_per_block,
    map_over_blocks,
    sum_over_blocks,
)
from jaxbce._jit import jit
from jaxbce._layouts import ROWS, drop_nonfinite, matmul, replicate, shard
from jaxbce.gradients import Batch, check_batch
from jaxbce.losses import label_weights
from jaxbce.network import Activations, Params, forward, propagate, sigmoid


@jit(static_argnames=("block_size",))
def ntk(
    params: Params,
    x: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    block_size: int | Literal["auto"] | None = "auto",
) -> jax.Array:
    r"""The tangent kernel: inner products of the logits' gradients.

    .. math::
      \Theta_{ij} = \sum_k (1 + h_{k-1,i} \cdot h_{k-1,j})\, E_{k,i} E_{k,j}^\top

    This is the kernel of the finite network at these parameters. Besides the result and
    one more array of its size, memory grows with the number of examples times outputs
    times widths.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      x2: Features `[M, n_0]`; None is x.
      block_size: Maximum examples of x per block; see `jaxbce.value_and_grad`.

    Returns:
      `[N, M]` for one output, `[N, M, n_L, n_L]` for several, in the accumulation
      dtype.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or block_size is invalid.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((2, 1)), b=jnp.zeros(1)),)
      >>> jaxbce.curvature.ntk(params, jnp.array([[0.0, 0.0], [1.0, 2.0]])).tolist()
      [[1.0, 1.0], [1.0, 6.0]]

    References:
      Jacot, Gabriel, Hongler, Neural Tangent Kernel, 2018, arXiv:1806.07572.
    """
    x = _validate.features(x, params)
    x2 = x if x2 is None else _validate.features(x2, params, "x2")
    size = examples_per_block(block_size, params, x.shape[0])
    theta = kernel(params, x, x2, None, size)
    return theta[:, :, 0, 0] if params[-1].w.shape[1] == 1 else theta


def kernel(
    params: Params,
    x: jax.Array,
    x2: jax.Array,
    variances: jax.Array | None,
    block_size: BlockSize,
) -> jax.Array:
    """`J D Jᵀ`, `[N, M, n_L, n_L]`, the tangent kernel if D is the identity.

    Args:
      params: Parameters.
      x: Features `[N, n_0]`.
      x2: Features `[M, n_0]`.
      variances: The entries of D, one for all parameters of a layer, `[K]`; the first
        L − K layers have 0. None is the identity.
      block_size: The largest number of examples of x per block.
    """
    activations2 = forward(params, replicate(x2))
    e2 = _logit_gradients(params, activations2)
    outputs = params[-1].w.shape[1]
    skipped = 0 if variances is None else len(params) - variances.shape[0]

    def block(x: jax.Array) -> jax.Array:
        activations = forward(params, x)
        e = _logit_gradients(params, activations)
        total: Any = 0  # [B, n_L, M, n_L]
        for k in range(skipped, len(params)):
            inputs = 1 + matmul(activations.h[k], activations2.h[k].T)  # [B, M]
            if variances is not None:
                inputs *= variances[k - skipped]
            pairs = jnp.eye(outputs, dtype=inputs.dtype)[None, :, None, :]  # E_L = 1
            if k + 1 < len(params):
                left, right = (t.reshape(-1, t.shape[-1]) for t in (e[k], e2[k]))
                pairs = matmul(left, right.T).reshape(x.shape[0], outputs, -1)
                pairs = pairs.reshape(*pairs.shape[:2], x2.shape[0], outputs)
            total += inputs[:, None, :, None] * pairs
        return total.transpose(0, 2, 1, 3)  # [B, M, n_L, n_L]

    return map_over_blocks(block, (x,), block_size)


def jacobian(
    params: Params, activations: Activations, variances: jax.Array | None
) -> jax.Array:
    """`J √D`, `[N, n_L, P]`, with D as in `kernel` and the P parameters of its layers.

    The parameters are in the order of `ravel_pytree`.
    """
    e = _logit_gradients(params, activations)
    if variances is not None:
        skipped = len(params) - variances.shape[0]
        e = tuple(
            e_k * jnp.sqrt(v) for e_k, v in zip(e[skipped:], variances, strict=True)
        )
    h = activations.h[len(params) - len(e) : -1]

    def gradient(h: tuple[jax.Array, ...], e: tuple[jax.Array, ...]) -> Params:
        one_row = jax.tree.map(lambda t: t[None], (h, e))
        return gradients.contract(*one_row)

    of_each_logit = jax.vmap(jax.vmap(gradient, (None, 0)))(h, e)
    leaves = jax.tree.leaves(of_each_logit)  # each [N, n_L, ...]
    return jnp.concatenate([t.reshape(*t.shape[:2], -1) for t in leaves], axis=2)


def _logit_gradients(params: Params, activations: Activations) -> tuple[jax.Array, ...]:
    """`E_k = ∂a_L/∂a_k`, each `[N, n_L, n_k]`."""
    a = activations.a[-1]
    ones = jnp.eye(a.shape[1], dtype=a.dtype)[:, None, :]  # [n_L, 1, n_L]
    cotangents = jnp.broadcast_to(ones, (a.shape[1], *a.shape))
    back = jax.vmap(
        lambda delta: gradients.pull_back(params, activations, delta), out_axes=1
    )
    return tuple(shard(e_k, like=a) for e_k in back(cotangents))


def derivatives(
    params: Params, activations: Activations, y: jax.Array, c: jax.Array, p: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`δ_L` and `S = c ((1−y) + p y) σ(a) σ(−a)`, each `[N, n_L]`."""
    a = activations.a[-1]
    delta = gradients.deltas(params, activations, y, sample_weight=c, pos_weight=p)[-1]
    s = _label_weights(y, c, p) * sigmoid(a) * sigmoid(-a)
    return drop_nonfinite(c == 0, delta), drop_nonfinite(c == 0, s)


def _label_weights(y: jax.Array, c: jax.Array, p: jax.Array) -> jax.Array:
    """`c ((1−y) + p y)`, `[N, n_L]`."""
    return c[:, None] * sum(label_weights(y, p))


@jit(static_argnames=("reduction", "block_size"))
def hvp(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    v: Params,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    block_size: int | Literal["auto"] | None = "auto",
) -> Params:
    """The Hessian of the loss times a vector, `H v`.

    The second derivative of relu is taken to be 0 everywhere, as in JAX. Examples of
    weight 0 contribute exactly nothing, whatever their features.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      v: A pytree like params.
      sample_weight: Weights s >= 0 of the examples, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      reduction: "mean" or "sum" over examples.
      block_size: Maximum examples per block; see `jaxbce.value_and_grad`.

    Returns:
      A pytree with the structure, shapes and dtype of params.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or an option is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[2.0]]), jnp.array([[1.0]])
      >>> jaxbce.curvature.hvp(params, x, y, params)[0].w.shape
      (1, 1)

    References:
      Pearlmutter, Fast Exact Multiplication by the Hessian, Neural Computation 6(1),
      1994.
    """
    batch = check_batch(params, x, y, sample_weight, pos_weight, reduction)
    v = _validate.vector(v, params)
    size = examples_per_block(block_size, params, batch.x.shape[0])
    return _curvature_vp(params, batch, v, size, residual=True)


@jit(static_argnames=("reduction", "block_size"))
def ggn_vp(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    v: Params,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    block_size: int | Literal["auto"] | None = "auto",
) -> Params:
    """The Gauss-Newton matrix of the loss times a vector, `Jᵀ S J v`.

    The matrix is positive semidefinite. It equals the Hessian if every logit is linear
    in the parameters. For p = 1 it is the Fisher information.

    The arguments, errors and result are those of `hvp`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> v = (jaxbce.Layer(w=jnp.ones((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[2.0]]), jnp.array([[1.0]])
      >>> jaxbce.curvature.ggn_vp(params, x, y, v)[0].w.tolist()  # x² σ(0) σ(0)
      [[1.0]]

    References:
      Schraudolph, Fast Curvature Matrix-Vector Products for Second-Order Gradient
      Descent, Neural Computation 14(7), 2002.
    """
    batch = check_batch(params, x, y, sample_weight, pos_weight, reduction)
    v = _validate.vector(v, params)
    size = examples_per_block(block_size, params, batch.x.shape[0])
    return _curvature_vp(params, batch, v, size, residual=False)


def _curvature_vp(
    params: Params, batch: Batch, v: Params, block_size: BlockSize, *, residual: bool
) -> Params:
    """`GGN v`, or `H v` with the residual terms, which contain δ."""

    def block(c: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Params, tuple]:
        activations = forward(params, x)
        delta, s = derivatives(params, activations, y, c, batch.pos_weight)
        drop = functools.partial(drop_nonfinite, c == 0)
        h = tuple(drop(h_k) for h_k in activations.h[:-1])
        a_dot, h_dot = _push_forward(params, h, v)
        delta_dot = s * drop(a_dot)  # δ̇_L, [N, n_L]

        def pull_back(params: Params, delta: jax.Array) -> tuple[jax.Array, ...]:
            return gradients.pull_back(params, activations, delta)

        if not residual:
            return gradients.contract(h, pull_back(params, delta_dot)), ()
        deltas, deltas_dot = jax.jvp(pull_back, (params, delta), (v, delta_dot))
        first, *grads = gradients.contract(h, deltas_dot)
        residuals = gradients.contract(tuple(drop(t) for t in h_dot), deltas[1:])
        grads = (g._replace(w=g.w + r.w) for g, r in zip(grads, residuals, strict=True))
        return (first, *grads), ()

    total, _ = sum_over_blocks(block, batch.c, (batch.x, batch.y), block_size)
    return gradients.cast_like(total, params)


def _push_forward(
    params: Params, h: tuple[jax.Array, ...], v: Params
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`ȧ_L`, `[N, n_L]`, and `(ḣ_1, ..., ḣ_{L−1})`, each `[N, n_k]`."""
    a_dot, h_dot = [], []
    for k, (layer, (w_dot, b_dot)) in enumerate(zip(params, v, strict=True)):
        dot = matmul(h[k], w_dot)  # [N, n_{k+1}]
        dot += b_dot.astype(dot.dtype)[None, :]
        if k > 0:
            dot += matmul(h_dot[-1], layer.w)
        a_dot.append(dot)
        if k + 1 < len(params):
            h_dot.append(jnp.where(h[k + 1] > 0, dot, 0).astype(layer.w.dtype))
    return a_dot[-1], tuple(h_dot)


@jit(static_argnames=("k", "reduction", "block_size"))
def ggn_eigenvalues(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    k: int | None = None,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    block_size: int | Literal["auto"] | None = "auto",
) -> jax.Array:
    r"""The largest eigenvalues of the Gauss-Newton matrix, in descending order.

    At most `min(P, N n_L)` of the P eigenvalues are nonzero, where P is the number of
    parameters. They are computed from the smaller of two matrices with the same nonzero
    eigenvalues: :math:`\sqrt S \Theta \sqrt S`, `[N n_L, N n_L]`, and the Gauss-Newton
    matrix itself, `[P, P]`. If `k` is given and `5 k < P <= N n_L`, neither matrix is
    formed: LOBPCG finds the eigenvalues from the products of `ggn_vp`, and their second
    derivatives are NaN.

    Examples of weight 0, or whose δ_L and S are 0, contribute exactly nothing, whatever
    their features.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      k: Number of eigenvalues, 1 to `min(P, N n_L)`; None is the maximum.
      sample_weight: Weights s >= 0 of the examples, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      reduction: "mean" or "sum" over examples.
      block_size: Maximum examples per block; see `jaxbce.value_and_grad`.

    Returns:
      Eigenvalues `[k]` >= 0, in the accumulation dtype. Their absolute error is of the
      order of the largest eigenvalue times machine epsilon.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, k is out of range, or an option is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [0.0]])
      >>> jaxbce.curvature.ggn_eigenvalues(params, x, y).tolist()
      [0.25, 0.25]

    References:
      Knyazev, Toward the Optimal Preconditioned Eigensolver, SIAM J. Sci. Comput.
      23(2), 2001.
    """
    batch = check_batch(params, x, y, sample_weight, pos_weight, reduction)
    num_params, num_logits = count_params(params), batch.y.size
    most = min(num_params, num_logits)
    count = most if k is None else _validate.count("k", k)
    if count > most:
        raise ValueError(
            f"expected k to be an integer from 1 to {most}, the most eigenvalues that "
            f"can be nonzero, got {k}"
        )
    batch, _ = drop_saturated(params, forward(params, batch.x), batch)
    size = examples_per_block(block_size, params, batch.x.shape[0])
    if k is None or num_logits < num_params or 5 * count >= num_params:
        gram = smaller_gram(params, batch, None, size)
        return jnp.flip(jnp.linalg.eigvalsh(gram)).clip(0)[:count]
    return _largest_eigenpairs(count, size, params, batch)[0].clip(0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _largest_eigenpairs(
    count: int, block_size: BlockSize, params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """The largest eigenvalues of the GGN and their eigenvectors `[P, k]`, by LOBPCG.

    Each step finds the best approximations in the span of the present ones, of their
    residuals and of the last step. The QR decomposition completes a basis where columns
    are dependent, as the residuals of a matrix of low rank are.
    """
    columns = jax.vmap(_flat_ggn_vp(params, batch, block_size), in_axes=1, out_axes=1)
    size, dtype = count_params(params), batch.c.dtype

    def best_in_span(vectors: jax.Array) -> tuple[jax.Array, ...]:
        basis = jnp.linalg.qr(vectors)[0]
        products = columns(basis)
        values, coordinates = jnp.linalg.eigh(basis.T @ products)
        top = jnp.flip(coordinates[:, -count:], axis=1)
        values = jnp.flip(values[-count:])
        return values, basis @ top, products @ top - basis @ top * values[None, :]

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        i, _, x, residual, last = state
        found = best_in_span(jnp.concatenate([x, residual, last], axis=1))
        return i + 1, *found, found[1] - x @ (x.T @ found[1])

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        i, values, _, residual, _ = state
        rounding = 20 * size * jnp.finfo(dtype).eps * values
        return (i < 100) & jnp.any(jnp.linalg.norm(residual, axis=0) > rounding)

    start = jax.random.normal(jax.random.key(0), (size, count), dtype)
    values, x, residual = best_in_span(start)
    state = (jnp.zeros((), int), values, x, residual, jnp.zeros_like(x))
    _, values, x, *_ = jax.lax.while_loop(unfinished, step, state)
    return values, x


@_largest_eigenpairs.defjvp
def _largest_eigenpairs_jvp(
    count: int,
    block_size: BlockSize,
    primals: tuple[Params, Batch],
    tangents: tuple[Params, Batch],
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The derivative of an eigenvalue with eigenvector u is `uᵀ Ȧ u`.

    That of u is not computed, and NaN: so second derivatives of an eigenvalue are NaN.
    """
    values, vectors = _largest_eigenpairs(count, block_size, *primals)

    def quotients(params: Params, batch: Batch) -> jax.Array:
        product = _flat_ggn_vp(params, batch, block_size)
        products = jax.vmap(product, in_axes=1, out_axes=1)(vectors)
        return jnp.sum(vectors * products, axis=0)

    values_dot = jax.jvp(quotients, primals, tangents)[1]
    return (values, vectors), (values_dot, jnp.full_like(vectors, jnp.nan))


def count_params(params: Params) -> int:
    """P, the number of weights and biases."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _flat_ggn_vp(params: Params, batch: Batch, block_size: BlockSize) -> Any:
    """`ggn_vp` as a function of a flat vector `[P]`."""
    unravel = ravel_pytree(params)[1]

    def product(v: jax.Array) -> jax.Array:
        v = v.astype(params[0].w.dtype)
        result = _curvature_vp(params, batch, unravel(v), block_size, residual=False)
        return ravel_pytree(result)[0].astype(batch.c.dtype)

    return product


def drop_saturated(
    params: Params, activations: Activations, batch: Batch
) -> tuple[Batch, jax.Array]:
    """The batch with features and weight 0 for examples whose δ_L and S are 0; δ_L."""
    delta, s = derivatives(params, activations, *batch[1:])
    saturated = jnp.all((delta == 0) & (s == 0), axis=1) & (batch.c != 0)  # [N]
    x, c = (jnp.where(saturated[:, None], 0, batch.x), jnp.where(saturated, 0, batch.c))
    return batch._replace(x=x, c=c), delta


def root_curvature(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Features with 0 for the examples of weight 0, and `√S`, `[N, n_L]`."""
    x = jnp.where((batch.c == 0)[:, None], 0, batch.x)
    e = jnp.exp(-jnp.abs(forward(params, x).a[-1]) / 2)
    # √σ(a)σ(−a) = e / (1 + e²) has a finite derivative, also where it underflows.
    return x, jnp.sqrt(_label_weights(*batch[1:])) * e / (1 + e**2)


def smaller_gram(
    params: Params, batch: Batch, variances: jax.Array | None, block_size: BlockSize
) -> jax.Array:
    """The smaller of `√S J D Jᵀ √S` and `√D Jᵀ S J √D`, with equal nonzero eigenvalues.

    D is described in `kernel`. For a symbolic number of examples it is the second.
    """
    n, outputs = batch.y.shape
    selected = params if variances is None else params[-variances.shape[0] :]
    size = count_params(selected)
    if isinstance(n, int) and n * outputs < size:
        x, root = root_curvature(params, batch)
        theta = replicate(kernel(params, x, x, variances, block_size))
        theta = theta.transpose(0, 2, 1, 3).reshape(n * outputs, n * outputs)
        root = replicate(root).ravel()
        return root[:, None] * theta * root[None, :]

    def block(c: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple]:
        activations = propagate(params, x, ROWS, c == 0)
        _, s = derivatives(params, activations, y, c, batch.pos_weight)
        rows = jacobian(params, activations, variances).reshape(-1, size)
        return matmul((s.reshape(-1)[:, None] * rows).T, rows), ()

    if isinstance(n, int):  # the rows of a block take about the memory of the result
        block_size = at_most(block_size, max(256, size // outputs))
    return sum_over_blocks(block, batch.c, (batch.x, batch.y), block_size)[0]


def log_evidence(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    prior_precision: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    block_size: int | Literal["auto"] | None = "auto",
) -> jax.Array:
    r"""The Laplace approximation of the log marginal likelihood.

    .. math::
      -\sum_i s_i \ell_i - \frac\tau2 \|\theta\|^2
      - \frac12 \log\det\!\left(I + \tfrac1\tau \sqrt S \Theta \sqrt S\right)

    The prior of all weights and biases is :math:`\theta \sim N(0, I/\tau)`, and the
    Gauss-Newton matrix replaces the Hessian. The approximation is meant for params at
    the maximum of the posterior, which minimize the summed loss plus
    :math:`\tau/2\,\|\theta\|^2`, but can be computed for any params. With soft labels,
    weights or pos_weight the likelihood is a weighted one.

    This is `laplace.log_evidence`, where each layer may have a precision of its own.
    The result can be differentiated with respect to the prior precision, for example to
    choose τ by gradient ascent. The matrix has errors of the order of machine epsilon
    times its largest eigenvalue, and τ should be well above that: in float32, above
    1e-5 times the largest eigenvalue. For a smaller τ use float64.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      prior_precision: Precision τ > 0, a scalar.
      sample_weight: Weights s >= 0 of the examples, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: Maximum examples per block; see `jaxbce.value_and_grad`.

    Returns:
      The log evidence in nats, a scalar in the accumulation dtype.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or an option is invalid.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [0.0]])
      >>> evidence = jaxbce.curvature.log_evidence(params, x, y, 0.5)
      >>> round(float(evidence), 4)  # −2 log 2 − log(1 + 0.5 / 0.5)
      -2.0794

    References:
      MacKay, A Practical Bayesian Framework for Backpropagation Networks, Neural
      Computation 4(3), 1992. Immer et al., Scalable Marginal Likelihood Estimation for
      Model Selection in Deep Learning, 2021, arXiv:2104.04975.
    """
    from jaxbce import laplace  # here, because laplace imports this module

    _validate.scalar("prior_precision", prior_precision)
    posterior = laplace.posterior(
        params,
        x,
        y,
        prior_precision,
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        block_size=block_size,
    )
    return laplace.log_evidence(posterior)


class KroneckerFactors(NamedTuple):
    """Factors of a layer: `A ⊗ G` approximates its diagonal block of the GGN.

    Attributes:
      a: `A = E[h hᵀ]` of the layer's inputs, followed by a 1 for the bias,
        `[n_in + 1, n_in + 1]`.
      g: `G = E[δ δᵀ]` of the layer's error signals, `[n_out, n_out]`.
    """

    a: jax.Array
    g: jax.Array


@jit(static_argnames=("block_size",))
def kfac_factors(
    params: Params, x: ArrayLike, *, block_size: int | Literal["auto"] | None = "auto"
) -> tuple[KroneckerFactors, ...]:
    r"""Kronecker factors of each layer's block of the Gauss-Newton matrix.

    .. math::
      A_k = \frac1N \sum_i \tilde h_{k-1,i} \tilde h_{k-1,i}^\top, \qquad
      G_k = \frac1N \sum_i E_{k,i}^\top\, \mathrm{diag}(\hat y (1 - \hat y))\, E_{k,i}

    This is an approximation. The mean over examples of a Kronecker product is replaced
    by the product of the means, which is exact for a single example, and blocks
    between different layers are ignored. :math:`G_k` is the exact expectation of
    :math:`\delta\delta^\top` under the labels that the model predicts, without
    sampling, so no labels are needed.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      block_size: Maximum examples per block; see `jaxbce.value_and_grad`.

    Returns:
      One `KroneckerFactors` per layer, in the accumulation dtype. `jnp.kron(a, g)` is
      the block of a layer, in the order of `jnp.vstack([w, b]).ravel()`.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or block_size is invalid.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> factors = jaxbce.curvature.kfac_factors(params, jnp.ones((8, 2)))
      >>> [(f.a.shape, f.g.shape) for f in factors]
      [((3, 3), (3, 3)), ((4, 4), (1, 1))]

    References:
      Martens, Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature, 2015, arXiv:1503.05671.
    """
    x = _validate.features(x, params)
    dtype = _validate.accumulation_dtype(x.dtype)

    def block(c: jax.Array, x: jax.Array) -> tuple[Any, tuple]:
        activations = forward(params, x)
        e = _logit_gradients(params, activations)
        a = activations.a[-1]
        s = c[:, None] * sigmoid(a) * sigmoid(-a)  # [N, n_L]
        factors = []
        for h, e_k in zip(activations.h[:-1], e, strict=True):
            h = jnp.pad(h.astype(dtype), ((0, 0), (0, 1)), constant_values=1)
            rows = e_k.reshape(-1, e_k.shape[-1])  # [N n_L, n_k]
            weighted = (s[:, :, None] * e_k).reshape(rows.shape)
            factors.append(
                KroneckerFactors(
                    a=matmul((c[:, None] * h).T, h), g=matmul(weighted.T, rows)
                )
            )
        return tuple(factors), ()

    n = x.shape[0]
    size = examples_per_block(block_size, params, n)
    c = jnp.ones(n, dtype) / jnp.asarray(n, dtype)  # n may be symbolic
    return sum_over_blocks(block, c, (x,), size)[0]
