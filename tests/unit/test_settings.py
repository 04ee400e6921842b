import dataclasses
import importlib
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT

import evaluate
import teacher_student_model
import utils
from config import PRESETS, RECIPES, parse
from engine import flags
from engine.errors import (
    Diverged,
    UserError,
    at_most_ten,
    check_duplicate_keys,
    closest,
    escape_control,
    exit_on_error,
    first_line,
    locate_errors,
    suggest,
)
from engine.fields import settings_of
from engine.recipes import Recipe
from engine.settings import Config, Model


def test_the_default_is_the_originals_experiment():
    config = parse([])
    assert (config.dataset, config.image_size, config.batch_size, config.horizontal_flip) == ("cifar10", 224, 100, 0.5)
    rows = {name: (r.arch, r.epochs, r.lr, r.momentum, r.pretrained) for name, r in config.recipes.items()}
    originals = {
        "teacher": ("resnet50", 5, 0.001, 0.9, True),
        "student": ("resnet18", 5, 0.001, 0.9, True),
        "student_10": ("resnet18", 10, 0.001, 0.9, True),  # the one row that the original lacks
        "student_kd": ("resnet18", 10, 0.001, 0.9, True),
    }
    assert originals.items() <= rows.items()
    distilled = config.recipes["student_kd"]
    assert (distilled.teacher, distilled.alpha, distilled.temperature) == ("teacher", 0.25, 5.0)
    assert distilled.baseline == "student_10"
    assert distilled.scale_soft_loss


def test_the_original_preset_differs_only_in_scale_soft_loss():
    original, default = PRESETS["original"], PRESETS["cifar10"]
    assert not original.recipes["student_kd"].scale_soft_loss
    recipes = {name: dataclasses.replace(recipe, scale_soft_loss=True) for name, recipe in original.recipes.items()}
    assert dataclasses.replace(original, recipes=recipes, run="cifar10") == default


def names_and_seeds(models: list[Model]) -> list[tuple[str, int]]:
    return [(model.name, model.seed) for model in models]


def test_one_teacher_seed_for_all_students_trains_one_teacher():
    flags = "--preset scratch --seeds 0 1 2 --student_kd.teacher_seed 7"
    config = parse(flags.split())
    students = [(name, seed) for seed in (0, 1, 2) for name in ("student", "student_kd")]
    models = names_and_seeds(config.models())
    assert sorted(models) == sorted([("teacher", 7), *students])
    assert models.index(("teacher", 7)) < models.index(("student_kd", 0))
    assert Model("student_kd", 2, config).teacher == Model("teacher", 7, config)
    of_its_own_kind = dataclasses.replace(
        config, recipes={"student": Recipe(), "kd": Recipe(teacher="student", teacher_seed=7)}
    )
    assert of_its_own_kind.seeds_of("student") == [0, 1, 2]  # it is also the baseline
    own = parse(["--preset", "scratch", "--seeds", "0", "1"])
    assert Model("student_kd", 1, own).teacher == Model("teacher", 1, own)
    assert names_and_seeds(own.models())[:3] == [("teacher", 0), ("student", 0), ("student_kd", 0)]
    assert Model("student", 1, own).teacher is None


def test_a_chain_of_teachers_is_trained_with_the_seeds_that_are_used():
    def models(**recipes):
        return names_and_seeds(Config({n: Recipe(**row) for n, row in recipes.items()}, seeds=(3, 1, 2)).models())

    shared = {"teacher": "assistant", "teacher_seed": 0}
    chain = {"teacher": {"arch": "resnet50"}, "assistant": {"arch": "resnet34", "teacher": "teacher"}}
    students = [("student", seed) for seed in (3, 1, 2)]
    assert models(**chain, student=shared) == [("teacher", 0), ("assistant", 0), *students]
    own = {**chain, "other": {"arch": "resnet152", "teacher": "teacher", "teacher_seed": 7}}
    assert sorted(m for m in models(**own, student=shared) if m[0] == "teacher") == [("teacher", 0), ("teacher", 7)]
    every_seed = models(**chain, student={"teacher": "assistant"})
    assert [seed for name, seed in every_seed if name == "teacher"] == [3, 1, 2]
    longer = {**chain, "junior": {"arch": "resnet101", "teacher": "assistant"}}
    assert models(**longer, student={"teacher": "junior", "teacher_seed": 5})[:3] == [
        ("teacher", 5),
        ("assistant", 5),
        ("junior", 5),
    ]


