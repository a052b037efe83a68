r"""Is every hand-derived gradient what jax.grad says it is, and what does each cost?

    python -m experiments.compare_gradients
    python -m experiments.compare_gradients --explain
    python -m experiments.compare_gradients --data mine.csv --target label
    python -m experiments.compare_gradients --check mine:value_and_grad

Six parts, by default on digits, odd vs even:

1. each factor of the textbook chain rule and each leaf of the gradient, compared with
   JAX's own derivative;
2. the gradient, compared with autodiff, the complex step, central differences and
   scikit-learn's backward pass;
3. the relative error in the tail, as the logit grows;
4. many random networks under vmap;
5. the gradient that `fit` and `sweep` follow, read off a step of SGD;
6. time and memory.

Expect parts 1, 2, 4 and 5 to agree to 1e-12 in float64, central differences to 1e-6,
the hand-derived gradient to be accurate in the tail, and an exit status of 0.
`--explain` prints the derivation for one tiny network, with its numbers. `--check`
checks a function of yours instead, and names the mistake if it makes a common one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import jaxbce
from experiments.gradient_checks import comparisons, figure, user_function, walkthrough
from experiments.support import cli, config, datasets, output, timing
from jaxbce.checking import TOLERANCES

flags.adopt_module_key_flags(datasets)
for _name in (*cli.COMMON, "hidden", "dtype"):
    flags.declare_key_flag(_name)
_BATCH = flags.DEFINE_integer(
    "batch", None, "Number of examples to use. If not set, all.", lower_bound=1
)
_TRIALS = flags.DEFINE_integer(
    "trials", 256, "Number of random networks in part 4.", lower_bound=1
)
_TOLERANCE = flags.DEFINE_float(
    "tolerance",
    None,
    "Largest relative error of a factor or leaf, in the norm. If not set, 1e-12 in "
    "float64, 1e-5 in float32, 2^-4 in bfloat16.",
)
_BLOCK_SIZE = flags.DEFINE_integer(
    "block_size", 256, "Examples per block in part 6.", lower_bound=1
)
_EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Print the derivation for one tiny network, and nothing else."
)
_CHECK = flags.DEFINE_string(
    "check",
    None,
    "module:function, in NumPy or JAX, with the signature of jaxbce.value_and_grad. "
    "Check it on the data and the network, and do nothing else.",
)

DEFAULTS: dict[str, Any] = {"dtype": "float64"}

Row = dict[str, Any]


def run(
    *,
    x: np.ndarray,
    y: np.ndarray,
    hidden: tuple[int, ...] = (32,),
    dtype: str = "float64",
    trials: int = 256,
    seed: int = 0,
    tolerance: float | None = None,
    block_size: int = 256,
    rounds: int = 31,
    report: Callable[[str, list[Row]], None] = lambda title, rows: None,
) -> dict[str, list[Row]]:
    """Runs the six parts.

    Args:
      x: Features `[N, n_0]`, standardised.
      y: Labels `[N, n_L]`.
      hidden: Widths of the hidden layers.
      dtype: Dtype of parts 1, 2 and 4.
      trials: Number of random networks in part 4.
      seed: Seed of the parameters.
      tolerance: Largest relative error that passes; None is the default of the dtype.
      block_size: Examples per block in part 6.
      rounds: Measurements of each function in part 6.
      report: Called with the title and the rows of each part when it is finished.

    Returns:
      The rows of parts "factors", "references", "tail", "networks", "training" and
      "cost"; rows of a comparison have its verdict under "passed".
    """
    sizes = (x.shape[1], *hidden, y.shape[1])
    if tolerance is None:
        tolerance = TOLERANCES[dtype]
    key = jax.random.key(seed)
    parts: dict[str, list[Row]] = {}

    def finish(name: str, title: str, rows: list[Row]) -> None:
        parts[name] = rows
        report(title, rows)

    with jax.enable_x64(dtype == "float64"):
        arguments = (
            jaxbce.init(key, sizes, dtype=dtype),
            jnp.asarray(x, dtype),
            jnp.asarray(y, dtype),
        )
        finish(
            "factors",
            f"1. By hand, {dtype}, compared with JAX's derivative (verdict: norm rel)",
            comparisons.leaves_and_factors(*arguments, tolerance),
        )
        finish(
            "references",
            "2. The gradient compared with references, the worst point of each",
            comparisons.references(*arguments, tolerance=tolerance, seed=seed),
        )
    finish(
        "tail",
        "3. The tail: relative error of δ = ∂BCE/∂a, float32 (verdict: by hand)",
        comparisons.tail(comparisons.TAIL_LOGITS),
    )
    with jax.enable_x64(dtype == "float64"):
        finish(
            "networks",
            f"4. {trials} random networks under vmap, the worst of each leaf",
            comparisons.many_networks(key, sizes, *arguments[1:], trials, tolerance),
        )
    finish(
        "training",
        "5. The gradient that training follows, float64, compared with jax.grad",
        comparisons.training(key, *arguments, TOLERANCES["float64"]),
    )
    finish(
        "cost",
        f"6. Cost of one gradient, float32, {len(x)} examples",
        comparisons.cost(key, sizes, x, y, block_size=block_size, rounds=rounds),
    )
    return parts


def verdicts(parts: dict[str, list[Row]]) -> list[bool]:
    """Verdicts of all comparisons."""
    return [row["passed"] for rows in parts.values() for row in rows if "passed" in row]


def write(
    folder: Path, configuration: dict[str, Any], parts: dict[str, list[Row]]
) -> None:
    """Writes the results as JSON and CSV, and the figure."""
    rows = [{"part": part, **row} for part, rows in parts.items() for row in rows]
    results = {
        "configuration": configuration,
        "passed": all(verdicts(parts)),
        "parts": parts,
    }
    output.write_results(folder, "compare_gradients", results, rows)
    figure.draw(folder / "compare_gradients.png", parts["cost"])


def _explain() -> int:
    text, agree = walkthrough.walk()
    print(text)
    return 0 if agree else 1


def _check(
    fun: Callable[..., Any], x: np.ndarray, y: np.ndarray, hidden: tuple[int, ...]
) -> int:
    """Checks a function of the user's and prints the report."""
    key = jax.random.key(cli.SEED.value)
    try:
        report = jaxbce.check_gradients(
            fun,
            jaxbce.init(key, (x.shape[1], *hidden, y.shape[1])),
            x,
            y,
            dtype=cli.DTYPE.value or DEFAULTS["dtype"],
            tolerance=_TOLERANCE.value,
            seed=cli.SEED.value,
        )
    except TypeError as error:  # the function returns something else
        raise cli.InputError(f"--check={_CHECK.value}: {error}") from error
    print(f"\n{report}")
    return 0 if report.passed else 1


