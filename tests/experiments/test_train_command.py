"""`experiments.train`: what it reaches, saves, resumes and refuses."""

import gc
import json
import os
import resource
import shutil
import signal
import time
from typing import Any

import jax
import joblib
import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from scipy.special import expit
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris

from experiments import train
from experiments.support import (
    artifacts,
    chunked_fit,
    datasets,
    metrics,
    output,
    plots,
    resumable,
)
from experiments.support.cli import InputError
from experiments.support.config import OptimizerConfig, TrainingConfig
from tests.experiments.files import odd_keys
from tests.helpers import run_command, start

pytestmark = pytest.mark.usefixtures("standard_promotion")

MOONS = datasets.load(dataset="moons")
SCORES = ("logit", "probability")
TOY: Any = {"num_steps": 30, "hidden": (8,), "batch_size": 0, "evaluate_every": 10}
OPTIMIZER = OptimizerConfig(learning_rate=0.1)


def moons(
    *, optimizer=OPTIMIZER, table=MOONS, folder=None, gradient="manual", **options
):
    return train.run(
        table=table,
        optimizer=optimizer,
        training=TrainingConfig(**(TOY | options)),
        gradient=gradient,
        make_folder=lambda: folder,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a toy run, to be read or copied."""
    folder = tmp_path_factory.mktemp("finished")
    with jax.numpy_dtype_promotion("standard"):
        moons(folder=folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the folder of a toy run, to be changed."""
    return shutil.copytree(finished, tmp_path / "copied")


# ------------------------------------------------------------------ what it reaches


@pytest.mark.slow
def test_five_seeds_of_digits_reach_98_percent():
    table = datasets.load(dataset="digits")
    accuracy = [
        row["accuracy"]
        for seed in range(5)
        for row in train.run(
            table=table,
            optimizer=OptimizerConfig(),
            training=TrainingConfig(seed=seed),
        )["metrics"]
        if row["split"] == "test"
    ]
    assert len(accuracy) == 5
    assert np.mean(accuracy) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [0, 32], ids=["all", "batches"])
def test_manual_and_autodiff_have_one_loss_curve(batch_size):
    rows = np.flatnonzero((MOONS.y[:, 0] == 0) | (np.arange(1000) % 3 == 0))
    table = MOONS._replace(features=MOONS.features.iloc[rows], y=MOONS.y[rows])
    options: Any = {"dtype": "float64", "pos_weight": "balanced", "num_steps": 300}
    options |= {"batch_size": batch_size, "evaluate_every": 15, "table": table}
    optimizer = OptimizerConfig(learning_rate=0.03, weight_decay=0.01)
    results = [
        moons(gradient=gradient, optimizer=optimizer, **options)
        for gradient in ("manual", "autodiff")
    ]
    curves = [
        [(row["train_loss"], row["validation_loss"]) for row in result["history"]]
        for result in results
    ]
    (weight,) = results[0]["configuration"]["pos_weight"]
    assert 2 < weight < 4
    assert len(curves[0]) == 20
    np.testing.assert_allclose(*curves, rtol=1e-10)
    assert curves[0][-1][0] < 0.9 * curves[0][0][0]


def test_weights_balance_each_output():
    y = np.array([[0, 1], [0, 1], [0, 1], [1, 0]], float)
    assert train.positive_weights("balanced", y) == (3.0, 1 / 3)
    assert train.positive_weights(2.0, y) == (2.0, 2.0)


