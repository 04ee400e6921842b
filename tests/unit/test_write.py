import csv
import json
import math
import os
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from conftest import ROOT, flags
from synthetic import example_results, probabilities_of

import custom_resnet
import evaluate
from config import parse
from engine import checkpoints
from engine.datasets import load_dataset
from engine.device import resolve_device
from engine.settings import Model
from report import figures
from report.markdown import align_tables, escape_markdown, notes, results_markdown, summary, verdict, verdicts
from report.metrics import fit_temperature
from report.statistics import wilson_interval
from report.write import as_csv

HOSTILE = ("a|b", "two\nlines", "$\\frac{", "plain")


def table(header, rows):
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return align_tables("".join("| " + " | ".join(escape_markdown(cell) for cell in line) + " |\n" for line in lines))


@pytest.mark.chaos
def test_a_users_settings_of_matplotlib_change_no_figure(report):
    """The fixture has some, such as LaTeX, which need not be there."""
    arrays, classes = np.load(report / "predictions.npz"), tuple("0123456789")
    predictions = [arrays[f"teacher/seed{seed}"].argmax(1) for seed in (0, 1)]
    counts = sum(sklearn.metrics.confusion_matrix(arrays["labels"], found, labels=range(10)) for found in predictions)
    figure = figures.confusion_figure(counts, classes, "teacher, timm:test_resnet, sum of 2 seeds")
    assert (report / "teacher/confusion_matrix.png").read_bytes() == figures.png(figure)


def test_the_report_writes_every_file(report):
    files = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    of_models = ("confusion_matrix.png", "classification_report.png", "classification_report.txt")
    of_comparisons = ("class_differences.png", "confusion_difference.png", "disagreements.png")
    assert files == {
        *(f"{model}/{file}" for model in ("teacher", "student", "student_kd") for file in of_models),
        *(f"student_kd/{file}" for file in of_comparisons),
        *("accuracy.png", "training_curves.png", "reliability.png", "results.md", "results.json", "predictions.npz"),
        *("history.csv", "predictions.csv"),
    }


