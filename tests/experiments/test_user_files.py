"""The user's own files: what a cell means, what is refused, what is warned of."""

import bz2
import csv
import datetime
import decimal
import functools
import gzip
import io
import itertools
import lzma
from pathlib import Path
from typing import Any

import jax
import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import jaxbce
from experiments.support import (
    datasets,
    preprocessing,
    schema,
    table_io,
    user_files,
)
from experiments.support.cli import InputError
from experiments.support.datasets import Format, Selection
from experiments.support.schema import Column, Schema
from tests.helpers import run_command


def load(path, text=None, target="label", **options):
    """The dataset of a file, which is written first if there is a text."""
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return datasets.load(data=str(path), target=target.split(","), **options)


def kinds(table):
    """The kind of each column."""
    return {column.name: column.kind for column in table.schema.columns}


# --------------------------------------------------------------------- what is refused

CSV = "a,b,label\n1,2,0\n3,4,1\n5,6,0\n"
MANY = "a,label\n" + "".join(f"word{i},{i % 2}\n" for i in range(101))
BAD_FILES = {
    "missing column": (CSV, "c", "no column 'c'; its columns are 'a', 'b', 'label'"),
    "missing columns": (CSV, "c,d", "no columns 'c', 'd'; its columns"),
    "many missing": (CSV, ",".join("cdefghijklmnopqrstuvwxyz"), "'v' and 4 more; its"),
    "other case": (CSV, "LABEL", "no column 'LABEL' (did you mean 'label'?); its col"),
    "typing error in a name": (CSV, "lable", "'lable' (did you mean 'label'?); its"),
    "infinite": (CSV.replace("4", "inf"), "label", "not a number: 'inf'  1  2  --na_"),
    "typing error": (CSV.replace("4", "?"), "label", "'b' not a number: '?' 1 2 "),
    "remedies": (
        CSV.replace("4", "?").replace(",b,", ",b b,"),
        "label",
        "--na_values='?' or --categorical='b b' or --drop='b b'",
    ),
    "free text": (MANY, "label", "'a' text of 101 different values, such as 'word0'"),
    "one class": (
        CSV.replace("4,1", "4,0"),
        "label",
        "labels of 1 values: 0; expected",
    ),
    "three classes": (
        CSV.replace("6,0", "6,2"),
        "label",
        "labels of 3 values: 0, 1, 2; expected two 3 1 another --target",
    ),
    "no labels": (CSV.replace(",0\n", ",\n").replace(",1\n", ",\n"), "label", "of 0"),
    "no rows": ("a,b,label\n", "label", "has no rows"),
    "empty": ("", "label", "data.csv: is empty"),
    "blank": ("\n  \n", "label", "data.csv: is empty"),
    "two columns of a name": (CSV.replace("b", " a", 1), "label", "are named 'a'"),
    "no features": ("label\n0\n1\n", "label", "no features are left"),
    "more cells": (
        "\na,b,label\n9,1,0\n\n90,0,0,1\n",
        "label",
        "line 5 has 4 cells, more than the header, which has 3: 'a,b,label'; is --sep",
    ),
    "title above the header": (
        f"Sales, all\x1fyears\n\n{CSV}",
        "label",
        "line 3 has 3 cells, more than the header, which has 2: 'Sales, all",
    ),
    "wide title above the header": (
        f"Sales,,\n,,\n{CSV}",
        "label",
        "its columns are 'Sales', 'Unnamed: 1', 'Unnamed: 2'; is row 2 the header?",
    ),
    "open quote": (
        CSV.replace("4", '"4'),
        "label",
        "a quote in line 3 is never closed",
    ),
    "one target of two": (CSV, "label,a", "labels of 3 values: 1, 3, 5; expected"),
    "percent": (CSV.replace("4", "4.5 %"), "label", "'4.5 %' 1 2 remove the signs"),
    "currency": (CSV.replace("4", "$ 4"), "label", "with a currency sign, such as"),
    "thousands": (
        CSV.replace("4", '"1,234.5"'),
        "label",
        "thousands separators, such as '1,234.5' 1 2 --thousands=, or --categorical=b",
    ),
    "decimal comma": (
        CSV.replace(",", ";").replace("4", "4,5"),
        "label",
        "'b' numbers with a decimal comma, such as '4,5' 1 2 --decimal=, or",
    ),
    "thousands and a decimal comma": (
        CSV.replace(",", ";").replace("4", "1.234,5"),
        "label",
        "a decimal comma, such as '1.234,5' 1 2 --decimal=, --thousands=. or",
    ),
    "blanks in numbers": (
        CSV.replace("4", "1\xa0234,5").replace(",", ";").replace("4;5", "4,5"),
        "label",
        "such as '1\\xa0234,5' 1 2 --decimal=, --thousands=' ' or",
    ),
    "apostrophes": (CSV.replace("4", "1'234"), "label", '--thousands="\'" or --cate'),
    "dates of several formats": (
        "a,label\n2020-01-31,0\n2/1/2020,1\n",
        "label",
        "'a' dates in several formats, such as '2020-01-31' 2 1 writing YYYY-MM-DD or",
    ),
    "dates of two orders": (
        "a,label\n1/2/2020,0\n2/3/2020,1\n",
        "label",
        "'a' dates whose day and month are ambiguous, such as '1/2/2020' 2 1",
    ),
    "encoding": (
        "a,label\né,0\n".encode("latin-1"),
        "label",
        "is not utf-8 text; give",
    ),
    "other encoding": (CSV.encode("utf-16"), "label", "UTF-16; give --encoding=utf-16"),
    "other encoding without a mark": (CSV.encode("utf-16-le"), "label", "or utf-16"),
    "compressed": (gzip.compress(CSV.encode()), "label", "its name must end in .gz"),
}


