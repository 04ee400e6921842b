"""The study: its presets, the comparison of a repetition with it, and the numbers that the documents state."""

import json

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from config import PRESETS
from experiments import answer, archive
from experiments import compare as compare_module
from experiments.compare import compare, p_value, published
from experiments.presets import STUDY
from report.comparisons import differing_settings
from report.markdown import summary
from report.metrics import Evaluated
from report.statistics import detectable_difference, mcnemar_p
from tests.capacity_gap import accuracies, table


def entry(values) -> dict:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "seeds": dict(enumerate(values))}


def results(**models) -> dict:
    return {"n_test": 10_000, "models": {name: {"accuracy": entry(values)} for name, values in models.items()}}


def test_a_repetition_is_compared_by_welchs_test_if_seeds_vary_more_than_images():
    first, second = [0.60, 0.63, 0.62, 0.64], [0.65, 0.68, 0.64, 0.67]
    p = p_value(entry(first), entry(second), 10**9)
    difference = np.mean(second) - np.mean(first)
    error = np.sqrt(np.var(first, ddof=1) / 4 + np.var(second, ddof=1) / 4)
    assert p == pytest.approx(2 * stats.t.sf(difference / error, 3))


def test_a_repetition_with_one_seed_allows_for_the_sampling_of_images():
    assert p_value(entry([0.9]), entry([0.903]), 10_000) > 0.5
    assert p_value(entry([0.9, 0.9, 0.9]), entry([0.7, 0.7, 0.7]), 10_000) < 0.01


def test_models_of_only_one_side_are_left_out():
    found = compare(results(a=[0.5, 0.6], b=[0.7]), results(a=[0.5, 0.6], c=[0.7]))
    assert [line.split()[0] for line, _ in found] == ["a"]
    assert found[0][1] == pytest.approx(1.0)


def test_what_is_published_is_what_was_kept(predictions):
    path, arrays, labels = predictions
    archive.keep("ablation", path)
    (name, model), *others = published()["models"].items()
    assert (name, others, published()["n_test"]) == ("student", [], 20)
    each = [(arrays[f"student/seed{seed}"].argmax(1) == labels).mean() for seed in (0, 1)]
    assert model["accuracy"].pop("seeds") == pytest.approx(dict(zip("01", each, strict=True)))
    assert model["accuracy"] == pytest.approx({"mean": np.mean(each), "std": np.std(each, ddof=1)})


@pytest.mark.parametrize(("other", "status"), [([0.6, 0.61, 0.62], 0), ([0.1, 0.11, 0.12], 1)])
def test_the_comparison_as_a_program(tmp_path, monkeypatch, capsys, other, status):
    (tmp_path / "repeated.json").write_text(json.dumps(results(student=other)))
    monkeypatch.setattr(compare_module, "published", lambda: results(student=[0.6, 0.61, 0.62]))
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "repeated.json")])
    with pytest.raises(SystemExit) as ended:
        compare_module.main()
    assert ended.value.code == status
    assert ("differs" in capsys.readouterr().out) == bool(status)


def test_a_comparison_of_missing_files_is_one_error(script, tmp_path):
    done = script("-m", "experiments.compare", tmp_path / "missing.json")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


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
    arrays = {"labels": labels}
    for name, accuracy in (("teacher", 0.8), ("student", 0.5), ("kd", 0.6)):
        for seed in range(3):
            right = correct[name, seed] = random.random(1000) < accuracy
            arrays[f"{name}/seed{seed}"] = np.eye(10, dtype=np.float32)[np.where(right, labels, (labels + 1) % 10)]
    np.savez(tmp_path / "predictions.npz", **arrays)
    archive.keep("ablation", tmp_path / "predictions.npz")
    return correct


def test_the_tables_state_what_scipy_finds(kept):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in answer.table("ablation").splitlines()]
    rows = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    taught, alone = (np.array([100 * kept[name, seed].mean() for seed in range(3)]) for name in ("kd", "student"))
    assert list(rows) == ["`teacher`", "`student`", "`kd`"]
    assert rows["`kd`"]["accuracy (%)"] == f"{taught.mean():.2f} ± {taught.std(ddof=1):.2f}"
    assert rows["`kd`"]["against"] == "`student`"
    assert rows["`kd`"]["difference"] == f"{(taught - alone).mean():+.2f}"
    assert rows["`kd`"]["p"] == f"{stats.ttest_rel(taught, alone).pvalue:.2g}"
    assert rows["`student`"]["against"] == ""


def test_a_model_is_compared_with_each_of_its_baselines_in_one_family(kept):
    models, labels = archive.load("ablation")
    models["kd_without_t2"] = Evaluated(STUDY["ablation"].recipes["kd_without_t2"], models["teacher"].logits, {})
    found = answer.compared("ablation", models, labels)
    assert [(c["model"], c["baseline"]) for c in found] == [
        ("kd", "student"),
        ("kd_without_t2", "kd"),
        ("kd_without_t2", "student"),
    ]
    first, second, third = sorted(found, key=lambda c: c["p_value"])
    assert first["p_holm"] == pytest.approx(3 * first["p_value"])
    assert third["p_holm"] == pytest.approx(max(third["p_value"], 2 * second["p_value"], 3 * first["p_value"]))


