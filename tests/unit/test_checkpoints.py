import hashlib
import io
import os
import pickle
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split

from custom_resnet import train_model
from engine import checkpoints, datasets, fingerprints
from engine.checkpoints import Checkpoint
from engine.datasets import load_dataset
from engine.errors import UserError
from engine.recipes import Recipe
from engine.settings import Config, Model
from engine.soft_losses import SOFT_LOSSES, options

STATE = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "history": [{"loss": 0.5}], "classes": ["a", "b"]}


def checkpoint_of(name: str, settings: dict, **changes) -> Checkpoint:
    """A model with these settings as its fingerprint."""
    about = {"name": name, "seed": 0, "arch": "resnet18", "stem": "imagenet", "classes": [], "normalisation": {}}
    about |= {"settings": settings, "config": {}, "environment": {}, "history": [], "weights": {}}
    about["config"] = {"recipes": {}, "seeds": (0,), "swept": {}, "image_size": 16}
    return Checkpoint(**{**about, **changes})


def test_checkpoint_round_trip_also_through_torch_load(tmp_path):
    path = tmp_path / "a" / "b" / "model.pt"
    checkpoints.save_checkpoint(path, STATE)
    for state in (checkpoints.load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
        assert (state["history"], state["classes"]) == (STATE["history"], STATE["classes"])
    assert os.listdir(path.parent) == ["model.pt"]


def refused(path, content) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        checkpoints.load_checkpoint(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_truncated_and_bit_flipped_checkpoints_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    checkpoints.save_checkpoint(path, STATE)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for length in random.choice(len(content), 50, replace=False):
        refused(path, content[:length])
    for bit in random.choice(8 * len(content), 200, replace=False):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(path, bytes(flipped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_the_digest_covers_the_bits_of_every_dtype(dtype):
    first, second = ({"w": torch.tensor(values).to(dtype), "n": torch.tensor(3)} for values in ([0.0, 1.0], [1.0, 1.0]))
    assert checkpoints.tensors_digest(first) != checkpoints.tensors_digest(second)
    expected = hashlib.sha256(f"w (2,) {dtype}\n".encode() + bytes(first["w"].untyped_storage()))
    expected.update(b"n () torch.int64\n" + (3).to_bytes(8, "little"))
    assert checkpoints.tensors_digest(first) == expected.hexdigest()


def test_pickled_code_is_not_executed(tmp_path):
    path, bait = tmp_path / "model.pt", tmp_path / "bait"

    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(bait),))

    refused(path, pickle.dumps(Malicious()))
    buffer = io.BytesIO()
    torch.save({"format": 1, "model": Malicious()}, buffer)
    assert "no sha256" in refused(path, buffer.getvalue())
    checkpoints.save_checkpoint(path, {"model": Malicious()})  # even with our digest
    assert "cannot be loaded" in refused(path, path.read_bytes())
    assert not bait.exists()
    with pytest.raises(UserError, match=r"nowhere.pt: cannot be read \(No such file"):
        checkpoints.load_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            "name",
            "seed",
            "settings",
            "environment",
            "model",
            "history",
            "classes",
            "arch",
            "finished",
            "config",
            "stem",
        ),
        "normalisation",
    ],
)
def test_an_intact_file_without_a_model_is_refused_with_the_reason(tmp_path, wrong):
    path = tmp_path / "seed0/student.pt"
    checkpoint_of("student", {"recipe": {}, "config": {}}).save(path)
    state = checkpoints.load_checkpoint(path)
    checkpoints.save_checkpoint(path, {**state, wrong: None})
    with pytest.raises(UserError, match=rf"is not the checkpoint of a model \(wrong: {wrong}\)"):
        checkpoints.load_finished(path)