@pytest.mark.parametrize(
    ("text", "target", "message"), BAD_FILES.values(), ids=BAD_FILES
)
def test_a_bad_file_is_refused_with_what_is_wrong(tmp_path, text, target, message):
    path = tmp_path / "data.csv"
    with pytest.raises(InputError) as error:
        load(path, text, target)
    assert " ".join(message.split()) in " ".join(str(error.value).split())
    assert str(path) in str(error.value)


def test_all_problems_of_a_file_are_one_table(tmp_path):
    rows = [f'word{i},"{i},5",{i or "x"},{i % 3}\n' for i in range(101)]
    with pytest.raises(InputError) as error:
        load(tmp_path / "data.csv", "text,price,count,label\n" + "".join(rows))
    first, _, *table, _, last = str(error.value).splitlines()
    assert first.endswith(
        "data.csv: cannot use these columns as they are (row 1 is the first below the "
        "header)"
    )
    assert table[0].split() == ["column", "problem", "rows", "first", "row", "remedy"]
    assert [line.split()[0] for line in table[2:]] == [
        *("'text'", "'price'", "'count'", "'label'")
    ]
    assert last == "To leave them all out: --drop=text,price,count"
    table = load(
        tmp_path / "data.csv",
        target="label",
        selection=Selection(drop=["text"], categorical=["price"], numeric=["count"]),
        fmt=Format(na_values=("2",)),
    )
    assert kinds(table) == {"price": "category", "count": "number"}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"drop": ["x"]}, "no column 'x'; its columns are 'a', 'b'"),
        ({"columns": ["x"]}, "no column 'x'"),
        ({"categorical": ["x"], "numeric": ["z"]}, "no columns 'x', 'z'"),
        ({"categorical": ["a"], "numeric": ["a"]}, "--categorical and --numeric both"),
        ({"columns": ["a"], "drop": ["a"]}, "no features are left"),
    ],
    ids=str,
)
def test_a_selection_that_cannot_be_is_refused(tmp_path, selection, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path / "data.csv", CSV, selection=Selection(**selection))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pd.to_datetime(["2020-01-01", "2021-01-01"]), "timestamp"),
        ([b"a", b"b"], "binary"),
        ([[1], [2]], "list"),
    ],
)
def test_a_target_of_another_kind_is_refused(tmp_path, values, kind):
    path = tmp_path / "data.parquet"
    pd.DataFrame({"a": [1.0, 2], "label": values}).to_parquet(path)
    with pytest.raises(InputError, match=rf"of type {kind}.*; expected labels of text"):
        load(path)


def test_the_command_prints_the_table_and_no_traceback(tmp_path):
    (tmp_path / "data.csv").write_text(MANY.replace("label", " label "))
    flags = (f"--data={tmp_path / 'data.csv'}", "--target= label")
    status, out, err = run_command("train", *flags)
    assert (status, out) == (2, "")
    assert err.startswith(f"train: {tmp_path / 'data.csv'}: cannot use these columns")
    assert err.count("\n") == 5
    assert run_command("train", *flags, "--drop=a ").err == (
        f"train: {tmp_path / 'data.csv'}: no features are left; see --columns, --drop, "
        "--group and --time\n"
    )


@pytest.mark.parametrize(
    "command", ["train", "sweep", "private", "find_mislabeled", "leave_one_out"]
)
def test_commands_read_files_as_their_flags_say(tmp_path, command):
    (tmp_path / "data.csv").write_bytes("é\tb\n1\t2\n".encode("latin-1"))
    flags = [f"--data={tmp_path / 'data.csv'}", "--target=y", "--encoding=latin-1"]
    axis = ["--axis=learning_rate=0.1"] * (command == "sweep")
    for more, columns in (
        ([r"--separator=\t"], "'é', 'b'"),
        (["--separator=b"], "'é', 'Unnamed: 1'"),
        (["--noheader"], "'column_1', 'column_2'"),
    ):
        finished = run_command(command, *flags, *axis, *more)
        assert finished.status == 2
        assert f"no column 'y'; its columns are {columns}\n" in finished.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--drop=a",), "--drop needs --data"),
        (("--noheader",), "--header needs --data"),
        (("--data=x.csv", "--separator=ab"), "--separator=ab: expected one character"),
        (
            ("--data=x.csv", "--decimal=,", "--thousands=,"),
            "--thousands and --decimal are both ','",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message):
    finished = run_command("train", *flags)
    assert finished.status == 2
    assert message in finished.err


# ----------------------------------------------------------------------- what is read

FILES = {
    "data.csv": (CSV.encode(), Format()),
    "DATA.CSV": (CSV.encode(), Format()),
    "bom.csv": (b"\xef\xbb\xbf" + CSV.encode(), Format()),
    "data.tsv": (CSV.replace(",", "\t").encode(), Format()),
    "tabs.txt": (CSV.replace(",", "\t").encode(), Format()),
    "semicolons.csv": (CSV.replace(",", ";").encode(), Format()),
    "bars.csv": (CSV.replace(",", "|").encode(), Format()),
    "blanks.txt": (CSV.replace(",", "  ").encode(), Format(separator=r"\s+")),
    "padded.csv": (CSV.replace(",", ' , "').replace("\n", '"\n').encode(), Format()),
    "wide.csv": (CSV.encode("utf-16"), Format(encoding="utf-16")),
    "decimal.csv": (
        CSV.replace(",", ";").replace("4", '"4,0"').encode(),
        Format(decimal=","),
    ),
    "data.csv.gz": (gzip.compress(CSV.encode(), mtime=0), Format()),
    "data.csv.xz": (lzma.compress(CSV.encode()), Format()),
    "2020.data.CSV.GZ": (gzip.compress(CSV.encode(), mtime=0), Format()),
    "late.csv": (b"\n  \n" + CSV.encode(), Format()),
    "blank lines.csv": (CSV.replace("\n", "\n\n \n").encode(), Format()),
}
FILES["padded.csv"] = (b'a , b,label \n1, 2,"0 "\n3 ,4, "1"\n" 5",6,0\n', Format())


