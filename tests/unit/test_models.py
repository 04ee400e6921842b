import argparse
import json
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import flags, override, random_images
from torch import nn
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

import evaluate
import teacher_student_model
from custom_resnet import build_resnet, train_model
from engine.checkpoints import Checkpoint, load_checkpoint, load_training, save_checkpoint, tensors_digest
from engine.errors import UserError
from engine.fields import read_class_names
from engine.images import IMAGENET, Normalisation, normalisation_of
from engine.inference import predict
from engine.models import build_model, check_image_size, chosen_normalisation, initial_model, load_model, read_weights
from engine.recipes import ARCHS, Recipe
from engine.settings import Model

DIGITS = tuple("0123456789")
FAMILIES = ["efficientnet_b0", "googlenet", "mobilenet_v3_small", "resnet18", "squeezenet1_1", "swin_t"]


def check_arch(arch: str) -> None:
    torch.manual_seed(0)
    model = build_model(arch, 7)
    try:
        check_image_size(model, arch, 32)
        size = 32
    except UserError as error:  # it says which size would do
        size = int(str(error).rpartition("made for ")[2].removesuffix(" px"))
        check_image_size(model, arch, size)
    with torch.inference_mode():
        assert model.eval()(torch.randn(2, 3, size, size)).shape == (2, 7)
    options = {"aux_logits": False, "init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    theirs = torchvision.models.get_model(arch, num_classes=7, **options)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_builds_with_torchvisions_names(arch):
    check_arch(arch)


def test_the_stem_of_a_recipe_is_that_of_its_model():
    for stem, size in (("imagenet", (7, 7)), ("cifar", (3, 3))):
        assert initial_model(Recipe(stem=stem, pretrained=False), DIGITS).conv1.kernel_size == size


def test_initial_weights_are_torchvisions_for_the_seed():
    """Pinned: the stream of torch's generator for the seed."""
    torch.manual_seed(3)
    weights = initial_model(Recipe(pretrained=False), DIGITS).conv1.weight
    torch.manual_seed(3)
    assert torch.equal(weights, torchvision.models.resnet18().conv1.weight)
    expected = [0.005683334544301033, 0.01489682774990797, -0.004761551972478628]
    assert weights.flatten()[:3].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.chaos
@pytest.mark.parametrize("arch", sorted(set(ARCHS) - set(FAMILIES)))
def test_every_other_architecture_builds_with_torchvisions_names(arch):
    check_arch(arch)


def test_an_image_size_that_does_not_fit_is_an_error_before_training(tmp_path, capsys):
    words = flags(tmp_path, "--only=student", "--student.arch=vit_b_16")
    with pytest.raises(SystemExit) as exit:
        teacher_student_model.main(words)
    assert exit.value.code == 2
    output = capsys.readouterr().err
    assert "image_size = 16: vit_b_16 cannot be applied to images of this size" in output
    assert "it is made for 224 px" in output


def test_the_cifar_stem_keeps_the_resolution():
    model = build_model("resnet18", 10, stem="cifar")
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert model.layer4(model.layer3(model.layer2(model.layer1(torch.zeros(1, 64, 32, 32))))).shape == (1, 512, 4, 4)
    assert isinstance(model.maxpool, nn.Identity)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # as kuangliu's and weiaicunzai's ResNet18


def distil_evaluate_and_export(tmp_path, teacher: str, student: str, image_size: int, *more: str) -> None:
    words = flags(tmp_path, f"--image_size={image_size}")
    words = override(words, f"--teacher.arch={teacher}", f"--student_kd.arch={student}")
    words = override(words, *[f"--{name}.epochs=1" for name in ("teacher", "student_kd")])
    words = override(words, *more, "--only", "teacher", "student_kd")
    teacher_student_model.main(words)
    evaluate.main(words)
    results = json.loads((tmp_path / "imgs/demo/results.json").read_text())
    assert f"arch={student!r}" in results["not_compared"]["student_kd"]  # the row that would be its baseline
    evaluate.main(override(words, "--export"))
    assert (tmp_path / "checkpoints/demo/seed0/student_kd.pt2").exists()
    model = load_model(load_training(tmp_path / "checkpoints/demo/seed0/student_kd.pt"), "cpu")
    assert not any(module.training for module in model.modules())


@pytest.mark.chaos
def test_another_architecture_is_distilled_evaluated_and_exported(tmp_path):
    distil_evaluate_and_export(tmp_path, "squeezenet1_1", "mobilenet_v3_small", 32)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("teacher", "student", "image_size"),
    [("resnet50", "mobilenet_v3_small", 32), ("convnext_tiny", "resnet18", 32), ("vit_b_16", "efficientnet_b0", 224)],
)
def test_other_architectures_are_distilled_evaluated_and_exported(tmp_path, image_folder, teacher, student, image_size):
    root = image_folder({f"{split}/{name}": n for split, n in (("train", 12), ("test", 6)) for name in "ab"})
    few = [f"--{name}.train_size=none" for name in ("teacher", "student", "student_kd")]
    distil_evaluate_and_export(tmp_path, teacher, student, image_size, f"--dataset={root}", "--batch_size=8", *few)


