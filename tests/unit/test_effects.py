from dataclasses import replace

import matplotlib.colors
import numpy as np
import pytest
from synthetic import example_results

from report.figures import effects_figure, model_colours, png, sweep_figure


def comparison(model, difference, p_holm, baseline="student"):
    """Of the example report, with other numbers."""
    (example,) = example_results()["comparisons"]
    interval = (difference - 0.01, difference + 0.01)
    return replace(example, model=model, baseline=baseline, difference=difference, ci95=interval, p_holm=p_holm)


def test_effects_are_sorted_with_their_intervals_and_hollow_if_indistinguishable():
    rows = [
        comparison("a", 0.005, p_holm=0.3),
        comparison("b", -0.02, p_holm=0.01),
        comparison("c", 0.03, p_holm=0.001),
    ]
    axes = effects_figure(rows).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["c", "a", "b"]
    assert axes.yaxis_inverted()
    intervals, points = axes.collections
    np.testing.assert_allclose([line[:, 0] for line in intervals.get_segments()], [(2, 4), (-0.5, 1.5), (-3, -1)])
    np.testing.assert_allclose(points.get_offsets()[:, 0], [3, 0.5, -2])
    hollow = [matplotlib.colors.to_hex(face) == "#ffffff" for face in points.get_facecolors()]
    assert hollow == [False, True, False]
    assert "accuracy minus that of student" in axes.get_xlabel()
    both = effects_figure([*rows, comparison("d", 0.1, 0.01, baseline="other")]).axes[0]
    assert both.get_yticklabels()[0].get_text() == "d − other"


def entry(mean):
    return {"accuracy": {"mean": mean, "ci95": (mean - 0.02, mean + 0.01)}}


@pytest.mark.parametrize("values", [(1.0, 2.0, 4.0), ("kd", "dkd", "dist")])
def test_a_sweep_shows_each_accuracy_with_its_interval(values):
    points = [
        ({"first": value, "alpha": alpha}, entry(0.5 + 0.1 * n + alpha / 10))
        for n, value in enumerate(values)
        for alpha in (0.0, 0.5)
    ]
    figure = sweep_figure(points, {"student": entry(0.6)}, model_colours(["student"]))
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
    assert png(figure).startswith(b"\x89PNG")