@pytest.mark.parametrize("name", FILES)
def test_files_of_all_kinds_are_read(tmp_path, name):
    text, fmt = FILES[name]
    table = load(tmp_path / name, text, fmt=fmt)
    assert table.features.to_dict("list") == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert table.y.ravel().tolist() == [0, 1, 0]
    assert table.features.index.tolist() == [1, 2, 3]


def test_columns_without_a_name_are_named_as_pandas_names_them(tmp_path):
    text = ",Unnamed: 0,,Unnamed: 0.1,label\n0,1,2,3,no\n1,2,3,4,yes\n"
    table = load(tmp_path / "data.csv", text)
    names = ["Unnamed: 0.2", "Unnamed: 0", "Unnamed: 2", "Unnamed: 0.1"]
    assert list(table.features) == names
    np.testing.assert_array_equal(table.features, [[0, 1, 2, 3], [1, 2, 3, 4]])


def test_the_index_of_a_parquet_file_is_a_column_if_it_has_a_name(tmp_path):
    path = tmp_path / "data.parquet"
    table = pd.DataFrame({"label": [0, 1], "size": [7.0, 9]})
    table.set_index("label").to_parquet(path)
    assert load(path).features.to_dict("list") == {"size": [7, 9]}
    table.set_axis([5, 3]).to_parquet(path)
    assert load(path).features.to_dict("list") == {"size": [7, 9]}


@pytest.mark.parametrize("names", [("a", "a"), (" a", "a")])
def test_two_columns_of_a_parquet_file_have_different_names(tmp_path, names):
    path = tmp_path / "data.parquet"
    columns = [pa.array(["2020-01-31"]), pa.array([[1, 2]])]
    pq.write_table(pa.table(columns, names), path)
    with pytest.raises(InputError, match=r"data\.parquet: two columns are named 'a'"):
        load(path)


