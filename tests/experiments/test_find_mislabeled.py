"""`experiments.find_mislabeled`: flipped labels are found, and files say which."""

import json
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from cleanlab.rank import get_label_quality_scores
from sklearn.datasets import load_digits

import jaxbce
from experiments import find_mislabeled
from experiments.support import datasets
from experiments.support.cli import InputError
from experiments.support.config import OptimizerConfig, TrainingConfig
from tests.experiments.files import odd_keys
from tests.helpers import run_command, start

pytestmark = pytest.mark.usefixtures("standard_promotion")

MOONS = datasets.load(dataset="moons")
WITH_FLAG = MOONS._replace(features=MOONS.features.assign(flag=0.0))
TOY: Any = {"num_steps": 300, "hidden": (8,), "batch_size": 0}
OPTIMIZER: Any = {"learning_rate": 0.03}


def run(*, table=WITH_FLAG, optimizer=OPTIMIZER, seeds=2, folds=4, **options):
    names = ("flip_fraction", "rank_by")
    own = {name: options.pop(name) for name in names if name in options}
    return find_mislabeled.run(
        table=table,
        optimizer=OptimizerConfig(**optimizer),
        training=TrainingConfig(**(TOY | options)),
        seeds=seeds,
        folds=folds,
        **own,
    )


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A toy run in which a tenth of the labels is flipped."""
    with jax.numpy_dtype_promotion("standard"):
        return run(flip_fraction=0.1)


@pytest.mark.slow
def test_five_percent_of_digits_are_found():
    result = run(
        table=datasets.load(dataset="digits"),
        optimizer={},
        flip_fraction=0.05,
        seeds=5,
        folds=5,
        hidden=(32,),
        num_steps=400,
        batch_size=32,
    )
    found = {row["score"]: row for row in result["found"]}
    assert result["configuration"]["flipped"] == 90
    assert found["EL2N"]["roc_auc"] >= 0.98
    assert found["loss"]["roc_auc"] >= 0.98
    for name in ("GraNd", "self-influence"):
        assert found[name]["roc_auc"] >= 0.97
    assert found["EL2N"]["precision"] >= 0.8
    assert 0.4 < found["input norm"]["roc_auc"] < 0.6  # the control finds nothing
    marked = result["confident_learning"]
    assert marked["marked"] >= marked["marked_and_flipped"] > 45


def test_ten_percent_of_moons_are_found(result):
    found = {row["score"]: row for row in result["found"]}
    assert list(found) == [
        *("EL2N", "GraNd", "self-influence", "loss", "input norm"),
        *("cleanlab, confident learning", "chance"),
    ]
    assert result["configuration"]["flipped"] == 100
    for name in ("EL2N", "loss", "GraNd", "self-influence"):
        assert found[name]["roc_auc"] >= 0.9
    assert found["EL2N"]["precision"] >= 0.7
    assert 0.4 < found["input norm"]["roc_auc"] < 0.6  # the control finds nothing
    assert found["chance"] == {"score": "chance", "roc_auc": 0.5, "precision": 0.1}
    marked = result["confident_learning"]
    assert set(marked) == {"marked", "marked_and_flipped"}
    assert marked["marked"] >= marked["marked_and_flipped"] > 50


@pytest.mark.slow
def test_no_value_is_nan_while_it_runs():
    with jax.debug_nans(True):
        result = run(flip_fraction=0.1, num_steps=20, seeds=1, folds=2)
    assert len(result["found"])


def test_rows_are_ranked_by_networks_that_have_not_seen_them(result):
    rows = result["rows"]
    assert sorted(rows["row"]) == list(range(1000))
    assert rows["el2n"].is_monotonic_decreasing
    assert rows["flipped"].sum() == 100
    np.testing.assert_allclose(
        1 - rows["el2n"], rows["probability_of_label"], atol=1e-15
    )
    given = rows.set_index("row").sort_index()
    upper = given["label"] == "moon=upper"
    np.testing.assert_array_equal(upper == (MOONS.y[:, 0] == 0), ~given["flipped"])
    # cleanlab's own score of these probabilities orders unmarked rows as EL2N does.
    p = given["probability_of_label"].to_numpy()
    probabilities = np.where(upper.to_numpy()[:, None], [[1, 0]], [[0, 1]])
    probabilities = probabilities * (2 * p - 1)[:, None] + (1 - p)[:, None]
    quality = get_label_quality_scores((~upper).to_numpy().astype(int), probabilities)
    np.testing.assert_allclose(quality, p, atol=1e-12)


def test_saturated_networks_still_rank_labels():
    """Logits of 20 and 30 have one probability in float32, but not in float64."""
    layer: Any = jaxbce.Layer
    params = (layer(jnp.ones((1, 1, 1)), jnp.zeros((1, 1))),)  # of one network
    x, y = np.array([[20.0], [30.0], [-30.0]]), np.array([[0.0], [0.0], [0.0]])
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(float), params)
        scores, probability = find_mislabeled._score(params, x, y)
        el2n = np.asarray(scores["el2n"])
        assert el2n[1] > el2n[0]
    tail = np.exp(-30) / (1 + np.exp(-30))
    np.testing.assert_allclose(np.diag(probability[1:]), [tail, tail], rtol=1e-14)


def test_a_label_that_only_its_own_row_supports_is_suspicious_out_of_fold():
    """A network that had seen the row would have learned its flag by heart."""
    features = WITH_FLAG.features.copy()
    features.loc[0, "flag"] = 1000.0
    y = MOONS.y.copy()
    y[0] = 1 - y[0]
    result = run(table=MOONS._replace(features=features, y=y))
    first = result["rows"].set_index("row").loc[0]
    assert first["probability_of_label"] < 0.5
    assert result["found"] == []
    assert set(result["confident_learning"]) == {"marked"}
    assert "flipped" not in result["rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 2000}, "--folds=2000: one label has fewer rows than that"),
        ({"flip_fraction": 1e-6}, "--flip_fraction=1e-06: flips none of 1000 labels"),
        ({"batch_size": 900}, "--batch_size=900: moons has 750 rows to train on"),
        (
            {"optimizer": {"learning_rate": 1e30, "optimizer": "sgd"}, "num_steps": 5},
            "networks diverged; try a smaller --learning_rate",
        ),
        ({"optimizer": {"optimizer": "adamm"}}, "--optimizer=adamm: expected one of"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        run(**change)


def test_several_targets_are_refused():
    two = MOONS._replace(y=np.repeat(MOONS.y, 2, axis=1))
    with pytest.raises(InputError, match="--target: expected one target, got several"):
        run(table=two)


def test_without_cleanlab_the_rest_is_printed(result, monkeypatch, capsys):
    for name in ("cleanlab", "cleanlab.filter", "cleanlab.rank"):
        monkeypatch.setitem(sys.modules, name, None)
    given, probability = np.array([0.0, 1.0]), np.array([[0.8, 0.2], [0.2, 0.8]])
    assert find_mislabeled.confident_learning(given, probability) is None
    scores = dict.fromkeys((*find_mislabeled.SCORES, "input_norm"), given)
    rows = find_mislabeled.compare_scores(given > 0, scores, None)
    assert [row["score"] for row in rows] == [
        *("EL2N", "GraNd", "self-influence", "loss", "input norm", "chance")
    ]
    find_mislabeled._report({**result, "confident_learning": None})
    out = capsys.readouterr().out
    assert "cleanlab is not installed, so there is no comparison" in out
    assert "100 of 1000 labels were flipped" in out


# ------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The folder of a run of the command on a file, and its output."""
    folder = tmp_path_factory.mktemp("mislabeled")
    digits, labels = load_digits(return_X_y=True)
    data = pd.DataFrame(digits[:300]).add_prefix("pixel ")
    data["even"] = np.where(labels[:300] % 2 == 0, "yes", "no")
    data.loc[7, "even"] = "yes"  # a 7
    data.to_csv(folder / "mine.csv", index=False)
    status, out, err = run_command(
        "find_mislabeled",
        *(f"--data={folder / 'mine.csv'}", "--target=even", "--seeds=3"),
        *("--num_steps=200", "--folds=4", f"--output_dir={folder / 'out'}"),
        *("--batch_size=0", "--learning_rate=0.01"),
    )
    constant = "mine.csv: 'pixel 0', 'pixel 8', 'pixel 16', 'pixel 31', 'pixel 32'"
    assert (status, err) == (
        0,
        f"{constant} and 4 more: constant, so ignored\n",
    )
    return folder / "out", out


