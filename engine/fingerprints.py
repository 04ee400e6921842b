"""Fingerprints: every input that a model or stored logits depend on, and what follows if they differ or agree."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

from engine import named
from engine.checkpoints import (
    CODE,
    Checkpoint,
    load_finished,
    load_training,
    read_metadata,
    tensors_digest,
    weights_digest,
)
from engine.console import log
from engine.datasets import Dataset
from engine.distributed import on_rank0
from engine.errors import UserError
from engine.fields import settings_of
from engine.files import write_durably
from engine.images import IMAGENET
from engine.models import chosen_normalisation, read_weights
from engine.reach import code_digest
from engine.recipes import Recipe, is_of_timm
from engine.settings import Config, Model
from engine.soft_losses import code_of_soft_loss

# The settings of Config that no weights depend on; the images of the data set have a digest of their own. Precision is
# recorded in the environment, as the device and the number of threads are.
IRRELEVANT = {
    "run",
    "dataset",
    "skip_unreadable",
    "largest_image",
    "seeds",
    "only",
    "sweep",
    "overwrite",
    "jobs",
    "checkpoint_minutes",
    "device",
    "precision",
    "compile",
    "deterministic",
    "data_path",
    "checkpoints_path",
    "imgs_path",
}


# The settings that earlier versions of this program did not have, and so did not record: what they did.
EARLIER = {**IMAGENET.as_recorded(), "class_weights": "none", "keep": "last"}


@on_rank0
def training_settings(model: Model, dataset: Dataset) -> dict[str, Any]:
    """The fingerprint of a model: every setting that its weights depend on, nested, so that no name hides another.

    Images, weights and code that the user may edit are represented by their digests. The digest of the weights that it
    starts from, or of its teacher's, is left out if there is no such file.
    """
    recipe, config, subset = (
        model.recipe,
        model.config,
        dataset.subset(model.recipe.train_size, model.recipe.train_subset),
    )
    settings: dict[str, Any] = {"seed": model.seed, "recipe": recipe_settings(recipe, len(subset)), "config": {}}
    if recipe.epochs:  # otherwise the weights are used as they are
        relevant = [field.name for field in settings_of(Config) if field.name not in IRRELEVANT]
        settings["config"] = {field: getattr(config, field) for field in relevant}
        if named.is_named(config.augment):
            settings["config"][CODE.format("augment")] = named.code_of(config.augment)
        settings["selected training images"] = hashlib.sha256(subset.numpy().data).hexdigest()
    settings["images of the data set"] = dataset.digest
    if not dataset.has_training_images:  # for models that are trained already; nothing is known of these
        settings.pop("selected training images", None)
        del settings["images of the data set"]
        settings["recipe"].pop("train_size", None)
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
    if named.is_named(recipe.arch) and not is_of_timm(recipe.arch):
        settings[CODE.format("arch")] = named.code_of(recipe.arch)
    if not recipe.weights_file:
        settings["weights"] = "ImageNet" if recipe.imagenet_weights else "random"
    elif recipe.logits_file and Path(recipe.logits_file).exists():
        settings["weights"] = hashlib.sha256(Path(recipe.logits_file).read_bytes()).hexdigest()
    elif Path(recipe.weights_file).exists():
        settings["weights"] = tensors_digest(read_weights(recipe.weights_file))
    if "weights" in settings:
        settings |= chosen_normalisation(recipe).as_recorded()
        settings["class_names"] = recipe.class_names
    if not recipe.epochs:
        return settings
    plain = ["optimizer", "lr", "momentum", "weight_decay", "nesterov", "schedule", "label_smoothing"]
    plain += ["clip_norm", "class_weights", "keep"]
    settings |= {field: getattr(recipe, field) for field in plain}
    for field in ("optimizer", "schedule"):
        if named.is_named(settings[field]):
            settings[CODE.format(field)] = named.code_of(settings[field])
    settings |= {"train_size": images, "distilled": recipe.teacher is not None}
    if recipe.teacher:
        settings |= {
            field: getattr(recipe, field) for field in ("alpha", "soft_loss", "temperature", "shuffle_teacher")
        }
        settings[CODE.format("soft_loss")] = code_of_soft_loss(recipe.soft_loss)
        settings["soft_weight"] = recipe.weight_of_soft_loss
        settings["scale_soft_loss"] = recipe.scale_soft_loss or recipe.temperature == 1
        settings["loss_options"] = recipe.soft_loss_options
    return settings


def check_settings(path: Path, checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Raise UserError, naming what differs, if a model was trained with different settings."""

    def show(value: Any) -> str:
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)

    pairs = list(compare(checkpoint.settings, settings, checkpoint.name))
    changed = [pair for pair in pairs if pair[1] is not None] or pairs  # one setting can bring others with it
    if not changed:
        return
    differing = "; ".join(f"{field} was {show(before)}, is now {show(now)}" for field, before, now in changed)
    advice = (
        f"Restore them, or train {checkpoint.name} again: python teacher_student_model.py, with the flags of its "
        "training and --overwrite (in place) or --run NAME (beside it)"
    )
    if [field for field, *_ in changed] == [f"{checkpoint.name}.epochs"] and checkpoint.finished:
        advice = (
            "A finished model is not trained further, because its schedule has ended: train anew under another name "
            f"(--run NAME) or in place (--overwrite), or start from its weights (--{checkpoint.name}.weights "
            f"{quote(str(path))} --run NAME)"
        )
    raise UserError(f"{path}: was trained with different settings: {differing}. {advice}")


