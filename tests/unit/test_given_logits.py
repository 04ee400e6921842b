"""A teacher that is only logits, in the order of the data set or by the names of files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import flags, override
from sklearn.linear_model import LogisticRegression

import evaluate
import teacher_student_model
from config import PRESETS
from engine.datasets import load_dataset
from engine.errors import UserError
from engine.given_logits import read_logits
from engine.recipes import Recipe


def guesses(labels, classes: int, seed: int = 0) -> np.ndarray:
    """Logits (N, C) float32, all different, with which most of the labels are right."""
    noise = np.random.default_rng(seed).normal(size=(len(labels), classes))
    return (noise + 3 * np.eye(classes)[np.asarray(labels)]).astype(np.float32)


@pytest.fixture
def of_scikit_learn(tmp_path, digits):
    """Logits of scikit-learn's logistic regression for the digits, its classes in reverse, and its test accuracy."""
    pixels = {
        name: split.images[:, 0].flatten(1).cpu() / 255 for name, split in digits._asdict().items() if name in SPLITS
    }
    labels = {name: getattr(digits, name).labels.cpu() for name in SPLITS}
    model = LogisticRegression(max_iter=300).fit(pixels["train"], labels["train"])
    logits = {name: model.decision_function(pixels[name])[:, ::-1].astype(np.float32) for name in SPLITS}
    np.savez(tmp_path / "sklearn.npz", **logits)
    return tmp_path / "sklearn.npz", model.score(pixels["test"], labels["test"]), logits


SPLITS = ("train", "test")


def test_logits_teach_and_are_evaluated_as_a_model_is(tmp_path, of_scikit_learn, digits, capsys):
    path, accuracy, given = of_scikit_learn
    of_teacher = [f"--teacher.weights={path}", "--teacher.epochs=0", "--teacher.class_names", *"9876543210"]
    words = override(flags(tmp_path, *of_teacher), "--validation_size=97", "--horizontal_flip=0.5")
    words = override(words, "--student_kd.epochs=1", "--only", "teacher", "student_kd")
    teacher_student_model.main(words)
    assert f"{accuracy:.2%} on the test images" in capsys.readouterr().err
    evaluate.main(words)
    results = json.loads((tmp_path / "imgs/demo/results.json").read_text())
    assert results["models"]["teacher"]["accuracy"]["mean"] == pytest.approx(accuracy)
    assert results["models"]["teacher"]["cost"] is None
    assert results["fidelity"][0]["teacher"] == "teacher"
    with np.load(tmp_path / "imgs/demo/predictions.npz") as arrays:
        np.testing.assert_array_equal(arrays["teacher/seed0"], given["test"][:, ::-1])
        held_out, of_held_out = arrays["validation/labels"], arrays["validation/teacher/seed0"]
    assert (of_held_out.argmax(1) == held_out).mean() > 0.9  # the right rows of the array for all training images
    for more in (["--export"], ["--predict", str(tmp_path)]):
        capsys.readouterr()
        if "--predict" in more:
            (tmp_path / "imgs/demo").rename(tmp_path / "pictures")
            more = ["--predict", str(tmp_path / "pictures")]
        evaluate.main(override(words, *more))
        assert "teacher seed 0  is only logits" in capsys.readouterr().err


def test_an_image_and_its_mirror_image_have_the_same_given_logits(of_scikit_learn, config, digits):
    path, _, given = of_scikit_learn
    recipe = Recipe(weights=str(path), epochs=0, class_names=tuple("9876543210"))
    dataset = load_dataset(replace(PRESETS["demo"], validation_size=97, device=config.device))
    teacher = teacher_student_model.Teacher("t", torch.nn.Identity(), "", read_logits(recipe, dataset))
    logits = teacher_student_model.teacher_logits(teacher, config, dataset, dataset.subset(None))
    assert torch.equal(logits[0], logits[1])
    everything = torch.from_numpy(given["train"][:, ::-1].copy())
    kept = [int((digits.train.images == image).flatten(1).all(1).nonzero()[0]) for image in dataset.train.images[:20]]
    assert torch.equal(logits[0, :20].cpu(), everything[kept])


