"""Fingerprints: every input that a model or stored logits depend on, and what follows if they differ or agree."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from engine.checkpoints import (
    checkpoint_path,
    load_finished,
    load_training,
    read_metadata,
    save_checkpoint,
    tensors_digest,
    weights_digest,
)
from engine.console import log
from engine.datasets import Dataset
from engine.errors import UserError
from engine.files import write_durably
from engine.models import read_weights
from engine.recipes import Recipe
from engine.settings import Config

# The fields of Config that no weights depend on; the images of the data set have a digest of their own.
IRRELEVANT = {
    *("recipes", "run", "dataset", "seeds", "only", "overwrite", "checkpoint_minutes", "device", "compile"),
    *("deterministic", "sweep", "jobs", "data_path", "checkpoints_path", "imgs_path"),
}


def training_settings(name: str, seed: int, config: Config, dataset: Dataset) -> dict[str, Any]:
    """The fingerprint of a model: every setting that its weights depend on, nested, so that no name hides another.

    Images and weights are represented by their digests. The digest of the weights that it starts from, or of its
    teacher's, is left out if there is no such file.
    """
    recipe = config.recipes[name]
    subset = dataset.subset(recipe.train_size)
    settings = {"seed": seed, "recipe": recipe_settings(recipe, len(subset)), "config": {}}
    if recipe.epochs:  # otherwise the weights are used as they are
        relevant = [field.name for field in fields(Config) if field.name not in IRRELEVANT]
        settings["config"] = {field: getattr(config, field) for field in relevant}
        settings["selected training images"] = hashlib.sha256(subset.numpy()).hexdigest()
    settings["images of the data set"] = dataset.digest
    if teacher := config.teacher_of(name, seed):
        try:
            digest = weights_digest(checkpoint_path(config, *teacher))
        except UserError:
            if not config.overwrite:  # which trains a damaged teacher again
                raise
            digest = None
        if digest:
            settings["weights of the teacher"] = digest
    return settings


def recipe_settings(recipe: Recipe, images: int) -> dict[str, Any]:
    """The settings of a recipe that its weights depend on; settings of the same effect have the same values here.

    `images` is the number of training images. The name of the teacher is left out.
    """
    settings = {"arch": recipe.arch, "stem": recipe.stem, "epochs": recipe.epochs}
    if not recipe.weights_file:
        settings["weights"] = "ImageNet" if recipe.imagenet_weights else "random"
    elif Path(recipe.weights_file).exists():
        settings["weights"] = tensors_digest(read_weights(recipe.weights_file))
    if not recipe.epochs:
        return settings
    plain = ("optimizer", "lr", "momentum", "weight_decay", "nesterov", "schedule", "label_smoothing")
    settings |= {field: getattr(recipe, field) for field in plain}
    settings |= {"train_size": images, "distilled": recipe.teacher is not None}
    if recipe.teacher:
        settings |= {
            field: getattr(recipe, field) for field in ("alpha", "soft_loss", "temperature", "shuffle_teacher")
        }
        settings["soft_weight"] = recipe.weight_of_soft_loss
        settings["scale_soft_loss"] = recipe.scale_soft_loss or recipe.temperature == 1
        settings["parameters of the soft loss"] = recipe.loss_parameters()
    return settings


def without_precision(settings: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint that fits a model of either precision."""
    return {**settings, "config": {key: v for key, v in settings["config"].items() if key != "precision"}}


def check_settings(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise UserError, naming what differs, if a checkpoint was trained with different settings."""

    def show(value: Any) -> str:
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)

    pairs = list(compare(state["settings"], settings, state["name"]))
    changed = [pair for pair in pairs if pair[1] is not None] or pairs  # one setting can bring others with it
    if changed:
        differing = "; ".join(f"{field} was {show(before)}, is now {show(now)}" for field, before, now in changed)
        raise UserError(
            f"{path}: was trained with different settings: {differing}. Restore them, choose another "
            "name for this experiment (--run NAME), or retrain in place (--overwrite)"
        )


def compare(before: dict[str, Any], now: dict[str, Any], name: str, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting of the fingerprint `now` that differs: its name (RECIPE.SETTING for a recipe's) and both values."""
    for field, value in now.items():
        if isinstance(value, dict):
            inner = f"{name}." if field == "recipe" else prefix
            yield from compare(before.get(field, {}), value, name, inner)
        elif before.get(field) != value:
            yield prefix + field, before.get(field), value


def load_teacher_state(name: str, seed: int, config: Config, dataset: Dataset) -> dict[str, Any]:
    """The state of a finished teacher. Raises UserError if it is not trained yet, or with different settings."""
    path, settings = checkpoint_path(config, name, seed), training_settings(name, seed, config, dataset)
    state = load_finished(path)
    if not state:
        raise UserError(f"{path}: the teacher {name!r} is not trained yet; add it to --only")
    if config.precision == "auto":  # not resolved yet
        settings = without_precision(settings)
    try:
        check_settings(path, state, settings)
    except UserError as error:
        raise UserError(f"{error}. To retrain this teacher, add it to --only") from None
    return state


def load_matching(path: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The state to resume from; None if there is none, or one that `overwrite` discards.

    Raises UserError if the file is damaged or was trained with different settings, unless `overwrite` is on.
    """
    try:
        state = load_training(path)
        if state:
            check_settings(path, state, settings)
    except UserError:
        if not overwrite:
            raise
        return None
    return state


def load_or_copy(name: str, seed: int, config: Config, dataset: Dataset) -> dict[str, Any] | None:
    """The state of a model, finished or not; that of a finished model with the same settings elsewhere; or None.

    Raises UserError as `load_matching` does.
    """
    path, settings = checkpoint_path(config, name, seed), training_settings(name, seed, config, dataset)
    if config.precision == "auto":  # not resolved yet
        settings = without_precision(settings)
    state = load_matching(path, settings, config.overwrite)
    if state is None and (found := same_model(name, settings, config)):
        source, state = found[0], {**found[1], "name": name, "config": asdict(config)}
        save_checkpoint(path, state)
        logits = source.with_suffix(".logits")
        if logits.exists():
            write_durably(path.with_suffix(".logits"), logits.read_bytes())
        log.info(f"{path}: copied from {source}, which was trained with the same settings")
    return state


def same_model(name: str, settings: dict[str, Any], config: Config) -> tuple[Path, dict[str, Any]] | None:
    """A finished model with exactly these settings, in any run under `checkpoints_path`: its checkpoint and its state.

    One of the same name is preferred; damaged ones are passed over. Without a precision in the settings, a model of
    either one will do.
    """
    any_precision = "precision" not in settings["config"]
    paths = Path(config.checkpoints_path).glob(f"*/seed{settings['seed']}/*.pt")
    for path in sorted(paths, key=lambda path: (path.stem != name, path)):
        state = read_metadata(path)
        if state and state["finished"]:
            trained_with = without_precision(state["settings"]) if any_precision else state["settings"]
            if trained_with == settings:
                with contextlib.suppress(UserError):
                    return path, load_training(path)
    return None


def logits_fingerprint(teacher_digest: str, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Every input that a teacher's stored logits depend on."""
    return {
        "teacher": teacher_digest,
        "images": dataset.digest,
        "image_size": config.image_size,
        "precision": config.precision,
    }
