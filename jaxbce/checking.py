"""Comparison of a gradient with three references, leaf by leaf, at several positions.

The references share little code, so they are unlikely to fail together: automatic
differentiation in float64 of a plain implementation of the loss; the complex step in
NumPy, which is exact up to rounding and independent of JAX; and central differences,
which use real arithmetic only.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbce import _validate
from jaxbce._diagnosis import name_mistakes
from jaxbce._mistakes import Step
from jaxbce.network import Layer, Params

# The tolerated relative error of a leaf, ‖g − reference‖ / ‖reference‖, by the dtype in
# which fun is run. In float64 it is about 10⁴ units of round-off, which allows for sums
# over many examples; in float32 about 150, and in bfloat16, where each layer rounds,
# about 20. Errors of a wrong gradient are far larger.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2.0**-4}
# In the tail the logits are exact, so only exp and a sum are rounded.
TAIL_TOLERANCES = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2.0**-7}
TAIL_LOGITS = (5.0, 10.0, 15.0, 20.0, 40.0, 80.0)

# Where the largest logit has this absolute value and all labels disagree with the
# logits, a clamp of ŷ changes the gradient, but ŷ − y keeps its digits.
_LARGE_LOGIT = 20.0
_LARGE = "large"  # the name of this position
_SINGLE = (1e-9, 1e-6)  # relative errors that suggest float32

_COMPLEX_STEP = 1e-30
_DIFFERENCE_STEP = 1e-6
_DIFFERENCE_TOLERANCE = 1e-6  # far above h² times a third derivative
# The error of a leaf is relative to its own norm, or to this fraction of the norm of
# the whole gradient if that is larger. Where the contributions of the examples cancel,
# a leaf consists of round-off only.
LEAST_SHARES = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 1.0}


class Comparison(NamedTuple):
    """One leaf of a gradient and one reference, at the parameters with the worst error.

    Attributes:
      leaf: "value", or the path of the leaf, such as "[0].w".
      reference: "autodiff", "complex step" or "differences".
      point: "given", "random 1" to "random 3", "kink k" for hidden layer k, or "large"
        for large logits.
      error: Relative error; inf if the leaves cannot be compared.
      tolerance: The largest error that passes.
      reason: Description of the mistake, if the comparison did not pass.
    """

    leaf: str
    reference: str
    point: str
    error: float
    tolerance: float
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; False for NaN."""
        return self.error <= self.tolerance


class TailError(NamedTuple):
    """Relative error of the gradient of the output biases if all logits are equal.

    Attributes:
      logit: The logit: positive for label 1, negative for label 0, so that the absolute
        value of the gradient is σ(−|logit|), small but not 0.
      label: The label of every example.
      error: Relative error, with σ(−|logit|) in float64 as the reference.
      tolerance: The largest error that counts as exact.
    """

    logit: float
    label: int
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; False for NaN."""
        return self.error <= self.tolerance


class Report(NamedTuple):
    """Result of `check_gradients`; `str(report)` is a table.

    Attributes:
      comparisons: One `Comparison` for the value, and one per leaf and reference.
      tail: One `TailError` per large logit and label. These do not count in `passed`:
        ŷ − y is right in exact arithmetic, but inaccurate in the tails.
      mistakes: What a wrong leaf looks like, if it equals the gradient with a common
        mistake, such as {"[0].w": "looks like the gradient without the relu mask"}.
        Layers are in the order of the backward pass.
    """

    comparisons: tuple[Comparison, ...]
    tail: tuple[TailError, ...]
    mistakes: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every comparison passed; the tail does not count."""
        return all(c.passed for c in self.comparisons)

    @property
    def tail_passed(self) -> bool:
        """Whether the gradient is exact at every large logit."""
        return all(t.passed for t in self.tail)

    def __str__(self) -> str:
        lines = ["leaf    reference     worst at     error   allowed  verdict"]
        for c in self.comparisons:
            lines.append(
                f"{c.leaf:<7} {c.reference:<13} {c.point:<9} {c.error:>8.1e}  "
                f"{c.tolerance:>8.1e}  {'ok' if c.passed else 'WRONG: ' + c.reason}"
            )
        lines += ["", "logit   label    error   allowed  in the tail"]
        for t in self.tail:
            lines.append(
                f"{t.logit:>5g} {t.label:>7} {t.error:>8.1e}  {t.tolerance:>8.1e}  "
                f"{'ok' if t.passed else 'inexact'}"
            )
        if self.mistakes:
            lines += ["", *(f"{leaf} {text}" for leaf, text in self.mistakes.items())]
        lines += [
            "",
            f"gradient: {'passed' if self.passed else 'FAILED'}, "
            f"tail: {'exact' if self.tail_passed else 'INEXACT'}",
        ]
        return "\n".join(lines)


