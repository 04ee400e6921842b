"""The report's files: results.json, predictions.npz, figures and results.md."""

import dataclasses
import io
import itertools
import json
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, precision_recall_fscore_support

from engine.datasets import Dataset
from engine.device import environment
from engine.files import replace_files
from engine.settings import Config
from engine.sweeps import Grid
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
from report.effects import effects_figure, sweep_figure
from report.markdown import results_markdown
from report.metrics import confusion_counts, fit_temperature, log_probabilities, model_metrics

# Every file of a report. Those of an earlier one that a report does not have are removed.
FILES = (
    *("results.md", "results.json", "predictions.npz", "training_curves.png", "reliability.png", "effects.png"),
    *("sweep_*.png", "*/confusion_matrix.png", "*/classification_report.png", "*/classification_report.txt"),
    *("*/class_differences.png", "*/confusion_difference.png", "*/disagreements.png"),
)

Temperatures = Mapping[str, Mapping[int, float]]  # model -> seed -> temperature fitted to the validation images


def write_report(
    config: Config,
    dataset: Dataset,
    models: Models,
    training_logits: TrainingLogits,
    missing: list[Path],
) -> dict[str, Any]:
    """Write every file of the report in place of an earlier one's, and return what results.json holds."""
    labels, folder = dataset.test.labels.cpu().numpy(), Path(config.imgs_path, config.run)
    validation_labels = dataset.validation.labels.cpu().numpy() if dataset.validation else None
    temperatures = {
        name: {seed: fit_temperature(z, validation_labels) for seed, z in model.validation_logits.items()}
        for name, model in models.items()
    }
    results = collect(config, dataset, models, training_logits, missing, temperatures, labels)
    compared = (comparison_figures(config, dataset, models, labels, c) for c in results["comparisons"])
    drawn = itertools.chain(
        model_figures(config, dataset, models, labels, temperatures), run_figures(config, results), *compared
    )
    files = {path: figures.png(figure) for path, figure in drawn}
    for name, model in models.items():
        reports = {
            f"seed {seed}\n": classification_report(
                labels, p, labels=range(len(dataset.classes)), target_names=dataset.classes, digits=4, zero_division=0
            )
            for seed, p in model.predictions.items()
        }
        text = "\n".join(title * (len(reports) > 1) + report for title, report in reports.items())
        files[f"{name}/classification_report.txt"] = text.encode()

    arrays = {"labels": labels}
    arrays |= {f"{name}/seed{seed}": logits for name, model in models.items() for seed, logits in model.logits.items()}
    if dataset.validation:
        arrays["validation/labels"] = validation_labels
        for name, model in models.items():
            arrays |= {f"validation/{name}/seed{seed}": z for seed, z in model.validation_logits.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    files["predictions.npz"] = buffer.getvalue()
    files["results.json"] = (json.dumps(results, indent=2, allow_nan=False) + "\n").encode()
    files["results.md"] = results_markdown(results).encode()
    earlier = {path for pattern in FILES for path in folder.glob(pattern)}
    replace_files(folder, files, stale=earlier - {folder / name for name in files})
    return results


def collect(
    config: Config,
    dataset: Dataset,
    models: Models,
    training_logits: TrainingLogits,
    missing: list[Path],
    temperatures: Temperatures,
    labels: np.ndarray,
) -> dict[str, Any]:
    """What results.json holds."""
    classes, cost = dataset.classes, costs(config, dataset, models)
    return {
        "run": config.run,
        "dataset": config.dataset,
        "classes": list(classes),
        "n_test": len(labels),
        "stored_size": list(dataset.train.images.shape[2:]),  # in which images are shifted and augmented, then resized
        "models": {
            name: {
                **model_metrics(model, labels, classes, temperatures[name]),
                "weights": {str(seed): digest for seed, digest in model.digests.items()},
                "cost": cost[name],
            }
            for name, model in models.items()
        },
        "comparisons": [
            {**comparison, "disagreements": disagreements(comparison["model"], models)}
            for comparison in compare_all(models, labels, classes, recipes=config.recipes)
        ],
        "not_compared": not_compared(models),
        "versus_teacher": versus_teacher(models, cost, labels),
        "fidelity": fidelity(models, labels),
        "soft_targets": soft_targets(models, training_logits),
        "sweeps": {
            row: [{"row": name, "values": values} for name, values in points.items()]
            for row, points in sweeps(config, models).items()
        },
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


def run_figures(config: Config, results: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Path and figure of what shows many rows: the effects, if there are more than two, and each sweep."""
    if len(results["comparisons"]) > 2:
        yield "effects.png", effects_figure(results["comparisons"])
    models, colours = results["models"], figures.model_colours(config.recipes)
    for row, points in sweeps(config, models).items():
        references = {
            name: models[name]
            for comparison in results["comparisons"]
            for name in (comparison["baseline"], config.recipes[comparison["model"]].teacher)
            if comparison["model"] in points and name in models
        }
        found = [(values, models[name]) for name, values in points.items()]
        yield f"sweep_{row}.png", sweep_figure(found, references, colours)


def sweeps(config: Config, evaluated: Container[str]) -> Grid:
    """The evaluated rows of each sweep that has some. Of sweeps of one row over different settings, the larger one."""
    found: Grid = {}
    for row, points in config.swept.items():
        by_settings: dict[tuple, dict[str, dict[str, Any]]] = {}
        for name, values in points.items():
            if name in evaluated:
                by_settings.setdefault(tuple(values), {})[name] = values
        if by_settings:
            found[row] = max(by_settings.values(), key=len)
    return found


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
            title: log_probabilities(models[m].logits[seed][shown]).exp().numpy()
            for m, (title, seed) in zip(gallery["models"], gallery["seeds"].items(), strict=True)
        }
        index = torch.as_tensor(shown, device=dataset.test.images.device)
        images = dataset.test.images[index].permute(0, 2, 3, 1).cpu().numpy()
        figure = figures.gallery_figure(images, labels[shown], probabilities, classes, colours)
        yield f"{name}/disagreements.png", figure
