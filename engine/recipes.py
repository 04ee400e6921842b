"""Recipe, which describes how one model is trained: its fields and their validation."""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torchvision

from engine import soft_losses
from engine.errors import UserError
from engine.fields import (
    CLASS_NAMES,
    FLAG,
    FRACTION,
    NAME,
    NONNEGATIVE,
    OPTIONS,
    PATH,
    POSITIVE,
    POSITIVE_RGB,
    RGB,
    Kind,
    choice,
    default_of,
    integer,
    invalid_fields,
    number,
    optional,
    or_named,
    read_class_names,
    setting,
)
from engine.named import Named, is_named

ARCHS = tuple(torchvision.models.list_models(module=torchvision.models))  # those for classification
RESNETS = tuple(name for name in ARCHS if "resnet" in name or "resnext" in name)
ARCH = Kind(
    "a classification model of torchvision, timm:NAME",
    lambda value: value in ARCHS or is_of_timm(value),
    names=ARCHS,
)
SEED = integer(0, 2**32 - 1)


def is_of_timm(arch: Any) -> bool:
    return isinstance(arch, str) and re.fullmatch(r"timm:[\w.-]+", arch) is not None


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. Raises UserError, naming every field that is wrong."""

    arch: Named = setting(
        "resnet18",
        or_named(ARCH),
        "torchvision model, timm:NAME if timm is installed, or MODULE:NAME, called with the number of classes, a "
        "module from images (N, 3, S, S) to logits (N, C)",
    )
    stem: str = setting(
        "imagenet", choice("imagenet", "cifar"), "cifar: a ResNet with a 3 x 3 first convolution, without pooling"
    )
    epochs: int = setting(5, integer(0), "passes over the training images; 0: use `weights` as they are")
    optimizer: Named = setting(
        "sgd",
        or_named(choice("sgd", "adamw")),
        "sgd, adamw with PyTorch's betas, or MODULE:NAME, called with the parameters and lr",
    )
    lr: float = setting(0.001, POSITIVE, "learning rate, the peak of the schedule")
    momentum: float = setting(0.9, number("a number from 0 to below 1", lambda v: 0 <= v < 1), "SGD momentum")
    weight_decay: float = setting(0.0, NONNEGATIVE, "weight decay, on all parameters")
    nesterov: bool = setting(False, FLAG, "Nesterov momentum")
    schedule: Named = setting(
        "constant",
        or_named(choice("constant", "cosine", "onecycle")),
        "constant; cosine: decays from lr to 0; onecycle: rises to lr over 30% of the steps, then decays to 0; or "
        "MODULE:NAME, called with the optimizer and the number of steps, a scheduler that is stepped after each",
    )
    clip_norm: float | None = setting(
        None, optional(POSITIVE), "gradients whose norm, over all parameters, is larger are scaled down to this norm"
    )
    label_smoothing: float = setting(0.0, FRACTION, "share of the hard labels that is spread over all classes")
    class_weights: str = setting(
        "none",
        choice("none", "balanced"),
        "balanced: in the hard loss all classes weigh alike, however many training images each has",
    )
    keep: str = setting(
        "last",
        choice("last", "best"),
        "the weights of the last epoch, or of the one with the best accuracy on the validation images, in float32",
    )
    pretrained: bool = setting(True, FLAG, "start from ImageNet weights")
    weights: str | None = setting(
        None,
        optional(PATH),
        "in place of ImageNet weights: a file of weights to start from, or random; with epochs = 0 also a file .npz of "
        "logits, see engine/given_logits.py",
    )
    class_names: Any = setting(  # a path becomes the names in the file
        None,
        optional(CLASS_NAMES),
        "the classes of a file of weights in the order of its logits, or a file with a name on each line; those of the "
        "data set are found among them by name. none: the classes of a checkpoint of this program, else the data set's",
    )
    mean: tuple[float, ...] | None = setting(
        None,
        optional(RGB),
        "the images' mean by channel, of values from 0 to 1, that the model takes them normalised with; none: that of "
        "its weights, for a checkpoint of this program and for weights that timm downloads, else ImageNet's",
    )
    std: tuple[float, ...] | None = setting(None, optional(POSITIVE_RGB), "their standard deviation, likewise")
    teacher: str | None = setting(None, optional(NAME), "recipe to distil from")
    alpha: float = setting(0.25, FRACTION, "weight of the hard loss")
    soft_weight: float | None = setting(None, optional(NONNEGATIVE), "weight of the soft loss; none: 1 - alpha")
    soft_loss: Named = setting(
        "kd",
        or_named(choice(*soft_losses.SOFT_LOSSES)),
        "measure of the distance from the teacher's logits, or MODULE:NAME, see engine/soft_losses.py",
    )
    loss_options: dict[str, float] = setting(
        {}, OPTIONS, "further parameters of the soft loss, such as nontarget_weight=2 of dkd"
    )
    temperature: float = setting(5.0, POSITIVE, "T of the soft loss; ttm softens the teacher alone")
    scale_soft_loss: bool = setting(True, FLAG, "multiply the soft loss by T^2; otherwise its gradients scale as 1/T^2")
    teacher_seed: int | None = setting(
        None, optional(SEED), "seed of the teacher, to share one teacher among all seeds; none: the student's seed"
    )
    shuffle_teacher: bool = setting(
        False, FLAG, "a control: shuffle the teacher's logits among the training images of each class"
    )
    baseline: str | None = setting(
        None, optional(NAME), "recipe to compare this one with; none: the one without a teacher and otherwise the same"
    )
    train_size: int | None = setting(
        None,
        optional(integer(1)),
        "number of training images, a stratified subset that is the same for every seed; none: all",
    )
    train_subset: int = setting(0, SEED, "another number chooses another random subset of train_size images")

    def __post_init__(self) -> None:
        invalid = invalid_fields(self)
        # Conflicts between fields are checked with the default in place of a value that is itself wrong.
        wrong = {*invalid, *(("loss_options",) if "soft_loss" in invalid else ())}
        problems = conflicts({**vars(self), **{field: DEFAULTS[field] for field in wrong}})
        if invalid or problems:
            raise UserError(*{**problems, **invalid}.values())
        if self.weights not in (None, "random"):
            object.__setattr__(self, "weights", os.path.expanduser(self.weights))
        if isinstance(self.class_names, str):
            object.__setattr__(self, "class_names", read_class_names(self.class_names))

    @property
    def soft_loss_options(self) -> dict[str, float]:
        """All parameters of the soft loss: `loss_options`, and its defaults for the others."""
        return {**soft_losses.options(self.soft_loss), **self.loss_options}

    def seed_of_teacher(self, seed: int) -> int:
        """The seed of the teacher of a student with this seed."""
        return seed if self.teacher_seed is None else self.teacher_seed

    @property
    def weight_of_soft_loss(self) -> float:
        return 1 - self.alpha if self.soft_weight is None else self.soft_weight

    @property
    def suggested_soft_share(self) -> float:
        """The share of the gradient that the weight of the soft loss suggests."""
        return self.weight_of_soft_loss / (self.alpha + self.weight_of_soft_loss)

    @property
    def imagenet_weights(self) -> bool:
        """Whether training starts from ImageNet weights. A network of the user's brings its own weights."""
        return self.pretrained and self.weights is None and (is_of_timm(self.arch) or not is_named(self.arch))

    @property
    def weights_file(self) -> str | None:
        """The file of weights that training starts from, or of logits."""
        return None if self.weights == "random" else self.weights

    @property
    def logits_file(self) -> str | None:
        """The file of a model that is only logits, see engine/given_logits.py."""
        return self.weights if self.weights and self.weights.endswith(".npz") else None


