"""Data sets: read once into tensors on the device, then served as batches."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.console import log
from engine.distributed import RankError, main_process_first, on_rank0, rank, shard
from engine.errors import UserError, suggest
from engine.images import augment, flip, prepare, shift
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


def batches(
    split: Split, subset: torch.Tensor, config: Config, seed: int, epoch: int, first_step: int = 0
) -> Iterator[Batch]:
    """The batches of an epoch from `first_step` on; batch k depends on (seed, epoch, k) and on nothing else.

    Each image of `subset` (M,) occurs at most once an epoch; the last M % batch_size of the shuffled images are
    dropped. With several processes each gets its own part of every batch.
    """
    device = split.labels.device
    random = np.random.default_rng((seed, epoch))
    order = subset[torch.from_numpy(random.permutation(len(subset)))]
    source = order.to(split.images.device)  # the images may be in the host's memory
    order = order.to(device)
    flipped = torch.from_numpy(random.random(len(subset)) < config.horizontal_flip).to(device)
    padding = config.crop_padding
    down, right = torch.from_numpy(random.integers(-padding, padding, (2, len(subset)), endpoint=True)).to(device)
    own = shard(config.batch_size)
    for step in range(first_step, len(subset) // config.batch_size):
        here = slice(step * config.batch_size + own.start, step * config.batch_size + own.stop)
        images = split.images[source[here]]
        if split.images.is_pinned():
            images = images.pin_memory()  # copies to the GPU are asynchronous only from pinned memory
        images = images.to(device, non_blocking=True)
        if padding:
            images = shift(images, down[here], right[here], padding)
        images = augment(flip(images, flipped[here]), config.augment, (seed, epoch, here.start))
        view = None if config.unlimited_views else flipped[here]
        yield Batch(prepare(images, config.image_size), split.labels[order[here]], order[here], view)


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
    present = len(train.labels) > 0
    if not present and not trained:
        raise UserError(f"{config.dataset}: has no folder train/ for the training images")
    if test is None:
        train, test = split_off_test_images(train, config)
    if validation and config.validation_size:
        raise UserError(f"validation_size = {config.validation_size}: {config.dataset} has a folder val/ for that")
    digest = hashlib.sha256(repr(classes).encode())
    for split in (train, test, validation):
        for tensor in split or ():
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
    warn_of_shared_images(train, {"validation": validation, "test": test})
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
    on_host = False
    if torch.device(config.device).type == "cuda":
        total = sum(split.images.nbytes for split in (train, validation, test) if split)
        on_host = total > torch.cuda.mem_get_info(config.device)[0] / 2
    return Dataset(
        classes,
        to_device(train, config.device, on_host),
        to_device(validation, config.device, on_host) if validation else None,
        to_device(test, config.device, on_host),
        digest.hexdigest(),
        unreadable,
    )


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


def warn_of_shared_images(train: Split, others: dict[str, Split | None]) -> None:
    """Say how many images have the pixels of a training image, which makes an accuracy too high."""
    known = {hash(image.tobytes()) for image in train.images.numpy()}
    for name, split in others.items():
        shared = sum(hash(image.tobytes()) in known for image in split.images.numpy()) if split else 0
        if split and shared:
            log.info(
                f"warning: {shared:,} of {len(split.labels):,} {name} images are training images, too, so the "
                "accuracy on them says nothing about new images; remove them from one of the folders"
            )


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
    return Split(images, split.labels.to(device))
