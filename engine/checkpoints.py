"""Checkpoint files with a digest: models, finished or not, and the stored logits of teachers."""

import argparse
import dataclasses
import hashlib
import io
import os
import re
import warnings
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch

from engine.console import log
from engine.distributed import on_rank0
from engine.errors import UserError, first_line
from engine.fields import kind_of, problem_with, settings_of
from engine.files import check_file, write_durably
from engine.images import IMAGENET, Normalisation
from engine.settings import Config

FORMAT = 4
CODE = "{} (its code)"  # the key of a digest of the user's code in a fingerprint
LOGITS = "logits"  # the arch of a checkpoint that holds logits in place of weights
COMMENT = b"sha256 "  # a checkpoint is a zip file; its comment holds the digest of everything before the comment
RETRAIN = "move it away and train again"
# Harmless objects that training programs store beside their weights: the command line, and numbers of NumPy.
HARMLESS: list[Any] = [argparse.Namespace, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdg")]
HARMLESS += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
# What a checkpoint must hold beyond the types of Checkpoint's fields. A dict lists keys, a list holds any number.
CONTENT = {
    "settings": {"recipe": dict[str, Any], "config": dict[str, Any]},
    "config": {
        "recipes": dict[str, dict[str, Any]],
        "seeds": Any,
        "swept": dict[str, dict[str, dict]],
        "image_size": int,
    },
    "history": [{"epoch": int, "loss": float, "train_accuracy": float}],
}


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


def load_tensors(file: Path | io.BytesIO, mmap: bool = False) -> Any:
    """What torch.save has written, on the CPU: tensors and plain values. No code in it is executed.

    Raises an exception of any type, whose first line is the reason, for a foreign file.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = file.getbuffer().nbytes if isinstance(file, io.BytesIO) else file.stat().st_size
            if sum(part.file_size for part in archive.infolist()) > size:  # a bomb, say; torch.save compresses nothing
                raise ValueError("it is compressed")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats
            return torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    except UnpicklingError as error:  # torch's message advises to execute the code
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"it holds {name[1]}; only tensors and plain values are read") from None
        raise ValueError(str(error).partition("WeightsUnpickler error: ")[2] or "it is damaged or foreign") from None


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
        state = load_tensors(io.BytesIO(content))
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


def matches(value: Any, hint: Any) -> bool:
    """Whether a value has a type such as dict[str, list[float]], or the form of an entry of CONTENT."""
    if isinstance(hint, dict):
        return isinstance(value, dict) and all(matches(value.get(key), inner) for key, inner in hint.items())
    if isinstance(hint, list):
        return isinstance(value, list) and all(matches(item, hint[0]) for item in value)
    if hint is torch.Tensor:
        return is_plain(value)
    if hint in (Any, float):
        return hint is Any or type(value) in (int, float)
    type_, inner = get_origin(hint) or hint, get_args(hint)
    if not isinstance(value, type_) or not inner:
        return isinstance(value, type_)
    if type_ is dict:
        return all(matches(key, inner[0]) and matches(item, inner[1]) for key, item in value.items())
    return all(matches(item, inner[0]) for item in value)


def is_plain(tensor: Any) -> bool:
    """Whether this is a tensor of real numbers, each of which the file holds: neither sparse nor expanded."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    whole = tensor.nbytes <= tensor.untyped_storage().nbytes()
    return whole and not tensor.is_complex() and not tensor.is_quantized


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
    def from_state(cls, path: str | Path, state: dict[str, Any]) -> "Checkpoint":
        """Raises UserError if the dict in a file is not that of a model."""
        found = {**state, "weights": state.get("model")}
        types = get_type_hints(cls)
        del types["progress"]
        wrong = [name for name, hint in (types | CONTENT).items() if not matches(found.get(name), hint)]
        wrong = ["model" if name == "weights" else name for name in wrong]
        wrong += [] if isinstance(state.get("finished"), bool) else ["finished"]
        config = {} if "config" in wrong else state["config"]  # another version may have further settings, or fewer
        kinds = {field.name: kind_of(field) for field in settings_of(Config) if field.name in config}
        kinds = {name: kind for name, kind in kinds.items() if not kind.named}  # which may need a file of the user's
        wrong += filter(None, (problem_with(f"config.{name}", kind, config[name]) for name, kind in kinds.items()))
        if wrong:
            raise UserError(f"{path}: is not the checkpoint of a model (wrong: {', '.join(wrong)}); {RETRAIN}")
        others = {"format", "finished", "model", *types}
        progress = None if state["finished"] else {key: state[key] for key in state if key not in others}
        checkpoint = cls(**{name: found[name] for name in types}, progress=progress)
        for settings in (checkpoint.config, checkpoint.settings.get("config")):
            if settings:
                settings.setdefault("resize", "squash")  # in checkpoints from before there was a choice
        return checkpoint

    @classmethod
    def from_file(cls, path: Path, state: dict[str, Any]) -> "Checkpoint":
        """Raises UserError if the dict in a file is not that of a model, or of one that belongs elsewhere."""
        checkpoint = cls.from_state(path, state)
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
        return self.environment.get("precision", "fp32").partition(" ")[0]

    @property
    def training_state(self) -> dict[str, Any]:
        """What `Training` resumes from."""
        return {"model": self.weights, "history": self.history, **(self.progress or {})}

    def save(self, path: Path) -> None:
        """Write the file, and remove the exports of the model that was there before."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del state["weights"], state["progress"]
        save_checkpoint(path, {**state, "finished": self.finished, "model": self.weights, **(self.progress or {})})
        remove_exports(path)


@on_rank0
def remove_exports(path: Path) -> None:
    for export in (path.with_suffix(".pt2"), path.with_suffix(".onnx")):
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
        state = load_tensors(path, mmap=True)
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
