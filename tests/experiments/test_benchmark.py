"""Benchmark cases are measured if their results agree; tables come from the JSON."""

import contextlib
import itertools
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import pytest

import experiments.suites.case as case_module
from experiments import benchmark
from experiments.suites import (
    batches,
    compilation,
    data_sweeps,
    laplace,
    report,
    training,
    workloads,
)
from experiments.suites.case import JAXBCE, Case
from experiments.support import timing
from tests.helpers import run_command, start

KEY = jax.random.key(0)
LIMITS = {"flop_per_second": 1e9, "bytes_per_second": 1e9}
ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / ".github" / "benchmark.json"
LATER_DOCUMENT = DOCUMENT.with_name("benchmark_data_sweeps.json")
SIZE = (32, (5, 4, 1))  # shared, so that programs are compiled once


pytestmark = pytest.mark.usefixtures("standard_promotion")


def measure(*cases, **options):
    rows, mismatches = benchmark.run(cases, **{"rounds": 3, "limits": LIMITS} | options)
    assert mismatches == []
    return rows


def mismatch_of(case):
    rows, mismatches = benchmark.run([case], rounds=3, limits=LIMITS)
    assert rows == []
    return mismatches[0]


def number_case(value, **baselines):
    """A case whose implementations return numbers."""

    def implementations():
        return {
            name: timing.Call(lambda number=number: number)
            for name, number in ({JAXBCE: value} | baselines).items()
        }

    return Case(
        "suite", "number", "1", implementations, case_module.results_of, tolerance=1e-5
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:optax.global_norm")  # of jax_privacy
@pytest.mark.parametrize("quantity", workloads.quantities())
def test_every_baseline_of_a_quantity_agrees_and_is_measured(quantity):
    reported = []
    case = batches.case("per_example", quantity, *SIZE, KEY)
    rows = measure(case, report=reported.append)
    workload = workloads.quantities()[quantity]
    assert [row["baseline"] for row in rows] == [
        name for name in workload.baselines if name not in case.missing
    ]
    for row in rows:
        assert (row["difference"] is None) == (row["baseline"] in workload.other_work)
        assert row["seconds"] > 0
        assert row["speed"] > 0
        assert row["flop_share"] == case.flop / 1e9 / row["seconds"]
    for name in case.missing:
        assert any(f"{name} cannot be imported, skipped" in line for line in reported)


def test_exact_results_of_a_batch_are_in_float64():
    case = batches.case("gradient", "gradient", *SIZE, KEY)
    assert case.exact is not None
    results = case.exact()
    assert {leaf.dtype for leaf in jax.tree.leaves(results[JAXBCE])} == {
        np.dtype("float64")
    }
    assert max(benchmark.relative_differences(results).values()) < 1e-14


def test_a_difference_beyond_the_tolerance_is_a_mismatch():
    (row,) = measure(number_case(1.0, other=1 - 1e-6))
    assert row["difference"] == pytest.approx(1e-6)
    case = number_case(1.0, near=1.0, far=0.999)
    assert mismatch_of(case).startswith("suite: number, 1: differs from {'far': 0.00")


def test_float64_decides_within_the_loose_tolerance_alone():
    exact = dict.fromkeys((JAXBCE, "other"), 1.0)
    (row,) = measure(number_case(1.0, other=1 + 1e-4)._replace(exact=lambda: exact))
    assert row["difference"] == 0
    for value in (1.02, 0.0, np.nan):  # whatever float64 says
        case = number_case(1.0, other=value)._replace(exact=lambda: exact)
        assert "differs from" in mismatch_of(case)
    wrong = {JAXBCE: 1.0, "other": 1.001}
    case = number_case(1.0, other=1 + 1e-4)._replace(exact=lambda: wrong)
    assert "differs from" in mismatch_of(case)


def test_results_that_cannot_be_compared_are_mismatches():
    result = {"value": np.ones(()), "w": np.ones((2, 1)), "b": np.ones(1)}
    for change in ({"b": np.full(1, np.nan)}, {"b": np.ones((1, 1))}, {"b": None}):
        case = number_case(result | change, other=result)
        assert "'other': nan" in mismatch_of(case)

    def fail():
        raise RuntimeError("out of luck")

    assert "RuntimeError: out of luck, not measured" in mismatch_of(
        case._replace(implementations=fail)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_case", "size", "baselines"),
    [
        ("fit_case", (12, 4, (3, 2, 1), "adam"), ["plain loop"]),
        ("sweep_case", (2, 12, 12, (3, 2, 1), "sgd"), ["vmap", "vmap, sharded"]),
        pytest.param(
            "fit_case",
            (12, 12, (3, 2, 1), "sgd"),
            ["plain loop"],
        ),
        pytest.param(
            "sweep_case",
            (3, 12, 4, (3, 2, 1), "adam"),
            ["vmap"],
        ),
    ],
)
def test_training_runs_agree_in_float64(monkeypatch, make_case, size, baselines):
    monkeypatch.setattr(training, "STEPS", 6)
    monkeypatch.setattr(training, "NETWORK_STEPS", 6)
    suite = ("sweep",) if make_case == "sweep_case" else ()
    rows = measure(getattr(training, make_case)(*suite, *size, KEY))
    assert [row["baseline"] for row in rows] == baselines
    assert all(row["difference"] <= 1e-10 for row in rows)


def test_training_runs_that_differ_are_mismatches(monkeypatch):
    monkeypatch.setattr(training, "STEPS", 1)
    monkeypatch.setattr(training, "NETWORK_STEPS", 1)
    monkeypatch.setattr(training.baselines, "plain_fit", lambda *a, **k: a[1])
    fit = training.fit_case(12, 12, (3, 2, 1), "sgd", KEY)
    assert "differs from {'plain loop'" in mismatch_of(fit)
    sweep = training.sweep_case("sweep", 2, 12, 12, (3, 2, 1), "sgd", KEY)
    mismatch = mismatch_of(sweep)
    assert "'vmap'" in mismatch
    assert "'vmap, sharded'" in mismatch


def test_other_libraries_train_what_a_sweep_trains(monkeypatch):
    monkeypatch.setattr(training, "LIBRARIES_SIZE", (4, 32, 8, (5, 3, 1), "adam"))
    monkeypatch.setattr(training, "SCIKIT_LEARN_SIZE", (2, 3))
    case = training.libraries_case(KEY)
    with joblib.parallel_config(backend="sequential"):
        rows = {row["baseline"]: row for row in measure(case)}
    assert rows["scikit-learn"]["difference"] is None
    for name in {"torch.func.vmap", "PyTorch, one"} - set(case.missing):
        assert rows[name]["difference"] <= 1e-10


@pytest.fixture
def small_data_sweeps(monkeypatch):
    monkeypatch.setattr(training, "NETWORK_STEPS", 6)
    monkeypatch.setattr(data_sweeps, "LAYERS", (3, 2, 1))
    monkeypatch.setattr(data_sweeps, "MIN_STEPS", 2)
    monkeypatch.setattr(data_sweeps, "OPTIMIZER", "sgd")
    monkeypatch.setattr(data_sweeps, "GRID_SEARCH_EPOCHS", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("small_data_sweeps")
def test_networks_that_leave_out_a_fold_are_trained_alike():
    case = data_sweeps.sweep_case(9, 3, 1, 3, KEY)  # folds of 3, on one device
    rows = measure(case._replace(exact=None, tolerance=1e-5))
    differences = {row["baseline"]: row["difference"] for row in rows}
    assert differences.pop("vmap, weights") <= 1e-5
    assert differences == {"without weights": None, "vmap, own": None}


@pytest.mark.slow
@pytest.mark.usefixtures("small_data_sweeps")
def test_networks_that_leave_out_one_example_are_trained_alike():
    case = data_sweeps.sweep_case(6, 6, 1, 6, KEY)
    assert case.exact is not None
    differences = benchmark.relative_differences(case.exact())
    names = {"vmap, own", "vmap, weights"}
    assert differences.keys() == names | {f"{name}, sharded" for name in names}
    assert max(differences.values()) <= 1e-10


@pytest.mark.slow
@pytest.mark.usefixtures("small_data_sweeps")
def test_a_grid_search_takes_the_steps_that_it_is_timed_for(monkeypatch):
    case = data_sweeps.grid_search_case(8, 2, 3, 2, KEY, scikit_learn_points=1)
    with joblib.parallel_config(backend="sequential"):
        (row,) = measure(case)
    assert (row["baseline"], row["difference"]) == ("GridSearchCV", None)
    calls = case.implementations()
    assert {name: call.units for name, call in calls.items()} == {
        JAXBCE: 2 * 3 * 2 * 2,  # folds, points, epochs, steps per epoch
        "GridSearchCV": 2 * 1 * 2 * 2,
    }
    monkeypatch.setattr(data_sweeps.baselines, "scikit_learn_grid_search", lambda *a: 7)
    with pytest.raises(RuntimeError, match="expected 8 steps of scikit-learn, got 7"):
        calls["GridSearchCV"].run()


@pytest.mark.usefixtures("small_data_sweeps")
def test_held_out_losses_that_differ_are_a_mismatch(monkeypatch):
    monkeypatch.setattr(data_sweeps, "LAYERS", (3, 2, 1))
    monkeypatch.setattr(data_sweeps, "GRID_SEARCH_EPOCHS", 2)
    monkeypatch.setattr(data_sweeps.baselines, "plain_loss", lambda p, x, y: jnp.sum(y))
    case = data_sweeps.grid_search_case(8, 2, 3, 2, KEY, scikit_learn_points=1)
    assert "differs from {'plain JAX'" in mismatch_of(case)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # of laplace-torch
@pytest.mark.parametrize("quantity", laplace.QUANTITIES)
def test_the_laplace_approximation_is_that_of_the_explicit_matrix(quantity):
    case = laplace.case(quantity, *SIZE, KEY)
    rows = measure(case._replace(exact=None, tolerance=1e-5))
    libraries = {*laplace.QUANTITIES[quantity].libraries} - {*case.missing}
    assert {row["baseline"] for row in rows} == {"dense", *libraries}
    for row in rows:
        is_other_work = row["baseline"] in laplace.OTHER_WORK
        assert (row["difference"] is None) == is_other_work
        assert is_other_work or row["difference"] <= 1e-5


def test_exact_results_of_the_laplace_approximation_are_in_float64():
    case = laplace.case("variances", *SIZE, KEY)
    assert case.exact is not None
    assert 0 < benchmark.relative_differences(case.exact())["dense"] < 1e-13


def test_a_laplace_approximation_with_another_prior_is_a_mismatch(monkeypatch):
    def other(batch):
        posterior = ours.posterior(batch)
        return posterior._replace(prior_precision=1.1 * posterior.prior_precision)

    ours = laplace.METHODS[JAXBCE]
    monkeypatch.setitem(laplace.METHODS, JAXBCE, ours._replace(posterior=other))
    assert "differs from {'dense'" in mismatch_of(
        laplace.case("all of them", *SIZE, KEY)
    )


@pytest.mark.slow
def test_a_new_process_and_compilation_are_measured():
    rows = measure(*compilation.cases("compile", True, KEY))
    assert {row["quantity"] for row in rows} == {
        "new process to first gradient",
        "trace",
        "trace and compile",
    }


def test_scaling_cases_become_a_curve():
    cases = [
        batches.case(
            "scaling",
            "ntk",
            n,
            (3, 2, 1),
            KEY,
            baselines=("vmap(jax.grad)",),
            scaling_axis=("examples", n),
        )
        for n in (4, 16)
    ]
    (cell,) = report.scaling_table(measure(*cases))
    assert cell["baseline"] == "vmap(jax.grad)"
    assert cell["scaling axis"] == "examples: 4, 16"


def test_an_exponent_is_that_of_the_curve():
    row = {"quantity": "q", "baseline": "other", "unit": "call", "speed": 1.0}
    curve = [
        row
        | {
            "scaling_axis": ("examples", n),
            "seconds": n**2 / 1e9,
            "baseline_seconds": n / 1e6,
        }
        for n in (10, 100, 1000)
    ]
    (cell,) = report.scaling_table(curve)
    assert (cell["jaxbce exponent"], cell["baseline exponent"]) == ("2.00", "1.00")


def test_calls_are_timed_in_turn_and_built_anew_in_each_repeat(monkeypatch):
    clock = itertools.count()  # about a millisecond passes between readings
    fake = types.SimpleNamespace(perf_counter=lambda: next(clock) / 1024)
    monkeypatch.setattr(timing, "time", fake)
    called = []

    def implementations():
        called.append("built")
        return {
            name: timing.Call(lambda name=name: called.append(name), units=units)
            for name, units in (("a", 1), ("b", 1000))
        }

    costs = timing.measure(implementations, rounds=3, repeats=2)
    assert called.count("built") == 2
    turns = "".join(called).split("built")[1].lstrip("a").lstrip("b")
    assert turns[0] == "a"
    assert turns[-1] == "b"
    assert 6 < costs["a"].times.size <= 30  # at least 3 rounds, more of short calls
    assert costs["b"].seconds == pytest.approx(costs["a"].seconds / 1000)


def test_speed_is_the_median_of_ratios_round_by_round():
    cost = timing.Cost(np.array([1.0, 2.0, 4.0]), None)
    baseline = timing.Cost(np.array([3.0, 2.0, 8.0]), None)
    assert timing.speed(cost, baseline) == (2.0, 1.5, 2.5)


def test_the_limits_are_of_this_machine():
    limits = timing.machine_limits()
    assert 1e8 < limits["flop_per_second"] < 1e16
    assert 1e8 < limits["bytes_per_second"] < 1e14


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.99951, "1.00"), (1.0949, "1.09"), (147.6, "148"), (9996.0, "10000"), (0, "0")],
)
def test_numbers_have_three_digits(value, text):
    assert report._number(value) == text


