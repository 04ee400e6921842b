"""Small convolutions against PyTorch's own, in double precision, and in bfloat16 where those are wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from custom_resnet import build_resnet
from engine import convolution
from engine.convolution import SmallConvolutions
from engine.device import forward_pass


@pytest.fixture
def outputs(monkeypatch) -> list[torch.Size]:
    """The shapes of the outputs that are computed as matrix products."""
    shapes: list[torch.Size] = []
    multiply = convolution.multiply

    def record(*args):
        output = multiply(*args)
        shapes.append(output.shape)
        return output

    monkeypatch.setattr(convolution, "multiply", record)
    return shapes


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 4), (4, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_outputs_and_gradients_are_those_of_conv2d(outputs, size, kernel, groups):
    torch.manual_seed(0)
    tensors = [torch.randn(3, 8, *size), torch.randn(16, 8 // groups, *kernel), torch.randn(16)]
    tensors = [tensor.double().requires_grad_() for tensor in tensors]
    compared = 0
    for stride in (1, 2, (2, 3)):
        for padding in (0, 1, (1, 0), "same", "valid"):
            for dilation in (1, 2):
                arguments = (stride, padding, dilation, groups)
                try:
                    expected = F.conv2d(*tensors, *arguments)
                except RuntimeError:  # the kernel is larger than the image
                    with SmallConvolutions(), pytest.raises(RuntimeError):
                        F.conv2d(*tensors, *arguments)
                    continue
                with SmallConvolutions():
                    output = F.conv2d(*tensors, *arguments)
                upstream = torch.randn_like(expected)
                ours, theirs = (torch.autograd.grad(result, tensors, upstream) for result in (output, expected))
                torch.testing.assert_close((output, *ours), (expected, *theirs))
                compared += groups == 1 and max(output.shape[2:]) <= 2 and not isinstance(padding, str)
    assert len(outputs) == compared
    assert compared > 0 or groups > 1


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_have_the_layout_of_the_weights(size):
    """Otherwise several processes, which share buffers of that layout, copy them with a warning."""
    layer = nn.Conv2d(8, 16, 1, bias=False).to(memory_format=torch.channels_last)
    with SmallConvolutions():
        layer(torch.randn(3, 8, size, size)).sum().backward()
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_arguments_by_name_and_images_without_a_batch(outputs):
    images, weight = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 2, 2)
    with SmallConvolutions():
        output = F.conv2d(input=images, weight=weight, stride=(2,))
        assert outputs == [output.shape] == [(2, 2, 1, 1)]
        for image, expected in zip(images, output, strict=True):
            torch.testing.assert_close(F.conv2d(image, weight, stride=2), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_precision_of_the_output_is_that_of_autocast(groups):
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    with forward_pass("cpu", "bf16"):
        assert layer(torch.randn(2, 8, 2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(("image_size", "number"), [(32, 10), (64, 5), (96, 0)])
def test_the_small_convolutions_of_a_resnet(outputs, image_size, number):
    """Its last stage, of 2 x 2 px at 64 px: two convolutions in each of two blocks, and one in the shortcut.

    At 32 px the stage before it has 2 x 2 px as well; at 96 px the last has 3 x 3 px.
    """
    model = build_resnet("resnet18", 10, pretrained=False)
    with forward_pass("cpu", "fp32"):
        model(torch.randn(2, 3, image_size, image_size))
    assert len(outputs) == number


def test_a_training_step_of_a_resnet_has_the_same_gradients(outputs):
    torch.manual_seed(0)
    model = build_resnet("resnet18", 10, pretrained=False).double().to(memory_format=torch.channels_last)
    images, gradients = torch.randn(4, 3, 64, 64).double(), []
    for context in (SmallConvolutions(), torch.enable_grad()):
        model.zero_grad()
        with context:
            loss = F.cross_entropy(model(images), torch.arange(4))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert outputs
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("groups", "size", "stride"), [(1, 1, 2), (32, 1, 2), (1, 3, 4)])
def test_gradients_in_bf16_are_right_where_the_input_is_smaller_than_the_stride(groups, size, stride):
    """oneDNN would leave those of the weights that only multiply padding as they were in memory: here NaN."""
    torch.manual_seed(0)
    images = torch.randn(8, 256, size, size)
    for _ in range(10):
        layer, gradients = nn.Conv2d(256, 256, 3, stride, 1, groups=groups), {}
        for precision in ("fp32", "bf16"):
            used = [torch.full(layer.weight.shape, torch.nan, dtype=torch.bfloat16) for _ in range(50)]
            del used  # memory that is about to be used again
            layer.zero_grad()
            with forward_pass("cpu", precision):
                layer(images).float().square().mean().backward()
            gradients[precision] = layer.weight.grad
        torch.testing.assert_close(gradients["bf16"], gradients["fp32"], atol=2e-3, rtol=0.05)
