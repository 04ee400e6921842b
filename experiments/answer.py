"""The tables and the figures of README.md and docs/answer.md, from the kept predictions.

python -m experiments.answer    # writes the marked tables of the documents, and docs/answer.png, gap.png, confusion.png

A seed's model that was trained twice counts with the mean of its two runs. The logits were computed in bfloat16, so
that some images have two classes with the highest logit; the class with the lower index counts as predicted. Accuracies
and differences have one decimal, because the order of the classes, or a repetition, decides the second.
"""

import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from experiments.archive import FOLDER, RUNS, Correct, load, load_correct
from experiments.presets import STUDY
from report.comparisons import shares_teacher
from report.figures import blank_figure, confusion_figure, png
from report.markdown import interval, markdown_table
from report.statistics import half_width, holm, image_variance, paired_interval, paired_p, paired_t_p, seeds_half_width

Study = dict[str, tuple[Correct, np.ndarray]]  # run -> its kept models, and the labels of the test images

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

# The comparisons of docs/finetuning.md, one family of Holm's correction, and the number of seeds planned for each.
FINETUNING = {
    ("kd_unscaled", "kd"): 6,
    ("kd", "student"): 6,
    ("kd_unscaled", "student"): 6,
    ("kd_unscaled_lr_3_6x", "kd"): 6,
    ("kd_unscaled_lr_3_6x", "student"): 6,
    ("kd_unscaled_10_epochs", "student"): 3,
    ("kd_unscaled_10_epochs", "student_10_epochs"): 3,
    ("kd_lr_0_001", "student_lr_0_001"): 3,
    ("kd_unscaled_lr_0_001", "kd_lr_0_001"): 3,
}
SMALLEST_MARGIN, LARGEST_MARGIN = 0.003, 0.007  # the rules 3 and 4 of docs/finetuning.md

# Comparisons that a reviewer asked for when all results were known; in no family. `controls` has the rows of both runs.
NOT_PLANNED = [
    *((row, "student_lr_3_6x") for row in ("kd", "kd_unscaled", "kd_unscaled_lr_3_6x", "kd_self")),
    ("kd_unscaled_lr_3_6x", "kd_alpha_0_9"),
]

# The rows of the first figure: in words, and run, row, and the student alone of as many epochs.
GAINS = {
    "distilled with T²": ("ablation", "kd", "student"),
    "distilled with T², 30 epochs": ("ablation", "kd_30_epochs", "student_30_epochs"),
    "distilled without T²": ("ablation", "kd_unscaled", "student"),
    "distilled without T², 30 epochs\n(as published: twice the epochs)": (
        "ablation",
        "kd_unscaled_30_epochs",
        "student_30_epochs",
    ),
    "distilled without T², 3.6 times the learning rate": ("ablation", "kd_unscaled_lr_3_6x", "student"),
    "self-distilled (teacher: a student alone)": ("controls", "kd_self", "student"),
    "distilled from shuffled logits": ("controls", "kd_shuffled", "student"),
    "alone, 3.6 times the learning rate": ("ablation", "student_lr_3_6x", "student"),
    "alone, labels smoothed": ("controls", "label_smoothing", "student"),
    "alone, loss × 0.25": ("ablation", "student_quarter_loss", "student"),
}

# Those of them that the README's table has, beside the students alone and the teacher.
IN_README = (
    "distilled with T²",
    "distilled without T²",
    "distilled without T², 30 epochs\n(as published: twice the epochs)",
    "self-distilled (teacher: a student alone)",
)

# The rows of the second figure: students that differ from one alone only in their teacher. The text, and on which side.
BY_GAP = {
    ("ablation", "kd"): ("5,000 images", "right"),
    ("ablation", "kd_30_epochs"): ("30 epochs", "left"),
    ("controls", "kd_self"): ("its own teacher", "right"),
    ("low_data", "kd_1k"): ("1,000 images", "left"),
    ("low_data", "kd_10k"): ("10,000 images", "right"),
    ("low_data", "kd_48k"): ("48,000 images", "right"),
    ("teachers", "kd_from_5k_10_epochs"): ("teacher of 5,000, 10 epochs", "right"),
    ("teachers", "kd_from_5k_30_epochs"): ("teacher of 5,000, 30 epochs", "above"),
    ("teachers", "kd_from_48k_1_epoch"): ("1 epoch", "left"),
    ("teachers", "kd_from_48k_8_epochs"): ("teacher of 8 epochs", "right"),
    ("views", "kd"): ("crops", "left"),
}
PLACES = {"right": ((8, -3), "left"), "left": ((-8, -3), "right"), "above": ((0, 18), "center")}  # offset, alignment
ORIGINAL = 95.4 - 94.1, 94.2 - 94.1  # teacher minus student alone, and the gain: its README, one seed, in points
CAPACITY_GAP_TEACHER = 95.36  # %, of the ResNet50 of kd-capacity-gap, as arXiv 2605.31191 says


