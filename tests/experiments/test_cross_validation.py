"""Folds, and `--folds` of `experiments.sweep` and `experiments.train`."""

import json
from typing import Any

import jax
import joblib
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.metrics import accuracy_score, f1_score, log_loss

import jaxbce
from experiments import sweep
from experiments.support import cross_validation, datasets, metrics, optimizers
from experiments.support.cli import InputError
from experiments.support.config import OptimizerConfig, TrainingConfig
from experiments.support.sweep_axes import Search, parse_axis
from tests.helpers import member, run_command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

MOONS = datasets.load(dataset="moons")
AXES = tuple(map(parse_axis, ("learning_rate=0.5,0.1", "pos_weight=1,3")))
FOLDS, SEEDS = 3, 2
TOY: Any = {"num_steps": 30, "batch_size": 0, "evaluate_every": 7}
SWEEP = (
    *("--axis=learning_rate=0.5,0.1", "--axis=pos_weight=1,3", "--dataset=moons"),
    *("--hidden=4", "--optimizer=sgd", "--seeds=2", "--num_steps=30"),
    *("--batch_size=0", "--evaluate_every=7", "--dtype=float64", "--cpu_devices=2"),
    *("--folds=3", "--metric=f1"),
)
PATIENT = pd.Series(np.arange(1000) // 7, name="patient")
GROUPED = MOONS._replace(group=PATIENT)


def plan(**training):
    return sweep.Plan(
        table=MOONS,
        search=Search(AXES),
        programs=[sweep.Program((4,), "sgd")],
        seeds=SEEDS,
        folds=FOLDS,
        optimizer=OptimizerConfig(optimizer="sgd"),
        training=TrainingConfig(dtype="float64", **(TOY | training)),
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Any:
    """The folder that a sweep with folds writes, its output, its plan and networks."""
    folder, calls = tmp_path_factory.mktemp("swept"), []
    honest = sweep.Plan.train

    def noted(self, *args):
        result = honest(self, *args)
        calls.append((self, result[2]))
        return result

    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(sweep.Plan, "train", noted)
        finished = run_command("sweep", *SWEEP, f"--output_dir={folder}")
    (call,) = calls
    return folder, finished, *call


@pytest.fixture
def trained(swept) -> Any:
    """The plan of the sweep, its networks and its table."""
    folder, _, toy, found = swept
    return toy, found, pd.read_parquet(folder / "sweep.parquet")


# --------------------------------------------------------------------------- the folds


@pytest.mark.parametrize(
    ("table", "tolerance"), [(MOONS, 1), (GROUPED, 7)], ids=["rows", "groups"]
)
def test_folds_are_fair_parts_of_the_rows_that_are_not_for_the_test(table, tolerance):
    splits, _, fold = cross_validation.split(table, 0, 5)
    train, test = splits["train"], splits["test"]
    assert sorted([*train.rows, *test.rows]) == list(range(1000))
    single, _ = datasets.split(table, 0)
    np.testing.assert_array_equal(test.rows, single["test"].rows)
    np.testing.assert_allclose(train.x.mean(axis=0), 0, atol=1e-12)
    sizes, ones = np.bincount(fold), np.bincount(fold, weights=train.y[:, 0])
    assert np.ptp(sizes) <= tolerance
    assert np.ptp(ones) <= tolerance
    if tolerance > 1:
        of_group: Any = pd.Series(fold).groupby(PATIENT.to_numpy()[train.rows])
        assert (of_group.nunique() == 1).all()
        assert not {*PATIENT[train.rows]} & {*PATIENT[test.rows]}
    again = cross_validation.split(table, 0, 5)[2]
    np.testing.assert_array_equal(fold, again)
    assert (fold != cross_validation.split(table, 1, 5)[2]).any()


FEW = MOONS._replace(y=(np.arange(1000) < 12)[:, None].astype(float))
# Label 1 occurs in three groups alone.
ONE_SIDED = GROUPED._replace(y=(PATIENT.to_numpy() < 3)[:, None].astype(float))


@pytest.mark.parametrize(
    ("table", "folds", "message"),
    [
        (
            FEW,
            11,
            "--folds=11: target 'moon' has 10 rows of 'lower' outside the test "
            "set, so at most 10 folds",
        ),
        (MOONS, 10**9, "--folds=1000000000: target 'moon' has 400 rows of 'upper'"),
        (
            GROUPED._replace(group=PATIENT // 10),
            20,
            "--folds=20: only 12 groups are outside the test set, so at most 12 folds",
        ),
        (ONE_SIDED, 4, "--folds=4: a fold has only one label of target 'moon'"),
        (
            MOONS._replace(time=pd.Series(np.arange(1000), name="date")),
            5,
            "--folds=5: cannot be used with --time",
        ),
        (
            MOONS._replace(
                held_out={"validation": datasets.HeldOut("v.csv", np.array([999]))}
            ),
            5,
            "--folds=5: cannot be used with --validation",
        ),
    ],
)
def test_data_that_cannot_be_divided_into_folds_are_refused(table, folds, message):
    with pytest.raises(InputError, match=message):
        cross_validation.split(table, 0, folds)


def test_rows_of_a_test_file_are_in_no_fold():
    rows = np.arange(900, 1000)
    table = MOONS._replace(held_out={"test": datasets.HeldOut("test.csv", rows)})
    splits, _, fold = cross_validation.split(table, 0, 4)
    np.testing.assert_array_equal(splits["test"].rows, rows)
    np.testing.assert_array_equal(np.sort(splits["train"].rows), np.arange(900))
    assert len(fold) == 900


# --------------------------------------------------------------------------- the sweep


def test_a_network_is_that_of_a_run_on_the_other_folds(trained):
    toy, _, table = trained
    assert len(table) == 4 * FOLDS * SEEDS
    assert not table[["point", "fold", "seed"]].duplicated().any()
    row = table.query("point == 2 and fold == 2 and seed == 1").iloc[0]
    assert (row["learning_rate"], row["pos_weight"]) == (0.1, 1)
    train, is_held_out = toy.splits["train"], toy.fold == 2
    assert toy.configuration["weight_decay"] == 1 / 533  # of the largest fold
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))
        optimizer, penalty = optimizers.build(
            "sgd", learning_rate=0.1, weight_decay=1 / 533
        )
        run = jaxbce.fit(
            keys[1],
            jaxbce.init(keys[0], (2, 4, 1)),
            train.x[~is_held_out],
            train.y[~is_held_out],
            optimizer=optimizer,
            penalty=optimizers.l2_penalty(penalty),
            num_steps=30,
            validation=(train.x[is_held_out], train.y[is_held_out]),
            evaluate_every=7,
        )
    assert run.best_step == row["best_step"]
    np.testing.assert_allclose(row["validation_loss"], run.best_loss, rtol=1e-10)
    np.testing.assert_allclose(row["train_loss"], run.train_loss[-1], rtol=1e-10)
    test = toy.splits["test"]
    loss = log_loss(test.y[:, 0], expit(metrics.logits(run.best_params, test.x)[:, 0]))
    np.testing.assert_allclose(row["test_loss"], loss, rtol=1e-10)


def test_the_ensemble_of_a_point_has_the_mean_probability(trained):
    toy, found, table = trained
    test = toy.splits["test"]
    y = test.y[:, 0]
    for point, row in table.groupby("point").first().iterrows():
        of_point = slice(FOLDS * point, FOLDS * (point + 1))
        probability = np.mean(
            [
                expit(metrics.logits(member(found.best_params, i, j), test.x)[:, 0])
                for i in range(*of_point.indices(4 * FOLDS))
                for j in range(SEEDS)
            ],
            axis=0,
        )
        corrected = logit(probability) - np.log(row["pos_weight"])
        loss = log_loss(y, probability)
        assert np.isclose(row["ensemble_test_loss"], loss, rtol=1e-10)
        accuracy = accuracy_score(y, corrected > 0)
        assert row["ensemble_test_accuracy"] == accuracy
        assert row["ensemble_test_f1"] == f1_score(y, corrected > 0)
    assert (table.groupby("point")["ensemble_test_loss"].nunique() == 1).all()


def test_the_metric_of_a_network_is_that_of_its_fold(trained):
    toy, found, table = trained
    train = toy.splits["train"]
    for place, row in enumerate(table.to_dict("records")):
        is_held_out = toy.fold == row["fold"]
        params = member(found.best_params, *divmod(place, SEEDS))
        a = metrics.logits(params, train.x[is_held_out]) - np.log(row["pos_weight"])
        assert row["validation_f1"] == f1_score(train.y[is_held_out], a > 0)


def test_points_are_ranked_by_the_mean_over_folds_and_seeds(trained):
    _, _, table = trained
    top = sweep.best_points(table, ["learning_rate", "pos_weight"], 4, "f1")
    by_point = table.groupby("point")["validation_f1"]
    assert top[0]["point"] == by_point.mean().idxmax()
    for row in top:
        values = table.loc[table["point"] == row["point"], "validation_f1"]
        assert len(values) == FOLDS * SEEDS
        error = values.std() / np.sqrt(len(values))
        assert np.isclose(row["validation_f1"], values.mean(), rtol=1e-12)
        assert np.isclose(row["validation_f1_sem"], error, rtol=1e-12)


def test_chunks_keep_the_networks_of_a_point_together(trained, monkeypatch, tmp_path):
    _, networks, whole = trained

    def known(self, program, chosen, *_):
        of_points = (FOLDS * chosen[:, None] + np.arange(FOLDS)).ravel()
        return jax.tree.map(lambda leaf: leaf[of_points], networks)

    monkeypatch.setattr(sweep.Plan, "sweep", known)
    monkeypatch.setattr(sweep, "CHUNK_MEMBERS", (18, 18))  # three points, then one
    divided = plan(metric="f1")
    assert divided.sizes == [18, 6]
    found = sweep.run(divided, tmp_path)["members"]
    pd.testing.assert_frame_equal(found, whole, check_exact=True)
    (tmp_path / "parts" / "1.parquet").unlink()
    again = sweep.run(divided, tmp_path)["members"]
    pd.testing.assert_frame_equal(again, found, check_exact=True)
    monkeypatch.setattr(sweep, "CHUNK_MEMBERS", (1, 5))
    with pytest.raises(
        InputError, match=r"^--seeds=2, --folds=3: .* at most 5 .*, got 6"
    ):
        plan()


def test_the_model_of_a_sweep_with_folds_is_the_ensemble(swept):
    folder, (status, out, err), _, _ = swept
    assert (status, err) == (0, "")
    assert "24 networks, of which 0 diverged" in out
    assert "Mean ± standard error of 6 networks per point" in out
    assert "validation: the rows of all folds, each predicted by the mean prob" in out
    table = out[out.index("networks, of") :]
    assert max(map(len, table.splitlines()[:-1])) <= 100
    document = json.loads((folder / "top.json").read_text())
    assert document["configuration"]["folds"] == 3
    model, (top, *_) = document["model"], document["top"]
    assert model["networks"] == 6
    assert np.isclose(model["ensemble_test_f1"], top["ensemble_test_f1"])
    assert f"{top['ensemble_test_f1']:.4f}" in out
    rows = pd.read_parquet(folder / "sweep.parquet")
    assert sorted(rows["fold"].unique()) == [0, 1, 2]
    assert joblib.load(folder / "model.joblib")["params"][0].w.shape == (3, 2, 2, 4)

    # The model scores the rows of a file by the mean probability.
    test = datasets.split(MOONS, 0)[0]["test"]
    labels = np.take(MOONS.classes["moon"], test.y[:, 0].astype(int))
    new = folder / "new.csv"
    MOONS.features.iloc[test.rows].assign(moon=labels).to_csv(new, index=False)
    status, out, err = run_command(
        "train", f"--predict={new}", f"--output_dir={folder}"
    )
    assert (status, err) == (0, "")
    scored = pd.read_csv(folder / "new.scored.csv")
    (row,) = (row for row in model["metrics"] if row["split"] == "test")
    loss = log_loss(test.y[:, 0], scored["probability of moon=lower"])
    assert np.isclose(loss, row["log_loss"], rtol=1e-9)
    assert accuracy_score(labels, scored["predicted moon"]) == row["accuracy"]
    assert f"{loss:.4f}" in out


def test_if_a_network_of_the_best_point_diverged_there_is_no_ensemble(trained):
    toy, _, table = trained
    assert sweep.best_member(toy, table) is not None
    diverged = np.where((table["fold"] == 1) & (table["seed"] == 0), 7, -1)
    assert sweep.best_member(toy, table.assign(diverged_at=diverged)) is None


# ------------------------------------------------------------------------- one network


def test_train_evaluates_each_row_by_the_network_that_held_it_out(tmp_path):
    file, folder = tmp_path / "moons.csv", tmp_path / "out"
    side = MOONS.features.sum(axis=1) > 0.5
    MOONS.features.assign(moon=MOONS.y[:, 0], side=side).to_csv(file, index=False)
    flags = (f"--data={file}", "--target=moon,side", "--hidden=4", "--optimizer=sgd")
    flags += ("--learning_rate=0.5", "--pos_weight=balanced", "--dtype=float64")
    flags += ("--num_steps=30", "--evaluate_every=7", "--batch_size=0")
    flags += ("--baselines=logistic", f"--output_dir={folder}", "--folds=3")
    status, out, err = run_command("train", *flags)
    assert (status, err) == (0, "")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "predictions.csv", "model.joblib", "curves_2.png"} < names
    assert "losses.png" not in names

    # Each row is in the file with the logit of the network that held it out.
    table = datasets.load(data=str(file), target=["moon", "side"])
    splits, _, fold = cross_validation.split(table, 0, FOLDS)
    rows, test = splits["train"], splits["test"]
    predictions = pd.read_csv(folder / "predictions.csv")
    assert predictions["row"].tolist() == list(table.features.index)
    params = joblib.load(folder / "model.joblib")["params"]
    document = json.loads((folder / "metrics.json").read_text())
    shift = np.log(document["configuration"]["pos_weight"])
    assert np.ptp(shift) > 0.01
    logits = predictions[[f"logit of {n}" for n in datasets.label_1(table.classes)]]
    for k in range(FOLDS):
        at = rows.rows[fold == k]
        assert (predictions["split"].iloc[at] == f"fold {k}").all()
        a = metrics.logits(member(params, k), rows.x[fold == k]) - shift
        np.testing.assert_allclose(logits.iloc[at], a, rtol=1e-9)

    # The table has means over folds, and metrics of all predictions together.
    found: Any = pd.read_csv(folder / "folds.csv")
    for column, target in enumerate(table.classes):
        at = [rows.rows[fold == k] for k in range(FOLDS)]
        each = [log_loss(table.y[i, column], expit(logits.iloc[i, column])) for i in at]
        losses = found["log_loss"][found["target"] == target]
        np.testing.assert_allclose(losses, each, rtol=1e-9)
        error = np.std(each, ddof=1) / np.sqrt(FOLDS)
        assert f"{np.mean(each):.4f} ± {error:.4f}" in out
        loss = log_loss(rows.y[:, column], expit(logits.iloc[rows.rows, column]))
        assert np.isclose(document["metrics"][column]["log_loss"], loss, rtol=1e-9)

    # The test set is evaluated by the mean probability.
    of_each = [metrics.logits(member(params, k), test.x) for k in range(FOLDS)]
    a = logit(np.mean(expit(of_each), axis=0)) - shift
    np.testing.assert_allclose(logits.iloc[test.rows], a, rtol=1e-9)
    of_test = [row for row in document["metrics"] if row["split"] == "test"]
    models = ["jaxbce", "jaxbce", "logistic regression", "logistic regression"]
    assert [row["model"] for row in of_test] == models
    loss = log_loss(test.y[:, 1], expit(a[:, 1]))
    assert np.isclose(of_test[1]["log_loss"], loss, rtol=1e-9)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("sweep", ("--folds=1",), "folds=1"),
        ("train", ("--folds=0",), "folds=0"),
        ("train", ("--folds=2", "--metric=f1"), "cannot be used with --metric"),
        ("train", ("--folds=2", "--gradient=autodiff"), "with --gradient=autodiff"),
        ("train", ("--folds=2", "--predict=new.csv"), "--predict trains no network"),
        (
            "train",
            ("--folds=2", "--hidden=", "--optimizer=sgd", "--learning_rate=1e30"),
            "the loss was not finite before the first evaluation",
        ),
    ],
)
def test_flags_that_cannot_be_used_with_folds_are_one_line(command, flags, message):
    status, _, err = run_command(command, *flags)
    assert status == 2
    assert err.startswith(f"{command}: ")
    assert message in err
    assert err.count("\n") == 1
