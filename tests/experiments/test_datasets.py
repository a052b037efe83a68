"""Data: how it is preprocessed and split, and which choices are refused."""

import numpy as np
import pandas as pd
import pytest

from experiments.support import datasets, metrics, preprocessing
from experiments.support.cli import InputError
from experiments.support.datasets import Selection


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"data": "nowhere.csv", "target": ["y"]}, "nowhere.csv: No such file"),
        (
            {"data": "data.xlsx", "target": ["y"]},
            r"data\.xlsx: expected a file \.csv, .*, \.parquet or \.pq",
        ),
        ({"data": "data.csv"}, "--data needs --target"),
        ({"target": ["y"]}, "--target needs --data"),
        ({"positive": "1"}, "--positive needs --data"),
        (
            {"data": "data.csv", "dataset": "xor"},
            "expected --data or --dataset, got both",
        ),
        ({"data": "x.csv", "target": ["y", "y"]}, "--target=y,y: names a column twice"),
    ],
)
def test_a_bad_choice_of_data_is_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        datasets.load(**kwargs)


def loaded(tmp_path, table, target=("y",), **options):
    """The dataset of a CSV file with this content."""
    path = tmp_path / "data.csv"
    table.to_csv(path, index=False)
    return datasets.load(data=str(path), target=list(target), **options)


def preprocessed(table, rows=slice(None)):
    """All features, preprocessed by some rows; and the preprocessor."""
    missing = table.schema.missing
    fitted = preprocessing.fit(table.name, table.features.iloc[rows], missing)
    return preprocessing.transform(table.name, fitted, table.features), fitted


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
    features = table.features.iloc[test.rows]
    np.testing.assert_array_equal(
        test.x, preprocessing.transform("", preprocessor, features)
    )
    again, _ = datasets.split(table, seed=3)
    np.testing.assert_array_equal(again["test"].rows, test.rows)
    other, _ = datasets.split(table, seed=4)
    assert set(other["test"].rows) != set(test.rows)


def test_a_rare_label_is_refused_and_a_rare_combination_is_not(tmp_path):
    y = [0] * 50 + [1] * 50
    few = pd.DataFrame({"a": np.arange(100.0), "y": [1] * 4 + [0] * 96})
    with pytest.raises(InputError, match="'y' has 4 rows of 1; at least 5 are needed"):
        datasets.split(loaded(tmp_path, few), 0)
    several = pd.DataFrame(
        {"a": np.arange(100.0), "y": y, "z": [0] * 48 + [1] * 50 + [0] * 2}
    )
    splits, _ = datasets.split(loaded(tmp_path, several, ["y", "z"]), 0)
    assert all(set(split.y[:, 0]) == {0, 1} for split in splits.values())


@pytest.mark.parametrize("dataset", ["digits", "breast_cancer", "moons", "xor"])
def test_named_data_is_standardised_and_has_both_classes(dataset):
    table = datasets.load(dataset=dataset)
    x, y = datasets.preprocess_all(table)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-9)
    assert set(np.round(x.std(0), 9)) <= {0, 1}
    assert set(y.ravel()) == {0, 1}
    assert 0.3 < y.mean() < 0.7
    assert len(table.classes) == 1


# ---------------------------------------------------------------------- missing values


def test_missing_values_become_the_median_or_the_most_frequent_of_the_rows_fitted_to(
    tmp_path,
):
    size = [1.0, 2, 9, None, 100, 200]
    kind = ["a", "b", "b", None, "a", "a"]
    columns = {"size": size, "kind": kind, "full": range(6), "y": [0, 1] * 3}
    table = loaded(tmp_path, pd.DataFrame(columns))
    x, fitted = preprocessed(table, slice(0, 4))
    assert list(fitted.get_feature_names_out()) == [
        *("numbers__size", "numbers__full", "categories__kind='a'"),
        *("categories__kind='b'", "missing__missingindicator_size"),
        "missing__missingindicator_kind",
    ]
    np.testing.assert_allclose(x[3, 0], x[1, 0])  # the median of 1, 2 and 9
    np.testing.assert_array_equal(x[3, 2:4], [0, 1])  # b
    np.testing.assert_array_equal(x[:, 4:], np.eye(6)[:, [3, 3]])
    scale = np.std([1, 2, 9])
    np.testing.assert_allclose(x[[0, 5], 0], (np.array([1, 200]) - 4) / scale)


@pytest.mark.parametrize(
    ("missing", "width"), [("impute", 2), ("indicator", 4), ("drop", 2)]
)
def test_an_indicator_says_where_more_than_one_in_a_hundred_are_missing(
    tmp_path, missing, width
):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(200, 2)), columns=["a", "b"])
    table["y"] = [0, 1] * 100
    table.loc[[3, 5], "a"] = np.nan  # 1%
    table.loc[[3, 7], "b"] = np.nan
    data = loaded(tmp_path, table, selection=Selection(missing=missing))
    x, _ = preprocessed(data)
    assert x.shape == (197 if missing == "drop" else 200, width)
    assert np.isfinite(x).all()
    kept = [i for i in range(1, 201) if missing != "drop" or i not in (4, 6, 8)]
    assert data.features.index.tolist() == kept  # rows of the file, from 1
    table.loc[[9], "b"] = np.nan
    more, _ = preprocessed(loaded(tmp_path, table, selection=Selection()))
    assert more.shape == (200, 3)
    np.testing.assert_array_equal(np.flatnonzero(more[:, 2]), [3, 7, 9])


