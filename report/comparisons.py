"""Metrics of several models together: verdicts against a baseline, agreement with the teacher, disagreements."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from engine.recipes import DISTILLATION_FIELDS, Recipe, row_alone
from engine.recipes import baseline_of as baseline_among
from engine.soft_losses import SOFTEN_BOTH, SOFTEN_THE_TEACHER
from report.metrics import Evaluated, kl_divergence, means, soft_target_metrics
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


def common_seeds(*models: Evaluated) -> list[int]:
    return sorted(set.intersection(*(set(model.logits) for model in models)))


def baseline_of(name: str, models: Models) -> str | None:
    """The recipe that a model is compared with, by `engine.recipes.baseline_of` among the evaluated ones."""
    return baseline_among(name, {other: model.recipe for other, model in models.items()})


def seeds_with_teacher(name: str, teacher: str, models: Models, teacher_seed: int | None) -> dict[int, int]:
    """The seeds of a model, each with that of the teacher's model beside it, where both have been evaluated.

    `teacher_seed` is the teacher's, if all seeds of the model have the same.
    """
    if teacher not in models:
        return {}
    pairs = {seed: seed if teacher_seed is None else teacher_seed for seed in sorted(models[name].logits)}
    return {seed: of_teacher for seed, of_teacher in pairs.items() if of_teacher in models[teacher].logits}


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


def compare(
    name: str,
    baseline: str,
    models: Models,
    labels: np.ndarray,
    classes: Sequence[str] = (),
    level: float = 0.05,
    recipes: Mapping[str, Recipe] | None = None,
) -> dict[str, Any]:
    """The entry of one comparison in results.json, over the seeds that both models have.

    `p_value` is that of McNemar's exact test for one seed, and of `paired_p` for several. `detectable_difference` is
    that of a test at this level. `t_test_p` leaves out the sampling of images; it is None for one seed, or if all seeds
    have the same difference. `recipes` has those of teachers that are not among `models`.
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
    return {
        "model": name,
        "baseline": baseline,
        "differs_in": differing_settings(models[name].recipe, models[baseline].recipe),
        "seeds": seeds,
        "shared_teacher": any(shares_teacher(m, known) for m in (name, baseline)),
        "difference": float(differences.mean()),
        "std": std,
        "ci95": paired_interval(first, second),
        "p_value": p_value,
        "test": test,
        "t_test_p": t_test_p,
        "mcnemar_p": mcnemar,
        "only_model_right": int((first & ~second).sum()),
        "only_baseline_right": int((second & ~first).sum()),
        "detectable_difference": detectable,
        "per_class": {
            c: {
                "difference": float(first[:, labels == label].mean() - second[:, labels == label].mean()),
                "ci95": paired_interval(first[:, labels == label], second[:, labels == label]),
            }
            for label, c in enumerate(classes)
        },
    }


def compare_all(
    models: Models,
    labels: np.ndarray,
    classes: Sequence[str] = (),
    pairs: Iterable[tuple[str, str]] | None = None,
    recipes: Mapping[str, Recipe] | None = None,
) -> list[dict[str, Any]]:
    """Each model against its baseline, or the `pairs`, with p-values adjusted for the number of comparisons.

    Of `pairs`, those whose models are missing count towards that number, with p = 1.

    The verdict is "better" or "worse" if p_holm, the adjusted p_value, is below 0.05, otherwise "indistinguishable".
    With one seed it is "different" instead, as the test is of two trained models, not of two recipes.
    """

    def evaluated(pair: tuple[str, str | None]) -> bool:
        return all(name in models for name in pair) and bool(common_seeds(*(models[name] for name in pair)))

    if pairs is None:
        pairs = filter(evaluated, ((name, baseline_of(name, models)) for name in models))
    planned = list(pairs)
    level = 0.05 / max(1, len(planned))  # Holm's threshold for the smallest p-value
    comparisons = [compare(*pair, models, labels, classes, level, recipes) for pair in planned if evaluated(pair)]
    adjusted = holm([c["p_value"] for c in comparisons] + [1.0] * (len(planned) - len(comparisons)))
    for comparison, p_holm in zip(comparisons, adjusted, strict=False):
        verdict = "indistinguishable"
        if p_holm < 0.05 and len(comparison["seeds"]) == 1:
            verdict = "different"
        elif p_holm < 0.05:
            verdict = "better" if comparison["difference"] > 0 else "worse"
        comparison.update(p_holm=p_holm, verdict=verdict)
    return comparisons


def not_compared(models: Models) -> dict[str, str]:
    """The reason for each model that should be compared with a baseline and cannot be."""
    reasons = {}
    for name, model in models.items():
        baseline = baseline_of(name, models)
        if baseline is None and model.recipe.teacher:
            reasons[name] = (
                f"no row without a teacher that has been evaluated has the same settings{nearest(name, models)}. Such "
                f"a row is {row_alone(name, model.recipe)}"
            )
        elif baseline and baseline not in models:
            reasons[name] = f"its baseline {baseline} has not been evaluated"
            if any(other.startswith(f"{baseline}-") for other in models):
                reasons[name] += ", and no row of its sweep has the same values"
        elif baseline and not common_seeds(model, models[baseline]):
            reasons[name] = f"it has no seed in common with its baseline {baseline}"
    return reasons


