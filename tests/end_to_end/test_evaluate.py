import csv
import io
import json
import os
import shutil
import sys

import filelock
import numpy as np
import pytest
import torch
from conftest import flags, override
from PIL import Image
from synthetic import probabilities_of

import evaluate
import teacher_student_model
from engine.checkpoints import load_checkpoint, save_checkpoint
from engine.models import build_model


@pytest.fixture
def digit_files(tmp_path, digits):
    """The first three test images as files: PNG, enlarged, and one that a camera has laid on its side."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in digits.test.images[:3].cpu()]
    images[0].save(tmp_path / "0.png")
    images[1].resize((80, 80), Image.Resampling.BILINEAR).convert("L").save(tmp_path / "1.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    images[2].rotate(90, expand=True).save(tmp_path / "2.png", exif=exif)
    return [str(tmp_path / name) for name in ("0.png", "1.bmp", "2.png")]


def test_predict_prints_each_models_probabilities_for_each_file(trained, digit_files, report, capsys):
    evaluate.main(flags(trained, "--seeds", "0", "1", "--dataset", "no/such/folder", "--predict", *digit_files))
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert len(blocks) == 3
    arrays = np.load(report / "predictions.npz")
    columns = [f"{model} seed {seed}" for model in ("teacher", "student", "student_kd") for seed in (0, 1)]
    for number, block in enumerate(blocks):
        rows = [[word.strip() for word in line.strip("|").split("|")] for line in block.splitlines()]
        assert rows[0] == [digit_files[number], *columns]
        assert [row[0] for row in rows[2:]] == ["**class**", *"0123456789"]
        if number == 1:  # has been enlarged before: other pixels
            continue
        for column, name in enumerate(columns, 1):
            p = probabilities_of(arrays[name.replace(" seed ", "/seed")][number : number + 1])[0]
            assert rows[2][column] == f"**{p.argmax()}**"
            assert [float(row[column]) for row in rows[3:]] == pytest.approx(list(100 * p), abs=0.051)


def test_predictions_are_written_to_a_csv_file(trained, digit_files, report, tmp_path, capsys):
    path = tmp_path / "predicted.csv"
    evaluate.main(flags(trained, "--seeds", "0", "--predict", *digit_files, "--csv", str(path)))
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(file) for file in digit_files]
    with np.load(report / "predictions.npz") as arrays:
        for number, row in enumerate(rows):
            if number == 1:  # has been enlarged before: other pixels
                continue
            p = probabilities_of(arrays["student_kd/seed0"][number : number + 1])[0]
            assert row["student_kd/seed0"] == str(p.argmax())
            assert float(row["student_kd/seed0/probability"]) == pytest.approx(p.max(), abs=1e-4)
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags(trained, "--csv", str(path)))
    assert exit.value.code == 2
    assert "goes with --predict" in capsys.readouterr().err


def test_predict_takes_folders_and_shows_the_likeliest_20_classes(tmp_path, capsys):
    folder, classes = tmp_path / "photos", [f"class {number}" for number in range(30)]
    (folder / "more").mkdir(parents=True)
    for name in ("b.png", "a.jpg", ".hidden.png", "more/c.png"):
        Image.new("RGB", (9, 9)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / "more" / "junk.png").write_bytes(b"junk")
    model = build_model("resnet18", 30)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.arange(30.0))
    state = {"name": "student", "seed": 0, "arch": "resnet18", "stem": "imagenet", "classes": classes, "finished": True}
    state |= {"config": {"image_size": 16, "recipes": {}, "seeds": (0,), "swept": {}}, "environment": {}, "history": []}
    state |= {"settings": {"recipe": {}, "config": {}}, "normalisation": {}}
    save_checkpoint(tmp_path / "checkpoints/demo/seed0/student.pt", {**state, "model": model.state_dict()})
    evaluate.main(flags(tmp_path, "--only", "student", "--predict", str(folder)))
    output = capsys.readouterr()
    assert f"left out: {folder / 'more' / 'junk.png'}" in output.err
    blocks = output.out.strip().split("\n\n")
    names = [block.split("|")[1].strip() for block in blocks]
    assert names == [str(folder / name) for name in ("a.jpg", "b.png", "more/c.png")]
    for block in blocks:
        assert [line.split("|")[1].strip() for line in block.splitlines()[3:]] == classes[10:]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        evaluate.main(flags(tmp_path, "--only", "student", "--predict", str(tmp_path / "empty")))
    assert "empty: holds no images" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["junk.png", "cut.png", "gone.png", "hostile\x1b[31m\n\udcff.png"])
def test_predict_reports_an_unreadable_file(trained, digit_files, tmp_path, name, capsys):
    (tmp_path / "junk.png").write_bytes(b"junk")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags(trained, "--predict", digit_files[0], str(tmp_path / name)))
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    shown = name.replace("\x1b", r"\x1b").replace("\n", r"\n").replace("\udcff", r"\udcff")
    assert f"{tmp_path}/{shown}: cannot be read as an image (" in line


def test_predict_without_checkpoints_or_files_is_an_error(trained, digit_files, tmp_path, capsys):
    for words, output in (
        (flags(tmp_path, "--predict", digit_files[0]), "train first: python teacher_student_model.py"),
        (flags(trained, "--predict"), "--predict: expected at least one argument"),
        (flags(trained, "--predict", digit_files[0], "--export"), "not allowed with argument --predict"),
        (flags(trained, "--pedict", digit_files[0]), "did you mean --predict?"),
    ):
        with pytest.raises(SystemExit) as exit:
            evaluate.main(words)
        assert exit.value.code == 2
        assert output in capsys.readouterr().err


def test_hostile_file_names_do_not_break_the_table(trained, digit_files, tmp_path, capsys):
    path = tmp_path / "a|b\x1b[31m\n.png"
    shutil.copy(digit_files[0], path)
    evaluate.main(flags(trained, "--only", "student", "--predict", str(path)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 10
    assert lines[0].startswith(f"| {tmp_path}/a\\|b\\\\x1b[31m .png | student seed 0")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The small experiment, its distilled student exported."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    evaluate.main(flags(folder, "--seeds", "0", "--export"))
    return folder


def test_export_writes_distilled_models_or_the_selected_ones(exported, capsys):
    assert [path.name for path in exported.rglob("*.pt2")] == ["student_kd.pt2"]
    evaluate.main(flags(exported, "--seeds", "1", "--only", "student", "--export"))
    assert {str(path.relative_to(exported / "checkpoints/demo")) for path in exported.rglob("*.pt2")} == {
        "seed0/student_kd.pt2",
        "seed1/student.pt2",
    }
    output = capsys.readouterr().err
    assert "the checkpoint's class on all 500 test images" in output
    assert f"{exported}/checkpoints/demo/seed1/student.pt2, 1." in output


def test_an_exported_model_needs_only_torch_and_predicts_the_same(exported, trained, report, digits, script, tmp_path):
    arrays = np.load(report / "predictions.npz")
    torch.save({"images": digits.test.images.cpu(), "labels": digits.test.labels.cpu()}, tmp_path / "test.pt")
    program = """
