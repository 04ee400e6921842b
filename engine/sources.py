"""Where images come from: a folder, torchvision's data sets, scikit-learn's digits, a data set of the user's.

Each is read once into uint8 tensors.
"""

import contextlib
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from engine import named
from engine.console import Progress, log
from engine.errors import UserError, at_most_ten, first_line
from engine.files import check_file
from engine.images import map_chunks, resize, square_box
from engine.settings import Config


class Split(NamedTuple):
    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: torch.Tensor  # (N,) int64
    names: tuple[str, ...] = ()  # as it is read, of the files of a folder: train/CLASS/FILE
    ids: torch.Tensor | None = None  # (N,) int64 on the CPU, the place of each image in the data set as it was read

    def select(self, indices: torch.Tensor) -> "Split":
        ids = None if self.ids is None else self.ids[indices.cpu()]
        return Split(self.images[indices], self.labels[indices], ids=ids)

    def divide(self, first: torch.Tensor, second: torch.Tensor) -> tuple["Split", "Split"]:
        """The images of two sorted lists of indices. The first take the memory of this split, which is used up."""
        others = self.select(second)
        for start in range(0, len(first), 100):
            chunk = first[start : start + 100]
            self.images[start : start + len(chunk)] = self.images[chunk]  # from behind, as they are sorted
        ids = None if self.ids is None else self.ids[first.cpu()]
        return Split(self.images[: len(first)], self.labels[first], ids=ids), others


class Contents(NamedTuple):
    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split | None
    unreadable: tuple[str, ...] = ()  # a message for each file that has been left out


Items = Iterator[tuple[Image.Image, int]]  # images in RGB and their labels

# Formats that Pillow decodes itself; for some others it starts a program, such as Ghostscript for EPS.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"test": "test", "testing": "test"}  # the names of folders, in any capitals


def read_folder(config: Config) -> Contents:
    """The images in train/CLASS/**, test/CLASS/** and val/CLASS/**; without test/, val/ is the test set.

    Without train/, or with images and no folders in it, the folder holds CLASS/**. Files in formats other than
    IMAGE_FORMATS are skipped and logged; hidden files are skipped silently. No training images are given if there is
    only test/ or val/. Raises UserError for what cannot be used.
    """
    root = Path(config.dataset)
    folders = split_folders(root)
    found = {split: image_files(folder) for split, folder in folders.items()}
    check_classes(folders, found)
    classes = tuple(sorted(next(iter(found.values()))))
    unreadable: list[str] = []
    names: dict[str, list[str]] = {split: [] for split in found}

    def items(split: str) -> Items:
        files = [(path, label) for label, name in enumerate(classes) for path in found[split][name]]
        with Progress(f"reading {folders[split]}", len(files)) as progress:
            for path, label in files:
                try:
                    image = open_image(path, config.largest_image, config.resize)
                except UserError as error:
                    unreadable.extend(error.messages)
                else:
                    names[split].append(path.relative_to(folders[split].parent).as_posix())
                    yield image, label
                if progress.update(1):
                    progress.describe()

    parts = {split: (sum(map(len, files.values())), items(split)) for split, files in found.items()}
    splits = read_splits(parts, config, largest=config.image_size)
    splits = {name: split._replace(names=tuple(names[name])) for name, split in splits.items()}
    if unreadable and not config.skip_unreadable:
        raise UserError(*at_most_ten(unreadable), "repair or remove these files, or leave them out: --skip_unreadable")
    for split, part in splits.items():
        if gone := [name for label, name in enumerate(classes) if label not in part.labels]:
            raise UserError(f"{folders[split]}: no image of {' and '.join(gone)} can be read", *at_most_ten(unreadable))
    if unreadable:
        log.info("left out, and listed in the report: " + "; ".join(at_most_ten(unreadable)))
    test = "test" if "test" in splits else "val"
    validation = splits.get("val") if test == "test" else None
    train = splits.get("train", next(iter(splits.values())).select(torch.arange(0)))
    return Contents(classes, train, validation, splits.get(test), tuple(unreadable))


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of the training, validation and test images; a flat data set is all training images."""
    beside = [path for path in visible(root) if path.is_dir()]
    folders: dict[str, Path] = {}
    for path in beside:
        split = SPLITS.get(path.name.lower())
        if split in folders:
            raise UserError(f"{root}: has both {folders[split].name}/ and {path.name}/; rename one of them")
        if split:
            folders[split] = path
    unused = [path.name + "/" for path in beside if path not in folders.values()]
    if not folders or ("train" in folders and unused and not any(path.is_dir() for path in visible(folders["train"]))):
        return {"train": root}
    if unused:
        log.info(f"{root}: not used, as they are neither training, validation nor test images: {', '.join(unused)}")
    return {split: folders[split] for split in ("train", "val", "test") if split in folders}


def image_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class, also in its sub-folders; other files are skipped, and named in a log line."""
    files, skipped = {}, [path for path in visible(folder) if not path.is_dir()]
    for name in (path for path in visible(folder) if path.is_dir()):
        found = list(files_below(name))
        files[name.name] = [path for path in found if is_image(path)]
        skipped += [path for path in found if not is_image(path)]
    if skipped:
        log.info(f"{folder}: skipped, as they are not images: " + ", ".join(at_most_ten([*map(str, skipped)])))
    return files


