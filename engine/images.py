"""Image transforms on uint8 tensors, on any device: flip, shift, augment, resize bit-identically to PIL, normalise."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from engine import named
from engine.device import AUGMENTATION, memory_format, seed_torch
from engine.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRECISION_BITS = 22  # of Pillow's fixed-point weights


class Normalisation(NamedTuple):
    """Mean and standard deviation by channel, of RGB values from 0 to 1."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @classmethod
    def recorded(cls, values: dict[str, list[float]]) -> "Normalisation":
        """From a checkpoint, which holds lists."""
        return cls(**{name: tuple(value) for name, value in values.items()})

    def as_recorded(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    def __str__(self) -> str:
        if self == IMAGENET:
            return "ImageNet's mean and standard deviation"
        return f"mean {' '.join(map(str, self.mean))} and standard deviation {' '.join(map(str, self.std))}"


IMAGENET = Normalisation()


def normalisation_of(network: nn.Module) -> Normalisation:
    """What a network's images are normalised with: ImageNet's mean and standard deviation unless it carries others."""
    return getattr(network, "image_normalisation", IMAGENET)


def resize_weights(before: int, after: int) -> torch.Tensor:
    """Pillow's bilinear filter from `before` to `after` pixels: integer weights (after, before), stored as float64.

    Source: Pillow, src/libImaging/Resample.c, precompute_coeffs and normalize_coeffs_8bpc. It is written in tensors so
    that `before` may be a symbolic size while a model is exported.
    """
    scale = torch.full((), before, dtype=torch.float64) / after
    support = scale.clamp(min=1)
    centers = (torch.arange(after, dtype=torch.float64) + 0.5) * scale  # (after,)
    distance = (torch.arange(before, dtype=torch.float64) + 0.5 - centers.unsqueeze(1)).abs() / support
    weights = (1 - distance).clamp(min=0)  # (after, before)
    return (0.5 + weights / weights.sum(1, keepdim=True) * (1 << PRECISION_BITS)).floor()


@lru_cache
def resize_taps(before: int, after: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The nonzero weights by tap: the pixel (after,) that each output pixel reads, and its int32 weight (after,).

    Enlarging takes 2 taps, shrinking by a factor f up to 2 f + 1.
    """
    weights = resize_weights(before, after)
    first = (weights > 0).int().argmax(1)  # (after,)
    taps = []
    for tap in range(int((weights > 0).sum(1).max())):
        index = (first + tap).clamp(max=before - 1)
        weight = weights[torch.arange(after), index] * (first + tap < before)
        taps.append((index.to(device), weight.to(torch.int32).to(device)))
    return taps


def resize_axis(images: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    """One pass of Pillow's resize over int32 images, in its fixed-point arithmetic."""
    if images.shape[axis] == size:
        return images
    shape = [-1 if a == axis else 1 for a in range(images.ndim)]
    products = (
        images.index_select(axis, index).mul_(weight.view(shape))
        for index, weight in resize_taps(images.shape[axis], size, images.device)
    )
    total = next(products).add_(1 << PRECISION_BITS - 1)  # one half, to round
    for product in products:
        total.add_(product)
    return total.bitwise_right_shift_(PRECISION_BITS)


def map_chunks(
    function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """out = function(images); on a CPU in chunks whose intermediate results fit into its cache."""
    chunk = max(1, 2**19 // out.shape[1:].numel()) if images.device.type == "cpu" else max(1, len(images))
    for start in range(0, len(images), chunk):
        out[start : start + chunk] = function(images[start : start + chunk])
    return out


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize bit-identically to PIL's bilinear resize: uint8 (N, 3, H, W) -> uint8 (N, 3, size, size).

    Exact for square images of any size and for images that are enlarged. Where the height shrinks by more than the
    width, Pillow 13 makes the vertical pass first, and older versions, like this function, the horizontal one, which
    differs by at most one level. Raises ValueError for other types or shapes.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"resize takes uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")

    def both_passes(chunk: torch.Tensor) -> torch.Tensor:
        return resize_axis(resize_axis(chunk.to(torch.int32), size, 3), size, 2)

    return map_chunks(both_passes, images, images.new_empty((*images.shape[:2], size, size)))


@lru_cache
def statistics(normalisation: Normalisation, device: torch.device) -> list[torch.Tensor]:
    """Mean and standard deviation (1, 3, 1, 1), cached to avoid a copy to the GPU in every step."""
    return [torch.tensor(t, device=device).view(1, 3, 1, 1) for t in normalisation]


def prepare(images: torch.Tensor, size: int | None = None, normalisation: Normalisation = IMAGENET) -> torch.Tensor:
    """What the models take: uint8 (N, 3, H, W) -> normalised float32 (N, 3, size, size), by default in the same size.

    Bit-identical to torchvision's Resize, ToTensor and Normalize.
    """
    mean, std = statistics(normalisation, images.device)

    def normalise(chunk: torch.Tensor) -> torch.Tensor:
        chunk = chunk if size is None else resize(chunk, size)
        return chunk.to(torch.float32).div_(255).sub_(mean).div_(std)

    shape = images.shape if size is None else (*images.shape[:2], size, size)
    out = torch.empty(shape, device=images.device, memory_format=memory_format(images.device))
    return map_chunks(normalise, images, out)


def flip(images: torch.Tensor, flipped: torch.Tensor) -> torch.Tensor:
    """Mirror, left to right, the images (N, 3, H, W) for which `flipped` (N,) is true."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


def shift(images: torch.Tensor, down: torch.Tensor, right: torch.Tensor, padding: int) -> torch.Tensor:
    """Move each image of (N, 3, H, W) by its own number of pixels (N,), at most `padding`; what is missing is black."""
    n, _, height, width = images.shape
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view (N, 3, 2p+1, 2p+1, H, W)
    return windows[torch.arange(n, device=images.device), :, padding - down, padding - right]


@cache
def transform(name: str, height: int, width: int) -> v2.Transform:
    """torchvision's transform of one uint8 image (3, H, W)."""
    mean = tuple(round(255 * value) for value in IMAGENET_MEAN)
    return {
        "crop": lambda: v2.RandomResizedCrop((height, width), scale=(0.25, 1.0)),
        "trivialaugment": lambda: v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR),
        "randomerasing": lambda: v2.RandomErasing(value=mean),
    }[name]()


def augment(images: torch.Tensor, name: str, position: tuple[int, int, int]) -> torch.Tensor:
    """Apply an augmentation (see Config.augment) to uint8 images (N, 3, H, W), each with random numbers of its own.

    These depend on `position`, the (seed, epoch, number in the epoch) of the first image, and on nothing else.
    """
    if name == "none":
        return images
    function = named.load(name) if named.is_named(name) else transform(name, *images.shape[2:])
    seed, epoch, first = position
    augmented = []
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's generator
        for number, image in enumerate(images, first):
            seed_torch(AUGMENTATION, seed, epoch, number)
            augmented.append(function(image))
            found = augmented[-1]
            if not isinstance(found, torch.Tensor) or found.dtype != torch.uint8 or found.shape != image.shape:
                kind = (
                    f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
                )
                raise UserError(
                    f"augment = {name!r}: must return a uint8 image {tuple(image.shape)}, as it is given, and returned "
                    f"{kind}"
                )
    return torch.stack(augmented)
