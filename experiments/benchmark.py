"""How does jaxbce compare with what a user would otherwise use?

    python -m experiments.benchmark --quick
    python -m experiments.benchmark --suite gradient --suite curvature
    python -m experiments.benchmark --full --output_dir results/benchmark
    python -m experiments.benchmark --write_tables results/benchmark/benchmark.json
    python -m experiments.benchmark --suite ahead_of_time --accelerator v5e

Each row of the tables has one quantity at one size, by jaxbce and by one baseline, both
measured in the same process. Their results must agree first; baselines marked † do
other work and are not compared. They are then timed in turn, A B A B, each call until
its result is ready. Speed is the median over rounds of the baseline's time over
jaxbce's; above 1, jaxbce is faster. If a library cannot be imported, a line says so and
its baselines are skipped. `pip install '.[benchmark]'` installs all but two, and
`pip install dattri laplace-torch` those.

The suites:

    gradient     `value_and_grad` vs `jax.value_and_grad` of optax's loss and PyTorch's
                 autograd; also for many networks, and over all devices
    fit          a step of `fit` vs the same loop in plain JAX
    sweep        `sweep` on all devices vs `jit(vmap(train))` on one and on all of them,
                 `torch.func.vmap` and scikit-learn
    data_sweep   cross-validation and leave-one-out by `sweep` vs the same sweep without
                 weights, `jit(vmap(train))` and scikit-learn's GridSearchCV
    per_example  norms, clipped sums and inner products vs `vmap(jax.grad)`,
                 jax_privacy, PyTorch and Opacus
    curvature    tangent kernels, Hessian and Gauss-Newton products vs plain JAX
    laplace      posterior, influence, leave-one-out and variances vs the explicit
                 matrix of all parameters, laplace-torch and dattri
    compile      from a new process to the first gradient; tracing and compilation
    scaling      how time grows with examples, widths, networks and batches

One more suite is not among those that run by default, because it times nothing:

    ahead_of_time  what the programs compiled for a GPU or TPU that is not attached do,
                   vs plain JAX. `pip install '.[aot-gpu,aot-tpu]'` brings the compilers

Expect about 1 for a plain gradient in cache and more beyond it, 1 to 3 for sweeps,
and tens for per-example quantities against vmap, unless the network is tiny. The share
of the limit is relative to the rate of large matrix products or copies on the same
machine, which is measured first.
"""

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.suites import (
    ahead_of_time,
    batches,
    compilation,
    data_sweeps,
    laplace,
    report,
    scaling,
    training,
)
from experiments.suites.case import JAXBCE, Case
from experiments.suites.targets import TARGETS, missing
from experiments.support import cli, output, timing

for _name in (*cli.COMMON, "cpu_devices"):
    flags.declare_key_flag(_name)
SUITES = {
    "gradient": batches,
    "fit": training,
    "sweep": training,
    "data_sweep": data_sweeps,
    "per_example": batches,
    "curvature": batches,
    "laplace": laplace,
    "compile": compilation,
    "scaling": scaling,
}
AHEAD_OF_TIME = report.AHEAD_OF_TIME
PAGE = Path(__file__).with_name("BENCHMARKS.md")
_SUITE = flags.DEFINE_multi_enum(
    "suite",
    list(SUITES),
    [*SUITES, AHEAD_OF_TIME],
    f"Suite to run; repeat for several. Default: all but {AHEAD_OF_TIME}.",
)
_ACCELERATOR = flags.DEFINE_multi_enum(
    "accelerator",
    list(TARGETS),
    list(TARGETS),
    f"Device that --suite={AHEAD_OF_TIME} compiles for; repeat for several. Default: "
    "all.",
)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Run few sizes and 3 rounds: about two minutes on two cores."
)
_FULL = flags.DEFINE_bool(
    "full",
    False,
    "Run 7 rounds for each of 2 compilations: about 40 minutes on two cores. With "
    "neither --quick nor --full, 5 rounds of 1 compilation.",
)
_ROUNDS = flags.DEFINE_integer(
    "rounds",
    None,
    "Minimum number of measurements per repeat. Default: 5, 3 with --quick, 7 with "
    "--full.",
    lower_bound=3,
)
_REPEATS = flags.DEFINE_integer(
    "repeats",
    None,
    "Number of times that everything is compiled and its data copied anew. Default: 1, "
    "2 with --full.",
    lower_bound=1,
)
_WRITE_TABLES = flags.DEFINE_string(
    "write_tables",
    None,
    "A benchmark.json of a --full run, or an ahead_of_time.json. Write its tables to "
    "experiments/BENCHMARKS.md and measure nothing.",
)

