"""Fingerprints: every input that a model or stored logits depend on, and what follows if they differ or agree."""

import contextlib
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
from engine.recipes import DISTILLATION_FIELDS, Recipe
from engine.settings import Config

# The fields of Config that no weights depend on; the images of the data set have a digest of their own.
IRRELEVANT = {
    *("recipes", "run", "dataset", "seeds", "only", "overwrite", "checkpoint_minutes", "device", "compile"),
    *("deterministic", "sweep", "jobs", "data_path", "checkpoints_path", "imgs_path"),
}

# A checkpoint that is older than a setting was trained with its default.
SETTING_DEFAULTS = {field.name: field.default for field in (*fields(Config), *fields(Recipe))}


def training_settings(name: str, seed: int, config: Config, dataset: Dataset) -> dict[str, Any]:
    """The fingerprint of a model: every setting that its weights depend on.

    The weights of its teacher and the file of weights that it starts from are represented by their digests, which are
    left out if that file is missing.
    """
    recipe = asdict(config.recipes[name])
    for unused in ("baseline", "teacher_seed", *(() if recipe["teacher"] else DISTILLATION_FIELDS)):
        recipe.pop(unused, None)
    if file := config.recipes[name].weights_file:
        del recipe["weights"]
        if Path(file).exists():
            recipe["weights"] = tensors_digest(read_weights(file))
    settings = {"seed": seed, **recipe}
    settings |= {field.name: getattr(config, field.name) for field in fields(Config) if field.name not in IRRELEVANT}
    if not recipe["epochs"]:  # weights that are used as they are
        del settings["precision"]
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


def check_settings(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise UserError, naming what differs, if a checkpoint was trained with different settings."""

    def abbreviate(value: Any) -> Any:
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value

    of_recipe = {field.name for field in fields(Recipe)}
    trained_with = SETTING_DEFAULTS | state["settings"]
    prefix = f"{state['name']}."
    differing = [
        f"{prefix * (field in of_recipe)}{field} was {abbreviate(trained_with.get(field))}, is now {abbreviate(value)}"
        for field, value in settings.items()
        if trained_with.get(field) != value
    ]
    if differing:
        raise UserError(
            f"{path}: was trained with different settings: {'; '.join(differing)}. Restore them, choose another "
            "name for this experiment (--run NAME), or retrain in place (--overwrite)"
        )


def load_teacher_state(name: str, seed: int, config: Config, dataset: Dataset) -> dict[str, Any]:
    """The state of a finished teacher. Raises UserError if it is not trained yet, or with different settings."""
    path, settings = checkpoint_path(config, name, seed), training_settings(name, seed, config, dataset)
    state = load_finished(path)
    if not state:
        raise UserError(f"{path}: the teacher {name!r} is not trained yet; add it to --only")
    if config.precision == "auto":  # not resolved yet
        settings.pop("precision", None)
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
        settings.pop("precision", None)
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

    One of the same name is preferred; damaged ones are passed over. Without a "precision" among the settings, a model
    of either precision will do.
    """
    older = {key: value for key, value in SETTING_DEFAULTS.items() if key in settings}
    paths = Path(config.checkpoints_path).glob(f"*/seed{settings['seed']}/*.pt")
    for path in sorted(paths, key=lambda path: (path.stem != name, path)):
        state = read_metadata(path)
        if state and state["finished"]:
            trained_with = older | state["settings"]
            if "precision" not in settings:
                trained_with.pop("precision", None)
            if trained_with == settings:
                with contextlib.suppress(UserError):
                    return path, load_training(path)
    return None


def logits_fingerprint(teacher_digest: str, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Every input that a teacher's stored logits depend on. They are computed in float32, whatever training uses."""
    settings = {field: getattr(config, field) for field in ("validation_size", "image_size")}
    return {"teacher": teacher_digest, "images": dataset.digest, **settings, "precision": "fp32"}
