import dataclasses
import json
import math
import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.metrics
import torch
import torchvision
from conftest import flags, random_images
from PIL import Image

import custom_resnet
import evaluate
from config import PRESETS, UserError, parse
from evaluate import (
    brier_score,
    confusion_difference_figure,
    confusion_figure,
    curves_figure,
    detectable_difference,
    detectable_over_seeds,
    expected_calibration_error,
    fit_temperature,
    holm,
    mcnemar_p,
    negative_log_likelihood,
    paired_bootstrap,
    paired_t_p,
    report_figure,
    seeds_needed,
    seeds_needed_after_one,
    student_t_cdf,
    student_t_quantile,
    t_interval,
    table,
    wilson_interval,
)
from utils import (
    checkpoint_path,
    load_checkpoint,
    load_dataset,
    resize,
    resize_taps,
    resolve,
    save_checkpoint,
    tensors_digest,
)

# Statistics against SciPy, or a plain loop


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (47, 50), (9420, 10_000), (1, 10_000)])
def test_wilson_interval(correct, n):
    expected = scipy.stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_refuses_what_is_no_proportion():
    for correct, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="wilson_interval takes"):
            wilson_interval(correct, n)


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (5, 5), (4, 12), (12, 4), (180, 219), (219, 180), (5000, 4900)])
def test_mcnemar_p(pair):
    expected = scipy.stats.binomtest(pair[0], sum(pair), 0.5).pvalue if sum(pair) else 1.0
    assert mcnemar_p(*pair) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 9, 30])
def test_student_t(df):
    for t in (-30.0, -2.0, 0.0, 0.3, 1.0, 4.5):
        assert student_t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), abs=1e-12)
    for p in (0.5, 0.8, 0.975, 0.999):
        assert student_t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-9, abs=1e-12)


def test_intervals_and_p_over_seeds():
    values = np.array([0.941, 0.945, 0.938, 0.949])
    expected = scipy.stats.t.interval(0.95, 3, values.mean(), scipy.stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    differences = np.array([0.004, -0.001, 0.003])
    assert paired_t_p(differences) == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue)
    assert paired_t_p(np.array([0.96, 0.95]) - np.array([0.956, 0.946])) is None  # equal up to rounding


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_bootstrap_is_that_of_a_plain_loop(seeds):
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [100, 50, 150])
    model, baseline = random.random((seeds, 300)) < 0.8, random.random((seeds, 300)) < 0.7
    differences, draws = model.mean(1) - baseline.mean(1), []
    for _ in range(4000):
        images = np.concatenate([random.choice(np.flatnonzero(labels == c), (labels == c).sum()) for c in (0, 1, 2)])
        draws.append(model[:, images].mean() - baseline[:, images].mean())
        if seeds > 1:  # the mean over the seeds, as far off as Student's t says
            error = differences.std(ddof=1) / math.sqrt(seeds)
            draws[-1] += error * scipy.stats.t.rvs(seeds - 1, random_state=random)
    expected = np.quantile(draws, [0.025, 0.975])
    assert paired_bootstrap(model, baseline, labels) == pytest.approx(expected, abs=0.008)
    if seeds == 1:
        spread = np.std(draws)
        assert math.sqrt(evaluate.image_variance(model, baseline, labels)) == pytest.approx(spread, rel=0.05)


def simulated_seeds(random, seeds: int, n: int, difference: float, seed_std: float, shared: float) -> dict:
    """Two models over several seeds: a true difference, how much seeds differ, and images that are harder for one."""
    easier = random.normal(0, shared, n)  # in points of probability, the same in every seed
    recipes, logits = PRESETS["cifar10"].recipes, {"student": {}, "student_kd": {}}
    for seed in range(seeds):
        gain = difference + random.normal(0, seed_std) + easier
        luck = random.random(n)
        right = {"student": luck < 0.5, "student_kd": luck < 0.5 + gain}
        for name, r in right.items():
            logits[name][seed] = np.stack([r, ~r], 1).astype(np.float32)
    return {name: evaluate.Evaluated(recipes[name], by_seed, {}) for name, by_seed in logits.items()}


@pytest.mark.parametrize(("seeds", "seed_std"), [(2, 0.01), (3, 0.01), (5, 0.01), (3, 0.0)])
def test_over_seeds_the_interval_covers_and_equal_models_are_rarely_called_different(seeds, seed_std):
    random, labels, said, covered = np.random.default_rng(0), np.zeros(2000, dtype=int), Counter(), 0
    for _ in range(300):
        (comparison,) = evaluate.compare_all(simulated_seeds(random, seeds, 2000, 0.0, seed_std, 0.05), labels)
        said[comparison["verdict"]] += 1
        covered += comparison["ci95"][0] <= 0 <= comparison["ci95"][1]
    assert said["better"] + said["worse"] <= 0.05 * 300 + 7  # two standard deviations
    assert covered >= 0.95 * 300 - 8


@pytest.mark.parametrize(("seeds", "shared"), [(3, 0.02), (5, 0.15)])
def test_over_seeds_the_detectable_difference_is_found_about_four_times_in_five(seeds, shared):
    """Once where the seeds decide, once where the test images do, which are drawn anew each time."""
    random, labels = np.random.default_rng(0), np.zeros(2000, dtype=int)
    pilot = [simulated_seeds(random, 100, 2000, 0.0, 0.005, shared) for _ in range(3)]
    entries = [evaluate.compare_all(models, labels)[0] for models in pilot]
    std = np.mean([entry["std"] for entry in entries])
    right = [{m: np.stack([p == 0 for p in models[m].predictions.values()]) for m in models} for models in pilot]
    images = np.mean([evaluate.image_variance(r["student_kd"], r["student"], labels) for r in right])
    difference = detectable_over_seeds(std, images, seeds)
    verdicts = [
        evaluate.compare_all(simulated_seeds(random, seeds, 2000, difference, 0.005, shared), labels)[0]["verdict"]
        for _ in range(200)
    ]
    assert 0.68 <= verdicts.count("better") / 200 <= 0.92
    assert verdicts.count("worse") == 0


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    labels, covered = np.zeros(400, dtype=int), 0
    for _ in range(200):
        model, baseline = random.random((1, 400)) < 0.85, random.random((1, 400)) < 0.80
        low, high = paired_bootstrap(model, baseline, labels)
        covered += low <= 0.05 <= high
    assert 180 <= covered <= 199  # 190 expected, standard deviation 3


