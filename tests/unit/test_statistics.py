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
    mcnemar_power,
    paired_interval,
    paired_p,
    paired_t_p,
    power_over_seeds,
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


@pytest.mark.parametrize(("discordant", "n", "level"), [(0.04, 10_000, 0.05), (0.1, 200, 0.05), (0.2, 500, 0.05 / 18)])
def test_the_difference_that_one_seed_detects_has_80_percent_power(discordant, n, level):
    difference = detectable_difference(discordant, n, level)
    random = np.random.default_rng(0)
    shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    drawn = random.multinomial(n, shares, 20_000)[:, :2]
    p = np.minimum(1, 2 * scipy.stats.binom.cdf(drawn.min(1), drawn.sum(1), 0.5))
    assert p[:5] == pytest.approx([mcnemar_p(int(b), int(c)) for b, c in drawn[:5]])
    assert (p < level).mean() == pytest.approx(0.8, abs=0.01)  # 3.5 standard deviations
    assert mcnemar_power(0.0, discordant, n, level) <= level


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("level", [0.05, 0.05 / 18])
def test_power_over_seeds_is_the_t_tests_without_images_and_the_normal_tests_without_seeds(seeds, level):
    critical, normal = scipy.stats.t.ppf(1 - level / 2, seeds - 1), scipy.stats.norm.ppf(1 - level / 2)
    for effect in (0.0, 0.5, 1.0, 3.0):
        shift = effect * math.sqrt(seeds)
        upper, lower = scipy.stats.nct.cdf([critical, -critical], seeds - 1, shift)
        t_test = 1 - upper + np.nan_to_num(lower)  # SciPy has no value for some tails of less than 1e-16
        assert power_over_seeds(0.01 * effect, 0.01, 0.0, seeds, level) == pytest.approx(t_test, abs=1e-4)
        z_test = scipy.stats.norm.sf(normal - effect) + scipy.stats.norm.cdf(-normal - effect)
        assert power_over_seeds(0.01 * effect, 0.0, 0.01**2, seeds, level) == pytest.approx(z_test, abs=1e-9)


@pytest.mark.parametrize("images", [0.0, 0.3, 3.0])  # standard error over images, where that over seeds is 1
@pytest.mark.parametrize("seeds", [3, 10])
def test_the_difference_that_several_seeds_detect_has_80_percent_power(seeds, images):
    """By simulation, with the rule written in another way: an interval over both at Holm's strictest level."""
    random, level, n = np.random.default_rng(0), 0.05 / 18, 40_000
    difference = detectable_over_seeds(0.001 * math.sqrt(seeds), (0.001 * images) ** 2, seeds, level)
    drawn = random.normal(difference, 0.001 * math.sqrt(seeds), (n, seeds)) + random.normal(0, 0.001 * images, (n, 1))
    t, z = scipy.stats.t.ppf(1 - level / 2, seeds - 1), scipy.stats.norm.ppf(1 - level / 2)
    error = drawn.std(1, ddof=1) / math.sqrt(seeds)
    assert (abs(drawn.mean(1)) > np.hypot(t * error, z * 0.001 * images)).mean() == pytest.approx(0.8, abs=0.01)


def test_undetectable_differences_are_none():
    assert detectable_difference(0.0, 500) is None
    assert detectable_difference(4 / 500, 500) is None  # four images: no p below 0.05 can come of them
    assert detectable_over_seeds(0.0, 0.001, 3) is None
    assert detectable_over_seeds(0.5, 0.0, 2, 0.001) is None


def random_pairs(count: int):
    """Pairs of models (S, n), with few and many seeds and images, some of them equal in every seed."""
    random = np.random.default_rng(0)
    for _ in range(count):
        seeds, n = random.integers(1, 7), random.integers(1, 400)
        p, shift = random.random(), random.choice([0.0, 0.05, 0.3])
        baseline = random.random((seeds, n)) < np.where(random.random(n) < 0.5, p, random.random(n))
        correct = np.where(random.random((seeds, n)) < random.random(), baseline, random.random((seeds, n)) < p + shift)
        if shift == 0.05:
            correct, baseline = np.tile(correct[:1], (seeds, 1)), np.tile(baseline[:1], (seeds, 1))
        yield correct, baseline


def test_p_is_below_5_percent_exactly_if_the_interval_excludes_0():
    decided = []
    for correct, baseline in random_pairs(1000):
        low, high = paired_interval(correct, baseline)
        decided.append(paired_p(correct, baseline) < 0.05)
        assert decided[-1] == (not low <= 0 <= high)
        assert 0 < paired_p(correct, baseline) <= 1
    assert 100 < sum(decided) < 900


def test_p_over_seeds_and_images_is_the_level_whose_interval_touches_0():
    for correct, baseline in random_pairs(100):
        seeds, n = correct.shape
        p, (mean, variance) = paired_p(correct, baseline), image_variance(correct, baseline)
        if p == 1:
            assert mean == 0
            continue
        std = max((correct.mean(1) - baseline.mean(1)).std(ddof=1), 1 / n / math.sqrt(12)) if seeds > 1 else 0.0
        normal = scipy.stats.norm.isf(p / 2) * math.sqrt(variance)
        over_seeds = scipy.stats.t.isf(p / 2, seeds - 1) * std / math.sqrt(seeds) if seeds > 1 else 0.0
        assert abs(mean) == pytest.approx(math.hypot(normal, over_seeds), rel=1e-6)
    right = np.ones((2, 50), dtype=bool)
    assert paired_p(right, right) == 1
    assert paired_p(np.tile(right, 1000), np.tile(~right, 1000)) < 1e-4


def test_mcnemars_test_finds_no_difference_whose_interval_includes_0():
    """For one seed, and every number of discordant images that can decide, in ever so many test images."""
    discordant = np.arange(6, 5000)
    minority = scipy.stats.binom.ppf(0.025, discordant, 0.5) - 1  # the largest with p < 0.05
    assert (2 * scipy.stats.binom.cdf(minority, discordant, 0.5) < 0.05).all()
    assert (2 * scipy.stats.binom.cdf(minority + 1, discordant, 0.5) >= 0.05).all()
    # The mean, and its standard error of Agresti and Min, times the number of images, which is infinite.
    assert (discordant - 2 * minority > 1.959964 * np.sqrt(discordant + 1)).all()


def test_the_originals_gain_is_significant_only_with_few_discordant_images():
    """9,420 of 10,000 right with the teacher and 9,410 without, for every possible overlap of their errors."""
    significant = [only for only in range(581) if mcnemar_p(only + 10, only) < 0.05]
    assert significant == [only for only in range(581) if scipy.stats.binomtest(only, 2 * only + 10).pvalue < 0.05]
    assert significant == [*range(6)]  # at most 20 discordant images, where two such models have about 400
