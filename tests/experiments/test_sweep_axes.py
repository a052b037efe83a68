"""Axes of a sweep: how they are read, and the points that they make."""

import numpy as np
import pytest

from experiments.support.cli import InputError
from experiments.support.sweep_axes import Search, parse_axis

BAD = {
    "learning_rate": "expected NAME=...",
    "learning_rate=log:0:1:3": "expected positive ends of a log axis",
    "learning_rate=log:1:2": "expected log:FROM:TO:COUNT or lin:FROM:TO:COUNT",
    "learning_rate=exp:1:2:3": "expected log:FROM:TO:COUNT or lin:FROM:TO:COUNT",
    "learning_rate=log:1:inf:3": "expected finite numbers",
    "learning_rate=1,x": "could not convert",
    "learning_rate=1,1": "a value is repeated",
    "learning_rate=-1": "expected values >= 0",
    "learning_rate=nan": "expected finite values",
    "label_smoothing=2": "expected values from 0 to 1",
    "init_scale=-1": "expected values from 0 to inf",
    "b1=lin:0:1:0": "a count from 1",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=BAD)
def test_a_bad_axis_is_one_line(text, message):
    with pytest.raises(InputError) as error:
        parse_axis(text)
    assert str(error.value).startswith(f"--axis={text}: ")
    assert message in str(error.value)


def test_an_axis_is_read_from_text():
    axis = parse_axis("learning_rate=log:1e-4:1:5")
    assert (axis.name, axis.spacing) == ("learning_rate", "log")
    np.testing.assert_allclose(axis.values, [1e-4, 1e-3, 1e-2, 1e-1, 1])
    axis = parse_axis("b1=lin:0:1:3")
    assert (axis.name, axis.spacing) == ("b1", "lin")
    np.testing.assert_allclose(axis.values, [0, 0.5, 1])
    axis = parse_axis("weight_decay=0.1,0")
    assert (axis.name, axis.spacing) == ("weight_decay", "values")
    np.testing.assert_array_equal(axis.values, [0.1, 0])


AXES = tuple(map(parse_axis, ("b1=0.5,0.9,0.99", "learning_rate=log:1e-2:1e2:4")))


def test_a_grid_is_all_combinations():
    search = Search(AXES)
    points = search.points(0)
    pairs = set(zip(points["b1"], points["learning_rate"], strict=True))
    assert len(points["b1"]) == len(pairs) == 12
    assert search.as_dict() == {
        "axes": {
            "b1": ["values", 0.5, 0.9, 0.99],
            "learning_rate": ["log", *AXES[1].values.tolist()],
        },
        "search": "grid",
    }


def test_random_points_are_uniform_between_the_ends():
    axes = (*AXES, parse_axis("label_smoothing=lin:0.2:0.6:2"))
    points = Search(axes, "random", 4000).points(0)
    np.testing.assert_array_equal(np.unique(points["b1"]), AXES[0].values)
    rates, smoothing = points["learning_rate"], points["label_smoothing"]
    assert 1e-2 <= rates.min() < 1.1e-2 < 0.9e2 < rates.max() <= 1e2
    # Five standard errors of a mean of 4000 uniform numbers, of width 4 and 0.4.
    assert abs(np.log10(rates).mean()) < 5 * 4 / (12 * 4000) ** 0.5
    assert abs(smoothing.mean() - 0.4) < 5 * 0.4 / (12 * 4000) ** 0.5
    assert 0.2 <= smoothing.min() <= smoothing.max() <= 0.6
    again = Search(axes, "random", 4000).points(0)
    other = Search(axes, "random", 4000).points(1)
    for name, values in points.items():
        np.testing.assert_array_equal(values, again[name])
        assert not np.array_equal(values, other[name])


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (Search(()), "expected --axis, such as --axis learning_rate=log:1e-4:1:32"),
        (Search(AXES[:1] * 2), "--axis=b1: is given twice"),
        (Search(AXES, "grid", 3), "--num_points needs --search=random"),
        (Search(AXES, "random"), "--search=random needs --num_points"),
    ],
)
def test_a_search_that_does_not_fit_together_is_refused(search, message):
    with pytest.raises(InputError, match=message):
        search.points(0)