@dataclass(frozen=True)
class Paired:
    """A model against a baseline over the seeds that both have. Differences and intervals are fractions."""

    run: str
    model: str
    baseline: str
    by_seed: np.ndarray  # (S,) differences
    ci95: tuple[float, float]
    p_value: float  # `paired_p`
    for_this_teacher: bool  # all seeds share it
    p_holm: float = 1.0  # over the comparisons planned in the run
    p_study: float = 1.0  # over those of all runs

    @property
    def difference(self) -> float:
        return float(self.by_seed.mean())

    @property
    def verdict(self) -> str:
        if self.p_holm >= 0.05:
            return "indistinguishable"
        return ("better" if self.difference > 0 else "worse") + ", for this teacher" * self.for_this_teacher


def pair(run: str, model: str, baseline: str, correct: Correct) -> Paired | None:
    """One comparison; None if they have fewer than two seeds in common."""
    seeds = sorted(correct.get(model, {}).keys() & correct.get(baseline, {}).keys())
    if len(seeds) < 2:
        return None
    first, second = (np.stack([correct[name][seed] for seed in seeds]) for name in (model, baseline))  # (S, n)
    return Paired(
        run,
        model,
        baseline,
        first.mean(1) - second.mean(1),
        paired_interval(first, second),
        paired_p(first, second),
        any(shares_teacher(name, RUNS[run].recipes) for name in (model, baseline)),
    )


def compare(study: Study) -> list[Paired]:
    """All comparisons of the study that can be made. Holm's corrections count those that are planned, run or not."""
    found, planned = [], 0
    for run, (correct, _) in study.items():
        recipes = STUDY[run].recipes
        pairs = [(name, baseline) for name in recipes if (baseline := baseline_of(name, recipes))]
        pairs += FURTHER.get(run, [])
        made = [p for model, baseline in pairs if (p := pair(run, model, baseline, correct))]
        adjusted = holm([p.p_value for p in made] + [1.0] * (len(pairs) - len(made)))
        found += [replace(p, p_holm=adjusted_p) for p, adjusted_p in zip(made, adjusted, strict=False)]
        planned += len(pairs)
    adjusted = holm([p.p_value for p in found] + [1.0] * (planned - len(found)))
    return [replace(p, p_study=adjusted_p) for p, adjusted_p in zip(found, adjusted, strict=False)]


def accuracies(by_seed: dict[int, np.ndarray]) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    each = [100 * right.mean() for right in by_seed.values()]
    return f"{np.mean(each):.1f}" + (f" ± {np.std(each, ddof=1):.1f}" if len(each) > 1 else "")


