import dataclasses
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from synthetic import family, probabilities_of, simulated, simulated_seeds, three_models

from config import PRESETS
from engine.recipes import Recipe
from engine.soft_losses import SOFT_LOSSES
from report.comparisons import (
    baseline_of,
    compare,
    compare_all,
    differing_settings,
    disagreements,
    distilled,
    fidelity,
    not_compared,
    soft_targets,
)
from report.metrics import Evaluated
from report.statistics import detectable_over_seeds, image_variance, paired_interval


@pytest.mark.parametrize(
    ("seeds", "seed_std"),
    [(3, 0.01), *(pytest.param(*case, marks=pytest.mark.chaos) for case in ((2, 0.01), (5, 0.01), (3, 0.0)))],
)
def test_over_seeds_the_interval_covers_and_the_false_positive_rate_is_small(seeds, seed_std):
    random, labels, verdicts, covered = np.random.default_rng(0), np.zeros(2000, dtype=int), Counter(), 0
    for _ in range(300):
        (comparison,) = compare_all(simulated_seeds(random, seeds, 2000, 0.0, seed_std, 0.05), labels)
        verdicts[comparison.verdict] += 1
        covered += comparison.ci95[0] <= 0 <= comparison.ci95[1]
    assert verdicts["better"] + verdicts["worse"] <= 0.05 * 300 + 7  # two standard deviations
    assert 0.95 * 300 - 8 <= covered <= 297


@pytest.mark.parametrize(
    ("seeds", "families"), [(10, 60), (5, 50), pytest.param(2, 100, marks=pytest.mark.chaos)]
)  # with two seeds, many pairs differ by the same number of images in both
def test_at_most_5_percent_of_families_of_18_comparisons_have_a_false_verdict(seeds, families):
    random, labels, false = np.random.default_rng(0), np.zeros(500, dtype=int), 0
    pairs = [(f"student_{row}", "student_0") for row in range(1, 19)]
    for _ in range(families):
        found = compare_all(family(random, 18, seeds, 500), labels, pairs=pairs)
        false += any(comparison.verdict != "indistinguishable" for comparison in found)
    assert false <= 0.05 * families + 3 * math.sqrt(0.05 * 0.95 * families)  # three standard deviations


@pytest.mark.parametrize(("comparisons", "seeds", "n"), [(1, 3, 500), (18, 10, 500), (4, 5, 2000)])
def test_the_detectable_difference_is_found_with_80_percent_power_by_the_verdict(comparisons, seeds, n):
    """In a family in which no other comparison has been run. Simulated equal models give the standard deviations."""
    random, labels = np.random.default_rng(0), np.zeros(n, dtype=int)
    variances, variances_over_images = [], []
    for _ in range(150):
        first, second = (model.correct(labels) for model in family(random, 1, seeds, n).values())
        variances.append((second.mean(1) - first.mean(1)).var(ddof=1))
        variances_over_images.append(image_variance(second, first)[1])
    std, images = math.sqrt(np.mean(variances)), np.mean(variances_over_images)
    difference = detectable_over_seeds(std, images, seeds, 0.05 / comparisons)
    pairs = [("student_1", "student_0"), *[("not run", "student_0")] * (comparisons - 1)]
    verdicts = [
        compare_all(family(random, 1, seeds, n, difference), labels, pairs=pairs)[0].verdict for _ in range(300)
    ]
    assert 0.73 <= verdicts.count("better") / 300 <= 0.87  # three standard deviations
    assert verdicts.count("worse") == 0


def test_mcnemars_false_positive_rate_is_at_most_5_percent():
    random, labels, different = np.random.default_rng(0), np.zeros(2000, dtype=int), Counter()
    for _ in range(500):
        (comparison,) = compare_all(simulated(random, 2000, 0.04, 0.0), labels)
        different[comparison.difference > 0] += comparison.verdict == "different"
    assert sum(different.values()) <= 0.05 * 500
    assert different[True] > 0
    assert different[False] > 0


def test_power_with_one_seed_agrees_with_simulation():
    random, n, discordant, difference = np.random.default_rng(0), 10_000, 0.06, 0.01
    k = difference / math.sqrt((discordant - difference**2) / n)
    power = scipy.stats.norm.cdf(k - scipy.stats.norm.ppf(0.975))
    verdicts = [
        compare_all(simulated(random, n, discordant, difference), np.zeros(n, dtype=int))[0].verdict for _ in range(200)
    ]
    assert verdicts.count("different") / 200 == pytest.approx(power, abs=0.03)


