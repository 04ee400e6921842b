"""Sweeps: rows of a run that differ in a few settings, written as "RECIPE.SETTING=VALUE,VALUE,..."."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from engine.errors import UserError, suggest
from engine.fields import show, value_of

R = TypeVar("R")  # a Recipe, whose fields are described by their metadata

Grid = dict[str, dict[str, dict[str, Any]]]  # swept row -> each row in its place -> the values of the swept fields


def grid(sweep: Sequence[str], fields: dict[str, dataclasses.Field]) -> Grid:
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
    points: Grid = {}
    for row, values in swept.items():
        points[row] = {}
        for chosen in itertools.product(*values.values()):
            point = dict(zip(values, chosen, strict=True))
            name = name_of(row, point)
            if name in points[row]:
                raise UserError(f"sweep of {row}: two rows would have the name {name}")
            points[row][name] = point
    return points


def name_of(row: str, values: dict[str, Any]) -> str:
    """Such as student_kd-temperature-4-alpha-0_5."""
    parts = [row]
    for field, value in values.items():
        parts += [field, re.sub(r"[^A-Za-z0-9]+", "_", show(value))]
    return "-".join(parts)


def expand(recipes: dict[str, R], points: Grid) -> dict[str, R]:
    """The recipes, with each swept row replaced by its grid. Calling it twice changes nothing.

    A baseline that is swept itself becomes its row of the same values, if it has one. Raises UserError for rows that do
    not exist, and for values that a field does not accept.
    """
    expanded, problems = {}, []
    for row in points:
        if row not in recipes and not all(name in recipes for name in points[row]):
            raise UserError(f"sweep = {row!r}: no such recipe; {suggest(row, recipes)}")
    for row, recipe in recipes.items():
        for name, values in points.get(row, {row: {}}).items():
            try:
                expanded[name] = dataclasses.replace(recipe, **values)
            except UserError as error:
                problems += [f"sweep: {row}.{message}" for message in error.messages]
    if problems:
        raise UserError(*problems)
    return {
        name: dataclasses.replace(recipe, baseline=row_of_same_values(recipe, recipe.baseline, points))
        for name, recipe in expanded.items()
    }


def row_of_same_values(recipe: R, baseline: str | None, points: Grid) -> str | None:
    """The row in place of a swept baseline that has a recipe's values; the baseline itself if there is none."""
    for name, values in points.get(baseline, {}).items():
        if all(getattr(recipe, field) == value for field, value in values.items()):
            return name
    return baseline
