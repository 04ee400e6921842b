"""The data sets that are not folders: torchvision's, which are downloaded, and scikit-learn's digits."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from engine.errors import UserError
from engine.folder import Arrays, stack
from engine.settings import Config
from engine.splits import stratified


class Source(NamedTuple):
    """A data set of torchvision: how to open a part of it, the files that it downloads, and its classes."""

    open: Callable[[str, bool], Iterable[tuple[Image.Image, int]]]  # (root, train) -> images and labels
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


def read_torchvision(config: Config) -> tuple[tuple[str, ...], Arrays, None, Arrays]:
    """A data set of torchvision, which downloads it once and verifies it. Raises UserError if it cannot."""
    source = TORCHVISION[config.dataset]
    try:
        splits = [source.open(config.data_path, train) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # OSError: no network, space or permission; RuntimeError: damaged
        files = " and ".join(f"{name} (md5 {md5}, from {url})" for name, md5, url in source.files)
        raise UserError(
            f"{config.dataset} is not in {config.data_path}/ and could not be downloaded ({error}). Put {files} into "
            f"{config.data_path}/ and run this again, or run the demo, which needs no download: "
            "python teacher_student_model.py --preset demo"
        ) from None
    train, test = (list(zip(*split, strict=True)) for split in splits)  # images, labels
    train, test = (
        (stack([np.asarray(image.convert("RGB")) for image in images], config.image_size), list(labels))
        for images, labels in (train, test)
    )
    return source.classes or tuple(splits[0].classes), train, None, test


def read_digits(config: Config) -> tuple[tuple[str, ...], Arrays, None, Arrays]:
    """The 1,797 handwritten digits, 8 x 8 pixels of 0 to 16, that come with scikit-learn; 500 are the test set."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)  # (N, 8, 8, 3)
    parts = stratified(torch.as_tensor(digits.target), 1_297, "train_size")
    train, test = ((images[index], digits.target[index].tolist()) for index in parts)
    return tuple("0123456789"), train, None, test