def test_a_file_without_a_header_numbers_its_columns(tmp_path):
    text = CSV.partition("\n")[2]
    fmt = Format(header=False)
    table = load(tmp_path / "data.csv", text, "column_3", fmt=fmt)
    assert table.features.to_dict("list") == {
        "column_1": [1, 3, 5],
        "column_2": [2, 4, 6],
    }
    assert table.features.index.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv.gz", b"no archive", "data.csv.gz: "),
        ("data.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:-12], "data.csv.gz: "),
        ("data.csv.bz2", b"no archive", "data.csv.bz2: "),
        ("data.csv.xz", b"no archive", "data.csv.xz: "),
        ("data.csv.zip", b"no archive", "data.csv.zip: "),
        ("data.parquet", b"no archive", "data.parquet: "),
        ("data", CSV.encode(), "expected a file .csv"),
        ("folder.csv", None, "folder.csv: Is a directory"),
        ("nothing/data.parquet", None, "data.parquet: No such file or directory"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=message):
        load(tmp_path / name, content)


def test_an_encoding_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(InputError, match="--encoding=utf-7000: unknown encoding"):
        load(tmp_path / "data.csv", CSV, fmt=Format(encoding="utf-7000"))


def test_thousands_separators_and_decimal_commas_are_read_by_flag(tmp_path):
    text = 'a;b;label\n1.234.567,5;1;0\n,5;"2";1\n-12,0;3;1\n1.23;4;0\n'
    fmt = Format(decimal=",", thousands=".", na_values=("1.23",))
    table = load(tmp_path / "data.csv", text, fmt=fmt)
    np.testing.assert_array_equal(table.features["a"], [1234567.5, 0.5, -12, np.nan])
    text = "a,label\n1 234.5,0\n-1\xa0234\u202f567,1\n"
    table = load(tmp_path / "data.csv", text, fmt=Format(thousands=" "))
    np.testing.assert_array_equal(table.features["a"], [1234.5, -1234567])


# ---------------------------------------------------------------- what a column holds


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
        table.to_parquet(tmp_path / name)
    else:
        table.to_csv(tmp_path / name, index=False)
    data = load(tmp_path / name, target="y,z")
    assert list(data.features.columns) == ["size", "flag", "color"]
    np.testing.assert_array_equal(data.y, [[0, 0], [1, 0], [0, 1], [1, 1]])
    x, _ = datasets.preprocess_all(data)
    assert x.shape == (4, 5)
    np.testing.assert_allclose(x[:, :2].std(0), 1)
    np.testing.assert_array_equal(
        x[:, 2:], [[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    )


COLUMNS = {
    "numbers": (["1", "-2.5", "+3e2", ".5", "NA"], "number", [1, -2.5, 300, 0.5, None]),
    "codes as numbers": (["01", "02"], "number", [1, 2]),
    "nothing": (["", ""], "number", [None, None]),
    "booleans": (["TRUE", "false", "True", ""], "boolean", [1, 0, 1, None]),
    "codes": (["01", "A1", "1"], "category", ["01", "A1", "1"]),
    "words": (["a", "NULL", " b "], "category", ["a", None, "b"]),
    "words and numbers": (["a", "b", "1"], "category", ["a", "b", "1"]),
}


@pytest.mark.parametrize(("texts", "kind", "values"), COLUMNS.values(), ids=COLUMNS)
def test_what_a_column_holds(tmp_path, texts, kind, values):
    rows = "".join(f'"{text}",{i % 2}\n' for i, text in enumerate(texts))
    table = load(tmp_path / "data.csv", f"a,label\n{rows}")
    assert kinds(table) == {"a": kind}
    found = [None if pd.isna(value) else value for value in table.features["a"]]
    assert found == values


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", "1.0", "2", "1e0"], ["1", "1", "2", "1"]),
        (["1", "01", "2", "1.0"], ["1", "01", "2", "1.0"]),
        (["TRUE", "true", "False", "FALSE"], ["True", "True", "False", "False"]),
        (["9007199254740993", "9007199254740992"], None),
    ],
)
def test_categories_that_are_written_in_two_ways_are_one(tmp_path, texts, expected):
    rows = "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts))
    selection = Selection(categorical=["a"])
    table = load(tmp_path / "data.csv", f"a,label\n{rows}", selection=selection)
    assert table.features["a"].tolist() == (expected or texts)


def test_na_values_are_what_the_user_says(tmp_path, capsys):
    text = "alley,size,label\nNA,1,0\npaved,NA,1\nnone,3,0\n,-9,1\n"
    options = {
        None: (["nan", "paved", "none", "nan"], [1, np.nan, 3, -9]),
        (): (["NA", "paved", "none", "nan"], [1, np.nan, 3, -9]),
        ("-9", "none"): (["NA", "paved", "nan", "nan"], [1, np.nan, 3, np.nan]),
    }
    for na_values, (alley, size) in options.items():
        table = load(tmp_path / "d.csv", text, fmt=Format(na_values=na_values))
        assert list(map(str, table.features["alley"])) == alley
        np.testing.assert_array_equal(table.features["size"], size)
        where = "'size'" if na_values == () else "'alley', 'size'"
        expected = "'NA'" if not na_values else "'none', 'NA', '-9'"
        assert (
            f"d.csv: {expected} treated as missing in {where}; --na_values changes "
            f"this\n"
        ) in capsys.readouterr().err


def test_dates_become_year_month_weekday_and_days(tmp_path):
    texts = {
        "iso": ["2020-02-29", "2021-01-01", ""],
        "time": ["2020-02-29 12:00", "2021-01-01T00:00:00Z", "2020-02-29T13:30+01:30"],
        "us": ["2/29/2020", "12/1/2021", "1/3/2020"],
        "german": ["29.02.2020", "1.12.2021", "3.1.2020"],
    }
    table = pd.DataFrame(texts | {"label": [0, 1, 0]})
    table.to_csv(tmp_path / "data.csv", index=False)
    data = load(tmp_path / "data.csv")
    assert set(kinds(data).values()) == {"date"}
    first = data.features.iloc[0]
    for name in texts:
        found = [first[f"{name} {p}"] for p in ("year", "month", "weekday")]
        assert found == [2020, 2, 5]
    days = (datetime.date(2020, 2, 29) - datetime.date(1970, 1, 1)).days
    assert first["iso days"] == first["us days"] == first["german days"] == days
    assert first["time days"] == days + 0.5 == data.features["time days"].iloc[2]
    assert np.isnan(data.features["iso year"].iloc[2])
    table["iso"] = ["2020-02-29", "last year", "2021-13-01"]
    found = schema.features("new.csv", table, data.schema)
    assert found["iso year"].isna().tolist() == [False, True, True]


def test_parts_of_a_date_do_not_replace_columns_of_their_names(tmp_path):
    dates = pd.date_range("2020-02-29", periods=3, freq="YE").astype(str)
    table = pd.DataFrame({"when": dates, "when year": [7, 9, 8], "label": [0, 1, 0]})
    table["when year.1"] = table["when month"] = dates
    expected = {
        *("when year.2", "when month.1", "when weekday", "when days", "when year"),
        *(f"when year.1 {p}" for p in ("year", "month", "weekday", "days")),
        *(f"when month {p}" for p in ("year", "month", "weekday", "days")),
    }
    for order in (list(table), list(table)[::-1]):
        table[order].to_csv(tmp_path / "data.csv", index=False)
        found = load(tmp_path / "data.csv").features
        assert set(found) == expected
        assert found["when year"].tolist() == [7, 9, 8]
        for name in ("when year.2", "when year.1 year", "when month year"):
            assert found[name].tolist() == [2020, 2021, 2022]


def test_columns_of_parquet_files_keep_their_types(tmp_path):
    table = pd.DataFrame(
        {
            "price": [decimal.Decimal("1.50"), None, decimal.Decimal("3.25")],
            "day": [datetime.date(2020, 2, 29), None, datetime.date(2021, 1, 1)],
            "time": pd.to_datetime(["2020-02-29 12:00", None, "2021-01-01 00:00"]),
            "code": ["1", "2", None],
            "flag": pd.array([True, None, False], "boolean"),
            "count": pd.array([1, None, 3], "Int8"),
            "none": [None, None, None],
            "label": [0, 1, 0],
        }
    )
    table.to_parquet(tmp_path / "data.parquet")
    data = load(tmp_path / "data.parquet")
    assert list(kinds(data).values()) == [
        *("number", "date", "date", "category", "boolean", "number", "number")
    ]
    row = data.features.iloc[0].to_dict()
    assert (row["price"], row["flag"], row["count"], row["code"]) == (1.5, 1, 1, "1")
    assert row["day year"] == 2020
    assert row["time days"] == row["day days"] + 0.5
    assert data.features.iloc[1].drop("code").isna().all()


# ------------------------------------------------------- a cell without its neighbours

TEXTS = [
    *("", "0", "1", "1.0", "01", "-3", "1e3", "0.1", "TRUE", "true", "False", "NA"),
    *("None", "A1", " A1", "b", "inf", "1,5", "2020-01-31", "2020-01-31 10:00", "x y"),
]
SCHEMA = Schema(
    (
        Column("n", "number"),
        Column("b", "boolean"),
        Column("d", "date", "ISO8601"),
        Column("t", "category", "text"),
        Column("c", "category", "number"),
        Column("f", "category", "boolean"),
    )
)


def features(folder, name, table):
    """The features of a file with this content."""
    path = Path(folder) / name
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False)
    return schema.features(name, table_io.read(path), SCHEMA)


@functools.cache
def all_texts():
    """The features of a row for each of `TEXTS`, and a preprocessor fitted to them."""
    table = pd.DataFrame({column.name: TEXTS for column in SCHEMA.columns})
    found = schema.features("all", table, SCHEMA)
    return found, preprocessing.fit("all", found, "indicator")


