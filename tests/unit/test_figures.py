import warnings
from dataclasses import replace

import matplotlib.colors
import numpy as np
import pytest
import sklearn.metrics
from synthetic import example_results, probabilities_of, some_logits

from config import PRESETS
from engine.recipes import Recipe
from report import figures
from report.comparisons import Comparison
from report.metrics import Evaluated
from report.statistics import accuracy_interval

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
        assert figures.png(figure).startswith(b"\x89PNG")


def test_figures_of_many_classes_have_a_bounded_size():
    classes = tuple(f"class {number}" for number in range(150))
    counts = np.eye(150, dtype=int)
    scores, support = np.full((150, 3), 0.7), np.full(150, 3)
    for figure in (
        figures.confusion_figure(counts, classes, "x"),
        figures.report_figure(scores, support, classes, "x"),
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


def effect(model, difference, p_holm, baseline="student"):
    """Of the example report, with other numbers."""
    (example,) = example_results()["comparisons"]
    interval = (difference - 0.01, difference + 0.01)
    return replace(example, model=model, baseline=baseline, difference=difference, ci95=interval, p_holm=p_holm)


def test_effects_are_in_the_order_of_the_rows_with_their_intervals_and_hollow_if_indistinguishable():
    rows = [
        effect("a", 0.005, p_holm=0.3),
        effect("b", -0.02, p_holm=0.01),
        effect("c", 0.03, p_holm=0.001),
    ]
    axes = figures.effects_figure(rows).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.yaxis_inverted()
    intervals, points, ends = axes.collections
    np.testing.assert_allclose([line[:, 0] for line in intervals.get_segments()], [(-0.5, 1.5), (-3, -1), (2, 4)])
    np.testing.assert_allclose(points.get_offsets()[:, 0], [0.5, -2, 3])
    np.testing.assert_allclose(np.sort(ends.get_offsets()[:, 0]), [-3, -1, -0.5, 1.5, 2, 4])
    assert ends.get_zorder() > points.get_zorder()  # an interval narrower than its point is seen
    hollow = [matplotlib.colors.to_hex(face) == "#ffffff" for face in points.get_facecolors()]
    assert hollow == [True, False, False]
    assert "accuracy minus that of student" in axes.get_xlabel()
    both = figures.effects_figure([*rows, effect("d", 0.1, 0.01, baseline="other")]).axes[0]
    assert both.get_yticklabels()[3].get_text() == "d − other"


def entry(mean):
    return {"accuracy": {"mean": mean, "ci95": (mean - 0.02, mean + 0.01)}}


@pytest.mark.parametrize("values", [(1.0, 2.0, 4.0), ("kd", "dkd", "dist")])
def test_a_sweep_shows_each_accuracy_with_its_interval(values):
    points = [
        ({"first": value, "alpha": alpha}, entry(0.5 + 0.1 * n + alpha / 10))
        for n, value in enumerate(values)
        for alpha in (0.0, 0.5)
    ]
    figure = figures.sweep_figure(points, {"student": entry(0.6)}, figures.model_colours(["student"]))
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        f"{v:g}" if isinstance(v, float) else v for v in values
    ]
    (first, second), (reference,) = axes.containers, [line for line in axes.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(first[0].get_ydata(), [50, 60, 70])
    np.testing.assert_allclose(second[0].get_ydata(), [55, 65, 75])
    assert reference.get_ydata()[0] == pytest.approx(60)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["student", "alpha = 0", "alpha = 0.5"]
    intervals = [segment[:, 1].tolist() for segment in first[2][0].get_segments()]
    np.testing.assert_allclose(intervals, [(48, 51), (58, 61), (68, 71)])
    assert figures.png(figure).startswith(b"\x89PNG")


def test_the_accuracy_figure_shows_means_seeds_and_intervals():
    logits, labels = some_logits(n=60)
    other = np.roll(logits, 1, axis=0)
    models = {"a": Evaluated(Recipe(), {0: logits, 1: other}, {}), "b": Evaluated(Recipe(), {0: logits}, {})}
    (axes,) = figures.accuracy_figure(models, labels, figures.model_colours(models)).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    shares = [100 * (z.argmax(1) == labels).mean() for z in (logits, other)]
    seeds, mean, *_ = axes.lines
    np.testing.assert_allclose(seeds.get_xdata(), shares)
    np.testing.assert_allclose(mean.get_xdata(), np.mean(shares))
    low, high = accuracy_interval(models["a"].correct(labels))
    np.testing.assert_allclose(axes.collections[0].get_segments()[0][:, 0], [100 * low, 100 * high])


def test_curves_that_coincide_can_be_told_apart():
    logits = some_logits(n=30)[0]
    models = {name: model(logits) for name in ("a", "b", "c")}
    lines = figures.curves_figure(models, figures.model_colours(models)).axes[0].lines
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths, reverse=True)
    assert min(np.diff(widths[::-1])) > 1  # points: what lies below shows on both sides


def test_reports_of_one_run_have_one_colour_scale():
    limits = [
        figures.report_figure(np.full((3, 3), score), np.ones(3, int), ("a", "b", "c"), "x", lowest=0.32)
        .axes[0]
        .collections[0]
        .get_clim()
        for score in (0.4, 0.95)
    ]
    assert limits == [(30, 100), (30, 100)]


def test_class_names_are_drawn_with_fonts_that_have_their_characters(monkeypatch):
    circled = "\u20dd"  # in STIXGeneral, which comes with matplotlib, and not in DejaVu Sans
    assert figures.choose_fonts(["cat", f"dog{circled}"]) is None
    assert "STIXGeneral" in matplotlib.rcParams["font.family"]
    own = [font for font in figures.font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(figures.font_manager.fontManager, "ttflist", own)
    assert "\u732b" in figures.choose_fonts(["cat", "\u732b"])
    with warnings.catch_warnings(record=True) as said:
        figures.choose_fonts(["cat", "\u732b"])
        figures.png(figures.confusion_figure(np.eye(2, dtype=int), ("cat", "\u732b"), "x"))
    assert not said
    assert figures.choose_fonts(["cat"]) is None
