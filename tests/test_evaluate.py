import dataclasses
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from conftest import flags

import evaluate
from config import PRESETS
from evaluate import (
    confusion_figure,
    curves_figure,
    detectable_difference,
    detectable_over_seeds,
    expected_calibration_error,
    holm,
    mcnemar_p,
    paired_bootstrap,
    paired_t_p,
    report_figure,
    seeds_needed,
    student_t_cdf,
    student_t_quantile,
    t_interval,
    table,
    wilson_interval,
)

# Statistics against SciPy, or a plain loop


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (47, 50), (9420, 10_000), (1, 10_000)])
def test_wilson_interval(correct, n):
    expected = scipy.stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_refuses_what_is_no_proportion():
    for correct, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="wilson_interval takes"):
            wilson_interval(correct, n)


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (5, 5), (4, 12), (12, 4), (180, 219), (219, 180), (5000, 4900)])
def test_mcnemar_p(pair):
    expected = scipy.stats.binomtest(pair[0], sum(pair), 0.5).pvalue if sum(pair) else 1.0
    assert mcnemar_p(*pair) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 9, 30])
def test_student_t(df):
    for t in (-30.0, -2.0, 0.0, 0.3, 1.0, 4.5):
        assert student_t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), abs=1e-12)
    for p in (0.5, 0.8, 0.975, 0.999):
        assert student_t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-9, abs=1e-12)


def test_intervals_and_p_over_seeds():
    values = np.array([0.941, 0.945, 0.938, 0.949])
    expected = scipy.stats.t.interval(0.95, 3, values.mean(), scipy.stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    differences = np.array([0.004, -0.001, 0.003])
    assert paired_t_p(differences) == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue)
    assert paired_t_p(np.array([0.96, 0.95]) - np.array([0.956, 0.946])) is None  # equal up to rounding


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_bootstrap_is_that_of_a_plain_loop(seeds):
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [100, 50, 150])
    model, baseline = random.random((seeds, 300)) < 0.8, random.random((seeds, 300)) < 0.7
    draws = []
    for _ in range(4000):
        chosen = random.integers(0, seeds, seeds)
        images = np.concatenate([random.choice(np.flatnonzero(labels == c), (labels == c).sum()) for c in (0, 1, 2)])
        draws.append(model[np.ix_(chosen, images)].mean() - baseline[np.ix_(chosen, images)].mean())
    expected = np.quantile(draws, [0.025, 0.975])
    assert paired_bootstrap(model, baseline, labels) == pytest.approx(expected, abs=0.006)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    labels, covered = np.zeros(400, dtype=int), 0
    for _ in range(200):
        model, baseline = random.random((1, 400)) < 0.85, random.random((1, 400)) < 0.80
        low, high = paired_bootstrap(model, baseline, labels)
        covered += low <= 0.05 <= high
    assert 180 <= covered <= 199  # 190 expected, standard deviation 3


def test_holm_is_the_step_down_procedure():
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