def test_fidelity_is_that_of_a_plain_loop_over_the_common_seeds():
    models, labels = three_models()
    row_kd, row_alone = fidelity(models, labels)
    assert (row_kd["model"], row_kd["teacher"], row_kd["seeds"]) == (
        "student_kd",
        "teacher",
        [0, 1],
    )
    assert (row_alone["model"], row_alone["teacher"], row_alone["seeds"], row_alone["temperature"]) == (
        "student",
        "teacher",
        [1],
        5.0,
    )
    for row in (row_kd, row_alone):
        same, same_where_wrong, divergences = [], [], []
        for seed in row["seeds"]:
            v, z = models["teacher"].logits[seed], models[row["model"]].logits[seed]
            for image, label in enumerate(labels):
                agrees = v[image].argmax() == z[image].argmax()
                same.append(agrees)
                if v[image].argmax() != label:
                    same_where_wrong.append(agrees)
            p, q = probabilities_of(v / 5), probabilities_of(z / 5)
            divergences.append((p * np.log(p / q)).sum(1).mean())
        assert row["agreement"] == pytest.approx(np.mean(same))
        assert row["agreement_where_teacher_wrong"] == pytest.approx(np.mean(same_where_wrong))
        assert row["teacher_wrong"] == len(same_where_wrong) > 0
        assert row["kl_at_temperature"] == pytest.approx(np.mean(divergences))
    del models["teacher"]
    assert fidelity(models, labels) == []


@pytest.mark.parametrize(
    ("loss", "of_teacher", "of_both"),
    [
        ("kd", True, True),
        ("dkd", True, True),
        ("dist", True, True),
        ("ttm", True, False),
        ("standardised_kd", False, False),
    ],
)
def test_what_is_given_at_the_temperature_is_what_the_soft_loss_uses(loss, of_teacher, of_both):
    models, labels = three_models()
    recipe = replace(models["student_kd"].recipe, soft_loss=loss)
    models["student_kd"] = models["student_kd"]._replace(recipe=recipe)
    for row in fidelity(models, labels):
        assert (row["kl_at_temperature"] is not None) == of_both
        assert row["kl"] > 0
    (row,) = soft_targets(models, {"student_kd": {0: (models["teacher"].logits[0], labels)}})
    assert (row["entropy_at_temperature"] is not None) == of_teacher
    assert (row["confidence_at_temperature"] is not None) == of_teacher
    assert row["entropy"] > 0
    # A loss that uses the logits only as v / T and z / T is the same for v / T and z / T at T = 1.
    random = torch.Generator().manual_seed(0)
    z, v = torch.randn(2, 6, 5, dtype=torch.float64, generator=random)
    y, t = torch.arange(6) % 5, 3.0
    softened_both = SOFT_LOSSES[loss](z, v, y, t) / t**2 - SOFT_LOSSES[loss](z / t, v / t, y, 1.0)
    softened_teacher = SOFT_LOSSES[loss](z, v, y, t) - SOFT_LOSSES[loss](z, v / t, y, 1.0)
    assert (softened_both.abs() < 1e-12) == of_both
    assert (softened_teacher.abs() < 1e-12) == (of_teacher and not of_both)


def test_fidelity_to_a_teacher_without_errors():
    models, _ = three_models()
    (row, *_) = fidelity(
        {
            "teacher": models["teacher"]._replace(logits={0: models["teacher"].logits[0]}),
            "student_kd": models["student_kd"],
        },
        models["teacher"].predictions[0],
    )
    assert (row["teacher_wrong"], row["agreement_where_teacher_wrong"]) == (0, None)


def test_differences_by_class_are_paired_intervals_within_the_class():
    models, labels = three_models()
    comparison = compare("student_kd", "student", models, labels, ("a", "b", "c", "d"))
    first, second = (np.stack([models[m].predictions[s] == labels for s in (1, 2)]) for m in ("student_kd", "student"))
    for label, name in enumerate("abcd"):
        of_class = labels == label
        entry = comparison.per_class[name]
        assert entry["difference"] == pytest.approx(first[:, of_class].mean() - second[:, of_class].mean())
        expected = paired_interval(first[:, of_class], second[:, of_class])
        assert entry["ci95"] == pytest.approx(expected)


def test_the_gallery_shows_images_on_which_the_models_disagree():
    models, labels = three_models()

    def shown(models):
        return disagreements(compare("student_kd", "student", models, labels), models)

    gallery = shown(models)
    assert gallery.seed == 1  # the only one that all three have
    predictions = np.stack([models[m].predictions[1] for m in gallery.models])
    disagree = {image for image in range(200) if len(set(predictions[:, image])) > 1}
    assert set(gallery.shown) < disagree
    assert (gallery.count, len(set(gallery.shown))) == (len(disagree), 12)
    assert gallery == shown(models)
    alike = {name: model._replace(logits={1: models["teacher"].logits[1]}) for name, model in models.items()}
    assert shown(alike) is None
    recipe = dataclasses.replace(models["student_kd"].recipe, teacher="student", teacher_seed=2)
    gallery = shown({**models, "student_kd": models["student_kd"]._replace(recipe=recipe)})
    assert gallery.models == ["student", "student", "student_kd"]  # a teacher of the baseline's row, of another seed
    assert list(gallery.seeds.values()) == [2, 1, 1]
    kd, taught = models["student_kd"].predictions[1], models["student"].predictions
    assert gallery.count == ((taught[2] != taught[1]) | (taught[2] != kd)).sum()
    apart = {**models, "student": models["student"]._replace(logits={2: models["student"].logits[2]})}
    assert shown(apart) is None  # no seed that all three have