def check_classes(folders: dict[str, Path], found: dict[str, dict[str, list[Path]]]) -> None:
    """Raise UserError unless there are two classes or more, each with images in every folder."""
    classes = sorted(set().union(*found.values()))
    train = folders.get("train", next(iter(folders.values())))
    problems = [f"{train}: the name of class {c!r} is not UTF-8; rename the folder" for c in classes if not is_utf8(c)]
    for split, folder in folders.items():
        if not found[split]:
            problems.append(f"{folder}: has no folder for each class, so the labels of its images are unknown")
            continue
        forms = {unicodedata.normalize("NFC", name) for name in found[split]}
        for name in classes:
            if name not in found[split]:
                alike = " in the same Unicode form" if unicodedata.normalize("NFC", name) in forms else ""
                problems.append(f"{folder}: has no folder for class {name!r}{alike}")
        problems += [f"{folder / name}: holds no images" for name, files in found[split].items() if not files]
    if len(classes) < 2:
        problem = f"{train}: needs a folder of images for each of two or more classes; has {len(classes)}"
        inside = [path.name for name in classes for path in visible(train / name) if path.is_dir()]
        if inside:
            problem += f", {classes[0]}/, which holds the folders {', '.join(at_most_ten(inside))}: one level too deep"
        problems.append(problem)
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
    found = [file for file in files_below(Path(path)) if is_image(file)]
    if not found:
        raise UserError(f"{path}: holds no images")
    return found


def is_utf8(name: str) -> bool:
    return name.encode(errors="ignore").decode() == name


