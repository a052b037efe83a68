r"""Where in the plane of two layers' learning rates does training converge?

    python -m experiments.trainability --output_dir plane
    python -m experiments.trainability --center 20,12 --span 0.5 --output_dir zoom

After Sohl-Dickstein, The boundary of neural network trainability is fractal, 2024,
arXiv:2402.06184. Every pixel is a network 16→16→1 with ReLU, its hidden layer trained
by one learning rate and its output layer by another, on the same 256 points with
random labels and from the same weights, by gradient descent on all points. A network
has converged if its last loss is below that at the start; blue is how fast it did,
red how late the others were lost.

Prints the box-counting dimension of the boundary, of which a smooth curve has 1. It is
an estimate from few box sizes: the standard error is that of the fitted line alone,
and scattered pixels lower it, as they are fewer than the finest boxes could have.
Expect 1.2 to 1.3 in the default plane at its default resolution.

Weights drawn in float64 are not those of float32: to zoom into a plane by float64,
make the plane by float64 too. With --output_dir the same command goes on where an
earlier one ended.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pandas as pd
from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy import stats

import jaxbce
from experiments.support import cli, config, output, resumable

for _name in (*cli.COMMON, *cli.PROCESSES, "dtype", "num_steps"):
    flags.declare_key_flag(_name)
_RESOLUTION = flags.DEFINE_integer(
    "resolution", 256, "Pixels a side, each a network.", lower_bound=2
)
_CENTER = flags.DEFINE_string(
    "center",
    "31.6227766,31.6227766",
    "Learning rates in the middle of the plane: hidden layer's,output layer's.",
)
_SPAN = flags.DEFINE_float("span", 5.0, "Decades a side, more than 0.")
DEFAULT_STEPS = 200


_WIDTH = 16  # features, and units of the hidden layer
_ROWS = 256
_EVALUATIONS = 20

Row = dict[str, Any]


def make_optimizer(hp: dict[str, jax.Array]) -> optax.GradientTransformation:
    """Gradient descent with a learning rate for each of the two layers."""
    rates = {"hidden": hp["hidden_rate"], "output": hp["output_rate"]}
    each: Any = {name: optax.sgd(rate) for name, rate in rates.items()}
    return optax.partition(each, ("hidden", "output"))


def problem(seed: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The key, features and labels that all pixels share."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(_ROWS, _WIDTH)), dtype)
    y = jnp.asarray(rng.random((_ROWS, 1)) < 0.5)
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
    group_size: int | str = "auto",
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains a network for every pixel, and measures the boundary.

    Args:
      resolution: Pixels a side.
      center: The hidden layer's and the output layer's learning rate in the middle.
      span: Decades a side.
      num_steps: Steps that each network is trained for.
      dtype: "float64", "float32" or "bfloat16".
      seed: Of the points, their labels and the weights.
      tile: Pixels trained, and kept in a file, at a time.
      group_size: As `jaxbce.sweep`.
      make_folder: Called when all arguments are found good; where to keep the run and
        go on with it, or None.

    Returns:
      "configuration"; "converged", "diverged" and "not_finite", fractions of the
      pixels, the last two not exclusive; "dimension", its "standard_error" and
      "r_squared", all None where there is none; "boxes", a row for each box side;
      "pixels", `[resolution, resolution, 2]`: the measure, positive where the network
      converged, and the step at which it diverged, or −1. Rows go with the output
      layer's learning rate, columns with the hidden layer's, from the least.
      With a folder, processes after the first have "configuration" alone.

    Raises:
      InputError: If there is no such plane, or the folder is of another run.
    """
    hidden_rates, output_rates = _rates(resolution, center, span, dtype)
    evaluate_every = max(1, num_steps // _EVALUATIONS)
    configuration = {
        "resolution": resolution,
        "center": list(center),
        "span": span,
        "num_steps": num_steps,
        "evaluate_every": evaluate_every,
        "dtype": dtype,
        "seed": seed,
        "tile": tile,
    }
    count = resolution**2
    starts = range(0, count, tile)
    sizes = [min(tile, count - start) for start in starts]
    folder = make_folder()
    with jax.enable_x64(dtype == "float64"):
        key, x, y = problem(seed, dtype)
        key_params, _ = jax.random.split(jax.random.fold_in(key, 0))
        params = jaxbce.init(key_params, (_WIDTH, _WIDTH, 1), dtype=dtype)
        initial = float(jaxbce.loss(params, x, y))

        def compute(i: int) -> pd.DataFrame:
            row, column = np.divmod(starts[i] + np.arange(sizes[i]), resolution)
            rates = {
                "hidden_rate": hidden_rates[column],
                "output_rate": output_rates[row],
            }
            trained = jaxbce.sweep(
                key,
                x,
                y,
                hidden=(_WIDTH,),
                make_optimizer=make_optimizer,
                hparams=rates,
                num_steps=num_steps,
                evaluate_every=evaluate_every,
                dtype=dtype,
                keep_params=False,
                group_size=group_size,
            )
            return pd.DataFrame(
                {
                    "row": row,
                    "column": column,
                    **rates,
                    "diverged_at": trained.diverged_at[:, 0],
                    "measure": measure(trained.train_loss[:, 0], initial),
                }
            )

        table = resumable.compute_chunks(
            compute,
            sizes,
            folder=folder,
            configuration=configuration,
            unit=" steps",
            scale=num_steps,
        )
    if folder is not None and jax.process_index() > 0:
        return {"configuration": configuration}
    pixels = table[["measure", "diverged_at"]].to_numpy(float)
    pixels = pixels.reshape(resolution, resolution, 2)
    converged = pixels[..., 0] > 0
    boxes = box_counts(boundary(converged))
    result = {
        "configuration": configuration,
        "converged": float(converged.mean()),
        "diverged": float(1 - converged.mean()),
        "not_finite": float((pixels[..., 1] >= 0).mean()),
        **dimension(boxes),
        "boxes": boxes,
        "pixels": pixels,
    }
    if folder is not None:
        _keep(folder, result)
    return result


def measure(losses: np.ndarray, initial: float) -> np.ndarray:
    """How fast networks converged, as numbers > 0, and how late others did not, <= 0.

    Args:
      losses: Of each network's evaluations, `[networks, evaluations]`, NaN from where
        it was not finite.
      initial: The loss at the start.

    Returns:
      `[networks]`: the mean of loss / initial where the last loss is below the
      initial one; elsewhere minus that of initial / loss, at most 1 and 0 where the
      loss is not finite.
    """
    relative = np.asarray(losses, float) / initial
    finite = np.isfinite(relative)
    late = np.where(finite, 1 / np.maximum(np.where(finite, relative, 1), 1), 0)
    return np.where(relative[:, -1] < 1, relative.mean(axis=1), -late.mean(axis=1))


def boundary(converged: np.ndarray) -> np.ndarray:
    """Which pixels `[n, n]` converged, and one of the eight around each did not.

    Of eight, so that a straight line is as many pixels, or boxes, long as those that
    it crosses: with four a sloping line would have a dimension of 0.86 to 0.9.
    """
    n = len(converged)
    padded = np.pad(~converged, 1)
    shifted = [padded[i : i + n, j : j + n] for i in range(3) for j in range(3)]
    return converged & np.any(shifted, axis=0)


def box_counts(pixels: np.ndarray) -> list[Row]:
    """How many boxes of 1, 2, 4, ... pixels a side have one of the set in them.

    Args:
      pixels: The set, `[n, n]`, boolean.

    Returns:
      A row for each side up to n / 8, with "box side" and "boxes".
    """
    n = len(pixels)
    rows = []
    side = 1
    while side <= n / 8:
        each = -(-n // side)
        padded = np.pad(pixels, (0, each * side - n))
        boxes = padded.reshape(each, side, each, side).any(axis=(1, 3))
        rows.append({"box side": side, "boxes": int(boxes.sum())})
        side *= 2
    return rows


def dimension(boxes: list[Row]) -> dict[str, float | None]:
    """The slope of log boxes over log 1 / side, by least squares.

    Args:
      boxes: What `box_counts` returns.

    Returns:
      "dimension", "standard_error" and "r_squared"; None if there are fewer than
      three sides, or nothing was in any box.
    """
    names = ("dimension", "standard_error", "r_squared")
    if len(boxes) < 3 or boxes[0]["boxes"] == 0:
        return dict.fromkeys(names)
    line: Any = stats.linregress(
        [-math.log(row["box side"]) for row in boxes],
        [math.log(row["boxes"]) for row in boxes],
    )
    values = (line.slope, line.stderr, line.rvalue**2)
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in zip(names, values, strict=True)
    }


def picture(
    path: Path, measures: np.ndarray, center: tuple[float, float], span: float
) -> None:
    """Draws measures `[n, n]`, each kind in shades of one color, by its ranks.

    Args:
      path: The file to write.
      measures: As in `measure`; rows from the least learning rate.
      center: The learning rates in the middle, of columns and of rows.
      span: Decades a side.
    """
    n = len(measures)
    converged = measures > 0
    image = np.zeros((n, n, 3))
    for chosen, name in ((converged, "Blues"), (~converged, "Reds")):
        if chosen.any():
            shade = 0.95 - 0.75 * _ranks(measures[chosen])
            image[chosen] = matplotlib.colormaps[name](shade)[:, :3]
    # The axes are a whole number of dots for each network.
    inches, side = 7.1, 6.0
    dpi = n * max(1, round(1000 / n)) / side
    figure = Figure(figsize=(inches, inches))
    axis = figure.add_axes(
        (0.8 / inches, 0.6 / inches, side / inches, side / inches),
        xlabel="learning rate, hidden layer",
        ylabel="learning rate, output layer",
    )
    x, y = (math.log10(rate) for rate in center)
    axis.imshow(
        image,
        origin="lower",
        interpolation="nearest",
        extent=(x - span / 2, x + span / 2, y - span / 2, y + span / 2),
    )
    digits = max(2, 2 - math.floor(math.log10(span)))

    def text(exponent: float, _: int) -> str:
        if span >= 2:
            return f"$10^{{{exponent:g}}}$"
        rate = 10**exponent
        if not 1e-4 <= rate < 1e6:
            return f"{rate:.{digits}g}"
        return np.format_float_positional(
            rate, precision=digits, fractional=False, trim="-"
        )

    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(MaxNLocator(6 if span >= 2 else 4, integer=span >= 2))
        one.set_major_formatter(FuncFormatter(text))
    if span < 2:  # long numbers
        for label in axis.get_yticklabels():
            label.set(rotation=90, verticalalignment="center")
    axis.set_title(
        "blue: converged, darker the faster;  red: diverged, darker the later",
        fontsize=11,
    )
    with output.atomic_write(path) as partial:
        figure.savefig(partial, dpi=dpi)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Shares of values that are at most each one, in (0, 1]."""
    return stats.rankdata(values, method="average") / len(values)


def _rates(
    resolution: int, center: tuple[float, float], span: float, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Learning rates in the middle of each column and of each row."""
    if not (math.isfinite(span) and span > 0):
        raise cli.InputError(f"--span={span:g}: a finite number > 0 is accepted")
    floating = np.dtype("float64" if dtype == "float64" else "float32")
    offsets = span * ((np.arange(resolution) + 0.5) / resolution - 0.5)
    found = []
    for rate in center:
        with np.errstate(over="ignore", under="ignore"):
            rates = rate * 10**offsets
            rounded = rates.astype(floating)
        if not (np.isfinite(rounded).all() and (rounded > 0).all()):
            raise cli.InputError(
                f"--span={span:g}: around {rate:g} there are learning rates that "
                f"{floating} cannot hold"
            )
        if len(np.unique(rounded)) < resolution:
            raise cli.InputError(
                f"--span={span:g}: pixels around {rate:g} are too close for {floating} "
                "to tell apart"
            )
        found.append(rates)
    return found[0], found[1]


def _center(text: str) -> tuple[float, float]:
    """--center as two numbers."""
    try:
        hidden, output = (float(part) for part in text.split(","))
    except ValueError:
        hidden = output = math.nan
    if not (0 < hidden < math.inf and 0 < output < math.inf):
        raise cli.InputError(
            f"--center={text}: two finite numbers > 0 with a comma between are accepted"
        )
    return hidden, output


def _keep(folder: Path, result: dict[str, Any]) -> None:
    """Writes the picture, the pixels and the numbers."""
    pixels, configuration = result["pixels"], result["configuration"]
    with output.atomic_write(folder / "trainability.npy") as path:
        np.save(path, pixels)
    picture(
        folder / "trainability.png",
        pixels[..., 0],
        configuration["center"],
        configuration["span"],
    )
    numbers = {name: value for name, value in result.items() if name != "pixels"}
    output.write_results(folder, "trainability", numbers, result["boxes"])


def main() -> int:
    """Trains the plane that the flags say."""
    cli.use_devices()
    jax.config.update("jax_default_matmul_precision", "highest")
    center = _center(_CENTER.value)
    resolution, span = _RESOLUTION.value, _SPAN.value
    first = jax.process_index() == 0
    if first:
        print(
            f"{resolution}×{resolution} networks {_WIDTH}→{_WIDTH}→1, learning rates "
            f"around {center[0]:g} (hidden layer) and {center[1]:g} (output layer), "
            f"{span:g} decades a side"
        )
        print(
            ", ".join(f"{k} {v}" for k, v in output.environment().items()), flush=True
        )
    result = run(
        resolution=resolution,
        center=center,
        span=span,
        num_steps=config.NUM_STEPS.value or DEFAULT_STEPS,
        dtype=cli.DTYPE.value or "float32",
        seed=cli.SEED.value,
        make_folder=cli.output_dir,
    )
    if not first:
        return 0
    print(
        f"\nconverged {result['converged']:.4f}, diverged {result['diverged']:.4f}, "
        f"of all not finite {result['not_finite']:.4f}\n"
    )
    boxes = result["boxes"]
    if boxes:
        print(f"{output.table(boxes)}\n")
    if result["dimension"] is not None:
        fitted = (result[name] for name in ("dimension", "standard_error", "r_squared"))
        slope, error, r_squared = (math.nan if v is None else v for v in fitted)
        print(f"dimension {slope:.2f} ± {error:.2f} (R² {r_squared:.3f})")
    elif 0 < result["converged"] < 1:
        print("dimension None: fewer than 3 box sides; a larger --resolution has more")
    else:
        print("dimension None: there is no boundary in this plane")
    if cli.OUTPUT_DIR.value is not None:
        folder = Path(cli.OUTPUT_DIR.value)
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        print(f"\nIn {folder}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    cli.launch(main)
