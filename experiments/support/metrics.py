"""Metrics of logits, and scikit-learn's models to compare with.

All metrics are computed from logits in float64. Probabilities round to 0 and 1 where
logits still differ.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn import metrics
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import jaxbce
from experiments.support.datasets import Split

IF_UNDEFINED: Any = {"zero_division": 0}  # without a warning
CRITERIA: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {  # larger is better
    "roc_auc": metrics.roc_auc_score,
    "average_precision": metrics.average_precision_score,
    "accuracy": lambda y, a: metrics.accuracy_score(y, a > 0),
    "balanced_accuracy": lambda y, a: metrics.balanced_accuracy_score(y, a > 0),
    "f1": lambda y, a: metrics.f1_score(y, a > 0, **IF_UNDEFINED),
}
BASELINES = {  # by the name of --baselines, in tables and pictures
    "logistic": "logistic regression",
    "mlp": "MLPClassifier",
    "boosting": "gradient boosting",
}
CALIBRATION_BINS = 10
IMPORTANCE_ROWS = 5000
IMPORTANCE_REPEATS = 5
HEADINGS = {  # for the keys of `score` and `decide`
    "log_loss": "log-loss",
    "roc_auc": "ROC AUC",
    "average_precision": "AP",
    "brier_score": "Brier",
    "calibration_error": "calib. error",
    "f1": "F1",
    "balanced_accuracy": "bal. acc.",
    "true_negatives": "TN",
    "false_positives": "FP",
    "false_negatives": "FN",
    "true_positives": "TP",
}


def logits(params: Any, x: np.ndarray) -> np.ndarray:
    """Logits `[N, n_L]` of preprocessed features `[N, n_0]`, computed in float64.

    If the leaves of `params` have leading axes, of several networks, they are those of
    the networks' mean probability.
    """
    is_ensemble = params[0].w.ndim > 2
    function = jaxbce.ensemble_logits if is_ensemble else jaxbce.logits
    with jax.enable_x64(True):
        cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        return np.asarray(function(cast, jnp.asarray(x, jnp.float64)))


def prior_shift(pos_weight: Any) -> np.ndarray:
    """The shift of logits, log p, by weights p of label 1 in the loss, `[n_L]`.

    The loss with weight p is that of a population in which label 1 is p times as
    frequent, so its logits are larger by log p. Without label 1 (p = 0) there is
    nothing to correct.
    """
    p = np.asarray(pos_weight, np.float64)
    return np.log(p, out=np.zeros_like(p), where=p > 0)


def score(y: np.ndarray, logit: np.ndarray) -> dict[str, float]:
    """Computes the metrics of one output.

    Args:
      y: Labels, `[N]`.
      logit: Logits of label 1, `[N]`, float64.

    Returns:
      "base_rate", the fraction of label 1; "log_loss" in nats; "accuracy" at a
      probability of 0.5; "roc_auc" and "average_precision", NaN if only one label
      occurs; "brier_score"; and the expected "calibration_error" over ten bins of equal
      width.
    """
    probability = expit(logit)
    both = 0 < np.mean(y) < 1
    return {
        "base_rate": float(np.mean(y)),
        "log_loss": log_loss(y, logit),
        "accuracy": float(metrics.accuracy_score(y, logit > 0)),
        "roc_auc": float(metrics.roc_auc_score(y, logit)) if both else np.nan,
        "average_precision": float(metrics.average_precision_score(y, logit))
        if both
        else np.nan,
        "brier_score": float(metrics.brier_score_loss(y, probability, pos_label=1)),
        "calibration_error": calibration_error(y, probability),
    }


def decide(y: np.ndarray, logit: np.ndarray, threshold: float) -> dict[str, Any]:
    """Computes the metrics of deciding for label 1 where logits exceed a threshold.

    Args:
      y: Labels, `[N]`.
      logit: Logits of label 1, `[N]`.
      threshold: The logit above which an example is taken to have label 1.

    Returns:
      "threshold", as a probability; "precision", "recall" and "f1", each 0 where it is
      0/0; "balanced_accuracy", the mean recall of the labels that occur; and the four
      counts.
    """
    label = (logit > threshold).astype(float)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        y, label, average="binary", **IF_UNDEFINED
    )
    balanced = metrics.recall_score(y, label, labels=np.unique(y), average="macro")
    counts = metrics.confusion_matrix(y, label, labels=[0, 1])
    names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
    return {
        "threshold": float(expit(threshold)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "balanced_accuracy": float(balanced),
        **dict(zip(names, counts.ravel().tolist(), strict=True)),
    }


def best_threshold(y: np.ndarray, logit: np.ndarray) -> float:
    """The logit at which F1 is largest; of several, the one closest to 0.

    A threshold is the middle of two neighboring logits, or 1 below the smallest.
    """
    precision, recall, above = metrics.precision_recall_curve(y, logit)
    both = precision + recall
    f1 = 2 * precision * recall / np.where(both > 0, both, 1)
    middles = (above + np.append(above[0] - 2, above[:-1])) / 2
    best = middles[f1[:-1] == f1[:-1].max()]
    return float(best[np.argmin(np.abs(best))])


def criterion(name: str, y: np.ndarray, logits: np.ndarray) -> float:
    """The mean over outputs of one of `CRITERIA`, for labels and logits `[N, n_L]`."""
    outputs = zip(y.T, logits.T, strict=True)
    return float(np.mean([CRITERIA[name](labels, a) for labels, a in outputs]))


def log_loss(y: np.ndarray, logit: np.ndarray, pos_weight: float = 1.0) -> float:
    """Mean cross-entropy in nats of labels and float64 logits of the same shape."""
    with jax.enable_x64(True):
        a, labels = jnp.asarray(logit), jnp.asarray(y, jnp.float64)
        ell = jaxbce.bce_with_logits(a, labels, pos_weight=pos_weight)
        return float(jnp.mean(ell))


def calibration_error(y: np.ndarray, probability: np.ndarray) -> float:
    """`Σ_b n_b/N |mean label − mean probability|` over bins b of equal width."""
    gaps = np.bincount(calibration_bins(probability), weights=y - probability)
    return float(np.sum(np.abs(gaps)) / len(y))


def calibration_bins(probability: np.ndarray) -> np.ndarray:
    """The bin of each probability, 0 to 9, as in scikit-learn's calibration_curve."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    return np.searchsorted(edges[1:-1], probability)


