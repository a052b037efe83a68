r"""Which training labels are wrong?

    python -m experiments.find_mislabeled
    python -m experiments.find_mislabeled --data mine.csv --target label \
        --output_dir results

Splits the examples into --folds folds, and scores every example by --seeds networks
that jaxbce.sweep trains on the other folds. The scores are means over the networks of
EL2N and GraNd (jaxbce.per_example.scores), self-influence (the square of GraNd, which
is TracIn of an example on itself) and the loss. --flip_fraction flips that fraction of
the labels at random beforehand. The table then shows how well each score finds them,
compared with chance, the norm of the input, and cleanlab's confident learning (if it is
installed) on the same folds and networks. Expect a ROC AUC on digits of about 0.99 for
EL2N and the loss.

Features are standardized over all examples, without looking at the labels. A duplicated
example may have its copy in another fold. With --data, no labels are flipped unless
--flip_fraction is set. suspicious.csv in --output_dir lists all examples, the most
suspicious first.
"""

import contextlib
from collections.abc import Callable
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
from experiments.support import cli, config, datasets, output, plots, resumable
from experiments.support.config import OptimizerConfig, TrainingConfig
from jaxbce import per_example

flags.adopt_module_key_flags(datasets)
for _name in (
    *cli.COMMON,
    *config.OPTIMIZER_FLAGS,
    "hidden",
    "batch_size",
    "num_steps",
    "cpu_devices",
    "dtype",
    "folds",
    "seeds",
):
    flags.declare_key_flag(_name)
_FLIP_FRACTION = flags.DEFINE_float(
    "flip_fraction",
    None,
    "Fraction of labels to flip; 0 for none. If not set, 0 with --data, else 0.05.",
    lower_bound=0.0,
    upper_bound=0.5,
)
SCORES = {  # keys in files, and names
    "el2n": "EL2N",
    "grand": "GraNd",
    "self_influence": "self-influence",
    "loss": "loss",
}
CONTROL = {"input_norm": "input norm"}
CLEANLAB = "cleanlab, confident learning"
_RANK_BY = flags.DEFINE_enum(
    "rank_by",
    "EL2N",
    list(SCORES.values()),
    "The score by which the examples in all output are ordered.",
)

DEFAULTS: dict[str, Any] = {
    "batch_size": 32,
    "num_steps": 400,
    "dtype": "float32",
    "folds": 5,
    "seeds": 10,
}
HELP = {
    "folds": "Number of folds; each is scored by networks trained on the other folds.",
    "seeds": "Networks per fold, which differ only by their seed.",
    "target": "Column of --data that holds the labels, which may be any two values. "
    "All other columns are features: numbers are standardized, text is one-hot "
    "encoded.",
}
DEFAULT_FLIP_FRACTION = 0.05
SHOWN = 10  # rows of the table in the terminal
IMAGES = {"digits": (8, 8)}  # datasets whose examples are images, and their shapes
HEADINGS = {
    **SCORES,
    "roc_auc": "ROC AUC",
    "probability_of_label": "probability of label",
}

Row = dict[str, Any]


