r"""When does a network that has memorized begin to generalize?

    python -m experiments.grokking --output_dir results
    python -m experiments.grokking --rows 1400 --weight_decays 0.0005,0.001 \
        --epochs 2000 --output_dir longer

After Merrill, Tsilivis and Shukla, A tale of two circuits: grokking as competition of
sparse and dense subnetworks, 2023, arXiv:2303.11873, and Barak et al., Hidden progress
in deep learning: SGD learns parities near the computational limit, 2022,
arXiv:2207.08799. Examples have 40 random bits ±1, and their label is the parity of 3 of
them. Networks 40→1000→1 with ReLU and binary cross-entropy (the first paper uses the
hinge loss) are trained for all combinations of --rows and --weight_decays, with several
seeds. Each seed has its own examples, initial weights and batches. A step of SGD is

    θ ← θ − η (∇L + λ θ) = (1 − η λ) θ − η ∇L,

where L is the mean loss of a batch, η is --learning_rate, and λ is the weight decay,
which applies to all parameters. A penalty λ/2 ‖θ‖² in the loss and decoupled weight
decay are the same here.

A network has memorized at the first evaluation with a training accuracy of at least
98%, and has generalized at the first one with a test accuracy of at least 98%, on 1000
examples; "never" means not within --epochs. Networks are evaluated before the first
epoch and after every 5 epochs, so times are multiples of 5. An epoch visits each of
a network's training examples once, so with fewer examples it has fewer steps; the files
have both. The table has medians over seeds, which are "never" if at least half of the
networks never got there.

Expect networks with few rows to memorize but never generalize, those with many rows to
do both at about the same time, and those in between to generalize long after they
memorize, later with smaller weight decay. Without weight decay none generalizes.

With --output_dir, rerun the same command to resume an interrupted run.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags

import jaxbce
from experiments.support import cli, config, output, plots, resumable
from experiments.support.cli import InputError

_OPTIONS = ("learning_rate", "batch_size", "epochs", "seeds", "dtype", "seed")
for _name in (*cli.COMMON, *_OPTIONS, "hidden", "cpu_devices"):
    flags.declare_key_flag(_name)
_ROWS = flags.DEFINE_string(
    "rows",
    "600,800,1000,1200,1600,2000",
    "Numbers of training examples, comma-separated.",
)
_WEIGHT_DECAYS = flags.DEFINE_string(
    "weight_decays",
    "0,0.001,0.002,0.005,0.01,0.02,0.03,0.04",
    "Weight decays λ, comma-separated.",
)
_REFERENCE = flags.DEFINE_string(
    "reference",
    None,
    "Number of training examples and weight decay of the networks whose curves are "
    "drawn. If not set, 1000,0.01, or the last of --rows or --weight_decays where "
    "that is not among them.",
)
_NUM_BITS = flags.DEFINE_integer(
    "num_bits", 40, "Bits per example.", lower_bound=1, upper_bound=10**6
)
_PARITY_BITS = flags.DEFINE_integer(
    "parity_bits", 3, "Number of bits whose parity is the label.", lower_bound=1
)
_TEST_ROWS = flags.DEFINE_integer(
    "test_rows",
    1000,
    "Number of test examples.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)
_EPOCHS_PER_EVALUATION = flags.DEFINE_integer(
    "epochs_per_evaluation", 5, "Epochs between evaluations.", lower_bound=1
)
DEFAULTS: dict[str, Any] = {
    "hidden": "1000",
    "learning_rate": 0.1,
    "batch_size": 32,
    "epochs": 600,
    "seeds": 3,
    "dtype": "float32",
}
HELP = {
    "epochs": "Epochs to train for.",
    "learning_rate": "The learning rate η.",
    "seeds": "Networks per combination of --rows and --weight_decays.",
}

REFERENCE = (1000, 0.01)  # whose curves are drawn
ACCURACY = 0.98  # at which a network has memorized, or generalized
EVENTS = {"memorized": "train_accuracy", "generalized": "test_accuracy"}
HEADINGS = {
    "weight_decay": "weight decay",
    "memorized_epoch": "memorized at epoch",
    "generalized_epoch": "generalized at epoch",
    "final_test_accuracy": "final test accuracy",
}


def make_optimizer(hp: dict[str, jax.Array]) -> optax.GradientTransformation:
    """SGD with weight decay, as in this module's docstring."""
    return optax.chain(
        optax.add_decayed_weights(hp["weight_decay"]), optax.sgd(hp["learning_rate"])
    )


