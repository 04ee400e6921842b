"""Models by name, torchvision's, timm's and the user's; and the weights that they start from."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn

from engine import named
from engine.checkpoints import (
    CODE,
    RETRAIN,
    Checkpoint,
    is_checkpoint,
    load_checkpoint,
    load_tensors,
    matches,
    nonfinite_tensors,
)
from engine.device import place
from engine.errors import UserError, at_most_ten, first_line, suggest
from engine.files import check_file
from engine.images import IMAGENET, Normalisation
from engine.recipes import ARCHS, Recipe, is_of_timm


class Architecture(NamedTuple):
    """What a model's cost depends on, besides the size of the images."""

    arch: str
    stem: str

    @classmethod
    def of(cls, recipe: Recipe) -> "Architecture":
        return cls(recipe.arch, recipe.stem)

    def build(self, num_classes: int) -> nn.Module:
        return build_model(self.arch, num_classes, stem=self.stem)

    def __str__(self) -> str:
        return self.arch if self.stem == "imagenet" else f"{self.arch} ({self.stem} stem)"


def build_model(arch: str, num_classes: int, pretrained: bool = False, stem: str = "imagenet") -> nn.Module:
    """A classification model of torchvision, or of timm as "timm:NAME", with a new last layer for `num_classes`.

    MODULE:NAME is called with `num_classes` and returns the model itself. The parameters keep the library's names.
    stem="cifar" replaces a ResNet's 7 x 7 convolution of stride 2 by one of 3 x 3 and stride 1, and removes the pooling
    after it (He et al. 2015, arXiv 1512.03385, section 4.2). Raises UserError if the ImageNet weights are not cached
    and cannot be downloaded, or timm is missing.
    """
    if is_of_timm(arch):
        return build_timm(arch.removeprefix("timm:"), num_classes, pretrained)
    if named.is_named(arch):
        return build_named(arch, num_classes)
    if arch not in ARCHS:  # in a checkpoint that was made by hand
        raise UserError(f"arch = {arch!r}: no such model; {suggest(arch, ARCHS)}")
    auxiliary = arch in ("googlenet", "inception_v3")  # they have further classifiers, for losses that we do not use
    options = {"aux_logits": False, "init_weights": not pretrained, "transform_input": True} if auxiliary else {}
    model = torchvision.models.get_model(arch, **options)
    if pretrained:
        weights = load_imagenet_weights(arch)
        model.load_state_dict({k: v for k, v in weights.items() if not (auxiliary and k.lower().startswith("aux"))})
    name, last = last_layer(model)
    new: nn.Module
    if isinstance(last, nn.Linear):
        new = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
    else:  # SqueezeNet
        new = nn.Conv2d(last.in_channels, num_classes, kernel_size=1)
    model.set_submodule(name, new)
    if stem == "cifar":
        first = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
        model.conv1, model.maxpool = first, nn.Identity()
    return model


