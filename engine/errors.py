"""Errors that the user can fix: one message on stderr, no traceback, exit status 2 (1 if training failed)."""

import ast
import contextlib
import difflib
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
    return str(error).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a UserError to stderr and exit with its status; exit with 130 on Ctrl-C."""
    try:
        yield
    except UserError as error:
        print("error:", "\n       ".join(error.messages), file=sys.stderr)
        error.end_process()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


# What an edit of config.py can raise while it is imported; anything else keeps its traceback.
MISTAKES = (ArithmeticError, AttributeError, ImportError, LookupError, NameError, OSError, TypeError, ValueError)


@contextlib.contextmanager
def locate_errors() -> Iterator[None]:
    """Turn errors in a module imported here, such as an edited config.py, into a UserError with file and line."""
    try:
        yield
    except SyntaxError as error:
        raise UserError(f"{Path(error.filename or '').name}, line {error.lineno}: {error.msg}") from None
    except (UserError, *MISTAKES) as error:
        frame = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"][-1]
        messages = error.messages if isinstance(error, UserError) else [first_line(error)]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise UserError(*(f"{where}: {message}" for message in messages)) from None


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
