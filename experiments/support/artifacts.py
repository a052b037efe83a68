"""The files that a training run writes, and the model that scores new rows."""

from pathlib import Path
from typing import Any

import jax
import joblib
import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer

import jaxbce
from experiments.support import (
    cli,
    datasets,
    output,
    plots,
    preprocessing,
    schema,
    table_io,
)

NETWORK = "jaxbce"


def predict(params: Any, x: np.ndarray) -> np.ndarray:
    """Probabilities `[N, n_L]` in float64 for preprocessed features `[N, n_0]`."""
    features = jax.numpy.asarray(x, params[0].w.dtype)
    return np.asarray(jaxbce.predict_proba(params, features), np.float64)


def save(
    folder: Path,
    result: dict[str, Any],
    table: datasets.Table,
    splits: dict[str, datasets.Split],
    preprocessor: ColumnTransformer,
    probabilities: dict[str, dict[str, np.ndarray]],
) -> None:
    """Writes the model, the metrics, the predictions and the pictures.

    Args:
      folder: The folder to write to.
      result: What `train.run` returns.
      table: The data.
      splits: Its splits.
      preprocessor: The preprocessor, fitted on the training rows.
      probabilities: Probabilities of label 1 by model and split, `[n, n_L]`.
    """
    params = jax.tree.map(np.asarray, result["params"])
    with output.atomic_write(folder / "model.joblib") as path:
        joblib.dump(
            {
                "schema": table.schema,
                "preprocessor": preprocessor,
                "params": params,
                "classes": table.classes,
            },
            path,
        )
    document = {key: value for key, value in result.items() if key != "params"}
    output.write_results(folder, "metrics", document, result["metrics"])
    with output.atomic_write(folder / "losses.csv") as path:
        pd.DataFrame(result["history"]).to_csv(path, index=False)
    with output.atomic_write(folder / "predictions.csv") as path:
        _predictions(table, splits, probabilities[NETWORK]).to_csv(path, index=False)
    _draw(folder, result, table, splits, probabilities)
    _draw_boundary(folder, table, splits, preprocessor, params)


def _predictions(
    table: datasets.Table,
    splits: dict[str, datasets.Split],
    probability: dict[str, np.ndarray],
) -> pd.DataFrame:
    """Label and probability of every row of the table, in the table's order."""
    rows = pd.concat(
        pd.DataFrame({"row": table.features.index[split.rows], "split": name})
        .join(_columns("", table.classes, split.y.astype(int)))
        .join(_columns("probability of ", table.classes, probability[name]))
        for name, split in splits.items()
    )
    return rows.sort_values("row")


def _columns(
    prefix: str, classes: dict[str, tuple[Any, Any]], values: np.ndarray
) -> pd.DataFrame:
    names = [prefix + target for target in datasets.label_1(classes)]
    return pd.DataFrame(values, columns=names)


def _draw(
    folder: Path,
    result: dict[str, Any],
    table: datasets.Table,
    splits: dict[str, datasets.Split],
    probabilities: dict[str, dict[str, np.ndarray]],
) -> None:
    """Draws the losses, and the ROC curve and reliability of each target."""
    history = pd.DataFrame(result["history"])
    plots.losses(
        folder / "losses.png",
        history["step"].to_numpy(),
        history[["train_loss", "validation_loss"]].to_numpy(),
        result["best_step"],
    )
    for column, target in enumerate(datasets.label_1(table.classes)):
        number = f"_{column + 1}" if len(table.classes) > 1 else ""
        plots.roc_and_reliability(
            folder / f"roc_and_reliability{number}.png",
            target,
            splits["test"].y[:, column],
            {
                name: by_split["test"][:, column]
                for name, by_split in probabilities.items()
            },
        )


def _draw_boundary(
    folder: Path,
    table: datasets.Table,
    splits: dict[str, datasets.Split],
    preprocessor: ColumnTransformer,
    params: Any,
) -> None:
    """Draws the probability over the plane of two features, for one target only."""
    names = list(table.features.columns)
    numbers = table.features.select_dtypes(float).dropna()
    is_plane = numbers.shape[1] == len(names) == splits["train"].x.shape[1] == 2
    if not is_plane or table.y.shape[1] != 1:
        return

    def probability(plane: np.ndarray) -> np.ndarray:
        x = preprocessor.transform(pd.DataFrame(plane, columns=names))
        return predict(params, np.asarray(x))[:, 0]

    plots.boundary(
        folder / "boundary.png",
        numbers.to_numpy(),
        table.y[table.features.notna().all(axis=1), 0],
        names,
        probability,
    )


def score(file: str, folder: Path) -> tuple[int, Path]:
    """Scores the rows of a file with the model in a folder, and writes the result.

    Columns are read as training read its own. Categories that did not occur in training
    and cells that cannot be read are reported on stderr.

    Args:
      file: A file with the columns that the model was trained on.
      folder: A folder that `save` has written to.

    Returns:
      The number of rows, and the path of the file written.

    Raises:
      InputError: If there is no model, or the file does not fit it.
    """
    described, preprocessor, params, classes = _load(folder)
    fmt = datasets.format_from_flags(described.format)
    described = described._replace(format=fmt)
    table = table_io.read(Path(file), fmt)
    table_io.need_columns(file, table, [column.name for column in described.columns])
    features = schema.features(file, table, described)
    _report_new_categories(file, features, preprocessor)
    x = preprocessing.transform(file, preprocessor, features)
    probability = _columns("probability of ", classes, predict(params, x))
    probability.insert(0, "row", table.index)
    path = folder / f"{table_io.stem(file)}.scored.csv"
    with output.atomic_write(path) as partial:
        probability.to_csv(partial, index=False)
    return len(x), path


def _load(
    folder: Path,
) -> tuple[schema.Schema, ColumnTransformer, Any, dict[str, tuple[Any, Any]]]:
    """Loads the schema, preprocessor, parameters and classes of a model."""
    path = folder / "model.joblib"
    if not path.exists():
        raise cli.InputError(
            f"--output_dir={folder}: has no finished run to score with"
        )
    try:
        model = joblib.load(path)
    except Exception as error:  # a pickle may raise anything
        reason = type(error).__name__
        raise cli.InputError(f"{path}: cannot be read ({reason})") from error
    keys = ("schema", "preprocessor", "params", "classes")
    if not (
        isinstance(model, dict)
        and set(keys) <= set(model)
        and isinstance(model["schema"], schema.Schema)
        and isinstance(model["preprocessor"], ColumnTransformer)
        and isinstance(model["params"], tuple)
        and model["params"]
        and model["classes"]
    ):
        raise cli.InputError(
            f"{path}: is not a model of this version of experiments.train; train again"
        )
    described, preprocessor, params, classes = (model[key] for key in keys)
    return described, preprocessor, params, classes


def _report_new_categories(
    file: str, features: pd.DataFrame, preprocessor: ColumnTransformer
) -> None:
    for name, known in preprocessing.categories(preprocessor).items():
        values = features[name].dropna()
        new = values[~values.isin(list(known))]
        if len(new):
            shown = table_io.listed(dict.fromkeys(new))
            text = f"{name!r} is {shown} in {len(new)} rows, not seen in training"
            table_io.warn(file, text)
