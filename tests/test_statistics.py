import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

from report.statistics import (
    accuracy_interval,
    detectable_difference,
    detectable_over_seeds,
    holm,
    image_variance,
    mcnemar_p,
    paired_interval,
    paired_t_p,
    seeds_needed,
    seeds_needed_after_one,
    t_power,
    variance_over_images,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (47, 50), (9420, 10_000), (1, 10_000)])
def test_wilson_interval(correct, n):
    expected = scipy.stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_refuses_invalid_proportions():
    for correct, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="wilson_interval takes"):
            wilson_interval(correct, n)


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (5, 5), (4, 12), (12, 4), (180, 219), (219, 180), (500, 450)])
def test_mcnemar_p(pair):
    n, fewer = sum(pair), min(pair)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))  # of 2^n equally likely outcomes, on each side
    assert mcnemar_p(*pair) == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2**n))), rel=1e-9)


def test_paired_t_p():
    differences = np.array([0.004, -0.001, 0.003])
    t = 0.002 / (np.sqrt(0.000007) / np.sqrt(3))  # deviations 2, -3 and 1 thousandths: variance 14e-6 / 2
    assert paired_t_p(differences) == pytest.approx(1 - t / math.sqrt(2 + t**2))  # closed form for 2 degrees of freedom
    assert paired_t_p(np.array([0.96, 0.95]) - np.array([0.956, 0.946])) is None  # equal up to rounding


def test_accuracy_interval_is_wilsons_for_one_seed_and_wider_for_several():
    random = np.random.default_rng(0)
    correct = random.random((3, 400)) < np.array([[0.80], [0.85], [0.88]])
    assert accuracy_interval(correct[:1]) == pytest.approx(wilson_interval(int(correct[0].sum()), 400))
    mean = correct.mean()
    wilson = wilson_interval(mean * 1200, 1200)  # no image is harder than another: each seed is a new sample
    t = scipy.stats.t.interval(0.95, 2, mean, scipy.stats.sem(correct.mean(1)))
    low, high = accuracy_interval(correct)
    assert mean - low == pytest.approx(math.hypot(mean - wilson[0], mean - t[0]))
    assert high - mean == pytest.approx(min(1 - mean, math.hypot(wilson[1] - mean, t[1] - mean)))
    same = np.tile(correct[:1], (2, 1))  # a second seed that errs on the same images says nothing more about them
    assert accuracy_interval(same) == pytest.approx(accuracy_interval(same[:1]))


def test_the_variance_over_images_is_that_of_a_model_with_known_components():
    random = np.random.default_rng(0)
    for seeds in (2, 5):
        found = [
            variance_over_images(
                random.normal(0, 0.3, 500) + random.normal(0, 2.0, (seeds, 1)) + random.normal(0, 0.5, (seeds, 500))
            )
            for _ in range(300)
        ]
        assert np.mean(found) == pytest.approx(0.3**2, rel=0.05)  # neither the seeds nor the interaction
    assert variance_over_images(np.array([[1.0, 2.0, 4.0, 1.0]])) == pytest.approx(1.5)


def crossed(random, seeds: int, n: int, seed_std: float) -> tuple[np.ndarray, np.ndarray]:
    """Two models (S, n) of equal true accuracy 2/3; half of the images are equally hard for both."""
    hard = random.beta(2, 1, n)
    other = np.where(random.random(n) < 0.5, hard, random.beta(2, 1, n))
    luck = random.normal(0, seed_std, (2, seeds, 1))
    return tuple(random.random((seeds, n)) < p + shift for p, shift in zip((hard, other), luck, strict=True))


@pytest.mark.parametrize(("seeds", "seed_std"), [(3, 0.0), (5, 0.0), (5, 0.01)])
def test_intervals_over_several_seeds_cover_the_truth_and_are_not_too_wide(seeds, seed_std):
    random, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(500):
        model, baseline = crossed(random, seeds, 1000, seed_std)
        for which, (interval, true) in enumerate(
            ((paired_interval(model, baseline), 0), (accuracy_interval(model), 2 / 3))
        ):
            covered[which] += interval[0] <= true <= interval[1]
    assert (covered >= 0.935 * 500).all()
    assert (covered <= 0.99 * 500).all()


@pytest.mark.parametrize(("seeds", "n"), [(5, 36), (5, 50), (10, 36)])
def test_accuracy_intervals_cover_the_truth_with_few_errors(seeds, n):
    """3% of the images are too hard for all seeds, and each seed errs on 1% of the others."""
    random, covered, true = np.random.default_rng(0), 0, 0.97 * 0.99
    for _ in range(500):
        low, high = accuracy_interval((random.random((seeds, n)) > 0.01) & (random.random(n) > 0.03))
        covered += low <= true <= high
    assert covered >= 0.935 * 500


