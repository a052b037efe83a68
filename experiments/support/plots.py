"""Pictures of networks, sweeps, trainability, grokking, private training, labels."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator
from scipy import stats
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

from experiments.support import output
from experiments.support.metrics import CALIBRATION_BINS, calibration_bins
from experiments.support.retraining import GRAD_DOT, NEWTON

DPI = 120
MAX_NAME = 60  # characters of a name that are drawn
SHOWN_COLUMNS = 20  # of importances


def _save(figure: Figure, path: Path) -> None:
    for text in figure.findobj(Text):
        _make_drawable(text)
    with output.atomic_write(path) as partial:
        figure.savefig(partial, dpi=DPI)
    plt.close(figure)


def _make_drawable(text: Any) -> None:
    """Adds fonts for characters that the text's own lacks; escapes what none has."""
    own = font_manager.findfont(text.get_fontproperties())
    missing = set(text.get_text()) - _characters(own) - {"\n"}
    families = text.get_fontfamily()
    for font in font_manager.fontManager.ttflist if missing else ():
        is_regular = font.style == "normal" and font.weight in (400, "normal")
        if is_regular and missing & _characters(font.fname):
            missing -= _characters(font.fname)
            families = [*families, font.name]
    text.set_fontfamily(families)
    for character in missing:
        escape = character.encode("unicode_escape").decode()
        text.set_text(text.get_text().replace(character, escape))


@functools.cache
def _characters(font: str) -> set[str]:
    """The characters in a font file, but for Last Resort's, which are boxes."""
    if "LastResort" in Path(font).name:
        return set()
    return set(map(chr, font_manager.get_font(font).get_charmap()))


def _plain(name: str) -> str:
    """The name, at most 60 characters of it, escaped so that it is not a formula."""
    if len(name) > MAX_NAME:
        name = name[: MAX_NAME - 1] + "…"
    return name.replace("$", r"\$")


def _legend(figure: Any, *axes: Any) -> None:
    """Adds a legend of lines and points below the axes, where it hides none."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(
        found.values(),
        map(_plain, found),
        loc="outside lower center",
        ncols=4,
    )


def losses(path: Path, steps: np.ndarray, history: np.ndarray, best_step: int) -> None:
    """Draws training and validation loss, `[evaluations, 2]`, and the best step."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(steps, history[:, 0], label="train")
    axis.plot(steps, history[:, 1], label="validation")
    axis.axvline(best_step, color="0.6", ls=":", label="parameters kept")
    axis.set(
        xlabel="step", ylabel="loss (nats, outputs summed)", yscale="log", title="Loss"
    )
    _legend(figure, axis)
    _save(figure, path)


