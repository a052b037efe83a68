"""Data: what ships with scikit-learn, or the user's own file; prepared and split."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from absl import flags
from sklearn import datasets as sklearn_datasets
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from experiments.support import table_io
from experiments.support.cli import InputError

DATASET = flags.DEFINE_enum(
    "dataset",
    None,
    ["digits", "breast_cancer", "moons", "xor"],
    "Data that ships with scikit-learn (breast_cancer; digits, odd against even, which "
    "is the default) or is generated (moons, xor).",
)
DATA = flags.DEFINE_string(
    "data", None, "A .csv or .parquet file to use in place of --dataset."
)
TARGET = flags.DEFINE_list(
    "target",
    None,
    "The column of --data with the labels, of any two values; several columns, "
    "comma-separated, are as many outputs. All other columns are features: numbers are "
    "standardised, text is taken as categories.",
)
POSITIVE = flags.DEFINE_string(
    "positive",
    None,
    "The value that is label 1, of every --target; the larger if not set.",
)
HIDDEN = flags.DEFINE_multi_string(
    "hidden",
    ["32"],
    "Widths of the hidden layers, comma-separated; '' for none. A sweep takes several.",
)

GENERATED_ROWS = 1000
LARGEST = 1e15  # standard deviations from the mean; beyond, no dtype is safe
LEAST_ROWS = 5  # of either label, so that each part of a split has one


class Table(NamedTuple):
    """A binary classification problem, as it came.

    Attributes:
      name: Where it is from.
      features: Columns of float64 numbers, or of text where they are categories.
      y: Labels 0 and 1, `[N, n_L]`, float64.
      classes: For each target its name, and what labels 0 and 1 stand for.
    """

    name: str
    features: pd.DataFrame
    y: np.ndarray
    classes: dict[str, tuple[Any, Any]]


class Part(NamedTuple):
    """One part of a split.

    Attributes:
      rows: Which rows of the table they are, `[n]`.
      x: Features `[n, n_0]`, float64, prepared.
      y: Labels `[n, n_L]`, float64.
    """

    rows: np.ndarray
    x: np.ndarray
    y: np.ndarray


def label_1(classes: dict[str, tuple[Any, Any]]) -> list[str]:
    """What label 1 of each target stands for, as "target=value"."""
    return [f"{name}={values[1]}" for name, values in classes.items()]


def hidden_choices() -> list[tuple[int, ...]]:
    """Each --hidden as integers.

    Raises:
      InputError: If one of them is not an integer >= 1.
    """
    return [_widths(text) for text in HIDDEN.value]


def hidden_sizes() -> tuple[int, ...]:
    """The one --hidden there is, as integers; errors are as above, or of a second."""
    if len(HIDDEN.value) > 1:
        raise InputError("--hidden is given twice; one network is trained")
    return hidden_choices()[0]


def _widths(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(n) for n in text.split(",")) if text else ()
    except ValueError:
        sizes = (0,)
    if any(n < 1 for n in sizes):
        raise InputError(f"--hidden={text}: widths are integers >= 1, comma-separated")
    return sizes


def from_flags(seed: int) -> Table:
    """What the flags above ask for; see `load`."""
    return load(
        dataset=DATASET.value,
        data=DATA.value,
        target=TARGET.value,
        positive=POSITIVE.value,
        seed=seed,
    )


def load(
    *,
    dataset: str | None = None,
    data: str | None = None,
    target: list[str] | None = None,
    positive: str | None = None,
    seed: int = 0,
) -> Table:
    """The named dataset, or the file `data` with its labels in the columns `target`.

    Args:
      dataset: A name that --dataset accepts.
      data: A file's path.
      target: Columns of `data`.
      positive: The value of label 1, as text.
      seed: Of what is generated.

    Raises:
      InputError: If the file cannot be read, or holds what cannot be learned from.
    """
    if data is None:
        for flag, value in (("target", target), ("positive", positive)):
            if value is not None:
                raise InputError(f"--{flag} goes with --data")
        return _named(dataset or "digits", seed)
    if dataset is not None:
        raise InputError("--data and --dataset are two answers to one question")
    if not target:
        raise InputError("--data needs --target, the column with the labels")
    table = table_io.read(Path(data))
    table_io.need_columns(data, table, target)
    if len(set(target)) < len(target):
        raise InputError(f"--target={','.join(target)}: a column is named twice")
    rest = table.drop(columns=target)
    if rest.shape[1] == 0:
        raise InputError(f"{data}: has no column beside {', '.join(map(repr, target))}")
    found = {
        name: table_io.labels(data, pd.Series(table[name]), positive) for name in target
    }
    return Table(
        data,
        table_io.features(data, rest),
        np.stack([y for y, _ in found.values()], axis=1),
        {name: classes for name, (_, classes) in found.items()},
    )


def _named(name: str, seed: int) -> Table:
    rng = np.random.default_rng(seed)
    if name == "moons":
        x, y = sklearn_datasets.make_moons(GENERATED_ROWS, noise=0.2, random_state=seed)
        columns, classes = ["x1", "x2"], {"moon": ("upper", "lower")}
    elif name == "xor":
        x = rng.uniform(-1, 1, (GENERATED_ROWS, 2))
        y = (x[:, 0] * x[:, 1] < 0).astype(int)
        x += rng.normal(scale=0.1, size=x.shape)
        columns, classes = ["x1", "x2"], {"signs": ("equal", "different")}
    else:
        loaders: dict[str, Callable[..., Any]] = {
            "digits": sklearn_datasets.load_digits,
            "breast_cancer": sklearn_datasets.load_breast_cancer,
        }
        bunch = loaders[name]()
        x, y, columns = bunch.data, bunch.target % 2, list(bunch.feature_names)
        classes = {
            "digits": {"digit": ("even", "odd")},
            "breast_cancer": {"diagnosis": ("malignant", "benign")},
        }[name]
    features = pd.DataFrame(np.asarray(x, np.float64), columns=columns)
    return Table(name, features, np.asarray(y, np.float64)[:, None], classes)


def digest(table: Table) -> str:
    """Sixteen hexadecimal digits that tell this table's content from another's."""
    content = table.features.to_csv(index=False).encode() + table.y.tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def preparation(name: str, features: pd.DataFrame) -> ColumnTransformer:
    """Standardised numbers and one-hot categories, fitted on these rows.

    A category that these rows do not have becomes all zeros, a constant column zero.

    Raises:
      InputError: If numbers are too large to standardise.
    """
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    transformer = ColumnTransformer(
        [
            ("numbers", StandardScaler(), make_column_selector(dtype_include=float)),
            ("categories", encoder, make_column_selector(dtype_exclude=float)),
        ],
        verbose_feature_names_out=False,
    )
    with np.errstate(all="ignore"):
        x = transformer.fit_transform(features)
    _check_size(name, transformer, x)
    scaler = transformer.named_transformers_["numbers"]
    variances = getattr(scaler, "var_", np.zeros(0))
    if not np.isfinite(variances).all():
        column = scaler.feature_names_in_[np.argmin(np.isfinite(variances))]
        raise InputError(f"{name}: column {column!r} is too large to standardise")
    return transformer


def prepared(
    name: str, transformer: ColumnTransformer, features: pd.DataFrame
) -> np.ndarray:
    """Features `[N, n_0]` as a fitted preparation makes them.

    Raises:
      InputError: If numbers are too large to standardise.
    """
    with np.errstate(all="ignore"):
        x = np.asarray(transformer.transform(features), np.float64)
    _check_size(name, transformer, x)
    return x


def _check_size(name: str, transformer: ColumnTransformer, x: Any) -> None:
    usable = (np.abs(x) < LARGEST).all(axis=0)  # and not NaN
    if not usable.all():
        column = transformer.get_feature_names_out()[np.argmin(usable)]
        raise InputError(f"{name}: column {column!r} is too large to standardise")


def whole(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """All rows as `x [N, n_0]` and `y [N, n_L]`, prepared together."""
    transformer = preparation(table.name, table.features)
    return prepared(table.name, transformer, table.features), table.y


def split(table: Table, seed: int) -> tuple[dict[str, Part], ColumnTransformer]:
    """Three parts, 60% train, 20% validation and 20% test, stratified by the labels.

    Returns:
      The parts by name, prepared by what is fitted on the training part alone; and
      that preparation.

    Raises:
      InputError: If a label is too rare to be in every part.
    """
    for column, (name, classes) in enumerate(table.classes.items()):
        counts = [int(np.sum(table.y[:, column] == label)) for label in (0, 1)]
        if min(counts) < LEAST_ROWS:
            rare = classes[int(np.argmin(counts))]
            raise InputError(
                f"{table.name}: target {name!r} has {min(counts)} rows of {rare}; at "
                f"least {LEAST_ROWS} are needed for three parts"
            )
    _, group, counts = np.unique(
        table.y, axis=0, return_inverse=True, return_counts=True
    )
    # Of several targets a combination may be rare; it goes with the most common one.
    group = np.where(counts[group] < LEAST_ROWS, np.argmax(counts), group.ravel())
    rows = np.arange(len(table.y))
    rest, test = train_test_split(
        rows, test_size=0.2, stratify=group, random_state=seed
    )
    train, validation = train_test_split(
        rest, test_size=0.25, stratify=group[rest], random_state=seed
    )
    transformer = preparation(table.name, table.features.iloc[train])
    parts = {"train": train, "validation": validation, "test": test}
    return {
        name: Part(
            np.asarray(chosen),
            prepared(table.name, transformer, table.features.iloc[chosen]),
            table.y[chosen],
        )
        for name, chosen in parts.items()
    }, transformer
