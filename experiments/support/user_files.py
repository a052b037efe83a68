"""The user's own files: which columns are features, what is refused, what is odd."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from experiments.support import cli, output, schema, table_io
from experiments.support.cli import InputError
from experiments.support.schema import Column, Problem, Schema
from experiments.support.table_io import Format

GIVES_AWAY = 0.999  # ROC AUC of one column alone
FEW = 5  # rows of a label, which a column may separate by chance
SAMPLE = 10_000  # rows
ID = re.compile(r"Unnamed: \d+|index|row ?(names?|id|num(ber)?)|(.*[^a-z])?id", re.I)


class Selection(NamedTuple):
    """Which columns of a file are features, and what they hold.

    Attributes:
      columns: Names of the features; None is all columns.
      drop: Columns to leave out.
      categorical: Columns that hold categories.
      numeric: Columns that hold numbers.
      missing: A value of --missing.
      group: A column of groups; it is a feature only if `columns` names it.
      time: A column of times, likewise.
    """

    columns: Sequence[str] | None = None
    drop: Sequence[str] = ()
    categorical: Sequence[str] = ()
    numeric: Sequence[str] = ()
    missing: str = "impute"
    group: str | None = None
    time: str | None = None


EVERYTHING = Selection()


def load(
    data: str,
    target: list[str],
    positive: str | None,
    fmt: Format,
    selection: Selection,
) -> tuple[
    pd.DataFrame,
    np.ndarray,
    dict[str, tuple[Any, Any]],
    Schema,
    pd.Series | None,
]:
    """Reads features and labels from a file, and warns of what looks wrong.

    Args:
      data: Path of the file.
      target: Columns with the labels.
      positive: The value of label 1, as text; None is the larger one.
      fmt: How the file is written, if it is a text file.
      selection: Which columns are features.

    Returns:
      The fields of a `datasets.Table` from `features` to `schema`, and the column of
      groups or times, if there is one.

    Raises:
      InputError: If the file cannot be read or cannot be learned from.
    """
    # Read the file, and decide what its columns hold.
    raw = table_io.read(Path(data), fmt)
    table_io.need_columns(data, raw, target)
    others = raw.drop(columns=target)
    rest = _select(data, others, selection)
    columns, problems = schema.infer(
        rest, fmt, categorical=selection.categorical, numeric=selection.numeric
    )
    key = _key(data, others, fmt, selection)
    if isinstance(key, Problem):
        problems.append(key)
    y = pd.DataFrame(index=raw.index)
    classes = {}
    for name in target:
        labels = schema.labels(data, pd.Series(raw[name]), fmt, positive)
        if isinstance(labels, Problem):
            problems.append(labels)
        else:
            y[name], classes[name] = labels
    if selection.missing == "error":
        problems += schema.missing_values(rest.loc[y.notna().all(axis=1)], columns, fmt)
    if problems:
        raise _refusal(data, problems, target)

    # Convert the rows that can be used.
    rows = _complete(data, "label", y)
    if isinstance(key, pd.Series):
        rows = _complete(data, repr(key.name), key.loc[rows].to_frame())
    described = Schema(columns, fmt, selection.missing)
    features = schema.features(data, rest.loc[rows], described)
    if selection.missing == "drop":
        features = features.loc[_complete(data, "complete features", features)]
    rows = features.index
    if not len(rows):
        raise InputError(f"{data}: no rows are left without those left out")
    known = y.loc[rows].to_numpy()
    for text in _suspicions(features, known, target, columns):
        table_io.warn(data, text)
    key = key.loc[rows] if isinstance(key, pd.Series) else None
    return features, known, classes, described, key


def load_held_out(
    data: str,
    classes: dict[str, tuple[Any, Any]],
    described: Schema,
    group: pd.Series | None = None,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Reads more rows, as those of the file to train on are read.

    Args:
      data: Path of the file.
      classes: By target, the values of labels 0 and 1.
      described: What the columns hold.
      group: The groups of the file to train on, if there are groups. Those that are
        also in this file are reported.

    Returns:
      Features and labels `[N, n_L]` of the rows that have labels.

    Raises:
      InputError: If the file cannot be read, a column is missing, or a label is new.
    """
    raw = table_io.read(Path(data), described.format)
    names = [column.name for column in described.columns]
    table_io.need_columns(data, raw, [*classes, *names])
    problems = []
    y = pd.DataFrame(index=raw.index)
    for name, values in classes.items():
        column = pd.Series(raw[name])
        y[name] = schema.known_labels(column, values, described.format)
        unknown = schema.unknown_labels(column, values, described.format)
        problems += [] if unknown is None else [unknown]
    if described.missing == "error":
        labeled = raw.loc[y.notna().all(axis=1)]
        problems += schema.missing_values(labeled, described.columns, described.format)
    if problems:
        raise _refusal(data, problems, list(classes))
    rows = _complete(data, "label", y)
    if not len(rows):
        raise InputError(f"{data}: no row has a label of every target")
    if group is not None and group.name in raw:
        name = str(group.name)
        found = _key(data, raw.loc[rows], described.format, Selection(group=name))
        if isinstance(found, pd.Series) and (shared := {*group} & {*found.dropna()}):
            text = f"{len(shared)} values of {name!r} are also in the file to train on"
            table_io.warn(data, text)
    return schema.features(data, raw.loc[rows], described), y.loc[rows].to_numpy()


