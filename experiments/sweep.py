r"""Which hyperparameters are good, over thousands of networks at once?

    python -m experiments.sweep --axis learning_rate=log:1e-4:1:32 --seeds 8
    python -m experiments.sweep --axis learning_rate=log:1e-4:1:32 \
        --axis weight_decay=0,1e-4,1e-2 --seeds 16 --hidden 16 --hidden 64,32 \
        --optimizer adamw --output_dir results/sweep
    python -m experiments.train --predict new.csv --output_dir results/sweep

Trains one network per point and seed with jaxbce.sweep. All are trained on the same
training set, from a 60/20/20 split. A point is a combination of the values of all axes.
Each combination of --hidden and the comma-separated --optimizer is a separate program.
The table shows the points with the lowest validation loss or the largest --metric (mean
over seeds ± its standard error). Their results are those of the parameters with the
lowest validation loss. An axis is a hyperparameter of the optimizer (learning_rate,
weight_decay, b1, ...), or init_scale, pos_weight or label_smoothing. Expect tens of
thousands of network-steps per second at 64→32→1.

With --folds, each point is cross-validated on the rows outside the test set: each of
its networks holds out one fold, and is validated on it. One program trains the networks
of all folds.

With --output_dir, the best network of the best point is trained again at the end,
because a sweep keeps no parameters, and saved as a model for --predict; with --folds,
it is the ensemble of all networks of the best point. If the command is interrupted,
even killed, rerun it to resume; it ends with the same sweep.parquet. Several processes,
each started with the same flags and its own --process_id, share the work; the first one
writes the files.
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags
from jax.experimental import multihost_utils

import jaxbce
from experiments.support import (
    artifacts,
    cli,
    config,
    cross_validation,
    datasets,
    metrics,
    output,
    plots,
    resumable,
    splitting,
    sweep_axes,
)
from experiments.support.config import OptimizerConfig, TrainingConfig
from experiments.support.sweep_axes import Search
from jaxbce import sweeps

flags.adopt_module_key_flags(datasets)
flags.adopt_module_key_flags(splitting)
flags.adopt_module_key_flags(config)
for _name in (*cli.COMMON, *cli.PROCESSES, "dtype", "folds", "seeds"):
    flags.declare_key_flag(_name)
_AXIS = flags.DEFINE_multi_string(
    "axis",
    [],
    "NAME=log:FROM:TO:COUNT, NAME=lin:FROM:TO:COUNT or NAME=VALUE,VALUE. Repeat it for "
    "more axes.",
)
_SEARCH = flags.DEFINE_enum(
    "search", "grid", ["grid", "random"], "All combinations, or random points."
)
_NUM_POINTS = flags.DEFINE_integer(
    "num_points", None, "Number of points of --search=random.", lower_bound=1
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Only train a few steps, and print what the sweep would cost."
)
_CSV = flags.DEFINE_bool("csv", False, "Write sweep.csv as well as sweep.parquet.")
_TOP = flags.DEFINE_integer("top", 10, "Number of points in the table.", lower_bound=1)

DEFAULTS: dict[str, Any] = {"batch_size": 32, "dtype": "float32", "seeds": 4}
HELP = {
    "folds": "Cross-validate every point: number of folds of the rows that are not for "
    "the test, each held out by networks of its own, which are judged on it. Columns "
    "are standardized and imputed by the rows of all folds. If not set, one split.",
    "metric": "What points are ranked by, on the validation set: the loss, or the mean "
    "over targets of a metric, which decides at a probability of 0.5. Each network "
    "keeps the parameters with its lowest validation loss.",
    "hidden": "Widths of the hidden layers, comma-separated; '' for none. Repeat it to "
    "try several.",
    "optimizer": "Names of optimizers in optax or optax.contrib, comma-separated; a "
    "wrong name lists them.",
    "seeds": "Networks per point (and fold), which differ only by their seed.",
}
CHUNK_MEMBERS = (256, 4096)  # fewest and most networks per chunk
CHUNKS = 20  # if they stay within those bounds
MAX_MEMBERS = 10**8
DRY_RUN_STEPS = 200
SCORES = ("validation_loss", "test_loss", "test_accuracy")
COST_HEADINGS = {
    "networks_at_a_time": "on all devices at a time",
    "result_mb": "results MB",
    "network_steps_per_second": "network-steps/s",
    "seconds": "seconds of steps",
}

Row = dict[str, Any]


class Program(NamedTuple):
    """Choices that cannot be axes, because they change the compiled program."""

    hidden: tuple[int, ...]
    optimizer: str

    @property
    def layers(self) -> str:
        """The hidden widths as text."""
        return "×".join(map(str, self.hidden)) or "none"


class Chunk(NamedTuple):
    """Networks of one program that are trained and stored together.

    Attributes:
      program: The program.
      first_point: The first of consecutive points.
      first_seed: The first of consecutive seeds.
      points: Number of points.
      seeds: Number of seeds.
    """

    program: Program
    first_point: int
    first_seed: int
    points: int
    seeds: int


class Plan:
    """A sweep whose arguments are known to be valid, divided into chunks."""

    def __init__(
        self,
        *,
        table: datasets.Table,
        search: Search,
        programs: list[Program],
        seeds: int,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        folds: int = 1,
    ) -> None:
        """Checks the arguments.

        Args:
          table: The data.
          search: Which points to train.
          programs: Hidden widths and optimizers, each a program of its own.
          seeds: Networks per point.
          optimizer: Hyperparameters of the optimizers that the points do not give.
          training: How to train; the programs give the hidden widths.
          folds: Number of folds for cross-validation; 1 is a single split.

        Raises:
          InputError: If an argument cannot be used.
        """
        weight = training.pos_weight
        if isinstance(weight, str) or not 0 <= weight < np.inf:
            raise cli.InputError(
                f"--pos_weight={weight}: expected a finite number >= 0"
            )
        self.table, self.search = table, search
        self.folds, self.make_sample_weight = folds, None
        if folds == 1:
            self.splits, self.preprocessor = datasets.split(table, training.seed)
        else:
            self.splits, self.preprocessor, self.fold = cross_validation.split(
                table, training.seed, folds
            )
            self.make_sample_weight = cross_validation.leave_out_fold(self.fold)
        rows = len(self.splits["train"].x)
        self.training = training.check(rows, table.name)
        if folds > 1:
            rows = cross_validation.num_train_rows(self.fold)
        optimizer = optimizer.fill_in(rows)
        if len(set(programs)) < len(programs):
            raise cli.InputError("--hidden or --optimizer repeats a value")
        self.networks_per_point = seeds * folds
        if folds > 1 and self.networks_per_point > CHUNK_MEMBERS[1]:
            raise cli.InputError(
                f"--seeds={seeds}, --folds={folds}: expected at most "
                f"{CHUNK_MEMBERS[1]} networks per point (seeds times folds), got "
                f"{self.networks_per_point}"
            )
        count = search.size() * self.networks_per_point * len(programs)
        if count > MAX_MEMBERS:
            raise cli.InputError(
                f"--seeds={seeds}: expected at most {MAX_MEMBERS} networks (points "
                "times seeds times "
                f"{'programs' if folds == 1 else 'folds times programs'}), got "
                f"{count}"
            )
        self.points = search.points(training.seed)
        self.num_points = len(next(iter(self.points.values())))
        self.num_seeds = seeds
        self.programs = programs
        swept = tuple(n for n in self.points if n not in sweep_axes.SWEEP_HPARAMS)
        self.families = {
            name: dataclasses.replace(optimizer, optimizer=name).build_family(
                self.training.steps, swept
            )
            for name in dict.fromkeys(p.optimizer for p in programs)
        }
        self.configuration = {
            **datasets.describe(table),
            **search.as_dict(),
            "points": self.num_points,
            "seeds": seeds,
            **({} if folds == 1 else {"folds": folds}),
            **optimizer.as_dict(),
            **self.training.as_dict(),
            "hidden": [p.hidden for p in programs],
            "optimizer": [p.optimizer for p in programs],
            "devices": jax.device_count(),  # the last digits depend on it
        }
        self.chunks = self._chunks()
        self._arrays: dict[str, tuple[jax.Array, jax.Array]] = {}

    def _chunks(self) -> list[Chunk]:
        members = self.num_points * self.networks_per_point * len(self.programs)
        fewest, most = CHUNK_MEMBERS
        size = max(fewest, min(most, -(-members // CHUNKS)))
        if self.folds == 1:
            self.chunk_points = min(self.num_points, size)
            self.chunk_seeds = min(self.num_seeds, max(1, size // self.chunk_points))
        else:  # an ensemble needs all networks of a point at a time
            points = max(1, size // self.networks_per_point)
            self.chunk_points = min(self.num_points, points)
            self.chunk_seeds = self.num_seeds
        return [
            Chunk(
                program,
                point,
                seed,
                min(self.chunk_points, self.num_points - point),
                min(self.chunk_seeds, self.num_seeds - seed),
            )
            for program in self.programs
            for seed in range(0, self.num_seeds, self.chunk_seeds)
            for point in range(0, self.num_points, self.chunk_points)
        ]

    @property
    def sizes(self) -> list[int]:
        """Number of networks in each chunk."""
        return [chunk.points * chunk.seeds * self.folds for chunk in self.chunks]

    def arrays(self, split: str) -> tuple[jax.Array, jax.Array]:
        """Features and labels of a split in the sweep's dtype."""
        if split not in self._arrays:
            data, dtype = self.splits[split], self.training.dtype
            self._arrays[split] = jnp.asarray(data.x, dtype), jnp.asarray(data.y, dtype)
        return self._arrays[split]

    def held_out(self, fold: int) -> datasets.Split:
        """The rows for validation of the networks of a fold, if there are folds."""
        if self.folds == 1:
            return self.splits["validation"]
        return cross_validation.select_rows(self.splits["train"], self.fold == fold)

    def train(
        self, chunk: Chunk, num_steps: int, evaluate_every: int | None
    ) -> tuple[np.ndarray, np.ndarray, jaxbce.SweepResult]:
        """Trains a chunk; returns the indices of its points, its seeds and the results.

        All chunks are trained with the same shapes, so that the program is compiled
        once. A short chunk repeats the last point and begins with an earlier seed, and
        the surplus results are dropped.
        """
        offsets = np.arange(self.chunk_points)
        chosen = np.minimum(chunk.first_point + offsets, self.num_points - 1)
        first_seed = min(chunk.first_seed, self.num_seeds - self.chunk_seeds)
        seeds = np.arange(first_seed, first_seed + self.chunk_seeds)
        found = self.sweep(chunk.program, chosen, seeds, num_steps, evaluate_every)
        skipped = chunk.first_seed - first_seed
        kept = chunk.points * self.folds
        found = jax.tree.map(lambda t: t[:kept, skipped:], found)
        return chosen[: chunk.points], seeds[skipped:], found

    def sweep(
        self,
        program: Program,
        chosen: np.ndarray,
        seeds: np.ndarray,
        num_steps: int,
        evaluate_every: int | None,
    ) -> jaxbce.SweepResult:
        """Trains the points with indices `chosen` with consecutive seeds.

        With folds, the results have a point for each point and fold, folds last.
        """
        family = self.families[program.optimizer]
        points = np.repeat(chosen, self.folds)
        hparams = {name: values[points] for name, values in self.points.items()}
        if self.folds > 1:
            hparams["fold"] = np.tile(np.arange(self.folds), len(chosen))
        return jaxbce.sweep(
            jax.random.key(self.training.seed),
            *self.arrays("train"),
            hidden=program.hidden,
            make_optimizer=family.make_optimizer,
            make_penalty=family.make_penalty,
            make_sample_weight=self.make_sample_weight,
            hparams=hparams,
            num_seeds=len(seeds),
            first_seed=int(seeds[0]),
            num_steps=num_steps,
            batch_size=self.training.batch_size,
            validation=(self.arrays("validation") if self.folds == 1 else "held_out"),
            evaluate_every=evaluate_every,
            patience=self.training.patience,
            pos_weight=float(self.training.pos_weight),
            dtype=self.training.dtype,
        )


