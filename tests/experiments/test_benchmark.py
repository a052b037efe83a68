"""The benchmark measures what agrees, refuses what does not, and fills the README."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import experiments.suites.case as case_module
from experiments import benchmark
from experiments.suites import batches, compilation, report, training, workloads
from experiments.suites.case import OURS, Case
from experiments.support import timing
from tests.helpers import start

KEY = jax.random.key(0)
LIMITS = {"flop/s": 1e9, "byte/s": 1e9}
ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("standard_promotion")


def measure(*cases, **options):
    rows, refused = benchmark.run(cases, **{"rounds": 3, "limits": LIMITS} | options)
    assert refused == []
    return rows


def refused(case):
    rows, refused = benchmark.run([case], rounds=3, limits=LIMITS)
    assert rows == []
    return refused[0]


@pytest.mark.filterwarnings("ignore:optax.global_norm")  # of jax_privacy
@pytest.mark.parametrize("quantity", workloads.quantities())
def test_every_side_of_a_quantity_agrees_and_is_measured(quantity):
    reported = []
    case = batches.case("per_example", quantity, 32, (5, 4, 1), KEY)
    rows = measure(case, report=reported.append)
    peers = workloads.quantities()[quantity].peers
    assert [row["against"] for row in rows] == [
        p for p in peers if p not in case.missing
    ]
    other = workloads.quantities()[quantity].other_work
    for row in rows:
        assert (row["differ_by"] is None) == (row["against"] in other)
        assert row["seconds"] > 0
        assert row["speed"] > 0
        assert row["flop_share"] == case.flop / 1e9 / row["seconds"]
    for library in case.missing:
        assert any(
            f"{library} cannot be imported, skipped" in line for line in reported
        )


def test_what_does_not_agree_is_refused():
    case = batches.case("gradient", "gradient", 32, (5, 4, 1), KEY)
    results = case.results(case.sides())
    value, grads = results[OURS]
    wrong = results | {OURS: (value, jax.tree.map(lambda g: 1.001 * g, grads))}
    line = refused(
        case._replace(results=lambda _: dict(wrong), exact=lambda: dict(wrong))
    )
    assert line.startswith(
        "gradient: gradient, 32×5→4→1: differs from {'jax.grad': 0.00"
    )


def scaled(results, factor):
    value, grads = results[OURS]
    return results | {OURS: (value, jax.tree.map(lambda g: factor * g, grads))}


def test_float64_decides_where_float32_is_not_far_off():
    case = batches.case("gradient", "gradient", 32, (5, 4, 1), KEY)
    (row, *_) = measure(
        case._replace(results=lambda calls: scaled(case.results(calls), 1 + 1e-4))
    )
    assert row["differ_by"] < 1e-14
    for factor in (1.02, 0, np.nan):  # whatever float64 says
        far = case._replace(
            results=lambda calls, f=factor: scaled(case.results(calls), f)
        )
        assert "differs from" in refused(far)


def test_whatever_cannot_be_compared_is_refused():
    case = batches.case("gradient", "gradient", 32, (5, 4, 1), KEY)
    value, (first, last) = case.results(case.sides())[OURS]
    for wrong in (
        (value, (first, last._replace(b=np.full(1, np.nan)))),
        (value, (first, last._replace(b=last.b[None]))),
        (value, (first, last._replace(b=None))),
    ):
        bad = case._replace(
            results=lambda calls, w=wrong: case.results(calls) | {OURS: w}
        )
        assert "'jax.grad': nan" in refused(bad)

    def fail():
        raise RuntimeError("out of luck")

    assert "RuntimeError: out of luck, not measured" in refused(
        case._replace(sides=fail)
    )


def test_runs_of_training_agree_in_float64_and_are_measured(monkeypatch):
    monkeypatch.setattr(training, "STEPS", 6)
    monkeypatch.setattr(training, "NETWORK_STEPS", 6)

    def cases():
        yield training.fit(12, 4, (3, 2, 1), "adam", KEY)
        yield training.fit(12, 12, (3, 2, 1), "sgd", KEY)
        yield training.sweep("sweep", 3, 12, 4, (3, 2, 1), "adam", KEY)
        yield training.sweep("sweep", 2, 12, 12, (3, 2, 1), "sgd", KEY)

    rows = measure(*cases())
    assert [(row["quantity"], row["against"]) for row in rows] == [
        ("fit", "plain loop"),
        ("fit", "plain loop"),
        ("3 networks", "vmap"),
        ("2 networks", "vmap"),
        ("2 networks", "vmap, sharded"),
    ]
    assert all(row["differ_by"] <= 1e-10 for row in rows)
    monkeypatch.setattr(training.baselines, "plain_fit", lambda *a, **k: a[1])
    for each in cases():
        assert "differs from" in refused(each)


def test_other_libraries_train_what_a_sweep_trains(monkeypatch):
    monkeypatch.setattr(training, "OTHERS", (4, 32, 8, (5, 3, 1), "adam"))
    monkeypatch.setattr(training, "SCIKIT_LEARN", (2, 3))
    case = training.others(KEY)
    rows = {row["against"]: row for row in measure(case)}
    assert rows["scikit-learn"]["differ_by"] is None
    for name in {"torch.func.vmap", "PyTorch, one"} - set(case.missing):
        assert rows[name]["differ_by"] <= 1e-10


def test_starts_and_curves_are_measured():
    rows = measure(*compilation.cases("compile", True, KEY))
    assert {row["quantity"] for row in rows} == {
        "new process to first gradient",
        "trace",
        "trace and compile",
    }
    growing = [
        batches.case("scaling", "gradient", n, (3, 2, 1), KEY, along=("rows", n))
        for n in (4, 16)
    ]
    (cell,) = [
        cell
        for cell in report.slopes(measure(*growing))
        if cell["against"] == "jax.grad"
    ]
    assert cell["as grow"] == "rows: 4, 16"


def test_an_exponent_is_that_of_the_curve():
    row = {"quantity": "q", "against": "peer", "unit": "call", "speed": 1.0}
    curve = [
        row | {"along": ("rows", n), "seconds": n**2 / 1e9, "its_seconds": n / 1e6}
        for n in (10, 100, 1000)
    ]
    (cell,) = report.slopes(curve)
    assert (cell["exponent"], cell["theirs"]) == ("2.00", "1.00")


def test_calls_are_timed_in_turn_and_made_anew_in_each_repeat():
    called = []

    def sides():
        called.append("made")
        return {
            name: timing.Call(lambda name=name: called.append(name), units=units)
            for name, units in (("a", 1), ("b", 1000))
        }

    costs = timing.measure(sides, rounds=3, repeats=2)
    assert called.count("made") == 2
    turns = "".join(called).split("made")[1].lstrip("a").lstrip("b")
    assert turns[0] == "a"
    assert turns[-1] == "b"
    assert 6 < costs["a"].times.size <= 30  # 3 rounds at least, of short calls more
    assert costs["b"].seconds < costs["a"].seconds / 10


def test_speed_is_the_median_of_ratios_round_by_round():
    mine = timing.Cost(np.array([1.0, 2.0, 4.0]), None)
    theirs = timing.Cost(np.array([3.0, 2.0, 8.0]), None)
    assert timing.speed(mine, theirs) == (2.0, 1.5, 2.5)


def test_the_limits_are_of_this_machine():
    limits = timing.limits()
    assert 1e8 < limits["flop/s"] < 1e16
    assert 1e8 < limits["byte/s"] < 1e14


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.99951, "1.00"), (1.0949, "1.09"), (147.6, "148"), (9996.0, "10000"), (0, "0")],
)
def test_numbers_have_three_digits(value, text):
    assert report._number(value) == text


def test_the_readme_has_the_tables_of_one_run():
    """Those that the benchmark writes from the file beside the README's pictures."""
    document = json.loads((ROOT / ".github" / "benchmark.json").read_text())
    text = (ROOT / "experiments" / "BENCHMARKS.md").read_text()
    assert set(report._BLOCK.findall(text)) != set()
    assert report.with_tables(text, document) == text
    broken = text.replace("<!-- benchmark: fit -->\n", "<!-- benchmark: fit -->\nx")
    assert report.with_tables(broken, document) == text
    configuration = document["configuration"]
    rows = [row for row in document["rows"] if row["suite"] != "fit"]
    for change, match in (
        ({"rows": rows}, "no rows of suite 'fit'"),
        ({"finished": ["gradient"]}, "suite 'fit' is not finished"),
        ({"refused": ["one"]}, "1 rows are refused"),
        ({"configuration": configuration | {"full": False}}, "not a run of --full"),
    ):
        with pytest.raises(ValueError, match=match):
            report.with_tables(text, document | change)
    for torn in (
        text.replace("<!-- end -->", "", 1),
        text.replace("<!-- benchmark: fit -->", "<!-- benchmark:fit -->"),
        "no marks",
    ):
        with pytest.raises(ValueError, match=r"README.md's marks are not pairs"):
            report.with_tables(torn, document)