RECORD = {"epoch": 1, "loss": 0.5, "train_accuracy": 0.5}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        *[({"classes": classes}, "classes") for classes in ([["a"], ["b"]], [0, 1], "ab")],
        *[({"history": history}, "history") for history in ([1, 2], [{}], [{**RECORD, "loss": "x"}], {"epoch": 1})],
        *[({"settings": settings}, "settings") for settings in ({}, {"recipe": 3, "config": {}})],
        *[({"config": {field: None}}, "config") for field in ("recipes", "seeds", "swept", "image_size")],
        *[({"config": {"recipes": recipes}}, "config") for recipes in ([1], {"student": 3})],
        ({"config": {"swept": {"student": 3}}}, "config"),
        *[({"config": {"image_size": size}}, "config.image_size") for size in (10**6, -1)],
        ({"config": {"seeds": "abc"}}, "config.seeds"),
        ({"environment": {"precision": 3}}, "environment"),
        ({"normalisation": {"mean": 3}}, "normalisation"),
        *[({"weights": weights}, "model") for weights in ({0: torch.ones(2)}, {"w": torch.eye(2).to_sparse()})],
    ],
    ids=str,
)
def test_a_checkpoint_made_by_hand_is_refused_with_what_is_wrong(tmp_path, changes, wrong):
    """Its digest is right, and each field has the right type on the outside."""
    path, made = tmp_path / "seed0/student.pt", checkpoint_of("student", {"recipe": {}, "config": {}}, history=[RECORD])
    made.save(path)
    assert checkpoints.load_finished(path)
    if "config" in changes:
        changes = {"config": {**made.config, **changes["config"]}}
    replace(made, **changes).save(path)
    with pytest.raises(UserError, match=rf"is not the checkpoint of a model \(wrong: {re.escape(wrong)}"):
        checkpoints.load_finished(path)
    assert checkpoints.read_metadata(path) is None


def test_a_training_state_made_by_hand_is_refused(config, digits):
    model = Model("student", 0, config)
    train_model(model, digits)
    checkpoint = checkpoints.load_finished(model.path)
    for progress in ({}, {"optimizer": 3, "scheduler": {}, "step": "x"}):
        replace(checkpoint, progress=progress).save(model.path)
        with pytest.raises(UserError, match=r"student\.pt: cannot be resumed"):
            train_model(model, digits)


@pytest.mark.parametrize("progress", [None, {"step": 3, "optimizer": {"lr": 0.5}}], ids=["finished", "unfinished"])
def test_a_model_round_trip(tmp_path, progress):
    path, weights = tmp_path / "seed0/student.pt", {"w": torch.arange(3.0)}
    settings, history = {"recipe": {}, "config": {}}, [{"epoch": 1, "loss": 0.5, "train_accuracy": 0.5}]
    saved = checkpoint_of("student", settings, weights=weights, history=history, progress=progress)
    assert checkpoints.load_training(path) is None
    saved.save(path)
    loaded = checkpoints.load_training(path)
    assert torch.equal(loaded.weights["w"], weights["w"])
    assert loaded.config.pop("resize") == "squash"  # as in every checkpoint from before there was a choice
    assert replace(loaded, weights=weights) == saved
    state = {"model": weights, "history": history, **(progress or {})}
    assert {**loaded.training_state, "model": weights} == state
    assert (checkpoints.load_finished(path) is None) == (progress is not None)