def nearest(name: str, models: Models) -> str:
    """The row without a teacher that differs in the fewest settings from a model, and in which, in words."""
    recipe = models[name].recipe
    differing = {
        other: differing_settings(recipe, model.recipe) for other, model in models.items() if not model.recipe.teacher
    }
    if not differing:
        return ""
    closest = min(differing, key=lambda other: len(differing[other]))
    values = ", ".join(f"{field} ({theirs}, not {own})" for field, (own, theirs) in differing[closest].items())
    return f"; the nearest, {closest}, differs in {values}"


def distilled(models: Models) -> dict[str, dict[int, int]]:
    """The models whose teacher has been evaluated too, with their seeds and those of the teacher."""
    pairs = {
        name: seeds_with_teacher(name, model.recipe.teacher, models, model.recipe.teacher_seed)
        for name, model in models.items()
        if model.recipe.teacher
    }
    return {name: seeds for name, seeds in pairs.items() if seeds}


def fidelity(models: Models, labels: np.ndarray) -> list[dict[str, Any]]:
    """How closely each distilled model, and its baseline, matches the teacher on the test images: a row each.

    After Stanton et al. 2021 (arXiv 2106.05945). Means over the seeds that both have; teacher_wrong, and the agreement
    there, are pooled over seeds. `kl_at_temperature` is None where the soft loss does not compare softmax(v / T) with
    softmax(z / T).
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for name in distilled(models):
        recipe = models[name].recipe
        teacher, temperature, softened = recipe.teacher, recipe.temperature, recipe.soft_loss in SOFTEN_BOTH
        for student in (name, baseline_of(name, models)):
            if student not in models or student == teacher:
                continue
            seeds = seeds_with_teacher(student, teacher, models, recipe.teacher_seed)
            if not seeds:
                continue
            logits = [(models[teacher].logits[t], models[student].logits[s]) for s, t in seeds.items()]
            agree = np.stack([v.argmax(1) == z.argmax(1) for v, z in logits])  # (S, n)
            wrong = ~models[teacher].correct(labels, seeds.values())
            kl = {"kl": 1.0, "kl_at_temperature": temperature}
            if not softened:
                del kl["kl_at_temperature"]
            rows[student, teacher, recipe.teacher_seed, temperature, softened] = {
                "kl_at_temperature": None,
                "model": student,
                "teacher": teacher,
                "seeds": list(seeds),
                "temperature": temperature,
                "agreement": float(agree.mean()),
                "agreement_where_teacher_wrong": float(agree[wrong].mean()) if wrong.any() else None,
                "teacher_wrong": int(wrong.sum()),
                **means({key: kl_divergence(v, z, t) for key, t in kl.items()} for v, z in logits),
            }
    return list(rows.values())


TrainingLogits = Mapping[
    str, Mapping[int, tuple[np.ndarray, np.ndarray]]
]  # model -> seed -> logits (M, C), labels (M,)


def soft_targets(models: Models, logits: TrainingLogits) -> list[dict[str, Any]]:
    """What each distilled model learns from: its teacher's accuracy, entropy and confidence on the training images.

    Those at the temperature are None where the soft loss does not learn from softmax(v / T).
    """
    rows = []
    for name, by_seed in logits.items():
        recipe, entries = models[name].recipe, []
        for z, labels in by_seed.values():
            entry = {"accuracy": float((z.argmax(1) == labels).mean()), **soft_target_metrics(z, 1.0)}
            if recipe.soft_loss in SOFTEN_THE_TEACHER:
                softened = soft_target_metrics(z, recipe.temperature)
                entry |= {f"{key}_at_temperature": value for key, value in softened.items()}
            entries.append(entry)
        about = {"model": name, "teacher": recipe.teacher, "seeds": list(by_seed), "images": len(labels)}
        about |= {"temperature": recipe.temperature, "entropy_at_temperature": None, "confidence_at_temperature": None}
        rows.append({**about, **means(entries)})
    return rows


def disagreements(name: str, models: Models, most: int = 12) -> dict[str, Any] | None:
    """Test images on which teacher, baseline and model do not all agree, for their first common seed; None if none.

    `models` are their rows and `seeds` their seeds by title, in the same order; `seed` is the model's. A teacher of the
    baseline's row and of another seed is a third model. `shown` are at most `most` of the images, drawn at random with
    a fixed seed.
    """
    baseline, recipe = baseline_of(name, models), models[name].recipe
    if baseline not in models:
        return None
    teachers = seeds_with_teacher(name, recipe.teacher, models, recipe.teacher_seed) if recipe.teacher else {}
    for seed in common_seeds(models[name], models[baseline]):
        if recipe.teacher and seed not in teachers:
            continue
        compared = {baseline: (baseline, seed), name: (name, seed)}
        if recipe.teacher and (recipe.teacher, teachers[seed]) not in compared.values():
            title = f"{recipe.teacher} (teacher)" if recipe.teacher in compared else recipe.teacher
            compared = {title: (recipe.teacher, teachers[seed])} | compared
        predictions = np.stack([models[m].predictions[s] for m, s in compared.values()])  # (3, n)
        images = np.flatnonzero((predictions != predictions[0]).any(0))
        drawn = np.sort(np.random.default_rng(0).choice(images, min(most, len(images)), replace=False))
        seeds = {title: of_model for title, (_, of_model) in compared.items()}
        about = {"models": [m for m, _ in compared.values()], "seed": seed, "seeds": seeds}
        return {**about, "count": len(images), "shown": drawn.tolist()} if len(images) else None
    return None
