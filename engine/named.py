"""MODULE:NAME: how a setting names a network, a loss, a data set or the like of the user's.

MODULE is a Python file that lies directly beside the scripts and is not one of ours, so that the checkpoint of a
stranger can name nothing else. In config.py the object itself may stand in place of its name.
"""

import contextlib
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from engine import reach
from engine.console import log
from engine.errors import UserError, first_line, locate_errors, suggest
from engine.reach import OURS, SCRIPTS

Named = Any  # the type of such a setting: a name of ours, MODULE:NAME, or in config.py the object itself


def is_named(value: Any) -> bool:
    """Whether a value has the form MODULE:NAME."""
    return isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*:[^\W\d]\w*", value) is not None


def split(value: str) -> tuple[Path, str]:
    """The file and the name. Raises UserError if there is no such file of the user's."""
    module, _, name = value.partition(":")
    path = reach.ROOT / f"{module}.py"
    if module in (*OURS, *SCRIPTS) or not path.is_file():
        raise UserError(f"must name a file of yours that lies beside config.py, and {module}.py is none")
    return path, name


@cache
def load(value: str) -> Callable[..., Any]:
    """What MODULE:NAME names. Raises UserError if it is not there or cannot be called."""
    path, name = split(value)
    with locate_errors(path):
        module = importlib.import_module(path.stem)
        reach.reach(path, name)  # reads the files, as they are now
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise UserError(f"{path.name} has the name of an installed module; rename it")
    if not hasattr(module, name):
        own = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"{path.name} has no {name}; {suggest(name, own)}")
    found = getattr(module, name)
    if not callable(found):
        raise UserError(f"{name} in {path.name} cannot be called")
    return found


@contextlib.contextmanager
def running(setting: str, value: str) -> Iterator[None]:
    """Within it the user's code runs. A mistake in it becomes a UserError, with the file and the line if it has one."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(Path(frame.filename), frame.lineno) for frame in frames]
        theirs = [place for place in places if place[0].parent == reach.ROOT and place[0].stem not in SCRIPTS]
        where = f"{theirs[-1][0].name}, line {theirs[-1][1]}: " if theirs else ""
        raise UserError(f"{setting} = {value!r}: {where}{first_line(error)}") from None


def call(setting: str, value: str, *arguments: Any) -> Any:
    """What MODULE:NAME returns for these arguments. Raises UserError for a mistake in it."""
    function = load(value)
    with running(setting, value):
        return function(*arguments)


def name_of(value: Any) -> str:
    """MODULE:NAME of an object in config.py. Raises UserError unless a file of the user's defines it."""
    module, name = str(getattr(value, "__module__", "")), getattr(value, "__qualname__", "")
    named = f"{module}:{name}"
    of_the_user = is_named(named) and module not in SCRIPTS and (reach.ROOT / f"{module}.py").is_file()
    if not of_the_user or getattr(sys.modules.get(module), name, None) is not value:  # as of a wrapped function
        raise UserError(
            "must be defined, with a name, in a file of yours beside config.py, such as my_project.py; import it from "
            "there, or write 'my_project:NAME'"
        )
    return named


def code_of(value: str) -> str:
    """The digest of what MODULE:NAME reaches, see engine.reach; an edit of it makes another model."""
    path, name = split(value)
    parts, hidden = reach.reach(path, name)
    for file in sorted(hidden):
        log.info(
            f"{value}: {file} looks names up in a way that hides what it uses, so every edit of that file counts, and "
            "an edit of a file that it looks up by name does not"
        )
    return reach.digest(parts)
