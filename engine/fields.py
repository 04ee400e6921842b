"""Dataclass fields that carry what they accept: the kinds of settings, and the messages about wrong values."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from engine import named
from engine.errors import UserError, closest


class Kind(NamedTuple):
    """What a field accepts, in words and as a test, which may raise UserError with the reason.

    `convert` makes a value of a command line's word, or of its list of words with nargs = "+".
    """

    expected: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = str
    nargs: str | None = None
    names: tuple[str, ...] = ()  # to suggest the closest of
    named: bool = False  # also takes MODULE:NAME, see engine.named


def number(expected: str, accepts: Callable[[float], bool]) -> Kind:
    return Kind(expected, lambda value: type(value) in (int, float) and math.isfinite(value) and accepts(value), float)


def integer(minimum: int, maximum: int = 2**31 - 1) -> Kind:
    upper = " or more" if maximum == 2**31 - 1 else f" to {maximum}"
    expected = f"an integer, {minimum}{upper}"
    return Kind(expected, lambda value: type(value) is int and minimum <= value <= maximum, int)


def choice(*names: str) -> Kind:
    return Kind("one of " + ", ".join(names), lambda value: value in names)


def or_named(kind: Kind) -> Kind:
    """The kind, or something of the user's as MODULE:NAME."""

    def accepts(value: Any) -> bool:
        return kind.accepts(value) or (named.is_named(value) and callable(named.load(value)))

    return kind._replace(expected=f"{kind.expected}, or MODULE:NAME", accepts=accepts, named=True)


def text(expected: str, pattern: str) -> Kind:
    return Kind(expected, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def optional(kind: Kind) -> Kind:
    return kind._replace(
        expected=f"{kind.expected}, or none",
        accepts=lambda value: value is None or kind.accepts(value),
        convert=lambda word: None if "".join(word).lower() == "none" else kind.convert(word),
    )


def several(kind: Kind, expected: str) -> Kind:
    expected += "; separated by spaces on the command line, a tuple such as (0, 1) or (0,) in config.py"

    def accepts(values: Any) -> bool:
        return type(values) is tuple and all(map(kind.accepts, values))

    return Kind(expected, accepts, lambda words: tuple(map(kind.convert, words)), "+")


def value_of(kind: Kind, given: str | list[str]) -> Any:
    """A value from one word, or from several; what cannot be converted stays, for validation to name."""
    try:
        return kind.convert(given)
    except (ValueError, KeyError):
        return given


def show(value: Any) -> str:
    """A value as on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    if isinstance(value, dict):
        return " ".join(f"{name}={show(number)}" for name, number in value.items())
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


FLAG = Kind("true or false", lambda v: isinstance(v, bool), lambda w: {"true": True, "false": False}[w.lower()], "?")
NOT_OF_WINDOWS = r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))"  # whose devices have these names in every folder
NAME = text(
    "1 to 100 letters, digits, '.', '_' and '-', starting with a letter or digit, and no reserved name such as con",
    NOT_OF_WINDOWS + r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
)
RECIPE_NAME = text(
    "1 to 100 letters, digits, '_' and '-', starting with a letter or digit, and no reserved name such as con",
    NOT_OF_WINDOWS + r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}",
)
PATH = text("a path", r"[^\0\n]+")
FRACTION = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
NONNEGATIVE = number("a number, 0 or more", lambda value: value >= 0)
POSITIVE = number("a number above 0", lambda value: value > 0)
FINITE = number("a number", lambda value: True)


def accepts_class_names(value: Any) -> bool:
    names = read_class_names(value) if isinstance(value, str) else value
    if type(names) is not tuple or not all(isinstance(name, str) for name in names):
        return False
    return len(names) > 1 and len(set(names)) == len(names)


def read_class_names(path: str) -> tuple[str, ...]:
    """The lines of a file that are not empty. Raises UserError if it cannot be read."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})") from None
    return tuple(line.strip() for line in lines if line.strip())


CLASS_NAMES = Kind(
    "a file with the name of a class on each line, or the names, all different",
    accepts_class_names,
    lambda words: words[0] if len(words) == 1 else tuple(words),
    "+",
)


def three(kind: Kind, expected: str) -> Kind:
    """Three values, for the channels of an image."""
    tuples = several(kind, f"{expected}, for red, green and blue")
    return tuples._replace(accepts=lambda values: tuples.accepts(values) and len(values) == 3)


RGB, POSITIVE_RGB = three(FINITE, "three numbers"), three(POSITIVE, "three numbers above 0")


def accepts_options(options: Any) -> bool:
    return isinstance(options, dict) and all(isinstance(n, str) and FINITE.accepts(v) for n, v in options.items())


def convert_options(words: list[str]) -> dict[str, float]:
    options = {name: float(number) for name, number in (word.split("=") for word in words)}
    if len(options) < len(words):
        raise ValueError("an option is given twice")
    return options


OPTIONS = Kind(
    "numbers by name; power=3 gamma=1 on the command line, {'power': 3} in config.py",
    accepts_options,
    convert_options,
    "+",
)


def setting(default: Any, kind: Kind, help: str) -> Any:
    """A dataclass field that carries what it accepts and its line in --help."""
    metadata = {"kind": kind, "help": help}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.metadata]


def kind_of(field: dataclasses.Field) -> Kind:
    return field.metadata["kind"]


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def name_objects(settings: Any) -> dict[str, str]:
    """Put MODULE:NAME in place of the user's objects; a message for each of those that have no such name."""
    messages = {}
    for field in settings_of(type(settings)):
        value = getattr(settings, field.name)
        if kind_of(field).named and callable(value):
            try:
                object.__setattr__(settings, field.name, named.name_of(value))
            except UserError as error:
                messages[field.name] = f"{field.name} = {value!r}: {error}"
    return messages


def problem_with(name: str, kind: Kind, value: Any) -> str | None:
    """A message if a field of this kind does not accept a value."""
    try:
        if kind.accepts(value):
            return None
    except UserError as error:
        return f"{name} = {value!r}: {error}"
    match = closest(str(value), kind.names)
    suggestion = f"; did you mean {match}?" if match else ""
    return f"{name} = {value!r}: must be {kind.expected}{suggestion}"


def invalid_fields(settings: Any) -> dict[str, str]:
    """A message for each field of a Recipe or Config whose value it does not accept."""
    messages = name_objects(settings)
    for field in settings_of(type(settings)):
        problem = problem_with(field.name, kind_of(field), getattr(settings, field.name))
        if problem and field.name not in messages:
            messages[field.name] = problem
    return messages
