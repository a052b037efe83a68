r"""Does test error rise and fall again with width?

    python -m experiments.double_descent --output_dir results
    python -m experiments.double_descent --noise 0 --output_dir clean
    python -m experiments.double_descent --widths 5,16,61,177 --seeds 2 --epochs 100

Trains networks 40→w→w→10 on MNIST-1D with some wrong training labels, and draws
training and test error over the width w. The test error first falls with width, then
rises as networks become able to fit the wrong labels, and falls again beyond the width
that fits all of them (Belkin et al., Reconciling modern machine-learning practice and
the bias-variance trade-off, 2018, arXiv:1812.11118; Nakkiran et al., Deep double
descent, 2019, arXiv:1912.02292).

Data, sizes and hyperparameters are those of the notebook on deep double descent in the
repository of MNIST-1D (Greydanus and Kobak, Scaling down deep learning with MNIST-1D,
2020, arXiv:2011.14439): 4000 training and 12000 test examples, and 500 epochs of SGD
with learning rate 0.01, momentum 0.9 and batches of 100. Each training label is
replaced with probability 0.15 by a class drawn from all ten, so that about 13.5% of the
labels are wrong. The table and the picture also show the notebook's test errors. It
differs in its outputs, a softmax, and in its initial weights, which are PyTorch's. Here
each class has a logistic output, with binary cross-entropy summed over outputs, and the
prediction is the class with the largest logit.

All networks share the data and the wrong labels. The networks of one width differ in
their initial weights and in the order of examples. Error bars are standard errors of
their mean, and leave out the variation between data sets. Errors are measured after the
last step; the training error is that on the given labels, wrong ones included.

Expect a peak between widths 40 and 80; without wrong labels (--noise 0) the test error
falls almost steadily. The widest networks are trained first, because they take longest.
With --output_dir, rerun the same command to resume an interrupted run. The data are
generated offline by the package mnist1d: pip install 'jaxbce[phenomena]'.
"""

import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from absl import flags

import jaxbce
from experiments.support import cli, config, output, plots, resumable

_OPTIONS = ("epochs", "seeds", "dtype", "seed")
for _name in (*cli.COMMON, *_OPTIONS, "cpu_devices"):
    flags.declare_key_flag(_name)
_WIDTHS = flags.DEFINE_string(
    "widths",
    "5,7,9,12,16,21,27,36,47,61,80,104,135,177,230,300",
    "Units in each of the two hidden layers, comma-separated.",
)
_NOISE = flags.DEFINE_float(
    "noise",
    0.15,
    "Probability that a training label is replaced by a class drawn from all ten.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_TRAIN_ROWS = flags.DEFINE_integer(
    "train_rows",
    4000,
    "Number of training examples; the test set has three times as many.",
    lower_bound=100,
    upper_bound=10**6,
)
DEFAULTS: dict[str, Any] = {"dtype": "float32", "epochs": 500, "seeds": 8}
HELP = {
    "epochs": "Epochs to train for.",
    "seeds": "Networks per width, with different initial weights and orders of "
    "examples.",
    "seed": "Seed of the wrong labels, the weights and the order of examples.",
}

LEARNING_RATE = 0.01
MOMENTUM = 0.9
BATCH_SIZE = 100
CLASSES = 10
TEST_RATIO = 3  # test examples per training example
MAX_WIDTH = 4096
# Test errors in the log of the notebook, deep-double-descent.ipynb at commit 9129ceb of
# github.com/greydanus/mnist1d, by noise and width, each of one network.
PUBLISHED_SETTINGS = {"epochs": 500, "train_rows": 4000}
PUBLISHED = {
    0.15: {
        **{2: 0.6959, 3: 0.6750, 4: 0.6255, 5: 0.5745, 7: 0.5480, 9: 0.4897},
        **{12: 0.5028, 16: 0.4724, 21: 0.5084, 27: 0.5069, 36: 0.5280, 47: 0.5405},
        **{61: 0.5402, 80: 0.5208, 104: 0.5023, 135: 0.4839, 177: 0.4788},
        **{230: 0.4654, 300: 0.4547},
    },
    0.0: {
        **{2: 0.6853, 3: 0.6683, 4: 0.5827, 5: 0.6137, 7: 0.5420, 9: 0.4933},
        **{12: 0.5008, 16: 0.4455, 21: 0.4263, 27: 0.4102, 36: 0.4166, 47: 0.4101},
        **{61: 0.4124, 80: 0.3959, 104: 0.3861, 135: 0.3858, 177: 0.3809},
        **{230: 0.3710, 300: 0.3725},
    },
}
PUBLISHED_SECONDS = {0.15: (763, 3049), 0.0: (672, 2687)}  # elapsed, processor time
ROUNDING = 1e-12  # smaller differences of mean errors are due to rounding
TIMES = ["seconds", "processor_seconds"]
HEADINGS = {
    "train_error": "train error (%)",
    "test_error": "test error (%)",
    "published": "published test error (%)",
}