def test_missing_values_are_all_refused_if_asked_for(tmp_path):
    table = pd.DataFrame({"a": [1, None, None], "b": ["x", "y", None], "y": [0, 1, 0]})
    with pytest.raises(InputError) as error:
        loaded(tmp_path, table, selection=Selection(missing="error"))
    lines = str(error.value).splitlines()
    assert [line.split()[:4] for line in lines[4:6]] == [
        ["'a'", "missing", "2", "2"],
        ["'b'", "missing", "1", "3"],
    ]


def test_missing_values_of_rows_without_labels_are_not_refused(tmp_path):
    table = pd.DataFrame({"a": [1, 2, None], "y": [0, 1, None]})
    data = loaded(tmp_path, table, selection=Selection(missing="error"))
    assert data.features["a"].tolist() == [1, 2]


def test_preprocessed_columns_have_different_names_whatever_the_features_are():
    kinds = {"a": ["b_c", "d", None], "a_b": ["c", "e", "e"]}
    features = pd.DataFrame({"a_b_c": [1.0, 2, 3], "missingindicator_a": [4.0, 4, 5]})
    features = features.assign(**{k: np.array(v, object) for k, v in kinds.items()})
    fitted = preprocessing.fit("t", features, "impute")
    x = preprocessing.transform("t", fitted, features)
    names = fitted.get_feature_names_out()
    assert x.shape[1] == len(set(names)) == len(names) == 7
    assert (x != x[:1]).any(axis=0).all()


def test_any_cell_may_be_missing_in_a_row_to_be_scored():
    table = datasets.load(dataset="breast_cancer")
    splits, preprocessor = datasets.split(table, 0)
    row = table.features.iloc[:1]
    whole = preprocessing.transform("new", preprocessor, row)
    median = np.median(splits["train"].x, axis=0)
    for column in (0, 29):
        some = row.copy()
        some.iloc[0, column] = np.nan
        found = preprocessing.transform("new", preprocessor, some)
        expected = np.where(np.arange(30) == column, median, whole)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_value_far_beyond_the_training_rows_is_read_as_missing(capsys):
    table = datasets.load(dataset="xor")
    _, preprocessor = datasets.split(table, 0)
    rows = table.features.iloc[[0, 0, 0]].assign(x1=[1e60, np.nan, 0.5])
    x = preprocessing.transform("new.csv", preprocessor, rows)
    np.testing.assert_array_equal(x[0], x[1])
    assert x[2, 0] != x[0, 0]
    assert capsys.readouterr().err == (
        "new.csv: 'x1' is too large in 1 rows; treated as missing\n"
    )


def test_numbers_that_cannot_be_standardized_are_refused(tmp_path):
    table = pd.DataFrame({"a": [1.7e308, -1.7e308], "y": [0, 1]})
    with pytest.raises(InputError, match="'a' has values too large to standardize"):
        datasets.preprocess_all(loaded(tmp_path, table))


def test_what_is_constant_in_training_has_no_influence():
    numbers = pd.DataFrame({"a": [1.0, 2, 3, 4], "b": [7.0, 7, 7, 8], "c": np.nan})
    features = numbers.assign(d=np.array(["x", "x", "x", "y"], object))
    fitted = preprocessing.fit("t", features.iloc[:3], "impute")
    x = preprocessing.transform("t", fitted, features.assign(c=[np.nan, 0, 1, 2]))
    assert x.shape == (4, 3)
    np.testing.assert_array_equal(x[:, 1:], 0)
    with pytest.raises(InputError, match="t: all features are constant"):
        preprocessing.fit("t", features[["d"]].iloc[:3], "impute")


def test_a_number_too_large_is_missing_for_metrics_and_importances(tmp_path, capsys):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(40, 2)), columns=["a", "b"])
    table["y"] = [0, 1] * 20
    data = loaded(tmp_path, table)
    fitted = preprocessing.fit("", data.features, "impute")
    large = data.features.assign(
        a=data.features["a"].where(data.features.index != 3, 1e30)
    )
    x = preprocessing.transform("new.csv", fitted, large)
    assert "new.csv: 'a' is too large in 1 rows; treated as missing" in (
        capsys.readouterr().err
    )
    kept = preprocessing.mask_too_large(fitted, large)
    np.testing.assert_array_equal(fitted.transform(kept), x)
    importances = metrics.permutation_importances(
        fitted, lambda x: x[:, :1], kept, data.y, seed=0
    )
    assert np.abs(importances["importance"].to_numpy()).max() < 10
