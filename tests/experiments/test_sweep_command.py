"""experiments.sweep: axes, the table, and runs that are killed, resumed and shared."""

import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import jaxbce
from experiments import sweep
from experiments.support import datasets, optimizers, resumable, sweep_axes
from experiments.support.cli import InputError
from tests.helpers import start


@pytest.fixture(autouse=True)
def _standard_promotion():
    import jax

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


@pytest.fixture(scope="module")
def table():
    return datasets.load(dataset="moons")


AXES = [
    sweep_axes.axis("learning_rate=log:1e-2:1e2:4"),
    sweep_axes.axis("weight_decay=0,0.1"),
]
TOY: Any = {"hidden": [(4,)], "num_steps": 60, "optimizers": ("sgd",), "seeds": 3}


def test_rows_are_the_members_and_the_best_are_on_top(table):
    result = sweep.run(table=table, axes=AXES, **TOY)
    members: Any = pd.DataFrame(result["members"])
    assert len(members) == 4 * 2 * 3
    assert not members[["point", "seed"]].duplicated().any()
    best = members.groupby("point")["validation_loss"].mean()
    top: Any = pd.DataFrame(result["top"])
    assert top["validation_loss"][0].startswith(f"{best.min():.4f} ± ")
    point = members[members["point"] == best.idxmin()]
    assert top["learning_rate"][0] == point["learning_rate"].iloc[0]
    assert point["test_accuracy"].mean() > 0.8


def test_a_row_is_the_solo_run_of_its_member(table):
    import jax

    result = sweep.run(table=table, axes=AXES, dtype="float64", **TOY)
    row = next(r for r in result["members"] if (r["point"], r["seed"]) == (3, 2))
    assert row["weight_decay"] == 0.1
    parts: Any = datasets.split(table, 0)[0]
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 2))
        params = jaxbce.init(keys[0], (2, 4, 1))
        optimizer, penalty = optimizers.build(
            "sgd", learning_rate=row["learning_rate"], weight_decay=0.1
        )
        assert penalty == 0.1
        run = jaxbce.fit(
            keys[1],
            params,
            parts["train"].x,
            parts["train"].y,
            optimizer=optimizer,
            loss=optimizers.penalized(jaxbce.loss, penalty),
            num_steps=60,
            batch_size=32,
            validation=parts["validation"][1:],
            evaluate_every=19,
        )
        assert run.best_step == row["best_step"]
        assert np.isclose(run.best_loss, row["validation_loss"], rtol=1e-10)
        test = parts["test"]
        loss = jaxbce.loss(run.best_params, test.x, test.y)
        assert np.isclose(loss, row["test_loss"], rtol=1e-10)


def test_parts_are_the_whole_and_a_lost_part_is_made_anew(table, tmp_path, monkeypatch):
    whole = sweep.run(table=table, axes=AXES, **TOY)
    monkeypatch.setattr(sweep, "PART_MEMBERS", (5, 5))  # no divisor of 8 points or 3
    options = TOY | {"make_folder": lambda: tmp_path, "csv": True}
    found = sweep.run(table=table, axes=AXES, **options)
    a, b = (
        pd.DataFrame(r["members"]).sort_values(["point", "seed"], ignore_index=True)
        for r in (whole, found)
    )
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)
    first = (tmp_path / "sweep.parquet").read_bytes()
    lost = sorted((tmp_path / "parts").iterdir())
    assert len(lost) == 6
    lost[3].unlink()
    sweep.run(table=table, axes=AXES, **options)
    assert (tmp_path / "sweep.parquet").read_bytes() == first
    csv = pd.read_csv(tmp_path / "sweep.csv")
    assert len(csv) == 24
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    with pytest.raises(InputError, match=r"has another run, with seeds=3 there, not 2"):
        sweep.run(table=table, axes=AXES, **(options | {"seeds": 2}))


def test_choices_are_programs_and_a_random_search_draws(table):
    axes = [*AXES[:1], sweep_axes.axis("b1=0.5,0.9")]
    options: Any = {"search": "random", "num_points": 3, "optimizers": ("adam",)}
    options = TOY | options | {"hidden": [(4,), (3, 2)], "num_steps": 5}
    members = pd.DataFrame(sweep.run(table=table, axes=axes, **options)["members"])
    assert len(members) == 3 * 3 * 2
    assert set(members["hidden"]) == {"4", "3×2"}
    assert members["learning_rate"].between(1e-2, 1e2).all()
    assert set(members["b1"]) <= {0.5, 0.9}


