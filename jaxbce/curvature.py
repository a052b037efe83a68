r"""Curvature from the two lists: tangent kernel, Gauss-Newton and Hessian, evidence.

Let `J_i` be the derivative of row i's logits in the parameters. Its rows are outer
products of layer inputs with `E_k`, what `pull_back` makes of a 1 at one logit:

    Θ_ij = J_i J_jᵀ = Σ_k (1 + h_{k−1,i}·h_{k−1,j}) E_{k,i} E_{k,j}ᵀ

is the tangent kernel. The loss is convex in the logits, with second derivatives

    S = c ((1−y) + p y) σ(a) σ(−a),

one for each. The (generalised) Gauss-Newton matrix, with p = 1 the Fisher information,
is `Jᵀ S J`, and its eigenvalues but for zeros are those of `√S Θ √S`.

A dot is the derivative along v = {Ẇ_k, ḃ_k} (Pearlmutter's R-operator):

    ȧ_k = h_{k−1} Ẇ_k + ḃ_k + ḣ_{k−1} W_k        ḣ_k = ȧ_k ⊙ [a_k > 0]
    δ̇_L = S ȧ_L      δ̇_k = (δ̇_{k+1} W_{k+1}ᵀ + δ_{k+1} Ẇ_{k+1}ᵀ) ⊙ [a_k > 0]
    (H v)_k = h_{k−1}ᵀ δ̇_k + ḣ_{k−1}ᵀ δ_k

and GGN·v is the same without the two terms that hold δ itself.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxbce import _validate, gradients
from jaxbce._blocks import rows_per_block, sum_over_blocks
from jaxbce.gradients import (
    Problem,
    contract,
    deltas,
    problem,
    pull_back,
    weight_gradient,
)
from jaxbce.network import Layer, Params, Trace, forward, matmul, sigmoid


@functools.partial(jax.jit, static_argnames="block_size")
def ntk(
    params: Params,
    x: jax.Array,
    x2: jax.Array | None = None,
    *,
    block_size: int | str | None = "auto",
) -> jax.Array:
    r"""The tangent kernel: inner products of the logits' gradients.

    .. math::
      \Theta_{ij} = \sum_k (1 + h_{k-1,i} \cdot h_{k-1,j})\, E_{k,i} E_{k,j}^\top

    It is the finite network's own kernel, at these parameters. Beside the result and
    one array of its size memory grows with the rows times the outputs times the widths.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      x2: Features `[M, n_0]`; None is x.
      block_size: The most rows of x taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      `[N, M]` for one output, `[N, M, n_L, n_L]` for several, in the accumulation
      dtype.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, or block_size is not one.

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
    trace2, e2 = _logit_gradients(params, x2)
    outputs = params[-1].w.shape[1]

    def block(_: jax.Array, x: jax.Array) -> tuple[tuple, jax.Array]:
        trace, e = _logit_gradients(params, x)
        total: Any = 0  # [B, n_L, M, n_L]
        for k in range(len(params)):
            inputs = 1 + matmul(trace.h[k], trace2.h[k].T)  # [B, M]
            pairs = jnp.eye(outputs, dtype=inputs.dtype)[:, None, :]  # E_L is 1
            if k + 1 < len(params):
                left, right = (t.reshape(-1, t.shape[-1]) for t in (e[k], e2[k]))
                pairs = (left @ right.T).reshape(len(x), outputs, len(x2), outputs)
            total += inputs[:, None, :, None] * pairs
        return (), total.transpose(0, 2, 1, 3)  # [B, M, n_L, n_L]

    rows = rows_per_block(block_size, params, len(x))
    theta = sum_over_blocks(block, jnp.ones(len(x), x.dtype), (x,), rows)[1]
    return theta[:, :, 0, 0] if outputs == 1 else theta


def _logit_gradients(
    params: Params, x: jax.Array
) -> tuple[Trace, tuple[jax.Array, ...]]:
    """The trace, and `E_k = ∂a_L/∂a_k`, each `[N, n_L, n_k]`."""
    trace = forward(params, x)
    a = trace.a[-1]
    ones = jnp.eye(a.shape[1], dtype=a.dtype)[:, None, :]  # [n_L, 1, n_L]
    seeds = jnp.broadcast_to(ones, (a.shape[1], *a.shape))
    back = jax.vmap(functools.partial(pull_back, params, trace), out_axes=1)
    return trace, back(seeds)


