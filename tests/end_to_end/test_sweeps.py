import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import flags, paths

import evaluate
import teacher_student_model
from config import PRESETS, parse
from engine.errors import UserError
from engine.recipes import baseline_of
from engine.sweeps import name_of
from report import write


def test_a_sweep_replaces_a_row_by_all_combinations():
    config = parse(["--preset", "scratch", "--sweep", "student_kd.temperature=1,4.5", "student_kd.alpha=0,0.5"])
    rows = {name: (r.temperature, r.alpha) for name, r in config.recipes.items() if r.teacher}
    assert rows == {
        "student_kd-temperature-1-alpha-0": (1.0, 0.0),
        "student_kd-temperature-1-alpha-0_5": (1.0, 0.5),
        "student_kd-temperature-4_5-alpha-0": (4.5, 0.0),
        "student_kd-temperature-4_5-alpha-0_5": (4.5, 0.5),
    }
    assert list(config.recipes)[:2] == ["teacher", "student"]
    assert replace(PRESETS["scratch"], sweep=config.sweep) == config  # as an edit of config.py
    assert replace(config, seeds=(1,)).recipes == config.recipes
    only = parse(
        ["--preset", "scratch", "--sweep", "student_kd.temperature=1,4", "--only", "teacher", "student_kd"]
    ).only
    assert only == ("teacher", "student_kd-temperature-1", "student_kd-temperature-4")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("student_kd", "must have the form RECIPE.SETTING=VALUE,VALUE"),
        ("student_kd.temperature", "must have the form"),
        ("student_kd.temperatur=1", "did you mean temperature?"),
        ("student_dk.alpha=1", "did you mean student_kd?"),
        ("student_kd.alpha=0.5,2", "student_kd.alpha = 2.0: must be a number from 0 to 1"),
        ("student_kd.alpha=", "must have the form"),
        ("student_kd.loss_options.power=1,2", "student_kd.loss_options = {'power': 1.0}"),  # kd has no such option
        ("student.loss_options.power=1,2", "student.loss_options = {'power': 1.0}: has no effect without a teacher"),
        ("student.weights=a/b.pt,a_b.pt", "sweep of student: two rows would have the name student-weights-a_b_pt"),
        ("student.temperature=1,2", "temperature = 1.0: has no effect without a teacher"),
    ],
)
def test_a_mistake_in_a_sweep_is_named(word, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(["--preset", "scratch", "--sweep", word])


def test_rows_are_named_by_their_values():
    assert name_of("kd", {"soft_loss": "dkd", "scale_soft_loss": False}) == "kd-soft_loss-dkd-scale_soft_loss-false"
    assert name_of("kd", {"lr": 1e-05}) == "kd-lr-1e_05"
    assert name_of("kd", {"train_size": None}) == "kd-train_size-none"
    assert name_of("student_kd", {"loss_options.power": 3.0}) == "student_kd-power-3"


def test_an_option_of_the_soft_loss_is_swept_beside_the_others_that_are_given():
    words = ["--student_kd.soft_loss=dist", "--student_kd.loss_options=inter_weight=2"]
    words += ["--sweep", "student_kd.loss_options.intra_weight=1,0.5", "student_kd.alpha=0"]
    recipes = parse(["--preset", "scratch", *words]).recipes
    assert {name: r.loss_options for name, r in recipes.items() if r.teacher} == {
        "student_kd-intra_weight-1-alpha-0": {"inter_weight": 2.0, "intra_weight": 1.0},
        "student_kd-intra_weight-0_5-alpha-0": {"inter_weight": 2.0, "intra_weight": 0.5},
    }


def test_a_grown_sweep_trains_only_its_new_rows_and_is_reported(tmp_path, capsys):
    words = flags(tmp_path, *[f"--{name}.epochs=1" for name in ("teacher", "student", "student_kd")], "--sweep")
    teacher_student_model.main([*words, "student_kd.temperature=1"])
    capsys.readouterr()
    teacher_student_model.main([*words, "student_kd.temperature=1", "student_kd.alpha=0.25,0"])
    output = capsys.readouterr().err
    assert output.count("which was trained with the same settings") == 1  # the row with T = 1 and alpha = 0.25
    assert len(re.findall(r"student_kd\S+ seed 0  epoch", output)) == 1
    evaluate.main(["--run=demo", *paths(tmp_path)])
    report = tmp_path / "imgs/demo"
    results = json.loads((report / "results.json").read_text())
    assert len(results["comparisons"]) == 3  # that of the first sweep, too
    expected = [{"temperature": 1.0, "alpha": a} for a in (0.25, 0.0)]
    assert [point["values"] for point in results["sweeps"]["student_kd"]] == expected
    text = (report / "results.md").read_text()
    for figure in ("sweep_student_kd.png", "effects.png"):
        assert (report / figure).exists()
        assert figure in text
    evaluate.main(["--run=demo", *paths(tmp_path), "--only", "student"])
    assert "sweep_" not in (report / "results.md").read_text()  # no link to a figure that is not drawn


def test_of_sweeps_of_one_row_over_different_settings_the_larger_is_reported():
    points = {"a": {"alpha": 0.0}, "b": {"alpha": 1.0}, "c": {"temperature": 7.0}}
    config = SimpleNamespace(swept={"student_kd": points})
    assert write.sweeps(config, "abc") == {"student_kd": {"a": {"alpha": 0.0}, "b": {"alpha": 1.0}}}
    assert write.sweeps(config, "c") == {"student_kd": {"c": {"temperature": 7.0}}}
    assert write.sweeps(config, "x") == {}


def baselines(*sweep: str, preset: str = "scratch") -> dict[str, str | None]:
    """The baseline of student_kd, or of each row of its sweep."""
    recipes = parse(["--preset", preset, "--sweep", *sweep]).recipes
    return {name: baseline_of(name, recipes) for name in recipes if name.startswith("student_kd")}


def test_a_swept_model_is_compared_with_the_row_of_its_own_settings():
    """By hand: in the preset scratch, student_kd has 30 epochs and all images."""
    assert baselines("student.epochs=1,20") == {"student_kd": None}
    assert baselines("student.epochs=1,30") == {"student_kd": "student-epochs-30"}
    assert baselines("student.lr=0.001,0.02", "student_kd.lr=0.001,0.02") == {
        "student_kd-lr-0_001": "student-lr-0_001",
        "student_kd-lr-0_02": "student-lr-0_02",
    }
    assert baselines("student.train_size=500,none") == {"student_kd": "student-train_size-none"}
    assert baselines("student_kd.temperature=1,4") == {
        "student_kd-temperature-1": "student",
        "student_kd-temperature-4": "student",
    }


def test_a_written_baseline_that_is_swept_means_its_row_of_the_same_values():
    """By hand: in the preset cifar10, student_kd names student_10; both train 10 epochs at 0.001."""
    assert baselines("student_10.lr=0.001,0.1", preset="cifar10") == {"student_kd": "student_10-lr-0_001"}
    swept = baselines("student_10.lr=0.01,0.1", "student_kd.lr=0.01,0.1", preset="cifar10")
    assert swept == {"student_kd-lr-0_01": "student_10-lr-0_01", "student_kd-lr-0_1": "student_10-lr-0_1"}
    assert baselines("student_10.epochs=3,5", preset="cifar10") == {"student_kd": "student_10"}  # which no row is
