"""The command line, generated from the fields of Config and Recipe: an edit and a flag have the same name."""

import argparse
import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from engine.console import log, print_result
from engine.errors import UserError, closest, suggest
from engine.fields import kind_of, problem_with, settings_of, show, value_of
from engine.recipes import Recipe, conflicts, loses_baseline
from engine.settings import Config

# The settings that matter for a run that is trained already.
OF_A_RUN = ("run", "seeds", "only", "device", "precision", "data_path", "checkpoints_path", "imgs_path")


class StoreOnce(argparse.Action):
    """Store a flag's value; a second one is a mistake, of which argparse would keep the last in silence."""

    given = False

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if self.given:
            parser.error(f"{option}: is given twice; give it once, with all its values")
        if values == []:  # as argparse reads --lr=--
            parser.error(f"{option}: needs a value")
        self.given = True
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse's parser, except that a mistake, such as a flag given twice, is a UserError."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.register("action", None, StoreOnce)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def print_help(self, file: Any = None) -> None:
        print_result(self.format_help().rstrip())


def parse(presets: Mapping[str, Config], argv: list[str] | None, script_flags: Mapping[str, str]) -> Config:
    """The preset that `--preset` names (the first by default) with the flags in `argv` (sys.argv[1:]) applied to it.

    `script_flags` maps the flags that the calling script has taken out of `argv` itself to their lines in --help.
    A flag of a row, --student.lr, wins over the flag of all rows, --lr, which wins over the preset. Rows that cannot
    take the latter keep their own value, and a line in the log names them. Raises UserError with every mistake at once:
    unknown flags and presets, and values that a field does not accept.
    """
    preset_parser = Parser(add_help=False, allow_abbrev=False)
    preset_parser.add_argument("--preset", default=next(iter(presets)))
    known, rest = preset_parser.parse_known_args(argv)
    if known.preset not in presets:
        raise UserError(f"--preset {known.preset}: no such preset; {suggest(known.preset, presets)}")
    preset = presets[known.preset]
    parser = make_parser(preset, help_text(preset, known.preset, presets, script_flags), script_flags)
    namespace, unknown = parser.parse_known_args(rest)
    words = vars(namespace)
    unknown = [word for word in unknown if word.startswith("-")] or unknown
    problems = [explain_unknown(word, preset, script_flags) for word in unknown]
    recipes, of_all = {}, convert(Recipe, words)
    for field in settings_of(Recipe):
        if field.name in of_all and (problem := problem_with(field.name, kind_of(field), of_all[field.name])):
            problems.append(problem)
            del of_all[field.name]
    taken: dict[str, list[str]] = {setting: [] for setting in of_all}
    for name, recipe in preset.recipes.items():
        of_row = convert(Recipe, words, prefix=f"{name}.")
        suitable = values_for_row(name, recipe, of_all, of_row)
        for setting in {**suitable, **of_row}.keys() & of_all.keys():
            taken[setting].append(name)
        try:
            recipes[name] = dataclasses.replace(recipe, **suitable, **of_row)
        except UserError as error:
            problems += [f"{name}.{message}" for message in error.messages]
            recipes[name] = recipe
    if "baseline" not in words:
        for name in [name for name in recipes if f"{name}.baseline" not in words]:
            drop_baseline_of_other_arch(name, recipes, preset.recipes)
    for setting, rows in taken.items():
        others = [name for name in preset.recipes if name not in rows]
        if not rows:
            of_last = conflicts({**vars(list(preset.recipes.values())[-1]), setting: of_all[setting]})
            why = "".join(f"; {problem}" for problem in of_last.values())
            problems.append(f"--{setting} {show(of_all[setting])}: no recipe can take this value{why}")
        elif others:
            log.info(f"--{setting} {show(of_all[setting])} has no effect on {', '.join(others)}, which it leaves alone")
    try:
        name = preset.preset or known.preset
        config = dataclasses.replace(preset, recipes=recipes, preset=name, **convert(Config, words))
    except UserError as error:
        problems += error.messages
    if problems:
        raise UserError(*problems)
    return config


def check_presets(presets: Any) -> None:
    """Raise UserError unless this is a table of one Config or more, by their names."""
    if not isinstance(presets, dict) or not presets:
        raise UserError("PRESETS: must be a table of one preset or more, such as {'mine': Config(RECIPES, run='mine')}")
    odd = [name for name, preset in presets.items() if not (isinstance(name, str) and isinstance(preset, Config))]
    if odd:
        raise UserError(
            *(f"PRESETS: {name!r} must be a name and a Config, 'mine': Config(RECIPES, run='mine')" for name in odd)
        )