def visible(folder: Path) -> list[Path]:
    """What a folder holds, without hidden files and what macOS adds to archives."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))


def files_below(folder: Path) -> Iterator[Path]:
    """The visible files in a folder and its sub-folders. A link to a folder inside is a file, as it may be circular."""
    for path in visible(folder):
        if path.is_dir() and not path.is_symlink():
            yield from files_below(path)
        else:
            yield path


def read_splits(parts: dict[str, tuple[int, Items]], config: Config, largest: int | None = None) -> dict[str, Split]:
    """The images of each part, of which the number is given, read one by one into the tensor that stays.

    Those larger than `largest` are resized to image_size, and if the sizes still differ, all of a part are. Raises
    UserError if they do not fit into memory.
    """
    splits, left, size = {}, sum(count for count, _ in parts.values()), config.image_size
    for name, (count, items) in parts.items():
        images = torch.empty((0, 3, size, size), dtype=torch.uint8)
        labels: list[int] = []
        for item, label in items:
            image = square(item, config.resize)
            if largest and max(image.size) > largest:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            if not labels:
                check_memory(left, *image.size)
                images = images.new_empty((count, 3, image.height, image.width))
            elif (image.height, image.width) != images.shape[2:]:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
                if images.shape[2:] != (size, size):
                    check_memory(left, size, size)
                    small, images = images[: len(labels)], images.new_empty((count, 3, size, size))
                    map_chunks(lambda chunk: resize(chunk, size), small, images[: len(labels)])
            images[len(labels)] = pil_to_tensor(image)
            labels.append(label)
        splits[name] = Split(images[: len(labels)], torch.as_tensor(labels))
        left -= count
    return splits


def check_memory(images: int, width: int, height: int) -> None:
    """Say what so many images take, if that is much. Raises UserError if it is more than Linux has free."""
    with contextlib.suppress(OSError, ValueError):
        words = Path("/proc/meminfo").read_text().split()
        free = int(words[words.index("MemAvailable:") + 1]) / 1e6  # GB
        needed = images * 3 * width * height / 1e9
        text = (
            f"{images:,} images of {width} x {height} px take {needed:,.1f} GB of memory, and {free:,.1f} GB are free"
        )
        if needed > free:
            raise UserError(f"{text}; choose a smaller image_size or fewer images")
        if needed > free / 10:
            log.info(text)


def square(image: Image.Image, how: str) -> Image.Image:
    """The part of an image that `resize` makes square: its centre (crop), all on black (pad), or all (squash)."""
    if how == "squash" or image.width == image.height:
        return image
    return image.crop(square_box(*image.size, how))


def open_image(
    path: str | os.PathLike, megapixels: float = Config.largest_image, resize: str = "squash"
) -> Image.Image:
    """An image file in RGB, its EXIF orientation applied, its transparent pixels composited onto white, and `square`.

    Raises UserError if it cannot be read, or has more than so many megapixels, also once a panorama is padded.
    """
    try:
        check_file(path)
        Image.MAX_IMAGE_PIXELS = round(megapixels * 1e6)
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
                return square(image.convert("RGB"), resize)
    except Exception as error:  # PIL's decoders raise exceptions of many types
        reason = first_line(error)
        if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
            reason += " --largest_image MEGAPIXELS allows larger ones"
        raise UserError(f"{path}: cannot be read as an image ({reason})") from None


@cache
def say_that_the_first_frame_is_used() -> None:
    log.info("some images have several frames, as animations do; of these the first frame is used")


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
        there = [str(path) for name, *_ in source.files if (path := Path(config.data_path, name)).exists()]
        found = f"{' and '.join(there)}: is damaged," if there else f"{config.dataset} is not in {config.data_path}/"
        raise UserError(
            f"{found} and could not be downloaded{' again' if there else ''} ({error}). Put {files} into "
            f"{config.data_path}/ and run this again, or run the demo, which needs no download: "
            "python teacher_student_model.py --preset demo"
        ) from None
    train, test = read_data_sets(parts, config)
    return Contents(source.classes or tuple(parts[0].classes), train, None, test)


def read_digits(config: Config) -> Contents:
    """The 1,797 handwritten digits, 8 x 8 pixels of 0 to 16, that come with scikit-learn; 500 are the test set."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None].repeat(3, axis=1)  # (N, 3, 8, 8)
    split = Split(torch.from_numpy(images), torch.from_numpy(digits.target))
    train, test = split.divide(*stratified(split.labels, 1_297, "train_size"))
    return Contents(tuple("0123456789"), train, None, test)


def is_of_the_user(dataset: str) -> bool:
    """Whether a data set is MODULE:NAME; a folder of that name comes first."""
    return named.is_named(dataset) and not Path(dataset).is_dir()


