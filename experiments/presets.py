"""The experiments behind the README's answer to "did I do something wrong?"; each is a preset.

    python teacher_student_model.py --preset ablation --jobs 2
    python evaluate.py --run ablation

A ResNet50 is trained on 48,000 images and its students on 5,000 of them, so that the teacher is well ahead of a student
trained alone; from random weights, at 64 px, to be affordable on a CPU. A model that is the same in two presets is
trained once. What each row was expected to show is in docs/predictions.md.
"""

from dataclasses import replace
from functools import partial

from engine.images import IMAGENET_MEAN, IMAGENET_STD
from engine.recipes import Recipe
from engine.settings import Config

scratch = partial(Recipe, pretrained=False, schedule="onecycle", weight_decay=5e-4, nesterov=True)
TEACHER = scratch(arch="resnet50", epochs=4, lr=0.02)
STUDENT = scratch(arch="resnet18", epochs=15, lr=0.05, train_size=5000)
KD = replace(STUDENT, teacher="teacher", alpha=0.25, temperature=5.0, baseline="student")
VARIANT = replace(KD, baseline="kd")  # compared with plain KD, from which it differs in one setting
ROWS = {"teacher": TEACHER, "student": STUDENT, "kd": KD}

# What each choice of the original costs at equal budgets, and what temperature and alpha do. Without T^2 the loss is
# 0.25 CE + 0.75 / 25 of the soft loss that has it, so its step is about 1 / 3.6 as large.
ABLATION = {
    **ROWS,
    "student_30_epochs": replace(STUDENT, epochs=30),
    "student_lr_3_6x": replace(STUDENT, lr=3.6 * STUDENT.lr),
    "student_quarter_loss": replace(KD, soft_weight=0.0),  # 0.25 CE and nothing else
    "kd_unscaled": replace(VARIANT, scale_soft_loss=False),
    "kd_unscaled_lr_3_6x": replace(VARIANT, scale_soft_loss=False, lr=3.6 * STUDENT.lr),
    "kd_unscaled_30_epochs": replace(KD, scale_soft_loss=False, epochs=30, baseline="student_30_epochs"),
    "kd_30_epochs": replace(KD, epochs=30, baseline="student_30_epochs"),
    "kd_temperature_1": replace(VARIANT, temperature=1.0),
    "kd_temperature_2": replace(VARIANT, temperature=2.0),
    "kd_temperature_10": replace(VARIANT, temperature=10.0),
    "kd_alpha_0": replace(VARIANT, alpha=0.0),
    "kd_alpha_0_5": replace(VARIANT, alpha=0.5),
    "kd_alpha_0_9": replace(VARIANT, alpha=0.9),
}

# Controls: targets without the knowledge of a better teacher. Labels smoothed by 0.15 have the mean entropy of the
# teacher's probabilities at T = 1 on the training images, 0.71 nats (teacher of seed 0).
CONTROLS = {
    **ROWS,
    "untrained": Recipe(arch="resnet50", epochs=0, weights="random"),
    "label_smoothing": replace(STUDENT, label_smoothing=0.15, baseline="kd"),
    "kd_untrained": replace(VARIANT, teacher="untrained"),
    "kd_shuffled": replace(VARIANT, shuffle_teacher=True),
    "kd_self": replace(VARIANT, teacher="student"),
}

# Students of 1,000, 10,000 and all 48,000 images; `student` and `kd` have 5,000.
LOW_DATA = {
    **ROWS,
    "student_1k": replace(STUDENT, train_size=1_000, epochs=60),
    "student_10k": replace(STUDENT, train_size=10_000, epochs=12),
    "student_48k": replace(STUDENT, train_size=None, epochs=3),
    "kd_1k": replace(KD, train_size=1_000, epochs=60, baseline="student_1k"),
    "kd_10k": replace(KD, train_size=10_000, epochs=12, baseline="student_10k"),
    "kd_48k": replace(KD, train_size=None, epochs=3, baseline="student_48k"),
}

# Teachers of rising quality, by their number of training images and of epochs.
TEACHERS = {
    **ROWS,
    "teacher_5k_10_epochs": replace(TEACHER, train_size=5_000, epochs=10),
    "teacher_5k_30_epochs": replace(TEACHER, train_size=5_000, epochs=30),
    "teacher_48k_1_epoch": replace(TEACHER, epochs=1),
    "teacher_48k_8_epochs": replace(TEACHER, epochs=8),
    "kd_from_5k_10_epochs": replace(KD, teacher="teacher_5k_10_epochs", teacher_seed=0),
    "kd_from_5k_30_epochs": replace(KD, teacher="teacher_5k_30_epochs", teacher_seed=0),
    "kd_from_48k_1_epoch": replace(KD, teacher="teacher_48k_1_epoch", teacher_seed=0),
    "kd_from_48k_8_epochs": replace(KD, teacher="teacher_48k_8_epochs", teacher_seed=0),
}

