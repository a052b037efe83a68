"""Pixels of the plane are plain training runs, and its boundary is measured."""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxbce
from experiments import trainability
from experiments.support import cli, plots
from tests.helpers import run_command

SMALL = {"resolution": 8, "num_steps": 5, "tile": 32, "dtype": "float64"}


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A folder with a run, and the run's result."""
    folder = tmp_path_factory.mktemp("trainability") / "plane"
    folder.mkdir()
    with jax.numpy_dtype_promotion("standard"):
        return folder, trainability.run(**SMALL, make_folder=lambda: folder)


def test_a_result_is_plain_data_and_saved_as_files(saved_run):
    folder, result = saved_run
    pixels = np.load(folder / "trainability.npy")
    assert pixels.dtype == np.float64
    assert pixels.shape == (8, 8, 2)
    np.testing.assert_array_equal(pixels, result["pixels"])
    numbers = {name: value for name, value in result.items() if name != "pixels"}
    document = json.loads((folder / "trainability.json").read_text(encoding="utf-8"))
    del document["environment"]
    assert document == json.loads(json.dumps(numbers))
    assert 0 < result["converged_fraction"] < 1
    assert result["converged_fraction"] + result["diverged_fraction"] == 1
    assert all(key.isascii() and key.isidentifier() for key in document)
    assert pd.read_csv(folder / "trainability.csv").to_dict("records") == [
        {"box_side": 1, "boxes": result["boxes"][0]["boxes"]}
    ]
    assert result["dimension"] is None
    assert (folder / "trainability.png").read_bytes().startswith(b"\x89PNG")


def test_a_pixel_is_a_plain_loop(saved_run):
    _, result = saved_run
    rates = 31.6227766 * 10 ** (5 * ((np.arange(8) + 0.5) / 8 - 0.5))
    with jax.enable_x64(True):
        key, x, y = trainability.make_data(0, "float64")
        key = jax.random.split(jax.random.fold_in(key, 0))[0]
        start = jaxbce.init(key, (16, 16, 1), dtype=jnp.float64)
        for row, column in itertools.product((0, 3, 7), (0, 3, 7)):
            layers, losses = start, []
            for _ in range(6):
                value, grads = jaxbce.value_and_grad(layers, x, y)
                losses.append(float(value))
                layers = tuple(
                    jax.tree.map(lambda t, g, r=rate: t - r * g, layer, grad)
                    for layer, grad, rate in zip(
                        layers, grads, (rates[column], rates[row]), strict=True
                    )
                )
            relative = np.array(losses[1:]) / losses[0]
            late = np.minimum(1, 1 / relative)
            expected = relative.mean() if relative[-1] < 1 else -late.mean()
            measure, diverged_at = result["pixels"][row, column]
            np.testing.assert_allclose(measure, expected, rtol=1e-9)
            assert diverged_at == -1


def test_an_interrupted_run_resumes_to_the_same_array(saved_run, capsys):
    folder, result = saved_run
    (folder / "parts" / "1.parquet").unlink()
    (folder / "trainability.npy").unlink()
    again = trainability.run(**SMALL, make_folder=lambda: folder)
    assert "32 of 64" in capsys.readouterr().out
    np.testing.assert_array_equal(again["pixels"], result["pixels"])
    np.testing.assert_array_equal(
        np.load(folder / "trainability.npy"), result["pixels"]
    )


def test_a_folder_of_another_plane_is_refused(saved_run):
    folder, _ = saved_run
    with pytest.raises(cli.InputError, match=r"another run.*span=5\.0"):
        trainability.run(**SMALL, span=4.0, make_folder=lambda: folder)


def test_measures_are_of_the_losses():
    nan, inf = np.nan, np.inf
    losses = [[1.0, 0.5], [3.0, 1.0], [4.0, 8.0], [4.0, nan], [nan, nan], [1.0, inf]]
    measures = trainability.measure(np.array(losses), 2.0)
    np.testing.assert_array_equal(measures, [0.375, 1, -0.375, -0.25, 0, -0.5])


def test_the_boundary_is_what_converged_beside_what_did_not():
    converged = np.zeros((5, 5), bool)
    converged[1:4, 1:4] = True
    expected = converged.copy()
    expected[2, 2] = False
    np.testing.assert_array_equal(trainability.boundary(converged), expected)
    assert trainability.boundary(~converged).sum() == 16
    assert not trainability.boundary(np.ones((4, 4), bool)).any()
    assert not trainability.boundary(np.zeros((4, 4), bool)).any()


