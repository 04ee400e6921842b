"""The report in words: results.md from its template, and what of it the terminal shows."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from engine.errors import escape_control
from engine.fields import show
from engine.recipes import DEFAULTS, DISTILLATION_FIELDS, Recipe
from engine.soft_losses import options
from report.comparisons import ENVIRONMENT, Comparison
from report.statistics import half_width

# Settings that the report leaves out where no model has them.
UNUSUAL = ("mean", "std", "clip_norm", "class_weights", "keep", "train_subset")

Results = dict[str, Any]  # what results.json holds, its comparisons as Comparison


def escape_markdown(text: Any) -> str:
    """A name as a cell of a Markdown table."""
    return escape_control(" ".join(str(text).split())).replace("\\", r"\\").replace("|", r"\|")


def number(value: float | None, spec: str) -> str:
    return "none" if value is None else format(value, spec)


def percent(share: float | None, digits: int = 1) -> str:
    return "none" if share is None else f"{100 * share:.{digits}f}"


def interval(bounds: Sequence[float], digits: int = 1, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return " to ".join(f"{100 * bound:{sign}.{digits}f}" for bound in bounds)


def gap(difference: float) -> str:
    """Such as "2.00 percentage points above", for a difference of accuracies."""
    points = percent(abs(difference), 2)
    if points == "0.00":
        return "as accurate as"
    return f"{points} percentage points {'above' if difference > 0 else 'below'}"


def millions(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def spread(entry: dict[str, Any], spec: str) -> str:
    low, high = entry["quartiles"]
    return f"{entry['median']:{spec}} ({low:{spec}} to {high:{spec}})"


def value(of_setting: Any) -> str:
    if isinstance(of_setting, float):
        of_setting = float(f"{of_setting:.12g}")  # 0.18 for 0.18000000000000002
    return escape_markdown(of_setting if isinstance(of_setting, str) else str(of_setting).lower())


def setting(recipe: dict[str, Any], field: str) -> str:
    if field in DISTILLATION_FIELDS and not recipe["teacher"]:
        return ""
    if field == "loss_options":
        return escape_markdown(show({**options(recipe["soft_loss"]), **recipe[field]}))
    return "all" if field == "train_size" and recipe[field] is None else value(recipe[field])


def pairs(entries: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in entries.items())


def significant_classes(comparison: Comparison) -> str:
    """The classes, ten at most, whose interval excludes 0, each with its difference in points."""
    clear = [
        f"{escape_markdown(name)} ({100 * entry['difference']:+.1f})"
        for name, entry in comparison.per_class.items()
        if not entry["ci95"][0] <= 0 <= entry["ci95"][1]
    ]
    more = f" and {len(clear) - 10} more" if len(clear) > 10 else ""
    return ", ".join(clear[:10]) + more


def align_tables(markdown: str) -> str:
    """Pad the cells of every table in a Markdown text, so that its columns line up."""

    def align(table: re.Match) -> str:
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[0].splitlines()]
        widths = [max(3, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            if row[0] == ":--":
                cells = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
            lines.append(f"| {' | '.join(cells)} |\n")
        return "".join(lines)

    return re.sub(r"(?:^\|.*\n)+", align, markdown, flags=re.MULTILINE)


def markdown_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, its first column aligned to the left and the others to the right; cells are not escaped."""
    lines = [head, (":--", *["--:"] * (len(head) - 1)), *rows]
    return align_tables("".join(f"| {' | '.join(map(str, line))} |\n" for line in lines))


def join_lines(markdown: str) -> str:
    """Each paragraph and each item of a list on one line, with at most one blank line between two."""
    lines = [""]
    for line in markdown.splitlines():
        words = " ".join(line.split())
        if words and lines[-1] and words[0] not in "|-#!":
            lines[-1] += f" {words}"
        elif words or lines[-1]:
            lines.append(words)
    return "\n".join(lines).strip() + "\n"


def accuracy_table(results: Results) -> str:
    models = results["models"].values()
    rows: list[list[str]] = []
    if len({len(m["accuracy"]["seeds"]) for m in models}) > 1:
        rows.append(["seeds", *(str(len(m["accuracy"]["seeds"])) for m in models)])
    for name in results["classes"]:
        rows.append([escape_markdown(name), *(percent(m["per_class"][name]) for m in models)])
    rows.append(["**overall**"])
    for accuracy in (m["accuracy"] for m in models):
        std = "" if accuracy["std"] is None else f" ± {percent(accuracy['std'], 2)}"
        rows[-1].append(f"**{percent(accuracy['mean'], 2)}{std}**")
    rows.append(["95% interval", *(interval(m["accuracy"]["ci95"], 2) for m in models)])
    images = [sum(row) for row in next(iter(models))["confusion_matrix"]]  # of each class
    if max(images) > 1.5 * min(images):
        rows.append(["balanced accuracy", *(percent(m["balanced_accuracy"], 2) for m in models)])
    rows.append(["calibration error", *(percent(m["expected_calibration_error"]) for m in models)])
    return markdown_table(["accuracy (%)", *map(escape_markdown, results["models"])], rows)


