r"""Where in the plane of two layers' learning rates does training converge?

    python -m experiments.trainability --output_dir plane
    python -m experiments.trainability --center 20,12 --span 0.5 --output_dir zoom

After Sohl-Dickstein, The boundary of neural network trainability is fractal, 2024,
arXiv:2402.06184. Every pixel is a network 16→16→1 with ReLU, with one learning rate for
its hidden layer and one for its output layer. All are trained by full-batch gradient
descent on the same 256 examples with random labels, from the same initial weights. A
network has converged if its last loss is below the initial loss. Blue shows how fast it
converged, red how late the others diverged.

The command prints the box-counting dimension of the boundary; that of a smooth curve is
1. It is an estimate from few box sides: the standard error covers only the fitted line,
and isolated pixels lower the estimate. Expect 1.2 to 1.3 in the default plane at its
default resolution.

The initial weights depend on --dtype: to zoom into a plane with float64, compute the
whole plane with float64 too. With --output_dir, rerun the same command to resume an
interrupted run.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags
from scipy import stats

import jaxbce
from experiments.support import cli, config, output, plots, resumable

for _name in (*cli.COMMON, *cli.PROCESSES, "dtype", "num_steps"):
    flags.declare_key_flag(_name)
_RESOLUTION = flags.DEFINE_integer(
    "resolution",
    256,
    "Pixels per side, each of which is a network.",
    lower_bound=2,
)
_CENTER = flags.DEFINE_string(
    "center",
    "31.6227766,31.6227766",
    "Learning rates of the hidden and the output layer at the center of the plane.",
)
_SPAN = flags.DEFINE_float(
    "span", 5.0, "Decades of learning rates per side, more than 0."
)
DEFAULTS: dict[str, Any] = {"num_steps": 200, "dtype": "float32"}

_WIDTH = 16  # number of features, and of hidden units
_EXAMPLES = 256
_EVALUATIONS = 20
_HEADINGS = {"box_side": "box side"}

Row = dict[str, Any]


def make_optimizer(hp: dict[str, jax.Array]) -> optax.GradientTransformation:
    """Gradient descent with one learning rate per layer."""
    rates = {"hidden": hp["hidden_rate"], "output": hp["output_rate"]}
    transformations: Any = {name: optax.sgd(rate) for name, rate in rates.items()}
    return optax.partition(transformations, ("hidden", "output"))


def make_data(seed: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The key, features and labels that all pixels share."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(_EXAMPLES, _WIDTH)), dtype)
    y = jnp.asarray(rng.random((_EXAMPLES, 1)) < 0.5)
    return jax.random.key(seed), x, y


def run(
    *,
    resolution: int = 256,
    center: tuple[float, float] = (31.6227766, 31.6227766),
    span: float = 5.0,
    num_steps: int = 200,
    dtype: str = "float32",
    seed: int = 0,
    tile: int = 4096,
    group_size: int | Literal["auto"] = "auto",
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains a network for every pixel, and measures the boundary.

    Args:
      resolution: Pixels per side.
      center: Learning rates of the hidden and the output layer at the center.
      span: Decades per side.
      num_steps: Training steps of each network.
      dtype: "float64", "float32" or "bfloat16".
      seed: Seed of the examples, their labels and the weights.
      tile: Number of pixels that are trained, and saved to a file, at a time.
      group_size: As in `jaxbce.sweep`.
      make_folder: Called once all arguments are found valid; returns the folder to save
        the run to and resume it from, or None.

    Returns:
      "configuration", and the entries of `summarize`. With a folder, processes after
      the first return "configuration" alone.

    Raises:
      InputError: If the learning rates cannot be represented, or the folder belongs to
        another run.
    """
    hidden_rates, output_rates = _rates(resolution, center, span, dtype)
    configuration = {
        "resolution": resolution,
        "center": list(center),
        "span": span,
        "num_steps": num_steps,
        "evaluate_every": max(1, num_steps // _EVALUATIONS),
        "dtype": dtype,
        "seed": seed,
        "tile": tile,
    }
    starts = range(0, resolution**2, tile)
    sizes = [min(tile, resolution**2 - start) for start in starts]
    folder = make_folder()

    def train_tile(i: int) -> pd.DataFrame:
        row, column = np.divmod(starts[i] + np.arange(sizes[i]), resolution)
        rates = {
            "hidden_rate": hidden_rates[column],
            "output_rate": output_rates[row],
        }
        return pd.DataFrame(
            {
                "row": row,
                "column": column,
                **rates,
                **train(rates, configuration, group_size=group_size),
            }
        )

    with jax.enable_x64(dtype == "float64"):
        pixels = resumable.compute_chunks(
            train_tile,
            sizes,
            folder=folder,
            configuration=configuration,
            unit=" steps",
            scale=num_steps,
        )
    if folder is not None and jax.process_index() > 0:
        return {"configuration": configuration}
    result = {"configuration": configuration, **summarize(pixels, resolution)}
    if folder is not None:
        write(folder, result)
    return result


def train(
    rates: dict[str, np.ndarray],
    configuration: dict[str, Any],
    *,
    group_size: int | Literal["auto"] = "auto",
) -> dict[str, np.ndarray]:
    """Trains one network per pair of learning rates.

    Args:
      rates: "hidden_rate" and "output_rate", `[networks]` each.
      configuration: As `run` returns it.
      group_size: As in `jaxbce.sweep`.

    Returns:
      "diverged_at", the step at which each network diverged or −1, and "measure".
    """
    dtype = configuration["dtype"]
    key, x, y = make_data(configuration["seed"], dtype)
    key_params, _ = jax.random.split(jax.random.fold_in(key, 0))  # as sweep's
    params = jaxbce.init(key_params, (_WIDTH, _WIDTH, 1), dtype=dtype)
    initial_loss = float(jaxbce.loss(params, x, y))
    trained = jaxbce.sweep(
        key,
        x,
        y,
        hidden=(_WIDTH,),
        make_optimizer=make_optimizer,
        hparams=rates,
        num_steps=configuration["num_steps"],
        evaluate_every=configuration["evaluate_every"],
        dtype=dtype,
        keep_params=False,
        group_size=group_size,
    )
    return {
        "diverged_at": trained.diverged_at[:, 0],
        "measure": measure(trained.train_loss[:, 0], initial_loss),
    }


def summarize(table: pd.DataFrame, resolution: int) -> dict[str, Any]:
    """Measures the boundary between the pixels that converged and those that did not.

    Args:
      table: "measure" and "diverged_at" of every pixel, row by row.
      resolution: Pixels per side.

    Returns:
      "converged_fraction", "diverged_fraction" and "not_finite_fraction" of the pixels,
      the last two not exclusive; "dimension", "standard_error" and "r_squared", see
      `dimension`; "boxes", one row per box side; "pixels",
      `[resolution, resolution, 2]`: the measure, and the step at which the network
      diverged or −1. Rows are ordered by the output layer's learning rate, columns by
      the hidden layer's, from the smallest.
    """
    pixels = table[["measure", "diverged_at"]].to_numpy(float)
    pixels = pixels.reshape(resolution, resolution, 2)
    converged = pixels[..., 0] > 0
    boxes = box_counts(boundary(converged))
    return {
        "converged_fraction": float(converged.mean()),
        "diverged_fraction": float(1 - converged.mean()),
        "not_finite_fraction": float((pixels[..., 1] >= 0).mean()),
        **dimension(boxes),
        "boxes": boxes,
        "pixels": pixels,
    }


def measure(losses: np.ndarray, initial: float) -> np.ndarray:
    """Speed of convergence as numbers > 0, and lateness of divergence as numbers <= 0.

    Args:
      losses: Losses of each network's evaluations, `[networks, evaluations]`, inf once
        a network has diverged.
      initial: The initial loss.

    Returns:
      `[networks]`: the mean of loss / initial where the last loss is below the initial
      loss; elsewhere minus the mean of initial / loss, each at most 1, and 0 where the
      loss is not finite.
    """
    relative = np.asarray(losses, float) / initial
    finite = np.isfinite(relative)
    late = np.where(finite, 1 / np.maximum(np.where(finite, relative, 1), 1), 0)
    return np.where(relative[:, -1] < 1, relative.mean(axis=1), -late.mean(axis=1))


def boundary(converged: np.ndarray) -> np.ndarray:
    """Pixels `[n, n]` that converged next to one that did not.

    Each pixel has eight neighbors, so that a straight line has as many pixels, or
    boxes, as it crosses: with four, a sloping line would have a dimension of 0.86 to
    0.9.
    """
    n = len(converged)
    padded = np.pad(~converged, 1)
    shifted = [padded[i : i + n, j : j + n] for i in range(3) for j in range(3)]
    return converged & np.any(shifted, axis=0)


def box_counts(pixels: np.ndarray) -> list[Row]:
    """Number of boxes of 1, 2, 4, ... pixels per side that contain pixels of a set.

    Args:
      pixels: The set, `[n, n]`, boolean.

    Returns:
      One row per box side up to n / 8, with "box_side" and "boxes".
    """
    n = len(pixels)
    rows = []
    side = 1
    while side <= n / 8:
        count = -(-n // side)  # boxes per side
        padded = np.pad(pixels, (0, count * side - n))
        boxes = padded.reshape(count, side, count, side).any(axis=(1, 3))
        rows.append({"box_side": side, "boxes": int(boxes.sum())})
        side *= 2
    return rows


def dimension(boxes: list[Row]) -> dict[str, float | None]:
    """Slope of log boxes over log 1 / side, by least squares.

    Args:
      boxes: The rows of `box_counts`.

    Returns:
      "dimension", "standard_error" and "r_squared"; all None with fewer than three box
      sides or an empty set.
    """
    names = ("dimension", "standard_error", "r_squared")
    if len(boxes) < 3 or boxes[0]["boxes"] == 0:
        return dict.fromkeys(names)
    line: Any = stats.linregress(
        [-math.log(row["box_side"]) for row in boxes],
        [math.log(row["boxes"]) for row in boxes],
    )
    values = (line.slope, line.stderr, line.rvalue**2)
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in zip(names, values, strict=True)
    }


def _rates(
    resolution: int, center: tuple[float, float], span: float, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Learning rates at the center of each column and of each row."""
    if not (math.isfinite(span) and span > 0):
        raise cli.InputError(f"--span={span:g}: expected a finite number > 0")
    floating = np.dtype("float64" if dtype == "float64" else "float32")
    offsets = span * ((np.arange(resolution) + 0.5) / resolution - 0.5)
    axes = []
    for rate in center:
        with np.errstate(over="ignore", under="ignore"):
            rates = rate * 10**offsets
            rounded = rates.astype(floating)
        if not (np.isfinite(rounded).all() and (rounded > 0).all()):
            raise cli.InputError(
                f"--span={span:g}: {floating} cannot represent all learning rates "
                f"around {rate:g}"
            )
        if len(np.unique(rounded)) < resolution:
            raise cli.InputError(
                f"--span={span:g}: pixels around {rate:g} are too close for {floating}"
            )
        axes.append(rates)
    return axes[0], axes[1]


def _center(text: str) -> tuple[float, float]:
    """--center as two numbers."""
    try:
        hidden, output = (float(part) for part in text.split(","))
    except ValueError:
        hidden = output = math.nan
    if not (0 < hidden < math.inf and 0 < output < math.inf):
        raise cli.InputError(
            f"--center={text}: expected two finite numbers > 0, separated by a comma"
        )
    return hidden, output


def write(folder: Path, result: dict[str, Any]) -> None:
    """Writes the pixels, the figure, and the numbers as JSON and CSV."""
    pixels, configuration = result["pixels"], result["configuration"]
    with output.atomic_write(folder / "trainability.npy") as path:
        np.save(path, pixels)
    plots.trainability(
        folder / "trainability.png",
        pixels[..., 0],
        configuration["center"],
        configuration["span"],
    )
    numbers = {name: value for name, value in result.items() if name != "pixels"}
    output.write_results(folder, "trainability", numbers, result["boxes"])


def _print_result(result: dict[str, Any]) -> None:
    """Prints the fractions of the pixels, the box counts and the dimension."""
    converged = result["converged_fraction"]
    print(
        f"\nconverged {converged:.4f}, diverged {result['diverged_fraction']:.4f}, "
        f"not finite {result['not_finite_fraction']:.4f} of all pixels\n"
    )
    if result["boxes"]:
        print(f"{output.table(result['boxes'], headings=_HEADINGS)}\n")
    if result["dimension"] is not None:
        fit = (result[name] for name in ("dimension", "standard_error", "r_squared"))
        slope, error, r_squared = (math.nan if v is None else v for v in fit)
        print(f"dimension {slope:.2f} ± {error:.2f} (R² {r_squared:.3f})")
    elif 0 < converged < 1:
        print("no dimension: fewer than 3 box sides; try a larger --resolution")
    else:
        print("no dimension: this plane has no boundary")


def main() -> int:
    """Trains the plane of the flags."""
    # Settings.
    cli.use_devices()
    center = _center(_CENTER.value)
    resolution, span = _RESOLUTION.value, _SPAN.value
    is_first_process = jax.process_index() == 0
    if is_first_process:
        print(
            f"{resolution}×{resolution} networks {_WIDTH}→{_WIDTH}→1, learning rates "
            f"around {center[0]:g} (hidden layer) and {center[1]:g} (output layer), "
            f"{span:g} decades per side"
        )
        output.print_environment()

    # Training.
    result = run(
        resolution=resolution,
        center=center,
        span=span,
        num_steps=config.NUM_STEPS.value or DEFAULTS["num_steps"],
        dtype=cli.DTYPE.value or DEFAULTS["dtype"],
        seed=cli.SEED.value,
        make_folder=cli.output_dir,
    )

    # Results.
    if is_first_process:
        _print_result(result)
        if cli.OUTPUT_DIR.value is not None:
            output.print_files(Path(cli.OUTPUT_DIR.value))
    return 0


if __name__ == "__main__":
    cli.launch(main, DEFAULTS)