def test_probabilities_are_those_of_the_data_whatever_the_weights(tmp_path):
    """A network that tells two groups apart finds the rate of label 1 in each."""
    rows = np.arange(1000)
    second = rows % 2 == 1
    features = MOONS.features.assign(x1=1.0 * second, x2=1.0 * second)
    y = np.where(second, rows % 5 == 0, rows % 3 == 0)[:, None]
    result = moons(
        table=MOONS._replace(features=features, y=y.astype(float)),
        optimizer=OptimizerConfig(optimizer="sgd", learning_rate=0.5, weight_decay=0.0),
        folder=tmp_path,
        num_steps=400,
        evaluate_every=400,
        hidden=(),
        pos_weight=4.0,
        dtype="float64",
    )
    features.to_csv(tmp_path / "new.csv", index=False)
    artifacts.score(str(tmp_path / "new.csv"), tmp_path)
    kept = pd.read_csv(tmp_path / "predictions.csv")
    trained_on = (kept["split"] == "train").to_numpy()
    rates = [y[trained_on & (second == group)].mean() for group in (False, True)]
    assert 0.1 < rates[1] < 0.3 < rates[0] < 0.4
    for file in ("predictions.csv", "new.scored.csv"):
        found = pd.read_csv(tmp_path / file)
        np.testing.assert_allclose(
            found["probability of moon=lower"],
            np.where(second, *rates[::-1]),
            rtol=1e-9,
        )
        shift = found["uncorrected logit of moon=lower"] - found["logit of moon=lower"]
        np.testing.assert_allclose(shift, np.log(4), rtol=1e-12)
    train_row = next(row for row in result["metrics"] if row["split"] == "train")
    assert train_row["calibration_error"] < 1e-9


def test_patience_ends_a_run_and_the_best_parameters_are_kept():
    y = np.random.default_rng(0).permutation(MOONS.y)  # nothing to generalize
    options: Any = {"table": MOONS._replace(y=y), "num_steps": 3000, "patience": 200}
    result = moons(
        evaluate_every=20, optimizer=OptimizerConfig(learning_rate=0.05), **options
    )
    assert result["steps"] < 3000
    assert not result["diverged"]
    assert result["steps"] - result["best_step"] >= 200
    history = pd.DataFrame(result["history"])
    assert history["step"].iloc[-1] == result["steps"]
    best = history["validation_loss"].idxmin()
    assert result["best_step"] > 0
    assert history["step"][best] == result["best_step"]
    validation = next(r for r in result["metrics"] if r["split"] == "validation")
    assert np.isclose(
        validation["log_loss"], history["validation_loss"][best], rtol=1e-5
    )


@pytest.mark.slow
def test_the_best_parameters_and_patience_go_by_the_metric_asked_for(tmp_path):
    options: Any = {"num_steps": 200, "evaluate_every": 10}
    by_loss = moons(**options)
    result = moons(metric="roc_auc", folder=tmp_path, **options)
    history: Any = pd.DataFrame(result["history"])
    steps = [row["step"] for row in by_loss["history"]]
    assert history["step"].tolist() == steps
    losses = pd.DataFrame(by_loss["history"])  # the run is the same
    pd.testing.assert_frame_equal(history[losses.columns], losses, rtol=1e-5)
    best = history["validation_roc_auc"].idxmax()
    assert result["best_step"] == history["step"][best] != by_loss["best_step"]
    found = next(r for r in result["metrics"] if r["split"] == "validation")
    np.testing.assert_allclose(
        found["roc_auc"], history["validation_roc_auc"][best], rtol=1e-7
    )
    again = moons(metric="roc_auc", folder=tmp_path, **options)  # resumed at its end
    assert again["history"] == result["history"]
    assert again["best_step"] == result["best_step"]
    early = moons(metric="roc_auc", patience=30, **options)
    values = [row["validation_roc_auc"] for row in early["history"]]
    assert early["steps"] == early["best_step"] + 30 < 200
    assert early["best_step"] == 10 * (np.argmax(values) + 1)


# -------------------------------------------------------------------- what it saves


@pytest.fixture(scope="module")
def iris():
    """A table of two targets, with numbers and categories."""
    bunch: Any = load_iris(as_frame=True)
    return bunch.data.assign(
        color=np.where(bunch.target == 1, "blue", "red"),
        big=np.where(bunch.data["sepal length (cm)"] > 5.8, "yes", "no"),
        virginica=(bunch.target == 2).astype(int),
    )


