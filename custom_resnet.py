"""Train the models that have no teacher; the training loop of all recipes.

    python custom_resnet.py                     # teacher, student and student_10 of the default preset
    python custom_resnet.py --preset demo       # minutes on a CPU, nothing to download

Each model goes to checkpoints/RUN/seedS/MODEL.pt; a finished one is not trained again.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    import os
    import signal
    import sys

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without a traceback
    sys.path.insert(0, os.path.dirname(__file__))  # which python -P leaves out

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine import distributed
from engine.checkpoints import LOGITS, Checkpoint
from engine.console import duration, log, stop_requests
from engine.datasets import Batch, Dataset
from engine.device import environment, forward_pass, place
from engine.distributed import OrderlyStop, all_reduce_max, main_process_first, world_size
from engine.errors import UserError
from engine.estimate import UNKNOWN, Estimate
from engine.fingerprints import load_or_copy, training_settings
from engine.given_logits import read_logits
from engine.images import IMAGENET, Normalisation, normalisation_of
from engine.inference import NotFinite, Stopped, predict
from engine.models import build_model, initial_model, network_of, shorten
from engine.named import is_named
from engine.reach import code_digest
from engine.recipes import Recipe, is_of_timm
from engine.settings import Config, Model
from engine.training import Training, best_epoch, diverged, explain_share
from utils import load_config, open_run, run_script

# logits (B, C) float32, batch -> the terms of the loss by name, each a mean over the B images; the loss is their sum
LossFunction = Callable[[torch.Tensor, Batch], dict[str, torch.Tensor]]

build_resnet = build_model  # the original's name; it now builds any architecture


def hard_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The cross-entropy of logits (B, C) and labels (B,), each image's times the weight of its class (C,), averaged."""
    if class_weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")  # (B,)
    return (class_weights[labels] * losses).mean()


def weights_of_classes(recipe: Recipe, dataset: Dataset) -> torch.Tensor | None:
    """(C,), inversely proportional to the number of training images of each class; 1 on average over these images."""
    if recipe.class_weights == "none":
        return None
    labels = dataset.train.labels[dataset.subset(recipe.train_size, recipe.train_subset)]
    return len(labels) / (len(dataset.classes) * labels.bincount(minlength=len(dataset.classes)))