def run(plan: Plan, folder: Path | None = None) -> dict[str, Any]:
    """Trains every point with every seed and program.

    Args:
      plan: The sweep.
      folder: Where to store chunks and resume from, or None.

    Returns:
      "configuration", and "members", a table with one row per network. Only the first
      process returns "members".

    Raises:
      InputError: If the folder is in use or holds another run.
    """
    training = plan.training

    with jax.enable_x64(training.dtype == "float64"):

        def compute(i: int) -> pd.DataFrame:
            chunk = plan.chunks[i]
            trained = plan.train(chunk, training.steps, training.evaluate_every)
            return member_table(plan, chunk.program, *trained)

        members = resumable.compute_chunks(
            compute,
            plan.sizes,
            folder=folder,
            configuration=plan.configuration,
            unit="network-steps",
            scale=training.steps,
        )
    if jax.process_index() > 0:
        return {"configuration": plan.configuration}
    return {"configuration": plan.configuration, "members": members}


def member_table(
    plan: Plan,
    program: Program,
    chosen: np.ndarray,
    seeds: np.ndarray,
    found: jaxbce.SweepResult,
) -> pd.DataFrame:
    """A table with one row per network, ordered by point, fold if any, and seed."""
    folds = plan.folds
    place, seed = (
        t.ravel()
        for t in np.meshgrid(np.arange(len(chosen) * folds), seeds, indexing="ij")
    )
    point, fold = chosen[place // folds], place % folds
    values = {name: values[point] for name, values in plan.points.items()}
    weights = values.get("pos_weight", np.full(len(point), plan.training.pos_weight))
    validation = [plan.held_out(k) for k in range(folds)]
    scores = []
    for at, p in zip(np.ndindex(found.best_step.shape), weights, strict=True):
        params = jax.tree.map(lambda leaf, at=at: leaf[at], found.best_params)
        scores.append(_scores(plan, params, p, validation[at[0] % folds]))
    if plan.folds > 1:
        for i in range(0, len(chosen) * folds, folds):
            params = jax.tree.map(lambda t, i=i: t[i : i + folds], found.best_params)
            rows = scores[i * len(seeds) : (i + folds) * len(seeds)]
            of_all = _scores(plan, params, weights[i * len(seeds)], None)
            for row in rows:
                row |= {f"ensemble_{name}": value for name, value in of_all.items()}
    columns = {
        "hidden": [program.layers] * len(point),
        "optimizer": [program.optimizer] * len(point),
        "point": point,
        **values,
        **({} if plan.folds == 1 else {"fold": fold}),
        "seed": seed,
        "validation_loss": found.best_loss.astype(float).ravel(),
        **{name: [row[name] for row in scores] for name in scores[0]},
        "train_loss": found.train_loss[:, :, -1].astype(float).ravel(),
        "best_step": found.best_step.ravel(),
        "steps": found.step.ravel(),
        "diverged_at": found.diverged_at.ravel(),
    }
    return pd.DataFrame(columns)


def _scores(
    plan: Plan, params: Any, pos_weight: float, validation: datasets.Split | None
) -> Row:
    """Scores of one network: those of its test set, and the metric to rank by.

    Without `validation`, only those of the test set. `params` may be those of several
    networks, whose mean probability is scored.

    The test loss is the quantity that the validation loss is. Accuracy and metric are
    of logits corrected for the `pos_weight` that the network was trained with; both are
    averaged over outputs.
    """
    training, test = plan.training, plan.splits["test"]
    shift = metrics.prior_shift(pos_weight)
    a = metrics.logits(params, test.x)
    loss = metrics.log_loss(test.y, a, float(training.pos_weight)) * a.shape[1]
    accuracy = metrics.criterion("accuracy", test.y, a - shift)
    row = {"test_loss": loss, "test_accuracy": accuracy}
    if training.metric != "loss":
        judged = {"test": (test.y, a)}
        if validation is not None:
            b = metrics.logits(params, validation.x)
            judged = {"validation": (validation.y, b), **judged}
        for name, (y, values) in judged.items():
            row[f"{name}_{training.metric}"] = metrics.criterion(
                training.metric, y, values - shift
            )
    return row


def best_points(
    members: Any, names: list[str], count: int, metric: str = "loss"
) -> list[Row]:
    """The points with the best mean on validation; points that diverged come last.

    Args:
      members: The table that `run` returns.
      names: The hyperparameters.
      count: Number of points.
      metric: The metric to rank by, of which `members` has columns, or the loss.

    Returns:
      One row per point: means over networks, and as "..._sem" their standard errors.
    """
    by = ["hidden", "optimizer", "point", *names]
    scores = dict.fromkeys((f"validation_{metric}", f"test_{metric}", *SCORES))
    groups = members.groupby(by, sort=False)
    mean, sem = groups[list(scores)].mean(), groups[list(scores)].sem()
    first = groups.first()  # of scores that are the same for all networks of a point
    diverged = groups["diverged_at"].max() >= 0
    order = mean.assign(diverged=diverged).sort_values(
        ["diverged", f"validation_{metric}"], ascending=[True, metric == "loss"]
    )
    result = []
    for index in order.index[:count]:
        row: Row = dict(zip(by, index, strict=True))
        row["point"] = int(row["point"])
        row |= {name: float(row[name]) for name in names}
        for name in scores:
            row[name] = float(mean.loc[index, name])
            if np.isfinite(sem.loc[index, name]):  # not of one network
                row[f"{name}_sem"] = float(sem.loc[index, name])
        row |= {
            n: float(first.loc[index, n]) for n in first if n.startswith("ensemble")
        }
        row["diverged"] = int((groups["diverged_at"].get_group(index) >= 0).sum())
        result.append(row)
    return result


def best_member(plan: Plan, members: Any) -> tuple[int, int, int] | None:
    """The program, point and seed of the network to keep.

    Of the networks of the best point that did not diverge, it is the one that is best
    on validation. With folds, all networks of the best point are kept, unless one of
    them diverged.

    Returns:
      The index of the program, the point and the seed; None if all diverged.
    """
    metric = plan.training.metric
    (best,) = best_points(members, list(plan.points), 1, metric)
    keys = ["hidden", "optimizer", "point"]
    of_point = (members[keys] == [best[key] for key in keys]).all(axis=1)
    ranked = members[of_point & (members["diverged_at"] < 0)].sort_values(
        f"validation_{metric}", ascending=metric == "loss", kind="stable"
    )
    if ranked.empty or (plan.folds > 1 and best["diverged"]):
        return None
    names = [(program.layers, program.optimizer) for program in plan.programs]
    program = names.index((best["hidden"], best["optimizer"]))
    return program, best["point"], int(ranked["seed"].iloc[0])


def train_best(plan: Plan, members: Any) -> Row | None:
    """Trains the best network again, because the sweep has not kept its parameters.

    With folds, these are all networks of the best point, which are one model together.
    All processes must call this, and train it together. In float32 its results can
    differ from those in `members`, where other networks were trained beside it.

    Args:
      plan: The sweep.
      members: The table that `run` returns; None in all processes but the first.

    Returns:
      The row of this network as in `members`, with its "params", "pos_weight" of each
      output, "thresholds", "metrics" and "decisions", as `train.run` has them; None if
      there is no such network, or it has diverged. With folds, the row has only what
      all networks share, and metrics on validation are those of
      `cross_validation.predict`.
    """
    chosen = None if members is None else best_member(plan, members)
    chosen = multihost_utils.broadcast_one_to_all(np.array(chosen or (-1, -1, -1)))
    index, point, seed = map(int, chosen)
    if index < 0:
        return None
    training, program = plan.training, plan.programs[index]
    seeds = np.array([seed]) if plan.folds == 1 else np.arange(plan.num_seeds)
    member = program, np.array([point]), seeds
    with jax.enable_x64(training.dtype == "float64"):
        found = plan.sweep(*member, training.steps, training.evaluate_every)
    if (found.best_step == 0).any():
        return None
    rows = member_table(plan, *member, found).to_dict("records")
    row = rows[0]
    targets = list(plan.table.classes)
    weights = (float(row.get("pos_weight", training.pos_weight)),) * len(targets)
    if plan.folds == 1:
        params = jax.tree.map(lambda leaf: leaf[0, 0], found.best_params)
        splits, shift = plan.splits, metrics.prior_shift(weights)
        logits = {
            artifacts.NETWORK: {
                name: metrics.logits(params, split.x) - shift
                for name, split in splits.items()
            }
        }
    else:
        shared = ("hidden", "optimizer", "point", *plan.points)
        row = {k: v for k, v in row.items() if k in shared or k.startswith("ensemble_")}
        row |= {"networks": len(rows)}
        params = found.best_params
        splits, logits = cross_validation.predict(
            params, plan.splits, plan.fold, weights
        )
    thresholds = metrics.best_thresholds(splits["validation"], logits)
    return {
        **row,
        "params": params,
        "pos_weight": weights,
        "thresholds": thresholds[artifacts.NETWORK],
        "metrics": metrics.table(splits, targets, logits),
        "decisions": metrics.decision_table(splits, targets, logits, thresholds),
    }


def dry_run(plan: Plan) -> list[Row]:
    """Estimates the cost of each program from a few steps of its first chunk."""
    with jax.enable_x64(plan.training.dtype == "float64"):
        return [_cost(plan, program) for program in plan.programs]


def _cost(plan: Plan, program: Program) -> Row:
    chunks = [chunk for chunk in plan.chunks if chunk.program == program]
    folds = plan.folds
    members = folds * sum(chunk.points * chunk.seeds for chunk in chunks)
    first = folds * chunks[0].points * chunks[0].seeds
    x, y = plan.arrays("train")
    sizes = (x.shape[1], *program.hidden, y.shape[1])
    dtype = jnp.dtype(plan.training.dtype)
    devices = np.array(jax.devices())
    group = sweeps.max_members_per_device(
        sizes, dtype, x.shape[0], plan.training.batch_size, devices
    )
    per_device = -(-first // len(devices))
    plan.train(chunks[0], DRY_RUN_STEPS, None)  # compiles
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        plan.train(chunks[0], DRY_RUN_STEPS, None)
        seconds.append(time.perf_counter() - begin)
    per_step = min(seconds) / (DRY_RUN_STEPS * first)
    weights = sum(a * b + b for a, b in itertools.pairwise(sizes))
    return {
        "hidden": program.layers,
        "optimizer": program.optimizer,
        "networks": members,
        "networks_at_a_time": min(group, per_device) * len(devices),
        "result_mb": round(2e-6 * weights * dtype.itemsize * first, 1),
        "network_steps_per_second": round(1 / per_step),
        "seconds": round(per_step * members * plan.training.steps, 1),
    }


def save(
    folder: Path,
    plan: Plan,
    members: Any,
    best: list[Row],
    model: Row | None,
    csv: bool,
) -> None:
    """Writes the table of networks, the best points, the model and the picture."""
    with output.atomic_write(folder / "sweep.parquet") as path:
        members.to_parquet(path, index=False)
    if csv:
        with output.atomic_write(folder / "sweep.csv") as path:
            members.to_csv(path, index=False)
    document = {"configuration": plan.configuration, "top": best, "model": None}
    if model is not None:
        document["model"] = {k: v for k, v in model.items() if k != "params"}
        kept = {name: model[name] for name in ("params", "pos_weight", "thresholds")}
        artifacts.save_model(folder, plan.table, plan.preprocessor, **kept)
    output.write_results(folder, "top", document, best)
    spacings = {axis.name: axis.spacing for axis in plan.search.axes}
    plots.sweep(folder / "sweep.png", members, spacings, plan.training.metric)


def _report(plan: Plan, members: Any, best: list[Row]) -> None:
    diverged = int((members["diverged_at"] >= 0).sum())
    print(f"\n{len(members)} networks, of which {diverged} diverged\n")
    metric = plan.training.metric
    hidden = {"point"}
    hidden |= {"hidden", "optimizer"} if len(plan.programs) == 1 else set()
    hidden |= {"validation_loss", "test_loss"} if metric != "loss" else set()
    if plan.folds > 1:  # the test is that of the ensemble
        hidden |= {"test_loss", "test_accuracy", f"test_{metric}"}
        hidden |= {"ensemble_test_loss"} if metric != "loss" else set()
    rows = [
        {
            name: output.with_error(value, row.get(f"{name}_sem", np.nan))
            if name.startswith(("validation", "test", "ensemble"))
            else value
            for name, value in row.items()
            if name not in hidden and not name.endswith("_sem")
        }
        for row in best
    ]
    shown = metrics.HEADINGS.get(metric, metric)
    headings = {f"{s}_{metric}": f"{s} {shown}" for s in ("validation", "test")}
    for name, heading in {"accuracy": "accuracy", metric: shown}.items():
        headings[f"ensemble_test_{name}"] = f"ensemble {heading}"
    print(output.table(rows, headings=headings))
    if plan.folds > 1:
        print(
            f"\nMean ± standard error of {plan.networks_per_point} networks per point, "
            f"each validated on the fold of {plan.folds}\nthat it held out. Their "
            "ensemble has their mean probability, and is scored on the test set."
        )


def _report_model(model: Row | None) -> None:
    if model is None:
        print("\nNo model is saved, because the networks of the best point diverged.")
        return
    if "seed" in model:
        name = f"the network of the best point with seed {model['seed']}"
    else:
        name = f"the ensemble of the {model['networks']} networks of the best point"
    print(f"\nmodel.joblib is {name}, trained again:\n")
    hidden = ("model", "base_rate")
    rows = [{k: v for k, v in r.items() if k not in hidden} for r in model["metrics"]]
    print(output.table(rows, ".4f", metrics.HEADINGS))
    if "seed" not in model:
        print(
            "\nvalidation: the rows of all folds, each predicted by the mean "
            "probability of the networks\nthat held it out. test: that of all networks."
        )


def main() -> int:
    """Runs the sweep, or estimates its cost, as the flags say."""
    cli.use_devices()
    search = Search(
        tuple(map(sweep_axes.parse_axis, _AXIS.value)), _SEARCH.value, _NUM_POINTS.value
    )
    hidden = config.hidden_choices()
    optimizer = OptimizerConfig.from_flags()
    training = TrainingConfig.from_flags(**DEFAULTS, hidden=hidden[0])
    table = datasets.from_flags(training.seed)
    is_first = jax.process_index() == 0
    if is_first:
        print(f"{table.name}: {len(table.y)} rows")
        output.print_environment()
    names = optimizer.optimizer.split(",")
    plan = Plan(
        table=table,
        search=search,
        programs=[Program(widths, name) for widths in hidden for name in names],
        seeds=cli.SEEDS.value or DEFAULTS["seeds"],
        optimizer=optimizer,
        training=training,
        folds=cli.FOLDS.value or 1,
    )
    if _DRY_RUN.value:
        cost = dry_run(plan)
        if is_first:
            print(f"\n{output.table(cost, headings=COST_HEADINGS)}")
        return 0
    folder = cli.output_dir()
    result = run(plan, folder)
    model = None if folder is None else train_best(plan, result.get("members"))
    if not is_first:
        return 0
    members = result["members"]
    best = best_points(members, list(plan.points), _TOP.value, plan.training.metric)
    if folder is not None:
        save(folder, plan, members, best, model, _CSV.value)
    _report(plan, members, best)
    if folder is not None:
        _report_model(model)
        output.print_files(folder)
    return 0


if __name__ == "__main__":
    cli.launch(main, DEFAULTS, HELP)
