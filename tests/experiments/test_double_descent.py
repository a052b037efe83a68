"""`experiments.double_descent`: its data, plain training runs, and the peak."""

import json
import shutil
import signal
import sys
import time
import types
from typing import Any
from unittest import mock

import jax
import numpy as np
import pandas as pd
import pytest
from mnist1d.data import get_dataset_args, make_dataset

import jaxbce
from experiments import double_descent
from experiments.support import cli, plots
from tests.experiments.files import odd_keys
from tests.helpers import loss_reference, run_command, start

# One batch of all training rows, so that the order of examples has no effect.
TOY: Any = {"widths": (6, 3), "seeds": 2, "epochs": 30, "train_rows": 100}
TOY |= {"noise": 0.5, "dtype": "float64", "seed": 5}
FLAGS = ("--widths=6,3", "--seeds=2", "--epochs=30", "--train_rows=100")
FLAGS += ("--noise=0.5", "--dtype=float64", "--seed=5")

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A folder with a run, and the run's result."""
    folder = tmp_path_factory.mktemp("double_descent")
    with jax.numpy_dtype_promotion("standard"):
        return folder, double_descent.run(**TOY, make_folder=lambda: folder)


# -------------------------------------------------------------------------- the data


def test_the_data_are_those_of_the_notebook():
    options: Any = get_dataset_args()
    options.num_samples, options.train_split = 400, 0.25
    expected = make_dataset(options)
    data = double_descent.make_data(100, 0.0, seed=3)
    np.testing.assert_array_equal(data.x, expected["x"])
    np.testing.assert_array_equal(data.labels, expected["y"])
    np.testing.assert_array_equal(data.x_test, expected["x_test"])
    np.testing.assert_array_equal(data.test_labels, expected["y_test"])
    assert data.wrong_labels == 0


def test_a_number_of_rows_that_classes_do_not_divide_is_possible():
    data = double_descent.make_data(101, 0.0, seed=3)
    assert data.x.shape == (101, 40)
    assert data.x_test.shape == (303, 40)
    assert len(data.labels) == 101
    assert len(data.test_labels) == 303


def test_the_noise_replaces_training_labels_alone():
    right = double_descent.make_data(200, 0.0, seed=3)
    noisy, other = (double_descent.make_data(200, 0.4, seed) for seed in (3, 4))
    for data in (noisy, other):
        np.testing.assert_array_equal(data.x, right.x)
        np.testing.assert_array_equal(data.test_labels, right.test_labels)
        assert data.wrong_labels == np.sum(data.labels != right.labels)
        # 200 labels, each wrong with probability 0.4 × 0.9: four standard deviations
        assert abs(data.wrong_labels - 72) < 4 * 6.8
        is_wrong = data.labels != right.labels
        assert set(data.labels[is_wrong]) == set(range(10))
        assert set((data.labels - right.labels) % 10) == set(range(10))
    assert (noisy.labels != other.labels).any()
    again = double_descent.make_data(200, 0.4, seed=3)
    np.testing.assert_array_equal(noisy.labels, again.labels)


# ---------------------------------------------------------------------- the networks


def test_a_network_is_a_plain_loop(saved_run):
    networks = saved_run[1]["networks"]
    data = double_descent.make_data(100, 0.5, seed=5)
    assert networks["width"].tolist() == [3, 3, 6, 6]
    assert networks["seed"].tolist() == [0, 1, 0, 1]

    @jax.jit
    def step(params, velocity, y):
        grads = jax.grad(loss_reference)(params, data.x, y)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        return jax.tree.map(lambda p, v: p - 0.01 * v, params, velocity), velocity

    with jax.enable_x64(True):
        y, y_test = (np.eye(10)[t] for t in (data.labels, data.test_labels))
        for _, row in networks.iterrows():
            width = int(row["width"])
            key = jax.random.fold_in(jax.random.key(5), int(row["seed"]))
            sizes = (40, width, width, 10)
            params = jaxbce.init(jax.random.split(key)[0], sizes, dtype="float64")
            velocity = jax.tree.map(np.zeros_like, params)
            for _ in range(30):
                params, velocity = step(params, velocity, y)
            for name, x, labels, one_hot in (
                ("train", data.x, data.labels, y),
                ("test", data.x_test, data.test_labels, y_test),
            ):
                predicted = np.asarray(jaxbce.logits(params, x)).argmax(axis=1)
                assert row[f"{name}_error"] == np.mean(predicted != labels)
                np.testing.assert_allclose(
                    row[f"{name}_loss"], loss_reference(params, x, one_hot), rtol=1e-9
                )
            count = sum(leaf.size for leaf in jax.tree.leaves(params))
            assert row["parameters"] == count
    assert networks["train_loss"].nunique() == 4


