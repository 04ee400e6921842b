"""Fingerprints: every input that a model or stored logits depend on, and what follows if they differ or agree."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from engine.checkpoints import (
    check_place,
    load_finished,
    load_training,
    read_metadata,
    save_model,
    tensors_digest,
    weights_digest,
)
from engine.console import log
from engine.datasets import Dataset
from engine.distributed import on_rank0
from engine.errors import UserError
from engine.files import write_durably
from engine.models import read_weights
from engine.recipes import Recipe
from engine.settings import Config, Model
from engine.sweeps import Grid

# The fields of Config that no weights depend on; the images of the data set have a digest of their own.
IRRELEVANT = {
    *("recipes", "run", "dataset", "seeds", "only", "overwrite", "checkpoint_minutes", "device", "compile"),
    *("deterministic", "sweep", "swept", "preset", "jobs", "data_path", "checkpoints_path", "imgs_path"),
}


@on_rank0
def training_settings(model: Model, dataset: Dataset) -> dict[str, Any]:
    """The fingerprint of a model: every setting that its weights depend on, nested, so that no name hides another.

    Images and weights are represented by their digests. The digest of the weights that it starts from, or of its
    teacher's, is left out if there is no such file.
    """
    recipe, config, subset = model.recipe, model.config, dataset.subset(model.recipe.train_size)
    settings = {"seed": model.seed, "recipe": recipe_settings(recipe, len(subset)), "config": {}}
    if recipe.epochs:  # otherwise the weights are used as they are
        relevant = [field.name for field in fields(Config) if field.name not in IRRELEVANT]
        settings["config"] = {field: getattr(config, field) for field in relevant}
        settings["selected training images"] = hashlib.sha256(subset.numpy()).hexdigest()
    settings["images of the data set"] = dataset.digest
    if model.teacher:
        try:
            digest = weights_digest(model.teacher.path)
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


@on_rank0
def load_teacher_state(teacher: Model, dataset: Dataset) -> dict[str, Any]:
    """The state of a finished teacher. Raises UserError if it is not trained yet, or with different settings."""
    settings, state = training_settings(teacher, dataset), load_finished(teacher.path)
    if not state:
        raise UserError(f"{teacher.path}: the teacher {teacher.name!r} is not trained yet; add it to --only")
    if teacher.config.precision == "auto":  # not resolved yet
        settings = without_precision(settings)
    try:
        check_settings(teacher.path, state, settings)
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


@on_rank0
def load_or_copy(model: Model, dataset: Dataset) -> dict[str, Any] | None:
    """The state of a model, finished or not; that of a finished model with the same settings elsewhere; or None.

    Raises UserError as `load_matching` does.
    """
    settings = training_settings(model, dataset)
    if model.config.precision == "auto":  # not resolved yet
        settings = without_precision(settings)
    state = load_matching(model.path, settings, model.config.overwrite)
    if state is None and (found := find_identical_model(model, settings)):
        source, state = found[0], {**found[1], "name": model.name, "config": asdict(model.config)}
        save_model(model.path, state)
        logits = source.with_suffix(".logits")
        if logits.exists():
            write_durably(model.logits_path, logits.read_bytes())
        log.info(f"{model.path}: copied from {source}, which was trained with the same settings")
    return state


def find_identical_model(model: Model, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """A finished model with exactly these settings, in any run under `checkpoints_path`: its checkpoint and its state.

    One of the same name is preferred; damaged ones are passed over. Without a precision in the settings, a model of
    either one will do.
    """
    any_precision = "precision" not in settings["config"]
    paths = Path(model.config.checkpoints_path).glob(f"*/seed{model.seed}/*.pt")
    for path in sorted(paths, key=lambda path: (path.stem != model.name, path)):
        state = read_metadata(path)
        if state and state["finished"]:
            trained_with = without_precision(state["settings"]) if any_precision else state["settings"]
            if trained_with == settings:
                with contextlib.suppress(UserError):
                    return path, load_training(path)
    return None


def logits_fingerprint(teacher_digest: str, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Every input that a teacher's stored logits depend on. They are computed in float32, whatever training uses."""
    return {
        "teacher": teacher_digest,
        "images": dataset.digest,
        "image_size": config.image_size,
        "precision": "fp32",
    }


def check_teacher(model: Model, state: dict[str, Any]) -> None:
    """Raise UserError if a student was distilled from other weights than the checkpoint of its teacher holds now."""
    teacher, recorded = model.teacher, state["settings"].get("weights of the teacher")
    if teacher and recorded and weights_digest(teacher.path) not in (None, recorded):
        raise UserError(f"{model.path}: was distilled from a teacher that has been retrained since ({teacher.path})")


def recorded_config(folder: Path) -> Config:
    """The settings of all models that lie in a run's `folder`, each as its own checkpoint records them.

    Where seeds of a recipe record settings of the same effect, those of the highest seed are taken. Raises UserError if
    there are no checkpoints, and if two contradict one another, with both names.
    """
    states = {}
    for path in sorted(folder.glob("seed*/*.pt")):
        states[path] = read_metadata(path) or load_training(path)
        check_place(path, states[path])
    if not states:
        raise UserError(f"{folder}: holds no checkpoints; train first, or name another --run or --checkpoints_path")
    described: dict[str, Path] = {}  # recipe, or None for what all share -> the checkpoint that describes it
    recipes: dict[str, Recipe] = {}
    for path, state in sorted(states.items(), key=lambda item: item[1]["seed"]):
        settings = without_precision(state["settings"])
        for part, name in (("recipe", state["name"]), ("config", None)):
            if settings[part]:  # weights that are used as they are depend on no config
                first = described.setdefault(name, path)
                check_agreement(first, states[first]["settings"][part], path, settings[part], name)
        for name, values in state["config"]["recipes"].items():
            if name == state["name"] or name not in recipes:
                recipes[name] = Recipe(**known(Recipe, values))
    shared = known(Config, states[described.get(None) or next(iter(states))]["config"])
    found = {state["seed"] for state in states.values()}
    asked = {seed for state in states.values() for seed in state["config"]["seeds"]}
    trained = {"recipes": recipes, "seeds": tuple(sorted(found & asked or found))}
    trained |= {"sweep": (), "swept": all_swept(states.values())}
    here = {"run": folder.name, "checkpoints_path": str(folder.parent), "imgs_path": "imgs"}
    here |= {"only": (), "overwrite": False, "device": "auto", "jobs": 1}
    return Config(**{**shared, **trained, **here})


def known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The recorded values of the fields that this version of the program has."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def check_agreement(
    first: Path, expected: dict[str, Any], second: Path, found: dict[str, Any], recipe: str | None
) -> None:
    """Raise UserError, naming both files, if parts of their fingerprints contradict one another."""
    prefix = f"{recipe}." if recipe else ""
    differing = [
        f"{field} is {before} and {now}" for field, before, now in compare(expected, found, recipe or "", prefix)
    ]
    if differing:
        raise UserError(
            f"{first} and {second} contradict one another: {'; '.join(differing)}. Move one of them away, or retrain it"
        )


def all_swept(states: Iterable[dict[str, Any]]) -> Grid:
    """The rows of all recorded sweeps."""
    swept: Grid = {}
    for state in states:
        for row, points in state["config"]["swept"].items():
            swept[row] = swept.get(row, {}) | points
    return swept
