import math

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


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (5, 5), (4, 12), (12, 4), (180, 219), (219, 180), (5000, 4900)])
def test_mcnemar_p(pair):
    expected = scipy.stats.binomtest(pair[0], sum(pair), 0.5).pvalue if sum(pair) else 1.0
    assert mcnemar_p(*pair) == pytest.approx(expected, rel=1e-9)


def test_paired_t_p_agrees_with_scipy():
    differences = np.array([0.004, -0.001, 0.003])
    assert paired_t_p(differences) == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue)
    assert paired_t_p(np.array([0.96, 0.95]) - np.array([0.956, 0.946])) is None  # equal up to rounding


def test_accuracy_interval_is_wilsons_for_one_seed_and_wider_for_several():
    random = np.random.default_rng(0)
    correct = random.random((3, 400)) < np.array([[0.80], [0.85], [0.88]])
    assert accuracy_interval(correct[:1]) == pytest.approx(wilson_interval(int(correct[0].sum()), 400))
    mean = correct.mean()
    wilson = wilson_interval(mean * 400, 400)
    t = scipy.stats.t.interval(0.95, 2, mean, scipy.stats.sem(correct.mean(1)))
    low, high = accuracy_interval(correct)
    assert mean - low == pytest.approx(math.hypot(mean - wilson[0], mean - t[0]))
    assert high - mean == pytest.approx(min(1 - mean, math.hypot(wilson[1] - mean, t[1] - mean)))
    same = np.tile(correct[:1], (2, 1))  # two seeds with equal accuracies say nothing about the test images
    assert accuracy_interval(same) == pytest.approx(accuracy_interval(same[:1]))


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


@pytest.mark.parametrize("seeds", [1, 3])
def test_paired_interval_agrees_with_a_bootstrap(seeds):
    random = np.random.default_rng(0)
    model, baseline = random.random((seeds, 300)) < 0.8, random.random((seeds, 300)) < 0.7
    differences, draws = model.mean(1) - baseline.mean(1), []
    for _ in range(4000):
        images = random.integers(0, 300, 300)
        draws.append(model[:, images].mean() - baseline[:, images].mean())
        if seeds > 1:  # and the mean over seeds, as far off as Student's t says
            error = differences.std(ddof=1) / math.sqrt(seeds)
            draws[-1] += error * scipy.stats.t.rvs(seeds - 1, random_state=random)
    expected = np.quantile(draws, [0.025, 0.975])
    assert paired_interval(model, baseline) == pytest.approx(expected, abs=0.012)
    if seeds == 1:
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
    df, critical = seeds - 1, scipy.stats.t.ppf(0.975, seeds - 1)
    for effect in (0.0, 0.3, 1.0, 3.0, 9.0):
        t = scipy.stats.nct(df, effect * math.sqrt(seeds))
        expected = t.sf(critical) + np.nan_to_num(t.cdf(-critical))  # SciPy has NaN where that is next to nothing
        assert t_power(effect, seeds) == pytest.approx(expected, abs=1e-5)


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
    assert seeds_needed(0.0001, 0.0015, 0.0) == pytest.approx((2.8016 * 15) ** 2, rel=0.07)
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
