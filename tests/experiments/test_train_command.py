"""`experiments.train`: what it reaches, keeps, goes on with and refuses."""

import json
import os
import shutil
import signal
import time
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd
import pytest
from sklearn.datasets import load_iris

import jaxbce
from experiments import train
from experiments.support import artifacts, datasets, metrics, optimizers, resumable
from experiments.support.cli import InputError
from tests.helpers import start

pytestmark = pytest.mark.usefixtures("standard_promotion")


def moons(**options):
    options = {"num_steps": 60, "hidden": (8,), "with_baselines": False} | options
    return train.run(table=datasets.load(dataset="moons"), **options)


# ------------------------------------------------------------------ what it reaches


def test_five_seeds_of_digits_reach_98_percent_in_under_20_seconds():
    table = datasets.load(dataset="digits")
    start = time.perf_counter()
    accuracy = [
        row["accuracy"]
        for seed in range(5)
        for row in train.run(table=table, seed=seed, with_baselines=False)["metrics"]
        if row["part"] == "test"
    ]
    assert len(accuracy) == 5
    assert np.mean(accuracy) >= 0.98
    assert time.perf_counter() - start < 20


def test_manual_and_autodiff_have_one_loss_curve():
    options = {"dtype": "float64", "weight_decay": 0.01, "pos_weight": "balanced"}
    options |= {"num_steps": 300, "learning_rate": 0.03, "evaluate_every": 15}
    curves = [
        [
            (row["train loss"], row["validation loss"])
            for row in moons(gradient=gradient, **options)["history"]
        ]
        for gradient in ("manual", "autodiff")
    ]
    assert len(curves[0]) == 20
    np.testing.assert_allclose(*curves, rtol=1e-10)
    assert curves[0][-1][0] < 0.9 * curves[0][0][0]


def test_patience_ends_a_run_and_the_best_parameters_are_kept():
    result = moons(num_steps=3000, patience=200, learning_rate=0.05, evaluate_every=20)
    assert result["steps"] < 3000
    assert result["steps"] - result["best_step"] >= 200
    history = pd.DataFrame(result["history"])
    assert history["step"].iloc[-1] == result["steps"]
    best = history["validation loss"].idxmin()
    assert history["step"][best] == result["best_step"]
    validation = next(r for r in result["metrics"] if r["part"] == "validation")
    assert np.isclose(
        validation["log-loss"], history["validation loss"][best], rtol=1e-5
    )


def test_metrics_are_what_their_names_say():
    y = np.array([0, 0, 1, 1])
    p = np.array([0.0, 0.6, 0.6, 1.0])
    found = metrics.score(y, p)
    assert np.isclose(found["log-loss"], -np.log([1, 0.4, 0.6, 1]).mean())
    assert found["accuracy"] == 0.75
    assert found["ROC AUC"] == 0.875
    assert np.isclose(found["Brier score"], (0.36 + 0.16) / 4)
    assert np.isclose(found["calibration error"], abs(1 - 1.2) / 4)


def test_an_optimizer_is_built_as_asked():
    build = optimizers.build
    params = jaxbce.init(jax.random.key(0), (3, 1))
    ones = jax.tree.map(np.ones_like, params)

    def rate(optimizer, steps=0):
        state, updates = optimizer.init(params), params
        for _ in range(steps + 1):
            updates, state = optimizer.update(ones, state, params)
        return -float(updates[0].b[0])

    sgd, penalty = build("sgd", learning_rate=0.5, weight_decay=0.1)
    assert rate(sgd) == 0.5
    assert penalty == 0.1
    adamw, penalty = build("adamw", weight_decay=0.1, args=(("b1", 0.5),))
    assert penalty == 0.0
    assert np.isclose(rate(adamw), 0.003, rtol=1e-3)
    options = {"learning_rate": 1.0, "num_steps": 100}
    assert np.isclose(rate(build("sgd", schedule="cosine", **options)[0], 50), 0.5)
    decay = build("sgd", schedule="exponential", **options)[0]
    assert np.isclose(rate(decay, 50), 0.1)
    warm = build("sgd", schedule="warmup-cosine", **options)[0]
    assert rate(warm) == 0
    assert np.isclose(rate(warm, 10), 1)
    assert build("lbfgs")[1] == 0.0
    assert {"prodigy", "adamw", "muon"} <= set(optimizers.available())
    loss = optimizers.penalized(jaxbce.loss, 0.2)
    data = (params, np.ones((2, 3), np.float32), np.ones((2, 1)))
    extra = loss(*data) - jaxbce.loss(*data)
    assert np.isclose(extra, 0.1 * np.sum(np.square(params[0].w)))
    assert isinstance(sgd, optax.GradientTransformation)


# -------------------------------------------------------------------- what it keeps


