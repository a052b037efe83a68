"""Splits by label, group and time, and from files of their own."""

import numpy as np
import pandas as pd
import pytest

from experiments.support import datasets, splitting
from experiments.support.cli import InputError
from experiments.support.datasets import Selection

RNG = np.random.default_rng(0)
N = 200
ROWS = pd.DataFrame(
    {
        "size": RNG.normal(size=N),
        "kind": RNG.choice(["a", "b"], N),
        "patient": RNG.integers(100, 140, N),
        "when": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(N) % 90, "D"),
        "y": RNG.choice(["no", "yes"], N),
    }
).sample(frac=1, random_state=0, ignore_index=True)


def write(path, table):
    table.to_csv(path, index=False)
    return str(path)


@pytest.fixture
def load(tmp_path):
    """A function that writes rows to a file and loads them."""

    def load(rows=ROWS, files=None, **selection):
        held_out = {
            name: write(tmp_path / f"{name}.csv", table)
            for name, table in (files or {}).items()
        }
        return datasets.load(
            data=write(tmp_path / "data.csv", rows),
            target=["y"],
            selection=Selection(**selection),
            held_out=held_out,
        )

    return load


def column_by_split(table, name, seed=0):
    """The values of a column of `ROWS` in each split."""
    splits, _ = datasets.split(table, seed)
    rows = {split: table.features.index[splits[split].rows] - 1 for split in splits}
    return {split: ROWS[name].iloc[rows[split]] for split in rows}


def test_rows_of_a_group_are_in_one_split_and_labels_are_stratified(load):
    table = load(group="patient")
    assert list(table.features)[:2] == ["size", "kind"]
    assert not any("patient" in name for name in table.features)
    found = column_by_split(table, "patient")
    groups = [set(values) for values in found.values()]
    assert len(set().union(*groups)) == sum(map(len, groups)) == ROWS.patient.nunique()
    sizes = [len(values) for values in found.values()]
    assert sum(sizes) == N
    np.testing.assert_allclose(sizes, [120, 40, 40], atol=8)
    for values in column_by_split(table, "y").values():
        assert abs((values == "yes").mean() - (ROWS.y == "yes").mean()) < 0.1
    again = column_by_split(table, "patient")
    pd.testing.assert_series_equal(again["test"], found["test"])
    other = column_by_split(table, "patient", seed=1)
    assert set(other["test"]) != set(found["test"])


