"""Metrics of logits."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import OneHotEncoder
from threadpoolctl import threadpool_limits

import jaxbce
from experiments.support import datasets, metrics


def test_metrics_are_what_their_names_say():
    y = np.array([0, 0, 1, 1])
    found = metrics.score(y, logit([1e-300, 0.6, 0.6, 1 - 1e-16]))
    assert np.isclose(found["log_loss"], -np.log([1, 0.4, 0.6, 1]).mean())
    assert found["accuracy"] == 0.75
    assert found["roc_auc"] == 0.875
    assert np.isclose(found["brier_score"], (0.36 + 0.16) / 4)
    assert np.isclose(found["calibration_error"], abs(1 - 1.2) / 4)
    assert set(metrics.HEADINGS) < set(found) | set(metrics.decide(y, y - 0.5, 0.0))


def test_every_metric_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    a = rng.normal(scale=4, size=500).round(1)  # with ties
    y = (rng.random(500) < expit(a / 2)).astype(float)
    p = expit(a)
    threshold = metrics.best_threshold(y, a)
    label = a > threshold
    found = metrics.score(y, a) | metrics.decide(y, a, threshold)
    expected = {
        "base_rate": y.mean(),
        "log_loss": sklearn_metrics.log_loss(y, p),
        "accuracy": sklearn_metrics.accuracy_score(y, p > 0.5),
        "roc_auc": sklearn_metrics.roc_auc_score(y, a),
        "average_precision": sklearn_metrics.average_precision_score(y, a),
        "brier_score": sklearn_metrics.brier_score_loss(y, p),
        "calibration_error": metrics.calibration_error(y, p),  # has a test of its own
        "threshold": expit(threshold),
        "precision": sklearn_metrics.precision_score(y, label),
        "recall": sklearn_metrics.recall_score(y, label),
        "f1": sklearn_metrics.f1_score(y, label),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(y, label),
    }
    names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
    counts = sklearn_metrics.confusion_matrix(y, label).ravel()
    expected |= dict(zip(names, counts, strict=True))
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


def test_a_criterion_is_the_mean_of_a_metric_over_outputs():
    rng = np.random.default_rng(2)
    a = rng.normal(size=(50, 2))
    y = (rng.random((50, 2)) < expit(a)).astype(float)
    for name in metrics.CRITERIA:
        each = [
            (metrics.score(*pair) | metrics.decide(*pair, 0.0))[name]
            for pair in zip(y.T, a.T, strict=True)
        ]
        assert np.isclose(metrics.criterion(name, y, a), np.mean(each), rtol=1e-15)


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(3)
    for shift in (-4.0, 0.0, 4.0):
        a = rng.normal(size=60).round(1)
        y = (rng.random(60) < expit(3 * a + shift)).astype(float)
        best = metrics.decide(y, a, metrics.best_threshold(y, a))["f1"]
        others = [metrics.decide(y, a, t)["f1"] for t in np.arange(-3.05, 3, 0.1)]
        assert best == max(others)
    # In the middle of two labels that are apart; below all if all have label 1.
    assert metrics.best_threshold(np.array([0, 0, 1.0]), np.array([-1, 2, 5.0])) == 3.5
    assert metrics.best_threshold(np.ones(2), np.array([-1.0, 2.0])) == -2


def test_decisions_without_one_of_the_labels_have_the_rest():
    y, a = np.zeros(3), np.array([-1.0, 2.0, -3.0])
    found = metrics.score(y, a) | metrics.decide(y, a, 0.0)
    assert np.isnan([found["roc_auc"], found["average_precision"]]).all()
    assert (found["precision"], found["recall"], found["f1"]) == (0, 0, 0)
    assert found["balanced_accuracy"] == found["accuracy"] == 2 / 3
    assert (found["true_negatives"], found["false_positives"]) == (2, 1)


def test_logits_of_any_size_count_as_what_they_are():
    rng = np.random.default_rng(1)
    a = rng.normal(size=200) * 10 ** rng.uniform(-3, 3, 200)  # up to thousands
    y = rng.integers(0, 2, 200).astype(float)
    wrong = (1 - 2 * y) * a.astype(np.longdouble)
    expected = np.logaddexp(0, wrong).mean()
    np.testing.assert_allclose(metrics.log_loss(y, a), float(expected), rtol=1e-14)
    # Their probabilities are all 1, but the logits are in the right order.
    assert metrics.score(np.array([0, 0, 1, 1]), np.arange(40.0, 44))["roc_auc"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_computed_in_float64_whatever_the_parameters(dtype):
    params = jaxbce.init(jax.random.key(0), (3, 4, 2), dtype=dtype)
    x = np.random.default_rng(0).normal(size=(5, 3))
    (w_1, b_1), (w_2, b_2) = jax.tree.map(lambda t: np.asarray(t, np.float64), params)
    expected = np.maximum(x @ w_1 + b_1, 0) @ w_2 + b_2
    found = metrics.logits(params, x)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert jnp.zeros(()).dtype == np.float32  # as before


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
    right, wrong = np.where(y, 2.0, -2.0), np.where(y, -0.5, 0.5)
    logits = {
        "one": {"train": right, "test": wrong},
        "other": {"train": wrong, "test": np.stack([right[:, 0], wrong[:, 1]], 1)},
    }
    rows = metrics.table(splits, ["a", "b"], logits)
    thresholds = {"one": [3.0, 0.0], "other": [0.0, -3.0]}
    both = metrics.decision_table(splits, ["a", "b"], logits, thresholds)
    kept = ("model", "split", "target")
    assert [[r[k] for k in kept] for r in both[::2]] == [
        [r[k] for k in kept] for r in rows
    ]
    assert {r["threshold"] for r in both[::2]} == {0.5}
    labeled = [r["true_positives"] + r["false_positives"] for r in both[1::2]]
    assert labeled == [0, 2, 2, 4, 0, 2, 2, 4]
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


def test_importances_are_those_of_the_columns_that_matter():
    rng = np.random.default_rng(0)
    features = pd.DataFrame(
        {"a $x$": rng.normal(size=300), "idle": rng.normal(size=300)}
    )
    features["color"] = np.where(rng.random(300) < 0.5, "red", "blue")
    y = (features["color"] == "red").to_numpy(float)[:, None]
    preprocessor = make_column_transformer(
        ("passthrough", ["a $x$", "idle"]), (OneHotEncoder(), ["color"])
    ).fit(features)
    weights = np.array([[0.5], [0.0], [0.0], [4.0]])  # blue, red are the last
    found = metrics.permutation_importances(
        preprocessor, lambda x: x @ weights - 2, features, y, seed=0
    )
    assert found["column"].tolist() == ["color", "a $x$", "idle"]
    color, a, idle = found["importance"]
    assert (idle, found["standard_deviation"].iloc[-1]) == (0, 0)
    # Half of the permuted labels are wrong, by a logit of 2 or so.
    assert 0.5 < color < 1.5
    assert abs(a) < 0.1


@pytest.mark.filterwarnings("error")  # it does not converge, and says nothing
def test_baselines_are_fitted_on_the_training_rows_for_each_output():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = (x[:, :2] > 0).astype(float)
    train = datasets.Split(np.arange(60), x, y)
    test = datasets.Split(np.arange(10), x[:10], 1 - y[:10])  # nothing to learn from
    splits = {"train": train, "test": test}
    found = metrics.fit_baselines(["mlp", "logistic"], splits, (4,), seed=0)
    assert list(found) == ["MLPClassifier", "logistic regression"]
    assert metrics.fit_baselines([], splits, (4,), seed=0) == {}
    for by_split in found.values():
        assert by_split["train"].shape == (60, 2)
        np.testing.assert_allclose(by_split["test"], by_split["train"][:10])
    accuracy = np.mean((found["logistic regression"]["train"] > 0) == y, axis=0)
    assert accuracy.min() > 0.9


def test_logits_of_baselines_give_the_probabilities_of_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 2))
    y = (x.sum(axis=1) + rng.normal(size=80) > 0).astype(float)[:, None]
    split = datasets.Split(np.arange(80), x, y)
    names = list(metrics.BASELINES)
    found = metrics.fit_baselines(names, {"train": split}, (4,), seed=0)
    models: Any = {
        "logistic regression": LogisticRegression(max_iter=1000),
        "MLPClassifier": MLPClassifier((4,), random_state=0),
        "gradient boosting": HistGradientBoostingClassifier(random_state=0),
    }
    assert set(found) == set(models)
    for name, model in models.items():
        with warnings.catch_warnings(), threadpool_limits(1, "openmp"):
            warnings.simplefilter("ignore", ConvergenceWarning)
            p = model.fit(x, y[:, 0]).predict_proba(x)[:, 1]
        np.testing.assert_allclose(expit(found[name]["train"][:, 0]), p, rtol=1e-12)
