"""Is a gradient right? Three oracles, leaf by leaf and at several points.

They share little and fail apart: automatic differentiation, in float64, of the loss
as anyone would write it; the complex step, in NumPy, exact to round-off and free of
JAX; central differences, in real arithmetic alone.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbce import _validate
from jaxbce.network import Params

# The relative error allowed a leaf, ‖g − oracle‖ / ‖oracle‖, by the dtype fun runs in:
# in float64 10⁴ units of round-off, for sums over many rows; in the others about 100,
# since each layer rounds. A gradient that is wrong is wrong by far more.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2.0**-4}
# In the tail the logits are exact: what is left is the rounding of exp and a sum.
TAIL_TOLERANCES = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2.0**-7}
TAIL_LOGITS = (5.0, 10.0, 15.0, 20.0, 40.0, 80.0)

_COMPLEX_STEP = 1e-30
_DIFFERENCE_STEP = 1e-6
_DIFFERENCE_TOLERANCE = 1e-6  # h² times a third derivative, and to spare
# A leaf is judged by its own norm, or by this part of the whole gradient's if that is
# more: where a leaf's rows cancel, nothing but their round-off is left of it.
LEAST_SHARES = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 1.0}


class Comparison(NamedTuple):
    """One leaf of a gradient against one oracle, at the worst of the points.

    Attributes:
      leaf: "value", or the leaf's path, such as "[0].w".
      oracle: "autodiff", "complex step" or "differences".
      point: "given", "random 1" to "random 3", or "kink 1" (a layer), ...
      error: Relative error; inf where there is nothing to compare.
      tolerance: The largest error that passes.
      reason: What is wrong, in words; empty where nothing is.
    """

    leaf: str
    oracle: str
    point: str
    error: float
    tolerance: float
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not."""
        return self.error <= self.tolerance


class TailError(NamedTuple):
    """Relative error of the output bias's gradient where every logit is one value.

    Attributes:
      logit: The logit; positive for label 1, negative for label 0, so that the
        gradient is σ(−|logit|), small but not 0.
      label: The label of every row.
      error: Relative error against σ(−|logit|) in float64.
      tolerance: The largest error that counts as exact.
    """

    logit: float
    label: int
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within rounding; a NaN is not."""
        return self.error <= self.tolerance


class Report(NamedTuple):
    """What `check_gradients` found; `str(report)` is a table.

    Attributes:
      comparisons: One `Comparison` for the value and for each leaf and oracle.
      tail: One `TailError` for each large logit and label. It has a verdict of its
        own: ŷ − y is the right gradient in exact arithmetic, and no good here.
    """

    comparisons: tuple[Comparison, ...]
    tail: tuple[TailError, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison passed; the tail is not counted."""
        return all(c.passed for c in self.comparisons)

    @property
    def tail_passed(self) -> bool:
        """Whether the gradient is exact at every large logit."""
        return all(t.passed for t in self.tail)

    def __str__(self) -> str:
        lines = ["leaf    reference     worst at     error   allowed  verdict"]
        for c in self.comparisons:
            lines.append(
                f"{c.leaf:<7} {c.oracle:<13} {c.point:<9} {c.error:>8.1e}  "
                f"{c.tolerance:>8.1e}  {'ok' if c.passed else 'WRONG: ' + c.reason}"
            )
        lines += ["", "logit   label    error   allowed  in the tail"]
        for t in self.tail:
            lines.append(
                f"{t.logit:>5g} {t.label:>7} {t.error:>8.1e}  {t.tolerance:>8.1e}  "
                f"{'ok' if t.passed else 'inexact'}"
            )
        lines += [
            "",
            f"gradient: {'passed' if self.passed else 'FAILED'}, "
            f"tail: {'exact' if self.tail_passed else 'INEXACT'}",
        ]
        return "\n".join(lines)


class _Point(NamedTuple):
    """Where gradients are compared; arrays are NumPy's, float64."""

    name: str
    params: Any
    x: np.ndarray
    y: np.ndarray


