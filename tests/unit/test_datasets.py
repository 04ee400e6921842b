import hashlib
import pickle
import shutil
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from torchvision.transforms import v2

from config import PRESETS
from engine import datasets, sources
from engine.device import AUGMENTATION, DROPOUT, seed_torch
from engine.errors import UserError
from engine.images import prepare
from engine.recipes import Recipe
from teacher_student_model import stored_logits


def epoch_of(config, dataset, seed=0, epoch=0, first_step=0, subset=None):
    subset = dataset.subset(None) if subset is None else subset
    return list(datasets.batches(dataset.train, subset, config, seed, epoch, first_step))


def test_a_batch_is_a_function_of_seed_epoch_and_step(config, digits):
    whole = epoch_of(config, digits, seed=3, epoch=2)
    torch.rand(7)  # nothing else that draws random numbers matters
    again = epoch_of(config, digits, seed=3, epoch=2, first_step=40)
    assert len(whole) == 1297 // 25
    for one, other in zip(whole[40:], again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    orders = {tuple(epoch_of(config, digits, seed, epoch)[0].indices.tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_an_epoch_has_each_image_at_most_once_and_drops_different_ones(config, digits):
    shown = [torch.cat([b.indices for b in epoch_of(config, digits, epoch=epoch)]).tolist() for epoch in (0, 1)]
    for indices in shown:
        assert len(indices) == len(set(indices)) == 1297 // 25 * 25
    assert set(shown[0]) != set(shown[1])


def test_a_batch_holds_the_images_of_its_index(config, digits):
    for batch in epoch_of(config, digits)[:3]:
        assert torch.equal(batch.labels, digits.train.labels[batch.indices])
        for image, index, flipped in zip(batch.images, batch.indices, batch.flipped, strict=True):
            source = digits.train.images[index]
            source = torch.flip(source, dims=[-1]) if flipped else source
            torch.testing.assert_close(image, prepare(source[None], 16)[0], atol=0, rtol=0)


def test_crop_padding_shifts_images_and_changes_nothing_else(config, digits):
    plain, shifted = (epoch_of(replace(config, crop_padding=p), digits)[0] for p in (0, 2))
    assert torch.equal(plain.labels, shifted.labels)
    assert torch.equal(plain.indices, shifted.indices)
    assert shifted.flipped is None  # so that no logits stored for two views are looked up
    different = (plain.images != shifted.images).flatten(1).any(1).float().mean()
    assert different > 0.7  # one in 25 is not shifted, and some have nothing at the edge to lose


def test_the_order_of_the_images_is_numpys_for_seed_and_epoch(config, digits):
    """Pinned: the stream of NumPy's generator for (3, 2), of which ten drawn numbers are 7 4 1 8 6 0 2 9 3 5."""
    subset = torch.arange(100, 110)
    shown = torch.cat(
        [b.indices for b in epoch_of(replace(config, batch_size=2), digits, subset=subset, seed=3, epoch=2)]
    )
    assert shown.tolist() == [107, 104, 101, 108, 106, 100, 102, 109, 103, 105]


AUGMENTATIONS = ["crop", "trivialaugment", "randomerasing"]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmented_batch_is_a_function_of_seed_epoch_and_step(config, digits, name):
    config = replace(config, augment=name, image_size=8, batch_size=10)
    how = {"seed": 1, "epoch": 2, "subset": digits.subset(60)}
    plain = epoch_of(replace(config, augment="none"), digits, **how)
    first, again = (epoch_of(config, digits, **how) for _ in range(2))
    resumed = epoch_of(config, digits, **how, first_step=3)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first[3:], resumed, strict=True))
    changed = [(a.images != b.images).flatten(1).any(1) for a, b in zip(plain, first, strict=True)]
    assert torch.cat(changed).float().mean() > 0.3  # randomerasing: half of them, and some boxes lie in the margin
    other = epoch_of(config, digits, **{**how, "epoch": 3})
    assert not any(torch.equal(a.images, b.images) for a, b in zip(first, other, strict=True))


def test_trivialaugment_is_torchvisions_with_random_numbers_of_its_own_for_each_image(config, digits):
    config = replace(config, image_size=8, batch_size=10)
    plain, found = (epoch_of(replace(config, augment=a), digits, 1, 2)[1] for a in ("none", "trivialaugment"))
    theirs = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
    for number, (index, flipped, image) in enumerate(zip(plain.indices, plain.flipped, found.images, strict=True), 10):
        seed_torch(AUGMENTATION, 1, 2, number)
        original = digits.train.images[index]
        expected = theirs(original.flip(2) if flipped else original)
        assert torch.equal(image, prepare(expected[None])[0])


def test_a_thread_that_works_ahead_changes_nothing(config, digits, monkeypatch):
    config = replace(config, augment="trivialaugment", crop_padding=1)
    how = {"seed": 1, "epoch": 2, "subset": digits.subset(75)}
    expected = epoch_of(replace(config, deterministic=True), digits, **how)
    monkeypatch.setattr(datasets, "augments_on_host", lambda _: True)
    seed_torch(DROPOUT, 0)
    drawn = torch.rand(3)
    for batch, other in zip(expected, epoch_of(replace(config, deterministic=False), digits, **how), strict=True):
        assert torch.equal(batch.images, other.images)
        seed_torch(DROPOUT, 0)  # what the training loop does, while the thread draws
        assert torch.equal(torch.rand(3), drawn)


def test_one_ahead_keeps_the_order_and_computes_one_in_advance():
    began, ended = [], []

    def work(number):
        began.append(number)
        if number == 3:
            raise UserError("the fourth")
        ended.append(number)
        return number

    results = datasets.one_ahead(work, range(5))
    assert next(results) == 0
    assert next(results) == 1
    assert began[:2] == [0, 1]
    assert set(began) <= {0, 1, 2}
    assert next(results) == 2
    with pytest.raises(UserError, match="the fourth"):
        next(results)
    assert 4 not in ended or began == [0, 1, 2, 3, 4]
    unfinished = datasets.one_ahead(work, range(3))
    assert next(unfinished) == 0
    unfinished.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmented_batches_have_no_view_and_leave_the_generator_alone(config, digits, name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batch = epoch_of(replace(config, augment=name), digits, subset=digits.subset(50))[0]
    assert torch.equal(torch.rand(3), expected)
    assert batch.flipped is None
    with pytest.raises(ValueError, match="use OnlineTeacher"):
        stored_logits(torch.zeros(2, 1297, 10))(batch)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_flipped_images(config, digits, share):
    config = replace(config, horizontal_flip=share)
    flipped = torch.cat([b.flipped for epoch in range(3) for b in epoch_of(config, digits, epoch=epoch)])
    assert flipped.float().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / len(flipped)) ** 0.5)


