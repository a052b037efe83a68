r"""How well does one network do on this data, with this optimizer?

    python -m experiments.train
    python -m experiments.train --data mine.csv --target label --output_dir results
    python -m experiments.train --predict new.csv --output_dir results

Splits the rows 60/20/20, trains by jaxbce.fit on the first part, keeps the parameters
with the least loss on the second, and prints scikit-learn's metrics on all three,
beside logistic regression and MLPClassifier on the same split: MLPClassifier has the
same hidden layers and otherwise scikit-learn's defaults; each target has its own.
Expect a test accuracy on digits of about 0.98, of logistic regression 0.91.

With --output_dir everything is kept as files: the same command goes on where an
earlier one ended, at whatever moment that was; --predict scores new rows, and reads
none of the other flags. A model is a pickle: score with those you trust.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import jaxbce
from experiments.support import (
    artifacts,
    baselines,
    chunked_fit,
    cli,
    datasets,
    metrics,
    optimizers,
    output,
    resumable,
)

for _module in (datasets, optimizers, chunked_fit):
    flags.adopt_module_key_flags(_module)
for _name in (*cli.COMMON, "dtype"):
    flags.declare_key_flag(_name)
_GRADIENT = flags.DEFINE_enum(
    "gradient",
    "manual",
    ["manual", "autodiff"],
    "Follow the hand-derived gradient, or JAX's own of the plainly written loss.",
)
_PREDICT = flags.DEFINE_string(
    "predict",
    None,
    "Score the rows of this .csv or .parquet file with the network in --output_dir.",
)

Row = dict[str, Any]


def run(
    *,
    table: datasets.Table,
    seed: int = 0,
    hidden: tuple[int, ...] = (32,),
    optimizer: str = "adam",
    optimizer_args: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    schedule: str = "constant",
    weight_decay: float = 0.001,
    batch_size: int | None = 32,
    num_steps: int | None = None,
    epochs: int | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    pos_weight: float | str = 1.0,
    gradient: str = "manual",
    dtype: str = "float32",
    with_baselines: bool = True,
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains one network, and measures it.

    Args:
      table: The data.
      seed: Of the split, the parameters and the order of rows.
      hidden: Widths of the hidden layers.
      optimizer: A name in optax or optax.contrib.
      optimizer_args: Its arguments.
      learning_rate: Its learning rate; None is its default, or 0.003.
      schedule: "constant", "cosine", "warmup-cosine" or "exponential".
      weight_decay: The optimizer's own, or a penalty.
      batch_size: Rows in a batch; None is all of them.
      num_steps: Steps to train for; None is what `epochs` says.
      epochs: Epochs to train for; None is 60.
      evaluate_every: Steps between evaluations; None is an epoch or a hundredth of the
        run, whichever is more.
      patience: Steps without a better validation loss after which to stop, or None.
      pos_weight: Weight of label 1 in the loss, or "balanced".
      gradient: "manual" or "autodiff".
      dtype: "float64", "float32" or "bfloat16".
      with_baselines: Whether to fit scikit-learn's models too.
      make_folder: Called when all arguments are found good; where to keep the run and
        go on with it, or None.

    Returns:
      "configuration"; "metrics", a row for each model, part and target; "history", a
      row for each evaluation; "best_step" and "params", with the least validation
      loss; "steps" taken, and whether the run "diverged".

    Raises:
      InputError: If something asked for cannot be done, or the run diverges at once.
    """
    parts, preparation = datasets.split(table, seed)
    rows = len(parts["train"].x)
    if batch_size is not None and batch_size > rows:
        raise cli.InputError(
            f"--batch_size={batch_size}: {table.name} has {rows} rows to train on"
        )
    num_steps, evaluate_every = chunked_fit.duration(
        rows, batch_size, num_steps, epochs, evaluate_every
    )
    configuration = {
        "data": table.name,
        "data_digest": datasets.digest(table),
        "classes": table.classes,
        "seed": seed,
        "hidden": hidden,
        "optimizer": optimizer,
        "optimizer_args": optimizer_args or {},
        "learning_rate": learning_rate,
        "schedule": schedule,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "num_steps": num_steps,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "pos_weight": _pos_weight(pos_weight, parts["train"].y),
        "gradient": gradient,
        "dtype": dtype,
    }
    transformation, penalty = optimizers.build(
        optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        num_steps=num_steps,
        weight_decay=weight_decay,
        args=tuple((optimizer_args or {}).items()),
    )
    losses = {"manual": jaxbce.loss, "autodiff": baselines.plain_objective}
    with jax.enable_x64(dtype == "float64"):
        make = chunked_fit.train(
            parts,
            seed=seed,
            hidden=hidden,
            dtype=dtype,
            optimizer=transformation,
            loss=optimizers.objective(losses[gradient], penalty),
            num_steps=num_steps,
            batch_size=batch_size,
            evaluate_every=evaluate_every,
            patience=patience,
            pos_weight=configuration["pos_weight"],
        )
        with contextlib.ExitStack() as stack:
            folder, checkpoints = make_folder(), None
            if folder is not None:
                opened = resumable.opened(folder, configuration)
                checkpoints = stack.enter_context(opened)
            trained = make(checkpoints)
            best, steps = int(trained.run.best_step), int(trained.run.step)
            diverged = int(trained.run.diverged_at) >= 0
            if best == 0:
                raise cli.InputError(
                    f"the loss was not finite at step {steps}, before any evaluation; "
                    "a smaller --learning_rate may help"
                )
            params = trained.run.best_params
            probabilities = {
                artifacts.NETWORK: {
                    name: artifacts.predict(params, part.x)
                    for name, part in parts.items()
                }
            }
            if with_baselines:
                probabilities |= metrics.baselines(parts, hidden, seed)
            history = zip(trained.steps, trained.history.tolist(), strict=True)
            result = {
                "configuration": configuration,
                "best_step": best,
                "steps": steps,
                "diverged": diverged,
                "metrics": metrics.table(parts, list(table.classes), probabilities),
                "history": [
                    {"step": int(step), "train loss": train, "validation loss": valid}
                    for step, (train, valid) in history
                ],
                "params": params,
            }
            if folder is not None:
                artifacts.keep(folder, result, table, parts, preparation, probabilities)
    return result


