"""The report's files: results.json, predictions.npz, tables in CSV, figures and results.md."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from matplotlib import style
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, precision_recall_fscore_support

from engine.console import log
from engine.datasets import Dataset
from engine.device import environment
from engine.files import replace_files
from engine.settings import Config
from engine.sweeps import Grid
from engine.training import best_epoch
from report import figures
from report.comparisons import (
    Comparison,
    Models,
    TrainingLogits,
    compare_all,
    disagreements,
    fidelity,
    not_compared,
    soft_targets,
)
from report.cost import costs, versus_teacher
from report.markdown import Results, results_markdown
from report.metrics import Evaluated, confusion_counts, fit_temperature, log_probabilities, model_metrics

# Every file of a report but its sweeps' figures. Those of an earlier one that a report does not have are removed.
FIGURES = (
    *("accuracy", "training_curves", "reliability", "effects", "*/confusion_matrix", "*/classification_report"),
    *("*/class_differences", "*/confusion_difference", "*/disagreements"),
)
FILES = (
    *("results.md", "results.json", "predictions.npz", "history.csv", "predictions.csv", "*/classification_report.txt"),
    *(f"{figure}{suffix}" for figure in FIGURES for suffix in (".png", ".pdf")),
)


@style.context("default")  # whatever the user's matplotlibrc says
def write_report(
    config: Config,
    dataset: Dataset,
    models: Models,
    training_logits: TrainingLogits,
    missing: list[Path],
    pdf: bool = False,
) -> Results:
    """Write every file of the report in place of an earlier one's, and return what results.json holds.

    `pdf` writes each figure as a PDF file, too, for a paper.
    """
    labels, folder = dataset.test.labels.cpu().numpy(), Path(config.imgs_path, config.run)
    arrays = {"labels": labels}
    arrays |= {f"{name}/seed{seed}": logits for name, model in models.items() for seed, logits in model.logits.items()}
    if dataset.validation:
        held_out = arrays["validation/labels"] = dataset.validation.labels.cpu().numpy()
        for name, model in models.items():
            arrays |= {f"validation/{name}/seed{seed}": z for seed, z in model.validation_logits.items()}
        models = {name: with_temperatures(model, held_out) for name, model in models.items()}
    results = collect(config, dataset, models, training_logits, missing, labels)
    colours = figures.model_colours(config.recipes)
    if problem := figures.choose_fonts([*dataset.classes, *models]):
        log.info(problem)
    drawn = itertools.chain(
        model_figures(models, labels, dataset.classes, colours),
        run_figures(config, results, colours),
        *(comparison_figures(comparison, dataset, models, labels, colours) for comparison in results["comparisons"]),
    )
    files = {}
    for name, figure in drawn:
        files[f"{name}.png"] = figures.png(figure)
        if pdf:
            files[f"{name}.pdf"] = figures.pdf(figure)
    for name, model in models.items():
        files[f"{name}/classification_report.txt"] = classification_reports(model, labels, dataset.classes).encode()
    files["history.csv"] = history_csv(models)
    images = [dataset.names[i] for i in dataset.test.ids] if dataset.names and dataset.test.ids is not None else None
    files["predictions.csv"] = predictions_csv(models, labels, dataset.classes, images or range(len(labels)))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    files["predictions.npz"] = buffer.getvalue()
    files["results.json"] = (json.dumps(results, indent=2, allow_nan=False, default=as_json) + "\n").encode()
    files["results.md"] = results_markdown(results).encode()
    of_sweeps = [f"sweep_{row}{suffix}" for row in config.recipes.keys() | config.swept for suffix in (".png", ".pdf")]
    earlier = {path for pattern in (*FILES, *of_sweeps) for path in folder.glob(pattern)}
    replace_files(folder, files, stale=earlier - {folder / name for name in files})
    return results


def with_temperatures(model: Evaluated, labels: np.ndarray) -> Evaluated:
    """The model with temperatures that are fitted to its validation logits and their labels."""
    fitted = {seed: fit_temperature(logits, labels) for seed, logits in model.validation_logits.items()}
    return model._replace(temperatures=fitted)


def collect(
    config: Config,
    dataset: Dataset,
    models: Models,
    training_logits: TrainingLogits,
    missing: list[Path],
    labels: np.ndarray,
) -> Results:
    classes, cost = dataset.classes, costs(config, dataset, models)
    comparisons = compare_all(models, labels, classes, recipes=config.recipes)
    return {
        "run": config.run,
        "dataset": config.dataset,
        "classes": list(classes),
        "n_test": len(labels),
        # in which training images are shifted and augmented, and then resized; unknown without them
        "stored_size": list(dataset.train.images.shape[2:]) if dataset.has_training_images else None,
        "models": {
            name: {
                **model_metrics(model, labels, classes),
                "kept_epochs": kept_epochs(model),
                "weights": {str(seed): digest for seed, digest in model.digests.items()},
                "cost": cost.get(name),
            }
            for name, model in models.items()
        },
        "comparisons": [dataclasses.replace(c, disagreements=disagreements(c, models)) for c in comparisons],
        "not_compared": not_compared(models),
        "versus_teacher": versus_teacher(models, cost, labels),
        "fidelity": fidelity(models, labels),
        "soft_targets": soft_targets(models, training_logits),
        "sweeps": {
            row: [{"row": name, "values": values} for name, values in points.items()]
            for row, points in sweeps(config, models).items()
        },
        "missing": [str(path) for path in missing],
        "unreadable": list(dataset.unreadable),
        "shared_images": dataset.shared,  # how many test images are training images, too
        "settings": {
            **dataclasses.asdict(config),
            "recipes": {name: dataclasses.asdict(model.recipe) for name, model in models.items()},
        },
        "environment": {**environment(config), "scikit-learn": sklearn.__version__},
    }


def as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")  # a file's name need not be UTF-8


HISTORY = ("epoch", "loss", "train_accuracy", "validation_accuracy", "test_accuracy", "soft_share", "seconds")


def history_csv(models: Models) -> bytes:
    """A line for each epoch of each model and seed; a cell is empty where there is no such number."""
    rows = [
        (name, seed, *(record.get(column, "") for column in HISTORY))
        for name, model in models.items()
        for seed, history in model.history.items()
        for record in history
    ]
    return as_csv([("model", "seed", *HISTORY), *rows])


def predictions_csv(models: Models, labels: np.ndarray, classes: Sequence[str], images: Sequence[Any]) -> bytes:
    """A line for each test image: its file or number and its label, and each model's class with its probability.

    Images that most models get wrong come first.
    """
    columns: list[tuple[str, Sequence[Any]]] = [("image", images), ("label", [classes[y] for y in labels])]
    wrong = np.zeros(len(labels), dtype=int)
    for name, model in models.items():
        for seed, predicted in model.predictions.items():
            wrong += predicted != labels
            probabilities = log_probabilities(model.logits[seed]).exp().max(1).values
            columns.append((f"{name}/seed{seed}", [classes[c] for c in predicted]))
            columns.append((f"{name}/seed{seed}/probability", [f"{p:.4f}" for p in probabilities]))
    order = np.argsort(-wrong, kind="stable")
    return as_csv([[title for title, _ in columns], *([column[i] for _, column in columns] for i in order)])


def kept_epochs(model: Evaluated) -> dict[str, int]:
    """Of a recipe that keeps the best epoch, that epoch by seed; not of a model that is used as it is."""
    if model.recipe.keep != "best":
        return {}
    return {str(seed): best_epoch(history) for seed, history in model.history.items() if history}


def as_json(comparison: Comparison) -> dict[str, Any]:
    return {**dataclasses.asdict(comparison), "verdict": comparison.verdict}


def sweeps(config: Config, evaluated: Container[str]) -> Grid:
    """The evaluated rows of each sweep that has some. Of sweeps of one row over different settings, the larger one."""
    found: Grid = {}
    for row, points in config.swept.items():
        by_settings: Grid = {}
        for name, values in points.items():
            if name in evaluated:
                by_settings.setdefault(" ".join(values), {})[name] = values
        if by_settings:
            found[row] = max(by_settings.values(), key=len)
    return found


def classification_reports(model: Evaluated, labels: np.ndarray, classes: tuple[str, ...]) -> str:
    """scikit-learn's report for each seed."""
    reports = {
        seed: classification_report(
            labels, predicted, labels=range(len(classes)), target_names=classes, digits=4, zero_division=0
        )
        for seed, predicted in model.predictions.items()
    }
    if len(reports) == 1:
        return next(iter(reports.values()))
    return "\n".join(f"seed {seed}\n{report}" for seed, report in reports.items())