def test_the_figure_shows_each_kept_row_and_its_seeds(kept):
    (axes,) = answer.figure().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["distilled with T²", "student alone"]
    shown = sorted(x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata())
    assert shown == pytest.approx(sorted(100 * kept[name, s].mean() for name in ("kd", "student") for s in range(3)))


# The numbers in the documents


@pytest.mark.parametrize("run", STUDY)
def test_the_documented_tables_are_those_of_the_kept_logits(run):
    models, _ = archive.load(run)
    if any(archive.owner(run, name) == run for name in models):
        assert answer.table(run) in (ROOT / "docs/answer.md").read_text()


README = " ".join((ROOT / "README.md").read_text().replace("\n> ", "\n").split())


def recorded(path: str) -> dict:
    return json.loads((ROOT / path).read_text())


def percent(accuracy: dict) -> str:
    return f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f}"


def test_the_readmes_numbers_of_the_demo_are_those_of_its_results():
    results = recorded("docs/data/demo.json")
    models = {name: model["accuracy"] for name, model in results["models"].items()}
    assert f"One teacher, {100 * models['teacher']['mean']:.2f}%" in README
    assert f"alone {percent(models['student'])} and taught {percent(models['student_kd'])}%" in README
    assert summary(results).splitlines()[-1] in README


def test_the_readmes_numbers_of_the_run_on_photographs_are_those_of_its_results():
    results = recorded("imgs/cifar10-jpeg/results.json")
    teacher, alone, taught = (percent(m["accuracy"]) for m in results["models"].values())
    assert f"teacher {teacher}%, student alone {alone}%, taught {taught}%" in README
    (comparison,) = results["comparisons"]
    assert f"over seeds that is p = {comparison['p_value']:.2f}" in README
    before, after = (results["models"][name]["expected_calibration_error"] for name in ("student", "student_kd"))
    assert f"falls from {100 * before:.1f} to {100 * after:.1f} points" in README
    scaled = results["models"]["student"]["temperature_scaled"]["expected_calibration_error"]
    assert f"a single number, achieves {100 * scaled:.1f}" in README


def test_the_readmes_arithmetic_on_the_original():
    assert f"about {0.75 / 25 / (0.25 + 0.75 / 25):.0%} of the gradient where its weight suggests 75%" in README
    assert f"one seed detects about {100 * detectable_difference(400 / 10_000, 10_000):.2f} points" in README
    assert mcnemar_p(5, 15) < 0.05 < mcnemar_p(6, 16)
    assert "significant only if at most 20 images" in README


def test_the_answer_holds_the_table_of_the_nearest_study():
    assert table() in (ROOT / "docs/answer.md").read_text()


def test_the_table_of_the_nearest_study_is_that_of_scipy():
    found = accuracies("test_accuracy_best_validation")
    assert sum(map(len, found.values())) == 50
    first, alone = found["resnet34", "resnet50", "feature"], found["resnet34", "", "none"]
    p = stats.ttest_rel(first, alone).pvalue
    assert f"| resnet34 | resnet50 | feature | +0.19 | +0.01 to +0.37 | {p:.2f} |" in table()


# The kept logits


@pytest.fixture
def predictions(tmp_path, monkeypatch):
    """predictions.npz of two models of `controls`, one of which is also a model of `ablation`."""
    monkeypatch.setattr(archive, "FOLDER", tmp_path / "data")
    random, labels = np.random.default_rng(0), np.arange(20) % 10
    arrays = {
        f"{name}/seed{seed}": random.normal(size=(20, 10)).astype(np.float32)
        for name in ("student", "kd_self")
        for seed in (0, 1)
    }
    validation = {"validation/labels": labels, "validation/student/seed0": arrays["student/seed0"]}
    np.savez(tmp_path / "predictions.npz", labels=labels, **arrays, **validation)
    return tmp_path / "predictions.npz", arrays, labels


def test_a_run_shares_the_models_that_it_has_in_common_with_ablation(predictions):
    path, arrays, labels = predictions
    written = archive.keep("controls", path)
    assert sorted(str(p.relative_to(archive.FOLDER)) for p in written) == [
        "controls/seed0/kd_self.npz",
        "controls/seed1/kd_self.npz",
    ]
    assert archive.keep("controls", path) == []
    archive.keep("ablation", path)
    models, loaded = archive.load("controls")
    assert list(models) == ["student", "kd_self"]
    assert np.array_equal(loaded, labels)
    for name, model in models.items():
        assert model.recipe == PRESETS["controls"].recipes[name]
        assert all(np.array_equal(model.logits[seed], arrays[f"{name}/seed{seed}"]) for seed in (0, 1))


def test_views_has_models_of_its_own(predictions):
    archive.keep("ablation", predictions[0])
    assert archive.load("views")[0] == {}