def test_the_page_has_the_tables_of_the_runs_in_the_repository():
    text = benchmark.PAGE.read_text(encoding="utf-8")
    names = {name for _, name, _ in report._BLOCK.findall(text)}
    assert names == {"machine", *benchmark.SUITES, report.AHEAD_OF_TIME}
    suites = []
    for path in (DOCUMENT, LATER_DOCUMENT):
        document = json.loads(path.read_text(encoding="utf-8"))
        suites += document["finished_suites"]
        machine = report._machine_text(document)
        if path == DOCUMENT:
            assert f"<!-- benchmark: machine -->\n\n{machine}\n\n<!-- end" in text
        else:
            assert report.with_tables(text, document) == text
        for name in document["finished_suites"]:
            assert report.markdown(name, document) in text
    assert sorted(suites) == sorted(benchmark.SUITES)


def test_a_run_of_some_suites_replaces_their_tables_alone():
    document = json.loads(LATER_DOCUMENT.read_text(encoding="utf-8"))
    both = PAGE + "<!-- benchmark: laplace -->\n<!-- end -->\n"
    text = report.with_tables(both, document)
    assert text.startswith(f"{PAGE}<!-- benchmark: laplace -->\n\n| quantity")
    assert f"*{report._machine_text(document)}*\n\n<!-- end -->\n" in text


