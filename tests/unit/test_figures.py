from dataclasses import replace

import numpy as np
import sklearn.metrics
from conftest import DRAW
from synthetic import example_results, probabilities_of, some_logits

from config import PRESETS
from engine.recipes import Recipe
from report import figures
from report.comparisons import Comparison
from report.metrics import Evaluated

RECORD = {"epoch": 1, "loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.4}
HOSTILE = ("a|b", "two\nlines", "$\\frac{", "plain")


def model(logits) -> Evaluated:
    """Two seeds of one epoch each."""
    history, temperatures = {0: [RECORD], 1: [RECORD]}, {0: 2.0, 1: 2.0}
    return Evaluated(Recipe(), {0: logits, 1: logits}, history, temperatures=temperatures)


def comparison(classes) -> Comparison:
    (example,) = example_results()["comparisons"]
    return replace(example, per_class={name: {"difference": 0.01, "ci95": (-0.1, 0.2)} for name in classes})


def test_figures_accept_any_names():
    labels = np.array([0, 1, 2, 3, 3, 0])
    predictions = np.array([0, 1, 2, 3, 0, 0])
    counts = sklearn.metrics.confusion_matrix(labels, predictions)
    scores = np.array(sklearn.metrics.precision_recall_fscore_support(labels, predictions)[:3]).T
    support = np.bincount(labels)
    logits, colours = some_logits(n=30)[0], figures.model_colours(HOSTILE)
    models = {name: model(logits) for name in HOSTILE}
    probabilities = {name: probabilities_of(logits) for name in HOSTILE[:3]}
    for figure in (
        figures.confusion_figure(counts, HOSTILE, "x"),
        figures.report_figure(scores, support, HOSTILE, "x"),
        figures.curves_figure(models, colours),
        figures.confusion_difference_figure(counts, counts.T, HOSTILE, "x"),
        figures.class_differences_figure(comparison(HOSTILE), "black"),
        figures.effects_figure([replace(comparison(HOSTILE), model=name) for name in HOSTILE]),
        figures.reliability_figure(models, np.arange(30) % 4, colours),
        figures.gallery_figure(np.zeros((7, 3, 9, 3), np.uint8), np.arange(7) % 4, probabilities, HOSTILE, colours),
    ):
        assert DRAW(figure).startswith(b"\x89PNG")


def test_figures_of_many_classes_have_a_bounded_size():
    classes = tuple(f"class {number}" for number in range(150))
    counts = np.eye(150, dtype=int)
    scores, support = np.full((150, 3), 0.7), np.full(150, 3)
    for figure in (
        figures.confusion_figure(counts, classes, "x"),
        figures.report_figure(scores, support, classes, "x"),
        figures.confusion_difference_figure(counts, counts, classes, "x"),
        figures.class_differences_figure(comparison(classes), "black"),
    ):
        assert figure.get_size_inches().max() < 15


def test_the_confusion_figure_has_true_classes_as_rows():
    counts = np.array([[8, 2], [0, 10]])
    axes = figures.confusion_figure(counts, ("cat", "dog"), "model").axes[0]
    assert [text.get_text() for text in axes.texts] == ["8", "2", "0", "10"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog"]
    np.testing.assert_allclose(axes.collections[0].get_array().ravel(), [80, 20, 0, 100])


def test_the_difference_figure_is_model_minus_baseline_in_points_of_the_true_class():
    axes = figures.confusion_difference_figure(
        np.array([[9, 1], [0, 10]]), np.array([[16, 4], [0, 20]]), ("cat", "dog"), "x"
    ).axes[0]
    np.testing.assert_allclose(axes.collections[0].get_array().ravel(), [10, -10, 0, 0], atol=1e-12)
    assert [text.get_text() for text in axes.texts] == ["+10.0", "-10.0", "", ""]
    low, high = axes.collections[0].get_clim()
    assert low == -high


def test_colours_do_not_depend_on_the_selection():
    recipes = PRESETS["cifar10"].recipes
    colours = figures.model_colours(recipes)
    assert len(set(colours.values())) == len(recipes)
    logits, labels = some_logits(n=30)
    models = {"student_kd": model(logits)}
    axes = figures.curves_figure(models, colours).axes[0]
    assert axes.lines[0].get_color() == colours["student_kd"]
    axes = figures.reliability_figure(models, labels, colours).axes[0]
    assert colours["student_kd"] in {line.get_color() for line in axes.lines}
