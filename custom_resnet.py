"""Train torchvision ResNets on their own: every recipe without a teacher.

    python custom_resnet.py                     # teacher and student, as in the README's table
    python custom_resnet.py --preset demo       # two minutes on a CPU, nothing to download

Each model goes to checkpoints/RUN/seedS/MODEL.pt; a finished one is not trained again.
"""

import contextlib
import copy
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from config import Config, Diverged, Recipe, UserError, first_line, parse
from utils import (
    Alone,
    Batch,
    Dataset,
    as_script,
    autocast,
    batches,
    checkpoint_path,
    describe_precision,
    device_name,
    environment,
    everywhere,
    from_first,
    highest,
    load_everywhere,
    load_finished,
    load_training,
    locked,
    memory_format,
    own_part,
    prepare,
    processes,
    progress,
    rank,
    refuse_other_settings,
    save_checkpoint,
    say,
    settle,
    stop_requests,
    summed,
    training_settings,
    write_durably,
)

# logits (B, C) float32, batch -> the terms of the loss by name, each a mean over the batch; the loss is their sum
LossFunction = Callable[[torch.Tensor, Batch], dict[str, torch.Tensor]]


class Stopped(Exception):
    """A signal has asked to stop, in the middle of something that is done again from its start."""


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
            if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], _BatchNorm):
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
    stop: Callable[[], int] = lambda: 0,
) -> torch.Tensor:
    """Logits (N, C) float32 of a model in evaluation mode, on its device; the model itself is left as it is.

    uint8 images (N, 3, H, W) are resized to `image_size` (None: left as they are) and normalised here; float images are
    taken to be ready for the model. Several processes, all of which must call this, predict a part each and get all.
    Raises Stopped, in all of them, if `stop` says so in one.
    """
    device = next(model.parameters()).device
    was_training = model.training
    folded = fold_batchnorm(model.eval())
    own, parts = own_part(len(images)), []
    with torch.inference_mode(), progress(total=own.stop - own.start, desc=title, unit=" images") as bar:
        for chunk in images[own].split(batch_size):
            chunk = chunk.to(device, non_blocking=True)
            if chunk.dtype == torch.uint8:
                chunk = prepare(chunk, image_size)
            with autocast(device, precision):
                parts.append(folded(chunk).float())
            bar.update(len(chunk))
            if stop():
                break
    model.train(was_training)
    if highest(stop())[0]:
        raise Stopped
    predicted = torch.cat(parts)
    logits = predicted.new_zeros(len(images), predicted.shape[1])
    logits[own] = predicted
    return summed(logits)  # a row is zero in all processes but one