@pytest.fixture
def folder(image_folder, config):
    """A folder with files of equal names in each class, and its data set."""
    root = image_folder({f"{split}/{name}": n for split, n in (("train", 9), ("test", 5)) for name in "abc"})
    return load_dataset(
        replace(config, dataset=str(root), image_size=16, batch_size=2, recipes=PRESETS["cifar10"].recipes)
    )


def write(path, **arrays) -> Recipe:
    np.savez(path, **arrays)
    return Recipe(weights=str(path), epochs=0)


@pytest.mark.parametrize("prefix", ["", "train/", "/data/photographs/train/"])
def test_rows_are_found_by_the_names_of_files(folder, tmp_path, prefix):
    train, test = (guesses(split.labels.cpu(), 3, seed) for seed, split in enumerate((folder.train, folder.test)))
    order = np.random.default_rng(0).permutation(len(train))
    names = np.array([f"{prefix}{'abc'[label]}/{n}.png" for label in range(3) for n in range(9)])
    more = np.zeros((1, 3), np.float32)  # of a file that is not in the data set
    recipe = write(
        tmp_path / "logits.npz",
        train=np.concatenate([train[order], more]),
        train_names=np.append(names[order], "c/99.png"),
        test=test,
    )
    table = read_logits(recipe, folder)
    assert torch.equal(table[folder.train.ids], torch.from_numpy(train))
    assert torch.equal(table[folder.test.ids], torch.from_numpy(test))


def test_rows_of_the_test_images_among_train_names_are_not_taken_for_training_images(folder, tmp_path):
    train = guesses(folder.train.labels.cpu(), 3)
    names = [
        f"{split}/{c}/{n}.png" for split, count in (("train", 9), ("test", 5)) for c in "abc" for n in range(count)
    ]
    others = -train[:15]
    recipe = write(tmp_path / "logits.npz", train=np.concatenate([train, others]), train_names=names)
    assert torch.equal(read_logits(recipe, folder)[folder.train.ids], torch.from_numpy(train))
    recipe = write(
        tmp_path / "logits.npz", train=np.concatenate([train, train[:1]]), train_names=[*names[:27], names[0]]
    )
    with pytest.raises(UserError, match=r"train_names has 2 rows for train/a/0\.png"):
        read_logits(recipe, folder)


def test_columns_in_another_order_are_refused_and_a_perfect_teacher_is_not(image_folder, config, tmp_path):
    classes = [str(number) for number in range(12)]  # folders are sorted as text: 0, 1, 10, 11, 2
    root = image_folder({f"{split}/{c}": 2 for split in ("train", "test") for c in classes})
    dataset = load_dataset(replace(config, dataset=str(root), batch_size=2, recipes=PRESETS["cifar10"].recipes))
    numbers = np.array([int(dataset.classes[label]) for label in dataset.train.labels])
    recipe = write(tmp_path / "logits.npz", train=5 * np.eye(12, dtype=np.float32)[numbers])
    with pytest.raises(UserError, match=r"with other columns for 100\.0%"):
        read_logits(recipe, dataset)
    read_logits(replace(recipe, class_names=tuple(classes)), dataset)
    few = image_folder({f"{split}/{c}": 2 for split in ("train", "test") for c in "ab"}, root=tmp_path / "few")
    dataset = load_dataset(replace(config, dataset=str(few), batch_size=2, recipes=PRESETS["cifar10"].recipes))
    recipe = write(tmp_path / "few.npz", train=np.eye(2, dtype=np.float32)[dataset.train.labels.cpu()])
    read_logits(recipe, dataset)