def test_as_a_process_it_writes_its_files_and_says_what_is_wrong(tmp_path):
    good = start(
        "benchmark",
        "--quick",
        "--suite=curvature",
        f"--output_dir={tmp_path}",
    )
    mistakes = {
        ("--suite=none",): "none",
        ("--quick", "--full"): "one of them, or neither",
        (f"--readme={tmp_path / 'none.json'}",): "none.json",
        (f"--readme={ROOT / 'pyproject.toml'}",): "pyproject.toml: ",
    }
    started = {flags_: start("benchmark", *flags_) for flags_ in mistakes}
    for flags_, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, (flags_, out, err)
        assert mistakes[flags_] in err
        assert err.count("\n") == 1, err
    out, err = good.communicate(timeout=300)
    assert good.returncode == 0, err
    assert "times as fast as jvp of jax.grad" in out
    document = json.loads((tmp_path / "benchmark.json").read_text())
    assert {row["suite"] for row in document["rows"]} == {"curvature"}
    assert document["environment"]["jax"]
    assert document["limits"].keys() == LIMITS.keys()
    assert (tmp_path / "benchmark.csv").exists()
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_a_missing_library_leaves_its_sides_out(monkeypatch):
    monkeypatch.setitem(case_module._LIBRARIES, "PyTorch", ("no_such_library",))
    case = batches.case("gradient", "gradient", 32, (5, 4, 1), KEY)
    assert isinstance(case, Case)
    assert case.missing == ("PyTorch",)
    assert list(case.sides()) == [OURS, "jax.grad"]
