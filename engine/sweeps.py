"""Sweeps: rows of a run that differ in a few settings, written as "RECIPE.SETTING=VALUE,VALUE,..."."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from engine.errors import UserError, suggest
from engine.fields import show, value_of

R = TypeVar("R")  # a Recipe, whose fields are described by their metadata


class Point(NamedTuple):
    """A row of a sweep: its name, and the values of the swept fields."""

    row: str
    values: dict[str, Any]


def grid(sweep: Sequence[str], fields: dict[str, dataclasses.Field]) -> dict[str, list[Point]]:
    """The rows that replace each swept row: all combinations of its values, named by them.

    Raises UserError for words that do not have the form RECIPE.SETTING=VALUE,VALUE, name unknown fields or repeat one.
    """
    swept: dict[str, dict[str, list[Any]]] = {}
    for word in sweep:
        match = re.fullmatch(r"([^.=]+)\.(\w+)=([^=]+)", word)
        if not match:
            raise UserError(f"sweep = {word!r}: must have the form RECIPE.SETTING=VALUE,VALUE,...")
        row, field, values = match.groups()
        if field not in fields:
            raise UserError(f"sweep = {word!r}: no such setting; {suggest(field, fields)}")
        if field in swept.setdefault(row, {}):
            raise UserError(f"sweep = {word!r}: {row}.{field} is swept twice; put all its values into one word")
        swept[row][field] = [value_of(fields[field], value) for value in values.split(",")]
    points = {}
    for row, values in swept.items():
        combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
        points[row] = [Point(name_of(row, chosen), chosen) for chosen in combinations]
        names = [point.row for point in points[row]]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"sweep of {row}: two rows would have the name {twice}")
    return points


def name_of(row: str, values: dict[str, Any]) -> str:
    """Such as student_kd-temperature-4-alpha-0_5."""
    parts = [row]
    for field, value in values.items():
        parts += [field, re.sub(r"[^A-Za-z0-9]+", "_", show(value))]
    return "-".join(parts)


def expand(recipes: dict[str, R], sweep: Sequence[str], fields: dict[str, dataclasses.Field]) -> dict[str, R]:
    """The recipes, with each swept row replaced by its grid. Calling it twice changes nothing.

    A baseline that is swept itself becomes its row of the same values, if it has one. Raises UserError for rows that do
    not exist, and for values that a field does not accept.
    """
    points, expanded, problems = grid(sweep, fields), {}, []
    for row, its_points in points.items():
        if row not in recipes and not all(point.row in recipes for point in its_points):
            raise UserError(f"sweep = {row!r}: no such recipe; {suggest(row, recipes)}")
    for name, recipe in recipes.items():
        for point in points.get(name, [Point(name, {})]):
            try:
                expanded[point.row] = dataclasses.replace(recipe, **point.values)
            except UserError as error:
                problems += [f"sweep: {name}.{message}" for message in error.messages]
    if problems:
        raise UserError(*problems)
    for name, recipe in expanded.items():
        for point in points.get(recipe.baseline, []):
            if all(getattr(recipe, field) == value for field, value in point.values.items()):
                expanded[name] = dataclasses.replace(recipe, baseline=point.row)
    return expanded
