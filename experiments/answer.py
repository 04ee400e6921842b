"""The tables and the figure of README.md and docs/answer.md, from the kept predictions.

python -m experiments.answer    # writes the marked tables of the documents, docs/answer.png and docs/confusion.png

The logits were computed in bfloat16, so that some images have two classes with the highest logit. The class with the
lower index counts as predicted. Accuracies and differences have one decimal, as the order of the classes decides the
second.
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from engine.errors import exit_on_error
from engine.files import write_durably
from engine.reach import ROOT
from engine.recipes import baseline_of
from experiments.archive import FOLDER, load
from experiments.presets import STUDY
from report.comparisons import Comparison, compare_all
from report.figures import blank_figure, confusion_figure, png
from report.markdown import interval, markdown_table
from report.metrics import Evaluated
from report.statistics import accuracy_interval, holm, paired_t_p, seeds_half_width

# The rows of the figure: in words, and by run and name.
SHOWN = {
    "student alone": ("ablation", "student"),
    "alone, twice the epochs": ("ablation", "student_30_epochs"),
    "alone, 3.6 times the learning rate": ("ablation", "student_lr_3_6x"),
    "alone, loss × 0.25": ("ablation", "student_quarter_loss"),
    "distilled with T²": ("ablation", "kd"),
    "distilled with T², twice the epochs": ("ablation", "kd_30_epochs"),
    "distilled without T²": ("ablation", "kd_unscaled"),
    "distilled without T², 3.6 times the learning rate": ("ablation", "kd_unscaled_lr_3_6x"),
    "distilled without T², twice the epochs\n(as published)": ("ablation", "kd_unscaled_30_epochs"),
    "alone, labels smoothed": ("controls", "label_smoothing"),
    "distilled from shuffled logits": ("controls", "kd_shuffled"),
    "self-distilled (teacher: a student alone)": ("controls", "kd_self"),
}

IN_README = (
    *("student alone", "alone, twice the epochs", "distilled with T²", "distilled without T²"),
    *("distilled without T², twice the epochs\n(as published)", "self-distilled (teacher: a student alone)"),
)

# Comparisons other than that of each row with its baseline, in the same family of Holm's correction.
FURTHER = {
    "ablation": [
        (row, "student")
        for row in (
            "student_30_epochs",
            "student_lr_3_6x",
            "kd_unscaled",
            "kd_unscaled_lr_3_6x",
            "kd_unscaled_30_epochs",
            "kd_30_epochs",
        )
    ],
    "controls": [(row, "student") for row in ("label_smoothing", "kd_untrained", "kd_shuffled", "kd_self")],
}


def accuracy(model: Evaluated, labels: np.ndarray) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    each = 100 * model.correct(labels).mean(1)
    std = f" ± {each.std(ddof=1):.1f}" if len(each) > 1 else ""
    return f"{each.mean():.1f}{std}"


def compared(run: str, models: dict[str, Evaluated], labels: np.ndarray) -> list[Comparison]:
    """The comparisons that this study makes of the kept models of a run; Holm-corrected for all that it plans.

    Models with a single seed are not compared.
    """
    recipes = STUDY[run].recipes
    planned = [(name, baseline) for name in recipes if (baseline := baseline_of(name, recipes))] + FURTHER.get(run, [])
    models = {name: model for name, model in models.items() if len(model.logits) > 1}
    return compare_all(models, labels, pairs=planned, recipes=recipes)


def comparison_cells(c: Comparison) -> dict[str, str]:
    return {
        "against": f"`{c.baseline}`",
        "difference": f"{100 * c.difference:+.1f}",
        "95% interval": interval(c.ci95, 1, signed=True),
        "p": f"{c.p_value:.2g}",
        "p, Holm": f"{c.p_holm:.2g}",
        "verdict": c.restricted_verdict,
    }


COLUMNS = ("against", "difference", "95% interval", "p", "p, Holm", "verdict")


def table(run: str) -> str:
    """Every kept model of a run with its comparisons, if any."""
    models, labels = load(run)
    comparisons, rows = compared(run, models, labels), []
    for name, model in models.items():
        found = [comparison_cells(c) for c in comparisons if c.model == name]
        own = (f"`{name}`", len(model.logits), accuracy(model, labels))
        rows += [(*own, *(cells.get(column, "") for column in COLUMNS)) for cells in found or [{}]]
    return markdown_table(("model", "seeds", "accuracy (%)", *COLUMNS), rows)


def gains() -> str:
    """The README's table: rows of SHOWN against the student alone, Holm-corrected as in the table of their run."""
    kept, rows = {run: load(run) for run in ("ablation", "controls")}, []
    columns = ("difference", "95% interval", "p, Holm")
    found = {(run, c.model): c for run in kept for c in compared(run, *kept[run]) if c.baseline == "student"}
    shown = {title: SHOWN[title] for title in IN_README} | {"the teacher": ("ablation", "teacher")}
    for title, (run, name) in shown.items():
        models, labels = kept[run]
        if name in models:
            cells = comparison_cells(found[run, name]) if (run, name) in found else {}
            own = (title.replace("\n", " "), len(models[name].logits), accuracy(models[name], labels))
            rows.append((*own, *(cells.get(column, "") for column in columns)))
    return markdown_table(("model", "seeds", "accuracy (%)", "gain", *columns[1:]), rows)