def verdict(c: Comparison, n_test: int) -> str:
    """One comparison in sentences."""
    n, several, compare = len(c.seeds), len(c.seeds) > 1, "--seeds 0 1 2 compares the recipes."
    p = f"p = {c.p_value:.2g}"
    if c.p_holm != c.p_value:
        p += f", {c.p_holm:.2g} after Holm's correction"
    words = (
        f"{c.model} is {gap(c.difference)} {c.baseline} (95% interval "
        f"{interval(c.ci95, 2, signed=True)}; {c.test}, {p}; {n} seed{'s' if several else ''}): "
    )
    if several:
        words += f"{c.restricted_verdict}."
    elif c.verdict == "different":
        words += f"these two trained models differ. Other seeds may decide otherwise; {compare}"
    else:
        words += f"no difference was detected between these two trained models. {compare}"
    if c.differs_in:
        differing = (f"{field} is {value(own)}, not {value(other)}" for field, (own, other) in c.differs_in.items())
        words += f" Settings that differ: {', '.join(differing)}."
    if c.verdict == "indistinguishable" and c.detectable_difference is not None:
        these = f"these {n} seeds" if several else f"{n_test:,} test images"
        words += f" With 80% power, {these} can detect a difference of {percent(c.detectable_difference, 2)} points"
        if several and n_test and c.std is not None:
            of_seeds = half_width(0.05, 0.0, c.std / math.sqrt(n), n)  # without the sampling of images
            limit = "number of seeds" if of_seeds**2 > (c.ci95[1] - c.ci95[0]) ** 2 / 8 else f"{n_test:,} test images"
            words += f", limited more by the {limit}."
        else:
            words += "." if several else " between two trained models."
    return words


def verdicts(results: Results) -> list[str]:
    """Each comparison in sentences, with a warning if one of the two models has not learned to tell classes apart."""
    constant = {name for name, model in results["models"].items() if model["only_class"] is not None}
    sentences = []
    for c in results["comparisons"]:
        sentences.append(verdict(c, results["n_test"]))
        if doubtful := constant.intersection((c.model, c.baseline)):
            sentences[-1] += (
                f" This says nothing about the recipes: see the warning about {' and '.join(sorted(doubtful))}."
            )
    return sentences


def notes(results: Results) -> list[str]:
    """Sentences below the verdicts: what is not compared, or not like with like."""
    sentences = [f"{name} is not compared: {reason}." for name, reason in results["not_compared"].items()]
    if results["shared_images"]:
        sentences.append(
            f"Warning: {results['shared_images']:,} of {results['n_test']:,} test images are training images, too, so "
            "the accuracy on them says nothing about new images."
        )
    in_seeds = ", in at least one seed" if len(seeds_of(results)) > 1 else ""
    for name, model in results["models"].items():
        if model["only_class"] is not None:
            predicted = escape_markdown(model["only_class"])
            sentences.append(f"Warning: {name} predicts {predicted} for every test image{in_seeds}.")
            learned = max(
                (records[-1]["train_accuracy"] for records in model["history"].values() if records), default=0
            )
            if learned > 1.5 * model["accuracy"]["mean"]:
                sentences[-1] += (
                    f" It classified {learned:.0%} of its training images correctly. Then the running statistics of "
                    "BatchNorm, which only evaluation uses, are usually out of date, as after few steps with a small "
                    "momentum: train for more steps, or use a network of your own whose BatchNorm has momentum 0.1."
                )
    baselines = {c.model: c.baseline for c in results["comparisons"]}
    for row in results["versus_teacher"]:
        baseline = baselines.get(row["model"])
        if baseline and row["accuracy_of_teacher"] <= results["models"][baseline]["accuracy"]["mean"]:
            sentences.append(f"{row['teacher']}, the teacher of {row['model']}, is not more accurate than {baseline}.")
    trained: dict[str, list[str]] = {}
    for c in results["comparisons"]:
        if c.environments_differ:
            how = " and ".join(ENVIRONMENT[key] for key in c.environments_differ)
            trained.setdefault(how, []).append(f"{c.model} and {c.baseline}")
    return sentences + [f"Trained {how}, which also changes a model: {', '.join(m)}." for how, m in trained.items()]


def seeds_of(results: Results) -> list[str]:
    return sorted({seed for model in results["models"].values() for seed in model["accuracy"]["seeds"]}, key=int)


def results_markdown(results: Results) -> str:
    """The text of results.md."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["escape"] = escape_markdown
    for function in (gap, millions, number, percent, interval, spread, setting, value, pairs, significant_classes):
        env.filters[function.__name__] = function
    recipes = results["settings"]["recipes"].values()
    hidden = {field for field in UNUSUAL if all(recipe.get(field) in (None, DEFAULTS[field]) for recipe in recipes)}
    hidden |= {"baseline", "class_names"}
    if not any(recipe["teacher"] and options(recipe["soft_loss"]) for recipe in recipes):
        hidden.add("loss_options")
    confused = [
        [
            f"{escape_markdown(c['true'])} as {escape_markdown(c['predicted'])} ({percent(c['share'])}%)"
            for c in model["most_confused"]
        ]
        for model in results["models"].values()
    ]
    trained: dict[str, list[str]] = {}  # environment in words -> models
    for name, model in results["models"].items():
        for seed, environment in model["environments"].items():
            trained.setdefault(pairs(environment), []).append(f"{name} seed {seed}")
    text = env.get_template("results.md.jinja").render(
        results,
        verdicts=verdicts(results),
        notes=notes(results),
        accuracy_table=accuracy_table(results),
        seeds=seeds_of(results),
        recipe_fields=[field.name for field in dataclasses.fields(Recipe) if field.name not in hidden],
        most_confused=list(itertools.zip_longest(*confused, fillvalue="")),
        training_environments=trained,
        uniform_entropy=math.log(len(results["classes"])),
    )
    return align_tables(join_lines(text))


def summary(results: Results) -> str:
    """The table of accuracies, the verdicts and the notes, for the terminal."""
    return "\n".join([accuracy_table(results).rstrip(), *verdicts(results), *notes(results)])