# The command line


def test_a_flag_equals_an_edit():
    flags = "--batch_size 64 --student_kd.temperature 4 --seeds 0 1 2 --student.nesterov true --overwrite"
    config = parse([*flags.split(), "--student.train_size=500", "--only", "student"])
    default = PRESETS["cifar10"]
    recipes = {
        **default.recipes,
        "student": dataclasses.replace(default.recipes["student"], nesterov=True, train_size=500),
        "student_kd": dataclasses.replace(default.recipes["student_kd"], temperature=4.0),
    }
    changes = {"batch_size": 64, "seeds": (0, 1, 2), "overwrite": True, "only": ("student",)}
    assert config == dataclasses.replace(default, recipes=recipes, **changes)


def values(field: str, recipes: dict[str, Recipe]) -> dict[str, object]:
    return {name: getattr(recipe, field) for name, recipe in recipes.items()}


def test_a_value_is_the_flags_of_the_row_else_that_of_all_rows_else_the_rows_own_else_the_shared_one():
    row = partial(Recipe, lr=0.01, epochs=7)
    rows = {"teacher": row(epochs=5), "student": row(), "student_kd": row(teacher="teacher")}
    parse = partial(flags.parse, {"mine": Config(rows, run="mine")}, script_flags={})
    shared = parse(argv=[]).recipes
    assert values("lr", shared) == {"teacher": 0.01, "student": 0.01, "student_kd": 0.01}
    assert values("epochs", shared) == {"teacher": 5, "student": 7, "student_kd": 7}
    for_all = parse(argv=["--epochs", "3", "--lr=0.5"]).recipes
    assert values("lr", for_all) == {"teacher": 0.5, "student": 0.5, "student_kd": 0.5}
    assert values("epochs", for_all) == {"teacher": 3, "student": 3, "student_kd": 3}
    for more in (["--student.epochs", "7", "--epochs", "3"], ["--epochs", "3", "--student.epochs", "7"]):
        assert values("epochs", parse(argv=more).recipes) == {"teacher": 3, "student": 7, "student_kd": 3}


OWN = Config(
    {
        "teacher": Recipe(arch="resnet50", epochs=0, weights="random"),
        "vgg": Recipe(arch="vgg11", pretrained=False),
        "adam": Recipe(optimizer="adamw", pretrained=False),
        "kd": Recipe(teacher="teacher", pretrained=False),
        "ttm": Recipe(teacher="teacher", soft_loss="ttm", pretrained=False),
    }
)


@pytest.mark.parametrize(
    ("words", "taken_by"),
    [
        ("--epochs 3", "vgg adam kd ttm"),  # the teacher is used as it is
        ("--nesterov", "teacher vgg kd ttm"),
        ("--momentum 0.5", "teacher vgg kd ttm"),
        ("--stem cifar", "teacher adam kd ttm"),
        ("--temperature 2", "kd ttm"),
        ("--scale_soft_loss false", "kd"),
        ("--soft_loss dist", "kd ttm"),
        ("--soft_loss dkd --kd.soft_loss dist", "kd ttm"),
        ("--teacher vgg", "kd ttm"),
        ("--teacher kd", "ttm"),
        ("--baseline kd", "teacher vgg adam ttm"),
        ("--loss_options inter_weight=2 --kd.soft_loss dist", "kd"),
        ("--train_size 500", "teacher vgg adam kd ttm"),
    ],
)
def test_rows_that_cannot_take_a_value_for_all_rows_keep_theirs_and_are_named(words, taken_by, capsys):
    recipes = flags.parse({"own": OWN}, words.split(), {}).recipes
    field, before = words.split()[0].strip("-"), OWN.recipes
    changed = {name for name in recipes if getattr(recipes[name], field) != getattr(before[name], field)}
    assert changed == {*taken_by.split()}
    kept = set(recipes) - changed
    output = capsys.readouterr().err
    assert len(output.splitlines()) == (1 if kept else 0)
    assert {name for name in recipes if re.search(rf"\b{name},", output.partition("effect on")[2])} == kept


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--lr -1", "lr = -1.0"),  # once, not for each row
        ("--lr -1 --student.lr 0.1", "lr = -1.0"),
        ("--arch resnet19", "arch = 'resnet19'"),
        ("--loss_options power", "loss_options = ['power']"),
        ("--epochs 0", "--epochs 0"),  # no row has weights
        ("--scale_soft_loss false --soft_loss ttm", "--scale_soft_loss false"),
        ("--loss_options power=3", "--loss_options power=3"),  # not an option of kd
        ("--teacher student_kd", "--teacher student_kd"),
    ],
)
def test_a_value_that_no_row_can_take_is_one_mistake(words, problem):
    with pytest.raises(UserError) as error:
        parse(words.split())
    (message,) = error.value.messages
    assert message.startswith(f"{problem}:")


