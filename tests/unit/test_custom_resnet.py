import copy
import itertools
import json
import math
import re
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import SMALL, fit, flags, paths, start_training
from PIL import Image
from sklearn.utils.class_weight import compute_sample_weight
from torch import nn
from torchvision import transforms

import custom_resnet
import evaluate
from custom_resnet import build_resnet, train_model
from engine import checkpoints, console, datasets, estimate
from engine.datasets import Dataset
from engine.errors import Diverged, UserError
from engine.inference import predict
from engine.models import load_model
from engine.recipes import Recipe
from engine.settings import Config, Model
from engine.training import Training, best_epoch, make_optimizer, make_scheduler

# The model


def test_imagenet_weights_are_read_from_torchs_cache(hub):
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    hub.mkdir(parents=True)
    torch.save(state, hub / "resnet18-f37072fd.pth")
    model = build_resnet("resnet18", 10, pretrained=True)
    assert model.fc.out_features == 10
    for name, tensor in model.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(tensor, state[name]), name


def test_missing_and_damaged_imagenet_weights_are_reported(hub):
    with pytest.raises(UserError) as error:
        build_resnet("resnet50", 10, pretrained=True)
    for part in (str(hub / "resnet50-11ad3fa6.pth"), "is missing", "--preset scratch", "download.pytorch.org"):
        assert part in str(error.value)
    hub.mkdir(parents=True, exist_ok=True)
    (hub / "resnet50-11ad3fa6.pth").write_bytes(b"PK no weights")
    with pytest.raises(UserError, match="cannot be used"):
        build_resnet("resnet50", 10, pretrained=True)


