r"""How much accuracy does differential privacy cost here?

    python -m experiments.private
    python -m experiments.private --epsilon 1,3 --delta 1e-6 --output_dir results
    python -m experiments.private --data mine.csv --target label --bounds age=0:99,k=0:1

Trains with DP-SGD. Each step draws examples by Poisson sampling, clips their gradients
to --max_grad_norm and sums them (jaxbce's clipped_value_and_grad), adds Gaussian noise,
and divides by --batch_size, the expected number of examples. Sampling and noise are
jax_privacy's. The noise is the smallest for which dp_accounting's privacy loss
distributions give (ε, δ) for adding or removing one example. For every ε, and without
privacy, --seeds networks are trained, all in one program. Expect a test accuracy on
digits of about 0.91 at ε = 3, and 0.98 without privacy.

ε covers the parameters of one network, released alone. It does not cover the metrics
printed here, choosing among rows of the table, or standardizing by the training
examples. With --bounds, which must be known without looking at the data, nothing is
standardized. The noise is only as secret as --seed.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags
from sklearn.compose import ColumnTransformer
from tqdm import tqdm

import jaxbce
from experiments.support import (
    cli,
    config,
    datasets,
    dp_accounting,
    metrics,
    output,
    plots,
    resumable,
    splitting,
)
from experiments.support.config import OptimizerConfig, TrainingConfig
from jaxbce import per_example

flags.adopt_module_key_flags(datasets)
flags.adopt_module_key_flags(splitting)
for _name in (
    *cli.COMMON,
    *config.OPTIMIZER_FLAGS,
    "hidden",
    "batch_size",
    "num_steps",
    "dtype",
    "seeds",
):
    flags.declare_key_flag(_name)
_EPSILON = flags.DEFINE_list(
    "epsilon",
    ["0.5", "1", "2", "3", "5", "8"],
    "Privacy budgets ε to train with, comma-separated, each above 0 and at most 20.",
)
_DELTA = flags.DEFINE_float(
    "delta",
    1e-5,
    "δ, at least 1e-15; usually less than 1 / the number of training examples.",
    0.0,
    1.0,
)
_MAX_GRAD_NORM = flags.DEFINE_float(
    "max_grad_norm", 1.0, "Norm to which each example's gradient is clipped."
)
_BOUNDS = flags.DEFINE_list(
    "bounds",
    None,
    "LOW,HIGH of all columns of numbers, or NAME=LOW:HIGH of each, comma-separated, "
    "known without looking at the data. Numbers are clipped to them and scaled to "
    "[-1, 1]. If not set, 0,16 for digits; other data are standardized by the training "
    "examples, which ε does not cover.",
)

DEFAULTS: dict[str, Any] = {"num_steps": 300, "dtype": "float32", "seeds": 5}
HELP = {
    "batch_size": "Expected examples per batch; 0 is all of them. If not set, a "
    "quarter of the training rows, at most 256.",
    "dtype": "<float64|float32>: Floating-point type to compute in.",
    "learning_rate": "The learning rate. If not set, 0.01 for adam; for others the "
    "optimizer's own default, or 0.003 if it has none.",
    "seeds": "Networks per ε, which differ only by their seed.",
}
LEARNING_RATE = 0.01  # default for adam
MAX_BATCH_SIZE = 256
BOUNDS = {"digits": (0.0, 16.0)}
METRICS = ("accuracy", "roc_auc", "log_loss")
CHUNKS = 20  # of steps; each moves the progress bar

Row = dict[str, Any]
Bounds = tuple[float, float] | dict[str, tuple[float, float]]


class NoiseLevel(NamedTuple):
    """Noise and clipping of one privacy budget.

    Attributes:
      stddev: Standard deviation of the noise in a summed gradient, a scalar.
      max_norm: Norm to which each example's gradient is clipped, a scalar.
    """

    stddev: Any
    max_norm: Any


def run(
    *,
    table: datasets.Table,
    privacy: dp_accounting.PrivacyConfig,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    seeds: int = 5,
    bounds: Bounds | None = None,
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains networks for every ε, and without privacy.

    Args:
      table: The data.
      privacy: Privacy budgets and clipping norm.
      optimizer: The optimizer.
      training: How to train; `batch_size` is the expected number of examples per batch,
        and None is a quarter of the training examples, at most 256.
      seeds: Networks per ε.
      bounds: Bounds of all numbers, or of each column, known beforehand; None
        standardizes the features.
      make_folder: Called once all arguments are known to be valid; returns the folder
        in which to save the results, or None.

    Returns:
      "configuration"; "base_rate", the share of label 1 among the test examples, per
      output; "has_categories", whether a feature is categorical; "rows", one per ε, and
      a last one without privacy; and "clipped", the fraction of each batch that was
      clipped, `[levels, seeds, steps]`, where the last level is without privacy.

    Raises:
      InputError: If an argument cannot be used.
    """
    # Check everything before anything is trained.
    splits, preprocessor = datasets.split(table, training.seed)
    if bounds is not None:
        splits = scale_to_bounds(table, splits, preprocessor, bounds)
    rows = len(splits["train"].x)
    privacy.check()
    if training.dtype == "bfloat16":
        raise cli.InputError(
            "--dtype=bfloat16: its rounding errors exceed what the noise should hide"
        )
    if training.batch_size is None:
        training = dataclasses.replace(training, batch_size=default_batch_size(rows))
    training, optimizer = training.check(rows, table.name), optimizer.fill_in(rows)
    transformation = build_optimizer(optimizer, training)

    sampling = {
        "rows": rows,
        "batch_size": training.batch_size or rows,
        "num_steps": training.steps,
    }
    configuration = {
        **datasets.describe(table),
        "rows": rows,
        "seeds": seeds,
        **privacy._asdict(),
        **optimizer.as_dict(),
        **training.as_dict(),
        "batch_size": sampling["batch_size"],
        "bounds": bounds,
    }
    with jax.enable_x64(training.dtype == "float64"), contextlib.ExitStack() as stack:
        if (folder := make_folder()) is not None:
            stack.enter_context(resumable.lock_output_dir(folder, configuration))

        # Find the noise for each ε.
        noise, spent = find_noise(privacy, sampling)

        # Train networks for all of them, and without noise or clipping.
        norm = privacy.max_grad_norm
        levels = [*(NoiseLevel(n * norm, norm) for n in noise), NoiseLevel(0.0, np.inf)]
        params, clipped = train(
            splits["train"],
            transformation,
            training,
            levels=levels,
            sampling=sampling,
            seeds=seeds,
        )
        scores = {
            name: evaluate(params, splits[name]) for name in ("validation", "test")
        }
        result = {
            "configuration": configuration,
            "base_rate": np.mean(splits["test"].y, axis=0).tolist(),
            "has_categories": bool(
                table.features.select_dtypes(exclude=float).shape[1]
            ),
            "rows": summarize(
                [*privacy.epsilons, np.inf],
                [*spent, np.inf],
                [*noise, 0.0],
                scores,
                clipped,
            ),
            "clipped": clipped,
        }
        if folder is not None:
            save(folder, result)
    return result