PAGE = "".join(
    f"<!-- benchmark: {name} -->\n<!-- end -->\n" for name in ("machine", "fit")
)


def test_tables_are_written_between_the_marks_and_replaced():
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    text = report.with_tables(f"before\n{PAGE}after\n", document)
    assert text.startswith("before\n<!-- benchmark: machine -->\n\n2 cores of ")
    assert text.endswith("<!-- end -->\nafter\n")
    fit = [row for row in document["rows"] if row["suite"] == "fit"]
    assert text.count("plain loop") == len(fit) > 0
    assert f" {report._number(fit[0]['speed'])} |" in text
    broken = text.replace("<!-- benchmark: fit -->\n", "<!-- benchmark: fit -->\nx")
    assert report.with_tables(broken, document) == text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows": []}, "no rows of suite 'fit'"),
        ({"finished_suites": ["gradient"]}, "suite 'fit' is not finished"),
        ({"mismatches": ["one"]}, "1 of its cases do not agree"),
        ({"configuration": {"full": False}}, "not a run of --full"),
    ],
)
def test_tables_of_an_unfinished_or_wrong_run_are_refused(change, match):
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=match):
        report.with_tables(PAGE, document | change)


@pytest.mark.parametrize(
    "text",
    [
        PAGE.replace("<!-- end -->", "", 1),
        PAGE.replace("<!-- benchmark: fit -->", "<!-- benchmark:fit -->"),
        "no marks",
    ],
)
def test_a_page_without_pairs_of_marks_is_refused(text):
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="the page's marks are not pairs"):
        report.with_tables(text, document)