def test_paired_interval_is_agresti_and_mins_for_one_seed():
    random = np.random.default_rng(0)
    model, baseline = random.random((1, 60)) < 0.8, random.random((1, 60)) < 0.7
    b, c = int((model & ~baseline).sum()) + 0.5, int((baseline & ~model).sum()) + 0.5  # half an image in each cell
    n = 60 + 2
    error = math.sqrt((b + c) - (b - c) ** 2 / n) / n
    expected = (b - c) / n - 1.959964 * error, (b - c) / n + 1.959964 * error
    assert paired_interval(model, baseline) == pytest.approx(expected, rel=1e-6)
    right = np.ones((1, 2), dtype=bool)
    assert paired_interval(right, ~right)[1] <= 1


def test_paired_interval_agrees_with_a_bootstrap():
    random = np.random.default_rng(0)
    model, baseline = random.random((1, 300)) < 0.8, random.random((1, 300)) < 0.7
    resampled = (random.integers(0, 300, 300) for _ in range(4000))
    draws = [model[:, images].mean() - baseline[:, images].mean() for images in resampled]
    assert paired_interval(model, baseline) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.012)
    assert math.sqrt(image_variance(model, baseline)[1]) == pytest.approx(np.std(draws), rel=0.05)


@pytest.mark.parametrize("per_class", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_paired_intervals_have_nominal_coverage_from_one_image_per_class(per_class, difference):
    """50 classes; the two models share most of their errors."""
    random, n, covered = np.random.default_rng(0), 50 * per_class, 0
    for _ in range(1000):
        luck = random.random((1, n))
        other = np.where(random.random(n) < 0.6, luck, random.random((1, n)))
        low, high = paired_interval(luck < 0.6 + difference, other < 0.6)
        covered += low <= difference <= high
    assert 930 <= covered <= 970


def test_holm_agrees_with_the_step_down_procedure():
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


def test_the_detectable_difference_has_80_percent_power():
    n, discordant = 10_000, 0.04
    difference = detectable_difference(discordant, n)
    random = np.random.default_rng(0)
    draws = random.multinomial(n, [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant], 2000)
    found = np.mean([mcnemar_p(int(b), int(c)) < 0.05 for b, c, _ in draws])
    assert found == pytest.approx(0.8, abs=0.03)
    assert seeds_needed_after_one(difference, discordant, n) == 1
    assert seeds_needed_after_one(difference / 2, discordant, n) == 4


@pytest.mark.parametrize("seeds", [2, 3, 5, 9, 20])
def test_t_power_agrees_with_simulation(seeds):
    random = np.random.default_rng(0)
    for effect in (0.0, 0.3, 1.0, 3.0, 9.0):
        drawn = random.normal(effect, 1, (20_000, seeds))
        found = (scipy.stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean()
        assert t_power(effect, seeds) == pytest.approx(found, abs=0.012)  # 3.4 standard deviations at most


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_the_detectable_difference_over_seeds_has_80_percent_power(seeds):
    difference = detectable_over_seeds(0.0015, 0.0, seeds)
    random = np.random.default_rng(0)
    found = np.mean([paired_t_p(random.normal(difference, 0.0015, seeds)) < 0.05 for _ in range(3000)])
    assert found == pytest.approx(0.8, abs=0.025)
    assert seeds_needed(difference, 0.0015, 0.0) == seeds


def test_seeds_needed_is_none_when_out_of_reach():
    assert seeds_needed_after_one(0.0, 0.04, 10_000) is None
    assert seeds_needed_after_one(1e-9, 0.04, 10_000) is None
    assert seeds_needed(1e-9, 0.0015, 0.0) is None
    assert seeds_needed(0.0005, 0.0015, 0.0) == pytest.approx((2.8016 * 3) ** 2, rel=0.07)
    assert seeds_needed(0.0004, 0.0015, 0.0) is None  # 110
    assert seeds_needed(0.002, 0.0015, 0.001**2) is None  # no number of seeds makes the test images more
    assert seeds_needed(0.003, 0.0015, 0.001**2) > seeds_needed(0.003, 0.0015, 0.0)


def test_undetectable_differences_are_none():
    assert detectable_difference(0.0, 500) is None
    assert detectable_difference(4 / 500, 500) is None  # four images: no p below 0.05 can come of them
    assert detectable_over_seeds(0.0, 0.001, 3) is None


def test_the_originals_gain_is_significant_only_with_few_discordant_images():
    """9,420 of 10,000 right with the teacher and 9,410 without, for every possible overlap of their errors."""
    significant = [only for only in range(581) if mcnemar_p(only + 10, only) < 0.05]
    assert significant == [only for only in range(581) if scipy.stats.binomtest(only, 2 * only + 10).pvalue < 0.05]
    assert significant == [*range(6)]  # at most 20 discordant images, where two such models have about 400
