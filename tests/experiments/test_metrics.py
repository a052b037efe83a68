"""Metrics of predicted probabilities."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from experiments.support import datasets, metrics


def test_metrics_are_what_their_names_say():
    y = np.array([0, 0, 1, 1])
    p = np.array([0.0, 0.6, 0.6, 1.0])
    found = metrics.score(y, p)
    assert np.isclose(found["log_loss"], -np.log([1, 0.4, 0.6, 1]).mean())
    assert found["accuracy"] == 0.75
    assert found["roc_auc"] == 0.875
    assert np.isclose(found["brier_score"], (0.36 + 0.16) / 4)
    assert np.isclose(found["calibration_error"], abs(1 - 1.2) / 4)
    assert set(metrics.HEADINGS) < set(found)


def test_calibration_bins_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(200), np.linspace(0, 1, 11)])
    y = np.arange(211) % 2
    bins = metrics.calibration_bins(p)
    share, mean = calibration_curve(y, p, n_bins=metrics.CALIBRATION_BINS)
    for i, which in enumerate(np.unique(bins)):
        assert np.isclose(y[bins == which].mean(), share[i])
        assert np.isclose(p[bins == which].mean(), mean[i])
    expected = [abs((y - p)[bins == which].sum()) for which in range(10)]
    assert np.isclose(metrics.calibration_error(y, p), sum(expected) / 211)


def test_a_row_is_of_its_model_split_and_target():
    y = np.array([[0, 1], [1, 0], [1, 1], [0, 0]], float)
    split = datasets.Split(np.arange(4), np.zeros((4, 1)), y)
    splits = {"train": split, "test": split}
    right, wrong = np.where(y, 0.9, 0.1), np.where(y, 0.4, 0.6)
    probabilities = {
        "one": {"train": right, "test": wrong},
        "other": {"train": wrong, "test": np.stack([right[:, 0], wrong[:, 1]], 1)},
    }
    rows = metrics.table(splits, ["a", "b"], probabilities)
    accuracy = {(r["model"], r["split"], r["target"]): r["accuracy"] for r in rows}
    assert accuracy == {
        ("one", "train", "a"): 1.0,
        ("one", "train", "b"): 1.0,
        ("other", "train", "a"): 0.0,
        ("other", "train", "b"): 0.0,
        ("one", "test", "a"): 0.0,
        ("one", "test", "b"): 0.0,
        ("other", "test", "a"): 1.0,
        ("other", "test", "b"): 0.0,
    }


@pytest.mark.filterwarnings("error")  # it does not converge, and says nothing
def test_baselines_are_fitted_on_the_training_rows_for_each_output():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = (x[:, :2] > 0).astype(float)
    train = datasets.Split(np.arange(60), x, y)
    test = datasets.Split(np.arange(10), x[:10], 1 - y[:10])  # nothing to learn from
    found = metrics.fit_baselines({"train": train, "test": test}, (4,), seed=0)
    assert set(found) == {"logistic regression", "MLPClassifier"}
    for by_split in found.values():
        assert by_split["train"].shape == (60, 2)
        np.testing.assert_allclose(by_split["test"], by_split["train"][:10])
    accuracy = np.mean((found["logistic regression"]["train"] > 0.5) == y, axis=0)
    assert accuracy.min() > 0.9
