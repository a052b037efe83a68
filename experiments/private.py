r"""What does differential privacy cost here?

    python -m experiments.private
    python -m experiments.private --epsilon 1,3 --delta 1e-6 --output_dir results
    python -m experiments.private --data mine.csv --target label --bounds 0,100

DP-SGD: each step draws its rows by Poisson sampling, sums their gradients, each
clipped to --max_grad_norm by jaxbce's clipped_value_and_grad, adds Gaussian noise and
divides by --batch_size, the expected size of a batch. Sampling and noise are
jax_privacy's, and the noise is the least with which dp_accounting's privacy loss
distributions give (ε, δ) for adding or removing one row. For every ε, and without
privacy, --seeds networks are trained, all in one program. Expect a test accuracy on
digits of about 0.91 at ε = 3 and 0.98 without privacy.

What ε covers is the parameters of one network, released alone. It does not cover the
accuracies printed here, a choice among rows of the table, or standardising by the
training rows: with --bounds, what is known of the features beforehand, there is none.
The noise is only as secret as --seed.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags
from tqdm import tqdm

import jaxbce
from experiments.support import (
    chunked_fit,
    cli,
    datasets,
    dp_accounting,
    optimizers,
    output,
    plots,
)
from jaxbce import per_example

for _module in (datasets, optimizers):
    flags.adopt_module_key_flags(_module)
for _name in (*cli.COMMON, "batch_size", "dtype", "num_steps", "seeds"):
    flags.declare_key_flag(_name)
_EPSILON = flags.DEFINE_list(
    "epsilon",
    ["0.5", "1", "2", "3", "5", "8"],
    "Privacy to train with: ε above 0 and up to 20, one or several, comma-separated.",
)
_DELTA = flags.DEFINE_float(
    "delta", 1e-5, "δ, from 1e-15; less than 1 / rows is usual.", 0.0, 1.0
)
_MAX_GRAD_NORM = flags.DEFINE_float(
    "max_grad_norm", 1.0, "The norm that each row's gradient is clipped to."
)
_BOUNDS = flags.DEFINE_list(
    "bounds",
    None,
    "LOW,HIGH of all features, known without looking at the data: they are clipped to "
    "it and scaled to [-1, 1]. If not set, 0,16 for digits; others are standardised by "
    "the training rows, which ε does not cover.",
)

NUM_STEPS, BATCH_SIZE, SEEDS, LEARNING_RATE = 300, 256, 5, 0.01
LARGEST_EPSILON = 20.0  # beyond, accounting takes minutes, and little is private
LEAST_DELTA = 1e-15  # below, the accountant's own roundings count
BOUNDS = {"digits": (0.0, 16.0)}
CHUNKS = 20

Row = dict[str, Any]


def run(
    *,
    table: datasets.Table,
    epsilons: tuple[float, ...] = (3.0,),
    delta: float = 1e-5,
    max_grad_norm: float = 1.0,
    num_steps: int = NUM_STEPS,
    batch_size: int | None = None,
    seeds: int = SEEDS,
    seed: int = 0,
    hidden: tuple[int, ...] = (32,),
    optimizer: str = "adam",
    optimizer_args: dict[str, Any] | None = None,
    learning_rate: float | None = LEARNING_RATE,
    schedule: str = "constant",
    weight_decay: float = 0.001,
    bounds: tuple[float, float] | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Trains networks for every ε, and without privacy.

    Args:
      table: The data.
      epsilons: Privacy to train with, each in (0, 20].
      delta: δ, in [1e-15, 1).
      max_grad_norm: The norm that each row's gradient is clipped to.
      num_steps: Steps to train for.
      batch_size: Expected rows in a batch; 0 is all of them, None a quarter, 256 at
        most.
      seeds: Networks for each ε.
      seed: Of the split and of everything random.
      hidden: Widths of the hidden layers.
      optimizer: A name in optax or optax.contrib.
      optimizer_args: Its arguments.
      learning_rate: Its learning rate; None is its default, or 0.003.
      schedule: "constant", "cosine", "warmup-cosine" or "exponential".
      weight_decay: The optimizer's own, or of the objective.
      bounds: Of all features, known beforehand; None is to standardise.
      dtype: "float64" or "float32".

    Returns:
      "configuration"; "rows", one for each ε and a last one without privacy; "clipped",
      the share of a batch's rows that were, `[ε, seeds, steps]`.

    Raises:
      InputError: If something asked for cannot be done.
    """
    parts, _ = datasets.split(table, seed)
    if bounds is not None:
        parts = _scaled(table, parts, bounds)
    rows = len(parts["train"].x)
    if not epsilons or not all(0 < epsilon <= LARGEST_EPSILON for epsilon in epsilons):
        given = ",".join(map(str, epsilons))
        raise cli.InputError(f"--epsilon={given}: not in (0, {LARGEST_EPSILON:g}]")
    if not LEAST_DELTA <= delta < 1:
        raise cli.InputError(f"--delta={delta}: not in [{LEAST_DELTA:g}, 1)")
    if dtype == "bfloat16":
        raise cli.InputError(
            "--dtype=bfloat16: rounds sums by more than the noise is meant to hide"
        )
    if not 0 < max_grad_norm < np.inf:
        raise cli.InputError(f"--max_grad_norm={max_grad_norm}: not a number > 0")
    if batch_size is None:
        batch_size = min(BATCH_SIZE, -(-rows // 4))
    batch_size = batch_size or rows
    if batch_size > rows:
        raise cli.InputError(
            f"--batch_size={batch_size}: {table.name} has {rows} rows to train on"
        )
    family = optimizers.family(
        optimizer,
        swept=(),
        learning_rate=learning_rate,
        schedule=schedule,
        num_steps=num_steps,
        weight_decay=weight_decay,
        args=tuple((optimizer_args or {}).items()),
    )
    transformation = family({})
    try:
        one = (jaxbce.Layer(jnp.zeros((1, 1)), jnp.zeros(1)),)
        jax.eval_shape(
            lambda: transformation.update(one, transformation.init(one), one)
        )
    except TypeError as error:
        raise cli.InputError(
            f"--optimizer={optimizer}: needs more than the private gradient ({error})"
        ) from None
    sampling: Any = {"rows": rows, "batch_size": batch_size, "num_steps": num_steps}
    bar = tqdm(epsilons, desc="accounting", unit="ε", disable=None)
    noise = [
        dp_accounting.noise_multiplier(epsilon, delta, **sampling) for epsilon in bar
    ]
    spent = [dp_accounting.epsilon_spent(sigma, delta, **sampling) for sigma in noise]
    with jax.enable_x64(dtype == "float64"):
        accuracies, clipped = _train(
            parts,
            transformation,
            levels=[
                *((n * max_grad_norm, max_grad_norm) for n in noise),
                (0.0, np.inf),
            ],
            sampling=sampling,
            seeds=seeds,
            seed=seed,
            hidden=hidden,
            dtype=dtype,
        )
    tenth = -(-num_steps // 10)
    measured = []
    for i, (epsilon, sigma) in enumerate(
        zip((*epsilons, np.inf), (*noise, 0.0), strict=True)
    ):
        row: Row = {"ε": epsilon, "ε spent": [*spent, np.inf][i], "noise": sigma}
        for part, values in accuracies.items():
            row[f"{part} accuracy"] = float(values[i].mean())
            row[f"{part} s.e."] = float(values[i].std(ddof=seeds > 1) / seeds**0.5)
        row["clipped at first"] = float(np.mean(clipped[i, :, :tenth]))
        row["clipped at last"] = float(np.mean(clipped[i, :, -tenth:]))
        measured.append(row)
    return {
        "configuration": {
            "data": table.name,
            "data_digest": datasets.digest(table),
            "classes": table.classes,
            "rows": rows,
            "seed": seed,
            "seeds": seeds,
            "epsilons": epsilons,
            "delta": delta,
            "max_grad_norm": max_grad_norm,
            "num_steps": num_steps,
            "batch_size": batch_size,
            "hidden": hidden,
            "optimizer": optimizer,
            "optimizer_args": optimizer_args or {},
            "learning_rate": learning_rate,
            "schedule": schedule,
            "weight_decay": weight_decay,
            "bounds": bounds,
            "dtype": dtype,
        },
        "rows": measured,
        "clipped": clipped,
    }


def _scaled(
    table: datasets.Table, parts: dict[str, datasets.Part], bounds: tuple[float, float]
) -> dict[str, datasets.Part]:
    """The parts with features from `bounds` to [−1, 1], whatever the rows are."""
    low, high = bounds
    if not -np.inf < low < high < np.inf:
        raise cli.InputError(f"--bounds={low:g},{high:g}: two numbers, LOW < HIGH")
    categories = table.features.select_dtypes(exclude=float).columns
    if len(categories):
        raise cli.InputError(
            f"--bounds is of numbers; {table.name} has categories in {categories[0]!r}"
        )
    x = table.features.to_numpy(np.float64).clip(low, high)
    x = 2 * (x - low) / (high - low) - 1
    return {name: part._replace(x=x[part.rows]) for name, part in parts.items()}


def _train(
    parts: dict[str, datasets.Part],
    optimizer: optax.GradientTransformation,
    *,
    levels: list[tuple[float, float]],
    sampling: dict[str, int],
    seeds: int,
    seed: int,
    hidden: tuple[int, ...],
    dtype: str,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Accuracies by part, `[ε, seeds]`, and shares clipped, `[ε, seeds, steps]`.

    A level is the noise's standard deviation and the norm clipped to. Networks of one
    seed start from the same weights and see the same batches.
    """
    x, y = (jnp.asarray(t, dtype) for t in parts["train"][1:])
    sizes = (x.shape[1], *hidden, y.shape[1])
    columns = tuple(jnp.asarray(t, x.dtype) for t in zip(*levels, strict=True))
    keys = jax.random.split(jax.random.key(seed), (seeds, 2))

    def private(key: jax.Array, stddev: jax.Array) -> optax.GradientTransformation:
        mean = dp_accounting.noisy_mean(key, stddev, sampling["batch_size"])
        return optax.chain(mean, optimizer)

    def begin(level: Any, keys: jax.Array) -> Any:
        params = jaxbce.init(keys[0], sizes, dtype=dtype)
        return params, private(keys[1], level[0]).init(params)

    def steps(state: Any, level: Any, keys: jax.Array, batches: jax.Array) -> Any:
        stddev, max_norm = level
        transformation = private(keys[1], stddev)

        def step(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, optimizer_state = state
            clipped = per_example.clipped_value_and_grad(
                params,
                x[rows],
                y[rows],
                max_norm=max_norm,
                sample_weight=rows >= 0,  # −1 fills a batch up
                reduction="sum",
            )
            updates, optimizer_state = transformation.update(
                clipped.grads, optimizer_state, params
            )
            params = optax.apply_updates(params, updates)
            share = jnp.nan_to_num(clipped.fraction_clipped)  # 0 of an empty batch
            return (params, optimizer_state), share

        return jax.lax.scan(step, state, batches)

    num_steps = sampling["num_steps"]
    draws = [
        dp_accounting.poisson_batches(**sampling, seed=(seed, s)) for s in range(seeds)
    ]
    each_level = jax.vmap(begin, in_axes=(0, None))
    state = jax.jit(jax.vmap(each_level, in_axes=(None, 0)))(columns, keys)
    each_level = jax.vmap(steps, in_axes=(0, 0, None, None))
    advance = jax.jit(jax.vmap(each_level, in_axes=(0, None, 0, 0)))
    chunk = -(-num_steps // CHUNKS)
    clipped, width = [], 0
    with tqdm(total=num_steps, unit="step", disable=None) as bar:
        for start in range(0, num_steps, chunk):
            count = min(chunk, num_steps - start)
            drawn = [list(itertools.islice(batches, count)) for batches in draws]
            longest = max(len(rows) for batches in drawn for rows in batches)
            width = max(width, longest + longest // 8, 1)  # room, to compile once
            filled = np.full((seeds, count, width), -1, np.int32)
            for batches, target in zip(drawn, filled, strict=True):
                for rows, line in zip(batches, target, strict=True):
                    line[: len(rows)] = rows
            state, share = advance(state, columns, keys, jnp.asarray(filled))
            clipped.append(np.asarray(share))
            bar.update(count)

    @jax.jit
    def correct(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        each = jax.vmap(jax.vmap(jaxbce.logits, (0, None)), (0, None))
        a = each(params, x)  # [seeds, ε, N, n_L]
        right = jnp.mean((a > 0) == (y > 0.5), axis=(2, 3))
        return jnp.where(jnp.isfinite(a).all(axis=(2, 3)), right, jnp.nan)

    accuracies = {
        name: np.asarray(correct(state[0], jnp.asarray(parts[name].x, dtype), part.y)).T
        for name, part in parts.items()
        if name != "train"
    }
    shares = np.concatenate(clipped, axis=2)  # [seeds, ε, steps]
    return accuracies, shares.swapaxes(0, 1)


def _floats(flag: str, texts: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in texts)
    except ValueError:
        given = ",".join(texts)
        raise cli.InputError(
            f"--{flag}={given}: not numbers, comma-separated"
        ) from None


def _report(result: dict[str, Any]) -> None:
    configuration, rows = result["configuration"], result["rows"]
    print(
        f"\n{configuration['rows']} rows to train on, each in a batch with chance "
        f"{configuration['batch_size'] / configuration['rows']:.3f}; "
        f"{configuration['num_steps']} steps, δ = {configuration['delta']:g}, for "
        f"adding or removing one row.\n"
    )
    shown = [
        {
            "ε": f"{row['ε']:g}" if row["ε"] < np.inf else "not private",
            "ε spent": f"{row['ε spent']:.4f}" if row["ε"] < np.inf else "",
            "noise multiplier": f"{row['noise']:.3f}" if row["noise"] else "0",
            "validation accuracy": f"{row['validation accuracy']:.4f}",
            "test accuracy": f"{row['test accuracy']:.4f} ± {row['test s.e.']:.4f}",
            "clipped at first": f"{row['clipped at first']:.2f}",
            "at last": f"{row['clipped at last']:.2f}",
        }
        for row in rows
    ]
    print(output.table(shown))
    print(
        f"\nMeans over {configuration['seeds']} networks ± their standard error; the "
        "share of rows clipped in the first and last tenth of the steps."
    )
    if configuration["bounds"] is None:
        print(
            "Features were standardised by the training rows, which ε does not cover: "
            "give --bounds if they are known beforehand."
        )
    if configuration["delta"] >= 1 / configuration["rows"]:
        print("δ is not less than 1 / rows: a row may be published whole.")


def main() -> int:
    """Trains, prints and draws what the flags say."""
    jax.config.update("jax_default_matmul_precision", "highest")
    folder = cli.output_dir()
    epsilons = tuple(sorted(set(_floats("epsilon", _EPSILON.value))))
    bounds: Any = BOUNDS.get(datasets.DATASET.value or "digits")
    if datasets.DATA.value is not None:
        bounds = None
    if _BOUNDS.value is not None:
        bounds = _floats("bounds", _BOUNDS.value)
        if len(bounds) != 2:
            raise cli.InputError(f"--bounds={','.join(_BOUNDS.value)}: not LOW,HIGH")
    hidden = datasets.hidden_sizes()
    table = datasets.from_flags(cli.SEED.value)
    print(f"{table.name}: {len(table.y)} rows")
    print(", ".join(f"{k} {v}" for k, v in output.environment().items()), flush=True)
    rate, optimizer = optimizers.LEARNING_RATE.value, optimizers.OPTIMIZER.value
    if rate is None and optimizer == "adam":
        rate = LEARNING_RATE
    result = run(
        table=table,
        epsilons=epsilons,
        delta=_DELTA.value,
        max_grad_norm=_MAX_GRAD_NORM.value,
        num_steps=chunked_fit.NUM_STEPS.value or NUM_STEPS,
        batch_size=chunked_fit.BATCH_SIZE.value,
        seeds=cli.SEEDS.value or SEEDS,
        seed=cli.SEED.value,
        hidden=hidden,
        optimizer=optimizer,
        optimizer_args=optimizers.arguments(optimizers.OPTIMIZER_ARG.value),
        learning_rate=rate,
        schedule=optimizers.SCHEDULE.value,
        weight_decay=optimizers.WEIGHT_DECAY.value,
        bounds=bounds,
        dtype=cli.DTYPE.value or "float32",
    )
    _report(result)
    if folder is not None:
        _keep(folder, result)
        print(f"\nIn {folder}: private.json, private.csv, clipped.csv, private.png")
    return 0


def _keep(folder: Path, result: dict[str, Any]) -> None:
    rows, clipped = result["rows"], result["clipped"].mean(axis=1)  # [ε, steps]
    document = {"configuration": result["configuration"], "rows": rows}
    output.write(folder, "private", document, rows)
    columns = {
        f"ε = {row['ε']:g}": line for row, line in zip(rows, clipped, strict=True)
    }
    shares = pd.DataFrame({"step": np.arange(clipped.shape[1]), **columns})
    with output.replacing(folder / "clipped.csv") as path:
        shares.drop(columns="ε = inf").to_csv(path, index=False)
    plots.private(folder / "private.png", rows, clipped)


if __name__ == "__main__":
    cli.launch(main)
