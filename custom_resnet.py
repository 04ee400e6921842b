"""Train torchvision ResNets on their own: every recipe without a teacher.

    python custom_resnet.py                     # teacher and student, as in the README's table
    python custom_resnet.py --preset demo       # two minutes on a CPU, nothing to download

Each model goes to checkpoints/RUN/seedS/MODEL.pt; a finished one is not trained again.
"""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from tqdm import tqdm

from config import Config, Diverged, Recipe, UserError, first_line, one_line_errors, parse
from utils import (
    Batch,
    Dataset,
    autocast,
    batches,
    checkpoint_path,
    describe_precision,
    device_name,
    environment,
    load_checkpoint,
    load_dataset,
    load_finished,
    memory_format,
    prepare,
    refuse_other_settings,
    resolve,
    save_checkpoint,
    say,
    stop_requests,
    training_settings,
    tune,
    write_durably,
)

LossFunction = Callable[[torch.Tensor, Batch], torch.Tensor]  # logits (B, C) float32, batch -> mean loss


def build_resnet(arch: str, num_classes: int, pretrained: bool) -> nn.Module:
    """torchvision's `arch` with `fc` replaced by a new layer of `num_classes`; parameter names are torchvision's.

    Raises UserError if the ImageNet weights are neither in torch's cache nor to be had.
    """
    model = torchvision.models.get_model(arch)
    if pretrained:
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        try:
            # weights_only: a file in the cache is read as tensors, whatever else it holds
            model.load_state_dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
        except Exception as error:  # no network, a damaged or foreign file: urllib, pickle, zip and torch raise a dozen
            state = "cannot be used" if file.exists() else "is missing and could not be downloaded"
            raise UserError(
                f"{file}: {state} ({first_line(error)}). Put the file from {weights.url} there, or start from "
                "random weights: --preset scratch, or --RECIPE.pretrained false"
            ) from None
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of a torchvision ResNet for inference, each BatchNorm folded into the convolution before it.

    Other models come back as they are: only of torchvision's is it known which layer follows which.
    """
    if not isinstance(model, torchvision.models.ResNet):
        return model
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):  # "0", "1": downsample
            pair = getattr(module, conv, None), getattr(module, bn, None)
            if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(*pair))
                setattr(module, bn, nn.Identity())
    return model


def predict(
    model: nn.Module,
    images: torch.Tensor,
    image_size: int | None = None,
    precision: str = "fp32",
    batch_size: int = 500,
    title: str = "predicting",
) -> torch.Tensor:
    """Logits (N, C) float32 of a model in evaluation mode, on its device; the model itself is left as it is.

    uint8 images (N, 3, H, W) are resized to `image_size` (None: left as they are) and normalised here; float images are
    taken to be ready for the model.
    """
    device = next(model.parameters()).device
    was_training = model.training
    folded = fold_batchnorm(model.eval())
    logits = []
    with torch.inference_mode(), tqdm(total=len(images), desc=title, unit=" images", leave=False, disable=None) as bar:
        for chunk in images.split(batch_size):
            chunk = chunk.to(device, non_blocking=True)
            if chunk.dtype == torch.uint8:
                chunk = prepare(chunk, image_size)
            with autocast(device, precision):
                logits.append(folded(chunk).float())
            bar.update(len(chunk))
    model.train(was_training)
    return torch.cat(logits)


def cross_entropy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The hard loss, for a recipe without a teacher."""
    return F.cross_entropy(logits, batch.labels)


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """The recipe's schedule over `steps` steps of the optimizer."""
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if recipe.schedule == "onecycle":
        return OneCycleLR(optimizer, recipe.lr, total_steps=steps, cycle_momentum=False)
    return LambdaLR(optimizer, lambda step: 1.0)


def make_optimizer(model: nn.Module, recipe: Recipe, config: Config) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(),
        recipe.lr,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=torch.device(config.device).type in ("cpu", "cuda"),
    )