def test_a_timm_model_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"did you mean resnet10t\?"):
        build_model("timm:resnet10tt", 7)


def test_timm_missing_is_an_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="timm is not installed; pip install timm"):
        build_model("timm:resnet10t", 7)


# Weights


def prefixed(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


LAYOUTS = {  # as training programs write them
    "plain": lambda state: state,
    "timm": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1), "metric": np.float64(76.1)},
    "torchvision": lambda state: {"model": state, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)},
    "nested": lambda state: {"ema": {"module": state}, "epoch": 3},
    **{key: lambda state, key=key: {key: state, "acc": np.float32(0.5)} for key in ("net", "model_state_dict", "ema")},
    **{p: lambda state, p=p: prefixed(p, state) for p in ("module.", "_orig_mod.", "_orig_mod.module.", "backbone.")},
    "Lightning": lambda state: {"state_dict": {**prefixed("model.", state), "criterion.weight": torch.ones(10)}},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_weights_is_used_as_it_is(tmp_path, layout):
    torch.manual_seed(3)
    theirs = build_model("timm:test_resnet", 10)
    torch.save(LAYOUTS[layout](theirs.state_dict()), tmp_path / "teacher.pth")
    loaded = initial_model(Recipe(arch="timm:test_resnet", weights=str(tmp_path / "teacher.pth"), epochs=0), DIGITS)
    assert loaded.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_of_two_models_in_a_file_none_is_guessed(tmp_path):
    state = build_model("timm:test_resnet", 10).state_dict()
    torch.save({**prefixed("a.", state), **prefixed("b.", state), "c.weight": torch.ones(1)}, tmp_path / "both.pth")
    with pytest.raises(UserError, match=r"does not fit.*Missing.*Unexpected.*a\."):
        initial_model(Recipe(arch="timm:test_resnet", weights=str(tmp_path / "both.pth"), epochs=0), DIGITS)