def test_the_tables_in_csv_hold_what_the_other_files_do(report):
    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
    with open(report / "history.csv", newline="", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    found = {(row["model"], row["seed"], int(row["epoch"])): row for row in epochs}
    assert len(found) == len(epochs)
    columns = "model,seed,epoch,loss,train_accuracy,validation_accuracy,test_accuracy,soft_share,seconds"
    assert list(epochs[0]) == columns.split(",")
    for name, model in results["models"].items():
        for seed, history in model["history"].items():
            for record in history:
                row = found.pop((name, seed, record["epoch"]))
                assert {key: float(row[key]) for key in row if key in record} == record
                assert not any(row[key] for key in row if key not in record and key not in ("model", "seed"))
    assert not found
    with open(report / "predictions.csv", newline="", encoding="utf-8") as file:
        images = list(csv.DictReader(file))
    with np.load(report / "predictions.npz") as arrays:
        labels, logits = arrays["labels"], {key: arrays[key] for key in arrays if "/" in key}
    classes = results["classes"]
    assert sorted(int(row["image"]) for row in images) == list(range(len(labels)))
    wrong = []
    for row in images:
        image = int(row["image"])
        assert row["label"] == classes[labels[image]]
        for key, z in logits.items():
            p = scipy.special.softmax(z[image].astype(float))
            assert row[key] == classes[p.argmax()]
            assert float(row[f"{key}/probability"]) == pytest.approx(p.max(), abs=1e-4)
        wrong.append(sum(row[key] != row["label"] for key in logits))
    assert wrong == sorted(wrong, reverse=True)


def test_figures_are_written_as_pdf_if_asked_for(trained, tmp_path):
    evaluate.main(flags(trained, "--imgs_path", str(tmp_path), "--figures", "pdf"))
    folder = tmp_path / "demo"
    drawn = {path.relative_to(folder).with_suffix("") for path in folder.rglob("*.png")}
    assert drawn == {path.relative_to(folder).with_suffix("") for path in folder.rglob("*.pdf")}
    evaluate.main(flags(trained, "--imgs_path", str(tmp_path)))
    assert not list(folder.rglob("*.pdf"))


def test_every_number_can_be_recomputed_from_the_predictions(report):
    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
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
        probabilities = [probabilities_of(arrays[f"{model}/seed{seed}"]) for seed in (0, 1)]
        losses = [sklearn.metrics.log_loss(labels, p, labels=range(10)) for p in probabilities]
        assert entry["negative_log_likelihood"] == pytest.approx(np.mean(losses), rel=1e-6)
        scores = [((p - np.eye(10)[labels]) ** 2).sum(1).mean() for p in probabilities]
        assert entry["brier_score"] == pytest.approx(np.mean(scores), rel=1e-6)
        assert entry["temperature_scaled"] is None
        pair, counts = entry["most_confused"][0], np.array(entry["confusion_matrix"])
        assert pair["count"] == (counts - np.diag(np.diag(counts))).max()
        assert pair["count"] == counts[int(pair["true"]), int(pair["predicted"])]
        text = (report / model / "classification_report.txt").read_text(encoding="utf-8")
        reports = [
            sklearn.metrics.classification_report(labels, p, digits=4, zero_division=0) for p in predictions[model]
        ]
        assert text == f"seed 0\n{reports[0]}\nseed 1\n{reports[1]}"  # each image counts once
    (comparison,) = results["comparisons"]
    assert (comparison["model"], comparison["baseline"]) == ("student_kd", "student")
    assert comparison["environments_differ"] == []
    right = {model: np.array([p == labels for p in predictions[model]]) for model in models}
    difference = right["student_kd"].mean(1) - right["student"].mean(1)
    assert comparison["difference"] == pytest.approx(difference.mean())
    assert comparison["t_test_p"] == pytest.approx(scipy.stats.ttest_1samp(difference, 0).pvalue)
    t, low, high = scipy.stats.t(1), *comparison["ci95"]
    over_seeds, half = scipy.stats.sem(difference), (high - low) / 2
    images = math.sqrt(half**2 - (t.isf(0.025) * over_seeds) ** 2) / scipy.stats.norm.isf(0.025)
    tail = comparison["p_value"] / 2  # the interval of this confidence touches 0
    touching = math.hypot(t.isf(tail) * over_seeds, scipy.stats.norm.isf(tail) * images)
    assert touching == pytest.approx(abs(low + high) / 2)
    first = Counter(zip(right["student_kd"][0].tolist(), right["student"][0].tolist(), strict=True))
    b, c = first[True, False], first[False, True]
    assert comparison["mcnemar_p"]["0"] == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue)
    for name, entry in comparison["per_class"].items():
        of_class = labels == int(name)
        by_class = right["student_kd"][:, of_class].mean() - right["student"][:, of_class].mean()
        assert entry["difference"] == pytest.approx(by_class)
    predicted = np.array([predictions[model][0] for model in comparison["disagreements"]["models"]])
    assert comparison["disagreements"]["count"] == (predicted != predicted[0]).any(0).sum()
    assert (predicted != predicted[0]).any(0)[comparison["disagreements"]["shown"]].all()
    distilled, alone = results["fidelity"]
    for row in (distilled, alone):
        agreement = [(predictions["teacher"][s] == predictions[row["model"]][s]).mean() for s in (0, 1)]
        assert row["agreement"] == pytest.approx(np.mean(agreement))


def test_cost_and_soft_targets_agree_with_the_files(report, trained):
    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
    for name, model in results["models"].items():
        path = trained / f"checkpoints/demo/seed0/{name}.pt"
        parameters = [t for key, t in checkpoints.load_checkpoint(path)["model"].items() if "running" not in key]
        parameters = sum(t.numel() for t in parameters if t.is_floating_point())
        assert (model["cost"]["parameters"], model["cost"]["bytes_on_disk"]) == (parameters, path.stat().st_size)
    (row,) = results["soft_targets"]
    assert (row["model"], row["teacher"], row["images"], row["seeds"]) == ("student_kd", "teacher", 100, [0, 1])
    entropies = []
    for seed in (0, 1):
        logits = checkpoints.load_checkpoint(trained / f"checkpoints/demo/seed{seed}/teacher.logits")["logits"][0]
        shown = logits[~logits.isnan().any(1)].numpy()
        assert len(shown) == 100
        entropies.append(scipy.stats.entropy(probabilities_of(shown / row["temperature"]), axis=1).mean())
    assert row["entropy_at_temperature"] == pytest.approx(np.mean(entropies), rel=1e-5)


def small(trained, *more: str):
    config = resolve_device(parse(flags(trained, *more)))
    return config, load_dataset(config)


