"""Where images come from: a folder, torchvision's data sets, scikit-learn's digits, a data set of the user's.

Each is read once into uint8 tensors.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from engine import named
from engine.console import Progress, log
from engine.errors import UserError, at_most_ten, first_line
from engine.files import check_file
from engine.settings import Config


class Split(NamedTuple):
    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: torch.Tensor  # (N,) int64

    def select(self, indices: torch.Tensor) -> "Split":
        return Split(self.images[indices], self.labels[indices])


# The classes; the training, validation and test images, None for those that there are not
Contents = tuple[tuple[str, ...], Split, Split | None, Split | None]

# Formats that Pillow decodes itself; for some others it starts a program, such as Ghostscript for EPS.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def to_split(images: np.ndarray, labels: list[int]) -> Split:
    """From images (N, H, W, 3), as PIL and torchvision have them."""
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(labels))


def read_folder(config: Config) -> Contents:
    """The images in train/CLASS/*, test/CLASS/* and val/CLASS/*; without test/, val/ is the test set.

    Without train/ the folder holds CLASS/*. Files in formats other than IMAGE_FORMATS are skipped and logged; hidden
    files are skipped silently.
    """
    root = Path(config.dataset)
    folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if not folders:
        folders = {"train": root}
    if "train" not in folders:
        raise UserError(f"{root}: has {' and '.join(f'{name}/' for name in folders)}, but no folder train/")
    found = {split: image_files(folder) for split, folder in folders.items()}
    classes = tuple(sorted(set().union(*found.values())))
    check_classes(classes, folders, found)
    parts = {name: read_images(folders[name], files, classes, config.image_size) for name, files in found.items()}
    if "test" not in parts:
        return classes, parts["train"], None, parts.get("val")
    return classes, parts["train"], parts.get("val"), parts["test"]


def image_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class; other files are skipped, and named in a log line."""
    files, skipped = {}, [path for path in visible(folder) if not path.is_dir()]
    for name in (path for path in visible(folder) if path.is_dir()):
        files[name.name] = [path for path in visible(name) if is_image(path)]
        skipped += [path for path in visible(name) if not is_image(path)]
    if skipped:
        log.info(f"{folder}: skipped, as they are not images: " + ", ".join(at_most_ten([*map(str, skipped)])))
    return files


def check_classes(classes: tuple[str, ...], folders: dict[str, Path], found: dict[str, dict[str, list[Path]]]) -> None:
    """Raise UserError unless there are two classes or more, each with images in every folder."""
    train = folders["train"]
    problems = [f"{train}: the name of class {c!r} is not UTF-8; rename the folder" for c in classes if not is_utf8(c)]
    for split, folder in folders.items():
        problems += [f"{folder}: has no folder for class {name!r}" for name in classes if name not in found[split]]
        problems += [f"{folder / name}: holds no images" for name, files in found[split].items() if not files]
    if len(classes) < 2:
        problems.append(f"{train}: needs a folder of images for each of two or more classes; has {len(classes)}")
    if problems:
        raise UserError(*at_most_ten(problems))


def is_image(path: Path) -> bool:
    return Image.registered_extensions().get(path.suffix.lower()) in IMAGE_FORMATS and not path.is_dir()


def find_images(path: str | os.PathLike) -> list[Path]:
    """The file itself, or the images in a folder and its subfolders. Raises UserError if there are none."""
    if not os.fspath(path):
        raise UserError("'': is no path; is a variable of the shell unset?")
    if not Path(path).is_dir():
        return [Path(path)]
    found = sorted(file for file in Path(path).rglob("*") if is_image(file) and not file.name.startswith("."))
    if not found:
        raise UserError(f"{path}: holds no images")
    return found


def is_utf8(name: str) -> bool:
    return name.encode(errors="ignore").decode() == name


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read_images(folder: Path, files: dict[str, list[Path]], classes: tuple[str, ...], size: int) -> Split:
    """Images larger than `size` are resized while reading; if the sizes still differ, all of them are."""
    paths = [path for name in classes for path in files[name]]
    labels = [label for label, name in enumerate(classes) for _ in files[name]]
    arrays: list[np.ndarray] = []
    unreadable: list[str] = []
    with Progress(f"reading {folder}", len(paths)) as progress:
        for path in paths:
            try:
                image = open_image(path)
                arrays.append(to_array(image, size if max(image.size) > size else None))
            except UserError as error:
                unreadable += error.messages
            if progress.update(1):
                progress.describe()
    if unreadable:
        raise UserError(*at_most_ten(unreadable), "repair or remove these files")
    return to_split(stack(arrays, size), labels)


def stack(arrays: list[np.ndarray], size: int) -> np.ndarray:
    """(N, H, W, 3); if the shapes differ, all images are resized to `size`."""
    if len({array.shape for array in arrays}) > 1:
        arrays = [to_array(Image.fromarray(array), size) for array in arrays]
    return np.stack(arrays)


def open_image(path: str | os.PathLike) -> Image.Image:
    """An image file in RGB, its EXIF orientation applied and its transparent pixels composited onto white.

    Raises UserError if it cannot be read.
    """
    try:
        check_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that PIL cannot read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as file:
                if file.mode[0] in "IF":  # PIL would clip 16 bits to 8, which makes such an image white
                    raise OSError("more than 8 bits per channel; save it with 8")
                if getattr(file, "is_animated", False):
                    say_that_the_first_frame_is_used()
                image: Image.Image = file
                image.load()
                with contextlib.suppress(Exception):  # of many types, for an orientation that cannot be read
                    image = ImageOps.exif_transpose(file)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise exceptions of many types
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)})") from None


@cache
def say_that_the_first_frame_is_used() -> None:
    log.info("some images have several frames, as animations do; of these the first frame is used")


def to_array(image: Image.Image, size: int | None) -> np.ndarray:
    """(H, W, 3) uint8, or (size, size, 3) if a size is given."""
    return np.asarray(image if size is None else image.resize((size, size), Image.Resampling.BILINEAR))


class Source(NamedTuple):
    """A data set of torchvision: how to open a part of it, the files that it downloads, and its classes."""

    open: Callable[[str, bool], Any]  # (root, train) -> a map-style data set of (image, label)
    files: list[tuple[str, str, str]]  # name, md5, URL
    classes: tuple[str, ...] | None = None  # None: as torchvision names them


TORCHVISION = {
    "cifar10": Source(
        lambda root, train: CIFAR10(root, train, download=True),
        [(CIFAR10.filename, CIFAR10.tgz_md5, CIFAR10.url)],
        ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Source(
        lambda root, train: CIFAR100(root, train, download=True), [(CIFAR100.filename, CIFAR100.tgz_md5, CIFAR100.url)]
    ),
    "svhn": Source(
        lambda root, train: SVHN(root, "train" if train else "test", download=True),
        [(name, md5, url) for url, name, md5 in (SVHN.split_list["train"], SVHN.split_list["test"])],
        tuple("0123456789"),
    ),
}
NAMES = (*TORCHVISION, "digits")


def read_torchvision(config: Config) -> Contents:
    """A data set of torchvision, which downloads it once and verifies it. Raises UserError if it cannot."""
    source = TORCHVISION[config.dataset]
    try:
        parts = [source.open(config.data_path, train) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # OSError: no network, space or permission; RuntimeError: damaged
        files = " and ".join(f"{name} (md5 {md5}, from {url})" for name, md5, url in source.files)
        raise UserError(
            f"{config.dataset} is not in {config.data_path}/ and could not be downloaded ({error}). Put {files} into "
            f"{config.data_path}/ and run this again, or run the demo, which needs no download: "
            "python teacher_student_model.py --preset demo"
        ) from None
    read = [read_items(part, config.dataset) for part in parts]
    train, test = (to_split(stack(images, config.image_size), labels) for images, labels in read)
    return source.classes or tuple(parts[0].classes), train, None, test


def read_digits(config: Config) -> Contents:
    """The 1,797 handwritten digits, 8 x 8 pixels of 0 to 16, that come with scikit-learn; 500 are the test set."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)  # (N, 8, 8, 3)
    split = to_split(images, digits.target.tolist())
    training, test = stratified(split.labels, 1_297, "train_size")
    return tuple("0123456789"), split.select(training), None, split.select(test)


def is_of_the_user(dataset: str) -> bool:
    """Whether a data set is MODULE:NAME; a folder of that name comes first."""
    return named.is_named(dataset) and not Path(dataset).is_dir()


def read_named(config: Config) -> Contents:
    """What a function of the user's returns: a training, perhaps a validation, and a test set.

    Each is a map-style data set of (image, label): a PIL image or a uint8 tensor (3, H, W), and an int from 0. The
    classes are those of the first set's `classes`, if it has them. Raises UserError for anything else.
    """
    parts = named.load(config.dataset)()
    if not isinstance(parts, tuple | list) or len(parts) not in (2, 3) or not all(map(is_data_set, parts)):
        raise UserError(
            f"dataset = {config.dataset!r}: must return (train, test) or (train, validation, test), data sets of "
            "(image, label)"
        )
    read = [read_items(part, config.dataset) for part in parts]
    found = sorted({label for _, labels in read for label in labels}) or [0]
    classes = tuple(map(str, getattr(parts[0], "classes", range(found[-1] + 1))))
    if found[0] < 0 or found[-1] >= len(classes) or len(classes) < 2 or not all(labels for _, labels in read):
        raise UserError(
            f"dataset = {config.dataset!r}: returned {', '.join(f'{len(labels):,}' for _, labels in read)} images of "
            f"{len(classes)} classes with labels from {found[0]} to {found[-1]}; needs images in each set, two classes "
            "or more, and labels from 0"
        )
    train, *validation, test = (to_split(stack(images, config.image_size), labels) for images, labels in read)
    return classes, train, validation[0] if validation else None, test


def is_data_set(part: Any) -> bool:
    return hasattr(part, "__len__") and hasattr(part, "__getitem__")


def read_items(part: Any, dataset: str) -> tuple[list[np.ndarray], list[int]]:
    """The images (H, W, 3) uint8 and the labels of a map-style data set, each item read once."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for number in range(len(part)):
        image, label = part[number]
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
            images.append(image.permute(1, 2, 0).numpy())
        elif isinstance(image, Image.Image):
            images.append(np.asarray(image.convert("RGB")))
        else:
            kind = type(image).__name__
            if isinstance(image, torch.Tensor):
                kind = f"{image.dtype} {tuple(image.shape)}"
            raise UserError(
                f"dataset = {dataset!r}: image {number} must be a PIL image or a uint8 tensor (3, H, W), not {kind}; "
                "leave out transforms such as ToTensor, because training does that"
            )
        if isinstance(label, str) or int(label) != label:
            raise UserError(f"dataset = {dataset!r}: label {number} must be an integer from 0, not {label!r}")
        labels.append(int(label))
    return images, labels


def stratified(labels: torch.Tensor, size: int, setting: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of `size` images, stratified by class, and of the others; both sorted, and always the same.

    Raises UserError, naming the setting, if one of them would have no image of some class.
    """
    classes = labels.cpu().numpy()
    if size == len(classes):
        return torch.arange(size), torch.arange(0)
    images_of_class = np.unique(classes, return_counts=True)[1]
    try:
        chosen, others = train_test_split(np.arange(len(classes)), train_size=size, stratify=classes, random_state=0)
    except ValueError:  # so few images, or of a class, that scikit-learn does not try
        chosen = others = np.arange(0)
    if min(len(np.unique(classes[part])) for part in (chosen, others)) < len(images_of_class):
        raise UserError(
            f"{setting} = {size}: must select and leave at least one image of each class; there are {len(labels)} "
            f"images of {len(images_of_class)} classes, {images_of_class.min()} of the rarest. Choose another size or "
            "add images"
        )
    return torch.from_numpy(np.sort(chosen)), torch.from_numpy(np.sort(others))
