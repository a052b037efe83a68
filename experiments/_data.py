"""Data: what ships with scikit-learn, or the user's own file; always checked."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

from experiments._cli import InputError


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


def load(
    *, dataset: str = "digits", data: str | None = None, target: str | None = None
) -> Data:
    """The named dataset, or the file `data` with its labels in column `target`.

    Raises:
      InputError: If the file cannot be read, or holds what cannot be learned from.
    """
    if data is None:
        if target is not None:
            raise InputError("--target goes with --data")
        name, (features, labels) = dataset, _shipped(dataset)
    else:
        if target is None:
            raise InputError("--data needs --target, the column with the labels")
        name, (features, labels) = data, _from_file(Path(data), target)
    x = np.asarray(StandardScaler().fit_transform(features))
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
    if path.suffix not in readers:
        raise InputError(f"{path}: not a .csv or .parquet file")
    try:
        table = readers[path.suffix](path)
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
            f"{path}: column {column.name!r} has {values[row]} in row {row + 1}"
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
            f"{path}: target {column.name!r} has {len(values)} distinct values "
            f"({shown}); 2 are accepted"
        )
    return (column == values[1]).to_numpy(np.float64)
