"""Checkpoint files with a digest, and their compatibility with the current settings."""

import hashlib
import io
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.console import log
from engine.datasets import Dataset
from engine.errors import UserError, first_line
from engine.files import write_durably
from engine.settings import ARCHS, DISTILLATION_FIELDS, Config, Recipe, settings_of

FORMAT = 1
COMMENT = b"sha256 "  # a checkpoint is a zip file; its comment holds the digest of everything before the comment
RETRAIN = "move it away and train again"


def checkpoint_path(config: Config, name: str, seed: int) -> Path:
    return Path(config.checkpoints_path, config.run, f"seed{seed}", f"{name}.pt")


def save_checkpoint(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) atomically: after a crash `path` holds the old state or the new one.

    The file is in PyTorch's own format, with the sha256 of its content in the zip comment, which PyTorch ignores.
    Raises UserError, and keeps the old file, if the folder cannot be written or the disk is full.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    comment = COMMENT + hashlib.sha256(content[:-2]).hexdigest().encode()
    # The last two bytes of a zip file without a comment are the length of the comment, 0.
    write_durably(Path(path), content[:-2] + len(comment).to_bytes(2, "little") + comment)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, verified, on the CPU. Raises UserError naming the file."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    comment_length = len(COMMENT) + 64
    body, tail = content[: -comment_length - 2], content[-comment_length - 2 :]
    length, comment = tail[:2], tail[2:]
    if not content.startswith(b"PK"):
        raise UserError(f"{path}: is not a checkpoint; {RETRAIN}")
    if length != comment_length.to_bytes(2, "little") or not comment.startswith(COMMENT):
        raise UserError(f"{path}: is damaged, or was not written by this program (it has no sha256); {RETRAIN}")
    if comment[len(COMMENT) :].decode(errors="replace") != hashlib.sha256(body).hexdigest():
        raise UserError(f"{path}: is damaged (its content does not match its sha256); {RETRAIN}")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can raise any exception; no code in it is executed
        raise UserError(
            f"{path}: is intact but cannot be loaded ({first_line(error)}); free some memory, or {RETRAIN}"
        ) from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path}: has format {found}, and this program reads format {FORMAT}; use the program that wrote it, or "
            f"{RETRAIN}"
        )
    return state


def load_training(path: Path) -> dict[str, Any] | None:
    """The state of a training run, finished or not; None if there is no file. Raises UserError if it is not ours."""
    if not path.exists():
        return None
    state = load_checkpoint(path)
    types = {"name": str, "settings": dict, "environment": dict, "finished": bool, "model": dict, "history": list}
    wrong = [key for key, type_ in {**types, "classes": list}.items() if not isinstance(state.get(key), type_)]
    wrong += ["arch"] * (state.get("arch") not in ARCHS)
    if wrong:
        raise UserError(f"{path}: is not the checkpoint of a model (wrong: {', '.join(wrong)}); {RETRAIN}")
    return state


def load_finished(path: Path) -> dict[str, Any] | None:
    """The state of a finished training run; None if there is no file, or if it is still being trained."""
    state = load_training(path)
    return state if state and state["finished"] else None


def recorded_precision(config: Config) -> str | None:
    """The precision of the first checkpoint of the run; None if there is none, or none that can be read."""
    for path in sorted(Path(config.checkpoints_path, config.run).glob("seed*/*.pt")):
        try:
            return load_training(path)["settings"].get("precision")
        except UserError:
            continue  # it is reported when it is needed
    return None


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of names, shapes, types and bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights_digest(path: Path) -> str | None:
    """The digest of the weights in a checkpoint; None if there is no file."""
    state = load_training(path)
    return tensors_digest(state["model"]) if state else None


def training_settings(
    name: str, seed: int, config: Config, dataset: Dataset, teacher_digest: str | None
) -> dict[str, Any]:
    """The fingerprint of a model: every setting that its weights depend on.

    Without a digest the teacher's weights are left out: there is no teacher, or its checkpoint is gone.
    """
    recipe = asdict(config.recipes[name])
    for unused in ("baseline", *(() if recipe["teacher"] else DISTILLATION_FIELDS)):
        del recipe[unused]
    shared = ("image_size", "horizontal_flip", "crop_padding", "validation_size", "batch_size")
    return {
        "seed": seed,
        **{f"{name}.{field}": value for field, value in recipe.items()},
        **{field: getattr(config, field) for field in (*shared, "precision", "sync_batchnorm")},
        "images of the data set": dataset.digest,
        **({"weights of the teacher": teacher_digest} if teacher_digest else {}),
    }


def refuse_other_settings(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise UserError, naming what differs, if a checkpoint was trained with different settings."""

    def abbreviate(value: Any) -> Any:
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value

    # A checkpoint older than a setting was trained with its default.
    trained_with = {field.name: field.default for field in settings_of(Config)}
    trained_with |= {f"{state['name']}.{field.name}": field.default for field in settings_of(Recipe)}
    trained_with |= {"seed": state.get("seed"), **state["settings"]}
    differing = [
        f"{field} was {abbreviate(trained_with.get(field))}, is now {abbreviate(value)}"
        for field, value in settings.items()
        if trained_with.get(field) != value
    ]
    if differing:
        raise UserError(
            f"{path}: was trained with different settings: {'; '.join(differing)}. Restore them, choose another "
            "name for this experiment (--run NAME), or retrain in place (--overwrite)"
        )


def load_matching(path: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The state to resume from; None if there is none, or one that `overwrite` discards.

    Raises UserError if the file is damaged or was trained with different settings, unless `overwrite` is on.
    """
    try:
        state = load_training(path)
        if state:
            refuse_other_settings(path, state, settings)
    except UserError:
        if not overwrite:
            raise
        return None
    return state


def logits_path(config: Config, teacher: str, seed: int) -> Path:
    return checkpoint_path(config, teacher, seed).with_suffix(".logits")


def logits_fingerprint(teacher_digest: str, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Every input that a teacher's stored logits depend on."""
    fields = ("validation_size", "image_size", "precision")
    settings = {field: getattr(config, field) for field in fields}
    return {"teacher": teacher_digest, "images": dataset.digest, **settings}


def load_logits(path: Path, fingerprint: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
    """A teacher's stored logits; NaN if there are none, and, with a message, if they are damaged or of other inputs."""
    missing = torch.full(shape, torch.nan)
    if not path.exists():
        return missing
    try:
        state = load_checkpoint(path)
    except UserError as error:
        log.info(f"{error.messages[0].split(';')[0]}; computing them again")
        return missing
    logits, found = state.get("logits"), state.get("fingerprint")
    stale = [key for key, value in fingerprint.items() if not isinstance(found, dict) or found.get(key) != value]
    stale += ["shape"] * (not isinstance(logits, torch.Tensor) or logits.shape != shape)
    if stale:
        log.info(f"{path}: do not match (different {' and '.join(stale)}); computing them again")
        return missing
    return logits
