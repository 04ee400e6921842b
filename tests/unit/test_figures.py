import numpy as np
import sklearn.metrics
from synthetic import probabilities_of, some_logits

from config import PRESETS
from report import figures

HOSTILE = ("a|b", "two\nlines", "$\\frac{", "plain")


def test_figures_accept_any_names():
    labels = np.array([0, 1, 2, 3, 3, 0])
    predictions = np.array([0, 1, 2, 3, 0, 0])
    counts = sklearn.metrics.confusion_matrix(labels, predictions)
    scores = np.array(sklearn.metrics.precision_recall_fscore_support(labels, predictions)[:3]).T
    support = np.bincount(labels)
    record = {"epoch": 1, "loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.4}
    logits, colours = some_logits(n=30)[0], figures.model_colours(HOSTILE)
    by_model = {name: [logits] for name in HOSTILE}
    differences = {name: {"difference": 0.01, "ci95": (-0.1, 0.2)} for name in HOSTILE}
    probabilities = {name: probabilities_of(logits) for name in HOSTILE[:3]}
    for figure in (
        figures.confusion_figure(counts, HOSTILE, "x"),
        figures.report_figure(scores, support, HOSTILE, "x"),
        figures.curves_figure({name: {0: [record], 1: [record]} for name in HOSTILE}, colours),
        figures.confusion_difference_figure(counts, counts.T, HOSTILE, "x"),
        figures.class_differences_figure(differences, "x", "black"),
        figures.reliability_figure(by_model, np.arange(30) % 4, colours, by_model),
        figures.gallery_figure(np.zeros((7, 3, 9, 3), np.uint8), np.arange(7) % 4, probabilities, HOSTILE, colours),
    ):
        assert figures.png(figure).startswith(b"\x89PNG")


def test_figures_of_many_classes_have_a_bounded_size():
    classes = tuple(f"class {number}" for number in range(150))
    counts = np.eye(150, dtype=int)
    scores, support = np.full((150, 3), 0.7), np.full(150, 3)
    differences = {name: {"difference": 0.01, "ci95": (-0.1, 0.2)} for name in classes}
    for figure in (
        figures.confusion_figure(counts, classes, "x"),
        figures.report_figure(scores, support, classes, "x"),
        figures.class_differences_figure(differences, "x", "black"),
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
    record = {"epoch": 1, "loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.4}
    axes = figures.curves_figure({"student_kd": {0: [record]}}, colours).axes[0]
    assert axes.lines[0].get_color() == colours["student_kd"]
    logits, labels = some_logits(n=30)
    axes = figures.reliability_figure({"student_kd": [logits]}, labels, colours, {}).axes[0]
    assert colours["student_kd"] in {line.get_color() for line in axes.lines}
