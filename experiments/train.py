r"""How well does one network do on this data, with this optimizer?

    python -m experiments.train
    python -m experiments.train --data mine.csv --target label --output_dir results
    python -m experiments.train --predict new.csv --output_dir results

Splits the examples 60/20/20 into training, validation and test sets, trains with
jaxbce.fit, and keeps the parameters with the lowest validation loss. --group keeps the
rows of a group in one split, --time takes the latest rows for the test, and
--validation and --test name files of their own. Prints scikit-learn's metrics on all
three sets, also for logistic regression, MLPClassifier and
HistGradientBoostingClassifier, with one model per target. MLPClassifier has the same
hidden layers and otherwise scikit-learn's defaults. Expect a test accuracy on digits of
about 0.98, and 0.91 for logistic regression.

With --folds, the rows outside the test set are divided into folds. Each network is
trained without one fold and evaluated on it, all in one program. Their ensemble is
evaluated on the test set, and is the model that is saved.

With --output_dir everything is saved as files. If the command is interrupted, even
killed, rerun it to resume; only a run with --folds starts again. --predict scores new
rows with the model in --output_dir, and prints metrics if they have labels. Of the
other flags it takes only --id and those that say how a text file is written. A model is
a pickle: score only with models you trust.
"""

import collections
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags

import jaxbce
from experiments.support import (
    artifacts,
    baselines,
    cli,
    config,
    cross_validation,
    datasets,
    metrics,
    optimizers,
    output,
    resumable,
    splitting,
)
from experiments.support.chunked_fit import ChunkedFit, Trained
from experiments.support.config import OptimizerConfig, TrainingConfig

flags.adopt_module_key_flags(datasets)
flags.adopt_module_key_flags(splitting)
flags.adopt_module_key_flags(config)
for _name in (*cli.COMMON, "dtype", "folds"):
    flags.declare_key_flag(_name)
_GRADIENT = flags.DEFINE_enum(
    "gradient",
    "manual",
    ["manual", "autodiff"],
    "Train with the hand-derived gradient, or with JAX's gradient of a plain loss.",
)
_PREDICT = flags.DEFINE_string(
    "predict",
    None,
    "Score the rows of this file with the model in --output_dir.",
)
_BASELINES = flags.DEFINE_list(
    "baselines",
    list(metrics.BASELINES),
    "Models of scikit-learn to fit to the same data, comma-separated: logistic, mlp "
    "(MLPClassifier with the same hidden layers), boosting "
    "(HistGradientBoostingClassifier); or none.",
)
_ID = flags.DEFINE_list(
    "id",
    None,
    "Columns of the --predict file to keep beside the scores, comma-separated. If not "
    "set, all.",
)

DEFAULTS: dict[str, Any] = {"batch_size": 32, "dtype": "float32"}
HELP = {
    "folds": "Cross-validate: number of folds of the rows outside the test set, each "
    "held out by one network, which is judged on it. Columns are standardized and "
    "imputed by the rows of all folds. If not set, one split and one network.",
    "metric": "What --patience and the parameters that are kept are judged by, on the "
    "validation set: the loss, or the mean over targets of a metric, which decides at "
    "a probability of 0.5.",
    "pos_weight": "Weight p of label 1 in the loss, or 'balanced': the number of "
    "training examples with label 0 divided by the number with label 1. Probabilities "
    "in all metrics and files are corrected for it: logit - log p.",
}
LOSSES = {"manual": None, "autodiff": baselines.plain_objective}


