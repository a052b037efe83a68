"""Data of each member of a sweep: example weights, labels and initial parameters.

Members with different weights or labels still share features. Weights are applied to
the error signal of the output, in which everything below is linear, so the members of a
group still share batches and the matrix product of the first layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbce import _traced, _validate
from jaxbce.gradients import rescale
from jaxbce.network import Params
from jaxbce.training import Dataset, relative_weight


class Functions(NamedTuple):
    """The functions that a sweep was passed, or None."""

    make_sample_weight: Callable[..., Any] | None
    make_labels: Callable[..., Any] | None


class Programs(NamedTuple):
    """The same as traced programs of `(hparams, y)`, or None."""

    sample_weight: _traced.Program | None
    labels: _traced.Program | None


@_traced.remember
def trace(functions: Functions, hparams: Any, y: Any) -> tuple[Programs, Any]:
    """Traces the functions; returns programs and the numbers in each of them."""
    traced = [
        None
        if function is None
        else _traced.trace(checked, hparams, y, static=(function,))
        for function, checked in zip(functions, (_weight, _labels), strict=True)
    ]
    programs = Programs(*(t and t.program for t in traced))
    return programs, tuple(t and t.constants for t in traced)


def _weight(make: Any, hparams: dict[str, Any], y: jax.Array) -> jax.Array:
    with _validate.calling("make_sample_weight", hparams):
        s = make(dict(hparams))
    return _validate.returned_array(
        "make_sample_weight", s, (y.shape[0],), "[N]", y.dtype
    )


def _labels(make: Any, hparams: dict[str, Any], y: jax.Array) -> jax.Array:
    with _validate.calling("make_labels", hparams):
        made = make(dict(hparams), y)
    return _validate.returned_array("make_labels", made, y.shape, "[N, n_L]", y.dtype)


def examples(
    programs: Programs,
    constants: Any,
    hparams: dict[str, Any],
    data: Dataset,
    evaluated: tuple[Dataset, ...],
    *,
    hold_out: bool,
) -> tuple[Dataset, tuple[Dataset, ...]]:
    """The examples to train on and to evaluate of one member.

    Args:
      programs: The programs of `trace`.
      constants: Their constants.
      hparams: Hyperparameters of the member, scalars.
      data: The examples that all members share.
      evaluated: The training set and optionally a validation set, with given labels.
      hold_out: Whether the validation set is the examples of weight 0.
    """
    if programs.sample_weight is not None:
        s = programs.sample_weight(constants[0], hparams, data.y)
        counted, held_out = _split(s, data.weight)
        data = data._replace(weight=relative_weight(counted))
        train, *others = evaluated
        evaluated = (train._replace(weight=data.weight), *others)
        if hold_out:
            weight = relative_weight(held_out)
            evaluated = (evaluated[0], train._replace(weight=weight))
    if programs.labels is not None:
        data = data._replace(y=programs.labels(constants[1], hparams, data.y))
    return data, evaluated


def _split(s: jax.Array, common: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Weights of the examples of a member, and of those to which it gives weight 0.

    Args:
      s: The result of `make_sample_weight`, `[N]`.
      common: Weights that all members share, with mean 1; None is all ones.
    """
    common = jnp.ones_like(s) if common is None else common
    # Both factors have a moderate largest entry, so the product does not overflow.
    return rescale(s) * common, jnp.where(s == 0, common, 0)


_EXPECTED = (  # of each point, in the order of the results of `_find_bad`
    "make_sample_weight to return finite weights >= 0, not all of them 0 (times "
    "sample_weight)",
    'make_sample_weight to return some weights of 0 for validation="held_out"',
    "make_labels to return labels in [0, 1]",
)


def check(
    programs: Programs,
    constants: Any,
    hparams: dict[str, np.ndarray],
    points: int,
    data: Dataset,
    *,
    hold_out: bool,
) -> None:
    """Checks the values of all weights and labels.

    Args:
      programs: The programs of `trace`.
      constants: Their constants.
      hparams: Hyperparameters of all points, `[points]`.
      points: Their number.
      data: The examples that all members share.
      hold_out: Whether every member must have examples of weight 0.

    Raises:
      ValueError: If a point has weights or labels that cannot be used.
    """
    if programs == (None, None):
        return
    # The indices give lax.map a length if there are no hyperparameters.
    mapped = hparams, np.arange(points)
    is_bad = _traced.jitted(_find_bad, programs, hold_out)(constants, mapped, data)
    for message, bad in zip(_EXPECTED, is_bad, strict=True):
        if bad.any():
            point = {name: v[bad.argmax()].item() for name, v in hparams.items()}
            raise ValueError(
                f"expected {message}, which it does not for hparams {point}"
            )


def _find_bad(
    programs: Programs, hold_out: bool, constants: Any, mapped: Any, data: Dataset
) -> tuple[jax.Array, ...]:
    """Which points break each of the rules in `_EXPECTED`, `[3][points]`."""

    def point(mapped: Any) -> tuple[jax.Array, ...]:
        hparams, _ = mapped
        s, y = jnp.ones_like(data.y[:, 0]), jnp.zeros(())
        if programs.sample_weight is not None:
            s = programs.sample_weight(constants[0], hparams, data.y)
        if programs.labels is not None:
            y = programs.labels(constants[1], hparams, data.y)
        least = jnp.finfo(s.dtype).smallest_normal  # XLA may flush others to 0
        counted, held_out = _split(s, data.weight)
        is_weight = jnp.all((s >= 0) & jnp.isfinite(s)) & jnp.any(counted >= least)
        is_held_out = jnp.any(held_out >= least) | (not hold_out)
        is_label = jnp.all((y >= 0) & (y <= 1))
        return ~is_weight, ~is_held_out, ~is_label

    return lax.map(point, mapped)


def check_initial_params(
    params: Any, dtype: Any
) -> tuple[tuple[int, ...], Any, Params]:
    """Checks parameters to start from.

    Args:
      params: A tuple of `Layer`, or one whose leaves begin with axes `[points, seeds]`,
        of which either may be 1.
      dtype: The dtype that they must have, or None.

    Returns:
      Layer sizes, dtype, and the parameters as NumPy arrays `[points, seeds, ...]`.
    """
    leading, one = _validate.stacked_params(params)
    if len(leading) not in (0, 2):
        raise ValueError(
            "expected params to have no leading axes or [points, seeds], got "
            f"{params[0].w.shape} as the shape of params[0].w"
        )
    params = jax.tree.map(np.asarray, params)
    if not leading:
        params = jax.tree.map(lambda leaf: leaf[None, None], params)
    found = one[0].w.dtype
    if dtype is not None and jnp.dtype(dtype) != found:
        raise TypeError(
            f"expected dtype to be that of params, {found}, got {jnp.dtype(dtype)}"
        )
    return (one[0].w.shape[0], *(layer.w.shape[1] for layer in one)), found, params


def resolve_num_points(params: Params | None, points: int | None, seeds: int) -> int:
    """The number of points, checked against the parameters to start from.

    Args:
      params: As `check_initial_params` returns them, or None.
      points: Number of points; None if there are no hyperparameters.
      seeds: Number of seeds.
    """
    if params is None:
        return points or 1
    found = params[0].w.shape[:2]
    points = points or found[0]
    for name, count, expected in zip(
        ("points", "seeds"), found, (points, seeds), strict=True
    ):
        if count not in (1, expected):
            raise ValueError(
                f"expected params with 1 or {expected} {name}, got shape "
                f"{params[0].w.shape} of params[0].w"
            )
    return points
