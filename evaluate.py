"""Evaluate what was trained: is the taught student better, could it be chance, how sure is it, and what does it cost?

    python evaluate.py                          # with the flags that the training had
    python evaluate.py --preset demo
    python evaluate.py --predict IMAGE ...      # no report: what each trained model says of your own image files
    python evaluate.py --export                 # no report: checkpoints/RUN/seedS/MODEL.pt2, which needs only torch

Writes imgs/RUN/results.md and what it shows, results.json (every number) and predictions.npz (the logits behind them),
and prints the table. Three layers: logits from checkpoints; metrics, functions of arrays; figures, from arrays.
"""

import argparse
import dataclasses
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import seaborn
import sklearn
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from sklearn.metrics import classification_report, confusion_matrix
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from config import Config, Parser, Recipe, UserError, parse, printable
from custom_resnet import build_resnet, fold_batchnorm, load_model, predict
from utils import (
    Dataset,
    as_script,
    autocast,
    checkpoint_path,
    environment,
    from_first,
    imagenet_statistics,
    load_checkpoint,
    load_everywhere,
    load_finished,
    locked,
    memory_format,
    open_image,
    prepare,
    processes,
    rank,
    read_logits,
    refuse_other_settings,
    say,
    settle,
    tensors_digest,
    training_settings,
    write_durably,
)

# ---------------------------------------------------------------------------------------------------------------------
# Logits, from checkpoints


class Evaluated(NamedTuple):
    """One recipe over the seeds that are trained; n test images, m validation images, C classes."""

    recipe: Recipe
    logits: dict[int, np.ndarray]  # seed -> (n, C) float32
    history: dict[int, list[dict[str, float]]]  # seed -> a record for each epoch
    validation_logits: Mapping[int, np.ndarray] = MappingProxyType({})  # seed -> (m, C) float32, if images are held out
    digests: Mapping[int, str] = MappingProxyType({})  # seed -> that of the weights

    @property
    def predictions(self) -> dict[int, np.ndarray]:
        return {seed: logits.argmax(1) for seed, logits in self.logits.items()}  # (n,)


def finished_checkpoints(
    config: Config, dataset: Dataset, missing: list[Path]
) -> Iterator[tuple[str, int, dict[str, Any], str]]:
    """The name, seed, state and digest of weights of what is trained, teachers first; `missing` gets the other files.

    Raises UserError if a checkpoint is damaged or was trained with other settings than the config's.
    """
    digests = {}
    for name, seed in itertools.product(config.selected(), config.seeds):
        path = checkpoint_path(config, name, seed)
        state = from_first(lambda path=path: load_finished(path))
        if not state:
            missing.append(path)
            continue
        digests[name, seed] = tensors_digest(state["model"])
        settings = training_settings(name, seed, config, dataset, digests.get((config.recipes[name].teacher, seed)))
        del settings["precision"]  # the test images are seen in this machine's
        refuse_other_settings(path, state, settings)
        yield name, seed, state, digests[name, seed]


def evaluate_checkpoints(config: Config, dataset: Dataset) -> tuple[dict[str, Evaluated], list[Path]]:
    """Every trained recipe and seed on the test images, in the order of config.recipes, and the files that are missing.

    Raises UserError if a checkpoint is damaged or was trained with other settings than the config's.
    """
    models, missing = {}, []
    for name, seed, state, digest in finished_checkpoints(config, dataset, missing):
        model = load_model(state, config.device)

        def logits(images: torch.Tensor, model=model, title=f"{name} seed {seed}") -> np.ndarray:
            return predict(model, images, config.image_size, config.precision, title=title).cpu().numpy()

        found = models.setdefault(name, Evaluated(config.recipes[name], {}, {}, {}, {}))
        found.logits[seed], found.history[seed] = logits(dataset.test.images), state["history"]
        found.digests[seed] = digest
        if dataset.validation:
            found.validation_logits[seed] = logits(dataset.validation.images)
    return {name: models[name] for name in config.recipes if name in models}, missing


def logits_for_student(
    config: Config, dataset: Dataset, recipe: Recipe, seed: int, digest: str, most: int = 2_000
) -> tuple[np.ndarray, np.ndarray]:
    """What its teacher, whose weights have this digest, says of a taught recipe's training images; and their labels.

    Logits (M, C) and labels (M,) of all of them, unflipped, if the training left them in a file; otherwise they are
    computed for at most `most` of them, with the classes in proportion.
    """
    subset, labels = dataset.subset(recipe.train_size), dataset.train.labels.cpu()
    path = checkpoint_path(config, recipe.teacher, seed)
    made_with = {
        "teacher": digest,
        "images": dataset.digest,
        "validation_size": config.validation_size,
        "image_size": config.image_size,
    }
    shape = (2, len(labels), len(dataset.classes))
    stored = from_first(lambda: read_logits(path.with_suffix(".logits"), made_with, shape))
    if not stored[0, subset].isnan().any():
        return stored[0, subset].numpy(), labels[subset].numpy()
    by_class = subset[labels[subset].argsort(stable=True)]  # every k-th of these has the classes in proportion
    chosen = by_class[torch.linspace(0, len(by_class) - 1, min(most, len(by_class))).long()]
    images = dataset.train.images[chosen.to(dataset.train.images.device)]
    model = load_model(from_first(lambda: load_checkpoint(path)), config.device)
    title = f"{recipe.teacher} on training images"
    logits = predict(model, images, config.image_size, config.precision, title=title)
    return logits.cpu().numpy(), labels[chosen].numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Statistics: how sure can one be


