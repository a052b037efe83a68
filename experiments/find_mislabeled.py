r"""Which training labels are wrong?

    python -m experiments.find_mislabeled
    python -m experiments.find_mislabeled --data mine.csv --target label \
        --output_dir results

Every row is scored by --seeds networks, trained by jaxbce.sweep on the other folds:
by EL2N and GraNd (jaxbce.per_example.scores), self-influence (GraNd squared, what
TracIn says of a row and itself) and the loss, means over the networks. With
--flip_fraction that share of labels, drawn at random, is flipped beforehand, and the
table says how well each score finds them, beside chance, the norm of the input, and
cleanlab's confident learning on the same folds and networks where it is installed.
Expect a ROC AUC on digits of about 0.99 for EL2N and the loss.

Features are standardised over all rows, labels unseen; a row that is repeated may
have its double in another fold. Without flips (--data's default) the rows are ranked
as they are. Either way suspicious.csv in --output_dir has all rows, the most
suspicious first.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

import jaxbce
from experiments.support import chunked_fit, cli, datasets, optimizers, output, plots
from jaxbce import per_example

for _module in (datasets, optimizers):
    flags.adopt_module_key_flags(_module)
_NAMES = ("batch_size", "cpu_devices", "dtype", "num_steps", "seeds")
for _name in cli.COMMON + _NAMES:
    flags.declare_key_flag(_name)
_FLIP_FRACTION = flags.DEFINE_float(
    "flip_fraction",
    None,
    "Share of labels to flip, 0 for none. If not set, 0.05, or 0 with --data.",
    lower_bound=0.0,
    upper_bound=0.5,
)
_FOLDS = flags.DEFINE_integer(
    "folds",
    5,
    "Parts of the rows; each is scored by networks trained on the others.",
    2,
)
_RANK_BY = flags.DEFINE_enum(
    "rank_by",
    "EL2N",
    ["EL2N", "GraNd", "self-influence", "loss"],
    "The score that suspicious.csv and the picture are ordered by.",
)

NUM_STEPS, SEEDS, SHOWN = 400, 10, 10
IMAGES = {"digits": (8, 8)}  # the shape of a row that is a picture

Row = dict[str, Any]


def run(
    *,
    table: datasets.Table,
    flip_fraction: float = 0.0,
    folds: int = 5,
    seeds: int = SEEDS,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    batch_size: int | None = 32,
    hidden: tuple[int, ...] = (32,),
    optimizer: str = "adam",
    optimizer_args: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    schedule: str = "constant",
    weight_decay: float = 0.001,
    rank_by: str = "EL2N",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Scores every row by networks that have not seen it.

    Args:
      table: The data, of one target.
      flip_fraction: Share of labels to flip beforehand.
      folds: Parts of the rows.
      seeds: Networks a fold.
      seed: Of flips, folds and networks.
      num_steps: Steps to train for.
      batch_size: Rows in a batch; None is all of them.
      hidden: Widths of the hidden layers.
      optimizer: A name in optax or optax.contrib.
      optimizer_args: Its arguments.
      learning_rate: Its learning rate; None is its default, or 0.003.
      schedule: "constant", "cosine", "warmup-cosine" or "exponential".
      weight_decay: The optimizer's own, or of the objective.
      rank_by: The score to order rows by.
      dtype: "float64", "float32" or "bfloat16".

    Returns:
      "configuration"; "rows", a table of all rows, the most suspicious first;
      "found", if labels were flipped, a row for each score; "confident learning", what
      cleanlab marks, or None where it is not installed.

    Raises:
      InputError: If something asked for cannot be done.
    """
    if table.y.shape[1] != 1:
        raise cli.InputError("--target: one target can be searched, not several")
    x, y = datasets.whole(table)
    n = len(y)
    rng = np.random.default_rng(seed)
    flipped = np.zeros(n, bool)
    flipped[rng.choice(n, round(flip_fraction * n), replace=False)] = True
    given = np.where(flipped, 1 - y[:, 0], y[:, 0])
    if flip_fraction > 0 and not flipped.any():
        raise cli.InputError(
            f"--flip_fraction={flip_fraction}: flips none of {n} labels"
        )
    if min(given.sum(), n - given.sum()) < folds:
        raise cli.InputError(f"--folds={folds}: a label has fewer rows than that")
    least = n - -(-n // folds)  # rows that a fold's networks are trained on
    if batch_size is not None and batch_size > least:
        raise cli.InputError(
            f"--batch_size={batch_size}: {table.name} has {least} rows to train on"
        )
    make_optimizer = optimizers.family(
        optimizer,
        swept=(),
        learning_rate=learning_rate,
        schedule=schedule,
        num_steps=num_steps,
        weight_decay=weight_decay,
        args=tuple((optimizer_args or {}).items()),
    )
    scores = {
        name: np.zeros(n)
        for name in ("EL2N", "GraNd", "self-influence", "loss", "input norm")
    }
    probability = np.zeros(n)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, given)
    with jax.enable_x64(dtype == "float64"):
        for fold, (others, held) in enumerate(
            tqdm(list(split), unit="fold", disable=None)
        ):
            networks = jaxbce.sweep(
                jax.random.fold_in(jax.random.key(seed), fold),
                jnp.asarray(x[others], dtype),
                jnp.asarray(given[others, None], dtype),
                hidden=hidden,
                make_optimizer=make_optimizer,
                hparams={},
                num_seeds=seeds,
                num_steps=num_steps,
                batch_size=batch_size,
                dtype=dtype,
            )
            if (networks.diverged_at >= 0).any():
                raise cli.InputError(
                    "networks diverged; a smaller --learning_rate may help"
                )
            params = jax.tree.map(lambda leaf: leaf[0], networks.params)
            rows = jnp.asarray(x[held], dtype), jnp.asarray(given[held, None], dtype)
            of_fold, y_hat = _score(params, *rows)
            probability[held] = y_hat
            for name, values in of_fold.items():
                scores[name][held] = values
    ranked = _ranking(table, given, flipped, probability, scores, rank_by)
    quality = _confident_learning(given, probability)
    found = []
    if flipped.any():
        searched = {**scores}
        if quality is not None:
            searched["cleanlab, confident learning"] = quality["score"]
        found = [
            {"score": name, **_search(flipped, values)}
            for name, values in searched.items()
        ]
        found.append(
            {"score": "chance", "ROC AUC": 0.5, "precision": float(flipped.mean())}
        )
    return {
        "configuration": {
            "data": table.name,
            "data_digest": datasets.digest(table),
            "classes": table.classes,
            "rows": n,
            "flipped": int(flipped.sum()),
            "folds": folds,
            "seeds": seeds,
            "seed": seed,
            "num_steps": num_steps,
            "batch_size": batch_size,
            "hidden": hidden,
            "optimizer": optimizer,
            "optimizer_args": optimizer_args or {},
            "learning_rate": learning_rate,
            "schedule": schedule,
            "weight_decay": weight_decay,
            "rank_by": rank_by,
            "dtype": dtype,
        },
        "rows": ranked,
        "found": found,
        "confident learning": None if quality is None else _marked(quality, flipped),
    }