def run(
    *,
    table: datasets.Table,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    seeds: int = 10,
    folds: int = 5,
    flip_fraction: float = 0.0,
    rank_by: str = "EL2N",
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Scores every example by networks that were not trained on it.

    Args:
      table: The data, with one target.
      optimizer: The optimizer.
      training: How to train.
      seeds: Networks per fold.
      folds: Number of folds.
      flip_fraction: Fraction of labels to flip beforehand.
      rank_by: Name of the score by which to order examples.
      make_folder: Called once all arguments are known to be valid; returns the folder
        in which to save the results, or None.

    Returns:
      "configuration"; "rows", a table of all examples, the most suspicious first;
      "found", one row per score if labels were flipped; and "confident_learning", the
      number of labels that cleanlab marks, or None if it is not installed.

    Raises:
      InputError: If an argument cannot be used, or a network diverges.
    """
    # Check everything before anything is trained.
    if table.y.shape[1] != 1:
        raise cli.InputError("--target: expected one target, got several")
    x, y = datasets.preprocess_all(table)
    n = len(y)
    flipped = flip(n, flip_fraction, training.seed)
    given = np.where(flipped, 1 - y[:, 0], y[:, 0])
    if min(given.sum(), n - given.sum()) < folds:
        raise cli.InputError(f"--folds={folds}: one label has fewer rows than that")
    rows = n - -(-n // folds)  # to train on
    training, optimizer = training.check(rows, table.name), optimizer.fill_in(rows)

    configuration = {
        **datasets.describe(table),
        "rows": n,
        "flipped": int(flipped.sum()),
        "folds": folds,
        "seeds": seeds,
        **optimizer.as_dict(),
        **training.as_dict(),
        "rank_by": rank_by,
    }
    with contextlib.ExitStack() as stack:
        if (folder := make_folder()) is not None:
            stack.enter_context(resumable.lock_output_dir(folder, configuration))

        # Score each fold by networks trained on the others.
        scores, probability = score_folds(
            x, given, optimizer, training, seeds=seeds, folds=folds
        )

        # Compare the scores, and rank the examples.
        quality = confident_learning(given, probability)
        result = {
            "configuration": configuration,
            "rows": rank(table, given, flipped, probability, scores, rank_by),
            "found": compare_scores(flipped, scores, quality) if flipped.any() else [],
            "confident_learning": (
                None if quality is None else _marked(quality, flipped)
            ),
        }
        if folder is not None:
            save(folder, table, result)
    return result


def flip(rows: int, fraction: float, seed: int) -> np.ndarray:
    """Draws at random which labels to flip, a boolean array `[rows]`.

    Raises:
      InputError: If the fraction is positive but too small to flip any.
    """
    flipped = np.zeros(rows, bool)
    chosen = np.random.default_rng(seed).choice(
        rows, round(fraction * rows), replace=False
    )
    flipped[chosen] = True
    if fraction > 0 and not flipped.any():
        raise cli.InputError(f"--flip_fraction={fraction}: flips none of {rows} labels")
    return flipped


def score_folds(
    x: np.ndarray,
    given: np.ndarray,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    *,
    seeds: int,
    folds: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Scores examples; returns scores by key, and mean probabilities of labels.

    Args:
      x: Features `[N, n_0]`.
      given: Labels 0 and 1 as given, `[N]`.
      optimizer: The optimizer.
      training: How to train.
      seeds: Networks per fold.
      folds: Number of folds.

    Returns:
      Scores by key, `[N]`, and mean probabilities of labels 0 and 1, `[N, 2]`, computed
      in float64.

    Raises:
      InputError: If a network diverges.
    """
    family = optimizer.build_family(training.steps)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=training.seed)
    scores = {name: np.zeros(len(x)) for name in (*SCORES, *CONTROL)}
    probability = np.zeros((len(x), 2))

    with jax.enable_x64(training.dtype == "float64"):

        def data(rows: np.ndarray, dtype: str) -> tuple[jax.Array, jax.Array]:
            return jnp.asarray(x[rows], dtype), jnp.asarray(given[rows, None], dtype)

        for fold, (others, held_out) in enumerate(
            tqdm(list(splitter.split(x, given)), unit="fold", disable=None)
        ):
            networks = jaxbce.sweep(
                jax.random.fold_in(jax.random.key(training.seed), fold),
                *data(others, training.dtype),
                hidden=training.hidden,
                make_optimizer=family.make_optimizer,
                make_penalty=family.make_penalty,
                hparams={},
                num_seeds=seeds,
                num_steps=training.steps,
                batch_size=training.batch_size,
                dtype=training.dtype,
            )
            if (networks.diverged_at >= 0).any():
                raise cli.InputError("networks diverged; try a smaller --learning_rate")
            with jax.enable_x64(True):  # where float32 would round, ranks would tie
                params = jax.tree.map(
                    lambda leaf: jnp.asarray(leaf[0], jnp.float64), networks.params
                )
                found = _score(params, *data(held_out, "float64"))
                fold_scores, probability[held_out] = jax.tree.map(np.asarray, found)
            for name, values in fold_scores.items():
                scores[name][held_out] = values
    return scores, probability


@jax.jit
def _score(params: Any, x: jax.Array, y: jax.Array) -> tuple[dict[str, Any], Any]:
    """Means over networks: scores `[N]`, and probabilities of both labels `[N, 2]`."""
    scores = jax.vmap(per_example.scores, (0, None, None))(params, x, y)
    a = jax.vmap(jaxbce.logits, (0, None))(params, x)[:, :, 0]  # [networks, N]
    ell = jaxbce.bce_with_logits(a, jnp.broadcast_to(y[:, 0], a.shape))
    by_network = {
        "el2n": scores.el2n,
        "grand": scores.grand,
        "self_influence": jnp.square(scores.grand),
        "loss": ell,
        "input_norm": scores.input_norm,
    }
    means = {name: jnp.mean(values, axis=0) for name, values in by_network.items()}
    both = jax.nn.sigmoid(jnp.stack([-a, a], axis=-1))  # accurate in both tails
    return means, jnp.mean(both, axis=0)


def rank(
    table: datasets.Table,
    given: np.ndarray,
    flipped: np.ndarray,
    probability: np.ndarray,
    scores: dict[str, np.ndarray],
    rank_by: str,
) -> pd.DataFrame:
    """A table of all examples, the most suspicious first."""
    ((target, classes),) = table.classes.items()
    labels = np.array([f"{target}={value}" for value in classes])[given.astype(int)]
    rows = pd.DataFrame({"row": table.features.index, "label": labels})
    rows["probability_of_label"] = np.where(given == 1, *probability.T[::-1])
    rows = rows.assign(**{name: scores[name] for name in SCORES})
    if flipped.any():
        rows["flipped"] = flipped
    return rows.sort_values(
        _score_key(rank_by), ascending=False, kind="stable", ignore_index=True
    )


def _score_key(name: str) -> str:
    return next(key for key, value in SCORES.items() if value == name)


