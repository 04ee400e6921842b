"""Log lines, progress, and signals: what is shown while a script runs, and what Ctrl-C and SIGTERM do."""

import contextlib
import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from engine.distributed import rank, world_size
from engine.errors import UserError, escape_control

log = logging.getLogger("distillation")


class StderrHandler(logging.Handler):
    """Write to stderr, above a progress bar, on rank 0. A closed stderr does not end a run."""

    def emit(self, record: logging.LogRecord) -> None:
        if rank() == 0:
            with contextlib.suppress(OSError, RuntimeError):
                tqdm.write(escape_control(record.getMessage()), file=sys.stderr)


def configure_logging() -> None:
    log.handlers = [StderrHandler()]
    log.setLevel(logging.INFO)


def print_result(text: str) -> None:
    """Print to stdout, escaping what its encoding lacks; a closed pipe (`| head`) is no error, a full disk is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left as it exits
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"the standard output cannot be written ({error.strerror})") from None


def duration(seconds: float) -> str:
    """Such as 2 h 5 min, 12 min or 40 s."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours and rest else f"{hours} h" if hours else f"{rest} min"


class Progress:
    """Progress through `total` images: a bar on a terminal, elsewhere a log line every minute."""

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.first = title, done
        # A process beside others logs instead of drawing over their bars. None: silent where stderr is not a terminal.
        silent = True if rank() > 0 or multiprocessing.parent_process() else None
        self.bar = tqdm(
            total=total, initial=done, desc=title, unit=" images", leave=False, mininterval=0.5, disable=silent
        )
        self.done = done
        self.started = self.logged = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    @property
    def rate(self) -> float:
        """Images per second since this object was made."""
        return (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)

    def update(self, images: int) -> bool:
        """Count images; True if it is time to `describe` the work again: twice a second, or once a minute in a log."""
        self.done += images
        return bool(self.bar.update(images) or (self.bar.disable and time.monotonic() - self.logged > 60))

    def describe(self, text: str = "") -> None:
        """Show, next to the progress, a text such as the current loss."""
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
        elif time.monotonic() - self.logged > 60:
            self.logged = time.monotonic()
            share = self.done / self.bar.total
            log.info(f"{self.title}  {share:4.0%}  {self.rate:,.1f} images/s  {text}".rstrip())


Handler = Callable[[int, Any], None]


@contextlib.contextmanager
def handle_signals(handler: Handler, *names: str) -> Iterator[dict[int, Any]]:
    """Handle these signals, where the system has them, with `handler`. Yields the previous handlers.

    A SIGHUP that is ignored stays ignored: this is how nohup lets a run outlive its terminal. Outside of the main
    thread, as in a notebook's or a server's, no signal can be handled, and none is.
    """
    if threading.current_thread() is not threading.main_thread():
        names = ()
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names if hasattr(signal, name)}
    before = {n: old for n, old in before.items() if not (n.name == "SIGHUP" and old is signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def exit_on_signal(number: int, frame: Any) -> None:
    """The handler outside of training: exit at once, with status 128 + signal."""
    log.info("terminated")
    raise SystemExit(128 + number)


def asked_to_stop() -> bool:
    """Whether the parent has asked this process to stop; in a process of --jobs, something else is in its place."""
    return False


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Record SIGINT, SIGTERM and SIGHUP instead of acting on them; yields a function that returns the first one, or 0.

    A process on its own acts on a second signal at once. Those of torchrun and of --jobs ignore it: from a terminal
    they receive Ctrl-C twice, as their parent passes it on.
    """
    received: list[int] = []
    alone = world_size() == 1 and multiprocessing.parent_process() is None

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1:
            again = "; a second signal stops at once and loses what is not saved yet" if alone else ""
            log.info(f"stopping after this step{again}")
        elif alone and callable(before[number]):
            before[number](number, frame)

    with handle_signals(note, "SIGINT", "SIGTERM", "SIGHUP") as before:
        yield lambda: received[0] if received else signal.SIGTERM * asked_to_stop()