@jax.jit
def _score(params: Any, x: jax.Array, y: jax.Array) -> tuple[dict[str, Any], Any]:
    """Means over networks, each `[N]`, and the mean probability of label 1."""
    scores = jax.vmap(per_example.scores, (0, None, None))(params, x, y)
    a = jax.vmap(jaxbce.logits, (0, None))(params, x)[:, :, 0]  # [networks, N]
    ell = jaxbce.bce_with_logits(a, jnp.broadcast_to(y[:, 0], a.shape))
    each = {
        "EL2N": scores.el2n,
        "GraNd": scores.grand,
        "self-influence": jnp.square(scores.grand),
        "loss": ell,
        "input norm": scores.input_norm,
    }
    means = {name: jnp.mean(values, axis=0) for name, values in each.items()}
    return means, jnp.mean(jax.nn.sigmoid(a), axis=0)


def _ranking(
    table: datasets.Table,
    given: np.ndarray,
    flipped: np.ndarray,
    probability: np.ndarray,
    scores: dict[str, np.ndarray],
    rank_by: str,
) -> pd.DataFrame:
    """All rows, the most suspicious first."""
    ((target, classes),) = table.classes.items()
    labels = np.array([f"{target}={value}" for value in classes])[given.astype(int)]
    rows = pd.DataFrame({"row": np.arange(len(given)), "label": labels})
    rows["probability of label"] = np.where(given == 1, probability, 1 - probability)
    rows = rows.assign(**scores).drop(columns="input norm")
    if flipped.any():
        rows["flipped"] = flipped
    return rows.sort_values(rank_by, ascending=False, kind="stable", ignore_index=True)


def _search(wrong: np.ndarray, score: np.ndarray) -> Row:
    """How well the highest scores are the wrong rows, of which k are known to be."""
    first = np.argsort(-score, kind="stable")[: wrong.sum()]
    return {
        "ROC AUC": float(roc_auc_score(wrong, score)),
        "precision": float(wrong[first].mean()),
    }


