"""Before a run starts: whether its models fit, which precision is faster, how long it takes, and the room on disk."""

import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine import soft_losses
from engine.console import duration, log
from engine.datasets import Dataset
from engine.device import forward_pass, place, supports_bf16, synchronize
from engine.distributed import world_size
from engine.errors import UserError
from engine.given_logits import read_logits
from engine.images import prepare
from engine.models import Architecture, check_image_size, initial_model
from engine.named import is_named
from engine.settings import Config, Model


class Job(NamedTuple):
    """A model that is still to be trained or resumed."""

    model: Model
    epochs: int  # left
    resumed: bool = False


class Estimate(NamedTuple):
    """Expected seconds: of a model's own training steps, and of all models after it with everything that they need."""

    model: float = 0.0
    later: float = 0.0


UNKNOWN = Estimate()


def time_training(
    archs: Iterable[Architecture], config: Config, dataset: Dataset, precisions: Iterable[str]
) -> dict[tuple[Architecture, str], float]:
    """Seconds per training image for each (architecture, precision): the fastest of a few steps, after a warm-up.

    A step has as many images as one process trains on, on a CPU at most 32. The precisions alternate, so that drift in
    the machine's speed affects all.
    """
    count = config.batch_size // world_size()
    count = min(count, 32) if config.device == "cpu" else count
    images = dataset.train.images[:count].to(config.device)
    images, labels = prepare(images, config.image_size), dataset.train.labels[:count]
    fastest: dict[tuple[Architecture, str], float] = {}
    for arch in archs:
        model = place(arch.build(len(dataset.classes)), config.device)
        started = time.perf_counter()
        for turn in range(10):
            for precision in precisions:
                synchronize(config.device)
                before = time.perf_counter()
                with forward_pass(config.device, precision):
                    logits = model(images)
                F.cross_entropy(logits.float(), labels).backward()
                synchronize(config.device)
                seconds = (time.perf_counter() - before) / count
                if turn > 0:
                    fastest[arch, precision] = min(seconds, fastest.get((arch, precision), seconds))
            if turn >= 2 and time.perf_counter() - started > 2:
                break
    return fastest


def plan(jobs: list[Job], config: Config, dataset: Dataset) -> tuple[Config, dict[Model, Estimate]]:
    """Resolve precision = auto to the one that trains the jobs faster, and estimate the time of each (name, seed)."""
    precisions = [config.precision]
    if config.precision == "auto":
        precisions = ["fp32", "bf16"] if supports_bf16(config.device) else ["fp32"]
    training = [job for job in jobs if job.epochs]
    asked = teachers_asked(training, config, dataset)
    archs = [Architecture.of(job.model.recipe) for job in training]
    archs += [teacher for teacher, _ in asked.values()]
    per_image = time_training(dict.fromkeys(archs), config, dataset, precisions)
    torch.cuda.empty_cache()  # with --jobs, other processes need the memory

    def seconds(job: Job, precision: str) -> tuple[float, float]:
        """Of the training steps, and of all that the job needs. A forward pass costs about a third of a step."""
        if not job.epochs:
            return 0.0, 0.0
        recipe = job.model.recipe
        step = per_image[Architecture.of(recipe), precision]
        steps = job.epochs * len(dataset.subset(recipe.train_size, recipe.train_subset)) * step
        total = steps + job.epochs * len(dataset.held_out[1].labels) * step / 3
        if job in asked:
            teacher, images = asked[job]
            total += images * per_image[teacher, precision] / 3
        return steps / world_size(), total / world_size()

    chosen = min(precisions, key=lambda precision: sum(seconds(job, precision)[1] for job in jobs))
    if archs and len(precisions) > 1:
        other = "fp32" if chosen == "bf16" else "bf16"
        rates = (
            f"{arch} trains at {1 / per_image[arch, chosen]:,.1f} images/s, in {other} at "
            f"{1 / per_image[arch, other]:,.1f}"
            for arch in dict.fromkeys(archs)
        )
        log.info(f"precision = auto: {chosen} is faster for this run; {'; '.join(rates)}")
    each = [seconds(job, chosen)[1] for job in jobs]
    estimates = {job.model: Estimate(seconds(job, chosen)[0], sum(each[i + 1 :])) for i, job in enumerate(jobs)}
    if sum(each) > 60:
        demo = " For a quick demo: python teacher_student_model.py --preset demo" if sum(each) > 3600 else ""
        log.info(f"This will take about {duration(sum(each))} on this machine.{demo}")
    return replace(config, precision=chosen), estimates


