"""The six parts at toy size, and the command's output, files and errors."""

import contextlib
import json
import sys

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


@pytest.mark.slow_ids("hidden0", "hidden1", "hidden2", "hidden3", "hidden4", "hidden6")
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


MINE = """
import jax, jaxbce, numpy as np

right = jaxbce.value_and_grad
only_grads = jaxbce.grad
number = 3

def no_mask(params, x, y):
    (w1, b1), (w2, b2) = jax.tree.map(np.asarray, params)
    x, y = np.asarray(x), np.asarray(y)
    h1 = np.maximum(x @ w1 + b1, 0)
    a2 = h1 @ w2 + b2
    delta2 = (1 / (1 + np.exp(-a2)) - y) / len(x)
    delta1 = delta2 @ w2.T
    value = np.mean(np.logaddexp(0, a2) - y * a2)
    return value, ((x.T @ delta1, delta1.sum(0)), (h1.T @ delta2, delta2.sum(0)))

def in_numpy(params, x, y):
    return np.asarray(x) @ np.asarray(params[1].w)

def in_jax(params, x, y):
    return jax.jit(lambda w: x @ w)(params[1].w)

def ends(params, x, y):
    raise SystemExit(3)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Modules of a user in the current folder."""
    files = {"mine": MINE, "syntax": "def f(:", "fails": "raise ValueError('no\\nway')"}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("name", "status", "found"),
    [
        ("mine:right", 0, "gradient: passed, tail: exact"),
        ("mine:no_mask", 1, "[0].b looks like the gradient without the relu mask"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_a_function_of_the_users_is_checked_and_nothing_else(
    name, status, found, tmp_path
):
    *data, folder = data_flags(tmp_path)
    finished = run_command("compare_gradients", f"--check={name}", *data, folder)
    assert (finished.status, finished.err) == (status, "")
    assert "20 examples, network 5→4→1" in finished.out
    assert found in finished.out.splitlines()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "expected module:function, such as mine:value_and_grad"),
        ("mine.py:right", "expected module:function"),
        ("my/own:right", "expected module:function"),
        (":", "expected module:function"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("syntax:f", "SyntaxError: invalid syntax (syntax.py, line 1)"),
        ("fails:f", "ValueError: no (fails.py, line 1: raise ValueError('no\\nway'))"),
        ("mine:nothing", "mine has no function nothing"),
        ("mine:number", "mine has no function number"),
        ("mine:only_grads", "expected fun to return (value, grads)"),
        ("mine:in_numpy", "(mine.py, line 19: return np.asarray(x) @ np.asarray("),
        ("mine:in_jax", "(mine.py, line 22: return jax.jit(lambda w: x @ w)("),
        ("mine:ends", "SystemExit: 3 (mine.py, line 25: raise SystemExit(3))"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_a_function_that_cannot_be_checked_is_one_line(name, message, tmp_path):
    finished = run_command(
        "compare_gradients", f"--check={name}", *data_flags(tmp_path)
    )
    assert finished.status == 2
    assert finished.err.startswith(f"compare_gradients: --check={name}: ")
    assert message in finished.err
    assert finished.err.count("\n") == 1


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
        ("train", ("--epochs=99999999999",), "expected fewer than 2^31 steps"),
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