def read_named(config: Config) -> Contents:
    """What a function of the user's returns: a training, perhaps a validation, and a test set.

    Each is a map-style data set of (image, label): a PIL image or a uint8 tensor (3, H, W), and an int from 0. The
    classes are those of the first set's `classes`, if it has them. Raises UserError for anything else.
    """
    parts = named.call("dataset", config.dataset)
    if not isinstance(parts, tuple | list) or len(parts) not in (2, 3) or not all(map(is_data_set, parts)):
        raise UserError(
            f"dataset = {config.dataset!r}: must return (train, test) or (train, validation, test), data sets of "
            "(image, label)"
        )
    with named.running("dataset", config.dataset):
        splits = read_data_sets(parts, config)
    found = sorted({label for split in splits for label in split.labels.tolist()}) or [0]
    classes = tuple(map(str, getattr(parts[0], "classes", range(found[-1] + 1))))
    if len(set(classes)) < len(classes):
        raise UserError(f"dataset = {config.dataset!r}: its classes must have different names, and they are {classes}")
    if found[0] < 0 or found[-1] >= len(classes) or len(classes) < 2 or not all(len(s.labels) for s in splits):
        raise UserError(
            f"dataset = {config.dataset!r}: returned {', '.join(f'{len(s.labels):,}' for s in splits)} images of "
            f"{len(classes)} classes with labels from {found[0]} to {found[-1]}; needs images in each set, two classes "
            "or more, and labels from 0"
        )
    train, *validation, test = splits
    return Contents(classes, train, validation[0] if validation else None, test)


def is_data_set(part: Any) -> bool:
    return hasattr(part, "__len__") and hasattr(part, "__getitem__")


def read_data_sets(parts: Sequence[Any], config: Config) -> list[Split]:
    """Map-style data sets of (image, label), each item read once."""
    items = {str(number): (len(part), read_items(part, config.dataset)) for number, part in enumerate(parts)}
    return list(read_splits(items, config).values())


def read_items(part: Any, dataset: str) -> Items:
    for number in range(len(part)):
        item = part[number]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UserError(f"dataset = {dataset!r}: item {number} must be (image, label), not {type(item).__name__}")
        image, label = item
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
            image = to_pil_image(image)
        elif not isinstance(image, Image.Image):
            kind = type(image).__name__
            if isinstance(image, torch.Tensor):
                kind = f"{image.dtype} {tuple(image.shape)}"
            raise UserError(
                f"dataset = {dataset!r}: image {number} must be a PIL image or a uint8 tensor (3, H, W), not {kind}; "
                "leave out transforms such as ToTensor, because training does that"
            )
        if isinstance(label, str) or np.ndim(label) or int(label) != label:
            raise UserError(f"dataset = {dataset!r}: label {number} must be an integer from 0, not {label!r:.40}")
        yield image.convert("RGB"), int(label)


def stratified(labels: torch.Tensor, size: int, setting: str, choice: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of `size` images, stratified by class, and of the others; both sorted. `choice` is the random seed.

    Raises UserError, naming the setting, if one of them would have no image of some class.
    """
    classes = labels.cpu().numpy()
    if size == len(classes):
        return torch.arange(size), torch.arange(0)
    images_of_class = np.unique(classes, return_counts=True)[1]
    try:
        chosen, others = train_test_split(
            np.arange(len(classes)), train_size=size, stratify=classes, random_state=choice
        )
    except ValueError:  # so few images, or of a class, that scikit-learn does not try
        chosen = others = np.arange(0)
    if min(len(np.unique(classes[part])) for part in (chosen, others)) < len(images_of_class):
        raise UserError(
            f"{setting} = {size}: must select and leave at least one image of each class; there are {len(labels)} "
            f"images of {len(images_of_class)} classes, {images_of_class.min()} of the rarest. Choose another size or "
            "add images"
        )
    return torch.from_numpy(np.sort(chosen)), torch.from_numpy(np.sort(others))
