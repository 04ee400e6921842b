"""The study: its presets, the comparison of a reproduction with it, and the numbers that the documents state."""

import csv
import itertools
import json
import re
from functools import cache

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats
from synthetic import example_results

from config import PRESETS
from engine.errors import UserError
from experiments import answer, archive, compare
from experiments.compare import p_value, published
from experiments.presets import STUDY
from report.comparisons import Comparison, differing_settings
from report.markdown import interval, verdict
from report.metrics import Evaluated, count_ties
from report.statistics import detectable_difference, holm, mcnemar_p, paired_p


def write_report(folder, labels, arrays) -> None:
    """The two files of imgs/RUN that are kept; a model's history is one epoch; its loss is the first class."""
    np.savez(folder / "predictions.npz", **{"labels": labels, **arrays})
    models: dict[str, dict] = {}
    for name, seed in (key.split("/seed") for key in arrays if not key.startswith("validation/")):
        model = models.setdefault(name, {"history": {}, "environments": {}})
        model["history"][seed] = [{"epoch": 1, "loss": float(arrays[f"{name}/seed{seed}"][0].argmax())}]
        model["environments"][seed] = {"device": f"the machine of seed {seed}"}
    (folder / "results.json").write_text(json.dumps({"models": models}))


def results(**models) -> dict:
    """What of a results.json is compared."""
    seeds = {name: {"accuracy": {"seeds": dict(enumerate(values))}} for name, values in models.items()}
    return {"n_test": 10_000, "models": seeds}


def test_a_reproduction_is_compared_by_welchs_test_if_seeds_vary_more_than_images():
    first, second = np.array([0.60, 0.63, 0.62, 0.64]), np.array([0.65, 0.68, 0.64])
    p = p_value(first, second, 10**9)
    assert p == pytest.approx(stats.ttest_ind(first, second, equal_var=False).pvalue)


def test_a_reproduction_of_few_seeds_is_not_excused():
    published = np.array([0.617, 0.618, 0.620])
    for accuracy, agrees in ((0.615, True), (0.625, True), (0.60, False), (0.45, False)):
        assert (p_value(published, np.array([accuracy]), 10_000) > 0.05 / 8) == agrees


def test_a_reproduction_with_one_seed_allows_for_the_sampling_of_images():
    assert p_value(np.array([0.9]), np.array([0.903]), 10_000) > 0.4
    assert p_value(np.full(3, 0.9), np.full(3, 0.7), 10_000) < 0.01


def test_what_is_published_is_what_was_kept(kept_predictions):
    path, arrays, labels = kept_predictions
    archive.keep("ablation", path)
    accuracies, n = published()
    assert (list(accuracies), n) == (["student"], 20)
    each = [(arrays[f"student/seed{seed}"].argmax(1) == labels).mean() for seed in (0, 1)]
    assert accuracies["student"].tolist() == pytest.approx(each)


