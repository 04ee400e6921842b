"""The measurement of the original's faults of evaluation, on models for which the outcome is known."""

import json

import pytest
import torch
from torch import nn

from benchmarks.evaluation_faults import FAULTS, faulty_accuracy, main
from engine.datasets import Split
from engine.inference import predict


class BrighterThanTheBatch(nn.Module):
    """Class 1 for images that are brighter than BatchNorm's mean, or whose left half is brighter than the right."""

    def __init__(self, by: str):
        super().__init__()
        self.norm, self.by = nn.BatchNorm1d(1, affine=False), by

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        halves = images.mean((1, 2)).unflatten(1, (2, -1)).mean(2)  # (N, 2): left and right
        value = self.norm(images.mean((1, 2, 3)).unsqueeze(1)) if self.by == "brightness" else halves @ HALVES
        return torch.cat([-value, value], dim=1)


HALVES = torch.tensor([[1.0], [-1.0]])


def bright_images(n: int, left: int, right: int) -> Split:
    images = torch.full((n, 3, 8, 8), left, dtype=torch.uint8)
    images[..., 4:] = right
    return Split(images, torch.ones(n, dtype=torch.long))


def test_without_faults_the_accuracy_is_that_of_predict():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    split = Split(torch.randint(0, 256, (150, 3, 8, 8), dtype=torch.uint8), torch.randint(0, 2, (150,)))
    expected = (predict(model, split.images, 8).argmax(1) == split.labels).float().mean().item()
    assert faulty_accuracy(model, split, 8, **FAULTS["none"], seed=0) == pytest.approx(expected)


def test_training_mode_compares_an_image_with_its_batch():
    """All images are equally bright: brighter than the running mean of 0, but not than the batch."""
    model, split = BrighterThanTheBatch("brightness"), bright_images(100, 255, 255)
    assert faulty_accuracy(model, split, 8, **FAULTS["none"], seed=0) == 1.0
    assert faulty_accuracy(model, split, 8, **FAULTS["training mode"], seed=0) == 0.0
    assert model.norm.running_mean == 0  # the model itself is kept


def test_flips_mirror_half_of_the_images():
    model, split = BrighterThanTheBatch("side"), bright_images(400, 255, 0)
    assert faulty_accuracy(model, split, 8, **FAULTS["none"], seed=0) == 1.0
    accuracies = [faulty_accuracy(model, split, 8, **FAULTS["flips"], seed=seed) for seed in range(3)]
    assert len(set(accuracies)) == 3
    assert all(0.4 < accuracy < 0.6 for accuracy in accuracies)


def test_models_that_were_measured_are_not_measured_again(trained, tmp_path, capsys):
    path = tmp_path / "faults.json"
    words = ["--run", "demo", "--checkpoints_path", str(trained / "checkpoints"), "--json", str(path)]
    main([*words, "--only", "teacher", "--repeats", "2"])
    assert capsys.readouterr().out.count("teacher/seed") == 2 * len(FAULTS)
    before = json.loads(path.read_text())["models"]
    main([*words, "--only", "teacher", "student", "--repeats", "2"])
    assert "teacher" not in capsys.readouterr().out
    after = json.loads(path.read_text())["models"]
    assert list(after) == ["teacher/seed0", "teacher/seed1", "student/seed0", "student/seed1"]
    assert {title: after[title] for title in before} == before
    assert [len(accuracies) for accuracies in after["student/seed1"].values()] == [1, 2, 2, 2]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--repeats", "3"])
    assert ended.value.code == 2
    assert "number of repeats" in capsys.readouterr().err
