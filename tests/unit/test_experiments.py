"""The study: its presets, the comparison of a reproduction with it, and the generated tables of the documents."""

import csv
import json
import math
import re

import numpy as np
import pytest
import sklearn.metrics
from conftest import ROOT
from scipy import stats

from config import ALL_PRESETS as PRESETS
from engine.errors import UserError
from experiments import answer, archive, compare
from experiments.compare import p_value, published
from experiments.presets import STUDY
from report.comparisons import differing_settings
from report.metrics import Evaluated, count_ties
from report.statistics import image_variance, paired_p


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
    accuracies, n = published("ablation")
    assert (list(accuracies), n) == (["student"], 20)
    each = [(arrays[f"student/seed{seed}"].argmax(1) == labels).mean() for seed in (0, 1)]
    assert accuracies["student"].tolist() == pytest.approx(each)


@pytest.mark.parametrize(("other", "status"), [([0.6, 0.61, 0.62], 0), ([0.1, 0.11, 0.12], 1)])
def test_the_comparison_as_a_program(tmp_path, monkeypatch, capsys, other, status):
    (tmp_path / "reproduced.json").write_text(json.dumps(results(student=other, only_here=[0.5])))
    here = {"student": np.array([0.6, 0.61, 0.62]), "only_published": np.array([0.5])}
    monkeypatch.setattr(compare, "published", lambda preset: (here, 10_000))
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "reproduced.json")])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == status
    _, row, _ = capsys.readouterr().out.splitlines()
    assert row.split()[0] == "student"
    assert row.endswith("differs") == bool(status)


def test_a_preset_that_is_not_published_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results(student=[0.5])))
    for preset in ("cifar10", "finetunin"):
        monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "results.json"), preset])
        with pytest.raises(SystemExit) as ended:
            compare.main()
        assert ended.value.code == 2
        assert "finetuning" in capsys.readouterr().err


def test_two_perfect_models_have_the_same_mean_and_a_perfect_and_a_useless_one_have_not():
    assert p_value(np.ones(3), np.ones(2), 500) == 1
    assert p_value(np.ones(3), np.zeros(2), 500) == 0


@pytest.mark.parametrize(
    "content", [None, "{", "{}", "[]", *(json.dumps(results(student=[wrong])) for wrong in ("abc", 5.0, None))]
)
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
            assert len(differing) == 1 + (name == "kd_unscaled_lr_3_6x"), name


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


def study() -> answer.Study:
    return {run: archive.load_correct(run) for run in STUDY}


def test_the_tables_state_what_scipy_finds(kept):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in answer.table("ablation", study()).splitlines()]
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
    kept_models = study()
    correct, _ = kept_models["ablation"]
    correct["kd_unscaled"] = correct["teacher"]
    found = [p for p in answer.compare(kept_models) if p.run == "ablation"]
    assert [(p.model, p.baseline) for p in found] == [
        ("kd", "student"),
        ("kd_unscaled", "kd"),
        ("kd_unscaled", "student"),
    ]

    def planned(run: str) -> int:  # including what has not been run
        own = sum(bool(r.teacher or r.baseline) for r in STUDY[run].recipes.values())
        return own + len(answer.FURTHER.get(run, []))

    order = sorted(found, key=lambda p: p.p_value)
    steps = [min(1.0, (planned("ablation") - place) * p.p_value) for place, p in enumerate(order)]
    assert [p.p_holm for p in order] == pytest.approx(np.maximum.accumulate(steps))
    whole = answer.compare({"ablation": kept_models["ablation"], "methods": kept_models["methods"]})
    smallest = min(whole, key=lambda p: p.p_value)
    both = planned("ablation") + planned("methods")
    assert smallest.p_study == pytest.approx(min(1.0, both * smallest.p_value))


def test_a_seed_that_was_trained_twice_counts_with_the_mean_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FOLDER", tmp_path)
    labels = np.arange(100) % 10
    write_report(tmp_path, labels, {"student/seed0": np.eye(10)[labels], "student/seed1": np.eye(10)[labels]})
    archive.keep("ablation", tmp_path)
    wrong = np.where(np.arange(100) < 40, (labels + 1) % 10, labels)
    (tmp_path / "ablation/replaced").mkdir()
    np.savez(tmp_path / "ablation/replaced/seed0.npz", labels=labels, student=np.stack([wrong, wrong]))
    for run in ("ablation", "controls"):
        correct, _ = archive.load_correct(run)
        assert correct["student"][0].tolist() == [0.5] * 40 + [1.0] * 60
        assert correct["student"][1].tolist() == [1.0] * 100
    assert archive.load_correct("ablation", replaced=False)[0]["student"][0].tolist() == [1.0] * 100


def test_the_figures_show_each_kept_row_and_its_seeds(kept):
    (axes,) = answer.figure(study()).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["distilled with T²"]
    shown = sorted(x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata())
    gains = [100 * (kept["kd", s].mean() - kept["student", s].mean()) for s in range(3)]
    assert shown == pytest.approx(sorted(gains))
    teacher, alone = (np.mean([kept[name, s].mean() for s in range(3)]) for name in ("teacher", "student"))
    gap, comparison = answer.gaps(study())["ablation", "kd"]
    assert (gap, 100 * comparison.difference) == pytest.approx((100 * (teacher - alone), np.mean(gains)))


