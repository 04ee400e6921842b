"""Set-up shared by the scripts: errors and signals, settings, device, data, and checks before training starts."""

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from engine import flags
from engine.checkpoints import recorded_precision
from engine.console import configure_logging, exit_on_signal, handle_signals, log
from engine.datasets import Dataset, load_dataset
from engine.device import (
    configure_backends,
    describe_precision,
    describe_threads,
    device_name,
    explain_device_errors,
    resolve_device,
)
from engine.distributed import main_process_first, on_rank0, process_group, world_size
from engine.errors import UserError, check_duplicate_keys, exit_on_error, locate_errors
from engine.estimate import Estimate, Job, check_models, check_space, plan
from engine.files import lock, write_durably
from engine.fingerprints import load_or_copy, load_teacher_state
from engine.reach import code_digest
from engine.recorded import recorded_config, with_baselines_of
from engine.settings import Config, Model


@contextlib.contextmanager
def run_script() -> Iterator[None]:
    """The context of a script's main: logging to stderr, one-line errors, exit on signals, the process group."""
    configure_logging()
    code_digest()  # of the code that runs: the files may be edited later
    with exit_on_error(), handle_signals(exit_on_signal, "SIGTERM", "SIGHUP"), process_group(), explain_device_errors():
        yield


def import_config() -> ModuleType:
    """config.py. Raises UserError, with file and line, for a mistake in it."""
    path = Path(__file__).with_name("config.py")
    check_duplicate_keys(path)
    with locate_errors(path):
        config = importlib.import_module("config")
        config.ALL_PRESETS, config.parse  # noqa: B018 - what the scripts use
    flags.check_presets(config.ALL_PRESETS)
    return config


def parse_recorded(argv: list[str] | None, script_flags: Mapping[str, str]) -> Config:
    """`config.parse`, except that --run without --preset means the models that lie in that run's folder."""
    parser = flags.Parser(add_help=False, allow_abbrev=False, argument_default=None)
    for name in ("run", "preset", "checkpoints_path"):
        parser.add_argument(f"--{name}")
    given, rest = parser.parse_known_args(argv)
    if given.run and not given.preset and not {"-h", "--help"}.intersection(rest):
        recorded = recorded_config(Path(given.checkpoints_path or "checkpoints", given.run).expanduser())
        by_flag = {word.partition("=")[0] for word in rest}
        names = {name for name in recorded.recipes if f"--{name}.baseline" not in by_flag}
        recorded = with_baselines_of(import_config().ALL_PRESETS.get(recorded.preset), recorded, names)
        return flags.parse({"recorded": recorded}, argv, script_flags)
    return flags.parse(import_config().ALL_PRESETS, argv, script_flags)


def load_config(argv: list[str] | None, script_flags: Mapping[str, str] | None = None) -> Config:
    """The config that config.py and the command line describe, its device resolved and configured.

    A script with flags of its own works on an existing run, whose settings are read from its checkpoints.
    """
    return set_up_device(parse_config(argv, script_flags))


def parse_config(argv: list[str] | None, script_flags: Mapping[str, str] | None = None) -> Config:
    """As `load_config`, but the device is not touched yet."""

    @on_rank0
    def parse() -> Config:
        if script_flags:
            return parse_recorded(argv, script_flags)
        return flags.parse(import_config().ALL_PRESETS, argv, {})

    return parse()


def set_up_device(config: Config) -> Config:
    """The config with its device resolved and configured."""
    config = main_process_first(lambda: resolve_device(config))
    configure_backends(config)
    return config


Estimates = dict[Model, Estimate]  # how long the training of each model will take


@contextlib.contextmanager
def open_run(models: list[Model]) -> Iterator[tuple[list[Model], Dataset, Estimates]]:
    """Load the images, lock the run's folder, check what would otherwise fail hours later, log the data and the device.

    Yields the models with their precision resolved, the data set and the estimates of what is left to train.
    """
    config = models[0].config
    dataset = load_training_data(config)
    with lock(Path(config.checkpoints_path, config.run)):
        models, estimates = prepare(models, dataset)
        yield models, dataset, estimates


