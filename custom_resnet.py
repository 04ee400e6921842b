"""Train the models that have no teacher; the training loop of all recipes.

    python custom_resnet.py                     # teacher, student and student_10 of the default preset
    python custom_resnet.py --preset demo       # two minutes on a CPU, nothing to download

Each model goes to checkpoints/RUN/seedS/MODEL.pt; a finished one is not trained again.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.checkpoints import checkpoint_path, save_model
from engine.console import Progress, duration, log, stop_requests
from engine.datasets import Batch, Dataset, batches
from engine.device import (
    DROPOUT,
    code_digest,
    compiled,
    environment,
    explain_device_errors,
    forward_pass,
    memory_format,
    seed_torch,
)
from engine.distributed import (
    all_reduce_max,
    average_batchnorm_statistics,
    data_parallel,
    main_process_first,
    rank,
    shard,
    world_size,
)
from engine.errors import UserError
from engine.estimate import UNKNOWN, Estimate
from engine.fingerprints import load_or_copy, training_settings
from engine.images import NORMALISATION
from engine.inference import NotFinite, Stopped, predict
from engine.models import build_model, initial_model
from engine.recipes import Recipe
from engine.settings import Config
from engine.training import Training, diverged, explain_share
from utils import load_config, run_script, start_training

# logits (B, C) float32, batch -> the terms of the loss by name, each a mean over the B images; the loss is their sum
LossFunction = Callable[[torch.Tensor, Batch], dict[str, torch.Tensor]]

build_resnet = build_model  # the original's name; it now builds any architecture


def cross_entropy(logits: torch.Tensor, batch: Batch, label_smoothing: float = 0.0) -> dict[str, torch.Tensor]:
    """The loss of a recipe without a teacher."""
    return {"hard loss": F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)}


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

    After an epoch (see `epoch_save_due`), every few minutes, and when `stop` returns a signal, `write` receives the
    state from which a later call resumes exactly. Raises Diverged if the loss becomes NaN or infinite.
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
                seed_torch(DROPOUT, seed, epoch, training.step, rank())  # a resumed run draws the same masks
                with forward_pass(config.device, config.precision):
                    logits = forward(batch.images).float()
                terms = loss_fn(logits, batch)
                if len(terms) > 1 and training.step % max(1, training.steps // 50) == 0:
                    training.meter.measure_gradients(logits, terms)
                loss = sum(terms.values()) * (share * world_size())  # DDP averages the gradients
                training.optimizer.zero_grad()
                loss.backward()
                training.optimizer.step()
                training.scheduler.step()
                average_batchnorm_statistics(model, share)
                training.meter.update(logits, batch.labels, terms, share)
                training.step += 1

                due, saving, stopping = all_reduce_max(progress.update(len(batch.labels)), training.save_due, stop())
                if due or training.step % 50 == 0:
                    training.check()
                if due:
                    progress.describe(training.describe(progress.rate, estimate.later))
                if saving or stopping:
                    training.save(write)
                if stopping:
                    return training.history

        finished = finish_epoch(training, dataset, stop)
        saving, stopping = all_reduce_max(training.epoch_save_due, not finished or stop())
        if saving or stopping:
            training.save(write)
        if stopping:
            break
    return training.history


def finish_epoch(training: Training, dataset: Dataset, stop: Callable[[], int]) -> bool:
    """Evaluate the model on the held-out images and add a record to the history. It is not used for model selection.

    Returns False if a signal interrupts the evaluation, which is repeated when training resumes.
    """
    training.check()
    (loss, accuracy), seconds = training.averages, time.perf_counter() - training.started
    config, epochs = training.config, training.recipe.epochs
    title = f"{training.title}  epoch {len(training.history) + 1:>2}/{epochs}"
    try:
        held_out, held_out_accuracy = evaluate_held_out(training.model, config, dataset, title, stop)
    except Stopped:
        return False
    except NotFinite:
        diverged(f"logits of the {dataset.held_out[0]} images", title)
    record = {"epoch": len(training.history) + 1, "loss": loss, "train_accuracy": accuracy}
    record |= {f"{held_out}_accuracy": held_out_accuracy, "seconds": seconds}
    if (share := training.soft_share) is not None:
        record["soft_share"] = share
        if not training.history and (explanation := explain_share(training.recipe, share)):
            log.info(f"{training.title}  {explanation}")
    training.history.append(record)
    rate = training.steps * config.batch_size / seconds
    log.info(
        f"{title}  loss {loss:.4f}  training {accuracy:7.2%}  {held_out} {held_out_accuracy:7.2%}  "
        f"{rate:,.0f} images/s  {duration(seconds)}"
    )
    training.step = 0
    return True


def evaluate_held_out(
    model: nn.Module, config: Config, dataset: Dataset, title: str, stop: Callable[[], int] = lambda: 0
) -> tuple[str, float]:
    """Which images are held out, "validation" or "test", and the accuracy on them.

    Raises NotFinite if logits are NaN or infinite, and Stopped if `stop` returns a signal.
    """
    held_out, split = dataset.held_out
    logits = predict(model, split.images, config.image_size, config.precision, title=f"{title} {held_out}", stop=stop)
    return held_out, (logits.argmax(1) == split.labels).float().mean().item()


def train(
    name: str,
    seed: int,
    config: Config,
    dataset: Dataset,
    make_loss: Callable[[], LossFunction] | None = None,
    estimate: Estimate = UNKNOWN,
) -> None:
    """Train one recipe with one seed, or resume it; a finished checkpoint is kept.

    `make_loss` is called only if there is something to train; without it the loss is the cross-entropy. Raises
    UserError if the checkpoint is damaged or was trained with different settings, unless config.overwrite is on, and
    SystemExit after a signal.
    """
    recipe, path, title = config.recipes[name], checkpoint_path(config, name, seed), f"{name} seed {seed}"
    state = load_or_copy(name, seed, config, dataset)
    if state and state["finished"]:
        same_code = state["environment"].get("code") == code_digest()
        other_code = "" if same_code else "; it was trained with another version of the code"
        log.info(f"{title}  is finished: {path}{other_code}")
        return
    settings = training_settings(name, seed, config, dataset)
    model = start_model(recipe, seed, config, dataset, title, state)

    def write(state: dict[str, Any]) -> None:
        finished = len(state["history"]) == recipe.epochs
        about = {"name": name, "seed": seed, "arch": recipe.arch, "stem": recipe.stem, "classes": list(dataset.classes)}
        about["normalisation"] = NORMALISATION
        origin = {"settings": settings, "environment": environment(config), "finished": finished}
        origin["config"] = asdict(config)
        if finished:
            state = {key: state[key] for key in ("model", "history")}
        weights = {key: tensor.cpu().contiguous() for key, tensor in state["model"].items()}
        save_model(path, {**about, **origin, **state, "model": weights})

    with explain_device_errors(config):
        if recipe.epochs == 0:
            check_given_weights(model, recipe, config, dataset, title)
            write({"model": model.state_dict(), "history": []})
            return
        loss_fn = make_loss() if make_loss else partial(cross_entropy, label_smoothing=recipe.label_smoothing)
        with stop_requests() as stop:
            history = fit(model, recipe, config, seed, dataset, loss_fn, title, state, write, stop, estimate)
            (stopped,) = all_reduce_max(stop())
    finished = len(history) == recipe.epochs
    log.info(f"{title}  is {'finished' if finished else 'saved; the same command resumes it'}: {path}")
    if stopped:
        raise SystemExit(128 + stopped)


def check_given_weights(model: nn.Module, recipe: Recipe, config: Config, dataset: Dataset, title: str) -> None:
    """Log the accuracy of weights that are used as they are, with a warning if it is low."""
    held_out, accuracy = evaluate_held_out(model, config, dataset, title)
    log.info(f"{title}  is used as it is; accuracy on the {held_out} images {accuracy:.2%}")
    if recipe.weights_file and accuracy < 0.5:
        log.info(
            f"warning: {title} classifies only {accuracy:.0%} correctly. The usual reasons are a different "
            "normalisation (here ImageNet's mean and standard deviation of RGB values from 0 to 1), a different class "
            f"order (here {', '.join(dataset.classes[:10])}{', ...' * (len(dataset.classes) > 10)}) or a different "
            f"image size (here {config.image_size} px)"
        )


def start_model(
    recipe: Recipe, seed: int, config: Config, dataset: Dataset, title: str, state: dict[str, Any] | None
) -> nn.Module:
    """The model with its initial weights, on the device; `state`, if any, is loaded later. Logs a line."""

    def build() -> nn.Module:
        torch.manual_seed(seed)  # every recipe of this architecture starts from the same weights
        if state:
            return build_model(recipe.arch, len(dataset.classes), stem=recipe.stem)
        return initial_model(recipe, dataset.classes, lambda text: log.info(f"{title}  {text}"))

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
        images = len(dataset.subset(recipe.train_size))
        weights = f"the weights in {recipe.weights_file}" if recipe.weights_file else "random weights"
        log.info(
            f"{title}  {recipe.arch}, {parameters / 1e6:.1f} million parameters, from "
            + ("ImageNet weights" if recipe.imagenet_weights else weights)
            + f", {recipe.epochs} epoch{'s' * (recipe.epochs > 1)} of {images:,} images" * (recipe.epochs > 0)
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
        if config.jobs > 1:
            raise UserError(f"jobs = {config.jobs}: use python teacher_student_model.py")
        models = [(name, seed) for name, seed in config.models() if config.recipes[name].teacher is None]
        with start_training(config, models) as (config, dataset, estimates):
            for name, seed in models:
                train(name, seed, config, dataset, estimate=estimates.get((name, seed), UNKNOWN))


if __name__ == "__main__":
    main()
