"""The experiment in one file against the program: on the same batches, the same weights bit for bit."""

import copy
import re
import sys
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from conftest import fit, random_images
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

import custom_resnet
import teacher_student_model
from benchmarks import reference
from engine.datasets import Split, batches
from engine.images import prepare
from engine.recipes import Recipe


@pytest.mark.parametrize("loss", ["cross-entropy", "distillation", "distillation as published"])
def test_training_gives_the_weights_of_fit(config, digits, model, loss):
    config = replace(config, image_size=72, batch_size=4)  # above 64 px fit has no convolutions of its own
    dataset = digits._replace(test=Split(digits.test.images[:2], digits.test.labels[:2]))
    how = {"epochs": 2, "lr": 0.001, "momentum": 0.9, "pretrained": False, "train_size": 10}
    ours, theirs = custom_resnet.cross_entropy, reference.cross_entropy
    if loss != "cross-entropy":
        torch.manual_seed(1)
        teacher = custom_resnet.build_resnet("resnet18", 10).to(config.device).eval()
        as_published = loss == "distillation as published"
        how |= {"teacher": "teacher", "alpha": 0.25, "temperature": 5.0, "scale_soft_loss": not as_published}
        ours = teacher_student_model.Distillation(Recipe(**how), lambda batch: teacher(batch.images))
        theirs = reference.make_distillation_loss(teacher, as_published)

    trained = copy.deepcopy(model)
    fit(trained, Recipe(**how), config, 5, dataset, ours)
    epochs = [batches(dataset.train, dataset.subset(10), config, 5, epoch) for epoch in range(2)]
    reference.train(model, [(batch.images, batch.labels) for epoch in epochs for batch in epoch], theirs)

    tolerance = 0 if config.device == "cpu" else 1e-4
    torch.testing.assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=tolerance)


def test_the_loss_is_that_of_the_program():
    student, teacher = torch.randn(2, 7, 10, dtype=torch.float64).mul(5)
    labels = torch.randint(0, 10, (7,))
    for scale_soft_loss in (True, False):
        expected = teacher_student_model.distillation_loss(student, teacher, labels, 0.25, 5.0, scale_soft_loss)
        torch.testing.assert_close(reference.distillation_loss(student, teacher, labels, scale_soft_loss), expected)


@pytest.mark.parametrize("as_published", [False, True])
def test_the_teacher_is_in_evaluation_mode_and_computes_gradients_only_as_published(as_published):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.BatchNorm1d(10))
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4)
    expected = copy.deepcopy(teacher).eval()(images)
    student = torch.randn(4, 10, requires_grad=True)
    loss = reference.make_distillation_loss(teacher, as_published)(student, images, labels)
    torch.testing.assert_close(loss, reference.distillation_loss(student, expected, labels, not as_published))
    loss.backward()
    assert (teacher[1].weight.grad is not None) == as_published
    assert student.grad is not None


def test_as_published_an_image_is_compared_with_its_batch():
    """All images are equally bright: brighter than the average of training, 0, but not than their batch."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[3].weight.data = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])  # class 1: brighter than the average
    model[3].bias.data.zero_()
    test = [(torch.ones(3, 3, 4, 4), torch.tensor([1, 1, 0])), (torch.ones(2, 3, 4, 4), torch.tensor([1, 1]))]
    assert reference.evaluate(model, test) == 4 / 5
    assert reference.evaluate(model, test, as_published=True) == 1 / 5


def test_images_are_prepared_as_in_the_program_and_flipped_only_on_request():
    (image,) = random_images(1, 32, 32)
    views = [prepare(view.unsqueeze(0), 48)[0] for view in (image, image.flip(2))]
    assert torch.equal(reference.make_transform(flip=False, size=48)(to_pil_image(image)), views[0])
    torch.manual_seed(0)
    transform = reference.make_transform(flip=True, size=48)
    transformed = [transform(to_pil_image(image)) for _ in range(100)]
    same, mirrored = (sum(torch.equal(found, view) for found in transformed) for view in views)
    assert same + mirrored == 100
    assert 30 < mirrored < 70


@pytest.mark.parametrize("flags", [[], ["--as-published"]])
def test_the_experiment_runs_and_equal_students_start_equally(flags, miniature_cifar10, monkeypatch, capsys):
    def small_network(arch, weights):
        layers = {"pool": nn.AdaptiveAvgPool2d(4), "flatten": nn.Flatten(), "norm": nn.BatchNorm1d(48)}
        return nn.Sequential(OrderedDict(**layers, fc=nn.Linear(48, 1000)))

    monkeypatch.setattr("torchvision.models.get_model", small_network)
    monkeypatch.setattr(reference.make_transform, "__defaults__", (32,))
    monkeypatch.setattr(reference, "DataLoader", lambda images, num_workers, **how: DataLoader(images, **how))
    monkeypatch.setattr(sys, "argv", ["reference.py", "--data", str(miniature_cifar10.parent), *flags])
    reference.main()
    printed = capsys.readouterr().out
    losses = re.findall(r"loss (\S+)", printed)
    assert len(losses) == 5 + 5 + 10 + 10
    assert losses[5:10] == losses[10:15]  # the first epochs of both students
    assert losses[10:20] != losses[20:30]
    assert len(re.findall(r"^.+: \d+\.\d\d% of the test images$", printed, re.MULTILINE)) == 4
