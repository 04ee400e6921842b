import numpy as np
import pytest
import torch
from conftest import random_images
from PIL import Image

from engine.images import resize
from report.export import resize_by_matrices


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
