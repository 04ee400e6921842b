import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from config import PRESETS
from engine import datasets, sources
from engine.errors import UserError


def folder_config(config, root):
    return replace(config, dataset=str(root), image_size=16, batch_size=2, recipes=PRESETS["cifar10"].recipes)


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_is_read_class_by_class(config, image_folder, test):
    root = image_folder({"train/ox": 3, "train/ant": 2, f"{test}/ant": 1, f"{test}/ox": 1})
    (root / "train" / "ox" / ".DS_Store").write_text("not an image")
    Image.new("L", (8, 8), 77).save(root / "train" / "ox" / "grey.jpg")
    dataset = datasets.load_dataset(folder_config(config, root))
    assert dataset.classes == ("ant", "ox")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert dataset.train.images.shape == (6, 3, 8, 8)
    assert dataset.train.images[-1].unique().tolist() == [77]
    first = torch.from_numpy(np.array(Image.open(root / "train" / "ant" / "0.png"))).permute(2, 0, 1)
    assert torch.equal(dataset.train.images[0].cpu(), first)


def test_images_of_different_and_of_large_sizes_are_resized_while_reading(config, image_folder):
    sizes = {"a": (8, 8), "b": (5, 9), "c": (40, 30), "d": (8, 8)}
    for name, size in sizes.items():
        root = image_folder({f"train/{name}": 2, f"test/{name}": 1}, size=size)
    dataset = datasets.load_dataset(folder_config(config, root))
    for image, path in zip(dataset.train.images, (f"{c}/{i}.png" for c in sizes for i in range(2)), strict=True):
        expected = transforms.Resize((16, 16))(Image.open(root / "train" / path))
        assert torch.equal(image.cpu(), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_class_folders_that_only_look_the_same_are_said(config, image_folder):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = image_folder({"train/a": 2, f"train/{composed}": 2, "test/a": 1, f"test/{decomposed}": 1})
    with pytest.raises(UserError) as refused:
        datasets.load_dataset(folder_config(config, root))
    assert [message.endswith("Unicode form") for message in refused.value.messages] == [True, True]


def test_a_panorama_that_is_too_large_once_it_is_padded_is_named_or_left_out(config, image_folder):
    image_folder({"train/a": 1}, size=(300, 30))
    root = image_folder({"train/a": 3, "train/b": 2, "test/a": 1, "test/b": 1})
    Image.new("RGB", (300, 30)).save(root / "train/a/panorama.png")
    config = replace(folder_config(config, root), largest_image=0.01, resize="pad")
    with pytest.raises(UserError, match=r"panorama\.png: cannot be read as an image .* --largest_image"):
        datasets.load_dataset(config)
    assert len(datasets.load_dataset(replace(config, skip_unreadable=True)).train.labels) == 5
    assert len(datasets.load_dataset(replace(config, resize="crop")).train.labels) == 6


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (5, 8), (9, 9)])
@pytest.mark.parametrize("how", ["crop", "pad"])
def test_images_become_squares_as_pil_crops_and_pastes(config, image_folder, how, size):
    root = image_folder({"train/a": 2, "train/b": 1, "test/a": 1, "test/b": 1}, size=size)
    dataset = datasets.load_dataset(replace(folder_config(config, root), resize=how))
    with Image.open(root / "train" / "a" / "1.png") as original:
        expected = {
            ("crop", (40, 30)): lambda: original.crop((5, 0, 35, 30)),
            ("crop", (30, 41)): lambda: original.crop((0, 5, 30, 35)),
            ("crop", (5, 8)): lambda: original.crop((0, 1, 5, 6)),
            ("pad", (40, 30)): lambda: on_black(original, 40, (0, 5)),
            ("pad", (30, 41)): lambda: on_black(original, 41, (5, 0)),
            ("pad", (5, 8)): lambda: on_black(original, 8, (1, 0)),
        }.get((how, size), original.copy)()
    if max(expected.size) > 16:
        expected = expected.resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(dataset.train.images[1].permute(1, 2, 0).cpu(), expected)


def on_black(image, side, corner):
    """Pillow's canvas; where a pixel cannot be shared out evenly, `pad` puts it right or below."""
    canvas = Image.new("RGB", (side, side))
    canvas.paste(image, corner)
    return canvas


def test_problems_of_a_folder_are_reported(config, image_folder, tmp_path):
    def message(root):
        with pytest.raises(UserError) as error:
            datasets.load_dataset(folder_config(config, root))
        return str(error.value)

    assert "no such folder" in message(tmp_path / "nowhere")
    assert "did you mean cifar10?" in message("cifra10")
    root = image_folder({"test/a": 1, "test/c": 1})
    assert "has no folder train/" in message(root)
    image_folder({"train/a": 2, "train/b": 2})
    output = message(root)
    assert f"{root / 'test'}: has no folder for class 'b'" in output
    assert f"{root / 'train'}: has no folder for class 'c'" in output
    image_folder({"test/b": 0, "train/c": 1})
    assert f"{root / 'test' / 'b'}: holds no images" in message(root)
    image_folder({"test/b": 1})
    for number in range(12):
        (root / "train" / "a" / f"broken{number:02}.png").write_text("hello")
    output = message(root)
    assert str(root / "train" / "a" / "broken00.png") in output
    assert "and 2 more" in output


