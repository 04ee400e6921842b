"""Sweeps: rows of a run that differ in a few settings, written as "RECIPE.SETTING=VALUE,VALUE,...".

SETTING may be an option of the soft loss, as in student_kd.loss_options.power=1,2,3.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import UserError, suggest
from engine.fields import FINITE, Kind, kind_of, settings_of, show, value_of
from engine.recipes import Recipe, loses_baseline

Grid = dict[str, dict[str, dict[str, Any]]]  # swept row -> each row in its place -> the values of the swept settings

OF_LOSS = "loss_options."
KINDS = {field.name: kind_of(field) for field in settings_of(Recipe)}


def grid(sweep: Sequence[str]) -> Grid:
    """The rows that replace each swept row: all combinations of its values, named by them.

    Raises UserError for words that do not have the form RECIPE.SETTING=VALUE,VALUE, name unknown settings or repeat
    one.
    """
    swept: dict[str, dict[str, list[Any]]] = {}
    for word in sweep:
        match = re.fullmatch(rf"([^.=]+)\.((?:{re.escape(OF_LOSS)})?\w+)=([^=]+)", word)
        if not match:
            raise UserError(f"sweep = {word!r}: must have the form RECIPE.SETTING=VALUE,VALUE,...")
        row, setting, values = match.groups()
        kind: Kind | None = FINITE if setting.startswith(OF_LOSS) else KINDS.get(setting)
        if kind is None:
            raise UserError(f"sweep = {word!r}: no such setting; {suggest(setting, KINDS)}")
        if setting in swept.setdefault(row, {}):
            raise UserError(f"sweep = {word!r}: {row}.{setting} is swept twice; put all its values into one word")
        swept[row][setting] = [value_of(kind, value) for value in values.split(",")]
    points: Grid = {}
    for row, values_of in swept.items():
        points[row] = {}
        for chosen in itertools.product(*values_of.values()):
            point = dict(zip(values_of, chosen, strict=True))
            name = name_of(row, point)
            if name in points[row]:
                raise UserError(f"sweep of {row}: two rows would have the name {name}")
            points[row][name] = point
    return points


def name_of(row: str, point: Mapping[str, Any]) -> str:
    """Such as student_kd-temperature-4-alpha-0_5."""
    parts = [row]
    for setting, value in point.items():
        parts += [setting.removeprefix(OF_LOSS), re.sub(r"[^A-Za-z0-9]+", "_", show(value))]
    return "-".join(parts)


def with_values(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe with the values of a point of a sweep. Raises UserError if it does not accept them."""
    values = {setting: value for setting, value in point.items() if not setting.startswith(OF_LOSS)}
    options = {setting.removeprefix(OF_LOSS): v for setting, v in point.items() if setting.startswith(OF_LOSS)}
    if options:
        values["loss_options"] = {**recipe.loss_options, **options}
    return dataclasses.replace(recipe, **values)


def expand(recipes: Mapping[str, Recipe], points: Grid) -> dict[str, Recipe]:
    """The recipes, with each swept row replaced by its grid. Calling it twice changes nothing.

    A baseline that is swept itself becomes its row of the same values, if it has one. A row to which the sweep gives
    another architecture than its baseline has none. Raises UserError for rows that do not exist, and for values that a
    field does not accept.
    """
    expanded, swept, problems = {}, {}, []  # swept: the recipe that each row is a variant of
    for row in points:
        if row not in recipes and not all(name in recipes for name in points[row]):
            raise UserError(f"sweep = {row!r}: no such recipe; {suggest(row, recipes)}")
    for row, recipe in recipes.items():
        for name, point in points.get(row, {row: {}}).items():
            swept[name] = recipe
            try:
                expanded[name] = with_values(recipe, point)
            except UserError as error:
                problems += [f"sweep: {row}.{message}" for message in error.messages]
    if problems:
        raise UserError(*problems)

    def baseline_of(name: str, recipe: Recipe) -> str | None:
        baseline = row_of_same_values(recipe, recipe.baseline, points)
        if baseline in expanded and loses_baseline(recipe, expanded[baseline], swept[name], swept[baseline]):
            return None
        return baseline

    return {n: dataclasses.replace(recipe, baseline=baseline_of(n, recipe)) for n, recipe in expanded.items()}


def row_of_same_values(recipe: Recipe, baseline: str | None, points: Grid) -> str | None:
    """The row in place of a swept baseline that has a recipe's values; the baseline itself if there is none."""
    for name, point in points.get(baseline or "", {}).items():
        try:
            if with_values(recipe, point) == recipe:
                return name
        except UserError:  # values that this recipe cannot have
            continue
    return baseline