def cross_entropy(logits: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    """The hard loss, for a recipe without a teacher."""
    return {"hard loss": F.cross_entropy(logits, batch.labels)}


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
    able = torch.device(config.device).type == "cuda" and not config.deterministic
    return config.compile == "auto" and able and seconds_left / 5 > 60


def compiled(model: nn.Module, required: bool) -> nn.Module:
    """torch.compile, which goes back to plain PyTorch if it fails and is not required."""
    say("torch.compile: the next step takes about a minute longer")
    torch._dynamo.config.suppress_errors = not required
    return torch.compile(model)


def parallel(model: nn.Module, config: Config) -> nn.Module:
    """The model as several processes train it: gradients are averaged over them; alone, the model itself."""
    if processes() == 1:
        return model
    device = torch.device(config.device)
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def average_statistics(model: nn.Module, share: float) -> None:
    """BatchNorm's running statistics, averaged over the processes by their share of the batch.

    Each process normalises by its own part of the batch unless `sync_batchnorm` is on.
    """
    if processes() == 1:
        return
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    averages = summed(torch.cat(statistics) * share).split([len(buffer) for buffer in statistics])
    torch._foreach_copy_(statistics, averages)


def measure(
    model: nn.Module, config: Config, dataset: Dataset, title: str, stop: Callable[[], int]
) -> tuple[str, float]:
    """What is measured after each epoch, for the history: the accuracy on the images held out, never chosen by."""
    held_out, split = dataset.held_out
    title = f"{title} on {held_out} images"
    logits = predict(model, split.images, config.image_size, config.precision, title=title, stop=stop)
    if not logits.isfinite().all():
        raise Diverged(f"{title}: the logits became infinite or no number. {AFTER_DIVERGENCE}")
    return held_out, (logits.argmax(1) == split.labels).float().mean().item()


AFTER_DIVERGENCE = "The last good state is kept. Train again with a lower lr (and --overwrite, or another --run)"
WEIGHTS = "gradients, or the weights they led to,"


class Tally:
    """What an epoch has come to, on the device: adding to it never makes the host wait, reading does."""

    def __init__(self, sums: torch.Tensor, device: str):
        self.sums = sums.to(device)  # (2,): of the batches' mean losses and of the hits, over this process's images
        self.parts: list[str] = []
        self.bad_steps = torch.zeros(1, device=device)  # for how many steps each part has been no finite number
        self.rates: list[float] = []  # the learning rate of each step

    @torch.no_grad()
    def add(
        self, logits: torch.Tensor, labels: torch.Tensor, terms: dict[str, torch.Tensor], share: float, lr: float
    ) -> None:
        """A step: logits (B, C), labels (B,), the terms of their loss, and their share of the whole batch."""
        self.rates.append(lr)
        self.sums += torch.stack([sum(terms.values()) * share, (logits.argmax(1) == labels).sum()])
        self.parts = ["logits", *terms]
        bad = torch.stack([logits.float().sum(), *terms.values()]).isfinite().logical_not()
        self.bad_steps = self.bad_steps + (bad | (self.bad_steps > 0))

    def read(self, title: str, epoch: int, step: int) -> torch.Tensor:
        """The sums (2,) over all processes, on the CPU. Raises Diverged, naming the part that went first."""
        bad = highest(*self.bad_steps.int().tolist())
        if any(bad):
            ago, part = max(bad) - 1, self.parts[bad.index(max(bad))]  # of several, what the others are made from
            if part == "logits" and step - ago > 1:
                ago, part = ago + 1, WEIGHTS  # which made these logits
            self.stop(title, part, epoch, step, ago)
        return summed(self.sums).cpu()

    def stop(self, title: str, part: str, epoch: int, step: int, ago: int) -> None:
        """Raise Diverged: a part went `ago` steps before `step`."""
        lr = self.rates[max(-ago - 1, -len(self.rates))]
        raise Diverged(
            f"{title}: the {part} became infinite or no number in epoch {epoch}, step {step - ago}, at learning rate "
            f"{lr:g}. {AFTER_DIVERGENCE}"
        )


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
    stop: Callable[[], int] = lambda: 0,
) -> list[dict[str, float]]:
    """Train the model in place and return its history, a record for each epoch.

    After each epoch, every few minutes and before it stops because `stop` says so, `save` is given all that a later
    call needs, as `state`, to go on as if nothing had happened. Raises Diverged if the loss is no longer a number.
    """
    subset = dataset.subset(recipe.train_size)
    steps, size = len(subset) // config.batch_size, config.batch_size
    own = own_part(size)
    share = (own.stop - own.start) / size  # of each batch; 1 for a process alone
    optimizer = make_optimizer(model, recipe, config)
    scheduler = make_scheduler(optimizer, recipe, recipe.epochs * steps)
    history, done, seconds, tally = [], 0, 0.0, Tally(torch.zeros(2), config.device)  # `done` steps of this epoch
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        history, done, seconds = state["history"], state["step"], state["seconds"]
        tally = Tally(state["totals"] * (rank() == 0), config.device)

    def so_far(step: int) -> tuple[float, float]:
        loss, hits = tally.read(title, len(history) + 1, step).tolist()
        return loss / step, hits / (step * size)

    def refuse_bad_weights(step: int) -> None:  # that no logits have shown yet
        if not torch.stack([parameter.detach().sum() for parameter in model.parameters()]).isfinite().all():
            tally.stop(title, WEIGHTS, len(history) + 1, step, ago=0)

    def keep(step: int, seconds: float) -> None:
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        so_far = {"history": list(history), "step": step, "totals": summed(tally.sums).cpu(), "seconds": seconds}
        save({**{name: part.state_dict() for name, part in parts.items()}, **so_far})

    saved = time.monotonic()
    forward = uncompiled = parallel(model, config)
    if config.compile == "on":
        forward = compiled(forward, required=True)
    for epoch in range(len(history), recipe.epochs):
        left = history[-1]["seconds"] * (recipe.epochs - epoch) if history else 0.0
        if forward is uncompiled and from_first(lambda left=left: compiling_pays(config, left)):
            forward = compiled(forward, required=False)
        started = time.perf_counter() - seconds
        model.train()
        now = {"desc": f"{title} epoch {epoch + 1}/{recipe.epochs}", "total": steps * size, "initial": done * size}
        bar = progress(**now, unit=" images", mininterval=0.5)
        for step, batch in enumerate(batches(dataset.train, subset, config, seed, epoch, done), done + 1):
            optimizer.zero_grad()
            with autocast(config.device, config.precision):
                logits = forward(batch.images)
            terms = loss_fn(logits.float(), batch)
            (sum(terms.values()) * (share * processes())).backward()  # the processes' gradients are averaged
            optimizer.step()
            average_statistics(model, share)
            tally.add(logits.detach(), batch.labels, terms, share, optimizer.param_groups[0]["lr"])
            scheduler.step()
            late = time.monotonic() - saved > 60 * config.checkpoint_minutes
            stopping, due, drawn = highest(stop(), late, bool(bar.update(size)))  # twice a second at most
            if drawn or step % 50 == 0 or stopping or due:
                mean_loss, accuracy = so_far(step)
                bar.set_postfix_str(f"loss {mean_loss:.4f}, accuracy {accuracy:.2%}", refresh=False)
            if stopping or due:
                refuse_bad_weights(step)
                keep(step, time.perf_counter() - started)
                saved = time.monotonic()
            if stopping:
                return history
        bar.close()
        mean_loss, accuracy = so_far(steps)
        seconds = time.perf_counter() - started
        if tally.rates:  # none where only the measuring is left to do
            refuse_bad_weights(steps)

        try:
            held_out, measured = measure(model, config, dataset, f"{title} epoch {epoch + 1}", stop)
        except Stopped:
            keep(steps, seconds)
            return history
        record = {"epoch": epoch + 1, "loss": mean_loss, "train_accuracy": accuracy}
        history.append({**record, f"{held_out}_accuracy": measured, "seconds": seconds})
        told = (
            f"{title}  epoch {epoch + 1:>2}/{recipe.epochs}  loss {mean_loss:.4f}  training {accuracy:7.2%}"
            f"  {held_out} {measured:7.2%}  {steps * size / seconds:,.0f} images/s  {seconds:,.0f} s"
        )
        done, seconds, tally = 0, 0.0, Tally(torch.zeros(2), config.device)
        keep(done, seconds)
        say(told)
        saved = time.monotonic()
        if highest(stop())[0]:
            break
    return history