def test_a_subset_is_stratified_and_always_the_same(config, digits):
    subset = digits.subset(200)
    assert torch.equal(subset, digits.subset(200))
    counts = torch.bincount(digits.train.labels[subset])
    share = torch.bincount(digits.train.labels) * 200 / 1297
    assert (counts - share).abs().max() < 1
    shown = torch.cat([batch.indices for batch in epoch_of(config, digits, subset=subset)])
    assert set(shown.tolist()) == set(subset.tolist())


def test_another_subset_is_as_stratified_and_overlaps_by_chance(digits):
    first, other = (set(digits.subset(200, choice).tolist()) for choice in (0, 1))
    assert other == set(digits.subset(200, 1).tolist())
    counts = torch.bincount(digits.train.labels[digits.subset(200, 1)])
    assert (counts - torch.bincount(digits.train.labels) * 200 / 1297).abs().max() < 1
    expected = 200 * 200 / 1297  # hypergeometric, with a standard deviation of 4.7
    assert abs(len(first & other) - expected) < 5 * 4.7


def test_digits_match_scikit_learn(digits):
    assert digits.classes == tuple("0123456789")
    assert digits.train.images.shape == (1297, 3, 8, 8)
    assert digits.test.images.shape == (500, 3, 8, 8)
    assert digits.test.images.max() == 255
    assert torch.bincount(digits.test.labels).min() >= 48
    together = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    assert len(torch.unique(together, dim=0)) == len(together)  # no image is in both


def test_validation_images_are_held_out(config, digits):
    with_validation = datasets.load_dataset(replace(config, validation_size=100))
    assert with_validation.held_out == ("validation", with_validation.validation)
    assert digits.held_out == ("test", digits.test)
    train, validation = (set(map(bytes, s.images.flatten(1).cpu().numpy())) for s in with_validation[1:3])
    assert (len(train), len(validation), len(train & validation)) == (1197, 100, 0)
    assert Counter(with_validation.validation.labels.tolist()).most_common()[-1][1] >= 9
    assert torch.equal(with_validation.test.images, digits.test.images)


def test_dividing_a_split_is_selecting_its_parts(digits):
    train = digits.train._replace(images=digits.train.images.cpu().clone(), labels=digits.train.labels.cpu())
    first, second = sources.stratified(train.labels, 900, "size")
    expected = train.select(first), train.select(second)
    for found, part in zip(train.divide(first, second), expected, strict=True):
        assert torch.equal(found.images, part.images)
        assert torch.equal(found.labels, part.labels)