def _second_derivative(
    a: jax.Array, y: jax.Array, c: jax.Array, pos_weight: jax.Array
) -> jax.Array:
    """`S = c ((1−y) + p y) σ(a) σ(−a)`, `[N, n_L]`."""
    weight = (1 - y) + jnp.broadcast_to(pos_weight, y.shape) * y
    return c[:, None] * weight * sigmoid(a) * sigmoid(-a)


@functools.partial(jax.jit, static_argnames=("reduction", "block_size"))
def hvp(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    v: Params,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    reduction: str = "mean",
    block_size: int | str | None = "auto",
) -> Params:
    """The Hessian of the loss times a vector, `H v`.

    The second derivative of relu counts as 0 everywhere, as it does for JAX.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      v: A pytree like params.
      sample_weight: Weights s >= 0 of the rows, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      reduction: "mean" or "sum" over rows.
      block_size: The most rows taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      A pytree like params in structure, shapes and dtype.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, or an option is unknown; nothing is broadcast.

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
    batch = problem(params, x, y, sample_weight, pos_weight, reduction)
    v = _validate.vector(v, params)
    rows = rows_per_block(block_size, params, len(batch.c))
    return _curvature_vp(params, batch, v, rows, residual=True)


@functools.partial(jax.jit, static_argnames=("reduction", "block_size"))
def ggn_vp(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    v: Params,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    reduction: str = "mean",
    block_size: int | str | None = "auto",
) -> Params:
    """The Gauss-Newton matrix of the loss times a vector, `Jᵀ S J v`.

    It is positive semidefinite, and what is left of the Hessian where every logit is
    linear in the parameters. With p = 1 it is the Fisher information.

    Arguments, errors and the result are those of `hvp`.

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
    batch = problem(params, x, y, sample_weight, pos_weight, reduction)
    v = _validate.vector(v, params)
    rows = rows_per_block(block_size, params, len(batch.c))
    return _curvature_vp(params, batch, v, rows, residual=False)


def _curvature_vp(
    params: Params, batch: Problem, v: Params, block_rows: int, *, residual: bool
) -> Params:
    """`GGN v`; with the terms that hold δ, the residual of the fit, `H v`."""
    p = batch.pos_weight

    def block(c: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Params, tuple]:
        trace = forward(params, x)
        a_dot, h_dot = _push_forward(params, trace, v)
        dot = _second_derivative(trace.a[-1], y, c, p) * a_dot  # δ̇_L, [N, n_L]
        if not residual:
            return contract(trace.h[:-1], pull_back(params, trace, dot)), ()
        delta = deltas(params, trace, y, sample_weight=c, pos_weight=p)
        dots = [dot]
        for k in range(len(params) - 1, 0, -1):
            w, w_dot = params[k].w, v[k].w  # [n_k, n_{k+1}]
            back = matmul(dot.astype(w.dtype), w.T)
            back += matmul(delta[k].astype(w.dtype), w_dot.T)
            dot = jnp.where(trace.h[k] > 0, back, 0)  # δ̇_k, [N, n_k]
            dots.append(dot)
        grads = []
        for k, dot in enumerate(reversed(dots)):
            if k == 0:
                w = weight_gradient(trace.h[0], dot)  # [n_1, n_0]
            else:  # already a sum of two
                h, h_k_dot = trace.h[k], h_dot[k - 1]
                w = matmul(dot.astype(h.dtype).T, h)  # [n_{k+1}, n_k]
                w += matmul(delta[k].astype(h.dtype).T, h_k_dot)
            grads.append(Layer(w=w.T, b=jnp.sum(dot, axis=0)))
        return tuple(grads), ()

    total, _ = sum_over_blocks(block, batch.c, (batch.x, batch.y), block_rows)
    return jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), total, params)


