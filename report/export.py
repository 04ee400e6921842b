"""A model as a program from uint8 images to probabilities: of torch.export, which needs only PyTorch, or ONNX."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import UserError, first_line
from engine.images import PRECISION_BITS, normalisation_of, resize_weights, square_box, statistics
from engine.inference import fold_batchnorm

ONE = 1 << PRECISION_BITS


def resize_by_matrices(images: torch.Tensor, size: int) -> torch.Tensor:
    """engine.images.resize, bit-identical, uint8 (N, 3, H, W) -> float64 (N, 3, size, size), for symbolic H and W.

    Its sums stay below 2^53, so they are exact.
    """
    height, width = images.shape[2:]
    rows = images.to(torch.float64) @ resize_weights(width, size).T
    rows = ((rows + ONE // 2) / ONE).floor()
    return ((resize_weights(height, size) @ rows + ONE // 2) / ONE).floor()


class Exportable(nn.Module):
    """uint8 images (N, 3, H, W) of any size -> probabilities (N, C): what `predict` does, in one module."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, image_size: int, resize: str):
        super().__init__()
        images = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        self.model = fold_batchnorm(model, images).requires_grad_(False).to(memory_format=torch.contiguous_format)
        self.image_size, self.resize = image_size, resize
        mean, std = statistics(normalisation_of(model), torch.device("cpu"))
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.resize != "squash":
            height, width = images.shape[2:]
            left, top, right, bottom = square_box(width, height, self.resize)
            images = F.pad(images, [-left, right - width, -top, bottom - height])  # crops where it is negative
        resized = resize_by_matrices(images, self.image_size).to(torch.float32)
        normalised = resized.div(255).sub(self.mean).div(self.std).contiguous(memory_format=torch.channels_last)
        return torch.softmax(self.model(normalised), dim=1)


def export_program(model: nn.Module, image_size: int, resize: str, about: dict[str, Any]) -> bytes:
    """A .pt2 file: torch.export.load(path).module()(images). `about` is stored in it as about.json."""
    dynamic = {axis: torch.export.Dim(name) for axis, name in {0: "N", 2: "H", 3: "W"}.items()}
    example = torch.zeros(2, 3, image_size + 1, image_size + 2, dtype=torch.uint8)
    program = torch.export.export(Exportable(model, image_size, resize).eval(), (example,), dynamic_shapes=(dynamic,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"about.json": json.dumps(about)})
    return buffer.getvalue()


def onnx_program(pt2: bytes, about: dict[str, Any]) -> bytes:
    """An ONNX file of a .pt2 file: input `images`, output `probabilities`. `about` is its metadata of that name.

    Raises UserError if a package is not installed.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--export onnx: {error.name} is not installed; pip install onnx onnxscript onnxruntime"
        ) from None
    program = torch.onnx.export(
        torch.export.load(io.BytesIO(pt2)), input_names=["images"], output_names=["probabilities"], verbose=False
    )
    model = program.model_proto  # type: ignore[union-attr]
    model.metadata_props.add(key="about", value=json.dumps(about))
    return model.SerializeToString()


Run = Callable[[torch.Tensor], torch.Tensor]  # uint8 images (n, 3, H, W) -> probabilities (n, C)


def load_pt2(content: bytes) -> Run:
    return torch.export.load(io.BytesIO(content)).module()


def load_onnx(content: bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(content)
    return lambda images: torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])


def check_export(program: Run, path: Path, images: list[torch.Tensor], expected: torch.Tensor) -> float:
    """The largest difference from the expected probabilities (n, C). Raises UserError if the predictions differ.

    The images are of several sizes, (m, 3, H, W) each.
    """
    try:
        with torch.inference_mode():
            found = torch.cat([program(chunk) for group in images for chunk in group.split(100)])
    except (AssertionError, RuntimeError) as error:  # of torch.export's guards
        raise UserError(
            f"{path}: the exported model cannot take some images ({first_line(error)}); sides must have 2 px or more"
        ) from None
    differing, largest = int((found.argmax(1) != expected.argmax(1)).sum()), (found - expected).abs().max().item()
    if differing or not largest <= 1e-4:
        raise UserError(
            f"{path}: the exported model differs from the checkpoint: in the class of {differing} of {len(found):,} "
            f"images, in probabilities by up to {largest:.2g}. It was not written; please report this as a bug"
        )
    return largest
