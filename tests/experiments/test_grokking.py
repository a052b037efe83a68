"""`experiments.grokking`: plain training, and when networks generalize."""

import json
import re
import shutil
import signal
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from absl.testing import flagsaver

import jaxbce
from experiments import grokking
from experiments.support import plots
from experiments.support.cli import InputError
from tests.experiments.files import odd_keys
from tests.helpers import run_command, start

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Networks that learn one bit: with 40 rows at once, with 8 rows not before the end.
TOY: Any = {
    "rows": (8, 40),
    "weight_decays": (0.01, 0.0),
    "reference": (40, 0.01),
    "num_bits": 5,
    "parity_bits": 1,
    "test_rows": 50,
    "hidden": (8,),
    "learning_rate": 0.3,
    "batch_size": 8,
    "epochs": 6,
    "epochs_per_evaluation": 3,
    "seeds": 2,
    "dtype": "float64",
}
FLAGS = [
    *("--rows=8,40", "--weight_decays=0.01,0", "--reference=40,0.01", "--num_bits=5"),
    *("--parity_bits=1", "--test_rows=50", "--hidden=8", "--learning_rate=0.3"),
    *("--batch_size=8", "--epochs=6", "--epochs_per_evaluation=3", "--seeds=2"),
    "--dtype=float64",
]
FILES = {"curves.parquet", "networks.csv", "grokking.csv", "grokking.png"}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The folder of a run of the command, how it ended, and what `run` returned."""
    folder = tmp_path_factory.mktemp("grokking") / "run"
    results, original = [], grokking.run

    def run(**options):
        results.append(original(**options))
        return results[0]

    with mock.patch.object(grokking, "run", run):
        finished = run_command("grokking", *FLAGS, f"--output_dir={folder}")
    return folder, finished, results[0]


@pytest.fixture
def saved_run(command):
    """The folder and the result of that run."""
    return command[0], command[2]


def test_labels_are_the_parity_of_the_first_bits():
    x, y = grokking.make_data(50, 7, 3, (0, 1))
    assert set(np.unique(x)) == {-1.0, 1.0}
    odd = (x[:, :3] < 0).sum(axis=1) % 2 == 1
    np.testing.assert_array_equal(y[:, 0], ~odd)
    assert 0.2 < y.mean() < 0.8


def test_fewer_rows_are_the_first_of_more():
    x, y = grokking.make_data(50, 7, 3, 4)
    fewer_x, fewer_y = grokking.make_data(11, 7, 3, 4)
    np.testing.assert_array_equal(fewer_x, x[:11])
    np.testing.assert_array_equal(fewer_y, y[:11])


def test_a_network_is_a_plain_loop():
    """With full batches, whose order has no effect."""
    configuration = TOY | {"batch_size": 0, "epochs_per_evaluation": 4, "seed": 3}
    x, y = grokking.make_data(40, 5, 1, (3, 1, 0))
    x_test, y_test = grokking.make_data(50, 5, 1, (3, 1, 1))
    with jax.enable_x64(True):
        curves = grokking.train(40, 1, configuration)
        key = jax.random.fold_in(jax.random.key(3), 1)
        params = jaxbce.init(jax.random.split(key)[0], (5, 8, 1), dtype=jnp.float64)
        losses, train_losses, accuracies, train_accuracies = [], [], [], []
        for step in range(7):
            if step in (0, 4, 6):
                losses.append(float(jaxbce.loss(params, x_test, y_test)))
                train_losses.append(float(jaxbce.loss(params, x, y)))
                a, a_train = (np.asarray(jaxbce.logits(params, t)) for t in (x_test, x))
                accuracies.append(np.mean((a > 0) == y_test))
                train_accuracies.append(np.mean((a_train > 0) == y))
            grads = jaxbce.grad(params, x, y)
            params = jax.tree.map(lambda t, g: t - 0.3 * (g + 0.01 * t), params, grads)
    found: Any = curves[curves["weight_decay"] == 0.01]
    assert found["epoch"].tolist() == found["step"].tolist() == [0, 4, 6]
    np.testing.assert_allclose(found["test_loss"], losses, rtol=1e-12)
    np.testing.assert_allclose(found["train_loss"], train_losses, rtol=1e-12)
    assert found["test_accuracy"].tolist() == accuracies
    assert found["train_accuracy"].tolist() == train_accuracies
    others: Any = curves[curves["weight_decay"] == 0.0]
    np.testing.assert_allclose(others["test_loss"].iloc[0], losses[0], rtol=1e-12)
    assert (np.abs(others["test_loss"].iloc[1:] - losses[1:]) > 1e-4).all()


def test_sections_of_training_have_batches_of_their_own():
    keys, steps = [], []

    def sweep(key, *_, params, num_steps, **options):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        steps.append(num_steps)
        assert options["batch_size"] == 8
        return mock.Mock(params=params, diverged_at=np.full((2, 1), -1))

    configuration = TOY | {"epochs_per_evaluation": 4, "seed": 0}
    with mock.patch.object(jaxbce, "sweep", sweep), jax.enable_x64(True):
        for network_seed in (0, 1):
            curves = grokking.train(42, network_seed, configuration)
    assert len(set(keys)) == len(keys) == 4
    assert steps == [24, 12, 24, 12]  # of batches of 8, the last one of 2 rows
    assert curves["step"].unique().tolist() == [0, 24, 36]


def test_a_network_that_diverges_is_missing_from_then_on():
    configuration = TOY | {"weight_decays": (0.01, 1e300), "seed": 0}
    with jax.enable_x64(True):
        curves = grokking.train(40, 0, configuration)
        alone = grokking.train(40, 0, TOY | {"weight_decays": (0.01, 0.02), "seed": 0})
    scores = ["train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    diverged: Any = curves[curves["weight_decay"] == 1e300][scores]
    assert diverged.iloc[0].notna().all()
    assert diverged.iloc[1:].isna().all().all()
    other, expected = (t[t["weight_decay"] == 0.01][scores] for t in (curves, alone))
    np.testing.assert_array_equal(other, expected)
    networks = grokking.find_events(curves).set_index("weight_decay")
    assert np.isnan(networks.loc[1e300, "generalized_epoch"])
    assert np.isnan(networks.loc[1e300, "final_test_accuracy"])


def test_a_network_that_has_diverged_does_not_return():
    """Its next section starts from finite parameters, and may not diverge again."""
    found = iter([[[-1], [5]], [[-1], [-1]]])

    def sweep(*_, params, **__):
        return mock.Mock(params=params, diverged_at=np.array(next(found)))

    with mock.patch.object(jaxbce, "sweep", sweep), jax.enable_x64(True):
        curves = grokking.train(40, 0, TOY | {"seed": 0})
    is_missing = curves["test_loss"].isna().to_numpy().reshape(3, 2)
    np.testing.assert_array_equal(is_missing, [[False, False]] + 2 * [[False, True]])


def test_accuracy_is_counted_exactly():
    y = np.arange(50)[:, None] < 49
    layer: Any = jaxbce.Layer
    params = (layer(jnp.zeros((1, 1, 2, 1)), jnp.ones((1, 1, 1))),)  # always label 1
    found = grokking.evaluate(params, jnp.ones((50, 2)), y)
    assert found["accuracy"].tolist() == [0.98]
    assert found["accuracy"][0] >= grokking.ACCURACY


def history(rows, decay, seed, train, test):
    epochs = np.arange(len(train)) * 5
    return pd.DataFrame(
        {
            **{"rows": rows, "weight_decay": decay, "seed": seed, "epoch": epochs},
            **{"step": 3 * epochs, "train_accuracy": train, "test_accuracy": test},
        }
    )


def test_events_are_the_first_evaluations_at_which_they_hold():
    curves = pd.concat(
        [
            history(9, 0.1, 0, [0.5, 0.98, 0.9, 1.0], [0.5, 0.9, 0.99, 0.97]),
            history(9, 0.0, 0, [0.5, 0.9, 0.9799, 1.0], [0.5, 0.5, 0.5, 0.5]),
            history(4, 0.1, 0, [1.0, 0.5, 0.5, 0.5], [0.5, np.nan, np.nan, np.nan]),
        ]
    )
    found = grokking.find_events(curves)
    assert found["rows"].tolist() == [9, 9, 4]
    np.testing.assert_array_equal(found["memorized_epoch"], [5, 15, 0])
    np.testing.assert_array_equal(found["memorized_step"], [15, 45, 0])
    np.testing.assert_array_equal(found["generalized_epoch"], [10, np.nan, np.nan])
    np.testing.assert_array_equal(found["final_train_accuracy"], [1, 1, 0.5])


@pytest.mark.parametrize(
    ("epochs", "median", "count"),
    [
        ([5, 15, 10], 10, 3),
        ([5, np.nan, 10], 10, 2),
        ([np.nan, np.nan, 10], None, 1),
        ([np.nan, 10], None, 1),
        ([5, 10], 7.5, 2),
        ([np.nan, np.nan], None, 0),
    ],
)
def test_a_median_is_never_if_half_of_the_networks_never_got_there(
    epochs, median, count
):
    networks = pd.DataFrame(
        {
            **{"rows": 7, "weight_decay": 0.1, "memorized_epoch": 5.0},
            **{"generalized_epoch": epochs, "final_test_accuracy": 0.5},
        }
    )
    (point,) = grokking.summarize(networks)
    assert point["generalized_epoch"] == median
    assert (point["generalized"], point["networks"]) == (count, len(epochs))
    assert (point["memorized_epoch"], point["memorized"]) == (5, len(epochs))


@pytest.mark.parametrize(
    ("accuracies", "mean"), [([0.5, 1.0], 0.75), ([0.5, np.nan], 0.5), ([np.nan], None)]
)
def test_the_final_accuracy_is_the_mean_of_networks_that_have_not_diverged(
    accuracies, mean
):
    networks = pd.DataFrame(
        {
            **{"rows": 7, "weight_decay": 0.1, "memorized_epoch": 5.0},
            **{"generalized_epoch": 5.0, "final_test_accuracy": accuracies},
        }
    )
    (point,) = grokking.summarize(networks)
    assert point["final_test_accuracy"] == mean
    assert point["diverged"] == np.isnan(accuracies).sum()


def test_a_result_is_saved_as_files(saved_run):
    folder, result = saved_run
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == FILES | {"config.json", "parts", "grokking.json"}
    assert (folder / "grokking.png").read_bytes().startswith(b"\x89PNG")
    curves = pd.read_parquet(folder / "curves.parquet")
    pd.testing.assert_frame_equal(curves, result["curves"])
    assert len(curves) == 2 * 2 * 2 * 3  # rows, decays, seeds, evaluations
    networks: Any = pd.read_csv(folder / "networks.csv")
    pd.testing.assert_frame_equal(networks, result["networks"])
    document = json.loads((folder / "grokking.json").read_text(encoding="utf-8"))
    assert document["environment"]["device"]
    assert document["points"] == result["points"]
    assert document["configuration"]["reference"] == [40, 0.01]
    assert odd_keys(folder) == {}
    by_rows = {point["rows"]: point for point in result["points"]}
    assert by_rows[40]["generalized"] == 2
    assert by_rows[8]["generalized_epoch"] is None


def test_an_interrupted_run_resumes_to_the_same_files(saved_run, tmp_path, capsys):
    folder = shutil.copytree(saved_run[0], tmp_path / "copied")
    expected = {name: (folder / name).read_bytes() for name in FILES}
    for name in (*FILES, "parts/3.parquet"):
        (folder / name).unlink()
    grokking.run(**TOY, make_folder=lambda: folder)
    assert "Resuming: 6 of 8 networks" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in FILES} == expected


def test_a_folder_of_another_run_is_refused_before_training(saved_run):
    folder, _ = saved_run
    options = TOY | {"epochs": 7}
    with (
        mock.patch.object(grokking, "train", side_effect=AssertionError),
        pytest.raises(InputError, match=r"another run.*epochs=6 there, 7 here"),
    ):
        grokking.run(**options, make_folder=lambda: folder)


def test_another_reference_only_redraws_the_picture(saved_run, tmp_path):
    folder = shutil.copytree(saved_run[0], tmp_path / "copied")
    picture = (folder / "grokking.png").read_bytes()
    with mock.patch.object(grokking, "train", side_effect=AssertionError):
        result = grokking.run(
            **TOY | {"reference": (8, 0.0)}, make_folder=lambda: folder
        )
    assert result["points"] == saved_run[1]["points"]
    assert (folder / "grokking.png").read_bytes() != picture


@pytest.mark.parametrize(
    ("rows", "decays", "expected"),
    [
        ((600, 1000, 2000), (0.01, 0.02), (1000, 0.01)),
        ((600, 800), (0.01, 0.02), (800, 0.01)),
        ((1000, 1400), (0.0, 0.001), (1000, 0.001)),
    ],
)
def test_a_reference_that_is_not_set_is_one_that_is_trained(rows, decays, expected):
    with flagsaver.flagsaver(reference=None):
        assert grokking._reference(rows, decays) == expected


def test_a_plane_in_which_nothing_happened_is_drawn(saved_run, tmp_path):
    point = {"rows": 40, "weight_decay": 0.01, "networks": 2}
    for event in grokking.EVENTS:
        point |= {event: 0, f"{event}_epoch": None}
    path = tmp_path / "never.png"
    plots.grokking(path, saved_run[1]["curves"], [point], (40, 0.01), 0.98)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("accuracy", "diverged", "shown"),
    [(0.75, 0, "0.750"), (0.75, 1, "0.750 (1 diverged)"), (None, 3, "diverged")],
)
def test_networks_that_diverged_are_printed(capsys, accuracy, diverged, shown):
    point = {"rows": 40, "weight_decay": 0.01, "networks": 3, "diverged": diverged}
    for event in grokking.EVENTS:
        point |= {event: 0, f"{event}_epoch": None}
    grokking._report([point | {"final_test_accuracy": accuracy}])
    cells = re.split("  +", capsys.readouterr().out.splitlines()[-1].strip())
    assert cells == ["40", "0.01", "never", "never", shown]


def test_the_command_prints_the_points(command):
    folder, finished, result = command
    assert (finished.status, finished.err) == (0, "")
    assert "parity of 1 of 5 bits, networks 5→8→1: 2 numbers of rows" in finished.out
    assert "memorized at epoch    generalized at epoch" in finished.out
    lines = [line.split() for line in finished.out.splitlines()]
    for point in result["points"]:
        epoch = point["generalized_epoch"]
        ends = f"{point['rows']}", f"{point['final_test_accuracy']:.3f}"
        shown = "never" if epoch is None else f"{epoch:g}"
        assert any(
            line and (line[0], line[-1]) == ends and shown in line for line in lines
        )
    assert f"In {folder}: config.json, curves.parquet, grokking.csv" in finished.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--rows=8,x",),
            "--rows=8,x: expected distinct comma-separated integers from 1",
        ),
        (("--rows=0",), "--rows=0: expected distinct comma-separated integers from 1"),
        (
            ("--rows=8,8",),
            "--rows=8,8: expected distinct comma-separated integers from 1",
        ),
        (("--rows=9999999999",), "--rows=9999999999: expected distinct"),
        (
            ("--weight_decays=-1",),
            "--weight_decays=-1: expected distinct comma-separated finite",
        ),
        (
            ("--weight_decays=nan",),
            "--weight_decays=nan: expected distinct comma-separated finite",
        ),
        (("--weight_decays=inf",), "--weight_decays=inf: expected distinct"),
        (("--weight_decays=0,-0",), "--weight_decays=0,-0: expected distinct"),
        (
            ("--weight_decays=",),
            "--weight_decays=: expected distinct comma-separated finite",
        ),
        (("--reference=1000",), "--reference=1000: expected a number of rows and"),
        (("--reference=40,0.01,0",), "--reference=40,0.01,0: expected a number of"),
        (("--reference=7,0.01",), "--reference=7,0.01: expected one of --rows"),
        (("--reference=40,7",), "--reference=40,7: expected one of --rows"),
        (("--parity_bits=6",), "--parity_bits=6: expected at most --num_bits, 5"),
        (("--batch_size=9",), "--batch_size=9: expected at most the smallest"),
        (("--learning_rate=0",), "--learning_rate=0: expected a finite number > 0"),
        (("--learning_rate=inf",), "--learning_rate=inf: expected a finite number"),
        (("--epochs=2000000000",), "--epochs=2000000000: expected fewer than 2^31"),
        (("--hidden=4",), "--hidden: expected once, got several"),
        (("--num_steps=3",), "--num_steps is not a flag of this command"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, tmp_path):
    folder = tmp_path / "unused"
    finished = run_command("grokking", *FLAGS, *flags, f"--output_dir={folder}")
    assert finished.status == 2
    assert finished.err.startswith("grokking: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes_to_the_same_files(saved_run, tmp_path):
    flags = (*FLAGS, f"--output_dir={tmp_path}", "--cpu_devices=2")
    process = start("grokking", *flags)
    while not (tmp_path / "parts" / "0.parquet").exists():
        assert process.poll() is None, "it ended"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "grokking.json").exists()
    process = start("grokking", *flags)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Resuming: " in out
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (saved_run[0] / name).read_bytes()