def test_options_of_a_soft_loss_by_flag():
    words = ["--soft_loss", "dkd", "--loss_options", "nontarget_weight=2", "target_weight=0.5"]
    (recipe,) = [recipe for recipe in parse(words).recipes.values() if recipe.teacher]
    assert recipe.loss_options == {"nontarget_weight": 2.0, "target_weight": 0.5}
    unknown, no_number, twice = "nontarget_wait=2", "nontarget_weight=two", "target_weight=1 target_weight=2"
    for wrong in (unknown, no_number, twice, "nontarget_weight=nan", "nontarget_weight"):
        with pytest.raises(UserError, match=r"^student_kd\.loss_options = "):
            parse(["--student_kd.soft_loss=dkd", "--student_kd.loss_options", *wrong.split()])


def test_none_on_the_command_line_clears_an_optional_setting():
    recipes = parse(["--preset", "scratch", "--student_kd.teacher", "none", "--student.train_size", "None"]).recipes
    assert recipes["student_kd"].teacher is None
    assert recipes["student"].train_size is None


def test_each_preset_has_its_own_run():
    assert {name: parse(["--preset", name]).run for name in PRESETS} == {name: name for name in PRESETS}


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ("--batch_sise 64", ["--batch_sise", "did you mean --batch_size?"]),
        ("--student_dk.alpha 0.5", ["--student_dk.alpha", "did you mean --student_kd.alpha?"]),
        ("--lr=--", ["lr"]),
        ("--preset dem", ["--preset dem", "did you mean demo?"]),
        ("64", ["'64'", "a value without a flag"]),
        ("--batch_size", ["--batch_size", "expected one argument"]),
        ("--batch_size many", ["batch_size = 'many'", "an integer, 2 or more"]),
        ("--seeds 1 2 1", ["seeds = (1, 2, 1)", "distinct seeds"]),
        ("--seeds 0,1", ["seeds = ['0,1']", "separated by spaces"]),
        ("--crop_padding 2000", ["crop_padding = 2000", "0 to 1000"]),
        ("-preset demo", ["-preset", "did you mean --preset?"]),
        ("--seeds -1", ["seeds = (-1,)", "from 0"]),
        ("--only studnet", ["only = 'studnet'", "did you mean student?"]),
        ("--student.arch resnet19", ["student.arch = 'resnet19'", "resnet18"]),
        ("--student.epochs 0", ["student.epochs = 0", "needs weights, a file or random"]),
        ("--student.lr 0", ["student.lr = 0.0", "above 0"]),
        ("--student_kd.alpha 1.5", ["student_kd.alpha = 1.5", "0 to 1"]),
        ("--student_kd.temperature 0", ["student_kd.temperature = 0.0", "above 0"]),
        ("--student_kd.temperature inf", ["student_kd.temperature = inf", "above 0"]),
        ("--student_kd.temperature nan", ["student_kd.temperature = nan"]),
        ("--student.nesterov yes", ["student.nesterov = 'yes'", "true or false"]),
        ("--student.nesterov true --student.momentum 0", ["student.nesterov", "momentum above 0"]),
        ("--student.optimizer adamw --student.momentum 0.8", ["student.momentum = 0.8", "with optimizer = adamw"]),
        ("--student.stem cifar", ["student.stem = 'cifar'", "pretrained = False"]),
        ("--student_kd.epochs 0 --student_kd.weights random", ["student_kd.epochs = 0", "must be trained"]),
        ("--student.teacher_seed 0", ["student.teacher_seed = 0", "without a teacher"]),
        ("--student.train_size 50", ["student.train_size = 50", "must be batch_size = 100 or more"]),
        ("--student.teacher nobody", ["student.teacher = 'nobody'", "no such recipe"]),
        ("--student_kd.baseline nobody", ["student_kd.baseline = 'nobody'", "no such recipe"]),
        ("--student.baseline student", ["student.baseline = 'student'", "cannot be its own baseline"]),
        ("--teacher.teacher student_kd", ["teacher.teacher = 'student_kd'", "teacher <- student_kd <- teacher"]),
        ("--student.teacher student", ["student.teacher = 'student'", "its own teacher", "student <- student"]),
        ("--run ../elsewhere", ["run = '../elsewhere'", "letters, digits"]),
        ("--device tpu", ["device = 'tpu'", "cuda"]),
        ("--precision fp8", ["precision = 'fp8'", "bf16"]),
    ],
)
def test_a_mistake_is_reported_with_field_value_and_expected_value(flags, messages):
    with pytest.raises(UserError) as error:
        parse(flags.split())
    for message in messages:
        assert message in str(error.value)


