r"""Which hyperparameters are good, over thousands of networks at once?

    python -m experiments.sweep --axis learning_rate=log:1e-4:1:32 --seeds 8
    python -m experiments.sweep --axis learning_rate=log:1e-4:1:32 \
        --axis weight_decay=0,1e-4,1e-2 --seeds 16 --hidden 16 --hidden 64,32 \
        --optimizer adamw --output_dir results/sweep

Every point of the axes is trained with every seed by jaxbce.sweep, on the training
part of a split 60/20/20 that all share; each --hidden and each of the comma-separated
--optimizer is a program of its own. The table has the points with the least validation
loss, mean over seeds ± its standard error, and what those networks, with the
parameters of that least loss, do on the test part. An axis is a hyperparameter of the
optimizer (learning_rate, weight_decay, b1, ...), or init_scale, pos_weight or
label_smoothing. Expect tens of thousands of network-steps a second at 64→32→1.

With --output_dir the same command goes on where an earlier one was killed, and ends
with the same sweep.parquet. Several processes, started with the same flags and each
its --process_id, share the work; the first one writes.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags

import experiments.support.optimizers as optimizers_module
import jaxbce
from experiments.support import (
    chunked_fit,
    cli,
    datasets,
    optimizers,
    output,
    plots,
    resumable,
    sweep_axes,
)
from jaxbce import sweeps

for _module in (datasets, optimizers, chunked_fit):
    flags.adopt_module_key_flags(_module)
for _name in (*cli.COMMON, *cli.PROCESSES, "dtype", "seeds"):
    flags.declare_key_flag(_name)
_AXIS = flags.DEFINE_multi_string(
    "axis",
    [],
    "NAME=log:FROM:TO:COUNT, NAME=lin:FROM:TO:COUNT or NAME=VALUE,VALUE; several.",
)
_SEARCH = flags.DEFINE_enum(
    "search", "grid", ["grid", "random"], "All combinations, or points at random."
)
_NUM_POINTS = flags.DEFINE_integer(
    "num_points", None, "Points of --search=random.", lower_bound=1
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print what the sweep would take, and train a few steps only."
)
_CSV = flags.DEFINE_bool("csv", False, "Write sweep.csv beside sweep.parquet.")
_TOP = flags.DEFINE_integer("top", 10, "Points in the table.", lower_bound=1)

PART_MEMBERS = (256, 4096)  # the fewest and most networks in one part of a sweep
PARTS = 20  # of a sweep that allows for it
DRY_STEPS = 200

Row = dict[str, Any]


class _Choice(NamedTuple):
    """What cannot be an axis: each is one program."""

    hidden: tuple[int, ...]
    optimizer: str


class _Part(NamedTuple):
    """Networks that are trained together: points from and seeds from, of one choice."""

    choice: _Choice
    point: int
    seed: int


def run(
    *,
    table: datasets.Table,
    axes: list[sweep_axes.Axis],
    search: str = "grid",
    num_points: int | None = None,
    seeds: int = 4,
    seed: int = 0,
    hidden: list[tuple[int, ...]] | None = None,
    optimizers: tuple[str, ...] = ("adam",),
    optimizer_args: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    schedule: str = "constant",
    weight_decay: float = 0.001,
    batch_size: int | None = 32,
    num_steps: int | None = None,
    epochs: int | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    pos_weight: float = 1.0,
    dtype: str = "float32",
    top: int = 10,
    dry_run: bool = False,
    csv: bool = False,
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains every point with every seed and choice.

    Args:
      table: The data.
      axes: The hyperparameters to vary.
      search: "grid" or "random".
      num_points: Points of a random search.
      seeds: Networks a point.
      seed: Of the split, of random points, and of everything in the sweep.
      hidden: Choices of widths; None is one of (32,).
      optimizers: Names in optax or optax.contrib.
      optimizer_args: Arguments that all of them take.
      learning_rate: Of those points that do not say; None is the default, or 0.003.
      schedule: "constant", "cosine", "warmup-cosine" or "exponential".
      weight_decay: Of those points that do not say.
      batch_size: Rows in a batch; None is all of them.
      num_steps: Steps to train for; None is what `epochs` says.
      epochs: Epochs to train for; None is 60.
      evaluate_every: Steps between evaluations.
      patience: Steps without a better validation loss after which to stop, or None.
      pos_weight: Weight of label 1, of those points that do not say.
      dtype: "float64", "float32" or "bfloat16".
      top: Points in the table.
      dry_run: Whether to train a few steps only, and say what the rest would take.
      csv: Whether to write a CSV file too.
      make_folder: Called when all arguments are found good; where to keep the sweep
        and go on with it, or None.

    Returns:
      "configuration"; "members", a row for each network; "top", a row for each of the
      best points; or with `dry_run` a row for each choice as "cost". In a process that
      is not the first only the configuration.

    Raises:
      InputError: If something asked for cannot be done.
    """
    parts, _ = datasets.split(table, seed)
    rows = len(parts["train"].x)
    if batch_size is not None and batch_size > rows:
        raise cli.InputError(
            f"--batch_size={batch_size}: {table.name} has {rows} rows to train on"
        )
    num_steps, evaluate_every = chunked_fit.duration(
        rows, batch_size, num_steps, epochs, evaluate_every
    )
    points = sweep_axes.points(axes, search, num_points, seed)
    count = len(next(iter(points.values())))
    swept = tuple(name for name in points if name not in sweep_axes.OF_THE_SWEEP)
    choices = [_Choice(h, o) for h in hidden or [(32,)] for o in optimizers]
    if len(set(choices)) < len(choices):
        raise cli.InputError("--hidden or --optimizer has the same one twice")
    families = {
        name: optimizers_module.family(
            name,
            swept=swept,
            learning_rate=learning_rate,
            schedule=schedule,
            num_steps=num_steps,
            weight_decay=weight_decay,
            args=tuple((optimizer_args or {}).items()),
        )
        for name in optimizers
    }
    configuration = {
        "data": table.name,
        "data_digest": datasets.digest(table),
        "classes": table.classes,
        "axes": {a.name: [a.spacing, *a.values.tolist()] for a in axes},
        "search": search,
        "points": count,
        "seeds": seeds,
        "seed": seed,
        "hidden": [c.hidden for c in choices],
        "optimizer": [c.optimizer for c in choices],
        "optimizer_args": optimizer_args or {},
        "learning_rate": learning_rate,
        "schedule": schedule,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "num_steps": num_steps,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "pos_weight": pos_weight,
        "dtype": dtype,
        "devices": jax.device_count(),  # with others the last digits would differ
    }
    each = _part_members(count * seeds * len(choices))
    point_step = min(count, each)
    seed_step = min(seeds, max(1, each // point_step))
    todo = [
        _Part(choice, p, s)
        for choice in choices
        for s in range(0, seeds, seed_step)
        for p in range(0, count, point_step)
    ]
    sizes = [
        min(point_step, count - t.point) * min(seed_step, seeds - t.seed) for t in todo
    ]

    with jax.enable_x64(dtype == "float64"):
        data = {
            name: (jnp.asarray(part.x, dtype), jnp.asarray(part.y, dtype))
            for name, part in parts.items()
        }

        def train(
            part: _Part, steps: int, every: int | None
        ) -> tuple[np.ndarray, np.ndarray, jaxbce.SweepResult]:
            """The points and seeds of a part, none twice, and what they came to."""
            chosen = np.minimum(part.point + np.arange(point_step), count - 1)
            from_seed = min(part.seed, seeds - seed_step)
            found = jaxbce.sweep(
                jax.random.key(seed),
                *data["train"],
                hidden=part.choice.hidden,
                make_optimizer=families[part.choice.optimizer],
                hparams={name: values[chosen] for name, values in points.items()},
                num_seeds=seed_step,
                first_seed=from_seed,
                num_steps=steps,
                batch_size=batch_size,
                validation=data["validation"],
                evaluate_every=every,
                patience=patience,
                pos_weight=pos_weight,
                dtype=dtype,
            )
            last = min(point_step, count - part.point)
            skip = part.seed - from_seed
            found = jax.tree.map(lambda t: t[:last, skip:], found)
            return chosen[:last], from_seed + np.arange(skip, seed_step), found

        if dry_run:
            cost = [
                _cost(choice, todo, sizes, train, data, batch_size, num_steps, dtype)
                for choice in choices
            ]
            return {"configuration": configuration, "cost": cost}

        def compute(i: int) -> pd.DataFrame:
            chosen, numbers, found = train(todo[i], num_steps, evaluate_every)
            return _rows(todo[i].choice, points, chosen, numbers, found, data["test"])

        folder = make_folder()
        members = resumable.collect(
            len(todo),
            compute,
            sizes,
            folder=folder,
            configuration=configuration,
            unit="network-steps",
            scale=num_steps,
        )
    if jax.process_index() > 0:
        return {"configuration": configuration}
    best = _top(members, list(points), top)
    if folder is not None:
        with output.replacing(folder / "sweep.parquet") as path:
            members.to_parquet(path, index=False)
        if csv:
            with output.replacing(folder / "sweep.csv") as path:
                members.to_csv(path, index=False)
        document = {"configuration": configuration, "top": best}
        output.write(folder, "top", document, best)
        plots.sweep(folder / "sweep.png", members, {a.name: a.spacing for a in axes})
    rows_ = members.to_dict(orient="records")
    return {"configuration": configuration, "members": rows_, "top": best}


def _part_members(members: int) -> int:
    fewest, most = PART_MEMBERS
    return max(fewest, min(most, -(-members // PARTS)))


def _rows(
    choice: _Choice,
    points: dict[str, np.ndarray],
    chosen: np.ndarray,
    seeds: np.ndarray,
    found: jaxbce.SweepResult,
    test: tuple[jax.Array, jax.Array],
) -> pd.DataFrame:
    """A row for each network, points slowest."""
    loss, accuracy = (np.asarray(t, float) for t in _scores(found.best_params, *test))
    point, seed = (t.ravel() for t in np.meshgrid(chosen, seeds, indexing="ij"))
    columns = {
        "hidden": ["×".join(map(str, choice.hidden)) or "none"] * len(point),
        "optimizer": [choice.optimizer] * len(point),
        "point": point,
        **{name: values[point] for name, values in points.items()},
        "seed": seed,
        "validation_loss": found.best_loss.astype(float).ravel(),
        "test_loss": loss.ravel(),
        "test_accuracy": accuracy.ravel(),
        "train_loss": found.train_loss[:, :, -1].astype(float).ravel(),
        "best_step": found.best_step.ravel(),
        "steps": found.step.ravel(),
        "diverged_at": found.diverged_at.ravel(),
    }
    return pd.DataFrame(columns)


@jax.jit
def _scores(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy, `[points, seeds]`; of several outputs a mean accuracy."""

    def one(params: Any) -> tuple[jax.Array, jax.Array]:
        right = (jaxbce.logits(params, x) > 0) == (y > 0.5)
        return jaxbce.loss(params, x, y), jnp.mean(right)

    return jax.vmap(jax.vmap(one))(params)


def _top(members: Any, names: list[str], count: int) -> list[Row]:
    """The points with the least mean validation loss; where one diverged, last."""
    by = ["hidden", "optimizer", "point", *names]
    groups = members.groupby(by, sort=False)
    what = ["validation_loss", "test_loss", "test_accuracy"]
    mean, sem = groups[what].mean(), groups[what].sem()
    diverged = groups["diverged_at"].max() >= 0
    order = mean.assign(diverged=diverged).sort_values(["diverged", "validation_loss"])
    result = []
    for index in order.index[:count]:
        row: Row = dict(zip(by, index, strict=True))
        del row["point"]
        row |= {name: float(row[name]) for name in names}
        for name in what:
            row[name] = _with_error(mean.loc[index, name], sem.loc[index, name])
        row["diverged"] = int((groups["diverged_at"].get_group(index) >= 0).sum())
        result.append(row)
    return result


def _with_error(mean: Any, error: Any) -> str:
    return f"{mean:.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}")


def _cost(
    choice: _Choice,
    todo: list[_Part],
    sizes: list[int],
    train: Callable[..., Any],
    data: dict[str, Any],
    batch_size: int | None,
    num_steps: int,
    dtype: str,
) -> Row:
    """What a choice would take, from training its first part for a few steps."""
    mine = [i for i, part in enumerate(todo) if part.choice == choice]
    members = sum(sizes[i] for i in mine)
    x, y = data["train"]
    layers = (x.shape[1], *choice.hidden, y.shape[1])
    devices = np.array(jax.devices())
    group = sweeps.max_members_per_device(
        layers, jnp.dtype(dtype), x.shape[0], batch_size, devices
    )
    each_device = -(-sizes[mine[0]] // len(devices))
    train(todo[mine[0]], DRY_STEPS, None)  # compiles
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        train(todo[mine[0]], DRY_STEPS, None)
        seconds.append(time.perf_counter() - begin)
    each = min(seconds) / (DRY_STEPS * sizes[mine[0]])
    weights = sum(a * b + b for a, b in itertools.pairwise(layers))
    return {
        "hidden": "×".join(map(str, choice.hidden)) or "none",
        "optimizer": choice.optimizer,
        "networks": members,
        "on all devices at a time": min(group, each_device) * len(devices),
        "results MB": round(2e-6 * weights * jnp.dtype(dtype).itemsize * sizes[0], 1),
        "network-steps/s": round(1 / each),
        "seconds of steps": round(each * members * num_steps, 1),
    }


def main() -> int:
    """Sweeps what the flags say."""
    cli.use_devices()
    jax.config.update("jax_default_matmul_precision", "highest")
    hidden = datasets.hidden_choices()
    axes = [sweep_axes.axis(text) for text in _AXIS.value]
    try:
        pos_weight = float(chunked_fit.POS_WEIGHT.value)
    except ValueError:
        pos_weight = np.nan
    if not 0 <= pos_weight < np.inf:
        raise cli.InputError(
            f"--pos_weight={chunked_fit.POS_WEIGHT.value}: a finite number >= 0 is "
            "accepted"
        )
    table = datasets.from_flags(cli.SEED.value)
    first = jax.process_index() == 0
    if first:
        print(f"{table.name}: {table.features.shape[0]} rows")
        print(", ".join(f"{k} {v}" for k, v in output.environment().items()))
    result = run(
        table=table,
        axes=axes,
        search=_SEARCH.value,
        num_points=_NUM_POINTS.value,
        seeds=cli.SEEDS.value or 4,
        seed=cli.SEED.value,
        hidden=hidden,
        optimizers=tuple(optimizers.OPTIMIZER.value.split(",")),
        optimizer_args=optimizers.arguments(optimizers.OPTIMIZER_ARG.value),
        learning_rate=optimizers.LEARNING_RATE.value,
        schedule=optimizers.SCHEDULE.value,
        weight_decay=optimizers.WEIGHT_DECAY.value,
        batch_size=chunked_fit.batch_size(),
        num_steps=chunked_fit.NUM_STEPS.value,
        epochs=chunked_fit.EPOCHS.value,
        evaluate_every=chunked_fit.EVALUATE_EVERY.value,
        patience=chunked_fit.PATIENCE.value,
        pos_weight=pos_weight,
        dtype=cli.DTYPE.value or "float32",
        top=_TOP.value,
        dry_run=_DRY_RUN.value,
        csv=_CSV.value,
        make_folder=cli.output_dir,
    )
    if not first:
        return 0
    if _DRY_RUN.value:
        print(f"\n{output.table(result['cost'])}")
        return 0
    members = result["members"]
    diverged = sum(row["diverged_at"] >= 0 for row in members)
    print(f"\n{len(members)} networks, of which {diverged} diverged\n")
    print(output.table(result["top"]))
    if cli.OUTPUT_DIR.value is not None:
        folder = Path(cli.OUTPUT_DIR.value)
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        print(f"\nIn {folder}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    cli.launch(main)