def test_it_keeps_results_that_say_what_made_them_and_scores_new_rows(tmp_path):
    iris: Any = load_iris(as_frame=True)
    table = iris.data.assign(
        color=np.where(iris.target == 1, "blue", "red"),
        big=np.where(iris.data["sepal length (cm)"] > 5.8, "yes", "no"),
        virginica=(iris.target == 2).astype(int),
    )
    table.to_csv(tmp_path / "iris.csv", index=False)
    command = [f"--output_dir={tmp_path / 'out'}"]
    process = start(
        "train",
        f"--data={tmp_path / 'iris.csv'}",
        "--target=virginica,big",
        "--optimizer=adamw",
        "--optimizer_arg=b1=0.8",
        "--learning_rate=0.02",
        "--batch_size=0",
        "--hidden=8,8",
        "--num_steps=200",
        *command,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "iris.csv: 150 rows, 4 columns of numbers, 1 of categories" in out
    assert "label 1: virginica=1, big=yes" in out
    assert "logistic regression" in out
    assert err == ""
    folder = tmp_path / "out"
    document = json.loads((folder / "metrics.json").read_text())
    assert document["configuration"]["hidden"] == [8, 8]
    assert document["environment"]["jax"]
    metrics = pd.read_csv(folder / "metrics.csv")
    assert len(metrics) == 3 * 3 * 2
    found = metrics.to_dict("records")
    mine = [r for r in found if (r["part"], r["model"]) == ("train", "jaxbce")]
    assert min(row["accuracy"] for row in mine) > 0.9
    assert len(pd.read_csv(folder / "losses.csv")) == len(document["history"])
    for name in ("losses", "roc_and_reliability_1", "roc_and_reliability_2"):
        assert (folder / f"{name}.png").stat().st_size > 10_000

    new = table.drop(columns=["virginica", "big"])
    new.loc[0, "color"] = "green"  # one that training did not have
    new.to_parquet(tmp_path / "new.parquet")
    out, err = start(
        "train", f"--predict={tmp_path / 'new.parquet'}", *command
    ).communicate(timeout=120)
    assert err == "new.parquet: color is green in 1 rows, not seen in training\n"
    scored = pd.read_csv(folder / "new.scored.csv")
    kept = pd.read_csv(folder / "predictions.csv")
    for target in ("virginica=1", "big=yes"):
        assert set(kept[target]) == {0, 1}
        a = scored[f"probability of {target}"].to_numpy()
        b = kept[f"probability of {target}"].to_numpy()
        np.testing.assert_allclose(a[1:], b[1:], rtol=1e-5)
        assert a[0] != b[0]
    missing = new.drop(columns="color")
    missing.to_csv(tmp_path / "missing.csv", index=False)
    with pytest.raises(InputError, match="no column 'color'"):
        artifacts.score(str(tmp_path / "missing.csv"), folder)


def test_data_of_two_numbers_has_its_boundary_drawn(tmp_path):
    table = datasets.load(dataset="moons")
    renamed = table.features.set_axis(["in_$_and_%_$", "x$^$"], axis=1)
    table = table._replace(features=renamed, classes={"a$^$": (0, 1)})
    options: Any = {"num_steps": 20, "with_baselines": False}
    train.run(table=table, make_folder=lambda: tmp_path, **options)
    assert (tmp_path / "boundary.png").stat().st_size > 10_000
    assert not list(tmp_path.glob(".*partial*"))


# ------------------------------------------------------- what it goes on with, or not

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
    """What a finished run has left, and its parameters to the bit."""
    names = ("predictions.csv", "losses.csv", "metrics.csv", "metrics.json")
    return {name: (folder / name).read_bytes() for name in names}


def checkpoints(folder):
    """The evaluations after which there is a whole checkpoint, the last one last."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def test_killed_at_any_moment_and_resumed_it_ends_the_same_to_the_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start("train", *KILLED, f"--output_dir={whole}")
    moments = [
        lambda: (killed / "config.json").exists(),
        lambda: max(checkpoints(killed), default=0) >= 10,
    ]
    for moment in moments:
        again = start("train", *KILLED, f"--output_dir={killed}")
        while not moment():
            assert again.poll() is None, again.communicate()
            time.sleep(0.001)
        os.kill(again.pid, signal.SIGKILL)
        assert again.wait() == -signal.SIGKILL
        assert not (killed / "metrics.json").exists()
        again.communicate()
    again = start("train", *KILLED, f"--output_dir={killed}")
    for one in (process, again):
        _, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
    assert files(killed) == files(whole)
    last = [folder / "checkpoints" / "40" / "default" for folder in (whole, killed)]
    assert all(path.exists() for path in last)


def test_an_interrupt_is_one_line(tmp_path):
    options = ("--dataset=moons", "--epochs=200000", f"--output_dir={tmp_path}")
    process = start("train", *options)
    while not checkpoints(tmp_path):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "train: interrupted\n"


def test_parameters_after_a_resumption_are_the_same_to_the_bit(tmp_path, monkeypatch):
    from experiments.support import chunked_fit

    whole = moons(num_steps=200, evaluate_every=10)
    saves = []
    honest = resumable.Checkpoints.save

    def interrupted(self, step, tree):
        honest(self, step, tree)
        saves.append(step)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(resumable.Checkpoints, "save", interrupted)
    options = {"num_steps": 200, "evaluate_every": 10, "make_folder": lambda: tmp_path}
    with pytest.raises(KeyboardInterrupt):
        moons(**options)
    parts = moons(**options)
    again = moons(**options)  # finished, it says the same and trains no more
    assert saves == list(range(1, chunked_fit.CHUNKS + 1))
    assert again["metrics"] == parts["metrics"]
    for a, b in zip(
        jax.tree.leaves(whole["params"]), jax.tree.leaves(parts["params"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert whole["history"] == parts["history"]


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path):
    moons(make_folder=lambda: tmp_path)
    before = files(tmp_path)
    with pytest.raises(
        InputError, match=r"has another run, with hidden=\[8\] there, not"
    ):
        moons(make_folder=lambda: tmp_path, hidden=(9,))
    assert files(tmp_path) == before
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"checkpoints, but no config\.json"):
        moons(make_folder=lambda: tmp_path)


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        resumable.open_checkpoints(tmp_path, {"a": (1,)}),
        pytest.raises(InputError, match="another run is using it"),
        resumable.open_checkpoints(tmp_path, {"a": (1,)}),
    ):
        pass
    with resumable.open_checkpoints(tmp_path, {"a": (1,)}):
        pass


def test_damaged_files_are_one_clear_error(tmp_path):
    moons(make_folder=lambda: tmp_path)
    (tmp_path / "model.joblib").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.joblib: cannot be read"):
        artifacts.score("new.csv", tmp_path)
    for path in (tmp_path / "checkpoints").glob("*/default"):
        shutil.rmtree(path / "d", ignore_errors=True)
        for file in path.rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        moons(make_folder=lambda: tmp_path)
    for text in ("", "[]", "null", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match="not a run's configuration"):
            moons(make_folder=lambda: tmp_path)


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise ValueError(
            "RESOURCE_EXHAUSTED: No space left on device\nand a long story"
        )

    monkeypatch.setattr(resumable.ocp.CheckpointManager, "save", full)
    with pytest.raises(InputError, match=r"checkpoints: .*No space left on device$"):
        moons(make_folder=lambda: tmp_path)


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 601}, "--batch_size=601: moons has 600 rows to train on"),
        ({"epochs": 3}, "--num_steps and --epochs are two answers"),
        ({"optimizer": "adamm"}, "--optimizer=adamm: not one of .*adam, "),
        ({"optimizer_args": {"b3": 1}}, "--optimizer_arg=b3: adam takes learning_rate"),
        ({"optimizer_args": {"learning_rate": 1}}, "has a flag, --learning_rate"),
        ({"optimizer_args": {"b1": "x"}}, "--optimizer cannot be used so"),
        ({"optimizer": "noisy_sgd"}, "--optimizer=noisy_sgd: Specifying a key"),
        ({"optimizer": "lbfgs", "schedule": "cosine"}, "needs --learning_rate"),
        ({"optimizer": "polyak_sgd", "learning_rate": 1.0}, "takes no learning rate"),
        ({"pos_weight": -1.0}, "--pos_weight=-1.0: a finite number >= 0"),
        ({"pos_weight": "high"}, "--pos_weight=high: a finite number >= 0"),
        ({"learning_rate": float("nan")}, "--learning_rate=nan: not a finite number"),
        ({"weight_decay": -1.0}, "--weight_decay=-1.0: not a finite number >= 0"),
        ({"learning_rate": 1e30}, "not finite at step .*smaller --learning_rate"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        moons(**options)


def test_arguments_of_an_optimizer_are_read_from_text():
    found = optimizers.parse_args(["b1=0.5", "nesterov=True", "eps=1e-3", "mask=None"])
    assert found == {"b1": 0.5, "nesterov": True, "eps": 1e-3, "mask": None}
    for text in ("b1", "b1=", "b1=os.system", "=3", "b1=[1]", "b1=..."):
        with pytest.raises(InputError, match="not NAME=NUMBER, True or None"):
            optimizers.parse_args([text])
    with pytest.raises(InputError, match="given twice"):
        optimizers.parse_args(["b1=0.5", "b1=0.6"])


def test_a_mistake_is_one_line_before_any_work_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    mistakes = {
        (f"--output_dir={tmp_path}/file",): "file: a file, not a folder",
        ("--data=nowhere.csv", "--target=y"): "nowhere.csv: No such file",
        ("--predict=x.csv", f"--output_dir={tmp_path}"): "has no finished run",
        ("--batch_size=-1",): "batch_size",
    }
    folder = tmp_path / "new"
    started = {}
    for flags_ in mistakes:
        elsewhere = any("output_dir" in f or "predict" in f for f in flags_)
        kept = [] if elsewhere else [f"--output_dir={folder}"]
        started[flags_] = start("train", *flags_, *kept)
    for flags_, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, (flags_, out, err)
        assert err.startswith("train: ")
        assert mistakes[flags_] in err
        assert err.count("\n") == 1, err
    assert not folder.exists()