Row = dict[str, Any]


class Data(NamedTuple):
    """MNIST-1D, with some training labels replaced.

    Attributes:
      x: Training features `[N, 40]`.
      labels: Their classes as the networks see them, `[N]`.
      x_test: Test features `[M, 40]`.
      test_labels: Their classes, `[M]`, all correct.
      wrong_labels: Number of training labels that are wrong.
    """

    x: np.ndarray
    labels: np.ndarray
    x_test: np.ndarray
    test_labels: np.ndarray
    wrong_labels: int


def make_data(train_rows: int, noise: float, seed: int) -> Data:
    """Generates MNIST-1D and replaces some of its training labels.

    Args:
      train_rows: Number of training examples.
      noise: Probability with which a training label is replaced.
      seed: Seed of the replaced labels. The features are those of mnist1d's own seed.

    Raises:
      InputError: If mnist1d cannot be imported.
    """
    try:
        from mnist1d import data as generator
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            raise cli.InputError(f"mnist1d cannot be imported: {error}") from None
        raise cli.InputError(
            f"{error.name} is not installed; run pip install 'jaxbce[phenomena]'"
        ) from None
    rows = (1 + TEST_RATIO) * train_rows
    options: Any = generator.get_dataset_args()
    options.num_samples = math.ceil(rows / CLASSES) * CLASSES  # as many of each class
    found = generator.make_dataset(options)
    x, labels = (np.concatenate([found[n], found[f"{n}_test"]])[:rows] for n in "xy")
    rng = np.random.default_rng(seed)
    replaced = rng.random(train_rows) < noise
    drawn = rng.integers(0, CLASSES, train_rows)
    right = labels[:train_rows]
    given = np.where(replaced, drawn, right)
    return Data(
        x=x[:train_rows],
        labels=given,
        x_test=x[train_rows:],
        test_labels=labels[train_rows:],
        wrong_labels=int(np.sum(given != right)),
    )


