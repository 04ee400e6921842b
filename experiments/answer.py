"""The tables and the figure of README.md and docs/answer.md, from the kept predictions.

python -m experiments.answer                    # prints the README's table and those of docs/answer.md
python -m experiments.answer docs/answer.png    # and draws the figure

The logits were computed in bfloat16, so that some images have two classes with the highest logit. The class with the
lower index counts as predicted. Accuracies and differences have one decimal, as the order of the classes decides the
second.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from engine.errors import exit_on_error
from engine.files import write_durably
from engine.recipes import baseline_of
from experiments import archive
from experiments.archive import load
from experiments.presets import STUDY
from report.comparisons import compare_all
from report.figures import blank_figure, png
from report.markdown import interval, markdown_table, verdict
from report.metrics import Evaluated, count_ties
from report.statistics import accuracy_interval, holm

# The rows of the figure and of the README's table: in words, and by run and name.
SHOWN = {
    "student alone": ("ablation", "student"),
    "alone, twice the epochs": ("ablation", "student_2x"),
    "alone, 3.6 times the learning rate": ("ablation", "student_lr"),
    "alone, loss × 0.25": ("ablation", "small_step"),
    "distilled with T²": ("ablation", "kd"),
    "distilled with T², twice the epochs": ("ablation", "kd_2x"),
    "distilled without T²": ("ablation", "kd_without_t2"),
    "distilled without T², 3.6 times the learning rate": ("ablation", "kd_without_t2_lr"),
    "distilled without T², twice the epochs\n(as published)": ("ablation", "original"),
    "alone, labels smoothed": ("controls", "label_smoothing"),
    "distilled from shuffled logits": ("controls", "kd_shuffled"),
    "self-distilled (teacher: a student alone)": ("controls", "kd_self"),
}

# Comparisons other than that of each row with its baseline, in the same family of Holm's correction.
FURTHER = {
    "ablation": [
        (row, "student")
        for row in ("student_2x", "student_lr", "kd_without_t2", "kd_without_t2_lr", "original", "kd_2x")
    ],
    "controls": [(row, "student") for row in ("label_smoothing", "kd_untrained", "kd_shuffled", "kd_self")],
}


def accuracy(model: Evaluated, labels: np.ndarray) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    each = 100 * model.correct(labels).mean(1)
    return f"{each.mean():.1f}" + (f" ± {each.std(ddof=1):.1f}" if len(each) > 1 else "")


def planned(run: str) -> list[tuple[str, str]]:
    """The comparisons that this study plans for a run: model and baseline."""
    recipes = STUDY[run].recipes
    return [(name, baseline) for name in recipes if (baseline := baseline_of(name, recipes))] + FURTHER.get(run, [])


def compared(run: str, models: dict[str, Evaluated], labels: np.ndarray) -> list[dict[str, Any]]:
    """The comparisons that this study makes of the kept models of a run; Holm-corrected for all that it plans.

    Models with a single seed are not compared.
    """
    models = {name: model for name, model in models.items() if len(model.logits) > 1}
    return compare_all(models, labels, pairs=planned(run), recipes=STUDY[run].recipes)


def comparison_cells(c: dict[str, Any]) -> dict[str, str]:
    return {
        "against": f"`{c['baseline']}`",
        "difference": f"{100 * c['difference']:+.1f}",
        "95% interval": interval(c["ci95"], 1, signed=True),
        "p": f"{c['p_value']:.2g}",
        "p, Holm": f"{c['p_holm']:.2g}",
        "verdict": verdict(c),
    }


COLUMNS = ("against", "difference", "95% interval", "p", "p, Holm", "verdict")


def table(run: str) -> str:
    """Every kept model of a run with its comparisons, if any."""
    models, labels = load(run)
    comparisons, rows = compared(run, models, labels), []
    for name, model in models.items():
        found = [comparison_cells(c) for c in comparisons if c["model"] == name]
        own = (f"`{name}`", len(model.logits), accuracy(model, labels))
        rows += [(*own, *(cells.get(column, "") for column in COLUMNS)) for cells in found or [{}]]
    return markdown_table(("model", "seeds", "accuracy (%)", *COLUMNS), rows)


def gains() -> str:
    """The README's table: each kept row of SHOWN against the student alone, Holm-corrected as in its run's table."""
    kept, rows = {run: load(run) for run in ("ablation", "controls")}, []
    columns = ("difference", "95% interval", "p, Holm")
    found = {(run, c["model"]): c for run in kept for c in compared(run, *kept[run]) if c["baseline"] == "student"}
    for title, (run, name) in {**SHOWN, "the teacher": ("ablation", "teacher")}.items():
        models, labels = kept[run]
        if name in models:
            cells = comparison_cells(found[run, name]) if (run, name) in found else {}
            own = (title.replace("\n", " "), len(models[name].logits), accuracy(models[name], labels))
            rows.append((*own, *(cells.get(column, "") for column in columns)))
    return markdown_table(("model", "seeds", "accuracy (%)", "gain", *columns[1:]), rows)


def faults() -> str:
    """How far the original's faults of evaluation move each accuracy, in points: mean (lowest to highest)."""
    rows = []
    for title, measured in archive.evaluation_faults()["models"].items():
        name, seed = title.split("/seed")
        right = 100 * measured["none"][0]
        moved = [100 * np.array(measured[fault]) - right for fault in ("training mode", "flips", "both")]
        cells = (f"{m.mean():+.1f} ({m.min():+.1f} to {m.max():+.1f})" for m in moved)
        rows.append((f"`{name}`", seed, f"{right:.1f}", *cells))
    return markdown_table(("model", "seed", "accuracy (%)", "training mode", "flips", "both"), rows)


