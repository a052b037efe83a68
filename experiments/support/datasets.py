"""Datasets: scikit-learn's, generated or the user's own, preprocessed and split."""

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
    "A dataset of scikit-learn (breast_cancer; digits, odd against even) or a "
    "generated one (moons, xor). If neither this nor --data is set, digits.",
)
DATA = flags.DEFINE_string(
    "data", None, "A .csv or .parquet file to use instead of --dataset."
)
TARGET = flags.DEFINE_list(
    "target",
    None,
    "Column of --data that holds the labels, which may be any two values. Several "
    "columns, comma-separated, give as many outputs. All other columns are features: "
    "numbers are standardized, text is one-hot encoded.",
)
POSITIVE = flags.DEFINE_string(
    "positive",
    None,
    "The value of every --target that is label 1. If not set, the larger one.",
)
GENERATED_ROWS = 1000
MAX_STANDARDIZED = 1e15  # larger values could overflow
MIN_ROWS_PER_LABEL = 5  # so that each split has one


class Table(NamedTuple):
    """A binary classification dataset, before preprocessing.

    Attributes:
      name: Name of the dataset or path of the file.
      features: Columns of float64 numbers, or of text if they hold categories.
      y: Labels 0 and 1, `[N, n_L]`, float64.
      classes: By target, the values that labels 0 and 1 stand for.
    """

    name: str
    features: pd.DataFrame
    y: np.ndarray
    classes: dict[str, tuple[Any, Any]]


class Split(NamedTuple):
    """The training, validation or test rows of a table.

    Attributes:
      rows: Their indices in the table, `[n]`.
      x: Preprocessed features `[n, n_0]`, float64.
      y: Labels `[n, n_L]`, float64.
    """

    rows: np.ndarray
    x: np.ndarray
    y: np.ndarray


def label_1(classes: dict[str, tuple[Any, Any]]) -> list[str]:
    """The value of each target that is label 1, as "target=value"."""
    return [f"{name}={values[1]}" for name, values in classes.items()]


def from_flags(seed: int) -> Table:
    """Loads the dataset that the flags name; see `load`."""
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
    """Loads a dataset by name, or the user's own file.

    Args:
      dataset: A value of --dataset.
      data: Path of a file.
      target: Columns of `data` with the labels.
      positive: The value of label 1, as text.
      seed: Seed of generated data.

    Raises:
      InputError: If the file cannot be read or cannot be learned from.
    """
    if data is None:
        for flag, value in (("target", target), ("positive", positive)):
            if value is not None:
                raise InputError(f"--{flag} needs --data")
        return _named(dataset or "digits", seed)
    if dataset is not None:
        raise InputError("expected --data or --dataset, got both")
    if not target:
        raise InputError("--data needs --target, the column with the labels")
    table = table_io.read(Path(data))
    table_io.need_columns(data, table, target)
    if len(set(target)) < len(target):
        raise InputError(f"--target={','.join(target)}: names a column twice")
    rest = table.drop(columns=target)
    if rest.shape[1] == 0:
        raise InputError(
            f"{data}: has no column besides {', '.join(map(repr, target))}"
        )
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
    """A hash of the table's content, as 16 hexadecimal digits."""
    content = table.features.to_csv(index=False).encode() + table.y.tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def fit_preprocessor(name: str, features: pd.DataFrame) -> ColumnTransformer:
    """Fits a preprocessor that standardizes numbers and one-hot encodes categories.

    Categories that do not occur in these rows become all zeros, and constant columns
    become zero.

    Raises:
      InputError: If numbers are too large to standardize.
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
        raise InputError(f"{name}: column {column!r} is too large to standardize")
    return transformer


def preprocess(
    name: str, transformer: ColumnTransformer, features: pd.DataFrame
) -> np.ndarray:
    """Preprocessed features `[N, n_0]`, float64.

    Raises:
      InputError: If numbers are too large to standardize.
    """
    with np.errstate(all="ignore"):
        x = np.asarray(transformer.transform(features), np.float64)
    _check_size(name, transformer, x)
    return x


def _check_size(name: str, transformer: ColumnTransformer, x: Any) -> None:
    usable = (np.abs(x) < MAX_STANDARDIZED).all(axis=0)  # and not NaN
    if not usable.all():
        column = transformer.get_feature_names_out()[np.argmin(usable)]
        raise InputError(f"{name}: column {column!r} is too large to standardize")


def preprocess_all(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Preprocesses all rows together; returns `x [N, n_0]` and `y [N, n_L]`."""
    transformer = fit_preprocessor(table.name, table.features)
    return preprocess(table.name, transformer, table.features), table.y


def split(table: Table, seed: int) -> tuple[dict[str, Split], ColumnTransformer]:
    """Splits rows into 60% train, 20% validation and 20% test, stratified by label.

    Returns:
      The splits by name, and the preprocessor, which is fitted on the training rows.

    Raises:
      InputError: If a label is too rare to occur in every split.
    """
    for column, (name, classes) in enumerate(table.classes.items()):
        counts = [int(np.sum(table.y[:, column] == label)) for label in (0, 1)]
        if min(counts) < MIN_ROWS_PER_LABEL:
            rare = classes[int(np.argmin(counts))]
            raise InputError(
                f"{table.name}: target {name!r} has {min(counts)} rows of {rare}; at "
                f"least {MIN_ROWS_PER_LABEL} are needed for three splits"
            )
    _, group, counts = np.unique(
        table.y, axis=0, return_inverse=True, return_counts=True
    )
    # A rare combination of several targets is grouped with the most common one.
    group = np.where(
        counts[group] < MIN_ROWS_PER_LABEL, np.argmax(counts), group.ravel()
    )
    rows = np.arange(len(table.y))
    rest, test = train_test_split(
        rows, test_size=0.2, stratify=group, random_state=seed
    )
    train, validation = train_test_split(
        rest, test_size=0.25, stratify=group[rest], random_state=seed
    )
    transformer = fit_preprocessor(table.name, table.features.iloc[train])
    chosen_rows = {"train": train, "validation": validation, "test": test}
    return {
        name: Split(
            np.asarray(chosen),
            preprocess(table.name, transformer, table.features.iloc[chosen]),
            table.y[chosen],
        )
        for name, chosen in chosen_rows.items()
    }, transformer
