"""How does jaxbce compare with what a user would otherwise use, in the same run?

    python -m experiments.benchmark --quick
    python -m experiments.benchmark --suite gradient --suite curvature
    python -m experiments.benchmark --full --output_dir results/benchmark
    python -m experiments.benchmark --readme results/benchmark/benchmark.json

Every row is two sides of one quantity at one size, in one process: they must agree
first (a peer marked † does other work, and is not compared), and are then timed in
turn, A B A B, each call to its result. Speed is the median over rounds of the peer's
time over ours, above 1 is faster. A library that cannot be imported is skipped with a
line that says so; `pip install '.[benchmark]'` has them all.

Suite gradient: `value_and_grad` beside `jax.value_and_grad` of optax's loss and
PyTorch's autograd, also of many networks and over all devices. fit: a step of `fit`
beside the same loop written plainly. sweep: `sweep` on all devices beside
`jit(vmap(train))` on one and on all, `torch.func.vmap` and scikit-learn. per_example:
norms, clipped sums and inner products beside `vmap(jax.grad)`, jax_privacy, PyTorch and
Opacus. curvature: tangent kernels, Hessian and Gauss-Newton products beside JAX's own.
compile: from a cold process to the first gradient, and what tracing and compiling take.
scaling: how cost grows with rows, widths, networks and batches.

Expect about 1 for a plain gradient in cache and more beyond it, 1 to 2.5 for sweeps,
and 20 to 200 for per-example work where the network is not tiny. The limit is what
this machine's own large matrix products and copies run at, measured first.
"""

import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.suites import batches, compilation, report, scaling, training
from experiments.suites.case import OURS, Case
from experiments.support import cli, output, timing

for _name in (*cli.COMMON, "cpu_devices"):
    flags.declare_key_flag(_name)
SUITES = {
    "gradient": batches,
    "fit": training,
    "sweep": training,
    "per_example": batches,
    "curvature": batches,
    "compile": compilation,
    "scaling": scaling,
}
_SUITE = flags.DEFINE_multi_enum(
    "suite", list(SUITES), list(SUITES), "What to measure; all if not set."
)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Few sizes and three rounds: about two minutes on two cores."
)
_FULL = flags.DEFINE_bool(
    "full",
    False,
    "Seven rounds for each of two compilations, which is half an hour on two cores; "
    "with neither flag five rounds of one.",
)
_ROUNDS = flags.DEFINE_integer(
    "rounds",
    None,
    "How often each side is timed in each repeat, at least; 5 if no other flag says.",
    lower_bound=3,
)
_REPEATS = flags.DEFINE_integer(
    "repeats",
    None,
    "How often both sides are compiled and their data copied anew; 1 if no other flag "
    "says.",
    lower_bound=1,
)
_README = flags.DEFINE_string(
    "readme",
    None,
    "A benchmark.json, whose tables are written into README.md; nothing is measured.",
)

Row = dict[str, Any]


def run(
    cases: Any,
    *,
    rounds: int = 5,
    repeats: int = 1,
    limits: dict[str, float] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[str]]:
    """Measures cases.

    Args:
      cases: What to measure, as `Case`s.
      rounds: How often each side is timed in each repeat, at least.
      repeats: How often all sides are made anew.
      limits: What `timing.limits()` found; None is to measure it now.
      report: Called with a line on each case as it is done, and on each that is not
        measured because a library is missing.

    Returns:
      A row for each case and peer: "suite", "quantity", "size", "against", "speed" and
      its "quartiles", seconds a "unit" of ours and of the peer, temporary bytes,
      "flop_share" and "byte_share" of the limits, "differ_by", and "along". Then a
      line for each case that is not measured because its sides do not agree.
    """
    limits = timing.limits() if limits is None else limits
    rows, refused = [], []
    for case in cases:
        name = f"{case.suite}: {case.quantity}, {case.size}"
        for side in case.missing:
            report(f"{name}: {side} cannot be imported, skipped")
        made, differ_by = [], {}
        try:
            made.append(case.sides())
            differ_by, wrong = _compared(case, made[0])
        except Exception as error:  # of whichever side: no row, but all the others
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            refused.append(f"{name}: {wrong}, not measured")
            report(refused[-1])
            continue

        def sides(case: Case = case, made: list[Any] = made) -> dict[str, timing.Call]:
            return made.pop() if made else case.sides()

        costs = timing.measure(sides, rounds=rounds, repeats=repeats)
        ours = costs.pop(OURS)
        for peer, theirs in costs.items():
            speed, *quartiles = timing.speed(ours, theirs)
            rows.append(
                {
                    "suite": case.suite,
                    "quantity": case.quantity,
                    "size": case.size,
                    "against": peer,
                    "speed": speed,
                    "quartiles": quartiles,
                    "unit": case.unit,
                    "seconds": ours.seconds,
                    "its_seconds": theirs.seconds,
                    "temp_bytes": ours.temp_bytes,
                    "its_temp_bytes": theirs.temp_bytes,
                    "flop_share": case.flop / limits["flop/s"] / ours.seconds,
                    "byte_share": case.bytes / limits["byte/s"] / ours.seconds,
                    "differ_by": differ_by.get(peer),
                    "along": case.along,
                }
            )
            report(f"{name}: {speed:.3g} times as fast as {peer}")
    return rows, refused


