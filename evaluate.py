"""Evaluate what was trained: per-class accuracy, confusion matrices, classification reports, curves, comparisons.

    python evaluate.py                          # with the flags that the training had
    python evaluate.py --preset demo

Writes imgs/RUN/results.md and what it shows, results.json (every number) and predictions.npz (the logits behind them),
and prints the table. Three layers: logits from checkpoints; metrics, functions of arrays; figures, from arrays.
"""

import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import seaborn
import sklearn
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, confusion_matrix

from config import Config, Recipe, UserError, parse
from custom_resnet import load_model, predict
from utils import (
    Dataset,
    as_script,
    checkpoint_path,
    environment,
    everywhere,
    from_first,
    load_dataset,
    load_finished,
    locked,
    rank,
    refuse_other_settings,
    resolve,
    say,
    tensors_digest,
    training_settings,
    tune,
    write_durably,
)

# ---------------------------------------------------------------------------------------------------------------------
# Logits, from checkpoints


class Evaluated(NamedTuple):
    """One recipe over the seeds that are trained; n test images, C classes."""

    recipe: Recipe
    logits: dict[int, np.ndarray]  # seed -> (n, C) float32
    history: dict[int, list[dict[str, float]]]  # seed -> a record for each epoch

    @property
    def predictions(self) -> dict[int, np.ndarray]:
        return {seed: logits.argmax(1) for seed, logits in self.logits.items()}  # (n,)


def evaluate_checkpoints(config: Config, dataset: Dataset) -> tuple[dict[str, Evaluated], list[Path]]:
    """Every trained recipe and seed on the test images, in the order of config.recipes, and the files that are missing.

    Raises UserError if a checkpoint is damaged or was trained with other settings than the config's.
    """
    models, missing, digests = {}, [], {}
    for name in config.selected():
        recipe, logits, history = config.recipes[name], {}, {}
        for seed in config.seeds:
            path = checkpoint_path(config, name, seed)
            state = from_first(lambda path=path: load_finished(path))
            if not state:
                missing.append(path)
                continue
            digests[name, seed] = tensors_digest(state["model"])
            settings = training_settings(name, config, dataset, digests.get((recipe.teacher, seed)))
            del settings["precision"]  # the test images are seen in this machine's
            refuse_other_settings(path, state, settings)
            model = load_model(state, config.device)
            title = f"{name} seed {seed}"
            seen = predict(model, dataset.test.images, config.image_size, config.precision, title=title)
            logits[seed], history[seed] = seen.cpu().numpy(), state["history"]
        if logits:
            models[name] = Evaluated(recipe, logits, history)
    return {name: models[name] for name in config.recipes if name in models}, missing


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, functions of arrays


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
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


