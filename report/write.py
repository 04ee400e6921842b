"""The report's files: results.json, predictions.npz, figures, and results.md from its template."""

import dataclasses
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import numpy as np
import sklearn
import torch
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, precision_recall_fscore_support

from engine.datasets import Dataset
from engine.device import environment
from engine.errors import escape_control
from engine.estimate import BuildModel
from engine.files import write_durably
from engine.settings import DISTILLATION_FIELDS, Config, Recipe
from report import figures
from report.comparisons import (
    Models,
    TrainingLogits,
    compare_all,
    disagreements,
    fidelity,
    not_compared,
    soft_targets,
)
from report.cost import costs, versus_teacher
from report.metrics import confusion_counts, fit_temperature, log_probabilities, model_metrics

Temperatures = Mapping[str, Mapping[int, float]]  # model -> seed -> temperature fitted to the validation images


def write_report(
    config: Config,
    dataset: Dataset,
    models: Models,
    training_logits: TrainingLogits,
    missing: list[Path],
    build: BuildModel,
) -> dict[str, Any]:
    """Write every file of the report, and return what results.json holds."""
    labels, folder = dataset.test.labels.cpu().numpy(), Path(config.imgs_path, config.run)
    validation_labels = dataset.validation.labels.cpu().numpy() if dataset.validation else None
    temperatures = {
        name: {seed: fit_temperature(z, validation_labels) for seed, z in model.validation_logits.items()}
        for name, model in models.items()
    }
    results = collect(config, dataset, models, training_logits, missing, build, temperatures, labels)
    compared = (comparison_figures(config, dataset, models, labels, c) for c in results["comparisons"])
    drawn = itertools.chain(model_figures(config, dataset, models, labels, temperatures), *compared)
    for path, figure in drawn:
        write_durably(folder / path, figures.png(figure))
    for name, model in models.items():
        reports = {
            f"seed {seed}\n": classification_report(
                labels, p, labels=range(len(dataset.classes)), target_names=dataset.classes, digits=4, zero_division=0
            )
            for seed, p in model.predictions.items()
        }
        text = "\n".join(title * (len(reports) > 1) + report for title, report in reports.items())
        write_durably(folder / name / "classification_report.txt", text.encode())

    arrays = {"labels": labels}
    arrays |= {f"{name}/seed{seed}": logits for name, model in models.items() for seed, logits in model.logits.items()}
    if dataset.validation:
        arrays["validation/labels"] = validation_labels
        for name, model in models.items():
            arrays |= {f"validation/{name}/seed{seed}": z for seed, z in model.validation_logits.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_durably(folder / "predictions.npz", buffer.getvalue())
    write_durably(folder / "results.json", (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
    write_durably(folder / "results.md", results_markdown(results).encode())
    return results


def collect(
    config: Config,
    dataset: Dataset,
    models: Models,
    training_logits: TrainingLogits,
    missing: list[Path],
    build: BuildModel,
    temperatures: Temperatures,
    labels: np.ndarray,
) -> dict[str, Any]:
    """What results.json holds."""
    classes, cost = dataset.classes, costs(build, config, dataset, models)
    return {
        "run": config.run,
        "dataset": config.dataset,
        "classes": list(classes),
        "n_test": len(labels),
        "models": {
            name: {**model_metrics(model, labels, classes, temperatures[name]), "cost": cost[name]}
            for name, model in models.items()
        },
        "comparisons": [
            {**comparison, "disagreements": disagreements(comparison["model"], models)}
            for comparison in compare_all(models, labels, classes)
        ],
        "not_compared": not_compared(models),
        "versus_teacher": versus_teacher(models, cost, labels),
        "fidelity": fidelity(models, labels),
        "soft_targets": soft_targets(models, training_logits),
        "missing": [str(path) for path in missing],
        "settings": {
            **dataclasses.asdict(config),
            "recipes": {name: dataclasses.asdict(model.recipe) for name, model in models.items()},
        },
        "environment": {**environment(config), "scikit-learn": sklearn.__version__},
    }


def model_figures(
    config: Config, dataset: Dataset, models: Models, labels: np.ndarray, temperatures: Temperatures
) -> Iterator[tuple[str, Figure]]:
    """Path and figure of everything that shows one model, or all of them."""
    colours, classes = figures.model_colours(config.recipes), dataset.classes
    for name, model in models.items():
        seeds, title = len(model.logits), f"{name}, {model.recipe.arch}"
        counts = confusion_counts(model, labels, len(classes))
        over = f", sum of {seeds} seeds" * (seeds > 1)
        yield f"{name}/confusion_matrix.png", figures.confusion_figure(counts, classes, title + over)
        scores = [
            precision_recall_fscore_support(labels, p, labels=range(len(classes)), zero_division=0)[:3]
            for p in model.predictions.values()
        ]
        mean, support = np.mean(scores, axis=0).T, np.bincount(labels, minlength=len(classes))  # (C, 3), (C,)
        over = f", mean of {seeds} seeds" * (seeds > 1)
        yield f"{name}/classification_report.png", figures.report_figure(mean, support, classes, title + over)
    histories = {name: model.history for name, model in models.items()}
    yield "training_curves.png", figures.curves_figure(histories, colours)
    scaled = {name: [models[name].logits[s] / t for s, t in by.items()] for name, by in temperatures.items() if by}
    as_trained = {name: list(model.logits.values()) for name, model in models.items()}
    yield "reliability.png", figures.reliability_figure(as_trained, labels, colours, scaled)


def comparison_figures(
    config: Config, dataset: Dataset, models: Models, labels: np.ndarray, comparison: dict[str, Any]
) -> Iterator[tuple[str, Figure]]:
    """Path and figure of everything that shows a model and its baseline."""
    name, baseline, seeds = (comparison[key] for key in ("model", "baseline", "seeds"))
    colours, classes = figures.model_colours(config.recipes), dataset.classes
    title = f"{name} minus {baseline}"
    differences = figures.class_differences_figure(comparison["per_class"], title, colours[name])
    yield f"{name}/class_differences.png", differences
    counts = [confusion_counts(models[m], labels, len(classes), seeds) for m in (name, baseline)]
    yield f"{name}/confusion_difference.png", figures.confusion_difference_figure(*counts, classes, title)
    if gallery := comparison["disagreements"]:
        shown = np.array(gallery["shown"])
        probabilities = {
            m: log_probabilities(models[m].logits[gallery["seed"]][shown]).exp().numpy() for m in gallery["models"]
        }
        index = torch.as_tensor(shown, device=dataset.test.images.device)
        images = dataset.test.images[index].permute(0, 2, 3, 1).cpu().numpy()
        figure = figures.gallery_figure(images, labels[shown], probabilities, classes, colours)
        yield f"{name}/disagreements.png", figure


# Markdown


def escape_markdown(text: Any) -> str:
    """A name as a cell of a Markdown table."""
    return escape_control(" ".join(str(text).split())).replace("\\", r"\\").replace("|", r"\|")


def format_or_none(value: float | None, spec: str) -> str:
    return "none" if value is None else format(value, spec)


def percent(share: float | None, digits: int = 1) -> str:
    return "none" if share is None else f"{100 * share:.{digits}f}"


def interval(bounds: tuple[float, float], digits: int = 1, signed: bool = False) -> str:
    return " to ".join(f"{100 * bound:{'+' * signed}.{digits}f}" for bound in bounds)


def spread(entry: dict[str, Any], spec: str) -> str:
    low, high = entry["quartiles"]
    return f"{entry['median']:{spec}} ({low:{spec}} to {high:{spec}})"


def setting(recipe: dict[str, Any], field: str) -> str:
    value = recipe[field]
    if field in DISTILLATION_FIELDS and not recipe["teacher"]:
        return ""
    return {"train_size": "all"}.get(field, "none") if value is None else str(value).lower()


def significant_classes(per_class: dict[str, dict[str, Any]]) -> str:
    """The classes, ten at most, whose interval excludes 0, each with its difference in points."""
    clear = [
        f"{escape_markdown(name)} ({100 * entry['difference']:+.1f})"
        for name, entry in per_class.items()
        if not entry["ci95"][0] <= 0 <= entry["ci95"][1]
    ]
    return ", ".join(clear[:10]) + f" and {len(clear) - 10} more" * (len(clear) > 10)


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
        "setting": setting,
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
    everything = len(trained) == 1
    return env.get_template("results.md.jinja").make_module(
        {
            **results,
            "seeds": sorted({seed for model in models.values() for seed in model["accuracy"]["seeds"]}, key=int),
            "recipe_fields": [field.name for field in dataclasses.fields(Recipe) if field.name != "baseline"],
            "most_confused": list(itertools.zip_longest(*confused, fillvalue="")),
            "training_environments": [
                ("All models were" if everything else ", ".join(names) + " were", found)
                for names, found in trained.values()
            ],
            "worse_when_scaled": worse_when_scaled,
            "ln": math.log,
        }
    )


def results_markdown(results: dict[str, Any]) -> str:
    return align_tables(re.sub(r"\n{3,}", "\n\n", str(render(results))).strip() + "\n")


def summary(results: dict[str, Any]) -> str:
    """The table of accuracies and the verdicts, for the terminal."""
    report = render(results)
    verdicts = [str(report.verdict(comparison)).strip() for comparison in results["comparisons"]]
    return "\n".join([align_tables(str(report.accuracy_table()).lstrip()).rstrip(), *verdicts])