def simulated(random, n: int, discordant: float, difference: float) -> evaluate.Evaluated:
    """Two models of n images that just one of them gets right on a share `discordant`."""
    kinds = random.choice(
        [1, -1, 0], n, p=[(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    )
    recipes = PRESETS["cifar10"].recipes
    right = {"student": kinds != 1, "student_kd": kinds != -1}  # logits of two classes, the label always 0
    return {
        name: evaluate.Evaluated(recipes[name], {0: np.stack([right[name], ~right[name]], 1).astype(np.float32)}, {})
        for name in right
    }


def test_equally_good_models_are_called_different_in_at_most_a_twentieth_of_the_tests():
    random, labels, said = np.random.default_rng(0), np.zeros(2000, dtype=int), Counter()
    for _ in range(1000):
        (comparison,) = evaluate.compare_all(simulated(random, 2000, 0.04, 0.0), labels)
        said[comparison["verdict"]] += 1
    assert said["better"] + said["worse"] <= 50
    assert said["better"] > 0
    assert said["worse"] > 0


def test_a_point_among_ten_thousand_images_is_found_as_often_as_the_power_says():
    random, n, discordant, difference = np.random.default_rng(0), 10_000, 0.06, 0.01
    k = difference / math.sqrt((discordant - difference**2) / n)
    power = scipy.stats.norm.cdf(k - scipy.stats.norm.ppf(0.975))
    verdicts = [
        evaluate.compare_all(simulated(random, n, discordant, difference), np.zeros(n, dtype=int))[0]["verdict"]
        for _ in range(300)
    ]
    assert verdicts.count("worse") == 0
    assert verdicts.count("better") / 300 == pytest.approx(power, abs=0.03)


def test_the_detectable_difference_is_found_four_times_in_five():
    n, discordant = 10_000, 0.04
    difference = detectable_difference(discordant, n)
    random = np.random.default_rng(0)
    draws = random.multinomial(n, [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant], 2000)
    found = np.mean([mcnemar_p(int(b), int(c)) < 0.05 for b, c, _ in draws])
    assert found == pytest.approx(0.8, abs=0.03)
    assert seeds_needed(difference, discordant, n, None) == 1
    assert seeds_needed(difference / 2, discordant, n, None) == 4


@pytest.mark.parametrize("seeds", [5, 20])
def test_the_detectable_difference_over_seeds_is_found_four_times_in_five(seeds):
    difference = detectable_over_seeds(0.0015, seeds)
    random = np.random.default_rng(0)
    found = np.mean([paired_t_p(random.normal(difference, 0.0015, seeds)) < 0.05 for _ in range(3000)])
    assert found == pytest.approx(0.8, abs=0.04)
    assert seeds_needed(difference, 0.04, 10_000, 0.0015) == seeds


def test_the_number_of_seeds_may_be_out_of_reach():
    assert seeds_needed(0.0, 0.04, 10_000, None) is None
    assert seeds_needed(1e-9, 0.04, 10_000, 0.0015) is None
    assert seeds_needed(0.0001, 0.04, 10_000, 0.0015) == pytest.approx((2.8016 * 15) ** 2, rel=0.01)


def test_the_originals_own_figures_are_indistinguishable_unless_their_errors_hardly_differ():
    """9,420 of 10,000 right with the teacher and 9,410 without, for every possible overlap of their errors."""
    significant = [only for only in range(581) if mcnemar_p(only + 10, only) < 0.05]
    assert significant == [only for only in range(581) if scipy.stats.binomtest(only, 2 * only + 10).pvalue < 0.05]
    assert significant == [*range(6)]  # at most 20 discordant images, where two such models have about 400


def test_expected_calibration_error():
    random = np.random.default_rng(0)
    logits, labels = 2 * random.normal(size=(1000, 10)), random.integers(0, 10, 1000)
    e = np.exp(logits)
    probabilities = e / e.sum(axis=1, keepdims=True)
    rows = sorted(zip(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, strict=True))
    expected, start = 0.0, 0
    for size in [67] * 10 + [66] * 5:  # 1000 in 15 bins
        confidence, right = zip(*rows[start : start + size], strict=True)
        expected += size / 1000 * abs(sum(confidence) / size - sum(right) / size)
        start += size
    assert expected_calibration_error(logits, labels) == pytest.approx(expected, rel=1e-9)
    assert expected_calibration_error(torch.tensor(logits), torch.tensor(labels)) == pytest.approx(expected, rel=1e-9)


def test_a_calibrated_model_has_little_calibration_error_and_a_boastful_one_much():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(10), size=20_000)
    labels = np.array([random.choice(10, p=p) for p in probabilities])
    assert expected_calibration_error(np.log(probabilities), labels) < 0.015
    assert expected_calibration_error(5 * np.log(probabilities), labels) > 0.3


@pytest.mark.parametrize(
    ("changes", "baseline"),
    [
        ({}, "student"),
        ({"teacher": {"arch": "resnet18"}}, "student"),
        ({"student": {"arch": "resnet34"}}, None),
        ({"student": {"arch": "resnet34"}, "teacher": {"arch": "resnet18"}}, "teacher"),  # self-distillation
        ({"student_kd": {"baseline": "teacher"}}, "teacher"),
    ],
)
def test_a_taught_model_is_compared_with_its_architecture_without_a_teacher(changes, baseline):
    recipes = PRESETS["cifar10"].recipes
    models = {
        name: evaluate.Evaluated(dataclasses.replace(recipe, **changes.get(name, {})), {}, {})
        for name, recipe in recipes.items()
    }
    assert evaluate.baseline_of("student_kd", models) == baseline
    assert evaluate.baseline_of("student", models) is None


# The report


@pytest.fixture(scope="module")
def report(trained):
    evaluate.main([*flags(trained), "--seeds", "0", "1"])
    return trained / "imgs" / "demo"


def test_a_run_leaves_every_file_of_the_design(report):
    files = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    of_models = ("confusion_matrix.png", "classification_report.png", "classification_report.txt")
    assert files == {
        *(f"{model}/{file}" for model in ("teacher", "student", "student_kd") for file in of_models),
        *("training_curves.png", "results.md", "results.json", "predictions.npz"),
    }


def test_predictions_alone_reproduce_every_number(report):
    results = json.loads((report / "results.json").read_text())
    arrays = np.load(report / "predictions.npz")
    labels, models = arrays["labels"], ("teacher", "student", "student_kd")
    assert sorted(arrays.files) == sorted(["labels", *(f"{model}/seed{seed}" for model in models for seed in (0, 1))])
    assert (results["run"], results["dataset"], results["n_test"]) == ("demo", "digits", 500)
    predictions = {model: [arrays[f"{model}/seed{seed}"].argmax(1) for seed in (0, 1)] for model in models}
    for model, entry in results["models"].items():
        accuracies = [sklearn.metrics.accuracy_score(labels, p) for p in predictions[model]]
        assert entry["accuracy"]["seeds"] == pytest.approx({"0": accuracies[0], "1": accuracies[1]})
        assert entry["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
        assert entry["accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
        pooled = np.tile(labels, 2), np.concatenate(predictions[model])
        assert entry["confusion_matrix"] == sklearn.metrics.confusion_matrix(*pooled).tolist()
        recalls = sklearn.metrics.recall_score(*pooled, average=None)
        assert list(entry["per_class"].values()) == pytest.approx(list(recalls))
        text = (report / model / "classification_report.txt").read_text()
        assert text == sklearn.metrics.classification_report(*pooled, digits=4, zero_division=0)
    (comparison,) = results["comparisons"]
    assert (comparison["model"], comparison["baseline"]) == ("student_kd", "student")
    right = {model: np.array([p == labels for p in predictions[model]]) for model in models}
    difference = right["student_kd"].mean(1) - right["student"].mean(1)
    assert comparison["difference"] == pytest.approx(difference.mean())
    assert comparison["p_value"] == pytest.approx(scipy.stats.ttest_1samp(difference, 0).pvalue)
    first = Counter(zip(right["student_kd"][0].tolist(), right["student"][0].tolist(), strict=True))
    b, c = first[True, False], first[False, True]
    assert comparison["mcnemar_p"]["0"] == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue)


def test_the_table_is_printed_with_a_column_for_each_recipe(report, trained, capsys):
    evaluate.main([*flags(trained), "--only", "student", "teacher", "--imgs_path", str(trained / "one_seed")])
    printed = capsys.readouterr().out.splitlines()
    assert [word.strip() for word in printed[0].strip("|").split("|")] == ["accuracy (%)", "teacher", "student"]
    assert len(printed) == 2 + 10 + 3
    results = json.loads((trained / "one_seed/demo/results.json").read_text())
    entry = results["models"]["student"]["accuracy"]
    assert entry["std"] is None
    assert entry["ci95"] == pytest.approx(wilson_interval(round(500 * entry["mean"]), 500))
    assert f"{100 * entry['mean']:.2f}" in printed[-3]
    error = results["models"]["student"]["expected_calibration_error"]
    assert f"{100 * error:.1f}" in printed[-1]


def test_the_markdown_report_shows_figures_that_exist(report):
    text = (report / "results.md").read_text()
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(shown) == 4
    assert all((report / path).is_file() for path in shown)
    assert "student_kd is " in text


def test_missing_checkpoints_are_named_and_the_others_evaluated(trained, tmp_path, capsys):
    evaluate.main([*flags(trained), "--seeds", "1", "2", "--imgs_path", str(tmp_path)])
    told = capsys.readouterr()
    for model in ("teacher", "student", "student_kd"):
        assert f"not trained yet, left out: {trained}/checkpoints/demo/seed2/{model}.pt" in told.err
    assert "overall" in told.out
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(results["models"]["teacher"]["accuracy"]["seeds"]) == ["1"]
    assert len(results["missing"]) == 3
    text = (tmp_path / "demo" / "results.md").read_text()
    assert "seeds: 1." in text
    assert text.count("seed2") == 3


def test_nothing_trained_is_an_error_that_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags(tmp_path))
    assert exit.value.code == 2
    assert "train first: python teacher_student_model.py" in capsys.readouterr().err


def test_a_checkpoint_with_other_settings_is_not_reported_under_these(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*flags(trained), "--student.epochs", "7", "--imgs_path", str(tmp_path)])
    assert exit.value.code == 2
    assert "student.epochs was 2, is now 7" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Figures and tables