def _compared(case: Case, calls: dict[str, timing.Call]) -> tuple[Any, str | None]:
    """By how much each peer differs from ours, and what of that is too much."""

    def beyond(tolerance: float) -> str | None:
        wrong = {peer: d for peer, d in differ_by.items() if not d <= tolerance}
        return f"differs from {wrong}" if wrong else None

    differ_by = _differences(case.results(calls))
    if case.exact is None or not beyond(case.tolerance):
        return differ_by, beyond(case.tolerance)
    if wrong := beyond(case.rough):
        return differ_by, wrong
    differ_by = _differences(case.exact())
    return differ_by, beyond(case.tolerance)


def _differences(results: dict[str, Any]) -> dict[str, float]:
    """By peer, the largest relative difference of a leaf from ours, in the norm.

    NaN where there is one on either side, or in a leaf of another shape.
    """

    def difference(a: Any, b: Any) -> float:
        if np.shape(a) != np.shape(b):
            return np.nan
        norm = np.linalg.norm
        return float(norm(np.subtract(a, b)) / (max(norm(a), norm(b)) or 1))

    ours = jax.tree.leaves(results[OURS])
    return {
        peer: float(np.max(list(map(difference, ours, leaves))))
        if len(leaves := jax.tree.leaves(result)) == len(ours)
        else np.nan
        for peer, result in results.items()
        if peer != OURS
    }


def _versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in ("optax", "torch", "opacus", "jax_privacy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write_readme(source: Path) -> int:
    readme = Path(__file__).parent.parent / "README.md"
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
        text = report.with_tables(readme.read_text(encoding="utf-8"), document)
    except ValueError as error:
        raise cli.InputError(f"--readme={source}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise cli.InputError(
            f"--readme={source}: not a benchmark.json ({error!r})"
        ) from None
    with output.atomic_write(readme) as path:
        path.write_text(text, encoding="utf-8")
    print(f"The tables of {source} are in {readme}")
    return 0


def main() -> int:
    """Prints each suite's table, and writes all where --output_dir says.

    The status is 1 if any two sides do not agree.
    """
    if _README.value is not None:
        return _write_readme(Path(_README.value))
    if _QUICK.value and _FULL.value:
        raise cli.InputError("--quick and --full: one of them, or neither")
    cli.use_devices()
    jax.config.update("jax_default_matmul_precision", "highest")
    folder = cli.output_dir()
    rounds, repeats = (3, 1) if _QUICK.value else (7, 2) if _FULL.value else (5, 1)
    configuration = {
        "suites": list(dict.fromkeys(_SUITE.value)),
        "quick": _QUICK.value,
        "full": _FULL.value,
        "rounds": _ROUNDS.value or rounds,
        "repeats": _REPEATS.value or repeats,
        "seed": cli.SEED.value,
    }
    environment = output.environment() | _versions()
    print(", ".join(f"{k} {v}" for k, v in environment.items()))
    load, warning = os.getloadavg()[0], timing.load_warning()
    limits = timing.limits()
    print(
        f"{timing.machine()}, load {load:.2f}: products at "
        f"{limits['flop/s'] / 1e9:.4g} Gflop/s, copies at "
        f"{limits['byte/s'] / 1e9:.3g} GB/s"
    )
    if warning:
        print(warning)
    document: dict[str, Any] = {
        "environment": environment,
        "configuration": configuration,
        "machine": timing.machine(),
        "load": load,
        "limits": limits,
        "finished": [],
        "refused": [],
        "skipped": [],
        "rows": [],
    }

    def say(line: str) -> None:
        print(f"  {line}", flush=True)

    def save() -> None:
        if folder is not None:
            output.write_results(folder, "benchmark", document, document["rows"])

    for suite in configuration["suites"]:
        cases = SUITES[suite].cases(suite, _QUICK.value, jax.random.key(cli.SEED.value))
        begin = len(document["rows"])
        options = {name: configuration[name] for name in ("rounds", "repeats")}
        for case in cases:
            rows, refused = run([case], **options, limits=limits, report=say)
            document["rows"] += rows
            document["refused"] += refused
            document["skipped"] += set(case.missing) - set(document["skipped"])
            save()  # an end costs the case under way
        document["finished"].append(suite)
        save()
        rows = document["rows"][begin:]
        cells = report.slopes(rows) if suite == "scaling" else report.table(rows)
        if cells:
            print(f"\n{output.table(cells)}\n", flush=True)
    if folder is not None:
        report.picture(folder / "benchmark.png", document["rows"])
        print(f"Written to {folder}: benchmark.json, .csv, .png")
    for line in document["refused"]:
        print(f"WRONG: {line}")
    return 1 if document["refused"] else 0


if __name__ == "__main__":
    cli.launch(main)
