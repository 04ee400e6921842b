"""Several models at the same time, each in a worker: a process that trains one model after another.

Workers are started before anything is computed and keep the code that they have imported then, so that an edit during
the run changes nothing. A fork is safe as long as PyTorch has used neither threads nor a GPU.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from engine import console
from engine.console import log
from engine.settings import Model


class Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


@contextlib.contextmanager
def start_workers(work: Callable[..., None], jobs: int, method: str) -> Iterator[list[Worker]]:
    """Start processes that call `work` with the arguments that they are sent. When the context ends, they end, too.

    Those that are at work are asked to stop, which saves their state.
    """
    context: Any = multiprocessing.get_context(method)
    workers: list[Worker] = []
    try:
        for number in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(work, theirs, number))
            process.start()
            theirs.close()
            workers.append(Worker(process, ours))
        yield workers
    finally:
        for worker in workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
                if os.name == "posix":  # elsewhere this would kill it
                    worker.process.terminate()
        for worker in workers:
            worker.process.join()


def serve(work: Callable[..., None], pipe: Connection, number: int) -> None:
    """What a worker does until it is stopped, or until its parent has died. Its number is its `local_rank`."""
    os.environ["LOCAL_RANK"] = str(number)
    console.asked_to_stop = pipe.poll  # nothing else is sent before it has answered
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too; training handles it by itself
    threading.Thread(target=stop_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has died
        while (arguments := pipe.recv()) is not None:
            work(*arguments)
            pipe.send(None)


def stop_with_parent() -> None:
    """Send SIGTERM to this process when its parent has died, whatever the main thread is doing."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def run_in_workers(
    workers: list[Worker], models: dict[Model, Model | None], arguments: Callable[[Model], tuple[Any, ...]]
) -> None:
    """Send the arguments for each model to a worker that is free. `models` maps each to its teacher, or None.

    A teacher that is among them must finish first. Raises SystemExit with the status of the first worker that fails.
    """
    waiting, free = dict(models), list(workers)
    busy: dict[Worker, Model] = {}
    while waiting or busy:
        unfinished = {*waiting, *busy.values()}
        ready = [model for model, teacher in waiting.items() if teacher not in unfinished]
        for model in ready[: len(free)]:
            worker = free.pop(0)
            worker.pipe.send(arguments(model))
            busy[worker] = model
            del waiting[model]
        done = wait([worker.pipe for worker in busy])
        for worker in [worker for worker in busy if worker.pipe in done]:
            model = busy.pop(worker)
            try:
                worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                raise_status(worker.process, str(model))
            free.append(worker)


def raise_status(process: BaseProcess, what: str) -> None:
    """Raise SystemExit with the status of a process that has ended. One that was killed is named in the log."""
    code = process.exitcode or 0
    if code < 0:
        memory = ", as when memory runs out: try fewer --jobs" if code == -9 else ""
        log.info(f"{what}  was killed by signal {-code}{memory}; the same command resumes it")
    raise SystemExit(code if code > 0 else 128 - code)