def test_files_that_are_no_images_are_skipped_and_named(config, image_folder, capsys):
    root = image_folder({f"{split}/{name}": 2 for split in ("train", "test") for name in "ab"})
    (root / "train" / "notes.txt").write_text("hello")
    (root / "train" / "b" / "Thumbs.db").write_bytes(b"\0")
    (root / "train" / "b" / "more").mkdir()
    (root / "train" / "b" / "more" / "list.csv").write_text("hello")
    assert len(datasets.load_dataset(folder_config(config, root)).train.labels) == 4
    output = capsys.readouterr().err
    for name in ("notes.txt", "b/Thumbs.db", "b/more/list.csv"):
        assert str(root / "train" / name) in output
    assert f"{root / 'train'}: skipped, as they are not images" in output


@pytest.mark.parametrize("names", [("Training", "Testing", "VALID"), ("TRAIN", "test", "Validation")])
def test_split_folders_have_several_names_and_classes_have_sub_folders(config, image_folder, capsys, names):
    train, test, val = names
    counts = {f"{train}/{c}/day{day}": 3 for c in "ab" for day in (1, 2)} | {f"{train}/a": 1, f"{train}/a/.thumbs": 1}
    counts |= {f"{val}/{c}/x/y": 2 for c in "ab"} | {f"{test}/{c}": 1 for c in "ab"} | {"extra/a": 1, "notes": 0}
    root = image_folder(counts)
    dataset = datasets.load_dataset(folder_config(config, root))
    assert [s.labels.tolist() for s in dataset[1:4]] == [[0] * 7 + [1] * 6, [0, 0, 1, 1], [0, 1]]
    (line,) = capsys.readouterr().err.splitlines()
    assert "extra/, notes/" in line
    image_folder({"validate": 0, "val/a": 1, "valid/a": 1})
    with pytest.raises(UserError, match="rename one of them"):
        datasets.load_dataset(folder_config(config, root))


def test_train_may_be_the_name_of_a_class(config, image_folder):
    root = image_folder({"train": 10, "plane": 5, "car": 5})
    assert datasets.load_dataset(folder_config(config, root)).classes == ("car", "plane", "train")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (
            {f"archive/{s}/{c}": 1 for s in ("train", "test") for c in "ab"},
            "archive/, which holds the folders test",
        ),
        ({f"train/train/{c}": 1 for c in "ab"}, "train/, which holds the folders a, b"),
        ({"train/a": 1, "train/b": 1, "test": 3}, "test: has no folder for each class"),
        ({"train": 3, "test": 3}, "train: has no folder for each class"),
    ],
)
def test_folders_that_lie_elsewhere_are_explained(config, image_folder, counts, words):
    with pytest.raises(UserError) as error:
        datasets.load_dataset(folder_config(config, image_folder(counts)))
    assert words in str(error.value)