def test_soft_targets_are_computed_without_matching_stored_logits(trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    config, dataset = small(tmp_path)
    student, teacher = Model("student_kd", 0, config), Model("teacher", 0, config)
    path = teacher.path
    digest = checkpoints.tensors_digest(checkpoints.load_checkpoint(path)["model"])
    read, labels = evaluate.logits_for_student(student, teacher, digest, dataset)
    assert sorted(labels) == sorted(dataset.train.labels[dataset.subset(100)].tolist())
    file = path.with_suffix(".logits")
    state = checkpoints.load_checkpoint(file)
    foreign = {**state, "fingerprint": {**state["fingerprint"], "teacher": "another"}, "logits": state["logits"] + 1}
    for spoil in (lambda: checkpoints.save_checkpoint(file, foreign), lambda: file.write_bytes(b"junk"), file.unlink):
        spoil()
        computed, computed_labels = evaluate.logits_for_student(student, teacher, digest, dataset)
        order, computed_order = np.lexsort((*read.T, labels)), np.lexsort((*computed.T, computed_labels))
        np.testing.assert_allclose(computed[computed_order], read[order], atol=1e-4)
    some, of_some = evaluate.logits_for_student(student, teacher, digest, dataset, most=30)
    assert len(some) == 30
    assert max(Counter(of_some).values()) - min(Counter(of_some).values()) <= 2


def test_with_validation_images_the_report_scales_by_their_temperature(trained, tmp_path, capsys):
    small_run = ["--validation_size", "100", "--only", "student", f"--checkpoints_path={tmp_path}/checkpoints"]
    small_run += [f"--imgs_path={tmp_path}/imgs", "--student.epochs", "1"]
    custom_resnet.main(flags(trained, *small_run))
    evaluate.main(flags(trained, *small_run))
    entry = json.loads((tmp_path / "imgs/demo/results.json").read_text(encoding="utf-8"))["models"]["student"]
    arrays = np.load(tmp_path / "imgs/demo/predictions.npz")
    assert {"validation/labels", "validation/student/seed0"} < set(arrays.files)
    assert arrays["validation/student/seed0"].shape == (100, 10)
    temperature = fit_temperature(arrays["validation/student/seed0"], arrays["validation/labels"])
    scaled = probabilities_of(arrays["student/seed0"] / temperature)
    assert entry["temperature_scaled"]["temperature"] == pytest.approx(temperature)
    expected = sklearn.metrics.log_loss(arrays["labels"], scaled, labels=range(10))
    assert entry["temperature_scaled"]["negative_log_likelihood"] == pytest.approx(expected, rel=1e-6)
    text = (tmp_path / "imgs/demo/results.md").read_text(encoding="utf-8")
    assert "scaled: Brier score" in text
    assert "## Fidelity" not in text
    assert all((tmp_path / "imgs/demo" / path).is_file() for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))


def test_the_example_report_is_what_this_version_writes():
    written = (ROOT / "docs/example/results.md").read_text(encoding="utf-8")
    assert results_markdown(example_results(("teacher", "student", "student_kd", "unscaled"))) == written


@pytest.mark.parametrize(("training_accuracy", "explained"), [(0.99, True), (0.12, False)])
def test_a_model_that_learned_and_predicts_one_class_is_explained(training_accuracy, explained):
    results = example_results()
    model = results["models"]["student"]
    model["only_class"], model["accuracy"]["mean"] = "7", 0.1
    model["history"] = {"0": [{"train_accuracy": training_accuracy}]}
    (warning,) = [note for note in notes(results) if note.startswith("Warning: student predicts 7")]
    assert ("BatchNorm" in warning) == explained


def test_a_report_warns_of_test_images_that_are_training_images():
    results = example_results()
    before = notes(results)
    (warning,) = set(notes({**results, "shared_images": 7})) - set(before)
    assert "7 of 500 test images" in warning


def test_a_teacher_that_is_not_more_accurate_than_the_baseline_is_mentioned():
    results = example_results()
    before = notes(results)
    (row,) = results["versus_teacher"]
    row["accuracy_of_teacher"] = results["models"]["student"]["accuracy"]["mean"]
    assert len(notes(results)) == len(before) + 1
    row["accuracy_of_teacher"] += 0.001
    assert notes(results) == before