@settings(max_examples=25, deadline=None)
@given(
    chosen=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=8),
    name=st.sampled_from(["part.csv", "part.parquet"]),
)
def test_the_features_of_a_row_do_not_depend_on_the_other_rows(
    tmp_path_factory, chosen, name
):
    whole, preprocessor = all_texts()
    table = pd.DataFrame({c.name: np.array(TEXTS)[chosen] for c in SCHEMA.columns})
    part = features(tmp_path_factory.mktemp("files"), name, table)
    assert list(part.index) == list(range(1, len(chosen) + 1))
    expected = whole.iloc[chosen].set_axis(part.index)
    pd.testing.assert_frame_equal(part, expected, check_exact=True)
    x = preprocessing.transform(name, preprocessor, part)
    expected = preprocessing.transform("all", preprocessor, whole)[chosen]
    np.testing.assert_array_equal(x, expected)


VALUES = {
    "integers": st.integers(-(2**40), 2**40),
    "floats": st.floats(allow_infinity=False, width=64),
    "singles": st.floats(allow_infinity=False, width=32).map(np.float32),
    "booleans": st.booleans(),
    "words": st.sampled_from(["a", "b", "01", "1", "NA", "TRUE", "2020-01-31"]),
    "dates": st.dates(datetime.date(1900, 1, 1), datetime.date(2100, 1, 1)),
    "times": st.datetimes(
        datetime.datetime(1900, 1, 1), datetime.datetime(2100, 1, 1)
    ).map(pd.Timestamp),
    "decimals": st.decimals(-1000, 1000, places=2).map(lambda d: d + 0),  # no -0.00,
}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(VALUES)), st.data())
def test_a_parquet_file_means_what_a_csv_file_with_its_content_means(
    tmp_path_factory, kind, data
):
    folder = tmp_path_factory.mktemp("files")
    values = data.draw(st.lists(VALUES[kind] | st.none(), min_size=1, max_size=5))
    if kind == "singles":
        values = np.array(values, np.float32)
    table = pd.DataFrame({column.name: values for column in SCHEMA.columns})
    from_csv = features(folder, "data.csv", table)
    from_parquet = features(folder, "data.parquet", table)
    if kind == "times":  # how pandas writes one depends on the others
        from_csv, from_parquet = (
            f.drop(columns=list("tcf")) for f in (from_csv, from_parquet)
        )
    pd.testing.assert_frame_equal(from_csv, from_parquet, check_exact=True)


def test_a_long_file_is_read_as_its_last_rows_alone_would_be(tmp_path):
    rows = ["01,2\n"] * 262_144 + ["A1,x\n"] * 37_856
    path = tmp_path / "long.csv"
    path.write_text("t,n\n" + "".join(rows))
    described = Schema((Column("t", "category", "text"), Column("n", "number")))
    whole = schema.features("long", table_io.read(path), described)
    assert whole["t"].value_counts().to_dict() == {"01": 262_144, "A1": 37_856}
    path.write_text("t,n\n" + "".join(rows[-40:]))
    last = schema.features("long", table_io.read(path), described)
    pd.testing.assert_frame_equal(whole.tail(40).set_axis(last.index), last)


@pytest.fixture
def model(tmp_path):
    """The table that an untrained model was fitted to, and the model's folder."""
    rng = np.random.default_rng(0)
    codes = ["01", "02", "03", "A1", "B2", "C3", "D4"]
    table = pd.DataFrame(
        {
            "code": rng.choice(codes, 60),
            "size": rng.normal(size=60).round(3),
            "when": pd.date_range("2020-01-01", periods=60).astype(str),
            "flag": rng.choice(["TRUE", "FALSE"], 60),
            "label": rng.choice(["no", "yes"], 60),
        }
    )
    table.loc[::9, ["code", "size"]] = None
    table.to_csv(tmp_path / "train.csv", index=False)
    data = load(tmp_path / "train.csv")
    splits, preprocessor = datasets.split(data, 0)
    params = jaxbce.init(jax.random.key(0), (splits["train"].x.shape[1], 3, 1))
    saved = {"schema": data.schema, "preprocessor": preprocessor}
    saved |= {"params": jax.tree.map(np.asarray, params), "classes": data.classes}
    saved |= {"pos_weight": (1.0,), "thresholds": [0.0]}
    joblib.dump(saved, tmp_path / "model.joblib")
    return table.drop(columns="label"), tmp_path


def scored(folder, name, *flags):
    """What the command writes for a file in the folder of the model."""
    arguments = (f"--predict={folder / name}", f"--output_dir={folder}", *flags)
    finished = run_command("train", *arguments)
    assert finished.status == 0, finished.err
    table: Any = pd.read_csv(folder / f"{table_io.stem(name)}.scored.csv")
    scores = ["logit of label=yes", "probability of label=yes"]
    return table[["row", *scores]], finished.err


def test_the_prediction_of_a_row_does_not_depend_on_its_file(model):
    table, folder = model
    table.to_csv(folder / "whole.csv", index=False)
    whole, err = scored(folder, "whole.csv")
    assert err == ""
    assert whole["row"].tolist() == list(range(1, 61))
    only_01 = table[table["code"] == "01"]
    only_01.to_csv(folder / "part.csv", index=False)
    typed = only_01.assign(
        flag=only_01["flag"] == "TRUE", when=pd.to_datetime(only_01["when"])
    )
    typed.to_parquet(folder / "typed.parquet")
    only_01.to_csv(folder / "other.csv.gz", index=False, sep=";", decimal=",")
    for name, flags in (
        ("part.csv", ()),
        ("typed.parquet", ()),
        ("other.csv.gz", ("--decimal=,",)),
    ):
        part, _ = scored(folder, name, *flags)
        expected = whole.iloc[only_01.index].drop(columns="row")
        np.testing.assert_allclose(part.drop(columns="row"), expected, rtol=1e-6)


