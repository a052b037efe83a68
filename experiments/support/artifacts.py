"""The files that a training run writes, and the model that scores new rows."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import joblib
import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.compose import ColumnTransformer

from experiments.support import (
    cli,
    datasets,
    metrics,
    output,
    parsing,
    plots,
    preprocessing,
    schema,
    table_io,
)

NETWORK = "jaxbce"


def save(
    folder: Path,
    result: dict[str, Any],
    table: datasets.Table,
    splits: dict[str, datasets.Split],
    preprocessor: ColumnTransformer,
    logits: dict[str, dict[str, np.ndarray]],
) -> None:
    """Writes the files of a training run: model, metrics, predictions and pictures.

    Args:
      folder: The folder to write to.
      result: What `train.run` or `train.cross_validate` returns.
      table: The data.
      splits: Its splits.
      preprocessor: The preprocessor, fitted on the training rows.
      logits: Logits of label 1 by model and split, `[n, n_L]`, float64.
    """
    model = save_model(
        folder,
        table,
        preprocessor,
        params=result["params"],
        pos_weight=result["configuration"]["pos_weight"],
        thresholds=result["thresholds"],
    )
    document = {key: value for key, value in result.items() if key != "params"}
    output.write_results(folder, "metrics", document, result["metrics"])
    tables = {"losses": "history", "decisions": "decisions", "folds": "folds"}
    for name, key in tables.items():
        if key not in result:
            continue
        with output.atomic_write(folder / f"{name}.csv") as path:
            pd.DataFrame(result[key]).to_csv(path, index=False)
    with output.atomic_write(folder / "predictions.csv") as path:
        rows = _predictions(table, splits, logits[NETWORK], model["pos_weight"])
        rows.to_csv(path, index=False)
    importances = metrics.permutation_importances(
        preprocessor,
        lambda x: _logits(model, x),
        preprocessing.mask_too_large(
            preprocessor, table.features.iloc[splits["test"].rows]
        ),
        splits["test"].y,
        result["configuration"]["seed"],
    )
    with output.atomic_write(folder / "importances.csv") as path:
        importances.to_csv(path, index=False)
    plots.importances(folder / "importances.png", importances)
    _draw(folder, result, table, splits, logits)
    _draw_boundary(folder, table, splits, model)


def save_model(
    folder: Path,
    table: datasets.Table,
    preprocessor: ColumnTransformer,
    *,
    params: Any,
    pos_weight: tuple[float, ...],
    thresholds: list[float],
) -> dict[str, Any]:
    """Writes `model.joblib`, with which `score` scores new rows.

    Args:
      folder: The folder to write to.
      table: The data.
      preprocessor: The preprocessor, fitted on the training rows.
      params: The network's parameters.
      pos_weight: The weights of label 1 that it was trained with, one per output.
      thresholds: Its own thresholds, as logits, likewise.

    Returns:
      The model.
    """
    model = {
        "schema": table.schema,
        "preprocessor": preprocessor,
        "params": jax.tree.map(np.asarray, params),
        "classes": table.classes,
        "pos_weight": pos_weight,
        "thresholds": thresholds,
    }
    with output.atomic_write(folder / "model.joblib") as path:
        joblib.dump(model, path)
    return model


def _logits(model: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Logits `[N, n_L]` of preprocessed features, corrected for the `pos_weight`."""
    shift = metrics.prior_shift(model["pos_weight"])
    return metrics.logits(model["params"], x) - shift


def _predictions(
    table: datasets.Table,
    splits: dict[str, datasets.Split],
    logits: dict[str, np.ndarray],
    pos_weight: tuple[float, ...],
) -> pd.DataFrame:
    """Label, logit and probability of every row of the table, in the table's order."""
    rows = pd.concat(
        pd.DataFrame({"row": table.features.index[split.rows], "split": name})
        .join(_columns("", table.classes, split.y.astype(int)))
        .join(_scores(table.classes, logits[name], pos_weight))
        for name, split in splits.items()
    )
    positions = np.concatenate([split.rows for split in splits.values()])
    return rows.iloc[np.argsort(positions)]


def _scores(
    classes: dict[str, tuple[Any, Any]],
    logits: np.ndarray,
    pos_weight: tuple[float, ...],
) -> pd.DataFrame:
    """Columns for logits `[N, n_L]` and probabilities, corrected for `pos_weight`."""
    columns = {"logit of ": logits, "probability of ": expit(logits)}
    shift = metrics.prior_shift(pos_weight)
    if shift.any():
        columns["uncorrected logit of "] = logits + shift
    return pd.concat([_columns(k, classes, v) for k, v in columns.items()], axis=1)


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
    logits: dict[str, dict[str, np.ndarray]],
) -> None:
    """Draws the losses, if there is one network, and the curves of each target."""
    if "history" in result:
        history = pd.DataFrame(result["history"])
        plots.losses(
            folder / "losses.png",
            history["step"].to_numpy(),
            history[["train_loss", "validation_loss"]].to_numpy(),
            result["best_step"],
        )
    for column, target in enumerate(datasets.label_1(table.classes)):
        number = f"_{column + 1}" if len(table.classes) > 1 else ""
        plots.curves(
            folder / f"curves{number}.png",
            target,
            splits["test"].y[:, column],
            {name: by_split["test"][:, column] for name, by_split in logits.items()},
        )