def confident_learning(
    given: np.ndarray, probability: np.ndarray
) -> dict[str, np.ndarray] | None:
    """Cleanlab's marks, and a score that puts them first; None if not installed."""
    try:
        from cleanlab import filter as cleanlab_filter
        from cleanlab import rank as cleanlab_rank
    except ImportError:
        return None
    labels = given.astype(int)
    marks = cleanlab_filter.find_label_issues(
        labels, probability, filter_by="confident_learning"
    )
    quality = cleanlab_rank.get_label_quality_scores(labels, probability)
    return {"marks": marks, "score": 1 - quality + marks}


def compare_scores(
    flipped: np.ndarray,
    scores: dict[str, np.ndarray],
    quality: dict[str, np.ndarray] | None,
) -> list[Row]:
    """How well each score finds the flipped labels, and how well chance does."""
    named = {name: scores[key] for key, name in (SCORES | CONTROL).items()}
    if quality is not None:
        named[CLEANLAB] = quality["score"]
    return [
        *({"score": name, **_detection(flipped, s)} for name, s in named.items()),
        {"score": "chance", "roc_auc": 0.5, "precision": float(flipped.mean())},
    ]


def _detection(wrong: np.ndarray, score: np.ndarray) -> Row:
    """ROC AUC, and precision among as many examples as are wrong."""
    first = np.argsort(-score, kind="stable")[: wrong.sum()]
    return {
        "roc_auc": float(roc_auc_score(wrong, score)),
        "precision": float(wrong[first].mean()),
    }


def _marked(quality: dict[str, np.ndarray], flipped: np.ndarray) -> Row:
    marks = quality["marks"]
    result: Row = {"marked": int(marks.sum())}
    if flipped.any():
        result["marked_and_flipped"] = int((marks & flipped).sum())
    return result


def _flip_fraction() -> float:
    """--flip_fraction, or its default."""
    fraction = _FLIP_FRACTION.value
    if fraction is None:
        return 0.0 if datasets.DATA.value is not None else DEFAULT_FLIP_FRACTION
    if np.isnan(fraction):
        raise cli.InputError("--flip_fraction=nan: expected a number")
    return fraction


def _report(result: dict[str, Any]) -> None:
    configuration, marked = result["configuration"], result["confident_learning"]
    if result["found"]:
        print(
            f"\n{configuration['flipped']} of {configuration['rows']} labels were "
            "flipped. How well each score finds them, and the precision among as many "
            "rows with the highest scores:\n"
        )
        print(output.table(result["found"], ".3f", HEADINGS))
    if marked is None:
        print(
            "\ncleanlab is not installed, so there is no comparison with it; run pip "
            "install 'jaxbce[mislabeled]'."
        )
    else:
        known = marked.get("marked_and_flipped")
        print(
            f"\ncleanlab's confident learning marks {marked['marked']} rows"
            + (f", {known} of them flipped." if known is not None else ".")
        )
    print(f"\nThe most suspicious by {configuration['rank_by']}:\n")
    first = result["rows"].head(SHOWN).to_dict("records")
    if "flipped" in result["rows"]:
        first = [{**row, "flipped": "yes" if row["flipped"] else "no"} for row in first]
    print(output.table(first, headings=HEADINGS))


def save(folder: Path, table: datasets.Table, result: dict[str, Any]) -> None:
    """Writes the ranking, the comparison of scores and the picture."""
    with output.atomic_write(folder / "suspicious.csv") as path:
        result["rows"].to_csv(path, index=False)
    names = ("configuration", "found", "confident_learning")
    document = {name: result[name] for name in names}
    summary = result["found"] or [result["configuration"]]
    output.write_results(folder, "find_mislabeled", document, summary)
    images = None
    if table.name in IMAGES:
        x = table.features.to_numpy(np.float64)
        images = x.reshape(-1, *IMAGES[table.name])
    rank_by = result["configuration"]["rank_by"]
    path = folder / "suspicious.png"
    plots.suspicious(path, result["rows"], _score_key(rank_by), rank_by, images)


def main() -> int:
    """Scores the examples, prints the results and writes the files."""
    cli.use_devices()
    optimizer = OptimizerConfig.from_flags()
    training = TrainingConfig.from_flags(**DEFAULTS)
    fraction = _flip_fraction()
    table = datasets.from_flags(training.seed)
    print(f"{table.name}: {len(table.y)} rows")
    output.print_environment()
    result = run(
        table=table,
        optimizer=optimizer,
        training=training,
        seeds=cli.SEEDS.value or DEFAULTS["seeds"],
        folds=cli.FOLDS.value or DEFAULTS["folds"],
        flip_fraction=fraction,
        rank_by=_RANK_BY.value,
        make_folder=cli.output_dir,
    )
    _report(result)
    if cli.OUTPUT_DIR.value is not None:
        output.print_files(Path(cli.OUTPUT_DIR.value))
    return 0


if __name__ == "__main__":
    cli.launch(main, DEFAULTS, HELP)