def test_a_file_as_it_is_is_ranked(printed):
    folder, out = printed
    assert "confident learning marks" in out
    assert "labels were flipped" not in out
    assert "The most suspicious by EL2N" in out
    rows = pd.read_csv(folder / "suspicious.csv")
    assert list(rows) == [
        *("row", "label", "probability_of_label"),
        *("el2n", "grand", "self_influence", "loss"),
    ]
    assert len(rows) == 300
    assert 8 in rows["row"][:10].tolist()  # of the file, from 1
    assert rows.loc[rows["row"] == 8, "label"].item() == "even=yes"
    document = json.loads((folder / "find_mislabeled.json").read_text(encoding="utf-8"))
    assert document["configuration"]["flipped"] == 0
    assert document["found"] == []
    assert set(document["confident_learning"]) == {"marked"}
    assert (folder / "suspicious.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_of_another_run_is_refused(printed, tmp_path):
    folder = shutil.copytree(printed[0], tmp_path / "copied")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    flags = ("--dataset=moons", f"--output_dir={folder}")
    status, _, err = run_command("find_mislabeled", *flags)
    assert status == 2
    assert "holds another run, with " in err
    assert "rows=300 there, 1000 here" in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_keys_of_results_are_snake_case(printed):
    assert odd_keys(printed[0]) == {}


def test_found_labels_are_written_and_images_drawn(result, tmp_path):
    table = datasets.load(dataset="digits")  # whose rows are images
    configuration = {**result["configuration"], "rank_by": "GraNd"}
    written = {**result, "configuration": configuration}
    for folder, data in ((tmp_path / "images", table), (tmp_path / "line", MOONS)):
        folder.mkdir()
        find_mislabeled.save(folder, data, written)
        assert (folder / "suspicious.png").stat().st_size > 10_000
        found = pd.read_csv(folder / "find_mislabeled.csv")
        assert list(found) == ["score", "roc_auc", "precision"]
        assert found["score"].tolist() == [row["score"] for row in result["found"]]
        assert odd_keys(folder) == {}


@pytest.mark.parametrize("name", find_mislabeled.SCORES.values())
def test_rows_are_ordered_by_the_score_asked_for(result, name):
    by_row = result["rows"].set_index("row").sort_index()
    scores = {key: by_row[key].to_numpy() for key in find_mislabeled.SCORES}
    flipped = by_row["flipped"].to_numpy()
    given = np.where(flipped, 1 - MOONS.y[:, 0], MOONS.y[:, 0])
    p = np.full((1000, 2), 0.5)
    rows = find_mislabeled.rank(MOONS, given, flipped, p, scores, name)
    key = next(k for k, shown in find_mislabeled.SCORES.items() if shown == name)
    assert rows[key].is_monotonic_decreasing
    assert rows["label"].tolist() == by_row["label"].loc[rows["row"]].tolist()


@pytest.mark.parametrize(
    ("flags", "fraction"),
    [
        ((), 0.05),
        (("--data=x.csv",), 0.0),
        (("--flip_fraction=0.2",), 0.2),
        (("--flip_fraction=0",), 0.0),
    ],
)
def test_flags_that_are_not_set_have_the_defaults_in_help(flags, fraction, monkeypatch):
    given = {}

    def stopped(**options):
        given.update(options)
        raise InputError("stopped")

    monkeypatch.setattr(find_mislabeled, "run", stopped)
    monkeypatch.setattr(datasets, "from_flags", lambda seed: MOONS)
    finished = run_command("find_mislabeled", *flags)
    assert (finished.status, finished.err) == (2, "find_mislabeled: stopped\n")
    assert given["flip_fraction"] == fraction
    assert (given["seeds"], given["folds"], given["rank_by"]) == (10, 5, "EL2N")
    training = given["training"]
    assert (training.num_steps, training.batch_size) == (400, 32)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--flip_fraction=nan", "--flip_fraction=nan: expected a number"),
        ("--flip_fraction=0.6", "flip_fraction=0.6"),
        ("--folds=1", "folds=1"),
        ("--rank_by=norm", "rank_by=norm"),
    ],
)
def test_a_bad_flag_is_one_line(flag, message):
    finished = run_command("find_mislabeled", flag)
    assert finished.status == 2
    assert finished.err.startswith("find_mislabeled: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1


@pytest.mark.slow
def test_a_bad_file_is_one_line_of_a_process():
    with start("find_mislabeled", "--data=no.csv", "--target=y") as process:
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert (process.returncode, out) == (2, "")
    assert err == "find_mislabeled: no.csv: No such file or directory\n"
