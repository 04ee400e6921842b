"""Train the whole experiment: teachers, students without a teacher, and distilled students.

    python teacher_student_model.py                             # downloads CIFAR-10; a GPU is recommended
    python teacher_student_model.py --preset demo               # minutes on a CPU, nothing to download
    python teacher_student_model.py --student_kd.temperature 4 --run warmer

Each model goes to checkpoints/RUN/seedS/MODEL.pt. A finished one is not trained again, an interrupted one is resumed.
Then: python evaluate.py with the same flags.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    import os
    import signal
    import sys

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without a traceback
    sys.path.insert(0, os.path.dirname(__file__))  # which python -P leaves out

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from custom_resnet import LossFunction, hard_loss, train_model, weights_of_classes
from diagnose.loss import NOT_RECOGNISED, CannotExamine, examine
from engine import named
from engine.checkpoints import load_logits, save_checkpoint
from engine.console import log
from engine.datasets import Batch, Dataset, load_dataset
from engine.device import SHUFFLED_TEACHER, configure_backends, forward_pass, seed_sequence
from engine.distributed import all_reduce_max, local_rank, world_size
from engine.errors import Diverged, UserError
from engine.estimate import UNKNOWN, Estimate
from engine.files import lock
from engine.fingerprints import load_teacher_state, logits_fingerprint
from engine.images import normalisation_of
from engine.images import prepare as prepare_images
from engine.inference import fold_batchnorm, predict
from engine.jobs import Worker, run_in_workers, start_workers
from engine.models import layers, load_model
from engine.named import is_named
from engine.recipes import Recipe
from engine.settings import Config, Model
from engine.soft_losses import find
from engine.sources import is_of_the_user
from utils import load_training_data, open_run, parse_config, prepare, run_script, set_up_device


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    temperature: float,
    scale_soft_loss: bool = True,
) -> torch.Tensor:
    """alpha * CE(z, y) + (1 - alpha) * T^2 * KL(softmax(v / T) || softmax(z / T)), averaged over the batch.

    z are the student's logits and v the teacher's, both (B, C); y are the labels (B,). alpha is the weight of the hard
    loss. The gradients of the soft loss scale as 1/T^2, which the factor T^2 compensates for (Hinton, Vinyals, Dean
    2015, arXiv 1503.02531, section 2); scale_soft_loss=False omits it. No gradient flows to the teacher.

    It is the sum of `distillation_terms`, which training uses.
    """
    recipe = Recipe(teacher="teacher", alpha=alpha, temperature=temperature, scale_soft_loss=scale_soft_loss)
    terms = distillation_terms(student_logits, teacher_logits, labels, recipe)
    return terms["hard"] + terms["soft"]


def distillation_terms(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    class_weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The terms of the loss by name, each with its weight and averaged over the batch.

    With the soft loss `kd` they are alpha * CE(z, y) and (1 - alpha) * T^2 * KL(softmax(v / T) || softmax(z / T)).
    """
    z, v = student_logits, teacher_logits.detach()  # (B, C)
    hard = hard_loss(z, labels, recipe.label_smoothing, class_weights)
    soft_loss = find(recipe.soft_loss)  # includes the factor T^2 where it has one
    soft = soft_loss(z, v, labels, recipe.temperature, **recipe.soft_loss_options)
    if not recipe.scale_soft_loss:
        soft = soft / recipe.temperature**2
    return {"hard": recipe.alpha * hard, "soft": recipe.weight_of_soft_loss * soft}


def diagnose_soft_loss(recipe: Recipe, classes: int) -> str | None:
    """What a soft loss of the user's computes at the recipe's temperature; None if it is not recognised, or is ours."""
    if not is_named(recipe.soft_loss):
        return None
    soft_loss, options = find(recipe.soft_loss), recipe.soft_loss_options
    try:
        found = examine(lambda z, v, y: soft_loss(z, v, y, recipe.temperature, **options), num_classes=classes)
    except CannotExamine:  # of float64, or on the CPU
        return None
    return None if found.name == NOT_RECOGNISED else f"{recipe.soft_loss} computes {found.findings[0]}"


class Teacher(NamedTuple):
    title: str
    model: nn.Module  # frozen, in evaluation mode
    digest: str  # of its weights and its normalisation
    given: torch.Tensor | None = None  # if it is only logits, these (R, C), by Split.ids, and no model


