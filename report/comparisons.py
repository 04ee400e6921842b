"""Metrics of several models together: verdicts against a baseline, agreement with the teacher, disagreements."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from engine.recipes import DISTILLATION_FIELDS, Recipe, row_alone
from engine.recipes import baseline_of as baseline_among
from engine.soft_losses import SOFTEN_BOTH, SOFTEN_THE_TEACHER
from report.metrics import Evaluated, kl_divergence, mean, means, soft_target_metrics
from report.statistics import (
    detectable_difference,
    detectable_over_seeds,
    holm,
    image_variance,
    mcnemar_p,
    paired_interval,
    paired_p,
    paired_t_p,
)

Models = Mapping[str, Evaluated]
# What of the environment changes a trained model, and how two are said to differ in it.
ENVIRONMENT = {
    "code": "by different versions of the code",
    "device": "on different devices",
    "precision": "in different precisions",
    "processes": "by different numbers of processes",
    "threads": "with different numbers of threads",
}


@dataclass(frozen=True)
class Disagreements:
    """Test images on which teacher, baseline and model do not all agree."""

    models: list[str]  # their rows
    seed: int  # the model's
    seeds: dict[str, int]  # title -> seed, in the order of `models`
    count: int
    shown: list[int]  # some of the images


@dataclass(frozen=True)
class Comparison:
    """A model against its baseline, over the seeds that both have. Accuracies and differences are fractions.

    `p_value` is the p-value of McNemar's exact test for one seed, and of `paired_p` for several; `p_holm` is adjusted
    for the number of comparisons. `t_test_p` leaves out the sampling of images.
    """

    model: str
    baseline: str
    differs_in: dict[str, list[Any]]  # setting -> [the model's, the baseline's]
    environments_differ: list[str]  # those of ENVIRONMENT in which two models of one seed were trained differently
    seeds: list[int]
    shared_teacher: bool  # whether all seeds have the same
    difference: float
    std: float | None  # of the difference, over seeds; None for one seed
    ci95: tuple[float, float]
    p_value: float
    p_holm: float
    test: str
    t_test_p: float | None  # None for one seed, or if all seeds have the same difference
    mcnemar_p: dict[str, float]  # seed -> p-value
    only_model_right: int  # images, summed over seeds
    only_baseline_right: int
    detectable_difference: float | None  # with 80% power
    per_class: dict[str, dict[str, Any]]  # class -> difference, ci95
    disagreements: Disagreements | None = None

    @property
    def verdict(self) -> str:
        """With one seed a test is of two trained models, not of two recipes, so neither of these is called better."""
        if self.p_holm >= 0.05:
            return "indistinguishable"
        if len(self.seeds) == 1:
            return "different"
        return "better" if self.difference > 0 else "worse"

    @property
    def restricted_verdict(self) -> str:
        """The verdict, with its restriction if all of several seeds share a teacher."""
        restricted = self.shared_teacher and len(self.seeds) > 1
        return f"{self.verdict}, for this teacher" if restricted else self.verdict


def common_seeds(*models: Evaluated) -> list[int]:
    return sorted(set.intersection(*(set(model.logits) for model in models)))


def baseline_of(name: str, models: Models) -> str | None:
    """The recipe that a model is compared with, by `engine.recipes.baseline_of` among the evaluated ones."""
    return baseline_among(name, {other: model.recipe for other, model in models.items()})


def seeds_with_teacher(student: str, recipe: Recipe, models: Models) -> dict[int, int]:
    """The seeds of a student, each with the seed of the teacher that `recipe` has, where both have been evaluated."""
    if recipe.teacher is None or recipe.teacher not in models:
        return {}
    pairs = {seed: seed if recipe.teacher_seed is None else recipe.teacher_seed for seed in models[student].logits}
    return {seed: pairs[seed] for seed in sorted(pairs) if pairs[seed] in models[recipe.teacher].logits}


def differing_settings(recipe: Recipe, baseline: Recipe) -> dict[str, list[Any]]:
    """The settings in which a recipe and its baseline differ: [recipe's, baseline's].

    Those of distillation are left out if that is what the comparison is about: only the recipe has a teacher.
    """
    first, second, ignored = asdict(recipe), asdict(baseline), {"baseline"}
    if recipe.teacher and not baseline.teacher:
        ignored |= {"teacher", *DISTILLATION_FIELDS}
    return {key: [first[key], second[key]] for key in first if key not in ignored and first[key] != second[key]}


def shares_teacher(name: str, recipes: Mapping[str, Recipe]) -> bool:
    """Whether one teacher stands behind all seeds of a recipe: one seed of its row, or a file used as it is.

    It may also be the teacher of the teacher.
    """
    recipe = recipes.get(name)
    if recipe is None or recipe.teacher is None:
        return False
    teacher = recipes.get(recipe.teacher)
    given = teacher is not None and teacher.epochs == 0 and teacher.weights_file is not None
    return given or recipe.teacher_seed is not None or shares_teacher(recipe.teacher, recipes)


def differing_environments(model: Evaluated, baseline: Evaluated, seeds: Iterable[int]) -> list[str]:
    """Those of ENVIRONMENT that are not the same for the two models of some seed; none if one was not trained here."""
    if 0 in (model.recipe.epochs, baseline.recipe.epochs):
        return []
    pairs = [(model.environments.get(seed, {}), baseline.environments.get(seed, {})) for seed in seeds]
    return [key for key in ENVIRONMENT if any(key in a and key in b and a[key] != b[key] for a, b in pairs)]


def compare(
    name: str,
    baseline: str,
    models: Models,
    labels: np.ndarray,
    classes: Sequence[str] = (),
    recipes: Mapping[str, Recipe] | None = None,
    level: float = 0.05,
) -> Comparison:
    """One comparison. `detectable_difference` is that of a test at this level; no p-value is adjusted yet.

    `recipes` has those of teachers that are not among `models`.
    """
    seeds = common_seeds(models[name], models[baseline])
    first, second = (models[m].correct(labels, seeds) for m in (name, baseline))  # (S, n)
    differences = first.mean(1) - second.mean(1)  # (S,)
    mcnemar = {
        str(seed): mcnemar_p(int((a & ~b).sum()), int((b & ~a).sum()))
        for seed, a, b in zip(seeds, first, second, strict=True)
    }
    if len(seeds) > 1:
        std, t_test_p = float(differences.std(ddof=1)), paired_t_p(differences)
        p_value, test = paired_p(first, second), "paired over seeds and images"
        detectable = detectable_over_seeds(std, image_variance(first, second)[1], len(seeds), level)
    else:
        std, t_test_p = None, None
        p_value, test = mcnemar[str(seeds[0])], "exact McNemar test"
        detectable = detectable_difference(float((first != second).mean()), len(labels), level)
    known = {other: model.recipe for other, model in models.items()} | dict(recipes or {})
    per_class = {}
    for label, c in enumerate(classes):
        a, b = first[:, labels == label], second[:, labels == label]
        per_class[c] = {"difference": float(a.mean() - b.mean()), "ci95": paired_interval(a, b)}
    return Comparison(
        model=name,
        baseline=baseline,
        differs_in=differing_settings(models[name].recipe, models[baseline].recipe),
        environments_differ=differing_environments(models[name], models[baseline], seeds),
        seeds=seeds,
        shared_teacher=any(shares_teacher(m, known) for m in (name, baseline)),
        difference=float(differences.mean()),
        std=std,
        ci95=paired_interval(first, second),
        p_value=p_value,
        p_holm=p_value,
        test=test,
        t_test_p=t_test_p,
        mcnemar_p=mcnemar,
        only_model_right=int((first & ~second).sum()),
        only_baseline_right=int((second & ~first).sum()),
        detectable_difference=detectable,
        per_class=per_class,
    )


def compare_all(
    models: Models,
    labels: np.ndarray,
    classes: Sequence[str] = (),
    recipes: Mapping[str, Recipe] | None = None,
    pairs: Iterable[tuple[str, str]] | None = None,
) -> list[Comparison]:
    """Each model against its baseline, or the `pairs`, with p-values adjusted for the number of comparisons.

    Of `pairs`, those whose models are missing count towards that number, with p = 1.
    """

    def evaluated(name: str, baseline: str) -> bool:
        return name in models and baseline in models and bool(common_seeds(models[name], models[baseline]))

    if pairs is None:
        own = [(name, baseline) for name in models if (baseline := baseline_of(name, models))]
        pairs = [pair for pair in own if evaluated(*pair)]
    planned = list(pairs)
    level = 0.05 / max(1, len(planned))  # Holm's threshold for the smallest p-value
    comparisons = [compare(*pair, models, labels, classes, recipes, level) for pair in planned if evaluated(*pair)]
    adjusted = holm([c.p_value for c in comparisons] + [1.0] * (len(planned) - len(comparisons)))
    return [replace(c, p_holm=p) for c, p in zip(comparisons, adjusted, strict=False)]


def not_compared(models: Models) -> dict[str, str]:
    """The reason for each model that should be compared with a baseline and cannot be."""
    reasons = {}
    for name, model in models.items():
        baseline = baseline_of(name, models)
        if baseline is None and model.recipe.teacher:
            row = row_alone(name, model.recipe)
            reasons[name] = (
                f"no row without a teacher has the same settings and has been evaluated; add {row} to config.py"
            )
        elif baseline and baseline not in models:
            reasons[name] = f"its baseline {baseline} has not been evaluated"
            if any(other.startswith(f"{baseline}-") for other in models):
                reasons[name] += ", and no row of its sweep has the same values"
        elif baseline and not common_seeds(model, models[baseline]):
            reasons[name] = f"it has no seed in common with its baseline {baseline}"
    return reasons


def distilled(models: Models) -> dict[str, tuple[str, dict[int, int]]]:
    """The models whose teacher has been evaluated too, each with its teacher, and its seeds with the teacher's."""
    found = {}
    for name, model in models.items():
        seeds = seeds_with_teacher(name, model.recipe, models)
        if model.recipe.teacher and seeds:
            found[name] = model.recipe.teacher, seeds
    return found