def model_figures(
    models: Models, labels: np.ndarray, classes: tuple[str, ...], colours: dict[str, Any]
) -> Iterator[tuple[str, Figure]]:
    """Name and figure of everything that shows one model, or all of them."""
    scores_of = {
        name: np.mean(
            [
                precision_recall_fscore_support(labels, p, labels=range(len(classes)), zero_division=0)[:3]
                for p in model.predictions.values()
            ],
            axis=0,
        ).T  # (C, 3)
        for name, model in models.items()
    }
    lowest, support = min(scores.min() for scores in scores_of.values()), np.bincount(labels, minlength=len(classes))
    yield "accuracy", figures.accuracy_figure(models, labels, colours)
    for name, model in models.items():
        title, seeds = f"{name}, {model.recipe.logits_file or model.recipe.arch}", len(model.logits)
        counts = confusion_counts(model, labels, len(classes))
        over = f", sum of {seeds} seeds" if seeds > 1 else ""
        yield f"{name}/confusion_matrix", figures.confusion_figure(counts, classes, title + over)
        over = f", mean of {seeds} seeds" if seeds > 1 else ""
        figure = figures.report_figure(scores_of[name], support, classes, title + over, lowest)
        yield f"{name}/classification_report", figure
    yield "training_curves", figures.curves_figure(models, colours)
    yield "reliability", figures.reliability_figure(models, labels, colours)