def check_gradients(
    fun: Callable[..., tuple[Any, Any]],
    params: Params,
    x: jax.Array,
    y: jax.Array,
    *,
    sample_weight: jax.Array | None = None,
    pos_weight: jax.Array | float = 1.0,
    reduction: str = "mean",
    dtype: Any = "float64",
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Checks a gradient of binary cross-entropy, anyone's, against three oracles.

    `fun` is compared at the point given, at three with every parameter perturbed, and
    at one for each hidden layer on the kink of its relus (a row of zeros, and no biases
    up to there), where relu′(0) = 0 is expected. The oracles:

    * autodiff: `jax.grad` in float64 of the loss as anyone would write it;
    * complex step: Im L(θ + ihv) / h with h = 1e-30, in complex128;
    * differences: (L(θ + hv) − L(θ − hv)) / 2h with h = 1e-6.

    The first sees every entry of a leaf; for the other two v is a unit vector in that
    leaf, half along the gradient being checked and half at random. No relu switches
    between θ − hv and θ + hv: each is held as it is at θ.

    Args:
      fun: What is checked: a function with the signature of
        `jaxbce.value_and_grad`, `(params, x, y, ...) -> (value, grads)`. The weights
        and the reduction are passed on only where they are not the defaults.
      params: A tuple of `Layer`, any accepted dtype.
      x: Features `[N, n_0]`.
      y: Labels in [0, 1], `[N, n_L]`.
      sample_weight: Weights of the rows, `[N]`; None is all ones.
      pos_weight: Weight of the positive class, a scalar or `[n_L]`.
      reduction: "mean" or "sum".
      dtype: The dtype that fun is run in; the oracles are always in float64.
      tolerance: The relative error allowed; None is `TOLERANCES[dtype]`, and 1e-6 for
        differences. In float32 a relu whose input rounds across 0 can exceed it.
      seed: Seed of the random points and directions.

    Returns:
      A `Report`. JAX's 64-bit mode is afterwards as it was before.

    Raises:
      TypeError: If an argument is of a type or dtype that is not accepted.
      ValueError: If shapes do not fit, or a value is not finite.

    Example:
      >>> import jax, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> x = jax.random.normal(jax.random.key(1), (8, 2))
      >>> y = (x[:, :1] > 0).astype(x.dtype)
      >>> jaxbce.check_gradients(jaxbce.value_and_grad, params, x, y).passed
      True

    References:
      Squire and Trapp, Using Complex Variables to Estimate Derivatives of Real
      Functions, SIAM Review 40(1), 1998.
    """
    dtype = _validate.float_dtype(dtype)
    options = _options(params, x, y, sample_weight, pos_weight, reduction)
    if tolerance is None:
        tolerance = TOLERANCES[dtype.name]
    if not 0 < tolerance < np.inf:
        raise ValueError(f"tolerance is {tolerance}; a number > 0 is accepted")
    share = LEAST_SHARES[dtype.name]
    rng = np.random.default_rng(seed)

    def run(point: _Point, **options: Any) -> tuple[float, list[np.ndarray]]:
        with jax.enable_x64(dtype.name == "float64"):
            arguments = jax.tree.map(lambda t: jnp.asarray(t, dtype), point[1:])
            result = fun(*arguments, **options)
            if not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    f"fun returned a {type(result).__name__}; a tuple (value, grads) "
                    "is accepted"
                )
            value, grads = result
            leaves = [np.asarray(g) for g in jax.tree.leaves(grads)]
            if not leaves or any(map(np.iscomplexobj, leaves)):
                raise TypeError(
                    "fun returned grads that are empty or complex; a real array for "
                    "each leaf of params is accepted"
                )
            return float(value), [_double(g) for g in leaves]

    # Rounded to the dtype first, so that fun and the oracles see the same numbers.
    given = _Point("given", *_rounded((params, x, y), dtype))
    worst: dict[tuple[str, str], Comparison] = {}
    for point in _points(given, rng, dtype):
        value, grads = run(point, **options)
        for c in _compare(point, value, grads, options, tolerance, share, rng):
            seen = worst.setdefault((c.leaf, c.oracle), c)
            if c.error / c.tolerance > seen.error / seen.tolerance:
                worst[c.leaf, c.oracle] = c
    tail = [
        _tail_error(logit, run(_tail_point(given, logit))[1][-1], dtype.name)
        for size in TAIL_LOGITS
        for logit in (size, -size)
    ]
    return Report(tuple(worst.values()), tuple(tail))


def _options(
    params: Params, x: Any, y: Any, sample_weight: Any, pos_weight: Any, reduction: Any
) -> dict[str, Any]:
    """Checks the arguments; returns those that are not the defaults, by name."""
    rows = _validate.features(x, params).shape[0]
    outputs = params[-1].w.shape[1]
    _validate.labels(y, (rows, outputs), jnp.float32)
    _validate.pos_weight(pos_weight, outputs, jnp.float32)
    _validate.reduction(reduction)
    options: dict[str, Any] = {}
    if sample_weight is not None:
        _validate.sample_weight(sample_weight, rows, jnp.float32)
        options["sample_weight"] = _double(sample_weight)
    if np.ndim(pos_weight) or pos_weight != 1:
        options["pos_weight"] = _double(pos_weight)
    for name, value in {"params": params, "x": x, "y": y, **options}.items():
        if not all(np.isfinite(_double(t)).all() for t in jax.tree.leaves(value)):
            raise ValueError(f"{name} has a NaN or infinite value; finite is accepted")
    if reduction != "mean":
        options["reduction"] = reduction
    return options


def _points(given: _Point, rng: np.random.Generator, dtype: Any) -> Iterator[_Point]:
    def perturbed(leaf: np.ndarray) -> np.ndarray:
        scale = 0.05 + 0.3 * np.sqrt(np.mean(leaf**2))
        return leaf + scale * rng.normal(size=leaf.shape)

    yield given
    for i in range(1, 4):
        params = _rounded(jax.tree.map(perturbed, given.params), dtype)
        yield given._replace(name=f"random {i}", params=params)
    # A row of zeros and no biases up to layer k put that row on layer k's kink; the
    # biases above it let a wrong mask there be seen.
    x = np.concatenate([np.zeros_like(given.x[:1]), given.x[1:]])
    above = _rounded(jax.tree.map(perturbed, given.params), dtype)
    for k in range(1, len(given.params)):
        params = tuple(
            layer._replace(b=np.zeros_like(layer.b)) if i < k else layer
            for i, layer in enumerate(above)
        )
        yield given._replace(name=f"kink {k}", params=params, x=x)


def _compare(
    point: _Point,
    value: float,
    grads: list[np.ndarray],
    options: dict[str, Any],
    tolerance: float,
    least_share: float,
    rng: np.random.Generator,
) -> Iterator[Comparison]:
    """One point's comparisons: the value, then each leaf with each oracle."""
    with jax.enable_x64(True):
        true_value, true_grads = jax.tree.map(
            _double, _loss_and_autodiff(*point[1:], **options)
        )
    error = _relative(abs(value - true_value), abs(true_value))
    reason = f"is {value:.6g} for {true_value:.6g}"
    yield Comparison("value", "autodiff", point.name, error, tolerance, reason)

    truths, _ = jax.tree.flatten_with_path(true_grads)
    if len(grads) != len(truths):
        reason = f"has {len(grads)} leaves, params have {len(truths)}"
        yield Comparison("all", "autodiff", point.name, np.inf, tolerance, reason)
        return
    whole = np.sqrt(sum(np.sum(truth**2) for _, truth in truths))
    for i, (g, (path, truth)) in enumerate(zip(grads, truths, strict=True)):
        leaf = jax.tree_util.keystr(path)
        if g.shape != truth.shape:
            reason = f"has shape {g.shape} for {truth.shape}"
            yield Comparison(leaf, "autodiff", point.name, np.inf, tolerance, reason)
            continue
        scale = max(np.linalg.norm(truth), least_share * whole)
        reason = _diagnose(g, truth, float(tolerance * scale))
        v = rng.normal(size=g.shape)
        v *= np.copysign(1 / np.linalg.norm(v), np.sum(v * g))
        v += g / (np.linalg.norm(g) or 1)
        v /= np.linalg.norm(v)
        along = np.sum(g * v)
        exact, slope = _slopes(point, i, v, options)
        roundoff = 16 * np.finfo(float).eps * abs(true_value) / _DIFFERENCE_STEP
        for oracle, difference, allowed in (
            ("autodiff", np.linalg.norm(g - truth), tolerance),
            ("complex step", abs(along - exact), tolerance),
            (
                "differences",
                abs(along - slope),
                tolerance + _DIFFERENCE_TOLERANCE + _relative(roundoff, scale),
            ),
        ):
            error = _relative(difference, scale)
            yield Comparison(leaf, oracle, point.name, error, allowed, reason)


def _slopes(
    point: _Point, i: int, v: np.ndarray, options: dict[str, Any]
) -> tuple[float, float]:
    """The loss's slope along v in leaf i, by complex step and by differences."""
    leaves, tree = jax.tree.flatten(point.params)
    active = []
    h = point.x
    for w, b in point.params[:-1]:
        a = h @ w + b
        active.append(a > 0)
        h = np.where(active[-1], a, 0)

    def at(step: complex) -> Any:
        params = tree.unflatten([*leaves[:i], leaves[i] + step * v, *leaves[i + 1 :]])
        return _loss_numpy(params, point.x, point.y, active, **options)

    exact = at(1j * _COMPLEX_STEP).imag / _COMPLEX_STEP
    slope = (at(_DIFFERENCE_STEP) - at(-_DIFFERENCE_STEP)) / (2 * _DIFFERENCE_STEP)
    return exact, slope


def _loss(
    params: Any,
    x: Any,
    y: Any,
    sample_weight: Any = None,
    pos_weight: Any = 1.0,
    reduction: str = "mean",
) -> jax.Array:
    """The loss with nothing of the rest of the package in it, for `jax.grad`."""
    h = x
    for w, b in params[:-1]:
        h = jax.nn.relu(h @ w + b[None, :])
    a = h @ params[-1].w + params[-1].b[None, :]
    log_p, log_not_p = jax.nn.log_sigmoid(a), jax.nn.log_sigmoid(-a)
    p = jnp.broadcast_to(pos_weight, y.shape)
    ell = -jnp.sum(p * y * log_p + (1 - y) * log_not_p, axis=1)
    s = jnp.ones(len(ell)) if sample_weight is None else sample_weight
    return jnp.sum(s * ell) / (jnp.sum(s) if reduction == "mean" else 1)


_loss_and_autodiff = jax.jit(jax.value_and_grad(_loss), static_argnames="reduction")


def _loss_numpy(
    params: Any,
    x: np.ndarray,
    y: np.ndarray,
    active: list[np.ndarray],
    sample_weight: Any = None,
    pos_weight: Any = 1.0,
    reduction: str = "mean",
) -> Any:
    """The loss in NumPy, real or complex, with the relus in `active` let through."""

    def softplus(a: Any) -> Any:
        positive = a.real > 0
        return np.where(positive, a, 0) + np.log1p(np.exp(np.where(positive, -a, a)))

    h = x
    for (w, b), on in zip(params[:-1], active, strict=True):
        h = np.where(on, h @ w + b, 0)
    a = h @ params[-1].w + params[-1].b
    ell = np.sum(pos_weight * y * softplus(-a) + (1 - y) * softplus(a), axis=1)
    s = np.ones(len(ell)) if sample_weight is None else sample_weight
    return np.sum(s * ell) / (np.sum(s) if reduction == "mean" else 1)


def _diagnose(g: np.ndarray, truth: np.ndarray, allowed: float) -> str:
    """What is wrong with a leaf, in words; empty if nothing is."""
    if not np.isfinite(g).all():
        return f"{np.sum(~np.isfinite(g))} of {g.size} entries are not finite"
    if np.linalg.norm(g - truth) <= allowed:
        return ""
    factor = np.sum(g * truth) / (np.sum(truth**2) or 1)
    if factor and np.linalg.norm(g - factor * truth) <= allowed:
        return f"is {factor:.6g} times what it should be"
    if g.shape == g.T.shape and np.linalg.norm(g.T - truth) <= allowed:
        return "is transposed"
    index = tuple(map(int, np.unravel_index(np.argmax(abs(g - truth)), g.shape)))
    return f"at {list(index)} is {g[index]:.6g} for {truth[index]:.6g}"


def _tail_point(given: _Point, logit: float) -> _Point:
    """A few rows and the network with every logit just `logit`; labels agree."""
    *hidden, last = given.params
    last = last._replace(w=np.zeros_like(last.w), b=np.full_like(last.b, logit))
    y = np.full_like(given.y, logit > 0)
    return given._replace(params=(*hidden, last), x=given.x[:8], y=y[:8])


def _tail_error(logit: float, grad_b: np.ndarray, dtype: str) -> TailError:
    size = np.exp(-abs(logit)) / (1 + np.exp(-abs(logit)))
    truth = -size if logit > 0 else size
    error = float(np.max(abs(grad_b - truth)) / size)
    return TailError(logit, int(logit > 0), error, TAIL_TOLERANCES[dtype])


def _double(t: Any) -> np.ndarray:
    return np.asarray(t, np.float64)


def _rounded(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda t: _double(np.asarray(t).astype(dtype)), tree)


def _relative(difference: Any, scale: Any) -> float:
    if np.isnan(difference):  # else a later point could hide it
        return np.inf
    if scale == 0:
        return 0.0 if difference == 0 else np.inf
    return float(difference / scale)
