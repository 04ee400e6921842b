"""Train the whole experiment: the teachers, the students on their own, and the students that are taught.

    python teacher_student_model.py                             # the README's table: wants a GPU and CIFAR-10
    python teacher_student_model.py --preset demo               # under three minutes on a CPU, nothing to download
    python teacher_student_model.py --student_kd.temperature 4 --run warmer

Each model goes to checkpoints/RUN/seedS/MODEL.pt. A finished one is not trained again, one that was interrupted goes on
after its last epoch. Then: python evaluate.py with the same flags.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from config import Config, Recipe, UserError, one_line_errors, parse
from custom_resnet import LossFunction, load_model, predict, start, train
from utils import Batch, Dataset, checkpoint_path, load_checkpoint, say, tensors_digest


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
    hard_loss = F.cross_entropy(student_logits, labels)
    soft_loss = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits.detach() / temperature, dim=1),
        reduction="batchmean",  # "mean" would divide by C as well
        log_target=True,
    )
    if scale_soft_loss:
        soft_loss = soft_loss * temperature**2
    return alpha * hard_loss + (1 - alpha) * soft_loss


class Teacher(NamedTuple):
    name: str
    model: nn.Module  # frozen, in evaluation mode
    digest: str  # of its weights


def load_teacher(name: str, seed: int, config: Config) -> Teacher:
    """The finished teacher of this seed. Raises UserError if it is not trained yet."""
    path = checkpoint_path(config, name, seed)
    state = load_checkpoint(path) if path.exists() else {"finished": False}
    if not state["finished"]:
        raise UserError(
            f"{path}: the teacher {name!r} is not trained yet; train it too, without --only or with it named"
        )
    return Teacher(name, load_model(state, config.device).requires_grad_(False), tensors_digest(state["model"]))


def teacher_logits(teacher: nn.Module, dataset: Dataset, config: Config, subset: torch.Tensor) -> torch.Tensor:
    """What a frozen teacher says of each view of the training images, once for all epochs: (2, N, C) float32.

    [0, i] are the logits of training image i, [1, i] those of its mirror image. Views that no batch shows are NaN.
    """
    logits = torch.full((2, len(dataset.train.labels), len(dataset.classes)), torch.nan, device=config.device)
    subset = subset.to(config.device)
    for view, shown in enumerate((config.horizontal_flip < 1, config.horizontal_flip > 0)):
        if shown:
            images = dataset.train.images[subset]
            images = images.flip(3) if view else images
            logits[view, subset] = predict(
                teacher, images, config.image_size, config.precision, title="teacher's logits"
            )
    return logits


def taught_by(logits: torch.Tensor, recipe: Recipe) -> LossFunction:
    """The distillation loss against the teacher's logits (2, N, C), looked up by view and image."""

    def loss_fn(student_logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        of_batch = logits[batch.flipped.long(), batch.index]  # (B, C)
        return distillation_loss(
            student_logits, of_batch, batch.labels, recipe.alpha, recipe.temperature, recipe.scale_soft_loss
        )

    return loss_fn


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    names = config.selected()
    config, dataset = start(config, names)
    for seed in config.seeds:
        for name in names:
            recipe = config.recipes[name]
            if recipe.teacher is None:
                train(name, seed, config, dataset)
                continue
            teacher = load_teacher(recipe.teacher, seed, config)

            def make_loss(recipe=recipe, teacher=teacher) -> LossFunction:
                logits = teacher_logits(teacher.model, dataset, config, dataset.subset(recipe.train_size))
                return taught_by(logits, recipe)

            train(name, seed, config, dataset, make_loss, teacher.digest)
    say("All trained. The report: python evaluate.py, with the same flags")


if __name__ == "__main__":
    main()