def test_holm_is_the_step_down_procedure():
    random = np.random.default_rng(0)
    for _ in range(50):
        p = (random.random(5) ** 3).tolist()
        for level in (0.01, 0.05, 0.2):  # reject the smallest while p < level / (hypotheses left)
            rejected, left = set(), sorted(range(5), key=lambda i: p[i])
            while left and p[left[0]] < level / len(left):
                rejected.add(left.pop(0))
            assert {i for i, adjusted in enumerate(holm(p)) if adjusted < level} == rejected
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def simulated(random, n: int, discordant: float, difference: float) -> evaluate.Evaluated:
    """Two models of n images that just one of them gets right on a share `discordant`."""
    kinds = random.choice(
        [1, -1, 0], n, p=[(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    )
    recipes = PRESETS["cifar10"].recipes
    right = {"student": kinds != 1, "student_kd": kinds != -1}  # logits of two classes, the label always 0
    return {
        name: evaluate.Evaluated(recipes[name], {0: np.stack([right[name], ~right[name]], 1).astype(np.float32)}, {})
        for name in right
    }


def test_equally_good_models_are_called_different_in_at_most_a_twentieth_of_the_tests():
    random, labels, said = np.random.default_rng(0), np.zeros(2000, dtype=int), Counter()
    for _ in range(1000):
        (comparison,) = evaluate.compare_all(simulated(random, 2000, 0.04, 0.0), labels)
        said[comparison["verdict"]] += 1
    assert said["better"] + said["worse"] <= 50
    assert said["better"] > 0
    assert said["worse"] > 0


def test_a_point_among_ten_thousand_images_is_found_as_often_as_the_power_says():
    random, n, discordant, difference = np.random.default_rng(0), 10_000, 0.06, 0.01
    k = difference / math.sqrt((discordant - difference**2) / n)
    power = scipy.stats.norm.cdf(k - scipy.stats.norm.ppf(0.975))
    verdicts = [
        evaluate.compare_all(simulated(random, n, discordant, difference), np.zeros(n, dtype=int))[0]["verdict"]
        for _ in range(300)
    ]
    assert verdicts.count("worse") == 0
    assert verdicts.count("better") / 300 == pytest.approx(power, abs=0.03)


def test_the_detectable_difference_is_found_four_times_in_five():
    n, discordant = 10_000, 0.04
    difference = detectable_difference(discordant, n)
    random = np.random.default_rng(0)
    draws = random.multinomial(n, [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant], 2000)
    found = np.mean([mcnemar_p(int(b), int(c)) < 0.05 for b, c, _ in draws])
    assert found == pytest.approx(0.8, abs=0.03)
    assert seeds_needed_after_one(difference, discordant, n) == 1
    assert seeds_needed_after_one(difference / 2, discordant, n) == 4


@pytest.mark.parametrize("seeds", [2, 3, 5, 9, 20])
def test_the_power_over_seeds_is_that_of_the_noncentral_t(seeds):
    df, critical = seeds - 1, scipy.stats.t.ppf(0.975, seeds - 1)
    for effect in (0.0, 0.3, 1.0, 3.0, 9.0):
        t = scipy.stats.nct(df, effect * math.sqrt(seeds))
        expected = t.sf(critical) + np.nan_to_num(t.cdf(-critical))  # SciPy has NaN where that is next to nothing
        assert evaluate.t_power(effect, seeds) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_the_detectable_difference_over_seeds_is_found_four_times_in_five(seeds):
    difference = detectable_over_seeds(0.0015, 0.0, seeds)
    random = np.random.default_rng(0)
    found = np.mean([paired_t_p(random.normal(difference, 0.0015, seeds)) < 0.05 for _ in range(3000)])
    assert found == pytest.approx(0.8, abs=0.025)
    assert seeds_needed(difference, 0.0015, 0.0) == seeds


def test_the_number_of_seeds_may_be_out_of_reach():
    assert seeds_needed_after_one(0.0, 0.04, 10_000) is None
    assert seeds_needed_after_one(1e-9, 0.04, 10_000) is None
    assert seeds_needed(1e-9, 0.0015, 0.0) is None
    assert seeds_needed(0.0001, 0.0015, 0.0) == pytest.approx((2.8016 * 15) ** 2, rel=0.07)
    assert seeds_needed(0.002, 0.0015, 0.001**2) is None  # no number of seeds makes the test images more
    assert seeds_needed(0.003, 0.0015, 0.001**2) > seeds_needed(0.003, 0.0015, 0.0)


def test_what_cannot_be_said_is_not_said():
    assert detectable_difference(0.0, 500) is None
    assert detectable_difference(4 / 500, 500) is None  # four images: no p below 0.05 can come of them
    assert detectable_over_seeds(0.0, 0.001, 3) is None


def test_the_originals_own_figures_are_indistinguishable_unless_their_errors_hardly_differ():
    """9,420 of 10,000 right with the teacher and 9,410 without, for every possible overlap of their errors."""
    significant = [only for only in range(581) if mcnemar_p(only + 10, only) < 0.05]
    assert significant == [only for only in range(581) if scipy.stats.binomtest(only, 2 * only + 10).pvalue < 0.05]
    assert significant == [*range(6)]  # at most 20 discordant images, where two such models have about 400


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


def test_a_calibrated_model_has_little_calibration_error_and_a_boastful_one_much():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(10), size=20_000)
    labels = np.array([random.choice(10, p=p) for p in probabilities])
    assert expected_calibration_error(np.log(probabilities), labels) < 0.015
    assert expected_calibration_error(5 * np.log(probabilities), labels) > 0.3


def probabilities_of(logits) -> np.ndarray:
    e = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits, axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def some_logits(n: int = 300, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    return (2 * random.normal(size=(n, classes)) + 2 * np.eye(classes)[labels]).astype(np.float32), labels


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
    rows = evaluate.reliability([logits, logits, logits], labels)  # three seeds that agree narrow nothing
    assert rows.shape == (15, 4)
    for row, b in zip(rows, np.split(order, 15), strict=True):
        low, high = wilson_interval(int(correct[b].sum()), 10)
        assert row == pytest.approx([confidence[b].mean(), correct[b].mean(), low, high])
    errors = np.abs(rows[:, 0] - rows[:, 1]).mean()
    assert expected_calibration_error(logits, labels) == pytest.approx(errors)
    assert len(evaluate.reliability([logits[:5]], labels[:5])) == 5


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_is_that_of_a_general_optimiser(scale):
    logits, labels = some_logits()
    found = fit_temperature(scale * logits, labels)

    def loss(temperature: float) -> float:
        return sklearn.metrics.log_loss(labels, probabilities_of(scale * logits / temperature), labels=range(4))

    best = scipy.optimize.minimize_scalar(loss, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(best.x, rel=1e-5)


def test_an_overconfident_model_gets_its_temperature_back():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(10), size=20_000)
    labels = np.array([random.choice(10, p=p) for p in probabilities])
    logits = 5 * np.log(probabilities)
    temperature = fit_temperature(logits[:10_000], labels[:10_000])  # validation images
    assert temperature == pytest.approx(5, rel=0.03)
    model = evaluate.Evaluated(PRESETS["demo"].recipes["student"], {0: logits[10_000:]}, {}, {0: logits[:10_000]})
    entry = evaluate.model_metrics(
        model, labels[10_000:], tuple("0123456789"), evaluate.temperatures(model, labels[:10_000])
    )
    assert entry["expected_calibration_error"] > 0.3
    assert entry["temperature_scaled"]["expected_calibration_error"] < 0.02
    assert entry["temperature_scaled"]["temperature"] == temperature
    assert entry["temperature_scaled"]["negative_log_likelihood"] < entry["negative_log_likelihood"]


def test_a_temperature_without_a_minimum_stays_within_bounds():
    logits, labels = some_logits()
    assert fit_temperature(logits, logits.argmax(1)) == pytest.approx(0.01)  # all right: the surer the better
    assert fit_temperature(logits, logits.argmin(1)) == pytest.approx(100)
    assert math.isnan(fit_temperature(np.full((3, 2), np.nan), labels[:3] % 2))


def test_divergence_and_entropy_are_those_of_a_plain_loop():
    teacher, student = some_logits(n=50, seed=1)[0], some_logits(n=50, seed=2)[0]
    for temperature in (1.0, 5.0):
        p, q = (probabilities_of(z / temperature) for z in (teacher, student))
        expected = np.mean(
            [sum(a * math.log(a / b) for a, b in zip(*pair, strict=True)) for pair in zip(p, q, strict=True)]
        )
        assert evaluate.kl_divergence(teacher, student, temperature) == pytest.approx(expected, rel=1e-6)
        found = evaluate.soft_target_metrics(teacher, temperature)
        assert found["entropy"] == pytest.approx(scipy.stats.entropy(p, axis=1).mean(), rel=1e-6)
        assert found["confidence"] == pytest.approx(p.max(axis=1).mean(), rel=1e-6)
    certain = evaluate.soft_target_metrics(np.array([[1e4, 0.0, 0.0]]), 1.0)
    assert certain == {"entropy": 0.0, "confidence": 1.0}
    assert evaluate.soft_target_metrics(np.zeros((1, 3)), 1.0)["entropy"] == pytest.approx(math.log(3))


def three_models(n: int = 200) -> tuple[dict[str, evaluate.Evaluated], np.ndarray]:
    """Teacher with seeds 0 and 1, student with 1 and 2, student_kd with 0, 1 and 2."""
    seeds = {"teacher": (0, 1), "student": (1, 2), "student_kd": (0, 1, 2)}
    labels = some_logits(n)[1]
    models = {
        name: evaluate.Evaluated(
            PRESETS["cifar10"].recipes[name],
            {seed: some_logits(n, seed=10 * number + seed)[0] + 2 * np.eye(4)[labels] for seed in of_model},
            {},
        )
        for number, (name, of_model) in enumerate(seeds.items(), 1)
    }
    return models, labels


def test_fidelity_is_that_of_a_plain_loop_over_the_common_seeds():
    models, labels = three_models()
    taught, alone = evaluate.fidelity(models, labels)
    assert (taught["model"], taught["teacher"], taught["seeds"]) == ("student_kd", "teacher", [0, 1])
    assert (alone["model"], alone["teacher"], alone["seeds"], alone["temperature"]) == ("student", "teacher", [1], 5.0)
    for row in (taught, alone):
        same, same_where_wrong, divergences = [], [], []
        for seed in row["seeds"]:
            v, z = models["teacher"].logits[seed], models[row["model"]].logits[seed]
            for image, label in enumerate(labels):
                agrees = v[image].argmax() == z[image].argmax()
                same.append(agrees)
                if v[image].argmax() != label:
                    same_where_wrong.append(agrees)
            p, q = probabilities_of(v / 5), probabilities_of(z / 5)
            divergences.append((p * np.log(p / q)).sum(1).mean())
        assert row["agreement"] == pytest.approx(np.mean(same))
        assert row["agreement_where_teacher_wrong"] == pytest.approx(np.mean(same_where_wrong))
        assert row["teacher_wrong"] == len(same_where_wrong) > 0
        assert row["kl_at_temperature"] == pytest.approx(np.mean(divergences))
    del models["teacher"]
    assert evaluate.fidelity(models, labels) == []


def test_a_teacher_that_is_never_wrong_has_no_mistakes_to_share():
    models, _ = three_models()
    (row, *_) = evaluate.fidelity(
        {
            "teacher": models["teacher"]._replace(logits={0: models["teacher"].logits[0]}),
            "student_kd": models["student_kd"],
        },
        models["teacher"].predictions[0],
    )
    assert (row["teacher_wrong"], row["agreement_where_teacher_wrong"]) == (0, None)


def test_differences_by_class_are_the_bootstrap_within_the_class():
    models, labels = three_models()
    comparison = evaluate.compare("student_kd", "student", models, labels, ("a", "b", "c", "d", "never"))
    first, second = (np.stack([models[m].predictions[s] == labels for s in (1, 2)]) for m in ("student_kd", "student"))
    for label, name in enumerate("abcd"):
        of_class = labels == label
        entry = comparison["per_class"][name]
        assert entry["difference"] == pytest.approx(first[:, of_class].mean() - second[:, of_class].mean())
        expected = paired_bootstrap(first[:, of_class], second[:, of_class], labels[of_class])
        assert entry["ci95"] == pytest.approx(expected)
    assert comparison["per_class"]["never"] == {"difference": None, "ci95": None}


def test_the_most_confused_pairs():
    counts = np.array([[8, 2, 0], [5, 5, 0], [1, 0, 0]])
    assert evaluate.most_confused(counts, ("a", "b", "c"), most=2) == [
        {"true": "b", "predicted": "a", "count": 5, "share": 0.5},
        {"true": "a", "predicted": "b", "count": 2, "share": 0.2},
    ]
    assert evaluate.most_confused(np.eye(3, dtype=int), ("a", "b", "c")) == []


def test_the_gallery_shows_images_on_which_the_models_disagree():
    models, _ = three_models()
    gallery = evaluate.disagreements("student_kd", models)
    assert gallery["seed"] == 1  # the only one that all three have
    said = np.stack([models[m].predictions[1] for m in gallery["models"]])
    disagree = {image for image in range(200) if len(set(said[:, image])) > 1}
    assert set(gallery["shown"]) < disagree
    assert (gallery["count"], len(set(gallery["shown"]))) == (len(disagree), 12)
    assert gallery == evaluate.disagreements("student_kd", models)
    assert evaluate.disagreements("student", models) is None  # has no teacher
    alike = {name: model._replace(logits={1: models["teacher"].logits[1]}) for name, model in models.items()}
    assert evaluate.disagreements("student_kd", alike) is None
    apart = {**models, "student": models["student"]._replace(logits={2: models["student"].logits[2]})}
    assert evaluate.disagreements("student_kd", apart) is None  # no seed that all three have


# Cost


@pytest.mark.parametrize(("arch", "giga"), [("resnet50", 4.09), ("resnet18", 1.81), ("resnext50_32x4d", 4.23)])
def test_the_cost_is_that_of_the_literature(arch, giga):
    published = torchvision.models.get_model_weights(arch).DEFAULT.meta
    cost = evaluate.count_cost(arch, 1000, 224)
    assert cost["parameters"] == published["num_params"]
    assert cost["multiply_accumulates"] / 1e9 == pytest.approx(giga, abs=0.006)
    assert cost["multiply_accumulates"] / 1e9 == pytest.approx(published["_ops"], abs=0.001)


def test_each_architecture_is_timed_once_and_however_slow_it_is_three_times(config, digits):
    timed = evaluate.time_architectures(["resnet18"], config, digits, batch_size=600, seconds=0)
    cost = timed["resnet18"]
    assert (cost["latency_ms"]["n"], cost["images_per_second"]["n"]) == (15, 3)
    assert cost["images_per_second"]["batch_size"] == 600  # more than there are test images
    for entry in (cost["latency_ms"], cost["images_per_second"]):
        low, high = entry["quartiles"]
        assert 0 < low <= entry["median"] <= high


@pytest.mark.parametrize(
    ("changes", "baseline"),
    [
        ({}, "student"),
        ({"teacher": {"arch": "resnet18"}}, "student"),
        ({"student": {"arch": "resnet34"}}, None),
        ({"student": {"arch": "resnet34"}, "teacher": {"arch": "resnet18"}}, "teacher"),  # self-distillation
        ({"student_kd": {"baseline": "teacher"}}, "teacher"),
    ],
)
def test_a_taught_model_is_compared_with_its_architecture_without_a_teacher(changes, baseline):
    recipes = PRESETS["cifar10"].recipes
    models = {
        name: evaluate.Evaluated(dataclasses.replace(recipe, **changes.get(name, {})), {}, {})
        for name, recipe in recipes.items()
    }
    assert evaluate.baseline_of("student_kd", models) == baseline
    assert evaluate.baseline_of("student", models) is None


# The report


@pytest.fixture(scope="module")
def report(trained):
    evaluate.main([*flags(trained), "--seeds", "0", "1"])
    return trained / "imgs" / "demo"


def test_a_run_leaves_every_file_of_the_design(report):
    files = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    of_models = ("confusion_matrix.png", "classification_report.png", "classification_report.txt")
    of_comparisons = ("class_differences.png", "confusion_difference.png", "disagreements.png")
    assert files == {
        *(f"{model}/{file}" for model in ("teacher", "student", "student_kd") for file in of_models),
        *(f"student_kd/{file}" for file in of_comparisons),
        *("training_curves.png", "reliability.png", "results.md", "results.json", "predictions.npz"),
    }


def test_predictions_alone_reproduce_every_number(report):
    results = json.loads((report / "results.json").read_text())
    arrays = np.load(report / "predictions.npz")
    labels, models = arrays["labels"], ("teacher", "student", "student_kd")
    assert sorted(arrays.files) == sorted(["labels", *(f"{model}/seed{seed}" for model in models for seed in (0, 1))])
    assert (results["run"], results["dataset"], results["n_test"]) == ("demo", "digits", 500)
    predictions = {model: [arrays[f"{model}/seed{seed}"].argmax(1) for seed in (0, 1)] for model in models}
    for model, entry in results["models"].items():
        accuracies = [sklearn.metrics.accuracy_score(labels, p) for p in predictions[model]]
        assert entry["accuracy"]["seeds"] == pytest.approx({"0": accuracies[0], "1": accuracies[1]})
        assert entry["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
        assert entry["accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
        pooled = np.tile(labels, 2), np.concatenate(predictions[model])
        assert entry["confusion_matrix"] == sklearn.metrics.confusion_matrix(*pooled).tolist()
        recalls = sklearn.metrics.recall_score(*pooled, average=None)
        assert list(entry["per_class"].values()) == pytest.approx(list(recalls))
        probabilities = [probabilities_of(arrays[f"{model}/seed{seed}"]) for seed in (0, 1)]
        losses = [sklearn.metrics.log_loss(labels, p, labels=range(10)) for p in probabilities]
        assert entry["negative_log_likelihood"] == pytest.approx(np.mean(losses), rel=1e-6)
        scores = [((p - np.eye(10)[labels]) ** 2).sum(1).mean() for p in probabilities]
        assert entry["brier_score"] == pytest.approx(np.mean(scores), rel=1e-6)
        assert entry["temperature_scaled"] is None
        pair, counts = entry["most_confused"][0], np.array(entry["confusion_matrix"])
        assert pair["count"] == (counts - np.diag(np.diag(counts))).max()
        assert pair["count"] == counts[int(pair["true"]), int(pair["predicted"])]
        text = (report / model / "classification_report.txt").read_text()
        assert text == sklearn.metrics.classification_report(*pooled, digits=4, zero_division=0)
    (comparison,) = results["comparisons"]
    assert (comparison["model"], comparison["baseline"]) == ("student_kd", "student")
    right = {model: np.array([p == labels for p in predictions[model]]) for model in models}
    difference = right["student_kd"].mean(1) - right["student"].mean(1)
    assert comparison["difference"] == pytest.approx(difference.mean())
    assert comparison["p_value"] == pytest.approx(scipy.stats.ttest_1samp(difference, 0).pvalue)
    first = Counter(zip(right["student_kd"][0].tolist(), right["student"][0].tolist(), strict=True))
    b, c = first[True, False], first[False, True]
    assert comparison["mcnemar_p"]["0"] == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue)
    for name, entry in comparison["per_class"].items():
        of_class = labels == int(name)
        by_class = right["student_kd"][:, of_class].mean() - right["student"][:, of_class].mean()
        assert entry["difference"] == pytest.approx(by_class)
    said = np.array([predictions[model][0] for model in comparison["disagreements"]["models"]])
    assert comparison["disagreements"]["count"] == (said != said[0]).any(0).sum()
    assert (said != said[0]).any(0)[comparison["disagreements"]["shown"]].all()
    taught, alone = results["fidelity"]
    for row in (taught, alone):
        agreement = [(predictions["teacher"][s] == predictions[row["model"]][s]).mean() for s in (0, 1)]
        assert row["agreement"] == pytest.approx(np.mean(agreement))


def test_the_cost_and_the_soft_targets_are_those_of_the_files(report, trained):
    results = json.loads((report / "results.json").read_text())
    for name, model in results["models"].items():
        path = trained / f"checkpoints/demo/seed0/{name}.pt"
        parameters = [t for key, t in load_checkpoint(path)["model"].items() if "running" not in key]
        parameters = sum(t.numel() for t in parameters if t.is_floating_point())
        assert (model["cost"]["parameters"], model["cost"]["bytes_on_disk"]) == (parameters, path.stat().st_size)
    (row,) = results["soft_targets"]
    assert (row["model"], row["teacher"], row["images"], row["seeds"]) == ("student_kd", "teacher", 100, [0, 1])
    entropies = []
    for seed in (0, 1):
        logits = load_checkpoint(trained / f"checkpoints/demo/seed{seed}/teacher.logits")["logits"][0]
        shown = logits[~logits.isnan().any(1)].numpy()
        assert len(shown) == 100
        entropies.append(scipy.stats.entropy(probabilities_of(shown / row["temperature"]), axis=1).mean())
    assert row["entropy_at_temperature"] == pytest.approx(np.mean(entropies), rel=1e-5)


def small(trained, *more: str):
    config = resolve(parse([*flags(trained), *more]))
    return config, load_dataset(config)


def test_soft_targets_without_a_file_or_with_one_of_another_teacher_are_computed(trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    config, dataset = small(tmp_path)
    recipe, path = config.recipes["student_kd"], checkpoint_path(config, "teacher", 0)
    digest = tensors_digest(load_checkpoint(path)["model"])
    read, labels = evaluate.logits_for_student(config, dataset, recipe, 0, digest)
    assert sorted(labels) == sorted(dataset.train.labels[dataset.subset(100)].tolist())
    file = path.with_suffix(".logits")
    state = load_checkpoint(file)
    foreign = {**state, "made_with": {**state["made_with"], "teacher": "another"}, "logits": state["logits"] + 1}
    for spoil in (lambda: save_checkpoint(file, foreign), lambda: file.write_bytes(b"junk"), file.unlink):
        spoil()
        computed, computed_labels = evaluate.logits_for_student(config, dataset, recipe, 0, digest)
        order, computed_order = np.lexsort((*read.T, labels)), np.lexsort((*computed.T, computed_labels))
        np.testing.assert_allclose(computed[computed_order], read[order], atol=1e-4)
    some, of_some = evaluate.logits_for_student(config, dataset, recipe, 0, digest, most=30)
    assert len(some) == 30
    assert max(Counter(of_some).values()) - min(Counter(of_some).values()) <= 2


def test_with_validation_images_the_report_scales_by_their_temperature(trained, tmp_path, capsys):
    small_run = ["--validation_size", "100", "--only", "student", f"--checkpoints_path={tmp_path}/checkpoints"]
    small_run += [f"--imgs_path={tmp_path}/imgs", "--student.epochs", "1"]
    custom_resnet.main([*flags(trained), *small_run])
    evaluate.main([*flags(trained), *small_run])
    entry = json.loads((tmp_path / "imgs/demo/results.json").read_text())["models"]["student"]
    arrays = np.load(tmp_path / "imgs/demo/predictions.npz")
    assert {"validation/labels", "validation/student/seed0"} < set(arrays.files)
    assert arrays["validation/student/seed0"].shape == (100, 10)
    temperature = fit_temperature(arrays["validation/student/seed0"], arrays["validation/labels"])
    scaled = probabilities_of(arrays["student/seed0"] / temperature)
    assert entry["temperature_scaled"]["temperature"] == pytest.approx(temperature)
    expected = sklearn.metrics.log_loss(arrays["labels"], scaled, labels=range(10))
    assert entry["temperature_scaled"]["negative_log_likelihood"] == pytest.approx(expected, rel=1e-6)
    text = (tmp_path / "imgs/demo/results.md").read_text()
    assert "scaled: Brier score" in text
    assert "## Fidelity" not in text
    assert all((tmp_path / "imgs/demo" / path).is_file() for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))


def test_the_table_is_printed_with_a_column_for_each_recipe(report, trained, capsys):
    evaluate.main([*flags(trained), "--only", "student", "teacher", "--imgs_path", str(trained / "one_seed")])
    printed = capsys.readouterr().out.splitlines()
    assert [word.strip() for word in printed[0].strip("|").split("|")] == ["accuracy (%)", "teacher", "student"]
    assert len(printed) == 2 + 10 + 3
    results = json.loads((trained / "one_seed/demo/results.json").read_text())
    entry = results["models"]["student"]["accuracy"]
    assert entry["std"] is None
    assert entry["ci95"] == pytest.approx(wilson_interval(round(500 * entry["mean"]), 500))
    assert f"{100 * entry['mean']:.2f}" in printed[-3]
    error = results["models"]["student"]["expected_calibration_error"]
    assert f"{100 * error:.1f}" in printed[-1]


def test_the_markdown_report_shows_figures_that_exist(report):
    text = (report / "results.md").read_text()
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert {f"{model}/confusion_matrix.png" for model in ("teacher", "student", "student_kd")} < set(shown)
    assert len(shown) == len(set(shown)) == 4 + 4
    assert all((report / path).is_file() for path in shown)
    assert text.splitlines()[2].startswith("- student_kd is ")  # the verdict, right under the title
    kept = r"(keeps [\d.]+% of|is [\d.]+ points more accurate than) teacher('s accuracy)?"
    assert re.search(rf"student_kd {kept}, at \d+% of its time per image", text)
    headings = ["Set-up", "Accuracy", "Cost", "Calibration", "Fidelity", "Where they differ", "Training", "Environment"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == headings
    assert not re.search(r"\bNone\b|\bnan\b", text)


def test_missing_checkpoints_are_named_and_the_others_evaluated(trained, tmp_path, capsys):
    evaluate.main([*flags(trained), "--seeds", "1", "2", "--imgs_path", str(tmp_path)])
    told = capsys.readouterr()
    for model in ("teacher", "student", "student_kd"):
        assert f"not trained yet, left out: {trained}/checkpoints/demo/seed2/{model}.pt" in told.err
    assert "overall" in told.out
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(results["models"]["teacher"]["accuracy"]["seeds"]) == ["1"]
    assert len(results["missing"]) == 3
    text = (tmp_path / "demo" / "results.md").read_text()
    assert "seeds: 1." in text
    assert text.count("seed2") == 3


def test_nothing_trained_is_an_error_that_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags(tmp_path))
    assert exit.value.code == 2
    assert "train first: python teacher_student_model.py" in capsys.readouterr().err


def test_a_checkpoint_with_other_settings_is_not_reported_under_these(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*flags(trained), "--student.epochs", "7", "--imgs_path", str(tmp_path)])
    assert exit.value.code == 2
    assert "student.epochs was 2, is now 7" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Figures and tables


HOSTILE = ("a|b", "two\nlines", "$\\frac{", "plain")


def test_a_model_whose_logits_are_no_numbers_does_not_end_the_report():
    labels = np.array([0, 1, 1])
    model = evaluate.Evaluated(PRESETS["demo"].recipes["student"], {0: np.full((3, 2), np.nan, np.float32)}, {})
    entry = evaluate.model_metrics(model, labels, ("a", "b"))
    assert entry["expected_calibration_error"] is None
    assert (entry["negative_log_likelihood"], entry["brier_score"]) == (None, None)
    fitted = evaluate.temperatures(model._replace(validation_logits=model.logits), labels)
    entry = evaluate.model_metrics(model, labels, ("a", "b"), fitted)
    assert set(entry["temperature_scaled"].values()) == {None}
    json.dumps(entry, allow_nan=False)


def test_two_seeds_that_differ_alike_are_indistinguishable():
    right = np.ones((2, 500), dtype=bool)
    worse = right.copy()
    worse[:, :2] = False
    recipes = PRESETS["cifar10"].recipes
    models = {
        name: evaluate.Evaluated(recipes[name], {s: np.stack([r[s], ~r[s]], 1).astype(float) for s in (0, 1)}, {})
        for name, r in (("student", worse), ("student_kd", right))
    }
    (comparison,) = evaluate.compare_all(models, np.zeros(500, dtype=int))
    assert comparison["p_value"] is None
    assert comparison["verdict"] == "indistinguishable"
    assert "no t-test, as all seeds differ alike" in evaluate.comparison_sentence(comparison)
    assert comparison["detectable_difference"] is comparison["seeds_needed"] is None


def test_a_column_of_one_character_is_a_column():
    assert table(["", "a"], [[1, 2]]).splitlines()[1] == "| :-- | --: |"


def test_a_table_keeps_its_shape_whatever_the_names_are():
    lines = table(["class", *HOSTILE], [[name, 1, 2, 3, 4] for name in HOSTILE]).splitlines()
    assert len(lines) == 6
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines)


def test_figures_draw_whatever_the_names_are():
    labels = np.array([0, 1, 2, 3, 3, 0])
    predictions = np.array([0, 1, 2, 3, 0, 0])
    counts = sklearn.metrics.confusion_matrix(labels, predictions)
    report = sklearn.metrics.classification_report(labels, predictions, target_names=HOSTILE, output_dict=True)
    record = {"epoch": 1, "loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.4}
    logits, colours = some_logits(n=30)[0], evaluate.model_colours(HOSTILE)
    by_model = {name: [logits] for name in HOSTILE}
    differences = {name: {"difference": 0.01, "ci95": (-0.1, 0.2)} for name in HOSTILE}
    said = {name: probabilities_of(logits) for name in HOSTILE[:3]}
    for figure in (
        confusion_figure(counts, HOSTILE, "x"),
        report_figure(report, HOSTILE, "x"),
        curves_figure({name: {0: [record], 1: [record]} for name in HOSTILE}),
        confusion_difference_figure(counts, counts.T, HOSTILE, "x"),
        evaluate.class_differences_figure({**differences, "none": {"difference": None, "ci95": None}}, "x", "black"),
        evaluate.reliability_figure(by_model, np.arange(30) % 4, colours, by_model),
        evaluate.gallery_figure(np.zeros((7, 3, 9, 3), np.uint8), np.arange(7) % 4, said, HOSTILE, colours),
    ):
        assert evaluate.png(figure).startswith(b"\x89PNG")


def test_figures_of_many_classes_stay_of_bounded_size():
    classes = tuple(f"class {number}" for number in range(150))
    counts = np.eye(150, dtype=int)
    rows = {name: {"precision": 1.0, "recall": 0.5, "f1-score": 0.7, "support": 3} for name in classes}
    report = {**rows, "macro avg": rows["class 0"], "weighted avg": rows["class 0"]}
    differences = {name: {"difference": 0.01, "ci95": (-0.1, 0.2)} for name in classes}
    for figure in (
        confusion_figure(counts, classes, "x"),
        report_figure(report, classes, "x"),
        confusion_difference_figure(counts, counts, classes, "x"),
        evaluate.class_differences_figure(differences, "x", "black"),
    ):
        assert figure.get_size_inches().max() < 15


def test_the_confusion_figure_has_true_classes_as_rows():
    counts = np.array([[8, 2], [0, 10]])
    axes = confusion_figure(counts, ("cat", "dog"), "model").axes[0]
    assert [text.get_text() for text in axes.texts] == ["8", "2", "0", "10"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog"]
    np.testing.assert_allclose(axes.collections[0].get_array().ravel(), [80, 20, 0, 100])


def test_the_difference_figure_is_model_minus_baseline_in_points_of_the_true_class():
    axes = confusion_difference_figure(
        np.array([[9, 1], [0, 10]]), np.array([[16, 4], [0, 20]]), ("cat", "dog"), "x"
    ).axes[0]
    np.testing.assert_allclose(axes.collections[0].get_array().ravel(), [10, -10, 0, 0], atol=1e-12)
    assert [text.get_text() for text in axes.texts] == ["+10.0", "-10.0", "", ""]
    low, high = axes.collections[0].get_clim()
    assert low == -high


def test_a_model_has_the_same_colour_in_every_figure_and_every_selection():
    recipes = PRESETS["cifar10"].recipes
    colours = evaluate.model_colours(recipes)
    assert len(set(colours.values())) == len(recipes)
    record = {"epoch": 1, "loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.4}
    axes = curves_figure({"student_kd": {0: [record]}}, colours).axes[0]
    assert axes.lines[0].get_color() == colours["student_kd"]
    logits, labels = some_logits(n=30)
    axes = evaluate.reliability_figure({"student_kd": [logits]}, labels, colours, {}).axes[0]
    assert colours["student_kd"] in {line.get_color() for line in axes.lines}


# --predict


@pytest.fixture
def digit_files(tmp_path, digits):
    """The first three test images as files: PNG, enlarged, and one that a camera has laid on its side."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in digits.test.images[:3].cpu()]
    images[0].save(tmp_path / "0.png")
    images[1].resize((80, 80), Image.Resampling.BILINEAR).convert("L").save(tmp_path / "1.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    images[2].rotate(90, expand=True).save(tmp_path / "2.png", exif=exif)
    return [str(tmp_path / name) for name in ("0.png", "1.bmp", "2.png")]


def test_predict_says_what_each_model_thinks_of_each_file(trained, digit_files, report, capsys):
    evaluate.main([*flags(trained), "--seeds", "0", "1", "--dataset", "no/such/folder", "--predict", *digit_files])
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert len(blocks) == 3
    arrays = np.load(report / "predictions.npz")
    columns = [f"{model} seed {seed}" for model in ("teacher", "student", "student_kd") for seed in (0, 1)]
    for number, block in enumerate(blocks):
        rows = [[word.strip() for word in line.strip("|").split("|")] for line in block.splitlines()]
        assert rows[0] == [digit_files[number], *columns]
        assert [row[0] for row in rows[2:]] == ["**class**", *"0123456789"]
        if number == 1:  # has been enlarged before: other pixels
            continue
        for column, name in enumerate(columns, 1):
            p = probabilities_of(arrays[name.replace(" seed ", "/seed")][number : number + 1])[0]
            assert rows[2][column] == f"**{p.argmax()}**"
            assert [float(row[column]) for row in rows[3:]] == pytest.approx(list(100 * p), abs=0.051)


def test_predict_names_every_file_that_it_cannot_read(trained, digit_files, tmp_path, capsys, monkeypatch):
    names = ["junk.png", "cut.png", "gone.png", "hostile\x1b[31m\n\udcff.png"]
    paths = [str(tmp_path / name) for name in names]
    (tmp_path / "junk.png").write_bytes(b"junk")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*flags(trained), "--predict", *paths, digit_files[0]])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ("junk.png", "cut.png", "gone.png", r"hostile\x1b[31m\n\udcff.png"), strict=True):
        assert f"{tmp_path}/{name}: cannot be read as an image (" in line
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the enlarged digit has 6,400: a bomb, by this measure
    with pytest.raises(UserError, match="exceeds limit of"):
        evaluate.read_images(digit_files)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # ... and only suspicious by this one
    with pytest.raises(UserError, match="exceeds limit of"):
        evaluate.read_images(digit_files)


def test_predict_without_a_checkpoint_or_a_file_says_what_to_do(trained, digit_files, tmp_path, capsys):
    for words, told in (
        ([*flags(tmp_path), "--predict", digit_files[0]], "train first: python teacher_student_model.py"),
        ([*flags(trained), "--predict"], "--predict: expected at least one argument"),
        ([*flags(trained), "--predict", digit_files[0], "--export"], "not allowed with argument --predict"),
        ([*flags(trained), "--pedict", digit_files[0]], "did you mean --predict?"),
    ):
        with pytest.raises(SystemExit) as exit:
            evaluate.main(words)
        assert exit.value.code == 2
        assert told in capsys.readouterr().err


def test_hostile_file_names_do_not_break_the_table(trained, digit_files, tmp_path, capsys):
    path = tmp_path / "a|b\x1b[31m\n.png"
    shutil.copy(digit_files[0], path)
    evaluate.main([*flags(trained), "--only", "student", "--predict", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 10
    assert lines[0].startswith(f"| {tmp_path}/a\\|b\\\\x1b[31m\\\\n.png | student seed 0")


# --export


@pytest.mark.parametrize("after", [16, 32, 224])
def test_the_exported_resize_has_the_weights_of_pillow(after):
    for before in (*range(1, 3 * after, max(1, after // 16)), 299, 500, 640, 1024):
        expected = torch.zeros(after, before, dtype=torch.float64)
        for index, weight in resize_taps(before, after, torch.device("cpu")):
            expected[torch.arange(after), index] += weight
        if before != after:
            assert torch.equal(evaluate.resize_matrix(before, after), expected), before


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (8, 8), (16, 16), (31, 31), (32, 32), (33, 33), (64, 64), (299, 299), (7, 25), (1, 20)],
)
def test_the_exported_resize_has_the_bits_of_pil(height, width):
    images = random_images(3, height, width)
    found = evaluate.resize_by_matrices(images, 32)
    assert torch.equal(found.to(torch.uint8), resize(images, 32))
    for image, resized in zip(images, found, strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(np.asarray(expected), resized.permute(1, 2, 0).numpy())


def test_the_exported_resize_is_that_of_the_training_for_every_shape():
    for height, width in ((40, 20), (20, 40), (100, 33), (33, 300)):
        images = random_images(2, height, width)
        assert torch.equal(evaluate.resize_by_matrices(images, 32).to(torch.uint8), resize(images, 32))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The small experiment with its taught student exported."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    evaluate.main([*flags(folder), "--seeds", "0", "--export"])
    return folder


def test_export_writes_the_taught_students_or_those_that_are_named(exported, capsys):
    assert [path.name for path in exported.rglob("*.pt2")] == ["student_kd.pt2"]
    evaluate.main([*flags(exported), "--seeds", "1", "--only", "student", "--export"])
    assert {str(path.relative_to(exported / "checkpoints/demo")) for path in exported.rglob("*.pt2")} == {
        "seed0/student_kd.pt2",
        "seed1/student.pt2",
    }
    told = capsys.readouterr().err
    assert "the same class on all 500 test images" in told
    assert f"{exported}/checkpoints/demo/seed1/student.pt2, 44." in told


def test_the_exported_student_needs_only_torch_and_is_as_accurate_to_the_image(
    exported, trained, report, digits, script, tmp_path
):
    arrays = np.load(report / "predictions.npz")
    torch.save({"images": digits.test.images.cpu(), "labels": digits.test.labels.cpu()}, tmp_path / "test.pt")
    program = """
import sys, torch
test = torch.load(sys.argv[2])
model = torch.export.load(sys.argv[1]).module()
probabilities = model(test["images"])
one = torch.cat([model(image[None]) for image in test["images"][:3]])
large = model(torch.zeros(2, 3, 50, 400, dtype=torch.uint8))
assert "torchvision" not in sys.modules and "evaluate" not in sys.modules
print((probabilities.argmax(1) == test["labels"]).sum().item(), (one - probabilities[:3]).abs().max().item() < 1e-5)
print(tuple(large.shape), probabilities.dtype, not probabilities.requires_grad)
torch.save(probabilities, sys.argv[3])
"""
    path = exported / "checkpoints/demo/seed0/student_kd.pt2"
    done = script("-c", program, path, tmp_path / "test.pt", tmp_path / "out.pt", cwd=tmp_path)
    right = int((arrays["student_kd/seed0"].argmax(1) == arrays["labels"]).sum())
    assert done.stdout == f"{right} True\n(2, 10) torch.float32 True\n", done.stderr
    found = torch.load(tmp_path / "out.pt").numpy()
    np.testing.assert_allclose(found, probabilities_of(arrays["student_kd/seed0"]), atol=1e-4)


def test_an_export_says_which_classes_it_knows(exported):
    about = {"about.json": ""}
    torch.export.load(str(exported / "checkpoints/demo/seed0/student_kd.pt2"), extra_files=about)
    expected = {"name": "student_kd", "seed": 0, "classes": list("0123456789"), "image_size": 16}
    assert json.loads(about["about.json"]) == expected


@pytest.mark.parametrize("spoiled", ["program", "numbers"])
def test_an_export_that_is_not_the_checkpoint_is_removed(exported, spoiled, monkeypatch, capsys):
    write = evaluate.export_program

    def wrong(model, image_size, about):
        with torch.no_grad():
            model.fc.bias[3] += torch.nan if spoiled == "numbers" else 2
        return write(model, image_size, about)

    monkeypatch.setattr(evaluate, "export_program", wrong)
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*flags(exported), "--only", "teacher", "--export"])
    assert exit.value.code == 2
    assert "is not the checkpoint's" in capsys.readouterr().err
    assert not os.path.exists(exported / "checkpoints/demo/seed0/teacher.pt2")


def test_export_without_a_checkpoint_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*flags(tmp_path), "--export"])
    assert exit.value.code == 2
    assert "train first: python teacher_student_model.py" in capsys.readouterr().err