@pytest.fixture(scope="module")
def trained(iris, tmp_path_factory):
    """The folder of a run of the command on a file, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    iris.to_csv(folder / "iris.csv", index=False)
    printed = run_command(
        "train",
        f"--data={folder / 'iris.csv'}",
        "--target=virginica,big",
        "--optimizer=adamw",
        "--optimizer_arg=b1=0.8",
        "--learning_rate=0.02",
        "--batch_size=0",
        "--hidden=8,8",
        "--num_steps=200",
        f"--output_dir={folder / 'out'}",
    )
    return folder / "out", printed


def test_it_prints_and_saves_results_that_say_what_made_them(trained):
    folder, (status, out, err) = trained
    assert (status, err) == (
        0,
        "iris.csv: 'sepal length (cm)': alone almost enough to predict 'big', which "
        "may "
        "be leakage; --drop leaves it out\n",
    )
    assert "iris.csv: 150 rows, columns: 4 number, 1 category" in out
    assert "label 1: virginica=1, big=yes" in out
    assert "all 200 steps taken." in out
    for name in ("logistic regression", "MLPClassifier", "gradient boosting"):
        assert out.count(f"\n{name} ") == (3 + 2) * 2
    assert "ROC AUC" in out
    assert max(map(len, out[out.index("\nmodel") :].splitlines()[:-1])) <= 100
    assert f"In {folder}: checkpoints, config.json, curves_1.png" in out
    document = json.loads((folder / "metrics.json").read_text())
    assert document["configuration"]["hidden"] == [8, 8]
    assert document["configuration"]["optimizer_args"] == {"b1": 0.8}
    assert document["environment"]["jax"]
    scores = pd.read_csv(folder / "metrics.csv")
    assert len(scores) == 3 * 4 * 2
    assert list(scores) == [
        *("model", "split", "target", "base_rate", "log_loss", "accuracy"),
        *("roc_auc", "average_precision", "brier_score", "calibration_error"),
    ]
    decisions = pd.read_csv(folder / "decisions.csv").to_dict("records")
    assert decisions == document["decisions"]
    assert len(decisions) == 2 * len(scores)
    found = scores.to_dict("records")
    assert found == document["metrics"]
    mine = [r for r in found if (r["split"], r["model"]) == ("train", "jaxbce")]
    assert [row["target"] for row in mine] == ["virginica", "big"]
    assert min(row["accuracy"] for row in mine) > 0.9
    losses = pd.read_csv(folder / "losses.csv")
    assert list(losses) == ["step", "train_loss", "validation_loss"]
    assert losses.to_dict("records") == document["history"]
    for name in ("losses", "curves_1", "curves_2", "importances"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    assert not list(folder.glob(".*partial*"))
    importances = pd.read_csv(folder / "importances.csv")
    assert importances["importance"].is_monotonic_decreasing
    assert len(importances) == 5
    assert "color" in set(importances["column"])


def test_keys_of_results_are_snake_case(trained):
    targets = r"((logit|probability) of )?(virginica=1|big=yes)"
    assert odd_keys(trained[0], ignored=targets) == {}
    model = joblib.load(trained[0] / "model.joblib")
    keys = {"schema", "preprocessor", "params", "classes", "pos_weight", "thresholds"}
    assert set(model) == keys


def test_new_rows_are_scored_by_the_saved_model(trained, iris, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "out")
    command = f"--output_dir={folder}"
    new = iris.drop(columns=["virginica", "big"])
    new.loc[0, "color"] = "green"  # one that training did not have
    new.to_parquet(tmp_path / "new.parquet")
    status, out, err = run_command(
        "train", f"--predict={tmp_path / 'new.parquet'}", command
    )
    assert status == 0
    assert out == f"150 rows scored: {folder / 'new.scored.csv'}\n"
    assert err == "new.parquet: 'color' is 'green' in 1 rows, not seen in training\n"
    scored: Any = pd.read_csv(folder / "new.scored.csv")
    kept = pd.read_csv(folder / "predictions.csv")
    assert scored["row"].tolist() == kept["row"].tolist() == list(range(1, 151))
    pd.testing.assert_frame_equal(scored[new.columns], new, check_dtype=False)
    names = [f"{s} of {t}" for s in SCORES for t in ("virginica=1", "big=yes")]
    names += ["predicted virginica", "predicted big"]
    assert list(scored) == ["row", *new.columns, *names]
    for name, column in (("virginica", [0, 1]), ("big", ["no", "yes"])):
        over = scored[f"logit of {name}={column[1]}"] > 0
        assert scored[f"predicted {name}"].tolist() == np.take(column, over).tolist()
    for target in ("virginica=1", "big=yes"):
        name = target.split("=")[0]
        assert kept[target].tolist() == iris[name].isin([1, "yes"]).astype(int).tolist()
        a = scored[f"logit of {target}"].to_numpy()
        b = kept[f"logit of {target}"].to_numpy()
        np.testing.assert_allclose(a[1:], b[1:], rtol=1e-12)
        assert a[0] != b[0]
        for table in (scored, kept):
            probability = expit(table[f"logit of {target}"])
            np.testing.assert_allclose(table[f"probability of {target}"], probability)
    again = artifacts.score(str(folder / "new.scored.csv"), folder, ["color"])
    rescored = pd.read_csv(again.path)
    assert list(rescored) == ["row", "color", *names]
    pd.testing.assert_frame_equal(rescored, scored[["row", "color", *names]])
    assert again.labeled == 0
    whole = artifacts.score(str(folder / "new.scored.csv"), folder)
    assert list(pd.read_csv(whole.path)) == list(scored)  # with its own "row"
    missing = new.drop(columns="color")
    missing.to_csv(tmp_path / "missing.csv", index=False)
    with pytest.raises(InputError, match="no column 'color'"):
        artifacts.score(str(tmp_path / "missing.csv"), folder)
    assert not (folder / "missing.scored.csv").exists()


def test_metrics_of_new_rows_with_labels_are_printed(trained, iris, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "out")
    new = iris.astype({"big": "category", "virginica": str})
    new.loc[:9, "big"] = None
    new.to_parquet(tmp_path / "new.parquet")
    flags = (f"--predict={tmp_path / 'new.parquet'}", f"--output_dir={folder}")
    status, out, err = run_command("train", *flags, "--id=color,big")
    assert (status, err) == (0, "")
    assert "150 rows scored" in out
    assert "140 rows have labels" in out
    scored = pd.read_csv(folder / "new.scored.csv")
    assert list(scored)[:4] == ["row", "color", "big", "logit of virginica=1"]
    y = iris["virginica"].to_numpy()[10:]
    a = scored["logit of virginica=1"].to_numpy()[10:]
    for name, value in metrics.score(y, a).items():
        if name != "base_rate":
            assert f"{value:.4f}" in out, name
    assert f"fraction of label 1 {y.mean():.4f} (new.parquet)" in out


def test_data_of_two_numbers_has_its_boundary_drawn(finished, tmp_path):
    assert (finished / "boundary.png").stat().st_size > 10_000
    renamed = MOONS.features.set_axis(["in_$_and_%_$", "x$^$"], axis=1)
    table = MOONS._replace(features=renamed, classes={"a$^$": (0, 1)})
    moons(table=table, folder=tmp_path)
    assert (tmp_path / "boundary.png").stat().st_size > 10_000
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize("label", ["中文=是", "a\tb \x07", "$x$ = $y$", "\U0001f600"])
def test_any_label_is_drawn_without_boxes(label, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    y, a = np.arange(8.0) % 2, np.linspace(-2, 2, 8)
    plots.curves(tmp_path / "curves.png", label, y, {label: a, "b": -a})
    (figure,) = drawn
    for text in figure.findobj(Text):  # a character that no font has is escaped
        known = set().union(
            *(
                plots._characters(font_manager.findfont(FontProperties(family=[name])))
                for name in text.get_fontfamily()
            )
        )
        assert set(text.get_text()) <= known, text
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2
    for axis in figure.axes:
        box = legend.get_window_extent()
        assert box.height > 0
        assert not box.overlaps(axis.get_window_extent())


# ------------------------------------------------------- what it resumes, or not

KILLED = (
    "--dataset=moons",
    "--hidden=16",
    "--num_steps=4000",
    "--evaluate_every=100",
    "--optimizer=noisy_sgd",
    "--optimizer_arg=key=3",
    "--schedule=cosine",
)


def files(folder):
    """What a finished run has left."""
    names = ("predictions.csv", "losses.csv", "metrics.csv", "metrics.json")
    return {name: (folder / name).read_bytes() for name in names}


def checkpoints(folder):
    """The evaluations after which there is a whole checkpoint, the last one last."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_ends_the_same_to_the_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    moments = [
        lambda: (killed / "config.json").exists(),
        lambda: max(checkpoints(killed), default=0) >= 10,
    ]
    for moment in moments:
        with start("train", *KILLED, f"--output_dir={killed}") as process:
            try:
                while not moment():
                    assert process.poll() is None, process.communicate()
                    time.sleep(0.001)
            finally:
                os.kill(process.pid, signal.SIGKILL)
            process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "metrics.json").exists()
    for folder in (whole, killed):
        with start("train", *KILLED, f"--output_dir={folder}") as process:
            try:
                _, err = process.communicate(timeout=600)
            finally:
                process.kill()
        assert process.returncode == 0, err
    assert files(killed) == files(whole)
    last = [folder / "checkpoints" / "40" / "default" for folder in (whole, killed)]
    assert all(path.exists() for path in last)