def load_model(state: dict[str, Any], device: str) -> nn.Module:
    """The model that a checkpoint's state describes, in evaluation mode."""
    model = build_resnet(state["arch"], len(state["classes"]), pretrained=False)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{state['name']}: the weights in its checkpoint are not a {state['arch']}'s ({error})"
        ) from None
    return model.to(device, memory_format=memory_format(device)).eval()


def load_state(path: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """What was trained with these settings so far; None for nothing, or for what `overwrite` gives up.

    Raises UserError if the file is damaged or was made with other settings, unless `overwrite` is on.
    """
    try:
        state = load_training(path)
        if state:
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
    settings = training_settings(name, seed, config, dataset, teacher_digest)
    state = from_first(lambda: load_state(path, settings, config.overwrite))
    if state and state["finished"]:
        say(f"{title}  is finished: {path}")
        return
    if state:
        before, now = {"processes": "1", **state["environment"]}, environment(config)
        changed = "".join(
            f"; {key} was {before.get(key)}, is now {now[key]}" for key in now if before.get(key) != now[key]
        )
        say(f"{title}  continues after epoch {len(state['history'])}, step {state['step']}: {path}{changed}")

    def build() -> nn.Module:
        torch.manual_seed(seed)  # the same first weights for every recipe of this architecture
        return build_resnet(recipe.arch, len(dataset.classes), recipe.pretrained and state is None)

    model = everywhere(build)
    if config.sync_batchnorm and processes() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(config.device, memory_format=memory_format(config.device))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    origin = "ImageNet weights" if recipe.pretrained else "random weights"
    say(
        f"{title}  {recipe.arch}, {parameters / 1e6:.1f} million parameters from {origin}, "
        f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)} of {len(dataset.subset(recipe.train_size)):,} images"
        + (f", taught by {recipe.teacher}" if recipe.teacher else "")
    )

    def write(state: dict[str, Any]) -> None:
        finished = len(state["history"]) == recipe.epochs
        about = {"name": name, "seed": seed, "arch": recipe.arch, "classes": list(dataset.classes)}
        made = {"settings": settings, "environment": environment(config), "finished": finished}
        if finished:
            state = {key: state[key] for key in ("model", "history")}
        weights = {key: tensor.cpu().contiguous() for key, tensor in state["model"].items()}
        save_checkpoint(path, {**about, **made, **state, "model": weights})

    def save(state: dict[str, Any]) -> None:
        from_first(lambda: write(state))

    loss_fn = make_loss()
    with stop_requests() as asked:

        def stop() -> int:
            return asked[0] if asked else 0

        try:
            history = fit(model, recipe, config, seed, dataset, loss_fn, title, state, save, stop)
        except torch.OutOfMemoryError:
            raise Alone(
                f"{title}: the memory of {config.device} is too small for batch_size = {config.batch_size} at "
                f"{config.image_size} px; try more processes, or a smaller --batch_size (with --overwrite)"
            ) from None
        except RuntimeError as error:
            if config.compile != "on" or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            raise UserError(f"compile = on: torch.compile failed ({first_line(error)}); try --compile off") from None
        (stopped,) = highest(stop())
    if len(history) < recipe.epochs:
        say(f"{title}  is kept: {path}. The same command goes on from there")
    else:
        say(f"{title}  is done: {path}")
    if stopped:
        raise SystemExit(128 + stopped)


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
    return seconds / 3600 / processes()


