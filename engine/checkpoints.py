"""Checkpoint files with a digest: models, finished or not, and the stored logits of teachers."""

import hashlib
import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from engine.console import log
from engine.distributed import on_rank0
from engine.errors import UserError, first_line
from engine.files import write_durably
from engine.settings import Config

FORMAT = 3
COMMENT = b"sha256 "  # a checkpoint is a zip file; its comment holds the digest of everything before the comment
RETRAIN = "move it away and train again"


@on_rank0
def save_checkpoint(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) atomically: after a crash `path` holds the old state or the new one.

    The file is in PyTorch's own format, with the sha256 of its content in the zip comment, which PyTorch ignores.
    Raises UserError, and keeps the old file, if the folder cannot be written or the disk is full.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    body = buffer.getbuffer()[:-2]  # a zip file without a comment ends with the length of the comment, 0, in two bytes
    comment = COMMENT + hashlib.sha256(body).hexdigest().encode()
    write_durably(Path(path), body, len(comment).to_bytes(2, "little"), comment)


@on_rank0
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
        raise UserError(
            f"{path}: is damaged, or was not written by this program (it has no sha256); {RETRAIN}. To use weights of "
            "your own, keep them elsewhere and set RECIPE.weights to their path"
        )
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


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether `save_checkpoint` wrote this file, which may be damaged since."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(COMMENT) - 64))
        return file.read(len(COMMENT)) == COMMENT


def load_training(path: Path) -> dict[str, Any] | None:
    """The state of a training run, finished or not; None if there is no file. Raises UserError if it is not ours."""
    if not path.exists():
        return None
    state = load_checkpoint(path)
    types = {"name": str, "seed": int, "arch": str, "stem": str, "classes": list, "config": dict, "settings": dict}
    types |= {"normalisation": dict, "environment": dict, "finished": bool, "model": dict, "history": list}
    wrong = [key for key, type_ in types.items() if not isinstance(state.get(key), type_)]
    if wrong:
        raise UserError(f"{path}: is not the checkpoint of a model (wrong: {', '.join(wrong)}); {RETRAIN}")
    check_place(path, state)
    return state


def check_place(path: Path, state: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint does not lie where its name and its seed belong."""
    place = f"seed{state['seed']}/{state['name']}.pt"
    if path.parts[-2:] != tuple(place.split("/")):
        raise UserError(
            f"{path}: holds the model of {place}; it was copied or renamed. Move it away, or back to its place"
        )


@on_rank0
def save_model(path: Path, state: dict[str, Any]) -> None:
    """Save a model's checkpoint, and remove an export of the model that was there before."""
    save_checkpoint(path, state)
    export = path.with_suffix(".pt2")
    if export.exists():
        export.unlink()
        log.info(f"{export}: removed, because the model that it was exported from has been replaced")


@on_rank0
def load_finished(path: Path) -> dict[str, Any] | None:
    """The state of a finished training run; None if there is no file, or if it is still being trained."""
    state = load_training(path)
    return state if state and state["finished"] else None


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The state of a training run, its tensors not read and its digest not verified; None if that is impossible."""
    try:
        state = torch.load(path, "cpu", mmap=True, weights_only=True)
        return state if state["format"] == FORMAT and state["settings"] is not None else None
    except Exception:  # of many types, for a damaged or foreign file; it is reported when it is needed
        return None


@on_rank0
def recorded_precision(config: Config) -> str | None:
    """The precision of the first model that the run has trained; None if there is none, or none that can be read."""
    paths = sorted(Path(config.checkpoints_path, config.run).glob("seed*/*.pt"))
    settings = (state["settings"]["config"] for path in paths if (state := read_metadata(path)))
    return next((found["precision"] for found in settings if "precision" in found), None)


def nonfinite_tensors(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinite value."""
    floating = {name: tensor for name, tensor in tensors.items() if torch.is_floating_point(tensor)}
    if not floating:
        return []
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in floating.values()]).tolist()
    return [name for name, all_finite in zip(floating, finite, strict=True) if not all_finite]


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of names, shapes, types and bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_digest(path: Path) -> str | None:
    """The digest of the weights in a checkpoint; None if there is no file. Raises UserError if it is damaged."""
    return digest_of_version(path, path.stat().st_mtime_ns) if path.exists() else None


@lru_cache
def digest_of_version(path: Path, modified: int) -> str:
    return tensors_digest(load_training(path)["model"])


@on_rank0
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
