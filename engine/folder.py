"""Image files: a folder with one folder of images per class, read as uint8 arrays."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from engine.console import Progress, log
from engine.errors import UserError, at_most_ten, first_line
from engine.settings import Config

# Formats that Pillow decodes itself; for some others it starts a program, such as Ghostscript for EPS.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

Arrays = tuple[np.ndarray, list[int]]  # images (N, H, W, 3) uint8, labels (N)


def read_folder(config: Config) -> tuple[tuple[str, ...], Arrays, Arrays | None, Arrays | None]:
    """The classes, and the training, validation and test images of a folder; None for those that it does not have.

    It holds train/CLASS/*, test/CLASS/* and val/CLASS/*; without test/, val/ is the test set; without train/ it holds
    CLASS/*. Files in formats other than IMAGE_FORMATS are skipped and logged; hidden files are skipped silently.
    """
    root = Path(config.dataset)
    folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if not folders:
        folders = {"train": root}
    if "train" not in folders:
        raise UserError(f"{root}: has {' and '.join(f'{name}/' for name in folders)}, but no folder train/")
    try:
        found = {split: image_files(folder) for split, folder in folders.items()}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
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


def read_images(folder: Path, files: dict[str, list[Path]], classes: tuple[str, ...], size: int) -> Arrays:
    """Images larger than `size` are resized while reading; if the sizes still differ, all of them are."""
    paths = [path for name in classes for path in files[name]]
    labels = [label for label, name in enumerate(classes) for _ in files[name]]
    arrays, unreadable = [], []
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
    return stack(arrays, size), labels


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
        if not Path(path).is_file():  # reading a pipe would never end
            raise OSError("not a file" if Path(path).exists() else "no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.mode[0] in "IF":  # PIL would clip 16 bits to 8, which makes such an image white
                    raise OSError("more than 8 bits per channel; save it with 8")
                image = ImageOps.exif_transpose(image)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise exceptions of many types
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)})") from None


def to_array(image: Image.Image, size: int | None) -> np.ndarray:
    """(H, W, 3) uint8, or (size, size, 3) if a size is given."""
    return np.asarray(image if size is None else image.resize((size, size), Image.Resampling.BILINEAR))
