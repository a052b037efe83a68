"""The six parts at toy size, and the command's output, files and errors."""

import contextlib
import json

import jax
import numpy as np
import pandas as pd
import pytest

from experiments import compare_gradients
from experiments.gradient_checks import comparisons, walkthrough
from jaxbce import gradients
from tests.helpers import problem, run_command, start

pytestmark = pytest.mark.usefixtures("standard_promotion")


def toy(rows=20, **kwargs):
    p = problem((5, 4, 1), rows=rows)
    y = np.round(p.y)
    kwargs |= {"trials": 3, "rounds": 1, "block_size": 7}
    with jax.default_matmul_precision("highest"):  # as the command; shares its programs
        return compare_gradients.run(x=p.x, y=y, **kwargs)


@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [
        ((4,), "float64"),
        ((), "bfloat16"),
        ((3, 2), "float32"),
        ((4,), "float32"),
        ((4,), "bfloat16"),
        ((), "float64"),
        ((3, 2), "float64"),
    ],
)
def test_every_depth_and_dtype_passes(hidden, dtype):
    parts = toy(hidden=hidden, dtype=dtype)
    assert list(parts) == [
        "factors",
        "references",
        "tail",
        "networks",
        "training",
        "cost",
    ]
    assert all(compare_gradients.verdicts(parts))
    factors = 10 if len(hidden) == 1 else 0
    assert len(parts["factors"]) == factors + 1 + 2 * (len(hidden) + 1) + 2
    assert {"autodiff", "complex step", "differences", "scikit-learn"} <= {
        row["reference"] for row in parts["references"]
    }
    passed = compare_gradients.verdicts(parts)
    rows = [row for rows in parts.values() for row in rows]
    assert len(passed) == len(rows) - len(parts["cost"])
    for row in rows:
        assert all(key.isascii() and key.isidentifier() for key in row)


def test_a_wrong_derivation_fails(monkeypatch):
    honest = gradients.pull_back

    def wrong(*args, **kwargs):
        first, *rest = honest(*args, **kwargs)
        return (first * 1.001, *rest)

    monkeypatch.setattr(gradients, "pull_back", wrong)
    monkeypatch.setattr(comparisons, "cost", lambda *args, **kwargs: [])
    # No other test may have 23 examples: JAX keeps the wrong programs by shape.
    parts = toy(rows=23, hidden=())
    for part in ("factors", "references", "networks", "training"):
        assert not all(row["passed"] for row in parts[part])
    assert not all(compare_gradients.verdicts(parts))


def test_the_textbook_fails_in_the_tail_and_the_derivation_is_exact():
    rows = comparisons.tail((5.0, 15.0, 40.0))
    assert [row["textbook"] > 0.1 for row in rows] == [False, True, True]
    assert all(row["by_hand"] < 1e-6 for row in rows)
    assert all(row["passed"] for row in rows)
    assert [comparisons.HEADINGS.get(key, key) for key in rows[0]] == [
        "|a|",
        "textbook, ŷ−y",
        "by hand, δ",
        "jax.grad, optax",
        "jax.grad, log(1+eᵃ)−ya",
        "verdict",
    ]


def test_explain_shows_each_equation_and_holds():
    with jax.default_matmul_precision("highest"):  # as the command
        text, agree = walkthrough.walk()
    assert agree
    for equation in ("a₁ = X w₁ + b₁", "∂BCE/∂w₁ = Xᵀ δ₁", "∂ŷ/∂a₂ = ŷ(1 − ŷ)"):
        assert equation in text
    assert "  jax: " in text


def data_flags(tmp_path):
    """Flags for a table with the shapes of `toy`, and for an output folder."""
    rng = np.random.default_rng(0)
    data = pd.DataFrame(rng.normal(size=(20, 5)), columns=list("abcde"))
    data["label"] = ["n", "p"] * 10
    data.to_parquet(tmp_path / "data.parquet")
    return (
        f"--data={tmp_path / 'data.parquet'}",
        "--target=label",
        "--hidden=4",
        "--trials=3",
        "--block_size=7",
        f"--output_dir={tmp_path / 'out' / 'here'}",
    )


def check_output(tmp_path, out):
    assert "20 examples, network 5→4→1" in out
    assert "comparisons passed." in out
    assert "jax.grad, log(1+eᵃ)−ya" in out
    folder = tmp_path / "out" / "here"
    document = json.loads(
        (folder / "compare_gradients.json").read_text(encoding="utf-8")
    )
    assert document["passed"] is True
    assert document["configuration"]["hidden"] == [4]
    assert document["configuration"]["batch"] == 20
    assert document["environment"]["jax"]
    rows = pd.read_csv(folder / "compare_gradients.csv")
    assert set(rows["part"]) == set(document["parts"])
    assert all(column.isascii() and column.isidentifier() for column in rows)
    assert (folder / "compare_gradients.png").stat().st_size > 10_000


def test_the_command_writes_results_and_what_made_them(tmp_path, monkeypatch):
    run = compare_gradients.run
    monkeypatch.setattr(
        compare_gradients, "run", lambda **options: run(rounds=1, **options)
    )
    finished = run_command("compare_gradients", *data_flags(tmp_path))
    assert (finished.status, finished.err) == (0, "")
    check_output(tmp_path, finished.out)


@pytest.mark.slow
def test_a_process_writes_results_and_what_made_them(tmp_path):
    with contextlib.ExitStack() as stack:
        process = start("compare_gradients", *data_flags(tmp_path))
        stack.callback(process.kill)
        out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    check_output(tmp_path, out)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("compare_gradients", ("--seeds=3",), "--seeds is not a flag of this command"),
        ("train", ("--epochs=99999999999",), "--epochs=99999999999: "),
        ("train", ("--cpu_devices=2",), "--cpu_devices is not a flag of this command"),
        ("trainability", ("--batch_size=4",), "--batch_size is not a flag of this"),
        ("sweep", ("--axis=b1=0.9", "--pos_weight=nan"), "a finite number >= 0"),
        ("find_mislabeled", ("--flip_fraction=nan",), "--flip_fraction=nan"),
    ],
)
def test_a_flag_without_effect_or_sense_is_refused(name, arguments, message):
    finished = run_command(name, *arguments)
    assert finished.status == 2
    assert message in finished.err
    assert finished.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--no_such_flag", "no_such_flag"),
        ("--hidden=8,x", "--hidden=8,x: "),
        ("--output_dir=", "--output_dir: expected the name of a folder"),
        ("--batch=99999", "--batch=99999: digits has 1797 examples"),
        ("--tolerance=nan", "--tolerance=nan: expected a finite number > 0"),
        ("stray", "'stray': expected a flag"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argument, message):
    finished = run_command("compare_gradients", argument)
    assert (finished.status, finished.out) == (2, "")
    assert finished.err.startswith("compare_gradients: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1