def test_more_images_than_memory_are_refused_before_they_are_read(config, image_folder, monkeypatch):
    root = image_folder({f"{split}/{c}": 40 for split in ("train", "test") for c in "ab"})
    config = replace(config, recipes=PRESETS["cifar10"].recipes)
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 9 kB MemAvailable: 30 kB")
    with pytest.raises(UserError, match="160 images of 8 x 8 px"):  # 30,720 bytes
        datasets.load_dataset(replace(config, dataset=str(root)))
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 9 kB MemAvailable: 31 kB")
    datasets.load_dataset(replace(config, dataset=str(root)))


def test_images_of_training_and_test_set_that_are_the_same_are_counted(config, image_folder, capsys):
    root = image_folder({f"train/{c}": 20 for c in "ab"} | {f"val/{c}": 2 for c in "ab"} | {"test/b": 3})
    (root / "test" / "a").symlink_to(root / "train" / "a", target_is_directory=True)
    config = replace(config, recipes=PRESETS["cifar10"].recipes)
    for split in ("train", "test"):
        shutil.copy(root / "train" / "b" / "7.png", root / split / "b" / "copy.png")
    assert datasets.load_dataset(replace(config, dataset=str(root))).shared == 21
    assert "21 of 24 test images are training images" in capsys.readouterr().err


def test_a_kept_epoch_needs_no_validation_images_once_it_is_trained(config, image_folder):
    root = image_folder({f"{split}/{c}": 6 for split in ("train", "test") for c in "ab"})
    recipes = {"student": Recipe(keep="best", epochs=9)}
    config = replace(config, recipes=recipes, dataset=str(root), batch_size=2, validation_size=0)
    with pytest.raises(UserError, match="needs validation images"):
        datasets.load_dataset(config)
    assert datasets.load_dataset(config, trained=True).validation is None


def test_the_same_image_is_found_in_parts_that_are_stored_in_different_sizes(config, image_folder):
    root = image_folder({"train/a": 6, "train/b": 6, "test/a": 1, "test/b": 1}, size=(12, 12))
    shutil.copy(root / "train/a/5.png", root / "test/a/5.png")
    image_folder({"test/b": 1}, size=(14, 10))
    config = replace(config, recipes=PRESETS["cifar10"].recipes, dataset=str(root), batch_size=2, image_size=16)
    dataset = datasets.load_dataset(config)
    assert dataset.train.images.shape[2:] != dataset.test.images.shape[2:]
    assert dataset.shared == 1


def cifar10(folder: Path):
    return replace(PRESETS["cifar10"], data_path=str(folder.parent), batch_size=10, device="cpu")


def test_cifar10_is_read_through_torchvision(miniature_cifar10):
    dataset = datasets.load_dataset(cifar10(miniature_cifar10))
    assert dataset.classes == ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert (dataset.train.images.shape, dataset.test.images.shape) == ((100, 3, 32, 32), (20, 3, 32, 32))
    raw = pickle.loads((miniature_cifar10 / "data_batch_1").read_bytes())["data"]
    assert torch.equal(dataset.train.images[:20].flatten(1), torch.from_numpy(raw))  # red, green, blue planes
    assert dataset.train.labels.tolist() == [*range(10)] * 10


def test_cifar10_is_unpacked_from_an_archive_in_data_path(miniature_cifar10, monkeypatch):
    archive = miniature_cifar10.parent / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(miniature_cifar10, arcname=miniature_cifar10.name)
    for file in miniature_cifar10.iterdir():
        file.unlink()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(datasets.load_dataset(cifar10(miniature_cifar10)).train.labels) == 100


def test_without_network_the_error_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nothing listens there
    with pytest.raises(UserError) as error:
        datasets.load_dataset(cifar10(tmp_path / "data" / "x"))
    for part in ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", f"{tmp_path}/data", "--preset demo"):
        assert part in str(error.value)


def test_a_damaged_archive_is_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    (tmp_path / CIFAR10.filename).write_bytes(b"the first half")
    with pytest.raises(UserError, match=rf"{tmp_path / CIFAR10.filename}: is damaged"):
        datasets.load_dataset(cifar10(tmp_path / "x"))


