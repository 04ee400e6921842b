"""Models that other runs have trained are used, and the evaluation knows a run."""

import copy
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, fit, flags, override, paths, start_training
from torch import nn

import config as config_module
import custom_resnet
import evaluate
import teacher_student_model
from config import parse
from engine.checkpoints import load_checkpoint, load_training, save_checkpoint
from engine.fingerprints import EARLIER, find_identical_model, training_settings
from engine.models import build_model
from engine.reach import code_digest
from engine.recipes import Recipe
from engine.settings import Model


def test_a_second_run_with_the_same_teacher_trains_one_model_only(tmp_path, trained, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    words = flags(tmp_path, "--run=warmer", "--student_kd.temperature=4")
    teacher_student_model.main(words)
    output = capsys.readouterr().err
    for name in ("teacher", "student"):
        source = tmp_path / f"checkpoints/demo/seed0/{name}.pt"
        assert f"warmer/seed0/{name}.pt: copied from {source}, which was trained with" in output
        assert f"{name} seed 0  epoch" not in output
    assert output.count("student_kd seed 0  epoch") == 2
    assert "logits of teacher seed 0  read from" in output  # they came along
    for name in ("teacher", "student"):
        one, other = (load_checkpoint(tmp_path / f"checkpoints/{run}/seed0/{name}.pt") for run in ("demo", "warmer"))
        assert all(torch.equal(tensor, other["model"][key]) for key, tensor in one["model"].items())


def test_other_settings_are_trained_again(tmp_path, trained, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    teacher_student_model.main(flags(tmp_path, "--run=other", "--only=student", "--student.lr=0.02"))
    output = capsys.readouterr().err
    assert "trained with the same settings" not in output
    assert output.count("student seed 0  epoch") == 2


def test_auto_precision_follows_a_model_that_is_used(tmp_path, trained, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    teacher_student_model.main(flags(tmp_path, "--run=auto", "--precision=auto", "--only", "teacher", "student"))
    output = capsys.readouterr().err
    assert output.count("trained with the same settings") == 2
    assert output.count("is finished") == 2


def test_a_run_has_one_precision_whatever_it_copies(tmp_path, trained, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")  # demo, in fp32
    words = flags(tmp_path, "--only", "teacher", "student")
    teacher_student_model.main(override(words, "--run=a16", "--precision=bf16", "--only", "student"))
    teacher_student_model.main(
        override(words, "--run=auto", "--precision=auto")
    )  # finds the student in both, a16 first
    found = [
        load_training(tmp_path / f"checkpoints/{run}/seed0/{name}.pt").precision
        for run, name in (("a16", "student"), ("auto", "teacher"), ("auto", "student"))
    ]
    assert found == ["bf16", "fp32", "fp32"]


@pytest.mark.chaos
def test_a_renamed_row_is_copied_and_evaluated_under_its_new_name(tmp_path, trained, monkeypatch, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    recipes = dict(config_module.PRESETS["scratch"].recipes)
    recipes["renamed"] = recipes.pop("student")
    monkeypatch.setitem(
        config_module.ALL_PRESETS, "scratch", replace(config_module.PRESETS["scratch"], recipes=recipes)
    )
    words = [word.replace("--student.", "--renamed.") for word in flags(tmp_path)]
    custom_resnet.main(override(words, "--only=renamed"))
    assert "copied from" in capsys.readouterr().err
    monkeypatch.undo()
    evaluate.main(["--run=demo", *(word for word in words if "_path=" in word)])
    assert "renamed" in json.loads((tmp_path / "imgs/demo/results.json").read_text())["models"]


@pytest.mark.parametrize("run", ["demo", "other"])
def test_a_damaged_checkpoint_is_not_copied(tmp_path, trained, capsys, run):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/demo/seed0/student.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    custom_resnet.main(flags(tmp_path, f"--run={run}", "--only=student", "--overwrite"))
    assert "student seed 0  epoch" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / f"checkpoints/{run}/seed0/student.pt")["finished"]


@pytest.mark.chaos
def test_one_teacher_teaches_students_of_several_seeds(tmp_path, capsys):
    words = flags(tmp_path, "--seeds", "0", "1", "--student_kd.teacher_seed=5", "--student_kd.epochs=1")
    words = override(words, "--student.epochs=1")
    teacher_student_model.main(words)
    assert capsys.readouterr().err.count("teacher seed 5  epoch") == 2
    evaluate.main(words)
    results = json.loads((tmp_path / "imgs/demo/results.json").read_text())
    assert list(results["models"]["teacher"]["accuracy"]["seeds"]) == ["5"]
    (row, _) = results["fidelity"]
    assert (row["model"], row["seeds"]) == ("student_kd", [0, 1])
    assert results["versus_teacher"][0]["accuracy_of_teacher"] == results["models"]["teacher"]["accuracy"]["mean"]
    arrays = np.load(tmp_path / "imgs/demo/predictions.npz")
    teacher, first = (arrays[key].argmax(1) for key in ("teacher/seed5", "student_kd/seed0"))
    second = arrays["student_kd/seed1"].argmax(1)
    assert row["agreement"] == pytest.approx(((teacher == first).mean() + (teacher == second).mean()) / 2)
    assert results["comparisons"][0]["disagreements"]["seeds"] == {"teacher": 5, "student": 0, "student_kd": 0}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "momentum": 0.9, "lr": 0.001, "label_smoothing": 0.1},
        pytest.param({"arch": "resnet18", "stem": "cifar"}, marks=pytest.mark.chaos),
        {"arch": "mobilenet_v3_small"},  # has dropout
        pytest.param({"arch": "efficientnet_b0"}, marks=pytest.mark.chaos),  # has dropout and stochastic depth
    ],
    ids=["adamw", "stem", "dropout", "stochastic depth"],
)
def test_resuming_is_bit_exact_with_every_feature(config, digits, changes):
    recipe = Recipe(**{**SMALL, "train_size": 50, **changes})
    config = replace(config, image_size=16 if recipe.arch == "resnet18" else 32)

    def run(every: int | None) -> dict:
        calls, saved, history = 0, [], []

        def stop() -> int:
            nonlocal calls
            calls += 1
            return signal.SIGINT if every and calls % every == 0 else 0

        while len(history) < recipe.epochs:
            assert calls < 100
            torch.manual_seed(0 if not saved else 99)
            model = build_model(recipe.arch, 10, stem=recipe.stem).to(config.device, memory_format=torch.channels_last)
            state = copy.deepcopy(saved[-1]) if saved else None
            loss = custom_resnet.cross_entropy
            history = fit(model, recipe, config, 0, digits, loss, state=state, write=saved.append, stop=stop)
            saved[-1] = copy.deepcopy(saved[-1])
        return saved[-1]["model"]

    whole, interrupted = run(None), run(3)
    assert all(torch.equal(tensor, interrupted[name]) for name, tensor in whole.items())


def test_a_state_of_another_device_keeps_this_devices_optimizer(config, model):
    """An interrupted run may be resumed on a device that has no fused optimizer, or that alone has one."""
    recipe = Recipe(**SMALL)
    saved = start_training(model, recipe, config, 0, 100).state_dict()
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = None
    (group,) = start_training(model, recipe, config, 0, 100, state=saved).optimizer.param_groups
    assert group["fused"] is True


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_resumes_in_another_memory_format(config, optimizer):
    """MPS trains in the contiguous one, CPU and CUDA in channels_last. Against a run in one format."""
    recipe, formats = Recipe(optimizer=optimizer, lr=0.1, epochs=1), (torch.contiguous_format, torch.channels_last)

    def steps(model, state, numbers):
        training = start_training(model, recipe, config, 0, 100, state=state)
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            training.optimizer.step()
        return copy.deepcopy(training.state_dict())

    def build(memory_format):
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3).to(config.device, memory_format=memory_format)

    for first, second in (formats, formats[::-1]):
        expected = steps(build(first), None, range(6))["model"]
        resumed = steps(build(second), steps(build(first), None, range(3)), range(3, 6))["model"]
        for name, tensor in expected.items():
            torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)


