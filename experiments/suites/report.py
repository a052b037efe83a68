"""A benchmark's rows as tables, as a picture, and as the README's tables."""

import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter, NullLocator
from tabulate import tabulate

from experiments.suites.case import OURS
from experiments.support import output

Row = dict[str, Any]

_MARKS = "<!-- benchmark", "<!-- end"
_BLOCK = re.compile(
    r"(<!-- benchmark: (\w+) -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL
)


def _number(value: float) -> str:
    """Three digits, in full."""
    rounded = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(abs(rounded)))) if rounded else 0
    return f"{rounded:.{digits}f}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{_number(seconds * factor)} {unit}"
    return f"{_number(seconds * 1e9)} ns"


def _limit(row: Row) -> str:
    """The larger share of what the machine can do, and of what."""
    flop, moved = row["flop_share"], row["byte_share"]
    return f"{flop:.0%} products" if flop >= moved else f"{moved:.0%} copies"


def _memory(temp_bytes: int | None) -> str:
    return "" if temp_bytes is None else _number(temp_bytes / 1e6)


def table(rows: list[Row]) -> list[Row]:
    """The rows of one suite, as people read them."""
    cells = []
    for row in rows:
        cell = {
            "quantity": row["quantity"],
            "size": row["size"],
            "against": row["against"] + " †" * (row["differ_by"] is None),
            "speed": _number(row["speed"]),
            "quartiles": "-".join(map(_number, row["quartiles"])),
            f"ours, a {row['unit']}": _time(row["seconds"]),
            "theirs": _time(row["its_seconds"]),
        }
        if row["flop_share"]:
            cell["of the limit"] = _limit(row)
        if row["temp_bytes"] is not None:
            cell["our MB"] = _memory(row["temp_bytes"])
            cell["their MB"] = _memory(row["its_temp_bytes"])
        cells.append(cell)
    return cells


def slopes(rows: list[Row]) -> list[Row]:
    """How cost grows along each curve: the exponent, by least squares on log axes."""
    curves: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["along"] is not None:
            key = row["quantity"], row["along"][0], row["against"]
            curves.setdefault(key, []).append(row)
    cells = []
    for (quantity, axis, against), points in curves.items():
        at = [row["along"][1] for row in points]
        if len(at) < 2:
            continue
        exponents = [
            np.polyfit(np.log(at), np.log([row[side] for row in points]), 1)[0]
            for side in ("seconds", "its_seconds")
        ]
        speeds = [row["speed"] for row in points]
        cells.append(
            {
                "quantity": quantity,
                "as grow": f"{axis}: {', '.join(f'{n:g}' for n in at)}",
                "against": against,
                "exponent": f"{exponents[0]:.2f}",
                "theirs": f"{exponents[1]:.2f}",
                "speed": ", ".join(map(_number, speeds)),
                "a unit": points[0]["unit"],
            }
        )
    return cells


def markdown(suite: str, document: dict[str, Any]) -> str:
    """One suite's table, or under "machine" the words on what it was measured with."""
    if suite == "machine":
        environment, limits = document["environment"], document["limits"]
        names = ("jax", "numpy", "scikit-learn", "torch", "opacus", "jax_privacy")
        versions = ", ".join(
            f"{name} {environment[name]}" for name in names if name in environment
        )
        configuration = document["configuration"]
        return (
            f"{document['machine']}, load {document['load']:.1f} before; {versions}. "
            "Large matrix products run at "
            f"{_number(limits['flop/s'] / 1e9)} Gflop/s and a pass over memory at "
            f"{_number(limits['byte/s'] / 1e9)} GB/s there. "
            f"{configuration['rounds']} rounds at least for each of "
            f"{configuration['repeats']} compilations."
            + "".join(f" {name} was not there." for name in document["skipped"])
        )
    rows = [row for row in document["rows"] if row["suite"] == suite]
    if not rows:
        raise ValueError(f"there are no rows of suite {suite!r}")
    cells = slopes(rows) if suite == "scaling" else table(rows)
    left = ("quantity", "size", "against", "as grow", "a unit")
    align = ["left" if name in left else "right" for name in cells[0]]
    return tabulate(
        cells,
        headers="keys",
        tablefmt="pipe",
        colalign=align,
        disable_numparse=True,
    )


