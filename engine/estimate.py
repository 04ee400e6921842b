"""Before a run starts: which precision is faster, how long it will take, and whether the disk has room."""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from engine.checkpoints import checkpoint_path
from engine.console import duration, log
from engine.datasets import Dataset
from engine.device import autocast, explain_device_errors, memory_format, supports_bf16, synchronize
from engine.distributed import world_size
from engine.errors import UserError
from engine.images import prepare
from engine.settings import Config

BuildModel = Callable[[str, int], nn.Module]  # (arch, number of classes) -> model with random weights


class Job(NamedTuple):
    """A model that is still to be trained or resumed."""

    name: str
    seed: int
    epochs: int  # left


class Estimate(NamedTuple):
    """Expected seconds of training: of one model, and of all models after it."""

    model: float = 0.0
    later: float = 0.0


UNKNOWN = Estimate()


def time_training(
    build: BuildModel, archs: Iterable[str], config: Config, dataset: Dataset, precisions: Iterable[str]
) -> dict[tuple[str, str], float]:
    """Seconds per training image for each (arch, precision): the fastest of a few steps, after one to warm up.

    The precisions alternate, so that drift in the machine's speed affects all. On a CPU a step has at most 32 images.
    """
    count = min(config.batch_size, 32) if config.device == "cpu" else config.batch_size
    images = dataset.train.images[:count].to(config.device)
    images, labels = prepare(images, config.image_size), dataset.train.labels[:count]
    fastest: dict[tuple[str, str], float] = {}
    for arch in archs:
        model = build(arch, len(dataset.classes)).to(config.device, memory_format=memory_format(config.device))
        started = time.perf_counter()
        for turn in range(10):
            for precision in precisions:
                synchronize(config.device)
                before = time.perf_counter()
                with autocast(config.device, precision):
                    logits = model(images)
                F.cross_entropy(logits.float(), labels).backward()
                synchronize(config.device)
                seconds = (time.perf_counter() - before) / count
                if turn > 0:
                    fastest[arch, precision] = min(seconds, fastest.get((arch, precision), seconds))
            if turn >= 2 and time.perf_counter() - started > 2:
                break
    return fastest


def plan(
    jobs: list[Job], recorded: str | None, build: BuildModel, config: Config, dataset: Dataset
) -> tuple[Config, dict[tuple[str, int], Estimate]]:
    """Resolve `precision` = auto, and estimate the time of each job (name, seed).

    auto means `recorded`, the precision of the run's checkpoints, else the one that trains the jobs faster.
    """
    precisions = [recorded or "fp32"] if config.precision == "auto" else [config.precision]
    if config.precision == "auto" and recorded is None and supports_bf16(config.device):
        precisions = ["fp32", "bf16"]
    archs = dict.fromkeys(config.recipes[job.name].arch for job in jobs)
    with explain_device_errors(config):
        per_image = time_training(build, archs, config, dataset, precisions)

    def seconds(job: Job, precision: str) -> float:
        recipe = config.recipes[job.name]
        trained, evaluated = len(dataset.subset(recipe.train_size)), len(dataset.held_out[1].labels)
        images = job.epochs * (trained + evaluated / 3)  # a forward pass costs about a third of a step
        return images * per_image[recipe.arch, precision] / world_size()

    chosen = min(precisions, key=lambda precision: sum(seconds(job, precision) for job in jobs))
    if jobs and len(precisions) > 1:
        other = "fp32" if chosen == "bf16" else "bf16"
        rates = (
            f"{arch} trains at {1 / per_image[arch, chosen]:,.1f} images/s, in {other} at "
            f"{1 / per_image[arch, other]:,.1f}"
            for arch in archs
        )
        log.info(f"precision = auto: {chosen} is faster for this run; {'; '.join(rates)}")
    each = [seconds(job, chosen) for job in jobs]
    estimates = {(job.name, job.seed): Estimate(each[i], sum(each[i + 1 :])) for i, job in enumerate(jobs)}
    if sum(each) > 3600:
        log.info(
            f"This will take about {duration(sum(each))} on this machine. For a quick demo: "
            "python teacher_student_model.py --preset demo"
        )
    return replace(config, precision=chosen), estimates


def space_needed(jobs: list[Job], build: BuildModel, config: Config, dataset: Dataset) -> int:
    """Upper bound on the bytes on disk that the jobs take, including what is there already."""

    def weights(name: str) -> int:
        with torch.device("meta"):
            return sum(
                tensor.nbytes for tensor in build(config.recipes[name].arch, len(dataset.classes)).state_dict().values()
            )

    sizes = {job.name: weights(job.name) for job in jobs}
    logits = 2 * len(dataset.train.labels) * len(dataset.classes) * 4
    distilled = sum(config.recipes[job.name].teacher is not None for job in jobs)
    # A checkpoint of an unfinished model includes the momentum, and the old and the new file coexist.
    return sum(sizes[job.name] for job in jobs) + 4 * max(sizes.values()) + (distilled + (distilled > 0)) * logits


def check_space(jobs: list[Job], build: BuildModel, config: Config, dataset: Dataset) -> None:
    """Raise UserError, before anything is trained, if the disk is too full for the jobs."""
    if not jobs:
        return
    there = sum(p.stat().st_size for job in jobs if (p := checkpoint_path(config, job.name, job.seed)).exists())
    free = shutil.disk_usage(Path(config.checkpoints_path, config.run)).free + there
    needed = space_needed(jobs, build, config, dataset)
    if free < needed:
        raise UserError(
            f"{config.checkpoints_path}: this run needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free "
            "there. Free some space or choose another folder (--checkpoints_path)"
        )