HOSTILE = ("a|b", "two\nlines", "$\\frac{", "plain")


def test_a_model_whose_logits_are_no_numbers_does_not_end_the_report():
    labels = np.array([0, 1, 1])
    model = evaluate.Evaluated(PRESETS["demo"].recipes["student"], {0: np.full((3, 2), np.nan, np.float32)}, {})
    entry = evaluate.model_metrics(model, labels, ("a", "b"))
    assert entry["expected_calibration_error"] is None
    json.dumps(entry, allow_nan=False)


def test_two_seeds_that_differ_alike_are_indistinguishable():
    right = np.ones((2, 500), dtype=bool)
    worse = right.copy()
    worse[:, :2] = False
    recipes = PRESETS["cifar10"].recipes
    models = {
        name: evaluate.Evaluated(recipes[name], {s: np.stack([r[s], ~r[s]], 1).astype(float) for s in (0, 1)}, {})
        for name, r in (("student", worse), ("student_kd", right))
    }
    (comparison,) = evaluate.compare_all(models, np.zeros(500, dtype=int))
    assert comparison["p_value"] is None
    assert comparison["verdict"] == "indistinguishable"
    assert "not defined" in evaluate.comparison_sentence(comparison)


def test_a_table_keeps_its_shape_whatever_the_names_are():
    lines = table(["class", *HOSTILE], [[name, 1, 2, 3, 4] for name in HOSTILE]).splitlines()
    assert len(lines) == 6
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines)


