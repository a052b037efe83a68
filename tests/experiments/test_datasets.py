"""Data: what is read, how it is preprocessed and split, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from experiments.support import datasets, table_io
from experiments.support.cli import InputError

CSV = "a,b,label\n1,2,0\n3,4,1\n5,6,0\n"
MANY = "a,label\n" + "".join(f"word{i},{i % 2}\n" for i in range(101))
BAD_FILES = {
    "missing column": (CSV, "c", "no column 'c'; its columns are a, b, label"),
    "not a number": (CSV.replace("4", ""), "label", "column 'b' has nan in row 2"),
    "infinite": (CSV.replace("4", "inf"), "label", "column 'b' has inf in row 2"),
    "typing error": (
        CSV.replace("4", "four"),
        "label",
        "column 'b' is not numeric in row 2 below the header: 'four'",
    ),
    "free text": (MANY, "label", "column 'a' is text of 101 different values"),
    "missing category": (
        "a,label\nx,0\n,1\ny,1\n",
        "label",
        "column 'a' is missing in row 2",
    ),
    "one class": (
        CSV.replace("4,1", "4,0"),
        "label",
        "has the values 0; expected two different ones",
    ),
    "three classes": (
        CSV.replace("6,0", "6,2"),
        "label",
        "the values 0, 1, 2; expected two different",
    ),
    "missing label": (CSV.replace("4,1", "4,"), "label", "is missing in row 2"),
    "no rows": ("a,b,label\n", "label", "has no rows"),
    "empty": ("", "label", "No columns to parse"),
    "two columns of a name": (CSV.replace("b", "a", 1), "label", "are named 'a'"),
    "too large": ("a,label\n1.7e308,0\n-1.7e308,1\n", "label", "'a' is too large"),
    "no features": ("label\n0\n1\n", "label", "has no column besides 'label'"),
    "more fields": ("a,b,label\n90,0,0,1\n91,1,1,0\n", "label", "more fields than"),
    "target twice": (CSV, "label,label", "--target=label,label: names a column twice"),
    "one target of two": (
        CSV,
        "label,a",
        "target 'a' has the values 1, 3, 5; expected two",
    ),
}


@pytest.mark.parametrize(
    ("text", "target", "message"), BAD_FILES.values(), ids=BAD_FILES
)
def test_a_bad_file_is_refused_with_what_is_wrong(tmp_path, text, target, message):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        datasets.preprocess_all(datasets.load(data=str(path), target=target.split(",")))
    assert message in str(error.value)
    assert str(path) in str(error.value) or "--target" in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"data": "nowhere.csv", "target": ["y"]}, "nowhere.csv: No such file"),
        (
            {"data": "data.xlsx", "target": ["y"]},
            r"data\.xlsx: expected a \.csv or \.parquet file",
        ),
        ({"data": "data.csv"}, "--data needs --target"),
        ({"target": ["y"]}, "--target needs --data"),
        ({"positive": "1"}, "--positive needs --data"),
        (
            {"data": "data.csv", "dataset": "xor"},
            "expected --data or --dataset, got both",
        ),
    ],
)
def test_a_bad_choice_of_data_is_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        datasets.load(**kwargs)


def written(tmp_path, table, name="data.csv"):
    path = tmp_path / name
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return str(path)


@pytest.mark.parametrize(
    "labels", [(0, 1), (-1, 1), ("no", "yes"), (False, True), (1, 2)]
)
def test_labels_of_any_two_values_become_0_and_1(tmp_path, labels):
    column = [labels[1], *labels, labels[0]]
    path = written(tmp_path, pd.DataFrame({"a": [1.0, 2, 3, 5], "y": column}))
    for positive, truth in ((None, [1, 0, 1, 0]), (str(labels[0]), [0, 1, 0, 1])):
        table = datasets.load(data=path, target=["y"], positive=positive)
        np.testing.assert_array_equal(table.y.ravel(), truth)
    assert table.classes == {"y": (labels[1], labels[0])}
    x, _ = datasets.preprocess_all(table)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x.std(0), 1)
    with pytest.raises(InputError, match="--positive=maybe is neither"):
        datasets.load(data=path, target=["y"], positive="maybe")


@pytest.mark.parametrize("name", ["data.csv", "data.parquet"])
def test_numbers_are_standardised_and_text_is_one_hot(tmp_path, name):
    table = pd.DataFrame(
        {
            "size": [1, 2, 3, 4],
            "flag": [True, False, True, False],
            "color": ["red", "blue", "red", "green"],
            "y": [0, 1, 0, 1],
            "z": ["a", "a", "b", "b"],
        }
    )
    if name.endswith("parquet"):
        table["color"] = table["color"].astype("category")
        table["size"] = table["size"].astype("Int64")
    data = datasets.load(data=written(tmp_path, table, name), target=["y", "z"])
    assert list(data.features.columns) == ["size", "flag", "color"]
    np.testing.assert_array_equal(data.y, [[0, 0], [1, 0], [0, 1], [1, 1]])
    x, _ = datasets.preprocess_all(data)
    assert x.shape == (4, 5)
    np.testing.assert_allclose(x[:, :2].std(0), 1)
    np.testing.assert_array_equal(
        x[:, 2:], [[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    )


def test_a_split_is_stratified_and_preprocessed_by_the_training_rows_alone():
    table = datasets.load(dataset="breast_cancer")
    splits, preprocessor = datasets.split(table, seed=3)
    assert [len(split.rows) for split in splits.values()] == [341, 114, 114]
    rows = np.concatenate([split.rows for split in splits.values()])
    np.testing.assert_array_equal(np.sort(rows), np.arange(569))
    for split in splits.values():
        assert abs(split.y.mean() - table.y.mean()) < 0.01
        np.testing.assert_array_equal(split.y, table.y[split.rows])
    train, test = splits["train"], splits["test"]
    np.testing.assert_allclose(train.x.mean(0), 0, atol=1e-9)
    assert np.abs(test.x.mean(0)).max() > 1e-3
    preprocessed = datasets.preprocess("", preprocessor, table.features.iloc[test.rows])
    np.testing.assert_array_equal(test.x, preprocessed)
    again, _ = datasets.split(table, seed=3)
    np.testing.assert_array_equal(again["test"].rows, test.rows)
    other, _ = datasets.split(table, seed=4)
    assert set(other["test"].rows) != set(test.rows)


def test_a_rare_label_is_refused_and_a_rare_combination_is_not(tmp_path):
    y = [0] * 50 + [1] * 50
    few = pd.DataFrame({"a": np.arange(100.0), "y": [1] * 4 + [0] * 96})
    with pytest.raises(InputError, match="'y' has 4 rows of 1; at least 5 are needed"):
        datasets.split(datasets.load(data=written(tmp_path, few), target=["y"]), 0)
    several = pd.DataFrame(
        {"a": np.arange(100.0), "y": y, "z": [0] * 48 + [1] * 50 + [0] * 2}
    )
    table = datasets.load(data=written(tmp_path, several), target=["y", "z"])
    splits, _ = datasets.split(table, 0)
    assert all(set(split.y[:, 0]) == {0, 1} for split in splits.values())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pd.to_datetime(["2020-01-01", "2021-01-01"]), "Timestamp"),
        ([b"a", b"b"], "bytes"),
        ([[1], [2]], "ndarray"),
    ],
)
def test_a_target_of_another_kind_is_refused(tmp_path, values, kind):
    path = written(tmp_path, pd.DataFrame({"a": [1.0, 2], "y": values}), "d.parquet")
    with pytest.raises(
        InputError, match=f"'y' is {kind}, expected numbers, text or booleans"
    ):
        datasets.load(data=path, target=["y"])


def test_a_value_far_beyond_the_training_rows_is_refused():
    table = datasets.load(dataset="xor")
    _, preprocessor = datasets.split(table, 0)
    row = table.features.iloc[:1].assign(x1=1e60)
    with pytest.raises(InputError, match="new: column 'x1' is too large"):
        datasets.preprocess("new", preprocessor, row)


def test_categories_are_what_training_says_they_are():
    numbers = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    read = table_io.features("f", numbers, categories=["a", "b"])
    assert read["a"].tolist() == ["1", "2"]
    with pytest.raises(InputError, match=r"f: column 'b' is .*, expected numbers"):
        table_io.features("f", numbers, categories=["a"])


@pytest.mark.parametrize("dataset", ["digits", "breast_cancer", "moons", "xor"])
def test_named_data_is_standardised_and_has_both_classes(dataset):
    table = datasets.load(dataset=dataset)
    x, y = datasets.preprocess_all(table)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-9)
    assert set(np.round(x.std(0), 9)) <= {0, 1}
    assert set(y.ravel()) == {0, 1}
    assert 0.3 < y.mean() < 0.7
    assert len(table.classes) == 1