def load_teacher(model: Model, dataset: Dataset) -> Teacher:
    """A finished teacher. Raises UserError if it is not trained yet, or with different settings."""
    checkpoint = load_teacher_state(model, dataset)
    if checkpoint.given_logits is not None:
        return Teacher(str(model), nn.Identity(), checkpoint.digest, checkpoint.given_logits)
    network = load_model(checkpoint, model.config.device).requires_grad_(False)
    return Teacher(str(model), network, checkpoint.digest)


def teacher_logits(
    teacher: Teacher, config: Config, dataset: Dataset, subset: torch.Tensor, path: Path | None = None
) -> torch.Tensor:
    """A frozen teacher's logits never change, so they are computed once for all epochs, in float32: (2, N, C).

    [0, i] are the logits of training image i, [1, i] those of its mirror image; those that no batch of `subset` needs
    are NaN. They are stored in the file `path`, and read from it if the fingerprint of their inputs matches. Raises
    UserError if one of them is NaN or infinite.
    """
    if teacher.given is not None:
        return teacher.given[dataset.train.ids].expand(2, -1, -1).to(config.device)
    fingerprint = logits_fingerprint(teacher.digest, config, dataset)
    shape = (2, len(dataset.train.labels), len(dataset.classes))
    logits = load_logits(path, fingerprint, shape) if path else torch.full(shape, torch.nan)

    def save() -> None:
        if path:
            save_checkpoint(path, {"fingerprint": fingerprint, "logits": logits})

    computed, saved = 0, time.monotonic()
    for view, needed in enumerate((config.horizontal_flip < 1, config.horizontal_flip > 0)):
        missing = subset[~logits[view, subset].isfinite().all(1)]
        for index in missing.split(10_000) if needed else ():
            images = dataset.train.images[index.to(dataset.train.images.device)]
            images = images.flip(3) if view else images
            title = f"teacher {teacher.title} training images"
            logits[view, index] = predict(teacher.model, images, config.image_size, title=title).cpu()
            computed += len(index)
            if all_reduce_max(time.monotonic() - saved > 60 * config.checkpoint_minutes)[0]:
                save()
                saved = time.monotonic()
    if computed:
        save()
    log.info(f"logits of {teacher.title}  " + (f"{computed:,} computed" if computed else f"read from {path}"))
    return logits.to(config.device)


Lookup = Callable[[Batch], torch.Tensor]  # batch -> the teacher's logits (B, C)


def stored_logits(logits: torch.Tensor) -> Lookup:
    """Look up the teacher's stored logits (2, N, C) by view and image.

    It raises ValueError for images that are augmented in other ways, of which no logits are stored.
    """

    def look_up(batch: Batch) -> torch.Tensor:
        if batch.flipped is None:
            raise ValueError("stored logits are those of an image and its mirror image; use OnlineTeacher")
        return logits[batch.flipped.long(), batch.indices]

    return look_up


def shuffle_within_classes(logits: torch.Tensor, dataset: Dataset, subset: torch.Tensor, seed: int) -> torch.Tensor:
    """Stored logits (2, N, C), those of `subset` permuted at random among images of the same class.

    A student that gains from these as much as from the true ones gains from smoother labels, not from what the teacher
    sees in each image.
    """
    random = np.random.default_rng(seed_sequence(SHUFFLED_TEACHER, seed))
    index = torch.arange(logits.shape[1])
    labels = dataset.train.labels.cpu()[subset]
    for label in labels.unique():
        members = subset[labels == label]
        index[members] = members[torch.from_numpy(random.permutation(len(members)))]
    return logits[:, index.to(logits.device)]


def in_float32(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """A forward hook: the output of a layer, computed in float32 also under autocast."""
    with torch.autocast(output.device.type, enabled=False):
        return layer.forward(inputs[0].float())


class OnlineTeacher:
    """Runs the teacher on each batch, for augmentations with too many views to store the logits of.

    Its logits (B, C) float32 are computed in the training's precision, except for the last layer: bfloat16 logits have
    ties. The images are normalised as the teacher takes them, which need not be as the student does.
    """

    def __init__(self, teacher: nn.Module, config: Config):
        self.teacher, self.config = teacher, config
        self.folded: nn.Module | None = None
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=config.device)  # batches; reading it synchronises

    def __call__(self, batch: Batch) -> torch.Tensor:
        images = prepare_images(batch.pixels, self.config.image_size, normalisation_of(self.teacher))
        if self.folded is None:
            self.folded = fold_batchnorm(self.teacher, images[:4], self.config.precision)
            for last in layers(self.folded)[-1:]:
                last.register_forward_hook(in_float32)
        with torch.no_grad(), forward_pass(self.config.device, self.config.precision):
            logits = self.folded(images).float()
        self.nonfinite += ~logits.isfinite().all()
        return logits