def test_a_compressed_file_is_refused_before_it_fills_the_memory(tmp_path):
    """torch.save compresses nothing. A hundred times more values would take 100 MB here."""
    torch.save({"w": torch.zeros(250_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    with pytest.raises(UserError, match="it is compressed"):
        read_weights(str(tmp_path / "bomb.pth"))


def test_weights_named_as_timm_names_them_are_used(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("resnet50", num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "teacher.pth")
    recipe = Recipe(arch="resnet50", weights=str(tmp_path / "teacher.pth"), epochs=0)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(initial_model(recipe, DIGITS).eval()(images), theirs(images), atol=1e-5, rtol=1e-5)


class Payload:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not weights", "cannot be read as weights"),
        (pickle.dumps(Payload()), "cannot be read as weights"),
        ({"model": {}, "best": Payload}, "it holds test_models.Payload"),
        ({"epoch": 3}, "does not hold a state dict"),
        ({0: torch.zeros(3)}, "does not hold a state dict"),
        ({"fc.weight": torch.eye(3).to_sparse()}, "does not hold a state dict"),
        ({"fc.weight": torch.zeros(1).expand(10**12)}, "does not hold a state dict"),
        ({"fc.weight": torch.tensor(1.0)}, "does not fit a "),
        ({}, "does not hold a state dict"),
        ([1, 2], "does not hold a state dict"),
        ({"fc.weight": torch.zeros(10, 3)}, "does not fit a "),
        ({"bn1.running_var": torch.tensor([1.0, torch.nan])}, "NaN or infinite, in bn1.running_var"),
        ({"fc.weight": torch.zeros(1000, 128)}, "classifies into 1000 classes, and the data set has 10"),
        (None, "No such file"),
    ],
)
def test_unusable_weights_are_one_error_and_nothing_is_trained(tmp_path, capsys, content, message):
    path = tmp_path / "teacher.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(SystemExit) as exit:
        teacher_student_model.main(flags(tmp_path, f"--teacher.weights={path}", "--teacher.epochs=0"))
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "executed" not in output.out
    assert "epoch" not in output.err
    assert not list(tmp_path.rglob("*.pt"))
    assert (path.read_bytes() if path.exists() else None) == before


def test_the_error_about_a_foreign_checkpoint_says_how_to_use_its_weights(config):
    path = Model("teacher", 0, config).path
    path.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(UserError, match=r"set RECIPE\.weights to their path"):
        load_checkpoint(path)


def test_a_teacher_from_a_file_teaches_and_is_reported(tmp_path, capsys, digits):
    path = tmp_path / "teacher.pth"
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    torch.save(theirs.state_dict(), path)
    words = flags(
        tmp_path, f"--teacher.weights={path}", "--teacher.epochs=0", "--teacher.arch=resnet18", "--student_kd.epochs=1"
    )
    words = override(words, "--only", "teacher", "student_kd")
    teacher_student_model.main(words)
    output = capsys.readouterr().err
    assert load_checkpoint(tmp_path / "checkpoints/demo/seed0/teacher.pt")["settings"]["config"] == {}
    accuracy = (predict(theirs, digits.test.images.cpu(), 16).argmax(1) == digits.test.labels.cpu()).float().mean()
    assert f"accuracy on the test images {accuracy:.2%}" in output
    assert f"warning: teacher seed 0 classifies only {accuracy:.0%} correctly" in output
    assert "normalisation" in output
    evaluate.main(override(words, "--export", "--only", "teacher"))
    state = load_checkpoint(tmp_path / "checkpoints/demo/seed0/teacher.pt")
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in theirs.state_dict().items())
    teacher_student_model.main(words)
    assert capsys.readouterr().err.count("is finished") == 2
    path.unlink()  # what was made of it is still there
    evaluate.main(words)


def test_other_weights_at_the_same_path_are_noticed(tmp_path, capsys):
    path = tmp_path / "teacher.pth"
    torch.manual_seed(1)  # training seeds with 0
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), path)
    words = flags(
        tmp_path, f"--teacher.weights={path}", "--teacher.epochs=0", "--teacher.arch=resnet18", "--only=teacher"
    )
    teacher_student_model.main(words)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), path)
    with pytest.raises(SystemExit):
        teacher_student_model.main(words)
    assert "teacher.weights was" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [10, 5])
def test_weights_with_epochs_are_fine_tuned_with_a_new_last_layer_where_classes_differ(tmp_path, classes):
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=classes)
    torch.save(theirs.state_dict(), tmp_path / "start.pth")
    model = initial_model(Recipe(weights=str(tmp_path / "start.pth"), epochs=2), DIGITS)
    assert torch.equal(model.conv1.weight, theirs.conv1.weight)
    assert model.fc.out_features == 10
    assert (classes == 10) == (model.fc.weight.shape == theirs.fc.weight.shape)


def test_a_finished_model_of_ours_can_be_trained_longer(tmp_path, trained, capsys):
    path = trained / "checkpoints/demo/seed0/student.pt"
    words = flags(tmp_path, "--only=student", f"--student.weights={path}", "--student.epochs=1")
    teacher_student_model.main(words)
    assert f"from the weights in {path}, 1 epoch" in capsys.readouterr().err
    before, after = (load_checkpoint(p)["model"] for p in (path, tmp_path / "checkpoints/demo/seed0/student.pt"))
    moved = (after["fc.weight"] - before["fc.weight"]).norm() / before["fc.weight"].norm()
    assert 0 < moved < 0.5