# Training


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda step: 0.1),
        ("cosine", lambda step: 0.1 * (1 + math.cos(math.pi * step / 100)) / 2),
    ],
)
def test_schedules_follow_their_formulas(schedule, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make_scheduler(optimizer, Recipe(lr=0.1, schedule=schedule), 100)
    for step in range(100):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected(step), abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_onecycle_rises_for_30_percent_of_the_steps_then_decays_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = make_scheduler(optimizer, Recipe(lr=0.1, schedule="onecycle"), 101)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(rates) < 101 else None
    assert np.argmax(rates) == pytest.approx(30, abs=1)
    assert max(rates) == pytest.approx(0.1, rel=1e-3)
    assert rates[-1] < 1e-5
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_adamw_is_pytorchs(config, model):
    recipe = Recipe(optimizer="adamw", lr=0.01, weight_decay=0.1)
    theirs = copy.deepcopy(model)
    for either, optimizer in (
        (model, make_optimizer(model, recipe, config.device)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)),
    ):
        for _ in range(2):
            optimizer.zero_grad()
            sum(((p - 1) ** 2).sum() for p in either.parameters()).backward()
            optimizer.step()
    for first, second in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_fit_agrees_with_a_plain_loop(config, digits, resnet18):
    """Against the loop as a tutorial writes it: PIL images, torchvision's transforms, one image at a time."""
    config = replace(config, image_size=96)  # without small convolutions, as training amplifies rounding errors
    recipe = Recipe(epochs=1, lr=0.01, weight_decay=1e-3, nesterov=True, pretrained=False, train_size=75)
    transform = transforms.Compose(
        [
            transforms.Resize((96, 96)),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    plain = build_resnet("resnet18", 10, pretrained=False)
    plain.load_state_dict(resnet18.state_dict())
    for either in (resnet18, plain):
        either.to(config.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3, nesterov=True)
    plain.train()
    losses, correct = [], 0
    for batch in datasets.batches(digits.train, digits.subset(75), config, seed=5, epoch=0):
        images = []
        for index, flipped in zip(batch.indices, batch.flipped, strict=True):
            image = Image.fromarray(digits.train.images[index].permute(1, 2, 0).cpu().contiguous().numpy())
            images.append(transform(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image))
        logits = plain(torch.stack(images).to(config.device, memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        correct += (logits.argmax(1) == batch.labels).sum().item()

    history = fit(resnet18, recipe, config, 5, digits, custom_resnet.cross_entropy)
    assert len(losses) == 3
    assert history[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert history[0]["train_accuracy"] == pytest.approx(correct / 75)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(resnet18.state_dict()[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_the_first_20_losses_in_bfloat16_are_those_of_float32_within_2_percent(config, digits):
    recipe, losses = Recipe(**{**SMALL, "epochs": 1, "lr": 0.001, "train_size": 500}), {"fp32": [], "bf16": []}
    for precision, found in losses.items():

        def loss_fn(logits, batch, found=found):
            terms = custom_resnet.cross_entropy(logits, batch)
            found.append(terms["hard"].item())
            return terms

        torch.manual_seed(0)
        model = build_resnet(SMALL["arch"], 10, pretrained=False).to(config.device)
        fit(model, recipe, replace(config, image_size=64, precision=precision), 0, digits, loss_fn)
    assert len(losses["fp32"]) == 20
    assert losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_fit_trains_in_training_mode_and_evaluates_in_evaluation_mode(config, digits, model):
    modes = []

    def loss_fn(logits, batch):
        modes.append(model.training)
        return custom_resnet.cross_entropy(logits, batch)

    history = fit(model, Recipe(epochs=2, lr=0.01, train_size=50), config, 0, digits, loss_fn)
    assert modes == [True] * 4
    measured = (predict(model, digits.test.images, 16).argmax(1) == digits.test.labels).float().mean().item()
    assert history[-1]["test_accuracy"] == pytest.approx(measured)
    assert [record["epoch"] for record in history] == [1, 2]


def test_fit_evaluates_on_validation_images_if_there_are_any(config, model):
    config = replace(config, validation_size=100)
    dataset = datasets.load_dataset(config)
    history = fit(model, Recipe(epochs=1, train_size=50), config, 0, dataset, custom_resnet.cross_entropy)
    assert "validation_accuracy" in history[0]
    assert "test_accuracy" not in history[0]


def test_resuming_after_a_stop_at_any_step_is_bit_exact(config, digits):
    recipe = Recipe(epochs=2, lr=0.01, schedule="onecycle", train_size=75)

    def train_with_stops(every: int | None) -> tuple[dict, list]:
        torch.manual_seed(0)
        calls, saved, history = 0, [], []

        def stop() -> int:
            nonlocal calls
            calls += 1
            return signal.SIGINT if every is not None and calls % every == 0 else 0

        while len(history) < recipe.epochs:
            assert calls < 100
            model = build_resnet("resnet18", 10, pretrained=False).to(config.device)
            state = copy.deepcopy(saved[-1]) if saved else None
            loss, more = custom_resnet.cross_entropy, {"state": state, "write": saved.append, "stop": stop}
            history = fit(model, recipe, config, 0, digits, loss, **more)
            saved[-1] = copy.deepcopy(saved[-1])
        return saved[-1]["model"], [{**record, "seconds": 0} for record in history]

    weights, history = train_with_stops(None)
    for every in (3, 4, 5, 7):  # of three steps, two chances while measuring and the end of each of two epochs
        stopped_weights, stopped_history = train_with_stops(every)
        assert stopped_history == history
        assert all(torch.equal(weights[name], stopped_weights[name]) for name in weights)


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_state(config, digits):
    recipes = {"student": replace(config.recipes["student"], epochs=30)}
    config, steps = replace(config, recipes=recipes), 0

    def loss_fn(logits, batch):
        nonlocal steps
        steps += 1
        return {"hard": F.cross_entropy(logits, batch.labels) * (math.nan if steps > 9 else 1)}

    with pytest.raises(
        UserError, match=r"student seed 0: epoch 3, step 4, lr = 0.01: the hard loss became NaN or infinite.*lower lr"
    ) as error:
        train_model(Model("student", 0, config), digits, lambda: loss_fn)
    assert error.value.status == 1
    assert steps < 60
    state = checkpoints.load_checkpoint(Model("student", 0, config).path)
    assert len(state["history"]) in (1, 2)  # short epochs are not all saved
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_signal_during_evaluation_keeps_the_epoch_and_repeats_the_evaluation(config, digits):
    recipe, saved = Recipe(epochs=1, lr=0.01, train_size=50), []

    def run(state, stop):
        torch.manual_seed(0)
        model = build_resnet(SMALL["arch"], 10, pretrained=False).to(config.device)
        return fit(
            model, recipe, config, 0, digits, custom_resnet.cross_entropy, state=state, write=saved.append, stop=stop
        )

    calls = itertools.count(1)
    assert run(None, lambda: signal.SIGTERM if next(calls) > 2 else 0) == []  # two steps, then it is measured
    assert saved[-1]["step"] == 2
    (record,) = run(copy.deepcopy(saved[-1]), lambda: 0)
    (uninterrupted,) = run(None, lambda: 0)
    assert {**record, "seconds": 0} == {**uninterrupted, "seconds": 0}


def test_the_state_is_saved_every_checkpoint_minutes(config, digits, model):
    saved = []
    recipe, often = Recipe(epochs=1, lr=0.01, train_size=75), replace(config, checkpoint_minutes=1e-9)
    fit(model, recipe, often, 0, digits, custom_resnet.cross_entropy, write=saved.append)
    assert [(state["step"], len(state["history"])) for state in saved] == [(1, 0), (2, 0), (3, 0), (0, 1)]


def test_two_recipes_of_one_architecture_start_from_the_same_weights(config, digits, monkeypatch):
    first = []

    def look(training, *_):
        first.append({name: tensor.clone() for name, tensor in training.network.state_dict().items()})
        return [{}, {}]

    monkeypatch.setattr(custom_resnet, "fit", look)
    for name, seed in (("student", 0), ("student_kd", 0), ("student", 1)):
        train_model(Model(name, seed, config), digits)
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    assert not torch.equal(first[0]["fc.weight"], first[2]["fc.weight"])


@pytest.mark.parametrize(("culprit", "step"), [("hard", 1), ("soft", 1), ("soft", 3), ("logits", 2)])
def test_divergence_is_reported_with_epoch_and_learning_rate(config, digits, model, culprit, step):
    steps = 0

    def loss_fn(logits, batch):
        nonlocal steps
        steps += 1
        terms = {"hard": F.cross_entropy(logits, batch.labels), "soft": logits.mean() * 0}
        if steps == step and culprit in terms:
            terms[culprit] = terms[culprit] * math.inf
        elif culprit == "logits" and steps == step - 1:  # the weights, and with them the logits of the next step
            logits.register_hook(lambda gradient: gradient * math.nan)
        return terms

    recipe = Recipe(epochs=1, lr=0.02, train_size=100)
    what = culprit if culprit == "logits" else f"{culprit} loss"
    with pytest.raises(UserError, match=f"test seed 0: epoch 1, step 4, lr = 0.02: the {what} became NaN or infinite"):
        fit(model, recipe, config, 0, digits, loss_fn)
    assert steps == 4


def test_diverged_weights_are_never_saved(config, digits, model):
    """A state is due right after the step whose gradients are NaN, before any logits show it."""
    saved, steps = [], itertools.count(1)

    def loss_fn(logits, batch):
        if next(steps) == 3:
            logits.register_hook(lambda gradient: gradient * math.nan)
        return custom_resnet.cross_entropy(logits, batch)

    recipe, often = Recipe(epochs=1, lr=0.01, train_size=100), replace(config, checkpoint_minutes=1e-9)
    with pytest.raises(UserError, match=r"test seed 0: epoch 1, step 3, lr = 0.01: the weights became NaN or infinite"):
        fit(model, recipe, often, 0, digits, loss_fn, write=saved.append)
    assert [state["step"] for state in saved] == [1, 2]


def test_a_diverged_buffer_is_never_saved(config, model):
    """A running variance, which only evaluation uses."""
    saved = []
    training = start_training(model, Recipe(epochs=1, train_size=100), config, 0, 100, write=saved.append)
    training.save()
    model.layer2[0].bn1.running_var[5] = math.inf
    with pytest.raises(Diverged, match=r"layer2\.0\.bn1\.running_var became NaN or infinite"):
        training.save()
    assert len(saved) == 1


def test_a_log_line_each_minute_shows_loss_and_time_left(config, digits, model, monkeypatch, capsys):
    clock = itertools.count(0, 40)  # each look at the clock is 40 seconds later
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    recipe = Recipe(epochs=1, lr=0.01, train_size=100)
    later = estimate.Estimate(later=7200)
    fit(model, recipe, config, 0, digits, custom_resnet.cross_entropy, estimate=later)
    line = next(line for line in capsys.readouterr().err.splitlines() if "left of this model" in line)
    assert re.search(
        r"test seed 0 epoch 1/1  +\d+%  [\d.]+ images/s  loss \d\.\d+, accuracy [\d.]+%, .* left of this model", line
    )
    assert "of the run" in line


# Settings of a recipe


@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
def test_gradients_are_clipped_to_a_norm(config, digits, clip_norm):
    """One step of plain SGD moves the weights by lr times the gradient."""
    recipe = Recipe(epochs=1, lr=1.0, momentum=0.0, clip_norm=clip_norm, train_size=25)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)).to(config.device)
    before = [p.detach().clone() for p in model.parameters()]
    (batch,) = datasets.batches(digits.train, digits.subset(25), config, seed=0, epoch=0)
    F.cross_entropy(model(batch.images), batch.labels).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    fit(model, recipe, config, 0, digits, custom_resnet.cross_entropy)
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm().item()
    assert norm > 0.2
    assert moved == pytest.approx(min(norm, clip_norm), rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_balanced_class_weights_are_scikit_learns(digits, smoothing):
    rare = torch.cat([(digits.train.labels.cpu() == label).nonzero().flatten()[: 3 + 7 * label] for label in range(10)])
    dataset = digits._replace(train=digits.train.select(rare.to(digits.train.labels.device)))
    recipe = Recipe(class_weights="balanced", label_smoothing=smoothing)
    labels = dataset.train.labels
    logits = torch.randn(len(labels), 10, device=labels.device)
    each = compute_sample_weight("balanced", labels.cpu().numpy())
    targets = np.eye(10)[labels.cpu().numpy()] * (1 - smoothing) + smoothing / 10
    losses = -(targets * logits.cpu().double().log_softmax(1).numpy()).sum(1)
    weights = custom_resnet.weights_of_classes(recipe, dataset)
    assert custom_resnet.hard_loss(logits, labels, smoothing, weights).item() == pytest.approx((each * losses).mean())
    assert custom_resnet.weights_of_classes(Recipe(), dataset) is None


def held_out(config, digits, **settings) -> tuple[Config, Dataset, Model]:
    """A model that is trained on 100 digits, and evaluated after each epoch on 60 others, the validation images."""
    validation = digits.train.select(torch.arange(1000, 1060, device=digits.train.labels.device))
    recipe = Recipe(**SMALL | {"lr": 0.5, "epochs": 6} | settings)  # so large that accuracies go up and down
    config = replace(config, recipes={"student": recipe})
    return config, digits._replace(validation=validation), Model("student", 0, config)


def test_the_best_epoch_is_kept_and_resumed_exactly(config, digits, monkeypatch):
    """Its oracle are runs of fewer epochs, which end with the same weights because the schedule is constant."""
    if config.device != "cpu":
        pytest.skip("which epoch is the best was found out on a CPU")
    config, dataset, model = held_out(config, digits, keep="best")
    train_model(model, dataset)
    found = checkpoints.Checkpoint.load(model.path)
    accuracies = [record["validation_accuracy"] for record in found.history]
    best = accuracies.index(max(accuracies)) + 1
    assert len(found.history) == 6
    assert 1 < best < 6  # otherwise this test shows nothing
    assert accuracies.count(max(accuracies)) > 1  # of equal epochs, the first
    assert best_epoch(found.history) == best
    network = load_model(found, config.device)
    predicted = predict(network, dataset.validation.images, 16).argmax(1)
    assert (predicted == dataset.validation.labels).double().mean().item() == max(accuracies)

    model.path.unlink()
    _, _, first = held_out(config, digits, epochs=best)
    train_model(first, dataset)
    weights = checkpoints.Checkpoint.load(first.path).weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in found.weights.items())
    first.path.unlink()

    for stop_at in (best * 4 + 1, 6 * 4 - 1):  # steps: after the best epoch, and shortly before the end
        steps = itertools.count(1)
        finish_step = Training.finish_step

        def stopping(training, steps=steps, stop_at=stop_at, finish_step=finish_step):
            training.stop = lambda: signal.SIGINT if next(steps) == stop_at else 0
            return finish_step(training)

        with monkeypatch.context() as patch:
            patch.setattr(Training, "finish_step", stopping)
            train_model(model, dataset)
        assert not checkpoints.Checkpoint.load(model.path).finished
        train_model(model, dataset)
        resumed = checkpoints.Checkpoint.load(model.path)
        assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in found.weights.items())
        assert [r["validation_accuracy"] for r in resumed.history] == accuracies
        model.path.unlink()


def test_the_best_epoch_needs_validation_images(tmp_path, capsys):
    for words, status in ((["--validation_size=0"], 2), (["--validation_size=50"], 0)):
        main = partial(custom_resnet.main, flags(tmp_path, "--only=student", "--keep=best", "--epochs=1", *words))
        if status:
            with pytest.raises(SystemExit) as exit:
                main()
            assert exit.value.code == status
            assert "student.keep = 'best': needs validation images" in capsys.readouterr().err
        else:
            main()
    evaluate.main(["--run=demo", "--device=cpu", *paths(tmp_path)])
    results = json.loads((tmp_path / "imgs/demo/results.json").read_text())
    assert results["models"]["student"]["kept_epochs"] == {"0": 1}
