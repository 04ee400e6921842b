import dataclasses
import shutil

import pytest
import torchvision
from conftest import ROOT

from config import ARCHS, PRESETS, Config, Recipe, UserError, parse


def test_archs_are_those_of_torchvision():
    known = torchvision.models.list_models(module=torchvision.models)
    assert set(ARCHS) == {name for name in known if "resne" in name}


def test_the_default_is_the_set_up_of_the_original():
    config = parse([])
    assert (config.dataset, config.image_size, config.batch_size, config.horizontal_flip) == ("cifar10", 224, 100, 0.5)
    rows = {name: (r.arch, r.epochs, r.lr, r.momentum, r.pretrained) for name, r in config.recipes.items()}
    assert rows == {
        "teacher": ("resnet50", 5, 0.001, 0.9, True),
        "student": ("resnet18", 5, 0.001, 0.9, True),
        "student_kd": ("resnet18", 10, 0.001, 0.9, True),
    }
    taught = config.recipes["student_kd"]
    assert (taught.teacher, taught.alpha, taught.temperature, taught.scale_soft_loss) == ("teacher", 0.25, 5.0, True)


def test_original_differs_from_the_default_only_in_the_factor_of_the_loss():
    original, default = PRESETS["original"], PRESETS["cifar10"]
    assert not original.recipes["student_kd"].scale_soft_loss
    recipes = {name: dataclasses.replace(recipe, scale_soft_loss=True) for name, recipe in original.recipes.items()}
    assert dataclasses.replace(original, recipes=recipes, run="cifar10") == default


def test_a_flag_does_what_an_edit_does():
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


def test_each_preset_is_its_own_run():
    assert {name: parse(["--preset", name]).run for name in PRESETS} == {name: name for name in PRESETS}


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ("--batch_sise 64", ["--batch_sise", "did you mean --batch_size?"]),
        ("--epochs 3", ["--epochs", "--teacher.epochs or --student.epochs"]),
        ("--student_dk.alpha 0.5", ["--student_dk.alpha", "did you mean --student_kd.alpha?"]),
        ("--preset dem", ["--preset dem", "did you mean demo?"]),
        ("64", ["'64'", "a value without a flag"]),
        ("--batch_size", ["--batch_size", "expected one argument"]),
        ("--batch_size many", ["batch_size = 'many'", "a whole number, 2 or more"]),
        ("--batch_size 60000", ["batch_size = 60000", "50000 training images"]),
        ("--validation_size 50000", ["validation_size = 50000", "leaves none"]),
        ("--seeds 1 2 1", ["seeds = (1, 2, 1)", "none of them twice"]),
        ("--seeds 0,1", ["seeds = ['0,1']", "with spaces between them"]),
        ("--crop_padding 2000", ["crop_padding = 2000", "from 0 to 1000"]),
        ("-preset demo", ["-preset", "did you mean --preset?"]),
        ("--seeds -1", ["seeds = (-1,)", "from 0"]),
        ("--only studnet", ["only = 'studnet'", "did you mean student?"]),
        ("--student.arch resnet19", ["student.arch = 'resnet19'", "resnet18"]),
        ("--student.epochs 0", ["student.epochs = 0", "1 or more"]),
        ("--student.lr 0", ["student.lr = 0.0", "above 0"]),
        ("--student_kd.alpha 1.5", ["student_kd.alpha = 1.5", "0 to 1"]),
        ("--student_kd.temperature 0", ["student_kd.temperature = 0.0", "above 0"]),
        ("--student_kd.temperature inf", ["student_kd.temperature = inf", "above 0"]),
        ("--student_kd.temperature nan", ["student_kd.temperature = nan"]),
        ("--student.nesterov yes", ["student.nesterov = 'yes'", "true or false"]),
        ("--student.nesterov true --student.momentum 0", ["student.nesterov", "momentum above 0"]),
        ("--student.train_size 50", ["student.train_size = 50", "batch_size = 100"]),
        ("--student.teacher nobody", ["student.teacher = 'nobody'", "no such recipe"]),
        ("--student_kd.baseline nobody", ["student_kd.baseline = 'nobody'", "no such recipe"]),
        ("--student.baseline student", ["student.baseline = 'student'", "another recipe"]),
        ("--teacher.teacher student_kd", ["teacher.teacher = 'student_kd'", "teacher <- student_kd <- teacher"]),
        ("--student.teacher student", ["student.teacher = 'student'", "in a circle"]),
        ("--run ../elsewhere", ["run = '../elsewhere'", "letters, digits"]),
        ("--device tpu", ["device = 'tpu'", "cuda"]),
        ("--precision fp8", ["precision = 'fp8'", "bf16"]),
    ],
)
def test_a_mistake_is_named_with_its_field_its_value_and_what_it_takes(flags, messages):
    with pytest.raises(UserError) as error:
        parse(flags.split())
    for message in messages:
        assert message in str(error.value)


