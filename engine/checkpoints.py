"""Checkpoint files with a digest: models, finished or not, and the stored logits of teachers."""

import dataclasses
import hashlib
import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch

from engine.console import log
from engine.distributed import on_rank0
from engine.errors import UserError, first_line
from engine.files import check_file, write_durably
from engine.images import IMAGENET, Normalisation
from engine.settings import Config

FORMAT = 4
CODE = "{} (its code)"  # the key of a digest of the user's code in a fingerprint
LOGITS = "logits"  # the arch of a checkpoint that holds logits in place of weights
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
    # A zip file without a comment ends with the length of the comment, 0, in two bytes. The views are closed first: one
    # that outlives its buffer, as in the traceback of an error, ends Python 3.12.1 with signal 11.
    with buffer.getbuffer() as content, content[:-2] as body:
        comment = COMMENT + hashlib.sha256(body).hexdigest().encode()
        write_durably(Path(path), body, len(comment).to_bytes(2, "little"), comment)


@on_rank0
def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, verified, on the CPU. Raises UserError naming the file."""
    path = Path(path)
    try:
        check_file(path)
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


@dataclass(frozen=True)
class Checkpoint:
    """What the .pt file of a model holds, finished or not: a dict of these fields, the weights under "model"."""

    name: str
    seed: int
    arch: str
    stem: str
    classes: list[str]
    normalisation: dict[str, list[float]]  # mean and std, see engine.images.Normalisation
    settings: dict[str, Any]  # the fingerprint, see engine.fingerprints
    config: dict[str, Any]  # the experiment, as dataclasses.asdict gives it
    environment: dict[str, str]
    history: list[dict[str, float]]  # a record for each epoch
    weights: dict[str, torch.Tensor]
    progress: dict[str, Any] | None = None  # optimizer, scheduler, step, totals, seconds; None: it is finished

    @classmethod
    def from_file(cls, path: Path, state: dict[str, Any]) -> "Checkpoint":
        """Raises UserError if the dict in a file is not that of a model, or of one that belongs elsewhere."""
        found = {**state, "weights": state.get("model")}
        types = {name: get_origin(hint) or hint for name, hint in get_type_hints(cls).items()}
        del types["progress"]
        wrong = [name for name, type_ in types.items() if not isinstance(found.get(name), type_)]
        if wrong or not isinstance(state.get("finished"), bool):
            wrong = ["model" if name == "weights" else name for name in wrong] or ["finished"]
            raise UserError(f"{path}: is not the checkpoint of a model (wrong: {', '.join(wrong)}); {RETRAIN}")
        others = {"format", "finished", "model", *types}
        progress = None if state["finished"] else {key: state[key] for key in state if key not in others}
        checkpoint = cls(**{name: found[name] for name in types}, progress=progress)
        for settings in (checkpoint.config, checkpoint.settings.get("config")):
            if settings:
                settings.setdefault("resize", "squash")  # in checkpoints from before there was a choice
        place = f"seed{checkpoint.seed}/{checkpoint.name}.pt"
        if path.parts[-2:] != tuple(place.split("/")):
            raise UserError(
                f"{path}: holds the model of {place}; it was copied or renamed. Move it away, or back to its place"
            )
        return checkpoint

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Raises UserError if the file cannot be read, is damaged or holds something else."""
        return cls.from_file(path, load_checkpoint(path))

    @property
    def given_logits(self) -> torch.Tensor | None:
        """Those of a model that is only logits (R, C), by Split.ids; NaN where there are none."""
        return self.weights["logits"] if self.arch == LOGITS else None

    @property
    def digest(self) -> str:
        """sha256 of the weights and, if it is not ImageNet's, of the normalisation that they were trained with."""
        other = Normalisation.recorded(self.normalisation) != IMAGENET
        statistics = {name: torch.tensor(values) for name, values in self.normalisation.items()} if other else {}
        return tensors_digest({**self.weights, **statistics})

    @property
    def finished(self) -> bool:
        return self.progress is None

    @property
    def precision(self) -> str:
        """That of its training: fp32 or bf16."""
        return self.environment.get("precision", "fp32").split()[0]

    @property
    def training_state(self) -> dict[str, Any]:
        """What `Training` resumes from."""
        return {"model": self.weights, "history": self.history, **(self.progress or {})}

    def save(self, path: Path) -> None:
        """Write the file, and remove an export of the model that was there before."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del state["weights"], state["progress"]
        save_checkpoint(path, {**state, "finished": self.finished, "model": self.weights, **(self.progress or {})})
        remove_export(path)


@on_rank0
def remove_export(path: Path) -> None:
    export = path.with_suffix(".pt2")
    if export.exists():
        export.unlink()
        log.info(f"{export}: removed, because the model that it was exported from has been replaced")


def load_training(path: Path) -> Checkpoint | None:
    """A model, finished or not; None if there is no file. Raises UserError if it is not ours."""
    return Checkpoint.load(path) if path.exists() else None


@on_rank0
def load_finished(path: Path) -> Checkpoint | None:
    """A finished model; None if there is no file, or if it is still being trained."""
    checkpoint = load_training(path)
    return checkpoint if checkpoint and checkpoint.finished else None


def read_metadata(path: Path) -> Checkpoint | None:
    """A model, its tensors not read and its digest not verified; None if that is impossible."""
    try:
        check_file(path)
        state = torch.load(path, "cpu", mmap=True, weights_only=True)
        return Checkpoint.from_file(path, state) if state["format"] == FORMAT else None
    except Exception:  # of many types, for a damaged or foreign file; it is reported when it is needed
        return None


@on_rank0
def recorded_precision(config: Config) -> str | None:
    """The precision of the first model that the run has trained; None if there is none, or none that can be read."""
    for path in sorted(Path(config.checkpoints_path, config.run).glob("seed*/*.pt")):
        checkpoint = read_metadata(path)
        if checkpoint and (checkpoint.history or checkpoint.progress):  # not weights that are used as they are
            return checkpoint.precision
    return None


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
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(path: Path) -> str | None:
    """The digest of a checkpoint; None if there is no file. Raises UserError if it is damaged."""
    return digest_of_version(path, path.stat().st_mtime_ns) if path.exists() else None


@lru_cache
def digest_of_version(path: Path, modified: int) -> str:
    return Checkpoint.load(path).digest


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
    if not isinstance(logits, torch.Tensor) or logits.shape != shape:
        stale.append("shape")
    elif not stale:
        return logits
    log.info(f"{path}: do not match (different {' and '.join(stale)}); computing them again")
    return missing