@pytest.mark.slow
def test_shuffled_batches_learn():
    options = TOY | {"widths": (16,), "epochs": 100, "train_rows": 200, "noise": 0.0}
    (row,) = double_descent.run(**options)["widths"]
    # Chance is 0.9 with a standard deviation of 0.012 over 600 test rows.
    assert row["test_error"] < 0.85
    assert row["train_error"] < 0.75


def test_an_epoch_has_batches_of_100_of_which_the_last_may_be_smaller():
    found = []

    def sweep(*_, batch_size, num_steps, **__):
        found.append((batch_size, num_steps))
        raise cli.InputError("enough")

    with (
        mock.patch.object(jaxbce, "sweep", sweep),
        pytest.raises(cli.InputError, match="enough"),
    ):
        double_descent.run(**TOY | {"train_rows": 201, "epochs": 7})
    assert found == [(100, 21)]


def test_a_network_that_diverges_is_an_error(monkeypatch):
    monkeypatch.setattr(double_descent, "LEARNING_RATE", 1e200)
    with pytest.raises(cli.InputError, match="networks of width 6 diverged"):
        double_descent.run(**TOY)


# ------------------------------------------------------------------------ the results


def test_rows_have_means_and_standard_errors():
    networks = pd.DataFrame(
        {
            "width": [4, 4, 4, 9],
            "parameters": [7, 7, 7, 8],
            "train_error": [0.1, 0.2, 0.3, 0.4],
            "test_error": [0.5, 0.5, 0.8, 0.7],
            "train_loss": [1.0, 2.0, 3.0, 4.0],
            "test_loss": [5.0, 5.0, 5.0, 5.0],
        }
    )
    first, second = double_descent.summarize(networks, {9: 0.25})
    assert (first["width"], first["parameters"]) == (4, 7)
    np.testing.assert_allclose(first["train_error"], 0.2)
    np.testing.assert_allclose(first["train_error_se"], 0.1 / np.sqrt(3))
    np.testing.assert_allclose(first["test_error"], 0.6)
    np.testing.assert_allclose(first["test_error_se"], 0.1)
    assert (first["test_loss"], first["test_loss_se"]) == (5, 0)
    assert first["published_test_error"] is None
    assert (second["test_error"], second["test_error_se"]) == (0.7, None)
    assert second["published_test_error"] == 0.25


def curve(*errors):
    """Rows with these test errors, at widths 1, 2, ..."""
    return [{"width": i, "test_error": e} for i, e in enumerate(errors, 1)]


def test_the_peak_is_the_largest_rise():
    assert double_descent.find_peak(curve(0.9, 0.5, 0.75, 0.7, 0.25, 0.3)) == {
        "minimum_width": 2,
        "minimum_test_error": 0.5,
        "peak_width": 3,
        "peak_test_error": 0.75,
        "end_width": 5,
        "end_test_error": 0.25,
        "rise": 0.25,
        "fall": 0.5,
    }


def test_a_rise_at_the_end_falls_by_nothing():
    found: Any = double_descent.find_peak(curve(0.5, 0.25, 0.375))
    assert (found["peak_width"], found["end_width"]) == (3, 3)
    assert (found["rise"], found["fall"]) == (0.125, 0)


@pytest.mark.parametrize("errors", [(0.5,), (0.5, 0.4, 0.4, 0.1), (0.3, 0.1 + 0.2)])
def test_without_a_rise_there_is_no_peak(errors):
    assert double_descent.find_peak(curve(*errors)) is None


