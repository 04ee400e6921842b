import hashlib
import io
import os
import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import checkpoints, fingerprints
from engine.errors import UserError
from engine.recipes import Recipe
from engine.settings import Config

STATE = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "history": [{"loss": 0.5}], "classes": ["a", "b"]}


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
    "wrong", ["name", "settings", "environment", "model", "history", "classes", "arch", "finished", "config", "stem"]
)
def test_an_intact_file_without_a_model_is_refused_with_the_reason(tmp_path, wrong):
    path = tmp_path / "model.pt"
    about = {"name": "student", "settings": {}, "environment": {}, "history": [], "classes": [], "finished": True}
    about |= {"model": {}, "arch": "resnet18", "stem": "imagenet", "config": {}}
    checkpoints.save_checkpoint(path, about)
    assert checkpoints.load_finished(path)
    checkpoints.save_checkpoint(path, {**about, wrong: 7})
    with pytest.raises(UserError, match=rf"is not the checkpoint of a model \(wrong: {wrong}\)"):
        checkpoints.load_finished(path)


def test_an_unknown_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    monkeypatch.setattr(checkpoints, "FORMAT", 3)
    checkpoints.save_checkpoint(path, STATE)
    monkeypatch.undo()
    assert "has format 3, and this program reads format 2" in refused(path, path.read_bytes())


def test_differing_settings_are_refused_by_name(config, digits, monkeypatch):
    path = Path("model.pt")
    monkeypatch.setattr(fingerprints, "weights_digest", lambda path: "a" * 64)
    settings = fingerprints.training_settings("student_kd", 0, config, digits)
    fingerprints.check_settings(path, {"name": "student_kd", "settings": settings}, settings)
    recipes = {**config.recipes, "student_kd": replace(config.recipes["student_kd"], temperature=4.0)}
    changed = replace(config, recipes=recipes, batch_size=20)
    monkeypatch.setattr(fingerprints, "weights_digest", lambda path: "b" * 64)
    other = fingerprints.training_settings("student_kd", 0, changed, digits)
    with pytest.raises(UserError) as error:
        fingerprints.check_settings(path, {"name": "student_kd", "settings": settings}, other)
    output = str(error.value)
    assert "student_kd.temperature was 5.0, is now 4.0; batch_size was 25, is now 20" in output
    assert "weights of the teacher was aaaaaaaaaaaa..., is now bbbbbbbbbbbb..." in output
    assert "--overwrite" in output
    with pytest.raises(UserError, match="seed was 0, is now 1"):
        fingerprints.check_settings(path, {"name": "student_kd", "settings": settings}, {**settings, "seed": 1})


def test_a_checkpoint_older_than_a_setting_counts_as_its_default(config, digits):
    settings = fingerprints.training_settings("student", 0, config, digits)
    older = {field: value for field, value in settings.items() if field != "sync_batchnorm"}
    fingerprints.check_settings(Path("model.pt"), {"name": "student", "settings": older}, settings)
    with pytest.raises(UserError, match="sync_batchnorm was False, is now True"):
        fingerprints.check_settings(
            Path("model.pt"), {"name": "student", "settings": older}, {**settings, "sync_batchnorm": True}
        )


def test_every_field_that_can_change_the_weights_is_in_the_fingerprint(config, digits, monkeypatch):
    """All fields are, except those listed here."""
    monkeypatch.setattr(fingerprints, "weights_digest", lambda path: "digest")
    known = fingerprints.training_settings("student_kd", 0, config, digits)
    assert {field.name for field in fields(Recipe)} - {"baseline", "teacher_seed"} < set(known)
    harmless = {"recipes", "run", "only", "overwrite", "checkpoint_minutes", "device", "compile", "deterministic"}
    harmless |= {"sweep", "jobs", "data_path", "checkpoints_path", "imgs_path"}
    elsewhere = {"dataset": "images of the data set", "seeds": "seed"}
    for field in {field.name for field in fields(Config)} - harmless:
        assert elsewhere.get(field, field) in known


def test_the_recorded_precision_is_that_of_the_first_readable_checkpoint(trained, tmp_path, config):
    assert checkpoints.recorded_precision(config) is None
    folder = tmp_path / "checkpoints" / config.run / "seed0"
    folder.mkdir(parents=True)
    (folder / "a.pt").write_bytes(b"damaged")
    assert checkpoints.recorded_precision(config) is None
    state = checkpoints.load_checkpoint(trained / "checkpoints/demo/seed0/student.pt")
    checkpoints.save_checkpoint(folder / "b.pt", {**state, "settings": {}})  # weights used as they are
    assert checkpoints.recorded_precision(config) is None
    checkpoints.save_checkpoint(folder / "c.pt", {**state, "settings": {"precision": "bf16"}})
    assert checkpoints.recorded_precision(config) == "bf16"