def test_the_rows_scored_are_those_that_pandas_reads(model):
    table, folder = model
    header, first, second = table.iloc[:2].to_csv(index=False).splitlines()
    lines = ["", header, first, "", "  ", ",,,", second, ",,,", '"",,,', "", ""]
    (folder / "new.csv").write_text("\n".join(lines))
    found, err = scored(folder, "new.csv")
    assert len(found) == len(pd.read_csv(folder / "new.csv")) == 5
    assert found["row"].tolist() == [1, 2, 3, 4, 5]
    assert found.iloc[:, 1].round(9).nunique() == 3  # 2, 4 and 5 have no values
    assert err == ""
    pd.read_csv(folder / "new.csv").to_parquet(folder / "same.parquet")
    pd.testing.assert_frame_equal(scored(folder, "same.parquet")[0], found)


def test_a_scored_file_has_the_cells_of_its_file_as_text(model):
    table, folder = model
    days = pa.array([-(2**30), 0], pa.date32())  # the first is none that Python has
    lists = pa.array([[1, 2], None])
    arrow = pa.Table.from_pandas(table.head(2)).append_column("day", days)
    pq.write_table(arrow.append_column("list", lists), folder / "new.parquet")
    scored(folder, "new.parquet")
    found: Any = pd.read_csv(folder / "new.scored.csv", dtype=str, na_filter=False)
    assert str(-(2**30)) in found["day"].iloc[0]
    assert found["day"].iloc[1] == "1970-01-01"
    assert found["list"].tolist() == ["[1, 2]", ""]
    table.head(2).to_csv(folder / "same.csv", index=False)
    same = pd.read_csv(folder / "same.csv", dtype=str, na_filter=False)
    for name in same:
        assert found[name].tolist() == same[name].tolist()


def test_a_file_is_scored_whatever_its_cells_are(model):
    table, folder = model
    rows = table.iloc[[0, 1, 1, 1, 1, 1]].astype(object).reset_index(drop=True)
    rows.loc[1, "code"] = "1"
    rows.loc[2, "size"] = "large"
    rows.loc[3, "size"] = 1e300
    rows.loc[4, ["when", "flag"]] = "?"
    rows.loc[5, ["code", "size", "when"]] = None
    rows.to_csv(folder / "new.csv", index=False)
    found, err = scored(folder, "new.csv")
    assert len(found) == 6
    assert np.isfinite(found.to_numpy()).all()
    assert err.splitlines() == [
        f"new.csv: {line}"
        for line in (
            "'size' is not a number in 1 rows, such as 'large' in row 3; treated as "
            "missing",
            "'when' is not a date in 1 rows, such as '?' in row 5; treated as missing",
            "'flag' is not a boolean in 1 rows, such as '?' in row 5; treated as "
            "missing",
            "'code' is '1' in 1 rows, not seen in training",
            "'size' is too large in 1 rows; treated as missing",
        )
    ]


# ------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    "labels", [(0, 1), (-1, 1), ("no", "yes"), (False, True), (1, 2), (0.5, 1.5)]
)
@pytest.mark.parametrize("name", ["data.csv", "data.parquet"])
def test_labels_of_any_two_values_become_0_and_1(tmp_path, labels, name):
    path = tmp_path / name
    table = pd.DataFrame({"a": [1.0, 2, 3, 5], "y": [labels[1], *labels, labels[0]]})
    if name == "data.csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    for positive, truth in ((None, [1, 0, 1, 0]), (f" {labels[0]}", [0, 1, 0, 1])):
        data = load(path, target="y", positive=positive)
        np.testing.assert_array_equal(data.y.ravel(), truth)
    assert data.classes == {"y": (labels[1], labels[0])}
    assert [type(value) for value in data.classes["y"]] == [type(labels[0])] * 2
    with pytest.raises(
        InputError, match=r"values .* and .*; --positive=maybe is neither"
    ):
        load(path, target="y", positive="maybe")


@pytest.mark.parametrize(
    ("labels", "positive", "classes"),
    [
        (["1", "01"], "1", ("01", "1")),
        (["1", "01"], "01", ("1", "01")),
        (["1", "x"], "1", ("x", "1")),
        (["1", "0"], "1.0", (0, 1)),
        (["1.0", "0"], "0", (1, 0)),
        (["TRUE", "FALSE"], "false", (True, False)),
        (["TRUE", "FALSE"], "1", (False, True)),
        ([" yes", "no "], "yes", ("no", "yes")),
    ],
)
def test_the_positive_label_is_the_one_that_is_written_so(
    tmp_path, labels, positive, classes
):
    rows = "".join(f"{i},{label}\n" for i, label in enumerate(labels * 2))
    table = load(tmp_path / "data.csv", f"a,label\n{rows}", positive=positive)
    assert table.classes == {"label": classes}


def test_a_positive_label_of_another_spelling_is_refused(tmp_path):
    with pytest.raises(InputError, match="the values '01' and '02'; --positive=1 is"):
        load(tmp_path / "data.csv", "a,label\n1,01\n2,02\n", positive="1")


@pytest.mark.parametrize(
    ("classes", "texts", "expected"),
    [
        ((0, 1), ["1.0", "0", "", "2", "NA", "01"], [1, 0, None, None, None, 1]),
        ((0.5, -1), ["-1", "0.50", "x"], [1, 0, None]),
        ((False, True), ["true", "FALSE", "0", "no"], [1, 0, 0, None]),
        (("01", "1"), [" 1", "01 ", "1.0"], [1, 0, None]),
    ],
)
def test_labels_of_another_file_are_those_of_the_first(classes, texts, expected):
    found = schema.known_labels(pd.Series(texts), classes, Format())
    np.testing.assert_array_equal(found, np.array(expected, float))


def test_rows_without_labels_are_left_out_and_counted(tmp_path, capsys):
    text = "a,label,more\n1,0,x\n2,,y\n3,NA,x\n7,1,y\n9,0,\n4,1,y\n"
    table = load(tmp_path / "data.csv", text, "label,more")
    assert table.features["a"].tolist() == [1, 7, 4]
    assert table.features.index.tolist() == [1, 4, 6]
    np.testing.assert_array_equal(table.y, [[0, 0], [1, 1], [1, 1]])
    assert capsys.readouterr().err.splitlines()[0] == (
        "data.csv: 3 rows without label are left out, such as row 2"
    )


