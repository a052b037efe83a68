"""Datasets: scikit-learn's, generated or the user's own, preprocessed and split."""

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from absl import flags
from sklearn import datasets as sklearn_datasets
from sklearn.compose import ColumnTransformer

from experiments.support import preprocessing, splitting, user_files
from experiments.support.cli import InputError
from experiments.support.schema import Column, Schema
from experiments.support.table_io import PLAIN, Format, warn
from experiments.support.user_files import EVERYTHING, Selection

DATASET = flags.DEFINE_enum(
    "dataset",
    None,
    ["digits", "breast_cancer", "moons", "xor"],
    "A dataset of scikit-learn (breast_cancer; digits, odd against even) or a "
    "generated one (moons, xor). If neither this nor --data is set, digits.",
)
DATA = flags.DEFINE_string(
    "data",
    None,
    "A file to use instead of --dataset: .csv, .tsv or .txt, which may be compressed, "
    "or .parquet.",
)
TARGET = flags.DEFINE_list(
    "target",
    None,
    "Column of --data that holds the labels, which may be any two values. Several "
    "columns, comma-separated, give as many outputs. All other columns are features: "
    "numbers are standardized, text is one-hot encoded, and dates become numbers.",
)
POSITIVE = flags.DEFINE_string(
    "positive",
    None,
    "The value that is label 1, for every --target. Default: the larger one, or the "
    "last one in alphabetical order.",
)
COLUMNS = flags.DEFINE_list(
    "columns", None, "Columns of --data to use as features. If not set, all."
)
DROP = flags.DEFINE_list("drop", [], "Columns of --data to leave out.")
CATEGORICAL = flags.DEFINE_list(
    "categorical",
    [],
    "Columns of --data that hold categories, whatever they look like, such as codes.",
)
NUMERIC = flags.DEFINE_list(
    "numeric",
    [],
    "Columns of --data that hold numbers; cells that are not numbers count as missing.",
)
MISSING = flags.DEFINE_enum(
    "missing",
    "impute",
    ["impute", "indicator", "drop", "error"],
    "What to do about missing values. impute: replace them by the training rows' "
    "median or most frequent category, and where more than 1% are missing, add a "
    "missing-value indicator; indicator: always add it; drop: leave out rows with "
    "missing values, of --data only; error: refuse the file. Rows that --predict "
    "scores are always imputed.",
)
NA_VALUES = flags.DEFINE_list(
    "na_values",
    None,
    "Cells to treat as missing, besides blank ones. Default: pandas's list, such as "
    "NA, None and null. For categories and labels, this replaces the list ('' for "
    "blank cells only); elsewhere it adds to it.",
)
SEPARATOR = flags.DEFINE_string(
    "separator",
    None,
    r"What separates cells, such as ';'; '\t' is a tab and '\s+' any blanks. If not "
    "set, what the first line has, or else a comma.",
)
ENCODING = flags.DEFINE_string(
    "encoding", "utf-8", "Encoding of --data, such as latin-1, if it is a text file."
)
HEADER = flags.DEFINE_bool(
    "header",
    True,
    "Whether the first line of --data names the columns. If not, they are named "
    "column_1, column_2 and so on.",
)
DECIMAL = flags.DEFINE_enum("decimal", ".", [".", ","], "The decimal point of --data.")
THOUSANDS = flags.DEFINE_enum(
    "thousands",
    None,
    [",", ".", " ", "'", "_"],
    "What separates groups of three digits in --data.",
)
FORMAT_FLAGS = {  # fields of `Format`
    "separator": SEPARATOR,
    "encoding": ENCODING,
    "header": HEADER,
    "decimal": DECIMAL,
    "thousands": THOUSANDS,
    "na_values": NA_VALUES,
}
SELECTION_FLAGS = {  # fields of `Selection`
    "columns": COLUMNS,
    "drop": DROP,
    "categorical": CATEGORICAL,
    "numeric": NUMERIC,
    "missing": MISSING,
    "group": splitting.GROUP,
    "time": splitting.TIME,
}
GENERATED_ROWS = 1000


class HeldOut(NamedTuple):
    """The rows of a file for validation or the test.

    Attributes:
      path: Path of the file.
      rows: Indices of its rows in the table, `[n]`.
    """

    path: str
    rows: np.ndarray


