"""The experiments. A table has a row for each model; a row that names a teacher is distilled from it.

Edit a line below, or pass a flag of the same name; both mean the same:

    python teacher_student_model.py --student_kd.temperature 4 --batch_size 64
    python teacher_student_model.py --lr 0.01 --run faster            # every row that can take it
    python teacher_student_model.py --preset demo --seeds 0 1 2
    python teacher_student_model.py --help                            # every setting, with a line on each

Where a setting takes a name, it takes something of yours as well: import it here from a file of yours, such as
my_project.py, or write "my_project:NAME".
"""

from collections.abc import Mapping
from functools import partial

from engine import flags
from engine.settings import Config, Recipe
from experiments.presets import FURTHER, STUDY

# The original's experiment, with the soft loss scaled by T^2. student_10 is not in the original: it is trained for as
# long as the distilled student.
RECIPES = {
    "teacher": Recipe(arch="resnet50", epochs=5),
    "student": Recipe(arch="resnet18", epochs=5),
    "student_10": Recipe(arch="resnet18", epochs=10),
    "student_kd": Recipe(
        arch="resnet18", epochs=10, teacher="teacher", alpha=0.25, temperature=5.0, baseline="student_10"
    ),
}

# The loss as published: without T^2 = 25, the gradients of the soft loss are 1/25 as large.
ORIGINAL = {
    "teacher": Recipe(arch="resnet50", epochs=5),
    "student": Recipe(arch="resnet18", epochs=5),
    "student_10": Recipe(arch="resnet18", epochs=10),
    "student_kd": Recipe(
        arch="resnet18",
        epochs=10,
        teacher="teacher",
        alpha=0.25,
        temperature=5.0,
        scale_soft_loss=False,
        baseline="student_10",
    ),
}

# From random weights, and equally long for both students, so that they differ only in the teacher.
scratch = partial(
    Recipe, epochs=30, pretrained=False, lr=0.02, schedule="onecycle", weight_decay=5e-4, nesterov=True
)  # what all rows share
SCRATCH = {
    "teacher": scratch(arch="resnet50"),
    "student": scratch(arch="resnet18"),
    "student_kd": scratch(arch="resnet18", teacher="teacher"),
}

# Takes minutes on a CPU. One teacher of 1,200 digits; students of five seeds, on 50 of them (docs/demo.md).
few = partial(Recipe, pretrained=False, lr=0.001, schedule="onecycle")
DEMO = {
    "teacher": few(arch="resnet50", epochs=6, optimizer="adamw", weight_decay=0.01),
    "student": few(arch="resnet18", epochs=20, train_size=50, weight_decay=5e-4, nesterov=True),
    "student_kd": few(
        arch="resnet18", epochs=20, train_size=50, weight_decay=5e-4, nesterov=True,
        teacher="teacher", teacher_seed=0, temperature=4.0,
    ),
    "unscaled": few(  # as student_kd, without the factor T^2
        arch="resnet18", epochs=20, train_size=50, weight_decay=5e-4, nesterov=True,
        teacher="teacher", teacher_seed=0, temperature=4.0, scale_soft_loss=False, baseline="student_kd",
    ),
}  # fmt: skip

# A preset is a complete experiment; --preset NAME chooses one, and the first is the default.
PRESETS = {
    "cifar10": Config(RECIPES, run="cifar10"),
    "original": Config(ORIGINAL, run="original"),
    "scratch": Config(SCRATCH, run="scratch", image_size=64),
    "demo": Config(
        DEMO,
        run="demo",
        dataset="digits",
        seeds=(0, 1, 2, 3, 4),
        validation_size=97,
        image_size=24,
        horizontal_flip=0.0,
        batch_size=25,
        precision="fp32",  # not auto, so that machines of one kind reproduce the README's numbers
    ),
}
ALL_PRESETS = {**PRESETS, **STUDY, **FURTHER}  # with those of the study, docs/answer.md


def parse(argv: list[str] | None = None, script_flags: Mapping[str, str] | None = None) -> Config:
    """The chosen preset with the flags in `argv` (sys.argv[1:]) applied; raises UserError naming every mistake.

    `script_flags` describes the calling script's own flags for --help.
    """
    return flags.parse(ALL_PRESETS, argv, script_flags or {})
