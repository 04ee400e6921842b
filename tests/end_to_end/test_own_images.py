"""A folder of photographs, from training to predictions."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import flags, override

import evaluate
import teacher_student_model
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.datasets import load_dataset
from engine.errors import UserError
from utils import load_config


def settings(folder, root, *more):
    words = ("--dataset", str(root), "--epochs", "1", "--train_size", "none", "--only", "teacher", "--batch_size", "5")
    return flags(folder, *words, *more)


@pytest.fixture
def photographs(image_folder):
    """12 training and 4 test images of two classes, larger than the 16 pixels of the models and not square."""
    return image_folder({"train/a": 6, "train/b": 6, "test/a": 2, "test/b": 2}, size=(40, 30))


def predicted(words, capsys) -> list[float]:
    evaluate.main(words)
    return [float(line.split("|")[2]) / 100 for line in capsys.readouterr().out.splitlines()[3:5]]


def test_what_becomes_of_a_photograph_is_the_same_in_the_report_and_in_predictions(photographs, tmp_path, capsys):
    crop = settings(tmp_path, photographs, "--resize", "crop")
    teacher_student_model.main(crop)
    config = load_config(crop)
    models, _ = evaluate.evaluate_checkpoints(config, load_dataset(config))
    expected = torch.softmax(torch.from_numpy(models["teacher"].logits[0]), 1)  # of a/0, a/1, b/0, b/1
    capsys.readouterr()
    for file, probabilities in zip(("a/0.png", "b/1.png"), expected[[0, 3]].tolist(), strict=True):
        found = predicted([*crop, "--predict", str(photographs / "test" / file)], capsys)
        assert found == pytest.approx(probabilities, abs=6e-4)
    with pytest.raises(SystemExit):
        teacher_student_model.main(settings(tmp_path, photographs, "--resize", "pad"))
    assert "resize was crop, is now pad" in capsys.readouterr().err


def test_a_checkpoint_from_before_there_was_a_choice_has_squashed_its_images(photographs, tmp_path, capsys):
    words, path = settings(tmp_path, photographs), tmp_path / "checkpoints/demo/seed0/teacher.pt"
    teacher_student_model.main(words)
    file = str(photographs / "test" / "a" / "0.png")
    before = predicted([*words, "--predict", file], capsys)
    state = load_checkpoint(path)
    assert state["settings"]["config"].pop("resize") == state["config"].pop("resize") == "squash"
    save_checkpoint(path, state)
    assert predicted([*words, "--predict", file], capsys) == before
    teacher_student_model.main(words)
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        teacher_student_model.main(settings(tmp_path, photographs, "--resize", "pad"))
    assert "resize was squash, is now pad" in capsys.readouterr().err


def test_a_report_needs_no_training_images_and_an_export_no_images_at_all(photographs, tmp_path, capsys):
    words = settings(tmp_path, photographs)
    teacher_student_model.main(words)
    assert "teacher: 2 steps an epoch (12 images, batch_size = 5)" in capsys.readouterr().err
    config = load_config(words)

    def logits(dataset):
        return evaluate.evaluate_checkpoints(config, dataset)[0]["teacher"].logits[0]

    expected = logits(load_dataset(config))
    evaluate.main([*override(words, "--dataset", "gone", "--image_size", "32", "--resize", "pad"), "--export"])
    about = {"about.json": ""}
    torch.export.load(tmp_path / "checkpoints/demo/seed0/teacher.pt2", extra_files=about)
    about = json.loads(about["about.json"])
    assert (about["image_size"], about["resize"]) == (16, "squash")  # as it was trained, whatever the flags say
    moved = photographs.rename(tmp_path / "moved")
    shutil.rmtree(moved / "train")
    dataset = load_dataset(replace(config, dataset=str(moved)), trained=True)
    assert (logits(dataset) == expected).all()
    assert evaluate.dataset_if_there(config) is None
    assert [str(model) for model, *_ in evaluate.finished_checkpoints(config, None, [])] == ["teacher seed 0"]
    with pytest.raises(UserError, match="has no folder train/"):
        load_dataset(replace(config, dataset=str(moved)))
    (moved / "test" / "b").rename(moved / "test" / "c")
    with pytest.raises(UserError, match="has other classes: a, b"):
        logits(load_dataset(replace(config, dataset=str(moved)), trained=True))