def load_training_data(config: Config) -> Dataset:
    if config.sync_batchnorm and torch.device(config.device).type != "cuda":
        raise UserError(f"sync_batchnorm = True: PyTorch supports it on CUDA only, and the device is {config.device}")
    return load_dataset(config)


def prepare(models: list[Model], dataset: Dataset) -> tuple[list[Model], Estimates]:
    """What `open_run` does while it holds the lock: checks, the precision, the estimates, a line in the log."""

    @on_rank0
    def check_and_plan() -> tuple[Config, Estimates]:
        jobs, precision = unfinished(models, dataset)
        check_space(jobs, check_models(jobs, config, dataset), config, dataset)
        return plan(jobs, replace(config, precision=precision), dataset)

    config = models[0].config
    resolved, estimates = check_and_plan()
    config = replace(config, precision=resolved.precision)  # each rank keeps its own device
    log_few_steps(config, dataset)
    log_summary(config, dataset)
    return with_config(models, config), estimates


def with_config(models: Iterable[Model], config: Config) -> list[Model]:
    return [replace(model, config=config) for model in models]


def unfinished(models: list[Model], dataset: Dataset) -> tuple[list[Job], str]:
    """Which of the models are left to train, and the precision; copies models from other runs.

    precision = auto becomes that of the run's first checkpoint, if there is one. Raises UserError for a folder that
    cannot be written, a checkpoint that is damaged or was trained with different settings, and a teacher that is not
    among the models and not trained yet.
    """
    jobs: dict[Model, Job] = {}
    config = models[0].config
    if config.precision == "auto":
        config = replace(config, precision=recorded_precision(config) or "auto")
    for each in models:
        model = replace(each, config=config)
        probe = model.path.with_suffix(".probe")
        write_durably(probe, b"")
        probe.unlink()
        with contextlib.suppress(OSError):  # they are not empty
            model.path.parent.rmdir()
            model.path.parent.parent.rmdir()
        checkpoint = load_or_copy(model, dataset)
        if checkpoint and checkpoint.history and config.precision == "auto":
            config = replace(config, precision=checkpoint.precision)
            model = replace(each, config=config)
        epochs = model.recipe.epochs
        if model.teacher in jobs:  # which may change its weights
            jobs[model] = Job(model, epochs)
        elif not (checkpoint and checkpoint.finished):
            if model.teacher and model.teacher not in models:
                load_teacher_state(model.teacher, dataset)
            done = len(checkpoint.history) if checkpoint else 0
            jobs[model] = Job(model, epochs - done, resumed=checkpoint is not None)
    return list(jobs.values()), config.precision


def log_summary(config: Config, dataset: Dataset) -> None:
    validation = f", {len(dataset.validation.labels):,} validation" if dataset.validation else ""
    several = f", {world_size()} processes" if world_size() > 1 else ""
    pinned = ""
    if dataset.train.images.is_pinned():
        pinned = ", training images in host memory"
    log.info(
        f"{config.run}: {config.dataset}, {len(dataset.train.labels):,} training{validation} and "
        f"{len(dataset.test.labels):,} test images of {len(dataset.classes)} classes at {config.image_size} px; "
        f"{device_name(config)}{describe_threads(config)}{several}, {describe_precision(config)}{pinned}"
    )


def log_few_steps(config: Config, dataset: Dataset) -> None:
    """Say which selected recipes have fewer than ten steps an epoch, and what to do."""
    few: dict[tuple[int, int], list[str]] = {}  # steps and images -> the names
    for name in config.selected():
        images = config.recipes[name].train_size or len(dataset.train.labels)
        steps = images // config.batch_size
        if steps < 10 and config.recipes[name].epochs:
            few.setdefault((steps, images), []).append(name)
    for (steps, images), names in few.items():
        log.info(
            f"{', '.join(names)}: {steps} step{'s' if steps > 1 else ''} an epoch ({images:,} images, batch_size = "
            f"{config.batch_size}). If that is too few: more --epochs, or --batch_size {max(2, images // 10)}"
        )
