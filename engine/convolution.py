"""Convolutions with small outputs as matrix products: on a CPU faster, and correct in bfloat16."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class SmallConvolutions(TorchFunctionMode):
    """Within this context, convolutions whose output is at most 2 x 2 px are computed as matrix products.

    Those are the last of a ResNet on images of at most 64 px, and have most of its weights. The sums are the same and
    only rounding differs, but oneDNN (3.12) is slow at the gradients of such weights: without this, a training step
    takes up to 1.6 times as long (docs/speed.md). In bfloat16 oneDNN is also wrong: where the input of a strided
    convolution is a single pixel, it leaves the gradients of the weights that only padding meets uninitialised.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (convolution if function is torch.conv2d else function)(*args, **(kwargs or {}))


def pair(number: int | tuple[int, int]) -> tuple[int, int]:
    return (number, number) if isinstance(number, int) else number


def convolution(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """`torch.conv2d`, by `multiply` where the output is at most 2 x 2 px."""
    if input.dim() == 4 and not isinstance(padding, str):
        pads, steps, gaps, taps = pair(padding), pair(stride), pair(dilation), weight.shape[2:]
        spans = [input.shape[2 + i] + 2 * pads[i] - gaps[i] * (taps[i] - 1) for i in range(2)]
        if all(1 <= spans[i] <= 2 * steps[i] for i in range(2)):
            padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, pads[1], pads[1], pads[0], pads[0]))
            shifted = [
                padded[:, y * gaps[0] :][:, : spans[0] : steps[0], x * gaps[1] :][:, :, : spans[1] : steps[1]]
                for y in range(taps[0])
                for x in range(taps[1])
            ]
            return multiply(torch.stack(shifted, dim=3), weight, bias, groups)
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def multiply(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> torch.Tensor:
    """The product (N, K, H, W) of a weight (K, C / groups, h, w) and images (N, H, W, h * w, C), shifted h * w times.

    The matrices' columns are in the order of channels_last memory; groups are a batch of such products.
    """
    kernel = weight.permute(0, 2, 3, 1).flatten(1, 2)
    if groups == 1:
        output = F.linear(images.flatten(3), kernel.flatten(1), bias)
    else:
        images, kernel = images.unflatten(4, (groups, -1)), kernel.unflatten(0, (groups, -1))
        output = torch.einsum("nyxtgc,gktc->nyxgk", images, kernel).flatten(3)
        output = output if bias is None else output + bias
    return output.permute(0, 3, 1, 2)
