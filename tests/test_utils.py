import errno
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_images
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms
from torchvision.datasets import CIFAR10

import utils
from config import PRESETS, UserError


def pil_resize(images: torch.Tensor, size: int) -> torch.Tensor:
    transform = transforms.Resize((size, size))
    arrays = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return torch.stack([torch.from_numpy(np.array(transform(image))).permute(2, 0, 1) for image in arrays])


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """(200, 3, 32, 32): crops of scikit-learn's two photographs."""
    random = np.random.default_rng(0)
    crops = []
    for photograph in load_sample_images().images:
        height, width, _ = photograph.shape
        corners = zip(random.integers(0, height - 32, 100), random.integers(0, width - 32, 100), strict=True)
        crops += [photograph[y : y + 32, x : x + 32] for y, x in corners]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


# Resizing


@pytest.mark.parametrize("size", [8, 16, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 160, 224, 256, 299, 331, 480])
def test_resize_gives_the_bits_of_pil(size, photographs):
    images = torch.cat([photographs[::20], random_images(10, 32, 32, seed=size)])
    assert torch.equal(utils.resize(images, size), pil_resize(images, size))


def test_resize_at_224_gives_the_bits_of_pil_over_ten_million_values(photographs):
    images = torch.cat([photographs[:40], random_images(40, 32, 32)])
    ours = utils.resize(images, 224)
    assert ours.numel() > 10_000_000
    assert torch.equal(ours, pil_resize(images, 224))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 200), (200, 5), (1, 1), (17, 224), (224, 224)])
def test_resize_gives_the_bits_of_pil_for_images_of_any_shape_that_grow(height, width):
    images = random_images(4, height, width)
    assert torch.equal(utils.resize(images, 224), pil_resize(images, 224))


def test_resize_does_not_depend_on_how_many_images_come_at_once():
    images = random_images(13, 32, 32)
    one_by_one = torch.cat([utils.resize(image[None], 224) for image in images])
    assert torch.equal(utils.resize(images, 224), one_by_one)
    assert utils.resize(images[:0], 224).shape == (0, 3, 224, 224)


def test_resize_refuses_what_is_not_uint8():
    with pytest.raises(ValueError, match="uint8"):
        utils.resize(torch.zeros(1, 3, 8, 8), 16)


@pytest.mark.parametrize("size", [None, 48])
def test_prepare_gives_the_bits_of_torchvisions_transforms(size, photographs):
    steps = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    transform = transforms.Compose([transforms.Resize((size, size)), *steps] if size else steps)
    expected = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in photographs])
    ours = utils.prepare(photographs, size)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, expected)


def test_flip_mirrors_the_images_it_is_told_to():
    images = random_images(2, 4, 4)
    flipped = utils.flip(images, torch.tensor([True, False]))
    assert torch.equal(flipped[0], images[0][:, :, [3, 2, 1, 0]])
    assert torch.equal(flipped[1], images[1])


def test_shift_is_torchvisions_crop_out_of_a_padded_image():
    images = random_images(25, 5, 7)
    down, right = (torch.tensor(t) for t in zip(*[(d, r) for d in range(-2, 3) for r in range(-2, 3)], strict=True))
    padded = transforms.functional.pad(images, [2, 2, 2, 2])
    expected = [
        transforms.functional.crop(image, 2 - d, 2 - r, 5, 7)
        for image, d, r in zip(padded, down.tolist(), right.tolist(), strict=True)
    ]
    assert torch.equal(utils.shift(images, down, right), torch.stack(expected))


# Batches


def epoch_of(config, dataset, seed=0, epoch=0, first_step=0, subset=None):
    subset = dataset.subset(None) if subset is None else subset
    return list(utils.batches(dataset.train, subset, config, seed, epoch, first_step))


