"""Every figure of a report, as a matplotlib figure; no display is needed."""

import io
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import seaborn
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from engine.fields import show
from report.comparisons import Comparison, Models
from report.metrics import expected_calibration_error, reliability, row_shares
from report.statistics import accuracy_interval

ANNOTATED = 20  # up to this many classes, the cells of a matrix hold numbers


def model_colours(names: Iterable[str]) -> dict[str, Any]:
    """The colour of each model in every figure, by the order of all recipes, evaluated or not."""
    return dict(zip(names, itertools.cycle(seaborn.color_palette("colorblind")), strict=False))


def choose_fonts(names: Iterable[str]) -> str | None:
    """Draw with fonts that have the characters of these names; returns a sentence if no installed font has some."""

    def characters(font: str) -> set[str]:
        return {*map(chr, font_manager.get_font(font).get_charmap())}

    chosen = ["DejaVu Sans"]
    missing = {c for c in "".join(names) if c.isprintable()} - characters(font_manager.findfont(chosen[0]))
    for font in font_manager.fontManager.ttflist:
        if missing and "Last Resort" not in font.name and missing & characters(font.fname):
            chosen.append(font.name)
            missing -= characters(font.fname)
    matplotlib.rcParams["font.family"] = chosen
    if not missing:
        return None
    warnings.filterwarnings("ignore", message="Glyph .* missing from")  # said once, in this sentence
    return (
        f"figures show boxes for {''.join(sorted(missing)[:10])}, which no installed font has; install one that does, "
        "such as Noto Sans CJK for Chinese, Japanese and Korean"
    )


def png(figure: Figure) -> bytes:
    return saved(figure, format="png", dpi=150)


def pdf(figure: Figure) -> bytes:
    return saved(figure, format="pdf", metadata={"CreationDate": None})


def saved(figure: Figure, **how: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **how)
    return buffer.getvalue()


def blank_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # otherwise seaborn makes a canvas for each tick label
    return figure


def escape_mathtext(text: str, most: int = 40) -> str:
    """A name shortened to one line, its dollar signs escaped."""
    text = " ".join(text.split())
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def label_size(classes: Sequence[str]) -> float:
    """Points, such that the names of many classes fit next to each other in a figure of bounded size."""
    return min(10.0, max(1.0, 600 / len(classes)))


def matrix_figure(
    percent: np.ndarray, written: np.ndarray, classes: tuple[str, ...], title: str, bar: str, **look: Any
) -> Figure:
    """A heat map over true class (rows) and predicted class (C, C); with few classes the cells hold `written`."""
    names = [escape_mathtext(name, 20) for name in classes]
    size = min(max(4.5, 0.55 * len(classes) + 1.2 + 0.07 * max(map(len, names))), 14)
    figure = blank_figure(size + 0.8, size)
    axes = figure.subplots()
    few = len(classes) <= ANNOTATED
    seaborn.heatmap(
        percent,
        annot=written if few else False,
        fmt="",
        square=True,
        linewidths=0.5 if few else 0,
        xticklabels=names,
        yticklabels=names,
        cbar_kws={"label": bar, "shrink": 0.8},
        ax=axes,
        **look,
    )
    axes.set(xlabel="predicted class", ylabel="true class", title=escape_mathtext(title, 80))
    axes.tick_params(labelsize=label_size(classes))
    long = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 2 else {"rotation": 0}
    axes.set_xticks(axes.get_xticks(), names, **long)
    axes.tick_params(axis="y", rotation=0)
    return figure


def confusion_figure(counts: np.ndarray, classes: tuple[str, ...], title: str) -> Figure:
    """Counts (C, C), rows true classes, coloured by their share of the row."""
    look = {"vmin": 0, "vmax": 100, "cmap": "Blues"}
    return matrix_figure(100 * row_shares(counts), counts, classes, title, "share of the true class (%)", **look)


def confusion_difference_figure(
    counts: np.ndarray, counts_baseline: np.ndarray, classes: tuple[str, ...], title: str
) -> Figure:
    """The difference between two confusion matrices, in percentage points of the true class."""
    points = 100 * (row_shares(counts) - row_shares(counts_baseline))
    written = np.vectorize(lambda value: f"{value:+.1f}" if abs(value) > 1e-9 else "")(points)
    most = max(1.0, np.abs(points).max())
    look = {"vmin": -most, "vmax": most, "cmap": "PuOr"}
    return matrix_figure(points, written, classes, title, "percentage points of the true class", **look)