# ---------------------------------------------------------------------------- warnings


def test_what_should_not_be_a_feature_is_warned_of(tmp_path, capsys):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    table = pd.DataFrame(
        {
            "": range(60),
            "customer_id": rng.permutation(1000)[:60],
            "fine": rng.normal(size=60),
            "price": rng.integers(0, 9, 60),
            "name": [f"name{i}" for i in range(60)],
            "same": 7,
            "leak": rng.uniform(size=60) - 2 * y,
            "word": np.where(y, "x", "y"),
            "color": rng.choice(["red", "blue"], 60),
            "label": y,
        }
    )
    table.loc[3, "leak"] = np.nan
    table.to_csv(tmp_path / "data.csv", index=False)
    load(tmp_path / "data.csv")
    assert capsys.readouterr().err.splitlines() == [
        f"data.csv: {line}"
        for line in (
            "'Unnamed: 0', 'customer_id': all values are different, as in an index or "
            "id; --drop leaves it out",
            "'name': a different category in nearly every row; --drop leaves it out",
            "'same': constant, so ignored",
            "'leak', 'word': alone almost enough to predict 'label', which may be "
            "leakage; --drop leaves it out",
        )
    ]


def test_the_roc_auc_of_a_column_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    label = (rng.uniform(size=50) < 0.3).astype(float)
    values = pd.Series(rng.integers(0, 9, 50) + 2 * label)  # with ties
    expected = roc_auc_score(label, values)
    assert expected > 0.6
    for sign in (1, -1):
        np.testing.assert_allclose(user_files._auc(sign * values, label), expected)


def test_cells_that_cannot_be_read_are_missing_and_counted(tmp_path, capsys):
    path = tmp_path / "new.csv"
    path.write_text("n,b,d,t,c,f\n1,2,x,y,z,w\n\n?,1,,y,1.0,true\ninf,0,,,,\n")
    found = schema.features(str(path), table_io.read(path), SCHEMA)
    np.testing.assert_array_equal(found["n"], [1, np.nan, np.nan])
    assert found["c"].iloc[:2].tolist() == ["z", "1"]
    assert capsys.readouterr().err.splitlines() == [
        "new.csv: 'n' is not a number in 2 rows, such as '?' in row 2; treated as "
        "missing",
        "new.csv: 'b' is not a boolean in 1 rows, such as '2' in row 1; treated as "
        "missing",
        "new.csv: 'd' is not a date in 1 rows, such as 'x' in row 1; treated as "
        "missing",
    ]


# ---------------------------------------------------------------------------- any file
#
# A file is a table that can be trained on, written in an ordinary way, but each of its
# parts may be an odd one. That is rare, so that about half of the files are trained on.
# Columns repeat a few values, so that few draws make a table that is long enough.


def mostly(usual, odd):
    """A strategy that draws from the first one, or rarely from the second."""
    return st.integers(0, 9).flatmap(lambda number: odd if number == 7 else usual)


ANY_TEXT = st.text(max_size=4)
NAMES = mostly(
    st.sampled_from(["a", "b", "c", "d", "a year", "row", "Unnamed: 0", "é", "名前"]),
    st.sampled_from(["", " ", "e,f", "two\nlines", "x" * 300]) | ANY_TEXT,
)
NUMBERS_OF_ROWS = mostly(st.sampled_from([30, 120]), st.sampled_from([0, 1, 4]))
CELLS = {
    "counts": st.integers(0, 9),
    "numbers": st.integers(-(10**20), 10**20) | st.floats(allow_infinity=False),
    "booleans": st.sampled_from(["TRUE", "false", "0", ""]),
    "answers": st.sampled_from(["yes", "N", "Yes", "no", "?"]),
    "words": st.sampled_from(["red", "Blue", "dark red", "naïve", "NA", "x" * 2000]),
    "codes": st.sampled_from(["01", "02", "A1", "1e5"]),
    "dates": st.dates(),
    "times": st.datetimes(timezones=st.sampled_from([None, datetime.UTC])),
}
ODD_CELLS = {
    "infinities": st.floats(),
    "amounts": st.floats(0, 1e6).map("{:,.2f}".format),
    "percentages": st.integers(0, 100).map("{} %".format),
    "American dates": st.dates().map("{:%m/%d/%Y}".format),
    "all kinds": st.one_of(*CELLS.values()) | ANY_TEXT,
}
ODD_ROWS = {
    "longer row": lambda rows, i: [*rows[:i], [*rows[i], "more"], *rows[i + 1 :]],
    "shorter row": lambda rows, i: [*rows[:i], rows[i][:1], *rows[i + 1 :]],
    "blank line": lambda rows, i: [*rows[:i], [], *rows[i:]],
    "row without values": lambda rows, i: [*rows[:i], [""] * len(rows[0]), *rows[i:]],
    "title": lambda rows, i: [["Sales, 2020"], *rows],
    "total": lambda rows, i: [*rows, ["Total", "123"]],
    "note": lambda rows, i: [*rows[:i], ["below", *rows[i][1:]], *rows[i + 1 :]],
    "other label": lambda rows, i: [*rows[:i], [*rows[i][:-1], "?"], *rows[i + 1 :]],
}
ODD_BYTES = {
    "end missing": lambda content, i: content[:i],
    "end overwritten": lambda content, i: content[:i] + bytes(len(content) - i),
    "NUL": lambda content, i: content[:i] + b"\x00" + content[i:],
    "quote": lambda content, i: content[:i] + b'"' + content[i:],
    "line end": lambda content, i: content[:i] + b"\n" + content[i:],
    "other byte": lambda content, i: content[:i] + b"\xff" + content[i + 1 :],
    "all twice": lambda content, i: content + content,
}
ENDINGS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
FLAGS = [
    *["--missing=indicator", "--missing=drop", "--missing=error", "--na_values="],
    *["--decimal=,", "--thousands=,", "--positive=no", "--drop=a", "--numeric=a"],
    *["--categorical=a", "--noheader", r"--separator=\s+", "--encoding=utf-16"],
]
ARRAYS = [
    pa.array([0, None, 3], pa.int8()),
    pa.array([0, 2**64 - 1], pa.uint64()),
    pa.array(np.array([1.5, -2, np.nan], np.float16)),
    pa.array([1.5, None, -1e38], pa.float32()),
    pa.array([1.5, 1e150, -0.0]),
    pa.array([True, False, None]),
    pa.array(["red", "blue", None, " "], pa.large_string()),
    pa.array(["1", "2020-01-31", "\0"]),
    pa.array(["red", None, "x" * 2000]).dictionary_encode(),
    pa.array([7, None, 8]).dictionary_encode(),
    pa.array([decimal.Decimal("1.50"), None], pa.decimal128(38, 2)),
    pa.array([decimal.Decimal(10**60), decimal.Decimal(0)], pa.decimal256(76, 0)),
    pa.array([0, None, -(2**30)], pa.date32()),
    pa.array([0, 86_400_000], pa.date64()),
    pa.array([0, None, 2**62], pa.timestamp("ns")),
    pa.array([0, 2**62], pa.timestamp("ms", "Europe/Berlin")),
    pa.nulls(2),
]
ODD_ARRAYS = [
    pa.array([1.5, np.inf]),
    pa.array([b"\xff", None]),
    pa.array([b"ab", b"cd"], pa.binary(2)),
    pa.array([0, None], pa.time32("s")),
    pa.array([0, 2**60], pa.duration("us")),
    pa.array([[1, 2], None, []]),
    pa.array([{"a": 1, "b": {"c": "d"}}, None]),
    pa.array([[("key", 1)], []], pa.map_(pa.string(), pa.int64())),
]