Row = dict[str, Any]


def run(
    cases: Iterable[Case],
    *,
    rounds: int = 5,
    repeats: int = 1,
    limits: dict[str, float] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[str]]:
    """Measures benchmark cases.

    Args:
      cases: The cases.
      rounds: Minimum number of measurements of each implementation per repeat.
      repeats: Number of times that all implementations are built anew.
      limits: Result of `timing.machine_limits()`; None measures it now.
      report: Called with a line per result, per mismatch, and per baseline that is
        skipped because a library is missing.

    Returns:
      One row per case and baseline, see `result_row`, and one line per case that is not
      measured because its implementations do not agree.
    """
    limits = timing.machine_limits() if limits is None else limits
    rows, mismatches = [], []
    for case in cases:
        name = f"{case.suite}: {case.quantity}, {case.size}"
        for baseline in case.missing:
            report(f"{name}: {baseline} cannot be imported, skipped")
        first_calls, differences, mismatch = check_case(case)
        if mismatch:
            mismatches.append(f"{name}: {mismatch}, not measured")
            report(mismatches[-1])
            continue
        costs = measure_case(case, first_calls, rounds=rounds, repeats=repeats)
        for baseline, cost in costs.items():
            if baseline != JAXBCE:
                difference = differences.get(baseline)
                row = result_row(
                    case, costs[JAXBCE], baseline, cost, difference, limits
                )
                rows.append(row)
                report(f"{name}: {row['speed']:.3g} times as fast as {baseline}")
    return rows, mismatches


def check_case(
    case: Case,
) -> tuple[list[dict[str, timing.Call]], dict[str, float], str | None]:
    """Builds a case's calls and compares their results.

    Returns:
      A list with the calls, the difference of each baseline from jaxbce, and the reason
      why the case cannot be measured, or None.
    """
    try:
        calls = case.implementations()
        return [calls], *compare_results(case, calls)
    except Exception as error:  # any implementation's; other cases are still measured
        return [], {}, f"{type(error).__name__}: {error}".splitlines()[0]


def compare_results(
    case: Case, calls: dict[str, timing.Call]
) -> tuple[dict[str, float], str | None]:
    """Difference of each baseline from jaxbce, and which differences are too large."""

    def beyond(tolerance: float) -> str | None:
        wrong = {name: d for name, d in differences.items() if not d <= tolerance}
        return f"differs from {wrong}" if wrong else None

    differences = relative_differences(case.results(calls))
    if case.exact is None or not beyond(case.tolerance):
        return differences, beyond(case.tolerance)
    if mismatch := beyond(case.loose_tolerance):
        return differences, mismatch
    differences = relative_differences(case.exact())
    return differences, beyond(case.tolerance)


