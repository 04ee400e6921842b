"""Metrics of one model, functions of its logits (n, C) and of the labels (n,)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from sklearn.metrics import brier_score_loss, confusion_matrix

from engine.recipes import Recipe
from report.statistics import accuracy_interval, wilson_interval

NONE: Mapping[int, Any] = MappingProxyType({})


class Evaluated(NamedTuple):
    """A recipe's models of several seeds, evaluated; n test images, m validation images, C classes."""

    recipe: Recipe
    logits: Mapping[int, np.ndarray]  # seed -> (n, C) float32
    history: Mapping[int, list[dict[str, float]]]  # seed -> a record for each epoch
    validation_logits: Mapping[int, np.ndarray] = NONE  # seed -> (m, C) float32, if there are validation images
    digests: Mapping[int, str] = NONE  # seed -> of the weights
    environments: Mapping[int, dict[str, str]] = NONE  # seed -> of the training
    temperatures: Mapping[int, float] = NONE  # seed -> fitted to the validation images, if there are any

    @property
    def predictions(self) -> dict[int, np.ndarray]:
        return {seed: logits.argmax(1) for seed, logits in self.logits.items()}  # (n,)

    @property
    def scaled(self) -> list[np.ndarray]:
        """The logits (n, C) of each seed, divided by its temperature; none without temperatures."""
        return [self.logits[seed] / temperature for seed, temperature in self.temperatures.items()]

    def correct(self, labels: np.ndarray, seeds: Iterable[int] | None = None) -> np.ndarray:
        """(S, n) bool: which images are classified correctly, by each of these seeds, or of all."""
        return np.stack([self.logits[s].argmax(1) == labels for s in (self.logits if seeds is None else seeds)])


def finite_or_none(value: float) -> float | None:
    """A number as JSON can hold it."""
    return float(value) if math.isfinite(value) else None


def mean(values: Iterable[float]) -> float | None:
    return finite_or_none(float(np.mean([*values])))


def means(rows: Iterable[dict[str, float]]) -> dict[str, float | None]:
    """The mean of each entry over rows with the same keys, such as one per seed."""
    rows = [*rows]
    return {key: mean(row[key] for row in rows) for key in rows[0]}


def log_probabilities(logits: np.ndarray, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / T), (n, C) float64."""
    return F.log_softmax(torch.as_tensor(logits, dtype=torch.float64) / temperature, dim=1)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label), in nats: the cross-entropy."""
    return F.nll_loss(log_probabilities(logits), torch.as_tensor(labels)).item()


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    """Squared distance of the probabilities from the one-hot labels, 0 to 2, summed over classes, mean over images.

    Brier 1950, Monthly Weather Review 78, 1-3, in his own form for several classes.
    """
    p = log_probabilities(logits).exp().numpy()
    if not np.isfinite(p).all():
        return math.nan
    return float(brier_score_loss(labels, p, labels=range(p.shape[1]), scale_by_half=False))


