"""`experiments.sweep`: its table, and runs that are interrupted, killed and shared."""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

import jaxbce
from experiments import sweep
from experiments.support import datasets, metrics, optimizers, plots
from experiments.support.cli import InputError
from experiments.support.config import OptimizerConfig, TrainingConfig
from experiments.support.sweep_axes import Search, parse_axis
from tests.experiments.files import odd_keys
from tests.helpers import run_command, start

pytestmark = pytest.mark.usefixtures("standard_promotion")

MOONS = datasets.load(dataset="moons")
TEXTS = ("learning_rate=log:1e-2:1e2:4", "weight_decay=0,0.1")
AXES = tuple(map(parse_axis, TEXTS))
SGD = sweep.Program((4,), "sgd")
FLAGS = (
    *(f"--axis={text}" for text in TEXTS),
    *("--dataset=moons", "--hidden=4", "--optimizer=sgd", "--seeds=3"),
    *("--num_steps=60", "--batch_size=0", "--cpu_devices=2"),
)


def plan(*, axes=AXES, programs=(SGD,), seeds=3, search=None, table=MOONS, **training):
    options: Any = {"num_steps": 60, "batch_size": 0} | training
    return sweep.Plan(
        table=table,
        search=search or Search(axes),
        programs=list(programs),
        seeds=seeds,
        optimizer=OptimizerConfig(optimizer="sgd"),
        training=TrainingConfig(**options),
    )


@pytest.fixture(scope="module")
def members() -> Any:
    """The table of the toy sweep, computed in one piece."""
    with jax.numpy_dtype_promotion("standard"):
        return sweep.run(plan())["members"]


def test_rows_are_the_members_and_the_best_are_on_top(members):
    assert len(members) == 4 * 2 * 3
    assert not members[["point", "seed"]].duplicated().any()
    best = members.groupby("point")["validation_loss"].mean()
    top = sweep.best_points(members, ["learning_rate", "weight_decay"], 5)
    assert len(top) == 5
    assert np.isclose(top[0]["validation_loss"], best.min(), rtol=1e-12)
    shown = [row["validation_loss"] for row in top]
    assert shown == sorted(shown)
    point = members[members["point"] == best.idxmin()]
    assert top[0]["learning_rate"] == point["learning_rate"].iloc[0]
    assert point["test_accuracy"].mean() > 0.8


def test_points_that_diverged_are_last(members):
    changed = members.assign(diverged_at=np.where(members["point"] == 5, 7, -1))
    changed["validation_loss"] += members["point"] != 5  # the smallest loss
    names = ["learning_rate", "weight_decay"]
    *others, last = sweep.best_points(changed, names, 8)
    assert last["diverged"] == 3
    assert [row["diverged"] for row in others] == [0] * 7
    point = changed[changed["point"] == 5]
    assert last["learning_rate"] == point["learning_rate"].iloc[0]


def test_one_seed_has_no_standard_error(members):
    (top,) = sweep.best_points(members[members["seed"] == 0], ["learning_rate"], 1)
    assert "validation_loss_sem" not in top


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [0, 32], ids=["all", "batches"])
def test_a_row_is_the_solo_run_of_its_member(batch_size):
    options: Any = {"batch_size": batch_size, "evaluate_every": 19}
    found = sweep.run(plan(dtype="float64", hidden=(4,), **options))["members"]
    row = next(r for r in found.to_dict("records") if (r["point"], r["seed"]) == (3, 2))
    assert row["weight_decay"] == 0.1
    splits: Any = datasets.split(MOONS, 0)[0]
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
            splits["train"].x,
            splits["train"].y,
            optimizer=optimizer,
            penalty=optimizers.l2_penalty(penalty),
            num_steps=60,
            batch_size=batch_size or None,
            validation=splits["validation"][1:],
            evaluate_every=19,
        )
        assert run.best_step == row["best_step"]
        assert np.isclose(run.best_loss, row["validation_loss"], rtol=1e-10)
        test = splits["test"]
        loss = jaxbce.loss(run.best_params, test.x, test.y)
        assert np.isclose(loss, row["test_loss"], rtol=1e-10)
        accuracy = ((jaxbce.logits(run.best_params, test.x) > 0) == test.y).mean()
        assert accuracy == row["test_accuracy"]


