"""`experiments.leave_one_out`: the truth is retraining, estimates are the library's."""

import json
import shutil
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special, stats

import jaxbce
from experiments import leave_one_out
from experiments.support import datasets, plots, retraining, splitting
from experiments.support.cli import InputError
from jaxbce import laplace, per_example
from tests.experiments.files import odd_keys
from tests.helpers import run_command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

TOY: Any = {"hidden": (4,), "num_steps": 40, "chunk": 15}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of 50 rows, 30 of them to train on, with five features."""
    rng = np.random.default_rng(0)
    data = pd.DataFrame(rng.normal(size=(50, 5)), columns=list("abcde"))
    noise = rng.normal(size=50)
    data["label"] = np.where(data["a"] * data["b"] + noise > 0, "yes", "no")
    path = tmp_path_factory.mktemp("leave_one_out") / "mine.csv"
    data.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def table(file):
    return datasets.load(data=str(file), target=["label"])


@pytest.fixture(scope="module")
def command(file, tmp_path_factory):
    """The folder of a run of the command, its output, and what `run` returned."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    results = []

    def run(**options):
        results.append(original(**options, chunk=TOY["chunk"]))
        return results[0]

    original = leave_one_out.run
    with mock.patch.object(leave_one_out, "run", run):
        finished = run_command(
            "leave_one_out",
            *(f"--data={file}", "--target=label", "--hidden=4", "--num_steps=40"),
            f"--output_dir={folder}",
        )
    return folder, finished, results[0]


@pytest.fixture
def saved_run(command):
    """The folder and the result of that run."""
    return command[0], command[2]


@pytest.fixture(scope="module")
def network(table):
    """The objective of that run, the start, the learning rate and the network."""
    splits, _ = datasets.split(table, 0)
    (_, x, y), (_, x_test, y_test) = splits["train"], splits["test"]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x, y, x_test, y_test = map(jnp.asarray, (x, y, x_test, y_test))
        problem = retraining.Problem(x, y, x_test, y_test, tau=1.0)
        start, rate = retraining.minimize(problem, (4,), 40, 0)
        return problem, start, rate, retraining.descend(start, rate, problem, 40)


@pytest.fixture
def trained(network):
    """The same, for a test in float64."""
    with jax.enable_x64(True):
        yield network


@pytest.mark.slow
def test_the_truth_is_training_without_the_row(saved_run, trained):
    _, result = saved_run
    problem, start, rate, full = trained

    def evaluated(params, i):
        a = jaxbce.logits(params, problem.x)[i, 0]
        losses = [
            float(
                jaxbce.loss(
                    params, problem.x_test[j : j + 1], problem.y_test[j : j + 1]
                )
            )
            for j in range(len(problem.x_test))
        ]
        return float(a), np.array(losses)

    for i in (0, 14, 15, 29):  # of both chunks
        others = np.delete(np.arange(30), i)
        refitted = jaxbce.fit(
            jax.random.key(5),
            start,
            problem.x[others],
            problem.y[others],
            optimizer=retraining.momentum(rate, 40),
            penalty=retraining.gaussian_penalty(1.0 / 29),
            num_steps=40,
        )
        (own, losses), (own_before, before) = (
            evaluated(params, i) for params in (refitted.params, full)
        )
        truth = result["truth"]
        np.testing.assert_allclose(truth["own_logit"][i], own - own_before, atol=1e-9)
        np.testing.assert_allclose(truth["test_loss"][i], losses - before, atol=1e-9)
        assert np.abs(losses - before).max() > 1e-3


def test_estimates_are_those_of_the_library(saved_run, trained):
    _, result = saved_run
    (x, y, x_test, y_test, tau), _, _, full = trained
    posterior = laplace.posterior(full, x, y, tau)
    loo = laplace.leave_one_out(posterior)
    influence = laplace.influence(posterior, x_test, y_test)
    ell = jaxbce.bce_with_logits(jaxbce.logits(full, x), y)[:, 0]
    step, grad_dot = retraining.NEWTON, retraining.GRAD_DOT
    expected = {
        ("own_logit", step): (loo.logits - jaxbce.logits(full, x))[:, 0],
        ("own_loss", step): loo.loss - ell,
        ("own_loss", "influence"): jnp.diag(laplace.influence(posterior, x, y)),
        ("own_loss", "self-influence"): per_example.scores(full, x, y).grand ** 2,
        ("test_loss", step): influence / (1 - loo.leverage)[:, None],
        ("test_loss", "influence"): influence,
        ("test_loss", grad_dot): per_example.inner_products(full, x, y, x_test, y_test),
    }
    assert list(result["estimates"]) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(
            result["estimates"][name], values, rtol=1e-9, atol=1e-12
        )


