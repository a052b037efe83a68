"""A benchmark's results as tables, as a figure, and as the tables of a page."""

import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter, NullLocator
from tabulate import tabulate

from experiments.suites.case import JAXBCE
from experiments.suites.targets import TARGETS
from experiments.support import output

Row = dict[str, Any]

AHEAD_OF_TIME = "ahead_of_time"  # the suite that compiles and measures nothing

_MARKS = "<!-- benchmark", "<!-- end"
_BLOCK = re.compile(
    r"(<!-- benchmark: (\w+) -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL
)


def _number(value: float) -> str:
    """A number with three digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(abs(rounded)))) if rounded else 0
    return f"{rounded:.{digits}f}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{_number(seconds * factor)} {unit}"
    return f"{_number(seconds * 1e9)} ns"


def _limit(row: Row) -> str:
    """The larger share of the machine's limits, with the name of the limit."""
    flop, copies = row["flop_share"], row["byte_share"]
    return f"{flop:.0%} products" if flop >= copies else f"{copies:.0%} copies"


def _memory(temp_bytes: int | None) -> str:
    return "" if temp_bytes is None else _number(temp_bytes / 1e6)


def table(rows: list[Row]) -> list[Row]:
    """Rows of one suite, with the headings and formats of a printed table."""
    cells = []
    for row in rows:
        cell = {
            "quantity": row["quantity"],
            "size": row["size"],
            "baseline": row["baseline"] + " †" * (row["difference"] is None),
            "speed": _number(row["speed"]),
            "quartiles": "-".join(map(_number, row["quartiles"])),
            f"jaxbce, per {row['unit']}": _time(row["seconds"]),
            f"baseline, per {row['unit']}": _time(row["baseline_seconds"]),
        }
        if row["flop_share"]:
            cell["share of limit"] = _limit(row)
        if row["temp_bytes"] is not None:
            cell["jaxbce MB"] = _memory(row["temp_bytes"])
            cell["baseline MB"] = _memory(row["baseline_temp_bytes"])
        cells.append(cell)
    return cells


def _exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log seconds over log size, by least squares."""
    return np.polyfit(np.log(sizes), np.log(seconds), 1)[0]


def scaling_table(rows: list[Row]) -> list[Row]:
    """Exponents of time along each scaling curve, as a printed table."""
    curves: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["scaling_axis"] is not None:
            key = row["quantity"], row["scaling_axis"][0], row["baseline"]
            curves.setdefault(key, []).append(row)
    cells = []
    for (quantity, axis, baseline), curve in curves.items():
        sizes = [row["scaling_axis"][1] for row in curve]
        if len(sizes) < 2:
            continue
        exponents = [
            _exponent(sizes, [row[seconds] for row in curve])
            for seconds in ("seconds", "baseline_seconds")
        ]
        cells.append(
            {
                "quantity": quantity,
                "scaling axis": f"{axis}: {', '.join(f'{n:g}' for n in sizes)}",
                "baseline": baseline,
                "jaxbce exponent": f"{exponents[0]:.2f}",
                "baseline exponent": f"{exponents[1]:.2f}",
                "speed": ", ".join(_number(row["speed"]) for row in curve),
                "unit": curve[0]["unit"],
            }
        )
    return cells


def suite_table(suite: str, rows: list[Row]) -> list[Row]:
    """The printed table of a suite's rows."""
    return scaling_table(rows) if suite == "scaling" else table(rows)


def compiled_line(row: Row) -> str:
    """A row of the ahead_of_time suite as a line of progress."""
    name = (
        f"  {row['target']}: {row['program']}, {row['size']}, {row['implementation']}"
    )
    if row["error"]:
        return f"{name}: does not compile: {row['error']}"
    if row.get("unavailable"):
        return f"{name}: not available: {row['unavailable']}"
    return f"{name}: {row['kernels']} kernels per {row['unit']}"


