"""`experiments.find_mislabeled`: flipped labels are found, and files say which."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cleanlab.rank import get_label_quality_scores
from sklearn.datasets import load_digits

from experiments import find_mislabeled
from experiments.support import datasets
from experiments.support.cli import InputError
from tests.helpers import start

TOY: Any = {"num_steps": 40, "seeds": 2, "folds": 3, "hidden": (8,)}


pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_five_percent_of_digits_are_found():
    table = datasets.load(dataset="digits")
    result = find_mislabeled.run(table=table, flip_fraction=0.05, seeds=5)
    found = {row["score"]: row for row in result["found"]}
    assert result["configuration"]["flipped"] == 90
    assert found["EL2N"]["ROC AUC"] >= 0.98
    assert found["loss"]["ROC AUC"] >= 0.98
    for name in ("GraNd", "self-influence"):
        assert found[name]["ROC AUC"] >= 0.97
    assert found["EL2N"]["precision"] >= 0.8
    assert 0.4 < found["input norm"]["ROC AUC"] < 0.6  # the control finds nothing
    marked = result["confident learning"]
    assert marked["marked"] >= marked["of them flipped"] > 45


def test_rows_are_ranked_by_networks_that_have_not_seen_them():
    table = datasets.load(dataset="moons")
    result = find_mislabeled.run(table=table, flip_fraction=0.1, **TOY)
    rows = result["rows"]
    assert sorted(rows["row"]) == list(range(1000))
    assert rows["EL2N"].is_monotonic_decreasing
    assert rows["flipped"].sum() == 100
    np.testing.assert_allclose(
        1 - rows["EL2N"], rows["probability of label"], atol=1e-5
    )
    given = rows.set_index("row").sort_index()
    upper = given["label"] == "moon=upper"
    np.testing.assert_array_equal(upper == (table.y[:, 0] == 0), ~given["flipped"])
    # cleanlab's own score of these probabilities orders unmarked rows as EL2N does.
    p = given["probability of label"].to_numpy()
    probabilities = np.where(upper.to_numpy()[:, None], [[1, 0]], [[0, 1]])
    probabilities = probabilities * (2 * p - 1)[:, None] + (1 - p)[:, None]
    quality = get_label_quality_scores((~upper).to_numpy().astype(int), probabilities)
    np.testing.assert_allclose(quality, p, atol=1e-6)


def test_a_label_that_only_its_own_row_supports_is_suspicious_out_of_fold():
    """A network that had seen the row would have learned its flag by heart."""
    table = datasets.load(dataset="moons")
    features = table.features.assign(flag=0.0)
    features.loc[0, "flag"] = 1000.0
    y = table.y.copy()
    y[0] = 1 - y[0]
    changed = table._replace(features=features, y=y)
    result = find_mislabeled.run(table=changed, **{**TOY, "num_steps": 300})
    first = result["rows"].set_index("row").loc[0]
    assert first["probability of label"] < 0.5
    assert result["found"] == []
    assert "flipped" not in result["rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 2000}, "--folds=2000"),
        ({"flip_fraction": 1e-6}, "flips none"),
        ({"batch_size": 900}, "has 666 rows to train on"),
        ({"learning_rate": 1e30, "optimizer": "sgd"}, "diverged"),
        ({"optimizer": "adamm"}, "--optimizer=adamm"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        find_mislabeled.run(table=datasets.load(dataset="moons"), **{**TOY, **change})


def test_several_targets_are_refused():
    table = datasets.load(dataset="moons")
    two = table._replace(y=np.repeat(table.y, 2, axis=1))
    with pytest.raises(InputError, match="one target"):
        find_mislabeled.run(table=two, **TOY)


def test_a_file_as_it_is_is_ranked(tmp_path):
    digits, labels = load_digits(return_X_y=True)
    data = pd.DataFrame(digits[:300]).add_prefix("pixel ")
    data["even"] = np.where(labels[:300] % 2 == 0, "yes", "no")
    data.loc[7, "even"] = "yes"  # a 7
    data.to_csv(tmp_path / "mine.csv", index=False)
    folder = tmp_path / "out"
    process = start(
        "find_mislabeled",
        *(f"--data={tmp_path / 'mine.csv'}", "--target=even", "--seeds=3"),
        *("--num_steps=200", "--folds=4", f"--output_dir={folder}"),
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "confident learning marks" in out
    rows = pd.read_csv(folder / "suspicious.csv")
    assert len(rows) == 300
    assert 7 in rows["row"][:10].tolist()
    assert rows.loc[rows["row"] == 7, "label"].item() == "even=yes"
    document = json.loads((folder / "find_mislabeled.json").read_text(encoding="utf-8"))
    assert document["configuration"]["flipped"] == 0
    assert (folder / "suspicious.png").read_bytes().startswith(b"\x89PNG")