def faults() -> str:
    """How far the original's faults of evaluation move each accuracy, in points: mean (lowest to highest)."""
    rows = []
    for title, measured in json.loads((FOLDER / "evaluation_faults.json").read_text())["models"].items():
        name, seed = title.split("/seed")
        right = 100 * measured["none"][0]
        moved = [100 * np.array(measured[fault]) - right for fault in ("training mode", "flips", "both")]
        cells = (f"{m.mean():+.1f} ({m.min():+.1f} to {m.max():+.1f})" for m in moved)
        rows.append((f"`{name}`", seed, f"{right:.1f}", *cells))
    return markdown_table(("model", "seed", "accuracy (%)", "training mode", "flips", "both"), rows)


def nearest_study() -> str:
    """Each distilled student of kd-capacity-gap against the same student alone, paired by seed, Holm-corrected.

    docs/data/kd-capacity-gap.csv has the test accuracy of each of the 50 final runs that umutonuryasar/kd-capacity-gap
    (MIT licence) published with arXiv 2605.31191. The t-test leaves out the sampling of test images, as no predictions
    were published.
    """
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    with open(FOLDER / "kd-capacity-gap.csv") as file:
        for row in csv.DictReader(file):
            setting = row["student"], row["teacher"], row["method"]
            found[setting][int(row["seed"])] = float(row["test_accuracy_best_validation"])
    settings = sorted(setting for setting in found if setting[2] != "none")
    differences = []
    for student, teacher, method in settings:
        taught, alone = found[student, teacher, method], found[student, "", "none"]
        differences.append(np.array([taught[seed] - alone[seed] for seed in taught]))
    p_values, rows = [paired_t_p(d) or 1.0 for d in differences], []
    for setting, d, p, p_holm in zip(settings, differences, p_values, holm(p_values), strict=True):
        mean, half = d.mean(), seeds_half_width(d)
        bounds = interval((mean - half, mean + half), 2, signed=True)
        rows.append((*setting, f"{100 * mean:+.2f}", bounds, f"{p:.2f}", f"{p_holm:.2f}"))
    return markdown_table(("student", "teacher", "method", "gain (points)", "95% interval", "p", "p, Holm"), rows)


def figure() -> Figure:
    """Accuracy of each kept row of SHOWN, mean with 95% interval, and of each of its seeds."""
    kept = {run: load(run) for run in ("ablation", "controls")}
    rows = {title: kept[run][0][name] for title, (run, name) in SHOWN.items() if name in kept[run][0]}
    labels = kept["ablation"][1]
    drawn = blank_figure(7.5, 0.36 * len(rows) + 1.2)
    axes = drawn.subplots()
    for name, title, style in (("student", "student alone", "--"), ("teacher", "teacher", ":")):
        mean = 100 * kept["ablation"][0][name].correct(labels).mean()
        axes.axvline(mean, color="0.3", linewidth=1, linestyle=style, label=title)
    for row, (title, model) in enumerate(reversed(rows.items())):
        correct, color = model.correct(labels), "C0" if "distilled" in title else "C1"
        mean, (low, high) = 100 * correct.mean(), accuracy_interval(correct)
        axes.plot([100 * low, 100 * high], [row, row], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(100 * correct.mean(1), np.full(len(correct), row), "o", color=color, markersize=3.5)
        axes.plot(mean, row, "|", color=color, markersize=14, markeredgewidth=2)
        axes.annotate(f"{mean:.1f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("test accuracy (%): mean, each seed,\nand 95% interval over seeds and test images")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0)
    axes.grid(axis="x", alpha=0.3)
    return drawn


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def per_class() -> str:
    """Accuracy (%) by class of the teacher, the student alone and the distilled student, mean over seeds."""
    models, labels = load("ablation")
    correct = [models[name].correct(labels).mean(0) for name in ("teacher", "student", "kd")]  # (n,)
    rows = [(c, *(f"{100 * right[labels == k].mean():.1f}" for right in correct)) for k, c in enumerate(CLASSES)]
    rows.append(("**all**", *(f"**{100 * right.mean():.1f}**" for right in correct)))
    return markdown_table(("class", "teacher", "student alone", "distilled"), rows)


def confusion() -> Figure:
    """The confusion matrix of the distilled student, seed 0."""
    models, labels = load("ablation")
    counts = confusion_matrix(labels, models["kd"].predictions[0])
    return confusion_figure(counts, CLASSES, "distilled student, CIFAR-10 (JPEG copy), 64 px")


TABLES: dict[str, Callable[[], str]] = {
    **{run: partial(table, run) for run in STUDY},
    "gains": gains,
    "per_class": per_class,
    "faults": faults,
    "capacity_gap": nearest_study,
}
PAGES = (Path("README.md"), Path("docs/answer.md"))


def with_tables(text: str) -> str:
    """A document with each table that follows a comment such as <!-- table: gains --> computed anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n\n)(?:\|.*\n)+", lambda found: found[1] + TABLES[found[2]](), text, flags=re.MULTILINE
    )


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        write_durably(path, with_tables(path.read_text(encoding="utf-8")).encode())
    write_durably(ROOT / "docs/answer.png", png(figure()))
    write_durably(ROOT / "docs/confusion.png", png(confusion()))


if __name__ == "__main__":
    with exit_on_error(), matplotlib.style.context("default"):
        main()