SEEDS = [0, 1, 2]
BETTER = {"p_value": 0.01, "p_holm": 0.01}
UNDECIDED = {"p_value": 0.06, "p_holm": 0.06, "detectable_difference": 0.01}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**BETTER, "difference": -0.02}, "is 2.00 percentage points below student "),
        ({**BETTER, "difference": -0.02}, "3 seeds): worse."),
        ({**UNDECIDED, "difference": -0.00004}, "student_kd is as accurate as student (95% interval"),
        (BETTER, "p = 0.01; 3 seeds): better."),
        ({"p_value": 0.01, "p_holm": 0.04}, "p = 0.01, 0.04 after Holm's correction; 3 seeds): better."),
        ({"p_value": 0.01, "p_holm": 0.05}, "p = 0.01, 0.05 after Holm's correction; 3 seeds): indistinguishable."),
        ({**BETTER, "shared_teacher": True}, "3 seeds): better, for this teacher."),
        ({**UNDECIDED, "shared_teacher": True}, "3 seeds): indistinguishable, for this teacher."),
        ({"differs_in": {"alpha": [0.5, 0.25], "nesterov": [True, False]}},
         "Settings that differ: alpha is 0.5, not 0.25, nesterov is true, not false."),
        ({**BETTER, "seeds": [0]}, "1 seed): these two trained models differ."),
        ({**UNDECIDED, "seeds": [0]}, "1 seed): no difference was detected between these two trained models."),
        (UNDECIDED, "these 3 seeds can detect a difference of 1.00 points, "),
        ({**UNDECIDED, "std": 0.001, "ci95": (-0.01, 0.01)}, "limited more by the 500 test images."),
        ({**UNDECIDED, "std": 0.01, "ci95": (-0.026, 0.026)}, "limited more by the number of seeds."),
        ({**UNDECIDED, "seeds": [0]},
         "500 test images can detect a difference of 1.00 points between two trained models."),
    ],
)  # fmt: skip
def test_a_verdict_in_words(changes, said):
    (comparison,) = example_results()["comparisons"]
    plain = {"seeds": SEEDS, "differs_in": {}, "shared_teacher": False, "difference": 0.02}
    assert said in verdict(replace(comparison, **{**plain, **changes}), n_test=500)


