"""Which rows are for training, validation and test."""

import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from absl import flags
from sklearn.model_selection import (
    StratifiedGroupKFold,
    StratifiedKFold,
    train_test_split,
)

from experiments.support.cli import InputError

VALIDATION = flags.DEFINE_string(
    "validation",
    None,
    "File with the validation set, in the format of --data. If not set, it is split "
    "off --data.",
)
TEST = flags.DEFINE_string(
    "test",
    None,
    "File with the test set, in the format of --data. If not set, it is split off "
    "--data.",
)
GROUP = flags.DEFINE_string(
    "group",
    None,
    "Column of --data that identifies groups, such as patients; all rows of a group go "
    "into the same split. It is not used as a feature unless --columns names it.",
)
TIME = flags.DEFINE_string(
    "time",
    None,
    "Column of --data with numbers or dates; the latest rows are for testing, those "
    "before them for validation. It is not used as a feature unless --columns names "
    "it.",
)
MIN_ROWS_PER_LABEL = 5  # so that each split has one


def divide(
    name: str,
    y: np.ndarray,
    seed: int,
    *,
    given: Collection[str] = (),
    group: pd.Series | None = None,
    time: pd.Series | None = None,
    cross_validated: bool = False,
) -> dict[str, np.ndarray]:
    """Divides rows 60/20/20 into training, validation and test rows.

    They are drawn at random and stratified by label, also where groups stay together;
    or else the latest are for the test, and those before them for validation.

    Args:
      name: Name of the data in messages.
      y: Labels `[N, n_L]`.
      seed: Seed of the draw.
      given: Splits with rows of their own. The rest keep their proportions.
      group: The group of each row, if groups must stay together.
      time: The time of each row, if the latest are held out. Rows of one time stay
        together.
      cross_validated: Whether the rows for validation stay among those for training.

    Returns:
      Indices of rows by split.

    Raises:
      InputError: If there are too few groups or times.
    """
    stratum = _strata(y)
    train: Any = np.arange(len(y))
    found = {}
    wanted = [split for split in ("test", "validation") if split not in given]
    for done, split in enumerate(wanted):
        if split == "validation" and cross_validated:
            break  # the test has the same rows as without folds
        parts = 3 + len(wanted) - done  # equal ones, of which this split takes one
        if time is not None:
            kept, chosen = _by_time(time.iloc[train], parts, name)
        elif group is not None:
            kept, chosen = _by_group(
                group.iloc[train], stratum[train], parts, seed, name
            )
        else:
            kept, chosen = train_test_split(
                np.arange(len(train)),
                test_size=1 / parts,
                stratify=stratum[train],
                random_state=seed,
            )
        train, found[split] = train[kept], train[chosen]
    return {"train": train, **found}


def assign_folds(
    y: np.ndarray, folds: int, seed: int, group: pd.Series | None = None
) -> np.ndarray:
    """Draws the fold of each row, `[N]`, stratified by label; groups stay together.

    Args:
      y: Labels `[N, n_L]`.
      folds: Number of folds.
      seed: Seed of the draw.
      group: The group of each row, if groups must stay together.

    Raises:
      InputError: If there are too few groups, or rows of each combination of labels.
    """
    if group is not None and group.nunique() < folds:
        raise InputError(
            f"--folds={folds}: only {group.nunique()} groups are outside the test set, "
            f"so at most {group.nunique()} folds"
        )
    splitter = StratifiedKFold if group is None else StratifiedGroupKFold
    stratum, fold = _strata(y), np.zeros(len(y), int)
    try:
        with warnings.catch_warnings(action="ignore"):  # of labels that are rare
            divided = splitter(folds, shuffle=True, random_state=seed).split(
                stratum, stratum, group
            )
            for number, (_, held_out) in enumerate(divided):
                fold[held_out] = number
    except ValueError:
        raise InputError(
            f"--folds={folds}: there are too few rows of a label"
        ) from None
    return fold


def _strata(y: np.ndarray) -> np.ndarray:
    """The combination of labels of each row, `[N]`.

    A rare combination of several targets is grouped with the most common one.
    """
    _, stratum, counts = np.unique(y, axis=0, return_inverse=True, return_counts=True)
    stratum = stratum.ravel()
    return np.where(counts[stratum] < MIN_ROWS_PER_LABEL, np.argmax(counts), stratum)


def _by_group(
    group: pd.Series, stratum: np.ndarray, parts: int, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out groups with about one part of the rows of each stratum."""
    count = group.nunique()
    if count < parts:
        raise InputError(
            f"--group={group.name}: {name} has {count} groups; at least {parts} are "
            "needed"
        )
    folds = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    try:
        with warnings.catch_warnings(action="ignore"):  # of labels that are rare
            found = list(folds.split(stratum, stratum, group))
    except ValueError:
        raise InputError(
            f"--group={group.name}: {name} has too few rows of a label for a split"
        ) from None
    part = len(group) / parts  # the first fold has the group that varies most
    return min(found, key=lambda fold: abs(len(fold[1]) - part))


def _by_time(time: pd.Series, parts: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Holds out the latest times, with as nearly one part of the rows as possible."""
    times, counts = np.unique(time, return_counts=True)
    if len(times) < parts:
        raise InputError(
            f"--time={time.name}: {name} has {len(times)} times; at least {parts} are "
            "needed"
        )
    later = counts[:0:-1].cumsum()[::-1]  # rows after each time but the last
    last = times[np.argmin(np.abs(later - len(time) / parts))]
    return np.flatnonzero(time <= last), np.flatnonzero(time > last)


def sample(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Indices of at most `size` rows, stratified by label, in ascending order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    size = min(size, len(labels))
    return np.sort(order[np.arange(size) * len(labels) // size])