def wilson_interval(correct: float, n: float) -> tuple[float, float]:
    """95% interval for a proportion of `correct` in `n` (Wilson 1927, JASA 22, 209-212)."""
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"wilson_interval takes 0 <= correct <= n and n >= 1, got correct = {correct}, n = {n}")
    z = NormalDist().inv_cdf(0.975)
    proportion = correct / n
    center = proportion + z**2 / (2 * n)
    half = z * math.sqrt(proportion * (1 - proportion) / n + z**2 / (4 * n**2))
    low, high = ((center + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return (0.0 if correct == 0 else low), (1.0 if correct == n else high)  # exact there, up to rounding


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: `only_first` images that only the first model gets right, and vice versa.

    Under the hypothesis that both are equally good each discordant image is a fair coin (McNemar 1947, Psychometrika
    12, 153-157, in its exact binomial form).
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail, term = 0, 1  # of 2^n equally likely outcomes; term = n choose k
    for k in range(fewer + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def student_t_cdf(t: float, df: int) -> float:
    """P(T <= t) for Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 1964, 26.7.3-4)."""
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    total, term = 0.0, cosine if odd else 1.0
    for k in range(1, df - odd, 2):
        total += term
        term *= cosine**2 * ((k + 1) / (k + 2) if odd else k / (k + 1))
    between = 2 / math.pi * (theta + sine * total) if odd else sine * total  # P(-t <= T <= t)
    return 0.5 + between / 2


def least(enough: Callable[[float], bool], low: float, high: float) -> float:
    """The least number between `low` and `high` that is enough, by bisection; every larger one must be so too."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@lru_cache
def student_t_quantile(p: float, df: int) -> float:
    """The t above which a share 1 - p of Student's distribution lies, for p of 0.5 to 0.9999."""
    return least(lambda t: student_t_cdf(t, df) >= p, 0.0, 10_000.0)


def t_power(effect: float, seeds: int, level: float = 0.05) -> float:
    """P that a two-sided paired t-test at this level finds a true mean of `effect` standard deviations, either way.

    The test's t is (Z + effect * sqrt(seeds)) / s with Z normal and s^2 chi-square over df (Cohen 1988, chapter 2);
    the probability for each s is normal, and is summed over the density of s.
    """
    df, points = seeds - 1, 4_000
    most = 1 + 12 / math.sqrt(2 * df)  # s beyond that has no probability to speak of
    s = (torch.arange(points, dtype=torch.float64) + 0.5) * (most / points)
    log_density = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + (df - 1) * s.log() - df * s**2 / 2
    shift, critical = effect * math.sqrt(seeds), student_t_quantile(1 - level / 2, min(df, 200))
    found = torch.special.ndtr(shift - critical * s) + torch.special.ndtr(-shift - critical * s)
    return (log_density.exp() * found).sum().item() * most / points


def t_interval(values: Iterable[float]) -> tuple[float, float]:
    """95% interval, cut to 0..1, for the mean of two or more accuracies of different seeds (Student 1908)."""
    values = np.asarray(list(values))
    half = student_t_quantile(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def paired_bootstrap(correct: np.ndarray, correct_baseline: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """95% percentile interval for the difference in accuracy, over 10,000 resamples of the test images, and the seeds.

    `correct` and `correct_baseline` are bool (S, n), S seeds by n images, `labels` (n,). Images are resampled within
    their class, in pairs (Efron and Tibshirani 1993, chapter 8). Images on which the models differ alike over all seeds
    are interchangeable, so a resample is a multinomial draw of how many of each kind there are. Resampling two or three
    seeds would understate how much seeds differ; instead each draw moves their mean by as much as S seeds leave open,
    a draw of Student's t times its standard error.
    """
    draws, random = 10_000, np.random.default_rng(0)
    difference = correct.astype(int) - correct_baseline.astype(int)  # (S, n) of -1, 0, 1
    seeds, n = difference.shape
    total = np.zeros(draws)
    for label in np.unique(labels):
        kinds, counts = np.unique(difference[:, labels == label].mean(0), return_counts=True)  # (K,), (K,)
        total += random.multinomial(counts.sum(), counts / counts.sum(), size=draws) @ kinds  # (draws, K) @ (K,)
    total /= n
    if seeds > 1:
        total += difference.mean(1).std(ddof=1) / math.sqrt(seeds) * random.standard_t(seeds - 1, draws)
    low, high = np.quantile(total, [0.025, 0.975])
    return float(low), float(high)


def image_variance(correct: np.ndarray, correct_baseline: np.ndarray, labels: np.ndarray) -> float:
    """Of the difference in accuracy, as far as the choice of test images goes: stratified; shapes as above."""
    difference = correct.mean(0) - correct_baseline.mean(0)  # (n,)
    return float(sum(difference[labels == c].var() * (labels == c).sum() for c in np.unique(labels)) / len(labels) ** 2)


def holm(p_values: list[float]) -> list[float]:
    """p-values of several comparisons, corrected so that all hold together (Holm 1979, Scand. J. Statist. 6, 65-70)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def detectable_difference(discordant: float, n: int, level: float = 0.05) -> float | None:
    """The smallest true difference in accuracy that one seed finds with 80% power; None if no such difference can be.

    `discordant` is the share of the n test images that just one of the two models gets right. Normal approximation to
    McNemar's test at that level (simplified from Connor 1987, Biometrics 43, 207-211): the variance of the difference d
    is (discordant - d^2) / n.
    """
    k = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(0.8)
    difference = k * math.sqrt(discordant / (n + k**2))
    return difference if 0 < difference <= discordant else None


def seeds_needed_after_one(difference: float, discordant: float, n: int, level: float = 0.05) -> int | None:
    """At least how many seeds find a true difference of this size with 80% power, by what one seed shows.

    Each seed is taken to disagree on images of its own, as many as this one: the best case. None if there is no
    difference or it takes over 100,000.
    """
    detectable = detectable_difference(discordant, n, level)
    if difference == 0 or detectable is None:
        return None
    seeds = max(1, math.ceil((detectable / difference) ** 2))
    return seeds if seeds <= 100_000 else None


def finds(difference: float, std: float, images: float, seeds: int, level: float = 0.05) -> bool:
    """Whether the verdict over two or more seeds finds a true difference of this size with 80% power.

    `std` is the standard deviation of the difference over the seeds, `images` the variance from the choice of test
    images, which no number of seeds makes smaller. Both the t-test and the interval have to find it.
    """
    error, z, df = std / math.sqrt(seeds), NormalDist().inv_cdf, min(seeds - 1, 200)  # t is normal by then
    half = math.hypot(z(0.975) * math.sqrt(images), student_t_quantile(0.975, df) * error)  # of the interval
    in_interval = abs(difference) >= half + z(0.8) * math.hypot(math.sqrt(images), error)
    return in_interval and t_power(abs(difference) / std, seeds, level) > 0.8 - 1e-9


def detectable_over_seeds(std: float, images: float, seeds: int, level: float = 0.05) -> float | None:
    """The smallest true difference that `finds` says yes to; None if all seeds differed alike, which says nothing."""
    return least(lambda difference: finds(difference, std, images, seeds, level), 0.0, 1.0) if std else None


def seeds_needed(difference: float, std: float, images: float, level: float = 0.05) -> int | None:
    """About how many seeds find a true difference of this size with 80% power; None if 100,000 would not.

    None, too, if all seeds differed alike, as in `detectable_over_seeds`.
    """
    if not std:
        return None
    candidates = itertools.chain(range(2, 200), np.geomspace(200, 100_000, 100).astype(int).tolist())
    return next((seeds for seeds in candidates if finds(difference, std, images, seeds, level)), None)


def paired_t_p(differences: np.ndarray) -> float | None:
    """Two-sided p of the t-test that the mean of two or more differences is 0; None where all are the same."""
    if np.ptp(differences) < 1e-12:  # rounding apart
        return None
    t = abs(differences.mean()) / (differences.std(ddof=1) / math.sqrt(len(differences)))
    return 2 * (1 - student_t_cdf(t, len(differences) - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, functions of arrays: logits (n, C), labels (n,)


def number(value: float) -> float | None:
    """As JSON has it: None for what is not finite."""
    return float(value) if math.isfinite(value) else None


def means(rows: Iterable[dict[str, float]]) -> dict[str, float | None]:
    """The mean of each entry over rows that have the same ones, for instance one for each seed."""
    rows = list(rows)
    return {key: number(np.mean([row[key] for row in rows])) for key in rows[0]}


def log_probabilities(logits: np.ndarray, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / T), (n, C) float64."""
    return F.log_softmax(torch.as_tensor(logits, dtype=torch.float64) / temperature, dim=1)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label), in nats: the cross-entropy."""
    return F.nll_loss(log_probabilities(logits), torch.as_tensor(labels)).item()


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    """Squared distance of the probabilities from the truth, 0 to 2: summed over the classes, mean over the images.

    Source: Brier 1950, Monthly Weather Review 78, 1-3, in his own form for several classes.
    """
    probabilities = log_probabilities(logits).exp()
    truth = F.one_hot(torch.as_tensor(labels), probabilities.shape[1])
    return (probabilities - truth).square().sum(1).mean().item()


def confidences(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability of what a model predicts (n,), and whether that is right (n,) bool."""
    confidence, prediction = (array.numpy() for array in log_probabilities(logits).exp().max(dim=1))
    return confidence, prediction == np.asarray(labels)


def calibration_error_by_chance(logits: np.ndarray, draws: int = 20) -> float:
    """The expected calibration error that a model with these logits (n, C) would show if it were calibrated perfectly.

    It is above 0 as the images of a bin are few. Mean over labels drawn from the model's own probabilities.
    """
    random, p = np.random.default_rng(0), log_probabilities(logits).exp().numpy()
    if not np.isfinite(p).all():
        return math.nan
    cumulative = p.cumsum(1)
    errors = []
    for _ in range(draws):
        drawn = (cumulative < random.random((len(p), 1))).sum(1).clip(max=p.shape[1] - 1)  # (n,)
        errors.append(expected_calibration_error(logits, drawn))
    return float(np.mean(errors))


def equal_mass_bins(confidence: np.ndarray, bins: int) -> list[np.ndarray]:
    """Indices of the images, by rising confidence, in bins of equally many (to one)."""
    return np.array_split(np.argsort(confidence, kind="stable"), bins)


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of equally many images.

    Equal-mass bins after Nguyen and O'Connor 2015 (arXiv 1508.05154); the error as in Guo et al. 2017 (1706.04599).
    """
    confidence, correct = confidences(logits, labels)
    error = sum(abs(confidence[b].sum() - correct[b].sum()) for b in equal_mass_bins(confidence, bins))
    return float(error / len(confidence))


def reliability(by_seed: Sequence[np.ndarray], labels: np.ndarray, bins: int = 15) -> np.ndarray:
    """Accuracy by confidence: rows of confidence, accuracy and the ends of its 95% interval, one for each bin.

    The images of all seeds are binned together. The interval is Wilson's for as many images as there are: that several
    seeds have seen the same ones does not narrow it.
    """
    confidence, correct = (
        np.concatenate(parts) for parts in zip(*(confidences(z, labels) for z in by_seed), strict=True)
    )
    rows = []
    for b in equal_mass_bins(confidence, min(bins, len(labels))):
        low, high = wilson_interval(correct[b].sum() / len(by_seed), len(b) / len(by_seed))
        rows.append((confidence[b].mean(), correct[b].mean(), low, high))
    return np.array(rows)  # (bins, 4)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T, from 0.01 to 100, at which softmax(logits / T) has the smallest negative log-likelihood.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2). In b = 1/T the likelihood is convex, and its
    derivative, the mean of sum_c p_c z_c - z_label, rises with b: bisection on log b. Where every image is right there
    is no minimum and T becomes 0.01.
    """
    z = torch.as_tensor(logits, dtype=torch.float64)
    of_label = z.gather(1, torch.as_tensor(labels).unsqueeze(1)).mean()

    def rises(log_b: float) -> bool:
        return bool((torch.softmax(math.exp(log_b) * z, dim=1) * z).sum(1).mean() >= of_label)

    return math.exp(-least(rises, math.log(0.01), math.log(100))) if z.isfinite().all() else math.nan


def temperatures(model: Evaluated, validation_labels: np.ndarray | None) -> dict[int, float]:
    """The temperature that fits the validation images of each seed; empty where no images are held out."""
    return {seed: fit_temperature(logits, validation_labels) for seed, logits in model.validation_logits.items()}


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    metrics = (negative_log_likelihood, brier_score, expected_calibration_error)
    return {metric.__name__: metric(logits, labels) for metric in metrics}


def kl_divergence(teacher: np.ndarray, student: np.ndarray, temperature: float = 1.0) -> float:
    """Mean over the images of KL(softmax(v / T) || softmax(z / T)) in nats, for teacher's logits v and student's z."""
    v, z = log_probabilities(teacher, temperature), log_probabilities(student, temperature)
    return F.kl_div(z, v, reduction="batchmean", log_target=True).item()


def soft_target_metrics(logits: np.ndarray, temperature: float) -> dict[str, float]:
    """How much a teacher's softmax(logits / T) leaves open: mean entropy in nats, mean of the highest probability."""
    log_p = log_probabilities(logits, temperature)
    p = log_p.exp()
    return {"entropy": torch.special.entr(p).sum(1).mean().item(), "confidence": p.max(dim=1).values.mean().item()}


def confusion_counts(model: Evaluated, labels: np.ndarray, classes: int, seeds: Iterable[int]) -> np.ndarray:
    """(C, C), rows true classes, summed over the seeds."""
    return sum(confusion_matrix(labels, model.predictions[seed], labels=range(classes)) for seed in seeds)


def row_shares(counts: np.ndarray) -> np.ndarray:
    """Confusion counts (C, C) as shares of their true class."""
    return counts / counts.sum(1, keepdims=True).clip(min=1)


def most_confused(counts: np.ndarray, classes: Sequence[str], most: int = 5) -> list[dict[str, Any]]:
    """The pairs of classes that are taken for each other most often, and the share of the true class that is."""
    wrong, shares = counts - np.diag(np.diag(counts)), row_shares(counts)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(classes)) for place in order]
    return [
        {"true": classes[t], "predicted": classes[p], "count": int(wrong[t, p]), "share": float(shares[t, p])}
        for t, p in pairs
        if wrong[t, p]
    ]


def model_metrics(
    model: Evaluated,
    labels: np.ndarray,
    classes: tuple[str, ...],
    fitted: Mapping[int, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """The entry of one model in results.json. Accuracies are shares; confusion counts are summed over the seeds.

    Calibration is the mean over the seeds, and with validation images, again after the temperature of each seed that
    fits them best.
    """
    counts = confusion_counts(model, labels, len(classes), model.logits)
    of_class = counts.sum(1)
    accuracies = {seed: float((p == labels).mean()) for seed, p in model.predictions.items()}
    values = list(accuracies.values())
    several = len(values) > 1
    scaled = [{"temperature": t, **calibration(model.logits[seed] / t, labels)} for seed, t in fitted.items()]
    return {
        "arch": model.recipe.arch,
        "teacher": model.recipe.teacher,
        "accuracy": {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if several else None,
            "ci95": t_interval(values) if several else wilson_interval(int(np.trace(counts)), len(labels)),
            "seeds": {str(seed): accuracy for seed, accuracy in accuracies.items()},
        },
        "per_class": {
            name: float(counts[c, c] / of_class[c]) if of_class[c] else None for c, name in enumerate(classes)
        },
        "per_class_ci95": {  # of as many images as there are: that several seeds see the same ones narrows nothing
            name: wilson_interval(counts[c, c] / len(values), of_class[c] / len(values)) if of_class[c] else None
            for c, name in enumerate(classes)
        },
        "confusion_matrix": counts.tolist(),
        "most_confused": most_confused(counts, classes),
        **means(calibration(logits, labels) for logits in model.logits.values()),
        **means({"calibration_error_by_chance": calibration_error_by_chance(z)} for z in model.logits.values()),
        "reliability": [[*map(number, bins)] for bins in reliability(list(model.logits.values()), labels)],
        "history": {str(seed): records for seed, records in model.history.items()},
        "temperature_scaled": means(scaled) if scaled else None,
    }


def common_seeds(*models: Evaluated) -> list[int]:
    return sorted(set.intersection(*(set(model.logits) for model in models)))


def baseline_of(name: str, models: dict[str, Evaluated]) -> str | None:
    """What a model is compared with: its `baseline`, else the first of its architecture without a teacher.

    Its own teacher, in self-distillation, is that only if there is no other.
    """
    recipe = models[name].recipe
    if recipe.baseline:
        return recipe.baseline if recipe.baseline in models else None
    untaught = [other for other, m in models.items() if not m.recipe.teacher and m.recipe.arch == recipe.arch]
    untaught.sort(key=lambda other: other == recipe.teacher)
    return untaught[0] if recipe.teacher and untaught else None


def compare(
    name: str,
    baseline: str,
    models: dict[str, Evaluated],
    labels: np.ndarray,
    classes: Sequence[str] = (),
    level: float = 0.05,
) -> dict[str, Any] | None:
    """The entry of one comparison in results.json, over the seeds that both have; None if they share none.

    p_value is McNemar's exact one for one seed, and that of the paired t-test over the seeds for several. What could be
    found, and with how many seeds, is for a test at this level.
    """
    seeds = common_seeds(models[name], models[baseline])
    if not seeds:
        return None
    first, second = (np.stack([models[m].predictions[s] == labels for s in seeds]) for m in (name, baseline))  # (S, n)
    differences = first.mean(1) - second.mean(1)  # (S,)
    several, difference = len(seeds) > 1, float(differences.mean())
    mcnemar = {
        str(seed): mcnemar_p(int((a & ~b).sum()), int((b & ~a).sum()))
        for seed, a, b in zip(seeds, first, second, strict=True)
    }
    std, discordant = float(differences.std(ddof=1)) if several else None, float((first != second).mean())
    if several:
        images = image_variance(first, second, labels)
        detectable = detectable_over_seeds(std, images, len(seeds), level)
        needed = seeds_needed(difference, std, images, level)
    else:
        detectable = detectable_difference(discordant, len(labels), level)
        needed = seeds_needed_after_one(difference, discordant, len(labels), level)
    return {
        "model": name,
        "baseline": baseline,
        "seeds": seeds,
        "difference": difference,
        "std": std,
        "ci95": paired_bootstrap(first, second, labels),
        "p_value": paired_t_p(differences) if several else mcnemar[str(seeds[0])],
        "test": "paired t over seeds" if several else "exact McNemar",
        "mcnemar_p": mcnemar,
        "only_model_right": int((first & ~second).sum()),
        "only_baseline_right": int((second & ~first).sum()),
        "detectable_difference": detectable,
        "seeds_needed": needed,
        "per_class": {c: class_difference(first, second, labels == label) for label, c in enumerate(classes)},
    }


def class_difference(correct: np.ndarray, correct_baseline: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """Difference in accuracy over the chosen images (n,) bool alone, its interval as in `paired_bootstrap`.

    Fewer than ten images say too little to be resampled: no interval.
    """
    if not chosen.any():
        return {"difference": None, "ci95": None}
    first, second = correct[:, chosen], correct_baseline[:, chosen]  # (S, k)
    enough = first.shape[1] >= 10
    ci95 = paired_bootstrap(first, second, np.zeros(first.shape[1], dtype=int)) if enough else None
    return {"difference": float(first.mean() - second.mean()), "ci95": ci95}


def compare_all(models: dict[str, Evaluated], labels: np.ndarray, classes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every model beside its baseline, with p-values corrected for their number and a verdict for each.

    The rule: "better" or "worse" if p_holm, the corrected p_value, is below 0.05 and ci95 leaves out 0; otherwise
    "indistinguishable". A test that is not defined (p_value None) counts as p = 1. With one seed this is a verdict on
    two trainings, not on two recipes: how much seeds differ is not known then.
    """
    pairs = [(name, baseline) for name in models if (baseline := baseline_of(name, models))]
    level = 0.05 / max(1, len(pairs))  # Holm's, for the smallest p
    comparisons = [found for pair in pairs if (found := compare(*pair, models, labels, classes, level))]
    corrected = holm([1.0 if c["p_value"] is None else c["p_value"] for c in comparisons])
    for comparison, p_holm in zip(comparisons, corrected, strict=True):
        low, high = comparison["ci95"]
        sure = p_holm < 0.05 and not low <= 0 <= high
        verdict = ("better" if comparison["difference"] > 0 else "worse") if sure else "indistinguishable"
        comparison.update(p_holm=p_holm, verdict=verdict)
    return comparisons


def taught(models: dict[str, Evaluated]) -> list[str]:
    """The models whose teacher is evaluated too, for a seed that both have."""
    teachers = {name: model.recipe.teacher for name, model in models.items()}
    return [
        name for name, teacher in teachers.items() if teacher in models and common_seeds(models[name], models[teacher])
    ]


def fidelity(models: dict[str, Evaluated], labels: np.ndarray) -> list[dict[str, Any]]:
    """How far each taught model, and its baseline, say what the teacher says on the test images: a row each.

    After Stanton et al. 2021 (arXiv 2106.05945). Means over the seeds that both have; teacher_wrong, and the agreement
    there, are counted over all of them.
    """
    rows = []
    for name in taught(models):
        teacher, temperature = models[name].recipe.teacher, models[name].recipe.temperature
        for student in (name, baseline_of(name, models)):
            seeds = common_seeds(models[student], models[teacher]) if student not in (None, teacher) else []
            told = any(
                (row["model"], row["teacher"], row["temperature"]) == (student, teacher, temperature) for row in rows
            )
            if not seeds or told:
                continue
            logits = [(models[teacher].logits[seed], models[student].logits[seed]) for seed in seeds]
            agree = np.stack([v.argmax(1) == z.argmax(1) for v, z in logits])  # (S, n)
            wrong = np.stack([v.argmax(1) != labels for v, _ in logits])
            kl = {"kl": 1.0, "kl_at_temperature": temperature}
            rows.append(
                {
                    "model": student,
                    "teacher": teacher,
                    "seeds": seeds,
                    "temperature": temperature,
                    "agreement": float(agree.mean()),
                    "agreement_where_teacher_wrong": float(agree[wrong].mean()) if wrong.any() else None,
                    "teacher_wrong": int(wrong.sum()),
                    **means({key: kl_divergence(v, z, t) for key, t in kl.items()} for v, z in logits),
                }
            )
    return rows


def soft_targets(config: Config, dataset: Dataset, models: dict[str, Evaluated]) -> list[dict[str, Any]]:
    """What each taught model sees of its teacher: accuracy, entropy and confidence on the student's training images."""
    rows = []
    for name in taught(models):
        recipe, by_seed = models[name].recipe, []
        teacher = models[recipe.teacher]
        seeds = common_seeds(models[name], teacher)
        for seed in seeds:
            logits, labels = logits_for_student(config, dataset, recipe, seed, teacher.digests[seed])
            softened = soft_target_metrics(logits, recipe.temperature)
            accuracy = float((logits.argmax(1) == labels).mean())
            by_seed.append(
                {
                    "accuracy": accuracy,
                    **soft_target_metrics(logits, 1.0),
                    **{f"{key}_at_temperature": value for key, value in softened.items()},
                }
            )
        about = {"model": name, "teacher": recipe.teacher, "seeds": seeds, "images": len(labels)}
        rows.append({**about, "temperature": recipe.temperature, **means(by_seed)})
    return rows


def disagreements(name: str, models: dict[str, Evaluated], most: int = 12) -> dict[str, Any] | None:
    """Test images on which teacher, baseline and model do not all agree, of their first common seed; None for none.

    `most` of them, drawn at random, always the same: nobody has picked them.
    """
    trio = list(dict.fromkeys([models[name].recipe.teacher, baseline_of(name, models), name]))
    if not set(trio) <= models.keys() or not (seeds := common_seeds(*(models[m] for m in trio))):
        return None
    said = np.stack([models[m].predictions[seeds[0]] for m in trio])  # (3, n)
    images = np.flatnonzero((said != said[0]).any(0))
    shown = np.sort(np.random.default_rng(0).choice(images, min(most, len(images)), replace=False))
    about = {"models": trio, "seed": seeds[0], "count": len(images), "shown": shown.tolist()}
    return about if len(images) else None


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def count_cost(arch: str, classes: int, image_size: int) -> dict[str, int]:
    """Parameters, and multiply-accumulates (two FLOPs each) of one image in the convolutions and the linear layer.

    Counted by torch on the meta device: nothing is computed.
    """
    with torch.device("meta"):
        model, image = build_resnet(arch, classes, pretrained=False).eval(), torch.empty(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "multiply_accumulates": counter.get_total_flops() // 2}


def spread(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "quartiles": [low, high], "n": len(values)}


def time_architectures(
    archs: Iterable[str], config: Config, dataset: Dataset, batch_size: int = 100, seconds: float = 5.0
) -> dict[str, dict[str, Any]]:
    """Latency of one image and throughput of a large batch for each architecture, from bytes on the device to logits.

    In rounds, an architecture after the other, so that a machine that slows down slows all of them: three rounds or
    more, until the seconds are over, 20 at most. The weights do not matter and are random ones, BatchNorm folded.
    """
    device = torch.device(config.device)
    wait = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    count = len(dataset.test.images)
    images = dataset.test.images[torch.arange(batch_size, device=dataset.test.images.device) % count].to(device)
    models = {
        arch: fold_batchnorm(
            build_resnet(arch, len(dataset.classes), pretrained=False).to(device, memory_format=memory_format(device))
        )
        for arch in archs
    }

    def timed(arch: str, batch: torch.Tensor) -> float:
        wait()
        started = time.perf_counter()
        with torch.inference_mode(), autocast(device, config.precision):
            models[arch](prepare(batch, config.image_size)).float()
        wait()
        return time.perf_counter() - started

    for arch, batch in itertools.product(models, (images[:1], images)):
        timed(arch, batch)  # warms up
    latency, throughput = {arch: [] for arch in models}, {arch: [] for arch in models}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 3 or (rounds < 20 and time.monotonic() < end):
        for arch in models:
            latency[arch] += [1000 * timed(arch, images[:1]) for _ in range(5)]
            throughput[arch].append(batch_size / timed(arch, images))
        rounds += 1
    return {
        arch: {
            "latency_ms": spread(latency[arch]),
            "images_per_second": {"batch_size": batch_size, **spread(throughput[arch])},
        }
        for arch in models
    }


def costs(config: Config, dataset: Dataset, models: dict[str, Evaluated]) -> dict[str, dict[str, Any]]:
    """What each model costs to keep and to run, measured once for each architecture."""
    archs = dict.fromkeys(model.recipe.arch for model in models.values())
    counted = {arch: count_cost(arch, len(dataset.classes), config.image_size) for arch in archs}
    timed = time_architectures(archs, config, dataset)

    def size(name: str) -> int:
        return checkpoint_path(config, name, next(iter(models[name].logits))).stat().st_size

    return {
        name: {**counted[m.recipe.arch], "bytes_on_disk": size(name), **timed[m.recipe.arch]}
        for name, m in models.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Figures, from arrays

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008


def model_colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of each model in every figure, from the order of all recipes, evaluated or not."""
    return dict(zip(names, itertools.cycle(COLOURS), strict=False))


def blank_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # without one, every tick label that seaborn asks about would make its own
    return figure


def plain(text: str, most: int = 40) -> str:
    """A name as a figure shows it: no line breaks, not too long, and no dollar sign that would start a formula."""
    text = " ".join(text.split())
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def label_size(classes: tuple[str, ...]) -> float:
    """Points, such that the names of many classes fit beside each other in a figure of bounded size."""
    return min(10.0, max(1.0, 600 / len(classes)))


def matrix_figure(
    percent: np.ndarray, written: np.ndarray, classes: tuple[str, ...], title: str, bar: str, **look: Any
) -> Figure:
    """A value for each true class (row) and predicted class (C, C), with something written into the cells of a few."""
    names = [plain(name, 20) for name in classes]
    size = min(max(4.5, 0.55 * len(classes) + 1.2 + 0.07 * max(map(len, names))), 14)
    figure = blank_figure(size + 0.8, size)
    axes = figure.subplots()
    few = len(classes) <= 20
    seaborn.heatmap(
        percent,
        annot=written if few else False,
        fmt="",
        square=True,
        linewidths=0.5 if few else 0,
        xticklabels=names,
        yticklabels=names,
        cbar_kws={"label": bar, "shrink": 0.8},
        ax=axes,
        **look,
    )
    axes.set(xlabel="predicted class", ylabel="true class", title=plain(title, 80))
    axes.tick_params(labelsize=label_size(classes))
    long = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 2 else {"rotation": 0}
    axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), **long)
    axes.tick_params(axis="y", rotation=0)
    return figure


def confusion_figure(counts: np.ndarray, classes: tuple[str, ...], title: str) -> Figure:
    """Counts (C, C), rows true classes, coloured by their share of the row."""
    look = {"vmin": 0, "vmax": 100, "cmap": "Blues"}
    return matrix_figure(100 * row_shares(counts), counts, classes, title, "share of the true class (%)", **look)


def confusion_difference_figure(
    counts: np.ndarray, counts_baseline: np.ndarray, classes: tuple[str, ...], title: str
) -> Figure:
    """How much larger a share of each true class the model gives to each class than the baseline does."""
    points = 100 * (row_shares(counts) - row_shares(counts_baseline))
    written = np.vectorize(lambda value: f"{value:+.1f}" if abs(value) > 1e-9 else "")(points)
    most = max(1.0, np.abs(points).max())
    look = {"vmin": -most, "vmax": most, "cmap": "PuOr"}
    return matrix_figure(points, written, classes, title, "points of the true class", **look)


def class_differences_figure(per_class: dict[str, dict[str, Any]], title: str, colour: str) -> Figure:
    """The difference in accuracy in each class, with its 95% interval."""
    known = [(name, entry["difference"], *entry["ci95"]) for name, entry in per_class.items() if entry["ci95"]]
    names, differences, lows, highs = zip(*known, strict=True)
    points, rows = 100 * np.array([differences, lows, highs]), np.arange(len(names))
    figure = blank_figure(6.5, min(0.32 * len(names) + 1.3, 14))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    few = len(names) <= 40
    axes.hlines(rows, points[1], points[2], color=colour, linewidth=2 if few else 1)
    axes.plot(points[0], rows, "o", color=colour, markersize=6 if few else 2)
    axes.set_yticks(rows, [plain(name) for name in names], fontsize=label_size(names))
    axes.set(xlabel="difference in accuracy (points), 95% interval", ylabel="class", title=plain(title, 80))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return figure


def reliability_figure(
    as_trained: dict[str, list[np.ndarray]],
    labels: np.ndarray,
    colours: dict[str, str],
    scaled: dict[str, list[np.ndarray]],
) -> Figure:
    """Accuracy against confidence for each model: its seeds' logits as they are and, if there are any, scaled ones."""
    columns = min(len(as_trained), 3)
    rows = math.ceil(len(as_trained) / columns)
    figure = blank_figure(max(5.0, 3.1 * columns), 3.2 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(as_trained) :]:
        axes.remove()
    grid, lowest = grid[: len(as_trained)], 100.0
    for axes, (name, by_seed) in zip(grid, as_trained.items(), strict=True):
        axes.plot([0, 100], [0, 100], ":", color="grey")
        errors = []
        lines = (by_seed, colours[name], "o-", 0.25), (scaled.get(name), "black", "s--", 0.12)
        for logits, colour, style, alpha in (line for line in lines if line[0]):
            confidence, accuracy, low, high = 100 * reliability(logits, labels).T
            axes.fill_between(confidence, low, high, color=colour, alpha=alpha, linewidth=0)
            axes.plot(confidence, accuracy, style, color=colour, markersize=4, linewidth=1.2)
            errors.append(f"{100 * np.mean([expected_calibration_error(z, labels) for z in logits]):.1f}")
            lowest = np.nanmin([lowest, *confidence, *low])
        axes.set_title(f"{plain(name, 30)}\ncalibration error {' → '.join(errors)}", fontsize="medium")
        axes.set(xlabel="confidence (%)", ylabel="accuracy (%)")
        axes.grid(alpha=0.3)
    limits = 10 * math.floor(lowest / 10) - 2, 102
    for axes in grid:
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.locator_params(nbins=5)
    legend = [
        Line2D([], [], color="dimgrey", marker="o", label="a 15th of the images" + " as trained" * bool(scaled)),
        *[Line2D([], [], color="black", marker="s", linestyle="--", label="temperature-scaled")] * bool(scaled),
        Patch(color="dimgrey", alpha=0.3, linewidth=0, label="95% interval"),
        Line2D([], [], color="grey", linestyle=":", label="perfectly calibrated"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=4 if columns > 1 else 2, frameon=False)
    return figure


def gallery_figure(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: dict[str, np.ndarray],
    classes: tuple[str, ...],
    colours: dict[str, str],
) -> Figure:
    """Images (k, H, W, 3) as they are, their labels (k,), and what each model says of them, from its (k, C)."""
    columns = 3
    rows = math.ceil(len(images) / columns)
    figure = blank_figure(10, 1.35 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, label, *said in zip(grid, images, labels, *probabilities.values(), strict=False):
        axes.imshow(image, interpolation="nearest")
        (height, width), side = image.shape[:2], max(image.shape[:2])  # a square for the image, and text beside it
        left, top = (width - side) / 2 - 0.5, (height - side) / 2 - 0.5
        axes.set(xlim=(left, left + 2.45 * side), ylim=(top + side, top), anchor="W")
        beside = {"fontsize": 8.5, "va": "top", "transform": axes.transAxes}
        axes.text(0.43, 0.96, f"true: {plain(classes[label], 13)}", weight="bold", **beside)
        for line, (name, p) in enumerate(zip(probabilities, said, strict=True)):
            at, predicted = 0.70 - 0.24 * line, p.argmax()
            text = f"{'✓' if predicted == label else '✗'} {plain(classes[predicted], 11)}, {100 * p[predicted]:.0f}%"
            axes.text(0.43, at, "■", color=colours[name], **beside)
            axes.text(0.49, at, text, **beside)
    legend = [
        Line2D([], [], linestyle="", marker="s", color=colours[name], label=plain(name)) for name in probabilities
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    return figure


def report_figure(report: dict[str, Any], classes: tuple[str, ...], title: str) -> Figure:
    """Precision, recall and F1 for each class and on average, from scikit-learn's classification_report."""
    rows = [*classes, "macro avg", "weighted avg"]
    columns = ["precision", "recall", "f1-score"]
    values = np.array([[100 * report[row][column] for column in columns] for row in rows])
    figure = blank_figure(5.5, min(0.4 * len(rows) + 1.2, 14))
    axes = figure.subplots()
    names = [f"{plain(row)} ({report[row]['support']:,.0f})" for row in rows]
    floor = min(90.0, 10 * math.floor(values.min() / 10))
    seaborn.heatmap(
        values,
        annot=len(classes) <= 40,
        fmt=".1f",
        vmin=floor,
        vmax=100,
        cmap="Blues",
        linewidths=0.5 if len(classes) <= 40 else 0,
        xticklabels=columns,
        yticklabels=names,
        cbar_kws={"label": "%"},
        ax=axes,
    )
    axes.axhline(len(classes), color="black", linewidth=1.5)
    axes.set(ylabel="class (images)", title=plain(title))
    axes.tick_params(axis="y", rotation=0, labelsize=label_size(classes))
    return figure


def curves_figure(
    histories: dict[str, dict[int, list[dict[str, float]]]], colours: dict[str, str] | None = None
) -> Figure:
    """Loss and accuracy by epoch: model -> seed -> records. Lines are means over the seeds, bands their range."""
    figure = blank_figure(9, 3.8)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    colours = colours or model_colours(histories)
    for name, by_seed in histories.items():
        records = list(by_seed.values())
        held_out = next(key for key in ("validation_accuracy", "test_accuracy") if key in records[0][0])
        epochs = [record["epoch"] for record in records[0]]
        for axes, key, scale, style in (
            (loss_axes, "loss", 1, "-"),
            (accuracy_axes, "train_accuracy", 100, ":"),
            (accuracy_axes, held_out, 100, "-"),
        ):
            values = scale * np.array([[record[key] for record in history] for history in records])  # (S, epochs)
            axes.plot(epochs, values.mean(0), style, color=colours[name], marker=".", label=plain(name))
            axes.fill_between(epochs, values.min(0), values.max(0), color=colours[name], alpha=0.2, linewidth=0)
    loss_axes.set(xlabel="epoch", ylabel="loss (nats)", yscale="log")
    loss_axes.set_title("training loss, each recipe's own", fontsize="medium")
    accuracy_axes.set(xlabel="epoch", ylabel="accuracy (%)")
    accuracy_axes.set_title(f"solid: {held_out.split('_')[0]} images, dotted: training images", fontsize="medium")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    lines, names = loss_axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 6), frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The report


def cell(value: Any) -> str:
    """A value as one cell of a Markdown table, whatever characters a class name has."""
    return printable(" ".join(str(value).split())).replace("\\", r"\\").replace("|", r"\|")


def table(header: list[Any], rows: list[list[Any]]) -> str:
    """A Markdown table, its first column left and the others right."""
    lines = [[cell(value) for value in row] for row in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = widths
    rule = [":" + "-" * (first - 1), *("-" * (width - 1) + ":" for width in others)]
    padded = [
        " | ".join([row[0].ljust(first), *(value.rjust(width) for value, width in zip(row[1:], others, strict=True))])
        for row in lines
    ]
    padded.insert(1, " | ".join(rule))
    return "\n".join(f"| {line} |" for line in padded)


def shown(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f}"


def accuracy_table(results: dict[str, Any]) -> str:
    """The original's table: accuracy in percent, a row for each class, a column for each model."""
    models = results["models"]
    rows = [[name, *(percent(model["per_class"][name]) for model in models.values())] for name in results["classes"]]
    overall = []
    for model in models.values():
        accuracy = model["accuracy"]
        spread = "" if accuracy["std"] is None else f" ± {100 * accuracy['std']:.2f}"
        overall.append(f"**{100 * accuracy['mean']:.2f}{spread}**")
    intervals = ["{:.2f} to {:.2f}".format(*(100 * bound for bound in m["accuracy"]["ci95"])) for m in models.values()]
    errors = [percent(model["expected_calibration_error"]) for model in models.values()]
    rows += [["**overall**", *overall], ["95% interval", *intervals], ["calibration error", *errors]]
    return table(["accuracy (%)", *models], rows)


def class_intervals_table(results: dict[str, Any]) -> str:
    models = results["models"]

    def interval(bounds: tuple[float, float] | None) -> str:
        return "none" if bounds is None else "{:.1f} to {:.1f}".format(*(100 * bound for bound in bounds))

    rows = [[c, *(interval(m["per_class_ci95"][c]) for m in models.values())] for c in results["classes"]]
    return table(["accuracy (%)", *models], rows)


def comparison_sentence(comparison: dict[str, Any]) -> str:
    points, detectable = 100 * comparison["difference"], comparison["detectable_difference"]
    low, high = (100 * bound for bound in comparison["ci95"])
    seeds, needed = len(comparison["seeds"]), comparison["seeds_needed"]
    p, p_holm = comparison["p_value"], comparison["p_holm"]
    shown = "no t-test, as all seeds differ alike" if p is None else f"{comparison['test']} p = {p:.2g}"
    sentence = (
        f"{comparison['model']} is {abs(points):.2f} points {'above' if points >= 0 else 'below'} "
        f"{comparison['baseline']} (95% interval {low:+.2f} to {high:+.2f}, {shown}"
        + (f", {p_holm:.2g} after Holm's correction" if p is not None and p_holm != p else "")
        + f", {seeds} seed{'s' * (seeds > 1)}): {comparison['verdict']}."
    )
    if detectable is not None:
        sentence += f" What this design finds with 80% power is a difference of {100 * detectable:.2f} points."
    if comparison["verdict"] != "indistinguishable":
        return sentence + " That is of these two trainings; other seeds may differ." * (seeds == 1)
    if points and needed:
        about = "at least" if seeds == 1 else "about"
        sentence += f" To find one of {abs(points):.2f} takes {about} {needed:,} seed{'s' * (needed > 1)}."
    elif points and detectable is not None:
        sentence += f" To find one of {abs(points):.2f} takes more test images, not more seeds."
    return sentence


def setup_table(config: Config, names: Iterable[str]) -> str:
    fields = ("arch", "pretrained", "epochs", "train_size", "schedule", "lr", "momentum", "weight_decay", "teacher")
    taught_only = ("alpha", "temperature", "scale_soft_loss")

    def setting(field: str, recipe: Recipe) -> Any:
        value = getattr(recipe, field)
        if field in taught_only and not recipe.teacher:
            return ""
        return {"train_size": "all", "teacher": "none"}[field] if value is None else str(value).lower()

    recipes = [config.recipes[name] for name in names]
    rows = [[field, *(setting(field, recipe) for recipe in recipes)] for field in (*fields, *taught_only)]
    return table(["", *names], rows)


def picture(path: str, caption: str) -> str:
    return f"![{caption.partition('.')[0]}]({path})\n\n*{caption}*"


def cost_sentence(name: str, models: dict[str, Any]) -> str:
    teacher = models[name]["teacher"]
    cost, of_teacher = models[name]["cost"], models[teacher]["cost"]
    speed, speed_of_teacher = (c["images_per_second"]["median"] for c in (cost, of_teacher))
    accuracy, accuracy_of_teacher = (models[m]["accuracy"]["mean"] for m in (name, teacher))
    parameters, multiplications = (cost[key] / of_teacher[key] for key in ("parameters", "multiply_accumulates"))
    kept = f"keeps {accuracy / accuracy_of_teacher:.1%} of {teacher}'s accuracy" if accuracy_of_teacher else "runs"
    if accuracy > accuracy_of_teacher:
        kept = f"is {100 * (accuracy - accuracy_of_teacher):.2f} points more accurate than {teacher}"
    return (
        f"{name} {kept}, at {speed_of_teacher / speed:.0%} of its time per image (in "
        f"batches of {cost['images_per_second']['batch_size']}), {parameters:.0%} of its parameters and "
        f"{multiplications:.0%} of its multiply-accumulates."
    )


def cost_section(results: dict[str, Any], image_size: int) -> list[str]:
    models, environment = results["models"], results["environment"]
    costs = [model["cost"] for model in models.values()]

    def timing(entry: dict[str, Any], form: str) -> str:
        low, high = entry["quartiles"]
        return f"{entry['median']:{form}} ({low:{form}} to {high:{form}})"

    rows = [
        ["parameters (million)", *(f"{cost['parameters'] / 1e6:.1f}" for cost in costs)],
        ["multiply-accumulates (million)", *(f"{cost['multiply_accumulates'] / 1e6:,.0f}" for cost in costs)],
        ["checkpoint (MB)", *(f"{cost['bytes_on_disk'] / 1e6:.1f}" for cost in costs)],
        ["one image (ms)", *(timing(cost["latency_ms"], ".3g") for cost in costs)],
        ["images per second", *(timing(cost["images_per_second"], ",.0f") for cost in costs)],
    ]
    one, many = costs[0]["latency_ms"], costs[0]["images_per_second"]
    return [
        "\n".join(f"- {cost_sentence(name, models)}" for name, m in models.items() if m["teacher"] in models),
        table(["", *models], rows),
        f"At {image_size} px, from the bytes of an image to its logits, on {environment['device']} in "
        f"{environment['precision']}: medians, in brackets quartiles, of {one['n']} runs with one image and of "
        f"{many['n']} with {many['batch_size']}. Each architecture was timed once, in turns with the others.",
    ]


def calibration_section(results: dict[str, Any]) -> list[str]:
    models = results["models"]
    scaled = [model["temperature_scaled"] for model in models.values()]
    metrics = {
        "negative log-likelihood (nats)": ("negative_log_likelihood", 1, ".3f"),
        "Brier score (0 to 2)": ("brier_score", 1, ".3f"),
        "calibration error (points)": ("expected_calibration_error", 100, ".1f"),
    }

    def row(title: str, entries: Iterable[dict[str, Any] | None], key: str, scale: float, form: str) -> list[str]:
        values = [(entry or {}).get(key) for entry in entries]
        return [title, *(shown(None if value is None else scale * value, form) for value in values)]

    rows = [row(title, models.values(), *metric) for title, metric in metrics.items()]
    by_chance = "calibration error if calibrated (points)", models.values(), "calibration_error_by_chance", 100, ".1f"
    rows.append(row(*by_chance))
    if any(scaled):
        rows.append(row("temperature", scaled, "temperature", 1, ".2f"))
        rows += [row(f"scaled: {title}", scaled, *metric) for title, metric in metrics.items()]
    return [
        "Can a model's probabilities be believed? All of these are better when smaller. The calibration error is the "
        "mean distance between how sure a model is and how often it is right, over 15 bins of equally many images; "
        "if calibrated: what a model as sure as this one would show by chance if it were perfectly calibrated."
        + " Scaled: logits divided by the temperature that fits the validation images best."
        * any(scaled),
        table(["", *models], rows),
        picture(
            "reliability.png",
            "Accuracy against confidence. Below the dotted line a model is surer than it is right.",
        ),
    ]


def soft_target_sentence(row: dict[str, Any], classes: int) -> str:
    return (
        f"What {row['model']} sees of {row['teacher']} on {row['images']:,} training images: it is right on "
        f"{percent(row['accuracy'])}% and {percent(row['confidence'])}% sure on average, with an entropy of "
        f"{shown(row['entropy'], '.3f')} nats, and of {shown(row['entropy_at_temperature'], '.3f')} at the T = "
        f"{row['temperature']:g} of the soft loss. At T = 1, 0 nats mean that it is certain (and where it is also "
        f"right, that it adds nothing to the labels), and ln {classes} = {math.log(classes):.2f} would be guessing."
    )


def fidelity_section(results: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["model"],
            row["teacher"],
            percent(row["agreement"]),
            f"{percent(row['agreement_where_teacher_wrong'])}% of {row['teacher_wrong']:,}",
            shown(row["kl"], ".3f"),
            f"{shown(row['kl_at_temperature'], '.3f')} (T = {row['temperature']:g})",
        ]
        for row in results["fidelity"]
    ]
    header = ["", "teacher", "same class (%)", "where teacher is wrong (%)", "KL (nats)", "KL at T (nats)"]
    over = " (of the images of all seeds together)" * any(len(row["seeds"]) > 1 for row in results["fidelity"])
    return [
        "Does the student say what its teacher says? How often both predict the same class of a test image, also where "
        f"that is wrong{over}, and how far the student's probabilities are from the teacher's (Kullback-Leibler "
        "divergence, 0 if they are the same). Hard images fool every model: what the taught student shares beyond "
        "what the student alone does comes from the teacher.",
        table(header, rows),
        *(soft_target_sentence(row, len(results["classes"])) for row in results["soft_targets"]),
    ]


def difference_section(comparison: dict[str, Any]) -> list[str]:
    name, baseline = comparison["model"], comparison["baseline"]
    known = {c: entry for c, entry in comparison["per_class"].items() if entry["ci95"]}
    clear = [
        f"{cell(c)} ({100 * entry['difference']:+.1f})"
        for c, entry in known.items()
        if not entry["ci95"][0] <= 0 <= entry["ci95"][1]
    ]
    listed = ", ".join(clear[:10]) + f" and {len(clear) - 10} more" * (len(clear) > 10)
    gallery = comparison["disagreements"]
    told = f"Beyond chance in {listed} points. " if clear else "In no class is the difference beyond chance. "
    told += f"Even between equal models about 1 class in 20 would look so; there are {len(known)}."
    return [
        f"**{name} and {baseline}.** " + (told if known else "No class has ten test images, too few for an interval."),
        picture(
            f"{name}/class_differences.png",
            f"Accuracy of {name} minus that of {baseline} in each class, with 95% intervals.",
        )
        if known
        else "",
        picture(
            f"{name}/confusion_difference.png",
            f"Confusion matrix of {name} minus that of {baseline}. Purple: {name} says so more often; on the diagonal "
            "that is right, elsewhere wrong.",
        ),
        picture(
            f"{name}/disagreements.png",
            f"Test images on which {', '.join(gallery['models'][:-1])} and {gallery['models'][-1]} (seed "
            f"{gallery['seed']}) do not all agree. {len(gallery['shown'])} of {gallery['count']:,}, drawn at random. "
            "✓ right, ✗ wrong, with the probability of what is said.",
        )
        if gallery
        else "",
    ]


def confused_section(models: dict[str, Any]) -> list[str]:
    columns = [
        [f"{pair['true']} as {pair['predicted']} ({percent(pair['share'])}%)" for pair in model["most_confused"]]
        for model in models.values()
    ]
    ranks = itertools.zip_longest(*columns, fillvalue="")
    rows = [[rank, *row] for rank, row in enumerate(ranks, 1)]
    told = "Most confused: true class as predicted class (share of the true class)."
    return [told, table(["", *models], rows)] if rows else ["No image is taken for something else."]


def results_markdown(results: dict[str, Any], config: Config) -> str:
    """The report: the verdicts first, then what they rest on."""
    models, comparisons = results["models"], results["comparisons"]
    environment_line = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    seeds = ", ".join(sorted({seed for model in models.values() for seed in model["accuracy"]["seeds"]}, key=int))
    missing = "".join(f"\n- {path}" for path in results["missing"])
    parts = [
        f"# {results['run']}",
        "\n".join([*(f"- {comparison_sentence(comparison)}" for comparison in comparisons), *uncompared(results)]),
        "## Set-up",
        f"{config.dataset}, {results['n_test']:,} test images, {config.image_size} px, batch size {config.batch_size}, "
        f"seeds: {seeds}.",
        setup_table(config, list(models)),
        f"Not trained yet, left out:\n{missing}" if missing else "",
        "## Accuracy",
        "How many of the test images a model gets right, in percent: in each class, and of all (± standard deviation "
        "over the seeds). The 95% interval says how far that could be off because the test images are few (one seed: "
        "Wilson's) or because seeds differ (several: Student's t over the seeds, on these same test images)."
        + " Better or worse is said only where p is below 0.05 and the interval of the difference leaves out 0."
        * bool(comparisons),
        accuracy_table(results),
        "The same 95% intervals class by class (Wilson's):",
        class_intervals_table(results),
        *(
            picture(f"{name}/confusion_matrix.png", f"Confusion matrix of {name}, counts of all seeds together.")
            for name in models
        ),
        "## Cost",
        *cost_section(results, config.image_size),
        "## Calibration",
        *calibration_section(results),
        *(["## Fidelity", *fidelity_section(results)] if results["fidelity"] else []),
        "## Where they differ",
        *itertools.chain.from_iterable(map(difference_section, comparisons)),
        *confused_section(models),
        "## Training",
        picture(
            "training_curves.png", "Loss and accuracy by epoch. Lines are means over the seeds, bands their range."
        ),
        "## Environment",
        f"{environment_line}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def uncompared(results: dict[str, Any]) -> list[str]:
    """A line for each taught model that stands alone."""
    compared = {comparison["model"] for comparison in results["comparisons"]}
    return [
        f"- {name} is compared with nothing: no trained {m['arch']} without a teacher shares a seed with it."
        for name, m in results["models"].items()
        if m["teacher"] and name not in compared
    ]


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def model_figures(
    config: Config,
    dataset: Dataset,
    models: dict[str, Evaluated],
    labels: np.ndarray,
    fitted: dict[str, dict[int, float]],
) -> Iterator[tuple[str, Figure]]:
    """Path and figure of all that shows the models one by one, or all of them; `fitted`: model -> `temperatures`."""
    colours, classes = model_colours(config.recipes), dataset.classes
    for name, model in models.items():
        over = f"{name}, {model.recipe.arch}" + (f", {len(model.logits)} seeds" if len(model.logits) > 1 else "")
        counts = confusion_counts(model, labels, len(classes), model.logits)
        yield f"{name}/confusion_matrix.png", confusion_figure(counts, classes, over)
        named = sklearn_report(model, labels, classes, output_dict=True)
        yield f"{name}/classification_report.png", report_figure(named, classes, over)
    yield "training_curves.png", curves_figure({name: model.history for name, model in models.items()}, colours)
    scaled = {name: [models[name].logits[seed] / t for seed, t in by.items()] for name, by in fitted.items() if by}
    as_trained = {name: list(model.logits.values()) for name, model in models.items()}
    yield "reliability.png", reliability_figure(as_trained, labels, colours, scaled)


def comparison_figures(
    config: Config, dataset: Dataset, models: dict[str, Evaluated], labels: np.ndarray, comparison: dict[str, Any]
) -> Iterator[tuple[str, Figure]]:
    """Path and figure of all that shows a model beside its baseline."""
    name, baseline, seeds = (comparison[key] for key in ("model", "baseline", "seeds"))
    colours, classes = model_colours(config.recipes), dataset.classes
    title = f"{name} minus {baseline}"
    if any(entry["ci95"] for entry in comparison["per_class"].values()):
        yield f"{name}/class_differences.png", class_differences_figure(comparison["per_class"], title, colours[name])
    counts = [confusion_counts(models[m], labels, len(classes), seeds) for m in (name, baseline)]
    yield f"{name}/confusion_difference.png", confusion_difference_figure(*counts, classes, title)
    if gallery := comparison["disagreements"]:
        shown = np.array(gallery["shown"])
        probabilities = {
            m: log_probabilities(models[m].logits[gallery["seed"]][shown]).exp().numpy() for m in gallery["models"]
        }
        index = torch.as_tensor(shown, device=dataset.test.images.device)
        images = dataset.test.images[index].permute(0, 2, 3, 1).cpu().numpy()
        yield f"{name}/disagreements.png", gallery_figure(images, labels[shown], probabilities, classes, colours)


def sklearn_report(model: Evaluated, labels: np.ndarray, classes: tuple[str, ...], output_dict: bool = False) -> Any:
    """scikit-learn's classification_report over the predictions of all seeds."""
    named = {"labels": range(len(classes)), "target_names": classes, "digits": 4, "zero_division": 0}
    predictions = np.concatenate(list(model.predictions.values()))
    return classification_report(np.tile(labels, len(model.logits)), predictions, **named, output_dict=output_dict)


def report(
    config: Config,
    dataset: Dataset,
    models: dict[str, Evaluated],
    seen_by_students: list[dict[str, Any]],
    missing: list[Path],
) -> dict[str, Any]:
    """Write every file of the report and return what results.json holds. `seen_by_students`: from `soft_targets`."""
    labels, classes = dataset.test.labels.cpu().numpy(), dataset.classes
    validation_labels = dataset.validation.labels.cpu().numpy() if dataset.validation else None
    folder = Path(config.imgs_path, config.run)
    fitted = {name: temperatures(model, validation_labels) for name, model in models.items()}
    cost = costs(config, dataset, models)
    results = {
        "run": config.run,
        "dataset": config.dataset,
        "classes": list(classes),
        "n_test": len(labels),
        "models": {
            name: {**model_metrics(model, labels, classes, fitted[name]), "cost": cost[name]}
            for name, model in models.items()
        },
        "comparisons": [
            {**comparison, "disagreements": disagreements(comparison["model"], models)}
            for comparison in compare_all(models, labels, classes)
        ],
        "fidelity": fidelity(models, labels),
        "soft_targets": seen_by_students,
        "missing": [str(path) for path in missing],
        "settings": {
            **dataclasses.asdict(config),
            "recipes": {n: dataclasses.asdict(m.recipe) for n, m in models.items()},
        },
        "environment": {**environment(config), "numpy": np.__version__, "scikit-learn": sklearn.__version__},
    }
    beside = (comparison_figures(config, dataset, models, labels, c) for c in results["comparisons"])
    for path, figure in itertools.chain(model_figures(config, dataset, models, labels, fitted), *beside):
        write_durably(folder / path, png(figure))
    for name, model in models.items():
        text = sklearn_report(model, labels, classes)
        write_durably(folder / name / "classification_report.txt", text.encode())

    arrays = {"labels": labels}
    arrays |= {f"{name}/seed{seed}": logits for name, model in models.items() for seed, logits in model.logits.items()}
    if dataset.validation:
        arrays["validation/labels"] = validation_labels
        for name, model in models.items():
            arrays |= {f"validation/{name}/seed{seed}": z for seed, z in model.validation_logits.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_durably(folder / "predictions.npz", buffer.getvalue())
    write_durably(folder / "results.json", (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
    write_durably(folder / "results.md", results_markdown(results, config).encode())
    return results


# ---------------------------------------------------------------------------------------------------------------------
# --predict: a person's own images


def read_image(path: str) -> torch.Tensor:
    """uint8 (1, 3, H, W), upright. Raises UserError if it cannot be read."""
    return torch.from_numpy(np.array(open_image(path, upright=True))).permute(2, 0, 1).unsqueeze(0)


def read_images(paths: list[str]) -> list[torch.Tensor]:
    """Each file's image. Raises UserError with a line for each that cannot be read."""
    images, problems = [], []
    for path in paths:
        try:
            images.append(read_image(path))
        except UserError as error:
            problems += error.messages
    if problems:
        raise UserError(*problems)
    return images


def predict_files(paths: list[str], config: Config) -> list[str]:
    """A table for each image file: the class and the probabilities (%) of every trained recipe and seed.

    The classes and the image size come from the checkpoints. Of many classes, the 20 that any model finds likeliest.
    """
    images = read_images(paths)
    columns = []  # for each model its title, its classes and its probabilities (files, C)
    for name, seed in itertools.product(config.selected(), config.seeds):
        path = checkpoint_path(config, name, seed)
        state = load_finished(path)
        if not state:
            say(f"not trained yet, left out: {path}")
            continue
        model, size = load_model(state, config.device), state["settings"]["image_size"]
        logits = torch.cat([predict(model, image, size) for image in images])
        columns.append((f"{name} seed {seed}", state["classes"], torch.softmax(logits, 1).cpu().numpy()))
    if not columns:
        raise UserError("nothing to predict with; train first: python teacher_student_model.py, with the same flags")

    def block(number: int, path: str) -> str:
        said = [dict(zip(classes, p[number].tolist(), strict=True)) for _, classes, p in columns]
        classes = dict.fromkeys(itertools.chain(*said))
        likeliest = sorted(classes, key=lambda c: max(p.get(c, 0.0) for p in said), reverse=True)[:20]
        rows = [["**class**", *(f"**{printable(max(p, key=p.get))}**" for p in said)]]
        rows += [[printable(c), *(percent(p.get(c)) for p in said)] for c in classes if c in likeliest]
        return table([printable(path), *(title for title, *_ in columns)], rows)

    return [block(number, path) for number, path in enumerate(paths)]


# ---------------------------------------------------------------------------------------------------------------------
# --export: a model that needs only torch

ONE = 1 << 22  # Pillow's weights are multiples of 1 / ONE


def resize_matrix(before: int, after: int) -> torch.Tensor:
    """Pillow's bilinear filter from `before` to `after` pixels: whole weights (after, before), in float64.

    The arithmetic of utils.resize_taps (Pillow, src/libImaging/Resample.c) in tensors, so that `before` may be a size
    that is not known yet when the model is exported.
    """
    scale = torch.full((), before, dtype=torch.float64) / after
    support = scale.clamp(min=1)
    centers = (torch.arange(after, dtype=torch.float64) + 0.5) * scale  # (after,)
    distance = (torch.arange(before, dtype=torch.float64) + 0.5 - centers.unsqueeze(1)).abs() / support
    weights = (1 - distance).clamp(min=0)
    return (0.5 + weights / weights.sum(1, keepdim=True) * ONE).floor()


def resize_by_matrices(images: torch.Tensor, size: int) -> torch.Tensor:
    """utils.resize to the bit, uint8 (N, 3, H, W) -> float64 (N, 3, size, size): its sums stay below 2^53, so exact."""
    height, width = images.shape[2:]
    rows = images.to(torch.float64) @ resize_matrix(width, size).T
    rows = ((rows + ONE // 2) / ONE).floor()
    return ((resize_matrix(height, size) @ rows + ONE // 2) / ONE).floor()


class Exportable(nn.Module):
    """uint8 images (N, 3, H, W) of any size -> probabilities (N, C): what `predict` does, in one module."""

    def __init__(self, model: nn.Module, image_size: int):
        super().__init__()
        self.model = fold_batchnorm(model).requires_grad_(False).to(memory_format=torch.contiguous_format)
        self.image_size = image_size
        mean, std = imagenet_statistics(torch.device("cpu"))
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        resized = resize_by_matrices(images, self.image_size).to(torch.float32)
        normalised = resized.div(255).sub(self.mean).div(self.std).contiguous(memory_format=torch.channels_last)
        return torch.softmax(self.model(normalised), dim=1)


def export_program(model: nn.Module, image_size: int, about: dict[str, Any]) -> bytes:
    """A .pt2 file: torch.export.load(path).module()(images). `about` goes in as the extra file about.json."""
    dynamic = {axis: torch.export.Dim(name) for axis, name in {0: "N", 2: "H", 3: "W"}.items()}
    example = torch.zeros(2, 3, image_size + 1, image_size + 2, dtype=torch.uint8)
    program = torch.export.export(Exportable(model, image_size).eval(), (example,), dynamic_shapes=(dynamic,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"about.json": json.dumps(about)})
    return buffer.getvalue()


def check_export(content: bytes, path: Path, images: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference from the expected probabilities (n, C). Raises UserError for any other model than that."""
    program = torch.export.load(io.BytesIO(content)).module()
    with torch.inference_mode():
        found = torch.cat([program(chunk) for chunk in images.split(100)])
    differing, largest = int((found.argmax(1) != expected.argmax(1)).sum()), (found - expected).abs().max().item()
    if differing or not largest <= 1e-4:
        raise UserError(
            f"{path}: the exported model is not the checkpoint's: another class on {differing} of {len(images):,} test "
            f"images, probabilities up to {largest:.2g} apart. It was not written; please report this as a bug"
        )
    return largest


def export(config: Config, dataset: Dataset) -> None:
    """Write MODEL.pt2 beside each taught model's checkpoint (or each that `only` names), checked on the test images."""
    everyone = config.selected()
    names = everyone if config.only else [n for n in everyone if config.recipes[n].teacher] or everyone
    images, missing, exported = dataset.test.images.cpu(), [], 0
    for name, seed, state, _ in finished_checkpoints(config, dataset, missing):
        if name not in names:
            continue
        model, path = load_model(state, "cpu"), checkpoint_path(config, name, seed).with_suffix(".pt2")
        title = f"{name} seed {seed}"
        logits = predict(model, images, config.image_size, "fp32", title=title)
        about = {"name": name, "seed": seed, "classes": state["classes"], "image_size": config.image_size}
        content = export_program(model, config.image_size, about)
        largest = check_export(content, path, images, torch.softmax(logits, dim=1))
        write_durably(path, content)
        say(
            f"{title}  exported: {path}, {path.stat().st_size / 1e6:.1f} MB. Loaded again before it was written, it "
            f"agrees with the checkpoint: the same class on all {len(images):,} test images, probabilities at most "
            f"{largest:.1g} apart"
        )
        exported += 1
    for path in missing:
        say(f"not trained yet, left out: {path}")
    if not exported:
        raise UserError("nothing to export; train first: python teacher_student_model.py, with the same flags")


# ---------------------------------------------------------------------------------------------------------------------
# The command line

OWN_FLAGS = {
    "--predict IMAGE ...": "no report: the class and the probabilities of these image files, from each trained model",
    "--export": "no report: write MODEL.pt2, which needs only torch, beside each taught model (or each in --only)",
}


def own_flags(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """What is only this script's, and the rest of the command line."""
    parser = Parser(add_help=False, allow_abbrev=False)
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--predict", nargs="+")
    one_of.add_argument("--export", action="store_true")
    return parser.parse_known_args(argv)


@as_script()
def main(argv: list[str] | None = None) -> None:
    own, rest = from_first(lambda: own_flags(argv))
    config = settle(from_first(lambda: parse(rest, OWN_FLAGS)))
    if processes() > 1 and (own.predict or own.export):
        raise UserError("--predict and --export take one process: python evaluate.py, without torchrun")
    if own.predict:
        print("\n\n".join(predict_files(own.predict, config)))
        return
    dataset = load_everywhere(config)
    if own.export:
        export(config, dataset)
        return
    with locked(Path(config.imgs_path, config.run)):
        models, missing = evaluate_checkpoints(config, dataset)
        for path in missing:
            say(f"not trained yet, left out: {path}")
        if not models:
            raise UserError("nothing to evaluate; train first: python teacher_student_model.py, with the same flags")
        seen_by_students = soft_targets(config, dataset, models)
        if rank() == 0:
            results = report(config, dataset, models, seen_by_students, missing)
            print(accuracy_table(results))
            for comparison in results["comparisons"]:
                print(comparison_sentence(comparison))
            say(f"The report: {Path(config.imgs_path, config.run, 'results.md')}")


if __name__ == "__main__":
    main()