def cells(table: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_tables_say_the_number_of_seeds_of_each_column_and_comparison_where_they_differ():
    results = example_results()
    counts = [str(len(model["accuracy"]["seeds"])) for model in results["models"].values()]
    assert cells(summary(results))["seeds"] == counts == ["1", "5", "5"]
    del results["models"]["teacher"]
    assert "seeds" not in cells(summary(results))  # all have five
    results = example_results()
    (comparison,) = results["comparisons"]
    several = [replace(comparison, model=name, seeds=SEEDS[:n]) for name, n in (("a", 1), ("b", 2), ("c", 3))]
    text = results_markdown({**results, "comparisons": several}).split("Effects; p after")[1].split("## Cost")[0]
    assert {name: cells(text)[name][1] for name in "abc"} == {"a": "1", "b": "2", "c": "3"}


def test_a_comparison_with_a_model_that_predicts_one_class_is_marked():
    results = example_results()
    (before,) = verdicts(results)
    results["models"]["student"]["only_class"] = "7"
    assert verdicts(results)[0].removeprefix(before).endswith("see the warning about student.")


def test_the_terminal_warns_of_models_that_predict_one_class_or_have_no_baseline():
    results = example_results()
    results["models"]["student"]["only_class"] = "7"
    results["not_compared"] = {"student_kd": "its baseline student has not been evaluated"}
    assert summary(results).splitlines()[-2:] == [
        "student_kd is not compared: its baseline student has not been evaluated.",
        "Warning: student predicts 7 for every test image, in at least one seed.",
    ]


def test_comparisons_of_models_that_were_trained_differently_are_named_below_the_verdicts():
    results = example_results()
    (comparison,) = results["comparisons"]
    assert summary(results).splitlines()[-1] == verdict(comparison, results["n_test"])
    differ = {"a": ["threads"], "b": [], "c": ["code", "precision"], "d": ["threads"]}
    results["comparisons"] = [replace(comparison, model=m, environments_differ=keys) for m, keys in differ.items()]
    threads, code = summary(results).splitlines()[-2:]
    assert re.search(r"threads.*: a and student, d and student\.", threads)
    assert re.search(r"versions of the code and .*precisions.*: c and student\.", code)
    assert f"- {code}\n" in results_markdown(results)


def test_the_example_report_shows_figures_that_exist():
    text = (ROOT / "docs/example/results.md").read_text(encoding="utf-8")
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert figures
    assert all((ROOT / "docs/example" / path).is_file() for path in figures)


def test_the_report_lists_what_was_left_out_and_says_how_images_became_square():
    results = example_results()
    assert "Images that are not square" not in results_markdown(results)
    results = {**results, "unreadable": ["a/1.png: cannot be read", "b/2.png: cannot be read"]}
    text = results_markdown({**results, "settings": {**results["settings"], "resize": "pad"}})
    assert "\n- a/1.png: cannot be read\n- b/2.png: cannot be read\n" in text
    assert "padded with black" in text


def test_a_shift_is_in_pixels_of_the_stored_images():
    results = example_results()
    results["settings"] |= {"crop_padding": 4, "image_size": 224, "augment": "crop"}
    text = results_markdown({**results, "stored_size": [32, 24]})
    assert re.search("4 pixels at 32 x 24 px, .*crop at 32 x 24 px", text)


def test_without_training_images_the_size_in_which_they_were_shifted_is_not_given():
    results = example_results()
    results["settings"] |= {"crop_padding": 4}
    assert "shifted by up to 4 pixels." in results_markdown({**results, "stored_size": None})


def test_a_report_of_given_logits_alone_has_no_cost():
    results = example_results()
    for model in results["models"].values():
        model["cost"] = None
    assert "multiply-accumulates (million)" not in results_markdown({**results, "versus_teacher": []})


def test_a_file_name_that_is_not_utf_8_is_written_with_escapes():
    lines = as_csv([["image"], [os.fsdecode(b"test/caf\xe9.png")]])
    assert lines == b"image\ntest/caf\\udce9.png\n"


def test_students_of_one_teacher_are_said_to_share_it():
    sentence, results = "but not for that of a teacher that all seeds share.", example_results()
    assert sentence in results_markdown(results)
    results["settings"]["recipes"]["student_kd"]["teacher_seed"] = None
    assert sentence in results_markdown(results)  # a file, used as it is
    results["comparisons"] = [replace(c, shared_teacher=False) for c in results["comparisons"]]
    assert sentence not in results_markdown(results)


def test_the_printed_table_has_a_column_for_each_recipe(trained, tmp_path, capsys):
    evaluate.main(flags(trained, "--only", "student", "teacher", "--imgs_path", str(tmp_path)))
    printed = capsys.readouterr().out.splitlines()
    assert [word.strip() for word in printed[0].strip("|").split("|")] == ["accuracy (%)", "teacher", "student"]
    assert len(printed) == 2 + 10 + 3
    results = json.loads((tmp_path / "demo/results.json").read_text(encoding="utf-8"))
    entry = results["models"]["student"]["accuracy"]
    assert entry["std"] is None
    assert entry["ci95"] == pytest.approx(wilson_interval(round(500 * entry["mean"]), 500))
    assert f"{100 * entry['mean']:.2f}" in printed[-3]
    error = results["models"]["student"]["expected_calibration_error"]
    assert f"{100 * error:.1f}" in printed[-1]


def test_the_markdown_report_shows_figures_that_exist(report):
    text = (report / "results.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert {f"{model}/confusion_matrix.png" for model in ("teacher", "student", "student_kd")} < set(shown)
    assert len(shown) == len(set(shown)) == 4 + 5
    assert all((report / path).is_file() for path in shown)
    assert text.splitlines()[2].startswith("- student_kd is ")  # the verdict, right under the title
    sentence = r"is ([\d.]+ percentage points (above|below)|as accurate as) teacher"
    assert re.search(rf"student_kd {sentence}, at \d+% of its inference time", text)
    headings = ["Set-up", "Accuracy", "Cost", "Calibration", "Fidelity", "Where they differ", "Training", "Environment"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == headings
    assert not re.search(r"\bNone\b|\bnan\b", text)


def test_missing_checkpoints_are_listed_and_the_others_evaluated(trained, tmp_path, capsys):
    evaluate.main(flags(trained, "--seeds", "1", "2", "--imgs_path", str(tmp_path)))
    output = capsys.readouterr()
    for model in ("teacher", "student", "student_kd"):
        assert f"not trained yet, skipped: {trained}/checkpoints/demo/seed2/{model}.pt" in output.err
    assert "overall" in output.out
    results = json.loads((tmp_path / "demo" / "results.json").read_text(encoding="utf-8"))
    assert list(results["models"]["teacher"]["accuracy"]["seeds"]) == ["1"]
    assert len(results["missing"]) == 3
    text = (tmp_path / "demo" / "results.md").read_text(encoding="utf-8")
    assert "seeds: 1." in text
    assert text.count("seed2") == 3


def test_a_checkpoint_with_other_settings_is_refused(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags(trained, "--student.epochs", "7", "--imgs_path", str(tmp_path)))
    assert exit.value.code == 2
    assert "student.epochs was 2, is now 7" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".demo.lock"]


def test_align_tables_accepts_columns_of_one_character():
    assert table(["", "a"], [[1, 2]]).splitlines()[1] == "| :-- | --: |"


def test_a_table_keeps_its_shape_with_any_names():
    lines = table(["class", *HOSTILE], [[name, 1, 2, 3, 4] for name in HOSTILE]).splitlines()
    assert len(lines) == 6
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines)