def student_t_quantile(p: float, df: int) -> float:
    """The t above which a share 1 - p of Student's distribution lies, for p of 0.5 or more, by bisection."""
    low, high = 0.0, 1.0
    while student_t_cdf(high, df) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def t_interval(values: Iterable[float]) -> tuple[float, float]:
    """95% interval, cut to 0..1, for the mean of two or more accuracies of different seeds (Student 1908)."""
    values = np.asarray(list(values))
    half = student_t_quantile(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def paired_bootstrap(correct: np.ndarray, correct_baseline: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """95% percentile interval for the difference in accuracy, over 10,000 resamples of the test images and the seeds.

    `correct` and `correct_baseline` are bool (S, n), S seeds by n images, `labels` (n,). Images are resampled within
    their class, in pairs (Efron and Tibshirani 1993, chapter 8). Images on which the models differ alike over all seeds
    are interchangeable, so a resample is a multinomial draw of how many of each kind there are.
    """
    draws, random = 10_000, np.random.default_rng(0)
    difference = correct.astype(int) - correct_baseline.astype(int)  # (S, n) of -1, 0, 1
    seeds, n = difference.shape
    weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (draws, S)
    total = np.zeros(draws)
    for label in np.unique(labels):
        kinds, counts = np.unique(difference[:, labels == label], axis=1, return_counts=True)  # (S, K), (K,)
        drawn = random.multinomial(counts.sum(), counts / counts.sum(), size=draws)  # (draws, K)
        total += ((weights @ kinds) * drawn).sum(1)
    low, high = np.quantile(total / n, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """p-values of several comparisons, corrected so that all hold together (Holm 1979, Scand. J. Statist. 6, 65-70)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def detectable_difference(discordant: float, n: int) -> float:
    """The smallest true difference in accuracy that one seed finds at the 5% level with 80% power.

    `discordant` is the share of the n test images that just one of the two models gets right. Normal approximation to
    McNemar's test (Connor 1987, Biometrics 43, 207-211): the variance of the difference d is (discordant - d^2) / n.
    """
    k = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    return k * math.sqrt(discordant / (n + k**2))


def detectable_over_seeds(std: float, seeds: int) -> float:
    """The same for a paired t-test over `seeds` differences whose standard deviation is `std`."""
    df = seeds - 1
    return (student_t_quantile(0.975, df) + student_t_quantile(0.8, df)) * std / math.sqrt(seeds)


def seeds_needed(difference: float, discordant: float, n: int, std: float | None) -> int | None:
    """How many seeds find a true difference of this size with 80% power; None if it is 0 or takes over 100,000.

    `std` is the standard deviation of the difference over seeds; with one seed there is none, and each seed is taken to
    disagree on images of its own, as many as this one: the best case.
    """
    if difference == 0:
        return None
    if std is None:
        return max(1, math.ceil((detectable_difference(discordant, n) / difference) ** 2))
    enough = (seeds for seeds in range(2, 100) if detectable_over_seeds(std, seeds) <= abs(difference))
    k = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)  # past a hundred, t is normal
    found = next(enough, None) or math.ceil((k * std / difference) ** 2)
    return found if found <= 100_000 else None


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of equally many images, logits (n, C), labels (n,).

    Equal-mass bins after Nguyen and O'Connor 2015 (arXiv 1508.05154); the error as in Guo et al. 2017 (1706.04599).
    """
    probabilities = torch.softmax(torch.as_tensor(logits, dtype=torch.float64), dim=1)
    confidence, prediction = (array.numpy() for array in probabilities.max(dim=1))
    correct = prediction == np.asarray(labels)
    order = np.argsort(confidence, kind="stable")
    error = sum(abs(confidence[b].sum() - correct[b].sum()) for b in np.array_split(order, bins))
    return float(error / len(order))


def number(value: float) -> float | None:
    """As JSON has it: None for what is not finite."""
    return float(value) if math.isfinite(value) else None


def model_metrics(model: Evaluated, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """The entry of one model in results.json. Accuracies are shares; confusion counts are summed over the seeds."""
    counts = sum(confusion_matrix(labels, p, labels=range(len(classes))) for p in model.predictions.values())
    of_class = counts.sum(1)
    accuracies = {seed: float((p == labels).mean()) for seed, p in model.predictions.items()}
    values = list(accuracies.values())
    several = len(values) > 1
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
        "confusion_matrix": counts.tolist(),
        "expected_calibration_error": number(
            np.mean([expected_calibration_error(logits, labels) for logits in model.logits.values()])
        ),
    }


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


def compare(name: str, baseline: str, models: dict[str, Evaluated], labels: np.ndarray) -> dict[str, Any] | None:
    """The entry of one comparison in results.json, over the seeds that both have; None if they share none.

    p_value is McNemar's exact one for one seed, and that of the paired t-test over the seeds for several.
    """
    seeds = sorted(models[name].logits.keys() & models[baseline].logits.keys())
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
        "detectable_difference": (
            detectable_over_seeds(std, len(seeds)) if several else detectable_difference(discordant, len(labels))
        ),
        "seeds_needed": seeds_needed(difference, discordant, len(labels), std),
    }


def compare_all(models: dict[str, Evaluated], labels: np.ndarray) -> list[dict[str, Any]]:
    """Every model beside its baseline, with p-values corrected for their number and a verdict for each.

    The rule: "better" or "worse" if p_holm, the corrected p_value, is below 0.05 and ci95 leaves out 0; otherwise
    "indistinguishable". A test that is not defined (p_value None) counts as p = 1.
    """
    pairs = [(name, baseline) for name in models if (baseline := baseline_of(name, models))]
    comparisons = [found for pair in pairs if (found := compare(*pair, models, labels))]
    corrected = holm([1.0 if c["p_value"] is None else c["p_value"] for c in comparisons])
    for comparison, p_holm in zip(comparisons, corrected, strict=True):
        low, high = comparison["ci95"]
        sure = p_holm < 0.05 and not low <= 0 <= high
        verdict = ("better" if comparison["difference"] > 0 else "worse") if sure else "indistinguishable"
        comparison.update(p_holm=p_holm, verdict=verdict)
    return comparisons


def paired_t_p(differences: np.ndarray) -> float | None:
    """Two-sided p of the t-test that the mean of two or more differences is 0; None where all are the same."""
    if np.ptp(differences) < 1e-12:  # rounding apart
        return None
    t = abs(differences.mean()) / (differences.std(ddof=1) / math.sqrt(len(differences)))
    return 2 * (1 - student_t_cdf(t, len(differences) - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Figures, from arrays

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008


def blank_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # without one, every tick label that seaborn asks about would make its own
    return figure


def plain(text: str) -> str:
    """A name as a figure shows it: no line breaks, and no dollar sign that would start a formula."""
    return " ".join(text.split()).replace("$", r"\$")


def label_size(classes: tuple[str, ...]) -> float:
    """Points, such that the names of many classes fit beside each other in a figure of bounded size."""
    return min(10.0, max(1.0, 600 / len(classes)))


def confusion_figure(counts: np.ndarray, classes: tuple[str, ...], title: str) -> Figure:
    """Counts (C, C), rows true classes, coloured by their share of the row."""
    size = min(max(4.5, 0.55 * len(classes) + 1.5), 14)
    figure = blank_figure(size + 0.8, size)
    axes = figure.subplots()
    names = [plain(name) for name in classes]
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    seaborn.heatmap(
        100 * shares,
        annot=counts if len(classes) <= 20 else False,
        fmt="d",
        vmin=0,
        vmax=100,
        square=True,
        cmap="Blues",
        linewidths=0.5 if len(classes) <= 20 else 0,
        xticklabels=names,
        yticklabels=names,
        cbar_kws={"label": "share of the true class (%)", "shrink": 0.8},
        ax=axes,
    )
    axes.set(xlabel="predicted class", ylabel="true class", title=plain(title))
    axes.tick_params(axis="x", rotation=45 if max(map(len, names)) > 2 else 0, labelsize=label_size(classes))
    axes.tick_params(axis="y", rotation=0, labelsize=label_size(classes))
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


def curves_figure(histories: dict[str, dict[int, list[dict[str, float]]]]) -> Figure:
    """Loss and accuracy by epoch: model -> seed -> records. Lines are means over the seeds, bands their range."""
    figure = blank_figure(9, 3.8)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for (name, by_seed), colour in zip(histories.items(), COLOURS * len(histories), strict=False):
        records = list(by_seed.values())
        held_out = next(key for key in ("validation_accuracy", "test_accuracy") if key in records[0][0])
        epochs = [record["epoch"] for record in records[0]]
        for axes, key, scale, style in (
            (loss_axes, "loss", 1, "-"),
            (accuracy_axes, "train_accuracy", 100, ":"),
            (accuracy_axes, held_out, 100, "-"),
        ):
            values = scale * np.array([[record[key] for record in history] for history in records])  # (S, epochs)
            axes.plot(epochs, values.mean(0), style, color=colour, marker=".", label=plain(name))
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
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
    return " ".join(str(value).split()).replace("|", r"\|")


def table(header: list[Any], rows: list[list[Any]]) -> str:
    """A Markdown table, its first column left and the others right."""
    lines = [[cell(value) for value in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = widths
    rule = [":" + "-" * (first - 1), *("-" * (width - 1) + ":" for width in others)]
    padded = [
        " | ".join([row[0].ljust(first), *(value.rjust(width) for value, width in zip(row[1:], others, strict=True))])
        for row in lines
    ]
    padded.insert(1, " | ".join(rule))
    return "\n".join(f"| {line} |" for line in padded)


def accuracy_table(results: dict[str, Any]) -> str:
    """The original's table: accuracy in percent, a row for each class, a column for each model."""
    models = results["models"]

    def percent(share: float | None) -> str:
        return "none" if share is None else f"{100 * share:.1f}"

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


def comparison_sentence(comparison: dict[str, Any]) -> str:
    points, detectable = (100 * comparison[key] for key in ("difference", "detectable_difference"))
    low, high = (100 * bound for bound in comparison["ci95"])
    seeds, needed = len(comparison["seeds"]), comparison["seeds_needed"]
    p, p_holm = comparison["p_value"], comparison["p_holm"]
    shown = (
        f"{comparison['test']} not defined for equal differences" if p is None else f"{comparison['test']} p = {p:.2g}"
    )
    sentence = (
        f"{comparison['model']} is {abs(points):.2f} points {'above' if points >= 0 else 'below'} "
        f"{comparison['baseline']} (95% interval {low:+.2f} to {high:+.2f}, {shown}"
        + (f", {p_holm:.2g} after Holm's correction" if p is not None and p_holm != p else "")
        + f", {seeds} seed{'s' * (seeds > 1)}): {comparison['verdict']}. "
        f"What this design finds with 80% power is a difference of {detectable:.2f} points"
    )
    if comparison["verdict"] == "indistinguishable" and needed:
        sentence += f"; to find one of {abs(points):.2f} takes about {needed:,} seed{'s' * (needed > 1)}"
    return sentence + "."


def setup_table(config: Config, names: Iterable[str]) -> str:
    fields = ("arch", "pretrained", "epochs", "train_size", "schedule", "lr", "momentum", "weight_decay", "teacher")
    taught = ("alpha", "temperature", "scale_soft_loss")

    def shown(field: str, recipe: Recipe) -> Any:
        value = getattr(recipe, field)
        if field in taught and not recipe.teacher:
            return ""
        return {"train_size": "all", "teacher": "none"}[field] if value is None else str(value).lower()

    recipes = [config.recipes[name] for name in names]
    return table(["", *names], [[field, *(shown(field, recipe) for recipe in recipes)] for field in (*fields, *taught)])


def results_markdown(results: dict[str, Any], config: Config) -> str:
    models = results["models"]
    environment_line = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    seeds = ", ".join(sorted({seed for model in models.values() for seed in model["accuracy"]["seeds"]}, key=int))
    missing = "".join(f"\n- {path}" for path in results["missing"])
    parts = [
        f"# {results['run']}",
        "\n".join(f"- {comparison_sentence(comparison)}" for comparison in results["comparisons"]),
        f"{config.dataset}, {results['n_test']:,} test images, {config.image_size} px, batch size {config.batch_size}, "
        f"seeds: {seeds}. Intervals: Wilson's for one seed, Student's t over several; class accuracies are means over "
        "the seeds. Calibration error: the mean distance of confidence and accuracy, in points.",
        accuracy_table(results),
        setup_table(config, list(models)),
        "![training curves](training_curves.png)",
        *(f"![confusion matrix of {name}]({name}/confusion_matrix.png)" for name in models),
        f"Not trained yet, left out:\n{missing}" if missing else "",
        f"Measured with {environment_line}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def report(config: Config, dataset: Dataset, models: dict[str, Evaluated], missing: list[Path]) -> dict[str, Any]:
    """Write every file of the report and return what results.json holds."""
    labels = dataset.test.labels.cpu().numpy()
    folder = Path(config.imgs_path, config.run)
    results = {
        "run": config.run,
        "dataset": config.dataset,
        "classes": list(dataset.classes),
        "n_test": len(labels),
        "models": {name: model_metrics(model, labels, dataset.classes) for name, model in models.items()},
        "comparisons": compare_all(models, labels),
        "missing": [str(path) for path in missing],
        "environment": {**environment(config), "numpy": np.__version__, "scikit-learn": sklearn.__version__},
    }
    for name, model in models.items():
        pooled_labels = np.tile(labels, len(model.logits))
        pooled = np.concatenate(list(model.predictions.values()))

        def sklearn_report(as_dict: bool, labels=pooled_labels, predictions=pooled) -> Any:
            named = {"labels": range(len(dataset.classes)), "target_names": dataset.classes}
            return classification_report(labels, predictions, **named, digits=4, zero_division=0, output_dict=as_dict)

        over = f"{name}, {model.recipe.arch}" + (f", {len(model.logits)} seeds" if len(model.logits) > 1 else "")
        counts = np.array(results["models"][name]["confusion_matrix"])
        write_durably(folder / name / "confusion_matrix.png", png(confusion_figure(counts, dataset.classes, over)))
        write_durably(folder / name / "classification_report.txt", sklearn_report(False).encode())
        figure = report_figure(sklearn_report(True), dataset.classes, over)
        write_durably(folder / name / "classification_report.png", png(figure))
    curves = curves_figure({name: model.history for name, model in models.items()})
    write_durably(folder / "training_curves.png", png(curves))

    arrays = {f"{name}/seed{seed}": logits for name, model in models.items() for seed, logits in model.logits.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, labels=labels, **arrays)
    write_durably(folder / "predictions.npz", buffer.getvalue())
    write_durably(folder / "results.json", (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
    write_durably(folder / "results.md", results_markdown(results, config).encode())
    return results


@as_script()
def main(argv: list[str] | None = None) -> None:
    config = everywhere(lambda: resolve(parse(argv)))
    tune(config)
    dataset = everywhere(lambda: load_dataset(config))
    models, missing = evaluate_checkpoints(config, dataset)
    for path in missing:
        say(f"not trained yet, left out: {path}")
    if not models:
        raise UserError("nothing to evaluate; train first: python teacher_student_model.py, with the same flags")
    with locked(Path(config.imgs_path, config.run)):
        if rank() == 0:
            results = report(config, dataset, models, missing)
            print(accuracy_table(results))
            for comparison in results["comparisons"]:
                print(comparison_sentence(comparison))
            say(f"The report: {Path(config.imgs_path, config.run, 'results.md')}")


if __name__ == "__main__":
    main()
