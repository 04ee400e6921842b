import json
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.metrics
import torch
from synthetic import probabilities_of, some_logits

from config import PRESETS
from report.metrics import (
    Evaluated,
    brier_score,
    calibration_error_by_chance,
    expected_calibration_error,
    fit_temperature,
    kl_divergence,
    model_metrics,
    most_confused,
    negative_log_likelihood,
    reliability,
    soft_target_metrics,
)
from report.statistics import wilson_interval


def test_expected_calibration_error():
    random = np.random.default_rng(0)
    logits, labels = 2 * random.normal(size=(1000, 10)), random.integers(0, 10, 1000)
    e = np.exp(logits)
    probabilities = e / e.sum(axis=1, keepdims=True)
    rows = sorted(zip(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, strict=True))
    expected, start = 0.0, 0
    for size in [67] * 10 + [66] * 5:  # 1000 in 15 bins
        confidence, right = zip(*rows[start : start + size], strict=True)
        expected += size / 1000 * abs(sum(confidence) / size - sum(right) / size)
        start += size
    assert expected_calibration_error(logits, labels) == pytest.approx(expected, rel=1e-9)
    assert expected_calibration_error(torch.tensor(logits), torch.tensor(labels)) == pytest.approx(expected, rel=1e-9)


def test_calibration_error_of_calibrated_and_overconfident_models():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(10), size=20_000)
    labels = np.array([random.choice(10, p=p) for p in probabilities])
    assert expected_calibration_error(np.log(probabilities), labels) < 0.015
    assert expected_calibration_error(5 * np.log(probabilities), labels) > 0.3


def test_the_calibration_error_by_chance_is_that_of_calibrated_models():
    random, measured = np.random.default_rng(0), []
    logits = np.log(random.dirichlet(np.ones(10), size=500))
    for _ in range(100):
        labels = np.array([random.choice(10, p=p) for p in np.exp(logits)])
        measured.append(expected_calibration_error(logits, labels))
    assert calibration_error_by_chance(logits) == pytest.approx(np.mean(measured), rel=0.1)
    assert calibration_error_by_chance(50 * logits) < 0.01  # certain predictions leave little to chance


def test_the_order_of_equally_confident_images_does_not_matter():
    """A constant model that is calibrated, on labels that are sorted as those of a folder are."""
    labels, random = np.repeat(np.arange(4), 125), np.random.default_rng(0)
    logits = np.tile(np.log([0.25, 0.25, 0.25, 0.25]), (500, 1))
    by_chance = []
    for _ in range(200):  # orders
        right = random.permutation(labels == 0)
        by_chance.append(np.mean([abs(0.25 - b.mean()) * len(b) * 15 / 500 for b in np.array_split(right, 15)]))
    assert np.mean(by_chance) == pytest.approx(0.06, abs=0.01)
    assert min(by_chance) <= expected_calibration_error(logits, labels) <= max(by_chance)
    shuffled = random.permutation(labels)
    assert min(by_chance) <= expected_calibration_error(logits, shuffled) <= max(by_chance)
    assert reliability([logits], labels)[:, 1].max() < 0.6  # in the order of the labels, 1.0


def test_the_calibration_error_does_not_depend_on_the_order_of_the_images():
    logits, labels = some_logits()
    order = np.random.default_rng(1).permutation(len(labels))
    error = expected_calibration_error(logits, labels)
    assert expected_calibration_error(logits[order], labels[order]) == pytest.approx(error, rel=1e-12)
    assert expected_calibration_error(logits, labels[order]) != pytest.approx(error, rel=1e-3)