# These have no effect without a teacher.
DISTILLATION_FIELDS = (
    "alpha",
    "soft_weight",
    "soft_loss",
    "loss_options",
    "temperature",
    "scale_soft_loss",
    "teacher_seed",
    "shuffle_teacher",
)
DEFAULTS = {field.name: default_of(field) for field in dataclasses.fields(Recipe)}


def conflicts(values: Mapping[str, Any]) -> dict[str, str]:
    """What does not go together in the values of a recipe: a message for each field that should be changed."""
    problems = {}
    if values["nesterov"] is True and values["momentum"] == 0:
        problems["nesterov"] = "nesterov = True: needs a momentum above 0"
    if values["epochs"] == 0 and values["weights"] is None:
        problems["epochs"] = "epochs = 0: needs weights, a file or random"
    if values["epochs"] and str(values["weights"]).endswith(".npz"):
        problems["epochs"] = f"epochs = {values['epochs']}: must be 0, because weights are logits and cannot be trained"
    if values["epochs"] == 0 and values["teacher"] is not None:
        problems["epochs"] = "epochs = 0: has no effect with a teacher; a distilled model must be trained"
    if values["teacher"] is not None and values["alpha"] == values["soft_weight"] == 0:
        problems["soft_weight"] = "soft_weight = 0: with alpha = 0 nothing is left of the loss; make one of them larger"
    if values["stem"] == "cifar" and (
        values["arch"] not in RESNETS or (values["pretrained"] and values["weights"] is None)
    ):
        problems["stem"] = "stem = 'cifar': needs a ResNet and pretrained = False (ImageNet weights have another stem)"
    if values["class_names"] is not None and values["weights"] in (None, "random"):
        problems["class_names"] = "class_names: has no effect without a file of weights"
    unused = {}
    if values["soft_loss"] == "ttm" or is_named(values["soft_loss"]):
        unused["scale_soft_loss"] = f"with soft_loss = {values['soft_loss']}, whose scale is its own"
    if values["teacher"] is None:
        unused |= dict.fromkeys(DISTILLATION_FIELDS, "without a teacher")
    if values["train_size"] is None:
        unused["train_subset"] = "without a train_size"
    if values["optimizer"] == "adamw":
        unused |= dict.fromkeys(("momentum", "nesterov"), "with optimizer = adamw")
    if is_named(values["optimizer"]):
        of_sgd = ("momentum", "nesterov", "weight_decay")
        unused |= dict.fromkeys(of_sgd, f"with optimizer = {values['optimizer']}, which takes the parameters and lr")
    for field, why in unused.items():
        if values[field] != DEFAULTS[field]:
            problems[field] = f"{field} = {values[field]!r}: has no effect {why}"
    if "loss_options" not in problems and (problem := wrong_options(values["soft_loss"], values["loss_options"])):
        problems["loss_options"] = problem
    return problems