def with_tables(text: str, document: dict[str, Any]) -> str:
    """A README with the tables of a benchmark between its `<!-- benchmark: -->` marks.

    Raises:
      ValueError: If its marks are not all in pairs, or the benchmark is not one that
        `--full` has finished, with all suites that they name and nothing refused.
    """
    blocks = _BLOCK.findall(text)
    if not blocks or {len(blocks)} != {text.count(mark) for mark in _MARKS}:
        raise ValueError(
            "README.md's marks are not pairs <!-- benchmark: NAME --> and <!-- end -->"
        )
    if not document["configuration"]["full"]:
        raise ValueError("not a run of --full")
    if document["refused"]:
        raise ValueError(f"{len(document['refused'])} rows are refused in it")
    for _, suite, _ in blocks:
        if suite not in (*document["finished"], "machine"):
            raise ValueError(f"suite {suite!r} is not finished in it")
    return _BLOCK.sub(
        lambda found: f"{found[1]}\n{markdown(found[2], document)}\n\n{found[3]}", text
    )


def picture(path: Path, rows: list[Row]) -> None:
    """Speed against each peer, over all sizes, and time along each scaling curve."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["along"] is None:
            quantity = "sweep" if row["suite"] == "sweep" else row["quantity"]
            groups.setdefault((quantity, row["against"]), []).append(row)
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["along"] is not None:
            curves.setdefault((row["quantity"], row["along"][0]), []).append(row)
    lines, bars = max(1, -(-len(curves) // 2)), int(bool(groups))
    height = max(3.0, 0.3 * len(groups) + 1, 2.5 * lines)
    figure = plt.figure(figsize=(13, height), layout="constrained")
    widths = [2] * bars + [1, 1] * bool(curves)
    cells = figure.add_gridspec(lines, len(widths), width_ratios=widths)
    if groups:
        _bars(figure.add_subplot(cells[:, 0]), groups)
    for i, (name, points) in enumerate(curves.items()):
        _curve(figure.add_subplot(cells[i // 2, bars + i % 2]), *name, points)
    with output.atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)


def _bars(axis: Any, groups: dict[tuple[str, str], list[Row]]) -> None:
    suites = list(dict.fromkeys(rows[0]["suite"] for rows in groups.values()))
    medians = []
    for i, rows in enumerate(groups.values()):
        speeds = [row["speed"] for row in rows]
        color = f"C{suites.index(rows[0]['suite'])}"
        middle = float(np.median(speeds))
        axis.barh(i, middle - 1, left=1, color=color, height=0.7)
        axis.plot([min(speeds), max(speeds)], [i, i], color="0.25", lw=1.2)
        medians.append(middle)
    axis.set_xscale("log")
    axis.axvline(1, color="k", lw=0.8)
    axis.set_yticks(
        range(len(groups)),
        [
            f"{quantity}  vs  {against}   {_number(median)}"
            for (quantity, against), median in zip(groups, medians, strict=True)
        ],
        fontsize=8,
    )
    axis.invert_yaxis()
    axis.set(
        xlabel="times as fast: bar and number the median over sizes, line their range",
        title="jaxbce beside what else there is",
    )


def _curve(axis: Any, quantity: str, grows: str, points: list[Row]) -> None:
    peers = dict.fromkeys(row["against"] for row in points)
    ours = {row["along"][1]: row["seconds"] for row in points}
    axis.loglog(list(ours), list(ours.values()), "o-", ms=3, lw=2, label=OURS)
    for peer in peers:
        theirs = {
            row["along"][1]: row["its_seconds"]
            for row in points
            if row["against"] == peer
        }
        axis.loglog(list(theirs), list(theirs.values()), "o--", ms=3, label=peer)
    axis.set_title(f"{quantity} by {grows}", fontsize=9)
    axis.set_xlabel(grows, fontsize=8)
    axis.set_ylabel(f"seconds a {points[0]['unit']}", fontsize=8)
    axis.set_xticks(list(ours), [f"{at:g}" for at in ours])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7)