def run(
    *,
    widths: Sequence[int],
    seeds: int = 8,
    noise: float = 0.15,
    epochs: int = 500,
    train_rows: int = 4000,
    dtype: str = "float32",
    seed: int = 0,
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains networks of every width, and measures their errors.

    Args:
      widths: Units in each of the two hidden layers.
      seeds: Networks per width.
      noise: Probability with which a training label is replaced.
      epochs: Epochs to train for.
      train_rows: Number of training examples.
      dtype: "float64", "float32" or "bfloat16".
      seed: Seed of the wrong labels, the weights and the order of examples.
      make_folder: Called once all arguments are found valid; returns the folder to save
        the run to and resume it from, or None.

    Returns:
      "configuration"; "wrong_labels", their number; "seconds" and "processor_seconds"
      of training, including compilation; "widths", one row per width, see `summarize`;
      "peak", see `find_peak`; "networks", a table with one row per network. Errors are
      fractions.

    Raises:
      InputError: If an argument cannot be used, mnist1d cannot be imported, a network
        diverges, or the folder belongs to another run.
    """
    if not 0 <= noise <= 1:
        raise cli.InputError(f"--noise={noise:g}: expected a number in [0, 1]")
    num_steps = epochs * math.ceil(train_rows / BATCH_SIZE)
    if num_steps >= 2**31:
        raise cli.InputError(
            f"--epochs={epochs}: expected fewer than 2^31 steps, got {num_steps}"
        )
    data = make_data(train_rows, noise, seed)
    configuration = {
        "widths": sorted(widths),
        "seeds": seeds,
        "noise": noise,
        "epochs": epochs,
        "train_rows": train_rows,
        "test_rows": len(data.test_labels),
        "learning_rate": LEARNING_RATE,
        "momentum": MOMENTUM,
        "batch_size": BATCH_SIZE,
        "dtype": dtype,
        "seed": seed,
        "mnist1d": importlib.metadata.version("mnist1d"),
        "devices": jax.device_count(),  # the last digits depend on it
    }
    folder = make_folder()
    # So that the progress bar does not underestimate the time left.
    widest_first = sorted(widths, reverse=True)

    with jax.enable_x64(dtype == "float64"):
        networks = resumable.compute_chunks(
            lambda i: train(widest_first[i], data, configuration, num_steps),
            [seeds] * len(widths),
            folder=folder,
            configuration=configuration,
            unit=" network-steps",
            scale=num_steps,
        )
    networks = networks.sort_values(["width", "seed"], ignore_index=True)
    rows = summarize(networks, published(configuration))
    result = {
        "configuration": configuration,
        "wrong_labels": data.wrong_labels,
        **{name: float(networks[name].to_numpy().sum()) for name in TIMES},
        "widths": rows,
        "peak": find_peak(rows),
        "networks": networks.drop(columns=TIMES),
    }
    if folder is not None:
        save(folder, result)
    return result


def train(
    width: int, data: Data, configuration: dict[str, Any], num_steps: int
) -> pd.DataFrame:
    """Trains all networks of one width.

    Args:
      width: Units in each of the two hidden layers.
      data: The data.
      configuration: As `run` returns it.
      num_steps: Number of training steps.

    Returns:
      One row per network: its "width" and "seed", its errors and losses on the training
      and the test set, and its share of the "seconds" and "processor_seconds".

    Raises:
      InputError: If a network diverges.
    """
    began = time.perf_counter(), time.process_time()
    x, x_test = (jnp.asarray(t, configuration["dtype"]) for t in (data.x, data.x_test))
    one_hot = np.eye(CLASSES, dtype=bool)
    trained = jaxbce.sweep(
        jax.random.key(configuration["seed"]),
        x,
        one_hot[data.labels],
        hidden=(width, width),
        make_optimizer=lambda hp: optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
        hparams={},
        num_seeds=configuration["seeds"],
        num_steps=num_steps,
        batch_size=BATCH_SIZE,
        validation=(x_test, one_hot[data.test_labels]),
        dtype=configuration["dtype"],
    )
    if (trained.diverged_at >= 0).any():
        raise cli.InputError(
            f"--widths: networks of width {width} diverged; leave this width out"
        )
    params = jax.tree.map(lambda leaf: leaf[0], trained.params)
    networks = pd.DataFrame(
        {
            "width": width,
            "seed": np.arange(configuration["seeds"]),
            "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(params)),
            "train_error": error_rates(params, x, data.labels),
            "test_error": error_rates(params, x_test, data.test_labels),
            "train_loss": trained.train_loss[0, :, -1],
            "test_loss": trained.validation_loss[0, :, -1],
        }
    )
    ended = time.perf_counter(), time.process_time()
    return networks.assign(
        **{
            name: (end - start) / len(networks)
            for name, start, end in zip(TIMES, began, ended, strict=True)
        }
    )


def error_rates(params: Any, x: jax.Array, labels: np.ndarray) -> np.ndarray:
    """Fraction of examples whose largest logit is not that of their class.

    Args:
      params: Parameters of several networks, leaves `[networks, ...]`.
      x: Features `[N, 40]`.
      labels: Classes `[N]`.

    Returns:
      One fraction per network, `[networks]`.
    """
    rates = []
    for i in range(len(params[0].w)):
        member = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), params)
        predicted = np.asarray(jaxbce.logits(member, x)).argmax(axis=1)
        rates.append(np.mean(predicted != labels))
    return np.array(rates)


def published(configuration: dict[str, Any]) -> Mapping[int, float]:
    """The notebook's test errors by width; none for settings other than its own."""
    if any(configuration[name] != value for name, value in PUBLISHED_SETTINGS.items()):
        return {}
    return PUBLISHED.get(configuration["noise"], {})


def summarize(networks: pd.DataFrame, reference: Mapping[int, float]) -> list[Row]:
    """Means over the networks of each width, and their standard errors.

    Args:
      networks: As `run` returns it.
      reference: The published test errors by width.

    Returns:
      One row per width, with "width", "parameters", "train_error", "test_error",
      "train_loss" and "test_loss", each of the last four also with "_se", and
      "published_test_error". Values that do not exist are None.
    """
    rows = []
    for width, group in networks.groupby("width"):
        row: Row = {"width": width, "parameters": group["parameters"].iloc[0]}
        for name in ("train_error", "test_error", "train_loss", "test_loss"):
            values = group[name].to_numpy(np.float64)
            row[name] = float(values.mean())
            count = len(values)
            error = values.std(ddof=1) / math.sqrt(count) if count > 1 else None
            row[f"{name}_se"] = error
        row["published_test_error"] = reference.get(row["width"])
        rows.append(row)
    return rows


def find_peak(rows: list[Row]) -> Row | None:
    """The largest rise of the mean test error from a smaller width to a larger one.

    Args:
      rows: As `summarize` returns them.

    Returns:
      Width and test error of the "minimum" before the peak, the "peak", and the "end",
      the lowest error from the peak on; and "rise" and "fall", the differences between
      them. None if no test error is larger than that of a smaller width.
    """
    errors = np.array([row["test_error"] for row in rows])
    rises = errors - np.minimum.accumulate(errors)
    peak = int(np.argmax(rises))
    if rises[peak] < ROUNDING:
        return None
    places = {
        "minimum": int(np.argmin(errors[:peak])),
        "peak": peak,
        "end": peak + int(np.argmin(errors[peak:])),
    }
    found: Row = {}
    for name, i in places.items():
        found[f"{name}_width"] = rows[i]["width"]
        found[f"{name}_test_error"] = rows[i]["test_error"]
    found["rise"] = float(errors[peak] - errors[places["minimum"]])
    found["fall"] = float(errors[peak] - errors[places["end"]])
    return found


def save(folder: Path, result: dict[str, Any]) -> None:
    """Writes the networks, the means by width and the picture."""
    with output.atomic_write(folder / "networks.csv") as path:
        result["networks"].to_csv(path, index=False)
    document = {name: value for name, value in result.items() if name != "networks"}
    output.write_results(folder, "double_descent", document, result["widths"])
    plots.double_descent(
        folder / "double_descent.png",
        result["widths"],
        published(result["configuration"]),
        result["configuration"]["noise"],
    )


def _report(result: dict[str, Any]) -> None:
    """Prints the errors by width, the peak and the time."""
    configuration, peak = result["configuration"], result["peak"]
    wrong, train_rows = result["wrong_labels"], configuration["train_rows"]
    rows = []
    for row in result["widths"]:
        shown = {name: row[name] for name in ("width", "parameters")}
        for name in ("train_error", "test_error"):
            shown[name] = _percent(row[name], row[f"{name}_se"])
        if row["published_test_error"] is not None:
            shown["published"] = _percent(row["published_test_error"], None)
        rows.append(shown)
    print(
        f"\n{wrong} of {train_rows} training labels are wrong.\n\n"
        f"{output.table(rows, headings=HEADINGS)}\n"
    )
    if peak is None:
        print("The test error never rises.")
    else:
        minimum, top, end = (
            f"{100 * peak[f'{name}_test_error']:.2f}% at width {peak[f'{name}_width']}"
            for name in ("minimum", "peak", "end")
        )
        fall = f", and falls by {100 * peak['fall']:.2f} points to {end}"
        print(
            f"The test error rises by {100 * peak['rise']:.2f} points, from {minimum} "
            f"to {top}{fall if peak['fall'] >= ROUNDING else ''}."
        )
    print(
        f"Training {configuration['seeds'] * len(rows)} networks took "
        f"{_times(*(result[name] for name in TIMES))}, including compilation."
    )
    if reference := published(configuration):
        times = _times(*PUBLISHED_SECONDS[configuration["noise"]])
        low, high = min(reference), max(reference)
        print(
            f"By its log, the notebook took {times}, on another machine, for one "
            f"network of each of {len(reference)} widths from {low} to {high}."
        )


def _times(elapsed: float, processor: float) -> str:
    """Elapsed and processor time as text."""
    texts = (f"{round(t) // 60} min {round(t) % 60} s" for t in (elapsed, processor))
    return "{} ({} of processor time)".format(*texts)


def _percent(mean: float, error: float | None) -> str:
    """A mean and its standard error, if there is one, in percent."""
    return f"{100 * mean:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def main() -> int:
    """Trains networks of the widths of the flags."""
    # Settings.
    cli.use_devices()
    widths = cli.distinct_numbers(_WIDTHS, int, 1, MAX_WIDTH)
    options: dict[str, Any] = {name: flags.FLAGS[name].value for name in _OPTIONS}
    print(
        f"{options['seeds'] * len(widths)} networks 40→w→w→10, w from {min(widths)} to "
        f"{max(widths)}, {config.EPOCHS.value} epochs"
    )
    output.print_environment()

    # Training.
    result = run(
        widths=widths,
        noise=_NOISE.value,
        train_rows=_TRAIN_ROWS.value,
        **options,
        make_folder=cli.output_dir,
    )

    # Results.
    _report(result)
    if cli.OUTPUT_DIR.value is not None:
        output.print_files(Path(cli.OUTPUT_DIR.value))
    return 0


if __name__ == "__main__":
    cli.launch(main, DEFAULTS, HELP)