def test_a_batch_is_a_function_of_seed_epoch_and_step(config, digits):
    whole = epoch_of(config, digits, seed=3, epoch=2)
    torch.rand(7)  # nothing else that draws random numbers matters
    again = epoch_of(config, digits, seed=3, epoch=2, first_step=40)
    assert len(whole) == 1297 // 25
    for one, other in zip(whole[40:], again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    orders = {tuple(epoch_of(config, digits, seed, epoch)[0].index.tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_an_epoch_shows_each_image_once_and_leaves_out_a_different_rest(config, digits):
    shown = [torch.cat([b.index for b in epoch_of(config, digits, epoch=epoch)]).tolist() for epoch in (0, 1)]
    for indices in shown:
        assert len(indices) == len(set(indices)) == 1297 // 25 * 25
    assert set(shown[0]) != set(shown[1])


def test_a_batch_holds_the_images_it_says(config, digits):
    for batch in epoch_of(config, digits)[:3]:
        assert torch.equal(batch.labels, digits.train.labels[batch.index])
        for image, index, flipped in zip(batch.images, batch.index, batch.flipped, strict=True):
            source = digits.train.images[index]
            source = torch.flip(source, dims=[-1]) if flipped else source
            torch.testing.assert_close(image, utils.prepare(source[None], 16)[0], atol=0, rtol=0)


def test_crop_padding_shifts_images_and_leaves_the_rest_of_the_batch_as_it_was(config, digits):
    plain, shifted = (epoch_of(replace(config, crop_padding=p), digits)[0] for p in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], shifted[1:], strict=True))
    different = (plain.images != shifted.images).flatten(1).any(1).float().mean()
    assert different > 0.7  # one in 25 is not shifted, and some have nothing at the edge to lose


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_flipped_images(config, digits, share):
    config = replace(config, horizontal_flip=share)
    flipped = torch.cat([b.flipped for epoch in range(3) for b in epoch_of(config, digits, epoch=epoch)])
    assert flipped.float().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / len(flipped)) ** 0.5)


def test_a_subset_is_stratified_and_the_same_for_everyone(config, digits):
    subset = digits.subset(200)
    assert torch.equal(subset, digits.subset(200))
    counts = torch.bincount(digits.train.labels[subset])
    share = torch.bincount(digits.train.labels) * 200 / 1297
    assert (counts - share).abs().max() < 1
    shown = torch.cat([batch.index for batch in epoch_of(config, digits, subset=subset)])
    assert set(shown.tolist()) == set(subset.tolist())


# Data sets


def test_digits_are_those_of_scikit_learn(digits):
    assert digits.classes == tuple("0123456789")
    assert digits.train.images.shape == (1297, 3, 8, 8)
    assert digits.test.images.shape == (500, 3, 8, 8)
    assert digits.test.images.max() == 255
    assert torch.bincount(digits.test.labels).min() >= 48
    together = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    assert len(torch.unique(together, dim=0)) == len(together)  # no image is in both


def test_validation_images_are_held_out_of_training(config, digits):
    with_validation = utils.load_dataset(replace(config, validation_size=100))
    assert with_validation.held_out == ("validation", with_validation.validation)
    assert digits.held_out == ("test", digits.test)
    train, validation = (set(map(bytes, s.images.flatten(1).numpy())) for s in with_validation[1:3])
    assert (len(train), len(validation), len(train & validation)) == (1197, 100, 0)
    assert Counter(with_validation.validation.labels.tolist()).most_common()[-1][1] >= 9
    assert torch.equal(with_validation.test.images, digits.test.images)


def cifar10(folder: Path):
    return replace(PRESETS["cifar10"], data_path=str(folder.parent), batch_size=10, device="cpu")


def test_cifar10_is_read_through_torchvision(miniature_cifar10):
    dataset = utils.load_dataset(cifar10(miniature_cifar10))
    assert dataset.classes == ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert (dataset.train.images.shape, dataset.test.images.shape) == ((100, 3, 32, 32), (20, 3, 32, 32))
    raw = pickle.loads((miniature_cifar10 / "data_batch_1").read_bytes())["data"]
    assert torch.equal(dataset.train.images[:20].flatten(1), torch.from_numpy(raw))  # red, green, blue planes
    assert dataset.train.labels.tolist() == [*range(10)] * 10


def test_cifar10_is_unpacked_from_an_archive_that_lies_in_the_folder(miniature_cifar10, monkeypatch):
    archive = miniature_cifar10.parent / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(miniature_cifar10, arcname=miniature_cifar10.name)
    for file in miniature_cifar10.iterdir():
        file.unlink()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(utils.load_dataset(cifar10(miniature_cifar10)).train.labels) == 100


def test_without_cifar10_and_network_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nothing listens there
    with pytest.raises(UserError) as error:
        utils.load_dataset(cifar10(tmp_path / "data" / "x"))
    for part in ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", f"{tmp_path}/data", "--preset demo"):
        assert part in str(error.value)


def test_a_batch_larger_than_the_images_is_refused(miniature_cifar10):
    config = replace(cifar10(miniature_cifar10), batch_size=101)
    with pytest.raises(UserError, match=r"batch_size = 101.*has 100"):
        utils.load_dataset(config)
    with pytest.raises(UserError, match=r"batch_size = 60.*has 100 and validation_size = 50"):
        utils.load_dataset(replace(config, batch_size=60, validation_size=50))


