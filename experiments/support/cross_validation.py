"""Cross-validation, with one network per fold that it holds out.

All networks have the same features, so one program trains the networks of all folds.
The preprocessor is therefore fitted on the rows of all folds together.
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
    """Splits rows 80/20 into training and test rows, and the training rows into folds.

    The test set is the same as without folds.

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
                    f"outside the test set, so at most {count} folds"
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


def num_train_rows(fold: np.ndarray) -> int:
    """Number of training rows of the network that holds out the largest fold."""
    return len(fold) - int(np.bincount(fold).max())


def leave_out_fold(fold: np.ndarray) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """Returns the `make_sample_weight` of `jaxbce.sweep` that leaves out a fold.

    It gives weight 0 to the fold `hp["fold"]`.
    """
    fold_of_row = np.asarray(fold, np.int32)
    return lambda hp: jnp.asarray(fold_of_row) != hp["fold"]


def select_rows(split: Split, is_chosen: np.ndarray) -> Split:
    """The rows of a split that are chosen by booleans `[n]`."""
    return Split(*(part[is_chosen] for part in split))


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
      fold: The fold of each training row, `[N]`.
      pos_weight: Weight of label 1 that the networks were trained with, one per output.

    Returns:
      The splits "validation", whose rows are those of all folds, and "test"; and the
      logits by model and split, `[n, n_L]`, corrected for `pos_weight`. Validation
      logits come from the network that held out the row, test logits from the ensemble.
    """
    shift = metrics.prior_shift(pos_weight)
    validation, test = splits["train"], splits["test"]
    logits = {
        "validation": held_out_logits(params, validation.x, fold) - shift,
        "test": metrics.logits(params, test.x) - shift,
    }
    return {"validation": validation, "test": test}, {artifacts.NETWORK: logits}