def fit_baselines(
    names: Sequence[str], splits: dict[str, Split], hidden: tuple[int, ...], seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Fits models of scikit-learn to the training split, one per output.

    Args:
      names: Keys of `BASELINES`.
      splits: The data.
      hidden: Widths of MLPClassifier's hidden layers; other arguments are defaults.
      seed: Seed of the models that draw random numbers.

    Returns:
      By model and split, logits `[n, n_L]`.
    """
    models: dict[str, Callable[[], Any]] = {
        "logistic": lambda: LogisticRegression(max_iter=1000),
        "mlp": lambda: MLPClassifier(hidden, random_state=seed),
        "boosting": lambda: HistGradientBoostingClassifier(random_state=seed),
    }
    result: dict[str, dict[str, np.ndarray]] = {}
    with (
        tqdm(names, desc="baselines", unit="model", disable=None) as bar,
        threadpool_limits(1, "openmp"),  # its threads are slow where cores are busy
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # of MLPClassifier
        for name in bar:
            bar.set_postfix_str(BASELINES[name])
            fitted = [
                models[name]().fit(splits["train"].x, y) for y in splits["train"].y.T
            ]
            result[BASELINES[name]] = {
                split: np.stack([_decision(m, data.x) for m in fitted], axis=1)
                for split, data in splits.items()
            }
    return result


def _decision(model: Any, x: np.ndarray) -> np.ndarray:
    """The logits `[N]` of a fitted model of scikit-learn."""
    if isinstance(model, MLPClassifier):  # it has only probabilities
        layers = zip(model.coefs_, model.intercepts_, strict=True)
        return logits(tuple(jaxbce.Layer(w, b) for w, b in layers), x)[:, 0]
    return model.decision_function(x)


def permutation_importances(
    preprocessor: ColumnTransformer,
    predict: Callable[[Any], np.ndarray],
    features: pd.DataFrame,
    y: np.ndarray,
    seed: int,
) -> pd.DataFrame:
    """How much the log-loss grows when a column's values are permuted.

    Args:
      preprocessor: Fitted to columns like those of `features`.
      predict: From preprocessed features to logits, `[N, n_L]`.
      features: Columns of the examples; at most 5000 of them are drawn.
      y: Their labels, `[N, n_L]`.
      seed: Seed of the draw and of the permutations.

    Returns:
      A table with the "importance" of each "column" in nats, the mean of five
      permutations and over outputs, and its "standard_deviation", largest first.
    """
    drawn = np.random.default_rng(seed).permutation(len(y))[:IMPORTANCE_ROWS]
    calls = 1 + IMPORTANCE_REPEATS * features.shape[1]
    with tqdm(total=calls, desc="importances", disable=None) as bar:

        def scoring(transformer: Any, x: Any, y: Any) -> float:
            bar.update()
            return -log_loss(y, predict(np.asarray(transformer.transform(x))))

        found = permutation_importance(
            preprocessor,  # scikit-learn only hands it to `scoring`
            features.iloc[drawn],
            y[drawn],
            scoring=scoring,
            n_repeats=IMPORTANCE_REPEATS,
            random_state=seed,
        )
    table = pd.DataFrame(
        {
            "column": features.columns,
            "importance": found["importances_mean"],
            "standard_deviation": found["importances_std"],
        }
    )
    return table.sort_values("importance", ascending=False, kind="stable")


def table(
    splits: dict[str, Split],
    targets: list[str],
    logits: dict[str, dict[str, np.ndarray]],
) -> list[dict[str, Any]]:
    """Metrics as rows, one per split, model and target.

    Args:
      splits: The data.
      targets: Names of the outputs.
      logits: Logits by model and split, `[n, n_L]`.
    """
    return [
        {"model": model, "split": split, "target": target}
        | score(data.y[:, column], by_split[split][:, column])
        for split, data in splits.items()
        for model, by_split in logits.items()
        for column, target in enumerate(targets)
    ]


def best_thresholds(
    validation: Split, logits: dict[str, dict[str, np.ndarray]]
) -> dict[str, list[float]]:
    """The best threshold of each model and output on the validation split."""
    return {
        model: [
            best_threshold(y, a)
            for y, a in zip(validation.y.T, by_split["validation"].T, strict=True)
        ]
        for model, by_split in logits.items()
    }


def decision_table(
    splits: dict[str, Split],
    targets: list[str],
    logits: dict[str, dict[str, np.ndarray]],
    thresholds: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """As `table`, of decisions at a probability of 0.5 and at the model's threshold."""
    return [
        {"model": model, "split": split, "target": target}
        | decide(data.y[:, column], by_split[split][:, column], threshold)
        for split, data in splits.items()
        for model, by_split in logits.items()
        for column, target in enumerate(targets)
        for threshold in (0.0, thresholds[model][column])
    ]
