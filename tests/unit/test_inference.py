import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import random_images
from torch import nn

from custom_resnet import build_resnet
from engine import distributed, inference
from engine.images import prepare
from engine.inference import NotFinite, fold_batchnorm, predict


def test_predict_uses_evaluation_mode_and_leaves_the_model_unchanged(model, device):
    images = random_images(30, 8, 8).to(device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    logits = predict(model, images, image_size=16, batch_size=7)
    assert model.training
    assert (logits.shape, logits.dtype) == ((30, 10), torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        expected = torch.cat([model.eval()(prepare(image[None], 16)) for image in images])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    predict(model, images[:2])
    assert not model.training


class Limited(nn.Module):
    """A model whose device has memory for a few images only."""

    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory")

    def __init__(self, limit: int):
        super().__init__()
        self.layer, self.limit, self.seen = nn.Linear(3, 10), limit, []

    def forward(self, images):
        self.seen.append(len(images))
        if len(images) > self.limit:
            raise self.error
        return self.layer(images.mean((2, 3)))


def test_predict_halves_batches_that_are_too_large(monkeypatch):
    monkeypatch.setattr(inference, "fold_batchnorm", lambda model, *_: model)
    model, images = Limited(limit=8), torch.randn(30, 3, 4, 4)
    torch.testing.assert_close(predict(model, images, batch_size=25), model.layer(images.mean((2, 3))))
    assert model.seen == [25, 13, 7, 6, 6, 6, 2, 1, 1, 1]  # the two that fail halve all that is left
    with pytest.raises(torch.OutOfMemoryError):
        predict(Limited(limit=0), images)
    model.error = RuntimeError("GET was unable to find an engine to execute this computation")  # cuDNN's words for it
    torch.testing.assert_close(predict(model, images, batch_size=25), model.layer(images.mean((2, 3))))
    model.error = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        predict(model, images, batch_size=25)


def test_cudnn_does_not_tune_itself_in_an_evaluation(monkeypatch):
    """Its batches have several sizes, each of which would be tuned for."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    class Network(nn.Linear):
        def forward(self, images):
            seen.append(torch.backends.cudnn.benchmark)
            return super().forward(images)

    predict(Network(4, 2), torch.zeros(5, 4), batch_size=2)
    assert seen == [False] * 3
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_folding_batchnorm_returns_an_equivalent_copy_without_it(arch):
    torch.manual_seed(0)
    model = build_resnet(arch, 10, pretrained=False)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 64, 64))
    images = torch.randn(4, 3, 64, 64)
    folded = fold_batchnorm(model.eval(), images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(folded(images), model(images), atol=1e-4, rtol=1e-4)


def test_predict_passes_float_images_on_unchanged(model):
    images = random_images(3, 16, 16)
    torch.testing.assert_close(predict(model, images), predict(model, prepare(images)))


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "efficientnet_b0"])
def test_batchnorm_is_folded_in_other_convolutional_models(arch):
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch).eval()
    images = torch.randn(2, 3, 64, 64)
    folded = fold_batchnorm(model, images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images), model(images), atol=1e-4, rtol=1e-4)


def test_folded_weights_equal_pytorchs_fuse_conv_bn_eval(resnet18):
    first, norm = copy.deepcopy(resnet18.conv1).eval(), copy.deepcopy(resnet18.bn1).eval()
    conv = torch.nn.utils.fusion.fuse_conv_bn_eval(first, norm)
    images = torch.randn(2, 3, 16, 16, device=conv.weight.device)
    assert torch.equal(fold_batchnorm(resnet18, images).conv1.weight, conv.weight)


def test_an_untraceable_model_is_not_folded():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x).mean((2, 3)) if x.sum() > -1e9 else x

    model, images = Untraceable(), torch.randn(2, 3, 4, 4)
    assert not fold_batchnorm(model, images).training
    assert model.training
    torch.testing.assert_close(predict(model, images), copy.deepcopy(model).eval()(images))


class SharedConvolution(nn.Module):
    """Uses one convolution before and after a BatchNorm, which must not be folded into it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last = nn.Linear(3, 5)

    def forward(self, x):
        return self.last(self.norm(self.conv(self.conv(x).relu())).mean((2, 3)))


class OwnPrecision(nn.Module):
    """Computes its last layer in float32 under autocast, too, which tracing does not record."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        with torch.autocast(x.device.type, enabled=False):
            return self.last(x.float())


class OwnPrecisionInside(OwnPrecision):
    """Computes a small difference of large numbers in float32 under autocast, too."""

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            large = F.linear(x, 100 + torch.eye(8, device=x.device))  # 100 times the sum, plus x
        return self.last(large - 100 * x.sum(1, keepdim=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [SharedConvolution, OwnPrecision, OwnPrecisionInside])
def test_a_model_that_folding_would_change_is_predicted_unfolded(make, precision, device):
    torch.manual_seed(0)
    model, images = make(), torch.randn(6, 3, 8, 8)
    for _ in range(3):  # statistics, scale and shift as after some training
        model(images)
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    nn.init.uniform_(model.norm.bias, -1, 1)
    model, images = model.to(device).eval(), images.to(device)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        expected = model(images).float()
    if precision == "bf16" or make is SharedConvolution:
        assert torch.equal(predict(model, images, precision=precision), expected)
    else:
        torch.testing.assert_close(predict(model, images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenet_v3_small"])
def test_common_models_stay_folded_in_either_precision(arch, precision, device):
    torch.manual_seed(0)
    model = build_resnet(arch, 10, pretrained=False).to(device)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32, device=device))
    folded = fold_batchnorm(model, torch.randn(4, 3, 32, 32, device=device), precision)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_logits_that_are_not_finite_are_refused(model, device):
    images = random_images(5, 8, 8).to(device)
    images[3] = 0
    with torch.no_grad():
        model.fc.bias[7] = torch.inf
    with pytest.raises(NotFinite, match=r"student seed 3: the logits of 5 of 5 images are NaN or infinite"):
        predict(model, images, title="student seed 3")

    class OnBlack(nn.Module):
        """Divides by the brightness."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(10))

        def forward(self, x):
            return self.scale / x.flatten(1).abs().sum(1, keepdim=True)

    floats = torch.ones(5, 3, 2, 2)
    floats[3] = 0
    with pytest.raises(NotFinite, match=r"of 1 of 5 images.*first those of image 3 "):
        predict(OnBlack(), floats, batch_size=2)


def test_with_more_processes_than_images_each_image_is_predicted_once(model, device, monkeypatch):
    """Of five processes on two images, three compute nothing; the sum over all is the prediction of one."""
    images = random_images(2, 8, 8).to(device)
    alone, parts = predict(model, images, 16), []
    monkeypatch.setattr(inference, "all_reduce_sum", lambda logits: parts.append(logits) or logits)
    for rank in range(5):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 5)
        monkeypatch.setattr(inference, "all_reduce_max", lambda *values: list(values))
        predict(model, images, 16)
    assert sum(part.any().item() for part in parts) == 2
    torch.testing.assert_close(sum(parts), alone, atol=1e-5, rtol=0)
