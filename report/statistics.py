"""Confidence intervals, tests, correction for multiple tests, and power. Functions of numbers and arrays."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import optimize, special, stats

Z = float(stats.norm.ppf(0.975))


def wilson_interval(correct: float, n: float) -> tuple[float, float]:
    """95% interval for a proportion of `correct` in `n`, not necessarily integers (Wilson 1927, JASA 22, 209-212).

    Raises ValueError unless 0 <= correct <= n and n >= 1.
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"wilson_interval takes 0 <= correct <= n and n >= 1, got correct = {correct}, n = {n}")
    share = correct / n
    center = share + Z**2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = ((center + sign * half) / (1 + Z**2 / n) for sign in (-1, 1))
    return (0.0 if correct == 0 else low), (1.0 if correct == n else high)  # exactly, without rounding errors


def variance_over_images(values: np.ndarray) -> float:
    """Variance over n images of `values` (S, n), as if each were the mean over infinitely many seeds, not over these S.

    The image component of the two-way random-effects model (Searle, Casella and McCulloch 1992, Variance Components).
    What one seed adds to one image is left out: it averages out over seeds, and is in the spread over seeds already.
    """
    between = values.mean(0).var()
    if len(values) == 1:
        return float(between)
    residual = values - values.mean(1, keepdims=True)
    return max(0.0, float(between - residual.var(0, ddof=1).mean() / len(values)))


def accuracy_interval(correct: np.ndarray) -> tuple[float, float]:
    """95% interval for an accuracy, from `correct` (S, n) bool, S seeds by n images.

    It covers the sampling of test images and, with several seeds, that of seeds (Student's t), combined in quadrature.
    The former is Wilson's for as many images, at most S n, as would make its variance p (1 - p) / n that of the images
    alone. An image that all seeds classify correctly and one that none does are added to estimate that variance.
    """
    mean, (seeds, n) = float(correct.mean()), correct.shape
    padded = np.pad(correct, ((0, 0), (1, 1)), constant_values=((False, False), (False, True)))
    bernoulli = padded.mean() * (1 - padded.mean())
    n *= bernoulli / max(variance_over_images(padded), bernoulli / seeds)
    low, high = wilson_interval(mean * n, n)
    half = seeds_half_width(correct.mean(1))
    return max(0.0, mean - math.hypot(mean - low, half)), min(1.0, mean + math.hypot(high - mean, half))


