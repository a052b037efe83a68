"""Data: what ships with scikit-learn, or the user's own file; always checked."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from absl import flags
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

from experiments._cli import InputError

DATASET = flags.DEFINE_enum(
    "dataset",
    None,
    ["digits", "breast_cancer"],
    "Data that ships with scikit-learn; digits (odd against even, 1797 images of 8x8) "
    "if neither this nor --data is given.",
)
DATA = flags.DEFINE_string(
    "data", None, "A .csv or .parquet file to use in place of --dataset."
)
TARGET = flags.DEFINE_string(
    "target",
    None,
    "The column of --data with the labels, of any two values; the larger is label 1. "
    "Every other column is a feature and must be numeric.",
)
HIDDEN = flags.DEFINE_list(
    "hidden", ["32"], "Widths of the hidden layers, comma-separated; '' for none."
)


class Data(NamedTuple):
    """A binary classification problem.

    Attributes:
      name: Where it is from.
      x: Features `[N, n_0]`, float64, standardised (mean 0, variance 1; a constant
        column is 0).
      y: Labels 0 and 1, `[N, 1]`, float64.
    """

    name: str
    x: np.ndarray
    y: np.ndarray


def hidden_sizes() -> tuple[int, ...]:
    """--hidden as integers.

    Raises:
      InputError: If one of them is not an integer >= 1.
    """
    try:
        sizes = tuple(int(n) for n in HIDDEN.value)
    except ValueError:
        sizes = (0,)
    if any(n < 1 for n in sizes):
        raise InputError(
            f"--hidden={','.join(HIDDEN.value)}: widths are integers >= 1, "
            "comma-separated"
        )
    return sizes


def load(
    *,
    dataset: str | None = None,
    data: str | None = None,
    target: str | None = None,
) -> Data:
    """The named dataset, or the file `data` with its labels in column `target`.

    Raises:
      InputError: If the file cannot be read, or holds what cannot be learned from.
    """
    if data is None:
        if target is not None:
            raise InputError("--target goes with --data")
        name = dataset or "digits"
        features, labels = _shipped(name)
    else:
        if dataset is not None:
            raise InputError("--data and --dataset are two answers to one question")
        if target is None:
            raise InputError("--data needs --target, the column with the labels")
        name, (features, labels) = data, _from_file(Path(data), target)
    scaler = StandardScaler()
    with np.errstate(all="ignore"):
        x = np.asarray(scaler.fit_transform(features))
    finite = np.isfinite(x).all(axis=0) & np.isfinite(np.asarray(scaler.var_))
    if not finite.all():
        column = int(np.argmin(finite)) + 1
        raise InputError(f"{name}: feature {column} is too large to standardise")
    return Data(name, x, labels[:, None])


def _shipped(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    loaders = {
        "digits": datasets.load_digits,
        "breast_cancer": datasets.load_breast_cancer,
    }
    features, labels = map(np.asarray, loaders[dataset](return_X_y=True))
    return features, (labels % 2).astype(np.float64)


def _from_file(path: Path, target: str) -> tuple[np.ndarray, np.ndarray]:
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: not a .csv or .parquet file")
    try:
        table = readers[path.suffix.lower()](path)
        if path.suffix.lower() == ".csv":  # where pandas renames a second "a" to "a.1"
            header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0]
            repeated = header[header.duplicated()].tolist()
            if repeated:
                raise InputError(f"{path}: two columns are named {repeated[0]!r}")
    except (OSError, ValueError) as error:  # pandas' and pyarrow's errors are either
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: {reason}") from None
    if target not in table.columns:
        known = ", ".join(map(str, table.columns))
        raise InputError(f"{path}: no column {target!r}; its columns are {known}")
    if table.empty:
        raise InputError(f"{path}: has no rows")
    features = table.drop(columns=target)
    if features.empty:
        raise InputError(f"{path}: has no column beside {target!r}")
    for name in features.columns:
        _check_numeric(path, features[name])
    return features.to_numpy(np.float64), _labels(path, table[target])


def _check_numeric(path: Path, column: pd.Series) -> None:
    if not (
        pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)
    ):
        example = column.dropna().iloc[0] if column.notna().any() else None
        raise InputError(
            f"{path}: column {column.name!r} is not numeric (it has {example!r})"
        )
    values = column.to_numpy(np.float64, na_value=np.nan)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise InputError(
            f"{path}: column {column.name!r} has {values[row]} in row {row + 1} "
            "below the header"
        )


def _labels(path: Path, column: pd.Series) -> np.ndarray:
    if column.isna().any():
        row = int(column.isna().to_numpy().argmax()) + 1
        raise InputError(f"{path}: target {column.name!r} is missing in row {row}")
    values = list(column.unique())
    values.sort(key=str if column.dtype == object else None)
    if len(values) != 2:
        shown = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
        raise InputError(
            f"{path}: target {column.name!r} has the values {shown}; two different "
            "ones are accepted"
        )
    return (column == values[1]).to_numpy(np.float64)