def last_layer(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and module of the layer that computes the logits, in a model of torchvision or timm."""
    last = layers(model)[-1]
    return next(name for name, module in model.named_modules() if module is last), last


def heads(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that compute logits: two of some models of timm, such as a distilled DeiT."""
    of_timm = vars(model).get("default_cfg", {}).get("classifier")
    return (of_timm,) if isinstance(of_timm, str) else of_timm or (last_layer(model)[0],)


def layers(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Its linear layers and convolutions, in order."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def build_named(arch: str, num_classes: int) -> nn.Module:
    """A network of the user's. Raises UserError if it is no nn.Module with parameters."""
    model = named.call("arch", arch, num_classes)
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise UserError(
            f"arch = {arch!r}: must return an nn.Module with parameters when it is called with {num_classes}"
        )
    return model


def load_imagenet_weights(arch: str) -> dict[str, torch.Tensor]:
    """torchvision's default weights. Raises UserError if they are neither in torch's cache nor can be downloaded."""
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        # weights_only: no code in a file of the cache is executed
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except Exception as error:  # of many types, for a missing, damaged or foreign file
        problem = "cannot be used" if file.exists() else "is missing and could not be downloaded"
        raise UserError(
            f"{file}: {problem} ({first_line(error)}). Put the file from {weights.url} there, or start from "
            "random weights: --preset scratch, or --pretrained false"
        ) from None


def timm_or_error(arch: str) -> ModuleType:
    try:
        import timm
    except ImportError:
        raise UserError(f"arch = {arch!r}: timm is not installed; pip install timm") from None
    return timm


def build_timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    timm = timm_or_error(f"timm:{name}")
    if not timm.is_model(name):
        raise UserError(f"arch = 'timm:{name}': no such model; {suggest(name, timm.list_models())}")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except Exception as error:  # of many types, for missing weights
        raise UserError(f"arch = 'timm:{name}': its weights could not be loaded ({first_line(error)})") from None


def check_image_size(model: nn.Module, arch: str, image_size: int, num_classes: int | None = None) -> None:
    """Raise UserError if a model on the CPU cannot be applied to images of this size or does not return logits."""
    try:
        with torch.inference_mode():
            logits = model.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # of many types, in a network of the user's
        raise UserError(
            f"image_size = {image_size}: {arch} cannot be applied to images of this size ({first_line(error)})"
            + usual_size(model, arch)
        ) from None
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else ()
    if len(shape) != 2 or num_classes not in (None, shape[1]):
        raise UserError(f"arch = {arch!r}: must return a tensor of logits (1, {num_classes or 'C'}) for one image")


def usual_size(model: nn.Module, arch: str) -> str:
    """The images that a model was made for, where that is known."""
    attributes = vars(model)
    if is_of_timm(arch):
        size = attributes["default_cfg"]["input_size"][-1]
    elif named.is_named(arch):
        return ""
    elif "image_size" in attributes:  # vision transformers
        size = attributes["image_size"]
    else:
        (size,) = torchvision.models.get_model_weights(arch).DEFAULT.transforms().crop_size
    return f"; it is made for {size} px"


def initial_model(recipe: Recipe, classes: Sequence[str], note: Callable[[str], None] = lambda text: None) -> nn.Module:
    """The model that a recipe starts from, on the CPU; random weights are drawn from torch's generator.

    `note` receives a sentence if a file of weights brings no last layer for these classes. Raises UserError if the
    weights cannot be read or do not fit.
    """
    model = build_model(recipe.arch, len(classes), recipe.imagenet_weights, recipe.stem)
    if recipe.weights_file:
        load_weights(model, recipe.weights_file, recipe, classes, note)
    return with_normalisation(model, chosen_normalisation(recipe))


def with_normalisation(model: nn.Module, normalisation: Normalisation) -> nn.Module:
    """The model itself, which from now on carries what its images are normalised with."""
    vars(model)["image_normalisation"] = normalisation
    return model


STATE_DICTS = ("state_dict", "model", "model_state_dict", "net", "network", "module", "ema", "model_ema", "weights")


def chosen_normalisation(recipe: Recipe) -> Normalisation:
    """A recipe's `mean` and `std`; where they are None, those that its weights were trained with.

    Raises UserError if they contradict a checkpoint of ours.
    """
    path, own, chosen = recipe.weights_file, IMAGENET, {}
    for field in Normalisation._fields:
        if getattr(recipe, field) is not None:
            chosen[field] = getattr(recipe, field)
    if path and Path(path).is_file() and is_checkpoint(path):
        own = Normalisation.recorded(read_file(path).get("normalisation", {}))
        if own._replace(**chosen) != own:
            raise UserError(f"{path}: was trained on images normalised with {own}; leave out mean and std")
    elif recipe.imagenet_weights and is_of_timm(recipe.arch):
        of_timm = timm_or_error(recipe.arch).get_pretrained_cfg(recipe.arch.removeprefix("timm:"))
        own = Normalisation(of_timm.mean, of_timm.std) if of_timm else own
    return own._replace(**chosen)


def read_file(path: str) -> Any:
    """What a file of weights holds; no code in it is executed. Raises UserError if it cannot be read."""
    try:
        check_file(path)
        return load_checkpoint(path) if is_checkpoint(path) else load_tensors(Path(path))
    except UserError:
        raise
    except Exception as error:  # of many types, for a foreign file
        raise UserError(
            f"{path}: cannot be read as weights ({first_line(error)}). It must be a file that torch.save wrote from a "
            "state dict, or from a dict that holds one"
        ) from None


def state_dict_of(found: Any, path: str) -> dict[str, torch.Tensor]:
    """The state dict in a file's content, plain or under one of STATE_DICTS. Raises UserError if there is none."""
    while isinstance(found, dict) and (inner := [key for key in STATE_DICTS if isinstance(found.get(key), dict)]):
        found = found[inner[0]]
    if not found or not matches(found, dict[str, torch.Tensor]):
        kind = "a state dict (dense tensors of real numbers, by their names)"
        raise UserError(f"{path}: does not hold {kind}, neither by itself nor as {', '.join(STATE_DICTS)}")
    if wrong := nonfinite_tensors(found):
        raise UserError(
            f"{path}: has values that are NaN or infinite, in {', '.join(at_most_ten(wrong))}; use another file"
        )
    return found


def under_own_names(weights: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """The weights called `names` behind a prefix, such as that of torch.compile, DataParallel or Lightning.

    All weights as they are if there is no such prefix, or more than one.
    """
    prefixes = [name.removesuffix(names[0]) for name in weights if name.endswith(names[0])]
    candidates = [{p + name: name for name in names} for p in prefixes if all(p + name in weights for name in names)]
    if len(candidates) != 1 or "" in prefixes:
        return weights
    return {name: weights[full] for full, name in candidates[0].items()}


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """The state dict in a file of weights. Raises UserError if it cannot be read or holds none."""
    return state_dict_of(read_file(path), path)


def load_weights(
    model: nn.Module, path: str, recipe: Recipe, classes: Sequence[str], note: Callable[[str], None]
) -> None:
    """Load a file of weights into a model; of its last layer, what belongs to the data set's classes, by name.

    The names in a file are those of `class_names` or of a checkpoint of this program; of any other file, only their
    number is known. A recipe that trains gets a new last layer if the classes differ. Raises UserError if the weights
    belong to another architecture, to other classes and are not trained, or to a checkpoint that is not finished.
    """
    found = read_file(path)
    weights = under_own_names(state_dict_of(found, path), list(model.state_dict()))
    of_last = {}
    if not named.is_named(recipe.arch) or is_of_timm(recipe.arch):  # of a network of the user's no last layer is known
        prefixes = tuple(f"{head}." for head in heads(model))
        of_last = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    number = next((len(weights[name]) for name in of_last if name in weights and weights[name].ndim), len(classes))
    differing = None
    if is_checkpoint(path) and not (checkpoint := Checkpoint.from_state(path, found)).finished:
        epochs = len(checkpoint.history)
        raise UserError(f"{path}: its training is not finished ({epochs} epochs are done); resume it first")
    names = class_names(recipe)
    if names and of_last and len(names) != number:
        raise UserError(f"{path}: classifies into {number} classes, and class_names has {len(names)}")
    if names and of_last and set(classes) <= set(names):
        index = torch.tensor([names.index(name) for name in classes])
        weights |= {name: weights[name][index] for name in of_last if name in weights}
    elif names and names != tuple(classes):
        differing = f"its classes are {shorten(names)}, and those of the data set {shorten(classes)}"
    elif number != len(classes):
        differing = f"classifies into {number} classes, and the data set has {len(classes)}"
    if differing and (recipe.epochs == 0 or not of_last):
        raise UserError(f"{path}: {differing}")
    if differing:
        note(f"{path}: {differing}; the last layer starts from random weights")
        weights = {**weights, **of_last}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit a {recipe.arch} ({misfit(error)})") from None


def class_names(recipe: Recipe) -> tuple[str, ...] | None:
    """The classes of a recipe's weights in the order of their logits; None if they are those of the data set.

    Raises UserError if `class_names` contradicts a checkpoint of ours.
    """
    path, given = recipe.weights_file, recipe.class_names
    if path and Path(path).is_file() and is_checkpoint(path):
        own = tuple(read_file(path).get("classes", ()))
        if given not in (None, own):
            raise UserError(f"{path}: its classes are {shorten(own)}; leave out class_names")
        return own
    return given


def misfit(error: Exception) -> str:
    """What `load_state_dict` says: missing names, unexpected names, other shapes, each of them shortened."""
    lines = str(error).splitlines()
    return " ".join(textwrap.shorten(line, 200, placeholder=" ...") for line in lines[1:4] or lines)


def shorten(classes: Sequence[str]) -> str:
    return ", ".join(at_most_ten(list(classes)))


def network_of(checkpoint: Checkpoint) -> nn.Module:
    """The network of a checkpoint, whose weights are not loaded yet."""
    model = build_model(checkpoint.arch, len(checkpoint.classes), stem=checkpoint.stem)
    return with_normalisation(model, Normalisation.recorded(checkpoint.normalisation))


def load_model(checkpoint: Checkpoint, device: str) -> nn.Module:
    """The network of a checkpoint, in evaluation mode. Raises UserError if its weights do not fit or are not finite."""
    title = f"{checkpoint.name} seed {checkpoint.seed}"
    trained_with = checkpoint.settings.get("recipe", {}).get(CODE.format("arch"))
    if trained_with and trained_with != named.code_of(checkpoint.arch):
        raise UserError(
            f"{title}: {checkpoint.arch} has been edited since it was trained; undo the edit, or train anew"
        )
    if wrong := nonfinite_tensors(checkpoint.weights):
        raise UserError(
            f"{title}: its checkpoint has values that are NaN or infinite, in {', '.join(at_most_ten(wrong))}; "
            f"{RETRAIN}, with a lower lr"
        )
    try:
        model = network_of(checkpoint)
    except UserError as error:  # of a network of the user's that is not here
        raise UserError(f"{title}: arch = {checkpoint.arch!r}: {error}") from None
    try:
        model.load_state_dict(checkpoint.weights)
    except (RuntimeError, TypeError) as error:
        fit = f"do not fit a {checkpoint.arch} ({misfit(error)})"
        raise UserError(f"{title}: the weights in its checkpoint {fit}") from None
    return place(model, device).eval()