def curves(
    path: Path, target: str, y: np.ndarray, logits: dict[str, np.ndarray]
) -> None:
    """Draws ROC, precision over recall and reliability of each model's logits `[N]`."""
    figure, (roc, precision, reliability) = plt.subplots(
        1, 3, figsize=(13.5, 5.2), layout="compressed"
    )
    for name, logit in logits.items():
        false_positive, true_positive, _ = roc_curve(y, logit)
        roc.plot(false_positive, true_positive, label=name)
        precise, recalled, _ = precision_recall_curve(y, logit)
        precision.plot(recalled, precise, drawstyle="steps-post", label=name)
        probability = expit(logit)
        share, mean = calibration_curve(y, probability, n_bins=CALIBRATION_BINS)
        _, rows = np.unique(calibration_bins(probability), return_counts=True)
        area = 10 + 600 * rows / len(y)
        reliability.scatter(mean, share, s=area, alpha=0.6, label=name)
    for axis in (roc, reliability):
        axis.plot([0, 1], [0, 1], color="0.7", ls=":")
    precision.axhline(y.mean(), color="0.7", ls=":")  # as of random scores
    for axis in (roc, precision, reliability):
        axis.set(aspect="equal", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    precision.set(xlabel="recall", ylabel="precision", title="Precision and recall")
    reliability.set(
        xlabel="predicted probability",
        ylabel="share of label 1 among them",
        title="Reliability (area: rows)",
    )
    _legend(figure, roc)
    figure.suptitle(f"{_plain(target)}, on {len(y)} test rows")
    _save(figure, path)


def importances(path: Path, table: Any) -> None:
    """Draws the columns with the largest permutation importances as bars.

    Args:
      path: The file to write.
      table: As `metrics.permutation_importances` returns it.
    """
    shown = table.head(SHOWN_COLUMNS).iloc[::-1]
    height = 1.2 + 0.28 * len(shown)
    figure, axis = plt.subplots(figsize=(7, height), layout="constrained")
    axis.barh(np.arange(len(shown)), shown["importance"], color="C0", alpha=0.8)
    axis.errorbar(
        shown["importance"],
        np.arange(len(shown)),
        xerr=shown["standard_deviation"],
        fmt="none",
        color="k",
        lw=1,
    )
    axis.set_yticks(np.arange(len(shown)), map(_plain, shown["column"]))
    axis.set(
        xlabel="increase of the test log-loss (nats), mean ± s.d.",
        title="Permutation importance",
    )
    _save(figure, path)


def boundary(
    path: Path,
    features: np.ndarray,
    y: np.ndarray,
    names: list[str],
    predict: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Draws the probability over the plane of two features, and the data `[N, 2]`."""
    low, high = features.min(axis=0), features.max(axis=0)
    margin = 0.1 * (high - low)
    axes = [np.linspace(low[i] - margin[i], high[i] + margin[i], 200) for i in (0, 1)]
    grid = np.stack(np.meshgrid(*axes), axis=-1)
    probability = predict(grid.reshape(-1, 2)).reshape(grid.shape[:2])
    figure, axis = plt.subplots(figsize=(6.4, 5), layout="constrained")
    levels = np.linspace(0, 1, 21)
    filled = axis.contourf(*axes, probability, levels=levels, cmap="RdBu_r", alpha=0.8)
    axis.contour(*axes, probability, levels=[0.5], colors="k", linewidths=1)
    for label, marker in ((0, "o"), (1, "s")):
        chosen = features[y == label]
        color = plt.get_cmap("RdBu_r")(0.05 if label == 0 else 0.95)
        axis.scatter(
            *chosen.T, c=[color], marker=marker, s=14, edgecolors="k", linewidths=0.4
        )
    axis.set(
        xlabel=_plain(names[0]), ylabel=_plain(names[1]), title="Probability of label 1"
    )
    figure.colorbar(filled, ax=axis, ticks=[0, 0.25, 0.5, 0.75, 1])
    _save(figure, path)


def sweep(path: Path, members: Any, axes: dict[str, str], metric: str = "loss") -> None:
    """Draws validation loss over the first one or two axes, one panel per program.

    Args:
      path: The file to write.
      members: Table with one row per network, as `experiments.sweep` makes it.
      axes: Spacing of each axis by name: "log", "lin" or "values".
      metric: If not "loss", 1 minus this metric is drawn.
    """
    names = list(axes)[:2]
    label = "validation loss (nats)"
    members = members.assign(drawn=members[f"validation_{metric}"])
    if metric != "loss":
        label = f"1 − validation {metric}"
        members["drawn"] = 1 - members["drawn"]
    panels = list(members.groupby(["hidden", "optimizer"], sort=False))
    figure, rows = plt.subplots(
        1,
        len(panels),
        figsize=(1.2 + 4.6 * len(panels), 4.4),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    finite = members["drawn"][np.isfinite(members["drawn"])]
    low, high = (finite.min(), finite.quantile(0.95)) if len(finite) else (0.1, 1.0)
    norm = LogNorm(max(low, 1e-12), max(high, 1.01 * low, 1.1e-12), clip=True)
    for axis, ((hidden, optimizer), panel) in zip(rows[0], panels, strict=True):
        groups = panel.groupby(names)
        table = groups["drawn"].agg(["mean", "sem"])
        table["diverged"] = groups["diverged_at"].max() >= 0
        table = table.reset_index().replace(np.inf, np.nan)
        axis.set(xlabel=_plain(names[0]), title=f"{hidden}, {optimizer}")
        if axes[names[0]] == "log":
            axis.set_xscale("log")
        if len(names) == 1:
            axis.errorbar(
                table[names[0]], table["mean"], table["sem"], marker="o", ms=3
            )
            axis.set(yscale="log", ylabel=f"{label}, mean ± s.e.")
            continue
        axis.set_ylabel(_plain(names[1]))
        if axes[names[1]] == "log":
            axis.set_yscale("log")
        elif axes[names[1]] == "values" and (table[names[1]] > 0).any():
            positive = table[names[1]][table[names[1]] > 0]
            axis.set_yscale("symlog", linthresh=positive.min())
        size = np.clip(60000 / len(table), 6, 120)
        drawn = axis.scatter(
            table[names[0]],
            table[names[1]],
            c=table["mean"].fillna(norm.vmax),
            norm=norm,
            s=size,
            marker="s",
            cmap="viridis_r",
        )
        usable = table["mean"].where(~table["diverged"])
        if usable.notna().any():
            best = table.loc[usable.idxmin()]
            axis.plot(best[names[0]], best[names[1]], "r+", ms=14, mew=2)
        if axis is rows[0][-1]:
            figure.colorbar(drawn, ax=rows[0].tolist(), label=label)
    _save(figure, path)


def private(
    path: Path, rows: list[dict[str, Any]], clipped: np.ndarray, guess: float
) -> None:
    """Draws test metrics over ε, and the fraction of examples clipped over steps.

    Args:
      path: The file to write.
      rows: As `experiments.private` makes them; the last one is not private.
      clipped: Fraction of examples clipped, `[ε, steps]`, in the order of `rows`.
      guess: Accuracy of always predicting the more common label.
    """
    figure, (accuracy, auc, share) = plt.subplots(
        1, 3, figsize=(14, 4), layout="constrained"
    )
    *private_rows, plain = rows
    epsilons = [row["epsilon"] for row in private_rows]
    accuracy.axhline(guess, color="grey", ls=":", label="the more common label")
    auc.axhline(0.5, color="grey", ls=":", label="chance")
    for axes, key, name in (
        (accuracy, "test_accuracy", "test accuracy"),
        (auc, "test_roc_auc", "test ROC AUC"),
    ):
        means = [row[key] for row in private_rows]
        errors = [row[f"{key}_se"] or 0.0 for row in private_rows]
        axes.errorbar(epsilons, means, errors, marker="o", capsize=3, label="private")
        mean, error = plain[key], plain[f"{key}_se"] or 0.0
        axes.axhline(mean, color="C1", label="not private")
        axes.axhspan(mean - error, mean + error, color="C1", alpha=0.2, lw=0)
        axes.set(xlabel="ε", xscale="log", ylabel=f"{name}, mean ± s.e.", title=name)
        axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axes.minorticks_off()
    window = max(1, clipped.shape[1] // 50)
    steps = np.arange(clipped.shape[1] // window) * window + window / 2
    for i, row in enumerate(private_rows):
        line = clipped[i, : len(steps) * window].reshape(-1, window).mean(axis=1)
        color = plt.get_cmap("viridis")(i / max(len(private_rows) - 1, 1) * 0.9)
        share.plot(steps, line, color=color, label=f"ε = {row['epsilon']:g}")
    share.set(
        xlabel="step",
        ylabel="share of rows clipped",
        ylim=(0, 1.02),
        title="Rows whose gradient was clipped",
    )
    _legend(figure, accuracy, auc, share)
    _save(figure, path)


def suspicious(
    path: Path, rows: Any, rank_by: str, name: str, images: np.ndarray | None
) -> None:
    """Draws the examples with the highest scores if they are images, else all scores.

    Args:
      path: The file to write.
      rows: Table of all examples, highest score first, as `find_mislabeled` makes it.
      rank_by: Key of the score.
      name: Name of the score.
      images: `[N, height, width]`, indexed by the column "row", or None.
    """
    if images is None:
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        place = np.arange(1, len(rows) + 1)
        axis.plot(place, rows[rank_by], color="0.7", zorder=1)
        if "flipped" in rows:
            chosen = rows["flipped"].to_numpy()
            axis.scatter(
                place[chosen], rows[rank_by][chosen], s=12, color="C3", label="flipped"
            )
            _legend(figure, axis)
        axis.set(xlabel="rank", xscale="log", ylabel=name)
    else:
        figure, axes = plt.subplots(4, 10, figsize=(11, 5.4), layout="constrained")
        _draw_images(axes, rows, images)
    known = ", flipped ones in red" if "flipped" in rows else ""
    figure.suptitle(f"Labels as given, of the rows with the highest {name}{known}")
    _save(figure, path)


def _draw_images(axes: np.ndarray, rows: Any, images: np.ndarray) -> None:
    """Draws the images of the first rows with their labels, flipped ones in red."""
    for axis, (_, row) in zip(axes.ravel(), rows.iterrows(), strict=False):
        axis.imshow(images[row["row"]], cmap="gray_r")
        wrong = bool(row.get("flipped", False))
        axis.set_title(_plain(row["label"]), fontsize=9, color="C3" if wrong else "k")
    for axis in axes.ravel():
        axis.set_axis_off()


def influential(path: Path, rows: Any, images: np.ndarray) -> None:
    """Draws the training examples that help the test losses most, and that hurt most.

    Args:
      path: The file to write.
      rows: Table of the training rows, the most helpful first, as `leave_one_out` makes
        it.
      images: `[N, height, width]`, indexed by the column "row".
    """
    figure = plt.figure(figsize=(11, 5.8), layout="constrained")
    halves: Any = figure.subfigures(2)
    shown = (rows, "larger"), (rows[::-1], "smaller")
    for part, (ordered, effect) in zip(halves, shown, strict=True):
        _draw_images(part.subplots(2, 10), ordered, images)
        part.suptitle(f"Without these rows the test losses are {effect}")
    _save(figure, path)


def leave_one_out(
    path: Path,
    truth: dict[str, np.ndarray],
    estimates: dict[tuple[str, str], np.ndarray],
) -> None:
    """Draws estimates of changes without a row over the changes by retraining.

    Args:
      path: The file to write.
      truth: "own_logit" `[N]` and "test_loss" `[N, M]`.
      estimates: The same by quantity and method.
    """
    panels = (
        ("own_logit", NEWTON, "own logit"),
        ("test_loss", NEWTON, "test losses"),
        ("test_loss", GRAD_DOT, "test losses"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.4), layout="constrained")
    for axis, (quantity, method, title) in zip(axes, panels, strict=True):
        x, y = truth[quantity].ravel(), estimates[quantity, method].ravel()
        if method != GRAD_DOT:  # which has another unit
            axis.axline((0, 0), slope=1, color="0.7", ls=":")
        if quantity == "own_logit":
            axis.scatter(x, y, s=10, alpha=0.6)
        else:
            axis.hexbin(x, y, gridsize=60, bins="log", mincnt=1, cmap="viridis_r")
        axis.set(xlabel="change by retraining", ylabel=method, title=title)
    figure.suptitle("Changes when a training row is left out")
    _save(figure, path)


def double_descent(
    path: Path,
    rows: list[dict[str, Any]],
    published: Mapping[int, float],
    noise: float,
) -> None:
    """Draws training and test error over width, with the published test errors.

    Args:
      path: The file to write.
      rows: As `experiments.double_descent` makes them.
      published: Test errors by width; those between the widths of the rows are drawn.
      noise: Probability with which a training label was replaced.
    """
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    widths = [row["width"] for row in rows]
    for name in ("train", "test"):
        means = [100 * row[f"{name}_error"] for row in rows]
        errors = [100 * (row[f"{name}_error_se"] or 0.0) for row in rows]
        axis.errorbar(
            widths, means, errors, marker="o", ms=3, capsize=3, label=f"{name} error"
        )
    drawn = [width for width in published if widths[0] <= width <= widths[-1]]
    if drawn:
        errors = [100 * published[width] for width in drawn]
        label = "test error, published (softmax, one seed)"
        # Without error bars, but in the legend after those that have them.
        style: Any = {"color": "0.6", "ls": "--", "marker": ".", "zorder": 1}
        axis.errorbar(drawn, errors, label=label, **style)
    axis.set(
        xlabel="units in each of two hidden layers",
        xscale="log",
        ylabel="error (%), mean ± s.e.",
        ylim=(0, None),
        title=f"MNIST-1D, {100 * noise:g}% of the training labels random",
    )
    ticks = FixedLocator(widths) if len(widths) <= 8 else LogLocator(subs=(1, 2, 5))
    axis.xaxis.set_major_locator(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda width, _: f"{width:g}"))
    axis.minorticks_off()
    _legend(figure, axis)
    _save(figure, path)


def trainability(
    path: Path, measures: np.ndarray, center: tuple[float, float], span: float
) -> None:
    """Draws measures `[n, n]` in shades of blue and red, by their ranks.

    Args:
      path: The file to write.
      measures: As `experiments.trainability.measure` returns them; rows and columns go
        from the smallest learning rate up.
      center: Learning rates at the center, of columns and of rows.
      span: Decades per side.
    """
    n = len(measures)
    converged = measures > 0
    image = np.zeros((n, n, 3))
    for mask, name in ((converged, "Blues"), (~converged, "Reds")):
        if mask.any():
            shade = 0.95 - 0.75 * _ranks(measures[mask])
            image[mask] = plt.get_cmap(name)(shade)[:, :3]
    # The axes span a whole number of dots per network.
    inches, side = 7.1, 6.0
    dpi = n * max(1, round(1000 / n)) / side
    figure = Figure(figsize=(inches, inches))
    axis = figure.add_axes(
        (0.8 / inches, 0.6 / inches, side / inches, side / inches),
        xlabel="learning rate, hidden layer",
        ylabel="learning rate, output layer",
    )
    x, y = (math.log10(rate) for rate in center)
    axis.imshow(
        image,
        origin="lower",
        interpolation="nearest",
        extent=(x - span / 2, x + span / 2, y - span / 2, y + span / 2),
    )
    digits = max(2, 2 - math.floor(math.log10(span)))

    def text(exponent: float, _: int) -> str:
        if span >= 2:
            return f"$10^{{{exponent:g}}}$"
        rate = 10**exponent
        if not 1e-4 <= rate < 1e6:
            return f"{rate:.{digits}g}"
        return np.format_float_positional(
            rate, precision=digits, fractional=False, trim="-"
        )

    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(6 if span >= 2 else 4, integer=span >= 2))
        ticks.set_major_formatter(FuncFormatter(text))
    if span < 2:  # the numbers are long
        for label in axis.get_yticklabels():
            label.set(rotation=90, verticalalignment="center")
    axis.set_title(
        "blue: converged, darker the faster;  red: diverged, darker the later",
        fontsize=11,
    )
    with output.atomic_write(path) as partial:
        figure.savefig(partial, dpi=dpi)


def grokking(
    path: Path,
    curves: Any,
    points: list[dict[str, Any]],
    reference: tuple[int, float],
    accuracy: float,
) -> None:
    """Draws curves of accuracy and loss, and when networks memorize and generalize.

    Args:
      path: The file to write.
      curves: Table with one row per network and evaluation, as `experiments.grokking`
        makes it.
      points: When the networks of each combination do, as it summarizes them.
      reference: Number of rows and weight decay of the networks whose curves are drawn.
      accuracy: At which a network has memorized, or generalized.
    """
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    chosen = (curves["rows"] == reference[0]) & (curves["weight_decay"] == reference[1])
    for axis, score in zip(axes[0], ("accuracy", "loss"), strict=True):
        for i, name in enumerate(("train", "test")):
            for _, curve in curves[chosen].groupby("seed"):
                values = curve[f"{name}_{score}"]
                axis.plot(curve["epoch"], values, color=f"C{i}", alpha=0.7, label=name)
        setting = f"{reference[0]} rows, weight decay {reference[1]:g}"
        axis.set(xlabel="epoch", title=f"{score.capitalize()}, {setting}")
    axes[0, 0].axhline(accuracy, color="0.6", ls=":", label=f"{accuracy:.0%}")
    axes[0, 1].set(yscale="log", ylabel="loss (nats)")
    table = pd.DataFrame(points)
    epochs = table[["memorized_epoch", "generalized_epoch"]].to_numpy(float)
    known = epochs[epochs > 0]
    low, high = (known.min(), known.max()) if len(known) else (1.0, 1.0)
    norm = LogNorm(low, max(high, 2 * low), clip=True)
    drawn = [
        _draw_times(axis, table, event, norm, reference)
        for axis, event in zip(axes[1], ("memorized", "generalized"), strict=True)
    ]
    colorbar = figure.colorbar(drawn[0], ax=axes[1].tolist(), label="epoch")
    colorbar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    colorbar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    colorbar.minorticks_off()
    _legend(figure, axes[0, 0])
    _save(figure, path)


def _draw_times(
    axis: Any, table: Any, event: str, norm: Any, reference: tuple[int, float]
) -> Any:
    """Draws the median epochs of an event as colored cells with numbers."""
    by_rows = {"index": "weight_decay", "columns": "rows"}
    epochs = table.pivot(**by_rows, values=f"{event}_epoch").astype(float)
    counts = table.pivot(**by_rows, values=event)
    networks = table.pivot(**by_rows, values="networks")
    colors = plt.get_cmap("viridis_r").with_extremes(bad="0.85")
    drawn = axis.imshow(epochs, norm=norm, cmap=colors, origin="lower", aspect="auto")
    for i, j in np.ndindex(epochs.shape):
        epoch, count, total = (t.to_numpy()[i, j] for t in (epochs, counts, networks))
        text = "never" if np.isnan(epoch) else f"{epoch:g}"
        if 0 < count < total:
            text += f"\n{count} of {total}"
        is_dark = not np.isnan(epoch) and norm(epoch) > 0.5
        color = "white" if is_dark else "black"
        axis.text(j, i, text, ha="center", va="center", color=color)
    place = epochs.columns.get_loc(reference[0]), epochs.index.get_loc(reference[1])
    corner = place[0] - 0.5, place[1] - 0.5
    axis.add_patch(Rectangle(corner, 1, 1, fill=False, color="C3", lw=2))
    axis.set_xticks(range(len(epochs.columns)), epochs.columns)
    axis.set_yticks(range(len(epochs.index)), [f"{v:g}" for v in epochs.index])
    axis.set(
        xlabel="training rows",
        ylabel="weight decay",
        title=f"{event.capitalize()} at epoch (median over seeds)",
    )
    return drawn


def _ranks(values: np.ndarray) -> np.ndarray:
    """Fraction of the values that are at most each value, in (0, 1]."""
    return stats.rankdata(values, method="average") / len(values)