def ties_to_the_last_class(models: dict[str, Evaluated], labels: np.ndarray) -> tuple[dict[str, Evaluated], np.ndarray]:
    """The models and labels with the classes in reverse order, so that argmax breaks ties the other way."""
    classes = next(iter(next(iter(models.values())).logits.values())).shape[1]
    reverse = {
        name: model._replace(logits={seed: logits[:, ::-1] for seed, logits in model.logits.items()})
        for name, model in models.items()
    }
    return reverse, classes - 1 - labels


def ties() -> tuple[int, int]:
    """How many pairs of a kept model and a test image have more than one highest logit, and the number of pairs."""
    models = [model for run in STUDY for name, model in load(run)[0].items() if archive.owner(run, name) == run]
    return sum(map(count_ties, models)), sum(len(logits) for model in models for logits in model.logits.values())


def moved() -> str:
    """Each comparison as first published, and now.

    First published were two decimals and the p of the paired t-test over seeds; a verdict needed a Holm-corrected p
    below 0.05 and an interval that excludes 0.
    """
    rows = []
    for run in STUDY:
        models, labels = load(run)
        found, reverse = compared(run, models, labels), compared(run, *ties_to_the_last_class(models, labels))
        before = holm([c["t_test_p"] for c in found] + [1.0] * (len(planned(run)) - len(found)))
        for c, tied, p_holm in zip(found, reverse, before, strict=False):
            low, high = c["ci95"]
            direction = "better" if c["difference"] > 0 else "worse"
            was = direction if p_holm < 0.05 and not low <= 0 <= high else "indistinguishable"
            rows.append(
                (
                    run,
                    f"`{c['model']}`",
                    f"`{c['baseline']}`",
                    f"{100 * c['difference']:+.2f}",
                    f"{100 * tied['difference']:+.2f}",
                    f"{100 * c['difference']:+.1f}",
                    f"{c['t_test_p']:.2g}",
                    f"{c['p_value']:.2g}",
                    f"{p_holm:.2g}",
                    f"{c['p_holm']:.2g}",
                    c["verdict"] if c["verdict"] == was else f"**{was}, now {c['verdict']}**",
                )
            )
    head = ("preset", "model", "against", "difference: was", "with ties to the last class", "is")
    return markdown_table((*head, "p: was", "is", "p, Holm: was", "is", "verdict"), rows)


def figure() -> Figure:
    """Accuracy of each kept row of SHOWN, mean with 95% interval, and of each of its seeds."""
    kept = {run: load(run) for run in ("ablation", "controls")}
    rows = {title: kept[run][0].get(name) for title, (run, name) in SHOWN.items()}
    labels, rows = kept["ablation"][1], {title: model for title, model in rows.items() if model}
    drawn = blank_figure(7.5, 0.36 * len(rows) + 1.2)
    axes = drawn.subplots()
    for name, style in (("student", "--"), ("teacher", ":")):
        mean = 100 * kept["ablation"][0][name].correct(labels).mean()
        axes.axvline(
            mean, color="0.3", linewidth=1, linestyle=style, label=f"{name} alone" if name == "student" else name
        )
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


def main() -> None:
    print(f"{gains()}\n{faults()}")
    for run in STUDY:
        print(f"{run}\n\n{table(run)}")
    print("{:,} of {:,} have more than one highest logit\n".format(*ties()))
    print(moved())
    if sys.argv[1:]:
        write_durably(Path(sys.argv[1]), png(figure()))


if __name__ == "__main__":
    with exit_on_error():
        main()