def wrong_options(soft_loss: str, chosen: dict[str, float]) -> str | None:
    """Why `loss_options` do not suit a soft loss, if they do not."""
    try:
        known = soft_losses.options(soft_loss)
    except UserError as error:
        return f"soft_loss = {soft_loss!r}: {error}"
    unknown = [name for name in chosen if name not in known]
    if not unknown:
        return None
    takes = ", ".join(f"{name} ({default:g})" for name, default in known.items()) or "no options"
    return f"loss_options = {chosen!r}: {soft_loss} has no {', '.join(unknown)}; it takes {takes}"


def settings_alone(recipe: Recipe) -> dict[str, Any]:
    """The settings that a recipe shares with the same recipe without its teacher."""
    settings = dataclasses.asdict(recipe)
    return {name: settings[name] for name in settings if name not in {"baseline", "teacher", *DISTILLATION_FIELDS}}


def baseline_of(name: str, recipes: Mapping[str, Recipe]) -> str | None:
    """A recipe's `baseline`; else, if it has a teacher, the first recipe without one that has all its other settings.

    In self-distillation that is its own teacher only if there is no other.
    """
    recipe = recipes[name]
    if recipe.baseline or not recipe.teacher:
        return recipe.baseline
    same = [other for other, r in recipes.items() if not r.teacher and settings_alone(r) == settings_alone(recipe)]
    same.sort(key=lambda other: other == recipe.teacher)
    return same[0] if same else None


def loses_baseline(row: Recipe, baseline: Recipe, row_before: Recipe, baseline_before: Recipe) -> bool:
    """Whether a change, such as a flag, has given a row another architecture than the baseline that it names."""
    return row.arch != baseline.arch and row_before.arch == baseline_before.arch


def row_alone(name: str, recipe: Recipe) -> str:
    """A line for config.py: the same recipe without its teacher."""
    defaults = settings_alone(Recipe())
    settings = settings_alone(recipe)
    given = [
        f"{field}={settings[field]!r}" for field in settings if field == "arch" or settings[field] != defaults[field]
    ]
    return f'"{name}_alone": Recipe({", ".join(given)}),'