def _pos_weight(value: float | str, y: np.ndarray) -> tuple[float, ...]:
    """--pos_weight as a number for each output."""
    if value == "balanced":
        return tuple(((1 - y).sum(axis=0) / y.sum(axis=0)).tolist())
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if not 0 <= number < np.inf:
        raise cli.InputError(
            f"--pos_weight={value}: a finite number >= 0 or 'balanced' is accepted"
        )
    return (number,) * y.shape[1]


def main() -> int:
    """Trains, or scores, what the flags say."""
    jax.config.update("jax_default_matmul_precision", "highest")
    if _PREDICT.value is not None:
        if cli.OUTPUT_DIR.value is None:
            raise cli.InputError("--predict needs --output_dir, where the run is")
        with jax.enable_x64(True):  # whatever dtype the parameters have
            rows, path = artifacts.score(_PREDICT.value, Path(cli.OUTPUT_DIR.value))
        print(f"{rows} rows scored: {path}")
        return 0
    hidden = datasets.hidden_sizes()
    table = datasets.from_flags(cli.SEED.value)
    numbers = table.features.select_dtypes(float).shape[1]
    categories = table.features.shape[1] - numbers
    columns = f"{numbers} columns of numbers"
    columns += f", {categories} of categories" if categories else ""
    print(f"{table.name}: {len(table.y)} rows, {columns}")
    print(f"label 1: {', '.join(datasets.label_1(table.classes))}")
    print(", ".join(f"{k} {v}" for k, v in output.environment().items()), flush=True)
    result = run(
        table=table,
        seed=cli.SEED.value,
        hidden=hidden,
        optimizer=optimizers.OPTIMIZER.value,
        optimizer_args=optimizers.arguments(optimizers.OPTIMIZER_ARG.value),
        learning_rate=optimizers.LEARNING_RATE.value,
        schedule=optimizers.SCHEDULE.value,
        weight_decay=optimizers.WEIGHT_DECAY.value,
        batch_size=chunked_fit.batch_size(),
        num_steps=chunked_fit.NUM_STEPS.value,
        epochs=chunked_fit.EPOCHS.value,
        evaluate_every=chunked_fit.EVALUATE_EVERY.value,
        patience=chunked_fit.PATIENCE.value,
        pos_weight=chunked_fit.POS_WEIGHT.value,
        gradient=_GRADIENT.value,
        dtype=cli.DTYPE.value or "float32",
        make_folder=cli.output_dir,
    )
    asked, steps = result["configuration"]["num_steps"], result["steps"]
    why = "diverged" if result["diverged"] else "stopped, its patience at an end,"
    print(
        f"\nParameters of step {result['best_step']}, with the least validation loss; "
        + (f"all {asked} steps taken." if steps == asked else f"{why} at step {steps}.")
    )
    print(f"\n{output.table(result['metrics'], '.4f')}")
    if cli.OUTPUT_DIR.value is not None:
        folder = Path(cli.OUTPUT_DIR.value)
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        print(f"\nIn {folder}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    cli.launch(main)
