"""Image files: a folder with one folder of images per class, read as uint8 arrays."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from engine.console import Progress
from engine.errors import UserError, at_most_ten, first_line, suggest
from engine.settings import TRAINING_IMAGES, Config

# Formats that Pillow decodes itself; for some others it starts a program, such as Ghostscript for EPS.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

Arrays = tuple[np.ndarray, list[int]]  # images (N, H, W, 3) uint8, labels (N)


def read_folder(config: Config) -> tuple[tuple[str, ...], Arrays, Arrays]:
    """train/CLASS/* and test/CLASS/* (or val/CLASS/*), in one of IMAGE_FORMATS; hidden files are skipped."""
    root = Path(config.dataset)
    if not root.is_dir():
        hint = f"no such folder ({suggest(config.dataset, TRAINING_IMAGES)})"
        raise UserError(f"dataset = {config.dataset!r}: {hint}; must be cifar10, digits or a folder with train/CLASS/*")
    test = root / "test" if (root / "test").is_dir() else root / "val"
    folders = [root / "train", test]
    if missing := [f"{folder}" for folder in folders if not folder.is_dir()]:
        raise UserError(f"{root}: needs the folders train/ and test/ (or val/); there is no {' and no '.join(missing)}")
    try:
        files = [{d.name: visible(d) for d in visible(folder) if d.is_dir()} for folder in folders]  # [train, test]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    classes = tuple(sorted(files[0].keys() | files[1].keys()))
    problems = [f"{root}: the name of class {c!r} is not UTF-8; rename the folder" for c in classes if not is_utf8(c)]
    problems += [
        f"{folder}: has no folder for class {name!r}" if name not in found else f"{folder / name}: holds no images"
        for folder, found in zip(folders, files, strict=True)
        for name in classes
        if not found.get(name)
    ]
    if len(classes) < 2:
        problems.append(f"{folders[0]}: needs a folder of images for each of two or more classes; has {len(classes)}")
    if problems:
        raise UserError(*at_most_ten(problems))
    return classes, *(
        read_images(folder, found, classes, config.image_size) for folder, found in zip(folders, files, strict=True)
    )


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
    if len({array.shape for array in arrays}) > 1:
        arrays = [to_array(Image.fromarray(array), size) for array in arrays]
    return np.stack(arrays), labels


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
