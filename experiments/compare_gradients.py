r"""Is every hand-derived gradient what jax.grad says it is, and what does each cost?

    python -m experiments.compare_gradients
    python -m experiments.compare_gradients --explain
    python -m experiments.compare_gradients --data mine.csv --target label

Five parts, on digits (odd against even) unless told otherwise: (1) each factor of the
textbook chain rule and each leaf of the gradient against JAX's own derivative of the
same thing; (2) three oracles, and scikit-learn's backward pass; (3) the
error in the tail, as a logit grows; (4) many random networks at once; (5) time and
memory. Expect every line of 1, 2 and 4 to agree to 1e-12 in float64, the hand-derived
gradient to keep its digits in the tail, and an exit status of 0. `--explain` walks one
tiny network through the derivation, number by number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import jaxbce
from experiments.gradient_checks import comparisons, figure, walkthrough
from experiments.support import cli, config, datasets, output, timing
from jaxbce.checking import TOLERANCES

flags.adopt_module_key_flags(datasets)
for _name in (*cli.COMMON, "hidden", "dtype"):
    flags.declare_key_flag(_name)
_BATCH = flags.DEFINE_integer(
    "batch", None, "Rows of the data to use; all of them if not set.", lower_bound=1
)
_TRIALS = flags.DEFINE_integer(
    "trials", 256, "Random networks in part 4.", lower_bound=1
)
_TOLERANCE = flags.DEFINE_float(
    "tolerance",
    None,
    "Largest relative error of a factor or leaf, in the norm. If not set, 1e-12 in "
    "float64, 1e-5 in float32, 2^-4 in bfloat16.",
)
_BLOCK_SIZE = flags.DEFINE_integer(
    "block_size", 256, "Rows in a block in part 5.", lower_bound=1
)
_EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Walk one tiny network through the derivation instead."
)

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
    """Runs the five parts.

    Args:
      x: Features `[N, n_0]`, standardised.
      y: Labels `[N, n_L]`.
      hidden: Widths of the hidden layers.
      dtype: What parts 1, 2 and 4 compute in.
      trials: Random networks in part 4.
      seed: Seed of the parameters.
      tolerance: Largest relative error that passes; None is the dtype's own.
      block_size: Rows in a block in part 5.
      rounds: Measurements of each function in part 5.
      report: Called with the title and the rows of each part as it is done.

    Returns:
      The rows of each part, by name; those with a verdict have it under "verdict".
    """
    sizes = (x.shape[1], *hidden, y.shape[1])
    if tolerance is None:
        tolerance = TOLERANCES[dtype]
    key = jax.random.key(seed)
    parts: dict[str, list[Row]] = {}

    def done(name: str, title: str, rows: list[Row]) -> None:
        parts[name] = rows
        report(title, rows)

    with jax.enable_x64(dtype == "float64"):
        arguments = (
            jaxbce.init(key, sizes, dtype=dtype),
            jnp.asarray(x, dtype),
            jnp.asarray(y, dtype),
        )
        rows = comparisons.leaves_and_factors(*arguments, tolerance)
        title = f"1. By hand, {dtype}, against JAX's own derivative (verdict: norm rel)"
        done("factors", title, rows)
        rows = comparisons.oracles(*arguments, tolerance=tolerance, seed=seed)
        done("oracles", "2. The gradient against oracles, the worst point", rows)
    done(
        "tail",
        "3. The tail: relative error of δ = ∂BCE/∂a, float32 (verdict: by hand)",
        comparisons.tail(comparisons.TAIL_LOGITS),
    )
    with jax.enable_x64(dtype == "float64"):
        rows = comparisons.many_networks(key, sizes, *arguments[1:], trials, tolerance)
        done("networks", f"4. {trials} random networks under vmap, the worst", rows)
    costs = comparisons.cost(key, sizes, x, y, block_size=block_size, rounds=rounds)
    done("cost", f"5. Cost of one gradient, float32, {len(x)} rows", costs)
    return parts


def main() -> int:
    """Runs on the data and sizes of the flags; the status is 0 if all holds."""
    # On a GPU float32 products are otherwise rounded to TF32's 10 bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    if _EXPLAIN.value:
        text, holds = walkthrough.walk()
        print(text)
        return 0 if holds else 1
    if _TOLERANCE.value is not None and not 0 < _TOLERANCE.value < float("inf"):
        raise cli.InputError(f"--tolerance={_TOLERANCE.value}: not a number > 0")
    hidden = config.hidden_sizes()
    table = datasets.from_flags(cli.SEED.value)
    x, y = datasets.preprocess_all(table)
    batch = _BATCH.value or len(x)
    if batch > len(x):
        raise cli.InputError(f"--batch={batch}: {table.name} has {len(x)} rows")
    dtype = cli.DTYPE.value or "float64"
    folder = cli.output_dir()
    configuration = {
        "data": table.name,
        "hidden": hidden,
        "batch": batch,
        "dtype": dtype,
        "trials": _TRIALS.value,
        "seed": cli.SEED.value,
        "tolerance": _TOLERANCE.value,
        "block_size": _BLOCK_SIZE.value,
    }
    sizes = "→".join(map(str, (x.shape[1], *hidden, y.shape[1])))
    print(f"{table.name}: {batch} rows, network {sizes}")
    print(", ".join(f"{k} {v}" for k, v in output.environment().items()))

    def report(title: str, rows: list[Row]) -> None:
        print(f"\n{title}\n\n{output.table(rows)}", flush=True)

    if warning := timing.load_warning():
        print(warning)
    parts = run(
        x=x[:batch],
        y=y[:batch],
        hidden=hidden,
        dtype=dtype,
        trials=_TRIALS.value,
        seed=cli.SEED.value,
        tolerance=_TOLERANCE.value,
        block_size=_BLOCK_SIZE.value,
        report=report,
    )
    rows = [{"part": part, **row} for part, rows in parts.items() for row in rows]
    verdicts = [row["verdict"] for row in rows if "verdict" in row]
    holds = all(verdicts)
    print(
        f"\n{sum(verdicts)} of {len(verdicts)} comparisons hold."
        + ("" if holds else " FAILED")
    )
    if folder is not None:
        results = {"configuration": configuration, "holds": holds, "parts": parts}
        output.write_results(folder, "compare_gradients", results, rows)
        figure.draw(folder / "compare_gradients.png", parts["cost"])
        print(f"Written to {folder}: compare_gradients.json, .csv, .png")
    return 0 if holds else 1


if __name__ == "__main__":
    cli.launch(main)
