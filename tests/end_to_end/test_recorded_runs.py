"""The evaluation of a run by the checkpoints that lie in its folder."""

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import flags, paths

import engine.files
import evaluate
import teacher_student_model
from config import PRESETS
from engine.checkpoints import load_checkpoint, save_checkpoint, tensors_digest
from engine.errors import UserError
from report import write
from utils import parse_recorded


def copy_of(trained, tmp_path) -> Path:
    """The checkpoints of the run demo, of seeds 0 and 1, in a folder that a test may change."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints/demo"


def refused(main, words, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    return capsys.readouterr().err


def rewrite(path: Path, **changes) -> None:
    """Save a checkpoint with changes, as the program would have."""
    save_checkpoint(path, {**load_checkpoint(path), **changes})


def test_a_run_is_evaluated_by_all_its_checkpoints_whatever_their_times(trained, tmp_path):
    """A sweep after the plain row: both lie there, and neither time stamps nor config.py hide one."""
    folder = copy_of(trained, tmp_path)
    shutil.rmtree(folder / "seed1")
    teacher_student_model.main(flags(tmp_path, "--sweep", "student_kd.alpha=0,1", "--student_kd.epochs=1"))
    rows = ["teacher", "student", "student_kd", "student_kd-alpha-0", "student_kd-alpha-1"]
    for newest in ("student_kd.pt", "student_kd-alpha-0.pt"):
        os.utime(folder / "seed0" / newest, (2_000_000_000, 2_000_000_000))
        config = parse_recorded(["--run=demo", *paths(tmp_path)], {})
        assert {(model.name, model.seed) for model in config.models()} == {(row, 0) for row in rows}
        assert {name: recipe.epochs for name, recipe in config.recipes.items()} == {
            "teacher": 2,
            "student": 2,
            "student_kd": 2,
            "student_kd-alpha-0": 1,
            "student_kd-alpha-1": 1,
        }
    evaluate.main(["--run=demo", *paths(tmp_path)])
    results = json.loads((tmp_path / "imgs/demo/results.json").read_text())
    assert set(results["models"]) == set(rows)
    assert [entry["values"] for entry in results["sweeps"]["student_kd"]] == [{"alpha": 0.0}, {"alpha": 1.0}]


def test_checkpoints_that_contradict_one_another_are_refused_with_both_names(trained, tmp_path, capsys):
    folder = copy_of(trained, tmp_path)
    settings = load_checkpoint(folder / "seed1/student.pt")["settings"]
    for part, field, value, what in (
        ("recipe", "lr", 0.5, "student.lr is 0.01 and 0.5"),
        ("config", "batch_size", 7, "batch_size is 25 and 7"),
    ):
        rewrite(folder / "seed1/student.pt", settings={**settings, part: {**settings[part], field: value}})
        message = refused(evaluate.main, ["--run=demo", *paths(tmp_path)], capsys)
        assert "seed0/student" in message
        assert "seed1/student.pt" in message
        assert what in message


def test_settings_of_the_same_effect_do_not_contradict_one_another(trained, tmp_path):
    """As training has it: one teacher's seed written differently, a setting that an older program did not have."""
    folder = copy_of(trained, tmp_path)
    for seed, teacher_seed in ((0, None), (1, 1)):
        path = folder / f"seed{seed}/student_kd.pt"
        config = load_checkpoint(path)["config"]
        del config["recipes"]["student_kd"]["label_smoothing"]
        config["recipes"]["student_kd"]["teacher_seed"] = teacher_seed
        rewrite(path, config=config)
    path = folder / "seed0/teacher.pt"  # weights that are used as they are depend on no config
    state = load_checkpoint(path)
    settings, config = {**state["settings"], "config": {}}, {**state["config"], "image_size": 99}
    rewrite(path, settings=settings, config=config)
    found = parse_recorded(["--run=demo", *paths(tmp_path)], {})
    assert found.recipes["student_kd"].teacher_seed == 1  # the highest seed's
    assert (found.image_size, found.seeds) == (16, (0, 1))