def test_a_new_model_removes_the_exports_of_the_old_one(tmp_path):
    for name in ("student.pt2", "student.onnx", "student_kd.onnx", "student.onnx.notes"):
        (tmp_path / name).touch()
    checkpoint_of("student", {}).save(tmp_path / "student.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"student.pt", "student_kd.onnx", "student.onnx.notes"}


def test_an_unknown_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    monkeypatch.setattr(checkpoints, "FORMAT", 5)
    checkpoints.save_checkpoint(path, STATE)
    monkeypatch.undo()
    assert "has format 5, and this program reads format 4" in refused(path, path.read_bytes())


def test_differing_settings_are_refused_by_name(config, digits, monkeypatch):
    path = Path("model.pt")
    monkeypatch.setattr(fingerprints, "weights_digest", lambda path: "a" * 64)
    settings = fingerprints.training_settings(Model("student_kd", 0, config), digits)
    checkpoint = checkpoint_of("student_kd", settings)
    fingerprints.check_settings(path, checkpoint, settings)
    recipes = {**config.recipes, "student_kd": replace(config.recipes["student_kd"], temperature=4.0)}
    changed = replace(config, recipes=recipes, batch_size=20)
    monkeypatch.setattr(fingerprints, "weights_digest", lambda path: "b" * 64)
    other = fingerprints.training_settings(Model("student_kd", 0, changed), digits)
    with pytest.raises(UserError) as error:
        fingerprints.check_settings(path, checkpoint, other)
    output = str(error.value)
    assert "student_kd.temperature was 5.0, is now 4.0; batch_size was 25, is now 20" in output
    assert "weights of the teacher was aaaaaaaaaaaa..., is now bbbbbbbbbbbb..." in output
    assert "--overwrite" in output
    with pytest.raises(UserError, match="seed was 0, is now 1"):
        fingerprints.check_settings(path, checkpoint, {**settings, "seed": 1})


def test_more_epochs_of_a_finished_model_are_refused_with_what_to_do(config, digits):
    path = Path("demo/seed0/student.pt")
    recipes = {"student": replace(config.recipes["student"], epochs=3)}
    before, longer = (
        fingerprints.training_settings(Model("student", 0, replace(config, **changes)), digits)
        for changes in ({}, {"recipes": recipes})
    )
    for progress, from_its_weights in ((None, True), ({"step": 1}, False)):
        with pytest.raises(UserError, match=r"student\.epochs was 2, is now 3") as error:
            fingerprints.check_settings(path, checkpoint_of("student", before, progress=progress), longer)
        assert "--run" in str(error.value)
        assert "--overwrite" in str(error.value)
        assert (f"--student.weights {path}" in str(error.value)) == from_its_weights


@pytest.mark.parametrize("name", ["batch_size", "seed", "temperature", "distilled", "weights of the teacher"])
def test_an_option_of_a_soft_loss_may_have_the_name_of_a_setting(config, digits, monkeypatch, name):
    """The names of fields, "seed", and the names that a fingerprint itself uses."""
    found = []
    for value in (1, 7):
        monkeypatch.setattr(Recipe, "soft_loss_options", {name: value})
        found.append(fingerprints.training_settings(Model("student_kd", 0, config), digits))
    differences = list(fingerprints.compare(*found, "student_kd"))
    assert differences == [(f"student_kd.loss_options.{name}", 1, 7)]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("student_kd", {"soft_weight": 0.75}),  # what none means with alpha = 0.25
        ("student_kd", {"train_size": None}),  # all 1,297 digits
        ("student_kd", {"teacher": "renamed"}),
        ("student", {"weights": "random"}),
        ("student", {"weights": "random", "pretrained": True}),  # which `weights` overrides
    ],
    ids=str,
)
def test_settings_that_mean_the_same_have_one_fingerprint(config, digits, monkeypatch, name, changes):
    monkeypatch.setattr(fingerprints, "weights_digest", lambda path: "digest")
    rows = {**config.recipes, "student_kd": replace(config.recipes["student_kd"], train_size=1297)}
    rows["renamed"] = rows["teacher"]
    found = [
        fingerprints.training_settings(Model(name, 0, replace(config, recipes=recipes)), digits)
        for recipes in (rows, {**rows, name: replace(rows[name], **changes)})
    ]
    assert found[0] == found[1]


def test_scale_soft_loss_means_nothing_at_temperature_1(config, digits):
    def settings(temperature, scale):
        row = replace(config.recipes["student_kd"], temperature=temperature, scale_soft_loss=scale)
        recipes = {**config.recipes, "student_kd": row}
        return fingerprints.training_settings(Model("student_kd", 0, replace(config, recipes=recipes)), digits)

    assert settings(1.0, True) == settings(1.0, False)
    assert settings(2.0, True) != settings(2.0, False)


def test_weights_that_are_used_as_they_are_depend_on_no_setting_of_training(config, digits):
    def settings(config, **changes):
        recipes = {"teacher": Recipe(weights="random", epochs=0, **changes)}
        return fingerprints.training_settings(Model("teacher", 0, replace(config, recipes=recipes)), digits)

    found = settings(config)
    assert settings(config, lr=0.5, train_size=50) == found
    assert settings(replace(config, augment="crop", batch_size=20)) == found
    assert settings(config, arch="resnet34") != found