def cross_entropy(
    logits: torch.Tensor, batch: Batch, label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The loss of a recipe without a teacher."""
    return {"hard": hard_loss(logits, batch.labels, label_smoothing, class_weights)}


def fit(training: Training, dataset: Dataset, loss_fn: LossFunction) -> list[dict[str, float]]:
    """Train the network in place and return its history, a record for each epoch. Resumes where `training` stands.

    Raises Diverged if the loss becomes NaN or infinite.
    """
    config, recipe, optimizer = training.config, training.recipe, training.optimizer
    while len(training.history) < recipe.epochs:
        for batch in training.batches(dataset):
            with forward_pass(config.device, config.precision):
                logits = training.forward(batch.images).float()  # (B, C)
            terms = loss_fn(logits, batch)
            loss = training.measure_and_sum(logits, batch.labels, terms)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(training.network.parameters(), recipe.clip_norm)
            optimizer.step()
            training.scheduler.step()
            stop = training.finish_step()
            if stop:
                return training.history
        evaluated = evaluate_and_record(training, dataset)
        stop = training.finish_epoch(evaluated)
        if stop:
            return training.history
    return training.history


def evaluate_and_record(training: Training, dataset: Dataset) -> bool:
    """Evaluate the model on the held-out images and add a record to the history, which selects weights to keep.

    Returns False if a signal interrupts the evaluation, which is repeated when training resumes.
    """
    training.check()
    (loss, accuracy), seconds = training.averages, time.perf_counter() - training.started
    model, epochs, config = training.model, training.recipe.epochs, training.config
    if training.recipe.keep == "best":
        config = replace(config, precision="fp32")  # of logits in bfloat16 some are equal
    title = f"{model}  epoch {len(training.history) + 1:>2}/{epochs}"
    try:
        held_out, held_out_accuracy = evaluate_held_out(training.network, config, dataset, title, training.stop)
    except Stopped:
        return False
    except NotFinite:
        diverged(f"logits of the {dataset.held_out[0]} images", title)
    record = {"epoch": len(training.history) + 1, "loss": loss, "train_accuracy": accuracy}
    record |= {f"{held_out}_accuracy": held_out_accuracy, "seconds": seconds}
    if (share := training.soft_share) is not None:
        record["soft_share"] = share
        if not training.history and (explanation := explain_share(training.recipe, share)):
            log.info(f"{model}  {explanation}")
    training.add_record(record)
    rate = training.steps * model.config.batch_size / seconds
    log.info(
        f"{title}  loss {loss:.4f}  training {accuracy:7.2%}  {held_out} {held_out_accuracy:7.2%}  "
        f"{rate:,.0f} images/s  {duration(seconds)}"
    )
    training.step = 0
    return True


def evaluate_held_out(
    network: nn.Module, config: Config, dataset: Dataset, title: str, stop: Callable[[], int] = lambda: 0
) -> tuple[str, float]:
    """Which images are held out, "validation" or "test", and the accuracy on them.

    Raises NotFinite if logits are NaN or infinite, and Stopped if `stop` returns a signal.
    """
    held_out, split = dataset.held_out
    title = f"{title} {held_out}"
    many = len(split.labels) >= 1000
    logits = predict(network, split.images, config.image_size, config.precision, title=title, stop=stop, fold=many)
    return held_out, (logits.argmax(1) == split.labels).sum().item() / len(split.labels)


def train_model(
    model: Model,
    dataset: Dataset,
    make_loss: Callable[[], LossFunction] | None = None,
    estimate: Estimate = UNKNOWN,
) -> None:
    """Train a model, or resume it; a finished checkpoint is kept.

    `make_loss` is called only if there is something to train; without it the loss is the cross-entropy. Raises
    UserError if the checkpoint is damaged or was trained with different settings, unless config.overwrite is on, and
    SystemExit after a signal.
    """
    recipe, config, checkpoint = model.recipe, model.config, load_or_copy(model, dataset)
    if checkpoint and checkpoint.finished:
        log.info(f"{model}  is finished: {model.path}{differences(checkpoint, config)}")
        return
    settings = training_settings(model, dataset)

    def save(
        weights: dict[str, torch.Tensor],
        history: list[dict[str, float]],
        progress: dict[str, Any] | None,
        arch: str,
        normalisation: Normalisation,
    ) -> None:
        Checkpoint(
            name=model.name,
            seed=model.seed,
            arch=arch,
            stem=recipe.stem,
            classes=list(dataset.classes),
            normalisation=normalisation.as_recorded(),
            settings=settings,
            config=asdict(config),
            environment=environment(config),
            history=history,
            weights=weights,
            progress=progress,
        ).save(model.path)

    if recipe.logits_file:
        logits = read_logits(recipe, dataset)
        report_accuracy_of_given_logits(logits, model, dataset)
        save({"logits": logits}, [], None, LOGITS, IMAGENET)
        return
    network = start_network(model, dataset, checkpoint)

    def write(state: dict[str, Any]) -> None:
        history, last = state.pop("history"), state.pop("model")
        finished = len(history) == recipe.epochs
        chosen = state["best"] if finished and state.get("best") else last
        weights = {name: tensor.cpu().contiguous() for name, tensor in chosen.items()}
        save(weights, history, None if finished else state, recipe.arch, normalisation_of(network))

    if recipe.epochs == 0:
        report_accuracy_of_given_weights(network, model, dataset)
        write({"model": network.state_dict(), "history": []})
        return
    if make_loss:
        loss_fn = make_loss()
    else:
        weights = weights_of_classes(recipe, dataset)
        loss_fn = partial(cross_entropy, label_smoothing=recipe.label_smoothing, class_weights=weights)
    with stop_requests() as stop:
        images = len(dataset.subset(recipe.train_size, recipe.train_subset))
        state = checkpoint.training_state if checkpoint else None
        history = fit(Training(network, model, images, state, write, stop, estimate), dataset, loss_fn)
        (stopped,) = all_reduce_max(stop())
    finished = len(history) == recipe.epochs
    kept = f", with the weights of epoch {best_epoch(history)}" if finished and recipe.keep == "best" else ""
    log.info(f"{model}  is {'finished' if finished else 'saved; the same command resumes it'}: {model.path}{kept}")
    if stopped:
        raise OrderlyStop(128 + stopped)


def report_accuracy_of_given_logits(logits: torch.Tensor, model: Model, dataset: Dataset) -> None:
    accuracies = []
    for name, split in (("training", dataset.train), ("test", dataset.test)):
        if (found := logits[split.ids]).isfinite().all():
            accuracy = (found.argmax(1) == split.labels.cpu()).sum().item() / len(found)
            accuracies.append(f"{accuracy:.2%} on the {name} images")
    log.info(f"{model}  is the logits in {model.recipe.logits_file}, with an accuracy of {' and '.join(accuracies)}")


def report_accuracy_of_given_weights(network: nn.Module, model: Model, dataset: Dataset) -> None:
    """Log the accuracy of weights that are used as they are, with a warning if it is low."""
    held_out, accuracy = evaluate_held_out(network, model.config, dataset, str(model))
    log.info(f"{model}  is used as it is; accuracy on the {held_out} images {accuracy:.2%}")
    if model.recipe.weights_file and accuracy < 0.5:
        log.info(
            f"warning: {model} classifies only {accuracy:.0%} correctly. The usual reasons are a different "
            f"normalisation (here {normalisation_of(network)}; see the settings mean and std), a different class order "
            f"(here {shorten(dataset.classes)}) or a different image size (here {model.config.image_size} px)"
        )


def differences(checkpoint: Checkpoint, config: Config) -> str:
    """What is said of a finished model if its code or its precision is not that of this run."""
    if not checkpoint.history:  # its weights are used as they are
        return ""
    found = []
    if checkpoint.environment.get("code") != code_digest():
        found.append("it was trained by another version of the code; --overwrite trains it again")
    if checkpoint.precision != config.precision:
        found.append(f"it was trained in {checkpoint.precision}, and this run uses {config.precision}")
    return "".join(f"; {difference}" for difference in found)


def start_network(model: Model, dataset: Dataset, checkpoint: Checkpoint | None) -> nn.Module:
    """The network with its initial weights, on the device; those of `checkpoint` are loaded later. Logs a line."""
    recipe, config = model.recipe, model.config

    def build() -> nn.Module:
        torch.manual_seed(model.seed)  # every recipe of this architecture starts from the same weights
        if checkpoint:
            return network_of(checkpoint)
        return initial_model(recipe, dataset.classes, lambda text: log.info(f"{model}  {text}"))

    network = main_process_first(build)
    if config.sync_batchnorm and world_size() > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network, distributed.gpu_group)
    if checkpoint:
        before, now = checkpoint.environment, environment(config)
        changed = [key for key in now if before.get(key, now[key]) != now[key]]
        changes = "".join(f"; {key} was {before[key]}, is now {now[key]}" for key in changed)
        step = (checkpoint.progress or {}).get("step", 0)
        log.info(f"{model}  resumes after epoch {len(checkpoint.history)}, step {step}{changes}")
    else:
        parameters = sum(parameter.numel() for parameter in network.parameters())
        line = f"{model}  {recipe.arch}, {parameters / 1e6:.3g} million parameters, from {initial_weights(recipe)}"
        if recipe.epochs:
            epochs = f"{recipe.epochs} epochs" if recipe.epochs > 1 else "1 epoch"
            line += f", {epochs} of {len(dataset.subset(recipe.train_size, recipe.train_subset)):,} images"
        if recipe.teacher:
            line += f", distilled from {recipe.teacher}"
        if recipe.weights_file or normalisation_of(network) != IMAGENET:
            line += f"; images are normalised with {normalisation_of(network)}"
        log.info(line)
    return place(network, config.device)


def initial_weights(recipe: Recipe) -> str:
    if recipe.weights_file:
        return f"the weights in {recipe.weights_file}"
    if is_named(recipe.arch) and not is_of_timm(recipe.arch):
        return "its own weights"
    return "ImageNet weights" if recipe.imagenet_weights else "random weights"


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
        alone = [model for model in config.models() if model.teacher is None]
        with open_run(alone) as (models, dataset, estimates):
            for model in models:
                train_model(model, dataset, estimate=estimates.get(model, UNKNOWN))


if __name__ == "__main__":
    main()