@pytest.mark.parametrize(
    ("changes", "baseline"),
    [
        ({}, "student"),
        ({"teacher": {"arch": "resnet18"}}, "student"),
        ({"student": {"arch": "resnet34"}}, None),
        ({"student": {"lr": 0.01}}, None),  # every setting has to agree, except for distillation's
        ({"student_kd": {"label_smoothing": 0.1}}, None),
        ({"student_kd": {"alpha": 0.5, "temperature": 2.0, "soft_loss": "dist", "teacher_seed": 3}}, "student"),
        ({"student": {"arch": "resnet34"}, "teacher": {"arch": "resnet18"}}, "teacher"),  # self-distillation
        ({"student_kd": {"baseline": "teacher"}}, "teacher"),
    ],
)
def test_a_distilled_model_is_compared_with_the_same_recipe_without_a_teacher(changes, baseline):
    recipes = PRESETS["scratch"].recipes
    models = {
        name: Evaluated(dataclasses.replace(recipe, **changes.get(name, {})), {}, {})
        for name, recipe in recipes.items()
    }
    assert baseline_of("student_kd", models) == baseline
    assert baseline_of("student", models) is None


def test_two_seeds_with_the_same_difference_are_indistinguishable():
    right = np.ones((2, 500), dtype=bool)
    worse = right.copy()
    worse[:, :2] = False
    recipes = PRESETS["scratch"].recipes
    models = {
        name: Evaluated(recipes[name], {s: np.stack([r[s], ~r[s]], 1).astype(float) for s in (0, 1)}, {})
        for name, r in (("student", worse), ("student_kd", right))
    }
    (comparison,) = compare_all(models, np.zeros(500, dtype=int))
    assert comparison.t_test_p is None
    assert comparison.verdict == "indistinguishable"
    assert comparison.detectable_difference is None


def test_one_seed_is_never_called_better():
    random, n = np.random.default_rng(0), 2000
    (found,) = compare_all(simulated(random, n, 0.2, 0.1), np.zeros(n, dtype=int))
    assert (found.verdict, found.test, found.t_test_p) == ("different", "exact McNemar test", None)
    assert found.p_value == found.p_holm == found.mcnemar_p["0"] < 0.05
    (none,) = compare_all(simulated(random, n, 0.2, 0.0), np.zeros(n, dtype=int))
    assert none.verdict == "indistinguishable"
    (several,) = compare_all(simulated_seeds(random, 3, n, 0.2, 0.001, 0.0), np.zeros(n, dtype=int))
    assert (several.verdict, several.test) == ("better", "paired over seeds and images")
    assert several.p_value > several.t_test_p


def test_the_environments_of_two_models_are_compared_seed_by_seed():
    models, labels = three_models()

    def differing(of_student_kd, of_student, **recipe):
        """In seeds 1 and 2, which both have."""
        found = {
            "student_kd": models["student_kd"]._replace(environments={0: {"threads": "64"}} | of_student_kd),
            "student": models["student"]._replace(environments=of_student),
        }
        found["student"] = found["student"]._replace(recipe=replace(found["student"].recipe, **recipe))
        return compare("student_kd", "student", found, labels).environments_differ

    one, two = ({"threads": number, "precision": "fp32", "code": "a", "numpy": "1"} for number in "12")
    assert differing({1: one, 2: two}, {1: one, 2: two}) == []
    assert differing({1: one, 2: two}, {1: one, 2: one}) == ["threads"]
    assert differing({1: one, 2: one}, {1: one, 2: {**one, "code": "b", "precision": "bf16", "numpy": "2"}}) == [
        "code",
        "precision",
    ]
    assert differing({1: one, 2: one}, {1: one, 2: {"code": "b"}}) == ["code"]  # not recorded: not known to differ
    assert differing({1: one, 2: one}, {1: two, 2: two}, epochs=0, weights="random") == []  # was not trained here


