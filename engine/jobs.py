"""Several models at the same time, each in a process with its share of the CPU's threads."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

from engine.console import log

Model = tuple[str, int]  # name and seed


def run_in_processes(work: Callable[[Model, int], None], models: dict[Model, Model | None], jobs: int) -> None:
    """Call work(model, threads) for each model, each in a process of its own, at most `jobs` at a time.

    `models` maps each to its teacher, which must finish first if it is among them. If a process fails, or a
    signal arrives, the others are asked to stop, which saves their state. Raises SystemExit with the status of the
    first process that failed.
    """
    spawn, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // jobs)
    waiting, running = dict(models), {}

    def start(model: Model) -> BaseProcess:
        process = spawn.Process(target=work, args=(model, threads))
        process.start()
        return process

    try:
        while waiting or running:
            unfinished = {*waiting, *running.values()}
            ready = [model for model, teacher in waiting.items() if teacher not in unfinished]
            for model in ready[: jobs - len(running)]:
                running[start(model)] = model
                del waiting[model]
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                (name, seed), code = running.pop(process), process.exitcode
                if code < 0:
                    memory = ", as when memory runs out: try fewer --jobs" * (code == -signal.SIGKILL)
                    log.info(f"{name} seed {seed}  was killed by signal {-code}{memory}; the same command resumes it")
                if code:
                    raise SystemExit(code if code > 0 else 128 - code)
    finally:
        for process in running:
            with contextlib.suppress(OSError):
                process.terminate()
        for process in running:
            process.join()