def own_checkpoint(path, **changes) -> nn.Module:
    """A checkpoint of this program, of a ResNet18 for the digits; returns the model."""
    torch.manual_seed(3)
    model = torchvision.models.resnet18(num_classes=10)
    state = {"name": "teacher", "seed": 0, "arch": "resnet18", "stem": "imagenet", "environment": {}, "finished": True}
    state |= {
        "classes": list(DIGITS),
        "normalisation": IMAGENET.as_recorded(),
        "settings": {"recipe": {}, "config": {}},
    }
    state |= {"config": {"recipes": {}, "seeds": (0,), "swept": {}, "image_size": 16}, "model": model.state_dict()}
    state |= {"history": [{"epoch": n, "loss": 0.5, "train_accuracy": 0.5} for n in range(1, 7)]}
    save_checkpoint(path, {**state, **changes})
    return model


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_finished_checkpoint_of_ours_with_the_same_classes_is_used(tmp_path, epochs):
    theirs, notes = own_checkpoint(tmp_path / "teacher.pt"), []
    model = initial_model(Recipe(weights=str(tmp_path / "teacher.pt"), epochs=epochs), DIGITS, notes.append)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert notes == []


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_checkpoint_of_ours_that_is_not_finished_is_refused(tmp_path, epochs):
    own_checkpoint(tmp_path / "teacher.pt", finished=False)
    with pytest.raises(UserError, match=r"training is not finished \(6 epochs"):
        initial_model(Recipe(weights=str(tmp_path / "teacher.pt"), epochs=epochs), DIGITS)


HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))


def test_a_checkpoint_of_ours_brings_its_normalisation(tmp_path):
    own_checkpoint(tmp_path / "teacher.pt", normalisation=HALF.as_recorded())
    recipe = Recipe(weights=str(tmp_path / "teacher.pt"), epochs=0)
    assert normalisation_of(initial_model(recipe, DIGITS)) == HALF
    assert chosen_normalisation(replace(recipe, mean=HALF.mean, std=HALF.std)) == HALF
    with pytest.raises(UserError, match=r"normalised with mean 0\.5 0\.5 0\.5 .*; leave out mean and std"):
        chosen_normalisation(replace(recipe, mean=IMAGENET.mean))


def test_only_weights_that_timm_downloads_bring_timms_normalisation(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained, **k: create(*a, pretrained=False, **k))
    recipe = Recipe(arch="timm:test_vit")
    own = timm.create_model("test_vit", pretrained=False).default_cfg
    assert normalisation_of(initial_model(recipe, DIGITS)) == (own["mean"], own["std"]) == ((0.5,) * 3, (0.5,) * 3)
    assert chosen_normalisation(replace(recipe, mean=IMAGENET.mean, std=IMAGENET.std)) == IMAGENET
    assert chosen_normalisation(replace(recipe, pretrained=False)) == IMAGENET
    assert chosen_normalisation(replace(recipe, weights=str(tmp_path / "file.pth"))) == IMAGENET


@pytest.mark.parametrize("values", ["0.5", "0.5 0.5", "0.5 0.5 0"])
def test_a_standard_deviation_is_three_numbers_above_0(values):
    with pytest.raises(UserError, match=r"std = .*: must be three numbers above 0, for red, green and blue"):
        Recipe(std=tuple(map(float, values.split())))