class Table(NamedTuple):
    """A binary classification dataset, before preprocessing.

    Attributes:
      name: Name of the dataset or path of the file.
      features: Columns of float64 numbers, or of text if they hold categories, with NaN
        for missing values. The index numbers the rows, those of a file from 1.
      y: Labels 0 and 1, `[N, n_L]`, float64.
      classes: By target, the values that labels 0 and 1 stand for.
      schema: How to read features from another file.
      group: The group of each row, which --group gives.
      time: The time of each row, which --time gives.
      held_out: The last rows of the table, if they come from --validation and --test.
    """

    name: str
    features: pd.DataFrame
    y: np.ndarray
    classes: dict[str, tuple[Any, Any]]
    schema: Schema
    group: pd.Series | None = None
    time: pd.Series | None = None
    held_out: Mapping[str, HeldOut] = MappingProxyType({})


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
    files = {"validation": splitting.VALIDATION, "test": splitting.TEST}
    given = {"target": TARGET, "positive": POSITIVE, **FORMAT_FLAGS, **SELECTION_FLAGS}
    for name, flag in (given | files).items():
        if DATA.value is None and flag.present:
            raise InputError(f"--{name} needs --data")
    chosen = {name: _stripped(flag.value) for name, flag in SELECTION_FLAGS.items()}
    return load(
        dataset=DATASET.value,
        data=DATA.value,
        target=_stripped(TARGET.value),
        positive=POSITIVE.value,
        seed=seed,
        fmt=format_from_flags(),
        selection=Selection(**chosen),
        held_out={n: flag.value for n, flag in files.items() if flag.value is not None},
    )


def _stripped(value: Any) -> Any:
    """The value of a flag; names of columns have no surrounding blanks."""
    if isinstance(value, list):
        return [name.strip() for name in value]
    return value and value.strip()


def format_from_flags(default: Format = PLAIN) -> Format:
    """The format of text files that the flags give, and otherwise `default`.

    Raises:
      InputError: If the flags contradict each other.
    """
    given = {name: f.value for name, f in FORMAT_FLAGS.items() if f.present}
    if "na_values" in given:
        given["na_values"] = tuple(text.strip() for text in given["na_values"])
    fmt = default._replace(**given)
    separator = {r"\t": "\t"}.get(fmt.separator or "", fmt.separator)
    if separator is not None and len(separator) != 1 and separator != r"\s+":
        raise InputError(
            f"--separator={separator}: expected one character, or '\\s+' for any blanks"
        )
    if fmt.thousands == fmt.decimal:
        raise InputError(f"--thousands and --decimal are both {fmt.decimal!r}")
    return fmt._replace(separator=separator)