def compare(before: dict[str, Any], now: dict[str, Any], name: str, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting of the fingerprint `now` that differs: its name (RECIPE.SETTING for a recipe's) and both values."""
    for field, value in now.items():
        if isinstance(value, dict):
            inner = f"{name}." if field == "recipe" else prefix
            inner = f"{prefix}loss_options." if field == "loss_options" else inner
            yield from compare(before.get(field, {}), value, name, inner)
        elif (recorded := before.get(field, EARLIER.get(field))) != value:
            yield prefix + field, recorded, value


@on_rank0
def load_teacher_state(teacher: Model, dataset: Dataset) -> Checkpoint:
    """A finished teacher. Raises UserError if it is not trained yet, or with different settings."""
    checkpoint = load_finished(teacher.path)
    if not checkpoint:
        raise UserError(f"{teacher.path}: the teacher {teacher.name!r} is not trained yet; add it to --only")
    try:
        check_settings(teacher.path, checkpoint, training_settings(teacher, dataset))
    except UserError as error:
        raise UserError(f"{error}. To retrain this teacher, add it to --only") from None
    return checkpoint


def load_matching(path: Path, settings: dict[str, Any], overwrite: bool) -> Checkpoint | None:
    """The model to resume or to keep; None if there is none, or one that `overwrite` discards.

    That is one which was trained with different settings or by other code, or whose file is damaged. Raises UserError
    for different settings and a damaged file, unless `overwrite` is on.
    """
    try:
        checkpoint = load_training(path)
        if checkpoint:
            check_settings(path, checkpoint, settings)
    except UserError:
        if not overwrite:
            raise
        return None
    if checkpoint and overwrite and checkpoint.environment.get("code") != code_digest():
        return None
    return checkpoint


@on_rank0
def load_or_copy(model: Model, dataset: Dataset) -> Checkpoint | None:
    """A model, finished or not; that of a finished model with the same settings elsewhere; or None.

    Raises UserError as `load_matching` does.
    """
    settings = training_settings(model, dataset)
    checkpoint = load_matching(model.path, settings, model.config.overwrite)
    file = model.recipe.weights_file
    if checkpoint and file and not Path(file).exists() and checkpoint.config["recipes"][model.name]["weights"] != file:
        read_weights(file)  # which says that it is missing
    if checkpoint is None and (source := find_identical_model(model, settings)):
        checkpoint = replace(Checkpoint.load(source), name=model.name, config=asdict(model.config))
        checkpoint.save(model.path)
        logits = source.with_suffix(".logits")
        if logits.is_file():
            write_durably(model.logits_path, logits.read_bytes())
        log.info(f"{model.path}: copied from {source}, which was trained with the same settings")
    return checkpoint


def find_identical_model(model: Model, settings: dict[str, Any]) -> Path | None:
    """A finished model with these settings, by this code and in this precision, in any run under `checkpoints_path`.

    One of the same name is preferred; damaged ones are passed over. With precision = auto either one will do.
    """
    paths = Path(model.config.checkpoints_path).glob(f"*/seed{model.seed}/*.pt")
    for path in sorted(paths, key=lambda path: (path.stem != model.name, path)):
        found = read_metadata(path)
        if not found or not found.finished or found.settings != settings:
            continue
        if found.environment.get("code") != code_digest() or model.config.precision not in ("auto", found.precision):
            continue
        with contextlib.suppress(UserError):
            Checkpoint.load(path)
            return path
    return None


def logits_fingerprint(teacher_digest: str, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Every input that a teacher's stored logits depend on. They are computed in float32, whatever training uses."""
    return {"teacher": teacher_digest, "images": dataset.digest, "image_size": config.image_size}


def check_teacher(model: Model, checkpoint: Checkpoint) -> None:
    """Raise UserError if a student was distilled from other weights than the checkpoint of its teacher holds now."""
    teacher, recorded = model.teacher, checkpoint.settings.get("weights of the teacher")
    if teacher and recorded and weights_digest(teacher.path) not in (None, recorded):
        raise UserError(f"{model.path}: was distilled from a teacher that has been retrained since ({teacher.path})")
