"""Small experiments on real digits: 16 px, a small network, a few steps. Tests that use a device run on each there is.

Tests of what is computed, rather than of who calls whom, take a ResNet18.
"""

import hashlib
import io
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10

import custom_resnet
import evaluate
import teacher_student_model
from config import PRESETS
from custom_resnet import build_resnet
from engine.console import configure_logging
from engine.datasets import Dataset, load_dataset
from engine.device import configure_backends
from engine.recipes import Recipe
from engine.settings import Config, Model
from engine.training import Training
from report import cost, figures, write

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as configure_backends does, before cuBLAS's first call
torch.backends.cudnn.allow_tf32 = False  # so that a GPU's float32 agrees with a CPU's

ROOT = Path(__file__).parent.parent
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SMALL = {"arch": "timm:test_resnet", "epochs": 2, "lr": 0.01, "pretrained": False}  # 1.5 MB, in place of 45
SMALL |= {"train_size": 100, "schedule": "constant"}
SMALL_FLAGS = [  # all that they depend on, so that config.py can be edited
    *("--preset", "scratch", "--run", "demo", "--dataset", "digits", "--image_size", "16", "--batch_size", "25"),
    *("--precision", "fp32", "--seeds", "0", "--horizontal_flip", "0", "--weight_decay", "0.0005", "--momentum", "0.9"),
    *("--nesterov", "true", "--optimizer", "sgd", "--student_kd.temperature", "5", "--student_kd.alpha", "0.25"),
    *(f"--{field}={value}" for field, value in SMALL.items()),
    "--teacher.weight_decay=0.001",  # otherwise teacher and student would be the same model
]


def override(words: list[str], *more: str) -> list[str]:
    """A command line with more flags; one that is there already is replaced, as no flag may be given twice."""

    def split(words) -> dict[str, list[str]]:
        found, flag = {"": []}, ""
        for word in map(str, words):
            if word.startswith("--"):
                flag = word.split("=")[0]
                found[flag] = []
            found[flag].append(word)
        return found

    return [word for group in {**split(words), **split(more)}.values() for word in group]


def paths(folder: Path) -> list[str]:
    return [f"--checkpoints_path={folder / 'checkpoints'}", f"--imgs_path={folder / 'imgs'}"]


def flags(folder: Path, *more: str, device: str = "cpu") -> list[str]:
    """The command line of a small experiment that keeps to `folder`, with more flags."""
    return override([*SMALL_FLAGS, "--device", device, *paths(folder)], *more)


def random_images(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def start_training(network: nn.Module, recipe: Recipe, config: Config, seed: int, images: int, **more) -> Training:
    """The training of a recipe that is not in `config`."""
    config = replace(config, recipes={**config.recipes, "test": recipe})
    return Training(network, Model("test", seed, config), images, **more)


def fit(network, recipe, config, seed, dataset, loss_fn, **more) -> list[dict[str, float]]:
    """`custom_resnet.fit` for such a training."""
    images = len(dataset.subset(recipe.train_size, recipe.train_subset))
    return custom_resnet.fit(start_training(network, recipe, config, seed, images, **more), dataset, loss_fn)


@pytest.fixture(scope="session", params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def logging_to_stderr():
    configure_logging()


@pytest.fixture(autouse=True, scope="session")
def short_timing_of_inference():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost.time_inference, "__defaults__", (10, 0.0))  # batch_size, seconds
        yield


class NoFigures:
    """In place of report.figures: every figure and its file are one blank pixel."""

    model_colours = staticmethod(figures.model_colours)

    def __getattr__(self, name):
        blank = io.BytesIO()
        Image.new("L", (1, 1)).save(blank, "PNG")
        return lambda *_: blank.getvalue()


@pytest.fixture(autouse=True)
def figures_are_not_drawn(monkeypatch):
    """Drawing takes most of the time of an evaluation. The fixture `report` draws, and so does a script of its own."""
    monkeypatch.setattr(write, "figures", NoFigures())


@pytest.fixture
def config(tmp_path, device) -> Config:
    """The small experiment as a Config, with half of the images mirrored."""
    recipes = {
        "teacher": Recipe(**SMALL, weight_decay=0.001),
        "student": Recipe(**SMALL),
        "student_kd": Recipe(**SMALL, teacher="teacher"),
    }
    demo = replace(PRESETS["demo"], recipes=recipes, seeds=(0,), validation_size=0)
    demo = replace(demo, device=device, deterministic=device == "cuda")
    small = replace(demo, image_size=16, batch_size=25, horizontal_flip=0.5)
    paths = {"checkpoints_path": str(tmp_path / "checkpoints"), "imgs_path": str(tmp_path / "imgs")}
    small = replace(small, precision="fp32", **paths)
    configure_backends(small)
    return small


def with_statistics(arch: str, device: str) -> nn.Module:
    """A network with statistics in its BatchNorm."""
    torch.manual_seed(0)
    network = build_resnet(arch, 10, pretrained=False)
    with torch.no_grad():
        network(torch.randn(8, 3, 16, 16))
    return network.to(device)


@pytest.fixture
def model(device) -> nn.Module:
    return with_statistics(SMALL["arch"], device)


@pytest.fixture
def resnet18(device) -> nn.Module:
    return with_statistics("resnet18", device)


@pytest.fixture(scope="session")
def digits(device) -> Dataset:
    return load_dataset(replace(PRESETS["demo"], validation_size=0, device=device))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, device) -> Path:
    """A folder in which the small experiment has been trained with two seeds. Tests only read its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    teacher_student_model.main(flags(folder, "--seeds", "0", "1", device=device))
    return folder


@pytest.fixture(scope="session")
def report(trained, device) -> Path:
    """The folder of the report on `trained`. Tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "figures", figures)
        with matplotlib.rc_context({"text.usetex": True, "savefig.format": "pdf", "font.size": 40}):  # a user's
            evaluate.main(flags(trained, "--seeds", "0", "1", device=device))
    return trained / "imgs" / "demo"


@pytest.fixture
def script():
    """Run a script as a person would: script("evaluate.py", "--preset", "demo")."""

    def run(*words, cwd=ROOT, **variables) -> subprocess.CompletedProcess:
        environment = {**os.environ, **variables}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def image_folder(tmp_path):
    """Write a folder data set of coloured noise: image_folder({"train/cat": 3, "test/cat": 2}, size=(8, 8))."""

    def write(counts: dict[str, int], size=(8, 8), root=tmp_path / "images") -> Path:
        random = np.random.default_rng(0)
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                noise = random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / folder / f"{number}.png")
        return root

    return write


@pytest.fixture
def miniature_cifar10(tmp_path, monkeypatch):
    """cifar-10-batches-py with 20 images a file, and torchvision told its checksums."""
    random = np.random.default_rng(0)
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch():
        return {"data": random.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{i}", batch()) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch())])
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """torch's cache of weights, empty, with no network behind it."""

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "hub" / "checkpoints"
