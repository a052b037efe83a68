"""The axes of a sweep: hyperparameters and their values, on a grid or at random."""

import math
from typing import Any, NamedTuple

import numpy as np

import jaxbce
from experiments.support.cli import InputError

# Hyperparameters that `jaxbce.sweep` uses itself; all others belong to the optimizer.
SWEEP_HPARAMS = ("init_scale", "pos_weight", "label_smoothing")
MINIMA = {"learning_rate": 0.0, "weight_decay": 0.0, "pos_weight": 0.0}
MAXIMA = {"label_smoothing": 1.0}


class Axis(NamedTuple):
    """One axis of a sweep.

    Attributes:
      name: The hyperparameter.
      values: Its values on a grid, `[n]`, float64.
      spacing: "log", "lin", or "values" if they were listed.
    """

    name: str
    values: np.ndarray
    spacing: str


class Search(NamedTuple):
    """Which points of the axes to train.

    Attributes:
      axes: The axes, at least one.
      method: "grid" for all combinations, or "random".
      num_points: Number of random points.
    """

    axes: tuple[Axis, ...]
    method: str = "grid"
    num_points: int | None = None

    def size(self) -> int:
        """The number of points, if the search is valid."""
        if self.method == "random":
            return self.num_points or 0
        return math.prod(len(axis.values) for axis in self.axes)

    def points(self, seed: int) -> dict[str, np.ndarray]:
        """The values of each hyperparameter, `[points]`, as `jaxbce.sweep` takes them.

        Random points are uniform between the ends of an axis (in the logarithm for a
        log axis), or drawn from its listed values.

        Raises:
          InputError: If there is no axis or one is repeated, or `num_points` does not
            fit the method.
        """
        if not self.axes:
            raise InputError(
                "expected --axis, such as --axis learning_rate=log:1e-4:1:32"
            )
        names = [a.name for a in self.axes]
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise InputError(f"--axis={repeated[0]}: is given twice")
        if self.method == "grid":
            if self.num_points is not None:
                raise InputError("--num_points needs --search=random")
            return jaxbce.grid(**{a.name: a.values for a in self.axes})
        if self.num_points is None:
            raise InputError("--search=random needs --num_points")
        rng = np.random.default_rng(seed)
        return {a.name: _draw(a, self.num_points, rng) for a in self.axes}

    def as_dict(self) -> dict[str, Any]:
        """The entries for the search in the configuration file."""
        axes = {a.name: [a.spacing, *a.values.tolist()] for a in self.axes}
        return {"axes": axes, "search": self.method}


def _draw(axis: Axis, count: int, rng: np.random.Generator) -> np.ndarray:
    low, high = axis.values.min(), axis.values.max()
    if axis.spacing == "values":
        return rng.choice(axis.values, count)
    if axis.spacing == "log":
        return np.exp(rng.uniform(np.log(low), np.log(high), count))
    return rng.uniform(low, high, count)


def parse_axis(text: str) -> Axis:
    """Parses NAME=log:FROM:TO:COUNT, NAME=lin:FROM:TO:COUNT or NAME=VALUE,VALUE,...

    Raises:
      InputError: If the text is malformed or its values are out of range.
    """
    name, equals, rest = text.partition("=")
    spacing, *numbers = rest.split(":")
    try:
        if not equals or not name.isidentifier():
            raise ValueError("expected NAME=...")
        if numbers:
            if spacing not in ("log", "lin") or len(numbers) != 3:
                raise ValueError("expected log:FROM:TO:COUNT or lin:FROM:TO:COUNT")
            low, high, count = float(numbers[0]), float(numbers[1]), int(numbers[2])
            if not (np.isfinite([low, high]).all() and 1 <= count <= 10**6):
                raise ValueError(
                    "expected finite numbers, and a count from 1 to 1000000"
                )
            if spacing == "log" and not (low > 0 and high > 0):
                raise ValueError("expected positive ends of a log axis")
            make = np.geomspace if spacing == "log" else np.linspace
            values = make(low, high, count)
        else:
            spacing, values = "values", np.array([float(v) for v in rest.split(",")])
        if not np.isfinite(values).all():
            raise ValueError("expected finite values")
        if len(np.unique(values)) < len(values):
            raise ValueError("a value is repeated")
        if values.min() < MINIMA.get(name, -np.inf):
            raise ValueError(f"expected values >= {MINIMA[name]:g}")
        if name in SWEEP_HPARAMS and not 0 <= values.min() <= values.max() <= (
            MAXIMA.get(name, np.inf)
        ):
            raise ValueError(f"expected values from 0 to {MAXIMA.get(name, np.inf):g}")
    except ValueError as error:
        raise InputError(f"--axis={text}: {error}") from None
    return Axis(name, values, spacing)
