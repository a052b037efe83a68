"""Metrics of predicted probabilities, and scikit-learn's models to compare with."""

import warnings
from typing import Any

import numpy as np
from sklearn import metrics
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from experiments.support.datasets import Split

CALIBRATION_BINS = 10
HEADINGS = {  # for the keys of `score`
    "log_loss": "log-loss",
    "roc_auc": "ROC AUC",
    "brier_score": "Brier score",
    "calibration_error": "calibration error",
}


def score(y: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Computes the metrics of one output.

    Args:
      y: Labels, `[N]`; both 0 and 1 occur.
      probability: Probabilities of label 1, `[N]`.

    Returns:
      "log_loss" in nats, "accuracy" at 0.5, "roc_auc", "brier_score" and the expected
      "calibration_error" over ten bins of equal width.
    """
    probability = np.asarray(probability, np.float64)
    return {
        "log_loss": float(metrics.log_loss(y, probability, labels=[0, 1])),
        "accuracy": float(metrics.accuracy_score(y, probability > 0.5)),
        "roc_auc": float(metrics.roc_auc_score(y, probability)),
        "brier_score": float(metrics.brier_score_loss(y, probability)),
        "calibration_error": calibration_error(y, probability),
    }


def calibration_error(y: np.ndarray, probability: np.ndarray) -> float:
    """`Σ_b n_b/N |mean label − mean probability|` over bins b of equal width."""
    gaps = np.bincount(calibration_bins(probability), weights=y - probability)
    return float(np.sum(np.abs(gaps)) / len(y))


def calibration_bins(probability: np.ndarray) -> np.ndarray:
    """The bin of each probability, 0 to 9, as in scikit-learn's calibration_curve."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    return np.searchsorted(edges[1:-1], probability)


def fit_baselines(
    splits: dict[str, Split], hidden: tuple[int, ...], seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Fits two kinds of scikit-learn model to the training split, one per output.

    Args:
      splits: The data.
      hidden: Widths of MLPClassifier's hidden layers; its other arguments are defaults.
      seed: Seed of MLPClassifier.

    Returns:
      By model and split, probabilities `[n, n_L]`.
    """
    models = {
        "logistic regression": lambda: LogisticRegression(max_iter=1000),
        "MLPClassifier": lambda: MLPClassifier(hidden, random_state=seed),
    }
    result: dict[str, dict[str, np.ndarray]] = {}
    with warnings.catch_warnings():  # MLPClassifier may stop before it converges
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name, make in models.items():
            fitted = [make().fit(splits["train"].x, y) for y in splits["train"].y.T]
            result[name] = {
                split: np.stack([m.predict_proba(data.x)[:, 1] for m in fitted], axis=1)
                for split, data in splits.items()
            }
    return result


def table(
    splits: dict[str, Split],
    targets: list[str],
    probabilities: dict[str, dict[str, np.ndarray]],
) -> list[dict[str, Any]]:
    """Metrics as rows, one per split, model and target."""
    return [
        {"model": model, "split": split, "target": target}
        | score(data.y[:, column], by_split[split][:, column])
        for split, data in splits.items()
        for model, by_split in probabilities.items()
        for column, target in enumerate(targets)
    ]