def points(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"


def table(run: str, study: Study) -> str:
    """Every kept model of a run with its comparisons, if any."""
    columns = ("against", "difference", "95% interval", "p", "p, Holm", "whole study", "verdict")
    comparisons, rows = [p for p in compare(study) if p.run == run], []
    for name, by_seed in study[run][0].items():
        cells = [
            (
                f"`{p.baseline}`",
                points(p.difference),
                interval(p.ci95, 1, signed=True),
                *(f"{value:.2g}" for value in (p.p_value, p.p_holm, p.p_study)),
                p.verdict,
            )
            for p in comparisons
            if p.model == name
        ]
        own = (f"`{name}`", len(by_seed), accuracies(by_seed))
        rows += [(*own, *found) for found in cells or [("",) * len(columns)]]
    return markdown_table(("model", "seeds", "accuracy (%)", *columns), rows)


def gains(study: Study) -> str:
    """The README's table: gains over a student alone of as many epochs, Holm-corrected as in the table of their run."""
    shown = [title for title in GAINS if title in IN_README]
    rows = {
        "student alone": ("ablation", "student", ""),
        "student alone, 30 epochs": ("ablation", "student_30_epochs", ""),
        **{title.replace("\n", " "): GAINS[title] for title in shown},
        "the teacher": ("ablation", "teacher", ""),
    }
    found = {(p.run, p.model, p.baseline): p for p in compare(study)}
    cells = []
    for title, (run, model, baseline) in rows.items():
        if by_seed := study[run][0].get(model):
            p = found.get((run, model, baseline))
            gain = (points(p.difference), interval(p.ci95, 1, signed=True), f"{p.p_holm:.2g}") if p else ("",) * 3
            cells.append((title, len(by_seed), accuracies(by_seed), *gain))
    return markdown_table(("model", "seeds", "accuracy (%)", "gain", "95% interval", "p, Holm"), cells)


def repetitions(study: Study) -> str:
    """The main comparisons by what is done with the seeds that were trained twice: points, ± half the 95% interval.

    The interval is Student's over seeds. The last column takes each of the eight runs as if it were a seed.
    """
    correct, labels = study["ablation"]
    second, _ = load_correct("ablation", replaced=False)
    again = load("ablation", "replaced")[0]
    first = {name: {**second[name], **dict(zip(m.logits, m.correct(labels), strict=True))} for name, m in again.items()}
    rows = []
    for model, baseline in (("kd", "student"), ("kd_unscaled", "kd"), ("kd_unscaled_30_epochs", "student_30_epochs")):

        def differences(kept: Correct, model: str = model, baseline: str = baseline) -> np.ndarray:
            of_both = zip(kept[model].values(), kept[baseline].values(), strict=True)
            return np.array([a.mean() - b.mean() for a, b in of_both])

        found = [differences(kept) for kept in (first, second, correct)]
        found.append(np.concatenate([found[0][: len(again[model].logits)], found[1]]))
        cells = (f"{100 * d.mean():+.2f} ± {100 * seeds_half_width(d):.2f}" for d in found)
        rows.append((f"`{model}`", f"`{baseline}`", *cells))
    columns = ("first runs", "second runs", "their mean by seed", "all eight runs")
    return markdown_table(("model", "against", *columns), rows)


def whole_study(study: Study) -> str:
    """The verdicts that Holm's correction over the whole study would change."""
    rows = [
        (p.run, f"`{p.model}`", f"`{p.baseline}`", points(p.difference), f"{p.p_holm:.2g}", f"{p.p_study:.2g}")
        for p in compare(study)
        if p.p_holm < 0.05 <= p.p_study
    ]
    return markdown_table(("preset", "model", "against", "difference", "p, Holm", "whole study"), rows)


def not_planned(study: Study) -> str:
    """The comparisons of NOT_PLANNED, with p-values that are not corrected."""
    correct = {**study["controls"][0], **study["ablation"][0]}
    found = [p for model, baseline in NOT_PLANNED if (p := pair("ablation", model, baseline, correct))]
    rows = [
        (
            f"`{p.model}`",
            f"`{p.baseline}`",
            len(p.by_seed),
            points(p.difference),
            interval(p.ci95, 1, signed=True),
            f"{p.p_value:.2g}",
        )
        for p in found
    ]
    return markdown_table(("model", "against", "seeds", "difference", "95% interval", "p"), rows)


def finetuned() -> Correct:
    """The kept models of docs/finetuning.md; none before there are margins, so that nobody looks at differences."""
    correct, _ = load_correct("finetuning")
    return correct if all(margin(correct, *key, planned) for key, planned in FINETUNING.items() if planned == 6) else {}


def finetuning_rows(study: Study) -> str:
    """The accuracy of each row of docs/finetuning.md, and how far the teacher is ahead of the student alone."""
    correct = finetuned()
    lead = pair("finetuning", "teacher", "student", correct)
    rows = []
    for name, by_seed in correct.items():
        ahead = (
            (points(lead.difference), interval(lead.ci95, 1, signed=True)) if lead and name == "teacher" else ("", "")
        )
        rows.append((f"`{name}`", len(by_seed), accuracies(by_seed), *ahead))
    return markdown_table(("model", "seeds", "accuracy (%)", "above `student`", "95% interval"), rows)


def margin(correct: Correct, model: str, baseline: str, planned: int) -> float | None:
    """The margin of a pair by rule 3 of docs/finetuning.md, from the seeds 1 to 3; None if they are not all there.

    It is 1.65 times the half-width that an interval with so many seeds will have, as far as three seeds say.
    """
    seeds = (1, 2, 3)
    if not all(seed in correct.get(name, {}) for name in (model, baseline) for seed in seeds):
        return None
    first, second = (np.stack([correct[name][seed] for seed in seeds]) for name in (model, baseline))  # (3, n)
    std = float((first.mean(1) - second.mean(1)).std(ddof=1))
    over_images = math.sqrt(image_variance(first, second)[1])
    return max(SMALLEST_MARGIN, 1.65 * half_width(0.05, over_images, std / math.sqrt(planned), planned))


def margins(study: Study) -> str:
    """The margin of each comparison of docs/finetuning.md, in points."""
    correct, _ = load_correct("finetuning")
    found = {key: margin(correct, *key, planned) for key, planned in FINETUNING.items()}
    rows = [(f"`{m}`", f"`{b}`", FINETUNING[m, b], f"{100 * size:.2f}") for (m, b), size in found.items() if size]
    return markdown_table(("model", "against", "planned seeds", "margin"), rows)


def finetuning(study: Study) -> str:
    """The comparisons of docs/finetuning.md, with its verdicts. Those that have not been run count as p = 1."""
    correct = finetuned()
    made = [p for model, baseline in FINETUNING if (p := pair("finetuning", model, baseline, correct))]
    adjusted = holm([p.p_value for p in made] + [1.0] * (len(FINETUNING) - len(made)))
    rows = []
    for p, p_holm in zip(made, adjusted, strict=False):
        size = margin(correct, p.model, p.baseline, FINETUNING[p.model, p.baseline])
        verdict = replace(p, p_holm=p_holm).verdict
        if verdict == "indistinguishable":
            low, high = p.ci95
            small = size is not None and size <= LARGEST_MARGIN and -size <= low <= 0 <= high <= size
            verdict = "no difference that matters" if small else "undecided"
        cells = points(p.difference), interval(p.ci95, 1, signed=True), f"{p.p_value:.2g}", f"{p_holm:.2g}", verdict
        rows.append((f"`{p.model}`", f"`{p.baseline}`", len(p.by_seed), *cells))
    return markdown_table(("model", "against", "seeds", "difference", "95% interval", "p", "p, Holm", "verdict"), rows)


def faults(study: Study) -> str:
    """How far the original's faults of evaluation move each accuracy, in points: mean (lowest to highest)."""
    rows = []
    for title, measured in json.loads((FOLDER / "evaluation_faults.json").read_text())["models"].items():
        name, seed = title.split("/seed")
        right = 100 * measured["none"][0]
        moved = [100 * np.array(measured[fault]) - right for fault in ("training mode", "flips", "both")]
        cells = (f"{m.mean():+.1f} ({m.min():+.1f} to {m.max():+.1f})" for m in moved)
        rows.append((f"`{name}`", seed, f"{right:.1f}", *cells))
    return markdown_table(("model", "seed", "accuracy (%)", "training mode", "flips", "both"), rows)


def runs_of_capacity_gap() -> dict[tuple[str, str, str], dict[int, float]]:
    """(student, teacher, method) -> seed -> test accuracy: the final runs that umutonuryasar/kd-capacity-gap published.

    MIT licence, arXiv 2605.31191. A student alone has the teacher "" and the method "none".
    """
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    with open(FOLDER / "kd-capacity-gap.csv") as file:
        for row in csv.DictReader(file):
            setting = row["student"], row["teacher"], row["method"]
            found[setting][int(row["seed"])] = float(row["test_accuracy_best_validation"])
    return found


def nearest_study(study: Study) -> str:
    """Each distilled student of kd-capacity-gap against the same student alone, paired by seed, Holm-corrected.

    The t-test leaves out the sampling of test images, as no predictions were published.
    """
    found = runs_of_capacity_gap()
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


def figure(study: Study) -> Figure:
    """The paired gain of each row of GAINS over a student alone of as many epochs, with each seed and 95% interval."""
    found = {(p.run, p.model, p.baseline): p for p in compare(study)}
    rows = {title: found[key] for title, key in GAINS.items() if key in found}
    drawn = blank_figure(7.5, 0.36 * len(rows) + 1.2)
    axes = drawn.subplots()
    axes.axvline(0, color="0.3", linewidth=1, linestyle="--")
    for row, (title, p) in enumerate(reversed(rows.items())):
        color = "C1" if title.startswith("alone") else "C0"
        low, high = p.ci95
        axes.plot([100 * low, 100 * high], [row, row], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(100 * p.by_seed, np.full(len(p.by_seed), row), "o", color=color, markersize=3.5)
        axes.plot(100 * p.difference, row, "|", color=color, markersize=14, markeredgewidth=2)
        axes.annotate(points(p.difference), (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("points above a student alone of as many epochs")
    axes.plot([], [], color="C0", linewidth=2, label="distilled")
    axes.plot([], [], color="C1", linewidth=2, label="alone")
    axes.plot([], [], "o", color="0.3", markersize=3.5, label="a seed")
    axes.plot([], [], color="0.3", linewidth=5, alpha=0.35, label="95% interval")
    drawn.legend(loc="outside upper center", ncols=4, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    return drawn


def gaps(study: Study) -> dict[tuple[str, str], tuple[float, Paired]]:
    """Teacher minus student alone, in points, and the comparison of the rows of BY_GAP with the student alone."""
    found = {}
    for run, model in BY_GAP:
        recipe, correct = STUDY[run].recipes[model], study[run][0]
        baseline = "student" if recipe.baseline == "kd" else str(recipe.baseline)
        p = pair(run, model, baseline, correct)
        if p and recipe.teacher:
            seeds = sorted(correct[model].keys() & correct[baseline].keys())
            teachers = [seed if recipe.teacher_seed is None else recipe.teacher_seed for seed in seeds]
            if run == "views":
                teachers = [*correct["teacher"]]
            teacher = np.mean([correct[recipe.teacher][seed].mean() for seed in teachers])
            alone = np.mean([correct[baseline][seed].mean() for seed in seeds])
            found[run, model] = 100 * (teacher - alone), p
    return found


def gap_figure(study: Study) -> Figure:
    """The gain of distillation against the distance of the teacher from the student alone, both in points."""
    ours, runs = gaps(study), runs_of_capacity_gap()
    drawn = blank_figure(6.5, 4.5)
    axes = drawn.subplots()
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.axvline(0, color="0.3", linewidth=0.8)
    for key, (gap, p) in ours.items():
        axes.plot([gap, gap], [100 * bound for bound in p.ci95], color="C0", linewidth=4, alpha=0.3)
        axes.plot(gap, 100 * p.difference, "o", color="C0", markersize=5)
        text, place = BY_GAP[key]
        offset, alignment = PLACES[place]
        point = gap, 100 * p.difference
        axes.annotate(text, point, offset, textcoords="offset points", fontsize=8, ha=alignment)
    axes.plot([], [], "o", color="C0", markersize=5, label="this study, with T², and its 95% interval")
    taught = 100 * np.mean([*runs["resnet18", "resnet50", "logit"].values()])
    alone = 100 * np.mean([*runs["resnet18", "", "none"].values()])
    axes.plot(*ORIGINAL, "*", color="C3", markersize=11, label="the original: without T², twice the epochs, one seed")
    axes.plot(CAPACITY_GAP_TEACHER - alone, taught - alone, "D", color="C2", label="kd-capacity-gap: ResNet50 and 18")
    axes.set_xlim(-17, 28)
    axes.set_xlabel("teacher minus student alone (points of test accuracy)")
    axes.set_ylabel("gain of the distilled student (points)")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    return drawn


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def per_class(study: Study) -> str:
    """Accuracy (%) by class of the teacher, the student alone and the distilled student, mean over seeds."""
    correct, labels = study["ablation"]
    means = [np.mean([*correct[name].values()], 0) for name in ("teacher", "student", "kd")]  # (n,)
    rows = [(c, *(f"{100 * right[labels == k].mean():.1f}" for right in means)) for k, c in enumerate(CLASSES)]
    rows.append(("**all**", *(f"**{100 * right.mean():.1f}**" for right in means)))
    return markdown_table(("class", "teacher", "student alone", "distilled"), rows)


def confusion() -> Figure:
    """The confusion matrix of the distilled student, seed 0."""
    models, labels = load("ablation")
    counts = confusion_matrix(labels, models["kd"].predictions[0])
    return confusion_figure(counts, CLASSES, "distilled student, CIFAR-10 (JPEG copy), 64 px")


TABLES: dict[str, Callable[[Study], str]] = {
    **{run: partial(table, run) for run in STUDY},
    "gains": gains,
    "per_class": per_class,
    "repetitions": repetitions,
    "whole_study": whole_study,
    "not_planned": not_planned,
    "margins": margins,
    "finetuning_rows": finetuning_rows,
    "finetuning": finetuning,
    "faults": faults,
    "capacity_gap": nearest_study,
}
PAGES = (Path("README.md"), Path("docs/answer.md"), Path("docs/finetuning.md"))


def with_tables(text: str, study: Study) -> str:
    """A document with each table that follows a comment such as <!-- table: gains --> computed anew."""
    pattern = r"(<!-- table: (\w+) -->\n\n)(?:\|.*\n)+"
    return re.sub(pattern, lambda found: found[1] + TABLES[found[2]](study), text, flags=re.MULTILINE)


def main() -> None:
    study = {run: load_correct(run) for run in STUDY}
    for page in PAGES:
        path = ROOT / page
        write_durably(path, with_tables(path.read_text(encoding="utf-8"), study).encode())
    for name, drawn in (("answer", figure(study)), ("gap", gap_figure(study)), ("confusion", confusion())):
        write_durably(ROOT / f"docs/{name}.png", png(drawn))


if __name__ == "__main__":
    with exit_on_error(), matplotlib.style.context("default"):
        main()