def compiling_pays(config: Config, seconds_left: float) -> bool:
    """Whether `compile` = auto takes torch.compile now: on CUDA, where it saves more than the minute that it takes.

    A fifth of a step is what fused BatchNorm saves of a ResNet's memory traffic by count; it was not measured here.
    """
    return config.compile == "auto" and torch.device(config.device).type == "cuda" and seconds_left / 5 > 60


def compiled(model: nn.Module, required: bool) -> nn.Module:
    """torch.compile, which goes back to plain PyTorch if it fails and is not required."""
    say("torch.compile: the next step takes about a minute longer")
    torch._dynamo.config.suppress_errors = not required
    return torch.compile(model)


def measure(model: nn.Module, config: Config, dataset: Dataset, title: str) -> tuple[str, float]:
    """What is measured after each epoch, for the history: the accuracy on the images held out, never chosen by."""
    held_out, split = dataset.held_out
    title = f"{title} on {held_out} images"
    logits = predict(model, split.images, config.image_size, config.precision, title=title)
    if not logits.isfinite().all():
        raise Diverged(f"{title}: the logits are no longer numbers. What was saved before is kept. Try a lower lr")
    return held_out, (logits.argmax(1) == split.labels).float().mean().item()


def fit(
    model: nn.Module,
    recipe: Recipe,
    config: Config,
    seed: int,
    dataset: Dataset,
    loss_fn: LossFunction,
    title: str,
    state: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Train the model in place and return its history, a record for each epoch.

    After each epoch, every few minutes and before it stops because `stop` says so, `save` is given all that a later
    call needs, as `state`, to go on as if nothing had happened. Raises Diverged if the loss is no longer a number.
    """
    subset = dataset.subset(recipe.train_size)
    steps, size = len(subset) // config.batch_size, config.batch_size
    optimizer = make_optimizer(model, recipe, config)
    scheduler = make_scheduler(optimizer, recipe, recipe.epochs * steps)
    history, done, totals, seconds = [], 0, torch.zeros(2), 0.0  # of this epoch: steps, sums of loss and hits, time
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        history, done, totals, seconds = state["history"], state["step"], state["totals"], state["seconds"]

    def so_far(step: int) -> tuple[float, float]:
        loss, accuracy = totals[0].item() / step, totals[1].item() / (step * size)  # reads the device
        if not math.isfinite(loss):
            raise Diverged(
                f"{title}: the loss became {loss} in epoch {len(history) + 1}, at most 50 steps before step {step}, at "
                f"learning rate {scheduler.get_last_lr()[0]:g}. What was saved before is kept. Try a lower lr"
            )
        return loss, accuracy

    def keep(step: int, seconds: float) -> None:
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        progress = {"history": list(history), "step": step, "totals": totals.cpu(), "seconds": seconds}
        save({**{name: part.state_dict() for name, part in parts.items()}, **progress})

    totals = totals.to(config.device)
    saved = time.monotonic()
    forward = compiled(model, required=True) if config.compile == "on" else model
    for epoch in range(len(history), recipe.epochs):
        if forward is model and history and compiling_pays(config, history[-1]["seconds"] * (recipe.epochs - epoch)):
            forward = compiled(model, required=False)
        started = time.perf_counter() - seconds
        model.train()
        now = {"desc": f"{title} epoch {epoch + 1}/{recipe.epochs}", "total": steps * size, "initial": done * size}
        bar = tqdm(**now, unit=" images", leave=False, disable=None, mininterval=0.5)
        for step, batch in enumerate(batches(dataset.train, subset, config, seed, epoch, done), done + 1):
            optimizer.zero_grad()
            with autocast(config.device, config.precision):
                logits = forward(batch.images)
            loss = loss_fn(logits.float(), batch)
            loss.backward()
            optimizer.step()
            scheduler.step()

            totals += torch.stack([loss.detach(), (logits.detach().argmax(1) == batch.labels).sum()])
            stopping, due = stop(), time.monotonic() - saved > 60 * config.checkpoint_minutes
            if bar.update(size) or step % 50 == 0 or stopping or due:  # the bar is drawn twice a second at most
                mean_loss, accuracy = so_far(step)
                bar.set_postfix_str(f"loss {mean_loss:.4f}, accuracy {accuracy:.2%}", refresh=False)
            if stopping or due:
                keep(step, time.perf_counter() - started)
                saved = time.monotonic()
            if stopping:
                return history
        bar.close()
        mean_loss, accuracy = so_far(steps)
        seconds = time.perf_counter() - started

        held_out, measured = measure(model, config, dataset, title)
        record = {"epoch": epoch + 1, "loss": mean_loss, "train_accuracy": accuracy}
        history.append({**record, f"{held_out}_accuracy": measured, "seconds": seconds})
        say(
            f"{title}  epoch {epoch + 1:>2}/{recipe.epochs}  loss {mean_loss:.4f}  training {accuracy:7.2%}"
            f"  {held_out} {measured:7.2%}  {steps * size / seconds:,.0f} images/s  {seconds:,.0f} s"
        )
        done, totals, seconds = 0, torch.zeros_like(totals), 0.0
        keep(done, seconds)
        saved = time.monotonic()
        if stop():
            break
    return history


def load_model(state: dict[str, Any], device: str) -> nn.Module:
    """The model that a checkpoint's state describes, in evaluation mode."""
    model = build_resnet(state["arch"], len(state["classes"]), pretrained=False)
    model.load_state_dict(state["model"])
    return model.to(device, memory_format=memory_format(device)).eval()


def load_state(path: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """What was trained with these settings so far; None for nothing, or for what `overwrite` gives up.

    Raises UserError if the file is damaged or was made with other settings, unless `overwrite` is on.
    """
    if not path.exists():
        return None
    try:
        state = load_checkpoint(path)
        refuse_other_settings(path, state, settings)
    except UserError:
        if not overwrite:
            raise
        return None
    return state


def train(
    name: str,
    seed: int,
    config: Config,
    dataset: Dataset,
    make_loss: Callable[[], LossFunction] = lambda: cross_entropy,
    teacher_digest: str | None = None,
) -> None:
    """Train one recipe with one seed into its checkpoint, unless that is finished; an unfinished one is continued.

    `make_loss` is only called if there is something to train. Raises UserError if the checkpoint is damaged or was made
    with other settings, unless config.overwrite is on, and SystemExit once a signal has stopped the training.
    """
    recipe, path, title = config.recipes[name], checkpoint_path(config, name, seed), f"{name} seed {seed}"
    settings = training_settings(name, config, dataset, teacher_digest)
    state = load_state(path, settings, config.overwrite)
    if state and state["finished"]:
        say(f"{title}  is finished: {path}")
        return
    if state:
        say(f"{title}  continues after epoch {len(state['history'])}, step {state['step']}: {path}")

    torch.manual_seed(seed)  # the same first weights for every recipe of this architecture
    model = build_resnet(recipe.arch, len(dataset.classes), recipe.pretrained and state is None)
    model.to(config.device, memory_format=memory_format(config.device))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    start = "ImageNet weights" if recipe.pretrained else "random weights"
    say(
        f"{title}  {recipe.arch}, {parameters / 1e6:.1f} million parameters from {start}, "
        f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)} of {len(dataset.subset(recipe.train_size)):,} images"
        + (f", taught by {recipe.teacher}" if recipe.teacher else "")
    )

    def save(progress: dict[str, Any]) -> None:
        finished = len(progress["history"]) == recipe.epochs
        about = {"name": name, "seed": seed, "arch": recipe.arch, "classes": list(dataset.classes)}
        made = {"settings": settings, "environment": environment(config), "finished": finished}
        if finished:
            progress = {key: progress[key] for key in ("model", "history")}
        weights = {key: tensor.cpu().contiguous() for key, tensor in progress["model"].items()}
        save_checkpoint(path, {**about, **made, **progress, "model": weights})

    loss_fn = make_loss()
    with stop_requests() as asked:
        try:
            history = fit(model, recipe, config, seed, dataset, loss_fn, title, state, save, lambda: bool(asked))
        except torch.OutOfMemoryError:
            raise UserError(
                f"{title}: the memory of {config.device} is too small for batch_size = {config.batch_size} at "
                f"{config.image_size} px; try a smaller --batch_size"
            ) from None
        except RuntimeError as error:
            if config.compile != "on" or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            raise UserError(f"compile = on: torch.compile failed ({first_line(error)}); try --compile off") from None
    if len(history) < recipe.epochs:
        say(f"{title}  is kept: {path}. The same command goes on from there")
        raise SystemExit(128 + asked[0])
    say(f"{title}  is done: {path}")
    if asked:
        raise SystemExit(128 + asked[0])