def test_ties_are_the_images_whose_highest_logit_several_classes_share():
    first = np.array([[2.0, 2.0, 1.0], [1.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    second = np.array([[2.0, 1.0, 1.0], [1.0, 3.0, 3.0], [0.0, 0.1, 0.2]])
    model = Evaluated(PRESETS["demo"].recipes["student"], {0: first, 1: second}, {})
    assert model_metrics(model, np.array([0, 1, 2]), tuple("abc"))["ties"] == 2 + 1


def test_likelihood_and_brier_score():
    logits, labels = some_logits()
    probabilities = probabilities_of(logits)
    expected = sklearn.metrics.log_loss(labels, probabilities, labels=range(4))
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected, rel=1e-9)
    one_vs_rest = [sklearn.metrics.brier_score_loss(labels == c, probabilities[:, c]) for c in range(4)]
    assert brier_score(logits, labels) == pytest.approx(sum(one_vs_rest), rel=1e-9)
    sure = np.array([[1e4, 0.0], [1e4, 0.0]])  # certain, once rightly and once wrongly
    assert brier_score(sure, np.array([0, 1])) == 1
    assert negative_log_likelihood(sure, np.array([0, 1])) == 5000


def test_reliability_is_accuracy_in_bins_of_equal_mass_with_the_interval_of_one_seed():
    logits, labels = some_logits(n=150)
    confidence, correct = probabilities_of(logits).max(axis=1), logits.argmax(1) == labels
    order = np.argsort(confidence)
    rows = reliability([logits, logits, logits], labels)  # three seeds that agree narrow nothing
    assert rows.shape == (15, 4)
    for row, b in zip(rows, np.split(order, 15), strict=True):
        low, high = wilson_interval(int(correct[b].sum()), 10)
        assert row == pytest.approx([confidence[b].mean(), correct[b].mean(), low, high])
    errors = np.abs(rows[:, 0] - rows[:, 1]).mean()
    assert expected_calibration_error(logits, labels) == pytest.approx(errors)
    assert len(reliability([logits[:5]], labels[:5])) == 5


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_fit_temperature_agrees_with_a_general_optimiser(scale):
    logits, labels = some_logits()
    logits = scale * logits.astype(np.float64)
    found = fit_temperature(logits, labels)

    def loss(temperature: float) -> float:
        return sklearn.metrics.log_loss(labels, probabilities_of(logits / temperature), labels=range(4))

    best = scipy.optimize.minimize_scalar(loss, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(best.x, rel=1e-5)


def test_fit_temperature_recovers_a_known_temperature():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(10), size=20_000)
    labels = np.array([random.choice(10, p=p) for p in probabilities])
    logits = 5 * np.log(probabilities)
    temperature = fit_temperature(logits[:10_000], labels[:10_000])  # validation images
    assert temperature == pytest.approx(5, rel=0.03)
    model = Evaluated(PRESETS["demo"].recipes["student"], {0: logits[10_000:]}, {}, temperatures={0: temperature})
    entry = model_metrics(model, labels[10_000:], tuple("0123456789"))
    assert entry["expected_calibration_error"] > 0.3
    assert entry["temperature_scaled"]["expected_calibration_error"] < 0.02
    assert entry["temperature_scaled"]["temperature"] == temperature
    assert entry["temperature_scaled"]["negative_log_likelihood"] < entry["negative_log_likelihood"]


def test_fit_temperature_without_a_minimum_stays_within_bounds():
    logits, labels = some_logits()
    assert fit_temperature(logits, logits.argmax(1)) == pytest.approx(0.01)  # all right: the surer the better
    assert fit_temperature(logits, logits.argmin(1)) == pytest.approx(100)
    assert math.isnan(fit_temperature(np.full((3, 2), np.nan), labels[:3] % 2))


def test_divergence_and_entropy_agree_with_a_plain_loop():
    teacher, student = some_logits(n=50, seed=1)[0], some_logits(n=50, seed=2)[0]
    for temperature in (1.0, 5.0):
        p, q = (probabilities_of(z / temperature) for z in (teacher, student))
        expected = np.mean(
            [sum(a * math.log(a / b) for a, b in zip(*pair, strict=True)) for pair in zip(p, q, strict=True)]
        )
        assert kl_divergence(teacher, student, temperature) == pytest.approx(expected, rel=1e-6)
        found = soft_target_metrics(teacher, temperature)
        assert found["entropy"] == pytest.approx(scipy.stats.entropy(p, axis=1).mean(), rel=1e-6)
        assert found["confidence"] == pytest.approx(p.max(axis=1).mean(), rel=1e-6)
    certain = soft_target_metrics(np.array([[1e4, 0.0, 0.0]]), 1.0)
    assert certain == {"entropy": 0.0, "confidence": 1.0}
    assert soft_target_metrics(np.zeros((1, 3)), 1.0)["entropy"] == pytest.approx(math.log(3))


def test_the_most_confused_pairs():
    counts = np.array([[8, 2, 0], [5, 5, 0], [1, 0, 0]])
    assert most_confused(counts, ("a", "b", "c"), most=2) == [
        {"true": "b", "predicted": "a", "count": 5, "share": 0.5},
        {"true": "a", "predicted": "b", "count": 2, "share": 0.2},
    ]
    assert most_confused(np.eye(3, dtype=int), ("a", "b", "c")) == []


def test_metrics_of_nan_logits_are_valid_json():
    labels = np.array([0, 1, 1])
    model = Evaluated(PRESETS["demo"].recipes["student"], {0: np.full((3, 2), np.nan, np.float32)}, {})
    entry = model_metrics(model, labels, ("a", "b"))
    assert entry["expected_calibration_error"] is None
    assert (entry["negative_log_likelihood"], entry["brier_score"]) == (None, None)
    model = model._replace(temperatures={0: fit_temperature(model.logits[0], labels)})
    entry = model_metrics(model, labels, ("a", "b"))
    assert set(entry["temperature_scaled"].values()) == {None}
    json.dumps(entry, allow_nan=False)


def test_balanced_accuracy_is_scikit_learns():
    logits, labels = some_logits(n=300)
    labels[: len(labels) // 2] = 0  # an imbalanced test set
    metrics = model_metrics(
        Evaluated(PRESETS["demo"].recipes["student"], {0: logits}, {0: []}), labels, ("a", "b", "c", "d")
    )
    expected = sklearn.metrics.balanced_accuracy_score(labels, logits.argmax(1))
    assert metrics["balanced_accuracy"] == pytest.approx(expected)
    assert metrics["only_class"] is None


def test_a_model_that_predicts_one_class_in_some_seed_is_reported():
    logits, labels = some_logits(n=60)
    constant = np.tile([0.0, 0.0, 1.0, 0.0], (60, 1)).astype(np.float32)
    model = Evaluated(PRESETS["demo"].recipes["student"], {0: logits, 1: constant}, {0: [], 1: []})
    assert model_metrics(model, labels, ("a", "b", "c", "d"))["only_class"] == "c"


def test_the_share_of_the_soft_loss_is_the_mean_over_seeds():
    logits, labels = some_logits(n=60)
    recipe = PRESETS["demo"].recipes["student_kd"]
    history = {0: [{"soft_share": 0.2}, {"soft_share": 0.4}], 1: [{"soft_share": 0.4}, {"soft_share": 0.8}]}
    share = model_metrics(Evaluated(recipe, {0: logits, 1: logits}, history), labels, tuple("abcd"))["soft_share"]
    assert share == {"first": pytest.approx(0.3), "last": pytest.approx(0.6), "suggested": 0.75}
