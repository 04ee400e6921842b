import pytest
import torch
import torchvision
from torch import nn

from engine.models import Architecture
from report.cost import count_cost, time_inference


@pytest.mark.parametrize(
    ("arch", "giga"),
    [
        *(("resnet50", 4.09), ("resnet18", 1.81), ("resnext50_32x4d", 4.23), ("mobilenet_v3_small", 0.06)),
        *(("vit_b_16", 17.56), ("vit_b_32", 4.41)),
    ],
)
def test_parameters_and_multiply_accumulates_match_the_literature(arch, giga):
    published = torchvision.models.get_model_weights(arch).DEFAULT.meta
    cost = count_cost(Architecture(arch, "imagenet"), 1000, 224)
    assert cost["parameters"] == published["num_params"]
    assert cost["multiply_accumulates"] / 1e9 == pytest.approx(giga, abs=0.006)
    assert cost["multiply_accumulates"] / 1e9 == pytest.approx(published["_ops"], abs=0.001)


def test_multiply_accumulates_of_a_timm_transformer_are_those_of_its_formula():
    pytest.importorskip("timm")
    n, d, depth = 197, 192, 12  # tokens, of 14 x 14 patches and the class; width; layers
    layer = 3 * n * d * d + 2 * n * n * d + n * d * d + 8 * n * d * d  # q, k, v; attention; projection; MLP
    expected = depth * layer + 196 * (3 * 16 * 16) * d + d * 1000
    cost = count_cost(Architecture("timm:vit_tiny_patch16_224", "imagenet"), 1000, 224)
    assert cost["multiply_accumulates"] == expected
    assert cost["not_counted"] == []


class Deformable(nn.Module):
    """An architecture and its model, of an operation that PyTorch's counter does not know."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = torchvision.ops.DeformConv2d(3, 8, 3), nn.Linear(8, 10)

    def build(self, classes: int) -> nn.Module:
        return self

    def forward(self, images):
        offsets = torch.zeros(len(images), 2 * 3 * 3, 6, 6)
        return self.last(self.conv(images, offsets).mean((2, 3)))


def test_an_operation_that_is_not_counted_is_named():
    fast = torch.backends.mha.get_fastpath_enabled()
    cost = count_cost(Deformable(), 10, 8)
    assert cost["multiply_accumulates"] == 8 * 10
    assert cost["not_counted"] == ["torchvision.deform_conv2d"]
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_each_architecture_is_timed_at_least_three_times(config, digits):
    arch = Architecture("resnet18", "imagenet")
    cost = time_inference([arch], config, digits, batch_size=600, seconds=0)[arch]
    assert (cost["latency_ms"]["n"], cost["images_per_second"]["n"]) == (15, 3)
    assert cost["images_per_second"]["batch_size"] == 600  # more than there are test images
    for entry in (cost["latency_ms"], cost["images_per_second"]):
        low, high = entry["quartiles"]
        assert 0 < low <= entry["median"] <= high