def test_all_mistakes_are_reported_at_once():
    flags = "--sed 1 --image_size x --seeds 0 0 --student.epochs 0 --student.lr -1 --student_kd.teacher nobody"
    with pytest.raises(UserError) as error:
        parse(flags.split())
    message = str(error.value)
    for field in ("--sed", "image_size", "seeds", "student.epochs", "student.lr", "student_kd.teacher"):
        assert field in message, message
    assert len(error.value.messages) == 6


def test_help_has_a_line_and_the_values_of_each_field(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for field in settings_of(Config):
        assert f"--{field.name} " in shown
    for field in dataclasses.fields(Recipe):
        assert f"--RECIPE.{field.name} " in shown
    assert "(teacher 5, student 5" in " ".join(shown.split())
    assert "%%" not in shown


def test_scripts_can_have_their_own_flags(capsys):
    own = {"--predict IMAGE ...": "what the models predict for these files"}
    with pytest.raises(SystemExit):
        parse(["--help"], own)
    shown = capsys.readouterr().out
    assert "[--predict IMAGE ...] [--preset NAME]" in shown
    assert "--predict IMAGE ...       what the models predict for these files" in shown
    with pytest.raises(UserError, match="did you mean --predict"):
        parse(["--predcit"], own)
    with pytest.raises(UserError, match="no such setting"):
        parse(["--predict", "x.png"])


# Recipes and configs


def test_recipes_and_configs_are_validated_when_made_and_cannot_be_changed():
    with pytest.raises(UserError, match="epochs = '5'"):
        Recipe(epochs="5")
    with pytest.raises(UserError, match=r"a tuple such as \(0, 1\) or \(0,\) in config\.py"):
        Config({"student": Recipe()}, seeds=[0, 1])
    with pytest.raises(UserError, match="one recipe or more"):
        Config({})
    for name in ("../x", "con", "LPT1"):  # the last two are no names of files on Windows
        with pytest.raises(UserError, match="its name must be"):
            Config({name: Recipe()})
    for name in ("aux", "nul.2"):
        with pytest.raises(UserError, match="run = "):
            Config({"console": Recipe()}, run=name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().epochs = 6


def test_teachers_come_before_their_students():
    recipes = {
        "last": Recipe(teacher="middle"),
        "middle": Recipe(teacher="first"),
        "alone": Recipe(),
        "first": Recipe(),
    }
    assert Config(recipes).selected() == ["alone", "first", "middle", "last"]
    assert Config(recipes, only=("last", "first")).selected() == ["first", "last"]


@pytest.mark.parametrize("flag", ["alpha 0.5", "temperature 4", "scale_soft_loss false"])
def test_distillation_settings_without_a_teacher_are_refused(flag):
    field = flag.split()[0]
    with pytest.raises(UserError, match=rf"^student\.{field} = .*: has no effect without a teacher$"):
        parse([f"--student.{field}", flag.split()[1]])
    assert parse([f"--student_kd.{field}", flag.split()[1]]) != PRESETS["cifar10"]
    assert parse([f"--student.{field}", flag.split()[1], "--student.teacher", "teacher"])


def test_a_loss_of_which_nothing_is_left_is_refused():
    with pytest.raises(UserError, match=r"^student_kd\.soft_weight = 0"):
        parse(["--student_kd.alpha", "0", "--student_kd.soft_weight", "0"])
    assert parse(["--student_kd.alpha", "0"]).recipes["student_kd"].weight_of_soft_loss == 1


def test_recipes_whose_names_differ_only_in_case_are_refused():
    """On macOS and Windows they would share a checkpoint."""
    with pytest.raises(UserError) as error:
        Config({"Student": Recipe(), "teacher": Recipe(), "student": Recipe()})
    assert [message.split(":")[0] for message in error.value.messages] == ["recipe 'Student'", "recipe 'student'"]
    assert "in more than upper and lower case" in str(error.value)
    assert Config({"student": Recipe(), "student2": Recipe()})


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    fields = ("dataset", "data_path", "checkpoints_path", "imgs_path")
    by_flag = parse([f"--{field}=~/some/{field}" for field in fields])
    by_edit = dataclasses.replace(PRESETS["cifar10"], **{field: f"~/some/{field}" for field in fields})
    for field in fields:
        assert Path(getattr(by_flag, field)) == tmp_path / "some" / field
    assert by_edit == by_flag
    assert parse(["--data_path", "a~b"]).data_path == "a~b"


# config.py


TEACHER = re.search(r'arch="resnet50", epochs=\d+\)', (ROOT / "config.py").read_text(encoding="utf-8"))[0]


@pytest.fixture
def edit(tmp_path):
    """Write a copy of config.py with one edit, of the first `old`, and return the number of its line."""

    def write(old: str, new: str) -> int:
        text = (ROOT / "config.py").read_text(encoding="utf-8")
        assert old in text
        (tmp_path / "config.py").write_text(text.replace(old, new, 1))
        return text[: text.index(old)].count("\n") + 1

    return write


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TEACHER, 'arch="resnet50", epochs=-1)', "epochs = -1: must be an integer, 0 or more\n"),
        (
            TEACHER,
            'arch="resnet50", epoch=5)',
            "TypeError: Recipe.__init__() got an unexpected keyword argument 'epoch'",
        ),
        (TEACHER, "arch=resnet50, epochs=5)", "NameError: name 'resnet50' is not defined\n"),
        (TEACHER, 'arch="resnet50" epochs=5)', ""),
        ('scratch(arch="resnet50")', 'scratch(arch="resnet50", lr=0)', "lr = 0: must be a number above 0\n"),
        ("**STUDY", "**5", "TypeError: 'int' object is not a mapping\n"),
        ("image_size=64", "image_size=64 / 0", "ZeroDivisionError: division by zero\n"),
        ("image_size=64", "image_size=4", "image_size = 4: must be an integer, 8 to 4096\n"),
    ],
    ids=["value", "field", "name", "syntax", "partial", "type", "arithmetic", "preset"],
)
def test_a_mistake_in_config_py_is_reported_with_its_line(edit, tmp_path, monkeypatch, old, new, message):
    number = edit(old, new)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "config", raising=False)
    with pytest.raises(UserError) as error:
        utils.import_config()
    assert f"{error.value}\n".startswith(f"config.py, line {number}: {message}")


