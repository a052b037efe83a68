"""The axes of a sweep: values of hyperparameters, from text, on a grid or at random."""

from typing import Any, NamedTuple

import numpy as np

import jaxbce
from experiments.support.cli import InputError

OF_THE_SWEEP = ("init_scale", "pos_weight", "label_smoothing")  # not the optimizer's
LOWEST = {"learning_rate": 0.0, "weight_decay": 0.0, "pos_weight": 0.0}
LARGEST = {"label_smoothing": 1.0}


class Axis(NamedTuple):
    """One axis.

    Attributes:
      name: The hyperparameter.
      values: On a grid, `[n]`, float64.
      spacing: "log", "lin", or "values" where they were given one by one.
    """

    name: str
    values: np.ndarray
    spacing: str


def axis(text: str) -> Axis:
    """`NAME=log:FROM:TO:COUNT`, `NAME=lin:FROM:TO:COUNT` or `NAME=VALUE,VALUE,...`.

    Raises:
      InputError: If it is not of that form, or its values cannot be used.
    """
    name, equals, rest = text.partition("=")
    spacing, *numbers = rest.split(":")
    try:
        if not equals or not name.isidentifier():
            raise ValueError("not NAME=...")
        if numbers:
            if spacing not in ("log", "lin") or len(numbers) != 3:
                raise ValueError("not log:FROM:TO:COUNT or lin:FROM:TO:COUNT")
            low, high, count = float(numbers[0]), float(numbers[1]), int(numbers[2])
            if not (np.isfinite([low, high]).all() and 1 <= count <= 10**6):
                raise ValueError("not finite numbers, and a count from 1 to 1000000")
            if spacing == "log" and not (low > 0 and high > 0):
                raise ValueError("a log axis has positive ends")
            make = np.geomspace if spacing == "log" else np.linspace
            values = make(low, high, count)
        else:
            spacing, values = "values", np.array([float(v) for v in rest.split(",")])
        if not np.isfinite(values).all():
            raise ValueError("not finite")
        if len(np.unique(values)) < len(values):
            raise ValueError("a value comes twice")
        if values.min() < LOWEST.get(name, -np.inf):
            raise ValueError(f"{name} is >= {LOWEST[name]:g}")
        if name in OF_THE_SWEEP and not 0 <= values.min() <= values.max() <= (
            LARGEST.get(name, np.inf)
        ):
            raise ValueError(f"{name} is from 0 to {LARGEST.get(name, np.inf):g}")
    except ValueError as error:
        raise InputError(f"--axis={text}: {error}") from None
    return Axis(name, values, spacing)


def points(
    axes: list[Axis], search: str, num_points: int | None, seed: int
) -> dict[str, Any]:
    """What `jaxbce.sweep` takes as `hparams`.

    Args:
      axes: At least one.
      search: "grid", or "random": uniform between an axis's ends, in its logarithm for
        a log axis; one of its values where they were given one by one.
      num_points: Points to draw at random.
      seed: Of the draws.

    Raises:
      InputError: If an axis is given twice, or `num_points` does not fit.
    """
    if not axes:
        raise InputError("--axis is needed, as --axis learning_rate=log:1e-4:1:32")
    names = [a.name for a in axes]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--axis={twice[0]}: is given twice")
    if search == "grid":
        if num_points is not None:
            raise InputError("--num_points goes with --search=random")
        return jaxbce.grid(**{a.name: a.values for a in axes})
    if num_points is None:
        raise InputError("--search=random needs --num_points")
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, values, spacing in axes:
        low, high = values.min(), values.max()
        if spacing == "values":
            drawn[name] = rng.choice(values, num_points)
        elif spacing == "log":
            drawn[name] = np.exp(rng.uniform(np.log(low), np.log(high), num_points))
        else:
            drawn[name] = rng.uniform(low, high, num_points)
    return drawn