def test_cifar100_and_svhn_are_read_through_torchvision(tmp_path, monkeypatch):
    """Miniatures with torchvision's file formats."""
    random, files = np.random.default_rng(0), {}
    coarse = {"data": random.integers(0, 256, (6, 3072), dtype=np.uint8), "fine_labels": [0, 1, 2] * 2}
    names = [f"class{n}" for n in range(3)]
    (tmp_path / CIFAR100.base_folder).mkdir()
    for name, content in (("train", coarse), ("test", coarse), ("meta", {"fine_label_names": names})):
        path = tmp_path / CIFAR100.base_folder / name
        path.write_bytes(pickle.dumps(content))
        files[name] = [name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(CIFAR100, "train_list", [files["train"]])
    monkeypatch.setattr(CIFAR100, "test_list", [files["test"]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": files["meta"][1]})
    images = random.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    labels = np.arange(1, 11).reshape(-1, 1)  # MATLAB's, in which 10 is the digit 0
    splits = {}
    for split in ("train", "test"):
        path = tmp_path / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": images, "y": labels})
        splits[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", splits)
    config = replace(PRESETS["scratch"], data_path=str(tmp_path), batch_size=2, device="cpu")
    cifar100 = datasets.load_dataset(replace(config, dataset="cifar100"))
    assert cifar100.classes == ("class0", "class1", "class2")
    assert torch.equal(cifar100.train.images.flatten(1), torch.from_numpy(coarse["data"]))
    svhn = datasets.load_dataset(replace(config, dataset="svhn"))
    assert svhn.classes == tuple("0123456789")
    assert svhn.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert torch.equal(svhn.test.images[3], torch.from_numpy(images[..., 3]).permute(2, 0, 1))


@pytest.mark.parametrize(("name", "file"), [("cifar100", "cifar-100-python.tar.gz"), ("svhn", "test_32x32.mat")])
def test_other_data_sets_offline_say_which_file_to_put_where(tmp_path, monkeypatch, name, file):
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/x")
    monkeypatch.setattr(SVHN, "split_list", {s: ["http://127.0.0.1:9/x", *v[1:]] for s, v in SVHN.split_list.items()})
    with pytest.raises(UserError, match=rf"{name} is not in .*{file}"):
        datasets.load_dataset(replace(PRESETS["scratch"], dataset=name, data_path=str(tmp_path), device="cpu"))


def test_a_batch_size_above_the_number_of_images_is_refused(miniature_cifar10):
    config = replace(cifar10(miniature_cifar10), batch_size=101)
    with pytest.raises(UserError, match=r"batch_size = 101.*has 100"):
        datasets.load_dataset(config)
    with pytest.raises(UserError, match=r"batch_size = 60.*has 100, of which validation_size = 50"):
        datasets.load_dataset(replace(config, batch_size=60, validation_size=50))


@pytest.mark.parametrize("steps", range(1, 13))
def test_onecycle_is_refused_for_so_few_steps_that_it_never_reaches_its_peak(config, steps):
    """Against PyTorch's own schedule. Its last step is not counted: it ends at lr / 250,000."""
    row = replace(config.recipes["student"], lr=1.0, schedule="onecycle", epochs=1, train_size=50 * steps)
    config = replace(config, recipes={"student": row}, batch_size=50)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=steps), []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()
    if steps < 5:
        assert max(rates) < 0.95 or steps == 3
        with pytest.raises(UserError, match=rf"student\.schedule = 'onecycle': .* trains for {steps}; "):
            datasets.load_dataset(config)
    else:
        assert max(rates) > 0.95
        datasets.load_dataset(config)


def test_the_steps_of_onecycle_are_those_of_selected_recipes_over_all_epochs(config):
    row = replace(config.recipes["student"], schedule="onecycle", epochs=1)  # 100 images in batches of 25
    few = replace(config, recipes={**config.recipes, "student": row})
    with pytest.raises(UserError, match=r"student\.schedule"):
        datasets.load_dataset(few)
    datasets.load_dataset(replace(few, only=("teacher",)))
    for changes in ({"epochs": 2}, {"train_size": None}, {"schedule": "cosine"}):
        datasets.load_dataset(replace(config, recipes={**config.recipes, "student": replace(row, **changes)}))


def test_impossible_sizes_are_refused_naming_the_recipe(config):
    recipes = {**config.recipes, "student": replace(config.recipes["student"], train_size=1290)}
    with pytest.raises(UserError, match=r"student.train_size = 1290: must select and leave at least one image"):
        datasets.load_dataset(replace(config, recipes=recipes))
    datasets.load_dataset(replace(config, recipes=recipes, only=("teacher",)))
    for padding in (8, 100):  # digits are 8 pixels wide
        with pytest.raises(UserError, match=f"crop_padding = {padding}: must be less than the 8 pixels"):
            datasets.load_dataset(replace(config, crop_padding=padding))


def test_jobs_need_images_that_fit_on_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 1000))
    with pytest.raises(UserError, match="jobs = 2: must be 1, as the images do not fit"):
        datasets.load_dataset(replace(PRESETS["demo"], device="cuda", jobs=2))