def compiled_table(rows: list[Row]) -> list[Row]:
    """Rows of one target, with the counts of all implementations in each cell."""

    def text(key: str, row: Row) -> str:
        if row.get("unavailable") or (key in _OF_KERNELS and key not in row):
            return ""
        if row["error"]:
            return "fails"
        if key in _OF_KERNELS:
            return _number(row[key])
        if key not in row:
            return "–"
        if key.endswith("_bytes"):
            return _number(row[key] / 1e6)
        if key == "trip_count" and row["unit"] == "step":
            return str(row[key] or "unknown")
        if key == "padding" and row["unit"] == "step":
            return f"{row[key]:.2f}"
        if key == "calls" and row["program"] == "sweep":
            return str(row[key])
        return str(row[key]) if key in _COUNTS else ""

    programs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        programs.setdefault((row["program"], row["size"]), []).append(row)
    columns = _COUNTS | _OF_LOOPS
    columns |= {
        key: heading
        for key, heading in _OF_KERNELS.items()
        if any(key in row for row in rows)
    }
    return [
        {"program": program, "size": size, "per": each[0]["unit"]}
        | {
            heading: " / ".join(filter(None, (text(key, row) for row in each)))
            for key, heading in columns.items()
        }
        for (program, size), each in programs.items()
    ]


_COUNTS = {
    "kernels": "kernels",
    "products": "products",
    "transposes": "transposes",
    "copies": "copies",
    "hbm_bytes": "HBM MB",
    "temp_bytes": "temporary MB",
}
_OF_KERNELS = {
    "bundles": "bundles",
    "instructions": "instructions",
    "registers": "registers",
    "spilled_bytes": "spilled bytes",
}
_OF_LOOPS = {"trip_count": "iterations", "padding": "padding", "calls": "groups"}


def _compiled_text(document: dict[str, Any]) -> str:
    """The tables of an ahead_of_time.json, each with the name of its target."""
    rows, configuration = document["rows"], document["configuration"]
    if configuration["quick"]:
        raise ValueError("a run of --quick")
    environment = document["environment"] | document["versions"]
    names = ("jax", *document["versions"])
    parts = [", ".join(f"{name} {environment[name]}" for name in names) + "."]
    for target in configuration["targets"]:
        cells = compiled_table([row for row in rows if row["target"] == target])
        if not cells:
            raise ValueError(f"there are no rows of target {target!r}")
        parts.append(f"{TARGETS[target].device}:\n\n{_pipe_table(cells)}")
    return "\n\n".join(parts)


def _machine_text(document: dict[str, Any]) -> str:
    """The machine, versions, limits and settings of a run, as a paragraph."""
    environment, limits = document["environment"], document["limits"]
    names = ("jax", "numpy", "scikit-learn", "torch", "opacus", "jax_privacy")
    names += ("dattri", "laplace-torch")
    versions = ", ".join(
        f"{name} {environment[name]}" for name in names if name in environment
    )
    configuration = document["configuration"]
    return (
        f"{document['machine']}, load {document['load']:.1f} before the run; "
        f"{versions}. Large matrix products run at "
        f"{_number(limits['flop_per_second'] / 1e9)} Gflop/s and a pass over memory at "
        f"{_number(limits['bytes_per_second'] / 1e9)} GB/s. "
        f"At least {configuration['rounds']} rounds for each of "
        f"{configuration['repeats']} compilations."
        + "".join(
            f" {name} was not installed." for name in document["missing_baselines"]
        )
    )


def markdown(block: str, document: dict[str, Any]) -> str:
    """The text of a block: a suite's table, or a paragraph for "machine"."""
    if block == "machine":
        return _machine_text(document)
    rows = [row for row in document["rows"] if row["suite"] == block]
    if not rows:
        raise ValueError(f"there are no rows of suite {block!r}")
    cells = suite_table(block, rows)
    return _pipe_table(cells)


def _pipe_table(cells: list[Row]) -> str:
    left = ("quantity", "size", "baseline", "scaling axis", "unit", "program", "per")
    align = ["left" if name in left else "right" for name in cells[0]]
    return tabulate(
        cells,
        headers="keys",
        tablefmt="pipe",
        colalign=align,
        disable_numparse=True,
    )