class _Position(NamedTuple):
    """Parameters and data at which gradients are compared, as float64 NumPy arrays."""

    name: str
    params: Any
    x: np.ndarray
    y: np.ndarray


def check_gradients(
    fun: Callable[..., tuple[Any, Any]],
    params: Params,
    x: ArrayLike,
    y: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    pos_weight: ArrayLike = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    dtype: DTypeLike | None = "float64",
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Compares any gradient of binary cross-entropy with three references.

    The gradient is compared at the given params and at three random perturbations of
    them. For each hidden layer it is also compared on the kink of the relus, where
    relu′(0) = 0 is expected: the first example and the biases up to that layer are set
    to 0. With autodiff alone it is also compared at large logits, where a clamp of ŷ
    shows: the last layer is scaled so that the largest is 20, and every label disagrees
    with its logit. The references are

    * autodiff: `jax.grad` in float64 of a plain implementation of the loss;
    * complex step: Im L(θ + ihv) / h with h = 1e-30, in complex128;
    * differences: (L(θ + hv) − L(θ − hv)) / 2h with h = 1e-6.

    The first compares every entry of a leaf. The other two compare the derivative along
    a unit vector v in the leaf, the normalized sum of a random direction and the
    direction of the gradient being checked. Every relu is kept in its state at θ, so
    none switches between θ − hv and θ + hv.

    A wrong leaf is also compared with what about forty common mistakes give, such as a
    missing relu mask. If it equals one of them at all these parameters, the report
    names the mistake, also in its field `mistakes`. Where a leaf is wrong only because
    of a mistake in a layer above, the report says so.

    Args:
      fun: The function to check, with the signature of `jaxbce.value_and_grad`:
        `(params, x, y, ...) -> (value, grads)`. Weights and the reduction are passed
        only if they differ from the defaults.
      params: A tuple of `Layer` of any supported dtype.
      x: Features `[N, n_0]`.
      y: Labels in [0, 1], `[N, n_L]`.
      sample_weight: Weights >= 0 of the examples, `[N]`, not all 0; None is all ones.
      pos_weight: Weight >= 0 of the positive class, a scalar or `[n_L]`.
      reduction: "mean" or "sum".
      dtype: The dtype in which fun is run. The references always use float64.
      tolerance: The tolerated relative error; None is `TOLERANCES[dtype]`. For
        differences 1e-6 is added. In float32 the error can be larger if the input of a
        relu is rounded across 0.
      seed: Seed of the random parameters and directions.

    Returns:
      A `jaxbce.checking.Report`, with a `Comparison` for each leaf and reference.
      `Report`, `Comparison` and `TOLERANCES` are in `jaxbce.checking`. The 64-bit mode
      of JAX is restored afterwards.

    Raises:
      TypeError: If an argument has an unsupported type or dtype, or fun does not return
        a number and grads.
      ValueError: If shapes do not match, or a value is not finite or out of range.

    Example:
      >>> import jax, jaxbce
      >>> params = jaxbce.init(jax.random.key(0), (2, 3, 1))
      >>> x = jax.random.normal(jax.random.key(1), (8, 2))
      >>> y = (x[:, :1] > 0).astype(x.dtype)
      >>> jaxbce.check_gradients(jaxbce.value_and_grad, params, x, y).passed
      True
      >>> def mine(params, x, y):
      ...     value, (_, last) = jaxbce.value_and_grad(params, x, y)
      ...     _, delta = jaxbce.deltas(params, jaxbce.forward(params, x), y)
      ...     delta = delta @ params[1].w.T / len(x)
      ...     return value, (jaxbce.Layer(x.T @ delta, delta.sum(0)), last)
      >>> report = jaxbce.check_gradients(mine, params, x, y)
      >>> report.passed, report.mistakes["[0].w"]
      (False, 'looks like the gradient without the relu mask')

    References:
      Squire and Trapp, Using Complex Variables to Estimate Derivatives of Real
      Functions, SIAM Review 40(1), 1998.
    """
    dtype = _validate.float_dtype(dtype)
    options = _options(params, x, y, sample_weight, pos_weight, reduction, dtype)
    if tolerance is None:
        tolerance = TOLERANCES[dtype.name]
    if not 0 < tolerance < np.inf:
        raise ValueError(f"expected tolerance to be a number > 0, got {tolerance}")
    least_share = LEAST_SHARES[dtype.name]
    rng = np.random.default_rng(seed)

    def run(position: _Position, **options: Any) -> tuple[float, list[np.ndarray]]:
        with jax.enable_x64(dtype.name == "float64"):
            arguments = jax.tree.map(lambda t: jnp.asarray(t, dtype), position[1:])
            value, grads = _split(fun(*arguments, **options))
            leaves = [np.asarray(g) for g in jax.tree.leaves(grads)]
            if not leaves or not all(map(_is_real, leaves)):
                raise TypeError(
                    "expected fun to return a real array for each leaf of params, got "
                    "grads that are empty or complex, or no numbers"
                )
            return value, [_double(g) for g in leaves]

    # Rounded to the dtype first, so that fun and the references use the same numbers.
    given = _Position("given", *_round((params, x, y), dtype))
    worst: dict[tuple[str, str], Comparison] = {}
    checked, wrong = [], set()
    for position in _positions(given, rng, dtype):
        value, grads = run(position, **options)
        if position.name != _LARGE:
            checked.append((position, grads))
        for c in _compare(position, value, grads, options, tolerance, least_share, rng):
            previous = worst.setdefault((c.leaf, c.reference), c)
            if position.name == _LARGE and not previous.passed:
                continue  # the leaf is wrong at any logits
            if not c.passed and position.name != _LARGE:
                wrong.add(c.leaf)
            if c.error / c.tolerance > previous.error / previous.tolerance:
                worst[c.leaf, c.reference] = c
    tail = [
        _tail_error(logit, run(_tail_position(given, logit))[1][-1], dtype.name)
        for size in TAIL_LOGITS
        for logit in (size, -size)
    ]
    comparisons = tuple(worst.values())
    wrong -= {"value"}
    mistakes = _name_mistakes(checked, wrong, options, tolerance, least_share)
    for c in reversed(comparisons):
        if not c.passed and c.leaf not in wrong | {"value"}:
            mistakes[c.leaf] = "is wrong only at large logits, as with ŷ clamped"
    return Report(comparisons, tuple(tail), mistakes)


def _split(result: Any) -> tuple[float, Any]:
    """Checks what fun returns; returns the value and grads."""
    got = type(result).__name__
    if isinstance(result, tuple):
        got = f"({', '.join(type(item).__name__ for item in result)})"
        numbers = (int, float, np.generic, np.ndarray, jax.Array)
        if len(result) == 2 and isinstance(result[0], numbers):
            value, grads = result
            if np.size(value) == 1 and _is_real(np.asarray(value)):
                return _double(value).item(), grads
            got = f"a value of shape {np.shape(value)} and dtype {value.dtype}"
    raise TypeError(
        "expected fun to return (value, grads) with a real number as value, as "
        f"jaxbce.value_and_grad does, got {got}"
    )


def _is_real(t: np.ndarray) -> bool:
    kinds = jnp.floating, jnp.integer, jnp.bool
    return any(jnp.issubdtype(t.dtype, kind) for kind in kinds)


def _options(
    params: Params,
    x: Any,
    y: Any,
    sample_weight: Any,
    pos_weight: Any,
    reduction: Any,
    dtype: Any,
) -> dict[str, Any]:
    """Checks the arguments; returns those that differ from the defaults, by name."""
    n = _validate.features(x, params).shape[0]
    outputs = params[-1].w.shape[1]
    _validate.labels(y, (n, outputs), jnp.float32)
    _validate.pos_weight(pos_weight, outputs, jnp.float32)
    _validate.reduction(reduction)
    # Also where the weight is 0, because the references use every example.
    _validate.finite("x", x, dtype)
    _validate.label_values("y", y)
    _validate.weights("pos_weight", pos_weight, dtype)
    options: dict[str, Any] = {}
    if sample_weight is not None:
        _validate.sample_weight(sample_weight, n, jnp.float32)
        _validate.weights("sample_weight", sample_weight, dtype)
        _validate.some_weight("sample_weight", sample_weight, dtype)
        options["sample_weight"] = _double(sample_weight)
    if np.ndim(pos_weight) or pos_weight != 1:
        options["pos_weight"] = _double(pos_weight)
    for path, leaf in jax.tree.leaves_with_path(params):
        _validate.finite(f"params{jax.tree_util.keystr(path)}", leaf, dtype)
    if reduction != "mean":
        options["reduction"] = reduction
    return options


def _positions(
    given: _Position, rng: np.random.Generator, dtype: Any
) -> Iterator[_Position]:
    def perturb(leaf: np.ndarray) -> np.ndarray:
        scale = 0.05 + 0.3 * np.sqrt(np.mean(leaf**2))
        return leaf + scale * rng.normal(size=leaf.shape)

    yield given
    for i in range(1, 4):
        params = _round(jax.tree.map(perturb, given.params), dtype)
        yield given._replace(name=f"random {i}", params=params)
    # An example of zeros is on the kink of layer k if the biases up to it are 0. The
    # other biases are not 0, so that a wrong mask of layer k changes the gradient.
    x = np.concatenate([np.zeros_like(given.x[:1]), given.x[1:]])
    perturbed = _round(jax.tree.map(perturb, given.params), dtype)
    for k in range(1, len(given.params)):
        params = tuple(
            layer._replace(b=np.zeros_like(layer.b)) if i < k else layer
            for i, layer in enumerate(perturbed)
        )
        yield given._replace(name=f"kink {k}", params=params, x=x)
    a = _logits(perturbed, given.x)
    if largest := np.max(np.abs(a)):
        *hidden, last = perturbed
        last = jax.tree.map(lambda leaf: leaf * (_LARGE_LOGIT / largest), last)
        params, y = _round(((*hidden, last), np.where(a > 0, 0.0, 1.0)), dtype)
        yield given._replace(name=_LARGE, params=params, y=y)


def _logits(params: Any, x: np.ndarray) -> np.ndarray:
    for w, b in params[:-1]:
        x = np.maximum(x @ w + b, 0)
    return x @ params[-1].w + params[-1].b


def _compare(
    position: _Position,
    value: float,
    grads: list[np.ndarray],
    options: dict[str, Any],
    tolerance: float,
    least_share: float,
    rng: np.random.Generator,
) -> Iterator[Comparison]:
    """The comparisons at one position: the value, then each leaf and reference.

    At large logits only the leaves are compared, and with autodiff alone: a value from
    ŷ loses digits there, and the logits are too steep for differences.
    """
    with jax.enable_x64(True):
        true_value, true_grads = jax.tree.map(
            _double, _loss_and_autodiff(*position[1:], **options)
        )
    error = _relative(abs(value - true_value), abs(true_value))
    if position.name != _LARGE:
        reason = _expected(true_value, value) + _suspect_float32(error, tolerance)
        yield Comparison("value", "autodiff", position.name, error, tolerance, reason)

    true_leaves, _ = jax.tree.flatten_with_path(true_grads)
    if len(grads) != len(true_leaves):
        reason = f"expected {len(true_leaves)} leaves, got {len(grads)}"
        yield Comparison("all", "autodiff", position.name, np.inf, tolerance, reason)
        return
    whole_norm = np.sqrt(sum(np.sum(truth**2) for _, truth in true_leaves))
    for i, (g, (path, truth)) in enumerate(zip(grads, true_leaves, strict=True)):
        leaf = jax.tree_util.keystr(path)
        if g.shape != truth.shape:
            reason = f"expected shape {truth.shape}, got {g.shape}"
            yield Comparison(leaf, "autodiff", position.name, np.inf, tolerance, reason)
            continue
        scale = max(np.linalg.norm(truth), least_share * whole_norm)
        error = _relative(np.linalg.norm(g - truth), scale)
        reason = _diagnose(g, truth, float(tolerance * scale))
        if position.name == _LARGE:
            yield Comparison(leaf, "autodiff", position.name, error, tolerance, reason)
            continue
        if reason:
            reason += _suspect_float32(error, tolerance)
        with np.errstate(invalid="ignore"):  # where g is infinite
            v = rng.normal(size=g.shape)
            v *= np.copysign(1 / np.linalg.norm(v), np.sum(v * g))
            v += g / (np.linalg.norm(g) or 1)
            v /= np.linalg.norm(v)
            derivative = np.sum(g * v)
        complex_step, quotient = _directional_derivatives(position, i, v, options)
        roundoff = 16 * np.finfo(float).eps * abs(true_value) / _DIFFERENCE_STEP
        for reference, difference, allowed in (
            ("autodiff", np.linalg.norm(g - truth), tolerance),
            ("complex step", abs(derivative - complex_step), tolerance),
            (
                "differences",
                abs(derivative - quotient),
                tolerance + _DIFFERENCE_TOLERANCE + _relative(roundoff, scale),
            ),
        ):
            error = _relative(difference, scale)
            yield Comparison(leaf, reference, position.name, error, allowed, reason)


def _name_mistakes(
    checked: list[tuple[Any, Any]],
    wrong: set[str],
    options: dict[str, Any],
    tolerance: float,
    least_share: float,
) -> dict[str, str]:
    """The known mistakes that wrong leaves look like, by leaf."""
    if not wrong or "all" in wrong:  # "all": some leaves are missing
        return {}
    with jax.enable_x64(True), np.errstate(all="ignore"):
        steps = []
        for (_, *arguments), leaves in checked:
            grads = tuple(map(Layer, leaves[::2], leaves[1::2]))
            steps.append(Step.at_output(grads, *arguments, **options))
        return name_mistakes(steps, wrong, tolerance, least_share)


def _directional_derivatives(
    position: _Position, i: int, v: np.ndarray, options: dict[str, Any]
) -> tuple[float, float]:
    """The derivative along v in leaf i, by the complex step and by differences."""
    leaves, tree = jax.tree.flatten(position.params)
    active = []
    h = position.x
    for w, b in position.params[:-1]:
        a = h @ w + b
        active.append(a > 0)
        h = np.where(active[-1], a, 0)

    def loss(step: complex) -> Any:
        params = tree.unflatten([*leaves[:i], leaves[i] + step * v, *leaves[i + 1 :]])
        return _loss_numpy(params, position.x, position.y, active, **options)

    complex_step = loss(1j * _COMPLEX_STEP).imag / _COMPLEX_STEP
    difference = loss(_DIFFERENCE_STEP) - loss(-_DIFFERENCE_STEP)
    return complex_step, difference / (2 * _DIFFERENCE_STEP)


def _loss(
    params: Any,
    x: Any,
    y: Any,
    sample_weight: Any = None,
    pos_weight: Any = 1.0,
    reduction: str = "mean",
) -> jax.Array:
    """The loss, implemented independently of the rest of the package."""
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
    """The loss in NumPy, real or complex; relus are on where `active` is True."""

    def softplus(a: Any) -> Any:
        positive = a.real > 0
        return np.where(positive, a, 0) + np.log1p(np.exp(np.where(positive, -a, a)))

    h = x
    for (w, b), mask in zip(params[:-1], active, strict=True):
        h = np.where(mask, h @ w + b, 0)
    a = h @ params[-1].w + params[-1].b
    ell = np.sum(pos_weight * y * softplus(-a) + (1 - y) * softplus(a), axis=1)
    s = np.ones(len(ell)) if sample_weight is None else sample_weight
    return np.sum(s * ell) / (np.sum(s) if reduction == "mean" else 1)


def _diagnose(g: np.ndarray, truth: np.ndarray, allowed: float) -> str:
    """Describes what is wrong with a leaf; empty if nothing is."""
    if not np.isfinite(g).all():
        return f"{np.sum(~np.isfinite(g))} of {g.size} entries are not finite"
    if np.linalg.norm(g - truth) <= allowed:
        return ""
    factor = np.sum(g * truth) / (np.sum(truth**2) or 1)
    # A factor multiplies the rounding as well.
    if factor and np.linalg.norm(g - factor * truth) <= allowed * max(1, abs(factor)):
        if abs(factor - 1) < 1e-5:
            sign = "+" if factor > 1 else "-"
            return f"is 1 {sign} {abs(factor - 1):.2g} times what it should be"
        return f"is {factor:.6g} times what it should be"
    if g.shape == g.T.shape and np.linalg.norm(g.T - truth) <= allowed:
        return "is transposed"
    index = tuple(map(int, np.unravel_index(np.argmax(abs(g - truth)), g.shape)))
    return _expected(truth[index], g[index], f" at {list(index)}")


def _expected(truth: float, got: float, where: str = "") -> str:
    """Both numbers, with as many digits as tell them apart."""
    pairs = ((f"{truth:.{n}g}", f"{got:.{n}g}") for n in range(6, 18))
    first, second = next((pair for pair in pairs if len(set(pair)) > 1), (truth, got))
    return f"expected {first}{where}, got {second}"


def _suspect_float32(error: float, tolerance: float) -> str:
    low, high = _SINGLE
    if tolerance < low <= error <= high:
        return "; looks as if computed in float32"
    return ""


def _tail_position(given: _Position, logit: float) -> _Position:
    """A few examples and a network whose logits are all `logit`; the labels agree."""
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


def _round(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda t: _double(np.asarray(t).astype(dtype)), tree)


def _relative(difference: Any, scale: Any) -> float:
    if np.isnan(difference):  # a NaN would not replace an earlier comparison
        return np.inf
    if scale == 0:
        return 0.0 if difference == 0 else np.inf
    return float(difference / scale)