def test_figures_draw_whatever_the_names_are():
    labels = np.array([0, 1, 2, 3, 3, 0])
    predictions = np.array([0, 1, 2, 3, 0, 0])
    counts = sklearn.metrics.confusion_matrix(labels, predictions)
    report = sklearn.metrics.classification_report(labels, predictions, target_names=HOSTILE, output_dict=True)
    record = {"epoch": 1, "loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.4}
    for figure in (
        confusion_figure(counts, HOSTILE, "x"),
        report_figure(report, HOSTILE, "x"),
        curves_figure({name: {0: [record], 1: [record]} for name in HOSTILE}),
    ):
        assert evaluate.png(figure).startswith(b"\x89PNG")


def test_figures_of_many_classes_stay_of_bounded_size():
    classes = tuple(f"class {number}" for number in range(150))
    counts = np.eye(150, dtype=int)
    rows = {name: {"precision": 1.0, "recall": 0.5, "f1-score": 0.7, "support": 3} for name in classes}
    report = {**rows, "macro avg": rows["class 0"], "weighted avg": rows["class 0"]}
    for figure in (confusion_figure(counts, classes, "x"), report_figure(report, classes, "x")):
        assert figure.get_size_inches().max() < 15


def test_the_confusion_figure_has_true_classes_as_rows():
    counts = np.array([[8, 2], [0, 10]])
    axes = confusion_figure(counts, ("cat", "dog"), "model").axes[0]
    assert [text.get_text() for text in axes.texts] == ["8", "2", "0", "10"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog"]
    np.testing.assert_allclose(axes.collections[0].get_array().ravel(), [80, 20, 0, 100])
