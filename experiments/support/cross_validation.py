"""Cross-validation: networks of which each holds out one fold of the rows.

All networks have the same features, so that one program trains those of all folds. For
this, the preprocessor is fitted on the rows of all folds together.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.compose import ColumnTransformer

from experiments.support import artifacts, datasets, metrics, splitting
from experiments.support.cli import InputError
from experiments.support.datasets import Split


def split(
    table: datasets.Table, seed: int, folds: int
) -> tuple[dict[str, Split], ColumnTransformer, np.ndarray]:
    """Splits rows 80/20 into training and test rows, and the former into folds.

    The test has the same rows as without folds.

    Returns:
      The splits "train" and "test", the preprocessor, which is fitted on the training
      rows, and the fold of each training row, `[N]`.

    Raises:
      InputError: If the data cannot be divided like this.
    """
    if table.time is not None:
        raise InputError(
            f"--folds={folds}: cannot be used with --time, because most folds would be "
            "earlier than rows that are trained on"
        )
    if "validation" in table.held_out:
        raise InputError(
            f"--folds={folds}: cannot be used with --validation, because each row is "
            "held out once"
        )
    splits, preprocessor = datasets.split(table, seed, cross_validated=True)
    train = splits["train"]
    for (target, values), labels in zip(table.classes.items(), train.y.T, strict=True):
        for label, value in enumerate(values):
            count = int(np.sum(labels == label))
            if count < folds:
                raise InputError(
                    f"--folds={folds}: target {target!r} has {count} rows of {value!r} "
                    "that are not for the test"
                )
    group = None if table.group is None else table.group.iloc[train.rows]
    fold = splitting.assign_folds(train.y, folds, seed, group)
    for target, labels in zip(table.classes, train.y.T, strict=True):
        if any(len({*labels[fold == k]}) < 2 for k in range(folds)):
            raise InputError(
                f"--folds={folds}: a fold has only one label of target {target!r}; "
                "use fewer folds"
            )
    return splits, preprocessor, fold


def train_rows(fold: np.ndarray) -> int:
    """Number of rows that the network with the largest fold is trained on."""
    return len(fold) - int(np.bincount(fold).max())


def weigh(fold: np.ndarray) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """`make_sample_weight` for `jaxbce.sweep`, of a hyperparameter "fold"."""
    fold_of_row = np.asarray(fold, np.int32)
    return lambda hp: jnp.asarray(fold_of_row) != hp["fold"]


def held_out(split: Split, chosen: np.ndarray) -> Split:
    """The rows of a split that are chosen by booleans `[n]`."""
    return Split(*(part[chosen] for part in split))


def held_out_logits(params: Any, x: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Logits `[N, n_L]` of examples, by the networks that held them out.

    Args:
      params: Parameters, leaves `[folds, ...]`. If a fold has several networks, the
        logits are those of their mean probability.
      x: Features of the examples, `[N, n_0]`.
      fold: Their folds, `[N]`.
    """
    result = np.empty((len(x), params[-1].b.shape[-1]))
    for k in range(params[-1].b.shape[0]):
        of_fold = jax.tree.map(lambda leaf, k=k: leaf[k], params)
        result[fold == k] = metrics.logits(of_fold, x[fold == k])
    return result


def predict(
    params: Any,
    splits: dict[str, Split],
    fold: np.ndarray,
    pos_weight: tuple[float, ...],
) -> tuple[dict[str, Split], dict[str, dict[str, np.ndarray]]]:
    """Predictions of rows by the networks that were not trained on them.

    Args:
      params: Parameters, leaves `[folds, ...]`.
      splits: What `split` returns.
      fold: Likewise.
      pos_weight: Weight of label 1 that the networks were trained with, one per output.

    Returns:
      The splits "validation", whose rows are those of all folds, and "test"; and the
      logits by model and split, `[n, n_L]`, corrected for `pos_weight`. Those of a fold
      are by the networks that held it out, those of the test by all networks.
    """
    shift = metrics.prior_shift(pos_weight)
    validation, test = splits["train"], splits["test"]
    logits = {
        "validation": held_out_logits(params, validation.x, fold) - shift,
        "test": metrics.logits(params, test.x) - shift,
    }
    return {"validation": validation, "test": test}, {artifacts.NETWORK: logits}