def teachers_asked(jobs: list[Job], config: Config, dataset: Dataset) -> dict[Job, tuple[Architecture, int]]:
    """For each job that needs its teacher's logits: the teacher, and the number of images that it classifies.

    Logits that are stored are computed for the first student of a teacher, on the images that all of them need, unless
    there is a file of them already.
    """
    students: dict[Model, list[Job]] = {}
    for job in jobs:
        if (teacher := job.model.teacher) and not teacher.recipe.logits_file:
            students.setdefault(teacher, []).append(job)
    views = (config.horizontal_flip < 1) + (config.horizontal_flip > 0)
    trained = {job.model for job in jobs}
    asked: dict[Job, tuple[Architecture, int]] = {}
    for teacher, taught in students.items():
        arch = Architecture.of(teacher.recipe)
        subsets = [dataset.subset(job.model.recipe.train_size, job.model.recipe.train_subset) for job in taught]
        if config.unlimited_views:
            asked |= {job: (arch, job.epochs * len(subset)) for job, subset in zip(taught, subsets, strict=True)}
        elif teacher in trained or not teacher.logits_path.exists():
            asked[taught[0]] = arch, views * len(torch.cat(subsets).unique())
    return asked


def check_models(jobs: list[Job], config: Config, dataset: Dataset) -> dict[str, int]:
    """Build the model that each job starts from; returns the bytes of its weights by recipe.

    Raises UserError, before anything is trained, if weights are missing or do not fit, or if the images do not.
    """
    sizes = {}
    for name in dict.fromkeys(job.model.name for job in jobs):
        recipe = config.recipes[name]
        if recipe.logits_file:
            sizes[name] = read_logits(recipe, dataset).nbytes
            continue
        resumed = all(job.resumed for job in jobs if job.model.name == name)  # and needs no initial weights
        arch = Architecture.of(recipe)
        model = arch.build(len(dataset.classes)) if resumed else initial_model(recipe, dataset.classes)
        check_image_size(model, recipe.arch, config.image_size, len(dataset.classes))
        if not resumed and not recipe.imagenet_weights and not recipe.weights_file:
            steps = recipe.epochs * (len(dataset.subset(recipe.train_size, recipe.train_subset)) // config.batch_size)
            warn_of_slow_batchnorm(name, model, steps)
        if recipe.teacher and is_named(recipe.soft_loss):
            soft_losses.check(recipe.soft_loss, recipe.soft_loss_options, len(dataset.classes))
        sizes[name] = sum(tensor.nbytes for tensor in model.state_dict().values())
    return sizes


def warn_of_slow_batchnorm(name: str, model: nn.Module, steps: int) -> None:
    """Say if so few steps leave the running statistics of BatchNorm near their initial values.

    Only evaluation uses them. After n steps with momentum m the initial value still counts (1 - m)^n; below 2% is fine.
    """
    momenta = [layer.momentum for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.momentum]
    if momenta and steps and (1 - min(momenta)) ** steps > 0.02:
        needed = math.ceil(math.log(0.02) / math.log1p(-min(momenta)))
        log.info(
            f"warning: {name} has {steps:,} step{'s' * (steps > 1)}, and the running statistics of its BatchNorm "
            f"(momentum {min(momenta):g}) need {needed:,} or more. Evaluation uses these, so its accuracy may stay low "
            "while the training accuracy rises. More --epochs or a smaller --batch_size helps"
        )


def space_needed(jobs: list[Job], sizes: dict[str, int], config: Config, dataset: Dataset) -> int:
    """Upper bound on the bytes on disk that the jobs take, including what is there already."""
    logits = 2 * len(dataset.train.labels) * len(dataset.classes) * 4
    distilled = sum(job.model.teacher is not None for job in jobs)
    # The checkpoint of an unfinished model includes the optimizer's state, and the old and the new file coexist.
    moments = max(2 if config.recipes[name].optimizer == "adamw" else 1 for name in sizes)
    best = any(config.recipes[name].keep == "best" for name in sizes)
    unfinished = min(config.jobs, len(jobs)) * 2 * (1 + moments + best) * max(sizes.values())
    return sum(sizes[job.model.name] for job in jobs) + unfinished + (distilled + (distilled > 0)) * logits


def check_space(jobs: list[Job], sizes: dict[str, int], config: Config, dataset: Dataset) -> None:
    """Raise UserError, before anything is trained, if the disk is too full for the jobs."""
    if not jobs:
        return
    there = sum(job.model.path.stat().st_size for job in jobs if job.model.path.exists())
    free = shutil.disk_usage(config.checkpoints_path).free + there
    needed = space_needed(jobs, sizes, config, dataset)
    if free < needed:
        raise UserError(
            f"{config.checkpoints_path}: this run needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free "
            "there. Free some space or choose another folder (--checkpoints_path)"
        )
