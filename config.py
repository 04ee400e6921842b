"""Every setting in one place: the recipes, the presets and the command line made from them.

Edit a value below, or pass it as a flag of the same name; the two mean the same:

    python teacher_student_model.py --batch_size 64 --student_kd.temperature 4
    python teacher_student_model.py --preset demo --seeds 0 1 2
    python evaluate.py --help
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

# torchvision's ResNet family, spelled out so that reading the settings does not import torch.
ARCHS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)

# Training images of the data sets whose size is known before they are read.
TRAINING_IMAGES = {"cifar10": 50_000, "digits": 1_297}


def printable(text: str) -> str:
    """Text that may come from elsewhere, for a terminal: what is no printable character as Python would write it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """A mistake that a person can mend. Takes one message, or several that are told together."""

    status = 2  # of the process that it ends

    def __init__(self, *messages: str):
        self.messages = tuple(map(printable, messages))
        super().__init__("\n       ".join(self.messages))


class Diverged(UserError):
    """Training whose loss is no longer a number."""

    status = 1


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Tell a UserError on stderr without a traceback, and exit with its status; with 130 on Ctrl-C."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is saved", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def line_of_mistakes() -> Iterator[None]:
    """Turn what goes wrong in tables of settings that somebody edits into a UserError that names the line."""
    try:
        yield
    except (UserError, TypeError, LookupError) as error:
        here = next(frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>")
        messages = error.messages if isinstance(error, UserError) else [first_line(error)]
        raise UserError(*(f"config.py, line {here}: {message}" for message in messages)) from None


def closest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)), None)


def nearest(name: str, names: Iterable[str]) -> str:
    """The hint behind an unknown name: the nearest known one, else all of them."""
    close = closest(name, names)
    return f"did you mean {close}?" if close else "known are " + ", ".join(names)


# ---------------------------------------------------------------------------------------------------------------------
# What a setting takes


class Kind(NamedTuple):
    """What a setting takes, how one word of the command line is read, and whether it takes several words."""

    takes: str
    accepts: Callable[[Any], bool]
    read: Callable[[str], Any] = str
    words: str | None = None  # argparse's nargs


def number(takes: str, accepts: Callable[[float], bool]) -> Kind:
    return Kind(takes, lambda value: type(value) in (int, float) and math.isfinite(value) and accepts(value), float)


def whole(minimum: int, maximum: int | None = None) -> Kind:
    takes = f"a whole number, {minimum} or more" if maximum is None else f"a whole number from {minimum} to {maximum}"
    most = 2**31 - 1 if maximum is None else maximum
    return Kind(takes, lambda value: type(value) is int and minimum <= value <= most, int)


def choice(*names: str) -> Kind:
    return Kind("one of " + ", ".join(names), lambda value: value in names)