def test_several_mistakes_on_one_line_of_config_py_are_all_reported(tmp_path):
    module = tmp_path / "edited.py"
    module.write_text("from engine.settings import Recipe\n\nROW = Recipe(\n    epochs=-1,\n    lr=-1,\n)\n")
    spec = importlib.util.spec_from_file_location("edited", module)
    with pytest.raises(UserError) as error, locate_errors(module):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert [message.split(" = ")[0] for message in error.value.messages] == [
        "edited.py, line 3: epochs",
        "edited.py, line 3: lr",
    ]


def test_rows_can_be_renamed_and_added(edit, tmp_path):
    row = '"student_kd": Recipe(\n'
    new = '"second": Recipe(epochs=3, teacher="teacher"), "third": Recipe(teacher="teacher", soft_loss="ttm"),'
    edit(row, new + row.replace("student_kd", "pupil"))
    spec = importlib.util.spec_from_file_location("edited_config", tmp_path / "config.py")
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)
    recipes = edited.PRESETS["cifar10"].recipes
    assert list(recipes) == ["teacher", "student", "student_10", "second", "third", "pupil"]
    assert recipes["pupil"] == RECIPES["student_kd"]
    assert recipes["second"] == Recipe(epochs=3, teacher="teacher")
    assert edited.parse(["--second.alpha", "0.5"]).recipes["second"].alpha == 0.5


# The documents