def _confident_learning(
    given: np.ndarray, probability: np.ndarray
) -> dict[str, np.ndarray] | None:
    """Cleanlab's marks, and a score that has the rows it marks first."""
    try:
        from cleanlab import filter as cleanlab_filter
        from cleanlab import rank
    except ImportError:
        return None
    labels = given.astype(int)
    probabilities = np.stack([1 - probability, probability], axis=1)
    marks = cleanlab_filter.find_label_issues(
        labels, probabilities, filter_by="confident_learning"
    )
    quality = rank.get_label_quality_scores(labels, probabilities)
    return {"marks": marks, "score": 1 - quality + marks}


def _marked(quality: dict[str, np.ndarray], flipped: np.ndarray) -> Row:
    marks = quality["marks"]
    result: Row = {"marked": int(marks.sum())}
    if flipped.any():
        result["of them flipped"] = int((marks & flipped).sum())
    return result


def main() -> int:
    """Scores, prints and draws what the flags say."""
    cli.use_devices()
    jax.config.update("jax_default_matmul_precision", "highest")
    folder = cli.output_dir()
    hidden = datasets.hidden_sizes()
    table = datasets.from_flags(cli.SEED.value)
    fraction = _FLIP_FRACTION.value
    if fraction is None:
        fraction = 0.0 if datasets.DATA.value is not None else 0.05
    if np.isnan(fraction):
        raise cli.InputError("--flip_fraction=nan: a number is accepted")
    print(f"{table.name}: {len(table.y)} rows")
    print(", ".join(f"{k} {v}" for k, v in output.environment().items()), flush=True)
    result = run(
        table=table,
        flip_fraction=fraction,
        folds=_FOLDS.value,
        seeds=cli.SEEDS.value or SEEDS,
        seed=cli.SEED.value,
        num_steps=chunked_fit.NUM_STEPS.value or NUM_STEPS,
        batch_size=chunked_fit.batch_size(),
        hidden=hidden,
        optimizer=optimizers.OPTIMIZER.value,
        optimizer_args=optimizers.arguments(optimizers.OPTIMIZER_ARG.value),
        learning_rate=optimizers.LEARNING_RATE.value,
        schedule=optimizers.SCHEDULE.value,
        weight_decay=optimizers.WEIGHT_DECAY.value,
        rank_by=_RANK_BY.value,
        dtype=cli.DTYPE.value or "float32",
    )
    _report(result)
    if folder is not None:
        _keep(folder, table, result)
        names = "suspicious.csv, suspicious.png, find_mislabeled.json and .csv"
        print(f"\nIn {folder}: {names}")
    return 0


def _report(result: dict[str, Any]) -> None:
    configuration, marked = result["configuration"], result["confident learning"]
    if result["found"]:
        print(
            f"\n{configuration['flipped']} of {configuration['rows']} labels were "
            "flipped. How well each score finds them, and how many of that many rows "
            "with the highest score are among them:\n"
        )
        print(output.table(result["found"], ".3f"))
    if marked is None:
        print(
            "\ncleanlab is not installed, and not compared with; pip install "
            "'jaxbce[mislabeled]' brings it."
        )
    else:
        known = marked.get("of them flipped")
        print(
            f"\ncleanlab's confident learning marks {marked['marked']} rows"
            + (f", {known} of them flipped." if known is not None else ".")
        )
    print(f"\nThe most suspicious by {configuration['rank_by']}:\n")
    first = result["rows"].head(SHOWN).to_dict("records")
    if "flipped" in result["rows"]:
        first = [{**row, "flipped": "yes" if row["flipped"] else "no"} for row in first]
    print(output.table(first))


def _keep(folder: Path, table: datasets.Table, result: dict[str, Any]) -> None:
    with output.replacing(folder / "suspicious.csv") as path:
        result["rows"].to_csv(path, index=False)
    names = ("configuration", "found", "confident learning")
    document = {name: result[name] for name in names}
    summary = result["found"] or [result["configuration"]]
    output.write(folder, "find_mislabeled", document, summary)
    images = None
    if table.name in IMAGES:
        x = table.features.to_numpy(np.float64)
        images = x.reshape(-1, *IMAGES[table.name])
    rank_by = result["configuration"]["rank_by"]
    path = folder / "suspicious.png"
    plots.suspicious(path, result["rows"], rank_by, images)


if __name__ == "__main__":
    cli.launch(main)