def right_images(net: list[int], changed: int = 600) -> dict[int, np.ndarray]:
    """Seeds from 1 on: 6,000 of 10,000 images right and so many more, after `changed` of each kind have changed."""
    found = {}
    for seed, more in enumerate(net, start=1):
        random, right = np.random.default_rng(seed), np.arange(10_000) < 6_000
        lost = random.choice(6_000, changed, replace=False)
        won = 6_000 + random.choice(4_000, changed + more, replace=False)
        right[lost], right[won] = False, True
        found[seed] = right.astype(float)
    return found


def test_the_verdicts_of_finetuning_follow_its_rules(monkeypatch):
    correct = {
        "student": right_images([0] * 6, changed=0),
        "kd": right_images([5, -5, 10, -10, 3, -3]),
        "kd_unscaled": right_images([-300, -310, -290, -300, -305, -295]),
        "kd_unscaled_lr_3_6x": right_images([300, -300, 200, -200, 400, -400]),
        "kd_lr_0_001": right_images([40, 50]),
    }
    monkeypatch.setattr(answer, "load_correct", lambda run: (correct, np.zeros(10_000)))
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in answer.finetuning({}).splitlines()[2:]]
    found = {(row[0], row[1]): row for row in rows}
    assert {key: row[-1] for key, row in found.items()} == {
        ("kd_unscaled", "kd"): "worse",
        ("kd", "student"): "no difference that matters",
        ("kd_unscaled", "student"): "worse",
        ("kd_unscaled_lr_3_6x", "kd"): "undecided",
        ("kd_unscaled_lr_3_6x", "student"): "undecided",
    }
    smallest = min(rows, key=lambda row: float(row[5]))
    assert float(smallest[6]) == pytest.approx(9 * float(smallest[5]), rel=0.1)  # of nine planned comparisons
    first, second = (np.stack([correct[name][seed] for seed in (1, 2, 3)]) for name in ("kd_unscaled_lr_3_6x", "kd"))
    of_seeds = stats.t.ppf(0.975, 5) * stats.sem(first.mean(1) - second.mean(1)) * math.sqrt(3 / 6)
    half = math.hypot(of_seeds, stats.norm.ppf(0.975) * math.sqrt(image_variance(first, second)[1]))
    assert answer.margin(correct, "kd_unscaled_lr_3_6x", "kd", 6) == pytest.approx(1.65 * half)
    assert answer.margin(correct, "kd_lr_0_001", "student", 3) is None  # two seeds
    del correct["kd"][3]
    assert "kd" not in answer.finetuning({}) + answer.finetuning_rows({})  # no difference before there is a margin


def test_the_pairs_of_finetuning_are_rows_of_its_preset_and_of_its_predictions():
    rows = re.findall(r"^\| \d \| `(\w+)` \| `(\w+)` \|", (ROOT / "docs/finetuning.md").read_text(), re.MULTILINE)
    assert list(answer.FINETUNING) == rows
    assert set(sum(rows, ())) <= set(PRESETS["finetuning"].recipes)


# The documents


@pytest.mark.parametrize("page", answer.PAGES, ids=str)
def test_the_marked_tables_are_those_of_the_kept_predictions(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert answer.with_tables(text, study()) == text


def test_the_accuracy_by_class_is_that_of_scikit_learn():
    models, labels = archive.load("ablation")
    again, _ = archive.load("ablation", "replaced")
    rows = [line.split("|")[1:-1] for line in answer.per_class(study()).splitlines()[2:-1]]
    found = np.array([[float(cell) for cell in row[1:]] for row in rows])

    def recall(predictions: np.ndarray) -> np.ndarray:
        return sklearn.metrics.recall_score(labels, predictions, average=None)

    for column, name in enumerate(("teacher", "student", "kd")):
        by_seed = [
            np.mean([recall(run[name].predictions[s]) for run in (models, again) if s in run[name].predictions], 0)
            for s in range(5)
        ]
        np.testing.assert_allclose(found[:, column], 100 * np.mean(by_seed, 0), atol=0.051)


def ties_to_the_last_class(models: dict[str, Evaluated], labels: np.ndarray) -> tuple[dict[str, Evaluated], np.ndarray]:
    """The models and labels with the classes in reverse order, so that argmax breaks ties the other way."""
    reverse = {
        name: model._replace(logits={seed: logits[:, ::-1] for seed, logits in model.logits.items()})
        for name, model in models.items()
    }
    return reverse, 9 - labels


def test_the_order_of_the_classes_decides_one_verdict(monkeypatch):
    found, load = answer.compare(study()), archive.load
    monkeypatch.setattr(archive, "load", lambda *run: ties_to_the_last_class(*load(*run)))
    reverse = answer.compare(study())
    differing = [p for p, other in zip(found, reverse, strict=True) if p.verdict != other.verdict]
    assert [(p.model, p.baseline) for p in differing] == [("kd_alpha_0_9", "kd")]  # docs/answer.md says so


def test_make_reproduce_trains_the_rows_of_the_readmes_table():
    rows = re.search(r"MAIN_ROWS := (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1].split()
    shown = {row for run, *of_both in answer.GAINS.values() if run == "ablation" for row in of_both}
    assert set(rows) == {"teacher", *shown}


def recorded(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


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
    assert row in " ".join(answer.nearest_study({}).split())


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