def with_tables(text: str, document: dict[str, Any]) -> str:
    """Replaces the tables of a page between its `<!-- benchmark: NAME -->` marks.

    A run of some suites replaces their tables alone, with its machine below each.

    Args:
      text: The page.
      document: The contents of a benchmark.json, or of an ahead_of_time.json, which
        has the block of its name alone.

    Raises:
      ValueError: If the marks are not all in pairs, or the benchmark is not a finished
        run of `--full` without a mismatch.
    """
    blocks = _BLOCK.findall(text)
    if not blocks or {len(blocks)} != {text.count(mark) for mark in _MARKS}:
        raise ValueError(
            "the page's marks are not pairs <!-- benchmark: NAME --> and <!-- end -->"
        )
    if document["configuration"].get("suites") == [AHEAD_OF_TIME]:
        compiled = _compiled_text(document)
        return _BLOCK.sub(
            lambda found: (
                f"{found[1]}\n{compiled}\n\n{found[3]}"
                if found[2] == AHEAD_OF_TIME
                else found[0]
            ),
            text,
        )
    if not document["configuration"]["full"]:
        raise ValueError("not a run of --full")
    if document["mismatches"]:
        raise ValueError(f"{len(document['mismatches'])} of its cases do not agree")
    names = {name for _, name, _ in blocks} - {"machine", AHEAD_OF_TIME}
    suites = names.intersection(document["configuration"]["suites"])
    for name in sorted(suites - {*document["finished_suites"]}):
        raise ValueError(f"suite {name!r} is not finished")

    def replace(found: re.Match[str]) -> str:
        name = found[2]
        if name == AHEAD_OF_TIME:
            return found[0]
        if suites == names:
            return f"{found[1]}\n{markdown(name, document)}\n\n{found[3]}"
        if name not in suites:
            return found[0]
        machine = _machine_text(document)
        return f"{found[1]}\n{markdown(name, document)}\n\n*{machine}*\n\n{found[3]}"

    return _BLOCK.sub(replace, text)


def draw(path: Path, rows: list[Row]) -> None:
    """Draws the speed beside each baseline, and time along each scaling curve."""
    groups: dict[tuple[str, str], list[Row]] = {}
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["scaling_axis"] is None:
            quantity = "sweep" if row["suite"] == "sweep" else row["quantity"]
            groups.setdefault((quantity, row["baseline"]), []).append(row)
        else:
            key = row["quantity"], row["scaling_axis"][0]
            curves.setdefault(key, []).append(row)
    lines, bars = max(1, -(-len(curves) // 2)), int(bool(groups))
    height = max(3.0, 0.3 * len(groups) + 1, 2.5 * lines)
    figure = plt.figure(figsize=(13, height), layout="constrained")
    widths = [2] * bars + [1, 1] * bool(curves)
    grid = figure.add_gridspec(lines, len(widths), width_ratios=widths)
    if groups:
        _draw_bars(figure.add_subplot(grid[:, 0]), groups)
    for i, (name, curve) in enumerate(curves.items()):
        _draw_curve(figure.add_subplot(grid[i // 2, bars + i % 2]), *name, curve)
    with output.atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)


def _draw_bars(axis: Any, groups: dict[tuple[str, str], list[Row]]) -> None:
    suites = list(dict.fromkeys(rows[0]["suite"] for rows in groups.values()))
    medians = []
    for i, rows in enumerate(groups.values()):
        speeds = [row["speed"] for row in rows]
        color = f"C{suites.index(rows[0]['suite'])}"
        median = float(np.median(speeds))
        axis.barh(i, median - 1, left=1, color=color, height=0.7)
        axis.plot([min(speeds), max(speeds)], [i, i], color="0.25", lw=1.2)
        medians.append(median)
    axis.set_xscale("log")
    axis.axvline(1, color="k", lw=0.8)
    axis.set_yticks(
        range(len(groups)),
        [
            f"{quantity}  vs  {baseline}   {_number(median)}"
            for (quantity, baseline), median in zip(groups, medians, strict=True)
        ],
        fontsize=8,
    )
    axis.invert_yaxis()
    axis.set(
        xlabel="times as fast: median over sizes (bar, number) and range (line)",
        title="Speed of jaxbce relative to each baseline",
    )


def _draw_curve(axis: Any, quantity: str, scaling_axis: str, curve: list[Row]) -> None:
    times = {row["scaling_axis"][1]: row["seconds"] for row in curve}
    axis.loglog(list(times), list(times.values()), "o-", ms=3, lw=2, label=JAXBCE)
    for baseline in dict.fromkeys(row["baseline"] for row in curve):
        baseline_times = {
            row["scaling_axis"][1]: row["baseline_seconds"]
            for row in curve
            if row["baseline"] == baseline
        }
        axis.loglog(
            list(baseline_times),
            list(baseline_times.values()),
            "o--",
            ms=3,
            label=baseline,
        )
    axis.set_title(f"{quantity} by {scaling_axis}", fontsize=9)
    axis.set_xlabel(scaling_axis, fontsize=8)
    axis.set_ylabel(f"seconds per {curve[0]['unit']}", fontsize=8)
    axis.set_xticks(list(times), [f"{size:g}" for size in times])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7)