# The student's images are cropped at random, and the teacher of ablation, seed 3, is asked about each crop; kd of
# ablation has stored logits of two views. With --checkpoints_path elsewhere, name its file with --teacher.weights.
VIEWS = {
    "teacher": Recipe(arch="resnet50", weights=f"{Config.checkpoints_path}/ablation/seed3/teacher.pt", epochs=0),
    "student": STUDENT,
    "kd": replace(KD, teacher_seed=0),
}

# Soft losses at the weight and temperature of plain KD.
METHODS = ROWS | {loss: replace(VARIANT, soft_loss=loss) for loss in ("dkd", "dist", "ttm", "standardised_kd")}

# An experiment like the author's: all models start from ImageNet weights, see the same images, and are trained for five
# epochs at a constant rate. 3.57 = 1 / (0.25 + 0.75 / 25) makes up for the smaller step without T^2.
ALONE = Recipe(
    arch="timm:tf_efficientnet_lite0",
    weights="data/efficientnet_lite0.pth",
    mean=IMAGENET_MEAN,  # not timm's, because experiments/imagenet_weights.py folds it into the first layer
    std=IMAGENET_STD,
    lr=0.003,
    epochs=5,
)
TAUGHT = replace(ALONE, teacher="teacher", alpha=0.25, temperature=5.0, baseline="student")
UNSCALED = replace(TAUGHT, scale_soft_loss=False, baseline="kd")
FINETUNING = {
    "teacher": replace(ALONE, arch="timm:tf_efficientnet_lite2", weights="data/efficientnet_lite2.pth"),
    "student": ALONE,
    "kd": TAUGHT,
    "kd_unscaled": UNSCALED,
    "kd_unscaled_lr_3_6x": replace(UNSCALED, lr=0.0107),
    "student_10_epochs": replace(ALONE, epochs=10),
    "kd_unscaled_10_epochs": replace(UNSCALED, epochs=10, baseline="student_10_epochs"),
    "student_lr_0_001": replace(ALONE, lr=0.001),
    "kd_lr_0_001": replace(TAUGHT, lr=0.001, baseline="student_lr_0_001"),
    "kd_unscaled_lr_0_001": replace(UNSCALED, lr=0.001, baseline="kd_lr_0_001"),
}

# Each arm of `ablation` at five learning rates. The best rate of each is confirmed with other seeds.
RATES = {**ROWS, "kd_unscaled": replace(KD, scale_soft_loss=False)}
FIVE_RATES = tuple(f"{row}.lr=0.025,0.05,0.1,0.2,0.4" for row in ("student", "kd", "kd_unscaled"))

# The three arms on three other subsets of 5,000 images; `ablation` has subset 0.
SUBSETS = {
    "teacher": TEACHER,
    "student_1": replace(STUDENT, train_subset=1),
    "student_2": replace(STUDENT, train_subset=2),
    "student_3": replace(STUDENT, train_subset=3),
    "kd_1": replace(KD, train_subset=1, baseline="student_1"),
    "kd_2": replace(KD, train_subset=2, baseline="student_2"),
    "kd_3": replace(KD, train_subset=3, baseline="student_3"),
    "kd_unscaled_1": replace(KD, train_subset=1, scale_soft_loss=False, baseline="kd_1"),
    "kd_unscaled_2": replace(KD, train_subset=2, scale_soft_loss=False, baseline="kd_2"),
    "kd_unscaled_3": replace(KD, train_subset=3, scale_soft_loss=False, baseline="kd_3"),
}

# The original's pair from random weights: all images for teacher and students, 32 px, and a first layer for that size.
all_images = partial(scratch, stem="cifar", epochs=15, lr=0.05)
SAME_IMAGES = {
    "teacher": all_images(arch="resnet50"),
    "student": all_images(arch="resnet18"),
    "kd": all_images(arch="resnet18", teacher="teacher", teacher_seed=0, baseline="student"),
    "kd_unscaled": all_images(arch="resnet18", teacher="teacher", teacher_seed=0, scale_soft_loss=False, baseline="kd"),
}

study = partial(Config, image_size=64, validation_size=2000)
STUDY = {
    "ablation": study(ABLATION, run="ablation", seeds=(0, 1, 2, 3, 4)),
    "controls": study(CONTROLS, run="controls", seeds=(0, 1, 2, 3, 4)),
    "low_data": study(LOW_DATA, run="low_data", seeds=(2, 3, 4)),
    "teachers": study(TEACHERS, run="teachers", seeds=(2, 3, 4)),
    "views": study(VIEWS, run="views", augment="crop", seeds=(2, 3, 4)),
    "methods": study(METHODS, run="methods", seeds=(2, 3, 4)),
}
# Not in docs/answer.md: docs/finetuning.md and docs/tuned.md have their rules and predictions.
FURTHER = {
    "finetuning": study(FINETUNING, run="finetuning", precision="fp32", seeds=(1, 2, 3, 4, 5, 6)),
    "rates": study(RATES, run="rates", precision="bf16", sweep=FIVE_RATES, seeds=(5, 6, 7)),
    "subsets": study(SUBSETS, run="subsets", precision="bf16", seeds=(5, 6, 7)),
    "same_images": study(SAME_IMAGES, run="same_images", image_size=32, precision="fp32", seeds=(0, 1, 2)),
}
