"""Config, a whole experiment, with its validation; Model, one of its models."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError, suggest
from engine.fields import (
    FLAG,
    FRACTION,
    NAME,
    PATH,
    POSITIVE,
    RECIPE_NAME,
    choice,
    integer,
    invalid_fields,
    or_named,
    setting,
    settings_of,
    several,
    text,
)
from engine.named import Named
from engine.recipes import SEED, Recipe, baseline_of
from engine.sweeps import Grid, expand, grid


@dataclass(frozen=True)
class Model:
    """One model of an experiment: the recipe `name`, trained with one seed. Equal are those of equal name and seed."""

    name: str
    seed: int
    config: "Config" = dataclasses.field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"

    @property
    def recipe(self) -> Recipe:
        return self.config.recipes[self.name]

    @property
    def path(self) -> Path:
        """Of its checkpoint."""
        return Path(self.config.checkpoints_path, self.config.run, f"seed{self.seed}", f"{self.name}.pt")

    @property
    def logits_path(self) -> Path:
        """Of its stored logits, if it is a teacher."""
        return self.path.with_suffix(".logits")

    @property
    def teacher(self) -> "Model | None":
        if self.recipe.teacher is None:
            return None
        return Model(self.recipe.teacher, self.recipe.seed_of_teacher(self.seed), self.config)


@dataclass(frozen=True)
class Config:
    """A whole experiment. Raises UserError, naming every field that is wrong."""

    recipes: dict[str, Recipe]
    run: str = setting("run", NAME, "name of the folders under checkpoints_path and imgs_path")
    dataset: Named = setting(
        "cifar10",
        text("the name of a data set, a folder, or MODULE:NAME", r"[^\0\n]+")._replace(named=True),
        "cifar10, cifar100, svhn, digits, a folder with train/CLASS/* and test/CLASS/* images, or MODULE:NAME, called "
        "without arguments, which returns the training, perhaps the validation, and the test set: map-style data sets "
        "of (image, label)",
    )
    image_size: int = setting(224, integer(8, 4096), "images are resized to this many pixels a side")
    resize: str = setting(
        "squash",
        choice("squash", "crop", "pad"),
        "how an image becomes a square: all of it, squashed; crop: the centre of its longer side; pad: all of it, on "
        "black",
    )
    horizontal_flip: float = setting(0.5, FRACTION, "probability that a training image is mirrored")
    crop_padding: int = setting(
        0,
        integer(0, 1000),
        "training images are shifted at random by up to this many pixels each way, before they are resized to "
        "image_size; the images of a folder that are larger are reduced to it first, as they are read",
    )
    augment: Named = setting(
        "none",
        or_named(choice("none", "crop", "trivialaugment", "randomerasing")),
        "torchvision's RandomResizedCrop, TrivialAugmentWide or RandomErasing of the training images, at the size at "
        "which they are shifted, see crop_padding; or MODULE:NAME, from a uint8 image (3, H, W) to another",
    )
    skip_unreadable: bool = setting(
        False, FLAG, "leave out the images of a folder that cannot be read; the report lists them"
    )
    largest_image: float = setting(
        89.5, POSITIVE, "megapixels; a larger image file is not read, as it may be a decompression bomb"
    )
    validation_size: int = setting(
        0,
        integer(0),
        "training images to hold out, stratified, for the evaluation after each epoch, in place of the test set",
    )
    batch_size: int = setting(100, integer(2), "images per step; the last incomplete batch of an epoch is dropped")
    seeds: tuple[int, ...] = setting(
        (0,),
        several(SEED, "integers from 0 to 2^32 - 1"),
        "random seeds; every recipe is trained once with each",
    )
    only: tuple[str, ...] = setting(
        (),
        several(NAME, "names of recipes"),
        "train or evaluate just these recipes; a swept one stands for all its rows",
    )
    sweep: tuple[str, ...] = setting(
        (),
        several(text("RECIPE.SETTING=VALUE,VALUE", r"[^\0\n]+"), "of the form RECIPE.SETTING=VALUE,VALUE"),
        "train a recipe with all combinations of these values, such as student_kd.temperature=1,2,4",
    )
    overwrite: bool = setting(
        False, FLAG, "retrain, in place, models that were trained with other settings or by other code, and only those"
    )
    jobs: int = setting(
        1,
        integer(1, 64),
        "models to train at the same time, each with its share of the CPU's threads, whose number changes a model",
    )
    checkpoint_minutes: float = setting(
        10, POSITIVE, "save the training state this often, and after an epoch if the last save was over 10 s ago"
    )
    device: str = setting(
        "auto",
        text("auto, cpu, cuda, cuda:N or mps", r"auto|cpu|cuda(:\d+)?|mps"),
        "auto: CUDA where available, else Apple's MPS, else the CPU",
    )
    precision: str = setting(
        "auto",
        choice("auto", "bf16", "fp32"),
        "of training; bf16: autocast over float32 weights; auto: the faster one, timed when a run starts. evaluate.py "
        "computes in fp32 unless its command line says bf16",
    )
    compile: str = setting(
        "auto",
        choice("auto", "on", "off"),
        "torch.compile the model; auto: on CUDA, if the training is long enough to repay the minute it takes",
    )
    deterministic: bool = setting(
        False,
        FLAG,
        "bit-reproducible but slower on CUDA, without compile = auto (a CPU always is, given the number of threads)",
    )
    sync_batchnorm: bool = setting(
        False, FLAG, "with several processes, BatchNorm over the whole batch instead of each process's part; CUDA only"
    )
    data_path: str = setting("data", PATH, "where downloaded data sets are kept")
    checkpoints_path: str = setting("checkpoints", PATH, "where models are written: RUN/seedS/MODEL.pt")
    imgs_path: str = setting("imgs", PATH, "where reports are written: RUN/results.md and figures")
    # Not settings: the preset that this is, if any, and the rows that sweeps have made.
    preset: str | None = dataclasses.field(default=None, compare=False)
    swept: Grid = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.recipes, dict) or not self.recipes:
            raise UserError(f"recipes = {self.recipes!r}: must be a table of one recipe or more")
        odd = [name for name, row in self.recipes.items() if not (isinstance(name, str) and isinstance(row, Recipe))]
        if odd:
            raise UserError(*(f"recipe {name!r}: must be a name and a Recipe(...)" for name in odd))
        invalid = invalid_fields(self)
        # Conflicts between fields are checked with the default in place of a value that is itself wrong.
        values = {field.name: getattr(self, field.name) for field in settings_of(Config)}
        values |= {field.name: field.default for field in settings_of(Config) if field.name in invalid}
        try:
            swept = grid(values["sweep"])
            object.__setattr__(self, "recipes", expand(self.recipes, swept))
        except UserError as error:
            raise UserError(*invalid.values(), *error.messages) from None
        swept = self.swept | swept
        object.__setattr__(self, "swept", swept)
        only: dict[str, None] = {}
        for name in values["only"]:
            if name in self.recipes or name not in swept:
                only[name] = None
            only |= dict.fromkeys(swept.get(name, {}))
        problems = [*invalid.values(), *self._conflicts(values["seeds"], tuple(only))]
        problems += self._recipe_conflicts(values["batch_size"], swept)
        if problems:
            raise UserError(*problems)
        object.__setattr__(self, "only", tuple(only))
        for name in ("dataset", "data_path", "checkpoints_path", "imgs_path"):
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))  # "~" in config.py or after "="

    def _conflicts(self, seeds: tuple[int, ...], only: tuple[str, ...]) -> list[str]:
        problems = []
        if not seeds or len(set(seeds)) < len(seeds):
            problems.append(f"seeds = {seeds}: must be one or more distinct seeds")
        for name in only:
            if name not in self.recipes:
                problems.append(f"only = {name!r}: no such recipe; {suggest(name, self.recipes)}")
        return problems

    def _recipe_conflicts(self, batch_size: int, swept: Iterable[str]) -> list[str]:
        problems = []
        same_file = Counter(name.casefold() for name in self.recipes)  # on file systems that ignore case
        for name, recipe in self.recipes.items():
            if not RECIPE_NAME.accepts(name):
                problems.append(f"recipe {name!r}: its name must be {RECIPE_NAME.expected}")
            elif same_file[name.casefold()] > 1:
                problems.append(
                    f"recipe {name!r}: its name must differ from the others in more than upper and lower case"
                )
            if recipe.train_size is not None and recipe.train_size < batch_size:
                problems.append(f"{name}.train_size = {recipe.train_size}: must be batch_size = {batch_size} or more")
            for field, other, known in (("teacher", recipe.teacher, ()), ("baseline", recipe.baseline, swept)):
                if other is not None and other not in self.recipes and other not in known:
                    problems.append(f"{name}.{field} = {other!r}: no such recipe; {suggest(other, self.recipes)}")
            if recipe.shuffle_teacher and self.unlimited_views:
                problems.append(
                    f"{name}.shuffle_teacher = True: needs stored logits, so no crop_padding and no augment"
                )
            if recipe.teacher in self.recipes and self.recipes[recipe.teacher].logits_file and self.unlimited_views:
                problems.append(
                    f"{name}.teacher = {recipe.teacher!r}: has logits of an image and its mirror image only, so no "
                    "crop_padding and no augment"
                )
            if recipe.baseline == name:
                problems.append(f"{name}.baseline = {name!r}: a recipe cannot be its own baseline")
            if name in (teachers := self.teachers_of(name)):
                cycle = " <- ".join([name, *teachers[: teachers.index(name) + 1]])
                problems.append(f"{name}.teacher = {recipe.teacher!r}: a recipe cannot be its own teacher, {cycle}")
        return problems

    @property
    def unlimited_views(self) -> bool:
        """Whether a training image has more views than itself and its mirror image, so that logits cannot be stored."""
        return self.crop_padding > 0 or self.augment != "none"

    def teachers_of(self, name: str) -> list[str]:
        """The teacher of a recipe, the teacher's teacher and so on; ends where a cycle closes."""
        chain: list[str] = []
        teacher = self.recipes[name].teacher
        while teacher and teacher not in chain:
            chain.append(teacher)
            teacher = self.recipes[teacher].teacher if teacher in self.recipes else None
        return chain

    def selected(self) -> list[str]:
        """The selected recipes (those in `only`, or all), every teacher before its students."""
        return sorted(self.only or self.recipes, key=lambda name: len(self.teachers_of(name)))

    def seeds_of(self, name: str) -> list[int]:
        """The seeds that a recipe is trained with: all of them.

        A recipe that is only a teacher is trained with those that its students use: the `teacher_seed` of a student, or
        the student's own seeds.
        """
        students = [other for other, recipe in self.recipes.items() if recipe.teacher == name]
        if not students or name in [baseline_of(other, self.recipes) for other in self.recipes]:
            return list(self.seeds)
        used = [self.recipes[other].seed_of_teacher(seed) for other in students for seed in self.seeds_of(other)]
        return list(dict.fromkeys(used))

    def models(self) -> list[Model]:
        """Every selected model, seed by seed, each teacher before its students."""
        names = self.selected()
        ordered: dict[Model, None] = {}

        def add(model: Model) -> None:
            if model.teacher and model.teacher.name in names:
                add(model.teacher)
            ordered[model] = None

        for seed in dict.fromkeys([*self.seeds, *(seed for name in names for seed in self.seeds_of(name))]):
            for name in names:
                if seed in self.seeds_of(name):
                    add(Model(name, seed, self))
        return list(ordered)