def test_given_logits_are_not_evaluated_without_the_training_images_that_say_where_they_are(
    image_folder, tmp_path, capsys
):
    root = image_folder({f"{split}/{c}": n for split, n in (("train", 20), ("test", 9)) for c in "ab"})
    arrays = {
        part: guesses([0] * (count // 2) + [1] * (count // 2), 2) for part, count in (("train", 40), ("test", 18))
    }
    write(tmp_path / "service.npz", **arrays)
    words = override(flags(tmp_path), "--dataset", str(root), "--train_size", "none", "--epochs", "1")
    words = override(words, "--only", "teacher", "student_kd", "--teacher.epochs", "0")
    words = override(words, f"--teacher.weights={tmp_path / 'service.npz'}")
    teacher_student_model.main(words)
    (root / "train").rename(tmp_path / "elsewhere")
    evaluate.main(words)
    results = json.loads((tmp_path / "imgs/demo/results.json").read_text())
    assert list(results["models"]) == ["student_kd"]
    assert results["stored_size"] is None
    assert "without the training images" in capsys.readouterr().err


def test_a_data_set_whose_test_images_are_split_off_takes_its_logits_by_name(image_folder, config, tmp_path):
    root = image_folder({"a": 20, "b": 10})
    dataset = load_dataset(replace(config, dataset=str(root), batch_size=2, recipes=PRESETS["cifar10"].recipes))
    names = [f"{name}/{n}.png" for name, count in (("a", 20), ("b", 10)) for n in range(count)]
    logits = guesses([0] * 20 + [1] * 10, 2)
    recipe = write(tmp_path / "logits.npz", train=logits, train_names=names)
    table = read_logits(recipe, dataset)
    for split in (dataset.train, dataset.test):
        assert torch.equal(table[split.ids].argmax(1) == split.labels.cpu(), torch.from_numpy(right(logits))[split.ids])
    assert len({*dataset.train.ids.tolist(), *dataset.test.ids.tolist()}) == 30


def right(logits: np.ndarray) -> np.ndarray:
    return logits.argmax(1) == np.array([0] * 20 + [1] * 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"test": a["train"]}, "holds no array 'train'; it has test"),
        (lambda a: {"train": a["train"][:-1]}, "train has 26 rows, and the data set has 27 train images"),
        (lambda a: {"train": a["train"][:, :2]}, "a column for each class; it is float32"),
        (lambda a: {"train": a["train"].argmax(1)}, "a column for each class; it is int64"),
        (lambda a: {"train": np.where(a["train"] > 3, np.nan, a["train"])}, "has no logits of"),
        (lambda a: {"train": np.where(a["train"] < 0, -np.inf, a["train"])}, "has infinite logits of"),
        (lambda a: {"train": a["train"][np.arange(27) % 3 * 9 + np.arange(27) // 3]}, "In a random order"),
        (lambda a: {"train": a["train"][:, [1, 2, 0]]}, "In a random order"),
        (lambda a: {"train": a["train"], "train_names": [f"{n}.png" for n in range(27)]}, "has no logits of"),
        (lambda a: {"train": a["train"], "test": a["train"]}, "test has 27 rows, and the data set has 15"),
    ],
)
def test_logits_that_do_not_belong_to_the_images_are_refused(folder, tmp_path, change, message):
    recipe = write(tmp_path / "logits.npz", **change({"train": guesses(folder.train.labels.cpu(), 3)}))
    with pytest.raises(UserError, match=message):
        read_logits(recipe, folder)
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (b"PK\3\4 no archive", b"", (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "logits.npz").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as an"):
            read_logits(recipe, folder)


def test_logits_are_neither_trained_nor_used_with_other_augmentation(config):
    with pytest.raises(UserError, match="epochs = 5: must be 0, because weights are logits"):
        Recipe(weights="clip.npz")
    clip = Recipe(weights="clip.npz", epochs=0)
    with pytest.raises(UserError, match="no crop_padding and no augment"):
        replace(config, recipes={**config.recipes, "teacher": clip}, augment="crop")
