"""Confidence intervals, tests, correction for multiple tests, and power. Functions of numbers and arrays."""

import bisect
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

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
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


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


def paired_interval(correct: np.ndarray, correct_baseline: np.ndarray) -> tuple[float, float]:
    """95% interval, within -1..1, for the difference in accuracy of two models on the same images; shapes as above.

    It covers the sampling of test images (normal) and, with several seeds, that of seeds (Student's t).
    """
    mean, variance = image_variance(correct, correct_baseline)
    differences = correct.mean(1) - correct_baseline.mean(1)  # (S,)
    half = math.hypot(Z * math.sqrt(variance), seeds_half_width(differences))
    return max(-1.0, mean - half), min(1.0, mean + half)


def detectable_difference(discordant: float, n: int, level: float = 0.05) -> float | None:
    """The smallest true difference in accuracy that one seed detects with 80% power; None if there is none.

    `discordant` is the share of the n test images that only one of the two models classifies correctly. By the normal
    approximation to McNemar's test (simplified from Connor 1987, Biometrics 43, 207-211), in which the variance of the
    difference d is (discordant - d^2) / n.
    """
    k = stats.norm.ppf(1 - level / 2) + stats.norm.ppf(0.8)
    difference = float(k * math.sqrt(discordant / (n + k**2)))
    return difference if 0 < difference <= discordant else None


def seeds_needed_after_one(difference: float, discordant: float, n: int, level: float = 0.05) -> int | None:
    """Lower bound on the seeds that detect a true difference of this size with 80% power, judging from one.

    It assumes the best case, in which each further seed disagrees on other images. None if there is no difference, or
    if more than 100,000 seeds would be needed.
    """
    detectable = detectable_difference(discordant, n, level)
    if difference == 0 or detectable is None:
        return None
    seeds = max(1, math.ceil((detectable / difference) ** 2))
    return seeds if seeds <= 100_000 else None


def t_power(effect: float, seeds: int, level: float = 0.05) -> float:
    """Power of a two-sided t-test over seeds for a true mean of `effect` standard deviations (noncentral t)."""
    df, shift = seeds - 1, effect * math.sqrt(seeds)
    critical = stats.t.ppf(1 - level / 2, df)
    return float(stats.nct.sf(critical, df, shift) + np.nan_to_num(stats.nct.cdf(-critical, df, shift)))


def detects(difference: float, std: float, variance: float, seeds: int, level: float = 0.05) -> bool:
    """Whether two or more seeds detect a true difference of this size with 80% power.

    `std` is the standard deviation of the difference over the seeds; `variance` is that of the sampling of test images,
    which no number of seeds makes smaller. To be detected, a difference needs a significant t-test over seeds and an
    interval that excludes 0.
    """
    images, error = math.sqrt(variance), std / math.sqrt(seeds)
    half = math.hypot(Z * images, stats.t.ppf(0.975, seeds - 1) * error)
    interval_excludes_0 = abs(difference) >= half + stats.norm.ppf(0.8) * math.hypot(images, error)
    return bool(interval_excludes_0) and t_power(abs(difference) / std, seeds, level) > 0.8 - 1e-9


def detectable_over_seeds(std: float, variance: float, seeds: int, level: float = 0.05) -> float | None:
    """The smallest true difference that `detects` accepts; None if there is none, or if `std` is 0."""
    if not std or not detects(1.0, std, variance, seeds, level):
        return None

    def undetected(difference: float) -> float:
        return 0.5 - detects(difference, std, variance, seeds, level)

    return float(optimize.bisect(undetected, 0.0, 1.0, xtol=1e-7))


def seeds_needed(difference: float, std: float, variance: float, level: float = 0.05) -> int | None:
    """About how many seeds detect a true difference of this size with 80% power; None if 100 are not enough.

    Beyond, the estimate of `variance` is too rough to say whether any number would be.
    """
    if not std:
        return None
    few_enough = range(2, 101)
    place = bisect.bisect_left(few_enough, True, key=lambda seeds: detects(difference, std, variance, seeds, level))
    return few_enough[place] if place < len(few_enough) else None