def _load() -> tuple[str, np.ndarray, np.ndarray]:
    """Name, features and labels of the first --batch examples of the data."""
    table = datasets.from_flags(cli.SEED.value)
    x, y = datasets.preprocess_all(table)
    batch = _BATCH.value or len(x)
    if batch > len(x):
        raise cli.InputError(f"--batch={batch}: {table.name} has {len(x)} examples")
    return table.name, x[:batch], y[:batch]


def main() -> int:
    """Compares on the data and sizes of the flags; the status is 0 if all agree."""
    if _EXPLAIN.value:
        return _explain()

    # Settings and data.
    if _TOLERANCE.value is not None and not 0 < _TOLERANCE.value < float("inf"):
        raise cli.InputError(
            f"--tolerance={_TOLERANCE.value}: expected a finite number > 0"
        )
    hidden = config.hidden_sizes()
    fun = None if _CHECK.value is None else user_function.load(_CHECK.value)
    name, x, y = _load()
    folder = cli.output_dir() if fun is None else None
    sizes = "→".join(map(str, (x.shape[1], *hidden, y.shape[1])))
    print(f"{name}: {len(x)} examples, network {sizes}")
    if fun is not None:
        return _check(fun, x, y, hidden)
    settings: dict[str, Any] = {
        "hidden": hidden,
        "dtype": cli.DTYPE.value or DEFAULTS["dtype"],
        "trials": _TRIALS.value,
        "seed": cli.SEED.value,
        "tolerance": _TOLERANCE.value,
        "block_size": _BLOCK_SIZE.value,
    }
    output.print_environment()
    if warning := timing.load_warning():
        print(warning)

    # Comparisons, printed one by one.
    def report(title: str, rows: list[Row]) -> None:
        table = output.table(rows, headings=comparisons.HEADINGS)
        print(f"\n{title}\n\n{table}", flush=True)

    parts = run(x=x, y=y, report=report, **settings)

    # Summary and files.
    passed = verdicts(parts)
    print(
        f"\n{sum(passed)} of {len(passed)} comparisons passed."
        + ("" if all(passed) else " FAILED")
    )
    if folder is not None:
        write(folder, {"data": name, "batch": len(x), **settings}, parts)
        print(f"Written to {folder}: compare_gradients.json, .csv, .png")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    cli.launch(main, DEFAULTS)