def differences_figure(
    differences: Mapping[str, tuple[float, tuple[float, float]]], xlabel: str, colour: Any, hollow: Sequence[str] = ()
) -> Figure:
    """Differences in accuracy with their 95% intervals, from the top; the points of those in `hollow` are hollow."""
    points = 100 * np.array([(difference, *ci95) for difference, ci95 in differences.values()])  # (rows, 3)
    rows, few = np.arange(len(points)), len(points) <= 2 * ANNOTATED
    size = 30 if few else 4
    faces = ["white" if name in hollow else colour for name in differences]
    figure = blank_figure(7.5, min(0.32 * len(rows) + 1.3, 14))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    axes.hlines(rows, points[:, 1], points[:, 2], color=colour, linewidth=2 if few else 1)
    axes.scatter(points[:, 0], rows, s=size, facecolors=faces, edgecolors=[colour], zorder=3)
    ends = points[:, 1:].T.ravel()  # in front of the points, which may be wider than the interval
    axes.scatter(ends, np.tile(rows, 2), s=4 * size, marker="|", color=colour, zorder=4)
    axes.set_yticks(rows, [escape_mathtext(name, 60) for name in differences], fontsize=label_size(list(differences)))
    axes.set(xlabel=f"{xlabel} (percentage points), with 95% interval", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    return figure


def class_differences_figure(comparison: Comparison, colour: Any) -> Figure:
    by_class = {name: (entry["difference"], entry["ci95"]) for name, entry in comparison.per_class.items()}
    figure = differences_figure(by_class, "difference in accuracy", colour)
    title = f"{comparison.model} minus {comparison.baseline}"
    figure.axes[0].set(ylabel="class", title=escape_mathtext(title, 80))
    return figure


def effects_figure(comparisons: Sequence[Comparison]) -> Figure:
    """The difference of each model from its baseline, in the order of the rows; hollow if indistinguishable."""
    several = len({c.baseline for c in comparisons}) > 1
    names = {f"{c.model} − {c.baseline}" if several else c.model: c for c in comparisons}
    hollow = [name for name, c in names.items() if c.verdict == "indistinguishable"]
    baseline = "its baseline" if several else escape_mathtext(comparisons[0].baseline)
    effects = {name: (c.difference, c.ci95) for name, c in names.items()}
    return differences_figure(effects, f"accuracy minus that of {baseline}", "C0", hollow)


def reliability_figure(models: Models, labels: np.ndarray, colours: Mapping[str, Any]) -> Figure:
    """Accuracy against confidence of each model, over its seeds, as trained and temperature-scaled."""
    columns = min(len(models), 3)
    rows = math.ceil(len(models) / columns)
    figure = blank_figure(max(5.0, 3.1 * columns), 3.2 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(models) :]:
        axes.remove()
    grid, lowest = grid[: len(models)], 100.0
    for axes, (name, model) in zip(grid, models.items(), strict=True):
        axes.plot([0, 100], [0, 100], ":", color="grey")
        lines, errors = [(list(model.logits.values()), colours[name], "o-", 0.25)], []
        if model.temperatures:
            lines.append((model.scaled, "black", "s--", 0.12))
        for logits, colour, style, alpha in lines:
            confidence, accuracy, low, high = 100 * reliability(logits, labels).T
            axes.fill_between(confidence, low, high, color=colour, alpha=alpha, linewidth=0)
            axes.plot(confidence, accuracy, style, color=colour, markersize=4, linewidth=1.2)
            errors.append(f"{100 * np.mean([expected_calibration_error(z, labels) for z in logits]):.1f}")
            lowest = np.nanmin([lowest, *confidence, *low])
        axes.set_title(f"{escape_mathtext(name, 30)}\ncalibration error {' → '.join(errors)}", fontsize="medium")
        axes.set(xlabel="confidence (%)", ylabel="accuracy (%)")
        axes.grid(alpha=0.3)
    limits = 10 * math.floor(lowest / 10) - 2, 102
    for axes in grid:
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.locator_params(nbins=5)
    legend = [
        Line2D([], [], color="dimgrey", marker="o", label="1/15 of the images"),
        Patch(color="dimgrey", alpha=0.3, linewidth=0, label="95% interval"),
        Line2D([], [], color="grey", linestyle=":", label="perfectly calibrated"),
    ]
    if any(model.temperatures for model in models.values()):
        legend[0].set_label("1/15 of the images, as trained")
        legend.insert(1, Line2D([], [], color="black", marker="s", linestyle="--", label="temperature-scaled"))
    figure.legend(handles=legend, loc="outside lower center", ncols=4 if columns > 1 else 2, frameon=False)
    return figure


def gallery_figure(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    classes: tuple[str, ...],
    colours: Mapping[str, Any],
) -> Figure:
    """Images (k, H, W, 3) with their labels (k,) and each model's prediction, from its probabilities (k, C)."""
    columns = 3
    rows = math.ceil(len(images) / columns)
    figure = blank_figure(10, 1.35 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, label, *predicted in zip(grid, images, labels, *probabilities.values(), strict=False):
        axes.imshow(image, interpolation="nearest")
        (height, width), side = image.shape[:2], max(image.shape[:2])  # a square for the image, and text next to it
        left, top = (width - side) / 2 - 0.5, (height - side) / 2 - 0.5
        axes.set(xlim=(left, left + 2.45 * side), ylim=(top + side, top), anchor="W")
        style = {"fontsize": 8.5, "va": "top", "transform": axes.transAxes}
        axes.text(0.43, 0.96, f"true: {escape_mathtext(classes[label], 13)}", weight="bold", **style)
        for line, (name, p) in enumerate(zip(probabilities, predicted, strict=True)):
            at, best = 0.70 - 0.24 * line, p.argmax()
            mark = "✓" if best == label else "✗"
            axes.text(0.43, at, "■", color=colours.get(name, "grey"), **style)
            axes.text(0.49, at, f"{mark} {escape_mathtext(classes[best], 11)}, {100 * p[best]:.0f}%", **style)
    legend = [
        Line2D([], [], linestyle="", marker="s", color=colours.get(name, "grey"), label=escape_mathtext(name))
        for name in probabilities
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    return figure


def report_figure(
    scores: np.ndarray, support: np.ndarray, classes: tuple[str, ...], title: str, lowest: float = 0.0
) -> Figure:
    """Precision, recall and F1 (C, 3) of each class, with its images (C,), and their means over the classes.

    The colours begin at the `lowest` score of all models, so that the figures of a run can be compared.
    """
    averages = [scores.mean(0), np.average(scores, axis=0, weights=support)]
    values = 100 * np.vstack([scores, *averages])  # (C + 2, 3)
    names = [*map(escape_mathtext, classes), "macro average", "weighted average"]
    counts, few = [*support, support.sum(), support.sum()], len(classes) <= 2 * ANNOTATED
    figure = blank_figure(5.5, min(0.4 * len(values) + 1.2, 14))
    axes = figure.subplots()
    seaborn.heatmap(
        values,
        annot=few,
        fmt=".1f",
        vmin=min(90.0, 10 * math.floor(10 * lowest)),
        vmax=100,
        cmap="Blues",
        linewidths=0.5 if few else 0,
        xticklabels=["precision", "recall", "F1"],
        yticklabels=[f"{name} ({count:,})" for name, count in zip(names, counts, strict=True)],
        cbar_kws={"label": "%"},
        ax=axes,
    )
    axes.axhline(len(classes), color="black", linewidth=1.5)
    axes.set(ylabel="class (images)", title=escape_mathtext(title, 80))
    axes.tick_params(axis="y", rotation=0, labelsize=label_size(classes))
    return figure


def curves_figure(models: Models, colours: Mapping[str, Any]) -> Figure:
    """Loss, accuracy and, for distilled models, the share of the soft loss in the gradient, by epoch.

    Lines are means over seeds, bands their range.
    """
    trained = {name: [history for history in model.history.values() if history] for name, model in models.items()}
    trained = {name: records for name, records in trained.items() if records}  # not: weights that are used as they are
    distilled = any("soft_share" in records[0][0] for records in trained.values())
    figure = blank_figure(4.5, 2.4 * (2 + distilled) + 0.12 * len(trained))  # legible in a column of 8 cm
    loss_axes, accuracy_axes, *share_axes = figure.subplots(2 + distilled, sharex=True)
    panels = [(loss_axes, "loss", 1, "-"), (accuracy_axes, "train_accuracy", 100, ":")]
    panels += [(accuracy_axes, f"{held_out}_accuracy", 100, "-") for held_out in ("validation", "test")]
    panels += [(axes, "soft_share", 100, "-") for axes in share_axes]
    widths = np.linspace(3.5, 1, len(trained))  # a curve that lies on another lets it be seen
    for (name, records), width in zip(trained.items(), widths, strict=True):
        epochs = [record["epoch"] for record in records[0]]
        for axes, key, scale, style in panels:
            if key in records[0][0]:
                values = scale * np.array([[record[key] for record in history] for history in records])  # (S, epochs)
                label = escape_mathtext(name)
                look = {"color": colours[name], "linewidth": width, "marker": ".", "markersize": width + 3}
                axes.plot(epochs, values.mean(0), style, label=label, **look)
                low, high = values.min(0), values.max(0)
                axes.fill_between(epochs, low, high, color=colours[name], alpha=0.2, linewidth=0)
    loss_axes.set(ylabel="loss (nats)", yscale="log")
    loss_axes.set_title("training loss (not comparable between recipes)", fontsize="medium")
    accuracy_axes.set(ylabel="accuracy (%)")
    accuracy_axes.set_title("solid: test or validation, dotted: training images", fontsize="medium")
    for axes in share_axes:
        axes.set(ylabel="soft loss (%)", ylim=(0, 100))
        axes.set_title("share of the gradient at the logits", fontsize="medium")
    for axes in (loss_axes, accuracy_axes, *share_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    lines, names = loss_axes.get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, loc="outside lower center", ncols=2, frameon=False)
    return figure


def accuracy_figure(models: Models, labels: np.ndarray, colours: Mapping[str, Any]) -> Figure:
    """The accuracy of each model: its mean with 95% interval, and each seed."""
    few = len(models) <= 2 * ANNOTATED
    figure = blank_figure(6.5, min(0.36 * len(models) + 1.1, 14))
    axes = figure.subplots()
    for row, (name, model) in enumerate(models.items()):
        correct = model.correct(labels)
        low, high = accuracy_interval(correct)
        colour, mean = colours[name], 100 * correct.mean()
        axes.hlines(row, 100 * low, 100 * high, color=colour, linewidth=6 if few else 2, alpha=0.35)
        axes.plot(100 * correct.mean(1), [row] * len(correct), "o", color=colour, markersize=4 if few else 2)
        axes.plot(mean, row, "|", color=colour, markersize=14 if few else 4, markeredgewidth=2)
        if few:
            axes.annotate(f"{mean:.1f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(models)), [escape_mathtext(name) for name in models], fontsize=label_size([*models]))
    axes.set_ylim(len(models) - 0.4, -0.6)
    axes.set_xlabel("test accuracy (%): mean, seeds, and 95% interval")
    axes.grid(axis="x", alpha=0.3)
    return figure


def sweep_figure(
    points: Sequence[tuple[dict[str, Any], Mapping[str, Any]]],
    references: Mapping[str, Mapping[str, Any]],
    colours: Mapping[str, Any],
) -> Figure:
    """Accuracy, with 95% interval, against the first swept setting; a line for each combination of the others.

    `points` are the values of the swept settings, each with the model's entry in results.json; `references`, by name,
    are entries drawn as horizontal lines.
    """
    first, *others = points[0][0]
    lines: dict[tuple, list[tuple[Any, Mapping[str, Any]]]] = {}
    for values, model in points:
        lines.setdefault(tuple(values[field] for field in others), []).append((values[first], model["accuracy"]))
    ticks = list(dict.fromkeys(values[first] for values, _ in points))
    if all(isinstance(tick, (int, float)) for tick in ticks):
        ticks.sort()
        for line in lines.values():
            line.sort(key=lambda point: point[0])
    figure = blank_figure(6.5, 4)
    axes = figure.subplots()
    palette = ["black"] if len(lines) == 1 else seaborn.color_palette("crest", len(lines))
    style = "o" if any(isinstance(tick, (bool, str)) for tick in ticks) else "o-"
    for number, (chosen, line) in enumerate(lines.items()):
        mean = 100 * np.array([accuracy["mean"] for _, accuracy in line])
        low, high = 100 * np.array([accuracy["ci95"] for _, accuracy in line]).T
        x = np.array([ticks.index(value) for value, _ in line]) + 0.06 * (number - (len(lines) - 1) / 2)
        label = ", ".join(f"{field} = {show(value)}" for field, value in zip(others, chosen, strict=True))
        axes.errorbar(x, mean, [mean - low, high - mean], fmt=style, capsize=3, color=palette[number], label=label)
    for name, model in references.items():
        axes.axhline(100 * model["accuracy"]["mean"], color=colours[name], linestyle="--", label=escape_mathtext(name))
    axes.set_xticks(range(len(ticks)), [show(tick) for tick in ticks])
    axes.set(xlabel=first, ylabel="accuracy (%), with 95% interval")
    axes.grid(alpha=0.3)
    if others or references:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
