"""Several models at the same time, each in a process with its share of the CPU's threads.

With the start method "fork" a process goes on with the code that its parent has imported, with "spawn" it imports the
files as they are by then. A parent may fork as long as PyTorch has used neither threads nor a GPU in it.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from engine.console import log
from engine.settings import Model

T = TypeVar("T")


def start(method: str, function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Call a function in a process of its own."""
    context = multiprocessing.get_context(method)
    process = context.Process(target=function, args=arguments)  # type: ignore[attr-defined]  # its stub lacks Process
    process.start()
    return process


def call_in_process(function: Callable[[], T], method: str) -> T:
    """The result of `function`, called in a process of its own. Raises SystemExit with its status if it fails."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = start(method, send_result, function, sender)
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:  # it has failed, and its status says how
        result = None
    except BaseException:
        stop([process])
        raise
    process.join()
    check_exit(process, "the preparation")
    return result


def send_result(function: Callable[[], Any], sender: Connection) -> None:
    sender.send(function())


def run_in_processes(
    work: Callable[[Model, int], None], models: dict[Model, Model | None], jobs: int, method: str = "spawn"
) -> None:
    """Call work(model, threads) for each model, each in a process of its own, at most `jobs` at a time.

    `models` maps each to its teacher, which must finish first if it is among them. If a process fails, or a
    signal arrives, the others are asked to stop, which saves their state. Raises SystemExit with the status of the
    first process that failed.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = dict(models)
    running: dict[BaseProcess, Model] = {}
    try:
        while waiting or running:
            unfinished = {*waiting, *running.values()}
            ready = [model for model, teacher in waiting.items() if teacher not in unfinished]
            for model in ready[: jobs - len(running)]:
                running[start(method, work, model, threads)] = model
                del waiting[model]
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                check_exit(process, str(running.pop(process)))
    finally:
        stop(running)


def check_exit(process: BaseProcess, what: str) -> None:
    """Raise SystemExit with the status of a process that has failed. One that was killed is named in the log."""
    status = process.exitcode or 0
    if status < 0:
        memory = ", as when memory runs out: try fewer --jobs" if status == -signal.SIGKILL else ""
        log.info(f"{what}  was killed by signal {-status}{memory}; the same command resumes it")
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def stop(processes: Iterable[BaseProcess]) -> None:
    """Ask processes to stop, and wait until they have."""
    for process in processes:
        with contextlib.suppress(OSError):
            process.terminate()
    for process in processes:
        process.join()