def test_validation_and_test_loss_are_one_quantity():
    weighted = plan(axes=(parse_axis("pos_weight=1,5"),), pos_weight=3.0)
    weighted.splits["test"] = weighted.splits["validation"]
    found = sweep.run(weighted)["members"]
    np.testing.assert_allclose(found["test_loss"], found["validation_loss"], rtol=1e-5)
    assert set(found["pos_weight"]) == {1.0, 5.0}


def test_points_are_ranked_by_the_metric_asked_for(monkeypatch, tmp_path):
    axes = (AXES[0], parse_axis("pos_weight=1,5"))
    ranked = plan(axes=axes, metric="f1", seeds=2)
    trained = ranked.train(ranked.chunks[0], 60, 1)
    monkeypatch.setattr(sweep.Plan, "train", lambda *_: trained)
    members = sweep.run(ranked)["members"]
    for row in members.to_dict("records"):
        at = row["point"], row["seed"]
        params = jax.tree.map(lambda t, at=at: t[at], trained[2].best_params)
        for name in ("validation", "test"):
            split = ranked.splits[name]
            a = metrics.logits(params, split.x) - np.log(row["pos_weight"])
            assert row[f"{name}_f1"] == f1_score(split.y, a > 0)
    members.loc[members["point"] == 3, "diverged_at"] = 7
    names = ["learning_rate", "pos_weight"]
    top = sweep.best_points(members, names, 8, "f1")
    whole = [row for row in top if not row["diverged"]]
    assert top[: len(whole)] == whole
    assert top[-1]["diverged"] == 2
    shown = [row["validation_f1"] for row in whole]
    assert shown == sorted(shown, reverse=True)
    assert len(shown) >= 3
    plots.sweep(tmp_path / "f1.png", members, dict.fromkeys(names, "values"), "f1")
    assert (tmp_path / "f1.png").stat().st_size > 1000


# --------------------------------------------------------------------------- the model


@pytest.mark.parametrize(("metric", "sign"), [("loss", 1), ("f1", -1)])
def test_the_model_is_the_best_network_of_the_best_point(members, metric, sign):
    both = pd.concat(
        [members.assign(hidden=hidden) for hidden in ("none", "4")], ignore_index=True
    ).assign(validation_f1=0.5, test_f1=0.5, diverged_at=-1)
    best = (both["hidden"] == "4") & (both["point"] == 6)
    both.loc[best, f"validation_{metric}"] = sign * np.array([-50.0, -70.0, -60.0])
    chosen = plan(programs=[sweep.Program((), "sgd"), SGD], metric=metric)
    assert sweep.best_member(chosen, both) == (1, 6, 1)
    both["diverged_at"] = np.where(both["seed"] == 1, 7, -1)
    assert sweep.best_member(chosen, both) == (1, 6, 2)
    both["diverged_at"] = 7
    assert sweep.best_member(chosen, both) is None
    assert sweep.train_best(chosen, both) is None


def test_processes_after_the_first_help_to_train_the_model(members, monkeypatch):
    first: Any = sweep.train_best(plan(), members)
    choice = sweep.best_member(plan(), members)
    monkeypatch.setattr(
        sweep.multihost_utils, "broadcast_one_to_all", lambda _: np.array(choice)
    )
    other: Any = sweep.train_best(plan(), None)
    assert choice == (0, first["point"], first["seed"])
    jax.tree.map(np.testing.assert_array_equal, other["params"], first["params"])