def fidelity(models: Models, labels: np.ndarray) -> list[dict[str, Any]]:
    """How closely each distilled model, and its baseline, matches the teacher on the test images: a row each.

    After Stanton et al. 2021 (arXiv 2106.05945). Means over the seeds that both have; teacher_wrong, and the agreement
    there, are pooled over seeds. `kl_at_temperature` is None where the soft loss does not compare softmax(v / T) with
    softmax(z / T).
    """
    rows: dict[tuple, dict[str, Any]] = {}  # a baseline has one for all its students of the same teacher and loss
    for name, (teacher, _) in distilled(models).items():
        recipe = models[name].recipe
        temperature, softened = recipe.temperature, recipe.soft_loss in SOFTEN_BOTH
        for student in (name, baseline_of(name, models)):
            if student is None or student not in models or student == teacher:
                continue
            seeds = seeds_with_teacher(student, recipe, models)
            if not seeds:
                continue
            logits = [(models[teacher].logits[t], models[student].logits[s]) for s, t in seeds.items()]
            agree = np.stack([v.argmax(1) == z.argmax(1) for v, z in logits])  # (S, n)
            wrong = ~models[teacher].correct(labels, seeds.values())
            rows[student, teacher, recipe.teacher_seed, temperature, softened] = {
                "model": student,
                "teacher": teacher,
                "seeds": list(seeds),
                "temperature": temperature,
                "agreement": float(agree.mean()),
                "agreement_where_teacher_wrong": float(agree[wrong].mean()) if wrong.any() else None,
                "teacher_wrong": int(wrong.sum()),
                "kl": mean(kl_divergence(v, z) for v, z in logits),
                "kl_at_temperature": mean(kl_divergence(v, z, temperature) for v, z in logits) if softened else None,
            }
    return list(rows.values())