def find_noise(
    privacy: dp_accounting.PrivacyConfig, sampling: dict[str, int]
) -> tuple[list[float], list[float]]:
    """The noise multiplier for each ε, and the ε that it spends."""
    noise = [
        dp_accounting.noise_multiplier(epsilon, privacy.delta, **sampling)
        for epsilon in tqdm(privacy.epsilons, desc="accounting", unit="ε", disable=None)
    ]
    spent = [
        dp_accounting.epsilon_spent(multiplier, privacy.delta, **sampling)
        for multiplier in noise
    ]
    return noise, spent


def default_batch_size(rows: int) -> int:
    """A quarter of the training examples, at most 256."""
    return min(MAX_BATCH_SIZE, -(-rows // 4))


def build_optimizer(
    optimizer: OptimizerConfig, training: TrainingConfig
) -> optax.GradientTransformation:
    """The optimizer, to which the gradient of any penalty is added without noise.

    Raises:
      InputError: If the optimizer needs more than the gradient.
    """
    family = optimizer.build_family(training.steps)
    transformation = family.make_optimizer({})
    if family.make_penalty is not None:
        penalty = family.make_penalty({})  # of no data, so private as it is

        def add_gradient(grads: Any, params: Any) -> Any:
            return jax.tree.map(jnp.add, grads, jax.grad(penalty)(params))

        transformation = optax.chain(optax.stateless(add_gradient), transformation)
    params = (jaxbce.Layer(jnp.zeros((1, 1)), jnp.zeros(1)),)
    try:
        jax.eval_shape(
            lambda: transformation.update(params, transformation.init(params), params)
        )
    except TypeError as error:
        raise cli.InputError(
            f"--optimizer={optimizer.optimizer}: needs more than the private gradient "
            f"({error})"
        ) from None
    return transformation


def scale_to_bounds(
    table: datasets.Table,
    splits: dict[str, datasets.Split],
    preprocessor: ColumnTransformer,
    bounds: Bounds,
) -> dict[str, datasets.Split]:
    """The splits, with numbers clipped to `bounds` and scaled to [−1, 1].

    Missing numbers become 0. Categories are as `preprocessor`, which is fitted on the
    training rows, encodes them.

    Raises:
      InputError: If a column of numbers has no bounds, or other columns have some.
    """
    numbers = list(table.features.select_dtypes(float))
    if isinstance(bounds, tuple):
        dates = [c.name for c in table.schema.columns if c.kind == "date"]
        if dates:
            raise cli.InputError(
                f"--bounds: expected them per column, because {dates[0]!r} is a date; "
                f"columns are {', '.join(map(repr, numbers))}"
            )
        bounds = dict.fromkeys(numbers, bounds)
    for known, wanted, what in (
        (numbers, bounds, "has no column of numbers"),
        (bounds, numbers, "has no bounds for column"),
    ):
        for name in wanted:
            if name not in known:
                raise cli.InputError(f"--bounds: {table.name} {what} {name!r}")
    for name, (low, high) in bounds.items():
        if not -np.inf < low < high < np.inf:
            raise cli.InputError(
                f"--bounds: expected finite numbers LOW < HIGH for {name!r}, got "
                f"{low:g}:{high:g}"
            )
    low, high = np.array([bounds[name] for name in numbers]).reshape(-1, 2).T
    x = table.features[numbers].to_numpy(np.float64).clip(low, high)
    x = np.nan_to_num(2 * (x - low) / (high - low) - 1)
    encoded = preprocessor.output_indices_["categories"]
    return {
        name: split._replace(x=np.hstack([x[split.rows], split.x[:, encoded]]))
        for name, split in splits.items()
    }


def train(
    data: datasets.Split,
    optimizer: optax.GradientTransformation,
    training: TrainingConfig,
    *,
    levels: list[NoiseLevel],
    sampling: dict[str, int],
    seeds: int,
) -> tuple[Any, np.ndarray]:
    """Trains a network for every noise level and seed.

    Networks of one seed start from the same parameters and see the same batches.

    Args:
      data: The training split.
      optimizer: The optimizer of the private gradient.
      training: How to train.
      levels: Noise levels.
      sampling: Arguments of `dp_accounting.poisson_batches`.
      seeds: Networks per level.

    Returns:
      Parameters, leaves `[seeds, levels, ...]`, and the fraction of each batch that was
      clipped, `[levels, seeds, steps]`.
    """
    x, y = jnp.asarray(data.x, training.dtype), jnp.asarray(data.y, training.dtype)
    sizes = (x.shape[1], *training.hidden, y.shape[1])
    stacked = NoiseLevel(*(jnp.asarray(t, x.dtype) for t in zip(*levels, strict=True)))
    keys = jax.random.split(jax.random.key(training.seed), (seeds, 2))

    def private(key: jax.Array, stddev: Any) -> optax.GradientTransformation:
        mean = dp_accounting.noisy_mean(key, stddev, sampling["batch_size"])
        return optax.chain(mean, optimizer)

    def begin(level: NoiseLevel, keys: jax.Array) -> Any:
        params = jaxbce.init(keys[0], sizes, dtype=training.dtype)
        return params, private(keys[1], level.stddev).init(params)

    def steps(
        state: Any, level: NoiseLevel, keys: jax.Array, batches: jax.Array
    ) -> Any:
        transformation = private(keys[1], level.stddev)

        def step(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, optimizer_state = state
            clipped = per_example.clipped_value_and_grad(
                params,
                x[rows],
                y[rows],
                max_norm=level.max_norm,
                sample_weight=rows >= 0,  # −1 pads a batch
                reduction="sum",
            )
            updates, optimizer_state = transformation.update(
                clipped.grads, optimizer_state, params
            )
            params = optax.apply_updates(params, updates)
            fraction = jnp.nan_to_num(clipped.fraction_clipped)  # 0 of an empty batch
            return (params, optimizer_state), fraction

        return jax.lax.scan(step, state, batches)

    per_level = jax.vmap(begin, in_axes=(0, None))
    state = jax.jit(jax.vmap(per_level, in_axes=(None, 0)))(stacked, keys)
    per_level = jax.vmap(steps, in_axes=(0, 0, None, None))
    advance = jax.jit(jax.vmap(per_level, in_axes=(0, None, 0, 0)))
    clipped = []
    with tqdm(total=sampling["num_steps"], unit="step", disable=None) as bar:
        for batches in padded_batches(sampling, training.seed, seeds):
            state, fraction = advance(state, stacked, keys, jnp.asarray(batches))
            clipped.append(np.asarray(fraction))
            bar.update(batches.shape[1])
    fractions = np.concatenate(clipped, axis=2)  # [seeds, levels, steps]
    return state[0], fractions.swapaxes(0, 1)


def padded_batches(
    sampling: dict[str, int], seed: int, seeds: int
) -> Iterator[np.ndarray]:
    """Poisson batches in chunks `[seeds, steps, width]`, padded with −1."""
    draws = [
        dp_accounting.poisson_batches(**sampling, seed=(seed, s)) for s in range(seeds)
    ]
    num_steps = sampling["num_steps"]
    chunk = -(-num_steps // CHUNKS)
    width = 0
    for start in range(0, num_steps, chunk):
        count = min(chunk, num_steps - start)
        drawn = [list(itertools.islice(batches, count)) for batches in draws]
        longest = max(len(rows) for batches in drawn for rows in batches)
        # Leave room, so that later chunks have the same shape and compile once.
        width = max(width, longest + longest // 8, 1)
        padded = np.full((seeds, count, width), -1, np.int32)
        for batches, target in zip(drawn, padded, strict=True):
            for rows, line in zip(batches, target, strict=True):
                line[: len(rows)] = rows
        yield padded


def evaluate(params: Any, split: datasets.Split) -> dict[str, np.ndarray]:
    """Metrics of each network, means over outputs, `[levels, seeds]` each.

    Args:
      params: Parameters, leaves `[seeds, levels, ...]`.
      split: The examples.

    Returns:
      By name of `METRICS`; NaN if a network's logits are not finite.
    """
    params = jax.tree.map(np.asarray, params)
    seeds, levels = params[0].b.shape[:2]
    found = {name: np.full((levels, seeds), np.nan) for name in METRICS}
    for index in np.ndindex(levels, seeds):
        network = jax.tree.map(lambda leaf, i=index[::-1]: leaf[i], params)
        a = metrics.logits(network, split.x)
        if not np.isfinite(a).all():
            continue
        by_output = [metrics.score(*pair) for pair in zip(split.y.T, a.T, strict=True)]
        for name in METRICS:
            found[name][index] = np.mean([score[name] for score in by_output])
    return found


def summarize(
    epsilons: list[float],
    spent: list[float],
    noise: list[float],
    scores: dict[str, dict[str, np.ndarray]],
    clipped: np.ndarray,
) -> list[Row]:
    """One row per level: ε spent, noise, mean metrics and their standard errors."""
    seeds, num_steps = clipped.shape[1:]
    tenth = -(-num_steps // 10)
    rows = []
    for i, epsilon in enumerate(epsilons):
        row: Row = {
            "epsilon": epsilon,
            "epsilon_spent": spent[i],
            "noise_multiplier": noise[i],
        }
        for split, by_metric in scores.items():
            for name, values in by_metric.items():
                row[f"{split}_{name}"] = float(values[i].mean())
                error = values[i].std(ddof=1) / seeds**0.5 if seeds > 1 else None
                row[f"{split}_{name}_se"] = None if error is None else float(error)
        row["clipped_first_tenth"] = float(np.mean(clipped[i, :, :tenth]))
        row["clipped_last_tenth"] = float(np.mean(clipped[i, :, -tenth:]))
        rows.append(row)
    return rows


def _numbers(flag: str, texts: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in texts)
    except ValueError:
        given = ",".join(texts)
        raise cli.InputError(
            f"--{flag}={given}: expected comma-separated numbers"
        ) from None


def _bounds() -> Bounds | None:
    """--bounds, or the known bounds of the dataset."""
    texts = _BOUNDS.value
    if texts is None:
        if datasets.DATA.value is not None:
            return None
        return BOUNDS.get(datasets.DATASET.value or "digits")
    if not any("=" in text for text in texts):
        numbers = _numbers("bounds", texts)
        if len(numbers) != 2:
            raise cli.InputError(
                f"--bounds={','.join(texts)}: expected LOW,HIGH or NAME=LOW:HIGH,..."
            )
        return numbers[0], numbers[1]
    found = {}
    for text in texts:
        name, _, bounds = text.rpartition("=")
        try:
            low, high = map(float, bounds.split(":"))
        except ValueError:
            raise cli.InputError(
                f"--bounds={text}: expected NAME=LOW:HIGH, with two numbers"
            ) from None
        found[name] = low, high
    return found


def _report(result: dict[str, Any]) -> None:
    configuration, rows = result["configuration"], result["rows"]
    probability = configuration["batch_size"] / configuration["rows"]
    print(
        f"\n{configuration['rows']} rows to train on, each in a batch with probability "
        f"{probability:.3f}; {configuration['num_steps']} steps, δ = "
        f"{configuration['delta']:g}, for adding or removing one row.\n"
    )
    shown = []
    for row in rows:
        is_private = row["epsilon"] < np.inf
        shown.append(
            {
                "ε": f"{row['epsilon']:g}" if is_private else "not private",
                "ε spent": f"{row['epsilon_spent']:.4f}" if is_private else "",
                "noise": f"{row['noise_multiplier']:.3f}"
                if row["noise_multiplier"]
                else "0",
                "test accuracy": _with_error(row, "test_accuracy"),
                "ROC AUC": _with_error(row, "test_roc_auc"),
                "log-loss": _with_error(row, "test_log_loss"),
                "clipped at first": f"{row['clipped_first_tenth']:.2f}",
                "at last": f"{row['clipped_last_tenth']:.2f}",
            }
        )
    print(output.table(shown))
    print(
        f"\nNoise is the noise multiplier. Metrics are means over "
        f"{configuration['seeds']} networks ± their standard error. The last two "
        "columns are the fractions of rows clipped in the first and the last tenth of "
        "the steps."
    )
    targets = datasets.label_1(configuration["classes"])
    for target, share in zip(targets, result["base_rate"], strict=True):
        print(
            f"{target} in {share:.1%} of the test rows; always predicting the more "
            f"common label has an accuracy of {max(share, 1 - share):.4f}."
        )
    if configuration["bounds"] is None:
        print(
            "Features were standardized by the training rows, which ε does not cover. "
            "Give --bounds if bounds are known beforehand."
        )
    elif result["has_categories"]:
        print("The categories are those of the training rows, which ε does not cover.")
    if configuration["delta"] >= 1 / configuration["rows"]:
        print("Warning: δ is at least 1 / rows, which allows publishing a whole row.")


def _with_error(row: Row, name: str) -> str:
    error = row[f"{name}_se"]
    return f"{row[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def save(folder: Path, result: dict[str, Any]) -> None:
    """Writes the table, the fractions clipped over steps, and the picture."""
    rows, clipped = result["rows"], result["clipped"].mean(axis=1)  # [levels, steps]
    document = {key: value for key, value in result.items() if key != "clipped"}
    output.write_results(folder, "private", document, rows)
    columns = {
        f"epsilon_{row['epsilon']:g}": line
        for row, line in zip(rows, clipped, strict=True)
        if row["epsilon"] < np.inf
    }
    fractions = pd.DataFrame({"step": np.arange(clipped.shape[1]), **columns})
    with output.atomic_write(folder / "clipped.csv") as path:
        fractions.to_csv(path, index=False)
    guess = float(np.mean([max(share, 1 - share) for share in result["base_rate"]]))
    plots.private(folder / "private.png", rows, clipped, guess)


def _optimizer() -> OptimizerConfig:
    optimizer = OptimizerConfig.from_flags()
    if optimizer.optimizer == "adam":
        return OptimizerConfig.from_flags(learning_rate=LEARNING_RATE)
    return optimizer


def main() -> int:
    """Trains the networks, prints the table and writes the files."""
    privacy = dp_accounting.PrivacyConfig(
        epsilons=tuple(sorted(set(_numbers("epsilon", _EPSILON.value)))),
        delta=_DELTA.value,
        max_grad_norm=_MAX_GRAD_NORM.value,
    )
    bounds = _bounds()
    optimizer = _optimizer()
    training = TrainingConfig.from_flags(**DEFAULTS)
    table = datasets.from_flags(training.seed)
    print(f"{table.name}: {len(table.y)} rows")
    output.print_environment()
    result = run(
        table=table,
        privacy=privacy,
        optimizer=optimizer,
        training=training,
        seeds=cli.SEEDS.value or DEFAULTS["seeds"],
        bounds=bounds,
        make_folder=cli.output_dir,
    )
    _report(result)
    if cli.OUTPUT_DIR.value is not None:
        output.print_files(Path(cli.OUTPUT_DIR.value))
    return 0


if __name__ == "__main__":
    cli.launch(main, DEFAULTS, HELP)
