"""Figures of runs with many rows: the effect of each row, and accuracy against swept settings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn
from matplotlib.figure import Figure

from engine.fields import show
from report.figures import blank_figure, escape_mathtext


def effects_figure(comparisons: Sequence[Mapping[str, Any]]) -> Figure:
    """The difference of each model from its baseline, with its 95% interval, sorted; hollow if indistinguishable."""
    ordered = sorted(comparisons, key=lambda comparison: comparison["difference"])
    points = 100 * np.array([(c["difference"], *c["ci95"]) for c in ordered])  # (rows, 3)
    several = len({c["baseline"] for c in ordered}) > 1
    names = [c["model"] + f" − {c['baseline']}" * several for c in ordered]
    figure = blank_figure(7.5, 0.36 * len(ordered) + 1.2)
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for row, (comparison, (difference, low, high)) in enumerate(zip(ordered, points, strict=True)):
        face = "white" if comparison["verdict"] == "indistinguishable" else "C0"
        axes.plot([low, high], [row, row], color="C0", linewidth=2)
        axes.plot(difference, row, "o", color="C0", markerfacecolor=face, markersize=7)
    axes.set_yticks(range(len(names)), [escape_mathtext(name, 60) for name in names])
    baseline = "its baseline" if several else ordered[0]["baseline"]
    axes.set_xlabel(f"accuracy minus that of {escape_mathtext(baseline)} (percentage points), with 95% interval")
    axes.set_ylim(-0.6, len(ordered) - 0.4)
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
