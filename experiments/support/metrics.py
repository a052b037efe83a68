"""How good are predicted probabilities? scikit-learn's metrics, and two baselines."""

import warnings
from typing import Any

import numpy as np
from sklearn import metrics
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from experiments.support.datasets import Part

CALIBRATION_BINS = 10


def score(y: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Metrics of one output.

    Args:
      y: Labels 0 and 1, `[N]`, of both classes.
      probability: Probabilities of label 1, `[N]`.

    Returns:
      Log-loss in nats, accuracy at 0.5, area under the ROC curve, Brier score, and
      the expected calibration error over ten bins of equal width.
    """
    probability = np.asarray(probability, np.float64)
    return {
        "log-loss": float(metrics.log_loss(y, probability, labels=[0, 1])),
        "accuracy": float(metrics.accuracy_score(y, probability > 0.5)),
        "ROC AUC": float(metrics.roc_auc_score(y, probability)),
        "Brier score": float(metrics.brier_score_loss(y, probability)),
        "calibration error": calibration_error(y, probability),
    }


def calibration_error(y: np.ndarray, probability: np.ndarray) -> float:
    """`Σ_b n_b/N |mean label − mean probability|` over bins b of equal width."""
    gaps = np.bincount(calibration_bins(probability), weights=y - probability)
    return float(np.sum(np.abs(gaps)) / len(y))


def calibration_bins(probability: np.ndarray) -> np.ndarray:
    """The bin of each probability, 0 to 9, as in scikit-learn's calibration_curve."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    return np.searchsorted(edges[1:-1], probability)


def baselines(
    parts: dict[str, Part], hidden: tuple[int, ...], seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """What a reader will ask for: two models of scikit-learn on the same split.

    Args:
      parts: The split; the models are fitted on "train".
      hidden: Widths of MLPClassifier's hidden layers; all else is its default.
      seed: Its seed.

    Returns:
      By model and part, probabilities `[n, n_L]`: each output has its own model.
    """
    models = {
        "logistic regression": lambda: LogisticRegression(max_iter=1000),
        "MLPClassifier": lambda: MLPClassifier(hidden, random_state=seed),
    }
    result: dict[str, dict[str, np.ndarray]] = {}
    with warnings.catch_warnings():  # its default of 200 epochs is what it is
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name, make in models.items():
            fitted = [make().fit(parts["train"].x, y) for y in parts["train"].y.T]
            result[name] = {
                part: np.stack([m.predict_proba(data.x)[:, 1] for m in fitted], axis=1)
                for part, data in parts.items()
            }
    return result


def table(
    parts: dict[str, Part],
    targets: list[str],
    predictions: dict[str, dict[str, np.ndarray]],
) -> list[dict[str, Any]]:
    """A row for each model, part and target."""
    return [
        {"model": model, "part": part, "target": target}
        | score(parts[part].y[:, column], probability[:, column])
        for part in parts
        for model, by_part in predictions.items()
        for probability in [by_part[part]]
        for column, target in enumerate(targets)
    ]