def test_write_tables_fills_the_page_and_measures_nothing(tmp_path, monkeypatch):
    page = tmp_path / "BENCHMARKS.md"
    page.write_text(PAGE, encoding="utf-8")
    monkeypatch.setattr(benchmark, "PAGE", page)
    finished = run_command("benchmark", f"--write_tables={DOCUMENT}")
    assert finished == (0, f"The tables of {DOCUMENT} are in {page}\n", "")
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8") == report.with_tables(PAGE, document)
    unfinished = tmp_path / "benchmark.json"
    unfinished.write_text(json.dumps(document | {"finished_suites": []}))
    finished = run_command("benchmark", f"--write_tables={unfinished}")
    assert finished.status == 2
    assert "suite 'fit' is not finished" in finished.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite=none",), "none"),
        (("--quick", "--full"), "--quick and --full exclude each other"),
        (("--write_tables=none.json",), "none.json"),
        ((f"--write_tables={ROOT / 'pyproject.toml'}",), "pyproject.toml: "),
        (("--rounds=2",), "--rounds=2"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message):
    finished = run_command("benchmark", *arguments)
    assert (finished.status, finished.out) == (2, "")
    assert message in finished.err
    assert finished.err.count("\n") == 1


@pytest.fixture
def toy_suites(monkeypatch):
    """A suite that agrees and one that does not; no limits are measured."""

    class Suite:
        def __init__(self, *cases):
            self.cases = lambda suite, quick, key: iter(cases)

    suites = {
        "gradient": Suite(
            batches.case("gradient", "norms", *SIZE, KEY)._replace(missing=("A", "B")),
            number_case(1.0, other=1.0)._replace(
                suite="gradient", missing=("A", "PyTorch")
            ),
        ),
        "fit": Suite(number_case(1.0, other=2.0), number_case(1.0, other=1.0)),
    }
    monkeypatch.setattr(benchmark, "SUITES", benchmark.SUITES | suites)
    monkeypatch.setattr(timing, "machine_limits", lambda: dict(LIMITS))