import sys, torch
test = torch.load(sys.argv[2])
model = torch.export.load(sys.argv[1]).module()
probabilities = model(test["images"])
one = torch.cat([model(image[None]) for image in test["images"][:3]])
large = model(torch.zeros(2, 3, 50, 400, dtype=torch.uint8))
assert "torchvision" not in sys.modules and "evaluate" not in sys.modules
print((probabilities.argmax(1) == test["labels"]).sum().item(), (one - probabilities[:3]).abs().max().item() < 1e-5)
print(tuple(large.shape), probabilities.dtype, not probabilities.requires_grad)
torch.save(probabilities, sys.argv[3])
"""
    path = exported / "checkpoints/demo/seed0/student_kd.pt2"
    done = script("-c", program, path, tmp_path / "test.pt", tmp_path / "out.pt", cwd=tmp_path)
    right = int((arrays["student_kd/seed0"].argmax(1) == arrays["labels"]).sum())
    assert done.stdout == f"{right} True\n(2, 10) torch.float32 True\n", done.stderr
    found = torch.load(tmp_path / "out.pt").numpy()
    np.testing.assert_allclose(found, probabilities_of(arrays["student_kd/seed0"]), atol=1e-4)


def test_an_onnx_model_predicts_the_same(exported, report, digits):
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    evaluate.main(flags(exported, "--seeds", "0", "--export", "onnx"))
    path = exported / "checkpoints/demo/seed0/student_kd.onnx"
    session = runtime.InferenceSession(str(path))
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1]) == ("images", "tensor(uint8)", 3)
    assert not any(isinstance(given.shape[axis], int) for axis in (0, 2, 3))
    assert returned.name == "probabilities"
    with np.load(report / "predictions.npz") as arrays:
        expected = probabilities_of(arrays["student_kd/seed0"])
    (found,) = session.run(None, {"images": digits.test.images.cpu().numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-4)
    (large,) = session.run(None, {"images": np.zeros((2, 3, 50, 400), np.uint8)})
    assert large.shape == (2, 10)
    (about,) = (entry.value for entry in onnx.load(path).metadata_props if entry.key == "about")
    assert json.loads(about)["classes"] == list("0123456789")


def test_onnx_without_its_packages_says_what_to_install(exported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags(exported, "--seeds", "0", "--export", "onnx"))
    assert exit.value.code == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_an_export_lists_its_classes(exported):
    about = {"about.json": ""}
    torch.export.load(str(exported / "checkpoints/demo/seed0/student_kd.pt2"), extra_files=about)
    expected = {"name": "student_kd", "seed": 0, "classes": list("0123456789"), "image_size": 16}
    assert expected.items() <= json.loads(about["about.json"]).items()


@pytest.mark.parametrize("spoiled", ["program", "numbers"])
def test_an_export_that_differs_from_the_checkpoint_is_not_written(exported, spoiled, monkeypatch, capsys):
    write = evaluate.export_program

    def wrong(model, *how):
        with torch.no_grad():
            model.fc.bias[3] += torch.nan if spoiled == "numbers" else 2
        return write(model, *how)

    monkeypatch.setattr(evaluate, "export_program", wrong)
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags(exported, "--only", "teacher", "--export"))
    assert exit.value.code == 2
    assert "differs from the checkpoint" in capsys.readouterr().err
    assert not os.path.exists(exported / "checkpoints/demo/seed0/teacher.pt2")


@pytest.mark.parametrize(
    ("main", "more", "where"),
    [
        (teacher_student_model.main, [], "checkpoints/demo"),
        (evaluate.main, [], "imgs/demo"),
        (evaluate.main, ["--export"], "checkpoints/demo"),
    ],
    ids=["train", "evaluate", "export"],
)
def test_a_script_is_refused_while_its_folder_is_locked(exported, capsys, main, more, where):
    folder = exported / where
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")), pytest.raises(SystemExit) as exit:
        main(flags(exported, *more))
    assert exit.value.code == 2
    assert f"{folder}: another process is writing there" in capsys.readouterr().err


def test_a_student_of_a_retrained_teacher_is_refused_even_with_only(trained, tmp_path, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    other = flags(tmp_path, "--teacher.lr=0.02")
    teacher_student_model.main(override(other, "--only=teacher", "--overwrite"))
    with pytest.raises(SystemExit) as exit:
        evaluate.main(override(other, "--only", "student", "student_kd"))
    assert exit.value.code == 2
    assert "weights of the teacher was" in capsys.readouterr().err


def spoil(path, how: str) -> str:
    """Make the logits of a checkpoint infinite or NaN; returns what an error should name."""
    state = load_checkpoint(path)
    if how == "running variance":
        state["model"]["layer1.0.bn1.running_var"][3] = torch.nan
        named = "layer1.0.bn1.running_var"
    else:
        state["model"]["fc.weight"].fill_(3e38)
        named = "images are NaN or infinite"
    save_checkpoint(path, state)
    return named


@pytest.mark.parametrize("how", ["running variance", "too large weights"])
def test_a_model_without_finite_logits_is_refused_by_name(trained, digit_files, tmp_path, how, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    named = spoil(tmp_path / "checkpoints/demo/seed0/student.pt", how)
    for more in ([], ["--predict", digit_files[0]], ["--export"]):
        with pytest.raises(SystemExit) as exit:
            evaluate.main(flags(tmp_path, "--only", "student", *more))
        assert exit.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "student seed 0" in message
        assert named in message
    assert not (tmp_path / "imgs/demo/results.json").exists()


@pytest.mark.parametrize(("views", "how"), [("stored", "running variance"), ("online", "too large weights")])
def test_a_student_is_told_that_its_teacher_is_at_fault(tmp_path, views, how, capsys):
    words = flags(tmp_path, *(["--crop_padding=2"] if views == "online" else []))
    teacher_student_model.main(override(words, "--only", "teacher", "--teacher.epochs=1"))
    spoil(tmp_path / "checkpoints/demo/seed0/teacher.pt", how)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        teacher_student_model.main(override(words, "--only", "student_kd", "--teacher.epochs=1"))
    assert exit.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "teacher seed 0" in message
    assert not list(tmp_path.rglob("student_kd.pt"))


def test_only_the_command_line_of_evaluate_chooses_bfloat16(tmp_path, capsys):
    """A run in bfloat16 is evaluated in float32, in which no two classes have the same logit."""
    words = ["bf16" if word == "fp32" else word for word in flags(tmp_path, "--student.arch=resnet18")]
    teacher_student_model.main(override(words, "--only", "student", "--student.weights=random", "--student.epochs=0"))
    paths = [word for word in words if word.startswith(("--checkpoints_path", "--imgs_path"))]
    for more, precision in ([], "fp32"), (["--precision", "bf16"], "bf16"):
        evaluate.main(["--run", "demo", "--device", "cpu", *paths, *more])
        results = json.loads((tmp_path / "imgs/demo/results.json").read_text())
        logits = torch.from_numpy(np.load(tmp_path / "imgs/demo/predictions.npz")["student/seed0"])
        highest = logits.sort(1).values[:, -2:]
        ties = int((highest[:, 0] == highest[:, 1]).sum())
        assert results["models"]["student"]["ties"] == ties
        assert (ties > 0) == (precision == "bf16")
        assert bool((logits == logits.bfloat16()).all()) == (precision == "bf16")
        assert results["environment"]["precision"].split()[0] == precision
        assert results["settings"]["precision"] == precision
        text = (tmp_path / "imgs/demo/results.md").read_text()
        assert ("the same highest logit" in text) == (ties > 0)
        capsys.readouterr()


def test_evaluate_prints_class_names_to_an_ascii_stdout(image_folder, tmp_path, monkeypatch):
    root = image_folder({f"{split}/{name}": 4 for split in ("train", "test") for name in ("名前", "accuracy")})
    own = [f"--dataset={root}", "--only=student", "--student.train_size=none", "--student.epochs=1", "--batch_size=4"]
    own += ["--teacher.train_size=none", "--student_kd.train_size=none"]
    teacher_student_model.main(flags(tmp_path, *own))
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    evaluate.main(flags(tmp_path, *own))
    assert rb"\u540d\u524d" in written.getvalue()
    results = json.loads((tmp_path / "imgs/demo/results.json").read_text())
    assert results["classes"] == ["accuracy", "名前"]  # the first is also a row of scikit-learn's report
