"""Image transforms on uint8 tensors, on any device: flip, shift, augment, resize bit-identically to PIL, normalise."""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from engine import named
from engine.device import AUGMENTATION, memory_format, seeded
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


def square_box(width: Any, height: Any, how: str) -> tuple[Any, Any, Any, Any]:
    """Left, top, right, bottom of the centred square within an image (how = crop), or around it (pad).

    The sizes are numbers, or symbols while a model is exported.
    """
    if how == "crop":
        side = torch.sym_min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
    else:  # ONNX rounds a negative quotient up, and Python down
        side = torch.sym_max(width, height)
        left, top = -((side - width) // 2), -((side - height) // 2)
    return left, top, left + side, top + side


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


BATCHED = ("crop", "randomerasing")  # the augmentations that are computed for a batch, where the images are


def draw_boxes(name: str, random: np.random.Generator, n: int, height: int, width: int) -> torch.Tensor:
    """Boxes for images (height, width) as torchvision draws them: top, left, height and width, (4, n) int64.

    `name` is crop, RandomResizedCrop(scale=(0.25, 1)), or randomerasing, RandomErasing(). The first of ten boxes that
    fits counts. If none does, the largest in the middle is cropped, and nothing erased, which is a height of 0.
    """
    scale, low, high, margin = (0.25, 1.0), 3 / 4, 4 / 3, 0
    if name == "randomerasing":  # its ratio is that of height to width
        scale, low, high, margin = (0.02, 0.33), 1 / 3.3, 1 / 0.3, 1
    area = height * width * random.uniform(*scale, (10, n))
    ratio = np.exp(random.uniform(np.log(low), np.log(high), (10, n)))
    sizes = np.rint(np.sqrt([area / ratio, area * ratio])).astype(np.int64)  # heights and widths (2, 10, n)
    fits = (sizes[0] <= height - margin) & (sizes[1] <= width - margin) & (sizes > 0).all(0)
    size = sizes[:, fits.argmax(0), np.arange(n)]
    room = np.array([[height], [width]]) - size
    corner = (random.random((2, n)) * (room + 1)).astype(np.int64)
    if name == "randomerasing":
        size[0] *= fits.any(0) & (random.random(n) < 0.5)
    else:
        largest = np.array([[min(height, round(width / low))], [min(width, round(height * high))]])
        size = np.where(fits.any(0), size, largest)
        corner = np.where(fits.any(0), corner, (np.array([[height], [width]]) - size) // 2)
    return torch.from_numpy(np.concatenate([corner, size]))


def crop(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Crop each image of (N, 3, H, W) to its box of (4, N), and enlarge that to (H, W), bit-identically to PIL.

    Enlarging takes two taps. Their weights in Pillow's fixed-point arithmetic are computed in integers: rounding is
    never a tie, as long as H and W are below 2^22, and the two add up to 1.
    """
    top, left, height, width = boxes.unsqueeze(2)  # (N, 1) each
    pixels = images.to(torch.int32)
    for axis, start, before in ((3, left, width), (2, top, height)):
        after = images.shape[axis]
        shape = (-1, 1, 1, after) if axis == 3 else (-1, 1, after, 1)
        center = torch.arange(1, 2 * after, 2, device=images.device) * before - after  # (N, after), in pixels / 2 after
        first = center.div(2 * after, rounding_mode="floor")
        weight = ((center - 2 * after * first << PRECISION_BITS) + after) // (2 * after)  # of the second tap
        weight = weight.to(torch.int32).view(shape)
        taps = (start + torch.minimum(tap.clamp(min=0), before - 1) for tap in (first, first + 1))
        one, two = (pixels.gather(axis, tap.view(shape).expand_as(pixels)) for tap in taps)
        pixels = (one << PRECISION_BITS) + (two - one) * weight + (1 << PRECISION_BITS - 1) >> PRECISION_BITS
    return pixels.to(torch.uint8)


def erase(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Paint the box of (4, N) of each image (N, 3, H, W) in ImageNet's mean colour."""
    top, left, height, width = boxes.view(4, -1, 1, 1, 1)
    row, column = (torch.arange(side, device=images.device) for side in images.shape[2:])
    row = row.unsqueeze(1)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # (N, 1, H, W)
    colour = statistics(IMAGENET, images.device)[0].mul(255).round().to(torch.uint8)
    return torch.where(inside, colour, images)


@cache
def trivialaugment() -> v2.Transform:
    return v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)


def augment_one_by_one(images: torch.Tensor, name: str, position: tuple[int, int, int]) -> torch.Tensor:
    """Apply trivialaugment, or the user's own MODULE:NAME, to uint8 images (N, 3, H, W).

    Each has random numbers of its own. These depend on `position`, the (seed, epoch, number in the epoch) of the first
    image, and on nothing else.
    """
    function = partial(named.call, "augment", name) if named.is_named(name) else trivialaugment()
    seed, epoch, first = position
    augmented = []
    for number, image in enumerate(images, first):
        with seeded(AUGMENTATION, seed, epoch, number):
            found = function(image)
        if not isinstance(found, torch.Tensor) or found.dtype != torch.uint8 or found.shape != image.shape:
            kind = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise UserError(
                f"augment = {name!r}: must return a uint8 image {tuple(image.shape)}, as it is given, and returned "
                f"{kind}"
            )
        augmented.append(found)
    return torch.stack(augmented)