def _select(data: str, table: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """The columns that are features."""
    keys = [name for name in (selection.group, selection.time) if name is not None]
    named = (*selection.drop, *selection.categorical, *selection.numeric, *keys)
    table_io.need_columns(data, table, (*(selection.columns or ()), *named))
    both = set(selection.categorical) & set(selection.numeric)
    if both:
        raise InputError(f"--categorical and --numeric both name {min(both)!r}")
    chosen = table.columns if selection.columns is None else selection.columns
    left_out = {*selection.drop}
    if selection.columns is None:
        left_out |= {selection.group, selection.time}
    table = table.loc[:, [name for name in chosen if name not in left_out]]
    if table.shape[1] == 0:
        raise InputError(
            f"{data}: no features are left; see --columns, --drop, --group and --time"
        )
    return table


def _refusal(data: str, problems: list[Problem], target: list[str]) -> InputError:
    """All problems of a file as a table."""
    rows = [p._asdict() | {"column": repr(p.column)} for p in problems]
    text = output.table(rows, headings={"first_row": "first row"})
    features = [p.column for p in problems if p.column not in target]
    everything = ""
    if len(features) > 1:
        names = shlex.quote(",".join(features))
        everything = f"\n\nTo leave them all out: --drop={names}"
    return cli.InputTableError(
        f"{data}: cannot use these columns as they are (row 1 is the first below the "
        f"header)\n\n{text}{everything}"
    )


def _key(
    data: str, table: pd.DataFrame, fmt: Format, selection: Selection
) -> pd.Series | Problem | None:
    """The column of groups, as text, or of times, as numbers; None without one."""
    name = selection.time if selection.group is None else selection.group
    if name is None:
        return None
    table = table.loc[:, [name]]
    groups = [name] if selection.time is None else []
    columns, problems = schema.infer(
        table, fmt, categorical=groups, numeric=selection.numeric
    )
    if problems:
        which = "--group" if groups else "--time"
        return problems[0]._replace(remedy=f"another {which}")
    if not groups and columns[0].kind not in ("number", "date"):
        what = f"a {columns[0].kind}; expected numbers or dates"
        return Problem(name, what, len(table), int(table.index[0]), "another --time")
    found = schema.features(data, table, Schema(columns, fmt))
    return found.iloc[:, -1].rename(name)  # of a date, the days since 1970


def _complete(data: str, what: str, table: pd.DataFrame) -> pd.Index:
    """The rows without missing values; warns of the others."""
    is_complete = table.notna().all(axis=1).to_numpy()
    rows = table.index[~is_complete]
    if len(rows):
        text = f"{len(rows)} rows without {what} are left out, such as row {rows[0]}"
        table_io.warn(data, text)
    return table.index[is_complete]


def _suspicions(
    features: pd.DataFrame,
    y: np.ndarray,
    targets: list[str],
    columns: tuple[Column, ...],
) -> Iterator[str]:
    """Warnings of columns that are probably no features, one line per reason."""
    kinds = {column.name: column.kind for column in columns}  # without parts of dates
    remedy = "--drop leaves it out"
    found: dict[str, list[str]] = {}
    for name in map(str, features):
        values: Any = features[name].dropna()
        different, kind = values.nunique(), kinds.get(name)
        if different <= 1:
            if kind is not None:
                found.setdefault("constant, so ignored", []).append(name)
            continue
        if kind == "number" and different == len(values):
            in_sequence = values.min() + len(values) - 1 == values.max()
            if (values % 1 == 0).all() and (in_sequence or ID.fullmatch(name)):
                reason = f"all values are different, as in an index or id; {remedy}"
                found.setdefault(reason, []).append(name)
        if kind == "category" and different > len(values) / 2:
            reason = f"a different category in nearly every row; {remedy}"
            found.setdefault(reason, []).append(name)
            continue
        for target, label in zip(targets, y.T, strict=True):
            if _gives_away(pd.Series(features[name]), label):
                reason = f"alone almost enough to predict {target!r}"
                reason += f", which may be leakage; {remedy}"
                found.setdefault(reason, []).append(name)
    for reason, names in found.items():
        yield f"{table_io.listed(names)}: {reason}"


def _gives_away(values: pd.Series, label: np.ndarray) -> bool:
    """Whether one column orders the rows by their labels."""
    step = len(values) // SAMPLE + 1  # a sample nearly always shows that it does not
    sampled = _auc(values.iloc[::step], label[::step])
    return sampled >= GIVES_AWAY and _auc(values, label) >= GIVES_AWAY


def _auc(values: pd.Series, label: np.ndarray) -> float:
    """ROC AUC of a column, in the better order; a category counts as its mean label."""
    known = values.notna().to_numpy()
    values, label = values.loc[known], label[known]
    ones = int(np.sum(label))
    zeros = len(label) - ones
    if min(zeros, ones) < FEW:
        return 0.5
    if not pd.api.types.is_float_dtype(values):
        by_category = pd.Series(label, values.index).groupby(values)
        values = pd.Series(by_category.transform("mean"))
    # The Mann-Whitney statistic, because scikit-learn takes 5 ms per column.
    ranks = rankdata(values)[label == 1]
    auc = float(ranks.sum() - ones * (ones + 1) / 2) / (zeros * ones)
    return max(auc, 1 - auc)