def test_every_field_that_can_change_the_weights_is_in_the_fingerprint(config, digits, monkeypatch):
    """Changing any field changes the fingerprint, except those listed here."""
    monkeypatch.setattr(fingerprints, "weights_digest", lambda path: "digest")
    row = replace(config.recipes["student_kd"], arch="resnet18")
    changes = {"arch": "resnet34", "stem": "cifar", "epochs": 3, "optimizer": "adamw", "lr": 0.02, "momentum": 0.8}
    changes |= {"weight_decay": 0.1, "nesterov": True, "schedule": "cosine", "label_smoothing": 0.1}
    changes |= {"pretrained": True, "alpha": 0.5, "soft_weight": 2.0, "soft_loss": "dist", "temperature": 2.0}
    changes |= {"scale_soft_loss": False, "shuffle_teacher": True, "train_size": 50}
    changes |= {"train_subset": 1, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    changes |= {"clip_norm": 1.0, "class_weights": "balanced", "keep": "best"}
    elsewhere = {"class_names", "weights", "teacher", "teacher_seed", "baseline"}  # of weights; the last has no effect
    assert {field.name for field in fields(Recipe)} == {*changes, "loss_options"} | elsewhere

    def settings(row):
        recipes = {**config.recipes, "student_kd": row}
        return fingerprints.training_settings(Model("student_kd", 0, replace(config, recipes=recipes)), digits)

    for field, value in changes.items():
        assert settings(replace(row, **{field: value})) != settings(row), field
    for loss in SOFT_LOSSES:
        of_loss = replace(row, soft_loss=loss)
        for option, default in options(loss).items():
            assert settings(replace(of_loss, loss_options={option: default + 1})) != settings(of_loss), option
            assert settings(replace(of_loss, loss_options={option: default})) == settings(of_loss), option

    harmless = {"recipes", "run", "only", "overwrite", "checkpoint_minutes", "device", "compile", "deterministic"}
    harmless |= {"skip_unreadable", "largest_image"}  # decide which images are read, of which there is a digest
    harmless |= {"precision", "sweep", "swept", "preset", "jobs", "data_path", "checkpoints_path", "imgs_path"}
    harmless |= {"skip_unreadable", "largest_image"}  # the images have a digest
    others = {field.name for field in fields(Config)} - harmless - {"dataset", "seeds"}  # a digest, and "seed"
    assert set(settings(row)["config"]) == others


def test_the_fingerprint_covers_the_seed_and_the_images(config, digits):
    found = fingerprints.training_settings(Model("student", 0, config), digits)
    assert fingerprints.training_settings(Model("student", 1, config), digits) != found
    assert fingerprints.training_settings(Model("student", 0, config), digits._replace(digest="0" * 64)) != found


def test_the_fingerprint_says_which_images_were_drawn(config, digits, monkeypatch):
    """Another version of scikit-learn may draw others: the subset to train on, and the images held out."""
    held_out = replace(config, validation_size=100)
    everything = {"student": replace(config.recipes["student"], train_size=None)}
    configs = (config, replace(held_out, recipes=everything))

    def found():
        return [fingerprints.training_settings(Model("student", 0, c), load_dataset(c)) for c in configs]

    def draw(labels, size, setting, choice=0):
        indices = np.arange(len(labels))
        parts = train_test_split(indices, train_size=size, stratify=labels.cpu().numpy(), random_state=1)
        return tuple(torch.from_numpy(np.sort(part)) for part in parts)

    before = found()
    logits = fingerprints.logits_fingerprint("digest", held_out, load_dataset(held_out))
    assert before == found()
    monkeypatch.setattr(datasets, "stratified", draw)  # of these draws, not of the digits' test images
    for settings, now in zip(before, found(), strict=True):
        with pytest.raises(UserError, match=r"images .*was .*, is now"):
            fingerprints.check_settings(Path("model.pt"), checkpoint_of("student", settings), now)
    assert fingerprints.logits_fingerprint("digest", held_out, load_dataset(held_out)) != logits


def test_the_recorded_precision_is_that_of_the_first_readable_checkpoint(trained, tmp_path, config):
    assert checkpoints.recorded_precision(config) is None
    folder = tmp_path / "checkpoints" / config.run / "seed0"
    folder.mkdir(parents=True)
    (folder / "a.pt").write_bytes(b"damaged")
    assert checkpoints.recorded_precision(config) is None
    student = checkpoints.load_training(trained / "checkpoints/demo/seed0/student.pt")
    environment = {**student.environment, "precision": "bf16"}
    replace(student, name="b", history=[]).save(folder / "b.pt")  # weights that are used as they are
    assert checkpoints.recorded_precision(config) is None
    replace(student, name="c", environment=environment).save(folder / "c.pt")
    assert checkpoints.recorded_precision(config) == "bf16"