def text(takes: str, pattern: str) -> Kind:
    return Kind(takes, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def optional(kind: Kind) -> Kind:
    return kind._replace(
        takes=kind.takes + ", or none",
        accepts=lambda value: value is None or kind.accepts(value),
        read=lambda word: None if word.lower() == "none" else kind.read(word),
    )


def several(kind: Kind, takes: str) -> Kind:
    takes += "; as a flag with spaces between them, in config.py as a tuple, (a, b) or (a,)"
    return Kind(takes, lambda values: type(values) is tuple and all(map(kind.accepts, values)), kind.read, words="+")


FLAG = Kind("true or false", lambda v: isinstance(v, bool), lambda w: {"true": True, "false": False}[w.lower()], "?")
NAME = text("letters, digits, '.', '_' and '-', starting with a letter or digit", r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PATH = text("a folder's path", r"[^\0\n]+")


def setting(default: Any, kind: Kind, help: str) -> Any:
    """A dataclass field that carries what it takes and its line in --help."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


def field_problems(settings: Any) -> dict[str, str]:
    """A message for each field of a Recipe or Config whose value is not of its kind."""
    problems = {}
    for field in settings_of(type(settings)):
        kind, value = field.metadata["kind"], getattr(settings, field.name)
        if not kind.accepts(value):
            problems[field.name] = f"{field.name} = {value!r}: takes {kind.takes}"
    return problems


def settings_of(dataclass_: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(dataclass_) if field.metadata]


# ---------------------------------------------------------------------------------------------------------------------
# The settings


@dataclass(frozen=True)
class Recipe:
    """How one model is made. Raises UserError, naming every field that is wrong."""

    arch: str = setting("resnet18", choice(*ARCHS), "torchvision model")
    epochs: int = setting(5, whole(1), "passes over the training images")
    lr: float = setting(0.001, number("a number above 0", lambda v: v > 0), "learning rate, the peak of the schedule")
    momentum: float = setting(0.9, number("0 or more, below 1", lambda v: 0 <= v < 1), "of SGD")
    weight_decay: float = setting(0.0, number("0 or more", lambda v: v >= 0), "L2 penalty of SGD, on every parameter")
    nesterov: bool = setting(False, FLAG, "Nesterov's momentum")
    schedule: str = setting(
        "constant",
        choice("constant", "cosine", "onecycle"),
        "constant; cosine: falls from lr to 0; onecycle: rises to lr for 30% of the steps, then falls to 0",
    )
    pretrained: bool = setting(True, FLAG, "start from torchvision's ImageNet weights")
    teacher: str | None = setting(None, optional(NAME), "the recipe that teaches this one")
    alpha: float = setting(
        0.25, number("0 to 1", lambda v: 0 <= v <= 1), "weight of the hard loss; the soft loss gets 1 - alpha"
    )
    temperature: float = setting(
        5.0, number("a number above 0", lambda v: v > 0), "T that softens both models' probabilities in the soft loss"
    )
    scale_soft_loss: bool = setting(
        True, FLAG, "multiply the soft loss by T^2; without it its gradients shrink by 1/T^2"
    )
    baseline: str | None = setting(
        None, optional(NAME), "the recipe to compare this one with; none: that of the same arch without a teacher"
    )
    train_size: int | None = setting(
        None, optional(whole(1)), "train on this many images, stratified, the same for every seed; none: all"
    )

    def __post_init__(self):
        problems = list(field_problems(self).values())
        if self.nesterov is True and self.momentum == 0:
            problems.append("nesterov = True: takes a momentum above 0")
        if problems:
            raise UserError(*problems)


@dataclass(frozen=True)
class Config:
    """A whole experiment. Raises UserError, naming every field that is wrong."""

    recipes: dict[str, Recipe]
    run: str = setting("run", NAME, "name of the folders under checkpoints_path and imgs_path")
    dataset: str = setting(
        "cifar10",
        text("cifar10, digits or a folder", r"[^\0\n]+"),
        "cifar10, digits, or a folder with train/CLASS/* and test/CLASS/* images",
    )
    image_size: int = setting(224, whole(8), "images are resized to this many pixels a side")
    horizontal_flip: float = setting(
        0.5, number("0 to 1", lambda v: 0 <= v <= 1), "share of the training images that are mirrored"
    )
    crop_padding: int = setting(
        0, whole(0, 1000), "training images are shifted at random by up to this many of their own pixels each way"
    )
    validation_size: int = setting(
        0, whole(0), "training images held out, stratified, and measured in place of the test set while training"
    )
    batch_size: int = setting(100, whole(2), "images a step; the rest that fills no batch sits out, others each epoch")
    seeds: tuple[int, ...] = setting(
        (0,), several(whole(0, 2**32 - 1), "whole numbers from 0 to 2^32 - 1"), "train every recipe once with each"
    )
    only: tuple[str, ...] = setting((), several(NAME, "names of recipes"), "train or evaluate just these recipes")
    overwrite: bool = setting(False, FLAG, "train again, in its place, what was trained with other settings")
    checkpoint_minutes: float = setting(
        10, number("a number above 0", lambda v: v > 0), "keep the state of a training this often, and after each epoch"
    )
    device: str = setting(
        "auto",
        text("auto, cpu, cuda, cuda:N or mps", r"auto|cpu|cuda(:\d+)?|mps"),
        "auto: CUDA where there is one, else Apple's MPS, else the CPU",
    )
    precision: str = setting(
        "auto",
        choice("auto", "bf16", "fp32"),
        "bf16: autocast over float32 weights; auto: bf16 where the hardware computes in it and gains by it",
    )
    compile: str = setting(
        "auto",
        choice("auto", "on", "off"),
        "torch.compile the model; auto: on CUDA, once what is left of the training repays the minute it takes",
    )
    deterministic: bool = setting(
        False, FLAG, "on CUDA, the same bits each time, slower (a CPU gives them anyway); then compile = auto is off"
    )
    sync_batchnorm: bool = setting(
        False, FLAG, "with several processes, BatchNorm over the whole batch instead of each process's part; CUDA only"
    )
    data_path: str = setting("data", PATH, "where CIFAR-10 is kept")
    checkpoints_path: str = setting("checkpoints", PATH, "where models are written: RUN/seedS/MODEL.pt")
    imgs_path: str = setting("imgs", PATH, "where reports are written: RUN/results.md and figures")

    def __post_init__(self):
        wrong = field_problems(self)
        # What follows compares fields; one that is wrong in itself stands in with its default.
        given = {field.name: getattr(self, field.name) for field in settings_of(Config)}
        given.update({field.name: field.default for field in settings_of(Config) if field.name in wrong})
        problems = [*wrong.values(), *self._conflicts(**given)]
        if problems:
            raise UserError(*problems)

    def _conflicts(self, *, seeds, only, dataset, validation_size, batch_size, **_) -> list[str]:
        """What is wrong between fields that are each right."""
        problems = []
        if not self.recipes:
            problems.append("recipes = {}: takes one recipe or more")
        if not seeds or len(set(seeds)) < len(seeds):
            problems.append(f"seeds = {seeds}: takes one or more, none of them twice")
        for name in only:
            if name not in self.recipes:
                problems.append(f"only = {name!r}: no such recipe; {nearest(name, self.recipes)}")
        available = TRAINING_IMAGES.get(dataset, math.inf) - validation_size
        if available <= 0:
            problems.append(f"validation_size = {validation_size}: leaves none of the training images")
        elif batch_size > available:
            problems.append(f"batch_size = {batch_size}: takes at most the {available} training images")
        for name, recipe in self.recipes.items():
            if not NAME.accepts(name):
                problems.append(f"recipe {name!r}: its name takes {NAME.takes}")
            if recipe.train_size is not None and not batch_size <= recipe.train_size <= available:
                problems.append(
                    f"{name}.train_size = {recipe.train_size}: takes a number from batch_size = {batch_size}"
                    + (f" to the {available} training images" if available < math.inf else " up")
                )
            for field, other in (("teacher", recipe.teacher), ("baseline", recipe.baseline)):
                if other is not None and other not in self.recipes:
                    problems.append(f"{name}.{field} = {other!r}: no such recipe; {nearest(other, self.recipes)}")
            if recipe.baseline == name:
                problems.append(f"{name}.baseline = {name!r}: takes another recipe than itself")
            if name in (teachers := self.teachers_of(name)):
                circle = " <- ".join([name, *teachers[: teachers.index(name) + 1]])
                problems.append(f"{name}.teacher = {recipe.teacher!r}: teaches itself in a circle, {circle}")
        return problems

    def teachers_of(self, name: str) -> list[str]:
        """The teacher of a recipe, the teacher's teacher and so on; stops where a circle closes."""
        chain = []
        while (name := self.recipes[name].teacher if name in self.recipes else None) and name not in chain:
            chain.append(name)
        return chain

    def selected(self) -> list[str]:
        """The recipes to work on (those in `only`, or all), every teacher before its students."""
        return sorted(self.only or self.recipes, key=lambda name: len(self.teachers_of(name)))


# ---------------------------------------------------------------------------------------------------------------------
# The experiments

with one_line_errors(), line_of_mistakes():
    # The original's table. A row is a model; a row with a teacher is distilled from that row.
    RECIPES = {
        "teacher": Recipe(arch="resnet50", epochs=5),
        "student": Recipe(arch="resnet18", epochs=5),
        "student_kd": Recipe(arch="resnet18", epochs=10, teacher="teacher", alpha=0.25, temperature=5.0),
    }

    # The loss exactly as published: without T^2 the soft loss has about a tenth of the weight it seems to have.
    ORIGINAL = {name: dataclasses.replace(recipe, scale_soft_loss=False) for name, recipe in RECIPES.items()}

    # From random weights; the students train equally long, so that only the teacher sets them apart.
    FROM_SCRATCH = {"pretrained": False, "lr": 0.02, "schedule": "onecycle", "weight_decay": 5e-4, "nesterov": True}
    SCRATCH = {
        "teacher": Recipe(arch="resnet50", epochs=30, **FROM_SCRATCH),
        "student": Recipe(arch="resnet18", epochs=30, **FROM_SCRATCH),
        "student_kd": Recipe(arch="resnet18", epochs=30, teacher="teacher", **FROM_SCRATCH),
    }

    # The teacher sees every digit, the students 200 of them: here the teacher has something to give.
    FEW_IMAGES = {**FROM_SCRATCH, "lr": 0.01}
    DEMO = {
        "teacher": Recipe(arch="resnet50", epochs=8, **FEW_IMAGES),
        "student": Recipe(arch="resnet18", epochs=30, train_size=200, **FEW_IMAGES),
        "student_kd": Recipe(arch="resnet18", epochs=30, train_size=200, teacher="teacher", **FEW_IMAGES),
    }

    PRESETS = {
        "cifar10": Config(RECIPES),
        "original": Config(ORIGINAL),
        "scratch": Config(SCRATCH, image_size=64),
        "demo": Config(DEMO, dataset="digits", image_size=32, horizontal_flip=0.0, batch_size=50),
    }
    PRESETS = {name: dataclasses.replace(preset, run=name) for name, preset in PRESETS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is a UserError."""

    def error(self, message: str) -> None:
        raise UserError(message)


def parse(argv: list[str] | None = None, own: Mapping[str, str] = MappingProxyType({})) -> Config:
    """The preset that `--preset` names (cifar10 by default) with the flags of `argv` (sys.argv[1:]) put over it.

    `own` are the calling script's own flags, with a line on each for --help; it takes them out of `argv` itself. Raises
    UserError with every mistake at once: unknown flags and presets, and fields that take no such value.
    """
    preset_parser = Parser(add_help=False, allow_abbrev=False)
    preset_parser.add_argument("--preset", default="cifar10")
    known, rest = preset_parser.parse_known_args(argv)
    if known.preset not in PRESETS:
        raise UserError(f"--preset {known.preset}: no such preset; {nearest(known.preset, PRESETS)}")
    preset = PRESETS[known.preset]

    words, unknown = _words(preset, known.preset, rest, own)
    problems = [_unknown_flag(flag, preset, own) for flag in unknown]
    recipes = {}
    for name, recipe in preset.recipes.items():
        try:
            recipes[name] = dataclasses.replace(recipe, **_read(Recipe, words, prefix=f"{name}."))
        except UserError as error:
            problems += [f"{name}.{message}" for message in error.messages]
            recipes[name] = recipe
    try:
        config = dataclasses.replace(preset, recipes=recipes, **_read(Config, words))
    except UserError as error:
        problems += error.messages
    if problems:
        raise UserError(*problems)
    return config


def _words(
    preset: Config, preset_name: str, argv: list[str], own: Mapping[str, str]
) -> tuple[dict[str, list[str]], list[str]]:
    """The words behind each flag that was given, and what is no flag at all."""

    def show(value):
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()

    def wrap(flag, help):
        first, others = f"  {flag:<25} ", " " * 28
        return textwrap.fill(help, 110, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)

    lines = [wrap(flag, help) for flag, help in own.items()]
    lines += [wrap("--preset", f"{', '.join(PRESETS)} (now {preset_name})"), "", "settings (and what they are now):"]
    for field in settings_of(Config):
        lines.append(
            wrap(f"--{field.name}", f"{field.metadata['help']} ({show(getattr(preset, field.name)) or 'all'})")
        )
    lines += ["", f"settings of a recipe, one of {', '.join(preset.recipes)}:"]
    for field in settings_of(Recipe):
        now = {name: show(getattr(recipe, field.name)) for name, recipe in preset.recipes.items()}
        values = ", ".join(f"{name} {value}" for name, value in now.items())
        values = values if len(set(now.values())) > 1 else next(iter(now.values()))
        lines.append(wrap(f"--RECIPE.{field.name}", f"{field.metadata['help']} ({values})"))

    parser = Parser(
        usage=f"%(prog)s {''.join(f'[{flag}] ' for flag in own)}"
        "[--preset NAME] [--SETTING VALUE ...] [--RECIPE.SETTING VALUE ...]",
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    flags = [("", field) for field in settings_of(Config)]
    flags += [(f"{name}.", field) for name in preset.recipes for field in settings_of(Recipe)]
    for prefix, field in flags:
        parser.add_argument(
            f"--{prefix}{field.name}",
            dest=f"{prefix}{field.name}",
            nargs=field.metadata["kind"].words,
            const="true" if field.metadata["kind"].words == "?" else None,
            help=argparse.SUPPRESS,
        )
    given, unknown = parser.parse_known_args(argv)
    return vars(given), [word for word in unknown if word.startswith("-")] or unknown


def _read(of: type, words: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Field values from words; a word that cannot be read stays as it is, for the validation to name."""
    values = {}
    for field in settings_of(of):
        if (given := words.get(prefix + field.name)) is None:
            continue
        read = field.metadata["kind"].read
        try:
            values[field.name] = tuple(map(read, given)) if isinstance(given, list) else read(given)
        except (ValueError, KeyError):
            values[field.name] = given
    return values


def _unknown_flag(word: str, preset: Config, own: Iterable[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r}: a value without a flag; see --help"
    name = word.lstrip("-").split("=")[0]
    recipe_settings = [field.name for field in settings_of(Recipe)]
    if name in recipe_settings:
        return f"--{name}: belongs to a recipe; write " + " or ".join(f"--{recipe}.{name}" for recipe in preset.recipes)
    known = [*(flag.split()[0].lstrip("-") for flag in own), "preset", *(field.name for field in settings_of(Config))]
    known += [f"{recipe}.{setting}" for recipe in preset.recipes for setting in recipe_settings]
    close = closest(name, known)
    return f"{word.split('=')[0]}: no such setting; " + (f"did you mean --{close}?" if close else "see --help")