def test_a_network_that_diverges_when_it_is_trained_again_is_no_model(members):
    wild = plan(axes=(parse_axis("learning_rate=1e30,2e30"), AXES[1]))
    one = members[members["point"] == 0].assign(learning_rate=1e30, diverged_at=-1)
    assert sweep.best_member(wild, one) is not None
    assert sweep.train_best(wild, one) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_metrics_of_the_model_are_those_of_corrected_logits(dtype):
    first = MOONS.features["x1"].to_numpy() > 0.3
    two = MOONS._replace(
        y=np.stack([MOONS.y[:, 0], first], axis=1).astype(float),
        classes=MOONS.classes | {"side": ("left", "right")},
    )
    weighted = plan(table=two, axes=(parse_axis("pos_weight=1,4"),), dtype=dtype)
    scores = dict.fromkeys(sweep.SCORES, 0.5)
    known = {"hidden": "4", "optimizer": "sgd", "seed": 2, "diverged_at": -1}
    row = pd.DataFrame([{**known, "point": 1, "pos_weight": 4.0, **scores}])
    model: Any = sweep.train_best(weighted, row)
    assert (model["point"], model["seed"], model["pos_weight"]) == (1, 2, (4.0, 4.0))
    test = weighted.splits["test"]
    a = metrics.logits(model["params"], test.x) - np.log(4)
    shown = [row for row in model["metrics"] if row["split"] == "test"]
    for column, target in enumerate(two.classes):
        y, logit, found = test.y[:, column], a[:, column], shown[column]
        assert found["target"] == target
        assert found["accuracy"] == accuracy_score(y, logit > 0)
        assert np.isclose(found["roc_auc"], roc_auc_score(y, logit), rtol=1e-12)
        loss = log_loss(y, expit(logit))
        assert np.isclose(found["log_loss"], loss, rtol=1e-10)


def by_member(table: Any) -> pd.DataFrame:
    return table.sort_values(["point", "seed"], ignore_index=True)