GIVEN = {"weights": "teacher.pth", "epochs": 0}


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, False),
        ({"student_kd": {"teacher_seed": 0}}, True),
        ({"teacher": GIVEN}, True),
        ({"teacher": {**GIVEN, "epochs": 3}}, False),
        ({"teacher": {**GIVEN, "weights": "random"}}, False),  # one of each seed
        ({"teacher": {"teacher": "expert"}}, False),
        ({"teacher": {"teacher": "expert", "teacher_seed": 0}}, True),  # the teacher's teacher
        ({"teacher": {"teacher": "expert"}, "expert": GIVEN}, True),
        ({"student": {"teacher": "teacher", "teacher_seed": 0}, "student_kd": {"baseline": "student"}}, True),
    ],
)
def test_whether_a_comparison_holds_for_one_teacher_only(changes, shared):
    recipes = dict(PRESETS["scratch"].recipes)
    recipes["expert"] = recipes["teacher"]
    recipes = {name: dataclasses.replace(recipe, **changes.get(name, {})) for name, recipe in recipes.items()}
    evaluated, labels = three_models()
    models = {name: evaluated[name]._replace(recipe=recipes[name]) for name in ("student", "student_kd")}
    pairs = [("student_kd", "student")]
    assert compare_all(models, labels, pairs=pairs, recipes=recipes)[0].shared_teacher is shared


def test_the_reason_why_a_model_is_not_compared_is_the_right_one():
    recipes = PRESETS["scratch"].recipes

    def evaluated(seeds, **changes):
        models = {name: Evaluated(recipes[name], dict.fromkeys(of, np.eye(2)), {}) for name, of in seeds.items()}
        return {n: m._replace(recipe=dataclasses.replace(m.recipe, **changes.get(n, {}))) for n, m in models.items()}

    both = {"student": [0], "student_kd": [0]}
    assert not_compared(evaluated(both)) == {}
    reasons = not_compared(evaluated(both, student_kd={"baseline": "teacher"}))
    assert reasons == {"student_kd": "its baseline teacher has not been evaluated"}
    reasons = not_compared(evaluated(both, student={"baseline": "teacher"}))
    assert reasons == {"student": "its baseline teacher has not been evaluated"}
    reasons = not_compared(evaluated({"student": [0], "student_kd": [1]}))
    assert reasons == {"student_kd": "it has no seed in common with its baseline student"}
    reasons = not_compared(evaluated({"teacher": [0], "student_kd": [0]}))
    row = re.search(r'"(\w+)": (Recipe\(.*\)),', reasons["student_kd"])
    assert row[1] == "student_kd_alone"
    assert eval(row[2], {"Recipe": Recipe}) == recipes["student"]  # ready to paste


def test_a_pair_without_common_seeds_does_not_lower_the_level_of_the_others():
    random, labels = np.random.default_rng(0), np.zeros(2000, dtype=int)
    models = simulated_seeds(random, 3, 2000, 0.01, 0.005, 0.05)
    (alone,) = compare_all(models, labels)
    elsewhere = models["student_kd"]._replace(logits={9: models["student_kd"].logits[0]})
    (beside,) = compare_all({**models, "other": elsewhere}, labels)
    assert beside.detectable_difference == alone.detectable_difference


def test_settings_in_which_a_model_and_its_baseline_differ_are_listed():
    recipes = PRESETS["cifar10"].recipes
    longer = differing_settings(recipes["student_kd"], recipes["student"])
    assert longer == {"epochs": [10, 5]}
    assert differing_settings(recipes["student_kd"], recipes["student_10"]) == {}
    warmer = dataclasses.replace(recipes["student_kd"], temperature=8.0, baseline="student_kd")
    assert differing_settings(warmer, recipes["student_kd"]) == {"temperature": [8.0, 5.0]}
    smoothed = dataclasses.replace(recipes["student_10"], label_smoothing=0.1)
    assert differing_settings(smoothed, recipes["student_kd"]) == {
        "label_smoothing": [0.1, 0.0],
        "teacher": [None, "teacher"],  # here the baseline is the distilled one
    }
    models, labels = three_models()
    fewer = dataclasses.replace(models["student_kd"].recipe, lr=0.5, baseline="student")
    models["student_kd"] = models["student_kd"]._replace(recipe=fewer)
    (entry,) = compare_all(models, labels)
    assert entry.differs_in == {"lr": [0.5, 0.02]}


def test_one_teacher_seed_for_all_students_pairs_each_with_it():
    models, labels = three_models()
    recipe = dataclasses.replace(models["student_kd"].recipe, teacher_seed=1)
    models["student_kd"] = models["student_kd"]._replace(recipe=recipe)
    assert distilled(models) == {"student_kd": ("teacher", {0: 1, 1: 1, 2: 1})}
    row, _ = fidelity(models, labels)
    teacher = models["teacher"].logits[1].argmax(1)
    agreement = [(models["student_kd"].logits[seed].argmax(1) == teacher).mean() for seed in (0, 1, 2)]
    assert row["agreement"] == pytest.approx(np.mean(agreement))
    assert row["seeds"] == [0, 1, 2]
