"""Predictions: logits of many images from a model in evaluation mode, with BatchNorm folded."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from engine.console import Progress
from engine.device import forward_pass
from engine.distributed import all_reduce_max, all_reduce_sum, shard
from engine.images import prepare


class Stopped(Exception):
    """Interrupted by a signal; the whole prediction has to be repeated."""


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, each BatchNorm folded into the convolution before it, if torch.fx can trace it."""
    model = copy.deepcopy(model).eval()
    try:
        return fuse(model, inplace=True)
    except Exception:  # torch.fx raises exceptions of many types for code that it cannot trace
        return model


def predict(
    model: nn.Module,
    images: torch.Tensor,
    image_size: int | None = None,
    precision: str = "fp32",
    batch_size: int = 500,
    title: str = "predicting",
    stop: Callable[[], int] = lambda: 0,
) -> torch.Tensor:
    """Logits (N, C) float32 of a model in evaluation mode, on its device; the model itself is left unchanged.

    uint8 images (N, 3, H, W) are resized to `image_size` (None: not resized) and normalised; float images are passed on
    as they are. Batches that do not fit into the GPU's memory are halved. With several processes, all of which must
    call this, each computes its part and receives all logits. Raises Stopped, in all of them, if `stop` returns a
    signal in one.
    """
    device = next(model.parameters()).device
    folded = fold_batchnorm(model)
    own, parts = shard(len(images)), []
    waiting = list(images[own].split(batch_size))
    with torch.inference_mode(), Progress(title, own.stop - own.start) as progress:
        while waiting:
            chunk = waiting.pop(0)
            try:
                prepared = chunk.to(device, non_blocking=True)
                if chunk.dtype == torch.uint8:
                    prepared = prepare(prepared, image_size)
                with forward_pass(device, precision):
                    parts.append(folded(prepared).float())
            except torch.OutOfMemoryError:
                if len(chunk) == 1:
                    raise
                waiting = [half for chunk in (chunk, *waiting) for half in chunk.chunk(2)]
                continue
            if progress.update(len(chunk)):
                progress.describe()
            if stop():
                break
    if all_reduce_max(stop())[0]:
        raise Stopped
    predicted = torch.cat(parts)
    logits = predicted.new_zeros(len(images), predicted.shape[1])
    logits[own] = predicted
    return all_reduce_sum(logits)  # each row is zero on all ranks but one