def relative_differences(results: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference of a leaf from jaxbce's, in the norm, per baseline.

    It is NaN if either result has a NaN, or their structures or shapes differ.
    """

    def difference(a: Any, b: Any) -> float:
        if np.shape(a) != np.shape(b):
            return np.nan
        norm = np.linalg.norm
        return float(norm(np.subtract(a, b)) / (max(norm(a), norm(b)) or 1))

    expected = jax.tree.leaves(results[JAXBCE])
    return {
        baseline: float(np.max(list(map(difference, expected, leaves))))
        if len(leaves := jax.tree.leaves(result)) == len(expected)
        else np.nan
        for baseline, result in results.items()
        if baseline != JAXBCE
    }


def measure_case(
    case: Case,
    first_calls: list[dict[str, timing.Call]],
    *,
    rounds: int,
    repeats: int,
) -> dict[str, timing.Cost]:
    """Costs of all implementations.

    The first repeat takes its calls out of the list, so that their memory is free
    before the next repeat.
    """

    def implementations() -> dict[str, timing.Call]:
        return first_calls.pop() if first_calls else case.implementations()

    return timing.measure(implementations, rounds=rounds, repeats=repeats)


def result_row(
    case: Case,
    cost: timing.Cost,
    baseline: str,
    baseline_cost: timing.Cost,
    difference: float | None,
    limits: dict[str, float],
) -> Row:
    """One row of the results: what benchmark.json has per case and baseline.

    "seconds" are per "unit"; "flop_share" and "byte_share" are jaxbce's shares of the
    limits; "difference" is None if the baseline does other work.
    """
    speed, *quartiles = timing.speed(cost, baseline_cost)
    return {
        "suite": case.suite,
        "quantity": case.quantity,
        "size": case.size,
        "baseline": baseline,
        "speed": speed,
        "quartiles": quartiles,
        "unit": case.unit,
        "seconds": cost.seconds,
        "baseline_seconds": baseline_cost.seconds,
        "temp_bytes": cost.temp_bytes,
        "baseline_temp_bytes": baseline_cost.temp_bytes,
        "flop_share": case.flop / limits["flop_per_second"] / cost.seconds,
        "byte_share": case.bytes / limits["bytes_per_second"] / cost.seconds,
        "difference": difference,
        "scaling_axis": case.scaling_axis,
    }


def write_tables(source: Path, page: Path) -> None:
    """Writes the tables of a benchmark.json to a page, between its marks.

    An ahead_of_time.json is written likewise, to its own block.

    Raises:
      InputError: If the file is not a finished `--full` run without mismatches.
    """
    flag = f"--write_tables={source}"
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
        text = report.with_tables(page.read_text(encoding="utf-8"), document)
    except ValueError as error:
        raise cli.InputError(f"{flag}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise cli.InputError(f"{flag}: not a benchmark.json ({error!r})") from None
    with output.atomic_write(page) as path:
        path.write_text(text, encoding="utf-8")


def _configuration() -> dict[str, Any]:
    """The settings of this run, from the flags."""
    if _QUICK.value and _FULL.value:
        raise cli.InputError("--quick and --full exclude each other")
    if flags.FLAGS["accelerator"].present and AHEAD_OF_TIME not in _SUITE.value:
        raise cli.InputError(f"--accelerator needs --suite={AHEAD_OF_TIME}")
    rounds, repeats = (3, 1) if _QUICK.value else (7, 2) if _FULL.value else (5, 1)
    return {
        "suites": list(dict.fromkeys(_SUITE.value)),
        "quick": _QUICK.value,
        "full": _FULL.value,
        "rounds": _ROUNDS.value or rounds,
        "repeats": _REPEATS.value or repeats,
        "seed": cli.SEED.value,
    }


def _baseline_versions() -> dict[str, str]:
    """Versions of the installed libraries that baselines use."""
    versions = {}
    for name in (
        "optax",
        "torch",
        "opacus",
        "jax_privacy",
        "dattri",
        "laplace-torch",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _new_document(configuration: dict[str, Any]) -> dict[str, Any]:
    """An empty benchmark.json; measures and prints what the machine can do."""
    environment = output.environment() | _baseline_versions()
    print(", ".join(f"{k} {v}" for k, v in environment.items()))
    load, warning = os.getloadavg()[0], timing.load_warning()
    machine, limits = timing.describe_machine(), timing.machine_limits()
    print(
        f"{machine}, load {load:.2f}: products at "
        f"{limits['flop_per_second'] / 1e9:.4g} Gflop/s, copies at "
        f"{limits['bytes_per_second'] / 1e9:.3g} GB/s"
    )
    if warning:
        print(warning)
    return {
        "environment": environment,
        "configuration": configuration,
        "machine": machine,
        "load": load,
        "limits": limits,
        "finished_suites": [],
        "mismatches": [],
        "missing_baselines": [],
        "rows": [],
    }


def _measure_suite(
    suite: str, document: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measures a suite into the document, saves after each case, prints the table."""
    configuration = document["configuration"]
    key = jax.random.key(configuration["seed"])
    suite_rows: list[Row] = []
    for case in SUITES[suite].cases(suite, configuration["quick"], key):
        rows, mismatches = run(
            [case],
            rounds=configuration["rounds"],
            repeats=configuration["repeats"],
            limits=document["limits"],
            report=lambda line: print(f"  {line}", flush=True),
        )
        suite_rows += rows
        document["rows"] += rows
        document["mismatches"] += mismatches
        known = document["missing_baselines"]
        known += [name for name in case.missing if name not in known]
        save()  # an interrupt loses only the current case
    document["finished_suites"].append(suite)
    save()
    if cells := report.suite_table(suite, suite_rows):
        print(f"\n{output.table(cells)}\n", flush=True)


def _compile_ahead_of_time(quick: bool, folder: Path | None) -> int:
    """Compiles for all targets, prints their tables, and writes ahead_of_time.json.

    Returns:
      The exit status: 1 if a program or the process of a target fails.
    """
    targets = list(dict.fromkeys(_ACCELERATOR.value))
    rows: list[Row] = []
    errors = {target: line for target in targets if (line := missing(target))}
    document = {
        "versions": ahead_of_time.versions(),
        "configuration": {
            "suites": [AHEAD_OF_TIME],
            "targets": targets,
            "quick": quick,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        },
        "skipped": list(errors),
        "rows": rows,
    }
    print(", ".join(f"{k} {v}" for k, v in document["versions"].items()))
    print("".join(f"{line}\n" for line in errors.values()), end="", flush=True)
    status = 0
    for target in targets:
        if target in errors:
            continue
        try:
            found = ahead_of_time.run(
                target,
                quick=quick,
                report=lambda row: print(report.compiled_line(row), flush=True),
            )
        except RuntimeError as error:
            print(f"{target}: {error}", flush=True)
            status = 1
            continue
        rows += found
        status |= any(row["error"] for row in found)
        print(f"\n{output.table(report.compiled_table(found))}\n", flush=True)
        if folder is not None:
            output.write_results(folder, AHEAD_OF_TIME, document, rows)
    if folder is not None and rows:
        print(f"Written to {folder}: {AHEAD_OF_TIME}.json, .csv")
    return status


def main() -> int:
    """Runs the suites, prints their tables, and writes them to --output_dir.

    The exit status is 1 if the implementations of any case do not agree, or a program
    does not compile ahead of time.
    """
    if _WRITE_TABLES.value is not None:
        write_tables(Path(_WRITE_TABLES.value), PAGE)
        print(f"The tables of {_WRITE_TABLES.value} are in {PAGE}")
        return 0

    # Settings, before any work is done.
    configuration = _configuration()
    cli.use_devices()
    folder = cli.output_dir()
    status = 0
    if AHEAD_OF_TIME in configuration["suites"]:
        configuration["suites"].remove(AHEAD_OF_TIME)
        if not configuration["suites"]:  # nothing needs an accelerator
            jax.config.update("jax_platforms", "cpu")
        status = _compile_ahead_of_time(configuration["quick"], folder)
        if not configuration["suites"]:
            return status

    # Measurements.
    document = _new_document(configuration)

    def save() -> None:
        if folder is not None:
            output.write_results(folder, "benchmark", document, document["rows"])

    for suite in configuration["suites"]:
        _measure_suite(suite, document, save)

    # Results.
    if folder is not None:
        report.draw(folder / "benchmark.png", document["rows"])
        print(f"Written to {folder}: benchmark.json, .csv, .png")
    for line in document["mismatches"]:
        print(f"WRONG: {line}")
    return 1 if document["mismatches"] else status


if __name__ == "__main__":
    cli.launch(main)
