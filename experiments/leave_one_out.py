r"""How does each row change the network, by retraining without it and by formula?

    python -m experiments.leave_one_out --output_dir results
    python -m experiments.leave_one_out --data mine.csv --target label --hidden 8

Trains a network to a minimum of Σ ℓ_i + τ/2 ‖θ‖² over the training rows, with τ from
--prior_precision. From there, jaxbce.sweep trains one network without each row. The
true change is the difference from a network that takes as many more steps with all
rows. Each estimate is compared with it by Spearman's rank correlation and Pearson's:

  one Newton step  of the objective without the row (jaxbce.laplace.leave_one_out); for
                   test losses, influence / (1 − leverage),
  influence        the first-order change (jaxbce.laplace.influence),
  Grad-Dot         inner products of gradients (jaxbce.per_example.inner_products),
  self-influence   the squared norm of the row's own gradient.

Correlations are over training rows; for test losses the table has their median and
quartiles over test rows. The column "size" is the mean absolute value of an estimate
of a change, divided by that of the true change. Expect rank correlations above 0.95 for
a row's own logit, and 0.6 to 0.9 for single test losses, where Grad-Dot's are lower.

Minima of ReLU networks often lie where the input of a unit is exactly 0 for some rows.
The gradient jumps there, so its norm, which is printed, does not go to 0. How little
the objective changes over the last steps shows how near the minimum is. With
--output_dir, rerun the same command to resume an interrupted run.
"""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags
from scipy import stats

from experiments.support import (
    cli,
    config,
    datasets,
    output,
    plots,
    resumable,
    retraining,
    splitting,
)
from experiments.support.retraining import GRAD_DOT, NEWTON, Problem
from jaxbce import laplace, per_example

flags.adopt_module_key_flags(datasets)
flags.adopt_module_key_flags(splitting)
for _name in (*cli.COMMON, "hidden", "num_steps", "cpu_devices", "dtype"):
    flags.declare_key_flag(_name)
_PRIOR_PRECISION = flags.DEFINE_float(
    "prior_precision",
    1.0,
    "Precision τ > 0 of the prior: τ/2 times the sum of the squared parameters is "
    "added to the sum of the losses.",
)
_NUM_ROWS = flags.DEFINE_integer(
    "num_rows",
    300,
    "The largest number of training rows, drawn at random and stratified by label.",
    lower_bound=3,
)
DEFAULTS: dict[str, Any] = {"hidden": "16", "num_steps": 2000, "dtype": "float64"}
HELP = {"num_steps": "Steps of each network that is trained without a row."}

IMAGES = {"digits": (8, 8)}  # datasets whose examples are images, and their shapes
HEADINGS = {
    "rank_correlation": "rank correlation",
    "lower_quartile": "lower quartile",
    "upper_quartile": "upper quartile",
    "pearson": "Pearson",
}
QUANTITIES = ("own_logit", "own_loss", "test_loss")