def test_networks_reach_the_minima_that_scipy_finds(trained):
    """Without hidden layers the objective is convex."""
    problem = trained[0]
    x, y = np.asarray(problem.x), np.asarray(problem.y)[:, 0]

    def own_logit(i, weight):
        def objective(theta):
            a = x @ theta[:-1] + theta[-1]
            slopes = weight * (special.expit(a) - y)
            gradient = np.append(slopes @ x, slopes.sum()) + theta
            value = weight @ (np.logaddexp(0, a) - y * a) + theta @ theta / 2
            return value, gradient

        theta = optimize.minimize(objective, np.zeros(6), jac=True, tol=1e-12).x
        return x[i] @ theta[:-1] + theta[-1]

    start = jaxbce.init(jax.random.key(0), (5, 1), dtype="float64")
    full = retraining.descend(start, 1.0, problem, 500)
    found: Any = retraining.retrain(start, 1.0, problem, 500, np.arange(15))
    before = retraining.evaluate(full, problem)
    assert before["gradient_norm"] < 1e-9
    assert found["gradient_norm"].max() < 1e-9
    for i in (3, 12):
        expected = own_logit(i, np.ones(30)), own_logit(i, np.arange(30) != i)
        actual = before["own_logit"][i], found["own_logit"][i]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def spearman(a, b) -> Any:
    return stats.spearmanr(a, b)[0]


def pearson(a, b) -> Any:
    return stats.pearsonr(a, b)[0]


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(20, 4)).round(1)  # with ties
    estimate = truth + rng.normal(size=(20, 4))
    truth[:, 3] = 7.0  # constant
    row, mean_row = leave_one_out.compare(
        {"test_loss": truth}, {("test_loss", "guess"): estimate}
    )
    columns = [(truth[:, j], estimate[:, j]) for j in range(3)]
    found = [row[n] for n in ("lower_quartile", "rank_correlation", "upper_quartile")]
    ranks = [spearman(*pair) for pair in columns]
    np.testing.assert_allclose(found, np.quantile(ranks, [0.25, 0.5, 0.75]))
    values = [pearson(*pair) for pair in columns]
    np.testing.assert_allclose(row["pearson"], np.median(values))
    means = truth.mean(axis=1), estimate.mean(axis=1)
    assert (row["quantity"], mean_row["quantity"]) == ("test_loss", "mean_test_loss")
    np.testing.assert_allclose(mean_row["rank_correlation"], spearman(*means))
    np.testing.assert_allclose(mean_row["pearson"], pearson(*means))
    assert "size" not in row


def test_the_size_is_relative_to_the_true_changes():
    truth = np.array([[1.0, -1.0], [4.0, 2.0], [0.0, 4.0]])
    for method in (leave_one_out.NEWTON, "influence"):
        row, mean_row = leave_one_out.compare(
            {"test_loss": truth}, {("test_loss", method): np.abs(truth) / 2}
        )
        assert row["size"] == 0.5
        assert mean_row["size"] == (0.5 + 1.5 + 1) / (0 + 3 + 2)


def test_a_constant_has_no_correlation():
    estimates = {("own_logit", "guess"): np.arange(9.0)}
    (row,) = leave_one_out.compare({"own_logit": np.ones(9)}, estimates)
    assert row["rank_correlation"] is None
    assert row["pearson"] is None


def test_a_result_is_saved_as_files(saved_run, table):
    folder, result = saved_run
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("config.json", "parts", "influence.csv"),
        *("leave_one_out.json", "leave_one_out.csv", "leave_one_out.png"),
    }
    assert (folder / "leave_one_out.png").read_bytes().startswith(b"\x89PNG")
    rows: Any = pd.read_csv(folder / "influence.csv")
    pd.testing.assert_frame_equal(rows, result["rows"])
    assert len(rows) == result["configuration"]["rows"] == 30
    assert rows["test_loss_change"].is_monotonic_decreasing
    labels = np.where(table.y[rows["row"] - 1, 0] == 1, "label=yes", "label=no")
    assert rows["label"].tolist() == labels.tolist()
    assert 0 < rows["leverage"].min() < rows["leverage"].max() < 1
    document = json.loads((folder / "leave_one_out.json").read_text(encoding="utf-8"))
    assert document["comparisons"] == result["comparisons"]
    assert len(document["comparisons"]) == 10
    assert document["seconds"]["retraining"] > 0
    assert odd_keys(folder) == {}