def test_all_mistakes_are_told_at_once():
    flags = "--sed 1 --image_size x --seeds 0 0 --student.epochs 0 --student.lr -1 --student_kd.teacher nobody"
    with pytest.raises(UserError) as error:
        parse(flags.split())
    told = str(error.value)
    for field in ("--sed", "image_size", "seeds", "student.epochs", "student.lr", "student_kd.teacher"):
        assert field in told, told
    assert len(error.value.messages) == 6


def test_recipes_and_configs_are_validated_when_made_and_cannot_be_changed():
    with pytest.raises(UserError, match="epochs = '5'"):
        Recipe(epochs="5")
    with pytest.raises(UserError, match=r"in config\.py as a tuple"):
        Config({"student": Recipe()}, seeds=[0, 1])
    with pytest.raises(UserError, match="one recipe or more"):
        Config({})
    with pytest.raises(UserError, match="its name takes"):
        Config({"../x": Recipe()})
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


def test_help_has_a_line_and_a_default_for_each_field(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config)[1:]:
        assert f"--{field.name} " in shown
    for field in dataclasses.fields(Recipe):
        assert f"--RECIPE.{field.name} " in shown
    assert "(teacher 5, student 5, student_kd 10)" in " ".join(shown.split())
    assert "%%" not in shown


def test_a_script_may_have_flags_of_its_own(capsys):
    own = {"--predict IMAGE ...": "what the models say of these files"}
    with pytest.raises(SystemExit):
        parse(["--help"], own)
    shown = capsys.readouterr().out
    assert "[--predict IMAGE ...] [--preset NAME]" in shown
    assert "--predict IMAGE ...       what the models say of these files" in shown
    with pytest.raises(UserError, match="did you mean --predict"):
        parse(["--predcit"], own)
    with pytest.raises(UserError, match="no such setting"):
        parse(["--predict", "x.png"])


def test_importing_the_settings_does_nothing_else(script):
    done = script("-c", "import sys, config; print('torch' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_mistake_while_editing_is_told_in_a_line(script, tmp_path):
    for name in ("config.py", "utils.py", "custom_resnet.py"):
        shutil.copy(ROOT / name, tmp_path)
    text = (tmp_path / "config.py").read_text()
    (tmp_path / "config.py").write_text(text.replace('arch="resnet50", epochs=5)', 'arch="resnet50", epochs=0)'))
    done = script("custom_resnet.py", cwd=tmp_path)
    assert done.returncode == 2
    (number,) = (n for n, line in enumerate(text.splitlines(), 1) if 'arch="resnet50", epochs=5)' in line)
    assert done.stderr == f"error: config.py, line {number}: epochs = 0: takes a whole number, 1 or more\n"
    (tmp_path / "config.py").write_text(text.replace('arch="resnet50", epochs=5)', 'arch="resnet50", epoch=5)'))
    done = script("custom_resnet.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: config.py, line {number}: ")
    assert "unexpected keyword argument 'epoch'" in done.stderr


def test_a_row_may_be_renamed_and_added(script, tmp_path):
    text = (ROOT / "config.py").read_text()
    row = '"student_kd": Recipe(arch="resnet18", epochs=10, teacher="teacher", alpha=0.25, temperature=5.0),'
    rows = row.replace("student_kd", "pupil") + row.replace("student_kd", "second")
    (tmp_path / "config.py").write_text(text.replace(row, rows))
    show = "from config import *; r = PRESETS['original'].recipes; print(r['pupil'] == r['second'], r['pupil'])"
    shown = script("-c", show, cwd=tmp_path).stdout
    assert shown.startswith("True ")
    assert "scale_soft_loss=False" in shown
