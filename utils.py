"""Set-up shared by the scripts: errors and signals, settings, device, data, and checks before training starts."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from engine.checkpoints import checkpoint_path, load_finished, load_matching, recorded_precision, training_settings
from engine.console import configure_logging, exit_on_signal, handle_signals, log
from engine.datasets import Dataset, load_dataset
from engine.device import configure_backends, describe_precision, device_name, resolve_device
from engine.distributed import broadcast_from_rank0, main_process_first, process_group, world_size
from engine.errors import UserError, exit_on_error, locate_errors
from engine.estimate import BuildModel, Estimate, Job, check_space, plan
from engine.files import lock, write_durably
from engine.settings import Config

with exit_on_error(), locate_errors():  # a mistake in an edited config.py is one line, not a traceback
    import config as settings


@contextlib.contextmanager
def run_script() -> Iterator[None]:
    """The context of a script's main: logging to stderr, one-line errors, exit on signals, the process group."""
    configure_logging()
    with exit_on_error(), handle_signals(exit_on_signal, "SIGTERM", "SIGHUP"), process_group():
        yield


def load_config(argv: list[str] | None, script_flags: Mapping[str, str] | None = None) -> Config:
    """The config that config.py and the command line describe, its device resolved and configured."""
    config = broadcast_from_rank0(lambda: settings.parse(argv, script_flags))
    config = main_process_first(lambda: resolve_device(config))
    configure_backends(config)
    return config


Estimates = dict[tuple[str, int], Estimate]  # (name, seed) -> how long its training will take


@contextlib.contextmanager
def start_training(config: Config, names: list[str], build: BuildModel) -> Iterator[tuple[Config, Dataset, Estimates]]:
    """Load the images, lock the run's folder, check what would otherwise fail hours later, log the data and the device.

    Yields the config with its precision resolved, the data set and the estimates of what is left to train.
    """
    dataset = load_dataset(config)
    with lock(Path(config.checkpoints_path, config.run)):

        def check_and_plan() -> tuple[Config, Estimates]:
            jobs = unfinished(names, config, dataset)
            check_space(jobs, build, config, dataset)
            recorded = recorded_precision(config) if config.precision == "auto" else None
            return plan(jobs, recorded, build, config, dataset)

        resolved, estimates = broadcast_from_rank0(check_and_plan)
        config = replace(config, precision=resolved.precision)  # each rank keeps its own device
        log_summary(config, dataset)
        yield config, dataset, estimates


def unfinished(names: list[str], config: Config, dataset: Dataset) -> list[Job]:
    """What is left to train.

    Raises UserError for a folder that cannot be written, a checkpoint that is damaged or was trained with different
    settings, and a teacher that is neither trained nor going to be.
    """
    jobs = []
    for seed in config.seeds:
        for name in names:
            path, epochs = checkpoint_path(config, name, seed), config.recipes[name].epochs
            probe = path.with_suffix(".probe")
            write_durably(probe, b"")
            probe.unlink()
            settings = training_settings(name, seed, config, dataset, None)
            if config.precision == "auto":  # not resolved yet
                del settings["precision"]
            state = load_matching(path, settings, config.overwrite)
            if not (state and state["finished"]):
                teacher = config.recipes[name].teacher
                if teacher and teacher not in names and not load_finished(checkpoint_path(config, teacher, seed)):
                    missing = checkpoint_path(config, teacher, seed)
                    raise UserError(f"{missing}: the teacher {teacher!r} is not trained yet; add it to --only")
                jobs.append(Job(name, seed, epochs - len(state["history"]) if state else epochs))
    return jobs


def log_summary(config: Config, dataset: Dataset) -> None:
    validation = f", {len(dataset.validation.labels):,} validation" if dataset.validation else ""
    pinned = ", training images in host memory, as they do not fit on the device" * dataset.train.images.is_pinned()
    several = f", {world_size()} processes" * (world_size() > 1)
    log.info(
        f"{config.run}: {config.dataset}, {len(dataset.train.labels):,} training{validation} and "
        f"{len(dataset.test.labels):,} test images of {len(dataset.classes)} classes at {config.image_size} px; "
        f"{device_name(config)}{several}, {describe_precision(config)}{pinned}"
    )