def confidences(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the predicted class (n,), and whether it is right (n,) bool."""
    confidence, prediction = (array.numpy() for array in log_probabilities(logits).exp().max(dim=1))
    return confidence, prediction == np.asarray(labels)


def equal_mass_bins(confidence: np.ndarray, bins: int = 15) -> list[np.ndarray]:
    """Indices of the images, by increasing confidence, in bins whose sizes differ by at most one.

    Images of equal confidence are in random order, always the same: their own order may be that of the classes.
    """
    shuffled = np.random.default_rng(0).permutation(len(confidence))
    return np.array_split(shuffled[np.argsort(confidence[shuffled], kind="stable")], bins)


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between confidence and accuracy over 15 bins of equally many images, 0 to 1.

    The error as in Guo et al. 2017 (arXiv 1706.04599), equal-mass bins as in Nguyen and O'Connor 2015 (1508.05154).
    """
    confidence, correct = confidences(logits, labels)
    error = sum(abs(confidence[b].sum() - correct[b].sum()) for b in equal_mass_bins(confidence))
    return float(error / len(confidence))


def calibration_error_by_chance(logits: np.ndarray) -> float:
    """The expected calibration error that these logits (n, C) would have if they were perfectly calibrated.

    It is above 0 because each bin has few images. Mean over 20 sets of labels drawn from the model's own probabilities.
    """
    random, p = np.random.default_rng(0), log_probabilities(logits).exp().numpy()
    if not np.isfinite(p).all():
        return math.nan
    cumulative = p.cumsum(1)
    errors = []
    for _ in range(20):
        drawn = (cumulative < random.random((len(p), 1))).sum(1).clip(max=p.shape[1] - 1)  # (n,)
        errors.append(expected_calibration_error(logits, drawn))
    return float(np.mean(errors))


def reliability(by_seed: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Rows (15, 4) of confidence, accuracy and its 95% interval; the images are pooled over seeds, then binned.

    The interval is Wilson's for the number of distinct images: several seeds that see the same ones do not narrow it.
    """
    pooled = zip(*(confidences(logits, labels) for logits in by_seed), strict=True)
    confidence, correct = (np.concatenate(parts) for parts in pooled)
    rows = []
    for b in equal_mass_bins(confidence, min(15, len(labels))):
        low, high = wilson_interval(correct[b].sum() / len(by_seed), len(b) / len(by_seed))
        rows.append((confidence[b].mean(), correct[b].mean(), low, high))
    return np.array(rows)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T, from 0.01 to 100, that minimises the negative log-likelihood of softmax(logits / T); NaN for NaN.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2). The negative log-likelihood is convex in
    b = 1/T; its derivative is the mean of sum_c p_c z_c - z_label. If every image is classified correctly there is no
    minimum, and T is 0.01.
    """
    z = torch.as_tensor(logits, dtype=torch.float64)
    if not z.isfinite().all():
        return math.nan
    of_label = z.gather(1, torch.as_tensor(labels).unsqueeze(1)).mean()

    def slope(log_b: float) -> float:
        return ((torch.softmax(math.exp(log_b) * z, dim=1) * z).sum(1).mean() - of_label).item()

    low, high = math.log(0.01), math.log(100)
    if slope(low) >= 0:
        return 100.0
    return math.exp(-brentq(slope, low, high)) if slope(high) > 0 else 0.01


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    metrics = (negative_log_likelihood, brier_score, expected_calibration_error)
    measured = {metric.__name__: metric(logits, labels) for metric in metrics}
    return measured | {"calibration_error_by_chance": calibration_error_by_chance(logits)}


def kl_divergence(teacher: np.ndarray, student: np.ndarray, temperature: float = 1.0) -> float:
    """Mean of KL(softmax(v / T) || softmax(z / T)) in nats, for the teacher's logits v and the student's z."""
    v, z = log_probabilities(teacher, temperature), log_probabilities(student, temperature)
    return F.kl_div(z, v, reduction="batchmean", log_target=True).item()


def soft_target_metrics(logits: np.ndarray, temperature: float) -> dict[str, float]:
    """Of a teacher's softmax(logits / T): the mean entropy in nats, and the mean of the highest probability."""
    log_p = log_probabilities(logits, temperature)
    p = log_p.exp()
    return {"entropy": torch.special.entr(p).sum(1).mean().item(), "confidence": p.max(dim=1).values.mean().item()}


def confusion_counts(
    model: Evaluated, labels: np.ndarray, classes: int, seeds: Iterable[int] | None = None
) -> np.ndarray:
    """(C, C), rows true classes, summed over these seeds, or over all."""
    seeds = model.logits if seeds is None else seeds
    return sum(confusion_matrix(labels, model.logits[seed].argmax(1), labels=range(classes)) for seed in seeds)


def row_shares(counts: np.ndarray) -> np.ndarray:
    """Confusion counts (C, C) as shares of the true class."""
    return counts / counts.sum(1, keepdims=True)


def most_confused(counts: np.ndarray, classes: Sequence[str], most: int = 5) -> list[dict[str, Any]]:
    """The most frequent confusions, each with its share of the true class."""
    wrong, shares = counts - np.diag(np.diag(counts)), row_shares(counts)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(classes)) for place in order]
    return [
        {"true": classes[t], "predicted": classes[p], "count": int(wrong[t, p]), "share": float(shares[t, p])}
        for t, p in pairs
        if wrong[t, p]
    ]


def soft_share(model: Evaluated) -> dict[str, float] | None:
    """The soft loss's share of the gradient at the logits, in the first and last epoch, and by its weight."""
    histories = [history for history in model.history.values() if history and "soft_share" in history[0]]
    if not histories:
        return None
    first, last = (float(np.mean([history[epoch]["soft_share"] for history in histories])) for epoch in (0, -1))
    return {"first": first, "last": last, "suggested": model.recipe.suggested_soft_share}


def count_ties(model: Evaluated) -> int:
    """The images, summed over seeds, whose highest logit is shared by several classes: `argmax` takes the first."""
    return sum(int(((z == z.max(1, keepdims=True)).sum(1) > 1).sum()) for z in model.logits.values())


def only_class(model: Evaluated, classes: Sequence[str]) -> str | None:
    """The class that the model of some seed predicts for every image; None if there is no such seed."""
    predicted = [np.unique(labels) for labels in model.predictions.values()]
    return next((classes[labels[0]] for labels in predicted if len(labels) == 1), None)


def model_metrics(model: Evaluated, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """A model's entry in results.json. Accuracies are fractions; confusion counts are summed over seeds.

    Calibration metrics are means over seeds, and are repeated after scaling by the temperatures, if there are any.
    """
    counts, correct = confusion_counts(model, labels, len(classes)), model.correct(labels)
    accuracies = correct.mean(1)
    by_class = {name: correct[:, labels == label] for label, name in enumerate(classes)}
    scaled = [calibration(logits, labels) for logits in model.scaled]
    return {
        "arch": model.recipe.arch,
        "teacher": model.recipe.teacher,
        "accuracy": {
            "mean": float(accuracies.mean()),
            "std": float(accuracies.std(ddof=1)) if len(accuracies) > 1 else None,
            "ci95": accuracy_interval(correct),
            "seeds": {str(seed): float(a) for seed, a in zip(model.logits, accuracies, strict=True)},
        },
        "balanced_accuracy": float(np.mean([of_class.mean() for of_class in by_class.values()])),
        "only_class": only_class(model, classes),
        "ties": count_ties(model),
        "per_class": {name: float(of_class.mean()) for name, of_class in by_class.items()},
        "per_class_ci95": {name: accuracy_interval(of_class) for name, of_class in by_class.items()},
        "confusion_matrix": counts.tolist(),
        "most_confused": most_confused(counts, classes),
        **means(calibration(logits, labels) for logits in model.logits.values()),
        "reliability": [[*map(finite_or_none, row)] for row in reliability(list(model.logits.values()), labels)],
        "soft_share": soft_share(model),
        "history": {str(seed): records for seed, records in model.history.items()},
        "environments": {str(seed): environment for seed, environment in model.environments.items()},
        "temperature_scaled": {"temperature": mean(model.temperatures.values()), **means(scaled)} if scaled else None,
    }