def test_the_published_errors_belong_to_the_settings_of_the_notebook():
    settings = {"epochs": 500, "train_rows": 4000}
    noisy = double_descent.published({**settings, "noise": 0.15})
    clean = double_descent.published({**settings, "noise": 0.0})
    assert list(noisy) == list(clean)
    assert list(noisy) == np.unique(np.geomspace(2, 300, 20, dtype=int)).tolist()
    assert (noisy[61], noisy[300], clean[300]) == (0.5402, 0.4547, 0.3725)
    for change in ({"noise": 0.1}, {"epochs": 499}, {"train_rows": 400}):
        assert not double_descent.published({**settings, "noise": 0.15, **change})


def test_a_result_is_saved_as_files(saved_run):
    folder, result = saved_run
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("config.json", "parts", "networks.csv"),
        *("double_descent.json", "double_descent.csv", "double_descent.png"),
    }
    networks: Any = pd.read_csv(folder / "networks.csv")
    pd.testing.assert_frame_equal(networks, result["networks"])
    document = json.loads((folder / "double_descent.json").read_text(encoding="utf-8"))
    assert document.pop("environment")["jaxbce"] == jaxbce.__version__
    assert document == {n: v for n, v in result.items() if n != "networks"}
    assert document["configuration"]["widths"] == [3, 6]
    assert document["configuration"]["test_rows"] == 300
    assert document["seconds"] > 0
    assert document["processor_seconds"] > 0
    means = pd.read_csv(folder / "double_descent.csv")
    assert means["test_error"].tolist() == [
        row["test_error"] for row in result["widths"]
    ]
    assert (folder / "double_descent.png").read_bytes().startswith(b"\x89PNG")
    assert odd_keys(folder) == {}


def test_an_interrupted_run_resumes_to_the_same_files(saved_run, tmp_path, capsys):
    folder = shutil.copytree(saved_run[0], tmp_path / "copied")
    names = ("networks.csv", "double_descent.csv", "double_descent.png")
    expected = {name: (folder / name).read_bytes() for name in names}
    for name in (*names, "parts/1.parquet"):
        (folder / name).unlink()
    double_descent.run(**TOY, make_folder=lambda: folder)
    assert "Resuming: 2 of 4 networks" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in names} == expected


def test_a_folder_of_another_run_is_refused_before_training(saved_run, monkeypatch):
    def trained(*_):
        raise AssertionError("a network was trained")

    monkeypatch.setattr(double_descent, "train", trained)
    options = TOY | {"noise": 0.25}
    with pytest.raises(cli.InputError, match=r"another run.*noise=0\.5 there, 0\.25"):
        double_descent.run(**options, make_folder=lambda: saved_run[0])


@pytest.mark.parametrize("published", [{}, {1: 0.7, 2: 0.5, 50: 0.4}])
def test_one_and_several_networks_are_drawn(tmp_path, published):
    row = {"train_error": 0.25, "test_error": 0.5, "train_error_se": None}
    rows = [{**row, "width": width, "test_error_se": 0.1} for width in (2, 9, 40)]
    for i, drawn in enumerate((rows, rows[:1])):
        path = tmp_path / f"{i}.png"
        plots.double_descent(path, drawn, published, 0.15)
        assert path.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------ the command


def test_the_command_prints_the_errors_and_the_peak(saved_run, tmp_path):
    result = saved_run[1]
    finished = run_command("double_descent", *FLAGS, f"--output_dir={tmp_path}")
    assert (finished.status, finished.err) == (0, "")
    assert "4 networks 40→w→w→10, w from 3 to 6, 30 epochs" in finished.out
    assert f"{result['wrong_labels']} of 100 training labels are wrong" in finished.out
    for row in result["widths"]:
        mean, error = (100 * row[n] for n in ("test_error", "test_error_se"))
        assert f"{mean:.2f} ± {error:.2f}" in finished.out
    assert "The test error " in finished.out
    assert "Training 4 networks took 0 min " in finished.out
    assert "notebook" not in finished.out  # whose settings are others
    assert f"In {tmp_path}: config.json, double_descent.csv" in finished.out
    finished = run_command("double_descent", *FLAGS, f"--output_dir={tmp_path}")
    assert finished.status == 0
    assert "Resuming: 4 of 4 networks" in finished.out