def with_oddity(thing, oddities):
    """The thing, or rarely the thing with one of the oddities somewhere."""
    places = st.integers(0, max(len(thing) - 1, 0))
    odd = st.tuples(st.sampled_from(list(oddities.values())), places)
    return mostly(st.just(thing), odd.map(lambda o: o[0](thing, o[1])))


def headers(count):
    """Names of as many columns, and of the label; two are rarely the same."""
    different = st.lists(NAMES, min_size=count, max_size=count, unique=True)
    return mostly(different, st.just(["a"] * count)).map(
        lambda names: [*names, "label"]
    )


@st.composite
def text_files(draw):
    """The name and the content of a text file, and flags to read it with."""
    kinds = mostly(st.sampled_from(list(CELLS)), st.sampled_from(list(ODD_CELLS)))
    columns = [
        draw(st.lists((CELLS | ODD_CELLS)[kind], min_size=2, max_size=4, unique_by=str))
        for kind in draw(st.lists(kinds, min_size=1, max_size=4))
    ]
    columns.append(draw(mostly(st.just(["no", "yes"]), st.just(["no", "yes", ""]))))
    count = draw(NUMBERS_OF_ROWS)
    rows = zip(
        *(itertools.islice(itertools.cycle(c), count) for c in columns), strict=True
    )
    table = [draw(headers(len(columns) - 1)), *map(list, rows)]
    text = io.StringIO()
    csv.writer(
        text,
        delimiter=draw(st.sampled_from(",;\t|")),
        lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r", "\n \n"])),
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    ).writerows(draw(with_oddity(table, ODD_ROWS)))
    other_encodings = st.sampled_from(["utf-8-sig", "utf-16", "cp1252"])
    encoding = draw(mostly(st.just("utf-8"), other_encodings))
    content = text.getvalue().encode(encoding, errors="replace")
    content = draw(with_oddity(content, ODD_BYTES))
    ending = draw(mostly(st.just(""), st.sampled_from(list(ENDINGS))))
    true_ending = draw(mostly(st.just(ending), st.sampled_from(list(ENDINGS))))
    content = draw(with_oddity(ENDINGS[true_ending](content), ODD_BYTES))
    name = draw(st.sampled_from(["data.csv", "DATA.CSV", "data.txt", "my data.csv"]))
    flags = draw(mostly(st.just([]), st.sampled_from(FLAGS).map(lambda flag: [flag])))
    return name + ending, content, flags


@st.composite
def parquet_files(draw):
    """The name and the content of a Parquet file, and no flags."""
    arrays = mostly(st.sampled_from(ARRAYS), st.sampled_from(ODD_ARRAYS))
    labels = st.sampled_from([pa.array(["no", "yes", None]), pa.array([0.0, 1.0])])
    columns = draw(st.lists(arrays, min_size=1, max_size=4))
    columns.append(draw(mostly(labels, arrays)))
    rows = draw(NUMBERS_OF_ROWS)
    for i, array in enumerate(columns):
        columns[i] = array.take(pa.array(np.resize(np.arange(len(array)), rows)))
    file = io.BytesIO()
    table = pa.table(columns, draw(headers(len(columns) - 1)))
    pq.write_table(table, file, row_group_size=20)
    content = draw(with_oddity(file.getvalue(), ODD_BYTES))
    return draw(st.sampled_from(["data.parquet", "data.pq"])), content, []


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(file=text_files() | parquet_files())
def test_any_file_is_trained_on_or_refused_without_a_traceback(tmp_path_factory, file):
    name, content, flags = file
    path = tmp_path_factory.mktemp("files") / name
    path.write_bytes(content)
    steps = ("--target=label", "--num_steps=1", "--hidden=")
    status, _, err = run_command("train", f"--data={path}", *steps, *flags)
    event("refused" if status else "trained on")
    assert status in (0, 2), err
    errors = [line for line in err.splitlines() if line.startswith("train: ")]
    assert len(errors) == (status == 2), err
    for line in errors:
        assert line.startswith(f"train: {path}: "), err