def run(
    *,
    table: datasets.Table,
    hidden: tuple[int, ...] = (16,),
    prior_precision: float = 1.0,
    num_rows: int = 300,
    num_steps: int = 2000,
    dtype: str = "float64",
    seed: int = 0,
    chunk: int = 128,
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains a network without each row, and compares it with the estimates.

    Args:
      table: The data, with one target.
      hidden: Widths of the hidden layers.
      prior_precision: The prior precision τ.
      num_rows: The largest number of training rows.
      num_steps: Steps without each row.
      dtype: "float64" or "float32".
      seed: Seed of the split, the sample of rows and the initial weights.
      chunk: Number of networks that are trained, and saved to a file, at a time.
      make_folder: Called once all arguments are found valid; returns the folder to save
        the run to and resume it from, or None.

    Returns:
      "configuration"; "minimum", how near the minimum the networks are; "comparisons",
      one row per quantity and method; "seconds", including compilation, by what took
      them; "rows", a table of the training rows, the most helpful first; "truth" and
      "estimates", the changes that are compared, by quantity and by method.

    Raises:
      InputError: If an argument cannot be used, a network diverges, or the folder
        belongs to another run.
    """
    # Check everything before anything is trained.
    if table.y.shape[1] != 1:
        raise cli.InputError("--target: expected one target, got several")
    if not (math.isfinite(prior_precision) and prior_precision > 0):
        raise cli.InputError(
            f"--prior_precision={prior_precision:g}: expected a finite number > 0"
        )
    if dtype == "bfloat16":
        raise cli.InputError("--dtype=bfloat16: expected float64 or float32")
    splits, _ = datasets.split(table, seed)
    train, test = splits["train"], splits["test"]
    sample = splitting.sample(train.y[:, 0], num_rows, seed)
    n = len(sample)
    configuration = {
        **datasets.describe(table),
        "rows": n,
        "test_rows": len(test.y),
        "hidden": hidden,
        "prior_precision": prior_precision,
        "num_steps": num_steps,
        "dtype": dtype,
        "seed": seed,
        "chunk": chunk,
    }
    folder = make_folder()
    sizes = [min(chunk, n - first) for first in range(0, n, chunk)]

    with jax.enable_x64(dtype == "float64"):
        problem = Problem(
            x=jnp.asarray(train.x[sample], dtype),
            y=jnp.asarray(train.y[sample], dtype),
            x_test=jnp.asarray(test.x, dtype),
            y_test=jnp.asarray(test.y, dtype),
            tau=prior_precision,
        )

        @functools.cache  # called once the folder is found to be that of this run
        def minimum() -> tuple[Any, float]:
            return retraining.minimize(problem, hidden, num_steps, seed)

        def train_chunk(i: int) -> pd.DataFrame:
            left_out = i * chunk + np.arange(sizes[i])
            return retraining.retrain(*minimum(), problem, num_steps, left_out)

        # Train without each row and with all of them, and compare.
        retrained = resumable.compute_chunks(
            train_chunk,
            sizes,
            folder=folder,
            configuration=configuration,
            unit=" steps",
            scale=num_steps,
        )
        start, rate = minimum()
        full = retraining.descend(start, rate, problem, num_steps)
        at_start, before = (retraining.evaluate(p, problem) for p in (start, full))
        truth = {
            name: np.stack(list(retrained[name])) - before[name] for name in QUANTITIES
        }
        estimates, leverage, seconds = estimate(full, problem, before)

    own_logit, estimated = before["own_logit"], estimates["own_logit", NEWTON]
    ((target, classes),) = table.classes.items()
    names = np.array([f"{target}={value}" for value in classes])
    rows = pd.DataFrame(
        {
            "row": table.features.index[train.rows[sample]],
            "label": names[train.y[sample, 0].astype(int)],
            "logit": own_logit,
            "logit_left_out": retrained["own_logit"],
            "estimated_logit_left_out": own_logit + estimated,
            "loss": before["own_loss"],
            "loss_left_out": retrained["own_loss"],
            "leverage": leverage,
            "self_influence": estimates["own_loss", "self-influence"],
            "test_loss_change": truth["test_loss"].mean(axis=1),
            "influence": estimates["test_loss", "influence"].mean(axis=1),
            "grad_dot": estimates["test_loss", GRAD_DOT].mean(axis=1),
        }
    )
    result = {
        "configuration": configuration,
        "minimum": {
            "objective": float(before["objective"]),
            "change_over_last_steps": float(
                before["objective"] - at_start["objective"]
            ),
            "gradient_norm": float(before["gradient_norm"]),
            "median_gradient_norm_left_out": retrained["gradient_norm"].median(),
        },
        "comparisons": compare(truth, estimates),
        "seconds": {"retraining": retrained["seconds"].sum(), **seconds},
        "rows": rows.sort_values(
            "test_loss_change", ascending=False, kind="stable", ignore_index=True
        ),
        "truth": truth,
        "estimates": estimates,
    }
    if folder is not None:
        save(folder, table, result)
    return result


def estimate(
    params: Any, problem: Problem, before: dict[str, Any]
) -> tuple[dict[tuple[str, str], np.ndarray], np.ndarray, dict[str, float]]:
    """Estimates by quantity and method, the leverage, and the seconds by function."""
    x, y, x_test, y_test, tau = problem
    seconds = {}

    def timed(function: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        found = jax.block_until_ready(function(*args))
        seconds[function.__name__] = time.perf_counter() - began
        return found

    posterior = timed(laplace.posterior, params, x, y, tau)
    loo = jax.tree.map(np.asarray, timed(laplace.leave_one_out, posterior))
    influence = np.asarray(timed(laplace.influence, posterior, x_test, y_test))
    grad_dot = timed(per_example.inner_products, params, x, y, x_test, y_test)
    own_influence = np.diag(laplace.influence(posterior, x, y))
    norms = np.asarray(per_example.norms(params, x, y))
    # Sherman-Morrison for one output: J_j H₋ᵢ⁻¹ G_i = J_j H⁻¹ G_i / (1 − leverage_i)
    remainder = np.maximum(1 - loo.leverage, np.finfo(loo.leverage.dtype).eps)
    return (
        {
            ("own_logit", NEWTON): loo.logits[:, 0] - before["own_logit"],
            ("own_loss", NEWTON): loo.loss - before["own_loss"],
            ("own_loss", "influence"): own_influence,
            ("own_loss", "self-influence"): norms**2,
            ("test_loss", NEWTON): influence / remainder[:, None],
            ("test_loss", "influence"): influence,
            ("test_loss", GRAD_DOT): np.asarray(grad_dot),
        },
        loo.leverage,
        seconds,
    )


def compare(
    truth: dict[str, np.ndarray], estimates: dict[tuple[str, str], np.ndarray]
) -> list[dict[str, Any]]:
    """Correlations over training rows of each estimate with the truth.

    Test losses have two rows: the medians over test rows, and their mean loss. The
    "size" is the mean absolute estimate, divided by that of the truth. Estimates
    without curvature have none, because their units are others.
    """
    found = []
    for (quantity, method), values in estimates.items():
        pairs = {quantity: (truth[quantity], values)}
        if values.ndim == 2:
            pairs["mean_test_loss"] = truth[quantity].mean(axis=1), values.mean(axis=1)
        for name, (a, b) in pairs.items():
            ranks = correlation(*(stats.rankdata(t, axis=0) for t in (a, b)))
            lower, median, upper = _quartiles(ranks)
            row = {"quantity": name, "method": method, "rank_correlation": median}
            if a.ndim == 2:
                row |= {"lower_quartile": lower, "upper_quartile": upper}
            row["pearson"] = _quartiles(correlation(a, b))[1]
            # A gradient's inner products have other units than changes of a loss.
            if method in (NEWTON, "influence") and np.any(a):
                row["size"] = float(np.mean(np.abs(b)) / np.mean(np.abs(a)))
            found.append(row)
    return found


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of columns, `[columns]`; NaN where one side is constant."""
    with np.errstate(invalid="ignore"):
        a, b = (t.reshape(len(t), -1) - t.mean(axis=0) for t in (a, b))
        a, b = (t / np.abs(t).max(axis=0) for t in (a, b))  # squares stay finite
        return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


def _quartiles(values: np.ndarray) -> list[float | None]:
    """Quartiles of the values that are finite; None if there are none."""
    finite = values[np.isfinite(values)]
    return (
        np.quantile(finite, [0.25, 0.5, 0.75]).tolist() if len(finite) else [None] * 3
    )


def save(folder: Path, table: datasets.Table, result: dict[str, Any]) -> None:
    """Writes the rows, the comparisons and the pictures."""
    with output.atomic_write(folder / "influence.csv") as path:
        result["rows"].to_csv(path, index=False)
    kept = ("configuration", "minimum", "comparisons", "seconds")
    document = {name: result[name] for name in kept}
    output.write_results(folder, "leave_one_out", document, result["comparisons"])
    scatter = folder / "leave_one_out.png"
    plots.leave_one_out(scatter, result["truth"], result["estimates"])
    if table.name in IMAGES:
        images = table.features.to_numpy(np.float64).reshape(-1, *IMAGES[table.name])
        plots.influential(folder / "influential.png", result["rows"], images)


def _report(result: dict[str, Any]) -> None:
    minimum, seconds = result["minimum"], dict(result["seconds"])
    print(
        f"\nThe objective on {len(result['rows'])} rows is {minimum['objective']:.6g}; "
        f"the last steps changed it by {minimum['change_over_last_steps']:.1e}. Its "
        f"gradient has norm {minimum['gradient_norm']:.2g}, and without a row "
        f"{minimum['median_gradient_norm_left_out']:.2g} (median).\n\n"
        f"Seconds, including compilation: {seconds.pop('retraining'):.1f} for training "
        "without each row; "
        + ", ".join(f"{value:.1f} for {name}" for name, value in seconds.items())
        + ".\n"
    )
    rows = result["comparisons"]
    rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
    print(output.table(rows, ".3f", HEADINGS))


def main() -> int:
    """Compares retraining and estimates for the data of the flags."""
    cli.use_devices()
    table = datasets.from_flags(cli.SEED.value)
    print(f"{table.name}: {len(table.y)} rows")
    output.print_environment()
    result = run(
        table=table,
        hidden=config.hidden_sizes(),
        prior_precision=_PRIOR_PRECISION.value,
        num_rows=_NUM_ROWS.value,
        num_steps=config.NUM_STEPS.value or DEFAULTS["num_steps"],
        dtype=cli.DTYPE.value or DEFAULTS["dtype"],
        seed=cli.SEED.value,
        make_folder=cli.output_dir,
    )
    _report(result)
    if cli.OUTPUT_DIR.value is not None:
        output.print_files(Path(cli.OUTPUT_DIR.value))
    return 0


if __name__ == "__main__":
    cli.launch(main, DEFAULTS, HELP)