def test_an_interrupted_run_resumes_to_the_same_files(
    saved_run, table, tmp_path, capsys
):
    folder = shutil.copytree(saved_run[0], tmp_path / "copied")
    names = ("influence.csv", "leave_one_out.csv", "leave_one_out.png")
    expected = {name: (folder / name).read_bytes() for name in names}
    for name in (*names, "parts/1.parquet"):
        (folder / name).unlink()
    leave_one_out.run(**TOY, table=table, make_folder=lambda: folder)
    assert "Resuming: 15 of 30 networks" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in names} == expected


def test_a_folder_of_another_run_is_refused_before_training(
    saved_run, table, monkeypatch
):
    folder, _ = saved_run

    def trained(*_):
        raise AssertionError("a network was trained")

    monkeypatch.setattr(retraining, "minimize", trained)
    with pytest.raises(InputError, match=r"another run.*prior_precision=1\.0 there"):
        leave_one_out.run(
            **TOY, prior_precision=2.0, table=table, make_folder=lambda: folder
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior_precision": 0.0}, "--prior_precision=0: expected a finite number > 0"),
        ({"prior_precision": -1.0}, "--prior_precision=-1: expected a finite number"),
        ({"prior_precision": np.nan}, "--prior_precision=nan: expected a finite"),
        ({"prior_precision": np.inf}, "--prior_precision=inf: expected a finite"),
        ({"dtype": "bfloat16"}, "--dtype=bfloat16: expected float64 or float32"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(table, change, message):
    def none():
        raise AssertionError("a folder was made")

    with pytest.raises(InputError, match=message):
        leave_one_out.run(table=table, **TOY, **change, make_folder=none)


def test_a_prior_that_overflows_is_refused(table):
    options: Any = TOY | {"prior_precision": 1e300}
    with pytest.raises(InputError, match=r"--prior_precision=1e\+300: is too large"):
        leave_one_out.run(table=table, **options)


def test_correlations_of_huge_numbers_are_finite():
    estimates = {("own_logit", "guess"): np.array([1e200, -3e200, 2e200])}
    truth = {"own_logit": np.array([1.0, -3.0, 2.0])}
    (row,) = leave_one_out.compare(truth, estimates)
    np.testing.assert_allclose((row["rank_correlation"], row["pearson"]), 1)


def test_several_targets_are_refused(table):
    two = table._replace(y=np.repeat(table.y, 2, axis=1))
    with pytest.raises(InputError, match="--target: expected one target, got several"):
        leave_one_out.run(table=two)


def test_a_sample_has_the_shares_of_the_labels():
    labels = np.repeat([0.0, 1.0], [80, 20])
    rows = splitting.sample(labels, 10, 3)
    assert (np.diff(rows) > 0).all()
    assert labels[rows].sum() == 2
    assert rows.tolist() != splitting.sample(labels, 10, 4).tolist()
    np.testing.assert_array_equal(splitting.sample(labels, 500, 3), np.arange(100))


def test_the_most_helpful_and_harmful_images_are_drawn(tmp_path):
    rows = pd.DataFrame({"row": np.arange(30), "label": "digit=odd"})
    images = np.random.default_rng(0).random((30, 8, 8))
    plots.influential(tmp_path / "drawn.png", rows, images)
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_comparisons(command):
    folder, finished, result = command
    assert (finished.status, finished.err) == (0, "")
    assert "The objective on 30 rows is " in finished.out
    assert "for training without each row; " in finished.out
    for row in result["comparisons"]:
        line = f"{row['quantity']:<14}  {row['method']:<15}"
        assert f"{line}  {row['rank_correlation']:>18.3f}" in finished.out
    assert f"In {folder}: config.json, influence.csv, leave_one_out" in finished.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prior_precision=0",), "--prior_precision=0: "),
        (("--num_rows=2",), "num_rows=2"),
        (("--hidden=4,x",), "--hidden=4,x: "),
        (("--data=no.csv", "--target=y"), "no.csv: No such file or directory"),
        (("--epochs=3",), "--epochs is not a flag of this command"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message):
    finished = run_command("leave_one_out", *flags)
    assert finished.status == 2
    assert finished.err.startswith("leave_one_out: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1
