"""The scripts at toy size, and as processes: their output, files and errors."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments import compare_gradients
from experiments.gradient_checks import comparisons, walkthrough
from jaxbce import gradients
from tests.helpers import problem, start

pytestmark = pytest.mark.usefixtures("standard_promotion")


def toy(**kwargs):
    p = problem((5, 4, 1), rows=20)
    y = np.round(p.y)
    return compare_gradients.run(x=p.x, y=y, trials=3, rounds=1, block_size=7, **kwargs)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_compare_gradients_finds_the_derivation_right(dtype):
    parts = toy(hidden=(4,), dtype=dtype)
    assert list(parts) == ["factors", "oracles", "tail", "networks", "cost"]
    rows = [row for rows in parts.values() for row in rows]
    assert all(row.get("verdict", True) for row in rows)
    assert len(parts["factors"]) == 10 + 1 + 4 + 2
    assert {"autodiff", "complex step", "differences", "scikit-learn"} <= {
        row["oracle"] for row in parts["oracles"]
    }


@pytest.mark.parametrize("hidden", [(), (3, 2)])
def test_compare_gradients_takes_any_depth(hidden):
    parts = toy(hidden=hidden)
    assert all(row.get("verdict", True) for rows in parts.values() for row in rows)
    assert len(parts["factors"]) == 1 + 2 * (len(hidden) + 1) + 2


def test_compare_gradients_finds_a_wrong_derivation(monkeypatch):
    import jax

    honest = gradients.deltas

    def wrong(*args, **kwargs):
        first, *rest = honest(*args, **kwargs)
        return (first * 1.001, *rest)

    monkeypatch.setattr(gradients, "deltas", wrong)
    jax.clear_caches()
    parts = toy(hidden=(4,))
    monkeypatch.undo()
    jax.clear_caches()
    for part in ("factors", "oracles", "networks"):
        assert not all(row["verdict"] for row in parts[part])


def test_the_tail_shows_the_textbook_failing_and_the_derivation_exact():
    rows = comparisons.tail((5.0, 15.0, 40.0))
    assert [row["textbook, ŷ−y"] > 0.1 for row in rows] == [False, True, True]
    assert all(row[comparisons.BY_HAND] < 1e-6 for row in rows)
    assert all(row["verdict"] for row in rows)


def test_explain_shows_each_equation_and_holds():
    text, holds = walkthrough.walk()
    assert holds
    for equation in ("a₁ = X w₁ + b₁", "∂BCE/∂w₁ = Xᵀ δ₁", "∂ŷ/∂a₂ = ŷ(1 − ŷ)"):
        assert equation in text
    assert "  jax: " in text


def test_as_a_process_it_writes_results_that_say_what_made_them(tmp_path):
    table = pd.DataFrame(
        {"a": range(30), "b": [0, 1, 5] * 10, "label": ["n", "p"] * 15}
    )
    table.to_parquet(tmp_path / "data.parquet")
    process = start(
        "compare_gradients",
        f"--data={tmp_path / 'data.parquet'}",
        "--target=label",
        "--hidden=3",
        "--trials=2",
        f"--output_dir={tmp_path / 'out' / 'here'}",
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "30 rows, network 2→3→1" in out
    assert "comparisons hold." in out
    assert err == ""
    folder = tmp_path / "out" / "here"
    document = json.loads((folder / "compare_gradients.json").read_text())
    assert document["holds"] is True
    assert document["configuration"]["hidden"] == [3]
    assert document["environment"]["jax"]
    rows = pd.read_csv(folder / "compare_gradients.csv")
    assert set(rows["part"]) == set(document["parts"])
    assert (folder / "compare_gradients.png").stat().st_size > 10_000


OTHERS = {
    ("compare_gradients", "--seeds=3"): "--seeds is not a flag of this script",
    ("train", "--epochs=99999999999"): "--epochs=99999999999: ",
    ("train", "--cpu_devices=2"): "--cpu_devices is not a flag of this script",
    ("trainability", "--batch_size=4"): "--batch_size is not a flag of this script",
    ("sweep", "--axis=b1=0.9", "--pos_weight=nan"): "a finite number >= 0",
    ("find_mislabeled", "--flip_fraction=nan"): "--flip_fraction=nan",
}


def test_what_would_do_nothing_or_no_good_is_refused():
    started = {command: start(*command) for command in OTHERS}
    for command, process in started.items():
        out, err = process.communicate(timeout=200)
        assert process.returncode == 2, (command, out, err)
        assert OTHERS[command] in err
        assert err.count("\n") == 1, err


def test_a_mistake_on_the_command_line_is_one_line_and_a_failure():
    mistakes = {
        ("--no_such_flag",): "no_such_flag",
        ("--hidden=8,x",): "--hidden=8,x: widths are integers >= 1",
        ("--output_dir=",): "--output_dir is empty",
        ("--batch=99999",): "--batch=99999: digits has 1797 rows",
        ("--tolerance=nan",): "--tolerance=nan: not a number",
        ("stray",): "'stray': not a flag",
    }
    started = {flags: start("compare_gradients", *flags) for flags in mistakes}
    for flags_, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, (flags_, out, err)
        assert out == ""
        assert err.startswith("compare_gradients: ")
        assert mistakes[flags_] in err
        assert err.count("\n") == 1, err