def test_the_seed_of_a_shared_teacher_is_not_asked_of_its_students(trained, tmp_path):
    folder = copy_of(trained, tmp_path)
    for name in ("student", "student_kd"):
        (folder / f"seed0/{name}.pt").unlink()
    for path in folder.glob("seed*/*.pt"):
        config = load_checkpoint(path)["config"]
        config["recipes"]["student_kd"]["teacher_seed"] = 0
        rewrite(path, config={**config, "seeds": (1,)})
    (folder / "seed1/teacher.pt").unlink()
    models = parse_recorded(["--run=demo", *paths(tmp_path)], {}).models()
    assert {(model.name, model.seed) for model in models} == {("teacher", 0), ("student", 1), ("student_kd", 1)}


def test_the_baseline_is_the_flags_else_that_of_config_py_else_the_recorded_one(trained, tmp_path, capsys, monkeypatch):
    folder = copy_of(trained, tmp_path)

    def baseline(*words: str) -> str:
        capsys.readouterr()
        return parse_recorded(["--run=demo", *paths(tmp_path), *words], {}).recipes["student_kd"].baseline

    for path in folder.glob("seed*/*.pt"):
        config = load_checkpoint(path)["config"]
        assert config["preset"] == "scratch"
        config["recipes"]["student_kd"]["baseline"] = "teacher"
        for name, recipe in config["recipes"].items():
            recipe["arch"] = PRESETS["scratch"].recipes[name].arch
        rewrite(path, config=config)
    assert baseline() is None  # as config.py's scratch has it
    monkeypatch.setattr("config.ALL_PRESETS", {"demo": PRESETS["demo"]})
    assert baseline() == "teacher"
    edited = replace(PRESETS["scratch"].recipes["student_kd"], baseline="student")
    recipes = {**PRESETS["scratch"].recipes, "student_kd": edited}
    monkeypatch.setattr("config.ALL_PRESETS", {"scratch": replace(PRESETS["scratch"], recipes=recipes)})
    assert baseline() == "student"
    parse_recorded(["--run=demo", *paths(tmp_path)], {})
    assert "student_kd.baseline is student in config.py, which counts, and teacher in the checkpoint" in (
        capsys.readouterr().err
    )
    assert baseline("--student_kd.baseline", "teacher") == "teacher"
    swept = replace(PRESETS["scratch"], recipes=recipes, sweep=("student.lr=0.02",))  # in config.py, not by a flag
    monkeypatch.setattr("config.ALL_PRESETS", {"scratch": swept})
    assert baseline() == "student-lr-0_02"
    new = replace(PRESETS["scratch"].recipes["student"], lr=0.5)
    recipes |= {"unborn": new, "student_kd": replace(edited, baseline="unborn")}
    monkeypatch.setattr("config.ALL_PRESETS", {"scratch": replace(PRESETS["scratch"], recipes=recipes)})
    assert baseline() == "unborn"  # the report says that it is not trained yet
    recipes["student_kd"] = edited
    monkeypatch.setattr("config.ALL_PRESETS", {"scratch": replace(PRESETS["scratch"], recipes=recipes)})
    assert baseline() == "student"
    for path in folder.glob("seed*/*.pt"):
        config = load_checkpoint(path)["config"]
        config["recipes"]["student_kd"] |= {"arch": "resnet34", "baseline": None}
        rewrite(path, config=config)
    assert baseline() is None  # a flag gave it another architecture, so training left out the baseline
    monkeypatch.setattr("config.ALL_PRESETS", {"scratch": PRESETS["scratch"]})  # whose row names none
    for path in folder.glob("seed*/*.pt"):
        config = load_checkpoint(path)["config"]
        config["recipes"]["student_kd"] |= {"baseline": "student"}
        rewrite(path, config=config)
    assert baseline() == "student"  # named by a flag, too