def test_a_fall_that_does_not_happen_is_not_printed(saved_run, capsys):
    result = saved_run[1] | {"peak": double_descent.find_peak(curve(0.5, 0.25, 0.375))}
    double_descent._report(result)
    out = capsys.readouterr().out
    assert "by 12.50 points, from 25.00% at width 2 to 37.50% at width 3.\n" in out


def test_the_notebook_is_beside_a_run_of_its_settings(saved_run, capsys):
    result: Any = dict(saved_run[1])
    rows = [row | {"published_test_error": 0.5402} for row in result["widths"]]
    settings = {"epochs": 500, "train_rows": 4000, "noise": 0.15, "seeds": 8}
    peak = double_descent.find_peak(curve(0.5, 0.25, 0.375, 0.125))
    result |= {"configuration": settings, "widths": rows, "peak": peak}
    result |= {"seconds": 90.2, "processor_seconds": 125.7}
    double_descent._report(result)
    out = capsys.readouterr().out
    assert out.count(" 54.02") == 2
    assert (
        "The test error rises by 12.50 points, from 25.00% at width 2 to 37.50% at "
        "width 3, and falls by 25.00 points to 12.50% at width 4."
    ) in out
    assert "networks took 1 min 30 s (2 min 6 s of processor time), incl" in out
    assert "12 min 43 s (50 min 49 s of processor time), on another mach" in out
    assert "for one network of each of 19 widths from 2 to 300." in out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--widths=",
            "--widths=: expected distinct comma-separated integers from 1 to",
        ),
        ("--widths=5,x", "--widths=5,x: expected distinct comma-separated"),
        ("--widths=5,0", "--widths=5,0: expected distinct comma-separated"),
        ("--widths=5,4097", "--widths=5,4097: expected distinct comma-separated"),
        ("--widths=5,7,5", "--widths=5,7,5: expected distinct comma-separated"),
        ("--noise=1.5", "--noise=1.5"),
        ("--noise=nan", "--noise=nan: expected a number in [0, 1]"),
        ("--train_rows=99", "train_rows=99"),
        ("--seeds=9999999999", "--seeds=9999999999: 9999999999 is not an integer"),
        ("--epochs=100000000", "--epochs=100000000: expected fewer than 2^31 steps"),
        ("--hidden=4", "--hidden is not a flag of this command"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flag, message):
    finished = run_command("double_descent", flag)
    assert finished.status == 2
    assert finished.err.startswith("double_descent: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1


def test_without_mnist1d_one_line_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    folder = tmp_path / "out"
    finished = run_command("double_descent", *FLAGS, f"--output_dir={folder}")
    assert finished.status == 2
    assert finished.err == (
        "double_descent: mnist1d is not installed; run pip install "
        "'jaxbce[phenomena]'\n"
    )
    assert not folder.exists()


def test_an_mnist1d_that_cannot_be_imported_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mnist1d", types.ModuleType("mnist1d"))
    monkeypatch.delitem(sys.modules, "mnist1d.data", raising=False)
    finished = run_command("double_descent", *FLAGS)
    assert finished.status == 2
    assert finished.err.startswith("double_descent: mnist1d cannot be imported: ")
    assert finished.err.count("\n") == 1


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_files(saved_run, tmp_path):
    flags = (*FLAGS, "--cpu_devices=2", f"--output_dir={tmp_path}")
    for name in ("config.json", "parts/0.parquet"):
        with start("double_descent", *flags) as process:
            while not (tmp_path / name).exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "double_descent.json").exists()
    with start("double_descent", *flags) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Resuming: 2 of 4 networks" in out
    for name in ("networks.csv", "double_descent.csv"):
        expected = (saved_run[0] / name).read_bytes()
        assert (tmp_path / name).read_bytes() == expected