@pytest.mark.parametrize("as_number", [False, True])
def test_the_latest_rows_are_for_the_test_and_the_next_ones_for_validation(
    load, as_number
):
    days = (ROWS["when"] - ROWS["when"].min()).dt.days
    table = load(ROWS.assign(when=days) if as_number else ROWS, time="when")
    assert not any("when" in name for name in table.features)
    found = column_by_split(table, "when")
    assert found["train"].max() < found["validation"].min()
    assert found["validation"].max() < found["test"].min()
    sizes = [len(values) for values in found.values()]
    np.testing.assert_allclose(sizes, [120, 40, 40], atol=2)
    pd.testing.assert_series_equal(
        column_by_split(table, "when", 5)["test"], found["test"]
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_split_by_time_cuts_nearest_to_its_share(seed):
    rng = np.random.default_rng(seed)
    time = pd.Series(rng.integers(0, 9, 60), name="t")
    y = rng.integers(0, 2, (60, 1))
    rows = splitting.divide("data", y, 0, given=["validation"], time=time)
    held_out = len(rows["test"])
    possible = [(time > t).sum() for t in range(9)]
    assert abs(held_out - 15) == min(abs(count - 15) for count in possible)


def test_a_column_named_in_columns_is_a_feature_as_well(load):
    table = load(group="patient", columns=["size", "patient"])
    assert list(table.features) == ["size", "patient"]
    table = load(time="when", columns=["size", "when"])
    assert "when month" in table.features


def test_files_for_validation_and_test_are_taken_whole(load):
    """They are preprocessed by the training rows, which are all rows of --data."""
    parts = {"validation": ROWS[100:130], "test": ROWS[130:]}
    table = load(ROWS[:100], parts, drop=["when"])
    splits, preprocessor = datasets.split(table, 0)
    assert [len(split.rows) for split in splits.values()] == [100, 30, 70]
    size = ROWS["size"].to_numpy()
    for name, rows in parts.items():
        split = splits[name]
        np.testing.assert_array_equal(split.y[:, 0], rows.y == "yes")
        expected = (rows["size"] - np.mean(size[:100])) / np.std(size[:100])
        np.testing.assert_allclose(split.x[:, 0], expected, rtol=1e-12)
        assert list(table.features.index[split.rows]) == list(range(1, len(rows) + 1))
    assert len(preprocessor.get_feature_names_out()) == 4  # size, patient, a and b


@pytest.mark.parametrize("name", ["validation", "test"])
def test_what_one_file_leaves_is_split_in_the_same_proportions(load, name):
    table = load(ROWS[:100], {name: ROWS[100:]})
    splits, _ = datasets.split(table, 0)
    other = {"validation": "test", "test": "validation"}[name]
    sizes = {split: len(splits[split].rows) for split in splits}
    assert sizes == {"train": 75, other: 25, name: 100}


def test_a_file_of_its_own_is_read_as_the_file_to_train_on(load, capsys):
    text = ROWS.assign(kind=ROWS.kind.map({"a": "01", "b": "A1"}))
    known, new = (text.query(f"kind == '{k}'")[:20] for k in ("01", "A1"))
    other = pd.concat([known.assign(y="yes"), new.assign(kind="02", y="no")])
    table = load(text, {"test": other})
    splits, _ = datasets.split(table, 0)
    held_out = table.features.iloc[splits["test"].rows]
    assert list(held_out.kind) == ["01"] * 20 + ["02"] * 20
    error = capsys.readouterr().err
    assert "test.csv: 'kind' is '02' in 20 rows, not seen in training" in error


@pytest.mark.parametrize(
    "labels", [[False, True], ["false", "TRUE"], [0, 1], ["0", 1.0]]
)
def test_labels_0_and_1_are_false_and_true_in_another_file(load, labels):
    """In both directions."""
    ours = ROWS.assign(y=np.where(ROWS.y == "yes", 1, 0))
    theirs = ROWS.assign(y=[labels[i] for i in ours.y])
    for rows, other in ((ours, theirs), (theirs, ours)):
        splits, _ = datasets.split(load(rows, {"test": other}), 0)
        np.testing.assert_array_equal(splits["test"].y[:, 0], ours.y)


def test_missing_values_and_labels_of_a_file_of_its_own(load, capsys):
    other = ROWS[:50].astype({"y": object})
    other.loc[3, "y"] = None
    other.loc[5, "size"] = None
    table = load(files={"test": other})
    assert "test.csv: 1 rows without label are left out, such as row 4" in (
        capsys.readouterr().err
    )
    splits, _ = datasets.split(table, 0)
    assert len(splits["test"].rows) == 49
    assert np.isfinite(splits["test"].x).all()
    with pytest.raises(InputError, match=r"'size' +missing +1 +6"):
        load(files={"test": other}, missing="error")
    other.loc[[7, 9], "y"] = "maybe"
    with pytest.raises(
        InputError, match=r"'y' +labels 'maybe'; expected 'no' or 'yes' +2 +8"
    ):
        load(files={"test": other})


def test_rows_and_groups_that_are_also_trained_on_are_reported(load, capsys):
    load(files={"test": ROWS[:100]})
    message = "test.csv: 100% of its rows also occur in the other files"
    assert message in capsys.readouterr().err
    load(ROWS[:100], files={"test": ROWS[99:]})
    columns = ["kind"]  # in which rows repeat each other
    load(ROWS[:100], files={"test": ROWS[100:]}, columns=columns)
    assert "also" not in capsys.readouterr().err
    load(ROWS[:100], files={"test": ROWS[100:]}, group="patient")
    shared = len({*ROWS.patient[:100]} & {*ROWS.patient[100:]})
    message = f"test.csv: {shared} values of 'patient' are also in the file to train on"
    assert message in capsys.readouterr().err


def test_a_large_group_is_trained_on(load):
    rows = ROWS.assign(patient=np.where(np.arange(N) < 120, 1, ROWS.patient))
    for seed in range(3):
        splits, _ = datasets.split(load(rows, group="patient"), seed)
        sizes = [len(splits[name].rows) for name in ("train", "validation", "test")]
        assert sizes[0] >= 120
        assert min(sizes) > 15


def test_two_files_leave_all_rows_of_a_rare_label_to_train_on(load):
    rare = ROWS.assign(y=np.where(np.arange(N) < 3, "yes", "no"))
    splits, _ = datasets.split(load(rare, {"validation": ROWS, "test": ROWS}), 0)
    assert splits["train"].y.sum() == 3


def few(**columns):
    return ROWS.assign(**columns)


@pytest.mark.parametrize(
    ("rows", "selection", "message"),
    [
        (ROWS, {"group": "who"}, "no column 'who'"),
        (ROWS, {"group": "y"}, "no column 'y'"),
        (ROWS, {"group": "patient", "time": "when"}, "--group or --time, got both"),
        (ROWS, {"time": "kind"}, "'kind' +a category; expected numbers or dates"),
        (
            few(g=np.arange(N) % 4),
            {"group": "g"},
            "--group=g: .*data.csv has 4 groups; at least 5 are needed",
        ),
        (
            few(t=np.arange(N) % 4),
            {"time": "t"},
            "--time=t: .*data.csv has 4 times; at least 5 are needed",
        ),
        (
            few(y=np.where(np.arange(N) < 5, "yes", "no"), g=np.arange(N) < 196),
            {"group": "g"},
            "--group=g: .*data.csv has 2 groups",
        ),
        (
            few(g=np.where(np.arange(N) < 195, 0, np.arange(N))),
            {"group": "g"},
            "--group=g: .*too few rows of a label|in all .* rows",
        ),
        (
            few(y=ROWS.y.where(np.arange(N) < 150, "yes"), t=np.arange(N)),
            {"time": "t"},
            "target 'y' is 'yes' in all test rows",
        ),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(load, rows, selection, message):
    with pytest.raises(InputError, match=message):
        datasets.split(load(rows, **selection), 0)


def test_files_that_leave_nothing_to_split_refuse_a_group(load):
    with pytest.raises(InputError, match="--group has no effect if --validation"):
        load(files={"validation": ROWS, "test": ROWS}, group="patient")


def test_rows_without_group_are_left_out(load, capsys):
    some = ROWS.astype({"patient": object})
    some.loc[[2, 4], "patient"] = None
    table = load(some, group="patient")
    assert len(table.y) == N - 2
    assert "2 rows without 'patient' are left out, such as row 3" in (
        capsys.readouterr().err
    )


def test_the_digest_tells_how_rows_are_split(load):
    tables = [
        load(drop=["patient", "when"]),
        load(group="patient", drop=["when"]),
        load(time="when", drop=["patient"]),
        load(files={"test": ROWS[:60]}, drop=["patient", "when"]),
        load(files={"validation": ROWS[:60]}, drop=["patient", "when"]),
    ]
    assert len({datasets.digest(table) for table in tables}) == len(tables)
    described = [datasets.describe(table) for table in tables[1:4]]
    assert described[0]["group"] == "patient"
    assert described[1]["time"] == "when"
    assert described[2]["test"].endswith("test.csv")
