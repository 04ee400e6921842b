"""Dataclass fields that carry what they accept: the kinds of settings, and the messages about wrong values."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from engine.errors import closest


class Kind(NamedTuple):
    """What a field accepts, in words and as a test, how a command line's word is converted, and argparse's nargs."""

    expected: str
    accepts: Callable[[Any], bool]
    convert: Callable[[str], Any] = str
    nargs: str | None = None
    names: tuple[str, ...] = ()  # to suggest the closest of


def number(expected: str, accepts: Callable[[float], bool]) -> Kind:
    return Kind(expected, lambda value: type(value) in (int, float) and math.isfinite(value) and accepts(value), float)


def integer(minimum: int, maximum: int = 2**31 - 1) -> Kind:
    upper = " or more" if maximum == 2**31 - 1 else f" to {maximum}"
    expected = f"an integer, {minimum}{upper}"
    return Kind(expected, lambda value: type(value) is int and minimum <= value <= maximum, int)


def choice(*names: str) -> Kind:
    return Kind("one of " + ", ".join(names), lambda value: value in names)


def text(expected: str, pattern: str) -> Kind:
    return Kind(expected, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def optional(kind: Kind) -> Kind:
    return kind._replace(
        expected=f"{kind.expected}, or none",
        accepts=lambda value: value is None or kind.accepts(value),
        convert=lambda word: None if word.lower() == "none" else kind.convert(word),
    )


def several(kind: Kind, expected: str) -> Kind:
    expected += "; separated by spaces on the command line, a tuple such as (0, 1) or (0,) in config.py"
    return Kind(expected, lambda values: type(values) is tuple and all(map(kind.accepts, values)), kind.convert, "+")


def value_of(field: dataclasses.Field, given: str | list[str]) -> Any:
    """The value of a field from one word, or several; what cannot be converted stays, for validation to name."""
    convert = field.metadata["kind"].convert
    try:
        return tuple(map(convert, given)) if isinstance(given, list) else convert(given)
    except (ValueError, KeyError):
        return given


def show(value: Any) -> str:
    """A value as on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


FLAG = Kind("true or false", lambda v: isinstance(v, bool), lambda w: {"true": True, "false": False}[w.lower()], "?")
NAME = text(
    "1 to 100 letters, digits, '.', '_' and '-', starting with a letter or digit", r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
)
RECIPE_NAME = text(
    "1 to 100 letters, digits, '_' and '-', starting with a letter or digit", r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"
)
PATH = text("a path", r"[^\0\n]+")
FRACTION = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
NONNEGATIVE = number("a number, 0 or more", lambda value: value >= 0)
POSITIVE = number("a number above 0", lambda value: value > 0)


def setting(default: Any, kind: Kind, help: str) -> Any:
    """A dataclass field that carries what it accepts and its line in --help."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


def settings_of(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.metadata]


def invalid_fields(settings: Any) -> dict[str, str]:
    """A message for each field of a Recipe or Config whose value it does not accept."""
    messages = {}
    for field in settings_of(type(settings)):
        kind, value = field.metadata["kind"], getattr(settings, field.name)
        if not kind.accepts(value):
            match = closest(str(value), kind.names)
            suggestion = f"; did you mean {match}?" * bool(match)
            messages[field.name] = f"{field.name} = {value!r}: must be {kind.expected}{suggestion}"
    return messages