def make_data(
    rows: int, num_bits: int, parity_bits: int, seed: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Random bits, and their parity.

    Args:
      rows: Number of examples.
      num_bits: Bits per example.
      parity_bits: Number of bits whose parity is the label. They are the first ones,
        without loss of generality, because weights are initialized alike for all bits.
      seed: Seed of `numpy.random.default_rng`. Fewer rows are the first ones of more.

    Returns:
      Features `[rows, num_bits]`, each −1 or 1, and labels `[rows, 1]`, boolean.
    """
    x = np.random.default_rng(seed).choice([-1.0, 1.0], size=(rows, num_bits))
    return x, x[:, :parity_bits].prod(axis=1, keepdims=True) > 0


def run(
    *,
    rows: tuple[int, ...],
    weight_decays: tuple[float, ...],
    reference: tuple[int, float],
    num_bits: int = 40,
    parity_bits: int = 3,
    test_rows: int = 1000,
    hidden: tuple[int, ...] = (1000,),
    learning_rate: float = 0.1,
    batch_size: int = 32,
    epochs: int = 600,
    epochs_per_evaluation: int = 5,
    seeds: int = 3,
    dtype: str = "float32",
    seed: int = 0,
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains a network for each number of rows, weight decay and seed.

    Args:
      rows: Numbers of training examples.
      weight_decays: Weight decays.
      reference: One of each, whose curves are drawn.
      num_bits: Bits per example.
      parity_bits: Number of bits whose parity is the label.
      test_rows: Number of test examples.
      hidden: Widths of the hidden layers.
      learning_rate: The learning rate.
      batch_size: Examples per batch; 0 is all of them.
      epochs: Epochs of each network.
      epochs_per_evaluation: Epochs between evaluations. There is always one after the
        last epoch.
      seeds: Networks per combination.
      dtype: "float64", "float32" or "bfloat16".
      seed: Seed of all random numbers.
      make_folder: Called once all arguments are found valid; returns the folder to save
        the run to and resume it from, or None.

    Returns:
      "configuration"; "points", one row per combination, see `summarize`; "networks", a
      table with one row per network, see `find_events`; and "curves", a table with one
      row per network and evaluation, see `train`.

    Raises:
      InputError: If an argument cannot be used, or the folder belongs to another run.
    """
    configuration = {
        "rows": list(rows),
        "weight_decays": list(weight_decays),
        "reference": list(reference),
        "num_bits": num_bits,
        "parity_bits": parity_bits,
        "test_rows": test_rows,
        "hidden": hidden,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "epochs": epochs,
        "epochs_per_evaluation": epochs_per_evaluation,
        "seeds": seeds,
        "dtype": dtype,
        "seed": seed,
        "devices": jax.device_count(),  # the last digits depend on it
    }
    _check(configuration)
    folder = make_folder()
    chunks = list(itertools.product(rows, range(seeds)))

    with jax.enable_x64(dtype == "float64"):
        curves = resumable.compute_chunks(
            lambda i: train(*chunks[i], configuration),
            [len(weight_decays)] * len(chunks),
            folder=folder,
            # Another reference changes only the picture.
            configuration={k: v for k, v in configuration.items() if k != "reference"},
            unit=" epochs",
            scale=epochs,
        )
    networks = find_events(curves)
    result = {
        "configuration": configuration,
        "points": summarize(networks),
        "networks": networks,
        "curves": curves,
    }
    if folder is not None:
        save(folder, result)
    return result


def train(rows: int, network_seed: int, configuration: dict[str, Any]) -> pd.DataFrame:
    """Trains one network per weight decay, with shared initial weights and batches.

    Training between two evaluations is a sweep of its own, which starts from the
    parameters of the previous one and draws batches from its own key.

    Args:
      rows: Number of training examples.
      network_seed: Seed of examples, weights and batches, besides the seed of the run.
      configuration: As `run` returns it.

    Returns:
      One row per network and evaluation: "rows", "weight_decay", "seed", "epoch",
      "step", and as `evaluate` has them "train_loss", "train_accuracy", "test_loss" and
      "test_accuracy", which are NaN once a network has diverged.
    """
    c = configuration
    seeds = c["seed"], network_seed
    bits = c["num_bits"], c["parity_bits"]
    sets = {
        "train": make_data(rows, *bits, (*seeds, 0)),
        "test": make_data(c["test_rows"], *bits, (*seeds, 1)),
    }
    sets = {name: (jnp.asarray(x, c["dtype"]), y) for name, (x, y) in sets.items()}
    decays = np.array(c["weight_decays"])
    hparams = {
        "weight_decay": decays,
        "learning_rate": np.full(len(decays), c["learning_rate"]),
    }
    key = jax.random.fold_in(jax.random.key(c["seed"]), network_seed)
    key_params, key_fit = jax.random.split(key)
    start = jaxbce.init(key_params, (c["num_bits"], *c["hidden"], 1), dtype=c["dtype"])
    params = jax.tree.map(lambda t: np.stack([t[None]] * len(decays)), start)
    diverged = np.zeros(len(decays), bool)
    batch_size = c["batch_size"] or rows
    steps_per_epoch = -(-rows // batch_size)
    tables, done = [], 0
    for epoch in (*range(0, c["epochs"], c["epochs_per_evaluation"]), c["epochs"]):
        if epoch > done:
            trained = jaxbce.sweep(
                jax.random.fold_in(key_fit, epoch),
                *sets["train"],
                params=params,
                make_optimizer=make_optimizer,
                hparams=hparams,
                num_steps=(epoch - done) * steps_per_epoch,
                batch_size=batch_size,
            )
            params, done = trained.params, epoch
            diverged |= trained.diverged_at[:, 0] >= 0
        scores = {
            f"{name}_{score}": np.where(diverged, np.nan, values)
            for name, examples in sets.items()
            for score, values in evaluate(params, *examples).items()
        }
        shared = {"seed": network_seed, "epoch": epoch, "step": epoch * steps_per_epoch}
        columns = {"rows": rows, "weight_decay": decays, **shared, **scores}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def evaluate(params: Any, x: jax.Array, y: Any) -> dict[str, np.ndarray]:
    """Mean loss and accuracy of networks whose leaves are `[networks, 1, ...]`."""
    params = jax.tree.map(lambda leaf: leaf[:, 0], params)
    loss, correct = jax.tree.map(np.asarray, _evaluate(params, x, y))
    return {"loss": loss.astype(float), "accuracy": correct / len(y)}


@jax.jit
def _evaluate(params: Any, x: jax.Array, y: Any) -> tuple[jax.Array, jax.Array]:
    """Losses and numbers of examples whose label is predicted, `[networks]` each."""

    def evaluate_one(params: Any) -> tuple[jax.Array, jax.Array]:
        a = jaxbce.logits(params, x)
        return jnp.mean(jaxbce.bce_with_logits(a, y)), jnp.sum((a > 0) == y)

    return jax.lax.map(evaluate_one, params)


def find_events(curves: pd.DataFrame) -> pd.DataFrame:
    """When networks memorize and generalize.

    Args:
      curves: A table as `train` returns it.

    Returns:
      One row per network: "rows", "weight_decay" and "seed"; "memorized_epoch" and
      "memorized_step" of the first evaluation with a training accuracy of at least
      `ACCURACY`, and "generalized_epoch" and "generalized_step" likewise, NaN if there
      is none; "final_train_accuracy" and "final_test_accuracy".
    """
    by = ["rows", "weight_decay", "seed"]
    last: Any = curves.drop_duplicates(by, keep="last").set_index(by)
    networks = last[list(EVENTS.values())].add_prefix("final_")
    for event, accuracy in EVENTS.items():
        reached: Any = curves[curves[accuracy] >= ACCURACY]
        first = reached.groupby(by)[["epoch", "step"]].first()
        networks = networks.join(first.add_prefix(f"{event}_"))
    return networks.reset_index()


def summarize(networks: pd.DataFrame) -> list[dict[str, Any]]:
    """Medians over the seeds of each combination.

    Args:
      networks: A table as `find_events` returns it.

    Returns:
      One row per combination: "rows", "weight_decay", the number of "networks"; how
      many of them have "memorized", and the median "memorized_epoch", None if half of
      them or more have not; likewise "generalized" and "generalized_epoch"; how many
      have "diverged"; and the mean "final_test_accuracy" of the others, None if all
      have diverged.
    """
    points = []
    groups: Any = networks.groupby(["rows", "weight_decay"], sort=False)
    for (rows, decay), group in groups:
        point = {"rows": rows, "weight_decay": decay, "networks": len(group)}
        for event in EVENTS:
            found = group[f"{event}_epoch"]
            median = found.fillna(np.inf).median()
            point[event] = int(found.notna().sum())
            point[f"{event}_epoch"] = median if np.isfinite(median) else None
        point["diverged"] = int(group["final_test_accuracy"].isna().sum())
        mean = group["final_test_accuracy"].mean()
        point["final_test_accuracy"] = mean if np.isfinite(mean) else None
        points.append(point)
    return points


def _check(configuration: dict[str, Any]) -> None:
    """Checks the arguments of `run`.

    Raises:
      InputError: If one of them cannot be used.
    """
    c = configuration
    rows, batch_size = c["rows"], c["batch_size"]
    if c["parity_bits"] > c["num_bits"]:
        raise InputError(
            f"--parity_bits={c['parity_bits']}: expected at most --num_bits, "
            f"{c['num_bits']}"
        )
    if batch_size > min(rows):
        raise InputError(
            f"--batch_size={batch_size}: expected at most the smallest of --rows, "
            f"{min(rows)}"
        )
    if not 0 < c["learning_rate"] < math.inf:
        raise InputError(
            f"--learning_rate={c['learning_rate']:g}: expected a finite number > 0"
        )
    num_steps = c["epochs"] * -(-max(rows) // (batch_size or max(rows)))
    if num_steps >= 2**31:
        raise InputError(
            f"--epochs={c['epochs']}: expected fewer than 2^31 steps, got {num_steps}"
        )
    reference = c["reference"]
    if reference[0] not in rows or reference[1] not in c["weight_decays"]:
        raise InputError(
            f"--reference={reference[0]},{reference[1]:g}: expected one of --rows and "
            "one of --weight_decays"
        )


def _reference(
    rows: tuple[int, ...], weight_decays: tuple[float, ...]
) -> tuple[int, float]:
    """--reference as a number of rows and a weight decay, or one of those trained."""
    text = _REFERENCE.value
    if text is None:
        return (
            REFERENCE[0] if REFERENCE[0] in rows else rows[-1],
            REFERENCE[1] if REFERENCE[1] in weight_decays else weight_decays[-1],
        )
    try:
        number, decay = text.split(",")
        return int(number), float(decay)
    except ValueError:
        raise InputError(
            f"--reference={text}: expected a number of rows and a weight decay, "
            "separated by a comma"
        ) from None


def save(folder: Path, result: dict[str, Any]) -> None:
    """Writes the curves, the results by network and by point, and the picture."""
    with output.atomic_write(folder / "curves.parquet") as path:
        result["curves"].to_parquet(path, index=False)
    with output.atomic_write(folder / "networks.csv") as path:
        result["networks"].to_csv(path, index=False)
    document = {name: result[name] for name in ("configuration", "points")}
    output.write_results(folder, "grokking", document, result["points"])
    plots.grokking(
        folder / "grokking.png",
        result["curves"],
        result["points"],
        tuple(result["configuration"]["reference"]),
        ACCURACY,
    )


def _report(points: list[dict[str, Any]]) -> None:
    """Prints the points, with numbers of networks where they differ."""

    def time(point: dict[str, Any], event: str) -> str:
        epoch, count, networks = (
            point[name] for name in (f"{event}_epoch", event, "networks")
        )
        text = "never" if epoch is None else f"{epoch:g}"
        return text if count in (0, networks) else f"{text} ({count} of {networks})"

    def accuracy(point: dict[str, Any]) -> str:
        if point["final_test_accuracy"] is None:
            return "diverged"
        text = f"{point['final_test_accuracy']:.3f}"
        return f"{text} ({point['diverged']} diverged)" if point["diverged"] else text

    rows = [
        {
            "rows": point["rows"],
            "weight_decay": f"{point['weight_decay']:g}",
            **{f"{event}_epoch": time(point, event) for event in EVENTS},
            "final_test_accuracy": accuracy(point),
        }
        for point in points
    ]
    print(f"\n{output.table(rows, headings=HEADINGS)}")


def main() -> int:
    """Trains the networks of the flags."""
    cli.use_devices()
    rows = cli.distinct_numbers(_ROWS, int, 1, 2**31 - 1)
    weight_decays = cli.distinct_numbers(_WEIGHT_DECAYS, float, 0)
    reference = _reference(rows, weight_decays)
    hidden = config.hidden_sizes()
    layers = "→".join(map(str, (_NUM_BITS.value, *hidden, 1)))
    print(
        f"parity of {_PARITY_BITS.value} of {_NUM_BITS.value} bits, networks {layers}: "
        f"{len(rows)} numbers of rows × {len(weight_decays)} weight decays × "
        f"{cli.SEEDS.value} seeds"
    )
    output.print_environment()
    options: dict[str, Any] = {name: flags.FLAGS[name].value for name in _OPTIONS}
    result = run(
        rows=rows,
        weight_decays=weight_decays,
        reference=reference,
        num_bits=_NUM_BITS.value,
        parity_bits=_PARITY_BITS.value,
        test_rows=_TEST_ROWS.value,
        hidden=hidden,
        epochs_per_evaluation=_EPOCHS_PER_EVALUATION.value,
        **options,
        make_folder=cli.output_dir,
    )
    _report(result["points"])
    if cli.OUTPUT_DIR.value is not None:
        output.print_files(Path(cli.OUTPUT_DIR.value))
    return 0


if __name__ == "__main__":
    cli.launch(main, DEFAULTS, HELP)
