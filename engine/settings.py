"""The fields of Recipe and Config, what each accepts, and their validation."""

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.errors import UserError, suggest

# torchvision's ResNet family, listed here so that reading the settings does not import torch.
ARCHS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)

# Training images of the data sets whose size is known before they are read.
TRAINING_IMAGES = {"cifar10": 50_000, "digits": 1_297}


class Kind(NamedTuple):
    """What a field accepts, in words and as a test, how a command line's word is converted, and argparse's nargs."""

    expected: str
    accepts: Callable[[Any], bool]
    convert: Callable[[str], Any] = str
    nargs: str | None = None


def number(expected: str, accepts: Callable[[float], bool]) -> Kind:
    return Kind(expected, lambda value: type(value) in (int, float) and math.isfinite(value) and accepts(value), float)


def integer(minimum: int, maximum: int = 2**31 - 1) -> Kind:
    upper = f" to {maximum}" if maximum < 2**31 - 1 else " or more"
    expected = f"an integer, {minimum}{upper}"
    return Kind(expected, lambda value: type(value) is int and minimum <= value <= maximum, int)


def choice(*names: str) -> Kind:
    return Kind("one of " + ", ".join(names), lambda value: value in names)


def text(expected: str, pattern: str) -> Kind:
    return Kind(expected, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def optional(kind: Kind) -> Kind:
    return kind._replace(
        expected=f"{kind.expected}, or none",
        accepts=lambda value: value is None or kind.accepts(value),
        convert=lambda word: None if word.lower() == "none" else kind.convert(word),
    )


def several(kind: Kind, expected: str) -> Kind:
    expected += "; separated by spaces on the command line, a tuple such as (0, 1) or (0,) in config.py"
    return Kind(expected, lambda values: type(values) is tuple and all(map(kind.accepts, values)), kind.convert, "+")


FLAG = Kind("true or false", lambda v: isinstance(v, bool), lambda w: {"true": True, "false": False}[w.lower()], "?")
NAME = text("of letters, digits, '.', '_' and '-', starting with a letter or digit", r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RECIPE_NAME = text(
    "of letters, digits, '_' and '-', starting with a letter or digit", r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"
)
PATH = text("the path of a folder", r"[^\0\n]+")
FRACTION = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
POSITIVE = number("a number above 0", lambda value: value > 0)


def setting(default: Any, kind: Kind, help: str) -> Any:
    """A dataclass field that carries what it accepts and its line in --help."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


def settings_of(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.metadata]


def invalid_fields(settings: Any) -> dict[str, str]:
    """A message for each field of a Recipe or Config whose value it does not accept."""
    values = {field: getattr(settings, field.name) for field in settings_of(type(settings))}
    return {
        field.name: f"{field.name} = {value!r}: must be {field.metadata['kind'].expected}"
        for field, value in values.items()
        if not field.metadata["kind"].accepts(value)
    }


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. Raises UserError, naming every field that is wrong."""

    arch: str = setting("resnet18", choice(*ARCHS), "torchvision model")
    epochs: int = setting(5, integer(1), "passes over the training images")
    lr: float = setting(0.001, POSITIVE, "learning rate, the peak of the schedule")
    momentum: float = setting(0.9, number("a number from 0 to below 1", lambda v: 0 <= v < 1), "SGD momentum")
    weight_decay: float = setting(
        0.0, number("a number, 0 or more", lambda v: v >= 0), "SGD weight decay, on all parameters"
    )
    nesterov: bool = setting(False, FLAG, "Nesterov momentum")
    schedule: str = setting(
        "constant",
        choice("constant", "cosine", "onecycle"),
        "constant; cosine: decays from lr to 0; onecycle: rises to lr over 30% of the steps, then decays to 0",
    )
    pretrained: bool = setting(True, FLAG, "start from torchvision's ImageNet weights")
    teacher: str | None = setting(None, optional(NAME), "recipe to distil from")
    alpha: float = setting(0.25, FRACTION, "weight of the hard loss; the soft loss gets 1 - alpha")
    temperature: float = setting(5.0, POSITIVE, "T of the soft loss, softens the probabilities of both models")
    scale_soft_loss: bool = setting(
        True, FLAG, "multiply the soft loss by T^2; otherwise its gradients shrink by 1/T^2"
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
        for field in dataclasses.fields(Recipe):
            value, unused = getattr(self, field.name), self.teacher is None and field.name in DISTILLATION_FIELDS
            if unused and field.name not in invalid and value != field.default:
                problems.append(f"{field.name} = {value!r}: has no effect without a teacher")
        if problems:
            raise UserError(*problems)


DISTILLATION_FIELDS = ("alpha", "temperature", "scale_soft_loss")  # have no effect without a teacher


@dataclass(frozen=True)
class Config:
    """A whole experiment. Raises UserError, naming every field that is wrong."""

    recipes: dict[str, Recipe]
    run: str = setting("run", NAME, "name of the folders under checkpoints_path and imgs_path")
    dataset: str = setting(
        "cifar10",
        text("cifar10, digits or a folder", r"[^\0\n]+"),
        "cifar10, digits, or a folder with train/CLASS/* and test/CLASS/* images",
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
        several(integer(0, 2**32 - 1), "integers from 0 to 2^32 - 1"),
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
    data_path: str = setting("data", PATH, "where CIFAR-10 is kept")
    checkpoints_path: str = setting("checkpoints", PATH, "where models are written: RUN/seedS/MODEL.pt")
    imgs_path: str = setting("imgs", PATH, "where reports are written: RUN/results.md and figures")

    def __post_init__(self):
        invalid = invalid_fields(self)
        # Conflicts between fields are checked with the default in place of a value that is itself wrong.
        values = {field.name: getattr(self, field.name) for field in settings_of(Config)}
        values |= {field.name: field.default for field in settings_of(Config) if field.name in invalid}
        problems = [*invalid.values(), *self._conflicts(**values), *self._recipe_conflicts(**values)]
        if problems:
            raise UserError(*problems)
        for name in ("dataset", "data_path", "checkpoints_path", "imgs_path"):
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))  # "~" in config.py or after "="

    def _conflicts(self, *, seeds, only, dataset, validation_size, batch_size, **_) -> list[str]:
        problems = []
        if not self.recipes:
            problems.append("recipes = {}: must hold one recipe or more")
        if not seeds or len(set(seeds)) < len(seeds):
            problems.append(f"seeds = {seeds}: must be one or more different seeds")
        for name in only:
            if name not in self.recipes:
                problems.append(f"only = {name!r}: no such recipe; {suggest(name, self.recipes)}")
        available = TRAINING_IMAGES.get(dataset, math.inf) - validation_size
        if available <= 0:
            problems.append(f"validation_size = {validation_size}: leaves no training images")
        elif batch_size > available:
            problems.append(f"batch_size = {batch_size}: must be at most {available}, the number of training images")
        return problems

    def _recipe_conflicts(self, *, dataset, validation_size, batch_size, **_) -> list[str]:
        problems = []
        same_file = Counter(str(name).casefold() for name in self.recipes)  # on file systems that ignore case
        available = TRAINING_IMAGES.get(dataset, math.inf) - validation_size
        upper = f" to the {available} training images" if available < math.inf else " up"
        for name, recipe in self.recipes.items():
            if not RECIPE_NAME.accepts(name):
                problems.append(f"recipe {name!r}: its name must be {RECIPE_NAME.expected}")
            elif same_file[name.casefold()] > 1:
                problems.append(
                    f"recipe {name!r}: its name must differ from the others in more than upper and lower case"
                )
            size = recipe.train_size
            if size is not None and batch_size <= available and not batch_size <= size <= available:
                problems.append(f"{name}.train_size = {size}: must be from batch_size = {batch_size}{upper}")
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
