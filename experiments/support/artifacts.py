"""What a training run leaves behind: its files, and a model that scores new rows."""

import sys
from pathlib import Path
from typing import Any

import jax
import joblib
import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer

import jaxbce
from experiments.support import cli, datasets, output, plots, table_io

NETWORK = "jaxbce"


def predict(params: Any, x: np.ndarray) -> np.ndarray:
    """Probabilities `[N, n_L]` in float64 for prepared features `[N, n_0]`."""
    features = jax.numpy.asarray(x, params[0].w.dtype)
    return np.asarray(jaxbce.predict_proba(params, features), np.float64)


def keep(
    folder: Path,
    result: dict[str, Any],
    table: datasets.Table,
    parts: dict[str, datasets.Part],
    preparation: ColumnTransformer,
    probabilities: dict[str, dict[str, np.ndarray]],
) -> None:
    """Writes what a run has come to, each file whole.

    Args:
      folder: Where to.
      result: What `train.run` returns.
      table: The data.
      parts: Its split.
      preparation: What is fitted on its training part.
      probabilities: Of each model and part, `[n, n_L]`.
    """
    params = jax.tree.map(np.asarray, result["params"])
    with output.replacing(folder / "model.joblib") as path:
        model = {"preparation": preparation, "params": params, "classes": table.classes}
        joblib.dump(model, path)
    document = {key: value for key, value in result.items() if key != "params"}
    output.write(folder, "metrics", document, result["metrics"])
    with output.replacing(folder / "losses.csv") as path:
        pd.DataFrame(result["history"]).to_csv(path, index=False)
    mine = probabilities[NETWORK]
    rows = pd.concat(
        pd.DataFrame({"row": part.rows, "part": name})
        .join(_columns("", table, part.y.astype(int)))
        .join(_columns("probability of ", table, mine[name]))
        for name, part in parts.items()
    )
    with output.replacing(folder / "predictions.csv") as path:
        rows.sort_values("row").to_csv(path, index=False)

    losses = [(row["train loss"], row["validation loss"]) for row in result["history"]]
    steps = np.array([row["step"] for row in result["history"]])
    path = folder / "losses.png"
    plots.losses(path, steps, np.array(losses), result["best_step"])
    for column in range(table.y.shape[1]):
        number = f"_{column + 1}" if table.y.shape[1] > 1 else ""
        plots.roc_and_reliability(
            folder / f"roc_and_reliability{number}.png",
            datasets.label_1(table.classes)[column],
            parts["test"].y[:, column],
            {
                name: by_part["test"][:, column]
                for name, by_part in probabilities.items()
            },
        )
    names = list(table.features.columns)
    if len(names) == 2 and parts["train"].x.shape[1] == 2 and table.y.shape[1] == 1:

        def probability(plane: np.ndarray) -> np.ndarray:
            x = preparation.transform(pd.DataFrame(plane, columns=names))
            return predict(params, np.asarray(x))[:, 0]

        plots.boundary(
            folder / "boundary.png",
            table.features.to_numpy(np.float64),
            table.y[:, 0],
            names,
            probability,
        )


def _columns(what: str, table: Any, values: np.ndarray) -> pd.DataFrame:
    names = [what + target for target in datasets.label_1(table.classes)]
    return pd.DataFrame(values, columns=names)


def score(file: str, folder: Path) -> tuple[int, Path]:
    """Writes the probabilities of new rows, by the model in a folder.

    Args:
      file: A .csv or .parquet file with the columns that the model was trained on.
      folder: What `keep` has written to.

    Returns:
      The number of rows, and the file written. A category that training did not have
      is told on stderr.

    Raises:
      InputError: If there is no model, or the file is not what it needs.
    """
    path = folder / "model.joblib"
    if not path.exists():
        raise cli.InputError(
            f"--output_dir={folder}: has no finished run to score with"
        )
    try:
        model = joblib.load(path)
        preparation, params, classes = (
            model[name] for name in ("preparation", "params", "classes")
        )
    except Exception as error:  # a pickle may raise anything
        reason = type(error).__name__
        raise cli.InputError(f"{path}: cannot be read ({reason})") from error
    table = table_io.read(Path(file))
    names = list(preparation.feature_names_in_)
    table_io.need_columns(file, table, names)
    categories = list(preparation.transformers_[1][2])
    features = table_io.features(file, table.filter(names), categories)
    if categories:
        known = preparation.named_transformers_["categories"].categories_
        for name, values in zip(categories, known, strict=True):
            new = features[name][~features[name].isin(values)]
            if len(new):
                shown = ", ".join(list(dict.fromkeys(new))[:5])
                print(
                    f"{Path(file).name}: {name} is {shown} in {len(new)} rows, not "
                    "seen in training",
                    file=sys.stderr,
                )
    x = datasets.prepared(file, preparation, features)
    found = predict(params, x)
    scored = pd.DataFrame({"row": np.arange(len(x))})
    for column, target in enumerate(datasets.label_1(classes)):
        scored[f"probability of {target}"] = found[:, column]
    target = folder / f"{Path(file).stem}.scored.csv"
    with output.replacing(target) as partial:
        scored.to_csv(partial, index=False)
    return len(x), target