def test_images_are_normalised_as_a_models_weights_take_them(tmp_path, digits, capsys):
    """From the file of weights to the report, the predictions for files and the export; the student has others."""
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=10)
    torch.save(theirs.state_dict(), path := tmp_path / "teacher.pth")
    of_teacher = [f"--teacher.weights={path}", "--teacher.epochs=0", "--teacher.arch=resnet18"]
    of_teacher += ["--teacher.mean", *map(str, HALF.mean), "--teacher.std", *map(str, HALF.std)]
    of_student = ["--student_kd.epochs=1", "--student_kd.mean", *map(str, IMAGENET.mean[::-1])]
    words = flags(tmp_path, *of_teacher, *of_student, "--only", "teacher", "student_kd")
    teacher_student_model.main(words)
    assert "normalised with mean 0.5 0.5 0.5 and standard deviation 0.5 0.25 0.5" in capsys.readouterr().err
    folder = tmp_path / "checkpoints/demo/seed0"
    assert [load_checkpoint(folder / f"{n}.pt")["normalisation"] for n in ("teacher", "student_kd")] == [
        HALF.as_recorded(),
        {"mean": list(IMAGENET.mean[::-1]), "std": list(IMAGENET.std)},
    ]

    def expected(images: torch.Tensor) -> torch.Tensor:
        resized = [transforms.ToTensor()(transforms.Resize((16, 16))(to_pil_image(image))) for image in images.cpu()]
        with torch.inference_mode():
            return theirs.eval()(transforms.Normalize(*HALF)(torch.stack(resized)))

    subset = digits.subset(100)
    stored = load_checkpoint(folder / "teacher.logits")["logits"]
    exact = expected(digits.train.images[subset])
    torch.testing.assert_close(stored[0, subset], exact, atol=1e-3, rtol=1e-3)
    evaluate.main(words)
    with np.load(tmp_path / "imgs/demo/predictions.npz") as arrays:
        found = torch.from_numpy(arrays["teacher/seed0"])
    torch.testing.assert_close(found[:50], expected(digits.test.images[:50]), atol=1e-3, rtol=1e-3)
    evaluate.main(override(words, "--only=teacher", "--export"))
    program = torch.export.load(folder / "teacher.pt2").module()
    probabilities = expected(digits.test.images[:50]).softmax(1)
    torch.testing.assert_close(program(digits.test.images[:50].cpu()), probabilities, atol=1e-4, rtol=0)
    to_pil_image(digits.test.images[0].cpu()).save(tmp_path / "digit.png")
    capsys.readouterr()
    evaluate.main(override(words, "--only=teacher", "--predict", str(tmp_path / "digit.png")))
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[3:]]
    shown = {int(name): float(value) for name, value in rows}
    assert [shown[label] for label in range(10)] == pytest.approx((100 * probabilities[0]).tolist(), abs=0.06)

    teacher_student_model.main(words)  # nothing has changed
    for changed in ("--teacher.std=0.5", "--student_kd.mean=0.5"):  # and these have
        with pytest.raises(SystemExit) as exit:
            teacher_student_model.main(override(words, changed.split("=")[0], "0.5", "0.5", "0.5"))
        assert exit.value.code == 2
        name = changed[2:].split("=")[0]
        assert f"{name} was " in capsys.readouterr().err


def test_the_normalisation_of_a_teacher_counts_for_its_students(tmp_path, trained):
    """The same weights with images normalised in another way are another teacher."""
    path = tmp_path / "checkpoints/demo/seed0/teacher.pt"
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    state = load_checkpoint(path)
    before = Checkpoint.load(path).digest
    assert before == tensors_digest(state["model"])  # as before there were other normalisations
    save_checkpoint(path, {**state, "normalisation": HALF.as_recorded()})
    assert Checkpoint.load(path).digest != before


OTHER_ORDER = ("7", "0", "3")


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("given", ["checkpoint", "tuple", "file"])
def test_logits_are_those_of_the_data_sets_classes_by_name(tmp_path, given, epochs):
    """The data set has three of the teacher's ten classes, in another order."""
    path, names = tmp_path / "teacher.pt", None
    theirs = own_checkpoint(path)
    if given != "checkpoint":
        torch.save(theirs.state_dict(), path)
        names = DIGITS
    if given == "file":
        names = str(tmp_path / "names.txt")
        Path(names).write_text("\n".join(DIGITS) + "\n", encoding="utf-8")
    recipe = Recipe(weights=str(path), epochs=epochs, class_names=names)
    images = torch.randn(4, 3, 32, 32)
    found = initial_model(recipe, OTHER_ORDER).eval()(images)
    torch.testing.assert_close(found, theirs.eval()(images)[:, [7, 0, 3]], atol=1e-5, rtol=1e-5)


def test_a_file_of_class_names_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    assert read_class_names(str(tmp_path / "names.txt")) == ("cat", "dog")