def seeds_half_width(values: np.ndarray) -> float:
    """Half the 95% interval for the mean of one value per seed (Student 1908); 0 for one seed."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else 0.0


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test, from the counts of discordant images.

    `only_first` images are classified correctly by the first model only, and vice versa. If both are equally good, each
    discordant image is a fair coin flip (McNemar 1947, Psychometrika 12, 153-157, in its exact binomial form).
    """
    return min(1.0, 2 * float(special.bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def paired_t_p(differences: np.ndarray) -> float | None:
    """Two-sided p-value of the t-test that the mean of two or more differences is 0; None if they are all the same."""
    if np.ptp(differences) < 1e-12:  # up to rounding
        return None
    return float(stats.ttest_1samp(differences, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values, adjusted for their number (Holm 1979, Scandinavian Journal of Statistics 6, 65-70)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def image_variance(correct: np.ndarray, correct_baseline: np.ndarray) -> tuple[float, float]:
    """Mean paired difference in accuracy, and its sampling variance over test images, which more seeds do not reduce.

    From `correct` and `correct_baseline`, both (S, n) bool. Pseudo-counts, half an image that only the model classifies
    correctly, half an image that only the baseline does, and one concordant image, make intervals valid even with few
    images (Agresti and Min 2005, Statistics in Medicine 24, 729-740).
    """
    differences = correct.astype(float) - correct_baseline  # (S, n)
    n, observed = differences.shape[1], differences.mean()
    mean = observed * n / (n + 2)
    mean_square = (n * (variance_over_images(differences) + observed**2) + 1) / (n + 2)
    return float(mean), float(mean_square - mean**2) / (n + 2)


def paired_errors(correct: np.ndarray, correct_baseline: np.ndarray) -> tuple[float, float, float]:
    """Mean paired difference in accuracy, its standard error over test images, and over seeds (0 for one seed).

    From `correct` and `correct_baseline`, both (S, n) bool. The standard deviation over seeds is at least that of
    rounding to whole images: few seeds often differ by the same number of images by chance.
    """
    mean, variance = image_variance(correct, correct_baseline)
    differences, (seeds, n) = correct.mean(1) - correct_baseline.mean(1), correct.shape  # (S,)
    std = max(float(differences.std(ddof=1)), 1 / (n * math.sqrt(12))) if seeds > 1 else 0.0
    return mean, math.sqrt(variance), std / math.sqrt(seeds)


def half_width(level: float, images: float, over_seeds: float, seeds: int) -> float:
    """Half the interval of confidence 1 - `level` for a difference with these two standard errors.

    The normal quantile for the sampling of `images` and Student's t for that of `seeds`, combined in quadrature.
    """
    normal = -special.ndtri(level / 2) * images
    return float(math.hypot(normal, -special.stdtrit(seeds - 1, level / 2) * over_seeds) if seeds > 1 else normal)


def paired_interval(correct: np.ndarray, correct_baseline: np.ndarray) -> tuple[float, float]:
    """95% interval, within -1..1, for the difference in accuracy of two models on the same images; shapes as above.

    It covers the sampling of test images (normal) and, with several seeds, that of seeds (Student's t).
    """
    mean, over_images, over_seeds = paired_errors(correct, correct_baseline)
    half = half_width(0.05, over_images, over_seeds, len(correct))
    return max(-1.0, mean - half), min(1.0, mean + half)


def paired_p(correct: np.ndarray, correct_baseline: np.ndarray) -> float:
    """Two-sided p-value of the difference over seeds and images: the level whose interval just touches 0.

    At the level 0.05 the interval is `paired_interval`, so that p < 0.05 exactly if that excludes 0. At least 1e-300.
    """
    return level_at_zero(*paired_errors(correct, correct_baseline), len(correct))


def level_at_zero(mean: float, over_images: float, over_seeds: float, seeds: int) -> float:
    """The level whose interval, of `half_width` around the mean difference, just touches 0. At least 1e-300."""

    def excess(log_level: float) -> float:
        return half_width(math.exp(log_level), over_images, over_seeds, seeds) - abs(mean)

    smallest = math.log(1e-300)
    if mean == 0:
        return 1.0
    return math.exp(optimize.brentq(excess, smallest, 0.0)) if excess(smallest) > 0 else 1e-300


@cache
def mcnemar_rejections(discordant: float, n: int, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of discordant images, how probable each is, and the largest minority for which McNemar's p < `level`.

    Where no minority is small enough, the number is left out.
    """
    few, most = stats.binom.ppf((1e-9, 1 - 1e-9), n, discordant)
    counts = np.arange(int(few), int(most) + 1)
    largest = stats.binom.ppf(level / 2, counts, 0.5) - 1
    decide = largest >= 0
    return counts[decide], stats.binom.pmf(counts[decide], n, discordant), largest[decide]


def mcnemar_power(difference: float, discordant: float, n: int, level: float = 0.05) -> float:
    """Power of McNemar's exact test at `level` for a true difference in accuracy between two trained models.

    `discordant` is the share of the n test images that only one of the two classifies correctly. The number of such
    images is binomial, and so is, among them, the number that the better model classifies correctly.
    """
    counts, probabilities, largest = mcnemar_rejections(discordant, n, level)
    share = (discordant + difference) / (2 * discordant)
    found = special.bdtr(largest, counts, share) + special.bdtr(largest, counts, 1 - share)
    return float((probabilities * found).sum())


def detectable_difference(discordant: float, n: int, level: float = 0.05) -> float | None:
    """The smallest true difference that `mcnemar_power` finds with 80% power, for one seed; None if there is none."""
    if not discordant or mcnemar_power(discordant, discordant, n, level) < 0.8:
        return None
    return float(optimize.brentq(lambda d: mcnemar_power(d, discordant, n, level) - 0.8, 0.0, discordant, xtol=1e-6))


@cache
def estimates_of_one(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations estimated from so many seeds where the true one is 1, and their weights, which sum to 1.

    The square is distributed as chi-squared / (seeds - 1). Its quantiles are those of a Gauss-Legendre quadrature.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    return np.sqrt(stats.chi2.ppf((nodes + 1) / 2, seeds - 1) / (seeds - 1)), weights / 2


def power_over_seeds(difference: float, std: float, variance: float, seeds: int, level: float = 0.05) -> float:
    """Power of the test of `paired_p` at `level` for a true difference, with two or more seeds.

    `std` is the standard deviation of the difference over the seeds, which each experiment estimates anew; `variance`
    is that of the sampling of test images, which no number of seeds makes smaller.
    """
    images, over_seeds = math.sqrt(variance), std / math.sqrt(seeds)
    estimates, weights = estimates_of_one(seeds)
    normal, t = half_width(level, images, 0.0, seeds), half_width(level, 0.0, over_seeds, seeds)
    half, error = np.hypot(normal, t * estimates), math.hypot(images, over_seeds)
    found = special.ndtr((difference - half) / error) + special.ndtr((-difference - half) / error)
    return float((weights * found).sum())


def detectable_over_seeds(std: float, variance: float, seeds: int, level: float = 0.05) -> float | None:
    """The smallest true difference that `power_over_seeds` finds with 80% power.

    None if there is none, or if `std` is 0, which says nothing about other seeds.
    """
    if not std or power_over_seeds(1.0, std, variance, seeds, level) < 0.8:
        return None
    return float(optimize.brentq(lambda d: power_over_seeds(d, std, variance, seeds, level) - 0.8, 0.0, 1.0, xtol=1e-6))
