import numpy as np
import pytest
import torch
from conftest import random_images
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images
from torchvision import transforms
from torchvision.transforms import v2

from engine.images import crop, draw_boxes, erase, flip, prepare, resize, shift


def pil_resize(images: torch.Tensor, size: int) -> torch.Tensor:
    transform = transforms.Resize((size, size))
    arrays = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return torch.stack([torch.from_numpy(np.array(transform(image))).permute(2, 0, 1) for image in arrays])


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """(200, 3, 32, 32): crops of scikit-learn's two photographs."""
    random = np.random.default_rng(0)
    crops = []
    for photograph in load_sample_images().images:
        height, width, _ = photograph.shape
        corners = zip(random.integers(0, height - 32, 100), random.integers(0, width - 32, 100), strict=True)
        crops += [photograph[y : y + 32, x : x + 32] for y, x in corners]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("size", [8, 16, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 160, 224, 256, 299, 331, 480])
def test_resize_is_bit_equal_to_pil(size, photographs):
    images = torch.cat([photographs[::20], random_images(10, 32, 32, seed=size)])
    assert torch.equal(resize(images, size), pil_resize(images, size))


def test_resize_to_224_is_bit_equal_to_pil_over_ten_million_values(photographs):
    images = torch.cat([photographs[:40], random_images(40, 32, 32)])
    ours = resize(images, 224)
    assert ours.numel() > 10_000_000
    assert torch.equal(ours, pil_resize(images, 224))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 200), (200, 5), (1, 1), (17, 224), (224, 224)])
def test_resize_is_bit_equal_to_pil_for_enlarged_images_of_any_shape(height, width):
    images = random_images(4, height, width)
    assert torch.equal(resize(images, 224), pil_resize(images, 224))


def test_resize_does_not_depend_on_the_number_of_images():
    images = random_images(13, 32, 32)
    one_by_one = torch.cat([resize(image[None], 224) for image in images])
    assert torch.equal(resize(images, 224), one_by_one)
    assert resize(images[:0], 224).shape == (0, 3, 224, 224)


def test_resize_refuses_other_types_and_shapes():
    with pytest.raises(ValueError, match="uint8"):
        resize(torch.zeros(1, 3, 8, 8), 16)


@pytest.mark.parametrize("size", [None, 48])
def test_prepare_is_bit_equal_to_torchvisions_transforms(size, photographs):
    steps = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    transform = transforms.Compose([transforms.Resize((size, size)), *steps] if size else steps)
    expected = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in photographs])
    ours = prepare(photographs, size)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, expected)


def test_flip_mirrors_the_selected_images():
    images = random_images(2, 4, 4)
    flipped = flip(images, torch.tensor([True, False]))
    assert torch.equal(flipped[0], images[0][:, :, [3, 2, 1, 0]])
    assert torch.equal(flipped[1], images[1])


def test_shift_equals_torchvisions_pad_and_crop():
    images = random_images(25, 5, 7)
    down, right = (torch.tensor(t) for t in zip(*[(d, r) for d in range(-2, 3) for r in range(-2, 3)], strict=True))
    padded = transforms.functional.pad(images, [2, 2, 2, 2])
    expected = [
        transforms.functional.crop(image, 2 - d, 2 - r, 5, 7)
        for image, d, r in zip(padded, down.tolist(), right.tolist(), strict=True)
    ]
    assert torch.equal(shift(images, down, right, 2), torch.stack(expected))


def boxes_of(height: int, width: int, n: int = 300) -> torch.Tensor:
    """Boxes (4, n) of every size and place, the whole image and single pixels among them."""
    random = np.random.default_rng(0)
    size = np.stack([random.integers(1, side, n, endpoint=True) for side in (height, width)])
    size[:, :2] = [[height, 1], [width, 1]]
    room = np.array([[height], [width]]) - size
    return torch.from_numpy(np.concatenate([random.integers(0, room, endpoint=True), size]))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (31, 57), (96, 33), (1, 1)])
def test_crop_is_bit_equal_to_torchvisions_on_pil_images(height, width, device):
    images, boxes = random_images(300, height, width), boxes_of(height, width)
    expected = []
    for image, box in zip(images, boxes.T.tolist(), strict=True):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy())
        cropped = transforms.functional.resized_crop(pil, *box, [height, width])
        expected.append(torch.from_numpy(np.array(cropped)).permute(2, 0, 1))
    assert torch.equal(crop(images.to(device), boxes.to(device)).cpu(), torch.stack(expected))


def test_erase_is_torchvisions(device):
    images, boxes = random_images(300, 9, 14), boxes_of(9, 14)
    boxes[2, 5] = 0  # nothing
    mean = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)
    expected = [
        v2.functional.erase(image, *box, mean) if box[2] else image
        for image, box in zip(images, boxes.T.tolist(), strict=True)
    ]
    assert torch.equal(erase(images.to(device), boxes.to(device)).cpu(), torch.stack(expected))


@pytest.mark.parametrize("name", ["crop", "randomerasing"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (8, 60)])
def test_boxes_are_distributed_as_torchvisions(name, height, width):
    """The last shape has no room for many of the boxes: ten tries fail."""
    torch.manual_seed(0)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    if name == "crop":
        theirs = v2.RandomResizedCrop((height, width), scale=(0.25, 1.0))
        drawn = [theirs.make_params([image]) for _ in range(2000)]
        expected = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    else:
        theirs = v2.RandomErasing()
        drawn = [theirs.make_params([image]) if torch.rand(()) < 0.5 else {"v": None} for _ in range(2000)]
        expected = np.array([[d["i"], d["j"], d["h"], d["w"]] if d["v"] is not None else [0] * 4 for d in drawn])
    found = draw_boxes(name, np.random.default_rng(0), 20_000, height, width).T.numpy()
    if name == "randomerasing":
        found = found * (found[:, 2:3] > 0)
    found, expected = (np.column_stack([boxes, boxes[:, 2] * boxes[:, 3]]) for boxes in (found, expected))
    for column in range(5):  # heights and widths go together, too
        assert ks_2samp(found[:, column], expected[:, column]).pvalue > 0.001
    assert (found[:, 0] + found[:, 2] <= height).all()
    assert (found[:, 1] + found[:, 3] <= width).all()
