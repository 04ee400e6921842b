"""Train torchvision ResNets without a teacher: the model, and the training loop of all recipes.

    python custom_resnet.py                     # teacher and student, as in the README's table
    python custom_resnet.py --preset demo       # two minutes on a CPU, nothing to download

Each model goes to checkpoints/RUN/seedS/MODEL.pt; a finished one is not trained again.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from engine.checkpoints import checkpoint_path, load_matching, save_checkpoint, training_settings
from engine.console import Progress, duration, log, stop_requests
from engine.datasets import Batch, Dataset, batches
from engine.device import autocast, compiled, environment, explain_device_errors, memory_format
from engine.distributed import (
    all_reduce_max,
    average_batchnorm_statistics,
    broadcast_from_rank0,
    data_parallel,
    main_process_first,
    shard,
    world_size,
)
from engine.errors import UserError, first_line
from engine.estimate import UNKNOWN, Estimate
from engine.inference import Stopped, predict
from engine.settings import Config, Recipe
from engine.training import Training, diverged
from utils import load_config, run_script, start_training

# logits (B, C) float32, batch -> the terms of the loss by name, each a mean over the batch; the loss is their sum
LossFunction = Callable[[torch.Tensor, Batch], dict[str, torch.Tensor]]


def build_resnet(arch: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """torchvision's `arch` with a new last layer `fc` for `num_classes`; the parameters keep torchvision's names.

    Raises UserError if the ImageNet weights are neither in torch's cache nor can be downloaded.
    """
    model = torchvision.models.get_model(arch)
    if pretrained:
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        try:
            # weights_only: no code in a file of the cache is executed
            model.load_state_dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
        except Exception as error:  # of many types, for a missing, damaged or foreign file
            problem = "cannot be used" if file.exists() else "is missing and could not be downloaded"
            raise UserError(
                f"{file}: {problem} ({first_line(error)}). Put the file from {weights.url} there, or start from "
                "random weights: --preset scratch, or --RECIPE.pretrained false"
            ) from None
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def load_model(state: dict[str, Any], device: str) -> nn.Module:
    """The model of a checkpoint, in evaluation mode."""
    model = build_resnet(state["arch"], len(state["classes"]))
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{state['name']}: the weights in its checkpoint do not fit a {state['arch']} ({error})"
        ) from None
    return model.to(device, memory_format=memory_format(device)).eval()


def cross_entropy(logits: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    """The loss of a recipe without a teacher."""
    return {"hard loss": F.cross_entropy(logits, batch.labels)}


def fit(
    model: nn.Module,
    recipe: Recipe,
    config: Config,
    seed: int,
    dataset: Dataset,
    loss_fn: LossFunction,
    title: str,
    state: dict[str, Any] | None = None,
    write: Callable[[dict[str, Any]], None] = lambda state: None,
    stop: Callable[[], int] = lambda: 0,
    estimate: Estimate = UNKNOWN,
) -> list[dict[str, float]]:
    """Train the model in place and return its history, a record for each epoch.

    After each epoch, every few minutes, and when `stop` returns a signal, `write` receives the state from which a later
    call resumes exactly. Raises Diverged if the loss becomes NaN or infinite.
    """
    subset, own = dataset.subset(recipe.train_size), shard(config.batch_size)
    share = (own.stop - own.start) / config.batch_size  # of each batch that is on this rank
    training = Training(model, recipe, config, len(subset), title, state)
    forward = compiled(data_parallel(model, config.device), config, estimate.model)

    for epoch in range(len(training.history), recipe.epochs):
        training.begin_epoch()
        total, done = (count * (own.stop - own.start) for count in (training.steps, training.step))
        with Progress(f"{title} epoch {epoch + 1}/{recipe.epochs}", total, done) as progress:
            for batch in batches(dataset.train, subset, config, seed, epoch, training.step):
                with autocast(config.device, config.precision):
                    logits = forward(batch.images)
                terms = loss_fn(logits.float(), batch)
                loss = sum(terms.values()) * (share * world_size())  # DDP averages the gradients
                training.optimizer.zero_grad()
                loss.backward()
                training.optimizer.step()
                training.scheduler.step()
                average_batchnorm_statistics(model, share)
                training.meter.update(logits, batch.labels, terms, share)
                training.step += 1

                due = progress.update(len(batch.labels))
                due, saving, stopping = all_reduce_max(due, training.save_due, stop())
                if due or training.step % 50 == 0:
                    training.check()
                if due:
                    progress.describe(training.describe(progress.rate, estimate.later))
                if saving or stopping:
                    training.save(write)
                if stopping:
                    return training.history

        try:
            finish_epoch(training, dataset, stop)
        except Stopped:  # while evaluating, which is repeated when training resumes
            training.save(write)
            return training.history
        training.save(write)
        if all_reduce_max(stop())[0]:
            break
    return training.history


def finish_epoch(training: Training, dataset: Dataset, stop: Callable[[], int]) -> None:
    """Evaluate the model on the held-out images and add a record to the history. No model is selected by it."""
    training.check()
    (loss, accuracy), seconds = training.averages, time.perf_counter() - training.started
    config, epochs = training.config, training.recipe.epochs
    title = f"{training.title}  epoch {len(training.history) + 1:>2}/{epochs}"
    held_out, split = dataset.held_out
    logits = predict(
        training.model, split.images, config.image_size, config.precision, title=f"{title} {held_out}", stop=stop
    )
    if not logits.isfinite().all():
        diverged(f"logits of the {held_out} images", title)
    held_out_accuracy = (logits.argmax(1) == split.labels).float().mean().item()
    record = {"epoch": len(training.history) + 1, "loss": loss, "train_accuracy": accuracy}
    training.history.append({**record, f"{held_out}_accuracy": held_out_accuracy, "seconds": seconds})
    rate = training.steps * config.batch_size / seconds
    log.info(
        f"{title}  loss {loss:.4f}  training {accuracy:7.2%}  {held_out} {held_out_accuracy:7.2%}  "
        f"{rate:,.0f} images/s  {duration(seconds)}"
    )
    training.step = 0


def train(
    name: str,
    seed: int,
    config: Config,
    dataset: Dataset,
    make_loss: Callable[[], LossFunction] = lambda: cross_entropy,
    teacher_digest: str | None = None,
    estimate: Estimate = UNKNOWN,
) -> None:
    """Train one recipe with one seed, or resume it; a finished checkpoint is kept.

    `make_loss` is called only if there is something to train. Raises UserError if the checkpoint is damaged or was
    trained with different settings, unless config.overwrite is on, and SystemExit after a signal.
    """
    recipe, path, title = config.recipes[name], checkpoint_path(config, name, seed), f"{name} seed {seed}"
    settings = training_settings(name, seed, config, dataset, teacher_digest)
    state = broadcast_from_rank0(lambda: load_matching(path, settings, config.overwrite))
    if state and state["finished"]:
        log.info(f"{title}  is finished: {path}")
        return
    model = start_model(recipe, seed, config, dataset, title, state)

    def write(state: dict[str, Any]) -> None:
        finished = len(state["history"]) == recipe.epochs
        about = {"name": name, "seed": seed, "arch": recipe.arch, "classes": list(dataset.classes)}
        origin = {"settings": settings, "environment": environment(config), "finished": finished}
        if finished:
            state = {key: state[key] for key in ("model", "history")}
        weights = {key: tensor.cpu().contiguous() for key, tensor in state["model"].items()}
        broadcast_from_rank0(lambda: save_checkpoint(path, {**about, **origin, **state, "model": weights}))

    loss_fn = make_loss()
    with stop_requests() as stop:
        with explain_device_errors(config):
            history = fit(model, recipe, config, seed, dataset, loss_fn, title, state, write, stop, estimate)
        (stopped,) = all_reduce_max(stop())
    finished = len(history) == recipe.epochs
    log.info(f"{title}  is {'finished' if finished else 'saved; the same command resumes it'}: {path}")
    if stopped:
        raise SystemExit(128 + stopped)


def start_model(
    recipe: Recipe, seed: int, config: Config, dataset: Dataset, title: str, state: dict[str, Any] | None
) -> nn.Module:
    """The model with its initial weights, on the device; `state`, if any, is loaded later. Logs a line."""

    def build() -> nn.Module:
        torch.manual_seed(seed)  # every recipe of this architecture starts from the same weights
        return build_resnet(recipe.arch, len(dataset.classes), recipe.pretrained and state is None)

    model = main_process_first(build)
    if config.sync_batchnorm and world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if state:
        before, now = state["environment"], environment(config)
        changed = [key for key in now if before.get(key, now[key]) != now[key]]
        changes = "".join(f"; {key} was {before[key]}, is now {now[key]}" for key in changed)
        log.info(f"{title}  resumes after epoch {len(state['history'])}, step {state['step']}{changes}")
    else:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        log.info(
            f"{title}  {recipe.arch}, {parameters / 1e6:.1f} million parameters, from "
            f"{'ImageNet' if recipe.pretrained else 'random'} weights, "
            f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)} of {len(dataset.subset(recipe.train_size)):,} images"
            + (f", distilled from {recipe.teacher}" if recipe.teacher else "")
        )
    return model.to(config.device, memory_format=memory_format(config.device))


def main(argv: list[str] | None = None) -> None:
    with run_script():
        config = load_config(argv)
        distilled = [name for name in config.only if config.recipes[name].teacher]
        if distilled:
            raise UserError(
                f"only = {' '.join(distilled)}: is distilled from a teacher; use python teacher_student_model.py"
            )
        names = [name for name in config.selected() if config.recipes[name].teacher is None]
        with start_training(config, names, build_resnet) as (config, dataset, estimates):
            for seed in config.seeds:
                for name in names:
                    train(name, seed, config, dataset, estimate=estimates.get((name, seed), UNKNOWN))


if __name__ == "__main__":
    main()
