"""Predictions: logits of many images from a model in evaluation mode."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from engine.console import Progress
from engine.device import forward_pass, is_out_of_memory, without_tuning
from engine.distributed import all_reduce_max, all_reduce_sum, shard
from engine.errors import UserError
from engine.images import normalisation_of, prepare


class Stopped(Exception):
    """Interrupted by a signal; the whole prediction has to be repeated."""


class NotFinite(UserError):
    """A model's logits are NaN or infinite."""


@torch.no_grad()
def fold_batchnorm(model: nn.Module, images: torch.Tensor, precision: str = "fp32") -> nn.Module:
    """A copy in evaluation mode, each BatchNorm folded into the convolution before it where that changes nothing.

    The copy is not folded if torch.fx cannot trace the model, or if folding changes the logits of `images`
    (n, 3, S, S), normalised and on the model's device, by more than rounding. Rounding is measured in bf16, as the
    distance of the unfolded model's logits from those in fp32. It is not folded either if the type of its logits
    changes: tracing drops a model's own autocast.
    """
    model = copy.deepcopy(model).eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    try:
        folded = fuse(model, inplace=True)
    except Exception:  # torch.fx raises exceptions of many types for code that it cannot trace
        return model

    def run(module: nn.Module, precision: str) -> torch.Tensor:
        with forward_pass(images.device, precision):
            return module(images)

    exact, found = run(model, "fp32"), run(folded, precision)
    own = exact if precision == "fp32" else run(model, precision)
    of_fp32 = 1e-2 if images.is_cuda else 1e-4  # relative; CUDA computes float32 convolutions in TF32
    rounding = 3 * (own - exact).norm() + of_fp32 * exact.norm()
    return folded if found.dtype == own.dtype and (found - exact).norm() <= rounding else model


@without_tuning()
def predict(
    model: nn.Module,
    images: torch.Tensor,
    image_size: int | None = None,
    precision: str = "fp32",
    batch_size: int = 500,
    title: str = "predicting",
    stop: Callable[[], int] = lambda: 0,
    fold: bool = True,
) -> torch.Tensor:
    """Logits (N, C) float32 of a model in evaluation mode, on its device; the model itself is left unchanged.

    uint8 images (N, 3, H, W) are resized to `image_size` (None: not resized) and normalised as the model takes
    them; float images are passed on as they are. Batches that do not fit into the GPU's memory are halved. With several
    processes, all of which must call this, each computes its part and receives all logits. Raises Stopped, in all of
    them, if `stop` returns a signal in one, and NotFinite, which begins with `title`, if logits are NaN or infinite.
    `fold` folds BatchNorm first, which takes as long as predicting some hundred small images.
    """
    device = next(model.parameters()).device

    def prepared(chunk: torch.Tensor) -> torch.Tensor:
        chunk = chunk.to(device, non_blocking=True)
        return prepare(chunk, image_size, normalisation_of(model)) if chunk.dtype == torch.uint8 else chunk

    network = fold_batchnorm(model, prepared(images[:4]), precision) if fold else copy.deepcopy(model).eval()
    own, parts = shard(len(images)), []
    waiting = list(images[own].split(batch_size))
    with torch.inference_mode(), Progress(title, own.stop - own.start) as progress:
        while waiting:
            chunk = waiting.pop(0)
            try:
                batch = prepared(chunk)
                with forward_pass(device, precision):
                    parts.append(network(batch).float())
            except RuntimeError as error:
                if len(chunk) == 1 or not is_out_of_memory(error):
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
    logits = all_reduce_sum(logits)  # each row is zero on all ranks but one
    wrong = (~logits.isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        raise NotFinite(
            f"{title}: the logits of {len(wrong):,} of {len(images):,} images are NaN or infinite, first those of "
            f"image {wrong[0]} (counted from 0). This model cannot be used: use other weights, or move its checkpoint "
            "away and train it again, with a lower lr"
        )
    return logits
