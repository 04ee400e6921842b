import numpy as np
import pytest
import torch
from conftest import random_images
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from engine.errors import UserError
from engine.images import prepare, resize
from report.export import Run, check_export, export_program, load_onnx, load_pt2, onnx_program, resize_by_matrices


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (8, 8), (16, 16), (31, 31), (32, 32), (33, 33), (64, 64), (299, 299), (7, 25), (1, 20)],
)
def test_the_exported_resize_is_bit_equal_to_pil(height, width):
    images = random_images(3, height, width)
    found = resize_by_matrices(images, 32)
    assert torch.equal(found.to(torch.uint8), resize(images, 32))
    for image, resized in zip(images, found, strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(np.asarray(expected), resized.permute(1, 2, 0).numpy())


def test_the_exported_resize_is_bit_equal_to_resize():
    for height, width in ((40, 20), (20, 40), (100, 33), (33, 300)):
        images = random_images(2, height, width)
        assert torch.equal(resize_by_matrices(images, 32).to(torch.uint8), resize(images, 32))


def onnx(content: bytes) -> Run:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    return load_onnx(onnx_program(content, about={}))


@pytest.mark.parametrize("load", [load_pt2, onnx])
@pytest.mark.parametrize("how", ["crop", "pad"])
def test_an_exported_program_makes_photographs_square_as_pil_does(how, load, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(), nn.Linear(16, 3))
    program = load(export_program(network, 16, how, about={}))
    boxes = {(30, 40): {"crop": (5, 0, 35, 30), "pad": (0, -5, 40, 35)}}  # PIL's crop fills what is outside with black
    boxes |= {(41, 30): {"crop": (0, 5, 30, 35), "pad": (-5, 0, 36, 41)}}
    boxes |= {
        (5, 8): {"crop": (1, 0, 6, 5), "pad": (0, -1, 8, 7)},
        (9, 9): dict.fromkeys(("crop", "pad"), (0, 0, 9, 9)),
    }
    images, expected = [random_images(2, *size) for size in boxes], []
    for group, box in zip(images, boxes.values(), strict=True):
        for image in group:
            square = to_pil_image(image).crop(box[how]).resize((16, 16), Image.Resampling.BILINEAR)
            expected.append(network(prepare(pil_to_tensor(square)[None])).softmax(1))
    expected = torch.cat(expected).detach()
    assert check_export(program, tmp_path, images, expected) < 1e-6
    with pytest.raises(UserError, match="differs from the checkpoint"):
        check_export(program, tmp_path, images, expected.roll(1, 0))


def test_images_that_a_program_of_pytorch_cannot_take_are_said(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(), nn.Linear(16, 3))
    program = load_pt2(export_program(network, 16, "crop", about={}))
    with pytest.raises(UserError, match="sides must have 2 px or more"):
        check_export(program, tmp_path, [random_images(1, 1, 5)], torch.zeros(1, 3))
