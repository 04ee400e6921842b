"""Recipe, which describes how one model is trained: its fields and their validation."""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torchvision

from engine.errors import UserError, exit_on_error
from engine.fields import (
    FLAG,
    FRACTION,
    NAME,
    NONNEGATIVE,
    PATH,
    POSITIVE,
    Kind,
    choice,
    integer,
    invalid_fields,
    number,
    optional,
    setting,
)
from engine.soft_losses import SOFT_LOSSES, parameters

ARCHS = tuple(torchvision.models.list_models(module=torchvision.models))  # those for classification
RESNETS = tuple(name for name in ARCHS if "resnet" in name or "resnext" in name)
ARCH = Kind(
    "a classification model of torchvision, or timm:NAME",
    lambda value: value in ARCHS or (isinstance(value, str) and re.fullmatch(r"timm:[\w.-]+", value) is not None),
    names=ARCHS,
)
SEED = integer(0, 2**32 - 1)


@dataclass(frozen=True)
class RecipeFields:
    """How one model is trained. Raises UserError, naming every field that is wrong."""

    arch: str = setting("resnet18", ARCH, "torchvision model, or timm:NAME if timm is installed")
    stem: str = setting(
        "imagenet", choice("imagenet", "cifar"), "cifar: a ResNet with a 3 x 3 first convolution, without pooling"
    )
    epochs: int = setting(5, integer(0), "passes over the training images; 0: use `weights` as they are")
    optimizer: str = setting("sgd", choice("sgd", "adamw"), "sgd, or adamw with PyTorch's betas")
    lr: float = setting(0.001, POSITIVE, "learning rate, the peak of the schedule")
    momentum: float = setting(0.9, number("a number from 0 to below 1", lambda v: 0 <= v < 1), "SGD momentum")
    weight_decay: float = setting(0.0, NONNEGATIVE, "weight decay, on all parameters")
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
    alpha: float = setting(0.25, FRACTION, "weight of the hard loss")
    soft_weight: float | None = setting(None, optional(NONNEGATIVE), "weight of the soft loss; none: 1 - alpha")
    soft_loss: str = setting("kd", choice(*SOFT_LOSSES), "measure of the distance from the teacher's logits")
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
        of_other_losses = {name for loss in SOFT_LOSSES for name in parameters(loss)} - {*self.loss_parameters()}
        unused = dict.fromkeys(of_other_losses, f"with soft_loss = {self.soft_loss}")
        unused |= {"scale_soft_loss": "with soft_loss = ttm"} if self.soft_loss == "ttm" else {}
        unused |= {name: "without a teacher" for name in DISTILLATION_FIELDS if self.teacher is None}
        unused |= {name: "with optimizer = adamw" for name in ("momentum", "nesterov") if self.optimizer == "adamw"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in unused and field.name not in invalid and value != field.default:
                problems.append(f"{field.name} = {value!r}: has no effect {unused[field.name]}")
        if problems:
            raise UserError(*problems)
        if self.weights not in (None, "random"):
            object.__setattr__(self, "weights", os.path.expanduser(self.weights))

    def loss_parameters(self) -> dict[str, float]:
        """The parameters of this recipe's soft loss."""
        return (
            {name: getattr(self, name) for name in parameters(self.soft_loss)} if self.soft_loss in SOFT_LOSSES else {}
        )

    @property
    def weight_of_soft_loss(self) -> float:
        return 1 - self.alpha if self.soft_weight is None else self.soft_weight

    @property
    def suggested_soft_share(self) -> float:
        """The share of the gradient that the weight of the soft loss suggests."""
        return self.weight_of_soft_loss / (self.alpha + self.weight_of_soft_loss)

    @property
    def imagenet_weights(self) -> bool:
        """Whether training starts from ImageNet weights."""
        return self.pretrained and self.weights is None

    @property
    def weights_file(self) -> str | None:
        """The file of weights that training starts from."""
        return None if self.weights == "random" else self.weights


def loss_defaults() -> dict[str, float]:
    """The further parameters of all soft losses, with their defaults. Raises UserError if a name has two meanings."""
    defaults: dict[str, float] = {}
    for loss in SOFT_LOSSES:
        for name, default in parameters(loss).items():
            if name in RecipeFields.__dataclass_fields__:
                raise UserError(f"soft loss {loss}: {name} is already a setting; rename the parameter")
            if not isinstance(default, (int, float)):
                raise UserError(f"soft loss {loss}: {name} needs a number as its default")
            if defaults.setdefault(name, default) != default:
                raise UserError(f"soft loss {loss}: {name} has another default in another loss; rename the parameter")
    return defaults


with exit_on_error():  # a mistake in a new soft loss is one line, not a traceback
    DEFAULTS = loss_defaults()


def describe_parameter(name: str) -> str:
    return f"of soft_loss = {' and '.join(loss for loss in SOFT_LOSSES if name in parameters(loss))}"


# RecipeFields and the parameters of the soft losses.
Recipe = dataclasses.make_dataclass(
    "Recipe",
    [(name, float, setting(default, NONNEGATIVE, describe_parameter(name))) for name, default in DEFAULTS.items()],
    bases=(RecipeFields,),
    frozen=True,
    namespace={"__module__": __name__, "__doc__": RecipeFields.__doc__},
)

# These have no effect without a teacher.
DISTILLATION_FIELDS = (
    *("alpha", "soft_weight", "soft_loss", "temperature", "scale_soft_loss", "teacher_seed", "shuffle_teacher"),
    *DEFAULTS,
)


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


def row_alone(name: str, recipe: Recipe) -> str:
    """A line for config.py: the same recipe without its teacher."""
    defaults = settings_alone(Recipe())
    settings = settings_alone(recipe)
    given = [
        f"{field}={settings[field]!r}" for field in settings if field == "arch" or settings[field] != defaults[field]
    ]
    return f'"{name}_alone": Recipe({", ".join(given)}),'
