r"""The Laplace approximation: uncertainty, influence, leave-one-out and evidence.

Near params θ, the posterior of a network with prior `θ_k ~ N(0, I/τ_k)` in layer k is
approximated by a normal distribution with precision matrix

    H = Jᵀ S J + T        T = diag(τ_k)

J is the Jacobian of the logits, and S the diagonal matrix of the second derivatives of
the loss with respect to the logits. The Gauss-Newton matrix `Jᵀ S J` replaces the
Hessian of the summed loss Σ_i s_i ℓ_i (see `curvature.py`). The approximation is meant
for θ that minimize

    Σ_i s_i ℓ_i + ½ Σ_k τ_k ‖θ_k‖²

a sum over examples with the biases included. Let `K = J T⁻¹ Jᵀ` be the tangent kernel
with the terms of its layers divided by τ_k: the prior covariance of the logits. One
Cholesky factorization, of the smaller of two matrices with the same determinant, gives
everything in this module:

    B = I + √S K √S = L Lᵀ                  [N n_L, N n_L]
    J_x H⁻¹ J_x′ᵀ = K_xx′ − V_xᵀ V_x′       V_x = L⁻¹ √S K_·x

    B = I + T^−½ Jᵀ S J T^−½ = L Lᵀ         [P, P]
    J_x H⁻¹ J_x′ᵀ = V_xᵀ V_x′               V_x = L⁻¹ T^−½ J_xᵀ

For layers="last", J, T, H and P are those of the last layer alone, and the other layers
are taken as known.

All functions are pure and work under `jit` and `vmap`. For networks stacked along a
leading axis of params, `jax.vmap(posterior, (0, None, None, None))` returns stacked
posteriors, to which `jax.vmap` applies the other functions. The parameters of a
`SweepResult` have two leading axes, so they need two:

    >>> import jax, jaxbce
    >>> keys = jax.random.split(jax.random.key(0), (4, 5))  # points, seeds
    >>> make = jax.vmap(jax.vmap(lambda key: jaxbce.init(key, (2, 3, 1))))
    >>> x, y = jax.numpy.ones((8, 2)), jax.numpy.ones((8, 1))
    >>> axes = (0, None, None, None)
    >>> posterior = jax.vmap(jax.vmap(jaxbce.laplace.posterior, axes), axes)
    >>> posteriors = posterior(make(keys), x, y, 0.5)
    >>> jax.vmap(jax.vmap(jaxbce.laplace.log_evidence))(posteriors).shape
    (4, 5)

The prior precision should be well above machine epsilon times the largest eigenvalue λ
of the Gauss-Newton matrix: in float32, above 1e-5 λ. For a smaller τ use float64. Where
rounding makes B indefinite, its diagonal is raised by at most about twice what is
needed, so results stay finite. The absolute errors of the variances `K − VᵀV` are of
the order of machine epsilon times K.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from jaxbce import _validate, curvature, gradients
from jaxbce._blocks import BlockSize, at_most, examples_per_block, map_over_blocks
from jaxbce._jit import jit
from jaxbce._layouts import replicate
from jaxbce.gradients import Batch, check_batch
from jaxbce.losses import elementwise, label_weights
from jaxbce.network import Params, forward, sigmoid


class Posterior(NamedTuple):
    """The Laplace approximation at params, as `posterior` returns it.

    Attributes:
      params: The mode, a tuple of `Layer`.
      x: Training features `[N, n_0]`; non-finite features of examples with weight 0
        are replaced by 0.
      y: Training labels `[N, n_L]`.
      sample_weight: Weights s of the training examples, `[N]`.
      pos_weight: Weight p of the positive class, a scalar or `[n_L]`.
      prior_precision: τ_k of the layers that the posterior covers: `[L]`, or `[1]` for
        layers="last".
      factor: The lower triangular L, `[D, D]` with `D = min(N n_L, P)`.
    """

    params: Params
    x: jax.Array
    y: jax.Array
    sample_weight: jax.Array
    pos_weight: jax.Array
    prior_precision: jax.Array
    factor: jax.Array


def posterior(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    prior_precision: ArrayLike | tuple[ArrayLike, ...],
    *,
    layers: Literal["all", "last"] = "all",
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    block_size: int | Literal["auto"] | None = "auto",
) -> Posterior:
    r"""The Laplace approximation of the posterior of the parameters.

    .. math::
      \theta \sim N(\hat\theta, H^{-1}), \qquad
      H = J^\top S J + \mathrm{diag}(\tau_k)

    It is meant for params that minimize :math:`\sum_i s_i \ell_i + \frac12 \sum_k
    \tau_k \|\theta_k\|^2`, but can be computed for any params. The loss is a sum: a
    network trained on the mean loss plus λ/2 ‖θ‖² has τ = N λ (λ Σ s with sample
    weights).

    The cost is that of the kernel or the Jacobian of all examples, and of the Cholesky
    factorization of a matrix of size min(N n_L, P), for P parameters.
    Examples of weight 0, or whose δ_L and S are 0 (saturated and correctly classified),
    contribute exactly 0 to all values, whatever their features. Other features that are
    not finite make the result not finite.

    Results can be differentiated with respect to `prior_precision`, and with respect to
    params if all features are finite. Derivatives with respect to `sample_weight` and
    `pos_weight` are not defined at 0.

    Args:
      params: A tuple of `Layer`.
      x: Features `[N, n_0]`, floating, N >= 1; cast to the parameters' dtype.
      y: Labels in [0, 1], `[N, n_L]`, real or boolean; soft labels allowed.
      prior_precision: Precision τ > 0, finite: a scalar, or one per layer of params, a
        tuple of scalars or `[L]`. For layers="last" only the last of them is used.
      layers: "all", or "last" for a posterior of the last layer's weights and biases,
        given the other layers.
      sample_weight: Weights s >= 0 of the examples, `[N]`; None is all ones.
      pos_weight: Weight p >= 0 of the positive class: a scalar or `[n_L]`.
      block_size: Maximum examples per block; see `jaxbce.value_and_grad`.

    Returns:
      A `Posterior`, for the other functions of this module.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match, or an option is invalid.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [0.0]])
      >>> posterior = jaxbce.laplace.posterior(params, x, y, 0.5)
      >>> factor = posterior.factor  # B = I + Σ_i diag(x_i², 1) σ(0)² / 0.5
      >>> bool(jnp.allclose(factor @ factor.T, 2 * jnp.eye(2), atol=1e-6))
      True

    References:
      MacKay, A Practical Bayesian Framework for Backpropagation Networks, Neural
      Computation 4(3), 1992. Immer et al., Scalable Marginal Likelihood Estimation for
      Model Selection in Deep Learning, 2021, arXiv:2104.04975.
    """
    dtype = _validate.accumulation_dtype(_validate.params(params))
    tau = _validate.prior_precision(prior_precision, len(params), dtype)
    if not isinstance(layers, str) or layers not in ("all", "last"):
        raise ValueError(f'expected layers to be "all" or "last", got {layers!r}')
    return _posterior(
        params,
        x,
        y,
        tau if layers == "all" else tau[-1:],
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        block_size=block_size,
    )


@jit(static_argnames=("block_size",))
def _posterior(
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    prior_precision: jax.Array,
    *,
    sample_weight: ArrayLike | None,
    pos_weight: ArrayLike,
    block_size: int | Literal["auto"] | None,
) -> Posterior:
    batch = check_batch(params, x, y, sample_weight, pos_weight, "sum")
    size = examples_per_block(block_size, params, batch.x.shape[0])
    activations = forward(params, batch.x)
    contributing, _ = curvature.drop_saturated(params, activations, batch)
    gram = curvature.smaller_gram(params, contributing, 1 / prior_precision, size)
    return Posterior(params, *batch, prior_precision, _cholesky_plus_identity(gram))


def _cholesky_plus_identity(gram: jax.Array) -> jax.Array:
    """The Cholesky factor of `I + gram`.

    It is finite if gram is positive semidefinite up to rounding.
    """
    return _cholesky(jnp.eye(gram.shape[0], dtype=gram.dtype) + gram)


@jax.custom_jvp
def _cholesky(b: jax.Array) -> jax.Array:
    """The Cholesky factor L of b, whose diagonal is raised where b is indefinite.

    The diagonal is raised by machine epsilon times its mean, and this is doubled until
    the factorization succeeds or it exceeds the mean. If the mean is NaN, so is the
    factor. The derivative ignores it.
    """
    identity = jnp.eye(b.shape[0], dtype=b.dtype)
    mean = jnp.sum(jnp.diagonal(b) / b.shape[0])  # without overflow of the sum
    least = jnp.finfo(b.dtype).eps * mean

    def is_indefinite(jitter_and_factor: tuple[jax.Array, jax.Array]) -> jax.Array:
        jitter, factor = jitter_and_factor
        return jnp.isnan(factor[-1, -1]) & (jitter < mean)

    def raise_diagonal(
        jitter_and_factor: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        jitter = jnp.maximum(2 * jitter_and_factor[0], least)
        return jitter, jnp.linalg.cholesky(b + jitter * identity)

    start = 0 * least, jnp.linalg.cholesky(b)
    return jax.lax.while_loop(is_indefinite, raise_diagonal, start)[1]


@_cholesky.defjvp
def _cholesky_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """`L̇ = L Φ(L⁻¹ Ḃ L⁻ᵀ)`, where Φ takes the lower triangle and half the diagonal."""
    factor = _cholesky(*primals)
    half = solve_triangular(factor, tangents[0], lower=True)  # L⁻¹ Ḃ
    middle = jnp.tril(solve_triangular(factor, half.T, lower=True))
    middle -= jnp.diag(jnp.diagonal(middle)) / 2
    return factor, factor @ middle


class _Training(NamedTuple):
    """The training examples, as all functions of a posterior need them.

    Attributes:
      logits: `[N, n_L]`.
      x: Features with 0 for the examples that contribute nothing, `[N, n_0]`.
      delta: `s δ_L`, `[N, n_L]`.
      root: `√S`, `[N, n_L]`.
    """

    logits: jax.Array
    x: jax.Array
    delta: jax.Array
    root: jax.Array


def _training(posterior: Posterior) -> _Training:
    params, *fields = posterior[:5]
    batch = Batch(*fields)
    activations = forward(params, batch.x)
    contributing, delta = curvature.drop_saturated(params, activations, batch)
    x, root = curvature.root_curvature(params, contributing)
    return _Training(*map(replicate, (activations.a[-1], x, delta, root)))


def _check(posterior: Posterior) -> None:
    if not isinstance(posterior, Posterior):
        raise TypeError(
            "expected posterior to be a Posterior, as jaxbce.laplace.posterior returns "
            f"it, got {type(posterior).__name__}"
        )
    _validate.params(posterior.params)


def _uses_kernel(posterior: Posterior) -> bool:
    """Whether the factor is of `I + √S K √S`, `[N n_L, N n_L]`, and not `[P, P]`."""
    layers = posterior.params[-posterior.prior_precision.shape[0] :]
    return posterior.factor.shape[0] != curvature.count_params(layers)


def _examples_per_block(posterior: Posterior, n: int) -> BlockSize:
    """At most as many examples as let V take the memory of the factor.

    It is at least 256 if n allows.
    """
    size = examples_per_block("auto", posterior.params, n)
    if not isinstance(n, int):
        return n
    return at_most(size, max(256, posterior.factor.shape[0] // posterior.y.shape[1]))


def _v(
    posterior: Posterior, training: _Training, x: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """`V_x`, `[D, B, n_L]`, and the kernel K between the training examples and x.

    x has features `[B, n_0]`. K is `[N, B, n_L, n_L]`, or None where the matrix of size
    P was factorized.
    """
    variances, k = 1 / posterior.prior_precision, None
    if _uses_kernel(posterior):
        n = training.x.shape[0]
        k = curvature.kernel(posterior.params, training.x, x, variances, n)
        rhs = training.root[:, None, :, None] * k
        rhs = rhs.transpose(0, 2, 1, 3)  # [N, n_L, B, n_L]
    else:
        activations = forward(posterior.params, x)
        jacobian = curvature.jacobian(posterior.params, activations, variances)
        rhs = jacobian.transpose(2, 0, 1)  # [P, B, n_L]
    size, shape = posterior.factor.shape[0], rhs.shape[-2:]
    v = solve_triangular(posterior.factor, rhs.reshape(size, -1), lower=True)
    return v.reshape(size, *shape), k


def _covariance(posterior: Posterior, x: jax.Array, v: jax.Array) -> jax.Array:
    """`J_x H⁻¹ J_xᵀ` of each example, `[B, n_L, n_L]`, given V_x."""
    # VᵀV: the result, or with a kernel the part of K that the data explain.
    product = jnp.einsum("dbo,dbp->bop", v, v)
    if not _uses_kernel(posterior):
        return product
    variances = 1 / posterior.prior_precision

    def prior_covariance(x: jax.Array) -> jax.Array:
        one = x[None]
        return curvature.kernel(posterior.params, one, one, variances, 1)[0, 0]

    return _clip_diagonal(jax.vmap(prior_covariance)(x) - product, 0)


def _clip_diagonal(t: jax.Array, least: float) -> jax.Array:
    """Matrices `[B, n_L, n_L]` with entries >= least on the diagonal."""
    is_diagonal = jnp.eye(t.shape[1], dtype=bool)[None]
    return jnp.where(is_diagonal, t.clip(least), t)


def _covariance_in_blocks(
    posterior: Posterior, training: _Training, x: jax.Array
) -> jax.Array:
    """`J_x H⁻¹ J_xᵀ` of each example, `[M, n_L, n_L]`."""

    def block(x: jax.Array) -> jax.Array:
        return _covariance(posterior, x, _v(posterior, training, x)[0])

    size = _examples_per_block(posterior, x.shape[0])
    return map_over_blocks(block, (x,), size)


@jit()
def logit_covariance(posterior: Posterior, x: ArrayLike) -> jax.Array:
    r"""The posterior covariance of the logits of each example.

    .. math::
      \mathrm{Cov}(a_i) = J_i H^{-1} J_i^\top

    It is that of the network linearized at params. The square roots of its diagonal are
    standard deviations of the logits: how uncertain the network is about an example,
    given the training data. Covariances between different examples are not returned.
    Examples are processed in blocks, so temporary memory does not grow with M.

    Args:
      posterior: A `Posterior`.
      x: Features `[M, n_0]`, floating, M >= 1; cast to the parameters' dtype.

    Returns:
      `[M, n_L, n_L]`, in the accumulation dtype. Variances are >= 0. Features whose
      squares are not finite give values that are not finite.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [0.0]])
      >>> posterior = jaxbce.laplace.posterior(params, x, y, 0.5)  # H is I
      >>> far = jnp.array([[0.0], [10.0]])
      >>> covariance = jaxbce.laplace.logit_covariance(posterior, far)
      >>> [round(v, 3) for v in covariance.ravel().tolist()]
      [1.0, 101.0]

    References:
      MacKay, The Evidence Framework Applied to Classification Networks, Neural
      Computation 4(5), 1992.
    """
    _check(posterior)
    x = replicate(_validate.features(x, posterior.params))
    return _covariance_in_blocks(posterior, _training(posterior), x)


@jit()
def predict_proba(posterior: Posterior, x: ArrayLike) -> jax.Array:
    r"""Probabilities averaged over the posterior, by the probit approximation.

    .. math::
      \hat y = \sigma\!\left(\frac{a}{\sqrt{1 + \pi v / 8}}\right)

    with the variance v of each logit. An uncertain logit moves its probability towards
    one half and never across it, so accuracy is that of the network. The log-loss
    rarely improves: it is often worse than the network's own with layers="all", and
    about equal with layers="last". Use it to find where the network is uncertain, not
    to improve the log-loss.

    Args:
      posterior: A `Posterior`.
      x: Features `[M, n_0]`, floating, M >= 1; cast to the parameters' dtype.

    Returns:
      Probabilities of label 1, `[M, n_L]`, in the accumulation dtype.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.ones((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [0.0]])
      >>> posterior = jaxbce.laplace.posterior(params, x, y, 0.5)
      >>> far = jnp.array([[8.0]])
      >>> for proba in (jaxbce.predict_proba(params, far),
      ...               jaxbce.laplace.predict_proba(posterior, far)):
      ...     print(f"{proba.item():.3f}")
      1.000
      0.813

    References:
      MacKay, The Evidence Framework Applied to Classification Networks, Neural
      Computation 4(5), 1992.
    """
    covariance = logit_covariance(posterior, x)
    variance = jnp.diagonal(covariance, axis1=1, axis2=2)  # [M, n_L]
    a = forward(posterior.params, replicate(jnp.asarray(x))).a[-1]
    return sigmoid(a / jnp.sqrt(1 + jnp.pi / 8 * variance))


@jit()
def influence(posterior: Posterior, x2: ArrayLike, y2: ArrayLike) -> jax.Array:
    r"""Change of the loss of each example when a training example is left out.

    .. math::
      I_{ij} = \delta_j^\top\, (J_j H^{-1} J_i^\top)\, s_i \delta_i
      = \langle G_j, H^{-1} G_i \rangle

    where :math:`G_j = J_j^\top \delta_j` and :math:`G_i = s_i J_i^\top \delta_i`. At a
    minimum, this approximates to first order the change of :math:`\ell_j`, the loss of
    example j of (x2, y2), when training example i is removed and the network is
    retrained. The Gauss-Newton matrix replaces the Hessian, and with layers="last" only
    the last layer is retrained. Positive entries belong to training examples that help:
    without them the loss would be larger. The loss of j includes pos_weight and no
    sample weight.

    Entries are exactly 0 for a training example of weight 0, and for examples whose
    δ_L is 0 (saturated and correctly classified).

    Args:
      posterior: A `Posterior`.
      x2: Features `[M, n_0]`, floating, M >= 1; cast to the parameters' dtype.
      y2: Labels in [0, 1], `[M, n_L]`, real or boolean.

    Returns:
      `[N, M]` in nats, in the accumulation dtype.

    Raises:
      TypeError: If an argument has an unsupported type or dtype.
      ValueError: If shapes do not match.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [0.0]])
      >>> posterior = jaxbce.laplace.posterior(params, x, y, 0.5)  # H is I
      >>> influence = jaxbce.laplace.influence(posterior, x, y)
      >>> bool(jnp.allclose(influence, 0.5 * jnp.eye(2), atol=1e-6))
      True

    References:
      Koh, Liang, Understanding Black-box Predictions via Influence Functions, 2017,
      arXiv:1703.04730.
    """
    _check(posterior)
    params = posterior.params
    x2 = _validate.features(x2, params, "x2")
    dtype, shape = posterior.y.dtype, (x2.shape[0], posterior.y.shape[1])
    y2 = _validate.labels(y2, shape, dtype, name="y2")
    training = _training(posterior)

    def project(x: jax.Array, delta: jax.Array) -> jax.Array:
        return jnp.einsum("dbo,bo->bd", _v(posterior, training, x)[0], delta)

    size = _examples_per_block(posterior, training.x.shape[0])
    examples = (training.x, training.delta)
    v_delta = map_over_blocks(project, examples, size)  # [N, D]

    def block(x: jax.Array, y: jax.Array) -> jax.Array:
        ones, p = jnp.ones(x.shape[0], dtype), posterior.pos_weight
        delta, _ = curvature.derivatives(params, forward(params, x), y, ones, p)
        x = jnp.where(jnp.all(delta == 0, axis=1)[:, None], 0, x)
        v, k = _v(posterior, training, x)
        product = jnp.einsum("dbo,bo->bd", v, delta) @ v_delta.T  # [B, N]
        if k is None:
            return product
        return jnp.einsum("nbpo,bo,np->bn", k, delta, training.delta) - product

    size = _examples_per_block(posterior, shape[0])
    return map_over_blocks(block, (replicate(x2), replicate(y2)), size).T


class LeaveOneOut(NamedTuple):
    """Predictions for each training example without it.

    Attributes:
      logits: The logits of each example after one Newton step without it, `[N, n_L]`.
      loss: The loss of each example at these logits, `Σ_o ℓ_io`, `[N]`. It includes
        pos_weight and no sample weight. For pos_weight 1 its mean estimates the
        log-loss on new examples.
      leverage: `tr(S_i J_i H⁻¹ J_iᵀ)`, `[N]`, from 0 (the example is ignored) to n_L
        (its logits depend on it alone). Its sum is the effective number of parameters,
        `tr(H⁻¹ Jᵀ S J)`.
    """

    logits: jax.Array
    loss: jax.Array
    leverage: jax.Array


@jit()
def leave_one_out(posterior: Posterior) -> LeaveOneOut:
    r"""Logits and loss of each training example without it, and its leverage.

    .. math::
      a_i + Q_i (I - S_i Q_i)^{-1} s_i \delta_i, \qquad Q_i = J_i H^{-1} J_i^\top

    This is one Newton step of the objective without example i, from params that
    minimize the objective with it, in the network linearized at params. For one output
    it is :math:`a_i + Q_i s_i \delta_i / (1 - S_i Q_i)`.

    Examples of weight 0, and those whose δ_L is 0 (saturated and correctly
    classified), keep their logits. If N = 1, the covariance without the example is that
    of the prior, T⁻¹, and from a minimum the step leads to θ = 0. Since τ > 0, every
    eigenvalue of :math:`S_i Q_i` is below 1 in exact arithmetic. For P <= N n_L,
    :math:`1 - S_i Q_i` loses its digits where it comes near machine epsilon, as for an
    example that alone determines a direction if τ is tiny. It is kept above machine
    epsilon for one output. For such examples use float64.

    Args:
      posterior: A `Posterior`.

    Returns:
      `LeaveOneOut`, in the accumulation dtype.

    Raises:
      TypeError: If posterior is not a `Posterior`.
      ValueError: If its params are stacked networks; use `jax.vmap` for these.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [0.0]])
      >>> posterior = jaxbce.laplace.posterior(params, x, y, 0.5)
      >>> result = jaxbce.laplace.leave_one_out(posterior)
      >>> result.logits.round(3).ravel().tolist(), result.leverage.round(3).tolist()
      ([-2.0, 2.0], [0.5, 0.5])

    References:
      Nickl et al., The Memory-Perturbation Equation, 2023, arXiv:2310.19273.
    """
    _check(posterior)
    training = _training(posterior)
    root, delta = training.root, training.delta
    # With R = √S and C = I − R Q R:  Q (I − S Q)⁻¹ = Q + (R Q)ᵀ C⁻¹ R Q
    if _uses_kernel(posterior):  # from B⁻¹ = I − R J H⁻¹ Jᵀ R, without cancellation
        size = posterior.factor.shape[0]
        inverse = jnp.eye(size, dtype=root.dtype)
        inverse = solve_triangular(posterior.factor, inverse, lower=True)
        inverse = inverse.reshape(size, *root.shape)  # L⁻¹, [D, N, n_L]
        v, _ = _v(posterior, training, training.x)
        covariance = _covariance(posterior, training.x, v)  # Q, [N, n_L, n_L]
        scaled = jnp.einsum("dno,dnp->nop", inverse, v)  # R Q
        remainder = jnp.einsum("dno,dnp->nop", inverse, inverse)  # C
    else:
        covariance = _covariance_in_blocks(posterior, training, training.x)
        scaled = root[:, :, None] * covariance
        identity = jnp.eye(root.shape[1], dtype=root.dtype)
        remainder = identity[None] - scaled * root[:, None, :]
        remainder = _clip_diagonal(remainder, float(jnp.finfo(root.dtype).eps))
    rhs = jnp.einsum("nop,np->no", scaled, delta)
    solved = jnp.linalg.solve(remainder, rhs[:, :, None])[:, :, 0]
    step = jnp.einsum("nop,np->no", covariance, delta)
    step += jnp.einsum("nop,no->np", scaled, solved)
    logits = training.logits + step
    labels = label_weights(replicate(posterior.y), posterior.pos_weight)
    leverage = jnp.einsum("noo,no->n", scaled, root)
    return LeaveOneOut(
        logits=logits,
        loss=jnp.sum(elementwise(logits, *labels), axis=1),
        leverage=leverage.clip(0, root.shape[1]),  # rounding exceeds it for tiny τ
    )


@jit()
def log_evidence(posterior: Posterior) -> jax.Array:
    r"""The Laplace approximation of the log marginal likelihood.

    .. math::
      -\sum_i s_i \ell_i - \frac12 \sum_k \tau_k \|\theta_k\|^2 - \frac12 \log\det B

    It can be differentiated with respect to the prior precisions, for example to choose
    one per layer by gradient ascent, and with respect to params; see `posterior`. With
    soft labels, weights or pos_weight the likelihood is a weighted one. For
    layers="last" the sum over k, and B, are those of the last layer.

    Args:
      posterior: A `Posterior`.

    Returns:
      The log evidence in nats, a scalar in the accumulation dtype.

    Raises:
      TypeError: If posterior is not a `Posterior`.
      ValueError: If its params are stacked networks; use `jax.vmap` for these.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> params = (jaxbce.Layer(w=jnp.zeros((1, 1)), b=jnp.zeros(1)),)
      >>> x, y = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [0.0]])
      >>> def evidence(tau):
      ...     posterior = jaxbce.laplace.posterior(params, x, y, tau)
      ...     return jaxbce.laplace.log_evidence(posterior)
      >>> value, slope = jax.value_and_grad(evidence)(0.5)
      >>> round(float(value), 4), round(float(slope), 4)  # −2 log 2 − log(1 + 0.5 / τ)
      (-2.0794, 1.0)

    References:
      MacKay, A Practical Bayesian Framework for Backpropagation Networks, Neural
      Computation 4(3), 1992. Immer et al., Scalable Marginal Likelihood Estimation for
      Model Selection in Deep Learning, 2021, arXiv:2104.04975.
    """
    _check(posterior)
    params, x, y, sample_weight, pos_weight, tau, factor = posterior
    loss = gradients.loss(
        params,
        x,
        y,
        sample_weight=sample_weight,
        pos_weight=pos_weight,
        reduction="sum",
    )
    penalty = sum(
        tau_k * jnp.sum(jnp.square(leaf.astype(tau.dtype)))
        for tau_k, layer in zip(tau, params[-tau.shape[0] :], strict=True)
        for leaf in layer
    )
    log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
    return -loss - penalty / 2 - log_det / 2
