"""The tables and the figure of docs/answer.md, from the kept logits.

python -m experiments.answer                    # prints the tables of every preset of the study
python -m experiments.answer docs/effects.png   # and draws the figure
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from engine.errors import exit_on_error
from engine.files import write_durably
from experiments.archive import load
from experiments.presets import STUDY
from report.comparisons import compare_all
from report.figures import blank_figure, png
from report.markdown import align_tables, interval
from report.metrics import Evaluated
from report.statistics import accuracy_interval

# The rows of the figure: in words, and by run and name.
SHOWN = {
    "student alone": ("ablation", "student"),
    "alone, twice the epochs": ("ablation", "student_2x"),
    "alone, loss times 0.25": ("ablation", "small_step"),
    "taught without T²": ("ablation", "kd_without_t2"),
    "taught without T², twice the epochs\n(the original)": ("ablation", "original"),
    "taught without T², larger learning rate": ("ablation", "kd_without_t2_lr"),
    "taught with T²": ("ablation", "kd"),
    "alone, labels smoothed": ("controls", "label_smoothing"),
    "taught by an untrained teacher": ("controls", "kd_untrained"),
    "taught with shuffled logits": ("controls", "kd_shuffled"),
    "taught by itself": ("controls", "kd_self"),
}


def accuracy(model: Evaluated, labels: np.ndarray) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    each = 100 * model.correct(labels).mean(1)
    return f"{each.mean():.2f}" + (f" ± {each.std(ddof=1):.2f}" if len(each) > 1 else "")


def table(run: str) -> str:
    """Every kept model of a run as a Markdown table, with its comparison, if any; Holm-corrected over the run."""
    models, labels = load(run)
    comparisons = {c["model"]: c for c in compare_all(models, labels)}
    head = ("model", "seeds", "accuracy (%)", "against", "difference", "95% interval", "p", "p, Holm", "verdict")
    rows: list[tuple[Any, ...]] = [(*head, "seeds needed"), (":--", *["--:"] * len(head))]
    for name, model in models.items():
        cells = [f"`{name}`", len(model.logits), accuracy(model, labels), *[""] * 7]
        if found := comparisons.get(name):
            p, needed = found["p_value"], found["seeds_needed"]
            cells[3:] = [
                f"`{found['baseline']}`",
                f"{100 * found['difference']:+.2f}",
                interval(found["ci95"], 2, signed=True),
                "none" if p is None else f"{p:.2g}",
                f"{found['p_holm']:.2g}",
                found["verdict"],
                "none" if needed is None else f"{needed:,}",
            ]
        rows.append(tuple(cells))
    return align_tables("".join(f"| {' | '.join(map(str, row))} |\n" for row in rows))


def figure() -> Figure:
    """Accuracy of each kept row of SHOWN, mean with 95% interval, and of each of its seeds."""
    kept = {run: load(run) for run in ("ablation", "controls")}
    rows = {title: kept[run][0].get(name) for title, (run, name) in SHOWN.items()}
    labels, rows = kept["ablation"][1], {title: model for title, model in rows.items() if model}
    drawn = blank_figure(7.5, 0.38 * len(rows) + 1.3)
    axes = drawn.subplots()
    for name, style in (("student", "--"), ("teacher", ":")):
        mean = 100 * kept["ablation"][0][name].correct(labels).mean()
        axes.axvline(mean, color="black", linewidth=1, linestyle=style)
        axes.annotate(
            name, (mean, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", ha="center"
        )
    for row, model in enumerate(reversed(rows.values())):
        correct = model.correct(labels)
        axes.plot(100 * correct.mean(1), np.full(len(correct), row), "o", color="0.7", markersize=4)
        low, high = accuracy_interval(correct)
        axes.plot([100 * low, 100 * high], [row, row], color="C0", linewidth=2)
        axes.plot(100 * correct.mean(), row, "o", color="C0", markersize=7)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("test accuracy (%): mean with 95% interval, and each seed")
    axes.grid(axis="x", alpha=0.3)
    return drawn


def main() -> None:
    for run in STUDY:
        models, labels = load(run)
        if models:
            print(f"{run} ({len(labels):,} test images)\n\n{table(run)}")
    if sys.argv[1:]:
        write_durably(Path(sys.argv[1]), png(figure()))


if __name__ == "__main__":
    with exit_on_error():
        main()