# model -> seed -> logits (M, C), labels (M,)
TrainingLogits = Mapping[str, Mapping[int, tuple[np.ndarray, np.ndarray]]]


def soft_targets(models: Models, logits: TrainingLogits) -> list[dict[str, Any]]:
    """What each distilled model learns from: its teacher's accuracy, entropy and confidence on the training images.

    Those at the temperature are None where the soft loss does not learn from softmax(v / T).
    """
    rows = []
    for name, by_seed in logits.items():
        recipe, entries = models[name].recipe, []
        for z, labels in by_seed.values():
            entry: dict[str, float] = {"accuracy": float((z.argmax(1) == labels).mean()), **soft_target_metrics(z, 1.0)}
            if recipe.soft_loss in SOFTEN_THE_TEACHER:
                softened = soft_target_metrics(z, recipe.temperature)
                entry |= {f"{key}_at_temperature": value for key, value in softened.items()}
            entries.append(entry)
        row: dict[str, Any] = {"model": name, "teacher": recipe.teacher, "seeds": list(by_seed), "images": len(labels)}
        row |= {"temperature": recipe.temperature, "entropy_at_temperature": None, "confidence_at_temperature": None}
        rows.append(row | means(entries))
    return rows


def disagreements(comparison: Comparison, models: Models, most: int = 12) -> Disagreements | None:
    """Of a comparison's first seed for which the teacher has been evaluated too; None if there are none.

    A teacher of the baseline's row and of another seed is a third model. At most `most` images are shown, drawn at
    random with a fixed seed.
    """
    name, baseline = comparison.model, comparison.baseline
    recipe = models[name].recipe
    teachers = seeds_with_teacher(name, recipe, models)
    seed = next((seed for seed in comparison.seeds if seed in teachers or not recipe.teacher), None)
    if seed is None:
        return None
    compared = {baseline: (baseline, seed), name: (name, seed)}
    if recipe.teacher and (recipe.teacher, teachers[seed]) not in compared.values():
        title = f"{recipe.teacher} (teacher)" if recipe.teacher in compared else recipe.teacher
        compared = {title: (recipe.teacher, teachers[seed])} | compared
    predictions = np.stack([models[m].predictions[s] for m, s in compared.values()])  # (3, n)
    images = np.flatnonzero((predictions != predictions[0]).any(0))
    if not len(images):
        return None
    drawn = np.sort(np.random.default_rng(0).choice(images, min(most, len(images)), replace=False))
    seeds = {title: of_model for title, (_, of_model) in compared.items()}
    return Disagreements([m for m, _ in compared.values()], seed, seeds, len(images), drawn.tolist())