def test_a_report_goes_to_this_checkout_wherever_the_run_was_trained(trained, tmp_path, monkeypatch):
    copy_of(trained, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert parse_recorded(["--run=demo"], {}).imgs_path == "imgs"


@pytest.mark.parametrize(
    ("source", "target"),
    [("seed0/student.pt", "seed1/student.pt"), ("seed0/student.pt", "seed0/student_kd.pt")],
    ids=["seed", "name"],
)
def test_a_checkpoint_under_another_name_is_refused_everywhere(trained, tmp_path, image_folder, capsys, source, target):
    folder = copy_of(trained, tmp_path)
    (image,) = image_folder({"test": 1}).rglob("*.png")
    shutil.copy(folder / source, folder / target)
    both = flags(tmp_path, "--seeds", "0", "1")
    for main, words in (
        (evaluate.main, [*both, "--predict", str(image)]),
        (evaluate.main, ["--run=demo", *paths(tmp_path), "--predict", str(image)]),
        (evaluate.main, both),
        (evaluate.main, [*both, "--export", "--only", "student", "student_kd"]),
        (teacher_student_model.main, both),
    ):
        message = refused(main, words, capsys)
        assert f"{target}: holds the model of {source}" in message


def test_a_student_of_a_retrained_teacher_is_not_predicted_with(trained, tmp_path, image_folder, capsys):
    folder = copy_of(trained, tmp_path)
    (image,) = image_folder({"test": 1}).rglob("*.png")
    teacher_student_model.main(flags(tmp_path, "--only=teacher", "--teacher.lr=0.02", "--overwrite"))
    message = refused(evaluate.main, flags(tmp_path, "--predict", str(image)), capsys)
    assert f"{folder}/seed0/student_kd.pt: was distilled from a teacher that has been retrained since" in message


# What is derived from a model does not outlive it


@pytest.mark.chaos
def test_an_export_says_of_which_weights_it_is_and_goes_with_them(trained, tmp_path, capsys):
    folder = copy_of(trained, tmp_path)
    evaluate.main(flags(tmp_path, "--export"))
    export, about = folder / "seed0/student_kd.pt2", {"about.json": ""}
    torch.export.load(str(export), extra_files=about)
    weights = load_checkpoint(folder / "seed0/student_kd.pt")["model"]
    assert json.loads(about["about.json"])["weights"] == tensors_digest(weights)
    teacher_student_model.main(flags(tmp_path, "--student_kd.epochs=1", "--overwrite"))
    assert not export.exists()
    assert f"{export}: removed" in capsys.readouterr().err


def test_an_export_without_a_distilled_model_names_it(trained, tmp_path, capsys):
    (copy_of(trained, tmp_path) / "seed0/student_kd.pt").unlink()
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags(tmp_path, "--export"))
    assert exit.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "student_kd" in message
    assert "--only" in message


def test_the_command_that_training_recommends_can_be_pasted(trained, tmp_path, capsys):
    folder = tmp_path / "my models"
    copy_of(trained, tmp_path).parent.rename(folder)
    teacher_student_model.main(flags(tmp_path, "--checkpoints_path", str(folder)))
    words = shlex.split(capsys.readouterr().err.splitlines()[-1].partition("report: ")[2])
    assert words == ["python", "evaluate.py", "--run", "demo", "--checkpoints_path", str(folder)]


def test_help_needs_no_run(capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--run", "nothere", "--help"])
    assert exit.value.code == 0
    assert "--predict" in capsys.readouterr().out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_replaces_the_earlier_one_as_a_whole(trained, tmp_path):
    copy_of(trained, tmp_path)
    evaluate.main(flags(tmp_path))
    folder = tmp_path / "imgs/demo"
    before = files(folder)
    assert all(any(Path(name).match(pattern) for pattern in write.FILES) for name in before)
    (folder / "notes.txt").write_text("the user's")
    own = {"student_kd/own.png", "paper.pdf", "student_kd/draft.pdf", "sweep_mine.png"}
    for name in own:
        (folder / name).write_text("the user's")
    evaluate.main(flags(tmp_path, "--only=teacher"))
    after = set(files(folder))
    assert {name for name in before if name.startswith("student")} & after == set()
    assert {"notes.txt", *own, "results.json", "teacher/confusion_matrix.png"} <= after
    assert not any(path.is_dir() and not any(path.iterdir()) for path in folder.rglob("*"))


def test_an_evaluation_that_fails_leaves_the_earlier_report_as_it_was(trained, tmp_path, monkeypatch):
    copy_of(trained, tmp_path)
    evaluate.main(flags(tmp_path))
    before = files(tmp_path / "imgs/demo")
    written = []

    def full_disk(path, *parts):
        written.append(path)
        if len(written) == 5:
            raise UserError(f"{path}: cannot be written (No space left on device)")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(parts))

    monkeypatch.setattr(engine.files, "write_durably", full_disk)
    with pytest.raises(SystemExit):
        evaluate.main(flags(tmp_path, "--only=student"))
    assert len(written) == 5
    assert files(tmp_path / "imgs/demo") == before