def test_a_dry_run_says_what_it_would_take(table):
    cost = sweep.run(table=table, axes=AXES, dry_run=True, **TOY)["cost"]
    assert cost[0]["networks"] == 24
    assert 0 < cost[0]["network-steps/s"] < 1e9
    assert cost[0]["on all devices at a time"] <= 24


BAD = {
    "learning_rate": "not NAME",
    "learning_rate=log:0:1:3": "positive ends",
    "learning_rate=log:1:2": "log:FROM:TO:COUNT",
    "learning_rate=1,x": "could not convert",
    "learning_rate=1,1": "comes twice",
    "learning_rate=-1": ">= 0",
    "learning_rate=nan": "not finite",
    "label_smoothing=2": "from 0 to 1",
    "b1=lin:0:1:0": "a count from 1",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=BAD)
def test_a_bad_axis_is_one_line(text, message):
    with pytest.raises(InputError, match=message):
        sweep_axes.axis(text)


def test_what_does_not_fit_together_is_refused(table):
    for axes, options, message in [
        ([], {}, "--axis is needed"),
        (AXES[:1] * 2, {}, "given twice"),
        ([sweep_axes.axis("b7=1,2")], {}, "--axis=b7: sgd takes"),
        (
            [sweep_axes.axis("nesterov=0,1")],
            {"optimizers": ("adam",)},
            "adam: cannot be swept over nesterov",
        ),
        (AXES, {"num_points": 3}, "--search=random"),
        (AXES, {"search": "random"}, "--num_points"),
        (AXES, {"batch_size": 10**6}, "--batch_size"),
        (AXES, {"optimizers": ("sgd", "sgd")}, "the same one twice"),
        (AXES, {"optimizers": ("sgdd",)}, "not one of"),
    ]:
        with pytest.raises(InputError, match=message):
            sweep.run(table=table, axes=axes, **(TOY | options))


def test_a_damaged_part_is_named(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "0.parquet").write_bytes(b"not parquet")
    options: Any = {"configuration": {}, "unit": "n"}
    with pytest.raises(InputError, match=r"0\.parquet: cannot be read"):
        resumable.compute_chunks(
            1, lambda i: pd.DataFrame(), [1], folder=tmp_path, **options
        )


# ------------------------------------------------------- as processes, and killed

PROCESSES = ("--dataset=breast_cancer", "--axis=learning_rate=log:1e-3:1:192")
PROCESSES += ("--seeds=4", "--hidden=4", "--num_steps=300")


def together(count: int, folder: Path) -> list[Any]:
    """Starts the processes of one sweep, a device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (*PROCESSES, f"--output_dir={folder}", "--cpu_devices=1")
    flags += (f"--coordinator=localhost:{port}", f"--num_processes={count}")
    return [start("sweep", *flags, f"--process_id={i}") for i in range(count)]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The file of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    process = start("sweep", *PROCESSES, f"--output_dir={folder}", "--cpu_devices=4")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "768 networks" in out
    return (folder / "sweep.parquet").read_bytes()


def test_killed_in_the_middle_it_goes_on_to_the_same_file(alone, tmp_path):
    flags = (*PROCESSES, f"--output_dir={tmp_path}", "--cpu_devices=4")
    process = start("sweep", *flags)
    wait_for(tmp_path / "parts" / "0.parquet")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "sweep.parquet").exists()
    process = start("sweep", *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Going on" in out
    assert (tmp_path / "sweep.parquet").read_bytes() == alone


def test_four_processes_of_which_one_is_killed_end_with_the_same_file(alone, tmp_path):
    processes = together(4, tmp_path)
    wait_for(tmp_path / "parts" / "0.parquet")
    processes[2].send_signal(signal.SIGKILL)
    for process in processes:  # the others notice, and end
        process.communicate(timeout=120)
        assert process.returncode != 0
    assert not (tmp_path / "sweep.parquet").exists()
    for process in together(4, tmp_path):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert (tmp_path / "sweep.parquet").read_bytes() == alone
