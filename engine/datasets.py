"""Data sets: read once into tensors on the device, then served as batches."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from engine.console import log
from engine.device import AUGMENTATION, seed_sequence
from engine.distributed import RankError, main_process_first, on_rank0, rank, shard
from engine.errors import UserError, suggest
from engine.images import (
    BATCHED,
    IMAGENET,
    Normalisation,
    augment_one_by_one,
    crop,
    draw_boxes,
    erase,
    flip,
    prepare,
    resize,
    shift,
)
from engine.settings import Config
from engine.soft_losses import problems_of_two_classes
from engine.sources import (
    NAMES,
    TORCHVISION,
    Split,
    is_of_the_user,
    read_digits,
    read_folder,
    read_named,
    read_torchvision,
    stratified,
)


class Dataset(NamedTuple):
    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    digest: str  # sha256 of the classes, of every image and label, and of which are held out for validation
    unreadable: tuple[str, ...] = ()  # a message for each file of a folder that has been left out
    shared: int = 0  # how many test images are training images, too
    names: tuple[str, ...] = ()  # of the files of a folder, by Split.ids: train/CLASS/FILE
    sizes: Mapping[str, int] = {}  # train, test, val -> the number of images, as they were read, in the order of ids

    def subset(self, size: int | None, choice: int = 0) -> torch.Tensor:
        """Indices (size,) of a stratified choice of training images; None: all of them.

        The same numbers give the same images; other numbers for `choice` give other random ones.
        """
        everything = torch.arange(len(self.train.labels))
        if size is None or not self.has_training_images:
            return everything
        return stratified(self.train.labels, size, "train_size", choice)[0]

    @property
    def has_training_images(self) -> bool:
        """False where trained models are evaluated and the training images have gone."""
        return len(self.train.labels) > 0

    @property
    def held_out(self) -> tuple[str, Split]:
        """What is evaluated after each epoch: the validation images if there are any, else the test images."""
        return ("validation", self.validation) if self.validation else ("test", self.test)


class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, S, S) float32, normalised
    labels: torch.Tensor  # (B,) int64
    indices: torch.Tensor  # (B,) int64, into the training images
    flipped: torch.Tensor | None  # (B,) bool; None if the images are augmented in other ways too
    pixels: torch.Tensor  # (B, 3, H, W) uint8: the images before they were resized and normalised


T = TypeVar("T")
R = TypeVar("R")


def one_ahead(function: Callable[[T], R], arguments: Iterable[T]) -> Iterator[R]:
    """function(x) for each x, in order; a thread computes the next while one is in use."""
    with ThreadPoolExecutor(1) as thread:
        following = None
        for argument in arguments:
            current, following = following, thread.submit(function, argument)
            if current:
                yield current.result()
        if following:
            yield following.result()


def augments_on_host(config: Config) -> bool:
    """Whether images are augmented one by one in the host's memory, because a GPU would be slow at that."""
    return torch.device(config.device).type == "cuda" and config.augment not in ("none", *BATCHED)