@pytest.mark.parametrize(("other", "status"), [([0.6, 0.61, 0.62], 0), ([0.1, 0.11, 0.12], 1)])
def test_the_comparison_as_a_program(tmp_path, monkeypatch, capsys, other, status):
    (tmp_path / "reproduced.json").write_text(json.dumps(results(student=other, only_here=[0.5])))
    here = {"student": np.array([0.6, 0.61, 0.62]), "only_published": np.array([0.5])}
    monkeypatch.setattr(compare, "published", lambda: (here, 10_000))
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "reproduced.json")])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == status
    _, row, _ = capsys.readouterr().out.splitlines()
    assert row.split()[0] == "student"
    assert row.endswith("differs") == bool(status)


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_a_comparison_of_missing_or_foreign_files_is_one_error(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "results.json"
    if content:
        path.write_text(content)
    monkeypatch.setattr("sys.argv", ["compare", str(path)])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: ")


@pytest.mark.parametrize("run", ["ablation", "controls", "methods"])
def test_a_variant_differs_from_plain_kd_in_one_setting(run):
    recipes = PRESETS[run].recipes
    for name, recipe in recipes.items():
        if recipe.baseline == "kd" and recipe.teacher:
            differing = differing_settings(recipe, recipes["kd"])
            assert len(differing) == 1 + (name == "kd_without_t2_lr"), name


# The tables and the figure


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Three seeds of three models of `ablation`, each right on a part of 1,000 images."""
    monkeypatch.setattr(archive, "FOLDER", tmp_path)
    random, labels, correct = np.random.default_rng(0), np.arange(1000) % 10, {}
    arrays = {}
    for name, accuracy in (("teacher", 0.8), ("student", 0.5), ("kd", 0.6)):
        for seed in range(3):
            right = correct[name, seed] = random.random(1000) < accuracy
            arrays[f"{name}/seed{seed}"] = np.eye(10, dtype=np.float32)[np.where(right, labels, (labels + 1) % 10)]
    write_report(tmp_path, labels, arrays)
    archive.keep("ablation", tmp_path)
    return correct


def test_the_tables_state_what_scipy_finds(kept):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in answer.table("ablation").splitlines()]
    rows = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    taught, alone = (np.array([100 * kept[name, seed].mean() for seed in range(3)]) for name in ("kd", "student"))
    assert list(rows) == ["`teacher`", "`student`", "`kd`"]
    assert rows["`kd`"]["accuracy (%)"] == f"{taught.mean():.1f} ± {taught.std(ddof=1):.1f}"
    assert rows["`kd`"]["against"] == "`student`"
    assert rows["`kd`"]["difference"] == f"{(taught - alone).mean():+.1f}"
    correct = (np.stack([kept[name, seed] for seed in range(3)]) for name in ("kd", "student"))
    assert rows["`kd`"]["p"] == f"{paired_p(*correct):.2g}"
    assert rows["`student`"]["against"] == ""


def test_a_model_is_compared_with_each_of_its_baselines_in_one_family(kept):
    models, labels = archive.load("ablation")
    models["kd_without_t2"] = Evaluated(STUDY["ablation"].recipes["kd_without_t2"], models["teacher"].logits, {})
    found = answer.compared("ablation", models, labels)
    assert [(c.model, c.baseline) for c in found] == [
        ("kd", "student"),
        ("kd_without_t2", "kd"),
        ("kd_without_t2", "student"),
    ]
    compared_with_baselines = sum(bool(r.teacher or r.baseline) for r in STUDY["ablation"].recipes.values())
    planned = compared_with_baselines + len(answer.FURTHER["ablation"])  # including what has not been run
    p_values = sorted(c.p_value for c in found)
    first, second, third = sorted(found, key=lambda c: c.p_value)
    steps = [min(1.0, (planned - place) * p) for place, p in enumerate(p_values)]
    assert [c.p_holm for c in (first, second, third)] == pytest.approx(np.maximum.accumulate(steps))


def test_the_figure_shows_each_kept_row_and_its_seeds(kept):
    (axes,) = answer.figure().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["distilled with T²", "student alone"]
    shown = sorted(x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata())
    assert shown == pytest.approx(sorted(100 * kept[name, s].mean() for name in ("kd", "student") for s in range(3)))


# The numbers in the documents


@cache
def compared(run: str = "ablation") -> dict[tuple[str, str], Comparison]:
    """The comparisons of a run's kept models, by model and baseline."""
    return {(c.model, c.baseline): c for c in answer.compared(run, *archive.load(run))}


def points(model: str, baseline: str = "student") -> str:
    return f"{100 * compared()[model, baseline].difference:+.1f}"


def bounds(model: str, baseline: str = "student") -> str:
    return interval(compared()[model, baseline].ci95, 1, signed=True)


@pytest.mark.parametrize("run", STUDY)
def test_the_documented_tables_are_those_of_the_kept_predictions(run):
    assert answer.table(run) in (ROOT / "docs/answer.md").read_text(encoding="utf-8")


def words(path: str) -> str:
    return " ".join((ROOT / path).read_text(encoding="utf-8").replace("\n> ", "\n").split())


README, ANSWER = words("README.md"), words("docs/answer.md")


def test_the_readmes_table_is_that_of_the_kept_predictions():
    assert answer.gains() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_answer_is_that_of_the_kept_predictions():
    kd, without = compared()["kd", "student"], compared()["kd_without_t2", "student"]
    assert (kd.verdict, without.verdict) == ("better", "indistinguishable")
    gain, none = (f"{points(model)} ({bounds(model)})" for model in ("kd", "kd_without_t2"))
    assert f"gains {points('kd')} percentage points of test accuracy" in README
    assert f"over the same student alone (95% interval {bounds('kd')}, {len(kd.seeds)} seeds)" in README
    published = f"{points('original', 'student_2x')} ({bounds('original', 'student_2x')})"
    assert f"and without it {none}; as published, for twice the epochs, {published} over a student alone that" in README
    assert f"gains {gain} with it and {none} without it" in ANSWER


def test_the_documented_costs_are_those_of_the_kept_predictions():
    c = compared()["kd_without_t2", "kd"]
    lost, low, high = (f"{-100 * x:.1f}" for x in (c.difference, *reversed(c.ci95)))
    gain = points("kd").lstrip("+")
    interval_and_p = f"(95% interval {low} to {high}, p = {c.p_holm:.2g} after Holm)"
    assert f"**{lost} of the {gain} points** at equal epochs {interval_and_p}" in README
    step = points("small_step").lstrip("-")
    assert f"a student alone loses {step} points by it" in README
    ratio = 1 / (0.25 + 0.75 / 25)
    assert f"1 / (0.25 + 0.75 / 25) = {ratio:.1f} times the learning rate" in README
    assert STUDY["ablation"].recipes["kd_without_t2_lr"].lr == pytest.approx(0.05 * round(ratio, 1))
    regained = compared()["kd_without_t2_lr", "kd"].difference - c.difference
    assert f"recovers {100 * regained:.1f} of the {lost}: more than half is the step" in README
    assert regained > -c.difference / 2
    assert f"with it {100 * regained:.1f} of the {lost} points come back" in ANSWER
    alone = "a student alone**: with 3.6 times as much it gains {} points ({}, p = {:.2g} after Holm's correction)"
    assert (
        alone.format(points("student_lr"), bounds("student_lr"), compared()["student_lr", "student"].p_holm) in ANSWER
    )
    above = compared()["kd", "student"].difference - compared()["student_lr", "student"].difference
    assert f"is {100 * above:.1f} points above that" in ANSWER
    gained = points("student_lr").lstrip("+")
    assert f"with 3.6 times as much, a student alone gains {gained} points" in README
    higher = compared()["kd_without_t2_lr", "student"].difference - compared()["student_lr", "student"].difference
    ahead = f"without T² is {100 * higher:.1f} ahead of it, and with T² at the usual rate {100 * above:.1f}."
    assert f"Distillation at that rate {ahead}" in README
    returned = compared()["kd_without_t2", "student"].difference - compared()["small_step", "student"].difference
    assert f"what is left of the teacher brings {100 * returned:.1f} back." in README
    assert f"costs {step} points (`small_step`); what is left of the teacher brings {100 * returned:.1f} back" in ANSWER
    published = points("original"), points("original", "student_2x"), bounds("original", "student_2x")
    assert compared()["original", "student_2x"].verdict == "indistinguishable"
    apparent = "apparent gain: {} over a student alone of 15 epochs, but {} ({}, undecided) over one of as many"
    assert apparent.format(*published) in README
    assert "gains {} points here, of which {} ({}) remain against a student alone".format(*published) in ANSWER


def test_how_many_logits_tie_is_documented():
    kept = [m for run in STUDY for name, m in archive.load(run)[0].items() if archive.owner(run, name) == run]
    tied, of = sum(map(count_ties, kept)), sum(len(z) for model in kept for z in model.logits.values())
    assert f"{tied:,} of {of:,} predictions ({tied / of:.2%})" in ANSWER


def test_how_often_two_seeds_of_a_recipe_differ_is_documented():
    correct: dict[tuple[str, str], list[np.ndarray]] = {}
    for path in [path for run in STUDY for path in archive.FOLDER.glob(f"{run}/seed*.npz")]:
        with np.load(path) as arrays:
            for name in arrays.keys() - {"labels"}:
                correct.setdefault((path.parent, name), []).append(arrays[name][0] == arrays["labels"])
    pairs = [pair for of_seeds in correct.values() for pair in itertools.combinations(of_seeds, 2)]
    differ = [stats.binomtest(int((a & ~b).sum()), int((a != b).sum())).pvalue < 0.05 for a, b in pairs]
    assert f"with p < 0.05 in {sum(differ)} of {len(pairs)} pairs" in words("docs/statistics.md")


def ties_to_the_last_class(models: dict[str, Evaluated], labels: np.ndarray) -> tuple[dict[str, Evaluated], np.ndarray]:
    """The models and labels with the classes in reverse order, so that argmax breaks ties the other way."""
    reverse = {
        name: model._replace(logits={seed: logits[:, ::-1] for seed, logits in model.logits.items()})
        for name, model in models.items()
    }
    return reverse, 9 - labels


def test_the_order_of_the_classes_decides_no_verdict():
    for run in STUDY:
        models, labels = archive.load(run)
        found = answer.compared(run, models, labels)
        reverse = answer.compared(run, *ties_to_the_last_class(models, labels))
        assert [c.verdict for c in found] == [c.verdict for c in reverse]


def test_the_gain_with_unlimited_views_is_compared_with_that_of_stored_views():
    seeds, gains = (2, 3, 4), {}
    for run in ("views", "ablation"):
        models, labels = archive.load(run)
        kd, student = (models[name].correct(labels, seeds).mean(1) for name in ("kd", "student"))
        gains[run] = 100 * (kd - student)
    assert (gains["views"] > gains["ablation"]).all()
    larger, p = gains["views"] - gains["ablation"], stats.ttest_rel(gains["views"], gains["ablation"]).pvalue
    assert f"by {larger.mean():.1f} points on average (paired t-test over seeds, p = {p:.2g})" in ANSWER


def test_what_doubling_the_epochs_gains():
    c = compared()["kd_2x", "student_2x"]
    assert f"gains {points('kd_2x', 'student_2x')} points on a student alone of as many epochs" in ANSWER
    assert f"({bounds('kd_2x', 'student_2x')}, p = {c.p_holm:.2g} after Holm's correction)" in ANSWER


def test_what_temperature_and_alpha_change():
    for row, expected, words_of_row in (
        (
            "kd_t1",
            "indistinguishable",
            "T = 1 loses {} (p = {:.2g}, {:.2g} after it), which three seeds leave undecided",
        ),
        ("kd_alpha_90", "worse", "alpha = 0.9 loses {} points (p = {:.2g}, {:.2g} after Holm's correction)"),
        ("kd_alpha_90", "worse", "at the full step, and loses {}."),
    ):
        c = compared()[row, "kd"]
        assert c.verdict == expected
        assert words_of_row.format(points(row, "kd").lstrip("-"), c.p_value, c.p_holm) in ANSWER
    assert all(abs(compared()[f"kd_{row}", "kd"].difference) < 0.006 for row in ("t2", "t10", "alpha_0", "alpha_50"))


def test_what_the_number_of_labels_changes():
    found = compared("low_data")
    few, plain, more, every = (found[row, row.replace("kd", "student")] for row in ("kd_2", "kd", "kd_20", "kd_100"))
    assert [c.verdict for c in (few, plain, more, every)] == ["better", "better", "better", "worse"]
    gained = [f"{100 * c.difference:+.1f} points ({interval(c.ci95, 1, signed=True)})" for c in (few, more)]
    assert f"A student of 1,000 images gains {gained[0]}, one of 10,000 {gained[1].replace(' points', '')}" in README
    lost, *bounds_of_loss = (f"{-100 * x:.1f}" for x in (every.difference, *reversed(every.ci95)))
    models, labels = archive.load("low_data")
    alone, teacher = (f"{models[name].correct(labels).mean():.1%}" for name in ("student_100", "teacher"))
    assert f"loses {lost} ({' to '.join(bounds_of_loss)}): alone it reaches {alone}, more than this teacher" in README
    few, plain, more = (f"{100 * c.difference:+.1f}" for c in (few, plain, more))
    assert f"{few} points with 1,000 images, {plain} with 5,000 and {more} with 10,000" in ANSWER
    assert f"loses {lost} points. Alone, a ResNet18 reaches {alone} after 3 epochs on them" in ANSWER
    assert f"the ResNet50 after 4 ({teacher})" in ANSWER


def test_what_better_and_worse_teachers_change():
    found, (models, labels) = compared("teachers"), archive.load("teachers")
    verdicts = {row: found[row, "student"].verdict for row in ("kd_a", "kd_b", "kd_c", "kd", "kd_d")}
    assert verdicts == {"kd_a": "worse", "kd_b": "better", "kd_c": "worse", "kd": "better", "kd_d": "better"}
    accuracy = {name: f"{model.correct(labels).mean():.1%}" for name, model in models.items()}
    gained = {row: f"{100 * found[row, 'student'].difference:+.1f}" for row in verdicts}
    lost = {row: points.lstrip("-") for row, points in gained.items()}
    bounds_of = {row: interval(found[row, "student"].ci95, 1, signed=True) for row in verdicts}
    low, high = reversed(bounds_of["kd_c"].replace("-", "").split(" to "))
    better = f"A teacher of {accuracy['teacher_d']} brings {gained['kd_d']} points ({bounds_of['kd_d']})"
    assert f"{better}, one of {accuracy['teacher_c']} costs {lost['kd_c']} ({low} to {high})" in README
    helps = f"one of {accuracy['teacher_b']}, trained on just the students' images, still brings {gained['kd_b']}"
    assert f"{helps} ({bounds_of['kd_b']}; one teacher each" in README
    of_better = f"{gained['kd_d']} points with one of {accuracy['teacher_d']}, {gained['kd']} with those of"
    assert f"{of_better} {accuracy['teacher']}. The two poor ones ({accuracy['teacher_a']} and" in ANSWER
    assert f"{accuracy['teacher_c']}) do harm: {lost['kd_a']} and {lost['kd_c']} points" in ANSWER
    less_accurate = f"reaches {accuracy['teacher_b']} where the student alone reaches {accuracy['student']}"
    assert f"{less_accurate}; still it brings {gained['kd_b']} points ({bounds_of['kd_b']})" in ANSWER


def test_what_a_teacher_like_its_student_brings():
    c, kd = compared("controls")["kd_self", "student"], compared()["kd", "student"]
    brought = f"{100 * c.difference:+.1f} points ({interval(c.ci95, 1, signed=True)})"
    assert f"self-distillation, from the student alone, {brought.replace(' points', '')}" in README
    assert f"on the same 5,000 images, brings {brought}: a third of the gain" in ANSWER
    assert c.difference / kd.difference == pytest.approx(1 / 3, abs=0.05)
    assert c.verdict == "better"


def test_what_the_repetition_of_24_models_changed():
    (models, labels), (replaced, _) = archive.load("ablation"), archive.load("ablation", "replaced")
    assert [len(model.logits) for model in replaced.values()] == 8 * [3]
    first = {name: m._replace(logits={**models[name].logits, **m.logits}) for name, m in replaced.items()}

    def gain(kept, seeds=None):
        kd, student = (kept[name].correct(labels, seeds).mean() for name in ("kd", "student"))
        return f"{100 * (kd - student):+.1f}"

    three = f"was {gain(replaced)} points there and is {gain(models, (0, 1, 2))} here"
    assert f"the gain of `kd` {three}; in all five, {gain(first)} became {gain(models)}" in ANSWER
    kd_2x = models["kd_2x"]._replace(logits={seed: models["kd_2x"].logits[seed] for seed in (2, 3, 4)})  # all that ran
    found = answer.compared("ablation", models | first | {"kd_2x": kd_2x}, labels)
    p = {(c.model, c.baseline): p for c, p in zip(found, holm([c.t_test_p for c in found]), strict=True)}
    lr, alpha = (f"{p[pair]:.2g}" for pair in (("student_lr", "student"), ("kd_alpha_90", "kd")))
    assert lr == alpha
    assert f"had been undecided (both p = {lr} after Holm's correction, by the t-test over seeds)" in ANSWER


def test_the_faults_of_evaluation_are_those_that_were_measured():
    assert answer.faults() in (ROOT / "docs/answer.md").read_text(encoding="utf-8")
    measured = recorded("docs/data/evaluation_faults.json")["models"].values()
    each = f"({len(measured)} checkpoints, {len(next(iter(measured))['both'])} evaluations each)"
    for fault, sentence in (
        ("training mode", f"{{:+.1f}} points on average, from {{:+.1f}} to {{:+.1f}} {each}"),
        ("flips", "{:+.1f} points on average, from {:+.1f} to {:+.1f} (same checkpoints)"),
    ):
        moved = [100 * (accuracy - model["none"][0]) for model in measured for accuracy in model[fault]]
        assert sentence.format(np.mean(moved), min(moved), max(moved)) in README
    varied = 100 * np.sqrt(np.mean([np.var(model["both"], ddof=1) for model in measured]))  # within a checkpoint
    for text in (README, ANSWER):
        assert f"evaluations of one checkpoint have a standard deviation of {varied:.1f} points" in text


def test_the_readmes_numbers_of_other_studies():
    rows = " ".join(answer.nearest_study().split())
    assert "| resnet18 | resnet50 | logit | +0.06 | -0.06 to +0.17 | 0.23 | 1.00 |" in rows
    assert "from a ResNet50 to a ResNet18 +0.06 points (-0.06 to +0.17, five seeds)" in README
    assert all(float(line.split("|")[-2]) > 0.05 for line in answer.nearest_study().splitlines()[2:])


def test_the_readmes_speeds_are_those_of_the_page_on_speed():
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    plain = re.search(r"\| ResNet18 training \| ([\d.]+)", page)[1]
    original, ours = re.search(r"\| distilled ResNet18, .*? \| ([\d.]+) \(\d+\) \| ([\d.]+)", page).groups()
    ours_plain = re.search(r"\| ResNet18 training \| [\d.]+ \(\d+\) \| ([\d.]+)", page)[1]
    assert f"{original} images/s ({plain} without the teacher)" in README
    assert f"its mirror image: {ours} images/s ({ours_plain} without the teacher;" in README


def test_the_hours_of_the_whole_experiment_follow_from_the_speeds():
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    rate = {
        what: float(re.search(rf"\| {what}[^|]*\| [\d.]+ \(\d+\) \| ([\d.]+)", page)[1])
        for what in ("distilled", *(f"ResNet{n} {work}" for n in (18, 50) for work in ("training", "evaluation")))
    }
    seconds = 0.0
    for recipe in PRESETS["cifar10"].recipes.values():
        name = {"resnet50": "ResNet50", "resnet18": "ResNet18"}[recipe.arch]
        trains = rate["distilled" if recipe.teacher else f"{name} training"]
        seconds += recipe.epochs * (50_000 / trains + 10_000 / rate[f"{name} evaluation"])
    for text in (README, words("docs/speed.md")):
        assert f"about {seconds / 3600:.0f} hours" in text


def test_what_small_convolutions_save_is_what_was_measured():
    ratios = [
        recorded(f"docs/data/speed-{size}px.json")["variation_over_ours"][
            f"{arch} training, ours with conv2d alone (alternating)"
        ]
        for size in (64, 32)
        for arch in ("ResNet50", "ResNet18")
    ]
    sentence = (
        "{:.2f} (ResNet50) and {:.2f} times (ResNet18) the time at 64 px in bfloat16, and {:.2f} and {:.2f} times at"
    )
    assert sentence.format(*ratios) in words("docs/speed.md")


def test_make_reproduce_trains_the_rows_of_the_readmes_table():
    rows = re.search(r"MAIN_ROWS := (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1].split()
    shown = {name for run, name in answer.SHOWN.values() if run == "ablation"}
    assert set(rows) == {"teacher", *shown}


def recorded(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def percent(accuracy: dict) -> str:
    return f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f}"


def test_the_readmes_numbers_of_the_demo_are_those_of_its_results():
    results = example_results()
    models = {name: model["accuracy"] for name, model in results["models"].items()}
    assert f"One teacher trained on 1,200 digits: {100 * models['teacher']['mean']:.2f}%" in README
    assert f"alone {percent(models['student'])}%, distilled {percent(models['student_kd'])}%" in README
    (comparison,) = results["comparisons"]
    assert verdict(comparison, results["n_test"]) in README
    for file, sentence in (
        ("demo-xeon", "{:+.2f}, p = {:.2g}, on that Xeon"),
        ("demo-conv2d", "{:+.2f}, p = {:.2g}, and, on an AMD EPYC"),
        ("demo-amd", "{:+.2f}, p = {:.2g}: indistinguishable."),
    ):
        (earlier,) = recorded(f"docs/data/{file}.json")["comparisons"]
        assert sentence.format(100 * earlier["difference"], earlier["p_value"]) in README
        assert earlier["verdict"] == ("indistinguishable" if file == "demo-amd" else "better")


def test_the_readmes_arithmetic_on_the_original():
    least = f"{100 * detectable_difference(400 / 10_000, 10_000):.2f}"
    assert f"with 400 such images, one seed detects {least} points with 80% power" in README
    assert mcnemar_p(5, 15) < 0.05 < mcnemar_p(6, 16)
    assert "is significant only if at most 20 of the 10,000 images are right in just one of the models" in README


def test_the_answer_holds_the_table_of_the_nearest_study():
    assert answer.nearest_study() in (ROOT / "docs/answer.md").read_text(encoding="utf-8")


def test_the_table_of_the_nearest_study_is_that_of_scipy():
    with open(ROOT / "docs/data/kd-capacity-gap.csv") as file:
        runs = sorted(csv.DictReader(file), key=lambda run: run["seed"])
    assert len(runs) == 50
    of_setting = [(run["student"], run["teacher"], run["method"]) for run in runs]
    taught, alone = (
        [float(run["test_accuracy_best_validation"]) for run, found in zip(runs, of_setting, strict=True) if found == s]
        for s in (("resnet34", "resnet50", "feature"), ("resnet34", "", "none"))
    )
    p = stats.ttest_rel(taught, alone).pvalue
    row = f"| resnet34 | resnet50 | feature | +0.19 | +0.01 to +0.37 | {p:.2f} |"
    assert row in " ".join(answer.nearest_study().split())


# The kept predictions


@pytest.fixture
def kept_predictions(tmp_path, monkeypatch):
    """The report of two models of `controls`, one of which is also a model of `ablation`."""
    monkeypatch.setattr(archive, "FOLDER", tmp_path / "data")
    random, labels = np.random.default_rng(0), np.arange(20) % 10
    arrays = {
        f"{name}/seed{seed}": random.normal(size=(20, 10)).astype(np.float32)
        for name in ("student", "kd_self")
        for seed in (0, 1)
    }
    validation = {"validation/labels": labels, "validation/student/seed0": arrays["student/seed0"]}
    write_report(tmp_path, labels, arrays | validation)
    return tmp_path, arrays, labels


def test_a_run_shares_the_models_that_it_has_in_common_with_ablation(kept_predictions):
    path, arrays, labels = kept_predictions
    written = archive.keep("controls", path)
    assert sorted(str(p.relative_to(archive.FOLDER)) for p in written) == [
        "controls/seed0.npz",
        "controls/seed1.npz",
    ]
    assert archive.keep("controls", path) == []
    archive.keep("ablation", path)
    models, loaded = archive.load("controls")
    assert list(models) == ["student", "kd_self"]
    assert np.array_equal(loaded, labels)
    for name, model in models.items():
        assert model.recipe == PRESETS["controls"].recipes[name]
        assert all(np.array_equal(model.predictions[s], arrays[f"{name}/seed{s}"].argmax(1)) for s in (0, 1))


def test_views_has_models_of_its_own(kept_predictions):
    archive.keep("ablation", kept_predictions[0])
    assert archive.load("views")[0] == {}


def test_a_model_that_is_kept_stays_when_others_are_added(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FOLDER", tmp_path / "data")
    labels = np.arange(20) % 10

    def keep(**classes):
        logits = {key.replace("_seed", "/seed"): np.eye(10)[c] for key, c in classes.items()}
        write_report(tmp_path, labels, logits)
        return [path.name for path in archive.keep("finetuning", tmp_path)]

    def files(seed):
        return [(tmp_path / f"data/finetuning/seed{seed}.{suffix}").read_bytes() for suffix in ("npz", "json")]

    assert keep(student_seed1=labels) == ["seed1.npz"]
    before = files(1)
    assert keep(student_seed1=9 - labels, student_seed2=labels) == ["seed2.npz"]
    assert files(1) == before
    kept = json.loads(before[1])
    assert keep(student_seed1=9 - labels, kd_seed1=9 - labels) == ["seed1.npz"]
    models, _ = archive.load("finetuning")
    assert {name: list(model.logits) for name, model in models.items()} == {"student": [1, 2], "kd": [1]}
    assert (models["student"].predictions[1] == labels).all()
    assert (models["kd"].predictions[1] == 9 - labels).all()
    environment = {"device": "the machine of seed 1"}
    kd = {"environment": environment, "history": [{"epoch": 1, "loss": 9.0}]}
    assert json.loads(files(1)[1]) == {**kept, "kd": kd}


def test_what_is_kept_of_a_model_is_in_every_report():
    model = recorded("docs/example/results.json")["models"]["student"]
    assert model["history"].keys() == model["environments"].keys() == model["accuracy"]["seeds"].keys()


def test_models_of_other_test_images_are_not_kept_beside_each_other(kept_predictions):
    path, arrays, labels = kept_predictions
    archive.keep("ablation", path)
    write_report(path, labels[::-1], arrays)
    with pytest.raises(UserError, match="other test images"):
        archive.keep("ablation", path)


def test_both_ends_of_a_tie_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FOLDER", tmp_path / "data")
    logits = np.random.default_rng(0).integers(0, 4, (200, 10)).astype(np.float32)
    write_report(tmp_path, np.arange(200) % 10, {"student/seed0": logits})
    archive.keep("ablation", tmp_path)
    models, labels = archive.load("ablation")
    highest = [[c for c in range(10) if row[c] == max(row)] for row in logits]
    assert models["student"].predictions[0].tolist() == [classes[0] for classes in highest]
    reverse, _ = ties_to_the_last_class(models, labels)
    assert (9 - reverse["student"].predictions[0]).tolist() == [classes[-1] for classes in highest]
    assert count_ties(models["student"]) == sum(len(classes) > 1 for classes in highest)