def run_figures(config: Config, results: Results, colours: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of what shows many rows: the effects, if there are more than two, and each sweep."""
    comparisons, models = results["comparisons"], results["models"]
    if len(comparisons) > 2:
        yield "effects", figures.effects_figure(comparisons)
    for row, points in results["sweeps"].items():
        found = {point["row"]: (point["values"], models[point["row"]]) for point in points}
        shown = [name for c in comparisons if c.model in found for name in (c.baseline, models[c.model]["teacher"])]
        references = {name: models[name] for name in shown if name in models}
        yield f"sweep_{row}", figures.sweep_figure(list(found.values()), references, colours)


def comparison_figures(
    comparison: Comparison, dataset: Dataset, models: Models, labels: np.ndarray, colours: dict[str, Any]
) -> Iterator[tuple[str, Figure]]:
    """Name and figure of everything that shows a model and its baseline."""
    name, baseline, classes = comparison.model, comparison.baseline, dataset.classes
    yield f"{name}/class_differences", figures.class_differences_figure(comparison, colours[name])
    counts = {m: confusion_counts(models[m], labels, len(classes), comparison.seeds) for m in (name, baseline)}
    figure = figures.confusion_difference_figure(counts[name], counts[baseline], classes, f"{name} minus {baseline}")
    yield f"{name}/confusion_difference", figure
    if gallery := comparison.disagreements:
        shown = np.array(gallery.shown)
        probabilities = {
            shown_as: log_probabilities(models[m].logits[seed][shown]).exp().numpy()
            for m, (shown_as, seed) in zip(gallery.models, gallery.seeds.items(), strict=True)
        }
        index = torch.as_tensor(shown, device=dataset.test.images.device)
        images = dataset.test.images[index].permute(0, 2, 3, 1).cpu().numpy()
        figure = figures.gallery_figure(images, labels[shown], probabilities, classes, colours)
        yield f"{name}/disagreements", figure