def test_interrupted_and_resumed_it_ends_with_the_same_table(
    members, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sweep, "CHUNK_MEMBERS", (5, 5))  # no divisor of 8 points or 3
    divided = plan()
    assert sum(divided.sizes) == 24
    assert len(divided.sizes) == 6
    trained, interrupt_at = [], {3}
    honest = sweep.Plan.train

    def interrupted(self, chunk, *args):
        if len(trained) in interrupt_at:
            interrupt_at.clear()
            raise KeyboardInterrupt
        trained.append(chunk)
        return honest(self, chunk, *args)

    monkeypatch.setattr(sweep.Plan, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(divided, tmp_path)
    assert trained == divided.chunks[:3]
    stored = sorted((tmp_path / "parts").iterdir())
    assert [path.name for path in stored] == ["0.parquet", "1.parquet", "2.parquet"]
    found = sweep.run(divided, tmp_path)["members"]
    assert trained == divided.chunks
    size = sum(divided.sizes[:3])
    assert capsys.readouterr().out == f"Resuming: {size} of 24 networks are done.\n"
    pd.testing.assert_frame_equal(by_member(members), by_member(found), rtol=1e-4)
    whole = sweep.run(divided)["members"]  # never interrupted
    pd.testing.assert_frame_equal(whole, found, check_exact=True)
    del trained[:]
    (tmp_path / "parts" / "3.parquet").unlink()
    again = sweep.run(divided, tmp_path)["members"]
    assert trained == [divided.chunks[3]]
    pd.testing.assert_frame_equal(again, found, check_exact=True)
    with pytest.raises(InputError, match=r"another run, with seeds=3 there, 2 here"):
        sweep.run(plan(seeds=2), tmp_path)


def test_processes_after_the_first_leave_the_folder_alone(tmp_path, monkeypatch):
    shared = plan()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert sweep.run(shared, tmp_path) == {"configuration": shared.configuration}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_choices_are_programs_and_a_random_search_draws():
    axes = (AXES[0], parse_axis("b1=0.5,0.9"))
    programs = [sweep.Program(widths, "adam") for widths in ((4,), ())]
    search = Search(axes, "random", 3)
    found = sweep.run(plan(search=search, programs=programs, num_steps=5))["members"]
    assert len(found) == 3 * 3 * 2
    assert set(found["hidden"]) == {"4", "none"}
    assert found["learning_rate"].between(1e-2, 1e2).all()
    assert set(found["b1"]) <= {0.5, 0.9}
    assert sweep.Program((3, 2), "adam").layers == "3×2"


def test_a_dry_run_says_what_it_would_take(monkeypatch, tmp_path):
    costs = []
    honest = sweep.dry_run
    monkeypatch.setattr(sweep, "dry_run", lambda p: costs.extend(honest(p)) or costs)
    folder = tmp_path / "new"
    command = (*FLAGS, "--dry_run", f"--output_dir={folder}")
    status, out, err = run_command("sweep", *command)
    assert (status, err) == (0, "")
    assert "network-steps/s" in out
    assert not folder.exists()
    (cost,) = costs
    assert cost["networks"] == 24
    assert 0 < cost["network_steps_per_second"] < 1e9
    assert 0 < cost["networks_at_a_time"] <= 24
    assert set(sweep.COST_HEADINGS) < set(cost)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": ()}, "expected --axis"),
        ({"axes": AXES[:1] * 2}, "is given twice"),
        ({"axes": (parse_axis("b7=1,2"),)}, "--axis=b7: sgd takes"),
        (
            {
                "axes": (parse_axis("nesterov=0,1"),),
                "programs": [sweep.Program((4,), "adam")],
            },
            "adam: cannot be swept over nesterov",
        ),
        ({"search": Search(AXES, "grid", 3)}, "--num_points needs --search=random"),
        ({"search": Search(AXES, "random")}, "--search=random needs --num_points"),
        ({"batch_size": 10**6}, "--batch_size=1000000: moons has 600 rows"),
        ({"programs": [SGD, SGD]}, "--hidden or --optimizer repeats a value"),
        ({"programs": [sweep.Program((4,), "sgdd")]}, "--optimizer=sgdd: expected one"),
        (
            {"pos_weight": "balanced"},
            "--pos_weight=balanced: expected a finite .*0$",
        ),
        ({"pos_weight": -1.0}, "--pos_weight=-1.0: expected a finite number >= 0$"),
        ({"seeds": 10**12}, "expected at most 100000000 networks"),
        (
            {"search": Search(AXES, "random", 10**12)},
            "expected at most 100000000 networks",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        plan(**options)


# ------------------------------------------------------------------------- the command


FILES = ("sweep.parquet", "model.joblib", "top.json")  # the same however often it runs


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a run of the command in a process of its own, and its output."""
    folder = tmp_path_factory.mktemp("swept")
    out, err = finish(start("sweep", *FLAGS, "--csv", f"--output_dir={folder}"))
    assert err == ""
    return folder, out


def test_a_process_writes_the_table_and_prints_the_best(swept, members):
    folder, out = swept
    assert "24 networks, of which" in out
    assert max(map(len, out[out.index("networks, of") :].splitlines()[:-1])) <= 100
    written = "config.json, model.joblib, parts, sweep.csv, sweep.parquet, sweep.png"
    assert f"In {folder}: {written}" in out
    found = pd.read_parquet(folder / "sweep.parquet")
    pd.testing.assert_frame_equal(found, members, check_exact=True)
    csv = pd.read_csv(folder / "sweep.csv", dtype={"hidden": str})
    pd.testing.assert_frame_equal(csv, members, check_dtype=False)
    assert (folder / "sweep.png").stat().st_size > 1000
    document = json.loads((folder / "top.json").read_text())
    best = sweep.best_points(members, ["learning_rate", "weight_decay"], 10)
    assert document["top"] == best
    assert document["configuration"]["optimizer"] == ["sgd"]
    assert document["configuration"]["points"] == 8
    assert len(pd.read_csv(folder / "top.csv")) == 8
    error = best[0]["validation_loss_sem"]
    assert f"{best[0]['validation_loss']:.4f} ± {error:.4f}" in out


def test_keys_of_results_are_snake_case(swept):
    assert odd_keys(swept[0]) == {}


def test_the_model_of_a_sweep_scores_new_rows(swept, members):
    folder, out = swept
    document = json.loads((folder / "top.json").read_text())
    model, (top, *_) = document["model"], document["top"]
    point = members[members["point"] == top["point"]]
    row = point.loc[point["validation_loss"].idxmin()]
    assert model["seed"] == row["seed"]
    assert f"the best point with seed {row['seed']}" in out
    for name in ("learning_rate", "weight_decay", "best_step", "steps"):
        assert model[name] == row[name]
    for name in ("validation_loss", "test_loss", "test_accuracy"):
        assert np.isclose(model[name], row[name], rtol=1e-4)
    split = datasets.split(MOONS, 0)[0]["test"]
    table = MOONS.features.iloc[split.rows]
    labels = np.take(MOONS.classes["moon"], split.y[:, 0].astype(int))
    table.assign(moon=labels).to_csv(folder / "new.csv", index=False)
    flags = (f"--predict={folder / 'new.csv'}", f"--output_dir={folder}")
    status, printed, err = run_command("train", *flags)
    assert (status, err) == (0, "")
    scored = pd.read_csv(folder / "new.scored.csv")
    probability = scored["probability of moon=lower"]
    loss = log_loss(split.y[:, 0], probability)
    assert np.isclose(loss, model["test_loss"], rtol=1e-9)
    assert f"{loss:.4f}" in printed
    assert f"{loss:.4f}" in out
    accuracy = accuracy_score(labels, scored["predicted moon"])
    assert accuracy == model["test_accuracy"]
    thresholded = model["decisions"][-1]  # of the test set
    assert thresholded["f1"] == f1_score(
        split.y[:, 0], scored["logit of moon=lower"] > model["thresholds"][0]
    )


def test_if_all_networks_diverge_no_model_is_saved(members, monkeypatch, tmp_path):
    diverged = members.assign(diverged_at=7)
    monkeypatch.setattr(sweep, "run", lambda plan, folder: {"members": diverged})
    flags = (*FLAGS, f"--output_dir={tmp_path}")
    status, out, err = run_command("sweep", *flags)
    assert (status, err) == (0, "")
    assert (
        "\nNo model is saved, because the networks of the best point diverged." in out
    )
    assert json.loads((tmp_path / "top.json").read_text())["model"] is None
    flags = ("--predict=new.csv", f"--output_dir={tmp_path}")
    assert run_command("train", *flags) == (
        2,
        "",
        f"train: --output_dir={tmp_path}: has no model of a finished run\n",
    )


def test_a_finished_sweep_is_written_again_from_its_parts(swept):
    folder, _ = swept
    first = contents(folder)
    for name in FILES:
        (folder / name).unlink()
    status, out, err = run_command("sweep", *FLAGS, "--csv", f"--output_dir={folder}")
    assert (status, err) == (0, "")
    assert "Resuming: 24 of 24 networks are done." in out
    assert contents(folder) == first


def test_without_a_folder_the_best_are_printed(members, monkeypatch):
    monkeypatch.setattr(sweep, "run", lambda plan, folder: {"members": members})
    status, out, err = run_command("sweep", *FLAGS, "--top=2")
    assert (status, err) == (0, "")
    best = sweep.best_points(members, ["learning_rate", "weight_decay"], 3)
    shown = [f"{row['validation_loss']:.4f} ±" in out for row in best]
    assert shown == [True, True, False]
    assert "24 networks, of which" in out


def test_processes_after_the_first_print_nothing(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(sweep, "run", lambda plan, folder: {"configuration": {}})
    monkeypatch.setattr(sweep, "dry_run", lambda plan: [])
    assert run_command("sweep", *FLAGS) == (0, "", "")
    assert run_command("sweep", *FLAGS, "--dry_run") == (0, "", "")


def test_a_folder_of_an_earlier_version_is_refused_and_left_as_it_is(tmp_path):
    earlier = {
        "data": "moons",
        "data_digest": datasets.digest(MOONS),
        "classes": {"moon": ["upper", "lower"]},
        "axes": {axis.name: [axis.spacing, *axis.values.tolist()] for axis in AXES},
        "search": "grid",
        "points": 8,
        "seeds": 3,
        "seed": 0,
        "hidden": [[4]],
        "optimizer": ["sgd"],
        "optimizer_args": {},
        "learning_rate": None,
        "schedule": "constant",
        "weight_decay": 1 / 600,
        "batch_size": None,
        "num_steps": 60,
        "evaluate_every": 1,
        "patience": None,
        "metric": "loss",
        "pos_weight": 1.0,
        "dtype": "float32",
        "devices": 2,
    }
    now = json.loads(json.dumps(plan(hidden=(4,)).configuration))
    assert now == earlier  # they differ by the format alone
    (tmp_path / "config.json").write_text(json.dumps(earlier))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "0.parquet").write_bytes(b"of the earlier version")
    status, _, err = run_command("sweep", *FLAGS, f"--output_dir={tmp_path}")
    assert status == 2
    assert err == (
        f"sweep: --output_dir={tmp_path}: holds a run of another version of these "
        "experiments (format 1, expected 3); use another folder\n"
    )
    assert json.loads((tmp_path / "config.json").read_text()) == earlier
    assert not (tmp_path / "sweep.parquet").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--axis=learning_rate=1,x",), "--axis=learning_rate=1,x: could not convert"),
        (("--search=all",), "search"),
        (("--hidden=0",), "--hidden=0: expected comma-separated integers >= 1"),
        (("--process_id=0",), "expected --coordinator, --num_processes and --process"),
        (("--num_points=3",), "--num_points needs --search=random"),
        (("--num_points=0",), "num_points"),
        (("--hidden=4",), "--hidden or --optimizer repeats a value"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(flags, message, tmp_path):
    folder = tmp_path / "new"
    finished = run_command("sweep", *FLAGS, f"--output_dir={folder}", *flags)
    assert finished.status == 2
    assert finished.err.startswith("sweep: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1
    assert not folder.exists()


# ------------------------------------------------------- as processes, and killed

PROCESSES = ("--dataset=breast_cancer", "--axis=learning_rate=log:1e-3:1:192")
PROCESSES += ("--seeds=4", "--hidden=4", "--num_steps=300")


def finish(process: Any) -> tuple[str, str]:
    """What a process printed, which must succeed."""
    with ended(process):
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err


@contextlib.contextmanager
def ended(*processes: Any) -> Iterator[None]:
    """Ends the processes that are still running at the end of a block."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def together(count: int, folder: Path) -> list[Any]:
    """Starts the processes of one sweep, one device for each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (*PROCESSES, f"--output_dir={folder}", "--cpu_devices=1")
    flags += (f"--coordinator=localhost:{port}", f"--num_processes={count}")
    return [start("sweep", *flags, f"--process_id={i}") for i in range(count)]


def wait_for(path: Path, *processes: Any) -> None:
    while not path.exists():
        assert all(process.poll() is None for process in processes), f"no {path}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    flags = (*PROCESSES, f"--output_dir={folder}", "--cpu_devices=4")
    out, _ = finish(start("sweep", *flags))
    assert "768 networks" in out
    return contents(folder)


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes_to_the_same_file(alone, tmp_path):
    flags = (*PROCESSES, f"--output_dir={tmp_path}", "--cpu_devices=4")
    process = start("sweep", *flags)
    with ended(process):
        wait_for(tmp_path / "parts" / "0.parquet", process)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "sweep.parquet").exists()
    out, _ = finish(start("sweep", *flags))
    assert "Resuming" in out
    assert contents(tmp_path) == alone


@pytest.mark.slow
def test_four_processes_of_which_one_is_killed_end_with_the_same_file(alone, tmp_path):
    processes = together(4, tmp_path)
    with ended(*processes):
        wait_for(tmp_path / "parts" / "0.parquet", *processes)
        processes[2].send_signal(signal.SIGKILL)
        for process in processes:  # the others notice, and end
            process.communicate(timeout=600)
            assert process.returncode != 0
    assert not (tmp_path / "sweep.parquet").exists()
    processes = together(4, tmp_path)
    with ended(*processes):
        for process in processes:
            _, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
    assert contents(tmp_path) == alone