@dataclass(frozen=True)
class Distillation:
    """The loss of a distilled recipe: student logits (B, C), batch -> the terms "hard" and "soft".

    `teacher` gives the teacher's logits (B, C) for a batch, stored or computed.
    """

    recipe: Recipe
    teacher: Lookup
    class_weights: torch.Tensor | None = None  # (C,), of the hard loss

    def __call__(self, student_logits: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return distillation_terms(student_logits, self.teacher(batch), batch.labels, self.recipe, self.class_weights)


def train_with_teacher(model: Model, dataset: Dataset, estimate: Estimate = UNKNOWN) -> None:
    """Train any model, as `train_model` does; its teacher, if any, is loaded only if there is something to train."""
    recipe, config, of_teacher = model.recipe, model.config, model.teacher
    if of_teacher is None:
        train_model(model, dataset, estimate=estimate)
        return
    online: OnlineTeacher | None = None

    def make_loss() -> LossFunction:
        nonlocal online
        if said := diagnose_soft_loss(recipe, len(dataset.classes)):
            log.info(f"{model}  {said}")
        teacher, weights = load_teacher(of_teacher, dataset), weights_of_classes(recipe, dataset)
        if config.unlimited_views:
            online = OnlineTeacher(teacher.model, config)
            return Distillation(recipe, online, weights)
        subset, path = dataset.subset(recipe.train_size, recipe.train_subset), of_teacher.logits_path
        with lock(path.parent, wait=True):  # two students of one teacher may start at the same time
            logits = teacher_logits(teacher, config, dataset, subset, path)
        if recipe.shuffle_teacher:
            logits = shuffle_within_classes(logits, dataset, subset, model.seed)
        return Distillation(recipe, stored_logits(logits), weights)

    try:
        train_model(model, dataset, make_loss, estimate)
    except Diverged:
        if online and all_reduce_max(int(online.nonfinite))[0]:
            raise UserError(
                f"{model}: cannot learn from its teacher, {model.teacher}, whose logits are NaN or infinite; move the "
                "teacher's checkpoint away and train it again, with a lower lr"
            ) from None
        raise


# A script that has only been imported can be forked; macOS and Windows have no safe fork.
START_METHOD = "fork" if __name__ == "__main__" and sys.platform == "linux" else "spawn"


def train_in_worker(model: Model, estimate: Estimate, threads: int) -> None:
    with run_script():
        torch.set_num_threads(threads)
        if model.config.device == "cuda":
            own = replace(model.config, device=f"cuda:{local_rank() % torch.cuda.device_count()}")
            model = replace(model, config=own)
        configure_backends(model.config)
        train_with_teacher(model, load_dataset(model.config), estimate)


def train_at_the_same_time(config: Config, workers: list[Worker]) -> None:
    config, threads = set_up_device(config), max(1, torch.get_num_threads() // config.jobs)
    with lock(Path(config.checkpoints_path, config.run)):
        models, estimates = prepare(config.models(), load_training_data(config))
        teachers = {model: model.teacher for model in models if model in estimates}
        run_in_workers(workers, teachers, lambda model: (model, estimates[model]._replace(later=0.0), threads))


def train_one_by_one(config: Config) -> None:
    with open_run(set_up_device(config).models()) as (models, dataset, estimates):
        for model in models:
            train_with_teacher(model, dataset, estimates.get(model, UNKNOWN))


def main(argv: list[str] | None = None) -> None:
    with run_script():
        config = parse_config(argv)
        if config.jobs > 1 and world_size() == 1:
            if is_of_the_user(config.dataset):
                named.load(config.dataset)  # as it is now
            with start_workers(train_in_worker, config.jobs, START_METHOD) as workers:
                train_at_the_same_time(config, workers)
        else:
            train_one_by_one(config)
        command = ["python", "evaluate.py", "--run", config.run]
        if config.checkpoints_path != "checkpoints":
            command += ["--checkpoints_path", config.checkpoints_path]
        log.info(f"All selected models are trained. For the report: {shlex.join(command)}")


if __name__ == "__main__":
    main()