def commands() -> list[tuple[str, list[str]]]:
    """The script and the flags of every command that the documents show."""
    pages = ("README.md", "docs/usage.md", "docs/speed.md", "docs/answer.md")
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    joined = text.replace("\\\n", " ")
    found = re.findall(
        r"(?:^    |&& )python ((?:custom_resnet|teacher_student_model|evaluate)\.py)(.*?)(?=&&|#|$)",
        joined,
        flags=re.MULTILINE,
    )
    return [(script, shlex.split(words)) for script, words in found]


@pytest.mark.parametrize(("script", "words"), commands(), ids=str)
def test_the_documented_commands_are_understood(script, words, monkeypatch, tmp_path):
    """Their flags; the run that --run names need not exist, nor does a file of one's own."""
    assert (ROOT / script).exists()
    if script == "evaluate.py":
        _, words = evaluate.script_flags(words)
    if not any("my_project" in word for word in words) and "--help" not in words:
        assert parse(words)


# Errors


def test_user_errors_are_printed_one_per_line_without_control_characters(capsys):
    with pytest.raises(SystemExit) as exit, exit_on_error():
        raise UserError("\x1b[2Ja file\nof two lines", "class 名")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: \\x1b[2Ja file\\nof two lines\n       class 名\n"
    assert escape_control("\x1b\x7f\u202e\ud800") == r"\x1b\x7f\u202e\ud800"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (Diverged("the loss became NaN"), 1, "error: the loss became NaN\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_statuses_of_divergence_and_interruption(capsys, error, status, message):
    with pytest.raises(SystemExit) as exit, exit_on_error():
        raise error
    assert exit.value.code == status
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_error():
        raise ZeroDivisionError


@pytest.mark.parametrize("presets", [None, {}, [1], {"mine": RECIPES}, {1: PRESETS["scratch"]}], ids=repr)
def test_presets_must_be_a_table_of_configs(presets):
    with pytest.raises(UserError, match="PRESETS: "):
        flags.check_presets(presets)


@pytest.mark.parametrize("row", [{"arch": "resnet18"}, (1, 2), None, Recipe], ids=repr)
def test_a_row_that_is_no_recipe_is_named(row):
    with pytest.raises(UserError, match="recipe 'student'"):
        Config({"teacher": Recipe(), "student": row})


@pytest.mark.parametrize(("recipes", "message"), [(["student"], "recipes = "), ({10: Recipe()}, "recipe 10")], ids=repr)
def test_recipes_must_be_a_table_of_names(recipes, message):
    with pytest.raises(UserError, match=message):
        Config(recipes)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "config.py: "),
        ("ALL_PRESETS = {}\n", "config.py: "),  # no parse
        ("import os\n\nos.environ['NOT_SET']\n", "config.py, line 3: KeyError: 'NOT_SET'"),
        ("x = 1\0\n", "config.py: "),
        ("assert 1 == 2\n", "config.py, line 1: AssertionError"),
    ],
    ids=["empty", "parse", "environment", "NUL", "assertion"],
)
def test_a_config_py_that_cannot_be_used_is_named(tmp_path, monkeypatch, text, where):
    (tmp_path / "config.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "config", raising=False)
    with pytest.raises(UserError) as error:
        utils.import_config()
    assert str(error.value).startswith(where)


def test_an_error_of_the_system_is_one_line_with_its_path(tmp_path, capsys):
    """Every path of a name that is too long; root may enter every folder."""
    long = tmp_path / ("x" * 300)
    for look in (Path.stat, os.listdir, Path.read_bytes):
        with pytest.raises(SystemExit) as exit, exit_on_error():
            look(long)
        assert exit.value.code == 2
        assert capsys.readouterr().err == f"error: {long}: File name too long\n"
    with pytest.raises(OSError, match="no source"), exit_on_error():
        raise OSError("no source")  # of a library: a bug


@pytest.mark.parametrize("words", [["--dataset"], ["--teacher.epochs=0", "--teacher.weights"], ["--predict"]], ids=str)
def test_a_path_that_cannot_be_looked_at_is_one_line(tmp_path, capsys, words):
    main = evaluate.main if words == ["--predict"] else teacher_student_model.main
    with pytest.raises(SystemExit) as exit:
        main(["--preset=demo", f"--checkpoints_path={tmp_path}", f"--imgs_path={tmp_path}", *words, "x" * 300])
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {'x' * 300}: File name too long"


def test_suggest_names_the_closest_or_all():
    assert suggest("studnet", ["teacher", "student"]) == "did you mean student?"
    assert closest("early_stopping", ["epochs", "teacher.label_smoothing"]) is None  # worse than no suggestion
    assert suggest("x", ["teacher", "student"]) == "known: teacher, student"


def test_at_most_ten_messages_are_shown():
    messages = [str(number) for number in range(12)]
    assert at_most_ten(messages[:10]) == messages[:10]
    assert at_most_ten(messages) == [*messages[:10], "and 2 more"]


def test_first_line_of_an_error_without_a_message_is_its_type():
    assert first_line(RuntimeError("cause\ndetails")) == "cause"
    assert first_line(MemoryError()) == "MemoryError"


# Nothing is dropped in silence


@pytest.mark.parametrize(
    "words",
    [
        ["--only", "student", "--only", "teacher"],
        ["--seeds", "0", "--seeds", "1"],
        ["--seeds=0", "--seeds", "0"],
        ["--student.lr=0.1", "--student.lr=0.2"],
        ["--overwrite", "--overwrite", "false"],
        ["--sweep", "student.lr=0.1,0.2", "--sweep", "student_kd.alpha=0,1"],
        ["--preset", "scratch", "--student.lr=0.1"],
        ["--sweep", "student.lr=0.1,0.2", "student.lr=0.3"],
    ],
    ids=" ".join,
)
def test_a_flag_or_a_swept_setting_given_twice_is_refused(words):
    with pytest.raises(UserError, match="twice"):
        parse(["--preset", "scratch", *words])


def test_a_flag_of_a_script_given_twice_is_refused(capsys):
    for words in (["--predict", "a.png", "--predict", "b.png"], ["--run", "a", "--run", "b"]):
        with pytest.raises(SystemExit) as exit:
            evaluate.main(words)
        assert exit.value.code == 2
        assert "given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "twice"),
    [
        ('"student_10": Recipe(', '"student": Recipe(', "student"),  # a copied row
        ('"scratch": Config(', '"original": Config(', "original"),
    ],
)
def test_a_row_or_a_preset_of_an_existing_name_is_refused(edit, tmp_path, old, new, twice):
    number = edit(old, new)
    with pytest.raises(UserError, match=rf"config\.py, line {number}: '{twice}' is there twice"):
        check_duplicate_keys(tmp_path / "config.py")


