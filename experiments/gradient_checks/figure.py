"""The figure of `compare_gradients`: errors in the tail, and cost of a gradient."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.gradient_checks import comparisons
from experiments.support import output

Row = dict[str, Any]


def draw(path: Path, costs: list[Row]) -> None:
    """Draws the relative error over the logit, and the cost of each gradient."""
    logits = np.linspace(0.5, 80, 160)
    errors = comparisons.tail(tuple(logits))
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4), width_ratios=[2, 1, 1], layout="constrained"
    )
    for name in list(errors[0])[1:-1]:
        values = np.maximum([row[name] for row in errors], 1e-9)
        left.semilogy(
            logits,
            values,
            label=comparisons.HEADINGS.get(name, name),
            lw=3 if name == "by_hand" else 1.5,
        )
    left.set(
        title="Error of ∂BCE/∂a in float32",
        xlabel="logit |a|, with the sign of its label",
        ylabel="relative error",
    )
    left.legend()
    names = [
        row["gradient"].replace(", ", ",\n").replace(" of ", "\nof ") for row in costs
    ]
    for axis, column in ((middle, "microseconds"), (right, "temporary_kb")):
        axis.barh(names, [float(row[column]) for row in costs], color="C0")
        axis.invert_yaxis()
        axis.set(title="One gradient", xlabel=comparisons.HEADINGS[column])
    right.set_yticklabels([])
    with output.atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)