def folder_config(config, root):
    return replace(config, dataset=str(root), image_size=16, batch_size=2, recipes=PRESETS["cifar10"].recipes)


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_is_read_class_by_class(config, image_folder, test):
    root = image_folder({"train/ox": 3, "train/ant": 2, f"{test}/ant": 1, f"{test}/ox": 1})
    (root / "train" / "ox" / ".DS_Store").write_text("not an image")
    Image.new("L", (8, 8), 77).save(root / "train" / "ox" / "grey.jpg")
    dataset = utils.load_dataset(folder_config(config, root))
    assert dataset.classes == ("ant", "ox")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert dataset.train.images.shape == (6, 3, 8, 8)
    assert dataset.train.images[-1].unique().tolist() == [77]
    first = torch.from_numpy(np.array(Image.open(root / "train" / "ant" / "0.png"))).permute(2, 0, 1)
    assert torch.equal(dataset.train.images[0], first)


def test_images_of_different_and_of_large_sizes_are_resized_while_reading(config, image_folder):
    image_folder({"train/a": 1, "test/a": 1}, size=(40, 30))
    root = image_folder({"train/b": 1, "test/b": 1}, size=(8, 8))
    dataset = utils.load_dataset(folder_config(config, root))
    for image, path in zip(dataset.train.images, ("a/0.png", "b/0.png"), strict=True):
        expected = transforms.Resize((16, 16))(Image.open(root / "train" / path))
        assert torch.equal(image, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_what_is_wrong_with_a_folder_is_named(config, image_folder, tmp_path):
    def message(root):
        with pytest.raises(UserError) as error:
            utils.load_dataset(folder_config(config, root))
        return str(error.value)

    assert "no such folder" in message(tmp_path / "nowhere")
    assert "did you mean cifar10?" in message("cifra10")
    root = image_folder({"train/a": 2, "train/b": 2})
    assert "there is no" in message(root)
    assert str(root / "val") in message(root)
    image_folder({"test/a": 1, "test/c": 1})
    told = message(root)
    assert f"{root / 'test'}: has no folder for class 'b'" in told
    assert f"{root / 'train'}: has no folder for class 'c'" in told
    image_folder({"test/b": 0, "train/c": 1})
    assert f"{root / 'test' / 'b'}: holds no images" in message(root)
    image_folder({"test/b": 1})
    for number in range(12):
        (root / "train" / "a" / f"note{number:02}.txt").write_text("hello")
    told = message(root)
    assert str(root / "train" / "a" / "note00.txt") in told
    assert "and 2 more" in told


def test_a_decompression_bomb_is_refused(config, image_folder, monkeypatch):
    root = image_folder({"train/a": 2, "train/b": 1, "test/a": 1, "test/b": 1}, size=(8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # PIL warns above, and refuses above twice as many
    with pytest.raises(UserError, match="decompression bomb") as error:
        utils.load_dataset(replace(config, dataset=str(root)))
    assert str(root / "train" / "a" / "0.png") in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_or_a_format_that_starts_programs_is_no_image(config, image_folder):
    root = image_folder({"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1})
    os.mkfifo(root / "train" / "a" / "pipe.png")
    Image.new("RGB", (8, 8)).save(root / "train" / "a" / "program.eps")
    with pytest.raises(UserError) as error:
        utils.load_dataset(replace(config, dataset=str(root)))
    assert "pipe.png: cannot be read as an image (not a file)" in str(error.value)
    assert "program.eps: cannot be read as an image" in str(error.value)


def test_a_class_whose_name_is_not_utf8_is_refused(config, image_folder):
    root = image_folder({"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1})
    for split in ("train", "test"):
        os.rename(os.fsencode(root / split / "a"), os.fsencode(root / split) + b"/caf\xe9")
    with pytest.raises(UserError, match=r"has a name that is not UTF-8; rename the folder"):
        utils.load_dataset(replace(config, dataset=str(root)))


def test_links_in_circles_end(config, image_folder):
    root = image_folder({"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1})
    (root / "train" / "a" / "up").symlink_to(root, target_is_directory=True)
    with pytest.raises(UserError, match=r"train/a/up: cannot be read as an image"):
        utils.load_dataset(replace(config, dataset=str(root)))
    (root / "train" / "a" / "up").unlink()
    (root / "train" / "a" / "self.png").symlink_to(root / "train" / "a" / "self.png")
    with pytest.raises(UserError, match=r"self.png: cannot be read as an image"):
        utils.load_dataset(replace(config, dataset=str(root)))
    (root / "train" / "a" / "self.png").unlink()
    (root / "train" / "c").symlink_to(root / "train", target_is_directory=True)
    with pytest.raises(UserError, match="has no folder for class 'c'"):
        utils.load_dataset(replace(config, dataset=str(root)))


# Checkpoints


STATE = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "history": [{"loss": 0.5}], "classes": ["a", "b"]}


def test_a_checkpoint_comes_back_and_is_torchs_own_format(tmp_path):
    path = tmp_path / "a" / "b" / "model.pt"
    utils.save_checkpoint(path, STATE)
    for state in (utils.load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
        assert (state["history"], state["classes"]) == (STATE["history"], STATE["classes"])
    assert os.listdir(path.parent) == ["model.pt"]


def refused(path, content) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        utils.load_checkpoint(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_every_truncated_or_flipped_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    utils.save_checkpoint(path, STATE)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for length in random.choice(len(content), 50, replace=False):
        refused(path, content[:length])
    for bit in random.choice(8 * len(content), 200, replace=False):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(path, bytes(flipped))


def test_a_checkpoint_from_elsewhere_does_nothing(tmp_path, monkeypatch):
    path, bait = tmp_path / "model.pt", tmp_path / "bait"

    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(bait),))

    refused(path, pickle.dumps(Malicious()))
    buffer = io.BytesIO()
    torch.save({"format": 1, "model": Malicious()}, buffer)
    assert "no sha256" in refused(path, buffer.getvalue())
    utils.save_checkpoint(path, {"model": Malicious()})  # even with our digest
    assert "cannot be loaded" in refused(path, path.read_bytes())
    assert not bait.exists()
    with pytest.raises(UserError, match=r"nowhere.pt: cannot be read \(No such file"):
        utils.load_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    "wrong", ["name", "settings", "environment", "model", "history", "classes", "arch", "finished"]
)
def test_a_whole_file_that_holds_no_model_is_refused_by_what_is_wrong(tmp_path, wrong):
    path = tmp_path / "model.pt"
    about = {"name": "student", "settings": {}, "environment": {}, "history": [], "classes": [], "finished": True}
    utils.save_checkpoint(path, {**about, "model": {}, "arch": "resnet18"})
    assert utils.load_finished(path)
    utils.save_checkpoint(path, {**about, "model": {}, "arch": "resnet18", wrong: 7})
    with pytest.raises(UserError, match=rf"holds no model of ours \(wrong: {wrong}\)"):
        utils.load_finished(path)


def test_what_is_said_has_no_control_characters_and_ends_no_run(capsys, monkeypatch):
    utils.say("\x1b[2Jclass \u540d")
    assert capsys.readouterr().err == "\\x1b[2Jclass \u540d\n"

    def broken(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(utils.tqdm, "write", broken)
    utils.say("nobody reads this")


def test_another_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    monkeypatch.setattr(utils, "FORMAT", 2)
    utils.save_checkpoint(path, STATE)
    monkeypatch.undo()
    assert "has format 2, this program reads format 1" in refused(path, path.read_bytes())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a limit on file sizes is POSIX")
def test_a_file_size_limit_ends_a_save_like_a_full_disk(tmp_path):
    path = tmp_path / "model.pt"
    utils.save_checkpoint(path, STATE)
    code = f"""
import resource, torch, utils
from config import one_line_errors
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
with one_line_errors():
    utils.save_checkpoint({str(path)!r}, {{"model": {{"weight": torch.zeros(10**6)}}}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {path}: cannot be written (File too large); it takes 5 MB" in done.stderr
    assert torch.equal(utils.load_checkpoint(path)["model"]["weight"], STATE["model"]["weight"])
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failing_save_keeps_the_old_state_and_leaves_nothing_behind(tmp_path, monkeypatch, fails):
    path = tmp_path / "model.pt"
    utils.save_checkpoint(path, STATE)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(UserError, match=r"model.pt: cannot be written \(No space left on device\); it takes 1 MB"):
        utils.save_checkpoint(path, {"model": {}})
    assert torch.equal(utils.load_checkpoint(path)["model"]["weight"], STATE["model"]["weight"])
    assert os.listdir(tmp_path) == ["model.pt"]


def test_other_settings_are_refused_by_name(config, digits):
    path = Path("model.pt")
    settings = utils.training_settings("student_kd", 0, config, digits, "a" * 64)
    utils.refuse_other_settings(path, {"name": "student_kd", "settings": settings}, settings)
    recipes = {**config.recipes, "student_kd": replace(config.recipes["student_kd"], temperature=4.0)}
    changed = replace(config, recipes=recipes, batch_size=20)
    other = utils.training_settings("student_kd", 0, changed, digits, "b" * 64)
    with pytest.raises(UserError) as error:
        utils.refuse_other_settings(path, {"name": "student_kd", "settings": settings}, other)
    told = str(error.value)
    assert "student_kd.temperature was 5.0, is now 4.0; batch_size was 25, is now 20" in told
    assert "weights of the teacher was aaaaaaaaaaaa..., is now bbbbbbbbbbbb..." in told
    assert "--overwrite" in told
    with pytest.raises(UserError, match="seed was 0, is now 1"):
        utils.refuse_other_settings(path, {"name": "student_kd", "settings": settings}, {**settings, "seed": 1})


def test_a_checkpoint_older_than_a_setting_was_made_with_its_default(config, digits):
    settings = utils.training_settings("student", 0, config, digits, None)
    older = {field: value for field, value in settings.items() if field != "sync_batchnorm"}
    utils.refuse_other_settings(Path("model.pt"), {"name": "student", "settings": older}, settings)
    with pytest.raises(UserError, match="sync_batchnorm was False, is now True"):
        utils.refuse_other_settings(
            Path("model.pt"), {"name": "student", "settings": older}, {**settings, "sync_batchnorm": True}
        )


def test_a_device_that_is_not_there_is_refused(config):
    with pytest.raises(UserError, match="CUDA devices"):
        utils.resolve(replace(config, device="cuda:99"))


def test_deterministic_is_a_switch_of_torch(config):
    try:
        utils.tune(replace(config, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        utils.tune(config)
    assert not torch.are_deterministic_algorithms_enabled()


# The lock on a run's folder


def test_a_second_process_is_refused_and_a_dead_one_blocks_nobody(tmp_path):
    folder = tmp_path / "run"
    code = f"""
import pathlib, sys, time, utils
with utils.locked(pathlib.Path({str(folder)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match=f"{folder}: process {other.pid} on .* is writing there"),
        utils.locked(folder),
    ):
        pass
    other.kill()
    other.wait()
    for _ in range(2):  # an orderly end gives it back as well
        with utils.locked(folder):
            assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not folder.exists()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    taken, flock = [], utils.fcntl.flock

    def slow_flock(file, how):
        if not taken:  # as if the process that held the lock ended just now
            os.remove(tmp_path / ".lock")
        taken.append(file)
        flock(file, how)

    monkeypatch.setattr(utils.fcntl, "flock", slow_flock)
    with utils.locked(tmp_path):
        assert len(taken) == 2
        assert os.path.samestat(os.fstat(taken[1].fileno()), os.stat(tmp_path / ".lock"))


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="a POSIX flag")
def test_a_lock_that_is_a_link_harms_nobody(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match="cannot be written"), utils.locked(tmp_path / "run"):
        pass
    assert victim.read_text() == "precious"


# Several processes


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_the_parts_of_all_processes_are_everything_once(monkeypatch, processes):
    monkeypatch.setattr(utils, "processes", lambda: processes)
    for n in (0, 1, 5, 100, 10_000):
        parts = []
        for rank in range(processes):
            monkeypatch.setattr(utils, "rank", lambda rank=rank: rank)
            parts.append(range(n)[utils.own_part(n)])
        assert [number for part in parts for number in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_all_processes_together_see_the_batches_of_one(config, digits, monkeypatch):
    alone = list(utils.batches(digits.train, digits.subset(75), config, seed=1, epoch=2))
    monkeypatch.setattr(utils, "processes", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(utils, "rank", lambda rank=rank: rank)
        shares.append(list(utils.batches(digits.train, digits.subset(75), config, seed=1, epoch=2)))
    for batch, *parts in zip(alone, *shares, strict=True):
        for whole, *pieces in zip(batch, *parts, strict=True):
            assert torch.equal(whole, torch.cat(pieces))


def test_with_several_processes_the_device_is_each_ones_own(config, monkeypatch):
    monkeypatch.setattr(utils, "processes", lambda: 2)
    assert utils.resolve(config).device == "cpu"
    for changes, message in (
        ({"device": "cuda:0"}, "with several processes takes cuda"),
        ({"batch_size": 3}, "batch_size = 3: takes 2 images or more for each of 2 processes"),
    ):
        with pytest.raises(UserError, match=message):
            utils.resolve(replace(config, **changes))