def half_plane(slope):
    def line(n):
        i, j = np.indices((n, n))
        return trainability.boundary(j < slope * i + 0.1 * n)

    return line


def checkerboard(n):
    """It has half of the pixels, and some of every larger box."""
    i, j = np.indices((n, n))
    return trainability.boundary((i + j) % 2 == 0)


def sierpinski(n):
    i, j = np.indices((n, n))
    return i & j == 0


@pytest.mark.parametrize(
    ("shape", "n", "expected", "within"),
    [
        (half_plane(0), 256, 1, 0.05),
        (half_plane(0.3), 256, 1, 0.05),
        (half_plane(0.8), 256, 1, 0.05),
        (half_plane(0.8), 250, 1, 0.05),
        (checkerboard, 256, 2, 0.15),
        (lambda n: np.ones((n, n), bool), 256, 2, 1e-9),
        (sierpinski, 256, np.log2(3), 1e-9),
    ],
)
def test_the_dimension_of_a_known_set(shape, n, expected, within):
    found: Any = trainability.dimension(trainability.box_counts(shape(n)))
    assert abs(found["dimension"] - expected) <= within
    assert found["r_squared"] > 0.99
    assert found["standard_error"] < 0.1


def test_box_counts_by_hand():
    pixels = np.zeros((16, 16), bool)
    pixels[0, :3] = True
    assert trainability.box_counts(pixels) == [
        {"box_side": 1, "boxes": 3},
        {"box_side": 2, "boxes": 2},
    ]


@pytest.mark.parametrize("pixels", [np.zeros((64, 64), bool), np.ones((31, 31), bool)])
def test_no_boundary_or_too_few_boxes_have_no_dimension(pixels):
    found = trainability.dimension(trainability.box_counts(pixels))
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    "text", ["", "1", "1,2,3", "1,x", "0,1", "1,-1", "1,nan", "inf,1"]
)
def test_a_center_that_is_not_two_numbers_is_refused(text):
    with pytest.raises(cli.InputError, match=f"^--center={text}: expected two finite"):
        trainability._center(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"span": 0.0}, "--span=0: expected a finite number > 0"),
        ({"span": -1.0}, "--span=-1: expected a finite number > 0"),
        ({"span": float("nan")}, "--span=nan: expected a finite number > 0"),
        ({"span": 200.0}, "float32 cannot represent"),
        ({"span": 1e-7}, "too close for float32"),
    ],
)
def test_an_impossible_plane_is_refused_before_a_folder_is_made(options, message):
    def none():
        raise AssertionError("a folder was made")

    with pytest.raises(cli.InputError, match=message):
        trainability.run(resolution=8, num_steps=5, **options, make_folder=none)


def test_figures_of_one_kind_and_of_a_deep_zoom_are_drawn(tmp_path):
    for i, measures in enumerate((np.ones((4, 4)), -np.ones((4, 4)))):
        path = tmp_path / f"{i}.png"
        plots.trainability(path, measures, (12.3456789, 0.1), 1e-6)
        assert path.stat().st_size > 0


def test_the_command_trains_and_resumes_the_plane_of_its_flags(saved_run, tmp_path):
    _, result = saved_run
    arguments = (
        "--resolution=8",
        "--num_steps=5",
        "--dtype=float64",
        f"--output_dir={tmp_path}",
    )
    finished = run_command("trainability", *arguments)
    assert (finished.status, finished.err) == (0, "")
    assert "8×8 networks 16→16→1" in finished.out
    assert f"converged {result['converged_fraction']:.4f}" in finished.out
    assert "  box side    boxes" in finished.out
    assert "no dimension: fewer than 3 box sides" in finished.out
    assert "trainability.npy" in finished.out
    pixels = np.load(tmp_path / "trainability.npy")
    np.testing.assert_allclose(pixels, result["pixels"], rtol=1e-9)
    finished = run_command("trainability", *arguments)
    assert finished.status == 0
    assert "64 of 64" in finished.out
    finished = run_command("trainability", *arguments, "--span=4")
    assert finished.status == 2
    assert finished.err.count("\n") == 1
    assert "span=5.0" in finished.err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--center=1,x", "--center=1,x: "),
        ("--span=0", "--span=0: "),
        ("--resolution=1", "--resolution=1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argument, message):
    finished = run_command("trainability", argument)
    assert finished.status == 2
    assert message in finished.err
    assert finished.err.count("\n") == 1