def space_needed(jobs: list[tuple[str, int]], config: Config, dataset: Dataset) -> int:
    """Bytes that the jobs (recipe, seed) take on disk at most, what is there already included."""

    def weights(name: str) -> int:
        with torch.device("meta"):
            model = build_resnet(config.recipes[name].arch, len(dataset.classes), pretrained=False)
        return sum(tensor.nbytes for tensor in model.state_dict().values())

    sizes = {name: weights(name) for name, _ in jobs}
    views = 2 * len(dataset.train.labels) * len(dataset.classes) * 4
    taught = sum(config.recipes[name].teacher is not None for name, _ in jobs)
    # While a model trains its momentum is kept too, and what is new is written before the old one goes.
    return sum(sizes[name] for name, _ in jobs) + 4 * max(sizes.values()) + (taught + (taught > 0)) * views


def check_folders(names: list[str], config: Config, dataset: Dataset) -> None:
    """Raise UserError for what would fail hours from now: a folder that cannot be written, a full disk, a damaged file.

    Announces a run that takes hours.
    """
    jobs = [(name, seed) for seed in config.seeds for name in names]
    for job in jobs:
        probe = checkpoint_path(config, *job).with_suffix(".probe")
        write_durably(probe, b"")
        probe.unlink()
    jobs = [job for job in jobs if config.overwrite or not load_finished(checkpoint_path(config, *job))]
    if not jobs:
        return
    there = sum(path.stat().st_size for job in jobs if (path := checkpoint_path(config, *job)).exists())
    free, needed = (
        shutil.disk_usage(checkpoint_path(config, *jobs[0]).parent).free + there,
        space_needed(jobs, config, dataset),
    )
    if free < needed:
        raise UserError(
            f"{config.checkpoints_path}: this run takes {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free "
            "there. Make room or choose another folder (--checkpoints_path)"
        )
    if config.device == "cpu" and (hours := hours_on_cpu(jobs, config, dataset)) > 1:
        say(
            f"On this CPU that takes about {hours:.0f} hours. To see it all in minutes: "
            "python teacher_student_model.py --preset demo"
        )


@contextlib.contextmanager
def start(config: Config, names: list[str]) -> Iterator[tuple[Config, Dataset]]:
    """Choose the device, load the images, say on stderr what is going to be done on what, and lock the run's folder."""
    config = settle(config)
    if config.sync_batchnorm and torch.device(config.device).type != "cuda":
        raise UserError(f"sync_batchnorm = True: PyTorch has it on CUDA only, and the device is {config.device}")
    dataset = load_everywhere(config)
    for name in names:
        dataset.subset(config.recipes[name].train_size)  # raises where there is none of that size
    validation = f", {len(dataset.validation.labels):,} validation" if dataset.validation else ""
    pinned = ", training images kept in host memory: too many for the device" * dataset.train.images.is_pinned()
    several = f", {processes()} processes" * (processes() > 1)
    say(
        f"{config.run}: {config.dataset}, {len(dataset.train.labels):,} training{validation} and "
        f"{len(dataset.test.labels):,} test images of {len(dataset.classes)} classes at {config.image_size} px; "
        f"{device_name(config)}{several}, {describe_precision(config)}{pinned}"
    )
    with locked(Path(config.checkpoints_path, config.run)):
        from_first(lambda: check_folders(names, config, dataset))
        yield config, dataset


@as_script()
def main(argv: list[str] | None = None) -> None:
    config = from_first(lambda: parse(argv))
    names = [name for name in config.selected() if config.recipes[name].teacher is None]
    if not names:
        raise UserError(f"only = {config.only}: these have a teacher; python teacher_student_model.py trains them")
    with start(config, names) as (config, dataset):
        for seed in config.seeds:
            for name in names:
                train(name, seed, config, dataset)


if __name__ == "__main__":
    main()
