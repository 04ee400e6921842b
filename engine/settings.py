"""The fields of Recipe and Config, what each accepts, and their validation."""

import dataclasses
import os
import re
from collections import Counter
from dataclasses import dataclass

from engine.errors import UserError, suggest
from engine.fields import (
    FLAG,
    FRACTION,
    NAME,
    PATH,
    POSITIVE,
    Kind,
    choice,
    integer,
    invalid_fields,
    number,
    optional,
    setting,
    settings_of,
    several,
    text,
)
from engine.names import ARCHS, RESNETS

RECIPE_NAME = text(
    "of letters, digits, '_' and '-', starting with a letter or digit", r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"
)
ARCH = Kind(
    "a classification model of torchvision, or timm:NAME",
    lambda value: value in ARCHS or (isinstance(value, str) and re.fullmatch(r"timm:[\w.-]+", value) is not None),
    names=ARCHS,
)
SEED = integer(0, 2**32 - 1)


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. Raises UserError, naming every field that is wrong."""

    arch: str = setting("resnet18", ARCH, "torchvision model, or timm:NAME if timm is installed")
    stem: str = setting(
        "imagenet", choice("imagenet", "cifar"), "cifar: a ResNet with a 3 x 3 first convolution, without pooling"
    )
    epochs: int = setting(5, integer(0), "passes over the training images; 0: use `weights` as they are")
    optimizer: str = setting("sgd", choice("sgd", "adamw"), "sgd, or adamw with PyTorch's betas")
    lr: float = setting(0.001, POSITIVE, "learning rate, the peak of the schedule")
    momentum: float = setting(0.9, number("a number from 0 to below 1", lambda v: 0 <= v < 1), "SGD momentum")
    weight_decay: float = setting(
        0.0, number("a number, 0 or more", lambda v: v >= 0), "weight decay, on all parameters"
    )
    nesterov: bool = setting(False, FLAG, "Nesterov momentum")
    schedule: str = setting(
        "constant",
        choice("constant", "cosine", "onecycle"),
        "constant; cosine: decays from lr to 0; onecycle: rises to lr over 30% of the steps, then decays to 0",
    )
    label_smoothing: float = setting(0.0, FRACTION, "share of the hard labels that is spread over all classes")
    pretrained: bool = setting(True, FLAG, "start from ImageNet weights")
    weights: str | None = setting(
        None, optional(PATH), "in place of ImageNet weights: a file of weights to start from, or random"
    )
    teacher: str | None = setting(None, optional(NAME), "recipe to distil from")
    alpha: float = setting(0.25, FRACTION, "weight of the hard loss; the soft loss gets 1 - alpha")
    temperature: float = setting(5.0, POSITIVE, "T of the soft loss, softens the probabilities of both models")
    scale_soft_loss: bool = setting(
        True, FLAG, "multiply the soft loss by T^2; otherwise its gradients shrink by 1/T^2"
    )
    teacher_seed: int | None = setting(
        None, optional(SEED), "seed of the teacher, for one teacher of all seeds; none: the student's own"
    )
    baseline: str | None = setting(
        None, optional(NAME), "recipe to compare this one with; none: the one of the same arch without a teacher"
    )
    train_size: int | None = setting(
        None,
        optional(integer(1)),
        "number of training images, a stratified subset that is the same for every seed; none: all",
    )

    def __post_init__(self):
        invalid = invalid_fields(self)
        problems = list(invalid.values())
        if self.nesterov is True and self.momentum == 0:
            problems.append("nesterov = True: needs a momentum above 0")
        if self.epochs == 0 and self.weights is None:
            problems.append("epochs = 0: needs weights, a file or random")
        if self.epochs == 0 and self.teacher is not None:
            problems.append("epochs = 0: has no effect with a teacher; a distilled model must be trained")
        if self.stem == "cifar" and (self.arch not in RESNETS or self.imagenet_weights):
            problems.append(
                "stem = 'cifar': needs a ResNet and pretrained = False (ImageNet weights have another stem)"
            )
        unused = {name: "without a teacher" for name in DISTILLATION_FIELDS if self.teacher is None}
        unused |= {name: "with optimizer = adamw" for name in ("momentum", "nesterov") if self.optimizer == "adamw"}
        for field in dataclasses.fields(Recipe):
            value = getattr(self, field.name)
            if field.name in unused and field.name not in invalid and value != field.default:
                problems.append(f"{field.name} = {value!r}: has no effect {unused[field.name]}")
        if problems:
            raise UserError(*problems)
        if self.weights not in (None, "random"):
            object.__setattr__(self, "weights", os.path.expanduser(self.weights))

    @property
    def imagenet_weights(self) -> bool:
        """Whether training starts from ImageNet weights."""
        return self.pretrained and self.weights is None

    @property
    def weights_file(self) -> str | None:
        """The file of weights that training starts from."""
        return None if self.weights == "random" else self.weights


# These have no effect without a teacher.
DISTILLATION_FIELDS = ("alpha", "temperature", "scale_soft_loss", "teacher_seed")


@dataclass(frozen=True)
class Config:
    """A whole experiment. Raises UserError, naming every field that is wrong."""

    recipes: dict[str, Recipe]
    run: str = setting("run", NAME, "name of the folders under checkpoints_path and imgs_path")
    dataset: str = setting(
        "cifar10",
        text("the name of a data set or a folder", r"[^\0\n]+"),
        "cifar10, cifar100, svhn, digits, or a folder with train/CLASS/* and test/CLASS/* images",
    )
    image_size: int = setting(224, integer(8), "images are resized to this many pixels a side")
    horizontal_flip: float = setting(0.5, FRACTION, "probability that a training image is mirrored")
    crop_padding: int = setting(
        0, integer(0, 1000), "training images are shifted at random by up to this many of their own pixels each way"
    )
    validation_size: int = setting(
        0,
        integer(0),
        "training images to hold out, stratified, for the evaluation after each epoch, in place of the test set",
    )
    batch_size: int = setting(100, integer(2), "images per step; the last incomplete batch of an epoch is dropped")
    seeds: tuple[int, ...] = setting(
        (0,),
        several(SEED, "integers from 0 to 2^32 - 1"),
        "random seeds; every recipe is trained once with each",
    )
    only: tuple[str, ...] = setting((), several(NAME, "names of recipes"), "train or evaluate just these recipes")
    overwrite: bool = setting(False, FLAG, "retrain, in place, models that were trained with other settings")
    checkpoint_minutes: float = setting(10, POSITIVE, "save the state of training this often, and after each epoch")
    device: str = setting(
        "auto",
        text("auto, cpu, cuda, cuda:N or mps", r"auto|cpu|cuda(:\d+)?|mps"),
        "auto: CUDA where available, else Apple's MPS, else the CPU",
    )
    precision: str = setting(
        "auto",
        choice("auto", "bf16", "fp32"),
        "bf16: autocast over float32 weights; auto: the faster one, timed when a run starts",
    )
    compile: str = setting(
        "auto",
        choice("auto", "on", "off"),
        "torch.compile the model; auto: on CUDA, if the training is long enough to repay the minute it takes",
    )
    deterministic: bool = setting(
        False, FLAG, "on CUDA, bit-reproducible and slower, without compile = auto (a CPU always is reproducible)"
    )
    sync_batchnorm: bool = setting(
        False, FLAG, "with several processes, BatchNorm over the whole batch instead of each process's part; CUDA only"
    )
    data_path: str = setting("data", PATH, "where downloaded data sets are kept")
    checkpoints_path: str = setting("checkpoints", PATH, "where models are written: RUN/seedS/MODEL.pt")
    imgs_path: str = setting("imgs", PATH, "where reports are written: RUN/results.md and figures")

    def __post_init__(self):
        invalid = invalid_fields(self)
        # Conflicts between fields are checked with the default in place of a value that is itself wrong.
        values = {field.name: getattr(self, field.name) for field in settings_of(Config)}
        values |= {field.name: field.default for field in settings_of(Config) if field.name in invalid}
        problems = [*invalid.values(), *self._conflicts(values["seeds"], values["only"])]
        problems += self._recipe_conflicts(values["batch_size"])
        if problems:
            raise UserError(*problems)
        for name in ("dataset", "data_path", "checkpoints_path", "imgs_path"):
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))  # "~" in config.py or after "="

    def _conflicts(self, seeds: tuple[int, ...], only: tuple[str, ...]) -> list[str]:
        problems = []
        if not self.recipes:
            problems.append("recipes = {}: must hold one recipe or more")
        if not seeds or len(set(seeds)) < len(seeds):
            problems.append(f"seeds = {seeds}: must be one or more different seeds")
        for name in only:
            if name not in self.recipes:
                problems.append(f"only = {name!r}: no such recipe; {suggest(name, self.recipes)}")
        return problems

    def _recipe_conflicts(self, batch_size: int) -> list[str]:
        problems = []
        same_file = Counter(str(name).casefold() for name in self.recipes)  # on file systems that ignore case
        for name, recipe in self.recipes.items():
            if not RECIPE_NAME.accepts(name):
                problems.append(f"recipe {name!r}: its name must be {RECIPE_NAME.expected}")
            elif same_file[name.casefold()] > 1:
                problems.append(
                    f"recipe {name!r}: its name must differ from the others in more than upper and lower case"
                )
            if recipe.train_size is not None and recipe.train_size < batch_size:
                problems.append(f"{name}.train_size = {recipe.train_size}: must be batch_size = {batch_size} or more")
            for field, other in (("teacher", recipe.teacher), ("baseline", recipe.baseline)):
                if other is not None and other not in self.recipes:
                    problems.append(f"{name}.{field} = {other!r}: no such recipe; {suggest(other, self.recipes)}")
            if recipe.baseline == name:
                problems.append(f"{name}.baseline = {name!r}: a recipe cannot be its own baseline")
            if name in (teachers := self.teachers_of(name)):
                cycle = " <- ".join([name, *teachers[: teachers.index(name) + 1]])
                problems.append(f"{name}.teacher = {recipe.teacher!r}: a recipe cannot be its own teacher, {cycle}")
        return problems

    def teachers_of(self, name: str) -> list[str]:
        """The teacher of a recipe, the teacher's teacher and so on; ends where a cycle closes."""
        chain = []
        while (name := self.recipes[name].teacher if name in self.recipes else None) and name not in chain:
            chain.append(name)
        return chain

    def selected(self) -> list[str]:
        """The selected recipes (those in `only`, or all), every teacher before its students."""
        return sorted(self.only or self.recipes, key=lambda name: len(self.teachers_of(name)))

    def seeds_of(self, name: str) -> list[int]:
        """The seeds that a recipe is trained with: all, but only the `teacher_seed`s if every student names one."""
        chosen = [recipe.teacher_seed for recipe in self.recipes.values() if recipe.teacher == name]
        return sorted(set(chosen)) if chosen and None not in chosen else list(self.seeds)

    def models(self) -> list[tuple[str, int]]:
        """Name and seed of every selected model, seed by seed, each teacher before its students."""
        names, ordered = self.selected(), {}

        def add(name: str, seed: int) -> None:
            teacher = self.teacher_of(name, seed)
            if teacher and teacher[0] in names:
                add(*teacher)
            ordered[name, seed] = None

        for seed in dict.fromkeys([*self.seeds, *(seed for name in names for seed in self.seeds_of(name))]):
            for name in names:
                if seed in self.seeds_of(name):
                    add(name, seed)
        return list(ordered)

    def teacher_of(self, name: str, seed: int) -> tuple[str, int] | None:
        """Name and seed of the teacher of a model, if it has one."""
        recipe = self.recipes[name]
        if recipe.teacher is None:
            return None
        return recipe.teacher, seed if recipe.teacher_seed is None else recipe.teacher_seed
