"""The settings of a run that is trained already, as its checkpoints record them."""

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from engine.checkpoints import Checkpoint, load_training, read_metadata
from engine.console import log
from engine.errors import UserError
from engine.fingerprints import compare
from engine.images import IMAGENET
from engine.recipes import Recipe, is_of_timm, loses_baseline
from engine.settings import Config
from engine.sweeps import Grid, row_of_same_values


def recorded_config(folder: Path) -> Config:
    """The settings of all models that lie in a run's `folder`, each as its own checkpoint records them.

    Where seeds of a recipe record settings of the same effect, those of the highest seed are taken. Raises UserError if
    there are no checkpoints, and if two contradict one another, with both names.
    """
    found: dict[Path, Checkpoint] = {}
    for path in sorted(folder.glob("seed*/*.pt")):
        if checkpoint := read_metadata(path) or load_training(path):
            found[path] = checkpoint
    if not found:
        raise UserError(f"{folder}: holds no checkpoints; train first, or name another --run or --checkpoints_path")
    described: dict[str | None, Path] = {}  # recipe, or None for what all share -> the checkpoint that describes it
    recipes: dict[str, Recipe] = {}
    for path, checkpoint in sorted(found.items(), key=lambda item: item[1].seed):
        for part, name in (("recipe", checkpoint.name), ("config", None)):
            if settings := checkpoint.settings[part]:  # weights that are used as they are depend on no config
                first = described.setdefault(name, path)
                check_agreement(first, found[first].settings[part], path, settings, name)
        for name, values in checkpoint.config["recipes"].items():
            if name == checkpoint.name or name not in recipes:
                if "mean" not in values and is_of_timm(values["arch"]):  # recorded when all were normalised alike
                    values = {**values, **IMAGENET._asdict()}
                try:
                    recipes[name] = Recipe(**known(Recipe, values))
                except UserError as error:
                    raise UserError(*(f"{path}: {name}.{message}" for message in error.messages)) from None
    seeds = {checkpoint.seed for checkpoint in found.values()}
    asked = {seed for checkpoint in found.values() for seed in checkpoint.config["seeds"]}
    values = known(Config, found[described.get(None) or next(iter(found))].config)
    values |= {"recipes": recipes, "seeds": tuple(sorted(seeds & asked or seeds))}
    values |= {"sweep": (), "swept": all_swept(found.values())}
    values |= {"run": folder.name, "checkpoints_path": str(folder.parent), "imgs_path": "imgs"}
    values |= {"only": (), "overwrite": False, "device": "auto", "jobs": 1}
    return Config(**values)


def known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The recorded values of the fields that this version of the program has."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def check_agreement(
    first: Path, expected: dict[str, Any], second: Path, found: dict[str, Any], recipe: str | None
) -> None:
    """Raise UserError, naming both files, if parts of their fingerprints contradict one another."""
    prefix = f"{recipe}." if recipe else ""
    differing = [
        f"{field} is {before} and {now}" for field, before, now in compare(expected, found, recipe or "", prefix)
    ]
    if differing:
        raise UserError(
            f"{first} and {second} contradict one another: {'; '.join(differing)}. Move one of them away, or retrain it"
        )


def all_swept(checkpoints: Iterable[Checkpoint]) -> Grid:
    """The rows of all recorded sweeps."""
    swept: Grid = {}
    for checkpoint in checkpoints:
        for row, points in checkpoint.config["swept"].items():
            swept[row] = swept.get(row, {}) | points
    return swept


def with_baselines_of(preset: Config | None, recorded: Config, names: Iterable[str]) -> Config:
    """The recorded settings, except that config.py says what the recipes `names` are compared with.

    `preset` is what config.py has under the name of the recorded preset. A line in the log names each recorded baseline
    that differs.
    """
    if not isinstance(preset, Config):
        return recorded
    swept_row = {name: row for row, points in recorded.swept.items() for name in points}
    recipes = dict(recorded.recipes)
    for name in names:
        row = preset.recipes.get(name) or preset.recipes.get(swept_row.get(name, name))
        before = recipes[name].baseline
        if row is None:
            continue
        baseline = row_of_same_values(recipes[name], row.baseline, recorded.swept)
        if baseline in recipes and baseline in preset.recipes and baseline != before:
            named = preset.recipes[baseline]
            if loses_baseline(recipes[name], recipes[baseline], row, named):  # by a flag when it was trained
                continue
        if baseline is None and recipes[name].arch != row.arch:  # the baseline came by a flag, too
            continue
        if baseline != before:
            recipes[name] = replace(recipes[name], baseline=baseline)
            log.info(f"{name}.baseline is {baseline} in config.py, which counts, and {before} in the checkpoint")
        if baseline and baseline in preset.recipes:  # it may not be trained yet
            for other in (baseline, *preset.teachers_of(baseline)):
                recipes.setdefault(other, preset.recipes[other])
    return replace(recorded, recipes=recipes)