def hours_on_cpu(jobs: list[tuple[str, int]], config: Config, dataset: Dataset) -> float:
    """How long the jobs (recipe, seed) will take, from one timed training step on a few images for each arch."""
    several = slice(min(32, config.batch_size))
    images, labels = prepare(dataset.train.images[several], config.image_size), dataset.train.labels[several]

    def seconds_per_image(arch: str) -> float:
        model = build_resnet(arch, len(dataset.classes), pretrained=False)
        model.to(memory_format=memory_format(config.device))
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            with autocast(config.device, config.precision):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
        return (time.perf_counter() - started) / len(images)

    speed = {arch: seconds_per_image(arch) for arch in {config.recipes[name].arch for name, _ in jobs}}
    seconds = 0.0
    for name, _ in jobs:
        recipe = config.recipes[name]
        trained = len(dataset.subset(recipe.train_size)) * recipe.epochs
        measured = len(dataset.held_out[1].labels) * recipe.epochs
        seconds += speed[recipe.arch] * (trained + measured / 3)  # a forward pass is a third of a step
    return seconds / 3600


def start(config: Config, names: list[str]) -> tuple[Config, Dataset]:
    """Choose the device, load the images, and say on stderr what is going to be done on what."""
    config = resolve(config)
    tune(config)
    dataset = load_dataset(config)
    validation = f", {len(dataset.validation.labels):,} validation" if dataset.validation else ""
    pinned = ", training images kept in host memory: too many for the device" * dataset.train.images.is_pinned()
    say(
        f"{config.run}: {config.dataset}, {len(dataset.train.labels):,} training{validation} and "
        f"{len(dataset.test.labels):,} test images of {len(dataset.classes)} classes at {config.image_size} px; "
        f"{device_name(config)}, {describe_precision(config)}{pinned}"
    )
    # What would fail hours from now fails here: a folder that cannot be written, an impossible subset, a damaged file.
    jobs = [(name, seed) for seed in config.seeds for name in names]
    for name, seed in jobs:
        dataset.subset(config.recipes[name].train_size)
        probe = checkpoint_path(config, name, seed).with_suffix(".probe")
        write_durably(probe, b"")
        probe.unlink()
    jobs = [job for job in jobs if config.overwrite or not load_finished(checkpoint_path(config, *job))]
    if jobs and config.device == "cpu" and (hours := hours_on_cpu(jobs, config, dataset)) > 1:
        say(
            f"On this CPU that takes about {hours:.0f} hours. To see it all in minutes: "
            "python teacher_student_model.py --preset demo"
        )
    return config, dataset


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    names = [name for name in config.selected() if config.recipes[name].teacher is None]
    if not names:
        raise UserError(f"only = {config.only}: these have a teacher; python teacher_student_model.py trains them")
    config, dataset = start(config, names)
    for seed in config.seeds:
        for name in names:
            train(name, seed, config, dataset)


if __name__ == "__main__":
    main()
