"""The two scripts that train: what they leave on the disk, skip, refuse, and do with a signal."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import ROOT, override
from conftest import flags as small_flags

import custom_resnet
import evaluate
import teacher_student_model
from engine import estimate
from engine.checkpoints import load_checkpoint, load_training, tensors_digest
from engine.inference import predict
from engine.models import load_model


def test_a_checkpoint_is_a_plain_torchvision_model(tmp_path):
    custom_resnet.main(small_flags(tmp_path, "--only=student", "--student.arch=resnet18", "--student.epochs=1"))
    path = tmp_path / "checkpoints/demo/seed0/student.pt"
    state, ours = torch.load(path, weights_only=True), load_model(load_training(path), "cpu")
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.load_state_dict(state["model"], strict=True)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(theirs.eval()(images), predict(ours, images), atol=1e-5, rtol=0)
    assert state["classes"] == list("0123456789")
    assert state["settings"]["recipe"]["lr"] == 0.01
    assert len(state["history"]) == 1
    assert state["environment"]["torch"] == torch.__version__
    assert "optimizer" not in state


@pytest.mark.parametrize(
    ("signal_number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.chaos)]
)
def test_a_signal_stops_a_run_after_the_current_step(tmp_path, signal_number, status):
    words = small_flags(tmp_path, "--only=student", "--student.epochs=300")
    command = [sys.executable, "custom_resnet.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines = []
    while process.poll() is None and not any("epoch  " in line for line in lines):
        lines.append(process.stderr.readline())
    process.send_signal(signal_number)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert "Traceback" not in output
    assert "the same command resumes it" in output
    state = load_checkpoint(tmp_path / "checkpoints/demo/seed0/student.pt")
    assert not state["finished"]
    assert len(state["history"]) >= 1


def test_finished_models_are_skipped_and_other_settings_need_overwrite(tmp_path, capsys):
    small = small_flags(tmp_path, "--only", "student")
    custom_resnet.main(small)
    output = capsys.readouterr().err
    assert "demo: digits, 1,297 training and 500 test images of 10 classes at 16 px; cpu" in output
    assert "0.374 million parameters, from random weights, 2 epochs of 100 images" in output
    assert output.count("epoch  ") == 2
    path = tmp_path / "checkpoints/demo/seed0/student.pt"
    before = path.read_bytes()

    custom_resnet.main(small)
    assert f"student seed 0  is finished: {path}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        custom_resnet.main(override(small, "--batch_size", "20", "--student.lr", "0.02"))
    assert exit.value.code == 2
    output = capsys.readouterr().err
    assert "student.lr was 0.01, is now 0.02; batch_size was 25, is now 20" in output
    assert "train student again: python teacher_student_model.py" in output
    assert "--overwrite" in output
    assert path.read_bytes() == before
    with pytest.raises(SystemExit):
        custom_resnet.main([*small, "--student.weights", "typo.pth"])
    assert "typo.pth: cannot be read as weights (No such file or directory)" in capsys.readouterr().err

    path.write_bytes(before[:1000])
    with pytest.raises(SystemExit):
        custom_resnet.main(small)
    assert "is damaged" in capsys.readouterr().err
    custom_resnet.main(override(small, "--student.lr", "0.02", "--overwrite"))
    assert load_checkpoint(path)["settings"]["recipe"]["lr"] == 0.02


def test_only_recipes_without_a_teacher_are_trained(tmp_path, capsys):
    custom_resnet.main(small_flags(tmp_path, "--student.epochs=1", "--teacher.epochs=1"))
    assert sorted(path.name for path in tmp_path.rglob("*.pt")) == ["student.pt", "teacher.pt"]
    with pytest.raises(SystemExit):
        custom_resnet.main(small_flags(tmp_path, "--only", "student_kd"))
    assert "use python teacher_student_model.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_sise", "64"], "did you mean --batch_size?"),
        (["--student.epochs", "0", "--seeds", "1", "1"], "student.epochs = 0"),
        (["--device", "cuda:99"], "the number of CUDA devices here is"),
        (["--dataset", "nowhere"], "dataset = 'nowhere': no such folder"),
        (["--student.pretrained=true", "--student.arch=resnet18"], "resnet18-f37072fd.pth: is missing"),
        (["--student.train_size", "1290", "--validation_size", "100"], "student.train_size = 1290"),
        (["--student.train_size", "1290"], "train_size = 1290: must select and leave at least one image of each class"),
        (["--validation_size", "3"], "validation_size = 3: must select and leave at least one image of each class"),
        (["--checkpoints_path", "/proc/nowhere"], "/proc/nowhere/demo: cannot be written"),
    ],
)
def test_bad_input_is_one_error_and_status_2(tmp_path, hub, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        custom_resnet.main(override(small_flags(tmp_path, "--only", "student"), *flags))
    assert exit.value.code == 2
    output = capsys.readouterr().err
    assert output.count("error: ") == 1
    assert message in output.split("error: ")[1]
    assert not (tmp_path / "checkpoints/demo").exists()


def test_auto_precision_is_measured_once_per_run(tmp_path, monkeypatch, capsys):
    faster = {"fp32": 2.0, "bf16": 1.0}
    monkeypatch.setattr(estimate, "supports_bf16", lambda *_: True)
    monkeypatch.setattr(
        estimate,
        "time_training",
        lambda archs, config, dataset, precisions: {(a, p): faster[p] for a in archs for p in precisions},
    )
    words = small_flags(tmp_path, "--precision=auto", "--teacher.epochs=1", "--student.epochs=1")
    custom_resnet.main(override(words, "--only=teacher"))
    assert "precision = auto: bf16 is faster for this run" in capsys.readouterr().err
    faster.update(fp32=0.5)  # as if the machine were another one now
    custom_resnet.main(override(words, "--only=student"))
    assert "precision = auto" not in capsys.readouterr().err
    for name in ("teacher", "student"):
        assert load_training(tmp_path / f"checkpoints/demo/seed0/{name}.pt").precision == "bf16"


def test_the_script_trains_every_recipe_and_seed_once(trained, capsys):
    folder = trained / "checkpoints"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file())  # no locks
    names = ("student.pt", "student_kd.pt", "teacher.logits", "teacher.pt")
    assert files == [f"demo/seed{seed}/{name}" for seed in (0, 1) for name in names]
    times = {path: (folder / path).stat().st_mtime_ns for path in files}
    teacher_student_model.main(small_flags(trained, "--seeds", "0", "1"))
    assert {path: (folder / path).stat().st_mtime_ns for path in files} == times
    assert capsys.readouterr().err.count("is finished") == 6


def test_with_unlimited_views_the_teacher_runs_online(tmp_path, capsys):
    teacher_student_model.main(small_flags(tmp_path, "--augment", "trivialaugment"))
    assert "logits of teacher" not in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("[!.]*.*") if path.is_file()} == {
        "teacher.pt",
        "student.pt",
        "student_kd.pt",
    }


def test_a_chain_of_teachers_is_trained_in_order(tmp_path, capsys):
    chain = ["--student.teacher", "teacher", "--student_kd.teacher", "student", "--only", "student_kd", "student"]
    with pytest.raises(SystemExit) as exit:
        teacher_student_model.main(small_flags(tmp_path, *chain))
    assert exit.value.code == 2
    assert "the teacher 'teacher' is not trained yet" in capsys.readouterr().err
    teacher_student_model.main(small_flags(tmp_path, *chain, "teacher"))
    state = load_checkpoint(tmp_path / "checkpoints/demo/seed0/student_kd.pt")
    middle = load_checkpoint(tmp_path / "checkpoints/demo/seed0/student.pt")
    assert state["settings"]["weights of the teacher"] == tensors_digest(middle["model"])


def test_a_student_of_another_teacher_is_refused_and_overwrite_trains_only_what_differs(trained, tmp_path, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    other = small_flags(tmp_path, "--teacher.lr", "0.02")
    with pytest.raises(SystemExit):
        teacher_student_model.main(other)
    assert "teacher.lr was 0.01, is now 0.02" in capsys.readouterr().err
    teacher_student_model.main(override(other, "--only", "teacher", "--overwrite"))
    with pytest.raises(SystemExit):
        teacher_student_model.main(other)
    assert "weights of the teacher was" in capsys.readouterr().err
    teacher_student_model.main(override(other, "--overwrite"))
    output = capsys.readouterr().err
    assert [line for line in output.splitlines() if "is finished" in line] == [
        f"{name} seed 0  is {what}: {tmp_path}/checkpoints/demo/seed0/{name}.pt"
        for name, what in (("teacher", "finished"), ("student", "finished"), ("student_kd", "finished"))
    ]


def test_a_finished_student_does_not_need_its_teacher(trained, tmp_path, capsys):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/demo/seed0/teacher.pt").unlink()
    words = small_flags(tmp_path, "--only", "student", "student_kd")
    teacher_student_model.main(words)
    assert capsys.readouterr().err.count("is finished") == 2
    evaluate.main(words)


@pytest.mark.chaos
def test_the_original_set_up_runs_end_to_end(miniature_cifar10, hub, tmp_path, capsys):
    """CIFAR-10 and ImageNet weights from torchvision's own places, with stand-ins in them; smaller and shorter."""
    hub.mkdir(parents=True)
    for arch, file in (("resnet18", "resnet18-f37072fd.pth"), ("resnet50", "resnet50-11ad3fa6.pth")):
        torch.save(torchvision.models.get_model(arch).state_dict(), hub / file)
    paths = {"data_path": miniature_cifar10.parent, "checkpoints_path": tmp_path / "c", "imgs_path": tmp_path / "i"}
    small = {
        "image_size": 16,
        "precision": "fp32",
        "batch_size": 50,
        "only": "student_kd teacher",
        "teacher.epochs": 1,
        "student_kd.epochs": 1,
    }
    settings = {**paths, **small, "device": "cpu"}
    words = [word for name, value in settings.items() for word in (f"--{name}", *str(value).split())]
    teacher_student_model.main(words)
    evaluate.main(words)
    output = capsys.readouterr()
    assert "cifar10, 100 training and 20 test images of 10 classes at 16 px" in output.err
    assert "resnet50, 23.5 million parameters, from ImageNet weights" in output.err
    assert [line.split("|")[1].strip() for line in output.out.splitlines()[2:5]] == ["plane", "car", "bird"]
    assert (tmp_path / "i/cifar10/results.md").is_file()