# The evaluation knows the run


def test_evaluate_needs_only_the_name_of_a_run(tmp_path, capsys):
    words = flags(tmp_path, "--run=warmer", "--only=student", "--student.lr=0.03", "--student.epochs=1")
    custom_resnet.main(override(words, "--seeds", "3"))
    custom_resnet.main(override(words, "--seeds", "4"))
    evaluate.main(["--run", "warmer", *paths(tmp_path)])
    results = json.loads((tmp_path / "imgs/warmer/results.json").read_text())
    assert results["settings"]["recipes"]["student"]["lr"] == 0.03
    assert list(results["models"]["student"]["accuracy"]["seeds"]) == ["3", "4"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.main(["--run", "nowhere", *paths(tmp_path), "--dataset=digits"])
    assert "checkpoints/nowhere: holds no checkpoints; train first" in capsys.readouterr().err


# The code and the precision are environment


def rewrite_environment(path: Path, **changes) -> None:
    """As if the model had been trained by other code, or in another precision."""
    state = load_checkpoint(path)
    save_checkpoint(path, {**state, "environment": {**state["environment"], **changes}})


def test_a_model_of_other_code_is_kept_in_its_run_named_and_trained_again_by_overwrite(tmp_path, trained, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    path, words = tmp_path / "checkpoints/demo/seed0/student.pt", flags(tmp_path, "--only=student")

    def train(*more: str) -> str:
        capsys.readouterr()
        custom_resnet.main(override(words, *more))
        return capsys.readouterr().err

    assert "--overwrite" not in train("--overwrite")  # of this code
    rewrite_environment(path, code="other")
    before = path.read_bytes()
    output = train()
    assert "is finished" in output
    assert "--overwrite" in output
    assert path.read_bytes() == before
    evaluate.main(words)
    report = (tmp_path / "imgs/demo/results.md").read_text()
    assert "Trained with code other, " in report
    assert train("--overwrite").count("student seed 0  epoch") == 2
    assert load_training(path).environment["code"] == code_digest()


def test_a_model_of_another_precision_is_kept_in_its_run_and_named(tmp_path, trained, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/demo/seed0/student.pt"
    before = path.read_bytes()
    custom_resnet.main(flags(tmp_path, "--only=student", "--precision=bf16", "--overwrite"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is finished" in line]
    assert "fp32" in line
    assert "bf16" in line
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("environment", "precision", "found"),
    [
        ({}, "fp32", True),
        ({}, "auto", True),
        ({}, "bf16", False),
        ({"precision": "bf16"}, "bf16", True),
        ({"precision": "bf16"}, "auto", True),
        ({"precision": "bf16"}, "fp32", False),
        ({"precision": "fp32 (convolutions in TF32)"}, "fp32", True),
        ({"code": "other"}, "fp32", False),
        ({"code": "other"}, "auto", False),
    ],
    ids=str,
)
def test_a_model_is_copied_only_if_it_is_of_this_code_and_precision(
    tmp_path, trained, digits, environment, precision, found
):
    path = tmp_path / "checkpoints/demo/seed0/student.pt"
    path.parent.mkdir(parents=True)
    shutil.copy(trained / "checkpoints/demo/seed0/student.pt", path)
    rewrite_environment(path, **environment)
    model = Model("student", 0, parse(flags(tmp_path, "--run=other", f"--precision={precision}")))
    settings = training_settings(model, digits)
    assert find_identical_model(model, settings) == (path if found else None)
    assert find_identical_model(model, {**settings, "seed": 1}) is None
    assert find_identical_model(replace(model, seed=1), settings) is None


def test_an_unfinished_model_is_not_copied(tmp_path, trained, digits):
    path = tmp_path / "checkpoints/demo/seed0/student.pt"
    replace(load_training(trained / "checkpoints/demo/seed0/student.pt"), progress={"step": 1}).save(path)
    model = Model("student", 0, parse(flags(tmp_path, "--run=other")))
    assert find_identical_model(model, training_settings(model, digits)) is None


def test_a_run_from_before_a_setting_stays_valid(tmp_path, trained):
    """Its checkpoints do not record the setting, which means its default; any other value is a change."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").rglob("*.pt"):
        state = load_checkpoint(path)
        for setting in (*EARLIER, "clip_norm", "class_names"):
            state["settings"]["recipe"].pop(setting, None)
            for recipe in state["config"]["recipes"].values():
                recipe.pop(setting, None)
        save_checkpoint(path, state)
    words = flags(tmp_path, "--only", "teacher", "student")
    teacher_student_model.main(words)
    evaluate.main(["--run=demo", "--device=cpu", *paths(tmp_path)])
    for setting in ("--student.mean 0.5 0.5 0.5", "--student.clip_norm 1", "--student.class_weights balanced"):
        with pytest.raises(SystemExit):
            teacher_student_model.main(override(words, *setting.split()))