def _push_forward(
    params: Params, trace: Trace, v: Params
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`ȧ_L`, `[N, n_L]`, and `(ḣ_1, ..., ḣ_{L−1})`, each `[N, n_k]`."""
    a_dot, h_dot = [], []
    for k, (layer, (w_dot, b_dot)) in enumerate(zip(params, v, strict=True)):
        dot = matmul(trace.h[k], w_dot)  # [N, n_{k+1}]
        dot += b_dot.astype(dot.dtype)[None, :]
        if k > 0:
            dot += matmul(h_dot[-1], layer.w)
        a_dot.append(dot)
        h_dot.append(jnp.where(trace.h[k + 1] > 0, dot, 0).astype(layer.w.dtype))
    return a_dot[-1], tuple(h_dot[:-1])


@functools.partial(jax.jit, static_argnames=("k", "reduction", "block_size"))
def ggn_eigenvalues(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    k: int | None = None,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    reduction: str = "mean",
    block_size: int | str | None = "auto",
) -> jax.Array:
    r"""The largest eigenvalues of the Gauss-Newton matrix, in descending order.

    Of its P, as many as there are parameters, at most `N n_L` are not 0. They come from
    the smaller of two matrices with the same ones: :math:`\sqrt S \Theta \sqrt S`,
    `[N n_L, N n_L]`, or the matrix itself, `[P, P]`. With `k` and `5 k < P <= N n_L`
    they come without either, by LOBPCG on products with `ggn_vp`.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      k: How many, 1 to `min(N n_L, P)`; None is all of these.
      sample_weight: Weights s >= 0 of the rows, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      reduction: "mean" or "sum" over rows.
      block_size: The most rows taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      `[k]`, in the accumulation dtype, none below 0. Each is accurate to a rounding of
      the largest one.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, k is out of range, or an option is unknown.

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
    batch = problem(params, x, y, sample_weight, pos_weight, reduction)
    size, terms = _num_params(params), batch.y.size
    most = min(size, terms)
    count = most if k is None else _validate.count("k", k)
    if count > most:
        raise ValueError(f"k is {k}; 1 to {most}, as many as are not 0, is accepted")
    rows = rows_per_block(block_size, params, len(batch.c))
    if k is None or terms < size or 5 * count >= size:
        return jnp.flip(jnp.linalg.eigvalsh(_gram(params, batch, rows))).clip(0)[:count]
    return _largest(_flat_ggn_vp(params, batch, rows), size, count, batch.c.dtype)


def _largest(product: Any, size: int, count: int, dtype: Any) -> jax.Array:
    """The largest eigenvalues of a positive semidefinite matrix, by LOBPCG.

    It divides by zero where a residual is 0, as with a matrix of low rank. A random
    diagonal, of a rounding of the largest eigenvalue, keeps residuals from being that.
    """
    key_start, key_diagonal = jax.random.split(jax.random.key(0))
    start = jax.random.normal(key_start, (size, count), dtype)
    columns = jax.vmap(product, in_axes=1, out_axes=1)
    unit = start / jnp.linalg.norm(start, axis=0)
    scale = jnp.max(jnp.linalg.norm(columns(unit), axis=0))
    positive = scale > 0
    least = jnp.finfo(dtype).eps * jnp.where(positive, scale, 1)
    diagonal = least * jax.random.uniform(key_diagonal, (size, 1), dtype)
    from jax.experimental.sparse.linalg import lobpcg_standard  # slow to import

    found = lobpcg_standard(lambda v: columns(v) + diagonal * v, start)[0]
    return jnp.where(positive, found.clip(0), 0)


def _num_params(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _flat_ggn_vp(params: Params, batch: Problem, block_rows: int) -> Any:
    unravel = ravel_pytree(params)[1]

    def product(v: jax.Array) -> jax.Array:
        v = v.astype(params[0].w.dtype)
        result = _curvature_vp(params, batch, unravel(v), block_rows, residual=False)
        return ravel_pytree(result)[0].astype(batch.c.dtype)

    return product


def _gram(params: Params, batch: Problem, block_rows: int) -> jax.Array:
    """The smaller of `√S Θ √S` and the Gauss-Newton matrix; their spectra agree."""
    size, (n, outputs) = _num_params(params), batch.y.shape
    if n * outputs < size:
        a = forward(params, batch.x).a[-1]
        s = _second_derivative(a, batch.y, batch.c, batch.pos_weight)  # [N, n_L]
        theta = ntk(params, batch.x, block_size=block_rows)
        theta = theta.reshape(n, n, outputs, outputs).transpose(0, 2, 1, 3)
        root = jnp.sqrt(s).ravel()  # [N n_L]
        return root[:, None] * theta.reshape(n * outputs, n * outputs) * root
    ones = jnp.eye(size, dtype=batch.c.dtype)
    return jax.lax.map(_flat_ggn_vp(params, batch, block_rows), ones)


def log_evidence(
    params: Params,
    x: jax.Array,
    y: jax.Array,
    prior_precision: jax.Array | float,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    block_size: int | str | None = "auto",
) -> jax.Array:
    r"""Laplace's approximation of the log marginal likelihood.

    .. math::
      -\sum_i s_i \ell_i - \frac\tau2 \|\theta\|^2
      - \frac12 \log\det\!\left(I + \tfrac1\tau \sqrt S \Theta \sqrt S\right)

    for the prior :math:`\theta \sim N(0, I/\tau)` of all weights and biases, with the
    Gauss-Newton matrix for the Hessian. The approximation is meant for params at the
    maximum of the posterior, which is the minimum of the summed loss plus
    :math:`\tau/2\,\|\theta\|^2`; it is computed for any. Soft labels, weights and
    pos_weight make it that of a weighted likelihood.

    It can be differentiated in the prior precision, so that one can be found by
    ascending the evidence. Eigenvalues are known to a rounding of the largest one, and
    τ should be well above that (in float32, 1e-5 of it): below, use float64.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      prior_precision: Precision τ > 0, a scalar.
      sample_weight: Weights s >= 0 of the rows, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: The most rows taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      The log evidence in nats, a scalar in the accumulation dtype.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, or block_size is not one; nothing is broadcast.

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
    _validate.scalar("prior_precision", prior_precision)
    options: dict[str, Any] = {"sample_weight": sample_weight, "pos_weight": pos_weight}
    options |= {"reduction": "sum", "block_size": block_size}
    misfit = gradients.loss(params, x, y, **options)
    eigenvalues = ggn_eigenvalues(params, x, y, **options)
    tau = jnp.asarray(prior_precision, misfit.dtype)
    squared_norm = sum(
        jnp.sum(jnp.square(leaf.astype(tau.dtype))) for leaf in jax.tree.leaves(params)
    )
    log_det = jnp.sum(jnp.log1p(eigenvalues / tau))
    return -misfit - tau / 2 * squared_norm - log_det / 2


class KroneckerFactors(NamedTuple):
    """A layer's two factors; `A ⊗ G` stands for its block of the Gauss-Newton matrix.

    Attributes:
      a: `A = E[h hᵀ]` of the layer's inputs with a 1 for the bias behind them,
        `[n_in + 1, n_in + 1]`.
      g: `G = E[δ δᵀ]` of its deltas, `[n_out, n_out]`.
    """

    a: jax.Array
    g: jax.Array


@functools.partial(jax.jit, static_argnames="block_size")
def kfac_factors(
    params: Params, x: jax.Array, *, block_size: int | str | None = "auto"
) -> tuple[KroneckerFactors, ...]:
    r"""Kronecker factors of each layer's block of the Gauss-Newton matrix.

    .. math::
      A_k = \frac1N \sum_i \tilde h_{k-1,i} \tilde h_{k-1,i}^\top, \qquad
      G_k = \frac1N \sum_i E_{k,i}^\top\, \mathrm{diag}(\hat y (1 - \hat y))\, E_{k,i}

    An approximation: the mean over rows of a Kronecker product is replaced by the
    product of the means, which is exact for one row only, and blocks between layers
    are left out. :math:`G_k` is the expectation of :math:`\delta\delta^\top` under the
    model's own labels, taken exactly and not by drawing some; x alone is needed.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      block_size: The most rows taken at a time; see `jaxbce.value_and_grad`.

    Returns:
      `KroneckerFactors` for each layer, in the accumulation dtype.
      `jnp.kron(a, g)` is the block in the order of `jnp.vstack([w, b]).ravel()`.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, or block_size is not one.

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
        trace, e = _logit_gradients(params, x)
        a = trace.a[-1]
        s = c[:, None] * sigmoid(a) * sigmoid(-a)  # [N, n_L]
        factors = []
        for h, e_k in zip(trace.h[:-1], e, strict=True):
            h = jnp.pad(h.astype(dtype), ((0, 0), (0, 1)), constant_values=1)
            rows = e_k.reshape(-1, e_k.shape[-1])  # [N n_L, n_k]
            weighted = (s[:, :, None] * e_k).reshape(rows.shape)
            factors.append(
                KroneckerFactors(a=(c[:, None] * h).T @ h, g=weighted.T @ rows)
            )
        return tuple(factors), ()

    rows = rows_per_block(block_size, params, len(x))
    return sum_over_blocks(block, jnp.full(len(x), 1 / len(x), dtype), (x,), rows)[0]