def load(
    *,
    dataset: str | None = None,
    data: str | None = None,
    target: list[str] | None = None,
    positive: str | None = None,
    seed: int = 0,
    fmt: Format = PLAIN,
    selection: Selection = EVERYTHING,
    held_out: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """Loads a dataset by name, or the user's own file.

    Args:
      dataset: A value of --dataset.
      data: Path of a file.
      target: Columns of `data` with the labels.
      positive: The value of label 1, as text.
      seed: Seed of generated data.
      fmt: How `data` is written, if it is a text file.
      selection: Which of its columns are features.
      held_out: Paths of files with rows for "validation" or "test".

    Raises:
      InputError: If a file cannot be read or cannot be learned from.
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
    if len(set(target)) < len(target):
        raise InputError(f"--target={','.join(target)}: names a column twice")
    if selection.group is not None and selection.time is not None:
        raise InputError("expected --group or --time, got both")
    for name in ("group", "time"):
        if getattr(selection, name) is not None and len(held_out) == 2:
            raise InputError(
                f"--{name} has no effect if --validation and --test are both given"
            )
    x, labels, classes, described, key = user_files.load(
        data, target, positive, fmt, selection
    )
    group, time = (key, None) if selection.time is None else (None, key)
    table = Table(data, x, labels, classes, described, group, time)
    for name, path in held_out.items():
        features, y = user_files.load_held_out(path, table.classes, table.schema, group)
        both = pd.concat([table.features, features])
        repeated = both.duplicated()
        in_both = float(repeated[len(table.y) :].mean())
        if in_both > max(0.1, 2 * float(repeated[: len(table.y)].mean())):
            warn(path, f"{in_both:.0%} of its rows also occur in the other files")
        rows = len(table.y) + np.arange(len(y))
        table = table._replace(
            features=both,
            y=np.concatenate([table.y, y]),
            held_out={**table.held_out, name: HeldOut(path, rows)},
        )
    return table


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
        x, y = bunch.data, bunch.target % 2
        columns = list(map(str, bunch.feature_names))
        classes = {
            "digits": {"digit": ("even", "odd")},
            "breast_cancer": {"diagnosis": ("malignant", "benign")},
        }[name]
    features = pd.DataFrame(np.asarray(x, np.float64), columns=columns)
    described = Schema(tuple(Column(column, "number") for column in columns))
    return Table(name, features, np.asarray(y, np.float64)[:, None], classes, described)


def describe(table: Table) -> dict[str, Any]:
    """The entries for the data in the configuration file."""
    columns = {"group": table.group, "time": table.time}
    return {
        "data": table.name,
        **{name: part.path for name, part in table.held_out.items()},
        "data_digest": digest(table),
        **{n: values.name for n, values in columns.items() if values is not None},
        "classes": table.classes,
    }


def digest(table: Table) -> str:
    """A hash of the content and the kinds of columns, as 16 hexadecimal digits."""
    kinds = repr((table.schema.columns, table.schema.missing))
    hashed = hashlib.sha256((table.features.to_csv(index=False) + kinds).encode())
    hashed.update(table.y.tobytes())
    for values in (table.group, table.time):
        if values is not None:
            hashed.update(values.to_csv(index=False).encode())
    for name, part in table.held_out.items():
        hashed.update(f"{name}: {len(part.rows)}".encode())
    return hashed.hexdigest()[:16]


def preprocess_all(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Preprocesses all rows together; returns `x [N, n_0]` and `y [N, n_L]`."""
    transformer = preprocessing.fit(table.name, table.features, table.schema.missing)
    x = preprocessing.transform(table.name, transformer, table.features)
    return x, table.y


def split(
    table: Table, seed: int, *, cross_validated: bool = False
) -> tuple[dict[str, Split], ColumnTransformer]:
    """Splits rows 60/20/20 into training, validation and test rows.

    See `splitting.divide`. Rows of --validation and --test replace a part of them.

    Args:
      table: The data.
      seed: Seed of the draw.
      cross_validated: Whether there is no split for validation, and its rows are among
        those for training.

    Returns:
      The splits by name, and the preprocessor, which is fitted on the training rows.

    Raises:
      InputError: If a label is too rare to occur in every split.
    """
    count = len(table.y) - sum(len(part.rows) for part in table.held_out.values())
    if len(table.held_out) < 2:
        _check_labels(table.name, table.y[:count], table.classes)
    chosen_rows = splitting.divide(
        table.name,
        table.y[:count],
        seed,
        given=table.held_out,
        group=table.group,
        time=table.time,
        cross_validated=cross_validated,
    ) | {name: part.rows for name, part in table.held_out.items()}
    transformer = preprocessing.fit(
        table.name, table.features.iloc[chosen_rows["train"]], table.schema.missing
    )
    splits = {}
    names = ("train", "test") if cross_validated else ("train", "validation", "test")
    for name in names:
        rows = chosen_rows[name]
        source, features = table.name, table.features.iloc[rows]
        if name in table.held_out:
            source = table.held_out[name].path
            preprocessing.warn_of_new_categories(source, transformer, features)
        x = preprocessing.transform(source, transformer, features)
        splits[name] = Split(rows, x, table.y[rows])
        for target, y in zip(table.classes, splits[name].y.T, strict=True):
            if y.min() == y.max():
                only = table.classes[target][int(y[0])]
                which = "training" if name == "train" else name
                raise InputError(
                    f"{source}: target {target!r} is {only!r} in all {which} rows"
                )
    return splits, transformer


def _check_labels(
    name: str, y: np.ndarray, classes: dict[str, tuple[Any, Any]]
) -> None:
    for column, (target, values) in enumerate(classes.items()):
        counts = [int(np.sum(y[:, column] == label)) for label in (0, 1)]
        if min(counts) < splitting.MIN_ROWS_PER_LABEL:
            rare = values[int(np.argmin(counts))]
            raise InputError(
                f"{name}: target {target!r} has {min(counts)} rows of {rare!r}; at "
                f"least {splitting.MIN_ROWS_PER_LABEL} are needed for three splits"
            )