@pytest.mark.usefixtures("toy_suites")
def test_a_run_writes_its_rows_and_what_made_them(tmp_path):
    finished = run_command(
        "benchmark", "--quick", "--suite=gradient", f"--output_dir={tmp_path}"
    )
    assert finished.status == 0, finished
    assert "times as fast as vmap(jax.grad)" in finished.out
    assert "share of limit" in finished.out
    document = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert {row["suite"] for row in document["rows"]} == {"gradient"}
    assert document["environment"]["jax"]
    assert document["limits"] == LIMITS
    assert document["finished_suites"] == ["gradient"]
    assert document["missing_baselines"] == ["A", "B", "PyTorch"]
    assert document["configuration"] == {
        "suites": ["gradient"],
        "quick": True,
        "full": False,
        "rounds": 3,
        "repeats": 1,
        "seed": 0,
    }
    published = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    assert document.keys() == published.keys()
    assert document["rows"][0].keys() == published["rows"][0].keys()
    for keys in (document.keys(), document["limits"].keys(), document["rows"][0]):
        assert all(key.isascii() and key.isidentifier() for key in keys)
    assert (tmp_path / "benchmark.csv").exists()
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


@pytest.mark.usefixtures("toy_suites")
def test_a_run_with_a_mismatch_measures_the_rest_and_fails(tmp_path):
    finished = run_command("benchmark", "--suite=fit", f"--output_dir={tmp_path}")
    assert finished.status == 1
    assert "WRONG: suite: number, 1: differs from {'other': 0.5}" in finished.out
    document = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert len(document["mismatches"]) == 1
    assert [row["baseline"] for row in document["rows"]] == ["other"]


@pytest.mark.slow
def test_a_process_measures_a_suite_and_writes_its_files(tmp_path):
    with contextlib.ExitStack() as stack:
        process = start(
            "benchmark", "--quick", "--suite=curvature", f"--output_dir={tmp_path}"
        )
        stack.callback(process.kill)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "times as fast as jvp of jax.grad" in out
    document = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert {row["suite"] for row in document["rows"]} == {"curvature"}
    assert document["limits"].keys() == LIMITS.keys()
    assert (tmp_path / "benchmark.csv").exists()
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_baselines_of_a_missing_library_are_left_out(monkeypatch):
    monkeypatch.setitem(case_module._LIBRARIES, "PyTorch", ("no_such_library",))
    case = batches.case("per_example", "norms", *SIZE, KEY)
    assert case.missing == ("PyTorch",)
    assert list(case.implementations()) == [JAXBCE, "vmap(jax.grad)"]


@pytest.mark.slow
def test_tracing_and_compilation_start_without_caches():
    # The last test of this file: those after it compile everything anew.
    functions = {JAXBCE: jnp.sin, "other": lambda x: jnp.sin(x)}
    args = (jnp.ones(3),)
    traced = []

    def compile_step(jitted, args):
        traced.append(jitted.trace(*args))

    results = compilation._cached_results(functions, args)
    case = compilation._compilation_case(
        "trace", "3", functions, args, compile_step, results
    )
    calls = case.implementations()
    assert case.results(calls) is case.results({})
    assert benchmark.check_case(case)[1:] == ({"other": 0.0}, None)
    function: Any = jax.jit(jnp.cos)
    function(args[0])
    assert function._cache_size() == 1
    calls["other"].run()
    assert function._cache_size() == 0
    assert len(traced) == 1
