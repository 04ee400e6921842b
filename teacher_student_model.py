"""Train the whole experiment: the teachers, the students on their own, and the students that are taught.

    python teacher_student_model.py                             # the README's table: wants a GPU and CIFAR-10
    python teacher_student_model.py --preset demo               # under three minutes on a CPU, nothing to download
    python teacher_student_model.py --student_kd.temperature 4 --run warmer

Each model goes to checkpoints/RUN/seedS/MODEL.pt. A finished one is not trained again, one that was interrupted goes on
where it stopped. Then: python evaluate.py with the same flags.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from config import Config, Recipe, UserError, parse
from custom_resnet import LossFunction, fold_batchnorm, load_model, predict, start, train
from utils import (
    Batch,
    Dataset,
    as_script,
    autocast,
    checkpoint_path,
    from_first,
    load_finished,
    load_training,
    read_logits,
    refuse_other_settings,
    save_checkpoint,
    say,
    tensors_digest,
    training_settings,
)


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    temperature: float,
    scale_soft_loss: bool = True,
) -> torch.Tensor:
    """The mean over the batch of alpha * CE(z, y) + (1 - alpha) * T^2 * KL(softmax(v / T) || softmax(z / T)).

    Student logits z and teacher logits v are (B, C), labels y (B,). alpha weighs the hard labels. The gradients of the
    soft loss shrink by 1/T^2, which the factor T^2 makes up for (Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section
    2); scale_soft_loss=False leaves it out. No gradient reaches the teacher.
    """
    return sum(distillation_terms(student_logits, teacher_logits, labels, alpha, temperature, scale_soft_loss))


def distillation_terms(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    temperature: float,
    scale_soft_loss: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hard and the soft term of the distillation loss, with their weights: the loss is their sum."""
    hard_loss = F.cross_entropy(student_logits, labels)
    soft_loss = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits.detach() / temperature, dim=1),
        reduction="batchmean",  # "mean" would divide by C as well
        log_target=True,
    )
    if scale_soft_loss:
        soft_loss = soft_loss * temperature**2
    return alpha * hard_loss, (1 - alpha) * soft_loss


class Teacher(NamedTuple):
    name: str
    model: nn.Module  # frozen, in evaluation mode
    digest: str  # of its weights


def load_teacher(name: str, seed: int, config: Config, dataset: Dataset) -> Teacher:
    """The finished teacher of this seed. Raises UserError if it is not trained yet, or with other settings."""
    path = checkpoint_path(config, name, seed)
    state = from_first(lambda: load_finished(path))
    if not state:
        raise UserError(f"{path}: the teacher {name!r} is not trained yet; first: --only {name}")
    refuse_other_settings(path, state, training_settings(name, seed, config, dataset, None))
    return Teacher(name, load_model(state, config.device).requires_grad_(False), tensors_digest(state["model"]))


def teacher_logits(
    teacher: Teacher, config: Config, dataset: Dataset, subset: torch.Tensor, path: Path | None = None
) -> torch.Tensor:
    """What a frozen teacher says of each view of the training images, once for all epochs: (2, N, C) float32.

    [0, i] are the logits of training image i, [1, i] those of its mirror image; views that no batch shows are NaN.
    They are kept in the file `path`, and read from there if they are this teacher's, of these images, in this transform
    and precision.
    """
    made_with = {
        "teacher": teacher.digest,
        "images": dataset.digest,
        "validation_size": config.validation_size,
        "image_size": config.image_size,
        "precision": config.precision,
    }
    shape = (2, len(dataset.train.labels), len(dataset.classes))
    logits = from_first(lambda: read_logits(path, made_with, shape) if path else torch.full(shape, torch.nan))
    computed = 0
    for view, shown in enumerate((config.horizontal_flip < 1, config.horizontal_flip > 0)):
        missing = subset[logits[view, subset].isnan().any(1)]
        for index in missing.split(10_000) if shown else ():
            images = dataset.train.images[index.to(dataset.train.images.device)]
            images = images.flip(3) if view else images
            title = f"logits of {teacher.name}"
            of_view = predict(teacher.model, images, config.image_size, config.precision, title=title)
            logits[view, index] = of_view.cpu()
            computed += len(index)
            if path:
                from_first(lambda: save_checkpoint(path, {"made_with": made_with, "logits": logits}))
    say(
        f"logits of {teacher.name}  "
        + (f"{computed:,} computed" if computed else "read")
        + (f": {path}" if path else "")
    )
    return logits.to(config.device)


Lookup = Callable[[Batch], torch.Tensor]  # batch -> the teacher's logits (B, C)


def stored(logits: torch.Tensor) -> Lookup:
    """Look the teacher's logits (2, N, C) up by view and image."""
    return lambda batch: logits[batch.flipped.long(), batch.index]


def online(teacher: nn.Module, config: Config) -> Lookup:
    """Ask the teacher about the student's very batch, for augmentations that never show the same view twice."""
    folded = fold_batchnorm(teacher)

    def ask(batch: Batch) -> torch.Tensor:
        with torch.inference_mode(), autocast(config.device, config.precision):
            return folded(batch.images).float()

    return ask


def taught_by(lookup: Lookup, recipe: Recipe) -> LossFunction:
    """The distillation loss of a recipe, against the logits that `lookup` finds for a batch."""

    def loss_fn(student_logits: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        hard, soft = distillation_terms(
            student_logits, lookup(batch), batch.labels, recipe.alpha, recipe.temperature, recipe.scale_soft_loss
        )
        return {"hard loss": hard, "soft loss": soft}

    return loss_fn


@as_script()
def main(argv: list[str] | None = None) -> None:
    config = from_first(lambda: parse(argv))
    names = config.selected()
    with start(config, names) as (config, dataset):
        for seed in config.seeds:
            for name in names:
                recipe = config.recipes[name]
                if recipe.teacher is None:
                    train(name, seed, config, dataset)
                else:
                    train_taught(name, seed, config, dataset)
    say("All trained. The report: python evaluate.py, with the same flags")


def train_taught(name: str, seed: int, config: Config, dataset: Dataset) -> None:
    """Train a recipe that has a teacher, as `train` does; the teacher is only asked if there is something to train."""
    recipe = config.recipes[name]
    path = checkpoint_path(config, recipe.teacher, seed)

    def make_loss() -> LossFunction:
        teacher = load_teacher(recipe.teacher, seed, config, dataset)
        if config.crop_padding:
            return taught_by(online(teacher.model, config), recipe)
        subset = dataset.subset(recipe.train_size)
        logits = teacher_logits(teacher, config, dataset, subset, path.with_suffix(".logits"))
        return taught_by(stored(logits), recipe)

    def digest() -> str | None:
        state = load_training(path)
        return tensors_digest(state["model"]) if state else None

    train(name, seed, config, dataset, make_loss, from_first(digest))


if __name__ == "__main__":
    main()