@pytest.mark.slow
def test_an_interrupt_is_one_line(tmp_path):
    options = ("--dataset=moons", "--batch_size=0", "--epochs=500000")
    with start("train", *options, f"--output_dir={tmp_path}") as process:
        try:
            while not checkpoints(tmp_path):
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            time.sleep(0.3)  # while Orbax saves, its event loop may drop an interrupt
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err == "train: interrupted\n"


def test_interrupted_and_resumed_it_ends_the_same_to_the_bit(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(chunked_fit, "CHUNKS", 5)
    options: Any = {"num_steps": 60, "evaluate_every": 3}  # 20 evaluations
    options["optimizer"] = OptimizerConfig(
        optimizer="noisy_sgd", optimizer_args={"key": 3}, schedule="cosine"
    )
    whole = moons(folder=tmp_path, **options)
    saves = []
    honest = resumable.Checkpoints.save

    def interrupted(self, step, tree):
        if not saves:  # before there is a checkpoint
            saves.append("none")
            raise KeyboardInterrupt
        honest(self, step, tree)
        saves.append(step)
        if step == 8 and len(saves) == 3:  # after the second one
            raise KeyboardInterrupt

    monkeypatch.setattr(resumable.Checkpoints, "save", interrupted)
    folder = tmp_path / "interrupted"
    folder.mkdir()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            moons(folder=folder, **options)
        assert not (folder / "metrics.json").exists()
        assert capsys.readouterr().out == ""  # from the start
    resumed = moons(folder=folder, **options)
    assert capsys.readouterr().out == "Resuming from step 24 of 60.\n"
    again = moons(folder=folder, **options)  # finished, it trains no more
    assert saves == ["none", 4, 8, 12, 16, 20]
    assert again["metrics"] == resumed["metrics"] == whole["metrics"]
    assert again["history"] == resumed["history"] == whole["history"]
    for a, b, c in zip(
        *(jax.tree.leaves(run["params"]) for run in (whole, resumed, again)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert files(folder) == files(tmp_path)


@pytest.mark.slow
def test_a_run_with_more_steps_continues_from_its_checkpoint(copied, tmp_path, capsys):
    longer = moons(folder=copied, num_steps=60, evaluate_every=15)
    assert capsys.readouterr().out == "Resuming from step 30 of 60.\n"
    assert [entry["step"] for entry in longer["history"]] == [10, 20, 30, 45, 60]
    whole = moons(num_steps=60, evaluate_every=15)
    assert longer["history"][-2:] == whole["history"][-2:]
    before = files(copied)
    refused: list[tuple[Any, str]] = [
        ({"num_steps": 30}, "num_steps=60 there, 30 here; use another"),
        ({"num_steps": 90, "seed": 1}, "num_steps=60 there, 90 here, seed=0 there, 1"),
    ]
    for options, message in refused:
        with pytest.raises(InputError, match=message):
            moons(folder=copied, **options)
    assert files(copied) == before
    cosine: Any = {"optimizer": OptimizerConfig(schedule="cosine")}
    (tmp_path / "cosine").mkdir()
    moons(folder=tmp_path / "cosine", **cosine)
    with pytest.raises(InputError, match="num_steps=30 there, 60 here"):
        moons(folder=tmp_path / "cosine", num_steps=60, **cosine)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    def write(path):
        with output.atomic_write(path) as partial:
            partial.write_bytes(bytes(2 << 20))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(InputError, match=r"large\.bin: File too large$"):
            write(tmp_path / "large.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(copied):
    before = files(copied)
    with pytest.raises(
        InputError, match=r"holds another run, with hidden=\[8\] there, \[9\] here; use"
    ):
        moons(folder=copied, hidden=(9,))
    assert files(copied) == before
    (copied / "config.json").unlink()
    with pytest.raises(InputError, match=r"has checkpoints but no config\.json"):
        moons(folder=copied)


EARLIER = {  # config.json of a run by an earlier version
    "data": "moons",
    "data_digest": datasets.digest(MOONS),
    "classes": {"moon": ["upper", "lower"]},
    "seed": 0,
    "hidden": [8],
    "optimizer": "adam",
    "optimizer_args": {},
    "learning_rate": 0.1,
    "schedule": "constant",
    "weight_decay": 1 / 600,
    "batch_size": None,
    "num_steps": 30,
    "evaluate_every": 10,
    "patience": None,
    "metric": "loss",
    "pos_weight": [1.0],
    "dtype": "float32",
    "gradient": "manual",
}
FLAGS = ("--dataset=moons", "--hidden=8", "--learning_rate=0.1", "--batch_size=0")
FLAGS += ("--num_steps=30", "--evaluate_every=10")


def test_a_folder_of_an_earlier_version_is_refused_and_left_as_it_is(copied):
    config = copied / "config.json"
    assert json.loads(config.read_text()) == {"format": 3, **EARLIER}
    config.write_text(json.dumps(EARLIER))
    before = files(copied)
    status, _, err = run_command("train", *FLAGS, f"--output_dir={copied}")
    assert status == 2
    assert err == (
        f"train: --output_dir={copied}: holds a run of another version of these "
        "experiments (format 1, expected 3); use another folder\n"
    )
    assert files(copied) == before
    assert json.loads(config.read_text()) == EARLIER


@pytest.mark.parametrize(
    "model",
    [
        {"preparation": None, "params": None, "classes": {}},
        {"preprocessor": None, "params": None, "classes": {}},
        {
            "preprocessor": ColumnTransformer([]),
            "params": (1,),
            "classes": {"y": (0, 1)},
        },
        {"params": None},
        [1],
        None,
    ],
    ids=["earlier", "empty", "unweighted", "part", "list", "none"],
)
def test_a_model_of_an_earlier_version_is_refused(copied, model):
    joblib.dump(model, copied / "model.joblib")
    MOONS.features.to_csv(copied / "new.csv", index=False)
    flags = (f"--predict={copied / 'new.csv'}", f"--output_dir={copied}")
    assert run_command("train", *flags) == (
        2,
        "",
        f"train: {copied / 'model.joblib'}: is not a model of this version of "
        "these experiments; train again\n",
    )
    assert not (copied / "new.scored.csv").exists()


# Orbax leaves coroutines of other arrays behind when one cannot be read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_files_are_one_clear_error(copied):
    (copied / "model.joblib").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.joblib: cannot be read \(EOFError\)"):
        artifacts.score("new.csv", copied)
    for path in (copied / "checkpoints").glob("*/default"):
        shutil.rmtree(path / "d", ignore_errors=True)
        for file in path.rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    with pytest.raises(InputError, match=r"checkpoint 3 cannot be read .*; delete it"):
        moons(folder=copied)
    gc.collect()
    (copied / "config.json").write_text("[]")
    with pytest.raises(InputError, match="expected the configuration of a run"):
        moons(folder=copied)


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ({}, {"batch_size": 601}, "--batch_size=601: moons has 600 rows to train on"),
        ({}, {"epochs": 3}, "expected --num_steps or --epochs, got both"),
        ({"optimizer": "adamm"}, {}, "--optimizer=adamm: expected one of .*adam, "),
        (
            {"optimizer_args": {"b1": "x"}},
            {},
            "--optimizer cannot be used like this: ",
        ),
        ({"optimizer": "noisy_sgd"}, {}, "--optimizer=noisy_sgd: Specifying a key"),
        ({}, {"pos_weight": -1.0}, "--pos_weight=-1.0: expected a finite number >= 0"),
        (
            {"learning_rate": float("nan")},
            {},
            "--learning_rate=nan: expected a finite number >= 0",
        ),
        (
            {"learning_rate": 1e30, "optimizer": "sgd"},
            {},
            "not finite at step .*, before the first evaluation; try a smaller --learn",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(optimizer, options, message, tmp_path):
    def make_folder():
        assert "before the first evaluation" in message  # others are noticed earlier
        return tmp_path

    with pytest.raises(InputError, match=message):
        train.run(
            table=MOONS,
            optimizer=OptimizerConfig(**optimizer),
            training=TrainingConfig(**(TOY | options)),
            make_folder=make_folder,
        )
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output_dir=PATH/file",), "file: is a file, not a folder"),
        (("--data=nowhere.csv", "--target=y", "--output_dir=PATH/new"), "No such file"),
        (("--predict=x.csv", "--output_dir=PATH"), "has no model of a finished run"),
        (("--predict=x.csv",), "--predict needs --output_dir"),
        (("--id=x", "--output_dir=PATH/new"), "--id needs --predict"),
        (("--batch_size=-1", "--output_dir=PATH/new"), "batch_size"),
        (("--optimizer=adamm", "--output_dir=PATH/new"), "--optimizer=adamm: expected"),
        (
            ("--baselines=svm",),
            "--baselines=svm: expected logistic, mlp, boosting, or none",
        ),
        (("--baselines=mlp,none",), "--baselines=none: expected logistic, mlp, boost"),
        (("--flip_fraction=0.1", "--output_dir=PATH/new"), "flip_fraction"),
    ],
)
def test_a_mistake_is_one_line_before_any_work_and_leaves_nothing(
    flags, message, tmp_path
):
    (tmp_path / "file").touch()
    own = [flag.replace("PATH", str(tmp_path)) for flag in flags]
    data = FLAGS[any(flag.startswith("--data=") for flag in flags) :]
    status, _, err = run_command("train", *data, *own)
    assert status == 2
    assert err.startswith("train: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_durations_are_needed_in_steps():
    with pytest.raises(ValueError, match="that `check` returned"):
        chunked_fit._evaluations_after(0, TrainingConfig())


def test_runs_that_stop_early_say_so(capsys):
    scores = metrics.score(np.array([0, 1]), np.array([-1.0, 1.0]))
    row = {"model": "jaxbce", "split": "test", "target": "moon"}
    early: Any = {"metrics": [row | scores], "decisions": [], "best_step": 5}
    early |= {"rows": {"train": 4, "test": 2}}
    known = {
        "num_steps": 9,
        "metric": "loss",
        "classes": MOONS.classes,
        "pos_weight": (3.0,),
    }
    for end, message in [
        ({"steps": 9, "diverged": False}, "all 9 steps taken."),
        (
            {"steps": 9, "diverged": False, "best_step": 9},
            "The best step is the last, so longer training may help: --epochs.",
        ),
        ({"steps": 5, "diverged": True}, "diverged at step 5."),
        ({"steps": 5, "diverged": False}, "stopped early at step 5, out of patience."),
    ]:
        train._report({"configuration": known, **early, **end})
        out = capsys.readouterr().out
        assert message in out
        assert "Rows: 4 for train, 2 for test\n" in out
        assert ("longer training" in out) == (end.get("best_step") == 9)
        assert "moon=lower has weight 3 in the loss" in out
        assert "The network's own 0.5 is a corrected probability of 0.2500." in out
