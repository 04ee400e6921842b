"""results.md from its template, and the tables for the terminal."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

from engine.errors import escape_control
from engine.fields import show
from engine.recipes import DISTILLATION_FIELDS, Recipe
from engine.soft_losses import options


def escape_markdown(text: Any) -> str:
    """A name as a cell of a Markdown table."""
    return escape_control(" ".join(str(text).split())).replace("\\", r"\\").replace("|", r"\|")


def format_or_none(value: float | None, spec: str, none: str = "none") -> str:
    return none if value is None else format(value, spec)


def percent(share: float | None, digits: int = 1) -> str:
    return "none" if share is None else f"{100 * share:.{digits}f}"


def interval(bounds: tuple[float, float], digits: int = 1, signed: bool = False) -> str:
    return " to ".join(f"{100 * bound:{'+' * signed}.{digits}f}" for bound in bounds)


def spread(entry: dict[str, Any], spec: str) -> str:
    low, high = entry["quartiles"]
    return f"{entry['median']:{spec}} ({low:{spec}} to {high:{spec}})"


def at_temperature(nats: float | None, temperature: float) -> str:
    return "" if nats is None else f"{nats:.3f} (T = {temperature:g})"


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


def verdict(comparison: dict[str, Any]) -> str:
    """The verdict, with its restriction if all seeds share a teacher."""
    several = len(comparison["seeds"]) > 1
    return comparison["verdict"] + (", for this teacher" if comparison["shared_teacher"] and several else "")


def significant_classes(per_class: dict[str, dict[str, Any]]) -> str:
    """The classes, ten at most, whose interval excludes 0, each with its difference in points."""
    clear = [
        f"{escape_markdown(name)} ({100 * entry['difference']:+.1f})"
        for name, entry in per_class.items()
        if not entry["ci95"][0] <= 0 <= entry["ci95"][1]
    ]
    return ", ".join(clear[:10]) + f" and {len(clear) - 10} more" * (len(clear) > 10)


def unbalanced(confusion_matrix: list[list[int]]) -> bool:
    """Whether the largest class has half as many test images again as the smallest."""
    images = [sum(row) for row in confusion_matrix]
    return max(images) > 1.5 * min(images)


def worse_when_scaled(model: dict[str, Any]) -> bool:
    key, scaled = "expected_calibration_error", model["temperature_scaled"] or {}
    return scaled.get(key) is not None and scaled[key] > model[key] + 0.005


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


def render(results: dict[str, Any]) -> ModuleType:
    """The rendered template: str() gives its text, and its macros are attributes."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "escape": escape_markdown,
        "number": format_or_none,
        "percent": percent,
        "interval": interval,
        "spread": spread,
        "at_temperature": at_temperature,
        "setting": setting,
        "value": value,
        "verdict": verdict,
        "significant_classes": significant_classes,
        "one_line": lambda text: " ".join(text.split()),
        "pairs": lambda entries: ", ".join(f"{key} {value}" for key, value in entries.items()),
    }
    models = results["models"]
    confused = [
        [
            f"{escape_markdown(c['true'])} as {escape_markdown(c['predicted'])} ({percent(c['share'])}%)"
            for c in confusions
        ]
        for confusions in (model["most_confused"] for model in models.values())
    ]
    trained: dict[str, tuple[list[str], dict[str, str]]] = {}
    for name, model in models.items():
        for seed, found in model["environments"].items():
            trained.setdefault(json.dumps(found), ([], found))[0].append(f"{name} seed {seed}")
    everything, code = len(trained) == 1, results["environment"]["code"]
    other_code = [names for names, found in trained.values() if found.get("code") != code]
    recipes = results["settings"]["recipes"].values()
    with_options = any(recipe["teacher"] and options(recipe["soft_loss"]) for recipe in recipes)
    return env.get_template("results.md.jinja").make_module(
        {
            **results,
            "seeds": sorted({seed for model in models.values() for seed in model["accuracy"]["seeds"]}, key=int),
            "recipe_fields": [
                field.name
                for field in dataclasses.fields(Recipe)
                if field.name != "baseline" and (field.name != "loss_options" or with_options)
            ],
            "most_confused": list(itertools.zip_longest(*confused, fillvalue="")),
            "training_environments": [
                ("all models" if everything else ", ".join(names), found) for names, found in trained.values()
            ],
            "worse_when_scaled": worse_when_scaled,
            "unbalanced": unbalanced(next(iter(models.values()))["confusion_matrix"]),
            "other_code": ["all models"] if len(other_code) == len(trained) > 0 else [*itertools.chain(*other_code)],
            "different_environments": different_environments(results),
            "ln": math.log,
        }
    )


def different_environments(results: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """What changes a trained model and is not the same for all: value -> models, for each of these keys."""
    found: dict[str, dict[str, list[str]]] = {key: {} for key in ("device", "processes", "threads", "precision")}
    for name, model in results["models"].items():
        if results["settings"]["recipes"][name]["epochs"]:  # otherwise its weights are used as they are
            for seed, environment in model["environments"].items():
                for key in found.keys() & environment.keys():
                    found[key].setdefault(environment[key], []).append(f"{name} seed {seed}")
    return {key: models for key, models in found.items() if len(models) > 1}


def results_markdown(results: dict[str, Any]) -> str:
    return align_tables(re.sub(r"\n{3,}", "\n\n", str(render(results))).strip() + "\n")


def summary(results: dict[str, Any]) -> str:
    """The table of accuracies, the verdicts and the notes on what has none, for the terminal."""
    report = render(results)
    verdicts = [str(report.verdict(comparison)).strip() for comparison in results["comparisons"]]
    table = align_tables(str(report.accuracy_table()).lstrip()).rstrip()
    return "\n".join([table, *verdicts, *str(report.notes()).splitlines()])