def move(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The images on the device. Copies to a GPU are asynchronous only from pinned memory."""
    if images.device.type == "cpu" and device.type == "cuda":
        images = images.pin_memory()
    return images.to(device, non_blocking=True)


def batches(
    split: Split,
    subset: torch.Tensor,
    config: Config,
    seed: int,
    epoch: int,
    first_step: int = 0,
    normalisation: Normalisation = IMAGENET,
) -> Iterator[Batch]:
    """The batches of an epoch from `first_step` on; batch k depends on (seed, epoch, k) and on nothing else.

    Each image of `subset` (M,) occurs at most once an epoch; the last M % batch_size of the shuffled images are
    dropped. With several processes each gets its own part of every batch.
    """
    device, n = split.labels.device, len(subset)
    on_host = augments_on_host(config)
    place = split.images.device if on_host else device  # where the images are augmented
    random = np.random.default_rng((seed, epoch))
    order = subset[torch.from_numpy(random.permutation(n))]
    source = order.to(split.images.device)  # the images may be in the host's memory
    order = order.to(device)
    flipped = torch.from_numpy(random.random(n) < config.horizontal_flip).to(place)
    padding = config.crop_padding
    down, right = torch.from_numpy(random.integers(-padding, padding, (2, n), endpoint=True)).to(place)
    if config.augment in BATCHED:
        drawn = np.random.default_rng(seed_sequence(AUGMENTATION, seed, epoch))
        boxes = draw_boxes(config.augment, drawn, n, *split.images.shape[2:]).to(place)
    own = shard(config.batch_size)

    def here(step: int) -> slice:
        return slice(step * config.batch_size + own.start, step * config.batch_size + own.stop)

    def augmented(step: int) -> torch.Tensor:
        part = here(step)
        images = split.images[source[part]]
        if not on_host:
            images = move(images, device)
        if padding:
            images = shift(images, down[part], right[part], padding)
        images = flip(images, flipped[part])
        if config.augment == "crop":
            return crop(images, boxes[:, part])
        if config.augment == "randomerasing":
            return erase(images, boxes[:, part])
        if config.augment != "none":
            images = augment_one_by_one(images, config.augment, (seed, epoch, part.start))
        return move(images, device)

    steps = range(first_step, n // config.batch_size)
    ahead = one_ahead if on_host and not config.deterministic else map
    for step, images in zip(steps, ahead(augmented, steps), strict=True):
        part = here(step)
        view = None if config.unlimited_views else flipped[part]
        prepared = prepare(images, config.image_size, normalisation)
        yield Batch(prepared, split.labels[order[part]], order[part], view, images)


def load_dataset(config: Config, trained: bool = False) -> Dataset:
    """The images of `config.dataset` as uint8 tensors on `config.device`, or in pinned host memory if too large.

    For models that are `trained` a folder needs no training images. Raises UserError, with instructions, if images
    cannot be read, or if machines hold different ones.
    """
    dataset = main_process_first(lambda: read_dataset(config, trained))
    if on_rank0(lambda: dataset.digest)() != dataset.digest:
        raise RankError(
            f"rank {rank()}: {config.dataset} differs from the copy on rank 0's machine; copy that one here"
        )
    return dataset


def read_dataset(config: Config, trained: bool = False) -> Dataset:
    if config.dataset in TORCHVISION:
        read = read_torchvision
    elif config.dataset == "digits":
        read = read_digits
    elif is_of_the_user(config.dataset):
        read = read_named
    elif Path(config.dataset).is_dir():
        read = read_folder
    else:
        raise UserError(
            f"dataset = {config.dataset!r}: no such folder ({suggest(config.dataset, NAMES)}); must be "
            f"{', '.join(NAMES)}, a folder with train/CLASS/* or MODULE:NAME. If it has moved: --dataset FOLDER"
        )
    classes, train, validation, test, unreadable = read(config)
    parts = {name: part for name, part in (("train", train), ("test", test), ("val", validation)) if part}
    train, test, validation = number_images(train, test, validation)  # type: ignore[assignment]
    present = len(train.labels) > 0
    if not present and not trained:
        raise UserError(f"{config.dataset}: has no folder train/ for the training images")
    if test is None:
        train, test = split_off_test_images(train, config)
    if validation and config.validation_size:
        raise UserError(f"validation_size = {config.validation_size}: {config.dataset} has a folder val/ for that")
    digest = hashlib.sha256(repr(classes).encode())
    for split in (train, test, validation):
        for tensor in split[:2] if split else ():
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
    shared = count_shared(train, {"validation": validation, "test": test}, config.image_size)
    if present:
        check_sizes(config, train)
    check_soft_losses(config, len(classes))
    if config.validation_size and present:
        held_out, kept = stratified(train.labels, config.validation_size, "validation_size")
        digest.update(held_out.numpy().data)
        train, validation = train.divide(kept, held_out)
    for name in config.selected():
        recipe = config.recipes[name]
        if recipe.train_size is not None and present:
            stratified(train.labels, recipe.train_size, f"{name}.train_size")  # raises UserError if it cannot be
    if present:
        check_schedules(config, len(train.labels))
    if present and not trained:
        check_kept_epochs(config, validation)
    on_host = False
    if torch.device(config.device).type == "cuda":
        total = sum(split.images.nbytes for split in (train, validation, test) if split)
        on_host = total > torch.cuda.mem_get_info(config.device)[0] / 2
        if on_host and config.jobs > 1:
            raise UserError(
                f"jobs = {config.jobs}: must be 1, as the images do not fit on the device; each would pin them"
            )
    return Dataset(
        classes,
        to_device(train, config.device, on_host or augments_on_host(config)),
        to_device(validation, config.device, on_host) if validation else None,
        to_device(test, config.device, on_host),
        digest.hexdigest(),
        unreadable=unreadable,
        shared=shared["test"],
        names=sum((part.names for part in parts.values()), ()),
        sizes={name: len(part.labels) for name, part in parts.items()},
    )


def number_images(*parts: Split | None) -> Iterator[Split | None]:
    """The parts of a data set, their images numbered through."""
    first = 0
    for part in parts:
        if part:
            ids = torch.arange(first, first + len(part.labels))
            part, first = part._replace(ids=ids), first + len(ids)
        yield part


def split_off_test_images(train: Split, config: Config) -> tuple[Split, Split]:
    """A folder without test images: a fifth of each class, always the same, becomes the test set."""
    try:
        kept, held_out = stratified(train.labels, len(train.labels) * 4 // 5, "training images")
    except UserError:
        raise UserError(
            f"{config.dataset}: has no folder test/ or val/, and too few images of a class to hold out a fifth of each "
            "class as test images; add a folder test/"
        ) from None
    log.info(
        f"{config.dataset}: has no folder test/ or val/, so {len(held_out):,} of its {len(train.labels):,} images, "
        "stratified by class, are the test images"
    )
    return train.divide(kept, held_out)


def count_shared(train: Split, others: dict[str, Split | None], size: int) -> dict[str, int]:
    """How many images have the pixels of a training image, which makes an accuracy too high. Logs a warning.

    Parts whose images are not stored in one size are compared as the models see them, in `size` pixels a side.
    """

    def pixels(split: Split) -> Iterator[int]:
        images = split.images if len(stored) == 1 else resize(split.images, size)
        return (hash(image.tobytes()) for image in images.numpy())

    stored = {split.images.shape[2:] for split in (train, *others.values()) if split}
    known, shared = {*pixels(train)}, {}
    for name, split in others.items():
        if split:
            shared[name] = sum(found in known for found in pixels(split))
        if split and shared[name]:
            log.info(
                f"warning: {shared[name]:,} of {len(split.labels):,} {name} images are training images, too, so the "
                "accuracy on them says nothing about new images; remove them from one of the folders"
            )
    return shared


def check_sizes(config: Config, train: Split) -> None:
    """Raise UserError for settings that the number or the size of the training images does not allow."""
    available, side = len(train.labels) - config.validation_size, min(train.images.shape[2:])
    problems = []
    if available <= 0:
        problems.append(f"validation_size = {config.validation_size}: leaves no training images")
    elif config.batch_size > available:
        problem = (
            f"batch_size = {config.batch_size}: must be at most the number of training images; {config.dataset} has "
            f"{len(train.labels)}"
        )
        if config.validation_size:
            problem += f", of which validation_size = {config.validation_size} are held out"
        problems.append(problem)
    if config.crop_padding >= side:
        problems.append(f"crop_padding = {config.crop_padding}: must be less than the {side} pixels of the images")
    if problems:
        raise UserError(*problems)


def check_schedules(config: Config, images: int) -> None:
    """Raise UserError for a selected recipe whose onecycle schedule has so few steps that it never reaches lr."""
    problems = []
    for name in config.selected():
        recipe = config.recipes[name]
        steps = recipe.epochs * ((recipe.train_size or images) // config.batch_size)
        if recipe.schedule == "onecycle" and 0 < steps < 5:
            problems.append(
                f"{name}.schedule = 'onecycle': needs 5 steps or more to reach lr, and this recipe trains for {steps}; "
                "choose more epochs, a smaller batch_size or another schedule"
            )
    if problems:
        raise UserError(*problems)


def check_kept_epochs(config: Config, validation: Split | None) -> None:
    """Raise UserError for selected recipes that keep the best epoch where there are no validation images."""
    problems = [
        f"{name}.keep = 'best': needs validation images, such as --validation_size 500 or a folder val/ beside test/"
        for name in config.selected()
        if config.recipes[name].keep == "best" and not validation
    ]
    if problems:
        raise UserError(*problems)


def check_soft_losses(config: Config, classes: int) -> None:
    """Raise UserError for soft losses of the selected recipes that do not work with two classes."""
    if classes != 2:
        return
    problems = []
    for name in config.selected():
        recipe = config.recipes[name]
        if recipe.teacher:
            found = problems_of_two_classes(recipe.soft_loss, recipe.soft_loss_options)
            problems += [f"{name}.{problem}" for problem in found]
    if problems:
        raise UserError(*problems)


def to_device(split: Split, device: str, images_on_host: bool = False) -> Split:
    """Labels on the device, and the images too, unless they are too many for it and stay in pinned host memory."""
    images = split.images.pin_memory() if images_on_host else split.images.to(device)
    return Split(images, split.labels.to(device), ids=split.ids)
