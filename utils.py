"""What the scripts share: messages, signals, processes, locks, the device, the images on it, batches, checkpoints."""

import contextlib
import ctypes
import hashlib
import io
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from config import (
    ARCHS,
    TRAINING_IMAGES,
    Config,
    Recipe,
    UserError,
    first_line,
    nearest,
    one_line_errors,
    printable,
    settings_of,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Decoders that are part of Pillow; some of its other formats start programs (EPS: Ghostscript).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

T = TypeVar("T")


def say(message: str) -> None:
    """A line on stderr that stays above a progress bar, from the first process; no run ends because nobody reads it."""
    if rank() == 0:
        with contextlib.suppress(OSError, RuntimeError):
            tqdm.write(printable(message), file=sys.stderr)


def progress(**settings: Any) -> tqdm:
    """A bar that goes when it is full, on a terminal and in the first process only."""
    return tqdm(**settings, leave=False, disable=None if rank() == 0 else True)


@contextlib.contextmanager
def as_script() -> Iterator[None]:
    """What a script's main runs in: errors in one line, SIGTERM in good order, and the processes of torchrun joined."""

    def end(number: int, frame: Any) -> None:
        say("stopped; the same command goes on from what is saved")
        raise SystemExit(128 + number)

    with one_line_errors(), handled(end, "SIGTERM", "SIGHUP"), joined():
        yield


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None], *names: str) -> Iterator[dict[int, Any]]:
    """Let a function handle these signals, where the system has them. Yields the old handlers.

    A SIGHUP that is ignored stays so: that is how nohup has a run outlive its terminal.
    """
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names if hasattr(signal, name)}
    before = {n: old for n, old in before.items() if not (n.name == "SIGHUP" and old is signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP, in a list that fills as they come, for a loop to stop in good order.

    Another one acts at once if it comes two seconds later or more: torchrun passes Ctrl-C on to processes that the
    terminal told already.
    """
    asked: list[int] = []
    first = 0.0

    def ask(number: int, frame: Any) -> None:
        nonlocal first
        asked.append(number)
        if len(asked) == 1:
            first = time.monotonic()
            say("stopping after this step; again stops at once and loses what came after the last checkpoint")
        elif time.monotonic() - first > 2 and callable(before[number]):
            before[number](number, frame)

    with handled(ask, "SIGINT", "SIGTERM", "SIGHUP") as before:
        yield asked


# ---------------------------------------------------------------------------------------------------------------------
# One process, or several that torchrun starts. Alone, every function here does what its first line says for one.


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


class Alone(UserError):
    """What ends one process of several while the others do not know of it, unlike all that they meet together."""


class Lost(Alone):
    """Another process has ended."""

    status = 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. A UserError that all of them meet is told by the first."""
    if not dist.is_torchelastic_launched():
        yield
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    patience = timedelta(hours=2)  # while one process of a machine downloads, for instance
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=patience)
    try:
        yield
    except UserError as error:
        if rank() > 0 and not isinstance(error, Alone):
            raise SystemExit(error.status) from None
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = re.sub(r"^\[\S+\] ", "", first_line(error)).split(". ")[0]  # without gloo's own file and line
        raise Lost(
            f"process {rank()} of {processes()} lost another one ({reason}); its own message, or torchrun's below, "
            "says why. What was saved is kept, and the same command goes on from there"
        ) from None
    dist.destroy_process_group()  # not after an error: NCCL would wait for processes that do not know of it


def from_first(function: Callable[[], T]) -> T:
    """What `function` returns in the first process, in all of them; what it raises there ends all."""
    if processes() == 1:
        return function()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = function()
        except (UserError, SystemExit) as error:
            found[1] = error
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    result, error = found
    if error:
        raise error
    return result


def everywhere(function: Callable[[], T]) -> T:
    """What `function` returns, in every process; what it raises in one ends all.

    One process on each machine goes first, so that it alone downloads.
    """
    if processes() == 1:
        return function()
    result = error = None
    for first in (True, False):
        if (local_rank() == 0) == first:
            try:
                result = function()
            except (UserError, SystemExit) as raised:
                error = raised
        errors: list[Any] = [None] * processes()
        dist.all_gather_object(errors, error)
        if any(errors):
            raise next(filter(None, errors))
    return result


def highest(*values: int) -> list[int]:
    """The largest of each value over the processes. On the host: a GPU need not wait for it."""
    if processes() == 1:
        return list(values)
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the processes."""
    tensor = tensor.clone()
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def own_part(n: int) -> slice:
    """Which of n things are this process's: together the parts hold each once, in order, and differ by one at most."""
    return slice(n * rank() // processes(), n * (rank() + 1) // processes())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be alone in writing to a run's folder. Raises UserError if another process is at it.

    The system lifts the lock of a process that has died, whatever killed it.
    """
    path, held = folder / ".lock", []
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a link or pipe: no

    def take() -> None:
        while not held:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = os.fdopen(os.open(path, flags, 0o666), "r+")  # closed when the lock is given back
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be written ({error.strerror}); choose another folder (--checkpoints_path, "
                    "--imgs_path)"
                ) from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    continue  # a new file: the one that this waited for is gone with its process
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"{folder}: {file.read() or 'another process'} is writing there. Wait for it, stop it, or give "
                    "this experiment a name of its own (--run NAME)"
                ) from None
            except FileNotFoundError:
                continue
            except OSError:
                say(f"{folder}: this file system has no locks; see to it that no other process writes there")
                return
            held.append(file)
            with contextlib.suppress(OSError):  # a full disk; it only helps the other one's message
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()

    try:
        if fcntl:
            from_first(take)
        yield
    finally:
        for file in held:
            path.unlink(missing_ok=True)  # while it is still locked
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing came of it


# ---------------------------------------------------------------------------------------------------------------------
# Device and precision


def resolve(config: Config) -> Config:
    """The config with `device` and `precision` decided for this process. Raises UserError for what it cannot do."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if processes() > 1:
        if number or kind == "mps":
            raise UserError(f"device = {device!r}: with several processes takes cuda, one for each of them, or cpu")
        if config.batch_size < 2 * processes():
            raise UserError(
                f"batch_size = {config.batch_size}: takes 2 images or more for each of {processes()} processes"
            )
        number = str(local_rank()) if kind == "cuda" else ""
        device = f"cuda:{number}" if number else device
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        there = f"this machine has {torch.cuda.device_count()} CUDA devices"
        fewer = "start no more processes than that, or " if processes() > 1 else ""
        raise UserError(f"device = {device!r}: {there}; {fewer}try cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device = {device!r}: this machine has no MPS device; try cpu")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if gains_by_bf16(kind, config.image_size) else "fp32"
    return replace(config, device=device, precision=precision)


def settle(config: Config) -> Config:
    """`resolve` and `tune` in every process, in one precision."""
    config = everywhere(lambda: resolve(config))
    config = replace(config, precision=from_first(lambda: config.precision))
    tune(config)
    return config


def gains_by_bf16(device_type: str, image_size: int) -> bool:
    """Whether bfloat16 is faster: not where a CPU emulates it, and on no CPU below 64 px."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public name for these two that torch 2.10 knows.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device_type == "cpu" and native and image_size >= 64


def memory_format(device: str | torch.device) -> torch.memory_format:
    """channels_last, which convolutions are fastest in, except on MPS, where torch computes wrong gradients in it."""
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def autocast(device: str | torch.device, precision: str) -> torch.autocast:
    """Forward passes run under this: in bfloat16 where that is the precision, else as written."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def describe_precision(config: Config) -> str:
    """The precision, and whether it is quite that: on CUDA torch runs fp32 convolutions in TF32 by default."""
    tf32 = torch.device(config.device).type == "cuda" and torch.backends.cudnn.allow_tf32
    return config.precision + (" (convolutions in TF32)" if tf32 and config.precision == "fp32" else "")


def tune(config: Config) -> None:
    """Process-wide switches.

    `deterministic` makes a GPU compute the same bits each time; a CPU does so anyway.

    On a CPU glibc is told to keep the memory of freed tensors. Otherwise each large one goes back to the system and
    comes again page by page in the next step: at 224 px that was 40% of a ResNet50 step. Other C libraries have no
    such switch.
    """
    torch.backends.cudnn.benchmark = not config.deterministic  # every batch of a run has the same shape
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for, before its first call
    if config.device == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the heap's end back


def device_name(config: Config) -> str:
    if torch.device(config.device).type == "cuda":
        return torch.cuda.get_device_name(config.device)
    return f"{config.device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def environment(config: Config) -> dict[str, str]:
    """What a result depends on besides the settings."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "device": device_name(config),
        "precision": describe_precision(config),
        "processes": str(processes()),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: disk to device, once


class Split(NamedTuple):
    images: torch.Tensor  # (N, 3, H, W) uint8
    labels: torch.Tensor  # (N,) int64


def to_split(images: np.ndarray, labels: list[int]) -> Split:
    """From images (N, H, W, 3) as PIL and torchvision have them."""
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


class Dataset(NamedTuple):
    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    digest: str  # of the classes and every image and label

    def subset(self, size: int | None) -> torch.Tensor:
        """Indices (size,) of a stratified choice of training images, the same for everyone who asks; None: all."""
        everything = torch.arange(len(self.train.labels))
        return everything if size is None else stratified(self.train.labels, size, "train_size")[0]

    @property
    def held_out(self) -> tuple[str, Split]:
        """What is measured while training: the validation images where there are any, else the test images."""
        return ("validation", self.validation) if self.validation else ("test", self.test)


def load_dataset(config: Config) -> Dataset:
    """The images of `config.dataset` as uint8 tensors on `config.device`. Raises UserError saying what to put where."""
    read = {"cifar10": read_cifar10, "digits": read_digits}.get(config.dataset, read_folder)
    classes, train, test = read(config)
    digest = hashlib.sha256(repr(classes).encode())
    for split in (train, test):
        for tensor in split:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy())

    available = len(train.labels) - config.validation_size
    if config.batch_size > available:
        held_out = f" and validation_size = {config.validation_size} of them are held out"
        raise UserError(
            f"batch_size = {config.batch_size}: takes at most the number of training images; {config.dataset} has "
            f"{len(train.labels)}{held_out if config.validation_size else ''}"
        )
    for name, recipe in config.recipes.items():
        if recipe.train_size is not None and recipe.train_size > available:
            raise UserError(f"{name}.train_size = {recipe.train_size}: takes at most the {available} training images")

    validation = None
    if config.validation_size:
        held_out, kept = stratified(train.labels, config.validation_size, "validation_size")
        validation, train = (Split(train.images[index], train.labels[index]) for index in (held_out, kept))
    splits = [train, validation, test]
    on_cuda, total = torch.device(config.device).type == "cuda", sum(split.images.nbytes for split in splits if split)
    on_host = on_cuda and total > torch.cuda.mem_get_info(config.device)[0] / 2
    splits = [split and to_device(split, config.device, on_host) for split in splits]
    return Dataset(classes, *splits, digest.hexdigest())


def load_everywhere(config: Config) -> Dataset:
    """The data set in every process. Raises UserError where machines hold different images."""
    dataset = everywhere(lambda: load_dataset(config))
    if from_first(lambda: dataset.digest) != dataset.digest:
        raise Alone(f"process {rank()}: {config.dataset} is not what the first machine has; copy it from there")
    return dataset


def to_device(split: Split, device: str, images_on_host: bool = False) -> Split:
    """Labels on the device, and the images too unless they are to stay in pinned host memory, as too many for it."""
    images = split.images.pin_memory() if images_on_host else split.images.to(device)
    return Split(images, split.labels.to(device))


def stratified(labels: torch.Tensor, size: int, setting: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of `size` images with the classes in proportion, and of the others; both sorted, always the same."""
    labels = labels.cpu().numpy()
    if size == len(labels):
        return torch.arange(size), torch.arange(0)
    try:
        parts = train_test_split(np.arange(len(labels)), train_size=size, stratify=labels, random_state=0)
    except ValueError:  # that is, a class would have no image on one side
        classes = len(np.unique(labels))
        raise UserError(
            f"{setting} = {size}: takes an image of each class and leaves one; with {classes} classes and {len(labels)}"
            f" images that is from {classes} to {len(labels) - classes}, and two images of each class or more"
        ) from None
    return tuple(torch.from_numpy(np.sort(part)) for part in parts)


def read_cifar10(config: Config) -> tuple[tuple[str, ...], Split, Split]:
    """CIFAR-10 through torchvision, which downloads it once and verifies it."""
    try:
        splits = [CIFAR10(config.data_path, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # OSError: no network, no space, no permission; RuntimeError: damaged
        raise UserError(
            f"CIFAR-10 is not in {config.data_path}/ and could not be downloaded ({error}). Put {CIFAR10.filename} "
            f"(md5 {CIFAR10.tgz_md5}, from {CIFAR10.url}) into {config.data_path}/ and run this again, or try what "
            "needs no download: python teacher_student_model.py --preset demo"
        ) from None
    return CIFAR10_CLASSES, *(to_split(split.data, split.targets) for split in splits)


def read_digits(config: Config) -> tuple[tuple[str, ...], Split, Split]:
    """The 1,797 handwritten digits, 8 x 8 pixels of 0 to 16, that come with scikit-learn; 500 are the test set."""
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    images = images.unsqueeze(1).expand(-1, 3, -1, -1)  # (N, 3, 8, 8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    parts = stratified(labels, TRAINING_IMAGES["digits"], "train_size")
    return tuple("0123456789"), *(Split(images[index], labels[index]) for index in parts)


def read_folder(config: Config) -> tuple[tuple[str, ...], Split, Split]:
    """train/CLASS/* and test/CLASS/* (or val/CLASS/*): every image file in one of IMAGE_FORMATS, as RGB.

    Images that are larger than `image_size` are resized while reading, and if the sizes still differ, all are.
    """
    root = Path(config.dataset)
    if not root.is_dir():
        hint = f"no such folder ({nearest(config.dataset, TRAINING_IMAGES)})"
        raise UserError(f"dataset = {config.dataset!r}: {hint}; takes cifar10, digits or a folder with train/CLASS/*")
    test = root / "test" if (root / "test").is_dir() else root / "val"
    folders = [root / "train", test]
    if missing := [f"{folder}" for folder in folders if not folder.is_dir()]:
        raise UserError(f"{root}: takes the folders train/ and test/ (or val/); there is no {' and no '.join(missing)}")
    try:
        files = [{d.name: visible(d) for d in visible(folder) if d.is_dir()} for folder in folders]  # [train, test]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    classes = tuple(sorted(files[0].keys() | files[1].keys()))
    problems = [f"{root}: class {c!r} has a name that is not UTF-8; rename the folder" for c in classes if not utf8(c)]
    problems += [
        f"{folder}: has no folder for class {name!r}" if name not in found else f"{folder / name}: holds no images"
        for folder, found in zip(folders, files, strict=True)
        for name in classes
        if not found.get(name)
    ]
    if len(classes) < 2:
        problems.append(f"{folders[0]}: takes one folder of images for each class, two or more; it has {len(classes)}")
    if problems:
        raise UserError(*problems[:10], *[f"and {len(problems) - 10} more"] * (len(problems) > 10))
    return classes, *(
        read_images(folder, found, classes, config.image_size) for folder, found in zip(folders, files, strict=True)
    )


def utf8(name: str) -> bool:
    return name.encode(errors="ignore").decode() == name


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read_images(folder: Path, files: dict[str, list[Path]], classes: tuple[str, ...], size: int) -> Split:
    paths = [path for name in classes for path in files[name]]
    labels = [label for label, name in enumerate(classes) for _ in files[name]]
    arrays, unreadable = [], []
    for path in progress(iterable=paths, desc=f"reading {folder}", unit=" images"):
        try:
            image = open_image(path)
            arrays.append(pixels(image, size if max(image.size) > size else None))
        except UserError as error:
            unreadable += error.messages
    if unreadable:
        more = [f"and {len(unreadable) - 10} more"] * (len(unreadable) > 10)
        raise UserError(*unreadable[:10], *more, "mend or remove what is not an image")
    if len({array.shape for array in arrays}) > 1:
        arrays = [pixels(Image.fromarray(array), size) for array in arrays]
    return to_split(np.stack(arrays), labels)


def open_image(path: str | os.PathLike, upright: bool = False) -> Image.Image:
    """An image file in RGB, turned as its camera noted if `upright`. Raises UserError if there is none in it."""
    try:
        if not Path(path).is_file():  # reading a pipe would never end
            raise OSError("not a file" if Path(path).exists() else "no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.mode[0] in "IF":  # PIL would cut 16 bits off at 8, which makes such an image white
                    raise OSError("more than 8 bits a channel; save it with 8")
                return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except Exception as error:  # PIL's decoders raise what they like
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)})") from None


def pixels(image: Image.Image, size: int | None) -> np.ndarray:
    """(H, W, 3) uint8, resized to (size, size, 3) if a size is given."""
    return np.asarray(image if size is None else image.resize((size, size), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------------------------------------------------------------
# From uint8 images to what a model takes


@lru_cache
def resize_taps(before: int, after: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each tap of Pillow's bilinear filter: which pixel each of `after` pixels reads, and its 22-bit weight.

    Source: Pillow, src/libImaging/Resample.c, precompute_coeffs and normalize_coeffs_8bpc. Growing takes 2 taps,
    shrinking by a factor f up to 2 f + 1.
    """
    scale = before / after
    support = max(scale, 1.0)
    rows = []
    for center in ((pixel + 0.5) * scale for pixel in range(after)):
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), before)
        weights = [max(0.0, 1.0 - abs(pixel + 0.5 - center) / support) for pixel in range(first, last)]
        rows.append((first, [int(0.5 + weight / sum(weights) * (1 << 22)) for weight in weights]))
    taps = range(max(len(weights) for _, weights in rows))
    return [
        (
            torch.tensor([min(first + tap, before - 1) for first, _ in rows], device=device),
            torch.tensor(
                [([*weights, *[0] * len(taps)])[tap] for _, weights in rows], dtype=torch.int32, device=device
            ),
        )
        for tap in taps
    ]


def resize_axis(images: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    """One pass of Pillow's resize over int32 images, in its own fixed-point arithmetic."""
    if images.shape[axis] == size:
        return images
    total = None
    for index, weight in resize_taps(images.shape[axis], size, images.device):
        weight = weight.view([-1 if a == axis else 1 for a in range(images.ndim)])
        product = images.index_select(axis, index).mul_(weight)
        total = product.add_(1 << 21) if total is None else total.add_(product)  # the half that rounds
    return total.bitwise_right_shift_(22)


def in_chunks(function, images: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = function(images), on a CPU a few images at a time so that what lies between stays in its cache."""
    chunk = max(1, 2**19 // out.shape[1:].numel()) if images.device.type == "cpu" else max(1, len(images))
    for start in range(0, len(images), chunk):
        out[start : start + chunk] = function(images[start : start + chunk])
    return out


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """The bits of PIL's bilinear resize, on any device: uint8 (N, 3, H, W) -> uint8 (N, 3, size, size).

    Exact for every size of square images and of images that grow. Where the height shrinks and the width shrinks less
    or grows, Pillow 13 makes the vertical pass first; older ones, and this, always the horizontal one: off by one
    level there.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"resize takes uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")

    def passes(chunk):
        return resize_axis(resize_axis(chunk.to(torch.int32), size, 3), size, 2)

    return in_chunks(passes, images, images.new_empty((*images.shape[:2], size, size)))


@lru_cache
def imagenet_statistics(device: torch.device) -> list[torch.Tensor]:
    """Mean and standard deviation (1, 3, 1, 1), made once: a copy to a GPU in every step would make it wait."""
    return [torch.tensor(t, device=device).view(1, 3, 1, 1) for t in (IMAGENET_MEAN, IMAGENET_STD)]


def prepare(images: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """What the models take: uint8 (N, 3, H, W) -> normalised float32 (N, 3, size, size).

    The bits of torchvision's Resize, ToTensor and Normalize with ImageNet's mean and standard deviation. Size None
    leaves the size as it is.
    """
    mean, std = imagenet_statistics(images.device)

    def normalise(chunk):
        chunk = chunk if size is None else resize(chunk, size)
        return chunk.to(torch.float32).div_(255).sub_(mean).div_(std)

    shape = images.shape if size is None else (*images.shape[:2], size, size)
    out = torch.empty(shape, device=images.device, memory_format=memory_format(images.device))
    return in_chunks(normalise, images, out)


class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, S, S) float32, normalised
    labels: torch.Tensor  # (B,) int64
    index: torch.Tensor  # (B,) int64, into the training images
    flipped: torch.Tensor  # (B,) bool


def flip(images: torch.Tensor, flipped: torch.Tensor) -> torch.Tensor:
    """Mirror the images (N, 3, H, W) for which `flipped` (N,) is true, left to right."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


def shift(images: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Move each image of (N, 3, H, W) by its own number of pixels (N,), either way; black comes in at the edges."""
    n, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) - down.view(-1, 1)  # (N, H), where each pixel comes from
    columns = torch.arange(width, device=images.device) - right.view(-1, 1)  # (N, W)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    image = torch.arange(n, device=images.device).view(-1, 1, 1)
    rows, columns = rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)
    moved = images.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
    return moved * inside.unsqueeze(1)


def batches(
    split: Split, subset: torch.Tensor, config: Config, seed: int, epoch: int, first_step: int = 0
) -> Iterator[Batch]:
    """The batches of one epoch, from `first_step` on; batch k is a function of (seed, epoch, k) and nothing else.

    Every image of `subset` (M,) comes at most once an epoch; the M % batch_size that fill no batch are left out. Of
    several processes each gets its own part of every batch.
    """
    device = split.labels.device
    random = np.random.default_rng((seed, epoch))
    order = subset[torch.from_numpy(random.permutation(len(subset)))]
    there = order.to(split.images.device)  # the images may have stayed in the host's memory
    order = order.to(device)
    flipped = torch.from_numpy(random.random(len(subset)) < config.horizontal_flip).to(device)
    padding = config.crop_padding
    shifts = torch.from_numpy(random.integers(-padding, padding, (2, len(subset)), endpoint=True)).to(device)
    own = own_part(config.batch_size)
    for step in range(first_step, len(subset) // config.batch_size):
        here = slice(step * config.batch_size + own.start, step * config.batch_size + own.stop)
        images = split.images[there[here]]
        if split.images.is_pinned():
            images = images.pin_memory()  # only from there does a copy to the GPU not make the host wait
        images = images.to(device, non_blocking=True)
        if padding:
            images = shift(images, *shifts[:, here])
        images = prepare(flip(images, flipped[here]), config.image_size)
        yield Batch(images, split.labels[order[here]], order[here], flipped[here])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

FORMAT = 1
_COMMENT = b"sha256 "  # a checkpoint is a zip file; its comment holds the digest of everything before the comment


def checkpoint_path(config: Config, name: str, seed: int) -> Path:
    return Path(config.checkpoints_path, config.run, f"seed{seed}", f"{name}.pt")


def training_settings(
    name: str, seed: int, config: Config, dataset: Dataset, teacher_digest: str | None
) -> dict[str, Any]:
    """All that the weights of one recipe and seed depend on; a checkpoint made with anything else is not that model.

    Without a digest the teacher is left out: there is none, or it is gone.
    """
    recipe = asdict(config.recipes[name])
    for unused in ("baseline",) if recipe["teacher"] else ("baseline", "alpha", "temperature", "scale_soft_loss"):
        del recipe[unused]
    shared = (
        *("image_size", "horizontal_flip", "crop_padding", "validation_size", "batch_size"),
        *("precision", "sync_batchnorm"),
    )
    return {
        "seed": seed,
        **{f"{name}.{field}": value for field, value in recipe.items()},
        **{field: getattr(config, field) for field in shared},
        "images of the data set": dataset.digest,
        **({"weights of the teacher": teacher_digest} if teacher_digest else {}),
    }


def refuse_other_settings(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise UserError, naming what differs, if the checkpoint was made with other settings."""

    def short(value: Any) -> Any:
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value

    # A checkpoint that is older than a setting was made with its default.
    defaults = {field.name: field.default for field in settings_of(Config)}
    defaults |= {f"{state['name']}.{field.name}": field.default for field in settings_of(Recipe)}
    made_with = {**defaults, "seed": state.get("seed"), **state["settings"]}
    differing = [
        f"{field} was {short(made_with.get(field))}, is now {short(value)}"
        for field, value in settings.items()
        if made_with.get(field) != value
    ]
    if differing:
        raise UserError(
            f"{path}: was trained with other settings: {'; '.join(differing)}. Set them back, give this experiment "
            "a name of its own (--run NAME), or train again, in its place, what differs (--overwrite)"
        )


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, types and bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that `path` holds the old state or the new one, never half of one.

    The file is torch's own format, with the sha256 of its content in the zip comment, which torch does not read.
    Raises UserError, the old file untouched, if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    comment = _COMMENT + hashlib.sha256(content[:-2]).hexdigest().encode()
    # The last two bytes of a zip file without a comment are the comment's length, 0.
    write_durably(path, content[:-2] + len(comment).to_bytes(2, "little") + comment)


def write_durably(path: Path, content: bytes) -> None:
    """Replace the file in one step: a crash at any moment leaves the old content or the new. Raises UserError."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a process that was killed
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); it takes {math.ceil(len(content) / 1e6) or 1} MB, and what "
            "was there is untouched. Make room or choose another folder, and run this again"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            temporary.unlink(missing_ok=True)
    if os.name == "posix":
        with contextlib.suppress(OSError):  # makes the new name durable too, on file systems that can
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, its digest verified, on the CPU. Raises UserError naming the file."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    comment_length = len(_COMMENT) + 64
    body, tail = content[: -comment_length - 2], content[-comment_length - 2 :]
    length, comment = tail[:2], tail[2:]
    mend = "delete it and train again"
    if not content.startswith(b"PK"):
        raise UserError(f"{path}: is not a checkpoint; {mend}")
    if length != comment_length.to_bytes(2, "little") or not comment.startswith(_COMMENT):
        raise UserError(f"{path}: is damaged or was not written by this program (it carries no sha256); {mend}")
    if comment[len(_COMMENT) :].decode(errors="replace") != hashlib.sha256(body).hexdigest():
        raise UserError(f"{path}: is damaged (its content does not match its sha256); {mend}")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file from elsewhere provokes in torch's reader; nothing of it is executed
        raise UserError(
            f"{path}: is undamaged but cannot be loaded ({first_line(error)}); free memory, or move it away and train "
            "again"
        ) from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path}: has format {found}, this program reads format {FORMAT}; use the program that wrote it, or move "
            "it away and train again"
        )
    return state


def load_training(path: Path) -> dict[str, Any] | None:
    """The state of a training, finished or not; None if there is no file. Raises UserError for anything else in it."""
    if not path.exists():
        return None
    state = load_checkpoint(path)
    kinds = {"name": str, "settings": dict, "environment": dict, "finished": bool, "model": dict, "history": list}
    wrong = [key for key, kind in {**kinds, "classes": list}.items() if not isinstance(state.get(key), kind)]
    wrong += ["arch"] * (state.get("arch") not in ARCHS)
    if wrong:
        raise UserError(f"{path}: holds no model of ours (wrong: {', '.join(wrong)}); delete it and train again")
    return state


def load_finished(path: Path) -> dict[str, Any] | None:
    """The state of a training that is finished; None if there is no file, or one that is still being trained."""
    state = load_training(path)
    return state if state and state["finished"] else None


def read_logits(path: Path, made_with: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
    """A teacher's stored logits; NaN where there are none, or, with a line that says so, damaged ones or others."""
    missing = torch.full(shape, torch.nan)
    if not path.exists():
        return missing
    try:
        state = load_checkpoint(path)
    except UserError as error:
        say(f"{error.messages[0].split(';')[0]}; computed again")
        return missing
    logits, found = state.get("logits"), state.get("made_with")
    stale = [field for field, value in made_with.items() if not isinstance(found, dict) or found.get(field) != value]
    stale += ["shape"] * (not isinstance(logits, torch.Tensor) or logits.shape != shape)
    if stale:
        say(f"{path}: made with another {' and '.join(stale)}; computed again")
        return missing
    return logits
