"""Convolutions with small outputs as matrix products: on a CPU faster, and correct in bfloat16."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class SmallConvolutions(TorchFunctionMode):
    """Within this context, convolutions whose output is at most 2 x 2 px are computed as matrix products on a CPU.

    Those are the last of a ResNet on images of at most 64 px, and have most of its weights. The sums are the same and
    only rounding differs, but oneDNN (3.12) is slow at the gradients of such weights: without this, a training step
    takes up to 1.6 times as long (docs/speed.md). In bfloat16 oneDNN is also wrong: where the input of a convolution
    is smaller than its stride, it leaves the gradients of the weights that only multiply padding uninitialised.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (convolution if function is torch.conv2d else function)(*args, **(kwargs or {}))


def pair(number: int | Sequence[int]) -> tuple[int, int]:
    return (number, number) if isinstance(number, int) else (number[0], number[-1])


def convolution(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """`torch.conv2d`; where the output is at most 2 x 2 px, by `multiply`, without taps that only multiply padding."""
    if isinstance(padding, str) or input.dim() != 4 or input.shape[1] != groups * weight.shape[1]:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    strides, paddings, dilations = pair(stride), list(pair(padding)), pair(dilation)
    sizes = [
        (input.shape[2 + i] + 2 * paddings[i] - dilations[i] * (weight.shape[2 + i] - 1) - 1) // strides[i] + 1
        for i in range(2)
    ]
    if min(sizes) < 1 or max(sizes) > 2 or min(paddings) < 0:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    for i, axis in enumerate((2, 3)):
        met = [tap for tap in range(weight.shape[axis]) if 0 <= tap * dilations[i] - paddings[i] < input.shape[axis]]
        if sizes[i] == 1 and met:  # the output's only position meets no other tap, and no other part of the input
            if len(met) < weight.shape[axis]:  # a narrowed gradient has other strides, which DDP warns of
                weight = weight.narrow(axis, met[0], len(met))
            input = input.narrow(axis, met[0] * dilations[i] - paddings[i], dilations[i] * (len(met) - 1) + 1)
            paddings[i] = 0
    if groups > 1 or len(input) == 1:  # here conv2d is faster
        return torch.conv2d(input, weight, bias, strides, paddings, dilations, groups)
    return multiply(input, weight, bias, strides, paddings, dilations, sizes)


def multiply(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    strides: tuple[int, int],
    paddings: list[int],
    dilations: tuple[int, int],
    sizes: list[int],
) -> torch.Tensor:
    """The convolution of input (N, C, H, W) with a weight (K, C, h, w), as a product of two matrices: (N, K, *sizes).

    One has a row for each of the `sizes` positions in each image, the other for each of the K channels; their columns
    are the h * w * C weights of a channel, in the order of channels_last memory.
    """
    padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, paddings[1], paddings[1], paddings[0], paddings[0]))
    ends = [(size - 1) * stride + 1 for size, stride in zip(sizes, strides, strict=True)]
    shifted = [
        padded[:, y : y + ends[0] : strides[0], x : x + ends[1] : strides[1]]
        for y in range(0, dilations[0] * weight.shape[2], dilations[0])
        for x in range(0, dilations[1] * weight.shape[3], dilations[1])
    ]
    rows = torch.stack(shifted, dim=3).flatten(3)
    return F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)
