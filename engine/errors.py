"""Errors that the user can fix: one message on stderr, no traceback, exit status 2 (1 if training failed)."""

import ast
import contextlib
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn


def escape_control(text: str) -> str:
    """Escape unprintable characters, which may come from the names of files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """A mistake that the user can fix. Takes one message, or several that are reported together."""

    status = 2  # of the process, when the error ends it

    def __init__(self, *messages: str):
        super().__init__(*map(escape_control, messages))

    @property
    def messages(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "; ".join(self.args)

    def end_process(self) -> NoReturn:
        raise SystemExit(self.status)


class Diverged(UserError):
    """The loss, the logits or the weights became NaN or infinite."""

    status = 1


def first_line(error: BaseException) -> str:
    """Of its message; an error of the system without its number and path."""
    reason = isinstance(error, OSError) and error.strerror
    return str(reason or error).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def explain_system_errors() -> Iterator[None]:
    """Turn an error of the system, as for a path that cannot be looked at, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by a library, for a reason of its own
            raise
        raise UserError(": ".join(str(part) for part in (error.filename, error.strerror) if part)) from None


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a UserError or an error of the system to stderr and exit with its status; exit with 130 on Ctrl-C.

    A standard stream that is closed (`2>&-`) is replaced, because the next file to be opened would get its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as a script sets it during its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with explain_system_errors():
            yield
    except UserError as error:
        print("error:", "\n       ".join(error.messages), file=sys.stderr)
        error.end_process()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def locate_errors(path: Path) -> Iterator[None]:
    """Turn an error while a file of the user's, such as config.py, is imported here into a UserError with its line."""
    try:
        yield
    except Exception as error:
        lines = [
            (frame.filename, frame.lineno)
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.name == "<module>"
        ]
        if isinstance(error, SyntaxError) and error.filename:
            lines.append((error.filename, error.lineno))
        messages = traceback.format_exception_only(error)[-1:]
        if isinstance(error, UserError):
            messages = list(error.messages)
        where = f"{Path(lines[-1][0]).name}, line {lines[-1][1]}" if lines else path.name
        raise UserError(*(f"{where}: {message.strip()}" for message in messages)) from None


def check_duplicate_keys(path: Path) -> None:
    """Raise UserError if a table of a Python file has a key twice, of which Python would keep the last in silence."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # which importing the file reports
        return
    problems = []
    for table in ast.walk(tree):
        seen = set()
        for key in table.keys if isinstance(table, ast.Dict) else []:
            if isinstance(key, ast.Constant):
                if key.value in seen:
                    problems.append(f"{path.name}, line {key.lineno}: {key.value!r} is there twice; rename one of them")
                seen.add(key.value)
    if problems:
        raise UserError(*problems)


def closest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)), None)


def suggest(name: str, known: Iterable[str]) -> str:
    """The hint after an unknown name: the closest known one, or all of them."""
    known = list(known)
    match = closest(name, known)
    return f"did you mean {match}?" if match else "known: " + ", ".join(known)


def at_most_ten(messages: list[str]) -> list[str]:
    return [*messages[:10], f"and {len(messages) - 10} more"] if len(messages) > 10 else messages