@pytest.mark.parametrize(
    ("words", "baseline", "advice"),
    [
        ("", "student_10", None),
        ("--student_kd.arch mobilenet_v3_small", None, "--student_10.arch mobilenet_v3_small"),
        ("--student_10.arch mobilenet_v3_small", None, "--student_kd.arch mobilenet_v3_small"),
        ("--student_kd.arch resnet34 --student_10.arch resnet34", "student_10", None),
        ("--arch resnet34", "student_10", None),
        ("--student_kd.arch resnet34 --student_kd.baseline student_10", "student_10", None),
        ("--student_kd.arch resnet34 --student_kd.baseline student", "student", None),
    ],
)
def test_a_flag_never_leads_to_a_comparison_of_architectures_that_no_row_names(words, baseline, advice, capsys):
    """With the flag that is advised, there is a comparison again."""
    assert parse(words.split()).recipes["student_kd"].baseline == baseline
    output = capsys.readouterr().err
    assert (advice is None) == ("not compared" not in output)
    if advice:
        assert f"Add {advice}," in output
        assert parse([*words.split(), *advice.split()]).recipes["student_kd"].baseline == "student_10"


def test_a_sweep_over_architectures_compares_like_with_like():
    recipes = parse(["--sweep", "student_kd.arch=resnet18,resnet34"]).recipes
    found = {name: r.baseline for name, r in recipes.items() if name.startswith("student_kd-")}
    assert found == {"student_kd-arch-resnet18": "student_10", "student_kd-arch-resnet34": None}
    both = parse(["--sweep", "student_kd.arch=resnet18,resnet34", "student_10.arch=resnet18,resnet34"]).recipes
    assert [both[f"student_kd-arch-{a}"].baseline for a in ("resnet18", "resnet34")] == [
        "student_10-arch-resnet18",
        "student_10-arch-resnet34",
    ]