def run(
    *,
    table: datasets.Table,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    gradient: str = "manual",
    baseline_names: Sequence[str] = (),
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains one network and evaluates it.

    Args:
      table: The data.
      optimizer: The optimizer.
      training: How to train.
      gradient: "manual" or "autodiff".
      baseline_names: Models of scikit-learn to fit too, keys of `metrics.BASELINES`.
      make_folder: Called once all arguments are known to be valid; returns the folder
        in which to save the run and from which to resume it, or None.

    Returns:
      "configuration"; "rows", their number per split; "metrics", one row per model,
      split and target; "decisions", two each, at a probability of 0.5 and at the
      threshold that is best on the validation set; "thresholds", the network's own, as
      logits, one per target; "history", one row per evaluation; "best_step" and
      "params", those that are best on the validation set; "steps", the number taken;
      and "diverged", whether the run did.

    Raises:
      InputError: If an argument cannot be used, or the run diverges before its first
        evaluation.
    """
    # Check everything before anything is written or trained.
    splits, preprocessor = datasets.split(table, training.seed)
    rows = len(splits["train"].x)
    training, optimizer = training.check(rows, table.name), optimizer.fill_in(rows)
    weight = positive_weights(training.pos_weight, splits["train"].y)
    configuration = {
        **datasets.describe(table),
        **optimizer.as_dict(),
        **training.as_dict(),
        "pos_weight": weight,
        "gradient": gradient,
    }
    transformation, penalty = optimizer.build(training.steps)
    with jax.enable_x64(training.dtype == "float64"), contextlib.ExitStack() as stack:
        fit = ChunkedFit(
            splits,
            training,
            optimizer=transformation,
            penalty=optimizers.l2_penalty(penalty) if penalty else None,
            loss=LOSSES[gradient],
            pos_weight=weight,
        )
        folder, checkpoints = make_folder(), None
        if folder is not None:
            opened = resumable.open_checkpoints(folder, configuration)
            checkpoints = stack.enter_context(opened)

        trained = fit.train(checkpoints)

        logits = predict_all(trained, splits, weight)
        logits |= metrics.fit_baselines(
            baseline_names, splits, training.hidden, training.seed
        )
        targets = list(table.classes)
        thresholds = metrics.best_thresholds(splits["validation"], logits)
        result = {
            "configuration": configuration,
            "rows": {name: len(split.rows) for name, split in splits.items()},
            **summary(trained, training.metric),
            "metrics": metrics.table(splits, targets, logits),
            "decisions": metrics.decision_table(splits, targets, logits, thresholds),
            "thresholds": thresholds[artifacts.NETWORK],
        }
        if folder is not None:
            artifacts.save(folder, result, table, splits, preprocessor, logits)
    return result


def cross_validate(
    *,
    table: datasets.Table,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    folds: int,
    baseline_names: Sequence[str] = (),
    make_folder: Callable[[], Path | None] = lambda: None,
) -> dict[str, Any]:
    """Trains one network per fold, which holds it out, and evaluates them.

    Args:
      table: The data.
      optimizer: The optimizer.
      training: How to train; `metric` must be "loss".
      folds: Number of folds of the rows outside the test set.
      baseline_names: As for `run`; they are fitted to the rows of all folds.
      make_folder: As for `run`, but what was interrupted starts again.

    Returns:
      "configuration" and "rows", as for `run`; "folds", metrics of each fold by the
      network that held it out; "metrics" of all these predictions as "validation", and
      of the ensemble of all networks and the baselines on the test set; "decisions" and
      "thresholds", likewise; "best_steps", and the ensemble's "params".

    Raises:
      InputError: If an argument cannot be used, or a network diverges before its first
        evaluation.
    """
    splits, preprocessor, fold = cross_validation.split(table, training.seed, folds)
    training = training.check(len(fold), table.name)
    optimizer = optimizer.fill_in(cross_validation.num_train_rows(fold))
    weight = positive_weights(training.pos_weight, splits["train"].y)
    configuration = {
        **datasets.describe(table),
        "folds": folds,
        **optimizer.as_dict(),
        **training.as_dict(),
        "pos_weight": weight,
    }
    family = optimizer.build_family(training.steps)
    with jax.enable_x64(training.dtype == "float64"), contextlib.ExitStack() as stack:
        if (folder := make_folder()) is not None:
            stack.enter_context(resumable.lock_output_dir(folder, configuration))

        x, y = (jnp.asarray(t, training.dtype) for t in splits["train"][1:])
        networks = jaxbce.sweep(
            jax.random.key(training.seed),
            x,
            y,
            hidden=training.hidden,
            make_optimizer=family.make_optimizer,
            make_penalty=family.make_penalty,
            make_sample_weight=cross_validation.leave_out_fold(fold),
            hparams={"fold": np.arange(folds)},
            num_steps=training.steps,
            batch_size=training.batch_size,
            validation="held_out",
            evaluate_every=training.evaluate_every,
            patience=training.patience,
            pos_weight=np.asarray(weight),
            dtype=training.dtype,
        )
        if (networks.best_step == 0).any():
            raise cli.InputError(
                "the loss was not finite before the first evaluation; try a smaller "
                "--learning_rate"
            )

        params = jax.tree.map(lambda leaf: leaf[:, 0], networks.best_params)
        evaluated, logits = cross_validation.predict(params, splits, fold, weight)
        targets, own = list(table.classes), logits[artifacts.NETWORK]
        thresholds = metrics.best_thresholds(evaluated["validation"], logits)
        by_fold = {
            f"fold {k}": cross_validation.select_rows(splits["train"], fold == k)
            for k in range(folds)
        }
        own |= {f"fold {k}": own["validation"][fold == k] for k in range(folds)}
        test = {"test": splits["test"]}
        compared = logits | metrics.fit_baselines(
            baseline_names, splits, training.hidden, training.seed
        )
        result = {
            "configuration": configuration,
            "rows": {"folds": len(fold), "test": len(splits["test"].rows)},
            "folds": metrics.table(by_fold, targets, logits),
            "metrics": metrics.table(
                {"validation": evaluated["validation"]}, targets, logits
            )
            + metrics.table(test, targets, compared),
            "decisions": metrics.decision_table(evaluated, targets, logits, thresholds),
            "thresholds": thresholds[artifacts.NETWORK],
            "best_steps": networks.best_step[:, 0].tolist(),
            "params": params,
        }
        if folder is not None:
            artifacts.save(
                folder, result, table, by_fold | test, preprocessor, compared
            )
    return result


def positive_weights(pos_weight: float | str, y: np.ndarray) -> tuple[float, ...]:
    """The weight of label 1 for each output; "balanced" computes it from labels `y`."""
    if pos_weight == "balanced":
        return tuple(((1 - y).sum(axis=0) / y.sum(axis=0)).tolist())
    return (float(pos_weight),) * y.shape[1]


def predict_all(
    trained: Trained, splits: dict[str, datasets.Split], pos_weight: tuple[float, ...]
) -> dict[str, dict[str, np.ndarray]]:
    """The network's logits of label 1, by model and split, each `[n, n_L]`.

    They are corrected for `pos_weight`, and so are all probabilities and metrics.

    Raises:
      InputError: If the run diverged before its first evaluation.
    """
    if int(trained.run.best_step) == 0:
        raise cli.InputError(
            f"the loss was not finite at step {int(trained.run.step)}, before the "
            "first evaluation; try a smaller --learning_rate"
        )
    params, shift = trained.run.best_params, metrics.prior_shift(pos_weight)
    return {
        artifacts.NETWORK: {
            name: metrics.logits(params, split.x) - shift
            for name, split in splits.items()
        }
    }


def summary(trained: Trained, metric: str) -> dict[str, Any]:
    """The entries of the result of `run` that describe the training run."""
    names = ("train_loss", "validation_loss", f"validation_{metric}")
    history = zip(trained.steps, trained.history.tolist(), strict=True)
    return {
        "best_step": int(trained.run.best_step),
        "steps": int(trained.run.step),
        "diverged": int(trained.run.diverged_at) >= 0,
        "history": [
            {"step": int(step), **dict(zip(names, values, strict=False))}
            for step, values in history
        ],
        "params": trained.run.best_params,
    }


def _baseline_names() -> list[str]:
    """The values of --baselines.

    Raises:
      InputError: If one is unknown.
    """
    names = list(dict.fromkeys(_BASELINES.value))
    for name in names:
        if name not in metrics.BASELINES and names != ["none"]:
            raise cli.InputError(
                f"--baselines={name}: expected {', '.join(metrics.BASELINES)}, or none "
                "alone"
            )
    return [name for name in names if name != "none"]


def _check_folds(folds: int) -> None:
    """Rejects flags that cannot be used with --folds."""
    if _PREDICT.value is not None:
        raise cli.InputError(f"--folds={folds}: --predict trains no network")
    if config.METRIC.value != "loss":
        raise cli.InputError(
            f"--folds={folds}: cannot be used with --metric, because each network "
            "keeps the parameters with the lowest loss on its fold"
        )
    if _GRADIENT.value != "manual":
        raise cli.InputError(
            f"--folds={folds}: cannot be used with --gradient={_GRADIENT.value}"
        )


def _predict(file: str) -> None:
    if cli.OUTPUT_DIR.value is None:
        raise cli.InputError("--predict needs --output_dir, the folder of the run")
    scored = artifacts.score(file, Path(cli.OUTPUT_DIR.value), _ID.value)
    print(f"{scored.rows} rows scored: {scored.path}")
    if scored.labeled:
        print(f"{scored.labeled} rows have labels")
        _report_metrics(scored.metrics, scored.decisions, Path(file).name)


def _describe(table: datasets.Table) -> None:
    kinds = collections.Counter(column.kind for column in table.schema.columns)
    columns = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    print(f"{table.name}: {len(table.y)} rows, columns: {columns}")
    print(f"label 1: {', '.join(datasets.label_1(table.classes))}")
    output.print_environment()


def _report_pos_weight(result: dict[str, Any]) -> None:
    """Says how the weights of label 1 change logits, where they are not 1."""
    configuration = result["configuration"]
    targets = datasets.label_1(configuration["classes"])
    for target, weight in zip(targets, configuration["pos_weight"], strict=True):
        if weight not in (0, 1):
            print(
                f"\n{target} has weight {weight:.4g} in the loss, so the network's own "
                "probabilities of it are those\nof data that has it that many times as "
                f"often. Metrics and files correct them: logit - log {weight:.4g}.\n"
                f"The network's own 0.5 is a corrected probability of "
                f"{1 / (1 + weight):.4f}."
            )


def _report_metrics(
    rows: list[dict[str, Any]], decisions: list[dict[str, Any]], split: str
) -> None:
    """Prints two tables per target: metrics, and decisions on one of the splits."""
    targets = dict.fromkeys(row["target"] for row in rows)
    for target in targets:
        of_target = [row for row in rows if row["target"] == target]
        rates = {row["split"]: f"{row['base_rate']:.4f}" for row in of_target}
        print(
            f"\n{target}: fraction of label 1 "
            + ", ".join(f"{rate} ({name})" for name, rate in rates.items())
        )
        hidden = ("target", "base_rate")
        print(f"\n{output.table(_without(of_target, hidden), '.4f', metrics.HEADINGS)}")
        shown = [r for r in decisions if (r["target"], r["split"]) == (target, split)]
        print(
            f"\nDecisions on {split}, at a probability of 0.5 and at the threshold "
            "that has the largest F1\non validation:"
        )
        hidden = ("target", "split")
        print(f"\n{output.table(_without(shown, hidden), '.4f', metrics.HEADINGS)}")


def _without(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in keys} for row in rows]


def _report(result: dict[str, Any]) -> None:
    rows = ", ".join(f"{count} for {name}" for name, count in result["rows"].items())
    configuration = result["configuration"]
    keys = [name for name in ("group", "time") if name in configuration]
    how = "".join(f", split by {name} {configuration[name]!r}" for name in keys)
    print(f"\nRows: {rows}{how}")
    num_steps, steps = configuration["num_steps"], result["steps"]
    if steps == num_steps:
        end = f"all {num_steps} steps taken."
    elif result["diverged"]:
        end = f"diverged at step {steps}."
    else:
        end = f"stopped early at step {steps}, out of patience."
    metric = configuration["metric"]
    best = "smallest" if metric == "loss" else "largest"
    print(
        f"Parameters of step {result['best_step']}, with the {best} validation "
        f"{metric}; {end}"
    )
    if result["best_step"] == steps == num_steps:
        print("The best step is the last, so longer training may help: --epochs.")
    _report_pos_weight(result)
    _report_metrics(result["metrics"], result["decisions"], "test")


def _report_folds(result: dict[str, Any]) -> None:
    rows, folds = result["rows"], result["configuration"]["folds"]
    steps = result["best_steps"]
    print(
        f"\nRows: {rows['folds']} in {folds} folds, {rows['test']} for test\n"
        "Each network is trained without one fold. It keeps the parameters with the "
        f"smallest loss on that fold,\nof steps {min(steps)} to {max(steps)}, so its "
        "metrics there are a little optimistic; those on test are not."
    )
    _report_pos_weight(result)
    hidden = ["model", "split", "target", "base_rate"]
    shown = []
    by_target = pd.DataFrame(result["folds"]).groupby("target", sort=False)
    for target, of_target in by_target:
        values = of_target.drop(columns=hidden)
        with_errors = map(output.with_error, values.mean(), values.sem())
        shown.append({"target": target, **dict(zip(values, with_errors, strict=True))})
    print("\nFolds that were held out, mean ± standard error:")
    print(f"\n{output.table(shown, headings=metrics.HEADINGS)}")
    print(
        "\nAll these predictions together (validation), and on test the ensemble of "
        f"the {folds} networks,\nwhose probability is the mean of theirs (before the "
        "correction for --pos_weight):"
    )
    _report_metrics(result["metrics"], result["decisions"], "test")


def main() -> int:
    """Trains a network, or scores new rows, as the flags say."""
    folds = cli.FOLDS.value
    if folds is not None:
        _check_folds(folds)
    if _PREDICT.value is not None:
        _predict(_PREDICT.value)
        return 0
    if _ID.value is not None:
        raise cli.InputError("--id needs --predict")
    optimizer = OptimizerConfig.from_flags()
    training = TrainingConfig.from_flags(**DEFAULTS)
    baseline_names = _baseline_names()
    table = datasets.from_flags(training.seed)
    _describe(table)
    options: dict[str, Any] = {
        "table": table,
        "optimizer": optimizer,
        "training": training,
        "baseline_names": baseline_names,
        "make_folder": cli.output_dir,
    }
    if folds is None:
        result = run(**options, gradient=_GRADIENT.value)
        _report(result)
    else:
        result = cross_validate(**options, folds=folds)
        _report_folds(result)
    if cli.OUTPUT_DIR.value is not None:
        output.print_files(Path(cli.OUTPUT_DIR.value))
    return 0


if __name__ == "__main__":
    cli.launch(main, DEFAULTS, HELP)