def test_unreadable_images_can_be_left_out_and_are_listed(config, image_folder):
    root = image_folder({f"{split}/{c}": 3 for split in ("train", "test") for c in "ab"})
    (root / "train" / "a" / "0.png").write_bytes(b"hello")
    cut = root / "test" / "b" / "1.png"
    cut.write_bytes(cut.read_bytes()[:100])  # its header can be read
    config = replace(folder_config(config, root), skip_unreadable=True)
    dataset = datasets.load_dataset(config)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 0, 0, 1, 1]
    last = torch.from_numpy(np.array(Image.open(root / "test" / "b" / "2.png"))).permute(2, 0, 1)
    assert torch.equal(dataset.test.images[4].cpu(), last)
    assert [message.split(":")[0] for message in dataset.unreadable] == [str(root / "train/a/0.png"), str(cut)]
    for number in (0, 2):
        (root / "test" / "b" / f"{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"test: no image of b can be read"):
        datasets.load_dataset(config)


def test_val_holds_the_validation_images_if_there_is_a_test_folder(config, image_folder):
    root = image_folder({f"{split}/{c}": n for split, n in (("train", 3), ("val", 2), ("test", 1)) for c in "ab"})
    dataset = datasets.load_dataset(folder_config(config, root))
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [6, 4, 2]
    assert dataset.held_out[0] == "validation"
    with pytest.raises(UserError, match=r"validation_size = 2: .* has a folder val/ for that"):
        datasets.load_dataset(replace(folder_config(config, root), validation_size=2))


@pytest.mark.parametrize("parent", ["train/", ""])
def test_a_folder_without_test_images_is_split(config, image_folder, capsys, parent):
    root = image_folder({f"{parent}a": 20, f"{parent}b": 10})
    first, second = (datasets.load_dataset(folder_config(config, root)) for _ in range(2))
    assert first.train.labels.bincount().tolist() == [16, 8]
    assert first.test.labels.bincount().tolist() == [4, 2]
    assert torch.equal(first.test.images, second.test.images)
    assert "6 of its 30 images, stratified by class, are the test images" in capsys.readouterr().err


@pytest.mark.parametrize("rare", [1, 2])
def test_a_class_that_is_too_rare_to_be_split_is_refused(config, image_folder, rare):
    """scikit-learn rounds so that a class may have no image on one side."""
    with pytest.raises(UserError, match="too few images of a class to hold out a fifth of each class"):
        datasets.load_dataset(folder_config(config, image_folder({"a": 100, "b": rare})))


def test_a_decompression_bomb_is_refused_unless_it_is_allowed(config, image_folder):
    root = image_folder({"train/a": 2, "train/b": 1, "test/a": 1, "test/b": 1}, size=(8, 8))
    config = folder_config(config, root)
    for megapixels in (63e-6, 31e-6):  # PIL warns above a limit, and refuses above twice the limit
        with pytest.raises(UserError, match=r"decompression bomb.*--largest_image") as error:
            datasets.load_dataset(replace(config, largest_image=megapixels))
        assert str(root / "train" / "a" / "0.png") in str(error.value)
    assert len(datasets.load_dataset(replace(config, largest_image=64e-6)).train.labels) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_pipes_and_postscript_files_are_refused(config, image_folder, capsys):
    root = image_folder({"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1})
    os.mkfifo(root / "train" / "a" / "pipe.png")
    Image.new("RGB", (8, 8)).save(root / "train" / "a" / "program.eps")
    with pytest.raises(UserError, match=r"pipe.png: cannot be read as an image \(not a file\)"):
        datasets.load_dataset(replace(config, dataset=str(root)))
    assert "program.eps" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"program.eps: cannot be read as an image"):
        sources.open_image(root / "train" / "a" / "program.eps")


def test_an_image_of_16_bits_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits per channel"):  # PIL would make all of it white
        sources.open_image(tmp_path / "deep.png")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_class_whose_name_is_not_utf8_is_refused(config, image_folder):
    root = image_folder({"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1})
    for split in ("train", "test"):
        os.rename(os.fsencode(root / split / "a"), os.fsencode(root / split) + b"/caf\xe9")
    with pytest.raises(UserError, match=r"is not UTF-8; rename the folder"):
        datasets.load_dataset(replace(config, dataset=str(root)))


def test_circular_links_are_reported(config, image_folder, capsys):
    root = image_folder({"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1})
    (root / "train" / "a" / "up").symlink_to(root, target_is_directory=True)
    datasets.load_dataset(folder_config(config, root))
    assert "skipped, as they are not images: " + str(root / "train" / "a" / "up") in capsys.readouterr().err
    (root / "train" / "a" / "up").unlink()
    (root / "train" / "a" / "self.png").symlink_to(root / "train" / "a" / "self.png")
    with pytest.raises(UserError, match=r"self.png: cannot be read as an image"):
        datasets.load_dataset(replace(config, dataset=str(root)))
    (root / "train" / "a" / "self.png").unlink()
    (root / "train" / "c").symlink_to(root / "train", target_is_directory=True)
    with pytest.raises(UserError, match="has no folder for class 'c'"):
        datasets.load_dataset(replace(config, dataset=str(root)))


def test_exif_orientation_is_applied(config, image_folder, tmp_path):
    """The same images, stored upright and as a camera that was held sideways stores them."""
    upright = image_folder({f"{s}/{c}": 2 for s in ("train", "test") for c in "ab"}, size=(9, 9))
    rotated = tmp_path / "rotated"
    for path in upright.rglob("*.png"):
        (rotated / path.relative_to(upright)).parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
        Image.open(path).rotate(90, expand=True).save(rotated / path.relative_to(upright), exif=exif)
    one, other = (datasets.load_dataset(folder_config(config, root)) for root in (upright, rotated))
    assert torch.equal(one.train.images, other.train.images)
    assert one.digest == other.digest


@pytest.mark.parametrize("exif", [b"garbage" * 3, b"MM\0*\0\0\0\x08\0\x09", b""], ids=["header", "truncated", "empty"])
def test_an_orientation_that_cannot_be_read_is_none(tmp_path, recwarn, exif):
    image = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(4, 3, 3))
    image.save(tmp_path / "image.png", exif=b"Exif\0\0" + exif)
    assert np.array_equal(sources.open_image(tmp_path / "image.png"), image)
    assert not recwarn.list


def test_a_truncated_image_stays_an_error(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    (tmp_path / "image.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as an image"):
        sources.open_image(tmp_path / "image.png")


def test_of_an_animated_image_the_first_frame_is_used_and_that_is_said_once(tmp_path, capsys):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    sources.say_that_the_first_frame_is_used.cache_clear()
    for _ in range(2):
        assert sources.open_image(tmp_path / "image.gif").getpixel((0, 0)) == (255, 0, 0)
    assert capsys.readouterr().err.count("first frame") == 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))  # its hidden colour is red
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([10, 20, 30, 200, 0, 0])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "image.png", transparency=1)
    else:
        image.convert(mode).save(tmp_path / "image.png")
    read = sources.open_image(tmp_path / "image.png")
    assert read.getpixel((1, 0)) == (255, 255, 255)
    assert read.getpixel((0, 0)) != (255, 255, 255)