def drop_baseline_of_other_arch(name: str, recipes: dict[str, Recipe], preset: Mapping[str, Recipe]) -> None:
    """A row that the flags have given another architecture than its baseline has none; a line in the log says so."""
    row, baseline = recipes[name], recipes[name].baseline
    if baseline in recipes and loses_baseline(row, recipes[baseline], preset[name], preset[baseline]):
        changed = row.arch != preset[name].arch
        flag = f"--{baseline}.arch {row.arch}" if changed else f"--{name}.arch {recipes[baseline].arch}"
        recipes[name] = dataclasses.replace(row, baseline=None)
        log.info(
            f"{name} ({row.arch}) is not compared with {baseline} ({recipes[baseline].arch}). Add {flag}, or "
            f"--{name}.baseline {baseline} to compare them as they are"
        )


def values_for_row(name: str, recipe: Recipe, of_all: dict[str, Any], of_row: dict[str, Any]) -> dict[str, Any]:
    """Those of the values for all rows that this row can take, besides the values that it is given itself."""
    chosen = {setting: value for setting, value in of_all.items() if setting not in of_row}
    if recipe.teacher is None or chosen.get("teacher") == name:
        chosen.pop("teacher", None)
    if chosen.get("baseline") == name:
        del chosen["baseline"]
    if recipe.epochs == 0:  # its weights are used as they are
        chosen.pop("epochs", None)
    while chosen and (problems := conflicts({**vars(recipe), **chosen, **of_row})):
        unsuitable = chosen.keys() & problems.keys()
        if not unsuitable:  # they clash with settings that the row has
            unsuitable = {setting for setting, value in chosen.items() if conflicts({**vars(recipe), setting: value})}
        if not unsuitable:  # the flags of the row are wrong by themselves
            break
        chosen = {setting: value for setting, value in chosen.items() if setting not in unsuitable}
    return chosen


def make_parser(preset: Config, help: str, script_flags: Iterable[str]) -> Parser:
    parser = Parser(
        usage=f"%(prog)s {''.join(f'[{flag}] ' for flag in script_flags)}"
        "[--preset NAME] [--SETTING VALUE ...] [--RECIPE.SETTING VALUE ...]",
        epilog=help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    names = [(field.name, field) for cls in (Config, Recipe) for field in settings_of(cls)]
    names += [(f"{recipe}.{field.name}", field) for recipe in preset.recipes for field in settings_of(Recipe)]
    for name, field in names:
        nargs = kind_of(field).nargs
        const = "true" if nargs == "?" else None
        parser.add_argument(f"--{name}", dest=name, nargs=nargs, const=const, help=argparse.SUPPRESS)
    return parser


def help_text(preset: Config, preset_name: str, presets: Iterable[str], script_flags: Mapping[str, str]) -> str:
    """A line for each flag, with its value in this preset."""

    def wrap(flag: str, help: str) -> str:
        first, others = f"  {flag:<25} ", " " * 28
        return textwrap.fill(help, 110, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)

    lines = [wrap(flag, help) for flag, help in script_flags.items()]
    lines += [wrap("--preset", f"{', '.join(presets)} (now {preset_name})"), "", "settings (and their current values):"]
    shown = settings_of(Config)
    if script_flags:  # the script works on an existing run, whose settings are recorded
        shown = [field for field in shown if field.name in OF_A_RUN]
    for field in shown:
        value = show(getattr(preset, field.name)) or {"only": "all"}.get(field.name, "none")
        lines.append(wrap(f"--{field.name}", f"{field.metadata['help']} ({value})"))
    if script_flags:
        return "\n".join([*lines, "", "and the settings that training takes: python teacher_student_model.py --help"])
    lines += ["", f"settings of a recipe, one of {', '.join(preset.recipes)}; without RECIPE. of all that can take it:"]
    for field in settings_of(Recipe):
        values = {name: show(getattr(recipe, field.name)) for name, recipe in preset.recipes.items()}
        shared = next(iter(values.values())) if len(set(values.values())) == 1 else None
        value = shared if shared is not None else ", ".join(f"{name} {value}" for name, value in values.items())
        lines.append(wrap(f"--RECIPE.{field.name}", f"{field.metadata['help']} ({value or 'none'})"))
    return "\n".join(lines)


def convert(cls: type, words: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Field values from the words that are given."""
    given = {field: words.get(prefix + field.name) for field in settings_of(cls)}
    return {field.name: value_of(kind_of(field), word) for field, word in given.items() if word is not None}


def explain_unknown(word: str, preset: Config, script_flags: Iterable[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r}: a value without a flag; see --help"
    name = word.lstrip("-").split("=")[0]
    recipe_settings = [field.name for field in settings_of(Recipe)]
    known = [flag.split()[0].lstrip("-") for flag in script_flags]
    known += ["preset", *(field.name for field in settings_of(Config)), *recipe_settings]
    known += [f"{recipe}.{setting}" for recipe in preset.recipes for setting in recipe_settings]
    match = closest(name, known)
    return f"{word.split('=')[0]}: no such setting; " + (f"did you mean --{match}?" if match else "see --help")