def test_class_names_that_do_not_fit_are_refused(tmp_path):
    theirs = own_checkpoint(tmp_path / "teacher.pt")
    torch.save(theirs.state_dict(), path := str(tmp_path / "theirs.pth"))
    wrong = {"weights": path, "epochs": 0}
    with pytest.raises(UserError, match=r"classifies into 10 classes, and class_names has 3"):
        initial_model(Recipe(**wrong, class_names=("a", "b", "c")), OTHER_ORDER)
    with pytest.raises(UserError, match=r"its classes are a, b, .* and those of the data set 7, 0, 3"):
        initial_model(Recipe(**wrong, class_names=tuple("abcdefghij")), OTHER_ORDER)
    with pytest.raises(UserError, match=r"its classes are 0, 1, .*; leave out class_names"):
        initial_model(Recipe(weights=str(tmp_path / "teacher.pt"), class_names=OTHER_ORDER), DIGITS)
    for names, message in (
        (("a", "a"), "must be a file with the name of a class on each line, or the names, all different"),
        (str(tmp_path / "nowhere.txt"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            Recipe(**wrong, class_names=names)
    with pytest.raises(UserError, match="has no effect without a file of weights"):
        Recipe(class_names=OTHER_ORDER)


def test_another_order_of_class_names_is_another_model(tmp_path, capsys):
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), path := tmp_path / "teacher.pth")
    words = flags(tmp_path, f"--teacher.weights={path}", "--teacher.epochs=0", "--teacher.arch=resnet18")
    words = override(words, "--only=teacher")
    teacher_student_model.main(words)
    with pytest.raises(SystemExit):
        teacher_student_model.main(override(words, "--teacher.class_names", *DIGITS[::-1]))
    assert "teacher.class_names was None, is now" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_a_model_with_two_heads_is_fine_tuned_to_other_classes(tmp_path, arch):
    timm = pytest.importorskip("timm")
    theirs, notes = timm.create_model(arch, num_classes=7), []
    torch.save(theirs.state_dict(), tmp_path / "start.pth")
    recipe = Recipe(arch=f"timm:{arch}", weights=str(tmp_path / "start.pth"), epochs=2)
    model = initial_model(recipe, DIGITS, notes.append)
    assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 10)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    new = {name for name, tensor in theirs.state_dict().items() if tensor.shape != shapes[name]}
    for name, tensor in theirs.state_dict().items():
        assert name in new or torch.equal(model.state_dict()[name], tensor), name
    assert len({name.removesuffix(".weight").removesuffix(".bias") for name in new}) == 2  # the heads
    assert len(notes) == 1
    chosen = initial_model(replace(recipe, epochs=0, class_names=tuple("abcdefg")), ("g", "b")).eval()
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(chosen(images), theirs.eval()(images)[:, [6, 1]], atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_ours_with_other_classes_is_refused_or_gets_a_new_last_layer(tmp_path):
    theirs, notes, classes = own_checkpoint(tmp_path / "teacher.pt"), [], (*DIGITS[:9], "ten")
    with pytest.raises(UserError, match=r"its classes are 0, 1, .*, and those of the data set"):
        initial_model(Recipe(weights=str(tmp_path / "teacher.pt"), epochs=0), classes)
    model = initial_model(Recipe(weights=str(tmp_path / "teacher.pt"), epochs=2), classes, notes.append)
    assert torch.equal(model.conv1.weight, theirs.conv1.weight)
    assert not torch.equal(model.fc.weight, theirs.fc.weight)
    assert len(notes) == 1


def test_class_folders_that_change_places_are_noticed(tmp_path, image_folder, capsys):
    counts = {f"{split}/{name}": 30 for split in ("train", "test") for name in "ab"}
    words = flags(tmp_path, "--only=teacher", "--teacher.epochs=1")
    words = override(words, *[f"--{name}.train_size=none" for name in ("teacher", "student", "student_kd")])
    teacher_student_model.main(override(words, f"--dataset={image_folder(counts)}"))
    path = tmp_path / "checkpoints/demo/seed0/teacher.pt"
    assert load_checkpoint(path)["normalisation"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for split in ("train", "test"):
        (tmp_path / f"images/{split}/a").rename(tmp_path / f"images/{split}/z")
    words = override(words, f"--dataset={tmp_path / 'images'}", "--run=other", f"--teacher.weights={path}")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        teacher_student_model.main(override(words, "--teacher.epochs=0"))
    assert exit.value.code == 2
    assert "its classes are a, b, and those of the data set b, z" in capsys.readouterr().err
    teacher_student_model.main(words)
    assert "the last layer starts from random weights" in capsys.readouterr().err


def test_an_untrained_teacher_needs_no_file(config, digits):
    untrained = Recipe(arch="resnet18", weights="random", epochs=0)
    config = replace(config, recipes={**config.recipes, "teacher": untrained})
    train_model(Model("teacher", 0, config), digits)
    checkpoint = load_training(Model("teacher", 0, config).path)
    torch.manual_seed(0)
    assert torch.equal(checkpoint.weights["conv1.weight"], build_resnet("resnet18", 10).conv1.weight)
    assert checkpoint.finished
    assert checkpoint.history == []
    images = random_images(2, 8, 8)
    assert predict(load_model(checkpoint, "cpu"), images, 16).shape == (2, 10)