def _draw_boundary(
    folder: Path,
    table: datasets.Table,
    splits: dict[str, datasets.Split],
    model: dict[str, Any],
) -> None:
    """Draws the probability over the plane of two features, for one target only."""
    names = list(table.features.columns)
    kept = preprocessing.mask_too_large(model["preprocessor"], table.features)
    numbers = kept.select_dtypes(float).dropna()
    is_plane = numbers.shape[1] == len(names) == splits["test"].x.shape[1] == 2
    if not is_plane or table.y.shape[1] != 1:
        return

    def probability(plane: np.ndarray) -> np.ndarray:
        x = model["preprocessor"].transform(pd.DataFrame(plane, columns=names))
        return expit(_logits(model, np.asarray(x))[:, 0])

    plots.boundary(
        folder / "boundary.png",
        numbers.to_numpy(),
        table.y[kept.notna().all(axis=1), 0],
        names,
        probability,
    )


class Scored(NamedTuple):
    """Result of scoring the rows of a file.

    Attributes:
      rows: Their number.
      path: The file written.
      labeled: Number of rows with a known label of every target.
      metrics: Metrics of those rows, as `metrics.table` returns them; empty if there
        are none.
      decisions: Decisions on them, as `metrics.decision_table` returns them.
    """

    rows: int
    path: Path
    labeled: int
    metrics: list[dict[str, Any]]
    decisions: list[dict[str, Any]]


def score(file: str, folder: Path, keep: list[str] | None = None) -> Scored:
    """Scores the rows of a file with the model in a folder, and writes the result.

    Columns are read as training read its own. Categories that did not occur in training
    and cells that cannot be read are reported on stderr.

    Args:
      file: A file with the columns that the model was trained on.
      folder: A folder that `save_model` has written to.
      keep: Columns of the file to keep beside the scores; None keeps all.

    Raises:
      InputError: If there is no model, or the file does not fit it.
    """
    model = _load(folder)
    preprocessor, described = model["preprocessor"], model["schema"]
    fmt = datasets.format_from_flags(described.format)
    described = described._replace(format=fmt)
    table = table_io.read(Path(file), fmt)
    names = [column.name for column in described.columns]
    table_io.need_columns(file, table, [*(keep or []), *names])
    features = schema.features(file, table, described)
    preprocessing.warn_of_new_categories(file, preprocessor, features)
    logits = _logits(model, preprocessing.transform(file, preprocessor, features))
    path = folder / f"{table_io.stem(file)}.scored.csv"
    with output.atomic_write(path) as partial:
        _scored(table, keep, model, logits).to_csv(partial, index=False)
    return Scored(len(table), path, *_evaluate(file, table, fmt, model, logits))


def _scored(
    table: pd.DataFrame,
    keep: list[str] | None,
    model: dict[str, Any],
    logits: np.ndarray,
) -> pd.DataFrame:
    """Columns of the user's table, and the scores and decisions for its rows."""
    scores = _scores(model["classes"], logits, model["pos_weight"])
    for column, (name, classes) in enumerate(model["classes"].items()):
        decided = (logits[:, column] > 0).astype(int)
        scores[f"predicted {name}"] = np.array(classes, dtype=object)[decided]
    kept = table if keep is None else table[keep]
    kept = kept.drop(columns=scores.columns, errors="ignore")  # of an earlier score
    # As text, because pandas cannot write all dates that a Parquet file may have.
    texts = {n: parsing.text(parsing.cells(pd.Series(kept[n]))) for n in kept}
    kept = pd.DataFrame({n: text.to_pylist() for n, text in texts.items()}, table.index)
    if "row" not in kept:
        kept.insert(0, "row", table.index)
    return pd.concat([kept.reset_index(drop=True), scores], axis=1)


def _evaluate(
    file: str,
    table: pd.DataFrame,
    fmt: table_io.Format,
    model: dict[str, Any],
    logits: np.ndarray,
) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
    """The number of rows with labels, and the metrics and decisions of these rows."""
    if not set(model["classes"]) <= set(table.columns):
        return 0, [], []
    labels = []
    for name, classes in model["classes"].items():
        column = pd.Series(table[name])
        labels.append(schema.known_labels(column, classes, fmt))
        if (unknown := schema.unknown_labels(column, classes, fmt)) is not None:
            text = f"{name!r}: {unknown.problem}; {unknown.rows} rows are not evaluated"
            table_io.warn(file, text)
    y = np.stack(labels, axis=1)
    rows = np.flatnonzero(np.isfinite(y).all(axis=1))
    if not len(rows):
        return 0, [], []
    name = Path(file).name
    splits = {name: datasets.Split(rows, np.zeros((len(rows), 0)), y[rows])}
    of_network = {NETWORK: {name: logits[rows]}}
    thresholds = {NETWORK: model["thresholds"]}
    targets = list(model["classes"])
    return (
        len(rows),
        metrics.table(splits, targets, of_network),
        metrics.decision_table(splits, targets, of_network, thresholds),
    )


def _load(folder: Path) -> dict[str, Any]:
    """Loads the model in a folder, as `save_model` has written it."""
    path = folder / "model.joblib"
    if not path.exists():
        raise cli.InputError(f"--output_dir={folder}: has no model of a finished run")
    try:
        model = joblib.load(path)
    except Exception as error:  # a pickle may raise anything
        reason = type(error).__name__
        raise cli.InputError(f"{path}: cannot be read ({reason})") from error
    keys = ("schema", "preprocessor", "params", "classes", "pos_weight", "thresholds")
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
            f"{path}: is not a model of this version of these experiments; train again"
        )
    return model
