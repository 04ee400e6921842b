import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flags, override
from work_for_jobs import note

import teacher_student_model
from config import PRESETS
from engine import jobs
from engine.checkpoints import load_checkpoint
from engine.jobs import run_in_workers, start_workers
from engine.reach import code_digest
from engine.settings import Model


def run(number: int, models: dict) -> None:
    with start_workers(note, number, "fork") as workers:
        run_in_workers(workers, models, lambda model: model)


def times(folder) -> dict[str, tuple[float, float]]:
    found = {path.name: path.read_text().split() for path in folder.iterdir()}
    return {name: (float(began), float(ended)) for name, (began, ended) in found.items()}


def test_a_student_waits_for_its_teacher_and_others_do_not(tmp_path):
    teacher, alone, student = (("teacher", tmp_path), ("alone", tmp_path), ("student", tmp_path))
    run(2, {teacher: None, student: teacher, alone: None})  # the teacher waits for "alone"
    found = times(tmp_path)
    assert found["student"][0] >= found["teacher"][1] >= found["alone"][1]


def test_a_failure_ends_the_others_and_gives_its_status(tmp_path):
    with pytest.raises(SystemExit) as exit:
        run(1, {("fails", tmp_path): None, ("other", tmp_path): None})
    assert exit.value.code == 7
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_a_killed_process_is_named(tmp_path, capfd):
    with pytest.raises(SystemExit) as exit:
        run(1, {("is killed", tmp_path): None})
    assert exit.value.code == 128 + signal.SIGKILL
    assert "is killed" in (output := capfd.readouterr().err)
    assert "signal 9" in output


@pytest.mark.chaos
def test_a_worker_ends_with_its_parent_whatever_it_computes():
    """The parent is killed, so that it can tell its workers nothing."""
    code = """
import sys
sys.path.append("tests")
from work_for_jobs import note
from engine.jobs import run_in_workers, start_workers
with start_workers(note, 2, "fork") as workers:
    run_in_workers(workers, {("for ever", ""): None, ("for ever", "too"): None}, lambda model: model)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    numbers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    try:
        process.communicate(timeout=20)  # until nobody holds its stdout
    except subprocess.TimeoutExpired:
        for number in numbers:
            os.kill(number, signal.SIGKILL)
        raise


def test_a_job_is_asked_to_stop_where_a_signal_would_kill_it(tmp_path, monkeypatch):
    """As on Windows, whose `terminate` does not ask."""
    monkeypatch.setattr(jobs, "os", SimpleNamespace(name="nt", environ=os.environ))
    with start_workers(note, 1, "fork") as workers:
        workers[0].pipe.send(("saves", tmp_path))
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
    assert (tmp_path / "saves").exists()
    assert workers[0].process.exitcode == 0


def test_each_job_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    run(2, {("rank", tmp_path): None, ("rank", str(tmp_path)): None})
    assert {path.name for path in tmp_path.iterdir()} == {"rank0", "rank1"}
    used = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("load_dataset", "configure_backends"):
        monkeypatch.setattr(teacher_student_model, name, lambda *_: None)
    monkeypatch.setattr(teacher_student_model, "train_with_teacher", lambda model, *_: used.append(model.config.device))
    for rank in (0, 1, 2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        config = replace(PRESETS["demo"], device="cuda")
        teacher_student_model.train_in_worker(Model("teacher", 0, config), None, torch.get_num_threads())
    assert used == ["cuda:0", "cuda:1", "cuda:0"]


def check_experiment(folder, output: str) -> None:
    """Two students start at the same time, and the logits of their teacher are computed once."""
    for name in ("teacher", "student_kd-temperature-1", "student_kd-temperature-4"):
        assert load_checkpoint(folder / f"checkpoints/demo/seed0/{name}.pt")["finished"]
    assert output.count("epoch 30/30") == 2
    assert sorted(re.findall(r"logits of teacher seed 0  (\w+ \w+)", output)) == ["100 computed", "read from"]
    started = [output.index(f"student_kd-temperature-{t} seed 0  timm:test_resnet") for t in (1, 4)]
    assert max(started) < output.index("epoch 30/30")


SWEEP = ["--jobs=2", "--only", "teacher", "student_kd", "--sweep", "student_kd.temperature=1,4"]
SWEEP += ["--teacher.epochs=1", "--student_kd.epochs=30"]


@pytest.mark.chaos
def test_jobs_of_a_process_that_cannot_fork_train_the_whole_experiment(tmp_path, capfd):
    teacher_student_model.main(flags(tmp_path, *SWEEP))
    check_experiment(tmp_path, capfd.readouterr().err)


@pytest.mark.chaos
def test_a_run_uses_the_code_of_its_start(tmp_path):
    """The students start after the edits: of a loss, and of config.py, which is half-typed."""
    for name in ("config.py", "custom_resnet.py", "teacher_student_model.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("diagnose", "engine", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "teacher_student_model.py", *flags(tmp_path, *SWEEP)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    output = process.stderr.readline() + process.stderr.readline()  # about the data, before any model is trained
    assert "demo: digits" in output
    for name in ("config.py", "engine/soft_losses.py", "teacher_student_model.py", "engine/settings.py"):
        with open(tmp_path / name, "a") as file:
            file.write("\nhalf typed =\n")
    output += process.communicate(timeout=120)[1]
    assert process.returncode == 0, output
    check_experiment(tmp_path, output)
    codes = [load_checkpoint(path)["environment"]["code"] for path in tmp_path.rglob("*.pt")]
    assert codes == [code_digest()] * 3


@pytest.mark.chaos
@pytest.mark.parametrize("to_all", [False, True], ids=["parent", "all"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_jobs_and_the_same_command_resumes(tmp_path, number, to_all):
    """A terminal sends Ctrl-C to all processes of a command, and the parent passes it on."""
    words = flags(tmp_path, "--jobs=2", "--only", "teacher", "student")
    words = override(words, "--teacher.epochs=300", "--student.epochs=300")
    command = [sys.executable, "teacher_student_model.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    waiting = {"teacher seed 0  epoch", "student seed 0  epoch"}
    while process.poll() is None and waiting:
        line = process.stderr.readline()
        waiting = {start for start in waiting if start not in line}
    (os.killpg if to_all else os.kill)(process.pid, number)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    for name in ("teacher", "student"):
        state = load_checkpoint(tmp_path / f"checkpoints/demo/seed0/{name}.pt")
        assert not state["finished"]
        assert state["history"]
